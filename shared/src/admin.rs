//! The admin server: `/livez`, `/readyz`, `/metrics`, `/status`, and `/` where an agent has a page.
//!
//! It must answer while the agent is busy and cannot be tied up by a slow client: each connection
//! serves one request, which is there within [`REQUEST_LIMIT`] and answered within
//! [`CONNECTION_LIMIT`], and at most [`CONNECTIONS_MAX`] are served at a time; the others wait in the
//! kernel's queue. While more than half are taken, those whose request is not there within
//! [`CROWDED_LIMIT`] make room: so silent clients hold up the others for moments.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::header::{
    ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{Html, IntoResponse, Json, Response};
use axum::routing::get;
use axum::serve::Listener;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;

use crate::metrics;

/// A request must be there so long after its connection: a client sends it at once, and it is small.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// The same while more than half of the connections are taken.
pub const CROWDED_LIMIT: Duration = Duration::from_millis(100);

/// An answer must be read so long after its first byte. Answers are small and made from memory, so
/// this is for the network alone; it is above Prometheus' default scrape timeout of 10 s.
pub const CONNECTION_LIMIT: Duration = Duration::from_secs(15);

/// Most connections served at a time: a few scrapers, the container's health check and a person.
pub const CONNECTIONS_MAX: usize = 32;

/// A bound admin server, not yet serving.
pub struct Admin {
    listener: TcpListener,
    router: Router,
}

impl Admin {
    /// Listens on `address`. Connections wait until [`Admin::serve`].
    ///
    /// `not_ready` returns the reasons why the agent cannot do its work now; none means ready.
    /// `status` returns what `/status` shows. Both are called for each request and must return
    /// at once: they read what the agent's loop has published and ask nobody.
    ///
    /// # Errors
    ///
    /// Fails when the address cannot be bound.
    pub async fn bind(
        address: SocketAddr,
        registry: Registry,
        not_ready: impl Fn() -> Vec<String> + Send + Sync + 'static,
        status: impl Fn() -> Value + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let registry = Arc::new(registry);
        let not_ready = Arc::new(not_ready);
        let status = Arc::new(status);
        let router = Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(async move || readyz(&not_ready())))
            .route("/metrics", get(async move |headers: HeaderMap| exposition(&registry, &headers)))
            .route("/status", get(async move || Json(status())))
            .layer(axum::middleware::map_response(close_after));
        Ok(Self { listener, router })
    }

    /// Adds the page `/` for people.
    ///
    /// `policy` is its `Content-Security-Policy`; one that is no header value allows nothing. `render`
    /// is called for each request and must return at once, like what [`Admin::bind`] takes.
    pub fn with_page(
        self,
        policy: &str,
        render: impl Fn() -> String + Clone + Send + Sync + 'static,
    ) -> Self {
        let nothing = HeaderValue::from_static("default-src 'none'");
        let headers = [
            (CONTENT_SECURITY_POLICY, HeaderValue::from_str(policy).unwrap_or(nothing)),
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        ];
        let page = get(async move || (headers.clone(), Html(render())));
        let page = page.layer(axum::middleware::map_response(close_after));
        Self { router: self.router.route("/", page), ..self }
    }

    /// The address bound, with the port the system chose if 0 was asked for.
    ///
    /// # Errors
    ///
    /// Fails when the operating system does not tell.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then finishes the requests under way.
    ///
    /// # Errors
    ///
    /// Never at present: a connection that cannot be accepted is tried again.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        axum::serve(Bounded { listener: self.listener, slots }, self.router)
            .with_graceful_shutdown(shutdown.cancelled_owned())
            .await?;
        Ok(())
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("listener", &self.listener).finish_non_exhaustive()
    }
}

fn readyz(reasons: &[String]) -> Response {
    if reasons.is_empty() {
        return "ready\n".into_response();
    }
    let text = reasons.join("\n") + "\n";
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

/// OpenMetrics, unless only the older text format is accepted by name.
fn exposition(registry: &Registry, headers: &HeaderMap) -> Response {
    let accepts = |kind| {
        let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|it| it.to_str().ok());
        accepted.any(|accepted| accepted.contains(kind))
    };
    let is_classic = accepts("text/plain") && !accepts("openmetrics");
    match metrics::encode(registry) {
        Ok(text) if is_classic => {
            ([(CONTENT_TYPE, metrics::CLASSIC_CONTENT_TYPE)], metrics::classic(&text))
                .into_response()
        }
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(fmt::Error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "a collector cannot be encoded\n").into_response()
        }
    }
}

/// Ends the connection after this response, so that an idle client holds no slot.
async fn close_after(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Accepts a connection only when a slot is free.
struct Bounded {
    listener: TcpListener,
    slots: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        // The semaphore is never closed; without a slot the connection would be unbounded.
        let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else {
            return std::future::pending().await;
        };
        // axum's own `accept` tries again after an error, for example too many open files.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let stream = BoundedStream {
            stream,
            ends_at: Instant::now() + REQUEST_LIMIT,
            next_look: Box::pin(sleep(CROWDED_LIMIT)),
            is_answered: false,
            slots: Arc::clone(&self.slots),
            _slot: slot,
        };
        (stream, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails once its time is up, and gives its slot back when it is dropped.
struct BoundedStream {
    stream: TcpStream,
    ends_at: Instant,
    /// When to see whether its time is up, or others need its slot.
    next_look: Pin<Box<Sleep>>,
    /// Whether the request was there: only then is anything written.
    is_answered: bool,
    slots: Arc<Semaphore>,
    _slot: OwnedSemaphorePermit,
}

impl BoundedStream {
    fn check_limit(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.next_look.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            let is_crowded = self.slots.available_permits() < CONNECTIONS_MAX / 2;
            if self.ends_at <= now || (is_crowded && !self.is_answered) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.next_look.as_mut().reset(self.ends_at.min(now + CROWDED_LIMIT));
        }
        Ok(())
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_limit(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.ends_at = Instant::now() + CONNECTION_LIMIT;
        }
        self.check_limit(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_limit(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_limit(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::tasks::Tasks;

    const POLICY: &str = "default-src 'none'; script-src 'sha256-abc='";

    struct Server {
        address: SocketAddr,
        reasons: Arc<Mutex<Vec<String>>>,
        _tasks: Tasks,
    }

    async fn server() -> Server {
        let reasons = Arc::new(Mutex::new(Vec::new()));
        let mut registry = metrics::registry();
        metrics::build_info(&mut registry, "agent", "1.0");
        let not_ready = {
            let reasons = Arc::clone(&reasons);
            move || reasons.lock().unwrap().clone()
        };
        let any_port = "127.0.0.1:0".parse().unwrap();
        let admin =
            Admin::bind(any_port, registry, not_ready, || json!({"turns": 3})).await.unwrap();
        let admin = admin.with_page(POLICY, || "<!doctype html>".to_owned());
        let address = admin.local_address().unwrap();
        let mut tasks = Tasks::default();
        tasks.spawn("admin", |shutdown| admin.serve(shutdown));
        Server { address, reasons, _tasks: tasks }
    }

    /// The status line, the headers and the body of the answer to GET `path`.
    async fn get(address: SocketAddr, path: &str) -> (String, String) {
        get_as(address, path, "*/*").await
    }

    async fn get_as(address: SocketAddr, path: &str, accept: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nAccept: {accept}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn each_path_answers_and_closes() {
        let server = server().await;
        for (path, status, content_type, body) in [
            ("/livez", "200 OK", "text/plain; charset=utf-8", "ok\n"),
            ("/readyz", "200 OK", "text/plain; charset=utf-8", "ready\n"),
            ("/status", "200 OK", "application/json", "{\"turns\":3}"),
            (
                "/metrics",
                "200 OK",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                "# HELP pgmesh_build_info Which agent runs here, and its version.\n\
                 # TYPE pgmesh_build_info gauge\n\
                 pgmesh_build_info{service=\"agent\",version=\"1.0\"} 1\n\
                 # EOF\n",
            ),
        ] {
            let (head, answered) = get(server.address, path).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{path}: {head}");
            assert!(head.contains(&format!("content-type: {content_type}")), "{path}: {head}");
            assert_eq!(answered, body, "{path}");
        }
        let (head, _) = get(server.address, "/secrets").await;
        assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    }

    #[tokio::test]
    async fn a_page_is_sent_with_what_it_may_do() {
        let (head, body) = get(server().await.address, "/").await;
        assert_eq!(body, "<!doctype html>");
        for line in [
            "content-type: text/html; charset=utf-8",
            &format!("content-security-policy: {POLICY}"),
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
            "connection: close",
        ] {
            assert!(head.lines().any(|it| it == line), "no {line} in {head}");
        }
        let any_port = "127.0.0.1:0".parse().unwrap();
        let bound = || Admin::bind(any_port, metrics::registry(), Vec::new, || Value::Null);
        for (policy, with_page, expected) in [
            ("", false, "HTTP/1.1 404"),
            ("a\r\nb: c", true, "content-security-policy: default-src 'none'\r\n"),
        ] {
            let admin = bound().await.unwrap();
            let admin = if with_page { admin.with_page(policy, String::new) } else { admin };
            let address = admin.local_address().unwrap();
            let mut tasks = Tasks::default();
            tasks.spawn("admin", |shutdown| admin.serve(shutdown));
            let (head, _) = get(address, "/").await;
            assert!(head.contains(expected), "{policy:?}: {head}");
        }
    }

    #[tokio::test]
    async fn who_accepts_the_older_format_only_gets_it() {
        let server = server().await;
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.4";
        for (accept, content_type) in [
            ("text/plain", metrics::CLASSIC_CONTENT_TYPE),
            ("*/*", metrics::CONTENT_TYPE),
            (prometheus, metrics::CONTENT_TYPE),
        ] {
            let (head, body) = get_as(server.address, "/metrics", accept).await;
            assert!(head.contains(&format!("content-type: {content_type}")), "{accept}: {head}");
            let is_open = content_type == metrics::CONTENT_TYPE;
            assert_eq!(body.ends_with("# EOF\n"), is_open, "{accept}");
        }
    }

    #[tokio::test]
    async fn an_agent_that_is_not_ready_says_why_and_stays_alive() {
        let server = server().await;
        *server.reasons.lock().unwrap() = vec!["no primary".to_owned(), "no bucket".to_owned()];
        let (head, body) = get(server.address, "/readyz").await;
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert_eq!(body, "no primary\nno bucket\n");
        assert!(get(server.address, "/livez").await.0.starts_with("HTTP/1.1 200"));
    }

    /// Without a limit, silent clients would take every slot for good.
    #[tokio::test]
    async fn silent_clients_lose_their_slots() {
        let server = server().await;
        let mut silent = Vec::new();
        for index in 0..5 * CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            if index % 2 == 0 {
                stream.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
            }
            silent.push(stream);
        }
        let asked_at = Instant::now();
        let (head, _) = get(server.address, "/livez").await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(asked_at.elapsed() < REQUEST_LIMIT, "{:?}", asked_at.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_slow_has_a_while_if_nobody_needs_the_slot() {
        let server = server().await;
        let mut slow = TcpStream::connect(server.address).await.unwrap();
        slow.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
        sleep(10 * CROWDED_LIMIT).await;
        slow.write_all(b"Host: agent\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        let connected_at = Instant::now();
        assert!(!matches!(silent.read(&mut [0]).await, Ok(1..)));
        assert!(connected_at.elapsed() < 2 * REQUEST_LIMIT, "{:?}", connected_at.elapsed());
    }

    #[tokio::test]
    async fn shutdown_ends_the_server() {
        let any_port = "127.0.0.1:0".parse().unwrap();
        let admin =
            Admin::bind(any_port, metrics::registry(), Vec::new, || Value::Null).await.unwrap();
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        admin.serve(shutdown).await.unwrap();
    }
}
