//! The nftables encoder against the kernel: what it writes is what `nft list` shows, and what the dumps
//! read back is what was written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use plat_cni::netlink::{Protocol, Socket};
use plat_cni::nft::*;
use plat_crds::{Block, Family};

fn socket() -> Socket {
    Socket::open(Protocol::Netfilter).unwrap()
}

fn send(batch: Batch) {
    batch.send(&mut socket()).unwrap();
}

fn block(text: &str) -> Block {
    text.parse().unwrap()
}

/// `nft list table`, with the counters that vary left out and one space where there are many.
fn listed(table: &Table) -> String {
    let text = lab::run("nft", &["list", "table", &table.family.to_string(), &table.name]);
    text.lines().map(str::trim).collect::<Vec<_>>().join("\n").replace("counter packets 0 bytes 0", "counter")
}

#[test]
fn a_masquerade_table_lists_as_its_rules_say() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "plat");
    let sets = [
        Set::prefixes(&table, "pods4", Family::IPv4),
        Set::prefixes(&table, "pods6", Family::IPv6),
        Set::prefixes(&table, "nomasq4", Family::IPv4),
    ];
    let prefixes = [
        block("10.244.0.0/16"),
        block("fd00:10:244::/48"),
        block("10.244.7.0/24"),
        block("172.30.0.11/32"),
        block("255.255.255.255/32"),
    ];
    let rule = |chain: &str| Rule::new(&table, chain);
    let rules = [
        rule("postrouting").daddr(Addr::In(block("224.0.0.0/4"))).accept(),
        rule("postrouting")
            .saddr(Addr::InSet(Family::IPv4, "pods4"))
            .daddr(Addr::NotInSet(Family::IPv4, "nomasq4"))
            .oifname(Name::IsNot("cni0"))
            .counter()
            .masquerade_fully_random(),
        rule("postrouting")
            .saddr(Addr::InSet(Family::IPv6, "pods6"))
            .daddr(Addr::NotIn(block("ff00::/8")))
            .oifname(Name::IsNot("cni0"))
            .counter()
            .masquerade_fully_random(),
        rule("forward").iifname(Name::Is("cni0")).ct_state(2 | 4).counter().accept(),
        rule("forward").ct_status_dnat().verdict(Verdict::Jump("other".into())),
        rule("forward").daddr(Addr::In(block("10.244.16.0/20"))).verdict(Verdict::Return),
        rule("other").not_from_this_host().to_this_host().mark(0xff, 1).drop(),
        rule("other").dport(6, 80).drop(),
    ];
    let mut batch = Batch::new();
    batch.replace_table(&table);
    for set in &sets {
        batch.add_set(set);
    }
    batch.add_prefixes(&sets[0], &prefixes[..1]);
    batch.add_prefixes(&sets[1], &prefixes[1..2]);
    batch.add_elements(&sets[2], &[]);
    let v4: Vec<Block> = prefixes.iter().copied().filter(|p| p.family() == Family::IPv4).collect();
    batch.add_prefixes(&sets[2], &v4);
    batch.add_base_chain(&table, "postrouting", &BaseChain::nat(Hook::Postrouting, SRCNAT));
    batch.add_base_chain(&table, "forward", &BaseChain::filter(Hook::Forward, FILTER));
    batch.add_chain(&table, "other");
    for rule in &rules {
        batch.add_rule(rule);
    }
    send(batch);

    let expected = format!(
        r#"table inet plat {{
set pods4 {{
type ipv4_addr
flags interval
elements = {{ 10.244.0.0/16 }}
}}

set pods6 {{
type ipv6_addr
flags interval
elements = {{ fd00:10:244::/48 }}
}}

set nomasq4 {{
type ipv4_addr
flags interval
elements = {{ 10.244.0.0/16, 172.30.0.11,
255.255.255.255 }}
}}

chain postrouting {{
type nat hook postrouting priority srcnat; policy accept;
{}
{}
{}
}}

chain forward {{
type filter hook forward priority filter; policy accept;
{}
{}
{}
}}

chain other {{
{}
{}
}}
}}"#,
        rules[0].text(),
        rules[1].text(),
        rules[2].text(),
        rules[3].text(),
        rules[4].text(),
        rules[5].text(),
        rules[6].text(),
        rules[7].text(),
    );
    assert_eq!(listed(&table), expected);

    // What is read back is what was written, instruction by instruction.
    for chain in ["postrouting", "forward", "other"] {
        let read = plat_cni::nft::rules(&mut socket(), &table, chain).unwrap();
        let wrote: Vec<&Rule> =
            rules.iter().filter(|r| read.iter().any(|x| x.expressions == r.expressions())).collect();
        assert_eq!(read.len(), wrote.len(), "{chain}: {read:#?}");
    }
}

#[test]
fn a_table_is_replaced_whole_and_twice_the_same_is_the_same() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "plat");
    lab::run("nft", &["add table inet plat { chain old { counter; }; set s { type ipv4_addr; }; }"]);
    let render = || {
        let mut batch = Batch::new();
        batch.replace_table(&table);
        batch.add_base_chain(&table, "postrouting", &BaseChain::nat(Hook::Postrouting, SRCNAT));
        batch.add_rule(&Rule::new(&table, "postrouting").counter().masquerade());
        batch
    };
    send(render());
    let once = listed(&table);
    assert!(!once.contains("old"), "{once}");
    assert!(once.contains("counter masquerade"), "{once}");
    send(render());
    assert_eq!(listed(&table), once);
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_the_rule() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "plat");
    let mut batch = Batch::new();
    batch.replace_table(&table);
    batch.add_chain(&table, "c");
    batch.add_rule(&Rule::new(&table, "c").saddr(Addr::InSet(Family::IPv4, "missing")).drop());
    batch.add_rule(&Rule::new(&table, "c").accept());
    let error = batch.send(&mut socket()).unwrap_err();
    assert_eq!(error.errno(), Some(rustix::io::Errno::NOENT));
    assert!(error.to_string().contains("add rule inet plat c ip saddr @missing drop"), "{error}");
    assert_eq!(tables(&mut socket()).unwrap(), []);
}

#[test]
fn a_transaction_of_many_thousand_prefixes_is_one_transaction() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "plat");
    let set = Set::prefixes(&table, "nodes", Family::IPv4);
    let mut batch = Batch::new();
    batch.replace_table(&table);
    batch.add_set(&set);
    // Every second address, so that nothing merges.
    let base = block("10.0.0.0/8");
    let nodes: Vec<Block> = (0..20_000).map(|i| Block::of(base.host(2 * i).unwrap(), 32).unwrap()).collect();
    batch.add_prefixes(&set, &nodes);
    send(batch);
    let keys = elements(&mut socket(), &set).unwrap();
    assert_eq!(keys.len(), 2 * nodes.len(), "each has a start and an end mark");
}

#[test]
fn a_verdict_map_sends_each_address_its_way() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "plat-pods");
    let map = Set::verdicts(&table, "masq4", &[KeyType::Ipv4]);
    let element = |a: [u8; 4]| Element::address(a.into()).verdict(Verdict::Jump("net".into()));
    let mut batch = Batch::new();
    batch.add_table(&table);
    batch.add_set(&map);
    batch.add_chain(&table, "net");
    batch.add_base_chain(&table, "masq", &BaseChain::nat(Hook::Postrouting, SRCNAT));
    batch.add_rule(&Rule::new(&table, "masq").vmap(&[Field::Saddr(Family::IPv4)], "masq4"));
    batch.add_elements(&map, &[element([10, 1, 0, 2]), element([10, 1, 0, 3])]);
    send(batch);
    let text = listed(&table);
    assert!(text.contains("ip saddr vmap @masq4"), "{text}");
    assert!(text.contains("10.1.0.2 : jump net"), "{text}");

    let mut batch = Batch::new();
    batch.delete_elements(&map, &[Element::address([10, 1, 0, 2].into())]);
    send(batch);
    assert_eq!(elements(&mut socket(), &map).unwrap(), [vec![10, 1, 0, 3]]);
}

#[test]
fn maps_and_concatenations_list_as_what_they_are() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "t");
    let ports =
        Set::map(&table, "ports", &[KeyType::Protocol, KeyType::Port], &[KeyType::Ipv4, KeyType::Port]);
    let macs = Set::of(&table, "macs", &[KeyType::Interface, KeyType::Ether]);
    let links = Set::of(&table, "links", &[KeyType::Interface]);
    let mut batch = Batch::new();
    batch.add_table(&table);
    batch.add_set(&ports);
    batch.add_set(&macs);
    batch.add_set(&links);
    let targets = Set::of(&table, "targets", &[KeyType::Interface, KeyType::Transport(8, 16)]);
    batch.add_set(&targets);
    batch.add_elements(&targets, &[Element::key(&[&Element::interface("eth2"), &[0xfd; 16]])]);
    batch.add_elements(&links, &[Element::key(&[&Element::interface("eth1")])]);
    batch.add_elements(
        &ports,
        &[Element::key(&[&[6], &8080u16.to_be_bytes()]).value(&[&[10, 1, 0, 2], &80u16.to_be_bytes()])],
    );
    batch.add_elements(&macs, &[Element::key(&[&Element::interface("eth0"), &[2, 0, 0, 0, 0, 1]])]);
    send(batch);
    let text = listed(&table);
    assert!(text.contains("type inet_proto . inet_service : ipv4_addr . inet_service"), "{text}");
    assert!(text.contains("tcp . 8080 : 10.1.0.2 . 80"), "{text}");
    assert!(text.contains("\"eth0\" . 02:00:00:00:00:01"), "{text}");
    assert!(text.contains("{ \"eth1\" }"), "{text}");
    assert!(text.contains("typeof iifname . @th,64,128"), "{text}");
    assert!(text.contains(&format!("\"eth2\" . 0x{}", "fd".repeat(16))), "{text}");
}

#[test]
fn looking_up_several_fields_at_once_lists_and_reads_back_as_what_it_is() {
    lab::enter();
    let bridge = Table::new(TableFamily::Bridge, "t");
    let inet = Table::new(TableFamily::Inet, "t");
    let mut batch = Batch::new();
    use Field::*;
    let v6 = Family::IPv6;
    let rules = [
        Rule::new(&bridge, "c")
            .untagged(Family::IPv4)
            .in_set(&[Iifname, EtherSaddr, Saddr(Family::IPv4)], "own4")
            .accept(),
        Rule::new(&bridge, "c").untagged_arp().in_set(&[Iifname, ArpSaddrEther, ArpSaddrIp], "own4").accept(),
        Rule::new(&bridge, "c")
            .untagged(v6)
            .is_not(L4proto, &[58], "ipv6-icmp")
            .is(Ip6Length, &24u16.to_be_bytes(), "24")
            .in_set(&[Iifname, EtherSaddr, Saddr(v6)], "own6")
            .accept(),
        Rule::new(&bridge, "c").in_set(&[Iifname, EtherSaddr, Transport(8, 16)], "own6").drop(),
        Rule::new(&inet, "c").iifname(Name::BeginsNot("plat")).vmap(&[L4proto, Dport], "ports"),
    ];
    for table in [&bridge, &inet] {
        batch.add_table(table);
        batch.add_base_chain(table, "c", &BaseChain::filter(Hook::Prerouting, RAW));
    }
    batch.add_set(&Set::of(&bridge, "own4", &[KeyType::Interface, KeyType::Ether, KeyType::Ipv4]));
    batch.add_set(&Set::of(&bridge, "own6", &[KeyType::Interface, KeyType::Ether, KeyType::Ipv6]));
    batch.add_set(&Set::verdicts(&inet, "ports", &[KeyType::Protocol, KeyType::Port]));
    rules.iter().for_each(|rule| batch.add_rule(rule));
    send(batch);
    for table in [&bridge, &inet] {
        let text = listed(table);
        let found = plat_cni::nft::rules(&mut socket(), table, "c").unwrap();
        let added: Vec<&Rule> = rules.iter().filter(|r| r.table() == table).collect();
        assert_eq!(found.len(), added.len());
        for (rule, found) in added.into_iter().zip(found) {
            assert!(text.contains(rule.text()), "{} in {text}", rule.text());
            assert_eq!(found.expressions, rule.expressions());
        }
    }
}

#[test]
fn accept_rules_in_iptables_forward_read_as_plain_iptables_rules_and_come_off_again() {
    lab::enter();
    lab::run("iptables-nft", &["-P", "FORWARD", "DROP"]);
    lab::run("iptables-nft", &["-A", "FORWARD", "-s", "192.0.2.0/24", "-j", "DROP"]);
    lab::run("ip6tables-nft", &["-P", "FORWARD", "DROP"]);
    let chains = chains(&mut socket()).unwrap();
    let forward = chains.iter().find(|c| c.table.family == TableFamily::Ip && c.name == "FORWARD").unwrap();
    let hook = forward.hook.clone().unwrap();
    assert_eq!((hook.kind.as_str(), hook.number, hook.priority), ("filter", Hook::Forward.number(), FILTER));
    assert_eq!(hook.policy, Policy::Drop);

    let table = &forward.table;
    let table6 = Table::new(TableFamily::Ip6, "filter");
    let rule = |t: &Table| Rule::new(t, "FORWARD").comment("plat");
    let rules = [
        rule(table).iifname(Name::Is("cni0")).saddr(Addr::In(block("10.244.3.0/24"))).counter().accept(),
        rule(table).oifname(Name::Is("cni0")).daddr(Addr::In(block("10.244.16.0/20"))).counter().accept(),
        rule(&table6).oifname(Name::Is("cni0")).daddr(Addr::In(block("fd00:10::/64"))).counter().accept(),
    ];
    let mut batch = Batch::new();
    for rule in &rules {
        batch.add_rule(rule);
    }
    send(batch);
    assert_eq!(
        lab::run("iptables-nft", &["-S", "FORWARD"]),
        "-P FORWARD DROP\n\
         -A FORWARD -s 192.0.2.0/24 -j DROP\n\
         -A FORWARD -s 10.244.3.0/24 -i cni0 -m comment --comment plat -j ACCEPT\n\
         -A FORWARD -d 10.244.16.0/20 -o cni0 -m comment --comment plat -j ACCEPT\n"
    );
    assert!(
        lab::run("ip6tables-nft", &["-S", "FORWARD"])
            .contains("-A FORWARD -d fd00:10::/64 -o cni0 -m comment --comment plat -j ACCEPT")
    );
    // A save and restore by iptables must bring the same rules back.
    lab::sh("iptables-nft-save | iptables-nft-restore");
    assert!(lab::run("iptables-nft", &["-S", "FORWARD"]).contains("-s 10.244.3.0/24 -i cni0"));

    // They are found again by what they do, before and after.
    let read = plat_cni::nft::rules(&mut socket(), table, "FORWARD").unwrap();
    let mut batch = Batch::new();
    for found in read.iter().filter(|r| rules.iter().any(|mine| same(&r.expressions, mine.expressions()))) {
        batch.delete_rule(table, "FORWARD", found.handle);
    }
    send(batch);
    assert_eq!(
        lab::run("iptables-nft", &["-S", "FORWARD"]),
        "-P FORWARD DROP\n-A FORWARD -s 192.0.2.0/24 -j DROP\n"
    );
}

/// Equal but for an iptables comment, which a save and restore turns into an expression.
fn same(read: &[Expr], wrote: &[Expr]) -> bool {
    let plain = |e: &&Expr| !matches!(e, Expr::Other { name, .. } if name == "match");
    read.iter().filter(plain).eq(wrote.iter())
}

#[test]
fn a_rule_is_deleted_by_its_handle_and_comments_are_read() {
    lab::enter();
    let table = Table::new(TableFamily::Inet, "t");
    let mut batch = Batch::new();
    batch.add_table(&table);
    batch.add_chain(&table, "c");
    batch.add_rule(&Rule::new(&table, "c").counter().comment("first"));
    batch.add_rule(&Rule::new(&table, "c").accept());
    batch.insert_rule(&Rule::new(&table, "c").drop());
    send(batch);
    let found = rules(&mut socket(), &table, "c").unwrap();
    assert_eq!(found.iter().map(|r| r.comment.as_deref()).collect::<Vec<_>>(), [None, Some("first"), None]);
    assert_eq!(found[0].expressions, [Expr::Verdict(Verdict::Drop)]);
    let mut batch = Batch::new();
    batch.delete_rule(&table, "c", found[0].handle);
    batch.delete_rule(&table, "c", found[2].handle);
    send(batch);
    assert_eq!(rules(&mut socket(), &table, "c").unwrap().len(), 1);
    let mut batch = Batch::new();
    batch.flush_chain(&table, "c");
    send(batch);
    assert_eq!(rules(&mut socket(), &table, "c").unwrap(), []);
    assert_eq!(rules(&mut socket(), &table, "nowhere").unwrap(), []);
}

#[test]
fn deleting_what_is_not_there_is_an_error_that_names_it() {
    lab::enter();
    let mut batch = Batch::new();
    batch.delete_table(&Table::new(TableFamily::Ip, "nowhere"));
    let error = batch.send(&mut socket()).unwrap_err().to_string();
    assert_eq!(error, "delete table ip nowhere: does not exist");
}
