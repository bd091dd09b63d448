//! The rebalance agent: says where shards should be, and what is in the way of moving them there.
//!
//! In the order data flows: [`observe`] asks; [`catalogue`], [`servers`] and [`surroundings`] are
//! what there is to know, [`observation`] all of it, with [`known`] for what is not, and [`orphans`] for tables that nobody knows; [`control`] is
//! what operators ask for, [`ledger`] what was moved, [`memory`] where both are kept. [`guard`] says
//! why nothing may be moved, [`mod@reference`] what new nodes need first, [`situation`] puts it
//! together, [`balance`] measures, [`mod@plan`] decides what to move, [`job`] whether Citus may do all of
//! it, [`mod@step`] what is done next, and [`apply`] does it. [`rebalance`] is the loop, [`audit`] keeps what was decided, [`board`] shows
//! it; [`report`], [`show`] and [`metrics`] are what one can see of it, and with [`requests`]
//! operators ask.

pub mod config;
pub mod window;

pub mod known;

pub mod catalogue;
pub mod control;
pub mod ledger;
pub mod observation;
pub mod orphans;
pub mod servers;
pub mod surroundings;

pub mod memory;
pub mod observe;

pub mod balance;
pub mod guard;
pub mod job;
pub mod plan;
pub mod reference;
pub mod situation;
pub mod step;

pub mod apply;

pub mod audit;
pub mod board;
pub mod rebalance;
pub mod report;

pub mod cli;
pub mod commands;
pub mod metrics;
pub mod requests;
pub mod service;
pub mod show;
pub mod words;

pub use config::Config;
