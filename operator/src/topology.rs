//! Which block the next node of a group (a zone, a rack) gets, so that one prefix can name a group's blocks.
//! Pure; knows indexes, not addresses or nodes.
//!
//! Each group fills a *stretch*: an aligned power of two of blocks that holds none but its own. In this order:
//! 1. a free block of its stretch, next-fit from where it was carved last, so that a freed one comes back last;
//! 2. the stretch is full: the free half beside it makes it twice as large, and the prefix one bit shorter;
//! 3. that half is not free, or the group is new: a new stretch begins at the start of the largest free
//!    aligned hole, of several in the one whose neighbour has fewest blocks and so least need of it. Groups
//!    that come one by one halve the range, then quarter it, and so keep as much room to grow as there is;
//! 4. there is no room outside the stretches of others: the largest hole within one. A free block is never
//!    refused for the sake of topology.
//!
//! Nothing of this is written anywhere. Stretches are read off the blocks that groups hold (`Layout::of`), so it
//! does not matter who carved them, when, or under which key; blocks that exist never move. Where a group was
//! carved last the leader remembers; a new one goes on after the group's youngest block.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use k8s_openapi::jiff::Timestamp;

use crate::facts::Name;
use crate::pool::Pool;
use crate::stretch::{Stretch, parts};

/// So many holes of one size are compared: beyond that they are crumbs.
const HOLES_COMPARED: usize = 64;

/// ClusterCIDR uid and label value → where carving goes on.
pub type GroupCursors = BTreeMap<(Name, Option<Box<str>>), u64>;

/// The blocks of one range by the groups that hold them.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Label value → index into `groups`.
    labelled: BTreeMap<Box<str>, usize>,
    /// The nodes without the label are a group of their own.
    unlabelled: Option<usize>,
    groups: Vec<Group>,
    owners: Owners,
    layout: Option<Layout>,
}

/// Block → index of the group that holds it.
type Owners = BTreeMap<u64, usize>;

#[derive(Clone, Debug)]
struct Group {
    value: Option<Box<str>>,
    youngest: Option<(Timestamp, u64)>,
    cursor: Option<u64>,
}

/// What one group holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupBlocks {
    /// Value of the topology label; `None` for the nodes without it.
    pub value: Option<Box<str>>,
    /// Its blocks.
    pub blocks: u64,
    /// Its stretches, and how many of its blocks are in each, most first. Together they hold all of them and
    /// none of another group.
    pub stretches: Vec<(Stretch, u64)>,
}

impl GroupBlocks {
    /// Blocks outside the stretch that holds most.
    pub fn outside(&self) -> u64 {
        self.blocks - self.stretches.first().map_or(0, |(_, held)| *held)
    }
}

impl Topology {
    /// Notes that a block is held by a group; what is known already stays.
    pub fn hold(&mut self, value: Option<&str>, index: u64, created: Timestamp) {
        let id = self.id(value);
        if let std::collections::btree_map::Entry::Vacant(free) = self.owners.entry(index) {
            free.insert(id);
            if let Some(group) = self.groups.get_mut(id) {
                group.youngest = group.youngest.max(Some((created, index)));
            }
        }
    }

    /// Lets a group be carved on from there.
    pub fn resume(&mut self, value: Option<&str>, cursor: u64) {
        let id = self.id(value);
        if let Some(group) = self.groups.get_mut(id) {
            group.cursor = Some(cursor);
        }
    }

    /// The block for the next node of a group; `None` only if none is free. The caller takes it from the pool
    /// and calls [`Topology::hold`].
    pub fn choose(&mut self, pool: &Pool, value: Option<&str>) -> Option<u64> {
        let id = self.id(value);
        let group = self.groups.get_mut(id)?;
        let after_youngest = || group.youngest.map(|(_, index)| index.saturating_add(1));
        let cursor = group.cursor.or_else(after_youngest).unwrap_or(0);
        let layout = self.layout.get_or_insert_with(|| Layout::of(pool, &self.owners));
        let index = layout.choose(pool, &self.owners, id, cursor)?;
        group.cursor = Some(index.saturating_add(1));
        Some(index)
    }

    /// What each group holds, by label value; the nodes without the label come first.
    pub fn holdings(&self, pool: &Pool) -> Vec<GroupBlocks> {
        let layout = Layout::of(pool, &self.owners);
        let mut holdings: Vec<GroupBlocks> = self
            .groups
            .iter()
            .enumerate()
            .map(|(id, group)| layout.holding(id, group, &self.owners))
            .collect();
        holdings.retain(|holding| holding.blocks > 0);
        holdings.sort_by(|a, b| a.value.cmp(&b.value));
        holdings
    }

    fn id(&mut self, value: Option<&str>) -> usize {
        let known = match value {
            Some(value) => self.labelled.get(value).copied(),
            None => self.unlabelled,
        };
        known.unwrap_or_else(|| {
            let id = self.groups.len();
            self.groups.push(Group { value: value.map(Into::into), youngest: None, cursor: None });
            match value {
                Some(value) => drop(self.labelled.insert(value.into(), id)),
                None => self.unlabelled = Some(id),
            }
            id
        })
    }
}

/// The stretches of all groups. They are disjoint.
#[derive(Clone, Debug, Default)]
struct Layout {
    /// First block → stretch and group.
    stretches: BTreeMap<u64, (Stretch, usize)>,
    /// Group → its stretches that may have a free block, in the order to fill them.
    filling: BTreeMap<usize, VecDeque<Stretch>>,
    /// Group → its stretches without a free block that may yet grow, in the order to try.
    full: BTreeMap<usize, VecDeque<Stretch>>,
}

impl Layout {
    /// Reads the stretches off the blocks: between the nearest blocks of others (or reserved ones, or whatever
    /// else is taken) lies a group's room; each of the aligned parts of that room in which it has a block
    /// holds a stretch, the smallest that covers its blocks there.
    fn of(pool: &Pool, owners: &Owners) -> Layout {
        let mut layout = Layout::default();
        let mut room = 0..0;
        let mut current = None;
        for (taken, owner) in runs(pool, owners) {
            if owner != current {
                layout.add(current, room.start..taken.start, owners);
                (room, current) = (room.end..taken.end, owner);
            }
            room.end = taken.end;
        }
        layout.add(current, room.start..pool.total(), owners);
        for stretches in layout.filling.values_mut() {
            let held = |stretch: &Stretch| owners.range(stretch.span()).count();
            stretches.make_contiguous().sort_by_cached_key(|stretch| (Reverse(held(stretch)), *stretch));
        }
        layout
    }

    /// The stretches of a group in a room that holds no block of another.
    fn add(&mut self, owner: Option<usize>, room: Range<u64>, owners: &Owners) {
        let Some(id) = owner else { return };
        let mut next = room.start;
        while let Some((first, _)) = owners.range(next.min(room.end)..room.end).next() {
            let part = Stretch::largest_around(*first, &room).span();
            let last = owners.range(part.clone()).next_back().map_or(*first, |(last, _)| *last);
            let stretch = Stretch::over(*first, last);
            self.stretches.insert(stretch.first(), (stretch, id));
            self.filling.entry(id).or_default().push_back(stretch);
            next = part.end;
        }
    }

    fn holding(&self, id: usize, group: &Group, owners: &Owners) -> GroupBlocks {
        let held = |stretch: &Stretch| owners.range(stretch.span()).count() as u64;
        let stretches = self.filling.get(&id).into_iter().flatten();
        let stretches: Vec<_> = stretches.map(|stretch| (*stretch, held(stretch))).collect();
        let blocks = stretches.iter().map(|(_, held)| held).sum();
        GroupBlocks { value: group.value.clone(), blocks, stretches }
    }

    fn choose(&mut self, pool: &Pool, owners: &Owners, id: usize, cursor: u64) -> Option<u64> {
        self.fill(pool, id, cursor)
            .or_else(|| self.double(pool, id, cursor))
            .or_else(|| self.begin(pool, owners, id))
    }

    fn fill(&mut self, pool: &Pool, id: usize, cursor: u64) -> Option<u64> {
        let filling = self.filling.entry(id).or_default();
        while let Some(stretch) = filling.front() {
            let free = pool.next_free_in(&stretch.span(), cursor);
            if free.is_some() {
                return free;
            }
            self.full.entry(id).or_default().extend(filling.pop_front());
        }
        None
    }

    /// A stretch whose buddy is not free now will not grow before the next plan: nothing is freed meanwhile.
    fn double(&mut self, pool: &Pool, id: usize, cursor: u64) -> Option<u64> {
        while let Some(stretch) = self.full.entry(id).or_default().pop_front() {
            if pool.is_free(&stretch.buddy().span()) {
                let doubled = stretch.parent();
                self.stretches.remove(&stretch.first());
                self.stretches.insert(doubled.first(), (doubled, id));
                self.filling.entry(id).or_default().push_front(doubled);
                return pool.next_free_in(&doubled.span(), cursor);
            }
        }
        None
    }

    fn begin(&mut self, pool: &Pool, owners: &Owners, id: usize) -> Option<u64> {
        let stretches = self.stretches.values().map(|(stretch, _)| stretch.span());
        let apart = largest_hole(union(pool.taken(), stretches), pool.total(), owners);
        let hole = apart.or_else(|| {
            let hole = largest_hole(pool.taken(), pool.total(), owners)?;
            self.break_up(&hole.span(), owners);
            Some(hole)
        })?;
        let single = Stretch::single(hole.first());
        self.stretches.insert(single.first(), (single, id));
        self.full.entry(id).or_default().push_back(single);
        Some(single.first())
    }

    /// Another group gets a hole: the stretch around it becomes those on both sides of it.
    fn break_up(&mut self, hole: &Range<u64>, owners: &Owners) {
        let Some((_, (stretch, id))) = self.stretches.range(..=hole.start).next_back() else { return };
        let (stretch, id) = (*stretch, *id);
        if stretch.span().end <= hole.start {
            return;
        }
        self.stretches.remove(&stretch.first());
        for list in [self.filling.get_mut(&id), self.full.get_mut(&id)].into_iter().flatten() {
            list.retain(|other| *other != stretch);
        }
        self.add(Some(id), stretch.span().start..hole.start, owners);
        self.add(Some(id), hole.end..stretch.span().end, owners);
    }
}

/// The taken parts of a range in order, each with the one group that holds it, if a group does.
fn runs<'a>(pool: &'a Pool, owners: &'a Owners) -> impl Iterator<Item = (Range<u64>, Option<usize>)> + 'a {
    pool.taken().flat_map(move |run| {
        let mut next = run.start;
        let mut held = owners.range(run.clone()).peekable();
        std::iter::from_fn(move || {
            if next >= run.end {
                return None;
            }
            let (end, owner) = match held.peek() {
                Some((index, id)) if **index == next => (next.saturating_add(1), Some(**id)),
                Some((index, _)) => (**index, None),
                None => (run.end, None),
            };
            if owner.is_some() {
                held.next();
            }
            Some((std::mem::replace(&mut next, end)..end, owner))
        })
    })
}

/// Both of two ordered sequences of ranges, in the order of their starts.
fn union(
    one: impl Iterator<Item = Range<u64>>,
    other: impl Iterator<Item = Range<u64>>,
) -> impl Iterator<Item = Range<u64>> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || match (one.peek(), other.peek()) {
        (Some(a), Some(b)) if b.start < a.start => other.next(),
        (Some(_), _) => one.next(),
        (None, _) => other.next(),
    })
}

/// The largest aligned hole between ranges in order; of several of that size, the one beside the group with
/// fewest blocks (beside several groups at once nobody can grow into it), then the first.
fn largest_hole(busy: impl Iterator<Item = Range<u64>>, total: u64, owners: &Owners) -> Option<Stretch> {
    let mut holes: Vec<Stretch> = Vec::new();
    let mut next = 0;
    for busy in busy.chain(std::iter::once(total..total)) {
        if busy.start > next {
            for part in parts(next..busy.start) {
                let best = holes.first().map(Stretch::level);
                if best.is_none_or(|best| part.level() > best) {
                    holes.clear();
                }
                if best.is_none_or(|best| part.level() >= best) && holes.len() < HOLES_COMPARED {
                    holes.push(part);
                }
            }
        }
        next = next.max(busy.end);
    }
    let cost = |hole: &Stretch| {
        let mut beside = owners.range(hole.buddy().span()).map(|(_, id)| *id).peekable();
        let first = beside.peek().copied();
        let (count, alone) = beside.fold((0u64, true), |(n, alone), id| (n + 1, alone && Some(id) == first));
        if alone { count } else { 0 }
    };
    holes.into_iter().min_by_key(|hole| (cost(hole), *hole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::Block;
    use proptest::prelude::*;

    /// A range of that many blocks, its topology, and the hand that carves.
    struct Field {
        pool: Pool,
        topology: Topology,
        age: i64,
    }

    fn ends(stretch: &Stretch) -> (u64, u64) {
        (stretch.first(), stretch.span().end - 1)
    }

    fn field(bits: u8) -> Field {
        let range = format!("fd00::/{}", 64 - bits).parse::<Block>().unwrap();
        Field { pool: Pool::new(range, 64), topology: Topology::default(), age: 0 }
    }

    impl Field {
        fn held(mut self, group: &str, blocks: impl IntoIterator<Item = u64>) -> Field {
            for index in blocks {
                self.age += 1;
                self.pool.take(&self.pool.block(index).unwrap());
                self.topology.hold(Some(group), index, Timestamp::from_second(self.age).unwrap());
            }
            self
        }

        fn reserved(mut self, blocks: Range<u64>) -> Field {
            blocks.for_each(|index| self.pool.take(&self.pool.block(index).unwrap()));
            self
        }

        fn carve(&mut self, group: &str) -> Option<u64> {
            let index = self.topology.choose(&self.pool, Some(group))?;
            self.pool.take(&self.pool.block(index).unwrap());
            self.topology.hold(Some(group), index, Timestamp::MAX);
            Some(index)
        }

        fn carved(&mut self, groups: &str) -> Vec<Option<u64>> {
            groups.chars().map(|group| self.carve(&group.to_string())).collect()
        }

        /// The same blocks as the next plan finds them.
        fn again(&self) -> Field {
            let mut again = Topology::default();
            for (order, (index, id)) in self.topology.owners.iter().enumerate() {
                let value = self.topology.groups[*id].value.as_deref();
                again.hold(value, *index, Timestamp::from_second(order as i64).unwrap());
            }
            Field { pool: self.pool.clone(), topology: again, age: self.age }
        }

        /// First and last block of each stretch.
        fn spans(&self, group: &str) -> Vec<(u64, u64)> {
            let holdings = self.topology.holdings(&self.pool);
            let holding = holdings.into_iter().find(|h| h.value.as_deref() == Some(group));
            holding.into_iter().flat_map(|h| h.stretches).map(|(stretch, _)| ends(&stretch)).collect()
        }
    }

    fn some<const N: usize>(indexes: [u64; N]) -> Vec<Option<u64>> {
        indexes.map(Some).to_vec()
    }

    #[test]
    fn groups_that_come_one_by_one_halve_the_range_then_quarter_it() {
        let mut field = field(8);
        assert_eq!(field.carved("abcd"), some([0, 128, 64, 192]));
        assert_eq!(field.carved("aaabbb"), some([1, 2, 3, 129, 130, 131]));
        assert_eq!((field.spans("a"), field.spans("b")), (vec![(0, 3)], vec![(128, 131)]));
        assert_eq!(field.carved("efghi"), some([96, 224, 32, 160, 48]), "beside the smaller group first");
    }

    #[test]
    fn a_full_stretch_doubles_into_the_free_half_beside_it_also_downwards() {
        let mut field = field(4).held("a", [6, 7]).held("b", [12]);
        assert_eq!(field.carved("aaa"), some([4, 5, 0]));
        assert_eq!(field.spans("a"), [(0, 7)]);
        assert_eq!(field.carved("aaa"), some([1, 2, 3]));
        assert_eq!(field.carved("a"), some([8]), "the half beside it is not free: the largest hole");
        assert_eq!(field.spans("a"), [(0, 7), (8, 8)]);
        assert_eq!(field.carved("aaaa"), some([9, 10, 11, 14]));
    }

    #[test]
    fn a_freed_block_comes_back_last_within_its_stretch() {
        let mut field = field(6).held("a", [0, 1, 3, 4]).held("b", [32]);
        assert_eq!(field.carved("aaaa"), some([5, 6, 7, 2]), "then the stretch doubles");
        assert_eq!(field.carved("a"), some([8]));
    }

    #[test]
    fn free_blocks_of_the_largest_stretch_go_first_so_that_strays_die_out() {
        let mut field = field(6).held("a", [40, 0, 1, 2, 4]).held("b", [50]);
        assert_eq!(field.carved("aaaa"), some([5, 6, 7, 3]));
        assert_eq!(field.spans("a"), [(0, 7), (40, 40)]);
    }

    #[test]
    fn a_range_whose_groups_are_mixed_already_sorts_itself_from_then_on() {
        let mixed = field(8).held("a", (0..60).step_by(2)).held("b", (1..60).step_by(2));
        let mut field = mixed;
        assert_eq!(field.carved("ababab"), some([128, 64, 129, 65, 130, 66]));
        assert_eq!(field.topology.holdings(&field.pool)[0].stretches.len(), 31);
        assert_eq!(field.topology.holdings(&field.pool)[0].outside(), 30);
    }

    #[test]
    fn reserved_blocks_are_in_no_stretch() {
        let mut field = field(4).reserved(0..1).reserved(9..10);
        assert_eq!(field.carved("aaaa"), some([4, 5, 6, 7]));
        assert_eq!(field.carved("aaaa"), some([12, 13, 14, 15]));
        assert_eq!(
            field.carved("aaaaaaa"),
            vec![Some(2), Some(3), Some(10), Some(11), Some(1), Some(8), None]
        );
        assert_eq!(field.spans("a"), [(4, 7), (12, 15), (2, 3), (10, 11), (1, 1), (8, 8)]);
    }

    #[test]
    fn a_group_without_room_breaks_into_the_stretch_of_another_rather_than_get_nothing() {
        let mut field = field(4).held("a", [0, 1, 2, 8]).held("b", []);
        assert_eq!(field.spans("a"), [(0, 15)]);
        assert_eq!(field.carved("bbbbb"), some([12, 13, 14, 15, 4]), "where a holds least");
        assert_eq!(field.spans("a"), [(0, 3), (8, 8)]);
        assert_eq!(field.carved("aaaaa"), some([3, 9, 10, 11, 6]));
        assert_eq!(field.carved("ab"), some([7, 5]));
        assert_eq!(field.carved("ab"), [None, None]);
    }

    #[test]
    fn nodes_without_the_label_are_a_group_of_their_own_and_an_empty_value_is_another() {
        let mut field = field(4);
        let mut carve = |value| {
            let index = field.topology.choose(&field.pool, value).unwrap();
            field.pool.take(&field.pool.block(index).unwrap());
            field.topology.hold(value, index, Timestamp::MAX);
            index
        };
        assert_eq!([carve(None), carve(Some("")), carve(None), carve(Some(""))], [0, 8, 1, 9]);
        let values: Vec<_> = field.topology.holdings(&field.pool).into_iter().map(|h| h.value).collect();
        assert_eq!(values, [None, Some("".into())]);
    }

    #[test]
    fn the_largest_range_with_scattered_blocks_of_others_is_carved_without_walking_it() {
        let mut field = field(24);
        for index in 0..5_000 {
            field.pool.take(&field.pool.block(index * 3_301).unwrap());
        }
        let zones: Vec<String> = (0..3).map(|zone| zone.to_string()).collect();
        let carved: std::collections::BTreeSet<_> =
            (0..10_000).map(|node| field.carve(&zones[node % 3]).unwrap()).collect();
        assert_eq!(carved.len(), 10_000);
        assert!(field.topology.holdings(&field.pool).iter().all(|holding| holding.blocks >= 3_333));
    }

    #[derive(Clone, Debug)]
    struct Any {
        bits: u8,
        held: Vec<(u64, u8)>,
        reserved: Vec<(u64, u64)>,
        joins: Vec<u8>,
    }

    fn any() -> impl Strategy<Value = Any> {
        (0u8..9, prop::collection::vec(0u8..5, 0..300)).prop_flat_map(|(bits, joins)| {
            let total = 1u64 << bits;
            let held = prop::collection::vec((0..total, 0u8..5), 0..60);
            let reserved = prop::collection::vec((0..total, 1u64..9), 0..4);
            (held, reserved).prop_map(move |(held, reserved)| Any {
                bits,
                held,
                reserved,
                joins: joins.clone(),
            })
        })
    }

    /// The stretches that one would draw by hand, block by block.
    fn stretches_by_hand(field: &Field, group: &str) -> Vec<(u64, u64)> {
        let taken: std::collections::BTreeSet<u64> = field.pool.taken().flatten().collect();
        let mine = |index: &u64| {
            let id = field.topology.owners.get(index);
            id.is_some_and(|id| field.topology.groups[*id].value.as_deref() == Some(group))
        };
        let total = field.pool.total();
        let pure = |s: &Stretch| s.span().end <= total && s.span().all(|i| !taken.contains(&i) || mine(&i));
        let mut found = std::collections::BTreeSet::new();
        for index in (0..total).filter(mine) {
            let mut room = Stretch::single(index);
            while pure(&room.parent()) {
                room = room.parent();
            }
            let held: Vec<_> = room.span().filter(mine).collect();
            found.insert(Stretch::over(held[0], *held.last().unwrap()));
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_by_key(|s| (Reverse(s.span().filter(mine).count()), *s));
        found.iter().map(ends).collect()
    }

    proptest! {
        #[test]
        fn every_free_block_is_given_and_none_twice_whatever_is_taken(any in any()) {
            let Any { bits, held, reserved, joins } = any;
            let mut field = field(bits);
            for (at, count) in reserved {
                let end = (at + count).min(field.pool.total());
                field = field.reserved(at..end);
            }
            for (index, group) in held {
                if field.pool.is_free(&(index..index + 1)) {
                    field = field.held(&group.to_string(), [index]);
                }
            }
            for (count, group) in joins.into_iter().enumerate() {
                // Now and then all is read off the blocks anew, as by the next plan or leader.
                if count % 7 == 6 {
                    field = field.again();
                }
                let free = field.pool.free();
                let before = field.pool.clone();
                let carved = field.carve(&group.to_string());
                prop_assert_eq!(carved.is_some(), free > 0);
                if let Some(index) = carved {
                    prop_assert!(before.is_free(&(index..index + 1)), "{} is taken", index);
                }
                let layout = field.topology.layout.as_ref().unwrap();
                let spans: Vec<_> = layout.stretches.values().map(|(s, _)| s.span()).collect();
                prop_assert!(spans.windows(2).all(|two| two[0].end <= two[1].start), "{:?}", spans);
            }
            for group in 0..5 {
                let group = group.to_string();
                prop_assert_eq!(field.spans(&group), stretches_by_hand(&field, &group));
            }
        }

        #[test]
        fn one_plan_for_all_carves_as_a_plan_for_each_while_there_is_room(
            joins in prop::collection::vec(0u8..4, 0..60),
        ) {
            let (mut at_once, mut one_by_one) = (field(9), field(9));
            for group in joins {
                let group = group.to_string();
                let age = one_by_one.age;
                let index = one_by_one.carve(&group);
                prop_assert_eq!(at_once.carve(&group), index);
                // The youngest block of each group is remembered by its age.
                let mut again = one_by_one.again();
                again.age = age + 1;
                one_by_one = again;
            }
        }
    }
}
