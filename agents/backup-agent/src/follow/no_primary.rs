//! A group of which no primary is seen: how soon it is looked for again, and what the log says.

use std::time::Duration;

use shared::telemetry::chain;
use shared::topology::{Group, GroupError, Role};

use super::cluster::{NotLed, states};
use tokio::time::Instant;
use tracing::{info, warn};

/// How often the servers are asked while there is a primary.
pub(super) const WATCH_EVERY: Duration = Duration::from_secs(10);
/// How often while there was one a moment ago: commits may wait for us, and a restart takes moments.
const SOON: Duration = Duration::from_millis(500);
/// For so long.
const SOON_FOR: Duration = Duration::from_secs(30);
/// How often after that.
const LATER: Duration = Duration::from_secs(2);
/// A restart or a switchover that is over within this is not told.
const TELL_AFTER: Duration = Duration::from_secs(10);
/// How often it is told again.
const TELL_EVERY: Duration = Duration::from_mins(10);

/// Since when no primary is seen, and when that was told.
#[derive(Debug, Default)]
pub(super) struct NoPrimary {
    since: Option<Instant>,
    told_at: Option<Instant>,
}

impl NoPrimary {
    /// Takes note that there is a primary.
    pub(super) fn is_over(&mut self, node: &str) {
        if self.told_at.is_some() {
            info!(node, "a primary is there again: WAL is received from it");
        }
        *self = Self::default();
    }

    /// Takes note that there is none; says so if it lasts.
    pub(super) fn goes_on(&mut self, group: &Group, reason: &NotLed, is_received: bool) {
        let since = *self.since.get_or_insert_with(Instant::now);
        if !is_due(since.elapsed(), self.told_at.map(|at| at.elapsed())) {
            return;
        }
        self.told_at = Some(Instant::now());
        let unknown =
            group.unknown().map(|(node, error)| format!("{}: {}", node.name, chain(error)));
        let unknown = unknown.collect::<Vec<_>>().join("; ");
        let has_primary = states(group).any(|(_, state)| state.role == Role::Primary);
        let next = next_step(reason, has_primary);
        if is_received {
            warn!(error = %reason, unknown, "no primary is seen; WAL goes on to be received. {next}");
        } else {
            warn!(error = %reason, unknown, "WAL is not being received. {next}");
        }
    }

    /// How long after a look the next one is.
    pub(super) fn look_every(&self) -> Duration {
        look_every(self.since.map(|since| since.elapsed()))
    }

    /// The shortest wait between two looks.
    pub(super) const fn at_least() -> Duration {
        SOON
    }
}

fn look_every(without: Option<Duration>) -> Duration {
    match without {
        None => WATCH_EVERY,
        Some(without) if without < SOON_FOR => SOON,
        Some(_) => LATER,
    }
}

fn is_due(without: Duration, told: Option<Duration>) -> bool {
    without >= TELL_AFTER && told.is_none_or(|told| told >= TELL_EVERY)
}

fn next_step(reason: &NotLed, has_primary: bool) -> &'static str {
    match reason {
        NotLed::Group(GroupError::NoPrimary { .. }) if has_primary => {
            "Do the applications write to another server, on the newer timeline? Then start that, and make \
             the old primary a standby (pg_rewind). Do they write to this one? Then stop who was promoted \
             beside it, take that out of the configuration, and remove what it has stored: `backup-agent expire \
             --timeline`"
        }
        NotLed::Group(GroupError::NoPrimary { .. }) => {
            "Start the primary, or promote a standby; if it runs, does the configuration name it, and may \
             the agent log in?"
        }
        NotLed::Group(GroupError::SeveralPrimaries { .. }) => "Stop the one that should not write",
        NotLed::Group(GroupError::SeveralClusters { .. }) => {
            "Take those of another cluster out of the configuration"
        }
        // They say it themselves.
        NotLed::Cluster(_) => "See the error",
        NotLed::Repository(_) => {
            "Mend the repository, or take those of another cluster out of the configuration"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn who_was_there_a_moment_ago_is_looked_for_soon() {
        let cases = [
            ("there is one", None, WATCH_EVERY),
            ("gone just now", Some(secs(0)), SOON),
            ("a slow restart", Some(secs(29)), SOON),
            ("for long", Some(secs(30)), LATER),
        ];
        for (case, without, expected) in cases {
            assert_eq!(look_every(without), expected, "{case}");
        }
    }

    #[test]
    fn nobody_is_to_be_promoted_beside_an_old_primary() {
        let none = || GroupError::NoPrimary { group: 0, nodes: Vec::new() }.into();
        assert!(next_step(&none(), false).contains("promote a standby"));
        assert!(!next_step(&none(), true).contains("promote a standby"));
    }

    #[test]
    fn what_lasts_is_told_once_in_ten_minutes() {
        let cases = [
            ("a restart", secs(9), None, false),
            ("it lasts", secs(10), None, true),
            ("told a moment ago", secs(20), Some(secs(10)), false),
            ("told long ago", secs(700), Some(secs(600)), true),
        ];
        for (case, without, told, expected) in cases {
            assert_eq!(is_due(without, told), expected, "{case}");
        }
    }
}
