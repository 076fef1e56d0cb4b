//! `terrace-bridge status`: the tree for people and for programs, as the database beside
//! the bridge knows it, so also while the bridge is down.

use anyhow::Context;

use crate::client::{Client, Row, SessionOptions};
use crate::config::Config;
use crate::conninfo::ConnInfo;

/// How many of the last events are shown.
const EVENTS: usize = 5;

const NODES: &str = "SELECT repeat('  ', l.level) || l.node, l.domain, l.role, l.state, \
    l.replay_lsn::text, l.lag_bytes::text, l.replay_lag::text, l.reason \
    FROM terrace.lag l";

/// Prints the servers with their roles, positions and reasons, and the last events; as JSON
/// the rows of `terrace.lag`.
pub async fn status(config: &Config, json: bool) -> anyhow::Result<()> {
    let info = ConnInfo::parse(&config.database.url)?;
    let options = SessionOptions {
        application_name: "terrace status".into(),
        ..Default::default()
    };
    let mut client = Client::connect(&info, &options)
        .await
        .with_context(|| format!("connect to the local database at {}", info.endpoint()))?;
    if json {
        let sql = "SELECT coalesce(json_agg(l), '[]') FROM terrace.lag l";
        let rows = client.query(sql, &[]).await?;
        println!("{}", first(&rows).unwrap_or("[]"));
        return Ok(());
    }
    println!(
        "{:20} {:12} {:8} {:10} {:>14} {:>10} lag",
        "node", "domain", "role", "state", "replayed", "bytes"
    );
    for row in client.query(NODES, &[]).await? {
        let text = |column: usize| row[column].as_deref().unwrap_or("-");
        let reason = row[7].as_deref().unwrap_or_default();
        println!(
            "{:20} {:12} {:8} {:10} {:>14} {:>10} {} {reason}",
            text(0),
            text(1),
            text(2),
            text(3),
            text(4),
            text(5),
            text(6),
        );
    }
    let sql = format!(
        "SELECT * FROM (SELECT date_trunc('second', time)::text, node, kind, reason \
         FROM terrace.events ORDER BY time DESC LIMIT {EVENTS}) e ORDER BY 1"
    );
    let events = client.query(&sql, &[]).await?;
    if !events.is_empty() {
        println!("\nlast events:");
    }
    for row in events {
        let text = |column: usize| row[column].as_deref().unwrap_or_default();
        println!("{}  {:16} {:10} {}", text(0), text(1), text(2), text(3));
    }
    Ok(())
}

fn first(rows: &[Row]) -> Option<&str> {
    rows.first()?.first()?.as_deref()
}
