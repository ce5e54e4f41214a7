//! What months of nodes that join and leave do to the blocks of zones: the simulation of
//! [`crate::fragmentation`] for the ranges that are asked about.

use plat_crds::Family;

use super::Question;
use super::fit::blocks_per_node;
use crate::fragmentation::{Churn, Comparison, compare};

/// For the first range of each family, with as many blocks in use as its nodes take when they are full.
pub fn zones(question: &Question, zones: u32) -> Vec<Comparison> {
    let of_family = |family| question.ranges.iter().find(|range| range.range.family() == family);
    let ranges = Family::ALL.into_iter().filter_map(of_family);
    let comparison = |range: &super::Range| {
        let supply = range.supply();
        let each = blocks_per_node(supply, question.pods).unwrap_or(supply.max);
        let blocks = question.nodes.saturating_mul(u64::from(each));
        compare(Churn::usual(range.range, range.prefix, zones, blocks.min(range.usable)))
    };
    ranges.map(comparison).collect()
}

#[cfg(test)]
mod tests {
    use super::super::growth::Growth;
    use super::super::{Range, answer, text};
    use super::*;

    fn question(nodes: u64) -> Question {
        let range =
            |name: &str, cidr: &str, prefix| Range::new(name.into(), cidr.parse().unwrap(), prefix, vec![]);
        Question {
            nodes,
            pods: 110,
            resting: 0,
            growth: Growth::default(),
            months: 1,
            ranges: vec![
                range("four", "10.244.0.0/16", 24),
                range("more", "10.8.0.0/16", 24),
                range("six", "fd00::/48", 64),
            ],
            avoid: Vec::new(),
            problems: Vec::new(),
        }
    }

    #[test]
    fn the_first_range_of_each_family_is_lived_in() {
        let seen = zones(&question(60), 3);
        let ranges: Vec<_> =
            seen.iter().map(|seen| (seen.churn.range.to_string(), seen.churn.nodes)).collect();
        assert_eq!(ranges, [("10.244.0.0/16".to_owned(), 60), ("fd00::/48".to_owned(), 60)]);
        assert!(seen.iter().all(|seen| seen.topology.prefixes < 1.3 && seen.next_fit.prefixes > 5.0));
        let full = zones(&question(300), 3);
        assert_eq!(full[0].churn.nodes, 256, "no more than the range has");
    }

    #[test]
    fn the_text_has_a_section_for_zones_where_they_are_asked_for() {
        let question = question(60);
        let mut answer = answer(&question);
        assert!(!text::render(&answer).contains("topologyKey"));
        answer.zones = zones(&question, 3);
        let text = text::render(&answer);
        let section = &text[text.find("Zones of 10.244.0.0/16").unwrap()..];
        assert!(section.contains("prefixes per zone (on the worst day)"), "{section}");
        assert!(section.contains("(60 nodes in 3 zones and 256 blocks, 182 days"), "{section}");
        assert!(section.contains("Zones of fd00::/48"), "{section}");
    }
}
