//! Address ranges: `ipam.subnet` and `ipam.ranges` in host-local's form, and the node's blocks in the same
//! terms. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::lease::MAX_ADDRESSES;
use plat_crds::{Block, Family};

use crate::error::{Code, Error};
use crate::json::Json;
use crate::spec::SpecVersion;

/// A piece of a subnet that addresses are leased from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The subnet (or block).
    pub subnet: IpNet,
    /// First address.
    pub first: IpAddr,
    /// Last address.
    pub last: IpAddr,
    /// The gateway, which is never leased.
    pub gateway: IpAddr,
}

/// Ranges of one family that are used up together; a pod gets one address of each set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeSet(pub Vec<Range>);

impl Range {
    /// The addresses of a block that may be leased; `None` if it is too small to hold a pod.
    pub fn of_block(block: Block) -> Option<Range> {
        let last = block.last_host();
        (block.capacity() > 0).then_some(())?;
        Some(Range {
            subnet: block.net(),
            first: block.host(plat_crds::block::GATEWAY_HOST + 1)?,
            last: block.host(last)?,
            gateway: block.gateway(),
        })
    }

    /// Whether the address may be leased from here.
    pub fn leases(&self, address: &IpAddr) -> bool {
        address.is_ipv4() == self.first.is_ipv4()
            && (self.first..=self.last).contains(address)
            && *address != self.gateway
    }

    /// How many addresses may be leased from here; saturates.
    pub fn capacity(&self) -> u64 {
        let count = to_int(self.last).saturating_sub(to_int(self.first)).saturating_add(1);
        let gateway = (self.first..=self.last).contains(&self.gateway);
        u64::try_from(count).unwrap_or(u64::MAX).saturating_sub(u64::from(gateway))
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4() && self.first <= other.last && other.first <= self.last
    }
}

impl RangeSet {
    /// The set's family; all its ranges have it.
    pub fn family(&self) -> Option<Family> {
        self.0.first().map(|r| Family::of(&r.first))
    }

    /// The range that an address may be leased from.
    pub fn range_of(&self, address: &IpAddr) -> Option<&Range> {
        self.0.iter().find(|r| r.leases(address))
    }

    /// The ranges as text, for messages.
    pub fn describe(&self) -> String {
        self.0.iter().map(|r| r.subnet.to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn to_int(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

/// Reads the range sets of an `ipam` object: first those that the runtime asks for
/// (`runtimeConfig.ipRanges`), then the single `subnet`, then `ranges`, as host-local does.
pub fn parse(ipam: &Json, runtime: &Json, version: SpecVersion) -> Result<Vec<RangeSet>, Error> {
    let mut sets = parse_sets(runtime, "runtimeConfig.ipRanges")?;
    if !ipam.get("subnet").is_null() {
        sets.push(RangeSet(vec![parse_range(ipam, "ipam")?]));
    }
    sets.extend(parse_sets(ipam.get("ranges"), "ipam.ranges")?);
    check_sets(&sets, version)?;
    Ok(sets)
}

fn parse_sets(json: &Json, key: &str) -> Result<Vec<RangeSet>, Error> {
    let mut sets = Vec::new();
    for set in json.list(key)? {
        let ranges: Vec<Range> =
            set.list(key)?.iter().map(|r| parse_range(r, key)).collect::<Result<_, _>>()?;
        if ranges.is_empty() {
            return Err(invalid(&format!("{key} has an empty set")));
        }
        if ranges.iter().any(|r| r.first.is_ipv4() != ranges[0].first.is_ipv4()) {
            return Err(invalid(&format!("{key} mixes families in one set")));
        }
        sets.push(RangeSet(ranges));
    }
    Ok(sets)
}

fn check_sets(sets: &[RangeSet], version: SpecVersion) -> Result<(), Error> {
    if sets.is_empty() {
        return Err(invalid("ipam.ranges has no range"));
    }
    if sets.len() > MAX_ADDRESSES {
        return Err(invalid(&format!(
            "a pod gets at most {MAX_ADDRESSES} addresses, so many sets of ranges"
        )));
    }
    let ranges: Vec<&Range> = sets.iter().flat_map(|s| &s.0).collect();
    for (i, range) in ranges.iter().enumerate() {
        if let Some(other) = ranges.iter().skip(i + 1).find(|r| r.overlaps(range)) {
            return Err(invalid(&format!("ranges of {} and {} overlap", range.subnet, other.subnet)));
        }
    }
    let of_family = |family| sets.iter().filter(|s| s.family() == Some(family)).count();
    if version < SpecVersion::V0_3_0 && Family::ALL.into_iter().any(|f| of_family(f) > 1) {
        return Err(invalid(&format!("CNI version {version} allows one address per family")));
    }
    Ok(())
}

fn parse_range(json: &Json, key: &str) -> Result<Range, Error> {
    let text = json.get("subnet").text(&format!("{key}.subnet"))?;
    let subnet: IpNet = text.parse().map_err(|_| invalid(&format!("{key}.subnet {text:?} is not a CIDR")))?;
    if subnet.trunc() != subnet {
        return Err(invalid(&format!("{key}.subnet {subnet} has host bits set; write {}", subnet.trunc())));
    }
    if subnet.prefix_len() + 2 > subnet.max_prefix_len() {
        return Err(invalid(&format!("{key}.subnet {subnet} is too small to lease from")));
    }
    let block = Block::containing(subnet);
    let host = |number| block.host(number).unwrap_or(subnet.addr());
    let last = match subnet {
        IpNet::V4(v4) => IpAddr::from(std::net::Ipv4Addr::from(u32::from(v4.broadcast()) - 1)),
        IpNet::V6(v6) => v6.broadcast().into(),
    };
    let bound = |name: &str, default: IpAddr| -> Result<IpAddr, Error> {
        let key = format!("{key}.{name}");
        match json.get(name).text(&key)? {
            "" => Ok(default),
            text => match text.parse::<IpAddr>() {
                Ok(address) if subnet.contains(&address) => Ok(address),
                Ok(_) => Err(invalid(&format!("{key} {text} is not in {subnet}"))),
                Err(_) => Err(invalid(&format!("{key} {text:?} is not an address"))),
            },
        }
    };
    let range = Range {
        subnet,
        first: bound("rangeStart", host(1))?,
        last: bound("rangeEnd", last)?,
        gateway: bound("gateway", host(1))?,
    };
    if range.first > range.last {
        return Err(invalid(&format!(
            "{key}.rangeStart {} lies behind rangeEnd {}",
            range.first, range.last
        )));
    }
    Ok(range)
}

fn invalid(what: &str) -> Error {
    Error::because(Code::Config, "invalid address ranges", what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sets(ipam: &str) -> Result<Vec<RangeSet>, Error> {
        parse(&Json::parse(ipam.as_bytes()).unwrap(), &Json::Null, SpecVersion::V1_0_0)
    }

    fn shown(ipam: &str) -> String {
        let sets = sets(ipam).unwrap();
        let range = &sets[0].0[0];
        format!("{}-{} gw {} ({})", range.first, range.last, range.gateway, range.capacity())
    }

    #[test]
    fn defaults_are_those_of_host_local() {
        assert_eq!(shown(r#"{"subnet":"10.1.0.0/24"}"#), "10.1.0.1-10.1.0.254 gw 10.1.0.1 (253)");
        assert_eq!(shown(r#"{"subnet":"10.1.0.0/30"}"#), "10.1.0.1-10.1.0.2 gw 10.1.0.1 (1)");
        assert_eq!(shown(r#"{"subnet":"fd00::/126"}"#), "fd00::1-fd00::3 gw fd00::1 (2)");
        assert_eq!(
            shown(
                r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.9","rangeEnd":"10.1.0.20","gateway":"10.1.0.254"}"#
            ),
            "10.1.0.9-10.1.0.20 gw 10.1.0.254 (12)"
        );
    }

    #[test]
    fn the_single_form_comes_before_the_list_and_the_runtimes_before_both() {
        let ipam = Json::parse(br#"{"subnet":"10.1.0.0/24","ranges":[[{"subnet":"10.2.0.0/24"}]]}"#).unwrap();
        let runtime = Json::parse(br#"[[{"subnet":"10.3.0.0/24"}]]"#).unwrap();
        let sets = parse(&ipam, &runtime, SpecVersion::V1_0_0).unwrap();
        let order: Vec<String> = sets.iter().map(RangeSet::describe).collect();
        assert_eq!(order, ["10.3.0.0/24", "10.1.0.0/24", "10.2.0.0/24"]);
    }

    #[test]
    fn ranges_that_cannot_work_are_named() {
        for (ipam, words) in [
            (r#"{"subnet":"x"}"#, "not a CIDR"),
            (r#"{"subnet":"10.1.0.5/24"}"#, "host bits"),
            (r#"{"subnet":"10.1.0.0/31"}"#, "too small"),
            (r#"{"subnet":"10.1.0.0/24","rangeStart":"10.2.0.1"}"#, "not in 10.1.0.0/24"),
            (r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.9","rangeEnd":"10.1.0.8"}"#, "lies behind"),
            (r#"{"ranges":[]}"#, "no range"),
            (r#"{"ranges":[[]]}"#, "empty set"),
            (r#"{"ranges":[[{"subnet":"10.1.0.0/24"},{"subnet":"fd00::/64"}]]}"#, "mixes families"),
            (r#"{"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"10.1.0.0/16"}]]}"#, "overlap"),
        ] {
            let error = sets(ipam).unwrap_err();
            assert!(error.code == 7 && error.details.contains(words), "{ipam}: {error}");
        }
        let two =
            Json::parse(br#"{"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"10.2.0.0/24"}]]}"#).unwrap();
        assert!(parse(&two, &Json::Null, SpecVersion::V0_2_0).unwrap_err().details.contains("one address"));
    }

    #[test]
    fn a_block_leases_neither_network_nor_gateway_nor_broadcast() {
        let range = Range::of_block("10.244.3.0/24".parse().unwrap()).unwrap();
        assert_eq!(
            (range.first.to_string(), range.last.to_string()),
            ("10.244.3.2".into(), "10.244.3.254".into())
        );
        assert_eq!(range.capacity(), 253);
        assert_eq!(Range::of_block("10.244.3.0/31".parse().unwrap()), None);
        assert_eq!(Range::of_block("fd00::/64".parse().unwrap()).unwrap().capacity(), 65_533);
    }

    proptest! {
        #[test]
        fn a_range_never_leases_the_ends_of_its_subnet_nor_its_gateway(a: u32, length in 0u8..=30) {
            let subnet = IpNet::new(IpAddr::V4(a.into()), length).unwrap().trunc();
            let set = &sets(&format!(r#"{{"subnet":"{subnet}"}}"#)).unwrap()[0];
            for bad in [subnet.network(), subnet.broadcast(), set.0[0].gateway] {
                prop_assert!(set.range_of(&bad).is_none());
            }
            let block = Block::containing(subnet);
            prop_assert_eq!(set.0[0].capacity(), u64::from(block.capacity()));
        }
    }
}
