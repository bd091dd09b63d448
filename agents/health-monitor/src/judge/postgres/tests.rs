//! What servers say, and what each check makes of it.

use std::collections::BTreeMap;

use chrono::TimeDelta;

use super::*;
use crate::catalogue as all;
use crate::check::Check;
use crate::component::Kind;
use crate::facts::Answer;
use crate::probe::postgres::{
    Blocker, CacheTraffic, Certificate, Checkpoints, DeadRows, DeepFacts, Holder, OpenTransaction,
    Receiver, RunningQuery, Sizes, WalDirectory, Wraparound,
};
use crate::thresholds::Thresholds;

const NOW: Duration = Duration::from_secs(1000);
const MIB: u64 = 1 << 20;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn seen<T>(facts: T) -> Seen<T> {
    let answer = Answer { asked_at: NOW, answered_at: NOW, facts };
    Seen { at: NOW, failure: None, failing_since: None, answer: Some(answer), lost_at: None }
}

fn failing<T>(stage: Stage, error: &str, for_seconds: u64) -> Seen<T> {
    let failure = Some(Failure { stage, error: error.to_owned() });
    let failing_since = NOW.checked_sub(seconds(for_seconds));
    Seen { at: NOW, failure, failing_since, answer: None, lost_at: None }
}

/// A primary on timeline 2 for long, of which nothing is wrong.
fn primary() -> PostgresFacts {
    PostgresFacts {
        server_version: 170_002,
        system_identifier: 7,
        has_monitor: true,
        timeline: 2,
        lsn: Some((1000 * MIB).into()),
        at: NOW,
        role_since: Some(seconds(1)),
        connections: (10, 97),
        standard: Some((NOW, StandardFacts::default())),
        ..PostgresFacts::default()
    }
}

/// A standby of it that has all of it.
fn standby() -> PostgresFacts {
    let receiver =
        Receiver { status: "streaming".to_owned(), silent_for: Some(seconds(3)), lsn: None };
    PostgresFacts {
        in_recovery: true,
        should_stream: true,
        receiver: Some(receiver),
        standard: None,
        ..primary()
    }
}

/// Judges, and prints what is not ok, and the reading of `check`.
fn said(readings: &[Reading], check: &'static Check) -> String {
    let mut said: Vec<String> = readings
        .iter()
        .filter(|it| it.status != Status::Ok || it.check == check)
        .map(|it| format!("{} {}: {}", it.check.name, it.status, it.reason))
        .collect();
    for reading in readings {
        let has_step = !reading.next_step().is_empty();
        assert_eq!(has_step, reading.status != Status::Ok, "{reading:?}");
        assert!(!reading.reason.ends_with('.'), "{reading:?}");
    }
    said.sort();
    said.join(" | ")
}

fn basic(facts: PostgresFacts, beside: Option<&PostgresFacts>, check: &'static Check) -> String {
    said(&judged(&seen(facts), beside), check)
}

fn judged(seen: &Seen<PostgresFacts>, primary: Option<&PostgresFacts>) -> Vec<Reading> {
    let component = Component::of_group(Kind::Postgres, 1, "a");
    let scale = Scale { thresholds: &Thresholds::default(), before: &BTreeMap::new() };
    judge(&component, seen, primary, scale)
}

fn judged_deep(seen: &Seen<DeepFacts>, basic: Option<&PostgresFacts>) -> Vec<Reading> {
    let component = Component::of_group(Kind::Postgres, 1, "a");
    let scale = Scale { thresholds: &Thresholds::default(), before: &BTreeMap::new() };
    judge_deep(&component, seen, basic, scale)
}

#[test]
fn who_does_not_answer_gets_one_reading_with_why() {
    for (stage, error, for_seconds, expected, next) in [
        (Stage::Dial, "no connection", 0, "reachable critical: no connection", "see whether"),
        (
            Stage::Timeout,
            "no login within 1s",
            0,
            "reachable critical: no login within 1s",
            "it hangs",
        ),
        (Stage::Login, "it refuses", 0, "reachable critical: it refuses", "compare password_file"),
        (Stage::Tls, "it is old", 0, "reachable critical: it is old", "see ssl_cert_file"),
        (Stage::Full, "too many", 0, "reachable critical: too many", "see pg_stat_activity"),
        (Stage::NotNow, "it starts", 119, "reachable warning: it starts", "wait"),
        (
            Stage::NotNow,
            "it starts",
            120,
            "reachable critical: it starts, for 2 min",
            "see its log",
        ),
        (Stage::Answer, "no such", 0, "reachable critical: no such", "see the server's log"),
    ] {
        let readings = judged(&failing(stage, error, for_seconds), Some(&primary()));
        assert_eq!(said(&readings, &REACHABLE), expected);
        assert_eq!(readings.len(), 1);
        assert!(readings[0].next_step().starts_with(next), "{}", readings[0].next_step());
    }
}

#[test]
fn servers_that_are_well_have_nothing_but_ok() {
    let primary = primary();
    assert_eq!(basic(primary.clone(), Some(&primary), &REACHABLE), "reachable ok: it answers");
    let role = &all::ROLE;
    assert_eq!(basic(standby(), Some(&primary), role), "role ok: standby on timeline 2");
    let lacks = PostgresFacts { has_monitor: false, connections: (97, 97), ..primary };
    let expected = "reachable warning: the role lacks pg_monitor: much stays unknown";
    assert_eq!(basic(lacks, None, &REACHABLE), expected);
}

#[test]
fn a_server_out_of_its_role_is_told_from_one_that_is_about_to_follow() {
    let of_other = PostgresFacts { system_identifier: 8, ..standby() };
    let older =
        |since| PostgresFacts { timeline: 1, role_since: Some(seconds(since)), ..standby() };
    let archived = PostgresFacts { should_stream: false, receiver: None, ..older(1) };
    let newly = |ago: u64| PostgresFacts { role_since: Some(seconds(1000 - ago)), ..primary() };
    // As they are at the first look, that long ago.
    let found = |facts, ago: u64| PostgresFacts {
        role_since: None,
        connected_at: seconds(1000 - ago),
        ..facts
    };
    let writes = PostgresFacts { timeline: 1, ..primary() };
    let read_only = PostgresFacts { read_only: true, ..primary() };
    let diverged =
        "role critical: it stays on timeline 1, and the primary is on 2: it may have diverged";
    let follows = "role ok: standby on timeline 1, about to follow to 2";
    for (case, facts, beside, expected) in [
        ("no primary", older(1), None, "role ok: standby on timeline 1"),
        (
            "another cluster",
            of_other,
            Some(primary()),
            "role critical: it belongs to another cluster: its system identifier is 8, its primary's 7",
        ),
        ("after a promotion", older(1), Some(newly(29)), follows),
        ("too long after it", older(1), Some(newly(30)), diverged),
        ("it was made a standby just now", older(990), Some(newly(300)), follows),
        (
            "at the first look",
            found(older(1), 0),
            Some(found(primary(), 0)),
            "role warning: standby on timeline 1, about to follow to 2, or it has diverged",
        ),
        ("long after it", found(older(1), 40), Some(found(primary(), 30)), diverged),
        ("by archive", archived.clone(), Some(newly(599)), follows),
        ("by archive, too long", archived, Some(newly(600)), diverged),
        (
            "an old primary",
            writes,
            Some(primary()),
            "role critical: it takes writes on timeline 1, and the primary does on 2",
        ),
        (
            "read only",
            read_only,
            Some(primary()),
            "role critical: it refuses writes: default_transaction_read_only is on",
        ),
    ] {
        assert_eq!(basic(facts, beside.as_ref(), &all::ROLE), expected, "{case}");
    }
}

#[test]
fn a_standby_that_receives_nothing_is_told_while_there_is_a_primary() {
    let gone = |ago: u64| PostgresFacts {
        receiver: None,
        not_streaming_since: Some(seconds(1000 - ago)),
        ..standby()
    };
    let receiver = |status: &str, silent: u64| {
        Some(Receiver { status: status.to_owned(), silent_for: Some(seconds(silent)), lsn: None })
    };
    let waiting = PostgresFacts { receiver: receiver("waiting", 3), ..gone(5) };
    let silent = PostgresFacts { receiver: receiver("streaming", 45), ..standby() };
    let paused = PostgresFacts { replay_paused: true, ..standby() };
    let archived = PostgresFacts { should_stream: false, ..gone(500) };
    let there = Some(primary());
    for (case, facts, beside, expected) in [
        ("streams", standby(), there.clone(), "streaming ok: it streams"),
        ("the primary is gone", gone(500), None, ""),
        (
            "gone",
            gone(59),
            there.clone(),
            "streaming warning: it has received nothing for 59 s: no WAL receiver runs",
        ),
        (
            "gone for long",
            gone(60),
            there.clone(),
            "streaming critical: it has received nothing for 1 min: no WAL receiver runs",
        ),
        (
            "waits",
            waiting,
            there.clone(),
            "streaming warning: it has received nothing for 5.0 s: its WAL receiver is waiting",
        ),
        (
            "hangs",
            silent,
            there.clone(),
            "streaming critical: its WAL receiver has heard nothing for 45 s",
        ),
        ("paused", paused, None, "streaming warning: replay is paused"),
        (
            "by archive",
            archived,
            there,
            "streaming ok: it replays archived WAL: primary_conninfo is empty",
        ),
    ] {
        assert_eq!(basic(facts, beside.as_ref(), &all::STREAMING), expected, "{case}");
    }
}

#[test]
fn a_lag_is_that_of_one_moment() {
    let at = |mib: u64| Some((mib * MIB).into());
    let behind = |mib: u64| PostgresFacts { lsn: at(mib), ..standby() };
    // A gigabyte a second.
    let fast = PostgresFacts {
        at: NOW + seconds(1),
        earlier: Some((seconds(999), 0.into())),
        lsn: at(2000),
        ..primary()
    };
    let late = PostgresFacts {
        apply_delay: seconds(3600),
        receiver: Some(Receiver { lsn: at(999), ..standby().receiver.unwrap() }),
        ..behind(1)
    };
    for (case, facts, beside, expected) in [
        ("none", behind(1000), primary(), "replication_lag ok: it has 0 bytes of WAL to replay"),
        (
            "ahead of what was asked",
            behind(1001),
            primary(),
            "replication_lag ok: it has 0 bytes of WAL to replay",
        ),
        (
            "some",
            behind(936),
            primary(),
            "replication_lag warning: it has 64.0 MiB of WAL to replay",
        ),
        (
            "asked before the primary",
            behind(1000),
            fast,
            "replication_lag ok: it has 0 bytes of WAL to replay",
        ),
        (
            "on purpose",
            late,
            primary(),
            "replication_lag ok: it lacks 1.0 MiB of WAL, and replays 1 h late on purpose",
        ),
        (
            "on another timeline there is none",
            PostgresFacts { timeline: 1, role_since: Some(NOW), ..behind(1) },
            primary(),
            "",
        ),
    ] {
        let lag = &all::REPLICATION_LAG;
        assert_eq!(basic(facts, Some(&beside), lag), expected, "{case}");
    }
}

#[test]
fn connections_and_clocks_have_limits() {
    let used = |used| PostgresFacts { connections: (used, 97), ..primary() };
    for (used_now, expected) in [
        (77, "connections ok: 77 of 97 connections are in use"),
        (78, "connections warning: 78 of 97 connections are in use"),
        (88, "connections critical: 88 of 97 connections are in use"),
    ] {
        assert_eq!(basic(used(used_now), None, &CONNECTIONS), expected);
    }
    for (clock_ahead, expected) in [
        (-1.9, "clock ok: its clock is 1.9 s behind this monitor's"),
        (2.0, "clock warning: its clock is 2.0 s ahead of this monitor's"),
        (-31.0, "clock critical: its clock is 31.0 s behind this monitor's"),
    ] {
        assert_eq!(basic(PostgresFacts { clock_ahead, ..primary() }, None, &CLOCK), expected);
    }
}

fn with(standard: StandardFacts) -> PostgresFacts {
    PostgresFacts { standard: Some((NOW, standard)), ..primary() }
}

#[test]
fn slots_are_judged_by_what_they_hold_back_and_what_they_lose() {
    let slot = |name: &str, active, mib: u64, status: &str| Slot {
        name: name.to_owned(),
        active,
        retained_bytes: Some(mib * MIB),
        wal_status: Some(status.to_owned()),
        safe_bytes: None,
    };
    for (slots, expected) in [
        (vec![], "slots ok: 0 slots"),
        (vec![slot("a", true, 20_000, "extended")], "slots ok: 1 slot"),
        (
            vec![slot("a", false, 1024, "extended"), slot("b", false, 1, "reserved")],
            "slots warning: a has no consumer and holds back 1.0 GiB",
        ),
        (
            vec![slot("a", false, 8192, "extended")],
            "slots critical: a has no consumer and holds back 8.0 GiB",
        ),
        (
            vec![slot("a", true, 1, "unreserved")],
            "slots critical: loses its WAL at the next checkpoint: a",
        ),
        (
            ["a", "b", "c", "d"].map(|name| slot(name, false, 0, "lost")).to_vec(),
            "slots critical: lost its WAL: a, b, c and 1 more; its consumer must begin anew",
        ),
    ] {
        assert_eq!(
            basic(with(StandardFacts { slots, ..StandardFacts::default() }), None, &SLOTS),
            expected
        );
    }
}

#[test]
fn archiving_and_locks_have_limits() {
    for (failing_for, oldest_ready, ready, expected) in [
        (None, None, 0, "archiving ok: no file waits"),
        (None, Some(10), 1, "archiving ok: 1 file waits, the oldest for 10 s"),
        (None, Some(300), 9, "archiving warning: 9 files wait, the oldest for 5 min"),
        (
            Some(4000),
            Some(300),
            2,
            "archiving critical: the last attempt to archive failed; 2 files wait, the oldest for 5 min",
        ),
    ] {
        let archiver = Archiver {
            failing_for: failing_for.map(seconds),
            oldest_ready: oldest_ready.map(seconds),
            ready,
        };
        let facts = with(StandardFacts { archiver: Some(archiver), ..StandardFacts::default() });
        assert_eq!(basic(facts, None, &ARCHIVING), expected);
    }
    for (lock_waiters, wait, expected) in [
        (0, None, "locks ok: nobody waits for a lock"),
        (1, Some(29), "locks ok: 1 session waits for a lock, the first for 29 s"),
        (2, Some(300), "locks critical: 2 sessions wait for a lock, the first for 5 min"),
    ] {
        let lock_wait = wait.map(seconds);
        let facts = with(StandardFacts { lock_wait, lock_waiters, ..StandardFacts::default() });
        assert_eq!(basic(facts, None, &LOCKS), expected);
    }
}

fn deep(facts: DeepFacts, check: &'static Check) -> String {
    said(&judged_deep(&seen(DeepFacts { is_answer: true, ..facts }), Some(&primary())), check)
}

#[test]
fn a_kept_connection_does_not_hide_that_new_ones_are_refused() {
    let at = |connected_at| PostgresFacts { connected_at, ..primary() };
    let not_since = PostgresFacts { at: seconds(999), ..at(seconds(1)) };
    let hangs = "new_connections critical: it takes no new connection: no login within 3s";
    let none = "new_connections critical: it takes no new connection: too many clients";
    let ours = "new_connections warning: it takes no new connection: too many of this role";
    for (stage, error, basic, expected) in [
        (Stage::Timeout, "no login within 3s", Some(at(seconds(1))), hangs),
        (Stage::Full, "too many clients", Some(at(seconds(1))), none),
        (Stage::Login, "too many of this role", Some(at(seconds(1))), ours),
        (Stage::Timeout, "it was made since", Some(at(NOW)), ""),
        (Stage::Dial, "the kept one may be lost too", Some(not_since), ""),
        (Stage::Timeout, "it does not answer at all", None, ""),
    ] {
        let readings = judged_deep(&failing(stage, error, 0), basic.as_ref());
        assert_eq!(said(&readings, &all::NEW_CONNECTIONS), expected);
    }
}

#[test]
fn a_certificate_that_expired_is_told_though_nobody_is_let_in() {
    let certificate = |days: i64| {
        let not_after = "2026-03-01T12:00:00Z".parse().unwrap();
        Some(Certificate { not_after, left: TimeDelta::days(days) })
    };
    let check = &all::CERTIFICATE;
    let until = "2026-03-01 12:00 UTC";
    for (days, expected) in [
        (22, format!("certificate ok: the certificate is valid for 22 d, until {until}")),
        (21, format!("certificate warning: the certificate is valid for 21 d, until {until}")),
        (3, format!("certificate critical: the certificate is valid for 3 d, until {until}")),
        (-2, format!("certificate critical: the certificate expired 2 d ago, on {until}")),
    ] {
        let facts = DeepFacts { certificate: certificate(days), ..DeepFacts::default() };
        assert_eq!(deep(facts.clone(), check), expected);
        let readings = judged_deep(&seen(facts), None);
        let expected = if days > 21 { "" } else { &expected };
        assert_eq!(said(&readings, check), expected);
    }
    assert_eq!(deep(DeepFacts::default(), check), "");
}

fn holder(state: &str) -> Holder {
    Holder { role: "web".to_owned(), application_name: "app".to_owned(), state: state.to_owned() }
}

#[test]
fn sessions_are_named_that_are_beyond_the_limits() {
    let query = |pid, running_for| RunningQuery {
        pid,
        role: "web".to_owned(),
        application_name: String::new(),
        running_for: seconds(running_for),
    };
    let transaction = |pid, prepared: Option<&str>, open_for| OpenTransaction {
        pid,
        holder: if pid.is_some() { holder("idle in transaction") } else { holder("") },
        prepared: prepared.map(str::to_owned),
        open_for: seconds(open_for),
    };
    let blocker = |pid, waiting, holder| Blocker { pid, waiting, holder };
    let none = DeepFacts::default;
    for (facts, check, expected) in [
        (
            DeepFacts { queries: Some(vec![]), ..none() },
            &all::LONG_QUERIES,
            "long_queries ok: no statement runs",
        ),
        (
            DeepFacts {
                queries: Some(vec![query(1, 1000), query(2, 900), query(3, 899)]),
                ..none()
            },
            &all::LONG_QUERIES,
            "long_queries warning: a statement of process 1 (role web) has run for 16 min 40 s; a \
             statement of process 2 (role web) has run for 15 min",
        ),
        (
            DeepFacts {
                transactions: Some(vec![
                    transaction(None, Some("gid"), 86400),
                    transaction(Some(5), None, 60),
                ]),
                ..none()
            },
            &all::LONG_TRANSACTIONS,
            "long_transactions critical: the prepared transaction gid (role web, app) is 1 d old",
        ),
        (
            DeepFacts { transactions: Some(vec![transaction(Some(5), None, 60)]), ..none() },
            &all::LONG_TRANSACTIONS,
            "long_transactions ok: a transaction of process 5 (role web, app, idle in transaction) is \
             1 min old",
        ),
        (
            DeepFacts { blockers: Some(vec![]), ..none() },
            &all::BLOCKING,
            "blocking ok: nobody waits behind another session",
        ),
        (
            DeepFacts {
                blockers: Some(vec![blocker(7, 20, Some(holder("active"))), blocker(0, 5, None)]),
                ..none()
            },
            &all::BLOCKING,
            "blocking critical: 20 sessions wait behind process 7 (role web, app, active); 5 sessions \
             wait behind a prepared transaction",
        ),
    ] {
        assert_eq!(deep(facts, check), expected);
    }
}

#[test]
fn what_grows_slowly_has_limits_and_floors() {
    let none = DeepFacts::default;
    let cache = |hit, read| DeepFacts {
        cache: Some(CacheTraffic { over: seconds(900), hit, read }),
        ..none()
    };
    let wraparound = |transactions, multixacts| DeepFacts {
        wraparound: Some(Wraparound { database: "app".to_owned(), transactions, multixacts }),
        ..none()
    };
    let table = DeadRows { table: "public.t".to_owned(), dead: 20_000, percent: 61.2 };
    let checkpoints = |timed, requested| DeepFacts {
        checkpoints: Some(Checkpoints { over: seconds(3600), timed, requested }),
        ..none()
    };
    let wal = |mib| DeepFacts {
        wal: Some(WalDirectory { bytes: mib * MIB, allowed_bytes: 1024 * MIB }),
        ..none()
    };
    let sizes =
        Sizes { databases: vec![("app".to_owned(), 3 * MIB), ("b".to_owned(), MIB)], tables: 9 };
    let settings = |name: &str, value: &str| DeepFacts {
        settings: BTreeMap::from([(name.to_owned(), value.to_owned())]),
        ..none()
    };
    for (facts, check, expected) in [
        (cache(0, 99_999), &all::CACHE_HIT_RATIO, ""),
        (
            cache(99_000, 1000),
            &all::CACHE_HIT_RATIO,
            "cache_hit_ratio ok: 99.0 % of 100000 blocks were found in the cache within 15 min",
        ),
        (
            cache(80_000, 20_000),
            &all::CACHE_HIT_RATIO,
            "cache_hit_ratio warning: 80.0 % of 100000 blocks were found in the cache within 15 min",
        ),
        (
            wraparound(1 << 29, 5),
            &all::WRAPAROUND,
            "wraparound warning: the database app has used 25.0 % of its transaction identifiers",
        ),
        (
            wraparound(5, 1 << 30),
            &all::WRAPAROUND,
            "wraparound critical: the database app has used 50.0 % of its multixact identifiers",
        ),
        (
            DeepFacts { dead_rows: Some(vec![]), ..none() },
            &all::BLOAT,
            "bloat ok: no table has many dead rows",
        ),
        (
            DeepFacts { dead_rows: Some(vec![table]), ..none() },
            &all::BLOAT,
            "bloat critical: 61 % of the rows of public.t are dead (20000)",
        ),
        (checkpoints(0, 3), &all::CHECKPOINTS, ""),
        (
            checkpoints(2, 2),
            &all::CHECKPOINTS,
            "checkpoints warning: 2 of 4 checkpoints within 1 h came early",
        ),
        (
            wal(1536),
            &all::WAL_SIZE,
            "wal_size warning: pg_wal holds 1.5 GiB, and the settings allow 1.0 GiB",
        ),
        (
            DeepFacts { sizes: Some(sizes), ..none() },
            &all::SIZE,
            "size ok: 2 databases with 4.0 MiB, the largest is app with 3.0 MiB",
        ),
        (none(), &all::SETTINGS, "settings ok: nothing endangers data or waits for a restart"),
        (
            settings("fsync", "off"),
            &all::SETTINGS,
            "settings critical: fsync is off: when its host fails the whole database may be lost",
        ),
        (
            settings("full_page_writes", "off"),
            &all::SETTINGS,
            "settings warning: full_page_writes is off: when its host fails, pages may be torn",
        ),
        (
            DeepFacts { pending_restart: vec!["wal_level".to_owned()], ..none() },
            &all::SETTINGS,
            "settings warning: settings wait for a restart: wal_level",
        ),
        (
            DeepFacts { collation_mismatches: vec!["app".to_owned()], ..none() },
            &all::SETTINGS,
            "settings warning: made with another version of their collation: app",
        ),
    ] {
        assert_eq!(deep(facts, check), expected);
    }
}

#[test]
fn a_standby_is_not_judged_by_what_only_a_primary_does() {
    let facts = DeepFacts {
        is_answer: true,
        wraparound: Some(Wraparound {
            database: "app".to_owned(),
            transactions: u32::MAX / 2,
            multixacts: 0,
        }),
        ..DeepFacts::default()
    };
    let readings = judged_deep(&seen(facts), Some(&standby()));
    assert_eq!(said(&readings, &all::WRAPAROUND), "");
}
