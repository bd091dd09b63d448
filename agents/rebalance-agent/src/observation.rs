//! What was found out in one look at the cluster.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::catalogue::Catalogue;
use crate::known::Known;
use crate::servers::GroupServers;
use crate::surroundings::{Activity, PatroniGroup, Verdict};

/// One look at the cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// When it began.
    pub at: DateTime<Utc>,
    /// The coordinator's primary, which was asked for the catalogue.
    pub coordinator: String,
    /// The role that asked.
    pub role: String,
    /// What it said.
    pub catalogue: Catalogue,
    /// The servers, by group: of each group that Citus knows.
    pub servers: BTreeMap<u32, GroupServers>,
    /// What the health monitor says; `None` where none is configured.
    pub verdict: Option<Known<Verdict>>,
    /// What other agents do; `None` without etcd.
    pub activities: Option<Known<Vec<Activity>>>,
    /// What Patroni keeps in etcd; `None` where it is not configured.
    pub patroni: Option<Known<Vec<PatroniGroup>>>,
}
