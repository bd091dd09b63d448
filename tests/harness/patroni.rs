//! A real Patroni cluster on loopback: PostgreSQL servers whose leader Patroni chooses, and the
//! etcd it keeps that in.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command as StdCommand;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::{Client, Config, NoTls};

use crate::daemon::{Daemon, server_port};
use crate::etcd::{EtcdCluster, program_is_missing};
use crate::eventually;
use crate::postgres::{SUPERUSER, installation, postgres_is_missing};
use crate::program::{self, as_server_user, give_to_server_user};

/// Longest wait for a cluster to be made, or to have a leader again: the leader's key lives 20 s,
/// the least Patroni takes.
const LIMIT: Duration = Duration::from_mins(2);

/// A Patroni cluster. Dropping it kills its servers and removes their files.
#[derive(Debug)]
pub struct PatroniCluster {
    /// The etcd it uses. Stopping it demotes the leader after some seconds.
    pub etcd: EtcdCluster,
    members: Vec<Member>,
    directory: TempDir,
}

#[derive(Debug)]
struct Member {
    name: String,
    /// In a cluster of groups.
    group: Option<u32>,
    postgres_port: u16,
    rest_port: u16,
    daemon: Daemon,
}

/// Reports the running test as skipped and returns true if Patroni, etcd or PostgreSQL is not
/// installed: `if patroni_is_missing() { return; }`.
pub fn patroni_is_missing() -> bool {
    postgres_is_missing() || ["patroni", "etcd", "etcdctl"].into_iter().any(program_is_missing)
}

/// How to make a cluster.
#[derive(Clone, Debug)]
pub struct PatroniBuilder {
    slots: Vec<String>,
    parameters: Vec<(String, String)>,
    synchronous_mode: bool,
    failsafe_mode: bool,
    etcd_members: usize,
}

impl PatroniBuilder {
    /// A permanent physical slot: Patroni keeps it on the leader and advances it on the others.
    pub fn slot(mut self, name: &str) -> Self {
        self.slots.push(name.to_owned());
        self
    }

    /// A setting of PostgreSQL.
    pub fn parameter(mut self, name: &str, value: &str) -> Self {
        self.parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Lets Patroni name synchronous standbys.
    pub fn synchronous(mut self) -> Self {
        self.synchronous_mode = true;
        self
    }

    /// Lets the leader go on without etcd as long as it reaches all members.
    pub fn failsafe(mut self) -> Self {
        self.failsafe_mode = true;
        self
    }

    /// So many members of etcd in place of one.
    pub fn etcd(mut self, members: usize) -> Self {
        self.etcd_members = members;
        self
    }

    /// Starts that many members, and waits until one leads and the others stream from it.
    pub async fn start(self, count: usize) -> PatroniCluster {
        self.start_members(vec![None; count]).await
    }

    /// Starts groups of so many members each, whose keys lie as those of Citus' groups do, and waits
    /// until each has a leader that the others stream from.
    pub async fn start_groups(self, sizes: &[usize]) -> PatroniCluster {
        let groups = (0..).zip(sizes).flat_map(|(group, size)| vec![Some(group); *size]);
        self.start_members(groups.collect()).await
    }

    async fn start_members(self, groups: Vec<Option<u32>>) -> PatroniCluster {
        let etcd = EtcdCluster::start(self.etcd_members).await;
        let directory = program::directory();
        let member = |(number, group)| {
            let name = format!("patroni-{number}");
            let daemon = Daemon::new(&directory.path().join(format!("{name}.log")));
            Member { name, group, postgres_port: server_port(), rest_port: server_port(), daemon }
        };
        let members = (1..).zip(groups).map(member).collect();
        let mut cluster = PatroniCluster { etcd, members, directory };
        let firsts: Vec<_> =
            cluster.groups().into_iter().map(|it| cluster.of_group(it)[0]).collect();
        for index in 0..cluster.members.len() {
            cluster.write_config(index, &self);
        }
        for &index in &firsts {
            cluster.start_member(index);
        }
        for group in cluster.groups() {
            cluster.leader_of(group).await;
        }
        for index in (0..cluster.members.len()).filter(|it| !firsts.contains(it)) {
            cluster.start_member(index);
        }
        cluster.settled().await;
        cluster
    }
}

impl PatroniCluster {
    /// Patroni's name for the cluster.
    pub const SCOPE: &str = "mesh";

    /// Starts that many members, without slots of their own.
    pub async fn start(count: usize) -> Self {
        Self::builder().start(count).await
    }

    /// A cluster with slots or settings.
    pub fn builder() -> PatroniBuilder {
        PatroniBuilder {
            slots: Vec::new(),
            parameters: Vec::new(),
            synchronous_mode: false,
            failsafe_mode: false,
            etcd_members: 1,
        }
    }

    /// A member's name.
    pub fn name(&self, index: usize) -> &str {
        &self.members[index].name
    }

    /// A member's PostgreSQL port, on 127.0.0.1. Every address there may log in as the superuser
    /// without a password, for replication too.
    pub fn port(&self, index: usize) -> u16 {
        self.members[index].postgres_port
    }

    /// A member's data directory.
    pub fn data_directory(&self, index: usize) -> PathBuf {
        self.directory.path().join(&self.members[index].name)
    }

    /// A member's REST API: `http://127.0.0.1:…`.
    pub fn rest_url(&self, index: usize) -> String {
        format!("http://127.0.0.1:{}", self.members[index].rest_port)
    }

    /// The number of the leader; waits until there is one that takes writes.
    pub async fn leader(&self) -> usize {
        self.leader_of(0).await
    }

    fn groups(&self) -> BTreeSet<u32> {
        self.members.iter().map(|it| it.group.unwrap_or_default()).collect()
    }

    /// The members of a group; without groups all are in group 0.
    fn of_group(&self, group: u32) -> Vec<usize> {
        let all = 0..self.members.len();
        all.filter(|it| self.members[*it].group.unwrap_or_default() == group).collect()
    }

    /// Like [`leader`](Self::leader), of one group.
    pub async fn leader_of(&self, group: u32) -> usize {
        let mut leader = None;
        eventually("a member leads", LIMIT, async || {
            for index in self.of_group(group) {
                if self.answers(index, "/primary").await {
                    leader = Some(index);
                }
            }
            leader.is_some()
        })
        .await;
        leader.unwrap()
    }

    /// Connects to a member as the superuser.
    pub async fn connect(&self, index: usize) -> Client {
        self.try_connect(index).await.expect("connect to the member")
    }

    /// Like [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// Fails when the server does not answer or refuses.
    pub async fn try_connect(&self, index: usize) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port(index)).user(SUPERUSER).dbname("postgres");
        let connected = config.connect_timeout(Duration::from_secs(10)).connect(NoTls).await;
        let (client, connection) = connected?;
        #[expect(clippy::disallowed_methods, reason = "ends when the test drops its client")]
        tokio::spawn(connection);
        Ok(client)
    }

    /// Hands the leadership to another member, in order, and waits until it has it and the old
    /// leader follows.
    pub async fn switchover(&mut self, to: usize) {
        let from = self.leader().await;
        let order = json!({"leader": self.name(from), "candidate": self.name(to)});
        let url = format!("{}/switchover", self.rest_url(from));
        let answer = reqwest::Client::new().post(url).body(order.to_string()).send().await;
        let answer = answer.expect("ask for the switchover");
        let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
        assert!(status.is_success(), "switchover refused: {status} {text}");
        eventually("the candidate leads", LIMIT, async || self.answers(to, "/primary").await).await;
        self.settled().await;
    }

    /// Kills a member with SIGKILL: its Patroni and all processes of its server.
    pub async fn kill9(&mut self, index: usize) {
        self.members[index].daemon.kill9().await;
        self.signal_postgres(index, Signal::KILL);
    }

    /// Kills a member's Patroni alone: its server goes on.
    pub async fn kill9_patroni(&mut self, index: usize) {
        self.members[index].daemon.kill9().await;
    }

    /// Freezes a member's Patroni alone.
    pub fn sigstop_patroni(&self, index: usize) {
        self.members[index].daemon.signal(Signal::STOP);
    }

    /// Lets a frozen Patroni go on.
    pub fn sigcont_patroni(&self, index: usize) {
        self.members[index].daemon.signal(Signal::CONT);
    }

    /// Freezes a member's server, and not its Patroni.
    pub fn sigstop_postgres(&self, index: usize) {
        self.signal_postgres(index, Signal::STOP);
    }

    /// Lets a frozen server go on.
    pub fn sigcont_postgres(&self, index: usize) {
        self.signal_postgres(index, Signal::CONT);
    }

    /// Kills a member as [`kill9`](Self::kill9), while others use the cluster, and does not wait; call
    /// that before the member is started again.
    pub fn kill9_at_once(&self, index: usize) {
        self.members[index].daemon.signal(Signal::KILL);
        self.signal_postgres(index, Signal::KILL);
    }

    /// Starts a member's Patroni, which starts the server. Does not wait.
    pub fn start_member(&mut self, index: usize) {
        let mut command = as_server_user("patroni");
        command.arg(self.config_file(index)).env("LC_ALL", "C.UTF-8");
        self.members[index].daemon.start(command);
    }

    /// Waits until there is a leader and all members that run stream from it.
    pub async fn settled(&mut self) {
        for group in self.groups() {
            let members = self.of_group(group).into_iter();
            let running = members.filter(|it| self.members[*it].daemon.is_running());
            let count = running.count();
            eventually("all members stream", LIMIT, async || {
                let leader = self.leader_of(group).await;
                let cluster = self.get(leader, "/cluster").await.unwrap_or_default();
                let Some(members) = cluster["members"].as_array() else { return false };
                let streaming = members.iter().filter(|it| it["state"] == "streaming").count();
                streaming + 1 == count
            })
            .await;
        }
    }

    /// Reads the answer of a member's REST API.
    pub async fn get(&self, index: usize, path: &str) -> Option<Value> {
        let answer = self.request(index, path).await.ok()?.text().await.ok()?;
        serde_json::from_str(&answer).ok()
    }

    async fn answers(&self, index: usize, path: &str) -> bool {
        self.request(index, path).await.is_ok_and(|answer| answer.status().is_success())
    }

    async fn request(&self, index: usize, path: &str) -> reqwest::Result<reqwest::Response> {
        let url = format!("{}{path}", self.rest_url(index));
        reqwest::Client::new().get(url).timeout(Duration::from_secs(5)).send().await
    }

    fn config_file(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("{}.yml", self.name(index)))
    }

    /// JSON is YAML too.
    fn write_config(&self, index: usize, builder: &PatroniBuilder) {
        let Member { name, group, postgres_port, rest_port, .. } = &self.members[index];
        // So Patroni places the keys of a Citus group, which it refuses to do without Citus.
        let (namespace, scope) = match group {
            Some(group) => (format!("/service/{}/", Self::SCOPE), group.to_string()),
            None => ("/service/".to_owned(), Self::SCOPE.to_owned()),
        };
        let slots: Value =
            builder.slots.iter().map(|slot| (slot.clone(), json!({"type": "physical"}))).collect();
        let mut parameters: Value =
            builder.parameters.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        for (name, value) in [("fsync", "off"), ("shared_buffers", "32MB")] {
            if parameters[name].is_null() {
                parameters[name] = json!(value);
            }
        }
        let hba =
            ["local all all trust", "host all all all trust", "host replication all all trust"];
        let etcd = self.etcd.endpoints();
        let etcd: Vec<_> = etcd.iter().map(|it| it.trim_start_matches("http://")).collect();
        let rest = format!("127.0.0.1:{rest_port}");
        let postgres = format!("127.0.0.1:{postgres_port}");
        let config = json!({
            "namespace": namespace,
            "scope": scope,
            "name": name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": etcd},
            "bootstrap": {
                // The least that Patroni takes for `ttl` and `retry_timeout`.
                "dcs": {
                    "ttl": 20, "loop_wait": 2, "retry_timeout": 3,
                    "synchronous_mode": builder.synchronous_mode,
                    "failsafe_mode": builder.failsafe_mode,
                    "slots": slots,
                    "postgresql": {
                        "use_slots": true, "use_pg_rewind": true, "parameters": parameters,
                    },
                },
                "initdb": [{"encoding": "UTF8"}, {"auth": "trust"}, "data-checksums", "no-sync"],
            },
            "postgresql": {
                "listen": postgres, "connect_address": postgres,
                "data_dir": self.data_directory(index),
                "bin_dir": installation().bin_directory(),
                "pgpass": self.directory.path().join(format!("{name}.pgpass")),
                "basebackup": [{"checkpoint": "fast"}, "no-sync"],
                "parameters": {"unix_socket_directories": self.directory.path()},
                "pg_hba": hba,
                "authentication": {
                    "superuser": {"username": SUPERUSER},
                    "replication": {"username": SUPERUSER},
                    "rewind": {"username": SUPERUSER},
                },
            },
        });
        let file = self.config_file(index);
        fs::write(&file, config.to_string()).unwrap();
        give_to_server_user(&file);
    }

    /// Signals the server's processes. Patroni does not keep the postmaster as its child, so its
    /// number comes from its own file.
    fn signal_postgres(&self, index: usize, signal: Signal) {
        let pid_file = self.data_directory(index).join("postmaster.pid");
        let Ok(content) = fs::read_to_string(pid_file) else { return };
        let Some(postmaster) = content.lines().next().and_then(|it| it.trim().parse().ok()) else {
            return;
        };
        let children = StdCommand::new("pgrep").args(["-P", &i32::to_string(&postmaster)]).output();
        let children = children.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
        let children = children.unwrap_or_default();
        let children = children.lines().filter_map(|it| it.trim().parse().ok());
        for pid in std::iter::once(postmaster).chain(children).filter_map(Pid::from_raw) {
            kill_process(pid, signal).ok();
        }
    }
}

impl Drop for PatroniCluster {
    #[expect(clippy::print_stderr, reason = "what the servers said belongs to a failing test")]
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            if thread::panicking() {
                eprintln!("{}", self.members[index].daemon.log_tail());
            }
            // Patroni first: it would start the server again.
            self.members[index].daemon = Daemon::new(&PathBuf::new());
            self.signal_postgres(index, Signal::KILL);
        }
    }
}
