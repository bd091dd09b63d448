//! What is known and was decided, where the admin server finds it, and how often what came of it.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::Value;
use tracing::{info, warn};

use crate::audit::{Audit, Trail};
use crate::config::Config;
use crate::ledger::{Entry, Outcome};
use crate::report::{Moving, Report, Turn};

/// Counters, by their labels.
pub type Counts = Family<Vec<(&'static str, String)>, Counter>;

/// What is known and was decided. Clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    state: Arc<Mutex<State>>,
    cluster: String,
    /// How looks came out: `ok` or `failed`.
    pub looks: Counts,
    /// How moves ended.
    pub moves: Counts,
    /// Bytes of the moves that were carried to their end.
    pub moved_bytes: Counts,
}

#[derive(Debug)]
struct State {
    report: Arc<Report>,
    trail: Trail,
    /// Whether nothing was begun since the report was decided from.
    is_fresh: bool,
    /// When the cluster was last looked at and found.
    succeeded_at: Option<DateTime<Utc>>,
}

impl Board {
    /// Before the first look.
    pub fn new(config: &Config) -> Self {
        let (cluster, mode) = (config.cluster.clone(), config.mode);
        let report = Report { cluster, mode, leads: None, moving: None, turn: Turn::Starting };
        let state = State {
            report: Arc::new(report),
            trail: Trail::default(),
            is_fresh: false,
            succeeded_at: None,
        };
        let it = Self {
            state: Arc::new(Mutex::new(state)),
            cluster: config.cluster.clone(),
            looks: Counts::default(),
            moves: Counts::default(),
            moved_bytes: Counts::default(),
        };
        // Every series from 0 on, so that `rate()` sees the first failure.
        for outcome in ["ok", "failed"] {
            drop(it.looks.get_or_create(&it.labels(Some(outcome))));
        }
        for outcome in Outcome::ENDS {
            drop(it.moves.get_or_create(&it.labels(Some(outcome.name()))));
        }
        drop(it.moved_bytes.get_or_create(&it.labels(None)));
        it
    }

    fn labels(&self, outcome: Option<&str>) -> Vec<(&'static str, String)> {
        let outcome = outcome.map(|it| ("outcome", it.to_owned()));
        [("cluster", self.cluster.clone())].into_iter().chain(outcome).collect()
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the report; those who have the old one keep it.
    fn change(&self, act: impl FnOnce(&mut Report)) {
        self.with(|it| act(Arc::make_mut(&mut it.report)));
    }

    /// The newest report.
    pub fn report(&self) -> Arc<Report> {
        self.with(|it| Arc::clone(&it.report))
    }

    /// The newest report, unless something was begun since it was decided from: what is under way closes gates
    /// itself, and no one may judge by those.
    pub(crate) fn fresh(&self) -> Option<Arc<Report>> {
        self.with(|it| it.is_fresh.then(|| Arc::clone(&it.report)))
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

    /// When the cluster was last looked at and found: looks that fail since then do not change it.
    pub(crate) fn succeeded_at(&self) -> Option<DateTime<Utc>> {
        self.with(|it| it.succeeded_at)
    }

    #[cfg(test)]
    pub(crate) fn set(&self, report: Report) {
        self.with(|it| it.report = Arc::new(report));
    }

    /// Takes up what came of a look, and says what is new.
    pub(crate) fn publish(&self, turn: Turn, leads: Option<bool>, replica: &str) {
        self.count_look(&turn);
        self.with(|state| {
            tell(&state.report.turn, &turn);
            if let Turn::Decided(view) = &turn {
                let audit = Audit::new(view, state.report.mode, replica);
                if let Some(audit) = state.trail.add(audit) {
                    let line = serde_json::to_string(audit).unwrap_or_default();
                    info!(summary = audit.summary, audit = line, "decision changed");
                }
            }
        });
        self.change(|it| (it.turn, it.leads) = (turn, leads));
        self.with(|it| it.is_fresh = true);
    }

    /// Takes up what is known while something is under way: nothing is decided from it.
    pub(crate) fn refresh(&self, turn: Turn) {
        self.count_look(&turn);
        self.change(|it| it.turn = turn);
    }

    fn count_look(&self, turn: &Turn) {
        let is_unknown = matches!(turn, Turn::Unknown { .. });
        let outcome = if is_unknown { "failed" } else { "ok" };
        if !is_unknown {
            self.with(|it| it.succeeded_at = turn.at());
        }
        self.looks.get_or_create(&self.labels(Some(outcome))).inc();
    }

    /// Shows what is moved now.
    pub(crate) fn show(&self, moving: Option<Moving>) {
        self.with(|it| it.is_fresh &= moving.is_none());
        self.change(|it| it.moving = moving);
    }

    /// Takes up how a move ended.
    pub(crate) fn count(&self, entry: &Entry) {
        self.moves.get_or_create(&self.labels(Some(entry.outcome.name()))).inc();
        if entry.outcome == Outcome::Moved {
            self.moved_bytes.get_or_create(&self.labels(None)).inc_by(entry.bytes);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{config, skewed, view};

    #[test]
    fn what_is_published_is_shown() {
        let board = Board::new(&config());
        assert_eq!(board.status()["state"], "starting");
        assert!(board.report().turn.not_ready().is_some());
        board.publish(Turn::Decided(Box::new(view(skewed))), None, "host-1");
        board.publish(Turn::Decided(Box::new(view(skewed))), None, "host-1");
        let status = board.status();
        assert_eq!((&status["state"], &status["cluster"]), (&"decided".into(), &"demo".into()));
        assert_eq!(status["plan"]["moves"][0]["shard"], 102);
        assert_eq!(status["audit"].as_array().map(Vec::len), Some(1));
        assert_eq!(status["audit"][0]["replica"], "host-1");
        assert_eq!(board.report().turn.not_ready(), None);

        let reason = "no route to host".to_owned();
        board.publish(Turn::Unknown { at: Utc::now(), reason: reason.clone() }, None, "host-1");
        assert_eq!(board.report().turn.not_ready(), Some(reason));
        assert!(board.succeeded_at().is_some(), "what was found last is");
        // What was decided before is history, and is not shown as if it were known.
        assert!(board.status()["plan"].is_null());
        for (outcome, expected) in [("ok", 2), ("failed", 1)] {
            assert_eq!(board.looks.get_or_create(&board.labels(Some(outcome))).get(), expected);
        }
    }

    /// What is under way closes gates itself.
    #[test]
    fn nothing_is_judged_by_what_was_seen_while_something_was_under_way() {
        let board = Board::new(&config());
        assert!(board.fresh().is_none());
        let turn = || Turn::Decided(Box::new(view(skewed)));
        board.publish(turn(), None, "host-1");
        board.show(None);
        assert!(board.fresh().is_some());
        let entry = crate::ledger::tests::entry(0, 102, Outcome::Started);
        board.show(Some(Moving { entry, phase: None, copied_bytes: None }));
        board.refresh(turn());
        assert!(board.fresh().is_none());
        board.show(None);
        assert!(board.fresh().is_none(), "how it ended is not written down yet");
        board.publish(turn(), None, "host-1");
        assert!(board.fresh().is_some());
    }

    #[test]
    fn without_citus_the_agent_is_ready() {
        let board = Board::new(&config());
        let [coordinator, database] = ["a (a:5432)", "app"].map(str::to_owned);
        board.publish(Turn::NoCitus { at: Utc::now(), coordinator, database }, None, "host-1");
        assert_eq!(board.report().turn.not_ready(), None);
        assert_eq!(board.status()["state"], "no_citus");
    }
}
