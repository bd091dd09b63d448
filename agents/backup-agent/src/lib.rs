//! The backup agent: takes base backups, stores WAL, and gives both back, bit for bit.
//!
//! In the order data flows. A backup: [`source`] chooses a server, [`replication`] speaks to it,
//! [`tar`] follows the stream, [`upload`] cuts it into chunks, [`container`] seals them,
//! [`manifest`] says what there is. [`backup`] alone knows the order. A restore is the same list
//! read upwards: [`catalog`], [`recovery`] chooses, [`restore`] unpacks, [`archive`] serves WAL.

pub mod config;
pub mod keys;

pub mod backup;
pub mod container;
mod copy;
mod lines;
pub mod manifest;
pub mod members;
pub mod replication;
pub mod repository;
pub mod same_key;
pub mod server_manifest;
pub mod source;
pub mod stream;
pub mod tar;
pub mod upload;

pub mod archive;
pub mod arrival;
pub mod follow;
pub mod groups;
pub mod heartbeat;
pub mod prefetch;
pub mod receive;
pub mod resume;
pub mod rival;
pub mod slots;
pub mod wal;

pub mod catalog;
mod finish;
mod layout;
pub mod outlook;
pub mod recovery;
pub mod restore;
mod settings;
mod tablespaces;
mod unpack;
pub mod verify;

pub mod clocks;
pub mod expire;
pub mod retention;

pub mod check;
pub mod cli;
pub mod commands;
pub mod listing;
pub mod metrics;
pub mod progress;
pub mod quantities;
pub mod service;
pub mod wal_commands;

pub use config::Config;
