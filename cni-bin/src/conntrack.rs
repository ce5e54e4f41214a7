//! Connection tracking by netlink (`linux/netfilter/nfnetlink_conntrack.h`): which UDP flows the kernel
//! remembers, and making it forget some.
//!
//! Rules that translate addresses are asked for the first packet of a flow only. UDP has no end, so a
//! client that goes on sending keeps what was decided before a rule came or after it went. Whoever changes
//! such rules makes the kernel forget the flows that they are about.

use std::net::IpAddr;

use plat_crds::Family;

use crate::netlink::{Attributes, Error, Message, Received, Socket, deleted, to_address};

/// `NFNL_SUBSYS_CTNETLINK`, the high byte of every message type.
const SUBSYSTEM: u16 = 1;
const NEW: u16 = SUBSYSTEM << 8;
const GET: u16 = NEW + 1;
const DELETE: u16 = NEW + 2;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE_PORT: u16 = 2;
const PROTO_DESTINATION_PORT: u16 = 3;
const FILTER_ORIGINAL: u16 = 1;
const FILTER_REPLY: u16 = 2;
/// `CTA_FILTER_F_CTA_PROTO_NUM`
const BY_PROTOCOL: u32 = 1 << 3;
/// `CTA_FILTER_F_CTA_PROTO_DST_PORT`
const BY_DESTINATION_PORT: u32 = 1 << 5;
const UDP: u8 = 17;

/// A UDP flow that the kernel remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Where its first packet went, before any translation.
    pub destination: (IpAddr, u16),
    /// Who answers it: the destination after translation.
    pub answers: (IpAddr, u16),
    /// What names it to the kernel: attributes as the kernel sent them.
    name: Vec<(u16, Vec<u8>)>,
}

fn header(family: Family) -> [u8; 4] {
    let number = match family {
        Family::IPv4 => 2,
        Family::IPv6 => 10,
    };
    [number, 0, 0, 0]
}

/// The UDP flows of that family, only those to that port if one is given. (The kernel reads its whole table
/// either way.) Kernels before 5.8 do not know the filter and tell of all flows; so does this then, but of
/// UDP alone.
pub fn udp_flows(socket: &mut Socket, family: Family, port: Option<u16>) -> Result<Vec<Flow>, Error> {
    let mut get = Message::new(GET, 0, &header(family), "list UDP flows");
    get.nest(TUPLE_ORIGINAL, |m| {
        m.nest(TUPLE_PROTO, |m| {
            m.attr_u8(PROTO_NUMBER, UDP);
            if let Some(port) = port {
                m.attr(PROTO_DESTINATION_PORT, &port.to_be_bytes());
            }
        });
    });
    get.nest(FILTER, |m| {
        let by_port = if port.is_some() { BY_DESTINATION_PORT } else { 0 };
        m.attr_u32(FILTER_ORIGINAL, BY_PROTOCOL | by_port).attr_u32(FILTER_REPLY, 0);
    });
    socket.dump(&get, |received| read_flow(&received))
}

/// Reads an `IPCTNL_MSG_CT_NEW`; `None` if it is not UDP. Pure.
pub fn read_flow(received: &Received<'_>) -> Option<Flow> {
    let attributes = Attributes::behind(received.payload, 4);
    let (original, reply) =
        (attributes.find(TUPLE_ORIGINAL)?.nested(), attributes.find(TUPLE_REPLY)?.nested());
    let protocol = original.find(TUPLE_PROTO)?.nested().find(PROTO_NUMBER)?.u8()?;
    let kept = |kind: u16| attributes.find(kind).map(|attribute| (kind, attribute.value.to_vec()));
    let flow = Flow {
        destination: end(&original, [2, 4], PROTO_DESTINATION_PORT)?,
        answers: end(&reply, [1, 3], PROTO_SOURCE_PORT)?,
        name: [TUPLE_ORIGINAL, ZONE, ID].into_iter().filter_map(kept).collect(),
    };
    (protocol == UDP).then_some(flow)
}

/// One end of a flow: its address (the attribute of IPv4 or that of IPv6) and port.
fn end(tuple: &Attributes<'_>, address: [u16; 2], port: u16) -> Option<(IpAddr, u16)> {
    let ip = tuple.find(TUPLE_IP)?.nested();
    let address = address.into_iter().find_map(|kind| ip.find(kind))?;
    let port = tuple.find(TUPLE_PROTO)?.nested().find(port)?;
    Some((to_address(address.value)?, u16::from_be_bytes(*port.value.first_chunk()?)))
}

/// Makes the kernel forget flows. Those that it forgot by itself meanwhile are fine.
pub fn forget(socket: &mut Socket, flows: &[Flow]) -> Result<(), Error> {
    let message = |flow: &Flow| {
        let what = format!("forget a UDP flow to {} port {}", flow.destination.0, flow.destination.1);
        let mut message = Message::new(DELETE, 0, &header(Family::of(&flow.destination.0)), what);
        for (kind, value) in &flow.name {
            let nested = *kind == TUPLE_ORIGINAL;
            if nested {
                message.nest(*kind, |m| _ = m.raw(value));
            } else {
                message.attr(*kind, value);
            }
        }
        message
    };
    // In portions, as each is acknowledged.
    for portion in flows.chunks(64) {
        for outcome in socket.request_each(portion.iter().map(message).collect())? {
            deleted(outcome)?;
        }
    }
    Ok(())
}
