//! The alias of a host veth: the kernel's own copy of a lease, written by the CNI binary. Pure.
//!
//! ```text
//! plat <container ID> <interface> <datapath> [<guard> [<network> <pool> <address>/<length of its subnet>...]]
//! plat 9e107d9d372bb682 eth0 bridge:cni0:hairpin addresses:0a580af40307 plat blocks 10.244.3.7/24 fd00:3::7/64
//! plat 6bb69a4c0ab3e9d2 eth0 routed open hand ranges 10.22.0.2/24
//! ```
//! | word | values |
//! |---|---|
//! | datapath | `routed`; or `bridge`, then `:` and the bridge's name, then `:hairpin`, `:isolated` if the port is so |
//! | guard | `open` (nobody looks), or what of a packet's source must be the pod's (`hardware`, `addresses`), `:` and its hardware address |
//! | pool | `unknown`, `blocks`, `ranges`, `delegated` |
//!
//! From it the lease store is rebuilt when it is lost, and the link joined to its bridge again when that was
//! deleted. So it says whose the link is, and also what no other place in the kernel knows for sure. It is on
//! the host's side, where a pod cannot change it. An alias holds 255 bytes: where network and addresses do
//! not fit, they are left out together, and the addresses are asked from the pod's end; then the guard and
//! the bridge.

use ipnet::IpNet;

use crate::lease::{Datapath, Guard, GuardScope, Lease, LeasedAddress, Pool};
use crate::names::CNI_TYPE;

/// Longest alias in bytes (`IFALIASZ` less the zero byte).
pub const MAX_ALIAS: usize = 255;

/// What an alias of ours says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias<'a> {
    /// The container.
    pub container_id: &'a str,
    /// Its interface.
    pub ifname: &'a str,
    /// How the link is joined to the host; `None` if that cannot be read.
    pub datapath: Option<Datapath>,
    /// The bridge that it is a port of, if it is of one and there was room for it.
    pub port: Option<Port<'a>>,
    /// What the pod's packets may come from, if there was room for it; `Some(None)` if nobody looks.
    pub guard: Option<Option<Guard>>,
    /// What was leased, if there was room for it.
    pub leased: Option<Leased<'a>>,
}

/// A port of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port<'a> {
    /// The bridge's name.
    pub bridge: &'a str,
    /// Whether the bridge sends frames back out of it.
    pub hairpin: bool,
    /// Whether it exchanges nothing with other isolated ports.
    pub isolated: bool,
}

/// What an alias says about the addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased<'a> {
    /// The network's name.
    pub network: &'a str,
    /// Where the addresses come from.
    pub pool: Pool,
    /// The addresses; masquerade is not told.
    pub addresses: Vec<LeasedAddress>,
}

/// The alias of a lease's host veth, which is that port if it is on a bridge.
pub fn of(lease: &Lease, port: Option<Port<'_>>) -> String {
    let key = format!("{CNI_TYPE} {} {}", lease.container_id, lease.ifname);
    let joined = match (lease.datapath, port) {
        (Datapath::Routed, _) => ROUTED.to_owned(),
        (Datapath::Bridge, None) => BRIDGE.to_owned(),
        (Datapath::Bridge, Some(port)) => port_word(port),
    };
    let known = format!("{key} {joined} {}", guard_word(lease.guard));
    let whole = lease.network.as_ref().map(|network| {
        let addresses = lease.addresses.iter().map(|a| format!(" {}/{}", a.address, a.subnet_length));
        format!("{known} {network} {}{}", word(lease.pool), addresses.collect::<String>())
    });
    let least = format!("{key} {}", if lease.datapath == Datapath::Routed { ROUTED } else { BRIDGE });
    whole.into_iter().chain([known]).find(|text| text.len() <= MAX_ALIAS).unwrap_or(least)
}

/// Takes an alias apart; `None` if it is not one of ours.
pub fn parse(alias: &str) -> Option<Alias<'_>> {
    let mut words = alias.strip_prefix(CNI_TYPE)?.strip_prefix(' ')?.split(' ');
    let (container_id, ifname) = (words.next()?, words.next()?);
    if container_id.is_empty() || ifname.is_empty() {
        return None;
    }
    let mut read = Alias { container_id, ifname, datapath: None, port: None, guard: None, leased: None };
    // What stands behind a word that cannot be read means nothing either.
    if let Some((datapath, port)) = words.next().and_then(joined) {
        (read.datapath, read.port) = (Some(datapath), port);
        read.guard = words.next().and_then(guard);
        read.leased = read.guard.and_then(|_| leased(words));
    }
    Some(read)
}

/// Whether the alias says that the link is that container's.
pub fn is_of(alias: &str, container_id: &str, ifname: &str) -> bool {
    parse(alias).is_some_and(|alias| (alias.container_id, alias.ifname) == (container_id, ifname))
}

const ROUTED: &str = "routed";
const BRIDGE: &str = "bridge";
const HAIRPIN: &str = "hairpin";
const ISOLATED: &str = "isolated";
const OPEN: &str = "open";

/// The kernel allows no `:` in a link's name.
fn port_word(port: Port<'_>) -> String {
    let flags = [(HAIRPIN, port.hairpin), (ISOLATED, port.isolated)];
    let flags = flags.into_iter().filter(|(_, on)| *on).map(|(flag, _)| format!(":{flag}"));
    format!("{BRIDGE}:{}{}", port.bridge, flags.collect::<String>())
}

fn joined(word: &str) -> Option<(Datapath, Option<Port<'_>>)> {
    let mut parts = word.split(':');
    match (parts.next()?, parts.next()) {
        (ROUTED, None) => Some((Datapath::Routed, None)),
        (BRIDGE, None) => Some((Datapath::Bridge, None)),
        (BRIDGE, Some(bridge)) if !bridge.is_empty() => {
            let flags: Vec<&str> = parts.collect();
            let has = |flag| flags.contains(&flag);
            Some((Datapath::Bridge, Some(Port { bridge, hairpin: has(HAIRPIN), isolated: has(ISOLATED) })))
        }
        _ => None,
    }
}

fn guard_word(guard: Option<Guard>) -> String {
    let Some(Guard { mac, scope }) = guard else { return OPEN.to_owned() };
    format!("{}:{}", scope_word(scope), mac.map(|byte| format!("{byte:02x}")).concat())
}

fn guard(word: &str) -> Option<Option<Guard>> {
    if word == OPEN {
        return Some(None);
    }
    let (scope, digits) = word.split_once(':')?;
    let scope =
        [GuardScope::Hardware, GuardScope::Addresses].into_iter().find(|s| scope_word(*s) == scope)?;
    let is_mac = digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let [_, _, mac @ ..] = u64::from_str_radix(digits, 16).ok().filter(|_| is_mac)?.to_be_bytes();
    Some(Some(Guard { mac, scope }))
}

fn scope_word(scope: GuardScope) -> &'static str {
    match scope {
        GuardScope::Hardware => "hardware",
        GuardScope::Addresses => "addresses",
    }
}

/// `None` also if something in it cannot be read: then the pod's end is asked.
fn leased<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Leased<'a>> {
    let (network, pool) = (words.next().filter(|name| !name.is_empty())?, words.next()?);
    let pool = POOLS.into_iter().find(|known| word(*known) == pool)?;
    let addresses = words.map(|text| {
        let net: IpNet = text.parse().ok()?;
        Some(LeasedAddress { address: net.addr(), subnet_length: net.prefix_len(), masquerade: false })
    });
    Some(Leased { network, pool, addresses: addresses.collect::<Option<_>>()? })
}

const POOLS: [Pool; 4] = [Pool::Unknown, Pool::Blocks, Pool::Ranges, Pool::Delegated];

fn word(pool: Pool) -> &'static str {
    match pool {
        Pool::Unknown => "unknown",
        Pool::Blocks => "blocks",
        Pool::Ranges => "ranges",
        Pool::Delegated => "delegated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{MAX_CONTAINER_ID, MAX_NETWORK_NAME};
    use proptest::prelude::*;

    fn lease(container_id: &str, network: Option<&str>, pool: Pool, addresses: &[&str]) -> Lease {
        let leased = |text: &&str| {
            let net: IpNet = text.parse().unwrap();
            LeasedAddress { address: net.addr(), subnet_length: net.prefix_len(), masquerade: false }
        };
        Lease {
            container_id: container_id.into(),
            ifname: "eth0".into(),
            network: network.map(str::to_owned),
            pool,
            addresses: addresses.iter().map(leased).collect(),
            ..Lease::default()
        }
    }

    const CNI0: Port<'_> = Port { bridge: "cni0", hairpin: true, isolated: false };

    #[test]
    fn an_alias_says_all_that_the_kernel_does_not_know_otherwise() {
        let lease = lease("c1", Some("plat"), Pool::Blocks, &["10.244.3.7/24", "fd00::7/64"]);
        let text = of(&lease, Some(CNI0));
        assert_eq!(text, "plat c1 eth0 bridge:cni0:hairpin open plat blocks 10.244.3.7/24 fd00::7/64");
        let alias = parse(&text).unwrap();
        assert_eq!(
            (alias.datapath, alias.port, alias.guard),
            (Some(Datapath::Bridge), Some(CNI0), Some(None))
        );
        let leased = alias.leased.unwrap();
        assert_eq!(
            (leased.network, leased.pool, &leased.addresses),
            ("plat", Pool::Blocks, &lease.addresses)
        );
        assert!(is_of(&text, "c1", "eth0") && !is_of(&text, "c", "eth0") && !is_of(&text, "c1", "eth"));
    }

    #[test]
    fn a_guard_and_the_port_are_read_as_they_were_written() {
        let plain = lease("c1", Some("n"), Pool::Blocks, &["10.244.3.7/24"]);
        for scope in [GuardScope::Hardware, GuardScope::Addresses] {
            let guard = Some(Guard { mac: [0, 0x58, 0x0a, 0xf4, 3, 0xff], scope });
            for (datapath, port) in [
                (Datapath::Routed, None),
                (Datapath::Bridge, None),
                (Datapath::Bridge, Some(Port { bridge: "br-1.7", hairpin: false, isolated: true })),
                (Datapath::Bridge, Some(Port { bridge: "hairpin", hairpin: true, isolated: true })),
            ] {
                let text = of(&Lease { guard, datapath, ..plain.clone() }, port);
                let read = parse(&text).unwrap();
                assert_eq!(
                    (read.datapath, read.port, read.guard),
                    (Some(datapath), port, Some(guard)),
                    "{text}"
                );
                assert!(read.leased.is_some(), "{text}");
            }
        }
    }

    #[test]
    fn without_room_or_knowledge_the_key_and_the_datapath_are_left() {
        let unknown = lease("c1", None, Pool::Unknown, &["10.244.3.7/32"]);
        assert_eq!(of(&unknown, None), "plat c1 eth0 bridge open");
        let long = lease(&"c".repeat(MAX_CONTAINER_ID), Some("n"), Pool::Blocks, &["10.244.3.7/24"]);
        let long = Lease { ifname: "i".repeat(15), ..long };
        for datapath in [Datapath::Bridge, Datapath::Routed] {
            let text = of(&Lease { datapath, ..long.clone() }, Some(CNI0));
            assert_eq!(text.len(), MAX_ALIAS);
            assert!(is_of(&text, &long.container_id, &long.ifname));
            assert_eq!(parse(&text).unwrap().datapath, Some(datapath));
        }
        let name = "n".repeat(MAX_NETWORK_NAME);
        let named = lease("c1", Some(&name), Pool::Blocks, &[]);
        assert_eq!(of(&named, Some(CNI0)), "plat c1 eth0 bridge:cni0:hairpin open");
    }

    #[test]
    fn what_cannot_be_read_hides_neither_container_nor_interface() {
        for text in [
            "plat c1 eth0",
            "plat c1 eth0 ",
            "plat c1 eth0 routed",
            "plat c1 eth0 bridge: open n blocks 10.0.0.1/8",
            "plat c1 eth0 n blocks 10.0.0.1/8",
            "plat c1 eth0 routed addresses:02 n blocks 10.0.0.1/8",
            "plat c1 eth0 routed addresses:+20000000007 n blocks 10.0.0.1/8",
            "plat c1 eth0 routed open n",
            "plat c1 eth0 routed open n blocks 10.0.0.1",
            "plat c1 eth0 routed open n x 10.0.0.1/8",
        ] {
            let alias = parse(text).unwrap();
            assert_eq!((alias.container_id, alias.ifname, alias.leased), ("c1", "eth0", None), "{text}");
        }
        for foreign in ["", "plat", "plat a", "plat  eth0", "plat a ", "platx a b", "cali a b"] {
            assert_eq!(parse(foreign), None, "{foreign:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_causes_a_panic(text in "(plat )?[ -~]{0,80}") {
            let _ = parse(&text);
        }
    }
}
