//! Which boot this is, and what time it is in it.

use std::fs;
use std::io;
use std::time::SystemTime;

use plat_crds::lease::Since;
use rustix::time::{ClockId, clock_gettime};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's number for this boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootId {
    /// As the kernel writes it, as `blocks.json` has it.
    pub text: String,
    /// As the lease store has it.
    pub bytes: [u8; 16],
}

impl BootId {
    /// Asks the kernel.
    pub fn read() -> io::Result<BootId> {
        let text = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let digits = text.replace('-', "");
        let bytes =
            u128::from_str_radix(&digits, 16).map_err(|e| io::Error::other(format!("{BOOT_ID}: {e}")))?;
        Ok(BootId { text, bytes: bytes.to_be_bytes() })
    }
}

/// Milliseconds of `CLOCK_BOOTTIME`: it counts suspend, and nobody can set it.
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let ms = now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000);
    u64::try_from(ms).unwrap_or(0)
}

/// Both clocks, for a lease that begins now.
pub fn since_now() -> Since {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Since { boot_ms: boot_ms(), unix_seconds: unix.as_secs() }
}
