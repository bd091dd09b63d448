//! The lag exporter: how far each standby is behind its primary, in time.
//!
//! In the order data flows: [`target`] keeps a connection to each server, [`session`] asks on it,
//! [`query`] has the questions, [`observation`] is what a server said, [`group`] remembers and
//! decides, [`view`] is what was decided, [`fleet`] holds all groups, and [`metrics`],
//! [`show`] and the log lines of [`alarms`] are what one can see of it.

pub mod config;

pub mod clock;
pub mod observation;
pub mod query;
pub mod session;
pub mod target;

pub mod decide;
pub mod group;
pub mod history;
pub mod lag;
pub mod leader;
pub mod line;
pub mod pace;
pub mod past;
pub mod quorum;
pub mod ring;
pub mod seed;
pub mod senders;
pub mod split;
pub mod timelines;
pub mod view;

pub mod alarms;
pub mod cli;
pub mod commands;
mod compat;
#[cfg(test)]
mod example;
pub mod fleet;
pub mod json;
pub mod keeper;
pub mod metrics;
pub mod service;
pub mod show;

#[cfg(test)]
mod scenarios;

pub use config::Config;
