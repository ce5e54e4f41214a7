//! Hardware addresses, and how ours are chosen.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

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
    /// IPv4 addresses are unique on a node, so are these. IPv6 addresses are folded to four bytes: those
    /// of one /96 stay distinct.
    pub fn for_address(address: IpAddr, end: End) -> Mac {
        let second = match (end, address) {
            (End::Pod, IpAddr::V4(_)) => 0x70,
            (End::Pod, IpAddr::V6(_)) => 0x71,
            (End::Host, IpAddr::V4(_)) => 0x72,
            (End::Host, IpAddr::V6(_)) => 0x73,
            (End::Bridge, IpAddr::V4(_)) => 0x74,
            (End::Bridge, IpAddr::V6(_)) => 0x75,
        };
        let [a, b, c, d] = match address {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(v6) => {
                let words = u128::from(v6);
                let fold = (words ^ (words >> 32) ^ (words >> 64) ^ (words >> 96)) & u128::from(u32::MAX);
                u32::try_from(fold).unwrap_or_default().to_be_bytes()
            }
        };
        Mac([0x0a, second, a, b, c, d])
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
    fn the_ends_of_one_link_differ_and_are_locally_administered_unicast() {
        for address in ["10.244.3.7", "fd00:10:244:3::7"] {
            let address: IpAddr = address.parse().unwrap();
            let macs = [End::Pod, End::Host, End::Bridge].map(|end| Mac::for_address(address, end));
            assert!(macs[0] != macs[1] && macs[1] != macs[2] && macs[0] != macs[2]);
            assert!(macs.iter().all(|m| m.0[0] & 3 == 2), "local bit set, multicast bit clear");
        }
    }
}
