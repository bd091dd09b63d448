//! One etcd lease, kept alive, and what is held with it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::claim::{BootInstant, Claim, Grant, valid_until};
use crate::etcd::{Etcd, EtcdError, LeaseId};
use crate::telemetry::chain;

/// After a failure to reach etcd.
const RETRY: Duration = Duration::from_secs(1);
/// Between two looks at who still has a claim.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// Holds keys of etcd with one lease.
#[derive(Debug)]
pub(super) struct Holder {
    etcd: Etcd,
    ttl: Duration,
    /// The value of each key: who holds it.
    replica: String,
    state: Mutex<State>,
    /// Told when a lease was granted or lost.
    news: Notify,
    /// Since when etcd grants and renews nothing, once that is longer than a lease lives.
    lost_since: watch::Sender<Option<DateTime<Utc>>>,
}

#[derive(Debug, Default)]
struct State {
    session: Option<Session>,
    held: BTreeMap<String, Held>,
}

/// The lease.
#[derive(Clone, Copy, Debug)]
struct Session {
    lease: LeaseId,
    ttl: Duration,
    valid_until: BootInstant,
}

/// A key that is ours.
#[derive(Debug)]
struct Held {
    create_revision: i64,
    grant: Grant,
    /// The claim was ended by us, and the key is still to be deleted.
    is_ending: bool,
}

impl Holder {
    pub(super) fn new(
        etcd: Etcd,
        ttl: Duration,
        replica: String,
        lost_since: watch::Sender<Option<DateTime<Utc>>>,
    ) -> Self {
        Self { etcd, ttl, replica, state: Mutex::default(), news: Notify::new(), lost_since }
    }

    /// The lease, as long as it is ours by our own clock.
    pub(super) fn lease(&self) -> Option<LeaseId> {
        let session = self.lock().session;
        session.filter(|it| BootInstant::now() < it.valid_until).map(|it| it.lease)
    }

    /// Resolves when a lease was granted or lost.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    /// Gets a lease and keeps it alive; another one when it is lost.
    pub(super) async fn keep_alive(&self) -> Infallible {
        let mut is_late = false;
        let (mut at, mut since) = (BootInstant::now(), Utc::now());
        loop {
            let session = self.lock().session;
            let outcome = match session {
                Some(session) => self.renew(session).await,
                None => self.begin().await,
            };
            let wait = match outcome {
                Ok(ttl) => {
                    is_late = false;
                    (at, since) = (BootInstant::now(), Utc::now());
                    if self.lost_since.send_replace(None).is_some() {
                        info!(replica = self.replica, "etcd answers again");
                    }
                    ttl / 3
                }
                Err(EtcdError::LeaseGone { .. }) => {
                    warn!(replica = self.replica, "lease lost");
                    self.lose();
                    continue;
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_late, true) {
                        warn!(replica = self.replica, error = %chain(&error), "lease renewal late");
                    }
                    if self.lease().is_none()
                        && valid_until(at, self.ttl) <= BootInstant::now()
                        && self.lost_since.send_replace(Some(since)).is_none()
                    {
                        let replica = &self.replica;
                        error!(
                            replica, error = %chain(&error),
                            "etcd grants no lease: until it answers, this replica does nothing that one \
                             replica alone may do. See to etcd"
                        );
                    }
                    RETRY
                }
            };
            sleep(wait).await;
        }
    }

    async fn begin(&self) -> Result<Duration, EtcdError> {
        let asked_at = BootInstant::now();
        let (lease, ttl) = self.etcd.grant(self.ttl).await?;
        let valid_until = valid_until(asked_at, ttl);
        self.lock().session = Some(Session { lease, ttl, valid_until });
        self.news.notify_one();
        Ok(ttl)
    }

    async fn renew(&self, session: Session) -> Result<Duration, EtcdError> {
        let asked_at = BootInstant::now();
        self.etcd.keep_alive(session.lease).await?;
        let valid_until = valid_until(asked_at, session.ttl);
        let mut state = self.lock();
        if state.session.map(|it| it.lease) != Some(session.lease) {
            // It was given up meanwhile.
            return Ok(session.ttl);
        }
        state.session = Some(Session { valid_until, ..session });
        let now = BootInstant::now();
        let before = state.held.len();
        // A claim that ran out meanwhile stays over, although the key is still ours: it is
        // claimed afresh.
        state.held.retain(|_, held| held.is_ending || held.grant.renew(now, valid_until));
        let is_news = state.held.len() < before;
        drop(state);
        if is_news {
            warn!(replica = self.replica, "lease renewed too late");
            self.news.notify_one();
        }
        Ok(session.ttl)
    }

    /// The lease is gone, and with it all keys.
    fn lose(&self) {
        let mut state = self.lock();
        state.session = None;
        for held in std::mem::take(&mut state.held).values() {
            held.grant.end();
        }
        drop(state);
        self.news.notify_one();
    }

    /// Claims a key; returns whether it is ours now. Otherwise somebody else has it.
    pub(super) async fn claim(&self, key: &str) -> Result<bool, EtcdError> {
        let Some(lease) = self.lease() else { return Ok(false) };
        let entry = self.etcd.create(key, &self.replica, lease).await?;
        if entry.lease != Some(lease) {
            return Ok(false);
        }
        let mut state = self.lock();
        // What was lost while we asked is not ours any more.
        let Some(session) = state.session.filter(|it| it.lease == lease) else { return Ok(false) };
        let grant = Grant::new(session.valid_until);
        let create_revision = entry.create_revision;
        state.held.insert(key.to_owned(), Held { create_revision, grant, is_ending: false });
        info!(key, replica = self.replica, "claimed");
        Ok(true)
    }

    /// What `group_of` makes of the keys that are held.
    pub(super) fn groups(&self, group_of: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
        self.lock().held.keys().filter_map(|key| group_of(key)).collect()
    }

    /// A claim on a key that is held.
    pub(super) fn claim_on(&self, key: &str) -> Option<Claim> {
        self.lock().held.get(key).map(|held| held.grant.claim())
    }

    /// The revision in which a key that is held was created.
    pub(super) fn create_revision(&self, key: &str) -> Option<i64> {
        self.lock().held.get(key).map(|held| held.create_revision)
    }

    /// Tells whether nobody has a claim on a key any more.
    pub(super) fn is_unused(&self, key: &str) -> bool {
        self.lock().held.get(key).is_none_or(|held| held.grant.is_dropped())
    }

    /// Ends the claim on a key, which stays ours in etcd.
    pub(super) fn end(&self, key: &str) {
        if let Some(held) = self.lock().held.get_mut(key) {
            held.is_ending = true;
            held.grant.end();
        }
    }

    /// Gives a key up that etcd says is not ours any more.
    pub(super) fn forget(&self, key: &str) {
        if let Some(held) = self.lock().held.remove(key) {
            held.grant.end();
            warn!(key, replica = self.replica, "claim taken away");
        }
    }

    /// Ends the claim on a key and deletes it, if it is still the one we created.
    pub(super) async fn release(&self, key: &str) -> Result<(), EtcdError> {
        self.end(key);
        let Some(create_revision) = self.create_revision(key) else { return Ok(()) };
        self.etcd.delete(key, create_revision).await?;
        self.lock().held.remove(key);
        info!(key, replica = self.replica, "released");
        Ok(())
    }

    /// Resolves when nobody has a claim any more.
    pub(super) async fn unused(&self) {
        while self.lock().held.values().any(|held| !held.grant.is_dropped()) {
            sleep(POLL).await;
        }
    }

    /// Ends all claims and the lease, which deletes all keys bound to it and no others.
    pub(super) async fn close(&self) -> Result<(), EtcdError> {
        let session = self.lock().session;
        self.lose();
        match session {
            Some(session) => self.etcd.revoke(session.lease).await,
            None => Ok(()),
        }
    }

    /// No code that holds this lock can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
