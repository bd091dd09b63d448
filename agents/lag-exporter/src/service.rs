//! The service: watches every node of the topology, and publishes what is known.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use shared::admin::Admin;
use shared::etcd::Etcd;
use shared::pg::{Node, Settings};
use shared::tasks::Tasks;
use shared::topology::{Members, Spread, Topology, members_changed};
use shared::{metrics, shutdown};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::alarms::Alarms;
use crate::commands::{AGENT, APPLICATION_NAME};
use crate::config::Config;
use crate::fleet::Fleet;
use crate::group::Limits;
use crate::keeper::Keeper;
use crate::metrics::FleetCollector;
use crate::session::{ANSWER_TIMEOUT, limited};
use crate::target::Watch;

/// What a first connection may take of this thread: a TLS handshake and the thousands of hashes of
/// SCRAM. If all were made at once, the last would be too late.
const CONNECT_COST: Duration = Duration::from_millis(10);

/// Runs until a signal, or until a part of the agent fails.
///
/// # Errors
///
/// The configuration cannot be used, or a task ended.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    info!(?config, "agent started");
    let watcher = Watcher::new(&config)?;
    let fleet = watcher.fleet.clone();
    let keeper = match &config.state_directory {
        Some(directory) => Some(Keeper::new(&config.cluster, directory, fleet.clone())?),
        None => None,
    };
    if let Some(keeper) = &keeper {
        keeper.restore();
    }

    // Without a prefix, for the names of another exporter.
    let mut registry = Registry::default();
    let ours = registry.sub_registry_with_prefix("pgmesh");
    metrics::build_info(ours, AGENT, env!("CARGO_PKG_VERSION"));
    FleetCollector::register(&mut registry, fleet.clone(), config.compat);
    let (ready, told) = (fleet.clone(), fleet.clone());
    let admin = Admin::bind(
        config.admin_address,
        registry,
        move || ready.not_ready().into_iter().collect(),
        move || serde_json::to_value(fleet.snapshot()).unwrap_or_default(),
    )
    .await
    .with_context(|| format!("listen on {}", config.admin_address))?;

    let topology = watcher.topology.clone();
    let mut tasks = Tasks::default();
    tasks.spawn("admin", |shutdown| admin.serve(shutdown));
    tasks.spawn("topology", |shutdown| topology.follow(shutdown));
    tasks.spawn("watch", |shutdown| watcher.run(shutdown));
    tasks.spawn("alarms", |shutdown| Alarms::default().run(told, shutdown));
    if let Some(keeper) = keeper {
        tasks.spawn("history", |shutdown| keeper.run(shutdown));
    }
    tasks.join(stop, config.shutdown_grace).await?;
    info!("agent stopped");
    Ok(())
}

/// Watches the nodes of the topology: a task for each.
#[derive(Debug)]
pub struct Watcher {
    /// What is known.
    pub fleet: Fleet,
    /// Which nodes there are.
    pub topology: Topology,
    settings: Arc<Settings>,
    password_file: Option<PathBuf>,
    interval: Duration,
}

impl Watcher {
    /// Reads the password and the certificates that the configuration names. Nobody is asked yet.
    ///
    /// # Errors
    ///
    /// One of them cannot be used.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let settings = limited(config.postgres.settings(APPLICATION_NAME)?, config.sample_interval);
        let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
        let limits = Limits {
            stale_after: config.sample_interval * 3 + ANSWER_TIMEOUT,
            history: config.history,
            forget_after: config.forget_after,
        };
        Ok(Self {
            fleet: Fleet::new(&config.cluster, limits),
            topology: Topology::new(config.topology(), etcd)?,
            settings: Arc::new(settings),
            password_file: config.postgres.password_file.clone(),
            interval: config.sample_interval,
        })
    }

    /// Watches until `shutdown`; what is under way then is dropped.
    ///
    /// # Errors
    ///
    /// A task panicked.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            ended = self.watch() => ended,
        }
    }

    async fn watch(&self) -> anyhow::Result<()> {
        let mut members = self.topology.subscribe();
        let mut tasks = JoinSet::new();
        let mut running: BTreeMap<(u32, String), (Node, AbortHandle)> = BTreeMap::new();
        let mut spread = Spread::random();
        loop {
            let nodes = members.borrow_and_update().as_ref().map(Members::nodes);
            if let Some(nodes) = nodes {
                self.fleet.set_members(&nodes);
                running.retain(|_, (node, task)| {
                    let stays = is_watched(node, &nodes, || self.fleet.remembers(node));
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                let count = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
                let start = self.interval.max(CONNECT_COST.saturating_mul(count));
                for node in nodes {
                    let phase = spread.take();
                    running.entry((node.group, node.name.clone())).or_insert_with(|| {
                        let watch = self.watch_one(node.clone(), start, phase);
                        (node, tasks.spawn(watch.run()))
                    });
                }
            }
            members_changed(&mut members, &mut tasks).await?;
        }
    }

    fn watch_one(&self, node: Node, start: Duration, phase: f64) -> Watch {
        let (settings, fleet) = (Arc::clone(&self.settings), self.fleet.clone());
        let password_file = self.password_file.clone();
        Watch { node, settings, password_file, interval: self.interval, start, phase, fleet }
    }
}

/// Whether `node`, which is or was a member, is watched (on): one that left may still write.
/// Unless the members have its name at another address, or its address by another name.
fn is_watched(node: &Node, members: &[Node], is_remembered: impl FnOnce() -> bool) -> bool {
    let replaces = |member: &Node| {
        (member.group, &member.name) == (node.group, &node.name)
            || (member.port, &member.host) == (node.port, &node.host)
    };
    members.contains(node) || (!members.iter().any(replaces) && is_remembered())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_left_is_watched_until_it_is_forgotten_or_replaced() {
        let node = |group, name: &str, host: &str| {
            let [name, host] = [name, host].map(str::to_owned);
            Node { group, name, host, port: 5432 }
        };
        let a = node(0, "a", "10.0.0.1");
        let b = node(0, "b", "10.0.0.2");
        for (case, members, is_remembered, expected) in [
            ("a member", vec![a.clone(), b.clone()], true, true),
            ("it left", vec![b.clone()], true, true),
            ("all left", vec![], true, true),
            ("it left long ago", vec![b.clone()], false, false),
            ("it moved", vec![node(0, "a", "10.0.0.3"), b.clone()], true, false),
            ("it was renamed", vec![node(0, "c", "10.0.0.1"), b.clone()], true, false),
            ("another group has the name", vec![node(1, "a", "10.0.0.3")], true, true),
        ] {
            assert_eq!(is_watched(&a, &members, || is_remembered), expected, "{case}");
        }
    }
}
