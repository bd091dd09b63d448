//! Why there is no connection or no answer, in words an operator can act on.

use std::error::Error;
use std::io;
use std::time::Duration;

use rustls::CertificateError;
use thiserror::Error;
use tokio_postgres::error::SqlState;

use super::guard::Refusal;
use super::settings::{Node, Settings};

/// Why there is no connection. `node` is the node with its address.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No TCP connection or Unix socket: no such host, refused, no route, no such file.
    #[error("connect to {node}")]
    Unreachable {
        /// The node.
        node: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The limit ran out somewhere between dialling and login.
    #[error("no login at {node} within {}", humantime::format_duration(*limit))]
    TimedOut {
        /// The node.
        node: String,
        /// The limit.
        limit: Duration,
    },
    /// The connection broke, or the other side does not speak the protocol.
    #[error("log in at {node}")]
    Broken {
        /// The node.
        node: String,
        /// What happened.
        source: tokio_postgres::Error,
    },
    /// The server does not offer TLS.
    #[error("{node} does not offer TLS, expected it because tls is \"verify-full\"")]
    TlsNotOffered {
        /// The node.
        node: String,
    },
    /// The server's certificate is signed by nobody we trust.
    #[error(
        "the certificate of {node} is signed by an unknown CA, \
         expected one from ca_file or the system's roots"
    )]
    UnknownCa {
        /// The node.
        node: String,
    },
    /// The server's certificate is for other names.
    #[error("the certificate of {node} does not name the host, expected {expected}")]
    WrongName {
        /// The node.
        node: String,
        /// The host name or address that must be in the certificate.
        expected: String,
        /// Which names are in it.
        source: rustls::Error,
    },
    /// TLS failed in another way: an expired certificate, no common version, and so on.
    #[error("TLS with {node}")]
    Tls {
        /// The node.
        node: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The server asks for a password and none is set.
    #[error("{node} asks for a password of role {user}, and no password_file is set")]
    PasswordMissing {
        /// The node.
        node: String,
        /// The role.
        user: String,
    },
    /// Somebody asks for the password in a way that gives it away, and has not proved to be the server.
    #[error(
        "{node} asks for the password of role {user} {how}, and without TLS it is not given: set \
         password_encryption and pg_hba.conf (auth_type of PgBouncer) to scram-sha-256, or use TLS"
    )]
    WeakAuth {
        /// The node.
        node: String,
        /// The role.
        user: String,
        /// `in clear text`, or `as an MD5 hash`.
        how: &'static str,
    },
    /// The server refuses the password, or the role does not exist (it does not say which).
    #[error("{node} refuses the password of role {user}")]
    WrongPassword {
        /// The node.
        node: String,
        /// The role.
        user: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
    /// The server refuses the role: no line in `pg_hba.conf`, or it may not log in.
    #[error("{node} does not let role {user} log in")]
    NotAllowed {
        /// The node.
        node: String,
        /// The role.
        user: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
    /// There is no such database.
    #[error("{node} has no database {database}")]
    NoDatabase {
        /// The node.
        node: String,
        /// The database.
        database: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
    /// The server is there but takes no connection now: it starts, stops, or is full.
    #[error("{node} takes no connections now")]
    NotNow {
        /// The node.
        node: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
    /// The server is of a version that lacks what the agents need.
    #[error("PostgreSQL {needed} or later is needed, and {node} runs {version}")]
    TooOld {
        /// The node.
        node: String,
        /// The version that it runs, such as `13.14`.
        version: String,
        /// The first major version that will do.
        needed: u32,
    },
    /// The server refuses for another reason.
    #[error("{node} refuses the connection")]
    Refused {
        /// The node.
        node: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
}

impl ConnectError {
    /// Tells why a TLS handshake with `node` failed, from what tokio-rustls returned.
    pub fn of_handshake(source: io::Error, node: &Node) -> Self {
        let name = node.to_string();
        let from_rustls = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match from_rustls {
            Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                Self::UnknownCa { node: name }
            }
            Some(
                error @ rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                ),
            ) => {
                let (expected, source) = (node.host.clone(), error.clone());
                Self::WrongName { node: name, expected, source }
            }
            _ => Self::Tls { node: name, source },
        }
    }

    /// Tells whether the same connection may succeed if tried again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Broken { .. }
            | Self::NotNow { .. } => true,
            Self::TlsNotOffered { .. }
            | Self::UnknownCa { .. }
            | Self::WrongName { .. }
            | Self::Tls { .. }
            | Self::PasswordMissing { .. }
            | Self::WeakAuth { .. }
            | Self::WrongPassword { .. }
            | Self::NotAllowed { .. }
            | Self::NoDatabase { .. }
            | Self::TooOld { .. }
            | Self::Refused { .. } => false,
        }
    }
}

/// Why a query gave no answer.
#[derive(Debug, Error)]
pub enum QueryError {
    /// The server refused it, or the connection broke.
    #[error("query {node}")]
    Failed {
        /// The node.
        node: String,
        /// What happened.
        source: tokio_postgres::Error,
    },
    /// The server neither answered nor kept its `statement_timeout`. The connection is closed.
    #[error("no answer from {node} within {}", humantime::format_duration(*limit))]
    TimedOut {
        /// The node.
        node: String,
        /// The limit.
        limit: Duration,
    },
}

impl QueryError {
    /// Tells whether the same query may succeed if tried again soon, on a new connection.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            // Without a message from the server it is the connection that failed.
            Self::Failed { source, .. } => source.code().is_none_or(passes_by_itself),
        }
    }
}

/// Tells whether the server's reason may be gone soon.
fn passes_by_itself(code: &SqlState) -> bool {
    match code.code().get(..2) {
        // Connection trouble, a conflict with other transactions, too few resources, a shutdown
        // or a timeout.
        Some("08" | "40" | "53" | "57") => true,
        _ => matches!(*code, SqlState::OBJECT_IN_USE | SqlState::LOCK_NOT_AVAILABLE),
    }
}

/// Finds out what an operator must change.
pub(super) fn why(error: tokio_postgres::Error, settings: &Settings, node: &Node) -> ConnectError {
    let user = settings.user.clone();
    let name = node.to_string();
    if let Some(code) = error.code().cloned() {
        let source = error;
        return match code {
            SqlState::INVALID_PASSWORD => ConnectError::WrongPassword { node: name, user, source },
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                ConnectError::NotAllowed { node: name, user, source }
            }
            SqlState::INVALID_CATALOG_NAME => {
                let database = settings.database.clone();
                ConnectError::NoDatabase { node: name, database, source }
            }
            SqlState::CANNOT_CONNECT_NOW
            | SqlState::ADMIN_SHUTDOWN
            | SqlState::CRASH_SHUTDOWN
            | SqlState::TOO_MANY_CONNECTIONS => ConnectError::NotNow { node: name, source },
            _ => ConnectError::Refused { node: name, source },
        };
    }
    if let Some(Refusal::Password(how)) = refusal(&error) {
        return ConnectError::WeakAuth { node: name, user, how };
    }
    // The client tells its kinds of error apart by their text alone.
    let kind = error.to_string();
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    match kind.as_str() {
        "invalid configuration" if cause.contains("password missing") => {
            ConnectError::PasswordMissing { node: name, user }
        }
        "error performing TLS handshake" if cause == "server does not support TLS" => {
            ConnectError::TlsNotOffered { node: name }
        }
        "error performing TLS handshake" => match into_io_error(error) {
            Ok(source) => ConnectError::of_handshake(source, node),
            Err(source) => ConnectError::Broken { node: name, source },
        },
        "error connecting to server" => match into_io_error(error) {
            Ok(source) => ConnectError::Unreachable { node: name, source },
            Err(source) => ConnectError::Broken { node: name, source },
        },
        _ => ConnectError::Broken { node: name, source: error },
    }
}

/// Why the guard reads no further, if that is what happened.
fn refusal(error: &tokio_postgres::Error) -> Option<&Refusal> {
    error.source()?.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}

/// Takes the `io::Error` out of the client's wrapper, if that is what it wraps.
fn into_io_error(error: tokio_postgres::Error) -> Result<io::Error, tokio_postgres::Error> {
    let wraps = error.source().is_some_and(<dyn Error>::is::<io::Error>);
    if !wraps {
        return Err(error);
    }
    let source = error.into_source();
    match source.map(<dyn Error + Send + Sync>::downcast::<io::Error>) {
        Some(Ok(source)) => Ok(*source),
        Some(Err(other)) => Ok(io::Error::other(other)),
        None => Ok(io::ErrorKind::Other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_passes_by_itself_is_transient() {
        for (code, expected) in [
            ("08006", true),
            ("40001", true),
            ("53300", true),
            ("57014", true),
            ("55P03", true),
            ("55000", false),
            ("42501", false),
            ("42703", false),
        ] {
            assert_eq!(passes_by_itself(&SqlState::from_code(code)), expected, "{code}");
        }
    }
}
