//! The service: takes the scheduled backups, applies the retention, and watches the repository.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use shared::admin::Admin;
use shared::backoff::{Policy, retry};
use shared::lease::{Identity, Shares, TTL, replica_name};
use shared::pg::wal::Segment;
use shared::tasks::Tasks;
use shared::telemetry::chain;
use shared::topology::Topology;
use shared::{metrics, shutdown, topology};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};

use crate::backup::{BackupError, Context, is_drained, take_backup};
use crate::catalog::Catalog;
use crate::commands::AGENT;
use crate::config::Config;
use crate::expire;
use crate::groups;
use crate::keys::EXPOSED;
use crate::manifest::Commit;
use crate::metrics::{RepositoryState, State};
use crate::outlook::{leading, outlook};
use crate::progress::Progress;
use crate::repository::{Place, Repository, RepositoryError};
use crate::wal::{self, WalError, WalMap};

/// Longest sleep before the clock is read again, so that a clock step or a suspended host delays
/// a backup by a minute and not by a day.
const CLOCK_RECHECK: Duration = Duration::from_mins(1);
/// How often the repository is read for the metrics.
const OBSERVE_EVERY: Duration = Duration::from_mins(1);
/// Limit on one reading; the next one tries again.
const OBSERVE_LIMIT: Duration = Duration::from_mins(5);
/// How long receiving may take to stop when another replica is to have the group.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(10);
/// Requests for a backup that wait; one more is dropped, and made again in a minute.
const WANTED_MAX: usize = 64;
/// A scheduled backup that fails for a passing reason is tried again.
const RETRY: Policy = Policy {
    attempts_max: 4,
    first_wait: Duration::from_secs(30),
    longest_wait: Duration::from_mins(10),
};

/// Runs until a signal, or until a part of the agent fails.
///
/// # Errors
///
/// The configuration cannot be used, or a task ended.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    let memory_bytes_max = config.backup.upload().memory_bytes();
    info!(?config, memory_bytes_max, "agent started");
    let context = Context::new(config, &format!("pgmesh/{AGENT}")).await?;
    let config = &context.config;
    if let Some(files) = config.encryption.exposed() {
        warn!(files, "{EXPOSED}");
    }

    let identity = Identity {
        cluster: config.cluster.clone(),
        agent: AGENT.to_owned(),
        replica: replica_name(),
    };
    let (known, groups) = watch::channel(BTreeSet::new());
    let (shares, sharing) =
        Shares::new(context.etcd.clone(), identity, groups, TTL, HAND_OVER_LIMIT);
    let state = State::new(&config.cluster, shares.clone());
    let mut registry = metrics::registry();
    metrics::build_info(&mut registry, AGENT, env!("CARGO_PKG_VERSION"));
    state.register(&mut registry);
    let (address, grace) = (config.admin_address, config.shutdown_grace);
    let (ready, status, members) = (state.clone(), state.clone(), context.topology.clone());
    let not_ready = move || not_ready(&ready, &members);
    let admin = Admin::bind(address, registry, not_ready, move || status.status())
        .await
        .with_context(|| format!("listen on {address}"))?;
    let (needs_backup, wanted) = mpsc::channel(WANTED_MAX);
    let topology = context.topology.clone();

    let mut tasks = Tasks::default();
    tasks.spawn("admin", |shutdown| admin.serve(shutdown));
    tasks.spawn("topology", |shutdown| topology.clone().follow(shutdown));
    tasks.spawn("groups", |shutdown| groups::keep_known(topology, known, shutdown));
    tasks.spawn("share", |shutdown| sharing.run(shutdown));
    tasks.spawn("observe", |shutdown| {
        let (context, state, shares) = (context.clone(), state.clone(), shares.clone());
        observe(context, state, shares, needs_backup.clone(), shutdown)
    });
    tasks.spawn("work", |shutdown| {
        let (context, state, shares) = (context.clone(), state.clone(), shares.clone());
        groups::work(context, state, shares, needs_backup, shutdown)
    });
    tasks.spawn("schedule", |shutdown| schedule(context, state, shares, wanted, shutdown));
    tasks.join(stop, grace).await?;
    info!("agent stopped");
    Ok(())
}

/// Why the agent cannot do its work now.
fn not_ready(state: &State, topology: &Topology) -> Vec<String> {
    let unread = |(group, state): &(u32, Option<DateTime<Utc>>)| {
        let limit = Utc::now() - OBSERVE_LIMIT - OBSERVE_EVERY;
        match state {
            Some(at) if *at > limit => None,
            Some(at) => Some(format!("group {group}: the repository was last read at {at}")),
            None => Some(format!("group {group}: the repository was not read yet")),
        }
    };
    let no_lease = state.lost_since().map(|since| {
        format!("etcd grants no lease since {since}: no WAL is received, and no scheduled backup is taken")
    });
    let unknown = topology.why_unknown();
    let reasons = no_lease.into_iter().chain(unknown);
    reasons.chain(state.observed_at().iter().filter_map(unread)).collect()
}

/// Takes a backup of every group at each time of the schedule, and at once of a group whose WAL has
/// a gap after its newest backup, or goes on on a timeline that no backup leads to.
///
/// A run under way when `shutdown` comes is dropped: the commit object is written last, so a
/// dropped run leaves no backup behind, only objects that the next run removes. Times that pass
/// while a run is under way are skipped, not queued.
async fn schedule(
    context: Context,
    state: State,
    shares: Shares,
    mut wanted: mpsc::Receiver<u32>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let schedule = context.config.backup.schedule.clone();
    if schedule.is_none() {
        info!("no backup.schedule: no backups by the clock");
    }
    loop {
        let due = schedule.as_ref().map(|schedule| schedule.next_after(Utc::now()));
        let due = due.map(|due| {
            due.with_context(
                || "backup.schedule has no time to come; write another, or take it out",
            )
        });
        let due = due.transpose()?;
        if let Some(due) = due {
            info!(%due, "next backup");
        }
        let (groups, is_asked_for) = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = sleep_until_some(due) => (shares.held().into_keys().collect(), false),
            Some(group) = wanted.recv() => {
                if !needs_backup(&context, &state, group).await {
                    continue;
                }
                warn!(
                    group,
                    "WAL is missing after the newest backup, or no backup leads to the newest \
                     timeline: a new one is taken now"
                );
                (vec![group], true)
            }
        };
        for group in groups {
            // Two replicas that both believe so are kept apart by the lock on the primary.
            if shares.claim(group).is_none() {
                continue;
            }
            if !is_asked_for && is_drained(&context, group).await {
                info!(group, "no scheduled backup: the group is being drained");
                continue;
            }
            let span = info_span!("backup", group);
            let run = scheduled_run(&context, &state, group, &shutdown).instrument(span);
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = Box::pin(run) => {}
            }
        }
    }
}

/// Whether a group's WAL cannot be replayed to its end from a backup, by now. Unknown is no: it is
/// asked again in a minute.
async fn needs_backup(context: &Context, state: &State, group: u32) -> bool {
    let observed = timeout(OBSERVE_LIMIT, observe_group(context, state, group)).await;
    observed.is_ok_and(|it| it.is_ok_and(|it| it.outlook.needs_backup || it.outlook.gap_seen))
}

async fn sleep_until_some(due: Option<DateTime<Utc>>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: DateTime<Utc>) {
    while let Ok(remaining) = (due - Utc::now()).to_std() {
        if remaining.is_zero() {
            return;
        }
        sleep(remaining.min(CLOCK_RECHECK)).await;
    }
}

async fn scheduled_run(context: &Context, state: &State, group: u32, shutdown: &CancellationToken) {
    let attempt = |_| async {
        let progress = Progress::default();
        state.began(group, &progress);
        Box::pin(take_backup(context, group, &progress)).await
    };
    let done = retry("backup", RETRY, BackupError::is_transient, shutdown, attempt).await;
    match done {
        None => {}
        Some(Ok(commit)) => {
            state.completed(group, &commit);
            expire_after(context, &commit).await;
        }
        Some(Err(failure)) => {
            let text = chain(&failure).to_string();
            error!(group, error = text, "backup failed");
            state.failed(group, text);
        }
    }
}

/// Applies the retention after a good backup; a suspect one makes nothing else dispensable.
async fn expire_after(context: &Context, commit: &Commit) {
    if commit.suspect.is_some() {
        return;
    }
    let place = context.repository.place(commit.group, commit.system_identifier);
    let expired = async {
        let (retention, timeline) = (&context.config.retention, Some(commit.timeline));
        let plan = expire::plan(&place, retention, timeline, Utc::now()).await?;
        expire::apply(&place, &plan, Some(context)).await
    };
    if let Err(failure) = expired.await {
        error!(group = commit.group, error = %chain(&failure), "retention not applied");
    }
}

/// Reads the repository every minute.
async fn observe(
    context: Context,
    state: State,
    mut shares: Shares,
    needs_backup: mpsc::Sender<u32>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        for group in shares.held().into_keys() {
            let observed = timeout(OBSERVE_LIMIT, observe_group(&context, &state, group));
            let observed = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                observed = observed => observed,
            };
            match observed {
                Ok(Ok(observed)) => {
                    // What is on its way out of order looks like a gap, for a moment.
                    let lasting = observed.outlook.gap_seen && state.gap_seen(group);
                    if observed.outlook.needs_backup || lasting {
                        // If the queue is full, it is asked for already.
                        needs_backup.try_send(group).ok();
                    }
                    state.observed(group, observed);
                }
                Ok(Err(failure)) => {
                    warn!(group, error = %chain(&failure), "repository not read");
                }
                Err(_) => warn!(group, "repository not read: no answer in time"),
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = sleep(OBSERVE_EVERY) => {}
            () = shares.changed() => {}
        }
    }
}

/// Reads what the repository holds of a group: of the database cluster that is followed.
async fn observe_group(
    context: &Context,
    state: &State,
    group: u32,
) -> Result<RepositoryState, WalError> {
    let repository = &context.repository;
    let (followed, primary) = followed(context, state, group).await;
    let place = match followed {
        Some(system_identifier) => Some(repository.place(group, system_identifier)),
        None => newest_place(repository, group).await?,
    };
    let mut observed = RepositoryState::new(place.as_ref().map(|it| it.system_identifier));
    let Some(place) = place else { return Ok(observed) };
    let catalog = Catalog::read(&place).await?;
    let good: Vec<&Commit> = catalog.backups.iter().filter(|it| it.suspect.is_none()).collect();
    observed.backups = catalog.backups.len() as u64;
    observed.suspect = observed.backups - good.len() as u64;
    observed.unreadable = catalog.unreadable.len() as u64;
    // One that may not restore is none to rest on.
    observed.newest_at = good.last().map(|it| it.finished_at);
    let Some(last) = catalog.backups.last() else { return Ok(observed) };
    let wal = newest_wal(&place, last, good.last().copied(), primary).await?;
    observed.outlook = outlook(&catalog.backups, &wal, &wal::gaps(&place).await?, primary);
    observed.wal_pieces = wal.pieces.values().map(Vec::len).sum::<usize>() as u64;
    let leading = leading(&catalog.backups, &wal, primary);
    for backup in leading.into_iter().filter(|it| it.suspect.is_none()) {
        if has_own_wal(&place, backup).await? {
            observed.reachable_from = Some(backup.reaches_from());
            break;
        }
    }
    Ok(observed)
}

/// The system identifier of the group's primary, or what it was: a primary that is away is no other.
/// And the timeline that it writes, if it is there.
async fn followed(context: &Context, state: &State, group: u32) -> (Option<u64>, Option<u32>) {
    let before = state.system_identifier(group);
    if context.config.wal.receive {
        match state.followed(group) {
            Some((known, timeline)) => return (Some(known), Some(timeline)),
            None if before.is_some() => return (before, None),
            None => {}
        }
    }
    let Ok(nodes) = context.topology.nodes().await else { return (before, None) };
    let observed = topology::observe_group(&context.settings, &nodes, group).await;
    match observed.primary() {
        Ok((_, primary)) => (Some(primary.system_identifier), Some(primary.timeline)),
        Err(_) => (before, None),
    }
}

/// The place with the newest backup: as long as no server has told which database cluster is the
/// group's.
async fn newest_place(
    repository: &Repository,
    group: u32,
) -> Result<Option<Place>, RepositoryError> {
    let mut newest: Option<(Option<DateTime<Utc>>, Place)> = None;
    for place in repository.places(group).await? {
        let last = Catalog::read(&place).await?.backups.last().map(|it| it.finished_at);
        if newest.as_ref().is_none_or(|(other, _)| *other < last) {
            newest = Some((last, place));
        }
    }
    Ok(newest.map(|(_, place)| place))
}

/// Lists the WAL from the start of the newest backup on, and of the newest that is good: of what is
/// before, nothing is asked but the backups' own. If it turns out that one does not lead to the cluster's
/// own timeline, everything is listed: an older backup does, or none.
async fn newest_wal(
    place: &Place,
    last: &Commit,
    good: Option<&Commit>,
    primary: Option<u32>,
) -> Result<WalMap, WalError> {
    let newest = [Some(last), good].into_iter().flatten();
    let newest: Vec<Commit> = newest.cloned().collect();
    let from = newest.iter().map(|it| it.start_lsn).min().unwrap_or(last.start_lsn);
    let wal = WalMap::read_since(place, last.wal_segment_bytes, from).await?;
    if leading(&newest, &wal, primary).len() == newest.len() {
        return Ok(wal);
    }
    WalMap::read(place, last.wal_segment_bytes).await
}

/// Whether the segments that make a backup consistent are there.
async fn has_own_wal(place: &Place, backup: &Commit) -> Result<bool, RepositoryError> {
    let names = backup.segments().map(|number| {
        let segment = Segment { timeline: backup.timeline, number };
        segment.name(backup.wal_segment_bytes)
    });
    let names: Vec<String> = names.collect();
    let stored = wal::stored_from(place, &backup.first_segment(), Some(names.len() + 1)).await?;
    Ok(names.iter().all(|name| stored.get(name).is_some_and(|objects| objects.len() == 1)))
}
