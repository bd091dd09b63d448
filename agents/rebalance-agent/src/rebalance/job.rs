//! Begins a job of Citus, watches it, and writes down what became of it.

use shared::lease::Claim;
use shared::telemetry::chain;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Concern, LEADER_LIMIT, Rebalancer, Touched};
use crate::apply::Hand;
use crate::guard::spent;
use crate::job::{Seen, cost};
use crate::ledger::{End, Entry, Outcome};
use crate::plan::{Budget, Move};
use crate::report::Moving;

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
        let begun = shutdown.run_until_cancelled(hand.begin_job(moves, record)).await;
        match (begun, entry.job) {
            // Gone with its connection; if not, who looks next finds it.
            (None, _) => {}
            (Some(Ok(())), _) => {
                info!(job = entry.job, moves = number, bytes, "job begins");
                self.watch(hand, entry, claim, shutdown).await;
            }
            // The next look finds out.
            (Some(Err(error)), Some(job)) => {
                warn!(job, error = %chain(&error), "whether a job began is unknown");
            }
            (Some(Err(error)), None) => {
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
        let mut last = None;
        let show = |seen: &Seen, phase, written| {
            let (entry, phase) = (entry.clone(), Some(phase));
            self.board.show(Some(Moving { entry, phase, copied_bytes: Some(written) }));
            last = Some((seen.done, written));
        };
        let concern = Concern { hand, what: Touched::Job(job.unwrap_or_default()) };
        let halted = self.halted(&concern, claim, shutdown);
        let ended = hand.watch_job(&entry, left, halted, show).await;
        let end = match (ended, self.other_leader(claim).await) {
            (Ok(over), _) => Ok(over),
            // Where nobody has the lease, nobody else would.
            (Err(why), None) => hand.stop_job(&entry, why).await,
            (Err(_), Some(leader)) => Err(format!("{leader} leads, and watches it")),
        };
        self.board.show(None);
        let end = match end {
            Ok(end) => end,
            // It is known as begun, so who leads looks at it again.
            Err(reason) => return warn!(job, reason, "job is not watched any more"),
        };
        if let Some((done, written)) = last {
            (entry.moves, entry.bytes) = cost(&entry, end.outcome, done, written);
        }
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
        ledger.map_or(self.config.budget.bytes_max(), |it| {
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
