//! What the members of etcd say, and what it comes to: for each, and for all together.

use std::collections::BTreeMap;

use super::silent::no_answer;
use super::words::{bytes, percent};
use crate::catalogue::{ETCD, ETCD_HEALTH, ETCD_QUORUM, ETCD_SIZE};
use crate::check::{Reading, Status};
use crate::component::Component;
use crate::facts::{Of, Seen};
use crate::probe::etcd::EtcdFacts;
use crate::thresholds::Scale;

/// The quota of a member that does not say it.
/// Source: `--quota-backend-bytes` in etcd's configuration options.
const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;

/// The readings of one member.
pub fn judge(component: &Component, seen: &Seen<EtcdFacts>, scale: Scale<'_>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&ETCD, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    vec![reachable(facts), health(facts), size(component, facts, scale)]
}

fn reachable(facts: &EtcdFacts) -> Reading {
    let does = match facts.leader_id {
        Some(leader) if leader == facts.member_id => "leads",
        _ if facts.is_learner => "learns, and does not vote",
        _ => "follows",
    };
    Reading::new(&ETCD, Status::Ok, format!("etcd {} {does}", facts.version))
}

fn health(facts: &EtcdFacts) -> Reading {
    let own = facts.alarms.iter().find(|alarm| alarm.member_id == facts.member_id);
    if let Some(alarm) = own {
        let reason = match alarm.name.as_str() {
            "NOSPACE" => "its database has reached its quota (NOSPACE)".to_owned(),
            "CORRUPT" => "its data are not those of the other members (CORRUPT)".to_owned(),
            other => format!("it has raised the alarm {other}"),
        };
        let reading = Reading::new(&ETCD_HEALTH, Status::Critical, reason);
        return match alarm.name.as_str() {
            "CORRUPT" => reading.with_next("replace the member: remove it and add it anew, empty"),
            _ => reading,
        };
    }
    if facts.leader_id.is_none() {
        let reason = "it knows no leader: it does not reach a majority of the members";
        return Reading::new(&ETCD_HEALTH, Status::Critical, reason)
            .with_next("see the check etcd_quorum; if that is well, the network of this member");
    }
    Reading::new(&ETCD_HEALTH, Status::Ok, "it has a leader, and no alarm")
}

fn size(component: &Component, facts: &EtcdFacts, scale: Scale<'_>) -> Reading {
    let quota = facts.quota_bytes.unwrap_or(DEFAULT_QUOTA_BYTES);
    let which = if facts.quota_bytes.is_some() { "its quota" } else { "the default quota" };
    let reason = format!("{} of {which}, {}", bytes(facts.db_bytes), bytes(quota));
    let used = percent(facts.db_bytes, quota);
    scale.judge(component, &ETCD_SIZE, ("used", used, None), reason)
}

/// Whether the members together can decide; `None` where there are none.
pub fn judge_quorum(known: &Of<EtcdFacts>) -> Option<Reading> {
    if known.is_empty() {
        return None;
    }
    let answers: Vec<&EtcdFacts> = known.values().filter_map(Seen::now).collect();
    // Who votes is what the member says that has got furthest; of those silent now, what they said.
    let said = known.values().filter_map(|seen| seen.answer.as_ref().map(|it| &it.facts));
    let members = said.max_by_key(|it| it.raft_term).map(|it| &it.voters);
    let count = members.map(BTreeMap::len).filter(|count| *count != 0).unwrap_or(known.len());
    let quorum = count / 2 + 1;
    let reading = |status, reason| Some(Reading::new(&ETCD_QUORUM, status, reason));
    if answers.is_empty() {
        let missing = missing(known, members, &answers);
        if known.values().any(Seen::is_not_asked) {
            return reading(Status::Unknown, "not all members were asked".to_owned());
        }
        let reason = format!("none of {count} members answers: {missing}");
        return reading(Status::Critical, reason);
    }
    let alarm = answers.iter().flat_map(|it| &it.alarms).next();
    if let Some(alarm) = alarm {
        let name = members.and_then(|it| it.get(&alarm.member_id));
        let name = name.cloned().unwrap_or_else(|| format!("{:x}", alarm.member_id));
        let reason = format!("etcd refuses what would change it: {} of {name}", alarm.name);
        return reading(Status::Critical, reason);
    }
    let Some(agreeing) = agreeing(&answers) else {
        let answer = answers.len();
        let reason = format!("{answer} of {count} members answer, and none of them has a leader");
        return reading(Status::Critical, reason);
    };
    if agreeing == count {
        let reason =
            if count == 1 { "the one member leads" } else { "all members agree on a leader" };
        return reading(Status::Ok, format!("{reason}, {count} of {count}"));
    }
    let missing = missing(known, members, &answers);
    let found = format!("{agreeing} of {count} members agree on a leader, {missing}");
    if agreeing < quorum {
        // Without a majority behind it the leader would have given up by now.
        let reason = format!("{found}; a majority is there, and out of this monitor's reach");
        return reading(Status::Warning, reason);
    }
    let spare = agreeing - quorum;
    let status = if spare == 0 { Status::Warning } else { Status::Ok };
    let rest = match spare {
        0 => "one more loss stops it".to_owned(),
        _ => format!("it can lose {spare} more"),
    };
    reading(status, format!("{found}; {rest}"))
}

/// How many voters agree on the leader that most of them name, if one is named.
fn agreeing(answers: &[&EtcdFacts]) -> Option<usize> {
    let mut followers: BTreeMap<u64, usize> = BTreeMap::new();
    for answer in answers.iter().filter(|it| !it.is_learner) {
        if let Some(leader) = answer.leader_id {
            *followers.entry(leader).or_default() += 1;
        }
    }
    followers.into_values().max()
}

/// `without etcd-2, etcd-3`: the voters that did not answer, or do not agree.
fn missing(
    known: &Of<EtcdFacts>,
    members: Option<&BTreeMap<u64, String>>,
    answers: &[&EtcdFacts],
) -> String {
    let has_leader =
        |id: &u64| answers.iter().any(|it| it.member_id == *id && it.leader_id.is_some());
    let mut names: Vec<String> = if let Some(members) = members.filter(|it| !it.is_empty()) {
        members.iter().filter(|(id, _)| !has_leader(id)).map(|(_, name)| name.clone()).collect()
    } else {
        let silent = known.iter().filter(|(_, seen)| seen.failure.is_some());
        silent.map(|(component, _)| component.name.clone()).collect()
    };
    names.sort();
    let more = names.len().saturating_sub(3);
    names.truncate(3);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("without {}{more}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use shared::etcd::MemberAlarm;

    use super::super::examples::{answered, failed, scale};
    use super::*;
    use crate::component::Kind;
    use crate::facts::Stage;

    /// Member `id` of so many, that follows that leader.
    fn member(id: u64, count: u64, leader_id: Option<u64>) -> EtcdFacts {
        EtcdFacts {
            member_id: id,
            leader_id,
            is_learner: false,
            raft_term: 2,
            version: "3.5.16".to_owned(),
            db_bytes: 64 << 20,
            quota_bytes: None,
            alarms: Vec::new(),
            voters: (1..=count).map(|id| (id, format!("etcd-{id}"))).collect(),
        }
    }

    fn silent() -> Seen<EtcdFacts> {
        failed(Stage::Dial, "no connection: Connection refused")
    }

    fn quorum(members: Vec<Seen<EtcdFacts>>) -> Option<(Status, String)> {
        let component =
            |index| Component::new(Kind::Etcd, format!("http://etcd-{}:2379", index + 1));
        let known = members.into_iter().enumerate();
        let known = known.map(|(index, seen)| (component(index), seen)).collect();
        judge_quorum(&known).map(|it| (it.status, it.reason))
    }

    #[test]
    fn a_majority_that_agrees_is_counted() {
        let led = |id, count| answered(member(id, count, Some(1)));
        let lost = |id, count| answered(member(id, count, None));
        let alarmed = |id| {
            let alarms = vec![MemberAlarm { member_id: 2, name: "NOSPACE".to_owned() }];
            answered(EtcdFacts { alarms, ..member(id, 3, Some(1)) })
        };
        for (members, status, reason) in [
            (vec![led(1, 1)], Status::Ok, "the one member leads, 1 of 1"),
            (
                vec![led(1, 3), led(2, 3), led(3, 3)],
                Status::Ok,
                "all members agree on a leader, 3 of 3",
            ),
            (
                vec![led(1, 3), led(2, 3), silent()],
                Status::Warning,
                "2 of 3 members agree on a leader, without etcd-3; one more loss stops it",
            ),
            (
                vec![led(1, 3), led(2, 3), lost(3, 3)],
                Status::Warning,
                "2 of 3 members agree on a leader, without etcd-3; one more loss stops it",
            ),
            (
                vec![led(1, 5), led(2, 5), led(3, 5), led(4, 5), silent()],
                Status::Ok,
                "4 of 5 members agree on a leader, without etcd-5; it can lose 1 more",
            ),
            (
                vec![lost(1, 3), silent(), silent()],
                Status::Critical,
                "1 of 3 members answer, and none of them has a leader",
            ),
            (
                vec![silent(), silent(), silent()],
                Status::Critical,
                "none of 3 members answers: without http://etcd-1:2379, http://etcd-2:2379, \
                 http://etcd-3:2379",
            ),
            (
                vec![led(1, 3), silent(), silent()],
                Status::Warning,
                "1 of 3 members agree on a leader, without etcd-2, etcd-3; a majority is there, \
                 and out of this monitor's reach",
            ),
            (
                vec![alarmed(1), led(2, 3), led(3, 3)],
                Status::Critical,
                "etcd refuses what would change it: NOSPACE of etcd-2",
            ),
            (
                vec![led(1, 3)],
                Status::Warning,
                "1 of 3 members agree on a leader, without etcd-2, etcd-3; a majority is there, \
                 and out of this monitor's reach",
            ),
        ] {
            assert_eq!(quorum(members), Some((status, reason.to_owned())));
        }
        assert_eq!(quorum(Vec::new()), None);
    }

    #[test]
    fn two_halves_that_follow_two_leaders_are_no_majority() {
        let follow = |id, leader| answered(member(id, 4, Some(leader)));
        let (status, reason) =
            quorum(vec![follow(1, 1), follow(2, 1), follow(3, 3), follow(4, 3)]).unwrap();
        assert_eq!(status, Status::Warning);
        assert!(reason.starts_with("2 of 4 members agree on a leader"), "{reason}");
    }

    #[test]
    fn a_learner_does_not_count() {
        let mut learner = member(3, 2, Some(1));
        learner.is_learner = true;
        let led = |id| answered(member(id, 2, Some(1)));
        let found = quorum(vec![led(1), led(2), answered(learner)]);
        assert_eq!(found, Some((Status::Ok, "all members agree on a leader, 2 of 2".to_owned())));
    }

    #[test]
    fn each_member_is_judged_by_what_it_says_of_itself() {
        let component = Component::new(Kind::Etcd, "etcd-1");
        let read = |facts| judge(&component, &answered(facts), scale());
        let status = |readings: &[Reading]| readings.iter().map(|it| it.status).collect::<Vec<_>>();
        let (ok, warning, critical) = (Status::Ok, Status::Warning, Status::Critical);

        let well = read(member(1, 3, Some(1)));
        assert_eq!(status(&well), [ok, ok, ok]);
        assert_eq!(well[0].reason, "etcd 3.5.16 leads");
        assert_eq!(well[2].reason, "64.0 MiB of the default quota, 2.0 GiB");

        let cut_off = read(member(1, 3, None));
        assert_eq!(status(&cut_off), [ok, critical, ok]);

        let mut full = member(1, 3, Some(2));
        full.quota_bytes = Some(100 << 20);
        full.alarms = vec![MemberAlarm { member_id: 1, name: "NOSPACE".to_owned() }];
        let full = read(full);
        assert_eq!(status(&full), [ok, critical, warning]);
        assert_eq!(full[1].reason, "its database has reached its quota (NOSPACE)");

        let mut others = member(1, 3, Some(2));
        others.alarms = vec![MemberAlarm { member_id: 2, name: "CORRUPT".to_owned() }];
        assert_eq!(status(&read(others)), [ok, ok, ok], "that is the other's");

        let refused = judge(&component, &failed(Stage::Login, "it refuses the login: x"), scale());
        assert_eq!(status(&refused), [critical]);
        assert!(refused[0].next_step().contains("password_file"), "{refused:?}");
    }
}
