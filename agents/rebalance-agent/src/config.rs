//! The keys of `rebalance-agent.toml`.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shared::config::{Check, Problems};
use shared::etcd::EtcdConfig;
use shared::pg::{Node, PostgresConfig};
use shared::topology::{PatroniConfig, TopologyConfig};

use crate::window::Window;

const GIB: u64 = 1 << 30;

/// How often the cluster can be looked at most: a look asks Citus for the size of every shard.
const INTERVAL_MIN: Duration = Duration::from_secs(5);
/// How seldom: what is decided is acted on, and must not be of yesterday.
const INTERVAL_MAX: Duration = Duration::from_hours(1);

/// A shorter one would be over before any other transaction ends.
const LOCK_TIMEOUT_MIN: Duration = Duration::from_millis(10);
/// A longer one is no bound that an application would notice.
const LOCK_TIMEOUT_MAX: Duration = Duration::from_mins(1);
/// Its state is asked for each 2 s, of servers that may take a while to answer.
const STALL_TIMEOUT_MIN: Duration = Duration::from_secs(30);

/// The configuration of the rebalance agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name of the cluster: a label of every metric, and part of the keys in etcd.
    pub cluster: String,
    /// Where `/livez`, `/readyz`, `/metrics` and `/status` answer.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// How long a stop waits; below the service's `stop_grace_period`.
    #[serde(default = "default_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How often the cluster is looked at, and a plan is made.
    #[serde(default = "default_interval", with = "humantime_serde")]
    pub interval: Duration,
    /// Whether anything is moved.
    #[serde(default)]
    pub mode: Mode,
    /// When something may be moved; at any time without it.
    pub window: Option<Window>,
    /// What is moved, and what it must bring.
    #[serde(default)]
    pub balance: Balance,
    /// How much may be moved.
    #[serde(default)]
    pub budget: Limits,
    /// What must hold of the servers.
    #[serde(default)]
    pub guard: Guard,
    /// How something is moved.
    #[serde(default)]
    pub apply: Apply,
    /// The health monitor whose verdict must be good; without it nobody is asked.
    pub health: Option<HealthConfig>,
    /// How the servers are reached. `database` is the one that Citus distributes.
    pub postgres: PostgresConfig,
    /// The servers, where they are listed. Those of group 0 are needed; workers are found by Citus.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Where activities are kept, and what Patroni keeps.
    pub etcd: Option<EtcdConfig>,
    /// The servers, where Patroni knows them.
    pub patroni: Option<PatroniConfig>,
}

/// Whether anything is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Looks, plans and tells; moves nothing.
    #[default]
    DryRun,
    /// Moves what is planned.
    Apply,
}

/// Whose plan is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The agent's: the fewest bytes for the most gain.
    #[default]
    Own,
    /// That of Citus' default rebalance strategy. Its cost and capacity functions say what balance
    /// is; the agent's figure is shown beside it.
    Citus,
}

/// The table `[balance]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Balance {
    /// Whose plan is followed.
    pub strategy: Strategy,
    /// Moving begins when a larger share of all load than this, 0 to 1, lies where it does not
    /// belong, and ends below half of it.
    pub threshold: f64,
    /// How much a shard group counts by being one, 0 to 1; the rest by its bytes. Without a share
    /// by count empty shards would have no place they belong to.
    pub count_share: f64,
    /// The share of what a move carries that must come to lie where it belongs, 0 to 1: below it
    /// a move is not worth its bytes.
    pub gain_min: f64,
    /// From this size on a shard group that is larger than the fair share of any node is called hot.
    pub hot_bytes_min: u64,
    /// Groups that are to have more or less than the others.
    pub weights: Vec<Weight>,
}

/// One entry of `[[balance.weights]]`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// The group of a worker. Its number stays through a failover, unlike a node's name.
    pub group: u32,
    /// Its share in relation to the others', which have 1.
    pub weight: f64,
}

impl Default for Balance {
    fn default() -> Self {
        Self {
            strategy: Strategy::Own,
            threshold: 0.05,
            count_share: 0.25,
            gain_min: 0.5,
            hot_bytes_min: GIB,
            weights: Vec::new(),
        }
    }
}

impl Balance {
    /// The weight of a group.
    pub fn weight(&self, group: u32) -> f64 {
        self.weights.iter().find(|it| it.group == group).map_or(1.0, |it| it.weight)
    }

    fn check(&self, problems: &mut Problems) {
        let ratios = [
            ("threshold", self.threshold),
            ("count_share", self.count_share),
            ("gain_min", self.gain_min),
        ];
        for (key, ratio) in ratios {
            if !(0.0..=1.0).contains(&ratio) {
                problems.add(key, "must be 0 to 1");
            }
        }
        let mut groups = BTreeSet::new();
        for (index, Weight { group, weight }) in self.weights.iter().enumerate() {
            problems.within(&format!("weights[{index}]"), |problems| {
                if !groups.insert(group) {
                    problems.add("group", format!("{group} is listed twice"));
                }
                if !(weight.is_finite() && *weight > 0.0) {
                    problems.add("weight", "must be above 0; to empty a node, drain it");
                }
            });
        }
    }
}

/// The table `[budget]`. A run is one opening of the window; without a window, an hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes that one run moves at most. A shard group that is larger is never moved.
    pub bytes_per_run: u64,
    /// Shard groups that one run moves at most.
    pub moves_per_run: u32,
    /// Bytes that are moved at most in 24 hours.
    pub bytes_per_day: u64,
    /// Shard groups that are moved at most in 24 hours.
    pub moves_per_day: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes_per_run: 100 * GIB,
            moves_per_run: 32,
            bytes_per_day: 500 * GIB,
            moves_per_day: 256,
        }
    }
}

impl Limits {
    /// What is larger is never moved.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_per_run.min(self.bytes_per_day)
    }

    fn check(&self, problems: &mut Problems) {
        for (key, limit) in [
            ("bytes_per_run", self.bytes_per_run),
            ("moves_per_run", self.moves_per_run.into()),
            ("bytes_per_day", self.bytes_per_day),
            ("moves_per_day", self.moves_per_day.into()),
        ] {
            if limit == 0 {
                problems.add(key, "must be above 0; to move nothing, leave mode = \"dry_run\"");
            }
        }
    }
}

/// The table `[guard]`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// How far a standby of either side may be behind, in bytes of WAL: what is moved is WAL for
    /// its standbys too. One that does not stream is too far. No more may be held back by a slot that nobody reads
    /// from; after a minute, none.
    pub lag_bytes_max: u64,
    /// How old a transaction that has written may be. It holds up the start of a move, and the
    /// writers with it at its end.
    #[serde(with = "humantime_serde")]
    pub transaction_age_max: Duration,
    /// The share of a node's disk, 0 to 1, that stays free whatever is moved.
    /// Citus' own is `citus.desired_percent_disk_available_after_move`, 10 percent, which does not
    /// count WAL.
    pub disk_free_min: f64,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            lag_bytes_max: 64 << 20,
            transaction_age_max: Duration::from_mins(1),
            disk_free_min: 0.15,
        }
    }
}

impl Guard {
    fn check(&self, problems: &mut Problems) {
        if self.transaction_age_max.is_zero() {
            problems.add("transaction_age_max", "must be above zero");
        }
        if !(0.0..1.0).contains(&self.disk_free_min) {
            problems.add("disk_free_min", "must be 0 or more, and below 1");
        }
    }
}

/// Who carries out a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// The agent: one shard group after the other, each decided anew.
    #[default]
    Move,
    /// Citus: all of its own plan as one background job, which the agent watches and stops. What operators
    /// ask for, drains and reference tables are moved as ever.
    Job,
}

/// The table `[apply]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Apply {
    /// Who carries out a plan.
    pub engine: Engine,
    /// How long a move waits for a lock, and writers with it: at its end it locks the shard group; and
    /// how long it may then keep its locks. Past it the move is broken off, and tried again later.
    #[serde(with = "humantime_serde")]
    pub lock_timeout: Duration,
    /// How long one move may take.
    #[serde(with = "humantime_serde")]
    pub move_timeout: Duration,
    /// How long a move may stand still: the same phase, no byte and no WAL position further, and no index
    /// that is built.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// How long nothing is moved after a move.
    #[serde(with = "humantime_serde")]
    pub pause: Duration,
}

impl Default for Apply {
    fn default() -> Self {
        Self {
            engine: Engine::Move,
            lock_timeout: Duration::from_secs(1),
            move_timeout: Duration::from_hours(6),
            stall_timeout: Duration::from_mins(10),
            pause: Duration::from_secs(10),
        }
    }
}

/// `statement_timeout` is a number of milliseconds, of 31 bits.
const MOVE_TIMEOUT_MAX: Duration = Duration::from_hours(24 * 24);

impl Apply {
    fn check(&self, problems: &mut Problems) {
        if !(LOCK_TIMEOUT_MIN..=LOCK_TIMEOUT_MAX).contains(&self.lock_timeout) {
            problems.add("lock_timeout", "must be 10ms to 1m: writers wait as long");
        }
        if self.stall_timeout < STALL_TIMEOUT_MIN {
            problems.add("stall_timeout", "must be 30s or more: a move tells its state each few s");
        }
        if self.move_timeout < self.stall_timeout {
            problems.add("move_timeout", "must not be below stall_timeout");
        }
        if MOVE_TIMEOUT_MAX < self.move_timeout {
            problems.add("move_timeout", "must be 24days or less: PostgreSQL takes no longer one");
        }
    }
}

/// The table `[health]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// The admin servers of its replicas: `http://health-monitor:9631`. The worst of what those
    /// say that answer counts.
    pub urls: Vec<String>,
    /// PEM certificates to trust in place of the system's, for https:// addresses.
    pub ca_file: Option<PathBuf>,
}

impl HealthConfig {
    fn check(&self, problems: &mut Problems) {
        if self.urls.is_empty() {
            problems.add("urls", "must name at least one");
        }
        for (index, url) in self.urls.iter().enumerate() {
            if !url.starts_with("http://") && !url.starts_with("https://") {
                let problem = format!("`{url}` must begin with http:// or https://");
                problems.add(&format!("urls[{index}]"), problem);
            }
        }
        if self.ca_file.is_some() && !self.urls.iter().any(|it| it.starts_with("https://")) {
            problems.add("ca_file", "has no use without an https:// address");
        }
    }
}

fn default_admin_address() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 9634))
}

fn default_grace() -> Duration {
    Duration::from_secs(20)
}

fn default_interval() -> Duration {
    Duration::from_mins(1)
}

impl Config {
    /// Which nodes there are.
    pub fn topology(&self) -> TopologyConfig<'_> {
        let Self { etcd, patroni, nodes, .. } = self;
        TopologyConfig { etcd: etcd.as_ref(), patroni: patroni.as_ref(), nodes }
    }
}

impl Config {
    /// What a job needs beside.
    fn check_job(&self, problems: &mut Problems) {
        for (is_there, problem) in [
            (
                self.balance.strategy == Strategy::Citus,
                "\"job\" moves what Citus plans: set balance.strategy = \"citus\"",
            ),
            (
                self.window.is_some(),
                "\"job\" is for off-hours: a job moves on until all is moved, so give it a [window]",
            ),
            (
                self.etcd.is_some(),
                "\"job\" needs [etcd]: a job outlives the agent that began it, and nobody would know it again",
            ),
        ] {
            if !is_there {
                problems.add("apply.engine", problem);
            }
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.cluster.is_empty() || self.cluster.contains('/') {
            problems.add("cluster", "must not be empty, nor have a `/` in it");
        }
        if self.shutdown_grace.is_zero() {
            problems.add("shutdown_grace", "must be above zero");
        }
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&self.interval) {
            problems.add("interval", "must be 5s to 1h");
        }
        if let Some(window) = &self.window {
            problems.within("window", |problems| window.check(problems));
        }
        problems.within("balance", |problems| self.balance.check(problems));
        problems.within("budget", |problems| self.budget.check(problems));
        problems.within("guard", |problems| self.guard.check(problems));
        problems.within("apply", |problems| self.apply.check(problems));
        if self.apply.engine == Engine::Job {
            self.check_job(problems);
        }
        if let Some(health) = &self.health {
            problems.within("health", |problems| health.check(problems));
        }
        problems.within("postgres", |problems| self.postgres.check(problems));
        self.topology().check(problems);
        if self.patroni.is_none() && !self.nodes.iter().any(|it| it.group == 0) {
            problems.add("nodes", "must list the coordinator: a server of group 0");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use shared::config;

    use super::*;

    const MINIMAL: &str = "cluster = \"demo\"\n[postgres]\nuser = \"pgmesh_rebalance\"\n\
        [[nodes]]\nname = \"a\"\nhost = \"a\"\n";

    fn load(text: &str) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rebalance-agent.toml");
        fs::write(&path, text).unwrap();
        config::load(&path).map_err(|error| {
            let text = error.to_string();
            // Without the name of the file.
            text.split_once('\n').map(|(_, problems)| problems.to_owned() + "\n").unwrap_or(text)
        })
    }

    #[test]
    fn a_coordinator_and_a_role_are_enough_and_nothing_is_moved() {
        let config = load(MINIMAL).unwrap();
        assert_eq!(config.admin_address.to_string(), "0.0.0.0:9634");
        assert_eq!((config.mode, config.balance.strategy), (Mode::DryRun, Strategy::Own));
        assert!(config.window.is_none() && config.health.is_none() && config.etcd.is_none());
        assert_eq!((config.balance, config.budget), (Balance::default(), Limits::default()));
        assert_eq!(config.guard, Guard::default());
    }

    /// What the comments of the shipped file give as defaults, they are.
    #[test]
    fn the_shipped_file_loads_and_shows_the_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/rebalance-agent.toml");
        let config: Config = config::load(&path).unwrap();
        assert_eq!((config.balance, config.budget), (Balance::default(), Limits::default()));
        assert_eq!((config.guard, config.interval), (Guard::default(), default_interval()));
        assert_eq!(config.apply, Apply::default());
        assert_eq!((config.admin_address, config.mode), (default_admin_address(), Mode::DryRun));
        assert_eq!(config.shutdown_grace, default_grace());

        // With Patroni the nodes are not listed.
        let text = fs::read_to_string(&path).unwrap();
        let (head, tail) = text.split_once("# The coordinator and").unwrap();
        let (_, tail) = tail.split_once("# With Patroni").unwrap();
        let is_key = |line: &str| {
            let line = line.strip_prefix("# ").unwrap_or_default();
            let word = line.split(['=', ' ', ']']).next().unwrap_or_default();
            line.starts_with('[')
                || (line.contains(" = ")
                    && word.chars().all(|it| it.is_ascii_lowercase() || it == '_'))
        };
        let uncommented: Vec<_> = format!("{head}# With Patroni{tail}")
            .lines()
            .map(|line| if is_key(line) { line[2..].to_owned() } else { line.to_owned() })
            .collect();
        let text = uncommented.join("\n").replace("http://health", "https://health");
        let config = load(&text).unwrap();
        assert!(config.patroni.is_some() && config.etcd.is_some() && config.health.is_some());
        assert!(config.window.is_some() && (config.balance.weight(3) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn what_postgresql_would_not_take_or_nobody_could_compute_is_refused() {
        let rest = "cluster = \"a\"\n[postgres]\nuser = \"a\"\n\
                    [[nodes]]\ngroup = 0\nname = \"a\"\nhost = \"a\"\n";
        let often = "window.schedule: opens more than 1000 times before it closes once: let it open \
                     less often, or for less long\n";
        for (text, expected) in [
            ("apply.move_timeout = \"24days\"", None),
            (
                "apply.move_timeout = \"25days\"",
                Some(
                    "apply.move_timeout: must be 24days or less: PostgreSQL takes no longer one\n",
                ),
            ),
            ("window = { schedule = \"* * * * *\", length = \"16h\" }", None),
            ("window = { schedule = \"* * * * *\", length = \"17h\" }", Some(often)),
        ] {
            let found = load(&format!("{text}\n{rest}")).err();
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn every_problem_is_told() {
        let text = "cluster = \"a/b\"\nshutdown_grace = \"0s\"\ninterval = \"1s\"\n\
            window = { schedule = \"0 1 * * *\", length = \"0s\" }\n\
            [balance]\nthreshold = 2\ngain_min = -1\n\
            weights = [{ group = 1, weight = 0 }, { group = 1, weight = 1 }]\n\
            [budget]\nbytes_per_run = 0\n\
            [guard]\ntransaction_age_max = \"0s\"\ndisk_free_min = 1.0\n\
            [apply]\nlock_timeout = \"0s\"\nstall_timeout = \"1s\"\nmove_timeout = \"0s\"\n\
            [health]\nurls = [\"x:9631\"]\nca_file = \"/ca\"\n\
            [postgres]\nuser = \"\"\n[[nodes]]\ngroup = 1\nname = \"a\"\nhost = \"a\"\n";
        assert_eq!(
            load(text).unwrap_err(),
            "cluster: must not be empty, nor have a `/` in it\n\
             shutdown_grace: must be above zero\n\
             interval: must be 5s to 1h\n\
             window.length: must be 1m to 7days\n\
             balance.threshold: must be 0 to 1\n\
             balance.gain_min: must be 0 to 1\n\
             balance.weights[0].weight: must be above 0; to empty a node, drain it\n\
             balance.weights[1].group: 1 is listed twice\n\
             budget.bytes_per_run: must be above 0; to move nothing, leave mode = \"dry_run\"\n\
             guard.transaction_age_max: must be above zero\n\
             guard.disk_free_min: must be 0 or more, and below 1\n\
             apply.lock_timeout: must be 10ms to 1m: writers wait as long\n\
             apply.stall_timeout: must be 30s or more: a move tells its state each few s\n\
             apply.move_timeout: must not be below stall_timeout\n\
             health.urls[0]: `x:9631` must begin with http:// or https://\n\
             health.ca_file: has no use without an https:// address\n\
             postgres.user: must not be empty\n\
             nodes: must list the coordinator: a server of group 0\n"
        );
    }

    #[test]
    fn a_job_needs_a_window_and_a_plan_of_citus_and_somebody_who_remembers() {
        let head = "apply.engine = \"job\"\n";
        assert_eq!(
            load(&format!("{head}{MINIMAL}")).unwrap_err(),
            "apply.engine: \"job\" moves what Citus plans: set balance.strategy = \"citus\"\n\
             apply.engine: \"job\" is for off-hours: a job moves on until all is moved, so give it a \
             [window]\n\
             apply.engine: \"job\" needs [etcd]: a job outlives the agent that began it, and nobody would \
             know it again\n"
        );
        let all = "balance.strategy = \"citus\"\nwindow = { schedule = \"0 1 * * *\", length = \"4h\" }\n\
            etcd.endpoints = [\"http://127.0.0.1:2379\"]\n";
        assert_eq!(load(&format!("{head}{all}{MINIMAL}")).unwrap().apply.engine, Engine::Job);
    }

    #[test]
    fn something_is_moved_only_where_that_is_said() {
        let with = |mode| load(&format!("mode = \"{mode}\"\n{MINIMAL}")).map(|it| it.mode);
        assert_eq!(with("apply"), Ok(Mode::Apply));
        assert_eq!(
            with("move").unwrap_err(),
            "mode: unknown variant `move`, expected `dry_run` or `apply` (line 1)\n"
        );
    }
}
