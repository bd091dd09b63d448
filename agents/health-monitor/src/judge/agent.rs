//! What another agent says, and what it comes to.

use super::silent::no_answer;
use crate::catalogue::AGENT;
use crate::check::{Reading, Status};
use crate::facts::Seen;
use crate::probe::agent::AgentFacts;

/// The reading of one agent, if it was ever asked.
pub fn judge(seen: &Seen<AgentFacts>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&AGENT, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    if facts.not_ready.is_empty() {
        return vec![Reading::new(&AGENT, Status::Ok, "it can do its work")];
    }
    let reasons: Vec<_> = facts.not_ready.iter().take(3).map(String::as_str).collect();
    let reason = format!("it cannot do its work: {}", reasons.join("; "));
    vec![Reading::new(&AGENT, Status::Warning, reason)]
}

/// The reading of an agent that is called a backup agent, and tells of no repository.
pub(super) fn other() -> Reading {
    let reason = "its /status is not that of a backup agent: nothing is known of the backups";
    Reading::new(&AGENT, Status::Unknown, reason)
        .with_next("compare its url with the other agents'")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::examples::{answered, failed};
    use super::*;
    use crate::facts::Stage;

    #[test]
    fn an_agent_is_there_and_can_work_or_says_why_not() {
        let facts = |not_ready: &[&str]| {
            let not_ready = not_ready.iter().map(ToString::to_string).collect();
            answered(AgentFacts { not_ready, status: Value::Null })
        };
        for (seen, status, reason) in [
            (facts(&[]), Status::Ok, "it can do its work"),
            (facts(&["a", "b", "c", "d"]), Status::Warning, "it cannot do its work: a; b; c"),
            (
                failed(Stage::Dial, "no connection: Connection refused"),
                Status::Critical,
                "no connection: Connection refused",
            ),
        ] {
            assert_eq!(judge(&seen), [Reading::new(&AGENT, status, reason)]);
        }
    }
}
