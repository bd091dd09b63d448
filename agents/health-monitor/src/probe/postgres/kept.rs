//! The kept connection of one server, asked each interval.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use shared::pg::{Connection, Node, Settings, connect};
use tokio::time::timeout;
use tokio_postgres::{Row, Statement};
use tracing::{info, warn};

use super::failure::{of_answer, of_connect};
use super::memory::Memory;
use super::query::{self, AnswerError, Columns, Identity, Position};
use super::{Archiver, PostgresFacts, StandardFacts};
use crate::clock;
use crate::facts::{Failure, Stage};
use crate::probe::Probe;

/// Between two times that the standard questions are asked, or each tenth time if that is sooner.
const STANDARD_EVERY: Duration = Duration::from_secs(10);
const STANDARD_EACH: u32 = 10;
/// A standard question that takes too long is left out for so long.
const SLOW_FOR: Duration = Duration::from_mins(1);
/// After a login was refused the next one is tried so much later: the server logs each.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// How long after its next question should have come the server ends a session. The network may have
/// lost it without a word, and dead sessions must not use up the role's `CONNECTION LIMIT`.
const LATE_BY: Duration = Duration::from_secs(10);
/// The server's limit on waiting for a lock. Nothing here takes one that conflicts with writes.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// The standard questions.
const QUESTIONS: [(&str, &str); 5] = [
    ("pg_stat_archiver", query::ARCHIVING),
    ("pg_stat_replication", query::SENDERS),
    ("pg_replication_slots", query::SLOTS),
    ("pg_locks", query::LOCKS),
    ("pg_ls_archive_statusdir()", query::READY),
];

/// Asks one server each interval.
#[derive(Debug)]
pub struct PostgresProbe {
    node: Node,
    settings: Arc<Settings>,
    /// How long the caller waits for an answer.
    limit: Duration,
    session: Option<Session>,
    /// A login that was refused, and when it is tried again.
    refused: Option<(Duration, Failure)>,
    memory: Memory,
    standard: Option<(Duration, StandardFacts)>,
    standard_every: Duration,
    standard_due: Duration,
    round: Round,
    /// Until when each standard question is left out.
    slow_until: [Duration; QUESTIONS.len()],
    /// What was told, so that it is told once.
    told_refused: [bool; QUESTIONS.len()],
    told_monitor: bool,
}

/// The standard questions that were asked so far, and their answers.
#[derive(Debug, Default)]
struct Round {
    next: usize,
    answers: [Option<Vec<Row>>; QUESTIONS.len()],
}

/// A connection, what holds as long as it does, and what is prepared on it.
#[derive(Debug)]
struct Session {
    connection: Connection,
    connected_at: Duration,
    identity: Identity,
    position: Statement,
    standard: [Option<Statement>; QUESTIONS.len()],
}

impl Session {
    async fn open(settings: &Settings, node: &Node) -> Result<Self, Failure> {
        let connection = connect(settings, node).await.map_err(|it| of_connect(&it))?;
        Self::prepare(connection).await.map_err(|it| of_answer(&it))
    }

    async fn prepare(connection: Connection) -> Result<Self, AnswerError> {
        let identity = query::identity(&connection.query_one(query::IDENTITY, &[]).await?)?;
        let position = connection.prepare(query::POSITION).await?;
        let standard = [const { None }; QUESTIONS.len()];
        Ok(Self { connection, connected_at: clock::now(), identity, position, standard })
    }

    /// Where the server is; when, by our clock; and how far its clock is ahead, in seconds.
    async fn position(&self) -> Result<(Position, Duration, f64), AnswerError> {
        let (wall, asked_at) = (Utc::now(), clock::now());
        let row = self.connection.query_one(&self.position, &[]).await?;
        let took = clock::now().saturating_sub(asked_at);
        let position = query::position(&row)?;
        // The wall clock is read once only, so that setting it in between does no harm.
        let ahead = position.clock - (wall + took / 2);
        Ok((position, asked_at + took / 2, ahead.as_seconds_f64()))
    }

    /// The answer to a standard question.
    async fn standard(&mut self, index: usize) -> Result<Vec<Row>, AnswerError> {
        let statement = match &self.standard[index] {
            Some(statement) => statement.clone(),
            None => self.connection.prepare(QUESTIONS[index].1).await?,
        };
        let rows = self.connection.query(&statement, &[]).await?;
        self.standard[index] = Some(statement);
        Ok(rows)
    }
}

impl PostgresProbe {
    /// For a server that is asked once in each `interval` by somebody who waits for `limit`.
    pub fn new(node: Node, settings: &Settings, interval: Duration, limit: Duration) -> Self {
        let settings = Settings {
            connect_timeout: limit,
            statement_timeout: limit,
            lock_timeout: LOCK_TIMEOUT,
            idle_session_timeout: interval.max(REFUSED_FOR) + LATE_BY,
            ..settings.clone()
        };
        Self {
            node,
            settings: Arc::new(settings),
            limit,
            session: None,
            refused: None,
            memory: Memory::default(),
            standard: None,
            standard_every: STANDARD_EVERY.min(interval * STANDARD_EACH),
            standard_due: Duration::ZERO,
            round: Round::default(),
            slow_until: [Duration::ZERO; QUESTIONS.len()],
            told_refused: [false; QUESTIONS.len()],
            told_monitor: false,
        }
    }

    /// Connects anew, and asks.
    async fn begin(&mut self) -> Result<(Session, (Position, Duration, f64)), Failure> {
        if let Some((until, failure)) = &self.refused
            && clock::now() < *until
        {
            return Err(failure.clone());
        }
        let opened = Box::pin(Session::open(&self.settings, &self.node)).await;
        let is_refused = |it: &Failure| matches!(it.stage, Stage::Login | Stage::Tls);
        self.refused = opened
            .as_ref()
            .err()
            .filter(|it| is_refused(it))
            .map(|failure| (clock::now() + REFUSED_FOR, failure.clone()));
        let session = opened?;
        let has_monitor = session.identity.has_monitor;
        let lacked_monitor = std::mem::replace(&mut self.told_monitor, !has_monitor);
        let (group, node) = (self.node.group, self.node.name.as_str());
        match (lacked_monitor, has_monitor) {
            (false, false) => {
                warn!(
                    group,
                    node, "role lacks pg_monitor: much stays unknown; GRANT pg_monitor TO it"
                );
            }
            (true, true) => info!(group, node, "role has pg_monitor"),
            _ => {}
        }
        let position = session.position().await.map_err(|it| of_answer(&it))?;
        Ok((session, position))
    }

    /// Asks the standard questions, one after the other, and says whether the connection is still of
    /// use. They never cost more than what is left of the time for an answer; those that are left when
    /// it is over are asked the next time.
    async fn ask_standard(&mut self, session: &mut Session, asked_at: Duration) -> bool {
        let until = asked_at + self.limit * 3 / 4;
        let mut round = std::mem::take(&mut self.round);
        while round.next < QUESTIONS.len() {
            let (now, index) = (clock::now(), round.next);
            let left = until.saturating_sub(now);
            if left < self.limit / 8 {
                self.round = round;
                return true;
            }
            round.next += 1;
            if now < self.slow_until[index] {
                continue;
            }
            let (group, node, what) = (self.node.group, &self.node.name, QUESTIONS[index].0);
            let is_told = self.told_refused[index];
            let Ok(answer) = timeout(left, session.standard(index)).await else {
                if !is_told {
                    warn!(group, node, what, "question left out: its answer takes too long");
                }
                self.told_refused[index] = true;
                self.slow_until[index] = now + SLOW_FOR;
                return false;
            };
            match answer.map_err(|it| of_answer(&it)) {
                Ok(rows) => round.answers[index] = Some(rows),
                Err(failure) if failure.stage == Stage::Dial => return false,
                Err(failure) if !is_told => {
                    warn!(group, node, what, error = failure.error, "question refused");
                }
                Err(_) => {}
            }
            self.told_refused[index] = round.answers[index].is_none();
        }
        self.standard_due = asked_at + self.standard_every;
        let standard = self.read_standard(&round.answers).unwrap_or_else(|error| {
            let (group, node, error) = (self.node.group, &self.node.name, of_answer(&error).error);
            warn!(group, node, error, "answer not understood");
            None
        });
        self.standard = standard.map(|it| (clock::now(), it));
        true
    }

    /// `None` where the standbys are not known: none at all would be a finding.
    fn read_standard(
        &mut self,
        answers: &[Option<Vec<Row>>; QUESTIONS.len()],
    ) -> Result<Option<StandardFacts>, AnswerError> {
        let [archiving, senders, slots, locks, ready] = answers;
        let first = |rows: &'_ Option<Vec<Row>>| rows.as_ref().and_then(|it| it.first().cloned());
        let (Some(archiving), Some(senders)) = (first(archiving), senders) else {
            return Ok(None);
        };
        let mut columns = Columns::of(&archiving);
        let synchronous_standby_names = columns.take()?;
        let (is_on, fails): (bool, bool) = (columns.take()?, columns.take()?);
        let failing_for = self.memory.archiving(is_on && fails, clock::now());
        let mut archiver = Archiver { failing_for, oldest_ready: None, ready: 0 };
        if let Some(row) = first(ready) {
            let mut columns = Columns::of(&row);
            archiver.ready = columns.count("files to archive")?;
            archiver.oldest_ready = columns.seconds()?;
        }
        let mut standard = StandardFacts {
            synchronous_standby_names,
            senders: senders.iter().map(query::sender).collect::<Result<_, _>>()?,
            slots: slots.iter().flatten().map(query::slot).collect::<Result<_, _>>()?,
            archiver: is_on.then_some(archiver),
            ..StandardFacts::default()
        };
        if let Some(row) = first(locks) {
            let mut columns = Columns::of(&row);
            standard.lock_waiters = columns.count("sessions that wait")?;
            standard.lock_wait = columns.seconds()?;
        }
        Ok(Some(standard))
    }

    fn forget_standard(&mut self) {
        (self.standard, self.standard_due) = (None, Duration::ZERO);
        self.round = Round::default();
    }

    fn facts(&mut self, session: &Session, asked: (Position, Duration, f64)) -> PostgresFacts {
        let (position, at, clock_ahead) = asked;
        let Identity {
            server_version,
            system_identifier,
            started_at,
            has_monitor,
            connections_max,
        } = session.identity;
        let known = self.memory.take(&position, started_at, at);
        if known.role_since == Some(at) {
            self.forget_standard();
        }
        PostgresFacts {
            server_version,
            system_identifier,
            has_monitor,
            in_recovery: position.in_recovery,
            read_only: position.read_only,
            timeline: known.timeline,
            lsn: position.lsn,
            at,
            earlier: known.earlier,
            role_since: known.role_since,
            connected_at: session.connected_at,
            receiver: position.receiver,
            not_streaming_since: known.not_streaming_since,
            should_stream: position.should_stream,
            replay_paused: position.replay_paused,
            apply_delay: position.apply_delay,
            clock_ahead,
            started_at,
            connections: (position.connections, connections_max),
            standard: None,
        }
    }
}

impl Probe for PostgresProbe {
    type Facts = PostgresFacts;

    async fn ask(&mut self) -> Result<PostgresFacts, Failure> {
        let asked_at = clock::now();
        // Taken out, so that a question that is given up midway takes its connection along.
        let asked = match self.session.take() {
            None => None,
            Some(session) => match session.position().await.map_err(|it| of_answer(&it)) {
                Ok(position) => Some((session, position)),
                Err(failure) if failure.stage == Stage::Timeout => return Err(failure),
                // Ended by somebody, or with the server: a new one tells.
                Err(_) => None,
            },
        };
        let (mut session, position) = match asked {
            Some(asked) => asked,
            None => match Box::pin(self.begin()).await {
                Ok(asked) => asked,
                Err(failure) => {
                    self.forget_standard();
                    return Err(failure);
                }
            },
        };
        let mut facts = self.facts(&session, position);
        let is_due = self.standard_due <= asked_at;
        let is_of_use = !is_due || Box::pin(self.ask_standard(&mut session, asked_at)).await;
        facts.standard.clone_from(&self.standard);
        self.session = Some(session).filter(|_| is_of_use);
        Ok(facts)
    }

    async fn lost(&mut self) {
        match &self.session {
            Some(session) => session.connection.closed().await,
            None => std::future::pending().await,
        }
    }
}
