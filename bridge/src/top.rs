//! What is asked of the top from anywhere in the tree.
//!
//! Nobody below knows the top's address: a bridge that is asked asks its own upstream, until
//! it is a Postgres.

use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::client::{Client, PgError, SessionOptions};
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::upstream::{BRIDGE_PARAMETER, session};

/// Nothing that is asked takes longer.
const LIMIT: Duration = Duration::from_secs(3600);
/// So often a lock that others hold is asked for.
const TRIES: usize = 30;

/// A question or a wish.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Names of the synchronised tables.
    Tables,
    /// Begin to compare a table; gives the comparison's id when the top's sums are made.
    Compare {
        /// As SQL would name it.
        table: String,
    },
    /// What every server has found.
    Results {
        /// Of the comparison.
        id: i64,
    },
    /// Send a table's rows once more.
    Resend {
        /// As SQL would name it.
        table: String,
        /// For these.
        domains: Vec<String>,
    },
    /// Send the rows of some ranges once more.
    Repair {
        /// Of the comparison that found them.
        id: i64,
        /// Their numbers.
        ranges: Vec<i64>,
        /// For these.
        domains: Vec<String>,
    },
}

/// Asks the first server above that answers.
pub async fn ask(config: &Config, request: &Request) -> anyhow::Result<Value> {
    let servers = match &config.parent {
        Some(parent) => parent.servers.clone(),
        None => vec![config.database.url.clone()],
    };
    let mut problem = anyhow::anyhow!("no parent is configured");
    for server in servers {
        let info = ConnInfo::parse(&server)?;
        match session(&info, &config.node.name, false).await {
            Err(error) => {
                problem = anyhow::Error::new(error)
                    .context(format!("cannot connect to {}", info.endpoint()));
            }
            Ok(client) => {
                let answer = timeout(LIMIT, ask_server(client, &info, request)).await;
                return answer.context("no answer from the top")?;
            }
        }
    }
    Err(problem)
}

async fn ask_server(
    mut client: Client,
    info: &ConnInfo,
    request: &Request,
) -> anyhow::Result<Value> {
    if !client.extension_accepted(BRIDGE_PARAMETER) {
        return at_top(client, info, request).await;
    }
    let text = serde_json::to_string(request)?;
    let asked = client
        .simple(&format!("AT_TOP '{}'", text.replace('\'', "''")))
        .await;
    let rows = asked.map_err(told)?;
    let answer = rows.first().and_then(|row| row.first()?.as_deref());
    Ok(serde_json::from_str(answer.context("no answer")?)?)
}

async fn at_top(mut client: Client, info: &ConnInfo, request: &Request) -> anyhow::Result<Value> {
    let (sql, parameters): (&str, Vec<String>) = match request {
        Request::Tables => (
            "SELECT coalesce(json_agg(\"table\" ORDER BY \"table\"), '[]') FROM terrace.tables",
            vec![],
        ),
        Request::Compare { table } => return compare(client, info, table).await,
        Request::Results { id } => (
            "SELECT coalesce(json_agg(json_build_object('node', l.node, 'domain', l.domain, \
                 'state', l.state, 'ranges', c.ranges, 'rows', c.rows, 'differ', c.differ, \
                 'conditions', (SELECT json_agg(terrace.range_condition(made, r)) \
                                FROM unnest(c.differ) r)) ORDER BY l.level, l.domain, l.node), '[]') \
             FROM terrace.comparison made \
             JOIN terrace.sync_table s ON s.nspname = made.nspname AND s.relname = made.relname \
             JOIN terrace.lag l ON l.domain <> 'top' AND (s.domains IS NULL OR l.domain = ANY (s.domains)) \
             LEFT JOIN terrace.comparisons c ON c.id = made.id AND c.node = l.node \
             WHERE made.id = $1::bigint",
            vec![id.to_string()],
        ),
        Request::Resend { table, domains } => (
            "SELECT to_json(terrace.resend($1::regclass, $2::text[]))",
            vec![table.clone(), array(domains)],
        ),
        Request::Repair {
            id,
            ranges,
            domains,
        } => (
            "SELECT to_json(terrace.resend_ranges($1::bigint, $2::int[], $3::text[]))",
            vec![
                id.to_string(),
                array(&ranges.iter().map(i64::to_string).collect::<Vec<_>>()),
                array(domains),
            ],
        ),
    };
    let parameters: Vec<Option<&str>> = parameters.iter().map(|text| Some(text.as_str())).collect();
    let rows = client.query(sql, &parameters).await;
    let rows = rows.map_err(told)?;
    let answer = rows.first().and_then(|row| row.first()?.as_deref());
    Ok(serde_json::from_str(answer.context("no answer")?)?)
}

/// What the top says to a request, with what to do: a table that it does not know at all has no hint.
fn told(error: PgError) -> anyhow::Error {
    match error.code() {
        Some("42P01" | "3F000") => {
            anyhow::anyhow!("{}; hint: See terrace.tables at the top.", error.message())
        }
        _ => anyhow::anyhow!(error.advice()),
    }
}

/// An array literal.
fn array(elements: &[String]) -> String {
    let quoted: Vec<String> = elements
        .iter()
        .map(|text| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
        .collect();
    format!("{{{}}}", quoted.join(","))
}

/// One session holds writers off while another one takes its snapshot: what that shows
/// is what stands in the stream before the first one's commit.
async fn compare(mut holder: Client, info: &ConnInfo, table: &str) -> anyhow::Result<Value> {
    let options = SessionOptions {
        application_name: "terrace compare".into(),
        ..Default::default()
    };
    let mut reader = Client::connect(info, &options).await?;
    let mut tries = 0;
    let made = loop {
        holder.simple("BEGIN").await?;
        let begun = holder
            .query(
                "SELECT made::text, made.id::text FROM terrace.begin_comparison($1::regclass) made",
                &[Some(table)],
            )
            .await;
        match begun {
            Ok(rows) => break rows,
            Err(error) if error.code() == Some("55P03") && tries < TRIES => {
                tries += 1;
                holder.simple("ROLLBACK").await?;
                sleep(Duration::from_millis(200)).await;
            }
            Err(error) => return Err(told(error)),
        }
    };
    let [Some(made), Some(id)] = made.first().map(Vec::as_slice).unwrap_or_default() else {
        bail!("terrace.begin_comparison gave no row");
    };
    let snapshot = reader
        .simple("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        .await;
    holder
        .simple(if snapshot.is_ok() {
            "COMMIT"
        } else {
            "ROLLBACK"
        })
        .await?;
    snapshot?;
    let summed: Result<(), PgError> = async {
        let sql = "SELECT terrace.finish_comparison($1::terrace.comparison)";
        reader.query(sql, &[Some(made)]).await?;
        reader.simple("COMMIT").await.map(drop)
    }
    .await;
    summed.map_err(told)?;
    Ok(serde_json::from_str(id)?)
}
