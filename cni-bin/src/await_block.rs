//! An ADD that finds the node's blocks full waits a while for another block, where one may come (`mayGrow` in
//! the blocks file): a failed ADD costs the pod a new sandbox and a back-off of seconds, a block comes in
//! less than one. Waiting is bounded, holds no lock, and is what only a full pool costs.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use plat_crds::blocks_file::HeldBlock;
use plat_crds::names::BLOCKS_FILE;

use crate::error::Error;
use crate::pool;

/// How long an ADD waits in all. Runtimes give an ADD minutes; an operator that is just being replaced takes 15 s
/// to go on, and then the next try of the runtime finds the block.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look at the blocks file.
const POLL: Duration = Duration::from_millis(25);
/// How often to try again without news of it: a DEL may have freed an address.
const RETRY: Duration = Duration::from_millis(500);

/// What is left of an ADD's patience. It begins when it is first needed.
#[derive(Debug, Default)]
pub struct Patience(Option<Instant>);

impl Patience {
    /// Waits until it is worth another try: other blocks than `seen`, or some time has passed. Returns
    /// `full`, why there was no address, when there is no patience left.
    pub fn wait(&mut self, run_dir: &Path, seen: &[HeldBlock], full: Error) -> Result<(), Error> {
        let now = Instant::now();
        let deadline = *self.0.get_or_insert(now + PATIENCE);
        if now >= deadline {
            let waited = format!(
                "{}; no other block came in {} s: see kubectl describe node, clustercidrs and podcidrs",
                full.details,
                PATIENCE.as_secs()
            );
            return Err(Error { details: waited, ..full });
        }
        let again = deadline.min(now + RETRY);
        let mut looked_at = None;
        while Instant::now() < again {
            let stamp = written(run_dir);
            if stamp != looked_at {
                looked_at = stamp;
                // One that cannot be read now is the next try's to report.
                if pool::read_blocks(run_dir).is_ok_and(|file| file.blocks != seen) {
                    return Ok(());
                }
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

fn written(run_dir: &Path) -> Option<SystemTime> {
    fs::metadata(run_dir.join(BLOCKS_FILE)).and_then(|file| file.modified()).ok()
}
