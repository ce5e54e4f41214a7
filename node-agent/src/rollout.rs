//! Which version of each RoutingPolicy this node follows, and when it goes back by itself. Pure, but for the file.
//!
//! The operator says which version a node may follow ([`PolicyFact::followed`]). A node that begins to follow a new
//! generation **tries** it: for `observeSeconds` it compares its probes with those of before, and it must reach the API
//! server at least once. If not, it goes back to what it followed before, without asking anybody, and stays there until
//! there is another generation: a change that cuts a node off cannot be taken back from outside.
//! What is tried and what was refused is kept in `/run/plat/rollout.json`, so that a restart confirms nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use plat_crds::block::Block;
use plat_crds::node_network::{MAX_POLICIES, PolicyReport, PolicyState};
use plat_crds::routing_policy::{DEFAULT_OBSERVE_SECONDS, Phase, PolicyMode};
use plat_crds::selector::{Labels, Selector};
use plat_crds::{RoutingPolicySpec, names};
use serde::{Deserialize, Serialize};

use crate::facts::{BlockFact, Fault, Kind, PolicyFact};
use crate::folder::Folder;
use crate::policies::{self, InForce};

/// A probe round that began after a change is the first that tells of it, and ends as the second from then on.
const ROUNDS: u64 = 2;
/// Blocks that are named in a message.
const NAMED: usize = 3;

/// A version of a policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Version {
    generation: i64,
    spec: RoutingPolicySpec,
}

/// What the probes said when a trial began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Baseline {
    /// Rounds count from the start of the agent: after a restart they begin anew.
    #[serde(skip)]
    rounds: u64,
    failing: BTreeSet<Block>,
}

/// A version that is followed and not confirmed yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Trial {
    before: Option<Version>,
    since: Duration,
    until: Duration,
    /// `None` if nothing was known.
    baseline: Option<Baseline>,
}

/// A version that this node went back from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Refused {
    version: Version,
    why: String,
}

/// One policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Course {
    uid: String,
    follows: Option<Version>,
    trial: Option<Trial>,
    refused: Option<Refused>,
    /// Whether `follows` is what this node has followed, rather than what it does not know yet.
    known: bool,
}

/// What tells whether a change was good. Times are of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug)]
pub struct Signs<'a> {
    /// Now.
    pub now: Duration,
    /// Whether the node can prove that it reaches the API server, and when it last did.
    pub contact: Contact,
    /// What the probes say; `None` without probes.
    pub probes: Option<Probes<'a>>,
}

/// The last contact with the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contact {
    /// Nobody asks for it, as the node holds no block.
    NotKept,
    /// Never since the agent started.
    Never,
    /// Then.
    At(Duration),
}

/// What the probes say.
#[derive(Clone, Copy, Debug)]
pub struct Probes<'a> {
    /// Whole rounds since the agent started.
    pub rounds: u64,
    /// Blocks that pods cannot use as they should.
    pub failing: &'a BTreeSet<Block>,
}

/// The policies of the cluster, as this node follows them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollouts {
    courses: BTreeMap<String, Course>,
    unsaved: bool,
}

#[derive(Serialize, Deserialize)]
struct File {
    boot: String,
    courses: BTreeMap<String, Course>,
}

impl Rollouts {
    /// What an earlier agent of this boot left.
    pub fn load(run: &Folder, boot: &str) -> Rollouts {
        let text = run.get(names::ROLLOUT_FILE).ok().flatten().unwrap_or_default();
        let file: Option<File> = serde_json::from_slice(&text).ok();
        let courses = file.filter(|file| file.boot == boot).map(|file| file.courses).unwrap_or_default();
        Rollouts { courses, unsaved: false }
    }

    /// Saves it, if there is something new: before it takes effect, or a crash would confirm it.
    pub fn save(&mut self, run: &Folder, boot: &str) {
        if !self.unsaved {
            return;
        }
        let file = File { boot: boot.to_owned(), courses: self.courses.clone() };
        match run.put(names::ROLLOUT_FILE, &serde_json::to_vec(&file).unwrap_or_default(), 0o600) {
            Ok(_) => self.unsaved = false,
            Err(error) => tracing::warn!(%error, "what is tried of routing policies was not saved"),
        }
    }

    /// Decides what a node with these labels follows, and answers why it went back from what, by policy.
    pub fn follow(
        &mut self,
        policies: &BTreeMap<String, PolicyFact>,
        own: &Labels,
        blocks: &BTreeMap<String, BlockFact>,
        signs: &Signs<'_>,
    ) -> Vec<(String, String)> {
        let before = self.courses.clone();
        self.courses.retain(|name, course| policies.get(name).is_some_and(|fact| fact.uid == course.uid));
        let mut back = Vec::new();
        for (name, fact) in policies {
            let course = self.courses.entry(name.clone()).or_default();
            course.uid.clone_from(&fact.uid);
            if let Some(why) = course.step(fact, own, blocks, signs) {
                back.push((name.clone(), why));
            }
        }
        self.unsaved |= self.courses != before;
        back
    }

    /// The policies that this node follows, in the order in which they decide.
    pub fn in_force(&self, own: &Labels) -> Vec<InForce> {
        let followed = self.courses.iter().filter_map(|(name, course)| {
            let version = course.follows.as_ref()?;
            Some((name.as_str(), version.generation, &version.spec))
        });
        policies::in_order(followed, own)
    }

    /// The same if the planned ones were followed; `None` if none is for a node with these labels.
    pub fn planned(&self, policies: &BTreeMap<String, PolicyFact>, own: &Labels) -> Option<Vec<InForce>> {
        let is_planned = |fact: &PolicyFact| fact.spec.mode == PolicyMode::Plan;
        // One that would select this node no more changes something, too.
        let concerns = |fact: &PolicyFact| {
            selects(&fact.spec, own)
                || self.courses.get(&fact.name).is_some_and(|course| course.follows.is_some())
        };
        policies.values().any(|fact| is_planned(fact) && concerns(fact)).then(|| {
            let versions = policies.values().filter_map(|fact| {
                if is_planned(fact) {
                    return Some((fact.name.as_str(), fact.generation, &fact.spec));
                }
                let version = self.courses.get(&fact.name)?.follows.as_ref()?;
                Some((fact.name.as_str(), version.generation, &version.spec))
            });
            policies::in_order(versions, own)
        })
    }

    /// When something is decided without any news.
    pub fn next(&self) -> Option<Duration> {
        self.trials().map(|trial| trial.until).min()
    }

    /// Whether a sign of the API server is wanted, as something was changed since the last.
    pub fn wants_contact(&self, contact: Contact) -> bool {
        contact != Contact::NotKept && self.trials().any(|trial| !is_reached(trial, contact))
    }

    fn trials(&self) -> impl Iterator<Item = &Trial> {
        self.courses.values().filter_map(|course| course.trial.as_ref())
    }

    /// What this node says of each policy that is for it.
    pub fn reports(
        &self,
        policies: &BTreeMap<String, PolicyFact>,
        own: &Labels,
        blocks: &BTreeMap<String, BlockFact>,
        faults: &[Fault],
    ) -> Vec<PolicyReport> {
        let failing: BTreeMap<&str, &Fault> = faults
            .iter()
            .filter(|fault| fault.kind == Kind::PodCIDR && fault.reason.fails())
            .map(|fault| (fault.name.as_str(), fault))
            .collect();
        let report = |fact: &PolicyFact| {
            let course = self.courses.get(&fact.name)?;
            let (generation, spec, state, why) = course.says(fact, own)?;
            let destinations = Selector::read(spec.destinations.as_ref()).ok()?;
            let about = blocks.values().filter(|block| destinations.matches(&block.labels));
            let is_about = |name: &str| blocks.get(name).is_some_and(|b| destinations.matches(&b.labels));
            let failed = failing.iter().find(|(name, _)| is_about(name)).map(|(_, fault)| fault);
            let (state, why) = match (state, failed) {
                (PolicyState::Applied | PolicyState::Trying, Some(fault)) => {
                    (PolicyState::Failed, Some(fault.message.as_str()))
                }
                _ => (state, why),
            };
            Some(PolicyReport {
                name: fact.name.clone(),
                uid: fact.uid.clone(),
                generation,
                state,
                blocks: i64::try_from(about.count()).unwrap_or(i64::MAX),
                message: why.map(|why| why.chars().take(512).collect()),
            })
        };
        policies.values().filter_map(report).take(MAX_POLICIES).collect()
    }
}

impl Course {
    /// Answers why it goes back, if it does.
    fn step(
        &mut self,
        fact: &PolicyFact,
        own: &Labels,
        blocks: &BTreeMap<String, BlockFact>,
        signs: &Signs<'_>,
    ) -> Option<String> {
        let is_newest =
            |version: &Version| version.generation == fact.generation && version.spec == fact.spec;
        self.refused = self.refused.take().filter(|refused| is_newest(&refused.version));
        let may = fact.followed(own).filter(|(_, spec)| selects(spec, own));
        let wanted = may.map(|(generation, spec)| Version { generation, spec: spec.clone() });
        if self.refused.is_some() && wanted.as_ref().is_some_and(is_newest) {
            return None;
        }
        if wanted == self.follows && self.known {
            return self.judge(blocks, signs);
        }
        let followed = self.follows.take();
        let unconfirmed = self.trial.take();
        let tries =
            wanted.as_ref().is_some_and(is_newest) && (self.known || fact.phase != Some(Phase::Complete));
        if tries {
            let good = fact.last_good.as_ref().filter(|good| selects(&good.spec, own));
            let good = || good.map(|good| Version { generation: good.generation, spec: good.spec.clone() });
            // What another change ends was not confirmed: this one is measured by what was before both.
            let (before, baseline) = match unconfirmed {
                Some(trial) => (trial.before, trial.baseline),
                None => (if self.known { followed } else { good() }, baseline(signs)),
            };
            let until = signs.now + observe_time(&fact.spec);
            self.trial = Some(Trial { before, since: signs.now, until, baseline });
        }
        (self.follows, self.known) = (wanted, true);
        None
    }

    fn judge(&mut self, blocks: &BTreeMap<String, BlockFact>, signs: &Signs<'_>) -> Option<String> {
        let trial = self.trial.as_ref()?;
        let why = self.worse(trial, blocks, signs).or_else(|| {
            let cut_off = signs.now >= trial.until
                && signs.contact != Contact::NotKept
                && !is_reached(trial, signs.contact);
            cut_off.then(|| "the API server was not reached since then".to_owned())
        });
        if why.is_none() && signs.now < trial.until {
            return None;
        }
        let trial = self.trial.take()?;
        let why = why?;
        let version = std::mem::replace(&mut self.follows, trial.before)?;
        self.refused = Some(Refused { version, why: why.clone() });
        Some(why)
    }

    /// The blocks that fail and did not before, of those that the policy is about, in words.
    fn worse(
        &self,
        trial: &Trial,
        blocks: &BTreeMap<String, BlockFact>,
        signs: &Signs<'_>,
    ) -> Option<String> {
        let (probes, baseline) = (signs.probes?, trial.baseline.as_ref()?);
        if probes.rounds < baseline.rounds + ROUNDS {
            return None;
        }
        let versions = [self.follows.as_ref(), trial.before.as_ref()].into_iter().flatten();
        let about: Vec<Selector> =
            versions.filter_map(|version| Selector::read(version.spec.destinations.as_ref()).ok()).collect();
        let concerns = |block: &&Block| {
            let fact = blocks.get(&block.object_name());
            fact.is_some_and(|fact| about.iter().any(|about| about.matches(&fact.labels)))
        };
        let worse: Vec<&Block> = probes.failing.difference(&baseline.failing).filter(concerns).collect();
        let named: Vec<String> = worse.iter().take(NAMED).map(ToString::to_string).collect();
        let more =
            if worse.len() > NAMED { format!(" and {} more", worse.len() - NAMED) } else { String::new() };
        (!worse.is_empty()).then(|| format!("probes of {}{more} fail and did not before", named.join(", ")))
    }

    /// Generation, spec and state that the node speaks of; `None` if the policy is not for it.
    fn says<'a>(
        &'a self,
        fact: &'a PolicyFact,
        own: &Labels,
    ) -> Option<(i64, &'a RoutingPolicySpec, PolicyState, Option<&'a str>)> {
        if let Some(refused) = &self.refused {
            return Some((fact.generation, &fact.spec, PolicyState::RolledBack, Some(&refused.why)));
        }
        if fact.spec.mode != PolicyMode::Apply {
            return selects(&fact.spec, own).then_some((
                fact.generation,
                &fact.spec,
                PolicyState::Planned,
                None,
            ));
        }
        let version = self.follows.as_ref()?;
        let state = if self.trial.is_some() { PolicyState::Trying } else { PolicyState::Applied };
        Some((version.generation, &version.spec, state, None))
    }
}

fn selects(spec: &RoutingPolicySpec, own: &Labels) -> bool {
    Selector::read(spec.sources.as_ref()).is_ok_and(|sources| sources.matches(own))
}

fn baseline(signs: &Signs<'_>) -> Option<Baseline> {
    let probes = signs.probes.filter(|probes| probes.rounds > 0)?;
    Some(Baseline { rounds: probes.rounds, failing: probes.failing.clone() })
}

fn is_reached(trial: &Trial, contact: Contact) -> bool {
    matches!(contact, Contact::At(at) if at >= trial.since)
}

fn observe_time(spec: &RoutingPolicySpec) -> Duration {
    let seconds = spec.rollout.as_ref().map_or(DEFAULT_OBSERVE_SECONDS, |rollout| rollout.observe_seconds);
    Duration::from_secs(u64::from(seconds.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Reason;
    use crate::fixtures::{block, policy};
    use plat_crds::routing_policy::LastGood;
    use proptest::prelude::*;

    /// A node that follows generation 1 of policy `p`, and what happens to it.
    struct Scene {
        rollouts: Rollouts,
        policies: BTreeMap<String, PolicyFact>,
        blocks: BTreeMap<String, BlockFact>,
        failing: BTreeSet<Block>,
        rounds: u64,
        contact: Contact,
        second: u64,
    }

    fn spec(json: &str) -> RoutingPolicySpec {
        serde_json::from_str(json).unwrap()
    }

    impl Scene {
        fn new() -> Scene {
            let fact = PolicyFact { spec: spec(r#"{"routing":{"metric":1}}"#), ..policy("p") };
            let good = LastGood { generation: 1, spec: fact.spec.clone() };
            let mut scene = Scene {
                rollouts: Rollouts::default(),
                policies: [("p".to_owned(), PolicyFact { last_good: Some(good), ..fact })].into(),
                blocks: [1, 2, 3].map(|n| (block(n).name, block(n))).into(),
                failing: BTreeSet::new(),
                rounds: 5,
                contact: Contact::At(Duration::ZERO),
                second: 0,
            };
            scene.at(1000);
            scene
        }

        /// The time comes, and everything is looked at; answers the metric that is followed, and what is reported.
        fn at(&mut self, second: u64) -> (Option<i32>, String) {
            self.second = second;
            let signs = Signs {
                now: Duration::from_secs(second),
                contact: self.contact,
                probes: Some(Probes { rounds: self.rounds, failing: &self.failing }),
            };
            let own = Labels::default();
            self.rollouts.follow(&self.policies, &own, &self.blocks, &signs);
            let said = self.rollouts.reports(&self.policies, &own, &self.blocks, &[]);
            let said = said.iter().map(|said| format!("{} {:?}", said.generation, said.state));
            let followed = self.rollouts.in_force(&own);
            (followed.first().and_then(|policy| policy.routing.metric), said.collect::<Vec<_>>().join(", "))
        }

        /// The spec changes, and the operator lets this node follow it.
        fn change(&mut self, generation: i64, phase: Phase, metric: i32) {
            let fact = self.policies.get_mut("p").unwrap();
            fact.spec.routing.metric = Some(metric);
            (fact.generation, fact.observed, fact.phase) = (generation, Some(generation), Some(phase));
        }

        /// Two probe rounds later.
        fn fail(&mut self, n: u8) {
            self.failing.insert(block(n).block);
            self.rounds += 2;
        }

        fn restart(&mut self) {
            let courses = serde_json::to_vec(&self.rollouts.courses).unwrap();
            self.rollouts = Rollouts { courses: serde_json::from_slice(&courses).unwrap(), unsaved: false };
            self.rounds = 0;
        }
    }

    fn state(metric: i32, said: &str) -> (Option<i32>, String) {
        (Some(metric), said.to_owned())
    }

    #[test]
    fn a_change_is_tried_and_kept_if_nothing_gets_worse() {
        let mut scene = Scene::new();
        assert_eq!(scene.at(1001), state(1, "1 Applied"), "what all follow is not tried again");
        scene.failing.insert(block(2).block);
        scene.change(2, Phase::Rolling, 2);
        assert_eq!(scene.at(1010), state(2, "2 Trying"));
        assert_eq!(scene.rollouts.next(), Some(Duration::from_secs(1070)));
        assert!(scene.rollouts.wants_contact(scene.contact));
        scene.contact = Contact::At(Duration::from_secs(1010));
        assert!(!scene.rollouts.wants_contact(scene.contact));
        scene.rounds += 2;
        assert_eq!(scene.at(1069), state(2, "2 Trying"), "block 2 failed before");
        assert_eq!(scene.at(1070), state(2, "2 Applied"));
        scene.fail(3);
        assert_eq!(scene.at(1071), state(2, "2 Applied"), "later faults are not its doing");
    }

    #[test]
    fn probes_that_get_worse_take_it_back_at_once_until_the_spec_changes() {
        let mut scene = Scene::new();
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.failing.insert(block(3).block);
        scene.rounds += 1;
        assert_eq!(scene.at(1011), state(2, "2 Trying"), "that round began before");
        scene.rounds += 1;
        assert_eq!(scene.at(1012), state(1, "2 RolledBack"));
        let said = scene.rollouts.reports(&scene.policies, &Labels::default(), &scene.blocks, &[]);
        assert_eq!(said[0].message.as_deref(), Some("probes of 10.244.3.0/24 fail and did not before"));
        scene.failing.clear();
        scene.restart();
        assert_eq!(scene.at(1100), state(1, "2 RolledBack"));
        scene.change(2, Phase::Complete, 2);
        assert_eq!(scene.at(1101), state(1, "2 RolledBack"), "also if all others keep it");
        scene.change(2, Phase::RolledBack, 2);
        assert_eq!(scene.at(1102), state(1, "2 RolledBack"));
        scene.change(3, Phase::Rolling, 2);
        assert_eq!(scene.at(1103), state(2, "3 Trying"));
    }

    #[test]
    fn a_node_that_is_cut_off_goes_back_when_its_time_is_over_also_after_a_restart() {
        let mut scene = Scene::new();
        scene.change(2, Phase::Rolling, 2);
        assert_eq!(scene.at(1010), state(2, "2 Trying"));
        scene.restart();
        scene.contact = Contact::Never;
        assert_eq!(scene.at(1069), state(2, "2 Trying"));
        assert_eq!(scene.at(1070), state(1, "2 RolledBack"));

        let mut scene = Scene::new();
        scene.contact = Contact::NotKept;
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        assert_eq!(scene.at(1070), state(2, "2 Applied"), "without a block nobody asks");
    }

    #[test]
    fn a_change_of_a_change_is_measured_by_what_was_before_both() {
        let mut scene = Scene::new();
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.failing.insert(block(2).block);
        scene.change(3, Phase::Rolling, 3);
        assert_eq!(scene.at(1011), state(3, "3 Trying"));
        scene.rounds += 2;
        assert_eq!(scene.at(1020), state(1, "3 RolledBack"));
    }

    #[test]
    fn blocks_that_the_policy_is_not_about_do_not_count_nor_does_what_nobody_knew() {
        let mut scene = Scene::new();
        let far = Labels::pack(Some(&[("zone".to_owned(), "b".to_owned())].into()));
        for fact in scene.blocks.values_mut().filter(|fact| fact.block == block(3).block) {
            fact.labels = far.clone();
        }
        let narrow = r#"{"destinations":{"matchLabels":{"zone":"b"}}}"#;
        let fact = scene.policies.get_mut("p").unwrap();
        fact.spec = spec(narrow);
        fact.last_good = Some(LastGood { generation: 1, spec: spec(narrow) });
        scene.rollouts = Rollouts::default();
        scene.at(1001);
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.fail(2);
        assert_eq!(scene.at(1020), state(2, "2 Trying"));
        scene.fail(3);
        assert_eq!(scene.at(1021).1, "2 RolledBack");

        let mut blind = Scene::new();
        blind.rounds = 0;
        blind.change(2, Phase::Rolling, 2);
        blind.at(1010);
        blind.fail(2);
        assert_eq!(blind.at(1020), state(2, "2 Trying"), "it may have failed before");
    }

    #[test]
    fn the_operators_word_ends_a_trial_and_a_plan_is_only_planned() {
        let mut scene = Scene::new();
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.change(2, Phase::RolledBack, 2);
        assert_eq!(scene.at(1011), state(1, "1 Applied"));
        assert_eq!(scene.rollouts.next(), None);
        scene.change(3, Phase::Planned, 7);
        scene.policies.get_mut("p").unwrap().spec.mode = PolicyMode::Plan;
        assert_eq!(scene.at(1012), state(1, "3 Planned"));
        let planned = scene.rollouts.planned(&scene.policies, &Labels::default()).unwrap();
        assert_eq!(planned[0].routing.metric, Some(7));
    }

    #[test]
    fn a_block_that_cannot_be_followed_is_named_and_another_policy_of_the_name_begins_anew() {
        let mut scene = Scene::new();
        let fault = Fault::block(block(2).name, Reason::NotOnLink, "not on a link");
        let said = scene.rollouts.reports(&scene.policies, &Labels::default(), &scene.blocks, &[fault]);
        assert_eq!((said[0].state, said[0].message.as_deref()), (PolicyState::Failed, Some("not on a link")));
        assert_eq!(said[0].blocks, 3);
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.fail(2);
        assert_eq!(scene.at(1011), state(1, "2 RolledBack"));
        scene.policies.get_mut("p").unwrap().uid = "another".to_owned();
        assert_eq!(scene.at(1012), state(2, "2 Trying"));
        scene.policies.clear();
        assert_eq!(scene.at(1013), (None, String::new()));
        assert_eq!(scene.rollouts.courses.len(), 0);
    }

    #[test]
    fn what_is_tried_survives_a_restart_but_not_a_reboot() {
        let root = tempfile::tempdir().unwrap();
        let run = Folder::new(root.path());
        let mut scene = Scene::new();
        scene.rounds = 0;
        scene.change(2, Phase::Rolling, 2);
        scene.at(1010);
        scene.rollouts.save(&run, "boot");
        assert_eq!(Rollouts::load(&run, "boot"), scene.rollouts);
        assert_eq!(Rollouts::load(&run, "another"), Rollouts::default());
        std::fs::write(root.path().join(names::ROLLOUT_FILE), "{").unwrap();
        assert_eq!(Rollouts::load(&run, "boot"), Rollouts::default());
    }

    proptest! {
        /// Whatever happens in whatever order: a version that was not confirmed is never what a node goes back to,
        /// and one that it went back from is never followed again.
        #[test]
        fn nothing_unconfirmed_is_gone_back_to_and_nothing_refused_comes_again(
            moves in proptest::collection::vec((0..6u8, 1..40u64), 1..40),
        ) {
            let mut scene = Scene::new();
            let (mut generation, mut second) = (1, 1001);
            let (mut confirmed, mut refused) = (BTreeSet::from([1]), BTreeSet::new());
            for (kind, wait) in moves {
                second += wait;
                match kind {
                    0 => {
                        generation += 1;
                        scene.change(generation, Phase::Rolling, i32::try_from(generation).unwrap());
                        scene.failing.clear();
                    }
                    1 => scene.fail(2),
                    2 => scene.contact = Contact::At(Duration::from_secs(second)),
                    3 => scene.restart(),
                    4 => scene.rounds += 1,
                    _ => {}
                }
                let (metric, said) = scene.at(second);
                let metric = i64::from(metric.unwrap());
                prop_assert!(!refused.contains(&metric), "{metric} of {refused:?}");
                if said.ends_with("RolledBack") {
                    prop_assert!(confirmed.contains(&metric), "{metric} of {confirmed:?}");
                    refused.insert(generation);
                } else if said.ends_with("Applied") {
                    confirmed.insert(metric);
                } else {
                    prop_assert_eq!(said, format!("{generation} Trying"));
                }
            }
        }
    }
}
