//! The pieces of a growing segment, damaged: nothing is put together from them, each command that
//! reads them says which one, and what overlaps must agree.

use std::fs;
use std::path::{Path, PathBuf};

use backup_agent::config::Config;
use backup_agent::repository::{Place, Repository};
use backup_agent::wal::growing::Growing;
use backup_agent::wal::{self, Packed, piece};
use harness::postgres::postgres_is_missing;
use harness::{Agent, At, Effect, Fault, Operation, PgServer, RunningAgent, eventually};
use shared::pg::wal::{Segment, WalFile};

use crate::outage::admin_address;
use crate::receive::{LIMIT, RECEIVER, Receiving, commits, objects};
use crate::scene::{Kind, Scene};
use crate::wal_files::{data_directory, run_in};

const SEGMENT_BYTES: u64 = 16 << 20;

/// A growing segment of several pieces that nobody adds to any more.
struct Pieces {
    scene: Scene,
    /// The segment's name.
    segment: String,
    /// The objects, in order.
    objects: Vec<PathBuf>,
    /// A data directory to fetch in.
    data: PathBuf,
}

impl Pieces {
    async fn new() -> Self {
        let receiving = Receiving::start(Kind::Directory).await;
        let primary = receiving.primary();
        primary.psql("SELECT pg_switch_wal()").await;
        primary.psql("CREATE TABLE marks (i int)").await;
        for i in 1..=5 {
            primary.psql(&format!("INSERT INTO marks VALUES ({i})")).await;
            receiving.stored_all().await;
        }
        let segment = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
        let Receiving { scene, agent } = receiving;
        agent.kill9().await;
        let objects = objects(&scene, &format!("/partial/{segment}."));
        assert!(objects.len() >= 5, "{objects:?}");
        let data = data_directory(&scene, "data");
        Self { scene, segment, objects, data }
    }

    /// Asks for the segment, as a recovery does; says no with 254, and with `said`.
    async fn is_refused(&self, case: &str, said: &str) {
        let fetched =
            run_in(&self.scene, &self.data, &["wal-fetch", &self.segment, "fetched"]).await;
        assert_eq!(fetched.code(), Some(254), "{case}: {fetched}");
        assert!(fetched.stderr.contains(said), "{case}: {said:?} is not said: {fetched}");
        assert!(!self.data.join("fetched").exists(), "{case}: something was handed over");
    }

    /// `verify --wal` finds it.
    async fn is_found(&self, case: &str, said: &str) {
        let verified = self.scene.run(&["verify", "--wal"]).await;
        assert_eq!(verified.code(), Some(1), "{case}: {verified}");
        assert!(verified.stdout.contains(said), "{case}: {said:?} is not said: {verified}");
    }

    /// Asks for the segment and returns it.
    async fn fetched(&self) -> Vec<u8> {
        run_in(&self.scene, &self.data, &["wal-fetch", &self.segment, "fetched"])
            .await
            .assert_success();
        let fetched = fs::read(self.data.join("fetched")).unwrap();
        fs::remove_file(self.data.join("fetched")).unwrap();
        fetched
    }

    /// Stores `content` as one more piece that begins at `from`, as another writer would have.
    async fn add(&self, from: u64, content: &[u8]) -> PathBuf {
        let WalFile::Segment(segment) = WalFile::parse(&self.segment, SEGMENT_BYTES).unwrap()
        else {
            panic!("{} is no segment", self.segment)
        };
        let place = self.place().await;
        let mut growing = Growing::new(segment, SEGMENT_BYTES, 1, Vec::new()).unwrap();
        growing.take(&vec![0; usize::try_from(from).unwrap()]).unwrap();
        growing.ship(0, from, false);
        growing.take(content).unwrap();
        let cut = growing.cut(true).unwrap().unwrap();
        let name = format!("{from:08X}-{:08X}", from + content.len() as u64);
        assert_eq!((cut.from, cut.to), (from, from + content.len() as u64));
        let before = objects(&self.scene, &name);
        store(&place, segment, cut).await;
        let added = objects(&self.scene, &name);
        added.into_iter().find(|path| !before.contains(path)).unwrap()
    }

    async fn place(&self) -> Place {
        let text = fs::read_to_string(self.scene.config()).unwrap();
        let config: Config = toml::from_str(&text).unwrap();
        let system_identifier = system_identifier(&self.scene.primary).await;
        Repository::open(&config).await.unwrap().place(0, system_identifier)
    }
}

async fn store(place: &Place, segment: Segment, cut: piece::Cut) {
    piece::store(place, segment, SEGMENT_BYTES, cut).await.unwrap();
}

async fn system_identifier(server: &PgServer) -> u64 {
    let identifier = server.psql("SELECT system_identifier FROM pg_control_system()").await;
    identifier.parse().unwrap()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[tokio::test]
async fn a_damaged_piece_is_refused_and_named() {
    if postgres_is_missing() {
        return;
    }
    let pieces = Pieces::new().await;
    pieces.fetched().await;
    pieces.scene.run(&["verify", "--wal"]).await.assert_success();
    pieces.scene.run(&["list", "--wal"]).await.assert_success();
    let (first, middle) = (&pieces.objects[0], &pieces.objects[2]);
    for (place, object) in [("the first", first), ("one between", middle)] {
        let whole = fs::read(object).unwrap();
        let flipped = |at: usize| {
            let mut object = whole.clone();
            object[at] ^= 1;
            object
        };
        for (damage, content) in [
            ("a bit of its header flipped", flipped(10)),
            ("a bit of its content flipped", flipped(110)),
            ("cut short by one byte", whole[..whole.len() - 1].to_vec()),
            ("cut in half", whole[..whole.len() / 2].to_vec()),
            ("empty", Vec::new()),
            ("another piece's content", fs::read(&pieces.objects[3]).unwrap()),
        ] {
            fs::write(object, content).unwrap();
            let case = format!("{place}, {damage}");
            pieces.is_refused(&case, &name(object)).await;
            pieces.is_found(&case, &name(object)).await;
        }
        fs::write(object, whole).unwrap();
    }
    pieces.fetched().await;
}

/// That one is missing is in the names of the others: `list --wal`, which reads nothing else, tells.
#[tokio::test]
async fn a_missing_piece_is_a_gap() {
    if postgres_is_missing() {
        return;
    }
    let pieces = Pieces::new().await;
    for (case, object, said) in [
        ("the first", &pieces.objects[0], "its first piece is missing"),
        ("one between", &pieces.objects[2], "a piece of it is missing after"),
    ] {
        let whole = fs::read(object).unwrap();
        fs::remove_file(object).unwrap();
        pieces.is_refused(case, said).await;
        pieces.is_refused(case, &pieces.segment).await;
        pieces.is_found(case, "GAP until").await;
        let listed = pieces.scene.run(&["list", "--wal"]).await;
        assert_eq!(listed.code(), Some(1), "{case}: {listed}");
        assert!(listed.stdout.contains("GAP until"), "{case}: {listed}");
        fs::write(object, whole).unwrap();
    }
    pieces.fetched().await;

    // A running agent fills it from the server.
    fs::remove_file(&pieces.objects[2]).unwrap();
    let Pieces { scene, segment, data, .. } = pieces;
    let agent = scene.agent().spawn(&["run"]);
    let receiving = Receiving { scene, agent };
    receiving.primary().psql("INSERT INTO marks VALUES (6)").await;
    receiving.stored_all().await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();
    run_in(&receiving.scene, &data, &["wal-fetch", &segment, "fetched"]).await.assert_success();
}

/// Two that wrote the same stretch of the same segment differently cannot both be right.
#[tokio::test]
async fn pieces_that_overlap_must_agree() {
    if postgres_is_missing() {
        return;
    }
    let pieces = Pieces::new().await;
    let content = pieces.fetched().await;
    let (from, to) = stretch(&pieces.objects[1]);
    let end = stretch(pieces.objects.last().unwrap()).1;
    let part = |from: u64, to: u64| {
        content[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].to_vec()
    };
    // One more writer that cut elsewhere, with the same content.
    for (from, to) in [(0, to - 8), (from + 8, end), (0, end)] {
        let added = pieces.add(from, &part(from, to)).await;
        assert!(pieces.fetched().await == content, "{from} to {to}");
        pieces.scene.run(&["verify", "--wal"]).await.assert_success();
        fs::remove_file(added).unwrap();
    }
    for (case, from, to) in [
        ("the same place", from, to),
        ("within another", from + 8, to - 8),
        ("more than another", from, to + 8),
        ("all of it", 0, end),
    ] {
        let mut other = part(from, to);
        let last = other.len() - 1;
        other[last] ^= 1;
        let added = pieces.add(from, &other).await;
        pieces.is_refused(case, "CONFLICT").await;
        pieces.is_found(case, "CONFLICT").await;
        fs::remove_file(added).unwrap();
    }
    // Nor does a receiver go on from what differs.
    let mut other = part(0, end);
    other[200] ^= 1;
    pieces.add(0, &other).await;
    let agent: Agent = pieces.scene.agent();
    let mut running = agent.spawn(&["run"]);
    running.logged("CONFLICT", LIMIT).await;
    assert_eq!(crate::receive::reported(&pieces.scene.primary).await, None);
}

/// Commits that wait for the repository make a piece each. A larger one takes their place again and
/// again, and only after it was read back: here the store gives it back damaged once.
#[tokio::test]
async fn a_slow_server_does_not_leave_thousands_of_pieces() {
    const COMMITS: u32 = 300;
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::with(Kind::S3, "[wal]\nship_interval = \"200ms\"\n").await;
    let primary = receiving.primary();
    primary.psql("SELECT pg_switch_wal(); CREATE TABLE marks (i int)").await;
    receiving.stored_all().await;
    let segment = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let pieces = format!("/partial/{segment}.");
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    let get = Fault::new(Effect::FlipBit(At::Fraction(0.5))).on(Operation::GetObject);
    faults.add(get.key("/partial/").times(1));
    primary.set("synchronous_standby_names", &format!("ANY 1 ({RECEIVER})")).await;
    for i in 1..=COMMITS {
        primary.psql(&format!("INSERT INTO marks VALUES ({i})")).await;
        let count = objects(&receiving.scene, &pieces).len();
        // One that is being replaced is there beside what replaces it.
        assert!(count <= 2 * 66, "{count} pieces after {i} commits");
    }
    assert!(receiving.agent.stdout().contains("cannot be read back"), "nothing was read back");
    let count = objects(&receiving.scene, &pieces).len();
    assert!(0 < count && count <= 2 * 66, "{count} pieces");
    assert_eq!(segment, primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await);
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    scene.run(&["verify", "--wal"]).await.assert_success();
    scene.run(&["list", "--wal"]).await.assert_success();
    let receiving = Receiving { agent: scene.agent().spawn(&["list"]), scene };
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.psql("SELECT count(*) FROM marks").await, COMMITS.to_string());
}

/// A larger piece, or the complete segment, is damaged, and what it was to replace is there still.
#[tokio::test]
async fn what_a_damaged_object_was_to_replace_stands_for_it() {
    if postgres_is_missing() {
        return;
    }
    let pieces = Pieces::new().await;
    let content = pieces.fetched().await;
    let end = stretch(pieces.objects.last().unwrap()).1;
    let part = |from: u64, to: u64| {
        content[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].to_vec()
    };
    let larger = pieces.add(0, &part(0, end)).await;
    let middle = pieces.add(8, &part(8, end - 8)).await;
    for damaged in [&larger, &middle, &pieces.objects[2]] {
        let mut object = fs::read(damaged).unwrap();
        object[110] ^= 1;
        fs::write(damaged, object).unwrap();
        if damaged == &pieces.objects[2] {
            pieces.is_refused("nothing else has it", &name(damaged)).await;
        } else {
            assert!(pieces.fetched().await == content, "{} is damaged", damaged.display());
            pieces.is_found("one that others stand for", &name(damaged)).await;
        }
    }

    // The complete segment, and all of it in a piece.
    let primary = &pieces.scene.primary;
    primary.psql("SELECT pg_switch_wal()").await;
    let path = primary.data_directory().join("pg_wal").join(&pieces.segment);
    let content = fs::read(path).unwrap();
    let piece = pieces.add(0, &content).await;
    let packed = Packed::read(&pieces.segment, content.as_slice(), 1).unwrap();
    wal::store(&pieces.place().await, packed).await.unwrap();
    let complete = objects(&pieces.scene, &format!("{}-", pieces.segment)).remove(0);
    for damaged in [&complete, &piece] {
        let mut object = fs::read(damaged).unwrap();
        object[5000] ^= 1;
        fs::write(damaged, object).unwrap();
        if damaged == &complete {
            assert!(pieces.fetched().await == content, "the complete segment is damaged");
        }
        pieces.is_found("the complete segment", &name(&complete)).await;
    }
    pieces.is_refused("both are damaged", &name(&complete)).await;
}

/// The store lets nothing be deleted. That costs room and harms nothing; it is said once, and a metric
/// shows it. The pieces that stay even stand for a complete segment that is damaged later.
#[tokio::test]
async fn pieces_that_the_store_keeps_harm_nothing() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    faults.object_lock(true);
    let primary = &receiving.scene.primary;
    primary.psql("SELECT pg_switch_wal(); CREATE TABLE marks (i int)").await;
    let mut segments = Vec::new();
    for i in 1..=3 {
        segments.push(primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await);
        for mark in [10 * i, 10 * i + 1] {
            primary.psql(&format!("INSERT INTO marks VALUES ({mark})")).await;
            receiving.stored_all().await;
        }
        primary.psql("SELECT pg_switch_wal()").await;
        receiving.stored_all().await;
    }
    for segment in &segments {
        assert!(kept(&receiving, segment) >= 2, "pieces of {segment} are gone");
        assert_eq!(objects(&receiving.scene, &format!("{segment}-")).len(), 1, "{segment}");
    }
    let said = |agent: &RunningAgent| agent.stdout().matches("does not let pieces").count();
    assert_eq!(said(&receiving.agent), 1);
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    receiving.scene.run(&["list", "--wal"]).await.assert_success();

    // Also to who begins with what is there.
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.primary().psql("INSERT INTO marks VALUES (40)").await;
    receiving.stored_all().await;
    assert!(said(&receiving.agent) <= 1);
    let metric = async || {
        let text =
            reqwest::get(format!("http://{address}/metrics")).await.ok()?.text().await.ok()?;
        let line = text.lines().find(|it| it.starts_with("pgmesh_backup_wal_pieces{"))?;
        line.rsplit_once(' ')?.1.parse::<f64>().ok()
    };
    let all: usize = segments.iter().map(|segment| kept(&receiving, segment)).sum();
    let all = f64::from(u32::try_from(all).unwrap());
    eventually("the metric shows it", LIMIT, async || metric().await >= Some(all)).await;

    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "10,11,20,21,30,31,40");
}

fn kept(receiving: &Receiving, segment: &str) -> usize {
    objects(&receiving.scene, &format!("/partial/{segment}.")).len()
}

/// The place of a piece in its segment, as its name has it.
fn stretch(object: &Path) -> (u64, u64) {
    let name = name(object);
    let (_, place) = name.split_once('.').unwrap();
    let mut numbers = place.split('-').map(|it| u64::from_str_radix(it, 16).unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}
