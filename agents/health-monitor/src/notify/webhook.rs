//! Tells a webhook: one notice when a problem begins, changes and ends.

use std::time::Duration;

use chrono::Utc;
use shared::secret::Secret;
use tokio::time::sleep;

use super::Context;
use super::config::WebhookConfig;
use super::delivery::Kind;
use super::kept::{Kept, RETRY};
use super::ledger::{Ledger, Notice};
use super::post::{self, Post, PostSetupError};
use super::template::{DEFAULT_BODY, Template};

/// Others may tell it too: it is the same fault.
const MARK: &str = "etcd is away, so every replica may tell this";
/// What follows within so long is told with it: faults come in company.
const GATHER: Duration = Duration::from_secs(2);

/// What is told while nobody can hold the lease.
fn marked(notices: &[Notice]) -> Vec<Notice> {
    let mut marked = notices.to_vec();
    for Notice { problem, .. } in &mut marked {
        problem.next = format!("{}; {MARK}", problem.next);
    }
    marked
}

/// A webhook, and what it was told.
#[derive(Debug)]
pub(super) struct Webhook {
    name: String,
    post: Post,
    template: Template,
    told: Kept<Ledger>,
}

impl Webhook {
    /// Reads the files that the entry of that number names.
    pub(super) fn new(config: &WebhookConfig, index: usize) -> Result<Self, PostSetupError> {
        let key = |name: &str| format!("webhook[{index}].{name}");
        let url = match (&config.url, &config.url_file) {
            (_, Some(file)) => post::secret(file, || key("url_file"))?,
            (url, None) => Secret::new(url.clone().unwrap_or_default()),
        };
        let source = if config.url_file.is_some() { "url_file" } else { "url" };
        let url = post::address(url.expose(), || key(source))?;
        let headers = match &config.headers_file {
            Some(file) => {
                let text = post::secret(file, || key("headers_file"))?;
                post::headers(&text, || key("headers_file"))?
            }
            None => reqwest::header::HeaderMap::new(),
        };
        let post = Post::new(&url, config.ca_file.as_deref(), || key("ca_file"))?;
        let post = post.with_headers(headers);
        // The configuration was checked; the default is right whatever it says.
        let template = Template::parse(&config.body).or_else(|_| Template::parse(DEFAULT_BODY));
        let problem = "is no JSON";
        let template =
            template.map_err(|_| PostSetupError::Content { key: key("body"), problem })?;
        let told = Kept::new(format!("told/webhook-{}", config.name));
        Ok(Self { name: config.name.clone(), post, template, told })
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Tells what is to be told until shutdown. May be dropped at any await; what was sent then and not
    /// yet noted is sent again.
    pub(super) async fn run(&mut self, context: &Context, goes_on: bool) {
        if !goes_on {
            self.told.begin(&context.store).await;
        }
        let mut pictures = context.pictures.clone();
        let mut failures = 0;
        let mut is_gathered = false;
        loop {
            let due = self.told.value.due(&pictures.borrow_and_update(), Utc::now());
            let count = self.template.takes(due.len());
            let message = due.get(..count).unwrap_or_default();
            let wait = if message.is_empty() {
                (failures, is_gathered) = (0, false);
                None
            } else if !std::mem::replace(&mut is_gathered, true) {
                Some(GATHER)
            } else {
                let body = if goes_on {
                    self.template.render(&context.cluster, &marked(message))
                } else {
                    self.template.render(&context.cluster, message)
                };
                let outcome = self.post.send(body).await;
                failures = if outcome.is_ok() { 0 } else { failures + 1 };
                if outcome.is_ok() {
                    for notice in message {
                        self.told.value.note(notice);
                    }
                    if goes_on {
                        // To try that now, where etcd is away, would hold up what is told next.
                        self.told.keep_later();
                    } else {
                        self.told.save(&context.store).await;
                    }
                }
                context.board.delivered((Kind::Webhook, &self.name), outcome);
                Some(if failures == 0 { Duration::ZERO } else { post::wait(failures) })
            };
            let wait = match wait {
                None if self.told.is_ahead() => Some(RETRY),
                wait => wait,
            };
            tokio::select! {
                () = context.shutdown.cancelled() => return,
                () = sleep(wait.unwrap_or_default()), if wait.is_some() => {}
                Ok(()) = pictures.changed(), if wait.is_none() => {}
            }
            if message.is_empty() && self.told.is_ahead() {
                self.told.save(&context.store).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::alerts::Severity;
    use super::super::alerts::tests::{problem_at, subject};
    use super::super::ledger::Event;
    use super::*;

    #[test]
    fn what_is_told_while_etcd_is_away_says_so() {
        let (subject, problem) = (subject("a", "x"), problem_at(Severity::Critical, 0));
        let marked = marked(&[Notice { event: Event::Began, subject, problem }]);
        let text = Template::parse(DEFAULT_BODY).unwrap().render("demo", &marked);
        assert!(text.contains("Next: look at it; etcd is away"), "{text}");
    }
}
