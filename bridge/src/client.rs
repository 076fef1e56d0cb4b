//! A session with a Postgres or with another bridge's relay.
//!
//! One small client serves replication, apply, copy and control, because the
//! first two need the protocol as it is: CopyBoth, and pipelines whose answers
//! are counted, not awaited one by one. [`Client::message`] is cancel-safe.

mod error;
mod login;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use tokio::net::UnixStream;
use tokio::time::timeout;

pub use error::{DbError, PgError};

use crate::conninfo::{ConnInfo, SslMode};
use crate::wire::{self, Framed, MAX_MESSAGE, Message, Stream, take_cstr};

/// A row of text values.
pub type Row = Vec<Option<String>>;

type Result<T> = std::result::Result<T, PgError>;

/// How to open a session.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// `application_name`.
    pub application_name: String,
    /// `replication=database`.
    pub replication: bool,
    /// Settings for the session.
    pub gucs: Vec<(String, String)>,
    /// `options` as a client wrote it, after `gucs`.
    pub raw_options: Option<String>,
    /// UTF8 when not given.
    pub client_encoding: Option<String>,
    /// Protocol extensions to offer, `_pq_.…`.
    pub extensions: Vec<(String, String)>,
}

/// Settings of a session that takes its time, whatever the role or the database is set to.
pub const PATIENT: [(&str, &str); 5] = [
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    // What keeps people from writing is not meant for what they are to read.
    ("default_transaction_read_only", "off"),
];

/// There is no line in pg_hba.conf for this connection (invalid_authorization_specification).
const NO_ENTRY: &str = "28000";

/// An open session.
pub struct Client {
    framed: Framed,
    parameters: BTreeMap<String, String>,
    refused_extensions: Vec<String>,
    key_data: Bytes,
}

/// A plain (later perhaps encrypted) connection to the server of `info`.
pub async fn open_stream(info: &ConnInfo) -> io::Result<Box<dyn Stream>> {
    if let Some(path) = info.socket_path() {
        return Ok(Box::new(UnixStream::connect(path).await?));
    }
    let stream = wire::connect((info.address(), info.port())).await?;
    Ok(Box::new(stream))
}

impl Client {
    /// Connects and authenticates.
    pub async fn connect(info: &ConnInfo, options: &SessionOptions) -> Result<Client> {
        let limit = info.connect_timeout();
        timeout(limit, Client::connect_untimed(info, options))
            .await
            .map_err(|_| PgError::Io(io::Error::new(io::ErrorKind::TimedOut, "timed out")))?
    }

    /// Lifts the limit that newer servers know besides [`PATIENT`]; older ones would refuse it.
    pub async fn lift_transaction_limit(&mut self) -> Result<()> {
        let sql = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
                   WHERE name = 'transaction_timeout'";
        self.simple(sql).await.map(drop)
    }

    async fn connect_untimed(info: &ConnInfo, options: &SessionOptions) -> Result<Client> {
        let plain = info.ssl_mode() <= SslMode::Allow;
        match Client::connect_over(info, options, !plain).await {
            // As libpq does: a server that refuses plain text may take TLS.
            Err(PgError::Db(error)) if info.ssl_mode() == SslMode::Allow => {
                let again = Client::connect_over(info, options, true).await;
                again.map_err(|_| PgError::Db(error))
            }
            // And one that refuses TLS may take plain text.
            Err(PgError::Db(error))
                if info.ssl_mode() == SslMode::Prefer && error.code == NO_ENTRY =>
            {
                let again = Client::connect_over(info, options, false).await;
                again.map_err(|second| match second {
                    PgError::Db(second) if second.code != NO_ENTRY => PgError::Db(second),
                    _ => PgError::Db(error),
                })
            }
            result => result,
        }
    }

    async fn connect_over(info: &ConnInfo, options: &SessionOptions, tls: bool) -> Result<Client> {
        let (framed, binding) = login::secure(info, tls).await?;
        let mut client = Client {
            framed,
            parameters: BTreeMap::new(),
            refused_extensions: Vec::new(),
            key_data: Bytes::new(),
        };
        client.start(info, options).await?;
        client.authenticate(info, binding).await?;
        loop {
            let message = client.framed.read_message(MAX_MESSAGE).await?;
            match message.kind {
                b'Z' => return Ok(client),
                b'E' => return Err(PgError::from_error_response(&message.body)),
                b'K' => client.key_data = message.body,
                _ => client.note(&message),
            }
        }
    }

    /// Takes in what may come at any time.
    fn note(&mut self, message: &Message) {
        let mut body = message.body.clone();
        match message.kind {
            b'S' => {
                if let (Some(name), Some(value)) = (take_cstr(&mut body), take_cstr(&mut body)) {
                    self.parameters.insert(name, value);
                }
            }
            b'v' if body.len() >= 8 => {
                body.advance(8);
                while let Some(name) = take_cstr(&mut body) {
                    self.refused_extensions.push(name);
                }
            }
            b'N' => tracing::debug!(notice = %DbError::parse(&message.body).message, "notice"),
            _ => {}
        }
    }

    /// Value that the server reported for a setting.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// All that the server reported.
    pub fn parameters(&self) -> &BTreeMap<String, String> {
        &self.parameters
    }

    /// Body of BackendKeyData: process id and secret.
    pub fn key_data(&self) -> &Bytes {
        &self.key_data
    }

    /// Whether the other end is a bridge that took the extension on.
    pub fn extension_accepted(&self, name: &str) -> bool {
        !self
            .refused_extensions
            .iter()
            .any(|refused| refused == name)
            && self.parameter("terrace.relay").is_some()
    }

    /// Waits until the other end closes an idle session, or breaks its silence.
    pub async fn ended(&mut self) {
        // Either way the session is of no further use; why does not matter.
        self.framed.peek_kind().await.ok();
    }

    /// The connection, for passing it on whole.
    pub fn into_framed(self) -> Framed {
        self.framed
    }

    /// Outgoing bytes, for [`frontend`]'s encoders.
    pub fn buffer(&mut self) -> &mut BytesMut {
        self.framed.out()
    }

    /// Sends the outgoing bytes.
    pub async fn flush(&mut self) -> Result<()> {
        Ok(self.framed.flush().await?)
    }

    /// The same where the server may answer at length before it has taken all of them.
    pub async fn send_all(&mut self) -> Result<()> {
        Ok(self.framed.send_all().await?)
    }

    /// The next message, but for notices and the like.
    pub async fn message(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    /// The same of what has been read from the socket already.
    pub fn buffered(&mut self) -> Result<Option<Message>> {
        while let Some(message) = self.framed.buffered(MAX_MESSAGE)? {
            match message.kind {
                b'S' | b'N' => self.note(&message),
                b'A' => {}
                _ => return Ok(Some(message)),
            }
        }
        Ok(None)
    }

    /// Reads from the socket once; waits for something to come.
    pub async fn fill(&mut self) -> Result<()> {
        Ok(self.framed.fill().await?)
    }

    /// Runs statements; the rows of the last one that gave any.
    pub async fn simple(&mut self, sql: &str) -> Result<Vec<Row>> {
        frontend::query(sql, self.framed.out())?;
        self.flush().await?;
        self.rows().await.map(|(rows, _)| rows)
    }

    /// Runs one statement with text parameters.
    pub async fn query(&mut self, sql: &str, parameters: &[Option<&str>]) -> Result<Vec<Row>> {
        self.extended(sql, parameters).await.map(|(rows, _)| rows)
    }

    /// Runs one statement with text parameters; the number of affected rows.
    pub async fn execute(&mut self, sql: &str, parameters: &[Option<&str>]) -> Result<u64> {
        self.extended(sql, parameters).await.map(|(_, count)| count)
    }

    async fn extended(
        &mut self,
        sql: &str,
        parameters: &[Option<&str>],
    ) -> Result<(Vec<Row>, u64)> {
        let out = self.framed.out();
        frontend::parse("", sql, [], out)?;
        bind(
            out,
            "",
            parameters.iter().map(|value| value.map(str::as_bytes)),
        )?;
        frontend::execute("", 0, out)?;
        frontend::sync(out);
        self.flush().await?;
        self.rows().await
    }

    async fn rows(&mut self) -> Result<(Vec<Row>, u64)> {
        let (mut rows, mut count, mut failed) = (Vec::new(), 0, None);
        loop {
            let message = self.message().await?;
            match message.kind {
                b'T' => rows.clear(),
                b'D' => rows.push(row(message.body)?),
                b'C' => count = affected(&message.body),
                b'E' => {
                    let error = DbError::parse(&message.body);
                    if error.severity == "FATAL" {
                        return Err(PgError::Db(Box::new(error)));
                    }
                    failed.get_or_insert(error);
                }
                b'G' => {
                    frontend::copy_fail("COPY is not expected here", self.framed.out())?;
                    self.flush().await?;
                }
                b'Z' => {
                    return match failed {
                        Some(error) => Err(PgError::Db(Box::new(error))),
                        None => Ok((rows, count)),
                    };
                }
                _ => {}
            }
        }
    }

    async fn start_copy(&mut self, sql: &str, wanted: u8) -> Result<()> {
        frontend::query(sql, self.framed.out())?;
        self.flush().await?;
        let message = self.message().await?;
        if message.kind == wanted {
            return Ok(());
        }
        if message.kind == b'E' {
            let error = DbError::parse(&message.body);
            // A walsender that refuses goes on with ReadyForQuery, or ends.
            let drained = timeout(Duration::from_secs(5), self.rows()).await;
            drop(drained);
            return Err(PgError::Db(Box::new(error)));
        }
        Err(PgError::Protocol(format!(
            "COPY expected, got message 0x{:02x}",
            message.kind
        )))
    }

    /// Starts streaming in both directions.
    pub async fn copy_both(&mut self, sql: &str) -> Result<()> {
        self.start_copy(sql, b'W').await
    }

    /// Starts a COPY … TO STDOUT.
    pub async fn copy_out(&mut self, sql: &str) -> Result<()> {
        self.start_copy(sql, b'H').await
    }

    /// The next data of a COPY … TO STDOUT, as whole CopyData messages; `None` when it is
    /// complete.
    pub async fn copy_out_next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let messages = self.framed.read_run(b'd', MAX_MESSAGE).await?;
            if !messages.is_empty() {
                return Ok(Some(messages));
            }
            let message = self.framed.read_message(MAX_MESSAGE).await?;
            match message.kind {
                b'c' => {
                    self.rows().await?;
                    return Ok(None);
                }
                b'E' => {
                    let error = PgError::from_error_response(&message.body);
                    self.rows().await.ok();
                    return Err(error);
                }
                _ => self.note(&message),
            }
        }
    }

    /// Starts a COPY … FROM STDIN.
    pub async fn copy_in(&mut self, sql: &str) -> Result<()> {
        self.start_copy(sql, b'G').await
    }

    /// Sends data of a COPY … FROM STDIN, in whole CopyData messages.
    pub async fn copy_in_send(&mut self, messages: &[u8]) -> Result<()> {
        self.framed.out().put_slice(messages);
        if self.framed.out().len() >= 64 << 10 {
            self.send_all().await
        } else {
            Ok(())
        }
    }

    /// Ends a COPY … FROM STDIN; the number of rows.
    pub async fn copy_in_finish(&mut self) -> Result<u64> {
        frontend::copy_done(self.framed.out());
        self.flush().await?;
        self.rows().await.map(|(_, count)| count)
    }
}

/// Binds text parameters, of types that the server infers, to a statement.
pub fn bind<'a>(
    out: &mut BytesMut,
    statement: &str,
    parameters: impl Iterator<Item = Option<&'a [u8]>>,
) -> io::Result<()> {
    bind_as(out, statement, None, parameters)
}

/// Binds parameters in their binary form.
pub fn bind_binary<'a>(
    out: &mut BytesMut,
    statement: &str,
    parameters: impl Iterator<Item = &'a Bytes>,
) -> io::Result<()> {
    bind_as(
        out,
        statement,
        Some(1),
        parameters.map(|value| Some(&value[..])),
    )
}

fn bind_as<'a>(
    out: &mut BytesMut,
    statement: &str,
    format: Option<i16>,
    parameters: impl Iterator<Item = Option<&'a [u8]>>,
) -> io::Result<()> {
    let put = |value: Option<&[u8]>, out: &mut BytesMut| match value {
        None => Ok(IsNull::Yes),
        Some(value) => {
            out.extend_from_slice(value);
            Ok(IsNull::No)
        }
    };
    let bound = frontend::bind("", statement, format, parameters, put, [], out);
    bound.map_err(|error| match error {
        frontend::BindError::Conversion(error) => io::Error::other(error),
        frontend::BindError::Serialization(error) => error,
    })
}

/// Rows that a CommandComplete counts.
pub fn affected(body: &Bytes) -> u64 {
    let text = body.strip_suffix(b"\0").unwrap_or(body);
    let last = text.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    std::str::from_utf8(last)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

/// The values of a DataRow message.
pub fn row(mut body: Bytes) -> Result<Row> {
    let short = || PgError::Protocol("DataRow is cut short".into());
    let count = body.try_get_u16().map_err(|_| short())?;
    (0..count)
        .map(|_| {
            let len = body.try_get_i32().map_err(|_| short())?;
            let Ok(len) = usize::try_from(len) else {
                return Ok(None);
            };
            if body.len() < len {
                return Err(short());
            }
            Ok(Some(
                String::from_utf8_lossy(&body.split_to(len)).into_owned(),
            ))
        })
        .collect()
}

/// An SQL identifier, quoted.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A table as SQL names it.
pub fn quote_table(namespace: &str, name: &str) -> String {
    format!("{}.{}", quote_ident(namespace), quote_ident(name))
}

/// An SQL literal, quoted.
pub fn quote_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if text.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}
