//! What to do so that the kernel is as desired: a list of steps, computed over the union of what should
//! be and what is, so that whatever an earlier life left behind is met too.
//!
//! The order is part of the decision: the nftables table first (each millisecond without it resets live
//! masqueraded connections), then what leads to pods, and removals last, so that no packet meets a gap.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use plat_cni::mac::Mac;
use plat_crds::block::{Block, Family};

use crate::fabric::{
    Admit, Bridge, Desired, ForwardChain, Observed, ObservedBridge, Packets, Route, RouteKey, Rule, Sysctl,
    TableState, Target, Told, host_prefix,
};
use crate::vxlan::{self, Entries};

/// One change to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Replace the table `inet plat` by the desired one, in one transaction.
    ReplaceTable,
    /// Add a route whose key no route of ours has; a foreign one there is an error.
    AddRoute(Route),
    /// Replace our route of that key.
    ReplaceRoute(Route),
    /// Add a rule that leads to a table.
    AddRule(Rule),
    /// Write a sysctl.
    WriteSysctl(Sysctl),
    /// Make the bridge, or bring it and its gateways in order.
    EnsureBridge(Bridge),
    /// Make `lo` carry the gateways of these blocks and no other ones of ours.
    EnsureGateways(BTreeSet<Block>),
    /// Make the VXLAN device, or bring it in order.
    EnsureTunnel(vxlan::Device),
    /// Set entries of a VXLAN device's tables.
    SetEntries {
        /// Family of its underlay.
        underlay: Family,
        /// What to set.
        entries: Entries,
    },
    /// Remove entries of a VXLAN device's tables.
    RemoveEntries {
        /// Family of its underlay.
        underlay: Family,
        /// What to remove.
        entries: Entries,
        /// Hardware addresses whose entries of others go too.
        strange: BTreeSet<Mac>,
    },
    /// Remove the VXLAN device over that family.
    RemoveTunnel(Family),
    /// Append an accept rule to the family's FORWARD chain.
    Admit(Admit),
    /// Remove an accept rule of ours from the family's FORWARD chain.
    RemoveAdmit {
        /// Family of the chain.
        family: Family,
        /// Handle of the rule.
        handle: u64,
    },
    /// Remove our route of that key.
    DeleteRoute(RouteKey),
    /// Remove a rule of ours.
    DeleteRule(Rule),
}

/// The steps from `observed` to `desired`; empty when nothing differs.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    if observed.table != TableState::Intact {
        steps.push(Step::ReplaceTable);
    }
    steps.extend(vxlan::prepare(desired, observed));
    // Own blocks' routes need the bridge, the others do not wait for it.
    let (own, foreign): (Vec<_>, Vec<_>) =
        wanted_routes(desired, observed).partition(|step| target(step) == Some(&Target::Bridge));
    steps.extend(foreign);
    // The kernel takes a narrower rule for the same one and adds none beside it.
    let (narrower, unneeded): (Vec<_>, Vec<_>) =
        unwanted_rules(desired, observed).partition(|rule| rule.packets == Packets::Other);
    steps.extend(narrower.into_iter().map(Step::DeleteRule));
    steps.extend(desired.rules.difference(&observed.rules).copied().map(Step::AddRule));
    steps.extend(sysctls(desired, observed));
    steps.extend(bridge(desired, observed));
    steps.extend(gateways(desired, observed));
    steps.extend(own);
    steps.extend(admissions(desired, observed));
    steps.extend(unwanted_routes(desired, observed));
    steps.extend(unneeded.into_iter().map(Step::DeleteRule));
    steps.extend(vxlan::clear(desired, observed));
    steps
}

/// The steps that undo what was told to have become of routes which stood. What leads to a device of ours is
/// left to [`diff`]: it needs the device first, and the CNI binary makes those to the bridge too.
pub fn undo(standing: &BTreeMap<RouteKey, Route>, told: &BTreeMap<RouteKey, Told>) -> Vec<Step> {
    let steps = told.iter().filter_map(|(key, told)| {
        let ours = standing.get(key).filter(|route| !route.target.needs_device())?;
        match told {
            Told::Gone => Some(Step::AddRoute(ours.clone())),
            Told::Set(there) if there != ours => Some(Step::ReplaceRoute(ours.clone())),
            Told::Set(_) => None,
        }
    });
    steps.collect()
}

/// Whether nothing is left to look at once what was told is undone: each of these routes stood.
pub fn is_undone_by(standing: &BTreeMap<RouteKey, Route>, told: &BTreeMap<RouteKey, Told>) -> bool {
    told.keys().all(|key| standing.get(key).is_some_and(|route| !route.target.needs_device()))
}

fn target(step: &Step) -> Option<&Target> {
    match step {
        Step::AddRoute(route) | Step::ReplaceRoute(route) => Some(&route.target),
        _ => None,
    }
}

fn wanted_routes<'a>(desired: &'a Desired, observed: &'a Observed) -> impl Iterator<Item = Step> + 'a {
    let there = |key| observed.routes.get(key).filter(|route| vxlan::survives(route, desired, observed));
    desired.routes.values().filter_map(move |route| match there(&route.key) {
        None => Some(Step::AddRoute(route.clone())),
        Some(there) if there != route => Some(Step::ReplaceRoute(route.clone())),
        Some(_) => None,
    })
}

fn unwanted_routes<'a>(desired: &'a Desired, observed: &'a Observed) -> impl Iterator<Item = Step> + 'a {
    let unwanted = |key: &RouteKey| !desired.routes.contains_key(key) && !desired.keep.contains(&key.prefix);
    observed.routes.keys().filter(move |key| unwanted(key)).map(|key| Step::DeleteRoute(*key))
}

/// Not those that lead to routes that stay.
fn unwanted_rules<'a>(desired: &'a Desired, observed: &'a Observed) -> impl Iterator<Item = Rule> + 'a {
    let stays = |rule: &Rule, key: &RouteKey| {
        (key.table, key.family()) == (rule.table, rule.family) && desired.keep.contains(&key.prefix)
    };
    let in_use = move |rule: &Rule| {
        *rule == Rule::to(rule.family, rule.table) && observed.routes.keys().any(|key| stays(rule, key))
    };
    observed.rules.difference(&desired.rules).copied().filter(move |rule| !in_use(rule))
}

fn sysctls<'a>(desired: &'a Desired, observed: &'a Observed) -> impl Iterator<Item = Step> + 'a {
    let differs = |sysctl: &&Sysctl| observed.sysctls.get(&sysctl.path) != Some(&sysctl.value);
    desired.sysctls.iter().filter(differs).cloned().map(Step::WriteSysctl)
}

fn bridge(desired: &Desired, observed: &Observed) -> Option<Step> {
    match (&desired.bridge, &observed.bridge) {
        (Some(wanted), Some(there)) if fits(wanted, there) => None,
        (Some(wanted), _) => Some(Step::EnsureBridge(wanted.clone())),
        // No block any more: what the bridge still carries of ours would answer for its next holder.
        (None, Some(there)) if !there.ours.is_empty() => {
            Some(Step::EnsureBridge(Bridge { name: there.name.clone(), mtu: None, blocks: BTreeSet::new() }))
        }
        (None, _) => None,
    }
}

fn fits(wanted: &Bridge, there: &ObservedBridge) -> bool {
    let gateways: BTreeSet<IpNet> = wanted.blocks.iter().map(|block| host_prefix(block.gateway())).collect();
    there.up
        && wanted.mtu.is_none_or(|mtu| mtu == there.mtu)
        && gateways.is_subset(&there.addresses)
        && there.ours.is_subset(&gateways)
}

fn gateways(desired: &Desired, observed: &Observed) -> Option<Step> {
    let wanted: BTreeSet<IpNet> = desired.gateways.iter().map(|block| host_prefix(block.gateway())).collect();
    (wanted != observed.gateways).then(|| Step::EnsureGateways(desired.gateways.clone()))
}

fn admissions(desired: &Desired, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for (family, chain) in &observed.forward {
        let wanted: Vec<Admit> = if chain.needs_rules {
            desired.admit.iter().filter(|admit| admit.block.family() == *family).copied().collect()
        } else {
            Vec::new()
        };
        let missing = wanted.iter().filter(|admit| !chain.rules.iter().any(|rule| rule.admit == **admit));
        steps.extend(missing.map(|admit| Step::Admit(*admit)));
        steps.extend(surplus(chain, &wanted).map(|handle| Step::RemoveAdmit { family: *family, handle }));
    }
    steps
}

/// Rules of ours that admit nothing wanted, or what another one admits already.
fn surplus<'a>(chain: &'a ForwardChain, wanted: &'a [Admit]) -> impl Iterator<Item = u64> + 'a {
    chain.rules.iter().enumerate().filter_map(|(at, rule)| {
        let again = chain.rules.iter().take(at).any(|earlier| earlier.admit == rule.admit);
        (rule.ours && (again || !wanted.contains(&rule.admit))).then_some(rule.handle)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::{Admitted, Direction, Hop};
    use plat_crds::lease::Datapath;
    use proptest::prelude::*;

    fn route(prefix: &str, metric: u32, target: Target) -> Route {
        Route::new(RouteKey::main(prefix.parse().unwrap(), metric), target)
    }

    fn via(prefix: &str, gateway: &str) -> Route {
        route(prefix, 1120, Target::via([Hop::to(gateway.parse().unwrap(), 2)]))
    }

    fn routes(list: &[Route]) -> BTreeMap<RouteKey, Route> {
        list.iter().map(|r| (r.key, r.clone())).collect()
    }

    fn intact(routes: BTreeMap<RouteKey, Route>) -> Observed {
        Observed { table: TableState::Intact, routes, ..Observed::default() }
    }

    #[test]
    fn the_table_comes_first_and_removals_come_last() {
        let desired = Desired {
            routes: routes(&[
                via("10.244.2.0/24", "172.30.0.12"),
                via("10.244.3.0/24", "172.30.0.13"),
                route("10.244.1.0/24", 1120, Target::Bridge),
            ]),
            sysctls: vec![Sysctl::new("ipv4/ip_forward", "1")],
            bridge: Some(Bridge {
                name: "cni0".into(),
                mtu: None,
                blocks: ["10.244.1.0/24".parse().unwrap()].into(),
            }),
            ..Desired::default()
        };
        let left_over = via("10.244.9.0/24", "172.30.0.19");
        let changed = via("10.244.3.0/24", "172.30.0.99");
        let steps =
            diff(&desired, &Observed { routes: routes(&[left_over, changed]), ..Observed::default() });
        assert_eq!(
            steps,
            [
                Step::ReplaceTable,
                Step::AddRoute(via("10.244.2.0/24", "172.30.0.12")),
                Step::ReplaceRoute(via("10.244.3.0/24", "172.30.0.13")),
                Step::WriteSysctl(Sysctl::new("ipv4/ip_forward", "1")),
                Step::EnsureBridge(desired.bridge.clone().unwrap()),
                Step::AddRoute(route("10.244.1.0/24", 1120, Target::Bridge)),
                Step::DeleteRoute(RouteKey::main("10.244.9.0/24".parse().unwrap(), 1120)),
            ]
        );
    }

    #[test]
    fn what_was_told_of_standing_routes_is_undone_and_no_other() {
        let (lost, bent, right) = (
            via("10.244.2.0/24", "172.30.0.12"),
            via("10.244.3.0/24", "172.30.0.13"),
            via("10.244.4.0/24", "172.30.0.14"),
        );
        let bridged = route("10.244.1.0/24", 1120, Target::Bridge);
        let foreign = via("10.9.0.0/24", "172.30.0.9");
        let standing = routes(&[lost.clone(), bent.clone(), right.clone(), bridged.clone()]);
        let told = BTreeMap::from([
            (lost.key, Told::Gone),
            (bent.key, Told::Set(via("10.244.3.0/24", "172.30.0.66"))),
            (right.key, Told::Set(right)),
        ]);
        assert_eq!(undo(&standing, &told), [Step::AddRoute(lost), Step::ReplaceRoute(bent)]);
        assert!(is_undone_by(&standing, &told));
        for other in [bridged, foreign] {
            let told = BTreeMap::from([(other.key, Told::Gone)]);
            assert_eq!((undo(&standing, &told), is_undone_by(&standing, &told)), (vec![], false));
        }
    }

    #[test]
    fn a_rule_comes_behind_its_routes_and_stays_while_one_of_them_does() {
        let in_table = |prefix: &str| {
            let route = via(prefix, "172.30.0.12");
            Route { key: RouteKey { table: 1000, ..route.key }, ..route }
        };
        let (rule, kept) = (Rule::to(Family::IPv4, 1000), in_table("10.244.2.0/24"));
        let desired = Desired {
            routes: routes(std::slice::from_ref(&kept)),
            rules: [rule].into(),
            ..Desired::default()
        };
        assert_eq!(
            diff(&desired, &intact(BTreeMap::new())),
            [Step::AddRoute(kept.clone()), Step::AddRule(rule)]
        );
        let gone = in_table("10.244.3.0/24");
        let there = |priority| Observed {
            rules: [Rule { priority, ..rule }].into(),
            ..intact(routes(&[kept.clone(), gone.clone()]))
        };
        let keep = Desired { keep: [kept.key.prefix].into(), ..Desired::default() };
        assert_eq!(diff(&keep, &there(rule.priority)), [Step::DeleteRoute(gone.key)]);
        let old = Rule { priority: 7, ..rule };
        assert_eq!(diff(&keep, &there(7)), [Step::DeleteRoute(gone.key), Step::DeleteRule(old)]);
        assert_eq!(diff(&Desired::default(), &there(rule.priority)).last(), Some(&Step::DeleteRule(rule)));
    }

    #[test]
    fn a_kept_prefix_is_left_alone_whatever_its_metric() {
        let desired = Desired { keep: ["10.244.2.0/24".parse().unwrap()].into(), ..Desired::default() };
        let there = [via("10.244.2.0/24", "172.30.0.12"), route("10.244.2.0/24", 7, Target::Other)];
        assert_eq!(diff(&desired, &intact(routes(&there))), []);
    }

    #[test]
    fn a_bridge_that_lacks_anything_or_carries_too_much_is_ensured() {
        let wanted = Bridge {
            name: "cni0".into(),
            mtu: Some(1500),
            blocks: ["10.244.1.0/24".parse().unwrap()].into(),
        };
        let desired = Desired { bridge: Some(wanted.clone()), ..Desired::default() };
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<BTreeSet<IpNet>>();
        let good = ObservedBridge {
            name: "cni0".into(),
            index: 3,
            up: true,
            mtu: 1500,
            addresses: nets(&["10.244.1.1/32", "192.168.0.1/24", "fe80::1/64"]),
            ours: nets(&["10.244.1.1/32"]),
        };
        let stale = nets(&["10.244.1.1/32", "10.244.2.1/32"]);
        for (bad, what) in [
            (None, "absent"),
            (Some(ObservedBridge { up: false, ..good.clone() }), "down"),
            (Some(ObservedBridge { mtu: 1400, ..good.clone() }), "another mtu"),
            (Some(ObservedBridge { addresses: nets(&["10.244.1.1/24"]), ..good.clone() }), "gateway as /24"),
            (
                Some(ObservedBridge { addresses: stale.clone(), ours: stale, ..good.clone() }),
                "a stale gateway",
            ),
        ] {
            let observed = Observed { bridge: bad, ..intact(BTreeMap::new()) };
            assert_eq!(diff(&desired, &observed), [Step::EnsureBridge(wanted.clone())], "{what}");
        }
        let observed = Observed { bridge: Some(good), ..intact(BTreeMap::new()) };
        assert_eq!(diff(&desired, &observed), []);
        let without_block = Bridge { name: "cni0".into(), mtu: None, blocks: BTreeSet::new() };
        assert_eq!(diff(&Desired::default(), &observed), [Step::EnsureBridge(without_block)]);
    }

    #[test]
    fn accept_rules_stand_only_where_the_policy_is_drop_and_once() {
        let admit = |block: &str, direction| Admit {
            block: block.parse().unwrap(),
            datapath: Datapath::Bridge,
            direction,
        };
        let own = admit("10.244.1.0/24", Direction::FromPods);
        let old = admit("10.244.7.0/24", Direction::ToPods);
        let desired = Desired { admit: [own].into(), ..Desired::default() };
        let steps = |needs_rules, rules: Vec<Admitted>| {
            let forward = [(Family::IPv4, ForwardChain { needs_rules, rules })].into();
            diff(&desired, &Observed { forward, ..intact(BTreeMap::new()) })
        };
        let rule = |admit, handle, ours| Admitted { admit, handle, ours };
        assert_eq!(steps(true, vec![]), [Step::Admit(own)]);
        assert_eq!(steps(true, vec![rule(own, 5, true)]), []);
        assert_eq!(steps(true, vec![rule(own, 5, false)]), [], "an administrator's equal rule serves");
        let remove = |handle| Step::RemoveAdmit { family: Family::IPv4, handle };
        assert_eq!(
            steps(true, vec![rule(own, 5, true), rule(own, 6, true), rule(old, 7, true)]),
            [remove(6), remove(7)]
        );
        assert_eq!(steps(false, vec![rule(own, 5, true), rule(old, 6, false)]), [remove(5)]);
    }

    #[test]
    fn gateways_go_onto_lo_for_routed_pods_and_away_with_the_last_of_them() {
        let blocks: BTreeSet<Block> = ["10.244.1.0/24".parse().unwrap()].into();
        let desired = Desired { gateways: blocks.clone(), ..Desired::default() };
        let on_lo =
            |net: &str| Observed { gateways: [net.parse().unwrap()].into(), ..intact(BTreeMap::new()) };
        assert_eq!(diff(&desired, &intact(BTreeMap::new())), [Step::EnsureGateways(blocks.clone())]);
        assert_eq!(diff(&desired, &on_lo("10.244.1.1/32")), []);
        assert_eq!(diff(&desired, &on_lo("10.244.2.1/32")), [Step::EnsureGateways(blocks)]);
        let none = Step::EnsureGateways(BTreeSet::new());
        assert_eq!(diff(&Desired::default(), &on_lo("10.244.1.1/32")), [none]);
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let target = prop_oneof![
            (1u8..5, 1u32..3).prop_map(|(a, device)| Target::via([Hop::to([172, 30, 0, a].into(), device)])),
            Just(Target::Bridge),
            Just(Target::Unreachable),
            Just(Target::Other),
        ];
        (0u8..6, prop_oneof![Just(7u32), Just(1120), Just(65_535)], target, prop::option::of(Just(1400u32)))
            .prop_map(|(n, metric, target, mtu)| {
                let prefix = format!("10.244.{n}.0/24").parse().unwrap();
                Route { mtu, ..Route::new(RouteKey::main(prefix, metric), target) }
            })
    }

    proptest! {
        #[test]
        fn the_steps_lead_from_any_state_to_the_desired_one(
            wanted in prop::collection::vec(any_route(), 0..12),
            there in prop::collection::vec(any_route(), 0..12),
            keep in prop::collection::btree_set(0u8..6, 0..3),
        ) {
            let keep = keep.into_iter().map(|n| format!("10.244.{n}.0/24").parse().unwrap()).collect();
            let desired = Desired { routes: routes(&wanted), keep, ..Desired::default() };
            let before = routes(&there);
            let mut now = before.clone();
            let mut deleting = false;
            for step in diff(&desired, &intact(before.clone())) {
                match step {
                    Step::AddRoute(r) => {
                        prop_assert!(!deleting && !now.contains_key(&r.key));
                        now.insert(r.key, r);
                    }
                    Step::ReplaceRoute(r) => {
                        prop_assert!(!deleting && now.contains_key(&r.key));
                        now.insert(r.key, r);
                    }
                    Step::DeleteRoute(key) => {
                        deleting = true;
                        prop_assert!(now.remove(&key).is_some());
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            for (key, route) in &now {
                let kept = desired.keep.contains(&key.prefix) && before.get(key) == Some(route);
                prop_assert!(desired.routes.get(key) == Some(route) || kept);
            }
            for key in desired.routes.keys() {
                prop_assert!(now.contains_key(key));
            }
            prop_assert_eq!(diff(&desired, &intact(now)), []);
        }
    }
}
