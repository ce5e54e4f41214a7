//! The probes' metrics, made of what they found last. Each is described where it is written.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use tokio::sync::watch;

use super::findings::{Counters, Findings};
use super::track::State;

/// Shows what was found last.
#[derive(Debug)]
pub struct ProbeMetrics(pub watch::Receiver<Findings>);

#[derive(Clone, Debug, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

impl Collector for ProbeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let found = self.0.borrow();
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);

        let help = "Blocks of other nodes in the present sample and those with something wrong, by the probes' verdict";
        let kind = ConstGauge::new(0i64).metric_type();
        let mut peers = encoder.encode_descriptor("plat_agent_probe_peers", help, None, kind)?;
        for state in State::ALL {
            let count = ConstGauge::new(number(found.in_state(state).count()));
            count.encode(peers.encode_family(&StateLabel { state: state.label() })?)?;
        }

        let help = "Probes sent, and of those answered, lost and refused; answers to others, and packets of others that were ignored";
        let kind = ConstCounter::new(0u64).metric_type();
        let mut packets = encoder.encode_descriptor("plat_agent_probe_packets", help, None, kind)?;
        let Counters { sent, answered, lost, refused, answers, ignored } = found.counters;
        for (kind, count) in [
            ("sent", sent),
            ("answered", answered),
            ("lost", lost),
            ("refused", refused),
            ("answers", answers),
            ("ignored", ignored),
        ] {
            ConstCounter::new(count).encode(packets.encode_family(&KindLabel { kind })?)?;
        }

        let help = "Median of the round trips to the blocks of the last whole round";
        let round_trip = ConstGauge::new(found.summary.round_trip.unwrap_or_default().as_secs_f64());
        let unit = Some(&Unit::Seconds);
        let kind = round_trip.metric_type();
        round_trip.encode(encoder.encode_descriptor("plat_agent_probe_round_trip", help, unit, kind)?)?;

        let help = "Blocks to which packets of full size are lost and smaller ones pass";
        let path_mtus = ConstGauge::new(number(found.path_mtus().len()));
        let kind = path_mtus.metric_type();
        path_mtus.encode(encoder.encode_descriptor("plat_agent_probe_path_mtus", help, None, kind)?)
    }
}
