//! Follows a group's primary wherever it goes, and stores its WAL.
//!
//! One part watches the servers: who is primary, what the slot costs it, and whether every standby
//! has the slot. The other streams from the primary that the first has found, over timelines.

pub(crate) mod begun;
pub(crate) mod cluster;
mod held_up;
mod no_primary;
mod reached;
mod servers;
pub(crate) mod standing;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;
use shared::etcd::EtcdError;
use shared::lease::Claim;
use shared::pg::connect::connect;
use shared::pg::wal::{HistoryEntry, parse_history};
use shared::pg::{ConnectError, Node, QueryError, Settings};
use shared::telemetry::chain;
use shared::topology::{Group, NodeState, Role};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::types::PgLsn;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::backup::Context;
use crate::config::WalConfig;
use crate::heartbeat::{self, HeartbeatError};
use crate::quantities;
use crate::receive::upload::LONG;
use crate::receive::{self, Beginning, ReceiveError, Received, Receiver, Shipping, Waiting};
use crate::replication::{Replication, ReplicationError, TCP_USER_TIMEOUT};
use crate::repository::{Place, RepositoryError};
use crate::resume::{self, Divergence, Position, Refusal, Server, Start};
use crate::rival::Line;
use crate::same_key;
use crate::slots::{self, Alarm, Burden, Slot, SlotError};
use crate::wal::piece::{self, Piece};
use crate::wal::{self, Gap, Packed, WalError, WalMap, followed, newest};
use cluster::{ClusterError, Known, NotLed};
use no_primary::{NoPrimary, WATCH_EVERY};
use reached::Reached;
use servers::Servers;
use standing::{Standing, Told};

/// The first wait after a failure; each further one doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest wait between two attempts.
pub(crate) const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// The server may be silent this long while it is not streaming.
const STALL_LIMIT: Duration = Duration::from_mins(1);
/// How long the repository may take to say which database cluster is the group's.
const KNOWN_LIMIT: Duration = Duration::from_secs(5);
/// What to do where what is stored does not open.
const LOST_KEY: &str = ". WAL is received only after what is stored: add the key to encryption.keys. If it is lost, what \
     it sealed is lost, too: give what comes a place of its own (repository.prefix), say so with \
     `backup-agent begin`, and take a backup";
/// SQLSTATE of a slot that another connection uses. Source: `errcodes.txt`.
const OBJECT_IN_USE: &str = "55006";

/// Why WAL is not being received.
#[derive(Debug, Error)]
pub enum FollowError {
    /// A server cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A server did not answer or refused.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The replication connection failed.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// The slot cannot be used.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// It is not the group's server.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Somebody else receives with the slot.
    #[error(
        "slot {slot} of {node} is in use by {user}. Is that another agent? Without [etcd] only one may run. Is \
         it another program? Give that a slot of its own, or the agent another (wal.slot). Is it what is left of \
         this agent's last connection? The server ends that by itself (wal_sender_timeout), or \
         pg_terminate_backend does"
    )]
    SlotInUse {
        /// The server.
        node: String,
        /// The slot.
        slot: String,
        /// Who uses it.
        user: String,
    },
    /// Receiving stopped.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The server gave up a connection from which nothing was read.
    #[error(
        "nothing was read from {node} while the repository took one object for {upload_s} s, so it ended the \
         connection (tcp_user_timeout is 60 s); what was under way is sent again. The repository is too \
         slow: see to it"
    )]
    TooSlow {
        /// The server.
        node: String,
        /// How long an upload was under way.
        upload_s: u64,
        /// The connection's end.
        source: ReplicationError,
    },
    /// The WAL in the repository is not what it should be, or the repository failed.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// Nothing may be stored from this primary.
    #[error("nothing is stored from {node}: {source}")]
    Refused {
        /// The primary.
        node: String,
        /// Why.
        source: Refusal,
    },
    /// The replication connection leads to another database cluster.
    #[error("{node} has system identifier {found} for replication and {expected} for queries")]
    OtherServer {
        /// The server.
        node: String,
        /// What it said for queries.
        expected: u64,
        /// What it said for replication.
        found: u64,
    },
    /// The server shuts down, and waited for the store.
    #[error(
        "{node} is shutting down and waits for WAL that the repository has not taken: the stream \
         is given up, and the slot keeps the WAL"
    )]
    HeldUp {
        /// The server.
        node: String,
    },
    /// WAL was stored before, and not here.
    #[error(
        "{place} holds no WAL, and WAL of {node} was stored before: nothing is received into it. Is \
         the repository mounted, and are its prefix and bucket the right ones? If it is a new one, say \
         so with `backup-agent begin --group {group}`, and take a backup"
    )]
    Empty {
        /// The place in the repository.
        place: String,
        /// The server.
        node: String,
        /// The group.
        group: u32,
    },
    /// WAL of the group's earlier database cluster was stored before, and not here.
    #[error(
        "{place} holds no WAL, nor does the repository hold anything of group {group}, and WAL of its database \
         cluster with system identifier {known} was stored in {stored_in}: nothing of {node} is received. Is \
         the repository mounted, and are its prefix and bucket the right ones? If it is a new one, say so \
         with `backup-agent begin --group {group}`, and take a backup"
    )]
    Elsewhere {
        /// The place in the repository.
        place: String,
        /// The server.
        node: String,
        /// The group.
        group: u32,
        /// The other system identifier.
        known: u64,
        /// Where its WAL was stored.
        stored_in: String,
    },
    /// The etcd that tells whether WAL was stored before did not answer.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// `pg_resetwal` changed the size of segments.
    #[error(
        "the segment size changed from {} to {}: `pg_resetwal --wal-segsize` was run on {node}. Names of \
         WAL mean other positions now, so nothing is stored beside what is there. Give the new WAL another \
         place (`cluster` or `repository.prefix`), and take a backup there: what is stored here stays \
         restorable", quantities::bytes(*.stored), quantities::bytes(*.found)
    )]
    SegmentSize {
        /// The server.
        node: String,
        /// What is stored.
        stored: u64,
        /// What the server has.
        found: u64,
    },
    /// The server removed WAL that the slot should have held back.
    #[error(
        "{node} no longer has the WAL from {at} on timeline {timeline}, which its slot held back"
    )]
    Removed {
        /// The server.
        node: String,
        /// The timeline.
        timeline: u32,
        /// Where the WAL was asked for.
        at: PgLsn,
    },
}

/// The primary that is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Primary {
    /// The server.
    pub node: Node,
    /// The timeline it writes.
    pub timeline: u32,
    /// The database cluster.
    pub system_identifier: u64,
    /// `wal_segment_size`.
    pub segment_bytes: u64,
}

/// The slot on one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// What it costs.
    pub burden: Burden,
    /// What an operator must know.
    pub alarms: Vec<Alarm>,
}

impl FollowError {
    /// Tells whether what is stored is sealed with a key that is not configured.
    fn is_locked(&self) -> bool {
        match self {
            Self::Wal(failure) | Self::Receive(ReceiveError::Wal(failure)) => failure.is_locked(),
            Self::Repository(failure) | Self::Receive(ReceiveError::Repository(failure)) => {
                failure.is_locked()
            }
            _ => false,
        }
    }

    /// Tells whether the server ended the stream because it shuts down, and everything is stored.
    fn is_shutdown(&self) -> bool {
        let Self::Receive(ReceiveError::Replication(failure)) = self else { return false };
        matches!(failure, ReplicationError::ShuttingDown { .. })
    }
}

/// What is known about receiving the WAL of a group.
#[derive(Clone, Debug, Default)]
pub struct Following {
    /// The primary; `None` if there is none, or none that can be told from another.
    pub primary: Option<Primary>,
    /// Why there is no primary.
    pub no_primary: Option<String>,
    /// How each server stands to the primary.
    pub servers: BTreeMap<String, Standing>,
    /// The server that is received from, or will be.
    pub from: Option<Primary>,
    /// The timeline of the last primary, and those before it.
    pub line: Option<(u32, Vec<HistoryEntry>)>,
    /// How far the primary's disk has WAL, as it answered when it was last asked, and on which timeline.
    pub flushed: Option<(u32, PgLsn)>,
    /// What the slot costs the primary; `None` if it did not say.
    pub burden: Option<Burden>,
    /// The slot on each server that said what it costs, the primary's too.
    pub slots: BTreeMap<String, SlotState>,
    /// The servers that gave their slot up, and from where the new one holds WAL back: what is
    /// before and not stored may be gone there.
    pub lost: BTreeMap<String, PgLsn>,
    /// How far receiving is; `None` while nothing is being received.
    pub received: Option<Received>,
    /// The last moment of which everything that the primary had is stored.
    pub caught_up_at: Option<DateTime<Utc>>,
    /// When the oldest upload that is under way began.
    pub upload_since: Option<Instant>,
    /// Why nothing is being received.
    pub failure: Option<String>,
    /// When the last heartbeat was read back from the repository.
    pub heartbeat_at: Option<DateTime<Utc>>,
    /// Why the last heartbeat was not.
    pub heartbeat_failure: Option<String>,
}

/// How receiving the WAL of a group goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WalState {
    /// No primary is seen, and nothing is received.
    NoPrimary,
    /// Receiving begins: what is stored is read and compared.
    Starting,
    /// Receiving ended with an error, and is tried again.
    Failed,
    /// An upload takes long: the repository hangs or is too slow.
    UploadHangs,
    /// WAL is received, and since the agent began not all of it has been stored.
    CatchingUp,
    /// WAL is received and stored as it comes.
    Streaming,
}

impl WalState {
    /// All of them, as `/status` and the metrics name them.
    pub const ALL: [(Self, &str); 6] = [
        (Self::NoPrimary, "no_primary"),
        (Self::Starting, "starting"),
        (Self::Failed, "failed"),
        (Self::UploadHangs, "upload_hangs"),
        (Self::CatchingUp, "catching_up"),
        (Self::Streaming, "streaming"),
    ];
}

impl Following {
    /// How receiving goes: what the numbers that are not known yet do not say.
    pub fn wal_state(&self) -> WalState {
        let hangs = self.upload_since.is_some_and(|since| since.elapsed() >= LONG);
        match (self.received, &self.failure, &self.primary) {
            (None, _, None) => WalState::NoPrimary,
            (None, Some(_), Some(_)) => WalState::Failed,
            (None, None, Some(_)) => WalState::Starting,
            (Some(_), ..) if hangs => WalState::UploadHangs,
            (Some(received), ..) if received.lag_bytes().is_none() => WalState::Starting,
            (Some(_), ..) if self.caught_up_at.is_none() => WalState::CatchingUp,
            (Some(_), ..) => WalState::Streaming,
        }
    }

    /// What `/status` shows.
    pub fn status(&self) -> serde_json::Value {
        let slots = self.slots.iter().map(|(node, slot)| (node, slot.status()));
        let slots: BTreeMap<_, _> = slots.collect();
        let received = self.received.map(|it| {
            json!({
                "timeline": it.timeline,
                "received_lsn": it.received_lsn.to_string(),
                "stored_lsn": it.stored_lsn.to_string(),
                "server_lsn": it.server_lsn.to_string(),
                "lag_bytes": it.lag_bytes(),
            })
        });
        json!({
            "state": self.wal_state(),
            "primary": self.primary.as_ref().map(|primary| &primary.node.name),
            "no_primary": self.no_primary,
            "servers": self.servers,
            "received": received,
            "failure": self.failure,
            "caught_up_at": self.caught_up_at,
            "upload_seconds": self.upload_since.map(|since| since.elapsed().as_secs()),
            "heartbeat_at": self.heartbeat_at,
            "heartbeat_failure": self.heartbeat_failure,
            "slots": slots,
            "commits_wait": self.burden.map(|it| it.commits_wait),
        })
    }
}

impl SlotState {
    fn status(&self) -> serde_json::Value {
        let alarms: Vec<_> = self.alarms.iter().map(|alarm| format!("{alarm:?}")).collect();
        json!({
            "retained_bytes": self.burden.retained_bytes,
            "limit_bytes": self.burden.limit_bytes,
            "alarms": alarms,
        })
    }
}

/// The servers whose slots are looked after.
struct Watched<'a> {
    observed: &'a Group,
    own: Option<u64>,
    primary: Option<&'a Primary>,
    /// The timeline that is followed.
    newest: Option<u32>,
}

/// One group's follower.
#[derive(Debug)]
pub struct Follower {
    /// What it needs.
    pub context: Context,
    /// The group.
    pub group: u32,
    /// Where others read what it knows.
    pub state: watch::Sender<Following>,
    /// Where it asks for a base backup.
    needs_backup: mpsc::Sender<u32>,
    /// Wakes the part that asks the servers.
    look: Notify,
    /// WAL was stored since the last failure, or there was none to store.
    has_got_on: AtomicBool,
    /// It was said that the store does not let pieces be deleted.
    said_kept: AtomicBool,
    /// It was said that nothing bounds what the slot holds back.
    said_unbounded: AtomicBool,
    /// The size of segments that was compared with what is stored.
    segment_bytes: AtomicU64,
    /// The database cluster that is followed; 0 before it is known to be the group's.
    cluster: AtomicU64,
    /// Commits waited for us when that was last known.
    commits_wait: AtomicBool,
    /// The newest timeline that is stored, for which a primary was refused a moment ago; 0 if none was.
    newer_stored: AtomicU32,
}

impl Follower {
    /// A follower that knows nothing yet.
    pub fn new(context: Context, group: u32, needs_backup: mpsc::Sender<u32>) -> Self {
        let (state, look) = (watch::Sender::default(), Notify::new());
        let (has_got_on, said_kept) = (AtomicBool::new(false), AtomicBool::new(false));
        let (said_unbounded, segment_bytes) = (AtomicBool::new(false), AtomicU64::new(0));
        let (cluster, commits_wait) = (AtomicU64::new(0), AtomicBool::new(false));
        let newer_stored = AtomicU32::new(0);
        Self {
            context,
            group,
            state,
            needs_backup,
            look,
            has_got_on,
            said_kept,
            said_unbounded,
            segment_bytes,
            cluster,
            commits_wait,
            newer_stored,
        }
    }

    /// Follows until `shutdown`, or until the claim on the group is over.
    pub async fn run(&self, claim: &Claim, shutdown: CancellationToken) {
        let may_write = || claim.is_valid();
        let work = async {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = self.watch() => {}
                () = self.stream(&may_write) => {}
                () = self.heartbeat() => {}
            }
        };
        // Around all of it: also the servers, their slots and what is deleted are left alone by a
        // process that was stopped past its claim.
        if claim.guard(Box::pin(work)).await.is_none() {
            warn!("the claim on the group is over");
        }
        self.state.send_replace(Following::default());
    }

    fn wal(&self) -> &WalConfig {
        &self.context.config.wal
    }

    /// The database cluster that is followed.
    fn followed(&self) -> Option<u64> {
        Some(self.cluster.load(Ordering::Relaxed)).filter(|it| *it > 0)
    }

    /// Asks the servers every few seconds.
    async fn watch(&self) {
        let (mut servers, mut told) = (Servers::default(), BTreeMap::new());
        let (mut absence, mut told_servers) = (NoPrimary::default(), Told::default());
        let (mut known, mut slots_at) = (None, None::<Instant>);
        let (mut reached, mut looked_at) = (Reached::default(), None::<Instant>);
        loop {
            let began_at = Instant::now();
            let nodes = match self.context.topology.nodes().await {
                Ok(nodes) => nodes,
                Err(failure) => {
                    let reason = chain(&failure).to_string();
                    warn!(error = reason, "servers unknown");
                    self.state.send_modify(|state| state.no_primary = Some(reason));
                    self.pause(began_at, NoPrimary::default().look_every()).await;
                    continue;
                }
            };
            let observed = servers.look(&self.context.settings, &nodes, self.group).await;
            // A stream that works is not left for a server on a timeline that is over.
            let received_from = |state: &Following| state.received.and(state.from.clone());
            let received = received_from(&self.state.borrow());
            let led = self.own(&observed, &mut known).await;
            let own = led.as_ref().ok().copied().flatten();
            let received = received.filter(|it| own.is_none_or(|own| own == it.system_identifier));
            let received = received.map(|it| it.timeline);
            let stored = Some(self.newer_stored.swap(0, Ordering::Relaxed)).filter(|it| *it > 0);
            reached.see(&observed, own, received.max(stored));
            let is_due = looked_at.is_none_or(|at| at.elapsed() >= WATCH_EVERY);
            if received.is_none() && is_due && reached.is_in_doubt(&observed) {
                looked_at = Some(Instant::now());
                if let Some(stored) = self.newest_stored(own).await {
                    reached.look_again(stored.newest_stored());
                    reached.see(&observed, own, None);
                }
            }
            let led = led.and_then(|own| cluster::leading(&observed, own, reached.timeline()));
            let (primary, no_primary) = match &led {
                Ok((node, state)) => {
                    absence.is_over(&node.name);
                    (Some(Primary::new(node, state)), None)
                }
                Err(reason) => {
                    absence.goes_on(&observed, reason, received.is_some());
                    (None, Some(reason.to_string()))
                }
            };
            let newest = primary.as_ref().map(|it| it.timeline).or(received);
            let standings = {
                let state = self.state.borrow();
                let line = state.line.as_ref().map(Line::from);
                standing::standings(&observed, own, reached.timeline(), line)
            };
            told_servers.tell(&standings);
            self.state.send_if_modified(|state| {
                let changed = state.primary != primary
                    || state.no_primary != no_primary
                    || state.servers != standings;
                state.flushed = led.as_ref().ok().and_then(|(node, it)| {
                    let is_received = state.from.as_ref().is_some_and(|from| from.node == **node);
                    Some((it.timeline, it.flush_lsn.filter(|_| is_received)?))
                });
                state.received = state.received.map(|it| newer(it, state.flushed));
                (state.primary, state.no_primary) = (primary.clone(), no_primary);
                state.servers = standings;
                changed
            });
            let is_due = slots_at.is_none_or(|at| at.elapsed() >= WATCH_EVERY);
            if primary.is_some() || is_due {
                let of = Watched { observed: &observed, own, primary: primary.as_ref(), newest };
                self.watch_slots(&servers, of, &mut told).await;
                slots_at = Some(began_at);
            } else {
                let answers =
                    |node: &str| cluster::states(&observed).any(|(other, _)| other.name == node);
                self.state.send_modify(|state| {
                    state.burden = None;
                    state.slots.retain(|node, _| answers(node));
                });
            }
            self.pause(began_at, absence.look_every()).await;
        }
    }

    /// The database cluster that is the group's. The repository is asked only if servers answer that are
    /// not of the one that is followed.
    async fn own(
        &self,
        observed: &Group,
        known: &mut Option<(Instant, Known)>,
    ) -> Result<Option<u64>, NotLed> {
        let followed = self.followed();
        let present = || cluster::states(observed).map(|(_, state)| state.system_identifier);
        let first = followed.or_else(|| present().next());
        if present().all(|it| Some(it) == first) {
            return Ok(first);
        }
        if known.as_ref().is_none_or(|(at, _)| at.elapsed() >= WATCH_EVERY) {
            let read = cluster::known(&self.context.repository, self.group);
            match timeout(KNOWN_LIMIT, read).await {
                Ok(Ok(read)) => *known = Some((Instant::now(), read)),
                // What is followed goes on to be.
                _ if followed.is_some() => {}
                Ok(Err(failure)) => return Err(NotLed::Repository(chain(&failure).to_string())),
                Err(_) => return Err(NotLed::Repository("no answer in time".to_owned())),
            }
        }
        let none = Known::new();
        Ok(cluster::own(observed, followed, known.as_ref().map_or(&none, |(_, known)| known))?)
    }

    /// The newest that is stored of the group's database cluster, if that can be read soon.
    async fn newest_stored(&self, own: Option<u64>) -> Option<WalMap> {
        let place = self.context.repository.place(self.group, own?);
        let read = async {
            let segment_bytes = newest::segment_bytes(&place).await?;
            WalMap::read_from(&place, segment_bytes, PgLsn::from(u64::MAX), &[]).await
        };
        match timeout(KNOWN_LIMIT, read).await {
            Ok(Ok(stored)) => return Some(stored),
            Ok(Err(failure)) => warn!(error = %chain(&failure), "stored timelines not read"),
            Err(_) => warn!("stored timelines not read: no answer in time"),
        }
        None
    }

    /// Waits until the servers are to be asked again.
    async fn pause(&self, began_at: Instant, every: Duration) {
        let rest = every.saturating_sub(began_at.elapsed()).max(NoPrimary::at_least());
        tokio::select! {
            () = sleep(rest) => {}
            () = self.look.notified() => {}
        }
    }

    /// Sends a heartbeat every so often, as long as WAL is being received.
    async fn heartbeat(&self) {
        let every = self.wal().heartbeat;
        if every.is_zero() {
            return std::future::pending().await;
        }
        let mut changes = self.state.subscribe();
        loop {
            if changes.wait_for(|state| state.received.is_some()).await.is_err() {
                return;
            }
            let primary = self.state.borrow().primary.clone();
            if let Some(primary) = primary {
                let place = self.context.repository.place(self.group, primary.system_identifier);
                let settings = &self.context.settings;
                let beat = heartbeat::beat(settings, &place, &primary, self.state.subscribe());
                let failure = match beat.await {
                    Ok(took) => {
                        debug!(elapsed_ms = took.as_millis(), "heartbeat read back");
                        self.state.send_modify(|state| state.heartbeat_at = Some(Utc::now()));
                        None
                    }
                    Err(failure) => {
                        let (node, text) = (&primary.node.name, chain(&failure).to_string());
                        match failure {
                            HeartbeatError::Connect(_) | HeartbeatError::Query(_) => {
                                warn!(node, error = text, "heartbeat not written to the primary");
                            }
                            _ => warn!(
                                node,
                                error = text,
                                "heartbeat not read back from the repository"
                            ),
                        }
                        Some(text)
                    }
                };
                self.state.send_modify(|state| state.heartbeat_failure = failure);
            }
            sleep(every).await;
        }
    }

    /// Looks after the slots: what each costs its server, also one that is not followed, and that it exists on
    /// the standbys.
    async fn watch_slots(
        &self,
        servers: &Servers,
        Watched { observed, own, primary, newest }: Watched<'_>,
        told: &mut BTreeMap<String, Vec<Alarm>>,
    ) {
        let mut slots = BTreeMap::new();
        let is_own = |node: &Node, state: &NodeState| {
            Some(state.system_identifier) == own || primary.is_some_and(|it| it.node == *node)
        };
        for (node, state) in cluster::states(observed).filter(|(node, it)| is_own(node, it)) {
            let timeline = state.timeline;
            // Nothing is made on a server before it is known to be the group's.
            let is_kept = state.role == Role::Standby && own == self.followed();
            match self.watch_slot(servers, (node, timeline), is_kept).await {
                Ok(mut burden) => {
                    burden.is_lost |= self.state.borrow().lost.contains_key(&node.name);
                    let is_received = newest.is_none_or(|newest| newest == timeline);
                    let room = self.wal().pg_wal_bytes_max;
                    let alarms = slots::alarms(&burden, room, is_received);
                    let before = told.entry(node.name.clone()).or_default();
                    // What was told of the slot is over when it is moved again.
                    let stay = before.iter().filter(|it| !is_received && it.is_of_slot()).copied();
                    let holding: Vec<_> = alarms.iter().copied().chain(stay).collect();
                    tell(&holding, before, &burden, &node.name);
                    slots.insert(node.name.clone(), SlotState { burden, alarms });
                }
                Err(failure) => {
                    let (slot, error) = (&self.wal().slot, chain(&failure));
                    warn!(node = node.name, slot, %error, "replication slot not observed or kept");
                }
            }
        }
        let burden = primary.and_then(|it| slots.get(&it.node.name)).map(|slot| slot.burden);
        self.state.send_modify(|state| (state.burden, state.slots) = (burden, slots));
        if let Some(burden) = burden {
            self.commits_wait.store(burden.commits_wait, Ordering::Relaxed);
        }
    }

    /// Asks what the slot costs a server. One that `is_kept`, that of a standby, is made, and moved up to
    /// what is stored.
    async fn watch_slot(
        &self,
        servers: &Servers,
        (node, timeline): (&Node, u32),
        is_kept: bool,
    ) -> Result<Burden, FollowError> {
        let slot_name = &self.wal().slot;
        let fresh;
        let connection = if let Some(kept) = servers.connection(node) {
            kept
        } else {
            fresh = connect(&self.context.settings, node).await?;
            &fresh
        };
        // Only what is stored of the timeline that the server is on.
        let received = self.state.borrow().received.filter(|it| it.timeline == timeline);
        let mut was_lost = false;
        if is_kept {
            let slot = slots::ensure(connection, slot_name).await?;
            was_lost = slot.was_lost;
            self.made(node, slot);
            if let Some(received) = received {
                slots::advance(connection, slot_name, received.stored_lsn).await?;
            }
        }
        let mut burden = slots::burden(connection, slot_name).await?;
        burden.is_lost |= was_lost;
        // What the slot no longer holds back is stored by now, or its loss was recorded.
        let is_over = |until: &PgLsn| received.is_some_and(|it| *until <= it.stored_lsn);
        self.state.send_if_modified(|state| {
            let is_over = state.lost.get(&node.name).is_some_and(is_over);
            is_over && state.lost.remove(&node.name).is_some()
        });
        Ok(burden)
    }

    /// Says that a slot was made, and why.
    fn made(&self, node: &Node, slot: Slot) {
        let (name, restart_lsn) = (&self.wal().slot, slot.restart_lsn);
        if slot.was_lost {
            info!(node = node.name, slot = name, %restart_lsn, "lost replication slot made anew");
            self.state.send_modify(|state| {
                state.lost.insert(node.name.clone(), restart_lsn);
            });
            // The alarm is told there, unless it was when the slot was lost.
            self.look.notify_one();
        } else if slot.is_new {
            info!(node = node.name, slot = name, %restart_lsn, "replication slot created");
        }
    }

    /// Streams from whichever server is the primary; tries again for ever.
    async fn stream(&self, may_write: &(dyn Fn() -> bool + Sync)) {
        let mut changes = self.state.subscribe();
        let mut wait = RETRY_FIRST;
        while may_write() {
            let primary = changes.borrow_and_update().primary.clone();
            let Some(primary) = primary else {
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let settings = &self.context.settings;
            self.state.send_modify(|state| state.from = Some(primary.clone()));
            let outcome = tokio::select! {
                failure = Box::pin(self.stream_from(&primary, may_write)) => failure,
                () = held_up::held_up(settings, &primary.node, self.state.subscribe()) => {
                    Err(FollowError::HeldUp { node: primary.node.to_string() })
                }
                other = other_primary(self.state.subscribe(), &primary) => {
                    let (from, node) = (&primary.node.name, &other.node.name);
                    info!(node, timeline = other.timeline, from, "another server is the primary now");
                    wait = RETRY_FIRST;
                    self.stopped(None);
                    continue;
                }
            };
            let Err(failure) = outcome;
            if let FollowError::Refused { source: Refusal::OldTimeline { stored, .. }, .. } =
                &failure
            {
                self.newer_stored.store(*stored, Ordering::Relaxed);
            }
            let advice = if failure.is_locked() { LOST_KEY } else { "" };
            let text = format!("{}{advice}", chain(&failure));
            if failure.is_shutdown() {
                info!(node = primary.node.name, "the server is shutting down");
            } else {
                error!(node = primary.node.name, error = text, "WAL is not being received");
            }
            self.stopped(Some(text));
            // Commits may be waiting: who got on does not wait longer each time.
            if self.has_got_on.swap(false, Ordering::Relaxed) {
                wait = RETRY_FIRST;
            }
            sleep(RETRY_FIRST).await;
            tokio::select! {
                () = sleep(wait.saturating_sub(RETRY_FIRST)) => wait = (wait * 2).min(RETRY_LONGEST),
                () = has_changed(self.state.subscribe(), &primary) => wait = RETRY_FIRST,
            }
        }
    }

    fn stopped(&self, failure: Option<String>) {
        // Perhaps another server is the primary by now.
        self.look.notify_one();
        self.state.send_modify(|state| {
            (state.received, state.upload_since, state.failure) = (None, None, failure);
            (state.from, state.flushed) = (None, None);
        });
    }

    /// Streams from one primary, over all timelines that it has, until something fails.
    async fn stream_from(
        &self,
        primary: &Primary,
        may_write: &(dyn Fn() -> bool + Sync),
    ) -> Result<std::convert::Infallible, FollowError> {
        let slot_name = &self.wal().slot;
        let settings =
            Settings { application_name: slot_name.clone(), ..self.context.settings.clone() };
        let place = self.context.repository.place(self.group, primary.system_identifier);
        let place = place.pinned().await?;
        let known = cluster::known(&self.context.repository, self.group).await?;
        cluster::require(&known, (self.group, &primary.node, primary.system_identifier))?;
        same_key::require(&place).await?;
        require(&place, may_write)?;
        wal::rekey(&place).await?;
        let slot = self.begin(primary, &place, may_write).await?;
        let receiver = Receiver {
            place: &place,
            segment_bytes: primary.segment_bytes,
            shipping: &|| self.shipping(),
            may_write,
            on_progress: &|received, waiting| self.progressed(received, waiting),
            on_kept: &|error| self.kept(error),
        };
        let mut replication = Replication::connect(&settings, &primary.node, STALL_LIMIT).await?;
        let mut slot_lsn = slot.restart_lsn;
        let (mut after_gap, mut has_begun) = (None, false);
        loop {
            let identity = replication.identify_system().await?;
            if identity.system_identifier != primary.system_identifier {
                return Err(FollowError::OtherServer {
                    node: primary.node.to_string(),
                    expected: primary.system_identifier,
                    found: identity.system_identifier,
                });
            }
            let (files, history) = histories(&mut replication, identity.timeline).await?;
            let stored =
                WalMap::read_from(&place, primary.segment_bytes, slot_lsn, &history).await?;
            require(&place, may_write)?;
            let mut stored = without_damaged(&place, stored).await?;
            // Once more, so that the position is not older than what was stored by others meanwhile.
            let flush_lsn = replication.identify_system().await?.lsn;
            let timeline = identity.timeline;
            let server = Server { timeline, flush_lsn, history, slot_lsn };
            self.leads(&server);
            let start =
                resume::start(&stored, &server, self.wal().on_divergence).map_err(|source| {
                    FollowError::Refused { node: primary.node.to_string(), source }
                })?;
            if let Some(diverged) = start.diverged {
                tell_lost(&primary.node, diverged);
            }
            require(&place, may_write)?;
            self.remove_superseded(&place, &mut stored).await?;
            for (name, text) in files {
                wal::store(&place, Packed::read(&name, text.as_bytes(), 1)?).await?;
            }
            // After its history, which says what the number means.
            if !stored.followed.contains(&timeline) {
                followed::mark(&place, timeline).await?;
            }
            let at = after_gap.take().unwrap_or(start.at);
            // What was received in this run is the server's.
            let again = resume::to_compare(&stored, &server, at).filter(|_| !has_begun);
            has_begun = true;
            let segment = again.unwrap_or(at.segment(primary.segment_bytes));
            let lsn = PgLsn::from(segment.number * primary.segment_bytes);
            let beginning = if again.is_some() {
                Beginning::Whole
            } else {
                Beginning::Pieces(stored.pieces.get(&segment).cloned().unwrap_or_default())
            };
            let stream = replication.start_replication(slot_name, segment.timeline, lsn).await;
            let mut stream = match stream {
                Ok(stream) => stream,
                Err(failure) => return Err(self.refused(primary, failure).await),
            };
            info!(
                node = primary.node.name, timeline = at.timeline, stored_lsn = %at.lsn,
                memory_bytes_max = receive::memory_bytes_max(primary.segment_bytes), "receiving WAL"
            );
            match receiver.run(&mut stream, segment, beginning).await {
                Ok(()) => {}
                Err(ReceiveError::Replication(failure)) if failure.is_removed() => {
                    // Nothing can be compared with it any more.
                    if again.is_none() {
                        let after = self.gap(primary, &place, (&start, at, &server), &failure);
                        after_gap = Some(after.await?);
                    }
                    replication =
                        Replication::connect(&settings, &primary.node, STALL_LIMIT).await?;
                    continue;
                }
                Err(failure) => {
                    let upload_since = self.state.borrow().upload_since;
                    let upload = upload_since.map(|since| since.elapsed());
                    return Err(broken_off(&primary.node, failure, upload));
                }
            }
            let (connection, ended) = stream.finish().await?;
            info!(
                timeline = segment.timeline, next_timeline = ended.next_timeline,
                switch_lsn = %ended.switch_lsn, "timeline ended"
            );
            (replication, slot_lsn) = (connection, ended.switch_lsn);
        }
    }

    /// Takes note of where a primary's timeline comes from.
    fn leads(&self, server: &Server) {
        self.state.send_if_modified(|state| {
            state.line = Some((server.timeline, server.history.clone()));
            false
        });
    }

    /// Why a server does not begin to stream: it says only the number of the process that has the slot.
    async fn refused(&self, primary: &Primary, failure: ReplicationError) -> FollowError {
        let is_in_use = matches!(&failure, ReplicationError::Server { message, .. }
            if message.code == OBJECT_IN_USE);
        if is_in_use && let Ok(connection) = connect(&self.context.settings, &primary.node).await {
            let (node, slot) = (primary.node.to_string(), self.wal().slot.clone());
            if let Ok(Some(user)) = slots::user(&connection, &slot).await {
                return FollowError::SlotInUse { node, slot, user };
            }
        }
        failure.into()
    }

    /// Makes sure that the place and the slot are there and are ours.
    async fn begin(
        &self,
        primary: &Primary,
        place: &Place,
        may_write: &(dyn Fn() -> bool + Sync),
    ) -> Result<Slot, FollowError> {
        let slot_name = &self.wal().slot;
        let connection = connect(&self.context.settings, &primary.node).await?;
        begun::require(&self.context, place, (&connection, primary), may_write).await?;
        self.cluster.store(primary.system_identifier, Ordering::Relaxed);
        self.require_size(place, primary).await?;
        // The lease says that nobody but we may use it.
        if self.context.etcd.is_some()
            && let Some(user) = slots::free(&connection, slot_name).await?
        {
            let (node, slot) = (&primary.node.name, slot_name);
            warn!(node, slot, user, "another connection of the agent had the slot: it was ended");
        }
        let slot = slots::ensure(&connection, slot_name).await?;
        self.made(&primary.node, slot);
        // Whether commits wait is asked before the first of them does.
        let burden = slots::burden(&connection, slot_name).await?;
        if burden.is_unbounded(self.wal().pg_wal_bytes_max)
            && !self.said_unbounded.swap(true, Ordering::Relaxed)
        {
            warn!(node = primary.node.name, "{}", slots::UNBOUNDED);
        }
        self.commits_wait.store(burden.commits_wait, Ordering::Relaxed);
        self.state.send_modify(|state| state.burden = Some(burden));
        Ok(slot)
    }

    /// Refuses a server whose segments have another size than those that are stored. Asked once.
    async fn require_size(&self, place: &Place, primary: &Primary) -> Result<(), FollowError> {
        let found = primary.segment_bytes;
        if self.segment_bytes.load(Ordering::Relaxed) == found {
            return Ok(());
        }
        let stored = newest::of_wal(place).await;
        let stored = match stored {
            Err(failure) if failure.is_damage() => None,
            stored => stored?,
        };
        if let Some(stored) = stored.filter(|stored| *stored != found) {
            let node = primary.node.to_string();
            return Err(FollowError::SegmentSize { node, stored, found });
        }
        self.segment_bytes.store(found, Ordering::Relaxed);
        Ok(())
    }

    /// Records that the server has removed WAL before it was stored; returns where it goes on.
    async fn gap(
        &self,
        primary: &Primary,
        place: &Place,
        (start, at, server): (&Start, Position, &Server),
        removed: &ReplicationError,
    ) -> Result<Position, FollowError> {
        let mut after = start.or_else.filter(|_| at == start.at);
        if after.is_none() {
            // Somebody has removed it, not the server, or the slot was made anew in the same segment.
            let connection = connect(&self.context.settings, &primary.node).await?;
            let there = slots::segments(&connection, primary.segment_bytes).await?;
            after = resume::oldest_after(there, server, at, primary.segment_bytes);
        }
        let Some(after) = after else {
            let (node, timeline) = (primary.node.to_string(), at.timeline);
            return Err(FollowError::Removed { node, timeline, at: at.lsn });
        };
        let gap = Gap {
            timeline: at.timeline,
            from_lsn: at.lsn,
            until_lsn: after.lsn,
            noticed_at: Utc::now(),
            reason: chain(removed).to_string(),
        };
        error!(
            node = primary.node.name, timeline = gap.timeline, from_lsn = %gap.from_lsn,
            until_lsn = %gap.until_lsn, reason = gap.reason,
            "GAP: WAL was removed before it was stored; a new base backup is needed"
        );
        wal::store_gap(place, &gap).await?;
        // If the queue is full, it is asked for already.
        self.needs_backup.try_send(self.group).ok();
        Ok(after)
    }

    /// Removes the pieces of segments that are complete: whoever stored them was stopped before. If a
    /// complete one cannot be read back, its pieces are what there is; if it has other content, nobody
    /// knows which is right.
    async fn remove_superseded(&self, place: &Place, stored: &mut WalMap) -> Result<(), WalError> {
        for segment in stored.superseded().collect::<Vec<_>>() {
            match stored.compare_one(place, segment).await {
                Ok(()) => {}
                Err(WalError::Repository(failure)) if failure.is_transient() => {
                    return Err(failure.into());
                }
                Err(failure) => {
                    let segment = segment.name(stored.segment_bytes);
                    warn!(segment, error = %chain(&failure), "complete WAL segment not read back");
                    continue;
                }
            }
            if let Some(found) = stored.conflict(segment) {
                let name = segment.name(stored.segment_bytes);
                return Err(WalError::Conflict { name, found });
            }
            let known: Vec<_> = stored.pieces[&segment].iter().map(Piece::mark).collect();
            match piece::remove(place, segment, stored.segment_bytes, &known).await {
                Ok(()) => {}
                Err(failure) if failure.is_denied() => {
                    self.kept(&failure);
                    break;
                }
                Err(failure) => {
                    warn!(error = %chain(&failure), "pieces of a stored segment not removed");
                    break;
                }
            }
        }
        Ok(())
    }

    /// Says once that what was replaced stays: that is right under Object Lock.
    fn kept(&self, failure: &RepositoryError) {
        if !self.said_kept.swap(true, Ordering::Relaxed) {
            warn!(
                error = %chain(failure),
                "the store does not let pieces of WAL segments be deleted that were replaced: they stay \
                 until `expire` may delete them"
            );
        }
    }

    /// How to ship just now: at once if commits wait for it.
    fn shipping(&self) -> Shipping {
        let wal = self.wal();
        let commits_wait = self.commits_wait.load(Ordering::Relaxed);
        Shipping {
            interval: if commits_wait { Duration::ZERO } else { wal.ship_interval },
            bytes: wal.ship_bytes,
            level: wal.compression_level,
        }
    }

    fn progressed(&self, received: Received, waiting: Waiting) {
        self.state.send_if_modified(|state| {
            let received = newer(received, state.flushed);
            if has_got_on(state.received, received) {
                self.has_got_on.store(true, Ordering::Relaxed);
            }
            let changed = state.received != Some(received);
            (state.received, state.failure) = (Some(received), None);
            state.caught_up_at = state.caught_up_at.max(waiting.caught_up_at);
            state.upload_since = waiting.upload_since;
            changed
        });
    }
}

impl Primary {
    fn new(node: &Node, state: &NodeState) -> Self {
        Self {
            node: node.clone(),
            timeline: state.timeline,
            system_identifier: state.system_identifier,
            segment_bytes: state.wal_segment_bytes,
        }
    }
}

/// What was received, with what the server said on another connection of how far its disk has WAL: the
/// one that sends may hang.
fn newer(received: Received, flushed: Option<(u32, PgLsn)>) -> Received {
    let flushed = flushed.filter(|(timeline, _)| *timeline == received.timeline);
    let told = flushed.map_or(received.server_lsn, |(_, lsn)| received.server_lsn.max(lsn));
    Received { server_lsn: told, ..received }
}

/// Whether WAL was stored since `before`, or all there is was stored already.
fn has_got_on(before: Option<Received>, now: Received) -> bool {
    // What is there is compared before anything is stored: 0 until then.
    let known = before.filter(|it| u64::from(it.stored_lsn) > 0);
    now.lag_bytes() == Some(0) || known.is_some_and(|it| it.stored_lsn < now.stored_lsn)
}

/// Resolves when another server than `primary` is the primary: also one of the same name, behind an address
/// that moves. A primary's own timeline changes only when it is restarted. That none is seen is no reason to
/// give a stream up that works.
async fn other_primary(mut changes: watch::Receiver<Following>, primary: &Primary) -> Primary {
    let other = changes.wait_for(|state| {
        state.primary.as_ref().is_some_and(|it| {
            // The connection that streams may have led to the new one already.
            let streamed = state.received.map(|it| it.timeline).max(Some(primary.timeline));
            it.node != primary.node
                || it.system_identifier != primary.system_identifier
                || Some(it.timeline) > streamed
        })
    });
    match other.await.ok().and_then(|state| state.primary.clone()) {
        Some(other) => other,
        None => std::future::pending().await,
    }
}

/// Resolves when there is another primary than the one that was `tried`, on another timeline, or again.
async fn has_changed(mut changes: watch::Receiver<Following>, tried: &Primary) {
    let is_gone = |state: &Following| state.primary.as_ref() != Some(tried);
    if changes.wait_for(is_gone).await.is_err()
        || changes.wait_for(|state| state.primary.is_some()).await.is_err()
    {
        std::future::pending::<()>().await;
    }
}

/// Nothing is written or removed without a claim.
fn require(place: &Place, may_write: &(dyn Fn() -> bool + Sync)) -> Result<(), ReceiveError> {
    if may_write() { Ok(()) } else { Err(ReceiveError::LeaseLost { group: place.group }) }
}

/// The timeline that a primary writes, and those before it, as it says itself.
pub(crate) async fn line(
    settings: &Settings,
    node: &Node,
) -> Result<(u32, Vec<HistoryEntry>), FollowError> {
    let mut replication = Replication::connect(settings, node, STALL_LIMIT).await?;
    let timeline = replication.identify_system().await?.timeline;
    let (_, history) = histories(&mut replication, timeline).await?;
    Ok((timeline, history))
}

/// Compares complete segments with their pieces; those that are damaged are as if they were not there.
async fn without_damaged(place: &Place, mut stored: WalMap) -> Result<WalMap, FollowError> {
    for (segment, failure) in stored.compare(place).await? {
        error!(
            segment = segment.name(stored.segment_bytes), error = %chain(&failure),
            "a complete WAL segment is damaged; its pieces stand for it"
        );
        stored.disregard(segment);
    }
    Ok(stored)
}

/// Fetches the histories of a timeline and of those before it: the file of each, and the history
/// of the last.
async fn histories(
    replication: &mut Replication,
    timeline: u32,
) -> Result<(Vec<(String, String)>, Vec<HistoryEntry>), FollowError> {
    if timeline == 1 {
        return Ok((Vec::new(), Vec::new()));
    }
    let newest = replication.timeline_history(timeline).await?;
    let history = parse_history(&newest.1)
        .map_err(|error| WalError::History { name: newest.0.clone(), reason: error.to_string() })?;
    let mut files = Vec::new();
    // A recovery looks for one timeline after the other and stops at the first it does not find.
    for entry in history.iter().filter(|entry| entry.timeline > 1) {
        match replication.timeline_history(entry.timeline).await {
            Ok(file) => files.push(file),
            Err(failure) if failure.is_removed() => {
                let timeline = entry.timeline;
                warn!(timeline, error = %chain(&failure), "the server has no history of a timeline");
            }
            Err(failure) => return Err(failure.into()),
        }
    }
    files.push(newest);
    Ok((files, history))
}

/// Says which alarms are new and which are over.
fn tell(alarms: &[Alarm], told: &mut Vec<Alarm>, burden: &Burden, node: &str) {
    for alarm in alarms.iter().filter(|alarm| !told.contains(alarm)) {
        let (retained_bytes, limit_bytes) = (burden.retained_bytes, burden.limit_bytes);
        match alarm {
            Alarm::SlotHalf => warn!(
                node,
                retained_bytes,
                limit_bytes,
                "half of max_slot_wal_keep_size is used: WAL reaches the repository too slowly"
            ),
            Alarm::SlotNearlyLost => error!(
                node,
                retained_bytes,
                limit_bytes,
                "three quarters of max_slot_wal_keep_size are used: beyond it the slot is lost and \
                 WAL is missing. Mend the way to the repository, or raise the limit now"
            ),
            Alarm::SlotLost => error!(
                node,
                limit_bytes,
                "the replication slot was lost, beyond max_slot_wal_keep_size: WAL that it held back \
                 and that is not stored may be gone from this server"
            ),
            Alarm::DiskNearlyFull => error!(
                node,
                pg_wal_bytes = burden.pg_wal_bytes,
                "three quarters of the room for pg_wal are used: when it is full, PostgreSQL stops"
            ),
            Alarm::PgWalGrows => error!(
                node,
                pg_wal_bytes = burden.pg_wal_bytes,
                usual_bytes = burden.usual_bytes,
                "pg_wal takes more than three times max_wal_size, and nothing bounds it: when the disk is \
                 full, PostgreSQL stops. Mend the way to the repository, or set max_slot_wal_keep_size"
            ),
            Alarm::CommitsWaitForUsAlone => warn!(
                node,
                "commits wait for the repository alone: no other synchronous standby is streaming"
            ),
        }
    }
    if alarms.is_empty() && !told.is_empty() {
        info!(node, "alarms about the slot are over");
    }
    *told = alarms.to_vec();
}

/// Says that a new primary, which is followed, lacks what is stored.
fn tell_lost(node: &Node, it: Divergence) {
    error!(
        node = node.name, timeline = it.timeline, from_lsn = %it.from_lsn, until_lsn = %it.until_lsn,
        bytes = it.bytes(),
        "the new primary lacks WAL that is stored; the commits in it can only be restored on the old \
         timeline"
    );
}

/// Why receiving ended: a connection that breaks while an `upload` takes that long was not read from.
fn broken_off(node: &Node, failure: ReceiveError, upload: Option<Duration>) -> FollowError {
    match (failure, upload) {
        (ReceiveError::Replication(source @ ReplicationError::Broken { .. }), Some(upload))
            if upload >= TCP_USER_TIMEOUT =>
        {
            FollowError::TooSlow { node: node.to_string(), upload_s: upload.as_secs(), source }
        }
        (failure, _) => failure.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_connection_from_which_nothing_was_read_says_why_it_broke() {
        let node = Node { group: 0, name: "a".to_owned(), host: "a".to_owned(), port: 5432 };
        let broken = || ReplicationError::Broken {
            node: "a".to_owned(),
            source: io::ErrorKind::ConnectionReset.into(),
        };
        for (case, upload_s, expected) in [
            ("nothing was under way", None, false),
            ("the store took it as it came", Some(59), false),
            ("the store took nothing", Some(60), true),
        ] {
            let upload = upload_s.map(Duration::from_secs);
            let found = broken_off(&node, broken().into(), upload);
            assert_eq!(matches!(found, FollowError::TooSlow { .. }), expected, "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_known_yet_has_a_state_of_its_own() {
        let received = |stored: u64, server: u64| {
            let (stored_lsn, server_lsn) = (stored.into(), server.into());
            Some(Received { timeline: 1, received_lsn: server_lsn, stored_lsn, server_lsn })
        };
        let node = Node { group: 0, name: "a".to_owned(), host: "a".to_owned(), port: 5432 };
        let primary =
            Some(Primary { node, timeline: 1, system_identifier: 7, segment_bytes: 16 << 20 });
        let began_at = Instant::now();
        sleep(LONG).await;
        let (now, failure) = (Instant::now(), || Some("refused".to_owned()));
        let nothing = Following::default();
        let found = Following { primary, ..nothing.clone() };
        let comes = Following { received: received(10, 50), ..found.clone() };
        let caught_up_at = Some(Utc::now());
        for (case, following, expected) in [
            ("the agent began", nothing.clone(), WalState::NoPrimary),
            (
                "its primary is gone",
                Following { failure: failure(), ..nothing },
                WalState::NoPrimary,
            ),
            ("it was found", found.clone(), WalState::Starting),
            ("it is refused", Following { failure: failure(), ..found.clone() }, WalState::Failed),
            (
                "what is stored is compared",
                Following { received: received(0, 50), ..found.clone() },
                WalState::Starting,
            ),
            ("something comes", comes.clone(), WalState::CatchingUp),
            (
                "no primary is seen",
                Following { primary: None, ..comes.clone() },
                WalState::CatchingUp,
            ),
            (
                "all was stored once",
                Following { caught_up_at, ..comes.clone() },
                WalState::Streaming,
            ),
            (
                "it is being stored",
                Following { caught_up_at, upload_since: Some(now), ..comes.clone() },
                WalState::Streaming,
            ),
            (
                "the store hangs",
                Following { caught_up_at, upload_since: Some(began_at), ..comes },
                WalState::UploadHangs,
            ),
            (
                "it failed later",
                Following { caught_up_at, failure: failure(), ..found },
                WalState::Failed,
            ),
        ] {
            let state = following.wal_state();
            assert_eq!(state, expected, "{case}");
            let (_, name) = WalState::ALL.into_iter().find(|(it, _)| *it == state).unwrap();
            assert_eq!(following.status()["state"], name, "{case}");
        }
    }

    #[test]
    fn what_the_server_has_is_the_newest_that_it_said() {
        let received = Received {
            timeline: 2,
            received_lsn: 50.into(),
            stored_lsn: 50.into(),
            server_lsn: 50.into(),
        };
        for (case, flushed, expected) in [
            ("it did not answer", None, 0),
            ("its sender hangs", Some((2, 90.into())), 40),
            ("it was asked before", Some((2, 40.into())), 0),
            ("of another timeline", Some((3, 90.into())), 0),
        ] {
            assert_eq!(newer(received, flushed).lag_bytes(), Some(expected), "{case}");
        }
    }

    /// Who waits after a failure does not wait on when the cause may be gone.
    #[tokio::test(start_paused = true)]
    async fn a_primary_that_changes_or_is_back_ends_the_wait() {
        let primary = |name: &str, timeline| {
            let (name, host) = (name.to_owned(), name.to_owned());
            let node = Node { group: 0, name, host, port: 5432 };
            Some(Primary { node, timeline, system_identifier: 7, segment_bytes: 16 << 20 })
        };
        let tried = primary("a", 1);
        for (case, seen, expected) in [
            ("nothing new", vec![primary("a", 1)], false),
            ("it is gone", vec![None], false),
            ("it is back", vec![None, primary("a", 1)], true),
            ("on another timeline", vec![primary("a", 2)], true),
            ("another one", vec![primary("b", 2)], true),
        ] {
            let state =
                watch::Sender::new(Following { primary: tried.clone(), ..Following::default() });
            let wait = has_changed(state.subscribe(), tried.as_ref().unwrap());
            let changes = async {
                for primary in seen {
                    sleep(Duration::from_millis(1)).await;
                    state.send_modify(|state| state.primary = primary);
                }
                sleep(Duration::from_secs(1)).await;
            };
            let has_changed = tokio::select! {
                biased;
                () = wait => true,
                () = changes => false,
            };
            assert_eq!(has_changed, expected, "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_left_for_another_primary_only() {
        let primary = |name: &str, timeline, system_identifier| {
            let (name, host) = (name.to_owned(), "vip".to_owned());
            let node = Node { group: 0, name, host, port: 5432 };
            Primary { node, timeline, system_identifier, segment_bytes: 16 << 20 }
        };
        let (from, lsn) = (primary("a", 1, 7), PgLsn::from(10));
        let received = |timeline| {
            Some(Received { timeline, received_lsn: lsn, stored_lsn: lsn, server_lsn: lsn })
        };
        for (case, seen, received, is_left) in [
            ("it is still the primary", Some(primary("a", 1, 7)), received(1), false),
            ("none is seen", None, received(1), false),
            ("another server is", Some(primary("b", 2, 7)), received(1), true),
            ("of another cluster", Some(primary("a", 1, 8)), received(1), true),
            ("its address leads to the new one", Some(primary("a", 2, 7)), received(1), true),
            ("the stream does so, too", Some(primary("a", 2, 7)), received(2), false),
            ("nothing came yet", Some(primary("a", 2, 7)), None, true),
        ] {
            let state = watch::Sender::new(Following { received, ..Following::default() });
            state.send_modify(|it| it.primary = seen);
            let other = other_primary(state.subscribe(), &from);
            let found = timeout(Duration::from_secs(1), other).await.is_ok();
            assert_eq!(found, is_left, "{case}");
        }
    }

    #[test]
    fn getting_on_is_to_store_or_to_have_stored_all() {
        let received = |stored: u64, server: u64| Received {
            timeline: 1,
            received_lsn: server.into(),
            stored_lsn: stored.into(),
            server_lsn: server.into(),
        };
        for (case, before, now, expected) in [
            ("nothing is known", None, received(0, 0), false),
            ("the server tells, nothing is compared", None, received(0, 50), false),
            ("what is stored was compared", Some(received(0, 50)), received(40, 50), false),
            ("nothing is to be stored", Some(received(0, 50)), received(50, 50), true),
            ("the store fails", Some(received(40, 50)), received(40, 60), false),
            ("something was stored", Some(received(40, 60)), received(45, 60), true),
        ] {
            assert_eq!(has_got_on(before, now), expected, "{case}");
        }
    }
}
