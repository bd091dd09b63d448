//! Repositories with very many objects: what is listed and read stays little. No server is needed.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use backup_agent::config::Config;
use backup_agent::keys::new_key_file;
use backup_agent::repository::{Place, Repository};
use backup_agent::resume::{self, OnDivergence, Server};
use backup_agent::wal::growing::Growing;
use backup_agent::wal::piece::{self, Piece, cover};
use backup_agent::wal::{self, Packed, WalMap};
use harness::directory;
use shared::pg::wal::{HistoryEntry, Segment};
use tempfile::TempDir;
use tokio_postgres::types::PgLsn;

use crate::scene::config_text;

const SEGMENT_BYTES: u64 = 16 << 20;
const SYSTEM_IDENTIFIER: u64 = 7;

/// A place in a directory.
async fn place() -> (Place, TempDir) {
    let directory = directory();
    let (key, path) = (directory.path().join("key"), directory.path().join("repository"));
    new_key_file(&key).unwrap();
    fs::create_dir(&path).unwrap();
    let repository = format!("[repository.directory]\npath = \"{}\"\n", path.display());
    let config: Config = toml::from_str(&config_text(&key, &repository, "", &[])).unwrap();
    let place = Repository::open(&config).await.unwrap().place(0, SYSTEM_IDENTIFIER);
    (place, directory)
}

/// Complete segments, as far as names tell.
fn add_segments(directory: &TempDir, timeline: u32, numbers: impl Iterator<Item = u64>) {
    let root = directory.path().join("repository/v1/tests/0/7");
    for number in numbers {
        let name = Segment { timeline, number }.name(SEGMENT_BYTES);
        let folder = root.join(format!("wal/{}/{}", &name[..8], &name[..16]));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{name}-0123456789abcdef")), "").unwrap();
    }
}

/// The first half of each segment as a piece, as far as names tell.
fn add_pieces(directory: &TempDir, timeline: u32, numbers: impl Iterator<Item = u64>) {
    let folder = directory.path().join("repository/v1/tests/0/7/partial");
    fs::create_dir_all(&folder).unwrap();
    for number in numbers {
        let name = Segment { timeline, number }.name(SEGMENT_BYTES);
        fs::write(folder.join(format!("{name}.00000000-00800000-0123456789abcdef")), "").unwrap();
    }
}

fn at(number: u64, offset: u64) -> PgLsn {
    PgLsn::from(number * SEGMENT_BYTES + offset)
}

/// What decides where receiving goes on is listed, and not what is long past.
#[tokio::test]
async fn the_way_on_is_found_without_listing_everything() {
    let (place, directory) = place().await;
    // Timeline 1 goes on after the switch: a divergence. Timeline 2 has a hole of two folders.
    add_segments(&directory, 1, 0..2500);
    add_segments(&directory, 2, (2000..3000).chain(3700..4000));
    // A folder that was just made, where a directory is the store.
    let empty = "repository/v1/tests/0/7/wal/00000002/000000020000000C";
    fs::create_dir_all(directory.path().join(empty)).unwrap();
    let text = format!("1\t{}\tno recovery target specified\n", at(2000, 700));
    let packed = Packed::read("00000002.history", text.as_bytes(), 1).unwrap();
    wal::store(&place, packed).await.unwrap();
    let history =
        vec![HistoryEntry { timeline: 1, switch_lsn: at(2000, 700), reason: String::new() }];

    let listed = |map: &WalMap| -> usize { map.segments.values().map(BTreeMap::len).sum() };
    // Then once more with all pieces there ever were, as a store under Object Lock keeps them.
    for kept in [false, true] {
        if kept {
            add_pieces(&directory, 1, 0..2500);
            add_pieces(&directory, 2, (2000..3000).chain(3700..4001));
        }
        let whole = WalMap::read(&place, SEGMENT_BYTES).await.unwrap();
        for (case, timeline, slot, listed_max) in [
            ("up to date", 2, at(4000, 5), 1300),
            ("the slot is in the last segment", 2, at(3999, 5), 1300),
            ("the slot is in the hole", 2, at(3300, 0), 2000),
            ("the slot is after the hole, in which a folder is empty", 2, at(3700, 0), 2000),
            ("the slot is on the old timeline", 2, at(1990, 0), 2500),
            ("a new slot, long after everything", 2, at(9000, 0), 1300),
            ("an old primary", 1, at(2400, 0), 2000),
            ("a slot from before everything that is stored", 2, at(0, 0), 5000),
        ] {
            let history = if timeline == 1 { Vec::new() } else { history.clone() };
            let part = WalMap::read_from(&place, SEGMENT_BYTES, slot, &history).await.unwrap();
            let server = Server { timeline, flush_lsn: at(9001, 0), history, slot_lsn: slot };
            let start = resume::start(&part, &server, OnDivergence::Follow);
            assert_eq!(start, resume::start(&whole, &server, OnDivergence::Follow), "{case}");
            assert_eq!(part.histories, whole.histories, "{case}");
            assert!(listed(&part) <= listed_max, "{case}: {} segments listed", listed(&part));
            assert!(part.pieces.len() <= listed_max, "{case}: {} with pieces", part.pieces.len());
        }
    }
}

/// A segment with the header of a real one.
fn content(segment: Segment, bytes: u64) -> Vec<u8> {
    let words = u32::try_from(bytes / 4).unwrap();
    let mut content: Vec<u8> = (0..words).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let (magic, long_header) = (0xD116_u16, 2_u16);
    content[..2].copy_from_slice(&magic.to_le_bytes());
    content[2..4].copy_from_slice(&long_header.to_le_bytes());
    content[4..8].copy_from_slice(&segment.timeline.to_le_bytes());
    content[8..16].copy_from_slice(&(segment.number * bytes).to_le_bytes());
    content[16..24].fill(0);
    content[24..32].copy_from_slice(&SYSTEM_IDENTIFIER.to_le_bytes());
    content[32..36].copy_from_slice(&u32::try_from(bytes).unwrap().to_le_bytes());
    content[36..40].copy_from_slice(&8192_u32.to_le_bytes());
    content
}

const GROWING: Segment = Segment { timeline: 1, number: 5 };
const GROWING_BYTES: u64 = 1 << 20;

/// What is stored of the growing segment: how far, and its content.
async fn stitched(place: &Place) -> (u64, Vec<u8>) {
    loop {
        let pieces = piece::list_of(place, GROWING, GROWING_BYTES).await.unwrap();
        let cover = cover(&pieces);
        match piece::stitch(place, GROWING, GROWING_BYTES, &cover).await {
            Err(error) if error.is_gone() => {}
            content => return (cover.to, content.unwrap()),
        }
    }
}

fn position(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

/// Small pieces are replaced by a larger one while others read them: nobody ever gets less than what
/// was stored when he began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_find_everything_while_pieces_are_replaced() {
    let (place, _directory) = place().await;
    let content = content(GROWING, GROWING_BYTES);
    let stored = AtomicU64::new(0);
    let write = async {
        let mut growing = Growing::new(GROWING, GROWING_BYTES, 1, Vec::new()).unwrap();
        let mut larger = 0;
        for data in content.chunks(800).take(1000) {
            growing.take(data).unwrap();
            let cut = growing.cut(true).unwrap().unwrap();
            let (from, to, replaces) = (cut.from, cut.to, cut.replaces);
            if replaces {
                let (piece, read) =
                    piece::store_and_read(&place, GROWING, GROWING_BYTES, cut).await.unwrap();
                assert!(read == content[position(from)..position(to)]);
                stored.store(to, Ordering::SeqCst);
                piece::remove_within(&place, GROWING_BYTES, &piece, &read).await.unwrap();
                larger += 1;
            } else {
                piece::store(&place, GROWING, GROWING_BYTES, cut).await.unwrap();
                stored.store(to, Ordering::SeqCst);
            }
            growing.ship(from, to, replaces);
        }
        larger
    };
    let read = async {
        loop {
            let before = stored.load(Ordering::SeqCst);
            if before > 0 {
                let (to, found) = stitched(&place).await;
                assert!(to >= before, "{before} bytes were stored, {to} are found");
                assert!(found[..position(to)] == content[..position(to)]);
            }
            tokio::task::yield_now().await;
        }
    };
    let larger = tokio::select! {
        larger = write => larger,
        () = read => unreachable!(),
    };
    assert_eq!(larger, 15);
    let left = piece::list_of(&place, GROWING, GROWING_BYTES).await.unwrap();
    assert!(left.len() <= 65, "{} pieces", left.len());
}

/// The agent is killed after each step of replacing: what is there is whole, and the next one goes
/// on from it. What differs from the larger piece is not removed.
#[tokio::test]
async fn a_replacement_that_was_stopped_loses_nothing() {
    let (place, _directory) = place().await;
    let content = content(GROWING, GROWING_BYTES);
    let mut growing = Growing::new(GROWING, GROWING_BYTES, 1, Vec::new()).unwrap();
    let larger = loop {
        growing.take(&content[position(growing.at())..][..900]).unwrap();
        let cut = growing.cut(true).unwrap().unwrap();
        let (from, to, replaces) = (cut.from, cut.to, cut.replaces);
        let piece = piece::store(&place, GROWING, GROWING_BYTES, cut).await.unwrap();
        growing.ship(from, to, replaces);
        if replaces {
            break piece;
        }
    };
    let to = larger.to;
    let is_whole = async |step: &str| {
        let (found_to, found) = stitched(&place).await;
        assert_eq!(found_to, to, "{step}");
        assert!(found[..position(to)] == content[..position(to)], "{step}");
        let pieces = piece::list_of(&place, GROWING, GROWING_BYTES).await.unwrap();
        let mut next = Growing::new(GROWING, GROWING_BYTES, 1, pieces).unwrap();
        next.take(&content[..position(to) + 100]).unwrap();
        let cut = next.cut(true).unwrap().unwrap();
        assert_eq!(next.shipped(), to, "{step}");
        assert!(cut.from <= to && to < cut.to, "{step}");
    };
    is_whole("stored").await;
    let small = piece::list_of(&place, GROWING, GROWING_BYTES).await.unwrap();
    assert_eq!(small.len(), 66);
    let delete = async |piece: &Piece| {
        place.store().delete(&place.key(&piece.name)).await.unwrap();
    };
    let read = piece::read(&place, &larger).await.unwrap();
    for piece in small.iter().filter(|piece| piece.name != larger.name).take(20) {
        delete(piece).await;
    }
    is_whole("some are removed").await;

    // Another writer's, of other content.
    let mut other = Growing::new(GROWING, GROWING_BYTES, 1, Vec::new()).unwrap();
    other.take(&vec![1; 5000]).unwrap();
    let cut = other.cut(true).unwrap().unwrap();
    let other = piece::store(&place, GROWING, GROWING_BYTES, cut).await.unwrap();
    piece::remove_within(&place, GROWING_BYTES, &larger, &read).await.unwrap();
    let left = piece::list_of(&place, GROWING, GROWING_BYTES).await.unwrap();
    let mut expected = [other.name.as_str(), larger.name.as_str()];
    expected.sort_unstable();
    assert_eq!(left.iter().map(|piece| piece.name.as_str()).collect::<Vec<_>>(), expected);
    let conflict = piece::stitch(&place, GROWING, GROWING_BYTES, &cover(&left)).await.unwrap_err();
    assert!(conflict.to_string().starts_with("CONFLICT"), "{conflict}");
    delete(&other).await;
    is_whole("all are removed").await;
}
