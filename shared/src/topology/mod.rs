//! Which nodes exist, and what each says it is.
//!
//! The nodes are those the configuration lists, or those Patroni knows; see [`Topology`]. Their
//! roles are asked, every time, because a failover changes them: what Patroni says of them is a
//! hint. A node that does not answer is unknown: neither a standby nor down.

mod config;
mod dcs;
mod follow;
mod members;
mod observe;
mod rest;

pub use config::{PatroniConfig, RestConfig, TopologyConfig, check_nodes, groups};
pub use dcs::split_key;
pub use follow::{Spread, members_changed};
pub use members::{Member, Members, Opinion, PatroniRole, Source, Topology, TopologyError};
pub use observe::{
    Group, GroupError, NodeState, Observation, ObserveError, Role, ask, observe, observe_group,
};
