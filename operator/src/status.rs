//! Statuses of ranges and blocks, and which of them are written now. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use plat_crds::cluster_cidr::{Allocation, BlockCounts, MAX_GROUPS, MAX_PREFIXES, TopologyGroup};
use plat_crds::condition::{
    self, CONVERGED, DRAINING, GROWTH_BLOCKED, NODE_SPEC_CONFLICT, OTHER_ALLOCATOR, READY, Verdict,
};
use plat_crds::pod_cidr::BlockState;
use plat_crds::pod_cidr::EffectiveRouting;
use plat_crds::routing::{self, Layer, Mode};
use plat_crds::{ClusterCIDRStatus, Family, PodCIDRStatus};

use crate::budget::Budget;
use crate::carriers::{Carriers, was_converged};
use crate::facts::{BlockFact, Health, Name, NodeFact, PolicyFact, RangeFact, ReportFact};
use crate::forecast::{exhausted, forecast};
use crate::memory::{Memory, STATUS_WRITES_PER_SECOND};
use crate::plan::holding::{self, BlocksOf, Holding};
use crate::plan::{Plan, RangeOutlook, release};
use crate::ranges::{drain_command, quarantine_that_holds};
use crate::reason;
use crate::rollout;
use crate::snapshot::{Clock, IpamSource, Snapshot, Source};
use crate::step::{Step, version};
use crate::topology::GroupBlocks;

/// Counters of one PodCIDR are written at most so often.
const BLOCK_COUNTERS_EVERY: Duration = Duration::from_secs(10);
/// Counters of one ClusterCIDR are written at most so often; see [`range_counters_every`] for larger clusters.
const RANGE_COUNTERS_EVERY: Duration = Duration::from_secs(2);
/// However many agents and ranges there are, they need not wait longer: from then on the budget alone holds them up.
const RANGE_COUNTERS_LATEST: Duration = Duration::from_secs(60);
/// So many groups of a ClusterCIDR's status weigh as much as the status of a PodCIDR.
const GROUPS_PER_EVENT: f64 = 12.0;
/// Words that only say how far a block has spread are written at most so often, unless something else is.
const PROGRESS_EVERY: Duration = Duration::from_secs(60);
/// A new block's first status waits so long for its node to be ready: most agents are quicker, and then "not yet" was
/// never worth an event for every agent.
const FIRST_STATUS_AFTER: Duration = Duration::from_secs(15);
/// Watch events per second that counters alone may cost all agents together. `used` may be old in a large cluster;
/// what it says is told at once in the NodeNetwork.
const COUNTER_EVENTS_PER_SECOND: f64 = 50_000.0;
/// The budget never allows more at once.
const MAX_AT_ONCE: usize = STATUS_WRITES_PER_SECOND as usize;
/// While writes wait for the budget, they are looked at again after so long.
const BACKLOG_WAIT: Duration = Duration::from_millis(500);

/// A status that differs from what is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    /// How urgent it is.
    pub class: Class,
    /// How long it waits at least.
    pub wait: Duration,
    /// The write.
    pub step: Step,
}

/// How urgent a status write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A node may be waiting for it before it becomes Ready.
    Awaited,
    /// A condition flips, or the spec it speaks of has changed.
    Flip,
    /// Only counters or words differ.
    Counters,
    /// Only the words about how far a block has spread.
    Progress,
}

/// The writes to make now, and when to look again if some were left.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    /// Writes.
    pub steps: Vec<Step>,
    /// Writes that were left for later.
    pub backlog: usize,
    /// Time from now when one of those is due.
    pub wake_after: Option<Duration>,
}

/// All statuses that differ from what is written, made as they are asked for: two of them for each of thousands of
/// blocks would be most of the operator's memory.
pub fn writes<'a>(snapshot: &'a Snapshot, plan: &'a Plan) -> impl Iterator<Item = Write> + 'a {
    let (carriers, blocks_of) = (Carriers::of(snapshot), holding::by_node(snapshot));
    let ranges = snapshot.ranges.values().filter_map(move |range| range_write(range, plan, snapshot));
    let of_policy = |policy| policy_write(policy, &blocks_of, plan, snapshot);
    let policies: Vec<_> = snapshot.policies.values().filter_map(|policy| of_policy(policy)).collect();
    let readable = snapshot.blocks.values().filter(|block| block.problem.is_none());
    let blocks = readable.filter_map(move |block| block_write(block, &carriers, &blocks_of, plan, snapshot));
    ranges.chain(policies).chain(blocks)
}

/// The writes that could be made now.
#[derive(Clone, Debug, Default)]
pub struct Due {
    /// Nodes of the cluster: as many agents receive each write.
    nodes: usize,
    /// Of ranges and policies.
    ranges: Vec<(Class, Step)>,
    /// Of blocks, in their order: no more than the budget ever allows at once.
    blocks: BTreeMap<Rank, Step>,
    /// Those that were left.
    left: Chosen,
}

/// Flips first, then whatever has waited longest: class, time of the last write, uid.
type Rank = (Class, Option<Duration>, Name);

/// Finds what may be written in a cluster of that many nodes: what has waited for its interval, and not beside
/// another write to the same object.
pub fn due(
    writes: impl IntoIterator<Item = Write>,
    plan: &Plan,
    nodes: usize,
    memory: &Memory,
    clock: Clock,
) -> Due {
    let busy: std::collections::BTreeSet<_> = plan.steps.iter().map(Step::target).collect();
    let ranges_every = range_counters_every(nodes, plan.ranges.values().map(|range| range.holdings.len()));
    let mut due = Due { nodes, ..Due::default() };
    for write in writes {
        let target = write.step.target();
        if busy.contains(&target) || !memory.is_ripe(&target, clock) {
            continue;
        }
        let last = memory.status_written.get(uid(&write.step)).copied();
        let rest = last
            .map_or(Duration::ZERO, |at| (at + interval(&write, ranges_every)).saturating_sub(clock.steady));
        match (rest.max(write.wait), &write.step) {
            (Duration::ZERO, Step::BlockStatus { object, .. }) => {
                due.blocks.insert((write.class, last, object.uid.clone()), write.step);
                if due.blocks.len() > MAX_AT_ONCE && due.blocks.pop_last().is_some() {
                    due.left.later(BACKLOG_WAIT);
                }
            }
            (Duration::ZERO, _) => due.ranges.push((write.class, write.step)),
            (wait, _) => due.left.later(wait),
        }
    }
    due
}

impl Due {
    /// Chooses what to write now: as much as the budgets allow. Counters of ranges go before those of blocks, which
    /// their interval leaves half of the budget.
    pub fn choose(self, memory: &mut Memory, clock: Clock) -> Chosen {
        let Due { nodes, ranges, blocks, left: mut chosen } = self;
        memory.counters_budget.set_rate(clock.steady, counters_per_second(nodes));
        for (class, step) in ranges {
            if class <= Class::Flip || memory.counters_budget.spend(clock.steady, cost(&step)) {
                chosen.steps.push(step);
            } else {
                chosen.later(BACKLOG_WAIT);
            }
        }
        for ((class, ..), step) in blocks {
            let may = |budget: &mut Budget| budget.take(clock.steady, 1) == 1;
            if (class <= Class::Flip || may(&mut memory.counters_budget)) && may(&mut memory.budget) {
                chosen.steps.push(step);
            } else {
                chosen.later(BACKLOG_WAIT);
            }
        }
        for step in &chosen.steps {
            memory.status_written.insert(uid(step).clone(), clock.steady);
        }
        chosen
    }
}

/// Writes of counters in a second: each is an event for every agent.
pub fn counters_per_second(nodes: usize) -> f64 {
    let agents = u32::try_from(nodes).unwrap_or(u32::MAX).max(1);
    (COUNTER_EVENTS_PER_SECOND / f64::from(agents)).min(STATUS_WRITES_PER_SECOND)
}

/// How often the counters of each ClusterCIDR are written, if their statuses have so many groups: so that all of
/// them together cost half of what counters may cost.
pub fn range_counters_every(nodes: usize, groups: impl Iterator<Item = usize>) -> Duration {
    let seconds = 2.0 * groups.map(weight).sum::<f64>() / counters_per_second(nodes);
    Duration::try_from_secs_f64(seconds)
        .unwrap_or(RANGE_COUNTERS_LATEST)
        .clamp(RANGE_COUNTERS_EVERY, RANGE_COUNTERS_LATEST)
}

/// What an event of a ClusterCIDR with so many groups costs, in events of a PodCIDR.
pub fn weight(groups: usize) -> f64 {
    1.0 + groups.min(MAX_GROUPS) as f64 / GROUPS_PER_EVENT
}

fn cost(step: &Step) -> f64 {
    match step {
        Step::RangeStatus { new, .. } => weight(new.groups.len()),
        _ => 1.0,
    }
}

impl Chosen {
    fn later(&mut self, wait: Duration) {
        self.backlog += 1;
        self.wake_after = Some(self.wake_after.map_or(wait, |known| known.min(wait)));
    }
}

fn interval(write: &Write, ranges_every: Duration) -> Duration {
    match (write.class, &write.step) {
        (Class::Awaited | Class::Flip, _) => Duration::ZERO,
        (Class::Counters, Step::RangeStatus { .. }) => ranges_every,
        (Class::Counters, _) => BLOCK_COUNTERS_EVERY,
        (Class::Progress, _) => PROGRESS_EVERY,
    }
}

fn uid(step: &Step) -> &Name {
    static NONE: std::sync::LazyLock<Name> = std::sync::LazyLock::new(|| "".into());
    match step {
        Step::RangeStatus { object, .. }
        | Step::PolicyStatus { object, .. }
        | Step::BlockStatus { object, .. } => &object.uid,
        _ => &NONE,
    }
}

fn policy_write(
    policy: &PolicyFact,
    blocks_of: &BlocksOf,
    plan: &Plan,
    snapshot: &Snapshot,
) -> Option<Write> {
    if policy.problem.is_some() {
        return None;
    }
    let (old, new) = (&policy.status, rollout::status(policy, blocks_of, plan, snapshot));
    if new == *old {
        return None;
    }
    let flips = flips(&old.conditions, &new.conditions)
        || (new.observed_generation, new.phase, &new.last_good)
            != (old.observed_generation, old.phase, &old.last_good);
    let step = Step::PolicyStatus { object: version(policy), old: Box::new(old.clone()), new: Box::new(new) };
    Some(Write { class: if flips { Class::Flip } else { Class::Counters }, wait: Duration::ZERO, step })
}

fn range_write(range: &RangeFact, plan: &Plan, snapshot: &Snapshot) -> Option<Write> {
    let outlook = plan.ranges.get(&range.name)?;
    let was_ready = condition::is_true(&range.status.conditions, READY);
    let becomes_ready = outlook.judgement.is_good() && !was_ready;
    // `Ready=True` lets blocks be carved: it is written only for a prepared range, judged on live LISTs.
    if becomes_ready && !(range.is_prepared() && snapshot.source == Source::Live) {
        return None;
    }
    let new = range_status(range, outlook, plan, snapshot);
    if new == range.status {
        return None;
    }
    let flips = flips(&range.status.conditions, &new.conditions)
        || new.observed_generation != range.status.observed_generation
        || new.quarantine_seconds != range.status.quarantine_seconds
        || range.status.blocks.is_none() && new.blocks.is_some();
    let object = version(range);
    let step = Step::RangeStatus { object, old: Box::new(range.status.clone()), new: Box::new(new) };
    Some(Write { class: if flips { Class::Flip } else { Class::Counters }, wait: Duration::ZERO, step })
}

fn range_status(
    range: &RangeFact,
    outlook: &RangeOutlook,
    plan: &Plan,
    snapshot: &Snapshot,
) -> ClusterCIDRStatus {
    let (generation, now) = (Some(range.generation), Time(snapshot.clock.wall));
    let mut status = ClusterCIDRStatus { observed_generation: generation, ..range.status.clone() };
    condition::set(&mut status.conditions, &outlook.judgement.ready, generation, &now);
    condition::set(&mut status.conditions, &outlook.judgement.overlapping, generation, &now);
    if range.range.is_some() && range.block_prefix.is_some() {
        let mine = snapshot.blocks.values().filter(|block| block.range == range.name);
        let (quarantined, allocated): (Vec<_>, Vec<_>) = mine.partition(|block| block.is_quarantined());
        let draining = allocated.iter().filter(|block| block.state == BlockState::Draining).count();
        let drained = draining_range(range, allocated.len(), draining);
        condition::set_or_remove(&mut status.conditions, DRAINING, drained.as_ref(), generation, &now);
        status.blocks = Some(BlockCounts {
            total: signed(outlook.total),
            allocated: signed(allocated.len()),
            draining: signed(draining),
            quarantined: signed(quarantined.len()),
            free: signed(outlook.free),
        });
        status.groups = groups(range, outlook);
        status.cursor = Some(signed(outlook.cursor));
        status.quarantine_seconds = Some(quarantine_that_holds(range, snapshot));
        let fill = outlook.fill();
        let forecast = forecast(range.status.forecast.as_ref(), fill, snapshot.clock.wall);
        let exhausted = exhausted(range, &forecast, fill, plan, snapshot);
        condition::set(&mut status.conditions, &exhausted, generation, &now);
        status.forecast = Some(forecast);
        let other = other_allocator(outlook);
        if other.status == Some(true) || condition::find(&status.conditions, OTHER_ALLOCATOR).is_some() {
            condition::set(&mut status.conditions, &other, generation, &now);
        }
    }
    status
}

/// How far a range is drained that hands out no more blocks.
fn draining_range(range: &RangeFact, allocated: usize, draining: usize) -> Option<Verdict> {
    if range.allocation == Allocation::Enabled {
        return None;
    }
    let (reason, message) = match allocated {
        0 => (reason::NO_BLOCKS_LEFT, "no node holds a block of it: it can be deleted".to_owned()),
        _ => (
            reason::BLOCKS_LEFT,
            format!(
                "nodes hold {allocated} of its blocks, of which {draining} drain; to move the others: {}",
                drain_command(&range.name)
            ),
        ),
    };
    Some(Verdict::new(DRAINING, Some(true), reason, message))
}

/// What each group of nodes holds: of too many groups those with most blocks, in the order of their values.
fn groups(range: &RangeFact, outlook: &RangeOutlook) -> Vec<TopologyGroup> {
    let mut holdings: Vec<_> = outlook.holdings.iter().collect();
    if holdings.len() > MAX_GROUPS {
        holdings.sort_by_key(|holding| (Reverse(holding.blocks), &holding.value));
        holdings.truncate(MAX_GROUPS);
        holdings.sort_by_key(|holding| &holding.value);
    }
    let group = |holding: &GroupBlocks| {
        let stretches = holding.stretches.iter().take(MAX_PREFIXES);
        let prefixes = stretches.filter_map(|(stretch, _)| range.prefix(stretch));
        TopologyGroup {
            value: holding.value.as_deref().map(ToOwned::to_owned),
            blocks: signed(holding.blocks),
            outside: signed(holding.outside()),
            prefix_count: signed(holding.stretches.len()),
            prefixes: prefixes.map(|prefix| prefix.to_string()).collect(),
        }
    };
    holdings.into_iter().map(group).collect()
}

fn other_allocator(outlook: &RangeOutlook) -> Verdict {
    match &outlook.other_allocator {
        Some(words) => Verdict::new(OTHER_ALLOCATOR, Some(true), reason::WRITTEN_BY_OTHER, words.clone()),
        None => Verdict::new(OTHER_ALLOCATOR, Some(false), reason::SOLE_ALLOCATOR, ""),
    }
}

fn block_write(
    block: &BlockFact,
    carriers: &Carriers,
    blocks_of: &BlocksOf,
    plan: &Plan,
    snapshot: &Snapshot,
) -> Option<Write> {
    let new = block_status(block, carriers, blocks_of, plan, snapshot);
    let old = block.unpacked_status();
    if new == old {
        return None;
    }
    let class = if is_awaited(block, &new, snapshot) {
        Class::Awaited
    } else if flips(&old.conditions, &new.conditions)
        || (new.observed_generation, new.capacity, &new.routing)
            != (old.observed_generation, old.capacity, &old.routing)
    {
        Class::Flip
    } else if differs_in_progress_only(&old, &new) {
        Class::Progress
    } else {
        Class::Counters
    };
    let is_first =
        class != Class::Awaited && block.status.is_none() && !condition::is_true(&new.conditions, READY);
    let wait =
        if is_first { snapshot.clock.until(block.created + FIRST_STATUS_AFTER) } else { Duration::ZERO };
    let step = Step::BlockStatus {
        object: version(block),
        node: block.node.clone(),
        old: Box::new(old),
        new: Box::new(new),
    };
    Some(Write { class, wait: wait.min(FIRST_STATUS_AFTER), step })
}

fn differs_in_progress_only(old: &PodCIDRStatus, new: &PodCIDRStatus) -> bool {
    let all_but_progress = |status: &PodCIDRStatus| {
        let mut status = status.clone();
        status.conditions.retain(|c| c.type_ != CONVERGED);
        status
    };
    all_but_progress(old) == all_but_progress(new)
}

/// Whether the block becomes converged while its node is on its way to `Ready`.
fn is_awaited(block: &BlockFact, new: &PodCIDRStatus, snapshot: &Snapshot) -> bool {
    let joins = || snapshot.nodes.get(&block.node).is_some_and(|node| node.health == Health::NotReady);
    condition::is_true(&new.conditions, CONVERGED) && !was_converged(block) && joins()
}

fn block_status(
    block: &BlockFact,
    carriers: &Carriers,
    blocks_of: &BlocksOf,
    plan: &Plan,
    snapshot: &Snapshot,
) -> PodCIDRStatus {
    let (generation, now) = (Some(block.generation), Time(snapshot.clock.wall));
    let (node, report) = (snapshot.nodes.get(&block.node), snapshot.reports.get(&block.node));
    let mut status = block.unpacked_status();
    status.observed_generation = generation;
    status.capacity = Some(i64::from(block.block.capacity()));
    let held = report.and_then(|report| report.held.iter().find(|held| held.block == block.block));
    status.used = held.and_then(|held| held.used).or(status.used);
    status.routing = effective_routing(block, snapshot.ranges.get(&block.range).map(|r| &**r));
    let mut set = |verdict: &Verdict| condition::set(&mut status.conditions, verdict, generation, &now);
    set(&match block.is_quarantined() {
        true => resting(block, node.is_some(), carriers, snapshot),
        false => ready(block, node.map(|n| &**n), report.map(|r| &**r)),
    });
    set(&carriers.converged(block));
    if let Some(node) = node {
        let others = blocks_of.get(&*node.name).map_or(&[][..], Vec::as_slice);
        set(&node_spec_conflict(block, node, others, snapshot.settings.ipam_source));
    }
    for type_ in [DRAINING, GROWTH_BLOCKED] {
        let verdict = plan.verdicts.get(&block.name).into_iter().flatten().find(|v| v.type_ == type_);
        condition::set_or_remove(&mut status.conditions, type_, verdict, generation, &now);
    }
    status
}

fn effective_routing(block: &BlockFact, range: Option<&RangeFact>) -> Option<EffectiveRouting> {
    let own = block.routing.as_deref().map(|routing| (Layer::PodCIDR, routing));
    let ranges =
        range.and_then(|range| range.routing.as_deref()).map(|routing| (Layer::ClusterCIDR, routing));
    let layers: Vec<_> = own.into_iter().chain(ranges).collect();
    let resolved = routing::resolve(&layers).ok()?;
    let family = block.block.family();
    let of_family = |address: &&IpAddr| Family::of(address) == family;
    let hop = resolved.next_hops.value.first().map(|hop| hop.address);
    let via = hop.or_else(|| block.addresses.iter().find(of_family).copied());
    Some(EffectiveRouting {
        mode: resolved.mode.value,
        via: via.filter(|_| resolved.mode.value != Mode::None).map(|address| address.to_string()),
        metric: i32::try_from(resolved.metric.value).unwrap_or(i32::MAX),
        mtu: resolved.mtu.value.and_then(|mtu| i32::try_from(mtu).ok()),
    })
}

/// What a quarantined block still waits for.
fn resting(block: &BlockFact, node_exists: bool, carriers: &Carriers, snapshot: &Snapshot) -> Verdict {
    let why = if node_exists { "its node has given it back" } else { "its node is gone" };
    let message = release::waits_for(block, carriers, snapshot);
    Verdict::new(READY, Some(false), reason::QUARANTINED, format!("{why}; {message}"))
}

fn ready(block: &BlockFact, node: Option<&NodeFact>, report: Option<&ReportFact>) -> Verdict {
    let name = &block.node;
    let verdict = |status, reason, message: String| Verdict::new(READY, status, reason, message);
    if node.is_none() {
        return verdict(Some(false), reason::NODE_GONE, format!("node {name} is gone"));
    }
    if node.is_some_and(|node| node.health == Health::Lost) {
        return verdict(None, reason::NODE_LOST, format!("Kubernetes has lost contact with node {name}"));
    }
    let Some(report) = report.filter(|report| report.reported) else {
        let message = format!("the agent on node {name} has not reported yet: see its pod's log");
        return verdict(Some(false), reason::NO_REPORT, message);
    };
    if let Some(unready) = &report.unready {
        return verdict(Some(false), reason::AGENT_NOT_READY, format!("node {name}: {unready}"));
    }
    if !report.held.iter().any(|held| held.block == block.block) {
        let message = format!("the agent on node {name} does not lease from the block yet");
        return verdict(Some(false), reason::NOT_TAKEN_UP, message);
    }
    verdict(Some(true), reason::PROGRAMMED, String::new())
}

/// Whether the block's node was moved to it from the one that `node.spec.podCIDRs` names.
pub fn was_moved(block: &BlockFact) -> bool {
    block.condition(NODE_SPEC_CONFLICT).is_some_and(|c| c.reason == reason::MOVED)
}

fn node_spec_conflict(
    block: &BlockFact,
    node: &NodeFact,
    others: &[&BlockFact],
    source: IpamSource,
) -> Verdict {
    let verdict =
        |status, reason, message: String| Verdict::new(NODE_SPEC_CONFLICT, Some(status), reason, message);
    if node.pod_cidrs.is_empty() {
        return verdict(false, reason::NOT_SET, String::new());
    }
    if node.spec_blocks().any(|spec| spec == block.block) {
        return verdict(false, reason::LISTED, String::new());
    }
    let own = Holding::of(others, block.block.family(), &node.uid);
    if own.main().is_some_and(|main| main.uid != block.uid) {
        return verdict(false, reason::FURTHER_BLOCK, String::new());
    }
    let listed = node.spec_blocks().map(|spec| spec.to_string()).collect::<Vec<_>>().join(", ");
    if source == IpamSource::Ignore {
        let message = format!("node {} has spec.podCIDRs [{listed}]; ipam.source is ignore", node.name);
        return verdict(false, reason::IGNORED, message);
    }
    let mut family = others.iter().filter(|other| other.block.family() == block.block.family());
    if family.any(|other| was_moved(other) || node.spec_blocks().any(|spec| spec == other.block)) {
        let message = format!(
            "node {} was moved to this block; its spec.podCIDRs goes on saying [{listed}], as it is write-once. Pods do not depend on it. \
             Where it matters (cloud routes, kube-proxy's NodeCIDR mode), delete the Node object and let its kubelet register again",
            node.name
        );
        return verdict(false, reason::MOVED, message);
    }
    let message = format!(
        "node {} has spec.podCIDRs [{listed}], which is write-once and does not name this block; pods use this block. \
         If the field matters (cloud routes, kube-proxy's NodeCIDR mode), delete the Node object and let its kubelet register again",
        node.name
    );
    verdict(true, reason::DIFFERS, message)
}

/// Whether a condition appears, or changes its status or reason. Words alone do not count.
fn flips(old: &[Condition], new: &[Condition]) -> bool {
    new.iter().any(|c| {
        condition::find(old, &c.type_).is_none_or(|o| (&o.status, &o.reason) != (&c.status, &c.reason))
    })
}

/// A count as objects and metrics have it.
pub fn signed<N>(number: N) -> i64
where
    i64: TryFrom<N>,
{
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Fact;
    use crate::fixtures::{NOW, Scene, at, block, held_block, node, range, report, scene, spec};
    use crate::memory::Memory;
    use crate::step::Version;
    use plat_crds::condition::EXHAUSTED;
    use plat_crds::digest::Digest;
    use plat_crds::node_network::FailedObject;
    use plat_crds::pod_cidr::BlockState;
    use plat_crds::routing::Routing;

    fn version_of(name: &str, uid: &str) -> Version {
        Version { name: name.into(), uid: uid.into(), resource_version: "1".into() }
    }

    /// A scene whose leader has seen its objects, and the sum over them.
    fn seen(mut scene: Scene) -> (Scene, Digest) {
        scene.memory.ledger.update(&scene.world.ranges, &scene.world.blocks);
        let blocks = scene.world.blocks.values().map(|b| (&**b.uid(), b.generation));
        let ranges = scene.world.ranges.values().map(|r| (&**r.uid(), r.generation));
        let sum = Digest::of(blocks.chain(ranges));
        (scene, sum)
    }

    fn two_nodes() -> Scene {
        scene()
            .range(range("default-v4", "10.244.0.0/16"))
            .node(node("n1"))
            .node(node("n2"))
            .block(held_block("10.244.1.0/24", "default-v4", "n1"))
            .block(held_block("10.244.2.0/24", "default-v4", "n2"))
    }

    fn reported(node: &str, held: &[(&str, i64)], sum: Digest) -> ReportFact {
        ReportFact { applied: Some(sum), ..report(node, held) }
    }

    fn status_of(scene: &Scene, name: &str) -> PodCIDRStatus {
        let snapshot = scene.snapshot();
        block_status(
            &snapshot.blocks[name],
            &Carriers::of(&snapshot),
            &holding::by_node(&snapshot),
            &scene.plan(),
            &snapshot,
        )
    }

    fn verdict(status: &PodCIDRStatus, type_: &str) -> (String, String) {
        let c = condition::find(&status.conditions, type_).unwrap();
        (c.status.clone(), c.reason.clone())
    }

    #[test]
    fn a_block_is_ready_once_its_node_has_programmed_itself_and_leases_from_it() {
        let (scene, sum) = seen(two_nodes());
        let held = [("10.244.1.0/24", 5)];
        let unready =
            ReportFact { unready: Some("CNIReady: no plugin".into()), ..reported("n1", &held, sum) };
        let silent = ReportFact { reported: false, ..report("n1", &[]) };
        for (report, expected) in [
            (None, ("False", reason::NO_REPORT)),
            (Some(silent), ("False", reason::NO_REPORT)),
            (Some(unready), ("False", reason::AGENT_NOT_READY)),
            (Some(reported("n1", &[], sum)), ("False", reason::NOT_TAKEN_UP)),
            (Some(reported("n1", &held, sum)), ("True", reason::PROGRAMMED)),
        ] {
            let scene = report.into_iter().fold(scene.clone(), Scene::report);
            let status = status_of(&scene, "10-244-1-0-24");
            assert_eq!(verdict(&status, READY), (expected.0.to_owned(), expected.1.to_owned()));
        }
        let lost =
            scene.report(reported("n1", &held, sum)).node(NodeFact { health: Health::Lost, ..node("n1") });
        assert_eq!(
            verdict(&status_of(&lost, "10-244-1-0-24"), READY),
            ("Unknown".to_owned(), reason::NODE_LOST.to_owned())
        );
    }

    #[test]
    fn counters_come_from_the_report_and_outlive_it() {
        let (scene, sum) = seen(two_nodes());
        let with = scene.clone().report(reported("n1", &[("10.244.1.0/24", 5)], sum));
        let status = status_of(&with, "10-244-1-0-24");
        assert_eq!((status.used, status.capacity), (Some(5), Some(253)));
        let without = scene.block(BlockFact {
            status: Some(Box::new(status.into())),
            ..held_block("10.244.1.0/24", "default-v4", "n1")
        });
        assert_eq!(status_of(&without, "10-244-1-0-24").used, Some(5));
    }

    #[test]
    fn a_block_converges_when_every_live_node_and_its_own_carry_it() {
        let (scene, sum) = seen(two_nodes());
        let converged = |scene: &Scene| verdict(&status_of(scene, "10-244-1-0-24"), CONVERGED).1;
        assert_eq!(converged(&scene), reason::SPREADING);
        let one = scene.clone().report(reported("n1", &[], sum)).report(report("n2", &[]));
        assert_eq!(converged(&one), reason::SPREADING, "n2 is live and behind");
        let both = one.clone().report(reported("n2", &[], sum));
        assert_eq!(converged(&both), reason::CARRIED);
        let not_live = one.clone().node(NodeFact { health: Health::NotReady, ..node("n2") });
        assert_eq!(converged(&not_live), reason::CARRIED, "a node that is not Ready is not waited for");
        let own =
            scene.report(reported("n2", &[], sum)).node(NodeFact { health: Health::NotReady, ..node("n1") });
        assert_eq!(converged(&own), reason::SPREADING, "but its own node is");
        let joining = own.report(report("n1", &[("10.244.1.0/24", 0)]));
        assert_eq!(converged(&joining), reason::CARRIED, "until it leases from the block, whatever its sum");
        let virtual_node = joining.node(node("virtual"));
        assert_eq!(converged(&virtual_node), reason::CARRIED, "a node without an agent is not waited for");
        let message =
            condition::find(&status_of(&one, "10-244-1-0-24").conditions, CONVERGED).unwrap().message.clone();
        assert!(message.contains("1 of 2 live nodes") && message.contains("n2"), "{message}");
    }

    #[test]
    fn a_converged_block_stays_so_when_a_node_joins_but_not_when_one_fails() {
        let (scene, sum) = seen(two_nodes());
        let both = scene.report(reported("n1", &[], sum)).report(reported("n2", &[], sum));
        let status = status_of(&both, "10-244-1-0-24");
        let written = BlockFact {
            status: Some(Box::new(status.into())),
            ..held_block("10.244.1.0/24", "default-v4", "n1")
        };
        let joined = both.clone().block(written.clone()).node(node("n3")).report(report("n3", &[]));
        assert_eq!(verdict(&status_of(&joined, "10-244-1-0-24"), CONVERGED).1, reason::CARRIED);
        let changed = joined.clone().block(BlockFact { generation: 2, ..written });
        assert_eq!(verdict(&status_of(&changed, "10-244-1-0-24"), CONVERGED).1, reason::SPREADING);
        let failed = FailedObject {
            name: "10-244-1-0-24".into(),
            reason: "R".into(),
            message: "no route to it".into(),
        };
        let broken = joined.report(ReportFact { failed: [failed].into(), ..reported("n2", &[], sum) });
        let status = status_of(&broken, "10-244-1-0-24");
        assert_eq!(verdict(&status, CONVERGED), ("False".to_owned(), reason::FAILED_ON_NODE.to_owned()));
    }

    #[test]
    fn one_object_that_fails_on_a_node_does_not_hide_that_the_others_arrived() {
        let (scene, _) = seen(two_nodes());
        let mut sum = Digest::of(scene.world.blocks.values().map(|b| (&**b.uid(), b.generation)));
        sum.remove("uid-10.244.2.0/24", 1);
        sum.add("uid-default-v4", 1);
        let failed = FailedObject { name: "10-244-2-0-24".into(), reason: "R".into(), message: "m".into() };
        let report = |node: &str| ReportFact { failed: [failed.clone()].into(), ..reported(node, &[], sum) };
        let scene = scene.report(report("n1")).report(report("n2"));
        assert_eq!(verdict(&status_of(&scene, "10-244-1-0-24"), CONVERGED).1, reason::CARRIED);
        assert_eq!(verdict(&status_of(&scene, "10-244-2-0-24"), CONVERGED).1, reason::FAILED_ON_NODE);
    }

    #[test]
    fn a_node_spec_that_does_not_list_the_block_is_a_conflict() {
        for (pod_cidrs, expected) in [
            (&[][..], ("False", reason::NOT_SET)),
            (&["fd00::/64", "10.244.1.0/24"], ("False", reason::LISTED)),
            (&["10.9.9.0/24"], ("True", reason::DIFFERS)),
        ] {
            let scene = two_nodes().node(NodeFact { pod_cidrs: spec(pod_cidrs), ..node("n1") });
            let status = status_of(&scene, "10-244-1-0-24");
            assert_eq!(verdict(&status, NODE_SPEC_CONFLICT), (expected.0.to_owned(), expected.1.to_owned()));
        }
    }

    #[test]
    fn a_move_and_further_blocks_are_no_conflict_with_the_node_spec() {
        let listed = NodeFact { pod_cidrs: spec(&["10.244.1.0/24"]), ..node("n1") };
        let further = BlockFact { created: at(NOW - 9), ..held_block("10.244.3.0/24", "default-v4", "n1") };
        let scene = two_nodes().node(listed).block(further.clone());
        let conflict = |scene: &Scene| {
            let (status, reason) = verdict(&status_of(scene, "10-244-3-0-24"), NODE_SPEC_CONFLICT);
            assert_eq!(status, "False", "{reason}");
            reason
        };
        assert_eq!(conflict(&scene), reason::FURTHER_BLOCK);
        for state in [BlockState::Active, BlockState::Draining, BlockState::Quarantined] {
            let old = BlockFact { drain: true, state, ..held_block("10.244.1.0/24", "default-v4", "n1") };
            let moved = scene.clone().block(old);
            assert_eq!(conflict(&moved), reason::MOVED, "{state:?}");
            assert_eq!(moved.plan().faults, []);
            let status = status_of(&moved, "10-244-3-0-24");
            let after = BlockFact { status: Some(Box::new(status.into())), ..further.clone() };
            let gone = moved.block(after).with(|s| {
                std::sync::Arc::make_mut(&mut s.world.blocks).remove("10-244-1-0-24");
            });
            assert_eq!(conflict(&gone), reason::MOVED, "the old block is gone: {state:?}");
            assert_eq!(gone.plan().faults, []);
        }
    }

    #[test]
    fn a_range_that_drains_says_how_much_is_left() {
        let draining = RangeFact { allocation: Allocation::Draining, ..range("default-v4", "10.244.0.0/16") };
        let told = |scene: &Scene| {
            let range = &scene.world.ranges["default-v4"];
            let status =
                range_status(range, &scene.plan().ranges["default-v4"], &scene.plan(), &scene.snapshot());
            let condition = condition::find(&status.conditions, DRAINING).cloned();
            (status.blocks.unwrap().draining, condition.map(|c| (c.reason, c.message)))
        };
        assert_eq!(told(&two_nodes()), (0, None));
        let drained =
            BlockFact { state: BlockState::Draining, ..held_block("10.244.1.0/24", "default-v4", "n1") };
        let (draining_blocks, condition) = told(&two_nodes().range(draining.clone()).block(drained));
        let (reason, message) = condition.unwrap();
        assert_eq!((draining_blocks, reason.as_str()), (1, reason::BLOCKS_LEFT));
        assert_eq!(
            message,
            "nodes hold 2 of its blocks, of which 1 drain; to move the others: kubectl annotate podcidrs -l plat.network/clustercidr=default-v4 plat.network/drain="
        );
        assert_eq!(told(&scene().range(draining)).1.unwrap().0, reason::NO_BLOCKS_LEFT);
    }

    #[test]
    fn a_quarantined_block_is_not_ready() {
        let resting =
            BlockFact { state: BlockState::Quarantined, ..held_block("10.244.9.0/24", "default-v4", "gone") };
        let status = status_of(&two_nodes().block(resting), "10-244-9-0-24");
        assert_eq!(verdict(&status, READY).1, reason::QUARANTINED);
    }

    #[test]
    fn effective_routing_takes_the_nearest_layer_and_the_address_of_the_blocks_family() {
        let addresses = ["fd00::9".parse().unwrap(), "172.30.0.9".parse().unwrap()];
        let plain =
            BlockFact { addresses: addresses.into(), ..held_block("10.244.1.0/24", "default-v4", "n1") };
        let routed = |routing: Option<Routing>| {
            let block = BlockFact { routing: routing.map(Box::new), ..plain.clone() };
            effective_routing(&block, Some(&range("default-v4", "10.244.0.0/16"))).unwrap()
        };
        assert_eq!(routed(None).via.as_deref(), Some("172.30.0.9"));
        let none = routed(Some(Routing { mode: Some(Mode::None), ..Routing::default() }));
        assert_eq!((none.mode, none.via), (Mode::None, None));
        let hop = routed(Some(Routing {
            next_hop: Some("172.30.0.1".into()),
            metric: Some(7),
            mtu: Some(1400),
            ..Routing::default()
        }));
        assert_eq!((hop.via.as_deref(), hop.metric, hop.mtu), (Some("172.30.0.1"), 7, Some(1400)));
    }

    #[test]
    fn a_ranges_ready_true_is_written_on_live_lists_only() {
        let fresh =
            RangeFact { status: ClusterCIDRStatus::default(), ..range("default-v4", "10.244.0.0/16") };
        let live = scene().range(fresh);
        let cached = live.clone().with(|s| s.source = Source::Cache);
        assert_eq!(writes(&cached.snapshot(), &cached.plan()).next(), None);
        let [Write { class: Class::Flip, step: Step::RangeStatus { new, .. }, .. }] =
            &writes(&live.snapshot(), &live.plan()).collect::<Vec<_>>()[..]
        else {
            panic!()
        };
        assert!(condition::is_true(&new.conditions, READY));
        let unprepared = live.range(RangeFact {
            finalizers: [].into(),
            status: ClusterCIDRStatus::default(),
            ..range("default-v4", "10.244.0.0/16")
        });
        assert_eq!(writes(&unprepared.snapshot(), &unprepared.plan()).next(), None);
    }

    #[test]
    fn a_ranges_blocks_are_counted() {
        let scene = scene()
            .range(RangeFact { reserved: [block("10.244.3.0/24")].into(), ..range("r", "10.244.0.0/22") })
            .node(node("n1"))
            .block(held_block("10.244.0.0/24", "r", "n1"))
            .block(BlockFact { state: BlockState::Quarantined, ..held_block("10.244.1.0/24", "r", "gone") });
        let plan = scene.plan();
        let status = range_status(&scene.world.ranges["r"], &plan.ranges["r"], &plan, &scene.snapshot());
        assert_eq!(
            status.blocks,
            Some(BlockCounts { total: 4, allocated: 1, draining: 0, quarantined: 1, free: 1 })
        );
        assert!(!condition::is_true(&status.conditions, EXHAUSTED));
        let full = scene.node(node("n2")).block(held_block("10.244.2.0/24", "r", "n2"));
        let status =
            range_status(&full.world.ranges["r"], &full.plan().ranges["r"], &full.plan(), &full.snapshot());
        assert!(condition::is_true(&status.conditions, EXHAUSTED));
    }

    #[test]
    fn a_lowered_quarantine_holds_once_every_node_with_a_block_has_reported_that_it_knows() {
        let lowered = |generation| {
            let mut range = range("r", "10.244.0.0/16");
            range.status.quarantine_seconds = Some(900);
            RangeFact { quarantine_seconds: 60, generation, ..range }
        };
        let scene = scene()
            .nodes(&["n1", "cut-off"])
            .block(held_block("10.244.0.0/24", "r", "n1"))
            .block(held_block("10.244.1.0/24", "r", "cut-off"))
            .block(BlockFact { state: BlockState::Quarantined, ..held_block("10.244.2.0/24", "r", "gone") });
        let digest = |scene: &Scene| {
            let blocks = scene.world.blocks.values().map(|b| (&*b.uid, b.generation));
            Digest::of(blocks.chain(scene.world.ranges.values().map(|r| (&*r.uid, r.generation))))
        };
        let knows = |scene: Scene, node: &str, digest| {
            scene.report(ReportFact { applied: Some(digest), ..report(node, &[]) })
        };
        let (before, after) = (scene.clone().range(lowered(1)), scene.range(lowered(2)));
        let (old, new) = (digest(&before), digest(&after));
        let holds = |scene: Scene| {
            let scene = scene.with(|s| {
                for world in [&before.world, &after.world] {
                    s.memory.ledger.update(&world.ranges, &world.blocks);
                }
            });
            let plan = scene.plan();
            let range = &scene.world.ranges["r"];
            range_status(range, &plan.ranges["r"], &plan, &scene.snapshot()).quarantine_seconds
        };
        let one = knows(knows(after.clone(), "n1", new), "cut-off", old);
        assert_eq!(holds(one), Some(900), "it may go by the old one");
        assert_eq!(holds(knows(after.clone(), "n1", new)), Some(900), "a node without a report as well");
        let all = knows(knows(after.clone(), "n1", new), "cut-off", new);
        assert_eq!(holds(all), Some(60), "a block in quarantine has its time of release already");
        let raised = after.clone().range(RangeFact { quarantine_seconds: 3600, ..lowered(2) });
        assert_eq!(holds(raised), Some(3600), "a longer one holds at once");
        let gone = after.clone().with(|s| {
            std::sync::Arc::make_mut(&mut s.world.nodes).remove("cut-off");
        });
        let release = gone.plan().steps.into_iter().find_map(|step| match step {
            Step::ChangeBlock { change, .. } => change.release_after.flatten(),
            _ => None,
        });
        assert_eq!(release, Some(at(NOW + 900)), "its block rests for as long as it may lease");
    }

    fn choose(writes: Vec<Write>, plan: &Plan, nodes: usize, memory: &mut Memory, clock: Clock) -> Chosen {
        due(writes, plan, nodes, memory, clock).choose(memory, clock)
    }

    fn block_statuses(classes: &[Class]) -> Vec<Write> {
        let write = |(index, class): (usize, &Class)| Write {
            class: *class,
            wait: Duration::ZERO,
            step: Step::BlockStatus {
                object: version_of(&format!("b{index}"), &format!("u{index:03}")),
                node: "n".into(),
                old: Box::default(),
                new: Box::default(),
            },
        };
        classes.iter().enumerate().map(write).collect()
    }

    /// Seconds until it is written of each of `joining` nodes that come at once that its block is converged, in a
    /// cluster of `live` nodes that report it one after the other within `reports` seconds.
    fn seconds_to_converge(live: usize, joining: usize, reports: usize) -> usize {
        let mut scene = scene().range(RangeFact { block_prefix: Some(24), ..range("r", "10.0.0.0/8") });
        let cidr = |i: usize| format!("10.{}.{}.0/24", 1 + i / 250, i % 250);
        let nodes: Vec<String> = (0..live + joining).map(|i| format!("n{i:04}")).collect();
        for (i, name) in nodes.iter().enumerate() {
            let health = if i < live { Health::Ready } else { Health::NotReady };
            scene = scene.node(NodeFact { health, ..node(name) }).block(held_block(&cidr(i), "r", name));
        }
        let (mut scene, sum) = seen(scene);
        // What a node carries that reported within the burst, the operator never knew as a whole.
        let within = |name: &str, held: &[(&str, i64)]| reported(name, held, Digest::of([(name, 1)]));
        for (i, name) in nodes.iter().enumerate() {
            scene = scene.report(within(name, &[(&cidr(i), 0)]));
        }
        for second in 1..600 {
            let heard = live * second.min(reports) / reports;
            for (i, name) in nodes.iter().enumerate().take(heard) {
                scene = scene.report(reported(name, &[(&cidr(i), 0)], sum));
            }
            scene.clock.steady += Duration::from_secs(1);
            let mut memory = scene.memory.clone();
            let plan = Plan::default();
            let writes = writes(&scene.snapshot(), &plan).collect();
            let chosen = choose(writes, &plan, nodes.len(), &mut memory, scene.clock);
            scene.memory = memory;
            for step in chosen.steps {
                let Step::BlockStatus { object, new, .. } = step else { continue };
                let block = (*scene.world.blocks[&object.name]).clone();
                scene = scene.block(BlockFact { status: Some(Box::new((*new).into())), ..block });
            }
            let mut joined = scene.world.blocks.values().filter(|b| b.node.as_ref() >= nodes[live].as_str());
            if joined.all(|block| was_converged(block)) {
                return second;
            }
        }
        panic!("never");
    }

    #[test]
    fn nodes_that_join_at_once_wait_for_the_write_budget_and_the_live_nodes_reports_and_not_for_each_other() {
        assert_eq!(seconds_to_converge(0, 1, 1), 1, "the first node of a cluster");
        assert_eq!(seconds_to_converge(0, 200, 1), 4, "50 in a second");
        let beside = seconds_to_converge(100, 100, 3);
        assert!((4..=6).contains(&beside), "{beside}");
    }

    /// The figures of docs/ipam.md.
    #[test]
    #[ignore = "a measurement: takes a minute"]
    fn how_long_nodes_that_join_wait() {
        for (live, joining) in [(0, 500), (100, 1), (500, 500), (1000, 1), (2000, 100)] {
            let reports = (live + joining) / 40 + 1;
            println!("{live} live, {joining} join: {} s", seconds_to_converge(live, joining, reports));
        }
    }

    #[test]
    fn flips_go_before_counters_and_nobody_starves() {
        let (plan, mut memory) = (Plan::default(), Memory::new(false));
        let clock = |seconds| Clock { wall: at(NOW), steady: Duration::from_secs(seconds) };
        let names =
            |chosen: &Chosen| chosen.steps.iter().map(|s| s.target().1.to_string()).collect::<Vec<_>>();
        let classes: Vec<_> = (0..60).map(|i| if i >= 20 { Class::Flip } else { Class::Counters }).collect();
        let first = choose(block_statuses(&classes), &plan, 99, &mut memory, clock(0));
        assert_eq!((first.steps.len(), first.backlog, first.wake_after), (50, 10, Some(BACKLOG_WAIT)));
        assert!((20..60).all(|i| names(&first).contains(&format!("b{i}"))), "all flips are in");
        // The same ones want to be written again: those that were left go first.
        let second = choose(block_statuses(&[Class::Flip; 60]), &plan, 99, &mut memory, clock(1));
        assert!((10..20).all(|i| names(&second).contains(&format!("b{i}"))), "{:?}", names(&second));
    }

    #[test]
    fn counters_of_one_block_are_written_every_ten_seconds_at_most() {
        let (plan, mut memory) = (Plan::default(), Memory::new(false));
        for (second, class, written) in [
            (0, Class::Flip, 1),
            (1, Class::Counters, 0),
            (2, Class::Flip, 1),
            (11, Class::Counters, 0),
            (12, Class::Counters, 1),
        ] {
            let clock = Clock { wall: at(NOW), steady: Duration::from_secs(second) };
            assert_eq!(
                choose(block_statuses(&[class]), &plan, 99, &mut memory, clock).steps.len(),
                written,
                "{second}"
            );
        }
    }

    #[test]
    fn counters_of_many_nodes_are_written_rarely_for_they_wake_every_agent() {
        for (nodes, per_second) in [(0, 50.0), (1000, 50.0), (5000, 10.0), (65_536, 0.762_939_453_125)] {
            assert_eq!(counters_per_second(nodes), per_second, "{nodes} nodes");
        }
        let (plan, mut memory) = (Plan::default(), Memory::new(false));
        let clock = |seconds| Clock { wall: at(NOW), steady: Duration::from_secs(seconds) };
        let classes: Vec<_> = (0..60).map(|i| if i >= 20 { Class::Counters } else { Class::Flip }).collect();
        let chosen = choose(block_statuses(&classes), &plan, 5000, &mut memory, clock(1));
        assert_eq!((chosen.steps.len(), chosen.backlog), (30, 30), "20 flips and 10 counters");
    }

    fn a_group(index: usize) -> TopologyGroup {
        TopologyGroup {
            value: Some(format!("europe-west-{index}")),
            blocks: 1000,
            outside: 100,
            prefix_count: 12,
            prefixes: vec!["10.100.112.0/20".to_owned(); MAX_PREFIXES],
        }
    }

    #[test]
    fn counters_of_ranges_are_paid_from_the_same_budget_and_rarer_the_more_agents_they_wake() {
        let every = |nodes, groups: &[usize]| range_counters_every(nodes, groups.iter().copied()).as_secs();
        for (nodes, groups, seconds) in [
            (0, &[][..], 2),
            (5000, &[0, 0], 2),
            (5000, &[64, 64], 2),
            (15_000, &[64, 64], 7),
            (65_000, &[0, 0], 5),
            (65_000, &[64, 64], 32),
            (1_000_000, &[64; 100], 60),
        ] {
            assert_eq!(every(nodes, groups), seconds, "{nodes} nodes, groups {groups:?}");
        }
        let range = |class| {
            let new = ClusterCIDRStatus { groups: (0..60).map(a_group).collect(), ..Default::default() };
            let object = version_of("r", "range");
            let step = Step::RangeStatus { object, old: Box::default(), new: Box::new(new) };
            Write { class, wait: Duration::ZERO, step }
        };
        let (plan, clock) = (Plan::default(), Clock { wall: at(NOW), steady: Duration::from_secs(1) });
        for (class, counters) in [(Class::Counters, 4), (Class::Flip, 10)] {
            let mut memory = Memory::new(false);
            let writes = [range(class)].into_iter().chain(block_statuses(&[Class::Counters; 40])).collect();
            let chosen = choose(writes, &plan, 5000, &mut memory, clock);
            assert_eq!(chosen.steps.len(), 1 + counters, "{class:?}: 60 groups weigh as much as 6 blocks");
            memory.status_written.clear();
            let again = choose(vec![range(class)], &plan, 5000, &mut memory, clock);
            assert_eq!(again.steps.len(), usize::from(class == Class::Flip), "{class:?}: nothing is left");
        }
    }

    /// The unit is a PodCIDR with its status, of 2,223 bytes in the watch (docs/scale.md).
    #[test]
    fn groups_weigh_as_much_as_is_reckoned() {
        let bytes = serde_json::to_string(&a_group(0)).unwrap().len() as f64;
        let reckoned = 2223.0 / GROUPS_PER_EVENT;
        assert!((0.5..=1.0).contains(&(bytes / reckoned)), "{bytes} bytes against {reckoned}");
    }

    #[test]
    fn words_about_spreading_alone_are_written_once_a_minute() {
        let (scene, sum) = seen(two_nodes());
        let (ready, behind) =
            (reported("n1", &[("10.244.1.0/24", 0)], sum), ReportFact { applied: None, ..report("n2", &[]) });
        let scene = scene.report(ready).report(behind);
        let status = status_of(&scene, "10-244-1-0-24");
        let written = BlockFact {
            status: Some(Box::new(status.into())),
            ..held_block("10.244.1.0/24", "default-v4", "n1")
        };
        let scene = scene.block(written);
        let class = |scene: &Scene| {
            let of_block = |write: &Write| &*write.step.target().1 == "10-244-1-0-24";
            writes(&scene.snapshot(), &scene.plan()).find(of_block).map(|write| write.class)
        };
        assert_eq!(class(&scene), None);
        let more = scene.clone().node(node("n3")).report(ReportFact { applied: None, ..report("n3", &[]) });
        assert_eq!(class(&more), Some(Class::Progress));
        let used = more.report(reported("n1", &[("10.244.1.0/24", 9)], sum));
        assert_eq!(class(&used), Some(Class::Counters));
    }

    #[test]
    fn the_first_status_of_a_new_block_waits_a_little_for_its_node() {
        let (scene, sum) = seen(two_nodes());
        let wait = |scene: &Scene| {
            let of_block = |write: &Write| &*write.step.target().1 == "10-244-1-0-24";
            writes(&scene.snapshot(), &scene.plan()).find(of_block).unwrap().wait
        };
        let created = |second: i64| BlockFact {
            created: at(second),
            ..held_block("10.244.1.0/24", "default-v4", "n1")
        };
        let new = scene.clone().block(created(NOW - 5));
        assert_eq!(wait(&new), Duration::from_secs(10));
        assert_eq!(wait(&scene.clone().block(created(NOW - 15))), Duration::ZERO);
        assert_eq!(wait(&scene.block(created(NOW + 999))), FIRST_STATUS_AFTER, "by a clock that is wrong");
        assert_eq!(wait(&new.report(reported("n1", &[("10.244.1.0/24", 0)], sum))), Duration::ZERO);
    }

    #[test]
    fn a_status_waits_for_another_write_to_the_same_object() {
        let object = version_of("b0", "u000");
        let step = Step::DeleteBlock { object, node: "n".into(), living: None, unproven: None };
        let plan = Plan { steps: vec![step], ..Plan::default() };
        let clock = Clock { wall: at(NOW), steady: Duration::ZERO };
        assert_eq!(
            choose(block_statuses(&[Class::Flip; 2]), &plan, 99, &mut Memory::new(false), clock).steps.len(),
            1
        );
    }
}
