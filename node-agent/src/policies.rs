//! The RoutingPolicies that this node follows, and the layers that decide how it reaches a block.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use plat_crds::RoutingPolicySpec;
use plat_crds::routing::{self, Invalid, Layer, Resolved, Routing};
use plat_crds::selector::{Labels, Selector};

use crate::desired::Map;
use crate::facts::{BlockFact, PolicyFact, RangeFact};

/// A policy that this node follows.
#[derive(Clone, Debug, PartialEq)]
pub struct InForce {
    /// Its name.
    pub name: Arc<str>,
    /// Generation that is followed, which need not be the newest.
    pub generation: i64,
    /// Higher goes first.
    pub priority: i32,
    /// Blocks that it is about.
    pub destinations: Selector,
    /// What it says.
    pub routing: Routing,
}

/// The labels of a node: those of its first block that is not released.
pub fn labels_of(node: &str, blocks: &BTreeMap<String, BlockFact>) -> Labels {
    let mut own = blocks.values().filter(|block| block.node == node && !block.released());
    own.next().map(|block| block.labels.clone()).unwrap_or_default()
}

/// The policies that a node with these labels follows, in the order in which they decide.
pub fn in_force(policies: &BTreeMap<String, PolicyFact>, own: &Labels) -> Vec<InForce> {
    let versions = policies.values().filter_map(|policy| {
        let (generation, spec) = policy.followed(own)?;
        Some((policy.name.as_str(), generation, spec))
    });
    in_order(versions, own)
}

/// Of versions of policies, with name and generation, those that select a node with these labels, in the order in
/// which they decide.
pub fn in_order<'a>(
    versions: impl Iterator<Item = (&'a str, i64, &'a RoutingPolicySpec)>,
    own: &Labels,
) -> Vec<InForce> {
    let mut found: Vec<InForce> =
        versions.filter_map(|(name, generation, spec)| of(name, generation, spec, own)).collect();
    found.sort_by(|a, b| (Reverse(a.priority), &a.name).cmp(&(Reverse(b.priority), &b.name)));
    found
}

fn of(name: &str, generation: i64, spec: &RoutingPolicySpec, own: &Labels) -> Option<InForce> {
    // An unknown operator of a newer version selects nothing: it may exclude this node.
    let sources = Selector::read(spec.sources.as_ref()).ok()?;
    let destinations = Selector::read(spec.destinations.as_ref()).ok()?;
    sources.matches(own).then(|| InForce {
        name: name.into(),
        generation,
        priority: spec.priority,
        destinations,
        routing: spec.routing.clone(),
    })
}

/// The layers that decide how a block is reached, the nearest first.
pub fn layers<'a>(
    block: &'a BlockFact,
    range: Option<&'a RangeFact>,
    policies: &'a [InForce],
) -> Vec<(Layer, &'a Routing)> {
    let own = block.routing.as_ref().map(|routing| (Layer::PodCIDR, routing));
    let about = policies.iter().filter(|policy| policy.destinations.matches(&block.labels));
    let about = about.map(|policy| (Layer::RoutingPolicy(policy.name.clone()), &policy.routing));
    let range = range.and_then(|range| range.routing.as_ref()).map(|routing| (Layer::ClusterCIDR, routing));
    own.into_iter().chain(about).chain(range).collect()
}

/// Resolves what holds for many blocks, once for all that are alike: those of one range without a policy of their own,
/// and with the same values of the labels that policies name. Other labels differ from block to block.
pub struct Resolver<'a> {
    map: Map<'a>,
    keys: BTreeSet<&'a str>,
    alike: BTreeMap<Alike<'a>, Rc<Result<Resolved, Invalid>>>,
}

/// Name of the range, and the values of the labels that policies name.
type Alike<'a> = (&'a str, Vec<Option<&'a str>>);

impl<'a> Resolver<'a> {
    /// For the blocks of the map.
    pub fn of(map: Map<'a>) -> Resolver<'a> {
        let keys = map.policies.iter().flat_map(|policy| policy.destinations.keys()).collect();
        Resolver { map, keys, alike: BTreeMap::new() }
    }

    /// What holds for a block.
    pub fn resolve(&mut self, block: &'a BlockFact) -> Rc<Result<Resolved, Invalid>> {
        let map = self.map;
        let resolve = || {
            let layers = layers(block, map.ranges.get(&block.range), map.policies);
            Rc::new(routing::resolve(&layers))
        };
        if block.routing.is_some() {
            return resolve();
        }
        let values = self.keys.iter().map(|key| block.labels.get(key)).collect();
        self.alike.entry((&block.range, values)).or_insert_with(resolve).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{self, block, policy, range};

    fn labels(zone: &str) -> Labels {
        Labels::pack(Some(&[("zone".to_owned(), zone.to_owned())].into()))
    }

    fn named(name: &str, json: serde_json::Value) -> (String, PolicyFact) {
        let spec: RoutingPolicySpec = serde_json::from_value(json).unwrap();
        (name.to_owned(), PolicyFact { spec, ..policy(name) })
    }

    #[test]
    fn policies_for_the_node_and_the_block_decide_by_priority_then_name() {
        let to_b = serde_json::json!({"matchLabels": {"zone": "b"}});
        let policies = BTreeMap::from([
            named("a", serde_json::json!({"routing": {"metric": 1}})),
            named("b", serde_json::json!({"routing": {"metric": 2}, "destinations": to_b, "priority": 5})),
            named("c", serde_json::json!({"routing": {"metric": 3}, "sources": to_b})),
            named("d", serde_json::json!({"routing": {"metric": 4}})),
            named("e", serde_json::json!({"routing": {"metric": 5}, "mode": "Plan"})),
        ]);
        let found = in_force(&policies, &labels("a"));
        let range = RangeFact { routing: Some(Routing::default()), ..range("default-v4") };
        let far = BlockFact { labels: labels("b"), routing: Some(Routing::default()), ..block(2) };
        let metrics = |block| -> Vec<Option<i32>> {
            layers(block, Some(&range), &found).iter().map(|(_, routing)| routing.metric).collect()
        };
        assert_eq!(metrics(&far), [None, Some(2), Some(1), Some(4), None]);
        let near = BlockFact { labels: labels("a"), ..block(3) };
        assert_eq!(metrics(&near), [Some(1), Some(4), None]);
    }

    #[test]
    fn thousands_of_blocks_under_many_policies_are_resolved_a_few_times() {
        let policies: BTreeMap<String, PolicyFact> = (0..50)
            .map(|n| {
                let zone = serde_json::json!({"matchLabels": {"zone": format!("z{}", n % 5)}});
                named(
                    &format!("p{n}"),
                    serde_json::json!({"destinations": zone, "routing": {"metric": n + 1}}),
                )
            })
            .collect();
        let blocks: BTreeMap<String, BlockFact> = (0..5000u32)
            .map(|n| {
                let (host, zone) =
                    (("host".to_owned(), format!("n{n}")), ("zone".to_owned(), format!("z{}", n % 7)));
                let block = format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap();
                let labels = Labels::pack(Some(&[host, zone].into()));
                (format!("b{n}"), BlockFact { name: format!("b{n}"), block, labels, ..fixtures::block(2) })
            })
            .collect();
        let followed = in_force(&policies, &Labels::default());
        let ranges = BTreeMap::from([("default-v4".to_owned(), range("default-v4"))]);
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &followed, absent: &Default::default() };
        let mut resolver = Resolver::of(map);
        for block in blocks.values() {
            let layers = layers(block, ranges.get(&block.range), &followed);
            assert_eq!(*resolver.resolve(block), routing::resolve(&layers), "{}", block.name);
        }
        assert_eq!(resolver.alike.len(), 7, "once for each zone");
    }

    #[test]
    fn a_node_has_the_labels_of_its_own_block() {
        let own = BlockFact { labels: labels("a"), ..block(1) };
        let blocks = BTreeMap::from([(own.name.clone(), own), (block(2).name, block(2))]);
        assert_eq!(labels_of("n1", &blocks), labels("a"));
        assert_eq!(labels_of("n9", &blocks), Labels::default());
    }
}
