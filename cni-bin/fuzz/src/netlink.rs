//! rtnetlink messages (links, addresses, routes, queueing disciplines): what one `recv` brings.

use plat_cni::link::{Address, Route, new_address, new_route, read_address, read_link, read_route};
use plat_cni::netlink::{Received, read_answer, split};
use plat_cni::tc::{Bucket, new_bucket, read_rate};
use plat_crds::Family;

/// Any bytes are read or passed over. An address, route or rate that was read and is asked for again is
/// the same.
pub fn check(input: &[u8]) {
    for received in split(input) {
        read_answer(&received);
        if let Some(link) = read_link(&received) {
            assert!(!link.name.contains('\0') && !link.alias.unwrap_or_default().contains('\0'));
        }
        read_address(&received, Some(1));
        if let Some(address) = read_address(&received, None) {
            let said = |a: &Address| (a.link, a.net, a.protocol);
            assert_eq!(address_again(&address).as_ref().map(said), Some(said(&address)));
        }
        if let Some(rate) = read_rate(&received) {
            let bucket = new_bucket(2, "eth0", &Bucket { rate, burst: 1, limit: 1 });
            assert_eq!(reread(&bucket.encode().unwrap(), read_rate), Some(rate));
        }
        if let Some(route) = read_route(&received) {
            let usual = as_asked_for(route);
            assert_eq!(route_again(&usual), Some(usual));
        }
    }
}

/// The address that is read of the request for it.
fn address_again(address: &Address) -> Option<Address> {
    let bytes = new_address(address.link, address.net, address.protocol).encode().unwrap();
    reread(&bytes, |received| read_address(received, None))
}

/// What a request cannot say: host bits in the destination, and scopes of IPv6.
fn as_asked_for(route: Route) -> Route {
    let scope = match Family::of(&route.destination.addr()) {
        Family::IPv4 => route.scope,
        Family::IPv6 => 0,
    };
    Route { scope, destination: route.destination.trunc(), ..route }
}

fn route_again(route: &Route) -> Option<Route> {
    let bytes = new_route(route).encode().unwrap();
    reread(&bytes, read_route)
}

fn reread<T>(bytes: &[u8], read: impl Fn(&Received<'_>) -> Option<T>) -> Option<T> {
    split(bytes).next().and_then(|received| read(&received))
}
