//! Why etcd did not do what it was asked.

use etcd_client::Error;
use thiserror::Error;

use crate::telemetry::chain;
use crate::tls;

/// Codes of gRPC, as numbers: the crate that names them is not ours to import.
///
/// Source: gRPC's documentation, "Status codes and their use in gRPC".
pub(super) mod code {
    pub(in crate::etcd) const CANCELLED: i32 = 1;
    pub(in crate::etcd) const UNKNOWN: i32 = 2;
    pub(in crate::etcd) const INVALID_ARGUMENT: i32 = 3;
    pub(in crate::etcd) const NOT_FOUND: i32 = 5;
    pub(in crate::etcd) const ALREADY_EXISTS: i32 = 6;
    pub(in crate::etcd) const PERMISSION_DENIED: i32 = 7;
    pub(in crate::etcd) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(in crate::etcd) const FAILED_PRECONDITION: i32 = 9;
    pub(in crate::etcd) const OUT_OF_RANGE: i32 = 11;
    pub(in crate::etcd) const UNIMPLEMENTED: i32 = 12;
    pub(in crate::etcd) const UNAVAILABLE: i32 = 14;
    pub(in crate::etcd) const UNAUTHENTICATED: i32 = 16;
}

/// Why etcd did not do what it was asked.
#[derive(Debug, Error)]
pub enum EtcdError {
    /// No endpoint gave an answer, although each was asked several times. What was asked may
    /// have been done, or be done later.
    #[error("{what}: no etcd endpoint answers: {}", failures.join("; "))]
    Unreachable {
        /// What was asked.
        what: &'static str,
        /// Each endpoint, with what happened there last.
        failures: Vec<String>,
    },
    /// etcd answered that it will not.
    #[error("{what}: etcd at {endpoint} refuses: {reason}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Who was asked.
        endpoint: String,
        /// The gRPC code, if the answer has one.
        code: Option<i32>,
        /// The answer.
        reason: String,
    },
    /// The lease has run out or was revoked; its keys are deleted.
    #[error("etcd lease {lease:x} is gone")]
    LeaseGone {
        /// The lease.
        lease: i64,
    },
}

impl EtcdError {
    /// Tells whether the same request may succeed if made again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            // The disk quota is used up, or there are too many requests.
            Self::Refused { code, .. } => *code == Some(code::RESOURCE_EXHAUSTED),
            Self::LeaseGone { .. } => false,
        }
    }

    /// Tells whether etcd answered with that code and a text that contains `text`.
    pub(super) fn is_refusal(&self, wanted: i32, text: &str) -> bool {
        match self {
            Self::Refused { code, reason, .. } => *code == Some(wanted) && reason.contains(text),
            Self::Unreachable { .. } | Self::LeaseGone { .. } => false,
        }
    }
}

/// The gRPC code of an error, if it has one.
pub(super) fn code_of(error: &Error) -> Option<i32> {
    match error {
        Error::GRpcStatus(status) => Some(status.code().into()),
        _ => None,
    }
}

/// Tells whether another endpoint would say the same.
pub(super) fn is_final(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => matches!(
            status.code().into(),
            code::INVALID_ARGUMENT
                | code::NOT_FOUND
                | code::ALREADY_EXISTS
                | code::PERMISSION_DENIED
                | code::RESOURCE_EXHAUSTED
                | code::FAILED_PRECONDITION
                | code::OUT_OF_RANGE
                | code::UNIMPLEMENTED
                | code::UNAUTHENTICATED
        ),
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => true,
        // So a watch is refused: with a message, not with a code.
        Error::WatchError(reason) => reason.contains("permission denied"),
        _ => false,
    }
}

/// What is wrong with TLS, if that is the reason.
pub(super) fn tls_trouble(error: &Error) -> Option<String> {
    match error {
        Error::GRpcStatus(status) => tls::explain(status),
        Error::TransportError(error) => tls::explain(error),
        _ => None,
    }
}

/// What went wrong, without the metadata that the client prints too, and what to do about it.
pub(super) fn reason(error: &Error) -> String {
    let said = match error {
        Error::GRpcStatus(status) => status.message(),
        Error::TransportError(error) => return chain(error).to_string(),
        Error::WatchError(reason) => reason,
        other => return other.to_string(),
    };
    // Source: `error.go` of etcd's `rpctypes`.
    let advice = if said.contains("user name is empty") {
        "set etcd.user and etcd.password_file"
    } else if said.contains("invalid user ID or password") {
        "see etcd.user and etcd.password_file"
    } else if said.contains("authentication is not enabled") {
        "take out etcd.user and etcd.password_file"
    } else if said.contains("permission denied") {
        "grant the role of etcd.user this key or its prefix"
    } else {
        return said.to_owned();
    };
    format!("{said} ({advice})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_what_was_asked_and_who_said_what() {
        let unreachable = EtcdError::Unreachable {
            what: "put",
            failures: vec!["http://a: tcp connect error".to_owned(), "http://b: silent".to_owned()],
        };
        assert_eq!(
            unreachable.to_string(),
            "put: no etcd endpoint answers: http://a: tcp connect error; http://b: silent"
        );
        assert!(unreachable.is_transient());
        let refused = |code| EtcdError::Refused {
            what: "put",
            endpoint: "http://a".to_owned(),
            code: Some(code),
            reason: "etcdserver: permission denied".to_owned(),
        };
        assert_eq!(
            refused(code::PERMISSION_DENIED).to_string(),
            "put: etcd at http://a refuses: etcdserver: permission denied"
        );
        assert!(!refused(code::PERMISSION_DENIED).is_transient());
        assert!(refused(code::RESOURCE_EXHAUSTED).is_transient());
        assert!(!EtcdError::LeaseGone { lease: 7 }.is_transient());
    }
}
