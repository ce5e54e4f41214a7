//! How this node reaches a block, and why: `plat-agent explain 10.244.2.9`.
//!
//! From what the running agent knows (its cache `map.json`) and what the kernel has, without the API server. Prints the
//! value of each field and the layer that decided it, the route that comes of it or the reason why there is none, and
//! what the kernel really has. Reads only.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Context, bail};
use ipnet::IpNet;
use plat_cni::netlink::{Protocol, Socket};
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::BlocksFile;
use plat_crds::names::{BLOCKS_FILE, MAIN_TABLE};
use plat_crds::routing::{Decided, Resolved};

use crate::args;
use crate::cache::{Cache, Loaded};
use crate::desired::{Host, Map, Me};
use crate::fabric::{Devices, Route, Rule, Target, host_prefix};
use crate::facts::{BlockFact, Fault};
use crate::folder::Folder;
use crate::kernel::{host, route, rule, vxlan};
use crate::path;
use crate::policies::{self, InForce, Resolver};
use crate::underlay::Underlay;

/// What is asked for: a block, or the one that holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject(Block);

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Subject, String> {
        let net = text.parse::<IpNet>().or_else(|_| text.parse().map(host_prefix));
        let net =
            net.map_err(|_| format!("'{text}' is neither a block, such as 10.244.2.0/24, nor an address"))?;
        Ok(Subject(Block::containing(net)))
    }
}

/// What was read of the node.
struct Seen {
    host: Host,
    /// Our routes to the block.
    routes: Vec<Route>,
    /// Our rules.
    rules: BTreeSet<Rule>,
    /// The prefix and protocol of the route that a packet takes.
    taken: Option<(IpNet, u8)>,
}

/// Whether the kernel has what the objects say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has.
    Fits,
    /// It has not, or cannot.
    Differs,
}

/// Looks, and prints.
pub fn run(explain: &args::Explain) -> anyhow::Result<Answer> {
    let run = Folder::new(&explain.place.run_dir);
    let cache = match Cache::load(&run) {
        Loaded::Cache(cache) => cache,
        Loaded::Nothing => {
            bail!("there is no map.json in {}: no agent has run here yet", run.path().display())
        }
        Loaded::Unusable(why) => bail!("the agent's map.json cannot be used: {why}"),
    };
    let file =
        run.get(BLOCKS_FILE)?.context("there is no blocks.json, so it is not known which node this is")?;
    let node = BlocksFile::parse(&file).map_err(|error| anyhow::anyhow!("blocks.json: {error}"))?.node;
    let policies = policies::in_force(&cache.policies, &policies::labels_of(&node, &cache.blocks));
    let Subject(asked) = explain.subject;
    let Some(block) = cache.blocks.values().find(|block| block.block.covers(&asked)) else {
        let range = cache.ranges.values().find(|range| range.range.covers(&asked));
        match range {
            Some(range) => {
                println!("{asked} lies in no block: nobody holds it yet of ClusterCIDR {}", range.name)
            }
            None => println!("{asked} lies in no block, nor in a ClusterCIDR: it is none of Plat's"),
        }
        return Ok(Answer::Differs);
    };
    let me = Me::onlooker(node, explain.place.bridge.clone());
    // Others' other blocks do not matter for the way to this one.
    let of_way = |fact: &&BlockFact| fact.name == block.name || fact.node == me.node;
    let blocks: BTreeMap<String, BlockFact> =
        cache.blocks.values().filter(of_way).map(|fact| (fact.name.clone(), fact.clone())).collect();
    let absent = BTreeSet::new();
    let map = Map { blocks: &blocks, ranges: &cache.ranges, policies: &policies, absent: &absent };
    let seen = look(&me, map, &asked, &block.block)?;
    let (lines, answer) = explained(&me, map, block, &policies, &seen);
    lines.iter().for_each(|line| println!("{line}"));
    Ok(answer)
}

fn look(me: &Me, map: Map<'_>, asked: &Block, block: &Block) -> anyhow::Result<Seen> {
    let mut socket = Socket::open(Protocol::Route)?;
    let view = host::observe(&mut socket, &me.bridge)?;
    let (found, _) = host::meet(&mut socket, &view, path::needs(me, map))?;
    let tunnels = vxlan::observe(&mut socket, &view)?;
    let tunnel = |family| tunnels.get(&family).map(|tunnel| tunnel.index);
    let ours =
        Devices { bridge: view.bridge, tunnel_v4: tunnel(Family::IPv4), tunnel_v6: tunnel(Family::IPv6) };
    let routes = route::dump(&mut socket, ours)?.into_values();
    let rules = rule::dump(&mut socket)?.into_iter().filter_map(|found| found.ours());
    Ok(Seen {
        host: Host { addresses: host::addresses_to_others(&view), ..found },
        routes: routes.filter(|route| route.key.prefix == *block).collect(),
        rules: rules.collect(),
        taken: route::matching(&mut socket, asked.network())?,
    })
}

fn explained(
    me: &Me,
    map: Map<'_>,
    block: &BlockFact,
    policies: &[InForce],
    seen: &Seen,
) -> (Vec<String>, Answer) {
    let BlockFact { name, node, state, range, .. } = block;
    let mut lines = vec![format!(
        "block    {} (PodCIDR {name}, {state:?}) of node {node}, from ClusterCIDR {range}",
        block.block
    )];
    let about = policies.iter().filter(|policy| policy.destinations.matches(&block.labels));
    let about: Vec<String> = about.map(|p| format!("{} (priority {})", p.name, p.priority)).collect();
    lines.push(format!("policies {}", if about.is_empty() { "none".to_owned() } else { about.join(", ") }));
    let kernel = |lines: &mut Vec<String>| {
        lines.extend(seen.routes.iter().map(|route| format!("kernel   {}", shown(route, &seen.host))));
        lines.extend(seen.routes.is_empty().then(|| "kernel   has no route of Plat's to it".to_owned()));
        lines.push(match seen.taken {
            Some((prefix, protocol)) => format!("packets  take the route to {prefix} of protocol {protocol}"),
            None => "packets  have no way there".to_owned(),
        });
    };
    if *node == me.node {
        lines.push(
            "wanted   the block of this node itself: to its own pods, whatever policies say".to_owned(),
        );
        kernel(&mut lines);
        let answer = if seen.routes.is_empty() && !block.released() { Answer::Differs } else { Answer::Fits };
        return (lines, answer);
    }
    let resolved = Resolver::of(map).resolve(block);
    if let Ok(policy) = resolved.as_ref() {
        lines.extend(fields(policy));
    }
    let wanted = if block.released() {
        Ok(None)
    } else {
        path::route(block, &resolved, &seen.host, &Underlay::new(me, map, &seen.host))
    };
    lines.push(match &wanted {
        Ok(Some(route)) => format!("wanted   {}", shown(route, &seen.host)),
        Ok(None) if block.released() => {
            "wanted   no route: the block rests until it may be reused".to_owned()
        }
        Ok(None) => "wanted   no route: something else carries the block".to_owned(),
        Err(fault) => format!("wanted   cannot be: {} ({})", fault.message, fault.reason.as_str()),
    });
    kernel(&mut lines);
    let why = differs(&wanted, seen);
    let answer = if why.is_none() { Answer::Fits } else { Answer::Differs };
    lines.push(why.unwrap_or_else(|| "the kernel has what is wanted".to_owned()));
    (lines, answer)
}

/// Why the kernel does not have what is wanted.
fn differs(wanted: &Result<Option<Route>, Fault>, seen: &Seen) -> Option<String> {
    let others = |but: Option<&Route>| seen.routes.iter().any(|route| Some(route) != but);
    match wanted {
        Err(_) => Some("differs: the policy cannot be followed, so the route that was there before stays".to_owned()),
        Ok(None) if others(None) => Some(STALE.to_owned()),
        Ok(None) => None,
        Ok(Some(route)) if !seen.routes.contains(route) => Some(
            "differs: the agent makes the route in its next pass; if it stays so, its log and the condition RoutesReady of this NodeNetwork say why".to_owned(),
        ),
        Ok(Some(route)) if others(Some(route)) => Some(STALE.to_owned()),
        Ok(Some(Route { key, .. }))
            if key.table != MAIN_TABLE && !seen.rules.contains(&Rule::to(key.family(), key.table)) =>
        {
            Some(format!("differs: there is no rule that leads to table {}; the agent puts it back", key.table))
        }
        Ok(Some(route)) => match seen.taken {
            Some((prefix, _)) if prefix.prefix_len() > route.key.prefix.prefix_length() => Some(format!(
                "differs: another program's route to {prefix} is more specific and takes the packets; remove it"
            )),
            _ => None,
        },
    }
}

const STALE: &str = "differs: the kernel has a route that should go; the agent removes it in its next pass";

/// One line for each field: its value, and the layer that decided it.
fn fields(policy: &Resolved) -> Vec<String> {
    fn line<T>(name: &str, field: &Decided<T>, value: impl Fn(&T) -> Option<String>) -> String {
        let value = value(&field.value).unwrap_or_else(|| "-".to_owned());
        format!("  {name:<14} {value:<24} {}", field.from)
    }
    fn some<T: Display>(value: &Option<T>) -> Option<String> {
        value.as_ref().map(T::to_string)
    }
    vec![
        line("mode", &policy.mode, |mode| Some(format!("{mode:?}"))),
        line("nextHop", &policy.next_hops, |hops| {
            let hops: Vec<String> = hops
                .iter()
                .map(|hop| match hop.weight {
                    1 => hop.address.to_string(),
                    weight => format!("{} weight {weight}", hop.address),
                })
                .collect();
            (!hops.is_empty()).then(|| hops.join(", "))
        }),
        line("interface", &policy.interface, some),
        line("metric", &policy.metric, |metric| Some(metric.to_string())),
        line("table", &policy.table, |table| Some(table.to_string())),
        line("mtu", &policy.mtu, some),
        line("advmss", &policy.advmss, some),
        line("initcwnd", &policy.initcwnd, some),
        line("sourceAddress", &policy.source_address, some),
        line("onLink", &policy.on_link, |on_link| Some(on_link.to_string())),
    ]
}

/// A route with the names of its links.
fn shown(route: &Route, host: &Host) -> String {
    let name =
        |index: u32| host.devices.iter().find(|(_, device)| device.index == index).map(|(name, _)| name);
    let Target::Via(hops) = &route.target else { return route.to_string() };
    let links: BTreeSet<&str> = hops.iter().filter_map(|hop| name(hop.device)).map(String::as_str).collect();
    if links.is_empty() {
        return route.to_string();
    }
    format!("{route} on {}", links.into_iter().collect::<Vec<_>>().join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Device, Leads, Location};
    use crate::fixtures::{block, range};
    use std::net::IpAddr;

    fn seen(routes: Vec<Route>) -> Seen {
        let device = Device { index: 2, up: true, mtu: 1500, leads: Leads::ToNeighbours };
        let at = |n: u8| (IpAddr::from([172, 30, 0, n]), Location::OnLink { device: 2 });
        Seen {
            host: Host {
                locations: (1..20).map(at).collect(),
                devices: [("eth0".to_owned(), device)].into(),
                ..Host::default()
            },
            routes,
            rules: BTreeSet::new(),
            taken: Some(("10.244.2.0/24".parse().unwrap(), 112)),
        }
    }

    fn said(routing: &str, seen: &Seen) -> (String, Answer) {
        let far = BlockFact { routing: Some(serde_json::from_str(routing).unwrap()), ..block(2) };
        let blocks = BTreeMap::from([(far.name.clone(), far.clone())]);
        let ranges = BTreeMap::from([("default-v4".to_owned(), range("default-v4"))]);
        let policies = [InForce {
            name: "storage".into(),
            generation: 1,
            priority: 5,
            destinations: Default::default(),
            routing: serde_json::from_str(r#"{"mtu":1400,"advmss":1300}"#).unwrap(),
        }];
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &policies, absent: &Default::default() };
        let me = Me::onlooker("n1".into(), "cni0".into());
        let (lines, answer) = explained(&me, map, &far, &policies, seen);
        (lines.join("\n"), answer)
    }

    fn wanted() -> Route {
        let key = crate::fabric::RouteKey::main("10.244.2.0/24".parse().unwrap(), 7);
        let target = Target::via([crate::fabric::Hop::to([172, 30, 0, 12].into(), 2)]);
        Route { mtu: Some(1400), advmss: Some(1300), ..Route::new(key, target) }
    }

    #[test]
    fn each_value_is_told_with_the_layer_that_decided_it() {
        let (text, answer) = said(r#"{"metric":7}"#, &seen(vec![wanted()]));
        assert_eq!(answer, Answer::Fits, "{text}");
        assert_eq!(
            text,
            "\
block    10.244.2.0/24 (PodCIDR 10-244-2-0-24, Active) of node n2, from ClusterCIDR default-v4
policies storage (priority 5)
  mode           Auto                     built-in default
  nextHop        -                        built-in default
  interface      -                        built-in default
  metric         7                        PodCIDR
  table          254                      built-in default
  mtu            1400                     RoutingPolicy 'storage'
  advmss         1300                     RoutingPolicy 'storage'
  initcwnd       -                        built-in default
  sourceAddress  -                        built-in default
  onLink         false                    built-in default
wanted   10.244.2.0/24 via 172.30.0.12 metric 7 mtu 1400 advmss 1300 on eth0
kernel   10.244.2.0/24 via 172.30.0.12 metric 7 mtu 1400 advmss 1300 on eth0
packets  take the route to 10.244.2.0/24 of protocol 112
the kernel has what is wanted"
        );
    }

    #[test]
    fn it_says_why_the_kernel_has_something_else() {
        for (routing, seen, words) in [
            (r#"{"metric":7}"#, seen(vec![]), "has no route of Plat's"),
            (r#"{"metric":7}"#, seen(vec![]), "in its next pass"),
            (r#"{"metric":8}"#, seen(vec![wanted()]), "in its next pass"),
            (r#"{"mode":"None"}"#, seen(vec![wanted()]), "should go"),
            (
                r#"{"metric":7,"mtu":9000}"#,
                seen(vec![wanted()]),
                "mtu 9000 of the PodCIDR is above the 1500 of link eth0",
            ),
            (r#"{"metric":7,"interface":"eth9"}"#, seen(vec![wanted()]), "(NoInterface)"),
            (
                r#"{"metric":7}"#,
                Seen { taken: Some(("10.244.2.128/25".parse().unwrap(), 4)), ..seen(vec![wanted()]) },
                "another program's route to 10.244.2.128/25",
            ),
            (
                r#"{"metric":7,"table":1000}"#,
                seen(vec![Route {
                    key: crate::fabric::RouteKey { table: 1000, ..wanted().key },
                    ..wanted()
                }]),
                "no rule that leads to table 1000",
            ),
        ] {
            let (text, answer) = said(routing, &seen);
            assert_eq!(answer, Answer::Differs, "{routing}");
            assert!(text.contains(words), "{routing}: {text}");
        }
    }

    #[test]
    fn a_block_or_an_address_is_asked_for() {
        for (text, block) in
            [("10.244.2.0/24", "10.244.2.0/24"), ("10.244.2.9", "10.244.2.9/32"), ("fd00::1", "fd00::1/128")]
        {
            assert_eq!(text.parse(), Ok(Subject(block.parse().unwrap())));
        }
        assert!("n2".parse::<Subject>().is_err());
    }
}
