//! A certificate authority, and TLS in front of a server that has none.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::background::Background;
use crate::program::{directory, give_to_server_user};

/// A certificate authority and the files of what it has issued.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Authority {
    /// An authority that nobody trusts yet.
    pub fn new() -> Self {
        let directory = directory();
        let mut about = CertificateParams::default();
        about.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let name = format!("authority {}", directory.path().display());
        about.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(about, KeyPair::generate().unwrap()).unwrap();
        let authority = Self { issuer, directory };
        authority.write("ca.crt", &authority.issuer.pem());
        authority
    }

    /// Its own certificate.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// A certificate for `127.0.0.1`; `name` is who it says it is.
    pub fn issue(&self, name: &str) -> Identity {
        self.issue_for(name, SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)), 2100)
    }

    /// A certificate for another host.
    pub fn issue_for_other_host(&self, host: &str) -> Identity {
        self.issue_for(host, SanType::DnsName(host.try_into().unwrap()), 2100)
    }

    /// A certificate that ended with the year 2020.
    pub fn issue_expired(&self, name: &str) -> Identity {
        self.issue_for(name, SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)), 2021)
    }

    fn issue_for(&self, name: &str, host: SanType, ends: i32) -> Identity {
        let mut about = CertificateParams::default();
        about.distinguished_name.push(DnType::CommonName, name);
        about.subject_alt_names = vec![host];
        about.not_after = date_time_ymd(ends, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = about.signed_by(&key, &self.issuer).unwrap();
        Identity {
            certificate: self.write(&format!("{name}.crt"), &certificate.pem()),
            key: self.write(&format!("{name}.key"), &key.serialize_pem()),
        }
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        give_to_server_user(&path);
        path
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// Speaks TLS with who connects, and passes on what they say. Dropping it ends it.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    _background: Background,
}

impl TlsFront {
    /// Starts on a free port of 127.0.0.1, in front of the server at `upstream`.
    pub async fn start(identity: &Identity, upstream: SocketAddr) -> Self {
        let acceptor = TlsAcceptor::from(Arc::new(server_config(identity)));
        let background = Background::new("tls-front");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = background.run(TcpListener::bind(any_port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        background.spawn(|stop| async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
                let (acceptor, (client, _)) = (acceptor.clone(), accepted.unwrap());
                connections.spawn(pass_on(acceptor, client, upstream));
            }
        });
        Self { address, _background: background }
    }

    /// `https://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

/// How a handshake or a connection ends is the client's business.
async fn pass_on(acceptor: TlsAcceptor, client: TcpStream, upstream: SocketAddr) {
    if let Ok(mut client) = acceptor.accept(client).await
        && let Ok(mut server) = TcpStream::connect(upstream).await
    {
        drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
    }
}

fn server_config(identity: &Identity) -> ServerConfig {
    let read = |path: &Path| fs::read(path).unwrap();
    let certificate = CertificateDer::from_pem_slice(&read(&identity.certificate)).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&read(&identity.key)).unwrap();
    ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap()
}
