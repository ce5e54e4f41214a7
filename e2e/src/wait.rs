//! Waiting: repeat a question until it is answered, or say what was waited for and what was seen last.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How often a question is asked.
const PAUSE: Duration = Duration::from_millis(50);

/// Asks `question` until it answers `Ok`, and returns that.
///
/// # Panics
/// At the deadline, with `what` and the last `Err`.
#[track_caller]
pub fn wait_until<T, E: Display>(
    what: &str,
    deadline: Duration,
    mut question: impl FnMut() -> Result<T, E>,
) -> T {
    let begin = Instant::now();
    loop {
        match question() {
            Ok(answer) => return answer,
            Err(last) if begin.elapsed() >= deadline => {
                panic!("waited {deadline:?} for: {what}; last seen: {last}")
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// [`wait_until`] for asynchronous questions.
///
/// # Panics
/// At the deadline, with `what` and the last `Err`.
pub async fn wait_until_async<T, E: Display>(
    what: &str,
    deadline: Duration,
    mut question: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let begin = Instant::now();
    loop {
        match question().await {
            Ok(answer) => return answer,
            Err(last) if begin.elapsed() >= deadline => {
                panic!("waited {deadline:?} for: {what}; last seen: {last}")
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// `Ok` if `holds`, else the observation: makes a question of a condition.
pub fn holds(condition: bool, seen: impl Display) -> Result<(), String> {
    if condition { Ok(()) } else { Err(seen.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_returned_as_soon_as_there_is_one() {
        let mut asked = 0;
        let answer = wait_until("three", Duration::from_secs(9), || {
            asked += 1;
            holds(asked == 3, asked).map(|()| asked)
        });
        assert_eq!(answer, 3);
    }

    #[test]
    #[should_panic(expected = "waited 0ns for: the end of the world; last seen: not yet")]
    fn the_deadline_names_what_was_waited_for_and_what_was_seen() {
        wait_until("the end of the world", Duration::ZERO, || Err::<(), _>("not yet"));
    }
}
