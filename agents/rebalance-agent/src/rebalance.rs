//! The loop: look, decide, act, record.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::Value;
use shared::lease::{Claim, Identity, Leadership, Sharing, TTL, replica_name};
use shared::pg::Node;
use shared::telemetry::chain;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::apply::{End, Hand, Order, Progress};
use crate::audit::{Audit, Trail};
use crate::commands::AGENT;
use crate::config::{Config, Mode};
use crate::control::Control;
use crate::guard::{Refusal, Scope};
use crate::ledger::{Entry, Outcome};
use crate::memory::Memory;
use crate::observe::{Observer, Seen};
use crate::plan::{Move, Why};
use crate::report::{Moving, Report, Turn, View};
use crate::step::{Standing, Step, next, why};
use crate::window::Opening;

/// While something is moved, the cluster is looked at no less often …
const LOOK_MAX: Duration = Duration::from_secs(15);
/// … and whether that is still wanted.
const WANTED_EVERY: Duration = Duration::from_secs(5);

/// How looks came out: `ok` or `failed`.
pub type Looks = Family<[(&'static str, &'static str); 1], Counter>;

/// What is known and was decided. Clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    state: Arc<Mutex<State>>,
    /// How looks came out.
    pub looks: Looks,
    /// How moves ended.
    pub moves: Looks,
    /// Bytes of the moves that were carried to their end.
    pub moved_bytes: Counter,
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
        let report = Report { cluster, mode, leads: None, moving: None, turn: Turn::Starting };
        let (looks, moves) = (Looks::default(), Looks::default());
        for outcome in ["ok", "failed"] {
            drop(looks.get_or_create(&[("outcome", outcome)]));
        }
        for outcome in Outcome::ENDS {
            drop(moves.get_or_create(&[("outcome", outcome.name())]));
        }
        let state = State { report: Arc::new(report), trail: Trail::default() };
        let moved_bytes = Counter::default();
        Self { state: Arc::new(Mutex::new(state)), looks, moves, moved_bytes }
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
    fn publish(&self, turn: Turn, leads: Option<bool>, replica: &str) {
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
    }

    /// Takes up what is known while something is under way: nothing is decided from it.
    fn refresh(&self, turn: Turn) {
        self.count_look(&turn);
        self.change(|it| it.turn = turn);
    }

    fn count_look(&self, turn: &Turn) {
        let outcome = if matches!(turn, Turn::Unknown { .. }) { "failed" } else { "ok" };
        self.looks.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Shows what is moved now.
    fn show(&self, moving: Option<Moving>) {
        self.change(|it| it.moving = moving);
    }

    /// Takes up how a move ended.
    fn count(&self, entry: &Entry) {
        self.moves.get_or_create(&[("outcome", entry.outcome.name())]).inc();
        if entry.outcome == Outcome::Moved {
            self.moved_bytes.inc_by(entry.bytes);
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

/// Looks, decides and acts.
#[derive(Debug)]
pub struct Rebalancer {
    config: Config,
    observer: Observer,
    memory: Memory,
    /// Who of the replicas moves.
    leadership: Leadership,
    replica: String,
    board: Board,
    /// Which moves are wanted, if not all.
    only: Option<Why>,
}

/// What came of a look, with who is to be told what follows from it.
type Looked = (Turn, Option<Node>);

impl Rebalancer {
    /// One that shows what it does on `board`. Somebody must run the [`Sharing`], or it never leads.
    pub fn new(config: Config, observer: Observer, board: Board) -> (Self, Sharing) {
        let memory = match observer.etcd() {
            Some(etcd) => Memory::in_etcd(etcd.clone(), &config.cluster),
            None => Memory::of_process(Control::default()),
        };
        let replica = replica_name();
        let identity = Identity {
            cluster: config.cluster.clone(),
            agent: AGENT.to_owned(),
            replica: replica.clone(),
        };
        let (leadership, sharing) = Leadership::new(observer.etcd().cloned(), identity, TTL);
        let it = Self { config, observer, memory, leadership, replica, board, only: None };
        (it, sharing)
    }

    /// One that moves for that reason only.
    pub fn only(self, why: Why) -> Self {
        Self { only: Some(why), ..self }
    }

    /// What is asked for, and what was moved.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Looks and decides once.
    pub async fn turn(&self) -> Turn {
        self.look().await.0
    }

    async fn look(&self) -> Looked {
        let seen = Box::pin(self.observer.look()).await;
        // The newest, because a look may take long.
        let (control, ledger) = self.memory.read().await;
        match seen {
            Err(error) => {
                (Turn::Unknown { at: Utc::now(), reason: chain(&error).to_string() }, None)
            }
            Ok(Seen::NoCitus { coordinator, database }) => {
                (Turn::NoCitus { at: Utc::now(), coordinator, database }, None)
            }
            Ok(Seen::Citus { observation, coordinator }) => {
                let view = View::new(&observation, &self.config, &control, &ledger, Utc::now());
                (Turn::Decided(Box::new(view)), Some(coordinator))
            }
        }
    }

    /// Looks, decides and acts until `shutdown`. What only asks is dropped then; a move is broken off.
    ///
    /// # Errors
    ///
    /// None: what is not known is a state, and what fails is tried again later.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut leadership = self.leadership.clone();
        let (mut pause, mut is_cleaned) = (Duration::ZERO, false);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = sleep(pause) => {}
                // Who leads begins at once.
                () = leadership.changed() => {}
            }
            // What is found without the lease may be what another replica was about to change.
            let claim = self.leadership.claim();
            let Some((turn, coordinator)) = shutdown.run_until_cancelled(self.look()).await else {
                break;
            };
            let claim = claim.filter(Claim::is_valid);
            let leads = (self.config.mode == Mode::Apply).then_some(claim.is_some());
            if let (Turn::Decided(view), Some(_)) = (&turn, &claim) {
                self.forget(view).await;
            }
            let step = match &turn {
                Turn::Decided(view) => {
                    let (mode, leads) = (self.config.mode, claim.is_some());
                    next(view, Standing { mode, leads, only: self.only, is_cleaned })
                }
                _ => Step::Rest,
            };
            // What it left is looked at once more, when something was moved or some time has passed.
            is_cleaned = step == Step::CleanUp || (is_cleaned && step == Step::Rest);
            let awaits_drop = matches!(&turn, Turn::Decided(view) if view.awaits_drop);
            self.board.publish(turn, leads, &self.replica);
            pause = match (coordinator, claim) {
                (Some(coordinator), Some(claim)) => {
                    self.act(step, &coordinator, &claim, &shutdown).await
                }
                _ => self.config.interval,
            };
            if awaits_drop {
                pause = pause.min(WANTED_EVERY);
            }
        }
        Ok(())
    }

    /// Does it, and returns after how long to look again.
    async fn act(
        &self,
        step: Step,
        coordinator: &Node,
        claim: &Claim,
        shutdown: &CancellationToken,
    ) -> Duration {
        let Config { interval, apply: limits, .. } = &self.config;
        let hand = Hand { settings: self.observer.settings(), limits, coordinator, claim };
        let (what, done) = match step {
            Step::Rest => return *interval,
            Step::Move(it) => {
                self.carry(&hand, &it, claim, shutdown).await;
                return limits.pause;
            }
            Step::CleanUp => {
                info!(step = "clean_up", "step begins");
                let work = shutdown.run_until_cancelled(claim.guard(hand.clean_up()));
                ("clean_up", work.await.flatten().unwrap_or(Ok(())))
            }
            Step::ReferenceTables => {
                info!(step = "copy_reference_tables", "step begins");
                let concern = Concern { coordinator, groups: Vec::new(), colocation: None };
                let halted = self.halted(&concern, claim, shutdown);
                ("copy_reference_tables", hand.copy_reference_tables(halted).await)
            }
        };
        if let Err(error) = done {
            warn!(step = what, error = %chain(&error), "step failed");
        }
        // What stays is no reason to try again and again.
        *interval
    }

    /// Moves a shard group, and writes down that it does, and how it ended.
    async fn carry(&self, hand: &Hand<'_>, it: &Move, claim: &Claim, shutdown: &CancellationToken) {
        let mut entry = Entry {
            at: Utc::now(),
            shard: it.shard,
            from: it.from,
            to: it.to,
            bytes: it.bytes,
            shards: it.shards.clone(),
            replica: self.replica.clone(),
            outcome: Outcome::Started,
            reason: String::new(),
            ended_at: None,
        };
        // What is not written down would not count.
        if let Err(error) = self.memory.record(&entry).await {
            warn!(error = %chain(&error), "move not begun: it cannot be written down");
            return;
        }
        let Move { shard, from, to, bytes, .. } = *it;
        info!(shard, from, to, bytes, why = why(it.why), tables = ?it.tables, "move begins");
        self.board.show(Some(Moving { entry: entry.clone(), phase: None, copied_bytes: None }));
        let began = Instant::now();
        let order = Order { shard, shards: &it.shards, from, to };
        let show = |progress: &Progress| {
            let (entry, phase) = (entry.clone(), progress.phase.clone());
            let moving = Moving { entry, phase, copied_bytes: progress.bytes };
            self.board.show(Some(moving));
        };
        let end = if claim.is_valid() {
            let (groups, colocation) = (vec![from, to], Some(it.colocation));
            let concern = Concern { coordinator: hand.coordinator, groups, colocation };
            hand.carry(order, self.halted(&concern, claim, shutdown), show).await
        } else {
            End { outcome: Outcome::Stopped, reason: "another replica leads".to_owned() }
        };
        self.board.show(None);
        (entry.outcome, entry.reason) = (end.outcome, end.reason);
        entry.ended_at = Some(Utc::now());
        let outcome = entry.outcome.name();
        let seconds = began.elapsed().as_secs_f64();
        if entry.outcome == Outcome::Moved {
            info!(shard, from, to, bytes, seconds, outcome, "move ended");
        } else {
            warn!(shard, from, to, seconds, outcome, error = entry.reason, "move ended");
        }
        self.board.count(&entry);
        // If that fails, it counts all the same, and as a failure.
        if let Err(error) = self.memory.record(&entry).await {
            warn!(error = %chain(&error), shard, "how a move ended is not written down");
        }
        // What is left of one that failed nobody needs.
        if entry.outcome != Outcome::Moved
            && claim.is_valid()
            && let Err(error) = hand.clean_up().await
        {
            warn!(step = "clean_up", error = %chain(&error), "step failed");
        }
    }

    /// Forgets what was asked for and is so.
    async fn forget(&self, view: &View) {
        for (&shard, &to) in &view.settled {
            if let Err(error) = self.memory.settle(shard, to).await {
                warn!(error = %chain(&error), shard, "what was asked for stays asked for");
            }
        }
    }

    /// Says why what is under way must not go on, once that is so.
    async fn halted(
        &self,
        concern: &Concern<'_>,
        claim: &Claim,
        shutdown: &CancellationToken,
    ) -> String {
        tokio::select! {
            () = shutdown.cancelled() => "the agent stops".to_owned(),
            () = claim.ended() => "another replica may lead: the lease was not renewed".to_owned(),
            why = self.is_unwanted() => why,
            why = self.turned(concern) => why,
        }
    }

    /// Looks whether it is paused, or the window has closed: that needs no server to answer.
    async fn is_unwanted(&self) -> String {
        loop {
            sleep(WANTED_EVERY).await;
            let now = Utc::now();
            if let Some(Opening::Closed { .. }) = self.config.window.as_ref().map(|it| it.at(now)) {
                return "the window is closed".to_owned();
            }
            if let (Ok(control), _) = self.memory.read().await
                && let Some(pause) = control.pause_at(now)
            {
                return pause.reason();
            }
        }
    }

    /// Looks again and again, until a gate has closed that ends what is under way.
    async fn turned(&self, concern: &Concern<'_>) -> String {
        let mut unknown = 0;
        loop {
            sleep(self.config.interval.min(LOOK_MAX)).await;
            let (turn, coordinator) = self.look().await;
            let why = match &turn {
                Turn::Decided(_) if coordinator.as_ref() != Some(concern.coordinator) => {
                    Some("the coordinator has another primary".to_owned())
                }
                Turn::Decided(view) => {
                    unknown = 0;
                    let mut refusals = view.refusals.iter();
                    let is_it = |it: &&Refusal| it.gate.ends_a_move() && concern.is_of(it.scope);
                    refusals.find(is_it).map(|it| it.reason.clone())
                }
                // A failover on the way to the coordinator ends the session by itself.
                Turn::Unknown { reason, .. } => {
                    unknown += 1;
                    (1 < unknown).then(|| reason.clone())
                }
                Turn::Starting | Turn::NoCitus { .. } => None,
            };
            self.board.refresh(turn);
            if let Some(why) = why {
                return why;
            }
        }
    }
}

/// What something that is under way touches, beside the cluster as a whole.
#[derive(Debug)]
struct Concern<'a> {
    coordinator: &'a Node,
    groups: Vec<u32>,
    colocation: Option<u32>,
}

impl Concern<'_> {
    fn is_of(&self, scope: Scope) -> bool {
        match scope {
            Scope::Cluster | Scope::Group(0) => true,
            Scope::Group(group) => self.groups.contains(&group),
            Scope::Colocation(id) => self.colocation == Some(id),
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
        board.publish(Turn::NoCitus { at: Utc::now(), coordinator, database }, None, "host-1");
        assert_eq!(board.report().turn.not_ready(), None);
        assert_eq!(board.status()["state"], "no_citus");
    }
}
