//! Damage to every kind of object, in every way: each command that reads it refuses and names it,
//! and nothing wrong reaches PostgreSQL.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use backup_agent::container::{HEADER_BYTES, Identity, Kind, Unopened, seal_whole};
use backup_agent::keys::EncryptionConfig;
use backup_agent::keys::{KeyConfig, KeyRing};
use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Agent, Finished};

use crate::scene::{Scene, config_text, files, write};

/// What is done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    FlipInHeader,
    FlipInChunk,
    FlipInIndex,
    FlipInTrailer,
    TruncateByOne,
    TruncateToHalf,
    Extend,
    DropChunk,
    SwapChunks,
    RepeatChunk,
    SwapObjects,
    Rename,
    ReplayOlder,
    Empty,
    WrongKey,
    MissingKey,
}

const ALL: [Damage; 16] = [
    Damage::FlipInHeader,
    Damage::FlipInChunk,
    Damage::FlipInIndex,
    Damage::FlipInTrailer,
    Damage::TruncateByOne,
    Damage::TruncateToHalf,
    Damage::Extend,
    Damage::DropChunk,
    Damage::SwapChunks,
    Damage::RepeatChunk,
    Damage::SwapObjects,
    Damage::Rename,
    Damage::ReplayOlder,
    Damage::Empty,
    Damage::WrongKey,
    Damage::MissingKey,
];

/// One object to damage, and another of its kind.
#[derive(Debug)]
struct Victim {
    kind: Kind,
    /// Its file below the repository.
    file: PathBuf,
    other: PathBuf,
    /// The commands that read it: arguments, and the exit code that says no.
    readers: Vec<(Vec<String>, i32)>,
}

/// A repository with two backups, copied for each damage.
struct Gallery {
    scene: Scene,
    system_identifier: u64,
    base: PathBuf,
    /// A data directory of the right cluster, to fetch WAL in.
    data: PathBuf,
}

impl Gallery {
    async fn new() -> Self {
        let scene =
            Scene::with(crate::scene::Kind::Directory, "[backup]\nobject_bytes = 16777216\n").await;
        scene
            .primary
            .psql("CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 200000) i")
            .await;
        scene.backup().await;
        scene
            .primary
            .psql("INSERT INTO t SELECT i, md5(i::text) FROM generate_series(1, 1000) i")
            .await;
        scene.backup().await;
        let system_identifier = scene
            .primary
            .psql("SELECT system_identifier FROM pg_control_system()")
            .await
            .parse()
            .unwrap();
        let data = scene.path("fetching");
        fs::create_dir_all(data.join("global")).unwrap();
        fs::copy(
            scene.primary.data_directory().join("global/pg_control"),
            data.join("global/pg_control"),
        )
        .unwrap();
        for path in [data.clone(), data.join("global"), data.join("global/pg_control")] {
            give_to_server_user(&path);
        }
        let base = PathBuf::from(format!("v1/tests/0/{system_identifier}"));
        Self { scene, system_identifier, base, data }
    }

    /// The names of the objects whose path contains `part`.
    fn names(&self, part: &str) -> Vec<String> {
        let root = self.scene.repository().join(&self.base);
        files(&root)
            .iter()
            .map(|path| path.strip_prefix(&root).unwrap().display().to_string())
            .filter(|name| name.contains(part))
            .collect()
    }

    fn keys(&self) -> KeyRing {
        KeyRing::read(&EncryptionConfig {
            write_key: "k1".to_owned(),
            keys: vec![KeyConfig { id: "k1".to_owned(), file: self.scene.key() }],
        })
        .unwrap()
    }

    fn identity(&self, kind: Kind, file: &Path) -> Identity {
        let name = file.display().to_string();
        Identity { system_identifier: self.system_identifier, kind, name }
    }

    /// Where the chunks of an object lie.
    fn chunks(&self, victim: &Victim, object: &[u8]) -> Vec<std::ops::Range<usize>> {
        let identity = self.identity(victim.kind, &victim.file);
        let opener = Unopened::new(&self.keys(), &identity, object)
            .unwrap()
            .open_index(&object[HEADER_BYTES..], object.len() as u64)
            .unwrap();
        let range = |number| {
            let range = opener.range(number, number + 1);
            usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
        };
        (0..opener.chunks()).map(range).collect()
    }

    /// The damaged object; `None` where the damage is not possible.
    fn damaged(&self, victim: &Victim, damage: Damage) -> Option<Vec<u8>> {
        let root = self.scene.repository().join(&self.base);
        let mut object = fs::read(root.join(&victim.file)).unwrap();
        let other = fs::read(root.join(&victim.other)).unwrap();
        let len = object.len();
        let chunks = self.chunks(victim, &object);
        match damage {
            Damage::FlipInHeader => object[20] ^= 1,
            Damage::FlipInChunk => {
                let chunk = chunks.last()?;
                object[chunk.start + chunk.len() / 2] ^= 0x10;
            }
            Damage::FlipInIndex => object[chunks.last()?.end + 3] ^= 1,
            Damage::FlipInTrailer => object[len - 12] ^= 1,
            Damage::TruncateByOne => object.truncate(len - 1),
            Damage::TruncateToHalf => object.truncate(len / 2),
            Damage::Extend => object.extend_from_slice(b"more"),
            Damage::DropChunk => drop(object.drain(chunks[0].clone())),
            Damage::SwapChunks => {
                let [first, second] = chunks.first_chunk::<2>()?;
                let swapped = [&object[second.clone()], &object[first.clone()]].concat();
                object[first.start..second.end].copy_from_slice(&swapped);
            }
            Damage::RepeatChunk => {
                let first = object[chunks[0].clone()].to_vec();
                let second = chunks.get(1)?.clone();
                object.splice(second, first);
            }
            Damage::SwapObjects | Damage::Rename => object = other,
            // A whole, authentic object of this very name, from an earlier attempt. A commit is
            // written once under its name, so there is no older one to replay.
            Damage::ReplayOlder if victim.kind == Kind::Commit => return None,
            Damage::ReplayOlder => {
                let identity = self.identity(victim.kind, &victim.file);
                let older = b"older content".repeat(1000);
                object =
                    seal_whole(&self.keys(), &identity, 1 << 20, 1, &older).unwrap().0.to_vec();
            }
            Damage::Empty => object.clear(),
            Damage::WrongKey | Damage::MissingKey => {}
        }
        Some(object)
    }

    /// Tries every damage that is possible to the object.
    async fn try_all(&self, victim: &Victim) {
        let mut tried = 0;
        for (number, damage) in ALL.into_iter().enumerate() {
            tried += usize::from(self.try_damage(victim, damage, number).await);
        }
        // Two damages need two chunks, and a commit object has no older one of its name.
        assert!(tried >= ALL.len() - 3, "only {tried} cases were possible");
    }

    /// Copies the repository, damages the object there, and runs the readers.
    async fn try_damage(&self, victim: &Victim, damage: Damage, number: usize) -> bool {
        let Some(object) = self.damaged(victim, damage) else { return false };
        let name = victim.file.display().to_string();
        let case = format!("{damage:?} of {name}");
        let directory = self.scene.path(&format!("case-{number}"));
        fs::create_dir(&directory).unwrap();
        give_to_server_user(&directory);
        let repository = directory.join("repository");
        // Hard links: only the damaged object is new.
        let mut copy = Command::new("cp");
        copy.arg("-al").arg(self.scene.repository()).arg(&repository);
        assert!(copy.status().unwrap().success(), "{case}");
        let path = repository.join(&self.base).join(&victim.file);
        if damage == Damage::SwapObjects {
            let other = repository.join(&self.base).join(&victim.other);
            let content = fs::read(&path).unwrap();
            fs::remove_file(&other).unwrap();
            write_bytes(&other, &content);
        }
        fs::remove_file(&path).unwrap();
        write_bytes(&path, &object);

        let key = directory.join("key");
        let config = directory.join("agent.toml");
        match damage {
            Damage::WrongKey | Damage::MissingKey => {
                Agent::without_config()
                    .run(&["new-key", key.to_str().unwrap()])
                    .await
                    .assert_success();
            }
            _ => drop(fs::copy(self.scene.key(), &key).unwrap()),
        }
        give_to_server_user(&key);
        let section = format!("[repository.directory]\npath = \"{}\"\n", repository.display());
        let mut text = config_text(&key, &section, "[backup]\nobject_bytes = 16777216\n", &[]);
        if damage == Damage::MissingKey {
            text = text.replace("\"k1\"", "\"k2\"");
        }
        write(&config, &text);

        for (arguments, code) in &victim.readers {
            let to = directory.join("restored");
            let arguments: Vec<String> = arguments
                .iter()
                .map(|argument| argument.replace("{to}", to.to_str().unwrap()))
                .collect();
            let finished = self.run_in_data(&config, &arguments).await;
            finished.assert_code(*code);
            let said = format!("{}{}", finished.stdout, finished.stderr);
            // With a wrong key the first object that is read is named, which may be another.
            let named = match damage {
                Damage::WrongKey => said.contains("wrong key under this id"),
                Damage::MissingKey => {
                    said.contains("encrypted with key k1, which is not configured")
                }
                // Of two that changed places, either may be read first.
                Damage::SwapObjects => {
                    said.contains(&name) || said.contains(&victim.other.display().to_string())
                }
                _ => said.contains(&name),
            };
            assert!(named, "{case}: {arguments:?} does not name it: {finished}");
            assert!(!to.join("global/pg_control").exists(), "{case}: the copy could start");
            assert!(!directory.join("fetched").exists(), "{case}: WAL was handed over");
            fs::remove_dir_all(&to).ok();
        }
        fs::remove_dir_all(&directory).unwrap();
        true
    }

    /// Runs the agent in a data directory, as PostgreSQL runs `wal-fetch`.
    async fn run_in_data(&self, config: &Path, arguments: &[String]) -> Finished {
        let binary = harness::agent::agent_binary();
        let mut command = harness::program::command("/usr/bin/env");
        command.arg("-C").arg(&self.data).arg(binary).arg("--config").arg(config);
        command.args(["--log-format", "json"]).args(arguments);
        harness::program::finish(&mut command, std::time::Duration::from_mins(1)).await
    }
}

fn write_bytes(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
    give_to_server_user(path);
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Does every damage to one kind of object of the newest backup, and runs `readers` on each.
async fn every_damage_is_refused(kind: Kind, object: &str, readers: Vec<(Vec<String>, i32)>) {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let parts = gallery.names("/part-00001");
    assert_eq!(parts.len(), 2, "the test needs backups of several parts: {parts:?}");
    let mut names = gallery.names(&format!("/{object}"));
    let (file, other) = (names.pop().unwrap().into(), names.pop().unwrap().into());
    gallery.try_all(&Victim { kind, file, other, readers }).await;
}

fn restore() -> (Vec<String>, i32) {
    (words("restore --archive-mode off --to {to} --target immediate"), 1)
}

fn verify() -> (Vec<String>, i32) {
    (words("verify"), 1)
}

#[tokio::test]
async fn every_damage_to_a_part_is_refused() {
    every_damage_is_refused(Kind::Part, "part-00000", vec![restore(), verify()]).await;
}

#[tokio::test]
async fn every_damage_to_a_manifest_is_refused() {
    every_damage_is_refused(Kind::Manifest, "manifest", vec![restore(), verify()]).await;
}

#[tokio::test]
async fn every_damage_to_a_table_of_files_is_refused() {
    every_damage_is_refused(Kind::Files, "files", vec![restore(), verify()]).await;
}

#[tokio::test]
async fn every_damage_to_a_commit_object_is_refused() {
    let readers = vec![restore(), verify(), (words("list"), 1), (words("expire"), 1)];
    every_damage_is_refused(Kind::Commit, "commit", readers).await;
}

#[tokio::test]
async fn every_damage_to_a_wal_segment_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let newest = gallery.scene.list().await.pop().unwrap();
    let segment = segment_of(newest["end_lsn"].as_str().unwrap());
    let wal = gallery.names("wal/");
    let file = wal.iter().find(|name| name.contains(&segment)).expect("the last segment is stored");
    let other = wal.iter().find(|name| !name.contains(&segment)).unwrap();
    let fetch = words(&format!("wal-fetch {segment} ../fetched"));
    let readers = vec![(fetch, 254), verify()];
    gallery
        .try_all(&Victim { kind: Kind::Wal, file: file.into(), other: other.into(), readers })
        .await;
}

/// The segment of 16 MiB that holds the byte before an LSN, on timeline 1.
fn segment_of(lsn: &str) -> String {
    let lsn: tokio_postgres::types::PgLsn = lsn.parse().unwrap();
    shared::pg::wal::segment_name(1, (u64::from(lsn) - 1).into(), 16 << 20)
}

#[tokio::test]
async fn a_history_file_that_is_damaged_stops_the_recovery() {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let history = gallery.scene.primary.data_directory().join("pg_wal/00000002.history");
    write(&history, "1\t0/5000000\tno recovery target specified\n");
    let push = ["wal-push", history.to_str().unwrap()].map(str::to_owned);
    gallery.run_in_data(&gallery.scene.config(), &push).await.assert_success();
    let fetch = ["wal-fetch", "00000002.history", "../fetched"].map(str::to_owned);
    gallery.run_in_data(&gallery.scene.config(), &fetch).await.assert_success();
    fs::remove_file(gallery.scene.path("fetched")).unwrap();

    let name = gallery.names("history/00000002").pop().unwrap();
    let path = gallery.scene.repository().join(&gallery.base).join(&name);
    let mut object = fs::read(&path).unwrap();
    let middle = object.len() / 2;
    object[middle] ^= 1;
    fs::write(&path, object).unwrap();
    let finished = gallery.run_in_data(&gallery.scene.config(), &fetch).await;
    finished.assert_code(254);
    assert!(finished.stderr.contains(&name), "{finished}");
    assert!(!gallery.scene.path("fetched").exists());
    let list = gallery.scene.run(&["list"]).await;
    list.assert_code(1);
    assert!(list.stderr.contains(&name), "{list}");
}

/// A tombstone deletes a backup. One that nobody with the key wrote does not.
#[tokio::test]
async fn a_forged_tombstone_deletes_nothing() {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let id = gallery.scene.list().await[0]["backup_id"].as_str().unwrap().to_owned();
    let root = gallery.scene.repository().join(&gallery.base);
    fs::create_dir_all(root.join("tombstone")).unwrap();
    write(&root.join("tombstone").join(&id), "gone");
    let list = gallery.scene.run(&["list"]).await;
    list.assert_code(1);
    assert!(list.stdout.contains(&format!("tombstone/{id}")), "{list}");
    let expire = gallery.scene.run(&["expire", "--apply"]).await;
    expire.assert_code(1);
    assert!(root.join("base").join(&id).join("commit").exists());
}

fn flip(path: &Path, at: usize) {
    let mut object = fs::read(path).unwrap();
    object[at] ^= 0x10;
    fs::write(path, object).unwrap();
}

fn is_denied(path: &Path, denied: bool) {
    fs::set_permissions(path, Permissions::from_mode(if denied { 0 } else { 0o755 })).unwrap();
}

/// After the first damaged chunk nothing was read any more, and the tar stream behind it did not make
/// sense, which was told as if it were damage too.
#[tokio::test]
async fn verify_names_every_damaged_chunk_and_nothing_that_only_follows_from_it() {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let root = gallery.scene.repository().join(&gallery.base);
    let newest = |name: &str| gallery.names(name).pop().unwrap();
    let [first, second] = ["part-00000", "part-00001"].map(newest);
    let (files, manifest) = (newest("/files"), newest("/manifest"));
    let chunks = |name: &str| {
        let victim =
            Victim { kind: Kind::Part, file: name.into(), other: name.into(), readers: Vec::new() };
        gallery.chunks(&victim, &fs::read(root.join(name)).unwrap())
    };
    let problems = async || {
        let verified = gallery.scene.run(&["verify", "--json"]).await;
        verified.assert_code(1);
        let backups: Vec<serde_json::Value> = serde_json::from_str(&verified.stdout).unwrap();
        let ids = backups.iter().map(|it| it["problems"].as_array().unwrap().clone());
        let problems: Vec<_> = ids.collect();
        assert!(problems[0].is_empty(), "{verified}");
        let texts = problems[1].iter().map(|problem| problem.as_str().unwrap().to_owned());
        texts.collect::<Vec<_>>()
    };
    let (of_first, of_second) = (chunks(&first), chunks(&second));
    let (count, second_count) = (of_first.len(), of_second.len());
    for number in [0, 1, 2, 5] {
        flip(&root.join(&first), of_first[number].start + 9);
    }
    let in_first = format!("{first} is damaged in chunks 0 to 2, 5 of {count}");
    assert_eq!(problems().await, [in_first.as_str()]);
    flip(&root.join(&second), of_second[1].start + 9);
    let in_second = format!("{second} is damaged in chunk 1 of {second_count}");
    assert_eq!(problems().await, [in_first.as_str(), &in_second]);

    // The parts are read without the table of files too.
    flip(&root.join(&files), HEADER_BYTES + 9);
    flip(&root.join(&manifest), HEADER_BYTES + 9);
    let found = problems().await;
    let expected = [files, manifest].map(|name| format!("{name} is damaged in chunk 0 of 1"));
    assert_eq!(found, [&expected[0], &expected[1], &in_first, &in_second].map(String::as_str));
    fs::remove_file(root.join(&first)).unwrap();
    let found = problems().await;
    assert!(found[2].contains(&first) && found[2].contains("no such object"), "{found:?}");
    assert_eq!(found[3..], [in_second]);
}

/// One folder that nobody may read failed every command for every backup, and was not named.
#[tokio::test]
async fn a_backup_that_cannot_be_read_is_named_and_hides_no_other() {
    if postgres_is_missing() {
        return;
    }
    let gallery = Gallery::new().await;
    let scene = &gallery.scene;
    let ids: Vec<String> = scene.list().await.iter().map(id_of).collect();
    let root = scene.repository().join(&gallery.base);
    let newest = root.join("base").join(&ids[1]);
    is_denied(&newest, true);
    if fs::read_dir(&newest).is_ok() {
        is_denied(&newest, false);
        return harness::skip("nothing is denied to root");
    }
    for (command, says) in [("list", "UNREADABLE"), ("verify", "1 PROBLEM")] {
        let said = scene.run(&[command]).await;
        said.assert_code(1);
        let row = |id: &str| said.stdout.lines().find(|line| line.starts_with(id)).unwrap();
        assert!(row(&ids[1]).contains(says), "{said}");
        assert!(!row(&ids[0]).contains(says), "{said}");
        assert!(said.stdout.contains("Permission denied"), "{said}");
    }
    let expire = scene.run(&["expire", "--apply"]).await;
    expire.assert_code(1);
    assert!(expire.stderr.contains(&ids[1]), "{expire}");

    // The end of the WAL is the same from any backup; where a backup ends is not.
    let to = scene.path("end");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let restored = scene.run(&restore).await;
    restored.assert_success();
    assert!(restored.stdout.contains(&ids[0]), "{restored}");
    let warns = restored.stderr.lines().find(|line| line.contains("passed over")).unwrap();
    assert!(warns.contains(&ids[1]) && warns.contains("WARN"), "{warns}");
    let to = scene.path("immediate");
    let restore = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let refused = scene.run(&[&restore[..], &["--target", "immediate"]].concat()).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains(&ids[1]), "{refused}");
    assert!(!to.exists());
    let by_name = [&restore[..], &["--target", "immediate", "--backup", &ids[0]]].concat();
    scene.run(&by_name).await.assert_success();

    // The next backup names it as the one before, so that it is missed when it is gone.
    scene.backup().await;
    is_denied(&newest, false);
    fs::remove_dir_all(&newest).unwrap();
    let verified = scene.run(&["verify"]).await;
    verified.assert_code(1);
    let row = verified.stdout.lines().find(|line| line.starts_with(&ids[1]));
    assert!(row.is_some_and(|row| row.contains("1 PROBLEM")), "{verified}");
    assert!(verified.stdout.contains("it is gone"), "{verified}");
}

fn id_of(backup: &serde_json::Value) -> String {
    backup["backup_id"].as_str().unwrap().to_owned()
}

/// Somebody removed a backup by hand whose tombstone was there: nothing went any more.
#[tokio::test]
async fn a_tombstone_of_nothing_does_not_keep_the_retention_from_its_work() {
    if postgres_is_missing() {
        return;
    }
    let rules = "[retention]\ndaily = 1\nweekly = 0\nmonthly = 0\nwal = \"0s\"\n";
    let scene = Scene::with(crate::scene::Kind::Directory, rules).await;
    for _ in 0..2 {
        scene.backup().await;
    }
    scene.run(&["expire", "--apply"]).await.assert_success();
    let all = files(&scene.repository());
    let tombstone = all.iter().find(|path| path.display().to_string().contains("/tombstone/"));
    let tombstone = tombstone.expect("one is marked");
    let place = tombstone.parent().unwrap().parent().unwrap();
    fs::remove_dir_all(place.join("base").join(tombstone.file_name().unwrap())).unwrap();
    for arguments in [&["expire"][..], &["expire", "--apply"], &["verify"], &["list"]] {
        scene.run(arguments).await.assert_success();
    }
}
