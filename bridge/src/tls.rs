//! TLS on both sides, by rustls with the ring provider.
//!
//! Guarantee of the client: `verify-ca` and `verify-full` accept only a chain to
//! the configured roots, `verify-full` only a certificate for the host; weaker
//! modes encrypt without knowing to whom, as libpq's do.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest, Sha256, Sha384, Sha512};

use crate::conninfo::{ConnInfo, SslMode};

/// The system's roots as a file, for programs that do not find them by themselves.
pub fn system_roots() -> Option<PathBuf> {
    openssl_probe::probe().cert_file
}

/// What went wrong, naming the file.
pub type TlsError = String;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    match read() {
        Ok(list) if list.is_empty() => Err(format!("{} holds no certificate", path.display())),
        Ok(list) => Ok(list),
        Err(error) => Err(format!(
            "cannot read certificate {}: {error}",
            path.display()
        )),
    }
}

/// As PostgreSQL (`be-secure-common.c`, `check_ssl_key_file_permissions`) and libpq have it: for the
/// owner alone; when that is root, a group may read it too.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    if let Ok(about) = std::fs::metadata(path) {
        let others = if about.uid() == 0 { 0o037 } else { 0o077 };
        if about.mode() & others != 0 {
            return Err(format!(
                "private key {} is open to others; chmod it to 0600, or 0640 if root owns it",
                path.display()
            ));
        }
    }
    PrivateKeyDer::from_pem_file(path)
        .map_err(|error| format!("cannot read private key {}: {error}", path.display()))
}

/// What is trusted, and, if a file names it, its certificates as they are there.
fn roots(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsError> {
    let mut roots = RootCertStore::empty();
    let mut named = Vec::new();
    if path == Path::new("system") {
        let native = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(native.certs);
    } else {
        named = certificates(path)?;
        for certificate in &named {
            roots
                .add(certificate.clone())
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
    }
    if roots.is_empty() {
        Err("no trusted root certificate found".into())
    } else {
        Ok((roots, named))
    }
}

/// Client configuration for `info`'s TLS options.
pub fn client_config(info: &ConnInfo) -> Result<Arc<ClientConfig>, TlsError> {
    let root_file = info.get("sslrootcert").map(Path::new);
    let verified = info.ssl_mode() >= SslMode::VerifyCa;
    let roots = match root_file {
        Some(path) => Some(roots(path)?),
        None if verified => Some(roots(Path::new("system"))?),
        None => None,
    };
    let (inner, named) = match roots {
        Some((roots, named)) => {
            let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
            let inner = builder.build().map_err(|error| error.to_string())?;
            (Some(inner), named)
        }
        None => (None, Vec::new()),
    };
    // With a root file at hand libpq verifies the authority under `require` too.
    let verifier = Verifier {
        inner,
        named,
        check_name: info.ssl_mode() == SslMode::VerifyFull,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let config = match (info.get("sslcert"), info.get("sslkey")) {
        (Some(certificate), Some(key)) => builder
            .with_client_auth_cert(
                certificates(Path::new(certificate))?,
                private_key(Path::new(key))?,
            )
            .map_err(|error| format!("client certificate {certificate}: {error}"))?,
        (None, None) => builder.with_no_client_auth(),
        _ => return Err("sslcert and sslkey must be given together".into()),
    };
    Ok(Arc::new(config))
}

/// The name that a certificate of `host` must carry.
pub fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| format!("invalid TLS host name \"{host}\""))
}

#[derive(Debug)]
struct Verifier {
    /// `None` accepts any certificate, as libpq does below `verify-ca`.
    inner: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates of `sslrootcert`.
    named: Vec<CertificateDer<'static>>,
    check_name: bool,
}

impl Verifier {
    /// Whether the server's certificate is itself the one that is trusted, as `openssl req -x509`
    /// makes it, and so one of an authority. Its dates have been looked at before it was refused
    /// for that (`check_issuer_independent_properties` of webpki).
    fn is_trusted_itself(&self, certificate: &CertificateDer<'_>, error: &Error) -> bool {
        let Error::InvalidCertificate(CertificateError::Other(error)) = error else {
            return false;
        };
        error.0.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity)
            && self.named.contains(certificate)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(inner) = &self.inner else {
            return Ok(ServerCertVerified::assertion());
        };
        match inner.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            // The chain has been verified before the name is looked at.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            Err(error) if self.is_trusted_itself(end_entity, &error) => {
                if self.check_name {
                    verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Server configuration, and the hash of its certificate for channel binding.
pub fn server_config(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<(Arc<ServerConfig>, Option<Vec<u8>>), TlsError> {
    let chain = certificates(certificate)?;
    let hash = chain.first().and_then(|first| certificate_hash(first));
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => builder.with_client_cert_verifier(
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path)?.0), provider())
                .build()
                .map_err(|error| format!("{}: {error}", path.display()))?,
        ),
    };
    let config = builder
        .with_single_cert(chain, private_key(key)?)
        .map_err(|error| format!("certificate {}: {error}", certificate.display()))?;
    Ok((Arc::new(config), hash))
}

/// `tls-server-end-point` of RFC 5929: the certificate's hash by the function of
/// its own signature, SHA-256 in place of older ones; none for Ed25519.
pub fn certificate_hash(der: &[u8]) -> Option<Vec<u8>> {
    let (certificate, _) = der_value(der, 0x30)?;
    let (_, rest) = der_value(certificate, 0x30)?;
    let (algorithm, _) = der_value(rest, 0x30)?;
    let (oid, _) = der_value(algorithm, 0x06)?;
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    let rsa = oid.strip_prefix(RSA);
    let ecdsa = oid.strip_prefix(ECDSA);
    match (rsa, ecdsa) {
        (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => Some(Sha256::digest(der).to_vec()),
        (Some([12]), _) | (_, Some([3, 3])) => Some(Sha384::digest(der).to_vec()),
        (Some([13]), _) | (_, Some([3, 4])) => Some(Sha512::digest(der).to_vec()),
        _ => None,
    }
}

/// Content of the DER value of kind `kind` at the start of `der`, and the rest.
fn der_value(der: &[u8], kind: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = der.split_first_chunk::<2>()?;
    if found != kind {
        return None;
    }
    let (len, rest) = match first {
        0..=0x7f => (first as usize, rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked((first & 0x7f) as usize)?;
            (
                digits
                    .iter()
                    .fold(0, |len, digit| len << 8 | *digit as usize),
                rest,
            )
        }
        _ => return None,
    };
    rest.split_at_checked(len)
}
