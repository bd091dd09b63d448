//! A shutdown that we hold up.
//!
//! A server that shuts down waits until each connected standby has confirmed that it flushed
//! everything (`WalSndDone` in `walsender.c`), for ever: `wal_sender_timeout` ends only who is
//! silent. So a store that takes nothing would keep the server from stopping as long as one request
//! to it may take. The way out is to give the stream up: the slot keeps what is not stored.

use std::time::Duration;

use shared::pg::connect::connect;
use shared::pg::{ConnectError, Node, Settings};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::PgLsn;

use super::Following;
use crate::receive::Received;

/// Between two looks. What was received so long ago and is not stored makes a server wait.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A server that shuts down waits for us so long, counted from the look that noticed it. With the
/// looks before it, it is 30 s at most: half of what `pg_ctl stop` waits.
const PATIENCE: Duration = Duration::from_secs(15);

/// Resolves when `node` is shutting down and has waited long enough for what it sent to be stored.
///
/// A slow store is given up too, since nobody knows how much there is to come; but only by a server
/// that shuts down, so it is never begun again and again.
pub(super) async fn held_up(
    settings: &Settings,
    node: &Node,
    following: watch::Receiver<Following>,
) {
    let (mut before, mut noticed_at) = (None, None);
    loop {
        sleep(LOOK_EVERY).await;
        let received = following.borrow().received;
        let is_behind = is_behind(received, before);
        before = received.map(|it| it.received_lsn);
        // In this order: the server is asked only while the store is behind.
        if !is_behind || !is_shutting_down(settings, node).await {
            noticed_at = None;
        } else if noticed_at.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
            return;
        }
    }
}

/// Whether anything that was received before the last look is not stored yet.
fn is_behind(received: Option<Received>, before: Option<PgLsn>) -> bool {
    received.zip(before).is_some_and(|(received, before)| received.stored_lsn < before)
}

/// A server to which we have a stream and that takes nobody else is shutting down: one that starts
/// has no streams, and one that is full says so in other words. Source: `canAcceptConnections` in
/// `postmaster.c`.
async fn is_shutting_down(settings: &Settings, node: &Node) -> bool {
    match connect(settings, node).await {
        Err(ConnectError::NotNow { source, .. }) => {
            source.code() == Some(&SqlState::CANNOT_CONNECT_NOW)
        }
        Ok(_) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_stored_what_came_before_the_last_look_holds_nobody_up() {
        let received = |stored: u64, received: u64| {
            let (stored_lsn, received_lsn) = (stored.into(), received.into());
            Some(Received { timeline: 1, received_lsn, stored_lsn, server_lsn: received_lsn })
        };
        for (case, now, before, expected) in [
            ("nothing is received", None, Some(10), false),
            ("the first look", received(0, 10), None, false),
            ("all is stored", received(10, 10), Some(10), false),
            ("only what came since is not", received(10, 99), Some(10), false),
            ("the store takes nothing", received(9, 10), Some(10), true),
            ("the store is slow", received(50, 99), Some(60), true),
            ("not compared yet", received(0, 10), Some(10), true),
        ] {
            assert_eq!(is_behind(now, before.map(PgLsn::from)), expected, "{case}");
        }
    }
}
