//! The commands that ask for something: for the agents that run, by way of etcd, or done here.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use chrono::TimeDelta;
use humantime::format_duration;
use shared::cli::print;
use shared::lease::Claim;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::apply::Hand;
use crate::board::Board;
use crate::commands::{APPLICATION_NAME, look};
use crate::config::{Config, Mode};
use crate::control::Request;
use crate::guard::Gate;
use crate::ledger::{Entry, Outcome};
use crate::memory::Memory;
use crate::observe::{Observer, Seen};
use crate::plan::{Move, Why};
use crate::rebalance::Rebalancer;
use crate::report::{Report, Turn, View};
use crate::show;
use crate::step::{Standing, Step, next};
use crate::words::bytes;

/// How often is looked whether what was asked for is done.
const WAIT: Duration = Duration::from_secs(5);
/// How long nobody may lead: after the death of the one that did, another takes over within the lease's
/// time.
const LEADERLESS_MAX: Duration = Duration::from_secs(30);

/// For so long a move may be written down before it shows.
const BEGUN_MAX: TimeDelta = TimeDelta::seconds(10);

/// Asks for something that only agents that run can do.
///
/// # Errors
///
/// There is no etcd, or it does not take the request.
pub async fn ask(config: Config, request: Request) -> anyhow::Result<()> {
    let told = told(&request, config.mode);
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let etcd = observer.etcd().context(without_etcd(&request))?;
    Memory::in_etcd(etcd.clone(), &config.cluster).ask(request).await?;
    print(told)
}

/// Why it cannot be asked for, and what to do instead.
const fn without_etcd(request: &Request) -> &'static str {
    match request {
        Request::Resume => {
            "no [etcd] is configured, so nobody can have paused an agent: to let nothing rest any more, restart the \
             one that moves"
        }
        Request::Undrain { .. } => {
            "no [etcd] is configured, so no agent remembers a drain: it ended with its command; if the node is to \
             have shards again, set its shouldhaveshards with citus_set_node_property()"
        }
        Request::Drop { .. } => {
            "no [etcd] is configured, so no agent remembers that a shard is asked for: stop the command that moves it"
        }
        _ => {
            "no [etcd] is configured, and without it no agent hears of this: stop the agent that moves, or set \
             mode = \"dry_run\" and restart it"
        }
    }
}

/// Asks for something, by way of etcd, or does it here without.
///
/// # Errors
///
/// It cannot be asked for, or something is in the way.
pub async fn carry_out(
    config: Config,
    request: Request,
    is_waited_for: bool,
) -> anyhow::Result<()> {
    if config.etcd.is_none() {
        ensure!(
            config.mode == Mode::Apply,
            "mode is \"dry_run\": set mode = \"apply\" for something to be moved"
        );
        if matches!(request, Request::Drain { .. }) {
            warn!(
                "an agent that runs without [etcd] knows nothing of this drain and moves shards back: stop it first"
            );
        }
        return Box::pin(here(config, request)).await;
    }
    ask(config.clone(), request.clone()).await?;
    if is_waited_for { Box::pin(wait(config, &request)).await } else { Ok(()) }
}

/// Waits until the agents that run have done it, or something is in the way; says when that changes how far
/// it is.
async fn wait(config: Config, request: &Request) -> anyhow::Result<()> {
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let etcd = observer.etcd().context("no [etcd] is configured")?;
    let memory = Memory::in_etcd(etcd.clone(), &config.cluster);
    let (mut said, mut led_at) = (String::new(), Instant::now());
    loop {
        sleep(WAIT).await;
        let report = look(config.clone()).await?;
        let Turn::Decided(view) = &report.turn else { bail!("{}", show::status(&report)) };
        if is_done(view, request) {
            return print(show::status(&report));
        }
        ensure!(is_asked_for(view, request), "somebody has taken the request back");
        in_the_way(&report, view, request)?;
        // One that only looks, with mode = "dry_run", never leads.
        if memory.leader().await?.is_some() {
            led_at = Instant::now();
        }
        ensure!(
            led_at.elapsed() < LEADERLESS_MAX,
            "nobody does it: for {} no agent with mode = \"apply\" has led; start one, it will find the \
             request",
            format_duration(LEADERLESS_MAX)
        );
        let how_far = show::how_far(&report, view, request);
        if how_far != said {
            print(format!("{} {how_far}\n", view.at.format("%H:%M:%S UTC")))?;
            said = how_far;
        }
    }
}

/// Does it in this process.
async fn here(config: Config, request: Request) -> anyhow::Result<()> {
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let (mode, board) = (config.mode, Board::new(&config));
    let (rebalancer, sharing) = Rebalancer::new(config, observer, board.clone());
    rebalancer.memory().ask(request.clone()).await?;
    let only = if matches!(request, Request::Drain { .. }) { Why::Drain } else { Why::Asked };
    let rebalancer = rebalancer.only(only);
    let shutdown = CancellationToken::new();
    let done = async {
        loop {
            sleep(WAIT / 10).await;
            // What is under way ends, and is written down, before anything is said of it.
            let Some(report) = board.fresh() else { continue };
            let Turn::Decided(view) = &report.turn else { bail!("{}", show::status(&report)) };
            if is_done(view, &request) {
                return print(show::status(&report));
            }
            let leads = report.leads == Some(true);
            let step = next(view, Standing { mode, leads, only: Some(only), is_cleaned: true });
            if !matches!(step, Step::Move(_)) {
                in_the_way(&report, view, &request)?;
            }
        }
    };
    tokio::select! {
        ended = done => ended,
        ended = sharing.run(shutdown.clone()) => ended,
        ended = Box::pin(rebalancer.run(shutdown.clone())) => ended,
    }
}

/// Whether what was asked for is there.
fn is_done(view: &View, request: &Request) -> bool {
    match request {
        Request::Drain { group } => {
            let drain = view.drains.iter().find(|it| it.group == *group);
            drain.is_some_and(|it| it.shards == 0 && it.cleanup == Some(0))
        }
        Request::Move { shard, to } => {
            let moved = |it: &Entry| {
                it.outcome == Outcome::Moved && it.to == *to && it.shards.contains(shard)
            };
            // The agent that moved it has forgotten the request by now.
            let is_forgotten =
                view.control.as_ref().is_some_and(|it| !it.moves.contains_key(shard));
            view.settled.get(shard) == Some(to) || (is_forgotten && view.recent.iter().any(moved))
        }
        _ => true,
    }
}

/// Whether it is still asked for; if that is unknown, the guard says so.
fn is_asked_for(view: &View, request: &Request) -> bool {
    view.control.as_ref().is_none_or(|control| match request {
        Request::Drain { group } => control.drains.contains(group),
        Request::Move { shard, .. } => control.moves.contains_key(shard),
        _ => true,
    })
}

/// Fails if there is no such shard that can be moved.
///
/// # Errors
///
/// There is none, or the coordinator does not tell.
pub async fn can_move(config: &Config, shard: i64) -> anyhow::Result<()> {
    let observer = Observer::new(config, APPLICATION_NAME)?;
    let Seen::Citus { observation, .. } = observer.look().await? else {
        bail!("there is no Citus");
    };
    let groups = observation.catalogue.shard_groups();
    ensure!(
        groups.iter().any(|it| it.shards.contains(&shard)),
        "there is no shard {shard} that can be moved: see pg_dist_shard; those of reference tables \
         are on every node"
    );
    Ok(())
}

/// Whether something of it is to be done as soon as nothing is closed.
fn is_planned(view: &View, request: &Request) -> bool {
    let is_it = |it: &Move| match request {
        Request::Drain { group } => it.why == Why::Drain && it.from == *group,
        Request::Move { shard, to } => it.to == *to && it.shards.contains(shard),
        _ => false,
    };
    let copy = view.reference.iter().any(|it| it.may_begin(&view.refusals));
    copy || view.plan.iter().flat_map(|it| &it.moves).any(is_it)
}

/// Whether something of it was begun, whatever has closed since.
fn is_under_way(report: &Report, view: &View, request: &Request) -> bool {
    let is_of = |it: &Entry| match request {
        Request::Drain { group } => it.from == *group,
        Request::Move { shard, to } => it.to == *to && it.shards.contains(shard),
        _ => false,
    };
    let moving = report.moving.as_ref().or(view.under_way.as_ref()).map(|it| &it.entry);
    // Written down before Citus is told.
    let is_new = |it: &&Entry| it.outcome == Outcome::Started && view.at < it.at + BEGUN_MAX;
    moving.is_some_and(is_of) || view.recent.iter().filter(is_new).any(is_of)
}

/// Fails if nothing of it will be moved before somebody does something.
fn in_the_way(report: &Report, view: &View, request: &Request) -> anyhow::Result<()> {
    let waits = |gate| matches!(gate, Gate::Busy | Gate::Cleanup | Gate::Leftovers);
    let closed = view.closed().find(|it| !waits(it.gate));
    if is_under_way(report, view, request) {
        return Ok(());
    }
    let is_quiet = report.moving.is_none() && !view.refusals.iter().any(|it| waits(it.gate));
    let why = match closed {
        Some(refusal) => refusal.reason.as_str(),
        None if is_quiet && !is_planned(view, request) => "see what stays, and why",
        None => return Ok(()),
    };
    print(show::plan(report))?;
    bail!("not now: {why}")
}

/// Has Citus clean up, drops orphans if that is wanted, and shows what remains.
///
/// # Errors
///
/// Something does, or nobody knows.
pub async fn clean_up(config: Config, drops_orphans: bool) -> anyhow::Result<()> {
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let Seen::Citus { coordinator, .. } = observer.look().await? else {
        return print("There is no Citus: nothing to clean up.\n");
    };
    // It does no harm beside an agent that moves: Citus leaves alone what is in use.
    let hand = Hand {
        settings: observer.settings(),
        limits: &config.apply,
        coordinator: &coordinator,
        claim: &Claim::unlimited(),
    };
    hand.clean_up().await?;
    // What Citus has a record of is none.
    if drops_orphans && let Seen::Citus { observation, .. } = observer.look().await? {
        for (orphan, node) in hand.drop_orphans(&observation).await? {
            print(format!("Dropped {} on {node}, {}.\n", orphan.table, bytes(orphan.bytes)))?;
        }
    }
    let report = look(config.clone()).await?;
    let Turn::Decided(view) = &report.turn else { bail!("{}", show::status(&report)) };
    // Of a server that does not answer nobody knows.
    let is_left = |gate| {
        use Gate::{Busy, Cleanup, Leftovers, Orphans, Reachable};
        matches!(gate, Cleanup | Leftovers | Orphans | Busy | Reachable)
    };
    let left: Vec<_> = view.refusals.iter().filter(|it| is_left(it.gate)).collect();
    if left.is_empty() {
        return print("Nothing is left of moves.\n");
    }
    let lines = left.iter().map(|it| format!("{}: {}; {}", it.scope, it.reason, it.next));
    bail!("{}", lines.collect::<Vec<_>>().join("\n"))
}

/// The group that an operator names.
///
/// # Errors
///
/// There is none, or the coordinator does not tell.
pub async fn group(config: &Config, name: &str) -> anyhow::Result<u32> {
    let report = look(config.clone()).await?;
    let Turn::Decided(view) = &report.turn else { bail!("{}", show::status(&report)) };
    find(view, name)
}

fn find(view: &View, name: &str) -> anyhow::Result<u32> {
    let is_it = |group: u32, node: &str| {
        let host = node.rsplit_once(':').map_or(node, |(host, _)| host);
        name.parse() == Ok(group) || name == node || name == host
    };
    let mut found = view.nodes.iter().filter(|it| is_it(it.group, &it.node));
    match (found.next(), found.next()) {
        (Some(node), None) => Ok(node.group),
        (Some(_), Some(_)) => bail!("several nodes are called {name}: give the port, or the group"),
        (None, _) => {
            let nodes = view.nodes.iter().map(|it| format!("{} (group {})", it.node, it.group));
            bail!("no node is called {name}; there are: {}", nodes.collect::<Vec<_>>().join(", "))
        }
    }
}

/// What an operator is told once it is asked for.
fn told(request: &Request, mode: Mode) -> String {
    let what = match request {
        Request::Pause(pause) => pause.until.map_or_else(
            || "Paused, until rebalance-agent resume.".to_owned(),
            |until| format!("Paused until {}.", until.format("%Y-%m-%d %H:%M:%S UTC")),
        ),
        Request::Resume => "Not paused, and what failed before need not rest.".to_owned(),
        Request::Drain { group } => {
            format!("Group {group} is to be emptied; see how far it is: rebalance-agent status.")
        }
        Request::Undrain { group } => format!("Group {group} may have shards."),
        Request::Move { shard, to } => format!(
            "Shard {shard} is to be moved to group {to}; see how far it is: rebalance-agent status."
        ),
        Request::Drop { shard } => format!("Shard {shard} is not asked for."),
    };
    let moves = matches!(request, Request::Drain { .. } | Request::Move { .. });
    match mode {
        Mode::DryRun if moves => {
            format!(
                "{what}\nThis file has mode = \"dry_run\": an agent that runs with it moves nothing.\n"
            )
        }
        _ => what + "\n",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::control::Control;
    use crate::ledger::Ledger;
    use crate::observation::Observation;
    use crate::report::Moving;
    use crate::report::tests::{config, report, skewed, view};

    /// As it is once that is asked for.
    fn asked(request: &Request, change: fn(&mut Observation)) -> View {
        let mut observation = crate::guard::tests::well();
        change(&mut observation);
        let control = Ok(Control::default().with(request.clone()));
        View::new(&observation, &config(), &control, &Ok(Ledger::default()), observation.at)
    }

    /// Other moves are none of it.
    #[test]
    fn waiting_ends_when_nothing_of_what_was_asked_for_will_be_done() {
        let drain = Request::Drain { group: 1 };
        let to = |shard, to| Request::Move { shard, to };
        for (case, request, change, expected) in [
            ("a drain", &drain, (|_| {}) as fn(&mut Observation), None),
            ("a move", &to(104, 1), |_| {}, None),
            (
                "closed",
                &drain,
                |it| it.catalogue.is_coordinator = false,
                Some("not now: the server that was asked is a worker"),
            ),
            (
                "busy",
                &to(9, 1),
                |it| it.catalogue.progress = Err(crate::known::Unknown::because("")),
                None,
            ),
            ("others are moved", &to(9, 2), skewed, Some("not now: see what stays, and why")),
            (
                "it is held",
                &to(104, 1),
                |it| it.catalogue.tables.get_mut(&2).unwrap().has_replica_identity = false,
                Some("not now: see what stays, and why"),
            ),
            (
                "reference tables come first",
                &to(104, 1),
                |it| it.catalogue.placements.retain(|it| (it.table, it.group) != (4, 1)),
                None,
            ),
        ] {
            let view = asked(request, change);
            let report = report(Turn::Decided(Box::new(view.clone())));
            let found = in_the_way(&report, &view, request).err().map(|it| it.to_string());
            assert_eq!(found.as_deref(), expected, "{case}");
        }
    }

    /// It closes gates itself: its budget is spent.
    #[test]
    fn what_is_under_way_is_waited_for_whatever_has_closed() {
        let to = |shard, to| Request::Move { shard, to };
        let begun = |seconds| {
            let mut entry = crate::ledger::tests::entry(0, 103, Outcome::Started);
            entry.shards = vec![101, 103];
            let mut view = asked(&to(101, 2), |it| it.catalogue.is_coordinator = false);
            entry.at = view.at - TimeDelta::seconds(seconds);
            view.recent = vec![entry];
            view
        };
        for (case, request, view, is_shown, expected) in [
            ("it has just begun", to(101, 2), begun(1), false, true),
            ("Citus is at it", to(101, 2), begun(60), true, true),
            ("another shard is moved", to(102, 2), begun(1), true, false),
            ("it goes elsewhere", to(101, 1), begun(1), true, false),
            ("nobody said how it ended", to(101, 2), begun(60), false, false),
            ("off a node that is drained", Request::Drain { group: 1 }, begun(60), true, true),
            ("off another", Request::Drain { group: 2 }, begun(60), true, false),
        ] {
            let mut view = view;
            let entry = view.recent[0].clone();
            view.under_way = is_shown.then_some(Moving { entry, phase: None, copied_bytes: None });
            let report = report(Turn::Decided(Box::new(view.clone())));
            assert_eq!(in_the_way(&report, &view, &request).is_ok(), expected, "{case}");
        }
    }

    #[test]
    fn a_request_is_done_when_the_shard_is_there() {
        let request = Request::Move { shard: 104, to: 2 };
        let view = asked(&request, |_| {});
        assert_eq!(view.settled, BTreeMap::from([(104, 2)]));
        assert!(is_done(&view, &request) && is_asked_for(&view, &request));
        let elsewhere = Request::Move { shard: 104, to: 1 };
        assert!(!is_done(&view, &elsewhere));
    }

    #[test]
    fn a_node_is_found_by_what_operators_call_it() {
        let view = view(|_| {});
        for name in ["2", "w2", "w2:5432"] {
            assert_eq!(find(&view, name).unwrap(), 2, "{name}");
        }
        let error = find(&view, "w9").unwrap_err().to_string();
        assert_eq!(
            error,
            "no node is called w9; there are: coord:5432 (group 0), w1:5432 (group 1), w2:5432 (group 2)"
        );
    }
}
