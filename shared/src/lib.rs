//! What every agent of postgres-mesh needs.
//!
//! The modules in the order an agent meets them, from its command line to its work:
//!
//! | Module | What for |
//! |---|---|
//! | [`cli`] | the options every agent has, and its exit code |
//! | [`telemetry`] | logs; [`telemetry::chain`], the one way to print an error |
//! | [`shutdown`] | SIGTERM and SIGINT as a future |
//! | [`config`] | read, parse, check; every problem at once |
//! | [`secret`] | [`secret::Secret`]: from a file, never printed |
//! | [`metrics`] | the registry and its prefix; `build_info` |
//! | [`admin`] | `/livez`, `/readyz`, `/metrics`, `/status` |
//! | [`table`] | tables for people |
//! | [`tasks`] | supervised tasks |
//! | [`schedule`] | crontab lines, in UTC or a time zone |
//! | [`backoff`] | bounded, jittered retry |
//! | [`tls`] | the one rustls client configuration |
//! | [`http`] | one question, one bounded answer |
//! | [`pg`] | connections to PostgreSQL; WAL file names, timelines and page headers |
//! | [`etcd`] | requests to etcd, and watches on it, across its endpoints |
//! | [`topology`] | which nodes exist, and what they say they are |
//! | [`lease`] | which replica of an agent may act, and until when |
//! | [`activity`] | what is under way where, and which groups are to be emptied |
//! | [`store`] | object storage |
//!
//! Nothing here knows which agent uses it.

pub mod activity;
pub mod admin;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod etcd;
pub mod http;
pub mod lease;
pub mod metrics;
pub mod pg;
pub mod schedule;
pub mod secret;
pub mod shutdown;
pub mod store;
pub mod table;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod topology;
