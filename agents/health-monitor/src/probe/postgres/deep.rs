//! What changes slowly, asked on a new connection each time.

use std::sync::Arc;
use std::time::Duration;

use shared::pg::{Connection, Node, Settings, connect};
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use tracing::warn;

use super::blocking::{Blocker, in_front};
use super::certificate;
use super::counters::Counters;
use super::deep_facts::{CacheTraffic, Checkpoints, DeepFacts, Load, Sizes};
use super::deep_query as query;
use super::failure::{of_answer, of_connect};
use super::query::{AnswerError, Columns};
use crate::clock;
use crate::facts::{Failure, Stage};
use crate::probe::Probe;

/// How long all of it may take: what the caller waits for, at least.
pub const LIMIT: Duration = Duration::from_secs(20);
/// The limit on dialling, TLS and login together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Intervals between two new connections: each costs both sides a login.
const LOGIN_EACH: u32 = 10;
/// The server's limit on one question.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(3);
/// Questions that are not asked before so much of [`LIMIT`] is gone stay unanswered.
const ASK_FOR: Duration = Duration::from_secs(12);
/// The server's limit on waiting for a lock. Nothing here takes one that conflicts with writes.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);
/// The server's limit on a session that asks for nothing: what is dropped midway ends by itself.
const IDLE_SESSION_TIMEOUT: Duration = Duration::from_secs(30);
/// The sizes of databases are asked for so seldom: the server looks at every file for it.
const SIZES_EVERY: Duration = Duration::from_mins(10);
/// Over so long the cache hit ratio is taken, and no less: a bulk load or a dump is no trend.
const CACHE_SPAN: Duration = Duration::from_mins(15);
/// Over so long checkpoints are counted: they come every five minutes at most.
const CHECKPOINTS_SPAN: Duration = Duration::from_hours(1);

/// Asks one server now and then.
#[derive(Debug)]
pub struct DeepProbe {
    node: Node,
    settings: Arc<Settings>,
    login_every: Duration,
    cache: Counters<4>,
    checkpoints: Counters<2>,
    sizes: Option<(Duration, Sizes)>,
    /// Questions whose refusal was told.
    told: Vec<&'static str>,
}

impl DeepProbe {
    /// For a server that is asked whether it is there in each `interval`, with how to log in.
    pub fn new(node: Node, settings: &Settings, interval: Duration) -> Self {
        let settings = Settings {
            connect_timeout: CONNECT_TIMEOUT,
            statement_timeout: STATEMENT_TIMEOUT,
            lock_timeout: LOCK_TIMEOUT,
            idle_session_timeout: IDLE_SESSION_TIMEOUT,
            ..settings.clone()
        };
        Self {
            node,
            settings: Arc::new(settings),
            login_every: interval * LOGIN_EACH,
            cache: Counters::over(CACHE_SPAN),
            checkpoints: Counters::over(CHECKPOINTS_SPAN),
            sizes: None,
            told: Vec::new(),
        }
    }
}

impl Probe for DeepProbe {
    type Facts = DeepFacts;

    async fn ask(&mut self) -> Result<DeepFacts, Failure> {
        let asked_at = clock::now();
        let connected = Box::pin(connect(&self.settings, &self.node)).await;
        let connected = connected.map_err(|it| of_connect(&it));
        // One that is not valid any more is seen here only: nobody is let in.
        let may_have_certificate = match &connected {
            Ok(_) => true,
            Err(failure) => failure.stage == Stage::Tls,
        };
        let certificate = if may_have_certificate {
            certificate::of_server(&self.settings, &self.node).await
        } else {
            None
        };
        let connection = match connected {
            Ok(connection) => connection,
            Err(_) if certificate.is_some_and(|it| it.left.num_seconds() <= 0) => {
                return Ok(DeepFacts { certificate, ..DeepFacts::default() });
            }
            Err(failure) => return Err(failure),
        };
        let mut asking = Asking { connection, until: asked_at + ASK_FOR, told: &mut self.told };
        let row = asking.connection.query_one(query::ROLE, &[]).await;
        let role = row.map_err(AnswerError::from).and_then(|row| {
            let mut columns = Columns::of(&row);
            Ok((columns.take::<bool>()?, columns.count("server_version_num")?))
        });
        let (in_recovery, version) = role.map_err(|it| of_answer(&it))?;
        let mut facts = DeepFacts { is_answer: true, certificate, ..DeepFacts::default() };
        asking.sessions(&mut facts).await?;
        asking.settings(&mut facts, version).await?;
        facts.wal = asking.one("pg_ls_waldir()", query::WAL, query::wal).await?;
        if let Some(seen) = asking.one("pg_stat_database", query::CACHE, counters::<4>).await?
            && let Some((over, grown)) = self.cache.take(asked_at, seen)
        {
            let [hit, read, transactions, writing] = grown;
            facts.cache = (CACHE_SPAN <= over).then_some(CacheTraffic { over, hit, read });
            // A standby's identifiers are its primary's.
            let writing = if in_recovery { 0 } else { writing };
            facts.load = Some(Load { over, transactions, writing });
        }
        // Dead rows and identifiers are the primary's business, and a standby's checkpoints are others.
        if in_recovery {
            return Ok(facts);
        }
        facts.wraparound = asking.one("pg_database", query::WRAPAROUND, query::wraparound).await?;
        facts.dead_rows =
            asking.all("pg_stat_user_tables", query::DEAD_ROWS, &[], query::dead_rows).await?;
        let sql = query::checkpoints(version);
        if let Some(seen) = asking.one("checkpoints", sql, counters::<2>).await? {
            let grown = self.checkpoints.take(asked_at, seen);
            facts.checkpoints =
                grown.map(|(over, [timed, requested])| Checkpoints { over, timed, requested });
        }
        if self.sizes.as_ref().is_none_or(|(then, _)| *then + SIZES_EVERY <= asked_at)
            && let Some(sizes) = asking.sizes().await?
        {
            self.sizes = Some((asked_at, sizes));
        }
        facts.sizes = self.sizes.as_ref().map(|(_, sizes)| sizes.clone());
        Ok(facts)
    }

    /// A postmaster that hangs is not seen on a kept connection: between two questions a new one is made
    /// now and then, and given up again.
    async fn lost(&mut self) {
        loop {
            sleep(self.login_every).await;
            if Box::pin(connect(&self.settings, &self.node)).await.is_err() {
                return;
            }
        }
    }
}

/// Counters, one a column.
fn counters<const N: usize>(row: &Row) -> Result<[u64; N], AnswerError> {
    let mut columns = Columns::of(row);
    let mut counters = [0; N];
    for counter in &mut counters {
        *counter = columns.bytes()?.unwrap_or(0);
    }
    Ok(counters)
}

/// The questions on one connection.
struct Asking<'a> {
    connection: Connection,
    /// No question begins after this.
    until: Duration,
    told: &'a mut Vec<&'static str>,
}

impl Asking<'_> {
    /// The rows of an answer. `None` if the server refused it, which is told once, and if the time is up.
    async fn all<T>(
        &mut self,
        what: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
        read: impl Fn(&Row) -> Result<T, AnswerError>,
    ) -> Result<Option<Vec<T>>, Failure> {
        if self.until <= clock::now() {
            return Ok(None);
        }
        // The server's own limit comes first, if it keeps it.
        let answer = timeout(STATEMENT_TIMEOUT * 2, self.connection.query(sql, parameters)).await;
        let Ok(answer) = answer else {
            let limit = humantime::format_duration(STATEMENT_TIMEOUT * 2);
            let error = format!("no answer within {limit}");
            return Err(Failure { stage: Stage::Timeout, error });
        };
        let answer = answer.map_err(AnswerError::from);
        let answer = answer.and_then(|rows| rows.iter().map(read).collect::<Result<Vec<_>, _>>());
        match answer.map_err(|it| of_answer(&it)) {
            Ok(answer) => {
                self.told.retain(|it| *it != what);
                Ok(Some(answer))
            }
            Err(failure) if failure.stage == Stage::Dial => Err(failure),
            Err(failure) => {
                if !self.told.contains(&what) {
                    self.told.push(what);
                    let node = self.connection.node();
                    let (group, node) = (node.group, node.name.as_str());
                    warn!(group, node, what, error = failure.error, "question refused");
                }
                Ok(None)
            }
        }
    }

    /// The first row of an answer.
    async fn one<T>(
        &mut self,
        what: &'static str,
        sql: &str,
        read: impl Fn(&Row) -> Result<T, AnswerError>,
    ) -> Result<Option<T>, Failure> {
        Ok(self.all(what, sql, &[], read).await?.and_then(|rows| rows.into_iter().next()))
    }

    /// What sessions do.
    async fn sessions(&mut self, facts: &mut DeepFacts) -> Result<(), Failure> {
        facts.queries = self.all("pg_stat_activity", query::QUERIES, &[], query::running).await?;
        facts.transactions =
            self.all("pg_prepared_xacts", query::TRANSACTIONS, &[], query::transaction).await?;
        let wait = |row: &Row| {
            let mut columns = Columns::of(row);
            Ok((columns.take::<i32>()?, columns.take::<Vec<i32>>()?))
        };
        let Some(waits) = self.all("pg_blocking_pids()", query::WAITS, &[], wait).await? else {
            return Ok(());
        };
        let mut front = in_front(&waits);
        front.truncate(3);
        let pids: Vec<i32> = front.iter().map(|(pid, _)| *pid).collect();
        let mut holders = Vec::new();
        if !pids.is_empty() {
            let found = self.all("sessions", query::HOLDERS, &[&pids], query::known_holder).await?;
            holders = found.unwrap_or_default();
        }
        let blocker = |(pid, waiting)| {
            let holder = holders.iter().find(|(it, _)| *it == pid).map(|(_, it)| it.clone());
            Blocker { pid, waiting, holder }
        };
        facts.blockers = Some(front.into_iter().map(blocker).collect());
        Ok(())
    }

    /// What the server is set to.
    async fn settings(&mut self, facts: &mut DeepFacts, version: u32) -> Result<(), Failure> {
        let setting = |row: &Row| {
            let mut columns = Columns::of(row);
            Ok((columns.text()?, columns.text()?, columns.take::<bool>()?))
        };
        let names = query::SETTINGS_OF_INTEREST;
        let settings = self.all("pg_settings", query::SETTINGS, &[&names], setting).await?;
        for (name, value, is_pending) in settings.unwrap_or_default() {
            if is_pending {
                facts.pending_restart.push(name.clone());
            }
            if names.contains(&name.as_str()) {
                facts.settings.insert(name, value);
            }
        }
        let pair = |row: &Row| {
            let mut columns = Columns::of(row);
            Ok((columns.text()?, columns.text()?))
        };
        let extensions = self.all("pg_extension", query::EXTENSIONS, &[], pair).await?;
        facts.extensions = extensions.unwrap_or_default().into_iter().collect();
        if version >= 150_000 {
            let name = |row: &Row| Columns::of(row).text();
            let databases = self.all("collations", query::COLLATIONS, &[], name).await?;
            facts.collation_mismatches = databases.unwrap_or_default();
        }
        Ok(())
    }

    /// What there is.
    async fn sizes(&mut self) -> Result<Option<Sizes>, Failure> {
        let database = |row: &Row| {
            let mut columns = Columns::of(row);
            Ok((columns.text()?, columns.bytes()?.unwrap_or(0)))
        };
        let databases = self.all("pg_database_size()", query::DATABASES, &[], database).await?;
        let count = |row: &Row| Columns::of(row).count("tables");
        let tables = self.one("pg_class", query::TABLES, count).await?;
        Ok(databases.zip(tables).map(|(databases, tables)| Sizes { databases, tables }))
    }
}
