//! Starts the real servers the tests need, each in its own directory, and makes them fail on demand.
//!
//! | Module | What for |
//! |---|---|
//! | [`postgres`] | [`PgServer`]: a primary, its standbys, a restored directory; crash, freeze, promote |
//! | [`s3`] | [`S3Server`]: an S3 server in this process, its files, and [`Faults`] on demand |
//! | [`network`] | [`Proxy`]: a connection that is slow, stalls, or breaks |
//! | [`etcd`] | [`EtcdCluster`]: an etcd cluster, its members killed and frozen one by one |
//! | [`patroni`] | [`PatroniCluster`]: servers whose leader Patroni chooses; switchover, failover |
//! | [`pgbouncer`], [`haproxy`], [`redis`] | what stands between applications and PostgreSQL, or beside it |
//! | [`tls`] | [`Authority`], and [`TlsFront`]: TLS in front of a server that has none |
//! | [`mod@alertmanager`] | [`Alertmanager`]: one that groups by name and tells a webhook |
//! | [`metadata`] | [`MetadataService`]: hands out the credentials of an instance's or container's role |
//! | [`agent`] | [`Agent`]: runs the built agent, and kills it |
//! | [`program`] | PostgreSQL's programs, run as the servers' operating system user |
//! | [`skip`](mod@skip) | a test that needs something absent says so |
//!
//! Everything here panics when it does not get its way: in a test that is the right answer. A
//! server lives as long as its value; dropping it ends its processes and removes its files, and
//! prints its log if the test is failing.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a harness that cannot do its work fails the test it works for"
)]

pub mod agent;
pub mod alertmanager;
pub mod etcd;
pub mod haproxy;
pub mod metadata;
pub mod network;
pub mod patroni;
pub mod pgbouncer;
pub mod postgres;
pub mod program;
pub mod redis;
pub mod s3;
pub mod skip;
pub mod tls;

mod background;
mod daemon;

use std::time::Duration;

use tokio::time::{Instant, sleep};

pub use agent::{Agent, RunningAgent};
pub use alertmanager::{Alertmanager, alertmanager_is_missing};
pub use daemon::server_port;
pub use etcd::{EtcdCluster, etcd_is_missing};
pub use haproxy::{Backend, HaProxy, haproxy_is_missing};
pub use metadata::MetadataService;
pub use network::{Proxy, Upstream};
pub use patroni::{PatroniBuilder, PatroniCluster, patroni_is_missing};
pub use pgbouncer::{PgBouncer, pgbouncer_is_missing};
pub use postgres::{Mode, PgServer};
pub use program::{Finished, directory, run};
pub use redis::{RedisServer, redis_is_missing};
pub use s3::endpoint::S3Endpoint;
pub use s3::faults::{At, Effect, Fault, Faults, Operation, Refusal};
pub use s3::{S3Server, garage_endpoint, moto_endpoint};
pub use skip::{Skip, skip};
pub use tls::{Authority, Identity, TlsFront};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(20);

/// Waits until `condition` holds, and panics with `what` when it does not within `limit`.
pub async fn eventually(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        sleep(POLL).await;
    }
}
