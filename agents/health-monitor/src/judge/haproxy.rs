//! What an `HAProxy` says, and what it comes to.

use super::silent::no_answer;
use crate::catalogue::{HAPROXY, HAPROXY_READ, HAPROXY_WRITE};
use crate::check::{Reading, Status};
use crate::facts::Seen;
use crate::probe::haproxy::{HaproxyFacts, Server};

/// The readings of one `HAProxy`.
pub fn judge(seen: &Seen<HaproxyFacts>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&HAPROXY, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let mut readings = vec![Reading::new(&HAPROXY, Status::Ok, "its statistics are there")];
    readings.extend(facts.write.as_ref().map(|servers| write(servers)));
    let writes = facts.write.as_deref().unwrap_or_default();
    readings.extend(facts.read.as_ref().map(|servers| read(servers, writes)));
    readings
}

fn write(servers: &[Server]) -> Reading {
    let reading = |status, reason: String| Reading::new(&HAPROXY_WRITE, status, reason);
    if servers.is_empty() {
        return reading(Status::Unknown, NO_BACKEND.to_owned()).with_next(NO_BACKEND_NEXT);
    }
    let up: Vec<&Server> = servers.iter().filter(|it| it.is_up).collect();
    match up[..] {
        [one] => reading(Status::Ok, format!("{} is up", one.name)),
        [] => reading(Status::Critical, format!("no server is up: {}", states(servers.iter()))),
        _ => {
            let names: Vec<_> = up.iter().take(3).map(|it| it.name.as_str()).collect();
            let reason = format!("{} servers are up: {}", up.len(), names.join(", "));
            reading(Status::Critical, reason)
                .with_next("see the check split_brain of the group; compare with `patronictl list`")
        }
    }
}

/// Compares the one server that is up behind the port for writes with what the servers of the group say,
/// each by its name and whether it is the primary; `None` while it cannot be told.
pub fn compare(seen: &Seen<HaproxyFacts>, group: &[(&str, Option<bool>)]) -> Option<Reading> {
    let servers = seen.now()?.write.as_ref()?;
    let mut up = servers.iter().filter(|it| it.is_up);
    let (Some(one), None) = (up.next(), up.next()) else { return None };
    let Some((_, is_primary)) = group.iter().find(|(name, _)| *name == one.name) else {
        let reason = format!("{} is up, and no server of the group is called so", one.name);
        return Some(Reading::new(&HAPROXY_WRITE, Status::Ok, reason));
    };
    let primary = group.iter().find(|(_, is_primary)| *is_primary == Some(true));
    let reason = match (is_primary, primary) {
        (Some(true), _) | (None, None) => return None,
        (_, Some((primary, _))) => {
            format!("writes go to {}, and {primary} is the primary", one.name)
        }
        (Some(false), None) => format!("writes go to {}, which is a standby", one.name),
    };
    let next = "see the health check of write_backend: it must ask Patroni for `/primary`, not only \
                whether the port is open";
    Some(Reading::new(&HAPROXY_WRITE, Status::Critical, reason).with_next(next))
}

/// `writes` are the servers behind the port for writes: the one that is up there is the primary, which
/// need not serve reads.
fn read(servers: &[Server], writes: &[Server]) -> Reading {
    let reading = |status, reason: String| Reading::new(&HAPROXY_READ, status, reason);
    if servers.is_empty() {
        return reading(Status::Unknown, NO_BACKEND.to_owned()).with_next(NO_BACKEND_NEXT);
    }
    let up = servers.iter().filter(|it| it.is_up).count();
    let is_primary = |it: &Server| writes.iter().any(|other| other.is_up && other.name == it.name);
    let missing: Vec<&Server> = servers.iter().filter(|it| !it.is_up && !is_primary(it)).collect();
    let count = servers.len();
    if up == 0 {
        let reason = format!("no server is up: {}", states(servers.iter()));
        return reading(Status::Critical, reason);
    }
    if missing.is_empty() {
        return reading(Status::Ok, format!("{up} of {count} servers are up"));
    }
    let reason = format!("{up} of {count} servers are up: {}", states(missing.into_iter()));
    reading(Status::Warning, reason)
}

const NO_BACKEND: &str = "the statistics page has no such backend";
const NO_BACKEND_NEXT: &str =
    "compare write_backend and read_backend, which are configured here, with haproxy.cfg";

/// `a is DOWN (L4CON: Connection refused), b is MAINT`: three at most.
fn states<'a>(servers: impl Iterator<Item = &'a Server>) -> String {
    let down = servers.filter(|it| !it.is_up).take(3);
    let states: Vec<_> = down.map(|it| format!("{} is {}", it.name, it.state)).collect();
    states.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed};
    use super::*;
    use crate::facts::Stage;

    fn server(name: &str, is_up: bool) -> Server {
        let state = if is_up { "UP (L7OK 200: OK)" } else { "DOWN (L7STS 503)" };
        Server { name: name.to_owned(), is_up, state: state.to_owned() }
    }

    fn judged(write: Vec<Server>, read: Vec<Server>) -> Vec<(Status, String)> {
        let facts = HaproxyFacts { write: Some(write), read: Some(read) };
        let readings = judge(&answered(facts)).into_iter().skip(1);
        readings.map(|it| (it.status, it.reason)).collect()
    }

    #[test]
    fn exactly_one_server_takes_writes_and_the_others_serve_reads() {
        let (up, down) = (|name| server(name, true), |name| server(name, false));
        for (write, read, expected) in [
            (
                vec![up("a"), down("b"), down("c")],
                vec![down("a"), up("b"), up("c")],
                [(Status::Ok, "a is up"), (Status::Ok, "2 of 3 servers are up")],
            ),
            (
                vec![up("a"), down("b"), down("c")],
                vec![down("a"), up("b"), down("c")],
                [
                    (Status::Ok, "a is up"),
                    (Status::Warning, "1 of 3 servers are up: c is DOWN (L7STS 503)"),
                ],
            ),
            (
                vec![down("a"), down("b")],
                vec![down("a"), up("b")],
                [
                    (
                        Status::Critical,
                        "no server is up: a is DOWN (L7STS 503), b is DOWN (L7STS 503)",
                    ),
                    (Status::Warning, "1 of 2 servers are up: a is DOWN (L7STS 503)"),
                ],
            ),
            (
                vec![up("a"), up("b")],
                vec![down("a"), down("b")],
                [
                    (Status::Critical, "2 servers are up: a, b"),
                    (
                        Status::Critical,
                        "no server is up: a is DOWN (L7STS 503), b is DOWN (L7STS 503)",
                    ),
                ],
            ),
            (vec![], vec![], [(Status::Unknown, NO_BACKEND), (Status::Unknown, NO_BACKEND)]),
        ] {
            let expected = expected.map(|(status, reason)| (status, reason.to_owned()));
            assert_eq!(judged(write, read), expected);
        }
    }

    #[test]
    fn who_gets_the_writes_must_be_the_primary() {
        let (primary, standby) = (Some(true), Some(false));
        let critical = |reason: &str| Some((Status::Critical, reason.to_owned()));
        for (group, expected) in [
            (&[("a", primary), ("b", standby)][..], None),
            (&[("a", standby), ("b", primary)], critical("writes go to a, and b is the primary")),
            (&[("a", None), ("b", primary)], critical("writes go to a, and b is the primary")),
            (&[("a", standby), ("b", standby)], critical("writes go to a, which is a standby")),
            // Nothing is known of it, nor of another.
            (&[("a", None), ("b", standby)], None),
            (
                &[("c", primary)],
                Some((Status::Ok, "a is up, and no server of the group is called so".to_owned())),
            ),
        ] {
            let write = Some(vec![server("a", true), server("b", false)]);
            let facts = HaproxyFacts { write, read: None };
            let found = compare(&answered(facts), group).map(|it| (it.status, it.reason));
            assert_eq!(found, expected, "{group:?}");
        }
        let both = Some(vec![server("a", true), server("b", true)]);
        let facts = HaproxyFacts { write: both, read: None };
        assert_eq!(compare(&answered(facts), &[("b", primary)]), None);
    }

    #[test]
    fn what_is_not_configured_is_not_missed() {
        let readings = judge(&answered(HaproxyFacts::default()));
        assert_eq!(readings.len(), 1);
        assert_eq!(readings[0].status, Status::Ok);
        let readings = judge(&failed(Stage::Answer, "the statistics page says 404 Not Found"));
        assert_eq!(readings.len(), 1);
        assert_eq!(readings[0].status, Status::Critical);
    }
}
