//! What has to be seen more than once to be known; pure.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::types::PgLsn;

use super::query::Position;

/// What was seen of one server.
#[derive(Debug, Default)]
pub(super) struct Memory {
    role: Option<Role>,
    earlier: Option<(Duration, PgLsn)>,
    not_streaming_since: Option<Duration>,
    archiving_fails_since: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Role {
    /// Of this start of the server.
    started_at: DateTime<Utc>,
    in_recovery: bool,
    timeline: u32,
    /// `None` at the first look: it may be old.
    since: Option<Duration>,
}

/// What is known after a position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Known {
    pub(super) timeline: u32,
    pub(super) role_since: Option<Duration>,
    pub(super) earlier: Option<(Duration, PgLsn)>,
    pub(super) not_streaming_since: Option<Duration>,
}

impl Memory {
    /// Takes where a server that was started then is now.
    pub(super) fn take(
        &mut self,
        position: &Position,
        started_at: DateTime<Utc>,
        at: Duration,
    ) -> Known {
        let in_recovery = position.in_recovery;
        // Without a receiver the control file tells a timeline that may be long over.
        let received =
            self.role.filter(|it| it.in_recovery && in_recovery && it.started_at == started_at);
        let timeline = received.map_or(0, |it| it.timeline).max(position.timeline);
        let same = self.role.filter(|it| (it.in_recovery, it.timeline) == (in_recovery, timeline));
        let since = same.map_or(self.role.map(|_| at), |it| it.since);
        self.role = Some(Role { started_at, in_recovery, timeline, since });
        let now = position.lsn.map(|lsn| (at, lsn));
        let earlier = std::mem::replace(&mut self.earlier, now).filter(|_| same.is_some());
        let streams = position.receiver.as_ref().is_some_and(|it| it.status == "streaming");
        let gone_since = self.not_streaming_since.unwrap_or(at);
        self.not_streaming_since = (in_recovery && !streams).then_some(gone_since);
        let not_streaming_since = self.not_streaming_since;
        Known { timeline, role_since: since, earlier, not_streaming_since }
    }

    /// For how long archiving fails, if it does.
    pub(super) fn archiving(&mut self, fails: bool, at: Duration) -> Option<Duration> {
        let since = self.archiving_fails_since.unwrap_or(at);
        self.archiving_fails_since = fails.then_some(since);
        self.archiving_fails_since.map(|it| at.saturating_sub(it))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Receiver;
    use super::*;

    fn second(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    fn position(in_recovery: bool, timeline: u32, streams: bool) -> Position {
        let receiver = Receiver { status: "streaming".to_owned(), ..Receiver::default() };
        Position {
            in_recovery,
            clock: DateTime::UNIX_EPOCH,
            read_only: false,
            timeline,
            lsn: Some(7.into()),
            replay_paused: false,
            receiver: streams.then_some(receiver),
            apply_delay: Duration::ZERO,
            should_stream: in_recovery,
            connections: 1,
        }
    }

    #[test]
    fn a_role_is_known_since_it_was_seen_first() {
        let mut memory = Memory::default();
        let (first, restarted) = (DateTime::UNIX_EPOCH, DateTime::<Utc>::MAX_UTC);
        let seven = |at| Some((second(at), 7.into()));
        for (case, started_at, position, at, expected) in [
            ("first", first, position(true, 2, true), 1, (2, None, None, None)),
            ("the same", first, position(true, 2, true), 2, (2, None, seven(1), None)),
            ("no receiver", first, position(true, 1, false), 3, (2, None, seven(2), Some(3))),
            ("for longer", first, position(true, 1, false), 4, (2, None, seven(3), Some(3))),
            ("it streams again", first, position(true, 2, true), 5, (2, None, seven(4), None)),
            ("rewound", restarted, position(true, 1, false), 6, (1, Some(6), None, Some(6))),
            ("promoted", restarted, position(false, 3, false), 7, (3, Some(7), None, None)),
            ("a primary", restarted, position(false, 3, false), 8, (3, Some(7), seven(7), None)),
        ] {
            let (timeline, since, earlier, gone) = expected;
            let expected = Known {
                timeline,
                role_since: since.map(second),
                earlier,
                not_streaming_since: gone.map(second),
            };
            assert_eq!(memory.take(&position, started_at, second(at)), expected, "{case}");
        }
    }

    #[test]
    fn archiving_fails_since_it_was_seen_to() {
        let mut memory = Memory::default();
        for (at, fails, expected) in [
            (1, false, None),
            (2, true, Some(0)),
            (5, true, Some(3)),
            (6, false, None),
            (7, true, Some(0)),
        ] {
            assert_eq!(memory.archiving(fails, second(at)), expected.map(second), "{at}");
        }
    }
}
