//! Bounded, jittered retry. It stops on success, on an error that will not go away by itself,
//! when the attempts are used up, and on shutdown.

use std::error::Error;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::telemetry::chain;

/// How often and how fast to try again.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// How often the operation is tried in all, the first time included. 0 counts as 1.
    pub attempts_max: usize,
    /// The wait after the first failure; each later one doubles it. To each a random part of
    /// itself is added, so that agents that failed together do not come back together.
    pub first_wait: Duration,
    /// The longest wait, before that random part.
    pub longest_wait: Duration,
}

/// Runs `operation` until it succeeds; `None` when `shutdown` came first.
///
/// `operation` is given the number of the attempt, from 1. A failure that `is_transient` is
/// logged with the name `what` and tried again; any other, and the last, is returned. On
/// shutdown an attempt under way is dropped, so `operation` must bear that.
///
/// # Errors
///
/// The error of the last attempt.
pub async fn retry<T, E, F>(
    what: &'static str,
    policy: Policy,
    is_transient: impl Fn(&E) -> bool,
    shutdown: &CancellationToken,
    mut operation: impl FnMut(usize) -> F,
) -> Option<Result<T, E>>
where
    E: Error + 'static,
    F: Future<Output = Result<T, E>>,
{
    let mut waits = ExponentialBuilder::new()
        .with_min_delay(policy.first_wait)
        .with_max_delay(policy.longest_wait)
        .with_max_times(policy.attempts_max.saturating_sub(1))
        .with_jitter()
        .build();
    let until_done = async {
        let mut attempt = 1;
        loop {
            let error = match operation(attempt).await {
                Ok(value) => return Ok(value),
                Err(error) if !is_transient(&error) => return Err(error),
                Err(error) => error,
            };
            let Some(wait) = waits.next() else { return Err(error) };
            let wait_ms = wait.as_millis();
            warn!(operation = what, attempt, wait_ms, error = %chain(&error), "trying again");
            sleep(wait).await;
            attempt += 1;
        }
    };
    tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        outcome = until_done => Some(outcome),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::io;

    use tokio::time::Instant;

    use super::*;

    const POLICY: Policy = Policy {
        attempts_max: 4,
        first_wait: Duration::from_secs(1),
        longest_wait: Duration::from_secs(2),
    };

    fn refused() -> io::Error {
        io::Error::from(io::ErrorKind::ConnectionRefused)
    }

    #[tokio::test(start_paused = true)]
    async fn a_transient_error_is_tried_again_until_it_goes_away() {
        let shutdown = CancellationToken::new();
        let outcome = retry(
            "test",
            POLICY,
            |_| true,
            &shutdown,
            |attempt| async move { if attempt < 3 { Err(refused()) } else { Ok(attempt) } },
        );
        assert_eq!(outcome.await.unwrap().unwrap(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_and_waits_are_bounded() {
        let shutdown = CancellationToken::new();
        let began_at = Instant::now();
        let mut attempts = 0;
        let outcome: Option<Result<(), _>> = retry(
            "test",
            POLICY,
            |_| true,
            &shutdown,
            |_| {
                attempts += 1;
                async { Err(refused()) }
            },
        )
        .await;
        assert_eq!(outcome.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(attempts, 4);
        // Waits of 1, 2 and 2 seconds, each at most doubled.
        let waited = began_at.elapsed();
        assert!((5..=10).contains(&waited.as_secs()), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_permanent_error_is_returned_at_once() {
        let shutdown = CancellationToken::new();
        let mut attempts = 0;
        let outcome: Option<Result<(), _>> = retry(
            "test",
            POLICY,
            |_| false,
            &shutdown,
            |_| {
                attempts += 1;
                async { Err(refused()) }
            },
        )
        .await;
        assert!(outcome.unwrap().is_err());
        assert_eq!(attempts, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_ends_an_attempt_under_way_and_a_wait() {
        let shutdown = CancellationToken::new();
        let stop = async {
            sleep(Duration::from_millis(100)).await;
            shutdown.cancel();
        };
        let stuck =
            retry("test", POLICY, |_: &io::Error| true, &shutdown, |_| pending::<Result<(), _>>());
        let (outcome, ()) = tokio::join!(stuck, stop);
        assert!(outcome.is_none());
        // The token is cancelled: nothing is tried at all.
        let again = retry("test", POLICY, |_: &io::Error| true, &shutdown, |_| async { Ok(()) });
        assert!(again.await.is_none());
    }
}
