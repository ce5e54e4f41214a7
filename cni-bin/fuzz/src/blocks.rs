//! The blocks file, up to the result of an ADD that leases from it.

use std::net::IpAddr;

use plat_cni::boot::BootId;
use plat_cni::config::{Attachment, Network};
use plat_cni::pool::{Chosen, Taken, all_blocks, choose, from_blocks};
use plat_cni::reply::Reply;
use plat_cni::request::Args;
use plat_cni::wire::{PodNet, Style, pod_sysctls};
use plat_crds::blocks_file::BlocksFile;

use super::{must_be_reportable, reply};

/// Nobody holds anything.
struct Nobody;

impl Taken for Nobody {
    fn is_taken(&self, _: &IpAddr) -> bool {
        false
    }

    fn last(&self, _: u32) -> Option<IpAddr> {
        None
    }
}

/// A file is read or refused; what was read reads the same again, and a pod gets only addresses of blocks
/// that lease, and no block's gateway.
pub fn check(input: &[u8]) {
    let Ok(file) = BlocksFile::parse(input) else { return };
    assert_eq!(BlocksFile::parse(&serde_json::to_vec(&file).unwrap()).unwrap(), file);
    let boot = BootId { text: file.boot_id.clone(), bytes: [0; 16] };
    assert!(from_blocks(&file, &boot, file.lease_until).is_err(), "past the fence nothing is leased");
    let source = match from_blocks(&file, &boot, 0) {
        Ok(source) => source,
        Err(error) => return must_be_reportable(&error),
    };
    assert!((1..=2).contains(&source.sets.len()), "one set per family");
    let chosen = match choose(&source, &[], &Nobody) {
        Ok(chosen) => chosen,
        Err(error) => return must_be_reportable(&error),
    };
    assert_eq!(chosen.len(), source.sets.len());
    for Chosen { address, range, .. } in &chosen {
        let leasing = |b: &&plat_crds::blocks_file::HeldBlock| b.lease && b.cidr.net().contains(address);
        assert!(file.blocks.iter().any(|b| leasing(&b)), "{address} is of no block that leases");
        assert!(range.subnet.contains(address) && range.gateway != *address, "{address}");
        assert!(![range.subnet.network(), range.subnet.broadcast()].contains(address), "{address}");
    }
    must_be_wired(&chosen);
    all_blocks(&file);
}

fn must_be_wired(chosen: &[Chosen]) {
    let network = Network::parse(br#"{"name":"n","isDefaultGateway":true}"#).unwrap();
    let conf = Attachment::parse(&network, &Args::default()).unwrap();
    for style in [Style::Host, Style::Subnet] {
        let net = PodNet::leased(chosen, style, &conf.bridge, &conf.routes);
        for route in net.kernel_routes(2) {
            let bytes = plat_cni::link::new_route(&route).encode().unwrap();
            super::netlink::check(&bytes);
        }
        pod_sysctls("eth0", &net, style, &conf.bridge);
        let PodNet { ips, routes } = net;
        reply::must_come_back(&Reply { ips, routes, ..Reply::default() });
    }
}
