//! A replica that shares groups with others by etcd and does nothing but say, all the time, which
//! of them it may act on: for tests that stop and kill it.
//!
//! A line for each look and group: `<before> <after> <group>`, the nanoseconds since the machine
//! started just before and just after the claim said that it is valid.

use std::collections::BTreeSet;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use shared::etcd::{Etcd, EtcdConfig};
use shared::lease::{BootInstant, Identity, Shares};
use shared::shutdown;
use shared::tasks::Tasks;
use shared::telemetry::{self, Output, chain};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Between two looks at the claims.
const PAUSE: Duration = Duration::from_millis(2);

/// Shares groups with other replicas, and prints which it may act on.
#[derive(Debug, Parser)]
struct Arguments {
    /// etcd's addresses
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// This replica's name
    #[arg(long, value_name = "NAME")]
    replica: String,
    /// How many groups there are
    #[arg(long, value_name = "COUNT")]
    groups: u32,
    /// How long the lease lives, in seconds
    #[arg(long, value_name = "SECONDS")]
    ttl: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    telemetry::init(None, Output::Stderr);
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = %chain(error.as_ref()), "replica failed");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    let Arguments { endpoints, replica, groups, ttl } = arguments;
    let config = EtcdConfig {
        endpoints,
        user: None,
        password_file: None,
        ca_file: None,
        certificate_file: None,
        key_file: None,
    };
    let etcd = Etcd::new(&config)?;
    let [cluster, agent] = ["tests", "lease-holder"].map(str::to_owned);
    let identity = Identity { cluster, agent, replica };
    let (_groups, groups) = watch::channel((0..groups).collect::<BTreeSet<_>>());
    let ttl = Duration::from_secs(ttl);
    let (shares, sharing) = Shares::new(Some(etcd), identity, groups, ttl, ttl);
    let mut tasks = Tasks::default();
    tasks.spawn("sharing", |shutdown| sharing.run(shutdown));
    tasks.spawn("looking", |shutdown| look(shares, shutdown));
    tasks.join(stop, Duration::from_secs(10)).await?;
    Ok(())
}

/// Keeps its claims, as an agent that acts does, and asks them again and again.
async fn look(mut shares: Shares, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut held = shares.held();
    while !shutdown.is_cancelled() {
        for (group, claim) in &held {
            let before = BootInstant::now().since_boot().as_nanos();
            if claim.is_valid() {
                let after = BootInstant::now().since_boot().as_nanos();
                writeln!(stdout(), "{before} {after} {group}")?;
            }
        }
        tokio::select! {
            () = shares.changed() => held = shares.held(),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
    Ok(())
}
