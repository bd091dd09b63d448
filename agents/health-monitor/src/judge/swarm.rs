//! What Docker says of the services of the stack, and what it comes to.

use super::silent::no_answer;
use crate::catalogue::SWARM;
use crate::check::{Reading, Status};
use crate::component::{Component, Kind};
use crate::facts::Seen;
use crate::probe::swarm::{Service, SwarmFacts};

/// The reading of each service; of the stack itself while Docker does not answer, or knows none.
pub fn judge(stack: &Component, seen: &Seen<SwarmFacts>) -> Vec<(Component, Reading)> {
    if let Some(reading) = no_answer(&SWARM, seen) {
        let reading =
            reading.with_next("see whether Docker runs, and its socket is given to this agent");
        return vec![(stack.clone(), reading)];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    if facts.services.is_empty() {
        let reading = Reading::new(&SWARM, Status::Warning, "the stack has no services")
            .with_next("compare swarm.stack, which is configured here, with `docker stack ls`");
        return vec![(stack.clone(), reading)];
    }
    let component = |it: &Service| Component::new(Kind::Swarm, it.name.as_str());
    facts.services.iter().map(|it| (component(it), tasks(it))).collect()
}

fn tasks(service: &Service) -> Reading {
    let Service { running, desired, done, error, .. } = service;
    if *desired <= running + done {
        let reason = match done {
            0 => format!("{running} of {desired} tasks run"),
            _ => format!("{running} of {desired} tasks run, and {done} have ended well"),
        };
        return Reading::new(&SWARM, Status::Ok, reason);
    }
    let status = if *running == 0 { Status::Critical } else { Status::Warning };
    let why = error.as_ref().map(|it| format!(": {}", it.trim_end_matches('.')));
    let reason = format!("{running} of {desired} tasks run{}", why.unwrap_or_default());
    Reading::new(&SWARM, status, reason)
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed};
    use super::*;
    use crate::facts::Stage;

    fn service(name: &str, running: u32, desired: u32, error: Option<&str>) -> Service {
        let error = error.map(str::to_owned);
        Service { name: name.to_owned(), running, desired, done: 0, error }
    }

    #[test]
    fn tasks_that_run_are_compared_with_those_that_should() {
        let stack = Component::new(Kind::Swarm, "mesh");
        let services = vec![
            service("etcd", 3, 3, None),
            service("haproxy", 0, 2, Some("No such image: haproxy:3.0.")),
            service("postgres", 2, 3, None),
            service("stopped", 0, 0, None),
            Service { done: 1, ..service("unpack", 0, 1, None) },
        ];
        let found = judge(&stack, &answered(SwarmFacts { services }));
        let found: Vec<_> = found
            .iter()
            .map(|(it, one)| (it.name.as_str(), one.status, one.reason.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("etcd", Status::Ok, "3 of 3 tasks run"),
                ("haproxy", Status::Critical, "0 of 2 tasks run: No such image: haproxy:3.0"),
                ("postgres", Status::Warning, "2 of 3 tasks run"),
                ("stopped", Status::Ok, "0 of 0 tasks run"),
                ("unpack", Status::Ok, "0 of 1 tasks run, and 1 have ended well"),
            ]
        );
        for (seen, status, reason) in [
            (answered(SwarmFacts::default()), Status::Warning, "the stack has no services"),
            (failed(Stage::Dial, "no connection: x"), Status::Critical, "no connection: x"),
        ] {
            let found = judge(&stack, &seen);
            assert_eq!(found.len(), 1);
            assert_eq!((&found[0].0, found[0].1.status), (&stack, status));
            assert_eq!(found[0].1.reason, reason);
        }
    }
}
