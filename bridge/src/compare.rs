//! `terrace-bridge compare`, `repair` and `resync --table`: whether every server has the
//! top's rows, and what to do when one has not.
//!
//! Each server sums up its rows by ranges of the key when it has replayed exactly the
//! position at which the top did, so data may flow meanwhile, and a difference is one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use tokio::time::sleep;

use crate::config::Config;
use crate::top::{Request, ask};

/// Servers that are up answer within this time after the last one that did.
const PATIENCE: Duration = Duration::from_secs(120);

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

/// A comparison that is through.
struct Compared {
    table: String,
    id: i64,
    findings: Vec<Finding>,
}

/// `terrace-bridge compare`: fails when a server differs or does not answer.
pub async fn compare(
    config: &Config,
    table: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<()> {
    let (mut differ, mut silent) = (0, 0);
    for table in tables(config, table).await? {
        let compared = compare_table(config, &table, domain).await?;
        for finding in &compared.findings {
            differ += usize::from(finding.differs());
            silent += usize::from(finding.differ.is_none());
        }
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
    for table in tables(config, table).await? {
        let compared = compare_table(config, &table, domain).await?;
        let wrong = || compared.findings.iter().filter(|finding| finding.differs());
        let ranges: BTreeSet<i64> = wrong()
            .flat_map(|f| f.differ.clone().unwrap_or_default())
            .collect();
        if ranges.is_empty() {
            continue;
        }
        let domains: BTreeSet<String> = wrong().map(|finding| finding.domain.clone()).collect();
        let request = Request::Repair {
            id: compared.id,
            ranges: ranges.into_iter().collect(),
            domains: domains.into_iter().collect(),
        };
        let rows = ask(config, &request).await?;
        println!("{}: {rows} rows sent again", compared.table);
        let again = compare_table(config, &table, domain).await?;
        let left = again
            .findings
            .iter()
            .filter(|finding| finding.differs())
            .count();
        ensure!(
            left == 0,
            "table {} still differs on {left} servers",
            again.table
        );
    }
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

async fn tables(config: &Config, table: Option<&str>) -> anyhow::Result<Vec<String>> {
    if let Some(table) = table {
        return Ok(vec![table.to_owned()]);
    }
    let tables: Vec<String> = serde_json::from_value(ask(config, &Request::Tables).await?)?;
    ensure!(!tables.is_empty(), "no table is synchronised");
    Ok(tables)
}

async fn compare_table(
    config: &Config,
    table: &str,
    domain: Option<&str>,
) -> anyhow::Result<Compared> {
    let request = Request::Compare {
        table: table.to_owned(),
    };
    let id = ask(config, &request).await?;
    let id = id.as_i64().context("no number of a comparison")?;
    let (mut last, mut due) = (Instant::now(), usize::MAX);
    let findings = loop {
        let found: Vec<Finding> =
            serde_json::from_value(ask(config, &Request::Results { id }).await?)?;
        let found: Vec<Finding> = found
            .into_iter()
            .filter(|finding| domain.is_none_or(|domain| finding.domain == domain))
            .collect();
        if found.is_empty() {
            bail!("no server that table {table} flows to is known; see terrace.lag at the top");
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
    Ok(Compared {
        table: table.to_owned(),
        id,
        findings,
    })
}
