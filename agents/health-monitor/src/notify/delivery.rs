//! What became of what was sent: for the log, `/status` and `/metrics`.

use chrono::{DateTime, Utc};
use serde::Serialize;
use tracing::{info, warn};

/// What is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An Alertmanager.
    Alertmanager,
    /// A webhook.
    Webhook,
}

impl Kind {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alertmanager => "Alertmanager",
            Self::Webhook => "webhook",
        }
    }
}

/// How sending to one address goes.
#[derive(Clone, Debug, Serialize)]
pub struct Delivery {
    /// What it is.
    pub kind: Kind,
    /// An Alertmanager's address, or a webhook's name.
    pub name: String,
    /// How often something was taken.
    pub sent: u64,
    /// How often it was not.
    pub failed: u64,
    /// When something was taken last.
    pub sent_at: Option<DateTime<Utc>>,
    /// Since when nothing is, if so.
    pub failing_since: Option<DateTime<Utc>>,
    /// Why.
    pub error: Option<String>,
}

impl Delivery {
    /// Nothing was sent yet.
    pub fn new(kind: Kind, name: &str) -> Self {
        let (sent_at, failing_since, error) = (None, None, None);
        Self { kind, name: name.to_owned(), sent: 0, failed: 0, sent_at, failing_since, error }
    }

    /// Takes an outcome, and logs it if it is another than before.
    pub fn take(&mut self, outcome: Result<(), String>, now: DateTime<Utc>) {
        let Self { kind, name, .. } = &*self;
        match outcome {
            Ok(()) => {
                if self.failing_since.is_some() {
                    info!(?kind, name, "notices are taken again");
                }
                self.sent += 1;
                self.sent_at = Some(now);
                (self.failing_since, self.error) = (None, None);
            }
            Err(error) => {
                if self.failing_since.is_none() {
                    warn!(?kind, name, error, "notices are not taken: trying again");
                }
                self.failed += 1;
                self.failing_since.get_or_insert(now);
                self.error = Some(error);
            }
        }
    }
}
