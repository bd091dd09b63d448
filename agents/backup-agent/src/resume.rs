//! Where receiving WAL goes on, or why it must not. Pure.
//!
//! The server's slot holds back what the repository had not been proven to hold; the repository
//! may hold more by now. So the way goes from the slot's position along the server's own history,
//! past everything that is stored, to the first byte that is not.

use serde::Deserialize;
use shared::pg::wal::{HistoryEntry, Segment, segment_number};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::rival::Line;
use crate::wal::{WalMap, conflict};

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

impl Server {
    fn line(&self) -> Line<'_> {
        Line { timeline: self.timeline, history: &self.history }
    }
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
         that came back, or a copy was promoted with --archive-mode preserve. {}", remedy(*.stored)
    )]
    OldTimeline {
        /// What the server writes.
        found: u32,
        /// The newest in the repository.
        stored: u32,
    },
    /// The repository knows another timeline of that number.
    #[error(
        "its timeline {timeline} began at {}, and the timeline {timeline} that the repository holds at {}: \
         two servers were promoted. {}", place(*.found), place(*.stored), remedy(*.timeline)
    )]
    OtherTimeline {
        /// The number.
        timeline: u32,
        /// Where it began, by the server's history.
        found: Option<PgLsn>,
        /// Where it began, by the stored history.
        stored: Option<PgLsn>,
    },
    /// The server lost WAL, or another one wrote the same timeline.
    #[error(
        "its WAL ends at {found} on timeline {timeline}, and the repository holds {stored}. Was it \
         put back from a copy, or did its disk lose writes? Then it lost what was on its disk, and the \
         repository has it: restore it. Did it lose nothing? Then another server wrote the same timeline \
         and has stored {segment}. {}", conflict::remedy(.segment)
    )]
    Behind {
        /// The segment in which the repository's WAL ends.
        segment: String,
        /// The timeline.
        timeline: u32,
        /// Where the server's WAL ends.
        found: PgLsn,
        /// Where the repository's ends.
        stored: PgLsn,
    },
    /// A segment on its way is stored with two contents.
    #[error(
        "CONFLICT: WAL segment {segment} is stored with two contents ({found}): two servers wrote the \
         same timeline, and nothing is received past it. {}", conflict::remedy(.segment)
    )]
    Conflict {
        /// The segment.
        segment: String,
        /// The objects.
        found: String,
    },
    /// The server's history leaves out what is stored.
    #[error(
        "its history parts at {} from timeline {}, which the repository holds up to {}: \
         {} bytes of WAL, and the commits in them, are not on it. Either restore the repository's \
         timeline {}, or accept the loss with wal.on_divergence = \"follow\"",
        .0.from_lsn, .0.timeline, .0.until_lsn, .0.bytes(), .0.timeline
    )]
    Diverged(Divergence),
}

/// What to do where either of two servers may be the database.
fn remedy(stored: u32) -> String {
    format!(
        "Do the applications write to another server? Then stop this one, make it a standby \
         (pg_rewind), or take it out of the configuration. Do they write to this one? Then stop the copy, \
         and remove what it has stored: `backup-agent expire --timeline {stored}`"
    )
}

fn place(lsn: Option<PgLsn>) -> String {
    lsn.map_or("an unknown place".to_owned(), |lsn| lsn.to_string())
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
    if let Some((timeline, stored, found)) = server.line().contradicted(stored) {
        return Err(Refusal::OtherTimeline { timeline, found, stored });
    }
    // A history alone, which the new primary's archiver may have stored before us, is no WAL.
    let newest = stored.newest_with_wal().unwrap_or(0);
    let end = stored.end_of(newest);
    if let Some(end) = end
        && newest == server.timeline
        && end > server.flush_lsn
    {
        let (timeline, found) = (newest, server.flush_lsn);
        let number = segment_number(PgLsn::from(u64::from(end) - 1), stored.segment_bytes);
        let segment = Segment { timeline, number }.name(stored.segment_bytes);
        return Err(Refusal::Behind { segment, timeline, found, stored: end });
    }
    let diverged = diverged(stored, server);
    if let (Some(divergence), OnDivergence::Refuse) = (diverged, on_divergence) {
        return Err(Refusal::Diverged(divergence));
    }

    let at_slot = segment_start(stored, server.slot_lsn);
    let from_slot = walk(stored, server, at_slot)?;
    if from_slot.lsn > at_slot {
        return Ok(Start { at: from_slot, or_else: None, diverged });
    }
    // Nothing is stored where the slot begins. Is there something before it to go on from?
    let slot = Position { timeline: on(server, at_slot), lsn: at_slot };
    match last_before(stored, server, at_slot) {
        Some(before) => {
            Ok(Start { at: walk(stored, server, before)?, or_else: Some(slot), diverged })
        }
        None => Ok(Start { at: slot, or_else: None, diverged }),
    }
}

/// The complete segment after which receiving goes on, if what is stored ends there: another server may
/// have stored it, or this one before it was put back from a copy.
pub fn to_compare(stored: &WalMap, server: &Server, at: Position) -> Option<Segment> {
    let before =
        u64::from(at.lsn).checked_sub(1).filter(|_| at.lsn == segment_start(stored, at.lsn))?;
    let before = PgLsn::from(before);
    let position = Position { timeline: on(server, before), lsn: before };
    let segment = position.segment(stored.segment_bytes);
    (stored.objects(segment).len() == 1).then_some(segment)
}

/// The first segment after a position that is on the server's way, of those that it has.
pub fn oldest_after(
    there: impl IntoIterator<Item = Segment>,
    server: &Server,
    at: Position,
    segment_bytes: u64,
) -> Option<Position> {
    let begins = |segment: Segment| PgLsn::from(segment.number * segment_bytes);
    let is_there = |segment: &Segment| {
        let lsn = begins(*segment);
        let last = PgLsn::from(u64::from(lsn) + segment_bytes - 1);
        // What is renamed to be written again is beyond. A timeline that ends in a segment is sent from
        // the copy that the next one begins with.
        at.lsn < lsn && lsn <= server.flush_lsn && on(server, last) == segment.timeline
    };
    let lsn = there.into_iter().filter(is_there).map(begins).min()?;
    Some(Position { timeline: on(server, lsn), lsn })
}

/// The timeline that the server's history has at a position.
fn on(server: &Server, lsn: PgLsn) -> u32 {
    let entry = server.history.iter().find(|entry| entry.switch_lsn > lsn);
    entry.map_or(server.timeline, |entry| entry.timeline)
}

/// Where the server's history and that of a stored timeline part: where the first of the two left the last
/// timeline that both have.
fn left_at(stored: &WalMap, server: &Server, timeline: u32) -> PgLsn {
    let own = stored.histories.get(&timeline).map_or(&[][..], Vec::as_slice);
    let left = |entry: &HistoryEntry| {
        let own = own.iter().find(|it| it.timeline == entry.timeline).map(|it| it.switch_lsn);
        let own = if entry.timeline == timeline { Some(entry.switch_lsn) } else { own };
        own.map(|own| own.min(entry.switch_lsn))
    };
    server.history.iter().rev().find_map(left).unwrap_or(PgLsn::from(0))
}

/// What is stored and not on the server's way, unless it parted from that before a timeline from which was
/// received: then it was told. Its archiver may have stored WAL of the server's own before us.
fn diverged(stored: &WalMap, server: &Server) -> Option<Divergence> {
    let parts = server.line().parts();
    let told = parts.filter(|(timeline, _)| stored.followed.contains(timeline)).last();
    let told = told.map(|(_, before)| before.last().map_or(PgLsn::from(0), |it| it.switch_lsn));
    let newest = stored.newest_with_wal();
    let is_new = |timeline: u32, from_lsn: PgLsn| match told {
        Some(began) => began < from_lsn,
        // A repository of before that was kept.
        None => Some(timeline) == newest,
    };
    let beyond = |timeline: u32| {
        let (from_lsn, until_lsn) = (left_at(stored, server, timeline), stored.end_of(timeline)?);
        (from_lsn < until_lsn && is_new(timeline, from_lsn)).then_some(Divergence {
            timeline,
            from_lsn,
            until_lsn,
        })
    };
    let mut others = stored.with_wal().into_iter().rev().filter(|it| *it < server.timeline);
    others.find_map(beyond)
}

/// Goes from `lsn` along the server's history to the first byte that is not stored; not past a segment with
/// two contents.
fn walk(stored: &WalMap, server: &Server, mut lsn: PgLsn) -> Result<Position, Refusal> {
    loop {
        let timeline = on(server, lsn);
        let number = segment_number(lsn, stored.segment_bytes);
        let segment = Segment { timeline, number };
        if let Some(found) = stored.conflict(segment) {
            return Err(Refusal::Conflict { segment: segment.name(stored.segment_bytes), found });
        }
        let end = number * stored.segment_bytes + stored.covered(segment);
        let left = server.history.iter().find(|entry| entry.timeline == timeline);
        let next = left.map_or(end, |entry| end.min(entry.switch_lsn.into()));
        if next <= u64::from(lsn) {
            return Ok(Position { timeline, lsn });
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
    fn nothing_is_received_past_a_segment_with_two_contents() {
        let segment = Segment { timeline: 1, number: 4 };
        let mut differs = stored(&[(1, 3), (1, 4), (1, 5)], &[(1, 4, 700)], &[]);
        differs.different.insert(segment, vec!["a piece".to_owned()]);
        let mut twice = stored(&[(1, 3), (1, 4), (1, 5)], &[], &[]);
        let objects = twice.segments.get_mut(&1).unwrap().get_mut(&4).unwrap();
        objects.push(objects[0].clone());
        for stored in [differs, twice] {
            for slot in [lsn(3, 0), lsn(4, 100)] {
                let refused = start(&stored, &server(1, slot), OnDivergence::Follow).unwrap_err();
                let text = refused.to_string();
                assert!(matches!(refused, Refusal::Conflict { .. }), "{text}");
                assert!(text.contains("wal-push pg_wal/000000010000000000000004"), "{text}");
            }
            let beyond = start(&stored, &server(1, lsn(5, 0)), OnDivergence::Follow);
            assert_eq!(beyond.unwrap().at, at(1, lsn(6, 0)), "the slot is beyond it");
        }
    }

    #[test]
    fn what_ends_with_a_complete_segment_is_compared_with_the_server() {
        let segment = |timeline, number| Some(Segment { timeline, number });
        let whole = |numbers: &[(u32, u64)]| stored(numbers, &[], &[2]);
        for (case, stored, timeline, at, expected) in [
            ("at a boundary", whole(&[(1, 3), (1, 4)]), 1, at(1, lsn(5, 0)), segment(1, 4)),
            ("in a segment", whole(&[(1, 4)]), 1, at(1, lsn(5, 700)), None),
            ("after a gap", whole(&[(1, 3)]), 1, at(1, lsn(5, 0)), None),
            ("nothing is stored", whole(&[]), 1, at(1, lsn(0, 0)), None),
            ("on a later timeline", whole(&[(1, 4), (2, 5)]), 2, at(2, lsn(6, 0)), segment(2, 5)),
        ] {
            let server = server(timeline, lsn(4, 0));
            assert_eq!(to_compare(&stored, &server, at), expected, "{case}");
        }
    }

    #[test]
    fn after_a_gap_receiving_goes_on_with_the_oldest_segment_that_the_server_has() {
        let there = |timelines: &[(u32, u64)]| {
            let segment =
                |(timeline, number): &(u32, u64)| Segment { timeline: *timeline, number: *number };
            timelines.iter().map(segment).collect::<Vec<_>>()
        };
        for (case, numbers, timeline, expected) in [
            ("some were removed", &[(1, 7), (1, 6), (1, 8)][..], 1, Some(at(1, lsn(6, 0)))),
            ("those before are no help", &[(1, 2), (1, 3), (1, 7)], 1, Some(at(1, lsn(7, 0)))),
            ("those of later use are none", &[(1, 10), (1, 11)], 1, None),
            ("of a timeline that was left", &[(1, 6), (2, 7)], 2, Some(at(2, lsn(7, 0)))),
            ("where the timeline ends", &[(2, 5), (2, 6)], 2, Some(at(1, lsn(5, 0)))),
            ("none", &[], 1, None),
        ] {
            let server = server(timeline, lsn(3, 0));
            let found = oldest_after(there(numbers), &server, at(1, lsn(3, 100)), SEGMENT);
            assert_eq!(found, expected, "{case}");
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

        // The new primary's archiver may have stored some of the new timeline before us: it is no news
        // once that was received from.
        let both = stored(&[(1, 4)], &[(1, 5, 1800), (2, 5, 1100)], &[2]);
        for (case, followed, expected) in [
            ("nobody knows", &[][..], None),
            ("only the one before was received from", &[1], Some(divergence)),
            ("it was told", &[1, 2], None),
            ("the one before is older than the marks", &[2], None),
        ] {
            let followed = followed.iter().copied().collect();
            let stored = WalMap { followed, ..both.clone() };
            let start = start(&stored, &promoted, OnDivergence::Follow).unwrap();
            assert_eq!((start.at, start.diverged), (at(2, lsn(5, 1100)), expected), "{case}");
        }
    }

    /// An old primary archives its end when it comes back, long after the failover was told.
    #[test]
    fn what_was_left_before_the_last_failover_is_no_news() {
        let left = |timeline, segment| HistoryEntry {
            timeline,
            switch_lsn: lsn(segment, 1000),
            reason: String::new(),
        };
        let history = vec![left(1, 5), left(2, 7)];
        let server = Server { timeline: 3, history, ..server(3, lsn(4, 0)) };
        let both = |second| {
            let mut map =
                stored(&[(1, 4), (1, 5), (1, 6), (2, 5), (2, 6)], &[(2, 7, second)], &[2]);
            map.followed = [1, 2].into();
            start(&map, &server, OnDivergence::Follow).unwrap().diverged
        };
        assert_eq!(both(1000), None, "timeline 1 was left when timeline 2 was received from");
        let (from_lsn, until_lsn) = (lsn(7, 1000), lsn(7, 1800));
        assert_eq!(both(1800), Some(Divergence { timeline: 2, from_lsn, until_lsn }));
    }

    /// The first new primary lost nothing, and the second has nothing of it: the history of the first, which it
    /// may have read, names its timeline.
    #[test]
    fn a_timeline_of_which_the_server_has_only_the_number_tells_nothing() {
        let left = |timeline, at| HistoryEntry { timeline, switch_lsn: at, reason: String::new() };
        let mut stored = stored(&[(1, 4), (1, 5), (2, 6)], &[(2, 7, 300)], &[]);
        stored.histories.insert(2, vec![left(1, lsn(6, 0))]);
        stored.followed = [1, 2].into();
        let history = vec![left(1, lsn(4, 96)), left(2, lsn(4, 96))];
        let server = Server { timeline: 3, history, ..server(3, lsn(4, 0)) };
        let (from_lsn, until_lsn) = (lsn(4, 96), lsn(7, 300));
        let divergence = Divergence { timeline: 2, from_lsn, until_lsn };
        let refused = start(&stored, &server, OnDivergence::Refuse);
        assert_eq!(refused, Err(Refusal::Diverged(divergence)));
        assert_eq!(
            start(&stored, &server, OnDivergence::Follow).unwrap().diverged,
            Some(divergence)
        );
    }

    #[test]
    fn a_branch_of_another_timeline_is_a_divergence_from_where_it_left() {
        // Stored: timeline 2 up to segment 7. The server's timeline 3 left timeline 1 as well.
        let stored = stored(&[(1, 4), (2, 5), (2, 6)], &[], &[2]);
        let other = Server { timeline: 3, ..server(2, lsn(4, 0)) };
        let divergence = Divergence { timeline: 2, from_lsn: lsn(5, 1000), until_lsn: lsn(7, 0) };
        let refused = start(&stored, &other, OnDivergence::Refuse);
        assert_eq!(refused, Err(Refusal::Diverged(divergence)));
        // The old primary wrote on for longer than timeline 2 did, and was promoted then.
        let left = HistoryEntry { switch_lsn: lsn(8, 0), ..history().remove(0) };
        let later = Server { history: vec![left], ..other };
        let refused = start(&stored, &later, OnDivergence::Refuse);
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
        let segment = "000000020000000000000005".to_owned();
        assert_eq!(behind, Err(Refusal::Behind { segment, timeline: 2, found, stored }));

        // Both were promoted: which of the two is the database, a person knows.
        let branched = HistoryEntry { switch_lsn: lsn(6, 10), ..history().remove(0) };
        let next = HistoryEntry { timeline: 2, switch_lsn: lsn(8, 0), ..branched.clone() };
        for (timeline, history) in [(2, vec![branched.clone()]), (3, vec![branched, next])] {
            let other = Server { timeline, history, ..server(2, lsn(4, 0)) };
            let (found, stored) = (Some(lsn(6, 10)), Some(lsn(5, 1000)));
            let refused = start(&two, &other, OnDivergence::Follow);
            assert_eq!(refused, Err(Refusal::OtherTimeline { timeline: 2, found, stored }));
        }
    }

    #[test]
    fn who_is_refused_for_another_timeline_reads_what_to_do_in_either_case() {
        let (found, stored) = (Some(lsn(6, 10)), Some(lsn(5, 1000)));
        for refusal in [
            Refusal::OldTimeline { found: 1, stored: 2 },
            Refusal::OtherTimeline { timeline: 2, found, stored },
        ] {
            let text = refusal.to_string();
            for part in ["pg_rewind", "stop the copy", "`backup-agent expire --timeline 2`"] {
                assert!(text.contains(part), "{text}");
            }
        }
    }
}
