//! A real etcd cluster on loopback, whose members can be killed and frozen one by one.

use std::env;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::process::Command;

use crate::daemon::{Daemon, server_port};
use crate::program::{self, Finished, as_server_user};
use crate::skip::Skip;
use crate::{eventually, run};

/// Longest wait for a cluster to elect a leader and serve.
const START_LIMIT: Duration = Duration::from_mins(1);

/// An etcd cluster. Dropping it kills its members and removes their files.
#[derive(Debug)]
pub struct EtcdCluster {
    members: Vec<Member>,
    directory: TempDir,
}

#[derive(Debug)]
struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    daemon: Daemon,
}

/// Reports the running test as skipped and returns true if etcd is not installed:
/// `if etcd_is_missing() { return; }`.
pub fn etcd_is_missing() -> bool {
    ["etcd", "etcdctl"].into_iter().any(program_is_missing)
}

/// Reports the running test as skipped and returns true if the program is not in `PATH`.
pub(crate) fn program_is_missing(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_there = env::split_paths(&path).any(|directory| directory.join(program).exists());
    if !is_there {
        Skip(format!("{program} is not installed")).report();
    }
    !is_there
}

impl EtcdCluster {
    /// Starts that many members and waits until they serve.
    pub async fn start(count: usize) -> Self {
        let directory = program::directory();
        let member = |number: usize| {
            let name = format!("etcd-{}", number + 1);
            let daemon = Daemon::new(&directory.path().join(format!("{name}.log")));
            Member { name, client_port: server_port(), peer_port: server_port(), daemon }
        };
        let members = (0..count).map(member).collect();
        let mut cluster = Self { members, directory };
        for index in 0..count {
            cluster.start_member(index);
        }
        cluster.serves().await;
        cluster
    }

    /// The members' client addresses.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|it| format!("http://127.0.0.1:{}", it.client_port)).collect()
    }

    /// Starts a member that was killed. Does not wait until it serves.
    pub fn start_member(&mut self, index: usize) {
        let initial: Vec<_> = self
            .members
            .iter()
            .map(|it| format!("{}=http://127.0.0.1:{}", it.name, it.peer_port))
            .collect();
        let member = &mut self.members[index];
        let client = format!("http://127.0.0.1:{}", member.client_port);
        let peer = format!("http://127.0.0.1:{}", member.peer_port);
        let mut command = as_server_user("etcd");
        command
            .args(["--name", &member.name, "--initial-cluster", &initial.join(",")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            // Written often, as the members of a test do not survive it.
            .args(["--unsafe-no-fsync", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.directory.path().join(&member.name));
        member.daemon.start(command);
    }

    /// Waits until every member that runs serves.
    pub async fn serves(&mut self) {
        let running: Vec<_> = self
            .members
            .iter_mut()
            .filter_map(|it| it.daemon.is_running().then_some(it.client_port))
            .map(|port| format!("http://127.0.0.1:{port}"))
            .collect();
        assert!(!running.is_empty(), "no etcd member runs");
        let endpoints = running.join(",");
        eventually("etcd serves", START_LIMIT, async || {
            let mut health = etcdctl(&endpoints, &["endpoint", "health"]);
            health.stdin(Stdio::null()).output().await.is_ok_and(|it| it.status.success())
        })
        .await;
    }

    /// Kills a member with SIGKILL.
    pub async fn kill9(&mut self, index: usize) {
        self.members[index].daemon.kill9().await;
    }

    /// Freezes a member: its connections stay open, and nothing answers.
    pub fn sigstop(&self, index: usize) {
        self.members[index].daemon.signal(Signal::STOP);
    }

    /// Lets a frozen member go on.
    pub fn sigcont(&self, index: usize) {
        self.members[index].daemon.signal(Signal::CONT);
    }

    /// The number of the member that leads.
    pub async fn leader(&self) -> usize {
        for (index, endpoint) in self.endpoints().iter().enumerate() {
            let status = run(&mut etcdctl(endpoint, &["endpoint", "status", "-w", "json"])).await;
            let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
            let status = &status[0]["Status"];
            if status["leader"] == status["header"]["member_id"] {
                return index;
            }
        }
        panic!("no etcd member leads");
    }

    /// Runs `etcdctl` with the endpoints of all members.
    pub async fn etcdctl(&self, arguments: &[&str]) -> Finished {
        run(&mut etcdctl(&self.endpoints().join(","), arguments)).await
    }
}

fn etcdctl(endpoints: &str, arguments: &[&str]) -> Command {
    let mut command = as_server_user("etcdctl");
    command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints]).args(arguments);
    command
}

impl Drop for EtcdCluster {
    #[expect(clippy::print_stderr, reason = "what the servers said belongs to a failing test")]
    fn drop(&mut self) {
        if thread::panicking() {
            for member in &self.members {
                eprintln!("{}", member.daemon.log_tail());
            }
        }
    }
}
