//! What the components said last. The judges read it; nothing here judges.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;
use std::time::Duration;

use serde::Serialize;

use crate::component::Component;
use crate::probe::agent::AgentFacts;
use crate::probe::disk::DiskFacts;
use crate::probe::etcd::EtcdFacts;
use crate::probe::haproxy::HaproxyFacts;
use crate::probe::patroni::PatroniFacts;
use crate::probe::pgbouncer::PgbouncerFacts;
use crate::probe::postgres::{DeepFacts, PostgresFacts};
use crate::probe::redis::RedisFacts;
use crate::probe::swarm::SwarmFacts;

/// How far a question got before it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Nobody is there: no route, no such name; or the connection broke.
    Dial,
    /// The host is there, and nobody listens.
    Refused,
    /// TLS.
    Tls,
    /// The login was refused.
    Login,
    /// It is there, and takes nobody now: it starts, recovers or stops.
    NotNow,
    /// It is there, and has no connection to spare.
    Full,
    /// The question was refused, or the answer is not one.
    Answer,
    /// There was no answer in time.
    Timeout,
    /// Nobody asked: the fault is ours.
    NotAsked,
}

impl Stage {
    /// How far it got, where there is no connection.
    pub fn of_dial(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            let io = error.downcast_ref::<io::Error>();
            if io.is_some_and(|it| it.kind() == io::ErrorKind::ConnectionRefused) {
                return Self::Refused;
            }
            cause = error.source();
        }
        Self::Dial
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// How far it got.
    pub stage: Stage,
    /// In words, with the causes, without the name of the component.
    pub error: String,
}

/// The outcome of the newest question to a component, and the newest answer.
#[derive(Clone, Debug)]
pub struct Seen<T> {
    /// When the newest outcome was there, by [`clock::now`](crate::clock::now).
    pub at: Duration,
    /// Why it is none, if it is none.
    pub failure: Option<Failure>,
    /// Since when it fails, if it does.
    pub failing_since: Option<Duration>,
    /// The newest answer, and when the question was sent and answered. It outlives failures.
    pub answer: Option<Answer<T>>,
    /// When the connection ended that this answer came on, if that was seen: nothing else ends a primary.
    pub lost_at: Option<Duration>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer<T> {
    /// When the question was sent: what was answered was true after that …
    pub asked_at: Duration,
    /// … and before this.
    pub answered_at: Duration,
    /// What it says.
    pub facts: T,
}

impl<T> Seen<T> {
    /// The newest outcome, if it is an answer.
    pub fn now(&self) -> Option<&T> {
        match (&self.failure, &self.answer) {
            (None, Some(answer)) => Some(&answer.facts),
            _ => None,
        }
    }

    /// Whether nobody asks any more, so that this is not known.
    pub fn is_not_asked(&self) -> bool {
        self.failure.as_ref().is_some_and(|it| it.stage == Stage::NotAsked)
    }
}

/// What is known of one kind of component.
pub type Of<T> = BTreeMap<Component, Seen<T>>;

/// What the components said last. A component that was never asked is not in it.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// PostgreSQL, asked each interval.
    pub postgres: Of<PostgresFacts>,
    /// PostgreSQL, asked for what changes slowly, on a new connection each time.
    pub deep: Of<DeepFacts>,
    /// Patroni.
    pub patroni: Of<PatroniFacts>,
    /// etcd.
    pub etcd: Of<EtcdFacts>,
    /// `PgBouncer`.
    pub pgbouncer: Of<PgbouncerFacts>,
    /// `HAProxy`.
    pub haproxy: Of<HaproxyFacts>,
    /// Redis.
    pub redis: Of<RedisFacts>,
    /// The other agents.
    pub agents: Of<AgentFacts>,
    /// Swarm services: all of them by one question.
    pub swarm: Of<SwarmFacts>,
    /// File systems.
    pub disks: Of<DiskFacts>,
    /// What is watched and was not asked yet: what it would say is missing among the others.
    pub unasked: BTreeSet<Component>,
    /// Who belongs to the cluster; of listed servers there is nothing to know.
    pub membership: Option<Membership>,
}

/// Who belongs to Patroni's cluster, and how well that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// Why it is not known, or not all of it: what is watched may not be everything.
    pub unknown: Option<String>,
    /// It is too early to complain of that.
    pub is_early: bool,
    /// Groups that Patroni knows, and of which nobody is there.
    pub empty_groups: BTreeSet<u32>,
    /// Servers that Patroni does not list any more: they are watched until somebody forgets them.
    pub left: BTreeSet<Component>,
}

/// Takes an outcome into what is known.
pub fn record<T>(
    known: &mut Of<T>,
    component: &Component,
    (asked_at, at): (Duration, Duration),
    outcome: Result<T, Failure>,
) {
    let seen = known.entry(component.clone()).or_insert(Seen {
        at,
        failure: None,
        failing_since: None,
        answer: None,
        lost_at: None,
    });
    seen.at = at;
    match outcome {
        Ok(facts) => {
            seen.answer = Some(Answer { asked_at, answered_at: at, facts });
            (seen.failure, seen.failing_since, seen.lost_at) = (None, None, None);
        }
        Err(failure) => {
            seen.failure = Some(failure);
            seen.failing_since.get_or_insert(at);
        }
    }
}

/// How old an outcome may be, before it is not known any more what a component would say.
#[derive(Clone, Copy, Debug)]
pub struct Ages {
    /// Of what is asked each interval.
    pub each: Duration,
    /// Of what is asked for seldom.
    pub deep: Duration,
}

impl Ages {
    /// Nothing is ever too old.
    pub const NONE: Self = Self { each: Duration::MAX, deep: Duration::MAX };
}

impl Facts {
    /// What is too old is not known any more: nobody asks, for whatever reason.
    pub fn age(&mut self, ages: Ages, now: Duration) {
        let Self { postgres, patroni, etcd, pgbouncer, haproxy, .. } = self;
        age(postgres, ages.each, now);
        age(patroni, ages.each, now);
        age(etcd, ages.each, now);
        age(pgbouncer, ages.each, now);
        age(haproxy, ages.each, now);
        let Self { redis, agents, swarm, disks, deep, .. } = self;
        age(redis, ages.each, now);
        age(agents, ages.each, now);
        age(swarm, ages.each, now);
        age(disks, ages.each, now);
        age(deep, ages.deep, now);
    }
}

fn age<T>(known: &mut Of<T>, most: Duration, now: Duration) {
    for seen in known.values_mut() {
        if seen.is_not_asked() || most < now.saturating_sub(seen.at) {
            // As often as it is looked at: so it counts as soon as a failure does.
            seen.at = now;
            let error =
                format!("it was not asked for {} or more", humantime::format_duration(most));
            seen.failure = Some(Failure { stage: Stage::NotAsked, error });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::component::Kind;

    #[test]
    fn an_answer_outlives_failures_and_is_not_taken_for_a_new_one() {
        let component = Component::new(Kind::Redis, "a");
        let second = Duration::from_secs;
        let failure = Failure { stage: Stage::Timeout, error: "no answer".to_owned() };
        let mut known = Of::default();
        record(&mut known, &component, (second(1), second(2)), Ok(7));
        assert_eq!(known[&component].now(), Some(&7));
        record(&mut known, &component, (second(3), second(4)), Err(failure.clone()));
        record(&mut known, &component, (second(5), second(6)), Err(failure));
        let seen = &known[&component];
        assert_eq!((seen.now(), seen.failing_since, seen.at), (None, Some(second(4)), second(6)));
        let answer = Answer { asked_at: second(1), answered_at: second(2), facts: 7 };
        assert_eq!(seen.answer, Some(answer));
        record(&mut known, &component, (second(7), second(8)), Ok(8));
        assert_eq!((known[&component].now(), known[&component].failing_since), (Some(&8), None));
    }

    #[test]
    fn what_is_too_old_is_not_known_until_there_is_an_outcome() {
        let component = Component::new(Kind::Disk, "a");
        let second = Duration::from_secs;
        let mut facts = Facts::default();
        let ages = Ages { each: second(9), deep: second(90) };
        let answer = || Ok(DiskFacts { free_bytes: 1, bytes: 2, free_inodes: 1, inodes: 2 });
        record(&mut facts.disks, &component, (second(1), second(2)), answer());
        facts.age(ages, second(11));
        assert!(facts.disks[&component].now().is_some());
        for now in [12, 13] {
            facts.age(ages, second(now));
            let seen = &facts.disks[&component];
            assert_eq!((seen.at, seen.now(), seen.failing_since), (second(now), None, None));
            let failure = seen.failure.as_ref().unwrap();
            assert_eq!(failure.stage, Stage::NotAsked);
            assert_eq!(failure.error, "it was not asked for 9s or more");
        }
        record(&mut facts.disks, &component, (second(14), second(15)), answer());
        facts.age(ages, second(16));
        assert!(facts.disks[&component].now().is_some());
    }
}
