//! What the bridge says on stderr: each line names the server, as logs of many are read together.

use std::io::{self, Write};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// The server that a log is of, once that is known: its domain and its name.
static NAME: OnceLock<(String, String)> = OnceLock::new();

/// From now on lines say that they are of this server.
pub fn name(domain: &str, node: &str) {
    NAME.set((domain.to_owned(), node.to_owned())).ok();
}

/// Starts the log: `RUST_LOG` says of what, `TERRACE_LOG_FORMAT=json` in which form.
pub fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_timer(Signature)
        .with_env_filter(filter);
    if std::env::var("TERRACE_LOG_FORMAT").is_ok_and(|format| format == "json") {
        let logs = logs.json().with_timer(SystemTime);
        logs.with_writer(|| Named { out: io::stderr() }).init();
    } else {
        logs.with_ansi(false).with_writer(io::stderr).init();
    }
}

/// Begins each line with the time and the server.
struct Signature;

impl FormatTime for Signature {
    fn format_time(&self, line: &mut format::Writer<'_>) -> std::fmt::Result {
        SystemTime.format_time(line)?;
        match NAME.get() {
            Some((domain, node)) => write!(line, " {domain}/{node}"),
            None => Ok(()),
        }
    }
}

/// Gives each object the names as fields.
struct Named<W> {
    out: W,
}

impl<W: Write> Write for Named<W> {
    /// A line comes as one piece, and goes as one.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let named = match (NAME.get(), line.strip_prefix(b"{")) {
            (Some((domain, node)), Some(rest)) => {
                let names = serde_json::json!({ "domain": domain, "node": node }).to_string();
                let names = names.as_bytes();
                [&names[..names.len() - 1], b",", rest].concat()
            }
            _ => line.to_vec(),
        };
        self.out.write_all(&named)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_names_the_server() {
        name("region", "a\"b}");
        let mut out = Named { out: Vec::new() };
        out.write_all(b"{\"level\":\"INFO\"}\n").unwrap();
        let line: serde_json::Value = serde_json::from_slice(&out.out).unwrap();
        let wanted = serde_json::json!({ "domain": "region", "node": "a\"b}", "level": "INFO" });
        assert_eq!(line, wanted);
    }
}
