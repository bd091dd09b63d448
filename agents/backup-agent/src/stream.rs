//! The socket below a replication connection: TCP with TLS, or a Unix socket.
//!
//! Source: PostgreSQL manual, "Message Flow", section "SSL Session Encryption".

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use rustls_pki_types::ServerName;
use shared::pg::{ConnectError, Node, Settings, Tls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// How long what we sent may stay unacknowledged before the kernel gives up the connection, in
/// milliseconds.
const TCP_USER_TIMEOUT_MS: u32 = 30_000;
/// Silence after which the kernel asks whether the server is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// `SSLRequest`: its length, then the number that stands for the request.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];

/// What bytes go over.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connected socket.
pub type Stream = Box<dyn Io>;

/// Dials a server, and makes TLS with it if the settings say so. The caller bounds the time.
///
/// # Errors
///
/// The server cannot be reached, or its certificate is not accepted.
pub async fn open(settings: &Settings, node: &Node) -> Result<Stream, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { node: node.to_string(), source };
    if node.is_local() {
        let path = format!("{}/.s.PGSQL.{}", node.host, node.port);
        return Ok(Box::new(UnixStream::connect(path).await.map_err(unreachable)?));
    }
    let mut tcp = TcpStream::connect((node.host.as_str(), node.port)).await.map_err(unreachable)?;
    keep_alive(&tcp).map_err(unreachable)?;
    let Tls::VerifyFull(config) = &settings.tls else { return Ok(Box::new(tcp)) };

    tcp.write_all(&SSL_REQUEST).await.map_err(unreachable)?;
    if tcp.read_u8().await.map_err(unreachable)? != b'S' {
        return Err(ConnectError::TlsNotOffered { node: node.to_string() });
    }
    let tls_failed = |source| ConnectError::Tls { node: node.to_string(), source };
    let name = ServerName::try_from(node.host.clone())
        .map_err(|error| tls_failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let tls = TlsConnector::from(config.clone()).connect(name, tcp).await;
    Ok(Box::new(tls.map_err(|error| ConnectError::of_handshake(error, node))?))
}

fn keep_alive(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_user_timeout(tcp, TCP_USER_TIMEOUT_MS)?;
    Ok(())
}
