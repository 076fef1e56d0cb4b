//! The configuration file: one TOML file per server, unknown keys refused.
//!
//! `bridge.sample.toml` explains every key, and a test loads it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::conninfo::ConnInfo;

/// A file that cannot be used, and why. Holds no value of a connection string.
#[derive(Debug, thiserror::Error)]
#[error("configuration: {0}")]
pub struct ConfigError(String);

/// The whole file.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Config {
    pub node: Node,
    pub database: Database,
    pub parent: Option<Parent>,
    #[serde(default)]
    pub peers: BTreeMap<String, String>,
    #[serde(default)]
    pub apply: Apply,
    #[serde(default)]
    pub relay: Relay,
    #[serde(default)]
    pub queue: QueueLimits,
    #[serde(default)]
    pub failover: Failover,
    #[serde(default)]
    pub http: Http,
}

/// `[node]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Node {
    pub name: String,
    pub domain: String,
    pub data_dir: PathBuf,
    #[serde(default = "default_priority")]
    pub priority: i64,
}

fn default_priority() -> i64 {
    100
}

/// `[database]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Database {
    pub url: String,
}

/// `[parent]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Parent {
    pub servers: Vec<String>,
}

/// `[apply]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Apply {
    pub wait_for_upstream: bool,
    pub on_error: String,
}

impl Apply {
    /// Whether rows that the database refuses for their values are put aside.
    pub fn quarantines(&self) -> bool {
        self.on_error == "quarantine"
    }
}

impl Default for Apply {
    fn default() -> Apply {
        Apply {
            wait_for_upstream: true,
            on_error: "stall".into(),
        }
    }
}

/// `[relay]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Relay {
    pub listen: String,
    pub auth_file: Option<PathBuf>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub tls_client_ca: Option<PathBuf>,
}

impl Default for Relay {
    fn default() -> Relay {
        let listen = "127.0.0.1:7432".into();
        Relay {
            listen,
            auth_file: None,
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
        }
    }
}

/// `[queue]`, in bytes.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct QueueLimits {
    #[serde(deserialize_with = "size")]
    pub retain_min: u64,
    #[serde(deserialize_with = "size")]
    pub retain_max: u64,
}

impl Default for QueueLimits {
    fn default() -> QueueLimits {
        QueueLimits {
            retain_min: 256 << 20,
            retain_max: 16 << 30,
        }
    }
}

/// `[failover]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Failover {
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Duration,
    #[serde(deserialize_with = "duration")]
    pub takeover_after: Duration,
    pub ack_members: u32,
    #[serde(deserialize_with = "duration")]
    pub ack_timeout: Duration,
    pub resync_on_gap: bool,
}

impl Default for Failover {
    fn default() -> Failover {
        Failover {
            heartbeat: Duration::from_secs(1),
            takeover_after: Duration::from_secs(3),
            ack_members: 2,
            ack_timeout: Duration::from_secs(10),
            resync_on_gap: false,
        }
    }
}

/// `[http]`
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "explained in bridge.sample.toml")]
pub struct Http {
    pub listen: String,
}

impl Default for Http {
    fn default() -> Http {
        Http {
            listen: "127.0.0.1:9432".into(),
        }
    }
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text
        .find(|char: char| !char.is_ascii_digit())
        .unwrap_or(text.len());
    Some((text[..digits].parse().ok()?, text[digits..].trim()))
}

/// A number without a unit is shown as it is.
fn text_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => text,
        other => other.to_string(),
    })
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = text_of(deserializer)?;
    let parsed = split_unit(&text).and_then(|(number, unit)| {
        let shift = match unit {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift)
    });
    parsed.ok_or_else(|| {
        D::Error::custom(format!(
            "invalid size {text:?}; write it as \"256MiB\" or \"16GiB\""
        ))
    })
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = text_of(deserializer)?;
    let parsed = split_unit(&text)
        .filter(|(number, _)| *number > 0)
        .and_then(|(number, unit)| match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            "min" => Some(Duration::from_secs(number.checked_mul(60)?)),
            _ => None,
        });
    parsed.ok_or_else(|| {
        D::Error::custom(format!(
            "invalid duration {text:?}; write it as \"200ms\" or \"3s\""
        ))
    })
}

fn fail<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError(text))
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError(format!("cannot read {}: {error}", path.display())))?;
        Config::parse(&text)
            .map_err(|ConfigError(problem)| ConfigError(format!("{}: {problem}", path.display())))
    }

    /// Reads and checks a text.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| {
            // The library's own text quotes the line, which may hold a password.
            let place = error.span().map(|span| place(text, span.start));
            let message = without_value(error.message());
            ConfigError(format!("{}{message}", place.unwrap_or_default()))
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let Node { name, domain, .. } = &self.node;
        if !plain_name(name, "_-.") {
            return fail(format!(
                "node.name \"{name}\" must be of letters, digits, \"_\", \"-\""
            ));
        }
        if !domain.starts_with(|char: char| char.is_ascii_lowercase())
            || !plain_name(domain, "_")
            || domain.len() > 40
            || domain.chars().any(|char| char.is_ascii_uppercase())
        {
            return fail(format!(
                "node.domain \"{domain}\" must start with a lower-case letter and go on with \
                 lower-case letters, digits or \"_\", 40 characters at most"
            ));
        }
        if self.parent.is_some() && (name == "top" || domain == "top") {
            return fail(
                "node.name and node.domain \"top\" are those of a bridge beside the top; \
                 choose others below it"
                    .into(),
            );
        }
        check_url("database.url", &self.database.url)?;
        if let Some(parent) = &self.parent {
            if parent.servers.is_empty() {
                return fail("parent.servers is empty; leave out [parent] for a top bridge".into());
            }
            for url in &parent.servers {
                check_url("parent.servers", url)?;
            }
        }
        for (peer, url) in &self.peers {
            check_url(&format!("peers.{peer}"), url)?;
            if peer == name {
                return fail(format!(
                    "peers.{peer} is this node itself; list the others only"
                ));
            }
        }
        match self.apply.on_error.as_str() {
            "stall" | "quarantine" => {}
            other => {
                return fail(format!(
                    "apply.on_error \"{other}\" must be \"stall\" or \"quarantine\""
                ));
            }
        }
        if self.failover.ack_members == 0 {
            return fail("failover.ack_members must be at least 1".into());
        }
        if self.queue.retain_min > self.queue.retain_max {
            return fail("queue.retain_min is above queue.retain_max".into());
        }
        self.check_relay()
    }

    fn check_relay(&self) -> Result<(), ConfigError> {
        let Relay {
            listen,
            auth_file,
            tls_cert,
            tls_key,
            tls_client_ca,
        } = &self.relay;
        if tls_cert.is_some() != tls_key.is_some() {
            return fail("relay.tls_cert and relay.tls_key must be given together".into());
        }
        if tls_client_ca.is_some() && tls_cert.is_none() {
            return fail("relay.tls_client_ca needs relay.tls_cert and relay.tls_key".into());
        }
        if auth_file.is_none() && !is_loopback(listen) {
            return fail(format!(
                "relay.listen \"{listen}\" is reachable from other hosts but relay.auth_file is \
                 not set; set it, or listen on 127.0.0.1"
            ));
        }
        Ok(())
    }

    /// Replication slot, or cursor at a bridge, of this node's domain.
    pub fn slot_name(&self) -> String {
        format!("terrace_{}", self.node.domain)
    }
}

/// The line that holds this place of the text, and its key.
fn place(text: &str, at: usize) -> String {
    let number = text[..at].matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    match line.split_once('=').map(|(key, _)| key.trim()) {
        Some(key) if plain_name(key, "_-.") => format!("line {number}: {key}: "),
        _ => format!("line {number}: "),
    }
}

fn plain_name(name: &str, extra: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name
            .chars()
            .all(|char| char.is_ascii_alphanumeric() || extra.contains(char))
}

/// The library quotes the value that does not fit, which may hold a password. It comes first,
/// with a backslash before what would end it.
fn without_value(message: &str) -> String {
    let Some((before, quoted)) = message.split_once('"') else {
        return message.to_owned();
    };
    let mut escaped = false;
    let end = quoted.find(|char| {
        let ends = char == '"' && !escaped;
        escaped = char == '\\' && !escaped;
        ends
    });
    let after = end.map_or("\"", |end| &quoted[end..]);
    format!("{before}\"…{after}")
}

fn check_url(key: &str, url: &str) -> Result<(), ConfigError> {
    ConnInfo::parse(url)
        .map(drop)
        .map_err(|error| ConfigError(format!("{key}: {error}")))
}

fn is_loopback(listen: &str) -> bool {
    match listen.parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => listen.rsplit_once(':').is_some_and(|(host, _)| {
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "[node]\nname = \"a\"\ndomain = \"region\"\ndata_dir = \"/tmp/a\"\n\
        [database]\nurl = \"host=/tmp user=u dbname=d password=secret\"\n";

    #[test]
    fn sample_file_loads() {
        let config = Config::parse(include_str!("../bridge.sample.toml")).unwrap();
        assert_eq!(config.queue.retain_min, 256 << 20);
        assert_eq!(config.failover.takeover_after, Duration::from_secs(3));
        assert_eq!(config.slot_name(), "terrace_region");
    }

    #[test]
    fn a_minimal_file_has_the_sample_defaults() {
        let config = Config::parse(MINIMAL).unwrap();
        assert_eq!(config.relay.listen, "127.0.0.1:7432");
        assert!(config.apply.wait_for_upstream);
    }

    #[test]
    fn what_is_wrong_is_named_and_no_password_is_shown() {
        for (more, problem) in [
            (
                "[relay]\nlisten = \"10.0.0.1:1\"",
                "relay.auth_file is not set",
            ),
            (
                "[relay]\nlisten = \"0.0.0.0:1\"",
                "relay.auth_file is not set",
            ),
            ("[relay]\ntls_cert = \"x\"", "must be given together"),
            (
                "[queue]\nretain_min = \"12 parsecs\"",
                "line 8: retain_min: invalid size \"…\"; write it as \"256MiB\"",
            ),
            (
                "[failover]\nheartbeat = \"0s\"",
                "heartbeat: invalid duration \"…\"; write it as \"200ms\"",
            ),
            ("[failover]\nheartbeat = 5", "write it as \"200ms\""),
            (
                "[queue]\nretain_min = \"a\\\"secret\"",
                "invalid size \"…\"; write it as",
            ),
            ("[aply]", "unknown field `aply`"),
            ("[apply]\non_error = \"ignore\"", "must be \"stall\" or"),
            (
                "[peers]\nb = \"host=x pasword=secret\"",
                "unknown option \"pasword\"",
            ),
            (
                "[peers]\na = \"host=x user=u dbname=d\"",
                "this node itself",
            ),
            ("[parent]\nservers = []", "parent.servers is empty"),
            ("[http]\nlisten = 5", "line 8"),
            (
                "[parent]\nservers = \"host=x password=secret\"",
                "expected a sequence",
            ),
        ] {
            let error = Config::parse(&format!("{MINIMAL}{more}\n"))
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(problem), "{more}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let error = Config::parse(&MINIMAL.replace("region", "Région"))
            .err()
            .unwrap();
        assert!(error.to_string().contains("node.domain"), "{error}");
        let error = Config::parse("[node]").err().unwrap().to_string();
        assert!(error.contains("missing field"), "{error}");
    }
}
