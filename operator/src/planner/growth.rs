//! What grows, what that uses up, and when.

use std::str::FromStr;

use serde::Serialize;

use super::Question;
use super::fit::{Supply, nodes_that_fit};

/// Days of a month, in the mean of four years.
pub const DAYS_PER_MONTH: f64 = 30.4375;

/// How much something grows in a month.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Rate {
    /// Not at all.
    #[default]
    None,
    /// By so many.
    Number(f64),
    /// By so many percent of what it is by then.
    Percent(f64),
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let (number, is_percent) = match text.strip_suffix('%') {
            Some(number) => (number, true),
            None => (text, false),
        };
        match number.trim().parse::<f64>() {
            Ok(0.0) => Ok(Rate::None),
            Ok(rate) if rate > 0.0 && rate <= 1e6 => {
                Ok(if is_percent { Rate::Percent(rate) } else { Rate::Number(rate) })
            }
            _ => Err("give a number such as 20, or a share such as 5%; neither negative nor above a million"
                .to_owned()),
        }
    }
}

impl Rate {
    /// What `start` has become after so many days.
    pub fn after(self, start: f64, days: u32) -> f64 {
        let months = f64::from(days) / DAYS_PER_MONTH;
        match self {
            Rate::None => start,
            Rate::Number(rate) => start + rate * months,
            Rate::Percent(rate) => start * (1.0 + rate / 100.0).powf(months),
        }
    }
}

/// How a cluster grows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Growth {
    /// Nodes.
    pub nodes: Rate,
    /// Pods per node.
    pub pods: Rate,
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Case {
    /// Nothing grows.
    AsItIs,
    /// Only nodes do.
    Nodes,
    /// Only pods per node do.
    Pods,
    /// Both do.
    Both,
}

/// What is used up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Limit {
    /// No block is left for another node, or for a node that fills up.
    Blocks,
    /// A node may have no more blocks, and its are full.
    PodsPerNode,
}

/// What a case uses up, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RunsOut {
    /// What grows.
    pub case: Case,
    /// Days until then, 0 for now; `None` if not as far ahead as was looked.
    pub after_days: Option<u32>,
    /// What is used up.
    pub limit: Option<Limit>,
    /// Nodes by then, or at the end of the time looked at.
    pub nodes: u64,
    /// Pods per node by then.
    pub pods_per_node: u32,
}

/// Looks at each case that the question's growth makes.
pub fn runs_out(question: &Question, supplies: &[Supply]) -> Vec<RunsOut> {
    let Growth { nodes, pods } = question.growth;
    let cases = [
        (Case::AsItIs, Growth::default(), (nodes, pods) == (Rate::None, Rate::None)),
        (Case::Nodes, Growth { nodes, pods: Rate::None }, nodes != Rate::None),
        (Case::Pods, Growth { nodes: Rate::None, pods }, pods != Rate::None),
        (Case::Both, question.growth, nodes != Rate::None && pods != Rate::None),
    ];
    let asked = cases.into_iter().filter(|(.., asked)| *asked);
    asked.map(|(case, growth, _)| end_of(case, growth, question, supplies)).collect()
}

/// The first day on which it does not fit. Growth only goes up, so the days are halved until it is found.
fn end_of(case: Case, growth: Growth, question: &Question, supplies: &[Supply]) -> RunsOut {
    let horizon = days(question.months);
    let limit_on = |day| {
        let (nodes, pods) = on(growth, question, day);
        limit(nodes.saturating_add(question.resting), pods, supplies)
    };
    let (mut fits, mut fails) = (0, horizon);
    let after_days = if limit_on(0).is_some() {
        Some(0)
    } else if limit_on(horizon).is_none() {
        None
    } else {
        while fails - fits > 1 {
            let middle = fits + (fails - fits) / 2;
            if limit_on(middle).is_some() { fails = middle } else { fits = middle }
        }
        Some(fails)
    };
    let day = after_days.unwrap_or(horizon);
    let (nodes, pods_per_node) = on(growth, question, day);
    RunsOut { case, after_days, limit: limit_on(day), nodes, pods_per_node }
}

/// Nodes and pods per node after so many days.
pub fn on(growth: Growth, question: &Question, day: u32) -> (u64, u32) {
    let nodes = growth.nodes.after(question.nodes as f64, day) as u64;
    let pods = growth.pods.after(f64::from(question.pods), day) as u32;
    (nodes, pods)
}

/// What keeps so many nodes from fitting.
pub fn limit(nodes: u64, pods: u32, supplies: &[Supply]) -> Option<Limit> {
    if nodes_that_fit(supplies, pods) >= nodes {
        return None;
    }
    let room = supplies.iter().map(|supply| u64::from(supply.capacity) * u64::from(supply.max)).max();
    Some(if u64::from(pods) > room.unwrap_or(0) { Limit::PodsPerNode } else { Limit::Blocks })
}

/// Months in days.
pub fn days(months: u32) -> u32 {
    (f64::from(months) * DAYS_PER_MONTH) as u32
}
