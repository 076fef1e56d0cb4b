//! The schema of what is synchronised, from one server to another by PostgreSQL's own
//! pg_dump.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use tokio::process::Command;

use crate::client::Client;
use crate::conninfo::ConnInfo;

/// The pg_dump to use for this server: one older than the server refuses, one much
/// newer says what an old server does not know. So the oldest that is new enough.
async fn pg_dump_for(server: &mut Client) -> anyhow::Result<PathBuf> {
    let rows = server.simple("SHOW server_version_num").await?;
    let number = rows.first().and_then(|row| row.first()?.clone());
    let number: u32 = number.context("server_version_num")?.parse()?;
    let major = number / 10_000;
    let mut found = Vec::new();
    for path in candidates() {
        if let Some(version) = major_of(&path).await {
            found.push((version, path));
        }
    }
    // Of one version the first.
    let fit = found.iter().filter(|(version, _)| *version >= major);
    if let Some((_, path)) = fit.min_by_key(|(version, _)| *version) {
        return Ok(path.clone());
    }
    let known: Vec<String> = found
        .iter()
        .map(|(version, path)| format!("{} is of {version}", path.display()))
        .collect();
    bail!(
        "no pg_dump of PostgreSQL {major} or newer is installed beside this bridge{}{}; install \
         postgresql-client-{major} or put its directory in PATH",
        if known.is_empty() { "" } else { ": " },
        known.join(", ")
    )
}

/// Every pg_dump that can be found: those in PATH, then those of each installed version.
fn candidates() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut versioned: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    versioned.sort();
    directories.append(&mut versioned);
    let programs = directories
        .iter()
        .map(|directory| directory.join("pg_dump"));
    programs.filter(|path| path.is_file()).collect()
}

async fn major_of(pg_dump: &Path) -> Option<u32> {
    let output = Command::new(pg_dump)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    parse_major(&String::from_utf8(output.await.ok()?.stdout).ok()?)
}

/// Of what `pg_dump --version` prints, such as `pg_dump (PostgreSQL) 15.20 (Debian …)`.
fn parse_major(text: &str) -> Option<u32> {
    let version = text.split(' ').nth(2)?;
    let digits = version.find(|c: char| !c.is_ascii_digit());
    version[..digits.unwrap_or(version.len())]
        .trim()
        .parse()
        .ok()
}

/// One section of the schema of what is synchronised at the source, as SQL.
pub async fn dump(
    source: &ConnInfo,
    snapshot: &str,
    reader: &mut Client,
    section: &str,
) -> anyhow::Result<String> {
    // What is not synchronised must not be locked: the role may not read it.
    let others = reader
        .simple(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT LIKE 'pg\\_%' \
               AND n.nspname NOT IN ('information_schema', 'terrace') \
               AND NOT EXISTS (SELECT FROM terrace.sync_table s, \
                    pg_catalog.pg_partition_tree(to_regclass(format('%I.%I', s.nspname, s.relname))) t \
                    WHERE t.relid = c.oid) \
               AND NOT EXISTS (SELECT FROM terrace.sync_table s \
                    WHERE s.nspname = n.nspname AND s.relname = c.relname)",
        )
        .await?;
    let mut command = Command::new(pg_dump_for(reader).await?);
    command
        .args([
            "--schema-only",
            "--no-owner",
            "--no-privileges",
            "--no-publications",
        ])
        .args([
            "--no-subscriptions",
            "--exclude-schema=terrace",
            "--section",
            section,
        ])
        .arg(format!("--snapshot={snapshot}"))
        .envs(source.libpq_env())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    for name in others.into_iter().flatten().flatten() {
        command.arg(format!("--exclude-table={name}"));
    }
    let output = command.output().await.context("run pg_dump")?;
    if !output.status.success() {
        bail!(
            "pg_dump failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8(output.stdout).context("output of pg_dump")?;
    Ok(text)
}

/// Runs a section of a dump as one transaction, without what is the extension's.
pub async fn restore(local: &mut Client, dump: &str) -> anyhow::Result<()> {
    let mut sql = String::from("BEGIN;\n");
    for line in dump.lines() {
        // Each of these stands on a line of its own in a dump.
        let skip = line.starts_with('\\')
            || line.starts_with("CREATE EXTENSION IF NOT EXISTS terrace ")
            || line.starts_with("COMMENT ON EXTENSION terrace ")
            // From a newer pg_dump than the server that it goes to; off is the default.
            || line == "SET transaction_timeout = 0;"
            || line.starts_with("CREATE TRIGGER terrace_")
            || line.starts_with("ALTER TRIGGER terrace_");
        if !skip {
            sql.push_str(line);
            sql.push('\n');
        }
    }
    sql.push_str("COMMIT;");
    let result = local.simple(&sql).await;
    if result.is_err() {
        local.simple("ROLLBACK").await.ok();
    }
    // A dump empties the search path for what it runs.
    local
        .simple("RESET ALL; SET session_replication_role = replica")
        .await?;
    result.map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::parse_major;

    #[test]
    fn the_major_version_is_read() {
        let of = |text| parse_major(text);
        assert_eq!(
            of("pg_dump (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)\n"),
            Some(15)
        );
        assert_eq!(of("pg_dump (PostgreSQL) 17.12\n"), Some(17));
        assert_eq!(of("pg_dump (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(of("pg_dump (PostgreSQL) 18\n"), Some(18));
        assert_eq!(of("something else"), None);
        assert_eq!(of(""), None);
    }
}
