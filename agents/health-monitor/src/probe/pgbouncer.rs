//! `PgBouncer`, by its admin console and through a pool.
//!
//! Both by the simple protocol and without session settings, so nothing needs to be configured there but
//! the user: in `stats_users`, and in the `auth_file` or found by `auth_query`.

use std::time::Duration;

use shared::pg::{Connection, Node, QueryError, Settings, Tls, TlsMode, connect_pooler};
use shared::telemetry::chain;
use shared::tls;
use tokio::time::{Instant, timeout};
use tokio_postgres::SimpleQueryRow;

use super::postgres::failure::of_connect;
use super::{Probe, SetupError};
use crate::config::PgbouncerConfig;
use crate::facts::{Failure, Stage};

/// The database of the admin console, and of the pool that stands for it.
const CONSOLE: &str = "pgbouncer";
/// The part of the caller's limit that the query may take, so that what the console says is not lost
/// with it.
const QUERY_PART: f64 = 0.8;

/// What a `PgBouncer` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgbouncerFacts {
    /// Its version.
    pub version: String,
    /// Clients connected, and how many may be.
    pub clients: (u32, u32),
    /// The pools that have clients or servers.
    pub pools: Vec<Pool>,
    /// What came of the query through the pool, or why there was no answer; `None` if none is
    /// configured.
    pub query: Option<Result<PoolAnswer, Failure>>,
}

/// A row of `SHOW POOLS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The database.
    pub database: String,
    /// The user.
    pub user: String,
    /// Clients that wait.
    pub waiting: u32,
    /// How long the first of them has.
    pub max_wait: Duration,
    /// A client keeps its server until it leaves: `pool_mode` is `session`.
    pub is_by_session: bool,
}

/// The answer of the server behind a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolAnswer {
    /// How long it took, with the login if there was one.
    pub took: Duration,
    /// The server is a standby.
    pub in_recovery: bool,
}

/// Asks one `PgBouncer`.
#[derive(Debug)]
pub struct PgbouncerProbe {
    node: Node,
    console: Settings,
    pool: Option<Settings>,
    limit: Duration,
    kept_console: Option<Connection>,
    kept_query: Option<Connection>,
}

impl PgbouncerProbe {
    /// Reads the password and the certificates. `limit` is the caller's on one question.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be used.
    pub fn new(config: &PgbouncerConfig, limit: Duration) -> Result<Self, SetupError> {
        let key = |key: &str| format!("pgbouncer {}: {key}", config.name);
        let tls = match config.tls {
            TlsMode::Disable => Tls::Disable,
            TlsMode::VerifyFull => Tls::VerifyFull(
                tls::client_config(config.ca_file.as_deref())
                    .map_err(|source| SetupError::Certificates { key: key("ca_file"), source })?,
            ),
        };
        let console = Settings {
            user: config.user.clone(),
            password: SetupError::secret(config.password_file.as_deref(), || key("password_file"))?,
            database: CONSOLE.to_owned(),
            tls,
            allow_weak_auth: config.allow_weak_auth,
            application_name: "pgmesh/health-monitor".to_owned(),
            connect_timeout: limit,
            statement_timeout: limit,
            lock_timeout: limit,
            idle_session_timeout: Duration::ZERO,
        };
        let pool = config.database.as_ref();
        let pool = pool.map(|database| Settings { database: database.clone(), ..console.clone() });
        let (group, name) = (config.group, config.name.clone());
        let node = Node { group, name, host: config.host.clone(), port: config.port };
        Ok(Self { node, console, pool, limit, kept_console: None, kept_query: None })
    }

    async fn ask_console(
        &self,
        kept: Option<Connection>,
    ) -> Result<(Connection, Console), Failure> {
        // A kept connection that ends proves nothing: it may have been restarted.
        if let Some(connection) = kept
            && let Ok(console) = read_console(&connection).await
        {
            return Ok((connection, console));
        }
        let connected = connect_pooler(&self.console, &self.node).await;
        let connection = connected.map_err(|error| of_connect(&error))?;
        let console = read_console(&connection).await?;
        Ok((connection, console))
    }

    async fn ask_pool(
        &self,
        settings: &Settings,
        kept: Option<Connection>,
    ) -> Result<(Connection, PoolAnswer), Failure> {
        let began_at = Instant::now();
        let asked = async {
            if let Some(connection) = kept
                && let Ok(in_recovery) = read_recovery(&connection).await
            {
                return Ok((connection, in_recovery));
            }
            let connected = connect_pooler(settings, &self.node).await;
            let connection = connected.map_err(|error| of_connect(&error))?;
            let in_recovery = read_recovery(&connection).await?;
            Ok((connection, in_recovery))
        };
        let limit = self.limit.mul_f64(QUERY_PART);
        let (connection, in_recovery) = timeout(limit, asked).await.unwrap_or_else(|_| {
            let limit = humantime::format_duration(limit);
            Err(Failure { stage: Stage::Timeout, error: format!("no answer within {limit}") })
        })?;
        Ok((connection, PoolAnswer { took: began_at.elapsed(), in_recovery }))
    }
}

impl Probe for PgbouncerProbe {
    type Facts = PgbouncerFacts;

    async fn ask(&mut self) -> Result<PgbouncerFacts, Failure> {
        let (console, query) = (self.kept_console.take(), self.kept_query.take());
        let pool = async {
            match &self.pool {
                Some(settings) => Some(self.ask_pool(settings, query).await),
                None => None,
            }
        };
        let (console, query) = tokio::join!(self.ask_console(console), Box::pin(pool));
        let (connection, console) = console?;
        let (kept_query, query) = match query {
            Some(Ok((connection, answer))) => (Some(connection), Some(Ok(answer))),
            Some(Err(failure)) => (None, Some(Err(failure))),
            None => (None, None),
        };
        self.kept_console = Some(connection);
        // Kept, it would keep a server of the pool from the others.
        self.kept_query = kept_query.filter(|_| !self.is_by_session(&console.pools));
        let Console { version, clients, pools } = console;
        Ok(PgbouncerFacts { version, clients, pools, query })
    }
}

impl PgbouncerProbe {
    /// Whether the pool that the query goes through is by session, or not known. Its user may be
    /// another than ours, where the database has one of its own.
    fn is_by_session(&self, pools: &[Pool]) -> bool {
        let Some(settings) = &self.pool else { return true };
        let mut ours = pools.iter().filter(|it| it.database == settings.database).peekable();
        ours.peek().is_none() || ours.any(|it| it.is_by_session)
    }
}

/// What the admin console says.
struct Console {
    version: String,
    clients: (u32, u32),
    pools: Vec<Pool>,
}

async fn read_console(connection: &Connection) -> Result<Console, Failure> {
    let version = show(connection, "SHOW VERSION").await?;
    let pools = show(connection, "SHOW POOLS").await?;
    let lists = show(connection, "SHOW LISTS").await?;
    let config = show(connection, "SHOW CONFIG").await?;
    let item = |name: &str| value(&lists, ("list", name), "items").and_then(number);
    let used = item("used_clients").zip(item("login_clients")).map(|(used, login)| used + login);
    let most = value(&config, ("key", "max_client_conn"), "value").and_then(number);
    let version = version.first().and_then(|row| row.try_get(0).ok().flatten());
    let (Some(clients), Some(version)) = (used.zip(most), version) else {
        let error = "its admin console leaves out its version or its numbers of clients".to_owned();
        return Err(Failure { stage: Stage::Answer, error });
    };
    let pools = pools.iter().filter_map(read_pool).filter(|pool| pool.database != CONSOLE);
    Ok(Console {
        version: version.trim_start_matches("PgBouncer ").to_owned(),
        clients,
        pools: pools.collect(),
    })
}

fn read_pool(row: &SimpleQueryRow) -> Option<Pool> {
    let column = |name| row.try_get(name).ok().flatten();
    let seconds = column("maxwait").and_then(number)?;
    let micros = column("maxwait_us").and_then(number).unwrap_or_default();
    Some(Pool {
        database: column("database")?.to_owned(),
        user: column("user")?.to_owned(),
        waiting: column("cl_waiting").and_then(number)?,
        max_wait: Duration::from_secs(seconds.into()) + Duration::from_micros(micros.into()),
        is_by_session: column("pool_mode") == Some("session"),
    })
}

/// The column `wanted` of the row in which a column has that value.
fn value<'a>(
    rows: &'a [SimpleQueryRow],
    (column, name): (&str, &str),
    wanted: &str,
) -> Option<&'a str> {
    let named = |row: &&SimpleQueryRow| row.try_get(column).ok().flatten() == Some(name);
    rows.iter().find(named)?.try_get(wanted).ok().flatten()
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok()
}

async fn show(connection: &Connection, what: &str) -> Result<Vec<SimpleQueryRow>, Failure> {
    connection.simple_query(what).await.map_err(|error| refused(&error))
}

async fn read_recovery(connection: &Connection) -> Result<bool, Failure> {
    let rows = show(connection, "SELECT pg_catalog.pg_is_in_recovery()").await?;
    match rows.first().and_then(|row| row.try_get(0).ok().flatten()) {
        Some("t") => Ok(true),
        Some("f") => Ok(false),
        _ => {
            let error = "the answer to pg_is_in_recovery() is neither true nor false".to_owned();
            Err(Failure { stage: Stage::Answer, error })
        }
    }
}

fn refused(error: &QueryError) -> Failure {
    match error {
        QueryError::Failed { source, .. } => {
            Failure { stage: Stage::Answer, error: chain(source).to_string() }
        }
        QueryError::TimedOut { limit, .. } => {
            let limit = humantime::format_duration(*limit);
            Failure { stage: Stage::Timeout, error: format!("no answer within {limit}") }
        }
    }
}
