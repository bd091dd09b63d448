//! One component that is asked for ever: on time, at once when its connection ends, and more often where
//! it matters.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::clock;
use crate::component::Component;
use crate::facts::{Facts, Failure, Of, Stage};
use crate::monitor::Monitor;
use crate::pace::{Course, Pace, SECOND_LOOK};
use crate::probe::Probe;

/// A primary is asked so many times as often as others: one that hangs is only missed by a question, and
/// nobody takes writes meanwhile.
const LEADS: u32 = 2;
/// The servers of a group that lost its primary are asked so often: so exactly it is known for how long
/// nobody took writes.
const SEARCH_EVERY: Duration = Duration::from_millis(100);

/// Asks a component for ever.
pub async fn ask_for_ever<P: Probe>(
    monitor: Monitor,
    of: fn(&mut Facts) -> &mut Of<P::Facts>,
    component: Component,
    mut probe: P,
    pace: Pace,
) {
    sleep(pace.wait).await;
    let mut course = Course::default();
    let leads = || pace.searches.is_some() && monitor.state().primaries.has(&component);
    loop {
        let asked_at = Instant::now();
        let soon = asked_at + SECOND_LOOK.min(pace.every);
        let limits = (course.limit(leads(), pace.limit), pace.limit);
        let failed = ask(&mut probe, &monitor, of, &component, limits).await;
        let every = if leads() { pace.every / LEADS } else { pace.every };
        let due = asked_at + course.pause(failed, every);
        let sooner = async {
            tokio::select! {
                () = probe.lost() => {
                    monitor.lost(of, &component, clock::now());
                    sleep_until(soon).await;
                }
                () = searched(&monitor, pace.searches) => {
                    sleep_until(asked_at + SEARCH_EVERY.min(pace.every)).await;
                }
            }
        };
        tokio::select! {
            () = sleep_until(due) => {}
            () = sooner => {}
        }
    }
}

async fn searched(monitor: &Monitor, group: Option<u32>) {
    match group {
        Some(group) => monitor.leaderless(group).await,
        None => std::future::pending().await,
    }
}

/// Asks once and records the outcome; returns how far it got if it failed. Of the limits the first is that of
/// this question, and the second that of any: what it says is that nobody answers within that.
async fn ask<P: Probe>(
    probe: &mut P,
    monitor: &Monitor,
    of: impl FnOnce(&mut Facts) -> &mut Of<P::Facts>,
    component: &Component,
    (limit, usual_limit): (Duration, Duration),
) -> Option<Stage> {
    let asked_at = clock::now();
    let outcome = timeout(limit, probe.ask()).await.unwrap_or_else(|_| {
        let error = format!("no answer within {}", humantime::format_duration(usual_limit));
        Err(Failure { stage: Stage::Timeout, error })
    });
    let failed = outcome.as_ref().err().map(|it| it.stage);
    monitor.record(of, component, (asked_at, clock::now()), outcome);
    failed
}
