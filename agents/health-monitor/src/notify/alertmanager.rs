//! Tells every Alertmanager what fires, and again and again as long as it does.
//!
//! An alert is its labels: they hold nothing that changes while a problem lasts, but the severity, whose
//! change ends one alert and begins another. Source: Alertmanager's documentation, "Alerts API".

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;

use super::Context;
use super::alerts::{Picture, Problem, Severity, Subject};
use super::config::AlertmanagerConfig;
use super::delivery::Kind;
use super::kept::{Kept, RETRY};
use super::ledger::{Event, Ledger, Told};
use super::post::{self, Post, PostSetupError};
use super::store::json;

/// An alert that fires lasts for so many times the interval, unless it is sent again.
const LASTS: u32 = 4;
/// How long an alert that is over is still sent. Source: Prometheus' `resolvedRetention`.
const RESOLVED_FOR: Duration = Duration::from_mins(15);
/// So many of those, the newest.
const RESOLVED_MAX: usize = 500;

/// What fires, and what did a short time ago.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Book {
    firing: Ledger,
    resolved: Vec<Resolved>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Resolved {
    #[serde(flatten)]
    told: Told,
    ended_at: DateTime<Utc>,
}

/// As the API takes it.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Alert<'a> {
    labels: BTreeMap<&'static str, String>,
    annotations: BTreeMap<&'static str, &'a str>,
    starts_at: DateTime<Utc>,
    ends_at: DateTime<Utc>,
}

impl Book {
    /// Takes how things stand; returns whether an alert began or ended.
    fn take(&mut self, picture: &Picture, now: DateTime<Utc>) -> bool {
        let due = self.firing.due(picture, now);
        for notice in &due {
            let known = self.firing.get_mut(&notice.subject).cloned();
            let begins = match notice.event {
                Event::Began => Some(notice.problem.since),
                Event::Changed { .. } => Some(now),
                Event::Flapping | Event::Ended { .. } | Event::Unwatched { .. } => None,
            };
            if let Some(problem) = known.filter(|_| notice.event != Event::Flapping) {
                let told = Told { subject: notice.subject.clone(), problem };
                let ended_at = now.max(told.problem.since);
                self.resolved.push(Resolved { told, ended_at });
            }
            self.firing.note(notice);
            if let Some(since) = begins {
                if let Some(problem) = self.firing.get_mut(&notice.subject) {
                    problem.since = since;
                }
                let severity = notice.problem.severity;
                // It fires again: two of the same labels would contradict each other.
                self.resolved.retain(|Resolved { told, .. }| {
                    told.subject != notice.subject || told.problem.severity != severity
                });
            }
        }
        self.firing.refresh(picture);
        self.resolved.retain(|it| now < it.ended_at + RESOLVED_FOR);
        let surplus = self.resolved.len().saturating_sub(RESOLVED_MAX);
        self.resolved.drain(..surplus);
        !due.is_empty()
    }

    /// What is sent at `now`; `None` if there is nothing.
    fn body(&self, cluster: &str, interval: Duration, now: DateTime<Utc>) -> Option<String> {
        let firing = self.firing.iter().map(|(subject, problem)| {
            let ends_at = (now + interval * LASTS).max(problem.since);
            alert(cluster, subject, problem, ends_at)
        });
        let is_recent = |it: &&Resolved| now < it.ended_at + RESOLVED_FOR;
        let resolved = self.resolved.iter().filter(is_recent).map(|it| {
            let Told { subject, problem } = &it.told;
            alert(cluster, subject, problem, it.ended_at)
        });
        let alerts: Vec<_> = firing.chain(resolved).collect();
        (!alerts.is_empty()).then(|| json(&alerts))
    }
}

fn alert<'a>(
    cluster: &str,
    subject: &Subject,
    problem: &'a Problem,
    ends_at: DateTime<Utc>,
) -> Alert<'a> {
    let mut annotations = BTreeMap::from([("summary", problem.reason.as_str())]);
    if !problem.next.is_empty() {
        annotations.insert("next_step", &problem.next);
    }
    if problem.is_flapping {
        annotations
            .insert("flapping", "it keeps changing, and is told of at its worst until it is calm");
    }
    let labels = labels(cluster, subject, problem.severity);
    Alert { labels, annotations, starts_at: problem.since, ends_at }
}

/// What an alert is known by; what does not apply is left out.
fn labels(cluster: &str, subject: &Subject, severity: Severity) -> BTreeMap<&'static str, String> {
    let Subject { component, check } = subject;
    let mut labels = BTreeMap::from([
        ("alertname", alert_name(check)),
        ("cluster", cluster.to_owned()),
        ("component", component.kind.name().to_owned()),
        ("check", check.clone()),
        ("severity", severity.name().to_owned()),
    ]);
    if let Some(group) = component.group {
        labels.insert("group", group.to_string());
    }
    if !component.name.is_empty() {
        labels.insert("node", component.name.clone());
    }
    labels
}

/// `PgmeshSplitBrain` for `split_brain`.
fn alert_name(check: &str) -> String {
    let mut name = "Pgmesh".to_owned();
    for word in check.split('_') {
        let mut letters = word.chars();
        name.extend(letters.next().map(|it| it.to_ascii_uppercase()));
        name.push_str(letters.as_str());
    }
    name
}

/// All peers of an Alertmanager, and what they are told.
#[derive(Debug)]
pub(super) struct Alertmanager {
    book: Kept<Book>,
    peers: Vec<Peer>,
    interval: Duration,
}

#[derive(Debug)]
struct Peer {
    url: String,
    post: Post,
}

impl Alertmanager {
    /// Reads the files that the entries name.
    pub(super) fn new(
        configs: &[AlertmanagerConfig],
        interval: Duration,
    ) -> Result<Self, PostSetupError> {
        let peer = |(index, config): (usize, &AlertmanagerConfig)| {
            let key = |name: &str| format!("alertmanager[{index}].{name}");
            let base = config.url.trim_end_matches('/');
            let url = post::address(&format!("{base}/api/v2/alerts"), || key("url"))?;
            let password = config.password_file.as_ref();
            let password =
                password.map(|it| post::secret(it, || key("password_file"))).transpose()?;
            let post = Post::new(&url, config.ca_file.as_deref(), || key("ca_file"))?;
            let post = post.with_login(config.user.clone().zip(password));
            Ok(Peer { url: config.url.clone(), post })
        };
        let peers = configs.iter().enumerate().map(peer).collect::<Result<_, _>>()?;
        Ok(Self { book: Kept::new("told/alertmanager".to_owned()), peers, interval })
    }

    /// The peers' addresses.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.peers.iter().map(|it| it.url.as_str())
    }

    /// Tells all peers until shutdown. May be dropped at any await: what is sent twice is the same alert.
    pub(super) async fn run(&mut self, context: &Context, goes_on: bool) {
        if self.peers.is_empty() {
            return;
        }
        if !goes_on {
            self.book.begin(&context.store).await;
        }
        let (publish, shown) = watch::channel(self.book.value.clone());
        let interval = self.interval;
        let peers = self.peers.iter().map(|it| it.run(context, interval, shown.clone()));
        tokio::join!(keep(&mut self.book, context, publish), join_all(peers));
    }
}

/// Keeps the book, and publishes it when an alert begins or ends.
async fn keep(book: &mut Kept<Book>, context: &Context, publish: watch::Sender<Book>) {
    let mut pictures = context.pictures.clone();
    loop {
        let is_news = book.value.take(&pictures.borrow_and_update(), Utc::now());
        // Other words are sent with the next round.
        publish.send_if_modified(|shown| {
            book.value.clone_into(shown);
            is_news
        });
        if is_news || book.is_ahead() {
            book.save(&context.store).await;
        }
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            Ok(()) = pictures.changed() => {}
            () = sleep(RETRY), if book.is_ahead() => {}
        }
    }
}

impl Peer {
    async fn run(&self, context: &Context, interval: Duration, mut shown: watch::Receiver<Book>) {
        let mut failures = 0;
        loop {
            let body = shown.borrow_and_update().body(&context.cluster, interval, Utc::now());
            let wait = match body {
                None => {
                    failures = 0;
                    None
                }
                Some(body) => {
                    let outcome = self.post.send(body).await;
                    failures = if outcome.is_ok() { 0 } else { failures + 1 };
                    context.board.delivered((Kind::Alertmanager, &self.url), outcome);
                    Some(if failures == 0 { interval } else { post::wait(failures).min(interval) })
                }
            };
            tokio::select! {
                () = context.shutdown.cancelled() => return,
                () = sleep(wait.unwrap_or_default()), if wait.is_some() => {}
                // One that fails is not asked more often because there is news.
                changed = shown.changed(), if failures == 0 => if changed.is_err() { return },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::alerts::tests::{at, firing, problem_at, subject};
    use super::super::alerts::{Hold, Standing};
    use super::*;
    use crate::component::Component;

    const MINUTE: Duration = Duration::from_mins(1);

    fn sent(book: &Book, second: i64) -> Value {
        let body = book.body("demo", MINUTE, at(second).wall);
        body.map_or(Value::Null, |it| serde_json::from_str(&it).unwrap())
    }

    /// `severity from-until` of each alert, in seconds.
    fn short(book: &Book, second: i64) -> Vec<String> {
        let alerts = sent(book, second);
        let alerts = alerts.as_array().into_iter().flatten().map(|it| {
            let time = |name: &str| -> i64 {
                let time: DateTime<Utc> = it[name].as_str().unwrap().parse().unwrap();
                (time - at(0).wall).num_seconds()
            };
            let severity = it["labels"]["severity"].as_str().unwrap();
            format!("{severity} {}-{}", time("startsAt"), time("endsAt"))
        });
        alerts.collect()
    }

    #[test]
    fn an_alert_has_what_an_operator_routes_by() {
        let mut book = Book::default();
        let problem = problem_at(Severity::Critical, 5);
        assert!(book.take(&firing(&[(subject("a", "split_brain"), problem)]), at(7).wall));
        assert_eq!(
            sent(&book, 10),
            json!([{
                "labels": {
                    "alertname": "PgmeshSplitBrain", "cluster": "demo", "component": "postgres",
                    "group": "1", "node": "a", "check": "split_brain", "severity": "critical",
                },
                "annotations": { "summary": "no connection: refused", "next_step": "look at it" },
                "startsAt": "2027-01-15T08:00:05Z",
                "endsAt": "2027-01-15T08:04:10Z",
            }])
        );
        let isolation = Subject { component: Component::cluster(), check: "isolation".to_owned() };
        let labels = labels("demo", &isolation, Severity::Warning);
        assert!(!labels.contains_key("group") && !labels.contains_key("node"), "{labels:?}");
    }

    #[test]
    fn a_change_of_severity_ends_one_alert_and_begins_another() {
        let (warning, critical) = (Severity::Warning, Severity::Critical);
        let one = |severity| firing(&[(subject("a", "x"), problem_at(severity, 5))]);
        let held = Picture {
            standings: BTreeMap::from([(subject("a", "x"), Standing::Held(Hold::Silenced))]),
            ..firing(&[])
        };
        let mut book = Book::default();
        let mut step = |picture: &Picture, second: i64| {
            book.take(picture, at(second).wall);
            short(&book, second)
        };
        assert_eq!(step(&one(warning), 10), ["warning 5-250"]);
        assert_eq!(step(&one(warning), 70), ["warning 5-310"]);
        assert_eq!(step(&one(critical), 80), ["critical 80-320", "warning 5-80"]);
        assert_eq!(step(&held, 85), ["critical 80-325", "warning 5-80"]);
        assert_eq!(step(&one(warning), 90), ["warning 90-330", "critical 80-90"]);
        assert_eq!(step(&firing(&[]), 100), ["critical 80-90", "warning 90-100"]);
        assert_eq!(step(&one(critical), 110), ["critical 5-350", "warning 90-100"]);
        assert_eq!(step(&firing(&[]), 120), ["warning 90-100", "critical 5-120"]);
        assert_eq!(step(&firing(&[]), 1010), ["critical 5-120"]);
        assert_eq!(step(&firing(&[]), 1020), Vec::<String>::new());
    }

    #[test]
    fn nothing_ends_before_it_begins_whatever_the_clocks_say() {
        let mut book = Book::default();
        let picture = firing(&[(subject("a", "x"), problem_at(Severity::Warning, 500))]);
        book.take(&picture, at(10).wall);
        assert_eq!(short(&book, 10), ["warning 500-500"]);
        book.take(&firing(&[]), at(20).wall);
        assert_eq!(short(&book, 20), ["warning 500-500"]);
    }

    #[test]
    fn other_words_are_no_news_but_are_sent() {
        let mut book = Book::default();
        let mut problem = problem_at(Severity::Warning, 5);
        assert!(book.take(&firing(&[(subject("a", "x"), problem.clone())]), at(7).wall));
        problem.reason = "92 of 97 connections are in use".to_owned();
        assert!(!book.take(&firing(&[(subject("a", "x"), problem)]), at(8).wall));
        let summary = &sent(&book, 9)[0]["annotations"]["summary"];
        assert_eq!(summary, "92 of 97 connections are in use");
    }

    #[test]
    fn alerts_are_named_after_checks() {
        for (check, expected) in [
            ("reachable", "PgmeshReachable"),
            ("split_brain", "PgmeshSplitBrain"),
            ("etcd_quorum", "PgmeshEtcdQuorum"),
        ] {
            assert_eq!(alert_name(check), expected);
        }
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let mut book = Book::default();
        let picture = firing(&[(subject("a", "x"), problem_at(Severity::Warning, 5))]);
        book.take(&picture, at(7).wall);
        book.take(&firing(&[(subject("b", "x"), problem_at(Severity::Warning, 5))]), at(8).wall);
        let text = json(&book);
        assert_eq!(serde_json::from_str::<Book>(&text).unwrap(), book);
    }
}
