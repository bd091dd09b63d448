//! What most tests begin with: a primary that archives into a repository, and an agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::program::give_to_server_user;
use harness::{Agent, Finished, PgServer, S3Server, directory, eventually};
use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for a segment to be archived.
pub(crate) const ARCHIVE_LIMIT: Duration = Duration::from_mins(1);

/// A primary, its repository and its agent.
#[derive(Debug)]
pub(crate) struct Scene {
    /// The server.
    pub(crate) primary: PgServer,
    /// The S3 server, if the repository is one.
    pub(crate) s3: Option<S3Server>,
    directory: TempDir,
    /// The `[repository.…]` section.
    repository: String,
    /// More of the configuration.
    extra: String,
}

/// Where a scene's repository is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// An S3 server in this process.
    S3,
}

impl Scene {
    /// A primary with a repository in a directory.
    pub(crate) async fn new() -> Self {
        Self::with(Kind::Directory, "").await
    }

    /// A primary with such a repository; `extra` is added to the agent's configuration.
    pub(crate) async fn with(kind: Kind, extra: &str) -> Self {
        let directory = directory();
        let (s3, repository) = store(kind, directory.path()).await;
        Self::start(directory, s3, repository, extra).await
    }

    /// A primary that does not archive: its WAL is received, or not stored at all.
    pub(crate) async fn streaming(kind: Kind, extra: &str) -> Self {
        let directory = directory();
        let (s3, repository) = store(kind, directory.path()).await;
        Self::start_streaming(directory, s3, repository, extra).await
    }

    /// The same with that `[repository.…]` section, made in `directory`.
    pub(crate) async fn start_streaming(
        directory: TempDir,
        s3: Option<S3Server>,
        repository: String,
        extra: &str,
    ) -> Self {
        let key = directory.path().join("key");
        Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
        let primary = PgServer::primary().await;
        let scene = Self { primary, s3, directory, repository, extra: extra.to_owned() };
        scene.configure(&[&scene.primary]);
        scene
    }

    /// A primary with that `[repository.…]` section, made in `directory`.
    pub(crate) async fn start(
        directory: TempDir,
        s3: Option<S3Server>,
        repository: String,
        extra: &str,
    ) -> Self {
        let config = directory.path().join("agent.toml");
        let key = directory.path().join("key");
        Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
        // PostgreSQL archives from its start on, before we know where it answers.
        write(&config, &config_text(&key, &repository, extra, &[]));
        let push = format!("{} wal-push %p", Agent::new(&config).shell_command());
        let primary = PgServer::builder()
            .setting("archive_mode", "on")
            .setting("archive_command", &push)
            .primary()
            .await;
        let scene = Self { primary, s3, directory, repository, extra: extra.to_owned() };
        scene.configure(&[&scene.primary]);
        scene
    }

    /// Writes the configuration with these servers as its nodes.
    pub(crate) fn configure(&self, nodes: &[&PgServer]) {
        let nodes: Vec<_> = nodes
            .iter()
            .map(|server| (server.name(), server.socket_directory().to_owned(), server.port()))
            .map(|(name, host, port)| (name.to_owned(), host.display().to_string(), port))
            .collect();
        write(&self.config(), &config_text(&self.key(), &self.repository, &self.extra, &nodes));
    }

    /// Writes the configuration with one node behind that address.
    pub(crate) fn configure_address(&self, host: &str, port: u16) {
        let nodes = [("behind-proxy".to_owned(), host.to_owned(), port)];
        write(&self.config(), &config_text(&self.key(), &self.repository, &self.extra, &nodes));
    }

    /// The agent's configuration file.
    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("agent.toml")
    }

    /// The key file.
    pub(crate) fn key(&self) -> PathBuf {
        self.directory.path().join("key")
    }

    /// A path in the scene's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directory that is the repository, or that holds the S3 server's bucket.
    pub(crate) fn repository(&self) -> PathBuf {
        match &self.s3 {
            Some(s3) => s3.bucket().directory().to_owned(),
            None => self.directory.path().join("repository"),
        }
    }

    /// The agent.
    pub(crate) fn agent(&self) -> Agent {
        Agent::new(&self.config())
    }

    /// Runs the agent.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Finished {
        self.agent().run(arguments).await
    }

    /// Takes a backup and returns what `--json` says of it.
    pub(crate) async fn backup(&self) -> Value {
        let finished = self.run(&["backup", "--json"]).await;
        finished.assert_success();
        let mut backups: Vec<Value> = serde_json::from_str(&finished.stdout).unwrap();
        backups.pop().unwrap()
    }

    /// The backups that `list --json` shows.
    pub(crate) async fn list(&self) -> Vec<Value> {
        let finished = self.run(&["list", "--json"]).await;
        finished.assert_success();
        serde_json::from_str(&finished.stdout).unwrap()
    }

    /// Restores into a new directory of that name, with `arguments`, and returns the directory.
    pub(crate) async fn restore(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let to = self.path(name);
        let mut all = vec!["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
        all.extend(arguments);
        self.run(&all).await.assert_success();
        to
    }

    /// Ends the current WAL segment and returns its name.
    pub(crate) async fn switch_wal(&self) -> String {
        // Without a record in it there is no segment to end.
        let record = "SELECT pg_logical_emit_message(false, 'test', 'x')";
        self.primary.psql(record).await;
        self.primary.psql("SELECT pg_walfile_name(pg_switch_wal())").await
    }

    /// Ends the current WAL segment and waits until it is in the repository.
    pub(crate) async fn archive_wal(&self) {
        let name = self.switch_wal().await;
        let prefix = format!("{name}-");
        eventually("the segment is archived", ARCHIVE_LIMIT, async || {
            files(&self.repository()).iter().any(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            })
        })
        .await;
    }
}

/// A repository of that kind in `directory`: the S3 server, if it is one, and its section.
async fn store(kind: Kind, directory: &Path) -> (Option<S3Server>, String) {
    match kind {
        Kind::Directory => (None, directory_repository(directory)),
        Kind::S3 => {
            let s3 = S3Server::start().await;
            // Short limits, so that a test of a server that does not answer is short too.
            let section = s3.endpoint().config(directory);
            let section = format!("{section}attempts = 4\nattempt_timeout = \"3s\"\n");
            (Some(s3), section)
        }
    }
}

/// The `[repository.directory]` section of a repository below `directory`.
pub(crate) fn directory_repository(directory: &Path) -> String {
    let path = directory.join("repository");
    fs::create_dir_all(&path).unwrap();
    give_to_server_user(&path);
    format!("[repository.directory]\npath = \"{}\"\n", path.display())
}

/// An agent's configuration.
pub(crate) fn config_text(
    key: &Path,
    repository: &str,
    extra: &str,
    nodes: &[(String, String, u16)],
) -> String {
    let node = |(name, host, port): &(String, String, u16)| {
        format!("[[nodes]]\nname = \"{name}\"\nhost = \"{host}\"\nport = {port}\n")
    };
    let nodes = nodes.iter().map(node).collect::<Vec<_>>().concat();
    let key = key.display();
    format!(
        "cluster = \"tests\"\nadmin_address = \"127.0.0.1:0\"\n\
         [postgres]\nuser = \"postgres\"\ntls = \"disable\"\n\
         {nodes}{repository}\
         [encryption]\nwrite_key = \"k1\"\n[[encryption.keys]]\nid = \"k1\"\nfile = \"{key}\"\n\
         {extra}"
    )
}

pub(crate) fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    give_to_server_user(path);
}

/// Every file below a directory.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}
