//! A key that says that something goes on, as long as it does.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;

use super::holder::Holder;
use super::shares::TTL;
use crate::etcd::Etcd;
use crate::telemetry::chain;

/// Between two looks whether the key is there, and bound to the lease of now.
const RECHECK: Duration = Duration::from_secs(5);

/// Works, and keeps a key in etcd meanwhile, whoever had it before. The key is gone when the work has ended,
/// and a [`TTL`] after it was dropped or the process was killed. What goes wrong with etcd is logged and
/// tried again.
pub async fn during<W: Future>(etcd: &Etcd, key: &str, replica: &str, work: W) -> W::Output {
    let holder = Holder::new(etcd.clone(), TTL, replica.to_owned(), watch::Sender::new(None));
    let done = tokio::select! {
        never = holder.keep_alive() => match never {},
        never = keep(etcd, &holder, key, replica) => match never {},
        done = work => done,
    };
    if let Err(error) = holder.close().await {
        warn!(key, error = %chain(&error), "lease not revoked: it runs out by itself");
    }
    done
}

/// Binds a key to each lease that the holder gets, and again where etcd has lost it: a lease may
/// outlive its keys in a snapshot.
async fn keep(etcd: &Etcd, holder: &Holder, key: &str, replica: &str) -> Infallible {
    let mut bound = None;
    loop {
        let lease = holder.lease();
        if bound.is_some() && matches!(etcd.get(key).await, Ok(None)) {
            bound = None;
        }
        if lease.is_some() && lease != bound {
            if let Err(error) = etcd.put(key, replica, lease).await {
                warn!(key, error = %chain(&error), "others are not told; trying again");
            } else {
                bound = lease;
            }
        }
        tokio::select! {
            () = holder.news() => {}
            () = sleep(RECHECK) => {}
        }
    }
}
