//! Faults on demand, for tests. In release builds there is nothing of this.
//!
//! `PLAT_FAIL=<point>:<how>` makes the program fail at that point of an ADD, DEL or CHECK: `error` returns
//! an error, `kill` ends the process as SIGKILL would (no cleanup runs), `panic` panics, `wait` waits for
//! the file `PLAT_FAIL_WAIT` to disappear.

use crate::error::Error;

/// A place where a test can make the program fail.
#[cfg(debug_assertions)]
pub fn point(name: &str) -> Result<(), Error> {
    let Ok(wish) = std::env::var("PLAT_FAIL") else { return Ok(()) };
    match wish.split_once(':') {
        Some((point, how)) if point == name => fail(name, how),
        _ => Ok(()),
    }
}

#[cfg(debug_assertions)]
#[expect(clippy::panic, reason = "a test asked for it")]
fn fail(name: &str, how: &str) -> Result<(), Error> {
    use crate::error::Code;
    match how {
        "error" => Err(Error::new(Code::Internal, format!("failed at {name} on demand"))),
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
