//! Whether a standby's WAL is part of the primary's history: decided before any lag.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

/// Where the primary's history left a timeline. `pg_monitor` may not read the history file, so
/// this is what was seen: the position is one of these two, or between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// The timeline that was left.
    pub timeline: u32,
    /// How far the new primary had replayed it when it was last seen in recovery; 0 if it was not.
    pub not_before: u64,
    /// How far the new primary had written when it was first seen out of recovery.
    pub not_after: u64,
}

/// What a standby's WAL is to the primary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinship {
    /// A part of it.
    Shared,
    /// It has something that the primary has not.
    Diverged,
    /// It is on a timeline that was left or begun by another primary, one that is not known.
    Newer,
    /// Too little is known.
    Unclear,
}

/// Tells what the WAL of a standby, replayed up to `replay_lsn`, is to that of a primary on
/// timeline `current`, whose history left the older ones at `forks`, oldest first.
///
/// `timeline` is the newest of which the standby surely has WAL, and has replayed no newer one.
pub fn kinship(forks: &[Fork], current: u32, timeline: u32, replay_lsn: u64) -> Kinship {
    match timeline.cmp(&current) {
        Ordering::Equal => Kinship::Shared,
        Ordering::Greater => Kinship::Newer,
        // A later timeline was not left before an earlier one.
        Ordering::Less => match left(forks, timeline) {
            Some(fork) if fork.not_after < replay_lsn => Kinship::Diverged,
            Some(fork) if fork.timeline == timeline && replay_lsn <= fork.not_before => {
                Kinship::Shared
            }
            _ => Kinship::Unclear,
        },
    }
}

/// How much of `lsn`, a position on `timeline`, surely is part of the primary's history.
pub fn shared_part(forks: &[Fork], current: u32, timeline: u32, lsn: u64) -> u64 {
    match left(forks, timeline) {
        Some(fork) if timeline < current => lsn.min(fork.not_before),
        _ => lsn,
    }
}

/// The first known fork at which `timeline` had been left.
fn left(forks: &[Fork], timeline: u32) -> Option<&Fork> {
    forks.iter().find(|fork| fork.timeline >= timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORKS: [Fork; 2] = [
        Fork { timeline: 2, not_before: 500, not_after: 600 },
        Fork { timeline: 4, not_before: 800, not_after: 800 },
    ];

    #[test]
    fn a_standby_that_is_beyond_the_fork_has_diverged() {
        for (name, timeline, replay_lsn, expected) in [
            ("the primary's timeline", 5, 900, Kinship::Shared),
            ("a newer one", 6, 100, Kinship::Newer),
            ("behind the fork", 4, 700, Kinship::Shared),
            ("at the fork", 4, 800, Kinship::Shared),
            ("beyond the fork", 4, 801, Kinship::Diverged),
            ("an older timeline, behind its fork", 2, 500, Kinship::Shared),
            ("an older timeline, where the fork may be", 2, 550, Kinship::Unclear),
            ("an older timeline, where the fork was already", 2, 600, Kinship::Unclear),
            ("an older timeline, beyond its fork", 2, 601, Kinship::Diverged),
            ("a timeline whose fork was not seen", 1, 400, Kinship::Unclear),
            ("such a timeline, beyond a later fork", 1, 601, Kinship::Diverged),
            ("the branch between two forks", 3, 801, Kinship::Diverged),
        ] {
            assert_eq!(kinship(&FORKS, 5, timeline, replay_lsn), expected, "{name}");
        }
        assert_eq!(kinship(&[], 2, 1, 1), Kinship::Unclear);
    }

    #[test]
    fn what_was_received_beyond_the_fork_does_not_count() {
        for (timeline, lsn, expected) in
            [(4, 700, 700), (4, 900, 800), (2, 900, 500), (5, 900, 900)]
        {
            assert_eq!(shared_part(&FORKS, 5, timeline, lsn), expected);
        }
    }
}
