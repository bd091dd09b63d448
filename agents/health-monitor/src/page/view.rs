//! What the page says: the state in words.

use std::collections::BTreeMap;
use std::time::Duration;

use askama::Template;
use chrono::{DateTime, Utc};

use super::backups::{Backup, backups};
use super::groups::{Group, groups};
use super::notes::note;
use super::strip::{Strip, strip};
use super::told::{Told, told};
use super::{SCRIPT, STYLE};
use crate::advice::{Advice, NotMeasured};
use crate::catalogue::ISOLATION;
use crate::check::Status;
use crate::component::{Component, Kind};
use crate::failover::Failover;
use crate::journal::{Event, What};
use crate::judge::words::{bytes, counted, duration};
use crate::monitor::State;
use crate::notify::board::Telling;
use crate::settle::Now;
use crate::verdict::{Verdicts, stands_in};

/// So many problems are listed at most, and so many events.
const PROBLEMS_MAX: usize = 20;
const EVENTS_MAX: usize = 50;
/// More components of a kind than these are summed up, and only those named that are not well.
const KIND_MAX: usize = 8;
/// What is known is judged every second at least; if not for so long, it is old.
const LATE_SECONDS: i64 = 10;

/// The page.
#[derive(Template)]
#[template(path = "page.html")]
pub(super) struct Page {
    style: &'static str,
    script: &'static str,
    build: &'static str,
    version: &'static str,
    favicon: String,
    cluster: String,
    now: String,
    late: Option<String>,
    verdict: Headline,
    hour: Strip,
    problems: Vec<Problem>,
    more_problems: usize,
    is_isolated: bool,
    groups: Vec<Group>,
    others: Vec<Other>,
    backups: Vec<Backup>,
    told: Vec<Told>,
    advice: Vec<Advised>,
    sizes: Vec<(u32, String)>,
    not_measured: &'static [NotMeasured],
    events: Vec<Happened>,
    more_events: bool,
}

struct Headline {
    status: &'static str,
    since: String,
    reason: String,
    next: String,
}

struct Advised {
    component: String,
    measured: String,
    limit: String,
    held: String,
    advice: &'static str,
}

struct Problem {
    status: &'static str,
    component: String,
    check: String,
    since: String,
    reason: String,
    next: String,
    is_flapping: bool,
}

struct Other {
    status: &'static str,
    name: String,
    note: String,
}

struct Happened {
    at: String,
    datetime: String,
    status: &'static str,
    component: String,
    text: String,
}

impl Page {
    /// What there is to show. `not_ready` says why little is known yet.
    pub(super) fn of(
        state: &State,
        not_ready: Option<String>,
        telling: &Telling,
        now: Now,
    ) -> Self {
        let all = problems(state, now);
        // If nobody is reached, one thing is wrong, and nothing is known of the rest.
        let is_isolated = state
            .checks
            .get(&Component::cluster())
            .and_then(|it| it.get(ISOLATION.name))
            .is_some_and(|it| it.status != Status::Ok);
        let scaling = state.scaling();
        let shown = if is_isolated { 1 } else { PROBLEMS_MAX };
        let events = state.journal.newest();
        let status = headline_status(state, not_ready.is_some());
        let past = state.past.iter().map(|it| (it.at, Some(it.cluster)));
        Self {
            style: STYLE,
            script: SCRIPT,
            build: env!("CARGO_PKG_VERSION"),
            version: env!("CARGO_PKG_VERSION"),
            favicon: favicon(status),
            cluster: state.cluster.clone(),
            now: now.wall.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
            late: late(state, now),
            verdict: headline(state, status, not_ready, now),
            hour: strip(past, now.wall),
            more_problems: all.len().saturating_sub(shown),
            problems: all.into_iter().take(shown).collect(),
            is_isolated,
            groups: groups(state, now),
            others: others(state),
            backups: backups(state, now),
            told: told(telling, now.wall),
            advice: scaling.advice.into_iter().filter(|it| it.is_sustained).map(advised).collect(),
            sizes: scaling.sizes.iter().map(|(group, it)| (*group, it.to_string())).collect(),
            not_measured: scaling.not_measured,
            more_events: events.size_hint().0 > EVENTS_MAX,
            events: events.take(EVENTS_MAX).map(|it| happened(it, now.wall)).collect(),
        }
    }
}

/// A circle in the colour of the status, with a hole unless all is well.
fn favicon(status: Status) -> String {
    let (colour, shape) = match status {
        Status::Ok => ("1a7f37", "<circle cx='8' cy='8' r='7'/>"),
        Status::Warning => ("d29922", "<path d='M8 0l8 15H0z'/>"),
        Status::Unknown => ("8957e5", "<path d='M8 0l8 8-8 8-8-8z'/>"),
        Status::Critical => ("da3633", "<path d='M5 0h6l5 5v6l-5 5H5l-5-5V5z'/>"),
    };
    format!(
        "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' \
         fill='%23{colour}'>{shape}</svg>"
    )
}

/// Why what is shown is old, if it is.
fn late(state: &State, now: Now) -> Option<String> {
    let decided_at = state.decided_at?.wall;
    let age = now.wall - decided_at;
    (age.num_seconds() > LATE_SECONDS).then(|| {
        let since = since(decided_at, now.wall);
        format!("Nothing was judged since {since}: this monitor itself does not work")
    })
}

/// What is not known yet is not well.
fn headline_status(state: &State, is_new: bool) -> Status {
    let verdict = state.verdicts.cluster.status;
    if is_new || state.decided_at.is_none() { verdict.max(Status::Unknown) } else { verdict }
}

fn headline(state: &State, status: Status, not_ready: Option<String>, now: Now) -> Headline {
    let verdict = &state.verdicts.cluster;
    let servers = state.facts.postgres.len() as u64;
    let others = state.verdicts.components.keys();
    let others =
        others.filter(|it| !matches!(it.kind, Kind::Postgres | Kind::Group | Kind::Cluster));
    let (reason, next) = match not_ready {
        // Where a check says what is not known, it says what to do as well.
        Some(why) if status <= Status::Unknown && verdict.since.is_none() => {
            (format!("Not everything is known yet: {why}"), "wait a few seconds".to_owned())
        }
        _ if status == Status::Ok => {
            let servers = counted(servers, "server", "servers");
            let groups = counted(state.verdicts.groups.len() as u64, "group", "groups");
            let others = counted(others.count() as u64, "other component", "other components");
            (format!("All is well: {servers} in {groups}, {others}"), String::new())
        }
        _ => (verdict.reason.clone(), verdict.next.clone()),
    };
    let since = verdict.since.filter(|_| status == verdict.status);
    Headline {
        status: status.name(),
        since: since.map(|it| self::since(it, now.wall)).unwrap_or_default(),
        reason,
        next,
    }
}

/// `14:32:05 (12 min ago)`, with the date if it was on another day.
pub(super) fn since(at: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let ago = (now - at).to_std().unwrap_or_default();
    // One unit is enough, and does not change with each look.
    let ago = duration(ago);
    let ago = ago.split_inclusive(' ').take(2).collect::<String>();
    format!("{} ({} ago)", clock(at, now), ago.trim_end())
}

fn clock(at: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let format = if at.date_naive() == now.date_naive() { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" };
    at.format(format).to_string()
}

fn advised(it: Advice) -> Advised {
    Advised {
        component: it.component.to_string(),
        measured: it.measured,
        limit: format!("{} {}", it.limit, it.unit.symbol()).trim_end().to_owned(),
        held: duration(Duration::from_secs(it.held_seconds)),
        advice: it.advice,
    }
}

/// The worst that a component counts as: a standby that others stand in for is a warning, as people are told.
fn most(verdicts: &Verdicts, primaries: &BTreeMap<u32, String>, component: &Component) -> Status {
    let Verdicts { cluster, groups, components } = verdicts;
    if stands_in(component, components, primaries) {
        return Status::Warning;
    }
    component.group.and_then(|it| groups.get(&it)).unwrap_or(cluster).status
}

/// What is wrong, the worst first, of equals what began first.
fn problems(state: &State, now: Now) -> Vec<Problem> {
    let mut all = Vec::new();
    let primaries = state.primaries.names();
    for (component, checks) in &state.checks {
        let most = most(&state.verdicts, &primaries, component);
        for (name, it) in checks.iter().filter(|(_, it)| it.status != Status::Ok) {
            let status = it.status.min(most);
            all.push((
                (std::cmp::Reverse(status), it.since),
                Problem {
                    status: status.name(),
                    component: component.to_string(),
                    check: name.replace('_', " "),
                    since: since(it.since, now.wall),
                    reason: it.reading.reason.clone(),
                    next: it.reading.next_step().to_owned(),
                    is_flapping: it.is_flapping,
                },
            ));
        }
    }
    all.sort_by_key(|(order, _)| *order);
    all.into_iter().map(|(_, it)| it).collect()
}

/// Everything that is no server: each, or of a kind with many their number and those that are not well.
fn others(state: &State) -> Vec<Other> {
    let mut kinds = BTreeMap::<Kind, Vec<&Component>>::new();
    for component in state.components() {
        if !matches!(component.kind, Kind::Postgres | Kind::Group | Kind::Cluster) {
            kinds.entry(component.kind).or_default().push(component);
        }
    }
    let primaries = state.primaries.names();
    let status = |component: &Component| {
        let most = most(&state.verdicts, &primaries, component);
        let verdict = state.verdicts.components.get(component);
        verdict.map_or(Status::Unknown, |it| it.status.min(most))
    };
    let mut rows = Vec::new();
    for (kind, components) in kinds {
        let is_well = |it: &&Component| status(it) == Status::Ok;
        let well = components.iter().filter(|it| is_well(it)).count();
        let sums_up = kind == Kind::Patroni || components.len() > KIND_MAX;
        if sums_up {
            let worst = components.iter().map(|it| status(it)).max().unwrap_or_default();
            let note = format!("{well} of {} are well", components.len());
            rows.push(Other { status: worst.name(), name: kind.to_string(), note });
        }
        for component in components.iter().filter(|it| !sums_up || !is_well(it)).take(PROBLEMS_MAX)
        {
            let verdict = state.verdicts.components.get(*component);
            let note = match verdict {
                Some(verdict) if verdict.status != Status::Ok => verdict.reason.clone(),
                Some(_) => note(&state.facts, component),
                None => "not asked yet".to_owned(),
            };
            rows.push(Other { status: status(component).name(), name: label(component), note });
        }
    }
    rows
}

/// As it is displayed, without its kind where its name has it: `etcd-1` and not `etcd etcd-1`.
fn label(component: &Component) -> String {
    let full = component.to_string();
    let kind = component.kind.name();
    let repeats = component.name.starts_with(kind);
    full.strip_prefix(kind).filter(|_| repeats).map_or(full.clone(), |it| it.trim().to_owned())
}

fn happened(event: &Event, now: DateTime<Utc>) -> Happened {
    let (status, text) = match &event.what {
        What::Changed { check, from, to, reason, .. } => {
            (*to, format!("{} was {from}, is {to}: {reason}", check.replace('_', " ")))
        }
        What::Flapping { check, begins: true } => {
            (Status::Warning, format!("{check} keeps changing"))
        }
        What::Flapping { check, begins: false } => (Status::Ok, format!("{check} is calm again")),
        What::Failover(it) => (Status::Warning, failover(it)),
    };
    Happened {
        at: clock(event.at, now),
        datetime: event.at.to_rfc3339(),
        status: status.name(),
        component: event.component.to_string(),
        text,
    }
}

fn failover(it: &Failover) -> String {
    let lost = match it.lost_bytes_at_most {
        None if it.both_wrote => "both wrote at once: what one of them wrote is lost".to_owned(),
        None => "what is lost cannot be told".to_owned(),
        Some(0) => "no WAL is known to be lost".to_owned(),
        Some(lost) => format!("at most {} of WAL are lost", bytes(lost)),
    };
    format!(
        "failover: {} takes writes in place of {} (timeline {} to {}); nobody did for {:.1} to {:.1} s; {lost}",
        it.new.name,
        it.old.name,
        it.old.timeline,
        it.new.timeline,
        it.unavailable_at_least_seconds,
        it.unavailable_at_most_seconds,
    )
}
