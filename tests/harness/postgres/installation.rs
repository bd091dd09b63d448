//! Finds PostgreSQL's programs, and the operating system user that may run them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::geteuid;

use crate::skip::Skip;

/// The major version the project is for.
const MAJOR: u32 = 17;
/// Names a directory with PostgreSQL's programs, of any version; nothing else is then looked at.
const BIN_VARIABLE: &str = "PGMESH_PG_BIN";
/// The operating system user that runs the servers when the tests run as root: `postgres` and
/// `initdb` refuse to.
const SERVER_USER: &str = "postgres";

/// An installation of PostgreSQL.
#[derive(Clone, Debug)]
pub struct Installation {
    bin_directory: PathBuf,
    major: u32,
    user: Option<(u32, u32)>,
}

impl Installation {
    /// The directory of `postgres`, `psql` and the others.
    pub fn bin_directory(&self) -> &Path {
        &self.bin_directory
    }

    /// The major version, such as 17.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// User and group id to run servers as; `None` for the user that runs the tests.
    pub fn user(&self) -> Option<(u32, u32)> {
        self.user
    }

    fn find() -> Result<Self, Skip> {
        let user = server_user()?;
        if let Some(chosen) = env::var_os(BIN_VARIABLE) {
            let bin_directory = PathBuf::from(chosen);
            let Some(major) = major_version(&bin_directory) else {
                return Err(Skip(format!("no PostgreSQL in {}", bin_directory.display())));
            };
            return Ok(Self { bin_directory, major, user });
        }
        let mut found = Vec::new();
        for bin_directory in candidates() {
            match major_version(&bin_directory) {
                Some(MAJOR) => return Ok(Self { bin_directory, major: MAJOR, user }),
                Some(major) => found.push(format!("{major} in {}", bin_directory.display())),
                None => {}
            }
        }
        let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
        Err(Skip(format!("PostgreSQL {MAJOR} is not installed (found: {found})")))
    }
}

/// The installation, or why there is none. It is looked for once.
///
/// Looked at, in this order: the directory in the variable `PGMESH_PG_BIN` (any major version),
/// Debian's directory, `pg_config --bindir`, and `PATH`.
///
/// # Errors
///
/// Fails when there is no PostgreSQL 17, or when the tests run as root and there is no operating
/// system user `postgres`.
pub fn find_installation() -> Result<&'static Installation, Skip> {
    static FOUND: OnceLock<Result<Installation, Skip>> = OnceLock::new();
    FOUND.get_or_init(Installation::find).as_ref().map_err(Clone::clone)
}

/// The installation. Panics with the reason when there is none.
pub fn installation() -> &'static Installation {
    find_installation().unwrap_or_else(|Skip(reason)| panic!("{reason}"))
}

/// Reports the running test as skipped and returns true if there is no PostgreSQL 17:
/// `if postgres_is_missing() { return; }`.
pub fn postgres_is_missing() -> bool {
    find_installation().inspect_err(Skip::report).is_err()
}

fn candidates() -> Vec<PathBuf> {
    let mut directories = vec![PathBuf::from(format!("/usr/lib/postgresql/{MAJOR}/bin"))];
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        directories.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    directories.extend(env::split_paths(&path));
    directories
}

/// The major version of the `postgres` in a directory that also has `initdb`.
fn major_version(bin_directory: &Path) -> Option<u32> {
    if !bin_directory.join("initdb").exists() {
        return None;
    }
    let output = Command::new(bin_directory.join("postgres")).arg("--version").output().ok()?;
    parse_major(&String::from_utf8_lossy(&output.stdout))
}

/// `postgres (PostgreSQL) 17.6 (Debian 17.6-0+deb13u1)` and `… 18beta1` begin with the major
/// version after the closing parenthesis.
fn parse_major(version: &str) -> Option<u32> {
    let number = version.split(") ").nth(1)?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn server_user() -> Result<Option<(u32, u32)>, Skip> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let id = |option| {
        let output = Command::new("id").args([option, SERVER_USER]).output().ok()?;
        String::from_utf8_lossy(&output.stdout).trim().parse().ok()
    };
    match (id("--user"), id("--group")) {
        (Some(user), Some(group)) => Ok(Some((user, group))),
        _ => Err(Skip(format!("tests run as root, and there is no user {SERVER_USER}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_the_first_number_after_the_name() {
        for (version, expected) in [
            ("postgres (PostgreSQL) 17.6 (Debian 17.6-0+deb13u1)\n", Some(17)),
            ("postgres (PostgreSQL) 17.11\n", Some(17)),
            ("postgres (PostgreSQL) 18beta1\n", Some(18)),
            ("something else", None),
            ("", None),
        ] {
            assert_eq!(parse_major(version), expected, "{version:?}");
        }
    }
}
