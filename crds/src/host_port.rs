//! Host ports: ports of the node that lead to a port of a pod. What the runtime asks for, what a lease
//! records and what the node's rules are made of.
//!
//! Pure: values, their checks, and their form in a lease's record ([`encode`], [`decode`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::Family;

/// A transport protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// All of them.
    pub const ALL: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::Sctp];

    /// The protocol number (IANA).
    pub fn number(self) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
            Transport::Sctp => 132,
        }
    }

    /// The protocol of that number.
    pub fn from_number(number: u8) -> Option<Transport> {
        Transport::ALL.into_iter().find(|transport| transport.number() == number)
    }

    /// The protocol's name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::Sctp => "sctp",
        }
    }
}

/// On which of the node's addresses a host port is open. Shown as a runtime writes `hostIP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostIp {
    /// On all of both families: no `hostIP`.
    Any,
    /// On all of one family: `0.0.0.0` or `::`.
    AnyOf(Family),
    /// On this one.
    Only(IpAddr),
}

impl HostIp {
    /// Reads a `hostIP`; an IPv4 address in IPv6 form is taken for what it is. `None` if it is no address.
    pub fn parse(text: &str) -> Option<HostIp> {
        if text.is_empty() {
            return Some(HostIp::Any);
        }
        let address = text.parse::<IpAddr>().ok()?.to_canonical();
        Some(match address.is_unspecified() {
            true => HostIp::AnyOf(Family::of(&address)),
            false => HostIp::Only(address),
        })
    }

    /// Whether the port is open on addresses of that family.
    pub fn serves(self, family: Family) -> bool {
        match self {
            HostIp::Any => true,
            HostIp::AnyOf(only) => only == family,
            HostIp::Only(address) => Family::of(&address) == family,
        }
    }
}

impl fmt::Display for HostIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostIp::Any => Ok(()),
            HostIp::AnyOf(Family::IPv4) => Ipv4Addr::UNSPECIFIED.fmt(f),
            HostIp::AnyOf(Family::IPv6) => Ipv6Addr::UNSPECIFIED.fmt(f),
            HostIp::Only(address) => address.fmt(f),
        }
    }
}

impl Serialize for HostIp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A port of the node that leads to a port of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// On which of the node's addresses.
    #[serde(rename = "hostIP")]
    pub host_ip: HostIp,
    /// Of which protocol.
    pub protocol: Transport,
    /// The node's port, 1 to 65535.
    pub host_port: u16,
    /// The pod's port, 1 to 65535.
    pub container_port: u16,
}

/// As in `tcp 127.0.0.1:8080`, or `udp port 53` on any address.
impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = self.protocol.name();
        match self.host_ip {
            HostIp::Any => write!(f, "{protocol} port {}", self.host_port),
            HostIp::Only(IpAddr::V4(_)) | HostIp::AnyOf(Family::IPv4) => {
                write!(f, "{protocol} {}:{}", self.host_ip, self.host_port)
            }
            HostIp::Only(IpAddr::V6(_)) | HostIp::AnyOf(Family::IPv6) => {
                write!(f, "{protocol} [{}]:{}", self.host_ip, self.host_port)
            }
        }
    }
}

const SCOPE_ANY: u8 = 0;
const SCOPE_ANY_V4: u8 = 1;
const SCOPE_ANY_V6: u8 = 2;
const SCOPE_V4: u8 = 3;
const SCOPE_V6: u8 = 4;

/// The values of a lease's fields that hold these ports: one per `hostIP`. Each is a scope (`u8`: 0 any
/// address, 1 any IPv4, 2 any IPv6, 3 the IPv4 address that follows, 4 the IPv6 address that follows), then
/// for each port `u8` protocol number, `u16` node's port, `u16` pod's port, little-endian.
pub fn encode(ports: &[HostPort]) -> Vec<Vec<u8>> {
    let mut values: BTreeMap<HostIp, Vec<u8>> = BTreeMap::new();
    for port in ports {
        let value = values.entry(port.host_ip).or_insert_with(|| encode_scope(port.host_ip));
        value.push(port.protocol.number());
        value.extend_from_slice(&port.host_port.to_le_bytes());
        value.extend_from_slice(&port.container_port.to_le_bytes());
    }
    values.into_values().collect()
}

fn encode_scope(host_ip: HostIp) -> Vec<u8> {
    match host_ip {
        HostIp::Any => vec![SCOPE_ANY],
        HostIp::AnyOf(Family::IPv4) => vec![SCOPE_ANY_V4],
        HostIp::AnyOf(Family::IPv6) => vec![SCOPE_ANY_V6],
        HostIp::Only(IpAddr::V4(address)) => [&[SCOPE_V4], address.octets().as_slice()].concat(),
        HostIp::Only(IpAddr::V6(address)) => [&[SCOPE_V6], address.octets().as_slice()].concat(),
    }
}

/// Reads what [`encode`] wrote; `None` if it is anything else.
pub fn decode(value: &[u8]) -> Option<Vec<HostPort>> {
    let (scope, rest) = value.split_first()?;
    let (host_ip, rest) = match *scope {
        SCOPE_ANY => (HostIp::Any, rest),
        SCOPE_ANY_V4 => (HostIp::AnyOf(Family::IPv4), rest),
        SCOPE_ANY_V6 => (HostIp::AnyOf(Family::IPv6), rest),
        SCOPE_V4 => {
            let (address, rest) = rest.split_first_chunk::<4>()?;
            (HostIp::Only((*address).into()), rest)
        }
        SCOPE_V6 => {
            let (address, rest) = rest.split_first_chunk::<16>()?;
            (HostIp::Only((*address).into()), rest)
        }
        _ => return None,
    };
    let (ports, []) = rest.as_chunks::<5>() else { return None };
    let read = |[number, host_low, host_high, pod_low, pod_high]: &[u8; 5]| {
        Some(HostPort {
            host_ip,
            protocol: Transport::from_number(*number)?,
            host_port: u16::from_le_bytes([*host_low, *host_high]),
            container_port: u16::from_le_bytes([*pod_low, *pod_high]),
        })
    };
    ports.iter().map(read).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_port() -> impl Strategy<Value = HostPort> {
        let host_ip = prop_oneof![
            Just(HostIp::Any),
            Just(HostIp::AnyOf(Family::IPv4)),
            Just(HostIp::AnyOf(Family::IPv6)),
            any::<[u8; 4]>().prop_map(|a| HostIp::Only(a.into())),
            any::<[u8; 16]>().prop_map(|a| HostIp::Only(a.into())),
        ];
        let protocol = proptest::sample::select(Transport::ALL.as_slice());
        (host_ip, protocol, any::<u16>(), any::<u16>()).prop_map(
            |(host_ip, protocol, host_port, container_port)| HostPort {
                host_ip,
                protocol,
                host_port,
                container_port,
            },
        )
    }

    proptest! {
        #[test]
        fn ports_come_back_as_they_were_written(mut ports in proptest::collection::vec(any_port(), 0..40)) {
            let mut read: Vec<HostPort> = encode(&ports).iter().flat_map(|value| decode(value).unwrap()).collect();
            ports.sort_unstable();
            read.sort_unstable();
            prop_assert_eq!(read, ports);
        }

        #[test]
        fn no_bytes_cause_a_panic_and_what_can_be_read_is_written_the_same(
            bytes in proptest::collection::vec(any::<u8>(), 0..64)
        ) {
            if let Some(ports) = decode(&bytes).filter(|ports| !ports.is_empty()) {
                prop_assert_eq!(encode(&ports), vec![bytes]);
            }
        }
    }

    #[test]
    fn a_host_ip_is_read_as_runtimes_write_it() {
        for (text, host_ip) in [
            ("", Some(HostIp::Any)),
            ("0.0.0.0", Some(HostIp::AnyOf(Family::IPv4))),
            ("::", Some(HostIp::AnyOf(Family::IPv6))),
            ("::ffff:0.0.0.0", Some(HostIp::AnyOf(Family::IPv4))),
            ("127.0.0.1", Some(HostIp::Only([127, 0, 0, 1].into()))),
            ("::ffff:192.0.2.7", Some(HostIp::Only([192, 0, 2, 7].into()))),
            ("2001:db8::1", Some(HostIp::Only("2001:db8::1".parse().unwrap()))),
            ("192.0.2.7/24", None),
            ("localhost", None),
            (" ", None),
        ] {
            assert_eq!(HostIp::parse(text), host_ip, "{text:?}");
        }
    }

    #[test]
    fn a_port_is_shown_with_its_address_if_it_has_one() {
        let shown = |host_ip: &str| {
            let host_ip = HostIp::parse(host_ip).unwrap();
            HostPort { host_ip, protocol: Transport::Udp, host_port: 53, container_port: 5353 }.to_string()
        };
        assert_eq!(shown(""), "udp port 53");
        assert_eq!(shown("192.0.2.7"), "udp 192.0.2.7:53");
        assert_eq!(shown("::"), "udp [::]:53");
    }
}
