//! `terrace-bridge compare`, `repair` and `resync --table`: whether every server has the
//! top's rows, and what to do when one has not.
//!
//! Each server sums up its rows by ranges of the key when it has replayed exactly the
//! position at which the top did, so data may flow meanwhile, and a difference is one. A large
//! table is looked at slice by slice, each at a position of its own: a snapshot that is held for
//! long makes the rows slow that change most.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};

use crate::config::Config;
use crate::show::say;
use crate::top::{Request, ask};

/// Servers that are up are through with a slice so long after the top, and so many times what the
/// top needed: a busy server takes up to three minutes for what an idle one does at once
/// (`pg_ext/src/sums/pace.rs`).
const PATIENCE: Duration = Duration::from_secs(300);
const SLOWER: u32 = 4;
/// So many are under way at once: a report tells of the last twenty.
const AHEAD: usize = 8;

/// A slice begins when the last but so many is done on every server that is waited for.
const SLICES_AHEAD: u32 = 1;
/// After a slice the top has a rest of so many times as long as it took, with no snapshot held.
const REST: f64 = 0.5;

/// What one server found.
#[derive(Debug, Deserialize)]
pub(crate) struct Finding {
    pub(crate) node: String,
    domain: String,
    state: String,
    ranges: Option<u64>,
    rows: Option<u64>,
    pub(crate) done: u32,
    differ: Option<Vec<i64>>,
    conditions: Option<Vec<String>>,
}

impl Finding {
    fn differs(&self) -> bool {
        self.differ
            .as_ref()
            .is_some_and(|differ| !differ.is_empty())
    }

    fn text(&self) -> String {
        let (Some(differ), Some(ranges), Some(rows)) = (&self.differ, self.ranges, self.rows)
        else {
            return format!("no answer ({})", self.state);
        };
        if differ.is_empty() {
            return format!("equal, {rows} rows");
        }
        let conditions = self.conditions.clone().unwrap_or_default();
        format!(
            "DIFFERS in {} of {ranges} ranges: {}",
            differ.len(),
            conditions.join("; ")
        )
    }
}

/// A comparison that has begun.
struct Comparison {
    table: String,
    id: i64,
    slices: u32,
    /// Slices that the top is through with.
    begun: u32,
    /// When the top has rested from the last of them.
    rested: Instant,
    /// The longest that the top needed for one.
    longest: Duration,
}

/// What [`Request::Compare`] gives.
#[derive(Deserialize)]
struct Prepared {
    id: i64,
    slices: u32,
}

/// What the servers have done so far, and since when that has not been more. One that keeps us
/// waiting once is waited for no more: it may have missed a slice, and will never have done all.
#[derive(Default)]
struct Progress {
    known: BTreeMap<String, (u32, Instant)>,
    given_up: BTreeSet<String>,
}

impl Progress {
    /// Takes in what is known; gives those that are waited for.
    fn waited<'a>(
        &mut self,
        findings: &'a [Finding],
        begun: u32,
        patience: Duration,
        now: Instant,
    ) -> Vec<&'a Finding> {
        let is_waited = |finding: &&Finding| {
            let known = self.known.entry(finding.node.clone());
            let (done, since) = known.or_insert((0, now));
            let is_down = finding.state == "down";
            if finding.done != *done || finding.done == begun || is_down {
                (*done, *since) = (finding.done, now);
            }
            if now.duration_since(*since) > patience {
                self.given_up.insert(finding.node.clone());
            }
            finding.differ.is_none() && !is_down && !self.given_up.contains(&finding.node)
        };
        findings.iter().filter(is_waited).collect()
    }
}

/// `terrace-bridge compare`: fails when a server differs or does not answer.
pub async fn compare(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<()> {
    let tally = each(config, table, domain, false).await?;
    ensure!(
        tally.differ == 0,
        "{} differences; terrace-bridge repair sends those rows again",
        tally.differ
    );
    ensure!(tally.silent == 0, "{} answers are missing", tally.silent);
    ensure!(
        tally.failed == 0,
        "could not compare {} of the tables",
        tally.failed
    );
    Ok(())
}

/// `terrace-bridge repair`: sends what differs once more, and compares again.
pub async fn repair(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<()> {
    let tally = each(config, table, domain, true).await?;
    ensure!(
        tally.silent == 0,
        "{} answers are missing; run terrace-bridge repair again when those servers are back",
        tally.silent
    );
    ensure!(
        tally.failed == 0,
        "could not repair {} of the tables",
        tally.failed
    );
    Ok(())
}

/// What was found of all tables.
#[derive(Default)]
struct Tally {
    /// Servers, once for each table that flows to them …
    servers: usize,
    /// … those of them that differ …
    differ: usize,
    /// … and those that did not answer.
    silent: usize,
    /// Tables that something is wrong with.
    failed: usize,
}

impl Tally {
    fn take_in(&mut self, findings: &[Finding]) {
        self.servers += findings.len();
        self.differ += findings.iter().filter(|found| found.differs()).count();
        let silent = findings.iter().filter(|found| found.differ.is_none());
        self.silent += silent.count();
    }
}

/// Compares each table, and repairs it where it `mends`. What is wrong with one that nobody named is
/// said, and the others go on.
async fn each(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
    mends: bool,
) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let mut comparisons = Comparisons::of(config, table, domain).await?;
    while let Some((name, begun)) = comparisons.next(config).await {
        let looked = async {
            let mut comparison = begun?;
            match mends {
                true => comparison.mend(config, domain).await,
                false => comparison.end(config, domain).await,
            }
        };
        match looked.await {
            Ok(findings) if findings.is_empty() && table.is_none() => {
                let is_listed = listed(config, domain).await?.contains(&name);
                let why = match is_listed {
                    true => "no server that it flows to is known",
                    false => "it is synchronised no more",
                };
                say(format!("{name}: {why}"));
                tally.failed += usize::from(!is_listed);
            }
            Ok(findings) => tally.take_in(&findings),
            Err(error) if table.is_some() => return Err(error),
            Err(error) => {
                say(format!("{name}: {error:#}"));
                tally.failed += 1;
                // When the top cannot be asked any more, so it is for the rest of them.
                listed(config, domain).await?;
            }
        }
    }
    ensure!(
        tally.servers + tally.failed > 0,
        "no server {}that {} flows to is known; see terrace.lag at the top",
        domain.map_or(String::new(), |name| format!("of domain \"{name}\" ")),
        table.map_or("a table".into(), |name| format!("table {name}"))
    );
    Ok(tally)
}

/// `terrace-bridge resync --table`: the table's rows once more, for this domain or all.
pub async fn resync_table(config: &Config, table: &str, everywhere: bool) -> anyhow::Result<()> {
    let domain = config.parent.iter().filter(|_| !everywhere);
    let request = Request::Resend {
        table: table.to_owned(),
        domains: domain.map(|_| config.node.domain.clone()).collect(),
    };
    let sent = ask(config, &request).await?;
    let sent = sent.as_str().context("no answer from the top")?;
    say(format!(
        "{sent}; they arrive in order with the other changes"
    ));
    Ok(())
}

/// Names of the tables that are synchronised, for this domain.
async fn listed(config: &Config, domain: Option<&str>) -> anyhow::Result<VecDeque<String>> {
    let domain = domain.map(str::to_owned);
    let names = ask(config, &Request::Tables { domain }).await?;
    Ok(serde_json::from_value(names)?)
}

/// Several, of which the next ones begin while the servers are at work on one.
struct Comparisons {
    waiting: VecDeque<String>,
    begun: VecDeque<Begun>,
}

/// The table, and what came of beginning with it.
type Begun = (String, anyhow::Result<Comparison>);

impl Comparisons {
    /// Of this table, or of every one that is for the domain.
    async fn of(
        config: &Config,
        table: Option<&str>,
        domain: Option<&str>,
    ) -> anyhow::Result<Comparisons> {
        let waiting = match table {
            Some(table) => [table.to_owned()].into(),
            None => listed(config, domain).await?,
        };
        ensure!(!waiting.is_empty(), "no table is synchronised");
        let begun = VecDeque::new();
        Ok(Comparisons { waiting, begun })
    }

    async fn next(&mut self, config: &Config) -> Option<Begun> {
        while self.begun.len() < AHEAD
            && let Some(table) = self.waiting.pop_front()
        {
            let begun = Comparison::begin(config, &table).await;
            self.begun.push_back((table, begun));
        }
        self.begun.pop_front()
    }
}

impl Comparison {
    async fn begin(config: &Config, table: &str) -> anyhow::Result<Comparison> {
        let table = table.to_owned();
        let request = Request::Compare {
            table: table.clone(),
        };
        let prepared: Prepared = serde_json::from_value(ask(config, &request).await?)?;
        let mut comparison = Comparison {
            table,
            id: prepared.id,
            slices: prepared.slices,
            begun: 0,
            rested: Instant::now(),
            longest: Duration::ZERO,
        };
        comparison.begin_slice(config).await?;
        Ok(comparison)
    }

    async fn begin_slice(&mut self, config: &Config) -> anyhow::Result<()> {
        let request = Request::Slice {
            id: self.id,
            number: self.begun,
        };
        let started = Instant::now();
        let asked = ask(config, &request).await;
        asked.with_context(|| format!("compare table {}", self.table))?;
        let needed = started.elapsed();
        self.rested = Instant::now() + needed.mul_f64(REST);
        self.longest = self.longest.max(needed);
        self.begun += 1;
        Ok(())
    }

    fn patience(&self) -> Duration {
        PATIENCE + self.longest * SLOWER
    }

    /// Begins with one slice after the other, waits for the answers, and prints them.
    async fn end(&mut self, config: &Config, domain: Option<&str>) -> anyhow::Result<Vec<Finding>> {
        let mut progress = Progress::default();
        let (mut nodes, mut enough) = (Vec::new(), 0);
        let findings = loop {
            let found = self.findings(config, domain, nodes, enough).await?;
            if found.is_empty() {
                return Ok(found);
            }
            let waited = progress.waited(&found, self.begun, self.patience(), Instant::now());
            let done = waited.iter().map(|finding| finding.done).min();
            if self.begun < self.slices && done.is_none_or(|done| done >= enough) {
                sleep_until(self.rested).await;
                self.begin_slice(config).await?;
                if self.begun == self.slices {
                    // Whoever was late has another chance.
                    progress = Progress::default();
                }
            } else if done.is_none() {
                break found;
            }
            nodes = waited.iter().map(|finding| finding.node.clone()).collect();
            enough = match self.begun == self.slices {
                true => self.slices,
                false => self.begun - SLICES_AHEAD,
            };
        };
        say(format!("{}:", self.table));
        for finding in &findings {
            let text = finding.text();
            say(format!("  {}/{}: {text}", finding.domain, finding.node));
        }
        Ok(findings)
    }

    /// Sends what differs once more; gives what is found then.
    async fn mend(
        &mut self,
        config: &Config,
        domain: Option<&str>,
    ) -> anyhow::Result<Vec<Finding>> {
        let findings = self.end(config, domain).await?;
        let wrong = || findings.iter().filter(|finding| finding.differs());
        let ranges: BTreeSet<i64> = wrong()
            .flat_map(|f| f.differ.clone().unwrap_or_default())
            .collect();
        if ranges.is_empty() {
            return Ok(findings);
        }
        let domains: BTreeSet<String> = wrong().map(|finding| finding.domain.clone()).collect();
        let request = Request::Repair {
            id: self.id,
            ranges: ranges.into_iter().collect(),
            domains: domains.into_iter().collect(),
        };
        let rows = ask(config, &request).await?;
        let table = &self.table;
        say(format!("{table}: {rows} rows sent again"));
        let mut again = Comparison::begin(config, table).await?;
        let findings = again.end(config, domain).await?;
        let left = findings.iter().filter(|finding| finding.differs()).count();
        ensure!(left == 0, "table {table} still differs on {left} servers");
        Ok(findings)
    }

    async fn findings(
        &self,
        config: &Config,
        domain: Option<&str>,
        nodes: Vec<String>,
        slices: u32,
    ) -> anyhow::Result<Vec<Finding>> {
        let request = Request::Results {
            id: self.id,
            nodes,
            slices,
        };
        let mut found: Vec<Finding> = serde_json::from_value(ask(config, &request).await?)?;
        found.retain(|finding| domain.is_none_or(|domain| finding.domain == domain));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_kept_us_waiting_once_is_waited_for_no_more() {
        let at = |a: u32, b: u32, c: &str| {
            let found = format!(
                r#"[{{"node": "a", "domain": "d", "state": "streaming", "done": {a}}},
                    {{"node": "b", "domain": "d", "state": "streaming", "done": {b}}},
                    {{"node": "c", "domain": "d", "state": "{c}", "done": 0}}]"#
            );
            serde_json::from_str::<Vec<Finding>>(&found).expect("findings")
        };
        let start = Instant::now();
        let mut progress = Progress::default();
        let mut waited = |seconds: u64, found: &[Finding], begun: u32| {
            let now = start + Duration::from_secs(seconds);
            let waited = progress.waited(found, begun, Duration::from_secs(120), now);
            let names = waited.iter().map(|finding| finding.node.as_str());
            names.collect::<Vec<_>>().concat()
        };
        assert_eq!(waited(0, &at(0, 0, "down"), 1), "ab");
        assert_eq!(waited(100, &at(1, 0, "down"), 1), "ab");
        assert_eq!(waited(130, &at(1, 0, "down"), 1), "a", "b is late");
        assert_eq!(
            waited(300, &at(1, 0, "down"), 1),
            "a",
            "a has nothing to do"
        );
        assert_eq!(waited(301, &at(1, 1, "down"), 2), "a", "b has missed one");
        assert_eq!(waited(302, &at(1, 1, "catchup"), 2), "ac", "c is back");
    }
}
