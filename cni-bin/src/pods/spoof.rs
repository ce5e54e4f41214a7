//! Anti-spoofing: a pod sends from its own addresses, and from no others.
//!
//! A pod with `NET_RAW` can put any frame on its link. Here the frame is looked at before the bridge learns
//! from it, and dropped unless all that it says about its sender is the pod's own: the Ethernet source; the
//! IP source; in ARP the sender's hardware and IP address; in neighbour discovery the source, the target
//! that is announced, and the hardware address that is given for it.
//!
//! ```text
//! table bridge plat-pods {
//!     map ports { type ifname : verdict; elements = { "plat0badcafe" : goto addresses } }
//!     set macs { type ifname . ether_addr }
//!     set own4 { type ifname . ether_addr . ipv4_addr }
//!     set own6 { type ifname . ether_addr . ipv6_addr }
//!     set targets6 { typeof iifname . @th,64,128 }    (what neighbour discovery may be about)
//!     set options { typeof iifname . @th,208,48 }     (the hardware address that it may give)
//!     chain prerouting {
//!         type filter hook prerouting priority dstnat; policy accept;
//!         iifname . ether saddr . ip saddr @own4 accept
//!         meta l4proto != ipv6-icmp iifname . ether saddr . ip6 saddr @own6 accept
//!         iifname vmap @ports
//!     }
//!     chain addresses { … the other things that a pod may send; counter drop }
//! }
//! ```
//! Rules are the same for all pods, a pod is a handful of elements: a packet takes one lookup with one pod
//! and with ten thousand. The rules say what may pass, and the rest is dropped: what is too short, cut into
//! fragments in the wrong place, tagged (also with VLAN 0, which the host and other pods would take for
//! untagged), PPPoE, LLC or of any other kind but IPv4, IPv6 and ARP cannot be a way around.
//!
//! Of IPv6 a pod has beside its leased addresses the link-local one that follows from its hardware address
//! (EUI-64), and may ask from `::` whether an address of its own is in use, and report multicast groups.
//! Nobody in a pod is a router: router solicitations and advertisements, and redirects, are dropped.
//!
//! **Past the bridge.** Frames to the addresses that IEEE 802.1D reserves (`01:80:c2:00:00:0x`) never come
//! to the chain: the kernel takes them from the port itself. Two things close that way: the bridge does not
//! learn from them ([`crate::bridge`]), and an IP packet that arrives from a pod's link itself, not from the
//! bridge, is dropped by table `inet plat-pods`. The same chain is all there is for a pod without bridge
//! ([`Datapath::Routed`]): on its own link there is nobody else whose hardware address it could take.
//! ```text
//! table inet plat-pods {
//!     set links { type ifname }
//!     set routed4 { type ifname . ipv4_addr }
//!     set routed6 { type ifname . ipv6_addr }
//!     chain sources {
//!         type filter hook prerouting priority raw; policy accept;
//!         iifname != "plat*" accept
//!         iifname . ip saddr @routed4 accept
//!         …
//!         iifname @links counter drop
//!     }
//! }
//! ```
//! The elements follow from [`Lease::guard`], [`Lease::veth`] and [`Lease::addresses`]. They stand before
//! the pod's end of the link is raised, so there is no moment at which the pod can send and nobody looks.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use plat_crds::Family;
use plat_crds::lease::{Datapath, Guard, GuardScope, Lease};
use plat_crds::names::NFT_PODS_TABLE;

use super::{Chain, Piece, Scaffold};
use crate::mac::Mac;
use crate::netlink::{Error, Socket};
use crate::nft::{
    self, BRIDGE_DSTNAT, BaseChain, Element, Field, Hook, KeyType, Name, RAW, Rule, Set, Table, TableFamily,
    Verdict,
};
use crate::wire::HOST_PREFIX;

use Field::{ArpDaddrIp, ArpSaddrEther, ArpSaddrIp, EtherSaddr, Iifname, L4proto, Saddr, Transport};

const V4: Family = Family::IPv4;
const V6: Family = Family::IPv6;

/// Chains of the bridge's table.
const PREROUTING: &str = "prerouting";
const HARDWARE: &str = "hardware";
const ADDRESSES: &str = "addresses";
const ICMP6: &str = "icmp6";
const SOLICITATION: &str = "solicitation";
const ADVERTISEMENT: &str = "advertisement";
const REFUSED: &str = "refused";
/// The chain of the host's IP layer.
const SOURCES: &str = "sources";

/// Numbers and names of ICMPv6 types (RFC 4861, 2710, 3810), as nft shows them.
const NEIGHBOUR_SOLICITATION: (u8, &str) = (135, "nd-neighbor-solicit");
const NEIGHBOUR_ADVERTISEMENT: (u8, &str) = (136, "nd-neighbor-advert");
const ROUTERS: [(u8, &str); 3] =
    [(133, "nd-router-solicit"), (134, "nd-router-advert"), (137, "nd-redirect")];
const REPORTS: [(u8, &str); 2] = [(143, "mld2-listener-report"), (131, "mld-listener-report")];

/// The target of a neighbour solicitation or advertisement.
const TARGET: (u32, u32) = (8, 16);
/// Type and length of the first option behind it, and the hardware address in it.
const OPTION: Field = Transport(24, 2);
const OPTION_MAC: (u32, u32) = (26, 6);
/// Option types 1 and 2: link-layer address of the source, of the target; 1 is the length, times 8 bytes.
const SOURCE_OPTION: ([u8; 2], &str) = ([1, 1], "0x101");
const TARGET_OPTION: ([u8; 2], &str) = ([2, 1], "0x201");

fn bridge_table() -> Table {
    Table::new(TableFamily::Bridge, NFT_PODS_TABLE)
}

fn host_table() -> Table {
    Table::new(TableFamily::Inet, NFT_PODS_TABLE)
}

fn ports() -> Set {
    Set::verdicts(&bridge_table(), "ports", &[KeyType::Interface])
}

fn macs() -> Set {
    Set::of(&bridge_table(), "macs", &[KeyType::Interface, KeyType::Ether])
}

fn own(family: Family) -> Set {
    let name = if family == V4 { "own4" } else { "own6" };
    Set::of(&bridge_table(), name, &[KeyType::Interface, KeyType::Ether, KeyType::of(family)])
}

/// Sets of their own, as nft 1.0 has no names for these fields: it could not read its own listing again if
/// they were looked for among addresses.
fn targets6() -> Set {
    Set::of(&bridge_table(), "targets6", &[KeyType::Interface, KeyType::Transport(TARGET.0, TARGET.1)])
}

fn options() -> Set {
    let key = [KeyType::Interface, KeyType::Transport(OPTION_MAC.0, OPTION_MAC.1)];
    Set::of(&bridge_table(), "options", &key)
}

fn links() -> Set {
    Set::of(&host_table(), "links", &[KeyType::Interface])
}

fn routed(family: Family) -> Set {
    let name = if family == V4 { "routed4" } else { "routed6" };
    Set::of(&host_table(), name, &[KeyType::Interface, KeyType::of(family)])
}

/// A pod's elements; none if nobody looks at what it sends.
pub(super) fn pieces(lease: &Lease) -> Vec<Piece> {
    match lease.guard {
        None => Vec::new(),
        Some(guard) if lease.datapath == Datapath::Routed => on_own_link(lease, &guard),
        Some(guard) => on_bridge(lease, &guard),
    }
}

fn on_bridge(lease: &Lease, guard: &Guard) -> Vec<Piece> {
    let link = Element::interface(&lease.veth.name);
    let own_piece = |family| {
        let element = |address: &IpAddr| Element::key(&[&link, &guard.mac, &octets(*address)]);
        let addresses = own_addresses(lease, guard);
        Piece {
            set: own(family),
            elements: addresses.iter().filter(|a| Family::of(a) == family).map(element).collect(),
        }
    };
    let mut pieces = vec![
        Piece { set: links(), elements: vec![Element::key(&[&link])] },
        Piece { set: macs(), elements: vec![Element::key(&[&link, &guard.mac])] },
    ];
    if guard.scope == GuardScope::Addresses {
        pieces.extend(Family::ALL.map(own_piece));
        let v6 = own_addresses(lease, guard).into_iter().filter(IpAddr::is_ipv6);
        let targets = v6.map(|address| Element::key(&[&link, &octets(address)])).collect();
        pieces.push(Piece { set: targets6(), elements: targets });
        pieces.push(Piece { set: options(), elements: vec![Element::key(&[&link, &guard.mac])] });
    }
    pieces.push(Piece { set: ports(), elements: vec![port(&link, guard.scope)] });
    pieces
}

/// For a pod whose link is no bridge's port.
fn on_own_link(lease: &Lease, guard: &Guard) -> Vec<Piece> {
    if guard.scope == GuardScope::Hardware {
        return Vec::new();
    }
    let link = Element::interface(&lease.veth.name);
    let piece = |family| {
        let element = |address: &IpAddr| Element::key(&[&link, &octets(*address)]);
        let addresses = own_addresses(lease, guard);
        Piece {
            set: routed(family),
            elements: addresses.iter().filter(|a| Family::of(a) == family).map(element).collect(),
        }
    };
    let mut pieces = Family::ALL.map(piece).to_vec();
    pieces.push(Piece { set: links(), elements: vec![Element::key(&[&link])] });
    pieces
}

fn port(link: &[u8; 16], scope: GuardScope) -> Element {
    let chain = match scope {
        GuardScope::Hardware => HARDWARE,
        GuardScope::Addresses => ADDRESSES,
    };
    Element::key(&[link]).verdict(Verdict::Goto(chain.to_owned()))
}

/// What the pod may send from: what it leased, and its link-local address.
fn own_addresses(lease: &Lease, guard: &Guard) -> Vec<IpAddr> {
    let leased = lease.addresses.iter().map(|leased| leased.address);
    leased.chain([IpAddr::V6(Mac(guard.mac).link_local())]).collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// All sets and chains of both tables, whatever the leases.
pub(super) fn scaffold(_leases: &[&Lease]) -> Scaffold {
    Scaffold {
        sets: vec![links(), routed(V4), routed(V6), macs(), own(V4), own(V6), targets6(), options(), ports()],
        chains: vec![
            Chain {
                table: bridge_table(),
                name: PREROUTING.to_owned(),
                base: Some(BaseChain::filter(Hook::Prerouting, BRIDGE_DSTNAT)),
                rules: prerouting_rules(),
            },
            bridge_chain(HARDWARE, hardware_rules()),
            bridge_chain(ADDRESSES, address_rules()),
            bridge_chain(ICMP6, icmp6_rules()),
            bridge_chain(SOLICITATION, solicitation_rules()),
            bridge_chain(ADVERTISEMENT, advertisement_rules()),
            bridge_chain(REFUSED, vec![rule(REFUSED).counter().drop()]),
            Chain {
                table: host_table(),
                name: SOURCES.to_owned(),
                base: Some(BaseChain::filter(Hook::Prerouting, RAW)),
                rules: source_rules(),
            },
        ],
    }
}

fn bridge_chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain { table: bridge_table(), name: name.to_owned(), base: None, rules }
}

fn rule(chain: &str) -> Rule {
    Rule::new(&bridge_table(), chain)
}

fn goto(rule: Rule, chain: &str) -> Rule {
    rule.verdict(Verdict::Goto(chain.to_owned()))
}

fn is_own(rule: Rule, family: Family, mac: Field, address: Field) -> Rule {
    rule.in_set(&[Iifname, mac, address], own(family).name())
}

/// What most frames are comes first: a pod's own IP packets.
fn prerouting_rules() -> Vec<Rule> {
    let icmp6 = (&[58], "ipv6-icmp");
    vec![
        // iifname . ether saddr . ip saddr @own4 accept
        is_own(rule(PREROUTING).untagged(V4), V4, EtherSaddr, Saddr(V4)).accept(),
        // meta l4proto != ipv6-icmp iifname . ether saddr . ip6 saddr @own6 accept
        is_own(rule(PREROUTING).untagged(V6).is_not(L4proto, icmp6.0, icmp6.1), V6, EtherSaddr, Saddr(V6))
            .accept(),
        // iifname vmap @ports
        rule(PREROUTING).vmap(&[Iifname], ports().name()),
    ]
}

/// Where only the hardware address must be the pod's own.
fn hardware_rules() -> Vec<Rule> {
    vec![
        // iifname . ether saddr @macs accept
        is_own_mac(rule(HARDWARE)).accept(),
        goto(rule(HARDWARE), REFUSED),
    ]
}

/// ARP whose sender is the pod; ARP that asks whether its own address is in use (RFC 5227); ICMPv6.
fn address_rules() -> Vec<Rule> {
    let arp = || rule(ADDRESSES).untagged_arp();
    let probe = || arp().is(ArpSaddrIp, &[0; 4], "0.0.0.0");
    vec![
        // iifname . ether saddr . arp saddr ip @own4 iifname . arp saddr ether . arp saddr ip @own4 accept
        is_own(is_own(arp(), V4, EtherSaddr, ArpSaddrIp), V4, ArpSaddrEther, ArpSaddrIp).accept(),
        // arp saddr ip 0.0.0.0 iifname . ether saddr . arp daddr ip @own4 …
        is_own(is_own(probe(), V4, EtherSaddr, ArpDaddrIp), V4, ArpSaddrEther, ArpDaddrIp).accept(),
        // meta l4proto ipv6-icmp goto icmp6
        goto(rule(ADDRESSES).untagged(V6).is(L4proto, &[58], "ipv6-icmp"), ICMP6),
        goto(rule(ADDRESSES), REFUSED),
    ]
}

/// ICMPv6, also a later fragment of it, whose type cannot be seen: no receiver takes neighbour discovery in
/// fragments (RFC 6980).
fn icmp6_rules() -> Vec<Rule> {
    let of_type = |kind: (u8, &str)| rule(ICMP6).icmpv6_type(kind.0, kind.1);
    let from_nowhere =
        |kind: (u8, &str)| is_own_mac(from_unspecified(rule(ICMP6)).icmpv6_type(kind.0, kind.1)).accept();
    let mut rules = vec![
        goto(of_type(NEIGHBOUR_SOLICITATION), SOLICITATION),
        goto(of_type(NEIGHBOUR_ADVERTISEMENT), ADVERTISEMENT),
    ];
    rules.extend(ROUTERS.map(|kind| goto(of_type(kind), REFUSED)));
    // The first reports go out before the link-local address can be used.
    rules.extend(REPORTS.map(from_nowhere));
    rules.push(is_own(rule(ICMP6), V6, EtherSaddr, Saddr(V6)).accept());
    rules.push(goto(rule(ICMP6), REFUSED));
    rules
}

fn from_unspecified(rule: Rule) -> Rule {
    rule.is(Saddr(V6), &Ipv6Addr::UNSPECIFIED.octets(), "::")
}

/// A message of this chain that is `bytes` long, so that an option is where it is looked for, if there is
/// one at all, and there is no other.
fn of_length(chain: &str, bytes: u16) -> Rule {
    rule(chain).is(Field::Ip6Length, &bytes.to_be_bytes(), &bytes.to_string())
}

/// Its hardware address is the pod's own.
fn is_own_mac(rule: Rule) -> Rule {
    rule.in_set(&[Iifname, EtherSaddr], macs().name())
}

/// So is what it is about.
fn is_own_target(rule: Rule) -> Rule {
    rule.in_set(&[Iifname, Transport(TARGET.0, TARGET.1)], targets6().name())
}

/// It has one option, of that kind, with the pod's own hardware address.
fn with_own_option(rule: Rule, option: ([u8; 2], &str)) -> Rule {
    let mac = Transport(OPTION_MAC.0, OPTION_MAC.1);
    rule.is(OPTION, &option.0, option.1).in_set(&[Iifname, mac], options().name())
}

/// Who has this address? From `::` the pod may ask that about its own addresses only: the answer, or another
/// that asks, would keep the real owner from using it.
fn solicitation_rules() -> Vec<Rule> {
    let from_own = |rule: Rule| is_own(rule, V6, EtherSaddr, Saddr(V6));
    vec![
        is_own_target(is_own_mac(from_unspecified(rule(SOLICITATION)))).accept(),
        from_own(of_length(SOLICITATION, 24)).accept(),
        from_own(with_own_option(of_length(SOLICITATION, 32), SOURCE_OPTION)).accept(),
        goto(rule(SOLICITATION), REFUSED),
    ]
}

/// I have this address.
fn advertisement_rules() -> Vec<Rule> {
    let about_own = |rule: Rule| is_own_target(is_own(rule, V6, EtherSaddr, Saddr(V6)));
    vec![
        about_own(of_length(ADVERTISEMENT, 24)).accept(),
        about_own(with_own_option(of_length(ADVERTISEMENT, 32), TARGET_OPTION)).accept(),
        goto(rule(ADVERTISEMENT), REFUSED),
    ]
}

/// IP packets that come from a pod's link itself.
fn source_rules() -> Vec<Rule> {
    let rule = || Rule::new(&host_table(), SOURCES);
    let mut rules = vec![
        // Every packet of the host comes by here: those of other links are done with at once.
        rule().iifname(Name::BeginsNot(HOST_PREFIX)).accept(),
        rule().in_set(&[Iifname, Saddr(V4)], routed(V4).name()).accept(),
        rule().in_set(&[Iifname, Saddr(V6)], routed(V6).name()).accept(),
    ];
    let from_nowhere = |kind: (u8, &str)| from_unspecified(rule()).icmpv6_type(kind.0, kind.1).accept();
    rules.extend([NEIGHBOUR_SOLICITATION].into_iter().chain(REPORTS).map(from_nowhere));
    rules.push(rule().in_set(&[Iifname], links().name()).counter().drop());
    rules
}

/// Who is guarded now: the host's end of the link, and how.
pub(super) fn members(socket: &mut Socket) -> Result<HashMap<String, Guard>, Error> {
    let ports = nft::contents(socket, &ports())?;
    let bridged = nft::elements(socket, &macs())?.into_iter().filter_map(|key| {
        let (link, rest) = key.split_first_chunk::<16>()?;
        let mac = *rest.first_chunk::<6>()?;
        let all = ports.contains(&port(link, GuardScope::Addresses));
        let scope = if all { GuardScope::Addresses } else { GuardScope::Hardware };
        Some((link_name(link), Guard { mac, scope }))
    });
    let mut members: HashMap<String, Guard> = bridged.collect();
    for key in nft::elements(socket, &routed(V6))? {
        let Some((link, address)) = key.split_first_chunk::<16>() else { continue };
        let address = <[u8; 16]>::try_from(address).map(Ipv6Addr::from);
        if let Some(Mac(mac)) = address.ok().and_then(Mac::of_link_local) {
            members.insert(link_name(link), Guard { mac, scope: GuardScope::Addresses });
        }
    }
    Ok(members)
}

fn link_name(bytes: &[u8; 16]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}
