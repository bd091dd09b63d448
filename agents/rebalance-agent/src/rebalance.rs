//! The loop: look, decide, record.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::Value;
use shared::lease::replica_name;
use shared::telemetry::chain;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::audit::{Audit, Trail};
use crate::config::Config;
use crate::control::{Control, Spent};
use crate::observe::{Observer, Seen};
use crate::report::{Report, Turn, View};

/// How looks came out: `ok` or `failed`.
pub type Looks = Family<[(&'static str, &'static str); 1], Counter>;

/// What is known and was decided. Clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    state: Arc<Mutex<State>>,
    /// How looks came out.
    pub looks: Looks,
}

#[derive(Debug)]
struct State {
    report: Arc<Report>,
    trail: Trail,
}

impl Board {
    /// Before the first look.
    pub fn new(config: &Config) -> Self {
        let (cluster, mode) = (config.cluster.clone(), config.mode);
        let report = Arc::new(Report { cluster, mode, turn: Turn::Starting });
        let looks = Looks::default();
        for outcome in ["ok", "failed"] {
            drop(looks.get_or_create(&[("outcome", outcome)]));
        }
        Self { state: Arc::new(Mutex::new(State { report, trail: Trail::default() })), looks }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest report.
    pub fn report(&self) -> Arc<Report> {
        self.with(|it| Arc::clone(&it.report))
    }

    /// What `/status` shows.
    pub fn status(&self) -> Value {
        let (report, audits) = self.with(|it| {
            let audits = it.trail.newest().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
            (Arc::clone(&it.report), audits)
        });
        let mut status = serde_json::to_value(&*report).unwrap_or_default();
        status["audit"] = Value::Array(audits.unwrap_or_default());
        status
    }

    #[cfg(test)]
    pub(crate) fn set(&self, report: Report) {
        self.with(|it| it.report = Arc::new(report));
    }

    /// Takes up what came of a look, and says what is new.
    fn publish(&self, turn: Turn, replica: &str) {
        let outcome = if matches!(turn, Turn::Unknown { .. }) { "failed" } else { "ok" };
        self.looks.get_or_create(&[("outcome", outcome)]).inc();
        self.with(|state| {
            tell(&state.report.turn, &turn);
            if let Turn::Decided(view) = &turn {
                let audit = Audit::new(view, state.report.mode, replica);
                if let Some(audit) = state.trail.add(audit) {
                    let line = serde_json::to_string(audit).unwrap_or_default();
                    info!(summary = audit.summary, audit = line, "decision changed");
                }
            }
            let Report { cluster, mode, .. } = &*state.report;
            let (cluster, mode) = (cluster.clone(), *mode);
            state.report = Arc::new(Report { cluster, mode, turn });
        });
    }
}

/// Says once what begins and what ends.
fn tell(before: &Turn, now: &Turn) {
    match (before, now) {
        (Turn::Unknown { .. }, Turn::Unknown { .. })
        | (Turn::NoCitus { .. }, Turn::NoCitus { .. }) => {}
        (_, Turn::Unknown { reason, .. }) => {
            warn!(error = reason, "cluster is unknown: nothing is decided");
        }
        (_, Turn::NoCitus { coordinator, database, .. }) => {
            info!(node = coordinator, database, "no Citus in the database: nothing to do");
        }
        (Turn::Unknown { .. }, _) => info!("cluster is known again"),
        _ => {}
    }
}

/// Looks and decides.
#[derive(Debug)]
pub struct Rebalancer {
    config: Config,
    observer: Observer,
    board: Board,
}

impl Rebalancer {
    /// One that shows what it does on `board`.
    pub fn new(config: Config, observer: Observer, board: Board) -> Self {
        Self { config, observer, board }
    }

    /// Looks and decides once.
    pub async fn turn(&self) -> Turn {
        match self.observer.look().await {
            Err(error) => Turn::Unknown { at: Utc::now(), reason: chain(&error).to_string() },
            Ok(Seen::NoCitus { coordinator, database }) => {
                Turn::NoCitus { at: Utc::now(), coordinator, database }
            }
            Ok(Seen::Citus(observation)) => {
                // A dry run moves nothing, and nobody can ask anything of it.
                let (control, spent) = (Ok(Control::default()), Ok(Spent::default()));
                let view = View::new(&observation, &self.config, &control, &spent, Utc::now());
                Turn::Decided(Box::new(view))
            }
        }
    }

    /// Looks and decides until `shutdown`. A look that is under way then is dropped: it changes
    /// nothing.
    ///
    /// # Errors
    ///
    /// None: what is not known is a state.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let replica = replica_name();
        let every: Duration = self.config.interval;
        let mut ticks = interval_at(Instant::now(), every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                _ = ticks.tick() => {}
            }
            let turn = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                turn = self.turn() => turn,
            };
            self.board.publish(turn, &replica);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{config, skewed, view};

    #[test]
    fn what_is_published_is_shown() {
        let board = Board::new(&config());
        assert_eq!(board.status()["state"], "starting");
        assert!(board.report().turn.not_ready().is_some());
        board.publish(Turn::Decided(Box::new(view(skewed))), "host-1");
        board.publish(Turn::Decided(Box::new(view(skewed))), "host-1");
        let status = board.status();
        assert_eq!((&status["state"], &status["cluster"]), (&"decided".into(), &"demo".into()));
        assert_eq!(status["plan"]["moves"][0]["shard"], 102);
        assert_eq!(status["audit"].as_array().map(Vec::len), Some(1));
        assert_eq!(status["audit"][0]["replica"], "host-1");
        assert_eq!(board.report().turn.not_ready(), None);

        let reason = "no route to host".to_owned();
        board.publish(Turn::Unknown { at: Utc::now(), reason: reason.clone() }, "host-1");
        assert_eq!(board.report().turn.not_ready(), Some(reason));
        // What was decided before is history, and is not shown as if it were known.
        assert!(board.status()["plan"].is_null());
        for (outcome, expected) in [("ok", 2), ("failed", 1)] {
            assert_eq!(board.looks.get_or_create(&[("outcome", outcome)]).get(), expected);
        }
    }

    #[test]
    fn without_citus_the_agent_is_ready() {
        let board = Board::new(&config());
        let [coordinator, database] = ["a (a:5432)", "app"].map(str::to_owned);
        board.publish(Turn::NoCitus { at: Utc::now(), coordinator, database }, "host-1");
        assert_eq!(board.report().turn.not_ready(), None);
        assert_eq!(board.status()["state"], "no_citus");
    }
}
