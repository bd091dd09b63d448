//! Questions to those around the servers: the health monitor, and etcd.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use shared::activity::activities;
use shared::etcd::{Etcd, KeyValue};
use shared::http;
use shared::telemetry::chain;
use shared::topology::split_key;
use tokio::time::timeout;

use super::Observer;
use crate::known::{Known, Unknown};
use crate::surroundings::{Activity, Health, PatroniGroup, Verdict};

/// The health monitor answers from memory.
const HEALTH_LIMIT: Duration = Duration::from_secs(5);
/// Its `/status` has some hundred KiB for hundreds of servers.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The endpoints of etcd are tried one after the other.
const ETCD_LIMIT: Duration = Duration::from_secs(15);

/// What is read of `/status`.
#[derive(Debug, Deserialize)]
struct Status {
    decided_at: Option<DateTime<Utc>>,
    verdict: StatusVerdict,
}

#[derive(Debug, Deserialize)]
struct StatusVerdict {
    status: Health,
    reason: String,
}

impl Observer {
    /// The worst that any replica of the health monitor says.
    pub(super) async fn verdict(&self) -> Option<Known<Verdict>> {
        let (config, client) = self.health.as_ref()?;
        let asked = config.urls.iter().map(|url| ask_monitor(client, url));
        Some(worst(join_all(asked).await))
    }

    /// What other agents do.
    pub(super) async fn activities(&self) -> Option<Known<Vec<Activity>>> {
        let etcd = self.etcd.as_ref()?;
        let root = activities(&self.cluster);
        let entries = list(etcd, &root).await;
        Some(entries.map(|it| it.iter().filter_map(|it| activity(&root, &it.key)).collect()))
    }

    /// What Patroni keeps of each group.
    pub(super) async fn patroni(&self) -> Option<Known<Vec<PatroniGroup>>> {
        let (etcd, root) = (self.etcd.as_ref()?, self.patroni_root.as_ref()?);
        Some(list(etcd, root).await.and_then(|it| patroni_groups(root, &it)))
    }
}

async fn list(etcd: &Etcd, prefix: &str) -> Known<Vec<KeyValue>> {
    match timeout(ETCD_LIMIT, etcd.list(prefix)).await {
        Ok(Ok(listing)) => Ok(listing.entries),
        Ok(Err(error)) => Err(Unknown::because(chain(&error))),
        Err(_) => Err(Unknown::because("etcd does not answer within 15s")),
    }
}

async fn ask_monitor(client: &Client, url: &str) -> Known<Verdict> {
    let asked = async {
        let url = format!("{}/status", url.trim_end_matches('/'));
        let failed = |error: reqwest::Error| Unknown::because(chain(&error.without_url()));
        let answer = client.get(url).send().await.map_err(failed)?;
        if answer.status() != StatusCode::OK {
            return Err(Unknown(format!("its status is {}", answer.status())));
        }
        let body = http::body(answer, ANSWER_BYTES_MAX).await.map_err(failed)?;
        let too_long = || Unknown(format!("it has more than {ANSWER_BYTES_MAX} bytes"));
        read_status(&body.ok_or_else(too_long)?)
    };
    let answer = timeout(HEALTH_LIMIT, asked).await;
    let answer = answer.unwrap_or_else(|_| Err(Unknown::because("no answer within 5s")));
    answer.map_err(|why| Unknown(format!("{url}: {why}")))
}

fn read_status(body: &[u8]) -> Known<Verdict> {
    let status: Status = serde_json::from_slice(body)
        .map_err(|error| Unknown(format!("the answer is not a health monitor's: {error}")))?;
    let decided_at = status.decided_at.ok_or_else(|| Unknown::because("it has not judged yet"))?;
    let StatusVerdict { status: health, reason } = status.verdict;
    Ok(Verdict { health, reason, decided_at })
}

/// The worst verdict, and of those the newest; unknown if none answers.
fn worst(answers: Vec<Known<Verdict>>) -> Known<Verdict> {
    let (answers, unknown): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    let verdicts = answers.into_iter().filter_map(Result::ok);
    verdicts.max_by_key(|it| (it.health, it.decided_at)).ok_or_else(|| {
        let unknown: Vec<_> = unknown.into_iter().filter_map(Result::err).map(|it| it.0).collect();
        Unknown(unknown.join("; "))
    })
}

/// Reads `/pgmesh/<cluster>/activity/<kind>/<group>`.
fn activity(root: &str, key: &str) -> Option<Activity> {
    let below = key.strip_prefix(root)?;
    let (kind, group) = below.split_once('/').unwrap_or((below, ""));
    // What does not tell of which group it is counts for all.
    let group = group.split('/').next().and_then(|it| it.parse().ok());
    Some(Activity { kind: kind.to_owned(), group })
}

/// Reads Patroni's keys: `<root><group>/leader`, or `<root>leader` without Citus.
fn patroni_groups(root: &str, entries: &[KeyValue]) -> Known<Vec<PatroniGroup>> {
    let mut groups = std::collections::BTreeMap::<u32, PatroniGroup>::new();
    for entry in entries {
        let Some((group, _, rest)) = split_key(root, &entry.key) else { continue };
        let it = groups.entry(group).or_insert(PatroniGroup {
            group,
            has_leader: false,
            is_paused: false,
            is_switching: false,
        });
        match rest {
            "leader" => it.has_leader = true,
            "failover" => {
                // An empty one stays behind when it is over.
                let is_empty = matches!(entry.value.trim_ascii(), b"" | b"{}");
                it.is_switching = !is_empty;
            }
            "config" => {
                let config: Value = serde_json::from_slice(&entry.value)
                    .map_err(|_| Unknown(format!("{} is no JSON", entry.key)))?;
                it.is_paused = config["pause"].as_bool().unwrap_or(false);
            }
            _ => {}
        }
    }
    Ok(groups.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str) -> KeyValue {
        KeyValue {
            key: key.to_owned(),
            value: value.as_bytes().to_owned(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        }
    }

    fn verdict(health: Health, second: i64) -> Verdict {
        let decided_at = DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap();
        Verdict { health, reason: format!("{health:?}"), decided_at }
    }

    #[test]
    fn the_status_of_the_health_monitor_is_read() {
        let body = r#"{"cluster": "demo", "decided_at": "2026-03-10T02:00:00Z", "groups": {},
            "verdict": {"status": "warning", "since": null, "reason": "a disk", "next": "look"}}"#;
        let read = read_status(body.as_bytes()).unwrap();
        assert_eq!((read.health, read.reason.as_str()), (Health::Warning, "a disk"));
        for (body, expected) in [
            ("{\"verdict\": {\"status\": \"ok\", \"reason\": \"\"}}", "it has not judged yet"),
            ("<html>", "the answer is not a health monitor's: "),
            (
                "{\"decided_at\": null, \"verdict\": {\"status\": \"fine\", \"reason\": \"\"}}",
                "the answer is not a health monitor's: unknown variant `fine`",
            ),
        ] {
            let why = read_status(body.as_bytes()).unwrap_err().0;
            assert!(why.starts_with(expected), "{why}");
        }
    }

    #[test]
    fn the_worst_verdict_counts_and_of_none_is_unknown() {
        let silent = |url: &str| Err(Unknown(format!("{url}: no answer")));
        for (answers, expected) in [
            (vec![Ok(verdict(Health::Ok, 1)), silent("b")], Ok(verdict(Health::Ok, 1))),
            (
                vec![Ok(verdict(Health::Critical, 1)), Ok(verdict(Health::Ok, 2))],
                Ok(verdict(Health::Critical, 1)),
            ),
            (
                vec![Ok(verdict(Health::Ok, 2)), Ok(verdict(Health::Ok, 1))],
                Ok(verdict(Health::Ok, 2)),
            ),
            (vec![silent("a"), silent("b")], Err(Unknown::because("a: no answer; b: no answer"))),
        ] {
            assert_eq!(worst(answers), expected);
        }
    }

    #[test]
    fn an_activity_is_a_kind_and_a_group() {
        let root = "/pgmesh/demo/activity/";
        for (below, kind, group) in [
            ("backup/1", "backup", Some(1)),
            ("restore/x", "restore", None),
            ("drill", "drill", None),
        ] {
            let found = activity(root, &format!("{root}{below}"));
            assert_eq!(found, Some(Activity { kind: kind.to_owned(), group }));
        }
    }

    #[test]
    fn the_keys_of_patroni_tell_of_leaders_pauses_and_switchovers() {
        let entries = [
            entry("/service/demo/0/config", "{\"ttl\": 30, \"pause\": true}"),
            entry("/service/demo/0/leader", "a1"),
            entry("/service/demo/1/config", "{\"ttl\": 30}"),
            entry("/service/demo/1/failover", "{\"leader\": \"b1\"}"),
            entry("/service/demo/1/leader", "b1"),
            entry("/service/demo/2/failover", "{}"),
            entry("/service/demo/2/members/c1", "{}"),
        ];
        let group = |group, has_leader, is_paused, is_switching| PatroniGroup {
            group,
            has_leader,
            is_paused,
            is_switching,
        };
        let expected = vec![
            group(0, true, true, false),
            group(1, true, false, true),
            group(2, false, false, false),
        ];
        assert_eq!(patroni_groups("/service/demo/", &entries), Ok(expected));
        let without_citus = [entry("/service/demo/leader", "a1")];
        let expected = vec![group(0, true, false, false)];
        assert_eq!(patroni_groups("/service/demo/", &without_citus), Ok(expected));
        let broken = [entry("/service/demo/0/config", "{")];
        let unknown = Unknown::because("/service/demo/0/config is no JSON");
        assert_eq!(patroni_groups("/service/demo/", &broken), Err(unknown));
    }
}
