//! What Patroni writes about its members: keys in etcd, and answers of its REST API. Read only;
//! what one member wrote wrong hides that member and no other.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Url;
use serde_json::Value;

use super::members::{Member, Opinion, PatroniRole};
use crate::pg::Node;

/// PostgreSQL's port, where a connection URL has none.
const PORT: u16 = 5432;

/// The members that were understood, by group, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// A group without members is one that Patroni knows, but of which no member is there.
    pub(super) groups: BTreeMap<u32, Vec<Member>>,
    /// Which member was not understood, and why.
    pub(super) problems: Vec<String>,
}

/// Reads the keys below `root`, which are `members/<name>`, `leader`, `sync` and others, and
/// with Citus stand below the group's number.
pub(super) fn read_keys(root: &str, entries: &BTreeMap<String, Vec<u8>>) -> Heard {
    let mut heard = Heard::default();
    let text = |key: &str| Some(String::from_utf8_lossy(entries.get(key)?).into_owned());
    for (key, value) in entries {
        let Some((group, folder, rest)) = split_key(root, key) else { continue };
        let members = heard.groups.entry(group).or_default();
        let Some(name) = rest.strip_prefix("members/") else { continue };
        let leader = text(&format!("{folder}leader"));
        let standbys = text(&format!("{folder}sync")).map_or_else(BTreeSet::new, |it| sync(&it));
        match read_member(group, name, value) {
            Ok(mut member) => {
                if let Some(opinion) = &mut member.opinion {
                    opinion.role = match opinion.role {
                        PatroniRole::StandbyLeader => PatroniRole::StandbyLeader,
                        _ if leader.as_deref() == Some(name) => PatroniRole::Leader,
                        _ if standbys.contains(name) => PatroniRole::SyncStandby,
                        _ => PatroniRole::Replica,
                    };
                }
                members.push(member);
            }
            Err(problem) => heard.problems.push(format!("{key}: {problem}")),
        }
    }
    heard
}

/// Group, folder of the group, and the rest of one of Patroni's keys. With Citus they stand below the
/// group's number; without, they are of group 0. Keys that are not below `root` are `None`.
pub fn split_key<'a>(root: &str, key: &'a str) -> Option<(u32, &'a str, &'a str)> {
    let below = key.strip_prefix(root)?;
    let group = below.split_once('/').and_then(|(first, _)| Some((first, first.parse().ok()?)));
    let folder_bytes = root.len() + group.map_or(0, |(first, _)| first.len() + 1);
    let (folder, rest) = key.split_at_checked(folder_bytes)?;
    Some((group.map_or(0, |(_, group)| group), folder, rest))
}

/// The standbys that commits wait for.
fn sync(text: &str) -> BTreeSet<String> {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let names = value["sync_standby"].as_str().unwrap_or_default().split(',');
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn read_member(group: u32, name: &str, value: &[u8]) -> Result<Member, &'static str> {
    let value: Value = serde_json::from_slice(value).map_err(|_| "is no JSON")?;
    // It may hold a password, so it is shown nowhere.
    let url = value["conn_url"].as_str().ok_or("has no conn_url")?;
    let url = Url::parse(url).map_err(|_| "has a conn_url that is no URL")?;
    let host =
        url.host_str().filter(|host| !host.is_empty()).ok_or("has a conn_url without host")?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let node = Node { group, name: name.to_owned(), host, port: url.port().unwrap_or(PORT) };
    let api_url = value["api_url"].as_str().map(str::to_owned);
    Ok(Member { node, api_url, opinion: Some(opinion(&value)) })
}

/// Reads the answer to `GET /cluster`, which tells about one group.
pub(super) fn read_cluster(group: u32, answer: &[u8]) -> Result<Heard, &'static str> {
    let answer: Value = serde_json::from_slice(answer).map_err(|_| "answers no JSON")?;
    let listed = answer["members"].as_array().ok_or("answers without members")?;
    let mut heard = Heard::default();
    let members = heard.groups.entry(group).or_default();
    for value in listed {
        let name = value["name"].as_str().unwrap_or_default();
        let host = value["host"].as_str().unwrap_or_default();
        let port = value["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        match port {
            Some(port) if !name.is_empty() && !host.is_empty() => {
                let [name, host] = [name, host].map(str::to_owned);
                let node = Node { group, name, host, port };
                let api_url = value["api_url"].as_str().map(str::to_owned);
                members.push(Member { node, api_url, opinion: Some(opinion(value)) });
            }
            _ => heard.problems.push(format!("member `{name}` has no host or port")),
        }
    }
    Ok(heard)
}

/// Reads the answer to `GET /patroni`, which tells about that member alone; `None` if it is
/// another member's.
pub(super) fn read_patroni(name: &str, answer: &[u8]) -> Option<Opinion> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    (answer["patroni"]["name"].as_str()? == name).then(|| opinion(&answer))
}

/// Names and meanings differ a little between the three sources; here they are one.
fn opinion(value: &Value) -> Opinion {
    let text = |key: &str| value[key].as_str();
    let is_set = |key: &str| value[key].as_bool() == Some(true);
    let role = match text("role") {
        Some("leader" | "primary" | "master") => PatroniRole::Leader,
        Some("standby_leader") => PatroniRole::StandbyLeader,
        Some("sync_standby" | "quorum_standby") => PatroniRole::SyncStandby,
        _ if is_set("sync_standby") || is_set("quorum_standby") => PatroniRole::SyncStandby,
        _ => PatroniRole::Replica,
    };
    let state = match (text("state"), text("replication_state")) {
        // So `GET /cluster` shows it as well.
        (Some("running"), Some(state)) => state,
        (state, _) => state.unwrap_or("unknown"),
    };
    Opinion {
        role,
        state: state.to_owned(),
        timeline: value["timeline"].as_u64().and_then(|it| u32::try_from(it).ok()),
        // May also be the text "unknown".
        lag_bytes: value["lag"].as_u64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/service/mesh/";

    fn keys(entries: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        let own =
            |(key, value): &(&str, &str)| (format!("{ROOT}{key}"), value.as_bytes().to_owned());
        entries.iter().map(own).collect()
    }

    /// `group name host:port role state timeline lag` of each.
    fn shown(heard: &Heard) -> Vec<String> {
        let members = heard.groups.values().flatten();
        members
            .map(|Member { node, opinion, .. }| {
                let Opinion { role, state, timeline, lag_bytes } = opinion.clone().unwrap();
                let Node { group, name, host, port } = node;
                format!("{group} {name} {host}:{port} {role:?} {state} {timeline:?} {lag_bytes:?}")
            })
            .collect()
    }

    /// As Patroni 4.0.7 writes it.
    const P1: &str = r#"{"conn_url":"postgres://127.0.0.1:5431/postgres",
        "api_url":"http://127.0.0.1:8001/patroni","state":"running","role":"primary",
        "version":"4.0.7","xlog_location":50331648,"timeline":1}"#;
    const P2: &str = r#"{"conn_url":"postgres://127.0.0.1:5432/postgres",
        "api_url":"http://127.0.0.1:8002/patroni","state":"running","role":"replica",
        "version":"4.0.7","xlog_location":50331648,"replication_state":"streaming","timeline":1}"#;
    const CLONING: &str = r#"{"conn_url":"postgres://[fd00::3]/postgres","api_url":"",
        "state":"creating replica","role":"uninitialized","version":"4.0.7"}"#;

    #[test]
    fn members_are_read_from_the_keys() {
        let heard = read_keys(
            ROOT,
            &keys(&[
                ("config", "{\"ttl\":20}"),
                ("initialize", "7710523352247214130"),
                ("leader", "p1"),
                ("members/p1", P1),
                ("members/p2", P2),
                ("members/p3", CLONING),
                ("status", "{}"),
            ]),
        );
        assert_eq!(
            shown(&heard),
            [
                "0 p1 127.0.0.1:5431 Leader running Some(1) None",
                "0 p2 127.0.0.1:5432 Replica streaming Some(1) None",
                "0 p3 fd00::3:5432 Replica creating replica None None",
            ]
        );
        assert_eq!(heard.problems, [""; 0]);
        let api_url = heard.groups[&0][0].api_url.as_deref();
        assert_eq!(api_url, Some("http://127.0.0.1:8001/patroni"));
    }

    #[test]
    fn with_citus_each_folder_is_a_group_with_its_own_leader() {
        let sync = r#"{"leader":"p1","quorum":0,"sync_standby":"p2"}"#;
        let heard = read_keys(
            ROOT,
            &keys(&[
                ("0/leader", "p1"),
                ("0/members/p1", P1),
                ("0/members/p2", P2),
                ("0/sync", sync),
                ("1/leader", "p2"),
                ("1/members/p2", P2),
                ("2/initialize", "77"),
            ]),
        );
        assert_eq!(
            shown(&heard),
            [
                "0 p1 127.0.0.1:5431 Leader running Some(1) None",
                "0 p2 127.0.0.1:5432 SyncStandby streaming Some(1) None",
                "1 p2 127.0.0.1:5432 Leader streaming Some(1) None",
            ]
        );
        assert_eq!(heard.groups[&2], [], "a group without members is known to exist");
    }

    /// A member's role as it wrote it may be older than the leader key.
    #[test]
    fn the_leader_key_decides_who_leads() {
        let heard =
            read_keys(ROOT, &keys(&[("leader", "p2"), ("members/p1", P1), ("members/p2", P2)]));
        let roles = heard.groups[&0].iter().map(|it| it.opinion.as_ref().unwrap().role);
        assert_eq!(roles.collect::<Vec<_>>(), [PatroniRole::Replica, PatroniRole::Leader]);
        let standby = P1.replace("\"primary\"", "\"standby_leader\"");
        let heard = read_keys(ROOT, &keys(&[("leader", "p1"), ("members/p1", &standby)]));
        let role = heard.groups[&0][0].opinion.as_ref().unwrap().role;
        assert_eq!(role, PatroniRole::StandbyLeader);
    }

    #[test]
    fn garbage_hides_one_member_and_is_named() {
        let secret = r#"{"conn_url":"postgres://u:hunter2@/postgres"}"#;
        let heard = read_keys(
            ROOT,
            &keys(&[
                ("leader", "p1"),
                ("members/a", "garbage"),
                ("members/b", "[]"),
                ("members/c", r#"{"conn_url":"nonsense"}"#),
                ("members/d", secret),
                ("members/p1", P1),
                ("sync", "garbage"),
            ]),
        );
        assert_eq!(shown(&heard), ["0 p1 127.0.0.1:5431 Leader running Some(1) None"]);
        assert_eq!(
            heard.problems,
            [
                "/service/mesh/members/a: is no JSON",
                "/service/mesh/members/b: has no conn_url",
                "/service/mesh/members/c: has a conn_url that is no URL",
                "/service/mesh/members/d: has a conn_url that is no URL",
            ]
        );
    }

    #[test]
    fn members_are_read_from_the_rest_api() {
        let answer = r#"{"members": [
            {"name": "a1", "role": "leader", "state": "running",
             "api_url": "http://a1:8008/patroni", "host": "a1", "port": 5432, "timeline": 1},
            {"name": "a2", "role": "quorum_standby", "state": "streaming", "host": "a2",
             "port": 5432, "timeline": 1, "lag": 4096},
            {"name": "a3", "role": "replica", "state": "stopped", "host": "a3", "port": 5432,
             "lag": "unknown"},
            {"name": "a4", "role": "replica"}], "scope": "mesh"}"#;
        let heard = read_cluster(3, answer.as_bytes()).unwrap();
        assert_eq!(
            shown(&heard),
            [
                "3 a1 a1:5432 Leader running Some(1) None",
                "3 a2 a2:5432 SyncStandby streaming Some(1) Some(4096)",
                "3 a3 a3:5432 Replica stopped None None",
            ]
        );
        assert_eq!(heard.problems, ["member `a4` has no host or port"]);
        assert_eq!(read_cluster(0, b"<html>"), Err("answers no JSON"));
        assert_eq!(read_cluster(0, b"{}"), Err("answers without members"));
    }

    #[test]
    fn a_member_speaks_for_itself_only() {
        let answer = br#"{"state": "running", "role": "replica", "timeline": 4,
            "replication_state": "streaming", "sync_standby": true,
            "patroni": {"version": "4.0.7", "scope": "mesh", "name": "p2"}}"#;
        let opinion = read_patroni("p2", answer).unwrap();
        assert_eq!(
            opinion,
            Opinion {
                role: PatroniRole::SyncStandby,
                state: "streaming".to_owned(),
                timeline: Some(4),
                lag_bytes: None,
            }
        );
        assert_eq!(read_patroni("p1", answer), None);
        assert_eq!(read_patroni("p1", b"{}"), None);
    }
}
