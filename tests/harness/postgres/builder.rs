//! How a server is made: `initdb`, settings, authentication, certificates.

use std::fmt::{self, Display, Formatter, Write as _};
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{PgServer, SUPERUSER};
use crate::daemon::server_port;
use crate::program::{self, as_server_user, run};

/// The certificate authority's file in the data directory, where standbys and backups get it too.
pub(super) const CA_FILE: &str = "ca.crt";

/// What every new server has in `postgresql.conf`: small, with room for standbys and backups.
const SETTINGS: &str = "\
max_connections = 60
shared_buffers = 32MB
max_wal_senders = 12
max_replication_slots = 12
wal_level = replica
hot_standby = on
log_line_prefix = '%m [%p] %b %q%a '
log_replication_commands = on
";

/// Makes servers; see [`PgServer::builder`].
#[derive(Clone, Debug)]
pub struct PgServerBuilder {
    name: String,
    initdb: Vec<String>,
    settings: Vec<(String, String)>,
    hba: String,
    password: Option<String>,
    tcp: bool,
    tls: bool,
}

/// A server that did not come up.
#[derive(Clone, Debug)]
pub struct StartError {
    /// What happened.
    pub reason: &'static str,
    /// The end of the server's log.
    pub log: String,
}

impl Display for StartError {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.reason, self.log)
    }
}

impl Default for PgServerBuilder {
    /// Data checksums, 16 MiB segments, locale C.UTF-8, trust, Unix socket only.
    fn default() -> Self {
        Self {
            name: "primary".to_owned(),
            initdb: vec!["--data-checksums".to_owned()],
            settings: Vec::new(),
            hba: String::new(),
            password: None,
            tcp: false,
            tls: false,
        }
    }
}

impl PgServerBuilder {
    /// The server's name in messages.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// A setting. For a new server it goes into `postgresql.conf`; for
    /// [`start_existing`](Self::start_existing) onto the command line, where it beats the files.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An option of `initdb`.
    pub fn initdb_option(mut self, option: &str) -> Self {
        self.initdb.push(option.to_owned());
        self
    }

    /// The size of WAL segments in MiB, a power of two from 1 to 1024.
    pub fn wal_segment_mib(self, mib: u32) -> Self {
        self.initdb_option(&format!("--wal-segsize={mib}"))
    }

    /// Without data checksums.
    pub fn without_checksums(mut self) -> Self {
        self.initdb.retain(|option| option != "--data-checksums");
        self
    }

    /// Everybody, the superuser included, needs a password, by SCRAM. This is the superuser's.
    pub fn password(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self
    }

    /// A line before all others in `pg_hba.conf`.
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push_str(line);
        self.hba.push('\n');
        self
    }

    /// Listens on a free port of 127.0.0.1 too.
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// Listens on TCP and offers TLS, with a certificate for `localhost` and 127.0.0.1 from a
    /// new authority; see [`PgServer::ca_file`].
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self.tcp()
    }

    /// Creates a cluster and starts it.
    pub async fn primary(self) -> PgServer {
        let directory = program::directory();
        let data_directory = directory.path().join("data");
        let mut initdb = program::command("initdb");
        initdb
            .args(["--no-sync", "--no-instructions", "--locale=C.UTF-8", "--encoding=UTF8"])
            .arg(format!("--username={SUPERUSER}"))
            .args(&self.initdb)
            .arg("--pgdata")
            .arg(&data_directory);
        if let Some(password) = &self.password {
            let file = directory.path().join("password");
            fs::write(&file, password).unwrap();
            program::give_to_server_user(&file);
            initdb.arg("--auth=scram-sha-256").arg("--pwfile").arg(&file);
        } else {
            initdb.arg("--auth=trust");
        }
        run(&mut initdb).await;
        self.write_settings(&data_directory);
        if self.tls {
            make_certificates(&data_directory).await;
        }
        // On its command line fsync is off, which would win over the file.
        let settings = self.settings.into_iter().filter(|(name, _)| name == "fsync").collect();
        let mut server = PgServer {
            name: self.name,
            directory,
            data_directory,
            port: if self.tcp { server_port() } else { UNIX_PORT },
            tcp: self.tcp,
            password: self.password,
            settings,
            process: None,
        };
        server.start().await;
        server
    }

    /// Starts a server on a data directory that is there already, and waits until it accepts
    /// connections. Panics with the server's log when it does not.
    pub async fn start_existing(self, data_directory: &Path) -> PgServer {
        self.try_start_existing(data_directory).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Like [`start_existing`](Self::start_existing), for a server that may refuse to start or
    /// end by itself.
    ///
    /// # Errors
    ///
    /// Fails when the server ends before it accepts connections, or takes longer than two
    /// minutes.
    pub async fn try_start_existing(self, data_directory: &Path) -> Result<PgServer, StartError> {
        let mut server = self.existing(data_directory);
        server.try_start().await?;
        Ok(server)
    }

    /// A server on a data directory that is there already, not yet started: for one that ends by
    /// itself, whose log the test wants to see.
    pub fn existing(self, data_directory: &Path) -> PgServer {
        PgServer {
            name: self.name,
            directory: program::directory(),
            data_directory: data_directory.to_owned(),
            port: if self.tcp { server_port() } else { UNIX_PORT },
            tcp: self.tcp,
            password: self.password,
            settings: self.settings,
            process: None,
        }
    }

    fn write_settings(&self, data_directory: &Path) {
        let mut text = SETTINGS.to_owned();
        if self.tls {
            text.push_str("ssl = on\nssl_ca_file = 'ca.crt'\n");
        }
        for (name, value) in &self.settings {
            writeln!(text, "{name} = '{}'", value.replace('\'', "''")).unwrap();
        }
        let path = data_directory.join("postgresql.conf");
        let mut file = File::options().append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();

        let hba = data_directory.join("pg_hba.conf");
        let lines = fs::read_to_string(&hba).unwrap();
        fs::write(&hba, format!("{}{lines}", self.hba)).unwrap();
    }
}

/// The port of a server without TCP: only part of its socket's name.
const UNIX_PORT: u16 = 5432;

/// Makes an authority, and a certificate for `localhost` and 127.0.0.1, valid for two days.
async fn make_certificates(data_directory: &Path) {
    let path = |name: &str| -> PathBuf { data_directory.join(name) };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    run(as_server_user("openssl")
        .args(["req", "-x509", "-days", "2", "-subj", "/CN=pgmesh tests"])
        .args(key)
        .arg("-keyout")
        .arg(path("ca.key"))
        .arg("-out")
        .arg(path(CA_FILE)))
    .await;
    run(as_server_user("openssl")
        .args(["req", "-x509", "-days", "2", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(key)
        .arg("-CA")
        .arg(path(CA_FILE))
        .arg("-CAkey")
        .arg(path("ca.key"))
        .arg("-keyout")
        .arg(path("server.key"))
        .arg("-out")
        .arg(path("server.crt")))
    .await;
    fs::set_permissions(path("server.key"), Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(path("ca.key")).unwrap();
}
