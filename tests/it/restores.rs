//! Restores in circumstances in which it matters that they do what was meant, or say that they do not.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, TimeDelta, Utc};
use harness::postgres::postgres_is_missing;
use harness::{Agent, Mode, PgServer, eventually};

use crate::receive::{Receiving, WAL, load};
use crate::scene::{Kind, Scene, files};

const LIMIT: Duration = Duration::from_mins(3);

/// A primary with a table `t` that has one row, and a backup.
async fn scene_with_backup() -> (Scene, String) {
    let scene = Scene::new().await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    let id = backup(&scene).await;
    (scene, id)
}

async fn backup(scene: &Scene) -> String {
    scene.backup().await["backup_id"].as_str().unwrap().to_owned()
}

async fn rows(server: &PgServer) -> String {
    server.psql("SELECT string_agg(i::text, ',' ORDER BY i) FROM t").await
}

/// What the server's clock says, as `--target-time` takes it.
async fn now(server: &PgServer) -> String {
    let format = "YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"";
    let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC'";
    server.psql(&format!("{now}, '{format}')")).await
}

/// Restores with `arguments`, starts what comes of it, and returns it when it is a primary.
async fn recover(scene: &Scene, name: &str, arguments: &[&str]) -> PgServer {
    let to = scene.restore(name, &[arguments, &["--target-action", "promote"][..]].concat()).await;
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    restored
}

/// Restores in place of the primary, with `arguments`; returns the one that it replaces.
async fn replace(scene: &mut Scene, name: &str, arguments: &[&str]) -> PgServer {
    let to = scene.path(name);
    let restore = ["restore", "--archive-mode", "preserve", "--to", to.to_str().unwrap()];
    let promote = ["--target-action", "promote"];
    scene.run(&[&restore[..], arguments, &promote].concat()).await.assert_success();
    scene.primary.stop(Mode::Fast).await;
    let replacement = PgServer::start_existing(&to).await;
    replacement.recovered().await;
    let old = std::mem::replace(&mut scene.primary, replacement);
    scene.configure(&[&scene.primary]);
    old
}

/// Retention removes the WAL behind an old backup. PostgreSQL reads ahead of its target, and took
/// the answer that the next segment is missing for the end of the recovery.
#[tokio::test]
async fn a_backup_whose_wal_is_followed_by_a_gap_is_recovered_to_its_end() {
    if postgres_is_missing() {
        return;
    }
    let (scene, id) = scene_with_backup().await;
    let end_lsn = scene.list().await[0]["end_lsn"].as_str().unwrap().to_owned();
    for i in 2..5 {
        scene.primary.psql(&format!("INSERT INTO t VALUES ({i})")).await;
        scene.archive_wal().await;
    }
    let own = scene.primary.psql(&format!("SELECT pg_walfile_name('{end_lsn}'::pg_lsn - 1)")).await;
    let stored = files(&scene.repository());
    let wal = stored.iter().filter(|path| path.display().to_string().contains("/wal/"));
    let segment = |path: &Path| path.file_name().unwrap().to_str().unwrap()[..24].to_owned();
    let next = wal.filter(|path| segment(path) > own).min().unwrap();
    fs::remove_file(next).unwrap();

    for (name, target) in
        [("immediate", &["--target", "immediate"][..]), ("lsn", &["--target-lsn", &end_lsn])]
    {
        let arguments = [&["--backup", &id], target].concat();
        assert_eq!(rows(&recover(&scene, name, &arguments).await).await, "1", "{name}");
    }
    let to = scene.restore("never", &["--backup", &id, "--target-name", "never"]).await;
    let mut refused = PgServer::builder().existing(&to);
    // It may take connections before it comes to the end of the WAL.
    refused.try_start().await.ok();
    let says = "recovery ended before configured recovery target was reached";
    eventually("it ends", LIMIT, async || refused.log().contains(says)).await;
}

/// It was killed while it wrote to disk: its settings were there, and longer than the backup's.
#[tokio::test]
async fn a_restore_that_was_killed_at_its_end_leaves_nothing_to_the_one_that_goes_on() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    let conninfo = format!("host=somewhere application_name={}", "long".repeat(10));
    scene.primary.set("primary_conninfo", &conninfo).await;
    let id = backup(&scene).await;
    let stopped = scene.restore("stopped", &["--target", "immediate"]).await;
    fs::rename(stopped.join("global/pg_control"), stopped.join("global/pg_control.pgmesh-restore"))
        .unwrap();
    let state = format!("{id}\nto {}\n", stopped.display());
    crate::scene::write(&stopped.join(".pgmesh-restore"), &state);

    let fresh = scene.path("fresh");
    for (to, mode) in [(&stopped, &["--resume"][..]), (&fresh, &[])] {
        let restore = ["restore", "--archive-mode", "preserve", "--to", to.to_str().unwrap()];
        let action = ["--target", "immediate", "--target-action", "promote"];
        scene.run(&[&restore[..], &action, mode].concat()).await.assert_success();
    }
    let settings = |to: &Path| fs::read_to_string(to.join("postgresql.auto.conf")).unwrap();
    assert_eq!(settings(&stopped), settings(&fresh));
    let builder = PgServer::builder().setting("archive_mode", "off");
    let restored = builder.start_existing(&stopped).await;
    restored.recovered().await;
    assert_eq!(rows(&restored).await, "1");
}

/// Left over from the last time that somebody restored this server by hand.
#[tokio::test]
async fn a_target_in_postgresql_conf_is_none_of_the_copy() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    let conf = scene.primary.data_directory().join("postgresql.conf");
    let text = fs::read_to_string(&conf).unwrap();
    let left_over = "recovery_target = 'immediate'\nrecovery_target_inclusive = off\n\
                     recovery_min_apply_delay = '1d'\nrecovery_end_command = 'false'\n";
    crate::scene::write(&conf, &format!("{text}\n{left_over}"));
    scene.backup().await;
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    scene.primary.psql(r"SELECT pg_create_restore_point('it''s \ here')").await;
    scene.primary.psql("INSERT INTO t VALUES (3)").await;
    scene.archive_wal().await;
    assert_eq!(rows(&recover(&scene, "end", &[]).await).await, "1,2,3");
    let name = ["--target-name", r"it's \ here"];
    assert_eq!(rows(&recover(&scene, "name", &name).await).await, "1,2");
}

/// An older backup was restored in place of the server, so the WAL and the backups after it are
/// nobody's any more, though the backups are newer.
#[tokio::test]
async fn a_restore_follows_the_server_that_lives_and_not_what_was_given_up() {
    if postgres_is_missing() {
        return;
    }
    let (mut scene, id) = scene_with_backup().await;
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    scene.backup().await;
    scene.primary.psql("INSERT INTO t VALUES (3)").await;
    scene.archive_wal().await;
    let target = ["--backup", &id, "--target", "immediate"];
    let old = replace(&mut scene, "replacement", &target).await;
    scene.primary.psql("INSERT INTO t VALUES (10)").await;
    scene.archive_wal().await;

    let again = scene.path("again");
    let restore = ["restore", "--archive-mode", "off", "--to", again.to_str().unwrap()];
    let said = scene.run(&restore).await;
    said.assert_success();
    let plan = said.stderr.lines().find(|line| line.contains("restore started")).unwrap();
    assert!(plan.contains(&id) && plan.contains("\"timeline\":2"), "{plan}");
    assert!(plan.contains("until_lsn"), "{plan}");
    let restored = PgServer::start_existing(&again).await;
    restored.recovered().await;
    assert_eq!(rows(&restored).await, "1,10");
    let given_up = recover(&scene, "given-up", &["--target-timeline", "1"]).await;
    assert_eq!(rows(&given_up).await, "1,2,3");
    drop(old);
}

/// The second restore was to a moment before the first one. Where it follows the timeline of the first,
/// PostgreSQL writes a history whose positions fall.
#[tokio::test]
async fn a_second_restore_to_an_earlier_moment_is_archived_and_restored_as_any_other() {
    if postgres_is_missing() {
        return;
    }
    for timeline in [&[][..], &["--target-timeline", "2"]] {
        let (mut scene, _) = scene_with_backup().await;
        let mut moments = Vec::new();
        for i in 2..5 {
            scene.primary.psql(&format!("INSERT INTO t VALUES ({i})")).await;
            moments.push(now(&scene.primary).await);
            scene.archive_wal().await;
        }
        let first = replace(&mut scene, "first", &["--target-time", &moments[1]]).await;
        assert_eq!(rows(&scene.primary).await, "1,2,3");
        scene.primary.psql("INSERT INTO t VALUES (20)").await;
        scene.archive_wal().await;

        let earlier = ["--target-time", &moments[0]];
        let second = replace(&mut scene, "second", &[&earlier[..], timeline].concat()).await;
        assert_eq!(rows(&scene.primary).await, "1,2");
        scene.primary.psql("INSERT INTO t VALUES (30)").await;
        scene.archive_wal().await;
        let history = scene.primary.data_directory().join("pg_wal/00000003.history");
        let lines = fs::read_to_string(history).unwrap().lines().count();
        assert_eq!(lines > 2, !timeline.is_empty(), "{timeline:?}");

        assert_eq!(rows(&recover(&scene, "again", &[]).await).await, "1,2,30");
        let left = recover(&scene, "left", &["--target-timeline", "2"]).await;
        assert_eq!(rows(&left).await, "1,2,3,20");
        backup(&scene).await;
        scene.primary.psql("INSERT INTO t VALUES (31)").await;
        scene.archive_wal().await;
        assert_eq!(rows(&recover(&scene, "backed-up", &[]).await).await, "1,2,30,31");
        drop((first, second));
    }
}

/// What it comes to is the state of another moment, or the end of another timeline.
#[tokio::test]
async fn a_moment_of_what_was_left_behind_is_restored_only_on_its_timeline() {
    if postgres_is_missing() {
        return;
    }
    let (mut scene, id) = scene_with_backup().await;
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    let time = now(&scene.primary).await;
    scene.primary.psql("INSERT INTO t VALUES (3)").await;
    let old = replace(&mut scene, "new", &["--backup", &id, "--target", "immediate"]).await;
    scene.primary.psql("INSERT INTO t VALUES (10)").await;
    scene.archive_wal().await;

    let to = scene.path("refused");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let restore = [&restore[..], &["--target-time", &time]].concat();
    let refused = scene.run(&restore).await;
    assert_eq!(refused.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("--target-timeline 1"), "{}", refused.stderr);
    let on_its_own = ["--target-time", &time, "--target-timeline", "1"];
    assert_eq!(rows(&recover(&scene, "left", &on_its_own).await).await, "1,2");
    drop(old);
}

/// A restore gave back the data of a copy that somebody had promoted and thrown away.
#[tokio::test]
async fn a_copy_that_was_promoted_beside_its_server_is_restored_only_if_it_is_named() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let (to, refused) = (scene.path("copy"), scene.path("refused"));
    let promote = ["--target", "immediate", "--target-action", "promote"];
    let restore = ["restore", "--archive-mode", "preserve", "--to", to.to_str().unwrap()];
    scene.run(&[&restore[..], &promote].concat()).await.assert_success();
    let copy = PgServer::start_existing(&to).await;
    copy.recovered().await;
    copy.psql("INSERT INTO t VALUES (10); SELECT pg_switch_wal()").await;
    let archived = "SELECT last_archived_wal ~ '^00000002[0-9A-F]{16}$' FROM pg_stat_archiver";
    eventually("its WAL is archived", LIMIT, async || copy.psql(archived).await == "t").await;
    drop(copy);
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    scene.archive_wal().await;

    let restore = ["restore", "--archive-mode", "off", "--to", refused.to_str().unwrap()];
    let refused = scene.run(&restore).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("--target-timeline 1 or --target-timeline 2"), "{refused}");
    for (name, timeline, expected) in [("own", "1", "1,2"), ("copied", "2", "1,10")] {
        let restored = recover(&scene, name, &["--target-timeline", timeline]).await;
        assert_eq!(rows(&restored).await, expected);
    }
}

/// A backup of what was left behind is newer, and leads nowhere.
#[tokio::test]
async fn the_retention_keeps_the_backup_that_leads_to_the_server_that_lives() {
    if postgres_is_missing() {
        return;
    }
    let retention = "[retention]\ndaily = 1\nweekly = 0\nmonthly = 0\nwal = \"1s\"\n\
                     delete_after = \"0s\"\n";
    let mut scene = Scene::with(Kind::Directory, retention).await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    let id = backup(&scene).await;
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    scene.archive_wal().await;
    scene.backup().await;
    let old = replace(&mut scene, "new", &["--backup", &id, "--target", "immediate"]).await;
    scene.primary.psql("INSERT INTO t VALUES (10)").await;
    // Ages count until the newest that is stored.
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.archive_wal().await;
    for _ in 0..2 {
        scene.run(&["expire", "--apply"]).await.assert_success();
    }
    assert_eq!(rows(&recover(&scene, "again", &[]).await).await, "1,10");

    let newest = backup(&scene).await;
    scene.primary.psql("INSERT INTO t VALUES (11)").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.archive_wal().await;
    for _ in 0..2 {
        scene.run(&["expire", "--apply"]).await.assert_success();
    }
    let listed = scene.list().await;
    let listed: Vec<_> = listed.iter().map(|it| it["backup_id"].as_str().unwrap()).collect();
    assert_eq!(listed, [&newest]);
    assert_eq!(rows(&recover(&scene, "newest", &[]).await).await, "1,10,11");
    drop(old);
}

/// A standby that lacked the end of the only backup was promoted: the next backup does not wait for
/// the schedule, and until then nobody gets what was left behind unasked.
#[tokio::test]
async fn a_failover_that_leaves_the_newest_backup_behind_is_answered_with_a_backup() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, WAL).await;
    receiving.primary().psql("CREATE TABLE t AS SELECT 1 AS i").await;
    standby.catch_up(receiving.primary()).await;
    standby.set("primary_conninfo", "host=/nowhere").await;
    let streams = "SELECT count(*) FROM pg_stat_wal_receiver";
    eventually("the standby is cut off", LIMIT, async || standby.psql(streams).await == "0").await;
    load(receiving.primary(), 100_000).await;
    receiving.primary().psql("INSERT INTO t VALUES (2)").await;
    let scene = &receiving.scene;
    scene.configure(&[&scene.primary]);
    let first = scene.list().await[0]["backup_id"].as_str().unwrap().to_owned();
    let newest = backup(scene).await;
    scene.configure(&[&scene.primary, &standby]);
    for file in files(&scene.repository()) {
        if file.display().to_string().contains(&first) {
            fs::remove_file(file).unwrap();
        }
    }
    receiving.scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    standby.psql("INSERT INTO t VALUES (10)").await;
    let leads = async || {
        let listed = receiving.scene.list().await;
        listed.iter().any(|backup| backup["timeline"] == 2)
    };
    eventually("a backup of the new timeline is taken", LIMIT, leads).await;
    receiving.agent.logged("no backup leads to the newest timeline", LIMIT).await;
    assert_eq!(rows(&receiving.recover("latest").await).await, "1,10");
    let by_name = recover(&receiving.scene, "by-name", &["--backup", &newest]).await;
    assert_eq!(rows(&by_name).await, "1,2");
}

/// The time until which a backup can be restored, as `list` shows it, is one that can be asked for:
/// there is a commit after it, however idle the database is.
#[tokio::test]
async fn an_idle_database_is_restored_to_the_time_that_is_listed() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::Directory).await;
    receiving.primary().psql("CREATE TABLE t AS SELECT 1 AS i").await;
    receiving.stored_all().await;
    let listed = async || {
        let listed = receiving.scene.list().await;
        listed[0]["window"]["until"].as_str().unwrap().parse::<DateTime<Utc>>().unwrap()
    };
    let until = listed().await;
    let heartbeats = async || listed().await > until + TimeDelta::seconds(4);
    eventually("heartbeats are stored", LIMIT, heartbeats).await;
    let at = until.to_rfc3339();
    let restored = recover(&receiving.scene, "restored", &["--target-time", &at]).await;
    assert_eq!(rows(&restored).await, "1");
}

/// Copied with `cp -r`, every object seemed to be as new as the copy, and so did what is in it; copied with
/// older times, nothing could be reached any more.
#[tokio::test]
async fn a_repository_that_was_copied_without_its_times_reaches_no_further() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    scene.archive_wal().await;
    let times = async || {
        let listed = scene.list().await;
        let wal = scene.run(&["list", "--wal", "--json"]).await;
        wal.assert_success();
        let ranges: Vec<serde_json::Value> = serde_json::from_str(&wal.stdout).unwrap();
        let until = &listed[0]["window"]["until"];
        let times = [until, &ranges[0]["stored_from"], &ranges[0]["stored_until"]];
        times.map(|it| it.as_str().unwrap().parse::<DateTime<Utc>>().unwrap())
    };
    let before = times().await;
    let later = SystemTime::now() + Duration::from_hours(1);
    for (name, other) in [("later", later), ("long-ago", SystemTime::UNIX_EPOCH)] {
        for file in files(&scene.repository()) {
            fs::File::open(file).unwrap().set_modified(other).unwrap();
        }
        for (which, (after, before)) in times().await.into_iter().zip(before).enumerate() {
            // Nothing tells that what is before the first backup is not so old.
            if name == "later" || which != 1 {
                // A file system's clock ticks less often than ours.
                let apart = (after - before).abs();
                assert!(apart < TimeDelta::seconds(1), "{name}: {before} has become {after}");
            }
        }
        scene.restore(name, &["--target-time", &before[0].to_rfc3339()]).await;
    }
    let at = (Utc::now() + TimeDelta::minutes(10)).to_rfc3339();
    let to = scene.path("beyond");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let refused = scene.run(&[&restore[..], &["--target-time", &at]].concat()).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("cannot be reached"), "{refused}");
}

/// `--force` and `--tablespace OLD=OLD` would have emptied it.
#[tokio::test]
async fn the_tablespace_of_a_server_that_lives_is_not_emptied_even_if_asked_for() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let location = scene.primary.tablespace("living").await;
    scene.primary.psql("CREATE TABLE t TABLESPACE living AS SELECT 1 AS i").await;
    scene.backup().await;
    scene.primary.psql("CHECKPOINT").await;
    let before = files(&location);
    let (to, map) = (scene.path("copy"), format!("{0}={0}", location.display()));
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap(), "--force"];
    let refused = scene.run(&[&restore[..], &["--tablespace", &map]].concat()).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("living server's"), "{refused}");
    assert_eq!(files(&location), before);
}

/// A recovery beside the server wrote over the tablespace that it had got after the backup.
#[tokio::test]
async fn a_recovery_that_would_make_a_living_servers_tablespace_again_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let before = now(&scene.primary).await;
    scene.primary.tablespace("living").await;
    scene.primary.psql("CREATE TABLE u TABLESPACE living AS SELECT 1 AS i").await;
    scene.archive_wal().await;
    let to = scene.path("copy");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let refused = scene.run(&restore).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("write over that server's files"), "{refused}");
    assert_eq!(rows(&recover(&scene, "earlier", &["--target-time", &before]).await).await, "1");
    assert_eq!(scene.primary.psql("SELECT i FROM u").await, "1");
}

#[tokio::test]
async fn wrong_use_is_2_whatever_a_directory_is_called() {
    Agent::without_config().run(&["restore", "--to", "wal-fetch"]).await.assert_code(2);
    Agent::without_config().run(&["wal-fetch", "--fast"]).await.assert_code(254);
}

/// What the recovery needed went into the standby's `postgresql.auto.conf`: it stopped for ever where
/// the recovery did.
#[tokio::test]
async fn a_standby_that_is_built_from_a_restored_primary_follows_it() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let restored = recover(&scene, "restored", &["--target", "immediate"]).await;
    let path = restored.data_directory().join("postgresql.auto.conf");
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("recovery_") && !text.contains("restore_command"), "{text}");
    assert!(text.contains("archive_mode = 'off'"), "{text}");
    let standby = restored.standby("standby1").await;
    restored.psql("INSERT INTO t VALUES (2)").await;
    eventually("the standby follows", LIMIT, async || rows(&standby).await == "1,2").await;
}

/// A hot standby stops where the primary's `max_connections` was raised, and nobody is told.
#[tokio::test]
async fn a_recovery_goes_past_a_raised_max_connections() {
    if postgres_is_missing() {
        return;
    }
    let (mut scene, _) = scene_with_backup().await;
    scene.primary.psql("ALTER SYSTEM SET max_connections = 321").await;
    scene.primary.stop(Mode::Fast).await;
    scene.primary.start().await;
    scene.primary.psql("INSERT INTO t VALUES (2)").await;
    scene.archive_wal().await;
    assert_eq!(rows(&recover(&scene, "restored", &[]).await).await, "1,2");
}

/// It took the slot at the publisher, and the changes that were for the server that lives on.
#[tokio::test]
async fn a_copy_of_a_subscriber_leaves_the_publisher_alone() {
    if postgres_is_missing() {
        return;
    }
    let publisher = PgServer::builder().name("publisher").setting("wal_level", "logical");
    let publisher = publisher.primary().await;
    publisher.psql("CREATE TABLE t (i int); CREATE PUBLICATION p FOR TABLE t").await;
    let mut scene = Scene::new().await;
    let conninfo = format!("{} dbname=postgres", publisher.conninfo("s")).replace('\'', "''");
    scene.primary.psql("CREATE TABLE t (i int)").await;
    let subscribe = format!("CREATE SUBSCRIPTION s CONNECTION '{conninfo}' PUBLICATION p");
    scene.primary.psql(&subscribe).await;
    let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
    let streaming = async || publisher.psql(streams).await == "1";
    eventually("the subscription streams", LIMIT, streaming).await;
    backup(&scene).await;
    scene.archive_wal().await;
    scene.primary.stop(Mode::Fast).await;
    publisher.psql("INSERT INTO t VALUES (1)").await;

    let to = scene.path("copy");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let said = scene.run(&restore).await;
    said.assert_success();
    assert!(said.stdout.contains("SET (slot_name = NONE)"), "{said}");
    let copy = PgServer::start_existing(&to).await;
    copy.recovered().await;
    assert_eq!(copy.psql("SELECT subenabled FROM pg_subscription").await, "t");
    // The launcher would have begun at once.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let senders = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'";
    assert_eq!(publisher.psql(senders).await, "0");
    assert_eq!(copy.psql("SELECT count(*) FROM t").await, "0");

    // As the restore says.
    copy.psql("ALTER SUBSCRIPTION s DISABLE").await;
    copy.psql("ALTER SUBSCRIPTION s SET (slot_name = NONE)").await;
    copy.psql("ALTER SYSTEM RESET max_logical_replication_workers").await;
    drop(copy);
    let copy = PgServer::start_existing(&to).await;
    assert_ne!(copy.psql("SHOW max_logical_replication_workers").await, "0");
    scene.primary.start().await;
    eventually("production has it", LIMIT, async || rows(&scene.primary).await == "1").await;
    assert_eq!(copy.psql("SELECT count(*) FROM t").await, "0");
}

/// Nothing is stored after it, so it is no gap, and `list --wal` was content.
#[tokio::test]
async fn the_last_segment_that_a_backup_needs_is_missed() {
    if postgres_is_missing() {
        return;
    }
    let (scene, id) = scene_with_backup().await;
    let newest = files(&scene.repository()).into_iter().rfind(|path| {
        path.to_string_lossy().contains("/wal/") && !path.to_string_lossy().contains(".backup")
    });
    fs::remove_file(newest.unwrap()).unwrap();
    for command in ["list", "verify"] {
        let missed = scene.run(&[command, "--wal"]).await;
        missed.assert_code(1);
        let says = format!("{}{}", missed.stdout, missed.stderr);
        assert!(says.contains(&id) && says.contains("cannot be restored"), "{missed}");
    }
}

/// `--force` deleted the cluster that was there, found that the new one could not go there, and gave
/// advice that was refused.
#[tokio::test]
async fn force_deletes_nothing_if_the_restore_cannot_go_there() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let location = scene.primary.tablespace("space").await;
    scene.primary.psql("CREATE TABLE u TABLESPACE space AS SELECT 1 AS i").await;
    backup(&scene).await;
    let old = scene.path("old");
    fs::create_dir_all(old.join("base")).unwrap();
    fs::write(old.join("PG_VERSION"), "17").unwrap();
    let before = files(&old);
    let forced = async |space: &str, more: &str| {
        let map = format!("{}={space}", location.display());
        let restore = ["restore", "--archive-mode", "off", "--to", old.to_str().unwrap()];
        scene.run(&[&restore[..], &["--tablespace", &map, more]].concat()).await
    };
    let file = scene.path("file");
    fs::write(&file, "").unwrap();
    let refused = forced(file.join("space").to_str().unwrap(), "--force").await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("make directory"), "{refused}");
    assert!(!refused.stderr.contains("--resume"), "{refused}");
    assert_eq!(files(&old), before);

    // Killed right after it had deleted: its advice works.
    fs::write(old.join(".pgmesh-restore"), "emptied by --force\n").unwrap();
    fs::remove_file(old.join("PG_VERSION")).unwrap();
    let space = scene.path("space");
    let resumed = forced(space.to_str().unwrap(), "--resume").await;
    resumed.assert_code(1);
    assert!(resumed.stderr.contains("start anew with --force"), "{resumed}");
    forced(space.to_str().unwrap(), "--force").await.assert_success();
}

/// The data directory was whole, and the agent panicked.
#[tokio::test]
async fn a_place_whose_name_is_not_text_is_told_to_programs() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let to = scene.path("x").with_file_name(OsStr::from_bytes(b"to\xff"));
    let line = ["restore", "--archive-mode", "off", "--json", "--to"].map(OsStr::new);
    let restored = scene.agent().run(&[&line[..], &[to.as_os_str()]].concat()).await;
    restored.assert_success();
    let told: serde_json::Value = serde_json::from_str(&restored.stdout).unwrap();
    assert!(told["restored_to"].as_str().unwrap().ends_with("to\u{fffd}"), "{restored}");
}

/// Its commits waited for the living server's standbys, for ever.
#[tokio::test]
async fn the_commits_of_a_copy_wait_for_no_standby() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    // Without a reload: the server itself waits for nobody.
    scene.primary.psql("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (elsewhere)'").await;
    backup(&scene).await;
    let copy = recover(&scene, "copy", &["--target", "immediate"]).await;
    copy.psql("SET statement_timeout = '30s'; INSERT INTO t VALUES (2)").await;
    assert_eq!(rows(&copy).await, "1,2");
}

/// PostgreSQL's own names are text.
#[tokio::test]
async fn a_file_whose_name_is_not_text_is_named() {
    if postgres_is_missing() {
        return;
    }
    let (scene, _) = scene_with_backup().await;
    let name = OsStr::from_bytes(b"not\xff-text");
    fs::write(scene.primary.data_directory().join(name), "").unwrap();
    let refused = scene.run(&["backup"]).await;
    refused.assert_code(1);
    for says in ["not\u{fffd}-text", "move it out of the data directory"] {
        assert!(refused.stderr.contains(says), "{refused}");
    }
    assert_eq!(scene.list().await.len(), 1);
}
