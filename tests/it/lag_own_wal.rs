//! Standbys with WAL that their primary has not: they say what any standby does.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Mode, PgServer, directory, eventually, program, run};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use crate::exporter::{Exporter, INTERVAL, LIMIT, server};
use crate::lag_changes::{NO_LAG, insert, make_standby_of, rebuild, split_brain};
use crate::scene::write;

const MUCH: &str = "INSERT INTO t SELECT generate_series(1, 5000)";

/// Checks for a while that `node` is in that state, without a number, and that nobody counts on it.
async fn stays(exporter: &Exporter, node: &str, state: &str) {
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let scrape = exporter.scrape().await;
        assert_eq!((scrape.state(node), scrape.lag(node)), (Some(state), NO_LAG));
        let lost = scrape.value("group_rpo_seconds", &[]);
        assert!(lost.is_none_or(f64::is_infinite), "{lost:?}");
        sleep(INTERVAL).await;
    }
}

#[tokio::test]
async fn who_wrote_the_primarys_timeline_too_has_no_lag_until_it_is_rebuilt() {
    if postgres_is_missing() {
        return;
    }
    let mut primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").await;
    let (first, mut second) = (primary.standby("b").await, primary.standby("c").await);
    let state = directory();
    let keep = format!("state_directory = \"{}\"\n", state.path().display());
    let nodes = [server(&first), server(&second)].concat();
    let mut exporter = Exporter::configured("postgres", &nodes, &keep);
    exporter.run().await;
    first.catch_up(&primary).await;
    second.catch_up(&primary).await;
    primary.stop(Mode::Immediate).await;
    // Neither knows of the other: each begins timeline 2.
    tokio::join!(first.promote(), second.promote());
    exporter.until("both are primaries", LIMIT, |it| split_brain(it, "candidate")).await;
    first.psql(MUCH).await;
    insert(&second).await;
    exporter.until("both write", LIMIT, |it| split_brain(it, "confirmed")).await;

    // Without a rewind; which would find nothing to do, so nobody is told to try it.
    second.stop(Mode::Fast).await;
    make_standby_of(&second, &first);
    second.start().await;
    exporter.state("c", "diverged").await;
    first.psql(MUCH).await;
    stays(&exporter, "c", "diverged").await;
    eventually("it is told to rebuild it", LIMIT, async || {
        let log = exporter.log();
        let mut lines = log.lines().filter(|it| it.contains("standby diverged"));
        lines.any(|it| it.contains("rebuild it: pg_rewind finds nothing to do"))
    })
    .await;
    exporter.stop().await;
    exporter.run().await;
    exporter.state("c", "diverged").await;
    stays(&exporter, "c", "diverged").await;

    is_well_once_rebuilt(&exporter, &mut second, &first).await;
}

/// Rebuilds `c`, which replays what it streams then.
async fn is_well_once_rebuilt(exporter: &Exporter, second: &mut PgServer, first: &PgServer) {
    second.stop(Mode::Fast).await;
    rebuild(second, first).await;
    second.start().await;
    second.catch_up(first).await;
    sleep(INTERVAL * 2).await;
    insert(first).await;
    exporter.state("c", "caught_up").await;
}

/// Its receiver lays the primary's WAL over its own, and its last checkpoint is older than both: it
/// streams, and what it wrote alone is still in its tables.
#[tokio::test]
async fn who_replays_the_primarys_wal_over_its_own_tables_has_no_lag() {
    if postgres_is_missing() {
        return;
    }
    let builder = PgServer::builder().name("a").setting("checkpoint_timeout", "1h");
    let mut primary = builder.primary().await;
    primary.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").await;
    primary.psql("CREATE TABLE own AS SELECT generate_series(1, 1000) AS i").await;
    let (first, mut second) = (primary.standby("b").await, primary.standby("c").await);
    let exporter = Exporter::start(&[server(&first), server(&second)]).await;
    // With so much to write, the checkpoint that follows a promotion takes minutes.
    primary
        .psql("CREATE TABLE big AS SELECT repeat('x', 500) FROM generate_series(1, 30000)")
        .await;
    first.catch_up(&primary).await;
    second.catch_up(&primary).await;
    primary.stop(Mode::Immediate).await;
    tokio::join!(first.promote(), second.promote());
    insert(&first).await;
    second.psql("UPDATE own SET i = -i").await;
    exporter.until("both are primaries", LIMIT, |it| split_brain(it, "confirmed")).await;

    second.stop(Mode::Immediate).await;
    make_standby_of(&second, &first);
    // So small that its own pages are written out.
    let auto = second.data_directory().join("postgresql.auto.conf");
    let before = fs::read_to_string(&auto).unwrap();
    write(&auto, &format!("{before}shared_buffers = '1MB'\n"));
    second.start().await;
    // It has more than the other one wrote meanwhile.
    exporter.state("c", "diverged").await;
    let own: PgLsn = second.psql("SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
    first.psql(MUCH).await;
    eventually("it has received over its own", LIMIT, async || {
        let received = second.psql("SELECT pg_last_wal_receive_lsn()").await;
        received.parse().is_ok_and(|it: PgLsn| own < it)
    })
    .await;
    for (mode, state) in [(Mode::Fast, "diverged"), (Mode::Immediate, "unknown")] {
        second.stop(mode).await;
        second.start().await;
        insert(&first).await;
        second.catch_up(&first).await;
        sleep(INTERVAL * 2).await;
        insert(&first).await;
        second.catch_up(&first).await;
        exporter.state("c", state).await;
        stays(&exporter, "c", state).await;
        let sum = "SELECT sum(i) FROM own";
        assert_ne!(first.psql(sum).await, second.psql(sum).await, "the state says what is true");
    }

    is_well_once_rebuilt(&exporter, &mut second, &first).await;
}

#[tokio::test]
async fn what_a_primary_lost_is_remembered_of_the_standby_that_has_it() {
    if postgres_is_missing() {
        return;
    }
    let mut primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").await;
    let mut standby = primary.standby("b").await;
    let state = directory();
    let keep = format!("state_directory = \"{}\"\n", state.path().display());
    let nodes = [server(&primary), server(&standby)].concat();
    let mut exporter = Exporter::configured("postgres", &nodes, &keep);
    exporter.run().await;
    primary.stop(Mode::Fast).await;
    let (data, kept) = (primary.data_directory().display().to_string(), directory());
    let snapshot = kept.path().join("snapshot").display().to_string();
    run(program::command("/bin/cp").args(["-a", &data, &snapshot])).await;
    primary.start().await;
    insert(&primary).await;
    exporter.state("b", "caught_up").await;
    standby.catch_up(&primary).await;
    sleep(INTERVAL * 2).await;

    primary.stop(Mode::Immediate).await;
    run(program::command("/bin/rm").args(["-r", &data])).await;
    run(program::command("/bin/mv").args([&snapshot, &data])).await;
    primary.start().await;
    exporter.state("b", "diverged").await;
    // It writes more than the standby has.
    primary.psql(MUCH).await;
    stays(&exporter, "b", "diverged").await;
    exporter.stop().await;
    exporter.run().await;
    exporter.state("b", "diverged").await;
    stays(&exporter, "b", "diverged").await;

    // It stays so over a restart, and when it could be behind.
    standby.stop(Mode::Fast).await;
    standby.start().await;
    exporter.state("b", "diverged").await;
    primary.psql(MUCH).await;
    stays(&exporter, "b", "diverged").await;

    standby.stop(Mode::Fast).await;
    rebuild(&standby, &primary).await;
    standby.start().await;
    standby.catch_up(&primary).await;
    sleep(INTERVAL * 2).await;
    insert(&primary).await;
    exporter.state("b", "caught_up").await;
}
