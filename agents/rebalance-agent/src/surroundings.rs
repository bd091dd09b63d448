//! What others know: the health monitor, the other agents, Patroni.

use chrono::{DateTime, Utc};

/// What the health monitor says. The order is that of badness, as there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// All is well.
    Ok,
    /// Somebody should look, in daylight: a disk that fills is one, which a move may well mend.
    Warning,
    /// It cannot tell.
    Unknown,
    /// Somebody must act now.
    Critical,
}

/// The health monitor's verdict on the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What it says.
    pub health: Health,
    /// Why.
    pub reason: String,
    /// When it was last judged.
    pub decided_at: DateTime<Utc>,
}

/// Something that another agent does: a key `activity/<kind>/<group>` in etcd, which lives as long as
/// it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// `backup`, `restore`, `drill` …
    pub kind: String,
    /// Of which group; `None` where the key does not tell, so of all.
    pub group: Option<u32>,
}

/// What Patroni keeps of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatroniGroup {
    /// The group.
    pub group: u32,
    /// Whether somebody holds the leader key.
    pub has_leader: bool,
    /// Whether automatic failover is off: `pause`.
    pub is_paused: bool,
    /// Whether a switchover or failover is asked for.
    pub is_switching: bool,
}
