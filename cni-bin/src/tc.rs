//! Traffic control, as far as Plat needs it: one token bucket (tc-tbf(8)) as the root queueing discipline of a
//! link, written and read by rtnetlink. Numbers are those of `linux/rtnetlink.h` and `linux/pkt_sched.h`.

use rustix::io::Errno;

use crate::netlink::{Attributes, CREATE, ECHO, EXCL, Error, Message, Received, Socket};

const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const TC_HEADER: usize = 20;
const TC_H_ROOT: u32 = u32::MAX;
/// `1:`, the handle that tc itself gives to a root.
const HANDLE: u32 = 0x1_0000;
/// `TC_LINKLAYER_ETHERNET`: the kernel computes times itself and wants no table of them.
const LINKLAYER_ETHERNET: u8 = 1;

/// A token bucket: how much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may pass at once. A frame that is larger than this is dropped.
    pub burst: u32,
    /// Bytes that wait for their turn; more are dropped.
    pub limit: u32,
}

/// `tcmsg`.
fn header(link: u32, handle: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    for word in [link, handle, TC_H_ROOT, 0] {
        header.extend_from_slice(&word.to_ne_bytes());
    }
    header
}

/// Lets no more leave by a link than the bucket says. An error `EEXIST` if the link has a discipline of its own
/// already; `ENOENT` if the kernel has no token buckets (`sch_tbf`).
pub fn new_bucket(link: u32, name: &str, bucket: &Bucket) -> Message {
    let what = format!("limit link {name} to {} bit/s", bucket.rate.saturating_mul(8));
    let mut m = Message::new(RTM_NEWQDISC, CREATE | EXCL, &header(link, HANDLE), what);
    m.attr_str(TCA_KIND, "tbf").nest(TCA_OPTIONS, |m| {
        m.attr(TBF_PARMS, &parameters(bucket));
        m.attr(TBF_RATE64, &bucket.rate.to_ne_bytes());
        // In bytes; in the parameters it would be a time, which overflows where rates are low.
        m.attr_u32(TBF_BURST, bucket.burst);
    });
    m
}

/// `tc_tbf_qopt`: rate, peak rate (none), limit, and burst and MTU as times (given otherwise).
fn parameters(bucket: &Bucket) -> Vec<u8> {
    let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
    // tc_ratespec: cell_log, linklayer, overhead (2), cell_align (2), mpu (2), rate (4).
    let mut bytes = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    bytes.extend_from_slice(&rate.to_ne_bytes());
    bytes.extend_from_slice(&[0; 12]);
    bytes.extend_from_slice(&bucket.limit.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// The rate of the token bucket at a link's root in bytes per second; `None` if there is none.
pub fn rate(socket: &mut Socket, link: u32, name: &str) -> Result<Option<u64>, Error> {
    // The answer is a notification like any other: who asks gets one only if he wants an echo.
    let what = format!("look at the limit of link {name}");
    let get = Message::new(RTM_GETQDISC, ECHO, &header(link, 0), what);
    let mut rate = None;
    match socket.ask(get, |received| rate = rate.or_else(|| read_rate(&received))) {
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(rate),
    }
}

/// Reads an `RTM_NEWQDISC`. Pure.
pub fn read_rate(received: &Received<'_>) -> Option<u64> {
    if received.kind != RTM_NEWQDISC {
        return None;
    }
    let attributes = Attributes::behind(received.payload, TC_HEADER);
    let is_bucket = attributes.find(TCA_KIND).is_some_and(|kind| kind.text() == "tbf");
    let options = attributes.find(TCA_OPTIONS).filter(|_| is_bucket)?.nested();
    // The long form comes only where the rate does not fit into the short one.
    let long = options.find(TBF_RATE64).and_then(|r| Some(u64::from_ne_bytes(r.value.try_into().ok()?)));
    let short = || Some(u32::from_ne_bytes(options.find(TBF_PARMS)?.value.get(8..12)?.try_into().ok()?));
    long.or_else(|| short().map(u64::from))
}
