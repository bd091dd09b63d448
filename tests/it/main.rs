//! The tests against real servers. One binary, so that it links once.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod exporter;
mod monitor;
mod scene;

mod alerts;
mod arrival;
mod backup_restore;
mod check;
mod clocks;
mod configuration;
mod damage;
mod etcd;
mod etcd_access;
mod failover;
mod faults;
mod harness;
mod health_faults;
mod health_monitor;
mod health_notify;
mod health_page;
mod health_postgres;
mod health_services;
mod lag_accuracy;
mod lag_bounds;
mod lag_changes;
mod lag_connections;
mod lag_leaders;
mod lag_metrics;
mod lag_own_wal;
mod lease;
mod many_objects;
mod other_key;
mod outage;
mod patroni;
mod pieces;
mod prefetch;
mod promotion;
mod rebalance_apply;
mod rebalance_citus;
mod rebalance_job;
mod rebalance_plan;
mod receive;
mod replicas;
mod restores;
mod rivals;
mod s3_access;
mod segment_sizes;
mod standbys;
mod store;
mod wal_conflicts;
mod wal_faults;
mod wal_files;
mod wal_metrics;
mod wal_moments;
