//! How much a pod may receive and send: the bandwidth plugin's keys and capability, done by a token bucket on
//! each end of the pod's link.
//!
//! ```text
//! to the pod:    qdisc tbf 1: dev plat0a1b2c3d root rate 10Mbit burst 64Kb lat 25ms     (host's end)
//! from the pod:  qdisc tbf 1: dev eth0         root rate 10Mbit burst 64Kb lat 25ms     (pod's end)
//! ```
//! What the pod sends is held back where it is sent: there is nothing outside the pod's own link that could be
//! left behind. The reference plugin sends it around an ifb
//! device of its own: as accurate, but one more link to make and to wait for at each DEL. The price: a pod
//! with `NET_ADMIN` can lift its own limit. Figures are in `docs/benchmarks.md`.

use crate::error::{Code, Error};
use crate::json::Json;
use crate::netlink::{self, Message, Socket};
use crate::tc::{self, Bucket};

/// How long a packet waits at most before others are dropped, as the reference: 25 ms.
const LATENCY_PER_SECOND: u64 = 40;
/// No less may pass at once: the largest packet that the stack hands to a link whole (64 KiB).
const LEAST_OWN_BURST: u64 = 65_536;
/// From here on (in bits) a burst means that nobody named one: kubelet knows annotations for rates only, so
/// dockershim sent 2^31 - 1, containerd sends 2^32 - 1 and CRI-O 2^35 - 9.
const NO_BURST_NAMED: i64 = (1 << 31) - 1;
/// The reference's bound, in bits.
const BURST_BOUND: i64 = 8 * u32::MAX as i64;
/// What a frame has besides its packet: addresses, type and a VLAN tag.
const FRAME: u32 = 18;

/// A rate and what may pass at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes per second; never 0.
    pub rate: u64,
    /// Bytes.
    pub burst: u32,
}

/// The limits of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// To the pod.
    pub ingress: Option<Limit>,
    /// From the pod.
    pub egress: Option<Limit>,
}

impl Bandwidth {
    /// Reads `ingressRate`, `ingressBurst`, `egressRate` and `egressBurst`, in bits (per second): of the
    /// configuration itself, or if it has none of them, of the capability `bandwidth`.
    pub fn parse(json: &Json, runtime: &Json) -> Result<Bandwidth, Error> {
        const KEYS: [&str; 4] = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
        let (json, path) = match KEYS.iter().any(|key| !json.get(key).is_null()) {
            true => (json, ""),
            false => {
                (runtime.get("bandwidth").object("runtimeConfig.bandwidth")?, "runtimeConfig.bandwidth.")
            }
        };
        let limit = |direction: &str| {
            let number = |what: &str| -> Result<(i64, String), Error> {
                let key = format!("{path}{direction}{what}");
                Ok((json.get(&format!("{direction}{what}")).i64(&key)?.unwrap_or(0), key))
            };
            read_limit(number("Rate")?, number("Burst")?)
        };
        Ok(Bandwidth { ingress: limit("ingress")?, egress: limit("egress")? })
    }
}

/// Both in bits (per second), each with its key. Pure.
fn read_limit(
    (rate, rate_key): (i64, String),
    (burst, burst_key): (i64, String),
) -> Result<Option<Limit>, Error> {
    let refuse = |why: String| Err(Error::because(Code::Config, "invalid bandwidth", why));
    match (rate, burst) {
        (0, 0) => Ok(None),
        (_, 0) => refuse(format!("{rate_key} is set, so {burst_key} must be")),
        (0, _) => refuse(format!("{burst_key} is set, so {rate_key} must be")),
        (..8, _) => refuse(format!("{rate_key} {rate} is less than 8 bits per second")),
        (_, ..8) => refuse(format!("{burst_key} {burst} is less than 8 bits")),
        (_, BURST_BOUND..) => refuse(format!("{burst_key} {burst} is 4 GiB or more")),
        _ => {
            let rate = rate.unsigned_abs() / 8;
            let asked = burst.unsigned_abs() / 8;
            let own = (rate / LATENCY_PER_SECOND).max(LEAST_OWN_BURST);
            let burst = if burst >= NO_BURST_NAMED { own } else { asked };
            Ok(Some(Limit { rate, burst: u32::try_from(burst).unwrap_or(u32::MAX) }))
        }
    }
}

impl Limit {
    /// The bucket for a link of that MTU in bytes. A burst smaller than a frame would let none pass.
    fn bucket(&self, mtu: u32) -> Bucket {
        let burst = self.burst.max(mtu.saturating_add(FRAME));
        let waiting = (self.rate / LATENCY_PER_SECOND).saturating_add(u64::from(burst));
        Bucket { rate: self.rate, burst, limit: u32::try_from(waiting).unwrap_or(u32::MAX) }
    }
}

/// The request that holds back what leaves by a link; none without a limit.
pub fn hold_back(limit: Option<Limit>, link: u32, name: &str, mtu: u32) -> Option<Message> {
    limit.map(|limit| tc::new_bucket(link, name, &limit.bucket(mtu)))
}

/// What is wrong about a link's limit, in words. A limit that nobody asked for may be another plugin's.
pub fn problem(
    socket: &mut Socket,
    limit: Option<Limit>,
    link: u32,
    name: &str,
) -> Result<Option<String>, netlink::Error> {
    let Some(limit) = limit else { return Ok(None) };
    let bits = |rate: u64| rate.saturating_mul(8);
    Ok(match tc::rate(socket, link, name)? {
        Some(rate) if rate == limit.rate => None,
        Some(rate) => Some(format!("is limited to {} bit/s and not to {}", bits(rate), bits(limit.rate))),
        None => Some(format!("is not limited to {} bit/s", bits(limit.rate))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(conf: &str) -> Result<Bandwidth, Error> {
        let json = Json::parse(conf.as_bytes()).unwrap();
        Bandwidth::parse(&json, json.get("runtimeConfig"))
    }

    #[test]
    fn limits_come_from_the_configuration_or_else_from_the_runtime_in_any_spelling() {
        let limit = |rate, burst| Some(Limit { rate, burst });
        for (conf, ingress, egress) in [
            (r#"{}"#, None, None),
            (r#"{"runtimeConfig":{"bandwidth":null}}"#, None, None),
            (r#"{"ingressRate":8000,"ingressBurst":16000}"#, limit(1000, 2000), None),
            (r#"{"egressRate":8e3,"egressBurst":16000.0}"#, None, limit(1000, 2000)),
            (
                r#"{"runtimeConfig":{"bandwidth":{"IngressRate":80,"IngressBurst":800,"EgressRate":160,"EgressBurst":1600}}}"#,
                limit(10, 100),
                limit(20, 200),
            ),
            (
                r#"{"egressRate":80,"egressBurst":80,"runtimeConfig":{"bandwidth":{"ingressRate":8,"ingressBurst":8}}}"#,
                None,
                limit(10, 10),
            ),
        ] {
            assert_eq!(parse(conf).unwrap(), Bandwidth { ingress, egress }, "{conf}");
        }
    }

    #[test]
    fn half_a_limit_and_an_impossible_one_are_refused_by_their_key() {
        for (conf, key) in [
            (r#"{"ingressRate":8000}"#, "ingressBurst"),
            (r#"{"runtimeConfig":{"bandwidth":{"EgressBurst":8000}}}"#, "runtimeConfig.bandwidth.egressRate"),
            (r#"{"egressRate":7,"egressBurst":8000}"#, "egressRate 7"),
            (r#"{"egressRate":-8000,"egressBurst":8000}"#, "egressRate -8000"),
            (r#"{"egressRate":8000,"egressBurst":1}"#, "egressBurst 1"),
            (r#"{"ingressRate":8,"ingressBurst":34359738360}"#, "4 GiB"),
        ] {
            let error = parse(conf).unwrap_err();
            assert_eq!(error.code, 7, "{conf}");
            assert!(error.to_string().contains(key), "{error}");
        }
        assert!(parse(r#"{"ingressRate":"10M","ingressBurst":8}"#).is_err());
    }

    #[test]
    fn a_burst_that_only_says_that_nobody_named_one_becomes_25_ms_of_the_rate() {
        for burst in ["2147483647", "4294967295", "34359738359"] {
            let limit = |rate: &str| {
                let conf = format!(r#"{{"ingressRate":{rate},"ingressBurst":{burst}}}"#);
                parse(&conf).unwrap().ingress.unwrap()
            };
            assert_eq!(limit("10000000").burst, 65_536);
            assert_eq!(limit("8000000000").burst, 25_000_000);
        }
        assert_eq!(
            parse(r#"{"ingressRate":8,"ingressBurst":2147483640}"#).unwrap().ingress.unwrap().burst,
            268_435_455
        );
    }

    proptest! {
        #[test]
        fn every_bucket_lets_a_frame_pass(rate in 8i64..1 << 50, burst in 8i64..BURST_BOUND, mtu in 68u32..65_536) {
            let limit = read_limit((rate, String::new()), (burst, String::new())).unwrap().unwrap();
            let bucket = limit.bucket(mtu);
            prop_assert!(bucket.rate > 0 && bucket.burst >= mtu + FRAME && bucket.limit >= bucket.burst);
        }
    }
}
