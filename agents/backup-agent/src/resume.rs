//! Where receiving WAL goes on, or why it must not. Pure.
//!
//! The server's slot holds back what the repository had not been proven to hold; the repository
//! may hold more by now. So the way goes from the slot's position along the server's own history,
//! past everything that is stored, to the first byte that is not.

use serde::Deserialize;
use shared::pg::wal::{HistoryEntry, Segment, segment_number};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::wal::WalMap;

/// What is done about a primary that lacks WAL which is stored: an asynchronous standby that was
/// promoted before it had received everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDivergence {
    /// Say so and store the new timeline, which is the only one that goes on.
    #[default]
    Follow,
    /// Say so and store nothing of it until this is set to `follow`: where commits wait for the
    /// repository, such a promotion has lost commits that were acknowledged.
    Refuse,
}

/// What a primary says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The timeline it writes.
    pub timeline: u32,
    /// How far its disk has WAL.
    pub flush_lsn: PgLsn,
    /// The timelines before, oldest first.
    pub history: Vec<HistoryEntry>,
    /// From where its slot holds WAL back.
    pub slot_lsn: PgLsn,
}

/// A position on a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The timeline.
    pub timeline: u32,
    /// The first byte that is not stored.
    pub lsn: PgLsn,
}

impl Position {
    /// The segment that holds it.
    pub fn segment(self, segment_bytes: u64) -> Segment {
        Segment { timeline: self.timeline, number: segment_number(self.lsn, segment_bytes) }
    }
}

/// Where to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first byte that is missing.
    pub at: Position,
    /// Where to go on if the server has removed it: there is a gap then.
    pub or_else: Option<Position>,
    /// WAL that is stored and that the server has not, if that is new.
    pub diverged: Option<Divergence>,
}

/// WAL that is stored and not part of the primary's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The timeline it is on.
    pub timeline: u32,
    /// Where the primary's history left that timeline.
    pub from_lsn: PgLsn,
    /// How far it is stored.
    pub until_lsn: PgLsn,
}

impl Divergence {
    /// How much it is.
    pub fn bytes(self) -> u64 {
        u64::from(self.until_lsn).saturating_sub(self.from_lsn.into())
    }
}

/// Why nothing may be stored from a primary.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The repository knows a later timeline.
    #[error(
        "it writes timeline {found}, and the repository holds timeline {stored}: an old primary \
         that came back, or the wrong server. Stop it, or make it a standby (pg_rewind)"
    )]
    OldTimeline {
        /// What the server writes.
        found: u32,
        /// The newest in the repository.
        stored: u32,
    },
    /// The server lost WAL.
    #[error(
        "its WAL ends at {found} on timeline {timeline}, and the repository holds {stored}: it \
         lost what was on its disk. Restore it from the repository"
    )]
    Behind {
        /// The timeline.
        timeline: u32,
        /// Where the server's WAL ends.
        found: PgLsn,
        /// Where the repository's ends.
        stored: PgLsn,
    },
    /// The server's history leaves out what is stored.
    #[error(
        "it was promoted at {} of timeline {}, and the repository holds that timeline up to {}: \
         {} bytes of WAL, and the commits in them, are not on it. Either restore the repository's \
         timeline {}, or accept the loss with wal.on_divergence = \"follow\"",
        .0.from_lsn, .0.timeline, .0.until_lsn, .0.bytes(), .0.timeline
    )]
    Diverged(Divergence),
}

/// Decides where receiving from `server` goes on.
///
/// # Errors
///
/// Nothing may be stored from it.
pub fn start(
    stored: &WalMap,
    server: &Server,
    on_divergence: OnDivergence,
) -> Result<Start, Refusal> {
    let newest = stored.newest_stored().unwrap_or(0);
    if newest > server.timeline {
        return Err(Refusal::OldTimeline { found: server.timeline, stored: newest });
    }
    // A history alone, which the new primary's archiver may have stored before us, is no WAL.
    let newest = stored.newest_with_wal().unwrap_or(0);
    let end = stored.end_of(newest);
    if let Some(end) = end
        && newest == server.timeline
        && end > server.flush_lsn
    {
        let (timeline, found) = (newest, server.flush_lsn);
        return Err(Refusal::Behind { timeline, found, stored: end });
    }
    let diverged = end.filter(|_| newest < server.timeline).and_then(|until_lsn| {
        let from_lsn = left_at(stored, server, newest);
        (from_lsn < until_lsn).then_some(Divergence { timeline: newest, from_lsn, until_lsn })
    });
    if let (Some(divergence), OnDivergence::Refuse) = (diverged, on_divergence) {
        return Err(Refusal::Diverged(divergence));
    }

    let at_slot = segment_start(stored, server.slot_lsn);
    let from_slot = walk(stored, server, at_slot);
    if from_slot.lsn > at_slot {
        return Ok(Start { at: from_slot, or_else: None, diverged });
    }
    // Nothing is stored where the slot begins. Is there something before it to go on from?
    let slot = Position { timeline: on(server, at_slot), lsn: at_slot };
    match last_before(stored, server, at_slot) {
        Some(before) => {
            Ok(Start { at: walk(stored, server, before), or_else: Some(slot), diverged })
        }
        None => Ok(Start { at: slot, or_else: None, diverged }),
    }
}

/// The timeline that the server's history has at a position.
fn on(server: &Server, lsn: PgLsn) -> u32 {
    let entry = server.history.iter().find(|entry| entry.switch_lsn > lsn);
    entry.map_or(server.timeline, |entry| entry.timeline)
}

/// Where the server's history left `timeline`, or the timeline that both have in common.
fn left_at(stored: &WalMap, server: &Server, timeline: u32) -> PgLsn {
    let own = stored.histories.get(&timeline).map_or(&[][..], Vec::as_slice);
    let ours = |candidate: u32| {
        candidate == timeline || own.iter().any(|entry| entry.timeline == candidate)
    };
    let common = server.history.iter().rev().find(|entry| ours(entry.timeline));
    common.map_or(PgLsn::from(0), |entry| entry.switch_lsn)
}

/// Goes from `lsn` along the server's history to the first byte that is not stored.
fn walk(stored: &WalMap, server: &Server, mut lsn: PgLsn) -> Position {
    loop {
        let timeline = on(server, lsn);
        let number = segment_number(lsn, stored.segment_bytes);
        let segment = Segment { timeline, number };
        let end = number * stored.segment_bytes + stored.covered(segment);
        let left = server.history.iter().find(|entry| entry.timeline == timeline);
        let next = left.map_or(end, |entry| end.min(entry.switch_lsn.into()));
        if next <= u64::from(lsn) {
            return Position { timeline, lsn };
        }
        lsn = next.into();
    }
}

/// The start of the last segment before `limit` of which something is stored on the server's way.
fn last_before(stored: &WalMap, server: &Server, limit: PgLsn) -> Option<PgLsn> {
    let limit = segment_number(limit, stored.segment_bytes);
    let timelines = server.history.iter().map(|entry| entry.timeline).chain([server.timeline]);
    let last = timelines.filter_map(|timeline| {
        let numbers = stored.numbers(timeline).filter(|number| *number < limit);
        numbers
            .filter(|number| on(server, PgLsn::from(number * stored.segment_bytes)) == timeline)
            .max()
    });
    last.max().map(|number| PgLsn::from(number * stored.segment_bytes))
}

fn segment_start(stored: &WalMap, lsn: PgLsn) -> PgLsn {
    PgLsn::from(segment_number(lsn, stored.segment_bytes) * stored.segment_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::example::{self, SEGMENT};

    /// A position: segment and offset in it.
    fn lsn(segment: u64, offset: u64) -> PgLsn {
        PgLsn::from(segment * SEGMENT + offset)
    }

    /// What is stored, and the history files of these timelines.
    fn stored(complete: &[(u32, u64)], pieces: &[(u32, u64, u64)], timelines: &[u32]) -> WalMap {
        let mut map = example::stored(complete, pieces);
        map.histories = timelines.iter().map(|timeline| (*timeline, history())).collect();
        map
    }

    /// Timeline 1 was left in the middle of segment 5.
    fn history() -> Vec<HistoryEntry> {
        vec![HistoryEntry { timeline: 1, switch_lsn: lsn(5, 1000), reason: String::new() }]
    }

    fn server(timeline: u32, slot: PgLsn) -> Server {
        let history = if timeline == 1 { Vec::new() } else { history() };
        Server { timeline, flush_lsn: lsn(9, 0), history, slot_lsn: slot }
    }

    fn at(timeline: u32, lsn: PgLsn) -> Position {
        Position { timeline, lsn }
    }

    #[test]
    fn receiving_goes_on_at_the_first_byte_that_is_not_stored() {
        struct Case {
            name: &'static str,
            stored: WalMap,
            server: Server,
            at: Position,
            or_else: Option<Position>,
        }
        let cases = [
            Case {
                name: "an empty repository begins with the slot's segment",
                stored: stored(&[], &[], &[]),
                server: server(1, lsn(3, 500)),
                at: at(1, lsn(3, 0)),
                or_else: None,
            },
            Case {
                name: "complete segments and a piece",
                stored: stored(&[(1, 3), (1, 4)], &[(1, 5, 700)], &[]),
                server: server(1, lsn(3, 500)),
                at: at(1, lsn(5, 700)),
                or_else: None,
            },
            Case {
                name: "a hole after the slot's position is filled",
                stored: stored(&[(1, 3), (1, 6)], &[], &[]),
                server: server(1, lsn(3, 0)),
                at: at(1, lsn(4, 0)),
                or_else: None,
            },
            Case {
                name: "a slot that was made anew may leave a gap",
                stored: stored(&[(1, 2)], &[(1, 3, 100)], &[]),
                server: server(1, lsn(7, 0)),
                at: at(1, lsn(3, 100)),
                or_else: Some(at(1, lsn(7, 0))),
            },
            Case {
                name: "the rest of the old timeline comes before the new",
                stored: stored(&[(1, 4)], &[(1, 5, 700)], &[]),
                server: server(2, lsn(4, 0)),
                at: at(1, lsn(5, 700)),
                or_else: None,
            },
            Case {
                name: "the old timeline is whole: the new begins at its first byte",
                stored: stored(&[(1, 4)], &[(1, 5, 1000)], &[]),
                server: server(2, lsn(4, 0)),
                at: at(2, lsn(5, 1000)),
                or_else: None,
            },
            Case {
                name: "the new timeline's first segment is under way",
                stored: stored(&[(1, 4)], &[(1, 5, 1000), (2, 5, 1500)], &[2]),
                server: server(2, lsn(5, 1000)),
                at: at(2, lsn(5, 1500)),
                or_else: None,
            },
            Case {
                name: "the new timeline goes on over segments",
                stored: stored(&[(1, 4), (2, 5), (2, 6)], &[], &[2]),
                server: server(2, lsn(4, 0)),
                at: at(1, lsn(5, 0)),
                or_else: None,
            },
        ];
        for Case { name, stored, server, at, or_else } in cases {
            let expected = Start { at, or_else, diverged: None };
            assert_eq!(start(&stored, &server, OnDivergence::Refuse), Ok(expected), "{name}");
        }
    }

    #[test]
    fn what_is_stored_and_not_on_the_primary_is_said_or_refused() {
        let ahead = stored(&[(1, 4)], &[(1, 5, 1800)], &[]);
        let divergence =
            Divergence { timeline: 1, from_lsn: lsn(5, 1000), until_lsn: lsn(5, 1800) };
        let promoted = server(2, lsn(4, 0));
        let expected = Start { at: at(2, lsn(5, 1000)), or_else: None, diverged: Some(divergence) };
        assert_eq!(start(&ahead, &promoted, OnDivergence::Follow), Ok(expected));
        assert_eq!(divergence.bytes(), 800);
        let refused = start(&ahead, &promoted, OnDivergence::Refuse);
        assert_eq!(refused, Err(Refusal::Diverged(divergence)));

        // Once the new timeline is stored, it is no news.
        let followed = stored(&[(1, 4)], &[(1, 5, 1800), (2, 5, 1100)], &[2]);
        let expected = Start { at: at(2, lsn(5, 1100)), or_else: None, diverged: None };
        assert_eq!(start(&followed, &promoted, OnDivergence::Refuse), Ok(expected));
    }

    #[test]
    fn a_branch_of_another_timeline_is_a_divergence_from_where_it_left() {
        // Stored: timeline 2 up to segment 7. The server's timeline 3 left timeline 1 as well.
        let stored = stored(&[(1, 4), (2, 5), (2, 6)], &[], &[2]);
        let other = Server { timeline: 3, ..server(2, lsn(4, 0)) };
        let divergence = Divergence { timeline: 2, from_lsn: lsn(5, 1000), until_lsn: lsn(7, 0) };
        let refused = start(&stored, &other, OnDivergence::Refuse);
        assert_eq!(refused, Err(Refusal::Diverged(divergence)));
    }

    /// A recovery needs the beginning of a timeline's first segment, which the timeline before has.
    #[test]
    fn the_beginning_of_a_timeline_is_what_it_has_in_common_with_the_one_before() {
        let segment = |timeline| Segment { timeline, number: 5 };
        let cases = [
            ("only the parent, beyond the branch", stored(&[], &[(1, 5, 1800)], &[2]), 1000),
            ("only the parent, short of the branch", stored(&[], &[(1, 5, 700)], &[2]), 700),
            ("its own is shorter", stored(&[], &[(1, 5, 1000), (2, 5, 256)], &[2]), 1000),
            ("its own is longer", stored(&[], &[(1, 5, 1000), (2, 5, 1500)], &[2]), 1500),
            ("a complete parent", stored(&[(1, 5)], &[], &[2]), 1000),
            ("nothing", stored(&[], &[], &[2]), 0),
        ];
        for (name, stored, expected) in cases {
            assert_eq!(stored.within_reach(segment(2)), expected, "{name}");
        }
        let alone = stored(&[], &[(1, 5, 700)], &[]);
        assert_eq!(alone.goes_on(segment(1), 700), None);
        let branched = stored(&[], &[(1, 5, 700)], &[2]);
        assert!(branched.goes_on(segment(1), 700).unwrap().contains("timeline 2 branched off"));
        assert_eq!(branched.goes_on(segment(1), 1000), None);
        let later = stored(&[(1, 7)], &[(1, 5, 700)], &[]);
        assert!(later.goes_on(segment(1), 700).unwrap().contains("000000010000000000000007"));
    }

    #[test]
    fn an_old_primary_and_one_that_lost_wal_are_refused() {
        let two = stored(&[(1, 4), (2, 5)], &[], &[2]);
        let old = start(&two, &server(1, lsn(4, 0)), OnDivergence::Follow);
        assert_eq!(old, Err(Refusal::OldTimeline { found: 1, stored: 2 }));
        // A promotion alone is enough: nothing of the new timeline needs to be stored yet.
        let promoted = stored(&[(1, 4)], &[], &[2]);
        let old = start(&promoted, &server(1, lsn(4, 0)), OnDivergence::Follow);
        assert_eq!(old, Err(Refusal::OldTimeline { found: 1, stored: 2 }));

        let lost = Server { flush_lsn: lsn(5, 10), ..server(2, lsn(4, 0)) };
        let behind = start(&two, &lost, OnDivergence::Follow);
        let (found, stored) = (lsn(5, 10), lsn(6, 0));
        assert_eq!(behind, Err(Refusal::Behind { timeline: 2, found, stored }));
    }
}
