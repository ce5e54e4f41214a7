//! Rules, built match by match; each match adds its expressions and its nft text.

use std::fmt::Write;
use std::net::IpAddr;

use plat_crds::{Block, Family};

use super::expr::{self, Cmp, Expr, Verdict};
use super::{Table, TableFamily};
use crate::netlink::octets;

/// A test of an address.
#[derive(Clone, Copy, Debug)]
pub enum Addr<'a> {
    /// Inside a prefix.
    In(Block),
    /// Outside a prefix, but of its family.
    NotIn(Block),
    /// In the set of that name.
    InSet(Family, &'a str),
    /// Of that family, but not in the set of that name.
    NotInSet(Family, &'a str),
}

impl Addr<'_> {
    fn family(&self) -> Family {
        match self {
            Addr::In(block) | Addr::NotIn(block) => block.family(),
            Addr::InSet(family, _) | Addr::NotInSet(family, _) => *family,
        }
    }
}

/// A test of an interface's name.
#[derive(Clone, Copy, Debug)]
pub enum Name<'a> {
    /// It is this one.
    Is(&'a str),
    /// It is any other.
    IsNot(&'a str),
    /// It begins so.
    Begins(&'a str),
    /// It does not begin so.
    BeginsNot(&'a str),
}

/// A part of a packet that is looked up, alone or as a part of a concatenated key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `iifname`
    Iifname,
    /// `ether saddr`
    EtherSaddr,
    /// `ether type`, as it stands in the frame: of a frame with a VLAN tag, that of the tag
    EtherType,
    /// `arp htype`, `arp ptype`, `arp hlen` and `arp plen`, which lie side by side
    ArpHeader,
    /// `arp saddr ether`
    ArpSaddrEther,
    /// `arp saddr ip`
    ArpSaddrIp,
    /// `arp daddr ip`
    ArpDaddrIp,
    /// `ip saddr` or `ip6 saddr`
    Saddr(Family),
    /// `ip daddr` or `ip6 daddr`
    Daddr(Family),
    /// `meta l4proto`
    L4proto,
    /// `th dport`
    Dport,
    /// `ip6 length`: what follows the IPv6 header, in bytes
    Ip6Length,
    /// Bytes of the transport header: offset, length.
    Transport(u32, u32),
}

impl Field {
    /// How it is loaded, and its length in bytes.
    fn load(self) -> (Expr, u32) {
        let payload = |base, offset, length| (Expr::Payload { base, offset, length }, length);
        let address = |family: Family| u32::from(family.bits() / 8);
        match self {
            Field::Iifname => (Expr::Meta { key: expr::META_IIFNAME }, 16),
            Field::EtherSaddr => payload(expr::BASE_LINK, 6, 6),
            Field::EtherType => payload(expr::BASE_LINK, 12, 2),
            Field::ArpHeader => payload(expr::BASE_NETWORK, 0, 6),
            Field::ArpSaddrEther => payload(expr::BASE_NETWORK, 8, 6),
            Field::ArpSaddrIp => payload(expr::BASE_NETWORK, 14, 4),
            Field::ArpDaddrIp => payload(expr::BASE_NETWORK, 24, 4),
            Field::Saddr(family) => payload(expr::BASE_NETWORK, saddr_offset(family), address(family)),
            Field::Daddr(family) => payload(expr::BASE_NETWORK, daddr_offset(family), address(family)),
            Field::L4proto => (Expr::Meta { key: expr::META_L4PROTO }, 1),
            Field::Dport => payload(expr::BASE_TRANSPORT, 2, 2),
            Field::Ip6Length => payload(expr::BASE_NETWORK, 4, 2),
            Field::Transport(offset, length) => payload(expr::BASE_TRANSPORT, offset, length),
        }
    }

    /// The family that the packet must be of for the field to exist.
    fn family(self) -> Option<Family> {
        match self {
            Field::Saddr(family) | Field::Daddr(family) => Some(family),
            Field::Ip6Length => Some(Family::IPv6),
            _ => None,
        }
    }

    fn text(self) -> String {
        match self {
            Field::Iifname => "iifname".to_owned(),
            Field::EtherSaddr => "ether saddr".to_owned(),
            Field::EtherType => "ether type".to_owned(),
            // nft shows the four of them.
            Field::ArpHeader => "arp htype . arp ptype . arp hlen . arp plen".to_owned(),
            Field::ArpSaddrEther => "arp saddr ether".to_owned(),
            Field::ArpSaddrIp => "arp saddr ip".to_owned(),
            Field::ArpDaddrIp => "arp daddr ip".to_owned(),
            Field::Saddr(family) => format!("{} saddr", keyword(family)),
            Field::Daddr(family) => format!("{} daddr", keyword(family)),
            Field::L4proto => "meta l4proto".to_owned(),
            Field::Dport => "th dport".to_owned(),
            Field::Ip6Length => "ip6 length".to_owned(),
            Field::Transport(offset, length) => format!("@th,{},{}", offset * 8, length * 8),
        }
    }
}

fn saddr_offset(family: Family) -> u32 {
    match family {
        Family::IPv4 => 12,
        Family::IPv6 => 8,
    }
}

fn daddr_offset(family: Family) -> u32 {
    match family {
        Family::IPv4 => 16,
        Family::IPv6 => 24,
    }
}

/// One rule of one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub(super) table: Table,
    pub(super) chain: String,
    pub(super) comment: Option<String>,
    expressions: Vec<Expr>,
    text: String,
    /// The family that an earlier match has already made sure of (inet and bridge tables see both).
    family: Option<Family>,
}

/// Length of an interface name with its zero byte (`IFNAMSIZ`).
const NAME_LENGTH: usize = 16;

impl Rule {
    /// A rule of that chain that matches everything and does nothing yet.
    pub fn new(table: &Table, chain: &str) -> Rule {
        Rule {
            table: table.clone(),
            chain: chain.to_owned(),
            comment: None,
            expressions: Vec::new(),
            text: String::new(),
            family: None,
        }
    }

    /// The rule in nft's language, without its chain.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The chain's table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The chain's name.
    pub fn chain(&self) -> &str {
        &self.chain
    }

    /// The rule's instructions; two rules do the same if these are equal.
    pub fn expressions(&self) -> &[Expr] {
        &self.expressions
    }

    /// `ip saddr …` or `ip6 saddr …`
    pub fn saddr(self, addr: Addr<'_>) -> Rule {
        self.address("saddr", saddr_offset(addr.family()), addr)
    }

    /// `ip daddr …` or `ip6 daddr …`
    pub fn daddr(self, addr: Addr<'_>) -> Rule {
        self.address("daddr", daddr_offset(addr.family()), addr)
    }

    /// The field has that value (in network byte order), which nft shows so.
    pub fn is(self, field: Field, value: &[u8], shown: &str) -> Rule {
        self.compare(field, Cmp::Eq, value).say(&format!("{} {shown}", field.text()))
    }

    /// The field has any other value.
    pub fn is_not(self, field: Field, value: &[u8], shown: &str) -> Rule {
        self.compare(field, Cmp::Ne, value).say(&format!("{} != {shown}", field.text()))
    }

    fn compare(self, field: Field, op: Cmp, value: &[u8]) -> Rule {
        self.load_fields(&[field]).push(Expr::Compare { op, value: value.to_vec() })
    }

    /// `ether type ip` or `ether type ip6`, in a bridge table: frames without a VLAN tag that carry that
    /// family. ([`Addr`] and [`Field::Saddr`] alone look behind a tag.) nft does not show it where a match of
    /// that family follows.
    pub fn untagged(mut self, family: Family) -> Rule {
        self.family = Some(family);
        self.compare(Field::EtherType, Cmp::Eq, &ether_type(family).to_be_bytes())
    }

    /// `ether type arp` and `arp htype 1 arp ptype ip arp hlen 6 arp plen 4`, in a bridge table: frames
    /// without a VLAN tag that carry ARP of IPv4 over Ethernet. Only then are sender and target where
    /// [`Field::ArpSaddrIp`] and the others look for them.
    pub fn untagged_arp(self) -> Rule {
        self.compare(Field::EtherType, Cmp::Eq, &0x0806u16.to_be_bytes())
            .compare(Field::ArpHeader, Cmp::Eq, &[0, 1, 8, 0, 6, 4])
            .say("arp htype 1 arp ptype ip arp hlen 6 arp plen 4")
    }

    /// `icmpv6 type …`: an ICMPv6 message of that type, which nft shows so, behind whatever extension headers.
    pub fn icmpv6_type(self, number: u8, shown: &str) -> Rule {
        const ICMPV6: u8 = 58;
        self.compare(Field::L4proto, Cmp::Eq, &[ICMPV6])
            .compare(Field::Transport(0, 1), Cmp::Eq, &[number])
            .say(&format!("icmpv6 type {shown}"))
    }

    /// `… . … @set`: these fields together are in the set.
    pub fn in_set(self, fields: &[Field], set: &str) -> Rule {
        self.load_fields(fields)
            .push(Expr::Lookup { set: set.to_owned(), inverted: false })
            .say(&format!("{} @{set}", field_texts(fields)))
    }

    /// `… . … vmap @map`: goes where the map says for these fields together.
    pub fn vmap(self, fields: &[Field], map: &str) -> Rule {
        self.load_fields(fields)
            .push(Expr::MapLookup { map: map.to_owned(), to: 0 })
            .say(&format!("{} vmap @{map}", field_texts(fields)))
    }

    /// `dnat ip to … . … map @map` (or `dnat ip6`): the destination becomes the address and port that the map
    /// has for these fields together. What the map does not have, and packets of the other family, go on.
    pub fn dnat_map(self, family: Family, fields: &[Field], map: &str) -> Rule {
        let text = format!("dnat {} to {} map @{map}", keyword(family), field_texts(fields));
        let number = if family == Family::IPv4 { TableFamily::Ip } else { TableFamily::Ip6 }.number();
        self.load_fields(fields)
            .push(Expr::MapLookup { map: map.to_owned(), to: expr::REG_1 })
            .push(Expr::Nat {
                kind: expr::NAT_DESTINATION,
                family: number.into(),
                address: Some(expr::REG_1),
                port: Some(expr::register(u32::from(family.bits() / 32))),
                flags: expr::NAT_ADDRESS_AND_PORT,
            })
            .say(&text)
    }

    fn load_fields(self, fields: &[Field]) -> Rule {
        let families = fields.iter().filter_map(|field| field.family());
        let rule = families.fold(self, Rule::of_family);
        Expr::concatenation(fields.iter().map(|field| field.load())).into_iter().fold(rule, Rule::push)
    }

    fn address(self, field: &str, offset: u32, addr: Addr<'_>) -> Rule {
        let family = addr.family();
        let load = |length| Expr::Payload { base: expr::BASE_NETWORK, offset, length };
        let keyword = keyword(family);
        let rule = self.of_family(family);
        match addr {
            Addr::InSet(_, set) | Addr::NotInSet(_, set) => {
                let inverted = matches!(addr, Addr::NotInSet(..));
                let text = format!("{keyword} {field} {}@{set}", if inverted { "!= " } else { "" });
                rule.push(load(u32::from(family.bits() / 8)))
                    .push(Expr::Lookup { set: set.to_owned(), inverted })
                    .say(&text)
            }
            Addr::In(block) | Addr::NotIn(block) => {
                let op = if matches!(addr, Addr::In(_)) { Cmp::Eq } else { Cmp::Ne };
                let value = if block.prefix_length() == family.bits() {
                    block.network().to_string()
                } else {
                    block.to_string()
                };
                let text = format!("{keyword} {field} {}{value}", if op == Cmp::Ne { "!= " } else { "" });
                rule.prefix(block, op, load).say(&text)
            }
        }
    }

    /// Compares an address with a prefix, as nft and iptables-nft do: whole bytes are loaded and compared
    /// as they are, any other length is masked first.
    fn prefix(self, block: Block, op: Cmp, load: impl Fn(u32) -> Expr) -> Rule {
        let address = octets(block.network());
        let length = block.prefix_length();
        if length.is_multiple_of(8) && length > 0 {
            let bytes = u32::from(length / 8);
            let value = address.into_iter().take(usize::from(length / 8)).collect();
            return self.push(load(bytes)).push(Expr::Compare { op, value });
        }
        let mask = (0..address.len()).map(|i| mask_byte(length, i)).collect();
        let xor = vec![0; address.len()];
        self.push(load(u32::from(block.family().bits() / 8)))
            .push(Expr::Bitwise { mask, xor })
            .push(Expr::Compare { op, value: address })
    }

    /// `iifname "…"`
    pub fn iifname(self, name: Name<'_>) -> Rule {
        self.interface("iifname", expr::META_IIFNAME, name)
    }

    /// `oifname "…"`
    pub fn oifname(self, name: Name<'_>) -> Rule {
        self.interface("oifname", expr::META_OIFNAME, name)
    }

    fn interface_start(self, field: &str, key: u32, op: Cmp, start: &str) -> Rule {
        let sign = if op == Cmp::Ne { "!= " } else { "" };
        let text = format!("{field} {sign}\"{start}*\"");
        let value = start.as_bytes().to_vec();
        self.push(Expr::Meta { key }).push(Expr::Compare { op, value }).say(&text)
    }

    fn interface(self, field: &str, key: u32, name: Name<'_>) -> Rule {
        let (op, sign, name) = match name {
            Name::Is(name) => (Cmp::Eq, "", name),
            Name::IsNot(name) => (Cmp::Ne, "!= ", name),
            Name::Begins(start) => return self.interface_start(field, key, Cmp::Eq, start),
            Name::BeginsNot(start) => return self.interface_start(field, key, Cmp::Ne, start),
        };
        let mut value = name.as_bytes().to_vec();
        // nft compares the whole of the kernel's field, iptables-nft the name and its zero byte; after
        // a save and restore by iptables a rule must still be found to be ours.
        let length = match self.table.family {
            TableFamily::Ip | TableFamily::Ip6 => name.len() + 1,
            _ => NAME_LENGTH,
        };
        value.resize(length, 0);
        let text = format!("{field} {sign}\"{name}\"");
        self.push(Expr::Meta { key }).push(Expr::Compare { op, value }).say(&text)
    }

    /// `ct state …`: any of these states. Bits: 1 invalid, 2 established, 4 related, 8 new, 64 untracked.
    pub fn ct_state(self, bits: u32) -> Rule {
        let names = [(1, "invalid"), (2, "established"), (4, "related"), (8, "new"), (64, "untracked")];
        self.any_bit("ct state", Expr::Conntrack { key: expr::CT_STATE }, bits, &names)
    }

    /// `ct status dnat`: connections whose destination was translated (Services, host ports).
    pub fn ct_status_dnat(self) -> Rule {
        self.any_bit("ct status", Expr::Conntrack { key: expr::CT_STATUS }, 32, &[(32, "dnat")])
    }

    fn any_bit(self, field: &str, load: Expr, bits: u32, names: &[(u32, &str)]) -> Rule {
        let set: Vec<&str> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
        self.push(load)
            .push(Expr::Bitwise { mask: bits.to_ne_bytes().to_vec(), xor: vec![0; 4] })
            .push(Expr::Compare { op: Cmp::Ne, value: vec![0; 4] })
            .say(&format!("{field} {}", set.join(",")))
    }

    /// `fib daddr type local`: to an address of this host.
    pub fn to_this_host(self) -> Rule {
        self.fib_type("daddr", expr::FIB_DADDR, Cmp::Eq)
    }

    /// `fib saddr type != local`: not from an address of this host.
    pub fn not_from_this_host(self) -> Rule {
        self.fib_type("saddr", expr::FIB_SADDR, Cmp::Ne)
    }

    fn fib_type(self, field: &str, flags: u32, op: Cmp) -> Rule {
        /// `RTN_LOCAL`
        const LOCAL: u32 = 2;
        let sign = if op == Cmp::Ne { "!= " } else { "" };
        self.push(Expr::Fib { result: expr::FIB_RESULT_ADDRTYPE, flags })
            .push(Expr::Compare { op, value: LOCAL.to_ne_bytes().to_vec() })
            .say(&format!("fib {field} type {sign}local"))
    }

    /// `meta mark & mask == value`
    pub fn mark(self, mask: u32, value: u32) -> Rule {
        self.push(Expr::Meta { key: expr::META_MARK })
            .push(Expr::Bitwise { mask: mask.to_ne_bytes().to_vec(), xor: vec![0; 4] })
            .push(Expr::Compare { op: Cmp::Eq, value: value.to_ne_bytes().to_vec() })
            .say(&format!("meta mark & {mask:#010x} == {value:#010x}"))
    }

    /// `meta l4proto …` and `th dport …`: packets of that protocol number to that port.
    pub fn dport(self, protocol: u8, port: u16) -> Rule {
        let name = match protocol {
            6 => "tcp",
            17 => "udp",
            132 => "sctp",
            _ => "th",
        };
        self.push(Expr::Meta { key: expr::META_L4PROTO })
            .push(Expr::Compare { op: Cmp::Eq, value: vec![protocol] })
            .push(Expr::Payload { base: expr::BASE_TRANSPORT, offset: 2, length: 2 })
            .push(Expr::Compare { op: Cmp::Eq, value: port.to_be_bytes().to_vec() })
            .say(&format!("{name} dport {port}"))
    }

    /// `counter`
    pub fn counter(self) -> Rule {
        self.push(Expr::Counter).say("counter")
    }

    /// `masquerade fully-random`: source ports are chosen at random, which keeps two connections that
    /// start at the same moment from being given one port and losing a packet.
    pub fn masquerade_fully_random(self) -> Rule {
        self.push(Expr::Masquerade { flags: expr::NAT_FULLY_RANDOM }).say("masquerade fully-random")
    }

    /// `snat ip to 192.0.2.1 fully-random` (or `snat ip6`), with source ports as in [`Rule::masquerade_fully_random`].
    pub fn snat_fully_random(self, address: IpAddr) -> Rule {
        let family = Family::of(&address);
        let number = if family == Family::IPv4 { TableFamily::Ip } else { TableFamily::Ip6 }.number();
        self.of_family(family)
            .push(Expr::Load { to: expr::REG_1, value: octets(address) })
            .push(Expr::Nat {
                kind: expr::NAT_SOURCE,
                family: number.into(),
                address: Some(expr::REG_1),
                port: None,
                flags: expr::NAT_ADDRESS | expr::NAT_FULLY_RANDOM,
            })
            .say(&format!("snat {} to {address} fully-random", keyword(family)))
    }

    /// `masquerade`
    pub fn masquerade(self) -> Rule {
        self.push(Expr::Masquerade { flags: 0 }).say("masquerade")
    }

    /// `accept`, `drop`, `return`, `jump …` or `goto …`
    pub fn verdict(self, verdict: Verdict) -> Rule {
        let text = verdict.to_string();
        self.push(Expr::Verdict(verdict)).say(&text)
    }

    /// `accept`
    pub fn accept(self) -> Rule {
        self.verdict(Verdict::Accept)
    }

    /// `drop`
    pub fn drop(self) -> Rule {
        self.verdict(Verdict::Drop)
    }

    /// `comment "…"`, for people; not part of [`Rule::text`] nor of the rule's identity.
    pub fn comment(mut self, comment: &str) -> Rule {
        self.comment = Some(comment.to_owned());
        self
    }

    /// Any other expressions, and their text.
    pub fn with(self, expressions: impl IntoIterator<Item = Expr>, text: &str) -> Rule {
        expressions.into_iter().fold(self, Rule::push).say(text)
    }

    /// Makes sure that the packet is of that family, where the table sees others too. nft writes the same
    /// match and does not show it.
    fn of_family(mut self, family: Family) -> Rule {
        if self.family == Some(family) {
            return self;
        }
        self.family = Some(family);
        match self.table.family {
            TableFamily::Inet => {
                let number = if family == Family::IPv4 { TableFamily::Ip } else { TableFamily::Ip6 }.number();
                self.push(Expr::Meta { key: expr::META_NFPROTO })
                    .push(Expr::Compare { op: Cmp::Eq, value: vec![number] })
            }
            TableFamily::Bridge | TableFamily::Netdev => {
                let value = ether_type(family).to_be_bytes().to_vec();
                self.push(Expr::Meta { key: expr::META_PROTOCOL }).push(Expr::Compare { op: Cmp::Eq, value })
            }
            TableFamily::Ip | TableFamily::Ip6 | TableFamily::Arp => self,
        }
    }

    fn push(mut self, expression: Expr) -> Rule {
        self.expressions.push(expression);
        self
    }

    fn say(mut self, text: &str) -> Rule {
        let space = if self.text.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{space}{text}");
        self
    }
}

fn ether_type(family: Family) -> u16 {
    match family {
        Family::IPv4 => 0x0800,
        Family::IPv6 => 0x86dd,
    }
}

fn field_texts(fields: &[Field]) -> String {
    fields.iter().map(|field| field.text()).collect::<Vec<_>>().join(" . ")
}

fn keyword(family: Family) -> &'static str {
    match family {
        Family::IPv4 => "ip",
        Family::IPv6 => "ip6",
    }
}

/// Byte `index` of the mask of `length` bits.
fn mask_byte(length: u8, index: usize) -> u8 {
    let bits = usize::from(length).saturating_sub(index * 8).min(8);
    (0xff00u16 >> bits).to_be_bytes()[1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_the_prefix_length_in_ones() {
        let mask = |length| (0..4).map(|i| mask_byte(length, i)).collect::<Vec<u8>>();
        assert_eq!(mask(0), [0, 0, 0, 0]);
        assert_eq!(mask(4), [0xf0, 0, 0, 0]);
        assert_eq!(mask(20), [0xff, 0xff, 0xf0, 0]);
        assert_eq!(mask(32), [0xff; 4]);
    }

    #[test]
    fn a_rule_says_in_nft_what_it_does() {
        let table = Table::new(TableFamily::Inet, "plat");
        let rule = Rule::new(&table, "postrouting")
            .saddr(Addr::InSet(Family::IPv4, "pods4"))
            .daddr(Addr::NotInSet(Family::IPv4, "nomasq4"))
            .oifname(Name::IsNot("cni0"))
            .counter()
            .masquerade_fully_random();
        assert_eq!(
            rule.text(),
            "ip saddr @pods4 ip daddr != @nomasq4 oifname != \"cni0\" counter masquerade fully-random"
        );
        let family_tests = |r: &Rule| {
            r.expressions().iter().filter(|e| matches!(e, Expr::Meta { key: expr::META_NFPROTO })).count()
        };
        assert_eq!(family_tests(&rule), 1, "the family is tested once");
    }
}
