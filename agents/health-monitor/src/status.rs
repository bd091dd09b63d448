//! What `/status` shows.

use serde::Serialize;
use serde_json::{Value, json};

use crate::check::Status;
use crate::component::{Component, Kind};
use crate::monitor::State;
use crate::probe::postgres::PostgresFacts;

/// So many events are shown.
const EVENTS: usize = 200;

/// A server, for those who want role, lag and connections and nothing else.
#[derive(Debug, Serialize)]
struct Server<'a> {
    group: Option<u32>,
    node: &'a str,
    status: Status,
    role: &'static str,
    timeline: Option<u32>,
    lag_bytes: Option<u64>,
    connections: Option<u32>,
    connections_max: Option<u32>,
}

/// Everything as JSON.
pub fn status(state: &State) -> Value {
    let components: Vec<Value> = state
        .checks
        .iter()
        .map(|(component, checks)| {
            let verdict = state.verdicts.components.get(component);
            json!({ "component": component, "verdict": verdict, "checks": checks.values().collect::<Vec<_>>() })
        })
        .collect();
    json!({
        "cluster": state.cluster,
        "decided_at": state.decided_at.map(|it| it.wall),
        "verdict": state.verdicts.cluster,
        "groups": state.verdicts.groups,
        "primaries": state.primaries.names(),
        "nodes": nodes(state),
        "components": components,
        "scaling": state.scaling(),
        "past": state.past,
        "events": state.journal.newest().take(EVENTS).collect::<Vec<_>>(),
    })
}

fn nodes(state: &State) -> Vec<Server<'_>> {
    let primaries = state.primaries.names();
    let now = |component: &Component| state.facts.postgres.get(component).and_then(|it| it.now());
    let all = state.facts.postgres.keys().map(|component| {
        let facts = now(component);
        let primary = component.group.and_then(|group| {
            let name = primaries.get(&group)?;
            now(&Component::of_group(Kind::Postgres, group, name))
        });
        let verdict = state.verdicts.components.get(component);
        Server {
            group: component.group,
            node: &component.name,
            status: verdict.map_or(Status::Unknown, |it| it.status),
            role: match facts.map(|it| it.in_recovery) {
                None => "unknown",
                Some(true) => "standby",
                Some(false) => "primary",
            },
            timeline: facts.map(|it| it.timeline),
            lag_bytes: facts.filter(|it| it.in_recovery).zip(primary).and_then(lag),
            connections: facts.map(|it| it.connections.0),
            connections_max: facts.map(|it| it.connections.1),
        }
    });
    all.collect()
}

fn lag((standby, primary): (&PostgresFacts, &PostgresFacts)) -> Option<u64> {
    let (replayed, written) = (u64::from(standby.lsn?), u64::from(primary.lsn?));
    Some(written.saturating_sub(replayed))
}
