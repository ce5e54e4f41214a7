//! Benchmark figures: ours beside a peer's, from the same run.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Milliseconds: less is better.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Per second: more is better.
    #[serde(rename = "1/s")]
    PerSecond,
}

/// One comparison. Figures are medians.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Our figure.
    pub ours: f64,
    /// Who it is compared with.
    pub peer: String,
    /// The peer's figure.
    pub peers_figure: f64,
    /// Ours divided by the peer's.
    pub ratio: f64,
    /// Unit of both figures.
    pub unit: Unit,
}

impl Figure {
    /// A comparison, rounded to three digits behind the point.
    pub fn new(name: &str, ours: f64, peer: &str, peers_figure: f64, unit: Unit) -> Figure {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        Figure {
            name: name.to_owned(),
            ours: round(ours),
            peer: peer.to_owned(),
            peers_figure: round(peers_figure),
            ratio: round(ours / peers_figure),
            unit,
        }
    }
}

/// The median; 0 of nothing.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (Some(upper), 0) => values.get(middle - 1).map_or(0.0, |lower| (lower + upper) / 2.0),
        (Some(middle), _) => *middle,
        (None, _) => 0.0,
    }
}

/// A table for people.
pub fn table(figures: &[Figure]) -> String {
    let mut text = format!("{:<22} {:>12} {:>12}  {:<20} {:>7}\n", "", "plat", "peer", "", "ratio");
    for figure in figures {
        let unit = match figure.unit {
            Unit::Milliseconds => "ms",
            Unit::PerSecond => "/s",
        };
        let value = |value: f64| match figure.unit {
            Unit::Milliseconds => format!("{value:.2} {unit}"),
            Unit::PerSecond => format!("{value:.0} {unit}"),
        };
        let _ = writeln!(
            text,
            "{:<22} {:>12} {:>12}  {:<20} {:>7.2}",
            figure.name,
            value(figure.ours),
            value(figure.peers_figure),
            figure.peer,
            figure.ratio
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middles() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }

    #[test]
    fn the_ratio_is_ours_by_theirs() {
        let figure = Figure::new("CNI ADD", 2.5, "reference", 12.5, Unit::Milliseconds);
        assert_eq!(
            serde_json::to_string(&figure).unwrap(),
            r#"{"name":"CNI ADD","ours":2.5,"peer":"reference","peersFigure":12.5,"ratio":0.2,"unit":"ms"}"#
        );
        assert!(table(&[figure]).contains("2.50 ms     12.50 ms  reference               0.20"));
    }
}
