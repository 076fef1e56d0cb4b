//! How a session begins: TLS, the start-up message, and who we are.

use std::io;

use bytes::{Buf, Bytes};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use tokio_rustls::TlsConnector;

use super::{Client, PgError, Result, SessionOptions, open_stream};
use crate::conninfo::{ChannelBinding, ConnInfo, SslMode};
use crate::tls;
use crate::wire::{Framed, MAX_UNAUTHENTICATED, take_cstr};

const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];

impl Client {
    pub(super) async fn start(&mut self, info: &ConnInfo, options: &SessionOptions) -> Result<()> {
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
            // By our own we are told apart; what the connection string says is for who has none.
            (
                "application_name",
                match options.application_name.as_str() {
                    "" => info.get("application_name").unwrap_or_default(),
                    own => own,
                },
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

    pub(super) async fn authenticate(&mut self, info: &ConnInfo, binding: Binding) -> Result<()> {
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
}

fn password(info: &ConnInfo) -> Result<String> {
    let password = info.password().map_err(PgError::Auth)?;
    password.ok_or_else(|| {
        let user = info.user();
        PgError::Auth(format!(
            "no password for role \"{user}\" in the connection string or passfile"
        ))
    })
}

/// What a TLS session lets SCRAM bind to.
pub(super) enum Binding {
    None,
    Hash(Vec<u8>),
}

/// A connection as `sslmode` asks for it.
pub(super) async fn secure(info: &ConnInfo, tls: bool) -> Result<(Framed, Binding)> {
    let plain = open_stream(info).await?;
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
        // A server that cannot start a session says so, and ends.
        b'E' => return Err(io::Error::other("the server takes no connection now").into()),
        _ => return Err(PgError::Protocol("unexpected answer to SSLRequest".into())),
    }
    let connector = TlsConnector::from(tls::client_config(info).map_err(PgError::Tls)?);
    let name = tls::server_name(info.host()).map_err(PgError::Tls)?;
    let stream = connector
        .connect(name, framed.into_stream()?)
        .await
        .map_err(|error| match error.kind() {
            // It went away; that says nothing of TLS.
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => PgError::Io(error),
            _ => PgError::Tls(error.to_string()),
        })?;
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
