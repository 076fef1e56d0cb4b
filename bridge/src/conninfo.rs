//! libpq's connection strings, with its keys and their meaning.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A connection string that cannot be used; never holds the password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid connection string: {0}")]
pub struct ConnInfoError(String);

/// How much TLS is asked for (libpq's `sslmode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only when the server insists.
    Allow,
    /// When the server can.
    Prefer,
    /// Always, whoever the server is.
    Require,
    /// Always, and the certificate must be of a trusted authority.
    VerifyCa,
    /// As before, and it must be for this host.
    VerifyFull,
}

const KEYS: &[&str] = &[
    "host",
    "hostaddr",
    "port",
    "user",
    "dbname",
    "password",
    "passfile",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "connect_timeout",
    "application_name",
    "options",
    "channel_binding",
];

/// Whether the password exchange must be tied to the TLS session (libpq's `channel_binding`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// When both sides can.
    Prefer,
    /// Always; without it there is no session.
    Require,
}

/// Where and as whom to connect.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    values: BTreeMap<String, String>,
    port: u16,
    ssl_mode: SslMode,
    channel_binding: ChannelBinding,
}

impl ConnInfo {
    /// Reads `key = value` pairs or a `postgres://` URI.
    pub fn parse(text: &str) -> Result<ConnInfo, ConnInfoError> {
        let uri = ["postgres://", "postgresql://"]
            .iter()
            .find_map(|s| text.strip_prefix(s));
        let values = match uri {
            Some(rest) => parse_uri(rest)?,
            None => parse_pairs(text)?,
        };
        if let Some(key) = values.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(ConnInfoError(format!("unknown option \"{key}\"")));
        }
        let port = match values.get("port").map(String::as_str) {
            None | Some("") => 5432,
            Some(port) => port
                .parse()
                .map_err(|_| ConnInfoError(format!("invalid port number \"{port}\"")))?,
        };
        let ssl_mode = match values.get("sslmode").map(String::as_str) {
            None | Some("prefer") => SslMode::Prefer,
            Some("disable") => SslMode::Disable,
            Some("allow") => SslMode::Allow,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            Some(mode) => return Err(ConnInfoError(format!("invalid sslmode \"{mode}\""))),
        };
        let channel_binding = match values.get("channel_binding").map(String::as_str) {
            None | Some("prefer") => ChannelBinding::Prefer,
            Some("disable") => ChannelBinding::Disable,
            Some("require") => ChannelBinding::Require,
            Some(value) => {
                let text = format!("invalid channel_binding \"{value}\"");
                return Err(ConnInfoError(text));
            }
        };
        for required in ["user", "dbname"] {
            if !values.contains_key(required) {
                return Err(ConnInfoError(format!("missing option \"{required}\"")));
            }
        }
        let roots = values.get("sslrootcert").map_or("", String::as_str);
        if ssl_mode == SslMode::VerifyCa && ["", "system"].contains(&roots) {
            return Err(ConnInfoError(
                "sslmode=verify-ca takes any name of an authority, so it needs a file of trusted ones in \
                 sslrootcert; name it, or use verify-full"
                    .into(),
            ));
        }
        if values.get("host").is_some_and(|host| host.contains(',')) {
            return Err(ConnInfoError(
                "more than one host; list each server on its own".into(),
            ));
        }
        Ok(ConnInfo {
            values,
            port,
            ssl_mode,
            channel_binding,
        })
    }

    /// Value of a libpq option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// Host name, or directory of a Unix socket.
    pub fn host(&self) -> &str {
        self.get("host")
            .or(self.get("hostaddr"))
            .unwrap_or("localhost")
    }

    /// Address to connect to, when it is not to be looked up from the host.
    pub fn address(&self) -> &str {
        self.get("hostaddr").unwrap_or(self.host())
    }

    /// Port, or suffix of a Unix socket.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket file, when the host is a directory.
    pub fn socket_path(&self) -> Option<PathBuf> {
        let dir = self.host();
        dir.starts_with('/')
            .then(|| Path::new(dir).join(format!(".s.PGSQL.{}", self.port)))
    }

    /// `host:port`, for people.
    pub fn endpoint(&self) -> String {
        format!("{}:{}", self.host(), self.port)
    }

    /// Role.
    pub fn user(&self) -> &str {
        self.get("user").unwrap_or_default()
    }

    /// Database.
    pub fn dbname(&self) -> &str {
        self.get("dbname").unwrap_or_default()
    }

    /// TLS wanted.
    pub fn ssl_mode(&self) -> SslMode {
        self.ssl_mode
    }

    /// Channel binding wanted.
    pub fn channel_binding(&self) -> ChannelBinding {
        self.channel_binding
    }

    /// Longest time to get a session.
    pub fn connect_timeout(&self) -> Duration {
        let seconds = self
            .get("connect_timeout")
            .and_then(|value| value.parse().ok());
        Duration::from_secs(seconds.filter(|seconds| *seconds > 0).unwrap_or(10))
    }

    /// The same server as another role.
    pub fn with_user_password(&self, user: &str, password: &str) -> ConnInfo {
        let mut other = self.clone();
        other.values.insert("user".into(), user.into());
        other.values.insert("password".into(), password.into());
        other
    }

    /// The password, if there is one: given, or from the password file, which counts as it does
    /// for libpq (`fe-connect.c`, `passwordFromFile`); else what is wrong with that.
    pub fn password(&self) -> Result<Option<String>, String> {
        if let Some(password) = self.get("password") {
            return Ok(Some(password.to_owned()));
        }
        let named = std::env::var_os("PGPASSFILE").filter(|path| !path.is_empty());
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".pgpass"));
        let path = self.get("passfile").map(Into::into).or(named);
        let Some(path) = path.map(PathBuf::from).or_else(home) else {
            return Ok(None);
        };
        let Ok(text) = std::fs::read_to_string(&path) else {
            return Ok(None);
        };
        let open = |about: Metadata| about.is_file() && about.permissions().mode() & 0o077 != 0;
        if std::fs::metadata(&path).is_ok_and(open) {
            return Err(format!(
                "password file \"{}\" is open to others, and not used; chmod it to 0600",
                path.display()
            ));
        }
        let port = self.port.to_string();
        let of_host = |host: &str| {
            let wanted = [host, &port, self.dbname(), self.user()];
            text.lines()
                .find_map(|line| password_of_line(line, &wanted))
        };
        let password = of_host(self.host());
        // The usual directory of sockets, which is not the same everywhere, goes by that name.
        let is_socket = self.host().starts_with('/');
        Ok(password.or_else(|| is_socket.then(|| of_host("localhost")).flatten()))
    }

    /// The same as environment of libpq programs such as pg_dump.
    pub fn libpq_env(&self) -> Vec<(String, String)> {
        let names = [
            ("host", "PGHOST"),
            ("hostaddr", "PGHOSTADDR"),
            ("port", "PGPORT"),
            ("user", "PGUSER"),
            ("dbname", "PGDATABASE"),
            ("passfile", "PGPASSFILE"),
            ("sslmode", "PGSSLMODE"),
            ("sslrootcert", "PGSSLROOTCERT"),
            ("sslcert", "PGSSLCERT"),
            ("sslkey", "PGSSLKEY"),
            ("channel_binding", "PGCHANNELBINDING"),
            ("connect_timeout", "PGCONNECT_TIMEOUT"),
            ("options", "PGOPTIONS"),
        ];
        let mut env: Vec<(String, String)> = names
            .iter()
            .filter_map(|(key, name)| Some(((*name).to_owned(), self.get(key)?.to_owned())))
            .collect();
        // pg_dump before version 16 does not know "system", and none takes the system's roots unasked.
        if self.ssl_mode() == SslMode::VerifyFull
            && matches!(self.get("sslrootcert"), None | Some("system"))
            && let Some(bundle) = crate::tls::system_roots()
        {
            env.retain(|(name, _)| name != "PGSSLROOTCERT");
            env.push(("PGSSLROOTCERT".into(), bundle.display().to_string()));
        }
        env.extend(
            self.password()
                .unwrap_or_default()
                .map(|password| ("PGPASSWORD".to_owned(), password)),
        );
        env
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, dbname) = (self.user(), self.dbname());
        write!(
            f,
            "host={} port={} user={user} dbname={dbname}",
            self.host(),
            self.port
        )
    }
}

fn parse_pairs(text: &str) -> Result<BTreeMap<String, String>, ConnInfoError> {
    let mut values = BTreeMap::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest
            .split_once('=')
            .ok_or_else(|| ConnInfoError("missing \"=\" after an option name".into()))?;
        let key = key.trim();
        if key.contains(char::is_whitespace) {
            return Err(ConnInfoError("missing \"=\" after an option name".into()));
        }
        let (value, after) = take_value(after.trim_start())?;
        values.insert(key.to_owned(), value);
        rest = after.trim_start();
    }
    Ok(values)
}

fn take_value(text: &str) -> Result<(String, &str), ConnInfoError> {
    let (quoted, body) = match text.strip_prefix('\'') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &body[at + 1..])),
            char if !quoted && char.is_whitespace() => return Ok((value, &body[at..])),
            char => value.push(char),
        }
    }
    if quoted {
        Err(ConnInfoError("unterminated quoted value".into()))
    } else {
        Ok((value, ""))
    }
}

fn parse_uri(rest: &str) -> Result<BTreeMap<String, String>, ConnInfoError> {
    let mut values = BTreeMap::new();
    let (main, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = main.split_once('/').unwrap_or((main, ""));
    let (login, server) = match authority.rsplit_once('@') {
        Some((login, server)) => (login, server),
        None => ("", authority),
    };
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (host, port) = match server
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((host, port)) => (host, port.trim_start_matches(':')),
        None => server.rsplit_once(':').unwrap_or((server, "")),
    };
    let parts = [
        ("user", user),
        ("password", password),
        ("host", host),
        ("port", port),
        ("dbname", dbname),
    ];
    let pairs = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            pair.split_once('=')
                .ok_or_else(|| ConnInfoError("missing \"=\" in URI query".into()))
        });
    for pair in parts
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(Ok)
        .chain(pairs)
    {
        let (key, value) = pair?;
        values.insert(key.to_owned(), percent_decode(value)?);
    }
    Ok(values)
}

fn percent_decode(text: &str) -> Result<String, ConnInfoError> {
    let bad = || ConnInfoError("invalid percent-encoded token".into());
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let (digits, after) = tail.split_at_checked(2).ok_or_else(bad)?;
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
            rest = after;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Fields of a password file line; a backslash escapes what follows.
fn password_of_line(line: &str, wanted: &[&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(char) = chars.next() {
        match char {
            ':' if fields.len() < 5 => fields.push(String::new()),
            '\\' => fields.last_mut()?.extend(chars.next()),
            char => fields.last_mut()?.push(char),
        }
    }
    let [given @ .., password] = &fields[..] else {
        return None;
    };
    let matches = given.len() == 4
        && given
            .iter()
            .zip(wanted)
            .all(|(given, wanted)| given == "*" || given == wanted);
    matches.then(|| password.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_programs_are_given_the_systems_roots_as_a_file() {
        let root = |text: &str| {
            let env = ConnInfo::parse(text).unwrap().libpq_env();
            let mut root = env.into_iter().filter(|(name, _)| name == "PGSSLROOTCERT");
            let found = root.next();
            assert_eq!(root.next(), None);
            found.map(|(_, path)| path)
        };
        let system = crate::tls::system_roots().map(|path| path.display().to_string());
        let verified = "host=a user=b dbname=c sslmode=verify-full";
        // A system without such a file leaves it as it is.
        let named = system.clone().or(Some("system".to_owned()));
        assert_eq!(root(&format!("{verified} sslrootcert=system")), named);
        assert_eq!(root(verified), system);
        assert_eq!(
            root(&format!("{verified} sslrootcert=/x")),
            Some("/x".into())
        );
        assert_eq!(root("host=a user=b dbname=c"), None);
    }

    #[test]
    fn pairs_and_uris_are_read_as_libpq_does() {
        let info = ConnInfo::parse(
            "host=10.0.0.1 port = 7432 user='a b' dbname=app password='it\\'s' sslmode=verify-full",
        )
        .unwrap();
        assert_eq!(
            (info.endpoint().as_str(), info.user()),
            ("10.0.0.1:7432", "a b")
        );
        assert_eq!(info.password(), Ok(Some("it's".into())));
        assert_eq!(info.ssl_mode(), SslMode::VerifyFull);
        let uri = ConnInfo::parse("postgres://u:p%40w@[::1]:99/db?sslmode=disable").unwrap();
        assert_eq!((uri.host(), uri.port(), uri.dbname()), ("::1", 99, "db"));
        assert_eq!(uri.password(), Ok(Some("p@w".into())));
        let socket = ConnInfo::parse("host=/run/postgresql user=u dbname=d").unwrap();
        let path = socket.socket_path().unwrap();
        assert_eq!(path, Path::new("/run/postgresql/.s.PGSQL.5432"));
    }

    #[test]
    fn what_is_wrong_is_named_and_no_password_is_shown() {
        for (text, problem) in [
            (
                "host=a user=u dbname=d pasword=secret",
                "unknown option \"pasword\"",
            ),
            ("host=a dbname=d password=secret", "missing option \"user\""),
            (
                "host=a user=u dbname=d port=x password=secret",
                "invalid port number \"x\"",
            ),
            (
                "host=a user=u dbname=d sslmode=yes password=secret",
                "invalid sslmode \"yes\"",
            ),
            (
                "host=a user=u dbname=d sslmode=verify-ca password=secret",
                "needs a file",
            ),
            (
                "host=a user=u dbname=d sslmode=verify-ca sslrootcert=system password=secret",
                "needs a file",
            ),
            (
                "host=a user=u dbname=d channel_binding=yes password=secret",
                "invalid channel_binding \"yes\"",
            ),
            (
                "host=a user=u dbname='d password=secret",
                "unterminated quoted value",
            ),
            ("host a", "missing \"=\""),
        ] {
            let error = ConnInfo::parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let info = ConnInfo::parse("host=a user=u dbname=d password=secret").unwrap();
        assert!(!format!("{info} {info:?}").contains("secret"));
    }

    #[test]
    fn password_file_lines_match_with_wildcards_and_escapes() {
        let wanted = ["h", "5432", "d", "u"];
        assert_eq!(
            password_of_line("h:*:d:u:a\\:b", &wanted).as_deref(),
            Some("a:b")
        );
        assert_eq!(password_of_line("other:*:d:u:x", &wanted), None);
        assert_eq!(password_of_line("# h:*:d:u:x", &wanted), None);
    }
}
