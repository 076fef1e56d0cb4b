//! How a client of the relay is let in: TLS, then SCRAM-SHA-256.
//!
//! Guarantee: what follows [`accept`] comes from a client that proved to know
//! the password of a user of `auth_file`, over TLS when that is configured. An
//! unknown user goes through the same exchange, so that names cannot be probed.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::{Buf, BufMut, Bytes};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::tls;
use crate::upstream::BRIDGE_PARAMETER;
use crate::wire::{self, Framed, MAX_UNAUTHENTICATED, Stream, take_cstr};

const LIMIT: Duration = Duration::from_secs(10);
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
const PROTOCOL_3: u32 = 3 << 16;
const SCRAM: &str = "SCRAM-SHA-256";
const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// A stored SCRAM-SHA-256 verifier (`pg_authid.rolpassword`).
#[derive(Clone)]
struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: [u8; 32],
    server_key: [u8; 32],
}

impl Verifier {
    fn parse(text: &str) -> Option<Verifier> {
        let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored, server) = keys.split_once(':')?;
        let key = |text| BASE64_STANDARD.decode(text).ok()?.try_into().ok();
        Some(Verifier {
            iterations: iterations.parse().ok()?,
            salt: BASE64_STANDARD.decode(salt).ok()?,
            stored_key: key(stored)?,
            server_key: key(server)?,
        })
    }

    /// For a user that does not exist: always the same salt, no matching proof.
    fn fake(secret: &[u8; 32], user: &str) -> Verifier {
        let mac = hmac(secret, user.as_bytes());
        Verifier {
            iterations: 4096,
            salt: mac[..16].to_vec(),
            stored_key: mac,
            server_key: *secret,
        }
    }
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // HMAC takes keys of any length.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any key length");
    mac.update(data);
    mac.finalize().into_bytes().into()
}

/// Who may connect, and how.
pub struct Security {
    users: Option<HashMap<String, Verifier>>,
    tls: Option<TlsAcceptor>,
    certificate_hash: Option<Vec<u8>>,
    fake_secret: [u8; 32],
}

impl Security {
    /// For clients that the file system has let in already.
    pub fn trusting() -> anyhow::Result<Security> {
        Security::load(None, None, None, None)
    }

    /// Reads the files that the configuration names.
    pub fn load(
        auth_file: Option<&Path>,
        tls_cert: Option<&Path>,
        tls_key: Option<&Path>,
        tls_client_ca: Option<&Path>,
    ) -> anyhow::Result<Security> {
        let users = auth_file.map(load_users).transpose()?;
        let (tls, certificate_hash) = match (tls_cert, tls_key) {
            (Some(cert), Some(key)) => {
                let (config, hash) = tls::server_config(cert, key, tls_client_ca)
                    .map_err(|error| anyhow::anyhow!("[relay] {error}"))?;
                (Some(TlsAcceptor::from(config)), hash)
            }
            _ => (None, None),
        };
        Ok(Security {
            users,
            tls,
            certificate_hash,
            fake_secret: random()?,
        })
    }
}

fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes)
}

fn load_users(path: &Path) -> anyhow::Result<HashMap<String, Verifier>> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("read [relay] auth_file {}", path.display()))?;
    let mut users = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parts: Vec<&str> = line.split('"').collect();
        let entry = match parts[..] {
            ["", name, gap, secret, ""] if gap.trim().is_empty() => {
                Verifier::parse(secret).map(|verifier| (name.to_owned(), verifier))
            }
            _ => None,
        };
        let Some((name, verifier)) = entry else {
            bail!(
                "auth_file {} line {}: expected \"name\" \"SCRAM-SHA-256$…\"",
                path.display(),
                index + 1
            );
        };
        users.insert(name, verifier);
    }
    Ok(users)
}

/// What a connection turned out to be.
pub enum Accepted {
    /// A CancelRequest, whole but for its length: to be passed on.
    Cancel(Bytes),
    /// An authenticated session; AuthenticationOk has been sent.
    Session {
        /// The connection.
        framed: Framed,
        /// Start-up parameters.
        parameters: BTreeMap<String, String>,
    },
}

/// Lets a client in or fails; at most 10 s.
pub async fn accept(stream: Box<dyn Stream>, security: &Security) -> anyhow::Result<Accepted> {
    timeout(LIMIT, accept_untimed(stream, security))
        .await
        .context("handshake took too long")?
}

async fn accept_untimed(stream: Box<dyn Stream>, security: &Security) -> anyhow::Result<Accepted> {
    let mut framed = Framed::new(stream);
    let mut encrypted = false;
    let mut packet = loop {
        let mut packet = framed.read_startup().await?;
        match packet.get_u32() {
            SSL_REQUEST if security.tls.is_some() && !encrypted => {
                let acceptor = security.tls.clone().context("no TLS")?;
                framed.out().put_u8(b'S');
                framed.flush().await?;
                let stream = acceptor.accept(framed.into_stream()?).await?;
                framed = Framed::new(Box::new(stream));
                encrypted = true;
            }
            SSL_REQUEST | GSS_REQUEST => {
                framed.out().put_u8(b'N');
                framed.flush().await?;
            }
            CANCEL_REQUEST => return Ok(Accepted::Cancel(packet)),
            version if version >> 16 == 3 => {
                if security.tls.is_some() && !encrypted {
                    return refuse(framed, "28000", "TLS is required on this port").await;
                }
                negotiate(&mut framed, version, &packet);
                break packet;
            }
            _ => return refuse(framed, "0A000", "unsupported frontend protocol").await,
        }
    };
    let mut parameters = BTreeMap::new();
    while let Some(name) = take_cstr(&mut packet).filter(|name| !name.is_empty()) {
        let Some(value) = take_cstr(&mut packet) else {
            return refuse(framed, "08P01", "invalid startup packet").await;
        };
        parameters.insert(name, value);
    }
    let Some(user) = parameters.get("user").cloned() else {
        return refuse(framed, "28000", "no user name in startup packet").await;
    };
    if let Some(users) = &security.users {
        let verifier = users.get(&user).cloned();
        let known = verifier.is_some();
        let verifier = verifier.unwrap_or_else(|| Verifier::fake(&security.fake_secret, &user));
        let hash = security.certificate_hash.as_deref().filter(|_| encrypted);
        let proven = scram(&mut framed, &verifier, hash).await?;
        if !(proven && known) {
            let text = format!("password authentication failed for user \"{user}\"");
            return refuse(framed, "28P01", &text).await;
        }
    }
    wire::authentication(framed.out(), 0, &[]);
    Ok(Accepted::Session { framed, parameters })
}

async fn refuse(mut framed: Framed, code: &str, text: &str) -> anyhow::Result<Accepted> {
    wire::error_response(framed.out(), "FATAL", code, text, "");
    framed.flush().await.ok();
    bail!("refused: {text}")
}

/// Answers a newer minor version or unknown extensions, as PostgreSQL does.
fn negotiate(framed: &mut Framed, version: u32, packet: &Bytes) {
    let mut packet = packet.clone();
    let mut unknown = Vec::new();
    while let Some(name) = take_cstr(&mut packet).filter(|name| !name.is_empty()) {
        take_cstr(&mut packet);
        if name.starts_with("_pq_.") && name != BRIDGE_PARAMETER {
            unknown.push(name);
        }
    }
    if version != PROTOCOL_3 || !unknown.is_empty() {
        wire::put(framed.out(), b'v', |out| {
            out.put_u32(PROTOCOL_3);
            out.put_u32(unknown.len() as u32);
            unknown.iter().for_each(|name| wire::put_cstr(out, name));
        });
    }
}

/// The server's side of RFC 5802 and 7677. False for a wrong proof.
async fn scram(
    framed: &mut Framed,
    verifier: &Verifier,
    certificate_hash: Option<&[u8]>,
) -> anyhow::Result<bool> {
    let mut offered = Vec::new();
    // -PLUS is only for TLS: libpq takes the offer on plain text for an attack.
    for name in certificate_hash
        .map(|_| SCRAM_PLUS)
        .into_iter()
        .chain([SCRAM])
    {
        offered.extend_from_slice(name.as_bytes());
        offered.push(0);
    }
    offered.push(0);
    wire::authentication(framed.out(), 10, &offered);
    framed.flush().await?;
    let mut first = framed.read_message(MAX_UNAUTHENTICATED).await?;
    let mechanism = take_cstr(&mut first.body).context("SASL mechanism")?;
    if first.kind != b'p' || first.body.len() < 4 {
        bail!("unexpected message instead of SASL");
    }
    first.body.advance(4);
    let client_first = String::from_utf8(first.body.to_vec()).context("SASL message")?;
    let exchange = Exchange::start(&mechanism, &client_first, verifier, certificate_hash)?;
    wire::authentication(framed.out(), 11, exchange.server_first.as_bytes());
    framed.flush().await?;
    let last = framed.read_message(MAX_UNAUTHENTICATED).await?;
    if last.kind != b'p' {
        bail!("unexpected message instead of SASL");
    }
    let client_final = String::from_utf8(last.body.to_vec()).context("SASL message")?;
    let Some(server_final) = exchange.finish(&client_final, verifier)? else {
        return Ok(false);
    };
    wire::authentication(framed.out(), 12, server_final.as_bytes());
    Ok(true)
}

struct Exchange {
    /// Header and data that the client must repeat, base64.
    binding: String,
    nonce: String,
    client_first_bare: String,
    server_first: String,
}

impl Exchange {
    fn start(
        mechanism: &str,
        client_first: &str,
        verifier: &Verifier,
        certificate_hash: Option<&[u8]>,
    ) -> anyhow::Result<Exchange> {
        let nonce = BASE64_STANDARD.encode(random::<18>()?);
        Exchange::with_nonce(mechanism, client_first, verifier, certificate_hash, &nonce)
    }

    fn with_nonce(
        mechanism: &str,
        client_first: &str,
        verifier: &Verifier,
        certificate_hash: Option<&[u8]>,
        server_nonce: &str,
    ) -> anyhow::Result<Exchange> {
        let (flag, rest) = client_first.split_once(',').context("SCRAM flag")?;
        let (authzid, bare) = rest.split_once(',').context("SCRAM header")?;
        if !authzid.is_empty() {
            bail!("SCRAM authorization identity is not supported");
        }
        let mut binding = format!("{flag},,").into_bytes();
        match (mechanism, flag, certificate_hash) {
            (SCRAM, "n", _) | (SCRAM, "y", None) => {}
            (SCRAM_PLUS, "p=tls-server-end-point", Some(hash)) => binding.extend_from_slice(hash),
            // "y" says that we offered no channel binding; somebody removed the offer.
            _ => bail!("SCRAM channel binding does not match"),
        }
        let mut attributes = bare.split(',');
        let named = attributes.next().is_some_and(|name| name.starts_with("n="));
        let client_nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r="));
        let client_nonce = client_nonce.filter(|nonce| named && !nonce.is_empty());
        let nonce = format!("{}{server_nonce}", client_nonce.context("SCRAM nonce")?);
        let salt = BASE64_STANDARD.encode(&verifier.salt);
        Ok(Exchange {
            binding: BASE64_STANDARD.encode(binding),
            server_first: format!("r={nonce},s={salt},i={}", verifier.iterations),
            nonce,
            client_first_bare: bare.to_owned(),
        })
    }

    fn finish(&self, client_final: &str, verifier: &Verifier) -> anyhow::Result<Option<String>> {
        let (without_proof, proof) = client_final.rsplit_once(",p=").context("SCRAM proof")?;
        if without_proof != format!("c={},r={}", self.binding, self.nonce) {
            bail!("SCRAM final message does not match the exchange");
        }
        let auth = format!(
            "{},{},{without_proof}",
            self.client_first_bare, self.server_first
        );
        let signature = hmac(&verifier.stored_key, auth.as_bytes());
        let proof = BASE64_STANDARD.decode(proof).context("SCRAM proof")?;
        if proof.len() != signature.len() {
            return Ok(None);
        }
        let client_key: Vec<u8> = proof.iter().zip(signature).map(|(a, b)| a ^ b).collect();
        if !bool::from(Sha256::digest(&client_key)[..].ct_eq(&verifier.stored_key[..])) {
            return Ok(None);
        }
        let server = hmac(&verifier.server_key, auth.as_bytes());
        Ok(Some(format!("v={}", BASE64_STANDARD.encode(server))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Client, SessionOptions};
    use crate::conninfo::ConnInfo;
    use tokio::net::TcpListener;

    async fn log_in(password: &str, user: &str) -> Result<(), String> {
        let verifier = postgres_protocol::password::scram_sha_256(b"pencil");
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("users");
        fs::write(&path, format!("# users\n\"anna\" \"{verifier}\"\n")).unwrap();
        let security = Security::load(Some(&path), None, None, None).unwrap();
        log_in_to(security, &format!("user={user} password={password}")).await
    }

    async fn log_in_to(security: Security, login: &str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            if let Ok(Accepted::Session { mut framed, .. }) = accept(Box::new(tcp), &security).await
            {
                wire::ready_for_query(framed.out(), b'I');
                framed.flush().await.unwrap();
            }
        });
        let info = format!("host=127.0.0.1 port={port} dbname=d {login}");
        let info = ConnInfo::parse(&info).unwrap();
        let result = Client::connect(&info, &SessionOptions::default()).await;
        server.await.unwrap();
        result.map(drop).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn only_the_right_password_opens() {
        log_in("pencil", "anna").await.unwrap();
        for (password, user) in [("pen", "anna"), ("pencil", "otto")] {
            let error = log_in(password, user).await.unwrap_err();
            assert!(error.contains("password authentication failed"), "{error}");
        }
    }

    // A server that asks for no password used to be believed.
    #[tokio::test]
    async fn a_required_channel_binding_is_not_left_out() {
        let security = || Security::load(None, None, None, None).unwrap();
        log_in_to(security(), "user=anna").await.unwrap();
        let login = "user=anna password=pencil channel_binding=require";
        let error = log_in_to(security(), login).await.unwrap_err();
        assert!(error.contains("channel binding required"), "{error}");
    }

    #[test]
    fn the_exchange_of_rfc_7677_is_reproduced() {
        let verifier = Verifier {
            iterations: 4096,
            salt: BASE64_STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(),
            stored_key: [0; 32],
            server_key: [0; 32],
        };
        let exchange = Exchange::with_nonce(
            SCRAM,
            "n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
            &verifier,
            None,
            "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
        )
        .unwrap();
        assert_eq!(
            exchange.server_first,
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        assert_eq!(exchange.binding, "biws");
        assert!(exchange.finish("c=biws,r=other,p=AAAA", &verifier).is_err());
    }

    #[test]
    fn a_bad_line_of_the_auth_file_is_named() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("users");
        fs::write(&path, "\n\"anna\" \"md5abc\"\n").unwrap();
        let error = load_users(&path).err().unwrap().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
