//! Why a server gives no answer, in words that do not name it.

use std::error::Error;

use shared::pg::{ConnectError, QueryError};
use shared::telemetry::chain;
use shared::tls::explain;
use tokio_postgres::error::{DbError, Severity, SqlState};

use super::super::bare;
use super::query::AnswerError;
use crate::facts::{Failure, Stage};

/// The function of the server that says that a role's `CONNECTION LIMIT` is reached, where another one
/// says the same of the server as a whole: the code is the same.
/// Source: `src/backend/utils/init/miscinit.c`.
const ROLE_LIMIT_ROUTINE: &str = "InitializeSessionUserId";

/// An error with its causes.
fn words(error: &(dyn Error + 'static)) -> String {
    bare(chain(error))
}

fn failure(stage: Stage, error: impl Into<String>) -> Failure {
    Failure { stage, error: error.into() }
}

/// Why there is no connection.
pub(in crate::probe) fn of_connect(error: &ConnectError) -> Failure {
    match error {
        ConnectError::Unreachable { source, .. } => {
            failure(Stage::of_dial(source), format!("no connection: {}", words(source)))
        }
        ConnectError::TimedOut { limit, .. } => failure(
            Stage::Timeout,
            format!("no login within {}", humantime::format_duration(*limit)),
        ),
        ConnectError::Broken { source, .. } => {
            failure(Stage::Dial, format!("the connection broke at the login: {}", words(source)))
        }
        ConnectError::TlsNotOffered { .. } => {
            failure(Stage::Tls, "it does not offer TLS, and tls is \"verify-full\"")
        }
        ConnectError::UnknownCa { .. } => {
            failure(Stage::Tls, "its certificate is signed by a CA that is not in ca_file")
        }
        ConnectError::WrongName { expected, .. } => {
            failure(Stage::Tls, format!("its certificate does not name the host {expected}"))
        }
        ConnectError::Tls { source, .. } => {
            let words = explain(source).unwrap_or_else(|| words(source));
            failure(Stage::Tls, words)
        }
        ConnectError::PasswordMissing { user, .. } => {
            let words =
                format!("it asks for the password of role {user}, and no password_file is set");
            failure(Stage::Login, words)
        }
        ConnectError::WeakAuth { user, how, .. } => {
            let words = format!(
                "it asks for the password of role {user} {how}, and without TLS that is not given"
            );
            failure(Stage::Login, words)
        }
        ConnectError::WrongPassword { user, .. } => {
            failure(Stage::Login, format!("it refuses the password of role {user}"))
        }
        ConnectError::NotAllowed { source, user, .. } => {
            let words = format!("it does not let role {user} log in: {}", chain(source));
            failure(Stage::Login, words)
        }
        ConnectError::NoDatabase { database, .. } => {
            failure(Stage::Login, format!("it has no database {database}"))
        }
        ConnectError::NotNow { source, .. } => of_not_now(source),
        ConnectError::TooOld { version, needed, .. } => {
            failure(Stage::Answer, format!("it runs PostgreSQL {version}, and {needed} is needed"))
        }
        ConnectError::Refused { source, .. } => {
            failure(Stage::Login, format!("it refuses the login: {}", chain(source)))
        }
    }
}

fn of_not_now(source: &tokio_postgres::Error) -> Failure {
    let words = chain(source).to_string();
    if source.code() != Some(&SqlState::TOO_MANY_CONNECTIONS) {
        return failure(Stage::NotNow, words);
    }
    let is_of_role = source.as_db_error().and_then(DbError::routine) == Some(ROLE_LIMIT_ROUTINE);
    failure(if is_of_role { Stage::Login } else { Stage::Full }, words)
}

/// Why there is no answer on a connection.
pub(super) fn of_answer(error: &AnswerError) -> Failure {
    let source = match error {
        AnswerError::Query(QueryError::TimedOut { limit, .. }) => {
            let limit = humantime::format_duration(*limit);
            return failure(Stage::Timeout, format!("no answer within {limit}"));
        }
        AnswerError::Query(QueryError::Failed { source, .. }) => source,
        AnswerError::Column(_) | AnswerError::Range(_) => {
            return failure(Stage::Answer, chain(error).to_string());
        }
    };
    let words = words(source);
    match source.as_db_error() {
        // Without a message from the server it is the connection that failed.
        None => failure(Stage::Dial, format!("the connection broke: {words}")),
        Some(error) if *error.code() == SqlState::QUERY_CANCELED => failure(Stage::Timeout, words),
        Some(error) if ends_the_session(error) => {
            failure(Stage::Dial, format!("the session was ended: {words}"))
        }
        Some(_) => failure(Stage::Answer, words),
    }
}

/// Whether the server says it as its last word: it stops, or somebody terminated the session.
fn ends_the_session(error: &DbError) -> bool {
    matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_words_do_not_name_the_server() {
        let node = || "postgres-1 (10.0.0.7:5432)".to_owned();
        let user = || "agent".to_owned();
        for (error, stage, words) in [
            (
                ConnectError::Unreachable {
                    node: node(),
                    source: io::Error::from_raw_os_error(111),
                },
                Stage::Refused,
                "no connection: Connection refused",
            ),
            (
                ConnectError::Unreachable {
                    node: node(),
                    source: io::Error::from_raw_os_error(113),
                },
                Stage::Dial,
                "no connection: No route to host",
            ),
            (
                ConnectError::TimedOut { node: node(), limit: Duration::from_secs(3) },
                Stage::Timeout,
                "no login within 3s",
            ),
            (
                ConnectError::PasswordMissing { node: node(), user: user() },
                Stage::Login,
                "it asks for the password of role agent, and no password_file is set",
            ),
            (
                ConnectError::UnknownCa { node: node() },
                Stage::Tls,
                "its certificate is signed by a CA that is not in ca_file",
            ),
        ] {
            assert_eq!(of_connect(&error), failure(stage, words));
        }
    }
}
