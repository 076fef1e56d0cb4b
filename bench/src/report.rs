//! Figures, and how they are shown.

use std::ffi::OsStr;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use terrace_tests::server::program;

use crate::proc;
use crate::workload::Plan;

/// Which way is better.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// One thing measured on both sides.
pub struct Figure {
    pub workload: String,
    pub what: &'static str,
    pub unit: &'static str,
    pub better: Better,
    /// What Terrace is compared with.
    pub against: &'static str,
    /// One value for each round.
    pub terrace: Vec<f64>,
    pub baseline: Vec<f64>,
    /// The ratio is the median of each round's ratio, not the ratio of the medians.
    pub paired: bool,
}

impl Figure {
    /// How many times better Terrace is.
    pub fn ratio(&self) -> f64 {
        if !self.paired {
            return self.better_by(median(&self.terrace), median(&self.baseline));
        }
        let rounds = self.terrace.iter().zip(&self.baseline);
        let ratios: Vec<f64> = rounds.map(|(t, b)| self.better_by(*t, *b)).collect();
        median(&ratios)
    }

    fn better_by(&self, terrace: f64, baseline: f64) -> f64 {
        match self.better {
            Better::Higher => terrace / baseline,
            Better::Lower => baseline / terrace,
        }
    }
}

/// All figures of a run, and what went wrong.
pub struct Report {
    /// What was typed.
    command: String,
    started: Instant,
    /// Workloads, and where their servers were.
    rooms: Vec<(&'static str, PathBuf)>,
    pub figures: Vec<Figure>,
    failures: Vec<(String, String)>,
}

impl Report {
    /// Of a run of the workloads named in `wanted`, or of all if there is none.
    pub fn new(plan: &Plan, wanted: &[String]) -> Report {
        let mut command = "make bench".to_owned();
        if plan.quick {
            command += " QUICK=1";
        }
        if !wanted.is_empty() {
            let _ = write!(command, " ONLY=\"{}\"", wanted.join(" "));
        }
        Report {
            command,
            started: Instant::now(),
            rooms: Vec::new(),
            figures: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Since the run began.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Servers of a workload are in this directory.
    pub fn servers_in(&mut self, workload: &'static str, room: &Path) {
        self.rooms.push((workload, room.to_owned()));
    }

    pub fn add(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    pub fn failed(&mut self, workload: &str, error: &anyhow::Error) {
        self.failures.push((workload.into(), format!("{error:#}")));
    }

    pub fn has_failures(&self) -> bool {
        !self.failures.is_empty()
    }

    /// For the terminal.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<36} {:<18} {:<5} {:>9} {:>6} {:>9} {:>6} {:>8}  against\n",
            "workload", "measure", "unit", "terrace", "+-%", "other", "+-%", "ratio"
        );
        for figure in &self.figures {
            let _ = writeln!(
                text,
                "{:<36} {:<18} {:<5} {:>9} {:>6.0} {:>9} {:>6.0} {:>7.2}x  {}",
                figure.workload,
                figure.what,
                figure.unit,
                number(median(&figure.terrace)),
                spread(&figure.terrace),
                number(median(&figure.baseline)),
                spread(&figure.baseline),
                figure.ratio(),
                figure.against
            );
        }
        for (workload, _) in &self.failures {
            let _ = writeln!(text, "{workload}: FAILED, see above");
        }
        text += "medians; +-%: half of highest less lowest, against the median; \
                 ratio above 1: Terrace is better";
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let figures: Vec<Value> = self.figures.iter().map(figure_json).collect();
        let failures: Vec<Value> = self
            .failures
            .iter()
            .map(|(workload, error)| json!({ "workload": workload, "error": error }))
            .collect();
        json!({
            "command": self.command,
            "date": said_by("date", &["-u", "+%F"]),
            "postgres": said_by(program("postgres"), &["--version"]),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "memory_gib": proc::machine_gib(),
            "servers_in": self.rooms.iter().map(|(workload, room)| (workload.to_string(), json!(room))).collect::<Map<_, _>>(),
            "elapsed_seconds": self.elapsed().as_secs(),
            "figures": figures,
            "failures": failures,
        })
    }
}

fn figure_json(figure: &Figure) -> Value {
    let better = match figure.better {
        Better::Higher => "higher",
        Better::Lower => "lower",
    };
    json!({
        "workload": figure.workload,
        "measure": figure.what,
        "unit": figure.unit,
        "better": better,
        "against": figure.against,
        "ratio": figure.ratio(),
        "ratio_of": if figure.paired { "rounds" } else { "medians" },
        "terrace": series(&figure.terrace),
        "other": series(&figure.baseline),
    })
}

fn series(values: &[f64]) -> Value {
    json!({ "median": median(values), "spread_percent": spread(values), "rounds": values })
}

/// What a program prints.
fn said_by(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().into())
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Half the range of the values, in percent of their median.
fn spread(values: &[f64]) -> f64 {
    let highest = values.iter().copied().fold(f64::MIN, f64::max);
    let lowest = values.iter().copied().fold(f64::MAX, f64::min);
    (highest - lowest) / 2.0 / median(values) * 100.0
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(better: Better, paired: bool) -> Figure {
        Figure {
            workload: "w".into(),
            what: "rate",
            unit: "tx/s",
            better,
            against: "native",
            terrace: vec![10.0, 20.0, 60.0],
            baseline: vec![5.0, 40.0, 10.0],
            paired,
        }
    }

    #[test]
    fn a_ratio_above_one_says_that_terrace_is_better() {
        assert!((figure(Better::Higher, false).ratio() - 2.0).abs() < 1e-9);
        assert!((figure(Better::Lower, false).ratio() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn paired_rounds_are_compared_one_by_one() {
        assert!((figure(Better::Higher, true).ratio() - 2.0).abs() < 1e-9);
        assert!((spread(&[10.0, 20.0, 60.0]) - 125.0).abs() < 1e-9);
    }
}
