//! Policy rules (`ip rule`): which packets look in which routing table.
//!
//! Ours bear our protocol number (`FRA_PROTOCOL`) and are for all packets: what a table of ours holds is
//! routes to blocks and nothing else, so everything else looks on. Rules of others are read only to tell
//! whose a table is.

use std::collections::{BTreeMap, BTreeSet};

use plat_cni::netlink::{CREATE, EXCL, Error, Message, Socket, created, deleted};
use plat_crds::block::Family;
use plat_crds::names::ROUTE_PROTOCOL;
use rtnetlink::packet_core::Parseable;
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::route;
use crate::fabric::{Packets, Rule};

/// `RT_TABLE_UNSPEC`: the attribute says the table, as it may not fit into the header.
const TABLE_IN_ATTRIBUTE: u8 = 0;

/// A rule of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// The rule.
    pub rule: Rule,
    /// Who made it, as a routing protocol number.
    pub protocol: u8,
}

impl Found {
    /// The rule, if it is ours.
    pub fn ours(&self) -> Option<Rule> {
        (self.protocol == ROUTE_PROTOCOL).then_some(self.rule)
    }
}

/// The rules of everybody that lead to a table.
pub fn dump(socket: &mut Socket) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let request = message(Verb::Get, &header(family), 0, format!("list {family} rules"));
        match socket.dump(&request, |received| read(received.payload)) {
            Ok(rules) => found.extend(rules.into_iter().filter(|found| found.rule.family == family)),
            // A kernel without the family, or without rules.
            Err(error) if matches!(error.errno(), Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Which of these tables other programs use, and how.
pub fn users(socket: &mut Socket, tables: &BTreeSet<u32>) -> Result<BTreeMap<u32, String>, Error> {
    let mut users = BTreeMap::new();
    if tables.is_empty() {
        return Ok(users);
    }
    for found in dump(socket)?.into_iter().filter(|found| found.ours().is_none()) {
        let who = format!("rule {} of protocol {}", found.rule.priority, found.protocol);
        users.insert(found.rule.table, who);
    }
    users.retain(|table, _| tables.contains(table));
    for table in tables {
        if let Some(who) = route::foreign_in(socket, *table)? {
            users.insert(*table, who);
        }
    }
    Ok(users)
}

/// Adds a rule; one that is there already is success.
pub fn add(socket: &mut Socket, rule: &Rule) -> Result<(), Error> {
    let request = message(Verb::New, &write(rule), CREATE | EXCL, format!("add {rule}"));
    created(socket.request(request)).map(drop)
}

/// Deletes a rule of ours; returns whether it was there.
pub fn delete(socket: &mut Socket, rule: &Rule) -> Result<bool, Error> {
    let request = message(Verb::Delete, &write(rule), 0, format!("delete {rule}"));
    deleted(socket.request(request))
}

enum Verb {
    Get,
    New,
    Delete,
}

fn message(verb: Verb, content: &RuleMessage, flags: u16, what: String) -> Message {
    let content = content.clone();
    let content = match verb {
        Verb::Get => RouteNetlinkMessage::GetRule(content),
        Verb::New => RouteNetlinkMessage::NewRule(content),
        Verb::Delete => RouteNetlinkMessage::DelRule(content),
    };
    route::message(&content, flags, what)
}

fn header(family: Family) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match family {
        Family::IPv4 => AddressFamily::Inet,
        Family::IPv6 => AddressFamily::Inet6,
    };
    message
}

/// For a delete, what names the rule: the kernel takes the first that has all of it.
fn write(rule: &Rule) -> RuleMessage {
    let mut message = header(rule.family);
    message.header.action = RuleAction::ToTable;
    message.header.table = TABLE_IN_ATTRIBUTE;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    message
}

/// `None` for what leads to no table (`goto`, `unreachable`), or cannot be read.
fn read(payload: &[u8]) -> Option<Found> {
    let message = RuleMessage::parse(payload).ok()?;
    let family = match message.header.family {
        AddressFamily::Inet => Family::IPv4,
        AddressFamily::Inet6 => Family::IPv6,
        _ => return None,
    };
    if message.header.action != RuleAction::ToTable {
        return None;
    }
    let fixed = &message.header;
    let narrowed = fixed.dst_len != 0 || fixed.src_len != 0 || fixed.tos != 0;
    let mut packets =
        if narrowed || fixed.flags.contains(RuleFlags::Invert) { Packets::Other } else { Packets::All };
    let (mut priority, mut table, mut protocol) = (0, u32::from(fixed.table), 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Protocol(value) => protocol = u8::from(*value),
            // "Nothing is suppressed", which the kernel always says.
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => packets = Packets::Other,
        }
    }
    Some(Found { rule: Rule { family, priority, table, packets }, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rtnetlink::packet_core::Emitable;

    fn payload(message: &RuleMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    proptest! {
        #[test]
        fn a_rule_reads_back_as_it_was_written(v6: bool, priority: u32, table: u32) {
            let family = if v6 { Family::IPv6 } else { Family::IPv4 };
            let rule = Rule { family, priority, table, packets: Packets::All };
            let found = read(&payload(&write(&rule)));
            prop_assert_eq!(found, Some(Found { rule, protocol: ROUTE_PROTOCOL }));
        }

        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn a_rule_for_some_packets_only_is_none_that_we_make() {
        let rule = Rule::to(Family::IPv4, 1000);
        let packets = |change: fn(&mut RuleMessage)| {
            let mut message = write(&rule);
            change(&mut message);
            read(&payload(&message)).map(|found| found.rule.packets)
        };
        assert_eq!(packets(|_| {}), Some(Packets::All));
        assert_eq!(packets(|m| m.attributes.push(RuleAttribute::FwMark(1))), Some(Packets::Other));
        assert_eq!(
            packets(|m| m.attributes.push(RuleAttribute::Iifname("eth0".into()))),
            Some(Packets::Other)
        );
        assert_eq!(packets(|m| m.header.flags = RuleFlags::Invert), Some(Packets::Other));
        assert_eq!(packets(|m| m.header.src_len = 8), Some(Packets::Other));
        assert_eq!(packets(|m| m.header.action = RuleAction::Unreachable), None);
    }
}
