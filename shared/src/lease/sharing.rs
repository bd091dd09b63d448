//! Shares the groups out among the replicas of an agent, by keys in etcd.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::claim::Claim;
use super::holder::{Holder, POLL};
use super::share::share;
use super::shares::Names;
use super::view::{Jump, View};
use crate::etcd::{Change, Etcd, EtcdError, LeaseId, Watch};
use crate::telemetry::chain;

/// How long what has ended may take to notice, before another replica may begin.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at everything, in case that news was lost on the way.
const RECHECK: Duration = Duration::from_secs(5);
/// After etcd did not answer a watch.
const WATCH_RETRY: Duration = Duration::from_secs(1);

/// The task behind [`Shares`](super::Shares) and [`Leadership`](super::Leadership).
#[derive(Debug)]
pub struct Sharing {
    pub(super) etcd: Option<Etcd>,
    pub(super) names: Names,
    pub(super) groups: watch::Receiver<BTreeSet<u32>>,
    pub(super) ttl: Duration,
    pub(super) hand_over_limit: Duration,
    pub(super) publish: watch::Sender<BTreeMap<u32, Claim>>,
    pub(super) lost_since: watch::Sender<Option<DateTime<Utc>>>,
}

/// A group that is held and is to be given up.
#[derive(Debug)]
struct Leaving {
    since: Instant,
    /// When the claim was ended, if it was.
    ended_at: Option<Instant>,
}

/// What is known and under way.
#[derive(Debug, Default)]
struct Progress {
    replicas: View,
    leases: View,
    leaving: BTreeMap<u32, Leaving>,
    /// The lease with which the others were told that we are here.
    announced: Option<LeaseId>,
    /// Nothing is claimed before this: somebody may still believe in a claim whose key is gone.
    claims_from: Option<Instant>,
}

impl Sharing {
    /// Shares until `shutdown`, and then gives up what it holds as soon as nobody has a claim
    /// any more, or after 5 s.
    ///
    /// # Errors
    ///
    /// None: what goes wrong with etcd is logged and tried again, and meanwhile claims run out.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Some(etcd) = &self.etcd else {
            self.hold_all(&shutdown).await;
            return Ok(());
        };
        let (replica, lost_since) = (self.names.identity.replica.clone(), self.lost_since.clone());
        let holder = Holder::new(etcd.clone(), self.ttl, replica, lost_since);
        tokio::select! {
            () = shutdown.cancelled() => {}
            never = holder.keep_alive() => match never {},
            () = self.share_out(etcd, &holder) => {}
        }
        self.publish.send_replace(BTreeMap::new());
        let settled = timeout(SETTLE_LIMIT, async {
            tokio::select! {
                never = holder.keep_alive() => match never {},
                () = holder.unused() => {}
            }
        });
        if settled.await.is_err() {
            warn!("claims still in use at the end");
        }
        if let Err(error) = holder.close().await {
            warn!(error = %chain(&error), "lease not revoked: it runs out by itself");
        }
        Ok(())
    }

    /// The only replica has all groups.
    async fn hold_all(&self, shutdown: &CancellationToken) {
        let mut groups = self.groups.clone();
        loop {
            let all = groups.borrow_and_update().clone();
            let claims = all.into_iter().map(|group| (group, Claim::unlimited())).collect();
            self.publish.send_replace(claims);
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = changed(&mut groups) => {}
            }
        }
        self.publish.send_replace(BTreeMap::new());
    }

    /// Observes, decides and acts, for ever.
    async fn share_out(&self, etcd: &Etcd, holder: &Holder) {
        let mut replicas = Follower::new(etcd.watch(&self.names.replicas()));
        let mut leases = Follower::new(etcd.watch(&self.names.leases()));
        let mut groups = self.groups.clone();
        let mut progress = Progress::default();
        loop {
            self.look_for_jumps(holder, &mut progress).await;
            let held = holder.groups(|key| self.names.group_of(key));
            let wanted = self.decide(&progress, &groups.borrow_and_update().clone(), &held);
            if let Err(error) = self.act(etcd, holder, &mut progress, &wanted).await {
                warn!(error = %chain(&error), "groups not shared out");
            }
            self.show(holder, &progress);
            let wait = if progress.leaving.is_empty() { RECHECK } else { POLL };
            tokio::select! {
                change = replicas.next() => progress.replicas.take(change),
                change = leases.next() => progress.leases.take(change),
                () = changed(&mut groups) => {}
                () = holder.news() => {}
                () = sleep(wait) => {}
            }
        }
    }

    /// Where keys are gone unseen, begins anew, and not before every claim of then has run out: a
    /// replica that does not know yet that its lease is gone would be the second one otherwise.
    async fn look_for_jumps(&self, holder: &Holder, progress: &mut Progress) {
        if progress.replicas.take_jump().is_some() {
            progress.announced = None;
        }
        let Some(jump) = progress.leases.take_jump() else { return };
        progress.claims_from = Some(Instant::now() + self.ttl);
        let (replica, wait_seconds) = (&self.names.identity.replica, self.ttl.as_secs());
        if jump == Jump::Unseen {
            warn!(replica, wait_seconds, "leases are gone from etcd unseen: claiming waits");
            return;
        }
        warn!(
            replica,
            wait_seconds,
            "etcd was emptied, or restored from a snapshot: all claims end, and claiming waits"
        );
        progress.leaving.clear();
        if let Err(error) = holder.close().await {
            warn!(error = %chain(&error), "lease not revoked: it runs out by itself");
        }
    }

    /// The groups this replica should hold; none before etcd has told who else is there.
    fn decide(&self, progress: &Progress, groups: &BTreeSet<u32>, held: &[u32]) -> BTreeSet<u32> {
        if !progress.replicas.is_complete() || !progress.leases.is_complete() {
            return BTreeSet::new();
        }
        let me = &self.names.identity.replica;
        let mut present = progress.replicas.names(&self.names.replicas());
        present.insert(me.clone());
        let holder = |group: &u32| {
            let entry = progress.leases.get(&self.names.lease(*group))?;
            Some((*group, String::from_utf8_lossy(&entry.value).into_owned()))
        };
        let mut holders: BTreeMap<_, _> = groups.iter().filter_map(holder).collect();
        // The watch on the replicas may be ahead of the one on the groups, which then does not
        // show yet what we hold.
        holders.extend(held.iter().map(|group| (*group, me.clone())));
        let shares = share(groups, &present, &holders);
        shares.into_iter().filter(|(_, replica)| replica == me).map(|(group, _)| group).collect()
    }

    async fn act(
        &self,
        etcd: &Etcd,
        holder: &Holder,
        progress: &mut Progress,
        wanted: &BTreeSet<u32>,
    ) -> Result<(), EtcdError> {
        let Some(lease) = holder.lease() else { return Ok(()) };
        if progress.announced != Some(lease) {
            let replica = &self.names.identity.replica;
            let key = self.names.replicas() + replica;
            etcd.put(&key, replica, Some(lease)).await?;
            progress.announced = Some(lease);
        }
        if !progress.leases.is_complete() {
            return Ok(());
        }
        for group in holder.groups(|key| self.names.group_of(key)) {
            self.keep_or_release(holder, progress, group, wanted.contains(&group)).await?;
        }
        let may_claim = progress.claims_from.is_none_or(|from| from <= Instant::now());
        for &group in wanted.iter().filter(|_| may_claim) {
            let key = self.names.lease(group);
            let is_free = match progress.leases.get(&key) {
                None => true,
                // What is ours and not held was claimed by a request whose answer was lost.
                Some(entry) => entry.lease == Some(lease),
            };
            if is_free && holder.create_revision(&key).is_none() {
                holder.claim(&key).await?;
            }
        }
        self.delete_strays(etcd, holder, progress, lease, wanted).await
    }

    /// Takes the next step of handing over a group that is held, if another replica is to have
    /// it or has it.
    async fn keep_or_release(
        &self,
        holder: &Holder,
        progress: &mut Progress,
        group: u32,
        is_wanted: bool,
    ) -> Result<(), EtcdError> {
        let key = self.names.lease(group);
        let Some(create_revision) = holder.create_revision(&key) else { return Ok(()) };
        if progress.leases.has_lost(&key, create_revision) {
            holder.forget(&key);
            progress.leaving.remove(&group);
            return Ok(());
        }
        if is_wanted && progress.leaving.get(&group).is_none_or(|it| it.ended_at.is_none()) {
            progress.leaving.remove(&group);
            return Ok(());
        }
        let now = Instant::now();
        let Some(leaving) = progress.leaving.get_mut(&group) else {
            info!(group, "handing the group over");
            progress.leaving.insert(group, Leaving { since: now, ended_at: None });
            // It is shown no more before anybody counts who has the claim: the next step.
            return Ok(());
        };
        let is_over = |since: Instant, limit| limit <= now.duration_since(since);
        if leaving.ended_at.is_none() && is_over(leaving.since, self.hand_over_limit) {
            holder.end(&key);
            leaving.ended_at = Some(now);
        }
        let has_settled = leaving.ended_at.is_some_and(|since| is_over(since, SETTLE_LIMIT));
        if holder.is_unused(&key) || has_settled {
            leaving.ended_at = leaving.ended_at.or(Some(now));
            holder.release(&key).await?;
            progress.leaving.remove(&group);
        }
        Ok(())
    }

    /// Deletes keys that are bound to our lease and neither held nor wanted: a request whose
    /// answer was lost created them.
    async fn delete_strays(
        &self,
        etcd: &Etcd,
        holder: &Holder,
        progress: &Progress,
        lease: LeaseId,
        wanted: &BTreeSet<u32>,
    ) -> Result<(), EtcdError> {
        for entry in progress.leases.bound_to(lease) {
            let Some(group) = self.names.group_of(&entry.key) else { continue };
            if !wanted.contains(&group) && holder.create_revision(&entry.key).is_none() {
                etcd.delete(&entry.key, entry.create_revision).await?;
            }
        }
        Ok(())
    }

    /// Publishes what is held and not leaving, if that has changed.
    fn show(&self, holder: &Holder, progress: &Progress) {
        let held = holder.groups(|key| self.names.group_of(key));
        let mut groups: BTreeSet<u32> =
            held.into_iter().filter(|group| !progress.leaving.contains_key(group)).collect();
        self.publish.send_if_modified(|shown| {
            let before = shown.len();
            // A claim that ended is shown no more, even if the group was claimed afresh.
            shown.retain(|group, claim| groups.contains(group) && claim.is_valid());
            groups.retain(|group| !shown.contains_key(group));
            let is_smaller = shown.len() < before;
            let claim = |group| Some((group, holder.claim_on(&self.names.lease(group))?));
            let new: Vec<_> = groups.iter().copied().filter_map(claim).collect();
            let is_changed = is_smaller || !new.is_empty();
            shown.extend(new);
            is_changed
        });
    }
}

/// Resolves when the groups have changed; never once nobody can change them.
async fn changed(groups: &mut watch::Receiver<BTreeSet<u32>>) {
    if groups.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// A watch that says once that it is broken, and goes on trying.
struct Follower {
    watch: Watch,
    is_broken: bool,
}

impl Follower {
    fn new(watch: Watch) -> Self {
        Self { watch, is_broken: false }
    }

    /// May be dropped at any await.
    async fn next(&mut self) -> Change {
        loop {
            match self.watch.next().await {
                Ok(change) => {
                    self.is_broken = false;
                    return change;
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.is_broken, true) {
                        warn!(error = %chain(&error), "etcd cannot be watched");
                    }
                    sleep(WATCH_RETRY).await;
                }
            }
        }
    }
}
