//! The keys of `lag-exporter.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use shared::config::{Check, Problems};
use shared::etcd::EtcdConfig;
use shared::pg::{Node, PostgresConfig};
use shared::topology::{PatroniConfig, TopologyConfig};

/// How often a server can be asked at most: a sample takes a fraction of a millisecond, but a
/// thousand servers are asked by one thread.
const SAMPLE_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// How seldom: beyond this the lag of a standby that keeps up is anything up to the interval.
const SAMPLE_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// So far back nobody looks.
const HISTORY_MAX: Duration = Duration::from_hours(366 * 24);
/// Below this a scrape every 15 s would miss a node that vanished and came back.
const FORGET_AFTER_MIN: Duration = Duration::from_secs(30);

/// The configuration of the lag exporter.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name of the cluster: a label of every metric.
    pub cluster: String,
    /// Where `/livez`, `/readyz`, `/metrics` and `/status` answer.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// How long a stop waits; below the service's `stop_grace_period`.
    #[serde(default = "default_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How often each server is asked for its positions.
    #[serde(default = "default_sample_interval", with = "humantime_serde")]
    pub sample_interval: Duration,
    /// How far back the age of a position is known: a standby further behind has a lower bound
    /// only.
    #[serde(default = "default_history", with = "humantime_serde")]
    pub history: Duration,
    /// The directory that keeps this history over a restart; without it, it begins anew.
    pub state_directory: Option<PathBuf>,
    /// How long a node that is no longer a member keeps its series: an alert on a series that
    /// vanishes would resolve.
    #[serde(default = "default_forget_after", with = "humantime_serde")]
    pub forget_after: Duration,
    /// Another exporter's names besides our own, for dashboards and alerts that use them.
    pub compat: Option<Compat>,
    /// How the servers are reached.
    pub postgres: PostgresConfig,
    /// The servers, where they are listed.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Where Patroni keeps what it knows.
    pub etcd: Option<EtcdConfig>,
    /// The servers, where Patroni knows them.
    pub patroni: Option<PatroniConfig>,
}

/// An exporter whose names are answered too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// prometheus-community's: `pg_up`, `pg_replication_lag_seconds` and so on.
    PostgresExporter,
}

fn default_admin_address() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 9633))
}

fn default_grace() -> Duration {
    Duration::from_secs(5)
}

fn default_sample_interval() -> Duration {
    Duration::from_secs(1)
}

fn default_history() -> Duration {
    Duration::from_hours(72)
}

fn default_forget_after() -> Duration {
    Duration::from_mins(5)
}

impl Config {
    /// Which nodes there are.
    pub fn topology(&self) -> TopologyConfig<'_> {
        let Self { etcd, patroni, nodes, .. } = self;
        TopologyConfig { etcd: etcd.as_ref(), patroni: patroni.as_ref(), nodes }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.cluster.is_empty() {
            problems.add("cluster", "must not be empty");
        }
        if self.shutdown_grace.is_zero() {
            problems.add("shutdown_grace", "must be above zero");
        }
        if !(SAMPLE_INTERVAL_MIN..=SAMPLE_INTERVAL_MAX).contains(&self.sample_interval) {
            problems.add("sample_interval", "must be 100ms to 10s");
        }
        if self.history < self.sample_interval * 10 {
            problems.add("history", "must be at least ten times sample_interval");
        }
        if self.history > HISTORY_MAX {
            problems.add("history", "must be at most 366days");
        }
        if self.forget_after < FORGET_AFTER_MIN {
            problems.add("forget_after", "must be at least 30s");
        }
        if self.state_directory.as_ref().is_some_and(|it| !it.is_absolute()) {
            problems.add("state_directory", "must be an absolute path");
        }
        problems.within("postgres", |problems| self.postgres.check(problems));
        self.topology().check(problems);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use shared::config;

    use super::*;

    const MINIMAL: &str = "cluster = \"demo\"\n[postgres]\nuser = \"pgmesh_lag\"\n\
        [[nodes]]\nname = \"a\"\nhost = \"a\"\n";

    fn load(text: &str) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lag-exporter.toml");
        fs::write(&path, text).unwrap();
        config::load(&path).map_err(|error| {
            let text = error.to_string();
            // Without the name of the file.
            text.split_once('\n').map(|(_, problems)| problems.to_owned() + "\n").unwrap_or(text)
        })
    }

    #[test]
    fn a_node_and_a_role_are_enough() {
        let config = load(MINIMAL).unwrap();
        assert_eq!(config.admin_address.to_string(), "0.0.0.0:9633");
        assert_eq!(config.sample_interval, Duration::from_secs(1));
        assert_eq!((config.compat, config.state_directory), (None, None));
    }

    #[test]
    fn the_shipped_file_loads() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/lag-exporter.toml");
        let config: Config = config::load(&path).unwrap();
        assert!(!config.nodes.is_empty());
    }

    #[test]
    fn every_problem_is_told() {
        let text = "cluster = \"\"\nshutdown_grace = \"0s\"\nsample_interval = \"1ms\"\n\
            history = \"1ms\"\nforget_after = \"1s\"\nstate_directory = \"here\"\n\
            [postgres]\nuser = \"\"\n";
        assert_eq!(
            load(text).unwrap_err(),
            "cluster: must not be empty\n\
             shutdown_grace: must be above zero\n\
             sample_interval: must be 100ms to 10s\n\
             history: must be at least ten times sample_interval\n\
             forget_after: must be at least 30s\n\
             state_directory: must be an absolute path\n\
             postgres.user: must not be empty\n\
             nodes: must list at least one server\n"
        );
        let long = format!("history = \"500years\"\n{MINIMAL}");
        assert_eq!(load(&long).unwrap_err(), "history: must be at most 366days\n");
        let unknown = format!("compat = \"pgwatch\"\n{MINIMAL}");
        assert_eq!(
            load(&unknown).unwrap_err(),
            "compat: unknown variant `pgwatch`, expected `postgres_exporter` (line 1)\n"
        );
    }
}
