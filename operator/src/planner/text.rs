//! The answer as text. A section is a function from the answer to lines; [`SECTIONS`] is the order.

use std::fmt::Write;

use plat_crds::Family;

use super::growth::{Case, DAYS_PER_MONTH, Limit, RunsOut};
use super::{Answer, FamilyAnswer};

/// A part of the text; an empty one is left out.
pub type Section = fn(&Answer) -> String;

/// The parts of the text, in their order. A new one goes here.
pub const SECTIONS: [Section; 6] = [problems, what_fits, other_sizes, running_out, what_to_add, zones];

/// The whole text.
pub fn render(answer: &Answer) -> String {
    let sections = SECTIONS.iter().map(|section| section(answer)).filter(|text| !text.is_empty());
    sections.collect::<Vec<_>>().join("\n")
}

fn problems(answer: &Answer) -> String {
    let mut text = String::new();
    if !answer.problems.is_empty() {
        text += "Wrong already\n";
        answer.problems.iter().for_each(|problem| text += &format!("  {problem}\n"));
    }
    text
}

fn what_fits(answer: &Answer) -> String {
    let mut rows =
        vec![row(["RANGE", "CIDR", "BLOCK", "BLOCKS", "HELD", "PODS IN A BLOCK", "BLOCKS OF A FULL NODE"])];
    for range in answer.families.iter().flat_map(|family| &family.ranges) {
        rows.push(row([
            &range.name,
            &range.cidr.to_string(),
            &format!("/{}", range.block_prefix_length),
            &range.blocks.to_string(),
            &range.held.map_or("-".to_owned(), |held| held.to_string()),
            &range.pods_per_block.to_string(),
            &range
                .blocks_per_node
                .map_or(format!("more than {}", range.max_blocks_per_node), |n| n.to_string()),
        ]));
    }
    let mut text =
        format!("What fits: {}\n{}", nodes_with_pods(answer.nodes, answer.pods_per_node), table(&rows));
    if answer.resting > 0 {
        let _ = writeln!(
            text,
            "  The blocks of {} rest in quarantine at any moment.",
            counted(answer.resting, "replaced node")
        );
    }
    for family in &answer.families {
        let needed = answer.nodes.saturating_add(answer.resting);
        let fit = family.nodes_that_fit;
        let fit_words = if fit == 1 { "1 node fits".to_owned() } else { format!("{fit} nodes fit") };
        let verdict = match fit.checked_sub(needed) {
            Some(spare) => format!("{fit_words}: room for {spare} more."),
            None => format!("{fit_words}: {} too few.", needed.saturating_sub(fit)),
        };
        let _ = writeln!(text, "  {}: {verdict}", family.family);
    }
    text
}

fn other_sizes(answer: &Answer) -> String {
    answer.families.iter().filter_map(sizes_of).collect::<Vec<_>>().join("\n")
}

fn sizes_of(family: &FamilyAnswer) -> Option<String> {
    let first = family.ranges.first()?;
    // Of IPv6 addresses next to none ever has a pod: there is nothing to compare.
    let shows_unused = family.family == Family::IPv4;
    let line = |cells: [&str; 5], unused: &str, mark: &str| {
        let unused = shows_unused.then_some(unused);
        cells.into_iter().chain(unused).chain([mark]).map(str::to_owned).collect::<Vec<_>>()
    };
    let head = ["BLOCK", "BLOCKS", "PODS IN A BLOCK", "BLOCKS OF A FULL NODE", "NODES"];
    let mut rows = vec![line(head, "UNUSED", "")];
    for size in &family.sizes {
        let cells = [
            &*format!("/{}", size.block_prefix_length),
            &size.blocks.to_string(),
            &size.pods_per_block.to_string(),
            &size.blocks_per_node.to_string(),
            &size.nodes.to_string(),
        ];
        let mark = if size.chosen { "<-" } else { "" };
        rows.push(line(cells, &format!("{} %", size.unused_percent), mark));
    }
    Some(format!("Sizes of blocks for {}\n{}", first.cidr, table(&rows)))
}

fn running_out(answer: &Answer) -> String {
    let mut text = "Running out\n".to_owned();
    for family in &answer.families {
        for case in &family.runs_out {
            let _ = writeln!(text, "  {}: {}", family.family, end_of(case, answer.months));
        }
    }
    text
}

fn end_of(case: &RunsOut, months: u32) -> String {
    let grows = match case.case {
        Case::AsItIs => "as it is",
        Case::Nodes => "if nodes grow",
        Case::Pods => "if pods grow",
        Case::Both => "if both grow",
    };
    let size = nodes_with_pods(case.nodes, case.pods_per_node);
    let what = match case.limit {
        Some(Limit::Blocks) => "there are no blocks for",
        Some(Limit::PodsPerNode) => "a node may not have enough blocks for",
        None => return format!("{grows}, it lasts for the {months} months looked at ({size})"),
    };
    match case.after_days {
        None | Some(0) => format!("{grows}, {what} {size}"),
        Some(days) => format!("{grows}, in {} {what} {size}", duration(days)),
    }
}

fn what_to_add(answer: &Answer) -> String {
    let mut text = String::new();
    for family in &answer.families {
        let too_full = |case: &RunsOut| case.limit == Some(Limit::PodsPerNode);
        match &family.add {
            None if family.runs_out.iter().any(too_full) => {
                let _ = writeln!(
                    text,
                    "To add for {}\n  No range helps: raise spec.blocksPerNode.max, or spread the pods over more nodes.",
                    family.family
                );
            }
            None if family.runs_out.iter().any(|case| case.limit.is_some()) => {
                let _ = writeln!(
                    text,
                    "To add for {}\n  No range is large enough: use larger blocks, or several ranges.",
                    family.family
                );
            }
            None => {}
            Some(advice) => {
                let purpose = nodes_with_pods(advice.nodes, advice.pods_per_node);
                let _ = match advice.yaml() {
                    Some(yaml) => writeln!(
                        text,
                        "To add for {}, for {purpose}: kubectl apply -f\n---\n{}",
                        family.family,
                        yaml.trim_end()
                    ),
                    None => writeln!(
                        text,
                        "To add for {}, for {purpose}\n  A /{} in blocks of /{}; no private range has room for one.",
                        family.family, advice.prefix_length, advice.block_prefix_length
                    ),
                };
            }
        }
    }
    text
}

fn zones(answer: &Answer) -> String {
    let mut text = String::new();
    for seen in &answer.zones {
        let _ =
            writeln!(text, "Zones of {} over months, with and without spec.topologyKey", seen.churn.range);
        seen.to_string().lines().for_each(|line| text += &format!("  {line}\n"));
    }
    text
}

fn nodes_with_pods(nodes: u64, pods: u32) -> String {
    format!("{} with {} each", counted(nodes, "node"), counted(u64::from(pods), "pod"))
}

fn counted(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn duration(days: u32) -> String {
    match days {
        1 => "1 day".to_owned(),
        2..=59 => format!("{days} days"),
        _ => format!("{:.0} months", (f64::from(days) / DAYS_PER_MONTH).floor()),
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

/// Rows with their columns aligned and two spaces between.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "  {}", line.trim_end());
    }
    text
}
