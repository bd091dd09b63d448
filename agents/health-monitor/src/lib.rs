//! The health monitor: one verdict on everything the cluster is made of.
//!
//! In the order data flows: [`probe`] asks, [`facts`] is what was said, [`judge`] is what it comes to,
//! check by check of the [`catalogue`]; [`settle`] says when that counts, [`verdict`] rolls it up,
//! [`failover`] and [`journal`] remember what happened;
//! [`advice`] and [`sizing`] say when it should grow. [`monitor`] holds it all, [`mod@watch`] and [`asking`] drive it, [`roster`] is who belongs to the cluster;
//! [`notify`] tells who must know, unless a [`silence`] says otherwise;
//! [`status`], [`mod@page`], [`metrics`], [`report`] and [`log_file`] are what one can see of it.

pub mod catalogue;
pub mod check;
pub mod component;
pub mod config;
pub mod thresholds;

pub mod clock;
pub mod facts;
pub mod probe;

pub mod advice;
pub mod failover;
pub mod journal;
pub mod judge;
pub mod settle;
pub mod sizing;
pub mod verdict;

pub mod asking;
pub mod monitor;
pub mod pace;
pub mod roster;
pub mod watch;

pub mod notify;
pub mod silence;

pub mod cli;
pub mod commands;
pub mod log_file;
pub mod metrics;
pub mod page;
pub mod report;
pub mod service;
pub mod status;

#[cfg(test)]
mod scenarios;

pub use config::Config;
