//! What the agent says of foreign firewalls, beside what they do: for each ruleset, connections through a node in a
//! namespace are compared with the verdicts.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use plat_agent::desired;
use plat_agent::kernel::forward::{
    self, Connection, Forwarding, Peer, Scene, Traffic, Verdict, other_pod, pod, world,
};
use plat_agent::kernel::nft::Nft;
use plat_cni::netlink::{Protocol, Socket};
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::HeldBlock;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::*;

const PORT: u16 = 45011;
/// How long a connection that should not come to be may take to show that it does.
const PATIENCE: Duration = Duration::from_millis(150);

const OWN: [&str; 2] = ["10.244.1.0/24", "fd00:10:244:1::/64"];
const FOREIGN: [&str; 2] = ["10.244.2.0/24", "fd00:10:244:2::/64"];

fn cidr(text: &str) -> Block {
    text.parse().unwrap()
}

/// A node with two pods, and another one that is also the world.
fn laboratory() -> TestNode {
    let blocks = vec![block(1), block_v6(1), block(2), block_v6(2)];
    let mut node = TestNode::with(blocks, vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("CNIReady", "True", "Installed");
    for (name, address) in [("pod", pod as fn(&Block) -> IpAddr), ("pod2", other_pod)] {
        run(&format!("ip netns add {name}"));
        run(&format!("ip link add v{name} type veth peer name eth0 netns {name}"));
        run(&format!("ip link set v{name} master cni0 up"));
        run(&format!("ip -n {name} link set eth0 up"));
        for own in OWN.map(cidr) {
            let gateway = own.gateway();
            run(&format!("ip -n {name} addr add {} dev eth0 nodad", address(&own)));
            run(&format!("ip -n {name} route add {gateway} dev eth0"));
            run(&format!("ip -n {name} route add default via {gateway}"));
        }
    }
    run("ip netns add other");
    run("ip link set wire0 netns other");
    run("ip -n other link set lo up");
    run("ip -n other link set wire0 up");
    for (family, (own, foreign)) in Family::ALL.into_iter().zip(OWN.into_iter().zip(FOREIGN)) {
        let (addresses, via) = match family {
            Family::IPv4 => (["172.30.0.12/24", "172.30.0.1/24"], "172.30.0.11"),
            Family::IPv6 => (["fd00:30::c/64", "fd00:30::1/64"], "fd00:30::b"),
        };
        for address in addresses {
            run(&format!("ip -n other addr add {address} dev wire0 nodad"));
        }
        let source = pod(&cidr(foreign));
        run(&format!("ip -n other addr add {source} dev lo"));
        run(&format!("ip -n other addr add {} dev lo", world(family)));
        run(&format!("ip -n other route add {own} via {via} src {source}"));
    }
    // What follows is judged as it is, without the agent's opening a way.
    node.stop();
    for namespace in ["pod", "pod2", "other"] {
        within(namespace, listen);
    }
    node
}

/// Runs something in a thread in that namespace.
fn within<T: Send + 'static>(namespace: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let path = format!("/run/netns/{namespace}");
    let thread = thread::spawn(move || {
        let file = std::fs::File::open(path).unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network)).unwrap();
        body()
    });
    thread.join().unwrap()
}

/// Tells each who connects by what address it came, until the process ends.
fn listen() {
    let listener = TcpListener::bind(("::", PORT)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let from = stream.peer_addr().unwrap().ip().to_canonical();
            thread::spawn(move || stream.write_all(from.to_string().as_bytes()));
        }
    });
}

/// Connects; `None` if that fails in time, else the address by which the other side knows this one.
fn connect(namespace: &str, to: IpAddr, patience: Duration) -> Option<String> {
    within(namespace, move || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, PORT), patience).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut seen = String::new();
        stream.read_to_string(&mut seen).ok()?;
        Some(seen)
    })
}

fn judged() -> Forwarding {
    let mut route = Socket::open(Protocol::Route).unwrap();
    let held = |own: Block| (own, HeldBlock { cidr: own, lease: true });
    let own = OWN.map(cidr).map(held).into();
    let wanted = desired::forwarded(&own, |datapath| datapath == Default::default());
    let ranges = vec![cidr("10.244.0.0/16"), cidr("fd00:10:244::/48")];
    let scene = Scene::observe(&mut route, "cni0", &wanted, &FOREIGN.map(cidr), ranges).unwrap();
    assert_eq!(scene.packets.len(), 16, "all kinds of traffic are judged");
    forward::observe(&mut Nft::open().unwrap(), &scene, false).unwrap()
}

fn verdict(found: &Forwarding, family: Family, traffic: Traffic, connection: Connection) -> (Verdict, bool) {
    let is = |j: &&forward::Judged| {
        (j.packet.family(), j.packet.traffic, j.packet.connection) == (family, traffic, connection)
    };
    let judged = found.verdicts.iter().find(is).unwrap();
    (judged.verdict.clone(), judged.is_translated)
}

/// Connections that are tried: from a namespace and address to an address, and what each direction is.
type Attempt = (&'static str, IpAddr, IpAddr, Traffic, Traffic);

fn attempts(family: Family) -> [Attempt; 4] {
    let of_family = |blocks: [&str; 2]| blocks.map(cidr).into_iter().find(|b| b.family() == family).unwrap();
    let (own, peer) = (of_family(OWN), of_family(FOREIGN));
    let both = |peer| (Traffic::To(peer), Traffic::From(peer));
    let ((to, from), near, far) = (both(Peer::Pods), both(Peer::Neighbours), both(Peer::World));
    [
        ("pod", pod(&own), pod(&peer), to, from),
        ("other", pod(&peer), pod(&own), from, to),
        ("pod", pod(&own), other_pod(&own), near.0, near.1),
        ("pod", pod(&own), world(family), far.0, far.1),
    ]
}

/// Compares the verdicts with what becomes of connections; returns how many did not come to be, and where a verdict
/// is wrong.
fn compare(found: &Forwarding) -> (usize, Vec<String>) {
    let mut tried = Vec::new();
    for (family, attempt) in Family::ALL.into_iter().flat_map(|f| attempts(f).map(|attempt| (f, attempt))) {
        let (from, source, to, there, back) = attempt;
        let (first, is_translated) = verdict(found, family, there, Connection::New);
        let (answer, _) = verdict(found, family, back, Connection::Established);
        let verdicts = [first, answer];
        if verdicts.iter().any(|verdict| matches!(verdict, Verdict::Unknown { .. })) {
            continue;
        }
        let passes = verdicts.iter().all(|verdict| *verdict == Verdict::Accepted);
        let patience = if passes { DEADLINE } else { PATIENCE };
        let what = format!("{family} {there}: {verdicts:?}");
        let connecting = thread::spawn(move || connect(from, to, patience));
        tried.push((connecting, passes, source.to_string(), is_translated, what));
    }
    let (mut stopped, mut wrong) = (0, Vec::new());
    for (connecting, passes, source, is_translated, what) in tried {
        stopped += usize::from(!passes);
        match connecting.join().unwrap() {
            Some(seen) if passes && (seen != source) == is_translated => {}
            None if !passes => {}
            outcome => wrong.push(format!("{what}, but the other side saw {outcome:?}")),
        }
    }
    (stopped, wrong)
}

/// Deletes all tables but Plat's.
fn forget() {
    for line in run("nft list tables").lines() {
        let table = line.trim_start_matches("table ");
        if !table.ends_with(" plat") && !table.ends_with(" plat-pods") {
            run(&format!("nft delete table {table}"));
        }
    }
    run("conntrack -F");
}

/// Docker 28's rules with one bridge, a published port and a network of its own, as it writes them by iptables.
const DOCKER: &str = "
    for t in iptables-nft ip6tables-nft; do
    $t -N DOCKER; $t -N DOCKER-BRIDGE; $t -N DOCKER-CT; $t -N DOCKER-FORWARD; $t -N DOCKER-USER
    $t -N DOCKER-ISOLATION-STAGE-1; $t -N DOCKER-ISOLATION-STAGE-2
    $t -A FORWARD -j DOCKER-USER
    $t -A FORWARD -j DOCKER-FORWARD
    $t -A DOCKER ! -i docker0 -o docker0 -j DROP
    $t -A DOCKER ! -i br-1 -o br-1 -j DROP
    $t -A DOCKER-BRIDGE -o docker0 -j DOCKER
    $t -A DOCKER-BRIDGE -o br-1 -j DOCKER
    $t -A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -A DOCKER-CT -o br-1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -A DOCKER-FORWARD -j DOCKER-CT
    $t -A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
    $t -A DOCKER-FORWARD -j DOCKER-BRIDGE
    $t -A DOCKER-FORWARD -i docker0 -j ACCEPT
    $t -A DOCKER-FORWARD -i br-1 -j ACCEPT
    $t -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
    $t -A DOCKER-ISOLATION-STAGE-1 -i br-1 ! -o br-1 -j DOCKER-ISOLATION-STAGE-2
    $t -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
    $t -A DOCKER-ISOLATION-STAGE-2 -o br-1 -j DROP
    $t -A DOCKER-USER -j RETURN
    $t -P FORWARD DROP
    $t -t nat -N DOCKER
    $t -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
    $t -t nat -A DOCKER -i docker0 -j RETURN
    $t -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination :80
    done
    iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
    iptables-nft -t raw -A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
    iptables-nft -I DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT";

/// kube-proxy's rules in its mode iptables, for a Service and the marks.
const KUBE_PROXY: &str = "
    t=iptables-nft
    $t -N KUBE-FORWARD; $t -N KUBE-PROXY-FIREWALL; $t -N KUBE-SERVICES
    $t -A FORWARD -m conntrack --ctstate NEW -m comment --comment 'load balancer firewall' -j KUBE-PROXY-FIREWALL
    $t -A FORWARD -m comment --comment 'forwarding rules' -j KUBE-FORWARD
    $t -A FORWARD -m conntrack --ctstate NEW -m comment --comment 'service portals' -j KUBE-SERVICES
    $t -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
    $t -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
    $t -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -t nat -N KUBE-SERVICES; $t -t nat -N KUBE-POSTROUTING; $t -t nat -N KUBE-MARK-MASQ; $t -t nat -N KUBE-SVC-1
    $t -t nat -N KUBE-NODEPORTS; $t -t nat -N KUBE-SEP-1
    $t -t nat -A PREROUTING -j KUBE-SERVICES
    $t -t nat -A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 53 -j KUBE-SVC-1
    $t -t nat -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
    $t -t nat -A KUBE-SVC-1 ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m tcp --dport 53 -j KUBE-MARK-MASQ
    $t -t nat -A KUBE-SVC-1 -m statistic --mode random --probability 0.5 -j KUBE-SEP-1
    $t -t nat -A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.1.9:53
    $t -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
    $t -t nat -A POSTROUTING -j KUBE-POSTROUTING
    $t -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
    $t -t nat -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
    $t -t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully";

/// kube-proxy's rules in its mode nftables, for one Service.
const KUBE_PROXY_NFT: &str = "
    add table ip kube-proxy
    add set ip kube-proxy cluster-ips { type ipv4_addr; }
    add set ip kube-proxy nodeport-ips { type ipv4_addr; }
    add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
    add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict; }
    add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    add chain ip kube-proxy reject-chain
    add rule ip kube-proxy reject-chain reject
    add chain ip kube-proxy endpoint
    add rule ip kube-proxy endpoint meta l4proto tcp dnat to 10.244.1.9:53
    add chain ip kube-proxy service
    add rule ip kube-proxy service numgen random mod 1 vmap { 0 : goto endpoint }
    add chain ip kube-proxy services
    add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.244.0.0/16 meta mark set meta mark or 0x4000
    add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
    add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    add chain ip kube-proxy cluster-ips-check
    add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
    add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/12 } drop
    add chain ip kube-proxy masquerading
    add rule ip kube-proxy masquerading meta mark and 0x4000 == 0 return
    add rule ip kube-proxy masquerading meta mark set meta mark xor 0x4000
    add rule ip kube-proxy masquerading masquerade fully-random
    add chain ip kube-proxy service-endpoints-check
    add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
    add chain ip kube-proxy filter-prerouting { type filter hook prerouting priority -110; }
    add rule ip kube-proxy filter-prerouting ct state new jump cluster-ips-check
    add chain ip kube-proxy filter-forward { type filter hook forward priority -110; }
    add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
    add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
    add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat; }
    add rule ip kube-proxy nat-prerouting jump services
    add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority srcnat; }
    add rule ip kube-proxy nat-postrouting jump masquerading
    add element ip kube-proxy cluster-ips { 10.96.0.10 }
    add element ip kube-proxy nodeport-ips { 172.30.0.11 }
    add element ip kube-proxy service-ips { 10.96.0.10 . tcp . 53 : goto service }
    add element ip kube-proxy no-endpoint-services { 10.96.0.11 . tcp . 53 : goto reject-chain }";

/// Chains as ufw makes them.
const UFW: &str = "
    t=iptables-nft
    $t -N ufw-before-forward; $t -N ufw-user-forward; $t -N ufw-after-logging-forward; $t -N ufw-reject-forward
    $t -P FORWARD DROP
    $t -A FORWARD -j ufw-before-forward
    $t -A FORWARD -j ufw-after-logging-forward
    $t -A FORWARD -j ufw-reject-forward
    $t -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
    $t -A ufw-before-forward -j ufw-user-forward
    $t -A ufw-after-logging-forward -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix '[UFW BLOCK] '";

/// firewalld's forward chains in short: zones by source and interface, a reject at the end.
const FIREWALLD: &str = "
    add table inet firewalld
    add chain inet firewalld filter_PREROUTING { type filter hook prerouting priority -290; }
    add rule inet firewalld filter_PREROUTING meta nfproto ipv6 fib saddr . mark . iif oif missing drop
    add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }
    add chain inet firewalld zones
    add chain inet firewalld public
    add chain inet firewalld trusted
    add rule inet firewalld filter_FORWARD ct state established,related accept
    add rule inet firewalld filter_FORWARD ct status dnat accept
    add rule inet firewalld filter_FORWARD iifname lo accept
    add rule inet firewalld filter_FORWARD jump zones
    add rule inet firewalld filter_FORWARD ct state invalid drop
    add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited
    add rule inet firewalld zones ip saddr 192.0.2.0/24 goto trusted
    add rule inet firewalld zones iifname eth0 goto public
    add rule inet firewalld zones goto public
    add rule inet firewalld trusted accept
    add rule inet firewalld public meta l4proto { icmp, ipv6-icmp } accept
    add chain inet firewalld nat_POSTROUTING { type nat hook postrouting priority 110; }
    add rule inet firewalld nat_POSTROUTING oifname eth0 meta nfproto ipv4 masquerade";

/// What kube-router leaves on a node: marks, ipsets' place taken by nft sets, a chain per pod.
const LEFTOVERS: &str = "
    t=iptables-nft
    $t -N KUBE-ROUTER-FORWARD; $t -N KUBE-POD-FW-X; $t -N cali-FORWARD; $t -N cali-from-wl-dispatch
    $t -A FORWARD -j cali-FORWARD
    $t -A FORWARD -j KUBE-ROUTER-FORWARD
    $t -A KUBE-ROUTER-FORWARD -d 10.244.1.77/32 -j KUBE-POD-FW-X
    $t -A KUBE-POD-FW-X -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -A KUBE-POD-FW-X -m mark ! --mark 0x10000/0x10000 -j REJECT
    $t -A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
    $t -A cali-FORWARD -i cali+ -j cali-from-wl-dispatch
    $t -A cali-from-wl-dispatch -j DROP
    $t -A cali-FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT";

/// A chain at the forward hook.
fn forward_chain(family: &str, priority: i32, policy: &str, rules: &[&str]) -> String {
    let mut script = format!(
        "add table {family} site\nadd chain {family} site guard {{ type filter hook forward priority {priority}; policy {policy}; }}\n"
    );
    for rule in rules {
        script += &format!("add rule {family} site guard {rule}\n");
    }
    script
}

enum Kind {
    /// For `nft -f`.
    Nft,
    /// For `nft -f`, if the kernel can do it.
    IfAble,
    /// For a shell.
    Shell,
}

/// Rulesets: a name, the script, how many of eight connections do not come to be. `None`: some verdicts are unknown.
fn rulesets() -> Vec<(&'static str, Kind, String, Option<usize>)> {
    let nft = |name, script: String, stopped| (name, Kind::Nft, script, Some(stopped));
    let shell = |name, script: &str, stopped| (name, Kind::Shell, script.to_owned(), Some(stopped));
    let chain = forward_chain;
    let (accept, drop) = ("accept", "drop");
    vec![
        nft("nothing", String::new(), 0),
        nft("policy drop in an inet chain", chain("inet", 0, drop, &[]), 8),
        nft("policy drop before the filter priority", chain("inet", -1, drop, &["ip daddr 10.0.0.0/8 accept"]), 5),
        nft("a drop at priority 10", chain("inet", 10, accept, &["ip saddr 10.244.0.0/16 counter drop"]), 4),
        nft("only IPv6 is dropped", chain("ip6", 0, drop, &[]), 4),
        nft("only IPv6 is rejected, in an inet chain", chain("inet", 0, accept, &["meta nfproto ipv6 reject"]), 4),
        nft("established alone", chain("inet", 0, drop, &["ct state established,related accept"]), 8),
        nft("established, and new ones from pods", chain("inet", 0, drop, &["ct state established,related accept", "iifname cni0 accept"]), 2),
        nft("links by index", chain("inet", 0, drop, &["iif cni0 accept", "oif cni0 accept"]), 0),
        nft("names in an anonymous set", chain("inet", 0, drop, &["iifname { cni0, lo } accept", "ct state { established, related } accept"]), 2),
        nft("a verdict map of links", chain("inet", 0, drop, &["ct state vmap { established : accept, invalid : drop }", "iifname vmap { eth0 : accept, cni0 : continue }", "oifname eth0 accept"]), 2),
        nft("ranges and negations", chain("inet", 0, accept, &["ip saddr != 10.244.1.200-10.244.1.255 ip daddr != 198.41.0.0/24 tcp dport 1-1024 drop", "ip6 daddr != { fd00:10:244::/48 } drop"]), 1),
        nft("a named set of intervals", format!("add table inet site\nadd set inet site pods {{ type ipv4_addr; flags interval; }}\nadd element inet site pods {{ 10.244.1.0/24, 10.244.2.0-10.244.2.9 }}\n{}", chain("inet", 0, accept, &["ip daddr @pods drop"])), 4),
        nft("a concatenation", format!("add table inet site\nadd set inet site pairs {{ type ipv4_addr . ipv4_addr; flags interval; }}\nadd element inet site pairs {{ 10.244.1.0/24 . 10.244.2.0/24 }}\nadd set inet site ports {{ type inet_proto . inet_service; }}\nadd element inet site ports {{ tcp . {PORT} }}\n{}", chain("inet", 0, accept, &["ip saddr . ip daddr @pairs drop", "ip6 daddr fd00:10:244:2::/64 meta l4proto . th dport @ports drop"])), 3),
        nft("jump, goto and return", format!("add table inet site\nadd chain inet site one\nadd chain inet site two\nadd chain inet site three\nadd rule inet site one oifname eth0 return\nadd rule inet site one goto two\nadd rule inet site two iifname cni0 accept\nadd rule inet site three iifname cni0 accept\n{}", chain("inet", 0, drop, &["jump one", "ip protocol tcp goto three", "ct state established accept"])), 6),
        nft("flags and marks", chain("inet", 0, accept, &["tcp flags & (syn | ack) == syn meta mark set 0x10", "meta mark & 0xf0 == 0x10 oifname eth0 drop", "meta mark 0x20 drop"]), 4),
        nft("marks from prerouting", format!("add table inet early\nadd chain inet early pre {{ type filter hook prerouting priority -150; }}\nadd rule inet early pre iifname eth0 meta mark set 7\n{}", chain("inet", 0, accept, &["meta mark 7 ct state new reject"])), 2),
        nft("no tracking", format!("add table inet early\nadd chain inet early pre {{ type filter hook prerouting priority raw; }}\nadd rule inet early pre ip daddr 10.244.0.0/16 ip saddr 10.244.0.0/16 notrack\n{}", chain("inet", 0, accept, &["ct state untracked drop"])), 3),
        nft("dropped before routing", "add table ip early\nadd chain ip early pre { type filter hook prerouting priority raw; }\nadd rule ip early pre iifname eth0 drop\n".into(), 3),
        nft("dropped behind routing", "add table inet late\nadd chain inet late post { type filter hook postrouting priority 300; }\nadd rule inet late post oifname eth0 ip daddr 10.244.2.0/24 drop\n".into(), 2),
        nft("masquerade of everything", "add table ip late\nadd chain ip late post { type nat hook postrouting priority 90; }\nadd rule ip late post oifname eth0 masquerade\n".into(), 0),
        ("flowtables", Kind::IfAble, format!("add table inet site\nadd flowtable inet site fast {{ hook ingress priority 0; devices = {{ eth0, cni0 }}; }}\n{}", chain("inet", 0, accept, &["meta l4proto tcp flow add @fast", "oifname lo drop"])), Some(0)),
        nft("firewalld", FIREWALLD.replace('\t', " "), 8),
        shell("docker", DOCKER, 8),
        shell("docker and pods admitted", &format!("{DOCKER}\nfor t in iptables-nft ip6tables-nft; do $t -A FORWARD -i cni0 -j ACCEPT; $t -A FORWARD -o cni0 -j ACCEPT; done"), 0),
        shell("kube-proxy", KUBE_PROXY, 0),
        shell("kube-proxy and policy drop", &format!("{KUBE_PROXY}\niptables-nft -P FORWARD DROP"), 4),
        nft("kube-proxy in its mode nftables", KUBE_PROXY_NFT.to_owned(), 0),
        shell("ufw", UFW, 4),
        shell("leftovers of kube-router and calico", LEFTOVERS, 0),
        shell("matches of iptables", "t=iptables-nft
            $t -A FORWARD -p tcp -m multiport --dports 80,45000:45020 -m iprange --dst-range 10.244.2.0-10.244.2.255 -j DROP
            $t -A FORWARD -p udp -j DROP
            $t -A FORWARD -o eth+ -m mark --mark 0x1/0x1 -j DROP
            $t -A FORWARD -m addrtype --dst-type LOCAL -j DROP
            $t -t raw -A PREROUTING -m rpfilter --invert -j DROP
            $t -A FORWARD -p tcp -m tcp --tcp-flags SYN,ACK SYN -m conntrack --ctstate NEW -s 10.244.2.0/24 -j REJECT --reject-with tcp-reset", 2),
        ("a limit", Kind::Nft, chain("inet", 0, drop, &["limit rate 1/second accept"]), None),
        ("a match that is not understood", Kind::Shell, "iptables-nft -A FORWARD -m statistic --mode random --probability 0.5 -j DROP".into(), None),
        nft("a limit that makes no difference", chain("inet", 0, accept, &["limit rate 1/second log", "limit rate 1/second accept"]), 0),
    ]
}

#[test]
fn connections_come_to_be_exactly_where_the_verdicts_say_so() {
    isolated("firewalls::connections_come_to_be_exactly_where_the_verdicts_say_so", || {
        let _node = laboratory();
        let mut failures = Vec::new();
        for (name, kind, script, expected) in rulesets() {
            match kind {
                Kind::Nft => {
                    std::fs::write("/run/rules", &script).unwrap();
                    run("nft -f /run/rules");
                }
                Kind::IfAble => {
                    std::fs::write("/run/rules", &script).unwrap();
                    if !try_run("nft -f /run/rules").status.success() {
                        eprintln!("skipped: this kernel cannot do {name}");
                        continue;
                    }
                }
                Kind::Shell => {
                    shell(&script);
                }
            }
            let found = judged();
            let is_unknown = |j: &forward::Judged| matches!(j.verdict, Verdict::Unknown { .. });
            let is_known = !found.verdicts.iter().any(is_unknown);
            let (stopped, mut wrong) = compare(&found);
            if (is_known.then_some(stopped), is_known) != (expected, expected.is_some()) {
                wrong.push(format!("{stopped} of 8 connections are stopped, not {expected:?}"));
            }
            if (stopped > 0, !is_known) != (!found.blockers.is_empty(), !found.doubts.is_empty()) {
                wrong.push(format!("{:?} {:?}", found.blockers, found.doubts));
            }
            if !wrong.is_empty() {
                let all: Vec<String> = found.verdicts.iter().map(ToString::to_string).collect();
                failures.push(format!("{name}: {wrong:#?}\n{all:#?}"));
            }
            for finding in [found.blockers, found.doubts, found.hiders].iter().flatten() {
                eprintln!("{name}: {finding}");
            }
            forget();
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    });
}

/// `PLAT_TEST_RULES=20000` measures a large ruleset; the default shows that it is judged rightly.
#[test]
fn the_last_of_thousands_of_rules_is_named() {
    isolated("firewalls::the_last_of_thousands_of_rules_is_named", || {
        let _node = laboratory();
        let count: usize = std::env::var("PLAT_TEST_RULES").map_or(2000, |count| count.parse().unwrap());
        let mut rules = String::from("*filter\n:FORWARD ACCEPT [0:0]\n");
        for n in 0..count {
            let (a, b) = (n / 250 % 250, n % 250);
            rules += &format!(
                "-A FORWARD -s 192.0.{a}.{b}/32 -o docker0 -p tcp -m comment --comment \"rule {n}\" -m multiport --dports 80,443 -j DROP\n"
            );
        }
        rules += "-A FORWARD -d 10.244.2.0/24 -j DROP\nCOMMIT\n";
        std::fs::write("/run/rules", &rules).unwrap();
        run("iptables-nft-restore /run/rules");
        let started = std::time::Instant::now();
        let found = judged();
        eprintln!("{count} rules: {:?}", started.elapsed());
        let [blocker] = found.blockers.as_slice() else { panic!("{:?}", found.blockers) };
        assert!(blocker.what.contains("'ip daddr 10.244.2.0/24 drop'"), "{blocker}");
        assert_eq!(found.doubts, []);
    });
}

/// `PLAT_TEST_SERVICES=5000` measures; the default shows that no Service of thousands is taken for a firewall.
#[test]
fn services_of_kube_proxy_are_no_firewall_however_many() {
    isolated("firewalls::services_of_kube_proxy_are_no_firewall_however_many", || {
        let _node = laboratory();
        let count: usize = std::env::var("PLAT_TEST_SERVICES").map_or(300, |count| count.parse().unwrap());
        shell(KUBE_PROXY);
        let (mut chains, mut rules) = (String::new(), String::new());
        for n in 2..count {
            let to = format!(
                "-d 10.96.{}.{}/32 -p tcp -m comment --comment \"ns/service-{n}:http cluster IP\" -m tcp --dport 80",
                n / 250,
                n % 250
            );
            chains += &format!(":KUBE-SVC-{n} - [0:0]\n:KUBE-SEP-{n} - [0:0]\n");
            rules += &format!("-I KUBE-SERVICES 1 {to} -j KUBE-SVC-{n}\n");
            rules += &format!("-A KUBE-SVC-{n} ! -s 10.244.0.0/16 {to} -j KUBE-MARK-MASQ\n");
            rules += &format!("-A KUBE-SVC-{n} -j KUBE-SEP-{n}\n");
            rules += &format!("-A KUBE-SEP-{n} -p tcp -m tcp -j DNAT --to-destination 10.244.1.9:80\n");
        }
        std::fs::write("/run/rules", format!("*nat\n{chains}{rules}COMMIT\n")).unwrap();
        run("iptables-nft-restore --noflush /run/rules");
        let started = std::time::Instant::now();
        let found = judged();
        eprintln!("{count} services: {:?}", started.elapsed());
        assert_eq!((found.blockers, found.doubts, found.hiders), (vec![], vec![], vec![]));
    });
}

#[test]
fn pods_pass_dockers_rules_by_the_agents_and_dockers_own_stay_apart() {
    isolated("firewalls::pods_pass_dockers_rules_by_the_agents_and_dockers_own_stay_apart", || {
        let mut node = laboratory();
        shell(DOCKER);
        let forward = || run("iptables-nft -S FORWARD");
        assert_eq!(connect("pod", pod(&cidr(FOREIGN[0])), PATIENCE), None);
        let before = run("iptables-nft -S").lines().count();
        node.start();
        node.contact();
        let blocks = vec![block(1), block_v6(1), block(2), block_v6(2)];
        node.list(blocks, vec![range("default-v4"), range("default-v6")]);
        eventually("accept rules", || {
            let rules = forward();
            if rules.matches("--comment plat").count() == 2 { Ok(()) } else { Err(rules) }
        });
        node.settled();
        node.expect_condition("ForwardingBlocked", "False", "NothingFound");
        for family in Family::ALL {
            for (from, _, to, ..) in attempts(family) {
                assert!(connect(from, to, DEADLINE).is_some(), "{from} to {to}");
            }
        }
        // Docker's come first, and nothing of them is gone.
        let rules = forward();
        let lines: Vec<&str> = rules.lines().collect();
        assert_eq!(
            lines[..3],
            ["-P FORWARD DROP", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-FORWARD"]
        );
        assert_eq!(run("iptables-nft -S").lines().count(), before + 2);
        // From the outside to a container, which Docker forbids; a pod is outside as well.
        run("ip link add docker0 type bridge");
        run("ip addr add 172.17.0.1/16 dev docker0");
        run("ip link set docker0 up");
        run("ip netns add box");
        run("ip link add vbox type veth peer name eth0 netns box");
        run("ip link set vbox master docker0 up");
        run("ip -n box addr add 172.17.0.9/16 dev eth0");
        run("ip -n box link set eth0 up");
        run("ip -n box route add default via 172.17.0.1");
        within("box", listen);
        let container: IpAddr = "172.17.0.9".parse().unwrap();
        assert_eq!(connect("pod", container, PATIENCE), None, "docker's isolation holds");
        run("iptables-nft -I FORWARD -d 172.17.0.9 -j ACCEPT");
        assert!(connect("pod", container, DEADLINE).is_some(), "nothing but docker's rules was in the way");
    });
}
