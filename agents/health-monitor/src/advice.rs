//! Whether the cluster should grow: advice that nobody but people act on; pure.
//!
//! The triggers and the formula are those that this system was ordered with ("Capacity Planning"). What a
//! server cannot be asked for by SQL is named as not measured, and not guessed. Only one trigger names a
//! time; it is taken for all of them, since nobody adds servers for a peak.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::types::PgLsn;

use crate::check::Unit;
use crate::component::Component;
use crate::facts::Facts;
use crate::judge::group;
use crate::judge::words::{duration, number, percent};
use crate::settle::Now;
use crate::sizing::Sizing;

/// Where the triggers and the formula come from.
pub const SOURCE: &str = "the capacity planning that this system was ordered with";
/// How long a trigger must have held before it is advice: the time that its CPU trigger names.
pub const SUSTAINED: Duration = Duration::from_mins(15);
/// A measure that is missing for less does not end what it showed before.
const GAP: Duration = Duration::from_mins(3);
/// Fewer blocks than these tell nothing of the cache.
const CACHE_BLOCKS_MIN: u64 = 100_000;
/// So far back a primary's positions are kept, to tell how far standbys are behind …
const POSITIONS_FOR: Duration = Duration::from_mins(1);
/// … one in so long.
const POSITIONS_EVERY: Duration = Duration::from_secs(1);

/// What makes one think of more.
#[derive(Debug, PartialEq, Serialize)]
pub struct Trigger {
    /// Its name.
    pub name: &'static str,
    /// What is measured, of which there must be no more, or no less.
    pub what: &'static str,
    /// The limit.
    pub limit: f64,
    /// What it counts.
    pub unit: Unit,
    /// It must not be below the limit.
    pub is_floor: bool,
    /// What to do.
    pub advice: &'static str,
}

/// Connections of a server.
pub static CONNECTIONS: Trigger = Trigger {
    name: "connections",
    what: "connections of a server in use",
    limit: 400.0,
    unit: Unit::Count,
    is_floor: false,
    advice: "let applications connect through PgBouncer, and run more of it",
};
/// Read transactions of a server.
pub static READS: Trigger = Trigger {
    name: "read_load",
    what: "read transactions of a server in a second",
    limit: 5000.0,
    unit: Unit::Count,
    is_floor: false,
    advice: "add a standby for reads",
};
/// The lag of a standby.
pub static LAG: Trigger = Trigger {
    name: "replication_lag",
    what: "how far a standby is behind",
    limit: 5.0,
    unit: Unit::Seconds,
    is_floor: false,
    advice: "give the standby a faster disk, more memory or network, or share its queries out to another",
};
/// The cache of a server.
pub static CACHE: Trigger = Trigger {
    name: "cache_hit_ratio",
    what: "blocks that a server found in its cache",
    limit: 95.0,
    unit: Unit::Percent,
    is_floor: true,
    advice: "raise shared_buffers, or add memory",
};

/// A trigger that this monitor has no measure for.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct NotMeasured {
    /// Of what.
    pub what: &'static str,
    /// When there should be more, and how much.
    pub trigger: &'static str,
}

/// What a server does not tell by SQL: the monitoring of its host does.
pub const NOT_MEASURED: [NotMeasured; 3] = [
    NotMeasured { what: "CPU", trigger: "add 2 to 4 cores where it is above 70 % for 15 min" },
    NotMeasured { what: "memory", trigger: "add 16 to 32 GB where it is above 80 %" },
    NotMeasured {
        what: "disk I/O",
        trigger: "use a faster disk where it is above 80 % of its IOPS",
    },
];

/// `CPU: add 2 to 4 cores where it is above 70 % for 15 min`.
impl fmt::Display for NotMeasured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.trigger)
    }
}

/// Advice, or what may become it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advice {
    /// The trigger's name.
    pub trigger: &'static str,
    /// What it was measured of.
    pub component: Component,
    /// What was measured, in words.
    pub measured: String,
    /// The number.
    pub value: f64,
    /// The trigger's limit.
    pub limit: f64,
    /// What both count.
    pub unit: Unit,
    /// Since when it is beyond the limit, as far as this monitor has seen.
    pub since: DateTime<Utc>,
    /// For how long, seconds.
    pub held_seconds: u64,
    /// It has held for [`SUSTAINED`]: only then it is advice.
    pub is_sustained: bool,
    /// What to do.
    pub advice: &'static str,
    /// Who says so.
    pub source: &'static str,
}

/// All that can be said of growing.
#[derive(Debug, Default, Serialize)]
pub struct Scaling {
    /// What is beyond its limit, the longest first.
    pub advice: Vec<Advice>,
    /// How large a server of each group should be.
    pub sizes: BTreeMap<u32, Sizing>,
    /// What this monitor has no measure for.
    pub not_measured: &'static [NotMeasured],
}

impl Scaling {
    /// For people; `is_whole` is with what nobody needs to read each time.
    pub fn text(&self, is_whole: bool) -> String {
        let advice = self.advice.iter().map(|it| {
            let held = if it.is_sustained {
                format!("for {}", duration(Duration::from_secs(it.held_seconds)))
            } else {
                format!("now; if that stays so for {}", duration(SUSTAINED))
            };
            format!("{}: {} (limit {}), {held}: {}", it.component, it.measured, it.limit, it.advice)
        });
        let mut lines: Vec<String> = advice.collect();
        if is_whole {
            let sizes =
                self.sizes.iter().map(|(group, it)| format!("size for group {group}: {it}"));
            let not_measured = self.not_measured.iter();
            let not_measured = not_measured.map(|it| format!("not measured here: {it}"));
            lines.extend(sizes.chain(not_measured));
        }
        if lines.is_empty() {
            return String::new();
        }
        format!("Scaling advice, on which nothing acts\n{}\n\n", lines.join("\n"))
    }
}

/// A trigger that is beyond its limit.
#[derive(Clone, Debug)]
struct Held {
    trigger: &'static Trigger,
    since: Now,
    seen_at: Duration,
    value: f64,
    measured: String,
}

/// Where a primary was, the oldest first.
#[derive(Clone, Debug, Default)]
struct Positions {
    timeline: u32,
    seen: VecDeque<(Duration, PgLsn)>,
}

impl Positions {
    fn take(&mut self, timeline: u32, at: Duration, lsn: PgLsn) {
        if self.timeline != timeline {
            *self = Self { timeline, ..Self::default() };
        }
        if self.seen.back().is_none_or(|(last, _)| *last + POSITIONS_EVERY <= at) {
            self.seen.push_back((at, lsn));
        }
        while self.seen.front().is_some_and(|(first, _)| *first + POSITIONS_FOR < at) {
            self.seen.pop_front();
        }
    }

    /// How far one that was here then is behind at least: since the oldest position that it lacked.
    fn behind(&self, at: Duration, lsn: PgLsn) -> Duration {
        let lacked = self.seen.iter().find(|(_, written)| *written > lsn);
        lacked.map_or(Duration::ZERO, |(then, _)| at.saturating_sub(*then))
    }
}

/// What has been measured so far.
#[derive(Clone, Debug, Default)]
pub struct Advisor {
    held: BTreeMap<(Component, &'static str), Held>,
    positions: BTreeMap<u32, Positions>,
}

impl Advisor {
    /// Takes what is known now.
    pub fn take(&mut self, facts: &Facts, now: Now) {
        self.take_positions(facts);
        for (trigger, component, value, measured) in self.measures(facts) {
            let is_beyond =
                if trigger.is_floor { value < trigger.limit } else { value > trigger.limit };
            let key = (component, trigger.name);
            if !is_beyond {
                self.held.remove(&key);
                continue;
            }
            let since = self.held.get(&key).map_or(now, |it| it.since);
            self.held.insert(key, Held { trigger, since, seen_at: now.boot, value, measured });
        }
        self.held.retain(|_, it| now.boot.saturating_sub(it.seen_at) <= GAP);
    }

    fn take_positions(&mut self, facts: &Facts) {
        let groups = group::groups(facts);
        self.positions.retain(|it, _| groups.contains(it));
        for group in groups {
            let primary = group::primary(facts, group);
            if let Some((timeline, at, lsn)) =
                primary.and_then(|(_, it)| Some((it.facts.timeline, it.facts.at, it.facts.lsn?)))
            {
                self.positions.entry(group).or_default().take(timeline, at, lsn);
            }
        }
    }

    fn measures(&self, facts: &Facts) -> Vec<(&'static Trigger, Component, f64, String)> {
        let mut all = Vec::new();
        for (component, seen) in &facts.postgres {
            let Some(it) = seen.now() else { continue };
            let used = it.connections.0;
            let measured = format!("{used} connections are in use");
            all.push((&CONNECTIONS, component.clone(), f64::from(used), measured));
            // One that is late on purpose, or paused, needs nothing.
            let is_late_by_itself = it.in_recovery && it.apply_delay.is_zero() && !it.replay_paused;
            let positions = component.group.and_then(|it| self.positions.get(&it));
            if let Some((positions, lsn)) = positions.zip(it.lsn).filter(|_| is_late_by_itself) {
                let behind = positions.behind(it.at, lsn);
                let measured = format!("it is at least {} behind", duration(behind));
                all.push((&LAG, component.clone(), behind.as_secs_f64(), measured));
            }
        }
        for (component, seen) in &facts.deep {
            let Some(it) = seen.now() else { continue };
            if let Some(cache) = it.cache.filter(|it| it.hit + it.read >= CACHE_BLOCKS_MIN) {
                let ratio = percent(cache.hit, cache.hit + cache.read);
                let measured = format!("{ratio:.1} % of the blocks were found in the cache");
                all.push((&CACHE, component.clone(), ratio, measured));
            }
            if let Some(load) = it.load.filter(|it| !it.over.is_zero()) {
                let reads = load.transactions.saturating_sub(load.writing);
                let reads = number(reads) / load.over.as_secs_f64();
                let measured = format!("{reads:.0} read transactions in a second");
                all.push((&READS, component.clone(), reads, measured));
            }
        }
        all
    }

    /// What is beyond its limit, the longest first.
    pub fn advice(&self, now: Now) -> Vec<Advice> {
        let advice = self.held.iter().map(|((component, _), held)| {
            let held_for = now.boot.saturating_sub(held.since.boot);
            let Trigger { name, limit, unit, advice, .. } = *held.trigger;
            Advice {
                trigger: name,
                component: component.clone(),
                measured: held.measured.clone(),
                value: held.value,
                limit,
                unit,
                since: held.since.wall,
                held_seconds: held_for.as_secs(),
                is_sustained: held_for >= SUSTAINED,
                advice,
                source: SOURCE,
            }
        });
        let mut advice: Vec<_> = advice.collect();
        advice.sort_by_key(|it| it.since);
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::component::Kind;
    use crate::facts::{Failure, Stage, record};
    use crate::probe::postgres::{CacheTraffic, DeepFacts, Load, PostgresFacts};

    const MINUTE: u64 = 60;

    fn at(second: u64) -> Now {
        let wall = DateTime::from_timestamp(i64::try_from(second).unwrap(), 0).unwrap();
        Now { boot: Duration::from_secs(second), wall }
    }

    fn server(name: &str) -> Component {
        Component::of_group(Kind::Postgres, 1, name)
    }

    fn says(facts: &mut Facts, name: &str, second: u64, answer: PostgresFacts) {
        let at = at(second).boot;
        let answer = PostgresFacts { at, timeline: 1, ..answer };
        record(&mut facts.postgres, &server(name), (at, at), Ok(answer));
    }

    fn busy(connections: u32) -> PostgresFacts {
        PostgresFacts { connections: (connections, 500), ..PostgresFacts::default() }
    }

    /// What is beyond its limit: the trigger, for how long, and whether that is long enough.
    fn told(advisor: &Advisor, second: u64) -> Vec<(&'static str, u64, bool)> {
        let advice = advisor.advice(at(second));
        advice.iter().map(|it| (it.trigger, it.held_seconds, it.is_sustained)).collect()
    }

    #[test]
    fn what_was_beyond_its_limit_for_long_is_advice() {
        let end = 20 * MINUTE;
        for (case, connections, expected) in [
            ("at the limit", (|_| Some(400)) as fn(u64) -> Option<u32>, vec![]),
            ("beyond it", |_| Some(401), vec![("connections", end, true)]),
            (
                "not for long",
                |second| Some(if second < 6 * MINUTE { 10 } else { 401 }),
                vec![("connections", 14 * MINUTE, false)],
            ),
            (
                "with a peak below",
                |second| Some(if second == 10 * MINUTE { 400 } else { 401 }),
                vec![("connections", 10 * MINUTE - 10, false)],
            ),
            (
                "with a gap",
                |second| Some(401).filter(|_| !(480..640).contains(&second)),
                vec![("connections", end, true)],
            ),
            (
                "with a gap that is too long",
                |second| Some(401).filter(|_| !(480..840).contains(&second)),
                vec![("connections", end - 840, false)],
            ),
            ("no answer", |_| None, vec![]),
        ] {
            let (mut facts, mut advisor) = (Facts::default(), Advisor::default());
            for second in (0..=end).step_by(10) {
                if let Some(count) = connections(second) {
                    says(&mut facts, "a", second, busy(count));
                } else {
                    let at = at(second).boot;
                    let failure = Failure { stage: Stage::Dial, error: String::new() };
                    record(&mut facts.postgres, &server("a"), (at, at), Err(failure));
                }
                advisor.take(&facts, at(second));
            }
            assert_eq!(told(&advisor, end), expected, "{case}");
        }
    }

    #[test]
    fn people_read_what_it_is_and_what_it_is_not() {
        assert_eq!(Scaling::default().text(true), "");
        let (mut facts, mut advisor) = (Facts::default(), Advisor::default());
        says(&mut facts, "a", 0, busy(412));
        advisor.take(&facts, at(0));
        let scaling = |second| Scaling {
            advice: advisor.advice(at(second)),
            sizes: [(1, Sizing { cores: Some(4.0), ..Sizing::default() })].into(),
            not_measured: &NOT_MEASURED[..1],
        };
        let what = "postgres a of group 1: 412 connections are in use (limit 400)";
        let advice = CONNECTIONS.advice;
        let title = "Scaling advice, on which nothing acts";
        assert_eq!(
            scaling(60).text(false),
            format!("{title}\n{what}, now; if that stays so for 15 min: {advice}\n\n")
        );
        assert_eq!(
            scaling(1000).text(true),
            format!(
                "{title}\n{what}, for 16 min 40 s: {advice}\nsize for group 1: 4 cores\n\
                 not measured here: CPU: add 2 to 4 cores where it is above 70 % for 15 min\n\n"
            )
        );
    }

    #[test]
    fn a_standby_is_behind_by_what_it_lacks() {
        let end = 16 * MINUTE;
        let standby = |lsn: u64| PostgresFacts {
            in_recovery: true,
            lsn: Some(PgLsn::from(lsn)),
            ..PostgresFacts::default()
        };
        for (case, behind, changed, expected) in [
            ("in step", 0, standby(0), vec![]),
            ("five seconds", 5, standby(0), vec![]),
            ("seven seconds", 7, standby(0), vec![("replication_lag", end - 6, true)]),
            (
                "late on purpose",
                30,
                PostgresFacts { apply_delay: Duration::from_secs(30), ..standby(0) },
                vec![],
            ),
            ("paused", 30, PostgresFacts { replay_paused: true, ..standby(0) }, vec![]),
        ] {
            let (mut facts, mut advisor) = (Facts::default(), Advisor::default());
            for second in 0..=end {
                let primary = PostgresFacts {
                    lsn: Some(PgLsn::from(100 + second)),
                    ..PostgresFacts::default()
                };
                says(&mut facts, "a", second, primary);
                let lsn = Some(PgLsn::from((100 + second).saturating_sub(behind)));
                says(&mut facts, "b", second, PostgresFacts { lsn, ..changed.clone() });
                advisor.take(&facts, at(second));
            }
            assert_eq!(told(&advisor, end), expected, "{case}");
        }
    }

    #[test]
    fn an_idle_primary_leaves_nobody_behind() {
        let mut positions = Positions::default();
        for second in 0..300 {
            positions.take(1, Duration::from_secs(second), PgLsn::from(7));
        }
        let now = Duration::from_secs(299);
        assert_eq!(positions.behind(now, PgLsn::from(7)), Duration::ZERO);
        assert!(positions.seen.len() <= 61, "{}", positions.seen.len());
        // One that never had anything of the last minute is behind by at least that.
        assert_eq!(positions.behind(now, PgLsn::from(6)), POSITIONS_FOR);
        positions.take(2, now, PgLsn::from(3));
        assert_eq!(positions.seen.len(), 1, "another timeline begins anew");
    }

    #[test]
    fn reads_and_the_cache_are_judged_where_there_is_enough_to_tell() {
        let over = Duration::from_secs(100);
        let cache = |hit, read| Some(CacheTraffic { over, hit, read });
        let load = |transactions, writing| Some(Load { over, transactions, writing });
        for (cache, load, expected) in [
            (None, None, vec![]),
            (cache(95_000, 5000), load(500_000, 0), vec![]),
            (cache(94_000, 6000), None, vec!["94.0 % of the blocks were found in the cache"]),
            (cache(9, 91), None, vec![]),
            (None, load(900_000, 100_000), vec!["8000 read transactions in a second"]),
            (None, load(900_000, 500_000), vec![]),
            // Subtransactions may be more than transactions.
            (None, load(900_000, 1_000_000), vec![]),
        ] {
            let (mut facts, mut advisor) = (Facts::default(), Advisor::default());
            let deep = DeepFacts { cache, load, ..DeepFacts::default() };
            record(&mut facts.deep, &server("a"), (at(0).boot, at(0).boot), Ok(deep));
            advisor.take(&facts, at(0));
            let measured = advisor.advice(at(0)).into_iter().map(|it| it.measured);
            assert_eq!(measured.collect::<Vec<_>>(), expected, "{cache:?} {load:?}");
        }
    }
}
