//! Follows a group's primary wherever it goes, and stores its WAL.
//!
//! One part watches the servers: who is primary, what the slot costs it, and whether every standby
//! has the slot. The other streams from the primary that the first has found, over timelines.

pub(crate) mod begun;
mod held_up;
mod no_primary;
mod servers;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
use shared::topology::{Group, GroupError, NodeState, Role};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::backup::Context;
use crate::config::WalConfig;
use crate::heartbeat;
use crate::quantities;
use crate::receive::upload::LONG;
use crate::receive::{self, Beginning, ReceiveError, Received, Receiver, Shipping, Waiting};
use crate::replication::{Replication, ReplicationError};
use crate::repository::{Place, RepositoryError};
use crate::resume::{self, Position, Refusal, Server, Start};
use crate::same_key;
use crate::slots::{self, Alarm, Burden, Slot};
use crate::wal::piece::{self, Piece};
use crate::wal::{self, Gap, Packed, WalError, WalMap, newest};
use no_primary::NoPrimary;
use servers::Servers;

/// The first wait after a failure; each further one doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest wait between two attempts.
pub(crate) const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// The server may be silent this long while it is not streaming.
const STALL_LIMIT: Duration = Duration::from_mins(1);

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
    /// Receiving stopped.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
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
}

impl Follower {
    /// A follower that knows nothing yet.
    pub fn new(context: Context, group: u32, needs_backup: mpsc::Sender<u32>) -> Self {
        let (state, look) = (watch::Sender::default(), Notify::new());
        let (has_got_on, said_kept) = (AtomicBool::new(false), AtomicBool::new(false));
        let (said_unbounded, segment_bytes) = (AtomicBool::new(false), AtomicU64::new(0));
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

    /// Asks the servers every few seconds.
    async fn watch(&self) {
        let (mut servers, mut told) = (Servers::default(), BTreeMap::new());
        let mut absence = NoPrimary::default();
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
            let (primary, no_primary) = match leading(&observed) {
                Ok((node, state)) => {
                    absence.is_over(&node.name);
                    (Some(Primary::new(node, state)), None)
                }
                Err(reason) => {
                    let is_received = self.state.borrow().received.is_some();
                    absence.goes_on(&observed, &reason, is_received);
                    (None, Some(reason.to_string()))
                }
            };
            self.state.send_if_modified(|state| {
                let changed = state.primary != primary || state.no_primary != no_primary;
                (state.primary, state.no_primary) = (primary.clone(), no_primary.clone());
                changed
            });
            if let Some(primary) = primary {
                self.watch_slots(&servers, &observed, &primary, &mut told).await;
            }
            self.pause(began_at, absence.look_every()).await;
        }
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
                        let text = chain(&failure).to_string();
                        warn!(error = text, "heartbeat not read back from the repository");
                        Some(text)
                    }
                };
                self.state.send_modify(|state| state.heartbeat_failure = failure);
            }
            sleep(every).await;
        }
    }

    /// Looks after the slots: what each costs its server, and that it exists on the standbys.
    async fn watch_slots(
        &self,
        servers: &Servers,
        observed: &Group,
        primary: &Primary,
        told: &mut BTreeMap<String, Vec<Alarm>>,
    ) {
        let mut slots = BTreeMap::new();
        let standbys = observed.standbys().map(|(node, state)| (node, Some(state)));
        for (node, standby) in [(&primary.node, None)].into_iter().chain(standbys) {
            match self.watch_slot(servers, node, standby).await {
                Ok(mut burden) => {
                    burden.is_lost |= self.state.borrow().lost.contains_key(&node.name);
                    let alarms = slots::alarms(&burden, self.wal().pg_wal_bytes_max);
                    tell(&alarms, told.entry(node.name.clone()).or_default(), &burden, &node.name);
                    slots.insert(node.name.clone(), SlotState { burden, alarms });
                }
                Err(failure) => {
                    let (slot, error) = (&self.wal().slot, chain(&failure));
                    warn!(node = node.name, slot, %error, "replication slot not observed or kept");
                }
            }
        }
        self.state.send_modify(|state| {
            state.burden = slots.get(&primary.node.name).map(|slot| slot.burden);
            state.slots = slots;
        });
    }

    /// Asks what the slot costs a server. That of a standby is made, and moved up to what is stored.
    async fn watch_slot(
        &self,
        servers: &Servers,
        node: &Node,
        standby: Option<&NodeState>,
    ) -> Result<Burden, FollowError> {
        let slot_name = &self.wal().slot;
        let fresh;
        let connection = if let Some(kept) = servers.connection(node) {
            kept
        } else {
            fresh = connect(&self.context.settings, node).await?;
            &fresh
        };
        let burden = slots::burden(connection, slot_name).await?;
        let received = self.state.borrow().received;
        if let Some(state) = standby {
            let slot = slots::ensure(connection, slot_name).await?;
            self.made(node, slot);
            // Only what is stored of the timeline that this standby is on.
            if let Some(received) = received.filter(|it| it.timeline == state.timeline) {
                slots::advance(connection, slot_name, received.stored_lsn).await?;
            }
        }
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
            let outcome = tokio::select! {
                failure = Box::pin(self.stream_from(&primary, may_write)) => failure,
                () = held_up::held_up(settings, &primary.node, self.state.subscribe()) => {
                    Err(FollowError::HeldUp { node: primary.node.to_string() })
                }
                () = other_primary(self.state.subscribe(), &primary) => {
                    info!(node = primary.node.name, "another server is the primary now");
                    wait = RETRY_FIRST;
                    self.stopped(None);
                    continue;
                }
            };
            let Err(failure) = outcome;
            let text = chain(&failure).to_string();
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
            sleep(wait).await;
            wait = (wait * 2).min(RETRY_LONGEST);
        }
    }

    fn stopped(&self, failure: Option<String>) {
        // Perhaps another server is the primary by now.
        self.look.notify_one();
        self.state.send_modify(|state| {
            (state.received, state.upload_since, state.failure) = (None, None, failure);
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
            let start =
                resume::start(&stored, &server, self.wal().on_divergence).map_err(|source| {
                    FollowError::Refused { node: primary.node.to_string(), source }
                })?;
            if let Some(it) = start.diverged {
                error!(
                    node = primary.node.name, timeline = it.timeline, from_lsn = %it.from_lsn,
                    until_lsn = %it.until_lsn, bytes = it.bytes(),
                    "the new primary lacks WAL that is stored; the commits in it can only be \
                     restored on the old timeline"
                );
            }
            require(&place, may_write)?;
            self.remove_superseded(&place, &mut stored).await?;
            for (name, text) in files {
                wal::store(&place, Packed::read(&name, text.as_bytes(), 1)?).await?;
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
            info!(
                node = primary.node.name, timeline = at.timeline, stored_lsn = %at.lsn,
                memory_bytes_max = receive::memory_bytes_max(primary.segment_bytes), "receiving WAL"
            );
            let timeline = segment.timeline;
            let mut stream = replication.start_replication(slot_name, timeline, lsn).await?;
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
                Err(failure) => return Err(failure.into()),
            }
            let (connection, ended) = stream.finish().await?;
            info!(
                timeline, next_timeline = ended.next_timeline,
                switch_lsn = %ended.switch_lsn, "timeline ended"
            );
            (replication, slot_lsn) = (connection, ended.switch_lsn);
        }
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
        // The lease says that nobody but we may use it.
        if self.context.etcd.is_some() && slots::free(&connection, slot_name).await? {
            warn!(node = primary.node.name, slot = slot_name, "another connection had the slot");
        }
        begun::require(&self.context, place, (&connection, primary), may_write).await?;
        self.require_size(place, primary).await?;
        let slot = slots::ensure(&connection, slot_name).await?;
        self.made(&primary.node, slot);
        // Whether commits wait is asked before the first of them does.
        let burden = slots::burden(&connection, slot_name).await?;
        if burden.is_unbounded(self.wal().pg_wal_bytes_max)
            && !self.said_unbounded.swap(true, Ordering::Relaxed)
        {
            warn!(node = primary.node.name, "{}", slots::UNBOUNDED);
        }
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
        let commits_wait = self.state.borrow().burden.is_some_and(|burden| burden.commits_wait);
        Shipping {
            interval: if commits_wait { Duration::ZERO } else { wal.ship_interval },
            bytes: wal.ship_bytes,
            level: wal.compression_level,
        }
    }

    fn progressed(&self, received: Received, waiting: Waiting) {
        self.state.send_if_modified(|state| {
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

/// The primary to follow: after a failover an old one may be back, on a lower timeline.
fn leading(group: &Group) -> Result<(&Node, &NodeState), GroupError> {
    let primaries = group.nodes.iter().filter_map(|it| Some((&it.node, it.state.as_ref().ok()?)));
    let primaries = primaries.filter(|(_, state)| state.role == Role::Primary);
    let newest = primaries.clone().map(|(_, state)| state.timeline).max();
    let mut newest = primaries.filter(|(_, state)| Some(state.timeline) == newest);
    match (newest.next(), newest.next()) {
        (Some(primary), None) => Ok(primary),
        _ => group.primary(),
    }
}

/// Whether WAL was stored since `before`, or all there is was stored already.
fn has_got_on(before: Option<Received>, now: Received) -> bool {
    // What is there is compared before anything is stored: 0 until then.
    let known = before.filter(|it| u64::from(it.stored_lsn) > 0);
    now.lag_bytes() == Some(0) || known.is_some_and(|it| it.stored_lsn < now.stored_lsn)
}

/// Resolves when a server other than `primary`, or the same on another timeline, is the primary.
/// That none is seen is no reason to give a stream up that works.
async fn other_primary(mut changes: watch::Receiver<Following>, primary: &Primary) {
    let other = |state: &Following| {
        state.primary.as_ref().is_some_and(|it| {
            it.node != primary.node || it.system_identifier != primary.system_identifier
        })
    };
    if changes.wait_for(other).await.is_err() {
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

#[cfg(test)]
mod tests {
    use super::*;

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
