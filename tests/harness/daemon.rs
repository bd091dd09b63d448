//! A server process in its own process group, with its log in a file.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::eventually;

/// Below the range from which Linux takes the ports of outgoing connections
/// (`net.ipv4.ip_local_port_range`), so that none takes the port of a server that is down for a
/// moment.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// The ports this process gave out, each as a Unix socket that bears its number. Their names live
/// in the abstract namespace, which belongs to the network namespace as ports do, and end with the
/// process.
static TAKEN: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 on which nobody listens, and that no test is given while this process lives:
/// a server that is down, or not yet up, keeps its own.
pub fn server_port() -> u16 {
    loop {
        let random = RandomState::new().build_hasher().finish();
        let offset = u16::try_from(random % u64::from(PORTS.end - PORTS.start)).unwrap();
        let port = PORTS.start + offset;
        let name = SocketAddr::from_abstract_name(format!("pgmesh-tests-{port}")).unwrap();
        let Ok(taken) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(taken);
            return port;
        }
    }
}

/// Waits until somebody listens on that port of 127.0.0.1.
pub(crate) async fn listens(what: &str, port: u16, limit: Duration) {
    let what = format!("{what} listens");
    eventually(&what, limit, async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
}

/// A server. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Daemon {
    log: PathBuf,
    process: Option<Child>,
}

impl Daemon {
    /// A server that is not running, with its log in that file.
    pub(crate) fn new(log: &Path) -> Self {
        Self { log: log.to_owned(), process: None }
    }

    /// Starts it. What it prints is added to the log.
    pub(crate) fn start(&mut self, mut command: Command) {
        assert!(self.process.is_none(), "{} is running", self.log.display());
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // A Ctrl-C at the test's terminal does not stop the server before the test has.
        command.process_group(0).kill_on_drop(true);
        let started = command.spawn();
        self.process = Some(started.unwrap_or_else(|error| panic!("{command:?}: {error}")));
    }

    /// Whether it lives.
    pub(crate) fn is_running(&mut self) -> bool {
        if let Some(process) = &mut self.process
            && process.try_wait().expect("ask for the process").is_some()
        {
            self.process = None;
        }
        self.process.is_some()
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub(crate) async fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().await.expect("kill the process");
        }
    }

    /// Sends a signal. Panics when it does not run.
    pub(crate) fn signal(&self, signal: Signal) {
        let process = self.process.as_ref();
        send(process.unwrap_or_else(|| panic!("{} is not running", self.log.display())), signal);
    }

    /// The end of the log, for a panic's message.
    pub(crate) fn log_tail(&self) -> String {
        let log = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(40);
        format!("--- {}\n{}", self.log.display(), lines[from..].join("\n"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            process.start_kill().ok();
        }
    }
}

fn send(process: &Child, signal: Signal) {
    let pid = process.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    kill_process(pid.expect("the process was not waited for"), signal).expect("send a signal");
}
