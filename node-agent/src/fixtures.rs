//! Facts for tests: [`block`] and [`range`] are what an ordinary cluster has, and a test changes what it is
//! about (`BlockFact { state: …, ..block(2) }`).

use plat_crds::cluster_cidr::MasqueradeMode;
use plat_crds::lease::Datapath;
use plat_crds::pod_cidr::BlockState;
use plat_crds::routing_policy::Phase;
use plat_crds::selector::Labels;
use plat_crds::{Block, RoutingPolicySpec};

use crate::desired::Me;
use crate::facts::{BlockFact, PolicyFact, RangeFact};
use crate::objects::{Change, Objects};
use crate::vxlan::Network;

/// A node of that name, set up as the chart does it, without probes.
pub fn me(node: &str) -> Me {
    Me {
        node: node.into(),
        datapath: Datapath::Bridge,
        bridge: "cni0".into(),
        admit_forward: true,
        probe_port: None,
        vxlan: Network::default(),
    }
}

/// Block `10.244.<n>.0/24` of node `n<n>`, whose address is `172.30.0.<10+n>`; from range `default-v4`.
pub fn block(n: u8) -> BlockFact {
    let block: Block = format!("10.244.{n}.0/24").parse().unwrap();
    BlockFact {
        name: block.object_name(),
        uid: format!("uid-{n}"),
        generation: 1,
        created: i64::from(n),
        block,
        range: "default-v4".into(),
        node: format!("n{n}"),
        addresses: vec![[172, 30, 0, 10 + n].into()],
        state: BlockState::Active,
        routing: None,
        converged: false,
        labels: Labels::default(),
    }
}

/// Block `fd00:10:244:<n>::/64` of the same node.
pub fn block_v6(n: u8) -> BlockFact {
    let block: Block = format!("fd00:10:244:{n}::/64").parse().unwrap();
    BlockFact {
        name: block.object_name(),
        block,
        range: "default-v6".into(),
        addresses: vec![[172, 30, 0, 10 + n].into(), format!("fd00:30::{n}").parse().unwrap()],
        ..self::block(n)
    }
}

/// Range `10.244.0.0/16`, ready.
pub fn range(name: &str) -> RangeFact {
    RangeFact {
        name: name.into(),
        uid: format!("uid-{name}"),
        generation: 1,
        range: "10.244.0.0/16".parse().unwrap(),
        ready: true,
        quarantine_seconds: 900,
        routing: None,
        masquerade: MasqueradeMode::Enabled,
        exclude: vec![],
        max_blocks: 8,
        gives_blocks: true,
        block_prefix: 24,
    }
}

/// A policy for every node and block that says nothing, in force everywhere.
pub fn policy(name: &str) -> PolicyFact {
    PolicyFact {
        name: name.into(),
        uid: format!("uid-{name}"),
        generation: 1,
        spec: RoutingPolicySpec::default(),
        observed: Some(1),
        phase: Some(Phase::Complete),
        last_good: None,
    }
}

/// What a watch knows that has listed these, and no policy.
pub fn objects(blocks: Vec<BlockFact>, ranges: Vec<RangeFact>) -> Objects {
    let mut objects = Objects::default();
    objects.blocks.apply(Change::Listed(blocks.into_iter().map(Ok).collect()));
    objects.ranges.apply(Change::Listed(ranges.into_iter().map(Ok).collect()));
    objects.policies.apply(Change::Listed(vec![]));
    objects
}
