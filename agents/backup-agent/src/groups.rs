//! The groups that this replica is responsible for: receives the WAL of each as long as its claim
//! lasts.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use shared::lease::{Claim, Shares};
use shared::topology::{Topology, groups};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span};

use crate::backup::Context;
use crate::follow::Follower;
use crate::metrics::State;

/// Keeps `known` up to date with the groups that the topology has.
///
/// # Errors
///
/// None: the groups stay what they were while the topology is unknown.
pub async fn keep_known(
    topology: Topology,
    known: watch::Sender<BTreeSet<u32>>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut members = topology.subscribe();
    loop {
        let nodes = members.borrow_and_update().as_ref().map(shared::topology::Members::nodes);
        if let Some(nodes) = nodes {
            let now = groups(&nodes);
            known.send_if_modified(|known| {
                let changed = *known != now;
                *known = now;
                changed
            });
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = members.changed() => changed.context("the topology ended")?,
        }
    }
}

/// Works for each group that this replica holds, until `shutdown`.
///
/// # Errors
///
/// A part of it panicked.
pub async fn work(
    context: Context,
    state: State,
    mut shares: Shares,
    needs_backup: mpsc::Sender<u32>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut running: JoinSet<u32> = JoinSet::new();
    let mut held: BTreeMap<u32, CancellationToken> = BTreeMap::new();
    loop {
        let claims = shares.held();
        for (group, stop) in &held {
            if !claims.contains_key(group) {
                stop.cancel();
            }
        }
        for (group, claim) in claims {
            if held.contains_key(&group) {
                continue;
            }
            let follower = Follower::new(context.clone(), group, needs_backup.clone());
            let receives = follower.context.config.wal.receive;
            state.took(group, receives.then(|| follower.state.subscribe()));
            let stop = shutdown.child_token();
            held.insert(group, stop.clone());
            let work = work_for(follower, claim, stop);
            running.spawn(work.instrument(info_span!("group", group)));
        }
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = shares.changed() => {}
            Some(ended) = running.join_next() => {
                let group = ended.context("work for a group")?;
                held.remove(&group);
                state.left(group);
            }
        }
    }
    while let Some(ended) = running.join_next().await {
        ended.context("work for a group")?;
    }
    Ok(())
}

/// Receives the WAL of a group while the claim on it lasts; returns the group.
async fn work_for(follower: Follower, claim: Claim, stop: CancellationToken) -> u32 {
    info!("responsible for the group");
    if follower.context.config.wal.receive {
        Box::pin(follower.run(&claim, stop)).await;
    } else {
        tokio::select! {
            () = stop.cancelled() => {}
            () = claim.ended() => {}
        }
    }
    info!("not responsible for the group any more");
    follower.group
}
