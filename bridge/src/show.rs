//! `terrace-bridge status`: the tree for people and for programs, as the database beside
//! the bridge knows it, so also while the bridge is down. And how all commands print.

use std::fmt::Display;
use std::io::{self, Write};

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
        say(first(&rows).unwrap_or("[]"));
        return Ok(());
    }
    say(format!(
        "{:20} {:12} {:8} {:10} {:>14} {:>10} lag",
        "node", "domain", "role", "state", "replayed", "bytes"
    ));
    for row in client.query(NODES, &[]).await? {
        let text = |column: usize| row[column].as_deref().unwrap_or("-");
        let reason = row[7].as_deref().unwrap_or_default();
        say(format!(
            "{:20} {:12} {:8} {:10} {:>14} {:>10} {} {reason}",
            text(0),
            text(1),
            text(2),
            text(3),
            text(4),
            text(5),
            text(6),
        ));
    }
    let sql = format!(
        "SELECT * FROM (SELECT date_trunc('second', time)::text, node, kind, reason \
         FROM terrace.events ORDER BY time DESC LIMIT {EVENTS}) e ORDER BY 1"
    );
    let events = client.query(&sql, &[]).await?;
    if !events.is_empty() {
        say("\nlast events:");
    }
    for row in events {
        let text = |column: usize| row[column].as_deref().unwrap_or_default();
        say(format!(
            "{}  {:16} {:10} {}",
            text(0),
            text(1),
            text(2),
            text(3)
        ));
    }
    Ok(())
}

/// The first value of what was answered.
pub(crate) fn first(rows: &[Row]) -> Option<&str> {
    rows.first()?.first()?.as_deref()
}

/// Prints a line of what a command has to say. Whoever reads it may have had enough, as `head` has:
/// that ends the command, without a result.
pub fn say(line: impl Display) {
    let Err(error) = writeln!(io::stdout(), "{line}") else {
        return;
    };
    if error.kind() != io::ErrorKind::BrokenPipe {
        let _ = writeln!(
            io::stderr(),
            "terrace-bridge: cannot write the output: {error}"
        );
    }
    std::process::exit(1);
}
