//! What a member's Patroni says, and what it comes to.

use std::time::Duration;

use super::silent::no_answer;
use super::words::duration;
use crate::catalogue::{PATRONI, PATRONI_ROLE, PATRONI_STATE};
use crate::check::{Reading, Status};
use crate::facts::Seen;
use crate::probe::patroni::PatroniFacts;
use crate::probe::postgres::PostgresFacts;

/// Without its store for so long, a leader's key has run out: Patroni's default `ttl`.
const STORE_SILENCE: Duration = Duration::from_secs(30);

/// The readings of one member; `server` is what its server says itself, if it answers.
pub fn judge(seen: &Seen<PatroniFacts>, server: Option<&PostgresFacts>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&PATRONI, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let version = format!("Patroni {} answers", facts.version);
    let mut readings = vec![Reading::new(&PATRONI, Status::Ok, version)];
    // The server that does not answer says so itself.
    readings.extend(server.map(|server| role(facts, server)));
    readings.push(state(facts));
    readings
}

fn role(facts: &PatroniFacts, server: &PostgresFacts) -> Reading {
    let role = facts.role.as_str();
    let in_recovery = match role {
        "primary" | "master" => false,
        "replica" | "standby_leader" => true,
        _ => {
            let reason = format!("it says `{role}`, which says nothing of what the server does");
            return Reading::new(&PATRONI_ROLE, Status::Warning, reason);
        }
    };
    if in_recovery == server.in_recovery {
        return Reading::new(&PATRONI_ROLE, Status::Ok, format!("{role}, as the server says"));
    }
    let does = if server.in_recovery { "is in recovery" } else { "takes writes" };
    let reason = format!("it says `{role}`, and the server {does}");
    Reading::new(&PATRONI_ROLE, Status::Critical, reason)
}

fn state(facts: &PatroniFacts) -> Reading {
    let mut troubles = Vec::new();
    // As well by archive, or to the end of its WAL: what a standby receives is another check.
    if !["running", "streaming", "in archive recovery"].contains(&facts.state.as_str()) {
        let next = "see Patroni's log, and that of the server: why it does not start, or what it waits for";
        troubles.push((format!("PostgreSQL is `{}`", facts.state), next));
    }
    if let Some(ago) = facts.store_seen_ago.filter(|ago| STORE_SILENCE < *ago) {
        let next = "see the checks of etcd, and the network from this member to it";
        troubles.push((format!("it has not seen its store for {}", duration(ago)), next));
    }
    if facts.is_paused {
        let reason = "it is paused, and promotes nobody".to_owned();
        troubles.push((reason, "`patronictl resume` after maintenance"));
    }
    if facts.pending_restart {
        let reason = "PostgreSQL must be restarted before its settings hold".to_owned();
        troubles.push((reason, "`patronictl restart` of this member"));
    }
    if troubles.is_empty() {
        return Reading::new(&PATRONI_STATE, Status::Ok, "it is in charge");
    }
    let (reasons, steps): (Vec<_>, Vec<_>) = troubles.into_iter().unzip();
    Reading::new(&PATRONI_STATE, Status::Warning, reasons.join("; ")).with_next(steps.join("; "))
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed, server};
    use super::*;
    use crate::facts::Stage;

    fn facts(role: &str) -> PatroniFacts {
        PatroniFacts {
            role: role.to_owned(),
            state: "running".to_owned(),
            timeline: Some(1),
            version: "4.0.7".to_owned(),
            is_paused: false,
            pending_restart: false,
            store_seen_ago: Some(Duration::from_secs(9)),
        }
    }

    #[test]
    fn a_member_that_is_silent_says_nothing_else() {
        let readings = judge(&failed(Stage::Dial, "no connection: Connection refused"), None);
        assert_eq!(readings.len(), 1);
        assert_eq!(readings[0].check, &PATRONI);
        assert_eq!(readings[0].status, Status::Critical);
        assert_eq!(readings[0].reason, "no connection: Connection refused");
        assert_eq!(readings[0].next_step(), PATRONI.next);
    }

    #[test]
    fn the_role_is_compared_with_what_the_server_does() {
        for (role, in_recovery, status, reason) in [
            ("primary", false, Status::Ok, "primary, as the server says"),
            ("master", false, Status::Ok, "master, as the server says"),
            ("replica", true, Status::Ok, "replica, as the server says"),
            ("standby_leader", true, Status::Ok, "standby_leader, as the server says"),
            ("primary", true, Status::Critical, "it says `primary`, and the server is in recovery"),
            ("replica", false, Status::Critical, "it says `replica`, and the server takes writes"),
            (
                "uninitialized",
                true,
                Status::Warning,
                "it says `uninitialized`, which says nothing of what the server does",
            ),
        ] {
            let readings = judge(&answered(facts(role)), Some(&server(in_recovery)));
            let found = readings.iter().find(|it| it.check == &PATRONI_ROLE).unwrap();
            assert_eq!((found.status, found.reason.as_str()), (status, reason));
        }
        let alone = judge(&answered(facts("primary")), None);
        assert!(alone.iter().all(|it| it.check != &PATRONI_ROLE), "{alone:?}");
    }

    #[test]
    fn what_keeps_it_from_being_in_charge_is_told() {
        let well = facts("primary");
        let long_ago = Some(Duration::from_secs(45));
        for (facts, status, reason) in [
            (well.clone(), Status::Ok, "it is in charge"),
            (PatroniFacts { store_seen_ago: None, ..well.clone() }, Status::Ok, "it is in charge"),
            (
                PatroniFacts { state: "start failed".to_owned(), ..well.clone() },
                Status::Warning,
                "PostgreSQL is `start failed`",
            ),
            (
                PatroniFacts { store_seen_ago: long_ago, ..well.clone() },
                Status::Warning,
                "it has not seen its store for 45 s",
            ),
            (
                PatroniFacts { is_paused: true, pending_restart: true, ..well },
                Status::Warning,
                "it is paused, and promotes nobody; \
                 PostgreSQL must be restarted before its settings hold",
            ),
        ] {
            let found = state(&facts);
            assert_eq!((found.status, found.reason.as_str()), (status, reason));
            assert_eq!(
                found.next_step().contains("patronictl resume"),
                facts.is_paused,
                "{reason}"
            );
        }
    }
}
