//! Tasks that come and go with the members, and do not all do their work at the same moment.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::members::Members;

/// Between two looks at the members, if none of them changes.
const MEMBERS_EVERY: Duration = Duration::from_secs(10);
/// The fractional part of the golden ratio: its multiples are spread evenly over 0 to 1, however
/// many there are.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Numbers from 0 to 1, each as far from those before as can be: when each of many is to be asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread(f64);

impl Spread {
    /// Begins somewhere, so that replicas of an agent do not ask at the same moments.
    pub fn random() -> Self {
        let random = RandomState::new().hash_one(0) & u64::from(u16::MAX);
        Self(u16::try_from(random).map_or(0.0, f64::from) / f64::from(u16::MAX))
    }

    /// The next one.
    pub fn take(&mut self) -> f64 {
        self.0 = (self.0 + GOLDEN).fract();
        self.0
    }
}

/// Waits until the members have changed, or for ten seconds: those that left long ago are given up
/// by time alone. `tasks` are those that watch them, and others too.
///
/// # Errors
///
/// A task panicked, or nobody follows the topology any more.
pub async fn members_changed(
    members: &mut watch::Receiver<Option<Members>>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    tokio::select! {
        () = sleep(MEMBERS_EVERY) => {}
        changed = members.changed() => changed.context("follow the topology")?,
        Some(Err(error)) = tasks.join_next(), if !tasks.is_empty() => {
            // One that was aborted has nothing to say.
            if error.is_panic() {
                return Err(error).context("watch a component");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_are_asked_no_two_are_asked_together() {
        for count in [2_u32, 3, 10, 325, 1000] {
            let mut spread = Spread::random();
            let mut all: Vec<_> = (0..count).map(|_| spread.take()).collect();
            all.sort_by(f64::total_cmp);
            let widest = all.windows(2).map(|it| it[1] - it[0]).fold(0.0, f64::max);
            let narrowest = all.windows(2).map(|it| it[1] - it[0]).fold(1.0, f64::min);
            let even = 1.0 / f64::from(count);
            assert!(even / 3.0 < narrowest && widest < even * 2.0, "{count}: {narrowest} {widest}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_told_and_an_abort_is_not() {
        let (publish, mut members) = watch::channel(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(std::future::pending()).abort();
        members_changed(&mut members, &mut tasks).await.unwrap();
        assert!(tasks.is_empty());
        publish.send(None).unwrap();
        members_changed(&mut members, &mut tasks).await.unwrap();
        tasks.spawn(async { panic!("as it must be told") });
        let error = members_changed(&mut members, &mut tasks).await.unwrap_err();
        assert_eq!(error.to_string(), "watch a component");
    }
}
