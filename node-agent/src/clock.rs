//! What this process reads from clocks besides `plat_cni::boot`.

use rustix::time::{ClockId, clock_gettime};

/// Seconds of CPU time that this process has used.
pub fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}
