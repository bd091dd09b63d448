//! One kept connection to one server, with a limit on every answer.

use std::time::Duration;

use chrono::Utc;
use shared::pg::{ConnectError, Connection, Node, QueryError, Settings, connect};
use shared::telemetry::chain;
use tokio::time::timeout;
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Row, Statement, ToStatement};
use tracing::{info, warn};

use crate::clock;
use crate::observation::{
    Details, Directory, Identity, Position, ReceiverStatus, Sample, Seed, Stage, StandbyPosition,
};
use crate::query::{self, AnswerError, General, PositionRow};

/// The server's limit on a statement. The longest one takes some milliseconds.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
/// The server's limit on waiting for a lock. Nothing here takes one that conflicts with writes.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Our limit on dialling, TLS and login together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Our limit on an answer: longer than the server's, so that its own error comes first. Past it
/// the connection is closed, since a server that says nothing may say it for ever.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long after its next question should have come the server ends a session. The network may
/// have lost it without a word, and dead sessions must not use up the role's `CONNECTION LIMIT`.
/// An exporter that stands still for less than that need not connect anew.
const LATE_BY: Duration = Duration::from_secs(10);

/// What `PgBouncer` says to limits, which a server takes. Behind a pool nobody knows which server answers.
const POOL_REFUSES: &str = "unsupported startup parameter";

/// Why a server gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// How far it came.
    pub stage: Stage,
    /// What to tell the operator.
    pub error: String,
    /// Whether the connection is of no more use.
    pub is_final: bool,
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let stage = match &error {
            ConnectError::Unreachable { .. } | ConnectError::Broken { .. } => Stage::Dial,
            ConnectError::TimedOut { .. } => Stage::Timeout,
            ConnectError::TlsNotOffered { .. }
            | ConnectError::UnknownCa { .. }
            | ConnectError::WrongName { .. }
            | ConnectError::Tls { .. } => Stage::Tls,
            ConnectError::PasswordMissing { .. }
            | ConnectError::WeakAuth { .. }
            | ConnectError::WrongPassword { .. }
            | ConnectError::NotAllowed { .. }
            | ConnectError::NoDatabase { .. }
            | ConnectError::NotNow { .. }
            | ConnectError::TooOld { .. }
            | ConnectError::Refused { .. } => Stage::Auth,
        };
        let mut text = chain(&error).to_string();
        if text.contains(POOL_REFUSES) {
            text += "; this is a connection pool: give the address of the server itself";
        }
        Self { stage, error: text, is_final: true }
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        let (stage, is_final) = match &error {
            AnswerError::Query(QueryError::TimedOut { .. }) => (Stage::Timeout, true),
            AnswerError::Query(QueryError::Failed { source, .. }) => match source.as_db_error() {
                // Without a message from the server it is the connection that failed.
                None => (Stage::Dial, true),
                Some(error) if ends_the_session(error) => (Stage::Dial, true),
                Some(error) if *error.code() == SqlState::QUERY_CANCELED => (Stage::Timeout, false),
                Some(_) => (Stage::Query, false),
            },
            AnswerError::Column(_) | AnswerError::Range(_) => (Stage::Query, false),
        };
        Self { stage, error: chain(&error).to_string(), is_final }
    }
}

impl From<QueryError> for Failure {
    fn from(error: QueryError) -> Self {
        AnswerError::from(error).into()
    }
}

/// Whether the server says it as its last word: it stops, or somebody terminated the session.
fn ends_the_session(error: &DbError) -> bool {
    matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
}

/// How to log in, with this agent's limits, to ask once in each `interval`.
pub fn limited(settings: Settings, interval: Duration) -> Settings {
    Settings {
        connect_timeout: CONNECT_TIMEOUT,
        statement_timeout: STATEMENT_TIMEOUT,
        lock_timeout: LOCK_TIMEOUT,
        idle_session_timeout: interval + LATE_BY,
        ..settings
    }
}

/// Makes a new connection.
///
/// # Errors
///
/// The server takes none now.
pub async fn new_connection(settings: &Settings, node: &Node) -> Result<Connection, Failure> {
    Ok(connect(settings, node).await?)
}

/// What was told of a server, so that it is told once and not again on each connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    lacks_monitor: bool,
    /// The questions that failed the last time.
    refused: [bool; 5],
}

/// A kept connection, with all questions prepared. Dropping it closes it.
#[derive(Debug)]
pub struct Session<'a> {
    connection: Connection,
    identity: Identity,
    directory: Directory,
    position: Statement,
    timeline: Statement,
    general: Statement,
    senders: Statement,
    slots: Statement,
    /// The last answer about the timeline, and how far was replayed then.
    replayed_on: Option<(PgLsn, u32)>,
    told: &'a mut Told,
}

impl<'a> Session<'a> {
    /// Asks who is there, and prepares the questions.
    ///
    /// # Errors
    ///
    /// There is no answer in time.
    pub async fn open(connection: Connection, told: &'a mut Told) -> Result<Self, Failure> {
        let node = connection.node().clone();
        within_limit(&node, Self::prepare(connection, told)).await
    }

    async fn prepare(connection: Connection, told: &'a mut Told) -> Result<Self, Failure> {
        let row = connection.query_one(query::IDENTITY, &[]).await?;
        let (identity, is_monitor, directory) = query::identity(&row)?;
        let lacked_monitor = std::mem::replace(&mut told.lacks_monitor, !is_monitor);
        let node = connection.node().name.as_str();
        match (lacked_monitor, !is_monitor) {
            (false, true) => {
                warn!(node, "role lacks pg_monitor: much stays unknown; GRANT pg_monitor TO it");
            }
            (true, false) => info!(node, "role has pg_monitor"),
            _ => {}
        }
        let [general, slots] =
            [query::general, query::slots].map(|question| question(identity.server_version));
        Ok(Self {
            position: connection.prepare(query::POSITION).await?,
            timeline: connection.prepare(query::TIMELINE).await?,
            general: connection.prepare(&general).await?,
            senders: connection.prepare(query::SENDERS).await?,
            slots: connection.prepare(&slots).await?,
            replayed_on: None,
            told,
            identity,
            directory,
            connection,
        })
    }

    /// Asks for the positions.
    ///
    /// # Errors
    ///
    /// There is no answer in time.
    pub async fn sample(&mut self) -> Result<Sample, Failure> {
        let wall = Utc::now();
        let asked_at = clock::now();
        let row = self.one(&self.position).await?;
        let answered_at = clock::now();
        let answer = PositionRow::read(&row)?;
        // The wall clock is read once only, so that setting it in between does no harm.
        let midway = wall + answered_at.saturating_sub(asked_at) / 2;
        let mut position = answer.position()?;
        if let Position::Standby(standby) = &mut position {
            standby.timeline = self.timeline(standby).await?;
        }
        Ok(Sample {
            asked_at,
            answered_at,
            identity: self.identity,
            directory: self.directory,
            clock_ahead: answer.clock - midway,
            position,
        })
    }

    /// The newest timeline of which a standby has WAL, if no receiver tells. Replay comes to
    /// another one only by going on, so a standby that stands still is not asked again.
    async fn timeline(&mut self, position: &StandbyPosition) -> Result<Option<u32>, Failure> {
        let receiver = position.receiver;
        if receiver.is_some_and(|it| it.status == ReceiverStatus::Streaming) {
            return Ok(position.timeline);
        }
        // Without the right to ask there would be an error in the server's log each second.
        let Some(replayed) = position.replay_lsn.filter(|_| !self.told.lacks_monitor) else {
            return Ok(position.timeline);
        };
        let known = self.replayed_on.filter(|(lsn, _)| *lsn == replayed);
        let found = if let Some((_, timeline)) = known {
            Some(timeline)
        } else {
            let row = self.one(&self.timeline).await;
            let answer = row.and_then(|row| Ok(query::timeline(&row)?));
            self.part(4, "the timeline of WAL", answer)?
        };
        self.replayed_on = found.map(|timeline| (replayed, timeline));
        Ok(position.timeline.max(found))
    }

    /// Asks for what changes slowly; the questions go out together. One that the server refuses
    /// leaves its part empty.
    ///
    /// # Errors
    ///
    /// There is no answer in time, or no connection.
    pub async fn details(&mut self) -> Result<Details, Failure> {
        let asked_at = clock::now();
        let (general, senders, slots) = tokio::join!(
            self.one(&self.general),
            self.rows(&self.senders),
            self.rows(&self.slots),
        );
        let general = general.and_then(|row| Ok(General::read(&row)?));
        let senders = senders.and_then(|rows| each(&rows, query::sender));
        let slots = slots.and_then(|rows| each(&rows, query::slot));
        let (general, senders, slots) = (
            self.part(0, "settings and statistics", general)?,
            self.part(1, "pg_stat_replication", senders)?.and_then(query::seen),
            self.part(2, "pg_replication_slots", slots)?,
        );
        let mut details =
            Details { asked_at, answered_at: clock::now(), senders, slots, ..Details::default() };
        if let Some(general) = general {
            self.directory = general.directory;
            details.synchronous_standby_names = Some(general.synchronous_standby_names);
            details.synchronous_commit = Some(general.synchronous_commit);
            details.conflicts = Some(general.conflicts);
            details.archiver = Some(general.archiver);
            details.standby = general.standby;
            details.sync_waits = general.sync_waits;
        }
        Ok(details)
    }

    /// Asks a primary for the ages of positions before the first sample. Rare, so not prepared.
    /// Without the right to see the files there are none.
    ///
    /// # Errors
    ///
    /// There is no answer in time, or the server is no primary.
    pub async fn seed(&mut self) -> Result<Seed, Failure> {
        let asked_at = clock::now();
        let row = self.one(query::CHECKPOINT).await?;
        let query::LastCheckpoint { now, timeline, current_segment, checkpoint } =
            query::checkpoint(&row)?;
        let rows = self.rows(query::WAL_FILES).await;
        let files = rows.and_then(|rows| each(&rows, query::wal_file));
        Ok(Seed {
            asked_at,
            answered_at: clock::now(),
            identity: self.identity,
            up_for: now - self.identity.started_at,
            timeline,
            current_segment,
            files: self.part(3, "pg_ls_waldir()", files)?.unwrap_or_default(),
            checkpoint: Some(checkpoint),
        })
    }

    /// What one of the questions brought; `None` if the server refused it, which is told once.
    fn part<T>(
        &mut self,
        index: usize,
        what: &'static str,
        answer: Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        let was_refused = std::mem::replace(&mut self.told.refused[index], answer.is_err());
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.is_final => Err(failure),
            Err(failure) => {
                if !was_refused {
                    let node = self.connection.node().name.as_str();
                    warn!(node, what, error = failure.error, "details not read");
                }
                Ok(None)
            }
        }
    }

    async fn one<S: ToStatement + Sync + ?Sized>(&self, statement: &S) -> Result<Row, Failure> {
        let answer = self.connection.query_one(statement, &[]);
        within_limit(self.connection.node(), async { Ok(answer.await?) }).await
    }

    async fn rows<S: ToStatement + Sync + ?Sized>(
        &self,
        statement: &S,
    ) -> Result<Vec<Row>, Failure> {
        let answer = self.connection.query(statement, &[]);
        within_limit(self.connection.node(), async { Ok(answer.await?) }).await
    }
}

fn each<T>(rows: &[Row], read: impl Fn(&Row) -> Result<T, AnswerError>) -> Result<Vec<T>, Failure> {
    Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
}

/// Waits for an answer within [`ANSWER_TIMEOUT`].
async fn within_limit<T>(
    node: &Node,
    answer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| {
        let limit = ANSWER_TIMEOUT;
        Err(QueryError::TimedOut { node: node.to_string(), limit }.into())
    })
}
