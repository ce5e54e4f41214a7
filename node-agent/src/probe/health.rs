//! How well this node reaches others, for whoever changes its routes and may have to change them back.

use std::collections::BTreeSet;

use plat_crds::block::Block;

/// The probes' verdict as a whole. Compare it with an earlier one: what failed before is not the change's doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Whole rounds of probes since the agent started; one that began after a change is the first that tells of it.
    pub rounds: u64,
    /// Blocks of other nodes about which something is known now.
    pub checked: usize,
    /// Of those, the ones that pods cannot use as they should: unreachable, lossy, or losing big packets without a
    /// path MTU that helps.
    pub failing: BTreeSet<Block>,
}

impl Health {
    /// The blocks that fail and did not before.
    pub fn worse_than<'a>(&'a self, before: &'a Health) -> impl Iterator<Item = &'a Block> {
        self.failing.difference(&before.failing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_before_is_not_worse_now() {
        let block = |n: u8| -> Block { format!("10.244.{n}.0/24").parse().unwrap() };
        let before = Health { rounds: 1, checked: 3, failing: [block(2)].into() };
        let now = Health { rounds: 3, checked: 3, failing: [block(2), block(3)].into() };
        assert_eq!(now.worse_than(&before).collect::<Vec<_>>(), [&block(3)]);
        assert_eq!(before.worse_than(&now).count(), 0);
    }
}
