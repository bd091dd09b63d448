//! The standby leader: in a group that follows a primary elsewhere, as a `standby_cluster` of
//! Patroni does, the standby that the others' lag is measured against.
//!
//! Nobody says that there is such a primary. The signs: each member was seen, and each in recovery,
//! and one has a receiver that streams, not from another member.

use crate::group::{Group, NodeMemory};
use crate::observation::{Position, ReceiverStatus, Sample};

/// How far a standby has WAL on its disk, and whether more of it is coming.
struct Received {
    lsn: u64,
    streams: bool,
}

/// `None` of a primary, and of a standby that has nothing.
fn received(sample: &Sample) -> Option<Received> {
    let Position::Standby(position) = &sample.position else { return None };
    let lsn = position.receive_lsn.max(position.replay_lsn)?.into();
    let streams = position.receiver.is_some_and(|it| it.status == ReceiverStatus::Streaming);
    Some(Received { lsn, streams })
}

/// Returns how far the node `name` has received WAL by `sample`, its newest, if it leads `group`.
pub fn leads(group: &Group, name: &str, sample: &Sample) -> Option<u64> {
    let Received { lsn, .. } = received(sample).filter(|it| it.streams)?;
    let others = || group.nodes.iter().filter(|(other, _)| *other != name);
    let was_standby = |node: &NodeMemory| node.sample.as_ref().and_then(received).is_some();
    // One that was never reached may be the primary.
    let all_are_standbys = others().all(|(_, node)| node.left_at.is_some() || was_standby(node));
    // One that has lost its upstream has as much as those that still stream from it.
    let other_may_lead = others().any(|(_, node)| {
        let of = node.fresh(sample.asked_at, group.limits.stale_after).and_then(received);
        of.is_some_and(|it| !it.streams && lsn <= it.lsn)
    });
    let is_free = all_are_standbys && !follows_another(group, name);
    (is_free && is_next(group, name, sample, other_may_lead)).then_some(lsn)
}

/// Whether it is the leader already, or may take over from the one there is.
fn is_next(group: &Group, name: &str, sample: &Sample, other_may_lead: bool) -> bool {
    let Some(line) = &group.line else { return !other_may_lead };
    let Some(source) = &line.source else { return !other_may_lead };
    if !line.is_of_standby {
        return source.asked_at + group.limits.forget_after < sample.asked_at && !other_may_lead;
    }
    if source.name == name {
        return true;
    }
    let is_silent = group
        .nodes
        .get(&source.name)
        .is_none_or(|node| node.fresh(sample.asked_at, group.limits.stale_after).is_none());
    // It had more, before the leader was asked.
    let before = group.nodes.get(name).and_then(|node| node.sample);
    let was_ahead = before.is_some_and(|before| {
        before.answered_at <= source.asked_at
            && received(&before).is_some_and(|it| source.flush_lsn < it.lsn)
    });
    (is_silent && !other_may_lead) || was_ahead || follows_another(group, &source.name)
}

/// Whether a member sends WAL to that standby, by the name that its receiver goes by. Unless it
/// is not the only one with that: then by the member's, as Patroni calls each.
fn follows_another(group: &Group, name: &str) -> bool {
    let others = || group.nodes.iter().filter(|(other, _)| *other != name);
    let called =
        |node: &NodeMemory| node.details.as_ref()?.standby.as_ref()?.application_name.clone();
    let own = group.nodes.get(name).and_then(called);
    let own = own.filter(|own| others().all(|(_, node)| called(node).as_ref() != Some(own)));
    let known_as = own.as_deref().unwrap_or(name);
    let details = others().filter_map(|(_, node)| node.details.as_ref());
    details.flat_map(|it| it.senders.iter().flatten()).any(|it| it.application_name == known_as)
}
