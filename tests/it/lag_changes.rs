//! What the lag exporter says while the cluster changes: never a wrong number, and never none for
//! longer than it must.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::program::{directory, give_to_server_user};
use harness::{
    Mode, PatroniCluster, PgServer, Proxy, eventually, patroni_is_missing, run, server_port,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::exporter::{Exporter, INTERVAL, LIMIT, Scrape, node, server};
use crate::scene::write;

pub(crate) const NO_LAG: [Option<f64>; 3] = [None, None, None];
/// A sample older than this says nothing: `Limits::stale_after`.
const STALE_AFTER: f64 = 3.0 + 0.25 * 3.0;
/// How long the primary is away, in seconds; the default is long enough for each state to be seen.
const OUTAGE_VARIABLE: &str = "PGMESH_TEST_OUTAGE_SECONDS";
const OUTAGE_SECONDS: u64 = 12;
/// A scrape takes not more than that, on a busy machine.
const SCRAPE: Duration = Duration::from_millis(100);
/// What a test and an agent on a busy machine may differ by, in seconds, besides the interval
/// between two samples.
const ERROR: f64 = 0.5;

struct Three {
    primary: PgServer,
    first: PgServer,
    second: PgServer,
    exporter: Exporter,
}

impl Three {
    /// A primary `a` with the standbys `b` and `c`, and some WAL.
    async fn start() -> Self {
        let primary = PgServer::builder().name("a").primary().await;
        primary.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").await;
        // Its promotion takes as long as that: it is in recovery, on its new timeline.
        let slow = ("recovery_end_command", "sleep 1");
        let (first, second) =
            (primary.standby_with("b", &[slow]).await, primary.standby("c").await);
        let nodes = [server(&primary), server(&first), server(&second)];
        let exporter = Exporter::start(&nodes).await;
        for standby in ["b", "c"] {
            exporter.state(standby, "caught_up").await;
        }
        Self { primary, first, second, exporter }
    }
}

pub(crate) fn insert(server: &PgServer) -> impl Future<Output = String> {
    server.psql("INSERT INTO t VALUES (1)")
}

pub(crate) fn primaries(scrape: &Scrape) -> Option<f64> {
    scrape.value("group_primaries", &[])
}

pub(crate) fn split_brain(scrape: &Scrape, state: &str) -> bool {
    scrape.value("group_split_brain", &[("state", state)]) == Some(1.0)
}

/// Makes a server that is stopped a standby of another one.
pub(crate) fn make_standby_of(server: &PgServer, primary: &PgServer) {
    let data = server.data_directory();
    fs::write(data.join("standby.signal"), "").unwrap();
    give_to_server_user(&data.join("standby.signal"));
    let conninfo = primary.conninfo(server.name()).replace('\'', "''");
    let auto = data.join("postgresql.auto.conf");
    let before = fs::read_to_string(&auto).unwrap();
    write(&auto, &format!("{before}primary_conninfo = '{conninfo}'\n"));
}

/// Makes the data directory of a server that is stopped anew, at the same place.
pub(crate) async fn rebuild(server: &PgServer, primary: &PgServer) {
    let data = server.data_directory();
    fs::remove_dir_all(data).unwrap();
    let mut copy = primary.program("pg_basebackup");
    copy.args(["--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--dbname"])
        .arg(primary.conninfo(server.name()))
        .arg("--pgdata")
        .arg(data);
    run(&mut copy).await;
}

/// Checks that the lag of `node`, whose first missing commit was at `since`, has two bounds around
/// that. The bounds of what was written while the primary was not asked lie apart by `apart`.
#[track_caller]
pub(crate) fn assert_age(scrape: &Scrape, node: &str, since: Instant, apart: f64) {
    let truth = since.elapsed().as_secs_f64();
    let [Some(lower), Some(estimate), Some(upper)] = scrape.lag(node) else {
        panic!("{node} has no lag:\n{}", scrape.text);
    };
    let error = ERROR + INTERVAL.as_secs_f64();
    // It was a little before `since`: the commit is made before `psql` ends.
    assert!(lower <= truth + ERROR && truth <= upper + error, "{truth} in {lower} to {upper}");
    assert!(upper - lower <= apart + error, "{lower} to {upper}");
    assert!((estimate - truth).abs() <= apart + error, "{estimate}, not {truth}");
}

#[tokio::test]
async fn a_failover_is_followed_and_what_diverged_has_no_lag() {
    if postgres_is_missing() {
        return;
    }
    let Three { mut primary, first, second, exporter } = Three::start().await;
    // The old primary has WAL that nobody else has.
    for standby in [&first, &second] {
        standby.set("primary_conninfo", "host=/nowhere").await;
    }
    let is_alone = "SELECT count(*) FROM pg_stat_replication";
    eventually("nobody receives", LIMIT, async || primary.psql(is_alone).await == "0").await;
    insert(&primary).await;
    let since = Instant::now();
    sleep(Duration::from_secs(1)).await;
    primary.psql("INSERT INTO t SELECT generate_series(1, 10000)").await;
    let scrape = exporter.until("b is behind", LIMIT, |it| {
        it.state("b") == Some("ok") && it.of("replay_lag_bytes", "b") > Some(100_000.0)
    });
    assert_age(&scrape.await, "b", since, 0.0);

    primary.kill9().await;
    exporter
        .until("a is down", LIMIT, |it| {
            ["target_up", "target_fresh_connect_success"]
                .iter()
                .all(|name| it.of(name, "a") == Some(0.0))
        })
        .await;
    // What is lost at least stays known, and who should be promoted.
    let scrape = exporter
        .until("nothing is told of now", LIMIT, |it| it.value("group_rpo_seconds", &[]).is_none());
    let scrape = scrape.await;
    let lost = scrape.value("group_rpo_lower_bytes", &[]);
    assert!(lost > Some(100_000.0), "{}", scrape.text);
    eventually("the log names a standby", LIMIT, async || {
        exporter.log().lines().any(|it| it.contains("primary unknown") && it.contains("most_wal"))
    })
    .await;
    first.promote().await;
    insert(&first).await;
    let promoted = exporter.until("b is the primary", LIMIT, |it| {
        it.of("in_recovery", "b") == Some(0.0)
            && it.value("timeline_id", &[("node", "b")]) == Some(2.0)
    });
    // It is a primary, which has no lag, and no state of one.
    let scrape = promoted.await;
    assert_eq!((scrape.state("b"), scrape.lag("b")), (None, NO_LAG));
    second.follow(&first).await;
    exporter
        .until("c follows b", LIMIT, |it| {
            it.state("c") == Some("caught_up") && it.of("timeline_id", "c") == Some(2.0)
        })
        .await;
    let is_alone = |it: &Scrape| primaries(it) == Some(1.0) && it.state("a") == Some("unreachable");
    exporter.until("only b is a primary", LIMIT, is_alone).await;

    // It comes back as the primary that it was.
    primary.start().await;
    let scrape = exporter.until("both are primaries", LIMIT, |it| primaries(it) == Some(2.0)).await;
    assert!(!split_brain(&scrape, "confirmed"), "{}", scrape.text);
    exporter.until("both may write", LIMIT, |it| split_brain(it, "candidate")).await;
    insert(&primary).await;
    insert(&first).await;
    exporter.until("both write", LIMIT, |it| split_brain(it, "confirmed")).await;
    // The newer timeline counts.
    second.catch_up(&first).await;
    let scrape = exporter.state("c", "caught_up").await;
    assert_eq!(scrape.lag("a"), NO_LAG);

    // As a standby of the new one: it has what that has not.
    primary.stop(Mode::Immediate).await;
    make_standby_of(&primary, &first);
    primary.start().await;
    let scrape = exporter.state("a", "diverged").await;
    assert_eq!((scrape.lag("a"), scrape.of("replay_lag_bytes", "a")), (NO_LAG, None));
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        insert(&first).await;
        let scrape = exporter.scrape().await;
        assert_eq!((scrape.state("a"), scrape.lag("a")), (Some("diverged"), NO_LAG));
        assert!(split_brain(&scrape, "no") || primaries(&scrape) == Some(2.0));
        sleep(INTERVAL).await;
    }

    primary.stop(Mode::Fast).await;
    rebuild(&primary, &first).await;
    primary.start().await;
    primary.catch_up(&first).await;
    let scrape = exporter.state("a", "caught_up").await;
    assert_eq!((scrape.of("timeline_id", "a"), primaries(&scrape)), (Some(2.0), Some(1.0)));
}

#[tokio::test]
async fn ages_survive_a_switchover() {
    if postgres_is_missing() {
        return;
    }
    let Three { mut primary, first, second, mut exporter } = Three::start().await;
    second.psql("SELECT pg_wal_replay_pause()").await;
    insert(&primary).await;
    let since = Instant::now();
    let scrape = exporter.state("c", "ok").await;
    assert_age(&scrape, "c", since, 0.0);
    sleep(Duration::from_secs(1)).await;

    // In order: the standbys have all of it. And b is asked while it is in recovery on its new timeline.
    let session = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgmesh/lag-exporter'";
    let session = Pid::from_raw(first.psql(session).await.parse().unwrap()).unwrap();
    kill_process(session, Signal::STOP).unwrap();
    primary.stop(Mode::Fast).await;
    tokio::join!(first.promote(), async {
        sleep(INTERVAL).await;
        kill_process(session, Signal::CONT).unwrap();
    });
    make_standby_of(&primary, &first);
    primary.start().await;
    second.follow(&first).await;
    insert(&first).await;
    primary.catch_up(&first).await;
    let scrape = exporter
        .until("a follows b", LIMIT, |it| {
            it.state("a") == Some("caught_up") && it.of("timeline_id", "a") == Some(2.0)
        })
        .await;
    assert_eq!((primaries(&scrape), scrape.state("b")), (Some(1.0), None));
    // What c has not replayed is as old as it was.
    let scrape = exporter.state("c", "ok").await;
    assert_age(&scrape, "c", since, 0.0);
    second.psql("SELECT pg_wal_replay_resume()").await;
    exporter.state("c", "caught_up").await;
    let finished = exporter.stop().await;
    assert!(finished.stdout.contains("primary changed"), "{finished}");
}

#[tokio::test]
async fn the_history_survives_a_restart() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let standby = primary.standby("b").await;
    let state = directory();
    let keep = format!("state_directory = \"{}\"\n", state.path().display());
    let nodes = [server(&primary), server(&standby)].concat();
    for (extra, apart) in [(keep.as_str(), Some(0.0)), ("", None)] {
        let mut exporter = Exporter::configured("postgres", &nodes, extra);
        exporter.run().await;
        exporter.state("b", "caught_up").await;
        standby.psql("SELECT pg_wal_replay_pause()").await;
        insert(&primary).await;
        let since = Instant::now();
        sleep(Duration::from_secs(2)).await;
        insert(&primary).await;
        assert_age(&exporter.state("b", "ok").await, "b", since, 0.0);

        let finished = exporter.stop().await;
        assert!(finished.unexpected_log_lines(&[]).is_empty(), "{finished}");
        // One of them by a new name.
        let renamed = [server(&primary), server(&standby).replace("\"b\"", "\"new\"")].concat();
        exporter.configure("postgres", &renamed);
        sleep(Duration::from_secs(1)).await;
        exporter.run().await;
        let known = |it: &Scrape| it.lag("new")[0].is_some();
        let scrape = exporter.until("the lag is known", LIMIT, known).await;
        assert_eq!(scrape.of("target_up", "b"), None);
        if let Some(apart) = apart {
            assert_age(&scrape, "new", since, apart);
        } else {
            // Not more than is true, and not 0.
            let [lower, estimate, _] = scrape.lag("new");
            assert!(lower <= Some(since.elapsed().as_secs_f64()), "{lower:?}");
            assert_ne!((scrape.state("new"), estimate), (Some("caught_up"), Some(0.0)));
        }
        standby.psql("SELECT pg_wal_replay_resume()").await;
        exporter.state("new", "caught_up").await;
        exporter.stop().await;
    }
}

#[tokio::test]
async fn while_the_primary_is_unreachable_the_lag_is_unknown() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let (standby, paused) = (primary.standby("b").await, primary.standby("c").await);
    let link = Proxy::start(primary.socket()).await;
    let through_link = node("a", "127.0.0.1", link.port());
    let exporter = Exporter::start(&[through_link, server(&standby), server(&paused)]).await;
    for standby in ["b", "c"] {
        exporter.state(standby, "caught_up").await;
    }
    paused.psql("SELECT pg_wal_replay_pause()").await;
    insert(&primary).await;
    let since = Instant::now();
    exporter.state("c", "ok").await;
    exporter.state("b", "caught_up").await;

    let outage = std::env::var(OUTAGE_VARIABLE).ok();
    let outage = outage.map_or(OUTAGE_SECONDS, |it| it.parse().unwrap());
    link.cut();
    let cut_at = Instant::now();
    let mut unknown = 0;
    while cut_at.elapsed() < Duration::from_secs(outage) {
        // Only they know that the primary goes on.
        insert(&primary).await;
        let silent = cut_at.elapsed().as_secs_f64();
        let scrape = exporter.scrape().await;
        assert_eq!(scrape.of("target_up", "b"), Some(1.0));
        match scrape.state("b") {
            // It says for how long it may be wrong. The snapshot's sample is up to an interval old.
            Some("caught_up") => {
                assert!(silent < STALE_AFTER + ERROR, "{silent}");
                assert!(silent - INTERVAL.as_secs_f64() - ERROR < scrape.lag("b")[2].unwrap());
            }
            Some("primary_unknown") => unknown += 1,
            other => panic!("{other:?}"),
        }
        // What it lacks stays as old as it is, whoever answers.
        assert_eq!(scrape.state("c"), Some("ok"));
        assert_age(&scrape, "c", since, 0.0);
        sleep(INTERVAL).await;
    }
    assert!(10 < unknown, "{unknown}");
    let scrape = exporter.scrape().await;
    assert_eq!((primaries(&scrape), scrape.of("target_up", "a")), (Some(0.0), Some(0.0)));
    assert_eq!(scrape.value("group_rpo_seconds", &[]), None);
    let away = Duration::from_secs(outage - 1).as_secs_f64();
    assert!(scrape.value("group_primary_sample_age_seconds", &[]) > Some(away));

    link.heal();
    exporter.state("b", "caught_up").await;
    let scrape = exporter.state("c", "ok").await;
    assert_age(&scrape, "c", since, 0.0);
}

#[tokio::test]
async fn a_server_that_hangs_delays_nobody() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let (hangs, lives) = (primary.standby("b").await, primary.standby("c").await);
    let nobody = node("dead", "127.0.0.1", server_port());
    let unknown = node("unknown", "no-such-host.invalid", 5432);
    let nodes = [server(&primary), server(&hangs), server(&lives), nobody, unknown];
    let exporter = Exporter::start(&nodes).await;
    exporter.state("b", "caught_up").await;
    exporter.state("dead", "unreachable").await;
    exporter.state("unknown", "unreachable").await;

    hangs.sigstop();
    let stopped_at = Instant::now();
    insert(&primary).await;
    let since = Instant::now();
    let mut silent = 0;
    while stopped_at.elapsed() < Duration::from_secs(8) {
        let is_stale = STALE_AFTER + ERROR < stopped_at.elapsed().as_secs_f64();
        // Fails if it takes long.
        let scrape = exporter.scrape().await;
        let others = ["a", "c"].map(|node| scrape.of("target_up", node));
        assert_eq!(others, [Some(1.0), Some(1.0)]);
        assert_eq!(scrape.state("c"), Some("caught_up"));
        let at = |node| scrape.of("target_last_success_timestamp_seconds", node).unwrap();
        assert!((at("c") - at("a")).abs() < INTERVAL.as_secs_f64() + ERROR);
        if is_stale {
            assert_eq!((scrape.state("b"), scrape.lag("b")), (Some("unreachable"), NO_LAG));
            assert_eq!(scrape.of("target_up", "b"), Some(0.0));
            silent += 1;
        } else if let Some(upper) = scrape.lag("b")[2] {
            // Up to then it may have caught up, for all that is known: at most this is the truth.
            let truth = since.elapsed().saturating_sub(SCRAPE).as_secs_f64();
            assert!(truth <= upper, "{truth}, not {upper}");
        }
        sleep(INTERVAL / 4).await;
    }
    assert!(10 < silent, "{silent}");
    hangs.sigcont();
    let scrape = exporter.state("b", "caught_up").await;
    assert_eq!(scrape.of("target_up", "b"), Some(1.0));
}

/// A kept connection hides that no new one is made.
#[tokio::test]
async fn a_frozen_postmaster_is_seen_by_a_new_connection() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    primary.psql("CREATE TABLE t (i int)").await;
    let standby = primary.standby("b").await;
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("b", "caught_up").await;
    let postmaster = fs::read_to_string(standby.data_directory().join("postmaster.pid")).unwrap();
    let postmaster = Pid::from_raw(postmaster.lines().next().unwrap().parse().unwrap()).unwrap();
    kill_process(postmaster, Signal::STOP).unwrap();
    // It tries every 40 to 60 s.
    let is_refused = |it: &Scrape| it.of("target_fresh_connect_success", "b") == Some(0.0);
    let limit = Duration::from_secs(70);
    let scrape = exporter.until("no new connection is made", limit, is_refused).await;
    assert_eq!((scrape.of("target_up", "b"), scrape.state("b")), (Some(1.0), Some("caught_up")));
    assert_eq!(scrape.of("target_fresh_connect_success", "a"), Some(1.0));
    kill_process(postmaster, Signal::CONT).unwrap();
}

#[tokio::test]
async fn members_that_patroni_knows_appear_by_themselves() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::start(2).await;
    let exporter = Exporter::of_patroni(&cluster).await;
    let old = cluster.leader().await;
    let names = [cluster.name(0).to_owned(), cluster.name(1).to_owned()];
    let (old_name, new_name) = (names[old].as_str(), names[1 - old].as_str());
    let scrape = exporter.state(new_name, "caught_up").await;
    assert_eq!(scrape.of("in_recovery", old_name), Some(0.0));
    let timeline = scrape.of("timeline_id", old_name).unwrap();

    cluster.kill9(old).await;
    let minute = Duration::from_mins(1);
    let scrape = exporter
        .until("the failover is followed", minute, |it| {
            it.of("in_recovery", new_name) == Some(0.0) && primaries(it) == Some(1.0)
        })
        .await;
    assert_eq!(scrape.of("timeline_id", new_name), Some(timeline + 1.0));
    assert_eq!(scrape.of("target_up", old_name), Some(0.0));
    assert_eq!(scrape.lag(old_name), NO_LAG);

    cluster.start_member(old);
    cluster.settled().await;
    let scrape = exporter.state(old_name, "caught_up").await;
    assert_eq!(scrape.of("timeline_id", old_name), Some(timeline + 1.0));
    assert!(split_brain(&scrape, "no"), "{}", scrape.text);
}
