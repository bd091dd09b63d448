//! From what is remembered about a group to what is known about it now.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::group::{Group, NodeMemory};
use crate::lag::{self, Standby};
use crate::line::Line;
use crate::observation::{Details, Position, Sample};
use crate::past::{Pasts, Run, Whose};
use crate::quorum::quorum;
use crate::senders::{sender_views, slot_view};
use crate::split::{Reign, fresh};
use crate::view::{
    Clock, DetailsView, GroupView, Lag, LagState, LagView, MostWal, NodeState, NodeView, Quorum,
    Role, Rpo,
};

/// Details older than this say nothing about now: several times the interval between them.
const DETAILS_STALE_AFTER: Duration = Duration::from_mins(1);

/// What is known about `group` at `now`.
pub fn view(group: &Group, now: Duration) -> GroupView {
    let stale_after = group.limits.stale_after;
    let line = group.line.as_ref();
    let reigns = group.reigns();
    let fresh: Vec<_> = fresh(&reigns, now, stale_after).map(|(_, reign)| reign).collect();
    let uncontested = line.filter(|line| servers(writers(&fresh, line)) <= 1);
    // An age on a leader's disk means nothing without the leader.
    let measures = |line: &&Line| !line.is_of_standby || line.is_fresh(now, stale_after);
    let line_measured = uncontested.filter(measures);
    let context = Context { line: line_measured, pasts: &group.pasts, now, stale_after };
    let primary = context.line.filter(|line| line.is_fresh(now, stale_after));
    let source = primary.and_then(|line| line.source.as_ref());
    let source = source.and_then(|it| group.nodes.get_key_value(&it.name));
    let source = source.filter(|(_, node)| node.reign.is_some());
    let details = source.and_then(|(_, node)| Some((node, context.details(node)?)));
    let sync_wait = details.and_then(|(node, details)| node.sync_wait(details));
    let quorum = details.map_or(Quorum::Unknown, |(_, details)| quorum(details, sync_wait));
    let is_remembered = |node: &NodeMemory| {
        node.left_at.is_none_or(|left_at| now < left_at + group.limits.forget_after)
    };
    let nodes = group.nodes.iter().filter(|(_, node)| is_remembered(node));
    let asked_at = line.and_then(|line| line.source.as_ref()).map(|source| source.asked_at);
    GroupView {
        group: group.number,
        nodes: nodes.map(|(name, node)| context.node(name, node)).collect(),
        primaries: servers(fresh.iter()),
        primary: source.map(|(name, _)| name.clone()),
        standby_leader: primary.filter(|line| line.is_of_standby).and_then(Line::source_name),
        primary_sample_age: asked_at.map(|asked_at| now.saturating_sub(asked_at)),
        system_identifier: line.map(|line| line.system_identifier),
        timeline: line.map(|line| line.timeline),
        split_brain: group.rivals.verdict(&reigns, now, stale_after),
        quorum,
        sync_waiting: details.and_then(|(_, it)| it.sync_waits).map(|it| it.sessions),
        sync_wait,
        rpo: source.map_or(Rpo::Unknown, |_| context.rpo(group)),
        most_wal: context.most_wal(group),
        wal_written_bytes: line.map_or(0, |line| line.written_bytes),
        wal_bytes_per_second: primary.and_then(|line| line.rate.bytes_per_second()),
        history: line.and_then(|line| line.ring.reach(now)),
        history_entries: line.map_or(0, |line| line.ring.entries().len()),
    }
}

/// Those who write the timeline that the lag is measured on. If two do, a position does not say
/// whose WAL it is in.
fn writers<'a>(reigns: &'a [Reign], line: &Line) -> impl Iterator<Item = &'a Reign> {
    let (system_identifier, timeline) = (line.system_identifier, line.timeline);
    reigns
        .iter()
        .filter(move |it| it.system_identifier == system_identifier && it.timeline == timeline)
}

/// How many servers these are. One that is listed by two names is one.
fn servers<'a>(reigns: impl Iterator<Item = &'a Reign>) -> u32 {
    let servers: BTreeSet<_> = reigns.map(|reign| reign.started_at).collect();
    u32::try_from(servers.len()).unwrap_or(u32::MAX)
}

#[derive(Clone, Copy)]
struct Context<'a> {
    /// What lag is measured on; `None` if it cannot be.
    line: Option<&'a Line>,
    pasts: &'a Pasts,
    now: Duration,
    stale_after: Duration,
}

impl Context<'_> {
    fn node(self, name: &str, node: &NodeMemory) -> NodeView {
        let Self { now, stale_after, .. } = self;
        let fresh = node.fresh(now, stale_after);
        let round_trip = |it: &Sample| it.answered_at.saturating_sub(it.asked_at);
        let state = fresh.map(|sample| state(sample, node));
        NodeView {
            name: name.to_owned(),
            is_member: node.left_at.is_none(),
            // One that was lately not asked at all does not answer either.
            up: node.up.map(|_| fresh.is_some()),
            fresh_connect: node.fresh_connect,
            last_success_age: node.sample.map(|it| now.saturating_sub(it.answered_at)),
            round_trip: node.sample.as_ref().map(round_trip),
            lag: self.lag(name, node),
            details: self
                .details(node)
                .map(|details| self.details_view(details, node, state.as_ref())),
            state,
        }
    }

    fn lag(self, name: &str, node: &NodeMemory) -> Option<LagView> {
        let state = match (node.fresh(self.now, self.stale_after), self.line) {
            (Some(Sample { position: Position::Primary { .. }, .. }), _) => return None,
            (Some(_), Some(line)) => {
                let standby = self.standby(name, node, line)?;
                let lag = lag::lag(standby, line, self.now, self.stale_after);
                // What the leader itself has not received, nobody here knows.
                let leads = line.is_of_standby && line.source_name().as_deref() == Some(name);
                let unknown = LagView { receive: Lag::default(), receive_bytes: None, ..lag };
                return Some(if leads { unknown } else { lag });
            }
            (Some(_), None) => LagState::PrimaryUnknown,
            (None, _) if node.up.is_none() => LagState::Unknown,
            (None, _) => LagState::Unreachable,
        };
        Some(lag::none(state))
    }

    fn standby<'b>(self, name: &str, node: &'b NodeMemory, line: &Line) -> Option<Standby<'b>> {
        let sample = node.fresh(self.now, self.stale_after)?;
        let Position::Standby(position) = &sample.position else { return None };
        let timeline = position.timeline.and(node.timeline);
        let whose = |timeline| self.pasts.whose(name, Run::of(sample, timeline), line.timeline);
        Some(Standby {
            sample,
            position,
            received_before: node.received_before,
            primary_has_more: node.primary_has_more,
            timeline,
            whose: timeline.map_or(Whose::Unclear, whose),
            bytes_per_second: node.replay_pace.bytes_per_second(),
        })
    }

    /// Which standby that answers has most of the primary's WAL on its disk, and what it lacks.
    fn rpo(self, group: &Group) -> Rpo {
        let Some(line) = self.line else { return Rpo::Unknown };
        let mut best: Option<(u64, &String, LagView)> = None;
        let mut lower = Some(Duration::MAX);
        let mut is_undecided = false;
        for (name, node) in &group.nodes {
            match self.received(name, node, line) {
                Ok(Some((received, lag))) => {
                    lower = lower.min(lag.receive.lower);
                    if best.as_ref().is_none_or(|(most, ..)| *most < received) {
                        best = Some((received, name, lag));
                    }
                }
                Ok(None)
                | Err(LagState::Diverged | LagState::OtherCluster | LagState::Unreachable) => {}
                // It answers, and may have more than those that are known.
                Err(state) => {
                    lower = None;
                    is_undecided |= state == LagState::Unknown;
                }
            }
        }
        match best {
            Some((_, name, LagView { receive, receive_bytes, .. })) => Rpo::Loss {
                standby: name.clone(),
                lag: Lag { lower, ..receive },
                bytes: receive_bytes,
            },
            None if is_undecided => Rpo::Unknown,
            None => Rpo::NoStandby,
        }
    }

    /// Which standby that answers has most of what the primary was last seen to have.
    fn most_wal(self, group: &Group) -> Option<MostWal> {
        let line = self.line.filter(|line| !line.is_of_standby)?;
        let end = line.ring.newest()?.lsn;
        let mut most: Option<(u64, &String)> = None;
        for (name, node) in &group.nodes {
            let tells = node.sample.is_some_and(|it| match it.position {
                Position::Standby(position) => position.receive_lsn.is_some(),
                Position::Primary { .. } => true,
            });
            match self.received(name, node, line) {
                Ok(Some((received, _))) if tells => most = most.max(Some((received, name))),
                Ok(None)
                | Err(LagState::Diverged | LagState::OtherCluster | LagState::Unreachable) => {}
                Ok(Some(_)) | Err(_) => return None,
            }
        }
        let (received, name) = most?;
        Some(MostWal { standby: name.clone(), lacks_bytes: end.saturating_sub(received) })
    }

    /// How far a standby has received the line, and its lag; `None` of a primary.
    fn received(
        self,
        name: &str,
        node: &NodeMemory,
        line: &Line,
    ) -> Result<Option<(u64, LagView)>, LagState> {
        if node.fresh(self.now, self.stale_after).is_none() {
            let is_asked = node.up.is_some();
            return Err(if is_asked { LagState::Unreachable } else { LagState::Unknown });
        }
        let Some(standby) = self.standby(name, node, line) else { return Ok(None) };
        let received = lag::positions(standby, line)?.receive;
        Ok(Some((received, lag::lag(standby, line, self.now, self.stale_after))))
    }

    /// The details of a node that answers, unless they are too old.
    fn details(self, node: &NodeMemory) -> Option<&Details> {
        node.fresh(self.now, self.stale_after)?;
        let is_fresh = |it: &&Details| self.now <= it.answered_at + DETAILS_STALE_AFTER;
        node.details.as_deref().filter(is_fresh)
    }

    fn details_view(
        self,
        details: &Details,
        node: &NodeMemory,
        state: Option<&NodeState>,
    ) -> DetailsView {
        let end_lsn = state.and_then(|state| state.wal_lsn).map(u64::from);
        // Whoever confirms whole segments holds back up to two of them.
        let confirmed_by = node.sample.map_or(0, |it| it.identity.wal_segment_bytes);
        let slots = details.slots.as_ref().map(|slots| {
            let growth = |slot| node.held_back.growth(slot, 2 * confirmed_by);
            let view = |slot| slot_view(slot, end_lsn, growth(slot));
            slots.iter().map(view).collect()
        });
        let standby = details.standby.as_ref();
        DetailsView {
            age: Some(self.now.saturating_sub(details.answered_at)),
            senders: details.senders.as_deref().map(sender_views),
            slots,
            conflicts: details.conflicts,
            archiver: details.archiver,
            apply_delay: standby.and_then(|it| it.apply_delay),
            upstream: standby.and_then(|it| it.upstream.clone()),
            upstream_slot: standby.and_then(|it| it.slot.clone()),
            application_name: standby.and_then(|it| it.application_name.clone()),
        }
    }
}

fn state(sample: &Sample, node: &NodeMemory) -> NodeState {
    let half_round_trip = sample.answered_at.saturating_sub(sample.asked_at) / 2;
    let common = NodeState {
        role: Role::Primary,
        system_identifier: sample.identity.system_identifier,
        server_version: sample.identity.server_version,
        timeline: node.timeline,
        wal_lsn: None,
        receive_lsn: None,
        replay_pause: None,
        receiver: None,
        clock: Clock {
            ahead_seconds: sample.clock_ahead.as_seconds_f64(),
            error_seconds: half_round_trip.as_secs_f64(),
        },
    };
    match sample.position {
        Position::Primary { flush_lsn, .. } => NodeState { wal_lsn: Some(flush_lsn), ..common },
        Position::Standby(position) => NodeState {
            role: Role::Standby,
            wal_lsn: position.replay_lsn,
            receive_lsn: position.receive_lsn,
            replay_pause: Some(position.replay_pause),
            receiver: position.receiver,
            ..common
        },
    }
}
