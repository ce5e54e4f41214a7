//! Reasons: the CamelCase words that conditions, Events and metrics share, so that one `grep` finds a case.
//!
//! What users are to do about each stands in docs/operations.md; `charts/test.sh` sees to it.

/// ClusterCIDR `Ready=True`: blocks are carved from it.
pub const RANGE_READY: &str = "RangeReady";
/// ClusterCIDR `Ready=True`, but `spec.allocation` lets no new block be carved.
pub const RANGE_DRAINING: &str = "Draining";
/// ClusterCIDR `Ready=False`: deleted, waits for its last block.
pub const TERMINATING: &str = "Terminating";
/// ClusterCIDR `Ready=False`: its spec cannot be used.
pub const INVALID_SPEC: &str = "InvalidSpec";
/// ClusterCIDR `Ready=False`: another ClusterCIDR cannot be read, so nobody knows whether they overlap.
pub const OTHER_UNREADABLE: &str = "OtherRangeUnreadable";
/// ClusterCIDR `Ready=False`: the size of its blocks is chosen when a node says how many pods it can hold.
pub const WAITING_FOR_NODE: &str = "WaitingForNode";
/// ClusterCIDR `Ready=False`: no block of it is large enough for its nodes.
pub const RANGE_TOO_SMALL: &str = "RangeTooSmall";
/// Event: the operator has chosen the size of a ClusterCIDR's blocks.
pub const BLOCK_SIZE_CHOSEN: &str = "BlockSizeChosen";
/// ClusterCIDR: shares addresses with an older ClusterCIDR.
pub const OVERLAPS_CLUSTER_CIDR: &str = "OverlapsClusterCIDR";
/// ClusterCIDR: shares addresses with the cluster's Service range.
pub const OVERLAPS_SERVICES: &str = "OverlapsServiceRange";
/// ClusterCIDR: holds an address of the API server.
pub const OVERLAPS_API_SERVER: &str = "OverlapsAPIServer";
/// ClusterCIDR: holds an address of a node.
pub const OVERLAPS_NODE: &str = "OverlapsNodeAddress";
/// ClusterCIDR `Overlapping=False`.
pub const NO_OVERLAP: &str = "NoOverlap";
/// ClusterCIDR `Exhausted=True`, and the fault of a node that gets no block for that reason.
pub const RANGE_EXHAUSTED: &str = "RangeExhausted";
/// ClusterCIDR `Exhausted=False`, and a warning Event: at the pace seen no block is free within two weeks.
pub const RUNS_OUT_SOON: &str = "RunsOutSoon";
/// ClusterCIDR `Exhausted=False`, and a warning Event: fewer than one block in twenty is free.
pub const FEW_BLOCKS_LEFT: &str = "FewBlocksLeft";
/// ClusterCIDR `Exhausted=False`: it runs out, but its nodes then get blocks of another ClusterCIDR.
pub const OTHERS_TAKE_OVER: &str = "OthersTakeOver";
/// ClusterCIDR `Exhausted=False`.
pub const BLOCKS_FREE: &str = "BlocksFree";
/// The operator's `--cluster-cidr` differs from the range that exists.
pub const FLAG_IGNORED: &str = "ClusterCIDRFlagIgnored";

/// PodCIDR `Ready=True`: its node has programmed itself and leases from it.
pub const PROGRAMMED: &str = "Programmed";
/// PodCIDR `Ready=False`: the node's agent has not reported yet.
pub const NO_REPORT: &str = "NoReport";
/// PodCIDR `Ready=False`: the agent's report does not name the block yet.
pub const NOT_TAKEN_UP: &str = "NotTakenUp";
/// PodCIDR `Ready=False`: the agent reports that something is missing.
pub const AGENT_NOT_READY: &str = "AgentNotReady";
/// PodCIDR `Ready=Unknown`: Kubernetes has lost contact with the node.
pub const NODE_LOST: &str = "NodeLost";
/// PodCIDR `Ready=False`: its node is gone; it is about to be quarantined.
pub const NODE_GONE: &str = "NodeGone";
/// PodCIDR `Ready=False`: its node is gone and it rests before reuse; the message says what it waits for.
pub const QUARANTINED: &str = "Quarantined";
/// PodCIDR `Converged=True`: every live node carries it.
pub const CARRIED: &str = "CarriedByAllNodes";
/// PodCIDR `Converged=False`: some live nodes do not carry it yet.
pub const SPREADING: &str = "Spreading";
/// PodCIDR `Converged=False`: a live node could not apply it.
pub const FAILED_ON_NODE: &str = "FailedOnNode";
/// PodCIDR `NodeSpecConflict=False`: `node.spec.podCIDRs` lists the block.
pub const LISTED: &str = "Listed";
/// PodCIDR `NodeSpecConflict=False`: `node.spec.podCIDRs` is empty.
pub const NOT_SET: &str = "NotSet";
/// PodCIDR `NodeSpecConflict=False`: a further block of a node, of which the field names only the first.
pub const FURTHER_BLOCK: &str = "FurtherBlock";
/// PodCIDR `NodeSpecConflict=False`: the node was moved off the block that `node.spec.podCIDRs` goes on naming.
pub const MOVED: &str = "Moved";
/// PodCIDR `Draining=True`: its annotation asks for it.
pub const ASKED: &str = "Asked";
/// PodCIDR `Draining=True`: its node does not need it.
pub const SURPLUS: &str = "Surplus";
/// PodCIDR `Draining=False`: asked for, but no block can take its place.
pub const NO_REPLACEMENT: &str = "NoReplacement";
/// PodCIDR `Draining=False`: asked for, and its node gets another block first.
pub const REPLACEMENT_COMES: &str = "ReplacementComes";
/// ClusterCIDR `Draining=True`: nodes hold blocks of it.
pub const BLOCKS_LEFT: &str = "BlocksLeft";
/// ClusterCIDR `Draining=True`: no node holds a block of it.
pub const NO_BLOCKS_LEFT: &str = "NoBlocksLeft";
/// PodCIDR `NodeSpecConflict=False`: `node.spec.podCIDRs` says something else, which is not looked at.
pub const IGNORED: &str = "Ignored";
/// PodCIDR `NodeSpecConflict=True`: `node.spec.podCIDRs` says something else.
pub const DIFFERS: &str = "Differs";

/// Event: a block was carved for a node.
pub const BLOCK_ALLOCATED: &str = "BlockAllocated";
/// Event: a node keeps the block that `node.spec.podCIDRs` gave it before.
pub const BLOCK_ADOPTED: &str = "BlockAdopted";
/// Event: a lost PodCIDR was made again for the node that holds the block.
pub const BLOCK_RECREATED: &str = "BlockRecreated";
/// Event: a returning node got its block back.
pub const BLOCK_READOPTED: &str = "BlockReadopted";
/// Event: a block is not leased from any more, as it was asked to drain or its node does not need it.
pub const BLOCK_DRAINING: &str = "BlockDraining";
/// Event: a draining block is leased from again.
pub const BLOCK_RESUMED: &str = "BlockResumed";
/// Event: the block's node is gone, or has given it back.
pub const BLOCK_QUARANTINED: &str = "BlockQuarantined";
/// Event: the block is free again.
pub const BLOCK_RELEASED: &str = "BlockReleased";
/// Event: the block is free again, though live nodes did not say in time that they withdrew their route.
pub const BLOCK_RELEASED_UNPROVEN: &str = "BlockReleasedUnproven";
/// Event: `node.spec.podCIDRs` and the node's blocks differ.
pub const NODE_SPEC_CONFLICT: &str = "NodeSpecConflict";
/// Event: the default ClusterCIDR was created.
pub const RANGE_CREATED: &str = "RangeCreated";
/// Event: a ClusterCIDR shares addresses with something else.
pub const RANGE_OVERLAPPING: &str = "RangeOverlapping";

/// Fault: an object cannot be read.
pub const UNREADABLE: &str = "Unreadable";
/// Fault: no ClusterCIDR selects the node.
pub const NO_RANGE: &str = "NoClusterCIDR";
/// Fault: the ClusterCIDRs that select the node are not ready.
pub const RANGE_NOT_READY: &str = "ClusterCIDRNotReady";
/// Fault and PodCIDR `GrowthBlocked=True`: the node is almost full and has as many blocks as its range allows.
pub const BLOCKS_PER_NODE_REACHED: &str = "BlocksPerNodeReached";
/// Fault: the node has no InternalIP, so nobody can route to it.
pub const NO_ADDRESS: &str = "NodeHasNoAddress";
/// Fault: two nodes have one InternalIP.
pub const ADDRESS_SHARED: &str = "NodeAddressShared";
/// Fault: a PodCIDR that the operator cannot have made.
pub const FOREIGN_BLOCK: &str = "ForeignPodCIDRObject";
/// Fault: a PodCIDR shares addresses with an older one.
pub const BLOCKS_OVERLAP: &str = "PodCIDRsOverlap";
/// Fault: `node.spec.podCIDRs` lies in no ClusterCIDR, or does not fit the one it lies in.
pub const FOREIGN_POD_CIDR: &str = "ForeignPodCIDR";
/// Fault: `ipam.source` is `node`, and the node has no `spec.podCIDRs` entry of a family.
pub const NO_POD_CIDR: &str = "NoPodCIDR";
/// ClusterCIDR `OtherAllocator=True` and its fault: another program writes `node.spec.podCIDRs`.
pub const WRITTEN_BY_OTHER: &str = "PodCIDRsWrittenByOther";
/// ClusterCIDR `OtherAllocator=False`.
pub const SOLE_ALLOCATOR: &str = "SoleAllocator";
/// Fault: `node.spec.podCIDRs` names a block that another node holds.
pub const POD_CIDR_TAKEN: &str = "PodCIDRTaken";
/// Fault: more PodCIDRs were lost than agents can name, so nothing is carved for a while.
pub const BLOCKS_LOST: &str = "PodCIDRsLost";
/// Fault: a node reports leases in a block that another node holds.
pub const HELD_BLOCK_TAKEN: &str = "HeldBlockTaken";
