//! Patroni, by each member's REST API.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::Url;
use serde::Deserialize;
use shared::topology::PatroniConfig;

use super::http::{self, Http, wrong};
use super::{Probe, SetupError};
use crate::facts::Failure;

/// What a member's Patroni says: `GET /patroni`.
#[derive(Clone, Debug, PartialEq)]
pub struct PatroniFacts {
    /// `primary`, `replica`, `standby_leader` …
    pub role: String,
    /// `running`, `starting`, `stopped` …
    pub state: String,
    /// The timeline, if PostgreSQL runs.
    pub timeline: Option<u32>,
    /// Patroni's version.
    pub version: String,
    /// It does not act: `patronictl pause`.
    pub is_paused: bool,
    /// PostgreSQL must be restarted before its settings hold.
    pub pending_restart: bool,
    /// Since it last saw its store, by its own clock; in whole seconds.
    pub store_seen_ago: Option<Duration>,
}

/// Asks one member.
#[derive(Debug)]
pub struct PatroniProbe {
    /// What the member says its address is: not ours to trust.
    url: Result<Url, Failure>,
    http: Http,
}

impl PatroniProbe {
    /// The client for all members: they have the same authority.
    ///
    /// # Errors
    ///
    /// Fails when the certificates cannot be read.
    pub fn client(config: &PatroniConfig) -> Result<Http, SetupError> {
        Http::trusting(config.ca_file.as_deref(), "patroni")
    }

    /// A probe of the member with that REST API, such as `http://postgres-1:8008/patroni`.
    pub fn new(http: Http, api_url: &str) -> Self {
        let url = http::address(api_url, "api_url").map(|mut url| {
            url.set_path("/patroni");
            url.set_query(None);
            url
        });
        Self { url: url.map_err(|error| wrong(error.to_string())), http }
    }
}

impl Probe for PatroniProbe {
    type Facts = PatroniFacts;

    async fn ask(&mut self) -> Result<PatroniFacts, Failure> {
        let page = self.http.get(self.url.clone()?, None).await?;
        // With 503 where PostgreSQL does not run; the answer is the same.
        Ok(read(page.json()?, page.date))
    }
}

/// What is read of the answer.
/// Source: `get_postgresql_status` in Patroni's `api.py`.
#[derive(Deserialize)]
struct Answer {
    state: String,
    role: String,
    timeline: Option<u32>,
    patroni: About,
    #[serde(default)]
    pause: bool,
    #[serde(default)]
    pending_restart: bool,
    /// Seconds since 1970; absent or 0 until the store was seen once.
    dcs_last_seen: Option<i64>,
}

#[derive(Deserialize)]
struct About {
    version: String,
}

fn read(answer: Answer, date: Option<DateTime<Utc>>) -> PatroniFacts {
    let seen_at = answer.dcs_last_seen.filter(|it| *it != 0);
    // Both by the clock of that host.
    let seen_ago = date.zip(seen_at).map(|(date, seen_at)| date.timestamp() - seen_at);
    PatroniFacts {
        role: answer.role,
        state: answer.state,
        timeline: answer.timeline,
        version: answer.patroni.version,
        is_paused: answer.pause,
        pending_restart: answer.pending_restart,
        store_seen_ago: seen_ago.map(|it| Duration::from_secs(u64::try_from(it).unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_whatever_it_leaves_out() {
        let date = DateTime::parse_from_rfc2822("Sat, 21 Nov 2026 14:10:20 GMT").unwrap().to_utc();
        let seen = date.timestamp() - 7;
        let text = format!(
            r#"{{"state": "running", "role": "primary", "timeline": 3, "dcs_last_seen": {seen},
                "pending_restart": true, "pause": true, "xlog": {{"location": 1}},
                "patroni": {{"version": "4.0.7", "scope": "mesh", "name": "a"}}}}"#
        );
        let facts = read(serde_json::from_str(&text).unwrap(), Some(date));
        let expected = PatroniFacts {
            role: "primary".to_owned(),
            state: "running".to_owned(),
            timeline: Some(3),
            version: "4.0.7".to_owned(),
            is_paused: true,
            pending_restart: true,
            store_seen_ago: Some(Duration::from_secs(7)),
        };
        assert_eq!(facts, expected);

        let text = r#"{"state": "creating replica", "role": "uninitialized", "dcs_last_seen": 0,
                       "patroni": {"version": "4.0.7"}}"#;
        let facts = read(serde_json::from_str(text).unwrap(), Some(date));
        assert_eq!((facts.timeline, facts.store_seen_ago, facts.is_paused), (None, None, false));
    }
}
