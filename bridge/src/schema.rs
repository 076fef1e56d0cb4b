//! The schema of what is synchronised, from one server to another by PostgreSQL's own
//! pg_dump.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::client::{Client, PgError};
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
        match major_of(&path).await {
            Some(version) if version == major => return Ok(path),
            Some(version) => found.push((version, path)),
            None => {}
        }
    }
    let fit = found.iter().filter(|(version, _)| *version >= major);
    if let Some((_, path)) = fit.min_by_key(|(version, _)| *version) {
        return Ok(path.clone());
    }
    let known: Vec<String> = found
        .iter()
        .map(|(version, path)| format!("{} is of {version}", path.display()))
        .collect();
    bail!(
        "no pg_dump and pg_restore of PostgreSQL {major} or newer are installed beside this bridge{}{}; install \
         postgresql-client-{major} or put its directory in PATH",
        if known.is_empty() { "" } else { ": " },
        known.join(", ")
    )
}

/// Every pg_dump that can be found with its pg_restore: those of each installed version, then those
/// in PATH. Debian's own program there is none: it runs another version from call to call.
fn candidates() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path);
    let mut directories: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    directories.sort();
    let programs = directories
        .into_iter()
        .chain(in_path)
        .map(|directory| directory.join("pg_dump"));
    let is_one = |path: &PathBuf| {
        let real = path.canonicalize();
        real.is_ok_and(|real| real.is_file() && !real.ends_with("pg_wrapper"))
            && path.with_file_name("pg_restore").is_file()
    };
    programs.filter(is_one).collect()
}

/// To run a program of PostgreSQL. What libpq would take from the environment is none of ours.
fn program(path: &Path) -> Command {
    let mut command = Command::new(path);
    let inherited =
        std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG"));
    for (name, _) in inherited {
        command.env_remove(name);
    }
    command
}

async fn major_of(pg_dump: &Path) -> Option<u32> {
    let output = program(pg_dump)
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

/// The schema of what is synchronised at a source, as one run of pg_dump has seen it: over a long
/// link its many questions take a while.
pub struct Dump {
    archive: Vec<u8>,
    pg_restore: PathBuf,
    parts_before: String,
    parts_after: String,
}

impl Dump {
    /// Of the source in a snapshot, which `reader` reads as well, but for the tables `without`.
    pub async fn take(
        source: &ConnInfo,
        snapshot: &str,
        reader: &mut Client,
        without: &[String],
    ) -> anyhow::Result<Dump> {
        // What is not synchronised must not be locked: the role may not read it.
        let others = reader.simple(OTHERS).await?;
        let pg_dump = pg_dump_for(reader).await?;
        let mut command = program(&pg_dump);
        command
            .args([
                "--schema-only",
                "--no-privileges",
                "--no-publications",
                "--no-subscriptions",
                "--exclude-schema=terrace",
                "--format=custom",
                "--encoding=UTF8",
            ])
            .arg(format!("--snapshot={snapshot}"))
            .envs(source.libpq_env());
        for name in others.iter().flatten().flatten().chain(without) {
            command.arg(format!("--exclude-table={name}"));
        }
        let archive = output_of(command, "pg_dump", &[]).await?;
        // Within the transaction of the snapshot; names must say where they are from.
        reader.simple("SET LOCAL search_path = ''").await?;
        let before = reader.simple(PARTS_BEFORE_ROWS).await?;
        let after = reader.simple(PARTS_AFTER_ROWS).await?;
        Ok(Dump {
            archive,
            pg_restore: pg_dump.with_file_name("pg_restore"),
            parts_before: before.into_iter().flatten().flatten().collect(),
            parts_after: after.into_iter().flatten().flatten().collect(),
        })
    }

    /// What is to be there before the rows come, as SQL.
    pub async fn before_rows(&self) -> anyhow::Result<String> {
        // What they are made of comes before them …
        Ok(self.section("pre-data").await? + &self.parts_before)
    }

    /// What is made when all rows are there.
    pub async fn after_rows(&self) -> anyhow::Result<String> {
        // … and what refers to them after.
        Ok(self.parts_after.clone() + &self.section("post-data").await?)
    }

    async fn section(&self, section: &str) -> anyhow::Result<String> {
        let mut command = program(&self.pg_restore);
        command.args(["--no-tablespaces", "--section", section, "--file=-"]);
        let text = output_of(command, "pg_restore", &self.archive).await?;
        String::from_utf8(text).context("output of pg_restore")
    }
}

/// What a program prints that is given `input`.
async fn output_of(mut command: Command, name: &str, input: &[u8]) -> anyhow::Result<Vec<u8>> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let run = || format!("run {name}");
    let mut child = command.spawn().with_context(run)?;
    let stdin = child.stdin.take();
    let give = async {
        // One that ends early says why by itself.
        if let Some(mut stdin) = stdin {
            stdin.write_all(input).await.ok();
        }
    };
    let ((), output) = tokio::join!(give, child.wait_with_output());
    let output = output.with_context(run)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed: {}", said.trim());
    }
    Ok(output.stdout)
}

/// The tables that are not synchronised.
const OTHERS: &str = "\
    SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c \
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind IN ('r', 'p', 'f') AND n.nspname NOT LIKE 'pg\\_%' \
      AND n.nspname NOT IN ('information_schema', 'terrace') \
      AND NOT EXISTS (SELECT FROM terrace.sync_table s, \
           pg_catalog.pg_partition_tree(to_regclass(format('%I.%I', s.nspname, s.relname))) t \
           WHERE t.relid = c.oid) \
      AND NOT EXISTS (SELECT FROM terrace.sync_table s \
           WHERE s.nspname = n.nspname AND s.relname = c.relname AND s.columns IS NULL)";

/// Of tables that are synchronised by some of their columns, as objects of a dump. pg_dump
/// is no help: it locks a table, which takes the right to read all of it. Here they hold
/// those columns alone, and as all values come from the source, no defaults.
const PARTS_BEFORE_ROWS: &str = "\
    SELECT format(E'\\n--\\n-- Name: %s; Type: TABLE; Schema: %s; Owner: -\\n--\\n\\nCREATE TABLE %I.%I (%s);\\n', \
        c.relname, n.nspname, n.nspname, c.relname, \
        (SELECT string_agg(format('%I %s%s%s', a.attname, format_type(a.atttypid, a.atttypmod), \
                ' COLLATE ' || nullif(a.attcollation, t.typcollation)::regcollation, \
                CASE WHEN a.attnotnull THEN ' NOT NULL' END), ', ' ORDER BY a.attnum) \
         FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
         WHERE a.attrelid = c.oid AND a.attname = ANY (s.columns) AND a.attnum > 0)) \
    FROM terrace.sync_table s JOIN pg_namespace n ON n.nspname = s.nspname \
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.relname \
    WHERE s.columns IS NOT NULL ORDER BY 1";
/// Constraints and indexes that speak of those columns alone.
const PARTS_AFTER_ROWS: &str = "\
    WITH part AS ( \
        SELECT c.oid, n.nspname, c.relname, array_agg(a.attnum) AS columns \
        FROM terrace.sync_table s JOIN pg_namespace n ON n.nspname = s.nspname \
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.relname \
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = ANY (s.columns) AND a.attnum > 0 \
        GROUP BY c.oid, n.nspname, c.relname) \
    SELECT format(E'\\n--\\n-- Name: %s; Type: CONSTRAINT; Schema: %s; Owner: -\\n--\\n\\n\
                  ALTER TABLE %I.%I ADD CONSTRAINT %I %s;\\n', k.conname, p.nspname, p.nspname, p.relname, \
                  k.conname, pg_get_constraintdef(k.oid)) \
    FROM part p JOIN pg_constraint k ON k.conrelid = p.oid AND k.contype IN ('p', 'u', 'c', 'x') \
    LEFT JOIN pg_index i ON i.indexrelid = k.conindid \
    WHERE k.conkey <@ p.columns AND coalesce(i.indkey::int2[] <@ p.columns, true) \
      AND i.indexprs IS NULL AND i.indpred IS NULL \
    UNION ALL \
    SELECT format(E'\\n--\\n-- Name: %s; Type: INDEX; Schema: %s; Owner: -\\n--\\n\\n%s;\\n', \
                  i.indexrelid::regclass, p.nspname, pg_get_indexdef(i.indexrelid)) \
    FROM part p JOIN pg_index i ON i.indrelid = p.oid AND i.indisvalid \
    WHERE i.indkey::int2[] <@ p.columns AND i.indexprs IS NULL AND i.indpred IS NULL \
      AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = p.oid)";

/// Kind of an entry that gives an object its owner.
const OWNER: &str = "OWNER";

/// One object of a dump.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    /// As pg_dump says: TABLE, FUNCTION, FK CONSTRAINT …; empty for settings.
    kind: String,
    name: String,
    sql: String,
}

impl Entry {
    /// From the comment that pg_dump puts before each object.
    fn of_header(line: &str) -> Option<Entry> {
        let rest = line.strip_prefix("-- Name: ")?;
        let (name, rest) = rest.rsplit_once("; Type: ")?;
        let (kind, _) = rest.split_once("; Schema: ")?;
        Some(Entry {
            kind: kind.to_owned(),
            name: name.to_owned(),
            sql: String::new(),
        })
    }

    /// Made by CREATE EXTENSION, or when the lists of what is synchronised arrive.
    fn is_extensions_own(&self) -> bool {
        match self.kind.as_str() {
            "EXTENSION" => self.name == "terrace",
            "COMMENT" => self.name == "EXTENSION terrace",
            "TRIGGER" => self.sql.contains("\nCREATE TRIGGER terrace_"),
            _ => false,
        }
    }

    /// Without these a synchronised table is not what it is at the source.
    fn is_needed(&self) -> bool {
        matches!(
            self.kind.as_str(),
            "" | "TABLE"
                | "TABLE ATTACH"
                | "DEFAULT"
                | "SEQUENCE"
                | "SEQUENCE OWNED BY"
                | "CONSTRAINT"
                | "CHECK CONSTRAINT"
                | "INDEX"
                | "INDEX ATTACH"
        )
    }
}

/// Where in the text of SQL a line begins or ends.
#[derive(Default)]
enum Place {
    #[default]
    Plain,
    /// Until this byte; whether a backslash hides the next one.
    Quote(u8, bool),
    /// Until this tag.
    Dollar(String),
    /// Comments nest.
    Comment(u32),
}

impl Place {
    /// Where a line that begins here ends.
    fn after(self, line: &str) -> Place {
        let bytes = line.as_bytes();
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
        let (mut place, mut at) = (self, 0);
        while at < bytes.len() {
            let rest = &bytes[at..];
            let before = at.checked_sub(1).map(|before| bytes[before]);
            let mut step = 1;
            place = match place {
                Place::Plain if rest.starts_with(b"--") => return Place::Plain,
                Place::Plain if rest.starts_with(b"/*") => {
                    step = 2;
                    Place::Comment(1)
                }
                Place::Plain if rest[0] == b'"' => Place::Quote(b'"', false),
                Place::Plain if rest[0] == b'\'' => {
                    let escapes = before.is_some_and(|byte| byte.eq_ignore_ascii_case(&b'e'))
                        && !at.checked_sub(2).is_some_and(|byte| is_word(bytes[byte]));
                    Place::Quote(b'\'', escapes)
                }
                Place::Plain if rest[0] == b'$' && !before.is_some_and(is_word) => {
                    let word = rest[1..].iter().take_while(|byte| is_word(**byte)).count();
                    match rest.get(word + 1) {
                        Some(b'$') => {
                            step = word + 2;
                            Place::Dollar(line[at..at + step].to_owned())
                        }
                        _ => Place::Plain,
                    }
                }
                Place::Quote(_, true) if rest[0] == b'\\' => {
                    step = 2;
                    place
                }
                // A doubled quote ends one and begins the next, which is the same.
                Place::Quote(quote, _) if rest[0] == quote => Place::Plain,
                Place::Dollar(tag) if rest.starts_with(tag.as_bytes()) => {
                    step = tag.len();
                    Place::Plain
                }
                Place::Comment(depth) if rest.starts_with(b"/*") => {
                    step = 2;
                    Place::Comment(depth + 1)
                }
                Place::Comment(depth) if rest.starts_with(b"*/") => {
                    step = 2;
                    match depth {
                        1 => Place::Plain,
                        _ => Place::Comment(depth - 1),
                    }
                }
                place => place,
            };
            at += step;
        }
        place
    }
}

/// The objects of a dump, each with what makes it.
fn entries(dump: &str) -> Vec<Entry> {
    let mut entries = vec![Entry::default()];
    let mut place = Place::default();
    for line in dump.split_inclusive('\n') {
        if matches!(place, Place::Plain) {
            // Commands to psql, and what a newer pg_dump says to an older server; off is
            // the default there.
            if line.starts_with('\\') || line.trim_end() == "SET transaction_timeout = 0;" {
                continue;
            }
            if let Some(entry) = Entry::of_header(line.trim_end()) {
                entries.push(entry);
                continue;
            }
            // The role need not exist here.
            if line.starts_with("ALTER ") && line.contains(" OWNER TO ") {
                entries.push(Entry {
                    kind: OWNER.to_owned(),
                    name: line.trim_end().to_owned(),
                    sql: line.to_owned(),
                });
                continue;
            }
            // For all that follows, whatever becomes of the object before.
            if line.starts_with("SET default_") {
                let sql = line.to_owned();
                entries.push(Entry {
                    sql,
                    ..Entry::default()
                });
                continue;
            }
        }
        place = place.after(line);
        if let Some(entry) = entries.last_mut() {
            entry.sql.push_str(line);
        }
    }
    entries
}

/// What exists already is taken as it is.
const EXISTS: &[&str] = &["42710", "42P06", "42P07", "42723"];

/// Of a primary key, where there is one: invalid_table_definition.
const SECOND_KEY: &str = "42P16";

/// Runs a section of a dump as one transaction, without what is the extension's. Tells
/// what could not be made and is not needed: a foreign key to a table that is not
/// synchronised, a function that speaks of one. `tell` is told before each object how many of how many
/// are done.
pub async fn restore(
    local: &mut Client,
    dump: &str,
    tell: impl FnMut(usize, usize),
) -> anyhow::Result<Vec<String>> {
    let result = restore_entries(local, dump, tell).await;
    let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = local.simple(end).await;
    // A dump empties the search path for what it runs.
    local
        .simple("RESET ALL; SET session_replication_role = replica")
        .await?;
    let left_out = result?;
    ended?;
    Ok(left_out)
}

async fn restore_entries(
    local: &mut Client,
    dump: &str,
    mut tell: impl FnMut(usize, usize),
) -> anyhow::Result<Vec<String>> {
    let mut left_out = Vec::new();
    local.simple("BEGIN").await?;
    let mut entries = entries(dump);
    entries.retain(|entry| !entry.is_extensions_own());
    let total = entries.len();
    for (done, entry) in entries.into_iter().enumerate() {
        tell(done, total);
        let Entry { kind, name, sql } = &entry;
        let result = local
            .simple(&format!("SAVEPOINT entry;\n{sql}\n;RELEASE entry"))
            .await;
        let error = match result {
            Ok(_) => continue,
            Err(PgError::Db(error)) => error,
            Err(error) => return Err(error.into()),
        };
        if kind == OWNER && error.code == "42704" {
            tracing::info!("{name}: {error}");
        } else if EXISTS.contains(&error.code.as_str())
            || (kind == "CONSTRAINT" && error.code == SECOND_KEY)
        {
            tracing::info!("{kind} {name} exists already");
        } else if entry.is_needed() {
            let mut problem = format!("{kind} {name}: {error}");
            if !left_out.is_empty() {
                problem += &format!(" (after {})", left_out.join("; "));
            }
            bail!(problem);
        } else {
            tracing::warn!("left out at the copy: {kind} {name}: {error}");
            left_out.push(format!("{kind} {name}: {}", error.message));
        }
        local.simple("ROLLBACK TO entry; RELEASE entry").await?;
    }
    Ok(left_out)
}

#[cfg(test)]
mod tests {
    use super::{entries, parse_major};

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

    #[test]
    fn a_dump_falls_into_its_objects() {
        let dump = "SET a = 1;\n\\restrict x\n--\n-- Name: f(int); Type: FUNCTION; Schema: s; Owner: -\n--\n\n\
            CREATE FUNCTION f() AS $_$\n\\kept\n-- Name: x; Type: TABLE; Schema: s; Owner: -\n$a$ ' $_$;\n\
            SELECT E'it\\'s\n-- Name: y; Type: TABLE; Schema: s; Owner: -\n', a$b, 'it''s\n\
            -- Name: z; Type: TABLE; Schema: s; Owner: -\n' /* ' /* */\n\
            -- Name: c; Type: TABLE; Schema: s; Owner: -\n*/;\nSET default_tablespace = '';\n\
            --\n-- Name: t o; Type: FK CONSTRAINT; Schema: s; Owner: -\n--\n\nALTER TABLE t;\n";
        let found: Vec<(String, String)> = entries(dump)
            .into_iter()
            .map(|entry| (entry.kind, entry.name))
            .collect();
        let wanted = [
            ("", ""),
            ("FUNCTION", "f(int)"),
            ("", ""),
            ("FK CONSTRAINT", "t o"),
        ];
        let wanted = wanted.map(|(kind, name)| (kind.to_owned(), name.to_owned()));
        assert_eq!(found, wanted);
        let sql: String = entries(dump).into_iter().map(|entry| entry.sql).collect();
        assert!(sql.contains("\\kept") && !sql.contains("restrict"), "{sql}");
    }
}
