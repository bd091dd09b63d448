//! What the backup agents say of the repository, from their `/status`.
//!
//! It is read as it comes: an agent of another version may say more or less, and what is not there is left
//! out.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;

use super::view::since;
use crate::monitor::State;
use crate::settle::Now;

/// The backups of a group.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Backup {
    pub(super) group: String,
    pub(super) newest: String,
    pub(super) window: String,
    pub(super) problems: Vec<String>,
}

/// A row for each group that an agent tells of.
pub(super) fn backups(state: &State, now: Now) -> Vec<Backup> {
    let mut rows = BTreeMap::<u32, Backup>::new();
    for (component, seen) in &state.facts.agents {
        let Some(answer) = &seen.answer else { continue };
        let groups = answer.facts.status.get("groups").and_then(Value::as_object);
        for (number, group) in groups.into_iter().flatten() {
            let Ok(number) = number.parse() else { continue };
            let Some(mut row) = backup(number, group, now.wall) else { continue };
            if seen.failure.is_some() {
                let ago = now.boot.saturating_sub(answer.answered_at);
                let at = now.wall - TimeDelta::from_std(ago).unwrap_or_default();
                let name = &component.name;
                row.problems
                    .push(format!("{name} does not answer; this is of {}", since(at, now.wall)));
            }
            rows.insert(number, row);
        }
    }
    rows.into_values().collect()
}

/// `None` where the agent has nothing to tell of the group: another replica holds it.
fn backup(number: u32, group: &Value, now: DateTime<Utc>) -> Option<Backup> {
    let state = group.get("state")?;
    let repository = state.get("repository").filter(|it| it.is_object());
    let text = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).map(str::to_owned);
    let is = |key: &str| {
        repository.and_then(|it| it.get(key)).and_then(Value::as_bool).unwrap_or_default()
    };
    let time = |key: &str| repository.and_then(|it| text(it, key)?.parse::<DateTime<Utc>>().ok());
    let mut problems = Vec::new();
    problems.extend(text(state, "last_error").map(|it| format!("the last run failed: {it}")));
    let wal = group.get("wal").filter(|it| it.is_object());
    problems.extend(
        wal.and_then(|it| text(it, "failure")).map(|it| format!("WAL is not received: {it}")),
    );
    if is("needs_backup") {
        problems.push("WAL is lost after the newest backup: a new one is needed".to_owned());
    } else if is("gap_seen") {
        problems.push("WAL after the newest backup is missing".to_owned());
    }
    if repository.is_none() && problems.is_empty() {
        return None;
    }
    let moment = |at: DateTime<Utc>| at.format("%Y-%m-%d %H:%M:%S").to_string();
    let window = match (time("reachable_from"), time("reachable_until")) {
        (Some(from), Some(until)) => format!("{} to {}", moment(from), moment(until)),
        (Some(from), None) => format!("{} on", moment(from)),
        _ => "nothing".to_owned(),
    };
    Some(Backup {
        group: format!("group {number}"),
        newest: time("newest_at").map_or_else(|| "none".to_owned(), |it| since(it, now)),
        window,
        problems,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_agent_says_is_shown_whatever_it_leaves_out() {
        let now: DateTime<Utc> = "2026-03-02T12:00:00Z".parse().unwrap();
        let (newest, until) = ("2026-03-02T02:00:00Z", "2026-03-02T11:59:58Z");
        let whole = json!({ "state": { "last_error": null, "repository": {
            "newest_at": newest, "reachable_from": newest, "reachable_until": until,
            "needs_backup": false, "gap_seen": false,
        } }, "wal": { "failure": null } });
        let row = |newest: &str, window: &str, problems: &[&str]| {
            let problems = problems.iter().map(|it| (*it).to_owned()).collect();
            let [newest, window] = [newest, window].map(str::to_owned);
            Some(Backup { group: "group 1".to_owned(), newest, window, problems })
        };
        for (status, expected) in [
            (whole, row("02:00:00 (10 h ago)", "2026-03-02 02:00:00 to 2026-03-02 11:59:58", &[])),
            (
                json!({ "state": { "last_error": "no space", "repository": {
                    "newest_at": null, "needs_backup": true, "gap_seen": true } },
                    "wal": { "failure": "the slot is lost" } }),
                row(
                    "none",
                    "nothing",
                    &[
                        "the last run failed: no space",
                        "WAL is not received: the slot is lost",
                        "WAL is lost after the newest backup: a new one is needed",
                    ],
                ),
            ),
            (json!({ "state": { "repository": null } }), None),
            (json!({ "lag": 1 }), None),
            (json!([]), None),
        ] {
            assert_eq!(backup(1, &status, now), expected, "{status}");
        }
    }
}
