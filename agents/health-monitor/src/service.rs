//! The service: watches, judges, and shows.

use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use shared::admin::Admin;
use shared::tasks::Tasks;
use shared::{metrics as shared_metrics, shutdown};
use tracing::info;

use crate::commands::{AGENT, APPLICATION_NAME};
use crate::config::Config;
use crate::notify::Notifier;
use crate::watch::{START_SPREAD, Watcher, decide, now};
use crate::{metrics, page, status};

/// What is known is judged so often at most, and so seldom.
const DECIDE_MIN: Duration = Duration::from_millis(100);
const DECIDE_MAX: Duration = Duration::from_secs(1);

/// Runs until a signal, or until a part of the agent fails.
///
/// # Errors
///
/// The configuration cannot be used, or a task ended.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    info!(?config, "agent started");
    let watcher = Watcher::new(config.clone(), APPLICATION_NAME, START_SPREAD)?;
    let monitor = watcher.monitor.clone();
    let notifier = Notifier::new(&config, monitor.clone())?;

    let mut registry = Registry::default();
    let ours = registry.sub_registry_with_prefix("pgmesh");
    shared_metrics::build_info(ours, AGENT, env!("CARGO_PKG_VERSION"));
    metrics::register(ours, monitor.clone());
    notifier.board.register(ours);
    let (ready, shown, board) = (monitor.clone(), monitor.clone(), notifier.board.clone());
    let (telling, told) = (board.clone(), board.clone());
    let admin = Admin::bind(
        config.admin_address,
        registry,
        move || ready.not_ready().into_iter().chain(telling.trouble()).collect(),
        move || {
            let mut status = status::status(&shown.state());
            status["notify"] = board.status();
            status
        },
    )
    .await
    .with_context(|| format!("listen on {}", config.admin_address))?;
    let shown = monitor.clone();
    let admin = admin.with_page(&page::policy(), move || page::render(&shown, &told.now(), now()));

    let topology = watcher.topology.clone();
    let every = (config.interval / 4).clamp(DECIDE_MIN, DECIDE_MAX);
    let mut tasks = Tasks::default();
    tasks.spawn("admin", |shutdown| admin.serve(shutdown));
    tasks.spawn("topology", |shutdown| topology.follow(shutdown));
    tasks.spawn("watch", |shutdown| watcher.run(shutdown));
    tasks.spawn("notify", |shutdown| notifier.run(shutdown));
    tasks.spawn("decide", |shutdown| decide(monitor, every, shutdown));
    tasks.join(stop, config.shutdown_grace).await?;
    info!("agent stopped");
    Ok(())
}
