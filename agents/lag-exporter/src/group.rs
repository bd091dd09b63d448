//! What is remembered about one group, from one report to the next.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::decide;
use crate::history::SavedGroup;
use crate::leader;
use crate::line::{Change, Line, Offer, Replayed, Source};
use crate::observation::{
    Details, Position, Report, Sample, Stage, StandbyPosition, before_page_header,
};
use crate::pace::Pace;
use crate::past::{Pasts, Run};
use crate::ring::{Ring, micros};
use crate::senders::HeldBack;
use crate::split::{Reign, Rivals};
use crate::view::GroupView;

/// The pace at which a standby replays is that of this time: short, for it changes at once when
/// replay is resumed.
const REPLAY_WINDOW: Duration = Duration::from_secs(15);

/// A clock that is off by more was set, or will be: what a primary remembers by it has no age.
const SEED_CLOCK_MAX: TimeDelta = TimeDelta::seconds(1);

/// What the decisions need to know besides what the servers say.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A sample older than this says nothing about now: three times the interval between samples
    /// and the limit on an answer.
    pub stale_after: Duration,
    /// How far back positions have an age.
    pub history: Duration,
    /// How long a node is remembered that left the topology.
    pub forget_after: Duration,
}

/// One group: feed it [`Report`]s, and ask it for a [`GroupView`].
#[derive(Debug)]
pub struct Group {
    pub(crate) number: u32,
    pub(crate) limits: Limits,
    pub(crate) nodes: BTreeMap<String, NodeMemory>,
    /// The history of WAL that the lag is measured on; `None` until a primary was seen.
    pub(crate) line: Option<Line>,
    pub(crate) rivals: Rivals,
    pub(crate) pasts: Pasts,
}

/// What is remembered about one node.
#[derive(Debug)]
pub(crate) struct NodeMemory {
    pub(crate) up: Option<bool>,
    pub(crate) fresh_connect: Option<bool>,
    pub(crate) sample: Option<Sample>,
    /// How far a standby had received, a sample before.
    pub(crate) received_before: Option<u64>,
    /// Whether the primary had flushed just as much as a standby has received, and begun to write more.
    pub(crate) primary_has_more: bool,
    /// The newest timeline of which the server had WAL, since it started.
    pub(crate) timeline: Option<u32>,
    /// How far it had replayed when all that it had on its disk at its start was replayed.
    streams_since: Option<u64>,
    /// Whether it has replayed what it streamed.
    has_streamed: bool,
    /// What it was when it last told, in recovery, both its timeline and how far it had replayed.
    replayed: Option<Replayed>,
    /// The same, the last time on an older timeline.
    replayed_before: Option<Replayed>,
    pub(crate) replay_pace: Pace,
    pub(crate) reign: Option<Reign>,
    pub(crate) details: Option<Box<Details>>,
    /// Which statement waits for standbys the longest, and when it was first seen to.
    sync_wait: Option<(DateTime<Utc>, Duration)>,
    pub(crate) held_back: HeldBack,
    /// Whether the last question was refused.
    is_refused: bool,
    /// When it left the topology.
    pub(crate) left_at: Option<Duration>,
}

impl NodeMemory {
    fn new() -> Self {
        Self {
            up: None,
            fresh_connect: None,
            sample: None,
            received_before: None,
            primary_has_more: false,
            timeline: None,
            streams_since: None,
            has_streamed: false,
            replayed: None,
            replayed_before: None,
            replay_pace: Pace::over(REPLAY_WINDOW),
            reign: None,
            details: None,
            sync_wait: None,
            held_back: HeldBack::default(),
            is_refused: false,
            left_at: None,
        }
    }

    /// The newest sample, unless it is too old to say anything about `now`, or a later question was
    /// not answered.
    pub(crate) fn fresh(&self, now: Duration, stale_after: Duration) -> Option<&Sample> {
        let sample = self.sample.as_ref().filter(|_| self.up == Some(true));
        sample.filter(|sample| now <= sample.answered_at + stale_after)
    }

    /// The server is not the one it was: nothing that it was seen to be counts.
    fn forget_unless(&mut self, system_identifier: u64, started_at: DateTime<Utc>) {
        let is_same = self.sample.is_some_and(|Sample { identity, .. }| {
            identity.system_identifier == system_identifier && identity.started_at == started_at
        });
        if !is_same {
            let Self { up, fresh_connect, left_at, .. } = *self;
            *self = Self { up, fresh_connect, left_at, ..Self::new() };
        }
    }

    fn follows(&mut self, sample: &Sample, position: &StandbyPosition) {
        self.reign = None;
        self.received_before = match self.sample {
            Some(Sample { position: Position::Standby(before), .. }) => {
                before.receive_lsn.map(u64::from)
            }
            _ => None,
        };
        self.timeline = self.timeline.max(position.timeline);
        // Streaming begins where the WAL on the disk ends, after that is replayed.
        let streams = self.sample.is_some_and(|before| match before.position {
            Position::Standby(before) => before.receive_lsn.is_some(),
            Position::Primary { .. } => false,
        });
        if let Some(lsn) = position.replay_lsn.map(u64::from) {
            if streams {
                self.has_streamed |= *self.streams_since.get_or_insert(lsn) < lsn;
            }
            self.replay_pace.push(sample.answered_at, lsn);
            if let Some(timeline) = position.timeline.and(self.timeline) {
                if self.replayed.is_some_and(|it| it.timeline < timeline) {
                    self.replayed_before = self.replayed;
                }
                let Sample { asked_at, answered_at, .. } = *sample;
                self.replayed = Some(Replayed { asked_at, answered_at, timeline, lsn });
            }
        }
    }

    /// Takes in what a standby said between two samples.
    fn learn(&mut self, details: Box<Details>) {
        // They were asked for right after the positions.
        let end_lsn = self.sample.and_then(|sample| sample.position.lsn());
        self.held_back.push(details.answered_at, end_lsn, details.slots.as_deref());
        let oldest = details.sync_waits.and_then(|it| it.oldest);
        let known = self.sync_wait.filter(|(known, _)| Some(*known) == oldest);
        self.sync_wait = known.or(oldest.map(|it| (it, details.answered_at)));
        self.details = Some(details);
    }

    /// For how long a commit has surely waited for standbys; `None` if that is not told.
    pub(crate) fn sync_wait(&self, details: &Details) -> Option<Duration> {
        let since = |(_, since): (_, Duration)| details.asked_at.saturating_sub(since);
        details.sync_waits.map(|_| self.sync_wait.map(since).unwrap_or_default())
    }

    /// Takes in that a question was not answered.
    fn fail(&mut self, stage: Stage) {
        // A promotion makes a server refuse the question that it interrupts.
        let was_refused = std::mem::replace(&mut self.is_refused, stage == Stage::Query);
        if self.is_refused && !was_refused && self.up == Some(true) {
            return;
        }
        self.up = Some(false);
    }

    /// Whether it had replayed more than the primary said later that it has.
    fn is_ahead(&self, timeline: u32, source: &Source) -> bool {
        let is_ahead = self.replayed.is_some_and(|it| {
            it.timeline == timeline
                && it.answered_at <= source.asked_at
                && source.flush_lsn < it.lsn
        });
        is_ahead && self.reign.is_none()
    }

    fn reigns(&mut self, sample: &Sample, timeline: u32, flush_lsn: u64) {
        let Sample { identity, asked_at, answered_at, .. } = *sample;
        let before = self.reign.filter(|before| before.timeline == timeline);
        self.timeline = Some(timeline);
        self.reign = Some(Reign {
            system_identifier: identity.system_identifier,
            timeline,
            started_at: identity.started_at,
            since: before.map_or(answered_at, |before| before.since),
            until: asked_at,
            flush_lsn,
        });
    }
}

impl Group {
    /// A group of which nothing is known.
    pub fn new(number: u32, limits: Limits) -> Self {
        Self {
            number,
            limits,
            nodes: BTreeMap::new(),
            line: None,
            rivals: Rivals::default(),
            pasts: Pasts::default(),
        }
    }

    /// Takes up what another process knew, before the first report; says whether it could.
    pub fn restore(&mut self, saved: SavedGroup) -> bool {
        let SavedGroup { system_identifier, timeline, forks, pasts, entries, .. } = saved;
        self.pasts = pasts;
        let ring = Ring::from_entries(entries);
        let line = ring.map(|ring| Line::new(system_identifier, timeline, ring, forks));
        let could = line.is_some();
        self.line = line;
        could
    }

    /// What another process would need to know.
    pub fn saved(&self) -> Option<SavedGroup> {
        // A primary that comes cannot be compared with the disk of a standby.
        self.line.as_ref().filter(|line| !line.is_of_standby).map(|line| SavedGroup {
            group: self.number,
            system_identifier: line.system_identifier,
            timeline: line.timeline,
            forks: line.forks.clone(),
            pasts: self.pasts.clone(),
            entries: line.ring.entries().to_vec(),
        })
    }

    /// Says which nodes the topology has now. One that it no longer has is remembered for
    /// [`Limits::forget_after`], and longer if it is a primary beside another one.
    pub fn set_members(&mut self, names: &[String], now: Duration) {
        for name in names {
            self.nodes.entry(name.clone()).or_insert_with(NodeMemory::new).left_at = None;
        }
        let forget_after = self.limits.forget_after;
        self.nodes.retain(|name, node| {
            // Of one that was never asked there is nothing to remember.
            if !names.contains(name) && node.up.is_none() {
                return false;
            }
            let left_at = (!names.contains(name)).then(|| *node.left_at.get_or_insert(now));
            left_at.is_none_or(|left_at| now < left_at + forget_after)
        });
    }

    /// Whether nothing is left of it: neither a node nor a position whose age may still be asked
    /// for. A group may be missing from the topology for a while, as when it is read for the first
    /// time.
    pub fn is_forgotten(&self, now: Duration) -> bool {
        let newest = self.line.as_ref().and_then(|line| line.ring.newest());
        let knows_ages = newest.is_some_and(|newest| {
            micros(now).saturating_sub(newest.not_passed_at) < micros(self.limits.history)
        });
        self.nodes.is_empty() && !knows_ages
    }

    /// Takes in what was learnt about a node; what is said of a node nobody named is dropped.
    pub fn record(&mut self, name: &str, report: Report) -> Option<Change> {
        let node = self.nodes.get_mut(name)?;
        match report {
            Report::Sample(sample) => return self.record_sample(name, sample),
            Report::Details(details) => node.learn(details),
            Report::Seed(seed) => {
                let is_right = node.sample.is_some_and(|it| it.clock_ahead.abs() <= SEED_CLOCK_MAX);
                if let Some(line) = &mut self.line {
                    if is_right {
                        line.plant(name, &seed);
                    } else {
                        line.leave_unplanted(name);
                    }
                }
            }
            Report::SeedRefused => {
                if let Some(line) = &mut self.line {
                    line.leave_unplanted(name);
                }
            }
            Report::Failed { stage, .. } => node.fail(stage),
            Report::FreshConnect { outcome, .. } => node.fresh_connect = Some(outcome.is_ok()),
        }
        None
    }

    /// The primary that should be asked for a [`crate::observation::Seed`], or none. Once it is
    /// recorded, no longer; one without files is as good as any.
    pub fn wants_seed(&self) -> Option<&str> {
        let wants = |line: &&Line| line.wants_seed && !line.is_of_standby && !line.ring.is_empty();
        let line = self.line.as_ref().filter(wants)?;
        line.source.as_ref().map(|source| source.name.as_str())
    }

    /// What is known at `now`.
    pub fn view(&self, now: Duration) -> GroupView {
        decide::view(self, now)
    }

    /// Who says that they are primaries, also after they left the topology: Patroni's members
    /// leave it when Patroni dies, and the server may go on.
    pub(crate) fn reigns(&self) -> Vec<(&str, Reign)> {
        self.nodes.iter().filter_map(|(name, node)| Some((name.as_str(), node.reign?))).collect()
    }

    fn record_sample(&mut self, name: &str, sample: Sample) -> Option<Change> {
        let node = self.nodes.get_mut(name)?;
        if node.sample.is_some_and(|before| sample.asked_at < before.asked_at) {
            return None;
        }
        let identity = sample.identity;
        node.forget_unless(identity.system_identifier, identity.started_at);
        (node.up, node.is_refused) = (Some(true), false);
        let replayed = [node.replayed, node.replayed_before];
        let run = |timeline| Run::of(&sample, timeline);
        let offer = |timeline, flush_lsn, inserted, fork_lsn| Offer {
            name,
            sample: &sample,
            timeline,
            flush_lsn,
            inserted,
            fork_lsn,
            // It is in recovery for a while after it has begun a timeline, until its
            // `recovery_end_command` has ended.
            replayed: replayed.into_iter().flatten().find(|it| it.timeline < timeline),
        };
        let offer = match sample.position {
            Position::Standby(position) => {
                node.follows(&sample, &position);
                let received = position.receive_lsn.map(u64::from);
                let source = self.line.as_ref().and_then(|line| line.source.as_ref());
                node.primary_has_more =
                    source.is_some_and(|it| it.has_more && Some(it.flush_lsn) == received);
                let timeline = node.timeline;
                if let Some(timeline) = position.timeline.and(timeline) {
                    self.pasts.follows(name, run(timeline), node.has_streamed);
                }
                let leads = timeline.zip(leader::leads(self, name, &sample));
                leads.map(|(timeline, received)| offer(timeline, received, received, None))
            }
            Position::Primary { timeline, flush_lsn, insert_lsn, fork_lsn } => {
                let inserted = before_page_header(insert_lsn.into(), identity.wal_segment_bytes);
                let (flush_lsn, fork_lsn) = (flush_lsn.into(), fork_lsn.map(u64::from));
                node.reigns(&sample, timeline, flush_lsn);
                self.pasts.writes(name, run(timeline));
                Some(offer(timeline, flush_lsn, inserted, fork_lsn))
            }
        };
        let change = offer.and_then(|offer| self.follow(offer));
        let mut rivals = std::mem::take(&mut self.rivals);
        rivals.update(&self.reigns(), sample.answered_at, self.limits.stale_after);
        for (_, node) in self.nodes.iter_mut().filter(|(name, _)| rivals.has(name)) {
            node.left_at = node.left_at.map(|_| sample.answered_at);
        }
        self.rivals = rivals;
        if let Some(node) = self.nodes.get_mut(name) {
            node.sample = Some(sample);
        }
        change
    }

    fn follow(&mut self, offer: Offer<'_>) -> Option<Change> {
        let line = self.line.get_or_insert_with(|| Line::begin(offer));
        let change = line.follow(offer, self.limits);
        let is_primary = !line.is_of_standby;
        if let Some(source) = line.source.as_ref().filter(|it| is_primary && it.name == offer.name)
        {
            let nodes = self.nodes.iter();
            for (name, node) in nodes.filter(|(_, it)| it.is_ahead(offer.timeline, source)) {
                if let Some(sample) = &node.sample {
                    self.pasts.strays(name, Run::of(sample, offer.timeline));
                }
            }
        }
        change
    }
}
