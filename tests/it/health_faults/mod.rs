//! Each fault for real, while the health monitor runs as in production but faster: it is named within
//! two intervals of what is asked, nothing else turns red, and it ends when the fault ends.
//!
//! One cluster goes through many faults in a row. No check of a component may fail a third time before the
//! monitor is started anew: it would flap, as it should.

mod agents;
mod cluster;
mod plain;

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::monitor::{Monitor, words, wrong};

/// How often each component is asked.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The standard questions are asked each tenth time.
const STANDARD: Duration = Duration::from_secs(5);
/// How often what changes slowly is asked.
const DEEP: Duration = Duration::from_secs(1);
/// What this machine may take longer under load.
const SLACK: Duration = Duration::from_millis(2500);
/// Longest wait for a fault to be named, or to be over.
const LIMIT: Duration = Duration::from_mins(1);

/// The keys outside of tables.
const KEYS: &str = "interval = \"500ms\"\ntimeout = \"1s\"\ncomprehensive_interval = \"1s\"\n";

/// When a fault shows in a check, at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Within two intervals.
    Each,
    /// Within two intervals, and two questions to which there is no answer.
    Hang,
    /// Within two intervals of the standard questions.
    Standard,
    /// Within two intervals of what changes slowly.
    Deep,
    /// Within two intervals, after what it takes until it is so.
    After(Duration),
    /// It may show, for a moment or for good: it follows from the fault.
    May,
}
use When::{After, Deep, Each, Hang, May, Standard};

impl When {
    fn limit(self) -> Duration {
        match self {
            Self::Each => 2 * INTERVAL,
            Self::Hang => 2 * (INTERVAL + TIMEOUT),
            Self::Standard => 2 * STANDARD,
            Self::Deep => 2 * DEEP,
            Self::After(wait) => wait + 2 * INTERVAL,
            Self::May => LIMIT,
        }
    }
}

/// A fault, with all that it shows in.
struct Fault<'a> {
    monitor: &'a Monitor,
    name: &'a str,
    signs: &'a [(When, &'a str)],
    began_at: DateTime<Utc>,
}

/// Waits until all is well: what is done next is a fault that shows in `signs` and nowhere else.
async fn begin<'a>(monitor: &'a Monitor, name: &'a str, signs: &'a [(When, &'a str)]) -> Fault<'a> {
    well(monitor, &format!("before {name}")).await;
    Fault { monitor, name, signs, began_at: Utc::now() }
}

async fn well(monitor: &Monitor, when: &str) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let wrong = monitor.wrong().await;
        if wrong.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{when}: {wrong:#?}\n{}", monitor.log());
        sleep(Duration::from_millis(50)).await;
    }
}

impl Fault<'_> {
    /// The fault is there only now: what came before was on the way to it.
    fn now(&mut self) {
        self.began_at = Utc::now();
    }

    /// Waits until all of it is told, and nothing else, and checks how soon it was.
    #[expect(clippy::print_stdout, reason = "how soon each fault is named is worth to be read")]
    async fn told(&self) {
        let known: BTreeSet<&str> = self.signs.iter().map(|(_, sign)| *sign).collect();
        let needed: Vec<_> = self.signs.iter().filter(|(when, _)| *when != May).collect();
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            let status = self.monitor.status().await;
            let wrong = wrong(&status);
            let strange: Vec<_> = wrong.iter().filter(|it| !known.contains(it.as_str())).collect();
            if needed.iter().all(|(_, sign)| wrong.contains(*sign)) && strange.is_empty() {
                break status;
            }
            let late = deadline < Instant::now();
            assert!(!late, "{}: {wrong:#?}\n{}", self.name, self.monitor.log());
            sleep(Duration::from_millis(50)).await;
        };
        let changes = self.changes(&status);
        for (when, sign) in needed {
            let at = changes.iter().rev().find(|(_, it)| it == sign).map(|(at, _)| *at);
            let at = at.unwrap_or_else(|| panic!("{}: {sign} was so before", self.name));
            let after = (at - self.began_at).to_std().unwrap_or_default();
            println!("{:>6} ms  {}: {sign}", after.as_millis(), self.name);
            let limit = when.limit() + SLACK;
            assert!(after < limit, "{}: {sign} after {after:?}, not {limit:?}", self.name);
        }
    }

    /// Waits until nothing is wrong any more, and checks that nothing else ever was.
    async fn over(self) {
        well(self.monitor, &format!("after {}", self.name)).await;
        let status = self.monitor.status().await;
        let changes = self.changes(&status);
        let is_known = |words: &String| {
            words.ends_with(" ok") || self.signs.iter().any(|(_, sign)| sign == words)
        };
        let strange: Vec<_> = changes.iter().filter(|(_, words)| !is_known(words)).collect();
        assert!(strange.is_empty(), "{}: {strange:#?}\n{}", self.name, self.monitor.log());
    }

    /// What changed since the fault began, the newest first, in words.
    fn changes(&self, status: &Value) -> Vec<(DateTime<Utc>, String)> {
        let events = status["events"].as_array().unwrap().iter();
        let changes = events.filter(|it| it["event"] != "failover").map(|it| {
            let at = it["at"].as_str().unwrap().parse().unwrap();
            // One that begins to flap has no status, and is no sign of any fault.
            (at, words(&it["component"], &it["check"], &it["to"]))
        });
        changes.take_while(|(at, _)| self.began_at <= *at).collect()
    }
}
