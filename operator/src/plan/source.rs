//! `node.spec.podCIDRs` as source of blocks (`ipam.source`): what is said of entries that cannot be followed,
//! and of another program that writes the field next to us. Pure.

use std::sync::Arc;

use plat_crds::{Block, Family, names};

use super::nodes::CURE;
use super::{Candidate, Planner};
use crate::claims::Claim;
use crate::facts::{BlockFact, NodeFact, Writer};
use crate::reason;
use crate::snapshot::{Facts, IpamSource};
use crate::step::{Fault, Kind, ObjectKey};

/// The blocks of a snapshot. Where the spec is the source, its word counts like the annotation `drain`: a block goes
/// from its node, never from under a pod, if the node's spec names others of that family.
pub fn follow(blocks: Facts<BlockFact>, nodes: &Facts<NodeFact>, source: IpamSource) -> Facts<BlockFact> {
    let must_go = |block: &BlockFact| {
        let named = nodes.get(&block.node).into_iter().flat_map(|node| node.spec_blocks());
        let named: Vec<Block> = named.filter(|named| named.family() == block.block.family()).collect();
        !block.drain && !named.is_empty() && !named.contains(&block.block)
    };
    if source != IpamSource::Node || !blocks.values().any(|block| must_go(block)) {
        return blocks;
    }
    let mark = |block: &Arc<BlockFact>| match must_go(block) {
        true => Arc::new(BlockFact { drain: true, ..BlockFact::clone(block) }),
        false => block.clone(),
    };
    Arc::new(blocks.iter().map(|(name, block)| (name.clone(), mark(block))).collect())
}

impl Planner<'_> {
    /// Where the spec is the source: entries that are missing, and those that give the node no block.
    pub(super) fn name_source_faults(&mut self, node: &NodeFact) {
        let families = self.families_of(node);
        let named = |family: Family| node.spec_blocks().any(|block| block.family() == family);
        let missing =
            families.into_iter().filter(|family| !named(*family) && self.held_block(node, *family).is_none());
        for family in missing.collect::<Vec<_>>() {
            let message = format!(
                "node {} waits for an {family} entry in spec.podCIDRs, as ipam.source is node: run kube-controller-manager with --allocate-node-cidrs=true and a --cluster-cidr of each family, or set ipam.source to wish",
                node.name
            );
            self.fault(node, reason::NO_POD_CIDR, message);
        }
        for block in node.spec_blocks() {
            if let Some((reason, why)) = self.why_not_followed(node, &block) {
                let message = format!("node {} has {block} in spec.podCIDRs, but {why}", node.name);
                self.fault(node, reason, message);
            }
        }
    }

    /// Why an entry is not the node's block, and will not be in a moment.
    fn why_not_followed(&self, node: &NodeFact, block: &Block) -> Option<(&'static str, String)> {
        if self.own_blocks(node).iter().any(|own| own.block == *block) {
            return None;
        }
        let covering = |range: &&Candidate| range.fact.range.is_some_and(|range| range.covers(block));
        let Some(range) = self.ranges.values().find(covering) else {
            let why = format!(
                "no ClusterCIDR holds it: add one (kube-controller-manager's --cluster-cidr) with blockPrefixLength {}",
                block.prefix_length()
            );
            return Some((reason::FOREIGN_POD_CIDR, why));
        };
        let name = &range.fact.name;
        let foreign = |why: String| Some((reason::FOREIGN_POD_CIDR, why));
        if let Some(prefix) = range.fact.block_prefix.filter(|prefix| *prefix != block.prefix_length()) {
            return foreign(format!(
                "ClusterCIDR {name} has blocks of /{prefix}: set kube-controller-manager's --node-cidr-mask-size to {prefix} for new nodes, or make the ClusterCIDR anew with blockPrefixLength {}",
                block.prefix_length()
            ));
        }
        if !range.selects(node, block.family()) {
            return foreign(format!(
                "ClusterCIDR {name} does not serve the node: mend its nodeSelector, or label the node"
            ));
        }
        if range.is_reserved(block) {
            return foreign(format!("ClusterCIDR {name} reserves it: take it out of reserved"));
        }
        if let Some(why) = self.claimed_by_other(node, block) {
            return Some((reason::POD_CIDR_TAKEN, why));
        }
        (!range.allocates()).then(|| {
            let ready = &range.judgement.ready;
            let why = format!("ClusterCIDR {name} gives no blocks ({}: {})", ready.reason, ready.message);
            (reason::RANGE_NOT_READY, why)
        })
    }

    fn claimed_by_other(&self, node: &NodeFact, block: &Block) -> Option<String> {
        self.claims.overlapping(block).find_map(|(taken, claim)| match claim {
            Claim::Cluster => Some(format!("{taken} is an address of the cluster itself; {CURE}")),
            Claim::NodeSpec(_) => None,
            claim => {
                let other = claim.node().filter(|other| **other != node.name)?;
                let resting = self.snapshot.blocks.get(taken.object_name().as_str());
                Some(match resting.filter(|known| known.is_quarantined()).and_then(|known| known.release_after) {
                    Some(until) => format!(
                        "it rests until {until}, as it was node {other}'s; the node gets it then (quarantineSeconds of the ClusterCIDR)"
                    ),
                    None => format!("node {other} holds {taken}; {CURE}"),
                })
            }
        })
    }

    /// Names another program that writes `spec.podCIDRs` while we carve. That is proven by a Node whose field
    /// such a program wrote after the range was made; and over once the newest writing is ours again.
    pub(super) fn name_other_allocator(&mut self) {
        let snapshot = self.snapshot;
        if snapshot.settings.ipam_source == IpamSource::Node {
            return;
        }
        let written = snapshot.nodes.values().filter_map(|node| Some((node.pod_cidrs_by.as_ref()?, &**node)));
        let written: Vec<_> = written.collect();
        let is_other = |(by, _): &&(&Writer, &NodeFact)| *by.manager != *names::OPERATOR_MANAGER;
        let newest = written.iter().max_by_key(|(by, _)| *by);
        if newest.filter(is_other).is_none() {
            return;
        }
        for range in self.ranges.values_mut() {
            let Some(family) = range.family() else { continue };
            let proves = |(by, node): &&(&Writer, &NodeFact)| {
                by.at > range.fact.created
                    && range.selects(node, family)
                    && node.spec_blocks().any(|block| block.family() == family)
            };
            // The oldest proof, so that the words stay when more nodes come.
            let first =
                written.iter().filter(is_other).filter(proves).min_by_key(|(by, node)| (*by, &node.name));
            let Some((by, node)) = first else { continue };
            let words = format!(
                "{} wrote spec.podCIDRs of node {} after this ClusterCIDR was made: another program allocates beside Plat, and a node keeps to Plat's block where both differ; start kube-controller-manager with --allocate-node-cidrs=false, or set ipam.source to node and let it choose",
                by.manager, node.name
            );
            range.other_allocator = Some(words.clone());
            self.plan.faults.push(Fault {
                object: ObjectKey::new(Kind::ClusterCIDR, &range.fact.name, &range.fact.uid),
                reason: reason::WRITTEN_BY_OTHER,
                message: words,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use plat_crds::cluster_cidr::Allocation;
    use plat_crds::pod_cidr::BlockState;

    use super::*;
    use crate::facts::RangeFact;
    use crate::fixtures::{
        NOW, Scene, at, block, created, faults, held_block, node, range, report, scene, selector, spec, steps,
    };
    use crate::step::{Step, Why};

    fn with_source(source: IpamSource) -> Scene {
        scene().range(range("r", "10.244.0.0/16")).with(|scene| scene.settings.ipam_source = source)
    }

    fn named(name: &str, pod_cidrs: &[&str]) -> NodeFact {
        NodeFact { pod_cidrs: spec(pod_cidrs), ..node(name) }
    }

    #[test]
    fn each_source_gives_a_node_its_own_block() {
        for (source, fitting, strange, without) in [
            (IpamSource::Wish, "10.244.7.0/24 r adopted", Some("carved"), Some("carved")),
            (IpamSource::Node, "10.244.7.0/24 r adopted", None, None),
            (IpamSource::Ignore, "carved", Some("carved"), Some("carved")),
        ] {
            let plan = |pod_cidrs: &[&str]| {
                created(&with_source(source).node(named("n", pod_cidrs)).all_report().plan())
            };
            for (pod_cidrs, expected) in
                [(&["10.244.7.0/24"][..], Some(fitting)), (&["192.168.7.0/24"], strange), (&[], without)]
            {
                let created = plan(pod_cidrs);
                assert_eq!(
                    created.len(),
                    usize::from(expected.is_some()),
                    "{source:?} {pod_cidrs:?} {created:?}"
                );
                assert!(created.iter().all(|c| c.ends_with(expected.unwrap())), "{source:?} {created:?}");
            }
        }
    }

    #[test]
    fn what_an_ignored_spec_names_is_given_to_no_other_node_and_nobody_complains() {
        let scene = with_source(IpamSource::Ignore)
            .node(named("a", &["10.244.0.0/24", "192.168.0.0/24"]))
            .node(node("b"));
        let plan = scene.all_report().plan();
        assert_eq!(created(&plan), ["a 10.244.1.0/24 r carved", "b 10.244.2.0/24 r carved"]);
        assert_eq!(faults(&plan), [] as [&str; 0]);
    }

    #[test]
    fn an_entry_that_cannot_be_followed_is_named_with_its_cure() {
        let reserved = RangeFact { reserved: [block("10.244.9.0/24")].into(), ..range("r", "10.244.0.0/16") };
        let other = RangeFact { allocation: Allocation::Draining, ..range("drained", "10.9.0.0/16") };
        let blue = RangeFact { selector: selector("zone", "blue"), ..range("blue", "10.8.0.0/16") };
        let resting = BlockFact {
            state: BlockState::Quarantined,
            release_after: Some(at(NOW + 500)),
            ..held_block("10.244.6.0/24", "r", "gone")
        };
        let scene = with_source(IpamSource::Node).range(reserved).range(other).range(blue);
        let scene = scene.block(resting).node(node("m")).block(held_block("10.244.5.0/24", "r", "m"));
        for (pod_cidr, reason, cure) in [
            ("192.168.7.0/24", "ForeignPodCIDR", "blockPrefixLength 24"),
            ("10.244.7.0/25", "ForeignPodCIDR", "--node-cidr-mask-size to 24"),
            ("10.244.9.0/24", "ForeignPodCIDR", "take it out of reserved"),
            ("10.8.1.0/24", "ForeignPodCIDR", "nodeSelector"),
            ("10.9.1.0/24", "ClusterCIDRNotReady", "Draining"),
            ("10.244.5.0/24", "PodCIDRTaken", "node m holds"),
            ("10.244.6.0/24", "PodCIDRTaken", "rests until"),
        ] {
            let plan = scene.clone().node(named("n", &[pod_cidr])).all_report().plan();
            assert_eq!(created(&plan), [] as [&str; 0], "{pod_cidr}");
            let fault = plan.faults.iter().find(|fault| &*fault.object.name == "n").unwrap();
            assert!(fault.reason == reason && fault.message.contains(cure), "{pod_cidr}: {fault:?}");
            assert_eq!(plan.nodes_without_block, 1);
        }
        let waiting = with_source(IpamSource::Node).node(node("n")).all_report().plan();
        assert_eq!(faults(&waiting), ["n NoPodCIDR"]);
        assert!(!waiting.steps.iter().any(|step| matches!(step, Step::MirrorToNode { .. })));
    }

    #[test]
    fn a_node_that_comes_back_under_another_entry_moves_to_it_but_never_from_under_its_pods() {
        // The controller gave it 10.244.9.0/24 this time; pods still run in 10.244.1.0/24.
        let resting = BlockFact {
            state: BlockState::Quarantined,
            release_after: Some(at(NOW + 500)),
            node_uid: Some("of-before".into()),
            ..held_block("10.244.1.0/24", "r", "n")
        };
        let scene = with_source(IpamSource::Node)
            .block(resting)
            .node(named("n", &["10.244.9.0/24"]))
            .report(report("n", &[("10.244.1.0/24", 3)]));
        let plan = scene.plan();
        assert_eq!(created(&plan), ["n 10.244.9.0/24 r adopted"]);
        assert!(plan.steps.iter().any(|step| matches!(step, Step::ChangeBlock { why: Why::Readopt, .. })));
        let scene = scene.after(&plan);
        assert_eq!(steps(&scene.plan()), [] as [&str; 0], "the node does not lease from the new one yet");
        let scene = scene.report(report("n", &[("10.244.1.0/24", 3), ("10.244.9.0/24", 0)]));
        let plan = scene.plan();
        let drains = |step: &Step| matches!(step, Step::ChangeBlock { why: Why::Asked, .. });
        assert!(plan.steps.iter().any(drains), "{plan:?}");
        let scene = scene.after(&plan);
        assert_eq!(steps(&scene.plan()), [] as [&str; 0], "three pods hold the old one");
        assert_eq!(faults(&scene.plan()), [] as [&str; 0]);
    }

    #[test]
    fn another_allocator_is_named_as_long_as_the_newest_entry_is_its_own() {
        let by = |manager: &str, second| Some(Writer { at: at(NOW + second), manager: manager.into() });
        let young = |source| {
            let scene = with_source(source);
            scene.range(RangeFact { created: at(NOW - 100), ..range("r", "10.244.0.0/16") })
        };
        let written = |name: &str, cidr: &str, by| NodeFact { pod_cidrs_by: by, ..named(name, &[cidr]) };
        let kcm = "kube-controller-manager";
        let before = || written("a", "10.244.1.0/24", by(kcm, -200));
        let beside = || written("b", "10.244.2.0/24", by(kcm, -50));
        let ours = || written("c", "10.244.3.0/24", by(names::OPERATOR_MANAGER, -20));
        let outlook = |scene: Scene| scene.all_report().plan().ranges["r"].other_allocator.clone();
        for source in [IpamSource::Wish, IpamSource::Ignore] {
            assert_eq!(outlook(young(source).node(before())), None, "it was there before Plat");
            let words = outlook(young(source).node(before()).node(beside())).unwrap();
            assert!(words.starts_with("kube-controller-manager wrote spec.podCIDRs of node b "), "{words}");
            assert_eq!(outlook(young(source).node(beside()).node(ours())), None, "it has stopped");
        }
        assert_eq!(outlook(young(IpamSource::Node).node(beside())), None, "there it is the source");
        assert_eq!(
            faults(&young(IpamSource::Wish).node(beside()).all_report().plan()),
            ["r PodCIDRsWrittenByOther"]
        );
    }
}
