//! How the disk under the queue does: whether it answers, and takes what is written.
//!
//! Every call that may block on the disk, or be refused by it, goes through
//! [`Disk::write`] or [`Disk::wait`]. A server whose disk does neither can serve what it has, and gets
//! no further; it says so, and others go before it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{QueueError, lock};

/// A disk that refuses for so long is out of order.
const PATIENCE: Duration = Duration::from_secs(1);
/// And is in order again when it has refused nothing for so long: one that is all
/// but full takes a little now and then.
const CALM: Duration = Duration::from_secs(2);

pub(super) struct Disk {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When each call that has not returned was made.
    calls: Vec<Instant>,
    refusing: Option<Refusing>,
}

struct Refusing {
    since: Instant,
    problem: String,
    /// First success after the last refusal.
    better: Option<Instant>,
}

impl Disk {
    pub fn new(dir: &Path) -> Disk {
        Disk {
            dir: dir.to_owned(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Does what takes room, and remembers whether there was some.
    pub fn write<T>(&self, work: impl FnOnce() -> Result<T, QueueError>) -> Result<T, QueueError> {
        let result = self.wait(work);
        self.state().note(result.as_ref().err(), Instant::now());
        result
    }

    /// Does what may have to wait for the disk, and remembers that it waits.
    pub fn wait<T>(&self, work: impl FnOnce() -> T) -> T {
        let called = Instant::now();
        self.state().calls.push(called);
        let result = work();
        let mut state = self.state();
        // Two calls of one instant are the same to whoever looks.
        if let Some(at) = state.calls.iter().position(|call| *call == called) {
            state.calls.swap_remove(at);
        }
        result
    }

    /// What is wrong with it, if something is; a call that takes longer than `limit`
    /// hangs.
    pub fn problem(&self, limit: Duration) -> Option<String> {
        let state = self.state();
        let longest = state.calls.iter().map(Instant::elapsed).max();
        if let Some(age) = longest.filter(|age| *age >= limit) {
            let (dir, seconds) = (self.dir.display(), age.as_secs());
            return Some(format!(
                "the disk under {dir} has not answered for {seconds} s"
            ));
        }
        state.refusal(Instant::now())
    }
}

impl State {
    fn note(&mut self, error: Option<&QueueError>, now: Instant) {
        match (error, &mut self.refusing) {
            (None, None) => {}
            (None, Some(refusing)) => {
                let better = *refusing.better.get_or_insert(now);
                if now - better >= CALM {
                    self.refusing = None;
                }
            }
            (Some(error), Some(refusing)) => {
                (refusing.problem, refusing.better) = (error.to_string(), None);
            }
            (Some(error), None) => {
                self.refusing = Some(Refusing {
                    since: now,
                    problem: error.to_string(),
                    better: None,
                });
            }
        }
    }

    fn refusal(&self, now: Instant) -> Option<String> {
        let refusing = self.refusing.as_ref()?;
        let until = refusing.better.unwrap_or(now);
        let counts = until - refusing.since >= PATIENCE && now - until < CALM;
        counts.then(|| refusing.problem.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn full() -> QueueError {
        QueueError::io("write", Path::new("x"))(io::ErrorKind::StorageFull.into())
    }

    #[test]
    fn a_disk_that_goes_on_refusing_is_out_of_order_until_it_is_calm() {
        let (mut state, start) = (State::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        state.note(Some(&full()), at(0));
        assert_eq!(state.refusal(at(900)), None, "not yet");
        assert!(state.refusal(at(1000)).is_some());
        assert!(state.refusal(at(60_000)).is_some(), "nobody has tried");
        // A little that fits in between does not mend it.
        state.note(None, at(1200));
        assert!(state.refusal(at(1300)).is_some());
        state.note(Some(&full()), at(1500));
        state.note(None, at(2000));
        assert!(state.refusal(at(3900)).is_some());
        assert_eq!(state.refusal(at(4000)), None);
        state.note(None, at(4000));
        assert!(state.refusing.is_none());
    }

    #[test]
    fn one_refusal_is_none() {
        let (mut state, start) = (State::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        state.note(Some(&full()), at(0));
        state.note(None, at(500));
        assert_eq!(state.refusal(at(1500)), None);
    }

    #[test]
    fn a_call_that_does_not_return_is_seen() {
        let disk = Disk::new(Path::new("/queue"));
        let limit = Duration::from_millis(1);
        let seen = disk.wait(|| {
            std::thread::sleep(limit);
            disk.problem(limit)
        });
        assert!(seen.unwrap().contains("/queue has not answered"));
        assert_eq!(disk.problem(limit), None, "it has returned");
    }
}
