//! What this node believes of the cluster: the newest objects, what fail static keeps of absent ones, and
//! the cache of both.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use plat_crds::cluster_cidr::DEFAULT_QUARANTINE_SECONDS;
use plat_crds::names::MAP_FILE;
use plat_crds::node_network::LostBlock;
use plat_crds::routing::Mode;
use plat_crds::selector::Labels;

use crate::cache::{Cache, Loaded};
use crate::desired::Map;
use crate::facts::{BlockFact, Fact, PolicyFact, RangeFact};
use crate::failstatic::{Belief, Held};
use crate::folder::Folder;
use crate::objects::Objects;
use crate::policies::{self, InForce};
use crate::rollout::{Contact, Rollouts, Signs};

/// A block whose PodCIDR was lost. Its node may have been granted leases for a quarantine just before, so for
/// that long nobody else may have it, also where no trace of that node is left: where etcd was put back to a
/// time before it joined, the operator knows of it only by what the other nodes remember.
struct Loss {
    block: LostBlock,
    until: Duration,
}

/// The objects that a node is programmed for.
pub struct Beliefs {
    node: String,
    hold: Duration,
    known: Objects,
    blocks: Belief<BlockFact>,
    ranges: Belief<RangeFact>,
    policies: Belief<PolicyFact>,
    /// Of the policies, those that this node follows.
    in_force: Vec<InForce>,
    /// Names of PodCIDRs that are believed in though they are absent.
    absent: BTreeSet<String>,
    /// PodCIDRs that went without having been released, by name.
    lost: BTreeMap<String, Loss>,
    /// A complete list of each kind, or the cache, was loaded: before that nothing may be touched.
    complete: bool,
    /// Objects were learnt since the last decision.
    fresh: bool,
    unsaved: bool,
}

impl Beliefs {
    /// The beliefs of `node`, from the cache in `run` if there is one.
    pub fn load(node: &str, hold: Duration, run: &Folder) -> Beliefs {
        let mut beliefs = Beliefs {
            node: node.to_owned(),
            hold,
            known: Objects::default(),
            blocks: Belief::default(),
            ranges: Belief::default(),
            policies: Belief::default(),
            in_force: Vec::new(),
            absent: BTreeSet::new(),
            lost: BTreeMap::new(),
            complete: false,
            fresh: false,
            unsaved: false,
        };
        match Cache::load(run) {
            Loaded::Cache(cache) => {
                tracing::info!(blocks = cache.blocks.len(), ranges = cache.ranges.len(), "loaded the cache");
                beliefs.blocks = Belief::of(cache.blocks);
                beliefs.ranges = Belief::of(cache.ranges);
                beliefs.policies = Belief::of(cache.policies);
                beliefs.complete = true;
            }
            Loaded::Nothing => tracing::info!("there is no cache; waiting for the API server"),
            Loaded::Unusable(why) => {
                tracing::warn!(why, "the cache cannot be used; waiting for the API server")
            }
        }
        beliefs
    }

    /// Takes in the newest objects.
    pub fn learn(&mut self, objects: &Objects) {
        self.known.clone_from(objects);
        let lists = [objects.blocks.lists, objects.ranges.lists, objects.policies.lists];
        self.complete |= lists.iter().all(|lists| *lists > 0);
        self.fresh = true;
        self.unsaved = true;
    }

    /// Decides which absences to believe at `now`.
    pub fn update(&mut self, now: Duration) -> Held {
        let in_doubt = self.blocks.is_in_doubt()
            || self.ranges.is_in_doubt()
            || self.policies.is_in_doubt()
            || !self.lost.is_empty();
        if !std::mem::take(&mut self.fresh) && !in_doubt {
            return Held::default();
        }
        let own_ranges: BTreeSet<String> = self.own().map(|block| block.range.clone()).collect();
        let node = self.node.as_str();
        let before = self.absent.len();
        let mut held =
            self.blocks.update(&self.known.blocks, now, self.hold, |b| b.node == node, BlockFact::released);
        let in_use: BTreeSet<&str> = self.blocks.facts.values().map(|b| b.range.as_str()).collect();
        let ranges = self.ranges.update(
            &self.known.ranges,
            now,
            self.hold,
            |range| own_ranges.contains(range.name()),
            |range| !in_use.contains(range.name()),
        );
        self.absent = self.blocks.absent().cloned().collect();
        self.unsaved |= self.absent.len() != before;
        // A policy is its users' to delete, and without it the next layer holds.
        let deleted = &self.known.policies.deleted;
        let gone = self.policies.update(
            &self.known.policies,
            now,
            self.hold,
            |_| false,
            |policy| deleted.contains(policy.name()),
        );
        held.names.extend(ranges.names.into_iter().chain(gone.names));
        held.wants_list |= ranges.wants_list || gone.wants_list;
        self.note_losses(now);
        held.lost = self.lost.values().map(|loss| loss.block.clone()).collect();
        let lost = self.lost.values().map(|loss| loss.until);
        held.next = held.next.into_iter().chain(ranges.next).chain(gone.next).chain(lost).min();
        held
    }

    /// Whether some RoutingPolicy says that nodes tunnel, in its newest version or in one that nodes may still follow.
    pub fn lets_tunnel(&self) -> bool {
        self.policies.facts.values().any(|policy| {
            let last_good = policy.last_good.as_ref().map(|good| &good.spec);
            let mut specs = last_good.into_iter().chain([&policy.spec]);
            specs.any(|spec| spec.routing.mode == Some(Mode::VXLAN))
        })
    }

    /// Lets `rollouts` decide which versions of the policies are followed, and answers why it went back from what.
    pub fn follow_policies(&mut self, rollouts: &mut Rollouts, signs: &Signs<'_>) -> Vec<(String, String)> {
        let own = self.own_labels();
        let back = rollouts.follow(&self.policies.facts, &own, &self.blocks.facts, signs);
        self.in_force = rollouts.in_force(&own);
        back
    }

    /// The labels of this node.
    pub fn own_labels(&self) -> Labels {
        policies::labels_of(&self.node, &self.blocks.facts)
    }

    /// When the API server last confirmed this node's blocks, as a sign for what is tried.
    pub fn contact(&self) -> Contact {
        if self.own().all(BlockFact::released) {
            return Contact::NotKept;
        }
        self.known
            .contact
            .map_or(Contact::Never, |contact| Contact::At(Duration::from_millis(contact.boot_ms)))
    }

    /// RoutingPolicies.
    pub fn policies(&self) -> &BTreeMap<String, PolicyFact> {
        &self.policies.facts
    }

    /// What is still routed to counts from now on at the latest; what was given up, until its time is over.
    fn note_losses(&mut self, now: Duration) {
        self.lost.retain(|name, loss| now < loss.until && !self.known.blocks.facts.contains_key(name));
        for name in &self.absent {
            let Some(fact) = self.blocks.facts.get(name) else { continue };
            let default = DEFAULT_QUARANTINE_SECONDS.unsigned_abs();
            let quarantine =
                self.ranges.facts.get(&fact.range).map_or(default, |range| range.quarantine_seconds);
            let block = LostBlock { cidr: fact.block.to_string(), node_name: fact.node.clone() };
            let until = now + Duration::from_secs(u64::from(quarantine));
            self.lost.entry(name.clone()).or_insert(Loss { block, until });
        }
    }

    fn own(&self) -> impl Iterator<Item = &BlockFact> {
        self.blocks.facts.values().filter(|block| block.node == self.node)
    }

    /// Whether anything may be done by them.
    pub fn are_complete(&self) -> bool {
        self.complete
    }

    /// The newest objects, whatever is believed.
    pub fn known(&self) -> &Objects {
        &self.known
    }

    /// The objects to program.
    pub fn map(&self) -> Map<'_> {
        Map {
            blocks: &self.blocks.facts,
            ranges: &self.ranges.facts,
            policies: &self.in_force,
            absent: &self.absent,
        }
    }

    /// Saves the cache if it changed or is gone, or if it is to be looked after. It is a copy: a pass does
    /// not fail for it, and the next one tries again.
    pub fn save(&mut self, run: &Folder, look: bool) {
        if !self.unsaved && !look && run.path().join(MAP_FILE).exists() {
            return;
        }
        let cache =
            Cache::new(self.blocks.facts.clone(), self.ranges.facts.clone(), self.policies.facts.clone());
        match cache.save(run) {
            Ok(_) => self.unsaved = false,
            Err(error) => tracing::warn!(%error, "the cache was not saved"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{block, objects, policy, range};
    use crate::objects::Change;
    use plat_crds::pod_cidr::BlockState;

    const HOLD: Duration = Duration::from_secs(300);

    struct Fixture {
        _root: tempfile::TempDir,
        run: Folder,
    }

    fn fixture() -> Fixture {
        let root = tempfile::tempdir().unwrap();
        Fixture { run: Folder::new(root.path()), _root: root }
    }

    #[test]
    fn nothing_may_be_done_before_all_kinds_were_listed() {
        let fixture = fixture();
        let mut beliefs = Beliefs::load("n1", HOLD, &fixture.run);
        let mut objects = Objects::default();
        objects.blocks.apply(Change::Listed(vec![Ok(block(1))]));
        beliefs.learn(&objects);
        assert!(!beliefs.are_complete());
        objects.ranges.apply(Change::Listed(vec![]));
        beliefs.learn(&objects);
        assert!(!beliefs.are_complete());
        assert!(objects.policies.apply(Change::Missing), "the kind is not installed");
        assert!(!objects.policies.apply(Change::Missing));
        beliefs.learn(&objects);
        assert!(beliefs.are_complete());
    }

    #[test]
    fn a_deleted_policy_goes_at_once_and_one_that_a_list_lacks_after_the_hold() {
        let fixture = fixture();
        let mut beliefs = Beliefs::load("n1", HOLD, &fixture.run);
        let mut seen = objects(vec![block(1)], vec![range("default-v4")]);
        seen.policies.apply(Change::Listed(vec![Ok(policy("a")), Ok(policy("b"))]));
        beliefs.learn(&seen);
        beliefs.update(Duration::ZERO);
        seen.policies.apply(Change::Deleted("a".into()));
        beliefs.learn(&seen);
        assert_eq!(beliefs.update(Duration::ZERO), Held::default());
        assert_eq!(beliefs.policies.facts.len(), 1);
        seen.policies.apply(Change::Listed(vec![]));
        beliefs.learn(&seen);
        assert_eq!(beliefs.update(Duration::ZERO).names, ["b"]);
        seen.policies.apply(Change::Listed(vec![]));
        beliefs.learn(&seen);
        assert_eq!((beliefs.update(HOLD), beliefs.policies.facts.len()), (Held::default(), 0));
    }

    #[test]
    fn a_new_life_believes_the_cache_and_holds_what_the_first_list_lacks() {
        let fixture = fixture();
        let mut first = Beliefs::load("n1", HOLD, &fixture.run);
        first.learn(&objects(vec![block(1), block(2), block(3)], vec![range("default-v4")]));
        first.update(Duration::ZERO);
        first.save(&fixture.run, false);

        let mut second = Beliefs::load("n1", HOLD, &fixture.run);
        assert!(second.are_complete());
        assert_eq!(second.map().blocks.len(), 3);
        second.learn(&objects(vec![], vec![]));
        let held = second.update(Duration::ZERO);
        assert_eq!((held.names.len(), second.map().blocks.len(), second.map().ranges.len()), (4, 3, 1));
        assert_eq!(second.map().absent.len(), 3);
    }

    fn lost(held: &Held) -> Vec<&str> {
        held.lost.iter().map(|lost| lost.node_name.as_str()).collect()
    }

    #[test]
    fn a_lost_block_is_told_of_for_a_quarantine_though_its_route_goes_before() {
        let fixture = fixture();
        let mut beliefs = Beliefs::load("n1", HOLD, &fixture.run);
        let released = BlockFact { state: BlockState::Quarantined, ..block(4) };
        let mut seen = objects(vec![block(1), block(2), block(3), released], vec![range("default-v4")]);
        beliefs.learn(&seen);
        assert_eq!(beliefs.update(Duration::ZERO).lost, []);
        let mut list = |beliefs: &mut Beliefs, second, blocks: Vec<BlockFact>| {
            seen.blocks.apply(Change::Listed(blocks.into_iter().map(Ok).collect()));
            beliefs.learn(&seen);
            beliefs.update(Duration::from_secs(second))
        };
        let held = list(&mut beliefs, 10, vec![block(1)]);
        assert_eq!(lost(&held), ["n2", "n3"], "a released one is not lost");
        let held = list(&mut beliefs, 400, vec![block(1), block(3)]);
        assert_eq!((beliefs.map().blocks.len(), lost(&held)), (2, vec!["n2"]), "given up, but told of");
        assert_eq!(held.next, Some(Duration::from_secs(910)));
        assert_eq!(lost(&beliefs.update(Duration::from_secs(909))), ["n2"]);
        assert_eq!(beliefs.update(Duration::from_secs(910)), Held::default());
    }

    #[test]
    fn a_block_that_is_still_routed_to_is_told_of_for_as_long_as_that() {
        let fixture = fixture();
        let mut beliefs = Beliefs::load("n1", HOLD, &fixture.run);
        let brief = RangeFact { quarantine_seconds: 60, ..range("default-v4") };
        let mut seen = objects(vec![block(1), block(2)], vec![brief]);
        beliefs.learn(&seen);
        beliefs.update(Duration::ZERO);
        seen.blocks.apply(Change::Listed(vec![]));
        beliefs.learn(&seen);
        for second in [0, 59, 60, 200, 10_000] {
            assert_eq!(lost(&beliefs.update(Duration::from_secs(second))), ["n1", "n2"], "{second}");
        }
    }

    #[test]
    fn a_range_goes_once_no_block_of_it_is_left() {
        let fixture = fixture();
        let mut beliefs = Beliefs::load("n1", HOLD, &fixture.run);
        beliefs.learn(&objects(
            vec![BlockFact { state: BlockState::Quarantined, ..block(2) }],
            vec![range("default-v4")],
        ));
        beliefs.update(Duration::ZERO);
        beliefs.learn(&objects(vec![], vec![]));
        assert_eq!(beliefs.update(Duration::ZERO), Held::default());
        assert!(beliefs.map().ranges.is_empty());
    }
}
