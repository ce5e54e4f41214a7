//! Benchmark figures: ours beside a peer's, from the same run.

use std::fmt::Write;
use std::path::Path;
use std::{fs, io};

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
    /// Mebibytes: less is better.
    #[serde(rename = "MiB")]
    Mebibytes,
    /// Seconds: less is better.
    #[serde(rename = "s")]
    Seconds,
    /// A plain number: less is better.
    #[serde(rename = "")]
    Count,
}

/// What a figure should reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Goal {
    /// Ours by the peer's, at most.
    RatioAtMost(f64),
    /// Ours by the peer's, at least.
    RatioAtLeast(f64),
    /// Ours less the peer's, at most, in the figure's unit.
    BeyondPeerAtMost(f64),
    /// Ours, at most, in the figure's unit.
    AtMost(f64),
}

/// One comparison. Figures are medians unless their name says otherwise.
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
    /// Ours divided by the peer's; 0 where the peer's is 0.
    pub ratio: f64,
    /// Unit of both figures.
    pub unit: Unit,
    /// What it should reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
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
            ratio: if peers_figure == 0.0 { 0.0 } else { round(ours / peers_figure) },
            unit,
            goal: None,
        }
    }

    /// The same with a goal.
    pub fn reaching(self, goal: Goal) -> Figure {
        Figure { goal: Some(goal), ..self }
    }

    /// Whether the goal is met; `None` without one.
    pub fn meets_goal(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::RatioAtMost(most) => self.ratio <= most,
            Goal::RatioAtLeast(least) => self.ratio >= least,
            Goal::BeyondPeerAtMost(most) => self.ours - self.peers_figure <= most,
            Goal::AtMost(most) => self.ours <= most,
        })
    }

    fn show(&self, value: f64) -> String {
        match self.unit {
            Unit::Milliseconds => format!("{value:.2} ms"),
            Unit::PerSecond => format!("{value:.0} /s"),
            Unit::Mebibytes => format!("{value:.2} MiB"),
            Unit::Seconds => format!("{value:.2} s"),
            Unit::Count => format!("{value:.1}"),
        }
    }

    fn goal_in_words(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::RatioAtMost(most)) => format!("ratio ≤ {most}"),
            Some(Goal::RatioAtLeast(least)) => format!("ratio ≥ {least}"),
            Some(Goal::BeyondPeerAtMost(most)) => format!("≤ peer + {}", self.show(most)),
            Some(Goal::AtMost(most)) => format!("≤ {}", self.show(most)),
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

/// The value that 99 of 100 do not exceed; 0 of nothing.
pub fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * 99).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// Prints the table, writes a line of JSON per figure into `file`, and says on standard error which goals were missed.
///
/// # Errors
/// If the file, or the folder that it is in, cannot be written.
pub fn publish(figures: &[Figure], file: &Path) -> io::Result<()> {
    print!("{}", table(figures));
    let mut lines = String::new();
    for figure in figures {
        lines.push_str(&serde_json::to_string(figure)?);
        lines.push('\n');
        if figure.meets_goal() == Some(false) {
            eprintln!("bench: MISSED: {}", figure.name);
        }
    }
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(file, lines)
}

/// A table in Markdown, which people can read as it is.
pub fn table(figures: &[Figure]) -> String {
    let head = ["", "plat", "peer", "", "ratio", "goal", ""].map(str::to_owned);
    let row = |figure: &Figure| {
        let verdict = match figure.meets_goal() {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        [
            figure.name.clone(),
            figure.show(figure.ours),
            figure.show(figure.peers_figure),
            figure.peer.clone(),
            format!("{:.2}", figure.ratio),
            figure.goal_in_words(),
            verdict.to_owned(),
        ]
    };
    let rows: Vec<[String; 7]> = std::iter::once(head).chain(figures.iter().map(row)).collect();
    let mut widths = [3; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Numbers stand to the right.
            let padding = " ".repeat(width - cell.chars().count());
            let _ = match at {
                1 | 2 | 4 => write!(text, "| {padding}{cell} "),
                _ => write!(text, "| {cell}{padding} "),
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for (at, width) in widths.iter().enumerate() {
                let line = "-".repeat(*width - 1);
                let _ = match at {
                    1 | 2 | 4 => write!(text, "| {line}: "),
                    _ => write!(text, "| {line}- "),
                };
            }
            text.push_str("|\n");
        }
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
    fn one_of_a_hundred_may_exceed_the_99th_percentile() {
        assert_eq!(p99((1..=100).map(f64::from).collect()), 99.0);
        assert_eq!(p99((1..=200).map(f64::from).collect()), 198.0);
        assert_eq!(p99(vec![7.0, 3.0]), 7.0);
        assert_eq!(p99(vec![]), 0.0);
    }

    #[test]
    fn the_ratio_is_ours_by_theirs() {
        let figure = Figure::new("CNI ADD", 2.5, "reference", 12.5, Unit::Milliseconds);
        assert_eq!(
            serde_json::to_string(&figure).unwrap(),
            r#"{"name":"CNI ADD","ours":2.5,"peer":"reference","peersFigure":12.5,"ratio":0.2,"unit":"ms"}"#
        );
        let table = table(&[figure]);
        assert!(table.contains("| CNI ADD | 2.50 ms | 12.50 ms | reference |  0.20 |"), "{table}");
    }

    #[test]
    fn a_goal_is_met_or_missed() {
        let figure = |goal| Figure::new("x", 3.0, "y", 1.0, Unit::Milliseconds).reaching(goal).meets_goal();
        assert_eq!(figure(Goal::RatioAtMost(3.0)), Some(true));
        assert_eq!(figure(Goal::RatioAtLeast(5.0)), Some(false));
        assert_eq!(figure(Goal::BeyondPeerAtMost(2.0)), Some(true));
        assert_eq!(figure(Goal::AtMost(2.0)), Some(false));
        assert_eq!(Figure::new("x", 3.0, "y", 1.0, Unit::Mebibytes).meets_goal(), None);
    }
}
