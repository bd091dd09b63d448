//! A real etcd cluster on loopback, whose members can be killed and frozen one by one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::process::Command;

use crate::daemon::{Daemon, server_port};
use crate::program::{self, Finished, as_server_user};
use crate::skip::Skip;
use crate::tls::{Authority, Identity};
use crate::{eventually, run};

/// Longest wait for a cluster to elect a leader and serve.
const START_LIMIT: Duration = Duration::from_mins(1);

/// An etcd cluster. Dropping it kills its members and removes their files.
#[derive(Debug)]
pub struct EtcdCluster {
    members: Vec<Member>,
    directory: TempDir,
    scheme: &'static str,
    /// More arguments of `etcd`, and of `etcdctl`.
    options: Vec<String>,
    ctl_options: Vec<String>,
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
        Self::start_with(count, "http", Vec::new(), Vec::new()).await
    }

    /// One member with more arguments.
    pub async fn start_one(options: &[&str]) -> Self {
        let options = options.iter().map(ToString::to_string).collect();
        Self::start_with(1, "http", options, Vec::new()).await
    }

    /// One member that speaks TLS with clients that have a certificate of the same authority;
    /// `operator` is that of `etcdctl`.
    pub async fn start_with_tls(authority: &Authority, operator: &Identity) -> Self {
        let pairs = |pairs: [(&str, &Path); 3]| {
            pairs.map(|(name, path)| format!("--{name}={}", path.display())).to_vec()
        };
        let (ca, own) = (authority.ca_file(), authority.issue("etcd"));
        let mut options = pairs([
            ("trusted-ca-file", &ca),
            ("cert-file", &own.certificate),
            ("key-file", &own.key),
        ]);
        options.push("--client-cert-auth".to_owned());
        let ctl_options =
            pairs([("cacert", &ca), ("cert", &operator.certificate), ("key", &operator.key)]);
        Self::start_with(1, "https", options, ctl_options).await
    }

    async fn start_with(
        count: usize,
        scheme: &'static str,
        options: Vec<String>,
        ctl_options: Vec<String>,
    ) -> Self {
        let directory = program::directory();
        let member = |number: usize| {
            let name = format!("etcd-{}", number + 1);
            let daemon = Daemon::new(&directory.path().join(format!("{name}.log")));
            Member { name, client_port: server_port(), peer_port: server_port(), daemon }
        };
        let members = (0..count).map(member).collect();
        let mut cluster = Self { members, directory, scheme, options, ctl_options };
        for index in 0..count {
            cluster.start_member(index);
        }
        cluster.serves().await;
        cluster
    }

    /// The members' client addresses.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|it| self.endpoint(it)).collect()
    }

    fn endpoint(&self, member: &Member) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, member.client_port)
    }

    /// Starts a member that was killed. Does not wait until it serves.
    pub fn start_member(&mut self, index: usize) {
        let initial: Vec<_> = self
            .members
            .iter()
            .map(|it| format!("{}=http://127.0.0.1:{}", it.name, it.peer_port))
            .collect();
        let client = self.endpoint(&self.members[index]);
        let member = &mut self.members[index];
        let peer = format!("http://127.0.0.1:{}", member.peer_port);
        let mut command = as_server_user("etcd");
        command
            .args(["--name", &member.name, "--initial-cluster", &initial.join(",")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            // Written often, as the members of a test do not survive it.
            .args(["--unsafe-no-fsync", "--log-level", "warn"])
            .args(&self.options)
            .arg("--data-dir")
            .arg(self.directory.path().join(&member.name));
        member.daemon.start(command);
    }

    /// Lets only those in who log in, as user `root` with the password `root` from now on.
    pub async fn enable_auth(&mut self) {
        self.etcdctl(&["user", "add", "root:root"]).await;
        self.etcdctl(&["user", "grant-role", "root", "root"]).await;
        self.etcdctl(&["auth", "enable"]).await;
        self.ctl_options.push("--user=root:root".to_owned());
    }

    /// Waits until every member that runs serves.
    pub async fn serves(&mut self) {
        let mut running = Vec::new();
        for (endpoint, member) in self.endpoints().into_iter().zip(&mut self.members) {
            if member.daemon.is_running() {
                running.push(endpoint);
            }
        }
        assert!(!running.is_empty(), "no etcd member runs");
        let endpoints = running.join(",");
        eventually("etcd serves", START_LIMIT, async || {
            let mut health = self.ctl(&endpoints, &["endpoint", "health"]);
            health.stdin(Stdio::null()).output().await.is_ok_and(|it| it.status.success())
        })
        .await;
    }

    /// Kills a member with SIGKILL.
    pub async fn kill9(&mut self, index: usize) {
        self.members[index].daemon.kill9().await;
    }

    /// What the only member has stored, to be given to [`begin_with`](Self::begin_with). It is killed for
    /// that, and started again.
    pub async fn snapshot(&mut self) -> TempDir {
        let copy = program::directory();
        self.kill9(0).await;
        copy_files(&self.data(), &copy.path().join("data")).await;
        self.start_member(0);
        self.serves().await;
        copy
    }

    /// Kills the only member, and starts it with what it had stored once, or with nothing.
    pub async fn begin_with(&mut self, snapshot: Option<&TempDir>) {
        self.kill9(0).await;
        run(as_server_user("rm").arg("-rf").arg(self.data())).await;
        if let Some(snapshot) = snapshot {
            copy_files(&snapshot.path().join("data"), &self.data()).await;
        }
        self.start_member(0);
        self.serves().await;
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join(&self.members[0].name)
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
            let status = run(&mut self.ctl(endpoint, &["endpoint", "status", "-w", "json"])).await;
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
        run(&mut self.ctl(&self.endpoints().join(","), arguments)).await
    }

    fn ctl(&self, endpoints: &str, arguments: &[&str]) -> Command {
        let mut command = as_server_user("etcdctl");
        let command_line = command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints]);
        command_line.args(&self.ctl_options).args(arguments);
        command
    }
}

async fn copy_files(from: &Path, to: &Path) {
    run(as_server_user("cp").arg("-a").arg(from).arg(to)).await;
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
