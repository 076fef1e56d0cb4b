//! What is asked of the top from anywhere in the tree.
//!
//! Nobody below knows the top's address: a bridge that is asked asks its own upstream, until
//! it is a Postgres.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::client::{Client, PATIENT, PgError, Row, SessionOptions};
use crate::compare::Finding;
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::show::first;
use crate::upstream::{BRIDGE_PARAMETER, session};

/// Nothing that is asked takes longer, …
const LIMIT: Duration = Duration::from_secs(3600);
/// … but for the rows of a large table.
const ROWS_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// Results are looked for so often …
const LOOK: Duration = Duration::from_millis(200);
/// … and told after so long even if some are missing.
const NEWS: Duration = Duration::from_secs(5);
/// So often a lock that others hold is asked for …
const TRIES: usize = 60;
/// … and first only for so long each time: writers wait behind it, and after a second
/// (`deadlock_timeout`) an autovacuum would be ended for it. The last half of the tries is longer.
const SHORT: &str = "SET LOCAL lock_timeout = '200ms'";
const LONG: &str = "SET LOCAL lock_timeout = '2s'";

/// So often rows are tried to be sent before the one who wants them is told what is in the way: for two minutes.
const UNSENT_TRIES: u32 = 6;

const LATER: &str = "hint: The rows are sent when that is over, without this command: see column sending of \
     terrace.tables at the top.";

/// A session that holds writers off must not outlive its client, which may be cut off in silence.
const SHORT_LIVED: &str = "SET idle_session_timeout = '1min'; SET lock_timeout = '2s'";
/// The same of one that nobody waits for: writers wait behind it for the lock.
const UNHURRIED: &str = "SET idle_session_timeout = '1min'; SET lock_timeout = '200ms'";
/// Where rows are sent, others may have written before the lock was had.
const READS_COMMITTED: &str = "SET default_transaction_isolation = 'read committed'";

/// A question or a wish.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Names of the synchronised tables.
    Tables {
        /// Only those that are for this domain.
        domain: Option<String>,
    },
    /// Prepare to compare a table; gives the comparison's id and its number of slices.
    Compare {
        /// As SQL would name it.
        table: String,
    },
    /// Begin with a slice; answered when the top's sums are made.
    Slice {
        /// Of the comparison.
        id: i64,
        /// From 0.
        number: u32,
    },
    /// What every server has found; answered when some are through with so many slices, or
    /// after a while.
    Results {
        /// Of the comparison.
        id: i64,
        /// Who is waited for …
        nodes: Vec<String>,
        /// … and how many.
        slices: u32,
    },
    /// Send a table's rows once more.
    Resend {
        /// As SQL would name it.
        table: String,
        /// For these; for all if there is none.
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

impl Request {
    fn limit(&self) -> Duration {
        match self {
            Request::Resend { .. } | Request::Repair { .. } => ROWS_LIMIT,
            _ => LIMIT,
        }
    }
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
                let answer = timeout(request.limit(), ask_server(client, &info, request)).await;
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
    value(&asked.map_err(told)?)
}

async fn at_top(mut client: Client, info: &ConnInfo, request: &Request) -> anyhow::Result<Value> {
    let (sql, parameters): (&str, Vec<String>) = match request {
        Request::Tables { domain } => (
            "SELECT coalesce(json_agg(name ORDER BY name), '[]') \
             FROM terrace.sync_table, format('%I.%I', nspname, relname) name \
             WHERE $1 = '' OR domains IS NULL OR $1 = ANY (domains)",
            vec![domain.clone().unwrap_or_default()],
        ),
        Request::Compare { table } => return prepare(client, table).await,
        Request::Slice { id, number } => {
            sum_up(client, info, [id.to_string(), number.to_string()]).await?;
            return Ok(Value::Null);
        }
        Request::Results { id, nodes, slices } => {
            return results(client, *id, nodes, *slices).await;
        }
        Request::Resend { table, domains } => {
            client.lift_transaction_limit().await?;
            client.simple(READS_COMMITTED).await.map_err(told)?;
            return resend(client, info, table, &array(domains)).await;
        }
        Request::Repair {
            id,
            ranges,
            domains,
        } => {
            client.lift_transaction_limit().await?;
            client.simple(READS_COMMITTED).await.map_err(told)?;
            return send_pieces(client, *id, ranges, domains).await;
        }
    };
    answer(&mut client, sql, &parameters).await
}

async fn answer(client: &mut Client, sql: &str, parameters: &[String]) -> anyhow::Result<Value> {
    asked(client, sql, parameters).await.map_err(told_of)
}

async fn asked(client: &mut Client, sql: &str, parameters: &[String]) -> anyhow::Result<Value> {
    let parameters: Vec<Option<&str>> = parameters.iter().map(|text| Some(text.as_str())).collect();
    value(&client.query(sql, &parameters).await?)
}

fn value(rows: &[Row]) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(first(rows).context("no answer")?)?)
}

async fn prepare(mut client: Client, table: &str) -> anyhow::Result<Value> {
    let sql = "SELECT json_build_object('id', id, 'slices', slices)::text \
         FROM terrace.begin_comparison($1::regclass)";
    value(&patiently(&mut client, sql, &[table]).await?)
}

/// A table that is locked is asked for again.
async fn patiently(client: &mut Client, sql: &str, of: &[&str]) -> anyhow::Result<Vec<Row>> {
    let of: Vec<Option<&str>> = of.iter().copied().map(Some).collect();
    let mut tries = 0;
    loop {
        match client.query(sql, &of).await {
            Err(error) if error.code() == Some(LOCK_NOT_AVAILABLE) && tries < TRIES => tries += 1,
            asked => return asked.map_err(told),
        }
    }
}

/// Has the rows of a table sent once more; gives what to tell of it. A large table goes in pieces, which others
/// go on with if we are cut off.
async fn resend(
    mut client: Client,
    info: &ConnInfo,
    table: &str,
    domains: &str,
) -> anyhow::Result<Value> {
    let begin = "SELECT json_build_object('rel', $1::regclass::oid::text, 'comparison', made)::text \
         FROM terrace.begin_resend($1::regclass, nullif($2::text[], '{}')) made WHERE made IS NOT NULL";
    let begun = patiently(&mut client, begin, &[table, domains]).await?;
    if let Some(text) = first(&begun) {
        let Wanted { rel, comparison } = serde_json::from_str(text)?;
        return Ok(until_sent(client, info, &rel, comparison).await?.into());
    }
    let at_once = "SELECT to_json(terrace.resend($1::regclass, nullif($2::text[], '{}')))";
    let rows = answer(&mut client, at_once, &[table.into(), domains.into()]).await?;
    let end = answer(
        &mut client,
        "SELECT to_json(pg_current_wal_insert_lsn())",
        &[],
    )
    .await?;
    let end = end.as_str().unwrap_or_default();
    Ok(format!("{rows} rows of table \"{table}\" are sent again, up to {end}").into())
}

/// A table whose rows are wanted once more.
#[derive(Deserialize)]
struct Wanted {
    rel: String,
    comparison: i64,
}

/// What has become of it.
#[derive(Deserialize)]
struct Asked {
    waits: bool,
    due: Option<bool>,
    tries: Option<u32>,
    problem: Option<String>,
    sent: Option<String>,
}

/// Sends the rows of `table`, or waits until somebody has; gives the event that says so.
async fn until_sent(
    mut client: Client,
    info: &ConnInfo,
    table: &str,
    comparison: i64,
) -> anyhow::Result<String> {
    let look = "SELECT terrace.asked_rows($1::oid, $2::bigint)";
    let values = [table.to_owned(), comparison.to_string()];
    let mut failures = 0;
    loop {
        let asked = answer(&mut client, look, &values).await.context(
            "the rows are wanted all the same: see column sending of terrace.tables at the top",
        )?;
        let asked: Asked = serde_json::from_value(asked)?;
        if !asked.waits {
            return asked.sent.context(
                "the table or the domain was removed, or the wish taken back; hint: See terrace.tables at the top, \
                 and compare.",
            );
        }
        if let (Some(problem), Some(UNSENT_TRIES..)) = (asked.problem, asked.tries) {
            bail!("{problem}; {LATER}");
        }
        if asked.due != Some(true) {
            sleep(LOOK).await;
            continue;
        }
        match send_added(info, "terrace rows resync", Some(table)).await {
            Ok(()) => failures = 0,
            Err(error) if failures >= TRIES => bail!("{error:#}; {LATER}"),
            Err(_) => {
                failures += 1;
                sleep(LOOK).await;
            }
        }
    }
}

/// Ranges of a table that are to be sent, for these domains if not for all.
#[derive(Deserialize)]
struct Ranges {
    id: i64,
    ranges: Vec<i64>,
    domains: Option<Vec<String>>,
}

/// Sends ranges piece by piece: what others change goes between two of them, and a link that breaks
/// begins again with the piece that it was at. Gives the number of rows.
async fn send_pieces(
    mut client: Client,
    id: i64,
    ranges: &[i64],
    domains: &[String],
) -> anyhow::Result<Value> {
    if ranges.len() > 1 {
        client.simple(SHORT_LIVED).await.map_err(told)?;
        let hold = "SELECT terrace.hold_rows($1::bigint)";
        let held = patiently(&mut client, hold, &[&id.to_string()]).await;
        held.context("hold off the table's writers")?;
        client.simple("RESET lock_timeout").await.map_err(told)?;
    }
    let sent = send_held(&mut client, id, ranges, domains).await;
    Ok(sent.map_err(told_of)?.into())
}

/// The same in a session that holds writers off, if that is needed.
async fn send_held(
    client: &mut Client,
    id: i64,
    ranges: &[i64],
    domains: &[String],
) -> anyhow::Result<u64> {
    let id = id.to_string();
    let cut =
        "SELECT coalesce(json_agg(p), '[]')::text FROM terrace.pieces_of($1::bigint, $2::int[]) p";
    let values = [id.clone(), array(ranges)];
    let pieces: Vec<Vec<i64>> = serde_json::from_value(asked(client, cut, &values).await?)?;
    let (mut sent, mut later) = (0, ranges);
    for piece in pieces {
        later = &later[piece.len()..];
        let sql = "SELECT to_json(terrace.resend_ranges($1::bigint, $2::int[], $3::int[], nullif($4::text[], '{}')))";
        let values = [id.clone(), array(&piece), array(later), array(domains)];
        let rows: u64 = serde_json::from_value(asked(client, sql, &values).await?)?;
        sent += rows;
    }
    Ok(sent)
}

/// Sends what is left of the rows of a table that was added or is wanted once more, or of `only` that one, at
/// `info`, the top, unless somebody does. What keeps a table from being sent is noted there, and others come first for a while.
pub async fn send_added(
    info: &ConnInfo,
    application: &str,
    only: Option<&str>,
) -> anyhow::Result<()> {
    let mut client = session(info, application, false).await?;
    if client.extension_accepted(BRIDGE_PARAMETER) {
        // The bridge of the top does it itself.
        return Ok(());
    }
    client.lift_transaction_limit().await?;
    client.simple(UNHURRIED).await?;
    client.simple(READS_COMMITTED).await?;
    let next = client
        .query("SELECT terrace.next_sending($1::oid)", &[only])
        .await;
    let table = match next {
        // Somebody sends.
        Err(error) if error.code() == Some(LOCK_NOT_AVAILABLE) => return Ok(()),
        next => match first(&next?) {
            Some(table) => table.to_owned(),
            None => return Ok(()),
        },
    };
    let Err(error) = send_table(&mut client, &table).await else {
        return Ok(());
    };
    let note = "SELECT terrace.note_unsent($1::oid, $2)";
    let problem = format!("{error:#}");
    client.query(note, &[Some(&table), Some(&problem)]).await?;
    Err(error)
}

async fn send_table(client: &mut Client, table: &str) -> anyhow::Result<()> {
    let begin = "SELECT json_build_object('id', comparison, 'ranges', ranges, 'domains', domains)::text \
         FROM terrace.begin_sending($1::oid) WHERE comparison IS NOT NULL";
    let begun = client.query(begin, &[Some(table)]).await?;
    let Some(text) = first(&begun) else {
        return Ok(());
    };
    let Ranges {
        id,
        ranges,
        domains,
    } = serde_json::from_str(text)?;
    client.simple("RESET lock_timeout").await?;
    send_held(client, id, &ranges, &domains.unwrap_or_default()).await?;
    let end = "SELECT terrace.end_sending($1::bigint)";
    client.query(end, &[Some(&id.to_string())]).await?;
    Ok(())
}

/// Looks again and again in one session, which costs the top far less than one each.
async fn results(
    mut client: Client,
    id: i64,
    nodes: &[String],
    slices: u32,
) -> anyhow::Result<Value> {
    let sql = "SELECT coalesce(json_agg(json_build_object('node', l.node, 'domain', l.domain, \
             'state', l.state, 'ranges', c.ranges, 'rows', c.rows, 'differ', c.differ, \
             'done', coalesce(c.done, 0), \
             'conditions', (SELECT json_agg(terrace.range_condition(made, r)) \
                            FROM unnest(c.differ) r)) ORDER BY l.level, l.domain, l.node), '[]') \
         FROM terrace.comparison made \
         JOIN terrace.sync_table s ON s.nspname = made.nspname AND s.relname = made.relname \
         JOIN terrace.lag l ON l.domain <> 'top' AND (s.domains IS NULL OR l.domain = ANY (s.domains)) \
         LEFT JOIN terrace.comparisons c ON c.id = made.id AND c.node = l.node \
         WHERE made.id = $1::bigint";
    let began = Instant::now();
    loop {
        let found = answer(&mut client, sql, &[id.to_string()]).await?;
        let findings: Vec<Finding> = serde_json::from_value(found.clone())?;
        let mut waited = findings.iter().filter(|f| nodes.contains(&f.node));
        if waited.all(|finding| finding.done >= slices) || began.elapsed() > NEWS {
            return Ok(found);
        }
        sleep(LOOK).await;
    }
}

/// What the top says to a request, with what to do: a table that it does not know at all has no hint.
fn told(error: PgError) -> anyhow::Error {
    match error.code() {
        Some("42P01" | "3F000") => {
            anyhow::anyhow!("{}; hint: See terrace.tables at the top.", error.message())
        }
        Some(LOCK_NOT_AVAILABLE) => anyhow::anyhow!(
            "{}; hint: Others use the table, or send its rows: see pg_locks and terrace.tables at the top.",
            error.message()
        ),
        _ => anyhow::anyhow!(error.advice()),
    }
}

fn told_of(error: anyhow::Error) -> anyhow::Error {
    error.downcast::<PgError>().map_or_else(|other| other, told)
}

/// An array literal.
fn array<T: ToString>(elements: &[T]) -> String {
    let quoted: Vec<String> = elements
        .iter()
        .map(|element| {
            let text = element.to_string();
            format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
        })
        .collect();
    format!("{{{}}}", quoted.join(","))
}

/// One session holds writers off while another one takes its snapshot: what that shows
/// is what stands in the stream before the first one's commit.
async fn sum_up(mut holder: Client, info: &ConnInfo, slice: [String; 2]) -> anyhow::Result<()> {
    let patient = PATIENT.map(|(name, value)| (name.into(), value.into()));
    let options = SessionOptions {
        application_name: "terrace compare".into(),
        gucs: patient.into(),
        ..Default::default()
    };
    let slice = slice.each_ref().map(|number| Some(number.as_str()));
    let mut reader = Client::connect(info, &options).await?;
    reader.lift_transaction_limit().await?;
    let mut tries = 0;
    loop {
        let patience = if tries < TRIES / 2 { SHORT } else { LONG };
        match begin_slice(&mut holder, &mut reader, &slice, patience).await {
            Ok(()) => break,
            Err(error) if error.code() == Some(LOCK_NOT_AVAILABLE) => {
                ensure!(
                    tries < TRIES,
                    "a lock against writes could not be had for a minute; hint: Compare again when the \
                     transactions that write to the table have ended: see pg_locks at the top."
                );
                tries += 1;
                holder.simple("ROLLBACK").await?;
                reader.simple("ROLLBACK").await?;
                sleep(Duration::from_millis(200)).await;
            }
            Err(error) => return Err(told(error)),
        }
    }
    let finish = "SELECT terrace.finish_slice($1::bigint, $2::integer)";
    reader.query(finish, &slice).await.map_err(told)?;
    reader.simple("COMMIT").await.map_err(told)?;
    Ok(())
}

async fn begin_slice(
    holder: &mut Client,
    reader: &mut Client,
    slice: &[Option<&str>; 2],
    patience: &str,
) -> Result<(), PgError> {
    holder.simple(&format!("BEGIN; {patience}")).await?;
    let begin = "SELECT terrace.begin_slice($1::bigint, $2::integer)";
    holder.query(begin, slice).await?;
    // Behind somebody who waits for the other session it would wait for ever.
    let snapshot = format!("BEGIN ISOLATION LEVEL REPEATABLE READ; {SHORT}; SELECT 1");
    reader.simple(&snapshot).await?;
    let hold = "SELECT terrace.hold_compared($1::bigint)";
    reader.query(hold, &slice[..1]).await?;
    holder.simple("COMMIT").await?;
    Ok(())
}
