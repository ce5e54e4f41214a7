//! The process that holds a pod's namespaces: waits for SIGTERM or SIGINT, and reaps what a shared PID
//! namespace leaves behind.

use rustix::process::{WaitOptions, wait};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

fn main() -> std::io::Result<()> {
    for signal in &mut Signals::new([SIGCHLD, SIGINT, SIGTERM])? {
        if signal != SIGCHLD {
            break;
        }
        while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {}
    }
    Ok(())
}
