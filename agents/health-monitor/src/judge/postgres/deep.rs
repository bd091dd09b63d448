//! What changes slowly, and what it comes to.

use super::super::silent::not_asked;
use super::super::words::{bytes, counted, duration, number, percent};
use super::{Server, a_few};
use crate::catalogue::{
    BLOAT, BLOCKING, CACHE_HIT_RATIO, CERTIFICATE, CHECKPOINTS, LONG_QUERIES, LONG_TRANSACTIONS,
    NEW_CONNECTIONS, SETTINGS, SIZE, WAL_SIZE, WRAPAROUND,
};
use crate::check::{Check, Measure, Reading, Status, Unit};
use crate::component::Component;
use crate::facts::{Failure, Seen, Stage};
use crate::probe::postgres::{
    Blocker, CacheTraffic, Certificate, Checkpoints, DeadRows, DeepFacts, Holder, OpenTransaction,
    PostgresFacts, RunningQuery, Sizes, WalDirectory, Wraparound,
};
use crate::thresholds::Scale;

/// Fewer blocks than these tell nothing of the cache: a server that idles reads what it reads for the
/// first time.
const CACHE_BLOCKS_MIN: u64 = 100_000;
/// Fewer checkpoints than these tell nothing of `max_wal_size`: a base backup asks for one too.
const CHECKPOINTS_MIN: u64 = 4;
/// Transactions, or multixacts, there can be before they wrap around.
const IDENTIFIERS: u64 = 1 << 31;

/// The readings of the comprehensive checks. `basic` is what the server says on its kept connection, if
/// it does: of a server that does not answer nothing is said twice.
pub fn judge_deep(
    component: &Component,
    seen: &Seen<DeepFacts>,
    basic: Option<&PostgresFacts>,
    scale: Scale<'_>,
) -> Vec<Reading> {
    let server = Server { component, scale };
    let certificate = seen.now().and_then(|it| it.certificate.as_ref());
    let certificate = certificate.map(|it| self::certificate(server, it));
    let (Some(basic), Some(facts)) = (basic, seen.now()) else {
        return match (basic, &seen.failure) {
            // A connection that was made since is a newer answer to the same question; and before the one
            // that is kept has answered again, it may be the server that is lost.
            (Some(basic), Some(failure))
                if basic.connected_at < seen.at && seen.at <= basic.at || seen.is_not_asked() =>
            {
                vec![no_new_connection(failure)]
            }
            _ => certificate.into_iter().filter(|it| it.status != Status::Ok).collect(),
        };
    };
    let mut readings: Vec<Reading> = certificate.into_iter().collect();
    if !facts.is_answer {
        return readings;
    }
    readings.push(Reading::new(&NEW_CONNECTIONS, Status::Ok, "it takes new connections"));
    readings.extend(facts.cache.as_ref().and_then(|it| cache(server, it)));
    readings.extend(facts.queries.as_deref().map(|it| queries(server, it)));
    readings.extend(facts.transactions.as_deref().map(|it| transactions(server, it)));
    readings.extend(facts.blockers.as_deref().map(|it| blocking(server, it)));
    readings.extend(facts.wal.as_ref().map(|it| wal(server, it)));
    readings.push(settings(facts));
    // What only a primary has may be left of before it became a standby.
    if !basic.in_recovery {
        readings.extend(facts.wraparound.as_ref().map(|it| wraparound(server, it)));
        readings.extend(facts.dead_rows.as_deref().map(|it| dead_rows(server, it)));
        readings.extend(facts.sizes.as_ref().map(sizes));
        readings.extend(facts.checkpoints.as_ref().and_then(|it| checkpoints(server, it)));
    }
    readings
}

fn no_new_connection(failure: &Failure) -> Reading {
    let reason = format!("it takes no new connection: {}", failure.error);
    match failure.stage {
        Stage::NotAsked => not_asked(&NEW_CONNECTIONS, &failure.error),
        Stage::Full => Reading::new(&NEW_CONNECTIONS, Status::Critical, reason)
            .with_next(crate::catalogue::CONNECTIONS.next),
        // Others may well be let in.
        Stage::Login => Reading::new(&NEW_CONNECTIONS, Status::Warning, reason).with_next(
            "see pg_hba.conf, and the password and the CONNECTION LIMIT of the role of this monitor",
        ),
        _ => Reading::new(&NEW_CONNECTIONS, Status::Critical, reason),
    }
}

fn certificate(server: Server<'_>, certificate: &Certificate) -> Reading {
    let left = certificate.left;
    let until = certificate.not_after.format("%Y-%m-%d %H:%M UTC");
    let reason = if let Ok(left) = left.to_std() {
        format!("the certificate is valid for {}, until {until}", duration(left))
    } else {
        let over = (-left).to_std().unwrap_or_default();
        format!("the certificate expired {} ago, on {until}", duration(over))
    };
    server.number(&CERTIFICATE, "left", left.as_seconds_f64(), reason)
}

fn cache(server: Server<'_>, traffic: &CacheTraffic) -> Option<Reading> {
    let CacheTraffic { over, hit, read } = *traffic;
    let blocks = hit + read;
    if blocks < CACHE_BLOCKS_MIN {
        return None;
    }
    let ratio = percent(hit, blocks);
    let reason = format!(
        "{ratio:.1} % of {blocks} blocks were found in the cache within {}",
        duration(over)
    );
    Some(server.number(&CACHE_HIT_RATIO, "hit", ratio, reason))
}

/// Those that are beyond the limit for a warning, or the first: the words for a reason.
fn beyond<T>(
    server: Server<'_>,
    check: &Check,
    all: &[T],
    value: impl Fn(&T) -> f64,
    words: impl Fn(&T) -> String,
) -> String {
    let limit = server.scale.thresholds.of(check).map_or(f64::INFINITY, |it| it.warning);
    let count = all.iter().filter(|it| value(it) >= limit).count().max(1);
    all.iter().take(count).map(words).collect::<Vec<_>>().join("; ")
}

/// `app (role web, idle in transaction)`.
fn who(holder: &Holder) -> String {
    let Holder { role, application_name, state } = holder;
    let about: Vec<String> = [("role ", role), ("", application_name), ("", state)]
        .iter()
        .filter(|(_, it)| !it.is_empty())
        .map(|(word, it)| format!("{word}{it}"))
        .collect();
    about.join(", ")
}

fn queries(server: Server<'_>, queries: &[RunningQuery]) -> Reading {
    let value = |it: &RunningQuery| it.running_for.as_secs_f64();
    let words = |it: &RunningQuery| {
        let RunningQuery { pid, role, application_name, running_for } = it;
        let holder = Holder {
            role: role.clone(),
            application_name: application_name.clone(),
            ..Holder::default()
        };
        format!(
            "a statement of process {pid} ({}) has run for {}",
            who(&holder),
            duration(*running_for)
        )
    };
    let longest = queries.first().map_or(0.0, value);
    let reason = match queries {
        [] => "no statement runs".to_owned(),
        _ => beyond(server, &LONG_QUERIES, queries, value, words),
    };
    server.number(&LONG_QUERIES, "longest", longest, reason)
}

fn transactions(server: Server<'_>, transactions: &[OpenTransaction]) -> Reading {
    let value = |it: &OpenTransaction| it.open_for.as_secs_f64();
    let words = |it: &OpenTransaction| {
        let (who, age) = (who(&it.holder), duration(it.open_for));
        match (&it.prepared, it.pid) {
            (Some(name), _) => format!("the prepared transaction {name} ({who}) is {age} old"),
            (None, Some(pid)) => format!("a transaction of process {pid} ({who}) is {age} old"),
            (None, None) => format!("a transaction ({who}) is {age} old"),
        }
    };
    let oldest = transactions.first().map_or(0.0, value);
    let reason = match transactions {
        [] => "no transaction is open".to_owned(),
        _ => beyond(server, &LONG_TRANSACTIONS, transactions, value, words),
    };
    server.number(&LONG_TRANSACTIONS, "oldest", oldest, reason)
}

fn blocking(server: Server<'_>, blockers: &[Blocker]) -> Reading {
    let value = |it: &Blocker| f64::from(it.waiting);
    let words = |it: &Blocker| {
        let waiting = counted(u64::from(it.waiting), "session waits", "sessions wait");
        match (it.pid, &it.holder) {
            (0, _) => format!("{waiting} behind a prepared transaction"),
            (pid, Some(holder)) => format!("{waiting} behind process {pid} ({})", who(holder)),
            (pid, None) => format!("{waiting} behind process {pid}"),
        }
    };
    let most = blockers.first().map_or(0.0, value);
    let reason = match blockers {
        [] => "nobody waits behind another session".to_owned(),
        _ => beyond(server, &BLOCKING, blockers, value, words),
    };
    server.number(&BLOCKING, "waiting", most, reason)
}

fn wraparound(server: Server<'_>, wraparound: &Wraparound) -> Reading {
    let Wraparound { database, transactions, multixacts } = wraparound;
    let (used, what) = if transactions >= multixacts {
        (transactions, "transaction identifiers")
    } else {
        (multixacts, "multixact identifiers")
    };
    let share = percent(u64::from(*used), IDENTIFIERS);
    let reason = format!("the database {database} has used {share:.1} % of its {what}");
    server.number(&WRAPAROUND, "used", share, reason)
}

fn dead_rows(server: Server<'_>, tables: &[DeadRows]) -> Reading {
    let value = |it: &DeadRows| it.percent;
    let words = |it: &DeadRows| {
        format!("{:.0} % of the rows of {} are dead ({})", it.percent, it.table, it.dead)
    };
    let most = tables.first().map_or(0.0, value);
    let reason = match tables {
        [] => "no table has many dead rows".to_owned(),
        _ => beyond(server, &BLOAT, tables, value, words),
    };
    server.number(&BLOAT, "dead", most, reason)
}

fn sizes(sizes: &Sizes) -> Reading {
    let total: u64 = sizes.databases.iter().map(|(_, bytes)| bytes).sum();
    let largest = match sizes.databases.first() {
        Some((name, size)) => format!(", the largest is {name} with {}", bytes(*size)),
        None => String::new(),
    };
    let count = counted(sizes.databases.len() as u64, "database", "databases");
    let measure = |name, value, unit| Measure { name, value, unit, limits: None, max: None };
    Reading::new(&SIZE, Status::Ok, format!("{count} with {}{largest}", bytes(total)))
        .with_measure(measure("bytes", number(total), Unit::Bytes))
        .with_measure(measure("tables", f64::from(sizes.tables), Unit::Count))
}

fn wal(server: Server<'_>, wal: &WalDirectory) -> Reading {
    let share = percent(wal.bytes, wal.allowed_bytes);
    let (there, allowed) = (bytes(wal.bytes), bytes(wal.allowed_bytes));
    let reason = format!("pg_wal holds {there}, and the settings allow {allowed}");
    server.number(&WAL_SIZE, "used", share, reason)
}

fn checkpoints(server: Server<'_>, checkpoints: &Checkpoints) -> Option<Reading> {
    let Checkpoints { over, timed, requested } = *checkpoints;
    let all = timed + requested;
    if all < CHECKPOINTS_MIN {
        return None;
    }
    let reason = format!("{requested} of {all} checkpoints within {} came early", duration(over));
    Some(server.number(&CHECKPOINTS, "forced", percent(requested, all), reason))
}

/// What endangers data, and what does not hold yet.
fn settings(facts: &DeepFacts) -> Reading {
    let is_off = |name: &str| facts.settings.get(name).is_some_and(|it| it == "off");
    let (status, reason, next) = if is_off("fsync") {
        let reason = "fsync is off: when its host fails the whole database may be lost";
        (Status::Critical, reason.to_owned(), "set fsync = on and reload; take a new backup")
    } else if is_off("full_page_writes") {
        let reason = "full_page_writes is off: when its host fails, pages may be torn";
        let next = "set it on and reload, unless the file system writes whole pages only";
        (Status::Warning, reason.to_owned(), next)
    } else if !facts.collation_mismatches.is_empty() {
        let databases = a_few(facts.collation_mismatches.iter().map(String::as_str));
        let reason = format!("made with another version of their collation: {databases}");
        let next = "indexes on text may miss rows: REINDEX them, then ALTER DATABASE … REFRESH COLLATION \
                    VERSION; see the manual there";
        (Status::Warning, reason, next)
    } else if !facts.pending_restart.is_empty() {
        let names = a_few(facts.pending_restart.iter().map(String::as_str));
        let next = "restart it when that does no harm (with Patroni: `patronictl restart`)";
        (Status::Warning, format!("settings wait for a restart: {names}"), next)
    } else {
        (Status::Ok, "nothing endangers data or waits for a restart".to_owned(), "")
    };
    Reading::new(&SETTINGS, status, reason).with_next(next)
}
