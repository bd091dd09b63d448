//! One server: a kept connection that is asked for ever, and new ones beside it.
//!
//! At most one attempt to connect is under way at any time, and every wait has a limit, so a
//! server that hangs costs one socket and delays nobody else.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shared::pg::{Connection, Node, Settings};
use shared::secret::Secret;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use tracing::{info, warn};

use crate::clock;
use crate::fleet::{Fleet, Learnt};
use crate::observation::Stage;
use crate::session::{Failure, Session, Told, new_connection};

/// Between two questions for what changes slowly, and up to half of it more.
const DETAILS_EVERY: Duration = Duration::from_secs(10);
/// Between two new connections, and up to half of it more. Only they show a postmaster that
/// hangs or has no connection to spare, which a kept one hides.
const FRESH_CONNECT_EVERY: Duration = Duration::from_secs(40);
/// The wait after the first failure to connect, and up to half of it more. Each later one doubles it
/// …
const RECONNECT_FIRST: Duration = Duration::from_secs(1);
/// … up to this.
const RECONNECT_MAX: Duration = Duration::from_secs(8);
/// … or this where nobody listens: to ask costs next to nothing, and who starts there may be a second
/// primary.
const RECONNECT_REFUSED_MAX: Duration = Duration::from_secs(2);

/// Servers are asked in so many bunches in an interval: to be woken for each by itself would cost more
/// than to ask it.
const BUNCHES: u32 = 25;

/// One server that is watched.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The server.
    pub node: Node,
    /// How to log in.
    pub settings: Arc<Settings>,
    /// The file with the password, read again for each connection: it may have been changed.
    pub password_file: Option<PathBuf>,
    /// Between two samples.
    pub interval: Duration,
    /// Over what time the first connections to all servers are spread.
    pub start: Duration,
    /// A number from 0 to 1 that differs from server to server: when it is asked, and the random
    /// part of its waits.
    pub phase: f64,
    /// Where the answers go.
    pub fleet: Fleet,
}

impl Watch {
    /// Asks for ever. Dropping it closes its connections and ends what is under way.
    pub async fn run(self) {
        sleep(self.start.mul_f64(self.phase)).await;
        let mut is_down = false;
        let mut wait = RECONNECT_FIRST;
        let mut told = Told::default();
        loop {
            let learnt = match self.open(&mut told).await {
                Ok(Ok(session)) => {
                    if std::mem::take(&mut is_down) {
                        info!(group = self.node.group, node = self.node.name, "node answers again");
                    }
                    let opened_at = Instant::now();
                    let failure = self.ask(session).await;
                    let lasted = opened_at.elapsed();
                    // One that is lost again and again leaves fewer dead sessions behind so.
                    if lasted > RECONNECT_MAX {
                        wait = RECONNECT_FIRST;
                    }
                    // Ended by somebody, or with the server: a new one tells. Unless it was asked in
                    // vain for as long as an answer may take, or ends as soon as it is made.
                    if failure.stage != Stage::Timeout && lasted > RECONNECT_FIRST {
                        self.fleet.record(&self.node, Learnt::ConnectionLost(failure));
                        // Not all at once if many were.
                        sleep(self.interval.mul_f64(self.phase)).await;
                        continue;
                    }
                    Learnt::Sample(Err(failure))
                }
                Ok(Err(failure)) => Learnt::Sample(Err(failure)),
                Err(failure) => Learnt::NoConnection(failure),
            };
            if let Learnt::Sample(Err(failure)) | Learnt::NoConnection(failure) = &learnt
                && !std::mem::replace(&mut is_down, true)
            {
                let (group, node, error) = (self.node.group, &self.node.name, &failure.error);
                warn!(group, node, error, "node does not answer");
            }
            let wait_max = match &learnt {
                Learnt::NoConnection(failure) if failure.stage == Stage::Dial => {
                    RECONNECT_REFUSED_MAX
                }
                _ => RECONNECT_MAX,
            };
            self.fleet.record(&self.node, learnt);
            sleep(self.spread(wait.min(wait_max))).await;
            wait = (wait * 2).min(wait_max);
        }
    }

    /// Connects and prepares the questions. The outer error is that there is no connection.
    async fn open<'a>(&self, told: &'a mut Told) -> Result<Result<Session<'a>, Failure>, Failure> {
        let connection = Box::pin(self.connect()).await?;
        self.fleet.record(&self.node, Learnt::FreshConnect(Ok(())));
        Ok(Box::pin(Session::open(connection, told)).await)
    }

    /// Makes a new connection. While the file with the password cannot be read, the last one will do.
    async fn connect(&self) -> Result<Connection, Failure> {
        let mut settings = Settings::clone(&self.settings);
        if let Some(path) = self.password_file.clone()
            && let Ok(Ok(password)) = spawn_blocking(move || Secret::read(&path)).await
        {
            settings.password = Some(password);
        }
        new_connection(&settings, &self.node).await
    }

    /// Asks on one connection until it is of no more use, and says why. Beside that new ones are
    /// tried, however long an answer takes.
    async fn ask(&self, session: Session<'_>) -> Failure {
        tokio::select! {
            failure = self.ask_on(session) => failure,
            never = self.try_new_connections() => match never {},
        }
    }

    async fn ask_on(&self, mut session: Session<'_>) -> Failure {
        let mut tick =
            interval_at(Instant::now() + until_bunch(clock::now(), self.interval), self.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut details_at = Instant::now();
        loop {
            tick.tick().await;
            let sample = session.sample().await;
            if let Some(failure) = final_failure(&sample) {
                return failure;
            }
            if self.fleet.record(&self.node, Learnt::Sample(sample)) {
                let seed = Box::pin(session.seed()).await;
                if let Some(failure) = final_failure(&seed) {
                    return failure;
                }
                self.fleet.record(&self.node, Learnt::Seed(seed));
            }
            if details_at <= Instant::now() {
                let details = Box::pin(session.details()).await;
                if let Some(failure) = final_failure(&details) {
                    return failure;
                }
                self.fleet.record(&self.node, Learnt::Details(details));
                details_at = Instant::now() + self.spread(DETAILS_EVERY);
            }
        }
    }

    /// Makes a new connection now and then, and closes it.
    async fn try_new_connections(&self) -> Infallible {
        loop {
            sleep(self.spread(FRESH_CONNECT_EVERY)).await;
            let outcome = Box::pin(self.connect()).await.map(drop);
            self.fleet.record(&self.node, Learnt::FreshConnect(outcome));
        }
    }

    /// `wait` and up to half of it more, so that what failed together does not come back together.
    fn spread(&self, wait: Duration) -> Duration {
        wait.mul_f64(1.0 + self.phase / 2.0)
    }
}

/// How long it is until the next bunch is asked.
fn until_bunch(now: Duration, interval: Duration) -> Duration {
    let bunch = (interval / BUNCHES).as_nanos();
    Duration::from_nanos_u128(bunch - now.as_nanos() % bunch)
}

/// The failure, if it ends the connection.
fn final_failure<T>(answer: &Result<T, Failure>) -> Option<Failure> {
    answer.as_ref().err().filter(|failure| failure.is_final).cloned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use shared::pg::Tls;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinSet;

    use super::*;
    use crate::group::Limits;
    use crate::session::limited;
    use crate::view::NodeView;

    #[test]
    fn servers_are_asked_in_bunches() {
        let millis = Duration::from_millis;
        for (now, interval, expected) in [
            (millis(0), millis(1000), millis(40)),
            (millis(39), millis(1000), millis(1)),
            (millis(40), millis(1000), millis(40)),
            (millis(1_000_007), millis(1000), millis(33)),
            (millis(3), millis(100), millis(1)),
        ] {
            assert_eq!(until_bunch(now, interval), expected, "{now:?}");
        }
    }

    /// Watches a server on that port of this host.
    fn watch(port: u16) -> (Watch, Fleet) {
        let node = Node { group: 0, name: "a".to_owned(), host: "127.0.0.1".to_owned(), port };
        let limits = Limits {
            stale_after: Duration::from_secs(6),
            history: Duration::from_hours(1),
            forget_after: Duration::from_mins(5),
        };
        let fleet = Fleet::new("demo", limits);
        fleet.set_members(std::slice::from_ref(&node));
        let interval = Duration::from_secs(1);
        let settings = Settings {
            user: "agent".to_owned(),
            password: Some(Secret::new("hunter2".to_owned())),
            database: "postgres".to_owned(),
            tls: Tls::Disable,
            allow_weak_auth: true,
            application_name: "pgmesh/test".to_owned(),
            connect_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(30),
            lock_timeout: Duration::from_secs(5),
            idle_session_timeout: Duration::ZERO,
        };
        let watch = Watch {
            node,
            settings: Arc::new(limited(settings, interval)),
            password_file: None,
            interval,
            start: interval,
            phase: 0.5,
            fleet: fleet.clone(),
        };
        (watch, fleet)
    }

    fn node(fleet: &Fleet) -> NodeView {
        fleet.snapshot().groups.remove(0).nodes.remove(0)
    }

    /// A server must cost one connection that says nothing, not one for each attempt.
    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_asked_by_one_connection_at_a_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let attempts = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        {
            let (open, most, attempts) = (open.clone(), most.clone(), attempts.clone());
            tasks.spawn(async move {
                let mut connections = JoinSet::new();
                loop {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    attempts.fetch_add(1, Ordering::Relaxed);
                    most.fetch_max(1 + open.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                    let open = open.clone();
                    connections.spawn(async move {
                        let mut said = Vec::new();
                        stream.read_to_end(&mut said).await.ok();
                        open.fetch_sub(1, Ordering::Relaxed);
                    });
                }
            });
        }
        let (watch, fleet) = watch(port);
        tasks.spawn(watch.run());

        sleep(Duration::from_mins(2)).await;
        let target = fleet.snapshot().targets.remove(0);
        let timeouts = Stage::ALL.iter().position(|it| *it == Stage::Timeout).unwrap();
        let attempts = attempts.load(Ordering::Relaxed);
        let failures = usize::try_from(target.failures[timeouts]).unwrap();
        assert_eq!(most.load(Ordering::Relaxed), 1);
        // Every 3 + 12 s in the end.
        assert!((8..=20).contains(&attempts), "{attempts}");
        assert!((attempts - 1..=attempts).contains(&failures));
        let expected = format!("no login at a (127.0.0.1:{port}) within 3s");
        assert_eq!(target.error, Some(expected.clone()));
        assert_eq!(target.fresh_connect_error, Some(expected));
        let node = node(&fleet);
        assert_eq!((node.up, node.fresh_connect), (Some(false), Some(false)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_refuses_is_asked_again_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (watch, fleet) = watch(port);
        let mut tasks = JoinSet::new();
        tasks.spawn(watch.run());
        sleep(Duration::from_mins(2)).await;
        let refused = fleet.snapshot().targets.remove(0).failures[0];
        // Every 2.5 s in the end.
        assert!((45..=50).contains(&refused), "{refused}");
    }

    /// A server of which only the questions at a login and for the positions are answered.
    #[derive(Clone, Copy)]
    struct Fake {
        /// How long each step of a login takes, from the second connection on.
        login_step: Duration,
        /// How long the answer with the positions takes.
        answer: Duration,
        /// Whether it refuses who it is.
        refuses: bool,
    }

    impl Fake {
        async fn listen(self, listener: TcpListener) {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let step = if connections.is_empty() { Duration::ZERO } else { self.login_step };
                connections.spawn(self.serve(stream, step));
            }
        }

        async fn serve(self, mut stream: TcpStream, login_step: Duration) -> std::io::Result<()> {
            // What waits for an acknowledgement comes late by a clock that is not paused.
            stream.set_nodelay(true)?;
            let mut startup = vec![0; stream.read_u32().await? as usize - 4];
            stream.read_exact(&mut startup).await?;
            sleep(login_step).await;
            // AuthenticationCleartextPassword, and so on.
            stream.write_all(&message(b'R', &[0, 0, 0, 3])).await?;
            read(&mut stream).await?;
            sleep(login_step).await;
            stream.write_all(&message(b'R', &[0; 4])).await?;
            stream.write_all(&message(b'K', &[0; 8])).await?;
            stream.write_all(&message(b'Z', b"I")).await?;
            let mut question = Question::Other;
            let mut texts: Vec<(Vec<u8>, Question)> = Vec::new();
            let mut answers = Vec::new();
            loop {
                let (kind, content) = read(&mut stream).await?;
                let mut parts = content.split(|byte| *byte == 0);
                match kind {
                    b'P' => {
                        let name = parts.next().unwrap().to_owned();
                        question = Question::of(&String::from_utf8_lossy(parts.next().unwrap()));
                        texts.push((name, question));
                        answers.extend(message(b'1', b""));
                    }
                    b'D' => {
                        answers.extend(message(b't', &[0, 0]));
                        answers.extend(question.describe());
                    }
                    b'B' => {
                        let name = parts.nth(1).unwrap();
                        question = texts.iter().rfind(|it| it.0 == name).unwrap().1;
                        if question == Question::Position {
                            sleep(self.answer).await;
                        }
                    }
                    b'E' if question == Question::Other || self.refuses => {
                        answers.extend(message(b'E', b"SERROR\0VERROR\0C42501\0Mno\0\0"));
                    }
                    b'E' => {
                        answers.extend(message(b'2', b""));
                        answers.extend(question.row());
                        answers.extend(message(b'C', b"SELECT 1\0"));
                    }
                    b'C' => answers.extend(message(b'3', b"")),
                    b'S' => {
                        answers.extend(message(b'Z', b"I"));
                        stream.write_all(&std::mem::take(&mut answers)).await?;
                    }
                    _ => return Ok(()),
                }
            }
        }
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Question {
        Identity,
        Position,
        Other,
    }

    const BOOL: u32 = 16;
    const INT8: u32 = 20;
    const INT4: u32 = 23;
    const TEXT: u32 = 25;
    const TIMESTAMPTZ: u32 = 1184;
    const PG_LSN: u32 = 3220;

    impl Question {
        fn of(text: &str) -> Self {
            if text.contains("pg_control_system") {
                Self::Identity
            } else if text.contains("pg_get_wal_replay_pause_state") {
                Self::Position
            } else {
                Self::Other
            }
        }

        /// Types and values of the answer: of a standby that has not replayed anything.
        fn columns(self) -> Vec<(u32, Option<Vec<u8>>)> {
            match self {
                Self::Identity => vec![
                    (INT8, Some(7_i64.to_be_bytes().to_vec())),
                    (INT4, Some(170_002_i32.to_be_bytes().to_vec())),
                    (INT8, Some((16_i64 << 20).to_be_bytes().to_vec())),
                    (TIMESTAMPTZ, Some(vec![0; 8])),
                    (BOOL, Some(vec![1])),
                    (TIMESTAMPTZ, None),
                    (PG_LSN, Some(vec![0; 8])),
                ],
                Self::Position => {
                    let unknown = [INT4, PG_LSN, PG_LSN, PG_LSN, PG_LSN, TEXT, BOOL, TEXT, INT4];
                    let mut columns = vec![(BOOL, Some(vec![1])), (TIMESTAMPTZ, Some(vec![0; 8]))];
                    columns.extend(unknown.map(|kind| (kind, None)));
                    columns.push((TIMESTAMPTZ, None));
                    columns
                }
                Self::Other => Vec::new(),
            }
        }

        fn describe(self) -> Vec<u8> {
            let columns = self.columns();
            let mut content = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
            for (kind, _) in columns {
                // No name, no table; any length; binary.
                content.extend([0; 7]);
                content.extend(kind.to_be_bytes());
                content.extend([0, 0, 0, 0, 0, 0, 0, 1]);
            }
            message(b'T', &content)
        }

        fn row(self) -> Vec<u8> {
            let columns = self.columns();
            let mut content = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
            for (_, value) in columns {
                let length = value.as_ref().map_or(-1, |it| i32::try_from(it.len()).unwrap());
                content.extend(length.to_be_bytes());
                content.extend(value.unwrap_or_default());
            }
            message(b'D', &content)
        }
    }

    fn message(kind: u8, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len() + 4).unwrap();
        [&[kind][..], &length.to_be_bytes(), content].concat()
    }

    async fn read(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
        let kind = stream.read_u8().await?;
        let mut content = vec![0; stream.read_u32().await? as usize - 4];
        stream.read_exact(&mut content).await?;
        Ok((kind, content))
    }

    /// Watches a fake server for two minutes.
    async fn watched(fake: Fake) -> Fleet {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (watch, fleet) = watch(listener.local_addr().unwrap().port());
        let mut tasks = JoinSet::new();
        tasks.spawn(fake.listen(listener));
        tasks.spawn(watch.run());
        sleep(Duration::from_mins(2)).await;
        fleet
    }

    /// A new connection has a limit of its own, which it must not lose by waiting for an answer on
    /// the kept one.
    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_does_not_hold_up_a_new_connection() {
        let second = Duration::from_secs(1);
        let fake = Fake { login_step: second, answer: second * 5 / 2, refuses: false };
        let fleet = watched(fake).await;
        let node = node(&fleet);
        assert_eq!((node.up, node.fresh_connect), (Some(true), Some(true)));
        assert_eq!(node.round_trip.map(|it| it.as_secs()), Some(0), "by the clock of the host");
        let target = fleet.snapshot().targets.remove(0);
        assert_eq!((target.error, target.fresh_connect_error), (None, None));
        // The details.
        let refused = Stage::ALL.map(|stage| stage == Stage::Query);
        let failures = target.failures.iter().zip(refused).filter(|(_, refused)| !refused);
        assert_eq!(failures.map(|(count, _)| count).sum::<u64>(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_connections_and_refuses_questions_is_not_one_that_takes_none() {
        let (login_step, answer) = (Duration::ZERO, Duration::ZERO);
        let fleet = watched(Fake { login_step, answer, refuses: true }).await;
        let node = node(&fleet);
        assert_eq!((node.up, node.fresh_connect), (Some(false), Some(true)));
        let target = fleet.snapshot().targets.remove(0);
        assert_eq!(target.fresh_connect_error, None);
        assert!(target.error.as_ref().is_some_and(|it| it.contains("42501")), "{:?}", target.error);
    }
}
