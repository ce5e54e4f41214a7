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
