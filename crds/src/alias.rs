//! The alias of a host veth: the kernel's own copy of a lease, written by the CNI binary. Pure.
//!
//! ```text
//! plat <container ID> <interface> [<network> <pool> <address>/<length of its subnet>...]
//! plat 9e107d9d372bb682 eth0 plat blocks 10.244.3.7/24 fd00:10:244:3::7/64
//! ```
//! From it the lease store is rebuilt when it is lost, so it says whose the link is, and also what no other
//! place in the kernel knows: network, pool, and the size of the block that an address is from. It is on
//! the host's side, where a pod cannot change it. An alias holds 255 bytes: where network and addresses do
//! not fit, they are left out together, and the addresses are asked from the pod's end.

use ipnet::IpNet;

use crate::lease::{Lease, LeasedAddress, Pool};
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
    /// What was leased, if there was room for it.
    pub leased: Option<Leased<'a>>,
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

/// The alias of a lease's host veth.
pub fn of(lease: &Lease) -> String {
    let key = format!("{CNI_TYPE} {} {}", lease.container_id, lease.ifname);
    let Some(network) = &lease.network else { return key };
    let mut whole = format!("{key} {network} {}", word(lease.pool));
    for leased in &lease.addresses {
        whole.push_str(&format!(" {}/{}", leased.address, leased.subnet_length));
    }
    if whole.len() <= MAX_ALIAS { whole } else { key }
}

/// Takes an alias apart; `None` if it is not one of ours.
pub fn parse(alias: &str) -> Option<Alias<'_>> {
    let mut words = alias.strip_prefix(CNI_TYPE)?.strip_prefix(' ')?.split(' ');
    let (container_id, ifname) = (words.next()?, words.next()?);
    let leased = leased(words);
    (!container_id.is_empty() && !ifname.is_empty()).then_some(Alias { container_id, ifname, leased })
}

/// Whether the alias says that the link is that container's.
pub fn is_of(alias: &str, container_id: &str, ifname: &str) -> bool {
    parse(alias).is_some_and(|alias| (alias.container_id, alias.ifname) == (container_id, ifname))
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

    #[test]
    fn an_alias_says_all_that_the_kernel_does_not_know_otherwise() {
        let lease = lease("c1", Some("plat"), Pool::Blocks, &["10.244.3.7/24", "fd00::7/64"]);
        let text = of(&lease);
        assert_eq!(text, "plat c1 eth0 plat blocks 10.244.3.7/24 fd00::7/64");
        let alias = parse(&text).unwrap();
        let leased = alias.leased.unwrap();
        assert_eq!(
            (leased.network, leased.pool, &leased.addresses),
            ("plat", Pool::Blocks, &lease.addresses)
        );
        assert!(is_of(&text, "c1", "eth0") && !is_of(&text, "c", "eth0") && !is_of(&text, "c1", "eth"));
    }

    #[test]
    fn without_room_or_knowledge_the_key_alone_is_left() {
        let unknown = lease("c1", None, Pool::Unknown, &["10.244.3.7/32"]);
        assert_eq!(of(&unknown), "plat c1 eth0");
        let long = lease(&"c".repeat(MAX_CONTAINER_ID), Some("n"), Pool::Blocks, &["10.244.3.7/24"]);
        let long = Lease { ifname: "i".repeat(15), ..long };
        assert_eq!(of(&long).len(), MAX_ALIAS);
        assert!(is_of(&of(&long), &long.container_id, &long.ifname));
        let name = "n".repeat(MAX_NETWORK_NAME);
        assert_eq!(of(&lease("c1", Some(&name), Pool::Blocks, &[])), "plat c1 eth0");
    }

    #[test]
    fn what_cannot_be_read_hides_neither_container_nor_interface() {
        for text in [
            "plat c1 eth0",
            "plat c1 eth0 ",
            "plat c1 eth0 n",
            "plat c1 eth0 n blocks 10.0.0.1",
            "plat c1 eth0 n x 10.0.0.1/8",
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
