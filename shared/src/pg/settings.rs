//! How to reach the servers: the `[postgres]` table, the nodes, and what they become.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use serde::Deserialize;
use thiserror::Error;

use crate::config::Problems;
use crate::secret::{Secret, SecretError};
use crate::tls::{self, TlsError};

/// Limit on dialling, TLS and login together, unless set otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The server's limit on a statement, unless set otherwise.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// The server's limit on waiting for a lock, unless set otherwise.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The `[postgres]` table of an agent's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// The role to log in as.
    pub user: String,
    /// The file with the role's password; `None` where the server asks for none.
    pub password_file: Option<PathBuf>,
    /// The database to connect to.
    #[serde(default = "default_database")]
    pub database: String,
    /// Whether the connection is encrypted. Over a Unix socket it never is.
    #[serde(default)]
    pub tls: TlsMode,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether a server may ask for the password in clear text or as an MD5 hash without TLS too: whoever
    /// answers at its address has it then.
    #[serde(default)]
    pub allow_weak_auth: bool,
}

/// Values of the key `tls`, in libpq's words. What lies between them protects against nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// No encryption.
    Disable,
    /// Encrypted; the server's certificate must be trusted and name the host.
    #[default]
    VerifyFull,
}

fn default_database() -> String {
    "postgres".to_owned()
}

/// Why a `[postgres]` table gives no [`Settings`].
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The password could not be read.
    #[error("postgres.password_file")]
    Password(#[from] SecretError),
    /// The certificates could not be read.
    #[error("postgres.ca_file")]
    Certificates(#[from] TlsError),
}

impl PostgresConfig {
    /// Adds what is wrong with this table to `problems`, with keys relative to it.
    pub fn check(&self, problems: &mut Problems) {
        for (key, value) in [("user", &self.user), ("database", &self.database)] {
            if value.is_empty() {
                problems.add(key, "must not be empty");
            }
        }
        if self.ca_file.is_some() && self.tls == TlsMode::Disable {
            problems.add("ca_file", "has no use with tls = \"disable\"");
        }
        if self.allow_weak_auth && self.tls != TlsMode::Disable {
            problems.add("allow_weak_auth", "has no use without tls = \"disable\"");
        }
    }

    /// Reads the password and the certificates. `application_name` is what
    /// `pg_stat_activity` will show, such as `pgmesh/backup-agent`.
    ///
    /// # Errors
    ///
    /// Fails when one of the files cannot be used.
    pub fn settings(&self, application_name: &str) -> Result<Settings, SettingsError> {
        let tls = match self.tls {
            TlsMode::Disable => Tls::Disable,
            TlsMode::VerifyFull => Tls::VerifyFull(tls::client_config(self.ca_file.as_deref())?),
        };
        Ok(Settings {
            user: self.user.clone(),
            password: self.password_file.as_deref().map(Secret::read).transpose()?,
            database: self.database.clone(),
            tls,
            allow_weak_auth: self.allow_weak_auth,
            application_name: application_name.to_owned(),
            connect_timeout: CONNECT_TIMEOUT,
            statement_timeout: STATEMENT_TIMEOUT,
            lock_timeout: LOCK_TIMEOUT,
            idle_session_timeout: Duration::ZERO,
        })
    }
}

/// How to log in, the same for every node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The role.
    pub user: String,
    /// Its password, if it has one.
    pub password: Option<Secret>,
    /// The database.
    pub database: String,
    /// Encryption of TCP connections.
    pub tls: Tls,
    /// Whether a server may ask for the password in clear text or as an MD5 hash over TCP without TLS too.
    pub allow_weak_auth: bool,
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// Limit on dialling, TLS and login together.
    pub connect_timeout: Duration,
    /// The server's limit on one statement. Ours is 5 s longer.
    pub statement_timeout: Duration,
    /// The server's limit on waiting for a lock.
    pub lock_timeout: Duration,
    /// How long the server keeps a session that asks for nothing; zero is for ever.
    pub idle_session_timeout: Duration,
}

impl Settings {
    /// Whether the password may be sent in clear text or as an MD5 hash, where `node` asks for that: nobody
    /// else can be at its address, or it was allowed.
    pub fn may_give_away(&self, node: &Node) -> bool {
        let is_proved = matches!(self.tls, Tls::VerifyFull(_));
        is_proved || node.is_local() || self.allow_weak_auth
    }
}

/// Encryption of TCP connections.
#[derive(Clone, Debug)]
pub enum Tls {
    /// None.
    Disable,
    /// The server's certificate must be trusted and name the host.
    VerifyFull(Arc<ClientConfig>),
}

/// One PostgreSQL server, as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The group it belongs to: a coordinator or a worker with its standbys.
    #[serde(default)]
    pub group: u32,
    /// Its name in logs and metrics.
    pub name: String,
    /// A host name, an address, or the directory of a Unix socket (which begins with `/`).
    pub host: String,
    /// The TCP port, which is also part of a Unix socket's name.
    #[serde(default = "default_port")]
    pub port: u16,
}

fn default_port() -> u16 {
    5432
}

impl Node {
    /// Tells whether the node is reached through a Unix socket.
    pub fn is_local(&self) -> bool {
        self.host.starts_with('/')
    }
}

/// `postgres-1 (10.0.0.7:5432)`, or `postgres-1 (/run/postgresql/.s.PGSQL.5432)`.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, host, port, group: _ } = self;
        if self.is_local() {
            write!(f, "{name} ({host}/.s.PGSQL.{port})")
        } else if host.contains(':') {
            write!(f, "{name} ([{host}]:{port})")
        } else {
            write!(f, "{name} ({host}:{port})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::chain;

    #[test]
    fn a_node_prints_its_name_and_address() {
        for (host, expected) in [
            ("db.example", "postgres-1 (db.example:5432)"),
            ("::1", "postgres-1 ([::1]:5432)"),
            ("/run/postgresql", "postgres-1 (/run/postgresql/.s.PGSQL.5432)"),
        ] {
            let node: Node =
                toml::from_str(&format!("name = \"postgres-1\"\nhost = \"{host}\"\n")).unwrap();
            assert_eq!(node.to_string(), expected);
        }
    }

    #[test]
    fn a_table_becomes_settings() {
        let directory = tempfile::tempdir().unwrap();
        let password_file = directory.path().join("password");
        std::fs::write(&password_file, "hunter2\n").unwrap();
        let text =
            format!("user = \"agent\"\npassword_file = {password_file:?}\ntls = \"disable\"\n");
        let config: PostgresConfig = toml::from_str(&text).unwrap();
        let settings = config.settings("pgmesh/test").unwrap();
        assert_eq!(settings.password.as_ref().unwrap().expose(), "hunter2");
        assert_eq!(settings.database, "postgres");
        assert!(!format!("{settings:?}").contains("hunter2"));

        std::fs::remove_file(&password_file).unwrap();
        let error = config.settings("pgmesh/test").unwrap_err();
        let expected = format!(
            "postgres.password_file: read secret file {}: No such file or directory (os error 2)",
            password_file.display()
        );
        assert_eq!(chain(&error).to_string(), expected);
    }

    #[test]
    fn a_table_is_checked() {
        let text = "user = \"\"\ndatabase = \"\"\ntls = \"disable\"\nca_file = \"/ca.crt\"\n";
        let config: PostgresConfig = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        problems.within("postgres", |problems| config.check(problems));
        let found: Vec<_> =
            problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect();
        assert_eq!(
            found,
            [
                "postgres.user: must not be empty",
                "postgres.database: must not be empty",
                "postgres.ca_file: has no use with tls = \"disable\"",
            ]
        );
        let text = "user = \"a\"\nallow_weak_auth = true\n";
        let config: PostgresConfig = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        config.check(&mut problems);
        assert_eq!(problems.found()[0].problem, "has no use without tls = \"disable\"");
        let error = toml::from_str::<PostgresConfig>("user = \"a\"\ntls = \"require\"\n");
        assert_eq!(
            error.unwrap_err().message(),
            "unknown variant `require`, expected `disable` or `verify-full`"
        );
    }
}
