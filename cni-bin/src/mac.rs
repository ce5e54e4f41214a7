//! Hardware addresses, and how ours are chosen.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use plat_crds::lease::checksum;

/// An Ethernet address; shown in lower case with colons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// A text that is not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an Ethernet address such as 0a:70:0a:f4:03:07")]
pub struct ParseMacError(String);

/// Whose end of a pod's link an address is for. The first byte of each has the "locally administered" bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The pod's.
    Pod,
    /// The host's.
    Host,
    /// The bridge.
    Bridge,
}

impl Mac {
    /// The hardware address that belongs to an IP address.
    ///
    /// Derived, not random: a pod that gets the address of a dead one also gets its hardware address, so
    /// no neighbour's cache is ever wrong; and a bridge that is made again has the address that running
    /// pods know as their gateway's. It is written into the request that makes the link, as udev's
    /// `MACAddressPolicy=persistent` changes those that are left to the kernel, after we have reported
    /// them.
    ///
    /// IPv4 addresses are unique on a node, so these are too: `0a`, the end, the address. An IPv6 address
    /// does not fit: `0e` and 40 bits of its hash, which no two of a node's pods will share.
    pub fn for_address(address: IpAddr, end: End) -> Mac {
        let number = match end {
            End::Pod => 0x70,
            End::Host => 0x71,
            End::Bridge => 0x72,
        };
        match address {
            IpAddr::V4(v4) => {
                let [a, b, c, d] = v4.octets();
                Mac([0x0a, number, a, b, c, d])
            }
            IpAddr::V6(v6) => Mac::hashed(&v6.octets(), number),
        }
    }

    /// The hardware address of a node's VXLAN devices, made of the node's name: every node can tell every other's
    /// without a message, and it stays when the node's addresses change.
    pub fn for_node(name: &str) -> Mac {
        Mac::hashed(name.as_bytes(), 0x73)
    }

    fn hashed(seed: &[u8], number: u8) -> Mac {
        let [a, b, c, d, e, ..] = checksum(&[seed, &[number]].concat()).to_be_bytes();
        Mac([0x0e, a, b, c, d, e])
    }
}

impl Mac {
    /// The link-local IPv6 address that the kernel makes from it (modified EUI-64, RFC 4291 appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }

    /// The hardware address that such a link-local address was made from; `None` if it was not.
    pub fn of_link_local(address: Ipv6Addr) -> Option<Mac> {
        let [_, _, _, _, _, _, _, _, a, b, c, _, _, d, e, f] = address.octets();
        let mac = Mac([a ^ 2, b, c, d, e, f]);
        (mac.link_local() == address).then_some(mac)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = ParseMacError;

    /// Reads six pairs of hexadecimal digits with colons or hyphens between them.
    fn from_str(text: &str) -> Result<Mac, ParseMacError> {
        let bytes: Option<Vec<u8>> = text
            .split([':', '-'])
            .map(|pair| {
                let plain = pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
                if plain { u8::from_str_radix(pair, 16).ok() } else { None }
            })
            .collect();
        let bytes = bytes.and_then(|b| <[u8; 6]>::try_from(b).ok());
        bytes.map(Mac).ok_or_else(|| ParseMacError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back_in_one_form() {
        for text in ["0a:70:0a:f4:03:07", "0A-70-0a-F4-03-07"] {
            assert_eq!(text.parse::<Mac>().unwrap().to_string(), "0a:70:0a:f4:03:07");
        }
        for bad in [
            "",
            "0a:70:0a:f4:03",
            "0a:70:0a:f4:03:07:08",
            "a:70:0a:f4:03:07",
            "+a:70:0a:f4:03:07",
            "ä:70:0a:f4:03:07",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_link_local_address_follows_from_the_hardware_address_and_back() {
        let mac: Mac = "0a:70:0a:f4:03:07".parse().unwrap();
        assert_eq!(mac.link_local().to_string(), "fe80::870:aff:fef4:307");
        assert_eq!(Mac::of_link_local(mac.link_local()), Some(mac));
        for other in ["fe80::1", "fd00::870:aff:fef4:307", "::"] {
            assert_eq!(Mac::of_link_local(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn the_ends_of_one_link_differ_and_are_locally_administered_unicast() {
        for address in ["10.244.3.7", "fd00:10:244:3::7"] {
            let address: IpAddr = address.parse().unwrap();
            let macs = [End::Pod, End::Host, End::Bridge].map(|end| Mac::for_address(address, end));
            assert!(macs[0] != macs[1] && macs[1] != macs[2] && macs[0] != macs[2]);
            assert!(macs.iter().all(|m| m.0[0] & 3 == 2), "local bit set, multicast bit clear");
        }
        let pod = Mac::for_address([10, 244, 3, 7].into(), End::Pod);
        assert_eq!(pod.to_string(), "0a:70:0a:f4:03:07");
    }

    #[test]
    fn pods_of_several_ipv6_blocks_do_not_share_one() {
        let address = |block: u16, host: u16| IpAddr::from([0xfd00, 0x10, 0x244, block, 0, 0, 0, host]);
        let macs: std::collections::HashSet<Mac> = (0..8)
            .flat_map(|block| (2..2000).map(move |host| Mac::for_address(address(block, host), End::Pod)))
            .collect();
        assert_eq!(macs.len(), 8 * 1998);
    }
}
