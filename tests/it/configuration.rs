//! Configurations that are wrong are refused with every problem and its key, and those that are
//! shipped load.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use backup_agent::Config;
use harness::{Agent, directory};
use shared::config;

use crate::scene::{config_text, write};

#[test]
fn the_shipped_configuration_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/backup-agent.toml");
    let loaded: Config = config::load(&path).unwrap();
    assert!(!loaded.nodes.is_empty());
}

#[tokio::test]
async fn every_problem_is_reported_with_its_key() {
    let directory = directory();
    let key = directory.path().join("key");
    let path = directory.path().join("agent.toml");
    let section = "[repository.directory]\npath = \"relative\"\n";
    let text = config_text(
        &key,
        section,
        "[backup]\npart_bytes = 1048576\ncompression_level = 40\nrate_bytes_max = 1\n\
         uploads = 100000\nworkers = 1000\n",
        &[("a".to_owned(), "h".to_owned(), 1), ("a".to_owned(), "h".to_owned(), 1)],
    );
    write(&path, &text.replace("cluster = \"tests\"", "cluster = \"a/b\""));
    let refused = Agent::new(&path).run(&["check-config"]).await;
    refused.assert_code(1);
    for problem in [
        "cluster: must be letters",
        "nodes[1].name: `a` is used twice",
        "repository.directory.path: must be an absolute path",
        "backup.compression_level: must be 1 to 19",
        "backup.part_bytes: 1048576 is below the S3 minimum of 5242880",
        "backup.rate_bytes_max: must be",
        "backup.uploads: must be 1 to 150",
        "backup.workers: must be 1 to 512",
    ] {
        assert!(refused.stderr.contains(problem), "no {problem:?} in {refused}");
    }
}

/// Each was said to be fine, and could not work.
#[tokio::test]
async fn what_cannot_work_is_not_fine() {
    let directory = directory();
    let (key, path) = (directory.path().join("key"), directory.path().join("agent.toml"));
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let there = format!("[repository.directory]\npath = \"{}\"\n", directory.path().display());
    let file = there.replace("\"\n", "/key\"\n");
    let absent = there.replace("\"\n", "/absent\"\n");
    let key_here = key.display().to_string();
    let long = format!("cluster = \"{}\"", "x".repeat(256));
    for (section, extra, from, to, code, says) in [
        (&there, "", "", "", 0, "is fine"),
        (&there, "", key_here.as_str(), "key", 1, "keys[0].file: must be an absolute path"),
        (&there, "", "cluster = \"tests\"", long.as_str(), 1, "cluster: 256 bytes"),
        (&there, "[backup]\nschedule = \"0 2 * * * * 1990\"\n", "", "", 1, "has no time to come"),
        (&there, "[backup]\npart_bytes = 6000000000\n", "", "", 1, "above the S3 maximum"),
        (&there, "[backup]\nprefer = 1\n", "", "", 1, "expected `standby` or `primary`"),
        (&file, "", "", "", 1, "is no directory"),
        (&absent, "", "", "", 0, "WARNING: the repository's directory"),
    ] {
        write(&path, &config_text(&key, section, extra, &[]).replace(from, to));
        let checked = Agent::new(&path).run(&["check-config"]).await;
        checked.assert_code(code);
        assert!(
            checked.stdout.contains(says) || checked.stderr.contains(says),
            "{says}: {checked}"
        );
    }
}

/// Programs got nothing at all.
#[tokio::test]
async fn what_fails_is_told_to_programs_too() {
    let directory = directory();
    let (key, path) = (directory.path().join("key"), directory.path().join("agent.toml"));
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let section = format!("[repository.directory]\npath = \"{}\"\n", directory.path().display());
    write(&path, &config_text(&key, &section, "", &[]));
    let to = directory.path().join("to");
    let to = to.to_str().unwrap();
    let (here, nowhere) = (path.as_path(), Path::new("/no/such/file"));
    for (config, line, code, says) in [
        (nowhere, &["list"][..], 1, "/no/such/file"),
        (here, &["list", "--group", "7"], 1, "there is nothing"),
        (here, &["list", "--wal", "--group", "7"], 1, "there is nothing"),
        (here, &["expire", "--group", "7"], 1, "there is nothing"),
        (here, &["verify"], 1, "nothing was verified"),
        (here, &["restore", "--archive-mode", "off", "--to", to], 1, "there is no backup"),
        (here, &["backup"], 2, "no server to ask"),
        (here, &["begin"], 2, "no server to ask"),
    ] {
        let failed = Agent::new(config).run(&[line, &["--json"]].concat()).await;
        failed.assert_code(code);
        let told: serde_json::Value = serde_json::from_str(&failed.stdout).unwrap();
        assert!(told["error"].as_str().unwrap().contains(says), "{failed}");
        // One document for each command.
        assert!(!Agent::new(config).run(line).await.stdout.contains("error"));
    }
    let listed = Agent::new(&path).run(&["list", "--json"]).await;
    assert_eq!(listed.stdout.trim(), "[]");
}

#[tokio::test]
async fn files_that_the_configuration_names_are_tried() {
    let directory = directory();
    let key = directory.path().join("key");
    let path = directory.path().join("agent.toml");
    let section = "[repository.directory]\npath = \"/tmp\"\n";
    write(&path, &config_text(&key, section, "", &[]));
    let agent = Agent::new(&path);
    let missing = agent.run(&["check-config"]).await;
    missing.assert_code(1);
    assert!(missing.stderr.contains("read encryption key k1"), "{missing}");

    write(&key, "a password");
    let malformed = agent.run(&["check-config"]).await;
    malformed.assert_code(1);
    assert!(malformed.stderr.contains("new-key"), "{malformed}");

    fs::remove_file(&key).unwrap();
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let fine = agent.run(&["check-config"]).await;
    fine.assert_success();
    assert!(!fine.stdout.contains("WARNING"), "{fine}");
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(&key, open).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let exposed = agent.run(&["check-config"]).await;
    exposed.assert_success();
    let told = format!("chmod o= {}", key.display());
    assert!(exposed.stdout.contains("WARNING") && exposed.stdout.contains(&told), "{exposed}");
    let again = Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await;
    again.assert_code(1);

    let nowhere = Agent::new(Path::new("/no/such/file")).run(&["list"]).await;
    nowhere.assert_code(1);
    assert!(nowhere.stderr.contains("/no/such/file"), "{nowhere}");
    let wrong_use = agent.run(&["restore", "--archive-mode", "off"]).await;
    wrong_use.assert_code(2);
}
