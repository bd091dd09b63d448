//! What is known, what counts, and what happened: one for the whole agent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::advice::{Advisor, NOT_MEASURED, Scaling};
use crate::catalogue::REACHABLE;
use crate::check::{Level, Status};
use crate::component::{Component, Kind};
use crate::facts::{Ages, Facts, Failure, Of, record};
use crate::failover::Primaries;
use crate::journal::{Event, Journal, What};
use crate::judge::group::Writes;
use crate::judge::{self, Taken};
use crate::settle::{Now, Settled};
use crate::sizing::{self, Plan};
use crate::thresholds::{Scale, Thresholds};
use crate::verdict::{Checks, Verdicts, roll_up};

/// How long the past is drawn for …
pub const PAST: Duration = Duration::from_hours(1);
/// … and how finely.
const PAST_STEP: Duration = Duration::from_secs(30);

/// Everything the monitor knows. Clones share it.
#[derive(Clone, Debug)]
pub struct Monitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The groups that lost their primary and have no other yet.
    leaderless: watch::Sender<BTreeSet<u32>>,
    /// There is something to judge at once.
    stirred: Notify,
}

/// What is behind the lock.
#[derive(Debug)]
pub struct State {
    /// The cluster's name.
    pub cluster: String,
    /// What the components said last.
    pub facts: Facts,
    /// The checks as they count.
    pub checks: Checks,
    /// What they come to.
    pub verdicts: Verdicts,
    /// What happened.
    pub journal: Journal,
    /// The last hour.
    pub past: VecDeque<Moment>,
    /// The last round, if there was one.
    pub decided_at: Option<Now>,
    /// The groups' primaries, as last seen to take writes.
    pub primaries: Primaries,
    /// What makes one think of more servers, or larger ones.
    pub advisor: Advisor,
    /// What their size should be made for.
    pub plan: Plan,
    /// How old what is known may be.
    pub ages: Ages,
    thresholds: Thresholds,
    writes: Writes,
    /// What is watched: a component that was never answered for is not known to be well.
    expected: BTreeSet<Component>,
    started_at: Duration,
}

/// What it came to at a moment of the past.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// When.
    pub at: DateTime<Utc>,
    /// The cluster.
    pub cluster: Status,
    /// The groups.
    pub groups: BTreeMap<u32, Status>,
}

impl Monitor {
    /// A monitor that knows nothing yet.
    pub fn new(cluster: &str, thresholds: Thresholds, now: Duration) -> Self {
        let checks = Checks::new();
        let mut verdicts = roll_up(&checks, &BTreeMap::new());
        verdicts.cluster.hold("nobody was asked yet".to_owned());
        let state = Mutex::new(State {
            cluster: cluster.to_owned(),
            facts: Facts::default(),
            checks,
            verdicts,
            journal: Journal::default(),
            past: VecDeque::new(),
            decided_at: None,
            primaries: Primaries::default(),
            advisor: Advisor::default(),
            plan: Plan::default(),
            ages: Ages::NONE,
            thresholds,
            writes: Writes::default(),
            expected: BTreeSet::new(),
            started_at: now,
        });
        let (leaderless, _) = watch::channel(BTreeSet::new());
        Self(Arc::new(Shared { state, leaderless, stirred: Notify::new() }))
    }

    /// What is known, for as long as it takes to read it.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the outcome of a question.
    pub fn record<T>(
        &self,
        of: impl FnOnce(&mut Facts) -> &mut Of<T>,
        component: &Component,
        times: (Duration, Duration),
        outcome: Result<T, Failure>,
    ) {
        let mut state = self.state();
        let known = of(&mut state.facts);
        let was_well = known.get(component).is_some_and(|it| it.failing_since.is_none());
        let is_well = outcome.is_ok();
        record(known, component, times, outcome);
        drop(state);
        let is_searched =
            component.group.is_some_and(|it| self.0.leaderless.borrow().contains(&it));
        if is_searched || !(was_well && is_well) {
            self.0.stirred.notify_one();
        }
    }

    /// Notes that a kept connection ended just now.
    pub fn lost<T>(
        &self,
        of: impl FnOnce(&mut Facts) -> &mut Of<T>,
        component: &Component,
        now: Duration,
    ) {
        if let Some(seen) = of(&mut self.state().facts).get_mut(component) {
            seen.lost_at = Some(now);
        }
    }

    /// Resolves when there is something to judge at once: a component does not answer, or does again, or
    /// a primary is searched for.
    pub async fn stirred(&self) {
        self.0.stirred.notified().await;
    }

    /// Resolves while a group has lost its primary, and has no other yet.
    pub async fn leaderless(&self, group: u32) {
        let mut groups = self.0.leaderless.subscribe();
        if groups.wait_for(|it| it.contains(&group)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Judges what is known; returns the events.
    pub fn decide(&self, now: Now) -> Vec<Event> {
        let mut state = self.state();
        let events = state.decide(now);
        let leaderless = state.primaries.leaderless(now);
        self.0.leaderless.send_if_modified(|known| {
            let is_new = *known != leaderless;
            *known = leaderless;
            is_new
        });
        events
    }

    /// Why nothing can be said yet.
    pub fn not_ready(&self) -> Option<String> {
        self.state().not_ready()
    }
}

/// Forgets what is no longer watched.
fn keep<T>(known: &mut Of<T>, expected: &BTreeSet<Component>) {
    known.retain(|component, _| expected.contains(component));
}

impl State {
    /// These components are watched, and no others of these kinds.
    pub fn expect(&mut self, kinds: &[Kind], components: impl IntoIterator<Item = Component>) {
        self.expected.retain(|it| !kinds.contains(&it.kind));
        self.expected.extend(components);
        let Self { facts, expected, checks, .. } = self;
        keep(&mut facts.postgres, expected);
        keep(&mut facts.deep, expected);
        keep(&mut facts.patroni, expected);
        keep(&mut facts.etcd, expected);
        checks.retain(|it, _| !kinds.contains(&it.kind) || expected.contains(it));
    }

    /// Why nothing can be said yet.
    fn not_ready(&self) -> Option<String> {
        if let Some(unknown) = self.members_unknown() {
            return Some(unknown.clone());
        }
        if self.expected.is_empty() {
            return Some("what there is to watch is not known yet".to_owned());
        }
        let mut waiting = self.not_asked();
        let first = waiting.next()?;
        let (count, all) = (1 + waiting.count(), self.expected.len());
        Some(format!("{count} of {all} components were not asked yet, such as {first}"))
    }

    fn members_unknown(&self) -> Option<&String> {
        self.facts.membership.as_ref()?.unknown.as_ref()
    }

    /// The components that there is no outcome of.
    fn not_asked(&self) -> impl Iterator<Item = &Component> {
        let Facts {
            postgres, patroni, etcd, pgbouncer, haproxy, redis, agents, swarm, disks, ..
        } = &self.facts;
        self.expected.iter().filter(|it| {
            !(postgres.contains_key(*it)
                || patroni.contains_key(*it)
                || etcd.contains_key(*it)
                || pgbouncer.contains_key(*it)
                || haproxy.contains_key(*it)
                || redis.contains_key(*it)
                || agents.contains_key(*it)
                || swarm.contains_key(*it)
                || disks.contains_key(*it))
        })
    }

    /// Whether everything that is watched was asked, as deep as the checks of a level go.
    pub fn is_asked_at(&self, level: Level) -> bool {
        let membership = self.facts.membership.as_ref();
        let is_begun =
            membership.map_or_else(|| !self.expected.is_empty(), |membership| !membership.is_early);
        is_begun && self.not_asked().next().is_none() && self.is_read_at(level)
    }

    /// Whether everything was asked that the checks of a level need.
    pub fn is_read_at(&self, level: Level) -> bool {
        let servers = || self.facts.postgres.values();
        let has_standard =
            || servers().all(|seen| seen.now().is_none_or(|it| it.standard.is_some()));
        let has_deep = || self.facts.postgres.keys().all(|it| self.facts.deep.contains_key(it));
        match level {
            Level::Basic => true,
            Level::Standard => has_standard(),
            Level::Comprehensive => has_standard() && has_deep(),
        }
    }

    /// What is watched.
    pub fn components(&self) -> impl Iterator<Item = &Component> {
        self.expected.iter()
    }

    /// Whether the cluster should grow, as of the last round.
    pub fn scaling(&self) -> Scaling {
        Scaling {
            advice: self.decided_at.map(|it| self.advisor.advice(it)).unwrap_or_default(),
            sizes: sizing::of_groups(&self.plan, &self.facts),
            not_measured: &NOT_MEASURED,
        }
    }

    /// How long this monitor has been running.
    pub fn up_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.started_at)
    }

    fn decide(&mut self, now: Now) -> Vec<Event> {
        self.facts.unasked = self.not_asked().cloned().collect();
        self.facts.age(self.ages, now.boot);
        let scale = Scale { thresholds: &self.thresholds, before: &self.checks };
        self.writes.take(&self.facts);
        self.advisor.take(&self.facts, now);
        let taken = judge::judge(&self.facts, &self.writes, scale, now.boot);
        let mut events = self.settle(taken, now);
        for failover in self.primaries.take(&self.facts, now) {
            let component = Component::group(failover.group);
            events.push(Event { at: now.wall, component, what: What::Failover(failover) });
        }
        for event in &events {
            self.journal.add(event.clone());
        }
        self.verdicts = roll_up(&self.checks, &self.primaries.names());
        // Of a group that may have servers nobody knows of, the rest says nothing.
        if let Some(reason) = self.members_unknown().cloned() {
            self.verdicts.groups.values_mut().for_each(|it| it.hold(reason.clone()));
        }
        if let Some(reason) = self.not_ready() {
            self.verdicts.cluster.hold(reason);
        }
        self.decided_at = Some(now);
        self.remember(now);
        events
    }

    /// Takes the readings. A check that is not read any more is gone with what it said; but what was wrong
    /// with a component that does not answer stays: nobody has seen it end.
    fn settle(&mut self, taken: Vec<Taken>, now: Now) -> Vec<Event> {
        let mut events = Vec::new();
        let mut read = BTreeMap::<Component, BTreeSet<&'static str>>::new();
        // Without a new connection nothing is known that comes on one.
        let without = self.facts.deep.iter().filter(|(_, seen)| seen.failure.is_some());
        let mut silent: BTreeMap<Component, Level> =
            without.map(|(it, _)| (it.clone(), Level::Comprehensive)).collect();
        for Taken { component, reading, at } in taken {
            let check = reading.check.name;
            read.entry(component.clone()).or_default().insert(check);
            if check == REACHABLE.name && reading.status != Status::Ok {
                silent.insert(component.clone(), Level::Basic);
            }
            let of_component = self.checks.entry(component.clone()).or_default();
            let Some(settled) = of_component.get_mut(check) else {
                let settled = Settled::new(reading, at, now);
                if settled.status != Status::Ok {
                    let (from, to) = (Status::Ok, settled.status);
                    let (reason, next) = settled.words();
                    let what = What::Changed { check, from, to, reason, next };
                    events.push(Event { at: now.wall, component, what });
                }
                of_component.insert(check, settled);
                continue;
            };
            let was_flapping = settled.is_flapping;
            let Some(change) = settled.take(reading, at, now) else { continue };
            let what = if change.is_flapping == was_flapping {
                let (reason, next) = settled.words();
                What::Changed { check, from: change.from, to: change.to, reason, next }
            } else {
                What::Flapping { check, begins: change.is_flapping }
            };
            events.push(Event { at: now.wall, component, what });
        }
        self.checks.retain(|component, checks| {
            let read = read.get(component);
            let silent_from = silent.get(component);
            checks.retain(|name, it| {
                let is_silent = silent_from.is_some_and(|from| *from <= it.reading.check.level);
                let holds_on = is_silent && it.status != Status::Ok;
                holds_on || read.is_some_and(|it| it.contains(name))
            });
            !checks.is_empty()
        });
        events
    }

    fn remember(&mut self, now: Now) {
        let is_due = self
            .past
            .back()
            .is_none_or(|last| (now.wall - last.at).to_std().is_ok_and(|it| it >= PAST_STEP));
        let moment = Moment {
            at: now.wall,
            cluster: self.verdicts.cluster.status,
            groups: self
                .verdicts
                .groups
                .iter()
                .map(|(it, verdict)| (*it, verdict.status))
                .collect(),
        };
        match self.past.back_mut() {
            Some(last) if !is_due => {
                last.cluster = last.cluster.max(moment.cluster);
                for (group, status) in moment.groups {
                    let known = last.groups.entry(group).or_default();
                    *known = (*known).max(status);
                }
            }
            _ => self.past.push_back(moment),
        }
        let oldest = now.wall - PAST;
        while self.past.front().is_some_and(|it| it.at < oldest) {
            self.past.pop_front();
        }
    }
}
