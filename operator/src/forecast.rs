//! When a range runs out of blocks, told ahead. Pure.
//!
//! What was seen is kept in the range's status, one number a day ([`RangeForecast::peaks`]), so it survives a
//! restart and a new leader, and costs one write a day. The pace is taken from the slopes between all pairs of
//! complete days (after Theil and Sen), not their median but the one that two fifths of them stay below: of a
//! single step, whenever it was, almost half of the pairs see nothing. So neither the day on which a cluster was
//! installed, nor one rollout, nor a clock that jumped makes an alarm. What comes and goes within a day is hidden
//! by taking each day's peak, what comes and goes within a week by never looking at less than one.
//!
//! Nothing is foretold further ahead than twice the time that was seen.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_crds::cluster_cidr::{Allocation, MAX_PEAKS, RangeForecast};
use plat_crds::condition::{self, EXHAUSTED, Verdict};

use crate::facts::RangeFact;
use crate::plan::Plan;
use crate::reason;
use crate::snapshot::Snapshot;
use plat_crds::selector::Selector;

/// Complete days that must have been seen: a week has its own ups and downs, and a cluster its installation.
const MIN_DAYS: usize = 7;
/// The warning begins so long before the range runs out.
pub const WARN_AHEAD: Duration = Duration::from_secs(14 * DAY);
/// The warning ends once the range lasts so long: not each day that it is a little slower.
const CALM_AHEAD: Duration = Duration::from_secs(21 * DAY);
/// A range with fewer than one free block in so many is nearly full, whatever its pace.
const LOW_SHARE: u64 = 20;
/// It is so until one in so many is free: not each time that a node comes or goes.
const CALM_SHARE: u64 = 10;

const DAY: u64 = 24 * 60 * 60;
/// [`RangeForecast::growth`] is that of so many days.
pub const DAYS_OF_GROWTH: f64 = 30.0;

/// Blocks of a range, as far as they matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Blocks that fit into it.
    pub total: u64,
    /// Blocks that can still be carved.
    pub free: u64,
}

/// How much longer a range lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// None is free.
    Exhausted,
    /// At the pace seen it runs out at that time, which is near.
    RunsOut(Timestamp),
    /// Few blocks are free.
    Low,
    /// Long enough.
    Enough,
}

/// What is to be remembered now, and what it foretells.
pub fn forecast(old: Option<&RangeForecast>, fill: Fill, now: Timestamp) -> RangeForecast {
    let used = clamp(fill.total.saturating_sub(fill.free));
    let (since, peaks) = remember(old, used, now);
    let (complete, today) = match peaks.split_last() {
        Some((today, complete)) => (complete, *today),
        None => (&[][..], used),
    };
    let slope = if complete.len() >= MIN_DAYS { pace(complete) } else { 0.0 };
    let started = after(since, complete.len());
    RangeForecast {
        growth: round(slope.max(0.0) * DAYS_OF_GROWTH),
        exhausted_at: exhausted_at(slope, fill.total, complete, today, started).map(Time),
        since: Some(Time(since)),
        peaks,
    }
}

/// How much longer the range lasts; `warned` if that has been warned of and has not been taken back.
pub fn outlook(forecast: &RangeForecast, fill: Fill, warned: bool, now: Timestamp) -> Outlook {
    if fill.free == 0 {
        return Outlook::Exhausted;
    }
    let ahead = if warned { CALM_AHEAD } else { WARN_AHEAD };
    let by = now.checked_add(ahead).unwrap_or(Timestamp::MAX);
    match &forecast.exhausted_at {
        Some(Time(at)) if *at <= by => Outlook::RunsOut(*at),
        _ if fill.is_low(warned) => Outlook::Low,
        _ => Outlook::Enough,
    }
}

/// The condition `Exhausted`.
pub fn exhausted(
    range: &RangeFact,
    forecast: &RangeForecast,
    fill: Fill,
    plan: &Plan,
    snapshot: &Snapshot,
) -> Verdict {
    let (status, reason, what) = match outlook(forecast, fill, is_warned_of(range), snapshot.clock.wall) {
        Outlook::Enough => return Verdict::new(EXHAUSTED, Some(false), reason::BLOCKS_FREE, ""),
        _ if range.allocation != Allocation::Enabled && fill.free > 0 => {
            return Verdict::new(
                EXHAUSTED,
                Some(false),
                reason::BLOCKS_FREE,
                "no new blocks are carved from it",
            );
        }
        Outlook::Exhausted => {
            let what = format!("all {} blocks are held, quarantined or reserved", fill.total);
            (true, reason::RANGE_EXHAUSTED, what)
        }
        Outlook::RunsOut(at) => {
            let (growth, days) = (forecast.growth, forecast.peaks.len().saturating_sub(1));
            let what = format!(
                "its {} blocks are used up by {}, if it goes on as in the last {days} days ({growth} blocks in 30 days)",
                fill.total,
                at.strftime("%Y-%m-%d"),
            );
            (false, reason::RUNS_OUT_SOON, what)
        }
        Outlook::Low => {
            (false, reason::FEW_BLOCKS_LEFT, format!("{} of {} blocks are free", fill.free, fill.total))
        }
    };
    match successor(range, plan, snapshot) {
        Some(other) => {
            let reason = if status { reason } else { reason::OTHERS_TAKE_OVER };
            let message = format!("{what}; nodes get blocks of ClusterCIDR {other} then");
            Verdict::new(EXHAUSTED, Some(status), reason, message)
        }
        None if status => {
            let message = format!("{what}: nodes without a block wait; add another ClusterCIDR");
            Verdict::new(EXHAUSTED, Some(true), reason, message)
        }
        None => Verdict::new(EXHAUSTED, Some(false), reason, format!("{what}: add another ClusterCIDR")),
    }
}

/// Whether the range's condition warns ahead, as it is written.
fn is_warned_of(range: &RangeFact) -> bool {
    let ahead = [reason::RUNS_OUT_SOON, reason::FEW_BLOCKS_LEFT, reason::OTHERS_TAKE_OVER];
    condition::find(&range.status.conditions, EXHAUSTED).is_some_and(|c| ahead.contains(&c.reason.as_str()))
}

/// A range with room that serves all nodes that this one serves.
fn successor<'a>(range: &RangeFact, plan: &Plan, snapshot: &'a Snapshot) -> Option<&'a str> {
    let family = |range: &RangeFact| range.range.map(|range| range.family());
    let takes_over = |other: &&RangeFact| {
        let outlook = plan.ranges.get(&other.name);
        other.name != range.name
            && family(other) == family(range)
            && other.allocation == Allocation::Enabled
            && other.is_prepared()
            && (other.selector == range.selector || other.selector == Selector::default())
            && outlook.is_some_and(|outlook| {
                outlook.judgement.is_good() && !outlook.fill().is_low(is_warned_of(other))
            })
    };
    snapshot.ranges.values().map(|other| &**other).find(takes_over).map(|other| &*other.name)
}

impl Fill {
    /// Whether fewer than one block in twenty is free; once that has been warned of, in ten.
    fn is_low(&self, warned: bool) -> bool {
        let share = if warned { CALM_SHARE } else { LOW_SHARE };
        self.free < (self.total / share).max(1)
    }
}

/// The peaks with today's among them. Days that nobody saw repeat the one before. Days from the future were
/// written by a wrong clock and are dropped.
fn remember(old: Option<&RangeForecast>, used: i32, now: Timestamp) -> (Timestamp, Vec<i32>) {
    let today = day(now);
    let anew = (start_of(today), vec![used]);
    let Some((since, mut peaks)) = old
        .and_then(|old| Some((day(old.since.as_ref()?.0), old.peaks.clone())))
        .filter(|(_, p)| !p.is_empty())
    else {
        return anew;
    };
    let Ok(index) = usize::try_from(today - since) else { return anew };
    peaks.truncate(index + 1);
    let last = peaks.last().copied().unwrap_or(used);
    // Only so many are kept: no more need be made up.
    let missing = (index + 1).saturating_sub(peaks.len());
    if missing > 0 {
        peaks.extend(std::iter::repeat_n(last, (missing - 1).min(MAX_PEAKS)));
        peaks.push(used);
    } else if let Some(peak) = peaks.last_mut() {
        *peak = used.max(*peak);
    }
    let surplus = peaks.len().saturating_sub(MAX_PEAKS);
    peaks.drain(..surplus);
    let days = i64::try_from(peaks.len()).unwrap_or(1);
    (start_of(today - days + 1), peaks)
}

/// Blocks per day: of the slopes between all pairs of days, the one that two fifths stay below.
fn pace(peaks: &[i32]) -> f64 {
    let mut slopes = Vec::with_capacity(peaks.len() * peaks.len() / 2);
    for (first, from) in peaks.iter().enumerate() {
        for (days, to) in peaks.iter().skip(first).enumerate().skip(1) {
            slopes.push(
                (f64::from(*to) - f64::from(*from)) / f64::from(u32::try_from(days).unwrap_or(u32::MAX)),
            );
        }
    }
    let chosen = slopes.len() * 2 / 5;
    if chosen >= slopes.len() {
        return 0.0;
    }
    *slopes.select_nth_unstable_by(chosen, f64::total_cmp).1
}

/// Counted from the start of today, and from what was in use then or has been since: so it changes only when
/// these do.
fn exhausted_at(
    slope: f64,
    total: u64,
    complete: &[i32],
    today: i32,
    started: Timestamp,
) -> Option<Timestamp> {
    if slope <= 0.0 {
        return None;
    }
    let used = complete.last().copied().unwrap_or(today).max(today);
    let left = f64::from(clamp(total).saturating_sub(used).max(0));
    let days = left / slope;
    let in_sight = days <= 2.0 * complete.len() as f64;
    let hours = Duration::from_secs((days * 24.0).ceil() as u64 * 3600);
    if in_sight { started.checked_add(hours).ok() } else { None }
}

fn day(at: Timestamp) -> i64 {
    at.as_second().div_euclid(DAY as i64)
}

fn start_of(day: i64) -> Timestamp {
    Timestamp::from_second(day.saturating_mul(DAY as i64)).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn after(since: Timestamp, days: usize) -> Timestamp {
    start_of(day(since).saturating_add(i64::try_from(days).unwrap_or(0)))
}

fn clamp(blocks: u64) -> i32 {
    i32::try_from(blocks).unwrap_or(i32::MAX)
}

fn round(growth: f64) -> i32 {
    growth.round() as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Dice;
    use crate::fixtures::{NOW, Scene, at, range, scene, selector};
    use proptest::prelude::*;

    const DAY_SECONDS: i64 = DAY as i64;

    fn midday(day: i64) -> Timestamp {
        at(NOW.div_euclid(DAY_SECONDS) * DAY_SECONDS + day * DAY_SECONDS + DAY_SECONDS / 2)
    }

    fn fill(total: u64, used: u64) -> Fill {
        Fill { total, free: total - used }
    }

    /// The forecast after one look a day at these numbers of blocks.
    fn seen(total: u64, used: &[u64]) -> RangeForecast {
        let look = |old: Option<RangeForecast>, (day, used): (i64, &u64)| {
            Some(forecast(old.as_ref(), fill(total, *used), midday(day)))
        };
        (0..).zip(used).fold(None, look).unwrap()
    }

    fn days_left(forecast: &RangeForecast, today: i64) -> Option<i64> {
        let Time(end) = forecast.exhausted_at.as_ref()?;
        Some((end.as_second() - midday(today).as_second()).div_euclid(DAY_SECONDS))
    }

    #[test]
    fn a_steady_pace_is_seen_after_a_week_and_carried_on() {
        for (used, growth, left) in [
            (&[10, 20, 30, 40, 50, 60, 70][..], 0, None),
            (&[10, 20, 30, 40, 50, 60, 70, 80], 300, None),
            (&[110, 120, 130, 140, 150, 160, 170, 180], 300, Some(6)),
            (&[180, 185, 190, 195, 200, 205, 210, 215], 150, Some(6)),
            (&[180, 185, 190, 195, 200, 205, 210, 210], 150, Some(7)),
            (&[100; 8], 0, None),
            (&[180, 170, 160, 150, 140, 130, 120, 110], 0, None),
        ] {
            let seen = seen(250, used);
            assert_eq!((seen.growth, days_left(&seen, used.len() as i64 - 1)), (growth, left), "{used:?}");
        }
    }

    #[test]
    fn what_is_remembered_is_one_number_a_day_and_four_weeks() {
        let used: Vec<u64> = (0..100).collect();
        let forecast = seen(250, &used);
        assert_eq!(forecast.peaks, (71..100).collect::<Vec<i32>>());
        assert_eq!(forecast.since.unwrap().0, start_of(day(midday(71))));
    }

    #[test]
    fn nothing_is_written_while_nothing_happens_and_once_when_a_day_begins() {
        let yesterday = seen(250, &[100; 10]);
        let mut today = yesterday.clone();
        let mut changes = 0;
        for minute in 0..3 * 24 * 60 {
            let now = midday(9).checked_add(Duration::from_secs(60 * minute)).unwrap();
            let next = forecast(Some(&today), fill(250, 100), now);
            changes += usize::from(next != today);
            today = next;
        }
        assert_eq!(changes, 3);
    }

    #[test]
    fn a_day_is_as_full_as_its_fullest_moment() {
        let at_noon = forecast(None, fill(250, 80), midday(0));
        let at_one = forecast(Some(&at_noon), fill(250, 120), midday(0));
        let at_two = forecast(Some(&at_one), fill(250, 30), midday(0));
        assert_eq!(at_two.peaks, [120]);
    }

    #[test]
    fn clocks_that_jump_and_backups_make_no_growth() {
        let calm = seen(250, &[100; 20]);
        for (day, days) in [(25, 26), (400, 29), (15, 16), (0, 1), (-30, 1), (-20_000, 1)] {
            let after = forecast(Some(&calm), fill(250, 140), midday(day));
            assert_eq!((after.peaks.len(), after.growth, after.exhausted_at), (days, 0, None), "{day}");
        }
        let backwards =
            forecast(Some(&forecast(Some(&calm), fill(250, 100), midday(400))), fill(250, 100), midday(21));
        assert_eq!((backwards.growth, backwards.peaks.len()), (0, 1), "what a wrong clock wrote is dropped");
    }

    #[test]
    fn a_range_is_calm_again_only_when_it_lasts_three_weeks() {
        let ends =
            |days: i64| RangeForecast { exhausted_at: Some(Time(midday(days))), ..RangeForecast::default() };
        let roomy = fill(1000, 100);
        for (days, warned, soon) in
            [(14, false, true), (15, false, false), (15, true, true), (21, true, true), (22, true, false)]
        {
            let soon_now = matches!(outlook(&ends(days), roomy, warned, midday(0)), Outlook::RunsOut(_));
            assert_eq!(soon_now, soon, "{days} {warned}");
        }
        let none = RangeForecast::default();
        for (total, used, expected) in [
            (100, 100, Outlook::Exhausted),
            (100, 96, Outlook::Low),
            (100, 95, Outlook::Enough),
            (1, 0, Outlook::Enough),
            (1, 1, Outlook::Exhausted),
            (65_536, 62_261, Outlook::Low),
        ] {
            assert_eq!(outlook(&none, fill(total, used), false, midday(0)), expected, "{used} of {total}");
        }
    }

    #[test]
    fn a_range_that_was_low_is_calm_again_only_when_a_tenth_is_free() {
        let none = RangeForecast::default();
        let mut warned = false;
        let mut changes = Vec::new();
        // An autoscaler around one free block in twenty, and at last a scale-down.
        for free in [6, 5, 4, 5, 4, 6, 4, 7, 9, 4, 9, 10, 5, 9] {
            let low = outlook(&none, fill(100, 100 - free), warned, midday(0)) == Outlook::Low;
            changes.extend((low != warned).then_some((free, low)));
            warned = low;
        }
        assert_eq!(changes, [(4, true), (10, false)]);
    }

    #[test]
    fn the_condition_remembers_that_few_blocks_were_left_whoever_takes_over() {
        // Of its 256 blocks 11, 20 or 26 are free; a twentieth are 12, a tenth 25.
        let reserved = |last: u8| {
            let blocks = (0..=last).map(|n| format!("10.244.{n}.0/24").parse().unwrap());
            RangeFact { reserved: blocks.collect(), ..range("a", "10.244.0.0/16") }
        };
        let after = |mut range: RangeFact, old: &'static str, successor: bool| {
            let was = Verdict::new(EXHAUSTED, Some(false), old, "");
            condition::set(&mut range.status.conditions, &was, None, &Time(at(NOW)));
            let scene = scene().range(range);
            let other = crate::fixtures::range("b", "10.9.0.0/16");
            let scene = if successor { scene.range(other) } else { scene };
            condition_of(&scene, "a", &RangeForecast::default()).1
        };
        for (last, old, successor, new) in [
            (244, reason::BLOCKS_FREE, false, reason::FEW_BLOCKS_LEFT),
            (235, reason::BLOCKS_FREE, false, reason::BLOCKS_FREE),
            (235, reason::FEW_BLOCKS_LEFT, false, reason::FEW_BLOCKS_LEFT),
            (235, reason::OTHERS_TAKE_OVER, true, reason::OTHERS_TAKE_OVER),
            (229, reason::FEW_BLOCKS_LEFT, false, reason::BLOCKS_FREE),
        ] {
            assert_eq!(after(reserved(last), old, successor), new, "{last} {old}");
        }
    }

    #[test]
    fn ranges_that_nobody_can_fill_have_no_end() {
        let used: Vec<u64> = (0..29).map(|day| 10 * day).collect();
        let v6 = seen(1 << 24, &used);
        assert_eq!((v6.growth, v6.exhausted_at), (300, None));
        assert_eq!(seen(u64::MAX, &[u64::MAX / 2; 9]).exhausted_at, None);
    }

    fn condition_of(
        scene: &Scene,
        name: &str,
        forecast: &RangeForecast,
    ) -> (Option<bool>, &'static str, String) {
        let (snapshot, plan) = (scene.snapshot(), scene.plan());
        let fill = plan.ranges[name].fill();
        let verdict = exhausted(&snapshot.ranges[name], forecast, fill, &plan, &snapshot);
        (verdict.status, verdict.reason, verdict.message)
    }

    #[test]
    fn the_condition_warns_ahead_unless_another_range_takes_over() {
        let soon = RangeForecast {
            growth: 60,
            exhausted_at: Some(Time(at(NOW + 3 * DAY_SECONDS))),
            peaks: vec![0; 29],
            ..RangeForecast::default()
        };
        let alone = || scene().range(range("a", "10.244.0.0/16"));
        let (status, reason, message) = condition_of(&alone(), "a", &soon);
        assert_eq!((status, reason), (Some(false), reason::RUNS_OUT_SOON));
        assert_eq!(
            message,
            "its 256 blocks are used up by 2027-01-18, if it goes on as in the last 28 days (60 blocks in 30 days): add another ClusterCIDR"
        );
        let other = || range("b", "10.9.0.0/16");
        for (other, takes_over) in [
            (other(), true),
            (RangeFact { allocation: Allocation::Draining, ..other() }, false),
            (RangeFact { selector: selector("zone", "a"), ..other() }, false),
            (RangeFact { reserved: ["10.9.0.0/16".parse().unwrap()].into(), ..other() }, false),
            (RangeFact { problem: Some("?".into()), ..other() }, false),
            (range("b", "fd00:9::/48"), false),
        ] {
            let (status, reason, message) = condition_of(&alone().range(other), "a", &soon);
            let expected = if takes_over { reason::OTHERS_TAKE_OVER } else { reason::RUNS_OUT_SOON };
            assert_eq!((status, reason), (Some(false), expected), "{message}");
        }
        let drained =
            scene().range(RangeFact { allocation: Allocation::Draining, ..range("a", "10.244.0.0/16") });
        assert_eq!(condition_of(&drained, "a", &soon).1, reason::BLOCKS_FREE);
        let full = scene().range(RangeFact {
            reserved: ["10.244.0.0/16".parse().unwrap()].into(),
            ..range("a", "10.244.0.0/16")
        });
        let (status, reason, message) = condition_of(&full, "a", &RangeForecast::default());
        assert_eq!((status, reason), (Some(true), reason::RANGE_EXHAUSTED));
        assert!(message.contains("add another ClusterCIDR"), "{message}");
    }

    /// How many nodes there are at an hour.
    type Course = Box<dyn Fn(i64) -> u64>;

    /// How a simulated cluster of one /16 with /24 blocks went: the day it was first warned of by its pace or by
    /// its last blocks, the day it was full, and the warnings of its pace that began.
    struct Life {
        paced: Option<i64>,
        warned: Option<i64>,
        full: Option<i64>,
        alarms: usize,
    }

    /// Looks at the cluster every four hours for so many days; `nodes` says how many nodes there are at an hour.
    fn live(days: i64, mut nodes: impl FnMut(i64) -> u64) -> Life {
        let total = 256;
        let (mut memory, mut soon, mut warned) = (None, false, false);
        let mut life = Life { paced: None, warned: None, full: None, alarms: 0 };
        for hour in (0..days * 24).step_by(4) {
            let used = nodes(hour).min(total);
            let now = at(NOW + hour * 3600);
            let next = forecast(memory.as_ref(), fill(total, used), now);
            let outlook = outlook(&next, fill(total, used), warned, now);
            let paced = matches!(outlook, Outlook::RunsOut(_));
            life.alarms += usize::from(paced && !soon);
            soon = paced;
            if paced {
                life.paced = life.paced.or(Some(hour / 24));
            }
            warned = !matches!(outlook, Outlook::Enough);
            if warned {
                life.warned = life.warned.or(Some(hour / 24));
            }
            if used == total {
                life.full = Some(hour / 24);
                break;
            }
            memory = Some(next);
        }
        life
    }

    #[test]
    fn over_months_it_warns_a_week_ahead_and_never_for_nothing() {
        let mut worst = i64::MAX;
        // Clusters that grow: evenly, in weekly lots, by a share a week, with a daily and a weekly swing.
        for seed in 1..=12 {
            let mut dice = Dice(seed);
            let (start, a_week) = (40 + dice.roll(60), 3 + dice.roll(12));
            let grow: [Course; 4] = [
                Box::new(move |hour| start + a_week * hour as u64 / 168),
                Box::new(move |hour| start + a_week * (hour / 168) as u64),
                Box::new(move |hour| (start as f64 * 1.05f64.powf(hour as f64 / 168.0)) as u64),
                Box::new(move |hour| {
                    let swing = u64::from(hour % 24 > 8) * 12 + u64::from(hour / 24 % 7 < 5) * 6;
                    start + a_week * hour as u64 / 168 + swing
                }),
            ];
            for (kind, nodes) in grow.iter().enumerate() {
                let life = live(900, nodes);
                let (Some(paced), Some(full)) = (life.paced, life.full) else { panic!("{seed} {kind}") };
                worst = worst.min(full - paced);
                assert!((7..=35).contains(&(full - paced)), "{seed} {kind}: {} days ahead", full - paced);
                assert!(life.alarms <= 2, "{seed} {kind}: {} alarms", life.alarms);
            }
        }
        println!("the shortest warning was {worst} days ahead");
    }

    #[test]
    fn clusters_that_do_not_grow_are_left_in_peace() {
        for seed in 1..=12 {
            let mut dice = Dice(seed);
            let size = 60 + dice.roll(60);
            let noise: Vec<u64> = (0..120 * 24).map(|_| dice.roll(9)).collect();
            let one_day = 5 + dice.roll(60) as i64;
            let calm: [(&str, Course); 6] = [
                ("made within hours", Box::new(move |hour| size.min(hour as u64 * 20))),
                ("made over two days", Box::new(move |hour| size.min(hour as u64 * size / 48))),
                ("coming and going", Box::new(move |hour| size + noise[hour as usize])),
                (
                    "by day and week",
                    Box::new(move |hour| {
                        size + u64::from(hour % 24 > 8) * 40 + u64::from((hour / 24 + 3) % 7 < 5) * 40
                    }),
                ),
                ("one large step", Box::new(move |hour| size + u64::from(hour / 24 >= one_day) * 70)),
                ("one day's load test", Box::new(move |hour| size + u64::from(hour / 24 == one_day) * 100)),
            ];
            for (what, nodes) in &calm {
                let life = live(120, nodes);
                assert_eq!((life.alarms, life.warned), (0, None), "{seed} {what}");
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_is_remembered_is_bounded_and_its_end_is_ahead_and_in_sight(
            peaks in prop::collection::vec(any::<i32>(), 0..60),
            since in prop::option::of(-3_000_000_000i64..5_000_000_000),
            total in any::<u64>(), free in any::<u64>(), now in 0i64..4_000_000_000,
        ) {
            let old = RangeForecast { since: since.map(|s| Time(at(s))), peaks, ..RangeForecast::default() };
            let fill = Fill { total, free: free.min(total) };
            let new = forecast(Some(&old), fill, at(now));
            prop_assert!((1..=MAX_PEAKS).contains(&new.peaks.len()));
            prop_assert!(new.growth >= 0);
            let seen = new.since.as_ref().unwrap().0;
            prop_assert_eq!(day(seen) + new.peaks.len() as i64, day(at(now)) + 1, "the last day is today");
            if let Some(Time(end)) = &new.exhausted_at {
                let days = (end.as_second() - at(now).as_second()) / DAY_SECONDS;
                prop_assert!((-1..=2 * MAX_PEAKS as i64).contains(&days), "{}", days);
            }
            prop_assert_eq!(forecast(Some(&new), fill, at(now)), new, "looking again changes nothing");
        }

        #[test]
        fn a_few_odd_days_in_four_weeks_make_no_growth(odd in prop::collection::btree_map(0usize..28, 0u64..250, 0..10)) {
            let used: Vec<u64> = (0..29).map(|day| odd.get(&day).copied().unwrap_or(100)).collect();
            prop_assert_eq!(seen(250, &used).exhausted_at, None);
        }
    }
}
