//! What a `PgBouncer` says, and what it comes to.

use super::silent::no_answer;
use super::words::{counted, duration};
use crate::catalogue::{PGBOUNCER, PGBOUNCER_CLIENTS, PGBOUNCER_QUERY, PGBOUNCER_WAITING};
use crate::check::{Reading, Status};
use crate::component::Component;
use crate::facts::{Failure, Seen, Stage};
use crate::probe::pgbouncer::{PgbouncerFacts, Pool, PoolAnswer};
use crate::thresholds::Scale;

/// The readings of one `PgBouncer`.
pub fn judge(component: &Component, seen: &Seen<PgbouncerFacts>, scale: Scale<'_>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&PGBOUNCER, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let version = format!("PgBouncer {} answers", facts.version);
    let mut readings = vec![Reading::new(&PGBOUNCER, Status::Ok, version)];
    readings.extend(facts.query.as_ref().map(query));
    readings.push(waiting(component, &facts.pools, scale));
    readings.push(clients(component, facts.clients, scale));
    readings
}

fn query(outcome: &Result<PoolAnswer, Failure>) -> Reading {
    let reading = |status, reason: &str| Reading::new(&PGBOUNCER_QUERY, status, reason);
    match outcome {
        Ok(PoolAnswer { in_recovery: false, took }) => {
            reading(Status::Ok, &format!("answered in {} ms", took.as_millis()))
        }
        Ok(PoolAnswer { in_recovery: true, .. }) => {
            reading(Status::Critical, "the pool leads to a standby, which takes no writes")
                .with_next("see [databases] in pgbouncer.ini, and where its host leads to now")
        }
        Err(Failure { stage: Stage::Login, error }) => reading(Status::Critical, error).with_next(
            "see the user and the password_file that are configured here for it, and auth_file or \
             auth_query in pgbouncer.ini",
        ),
        Err(Failure { error, .. }) => reading(Status::Critical, error),
    }
}

fn waiting(component: &Component, pools: &[Pool], scale: Scale<'_>) -> Reading {
    let mut waiting: Vec<&Pool> = pools.iter().filter(|it| it.waiting != 0).collect();
    waiting.sort_by_key(|it| std::cmp::Reverse(it.max_wait));
    let longest = waiting.first().map(|it| it.max_wait).unwrap_or_default();
    let describe = |pool: &&Pool| {
        let Pool { database, user, waiting, max_wait, .. } = pool;
        let clients = counted((*waiting).into(), "client waits", "clients wait");
        format!("{clients} for {database} as {user}, the first for {}", duration(*max_wait))
    };
    let worst: Vec<_> = waiting.iter().take(3).map(describe).collect();
    let reason = if worst.is_empty() { "nobody waits".to_owned() } else { worst.join("; ") };
    let measure = ("longest", longest.as_secs_f64(), None);
    scale.judge(component, &PGBOUNCER_WAITING, measure, reason)
}

fn clients(component: &Component, (used, most): (u32, u32), scale: Scale<'_>) -> Reading {
    let share = 100.0 * f64::from(used) / f64::from(most.max(1));
    let reason = format!("{used} of {most} clients are connected");
    scale.judge(component, &PGBOUNCER_CLIENTS, ("used", share, None), reason)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::examples::{answered, failed, scale};
    use super::*;
    use crate::component::Kind;

    fn pool(database: &str, waiting: u32, seconds: u64) -> Pool {
        Pool {
            database: database.to_owned(),
            user: "app".to_owned(),
            waiting,
            max_wait: Duration::from_secs(seconds),
            is_by_session: false,
        }
    }

    fn facts(pools: Vec<Pool>, used: u32) -> PgbouncerFacts {
        PgbouncerFacts { version: "1.24.1".to_owned(), clients: (used, 100), pools, query: None }
    }

    fn read(facts: PgbouncerFacts) -> Vec<(&'static str, Status, String)> {
        let component = Component::of_group(Kind::Pgbouncer, 0, "pgbouncer-1");
        let readings = judge(&component, &answered(facts), scale()).into_iter();
        readings.map(|it| (it.check.name, it.status, it.reason)).collect()
    }

    #[test]
    fn queues_and_clients_are_measured() {
        let found = read(facts(vec![pool("a", 0, 0)], 3));
        let expected = [
            ("reachable", Status::Ok, "PgBouncer 1.24.1 answers".to_owned()),
            ("waiting", Status::Ok, "nobody waits".to_owned()),
            ("clients", Status::Ok, "3 of 100 clients are connected".to_owned()),
        ];
        assert_eq!(found, expected);

        let pools = vec![pool("a", 1, 2), pool("b", 7, 40), pool("c", 2, 1), pool("d", 1, 0)];
        let found = read(facts(pools, 85));
        let waits = "7 clients wait for b as app, the first for 40 s; \
                     1 client waits for a as app, the first for 2.0 s; \
                     2 clients wait for c as app, the first for 1.0 s";
        assert_eq!(found[1], ("waiting", Status::Critical, waits.to_owned()));
        assert_eq!(found[2].1, Status::Warning);
    }

    #[test]
    fn the_query_must_reach_a_server_that_takes_writes() {
        let took = Duration::from_millis(3);
        let failure = |stage, error: &str| Failure { stage, error: error.to_owned() };
        for (outcome, status, reason) in [
            (Ok(PoolAnswer { took, in_recovery: false }), Status::Ok, "answered in 3 ms"),
            (
                Ok(PoolAnswer { took, in_recovery: true }),
                Status::Critical,
                "the pool leads to a standby, which takes no writes",
            ),
            (
                Err(failure(Stage::Timeout, "no answer within 800ms")),
                Status::Critical,
                "no answer within 800ms",
            ),
        ] {
            let found = query(&outcome);
            assert_eq!((found.status, found.reason.as_str()), (status, reason));
        }
    }

    #[test]
    fn one_that_is_silent_says_nothing_else() {
        let component = Component::of_group(Kind::Pgbouncer, 0, "pgbouncer-1");
        let readings = judge(&component, &failed(Stage::Timeout, "no answer within 1s"), scale());
        assert_eq!(readings.len(), 1);
        assert!(readings[0].next_step().starts_with("it hangs"), "{readings:?}");
    }
}
