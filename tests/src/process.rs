//! Child processes that cannot outlive the test.
//!
//! Guarantee: whatever happens to this process, SIGKILL included, its children
//! end. Each child asks the kernel for a signal at the death of the thread that
//! started it, so all are started by one thread that lives as long as we do.

use std::collections::BTreeMap;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Host;

type Request = (Command, Sender<std::io::Result<Child>>);

static STARTER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
static RUNNING: Mutex<BTreeMap<i32, Signal>> = Mutex::new(BTreeMap::new());

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A running program and the signal that ends it.
pub struct Process {
    child: Child,
    end: Signal,
}

/// A command that dies with us, by the signal `end`, and runs as `user` if one is given.
pub fn command(program: &str, user: Option<&str>, end: Signal) -> Command {
    command_on(None, program, user, end)
}

/// The same in the network namespace of a host.
pub fn command_on(host: Option<&Host>, program: &str, user: Option<&str>, end: Signal) -> Command {
    let setpriv = "setpriv";
    let mut command = host.map_or_else(|| Command::new(setpriv), |host| host.command(setpriv));
    command
        .arg("--pdeathsig")
        .arg(end.as_str().trim_start_matches("SIG"));
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--init-groups"]);
    }
    command.arg("--").arg(program);
    command
}

impl Process {
    /// Starts a command made by [`command`], away from the terminal's signals.
    pub fn start(mut command: Command, end: Signal) -> Result<Process> {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
        let starter = STARTER.get_or_init(|| {
            let (sender, requests) = channel::<Request>();
            std::thread::spawn(move || {
                for (mut command, reply) in requests {
                    // Nobody waits any more only if the asking thread has died.
                    let _ = reply.send(command.spawn());
                }
            });
            Mutex::new(sender)
        });
        let (reply, started) = channel();
        lock(starter)
            .send((command, reply))
            .ok()
            .context("start a process")?;
        let child = started.recv()?.context("start a process")?;
        lock(&RUNNING).insert(child.id().cast_signed(), end);
        Ok(Process { child, end })
    }

    /// Process id.
    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.id()), signal);
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                lock(&RUNNING).remove(&self.id());
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("process {} still runs after {limit:?}", self.id())
    }

    /// Ends it the gentle way, and the other way if that takes longer than `limit`.
    pub fn stop(&mut self, limit: Duration) -> Result<ExitStatus> {
        if self.ended().is_none() {
            self.signal(Signal::SIGCONT);
            self.signal(self.end);
        }
        self.wait(limit).or_else(|_| self.kill())
    }

    /// Sends a signal to all its children.
    pub fn signal_children(&self, signal: Signal) {
        let id = self.id();
        let list = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        for child in list.unwrap_or_default().split_ascii_whitespace() {
            if let Ok(child) = child.parse() {
                let _ = kill(Pid::from_raw(child), signal);
            }
        }
    }

    /// SIGKILL for it and all its children at one moment, as in a power cut.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if self.ended().is_none() {
            // Stopped first, so that it can neither start children nor reap them.
            self.signal(Signal::SIGSTOP);
            self.signal_children(Signal::SIGKILL);
            self.signal(Signal::SIGKILL);
        }
        self.wait(Duration::from_secs(10))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.stop(Duration::from_secs(10));
    }
}

/// Ends every process started here; for an interrupted program.
pub fn end_all() {
    let running: Vec<(i32, Signal)> = lock(&RUNNING).iter().map(|(id, end)| (*id, *end)).collect();
    for (id, end) in &running {
        let _ = kill(Pid::from_raw(*id), Signal::SIGCONT);
        let _ = kill(Pid::from_raw(*id), *end);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while running.iter().any(|(id, _)| alive(*id)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs, and is not merely waiting to be reaped.
fn alive(id: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}
