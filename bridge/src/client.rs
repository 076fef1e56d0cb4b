//! A session with a Postgres or with another bridge's relay.
//!
//! One small client serves replication, apply, copy and control, because the
//! first two need the protocol as it is: CopyBoth, and pipelines whose answers
//! are counted, not awaited one by one. [`Client::message`] is cancel-safe.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::IsNull;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::conninfo::{ChannelBinding, ConnInfo, SslMode};
use crate::tls;
use crate::wire::{
    self, Framed, MAX_MESSAGE, MAX_UNAUTHENTICATED, Message, Stream, Way, take_cstr,
};

const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];

/// A row of text values.
pub type Row = Vec<Option<String>>;

/// What a server says of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DbError {
    /// ERROR, FATAL …
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// Primary message.
    pub message: String,
    /// DETAIL.
    pub detail: Option<String>,
    /// HINT.
    pub hint: Option<String>,
}

impl DbError {
    /// Reads the body of an ErrorResponse or NoticeResponse.
    pub fn parse(body: &Bytes) -> DbError {
        let mut error = DbError::default();
        let mut body = body.clone();
        while body.has_remaining() {
            let field = body.get_u8();
            let Some(value) = (field != 0).then(|| take_cstr(&mut body)).flatten() else {
                break;
            };
            match field {
                b'S' => error.severity = value,
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                _ => {}
            }
        }
        error
    }
}

impl std::fmt::Display for DbError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {hint}")?;
        }
        write!(f, " [SQLSTATE {}]", self.code)
    }
}

/// Why a session failed.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The server answered with an error.
    #[error("{0}")]
    Db(Box<DbError>),
    /// The connection failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(String),
    /// Authentication could not be completed.
    #[error("authentication: {0}")]
    Auth(String),
    /// The server sent what the protocol does not allow here.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The server replays the WAL of another one.
    #[error(
        "the server is a standby; name the primary that it follows, or promote it (a bridge that \
         waits for that goes on by itself)"
    )]
    Standby,
}

impl PgError {
    /// From the body of an ErrorResponse.
    pub fn from_error_response(body: &Bytes) -> PgError {
        PgError::Db(Box::new(DbError::parse(body)))
    }

    /// For a person, without the SQLSTATE when it comes from a server.
    pub fn message(&self) -> String {
        match self {
            PgError::Db(error) => error.message.clone(),
            error => error.to_string(),
        }
    }

    /// Nobody listens there: the host answered that, at once.
    pub fn is_refused(&self) -> bool {
        matches!(self, PgError::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// SQLSTATE, when the server gave one.
    pub fn code(&self) -> Option<&str> {
        match self {
            PgError::Db(error) => Some(&error.code),
            _ => None,
        }
    }
}

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
pub const PATIENT: [(&str, &str); 4] = [
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

/// An open session.
pub struct Client {
    framed: Framed,
    parameters: BTreeMap<String, String>,
    refused_extensions: Vec<String>,
    key_data: Bytes,
}

/// A plain (later perhaps encrypted) connection to the server of `info`.
pub async fn open_stream(info: &ConnInfo, way: Way) -> io::Result<Box<dyn Stream>> {
    if let Some(path) = info.socket_path() {
        return Ok(Box::new(UnixStream::connect(path).await?));
    }
    let stream = wire::connect((info.address(), info.port()), way).await?;
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
        let way = match options.replication {
            true => Way::Stream,
            false => Way::Requests,
        };
        let plain = info.ssl_mode() <= SslMode::Allow;
        match Client::connect_over(info, options, way, !plain).await {
            // As libpq does: a server that refuses plain text may take TLS.
            Err(PgError::Db(error)) if info.ssl_mode() == SslMode::Allow => {
                let again = Client::connect_over(info, options, way, true).await;
                again.map_err(|_| PgError::Db(error))
            }
            result => result,
        }
    }

    async fn connect_over(
        info: &ConnInfo,
        options: &SessionOptions,
        way: Way,
        tls: bool,
    ) -> Result<Client> {
        let (framed, binding) = secure(info, way, tls).await?;
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

    async fn start(&mut self, info: &ConnInfo, options: &SessionOptions) -> Result<()> {
        let gucs: Vec<String> = options
            .gucs
            .iter()
            .map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")))
            .chain(info.get("options").map(str::to_owned))
            .chain(options.raw_options.clone())
            .collect();
        let gucs = gucs.join(" ");
        let mut parameters = vec![
            ("user", info.user()),
            ("database", info.dbname()),
            (
                "client_encoding",
                options.client_encoding.as_deref().unwrap_or("UTF8"),
            ),
            (
                "application_name",
                info.get("application_name")
                    .unwrap_or(&options.application_name),
            ),
        ];
        if options.replication {
            parameters.push(("replication", "database"));
        }
        if !gucs.is_empty() {
            parameters.push(("options", &gucs));
        }
        parameters.extend(
            options
                .extensions
                .iter()
                .map(|(k, v)| (k.as_str(), v.as_str())),
        );
        frontend::startup_message(parameters, self.framed.out())?;
        self.framed.flush().await?;
        Ok(())
    }

    async fn authenticate(&mut self, info: &ConnInfo, binding: Binding) -> Result<()> {
        let mut bound = info.channel_binding() != ChannelBinding::Require;
        loop {
            let message = self.framed.read_message(MAX_UNAUTHENTICATED).await?;
            let mut body = message.body.clone();
            match message.kind {
                b'E' => return Err(PgError::from_error_response(&message.body)),
                b'R' if body.len() >= 4 => match body.get_u32() {
                    0 if bound => return Ok(()),
                    // Whoever answers may be anybody: say nothing to them.
                    0 | 3 | 5 if !bound => {
                        return Err(PgError::Auth(
                            "channel binding required, but the server authenticated us without it"
                                .into(),
                        ));
                    }
                    3 => self.send_password(&password(info)?).await?,
                    5 if body.len() == 4 => {
                        let salt = [body[0], body[1], body[2], body[3]];
                        let password = password(info)?;
                        let hash = md5_hash(info.user().as_bytes(), password.as_bytes(), salt);
                        self.send_password(&hash).await?;
                    }
                    10 => {
                        self.scram(info, &binding, &mut body).await?;
                        bound = true;
                    }
                    code => {
                        let text = format!("method {code} requested by the server is unsupported");
                        return Err(PgError::Auth(text));
                    }
                },
                _ => self.note(&message),
            }
        }
    }

    async fn send_password(&mut self, password: &str) -> Result<()> {
        frontend::password_message(password.as_bytes(), self.framed.out())?;
        Ok(self.framed.flush().await?)
    }

    async fn scram(&mut self, info: &ConnInfo, binding: &Binding, body: &mut Bytes) -> Result<()> {
        let mut offered = Vec::new();
        while let Some(mechanism) = take_cstr(body).filter(|mechanism| !mechanism.is_empty()) {
            offered.push(mechanism);
        }
        let has = |name: &str| offered.iter().any(|mechanism| mechanism == name);
        let (plus, plain) = (has(sasl::SCRAM_SHA_256_PLUS), has(sasl::SCRAM_SHA_256));
        let (channel, mechanism) = match binding {
            Binding::Hash(hash) if plus => (
                sasl::ChannelBinding::tls_server_end_point(hash.clone()),
                sasl::SCRAM_SHA_256_PLUS,
            ),
            _ if !plain => {
                return Err(PgError::Auth(
                    "the server offers no supported SASL mechanism".into(),
                ));
            }
            _ if info.channel_binding() == ChannelBinding::Require => {
                return Err(PgError::Auth(
                    "channel binding required but not offered".into(),
                ));
            }
            // We could have bound the channel; say so, to find who stripped the offer.
            Binding::Hash(_) => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
            Binding::None => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
        };
        let mut scram = sasl::ScramSha256::new(password(info)?.as_bytes(), channel);
        frontend::sasl_initial_response(mechanism, scram.message(), self.framed.out())?;
        self.framed.flush().await?;
        let auth = |error: io::Error| PgError::Auth(error.to_string());
        let challenge = self.sasl_reply(11).await?;
        scram.update(&challenge).map_err(auth)?;
        frontend::sasl_response(scram.message(), self.framed.out())?;
        self.framed.flush().await?;
        let outcome = self.sasl_reply(12).await?;
        scram.finish(&outcome).map_err(auth)
    }

    async fn sasl_reply(&mut self, wanted: u32) -> Result<Bytes> {
        let mut message = self.framed.read_message(MAX_UNAUTHENTICATED).await?;
        if message.kind == b'E' {
            return Err(PgError::from_error_response(&message.body));
        }
        if message.kind != b'R' || message.body.len() < 4 || message.body.get_u32() != wanted {
            return Err(PgError::Auth(
                "unexpected message during SASL exchange".into(),
            ));
        }
        Ok(message.body)
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

fn row(mut body: Bytes) -> Result<Row> {
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

fn password(info: &ConnInfo) -> Result<String> {
    info.password().ok_or_else(|| {
        let user = info.user();
        PgError::Auth(format!(
            "no password for role \"{user}\" in the connection string or passfile"
        ))
    })
}

/// What a TLS session lets SCRAM bind to.
enum Binding {
    None,
    Hash(Vec<u8>),
}

async fn secure(info: &ConnInfo, way: Way, tls: bool) -> Result<(Framed, Binding)> {
    let plain = open_stream(info, way).await?;
    // As libpq: no TLS over a Unix socket.
    if info.socket_path().is_some() || !tls {
        return Ok((Framed::new(plain), Binding::None));
    }
    let mut framed = Framed::new(plain);
    framed.out().extend_from_slice(SSL_REQUEST);
    framed.flush().await?;
    match framed.read_byte().await? {
        b'S' => {}
        b'N' if info.ssl_mode() == SslMode::Prefer => return Ok((framed, Binding::None)),
        b'N' => return Err(PgError::Tls("the server does not support TLS".into())),
        _ => return Err(PgError::Protocol("unexpected answer to SSLRequest".into())),
    }
    let connector = TlsConnector::from(tls::client_config(info).map_err(PgError::Tls)?);
    let name = tls::server_name(info.host()).map_err(PgError::Tls)?;
    let stream = connector
        .connect(name, framed.into_stream()?)
        .await
        .map_err(|error| PgError::Tls(error.to_string()))?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let hash = certificates
        .first()
        .and_then(|first| tls::certificate_hash(first));
    let hash = hash.filter(|_| info.channel_binding() != ChannelBinding::Disable);
    Ok((
        Framed::new(Box::new(stream)),
        hash.map_or(Binding::None, Binding::Hash),
    ))
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
