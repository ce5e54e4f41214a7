//! How the blocks of zones scatter over months of nodes that join and leave: a simulation, with the operator's
//! own carving. Pure; the same seed gives the same figures.
//!
//! A day: what left yesterday has rested and is free; some nodes leave, as many join in zones by chance; at the
//! weekend part of the fleet is away. All joins of a day are carved at once, and what left that day still rests.

use std::fmt;

use k8s_openapi::jiff::Timestamp;
use plat_crds::Block;
use serde::Serialize;

use crate::dice::Dice;
use crate::pool::Pool;
use crate::topology::{GroupBlocks, Topology};

/// A fleet and its range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Churn {
    /// The range.
    pub range: Block,
    /// Prefix length of its blocks.
    pub block_prefix: u8,
    /// Zones (or racks); at least 1.
    pub zones: u32,
    /// Nodes on a weekday, of one block each.
    pub nodes: u32,
    /// How many in a hundred nodes are replaced each day.
    pub replaced_percent: u32,
    /// How many in a hundred nodes are away on days 6 and 7 of a week.
    pub weekend_percent: u32,
    /// Days.
    pub days: u32,
    /// Where chance begins.
    pub seed: u64,
}

/// How blocks are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carving {
    /// The next free block of the range, whatever the zone.
    NextFit,
    /// With a `topologyKey`.
    Topology,
}

/// What was seen, at the end of each day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fragmentation {
    /// Prefixes that it takes to name all blocks of a zone and none of another: the mean over zones and days.
    pub prefixes: f64,
    /// The most that a zone took on any day.
    pub worst: u64,
    /// The fewest that zones of these sizes take in this range, if blocks could be moved: the mean.
    pub fewest: f64,
    /// Blocks outside the largest prefix of their zone, in a hundred.
    pub outside_percent: f64,
    /// Routes to all blocks, one for each: the mean. As many has a router before each zone.
    pub routes: f64,
    /// Routes to all blocks where one prefix is one route: the mean.
    pub aggregated: f64,
    /// Nodes that got no block on the day that they joined, as none was free.
    pub waited: u64,
}

/// Lives through the days.
pub fn simulate(churn: &Churn, carving: Carving) -> Fragmentation {
    let mut fleet = Fleet::new(churn, carving);
    let mut sums = Fragmentation::default();
    let mut zone_days = 0;
    for day in 0..churn.days {
        fleet.live(day);
        let holdings = fleet.holdings();
        zone_days += holdings.len();
        sums.add(&holdings, fleet.total);
    }
    sums.waited = fleet.waited;
    sums.mean(f64::from(churn.days), zone_days as f64)
}

/// Node-days that a usual fleet is watched for: a second's work.
const NODE_DAYS: u32 = 1_000_000;

impl Churn {
    /// Half a year of a usual fleet: `nodes` nodes in `zones` zones of a range; less of more than 5,000 nodes, two
    /// weeks at least, and of no more than 50,000 nodes.
    pub fn usual(range: Block, block_prefix: u8, zones: u32, nodes: u64) -> Churn {
        let nodes = u32::try_from(nodes.min(50_000)).unwrap_or(u32::MAX);
        let days = (NODE_DAYS / nodes.max(1)).clamp(14, 182);
        Churn { range, block_prefix, zones, nodes, replaced_percent: 5, weekend_percent: 20, days, seed: 1 }
    }
}

/// What months do to the zones of a range, with and without a `topologyKey`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// What was simulated.
    pub churn: Churn,
    /// With a `topologyKey`.
    pub topology: Fragmentation,
    /// Without.
    pub next_fit: Fragmentation,
}

/// Simulates both.
pub fn compare(churn: Churn) -> Comparison {
    let seen = |carving| simulate(&churn, carving);
    Comparison { churn, topology: seen(Carving::Topology), next_fit: seen(Carving::NextFit) }
}

/// As lines for people.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison { churn, topology, next_fit } = self;
        let mut line = |what: &str, [ours, plain, best]: [String; 3]| {
            writeln!(f, "{}", format!("{what:<36}  {ours:>11}  {plain:>12}  {best:>7}").trim_end())
        };
        let prefixes = |seen: &Fragmentation| format!("{:.1} ({})", seen.prefixes, seen.worst);
        let outside = |seen: &Fragmentation| format!("{:.0} %", seen.outside_percent);
        let routes = |seen: &Fragmentation| format!("{:.0} of {:.0}", seen.aggregated, seen.routes);
        line("", ["topologyKey".into(), "next-fit".into(), "at best".into()])?;
        let best = format!("{:.1}", topology.fewest);
        line("prefixes per zone (on the worst day)", [prefixes(topology), prefixes(next_fit), best])?;
        line("blocks outside their zone's prefix", [outside(topology), outside(next_fit), String::new()])?;
        line("routes past one router per zone", [routes(topology), routes(next_fit), String::new()])?;
        writeln!(
            f,
            "({} nodes in {} zones and {} blocks, {} days: each day {} % of the nodes are replaced, in zones by chance; at weekends {} % are away)",
            churn.nodes,
            churn.zones,
            churn.range.subblock_count(churn.block_prefix),
            churn.days,
            churn.replaced_percent,
            churn.weekend_percent,
        )
    }
}

struct Fleet<'a> {
    churn: &'a Churn,
    carving: Carving,
    dice: Dice,
    total: u64,
    cursor: u64,
    held: Vec<Held>,
    /// Blocks of nodes that left today.
    resting: Vec<Held>,
    carved: i64,
    waited: u64,
}

/// A node's block.
struct Held {
    index: u64,
    zone: u32,
    /// How many were carved before it.
    carved: i64,
}

impl Fleet<'_> {
    fn new(churn: &Churn, carving: Carving) -> Fleet<'_> {
        let total = Pool::new(churn.range, churn.block_prefix).total();
        let dice = Dice(churn.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (held, resting) = (Vec::new(), Vec::new());
        Fleet { churn, carving, dice, total, cursor: 0, held, resting, carved: 0, waited: 0 }
    }

    fn live(&mut self, day: u32) {
        self.resting.clear();
        let away = if day % 7 >= 5 { self.churn.weekend_percent.min(100) } else { 0 };
        let size = share(u64::from(self.churn.nodes), 100 - away);
        let replaced = share(self.held.len() as u64, self.churn.replaced_percent.min(100));
        let stay = (self.held.len() as u64).saturating_sub(replaced).min(size);
        while self.held.len() as u64 > stay {
            self.leave();
        }
        self.join(size - stay);
    }

    fn leave(&mut self) {
        let pick = self.dice.roll(self.held.len() as u64);
        self.resting.push(self.held.swap_remove(usize::try_from(pick).unwrap_or(0)));
    }

    fn join(&mut self, count: u64) {
        let (mut pool, mut topology) = self.map();
        for joined in 0..count {
            let zone = u32::try_from(self.dice.roll(u64::from(self.churn.zones))).unwrap_or(0);
            let chosen = match self.carving {
                Carving::NextFit => pool.next_free(self.cursor),
                Carving::Topology => topology.choose(&pool, Some(&name(zone))),
            };
            let Some((index, block)) = chosen.and_then(|index| Some((index, pool.block(index)?))) else {
                self.waited += count - joined;
                return;
            };
            pool.take(&block);
            topology.hold(Some(&name(zone)), index, Timestamp::MAX);
            self.cursor = (index + 1) % self.total;
            self.held.push(Held { index, zone, carved: self.carved });
            self.carved += 1;
        }
    }

    fn holdings(&self) -> Vec<GroupBlocks> {
        let (pool, topology) = self.map();
        topology.holdings(&pool)
    }

    /// The blocks as a new plan finds them.
    fn map(&self) -> (Pool, Topology) {
        let mut pool = Pool::new(self.churn.range, self.churn.block_prefix);
        let mut topology = Topology::default();
        for held in self.held.iter().chain(&self.resting) {
            if let Some(block) = pool.block(held.index) {
                pool.take(&block);
                let created = Timestamp::from_second(held.carved).unwrap_or_default();
                topology.hold(Some(&name(held.zone)), held.index, created);
            }
        }
        (pool, topology)
    }
}

fn name(zone: u32) -> String {
    zone.to_string()
}

fn share(of: u64, percent: u32) -> u64 {
    of * u64::from(percent) / 100
}

impl Fragmentation {
    fn add(&mut self, holdings: &[GroupBlocks], total: u64) {
        let sizes: Vec<u64> = holdings.iter().map(|holding| holding.blocks).collect();
        let (blocks, outside) =
            (sizes.iter().sum::<u64>(), holdings.iter().map(GroupBlocks::outside).sum::<u64>());
        let prefixes = |holding: &GroupBlocks| holding.stretches.len() as u64;
        let all: u64 = holdings.iter().map(prefixes).sum();
        self.worst = holdings.iter().map(prefixes).max().unwrap_or(0).max(self.worst);
        self.fewest += fewest(&sizes, total) as f64;
        self.outside_percent += outside as f64 * 100.0 / blocks.max(1) as f64;
        self.routes += blocks as f64;
        self.aggregated += all as f64;
    }

    /// Sums over days become means; `zone_days` counts the zones that had blocks, over all days.
    fn mean(mut self, days: f64, zone_days: f64) -> Fragmentation {
        self.prefixes = self.aggregated / zone_days.max(1.0);
        self.fewest /= zone_days.max(1.0);
        for sum in [&mut self.outside_percent, &mut self.routes, &mut self.aggregated] {
            *sum /= days.max(1.0);
        }
        self
    }
}

/// The fewest prefixes for groups of these sizes in a range of `total` blocks: each group begins with one, and
/// while they do not fit, the group that saves most by one more gets one more. What powers of two fit by their
/// sum also fit aligned, the largest first.
pub fn fewest(sizes: &[u64], total: u64) -> u64 {
    let mut groups: Vec<(u64, u32)> = sizes.iter().filter(|size| **size > 0).map(|size| (*size, 1)).collect();
    let room = |(size, prefixes): &(u64, u32)| room(*size, *prefixes);
    let saved = |group: &(u64, u32)| room(group) - room(&(group.0, group.1 + 1));
    while groups.iter().map(room).sum::<u64>() > total {
        match groups.iter_mut().max_by_key(|group| saved(group)) {
            Some(group) if saved(group) > 0 => group.1 += 1,
            _ => break,
        }
    }
    groups.iter().map(|(_, prefixes)| u64::from(*prefixes)).sum()
}

/// The fewest blocks in `prefixes` aligned stretches that hold `size` blocks.
fn room(size: u64, prefixes: u32) -> u64 {
    let mut left = size;
    for _ in 1..prefixes {
        left -= left.checked_ilog2().map_or(0, |level| 1 << level);
    }
    size - left + if left == 0 { 0 } else { left.next_power_of_two() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn churn(nodes: u32, zones: u32) -> Churn {
        Churn { days: 60, ..Churn::usual("10.0.0.0/15".parse().unwrap(), 24, zones, nodes.into()) }
    }

    #[test]
    fn one_prefix_names_a_zone_for_months_while_the_range_has_room() {
        // 30 % and 60 % of 512 blocks. What a zone may take on its worst day, and next-fit takes on average:
        for (zones, nodes, at_most, next_fit_more_than) in
            [(3, 154, 1, 30.0), (3, 307, 2, 60.0), (8, 154, 1, 12.0), (8, 307, 3, 25.0)]
        {
            for seed in 1..=2 {
                let churn = Churn { seed, ..churn(nodes, zones) };
                let (ours, next_fit) =
                    (simulate(&churn, Carving::Topology), simulate(&churn, Carving::NextFit));
                assert!(ours.worst <= at_most && ours.prefixes < 1.25, "{churn:?}: {ours:?}");
                assert!(next_fit.prefixes > next_fit_more_than, "{churn:?}: {next_fit:?}");
                assert!(ours.outside_percent < 3.0 && next_fit.outside_percent > 80.0);
                assert_eq!((ours.routes, ours.waited), (next_fit.routes, 0), "the same nodes came and went");
            }
        }
    }

    #[test]
    fn a_range_that_is_nearly_full_scatters_but_far_less_than_next_fit_and_serves_every_node() {
        for zones in [3, 8] {
            let churn = churn(460, zones);
            let (ours, next_fit) = (simulate(&churn, Carving::Topology), simulate(&churn, Carving::NextFit));
            assert!(ours.prefixes * 4.0 < next_fit.prefixes, "{ours:?} {next_fit:?}");
            assert!(ours.outside_percent < 70.0 && ours.fewest >= 1.0, "{ours:?}");
            assert_eq!((ours.waited, next_fit.waited), (0, 0));
        }
    }

    #[test]
    fn the_figures_stand_side_by_side() {
        let text = compare(Churn::usual("10.0.0.0/15".parse().unwrap(), 24, 3, 307)).to_string();
        let expected = "topologyKey      next-fit  at best
prefixes per zone (on the worst day)      1.1 (2)    87.2 (109)      1.0
blocks outside their zone's prefix            0 %          97 %
routes past one router per zone          3 of 310    261 of 310
(307 nodes in 3 zones and 512 blocks, 182 days: each day 5 % of the nodes are replaced, in zones by chance; at weekends 20 % are away)
";
        assert_eq!(text.trim_start(), expected, "these are figures of docs/ipam.md");
    }

    #[test]
    fn large_fleets_are_watched_for_fewer_days() {
        let usual = |nodes| Churn::usual("10.0.0.0/8".parse().unwrap(), 24, 3, nodes);
        let figures = [0, 5_000, 10_000, 1_000_000].map(|nodes| (usual(nodes).nodes, usual(nodes).days));
        assert_eq!(figures, [(0, 182), (5_000, 182), (10_000, 100), (50_000, 20)]);
    }

    #[test]
    fn odd_fleets_are_no_trouble_and_the_same_seed_gives_the_same_figures() {
        let base = Churn { days: 10, ..churn(200, 3) };
        for odd in [
            Churn { nodes: 0, ..base },
            Churn { zones: 0, ..base },
            Churn { zones: 1000, ..base },
            Churn { days: 0, ..base },
            Churn { nodes: 9999, ..base },
            Churn { replaced_percent: 900, weekend_percent: 900, ..base },
            Churn { block_prefix: 8, ..base },
            Churn { range: "fd00::/40".parse().unwrap(), block_prefix: 64, ..base },
        ] {
            for carving in [Carving::Topology, Carving::NextFit] {
                let seen = simulate(&odd, carving);
                assert_eq!(seen, simulate(&odd, carving));
                assert!([seen.prefixes, seen.fewest, seen.outside_percent].iter().all(|n| n.is_finite()));
            }
        }
        let full = simulate(&Churn { nodes: 9999, ..base }, Carving::Topology);
        assert!(full.waited > 9000 && full.routes == 512.0, "{full:?}");
    }

    #[test]
    fn the_fewest_prefixes_are_one_each_while_powers_of_two_fit() {
        for (sizes, total, expected) in [
            (&[80, 80, 80][..], 512, 3),
            (&[80, 80, 80], 256, 6),
            (&[85, 85, 86], 256, 12),
            (&[3], 4, 1),
            (&[3, 1], 4, 3),
            (&[], 4, 0),
            (&[0, 5], 8, 1),
            (&[9], 4, 2),
        ] {
            assert_eq!(fewest(sizes, total), expected, "{sizes:?} in {total}");
        }
    }
}
