//! Verdicts in words: what drops pods' packets, or may, or hides their addresses, and what to do about it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use plat_cni::nft::{Table, TableFamily};
use plat_crds::block::{Block, Family};
use plat_crds::names::NFT_TABLE;

use super::judge::{Outcome, Place, Verdict};
use super::links::Scene;
use super::packet::{Packet, Peer, Traffic};
use super::ruleset::Ruleset;
use super::{Forwarding, admit, text};

/// Something in the way of pods' packets that we do not touch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Table and chain, as nft names them.
    pub chain: String,
    /// What it does.
    pub what: String,
    /// What to do about it.
    pub cure: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} {}: {}", self.chain, self.what, self.cure)
    }
}

/// What findings are made of.
pub struct Words<'a> {
    /// The rules.
    pub ruleset: &'a Ruleset,
    /// Tables that only their owner may change.
    pub owned: &'a BTreeSet<Table>,
    /// What was judged.
    pub scene: &'a Scene,
    /// Whether accept rules are appended.
    pub admitting: bool,
}

/// Which packets something happens to.
#[derive(Default)]
struct Hit {
    family: Option<Family>,
    traffic: BTreeSet<String>,
    blocks: BTreeSet<Block>,
}

type Hits = BTreeMap<(String, String, String, Option<u64>, String), (Place, Hit)>;

impl Words<'_> {
    /// What the verdicts on the packets come to.
    pub fn findings(&self, judged: &[(&Packet, &Outcome)]) -> Forwarding {
        let (mut blockers, mut doubts, mut hiders) = (Hits::new(), Hits::new(), Hits::new());
        for (packet, outcome) in judged {
            match &outcome.verdict {
                Verdict::Accepted => {}
                Verdict::Dropped(place) | Verdict::Unknown { at: place, .. }
                    if self.will_be_admitted(packet.family(), place) => {}
                Verdict::Dropped(place) => hit(&mut blockers, packet, place, "drops".to_owned()),
                Verdict::Rejected(place) => hit(&mut blockers, packet, place, "rejects".to_owned()),
                Verdict::Unknown { at, why, asked } => {
                    let asked = if asked.chain == at.chain && asked.rule == at.rule {
                        String::new()
                    } else {
                        format!(" in chain {} {}", asked.table, asked.chain)
                    };
                    hit(&mut doubts, packet, at, format!("depending on '{why}'{asked}, may drop"));
                }
            }
            if let Some(place) = self.hides(packet, outcome) {
                hit(&mut hiders, packet, &place, "hides the source of".to_owned());
            }
        }
        Forwarding {
            blockers: self.tell(blockers, |place| self.cure(place)),
            doubts: self.tell(doubts, |place| {
                format!("see whether pods reach each other; if not, {}", self.cure(place))
            }),
            hiders: self.tell(hiders, |place| self.cure_of_hiding(place)),
            ..Forwarding::default()
        }
    }

    fn tell(&self, hits: Hits, cure: impl Fn(&Place) -> String) -> Vec<Finding> {
        let tell = |((_, _, _, _, verb), (place, hit)): (_, (Place, Hit))| {
            let verb: String = verb;
            let traffic: Vec<String> = hit.traffic.into_iter().collect();
            let blocks: Vec<String> = hit.blocks.iter().map(Block::to_string).collect();
            let by = match place.rule {
                None => "by its policy".to_owned(),
                Some(handle) => format!("by its rule {}", self.rule(&place, handle, hit.family)),
            };
            Finding {
                chain: format!("{} {}", place.table, place.chain),
                what: format!("{verb} packets {} ({}) {by}", traffic.join(", "), blocks.join(", ")),
                cure: cure(&place),
            }
        };
        hits.into_iter().map(tell).collect()
    }

    /// A rule as nft shows it, with its handle.
    fn rule(&self, place: &Place, handle: u64, family: Option<Family>) -> String {
        let rules = self.ruleset.rules(&place.table, &place.chain).unwrap_or_default();
        let rule = rules.iter().find(|rule| rule.handle == handle);
        let family = family.unwrap_or(Family::IPv4);
        match rule.map(|rule| text::rule(rule, self.ruleset, &place.table, family)) {
            Some(text) => format!("'{text}' (handle {handle})"),
            None => format!("with handle {handle}"),
        }
    }

    /// Whether a drop is one by policy that accept rules of ours answer.
    fn will_be_admitted(&self, family: Family, place: &Place) -> bool {
        self.admitting && place.rule.is_none() && self.is_ours_to_admit(family, place)
    }

    fn is_ours_to_admit(&self, family: Family, place: &Place) -> bool {
        place.table == admit::filter(family)
            && place.base == admit::CHAIN
            && place.chain == admit::CHAIN
            && !self.owned.contains(&place.table)
    }

    /// Where a packet's source is changed that should stay: between pods always, to the world if another one than
    /// Plat's own table does it. (Which goes first is told by priority; of equal ones ours counts as first, as whose
    /// masquerade it is makes no difference then.)
    fn hides(&self, packet: &Packet, outcome: &Outcome) -> Option<Place> {
        let place = outcome.translated.as_ref()?;
        let ours = Table::new(TableFamily::Inet, NFT_TABLE);
        let to_world = matches!(packet.traffic, Traffic::To(Peer::World) | Traffic::From(Peer::World));
        (place.table != ours || !to_world).then(|| place.clone())
    }

    fn ranges(&self) -> Vec<String> {
        let blocks: BTreeSet<Block> = self.scene.packets.iter().map(|packet| packet.block).collect();
        let ranges = &self.scene.ranges;
        let uncovered = blocks.iter().filter(|block| !ranges.iter().any(|range| range.covers(block)));
        ranges.iter().chain(uncovered).map(Block::to_string).collect()
    }

    fn cure(&self, place: &Place) -> String {
        let link = if self.scene.is_bridged { &self.scene.bridge } else { "plat*" };
        let Place { table, base, .. } = place;
        if let Some(command) = self.firewalld(place) {
            command
        } else if self.owned.contains(table) {
            format!(
                "the table belongs to a running program (flags owner): have that one admit {}",
                self.ranges().join(" and ")
            )
        } else if table.family != TableFamily::Inet && table.name == "filter" && base == admit::CHAIN {
            let iptables = if table.family == TableFamily::Ip { "iptables" } else { "ip6tables" };
            let link = link.replace('*', "+");
            let on = if place.rule.is_none() {
                ", or let the agent append accept rules to a policy drop (admitForward)"
            } else {
                ""
            };
            format!(
                "{iptables} -I FORWARD -i {link} -j ACCEPT; {iptables} -I FORWARD -o {link} -j ACCEPT{on}"
            )
        } else {
            format!(
                "add rules before it that accept iifname \"{link}\" and oifname \"{link}\", at the head of chain {base}"
            )
        }
    }

    fn firewalld(&self, place: &Place) -> Option<String> {
        let sources: Vec<String> =
            self.ranges().iter().map(|range| format!("--add-source={range}")).collect();
        place.table.name.starts_with("firewalld").then(|| {
            format!("firewall-cmd --permanent --zone=trusted {} && firewall-cmd --reload", sources.join(" "))
        })
    }

    fn cure_of_hiding(&self, place: &Place) -> String {
        let ranges = self.ranges().join(" and ");
        if place.table.name.starts_with("firewalld") {
            return format!("switch masquerade off in that zone, or let it spare destinations in {ranges}");
        }
        format!("let it spare sources in {ranges}, by a rule before it that returns")
    }
}

fn hit(hits: &mut Hits, packet: &Packet, place: &Place, verb: String) {
    let key = (place.table.to_string(), place.base.clone(), place.chain.clone(), place.rule, verb);
    let (_, hit) = hits.entry(key).or_insert_with(|| (place.clone(), Hit::default()));
    hit.family.get_or_insert(packet.family());
    hit.traffic.insert(packet.traffic.to_string());
    hit.blocks.insert(packet.block);
}
