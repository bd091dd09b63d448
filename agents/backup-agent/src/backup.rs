//! One base backup, from the choice of a server to the commit object: the only file that knows
//! the order.
//!
//! Nothing before the last step makes a backup exist. A run that is stopped anywhere leaves
//! objects that no commit names, and the next run, which holds the lock and so knows that no
//! other is under way, removes them.

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use futures_util::{TryStreamExt, stream};
use shared::activity;
use shared::etcd::{Etcd, EtcdError};
use shared::pg::connect::connect;
use shared::pg::{ConnectError, Node, QueryError, Settings};
use shared::store::{StoreErrorKind, Unfinished};
use shared::telemetry::chain;
use shared::topology::{self, Group, Topology, TopologyError};
use thiserror::Error;
use tokio_postgres::types::PgLsn;
use tracing::{info, warn};

use crate::arrival::Way;
use crate::catalog::Catalog;
use crate::clocks;
use crate::config::{BackupConfig, Config};
use crate::container::{ContainerError, Kind};
use crate::copy::copy;
use crate::follow::cluster::{self, ClusterError, NotLed};
use crate::manifest::{BackupId, COMMIT_FORMAT, Commit, Suspicion, part_name};
use crate::progress::Progress;
use crate::replication::base_backup::{BaseBackup, BaseBackupOptions, Verdict};
use crate::replication::{Replication, ReplicationError};
use crate::repository::{Place, Repository, RepositoryError};
use crate::resume::Refusal;
use crate::same_key;
use crate::server_manifest::ManifestError;
use crate::source::{self, RunLock, Source, SourceError};
use crate::tar::TarError;
use crate::wal::{WalError, WalMap};

/// Objects of a backup that are asked for at once.
const ASKED_AT_ONCE: usize = 8;
/// The age at which an unfinished upload of something else than a base backup is nobody's.
const FOREIGN_UPLOAD_AGE: TimeDelta = TimeDelta::days(1);

/// Why there is no new backup. In each case the repository lists none.
#[derive(Debug, Error)]
pub enum BackupError {
    /// Nobody knows which servers there are.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// There is no server to read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It is not the group's server.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// No server is the primary to follow.
    #[error(transparent)]
    NotLed(#[from] NotLed),
    /// Nothing may be stored from the primary.
    #[error("no base backup of {primary} is taken: {source}")]
    Refused {
        /// The primary.
        primary: String,
        /// Why.
        source: Refusal,
    },
    /// The primary cannot be reached for the lock.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The primary did not answer.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Another run holds the lock.
    #[error("another base backup of group {group} is under way; wait for it, or stop it")]
    OtherRun {
        /// The group.
        group: u32,
    },
    /// The WAL that a backup needs would never come.
    #[error(
        "nothing takes the WAL of {primary}, so the WAL that a backup needs would never come: no \
         receiver is connected to slot {slot} (`backup-agent run`), and archive_mode is off"
    )]
    NoArchiving {
        /// The primary.
        primary: String,
        /// The slot of the receiver.
        slot: String,
    },
    /// The WAL that a backup needs would never come here.
    #[error(
        "the WAL of {primary} is stored elsewhere: whoever is connected to slot {slot} has acknowledged \
         WAL that {place} does not hold. Does `backup-agent run` have this cluster name, prefix and \
         bucket or directory?"
    )]
    StoredElsewhere {
        /// The primary.
        primary: String,
        /// The slot of the receiver.
        slot: String,
        /// The place in the repository.
        place: String,
    },
    /// The backup begins before the WAL that is stored, or after it was lost.
    #[error(
        "a base backup from {node} needs WAL segment {missing}, which is not in the repository and never \
         comes: the receiver at {primary} is past it. One that begins with a later checkpoint does not \
         need it"
    )]
    Past {
        /// The server that was read.
        node: String,
        /// The first segment that is missing.
        missing: String,
        /// The primary.
        primary: String,
    },
    /// Nobody with this configuration could restore the backup.
    #[error(
        "the WAL that a base backup needs cannot be opened with this configuration, and without it nothing \
         can be restored"
    )]
    Locked(#[source] RepositoryError),
    /// The lock was lost, so another run may be under way.
    #[error(
        "lost the lock on {primary} during backup {backup_id}: it was restarted, promoted away \
         from, or cut off"
    )]
    LockLost {
        /// The primary at the start.
        primary: String,
        /// The backup that was not committed.
        backup_id: BackupId,
    },
    /// The configured key is not the one that wrote earlier backups under its id.
    #[error(
        "backup {backup_id} was written with another key under the same id; nothing is written \
         with this one. Put the right key into its file, or give the new key an id of its own"
    )]
    WrongKey {
        /// The backup that cannot be read.
        backup_id: BackupId,
    },
    /// The server failed or gave up.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// The replication connection leads to another database cluster.
    #[error("{node} has system identifier {found} for replication and {expected} for queries")]
    OtherServer {
        /// The server.
        node: String,
        /// What it said on the first connection.
        expected: u64,
        /// What it said on the second.
        found: u64,
    },
    /// The timeline changed.
    #[error("timeline changed from {before} to {after} during backup {backup_id}")]
    TimelineChanged {
        /// The backup that was not committed.
        backup_id: BackupId,
        /// At the start.
        before: u32,
        /// At the end.
        after: u32,
    },
    /// The stream is not what it should be.
    #[error("read the tar stream of backup {backup_id}")]
    Tar {
        /// The backup that was not committed.
        backup_id: BackupId,
        /// What is wrong.
        source: TarError,
    },
    /// The stream is not what the manifest says.
    #[error("compare backup {backup_id} with the server's manifest")]
    Manifest {
        /// The backup that was not committed.
        backup_id: BackupId,
        /// What differs.
        source: ManifestError,
    },
    /// The stream names an archive that is no tablespace.
    #[error("the server sent an archive {name:?} that it did not announce")]
    UnknownArchive {
        /// Its name.
        name: String,
    },
    /// The WAL did not come.
    #[error(
        "backup {backup_id} needs WAL segment {missing}, which is not in the repository after \
         {} s; look at the log of `backup-agent run`, or at archive_command and pg_stat_archiver \
         on {primary}",
        limit.as_secs()
    )]
    NoWal {
        /// The backup that was not committed.
        backup_id: BackupId,
        /// The first segment that is missing.
        missing: String,
        /// The server that archives.
        primary: String,
        /// How long it was waited.
        limit: Duration,
    },
    /// WAL of the backup is there with two contents.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

impl BackupError {
    /// Tells whether the same backup may succeed if tried again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Topology(error) => error.is_transient(),
            Self::Connect(error) => error.is_transient(),
            Self::Query(error) => error.is_transient(),
            Self::Replication(error) => error.is_transient(),
            Self::Repository(error) | Self::Wal(WalError::Repository(error)) => {
                error.is_transient()
            }
            Self::Source(_)
            | Self::NotLed(NotLed::Group(_) | NotLed::Repository(_))
            | Self::LockLost { .. }
            | Self::TimelineChanged { .. }
            | Self::NoArchiving { .. }
            | Self::StoredElsewhere { .. }
            | Self::Past { .. }
            | Self::NoWal { .. }
            | Self::OtherRun { .. } => true,
            Self::Cluster(_)
            | Self::NotLed(NotLed::Cluster(_))
            | Self::Refused { .. }
            | Self::OtherServer { .. }
            | Self::Tar { .. }
            | Self::Manifest { .. }
            | Self::UnknownArchive { .. }
            | Self::WrongKey { .. }
            | Self::Locked(_)
            | Self::Wal(_) => false,
        }
    }
}

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// How the servers are reached.
    pub settings: Settings,
    /// Where backups go.
    pub repository: Repository,
    /// Which servers there are.
    pub topology: Topology,
    /// The etcd that is configured.
    pub etcd: Option<Etcd>,
}

impl Context {
    /// Reads the keys, credentials and certificates that the configuration names. Nothing is
    /// connected to yet. `application_name` is what `pg_stat_activity` shows.
    ///
    /// # Errors
    ///
    /// One of them cannot be used.
    pub async fn new(config: Config, application_name: &str) -> anyhow::Result<Self> {
        let settings = config.postgres.settings(application_name)?;
        let repository = Repository::open(&config).await?;
        let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
        let topology = Topology::new(config.topology(), etcd.clone())?;
        Ok(Self { config, settings, repository, topology, etcd })
    }
}

/// Whether a group is to be emptied. Then none takes a backup of it unasked: it would hold the moves up. If
/// nobody can tell, a backup is worth more.
pub async fn is_drained(context: &Context, group: u32) -> bool {
    let Some(etcd) = &context.etcd else { return false };
    let asked = activity::is_drained(etcd, &context.config.cluster, group).await;
    let unknown = |error: &EtcdError| {
        warn!(group, error = %chain(error), "nobody knows whether the group is being drained");
    };
    asked.inspect_err(unknown).unwrap_or(false)
}

/// Takes one base backup of a group and returns what was committed.
///
/// Dropping the future stops the run; nothing is committed then.
///
/// # Errors
///
/// Each reason why there is no new backup. A suspect backup is no error: see [`Commit::suspect`].
pub async fn take_backup(
    context: &Context,
    group: u32,
    progress: &Progress,
) -> Result<Commit, BackupError> {
    let Context { config, settings, topology, .. } = context;
    progress.begin("asking the servers", 0);
    let observed = observe(settings, &topology.nodes().await?, group).await;
    let observed = cluster::own_servers(&context.repository, observed).await?;
    let source = source::choose(&observed, &config.backup, &[])?;
    let known = cluster::known(&context.repository, group).await?;
    cluster::require(&known, (group, &source.primary, source.state.system_identifier))?;
    let lock = RunLock::take(connect(settings, &source.primary).await?)
        .await?
        .ok_or(BackupError::OtherRun { group })?;
    let taken = Box::pin(take(context, &observed, source, &lock, progress));
    // Whoever moves shards keeps away from the group. Only the holder of the lock tells: the key is one.
    match &context.etcd {
        Some(etcd) => {
            Box::pin(activity::during(etcd, &config.cluster, "backup", group, taken)).await
        }
        None => taken.await,
    }
}

/// Takes a base backup of a group on which the lock is held.
async fn take(
    context: &Context,
    observed: &Group,
    mut source: Source,
    lock: &RunLock,
    progress: &Progress,
) -> Result<Commit, BackupError> {
    let Context { config, settings, repository, .. } = context;
    let (group, config) = (observed.number, &config.backup);
    let place = repository.place(group, source.state.system_identifier).pinned().await?;
    // Before what follows from it: nothing takes the WAL of a server with another key.
    same_key::require(&place).await?;
    if lock.takers(&context.config.wal.slot).await?.acknowledged.is_none() {
        require_newest(&place, &source).await?;
    }
    let way = Way { place: &place, lock, slot: &context.config.wal.slot };
    progress.begin("looking for the WAL receiver", 0);
    way.require(&source, context.config.wal.ship_interval).await?;
    let catalog = Catalog::read(&place).await?;
    refuse_wrong_key(&catalog)?;
    remove_leftovers(&place, &catalog).await?;

    progress.begin("checkpoint", 0);
    let started_at = Utc::now();
    let stream = start(settings, observed, config, &mut source, way).await?;
    let backup_id = BackupId::new(started_at, stream.timeline, stream.start_lsn);
    let total_bytes = stream.tablespaces.iter().map(|tablespace| tablespace.bytes).sum();
    info!(
        %backup_id, node = source.node.name, timeline = stream.timeline,
        start_lsn = %stream.start_lsn, bytes_estimated = total_bytes,
        memory_bytes_max = config.upload().memory_bytes(), "base backup started"
    );
    progress.begin("copying", total_bytes);
    let lock_lost = || BackupError::LockLost {
        primary: source.primary.to_string(),
        backup_id: backup_id.clone(),
    };
    let copied = tokio::select! {
        copied = Box::pin(copy(&place, &backup_id, stream, config, progress)) => {
            or_clear_away(&place, lock, copied).await?
        }
        () = lock.lost() => return Err(lock_lost()),
    };
    for warning in &copied.verdict.warnings {
        warn!(%backup_id, node = source.node.name, %warning, "the server warns about the backup");
    }
    info!(%backup_id, end_lsn = %copied.end_lsn, parts = copied.parts.len(), "stream stored");

    let server_finished_at = Some(lock.now().await?);
    let commit = Commit {
        format: COMMIT_FORMAT,
        backup_id: backup_id.clone(),
        group,
        system_identifier: source.state.system_identifier,
        node: source.node.name.clone(),
        from_standby: source::is_standby(&source.state),
        server_version_num: source.state.server_version,
        wal_segment_bytes: source.state.wal_segment_bytes,
        started_at,
        finished_at: copied.finished_at,
        server_finished_at,
        timeline: copied.timeline,
        start_lsn: copied.start_lsn,
        end_lsn: copied.end_lsn,
        suspect: suspicion(&copied.verdict),
        archives: copied.archives,
        chunk_bytes: config.upload().chunk_bytes,
        parts: copied.parts,
        manifest: copied.manifest,
        files: copied.files,
        file_count: copied.file_count,
        previous: catalog.newest.clone(),
    };

    progress.begin("waiting for WAL", 0);
    let waited = way.wait(&commit, &source, config.wal_timeout).await;
    or_clear_away(&place, lock, waited).await?;

    // From here on only a single put is left. Whoever lost the lock must not make it.
    if !lock.is_held().await.unwrap_or(false) {
        return Err(lock_lost());
    }
    progress.begin("committing", 0);
    require_parts(&place, &commit).await?;
    let text = to_json(&backup_id, &commit)?;
    place.put(Kind::Commit, &backup_id.object("commit"), &text, 1).await?;
    report(&commit);
    Ok(commit)
}

/// Refuses a primary from which nothing is received and which is on an older timeline than what is stored:
/// its backup would be the newest one.
async fn require_newest(place: &Place, source: &Source) -> Result<(), BackupError> {
    let (found, segment_bytes) = (source.state.timeline, source.state.wal_segment_bytes);
    let stored = WalMap::read_from(place, segment_bytes, PgLsn::from(u64::MAX), &[]).await?;
    match stored.newest_stored().filter(|stored| *stored > found) {
        Some(stored) => Err(BackupError::Refused {
            primary: source.primary.to_string(),
            source: Refusal::OldTimeline { found, stored },
        }),
        None => Ok(()),
    }
}

/// Asks the servers of a group.
async fn observe(settings: &Settings, nodes: &[Node], group: u32) -> Group {
    let observed = topology::observe_group(settings, nodes, group).await;
    for (node, error) in observed.unknown() {
        warn!(node = node.name, error = %chain(error), "server did not answer");
    }
    observed
}

/// A key that is not the one that wrote the backups before would split the repository in two.
fn refuse_wrong_key(catalog: &Catalog) -> Result<(), BackupError> {
    match catalog.unreadable.iter().find(|(_, error)| error.is_wrong_key()) {
        Some((backup_id, _)) => Err(BackupError::WrongKey { backup_id: backup_id.clone() }),
        None => Ok(()),
    }
}

/// Starts the base backup on the chosen server; if that is a standby and does not let us, or begins
/// before the WAL that is stored, on the next one, and at last on the primary.
async fn start(
    settings: &Settings,
    observed: &Group,
    config: &BackupConfig,
    source: &mut Source,
    way: Way<'_>,
) -> Result<BaseBackup, BackupError> {
    let mut refused = Vec::new();
    loop {
        for reason in &source.passed_over {
            info!(reason, "server passed over");
        }
        match start_on(settings, source, config, way).await {
            Err(error @ BackupError::Locked(_)) => return Err(error),
            Err(error) if source::is_standby(&source.state) => {
                let node = source.node.name.clone();
                warn!(node, error = %chain(&error), "standby cannot be used; trying another server");
                refused.push(node);
                *source = source::choose(observed, config, &refused)?;
            }
            started => return started,
        }
    }
}

/// Opens the replication connection and starts the base backup on one server.
async fn start_on(
    settings: &Settings,
    source: &Source,
    config: &BackupConfig,
    way: Way<'_>,
) -> Result<BaseBackup, BackupError> {
    let mut replication =
        Replication::connect_for_backup(settings, &source.node, config.stall_timeout).await?;
    let identity = replication.identify_system().await?;
    if identity.system_identifier != source.state.system_identifier {
        return Err(BackupError::OtherServer {
            node: source.node.to_string(),
            expected: source.state.system_identifier,
            found: identity.system_identifier,
        });
    }
    let options = BaseBackupOptions {
        label: "pgmesh backup-agent".to_owned(),
        fast_checkpoint: config.fast_checkpoint,
        rate_kilobytes_max: config.rate_kilobytes_max(),
    };
    let stream = replication.base_backup(&options).await?;
    way.require_first(source, stream.timeline, stream.start_lsn).await?;
    Ok(stream)
}

/// What makes a backup suspect, if anything does: damaged pages, or data that the server left out.
fn suspicion(verdict: &Verdict) -> Option<Suspicion> {
    let left_out = || verdict.warnings.iter().find(|it| names_data(&it.message));
    let reason = verdict.checksum_failure.as_ref().or_else(left_out)?.to_string();
    let warnings = verdict.warnings.iter().map(ToString::to_string).collect();
    Some(Suspicion { reason, warnings })
}

/// Whether a warning is about a file of data. The server leaves out what is neither a file nor a
/// directory, such as a link to a database on another disk, and says so in its own language; but the
/// path stands in it as it is, from the data directory or from a tablespace. What else lies in the
/// data directory, as a linked `pg_log`, is the operator's.
/// Source: `sendDir` in PostgreSQL's `basebackup.c`.
fn names_data(warning: &str) -> bool {
    let is_own = |path: &str| {
        let name = path.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').next();
        name.is_some_and(|name| OWN_DIRECTORIES.contains(&name))
    };
    warning.split("./").skip(1).any(is_own) || warning.contains("/PG_")
}

/// What a server keeps in its data directory.
/// Source: the table "Contents of `PGDATA`" in PostgreSQL's manual, chapter "Database File Layout".
const OWN_DIRECTORIES: [&str; 17] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_multixact",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_xact",
];

fn to_json(backup_id: &BackupId, commit: &Commit) -> Result<Vec<u8>, RepositoryError> {
    serde_json::to_vec(commit)
        .map_err(|source| RepositoryError::Content { name: backup_id.to_string(), source })
}

/// Asks the store for everything that the commit names: the last moment before a backup is listed, and
/// before a restore deletes anything, at which a store that lost something can be caught.
pub(crate) async fn require_parts(place: &Place, commit: &Commit) -> Result<(), RepositoryError> {
    let parts = commit.parts.iter().enumerate().map(|(n, record)| (part_name(n), record));
    let others = [("manifest".to_owned(), &commit.manifest), ("files".to_owned(), &commit.files)];
    let all = stream::iter(parts.chain(others).map(Ok));
    all.try_for_each_concurrent(ASKED_AT_ONCE, |(name, record)| async move {
        let name = commit.backup_id.object(&name);
        let found = place.store().head(&place.key(&name)).await?.map_or(0, |info| info.bytes);
        if found == record.object_bytes {
            return Ok(());
        }
        let reason = format!("expected {} bytes, found {found}", record.object_bytes);
        Err(ContainerError::Truncated { name, reason }.into())
    })
    .await
}

/// Removes what earlier runs left: objects without a commit, and unfinished uploads.
async fn remove_leftovers(place: &Place, catalog: &Catalog) -> Result<(), RepositoryError> {
    for (backup_id, objects) in &catalog.unfinished {
        for object in objects {
            match place.store().delete(&place.key(&object.key)).await {
                Ok(()) => {}
                // Under Object Lock it stays until its retention ends, and harms nobody.
                Err(error) if error.kind == StoreErrorKind::Denied => {
                    info!(key = object.key, "leftover kept: the store does not let it be deleted");
                }
                Err(error) => return Err(error.into()),
            }
        }
        info!(%backup_id, objects = objects.len(), "leftovers of a stopped backup removed");
    }
    let uploads = match place.store().unfinished(&place.key("")).await {
        Ok(uploads) => uploads,
        Err(error) if error.kind == StoreErrorKind::Unsupported => {
            warn!(
                error = %chain(&error),
                "unfinished uploads cannot be listed; let a bucket lifecycle rule abort them"
            );
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let base = place.key("base/");
    let (ours, others): (Vec<_>, Vec<_>) =
        uploads.into_iter().partition(|upload| upload.key.starts_with(&base));
    abort(place, ours).await?;
    // The lock is about base backups; a `wal-push` may be under way.
    if !others.is_empty() {
        // They have their times from the store: this host's clock may be ahead.
        let old = clocks::stored_now(place).await? - FOREIGN_UPLOAD_AGE;
        let is_old = |upload: &Unfinished| upload.started_at.is_some_and(|at| at < old);
        abort(place, others.into_iter().filter(is_old)).await?;
    }
    Ok(())
}

async fn abort(
    place: &Place,
    uploads: impl IntoIterator<Item = Unfinished>,
) -> Result<(), RepositoryError> {
    for upload in uploads {
        place.store().abort(&upload).await?;
        info!(key = upload.key, "unfinished upload removed");
    }
    Ok(())
}

/// What a step that failed leaves takes room that WAL may need: it is removed at once, as far as it
/// can be. Not after the commit object was sent: a store may take it late.
async fn or_clear_away<T>(
    place: &Place,
    lock: &RunLock,
    outcome: Result<T, BackupError>,
) -> Result<T, BackupError> {
    if outcome.is_err() && lock.is_held().await.unwrap_or(false) {
        let cleared = async { remove_leftovers(place, &Catalog::read(place).await?).await };
        if let Err(error) = cleared.await {
            warn!(
                error = %chain(&error),
                "leftovers of the failed backup not removed; the next run tries again"
            );
        }
    }
    outcome
}

fn report(commit: &Commit) {
    let elapsed_ms = (Utc::now() - commit.started_at).num_milliseconds();
    let (backup_id, node) = (&commit.backup_id, &commit.node);
    let (bytes, object_bytes) = (commit.plain_bytes(), commit.object_bytes());
    if let Some(suspect) = &commit.suspect {
        tracing::error!(
            %backup_id, node, reason = suspect.reason,
            "backup is SUSPECT: the server read damaged pages, or left data out; it is kept and marked. \
             Mend what the reason and the warnings name (damaged pages: pg_amcheck), and keep older backups"
        );
    }
    info!(
        %backup_id, node, bytes, object_bytes, files = commit.file_count, elapsed_ms,
        start_lsn = %commit.start_lsn, end_lsn = %commit.end_lsn, "backup completed"
    );
}

#[cfg(test)]
mod tests {
    use shared::store::StoreError;

    use super::*;

    #[test]
    fn what_another_attempt_may_mend_is_tried_again() {
        let text = || "x".to_owned();
        let unavailable = || {
            let (operation, kind) = ("list", StoreErrorKind::Unavailable);
            let source = "no answer".into();
            RepositoryError::from(StoreError { operation, key: text(), kind, source })
        };
        let conflict = || WalError::Conflict { name: text(), found: text() };
        let backup_id = BackupId::new(Utc::now(), 1, 0.into());
        let (missing, primary, slot, place) = (text(), text(), text(), text());
        let (node, limit) = (text(), Duration::ZERO);
        for (error, expected) in [
            (BackupError::NoArchiving { primary: text(), slot: text() }, true),
            (BackupError::StoredElsewhere { primary: text(), slot, place }, true),
            (BackupError::Past { node, missing: text(), primary: text() }, true),
            (BackupError::NoWal { backup_id, missing, primary, limit }, true),
            (BackupError::Repository(unavailable()), true),
            (BackupError::Wal(unavailable().into()), true),
            (BackupError::Wal(conflict()), false),
            (BackupError::Locked(RepositoryError::Conflict { key: text() }), false),
        ] {
            assert_eq!(error.is_transient(), expected, "{error}");
        }
    }

    #[test]
    fn data_that_the_server_leaves_out_is_told_from_files_of_the_operator() {
        for (warning, expected) in [
            ("skipping special file or directory \"./base/16421\"", true),
            ("WARNING in another language: «./global/1262»", true),
            ("skipping special file or directory \"./pg_xact\"", true),
            ("skipping special file or directory \"/srv/space/PG_17_202406281/5\"", true),
            ("skipping special file or directory \"./pg_multixact/members\"", true),
            ("skipping special file or directory \"./pg_wal\"", true),
            ("skipping special file \"./pg_log\"", false),
            ("skipping special file \"./log/base\"", false),
            ("skipping special file \"./basement\"", false),
            ("skipping special file or directory \"./postgresql.conf\"", false),
            ("skipping special file or directory \"./pg_hba.conf\"", false),
            ("skipping special file or directory \"./server.key\"", false),
        ] {
            assert_eq!(names_data(warning), expected, "{warning}");
        }
    }
}
