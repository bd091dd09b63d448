//! The loop: look, decide, act, record.

mod job;

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::Utc;
use shared::lease::{Claim, Identity, Leadership, Sharing, TTL, replica_name};
use shared::pg::Node;
use shared::telemetry::chain;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::apply::{ApplyError, Hand, Order, Progress};
use crate::board::Board;
use crate::commands::AGENT;
use crate::config::{Config, Mode};
use crate::control::Control;
use crate::guard::{Gate, Scope};
use crate::job::gate;
use crate::ledger::{End, Entry, Outcome};
use crate::memory::Memory;
use crate::observe::{Observer, Seen};
use crate::plan::{Move, Why};
use crate::report::{Moving, Turn, View};
use crate::step::{Standing, Step, next, why};
use crate::window::Opening;

/// While something is moved, the cluster is looked at no less often …
const LOOK_MAX: Duration = Duration::from_secs(15);
/// … and whether that is still wanted.
const WANTED_EVERY: Duration = Duration::from_secs(5);

/// How long etcd may take to say who leads.
const LEADER_LIMIT: Duration = Duration::from_secs(5);

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
        let mut named = BTreeSet::new();
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
            let mut claim = claim.filter(Claim::is_valid);
            let leads = (self.config.mode == Mode::Apply).then_some(claim.is_some());
            if let (Turn::Decided(view), Some(_)) = (&turn, &claim) {
                self.forget(view).await;
                for it in view.refusals.iter().filter(|it| it.gate == Gate::Locks) {
                    error!(
                        reason = it.reason,
                        next = it.next,
                        "a move that has ended keeps its locks"
                    );
                }
            }
            if let Turn::Decided(view) = &turn
                && leads != Some(false)
            {
                named = warn_of_what_stays(view, is_cleaned, &named);
            }
            if let Turn::Decided(view) = &turn
                && claim.is_none()
                && self.watches_alone(view).await
            {
                claim = Some(Claim::unlimited());
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

    /// Whether nobody else would watch a job that was begun: one that moves nothing has no lease, and needs
    /// none to watch and to stop what is known by its number.
    async fn watches_alone(&self, view: &View) -> bool {
        self.config.mode == Mode::DryRun
            && view.begun.is_some()
            && matches!(timeout(LEADER_LIMIT, self.memory.leader()).await, Ok(Ok(None)))
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
        match step {
            Step::Rest => return *interval,
            Step::Move(it) => {
                self.carry(&hand, &it, claim, shutdown).await;
                return limits.pause;
            }
            Step::Begin(moves) => {
                self.begin(&hand, &moves, claim, shutdown).await;
                return limits.pause;
            }
            Step::Watch(entry) => {
                self.watch(&hand, *entry, claim, shutdown).await;
                return limits.pause;
            }
            Step::CleanUp => info!(step = "clean_up", "step begins"),
        }
        let work = shutdown.run_until_cancelled(claim.guard(hand.clean_up())).await;
        if let Err(error) = work.flatten().unwrap_or(Ok(())) {
            warn!(step = "clean_up", error = %chain(&error), "step failed");
        }
        // What stays is no reason to try again and again.
        *interval
    }

    /// Moves a shard group, or copies reference tables, and writes down that it does, and how it ended.
    async fn carry(&self, hand: &Hand<'_>, it: &Move, claim: &Claim, shutdown: &CancellationToken) {
        let entry = self.entry(it);
        // What is not written down would not count.
        if let Err(error) = self.memory.record(&entry).await {
            warn!(error = %chain(&error), "move not begun: it cannot be written down");
            return;
        }
        let Move { shard, from, to, bytes, .. } = *it;
        info!(shard, from, to, bytes, why = why(it.why), tables = ?it.tables, "move begins");
        self.board.show(Some(Moving { entry: entry.clone(), phase: None, copied_bytes: None }));
        let began = Instant::now();
        let order = Order { copies: entry.copies, shard, shards: &it.shards, from, to };
        let show = |progress: &Progress| {
            let (entry, phase) = (entry.clone(), progress.phase.clone());
            let moving = Moving { entry, phase, copied_bytes: progress.bytes };
            self.board.show(Some(moving));
        };
        let end = if claim.is_valid() {
            let groups = (!entry.copies).then_some([from, to]);
            let what = Touched::Move { groups, colocation: it.colocation };
            let concern = Concern { hand, what };
            hand.carry(order, self.halted(&concern, claim, shutdown), show).await
        } else {
            End::new(Outcome::Stopped, "another replica leads")
        };
        self.board.show(None);
        let outcome = end.outcome.name();
        let seconds = began.elapsed().as_secs_f64();
        if end.outcome == Outcome::Moved {
            info!(shard, from, to, bytes, seconds, outcome, "move ended");
        } else {
            warn!(shard, from, to, seconds, outcome, error = end.reason, "move ended");
        }
        self.ended(hand, entry, end, claim).await;
    }

    /// Writes down how a move or a job ended, and cleans up after it.
    async fn ended(&self, hand: &Hand<'_>, mut entry: Entry, end: End, claim: &Claim) {
        let End { outcome, reason, keeps_locks } = end;
        (entry.outcome, entry.reason) = (outcome, reason);
        entry.ended_at = Some(Utc::now());
        self.board.count(&entry);
        // If that fails, it counts all the same, and as a failure.
        if let Err(error) = self.memory.record(&entry).await {
            let shard = entry.shard;
            warn!(error = %chain(&error), shard, "how a move ended is not written down");
        }
        // What is left of one that failed nobody needs; but one that has its locks uses it still.
        if entry.outcome != Outcome::Moved
            && !keeps_locks
            && claim.is_valid()
            && let Err(error) = hand.clean_up().await
        {
            warn!(step = "clean_up", error = %chain(&error), "step failed");
        }
    }

    /// What is written down of what begins now.
    fn entry(&self, it: &Move) -> Entry {
        Entry {
            at: Utc::now(),
            shard: it.shard,
            from: it.from,
            to: it.to,
            copies: it.why == Why::ReferenceTables,
            colocation: (it.colocation != 0).then_some(it.colocation),
            job: None,
            moves: 1,
            bytes: it.bytes,
            shards: it.shards.clone(),
            replica: self.replica.clone(),
            outcome: Outcome::Started,
            reason: String::new(),
            ended_at: None,
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

    /// Says how what is under way is to end, once it must.
    async fn halted(
        &self,
        concern: &Concern<'_>,
        claim: &Claim,
        shutdown: &CancellationToken,
    ) -> End {
        let to_end = |reason: &str| End::new(Outcome::Stopped, reason);
        tokio::select! {
            () = shutdown.cancelled() => to_end("the agent stops"),
            () = claim.ended() => to_end("another replica may lead: the lease was not renewed"),
            why = self.is_unwanted() => to_end(&why),
            end = self.turned(concern) => end,
        }
    }

    /// Looks whether it is paused, or the window has closed: that needs no server to answer.
    async fn is_unwanted(&self) -> String {
        loop {
            let now = Utc::now();
            if let Some(Opening::Closed { .. }) = self.config.window.as_ref().map(|it| it.at(now)) {
                return "the window is closed".to_owned();
            }
            if let (Ok(control), _) = self.memory.read().await
                && let Some(pause) = control.pause_at(now)
            {
                return pause.reason();
            }
            sleep(WANTED_EVERY).await;
        }
    }

    /// Looks again and again, until a gate has closed that ends what is under way.
    async fn turned(&self, concern: &Concern<'_>) -> End {
        let mut unknown = 0;
        loop {
            sleep(self.config.interval.min(LOOK_MAX)).await;
            let (turn, coordinator) = self.look().await;
            let why = match &turn {
                Turn::Decided(_) if coordinator.as_ref() != Some(concern.hand.coordinator) => {
                    Some(End::new(Outcome::Closed, "the coordinator has another primary"))
                }
                Turn::Decided(view) => {
                    unknown = 0;
                    concern.ends(view).await
                }
                // A failover on the way to the coordinator ends the session by itself.
                Turn::Unknown { reason, .. } => {
                    unknown += 1;
                    (1 < unknown).then(|| End::new(Outcome::Closed, reason))
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

/// Names what nobody but an operator removes, once, and returns what is named by now.
fn warn_of_what_stays(view: &View, is_cleaned: bool, named: &BTreeSet<String>) -> BTreeSet<String> {
    // What Citus knows of it may drop yet.
    let stays = |gate| gate == Gate::Orphans || (gate == Gate::Leftovers && is_cleaned);
    let left: Vec<_> = view.refusals.iter().filter(|it| stays(it.gate)).collect();
    for it in left.iter().filter(|it| !named.contains(&it.reason)) {
        warn!(reason = it.reason, next = it.next, "something is left of moves");
    }
    left.into_iter().map(|it| it.reason.clone()).collect()
}

/// What is under way, and who carries it.
#[derive(Debug)]
struct Concern<'a> {
    hand: &'a Hand<'a>,
    what: Touched,
}

/// What something that is under way touches, beside the cluster as a whole.
#[derive(Debug)]
enum Touched {
    /// A move, or a copy.
    Move {
        /// From where and to where; `None` for all.
        groups: Option<[u32; 2]>,
        colocation: u32,
    },
    /// What is left of a job.
    Job(i64),
}

impl Concern<'_> {
    /// How it is to end because of what was found, if it is.
    async fn ends(&self, view: &View) -> Option<End> {
        match self.what {
            Touched::Move { groups, colocation } => {
                let is_of = |scope| match scope {
                    Scope::Cluster | Scope::Group(0) => true,
                    Scope::Group(group) => groups.is_none_or(|it| it.contains(&group)),
                    Scope::Colocation(id) => colocation == id,
                    Scope::Shard(_) => false,
                };
                let mut refusals = view.refusals.iter().filter(|it| is_of(it.scope));
                refusals.find_map(|it| Some(End::new(it.ends_a_move()?, &it.reason)))
            }
            Touched::Job(id) => {
                let remaining = self.hand.remaining(id).await;
                let unknown = |error: &ApplyError| {
                    debug!(error = %chain(error), "what is left of a job is unknown");
                };
                let remaining = remaining.inspect_err(unknown).ok();
                let drains = view.control.as_ref().map(|it| &it.drains);
                let moves = view.plan.as_ref().map(|it| it.moves.as_slice());
                let none = BTreeSet::new();
                let (drains, moves) = (drains.unwrap_or(&none), moves.unwrap_or_default());
                gate(&view.refusals, drains, moves, remaining.as_ref())
            }
        }
    }
}
