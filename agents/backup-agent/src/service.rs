//! The service: takes the scheduled backups, applies the retention, and watches the repository.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use shared::admin::Admin;
use shared::backoff::{Policy, retry};
use shared::lease::{Identity, Shares, TTL, replica_name};
use shared::tasks::Tasks;
use shared::telemetry::chain;
use shared::{metrics, shutdown};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_postgres::types::PgLsn;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};

use crate::backup::{BackupError, Context, take_backup};
use crate::catalog::Catalog;
use crate::commands::AGENT;
use crate::config::Config;
use crate::expire;
use crate::groups;
use crate::manifest::Commit;
use crate::metrics::{RepositoryState, State};
use crate::progress::Progress;
use crate::recovery::{TargetTimeline, Window, lead_to_newest};
use crate::repository::{Place, Repository};
use crate::wal::{self, Then, WalError, WalMap};

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

    let state = State::new(&config.cluster);
    let mut registry = metrics::registry();
    metrics::build_info(&mut registry, AGENT, env!("CARGO_PKG_VERSION"));
    state.register(&mut registry);
    let (address, grace) = (config.admin_address, config.shutdown_grace);
    let (ready, status) = (state.clone(), state.clone());
    let admin = Admin::bind(address, registry, move || not_ready(&ready), move || status.status())
        .await
        .with_context(|| format!("listen on {address}"))?;
    let identity = Identity {
        cluster: config.cluster.clone(),
        agent: AGENT.to_owned(),
        replica: replica_name(),
    };
    let (known, groups) = watch::channel(BTreeSet::new());
    let (shares, sharing) =
        Shares::new(context.etcd.clone(), identity, groups, TTL, HAND_OVER_LIMIT);
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
fn not_ready(state: &State) -> Vec<String> {
    let unread = |(group, state): &(u32, Option<DateTime<Utc>>)| {
        let limit = Utc::now() - OBSERVE_LIMIT - OBSERVE_EVERY;
        match state {
            Some(at) if *at > limit => None,
            Some(at) => Some(format!("group {group}: the repository was last read at {at}")),
            None => Some(format!("group {group}: the repository was not read yet")),
        }
    };
    state.observed_at().iter().filter_map(unread).collect()
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
        let due =
            due.map(|due| due.with_context(|| format!("schedule {schedule:?} has no more times")));
        let due = due.transpose()?;
        if let Some(due) = due {
            info!(%due, "next backup");
        }
        let groups = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = sleep_until_some(due) => shares.held().into_keys().collect(),
            Some(group) = wanted.recv() => {
                if !needs_backup(&context, group).await {
                    continue;
                }
                warn!(
                    group,
                    "WAL is missing after the newest backup, or no backup leads to the newest \
                     timeline: a new one is taken now"
                );
                vec![group]
            }
        };
        for group in groups {
            // Two replicas that both believe so are kept apart by the lock on the primary.
            if shares.claim(group).is_none() {
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
async fn needs_backup(context: &Context, group: u32) -> bool {
    let observed = timeout(OBSERVE_LIMIT, observe_group(&context.repository, group)).await;
    observed.is_ok_and(|observed| observed.is_ok_and(|it| it.needs_backup || it.gap_seen))
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
        let plan = expire::plan(&place, &context.config.retention, Utc::now()).await?;
        expire::apply(&place, &plan).await?;
        Ok::<_, WalError>(())
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
            let observed = timeout(OBSERVE_LIMIT, observe_group(&context.repository, group));
            let observed = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                observed = observed => observed,
            };
            match observed {
                Ok(Ok(observed)) => {
                    // What is on its way out of order looks like a gap, for a moment.
                    let lasting = observed.gap_seen && state.gap_seen(group);
                    if observed.needs_backup || lasting {
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

/// Reads what the repository holds of a group: of its newest database cluster.
async fn observe_group(repository: &Repository, group: u32) -> Result<RepositoryState, WalError> {
    let mut newest: Option<(Place, Catalog)> = None;
    let (mut suspect, mut unreadable) = (0, 0);
    for place in repository.places(group).await? {
        let catalog = Catalog::read(&place).await?;
        suspect += catalog.backups.iter().filter(|it| it.suspect.is_some()).count() as u64;
        unreadable += catalog.unreadable.len() as u64;
        let last = |catalog: &Catalog| catalog.backups.last().map(|it| it.finished_at);
        if newest.as_ref().is_none_or(|(_, other)| last(other) < last(&catalog)) {
            newest = Some((place, catalog));
        }
    }
    let mut state = RepositoryState {
        observed_at: Utc::now(),
        backups: 0,
        suspect,
        unreadable,
        newest_at: None,
        reachable_from: None,
        reachable_until: None,
        broken_at: None,
        needs_backup: false,
        gap_seen: false,
    };
    let Some((place, catalog)) = newest else { return Ok(state) };
    state.backups = catalog.backups.len() as u64;
    let Some(last) = catalog.backups.last() else { return Ok(state) };
    // One that may not restore is none to rest on.
    let good = catalog.backups.iter().rfind(|it| it.suspect.is_none());
    state.newest_at = good.map(|it| it.finished_at);
    let wal = WalMap::read(&place, last.wal_segment_bytes).await?;
    let windows = catalog.backups.iter().map(|it| Window::of(it, &wal, TargetTimeline::Latest));
    let windows: Vec<_> = windows.collect();
    let consistent = windows.iter().find(|window| window.is_consistent());
    state.reachable_from = consistent.map(|window| window.from);
    let reach = windows.last().and_then(|window| window.reach.as_ref());
    state.reachable_until = reach.and_then(|reach| reach.until);
    state.broken_at = reach.and_then(|reach| match &reach.then {
        Then::End => None,
        Then::Gap { segment } | Then::Conflict { segment } => Some(segment.clone()),
    });
    let good = catalog.backups.iter().rfind(|backup| backup.suspect.is_none());
    let end_lsn = good.map_or(PgLsn::from(0), |backup| backup.end_lsn);
    let has_gap = wal::gaps(&place).await?.iter().any(|gap| gap.until_lsn > end_lsn);
    state.needs_backup = has_gap || !lead_to_newest(&catalog.backups, &wal);
    state.gap_seen = reach.is_some_and(|reach| matches!(reach.then, Then::Gap { .. }));
    Ok(state)
}
