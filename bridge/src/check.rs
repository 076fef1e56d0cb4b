//! `terrace-bridge check`: what would keep `run` from working, and how to mend it.
//!
//! It changes nothing anywhere. Each finding is one line that names the thing.

use std::io::ErrorKind;

use crate::client::{Client, PgError, Row, SessionOptions, quote_literal};
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::handshake::Security;
use crate::node::instance;
use crate::open::RECEIVER;
use crate::upstream::{BRIDGE_PARAMETER, connect};

/// One thing that was looked at.
pub struct Finding {
    /// What was looked at, or what is wrong with it and how to mend it.
    pub text: String,
    /// Whether it is as it must be.
    pub good: bool,
}

/// Looks at everything that the configuration names.
pub async fn check(config: &Config) -> Vec<Finding> {
    let mut report = Report(Vec::new());
    report.relay(config);
    report.data_dir(config);
    report.database(config).await;
    if let Some(parent) = &config.parent {
        for url in &parent.servers {
            report.parent(config, url).await;
        }
    }
    for (name, url) in &config.peers {
        report.peer(name, url).await;
    }
    report.listens("http", &config.http.listen);
    report.0
}

struct Report(Vec<Finding>);

impl Report {
    fn good(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.0.push(Finding { text, good: true });
    }

    fn bad(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.0.push(Finding { text, good: false });
    }

    fn relay(&mut self, config: &Config) {
        let relay = &config.relay;
        match Security::load(
            relay.auth_file.as_deref(),
            relay.tls_cert.as_deref(),
            relay.tls_key.as_deref(),
            relay.tls_client_ca.as_deref(),
        ) {
            Ok(_) => self.listens("relay", &relay.listen),
            Err(error) => self.bad(format!("relay: {error:#}")),
        }
    }

    /// Whether one can listen there.
    fn listens(&mut self, what: &str, listen: &str) {
        match std::net::TcpListener::bind(listen) {
            Ok(_) => self.good(format!("{what}: {listen} can be served")),
            // By the bridge itself, if it runs.
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                self.good(format!("{what}: {listen} is being served"));
            }
            Err(error) => self.bad(format!("{what}: cannot listen on {listen}: {error}")),
        }
    }

    fn data_dir(&mut self, config: &Config) {
        let dir = &config.node.data_dir;
        // `run` makes it, so the place it will be in counts.
        let existing = dir.ancestors().find(|dir| dir.exists());
        match existing.map(|dir| (dir, tempfile_in(dir))) {
            Some((_, Ok(()))) => {
                self.good(format!("data_dir: {} can be written to", dir.display()));
            }
            Some((place, Err(error))) => self.bad(format!(
                "data_dir {}: cannot write to {}: {error}; give it to the bridge's user",
                dir.display(),
                place.display()
            )),
            None => self.bad(format!("data_dir {}: no such place", dir.display())),
        }
    }

    /// A session, or the reason why there is none.
    async fn session(&mut self, what: &str, url: &str) -> Option<(Client, ConnInfo)> {
        let info = match ConnInfo::parse(url) {
            Ok(info) => info,
            Err(error) => {
                self.bad(format!("{what}: {error}"));
                return None;
            }
        };
        let options = SessionOptions {
            application_name: "terrace check".into(),
            ..SessionOptions::default()
        };
        match Client::connect(&info, &options).await {
            Ok(client) => Some((client, info)),
            Err(error) => {
                let place = info.endpoint();
                let way = error.way_out();
                self.bad(format!("{what}: cannot connect to {place}: {error}{way}"));
                None
            }
        }
    }

    /// The first value that `sql` gives.
    async fn value(&mut self, what: &str, client: &mut Client, sql: &str) -> Option<String> {
        match client.query(sql, &[]).await {
            Ok(rows) => first(rows),
            Err(error) => {
                self.bad(format!("{what}: {error}"));
                None
            }
        }
    }

    async fn extension(&mut self, what: &str, client: &mut Client) -> bool {
        let sql = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'terrace'";
        let ours = env!("CARGO_PKG_VERSION");
        match self.value(what, client, sql).await.as_deref() {
            Some(version) if version == ours => return true,
            Some(version) => self.bad(format!(
                "{what}: extension terrace is of version {version}, this bridge of {ours}; run \
                 ALTER EXTENSION terrace UPDATE, or install the matching bridge"
            )),
            None => self.bad(format!(
                "{what}: extension terrace is missing; run CREATE EXTENSION terrace"
            )),
        }
        false
    }

    async fn database(&mut self, config: &Config) {
        let what = "database";
        let Some((mut client, info)) = self.session(what, &config.database.url).await else {
            return;
        };
        if !self.extension(what, &mut client).await {
            return;
        }
        let superuser = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user";
        if self.value(what, &mut client, superuser).await.as_deref() != Some("t") {
            let user = info.user();
            self.bad(format!(
                "{what}: role \"{user}\" is no superuser, so it can neither write past triggers \
                 nor make the relay's role; run ALTER ROLE \"{user}\" SUPERUSER"
            ));
            return;
        }
        let before = self.0.len();
        if config.parent.is_none() {
            let receives = "SELECT EXISTS (SELECT FROM terrace.progress)";
            match self.value(what, &mut client, receives).await.as_deref() {
                Some("f") => self.wal_level(what, &mut client).await,
                Some(_) => self.bad(format!("{what}: {RECEIVER}")),
                None => {}
            }
        }
        if self.0.len() == before {
            self.good(format!("{what}: {} is ready", info.endpoint()));
        }
    }

    /// Tables and columns that this server should have as the parent has them, and has not.
    /// Before the initial copy it may lack all of them.
    async fn columns(&mut self, config: &Config, parent: &mut Client) -> Result<(), PgError> {
        let Ok(info) = ConnInfo::parse(&config.database.url) else {
            return Ok(());
        };
        // What is wrong with it has been said.
        let Ok(mut local) = Client::connect(&info, &SessionOptions::default()).await else {
            return Ok(());
        };
        let progress = "SELECT 1 FROM terrace.progress";
        if !local
            .simple(progress)
            .await
            .is_ok_and(|rows| !rows.is_empty())
        {
            return Ok(());
        }
        let there = "SELECT pg_catalog.format('%I.%I', s.nspname, s.relname), \
                            pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), E'\\x01') \
                     FROM terrace.sync_table s JOIN pg_catalog.pg_attribute a \
                       ON a.attrelid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', s.nspname, s.relname)) \
                      AND a.attnum > 0 AND NOT a.attisdropped \
                     WHERE (s.domains IS NULL OR $1 = ANY (s.domains)) \
                       AND (s.columns IS NULL OR a.attname = ANY (s.columns)) \
                     GROUP BY 1 ORDER BY 1";
        let here = "SELECT pg_catalog.quote_ident(attname) FROM pg_catalog.pg_attribute \
                    WHERE attrelid = pg_catalog.to_regclass($1) AND attnum > 0 AND NOT attisdropped";
        for row in parent.query(there, &[Some(&config.node.domain)]).await? {
            let [Some(table), Some(columns)] = &row[..] else {
                continue;
            };
            let ours: Vec<String> = local
                .query(here, &[Some(table)])
                .await?
                .into_iter()
                .flatten()
                .flatten()
                .collect();
            let lacks = |column: &&str| !ours.iter().any(|one| one == column);
            let missing: Vec<&str> = columns.split('\u{1}').filter(lacks).collect();
            if ours.is_empty() {
                self.bad(format!(
                    "database: synchronised table {table} is missing on this server; create it \
                     with the columns that it has at the top"
                ));
            } else if !missing.is_empty() {
                self.bad(format!(
                    "database: table {table} lacks columns on this server: {}; add them as they \
                     are at the top",
                    missing.join(", ")
                ));
            }
        }
        Ok(())
    }

    async fn wal_level(&mut self, what: &str, client: &mut Client) {
        match self.value(what, client, "SHOW wal_level").await.as_deref() {
            None | Some("logical") => {}
            Some(level) => self.bad(format!(
                "{what}: wal_level is \"{level}\"; set wal_level = logical in postgresql.conf and \
                 restart the server"
            )),
        }
    }

    async fn parent(&mut self, config: &Config, url: &str) {
        let what = "parent";
        let Some((mut client, info)) = self.session(what, url).await else {
            return;
        };
        if !self.extension(what, &mut client).await {
            return;
        }
        let before = self.0.len();
        match connect(&info, "terrace check").await {
            Ok((session, ..)) if session.extension_accepted(BRIDGE_PARAMETER) => {}
            Ok(_) => {
                self.wal_level(what, &mut client).await;
                let sql = "SELECT pg_catalog.pg_has_role('terrace_reader', 'USAGE')::text";
                if self.value(what, &mut client, sql).await.as_deref() == Some("false") {
                    let user = info.user();
                    self.bad(format!(
                        "{what}: role \"{user}\" may not read what is synchronised; run GRANT \
                         terrace_reader TO \"{user}\""
                    ));
                }
            }
            Err(error) => {
                let user = info.user();
                self.bad(format!(
                    "{what}: role \"{user}\" may not replicate: {error}; run ALTER ROLE \
                     \"{user}\" REPLICATION and GRANT terrace_reader TO \"{user}\""
                ));
            }
        }
        let domain = &config.node.domain;
        let sql = format!(
            "SELECT 1 FROM terrace.domain WHERE name = {}",
            quote_literal(domain)
        );
        if self.value(what, &mut client, &sql).await.is_none() {
            self.bad(format!(
                "{what}: domain \"{domain}\" does not exist; create it at the top with \
                 SELECT terrace.create_domain('{domain}')"
            ));
        }
        self.name(config, what, &mut client).await;
        if let Err(error) = self.columns(config, &mut client).await {
            self.bad(format!("{what}: {error}"));
        }
        if self.0.len() == before {
            self.good(format!("{what}: {} is ready", info.endpoint()));
        }
    }

    /// Whether another bridge reports under our name.
    async fn name(&mut self, config: &Config, what: &str, client: &mut Client) {
        let ours = match instance(&config.node.data_dir) {
            Ok(ours) => ours,
            // Another user looks than the one who runs it.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return,
            Err(_) => String::new(),
        };
        let name = &config.node.name;
        let sql = format!(
            "SELECT instance FROM terrace.status WHERE node = {} \
             AND reply_time > pg_catalog.clock_timestamp() - interval '5 s'",
            quote_literal(name)
        );
        let theirs = self.value(what, client, &sql).await;
        if theirs.is_some_and(|theirs| theirs != ours) {
            self.bad(format!(
                "{what}: node name \"{name}\" is already in use by another bridge; give each \
                 server its own node.name"
            ));
        }
    }

    async fn peer(&mut self, name: &str, url: &str) {
        let what = format!("peer {name}");
        let info = match ConnInfo::parse(url) {
            Ok(info) => info,
            Err(error) => return self.bad(format!("{what}: {error}")),
        };
        let place = info.endpoint();
        match connect(&info, "terrace check").await {
            Ok((client, ..)) if !client.extension_accepted(BRIDGE_PARAMETER) => self.bad(format!(
                "{what}: {place} is no bridge; name the address of its [relay] listen"
            )),
            Ok(_) => self.good(format!("{what}: {place} answers")),
            // It may be started later, or now.
            Err(error) if error.is_refused() => {
                self.good(format!("{what}: {place} is not up yet"));
            }
            Err(error) => self.bad(format!("{what}: {place}: {error}")),
        }
    }
}

fn first(rows: Vec<Row>) -> Option<String> {
    rows.into_iter().next()?.into_iter().next()?
}

fn tempfile_in(dir: &std::path::Path) -> std::io::Result<()> {
    let path = dir.join(format!(".terrace-check-{}", std::process::id()));
    std::fs::File::create(&path)?;
    std::fs::remove_file(&path)
}
