//! `terrace-bridge compare`, `repair` and `resync --table`: whether every server has the
//! top's rows, and what to do when one has not.
//!
//! Each server sums up its rows by ranges of the key when it has replayed exactly the
//! position at which the top did, so data may flow meanwhile, and a difference is one.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use tokio::time::sleep;

use crate::config::Config;
use crate::top::{Request, ask};

/// Servers that are up answer within this time after the last one that did.
const PATIENCE: Duration = Duration::from_secs(120);
/// So many are under way at once: a report tells of the last twenty.
const AHEAD: usize = 8;

/// What one server found.
#[derive(Debug, Deserialize)]
struct Finding {
    node: String,
    domain: String,
    state: String,
    ranges: Option<u64>,
    rows: Option<u64>,
    differ: Option<Vec<i64>>,
    conditions: Option<Vec<String>>,
}

impl Finding {
    fn is_due(&self) -> bool {
        self.differ.is_none() && self.state != "down"
    }

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

/// How many did not answer.
fn count_silent(findings: &[Finding]) -> usize {
    let silent = findings.iter().filter(|finding| finding.differ.is_none());
    silent.count()
}

/// A comparison that has begun.
struct Comparison {
    table: String,
    id: i64,
}

/// `terrace-bridge compare`: fails when a server differs or does not answer.
pub async fn compare(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<()> {
    let (mut differ, mut silent) = (0, 0);
    let mut comparisons = Comparisons::of(config, table).await?;
    while let Some(comparison) = comparisons.next(config).await? {
        let findings = comparison.end(config, domain).await?;
        differ += findings.iter().filter(|finding| finding.differs()).count();
        silent += count_silent(&findings);
    }
    ensure!(
        differ == 0,
        "{differ} differences; terrace-bridge repair sends those rows again"
    );
    ensure!(silent == 0, "{silent} answers are missing");
    Ok(())
}

/// `terrace-bridge repair`: sends what differs once more, and compares again.
pub async fn repair(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<()> {
    let mut silent = 0;
    let mut comparisons = Comparisons::of(config, table).await?;
    while let Some(comparison) = comparisons.next(config).await? {
        let mut findings = comparison.end(config, domain).await?;
        let wrong = || findings.iter().filter(|finding| finding.differs());
        let ranges: BTreeSet<i64> = wrong()
            .flat_map(|f| f.differ.clone().unwrap_or_default())
            .collect();
        if ranges.is_empty() {
            silent += count_silent(&findings);
            continue;
        }
        let domains: BTreeSet<String> = wrong().map(|finding| finding.domain.clone()).collect();
        let request = Request::Repair {
            id: comparison.id,
            ranges: ranges.into_iter().collect(),
            domains: domains.into_iter().collect(),
        };
        let rows = ask(config, &request).await?;
        let table = &comparison.table;
        println!("{table}: {rows} rows sent again");
        let again = Comparison::begin(config, table).await?;
        findings = again.end(config, domain).await?;
        silent += count_silent(&findings);
        let left = findings.iter().filter(|finding| finding.differs()).count();
        ensure!(left == 0, "table {table} still differs on {left} servers");
    }
    ensure!(
        silent == 0,
        "{silent} answers are missing; run terrace-bridge repair again when those servers are back"
    );
    Ok(())
}

/// `terrace-bridge resync --table`: the table's rows once more, for this domain.
pub async fn resync_table(config: &Config, table: &str) -> anyhow::Result<()> {
    let request = Request::Resend {
        table: table.to_owned(),
        domains: config
            .parent
            .iter()
            .map(|_| config.node.domain.clone())
            .collect(),
    };
    let rows = ask(config, &request).await?;
    println!("{rows} rows of {table} are sent again; they arrive in order with the other changes");
    Ok(())
}

/// Several, of which the next ones begin while the servers are at work on one.
struct Comparisons {
    waiting: VecDeque<String>,
    begun: VecDeque<Comparison>,
}

impl Comparisons {
    /// Of this table, or of every one.
    async fn of(config: &Config, table: Option<&str>) -> anyhow::Result<Comparisons> {
        let waiting: VecDeque<String> = match table {
            Some(table) => [table.to_owned()].into(),
            None => serde_json::from_value(ask(config, &Request::Tables).await?)?,
        };
        ensure!(!waiting.is_empty(), "no table is synchronised");
        let begun = VecDeque::new();
        Ok(Comparisons { waiting, begun })
    }

    async fn next(&mut self, config: &Config) -> anyhow::Result<Option<Comparison>> {
        while self.begun.len() < AHEAD
            && let Some(table) = self.waiting.pop_front()
        {
            self.begun
                .push_back(Comparison::begin(config, &table).await?);
        }
        Ok(self.begun.pop_front())
    }
}

impl Comparison {
    async fn begin(config: &Config, table: &str) -> anyhow::Result<Comparison> {
        let table = table.to_owned();
        let request = Request::Compare {
            table: table.clone(),
        };
        let id = ask(config, &request).await?.as_i64();
        let id = id.context("no number of a comparison")?;
        Ok(Comparison { table, id })
    }

    /// Waits for the answers, and prints them.
    async fn end(&self, config: &Config, domain: Option<&str>) -> anyhow::Result<Vec<Finding>> {
        let table = &self.table;
        let (mut last, mut due) = (Instant::now(), usize::MAX);
        let findings = loop {
            let found = ask(config, &Request::Results { id: self.id }).await?;
            let mut found: Vec<Finding> = serde_json::from_value(found)?;
            found.retain(|finding| domain.is_none_or(|domain| finding.domain == domain));
            if found.is_empty() {
                bail!(
                    "no server {}that table {table} flows to is known; see terrace.lag at the top",
                    domain.map_or(String::new(), |name| format!("of domain \"{name}\" "))
                );
            }
            let now_due = found.iter().filter(|finding| finding.is_due()).count();
            if now_due < due {
                (last, due) = (Instant::now(), now_due);
            }
            if due == 0 || last.elapsed() > PATIENCE {
                break found;
            }
            sleep(Duration::from_millis(200)).await;
        };
        println!("{table}:");
        for finding in &findings {
            println!("  {}/{}: {}", finding.domain, finding.node, finding.text());
        }
        Ok(findings)
    }
}
