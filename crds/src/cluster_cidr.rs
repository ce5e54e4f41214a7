//! ClusterCIDR: one range that blocks are carved from.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::block::{Block, ParseBlockError};
use crate::condition;
use crate::routing::Routing;

/// Quarantine of a released block unless the ClusterCIDR says otherwise, in seconds.
pub const DEFAULT_QUARANTINE_SECONDS: i32 = 900;

/// Blocks that a node has at least and at most, unless the ClusterCIDR says otherwise. The maximum is more than
/// a kubelet of today runs pods on: 2,024 pods with /24 blocks (253 each), 488 with /26 (61 each). Blocks are
/// taken only as they fill up and what fills them is bounded by the kubelet's `maxPods`, so it need not be
/// tight: it is there so that a node that loses track of its leases does not use up the range.
pub const DEFAULT_BLOCKS_PER_NODE: BlocksPerNode = BlocksPerNode { min: 1, max: 8 };

/// How many blocks of one family a node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("max must not be less than min; when it is not set, it is 8").field_path(".max"))]
pub struct BlocksPerNode {
    /// Blocks that a node gets from the start and keeps, 1 to 16. Default 1.
    #[serde(default = "default_min_blocks")]
    #[schemars(range(min = 1, max = 16))]
    pub min: i32,
    /// Blocks that a node gets at most, 1 to 16. A node whose blocks fill up gets another one, until it has
    /// so many; 1 means that a full node stays full. Default 8.
    #[serde(default = "default_max_blocks")]
    #[schemars(range(min = 1, max = 16))]
    pub max: i32,
}

impl Default for BlocksPerNode {
    fn default() -> Self {
        DEFAULT_BLOCKS_PER_NODE
    }
}

fn default_min_blocks() -> i32 {
    DEFAULT_BLOCKS_PER_NODE.min
}

fn default_max_blocks() -> i32 {
    DEFAULT_BLOCKS_PER_NODE.max
}

/// Whether blocks are carved from the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Allocation {
    /// New blocks are carved.
    #[default]
    Enabled,
    /// No new blocks; existing ones stay with their nodes until they are asked to drain.
    Draining,
    /// A value of a newer version: no new blocks.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// How the operator chooses the size of the blocks of a range that does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum BlockSizing {
    /// /24 for IPv4, /64 for IPv6.
    #[default]
    Default,
    /// What the nodes that the range selects can hold.
    MaxPods,
    /// A value of a newer version: as `Default`.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// Whether pod traffic that leaves the cluster gets the node's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum MasqueradeMode {
    /// Traffic to anything but pods, nodes and `exclude` is masqueraded.
    #[default]
    Enabled,
    /// Pod addresses leave the cluster as they are.
    Disabled,
    /// A value of a newer version: treated as `Enabled`.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// Masquerade of the pods of a range.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Masquerade {
    /// `Enabled` (the default): traffic from these pods to anything but pods, nodes, multicast, link-local
    /// and `exclude` leaves with the node's address. `Disabled`: it leaves with the pod's.
    #[serde(default)]
    pub mode: MasqueradeMode,
    /// Destinations that see the pod's own address, besides pods and nodes. At most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 43)))]
    #[x_kube(validation = Rule::new("self.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())")
        .message("each must be a CIDR without host bits, such as 192.168.0.0/16"))]
    pub exclude: Vec<String>,
}

/// One range of pod addresses, of one family, that the operator carves blocks from for nodes. A
/// dual-stack cluster has two.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "plat.network",
    version = "v1alpha1",
    kind = "ClusterCIDR",
    plural = "clustercidrs",
    singular = "clustercidr",
    shortname = "ccidr",
    category = "plat",
    status = "ClusterCIDRStatus",
    derive = "PartialEq",
    doc = "One range of pod addresses that the operator carves blocks from for nodes. A dual-stack cluster has two, one per family.",
    printcolumn(name = "CIDR", type_ = "string", json_path = ".spec.cidr", description = "The range"),
    printcolumn(name = "Block", type_ = "integer", json_path = ".spec.blockPrefixLength", description = "Prefix length of its blocks"),
    printcolumn(name = "Allocated", type_ = "integer", json_path = ".status.blocks.allocated", description = "Blocks that nodes hold"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.blocks.free", description = "Blocks that can still be carved"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#, description = "Whether blocks are carved from it"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Allocation", type_ = "string", json_path = ".spec.allocation", priority = 1, description = "Enabled or Draining"),
    printcolumn(name = "Quarantined", type_ = "integer", json_path = ".status.blocks.quarantined", priority = 1, description = "Released blocks that wait before reuse"),
    printcolumn(name = "Topology", type_ = "string", json_path = ".spec.topologyKey", priority = 1, description = "Node label whose values' blocks lie together"),
    printcolumn(name = "RunsOut", type_ = "string", json_path = ".status.forecast.exhaustedAt", priority = 1, description = "When no block is free any more, at the pace of the last weeks"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1, description = "Why it is ready or not"),
    validation = Rule::new("size(self.metadata.name) <= 63").message("the name must not be longer than 63 characters: it becomes a label value")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!isCIDR(self.cidr) || (cidr(self.cidr).ip().family() == 4 ? cidr(self.cidr).prefixLength() >= 8 && cidr(self.cidr).prefixLength() <= 30 : cidr(self.cidr).prefixLength() >= 24 && cidr(self.cidr).prefixLength() <= 124)")
        .message("the range must be /8 to /30 (IPv4) or /24 to /124 (IPv6)").field_path(".cidr"),
    validation = Rule::new("!isCIDR(self.cidr) || has(self.blockPrefixLength) || self.blockSizing == 'MaxPods' || cidr(self.cidr).prefixLength() <= (cidr(self.cidr).ip().family() == 4 ? 24 : 64)")
        .message("the range is smaller than the default block (/24, /64): set blockPrefixLength").field_path(".blockPrefixLength"),
    validation = Rule::new("!isCIDR(self.cidr) || !has(self.blockPrefixLength) || (self.blockPrefixLength >= cidr(self.cidr).prefixLength() && self.blockPrefixLength - cidr(self.cidr).prefixLength() <= 24)")
        .message("blocks must not be larger than the range, nor may it hold more than 2^24 of them").field_path(".blockPrefixLength"),
    validation = Rule::new("!isCIDR(self.cidr) || !has(self.blockPrefixLength) || (cidr(self.cidr).ip().family() == 4 ? self.blockPrefixLength >= 16 && self.blockPrefixLength <= 30 : self.blockPrefixLength >= 48 && self.blockPrefixLength <= 124)")
        .message("blocks must be /16 to /30 (IPv4) or /48 to /124 (IPv6)").field_path(".blockPrefixLength"),
    validation = Rule::new("!has(oldSelf.blockPrefixLength) || (has(self.blockPrefixLength) && self.blockPrefixLength == oldSelf.blockPrefixLength)")
        .message("blockPrefixLength is set once: add another ClusterCIDR for blocks of another size").field_path(".blockPrefixLength"),
    validation = Rule::new("!has(oldSelf.blockPrefixLength) || self.blockSizing == oldSelf.blockSizing")
        .message("blockSizing says how an unset blockPrefixLength is filled in, and that is set: add another ClusterCIDR").field_path(".blockSizing"),
    validation = Rule::new("!isCIDR(self.cidr) || !has(self.reserved) || self.reserved.all(r, isCIDR(r) && cidr(self.cidr).containsCIDR(r))")
        .message("each reserved range must be a CIDR inside the range").field_path(".reserved")
)]
pub struct ClusterCIDRSpec {
    /// The range, such as `10.244.0.0/16` or `fd00:10:244::/48`, in canonical form. Never changes: add
    /// another ClusterCIDR to grow.
    #[schemars(length(max = 43))]
    #[x_kube(
        validation = Rule::new("isCIDR(self) && cidr(self) == cidr(self).masked() && string(cidr(self)) == self")
            .message("must be a CIDR without host bits, in canonical (RFC 5952) form"),
        validation = Rule::new("!self.startsWith('::')").message("a range that starts with '::' cannot be named; use another"),
        validation = Rule::new("self == oldSelf").message("the range cannot be changed: add another ClusterCIDR"),
    )]
    pub cidr: String,

    /// Prefix length of the blocks that nodes get. The operator fills it in when it is not set, as
    /// `blockSizing` says; afterwards it never changes. IPv6 blocks lease their first 65,534 addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_prefix_length: Option<i32>,

    /// How an unset `blockPrefixLength` is filled in. `Default`: 24 (IPv4) or 64 (IPv6). `MaxPods`: the
    /// smallest block that holds the pods of the largest node that the range selects by then
    /// (`status.allocatable.pods`) and stays below the mark at which a node gets another block; no range is
    /// cut into more than 65,536 blocks. Waits for the first such node.
    #[serde(default)]
    pub block_sizing: BlockSizing,

    /// Nodes that get blocks from this range, by their labels; all nodes if not set. A block that was
    /// carved stays when labels change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::selector::schema")]
    pub node_selector: Option<LabelSelector>,

    /// Of several ranges that fit a node, the highest priority with a free block wins, then the name.
    /// Default 0.
    #[serde(default)]
    #[schemars(range(min = -1000000, max = 1000000))]
    pub priority: i32,

    /// Label of Nodes, such as `topology.kubernetes.io/zone`, whose value says which nodes' blocks lie
    /// together: in one aligned stretch per value that doubles when it is full, as long as the range allows,
    /// so that a router or a firewall names a zone by one prefix. Blocks that exist stay where they are when
    /// the key or a node's label changes. Nodes without the label are a group of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    #[x_kube(validation = Rule::new(r"self.matches('^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$')")
        .message("must be a label key such as topology.kubernetes.io/zone"))]
    pub topology_key: Option<String>,

    /// Parts of the range that are never handed out. At most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 43)))]
    pub reserved: Vec<String>,

    /// How many blocks of this family a node that is served by this range holds. A node that fills up gets
    /// one more before it is full, and gives it back when it has been empty for a while. Blocks of other
    /// ranges count too. Default 1 to 8.
    #[serde(default)]
    pub blocks_per_node: BlocksPerNode,

    /// How long a released block rests before another node may get it, in seconds, 60 to 604800 (a
    /// week). A node that is cut off from the API server goes on leasing for this long, less a minute, or
    /// less half of it if that is shorter.
    #[serde(default = "default_quarantine_seconds")]
    #[schemars(range(min = 60, max = 604800))]
    pub quarantine_seconds: i32,

    /// `Enabled` (the default): nodes get new blocks. `Draining`: no new blocks; existing ones stay until they
    /// are asked to go: `kubectl annotate podcidrs -l plat.network/clustercidr=NAME plat.network/drain=`.
    #[serde(default)]
    pub allocation: Allocation,

    /// Routing policy of the range's blocks; a PodCIDR's own `spec.routing` goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,

    /// Masquerade of the range's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<Masquerade>,
}

fn default_quarantine_seconds() -> i32 {
    DEFAULT_QUARANTINE_SECONDS
}

/// What the operator observed of a range.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterCIDRStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Blocks of the range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockCounts>,
    /// Where carving goes on (next-fit): index of the block after the last one carved. A hint; it may be
    /// lost or stale without harm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<i64>,
    /// Quarantine that holds, in seconds: the longest that a node with a block of the range may still go by.
    /// It follows a longer `spec.quarantineSeconds` at once, and a shorter one when the last of these nodes
    /// has reported that it knows, so that lowering it frees no block that a node which is cut off leases from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine_seconds: Option<i32>,
    /// What the nodes of each value of `spec.topologyKey` hold, by value; of more than 64, those with most
    /// blocks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub groups: Vec<TopologyGroup>,
    /// How fast it fills up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<RangeForecast>,
    /// `Ready`: blocks are carved from it. `Exhausted`: none is free; `False` with another reason than
    /// `BlocksFree` warns ahead. `Overlapping`: it shares addresses
    /// with an older range, the Service range or a node. `Draining`: no new blocks, and how many are left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(transform = condition::bound)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Most entries of [`ClusterCIDRStatus::groups`]: every agent watches ClusterCIDRs, so they stay small.
pub const MAX_GROUPS: usize = 64;
/// Most entries of [`TopologyGroup::prefixes`].
pub const MAX_PREFIXES: usize = 4;

/// The blocks of the nodes with one value of the topology label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopologyGroup {
    /// Value of the label; absent for the nodes without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// Its blocks, those in quarantine too.
    pub blocks: i64,
    /// Its blocks outside the first of `prefixes`: 0 if one prefix names them all.
    pub outside: i64,
    /// Number of prefixes that it takes to name all its blocks and none of another group.
    pub prefix_count: i64,
    /// These prefixes, those with most blocks first. At most 4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(max = 43)))]
    pub prefixes: Vec<String>,
}

/// Days that [`RangeForecast::peaks`] holds at most: four weeks and today.
pub const MAX_PEAKS: usize = 29;

/// How fast a range fills up, by the blocks that were in use on the last days.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RangeForecast {
    /// Growth at the pace seen, in blocks per 30 days; 0 if it shrinks or not even a week was seen.
    pub growth: i32,
    /// When no block is free any more, if it goes on at that pace. Not set if that is further away than
    /// twice the time seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exhausted_at: Option<Time>,
    /// The first of the days seen (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// The most blocks in use (held, quarantined or reserved) on each day from `since` to today, at most 29.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 29))]
    pub peaks: Vec<i32>,
}

/// Blocks of a range, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockCounts {
    /// Blocks that fit into the range.
    pub total: i64,
    /// Blocks that nodes hold.
    pub allocated: i64,
    /// Of those, blocks that are draining: no new leases, and free once their last one has ended.
    #[serde(default)]
    pub draining: i64,
    /// Released blocks that wait before reuse.
    pub quarantined: i64,
    /// Blocks that can still be carved; neither held, quarantined nor reserved.
    pub free: i64,
}

impl ClusterCIDRSpec {
    /// The range; an error if an object that the API server should have refused came through a cache.
    pub fn range(&self) -> Result<Block, ParseBlockError> {
        self.cidr.parse()
    }

    /// Prefix length of the range's blocks, with the default of `range`'s family where it is not set.
    pub fn block_prefix(&self, range: &Block) -> u8 {
        self.block_prefix_length
            .and_then(|length| u8::try_from(length).ok())
            .unwrap_or_else(|| range.family().default_block_prefix())
    }
}
