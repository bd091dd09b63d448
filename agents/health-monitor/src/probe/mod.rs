//! One bounded question to each component.
//!
//! A probe keeps what it needs from one question to the next (a connection, a client) and drops it when
//! it is of no more use. It is asked by one task, one question at a time, and dropped in the middle of
//! a question that takes too long: nothing it does may need to be finished.

pub mod agent;
pub mod disk;
pub mod etcd;
pub mod haproxy;
pub mod http;
pub mod patroni;
pub mod pgbouncer;
pub mod postgres;
pub mod redis;
pub mod swarm;

use std::fmt;
use std::path::Path;

use shared::secret::{Secret, SecretError};
use shared::tls::TlsError;
use thiserror::Error;

use crate::facts::Failure;

/// Why a probe cannot be made from its configuration. `key` is what it is about.
#[derive(Debug, Error)]
pub enum SetupError {
    /// A password could not be read.
    #[error("{key}")]
    Secret {
        /// The key.
        key: String,
        /// What was wrong.
        source: SecretError,
    },
    /// There is nobody to trust.
    #[error("{key}")]
    Certificates {
        /// The key.
        key: String,
        /// What was wrong.
        source: TlsError,
    },
    /// An address is none.
    #[error("{key}: {problem}")]
    Address {
        /// The key.
        key: String,
        /// What was wrong.
        problem: String,
    },
    /// There is no HTTP client.
    #[error("set up an HTTP client")]
    Client(#[source] reqwest::Error),
}

impl SetupError {
    /// Reads a password, if there is a file with one.
    fn secret(file: Option<&Path>, key: impl Fn() -> String) -> Result<Option<Secret>, Self> {
        let read = file.map(Secret::read).transpose();
        read.map_err(|source| Self::Secret { key: key(), source })
    }
}

/// An error without the number that the operating system has for it: that is of no use to who reads it.
pub(crate) fn bare(error: impl fmt::Display) -> String {
    error.to_string().split(" (os error ").next().unwrap_or_default().to_owned()
}

/// Asks one component.
pub trait Probe: Send {
    /// What it finds out.
    type Facts: Send;

    /// Asks once. The caller limits how long it takes; after a question that was given up, the
    /// next one must begin with a new connection.
    fn ask(&mut self) -> impl Future<Output = Result<Self::Facts, Failure>> + Send;

    /// Resolves when there is something to ask at once: a connection that is kept ended, or a new one was
    /// refused.
    fn lost(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}
