//! What is known and decided, for `/status`, for the terminal and for `/metrics`.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::balance::{Load, Loads, Place};
use crate::catalogue::{CitusNode, Placement, TableKind};
use crate::config::{Config, Engine, Mode};
use crate::control::Control;
use crate::guard::{Inputs, Refusal, refusals, spent};
use crate::job::Offer;
use crate::known::Known;
use crate::ledger::{Entry, Ledger, Outcome, Spent};
use crate::observation::Observation;
use crate::plan::{Budget, Comparison, Plan, Situation, compare, plan};
use crate::reference::ReferenceCopy;
use crate::window::Opening;
use crate::words::{bytes, count};

/// So many of the last moves are shown.
const RECENT_MAX: usize = 20;

/// What the agent knows, and what it makes of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// Whether anything is moved.
    pub mode: Mode,
    /// Whether this replica is the one that moves; `None` while it moves nothing anyway.
    #[serde(default)]
    pub leads: Option<bool>,
    /// What it moves now.
    #[serde(default)]
    pub moving: Option<Moving>,
    /// The last look.
    #[serde(flatten)]
    pub turn: Turn,
}

/// A move under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moving {
    /// What is moved.
    #[serde(flatten)]
    pub entry: Entry,
    /// What Citus does, as it calls it: `Copying Data`, `Catching Up` …; `None` while it does not tell.
    pub phase: Option<String>,
    /// What has arrived, in bytes.
    pub copied_bytes: Option<u64>,
}

impl Moving {
    /// What Citus is at, if a replica of this agent has written down that it began it.
    fn seen(observation: &Observation, ledger: &Ledger) -> Option<Self> {
        let entry = ledger.newest().find(|it| it.outcome == Outcome::Started)?;
        let mut shown = observation.catalogue.progress.iter().flatten();
        let phase = shown.find(|it| entry.shards.contains(&it.shard)).map(|it| it.phase.clone());
        let is_at = is_at(observation, entry);
        is_at.then(|| Self { entry: entry.clone(), phase, copied_bytes: None })
    }
}

/// Whether Citus is at what was begun.
fn is_at(observation: &Observation, entry: &Entry) -> bool {
    let catalogue = &observation.catalogue;
    let mut jobs = catalogue.jobs.iter().flatten();
    let mut shown = catalogue.progress.iter().flatten();
    let mut movers = catalogue.movers.iter().flatten();
    let is_it = |shard: Option<i64>| shard.map_or(entry.copies, |it| entry.shards.contains(&it));
    jobs.any(|it| entry.job == Some(it.id))
        || shown.any(|it| entry.shards.contains(&it.shard))
        || movers.any(|it| is_it(it.shard))
}

/// What came of a look.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Turn {
    /// There was none yet.
    Starting,
    /// It found nothing that could be decided from.
    Unknown {
        /// When.
        at: DateTime<Utc>,
        /// Why.
        reason: String,
    },
    /// There is no Citus, so there is nothing to do.
    NoCitus {
        /// When.
        at: DateTime<Utc>,
        /// Who said so.
        coordinator: String,
        /// Of which database.
        database: String,
    },
    /// It was decided.
    Decided(Box<View>),
}

/// What was found and decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// When the look began.
    pub at: DateTime<Utc>,
    /// The coordinator's primary.
    pub coordinator: String,
    /// The version of Citus.
    pub citus_version: String,
    /// The nodes that shards can be on.
    pub nodes: Vec<NodeView>,
    /// Groups that have a weight and no node.
    #[serde(default)]
    pub weightless: Vec<u32>,
    /// Why nothing is moved now.
    pub refusals: Vec<Refusal>,
    /// Reference tables that are to be copied first.
    #[serde(default)]
    pub reference: Option<ReferenceCopy>,
    /// What Citus is at, of what any replica began.
    #[serde(default)]
    pub under_way: Option<Moving>,
    /// Whether all that Citus plans may be moved as one job; `None` if it is not to be.
    #[serde(default)]
    pub job: Option<Offer>,
    /// The job that any replica began, if nobody has said how it ended.
    #[serde(default)]
    pub begun: Option<Entry>,
    /// Whether the window is open; `None` without one.
    pub window: Option<WindowView>,
    /// What operators ask for; `None` if that is unknown.
    pub control: Option<Control>,
    /// Shards that are where somebody wants them, and where that is.
    pub settled: BTreeMap<i64, u32>,
    /// Whether all that there is to clean up is what moves left that succeeded: Citus drops it by itself,
    /// some seconds after.
    pub awaits_drop: bool,
    /// The groups that are to be emptied, and what is left of that.
    pub drains: Vec<Drain>,
    /// What was moved in the last 24 hours, and in this run; `None` if that is unknown.
    pub spent: Option<(Spent, Spent)>,
    /// The last moves, the newest first.
    pub recent: Vec<Entry>,
    /// What would be moved, whatever is refused for the whole cluster.
    pub plan: Option<Plan>,
    /// Why there is no plan.
    pub plan_unknown: Option<String>,
    /// Where Citus' own plan differs.
    pub comparison: Option<Comparison>,
    /// Why that is not known.
    pub comparison_unknown: Option<String>,
}

/// A node that shards can be on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its address: `worker-1:5432`.
    pub node: String,
    /// Its group.
    pub group: u32,
    /// Whether it is to have shards.
    pub is_wanted: bool,
    /// Why nothing is moved to it or from it.
    pub blocked: Option<String>,
    /// The bytes of its shard groups; `None` if some size is unknown.
    pub bytes: Option<u64>,
    /// How many shard groups it has.
    pub shard_groups: Option<u32>,
    /// The share of the load that it has.
    pub load: Option<f64>,
    /// The share that it is to have.
    pub target: Option<f64>,
    /// What is free on its disk.
    pub disk_available_bytes: Option<u64>,
    /// The size of its disk.
    pub disk_bytes: Option<u64>,
    /// What stands in `pg_wal`.
    pub wal_bytes: Option<u64>,
    /// Connections that run something.
    pub active_connections: Option<u32>,
}

/// A group of servers that is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Its number.
    pub group: u32,
    /// Its node, if it has one.
    pub node: Option<String>,
    /// Shards that are on it, without those of reference tables, which every node has.
    pub shards: usize,
    /// Tables whose shards are there and that nobody plans to move.
    #[serde(default)]
    pub strange: Vec<String>,
    /// What Citus has to drop there still; `None` if that is unknown.
    pub cleanup: Option<usize>,
    /// Whether Citus puts no new shards there: `shouldhaveshards` is false.
    pub is_closed: bool,
}

impl Drain {
    /// Whether the node can be removed: nothing is on it, and nothing will be.
    pub fn is_safe(&self) -> bool {
        self.shards == 0 && self.cleanup == Some(0) && self.is_closed
    }

    fn new(group: u32, observation: &Observation) -> Self {
        let catalogue = &observation.catalogue;
        let node = catalogue.primary(group);
        let is_own = |it: &&Placement| {
            let table = catalogue.tables.get(&it.table);
            it.group == group && table.is_none_or(|it| it.kind != TableKind::Reference)
        };
        let records = catalogue.cleanup.as_ref().ok();
        let strange = catalogue.placements.iter().filter(is_own).filter_map(|it| {
            let table = catalogue.tables.get(&it.table);
            let name = || table.map_or_else(|| format!("OID {}", it.table), |it| it.name.clone());
            (!table.is_some_and(|it| it.kind.moves())).then(name)
        });
        let strange: BTreeSet<String> = strange.collect();
        Self {
            group,
            node: node.map(CitusNode::address),
            shards: catalogue.placements.iter().filter(is_own).count(),
            strange: strange.into_iter().collect(),
            cleanup: records.map(|it| it.iter().filter(|it| it.group == group).count()),
            is_closed: node.is_none_or(|it| !it.should_have_shards),
        }
    }
}

/// When something may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowView {
    /// Whether it may be now.
    pub is_open: bool,
    /// Until when, or from when on.
    pub changes_at: Option<DateTime<Utc>>,
}

impl View {
    /// Decides. Nothing is asked.
    pub fn new(
        observation: &Observation,
        config: &Config,
        control: &Known<Control>,
        ledger: &Known<Ledger>,
        now: DateTime<Utc>,
    ) -> Self {
        let window = config.window.as_ref();
        let ledger = &ledger.clone().map(|it| it.under_way(|entry| is_at(observation, entry)));
        let (budget, limits) = (&config.budget, &config.guard);
        let inputs = Inputs { observation, window, budget, limits, control, ledger, now };
        let (refusals, reference) = (refusals(inputs), ReferenceCopy::needed(inputs));
        // Unknown closes the guard; the plan is shown as if nothing were asked for, and nothing
        // had been moved.
        let (no_control, no_ledger) = (Control::default(), Ledger::default());
        let known_control = control.as_ref().ok().cloned();
        let control = control.as_ref().unwrap_or(&no_control);
        let spent = ledger.as_ref().ok().map(|it| spent(it, window, now));
        let ledger = ledger.as_ref().unwrap_or(&no_ledger);
        let situation =
            Situation::new(observation, &refusals, control, &config.balance, &config.guard)
                .resting(ledger, now);
        let made = plan(
            &situation,
            &config.balance,
            Budget::left(&config.budget, spent.unwrap_or_default()),
        );
        let loads = Loads::new(&situation.places, &situation.groups, config.balance.count_share);
        let moves = made.as_ref().map(|it| it.moves.as_slice()).unwrap_or_default();
        let offer = match (&made, &situation.citus) {
            (Ok(plan), Ok(wishes)) if config.apply.engine == Engine::Job => {
                Offer::new(plan, wishes, ledger, now)
            }
            _ => None,
        };
        let comparison = situation.citus.as_ref().map(|wishes| compare(moves, wishes));
        let loads = loads.as_ref().ok();
        let is_there = |shard: i64, to: u32| {
            let mut groups = situation.groups.iter();
            groups.any(|it| it.place == Ok(to) && it.shards.contains(&shard))
        };
        let settled = control.moves.iter().filter(|(shard, to)| is_there(**shard, **to));
        let weights = config.balance.weights.iter().map(|it| it.group);
        let nodes = situation.places.iter().map(|it| NodeView::new(it, loads, observation));
        Self {
            at: observation.at,
            coordinator: observation.coordinator.clone(),
            citus_version: observation.catalogue.version.clone(),
            nodes: nodes.collect(),
            weightless: weights.filter(|it| observation.catalogue.primary(*it).is_none()).collect(),
            refusals,
            reference,
            under_way: Moving::seen(observation, ledger),
            job: offer,
            begun: ledger.job().cloned(),
            window: window.map(|it| it.at(now).into()),
            drains: control.drains.iter().map(|it| Drain::new(*it, observation)).collect(),
            settled: settled.map(|(shard, to)| (*shard, *to)).collect(),
            control: known_control,
            awaits_drop: observation.catalogue.cleanup.as_ref().is_ok_and(|records| {
                !records.is_empty() && records.iter().all(|it| it.is_deferred)
            }),
            spent,
            recent: ledger.newest().take(RECENT_MAX).cloned().collect(),
            comparison_unknown: comparison.as_ref().err().map(ToString::to_string),
            comparison: comparison.ok(),
            plan_unknown: made.as_ref().err().map(ToString::to_string),
            plan: made.ok(),
        }
    }

    /// The refusals that hold for every move.
    pub fn closed(&self) -> impl Iterator<Item = &Refusal> {
        self.refusals.iter().filter(|it| it.is_for_all())
    }

    /// The address of a group's node.
    pub fn address(&self, group: u32) -> String {
        let node = self.nodes.iter().find(|it| it.group == group);
        node.map_or_else(|| format!("group {group}"), |it| it.node.clone())
    }

    /// What it comes to, in one sentence without full stop.
    pub fn summary(&self) -> String {
        let Some(plan) = &self.plan else {
            let why = self.plan_unknown.as_deref().unwrap_or("no reason is known");
            return format!("no plan: {why}");
        };
        if plan.moves.is_empty() {
            return format!("nothing to move: {}", plan.end);
        }
        let (moves, size) = (count(plan.moves.len(), "shard group"), plan.bytes());
        let as_job = if self.job.is_some() { " as one job" } else { "" };
        let what = format!("{moves} to move{as_job}, {}", bytes(size));
        let closed = self.closed().next().map(|it| it.reason.as_str());
        match closed.or(self.job.as_ref().and_then(|it| it.refused.as_deref())) {
            Some(reason) => format!("{what}, but not now: {reason}"),
            None => what,
        }
    }
}

impl NodeView {
    fn new(place: &Place, loads: Option<&Loads>, observation: &Observation) -> Self {
        let servers = observation.servers.get(&place.group);
        let primary = servers.and_then(|it| it.primary.as_ref().ok());
        let disk = primary.and_then(|it| it.disk.as_ref().ok());
        let load: Option<Load> = loads.and_then(|it| it.of(place.group));
        Self {
            node: place.address.clone(),
            group: place.group,
            is_wanted: place.is_wanted,
            blocked: place.blocked.clone(),
            bytes: load.map(|it| it.bytes),
            shard_groups: load.map(|it| it.count),
            load: load.zip(loads).map(|(it, loads)| loads.excess(place.group) + it.target),
            target: load.map(|it| it.target),
            disk_available_bytes: disk.map(|it| it.available),
            disk_bytes: disk.map(|it| it.total),
            wal_bytes: primary.and_then(|it| it.wal.as_ref().ok()).map(|it| it.bytes),
            active_connections: primary.and_then(|it| it.active_connections.as_ref().ok()).copied(),
        }
    }
}

impl From<Opening> for WindowView {
    fn from(opening: Opening) -> Self {
        match opening {
            Opening::Open { until } => Self { is_open: true, changes_at: Some(until) },
            Opening::Closed { next } => Self { is_open: false, changes_at: next },
        }
    }
}

impl Turn {
    /// When it was, if there was one.
    pub fn at(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Starting => None,
            Self::Unknown { at, .. } | Self::NoCitus { at, .. } => Some(*at),
            Self::Decided(view) => Some(view.at),
        }
    }

    /// Why the agent cannot do its work; `None` while it can, or has none.
    pub fn not_ready(&self) -> Option<String> {
        match self {
            Self::Starting => Some("the cluster was not looked at yet".to_owned()),
            Self::Unknown { reason, .. } => Some(reason.clone()),
            Self::NoCitus { .. } | Self::Decided(_) => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;
    use crate::guard::tests::well;
    use crate::known::Unknown;

    /// The shipped configuration.
    pub(crate) fn config() -> Config {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/rebalance-agent.toml");
        shared::config::load(&path).unwrap()
    }

    /// Two workers: 30 bytes of two colocated tables and 10 of another on the first, 40 on the second.
    pub(crate) fn view(change: impl FnOnce(&mut Observation)) -> View {
        let mut observation = well();
        change(&mut observation);
        let (control, ledger) = (Ok(Control::default()), Ok(Ledger::default()));
        View::new(&observation, &config(), &control, &ledger, observation.at)
    }

    /// Of one that moves nothing.
    pub(crate) fn report(turn: Turn) -> Report {
        let cluster = "demo".to_owned();
        Report { cluster, mode: Mode::DryRun, leads: None, moving: None, turn }
    }

    /// All of the second worker's on the first.
    pub(crate) fn skewed(observation: &mut Observation) {
        let catalogue = &mut observation.catalogue;
        for placement in &mut catalogue.placements {
            if catalogue.tables[&placement.table].kind.moves() {
                placement.group = 1;
            }
        }
    }

    /// Of a replica that does not move it, too.
    #[test]
    fn what_citus_is_at_is_told_with_who_began_it() {
        let mut observation = well();
        let entry = |outcome| Entry {
            at: observation.at,
            shard: 101,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job: None,
            moves: 1,
            bytes: 10,
            shards: vec![101, 103],
            replica: "host-2".to_owned(),
            outcome,
            reason: String::new(),
            ended_at: None,
        };
        let ledger = |outcome| Ledger::new(vec![entry(outcome)]);
        let (begun, ended) = (ledger(Outcome::Started), ledger(Outcome::Moved));
        assert_eq!(Moving::seen(&observation, &begun), None);
        let progress = |shard| {
            let [source, target, phase] = ["w1:5432", "w2:5432", "Copying Data"].map(str::to_owned);
            Ok(vec![crate::catalogue::Progress { shard, source, target, phase }])
        };
        observation.catalogue.progress = progress(103);
        let moving = Moving::seen(&observation, &begun).unwrap();
        assert_eq!(
            (moving.entry.replica.as_str(), moving.phase.as_deref()),
            ("host-2", Some("Copying Data"))
        );
        assert_eq!(Moving::seen(&observation, &ended), None);
        // Somebody else's.
        observation.catalogue.progress = progress(102);
        assert_eq!(Moving::seen(&observation, &begun), None);
    }

    #[test]
    fn a_drain_names_what_nobody_plans_to_move() {
        let mut observation = well();
        observation.catalogue.tables.get_mut(&3).unwrap().kind = TableKind::Other;
        assert_eq!(Drain::new(1, &observation).strange, ["public.other"]);
        assert_eq!(Drain::new(2, &observation).strange, <[String; 0]>::default());
    }

    #[test]
    fn what_it_comes_to_is_one_sentence() {
        assert_eq!(
            view(|it| it.catalogue.placements.clear()).summary(),
            "nothing to move: 0.0 % of the load lies where it does not belong, and 5.0 % may"
        );
        assert_eq!(view(skewed).summary(), "1 shard group to move, 40 B");
        let closed = view(|it| {
            skewed(it);
            it.catalogue.is_coordinator = false;
        });
        assert_eq!(
            closed.summary(),
            "1 shard group to move, 40 B, but not now: the server that was asked is a worker"
        );
        let unknown =
            view(|it| it.catalogue.placements[0].bytes = Err(Unknown::because("no answer")));
        assert_eq!(unknown.summary(), "no plan: no answer");
    }

    #[test]
    fn a_report_survives_being_written() {
        for turn in [
            Turn::Starting,
            Turn::Unknown { at: Utc::now(), reason: "no route to host".to_owned() },
            Turn::Decided(Box::new(view(|it| {
                skewed(it);
                it.catalogue.is_coordinator = false;
            }))),
        ] {
            let report = report(turn);
            let text = serde_json::to_string(&report).unwrap();
            assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report, "{text}");
        }
    }
}
