//! PostgreSQL servers: a primary, its standbys, a restored directory.

mod builder;
mod installation;
mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Config, NoTls};

pub use builder::{PgServerBuilder, StartError};
pub use installation::{Installation, find_installation, installation, postgres_is_missing};
pub use process::Mode;

use crate::daemon::server_port;
use crate::program::{self, Finished};
use crate::{eventually, run};

/// The superuser of every server.
pub const SUPERUSER: &str = "postgres";

/// Longest wait for a server to stop: a fast shutdown writes a checkpoint and, on a primary,
/// waits for its standbys.
const STOP_LIMIT: Duration = Duration::from_mins(1);
/// Longest wait for a promotion, which ends with a new timeline but not a checkpoint.
const PROMOTE_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a standby to replay what its primary has written.
const REPLAY_LIMIT: Duration = Duration::from_mins(1);

/// A running PostgreSQL server, in its own directory. Dropping it stops it at once and removes
/// its files.
#[derive(Debug)]
pub struct PgServer {
    name: String,
    /// Socket, log, tablespaces, and unless the data directory was given, that too.
    directory: TempDir,
    data_directory: PathBuf,
    port: u16,
    tcp: bool,
    password: Option<String>,
    /// On the command line, so that they beat whatever files the data directory came with.
    settings: Vec<(String, String)>,
    process: Option<Child>,
}

impl PgServer {
    /// Creates a cluster with `initdb` and starts it as a primary that standbys can follow.
    pub async fn primary() -> Self {
        Self::builder().primary().await
    }

    /// A server with other than the usual settings.
    pub fn builder() -> PgServerBuilder {
        PgServerBuilder::default()
    }

    /// Starts a server on a data directory that is there already, such as a restored one, and
    /// waits until it accepts connections. Panics with the server's log when it does not; see
    /// [`PgServerBuilder::try_start_existing`].
    pub async fn start_existing(data_directory: &Path) -> Self {
        Self::builder().start_existing(data_directory).await
    }

    /// Copies this server with `pg_basebackup` and starts the copy as a streaming standby whose
    /// `application_name` is `name`.
    pub async fn standby(&self, name: &str) -> Self {
        self.standby_with(name, &[]).await
    }

    /// Like [`standby`](Self::standby), with settings of its own.
    pub async fn standby_with(&self, name: &str, settings: &[(&str, &str)]) -> Self {
        let directory = program::directory();
        let data_directory = directory.path().join("data");
        let mut copy = self.program("pg_basebackup");
        copy.args(["--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--dbname"])
            .arg(self.conninfo(name))
            .arg("--pgdata")
            .arg(&data_directory);
        for location in
            self.psql("SELECT pg_tablespace_location(oid) FROM pg_tablespace").await.lines()
        {
            let old = Path::new(location);
            if let Some(last) = old.file_name() {
                let new = directory.path().join("tablespaces").join(last);
                copy.arg(format!("--tablespace-mapping={}={}", old.display(), new.display()));
            }
        }
        run(&mut copy).await;
        let mut all = self.settings.clone();
        all.extend(settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        let mut standby = Self {
            name: name.to_owned(),
            directory,
            data_directory,
            port: if self.tcp { server_port() } else { self.port },
            tcp: self.tcp,
            password: self.password.clone(),
            settings: all,
            process: None,
        };
        standby.start().await;
        standby
    }

    /// The name in this harness; a standby's `application_name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The data directory.
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// The directory of the server's Unix socket.
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// The path of the Unix socket itself.
    pub fn socket(&self) -> PathBuf {
        self.socket_directory().join(format!(".s.PGSQL.{}", self.port))
    }

    /// The port: of the socket, and of 127.0.0.1 if the server was built with TCP.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate authority of a server that was built with TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.data_directory.join(builder::CA_FILE)
    }

    /// The superuser's password, if the server was built with one.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// Everything the server has logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// libpq's connection string for the superuser through the Unix socket. It has the password
    /// of a server that was built with one.
    pub fn conninfo(&self, application_name: &str) -> String {
        let socket = self.socket_directory().display();
        let mut conninfo = format!(
            "host={socket} port={} user={SUPERUSER} application_name={application_name}",
            self.port
        );
        if let Some(password) = &self.password {
            conninfo.push_str(" password=");
            conninfo.push_str(password);
        }
        conninfo
    }

    /// Connects as the superuser to the database `postgres`.
    pub async fn connect(&self) -> Client {
        self.connect_as(SUPERUSER, "postgres").await
    }

    /// Connects with the superuser's password, if there is one, as another user or to another
    /// database.
    pub async fn connect_as(&self, user: &str, database: &str) -> Client {
        let connected = self.try_connect_as(user, database).await;
        connected.unwrap_or_else(|error| {
            panic!("connect to {}: {error:?}\n{}", self.name, self.log_tail())
        })
    }

    /// Like [`connect_as`](Self::connect_as).
    ///
    /// # Errors
    ///
    /// Fails when the server does.
    pub async fn try_connect_as(
        &self,
        user: &str,
        database: &str,
    ) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config
            .host_path(self.socket_directory())
            .port(self.port)
            .user(user)
            .dbname(database)
            .connect_timeout(Duration::from_secs(10));
        if let Some(password) = &self.password {
            config.password(password);
        }
        let (client, connection) = config.connect(NoTls).await?;
        #[expect(clippy::disallowed_methods, reason = "ends when the test drops its client")]
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs SQL with `psql` as the superuser in the database `postgres`, and returns the rows
    /// without decoration: columns separated by `|`, no line end at the end. Panics on an error.
    pub async fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql).await
    }

    /// Like [`psql`](Self::psql), in another database.
    pub async fn psql_in(&self, database: &str, sql: &str) -> String {
        let finished = self.try_psql_in(database, sql).await;
        assert!(finished.is_success(), "psql on {}: {sql}\n{finished}", self.name);
        finished.stdout.trim_end_matches('\n').to_owned()
    }

    /// Like [`psql_in`](Self::psql_in), for SQL that may fail.
    pub async fn try_psql_in(&self, database: &str, sql: &str) -> Finished {
        // A file, because an argument may hold only 128 KiB (`MAX_ARG_STRLEN`).
        let script = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap();
        fs::write(script.path(), sql).unwrap();
        program::give_to_server_user(script.path());
        let mut psql = self.program("psql");
        psql.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet"])
            .args(["--set", "ON_ERROR_STOP=1", "--dbname", database, "--file"])
            .arg(script.path());
        program::finish(&mut psql, program::RUN_LIMIT).await
    }

    /// A command for a program of the installation, such as `pgbench` or `pg_dumpall`, that finds
    /// this server through its environment.
    pub fn program(&self, program: &str) -> Command {
        let mut command = program::command(program);
        command
            .env("PGHOST", self.socket_directory())
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", SUPERUSER)
            .env("PGDATABASE", "postgres");
        if let Some(password) = &self.password {
            command.env("PGPASSWORD", password);
        }
        command
    }

    /// Runs a program of the installation against this server and returns its standard output.
    /// Panics unless it exits with 0.
    pub async fn run(&self, program: &str, arguments: &[&str]) -> String {
        run(self.program(program).args(arguments)).await.stdout
    }

    /// Everything in the cluster as SQL, from `pg_dumpall`: equal dumps mean equal content.
    pub async fn dump(&self) -> String {
        let dump = self.run("pg_dumpall", &["--no-sync"]).await;
        // Each dump has its own random word in `\restrict` and `\unrestrict`.
        let lines = dump
            .lines()
            .filter(|line| !line.starts_with("\\restrict ") && !line.starts_with("\\unrestrict "));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Makes a directory next to the data directory, and a tablespace in it.
    pub async fn tablespace(&self, name: &str) -> PathBuf {
        let parent = self.directory.path().join("tablespaces");
        let location = parent.join(name);
        fs::create_dir_all(&location).unwrap();
        program::give_to_server_user(&parent);
        program::give_to_server_user(&location);
        self.psql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", location.display())).await;
        location
    }

    /// The last LSN the primary has written.
    pub async fn current_lsn(&self) -> PgLsn {
        self.psql("SELECT pg_current_wal_lsn()").await.parse().unwrap()
    }

    /// Waits until this standby has replayed everything `primary` has written so far.
    pub async fn catch_up(&self, primary: &Self) {
        let target = primary.current_lsn().await;
        let client = self.connect().await;
        eventually("the standby catches up", REPLAY_LIMIT, async || {
            let row = client.query_one("SELECT pg_last_wal_replay_lsn()", &[]).await.unwrap();
            row.get::<_, Option<PgLsn>>(0).is_some_and(|replayed| replayed >= target)
        })
        .await;
    }

    /// Makes this standby a primary on a new timeline, and waits until it is.
    pub async fn promote(&self) {
        let limit = PROMOTE_LIMIT.as_secs();
        let promoted = self.psql(&format!("SELECT pg_promote(true, {limit})")).await;
        assert_eq!(promoted, "t", "{} was not promoted within {limit} s", self.name);
    }

    /// Waits until this server, such as one that was restored, has ended its recovery and takes
    /// writes.
    pub async fn recovered(&self) {
        eventually("the recovery ends", REPLAY_LIMIT, async || {
            // Until then it may take no connections: hot_standby is off.
            let asked = self.try_psql_in("postgres", "SELECT pg_is_in_recovery()").await;
            asked.is_success() && asked.stdout.trim() == "f"
        })
        .await;
    }

    /// Points this standby at another primary, by a reload.
    pub async fn follow(&self, primary: &Self) {
        self.set("primary_conninfo", &primary.conninfo(&self.name)).await;
    }

    /// Makes this server, which is down, a standby of `primary` by `pg_rewind`, and starts it.
    pub async fn rejoin(&mut self, primary: &Self) {
        let source = primary.conninfo("pg_rewind");
        let mut rewind = primary.program("pg_rewind");
        rewind.arg("--target-pgdata").arg(&self.data_directory).args(["--source-server", &source]);
        run(&mut rewind).await;
        let write = |name: &str, text: &str| {
            let path = self.data_directory.join(name);
            fs::write(&path, text).unwrap();
            program::give_to_server_user(&path);
        };
        write("standby.signal", "");
        let conninfo = primary.conninfo(&self.name).replace('\'', "''");
        write("postgresql.auto.conf", &format!("primary_conninfo = '{conninfo}'\n"));
        self.start().await;
    }

    /// Changes a setting with `ALTER SYSTEM` and reloads. For a setting that needs it, restart
    /// afterwards.
    pub async fn set(&self, setting: &str, value: &str) {
        let value = value.replace('\'', "''");
        self.psql(&format!("ALTER SYSTEM SET {setting} = '{value}'")).await;
        self.psql("SELECT pg_reload_conf()").await;
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// The end of the log, for a panic's message.
    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(60);
        format!("--- log of {}\n{}", self.name, lines[from..].join("\n"))
    }
}

impl Drop for PgServer {
    #[expect(clippy::print_stderr, reason = "what the server said belongs to a failing test")]
    fn drop(&mut self) {
        self.end_now();
        if thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
    }
}
