//! Begins a job of Citus, watches it, and writes down what became of it.

use std::time::Duration;

use shared::lease::Claim;
use shared::telemetry::chain;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Concern, Rebalancer};
use crate::apply::Hand;
use crate::guard::spent;
use crate::ledger::{End, Entry, Outcome};
use crate::plan::{Budget, Move};
use crate::report::Moving;

/// How long etcd may take to say who leads.
const LEADER_LIMIT: Duration = Duration::from_secs(5);

impl Rebalancer {
    /// Has Citus begin a job that moves just that, and watches it.
    pub(super) async fn begin(
        &self,
        hand: &Hand<'_>,
        moves: &[Move],
        claim: &Claim,
        shutdown: &CancellationToken,
    ) {
        let Some(first) = moves.first() else { return };
        let (bytes, number) = (moves.iter().map(|it| it.bytes).sum(), moves.len());
        let mut entry = Entry {
            moves: u32::try_from(number).unwrap_or(u32::MAX),
            bytes,
            shards: moves.iter().flat_map(|it| it.shards.clone()).collect(),
            ..self.entry(first)
        };
        let record = async |id| {
            let numbered = Entry { job: Some(id), ..entry.clone() };
            self.memory.record(&numbered).await?;
            entry = numbered;
            Ok(())
        };
        let begun = hand.begin_job(moves, record).await;
        match (begun, entry.job) {
            (Ok(()), _) => {
                info!(job = entry.job, moves = number, bytes, "job begins");
                self.watch(hand, entry, claim, shutdown).await;
            }
            // The next look finds out.
            (Err(error), Some(job)) => {
                warn!(job, error = %chain(&error), "whether a job began is unknown");
            }
            (Err(error), None) => {
                (entry.job, entry.moves, entry.bytes) = (Some(0), 0, 0);
                let end = End::new(Outcome::Failed, chain(&error).to_string());
                warn!(error = end.reason, "job not begun");
                self.ended(hand, entry, end, claim).await;
            }
        }
    }

    /// Watches a job until it has ended, or stops it.
    pub(super) async fn watch(
        &self,
        hand: &Hand<'_>,
        mut entry: Entry,
        claim: &Claim,
        shutdown: &CancellationToken,
    ) {
        let job = entry.job;
        info!(job, moves = entry.moves, bytes = entry.bytes, "job is watched");
        let left = self.left_for(&entry).await;
        let mut written = 0;
        let show = |phase, bytes| {
            written = bytes;
            let (entry, phase) = (entry.clone(), Some(phase));
            self.board.show(Some(Moving { entry, phase, copied_bytes: Some(bytes) }));
        };
        let concern = Concern { coordinator: hand.coordinator, groups: None, colocation: None };
        let halted = self.halted(&concern, claim, shutdown);
        let ended = hand.watch_job(&entry, left, halted, show).await;
        let end = match (ended, self.other_leader(claim).await) {
            (Ok(over), _) => Some(over),
            (Err(why), None) => Some(hand.stop_job(&entry, why).await),
            // It watches the job. Where nobody has the lease, nobody would.
            (Err(_), Some(leader)) => {
                info!(job, leader, "job is left to another replica");
                None
            }
        };
        self.board.show(None);
        let Some(end) = end else { return };
        entry.bytes = entry.bytes.max(written);
        let (outcome, bytes) = (end.outcome.name(), entry.bytes);
        if end.outcome == Outcome::Moved {
            info!(job, moves = entry.moves, bytes, outcome, "job ended");
        } else {
            warn!(job, bytes, outcome, error = end.reason, "job ended");
        }
        self.ended(hand, entry, end, claim).await;
    }

    /// How many bytes may be written for a job: what else was moved is spent.
    async fn left_for(&self, entry: &Entry) -> u64 {
        let (_, ledger) = self.memory.read().await;
        // It was within the budget when it began.
        ledger.map_or(entry.bytes, |it| {
            let spent = spent(&it.without(entry), self.config.window.as_ref(), entry.at);
            Budget::left(&self.config.budget, spent).bytes
        })
    }

    /// Who has the lease, if it is not ours any more.
    async fn other_leader(&self, claim: &Claim) -> Option<String> {
        if claim.is_valid() {
            return None;
        }
        let leader = timeout(LEADER_LIMIT, self.memory.leader()).await.ok()?.ok()?;
        leader.filter(|it| *it != self.replica)
    }
}
