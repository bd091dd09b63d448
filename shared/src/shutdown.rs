//! SIGTERM and SIGINT as a future.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Installs the handlers, and returns a future that resolves to the name of the first signal.
///
/// Call it before anything is opened, so that no signal is lost between the start and the wait.
///
/// # Errors
///
/// Fails when the operating system refuses a handler, or outside a tokio runtime with I/O.
pub fn signalled() -> io::Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn a_signal_sent_before_the_wait_is_not_lost() {
        let stop = signalled().unwrap();
        kill_process(getpid(), Signal::TERM).unwrap();
        assert_eq!(stop.await, "SIGTERM");
    }
}
