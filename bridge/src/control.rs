//! Orders from this machine to the bridge that runs on it.
//!
//! They come over a Unix socket in `data_dir`, which speaks what the relay port
//! speaks. Who may write to the directory's socket is trusted: its mode is 0600.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::time::sleep;

use crate::client::{Client, quote_ident};
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::lsn::Lsn;
use crate::show::say;
use crate::upstream::session;

/// A switchover that takes longer has failed.
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(10);
/// A refusal that lasts as long is meant.
const REFUSED_FOR: Duration = Duration::from_secs(2);
/// The socket has the name that libpq gives one of this port.
const PORT: u16 = 1;

fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join(format!(".s.PGSQL.{PORT}"))
}

/// Listens on the socket of `data_dir`, which this process has locked.
pub fn listen(data_dir: &Path) -> anyhow::Result<UnixListener> {
    let path = socket_path(data_dir);
    // One that a killed bridge left behind.
    fs::remove_file(&path).ok();
    let listener =
        UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("chmod {}", path.display()))?;
    Ok(listener)
}

async fn connect(config: &Config) -> anyhow::Result<Client> {
    let dir = config
        .node
        .data_dir
        .display()
        .to_string()
        .replace('\'', "\\'");
    let info = format!("host='{dir}' port={PORT} user=terrace dbname=terrace");
    let client = session(&ConnInfo::parse(&info)?, "terrace control", false).await;
    client.with_context(|| {
        format!(
            "cannot reach the bridge of {}; is it running on this machine?",
            config.node.name
        )
    })
}

async fn status(client: &mut Client) -> anyhow::Result<Value> {
    let rows = client.simple("SHOW terrace.status").await?;
    let text = rows
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next()?);
    Ok(serde_json::from_str(&text.context("no status")?)?)
}

/// `terrace-bridge resync`: copies this server's data anew.
pub async fn resync(config: &Config) -> anyhow::Result<()> {
    let mut client = connect(config).await?;
    client.simple("RESYNC").await?;
    say(format!(
        "{} copies its data anew; see terrace.lag",
        config.node.name
    ));
    Ok(())
}

/// `terrace-bridge skip`: leaves the transaction out that this server cannot apply.
pub async fn skip(config: &Config, lsn: Lsn) -> anyhow::Result<()> {
    let mut client = connect(config).await?;
    let asked = client.simple(&format!("SKIP {lsn}")).await;
    asked.map_err(|error| anyhow::anyhow!(error.message()))?;
    say(format!(
        "{} leaves out the transaction that ends at {lsn}",
        config.node.name
    ));
    Ok(())
}

/// `terrace-bridge switchover`: returns when the new master is in place.
pub async fn switchover(config: &Config, domain: &str, to: Option<&str>) -> anyhow::Result<()> {
    let own = &config.node.domain;
    ensure!(
        domain == own,
        "domain \"{domain}\" is not that of this configuration, \"{own}\"; run it on a server of \
         the domain"
    );
    let mut client = connect(config).await?;
    let before = master(&status(&mut client).await?);
    let target = to.map_or(String::new(), |to| format!(" TO {}", quote_ident(to)));
    let started = Instant::now();
    // Servers that have just come back are not known to be fit before the next heartbeat.
    while let Err(error) = client.simple(&format!("SWITCHOVER{target}")).await {
        ensure!(started.elapsed() < REFUSED_FOR, error.message());
        sleep(Duration::from_millis(200)).await;
    }
    let started = Instant::now();
    loop {
        let after = master(&status(&mut client).await?);
        match after {
            Some(after) if to.is_some_and(|to| to != after) && Some(&after) != before.as_ref() => {
                bail!("{after} has become master in its place; see terrace.events")
            }
            Some(after) if Some(&after) != before.as_ref() => {
                say(format!("{after} is master of domain {domain}"));
                return Ok(());
            }
            _ if started.elapsed() > SWITCHOVER_LIMIT => bail!(
                "no other server has become master within {} s; see terrace.events",
                SWITCHOVER_LIMIT.as_secs()
            ),
            _ => sleep(Duration::from_millis(50)).await,
        }
    }
}

fn master(status: &Value) -> Option<String> {
    status["master"].as_str().map(str::to_owned)
}
