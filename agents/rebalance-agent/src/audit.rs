//! Every decision, as a line that can be kept.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::config::Mode;
use crate::guard::{Gate, Refusal, Scope};
use crate::report::View;

/// So many are kept in memory, to be shown.
const KEPT_MAX: usize = 100;

/// What was decided, when, and by whom.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    /// When.
    pub at: DateTime<Utc>,
    /// Which replica of the agent.
    pub replica: String,
    /// Whether it is acted on.
    pub mode: Mode,
    /// What it comes to, in one sentence.
    pub summary: String,
    /// What is to be moved: shard, from which group, to which.
    pub moves: Vec<(i64, u32, u32)>,
    /// Which gates are closed, for what, why, and what to do.
    pub refused: Vec<Refusal>,
    /// Why all of it is not moved as one job, where it is to be.
    #[serde(default)]
    pub job_refused: Option<String>,
}

impl Audit {
    /// The line of a decision.
    pub fn new(view: &View, mode: Mode, replica: &str) -> Self {
        let moves = view.plan.iter().flat_map(|it| &it.moves);
        Self {
            at: view.at,
            replica: replica.to_owned(),
            mode,
            summary: view.summary(),
            moves: moves.map(|it| (it.shard, it.from, it.to)).collect(),
            refused: view.refusals.clone(),
            job_refused: view.job.as_ref().and_then(|it| it.refused.clone()),
        }
    }

    /// Whether the same was decided, for the same reasons. The numbers in the sentences change all
    /// the time.
    fn is_like(&self, other: &Self) -> bool {
        self.moves == other.moves
            && self.gates().eq(other.gates())
            && self.job_refused.is_some() == other.job_refused.is_some()
            && self.mode == other.mode
    }

    fn gates(&self) -> impl Iterator<Item = (Gate, Scope)> {
        self.refused.iter().map(|it| (it.gate, it.scope))
    }
}

/// The newest decisions.
#[derive(Clone, Debug, Default)]
pub struct Trail(VecDeque<Audit>);

impl Trail {
    /// Takes up a decision, and returns it if it differs from the one before.
    pub fn add(&mut self, audit: Audit) -> Option<&Audit> {
        if self.0.back().is_some_and(|it| it.is_like(&audit)) {
            return None;
        }
        if self.0.len() == KEPT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(audit);
        self.0.back()
    }

    /// The decisions, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Audit> {
        self.0.iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{skewed, view};

    #[test]
    fn a_decision_is_told_when_it_changes() {
        let audit = |view: &View| Audit::new(view, Mode::DryRun, "host-1");
        let mut trail = Trail::default();
        let first = audit(&view(skewed));
        assert_eq!(
            (first.moves.as_slice(), first.refused.as_slice()),
            (&[(102, 1, 2)][..], &[][..])
        );
        assert_eq!(trail.add(first.clone()), Some(&first));
        // Again, a minute later.
        let later = Audit { at: first.at + chrono::TimeDelta::minutes(1), ..first.clone() };
        assert_eq!(trail.add(later), None);
        let closed = audit(&view(|it| {
            skewed(it);
            it.catalogue.is_coordinator = false;
        }));
        assert_eq!(closed.gates().collect::<Vec<_>>(), [(Gate::Coordinator, Scope::Cluster)]);
        assert_eq!(closed.refused[0].reason, "the server that was asked is a worker");
        assert_eq!(trail.add(closed.clone()), Some(&closed));
        assert_eq!(trail.newest().collect::<Vec<_>>(), [&closed, &first]);
        let text = serde_json::to_string(&closed).unwrap();
        assert_eq!(serde_json::from_str::<Audit>(&text).unwrap(), closed);
    }

    #[test]
    fn the_trail_is_bounded() {
        let seen = view(skewed);
        let mut trail = Trail::default();
        for shard in 0..250 {
            let audit =
                Audit { moves: vec![(shard, 1, 2)], ..Audit::new(&seen, Mode::DryRun, "a") };
            trail.add(audit);
        }
        assert_eq!(trail.newest().count(), KEPT_MAX);
        assert_eq!(trail.newest().next().unwrap().moves, [(249, 1, 2)]);
    }
}
