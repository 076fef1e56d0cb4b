//! What the kernel knows of processes.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use terrace_tests::{Bridge, Server};

/// `USER_HZ`, the unit of times in `/proc`: 100 on Linux, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds of a process, its children that have ended, and those that live.
pub fn cpu_seconds(pid: i32) -> f64 {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return 0.0;
    };
    // The name before ')' may hold blanks; utime, stime, cutime and cstime are
    // the 12th to 15th field after it.
    let after_name = stat.rsplit(')').next().unwrap_or("");
    let ticks: u32 = after_name
        .split_ascii_whitespace()
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse::<u32>().ok())
        .sum();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let below: f64 = children
        .unwrap_or_default()
        .split_ascii_whitespace()
        .filter_map(|child| child.parse().ok())
        .map(cpu_seconds)
        .sum();
    f64::from(ticks) / TICKS_PER_SECOND + below
}

/// The same of a process alone, to the nanosecond.
pub fn own_cpu_seconds(pid: i32) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).context("CPU clock of a process")?;
    let time = clock_gettime(clock).context("CPU time of a process")?;
    Ok(Duration::from(time).as_secs_f64())
}

/// A size in `/proc/PID/status`, in MiB.
pub fn memory_mib(pid: i32, key: &str) -> Option<f64> {
    size_mib(&format!("/proc/{pid}/status"), key)
}

/// Memory of this machine, in GiB.
pub fn machine_gib() -> Option<f64> {
    size_mib("/proc/meminfo", "MemTotal:").map(|mib| (mib / 1024.0).round())
}

fn size_mib(file: &str, key: &str) -> Option<f64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: f64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Process id of a server's postmaster.
pub fn postmaster(server: &Server) -> Option<i32> {
    let file = server.socket_dir().join("data/postmaster.pid");
    fs::read_to_string(file).ok()?.lines().next()?.parse().ok()
}

/// Process id of a running bridge: the one that was given its configuration file.
pub fn bridge(bridge: &Bridge) -> Option<i32> {
    let config = bridge.config();
    let wanted = config.to_string_lossy();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        line.split(|byte| *byte == 0)
            .any(|argument| argument == wanted.as_bytes())
            .then_some(pid)
    })
}
