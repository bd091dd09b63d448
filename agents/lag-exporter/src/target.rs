//! One server: a kept connection that is asked for ever, and new ones beside it.
//!
//! At most one attempt to connect is under way at any time, and every wait has a limit, so a
//! server that hangs costs one socket and delays nobody else.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use shared::pg::{Node, Settings};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until};
use tracing::{info, warn};

use crate::fleet::{Fleet, Learnt};
use crate::observation::Stage;
use crate::session::{Failure, Session, try_connect};

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

/// One server that is watched.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The server.
    pub node: Node,
    /// How to log in.
    pub settings: Arc<Settings>,
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
        loop {
            let learnt = match Box::pin(Session::open(&self.settings, &self.node)).await {
                Ok(session) => {
                    if std::mem::take(&mut is_down) {
                        info!(group = self.node.group, node = self.node.name, "node answers again");
                    }
                    wait = RECONNECT_FIRST;
                    self.fleet.record(&self.node, Learnt::FreshConnect(Ok(())));
                    let opened_at = Instant::now();
                    let failure = self.ask(session).await;
                    // Ended by somebody, or with the server: a new one tells. Unless it was asked in
                    // vain for as long as an answer may take, or ends as soon as it is made.
                    if failure.stage != Stage::Timeout && opened_at.elapsed() > RECONNECT_FIRST {
                        self.fleet.record(&self.node, Learnt::ConnectionLost(failure));
                        // Not all at once if many were.
                        sleep(self.interval.mul_f64(self.phase)).await;
                        continue;
                    }
                    Learnt::Sample(Err(failure))
                }
                Err(failure) => Learnt::NoConnection(failure),
            };
            if let Learnt::Sample(Err(failure)) | Learnt::NoConnection(failure) = &learnt
                && !std::mem::replace(&mut is_down, true)
            {
                let (group, node, error) = (self.node.group, &self.node.name, &failure.error);
                warn!(group, node, error, "node does not answer");
            }
            self.fleet.record(&self.node, learnt);
            sleep(self.spread(wait)).await;
            wait = (wait * 2).min(RECONNECT_MAX);
        }
    }

    /// Asks on one connection until it is of no more use, and says why.
    async fn ask(&self, mut session: Session) -> Failure {
        let mut tick = interval_at(Instant::now(), self.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut details_at = Instant::now();
        let mut fresh_connect = self.fresh_connect();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                outcome = &mut fresh_connect => {
                    self.fleet.record(&self.node, Learnt::FreshConnect(outcome));
                    fresh_connect = self.fresh_connect();
                    continue;
                }
            }
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

    /// Makes a new connection after a while.
    fn fresh_connect(&self) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + '_>> {
        let at = Instant::now() + self.spread(FRESH_CONNECT_EVERY);
        Box::pin(async move {
            sleep_until(at).await;
            try_connect(&self.settings, &self.node).await
        })
    }

    /// `wait` and up to half of it more, so that what failed together does not come back together.
    fn spread(&self, wait: Duration) -> Duration {
        wait.mul_f64(1.0 + self.phase / 2.0)
    }
}

/// The failure, if it ends the connection.
fn final_failure<T>(answer: &Result<T, Failure>) -> Option<Failure> {
    answer.as_ref().err().filter(|failure| failure.is_final).cloned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use shared::pg::Tls;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;
    use crate::group::Limits;
    use crate::session::limited;

    /// A server that accepts and says nothing must cost one connection, not one for each attempt.
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

        let node = Node { group: 0, name: "a".to_owned(), host: "127.0.0.1".to_owned(), port };
        let limits = Limits {
            stale_after: Duration::from_secs(6),
            history: Duration::from_hours(1),
            forget_after: Duration::from_mins(5),
        };
        let fleet = Fleet::new("demo", limits);
        fleet.set_members(std::slice::from_ref(&node));
        let settings = limited(Settings {
            user: "agent".to_owned(),
            password: None,
            database: "postgres".to_owned(),
            tls: Tls::Disable,
            application_name: "pgmesh/test".to_owned(),
            connect_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(30),
            lock_timeout: Duration::from_secs(5),
        });
        let watch = Watch {
            node,
            settings: Arc::new(settings),
            interval: Duration::from_secs(1),
            start: Duration::from_secs(1),
            phase: 0.5,
            fleet: fleet.clone(),
        };
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
        let node = fleet.snapshot().groups.remove(0).nodes.remove(0);
        assert_eq!((node.up, node.fresh_connect), (Some(false), Some(false)));
    }
}
