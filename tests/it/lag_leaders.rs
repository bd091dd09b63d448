//! Whose WAL the lag is measured on, where that is not plain: beside a primary that Patroni no
//! longer watches, where the primary is elsewhere, and where the archive knows of a newer one.

use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{PatroniCluster, PgServer, directory, eventually, patroni_is_missing};
use rustix::fs::{Mode, chmod};
use tokio::time::{Instant, sleep};

use crate::exporter::{Exporter, INTERVAL, LIMIT, Scrape, server};
use crate::lag_changes::{assert_age, insert, primaries, split_brain};

/// Its key expires, so that etcd no longer knows the member, and the other one is promoted.
#[tokio::test]
async fn a_primary_whose_patroni_died_is_seen_beside_the_next() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::start(2).await;
    let exporter = Exporter::of_patroni(&cluster).await;
    let old = cluster.leader().await;
    let (old_name, new_name) = (cluster.name(old).to_owned(), cluster.name(1 - old).to_owned());
    exporter.state(&new_name, "caught_up").await;

    cluster.kill9_patroni(old).await;
    let minute = Duration::from_mins(1);
    exporter.until("two primaries", minute, |it| split_brain(it, "candidate")).await;
    // Both write from now on: only then it is sure.
    for index in [old, 1 - old] {
        let client = cluster.connect(index).await;
        client.batch_execute("CREATE TABLE of_mine AS SELECT 1").await.unwrap();
    }
    exporter.until("both write", minute, |it| split_brain(it, "confirmed")).await;
    eventually("etcd forgets the old member", minute, async || {
        let members = cluster.get(1 - old, "/cluster").await.unwrap_or_default();
        members["members"].as_array().is_some_and(|it| it.len() == 1)
    })
    .await;
    // Longer than the exporter takes to look at the members again.
    let until = Instant::now() + Duration::from_secs(15);
    while Instant::now() < until {
        let scrape = exporter.scrape().await;
        assert!(!split_brain(&scrape, "no"), "{}", scrape.text);
        assert_eq!(primaries(&scrape), Some(2.0));
        for name in [&old_name, &new_name] {
            assert_eq!(scrape.of("target_up", name), Some(1.0));
        }
        sleep(INTERVAL).await;
    }
}

#[tokio::test]
async fn a_group_whose_primary_is_elsewhere_is_measured_by_its_leader() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let (leader, cascade) = (primary.standby("b").await, primary.standby("c").await);
    cascade.follow(&leader).await;
    insert(&primary).await;
    let mut exporter = Exporter::start(&[server(&leader), server(&cascade)]).await;
    let method = |scrape: &Scrape, method| {
        scrape.value("group_lag_method", &[("method", method)]) == Some(1.0)
    };
    exporter.state("c", "caught_up").await;
    let scrape = exporter.until("it has a leader", LIMIT, |it| method(it, "standby_leader")).await;
    assert_eq!((primaries(&scrape), scrape.state("b")), (Some(0.0), Some("caught_up")));
    assert_eq!(scrape.value("group_rpo_seconds", &[]), None);
    // Details are asked every 10 to 15 s, and say who follows whom.
    let is_known =
        |it: &Scrape| it.of("receive_lag_seconds", "b").is_none() && method(it, "standby_leader");
    exporter.until("b is the leader", LIMIT, is_known).await;

    cascade.psql("SELECT pg_wal_replay_pause()").await;
    insert(&primary).await;
    let since = Instant::now();
    sleep(Duration::from_secs(2)).await;
    assert_age(&exporter.state("c", "ok").await, "c", since, 0.0);

    leader.promote().await;
    insert(&leader).await;
    exporter.until("b is the primary", LIMIT, |it| method(it, "primary")).await;
    let finished = exporter.stop().await;
    assert!(!finished.stdout.contains("promote a standby"), "{finished}");
    assert!(!finished.stdout.contains("primary unknown"), "{finished}");
}

/// It follows whoever archives the newest timeline: no receiver says so, and it has more than the
/// primary that is watched.
#[tokio::test]
async fn a_standby_that_follows_the_archive_to_a_newer_timeline_has_not_caught_up() {
    if postgres_is_missing() {
        return;
    }
    let archive = directory();
    chmod(archive.path(), Mode::RWXU | Mode::RWXG | Mode::RWXO).unwrap();
    let path = archive.path().display();
    let primary = PgServer::builder()
        .name("a")
        .setting("archive_mode", "on")
        .setting("archive_command", &format!("cp %p {path}/%f"))
        .setting("restore_command", &format!("cp {path}/%f %p"))
        .setting("wal_retrieve_retry_interval", "200ms")
        .primary()
        .await;
    primary.psql("CREATE TABLE t (i int)").await;
    let (other, standby) = (primary.standby("b").await, primary.standby("c").await);
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("c", "caught_up").await;
    standby.set("primary_conninfo", "").await;
    insert(&primary).await;
    primary.psql("SELECT pg_switch_wal()").await;
    // By the archive alone, on the same timeline.
    let has_no_receiver =
        |it: &Scrape| it.value("wal_receiver_state", &[("state", "none")]) == Some(1.0);
    exporter.until("c has no receiver", LIMIT, has_no_receiver).await;
    eventually("c replays what is archived", LIMIT, async || {
        standby.psql("SELECT count(*) FROM t").await == "1"
    })
    .await;

    other.catch_up(&primary).await;
    other.set("primary_conninfo", "").await;
    other.promote().await;
    insert(&other).await;
    let at = async |server: &PgServer| {
        let lsn = "SELECT pg_current_wal_flush_lsn() - '0/0'";
        server.psql(lsn).await.parse::<f64>().unwrap()
    };
    let written = at(&primary).await;
    assert!(written < at(&other).await);
    other.psql("SELECT pg_switch_wal()").await;
    let mut is_beyond = false;
    let until = Instant::now() + LIMIT;
    while !is_beyond {
        assert!(Instant::now() < until, "{}", exporter.log());
        let scrape = exporter.scrape().await;
        is_beyond = Some(written) < scrape.of("wal_lsn_bytes", "c");
        // From the first look at it on.
        if is_beyond {
            assert_eq!((scrape.state("c"), scrape.lag("c")[1]), (Some("primary_unknown"), None));
            assert_eq!(scrape.of("timeline_id", "c"), Some(2.0));
        }
        sleep(INTERVAL / 10).await;
    }
}
