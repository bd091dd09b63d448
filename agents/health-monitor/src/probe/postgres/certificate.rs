//! Until when a server's certificate is valid, whoever signed it.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use shared::pg::{Node, Settings, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tracing::debug;

/// What a client sends that wants TLS: a length and a code.
/// Source: the manual, Message Formats, `SSLRequest`.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// What a server answers that offers it.
const OFFERED: u8 = b'S';
/// The limit on dialling and the handshake together.
const LIMIT: Duration = Duration::from_secs(3);

/// A server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The end of its validity.
    pub not_after: DateTime<Utc>,
    /// How long that is away by this host's clock; below zero it is over.
    pub left: TimeDelta,
}

/// Asks a server for its certificate. `None` where TLS is off, and where there is no handshake: that it
/// fails is for the login to say.
pub(super) async fn of_server(settings: &Settings, node: &Node) -> Option<Certificate> {
    if node.is_local() || matches!(settings.tls, Tls::Disable) {
        return None;
    }
    match timeout(LIMIT, Box::pin(handshake(node))).await {
        Ok(Ok(certificate)) => certificate,
        Ok(Err(error)) => {
            debug!(node = node.name, %error, "no certificate");
            None
        }
        Err(_) => None,
    }
}

async fn handshake(node: &Node) -> std::io::Result<Option<Certificate>> {
    let mut stream = TcpStream::connect((node.host.as_str(), node.port)).await?;
    stream.write_all(&SSL_REQUEST).await?;
    if stream.read_u8().await? != OFFERED {
        return Ok(None);
    }
    let name = ServerName::try_from(node.host.clone()).map_err(std::io::Error::other)?;
    let config = looking_only().map_err(std::io::Error::other)?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let chain = stream.get_ref().1.peer_certificates();
    let not_after = chain.and_then(<[_]>::first).and_then(not_after);
    stream.shutdown().await.ok();
    Ok(not_after.map(|not_after| Certificate { not_after, left: not_after - Utc::now() }))
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<DateTime<Utc>> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    DateTime::from_timestamp(certificate.validity().not_after.timestamp(), 0)
}

/// For a handshake after which nothing is said: it takes any certificate, to look at it.
fn looking_only() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = TakesAny(provider.signature_verification_algorithms);
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    Ok(builder.with_no_client_auth())
}

#[derive(Debug)]
struct TakesAny(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for TakesAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
