//! One member of etcd, asked by itself how it is.
//!
//! Nothing here needs a leader or a majority, and nothing is written: a member that is cut off from the
//! others answers as well. The alarms come with the status; to list them, etcd would agree on it first.

use std::collections::BTreeMap;
use std::fmt;

use etcd_client::{Client, ConnectOptions, Error, TlsOptions};
use thiserror::Error as ThisError;

use super::config::{EtcdConfig, EtcdSetupError};
use super::error::{code, code_of, reason, tls_trouble};
use crate::secret::Secret;

/// What a member says of itself and of the cluster it knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its number.
    pub member_id: u64,
    /// The number of the leader; `None` while it knows none.
    pub leader_id: Option<u64>,
    /// It follows, and does not vote.
    pub is_learner: bool,
    /// The term it is in.
    pub raft_term: u64,
    /// Its version, such as `3.5.16`.
    pub version: String,
    /// Bytes of its database file.
    pub db_bytes: u64,
    /// The most that its database may take, in bytes; etcd before 3.6 does not say.
    pub quota_bytes: Option<u64>,
    /// The alarms that are raised, of any member.
    pub alarms: Vec<MemberAlarm>,
    /// The members that vote, as it knows them: number and name. Empty if it does not tell.
    pub voters: BTreeMap<u64, String>,
}

/// An alarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberAlarm {
    /// The member it is raised for.
    pub member_id: u64,
    /// `NOSPACE` or `CORRUPT`.
    pub name: String,
}

/// Why a member did not say how it is.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum MemberError {
    /// Nobody is there, or the connection broke.
    #[error("no connection: {0}")]
    Unreachable(String),
    /// The host is there, and nobody listens.
    #[error("no connection: {0}")]
    NotListening(String),
    /// The two do not come to speak TLS.
    #[error("no TLS: {0}")]
    Tls(String),
    /// It does not let us in.
    #[error("it refuses the login: {0}")]
    Login(String),
    /// It does not answer the question.
    #[error("it refuses to say how it is: {0}")]
    Refused(String),
}

/// A client of one member.
pub struct EtcdMember {
    url: String,
    login: Option<(String, Secret)>,
    tls: Option<TlsOptions>,
    /// Kept, because a login costs etcd a tenth of a second of CPU.
    client: Option<Client>,
}

/// Says the address only.
impl fmt::Debug for EtcdMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EtcdMember").field(&self.url).finish()
    }
}

impl EtcdMember {
    /// Reads the files that `config` names. Nobody is asked yet; `url` is one of its endpoints.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be read.
    pub fn new(config: &EtcdConfig, url: &str) -> Result<Self, EtcdSetupError> {
        let (login, tls) = (config.login()?, config.tls()?);
        Ok(Self { url: url.to_owned(), login, tls, client: None })
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks it, without a limit on how long that takes. May be dropped at any time: the next question
    /// begins with a new connection then.
    ///
    /// # Errors
    ///
    /// Fails when it cannot be reached or refuses.
    pub async fn status(&mut self) -> Result<MemberStatus, MemberError> {
        let client = match self.client.take() {
            Some(client) => client,
            None => self.connect().await.map_err(|error| why(&error))?,
        };
        let status = ask(&client).await.map_err(|error| why(&error))?;
        self.client = Some(client);
        Ok(status)
    }

    async fn connect(&self) -> Result<Client, Error> {
        let mut options = ConnectOptions::new().with_auto_token_refresh(true);
        if let Some((user, password)) = &self.login {
            options = options.with_user(user, password.expose());
        }
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.clone());
        }
        Client::connect([&self.url], Some(options)).await
    }
}

async fn ask(client: &Client) -> Result<MemberStatus, Error> {
    let status = client.maintenance_client().status().await?;
    // Not from the log that they agree on, but as the member knows it. Where it does not tell, the
    // status is worth more than this.
    let members = client.cluster_client().member_list().await;
    let voters = members.as_ref().map(etcd_client::MemberListResponse::members).unwrap_or_default();
    let voters = voters.iter().filter(|it| !it.is_learner());
    let bytes = |size: i64| u64::try_from(size).unwrap_or_default();
    Ok(MemberStatus {
        member_id: status.header().map_or(0, etcd_client::ResponseHeader::member_id),
        leader_id: Some(status.leader()).filter(|leader| *leader != 0),
        is_learner: status.is_learner(),
        raft_term: status.raft_term(),
        version: status.version().to_owned(),
        db_bytes: bytes(status.db_size()),
        quota_bytes: Some(bytes(status.db_size_quota())).filter(|quota| *quota != 0),
        alarms: status.errors().iter().filter_map(|error| read_alarm(error)).collect(),
        voters: voters.map(|it| (it.id(), name(it))).collect(),
    })
}

/// A member that was added and never started has no name yet.
fn name(member: &etcd_client::Member) -> String {
    if member.name().is_empty() { format!("{:x}", member.id()) } else { member.name().to_owned() }
}

/// Reads an alarm from what stands among the errors of a status: `memberID:123 alarm:NOSPACE `. What
/// else stands there, such as that there is no leader, is none.
///
/// Source: `maintenanceServer.Status` in etcd's `maintenance.go`.
fn read_alarm(text: &str) -> Option<MemberAlarm> {
    let mut words = text.split_whitespace();
    let member_id = words.next()?.strip_prefix("memberID:")?.parse().ok()?;
    let name = words.next()?.strip_prefix("alarm:")?.to_owned();
    Some(MemberAlarm { member_id, name })
}

fn why(error: &Error) -> MemberError {
    if let Some(trouble) = tls_trouble(error) {
        return MemberError::Tls(trouble);
    }
    let said = reason(error);
    match code_of(error) {
        // A question that was under way when the connection ended is cancelled.
        None | Some(code::UNAVAILABLE | code::UNKNOWN | code::CANCELLED) => {
            let (cause, is_refused) = cause(error, said);
            if is_refused {
                MemberError::NotListening(cause)
            } else {
                MemberError::Unreachable(cause)
            }
        }
        // As a wrong password is answered, and a login where there is none.
        Some(
            code::UNAUTHENTICATED
            | code::PERMISSION_DENIED
            | code::INVALID_ARGUMENT
            | code::FAILED_PRECONDITION,
        ) => MemberError::Login(said),
        Some(_) => MemberError::Refused(said),
    }
}

/// What is at the bottom of it: the words at the top are "tcp connect error", whatever happened; and
/// whether that is a refused connection.
fn cause(error: &Error, said: String) -> (String, bool) {
    let mut cause: Option<&dyn std::error::Error> = match error {
        Error::GRpcStatus(status) => std::error::Error::source(status),
        Error::TransportError(error) => std::error::Error::source(error),
        _ => None,
    };
    let (mut deepest, mut is_refused) = (said, false);
    while let Some(error) = cause {
        deepest = error.to_string();
        let io = error.downcast_ref::<std::io::Error>();
        is_refused |= io.is_some_and(|it| it.kind() == std::io::ErrorKind::ConnectionRefused);
        cause = error.source();
    }
    (deepest, is_refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_are_told_from_other_errors() {
        let alarm = |member_id, name: &str| Some(MemberAlarm { member_id, name: name.to_owned() });
        for (text, expected) in [
            (
                "memberID:13668033151171901709 alarm:NOSPACE ",
                alarm(13_668_033_151_171_901_709, "NOSPACE"),
            ),
            ("memberID:7 alarm:CORRUPT", alarm(7, "CORRUPT")),
            ("etcdserver: no leader", None),
            ("memberID:x alarm:NOSPACE", None),
            ("", None),
        ] {
            assert_eq!(read_alarm(text), expected, "{text}");
        }
    }
}
