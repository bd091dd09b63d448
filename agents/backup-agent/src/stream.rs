//! The socket below a replication connection: TCP with TLS, or a Unix socket.
//!
//! Source: PostgreSQL manual, "Message Flow", section "SSL Session Encryption".

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use rustls_pki_types::ServerName;
use shared::pg::{ConnectError, Node, Settings, Tls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long what we sent may stay unacknowledged before the kernel gives up the connection, in
/// milliseconds.
const TCP_USER_TIMEOUT_MS: u32 = 30_000;
/// Silence after which the kernel asks whether the server is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// `SSLRequest`: its length, then the number that stands for the request.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];

/// What bytes go over.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {
    /// Stops listening until the next read. A socket that is listened to wakes the process for each
    /// message that comes, whether or not anybody wants to read it now.
    fn ignore(&mut self);
}

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
        let unix = UnixStream::connect(path).await.map_err(unreachable)?;
        return Ok(Box::new(Socket::new(unix)));
    }
    let mut tcp = TcpStream::connect((node.host.as_str(), node.port)).await.map_err(unreachable)?;
    keep_alive(&tcp).map_err(unreachable)?;
    let Tls::VerifyFull(config) = &settings.tls else { return Ok(Box::new(Socket::new(tcp))) };

    tcp.write_all(&SSL_REQUEST).await.map_err(unreachable)?;
    if tcp.read_u8().await.map_err(unreachable)? != b'S' {
        return Err(ConnectError::TlsNotOffered { node: node.to_string() });
    }
    let tls_failed = |source| ConnectError::Tls { node: node.to_string(), source };
    let name = ServerName::try_from(node.host.clone())
        .map_err(|error| tls_failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let tls = TlsConnector::from(config.clone()).connect(name, Socket::new(tcp)).await;
    Ok(Box::new(tls.map_err(|error| ConnectError::of_handshake(error, node))?))
}

fn keep_alive(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_user_timeout(tcp, TCP_USER_TIMEOUT_MS)?;
    Ok(())
}

/// A socket that is listened to, or not just now. One of the two is there.
#[derive(Debug)]
struct Socket<T: Listening> {
    listening: Option<T>,
    ignored: Option<T::Ignored>,
}

/// A socket that the runtime listens to.
trait Listening: AsyncRead + AsyncWrite + Send + Unpin + Sized {
    /// The same, which it does not listen to.
    type Ignored: Send + Unpin;

    fn ignored(self) -> io::Result<Self::Ignored>;

    fn listening(ignored: Self::Ignored) -> io::Result<Self>;
}

impl Listening for TcpStream {
    type Ignored = std::net::TcpStream;

    fn ignored(self) -> io::Result<Self::Ignored> {
        self.into_std()
    }

    fn listening(ignored: Self::Ignored) -> io::Result<Self> {
        Self::from_std(ignored)
    }
}

impl Listening for UnixStream {
    type Ignored = std::os::unix::net::UnixStream;

    fn ignored(self) -> io::Result<Self::Ignored> {
        self.into_std()
    }

    fn listening(ignored: Self::Ignored) -> io::Result<Self> {
        Self::from_std(ignored)
    }
}

impl<T: Listening> Socket<T> {
    fn new(socket: T) -> Self {
        Self { listening: Some(socket), ignored: None }
    }

    /// Listens again if it was ignored. What came meanwhile is there at once.
    fn listen(&mut self) -> io::Result<Pin<&mut T>> {
        if let Some(ignored) = self.ignored.take() {
            self.listening = Some(T::listening(ignored)?);
        }
        let listening = self.listening.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Pin::new(listening))
    }
}

impl<T: Listening> AsyncRead for Socket<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().listen()?.poll_read(cx, buffer)
    }
}

impl<T: Listening> AsyncWrite for Socket<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().listen()?.poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().listen()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().listen()?.poll_shutdown(cx)
    }
}

impl<T: Listening> Io for Socket<T> {
    fn ignore(&mut self) {
        // If it fails, the socket is gone, and the next read says so.
        self.ignored =
            self.listening.take().and_then(|it| it.ignored().ok()).or(self.ignored.take());
    }
}

impl Io for TlsStream<Socket<TcpStream>> {
    fn ignore(&mut self) {
        self.get_mut().0.ignore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_comes_while_a_socket_is_ignored_is_there_afterwards() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::new(ours);
        let mut buffer = [0; 10];
        for (sent, answer) in [(b"1", b"a"), (b"2", b"b"), (b"3", b"c")] {
            socket.ignore();
            // Twice is as good as once.
            socket.ignore();
            assert!(socket.listening.is_none());
            theirs.write_all(sent).await.unwrap();
            assert_eq!(socket.read(&mut buffer).await.unwrap(), 1);
            assert_eq!(&buffer[..1], sent);
            socket.ignore();
            socket.write_all(answer).await.unwrap();
            assert_eq!(theirs.read(&mut buffer).await.unwrap(), 1);
            assert_eq!(&buffer[..1], answer);
        }
        socket.ignore();
        drop(theirs);
        assert_eq!(socket.read(&mut buffer).await.unwrap(), 0);
    }
}
