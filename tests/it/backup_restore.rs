//! A backup comes back bit for bit, and to the moment asked for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{EtcdCluster, Mode, PgServer, etcd_is_missing, eventually};

use crate::replicas::section;
use crate::scene::{Kind, Scene, files};

const LIMIT: Duration = Duration::from_mins(2);

/// A table whose content is known.
async fn fill(server: &PgServer, table: &str, rows: u32) {
    let sql = format!(
        "CREATE TABLE {table} AS SELECT i, md5(i::text) AS text FROM generate_series(1, {rows}) AS i"
    );
    server.psql(&sql).await;
}

async fn count(server: &PgServer, table: &str) -> String {
    server.psql(&format!("SELECT count(*) FROM {table}")).await
}

/// `pg_verifybackup` compares every file of a directory with the server's own manifest.
async fn verify_files(server: &PgServer, directory: &Path) {
    server.run("pg_verifybackup", &["--no-parse-wal", directory.to_str().unwrap()]).await;
}

/// The main path, on both kinds of repository: backup from a standby under write load, with a
/// second tablespace, restored to a time.
async fn backup_under_load_is_restored_to_a_time(kind: Kind) {
    let scene =
        Scene::with(kind, "[backup]\nobject_bytes = 16777216\npart_bytes = 5242880\n").await;
    let location = scene.primary.tablespace("second").await;
    scene.primary.run("pgbench", &["--initialize", "--scale=3", "--quiet"]).await;
    fill(&scene.primary, "known", 50_000).await;
    scene.primary.psql("CREATE TABLE there TABLESPACE second AS SELECT * FROM known").await;
    let standby = scene.primary.standby("standby1").await;
    standby.catch_up(&scene.primary).await;
    scene.configure(&[&scene.primary, &standby]);

    let mut load = scene.primary.program("pgbench");
    load.args(["--time=60", "--client=2", "--no-vacuum"]).stdout(Stdio::null()).kill_on_drop(true);
    let mut load = load.stderr(Stdio::null()).spawn().unwrap();
    let backup = scene.backup().await;
    assert_eq!(backup["from_standby"], true, "{backup}");
    assert_eq!(backup["suspect"], serde_json::Value::Null);
    load.kill().await.unwrap();
    eventually("the load has ended", LIMIT, async || {
        let clients = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'";
        scene.primary.psql(clients).await == "0"
    })
    .await;

    let dump = scene.primary.dump().await;
    let at = scene.primary.psql("SELECT clock_timestamp()").await;
    scene
        .primary
        .psql("DELETE FROM known; DROP TABLE there; INSERT INTO pgbench_history (tid) VALUES (1)")
        .await;
    scene.archive_wal().await;

    let second = scene.path("second");
    let map = format!(
        "{}={}",
        standby
            .psql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'second'")
            .await,
        second.display()
    );
    let to = scene
        .restore(
            "restored",
            &["--target-time", &at, "--target-action", "promote", "--tablespace", &map],
        )
        .await;
    verify_files(&scene.primary, &to).await;
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    let mapped =
        restored.dump().await.replace(second.to_str().unwrap(), location.to_str().unwrap());
    assert_eq!(mapped, dump, "source and copy at {at}");
    restored.run("pg_amcheck", &["--all", "--install-missing", "--heapallindexed"]).await;

    let verified = scene.run(&["verify"]).await;
    verified.assert_success();
    assert!(verified.stdout.contains("can be restored"), "{verified}");
}

#[tokio::test]
async fn backup_under_load_is_restored_to_a_time_from_a_directory() {
    if !postgres_is_missing() {
        Box::pin(backup_under_load_is_restored_to_a_time(Kind::Directory)).await;
    }
}

#[tokio::test]
async fn backup_under_load_is_restored_to_a_time_from_s3() {
    if !postgres_is_missing() {
        Box::pin(backup_under_load_is_restored_to_a_time(Kind::S3)).await;
    }
}

/// PostgreSQL's own regression suite leaves every type, large objects, partitions, unlogged tables
/// and more behind.
#[tokio::test]
async fn the_tables_of_the_regression_suite_come_back() {
    if postgres_is_missing() {
        return;
    }
    let loader = "/usr/local/bin/load-regression";
    if !Path::new(loader).exists() {
        return harness::skip("the regression suite is not here: no load-regression");
    }
    let scene = Scene::new().await;
    let (host, port) = (scene.primary.socket_directory(), scene.primary.port().to_string());
    let tests = [
        "boolean",
        "char",
        "text",
        "int8",
        "float8",
        "numeric",
        "uuid",
        "enum",
        "rangetypes",
        "json",
        "jsonb",
        "arrays",
        "largeobject",
        "create_table",
        "create_index",
        "constraints",
        "triggers",
        "inherit",
        "domain",
        "compression",
        "indexing",
        "xml",
        "tsearch",
        "generated",
        "identity",
    ];
    let output = scene.primary.program(loader).arg(host).arg(&port).args(tests).output().await;
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    scene
        .primary
        .psql_in("regression", "CREATE UNLOGGED TABLE unlogged_t AS SELECT 1 AS one")
        .await;
    scene
        .primary
        .psql_in("regression", "SELECT lo_from_bytea(0, decode(repeat('ab', 100000), 'hex'))")
        .await;

    scene.backup().await;
    // Unlogged tables are empty after a recovery: that is what unlogged means.
    let before = "TRUNCATE unlogged_t";
    scene.primary.psql_in("regression", before).await;
    let dump = scene.primary.dump().await;
    scene.archive_wal().await;
    let to = scene.restore("restored", &[]).await;
    verify_files(&scene.primary, &to).await;
    // The suite makes a tablespace in place, which PostgreSQL recovers only if it is told to.
    let allow = PgServer::builder().setting("allow_in_place_tablespaces", "on");
    let restored = allow.start_existing(&to).await;
    restored.recovered().await;
    assert!(dump.len() > 1_000_000, "the suite has left only {} bytes", dump.len());
    assert!(restored.dump().await == dump, "the dumps of source and copy differ");
    restored.run("pg_amcheck", &["--all", "--install-missing"]).await;
}

#[tokio::test]
async fn every_kind_of_target_is_reached() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    fill(&scene.primary, "t", 10).await;
    scene.backup().await;
    scene.primary.psql("INSERT INTO t VALUES (11)").await;
    scene.primary.psql("SELECT pg_create_restore_point('eleven')").await;
    let lsn = scene.primary.psql("SELECT pg_current_wal_insert_lsn()").await;
    let xid = scene
        .primary
        .psql("BEGIN; INSERT INTO t VALUES (12); SELECT pg_current_xact_id(); COMMIT")
        .await;
    scene.primary.psql("INSERT INTO t VALUES (13)").await;
    scene.archive_wal().await;

    let cases: [(&str, &[&str], &str); 5] = [
        ("immediate", &["--target", "immediate"], "10"),
        ("lsn", &["--target-lsn", &lsn], "11"),
        ("name", &["--target-name", "eleven"], "11"),
        ("xid", &["--target-xid", &xid], "12"),
        ("end", &[], "13"),
    ];
    for (name, arguments, rows) in cases {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--target-action", "promote"]);
        let to = scene.restore(name, &arguments).await;
        let restored = PgServer::start_existing(&to).await;
        restored.recovered().await;
        assert_eq!(count(&restored, "t").await, rows, "target {name}");
    }
}

/// The archive of the copy is on, its history reaches the repository, and a second restore follows
/// the new timeline.
#[tokio::test]
async fn a_restore_follows_the_newest_timeline() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::new().await;
    fill(&scene.primary, "t", 10).await;
    scene.backup().await;
    scene.archive_wal().await;
    let to = scene.path("replacement");
    scene
        .run(&["restore", "--archive-mode", "preserve", "--to", to.to_str().unwrap()])
        .await
        .assert_success();
    scene.primary.stop(Mode::Fast).await;
    let replacement = PgServer::start_existing(&to).await;
    replacement.recovered().await;
    replacement.psql("INSERT INTO t VALUES (11)").await;
    let old = std::mem::replace(&mut scene.primary, replacement);
    scene.archive_wal().await;

    let again = scene.restore("again", &[]).await;
    let restored = PgServer::start_existing(&again).await;
    restored.recovered().await;
    assert_eq!(count(&restored, "t").await, "11");
    let current = scene.restore("current", &["--target-timeline", "current"]).await;
    let restored = PgServer::start_existing(&current).await;
    restored.recovered().await;
    assert_eq!(count(&restored, "t").await, "10");
    drop(old);
}

#[tokio::test]
async fn a_target_that_cannot_be_reached_is_refused_with_the_window() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let nothing = scene
        .run(&["restore", "--archive-mode", "off", "--to", scene.path("none").to_str().unwrap()])
        .await;
    nothing.assert_code(1);
    assert!(nothing.stderr.contains("there is no backup"), "{nothing}");

    scene.backup().await;
    scene.archive_wal().await;
    for arguments in [
        ["--target-time", "2001-01-01 00:00:00+00"],
        ["--target-time", "2101-01-01 00:00:00+00"],
        ["--target-lsn", "0/1"],
        ["--target-lsn", "FF/0"],
        ["--target-timeline", "7"],
    ] {
        let to = scene.path("refused");
        let mut all = vec!["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
        all.extend(arguments);
        let refused = scene.run(&all).await;
        refused.assert_code(1);
        assert!(refused.stderr.contains("What can be reached"), "{arguments:?}: {refused}");
        assert!(!to.exists(), "{arguments:?} made a directory");
    }
}

#[tokio::test]
async fn a_directory_that_is_not_empty_is_refused_and_a_server_is_never_deleted() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.backup().await;
    let to = scene.path("used");
    fs::create_dir(&to).unwrap();
    fs::write(to.join("precious"), "data").unwrap();
    harness::program::give_to_server_user(&to);
    let arguments = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let refused = scene.run(&arguments).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("holds precious"), "{refused}");
    assert!(refused.stderr.contains("--force"), "{refused}");

    fs::write(to.join("postmaster.pid"), "1").unwrap();
    let in_use = scene
        .run(&["restore", "--archive-mode", "off", "--force", "--to", to.to_str().unwrap()])
        .await;
    in_use.assert_code(1);
    assert!(in_use.stderr.contains("a server may be running"), "{in_use}");
    assert_eq!(fs::read_to_string(to.join("precious")).unwrap(), "data");

    // Not a data directory: what is in it is not ours to delete.
    fs::remove_file(to.join("postmaster.pid")).unwrap();
    let forced = ["restore", "--archive-mode", "off", "--force", "--to", to.to_str().unwrap()];
    let not_ours = scene.run(&forced).await;
    not_ours.assert_code(1);
    assert!(not_ours.stderr.contains("is no data directory"), "{not_ours}");
    assert_eq!(fs::read_to_string(to.join("precious")).unwrap(), "data");

    fs::write(to.join("PG_VERSION"), "17").unwrap();
    let forced = scene.run(&forced).await;
    forced.assert_success();
    let said = forced.stderr.lines().find(|line| line.contains("is deleted now"));
    let said = said.unwrap_or_default();
    assert!(said.contains("WARN") && said.contains("\"files\":3"), "{forced}");
    assert!(!to.join("precious").exists());
}

#[tokio::test]
async fn a_restored_directory_has_the_permissions_and_links_of_the_server() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.primary.tablespace("elsewhere").await;
    scene.primary.psql("CREATE TABLE t TABLESPACE elsewhere AS SELECT 1").await;
    scene.backup().await;
    let mapped = scene.path("mapped");
    let location = scene
        .primary
        .psql("SELECT oid || '|' || pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'elsewhere'")
        .await;
    let (oid, location) = location.split_once('|').unwrap();
    let map = format!("{location}={}", mapped.display());
    let to = scene.restore("restored", &["--tablespace", &map]).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&to), 0o700);
    assert_eq!(mode(&mapped), 0o700);
    for file in files(&to) {
        let name = file.strip_prefix(&to).unwrap();
        let source = scene.primary.data_directory().join(name);
        if source.exists() {
            assert_eq!(mode(&file), mode(&source), "{}", name.display());
        }
    }
    assert_eq!(fs::read_link(to.join("pg_tblspc").join(oid)).unwrap(), mapped);
    assert!(to.join("recovery.signal").exists());
    assert!(!to.join("standby.signal").exists());
    assert!(!to.join(".pgmesh-restore").exists());

    let wrong = scene.path("wrong");
    let arguments = [
        "restore",
        "--archive-mode",
        "off",
        "--to",
        wrong.to_str().unwrap(),
        "--tablespace",
        "/no/such=/place",
    ];
    let refused = scene.run(&arguments).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains(location), "{refused}");
}

/// A database whose directory lies elsewhere, behind a link: the server runs with it, and leaves it out.
#[tokio::test]
async fn a_backup_without_a_database_that_the_server_left_out_is_suspect() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::new().await;
    scene.primary.psql("CREATE DATABASE moved").await;
    let oid = scene.primary.psql("SELECT oid FROM pg_database WHERE datname = 'moved'").await;
    scene.primary.stop(Mode::Fast).await;
    let from = scene.primary.data_directory().join("base").join(&oid);
    let to = scene.path("elsewhere");
    fs::rename(&from, &to).unwrap();
    std::os::unix::fs::symlink(&to, &from).unwrap();
    scene.primary.start().await;
    assert_eq!(scene.primary.psql_in("moved", "SELECT 1").await, "1");

    let suspect = scene.run(&["backup"]).await;
    suspect.assert_code(1);
    assert!(suspect.stderr.contains("the server warns about the backup"), "{suspect}");
    let list = scene.list().await;
    let reason = list[0]["suspect"]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("./base/{oid}")), "{reason}");
    scene.run(&["verify"]).await.assert_code(1);
}

/// Damages a page of a table on disk, below the server's feet.
async fn damage_a_page(server: &mut PgServer) {
    fill(server, "t", 5000).await;
    let file = server.psql("SELECT pg_relation_filepath('t')").await;
    server.psql("CHECKPOINT").await;
    server.stop(Mode::Fast).await;
    let path = server.data_directory().join(file);
    let mut content = fs::read(&path).unwrap();
    content[8192 + 5000] ^= 0xFF;
    fs::write(&path, content).unwrap();
    server.start().await;
}

#[tokio::test]
async fn a_backup_with_a_damaged_page_is_kept_marked_and_alarmed() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::new().await;
    damage_a_page(&mut scene.primary).await;
    let suspect = scene.run(&["backup"]).await;
    suspect.assert_code(1);
    assert!(suspect.stderr.contains("SUSPECT"), "{suspect}");
    assert!(suspect.stderr.contains("checksum verification failed"), "{suspect}");

    let list = scene.list().await;
    assert_eq!(list.len(), 1);
    assert!(list[0]["suspect"]["reason"].is_string(), "{}", list[0]);
    let shown = scene.run(&["list"]).await;
    assert!(shown.stdout.contains("SUSPECT"), "{shown}");
    let verified = scene.run(&["verify"]).await;
    verified.assert_code(1);
    assert!(verified.stdout.contains("is suspect"), "{verified}");

    // Only by name: nobody gets it by accident.
    let to = scene.path("refused");
    scene
        .run(&["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()])
        .await
        .assert_code(1);
    let id = list[0]["backup_id"].as_str().unwrap();
    scene.restore("by-name", &["--backup", id]).await;
}

#[tokio::test]
async fn a_cluster_with_small_segments_is_backed_up_and_restored() {
    if postgres_is_missing() {
        return;
    }
    let directory = harness::directory();
    let repository = crate::scene::directory_repository(directory.path());
    let config = directory.path().join("agent.toml");
    let key = directory.path().join("key");
    let agent = harness::Agent::new(&config);
    harness::Agent::without_config()
        .run(&["new-key", key.to_str().unwrap()])
        .await
        .assert_success();
    let text =
        |nodes: &[(String, String, u16)]| crate::scene::config_text(&key, &repository, "", nodes);
    crate::scene::write(&config, &text(&[]));
    let primary = PgServer::builder()
        .wal_segment_mib(1)
        .setting("archive_mode", "on")
        .setting("archive_command", &format!("{} wal-push %p", agent.shell_command()))
        .primary()
        .await;
    let host = primary.socket_directory().display().to_string();
    crate::scene::write(&config, &text(&[("p".to_owned(), host, primary.port())]));
    fill(&primary, "t", 100_000).await;
    agent.run(&["backup"]).await.assert_success();
    let to = directory.path().join("restored");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    agent.run(&restore).await.assert_success();
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    assert_eq!(count(&restored, "t").await, "100000");
}

/// It said that there was no backup, and ended as if there were.
#[tokio::test]
async fn a_backup_that_was_not_taken_because_of_a_drain_is_no_success() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let etcd = EtcdCluster::start(1).await;
    let scene = Scene::with(Kind::Directory, &section(&etcd)).await;
    let drain = ["put", "/pgmesh/tests/rebalance/request/drain/0", "{}"];
    etcd.etcdctl(&drain).await.assert_success();
    let refused = scene.run(&["backup", "--json"]).await;
    refused.assert_code(1);
    let told: serde_json::Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!(told[0]["group"], 0, "{refused}");
    for says in ["being drained", "undrain", "--group 0"] {
        assert!(told[0]["error"].as_str().unwrap().contains(says), "{refused}");
        assert!(refused.stderr.contains(says), "{refused}");
    }
    scene.run(&["backup", "--group", "0"]).await.assert_success();
}

/// A tablespace's own place may be a living server's. Nobody gets there by accident, with or
/// without `--force`.
#[tokio::test]
async fn the_tablespaces_of_a_server_that_lives_are_never_touched() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let location = scene.primary.tablespace("living").await;
    scene.primary.psql("CREATE TABLE t TABLESPACE living AS SELECT generate_series(1, 1000)").await;
    scene.backup().await;
    let to = scene.path("copy");
    let to = to.to_str().unwrap();
    for force in [&[][..], &["--force"][..]] {
        let arguments = ["restore", "--archive-mode", "off", "--to", to];
        let refused = scene.run(&[&arguments[..], force].concat()).await;
        refused.assert_code(1);
        assert!(refused.stderr.contains("--tablespace"), "{refused}");
        assert!(!refused.stderr.contains("or use --force"), "{refused}");
    }
    scene.primary.psql("CHECKPOINT").await;
    assert_eq!(count(&scene.primary, "t").await, "1000");

    let inside = format!("{}={to}/inside", location.display());
    let overlap =
        scene.run(&["restore", "--archive-mode", "off", "--to", to, "--tablespace", &inside]).await;
    overlap.assert_code(1);
    assert!(overlap.stderr.contains("overlap"), "{overlap}");
}

/// Settings in any encoding and spelling, as `ALTER SYSTEM` and people leave them.
#[tokio::test]
async fn settings_of_the_server_do_not_keep_a_copy_from_starting() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let auto_conf = scene.primary.data_directory().join("postgresql.auto.conf");
    let mut text = fs::read(&auto_conf).unwrap();
    text.extend_from_slice(b"log_line_prefix = '\xe9 %m '\n  Recovery_Target_Xid = '12345'\n");
    fs::write(&auto_conf, text).unwrap();
    fill(&scene.primary, "t", 10).await;
    scene.backup().await;
    let to = scene.restore("copy", &["--target", "immediate", "--target-action", "promote"]).await;
    let text = fs::read(to.join("postgresql.auto.conf")).unwrap();
    assert!(text.windows(4).any(|bytes| bytes == b"\xe9 %m"), "the setting is gone");
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    assert_eq!(count(&restored, "t").await, "10");
}

#[tokio::test]
async fn a_standby_that_cannot_be_read_is_passed_over() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let standby = scene.primary.standby("standby1").await;
    standby.catch_up(&scene.primary).await;
    let hba = standby.data_directory().join("pg_hba.conf");
    let text = fs::read_to_string(&hba).unwrap();
    let text: Vec<_> = text.lines().filter(|line| !line.contains("replication")).collect();
    fs::write(&hba, text.join("\n") + "\n").unwrap();
    standby.psql("SELECT pg_reload_conf()").await;
    scene.configure(&[&scene.primary, &standby]);
    let backup = scene.backup().await;
    assert_eq!(backup["from_standby"], false, "{backup}");
}
