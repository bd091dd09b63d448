//! WAL that is fetched ahead of a recovery: it is the right WAL, whatever happens to the process
//! that fetches it, and nothing is left of it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Effect, Fault, Finished, Operation, PgServer, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{interval, sleep};

use crate::scene::{Kind, Scene, files, write};

const LIMIT: Duration = Duration::from_mins(1);
/// The process in `postmaster.pid` of data directories without a server: it need not exist.
const NOBODY: &str = "4194999";

/// Inserts into `t` and ends a segment, `count` times, and waits until all are stored.
async fn make_segments(scene: &Scene, count: usize) {
    let record = "INSERT INTO t SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 2000) i";
    for _ in 0..count {
        scene.primary.psql(record).await;
        scene.switch_wal().await;
    }
    scene.archive_wal().await;
}

/// A primary with a backup, and `count` segments after it, which the primary keeps.
async fn scene_with_segments(kind: Kind, count: usize) -> Scene {
    let scene = Scene::with(kind, "").await;
    scene.primary.set("wal_keep_size", "4GB").await;
    scene.primary.psql("CREATE TABLE t (i int, filler text)").await;
    scene.backup().await;
    make_segments(&scene, count).await;
    scene
}

/// The processes that fetch ahead in a data directory.
fn prefetchers(data: &Path) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let fetches = |path: &Path| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let is_prefetcher = line.split(|byte| *byte == 0).any(|word| word == b"wal-prefetch");
        is_prefetcher && fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == data)
    };
    let number = |path: PathBuf| path.file_name()?.to_str()?.parse().ok().and_then(Pid::from_raw);
    processes
        .map(|process| process.path())
        .filter(|path| fetches(path))
        .filter_map(number)
        .collect()
}

/// Directories of segments that were fetched ahead.
fn fetched_ahead(pg_wal: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pg_wal).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.display().to_string().contains("pgmesh-prefetch-")).collect()
}

async fn nothing_is_left(data: &Path) {
    eventually("no process and no directory is left", LIMIT, async || {
        prefetchers(data).is_empty() && fetched_ahead(&data.join("pg_wal")).is_empty()
    })
    .await;
}

/// A data directory as a recovery has it, and the segments to fetch, in order.
struct Consumer<'a> {
    scene: &'a Scene,
    data: PathBuf,
    names: Vec<String>,
}

impl<'a> Consumer<'a> {
    fn new(scene: &'a Scene, name: &str, pg_wal: Option<&Path>) -> Self {
        let data = scene.path(name);
        for directory in [data.clone(), data.join("global")] {
            fs::create_dir(&directory).unwrap();
            give_to_server_user(&directory);
        }
        match pg_wal {
            Some(elsewhere) => std::os::unix::fs::symlink(elsewhere, data.join("pg_wal")).unwrap(),
            None => fs::create_dir(data.join("pg_wal")).unwrap(),
        }
        give_to_server_user(&data.join("pg_wal"));
        let control = "global/pg_control";
        fs::copy(scene.primary.data_directory().join(control), data.join(control)).unwrap();
        give_to_server_user(&data.join(control));
        write(&data.join("recovery.signal"), "");
        write(&data.join("postmaster.pid"), &format!("{NOBODY}\n/data\n1790000000\n"));
        let stored = files(&scene.repository());
        let file_name = |path: &PathBuf| Some(path.file_name()?.to_str()?.get(..24)?.to_owned());
        let is_segment = |path: &&PathBuf| path.display().to_string().contains("/wal/");
        let names = stored.iter().filter(is_segment).filter_map(file_name).collect();
        Self { scene, data, names }
    }

    /// Fetches a segment as PostgreSQL does.
    async fn fetch(&self, name: &str) -> Finished {
        // To a file: the process that is started inherits it, and nobody waits for its end.
        let script = format!(
            "exec {} wal-fetch {name} pg_wal/RECOVERYXLOG 2>>log",
            self.scene.agent().shell_command()
        );
        let mut command = harness::program::command("/usr/bin/env");
        command.arg("-C").arg(&self.data).args(["sh", "-c", &script]);
        harness::program::finish(&mut command, LIMIT).await
    }

    /// Fetches segments one after the other; each is what the primary wrote.
    async fn fetch_all(&self, names: &[String]) {
        let source = self.scene.primary.data_directory().join("pg_wal");
        let fetched = self.data.join("pg_wal/RECOVERYXLOG");
        for name in names {
            let fetched_now = self.fetch(name).await;
            assert!(fetched_now.is_success(), "{name}: {fetched_now}\n{}", self.log());
            let right = fs::read(source.join(name)).unwrap();
            assert!(fs::read(&fetched).unwrap() == right, "{name}\n{}", self.log());
            fs::remove_file(&fetched).unwrap();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.data.join("log")).unwrap_or_default()
    }

    fn ready(&self) -> Vec<String> {
        let directories = fetched_ahead(&self.data.join("pg_wal"));
        let files = directories.iter().flat_map(|directory| files(directory));
        let names =
            files.filter_map(|path| path.file_name().and_then(OsStr::to_str).map(str::to_owned));
        names.filter(|name| name.len() == 24).collect()
    }

    /// Ends the recovery, as far as anybody can tell.
    async fn end(&self) {
        fs::remove_file(self.data.join("recovery.signal")).unwrap();
        nothing_is_left(&self.data).await;
    }
}

/// How many segments the processes say in a log that they fetched.
fn fetched(log: &str) -> u64 {
    let lines = log.lines().filter(|line| line.contains("no more WAL is fetched ahead"));
    let number = |line: &str| {
        let rest = line.split_once("\"segments\":")?.1;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok()
    };
    lines.filter_map(number).sum()
}

#[tokio::test]
async fn two_recoveries_side_by_side_take_what_was_fetched_ahead() {
    if postgres_is_missing() {
        return;
    }
    let scene = scene_with_segments(Kind::S3, 32).await;
    let expected = scene.primary.psql("SELECT count(*), sum(i) FROM t").await;
    let recover = async |name: &str| {
        let data = scene.restore(name, &[]).await;
        let restored = PgServer::start_existing(&data).await;
        restored.recovered().await;
        assert_eq!(restored.psql("SELECT count(*), sum(i) FROM t").await, expected);
        // Long before it would be idle: the recovery is over.
        nothing_is_left(&data).await;
        let fetched = fetched(&restored.log());
        assert!(fetched >= 25, "{fetched} segments were fetched ahead\n{}", restored.log());
    };
    tokio::join!(recover("one"), recover("two"));
}

#[tokio::test]
async fn a_recovery_goes_on_while_the_process_is_killed_again_and_again() {
    if postgres_is_missing() {
        return;
    }
    let scene = scene_with_segments(Kind::Directory, 32).await;
    let expected = scene.primary.psql("SELECT count(*), sum(i) FROM t").await;
    let data = scene.restore("restored", &[]).await;
    let mut kills = 0;
    let kill = async {
        let mut again = interval(Duration::from_millis(150));
        loop {
            again.tick().await;
            for process in prefetchers(&data) {
                kill_process(process, Signal::KILL).ok();
                kills += 1;
            }
        }
    };
    let recover = async {
        let restored = PgServer::start_existing(&data).await;
        restored.recovered().await;
        restored
    };
    let restored = tokio::select! {
        restored = recover => restored,
        () = kill => unreachable!("it kills for ever"),
    };
    assert!(kills >= 2, "{kills} kills\n{}", restored.log());
    assert_eq!(restored.psql("SELECT count(*), sum(i) FROM t").await, expected);
    // Whoever asks during the recovery is sent away with one, too.
    let is_bad = |line: &str| line.contains("FATAL") && !line.contains("the database system is");
    assert!(!restored.log().lines().any(is_bad), "{}", restored.log());
}

/// What was fetched ahead must not make a recovery take damage for the end of the WAL.
#[tokio::test]
async fn a_damaged_segment_stops_the_recovery() {
    if postgres_is_missing() {
        return;
    }
    let scene = scene_with_segments(Kind::Directory, 24).await;
    let data = scene.restore("restored", &[]).await;
    let consumer = Consumer::new(&scene, "fetching", None);
    let victim = &consumer.names[consumer.names.len() - 8];
    let object = files(&scene.repository())
        .into_iter()
        .find(|path| path.display().to_string().contains(&format!("{victim}-")))
        .unwrap();
    let mut content = fs::read(&object).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(&object, content).unwrap();

    let mut restored = PgServer::builder().existing(&data);
    // It may accept connections before it comes to the damage.
    restored.try_start().await.ok();
    restored.wait_for_end().await;
    let log = restored.log();
    assert!(log.contains("FATAL:  could not restore file"), "{log}");
    assert!(log.contains("WAL not fetched ahead"), "{log}");
    assert!(!log.contains("selected new timeline"), "{log}");
    assert!(data.join("recovery.signal").exists());
    nothing_is_left(&data).await;

    let before = consumer.names.iter().position(|name| name == victim).unwrap();
    consumer.fetch_all(&consumer.names[before - 4..before]).await;
    for _ in 0..2 {
        consumer.fetch(victim).await.assert_code(254);
        assert!(!consumer.data.join("pg_wal/RECOVERYXLOG").exists());
    }
    consumer.end().await;
}

#[tokio::test]
async fn a_consumer_that_jumps_and_a_killed_process_get_the_right_segments() {
    if postgres_is_missing() {
        return;
    }
    let scene = scene_with_segments(Kind::Directory, 28).await;
    let consumer = Consumer::new(&scene, "fetching", None);
    let names = &consumer.names;
    // Left behind by another server, and by an earlier run of this one.
    let pg_wal = consumer.data.join("pg_wal");
    for stale in ["pgmesh-prefetch-1-1", "pgmesh-prefetch-4194999-1"] {
        let stale = pg_wal.join(stale);
        fs::create_dir(&stale).unwrap();
        give_to_server_user(&stale);
        write(&stale.join(&names[0]), "wrong");
    }
    consumer.fetch_all(&names[..3]).await;
    eventually("segments are ready", LIMIT, async || consumer.ready().len() == 16).await;
    assert_eq!(fetched_ahead(&pg_wal).len(), 1, "what others left is there");

    // In the middle, one that is not what its name says; then one that is cut short.
    let directory = fetched_ahead(&pg_wal).remove(0);
    fs::copy(directory.join(&names[9]), directory.join(&names[5])).unwrap();
    File::options().write(true).open(directory.join(&names[6])).unwrap().set_len(99).unwrap();
    consumer.fetch_all(&names[3..8]).await;

    for process in prefetchers(&consumer.data) {
        kill_process(process, Signal::KILL).unwrap();
    }
    consumer.fetch_all(&names[8..20]).await;
    // Back, as a recovery does once it knows where the redo begins.
    consumer.fetch_all(&names[2..24]).await;

    // A frozen process: what it began is waited for, and then fetched.
    eventually("the last are ready", LIMIT, async || {
        names[24..].iter().all(|name| consumer.ready().contains(name))
    })
    .await;
    for process in prefetchers(&consumer.data) {
        kill_process(process, Signal::STOP).unwrap();
    }
    write(&directory.join(format!("{}.part", names[3])), "begun");
    consumer.fetch_all(&names[3..4]).await;
    for process in prefetchers(&consumer.data) {
        kill_process(process, Signal::CONT).unwrap();
    }
    consumer.end().await;
}

#[tokio::test]
async fn nothing_is_fetched_ahead_where_it_must_not_be() {
    if postgres_is_missing() {
        return;
    }
    let scene = scene_with_segments(Kind::Directory, 8).await;
    let consumer = Consumer::new(&scene, "fetching", None);
    let pid_file = consumer.data.join("postmaster.pid");
    let config = fs::read_to_string(scene.config()).unwrap();
    let off = format!("{config}[wal]\nprefetch_segments = 0\n");
    let lines = format!("{NOBODY}\n/data\n1790000000\n");
    for (case, config, lines) in [
        ("it is switched off", &off, lines.as_str()),
        ("the server is process 1", &config, "1\n/data\n1790000000\n"),
    ] {
        write(&scene.config(), config);
        write(&pid_file, lines);
        consumer.fetch_all(&consumer.names[..4]).await;
        sleep(Duration::from_millis(300)).await;
        assert!(fetched_ahead(&consumer.data.join("pg_wal")).is_empty(), "{case}");
    }
    // Once in a run of the server, and again in the next.
    let said = || consumer.log().matches("PostgreSQL is process 1 of its container").count();
    assert_eq!(said(), 1, "{}", consumer.log());
    write(&pid_file, "1\n/data\n1790000001\n");
    consumer.fetch_all(&consumer.names[..2]).await;
    assert_eq!(said(), 2, "{}", consumer.log());
    // A server that is gone, and files that no recovery asks for.
    fs::remove_file(&pid_file).unwrap();
    consumer.fetch_all(&consumer.names[..4]).await;
    write(&pid_file, &lines);
    let rewind = consumer.data.join("pg_wal").join(&consumer.names[0]);
    let mut command = harness::program::command("/usr/bin/env");
    command.arg("-C").arg(&consumer.data).arg(harness::agent::agent_binary());
    command.arg("--config").arg(scene.config()).args(["wal-fetch", &consumer.names[0]]);
    harness::program::finish(command.arg(&rewind), LIMIT).await.assert_success();
    assert!(fetched_ahead(&consumer.data.join("pg_wal")).is_empty());
    consumer.end().await;
}

#[tokio::test]
async fn a_disk_with_little_room_is_left_to_the_recovery() {
    if postgres_is_missing() {
        return;
    }
    let Some(small) = std::env::var_os("PGMESH_TEST_SMALL_DISK").map(PathBuf::from) else {
        return harness::skip("no small file system (PGMESH_TEST_SMALL_DISK is not set)");
    };
    let scene = scene_with_segments(Kind::Directory, 8).await;
    let pg_wal = small.join("pg_wal");
    fs::create_dir(&pg_wal).unwrap();
    give_to_server_user(&pg_wal);
    let consumer = Consumer::new(&scene, "fetching", Some(&pg_wal));
    for name in &consumer.names {
        consumer.fetch_all(std::slice::from_ref(name)).await;
        assert_eq!(consumer.ready(), Vec::<String>::new());
    }
    consumer.end().await;
    fs::remove_dir_all(pg_wal).unwrap();
}

/// Takes all the room that a file system has.
fn fill(disk: &Path) -> PathBuf {
    let filler = disk.join("filler");
    let mut file = File::options().create(true).append(true).open(&filler).unwrap();
    let block = vec![1; 1 << 16];
    while file.write_all(&block).is_ok() {}
    filler
}

/// The disk fills up while segments are fetched ahead, and by itself: what is there is whole, what is
/// not is refused with the reason, and with room again the recovery goes on.
#[tokio::test]
async fn a_disk_that_fills_up_never_gives_a_part_of_a_segment() {
    if postgres_is_missing() {
        return;
    }
    let Some(small) = std::env::var_os("PGMESH_TEST_SMALL_DISK").map(PathBuf::from) else {
        return harness::skip("no small file system (PGMESH_TEST_SMALL_DISK is not set)");
    };
    let scene = scene_with_segments(Kind::S3, 8).await;
    let text = fs::read_to_string(scene.config()).unwrap();
    write(&scene.config(), &format!("{text}[wal]\nprefetch_segments = 1\n"));
    let pg_wal = small.join("pg_wal");
    fs::create_dir(&pg_wal).unwrap();
    give_to_server_user(&pg_wal);
    let consumer = Consumer::new(&scene, "fetching", Some(&pg_wal));
    let names = &consumer.names;

    // What lies ready needs no more room.
    consumer.fetch_all(&names[..1]).await;
    eventually("the next is ready", LIMIT, async || consumer.ready() == names[1..2]).await;
    let filler = fill(&small);
    consumer.fetch_all(&names[1..2]).await;
    fs::remove_file(&filler).unwrap();

    // In the middle of fetching one ahead.
    let faults = scene.s3.as_ref().unwrap().faults();
    let part =
        || files(&pg_wal).into_iter().find(|path| path.display().to_string().contains(".part"));
    let slow = Fault::new(Effect::Delay(Duration::from_secs(2))).on(Operation::GetObject);
    faults.add(slow.key(&names[3]));
    consumer.fetch_all(&names[2..3]).await;
    eventually("one is begun", LIMIT, async || part().is_some()).await;
    let filler = fill(&small);
    let refused = async || consumer.log().contains("WAL not fetched ahead");
    eventually("it is given up", LIMIT, refused).await;
    faults.clear();
    assert_eq!(consumer.ready(), Vec::<String>::new());
    eventually("nothing of it is left", LIMIT, async || part().is_none()).await;
    fill(&small);
    for (signal, code) in [("recovery.signal", 254), ("standby.signal", 1)] {
        fs::rename(consumer.data.join("recovery.signal"), consumer.data.join(signal)).unwrap();
        // A standby asks again when it has streamed, or has not; a recovery must not go on.
        consumer.fetch(&names[3]).await.assert_code(code);
        fs::rename(consumer.data.join(signal), consumer.data.join("recovery.signal")).unwrap();
        let left = files(&pg_wal);
        let left: Vec<_> =
            left.iter().filter(|path| path.display().to_string().contains("RECOVERY")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    assert!(consumer.log().contains("No space left on device"), "{}", consumer.log());

    fs::remove_file(&filler).unwrap();
    consumer.fetch_all(&names[3..]).await;
    consumer.end().await;
    fs::remove_dir_all(pg_wal).unwrap();
}
