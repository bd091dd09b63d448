//! A TCP proxy whose connections are slow, stall, or break on demand.

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::background::{Background, bound_socket};

/// The most bytes read at once: small, so that a throttle and a cut are exact to about this.
const CHUNK_BYTES: usize = 16 << 10;
/// The most chunks under way in a delayed direction: 8 MiB.
const CHUNKS_UNDER_WAY: usize = 512;
/// Connections waiting to be accepted.
const BACKLOG: u32 = 128;

/// What a proxy connects to.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// `host:port`.
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl From<SocketAddr> for Upstream {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address.to_string())
    }
}

impl From<&str> for Upstream {
    fn from(address: &str) -> Self {
        Self::Tcp(address.to_owned())
    }
}

impl From<PathBuf> for Upstream {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

/// A proxy on a free port of 127.0.0.1. Dropping it breaks its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    controls: watch::Sender<Controls>,
    traffic: Arc<Traffic>,
    _background: Background,
}

/// What a test has ordered.
#[derive(Clone, Copy, Debug, Default)]
struct Controls {
    delay: Duration,
    bytes_per_second: Option<u64>,
    stalled: bool,
    refuse: bool,
    /// Connections opened under a lower number are to be broken.
    generation: u64,
    /// Connections opened under a lower number are to be lost.
    lost: u64,
}

#[derive(Debug, Default)]
struct Traffic {
    bytes: AtomicU64,
    connections: AtomicU64,
    /// When the byte count reaches this, open connections break, once.
    cut_at: Mutex<Option<u64>>,
}

impl Proxy {
    /// Starts a proxy in front of an address, or of a Unix socket given by its path.
    pub async fn start(upstream: impl Into<Upstream>) -> Self {
        let upstream = upstream.into();
        let background = Background::new("proxy");
        let (controls, orders) = watch::channel(Controls::default());
        let traffic = Arc::new(Traffic::default());
        let acceptor =
            Acceptor { upstream, orders, cut: controls.clone(), traffic: Arc::clone(&traffic) };
        let (bound, reserved) = background
            .run(async {
                // Holds the port while the listener is closed.
                let reserved = bound_socket(None);
                let address = reserved.local_addr().expect("the socket has an address");
                (address, reserved)
            })
            .await;
        let listener = background.run(async move { listen(bound) }).await;
        background.spawn(move |stop| async move {
            tokio::select! {
                () = acceptor.run(bound, listener) => {}
                () = stop.cancelled() => {}
            }
            drop(reserved);
        });
        Self { address: bound, controls, traffic, _background: background }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port of [`address`](Self::address).
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Every byte arrives this much later, in each direction. Zero ends it.
    pub fn delay(&self, delay: Duration) {
        self.controls.send_modify(|controls| controls.delay = delay);
    }

    /// Each direction of each connection carries at most this many bytes a second.
    pub fn throttle(&self, bytes_per_second: u64) {
        self.controls.send_modify(|it| it.bytes_per_second = Some(bytes_per_second));
    }

    /// Accepts connections and forwards nothing, until [`resume`](Self::resume).
    pub fn stall(&self) {
        self.controls.send_modify(|controls| controls.stalled = true);
    }

    /// Ends a [`stall`](Self::stall); what was held back arrives.
    pub fn resume(&self) {
        self.controls.send_modify(|controls| controls.stalled = false);
    }

    /// Resets the open connections and refuses new ones, until [`heal`](Self::heal).
    pub fn cut(&self) {
        self.controls.send_modify(|controls| {
            controls.generation += 1;
            controls.refuse = true;
        });
    }

    /// Resets the open connections, and takes new ones.
    pub fn reset(&self) {
        self.controls.send_modify(|controls| controls.generation += 1);
    }

    /// Loses what comes on the open connections from now on, and tells nobody: neither end is
    /// closed, whatever the other does. New connections work.
    pub fn lose(&self) {
        self.controls.send_modify(|controls| controls.lost += 1);
    }

    /// Resets the open connections, once, as soon as this many more bytes have passed in both
    /// directions of all connections together. New connections work. Exact to 16 KiB.
    pub fn cut_after(&self, bytes: u64) {
        let target = self.bytes() + bytes;
        *self.traffic.cut_at.lock().unwrap() = Some(target);
    }

    /// Ends every disturbance. Connections that were reset or lost stay so.
    pub fn heal(&self) {
        *self.traffic.cut_at.lock().unwrap() = None;
        self.controls.send_modify(|controls| {
            let Controls { generation, lost, .. } = *controls;
            *controls = Controls { generation, lost, ..Controls::default() };
        });
    }

    /// How many bytes have passed, in both directions.
    pub fn bytes(&self) -> u64 {
        self.traffic.bytes.load(Ordering::SeqCst)
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> u64 {
        self.traffic.connections.load(Ordering::SeqCst)
    }
}

fn listen(address: SocketAddr) -> TcpListener {
    bound_socket(Some(address)).listen(BACKLOG).expect("listen")
}

struct Acceptor {
    upstream: Upstream,
    orders: watch::Receiver<Controls>,
    cut: watch::Sender<Controls>,
    traffic: Arc<Traffic>,
}

impl Acceptor {
    async fn run(mut self, address: SocketAddr, first: TcpListener) {
        let mut listener = Some(first);
        let mut connections = JoinSet::new();
        loop {
            let refuse = self.orders.borrow_and_update().refuse;
            if refuse {
                listener = None;
            } else if listener.is_none() {
                listener = Some(listen(address));
            }
            tokio::select! {
                accepted = accept(listener.as_ref()) => {
                    let Ok(client) = accepted else { continue };
                    self.traffic.connections.fetch_add(1, Ordering::SeqCst);
                    connections.spawn(self.connection().carry(client, self.upstream.clone()));
                }
                changed = self.orders.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    fn connection(&self) -> Connection {
        let Controls { generation, lost, .. } = *self.orders.borrow();
        Connection {
            generation,
            lost,
            orders: self.orders.clone(),
            cut: self.cut.clone(),
            traffic: Arc::clone(&self.traffic),
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => pending().await,
    }
}

#[derive(Clone)]
struct Connection {
    generation: u64,
    lost: u64,
    orders: watch::Receiver<Controls>,
    cut: watch::Sender<Controls>,
    traffic: Arc<Traffic>,
}

impl Connection {
    async fn carry(self, client: TcpStream, upstream: Upstream) {
        // Reset, not closed in order, whenever this ends other than by both sides' wish.
        drop(client.set_zero_linger());
        drop(client.set_nodelay(true));
        let mut orders = self.orders.clone();
        let generation = self.generation;
        let broken = orders.wait_for(|controls| controls.generation != generation);
        tokio::select! {
            _ = broken => {}
            () = self.connect_and_copy(client, upstream) => {}
        }
    }

    async fn connect_and_copy(self, client: TcpStream, upstream: Upstream) {
        // A stalled network does not answer for a connection either.
        let mut orders = self.orders.clone();
        if orders.wait_for(|controls| !controls.stalled).await.is_err() {
            return;
        }
        match upstream {
            Upstream::Tcp(address) => {
                if let Ok(server) = TcpStream::connect(address).await {
                    drop(server.set_nodelay(true));
                    self.copy(client, server).await;
                }
            }
            Upstream::Unix(path) => {
                if let Ok(server) = UnixStream::connect(path).await {
                    self.copy(client, server).await;
                }
            }
        }
    }

    /// Resolves when this connection is to be lost.
    async fn lost(&self) {
        let mut orders = self.orders.clone();
        drop(orders.wait_for(|controls| controls.lost != self.lost).await);
    }

    async fn copy<S: AsyncRead + AsyncWrite>(&self, client: TcpStream, server: S) {
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_server, mut to_server) = tokio::io::split(server);
        let pumped = async {
            let up = self.pump(&mut from_client, &mut to_server);
            let down = self.pump(&mut from_server, &mut to_client);
            let (up, down) = tokio::join!(up, down);
            up.is_ok() && down.is_ok()
        };
        let in_order = tokio::select! {
            in_order = pumped => in_order,
            () = self.lost() => pending().await,
        };
        if in_order {
            // Both sides have closed in order, so that no reset is due.
            let client = from_client.unsplit(to_client);
            #[expect(deprecated, reason = "without a linger time it does not block on drop")]
            drop(client.set_linger(None));
        }
    }

    /// Copies one direction to its end. Reading and writing are apart, so that a delay moves
    /// bytes later without fewer of them arriving.
    async fn pump(
        &self,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        let (queue, mut due) = mpsc::channel::<(Instant, Bytes)>(CHUNKS_UNDER_WAY);
        let read = async move {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(CHUNK_BYTES);
                let mut limited = (&mut *source).take(CHUNK_BYTES as u64);
                if limited.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
                let at = Instant::now() + self.orders.borrow().delay;
                if queue.send((at, buffer.split().freeze())).await.is_err() {
                    return Ok(());
                }
            }
        };
        let write = async move {
            let mut orders = self.orders.clone();
            while let Some((at, chunk)) = due.recv().await {
                sleep_until(at).await;
                let wait = {
                    let controls = orders.wait_for(|controls| !controls.stalled).await;
                    let rate = controls.ok().and_then(|controls| controls.bytes_per_second);
                    rate.map(|rate| transfer_time(chunk.len(), rate))
                };
                if let Some(wait) = wait {
                    sleep(wait).await;
                }
                // Counted before, so that whoever has received them finds them counted.
                let total = self.count(chunk.len() as u64);
                sink.write_all(&chunk).await?;
                self.cut_if_due(total);
            }
            sink.shutdown().await
        };
        tokio::try_join!(read, write).map(|_| ())
    }

    /// Adds to the bytes that have passed, and returns their sum.
    fn count(&self, bytes: u64) -> u64 {
        self.traffic.bytes.fetch_add(bytes, Ordering::SeqCst) + bytes
    }

    fn cut_if_due(&self, total: u64) {
        let mut cut_at = self.traffic.cut_at.lock().unwrap();
        if cut_at.is_some_and(|target| target <= total) {
            *cut_at = None;
            self.cut.send_modify(|controls| controls.generation += 1);
        }
    }
}

/// How long `bytes` take at `bytes_per_second`.
pub(crate) fn transfer_time(bytes: usize, bytes_per_second: u64) -> Duration {
    let nanos = (bytes as u128) * 1_000_000_000 / u128::from(bytes_per_second.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
