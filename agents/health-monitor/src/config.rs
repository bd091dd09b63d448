//! The keys of `health-monitor.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use shared::config::{Check, Problems};
use shared::etcd::EtcdConfig;
use shared::pg::{Node, PostgresConfig, TlsMode};
use shared::topology::{PatroniConfig, TopologyConfig};

use crate::notify;
use crate::notify::config::{AlertmanagerConfig, NotifyConfig, WebhookConfig};
use crate::sizing::Plan;
use crate::thresholds::Thresholds;

/// How often a component can be asked at most, and how seldom.
const INTERVAL_MIN: Duration = Duration::from_millis(200);
const INTERVAL_MAX: Duration = Duration::from_mins(1);

/// A log file holds at least some hundred lines, and there are not so many that moving them takes long.
const LOG_FILE_BYTES_MIN: u64 = 64 << 10;
const LOG_FILES_MAX: u32 = 100;

/// The configuration of the health monitor. What it does not name is not missed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name of the cluster: a label of every metric and alert.
    pub cluster: String,
    /// Where `/`, `/livez`, `/readyz`, `/metrics` and `/status` answer.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// How long a stop waits; below the service's `stop_grace_period`.
    #[serde(default = "default_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How often each component is asked whether it is there and in its role.
    #[serde(default = "default_interval", with = "humantime_serde")]
    pub interval: Duration,
    /// How long an answer to that may take.
    #[serde(default = "default_timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// How often it is asked for what changes slowly: the comprehensive checks.
    #[serde(default = "default_comprehensive_interval", with = "humantime_serde")]
    pub comprehensive_interval: Duration,
    /// A file that gets the log too; rotated by size.
    pub log_file: Option<PathBuf>,
    /// So large it may become before it moves on to `log_file.1`, bytes.
    #[serde(default = "default_log_file_bytes")]
    pub log_file_bytes_max: u64,
    /// So many files there may be, with the one that is written.
    #[serde(default = "default_log_files")]
    pub log_files_max: u32,
    /// The limits of checks, where they differ from the catalogue's.
    #[serde(default)]
    pub limits: Thresholds,
    /// What servers should be made for, where it cannot be measured.
    #[serde(default)]
    pub sizing: Plan,
    /// How the PostgreSQL servers are reached.
    pub postgres: PostgresConfig,
    /// The servers, where they are listed.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// etcd: its members are watched, leases are kept in it, and Patroni's keys are read.
    pub etcd: Option<EtcdConfig>,
    /// The servers, where Patroni knows them; the Patroni of each is watched.
    pub patroni: Option<PatroniConfig>,
    /// `PgBouncer`s.
    #[serde(default)]
    pub pgbouncer: Vec<PgbouncerConfig>,
    /// `HAProxy`s.
    #[serde(default)]
    pub haproxy: Vec<HaproxyConfig>,
    /// Redis servers.
    #[serde(default)]
    pub redis: Vec<RedisConfig>,
    /// The other agents.
    #[serde(default)]
    pub agents: Vec<AgentConfig>,
    /// Swarm, where its socket is given.
    pub swarm: Option<SwarmConfig>,
    /// File systems of this host.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// When those who must know are told.
    #[serde(default)]
    pub notify: NotifyConfig,
    /// The peers of the Alertmanager that is told.
    #[serde(default)]
    pub alertmanager: Vec<AlertmanagerConfig>,
    /// Webhooks that are told.
    #[serde(default)]
    pub webhook: Vec<WebhookConfig>,
    /// Where silences and what was told are kept, without etcd.
    pub state_directory: Option<PathBuf>,
}

/// One entry of `[[pgbouncer]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PgbouncerConfig {
    /// Its name in the verdict.
    pub name: String,
    /// Where it listens.
    pub host: String,
    /// Its port.
    #[serde(default = "default_pgbouncer_port")]
    pub port: u16,
    /// A user of `stats_users` or `admin_users`, and of the pool that the query goes through.
    pub user: String,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
    /// The database that the query goes through; without it none does.
    pub database: Option<String>,
    /// The group whose primary that database is.
    #[serde(default)]
    pub group: u32,
    /// Whether the connection is encrypted: as in `[postgres]`.
    #[serde(default)]
    pub tls: TlsMode,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether it may ask for the password in clear text or as an MD5 hash without TLS too: as in
    /// `[postgres]`.
    #[serde(default)]
    pub allow_weak_auth: bool,
}

/// One entry of `[[haproxy]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HaproxyConfig {
    /// Its name in the verdict.
    pub name: String,
    /// The statistics page: `http://haproxy-1:8404/stats`.
    pub url: String,
    /// The user that the page asks for, if it does.
    pub user: Option<String>,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
    /// PEM certificates to trust in place of the system's, for an https:// address.
    pub ca_file: Option<PathBuf>,
    /// The backend that has exactly one server up: the primary of group 0.
    pub write_backend: Option<String>,
    /// The backend with the standbys.
    pub read_backend: Option<String>,
    /// The group these two serve.
    #[serde(default)]
    pub group: u32,
}

/// One entry of `[[redis]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedisConfig {
    /// Its name in the verdict.
    pub name: String,
    /// Where it listens.
    pub host: String,
    /// Its port.
    #[serde(default = "default_redis_port")]
    pub port: u16,
    /// The ACL user; without it the password is that of `requirepass`.
    pub user: Option<String>,
    /// The file with the password.
    pub password_file: Option<PathBuf>,
}

/// One entry of `[[agents]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Its name in the verdict.
    pub name: String,
    /// Its admin server: `http://backup-agent:9632`.
    pub url: String,
}

/// The table `[swarm]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwarmConfig {
    /// The Docker socket of a manager.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The stack whose services are watched.
    pub stack: String,
}

/// One entry of `[[disks]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Its name in the verdict.
    pub name: String,
    /// Any path on it.
    pub path: PathBuf,
}

fn default_admin_address() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 9631))
}

fn default_grace() -> Duration {
    Duration::from_secs(5)
}

fn default_interval() -> Duration {
    Duration::from_secs(1)
}

fn default_timeout() -> Duration {
    Duration::from_secs(1)
}

fn default_comprehensive_interval() -> Duration {
    Duration::from_mins(1)
}

fn default_log_file_bytes() -> u64 {
    16 << 20
}

fn default_log_files() -> u32 {
    5
}

fn default_pgbouncer_port() -> u16 {
    6432
}

fn default_redis_port() -> u16 {
    6379
}

fn default_socket() -> PathBuf {
    PathBuf::from("/var/run/docker.sock")
}

impl Config {
    /// Which nodes there are.
    pub fn topology(&self) -> TopologyConfig<'_> {
        let Self { etcd, patroni, nodes, .. } = self;
        TopologyConfig { etcd: etcd.as_ref(), patroni: patroni.as_ref(), nodes }
    }

    /// The names of the components that are listed, kind by kind.
    fn check_names(&self, problems: &mut Problems) {
        fn check<'a>(
            problems: &mut Problems,
            table: &str,
            names: impl Iterator<Item = &'a String>,
        ) {
            let mut before: Vec<&String> = Vec::new();
            for (index, name) in names.enumerate() {
                let key = format!("{table}[{index}].name");
                if name.is_empty() {
                    problems.add(&key, "must not be empty");
                } else if before.contains(&name) {
                    problems.add(&key, format!("`{name}` is used twice"));
                }
                before.push(name);
            }
        }
        check(problems, "pgbouncer", self.pgbouncer.iter().map(|it| &it.name));
        check(problems, "haproxy", self.haproxy.iter().map(|it| &it.name));
        check(problems, "redis", self.redis.iter().map(|it| &it.name));
        check(problems, "agents", self.agents.iter().map(|it| &it.name));
        check(problems, "disks", self.disks.iter().map(|it| &it.name));
    }

    /// What is listed, entry by entry.
    fn check_listed(&self, problems: &mut Problems) {
        for (index, it) in self.pgbouncer.iter().enumerate() {
            problems.within(&format!("pgbouncer[{index}]"), |problems| {
                check_host(problems, &it.host, it.port);
                if it.user.is_empty() {
                    problems.add("user", "must not be empty");
                }
                if it.ca_file.is_some() && it.tls == TlsMode::Disable {
                    problems.add("ca_file", "has no use with tls = \"disable\"");
                }
            });
        }
        for (index, it) in self.haproxy.iter().enumerate() {
            problems.within(&format!("haproxy[{index}]"), |problems| {
                check_url(problems, &it.url);
                if it.ca_file.is_some() && !it.url.starts_with("https://") {
                    problems.add("ca_file", "has no use without an https:// address");
                }
                if it.password_file.is_some() && it.user.is_none() {
                    problems.add("password_file", "has no use without user");
                }
            });
        }
        for (index, it) in self.redis.iter().enumerate() {
            problems.within(&format!("redis[{index}]"), |problems| {
                check_host(problems, &it.host, it.port);
                if it.user.is_some() && it.password_file.is_none() {
                    problems.add("user", "has no use without password_file");
                }
            });
        }
        for (index, it) in self.agents.iter().enumerate() {
            let key = format!("agents[{index}]");
            problems.within(&key, |problems| check_url(problems, &it.url));
        }
        if let Some(swarm) = &self.swarm {
            if swarm.stack.is_empty() {
                problems.add("swarm.stack", "must not be empty");
            }
            if !swarm.socket.is_absolute() {
                problems.add("swarm.socket", "must be an absolute path");
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if !disk.path.is_absolute() {
                problems.add(&format!("disks[{index}].path"), "must be an absolute path");
            }
        }
    }
}

fn check_host(problems: &mut Problems, host: &str, port: u16) {
    if host.is_empty() {
        problems.add("host", "must not be empty");
    }
    if host.starts_with('[') {
        problems.add("host", "must be an IPv6 address without brackets");
    }
    if port == 0 {
        problems.add("port", "must not be 0");
    }
}

fn check_url(problems: &mut Problems, url: &str) {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        problems.add("url", format!("`{url}` must begin with http:// or https://"));
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
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&self.interval) {
            problems.add("interval", "must be 200ms to 1min");
        }
        if self.timeout.is_zero() || INTERVAL_MAX < self.timeout {
            problems.add("timeout", "must be above zero, and 1min at most");
        }
        if self.comprehensive_interval < self.interval {
            problems.add("comprehensive_interval", "must not be below interval");
        }
        if self.log_file.as_ref().is_some_and(|it| !it.is_absolute()) {
            problems.add("log_file", "must be an absolute path");
        }
        if self.log_file_bytes_max < LOG_FILE_BYTES_MIN {
            problems.add("log_file_bytes_max", format!("must be {LOG_FILE_BYTES_MIN} at least"));
        }
        if !(1..=LOG_FILES_MAX).contains(&self.log_files_max) {
            problems.add("log_files_max", format!("must be 1 to {LOG_FILES_MAX}"));
        }
        problems.within("limits", |problems| self.limits.check(problems));
        problems.within("sizing", |problems| self.sizing.check(problems));
        problems.within("postgres", |problems| self.postgres.check(problems));
        self.topology().check(problems);
        self.check_names(problems);
        self.check_listed(problems);
        if self.state_directory.as_ref().is_some_and(|it| !it.is_absolute()) {
            problems.add("state_directory", "must be an absolute path");
        }
        notify::config::check(&self.notify, &self.alertmanager, &self.webhook, problems);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use shared::config;

    use super::*;

    const MINIMAL: &str = "cluster = \"demo\"\n[postgres]\nuser = \"pgmesh_health\"\n\
        [[nodes]]\nname = \"a\"\nhost = \"a\"\n";

    fn load(text: &str) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health-monitor.toml");
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
        assert_eq!(config.admin_address.to_string(), "0.0.0.0:9631");
        assert_eq!(
            (config.interval, config.timeout),
            (Duration::from_secs(1), Duration::from_secs(1))
        );
        assert!(config.etcd.is_none() && config.pgbouncer.is_empty() && config.swarm.is_none());
    }

    #[test]
    fn the_shipped_file_loads_with_and_without_what_is_commented_out() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/health-monitor.toml");
        let config: Config = config::load(&path).unwrap();
        assert_eq!((config.nodes.len(), config.agents.len()), (2, 2));
        // With Patroni the nodes are not listed.
        let text = fs::read_to_string(&path).unwrap();
        let (head, tail) = text.split_once("# These servers and no others").unwrap();
        let (_, tail) = tail.split_once("# The other agents").unwrap();
        let is_key = |line: &str| {
            let line = line.strip_prefix("# ").unwrap_or_default();
            let word = line.split(['=', ' ', ']']).next().unwrap_or_default();
            line.starts_with('[')
                || (line.contains(" = ")
                    && word.chars().all(|it| it.is_ascii_lowercase() || it == '_'))
        };
        let uncommented: Vec<_> = format!("{head}# The other agents{tail}")
            .lines()
            .map(|line| if is_key(line) { line[2..].to_owned() } else { line.to_owned() })
            .collect();
        let config = load(&uncommented.join("\n")).unwrap();
        assert_eq!((config.pgbouncer.len(), config.haproxy.len(), config.disks.len()), (1, 1, 1));
        assert!(config.patroni.is_some() && config.etcd.is_some() && config.swarm.is_some());
    }

    #[test]
    fn every_problem_of_what_is_listed_is_told() {
        let text = format!(
            "{MINIMAL}[[pgbouncer]]\nname = \"p\"\nhost = \"\"\nport = 0\nuser = \"\"\n\
             tls = \"disable\"\nca_file = \"/ca\"\n\
             [[haproxy]]\nname = \"h\"\nurl = \"http://h\"\nca_file = \"/ca\"\npassword_file = \"/p\"\n\
             [[redis]]\nname = \"r\"\nhost = \"[::1]\"\nuser = \"u\"\n\
             [[agents]]\nname = \"a\"\nurl = \"a:9632\"\n\
             [swarm]\nstack = \"\"\nsocket = \"docker.sock\"\n"
        );
        assert_eq!(
            load(&text).unwrap_err(),
            "pgbouncer[0].host: must not be empty\n\
             pgbouncer[0].port: must not be 0\n\
             pgbouncer[0].user: must not be empty\n\
             pgbouncer[0].ca_file: has no use with tls = \"disable\"\n\
             haproxy[0].ca_file: has no use without an https:// address\n\
             haproxy[0].password_file: has no use without user\n\
             redis[0].host: must be an IPv6 address without brackets\n\
             redis[0].user: has no use without password_file\n\
             agents[0].url: `a:9632` must begin with http:// or https://\n\
             swarm.stack: must not be empty\n\
             swarm.socket: must be an absolute path\n"
        );
    }

    #[test]
    fn every_problem_is_told() {
        let text = "cluster = \"\"\nshutdown_grace = \"0s\"\ninterval = \"1ms\"\ntimeout = \"0s\"\n\
            comprehensive_interval = \"0s\"\nlog_file = \"here\"\n\
            [limits.postgres]\nconnection = { warning = 1, critical = 2 }\n\
            [postgres]\nuser = \"\"\n\
            [[haproxy]]\nname = \"x\"\nurl = \"x:8404\"\n[[haproxy]]\nname = \"x\"\nurl = \"http://x\"\n\
            [[disks]]\nname = \"\"\npath = \"data\"\n";
        assert_eq!(
            load(text).unwrap_err(),
            "cluster: must not be empty\n\
             shutdown_grace: must be above zero\n\
             interval: must be 200ms to 1min\n\
             timeout: must be above zero, and 1min at most\n\
             comprehensive_interval: must not be below interval\n\
             log_file: must be an absolute path\n\
             limits.postgres.connection: is no check; see `health-monitor check --list`\n\
             postgres.user: must not be empty\n\
             nodes: must list at least one server\n\
             haproxy[1].name: `x` is used twice\n\
             disks[0].name: must not be empty\n\
             haproxy[0].url: `x:8404` must begin with http:// or https://\n\
             disks[0].path: must be an absolute path\n"
        );
    }
}
