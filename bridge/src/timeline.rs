//! Timelines of the top: where a promoted standby left the history that we hold.
//!
//! The history file of the newest timeline that we follow is kept beside the queue,
//! so that the servers below can ask for it as we asked (PostgreSQL's
//! `timeline.c`, `readTimeLineHistory`). Beside it stands, if it is so, that the top goes
//! on with a history that is not the one here.

use std::fs;
use std::path::Path;

use crate::lsn::Lsn;
use crate::queue::{QueueError, write_atomically};

const DIVERGED: &str = "diverged";

fn file_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

/// Where `timeline` ended, by the history file of a later one.
pub fn switch_point(history: &str, timeline: u32) -> Option<Lsn> {
    let found = switches(history).find(|(number, _)| *number == timeline);
    found.map(|(_, switch)| switch)
}

/// Whether two history files tell of the same timelines, left at the same places.
pub fn same(one: &str, other: &str) -> bool {
    switches(one).eq(switches(other))
}

fn switches(history: &str) -> impl Iterator<Item = (u32, Lsn)> {
    let lines = history.lines().map(str::trim_start);
    lines
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let number = fields.next()?.parse().ok()?;
            Some((number, fields.next()?.parse().ok()?))
        })
}

/// Keeps the history file of `timeline` in `dir`.
pub fn save(dir: &Path, timeline: u32, history: &str) -> Result<(), QueueError> {
    write_atomically(dir, &file_name(timeline), history.as_bytes())
}

/// Keeps that the history here is not the top's, and why.
pub fn save_divergence(dir: &Path, problem: &str) -> Result<(), QueueError> {
    write_atomically(dir, DIVERGED, problem.as_bytes())
}

/// Why the history here is not the top's, if that has been found.
pub fn divergence(dir: &Path) -> Option<String> {
    fs::read_to_string(dir.join(DIVERGED)).ok()
}

/// It has been found to be the top's, or is copied anew.
pub fn forget_divergence(dir: &Path) {
    fs::remove_file(dir.join(DIVERGED)).ok();
}

/// The history file of `timeline`, if it is kept in `dir`.
pub fn load(dir: &Path, timeline: u32) -> Option<String> {
    fs::read_to_string(dir.join(file_name(timeline))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_file_tells_where_each_timeline_ended() {
        let history = "# promoted twice\n1\t0/3000110\tno recovery target specified\n\n\
                       2\tA/80\tbefore 2026-01-01\n";
        assert_eq!(switch_point(history, 1), Some(Lsn(0x300_0110)));
        assert_eq!(switch_point(history, 2), Some(Lsn(0xA_0000_0080)));
        assert_eq!(switch_point(history, 3), None);
        assert_eq!(switch_point("1\n1\tx\n\u{0}", 1), None);
        assert!(same(history, "1\t0/3000110\tanother reason\n2\tA/80\n"));
        assert!(!same(
            history,
            "1\t0/3000118\tno recovery target specified\n2\tA/80\n"
        ));
        assert!(!same(
            history,
            "1\t0/3000110\tno recovery target specified\n"
        ));
    }
}
