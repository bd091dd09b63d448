//! The HTTP side: accepts connections, and ends them in order.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::faults::Faults;
use super::storage::Storage;

/// How long requests under way may take after the server was asked to end.
const GRACE: Duration = Duration::from_secs(10);
/// Between two attempts to accept, when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one server serves.
#[derive(Debug)]
pub struct Service {
    /// Where the objects are kept. It is made if it is not there.
    pub directory: PathBuf,
    /// The bucket that is made if it is not there.
    pub bucket: String,
    /// The only access key id.
    pub access_key_id: String,
    /// Its secret access key.
    pub secret_access_key: String,
    /// What goes wrong.
    pub faults: Faults,
}

/// Serves until `stop` is cancelled, then finishes the requests under way within ten seconds.
///
/// # Errors
///
/// Fails when the directory cannot be used.
pub async fn serve(
    listener: TcpListener,
    service: &Service,
    stop: CancellationToken,
) -> io::Result<()> {
    fs::create_dir_all(service.directory.join(&service.bucket))?;
    let storage = Storage::new(&service.directory, service.faults.clone())?;
    let mut builder = S3ServiceBuilder::new(storage);
    let Service { access_key_id, secret_access_key, .. } = service;
    builder.set_auth(SimpleAuth::from_single(access_key_id, secret_access_key.as_str()));
    let service = builder.build();

    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(converse(socket, service.clone(), stop.clone()));
                }
                Err(_) => sleep(ACCEPT_PAUSE).await,
            },
            Some(_) = connections.join_next() => {}
            () = stop.cancelled() => break,
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    // Those that take longer are broken off when the set is dropped.
    drop(timeout(GRACE, ended).await);
    Ok(())
}

/// Answers the requests of one connection.
async fn converse(socket: TcpStream, service: S3Service, stop: CancellationToken) {
    drop(socket.set_nodelay(true));
    let server = auto::Builder::new(TokioExecutor::new()).http1_only();
    let mut connection = pin!(server.serve_connection(TokioIo::new(socket), service));
    // How a connection ends is the client's business: some tests break it on purpose.
    tokio::select! {
        ended = connection.as_mut() => drop(ended),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            drop(connection.await);
        }
    }
}
