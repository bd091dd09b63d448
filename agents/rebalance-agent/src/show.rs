//! What is known and decided, for people on a terminal.

use std::fmt::Write as _;

use shared::table::Table;

use crate::config::Mode;
use crate::control::Request;
use crate::ledger::{Entry, Outcome};
use crate::plan::{Comparison, Hot, Plan};
use crate::reference::ReferenceCopy;
use crate::report::{Drain, Moving, NodeView, Report, Turn, View};
use crate::words::{bytes, count, percent, some};

/// What would be moved, and every reason not to.
pub fn plan(report: &Report) -> String {
    let Turn::Decided(view) = &report.turn else { return status(report) };
    let mut text = head(report, view);
    match (&view.plan, &view.plan_unknown) {
        (Some(plan), _) => {
            add(&mut text, &balance(plan));
            add(&mut text, &moves(plan, view));
            add(&mut text, &list("STAYS", plan.skipped.iter().map(|it| (&*it.what, &*it.reason))));
            add(&mut text, &hot(&plan.hot));
        }
        (None, why) => {
            let why = why.as_deref().unwrap_or_default();
            add(&mut text, &format!("No plan: {why}\n"));
        }
    }
    add(&mut text, &weightless(view));
    add(&mut text, &reference(view));
    add(&mut text, &job(view));
    add(&mut text, &drains(view));
    add(&mut text, &refused(view));
    add(&mut text, &compared(view));
    text
}

/// What the nodes have, and what it comes to.
pub fn status(report: &Report) -> String {
    let cluster = &report.cluster;
    match &report.turn {
        Turn::Starting => format!("{cluster}: was not looked at yet\n"),
        Turn::Unknown { reason, .. } => format!("{cluster}: unknown: {reason}\n"),
        Turn::NoCitus { coordinator, database, .. } => {
            format!("{cluster}: no Citus in database {database} of {coordinator}: nothing to do\n")
        }
        Turn::Decided(view) => {
            let mut text = head(report, view);
            add(&mut text, &format!("{}\n", sentence(&view.summary())));
            add(&mut text, &under_way(report, view));
            add(&mut text, &reference(view));
            add(&mut text, &job(view));
            add(&mut text, &wishes(view));
            add(&mut text, &drains(view));
            add(&mut text, &recent(view));
            add(&mut text, &refused(view));
            text
        }
    }
}

/// Adds a part after an empty line, if there is anything in it.
fn add(text: &mut String, part: &str) {
    if !part.is_empty() {
        text.push('\n');
        text.push_str(part);
    }
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |it| it.to_uppercase().chain(letters).collect())
}

fn head(report: &Report, view: &View) -> String {
    let View { coordinator, citus_version, nodes, .. } = view;
    let Report { cluster, mode, leads, .. } = report;
    let mode = match (mode, leads) {
        (Mode::DryRun, _) => "dry run",
        (Mode::Apply, Some(false)) => "apply, another replica leads",
        (Mode::Apply, _) => "apply",
    };
    let at = view.at.format("%Y-%m-%d %H:%M:%S UTC");
    let title =
        format!("{cluster}: Citus {citus_version}, coordinator {coordinator}, {at}, {mode}\n");
    let header =
        ["NODE", "GROUP", "SHARD GROUPS", "BYTES", "LOAD", "TARGET", "DISK FREE", "WAL", "STATE"];
    let mut table = Table::new(&header).numbers(&[1, 2, 3, 4, 5, 6, 7]);
    for it in nodes {
        let size = |it: Option<u64>| it.map_or_else(|| "?".to_owned(), bytes);
        let share = |it: Option<f64>| it.map_or_else(|| "?".to_owned(), percent);
        table.row([
            it.node.clone(),
            it.group.to_string(),
            it.shard_groups.map_or_else(|| "?".to_owned(), |it| it.to_string()),
            size(it.bytes),
            share(it.load),
            share(it.target),
            size(it.disk_available_bytes),
            size(it.wal_bytes),
            state(it),
        ]);
    }
    format!("{title}\n{table}")
}

fn state(node: &NodeView) -> String {
    match (&node.blocked, node.is_wanted) {
        (Some(reason), _) => format!("blocked: {reason}"),
        (None, true) => "takes shards".to_owned(),
        (None, false) if node.shard_groups.is_some_and(|it| 0 < it) => "is drained".to_owned(),
        (None, false) => "takes none".to_owned(),
    }
}

fn balance(plan: &Plan) -> String {
    let figure = plan.before;
    format!(
        "{} of the load lies where it does not belong: {} of the bytes, {} of the shard groups.\n",
        percent(figure.load),
        percent(figure.bytes),
        percent(figure.count)
    )
}

fn moves(plan: &Plan, view: &View) -> String {
    let end = sentence(&plan.end);
    if plan.moves.is_empty() {
        return format!("Nothing to move: {}.\n", plan.end);
    }
    let header = ["WHY", "SHARD", "TABLES", "BYTES", "FROM", "TO", "GAIN", "THEN"];
    let mut table = Table::new(&header).numbers(&[1, 3, 6, 7]);
    for it in &plan.moves {
        table.row([
            format!("{:?}", it.why).to_lowercase(),
            it.shard.to_string(),
            some(&it.tables),
            bytes(it.bytes),
            view.address(it.from),
            view.address(it.to),
            percent(it.gain),
            percent(it.figure_after),
        ]);
    }
    let (number, size) = (count(plan.moves.len(), "shard group"), bytes(plan.bytes()));
    format!("{table}{number} to move, {size}. {end}.\n")
}

fn list<'a>(title: &str, rows: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut table = Table::new(&[title, "BECAUSE"]);
    for (what, reason) in rows {
        table.row([what.to_owned(), reason.to_owned()]);
    }
    if table.is_empty() { String::new() } else { table.to_string() }
}

fn hot(hot: &[Hot]) -> String {
    let mut text = String::new();
    for it in hot {
        let Hot { shard, tables, bytes: size, share, fair_share, advice } = it;
        let (size, share, fair) = (bytes(*size), percent(*share), percent(*fair_share));
        let tables = some(tables);
        writeln!(
            text,
            "Shard {shard} of {tables} is hot: {size}, {share} of all bytes, where a node's fair \
             share is {fair}. To do: {advice}."
        )
        .ok();
    }
    text
}

/// What this replica moves; or what another does, as its entry in etcd and Citus tell.
fn under_way(report: &Report, view: &View) -> String {
    let Some(Moving { entry, phase, copied_bytes }) =
        report.moving.as_ref().or(view.under_way.as_ref())
    else {
        return String::new();
    };
    let verb = if entry.copies { "copies" } else { "moves" };
    let who = match report.moving {
        Some(_) => sentence(verb),
        None => format!("{} {verb}", entry.replica),
    };
    let phase = phase.as_deref().unwrap_or("it does not tell its phase");
    let (since, size) = (entry.at.format("%H:%M:%S UTC"), bytes(entry.bytes));
    let size = copied_bytes.map_or_else(|| size.clone(), |it| format!("{} of {size}", bytes(it)));
    format!("{who} {} since {since}: {phase}, {size}.\n", what(entry, view))
}

/// `shard 102 from w1:5432 to w2:5432`.
fn what(entry: &Entry, view: &View) -> String {
    if let Some(job) = job_name(entry) {
        return job;
    }
    let (from, to) = (view.address(entry.from), view.address(entry.to));
    match (entry.copies, entry.shards.len()) {
        (false, _) => format!("shard {} from {from} to {to}", entry.shard),
        (true, number) => format!("{} to {to}", count(number, "reference table")),
    }
}

/// `job 7: 16 shard groups`.
fn job_name(entry: &Entry) -> Option<String> {
    match entry.job? {
        0 => Some("a job".to_owned()),
        id => Some(format!("job {id}: {}", count(entry.moves as usize, "shard group"))),
    }
}

/// Weights that are nobody's.
fn weightless(view: &View) -> String {
    let line = |it: &u32| {
        format!(
            "[[balance.weights]] names group {it}, which has no node: a mistake, or it was removed.\n"
        )
    };
    view.weightless.iter().map(line).collect()
}

/// Why all that Citus plans is not moved as one job.
fn job(view: &View) -> String {
    let refused = view.job.as_ref().and_then(|it| it.refused.as_deref());
    refused.map_or_else(String::new, |why| format!("No job begins: {why}.\n"))
}

/// Reference tables that nodes lack.
fn reference(view: &View) -> String {
    let Some(ReferenceCopy { work, groups, refused }) = &view.reference else {
        return String::new();
    };
    let to: Vec<_> = groups.iter().map(|it| view.address(*it)).collect();
    let what = format!("{} to {}, {}", some(&work.tables), some(&to), bytes(work.bytes));
    match refused {
        None => format!("Reference tables are copied first: {what}.\n"),
        Some(why) => format!("Reference tables are not copied: {what}: {why}.\n"),
    }
}

/// How far something is that somebody waits for, in one sentence.
pub fn how_far(report: &Report, view: &View, request: &Request) -> String {
    let moving = under_way(report, view);
    let left = view.drains.iter().find(|it| *request == Request::Drain { group: it.group });
    let left = left.map(|it| format!("{} left on group {}. ", count(it.shards, "shard"), it.group));
    let what = if moving.is_empty() { format!("{}.", sentence(&view.summary())) } else { moving };
    format!("{}{}", left.unwrap_or_default(), what.trim_end())
}

fn wishes(view: &View) -> String {
    let mut text = String::new();
    for (shard, to) in view.control.iter().flat_map(|it| &it.moves) {
        let skipped = view.plan.iter().flat_map(|it| &it.skipped);
        let is_it = |what: &str| what.split(' ').nth(1) == Some(shard.to_string().as_str());
        let why = skipped.clone().find(|it| is_it(&it.what)).map_or("", |it| it.reason.as_str());
        let colon = if why.is_empty() { "" } else { ": " };
        writeln!(text, "Shard {shard} is wanted on {}{colon}{why}.", view.address(*to)).ok();
    }
    text
}

fn drains(view: &View) -> String {
    let mut table = Table::new(&["DRAINED", "SHARDS LEFT", "TO DROP", "NEXT"]).numbers(&[1, 2]);
    for it in &view.drains {
        let node = it.node.clone().unwrap_or_else(|| "no node".to_owned());
        table.row([
            format!("group {}, {node}", it.group),
            it.shards.to_string(),
            it.cleanup.map_or_else(|| "?".to_owned(), |it| it.to_string()),
            next_of_drain(it),
        ]);
    }
    if table.is_empty() { String::new() } else { table.to_string() }
}

/// What to do about a node that is to be emptied.
fn next_of_drain(drain: &Drain) -> String {
    let Drain { shards, cleanup, is_closed, node, strange, .. } = drain;
    match (shards, cleanup) {
        _ if !is_closed => {
            let node = node.as_deref().unwrap_or_default();
            let (host, port) = node.rsplit_once(':').unwrap_or((node, "5432"));
            format!(
                "so that no shard of a new table comes there, as a superuser: SELECT \
                 citus_set_node_property('{host}', {port}, 'shouldhaveshards', false)"
            )
        }
        (0, Some(0)) => "it is empty: it can be removed".to_owned(),
        (0, _) => "wait until Citus has dropped what was moved".to_owned(),
        _ if !strange.is_empty() => format!(
            "shards of {} are none that can be moved: undistribute_table(), or drop them",
            some(strange)
        ),
        _ => "wait; what stays, and why, is in rebalance-agent plan".to_owned(),
    }
}

fn recent(view: &View) -> String {
    let header = ["LAST MOVES", "SHARD", "FROM", "TO", "BYTES", "ENDED", "BECAUSE"];
    let mut table = Table::new(&header).numbers(&[1, 4]);
    for it in view.recent.iter().take(5) {
        let (shard, job) = (it.shard.to_string(), job_name(it));
        let place = |group| if job.is_some() { String::new() } else { view.address(group) };
        let (from, to) = (place(it.from), place(it.to));
        table.row([
            it.at.format("%Y-%m-%d %H:%M:%S").to_string(),
            job.unwrap_or_else(|| if it.copies { format!("{shard} (reference)") } else { shard }),
            from,
            to,
            bytes(it.bytes),
            match it.outcome {
                Outcome::Started => "under way?".to_owned(),
                outcome => outcome.name().to_owned(),
            },
            it.reason.clone(),
        ]);
    }
    if table.is_empty() { String::new() } else { table.to_string() }
}

fn refused(view: &View) -> String {
    if view.refusals.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["NOT NOW", "FOR", "BECAUSE", "NEXT"]);
    for it in &view.refusals {
        let name = it.gate.name().to_owned();
        table.row([name, it.scope.to_string(), it.reason.clone(), it.next.clone()]);
    }
    table.to_string()
}

fn compared(view: &View) -> String {
    let Some(Comparison { same, differences }) = &view.comparison else {
        let why = view.comparison_unknown.as_deref().unwrap_or_default();
        return format!("Citus' own plan is unknown: {why}.\n");
    };
    if differences.is_empty() {
        return match same {
            0 => "Citus would move nothing either.\n".to_owned(),
            _ => "Citus would move the same.\n".to_owned(),
        };
    }
    let mut table = Table::new(&["DIFFERS", "HERE", "CITUS"]);
    let place = |it: Option<u32>| it.map_or_else(|| "stays".to_owned(), |it| view.address(it));
    for it in differences.iter().take(20) {
        table.row([format!("shard {}", it.shard), place(it.ours), place(it.citus)]);
    }
    let more = match differences.len().saturating_sub(20) {
        0 => String::new(),
        more => format!("And {more} more. "),
    };
    let alike = match same {
        0 => "none".to_owned(),
        _ => count(*same, "shard group"),
    };
    format!("{table}{more}Citus would move {alike} alike.\n")
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;
    use crate::catalogue::PlannedShard;
    use crate::job::Offer;
    use crate::report::tests::{report, skewed, view};

    #[test]
    fn a_plan_is_shown_with_every_reason_not_to() {
        let seen = view(|it| {
            skewed(it);
            it.catalogue.is_coordinator = false;
            it.catalogue.tables.get_mut(&3).unwrap().has_replica_identity = false;
            let row = PlannedShard { shard: 102, target: "w2:5432".to_owned() };
            it.catalogue.citus_plan = Ok(vec![row]);
        });
        let text = plan(&report(Turn::Decided(Box::new(seen))));
        let expected = "\
demo: Citus 14.0-1, coordinator coord, 2026-03-10 02:00:00 UTC, dry run

NODE        GROUP  SHARD GROUPS  BYTES     LOAD  TARGET  DISK FREE      WAL  STATE
coord:5432      0             0    0 B    0.0 %   0.0 %   60.0 GiB  1.0 GiB  takes none
w1:5432         1             3   70 B  100.0 %  50.0 %   60.0 GiB  1.0 GiB  takes shards
w2:5432         2             0    0 B    0.0 %  50.0 %   60.0 GiB  1.0 GiB  takes shards

50.0 % of the load lies where it does not belong: 50.0 % of the bytes, 50.0 % of the shard groups.

WHY      SHARD  TABLES                     BYTES  FROM     TO         GAIN   THEN
balance    102  public.events, public.log   40 B  w1:5432  w2:5432  48.8 %  1.2 %
1 shard group to move, 40 B. Then 1.2 % of the load lies where it does not belong.

STAYS               BECAUSE
colocation group 2  public.other has no replica identity

NOT NOW           FOR                 BECAUSE                                NEXT
coordinator       cluster             the server that was asked is a worker  point [[nodes]] with group 0, or [patroni], at the coordinator
replica_identity  colocation group 2  public.other has no replica identity   give each a primary key, or ALTER TABLE … REPLICA IDENTITY

Citus would move the same.
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_node_that_is_drained_is_not_called_empty_too_soon() {
        let drain = |shards, cleanup, is_closed| Drain {
            group: 2,
            node: Some("w2:5432".to_owned()),
            shards,
            strange: vec![],
            cleanup,
            is_closed,
        };
        let strange = Drain { strange: vec!["a".to_owned()], ..drain(1, Some(0), true) };
        assert!(next_of_drain(&strange).starts_with("shards of a are none that can be moved"));
        for (drain, is_safe, expected) in [
            (drain(0, Some(0), true), true, "it is empty: it can be removed"),
            (drain(1, Some(0), true), false, "wait; what stays, and why"),
            (drain(0, Some(1), true), false, "wait until Citus has dropped"),
            (drain(0, None, true), false, "wait until Citus has dropped"),
            (drain(0, Some(0), false), false, "so that no shard of a new table comes there"),
        ] {
            let text = next_of_drain(&drain);
            assert!(text.starts_with(expected), "{drain:?} {text}");
            assert_eq!(drain.is_safe(), is_safe, "{drain:?}");
        }
        assert!(
            next_of_drain(&drain(3, None, false))
                .ends_with("citus_set_node_property('w2', 5432, 'shouldhaveshards', false)")
        );
    }

    #[test]
    fn what_is_moved_and_was_moved_is_shown() {
        let entry = Entry {
            at: "2026-03-10T01:59:00Z".parse().unwrap(),
            shard: 102,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job: None,
            moves: 1,
            bytes: 40,
            shards: vec![102],
            replica: "host-1".to_owned(),
            outcome: Outcome::NoLock,
            reason: "it did not get a lock within 1s".to_owned(),
            ended_at: None,
        };
        let mut seen = view(skewed);
        seen.recent = vec![entry.clone()];
        let mut report = report(Turn::Decided(Box::new(seen)));
        let phase = Some("Copying Data".to_owned());
        report.moving = Some(Moving { entry: entry.clone(), phase, copied_bytes: Some(20) });
        (report.mode, report.leads) = (Mode::Apply, Some(false));
        let text = status(&report);
        assert!(text.starts_with(
            "demo: Citus 14.0-1, coordinator coord, 2026-03-10 02:00:00 UTC, apply, another \
             replica leads\n"
        ));
        let expected = "
1 shard group to move, 40 B

Moves shard 102 from w1:5432 to w2:5432 since 01:59:00 UTC: Copying Data, 20 B of 40 B.

LAST MOVES           SHARD  FROM     TO       BYTES  ENDED    BECAUSE
2026-03-10 01:59:00    102  w1:5432  w2:5432   40 B  no_lock  it did not get a lock within 1s
";
        assert!(text.ends_with(expected), "{text}");
        report.moving = None;
        let Turn::Decided(seen) = &mut report.turn else { panic!() };
        let (phase, copied_bytes) = (Some("Catching Up".to_owned()), None);
        seen.under_way = Some(Moving { entry: entry.clone(), phase: phase.clone(), copied_bytes });
        let text = status(&report);
        let moves =
            "host-1 moves shard 102 from w1:5432 to w2:5432 since 01:59:00 UTC: Catching Up, 40 B.";
        assert!(text.contains(moves), "{text}");
        let Turn::Decided(seen) = &mut report.turn else { panic!() };
        let entry = Entry { copies: true, ..entry };
        seen.under_way = Some(Moving { entry, phase, copied_bytes });
        let text = status(&report);
        let copies =
            "host-1 copies 1 reference table to w2:5432 since 01:59:00 UTC: Catching Up, 40 B.";
        assert!(text.contains(copies), "{text}");
    }

    #[test]
    fn a_job_is_shown_as_one() {
        let mut seen = view(skewed);
        let mut entry = Entry {
            at: "2026-03-10T01:59:00Z".parse().unwrap(),
            shard: 102,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job: Some(7),
            moves: 16,
            bytes: 40,
            shards: vec![102],
            replica: "host-1".to_owned(),
            outcome: Outcome::Stopped,
            reason: "the window is closed; 3 of 16 moves are done".to_owned(),
            ended_at: None,
        };
        seen.recent = vec![entry.clone()];
        seen.job = Some(Offer { refused: Some("shard 102 stays".to_owned()) });
        let mut report = report(Turn::Decided(Box::new(seen.clone())));
        entry.outcome = Outcome::Started;
        let phase = Some("3 of 16 moves are done, Copying Data".to_owned());
        report.moving = Some(Moving { entry: entry.clone(), phase, copied_bytes: Some(20) });
        let expected = "
1 shard group to move as one job, 40 B, but not now: shard 102 stays

Moves job 7: 16 shard groups since 01:59:00 UTC: 3 of 16 moves are done, Copying Data, 20 B of 40 B.

No job begins: shard 102 stays.

LAST MOVES                            SHARD  FROM  TO  BYTES  ENDED    BECAUSE
2026-03-10 01:59:00  job 7: 16 shard groups             40 B  stopped  the window is closed; 3 of 16 moves are done
";
        let text = status(&report);
        assert!(text.ends_with(expected), "{text}");
        assert!(plan(&report).contains("\nNo job begins: shard 102 stays.\n"));
        seen.job = Some(Offer { refused: None });
        assert_eq!(seen.summary(), "1 shard group to move as one job, 40 B");
    }

    #[test]
    fn what_is_waited_for_is_told_in_one_sentence() {
        let mut seen = view(skewed);
        let report = report(Turn::Decided(Box::new(seen.clone())));
        let drain = Request::Drain { group: 1 };
        assert_eq!(how_far(&report, &seen, &drain), "1 shard group to move, 40 B.");
        let node = Some("w1:5432".to_owned());
        seen.weightless = vec![77];
        seen.drains = vec![Drain {
            group: 1,
            node,
            shards: 5,
            strange: vec![],
            cleanup: Some(0),
            is_closed: true,
        }];
        let expected = "5 shards left on group 1. 1 shard group to move, 40 B.";
        assert_eq!(how_far(&report, &seen, &drain), expected);
    }

    #[test]
    fn reference_tables_that_are_lacking_are_shown() {
        let mut seen = view(|it| {
            it.catalogue.placements.retain(|it| (it.table, it.group) != (4, 2));
        });
        let copied = "Reference tables are copied first: public.countries to w2:5432, 5 B.\n";
        assert_eq!(reference(&seen), copied);
        seen.reference.as_mut().unwrap().refused = Some("it rests".to_owned());
        let refused =
            "Reference tables are not copied: public.countries to w2:5432, 5 B: it rests.\n";
        assert_eq!(reference(&seen), refused);
    }

    #[test]
    fn where_no_size_is_told_the_coordinator_is_not_called_drained() {
        let seen = view(|it| {
            let why = crate::known::Unknown::because("no answer");
            it.catalogue.placements[0].bytes = Err(why);
        });
        let states: Vec<_> = seen.nodes.iter().map(state).collect();
        assert_eq!(states, ["takes none", "takes shards", "takes shards"]);
    }

    #[test]
    fn what_only_citus_would_move_is_told() {
        let seen = view(|it| {
            let row = PlannedShard { shard: 101, target: "w2:5432".to_owned() };
            it.catalogue.citus_plan = Ok(vec![row]);
        });
        let expected = "DIFFERS    HERE   CITUS\nshard 101  stays  w2:5432\n\
             Citus would move none alike.\n";
        assert_eq!(compared(&seen), expected);
    }

    #[test]
    fn where_there_is_nothing_to_decide_from_that_is_said() {
        let at = Utc::now();
        let reason = "group 0 has no primary: a is unknown".to_owned();
        let [coordinator, database] = ["a (a:5432)", "app"].map(str::to_owned);
        for (turn, expected) in [
            (Turn::Starting, "demo: was not looked at yet\n"),
            (Turn::Unknown { at, reason }, "demo: unknown: group 0 has no primary: a is unknown\n"),
            (
                Turn::NoCitus { at, coordinator, database },
                "demo: no Citus in database app of a (a:5432): nothing to do\n",
            ),
        ] {
            assert_eq!(plan(&report(turn)), expected);
        }
    }
}
