//! Names and numbers that two of our programs, or a program and an administrator, must agree on.

/// API group of every kind.
pub const GROUP: &str = "plat.network";
/// API version of every kind.
pub const VERSION: &str = "v1alpha1";

/// Finalizer on a ClusterCIDR: it stays until its last PodCIDR is gone, so that a range never comes back
/// in another block size over living blocks.
pub const CLUSTER_CIDR_FINALIZER: &str = "plat.network/blocks";
/// Label of a PodCIDR: the name of its ClusterCIDR.
pub const LABEL_CLUSTER_CIDR: &str = "plat.network/clustercidr";
/// Label of a PodCIDR: the name of the node that holds it (cut at 63 bytes, the limit of a label value).
pub const LABEL_NODE: &str = "plat.network/node";
/// Annotation of a PodCIDR, the users': move its node's pods off the block. Its value does not matter.
pub const ANNOTATION_DRAIN: &str = "plat.network/drain";
/// Server-side-apply field manager of the operator.
pub const OPERATOR_MANAGER: &str = "plat-operator";
/// Server-side-apply field manager of every agent; constant, as a node name could exceed the limit of 128 bytes.
pub const AGENT_MANAGER: &str = "plat-agent";
/// Name of the operator's leader Lease.
pub const LEADER_LEASE: &str = "plat-operator";
/// Name of the default IPv4 ClusterCIDR, which the operator creates from its `--cluster-cidr` flag.
pub const DEFAULT_CLUSTER_CIDR_V4: &str = "default-v4";
/// Name of the default IPv6 ClusterCIDR.
pub const DEFAULT_CLUSTER_CIDR_V6: &str = "default-v6";

/// `rtm_protocol` of every route of ours (shown by `ip route` as `proto 112`). Free in iproute2's
/// `rt_protos` and unused by the routing daemons listed there.
pub const ROUTE_PROTOCOL: u8 = 112;
/// `rtm_protocol` of the host routes to the pods of the routed datapath. The CNI binary makes them, the agent
/// puts lost ones back and removes none: a number of their own keeps them apart from the agent's routes, of
/// which it removes what it does not want. Free like [`ROUTE_PROTOCOL`].
pub const POD_ROUTE_PROTOCOL: u8 = 113;
/// Metric of our routes to blocks. The kernel's replace key is prefix, table and metric, not protocol: a
/// metric of our own keeps a replace from overwriting an administrator's route or a device's own.
pub const ROUTE_METRIC: u32 = 1120;
/// Metric of our `unreachable` routes: worse than any route to a block, so they only catch what has none.
pub const UNREACHABLE_METRIC: u32 = 65_535;

/// The kernel's main routing table (`RT_TABLE_MAIN`).
pub const MAIN_TABLE: u32 = 254;

/// Priority of our `ip rule`s, one per table and family that policies name: behind the kernel's own for local
/// addresses, and before those that send all traffic elsewhere (a VPN's, a default route by source address).
pub const RULE_PRIORITY: u32 = 1120;

/// VXLAN device for tunnels over IPv4. The kernel binds a device to one family of the underlay.
pub const VXLAN_DEVICE_V4: &str = "plat-vxlan";
/// VXLAN device for tunnels over IPv6.
pub const VXLAN_DEVICE_V6: &str = "plat-vxlan6";
/// Default UDP port of VXLAN: IANA's (RFC 7348 §8).
pub const VXLAN_PORT: u16 = 4789;
/// Default VXLAN network identifier: no other pod network's default, so that two can share the port.
pub const VXLAN_VNI: u32 = 1120;

/// The agent's nftables table (family inet): masquerade; replaced whole.
pub const NFT_TABLE: &str = "plat";
/// The CNI binary's nftables table (family inet): what belongs to single pods.
pub const NFT_PODS_TABLE: &str = "plat-pods";
/// Comment that marks our accept rules in foreign FORWARD chains, for people who read them. The agent
/// recognises its rules by their content, as iptables-restore changes the encoding of comments.
pub const FORWARD_COMMENT: &str = "plat";

/// The CNI type and the file name of the CNI binary.
pub const CNI_TYPE: &str = "plat";
/// The network name in the conflist. Never changed: runtimes key their caches on it.
pub const CNI_NETWORK: &str = "plat";
/// The conflist's file name: sorts before other networks' files.
pub const CONFLIST_FILE: &str = "05-plat.conflist";
/// What the names of the host's ends of pods' links begin with.
pub const VETH_PREFIX: &str = "plat";
/// The default bridge.
pub const BRIDGE: &str = "cni0";

/// Default folder of the node's state; a tmpfs, so that a reboot ends pods and leases together.
pub const RUN_DIR: &str = "/run/plat";
/// Blocks file in [`RUN_DIR`].
pub const BLOCKS_FILE: &str = "blocks.json";
/// Lease store in [`RUN_DIR`].
pub const LEASES_FILE: &str = "leases";
/// The agent's cache of the objects in [`RUN_DIR`], for starting without the API server.
pub const MAP_FILE: &str = "map.json";
/// What the agent tries of routing policies, and what it went back from, in [`RUN_DIR`].
pub const ROLLOUT_FILE: &str = "rollout.json";
/// Former sysctl values in [`RUN_DIR`], restored by `plat-agent cleanup`.
pub const SYSCTLS_FILE: &str = "sysctls.json";
/// Default folder of CNI binaries.
pub const CNI_BIN_DIR: &str = "/opt/cni/bin";
/// Default folder of CNI configurations.
pub const CNI_CONF_DIR: &str = "/etc/cni/net.d";
