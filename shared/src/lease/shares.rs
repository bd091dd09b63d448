//! What an agent asks: which groups it may act on now, or whether it leads.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rustix::system::uname;
use tokio::sync::watch;

use super::claim::Claim;
use super::sharing::Sharing;
use crate::etcd::{Etcd, EtcdError, KeyValue};

/// How long a lease lives without being kept alive, unless set otherwise: so long the groups of
/// a replica that was killed are without one. Renewed after a third of it.
pub const TTL: Duration = Duration::from_secs(15);
/// Whose keys they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's name in etcd: `demo` of `/pgmesh/demo/…`.
    pub cluster: String,
    /// The agent, such as `backup-agent`.
    pub agent: String,
    /// This replica, unlike any other: [`replica_name`].
    pub replica: String,
}

/// A name for this replica that tells an operator where it runs: `<host>-<process id>`.
pub fn replica_name() -> String {
    let host = uname().nodename().to_string_lossy().replace('/', "_");
    format!("{host}-{}", std::process::id())
}

/// The groups this replica may act on now, each with its claim. Clones show the same.
#[derive(Clone, Debug)]
pub struct Shares {
    held: watch::Receiver<BTreeMap<u32, Claim>>,
    lost_since: watch::Receiver<Option<DateTime<Utc>>>,
}

impl Shares {
    /// Shares groups out among the replicas that use the same etcd; without one, this replica
    /// has all groups. [`Sharing::run`] does it, until then there are none.
    ///
    /// `groups` are those there are. `hand_over_limit` is how long a claim stays valid after
    /// another replica is to have the group: it is given up as soon as nobody holds the claim.
    /// `ttl` is usually [`TTL`]; etcd takes whole seconds, 2 or more.
    pub fn new(
        etcd: Option<Etcd>,
        identity: Identity,
        groups: watch::Receiver<BTreeSet<u32>>,
        ttl: Duration,
        hand_over_limit: Duration,
    ) -> (Self, Sharing) {
        let (publish, held) = watch::channel(BTreeMap::new());
        let (tell_loss, lost_since) = watch::channel(None);
        let names = Names { identity, is_one: false };
        let sharing =
            Sharing { etcd, names, groups, ttl, hand_over_limit, publish, lost_since: tell_loss };
        (Self { held, lost_since }, sharing)
    }

    /// The groups this replica may act on, each with its claim. A group that another replica is
    /// to have is not among them; a claim on it that is still held may be valid nevertheless, so
    /// that what is under way can be finished. Do not keep a claim longer than needed.
    pub fn held(&self) -> BTreeMap<u32, Claim> {
        let mut held = self.held.borrow().clone();
        held.retain(|_, claim| claim.is_valid());
        held
    }

    /// The claim on one group, if this replica may act on it.
    pub fn claim(&self, group: u32) -> Option<Claim> {
        self.held.borrow().get(&group).filter(|claim| claim.is_valid()).cloned()
    }

    /// Resolves when [`held`](Self::held) may have changed since the last call; never again once
    /// the sharing has ended. A claim that runs out by itself is not told: see [`Claim::ended`].
    pub async fn changed(&mut self) {
        if self.held.changed().await.is_err() {
            pending::<()>().await;
        }
    }

    /// Since when etcd grants no lease, once that is so long that nothing is held for it. Who holds a group
    /// is not known then.
    pub fn lost_since(&self) -> Option<DateTime<Utc>> {
        *self.lost_since.borrow()
    }
}

/// Which replica of an agent leads. Clones show the same.
#[derive(Clone, Debug)]
pub struct Leadership(Shares);

/// The group that stands for leading.
pub(super) const LEADING: u32 = 0;

impl Leadership {
    /// Lets one of the replicas that use the same etcd lead, for as long as it is there; without
    /// etcd, this replica does. See [`Shares::new`].
    pub fn new(etcd: Option<Etcd>, identity: Identity, ttl: Duration) -> (Self, Sharing) {
        let (_, groups) = watch::channel(BTreeSet::from([LEADING]));
        let (shares, sharing) = Shares::new(etcd, identity, groups, ttl, Duration::ZERO);
        let names = Names { is_one: true, ..sharing.names };
        (Self(shares), Sharing { names, ..sharing })
    }

    /// The claim, if this replica leads.
    pub fn claim(&self) -> Option<Claim> {
        self.0.claim(LEADING)
    }

    /// Resolves when [`claim`](Self::claim) may have changed since the last call.
    pub async fn changed(&mut self) {
        self.0.changed().await;
    }
}

/// Which replica of an agent that shares groups holds which, as etcd has it.
///
/// # Errors
///
/// Fails when no endpoint answers, or etcd refuses.
pub async fn holders(
    etcd: &Etcd,
    cluster: &str,
    agent: &str,
) -> Result<BTreeMap<u32, String>, EtcdError> {
    let [cluster, agent, replica] = [cluster, agent, ""].map(str::to_owned);
    let names = Names { identity: Identity { cluster, agent, replica }, is_one: false };
    let entries = etcd.list(&names.leases()).await?.entries;
    let holder = |it: &KeyValue| {
        Some((names.group_of(&it.key)?, String::from_utf8_lossy(&it.value).into_owned()))
    };
    Ok(entries.iter().filter_map(holder).collect())
}

/// Which replica of an agent of which one leads does, as etcd has it; `None` if none does.
///
/// # Errors
///
/// Fails when no endpoint answers, or etcd refuses.
pub async fn leader(etcd: &Etcd, cluster: &str, agent: &str) -> Result<Option<String>, EtcdError> {
    let [cluster, agent, replica] = [cluster, agent, ""].map(str::to_owned);
    let names = Names { identity: Identity { cluster, agent, replica }, is_one: true };
    let found = etcd.get(&names.lease(LEADING)).await?;
    Ok(found.map(|it| String::from_utf8_lossy(&it.value).into_owned()))
}

/// The names of the keys.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) identity: Identity,
    /// There is one thing to hold, not one for each group.
    is_one: bool,
}

impl Names {
    fn below(&self, kind: &str) -> String {
        let Identity { cluster, agent, .. } = &self.identity;
        format!("/pgmesh/{cluster}/{kind}/{agent}")
    }

    pub(super) fn replicas(&self) -> String {
        self.below("replica") + "/"
    }

    pub(super) fn lease(&self, group: u32) -> String {
        let lease = self.below("lease");
        if self.is_one { lease } else { format!("{lease}/{group}") }
    }

    /// The group that a key stands for.
    pub(super) fn group_of(&self, key: &str) -> Option<u32> {
        if self.is_one {
            return (key == self.lease(LEADING)).then_some(LEADING);
        }
        key.strip_prefix(&self.leases())?.parse().ok()
    }

    /// What to watch for all the keys of [`lease`](Self::lease).
    pub(super) fn leases(&self) -> String {
        let lease = self.below("lease");
        if self.is_one { lease } else { lease + "/" }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn identity() -> Identity {
        let [cluster, agent, replica] = ["demo", "backup-agent", "r1"].map(str::to_owned);
        Identity { cluster, agent, replica }
    }

    #[test]
    fn keys_are_named_as_the_design_says() {
        let (_, groups) = watch::channel(BTreeSet::new());
        let (_, sharing) = Shares::new(None, identity(), groups, TTL, Duration::ZERO);
        assert_eq!(sharing.names.replicas(), "/pgmesh/demo/replica/backup-agent/");
        assert_eq!(sharing.names.lease(7), "/pgmesh/demo/lease/backup-agent/7");
        assert_eq!(sharing.names.group_of("/pgmesh/demo/lease/backup-agent/7"), Some(7));
        assert_eq!(sharing.names.group_of("/pgmesh/demo/lease/backup-agent/x"), None);
        let (_, sharing) = Leadership::new(None, identity(), TTL);
        assert_eq!(sharing.names.lease(LEADING), "/pgmesh/demo/lease/backup-agent");
        assert_eq!(sharing.names.group_of("/pgmesh/demo/lease/backup-agent"), Some(LEADING));
        assert_eq!(sharing.names.group_of("/pgmesh/demo/lease/backup-agent-2"), None);
        assert!(!replica_name().is_empty());
    }

    #[tokio::test]
    async fn without_etcd_one_replica_has_all_groups() {
        let (set, groups) = watch::channel(BTreeSet::from([0, 1]));
        let (mut shares, sharing) = Shares::new(None, identity(), groups, TTL, Duration::ZERO);
        let shutdown = CancellationToken::new();
        assert!(shares.held().is_empty());
        let run = sharing.run(shutdown.clone());
        let look = async {
            shares.changed().await;
            assert_eq!(shares.held().into_keys().collect::<Vec<_>>(), [0, 1]);
            set.send_replace(BTreeSet::from([1, 2]));
            shares.changed().await;
            assert!(shares.claim(0).is_none());
            assert!(shares.claim(2).is_some_and(|claim| claim.is_valid()));
            shutdown.cancel();
            shares.changed().await;
            assert!(shares.held().is_empty());
        };
        let (outcome, ()) = tokio::join!(run, look);
        outcome.unwrap();
    }
}
