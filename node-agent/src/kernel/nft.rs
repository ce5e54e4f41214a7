//! The nftables table `inet plat`: masquerade of what leaves the cluster, and pods kept from this node's probes.
//!
//! The table is written whole, in one transaction, and read back to see whether it still is as written.
//! With two own blocks, one of them of a range with `masquerade.exclude`, `nft list table` shows
//!
//! ```text
//! table inet plat {
//!     set keep4 { type ipv4_addr; flags interval; elements = { 10.244.0.0/16, 172.30.0.11, … } }
//!     set keep6 { … }
//!     set exclude-10-244-1-0-24 { type ipv4_addr; flags interval; elements = { 192.168.0.0/16 } }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         oifname "cni0" return
//!         oifname "plat*" return
//!         ip daddr @keep4 return
//!         ip6 daddr @keep6 return
//!         ip saddr 10.244.1.0/24 ip daddr @exclude-10-244-1-0-24 return
//!         ip saddr 10.244.1.0/24 masquerade fully-random
//!         ip6 saddr fd00:10:244:1::/64 masquerade fully-random
//!     }
//!     chain input {
//!         type filter hook input priority filter; policy accept;
//!         iifname "cni0" ip daddr 10.244.1.1 udp dport 8474 drop
//!         iifname "plat*" ip daddr 10.244.1.1 udp dport 8474 drop
//!         iifname "cni0" ip6 daddr fd00:10:244:1::1 udp dport 8474 drop
//!         iifname "plat*" ip6 daddr fd00:10:244:1::1 udp dport 8474 drop
//!     }
//! }
//! ```
//!
//! Chain `input` is there while this node answers probes of others, which come by other links: a pod that floods that
//! port could make its node seem silent.
//!
//! With a policy's `masquerade.include` a rule `ip saddr 10.244.1.0/24 ip daddr @include-10-244-1-0-24 …` stands before
//! `@keep4`; with its `egressAddress`, `snat ip to 172.30.0.9 fully-random` in place of `masquerade fully-random`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_cni::netlink::{Attributes, Error, Message, Protocol, Socket};
use plat_cni::nft::{
    self, Addr, BaseChain, Batch, FILTER, Hook, Name, Rule, SRCNAT, Set, Table, TableFamily, Verdict,
};
use plat_crds::block::{Block, Family};
use plat_crds::cluster_cidr::MasqueradeMode;
use plat_crds::names::{NFT_TABLE, VETH_PREFIX};

use crate::fabric::{Leaving, Masquerade, TableState, host_prefix};

const POSTROUTING: &str = "postrouting";
const INPUT: &str = "input";
/// `IPPROTO_UDP`
const UDP: u8 = 17;
/// `NFT_MSG_GETGEN`; its answer holds the generation in attribute 1.
const GET_GENERATION: u16 = (10 << 8) | 16;

/// The table, as we would write it.
struct Rendered {
    sets: Vec<(Set, Vec<IpNet>)>,
    chains: Vec<Chain>,
}

struct Chain {
    name: &'static str,
    base: BaseChain,
    rules: Vec<Rule>,
}

fn table() -> Table {
    Table::new(TableFamily::Inet, NFT_TABLE)
}

fn render(masquerade: &Masquerade) -> Rendered {
    let table = table();
    let rule = || Rule::new(&table, POSTROUTING);
    let (mut sets, mut rules) = (Vec::new(), Vec::new());
    // oifname "cni0" return
    rules.push(rule().oifname(Name::Is(&masquerade.pod_interface)).verdict(Verdict::Return));
    // oifname "plat*" return: to pods without bridge
    rules.push(rule().oifname(Name::Begins(VETH_PREFIX)).verdict(Verdict::Return));
    for (block, leaving) in masquerade.sources.iter().filter(|(_, leaving)| !leaving.include.is_empty()) {
        let name = format!("include-{}", block.object_name());
        // ip saddr 10.244.1.0/24 ip daddr @include-10-244-1-0-24 masquerade fully-random
        let included = rule().saddr(Addr::In(*block)).daddr(Addr::InSet(block.family(), &name));
        rules.push(translate(included, leaving));
        sets.push((Set::prefixes(&table, &name, block.family()), leaving.include.clone()));
    }
    for (family, name) in [(Family::IPv4, "keep4"), (Family::IPv6, "keep6")] {
        let of_family = masquerade.keep.iter().filter(|net| Family::of(&net.addr()) == family);
        sets.push((Set::prefixes(&table, name, family), of_family.copied().collect()));
        // ip daddr @keep4 return
        rules.push(rule().daddr(Addr::InSet(family, name)).verdict(Verdict::Return));
    }
    let others = |leaving: &Leaving| leaving.masquerade != MasqueradeMode::Disabled;
    for (block, leaving) in masquerade.sources.iter().filter(|(_, leaving)| others(leaving)) {
        let family = block.family();
        if !leaving.exclude.is_empty() {
            let name = format!("exclude-{}", block.object_name());
            // ip saddr 10.244.1.0/24 ip daddr @exclude-10-244-1-0-24 return
            let excluded = rule().saddr(Addr::In(*block)).daddr(Addr::InSet(family, &name));
            rules.push(excluded.verdict(Verdict::Return));
            sets.push((Set::prefixes(&table, &name, family), leaving.exclude.clone()));
        }
        // ip saddr 10.244.1.0/24 masquerade fully-random
        rules.push(translate(rule().saddr(Addr::In(*block)), leaving));
    }
    let base = BaseChain::nat(Hook::Postrouting, SRCNAT);
    let mut chains = vec![Chain { name: POSTROUTING, base, rules }];
    chains.extend(guard_probes(masquerade));
    Rendered { sets, chains }
}

/// Keeps pods from where this node answers probes.
fn guard_probes(masquerade: &Masquerade) -> Option<Chain> {
    let links = [Name::Is(&masquerade.pod_interface), Name::Begins(VETH_PREFIX)];
    let rules: Vec<Rule> = masquerade
        .probed
        .iter()
        .flat_map(|at| links.map(|link| (at, link)))
        .map(|(at, link)| {
            // iifname "cni0" ip daddr 10.244.1.1 udp dport 8474 drop
            let from_pods = Rule::new(&table(), INPUT).iifname(link);
            let gateway = Block::containing(host_prefix(at.ip()));
            from_pods.daddr(Addr::In(gateway)).dport(UDP, at.port()).drop()
        })
        .collect();
    let base = BaseChain::filter(Hook::Input, FILTER);
    (!rules.is_empty()).then_some(Chain { name: INPUT, base, rules })
}

/// `masquerade fully-random`, or `snat ip to 172.30.0.9 fully-random`
fn translate(rule: Rule, leaving: &Leaving) -> Rule {
    match leaving.address {
        Some(address) => rule.snat_fully_random(address),
        None => rule.masquerade_fully_random(),
    }
}

/// The agent's end of nftables.
pub struct Nft {
    pub(super) socket: Socket,
    /// The generation of the whole ruleset at which the table was last seen to be as it should.
    verified: Option<(u32, Masquerade)>,
}

impl Nft {
    /// Opens the socket in the current network namespace.
    pub fn open() -> Result<Nft, Error> {
        Ok(Nft { socket: Socket::open(Protocol::Netfilter)?, verified: None })
    }

    /// The socket, for tables other than ours.
    pub fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// The generation of the ruleset: any transaction of anybody moves it.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let mut generation = 0;
        self.socket.ask(
            Message::new(GET_GENERATION, 0, &[0; 4], "read the nftables generation"),
            |received| {
                let id = Attributes::behind(received.payload, 4).find(1).and_then(|a| a.be32());
                generation = id.unwrap_or(generation);
            },
        )?;
        Ok(generation)
    }

    /// Compares the kernel's table with the desired one: by the generation, which is cheap, then by content.
    pub fn observe(&mut self, desired: &Masquerade) -> Result<TableState, Error> {
        let generation = self.generation()?;
        if self.verified.as_ref().is_some_and(|(at, as_was)| *at == generation && as_was == desired) {
            return Ok(TableState::Intact);
        }
        let state = self.compare(desired)?;
        // The generation was read before the content: a change in between is seen next time.
        self.verified = (state == TableState::Intact).then(|| (generation, desired.clone()));
        Ok(state)
    }

    fn compare(&mut self, desired: &Masquerade) -> Result<TableState, Error> {
        let rendered = render(desired);
        if !nft::tables(&mut self.socket)?.iter().any(|t| t.table == table()) {
            return Ok(TableState::Absent);
        }
        let intact = self.chains_are(&rendered)? && self.rules_are(&rendered)? && self.sets_are(&rendered)?;
        Ok(if intact { TableState::Intact } else { TableState::Differs })
    }

    fn chains_are(&mut self, rendered: &Rendered) -> Result<bool, Error> {
        let ours = nft::chains(&mut self.socket)?.into_iter().filter(|chain| chain.table == table());
        let there: BTreeMap<_, _> = ours.map(|chain| (chain.name, chain.hook)).collect();
        let is_there = |chain: &Chain| {
            there.get(chain.name).and_then(Option::as_ref).is_some_and(|hook| {
                hook.kind == chain.base.kind
                    && hook.number == chain.base.hook.number()
                    && hook.priority == chain.base.priority
                    && hook.policy == chain.base.policy
            })
        };
        Ok(there.len() == rendered.chains.len() && rendered.chains.iter().all(is_there))
    }

    fn rules_are(&mut self, rendered: &Rendered) -> Result<bool, Error> {
        for chain in &rendered.chains {
            let there = nft::rules(&mut self.socket, &table(), chain.name)?;
            let there = there.iter().map(|rule| rule.expressions.as_slice());
            if !there.eq(chain.rules.iter().map(Rule::expressions)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn sets_are(&mut self, rendered: &Rendered) -> Result<bool, Error> {
        for (set, nets) in &rendered.sets {
            let there: BTreeSet<Vec<u8>> = nft::elements(&mut self.socket, set)?.into_iter().collect();
            if there != interval_keys(nets) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Replaces the table by the desired one in one transaction: no packet sees it empty.
    pub fn replace(&mut self, desired: &Masquerade) -> Result<(), Error> {
        let rendered = render(desired);
        let mut batch = Batch::new();
        batch.replace_table(&table());
        for (set, nets) in &rendered.sets {
            batch.add_set(set);
            let prefixes: Vec<Block> = nets.iter().map(|net| Block::containing(*net)).collect();
            batch.add_prefixes(set, &prefixes);
        }
        for chain in &rendered.chains {
            batch.add_base_chain(&table(), chain.name, &chain.base);
            chain.rules.iter().for_each(|rule| batch.add_rule(rule));
        }
        batch.send(&mut self.socket)
    }
}

/// The keys that an interval set of these prefixes has in the kernel: the first address of each run of
/// addresses, and the one behind its last.
fn interval_keys(nets: &[IpNet]) -> BTreeSet<Vec<u8>> {
    let mut runs: Vec<(IpAddr, IpAddr)> = Vec::new();
    let mut sorted: Vec<_> = nets.iter().map(|net| (net.network(), net.broadcast())).collect();
    sorted.sort_unstable();
    for (first, end) in sorted {
        match runs.last_mut() {
            Some((_, last)) if first <= *last || next(*last) == Some(first) => *last = (*last).max(end),
            _ => runs.push((first, end)),
        }
    }
    runs.into_iter().flat_map(|(first, last)| [Some(first), next(last)]).flatten().map(octets).collect()
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(masquerade: &Masquerade) -> Vec<String> {
        let chains = render(masquerade).chains;
        chains.iter().flat_map(|chain| &chain.rules).map(|rule| rule.text().to_owned()).collect()
    }

    #[test]
    fn the_rules_read_as_the_module_says() {
        let block = |text: &str| text.parse::<Block>().unwrap();
        let masquerade = Masquerade {
            pod_interface: "cni0".into(),
            keep: vec!["10.244.0.0/16".parse().unwrap(), "fe80::/10".parse().unwrap()],
            sources: [
                (
                    block("10.244.1.0/24"),
                    Leaving { exclude: vec!["192.168.0.0/16".parse().unwrap()], ..Leaving::default() },
                ),
                (block("fd00:10:244:1::/64"), Leaving::default()),
            ]
            .into(),
            probed: ["10.244.1.1:8474".parse().unwrap(), "[fd00:10:244:1::1]:8474".parse().unwrap()].into(),
        };
        assert_eq!(
            texts(&masquerade),
            [
                "oifname \"cni0\" return",
                "oifname \"plat*\" return",
                "ip daddr @keep4 return",
                "ip6 daddr @keep6 return",
                "ip saddr 10.244.1.0/24 ip daddr @exclude-10-244-1-0-24 return",
                "ip saddr 10.244.1.0/24 masquerade fully-random",
                "ip6 saddr fd00:10:244:1::/64 masquerade fully-random",
                "iifname \"cni0\" ip daddr 10.244.1.1 udp dport 8474 drop",
                "iifname \"plat*\" ip daddr 10.244.1.1 udp dport 8474 drop",
                "iifname \"cni0\" ip6 daddr fd00:10:244:1::1 udp dport 8474 drop",
                "iifname \"plat*\" ip6 daddr fd00:10:244:1::1 udp dport 8474 drop",
            ]
        );
    }

    #[test]
    fn what_is_included_goes_before_all_that_is_kept_and_leaves_with_the_address_of_the_policy() {
        let leaving = Leaving {
            include: vec!["10.9.0.0/16".parse().unwrap()],
            address: Some([172, 30, 0, 9].into()),
            ..Leaving::default()
        };
        let rules = |leaving: Leaving| {
            let sources = [("10.244.1.0/24".parse().unwrap(), leaving)].into();
            texts(&Masquerade { pod_interface: "cni0".into(), sources, ..Masquerade::default() }).split_off(2)
        };
        let snat = "snat ip to 172.30.0.9 fully-random";
        let included = format!("ip saddr 10.244.1.0/24 ip daddr @include-10-244-1-0-24 {snat}");
        let [kept4, kept6] = ["ip daddr @keep4 return", "ip6 daddr @keep6 return"];
        let all = format!("ip saddr 10.244.1.0/24 {snat}");
        assert_eq!(rules(leaving.clone()), [&included, kept4, kept6, &all]);
        let only = Leaving { masquerade: MasqueradeMode::Disabled, ..leaving };
        assert_eq!(rules(only), [&included, kept4, kept6]);
    }

    #[test]
    fn interval_keys_are_the_ends_of_runs() {
        let keys = |nets: &[&str]| {
            let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
            let key = |key: Vec<u8>| IpAddr::from(<[u8; 4]>::try_from(key).unwrap()).to_string();
            interval_keys(&nets).into_iter().map(key).collect::<Vec<_>>()
        };
        assert_eq!(keys(&["10.0.0.0/24"]), ["10.0.0.0", "10.0.1.0"]);
        assert_eq!(keys(&["10.0.0.0/24", "10.0.1.0/25", "10.0.0.7/32"]), ["10.0.0.0", "10.0.1.128"]);
        assert_eq!(keys(&["10.0.0.0/24", "10.0.2.0/24"]), ["10.0.0.0", "10.0.1.0", "10.0.2.0", "10.0.3.0"]);
        assert_eq!(keys(&["255.255.255.0/24"]), ["255.255.255.0"]);
    }
}
