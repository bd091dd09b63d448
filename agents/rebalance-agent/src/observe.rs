//! One look at the cluster: bounded questions to the coordinator's primary, to each group's servers,
//! and to those around them.
//!
//! What a server refuses to tell is unknown by itself; only without the coordinator's primary, or
//! without its nodes, tables and placements, there is nothing to decide from.

mod around;
mod catalogue;
mod orphans;
mod read;
mod servers;
mod sessions;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use chrono::Utc;
use futures_util::future::join_all;
use reqwest::Client;
use shared::etcd::Etcd;
use shared::http;
use shared::pg::{ConnectError, Node, Settings, connect};
use shared::telemetry::chain;
use shared::topology::{GroupError, PatroniConfig, Topology, TopologyError, observe_group};
use thiserror::Error;
use tokio::time::timeout;

use crate::config::{Config, HealthConfig};
use crate::observation::Observation;
use read::{AnswerError, finish};

/// The server's limit on a statement. Citus asks each node for the sizes of its shards, and makes
/// its plan, in some seconds for thousands of them; a node that is frozen would hold it for ever.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(20);
/// The server's limit on waiting for a lock. Nothing here takes one that conflicts with writes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Our limit on dialling, TLS and login together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Our limit on a whole look: several statements that take as long as they may.
pub const LIMIT: Duration = Duration::from_mins(2);

/// What a look found.
#[derive(Clone, Debug)]
pub enum Seen {
    /// The database is not distributed: there is nothing to do.
    NoCitus {
        /// Who said so: `coord (10.0.0.7:5432)`.
        coordinator: String,
        /// The database.
        database: String,
    },
    /// It is.
    Citus {
        /// What was found.
        observation: Box<Observation>,
        /// The coordinator's primary, which is told what to do.
        coordinator: Node,
    },
}

/// Why there is nothing to decide from.
#[derive(Debug, Error)]
pub enum LookError {
    /// Nobody knows which servers there are.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// There is no one primary of group 0.
    #[error("{error}{}", because(why))]
    Group {
        /// What it is.
        error: GroupError,
        /// Why each node that is unknown is.
        why: Vec<String>,
    },
    /// It takes no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not answer.
    #[error("read the catalogue of {node}")]
    Answer {
        /// Which server.
        node: String,
        /// Why.
        source: AnswerError,
    },
    /// It took too long.
    #[error("no look within {}", humantime::format_duration(*limit))]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
}

fn because(why: &[String]) -> String {
    if why.is_empty() { String::new() } else { format!(": {}", why.join("; ")) }
}

/// Looks at the cluster. Keeps nothing from one look to the next but the topology.
#[derive(Debug)]
pub struct Observer {
    cluster: String,
    /// The root of Patroni's keys, where it is configured beside etcd.
    patroni_root: Option<String>,
    settings: Settings,
    topology: Topology,
    etcd: Option<Etcd>,
    health: Option<(HealthConfig, Client)>,
}

/// Asks the health monitor.
fn client(config: &HealthConfig) -> anyhow::Result<Client> {
    let is_tls = config.urls.iter().any(|it| it.starts_with("https://"));
    let builder = http::client(is_tls, config.ca_file.as_deref()).context("health.ca_file")?;
    Ok(builder.build()?)
}

impl Observer {
    /// Reads the password and the certificates that the configuration names. Nobody is asked yet.
    ///
    /// # Errors
    ///
    /// One of them cannot be used.
    pub fn new(config: &Config, application_name: &str) -> anyhow::Result<Self> {
        let settings = Settings {
            connect_timeout: CONNECT_TIMEOUT,
            statement_timeout: STATEMENT_TIMEOUT,
            lock_timeout: LOCK_TIMEOUT,
            ..config.postgres.settings(application_name)?
        };
        let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
        let health = match &config.health {
            Some(health) => Some((health.clone(), client(health)?)),
            None => None,
        };
        let patroni = config.patroni.as_ref().filter(|_| etcd.is_some());
        Ok(Self {
            cluster: config.cluster.clone(),
            patroni_root: patroni.map(PatroniConfig::root),
            settings,
            topology: Topology::new(config.topology(), etcd.clone())?,
            etcd,
            health,
        })
    }

    /// How servers are reached.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where activities are kept, if anywhere.
    pub fn etcd(&self) -> Option<&Etcd> {
        self.etcd.as_ref()
    }

    /// Which servers there are. Somebody must [follow](Topology::follow) it.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Looks once, within [`LIMIT`].
    ///
    /// # Errors
    ///
    /// The coordinator's primary did not tell what a decision needs.
    pub async fn look(&self) -> Result<Seen, LookError> {
        let looked = timeout(LIMIT, Box::pin(self.look_unbounded())).await;
        looked.unwrap_or(Err(LookError::TimedOut { limit: LIMIT }))
    }

    async fn look_unbounded(&self) -> Result<Seen, LookError> {
        let at = Utc::now();
        let members = self.topology.nodes().await?;
        let group = observe_group(&self.settings, &members, 0).await;
        let (node, _) = group.primary().map_err(|error| {
            let unknown = group.nodes.iter().filter_map(|it| it.state.as_ref().err());
            LookError::Group { error, why: unknown.map(|it| chain(it).to_string()).collect() }
        })?;
        let connection = connect(&self.settings, node).await?;
        let wrong = |source| LookError::Answer { node: node.to_string(), source };
        let Some(version) = catalogue::version(&connection).await.map_err(wrong)? else {
            finish(connection).await;
            let database = self.settings.database.clone();
            return Ok(Seen::NoCitus { coordinator: node.to_string(), database });
        };
        let around = async { tokio::join!(self.verdict(), self.activities(), self.patroni()) };
        let (catalogue, (verdict, activities, patroni)) =
            tokio::join!(catalogue::read(&connection, version), around);
        let catalogue = match catalogue {
            Ok(catalogue) => catalogue,
            Err(error) => {
                finish(connection).await;
                return Err(wrong(error));
            }
        };
        let groups: BTreeMap<u32, Vec<Node>> = catalogue
            .nodes
            .iter()
            .filter(|it| it.is_primary)
            .map(|it| (it.group, servers::nodes(it, &members)))
            .collect();
        let ask = servers::Ask {
            settings: &self.settings,
            coordinator: &connection,
            catalogue: &catalogue,
        };
        let servers = groups.into_iter().map(async |(group, nodes)| (group, ask.all(&nodes).await));
        let servers = join_all(servers).await.into_iter().collect();
        finish(connection).await;
        let observation = Observation {
            at,
            coordinator: node.name.clone(),
            role: self.settings.user.clone(),
            catalogue,
            servers,
            verdict,
            activities,
            patroni,
        };
        Ok(Seen::Citus { observation: Box::new(observation), coordinator: node.clone() })
    }
}
