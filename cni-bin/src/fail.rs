//! Faults on demand, for tests. In release builds there is nothing of this.
//!
//! A *step* is a named [`point`] of a verb, or any message to the kernel, or any write to the lease store:
//! what is new is covered without being listed anywhere. `PLAT_FAIL=<step>:<how>` makes the program fail at
//! the step of that name, `PLAT_FAIL=#<number>:<how>` at the step of that number, counted from 1:
//! `error` returns an error, `kill` ends the process as SIGKILL would (no cleanup runs), `panic` panics,
//! `wait` waits for the file `PLAT_FAIL_WAIT` to disappear. `PLAT_FAIL_TRACE=<file>` appends the name of
//! each step to that file.

use std::io;

use crate::error::Error;

/// A place where a test can make the program fail.
#[cfg(debug_assertions)]
pub fn point(name: &str) -> Result<(), Error> {
    use crate::error::Code;
    step(name).map_err(|_| Error::new(Code::Internal, format!("failed at {name} on demand")))
}

/// The same for what reports errors of the system (`EIO`).
#[cfg(debug_assertions)]
pub(crate) fn step(name: &str) -> io::Result<()> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static PASSED: AtomicUsize = AtomicUsize::new(0);
    let number = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
    trace(name);
    let Ok(wish) = std::env::var("PLAT_FAIL") else { return Ok(()) };
    match wish.split_once(':') {
        Some((step, how)) if step == name || step == format!("#{number}") => fail(name, how),
        _ => Ok(()),
    }
}

#[cfg(debug_assertions)]
fn trace(name: &str) {
    use std::io::Write;
    let Some(path) = std::env::var_os("PLAT_FAIL_TRACE") else { return };
    if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        // What is lost is missed by the test that asked for it.
        let _ = writeln!(file, "{name}");
    }
}

#[cfg(debug_assertions)]
#[expect(clippy::panic, reason = "a test asked for it")]
fn fail(name: &str, how: &str) -> io::Result<()> {
    match how {
        "error" => Err(rustix::io::Errno::IO.into()),
        "panic" => panic!("panicked at {name} on demand"),
        "kill" => {
            let pid = rustix::process::getpid();
            // The signal cannot be caught; should it not come, the next line ends the process as hard.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            std::process::abort()
        }
        "wait" => {
            let flag = std::env::var("PLAT_FAIL_WAIT").unwrap_or_default();
            while std::path::Path::new(&flag).exists() {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A place where a test could make the program fail.
#[cfg(not(debug_assertions))]
#[inline]
pub fn point(_name: &str) -> Result<(), Error> {
    Ok(())
}

/// The same for what reports errors of the system.
#[cfg(not(debug_assertions))]
#[inline]
pub(crate) fn step(_name: &str) -> io::Result<()> {
    Ok(())
}
