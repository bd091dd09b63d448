//! The primaries of a group, one after the other, as one history of WAL: which of them counts, and
//! what a failover leaves of the ages known so far.

use std::cmp::Ordering;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::group::Limits;
use crate::observation::{Position, Sample, Seed};
use crate::pace::Pace;
use crate::ring::Ring;
use crate::seed;
use crate::timelines::Fork;

/// The rate that is shown, and that a standby must beat to catch up.
const RATE_WINDOW: Duration = Duration::from_mins(1);
/// So many forks are remembered; who is on a timeline before that was rebuilt long ago.
const FORKS_MAX: usize = 16;

/// A history of WAL.
#[derive(Clone, Debug)]
pub struct Line {
    /// The cluster's number.
    pub system_identifier: u64,
    /// The newest timeline.
    pub timeline: u32,
    /// When its positions were written.
    pub ring: Ring,
    /// Where it left older timelines, oldest first.
    pub forks: Vec<Fork>,
    /// Whether it is read from the leader of a standby cluster: its positions are those that are
    /// on that server's disk, see [`crate::leader`].
    pub is_of_standby: bool,
    /// Who wrote last; `None` until one was seen by this process.
    pub source: Option<Source>,
    /// Whether the source should be asked for what it remembers.
    pub wants_seed: bool,
    /// WAL written since this process began to watch.
    pub written_bytes: u64,
    /// How fast WAL is written.
    pub rate: Pace,
}

/// The primary, or the standby leader, that the line is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Tells whether a node of another name is the same server.
    pub started_at: DateTime<Utc>,
    /// When it was last asked.
    pub asked_at: Duration,
    /// How far it had written then.
    pub flush_lsn: u64,
    /// Whether it had begun to write more than that.
    pub has_more: bool,
}

/// A sample of a primary, or of a standby leader.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// The node.
    pub name: &'a str,
    /// What it said.
    pub sample: &'a Sample,
    /// The timeline that it writes, or receives.
    pub timeline: u32,
    /// How far it has written, or received.
    pub flush_lsn: u64,
    /// Where its WAL ends, also that which is not on its disk.
    pub inserted: u64,
    /// Where that timeline began, if it says so.
    pub fork_lsn: Option<u64>,
    /// What it was when it was last seen in recovery, on an older timeline.
    pub replayed: Option<Replayed>,
}

impl Offer<'_> {
    fn is_of_standby(&self) -> bool {
        matches!(self.sample.position, Position::Standby(_))
    }
}

/// What a node was when it was last seen in recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Before it was asked, nobody wrote the timeline that it writes now.
    pub asked_at: Duration,
    /// By then it had replayed that far.
    pub answered_at: Duration,
    /// The timeline that it was on.
    pub timeline: u32,
    /// How far it had replayed.
    pub lsn: u64,
}

/// Something that changed, and that a person may want to read of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A primary was promoted.
    Promoted {
        /// The timeline that was left.
        from: u32,
        /// The timeline that it writes.
        to: u32,
    },
    /// The history begins anew: another cluster, an older state of this one, a second server with
    /// the same timeline, or a primary in place of a standby leader. What was known is forgotten.
    BegunAnew,
}

/// What a primary is to a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// Not the one that counts.
    None,
    /// The one that did.
    GoesOn,
    /// The next.
    Promoted,
    /// The only one left, with another history.
    BeginsAnew,
}

impl Line {
    /// A line of which nothing has been seen yet; `ring` and `forks` may be from another process.
    pub fn new(system_identifier: u64, timeline: u32, ring: Ring, forks: Vec<Fork>) -> Self {
        Self {
            system_identifier,
            timeline,
            wants_seed: ring.is_empty(),
            ring,
            forks,
            is_of_standby: false,
            source: None,
            written_bytes: 0,
            rate: Pace::over(RATE_WINDOW),
        }
    }

    /// The line of the first primary that was seen.
    pub fn begin(offer: Offer<'_>) -> Self {
        let Offer { sample, timeline, fork_lsn, .. } = offer;
        // Which timeline it left is not known, only that it left all older ones by then.
        let left = timeline.saturating_sub(1);
        let fork = fork_lsn.map(|lsn| Fork { timeline: left, not_before: 0, not_after: lsn });
        let forks = fork.into_iter().collect();
        let line = Self::new(sample.identity.system_identifier, timeline, Ring::default(), forks);
        Self { is_of_standby: offer.is_of_standby(), ..line }
    }

    /// Takes in a sample, if it is from the primary that counts.
    ///
    /// That is the one on the newest timeline. A primary on an older one is a leftover, unless
    /// the newer was silent for so long that it must be gone. Of two on the same timeline only
    /// the first counts; if the second is still there when the first is silent, its history is
    /// its own.
    pub fn follow(&mut self, offer: Offer<'_>, limits: Limits) -> Option<Change> {
        let change = match self.claim(offer, limits) {
            Claim::None => return None,
            Claim::GoesOn => None,
            Claim::Promoted => {
                let change = Change::Promoted { from: self.timeline, to: offer.timeline };
                self.promote(offer);
                Some(change)
            }
            Claim::BeginsAnew => {
                self.begin_anew(offer);
                Some(Change::BegunAnew)
            }
        };
        self.push(offer, limits.history);
        change
    }

    fn claim(&self, offer: Offer<'_>, limits: Limits) -> Claim {
        if self.is_of_standby != offer.is_of_standby() {
            return Claim::BeginsAnew;
        }
        let Offer { name, sample, timeline, .. } = offer;
        let begins_anew_after = |silence: Duration| match &self.source {
            Some(source) if sample.asked_at <= source.asked_at + silence => Claim::None,
            _ => Claim::BeginsAnew,
        };
        if sample.identity.system_identifier != self.system_identifier {
            return begins_anew_after(limits.stale_after);
        }
        // All standbys of one primary have the same WAL.
        let is_source = self.source.as_ref().is_none_or(|source| {
            source.name == name || source.started_at == sample.identity.started_at
        }) || self.is_of_standby;
        match timeline.cmp(&self.timeline) {
            Ordering::Greater => Claim::Promoted,
            Ordering::Equal if is_source => Claim::GoesOn,
            Ordering::Equal => begins_anew_after(limits.stale_after),
            Ordering::Less => begins_anew_after(limits.forget_after),
        }
    }

    /// Takes in what the source remembers.
    pub fn plant(&mut self, name: &str, seed: &Seed) {
        let is_source = self.source.as_ref().is_some_and(|source| {
            source.name == name && source.started_at == seed.identity.started_at
        });
        if is_source && seed.timeline == self.timeline {
            self.wants_seed = false;
            self.ring.prepend(seed::entries(seed));
        }
    }

    /// Takes in that the node does not tell what it remembers.
    pub fn leave_unplanted(&mut self, name: &str) {
        self.wants_seed &= self.source.as_ref().is_none_or(|source| source.name != name);
    }

    /// Whether the source was asked so lately, at the moment `at`, that it is where it was.
    pub fn is_fresh(&self, at: Duration, stale_after: Duration) -> bool {
        self.source.as_ref().is_some_and(|source| at <= source.asked_at + stale_after)
    }

    /// The name of [`Self::source`].
    pub fn source_name(&self) -> Option<String> {
        self.source.as_ref().map(|source| source.name.clone())
    }

    fn begin_anew(&mut self, offer: Offer<'_>) {
        *self = Self { written_bytes: self.written_bytes, ..Self::begin(offer) };
    }

    /// Keeps the ages of what is surely part of the new timeline.
    ///
    /// The new primary tells where its timeline began, but not which one it left. If it was not
    /// seen there, that may have been an older one than ours.
    fn promote(
        &mut self,
        Offer { sample, timeline, flush_lsn, fork_lsn, replayed, .. }: Offer<'_>,
    ) {
        let left = self.timeline;
        let not_after = fork_lsn.unwrap_or(flush_lsn).min(flush_lsn);
        let not_before = match replayed.filter(|before| before.timeline == left) {
            Some(Replayed { asked_at, .. }) if fork_lsn.is_some() => {
                self.ring.branch(not_after, asked_at, sample.answered_at);
                not_after
            }
            Some(Replayed { asked_at, lsn, .. }) => {
                self.ring.branch_after(lsn, asked_at);
                lsn.min(not_after)
            }
            None => {
                self.ring = Ring::default();
                self.forks.clear();
                0
            }
        };
        self.forks.push(Fork { timeline: left, not_before, not_after });
        if self.forks.len() > FORKS_MAX {
            self.forks.remove(0);
        }
        self.timeline = timeline;
    }

    fn push(&mut self, offer: Offer<'_>, history: Duration) {
        let Offer { name, sample, flush_lsn, inserted, .. } = offer;
        self.wants_seed |= self.ring.is_empty();
        if self.source.is_some() {
            let before = self.ring.newest().map_or(flush_lsn, |newest| newest.lsn);
            self.written_bytes += flush_lsn.saturating_sub(before);
        }
        self.ring.push(flush_lsn, inserted, sample.asked_at, sample.answered_at, history);
        self.rate.push(sample.answered_at, flush_lsn);
        self.source = Some(Source {
            name: name.to_owned(),
            started_at: sample.identity.started_at,
            asked_at: sample.asked_at,
            flush_lsn,
            has_more: flush_lsn < inserted,
        });
    }
}
