//! Connections to PostgreSQL, with a limit on every wait.
//!
//! The client's own `connect_timeout` covers the TCP connection only: a server that accepts and
//! then says nothing would hang it for ever. So dialling, TLS and login together have one limit
//! here. A query has two: the server's `statement_timeout`, and a slightly longer one of our own
//! for a server that no longer keeps its promises.
//!
//! The server is told to notice a client that is gone as soon as we notice a server: by itself it
//! would wait for two hours, and the dead sessions would use up the role's `CONNECTION LIMIT`. A
//! kernel answers for an agent that is busy or idle, so no connection that works is ended by this.
//!
//! [`connect`] is for direct connections: PgBouncer refuses the `options` with which the timeouts are
//! set. [`connect_pooler`] goes without them.

use std::time::Duration;

use rustls::ClientConfig;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{
    Client, NoTls, Row, SimpleQueryMessage, SimpleQueryRow, Statement, ToStatement,
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

use super::error::{ConnectError, QueryError, why};
use super::guard::{Guard, Plain, Sealed};
use super::settings::{Node, Settings, Tls};

/// How much longer than the server's limit we wait, so that its own error comes first.
const STATEMENT_GRACE: Duration = Duration::from_secs(5);
/// Limit on asking the server to cancel a statement. It is a courtesy: the connection is given
/// up in any case.
const CANCEL_LIMIT: Duration = Duration::from_secs(2);
/// How long what was sent may stay unacknowledged before the kernel gives up the connection.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// Silence after which the kernel asks whether the other side is still there …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// … how long after that it asks again …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and how often before it gives up.
const KEEPALIVE_RETRIES: u32 = 3;
/// The first version that knows all of [`server_settings`]: `idle_session_timeout` is the newest.
const VERSION_MIN: u32 = 14;
/// The parameter that says which version a server is.
const VERSION: &str = "server_version";

/// A connection to one node. Dropping it closes it.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    node: Node,
    /// `server_version`, which the server says at the login.
    version: Option<String>,
    tls: Tls,
    /// Our own limit on one query.
    limit: Duration,
    /// Ends the driver without exclusive access.
    driver_abort: AbortHandle,
    /// Cancelled when the driver has ended.
    ended: CancellationToken,
    /// Owns the driver, the task that moves the bytes: it ends with this connection.
    _driver: JoinSet<()>,
}

/// Connects to `node` and logs in.
///
/// The session's `search_path` is `pg_catalog` alone, so that nobody's function of the same name
/// runs with the agent's rights; other objects need their schema in the query.
///
/// # Errors
///
/// Fails when there is no login within `settings.connect_timeout`; the error says why.
pub async fn connect(settings: &Settings, node: &Node) -> Result<Connection, ConnectError> {
    let limit = settings.connect_timeout;
    let error = match timeout(limit, dial(settings, node, &server_settings(settings))).await {
        Ok(Ok(connection)) => return Ok(connection),
        Ok(Err(error)) => error,
        Err(_) => return Err(ConnectError::TimedOut { node: node.to_string(), limit }),
    };
    // It does not know one of the settings, and refuses the login before it says which version it is.
    if error.code() == Some(&SqlState::UNDEFINED_OBJECT)
        && let Ok(Ok(connection)) = timeout(limit, Box::pin(dial(settings, node, ""))).await
        && let Some(version) = connection.version_before(VERSION_MIN)
    {
        let (node, version) = (node.to_string(), version.to_owned());
        return Err(ConnectError::TooOld { node, version, needed: VERSION_MIN });
    }
    Err(why(error, settings, node))
}

/// Connects to a `PgBouncer` and logs in: without the session settings of [`connect`], which it refuses
/// unless its `ignore_startup_parameters` has `options`, and would then drop. So the server's own
/// timeouts hold, and ours; use [`Connection::simple_query`] only, which needs no prepared statements.
///
/// # Errors
///
/// As [`connect`].
pub async fn connect_pooler(settings: &Settings, node: &Node) -> Result<Connection, ConnectError> {
    let limit = settings.connect_timeout;
    match timeout(limit, dial(settings, node, "")).await {
        Ok(connected) => connected.map_err(|error| why(error, settings, node)),
        Err(_) => Err(ConnectError::TimedOut { node: node.to_string(), limit }),
    }
}

/// Connects and logs in without a limit, with these `-c` options.
async fn dial(
    settings: &Settings,
    node: &Node,
    options: &str,
) -> Result<Connection, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    // A host that begins with `/` is taken as the directory of a Unix socket.
    config
        .host(&node.host)
        .port(node.port)
        .user(&settings.user)
        .dbname(&settings.database)
        .application_name(&settings.application_name)
        .tcp_user_timeout(TCP_USER_TIMEOUT)
        .keepalives(true)
        .keepalives_idle(KEEPALIVE_IDLE)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(KEEPALIVE_RETRIES);
    if !options.is_empty() {
        config.options(options);
    }
    if let Some(password) = &settings.password {
        config.password(password.expose());
    }

    let mut driver = JoinSet::new();
    let ended = CancellationToken::new();
    let ends = ended.clone().drop_guard();
    let tls = if node.is_local() { Tls::Disable } else { settings.tls.clone() };
    let (client, version, driver_abort) = match &tls {
        Tls::Disable if node.is_local() => {
            let (client, connection) = config.ssl_mode(SslMode::Disable).connect(NoTls).await?;
            let version = connection.parameter(VERSION).map(str::to_owned);
            (client, version, driver.spawn(drive(connection, node.name.clone(), ends)))
        }
        Tls::Disable => {
            // Without a password there is none to give away, and the client says that one is missing.
            let guard = Guard::new(settings.may_give_away(node) || settings.password.is_none());
            config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
            let (client, connection) = config.connect(Plain(guard)).await?;
            let version = connection.parameter(VERSION).map(str::to_owned);
            (client, version, driver.spawn(drive(connection, node.name.clone(), ends)))
        }
        Tls::VerifyFull(client_config) => {
            // The rustls configuration always verifies, so `require` is verify-full here.
            let connector = MakeRustlsConnect::new(ClientConfig::clone(client_config));
            let connector = Sealed(connector, Guard::new(true));
            let (client, connection) = config.ssl_mode(SslMode::Require).connect(connector).await?;
            let version = connection.parameter(VERSION).map(str::to_owned);
            (client, version, driver.spawn(drive(connection, node.name.clone(), ends)))
        }
    };
    let limit = settings.statement_timeout + STATEMENT_GRACE;
    let node = node.clone();
    Ok(Connection { client, node, version, tls, limit, driver_abort, ended, _driver: driver })
}

/// Moves bytes until the connection ends. The query under way gets the error as well, so it is
/// told here for the curious only.
async fn drive(
    connection: impl Future<Output = Result<(), tokio_postgres::Error>>,
    node: String,
    _ends: DropGuard,
) {
    if let Err(error) = connection.await {
        debug!(node, error = %crate::telemetry::chain(&error), "connection ended");
    }
}

/// The settings the server applies to the session, as `-c` options.
fn server_settings(settings: &Settings) -> String {
    format!(
        "-c statement_timeout={} -c lock_timeout={} -c search_path=pg_catalog \
         -c idle_session_timeout={} -c tcp_user_timeout={} -c tcp_keepalives_idle={} \
         -c tcp_keepalives_interval={} -c tcp_keepalives_count={KEEPALIVE_RETRIES}",
        settings.statement_timeout.as_millis(),
        settings.lock_timeout.as_millis(),
        settings.idle_session_timeout.as_millis(),
        TCP_USER_TIMEOUT.as_millis(),
        KEEPALIVE_IDLE.as_secs(),
        KEEPALIVE_INTERVAL.as_secs(),
    )
}

impl Connection {
    /// The node this connection leads to.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The server's version, such as `13.14`, if it is one before `major`.
    fn version_before(&self, major: u32) -> Option<&str> {
        let version = self.version.as_deref()?.split_whitespace().next()?;
        let number = version.split(|it: char| !it.is_ascii_digit()).next()?.parse::<u32>().ok()?;
        (number < major).then_some(version)
    }

    /// Tells whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Resolves when the connection has ended, whoever ended it.
    pub async fn closed(&self) {
        self.ended.cancelled().await;
    }

    /// Prepares what is asked again and again: its text is then sent and planned once only.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    pub async fn prepare(&self, sql: &str) -> Result<Statement, QueryError> {
        self.bounded(self.client.prepare(sql)).await
    }

    /// Runs a query, as text or prepared, and returns all its rows. Ask for bounded results only.
    ///
    /// # Errors
    ///
    /// Fails when the server refuses, the connection breaks, or there is no answer in time. In
    /// the last case the connection is closed: its state would be unknown.
    pub async fn query<S: ToStatement + Sync + ?Sized>(
        &self,
        statement: &S,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, QueryError> {
        self.bounded(self.client.query(statement, parameters)).await
    }

    /// Runs a query that returns exactly one row.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`], and when there is not exactly one row.
    pub async fn query_one<S: ToStatement + Sync + ?Sized>(
        &self,
        statement: &S,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, QueryError> {
        self.bounded(self.client.query_one(statement, parameters)).await
    }

    /// Runs statements by the simple protocol, which is all that the admin console of `PgBouncer`
    /// speaks, and returns their rows, every column as text.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    pub async fn simple_query(&self, sql: &str) -> Result<Vec<SimpleQueryRow>, QueryError> {
        let messages = self.bounded(self.client.simple_query(sql)).await?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Runs a statement and returns the number of rows it changed.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    pub async fn execute(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, QueryError> {
        self.bounded(self.client.execute(sql, parameters)).await
    }

    /// Waits for `answer` within our limit. Past it, the statement is cancelled and the
    /// connection closed: merely dropping the answer would leave the statement running and the
    /// next one waiting behind it.
    async fn bounded<T>(
        &self,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, QueryError> {
        let node = || self.node.to_string();
        if let Ok(answer) = timeout(self.limit, answer).await {
            return answer.map_err(|source| QueryError::Failed { node: node(), source });
        }
        // Apart: its size, that of a TLS handshake, is not that of every query then.
        Box::pin(self.cancel()).await;
        self.driver_abort.abort();
        Err(QueryError::TimedOut { node: node(), limit: self.limit })
    }

    /// Asks the server to cancel the statement under way. Whether it does is not known.
    pub async fn cancel(&self) {
        let token = self.client.cancel_token();
        let cancelled = timeout(CANCEL_LIMIT, async {
            match &self.tls {
                Tls::Disable if self.node.is_local() => token.cancel_query(NoTls).await,
                Tls::Disable => token.cancel_query(Plain(Guard::new(false))).await,
                Tls::VerifyFull(config) => {
                    token.cancel_query(MakeRustlsConnect::new(ClientConfig::clone(config))).await
                }
            }
        });
        if !matches!(cancelled.await, Ok(Ok(()))) {
            debug!(node = self.node.name, "statement not cancelled");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::ServerConfig;
    use rustls_pki_types::pem::PemObject;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream, UnixListener};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::server::TlsStream;

    use super::*;
    use crate::telemetry::chain;
    use crate::tls;

    fn node(host: &str, port: u16) -> Node {
        Node { group: 0, name: "postgres-1".to_owned(), host: host.to_owned(), port }
    }

    fn settings() -> Settings {
        Settings {
            user: "agent".to_owned(),
            password: None,
            database: "postgres".to_owned(),
            tls: Tls::Disable,
            allow_weak_auth: false,
            application_name: "pgmesh/test".to_owned(),
            connect_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(30),
            lock_timeout: Duration::from_secs(5),
            idle_session_timeout: Duration::ZERO,
        }
    }

    /// Settings that trust the certificates in `ca`.
    fn verify_full(ca: &str) -> Settings {
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.crt");
        std::fs::write(&ca_file, ca).unwrap();
        let tls = Tls::VerifyFull(tls::client_config(Some(&ca_file)).unwrap());
        Settings { tls, ..settings() }
    }

    /// A server on a port of its own that does `answer` with its one connection.
    async fn server<F>(answer: impl FnOnce(TcpStream) -> F + Send + 'static) -> (u16, JoinSet<()>)
    where
        F: Future<Output = ()> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut running = JoinSet::new();
        running.spawn(async move { answer(listener.accept().await.unwrap().0).await });
        (port, running)
    }

    /// Connects, and prints why it did not work, with the port as PORT.
    async fn refusal(settings: &Settings, host: &str, port: u16) -> (ConnectError, String) {
        let error = connect(settings, &node(host, port)).await.unwrap_err();
        let message = chain(&error).to_string().replace(&port.to_string(), "PORT");
        (error, message)
    }

    /// One message to the client: its type, its length, its content.
    async fn send(stream: &mut (impl AsyncWrite + Unpin), kind: u8, content: &[u8]) {
        let mut message = vec![kind];
        message.extend(u32::try_from(content.len() + 4).unwrap().to_be_bytes());
        message.extend(content);
        stream.write_all(&message).await.unwrap();
    }

    /// Reads a message without a type: the startup packet, or a request for TLS.
    async fn read_startup(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
        let mut content = vec![0; stream.read_u32().await.unwrap() as usize - 4];
        stream.read_exact(&mut content).await.unwrap();
        content
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
        assert!(error.is_transient());
        assert_eq!(
            message,
            "connect to postgres-1 (127.0.0.1:PORT): Connection refused (os error 111)"
        );
        let (error, message) = refusal(&settings(), "/nonexistent", 5432).await;
        assert!(error.is_transient());
        assert_eq!(
            message,
            "connect to postgres-1 (/nonexistent/.s.PGSQL.PORT): \
             No such file or directory (os error 2)"
        );
    }

    /// The client's own limit ends with the TCP connection.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_accepts_and_says_nothing_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
        assert!(error.is_transient());
        assert_eq!(message, "no login at postgres-1 (127.0.0.1:PORT) within 10s");
    }

    #[tokio::test]
    async fn a_refusal_by_the_server_says_what_to_change() {
        let cases = [
            (
                "28P01",
                false,
                "postgres-1 (127.0.0.1:PORT) refuses the password of role agent: \
                 no luck (SQLSTATE 28P01; detail: some detail; hint: try again)",
            ),
            (
                "28000",
                false,
                "postgres-1 (127.0.0.1:PORT) does not let role agent log in: \
                 no luck (SQLSTATE 28000; detail: some detail; hint: try again)",
            ),
            (
                "3D000",
                false,
                "postgres-1 (127.0.0.1:PORT) has no database postgres: \
                 no luck (SQLSTATE 3D000; detail: some detail; hint: try again)",
            ),
            (
                "57P03",
                true,
                "postgres-1 (127.0.0.1:PORT) takes no connections now: \
                 no luck (SQLSTATE 57P03; detail: some detail; hint: try again)",
            ),
            (
                "53300",
                true,
                "postgres-1 (127.0.0.1:PORT) takes no connections now: \
                 no luck (SQLSTATE 53300; detail: some detail; hint: try again)",
            ),
            (
                "42501",
                false,
                "postgres-1 (127.0.0.1:PORT) refuses the connection: \
                 no luck (SQLSTATE 42501; detail: some detail; hint: try again)",
            ),
        ];
        for (code, is_transient, expected) in cases {
            let (port, _running) = server(async move |mut stream| {
                read_startup(&mut stream).await;
                let fields = format!("SFATAL\0C{code}\0Mno luck\0Dsome\ndetail\0Htry again\0\0");
                send(&mut stream, b'E', fields.as_bytes()).await;
            })
            .await;
            let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
            assert_eq!(message, expected);
            assert_eq!(error.is_transient(), is_transient, "{code}");
        }
    }

    /// It refuses the login for a setting that it does not know, before it says which version it is.
    #[tokio::test]
    async fn a_server_that_is_too_old_is_named_with_its_version() {
        let unknown = "no parameter \"idle_session_timeout\"";
        let needed = "PostgreSQL 14 or later is needed, and postgres-1 (127.0.0.1:PORT) runs 13.14";
        let refused = format!(
            "postgres-1 (127.0.0.1:PORT) refuses the connection: {unknown} (SQLSTATE 42704)"
        );
        for (version, expected) in
            [("13.14 (Debian 13.14-1)", needed), ("13.14", needed), ("17.2", &refused)]
        {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut running = JoinSet::new();
            running.spawn(async move {
                let mut stream = listener.accept().await.unwrap().0;
                read_startup(&mut stream).await;
                let fields = format!("SFATAL\0C42704\0M{unknown}\0\0");
                send(&mut stream, b'E', fields.as_bytes()).await;
                let mut stream = listener.accept().await.unwrap().0;
                let startup = read_startup(&mut stream).await;
                assert!(!String::from_utf8_lossy(&startup).contains("-c "));
                send(&mut stream, b'R', &[0, 0, 0, 0]).await;
                send(&mut stream, b'S', format!("server_version\0{version}\0").as_bytes()).await;
                send(&mut stream, b'K', &[0, 0, 0, 1, 0, 0, 0, 2]).await;
                send(&mut stream, b'Z', b"I").await;
                stream.read_to_end(&mut Vec::new()).await.ok();
            });
            let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
            assert_eq!(message, expected, "{version}");
            assert!(!error.is_transient());
        }
    }

    #[tokio::test]
    async fn the_session_gets_its_limits_and_its_name() {
        let (port, mut running) = server(async |mut stream| {
            let startup = read_startup(&mut stream).await;
            let startup = String::from_utf8_lossy(&startup).into_owned();
            for setting in [
                "user\0agent\0",
                "database\0postgres\0",
                "application_name\0pgmesh/test\0",
                "options\0-c statement_timeout=30000 -c lock_timeout=5000 \
                 -c search_path=pg_catalog -c idle_session_timeout=0 -c tcp_user_timeout=30000 \
                 -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 \
                 -c tcp_keepalives_count=3\0",
            ] {
                assert!(startup.contains(setting), "{startup:?}");
            }
        })
        .await;
        let (error, _) = refusal(&settings(), "127.0.0.1", port).await;
        assert!(matches!(error, ConnectError::Broken { .. }), "{error:?}");
        running.join_next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_password_that_is_asked_for_and_not_set_is_named() {
        let (port, _running) = server(async |mut stream| {
            read_startup(&mut stream).await;
            // AuthenticationCleartextPassword.
            send(&mut stream, b'R', &[0, 0, 0, 3]).await;
        })
        .await;
        let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
        assert!(!error.is_transient());
        assert_eq!(
            message,
            "postgres-1 (127.0.0.1:PORT) asks for a password of role agent, \
             and no password_file is set"
        );
    }

    /// Its address may be anybody's.
    #[tokio::test]
    async fn a_password_is_not_given_away_without_tls_unless_that_is_allowed() {
        let password = Some(crate::secret::Secret::new("hunter2".to_owned()));
        let settings = Settings { password, ..settings() };
        for (allow_weak_auth, request, how) in [
            (false, &[0, 0, 0, 3][..], "in clear text"),
            (false, &[0, 0, 0, 5, 1, 2, 3, 4], "as an MD5 hash"),
            (true, &[0, 0, 0, 3], ""),
        ] {
            let (port, mut running) = server(async move |mut stream| {
                read_startup(&mut stream).await;
                send(&mut stream, b'R', request).await;
                let mut given = [0; 13];
                let count = stream.read(&mut given).await.unwrap();
                let expected: &[u8] = if allow_weak_auth { b"p\0\0\0\x0chunter2\0" } else { b"" };
                assert_eq!(&given[..count], expected);
            })
            .await;
            let settings = Settings { allow_weak_auth, ..settings.clone() };
            let (error, message) = refusal(&settings, "127.0.0.1", port).await;
            running.join_next().await.unwrap().unwrap();
            if allow_weak_auth {
                assert!(matches!(error, ConnectError::Broken { .. }), "{error:?}");
                continue;
            }
            assert!(!error.is_transient());
            let expected = format!(
                "postgres-1 (127.0.0.1:PORT) asks for the password of role agent {how}, and without \
                 TLS it is not given: set password_encryption and pg_hba.conf (auth_type of PgBouncer) \
                 to scram-sha-256, or use TLS"
            );
            assert_eq!(message, expected);
        }
    }

    #[tokio::test]
    async fn a_server_that_sends_without_end_is_given_up() {
        let (port, _running) = server(async |mut stream| {
            read_startup(&mut stream).await;
            send(&mut stream, b'R', &[0, 0, 0, 0]).await;
            let notice = [vec![b'N', 0, 1, 0, 4], vec![b'y'; 65_536]].concat();
            while stream.write_all(&notice).await.is_ok() {}
        })
        .await;
        let (error, message) = refusal(&settings(), "127.0.0.1", port).await;
        assert!(matches!(error, ConnectError::Broken { .. }), "{error:?}");
        assert!(message.ends_with("it sends more than 4194304 bytes"), "{message}");
    }

    /// Otherwise somebody in between could switch encryption off.
    #[tokio::test]
    async fn a_server_without_tls_is_refused_before_anything_is_sent() {
        let (port, mut running) = server(async |mut stream| {
            read_startup(&mut stream).await;
            stream.write_all(b"N").await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, b"");
        })
        .await;
        let (error, message) = refusal(&verify_full(CA), "127.0.0.1", port).await;
        assert!(!error.is_transient());
        assert_eq!(
            message,
            "postgres-1 (127.0.0.1:PORT) does not offer TLS, \
             expected it because tls is \"verify-full\""
        );
        running.join_next().await.unwrap().unwrap();
    }

    /// A server that offers TLS with [`SERVER`], then hangs up.
    async fn tls_server() -> (u16, JoinSet<()>) {
        tls_server_with(async |_| {}).await
    }

    /// A server that offers TLS with [`SERVER`] and does `answer` with whoever trusts it.
    async fn tls_server_with<F>(
        answer: impl FnOnce(TlsStream<TcpStream>) -> F + Send + 'static,
    ) -> (u16, JoinSet<()>)
    where
        F: Future<Output = ()> + Send,
    {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let certificate = CertificateDer::from_pem_slice(SERVER.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(SERVER_KEY.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        server(async move |mut stream| {
            read_startup(&mut stream).await;
            stream.write_all(b"S").await.unwrap();
            if let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await {
                answer(stream).await;
            }
        })
        .await
    }

    #[tokio::test]
    async fn a_certificate_must_be_trusted_and_name_the_host() {
        let (port, _running) = tls_server().await;
        let (error, message) = refusal(&verify_full(OTHER_CA), "localhost", port).await;
        assert!(!error.is_transient());
        assert_eq!(
            message,
            "the certificate of postgres-1 (localhost:PORT) is signed by an unknown CA, \
             expected one from ca_file or the system's roots"
        );

        let (port, _running) = tls_server().await;
        let (error, message) = refusal(&verify_full(CA), "127.0.0.1", port).await;
        assert!(!error.is_transient());
        let start = "the certificate of postgres-1 (127.0.0.1:PORT) does not name the host, \
                     expected 127.0.0.1: ";
        assert!(message.starts_with(start), "{message}");
        assert!(message.contains("\"localhost\""), "{message}");

        // Trusted and named: what follows is the login.
        let (port, _running) = tls_server().await;
        let (error, _) = refusal(&verify_full(CA), "localhost", port).await;
        assert!(matches!(error, ConnectError::Broken { .. }), "{error:?}");
    }

    /// Enough of a server for a login; then it never answers.
    async fn log_in(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
        read_startup(&mut stream).await;
        send(&mut stream, b'R', &[0, 0, 0, 0]).await;
        send(&mut stream, b'K', &[0, 0, 0, 1, 0, 0, 0, 2]).await;
        send(&mut stream, b'Z', b"I").await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
    }

    /// Without `close_notify` its end is an error to the server.
    #[tokio::test]
    async fn a_connection_that_is_dropped_says_goodbye() {
        let (port, mut running) = tls_server_with(log_in).await;
        drop(connect(&verify_full(CA), &node("localhost", port)).await.unwrap());
        running.join_next().await.unwrap().unwrap();
    }

    /// The server's `statement_timeout` is worth nothing if the server hangs.
    #[tokio::test(start_paused = true)]
    async fn a_query_without_an_answer_closes_the_connection() {
        let (port, _running) = server(log_in).await;
        let connection = connect(&settings(), &node("127.0.0.1", port)).await.unwrap();
        let error = connection.query("SELECT 1", &[]).await.unwrap_err();
        assert!(error.is_transient());
        let message = chain(&error).to_string().replace(&port.to_string(), "PORT");
        assert_eq!(message, "no answer from postgres-1 (127.0.0.1:PORT) within 35s");
        let error = connection.query("SELECT 1", &[]).await.unwrap_err();
        let message = chain(&error).to_string().replace(&port.to_string(), "PORT");
        assert_eq!(message, "query postgres-1 (127.0.0.1:PORT): connection closed");
        assert!(connection.is_closed());
    }

    #[tokio::test]
    async fn a_unix_socket_is_used_without_tls() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
        let mut running = JoinSet::new();
        running.spawn(async move {
            let mut stream = listener.accept().await.unwrap().0;
            let mut start = [0; 8];
            stream.read_exact(&mut start).await.unwrap();
            // Protocol 3.0, and not a request for TLS.
            assert_eq!(start[4..], [0, 3, 0, 0]);
        });
        let host = directory.path().to_str().unwrap();
        let error = connect(&verify_full(CA), &node(host, 5432)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Broken { .. }), "{error:?}");
        running.join_next().await.unwrap().unwrap();
    }

    /// Made for these tests, valid from 2020 to 2120; the keys of the two CAs are gone.
    const CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBTDCB86ADAgECAgEBMAoGCCqGSM49BAMCMA0xCzAJBgNVBAMMAmNhMCAXDTIw
MDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjANMQswCQYDVQQDDAJjYTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABOqht8b2Aq/FdWAG11U6WkQMQGxIqyn7+Ab7
rWCqTjtFwuBM8Hqy9jQf+dIj+2/Iwn9rnkQr9wX9iFf2B5PSm22jQjBAMA8GA1Ud
EwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgIEMB0GA1UdDgQWBBTFWfLWHR83Oki7
+53aypBTSwtJdDAKBggqhkjOPQQDAgNIADBFAiBu175RxR+b4riqKAojAZuHHQeW
vvKuKVB/h4oas4jEuwIhANHbzC3crDLsYCp/dE/0ULCvGMBsJzNXwgN/bCd4f7UJ
-----END CERTIFICATE-----
";
    const OTHER_CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBUzCB+aADAgECAgECMAoGCCqGSM49BAMCMBAxDjAMBgNVBAMMBW90aGVyMCAX
DTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAQMQ4wDAYDVQQDDAVvdGhl
cjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPAepqZzBZMp3WQ7UxUpZEnAVaVm
6WMG/6HwU7tIgoC+Na2/10qjHGQbfoqBbGzX2iGDcmYKT5rSUDjLvB3LKRGjQjBA
MA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgIEMB0GA1UdDgQWBBRTguMs
4Uu4qGMigxY4z30ayQAIvDAKBggqhkjOPQQDAgNJADBGAiEA7pK0QvZ6jBTMIvzl
23hYQd9+ORtFRIQUo+8+bKjtdtsCIQDOdKCJggAtpNz3l+Xh1vOWj52jHNJlGkeo
tpyfnqueNg==
-----END CERTIFICATE-----
";
    /// Signed by [`CA`] for the name `localhost`.
    const SERVER: &str = "\
-----BEGIN CERTIFICATE-----
MIIBcTCCARigAwIBAgIBAzAKBggqhkjOPQQDAjANMQswCQYDVQQDDAJjYTAgFw0y
MDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowETEPMA0GA1UEAwwGc2VydmVy
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEgrHQ4JCHaVjH2AfBd0E0xclN2Z7K
UrZMV9YYrTns6mUFGXhg+GEH39Q7EAzp34aqs4T8O2lHu7p8csIJKTfsWKNjMGEw
FAYDVR0RBA0wC4IJbG9jYWxob3N0MAkGA1UdEwQCMAAwHQYDVR0OBBYEFHN8wfHs
PiPNBFwe6ZEdbggw0whqMB8GA1UdIwQYMBaAFMVZ8tYdHzc6SLv7ndrKkFNLC0l0
MAoGCCqGSM49BAMCA0cAMEQCIBqXy2K4w/DEic7VPmyWSQbyeNLAEgYWPIs0gL6n
gQRMAiAnc+i0ZcGdJ6eN3EEoedilE2uiczouPvtuUa3P5CsP2g==
-----END CERTIFICATE-----
";
    const SERVER_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgArry/DSUJ3Z+46u+
kijodzbBRAvFViyDpTbutsZ8dRahRANCAASCsdDgkIdpWMfYB8F3QTTFyU3ZnspS
tkxX1hitOezqZQUZeGD4YQff1DsQDOnfhqqzhPw7aUe7unxywgkpN+xY
-----END PRIVATE KEY-----
";
}
