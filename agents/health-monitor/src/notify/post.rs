//! Sends JSON, each time on a new connection: one that was kept may be half dead, and these are rare.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Response, Url};
use shared::http;
use shared::secret::{Secret, SecretError};
use shared::tls::{self, TlsError};
use thiserror::Error;

use crate::probe::http::bottom;

/// Longest wait for an answer. Source: the default of Prometheus' `alertmanager_config.timeout`.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// So much of an answer is read, to say why something was refused.
const ANSWER_BYTES_MAX: usize = 1 << 10;
/// The waits after failures in a row: each twice the one before, up to the longest.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_LONGEST: Duration = Duration::from_mins(1);

/// Why nothing can be sent. `key` is what it is about.
#[derive(Debug, Error)]
pub enum PostSetupError {
    /// A secret could not be read.
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
    /// What a secret file holds cannot be used. It is not shown.
    #[error("{key}: {problem}")]
    Content {
        /// The key.
        key: String,
        /// What was wrong.
        problem: &'static str,
    },
    /// There is no HTTP client.
    #[error("set up an HTTP client")]
    Client(#[source] reqwest::Error),
}

/// Reads a secret that belongs to `key`.
pub(super) fn secret(file: &Path, key: impl Fn() -> String) -> Result<Secret, PostSetupError> {
    Secret::read(file).map_err(|source| PostSetupError::Secret { key: key(), source })
}

/// Reads an address that belongs to `key`, and may be a secret.
pub(super) fn address(text: &str, key: impl Fn() -> String) -> Result<Url, PostSetupError> {
    let url = Url::parse(text.trim()).ok().filter(|it| matches!(it.scheme(), "http" | "https"));
    let problem = "is no address that begins with http:// or https://";
    url.ok_or_else(|| PostSetupError::Content { key: key(), problem })
}

/// Reads headers, one `Name: value` a line.
pub(super) fn headers(
    text: &Secret,
    key: impl Fn() -> String,
) -> Result<HeaderMap, PostSetupError> {
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let mut value = HeaderValue::from_str(value.trim()).ok()?;
        value.set_sensitive(true);
        Some((name.trim().parse::<HeaderName>().ok()?, value))
    };
    let lines = text.expose().lines().filter(|it| !it.trim().is_empty());
    let problem = "must have one `Name: value` a line";
    lines
        .map(|it| header(it).ok_or_else(|| PostSetupError::Content { key: key(), problem }))
        .collect()
}

/// Where to send.
#[derive(Clone, Debug)]
pub(super) struct Post {
    client: Client,
    url: Secret,
    login: Option<(String, Secret)>,
    headers: HeaderMap,
}

impl Post {
    /// Sends to `url`, and trusts the certificates in `ca_file`, or the system's.
    pub(super) fn new(
        url: &Url,
        ca_file: Option<&Path>,
        key: impl Fn() -> String,
    ) -> Result<Self, PostSetupError> {
        let builder = http::client(url.scheme() == "https", ca_file)
            .map_err(|source| PostSetupError::Certificates { key: key(), source })?;
        let client = builder.timeout(ANSWER_LIMIT).build().map_err(PostSetupError::Client)?;
        let url = Secret::new(url.as_str().to_owned());
        Ok(Self { client, url, login: None, headers: HeaderMap::new() })
    }

    /// With basic authentication.
    pub(super) fn with_login(self, login: Option<(String, Secret)>) -> Self {
        Self { login, ..self }
    }

    /// With more headers.
    pub(super) fn with_headers(self, headers: HeaderMap) -> Self {
        Self { headers, ..self }
    }

    /// Sends once; why it was not taken is a sentence without the address.
    pub(super) async fn send(&self, body: String) -> Result<(), String> {
        let mut request = self.client.post(self.url.expose()).headers(self.headers.clone());
        if let Some((user, password)) = &self.login {
            request = request.basic_auth(user, Some(password.expose()));
        }
        let sent = request.header(CONTENT_TYPE, "application/json").body(body).send().await;
        let answer = sent.map_err(|error| why(&error.without_url()))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        Err(format!("the answer is {status}: {}", said(answer).await))
    }
}

fn why(error: &reqwest::Error) -> String {
    if let Some(trouble) = tls::explain(error) {
        return format!("no TLS: {trouble}");
    }
    if error.is_timeout() {
        return format!("no answer within {}", humantime::format_duration(ANSWER_LIMIT));
    }
    let what = if error.is_connect() { "no connection" } else { "the connection broke" };
    format!("{what}: {}", bottom(error))
}

/// The first line of an answer, to be shown.
async fn said(mut answer: Response) -> String {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = answer.chunk().await {
        body.extend_from_slice(&chunk);
        if ANSWER_BYTES_MAX < body.len() {
            break;
        }
    }
    let text = String::from_utf8_lossy(&body);
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

/// How long to wait after so many failures in a row. A random part is added, so that replicas and
/// addresses that failed together do not come back together.
pub(super) fn wait(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let wait = (WAIT_FIRST * 2_u32.saturating_pow(doublings)).min(WAIT_LONGEST);
    let random = u32::try_from(RandomState::new().hash_one(failures) % 256).unwrap_or_default();
    wait + wait / 1024 * random
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_a_minute_and_a_quarter() {
        for (failures, least, most) in
            [(0, 1000, 1250), (1, 1000, 1250), (2, 2000, 2500), (7, 60_000, 75_000)]
        {
            let waited = wait(failures).as_millis();
            assert!((least..=most).contains(&waited), "{failures}: {waited} ms");
        }
        assert!(wait(u32::MAX) <= WAIT_LONGEST * 5 / 4);
    }

    #[test]
    fn headers_are_read_and_never_shown() {
        let key = || "webhook[0].headers_file".to_owned();
        let text = Secret::new("Authorization: Bearer abc\n\nX-Team:  dba \n".to_owned());
        let read = headers(&text, key).unwrap();
        assert_eq!(read["authorization"], "Bearer abc");
        assert_eq!(read["x-team"], "dba");
        assert!(!format!("{read:?}").contains("abc"));
        for wrong in ["Bearer abc", "a b: c", "x: \u{7}"] {
            let error = headers(&Secret::new(wrong.to_owned()), key).unwrap_err();
            assert_eq!(
                error.to_string(),
                "webhook[0].headers_file: must have one `Name: value` a line",
            );
        }
    }
}
