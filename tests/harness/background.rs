//! A runtime of its own for a server that lives inside the test's process.
//!
//! The test's own runtime has one thread, which the test may block; a server there would stop
//! answering just then.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

/// A runtime with two threads. Dropping it ends what runs on it, without waiting.
#[derive(Debug)]
pub(crate) struct Background {
    runtime: Option<Runtime>,
    stop: CancellationToken,
}

impl Background {
    /// Starts the runtime; `name` is what its threads are called.
    pub(crate) fn new(name: &str) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(name)
            .enable_all()
            .build()
            .expect("start a runtime");
        Self { runtime: Some(runtime), stop: CancellationToken::new() }
    }

    /// Runs a future to its end on this runtime; it is given a token to end by.
    pub(crate) fn spawn<F>(&self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = self.runtime.as_ref().expect("the runtime is there until it is dropped");
        runtime.spawn(task(self.stop.clone()));
    }

    /// Runs `task` on this runtime and waits for its result, from any other runtime.
    pub(crate) async fn run<T, F>(&self, task: F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let runtime = self.runtime.as_ref().expect("the runtime is there until it is dropped");
        runtime.spawn(task).await.expect("the background task did not panic")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A socket bound to a free port of 127.0.0.1, or to `address`, that may share it with sockets
/// that do not listen.
pub(crate) fn bound_socket(address: Option<SocketAddr>) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("create a socket");
    socket.set_reuseaddr(true).expect("set SO_REUSEADDR");
    socket.bind(address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)))).expect("bind a socket");
    socket
}

/// How long a flush may take before a connection is broken on purpose.
pub(crate) const FLUSH: Duration = Duration::from_millis(20);
