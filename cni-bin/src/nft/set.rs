//! Sets and maps, and their elements.

use std::fmt;
use std::net::IpAddr;

use plat_crds::{Block, Family};

use super::Table;
use super::expr::Verdict;
use crate::netlink::{Attribute, Message, octets, to_address};

const FLAG_INTERVAL: u32 = 4;
const FLAG_MAP: u32 = 8;
const FLAG_CONCAT: u32 = 0x80;
/// `NFT_DATA_VERDICT`: the map's values are verdicts.
const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENT_INTERVAL_END: u32 = 1;
const DATA_VALUE: u16 = 1;
/// Each part of a concatenated key takes this many bits of the key's type.
const TYPE_BITS: u32 = 6;

/// What an element's key (or a map's value) is made of; the numbers are nft's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// `ipv4_addr`
    Ipv4,
    /// `ipv6_addr`
    Ipv6,
    /// `ether_addr`
    Ether,
    /// `inet_proto`
    Protocol,
    /// `inet_service`
    Port,
    /// `ifname`
    Interface,
    /// Bytes of the transport header that nft has no name for: offset, length. To be used behind
    /// [`KeyType::Interface`]; nft shows the two as `typeof iifname . @th,…`.
    Transport(u32, u32),
}

impl KeyType {
    fn number(self) -> u32 {
        match self {
            KeyType::Ipv4 => 7,
            KeyType::Ipv6 => 8,
            KeyType::Ether => 9,
            KeyType::Protocol => 12,
            KeyType::Port => 13,
            KeyType::Interface => 41,
            KeyType::Transport(..) => 4,
        }
    }

    fn length(self) -> u32 {
        match self {
            KeyType::Ipv4 => 4,
            KeyType::Ipv6 | KeyType::Interface => 16,
            KeyType::Ether => 6,
            KeyType::Protocol => 1,
            KeyType::Port => 2,
            KeyType::Transport(_, length) => length,
        }
    }

    fn text(self, bytes: &[u8]) -> String {
        let hex =
            |separator: &str| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(separator);
        match (self, bytes) {
            (KeyType::Protocol, [6]) => "tcp".to_owned(),
            (KeyType::Protocol, [17]) => "udp".to_owned(),
            (KeyType::Protocol, [132]) => "sctp".to_owned(),
            (KeyType::Protocol, [number]) => number.to_string(),
            (KeyType::Port, [high, low]) => u16::from_be_bytes([*high, *low]).to_string(),
            (KeyType::Interface, name) => {
                let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
                format!("\"{}\"", String::from_utf8_lossy(name.get(..end).unwrap_or_default()))
            }
            (KeyType::Ether, _) => hex(":"),
            (KeyType::Ipv4 | KeyType::Ipv6, _) => {
                to_address(bytes).map_or_else(|| hex(""), |a| a.to_string())
            }
            (KeyType::Protocol | KeyType::Port | KeyType::Transport(..), _) => hex(""),
        }
    }

    /// The type of an address of that family.
    pub fn of(family: Family) -> KeyType {
        match family {
            Family::IPv4 => KeyType::Ipv4,
            Family::IPv6 => KeyType::Ipv6,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Nothing,
    Verdict,
    Data(Vec<KeyType>),
}

/// A named set, or a map if it has values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub(super) table: Table,
    pub(super) name: String,
    key: Vec<KeyType>,
    intervals: bool,
    value: Value,
}

impl Set {
    /// A set of single keys; several parts make a concatenated key (`ipv4_addr . inet_service`).
    pub fn of(table: &Table, name: &str, key: &[KeyType]) -> Set {
        Set {
            table: table.clone(),
            name: name.to_owned(),
            key: key.to_vec(),
            intervals: false,
            value: Value::Nothing,
        }
    }

    /// A set of address prefixes (`flags interval`), filled by [`super::Batch::add_prefixes`].
    pub fn prefixes(table: &Table, name: &str, family: Family) -> Set {
        Set { intervals: true, ..Set::of(table, name, &[KeyType::of(family)]) }
    }

    /// A map from keys to verdicts.
    pub fn verdicts(table: &Table, name: &str, key: &[KeyType]) -> Set {
        Set { value: Value::Verdict, ..Set::of(table, name, key) }
    }

    /// A map from keys to values.
    pub fn map(table: &Table, name: &str, key: &[KeyType], value: &[KeyType]) -> Set {
        Set { value: Value::Data(value.to_vec()), ..Set::of(table, name, key) }
    }

    /// The set's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The set's table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Whether it is a map to data (and not to verdicts).
    pub fn maps_to_data(&self) -> bool {
        matches!(self.value, Value::Data(_))
    }

    /// An element's key in nft's words.
    pub fn key_text(&self, element: &Element) -> String {
        let mut rest = element.key.as_slice();
        let mut parts = Vec::new();
        for part in &self.key {
            let length = part.length();
            let whole = if self.key.len() > 1 { length.next_multiple_of(4) } else { length };
            let take = |length: u32| usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let (bytes, behind) = rest.split_at(take(whole));
            parts.push(part.text(bytes.get(..take(length)).unwrap_or_default()));
            rest = behind;
        }
        parts.join(" . ")
    }

    /// Writes the attributes of `NFT_MSG_NEWSET`; `id` is its number inside the transaction.
    pub(super) fn encode(&self, message: &mut Message, id: u32) {
        let mut flags = 0;
        flags |= if self.intervals { FLAG_INTERVAL } else { 0 };
        flags |= if self.value == Value::Nothing { 0 } else { FLAG_MAP };
        flags |= if self.key.len() > 1 { FLAG_CONCAT } else { 0 };
        let (kind, length) = type_and_length(&self.key);
        message.attr_str(1, &self.table.name).attr_str(2, &self.name).attr_be32(3, flags);
        message.attr_be32(4, kind).attr_be32(5, length).attr_be32(10, id);
        match &self.value {
            Value::Nothing => {}
            Value::Verdict => {
                message.attr_be32(6, DATA_TYPE_VERDICT).attr_be32(7, 0);
            }
            Value::Data(parts) => {
                let (kind, length) = type_and_length(parts);
                message.attr_be32(6, kind).attr_be32(7, length);
            }
        }
        if let Some(notes) = notes_for_nft(&self.key) {
            message.attr(13, &notes);
        }
        if self.key.len() > 1 {
            // NFTA_SET_DESC with the length of each part, which the kernel wants for concatenations.
            message.nest(9, |m| {
                m.nest(2, |m| {
                    for part in &self.key {
                        m.nest(1, |m| {
                            m.attr_be32(1, part.length());
                        });
                    }
                });
            });
        }
    }
}

/// What the kernel keeps for nft alone (`NFTA_SET_USERDATA`), where nft cannot read a set without: fields of
/// type, length and value, numbers in the machine's byte order, numbered as in nftables' own source
/// (`NFTNL_UDATA_SET_*`, `enum expr_types`, `enum nft_meta_keys`).
fn notes_for_nft(key: &[KeyType]) -> Option<Vec<u8>> {
    const BYTE_ORDER: u8 = 0;
    const TYPE_OF: u8 = 3;
    let field = |kind: u8, value: &[u8]| {
        let length = u8::try_from(value.len()).unwrap_or(u8::MAX);
        [&[kind, length], value].concat()
    };
    let number = |kind: u8, value: u32| field(kind, &value.to_ne_bytes());
    // An expression: its kind, and what it is of.
    let expression = |kind: u32, data: &[Vec<u8>]| [number(0, kind), field(1, &data.concat())].concat();
    match *key {
        // A name is no number in network byte order.
        [KeyType::Interface] => Some(number(BYTE_ORDER, 1)),
        [KeyType::Interface, KeyType::Transport(offset, length)] => {
            let (meta, payload, concatenation) = (9, 7, 13);
            let iifname = expression(meta, &[number(0, super::expr::META_IIFNAME)]);
            // No protocol and no field of it, base 3 (transport header), offset and length in bits.
            let raw = [(0, 0), (1, 0), (2, 3), (3, offset * 8), (4, length * 8)];
            let raw = expression(payload, &raw.map(|(kind, value)| number(kind, value)));
            let both = expression(concatenation, &[field(0, &iifname), field(1, &raw)]);
            Some([number(BYTE_ORDER, 0), field(TYPE_OF, &both)].concat())
        }
        _ => None,
    }
}

fn type_and_length(parts: &[KeyType]) -> (u32, u32) {
    let kind = parts.iter().fold(0u32, |kind, part| (kind << TYPE_BITS) | part.number());
    // In a concatenation each part starts at a multiple of four bytes.
    let length = match parts {
        [part] => part.length(),
        parts => parts.iter().map(|part| part.length().next_multiple_of(4)).sum(),
    };
    (kind, length)
}

/// As in `inet plat-pods masq4`.
impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.table, self.name)
    }
}

/// One element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    key: Vec<u8>,
    ends_interval: bool,
    value: ElementValue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ElementValue {
    Nothing,
    Verdict(Verdict),
    Data(Vec<u8>),
}

impl Element {
    /// An address.
    pub fn address(address: IpAddr) -> Element {
        Element::key(&[&octets(address)])
    }

    /// The bytes of an interface's name as a key (`IFNAMSIZ`).
    pub fn interface(name: &str) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
        bytes
    }

    /// A key of these parts, each in network byte order.
    pub fn key(parts: &[&[u8]]) -> Element {
        Element { key: concatenate(parts), ends_interval: false, value: ElementValue::Nothing }
    }

    /// The same key with a verdict.
    pub fn verdict(self, verdict: Verdict) -> Element {
        Element { value: ElementValue::Verdict(verdict), ..self }
    }

    /// The same key with a value of these parts.
    pub fn value(self, parts: &[&[u8]]) -> Element {
        Element { value: ElementValue::Data(concatenate(parts)), ..self }
    }

    /// The key's bytes.
    pub fn key_bytes(&self) -> &[u8] {
        &self.key
    }

    /// The bytes of the value, if it is data.
    pub fn value_bytes(&self) -> Option<&[u8]> {
        match &self.value {
            ElementValue::Data(bytes) => Some(bytes),
            ElementValue::Nothing | ElementValue::Verdict(_) => None,
        }
    }

    /// The same key without a value.
    pub fn key_only(&self) -> Element {
        Element::key(&[&self.key])
    }

    /// Reads one element of `NFTA_SET_ELEM_LIST_ELEMENTS`.
    pub fn decode(element: Attribute<'_>) -> Option<Element> {
        let element = element.nested();
        let key = element.find(ELEMENT_KEY)?.nested().find(DATA_VALUE)?.value.to_vec();
        let flags = element.find(ELEMENT_FLAGS).and_then(|f| f.be32()).unwrap_or(0);
        let value = match element.find(ELEMENT_DATA) {
            None => ElementValue::Nothing,
            Some(data) => match data.nested().find(DATA_VALUE) {
                Some(value) => ElementValue::Data(value.value.to_vec()),
                None => ElementValue::Verdict(Verdict::decode(data)?),
            },
        };
        Some(Element { key, ends_interval: flags & ELEMENT_INTERVAL_END != 0, value })
    }

    /// Writes one element of `NFTA_SET_ELEM_LIST_ELEMENTS`.
    pub fn encode(&self, message: &mut Message) {
        message.nest(1, |m| {
            if self.ends_interval {
                m.attr_be32(ELEMENT_FLAGS, ELEMENT_INTERVAL_END);
            }
            m.nest(ELEMENT_KEY, |m| {
                m.attr(DATA_VALUE, &self.key);
            });
            match &self.value {
                ElementValue::Nothing => {}
                ElementValue::Verdict(verdict) => verdict.encode(ELEMENT_DATA, m),
                ElementValue::Data(data) => {
                    m.nest(ELEMENT_DATA, |m| {
                        m.attr(DATA_VALUE, data);
                    });
                }
            }
        });
    }
}

fn concatenate(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(part);
        if parts.len() > 1 {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// The elements of an interval set that holds these prefixes: sorted, and merged where they overlap or
/// touch, as the kernel refuses overlaps. An interval is a first key and, unless it reaches the highest
/// address, an end mark one behind the last. Prefixes of the other family are left out.
pub(super) fn intervals(family: Family, prefixes: &[Block]) -> Vec<Element> {
    let mut elements = Vec::new();
    let mut merged: Vec<(u128, u128)> = prefixes
        .iter()
        .filter(|p| p.family() == family)
        .map(|p| (to_int(p.net().network()), to_int(p.net().broadcast())))
        .collect();
    merged.sort_unstable();
    merged.dedup_by(|next, kept| {
        let touches = next.0 <= kept.1.saturating_add(1);
        if touches {
            kept.1 = kept.1.max(next.1);
        }
        touches
    });
    let last = if family == Family::IPv4 { u128::from(u32::MAX) } else { u128::MAX };
    for (first, end) in merged {
        elements.push(Element::key(&[&to_bytes(family, first)]));
        if end < last {
            let mut mark = Element::key(&[&to_bytes(family, end + 1)]);
            mark.ends_interval = true;
            elements.push(mark);
        }
    }
    elements
}

fn to_int(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn to_bytes(family: Family, value: u128) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    let skip = bytes.len() - usize::from(family.bits() / 8);
    bytes.into_iter().skip(skip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(family: Family, prefixes: &[&str]) -> Vec<String> {
        let blocks: Vec<Block> = prefixes.iter().map(|p| p.parse().unwrap()).collect();
        intervals(family, &blocks)
            .iter()
            .map(|e| {
                let address = match e.key.len() {
                    4 => IpAddr::from(<[u8; 4]>::try_from(e.key.as_slice()).unwrap()),
                    _ => IpAddr::from(<[u8; 16]>::try_from(e.key.as_slice()).unwrap()),
                };
                format!("{}{address}", if e.ends_interval { "-" } else { "" })
            })
            .collect()
    }

    #[test]
    fn prefixes_become_sorted_disjoint_intervals() {
        assert_eq!(
            shown(Family::IPv4, &["10.1.0.0/24", "10.0.0.0/24"]),
            ["10.0.0.0", "-10.0.1.0", "10.1.0.0", "-10.1.1.0"]
        );
        // Inside one another, touching, and the other family.
        assert_eq!(
            shown(Family::IPv4, &["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/16", "fd00::/8"]),
            ["10.0.0.0", "-11.1.0.0"]
        );
        assert_eq!(shown(Family::IPv4, &["255.255.255.0/24"]), ["255.255.255.0"]);
        assert_eq!(shown(Family::IPv6, &["fd00::/64", "ff00::/8"]), ["fd00::", "-fd00:0:0:1::", "ff00::"]);
        assert!(shown(Family::IPv6, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn an_address_is_inside_the_intervals_exactly_if_a_prefix_holds_it(
            nets in proptest::collection::vec((any::<u8>(), 24u8..=32), 0..20), probe: u8
        ) {
            let blocks: Vec<Block> =
                nets.iter().map(|&(a, p)| Block::of([10, 0, 0, a].into(), p).unwrap()).collect();
            let probe = IpAddr::from([10, 0, 0, probe]);
            let elements = intervals(Family::IPv4, &blocks);
            let below = elements.iter().rfind(|e| e.key <= octets(probe));
            prop_assert_eq!(below.is_some_and(|e| !e.ends_interval), blocks.iter().any(|b| b.contains(&probe)));
            prop_assert!(elements.windows(2).all(|w| w[0].key < w[1].key));
        }
    }
}
