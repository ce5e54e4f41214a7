//! Matches and targets of xtables, which iptables-nft puts into rules as they are: `struct xt_*_info` of the kernel's
//! `linux/netfilter/xt_*.h`. Pure.
//!
//! Numbers in them are in the machine's byte order but for addresses and the like. Whatever is not read here to the last
//! flag is `None`: not understood.

use plat_cni::netlink::Attributes;
use plat_crds::block::Family;

use super::bits::{self, Answer, Byte};
use super::ops::Nat;
use super::packet::{Connection, Packet};

/// A match that is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// `-m comment`: holds always.
    Comment(String),
    /// `-m conntrack --ctstate`: any of these states (`XT_CONNTRACK_STATE_*`).
    State {
        /// The states.
        any: u16,
        /// Whether none of them is wanted.
        inverted: bool,
    },
    /// `-m mark`: the mark with that mask is this.
    Mark {
        /// The mask, as four bytes of the machine's order.
        mask: [u8; 4],
        /// The value.
        value: [u8; 4],
        /// Whether any other is wanted.
        inverted: bool,
    },
    /// `-m addrtype` without `--limit-iface-…`: any of these types (a bit for each `RTN_*`).
    AddressType {
        /// Types of the source; 0: any.
        source: u16,
        /// Whether none of them is wanted.
        not_source: bool,
        /// Types of the destination; 0: any.
        destination: u16,
        /// Whether none of them is wanted.
        not_destination: bool,
    },
    /// `-m tcp`, without TCP options.
    Tcp {
        /// First and last port of the source.
        source: [u16; 2],
        /// Of the destination.
        destination: [u16; 2],
        /// Mask of flags, and what they are to be.
        flags: [u8; 2],
        /// Which of the three are inverted (1, 2, 4).
        inverted: u8,
    },
    /// Only for packets of that protocol, so never for ours.
    OtherProtocol(String),
    /// `-m multiport`
    Ports {
        /// 0 source, 1 destination, 2 either.
        which: u8,
        /// First and last ports.
        ranges: Vec<[u16; 2]>,
        /// Whether none of them is wanted.
        inverted: bool,
    },
    /// `-m iprange`
    Addresses {
        /// First and last source, and whether any other is wanted.
        source: Option<([u8; 16], [u8; 16], bool)>,
        /// First and last destination, and whether any other is wanted.
        destination: Option<([u8; 16], [u8; 16], bool)>,
    },
    /// `-m rpfilter`: whether replies would leave by the link that the packet came by. They would: the links of
    /// a synthetic packet are those of the kernel's routes.
    ReversePath {
        /// Whether only packets that fail are wanted.
        inverted: bool,
    },
    /// `-j MARK`: not a test, sets the mark.
    SetMark {
        /// Bits that are kept.
        mask: [u8; 4],
        /// Bits that are turned.
        xor: [u8; 4],
    },
    /// `-j CONNMARK --restore-mark`: not a test, the mark becomes one that is not known.
    SpoilMark,
}

/// What a target does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing about where the packet goes.
    Pass,
    /// Drops it and tells.
    Reject,
    /// No connection tracking.
    Untrack,
    /// Translates an address.
    Nat(Nat),
    /// Sets the mark.
    Mark {
        /// Bits that are kept.
        mask: [u8; 4],
        /// Bits that are turned.
        xor: [u8; 4],
    },
    /// Sets the mark to something that is not known.
    UnknownMark,
}

/// Name of the match or target.
pub fn name(data: &Attributes<'_>) -> String {
    data.find(1).map(|name| name.text().into_owned()).unwrap_or_default()
}

/// The structure of a match or target, read from its start.
struct Info<'a>(&'a [u8]);

impl Info<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn half(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_ne_bytes)
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_ne_bytes)
    }
}

/// Reads a match; `None` if it is not understood.
pub fn read_match(data: &Attributes<'_>) -> Option<Match> {
    let revision = data.find(2).and_then(|revision| revision.be32())?;
    let info = Info(data.find(3)?.value);
    match (name(data).as_str(), revision) {
        ("comment", _) => data.find(3).map(|info| Match::Comment(info.text().into_owned())),
        ("conntrack", 3) => conntrack(&info),
        ("state", 0) => Some(Match::State { any: u16::try_from(info.word(0)?).ok()?, inverted: false }),
        ("mark", 1) => {
            Some(Match::Mark { value: info.bytes(0)?, mask: info.bytes(4)?, inverted: info.byte(8)? != 0 })
        }
        ("addrtype", 1) => address_type(&info),
        ("tcp", 0) => tcp(&info),
        ("udp" | "udplite" | "icmp" | "icmp6" | "sctp" | "dccp" | "ah" | "esp", _) => {
            Some(Match::OtherProtocol(name(data)))
        }
        ("multiport", 1) => multiport(&info),
        ("iprange", 1) => addresses(&info),
        ("rpfilter", 0) => {
            const INVERT: u8 = 1 << 3;
            Some(Match::ReversePath { inverted: info.byte(0)? & INVERT != 0 })
        }
        _ => None,
    }
}

/// `struct xt_conntrack_mtinfo3`, for the state alone.
fn conntrack(info: &Info<'_>) -> Option<Match> {
    const STATE: u16 = 1;
    const STATE_ALIAS: u16 = 1 << 13;
    let (flags, inverted) = (info.half(146)?, info.half(148)?);
    if flags & !STATE_ALIAS != STATE {
        return None;
    }
    Some(Match::State { any: info.half(150)?, inverted: inverted & STATE != 0 })
}

/// `struct xt_addrtype_info_v1`
fn address_type(info: &Info<'_>) -> Option<Match> {
    let flags = info.word(4)?;
    if flags & !3 != 0 {
        return None;
    }
    Some(Match::AddressType {
        source: info.half(0)?,
        not_source: flags & 1 != 0,
        destination: info.half(2)?,
        not_destination: flags & 2 != 0,
    })
}

/// `struct xt_tcp`
fn tcp(info: &Info<'_>) -> Option<Match> {
    const OPTION: u8 = 8;
    let inverted = info.byte(11)?;
    if info.byte(8)? != 0 || inverted & OPTION != 0 {
        return None;
    }
    Some(Match::Tcp {
        source: [info.half(0)?, info.half(2)?],
        destination: [info.half(4)?, info.half(6)?],
        flags: info.bytes(9)?,
        inverted,
    })
}

/// `struct xt_multiport_v1`
fn multiport(info: &Info<'_>) -> Option<Match> {
    const MAX: u8 = 15;
    let (which, count) = (info.byte(0)?, info.byte(1)?);
    if which > 2 || count > MAX {
        return None;
    }
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < usize::from(count) {
        let first = info.half(2 + 2 * at)?;
        let is_range = info.byte(32 + at)? != 0;
        let last = if is_range { info.half(2 + 2 * (at + 1))? } else { first };
        ranges.push([first, last]);
        at += if is_range { 2 } else { 1 };
    }
    Some(Match::Ports { which, ranges, inverted: info.byte(47)? != 0 })
}

/// `struct xt_iprange_mtinfo`
fn addresses(info: &Info<'_>) -> Option<Match> {
    const SOURCE: u8 = 1;
    const DESTINATION: u8 = 2;
    const NOT_SOURCE: u8 = 1 << 4;
    const NOT_DESTINATION: u8 = 1 << 5;
    let flags = info.byte(64)?;
    let read = |wanted: u8, inverted: u8, at: usize| {
        let range = (info.bytes(at)?, info.bytes(at + 16)?, flags & inverted != 0);
        Some((flags & wanted != 0).then_some(range))
    };
    Some(Match::Addresses {
        source: read(SOURCE, NOT_SOURCE, 0)?,
        destination: read(DESTINATION, NOT_DESTINATION, 32)?,
    })
}

/// Reads a target; `None` if it is not understood.
pub fn read_target(data: &Attributes<'_>) -> Option<Target> {
    let revision = data.find(2).and_then(|revision| revision.be32())?;
    let info = Info(data.find(3)?.value);
    Some(match (name(data).as_str(), revision) {
        ("REJECT", _) => Target::Reject,
        ("LOG" | "NFLOG" | "ULOG" | "AUDIT" | "TRACE" | "TCPMSS" | "TCPOPTSTRIP" | "CLASSIFY", _)
        | ("CHECKSUM" | "DSCP" | "TOS" | "TTL" | "HL" | "SECMARK" | "CONNSECMARK" | "TEE" | "SET", _)
        | ("HMARK" | "IDLETIMER" | "LED" | "RATEEST" | "ECN", _) => Target::Pass,
        ("NOTRACK", _) => Target::Untrack,
        // struct xt_ct_target_info: zone, flags.
        ("CT", _) => {
            const NOTRACK: u16 = 1;
            if info.half(0)? & NOTRACK != 0 { Target::Untrack } else { Target::Pass }
        }
        ("MASQUERADE" | "SNAT", _) => Target::Nat(Nat::Source),
        ("DNAT" | "REDIRECT" | "NETMAP", _) => Target::Nat(Nat::Destination),
        // struct xt_mark_tginfo2: mark, mask; mark = mark & ~mask ^ value.
        ("MARK", 2) => {
            let (value, mask) = (info.bytes::<4>(0)?, info.bytes::<4>(4)?);
            Target::Mark { mask: mask.map(|byte| !byte), xor: value }
        }
        // struct xt_connmark_tginfo1 and 2: mark, two masks, mode.
        ("CONNMARK", 1 | 2) => {
            const RESTORE: u8 = 2;
            if info.byte(12)? == RESTORE { Target::UnknownMark } else { Target::Pass }
        }
        _ => return None,
    })
}

/// Where in connection tracking a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Before it.
    Not,
    /// In it.
    Tracked,
    /// Taken out of it.
    Untracked,
    /// One of the above.
    Unknown,
}

/// The bits of `ct state` (and, but for the last, of `--ctstate`).
pub mod state {
    /// No connection.
    pub const INVALID: u16 = 1;
    /// An answer was seen.
    pub const ESTABLISHED: u16 = 2;
    /// A first packet.
    pub const NEW: u16 = 8;
    /// Exempt, in nft's numbers.
    pub const UNTRACKED: u16 = 64;
    /// Exempt, in xtables' numbers.
    pub const XT_UNTRACKED: u16 = 256;
}

/// The state of the packet's connection (`NF_CT_STATE_BIT`); `None` if it is not known.
pub fn connection_state(packet: &Packet, tracking: Tracking, untracked: u16) -> Option<u16> {
    match (tracking, packet.connection) {
        (Tracking::Not, _) => Some(state::INVALID),
        (Tracking::Untracked, _) => Some(untracked),
        (Tracking::Tracked, Connection::New) => Some(state::NEW),
        (Tracking::Tracked, Connection::Established) => Some(state::ESTABLISHED),
        (Tracking::Unknown, _) => None,
    }
}

/// Whether the match holds for the packet.
pub fn holds(found: &Match, packet: &Packet, mark: [Byte; 4], tracking: Tracking) -> Answer {
    match found {
        Match::Comment(_) | Match::SetMark { .. } | Match::SpoilMark => Answer::Yes,
        Match::OtherProtocol(_) => Answer::No,
        Match::State { any, inverted } => {
            let at = connection_state(packet, tracking, state::XT_UNTRACKED);
            at.map_or(Answer::Unknown, |at| Answer::of(at & any != 0)).turned(*inverted)
        }
        Match::Mark { mask, value, inverted } => {
            let mut masked = mark;
            masked.iter_mut().zip(mask).for_each(|(byte, mask)| *byte = byte.masked(*mask, 0));
            bits::equal(&masked, value).turned(*inverted)
        }
        // Neither end is this host's or a broadcast address.
        Match::AddressType { source, not_source, destination, not_destination } => {
            const UNICAST: u16 = 1 << 1;
            let test = |types: u16, not: bool| types == 0 || ((types & UNICAST != 0) != not);
            Answer::of(test(*source, *not_source) && test(*destination, *not_destination))
        }
        Match::Tcp { source, destination, flags, inverted } => {
            let port = |at, range: &[u16; 2], bit| port_is(packet, at, range).turned(inverted & bit != 0);
            let [mask, wanted] = *flags;
            let there = packet.transport.get(13).map(|byte| byte.masked(mask, 0));
            let flags = there.map_or(Answer::Unknown, |byte| bits::equal(&[byte], &[wanted]));
            port(0, source, 1).and(port(2, destination, 2)).and(flags.turned(inverted & 4 != 0))
        }
        Match::Ports { which, ranges, inverted } => {
            let any = |at| ranges.iter().any(|range| port_is(packet, at, range) == Answer::Yes);
            let found = (*which != 1 && any(0)) || (*which != 0 && any(2));
            Answer::of(found).turned(*inverted)
        }
        Match::Addresses { source, destination } => {
            let offsets = if packet.family() == Family::IPv4 { [12, 16] } else { [8, 24] };
            let test = |range: &Option<([u8; 16], [u8; 16], bool)>, at: usize| match range {
                None => Answer::Yes,
                Some((low, high, inverted)) => address_within(packet, at, low, high).turned(*inverted),
            };
            let [from, to] = offsets;
            test(source, from).and(test(destination, to))
        }
        Match::ReversePath { inverted } => Answer::of(!inverted),
    }
}

fn port_is(packet: &Packet, at: usize, [first, last]: &[u16; 2]) -> Answer {
    packet
        .transport
        .get(at..at + 2)
        .map_or(Answer::Unknown, |port| bits::within(port, &first.to_be_bytes(), &last.to_be_bytes()))
}

fn address_within(packet: &Packet, at: usize, low: &[u8; 16], high: &[u8; 16]) -> Answer {
    let length = usize::from(packet.family().bits() / 8);
    match (packet.network.get(at..at + length), low.get(..length), high.get(..length)) {
        (Some(address), Some(low), Some(high)) => bits::within(address, low, high),
        _ => Answer::Unknown,
    }
}
