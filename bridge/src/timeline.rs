//! Timelines of the top: where a promoted standby left the history that we hold.
//!
//! The history file of the newest timeline that we follow is kept beside the queue,
//! so that the servers below can ask for it as we asked (PostgreSQL's
//! `timeline.c`, `readTimeLineHistory`).

use std::fs;
use std::path::Path;

use crate::lsn::Lsn;
use crate::queue::{QueueError, write_atomically};

fn file_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

/// Where `timeline` ended, by the history file of a later one.
pub fn switch_point(history: &str, timeline: u32) -> Option<Lsn> {
    let lines = history.lines().map(|line| line.trim_start());
    lines
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let number: u32 = fields.next()?.parse().ok()?;
            let switch = fields.next()?.parse().ok()?;
            (number == timeline).then_some(switch)
        })
}

/// Keeps the history file of `timeline` in `dir`.
pub fn save(dir: &Path, timeline: u32, history: &str) -> Result<(), QueueError> {
    write_atomically(dir, &file_name(timeline), history.as_bytes())
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
    }
}
