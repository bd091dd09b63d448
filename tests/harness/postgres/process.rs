//! The server's processes: start, stop, crash, freeze.

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{PgServer, STOP_LIMIT, StartError};
use crate::program;
use crate::{POLL, eventually};

/// Longest wait for a server to accept connections; a restored one replays WAL before it does.
const START_LIMIT: Duration = Duration::from_mins(2);
/// Time for an immediate shutdown when the test is over. The postmaster itself kills children
/// that take longer than 5 s (`SIGKILL_CHILDREN_AFTER_SECS` in `postmaster.c`).
const END_LIMIT: Duration = Duration::from_secs(6);
/// The line of `postmaster.pid` that says whether connections are accepted
/// (`LOCK_FILE_LINE_PM_STATUS` in `src/include/utils/pidfile.h`), counted from 1.
const STATUS_LINE: usize = 8;

/// How a server is asked to stop; see `pg_ctl stop --mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Waits for clients to disconnect.
    Smart,
    /// Disconnects clients and writes a checkpoint.
    Fast,
    /// Stops at once; the next start recovers from WAL.
    Immediate,
}

impl PgServer {
    /// Starts a stopped or crashed server, and waits until it accepts connections. Panics with
    /// the server's log when it does not.
    pub async fn start(&mut self) {
        if let Err(error) = self.try_start().await {
            panic!("{error}");
        }
    }

    /// Like [`start`](Self::start), for a server that may refuse to.
    ///
    /// # Errors
    ///
    /// Fails when the server ends, or does not accept connections within two minutes.
    pub async fn try_start(&mut self) -> Result<(), StartError> {
        assert!(self.process.is_none(), "{} is running", self.name);
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let mut settings = vec![
            ("unix_socket_directories", self.socket_directory().display().to_string()),
            ("port", self.port.to_string()),
            ("listen_addresses", if self.tcp { "127.0.0.1" } else { "" }.to_owned()),
            ("fsync", "off".to_owned()),
            ("logging_collector", "off".to_owned()),
            ("log_destination", "stderr".to_owned()),
        ];
        settings.extend(self.settings.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let mut command = program::command("postgres").into_std();
        command.arg("-D").arg(&self.data_directory);
        for (name, value) in settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // A group of its own, so that a Ctrl-C at the test's terminal does not stop the server
        // before the test has.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.process = Some(command.spawn().expect("start postgres"));
        self.accepts_connections().await
    }

    /// Stops the server and waits until it has. Panics when it does not within a minute.
    pub async fn stop(&mut self, mode: Mode) {
        let signal = match mode {
            Mode::Smart => Signal::TERM,
            Mode::Fast => Signal::INT,
            Mode::Immediate => Signal::QUIT,
        };
        self.signal(signal);
        self.wait_for_end().await;
    }

    /// Stops the server and starts it again.
    pub async fn restart(&mut self) {
        self.stop(Mode::Fast).await;
        self.start().await;
    }

    /// Kills every process of the server with SIGKILL, as a crash of the machine would.
    /// [`start`](Self::start) recovers from WAL.
    pub async fn kill9(&mut self) {
        let processes = self.processes();
        for &process in &processes {
            send(process, Signal::KILL);
        }
        self.wait_for_end().await;
        eventually("the killed processes are gone", STOP_LIMIT, async || {
            processes.iter().all(|process| parent_of_living(*process).is_none())
        })
        .await;
    }

    /// Waits until the server has ended by itself, for example because its recovery target
    /// action is shutdown. Panics when it does not within a minute.
    pub async fn wait_for_end(&mut self) {
        let deadline = tokio::time::Instant::now() + STOP_LIMIT;
        while self.is_running() {
            let late = deadline < tokio::time::Instant::now();
            assert!(!late, "{} did not stop within {STOP_LIMIT:?}\n{}", self.name, self.log_tail());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether the postmaster lives.
    pub fn is_running(&mut self) -> bool {
        if let Some(process) = &mut self.process
            && process.try_wait().expect("ask for the postmaster").is_some()
        {
            self.process = None;
        }
        self.process.is_some()
    }

    /// Freezes every process of the server: connections stay open, and nothing answers.
    pub fn sigstop(&self) {
        // The postmaster first, so that it starts no more children.
        self.signal(Signal::STOP);
        for process in self.processes() {
            send(process, Signal::STOP);
        }
    }

    /// Lets a frozen server go on.
    pub fn sigcont(&self) {
        for process in self.processes() {
            send(process, Signal::CONT);
        }
    }

    /// Ends everything, when the test is over.
    pub(super) fn end_now(&mut self) {
        let processes = self.processes();
        let Some(mut postmaster) = self.process.take() else { return };
        // A frozen process gets SIGQUIT only once it goes on.
        for signal in [Signal::QUIT, Signal::CONT] {
            for &process in &processes {
                send(process, signal);
            }
        }
        let deadline = Instant::now() + END_LIMIT;
        while matches!(postmaster.try_wait(), Ok(None)) {
            if deadline < Instant::now() {
                for &process in &processes {
                    send(process, Signal::KILL);
                }
                drop(postmaster.wait());
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "a drop cannot await")]
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits as `pg_ctl start` does: the postmaster writes into its pid file when it is ready.
    /// Connecting instead would fill the log with refusals.
    async fn accepts_connections(&mut self) -> Result<(), StartError> {
        let pid = self.process.as_ref().map_or(0, Child::id).to_string();
        let pid_file = self.data_directory.join("postmaster.pid");
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            if !self.is_running() {
                return Err(StartError { reason: "the server ended", log: self.log_tail() });
            }
            let content = fs::read_to_string(&pid_file).unwrap_or_default();
            let lines: Vec<&str> = content.lines().map(str::trim).collect();
            // "standby" is a standby that takes no connections, because hot_standby is off.
            let status = lines.get(STATUS_LINE - 1);
            if lines.first() == Some(&pid.as_str())
                && status.is_some_and(|status| ["ready", "standby"].contains(status))
            {
                return Ok(());
            }
            if deadline < tokio::time::Instant::now() {
                return Err(StartError { reason: "no connections accepted", log: self.log_tail() });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().unwrap_or_else(|| panic!("{} is stopped", self.name));
        kill_process(pid_of(process), signal).expect("signal the postmaster");
    }

    /// The postmaster and its children. They cannot be signalled as one process group: each
    /// child calls `setsid()`.
    fn processes(&self) -> Vec<Pid> {
        let Some(postmaster) = self.process.as_ref().map(pid_of) else { return Vec::new() };
        let mut processes = vec![postmaster];
        for entry in fs::read_dir("/proc").expect("read /proc").flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            if let Some(pid) = pid
                && parent_of_living(pid) == Some(postmaster)
            {
                processes.push(pid);
            }
        }
        processes
    }
}

/// Signals a process that may be gone: the postmaster's end takes its children along.
fn send(process: Pid, signal: Signal) {
    kill_process(process, signal).ok();
}

fn pid_of(process: &Child) -> Pid {
    Pid::from_child(process)
}

/// The parent of a process that lives; `None` for one that is gone, or dead and not yet reaped.
fn parent_of_living(process: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    // proc(5): pid (command) state parent …; the command may hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok().and_then(Pid::from_raw)?;
    (state != "Z" && state != "X").then_some(parent)
}
