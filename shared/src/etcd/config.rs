//! The `[etcd]` table.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Identity, TlsOptions};
use serde::Deserialize;
use thiserror::Error;

use crate::config::{Check, Problems};
use crate::secret::{Secret, SecretError};
use crate::tls::{self, TlsError};

/// The `[etcd]` table of an agent's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// The members' client addresses: `http://etcd-1:2379` or `https://etcd-1:2379`. The first
    /// is asked first; the others when it does not answer.
    pub endpoints: Vec<String>,
    /// The user to log in as, where etcd's authentication is on.
    pub user: Option<String>,
    /// The file with the user's password.
    pub password_file: Option<PathBuf>,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Our own certificate, PEM, where etcd asks for one.
    pub certificate_file: Option<PathBuf>,
    /// Its private key, PEM.
    pub key_file: Option<PathBuf>,
}

/// Why an `[etcd]` table gives no client.
#[derive(Debug, Error)]
pub enum EtcdSetupError {
    /// The password could not be read.
    #[error("etcd.password_file")]
    Password(#[source] SecretError),
    /// The private key could not be read.
    #[error("etcd.key_file")]
    Key(#[source] SecretError),
    /// There is nobody to trust.
    #[error("etcd.ca_file")]
    Authority(#[source] TlsError),
    /// Our own certificate cannot be used.
    #[error("etcd.certificate_file and key_file")]
    Identity(#[source] TlsError),
    /// A certificate could not be read.
    #[error("read certificates from {}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl Check for EtcdConfig {
    fn check(&self, problems: &mut Problems) {
        if self.endpoints.is_empty() {
            problems.add("endpoints", "must list at least one address");
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let key = format!("endpoints[{index}]");
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                problems.add(&key, format!("`{endpoint}` must begin with http:// or https://"));
            } else if self.endpoints.iter().take(index).any(|other| other == endpoint) {
                problems.add(&key, format!("{endpoint} is listed twice"));
            }
        }
        if !self.has_tls() {
            let files = [
                ("ca_file", &self.ca_file),
                ("certificate_file", &self.certificate_file),
                ("key_file", &self.key_file),
            ];
            for (key, _) in files.iter().filter(|(_, file)| file.is_some()) {
                problems.add(key, "has no use without an https:// endpoint");
            }
        } else if self.endpoints.iter().any(|it| it.starts_with("http://")) {
            problems.add("endpoints", "must be all http:// or all https://");
        }
        if self.user.is_some() != self.password_file.is_some() {
            problems.add("user", "and password_file must be set together");
        }
        if self.certificate_file.is_some() != self.key_file.is_some() {
            problems.add("certificate_file", "and key_file must be set together");
        }
    }
}

impl EtcdConfig {
    fn has_tls(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"))
    }

    /// User and password, read from the file.
    pub(super) fn login(&self) -> Result<Option<(String, Secret)>, EtcdSetupError> {
        let (Some(user), Some(file)) = (&self.user, &self.password_file) else { return Ok(None) };
        Ok(Some((user.clone(), Secret::read(file).map_err(EtcdSetupError::Password)?)))
    }

    /// How to encrypt; `None` without TLS. The server's certificate is always verified.
    pub(super) fn tls(&self) -> Result<Option<TlsOptions>, EtcdSetupError> {
        if !self.has_tls() {
            return Ok(None);
        }
        // The client would take a file without certificates, and trust nobody.
        tls::client_config(self.ca_file.as_deref()).map_err(EtcdSetupError::Authority)?;
        let mut tls = match &self.ca_file {
            Some(file) => TlsOptions::new().ca_certificate(Certificate::from_pem(read(file)?)),
            None => TlsOptions::new().with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.certificate_file, &self.key_file) {
            let key = Secret::read(key).map_err(EtcdSetupError::Key)?;
            tls::check_identity(certificate, &key).map_err(EtcdSetupError::Identity)?;
            tls = tls.identity(Identity::from_pem(read(certificate)?, key.expose()));
        }
        Ok(Some(tls))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdSetupError> {
    fs::read(path).map_err(|source| EtcdSetupError::Certificates { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let config: EtcdConfig = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        problems.within("etcd", |problems| config.check(problems));
        problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect()
    }

    #[test]
    fn every_broken_rule_is_shown_with_its_key() {
        assert!(problems("endpoints = [\"http://a:2379\", \"http://b:2379\"]").is_empty());
        let tls = "endpoints = [\"https://a:2379\"]\nca_file = \"/ca\"\nuser = \"u\"\n\
                   password_file = \"/p\"\ncertificate_file = \"/c\"\nkey_file = \"/k\"";
        assert!(problems(tls).is_empty());
        for (text, expected) in [
            ("endpoints = []", "etcd.endpoints: must list at least one address"),
            (
                "endpoints = [\"a:2379\"]",
                "etcd.endpoints[0]: `a:2379` must begin with http:// or https://",
            ),
            (
                "endpoints = [\"http://a\", \"http://a\"]",
                "etcd.endpoints[1]: http://a is listed twice",
            ),
            (
                "endpoints = [\"http://a\", \"https://b\"]",
                "etcd.endpoints: must be all http:// or all https://",
            ),
            (
                "endpoints = [\"http://a\"]\nca_file = \"/ca\"",
                "etcd.ca_file: has no use without an https:// endpoint",
            ),
            (
                "endpoints = [\"http://a\"]\nuser = \"u\"",
                "etcd.user: and password_file must be set together",
            ),
            (
                "endpoints = [\"https://a\"]\nkey_file = \"/k\"",
                "etcd.certificate_file: and key_file must be set together",
            ),
        ] {
            assert_eq!(problems(text), [expected], "{text}");
        }
    }
}
