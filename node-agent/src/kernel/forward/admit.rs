//! The way that Plat opens by itself: in a chain `filter FORWARD` of `ip` or `ip6` with **policy** drop, one plain accept
//! rule per own block and direction.
//!
//! Appended, so that the administrator's own rules stay in force before it; plain (prefix, interface, counter, accept,
//! comment), as these read back in `iptables -S` and survive save and restore, while a set would come back as accept-all.
//! Our rules are recognised by content: `iptables-restore` renumbers them and turns their comment into a match of its own.

use std::collections::BTreeSet;

use plat_cni::netlink::Error;
use plat_cni::nft::{
    self, Addr, Batch, ChainInfo, Cmp, Hook, Name, Policy, Rule, RuleInfo, Table, TableFamily,
};
use plat_crds::block::Family;
use plat_crds::lease::Datapath;
use plat_crds::names::{FORWARD_COMMENT, VETH_PREFIX};

use super::shape::{InterfaceName, Outcome, Test, read_rule};
use crate::fabric::{Admit, Admitted, Direction, ForwardChain};
use crate::kernel::nft::Nft;

/// The chain's name.
pub const CHAIN: &str = "FORWARD";

/// The table `filter` of the family, which iptables-nft keeps.
pub fn filter(family: Family) -> Table {
    Table::new(table_family(family), "filter")
}

/// The family of tables for that family alone.
pub(in crate::kernel) fn table_family(family: Family) -> TableFamily {
    match family {
        Family::IPv4 => TableFamily::Ip,
        Family::IPv6 => TableFamily::Ip6,
    }
}

/// The chain `filter FORWARD` of the family among these, if it is a base chain at the forward hook.
pub fn find(chains: &[ChainInfo], family: Family) -> Option<&ChainInfo> {
    let table = filter(family);
    let at_forward = |c: &ChainInfo| c.hook.as_ref().is_some_and(|h| h.number == Hook::Forward.number());
    chains.iter().find(|chain| chain.table == table && chain.name == CHAIN && at_forward(chain))
}

/// What there is to know of the chain, to bring its rules into shape.
pub fn read(
    chain: &ChainInfo,
    rules: &[RuleInfo],
    owned: &BTreeSet<Table>,
    family: Family,
    bridge: &str,
) -> ForwardChain {
    let drops = chain.hook.as_ref().is_some_and(|hook| hook.policy == Policy::Drop);
    let rules = rules.iter().filter_map(|rule| read_admit(rule, family, bridge));
    ForwardChain { needs_rules: drops && !owned.contains(&chain.table), rules: rules.collect() }
}

/// The rule that admits: `ip saddr 10.244.1.0/24 iifname "cni0" counter accept comment "plat"`; for pods without
/// bridge `iifname "plat*"`.
fn admit_rule(admit: &Admit, bridge: &str) -> Rule {
    let rule = Rule::new(&filter(admit.block.family()), CHAIN);
    let link = match admit.datapath {
        Datapath::Bridge => Name::Is(bridge),
        Datapath::Routed => Name::Begins(VETH_PREFIX),
    };
    let rule = match admit.direction {
        Direction::FromPods => rule.saddr(Addr::In(admit.block)).iifname(link),
        Direction::ToPods => rule.daddr(Addr::In(admit.block)).oifname(link),
    };
    rule.counter().accept().comment(FORWARD_COMMENT)
}

/// Appends the rule to the family's FORWARD chain.
pub fn append(nft: &mut Nft, admit: &Admit, bridge: &str) -> Result<(), Error> {
    let mut batch = Batch::new();
    batch.add_rule(&admit_rule(admit, bridge));
    batch.send(&mut nft.socket)
}

/// Removes the rule of that handle; "already gone" is success.
pub fn remove(nft: &mut Nft, family: Family, handle: u64) -> Result<bool, Error> {
    let mut batch = Batch::new();
    batch.delete_rule(&filter(family), CHAIN, handle);
    plat_cni::netlink::deleted(batch.send(&mut nft.socket))
}

/// Rules of ours in both FORWARD chains, whatever they admit; for cleanup.
pub fn ours(nft: &mut Nft, bridge: &str) -> Result<Vec<(Family, u64)>, Error> {
    let chains = nft::chains(&mut nft.socket)?;
    let mut ours = Vec::new();
    for family in Family::ALL {
        if find(&chains, family).is_some() {
            let rules = nft::rules(&mut nft.socket, &filter(family), CHAIN)?;
            let rules = rules.iter().filter_map(|rule| read_admit(rule, family, bridge));
            ours.extend(rules.filter(|rule| rule.ours).map(|rule| (family, rule.handle)));
        }
    }
    Ok(ours)
}

/// The rule as one of the shape that we write; `None` for any other.
fn read_admit(rule: &RuleInfo, family: Family, bridge: &str) -> Option<Admitted> {
    let reading = read_rule(rule, family);
    if reading.outcome != Outcome::Accept || reading.tests.len() != 2 {
        return None;
    }
    let datapath = |name: &InterfaceName<'_>| {
        if *name == InterfaceName::Whole(bridge.as_bytes()) {
            Some(Datapath::Bridge)
        } else {
            (*name == InterfaceName::Start(VETH_PREFIX.as_bytes())).then_some(Datapath::Routed)
        }
    };
    let (block, direction) = reading.tests.iter().find_map(|test| match test {
        Test::Source(block, Cmp::Eq) => Some((*block, Direction::FromPods)),
        Test::Destination(block, Cmp::Eq) => Some((*block, Direction::ToPods)),
        _ => None,
    })?;
    let datapath = reading.tests.iter().find_map(|test| match (test, direction) {
        (Test::In(name, Cmp::Eq), Direction::FromPods) => datapath(name),
        (Test::Out(name, Cmp::Eq), Direction::ToPods) => datapath(name),
        _ => None,
    })?;
    let ours = reading.comment.as_deref() == Some(FORWARD_COMMENT);
    Some(Admitted { admit: Admit { block, datapath, direction }, handle: rule.handle, ours })
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_cni::nft::Cmp;
    use plat_cni::nft::Expr;

    fn admit(direction: Direction) -> Admit {
        Admit { block: "10.244.1.0/24".parse().unwrap(), datapath: Datapath::Bridge, direction }
    }

    fn info(rule: &Rule, handle: u64, comment: Option<&str>) -> RuleInfo {
        RuleInfo {
            chain: CHAIN.into(),
            handle,
            expressions: rule.expressions().to_vec(),
            comment: comment.map(str::to_owned),
        }
    }

    fn rule() -> Rule {
        Rule::new(&filter(Family::IPv4), CHAIN)
    }

    #[test]
    fn our_rule_is_recognised_also_as_iptables_restores_it() {
        for direction in [Direction::FromPods, Direction::ToPods] {
            let ours = admit_rule(&admit(direction), "cni0");
            let as_written = info(&ours, 7, Some("plat"));
            let expected = Some(Admitted { admit: admit(direction), handle: 7, ours: true });
            assert_eq!(read_admit(&as_written, Family::IPv4, "cni0"), expected);

            // iptables-nft: interface first, a short name, and the comment as a match.
            let mut comment = vec![12, 0, 1, 0];
            comment.extend_from_slice(b"comment\0");
            comment.extend_from_slice(&[12, 0, 3, 0]);
            comment.extend_from_slice(b"plat\0\0\0\0");
            let mut expressions = as_written.expressions.clone();
            expressions.rotate_left(2);
            let at = expressions.iter().position(|e| matches!(e, Expr::Meta { .. })).unwrap();
            expressions[at + 1] = Expr::Compare { op: Cmp::Eq, value: b"cni0\0".to_vec() };
            let counter = expressions.iter().position(|e| *e == Expr::Counter).unwrap();
            let verdict = expressions.remove(counter + 1);
            expressions.push(Expr::Other { name: "match".into(), data: comment });
            expressions.push(verdict);
            let restored = RuleInfo { expressions, comment: None, ..as_written };
            assert_eq!(read_admit(&restored, Family::IPv4, "cni0"), expected);
        }
    }

    #[test]
    fn other_accept_rules_are_not_taken_for_ours() {
        let block = admit(Direction::FromPods).block;
        let from = || rule().saddr(Addr::In(block));
        for (foreign, what) in [
            (from().accept(), "no interface"),
            (from().iifname(Name::Is("eth0")).accept(), "another interface"),
            (from().oifname(Name::Is("cni0")).accept(), "the other direction"),
            (from().iifname(Name::IsNot("cni0")).accept(), "not the interface"),
            (from().iifname(Name::Is("cni0")).drop(), "a drop"),
            (from().iifname(Name::Is("cni0")).ct_state(2).accept(), "a further match"),
        ] {
            assert_eq!(read_admit(&info(&foreign, 1, Some("plat")), Family::IPv4, "cni0"), None, "{what}");
        }
        let equal = from().iifname(Name::Is("cni0")).accept();
        assert!(!read_admit(&info(&equal, 1, None), Family::IPv4, "cni0").unwrap().ours);
    }
}
