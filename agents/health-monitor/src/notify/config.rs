//! The tables `[notify]`, `[[alertmanager]]` and `[[webhook]]`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;
use shared::config::Problems;

use super::template::{DEFAULT_BODY, Template};

/// An alert that is not sent again for so long would end by itself too late to matter.
const RESEND_MAX: Duration = Duration::from_mins(5);
/// A problem that nobody is told of for so long might as well not be watched.
const AFTER_MAX: Duration = Duration::from_hours(1);

/// The table `[notify]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NotifyConfig {
    /// How long a problem lasts before anybody is told: longer than a switchover or the restart of a server
    /// takes, which somebody asked for; shorter than any failover after a loss, for which Patroni waits until
    /// its `ttl`, 30 s, is over.
    #[serde(with = "humantime_serde")]
    pub after: Duration,
    /// How often Alertmanager is sent the alerts that fire. One that it did not hear of for four times as
    /// long counts as resolved there.
    #[serde(with = "humantime_serde")]
    pub resend_interval: Duration,
}

impl Default for NotifyConfig {
    fn default() -> Self {
        Self { after: Duration::from_secs(10), resend_interval: Duration::from_mins(1) }
    }
}

/// One entry of `[[alertmanager]]`: list every peer of a cluster of them, none behind a balancer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlertmanagerConfig {
    /// Where it listens: `http://alertmanager-1:9093`.
    pub url: String,
    /// The user of basic authentication.
    pub user: Option<String>,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
    /// PEM certificates to trust in place of the system's, for an https:// address.
    pub ca_file: Option<PathBuf>,
}

/// One entry of `[[webhook]]`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// Its name; what it was told is kept under it.
    pub name: String,
    /// Where messages are sent.
    pub url: Option<String>,
    /// A file with the address, where that is a secret itself.
    pub url_file: Option<PathBuf>,
    /// A file with more headers, one `Name: value` a line.
    pub headers_file: Option<PathBuf>,
    /// PEM certificates to trust in place of the system's, for an https:// address.
    pub ca_file: Option<PathBuf>,
    /// The JSON that is sent, with placeholders in braces: see [`Template`].
    #[serde(default = "default_body")]
    pub body: String,
}

/// The address down to its port: what follows is often a secret, and this is logged.
impl fmt::Debug for WebhookConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, url, url_file, headers_file, ca_file, body } = self;
        let origin = |it: &String| Url::parse(it).map(|it| it.origin().ascii_serialization()).ok();
        f.debug_struct("WebhookConfig")
            .field("name", name)
            .field("url", &url.as_ref().and_then(origin))
            .field("url_file", url_file)
            .field("headers_file", headers_file)
            .field("ca_file", ca_file)
            .field("body", body)
            .finish()
    }
}

fn default_body() -> String {
    DEFAULT_BODY.to_owned()
}

impl NotifyConfig {
    /// Adds what is wrong to `problems`, with keys relative to the table.
    pub fn check(&self, problems: &mut Problems) {
        if AFTER_MAX < self.after {
            problems.add("after", "must be 1h at most");
        }
        if !(Duration::from_secs(1)..=RESEND_MAX).contains(&self.resend_interval) {
            problems.add("resend_interval", "must be 1s to 5min");
        }
    }
}

impl AlertmanagerConfig {
    /// Adds what is wrong to `problems`, with keys relative to the entry.
    pub fn check(&self, problems: &mut Problems) {
        check_url(&self.url, problems);
        if self.user.is_some() != self.password_file.is_some() {
            problems.add("user", "and password_file must be set together");
        }
    }
}

impl WebhookConfig {
    /// Adds what is wrong to `problems`, with keys relative to the entry.
    pub fn check(&self, problems: &mut Problems) {
        let is_plain = |it: char| it.is_ascii_alphanumeric() || it == '-' || it == '_';
        if self.name.is_empty() || !self.name.chars().all(is_plain) {
            problems.add("name", "must be made of letters, digits, - and _");
        }
        match (&self.url, &self.url_file) {
            (Some(url), None) => check_url(url, problems),
            (None, Some(_)) => {}
            _ => problems.add("url", "or url_file must be set, and not both"),
        }
        if let Err(problem) = Template::parse(&self.body) {
            problems.add("body", problem);
        }
    }
}

fn check_url(url: &str, problems: &mut Problems) {
    match Url::parse(url) {
        Ok(parsed) if !matches!(parsed.scheme(), "http" | "https") => {
            problems.add("url", format!("`{url}` must begin with http:// or https://"));
        }
        Ok(parsed) if !parsed.username().is_empty() || parsed.password().is_some() => {
            problems.add("url", "must have no user or password in it: they would be logged");
        }
        Ok(_) => {}
        Err(error) => problems.add("url", format!("`{url}` is no address: {error}")),
    }
}

/// Checks all that says who is told.
pub fn check(
    notify: &NotifyConfig,
    alertmanagers: &[AlertmanagerConfig],
    webhooks: &[WebhookConfig],
    problems: &mut Problems,
) {
    problems.within("notify", |problems| notify.check(problems));
    for (index, it) in alertmanagers.iter().enumerate() {
        problems.within(&format!("alertmanager[{index}]"), |problems| {
            it.check(problems);
            if alertmanagers.iter().take(index).any(|other| other.url == it.url) {
                problems.add("url", "is listed twice");
            }
        });
    }
    for (index, it) in webhooks.iter().enumerate() {
        problems.within(&format!("webhook[{index}]"), |problems| {
            it.check(problems);
            if webhooks.iter().take(index).any(|other| other.name == it.name) {
                problems.add("name", format!("`{}` is used twice", it.name));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        notify: NotifyConfig,
        #[serde(default)]
        alertmanager: Vec<AlertmanagerConfig>,
        #[serde(default)]
        webhook: Vec<WebhookConfig>,
    }

    fn problems(text: &str) -> Vec<String> {
        let File { notify, alertmanager, webhook } = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        check(&notify, &alertmanager, &webhook, &mut problems);
        problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect()
    }

    #[test]
    fn the_path_of_a_webhook_is_not_logged() {
        let text = "name = \"chat\"\nurl = \"https://chat:8443/hooks/s3cret?token=s3cret\"\n";
        let shown = format!("{:?}", toml::from_str::<WebhookConfig>(text).unwrap());
        assert!(shown.contains("https://chat:8443") && !shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn every_broken_rule_is_shown_with_its_key() {
        assert!(problems("").is_empty());
        let fine = "[notify]\nafter = \"0s\"\nresend_interval = \"30s\"\n\
             [[alertmanager]]\nurl = \"http://a:9093\"\n\
             [[alertmanager]]\nurl = \"https://b/am\"\nuser = \"u\"\npassword_file = \"/p\"\n\
             [[webhook]]\nname = \"chat\"\nurl_file = \"/u\"\n";
        assert!(problems(fine).is_empty());
        for (text, expected) in [
            ("[notify]\nafter = \"2h\"", "notify.after: must be 1h at most"),
            ("[notify]\nresend_interval = \"6min\"", "notify.resend_interval: must be 1s to 5min"),
            (
                "[[alertmanager]]\nurl = \"tcp://a\"",
                "alertmanager[0].url: `tcp://a` must begin with http:// or https://",
            ),
            (
                "[[alertmanager]]\nurl = \"http://u:p@a\"",
                "alertmanager[0].url: must have no user or password in it: they would be logged",
            ),
            (
                "[[alertmanager]]\nurl = \"http://a\"\n[[alertmanager]]\nurl = \"http://a\"",
                "alertmanager[1].url: is listed twice",
            ),
            (
                "[[alertmanager]]\nurl = \"http://a\"\nuser = \"u\"",
                "alertmanager[0].user: and password_file must be set together",
            ),
            (
                "[[webhook]]\nname = \"a/b\"\nurl = \"http://a\"",
                "webhook[0].name: must be made of letters, digits, - and _",
            ),
            ("[[webhook]]\nname = \"a\"", "webhook[0].url: or url_file must be set, and not both"),
            (
                "[[webhook]]\nname = \"a\"\nurl = \"http://a\"\n\
                 [[webhook]]\nname = \"a\"\nurl = \"http://b\"",
                "webhook[1].name: `a` is used twice",
            ),
            (
                "[[webhook]]\nname = \"a\"\nurl = \"http://a\"\nbody = '{\"text\": \"{txt}\"}'",
                "webhook[0].body: `{txt}` is no placeholder; there are {cluster}, {event}, {status}, \
                 {component}, {kind}, {group}, {node}, {check}, {reason}, {next}, {since}, {count}, {text}",
            ),
        ] {
            assert_eq!(problems(text), [expected], "{text}");
        }
    }
}
