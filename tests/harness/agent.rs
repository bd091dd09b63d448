//! Runs the built agent as the tests' user would: as a process, which can be killed.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::eventually;
use crate::program::{self, Finished, as_server_user};

/// Names the agent's executable, for tests that run elsewhere than they were built.
const AGENT_VARIABLE: &str = "PGMESH_AGENT_BIN";
/// Longest run of a command unless the test says otherwise.
const RUN_LIMIT: Duration = Duration::from_mins(2);

/// An agent, the backup agent unless said otherwise, with one configuration, as a command line that can be run many times.
#[derive(Clone, Debug)]
pub struct Agent {
    binary: PathBuf,
    config: Option<PathBuf>,
    environment: Vec<(String, String)>,
    limit: Duration,
}

/// A running agent. Dropping it kills it.
#[derive(Debug)]
pub struct RunningAgent {
    process: Child,
    output: TempDir,
    limit: Duration,
}

/// The path of the built `backup-agent`: the variable `PGMESH_AGENT_BIN`, otherwise next to the
/// test's executable.
pub fn agent_binary() -> PathBuf {
    env::var_os(AGENT_VARIABLE).map_or_else(|| built("backup-agent"), PathBuf::from)
}

/// The path of a built program of the workspace.
fn built(program: &str) -> PathBuf {
    // target/debug/deps/it-… → target/debug/backup-agent
    let test = env::current_exe().expect("the test's executable has a path");
    let deps = test.parent().expect("the test's executable lies in a directory");
    deps.parent().unwrap_or(deps).join(program)
}

impl Agent {
    /// The agent with a configuration file.
    pub fn new(config: &Path) -> Self {
        Self { config: Some(config.to_owned()), ..Self::without_config() }
    }

    /// The lag exporter with a configuration file.
    pub fn lag_exporter(config: &Path) -> Self {
        Self::new(config).binary(&built("lag-exporter"))
    }

    /// The health monitor with a configuration file.
    pub fn health_monitor(config: &Path) -> Self {
        Self::new(config).binary(&built("health-monitor"))
    }

    /// The rebalance agent with a configuration file.
    pub fn rebalance_agent(config: &Path) -> Self {
        Self::new(config).binary(&built("rebalance-agent"))
    }

    /// The agent without `--config`, for commands that need none.
    pub fn without_config() -> Self {
        Self { binary: agent_binary(), config: None, environment: Vec::new(), limit: RUN_LIMIT }
    }

    /// Another executable than the built one.
    pub fn binary(mut self, binary: &Path) -> Self {
        binary.clone_into(&mut self.binary);
        self
    }

    /// Kills a run that takes longer than this; two minutes otherwise.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Adds an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The command line as text for a shell, without arguments: what stands in
    /// `archive_command = '… wal-push %p'`.
    pub fn shell_command(&self) -> String {
        let binary = self.binary.display();
        match &self.config {
            Some(config) => format!("{binary} --config {}", config.display()),
            None => binary.to_string(),
        }
    }

    /// Runs a command to its end. The result says if it was killed at the limit.
    pub async fn run<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Finished {
        self.spawn(arguments).wait().await
    }

    /// Starts a command and returns while it runs.
    pub fn spawn<A: AsRef<OsStr>>(&self, arguments: &[A]) -> RunningAgent {
        assert!(self.binary.is_file(), "no agent at {}: build it first", self.binary.display());
        let output = program::directory();
        let file = |name: &str| File::create(output.path().join(name)).unwrap();
        let mut command: Command = as_server_user(&self.binary);
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        command
            .args(["--log-format", "json"])
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            // Files, not pipes: nobody has to read them for the agent to go on.
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .kill_on_drop(true);
        let process = command.spawn().expect("start the agent");
        RunningAgent { process, output, limit: self.limit }
    }
}

impl RunningAgent {
    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    /// The process id; `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("ask for the agent").is_none()
    }

    /// Waits until a line of its output contains `text`; panics when it ends or takes longer than
    /// `limit`.
    pub async fn logged(&mut self, text: &str, limit: Duration) {
        let what = format!("the agent says {text:?}");
        eventually(&what, limit, async || {
            let running = self.is_running();
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return true;
            }
            assert!(
                running,
                "the agent ended without {text:?}\n{}\n{}",
                self.stdout(),
                self.stderr()
            );
            false
        })
        .await;
    }

    /// Waits for its end, and kills it at the agent's time limit.
    pub async fn wait(mut self) -> Finished {
        let ended = timeout(self.limit, self.process.wait()).await;
        if ended.is_err() {
            self.process.kill().await.expect("kill the agent");
        }
        let status = ended.ok().map(|status| status.expect("wait for the agent"));
        Finished { status, stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Asks it to end, with SIGTERM, and waits for that.
    pub async fn terminate(self) -> Finished {
        self.signal(Signal::TERM);
        self.wait().await
    }

    /// Kills it with SIGKILL.
    pub async fn kill9(self) -> Finished {
        self.signal(Signal::KILL);
        self.wait().await
    }

    /// Freezes it.
    pub fn sigstop(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on after [`sigstop`](Self::sigstop).
    pub fn sigcont(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // Gone already is what the sender wanted, or finds out from the exit status.
            kill_process(pid, signal).ok();
        }
    }

    fn read(&self, name: &str) -> String {
        let content = fs::read(self.output.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&content).into_owned()
    }
}

impl Drop for RunningAgent {
    #[expect(clippy::print_stderr, reason = "what the agent said belongs to a failing test")]
    fn drop(&mut self) {
        if thread::panicking() {
            let said = format!("{}{}", self.stdout(), self.stderr());
            let lines: Vec<&str> = said.lines().collect();
            let from = lines.len().saturating_sub(40);
            eprintln!("--- the agent\n{}", lines[from..].join("\n"));
        }
    }
}
