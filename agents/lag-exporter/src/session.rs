//! One kept connection to one server, with a limit on every answer.

use std::time::Duration;

use chrono::Utc;
use shared::pg::{ConnectError, Connection, Node, QueryError, Settings, connect};
use shared::telemetry::chain;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Row, Statement, ToStatement};
use tracing::warn;

use crate::clock;
use crate::observation::{Details, Identity, Sample, Seed, Stage};
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
            | ConnectError::WrongPassword { .. }
            | ConnectError::NotAllowed { .. }
            | ConnectError::NoDatabase { .. }
            | ConnectError::NotNow { .. }
            | ConnectError::Refused { .. } => Stage::Auth,
        };
        Self { stage, error: chain(&error).to_string(), is_final: true }
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        let (stage, is_final) = match &error {
            AnswerError::Query(QueryError::TimedOut { .. }) => (Stage::Timeout, true),
            AnswerError::Query(QueryError::Failed { source, .. }) => match source.code() {
                // Without a message from the server it is the connection that failed.
                None => (Stage::Dial, true),
                Some(&SqlState::QUERY_CANCELED) => (Stage::Timeout, false),
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

/// How to log in, with this agent's limits.
pub fn limited(settings: Settings) -> Settings {
    Settings {
        connect_timeout: CONNECT_TIMEOUT,
        statement_timeout: STATEMENT_TIMEOUT,
        lock_timeout: LOCK_TIMEOUT,
        ..settings
    }
}

/// Makes a new connection and closes it: whether the server takes any now.
///
/// # Errors
///
/// It does not.
pub async fn try_connect(settings: &Settings, node: &Node) -> Result<(), Failure> {
    drop(connect(settings, node).await?);
    Ok(())
}

/// A kept connection, with all questions prepared. Dropping it closes it.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    identity: Identity,
    position: Statement,
    general: Statement,
    senders: Statement,
    slots: Statement,
    /// The questions that failed the last time, so that it is told once.
    refused: [bool; 4],
}

impl Session {
    /// Connects, asks who is there, and prepares the questions.
    ///
    /// # Errors
    ///
    /// There is no connection or no answer, in time.
    pub async fn open(settings: &Settings, node: &Node) -> Result<Self, Failure> {
        let connection = connect(settings, node).await?;
        within_limit(node, Self::prepare(connection)).await
    }

    async fn prepare(connection: Connection) -> Result<Self, Failure> {
        let row = connection.query_one(query::IDENTITY, &[]).await?;
        let (identity, is_monitor) = query::identity(&row)?;
        if !is_monitor {
            let node = connection.node().name.as_str();
            warn!(node, "role lacks pg_monitor: much stays unknown; GRANT pg_monitor TO it");
        }
        let [general, slots] =
            [query::general, query::slots].map(|question| question(identity.server_version));
        Ok(Self {
            position: connection.prepare(query::POSITION).await?,
            general: connection.prepare(&general).await?,
            senders: connection.prepare(query::SENDERS).await?,
            slots: connection.prepare(&slots).await?,
            refused: [false; 4],
            identity,
            connection,
        })
    }

    /// Asks for the positions.
    ///
    /// # Errors
    ///
    /// There is no answer in time.
    pub async fn sample(&self) -> Result<Sample, Failure> {
        let wall = Utc::now();
        let asked_at = clock::now();
        let row = self.one(&self.position).await?;
        let answered_at = clock::now();
        let answer = PositionRow::read(&row)?;
        // The wall clock is read once only, so that setting it in between does no harm.
        let midway = wall + answered_at.saturating_sub(asked_at) / 2;
        Ok(Sample {
            asked_at,
            answered_at,
            identity: self.identity,
            clock_ahead: answer.clock - midway,
            position: answer.position()?,
        })
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
            self.part(1, "pg_stat_replication", senders)?,
            self.part(2, "pg_replication_slots", slots)?,
        );
        let mut details =
            Details { asked_at, answered_at: clock::now(), senders, slots, ..Details::default() };
        if let Some(general) = general {
            details.synchronous_standby_names = Some(general.synchronous_standby_names);
            details.conflicts = Some(general.conflicts);
            details.archiver = Some(general.archiver);
            details.standby = general.standby;
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
        let (timeline, current_segment, checkpoint) = query::checkpoint(&row)?;
        let rows = self.rows(query::WAL_FILES).await;
        let files = rows.and_then(|rows| each(&rows, query::wal_file));
        Ok(Seed {
            asked_at,
            answered_at: clock::now(),
            identity: self.identity,
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
        let was_refused = std::mem::replace(&mut self.refused[index], answer.is_err());
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
