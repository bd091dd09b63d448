//! The other agents, by their admin servers.

use futures_util::future::try_join3;
use reqwest::{StatusCode, Url};
use serde_json::Value;

use super::http::{self, Http, Page, wrong};
use super::{Probe, SetupError};
use crate::config::AgentConfig;
use crate::facts::Failure;

/// What an agent says.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentFacts {
    /// Why it cannot do its work (`/readyz`); none if it can.
    pub not_ready: Vec<String>,
    /// `/status`.
    pub status: Value,
}

/// Asks one agent.
#[derive(Debug)]
pub struct AgentProbe {
    http: Http,
    livez: Url,
    readyz: Url,
    status: Url,
}

impl AgentProbe {
    /// A probe of the agent at that address.
    ///
    /// # Errors
    ///
    /// Fails when that is none.
    pub fn new(config: &AgentConfig) -> Result<Self, SetupError> {
        let key = format!("agents {}.url", config.name);
        let address = http::address(&config.url, &key)?;
        let http = Http::for_url(&address, None, &key)?;
        let at = |path: &str| {
            let mut url = address.clone();
            url.set_path(path);
            url
        };
        Ok(Self { http, livez: at("/livez"), readyz: at("/readyz"), status: at("/status") })
    }
}

impl Probe for AgentProbe {
    type Facts = AgentFacts;

    async fn ask(&mut self) -> Result<AgentFacts, Failure> {
        let get = |url: &Url| self.http.get(url.clone(), None);
        let (livez, readyz, status) =
            try_join3(get(&self.livez), get(&self.readyz), get(&self.status)).await?;
        if livez.status != StatusCode::OK {
            return Err(wrong(format!("/livez says {}: {}", livez.status, livez.first_line())));
        }
        let not_ready = match readyz.status {
            StatusCode::OK => Vec::new(),
            StatusCode::SERVICE_UNAVAILABLE => reasons(&readyz),
            other => return Err(wrong(format!("/readyz says {other}: {}", readyz.first_line()))),
        };
        if status.status != StatusCode::OK {
            return Err(wrong(format!("/status says {}: {}", status.status, status.first_line())));
        }
        Ok(AgentFacts { not_ready, status: status.json()? })
    }
}

/// One a line.
fn reasons(page: &Page) -> Vec<String> {
    let text = String::from_utf8_lossy(&page.body);
    let reasons: Vec<_> = text.lines().filter(|it| !it.is_empty()).map(str::to_owned).collect();
    if reasons.is_empty() { vec!["it does not say why".to_owned()] } else { reasons }
}
