//! The bounds of a lag where the positions that servers tell are not all there is.

use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Mode, PgServer, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::exporter::{Exporter, INTERVAL, LIMIT, Scrape, server};
use crate::lag_accuracy::PARTIAL_RECORD;
use crate::lag_changes::insert;

const ROWS: &str = "SELECT count(*) FROM t";

/// Scrapes for a while. Each upper bound of the lag of `b` is at least the time since `since`, as long
/// as it does not show more than `rows`.
async fn upper_bounds(
    exporter: &Exporter,
    standby: &PgServer,
    rows: &str,
    since: Instant,
) -> Vec<Scrape> {
    let mut scrapes = Vec::new();
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let truth = since.elapsed().as_secs_f64();
        let scrape = exporter.scrape().await;
        if standby.psql(ROWS).await != rows {
            break;
        }
        let [_, _, upper] = scrape.lag("b");
        assert!(upper.is_none_or(|upper| truth <= upper), "{truth}:\n{}", scrape.text);
        scrapes.push(scrape);
        sleep(INTERVAL / 5).await;
    }
    scrapes
}

/// It is visible on the primary before it is on its disk.
#[tokio::test]
async fn a_commit_that_is_not_flushed_is_within_the_bounds() {
    if postgres_is_missing() {
        return;
    }
    let slow = PgServer::builder().name("a").setting("wal_writer_delay", "10s");
    let primary = slow.setting("autovacuum", "off").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let standby = primary.standby("b").await;
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("b", "caught_up").await;
    // The first one wakes the writer of WAL; then it sleeps.
    let is_missing = "SELECT pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()";
    let commit = "SET synchronous_commit = off; INSERT INTO t VALUES (1)";
    let mut since = Instant::now();
    eventually("a commit is not flushed", LIMIT, async || {
        primary.psql(commit).await;
        since = Instant::now();
        primary.psql(is_missing).await == "t"
    })
    .await;
    let rows = standby.psql(ROWS).await;
    let compared = upper_bounds(&exporter, &standby, &rows, since).await.len();
    // On a busy machine a look takes long.
    assert!(3 < compared, "{compared}");
}

/// A startup process that was stopped while it waited for WAL still seems to wait. The segment was
/// switched, so what was received ends at a page, and it has stayed there.
#[tokio::test]
async fn a_startup_process_that_hangs_has_not_caught_up() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").wal_segment_mib(1).primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let standby = primary.standby("b").await;
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("b", "caught_up").await;
    // Near the end of a segment: what is not replayed may be a part of one record.
    primary.psql("SELECT pg_switch_wal()").await;
    let left = "1048576 - (pg_current_wal_insert_lsn() - '0/0') % 1048576";
    let fill = format!("pg_logical_emit_message(true, '', repeat('x', ({left} - 100000)::int))");
    primary.psql(&format!("SELECT {fill}")).await;
    standby.catch_up(&primary).await;
    let startup = "FROM pg_stat_activity WHERE backend_type = 'startup'";
    eventually("it waits for WAL", LIMIT, async || {
        standby.psql(&format!("SELECT wait_event {startup}")).await == "RecoveryWalStream"
    })
    .await;
    let startup = standby.psql(&format!("SELECT pid {startup}")).await;
    let startup = Pid::from_raw(startup.parse().unwrap()).unwrap();
    kill_process(startup, Signal::STOP).unwrap();
    let rows = standby.psql(ROWS).await;
    insert(&primary).await;
    let since = Instant::now();
    primary.psql("SELECT pg_switch_wal()").await;
    let scrapes = upper_bounds(&exporter, &standby, &rows, since).await;
    assert_eq!(standby.psql(PARTIAL_RECORD).await, "t");
    kill_process(startup, Signal::CONT).unwrap();
    let last = scrapes.last().unwrap();
    assert_eq!(last.state("b"), Some("ok"), "{}", last.text);
    assert!(last.lag("b")[1] > Some(1.0), "{}", last.text);
    exporter.state("b", "caught_up").await;
}

/// Its replay is delayed, and until it comes to the end of its disk no receiver is started.
#[tokio::test]
async fn what_a_standby_received_before_its_restart_is_not_said_to_be_lost() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let mut standby = primary.standby("b").await;
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("b", "caught_up").await;
    standby.set("recovery_min_apply_delay", "10min").await;
    insert(&primary).await;
    sleep(Duration::from_secs(1)).await;
    primary.psql("INSERT INTO t SELECT generate_series(1, 1000)").await;
    let has_received = |it: &Scrape| {
        it.of("receive_lag_bytes", "b") == Some(0.0)
            && it.of("replay_lag_bytes", "b") > Some(10_000.0)
    };
    exporter.until("b has received all", LIMIT, has_received).await;
    standby.stop(Mode::Fast).await;
    exporter.state("b", "unreachable").await;
    standby.start().await;
    let scrape = exporter.state("b", "ok").await;
    assert_eq!(standby.psql("SELECT pg_last_wal_receive_lsn()").await, "");
    for name in ["receive_lag_lower_seconds", "receive_lag_seconds", "receive_lag_bytes"] {
        assert_eq!(scrape.of(name, "b"), None, "{name}");
    }
    for name in ["group_rpo_lower_seconds", "group_rpo_seconds", "group_rpo_bytes"] {
        assert_eq!(scrape.value(name, &[]), None, "{name}");
    }
    assert!(scrape.of("receive_lag_upper_seconds", "b") > Some(1.0), "{}", scrape.text);
    assert!(scrape.of("replay_lag_bytes", "b") > Some(10_000.0), "{}", scrape.text);
}
