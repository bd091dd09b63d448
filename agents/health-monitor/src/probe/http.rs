//! HTTP: one question, one bounded answer, each time on a new connection.

use std::error::Error;
use std::path::Path;

use chrono::{DateTime, Utc};
use reqwest::{Client, ClientBuilder, StatusCode, Url, header};
use shared::secret::Secret;
use shared::tls;

use super::{SetupError, bare};
use crate::facts::{Failure, Stage};

/// Longest answer to read, in bytes. The longest are those of a large Swarm and of agents that watch
/// hundreds of servers: some hundred KiB.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// A client. Clones share it.
#[derive(Clone, Debug)]
pub struct Http(Client);

/// What was answered.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) status: StatusCode,
    /// When, by the clock of who answered, where it says so.
    pub(super) date: Option<DateTime<Utc>>,
    pub(super) body: Vec<u8>,
}

impl Http {
    /// A client that trusts the certificates in `ca_file`, or the system's. Errors name `key`.
    pub(super) fn trusting(ca_file: Option<&Path>, key: &str) -> Result<Self, SetupError> {
        Self::build(builder(true, ca_file, key)?)
    }

    /// A client for `url`. Errors name `key`.
    pub(super) fn for_url(
        url: &Url,
        ca_file: Option<&Path>,
        key: &str,
    ) -> Result<Self, SetupError> {
        Self::build(builder(url.scheme() == "https", ca_file, key)?)
    }

    /// A client that connects to a Unix socket, whatever the address says.
    pub(super) fn socket(path: &Path, key: &str) -> Result<Self, SetupError> {
        Self::build(builder(false, None, key)?.unix_socket(path))
    }

    fn build(builder: ClientBuilder) -> Result<Self, SetupError> {
        builder.build().map(Self).map_err(SetupError::Client)
    }

    /// Reads a page. Any status is an answer, but that somebody must log in.
    pub(super) async fn get(
        &self,
        url: Url,
        login: Option<(&str, Option<&Secret>)>,
    ) -> Result<Page, Failure> {
        let mut request = self.0.get(url);
        if let Some((user, password)) = login {
            request = request.basic_auth(user, password.map(Secret::expose));
        }
        let answer = request.send().await.map_err(|error| why(&error.without_url()))?;
        let status = answer.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(Failure {
                stage: Stage::Login,
                error: format!("the login is refused: {status}"),
            });
        }
        let date = answer.headers().get(header::DATE).and_then(|it| it.to_str().ok());
        let date = date.and_then(|it| DateTime::parse_from_rfc2822(it).ok()).map(|it| it.to_utc());
        let body = shared::http::body(answer, ANSWER_BYTES_MAX).await;
        let body = body
            .map_err(|error| why(&error.without_url()))?
            .ok_or_else(|| wrong(format!("the answer has more than {ANSWER_BYTES_MAX} bytes")))?;
        Ok(Page { status, date, body })
    }
}

/// What a client is built with. Errors name `key`.
fn builder(is_tls: bool, ca_file: Option<&Path>, key: &str) -> Result<ClientBuilder, SetupError> {
    shared::http::client(is_tls, ca_file)
        .map_err(|source| SetupError::Certificates { key: format!("{key}.ca_file"), source })
}

impl Page {
    /// Reads the body as JSON.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| {
            wrong(format!("the answer ({}) is not what was expected: {error}", self.status))
        })
    }

    /// The first line of the body, to be shown.
    pub(super) fn first_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        text.lines().next().unwrap_or_default().chars().take(200).collect()
    }
}

/// An answer that is none.
pub(super) fn wrong(error: String) -> Failure {
    Failure { stage: Stage::Answer, error }
}

/// Reads an address. Errors name `key`.
pub(super) fn address(url: &str, key: &str) -> Result<Url, SetupError> {
    Url::parse(url).map_err(|error| {
        let problem = format!("`{url}` is no address: {error}");
        SetupError::Address { key: key.to_owned(), problem }
    })
}

fn why(error: &reqwest::Error) -> Failure {
    let failure = |stage, error: String| Failure { stage, error };
    if let Some(trouble) = tls::explain(error) {
        return failure(Stage::Tls, format!("no TLS: {trouble}"));
    }
    if error.is_connect() {
        return failure(Stage::of_dial(error), format!("no connection: {}", bottom(error)));
    }
    failure(Stage::Answer, format!("the connection broke: {}", bottom(error)))
}

/// What is at the bottom of an error: what is above names the libraries that passed it on.
pub(crate) fn bottom(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    bare(cause)
}
