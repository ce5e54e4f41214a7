//! What a process has used, from /proc.

use std::fs;

use anyhow::{Context, Result};

/// What /proc counts processor time in: `USER_HZ`, which is 100 on all that Rust's standard library runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Resident memory, in MiB.
    pub resident: f64,
    /// The most that it was, in MiB.
    pub peak: f64,
    /// Processor time since its start, in seconds.
    pub cpu: f64,
}

impl Usage {
    /// What the process of that ID has used up to now.
    pub fn of(process: u32) -> Result<Usage> {
        let folder = format!("/proc/{process}");
        let status =
            fs::read_to_string(format!("{folder}/status")).context("the process has ended: see its log")?;
        let mib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let kib = line
                .and_then(|rest| rest.trim_matches([':', ' ', '\t']).split(' ').next()?.parse::<f64>().ok());
            kib.map(|kib| kib / 1024.0).with_context(|| format!("no {key} in {folder}/status"))
        };
        let stat = fs::read_to_string(format!("{folder}/stat"))?;
        // utime and stime; the program's name, which may hold spaces, ends with the last bracket.
        let rest = stat.rsplit_once(") ").context("stat has no name")?.1;
        let ticks: f64 = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        Ok(Usage { resident: mib("VmRSS")?, peak: mib("VmHWM")?, cpu: ticks / TICKS_PER_SECOND })
    }
}
