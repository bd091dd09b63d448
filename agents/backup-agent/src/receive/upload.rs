//! Uploads that take long. A store that hangs says nothing until a limit of minutes, and the server
//! keeps WAL meanwhile: so we say it.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::ReceiveError;

/// An upload that has taken so long is told, and again each time it has taken twice as long.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Waits for the upload of an object, and says so if it takes long.
pub(super) async fn told<T>(
    object: &str,
    upload: impl Future<Output = Result<T, ReceiveError>>,
) -> Result<T, ReceiveError> {
    let began_at = Instant::now();
    let done = doubling(upload, |elapsed| {
        warn!(
            object,
            elapsed_s = elapsed.as_secs(),
            "an upload is still under way: the repository hangs or is too slow. WAL is not acknowledged \
             meanwhile, and the slot keeps it"
        );
    });
    let done = done.await;
    // Why it failed is told by who stops receiving.
    if done.is_ok() && began_at.elapsed() >= LONG {
        let elapsed_s = began_at.elapsed().as_secs();
        info!(object, elapsed_s, "the upload that took long is over: the object is stored");
    }
    done
}

/// Waits for something; tells how long that has taken at [`LONG`], and each time it has doubled.
async fn doubling<T>(work: impl Future<Output = T>, mut tell: impl FnMut(Duration)) -> T {
    let (began_at, mut tell_after) = (Instant::now(), LONG);
    let mut work = pin!(work);
    loop {
        if let Ok(done) = timeout_at(began_at + tell_after, &mut work).await {
            return done;
        }
        tell(tell_after);
        tell_after *= 2;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_told_each_time_it_has_doubled() {
        let cases: [(u64, &[u64]); 6] = [
            (0, &[]),
            (29, &[]),
            (31, &[30]),
            (59, &[30]),
            (61, &[30, 60]),
            (500, &[30, 60, 120, 240, 480]),
        ];
        for (seconds, expected) in cases {
            let mut told = Vec::new();
            let work = sleep(Duration::from_secs(seconds));
            doubling(work, |elapsed| told.push(elapsed.as_secs())).await;
            assert_eq!(told, expected, "{seconds} s");
        }
    }
}
