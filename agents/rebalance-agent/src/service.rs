//! The service: looks, decides, and shows.

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use shared::admin::Admin;
use shared::tasks::Tasks;
use shared::{metrics as shared_metrics, shutdown};
use tracing::info;

use crate::board::Board;
use crate::commands::{AGENT, APPLICATION_NAME};
use crate::config::{Config, Mode};
use crate::metrics;
use crate::observe::Observer;
use crate::rebalance::Rebalancer;

/// Runs until a signal, or until a part of the agent fails.
///
/// # Errors
///
/// The configuration cannot be used, or a task ended.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    info!(?config, "agent started");
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let topology = observer.topology().clone();
    let board = Board::new(&config);

    let mut registry = Registry::default();
    let ours = registry.sub_registry_with_prefix("pgmesh");
    shared_metrics::build_info(ours, AGENT, env!("CARGO_PKG_VERSION"));
    metrics::register(ours, &board);
    let (ready, shown) = (board.clone(), board.clone());
    let admin = Admin::bind(
        config.admin_address,
        registry,
        move || ready.report().turn.not_ready().into_iter().collect(),
        move || shown.status(),
    )
    .await
    .with_context(|| format!("listen on {}", config.admin_address))?;

    let (grace, mode) = (config.shutdown_grace, config.mode);
    let (rebalancer, sharing) = Rebalancer::new(config, observer, board);
    let mut tasks = Tasks::default();
    tasks.spawn("admin", |shutdown| admin.serve(shutdown));
    tasks.spawn("topology", |shutdown| topology.follow(shutdown));
    // One that moves nothing must not keep the lease from one that does.
    if mode == Mode::Apply {
        tasks.spawn("leadership", |shutdown| sharing.run(shutdown));
    }
    tasks.spawn("rebalance", |shutdown| rebalancer.run(shutdown));
    tasks.join(stop, grace).await?;
    info!("agent stopped");
    Ok(())
}
