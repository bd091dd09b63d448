//! A claim that runs out by our own clock.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::sleep;

/// A moment on a clock that goes on while the machine is suspended, unlike the one that tokio
/// and `std::time::Instant` use. Processes of one machine share it.
///
/// Source: `CLOCK_BOOTTIME` in `clock_gettime(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootInstant(Duration);

impl BootInstant {
    /// The moment this is called.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        Self(Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default()))
    }

    /// Time since the machine started.
    pub fn since_boot(self) -> Duration {
        self.0
    }

    /// A moment that never comes.
    fn never() -> Self {
        Self(Duration::MAX)
    }

    fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

/// Until when a lease is ours for certain, if it was granted or kept alive by a request sent at
/// `asked_at`.
///
/// The time of asking counts, not of the answer: etcd let the `ttl` begin no earlier. A tenth of
/// it is left out, for what is under way when it ends and for clocks of different speed.
pub(super) fn valid_until(asked_at: BootInstant, ttl: Duration) -> BootInstant {
    asked_at.saturating_add(ttl / 10 * 9)
}

/// The right to act on something. Clones are the same claim.
///
/// It is renewed behind the holder's back as long as that succeeds. Once over, it stays over;
/// who gets the same right again gets another claim.
#[derive(Clone, Debug)]
pub struct Claim {
    /// `None` once it was given up.
    valid_until: watch::Receiver<Option<BootInstant>>,
}

/// The other end of a claim: renews and ends it.
#[derive(Debug)]
pub(super) struct Grant(watch::Sender<Option<BootInstant>>);

impl Claim {
    /// A claim that is valid for good: of the only replica there is.
    pub fn unlimited() -> Self {
        Self { valid_until: watch::channel(Some(BootInstant::never())).1 }
    }

    /// Tells whether the holder may act now. Asks nobody but the clock.
    pub fn is_valid(&self) -> bool {
        let valid_until = *self.valid_until.borrow();
        valid_until.is_some_and(|until| BootInstant::now() < until)
    }

    /// Works as long as the claim is valid, which is asked before each step: whatever `work` waited
    /// for, and however long this process or machine was stopped meanwhile, it does not go on
    /// afterwards. `None` if the claim was over first.
    pub async fn guard<W: Future>(&self, work: W) -> Option<W::Output> {
        let mut work = pin!(work);
        let mut ended = pin!(self.ended());
        poll_fn(|context| {
            // This is what has somebody wake us when it is over.
            if ended.as_mut().poll(context).is_ready() || !self.is_valid() {
                return Poll::Ready(None);
            }
            work.as_mut().poll(context).map(Some)
        })
        .await
    }

    /// Resolves when the claim is over, whether or not etcd can be asked.
    ///
    /// A timer does not run while the process or the machine is stopped: what wakes up asks
    /// [`is_valid`](Self::is_valid) before it acts.
    pub async fn ended(&self) {
        let mut valid_until = self.valid_until.clone();
        loop {
            let until = *valid_until.borrow_and_update();
            let left = until.map(|until| until.0.saturating_sub(BootInstant::now().0));
            let Some(left) = left.filter(|left| !left.is_zero()) else { return };
            tokio::select! {
                () = sleep(left) => {}
                // Without its other end it is not renewed any more, and runs out.
                Ok(()) = valid_until.changed() => {}
            }
        }
    }
}

impl Grant {
    pub(super) fn new(valid_until: BootInstant) -> Self {
        Self(watch::channel(Some(valid_until)).0)
    }

    /// A claim on what was granted.
    pub(super) fn claim(&self) -> Claim {
        Claim { valid_until: self.0.subscribe() }
    }

    /// Prolongs the claim, unless it is over at `now`; tells whether it was prolonged.
    pub(super) fn renew(&self, now: BootInstant, valid_until: BootInstant) -> bool {
        self.0.send_if_modified(|current| match current {
            Some(until) if now < *until => {
                *until = valid_until.max(*until);
                true
            }
            _ => false,
        })
    }

    /// Ends the claim now.
    pub(super) fn end(&self) {
        self.0.send_replace(None);
    }

    /// Tells whether nobody has the claim any more.
    pub(super) fn is_dropped(&self) -> bool {
        self.0.receiver_count() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(15);

    fn at(milliseconds: u64) -> BootInstant {
        BootInstant(Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_lease_is_ours_from_the_moment_of_asking_for_less_than_its_time() {
        assert_eq!(valid_until(at(1_000), TTL), at(14_500));
        assert_eq!(valid_until(at(0), Duration::from_secs(2)), at(1_800));
    }

    #[test]
    fn a_claim_is_prolonged_while_valid_and_never_revived() {
        for (case, now, until, renewed, expected) in [
            ("in time", 13_499, 19_000, true, Some(at(19_000))),
            ("an answer that was overtaken", 9_000, 13_000, true, Some(at(13_500))),
            ("a moment too late", 13_500, 19_000, false, Some(at(13_500))),
        ] {
            let grant = Grant::new(at(13_500));
            let claim = grant.claim();
            assert_eq!(grant.renew(at(now), at(until)), renewed, "{case}");
            assert_eq!(*claim.valid_until.borrow(), expected, "{case}");
            grant.end();
            assert!(!grant.renew(at(0), at(99_000)), "{case}: ended");
            assert!(!claim.is_valid(), "{case}: ended");
        }
    }

    #[test]
    fn validity_is_judged_by_the_clock_of_now() {
        let now = BootInstant::now();
        assert!(Grant::new(valid_until(now, TTL)).claim().is_valid());
        let long_ago = BootInstant(now.0.saturating_sub(TTL));
        assert!(!Grant::new(valid_until(long_ago, TTL)).claim().is_valid());
        assert!(Claim::unlimited().is_valid());
    }

    /// The work is ready to go on at every moment, as after a stop; no timer is asked.
    #[tokio::test]
    async fn guarded_work_makes_no_step_after_its_claim() {
        let grant = Grant::new(BootInstant::now().saturating_add(TTL));
        let claim = grant.claim();
        assert_eq!(claim.guard(async { 1 }).await, Some(1));
        let mut steps = 0;
        let work = async {
            loop {
                steps += 1;
                if steps == 3 {
                    grant.end();
                }
                tokio::task::yield_now().await;
            }
        };
        assert_eq!(claim.guard(work).await, None::<()>);
        assert_eq!(steps, 3);

        let over = Grant::new(BootInstant(Duration::ZERO));
        let mut stepped = false;
        assert_eq!(over.claim().guard(async { stepped = true }).await, None);
        assert!(!stepped);
    }

    #[tokio::test]
    async fn a_claim_ends_when_it_runs_out_or_is_ended_even_without_its_other_end() {
        let now = BootInstant::now();
        let grant = Grant::new(now.saturating_add(Duration::from_millis(30)));
        let claim = grant.claim();
        drop(grant);
        claim.ended().await;
        assert!(!claim.is_valid());

        let grant = Grant::new(now.saturating_add(TTL));
        let claim = grant.claim();
        tokio::join!(claim.ended(), async { grant.end() });
        assert!(!claim.is_valid());
        assert!(!grant.is_dropped());
        drop(claim);
        assert!(grant.is_dropped());
    }
}
