//! The groups and their servers, as they are drawn.

use std::collections::BTreeMap;

use super::strip::{Strip, strip};
use crate::check::Status;
use crate::component::Component;
use crate::judge::words::{bytes, counted};
use crate::monitor::State;
use crate::probe::postgres::PostgresFacts;
use crate::settle::Now;

/// More groups than these are closed unless something is wrong with them.
const GROUPS_OPEN_MAX: usize = 8;

/// A group.
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) part: &'static str,
    pub(super) status: &'static str,
    pub(super) is_open: bool,
    pub(super) summary: String,
    pub(super) nodes: Vec<Node>,
    pub(super) hour: Strip,
}

/// A server of it.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) status: &'static str,
    pub(super) role: &'static str,
    pub(super) class: &'static str,
    pub(super) lag: String,
    pub(super) timeline: String,
    pub(super) connections: String,
    /// Of the connections there may be.
    pub(super) percent: Option<u32>,
}

/// The groups; of many those first that are not well.
pub(super) fn groups(state: &State, now: Now) -> Vec<Group> {
    let primaries = state.primaries.names();
    let mut nodes = BTreeMap::<u32, Vec<&Component>>::new();
    for component in state.facts.postgres.keys() {
        nodes.entry(component.group.unwrap_or_default()).or_default().push(component);
    }
    let has_citus = state.facts.deep.values().filter_map(|it| it.now());
    let has_citus = has_citus.into_iter().any(|it| it.extensions.contains_key("citus"));
    let opens_all = nodes.len() <= GROUPS_OPEN_MAX;
    let drawn = nodes.into_iter().map(|(number, mut members)| {
        let primary = primaries.get(&number);
        let facts = |it: &Component| state.facts.postgres.get(it).and_then(|it| it.now());
        members.sort_by_key(|it| (Some(&it.name) != primary, facts(it).is_none(), &it.name));
        let head = members.first().filter(|it| Some(&it.name) == primary).and_then(|it| facts(it));
        let status = state.verdicts.groups.get(&number).map_or(Status::Unknown, |it| it.status);
        let past = state.past.iter().map(|it| (it.at, it.groups.get(&number).copied()));
        Group {
            number,
            part: match (has_citus, number) {
                (false, _) => "",
                (true, 0) => "(coordinator)",
                (true, _) => "(worker)",
            },
            status: status.name(),
            is_open: opens_all || status != Status::Ok,
            summary: summary(&members, head, facts),
            nodes: members.iter().map(|it| node(state, it, facts(it), head)).collect(),
            hour: strip(past, now.wall),
        }
    });
    let mut drawn: Vec<_> = drawn.collect();
    if !opens_all {
        drawn.sort_by_key(|it| !it.is_open);
    }
    drawn
}

/// `a takes writes · 2 standbys, lag up to 1.2 MiB`.
fn summary<'a>(
    members: &[&Component],
    primary: Option<&PostgresFacts>,
    facts: impl Fn(&Component) -> Option<&'a PostgresFacts>,
) -> String {
    let all: Vec<_> = members.iter().filter_map(|it| facts(it)).collect();
    let standbys: Vec<_> = all.iter().filter(|it| it.in_recovery).collect();
    let writes = match (primary.filter(|it| !it.in_recovery), members.first()) {
        (Some(_), Some(first)) => format!("{} takes writes", first.name),
        _ => "no primary seen".to_owned(),
    };
    let mut parts = vec![writes];
    if !standbys.is_empty() {
        let lag = standbys.iter().filter_map(|it| lag(it, primary)).max();
        let lag = lag.map_or_else(String::new, |it| match it {
            0 => ", no lag".to_owned(),
            _ => format!(", lag up to {}", bytes(it)),
        });
        parts.push(counted(standbys.len() as u64, "standby", "standbys") + &lag);
    }
    let silent = members.len() - all.len();
    if silent > 0 {
        parts.push(format!("{silent} without an answer"));
    }
    parts.join(" · ")
}

fn lag(standby: &PostgresFacts, primary: Option<&PostgresFacts>) -> Option<u64> {
    let primary = primary.filter(|it| !it.in_recovery)?;
    Some(u64::from(primary.lsn?).saturating_sub(u64::from(standby.lsn?)))
}

fn node(
    state: &State,
    component: &Component,
    facts: Option<&PostgresFacts>,
    primary: Option<&PostgresFacts>,
) -> Node {
    let verdict = state.verdicts.components.get(component);
    let status = verdict.map_or(Status::Unknown, |it| it.status);
    let most = component.group.and_then(|it| state.verdicts.groups.get(&it));
    let status = most.map_or(status, |it| status.min(it.status));
    let Some(facts) = facts else {
        let [lag, timeline, connections] = ["?"; 3].map(str::to_owned);
        let (name, role, class) = (component.name.clone(), "no answer", "silent");
        let (status, percent) = (status.name(), None);
        return Node { name, status, role, class, lag, timeline, connections, percent };
    };
    let (used, most) = facts.connections;
    let role = if facts.in_recovery { "standby" } else { "primary" };
    Node {
        name: component.name.clone(),
        status: status.name(),
        role,
        class: role,
        lag: match (facts.in_recovery, lag(facts, primary)) {
            (false, _) => "–".to_owned(),
            (true, Some(lag)) => bytes(lag),
            (true, None) => "?".to_owned(),
        },
        timeline: facts.timeline.to_string(),
        connections: format!("{used} of {most}"),
        percent: (used.min(most) * 100).checked_div(most),
    }
}
