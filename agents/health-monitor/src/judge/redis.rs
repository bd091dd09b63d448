//! What a Redis server says, and what it comes to.

use super::silent::no_answer;
use super::words::{bytes, percent};
use crate::catalogue::{REDIS, REDIS_MEMORY, REDIS_ROLE};
use crate::check::{Reading, Status};
use crate::component::Component;
use crate::facts::Seen;
use crate::probe::redis::RedisFacts;
use crate::thresholds::Scale;

/// The readings of one server.
pub fn judge(component: &Component, seen: &Seen<RedisFacts>, scale: Scale<'_>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&REDIS, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let version = format!("Redis {} answers", facts.version);
    let mut readings = vec![Reading::new(&REDIS, Status::Ok, version), role(facts)];
    let (used, most) = facts.memory;
    // Without a limit there is nothing to come near to.
    if most != 0 {
        let reason = format!("{} of {} are in use", bytes(used), bytes(most));
        let measure = ("used", percent(used, most), None);
        readings.push(scale.judge(component, &REDIS_MEMORY, measure, reason));
    }
    readings
}

fn role(facts: &RedisFacts) -> Reading {
    let (status, reason) = if facts.is_loading {
        (Status::Critical, "it reads its data in, and serves nobody until it has".to_owned())
    } else if facts.link_is_up == Some(false) {
        (Status::Warning, "it is a replica, and its link to its master is down".to_owned())
    } else if facts.save_failed {
        (Status::Warning, "its last save to disk failed".to_owned())
    } else {
        (Status::Ok, format!("it is a {}", facts.role))
    };
    Reading::new(&REDIS_ROLE, status, reason)
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed, scale};
    use super::*;
    use crate::component::Kind;
    use crate::facts::Stage;

    #[test]
    fn each_trouble_is_told() {
        let component = Component::new(Kind::Redis, "redis");
        let well = RedisFacts {
            version: "8.0.2".to_owned(),
            role: "master".to_owned(),
            ..RedisFacts::default()
        };
        for (facts, expected) in [
            (well.clone(), vec![(Status::Ok, "it is a master")]),
            (
                RedisFacts { is_loading: true, ..well.clone() },
                vec![(Status::Critical, "it reads its data in, and serves nobody until it has")],
            ),
            (
                RedisFacts { link_is_up: Some(false), ..well.clone() },
                vec![(Status::Warning, "it is a replica, and its link to its master is down")],
            ),
            (
                RedisFacts { save_failed: true, ..well.clone() },
                vec![(Status::Warning, "its last save to disk failed")],
            ),
            (
                RedisFacts { memory: (97 << 20, 100 << 20), ..well },
                vec![
                    (Status::Ok, "it is a master"),
                    (Status::Critical, "97.0 MiB of 100.0 MiB are in use"),
                ],
            ),
        ] {
            let readings = judge(&component, &answered(facts), scale());
            let found: Vec<_> =
                readings.iter().skip(1).map(|it| (it.status, it.reason.as_str())).collect();
            assert_eq!(found, expected);
        }
        let refused = judge(&component, &failed(Stage::Login, "it asks for a password"), scale());
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].status, Status::Critical);
    }
}
