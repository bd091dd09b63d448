//! What to do after a look. Pure.

use crate::config::Mode;
use crate::guard::Gate;
use crate::ledger::Entry;
use crate::plan::{Move, Why};
use crate::reference::ReferenceCopy;
use crate::report::View;

/// The next thing to do. One at a time: then it is looked again.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Have Citus clean up what moves left behind.
    CleanUp,
    /// Move a shard group, or copy reference tables.
    Move(Box<Move>),
    /// Have Citus move all that it plans as one job.
    Begin(Vec<Move>),
    /// Watch a job that was begun, or find out how it ended.
    Watch(Box<Entry>),
}

/// What is not in the view.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whether anything is moved.
    pub mode: Mode,
    /// Whether this replica is the one to do it.
    pub leads: bool,
    /// Which moves are wanted, if not all.
    pub only: Option<Why>,
    /// Whether the last step was to clean up: what is left now stays for a while.
    pub is_cleaned: bool,
}

/// What to do next.
pub fn next(view: &View, standing: Standing) -> Step {
    let Standing { mode, leads, only, is_cleaned } = standing;
    if !leads {
        return Step::Rest;
    }
    // Nothing else is done beside it, and it closes gates itself. It goes on whatever the mode is by now.
    if let Some(entry) = &view.begun {
        return Step::Watch(Box::new(entry.clone()));
    }
    if mode == Mode::DryRun {
        return Step::Rest;
    }
    let is_closed = |gate| view.refusals.iter().any(|it| it.gate == gate);
    // While something is moved, what it needs is registered to be cleaned up as well.
    let is_alone = ![Gate::Coordinator, Gate::Busy, Gate::Locks].map(is_closed).contains(&true);
    let is_unclean = is_closed(Gate::Leftovers) || (is_closed(Gate::Cleanup) && !view.awaits_drop);
    if is_alone && !is_cleaned && is_unclean {
        return Step::CleanUp;
    }
    if view.closed().next().is_some() {
        return Step::Rest;
    }
    // Where one shard is asked for, only if it is to come to such a node.
    let asked = || view.control.iter().flat_map(|it| it.moves.values());
    let is_wanted =
        |it: &&ReferenceCopy| only != Some(Why::Asked) || asked().any(|to| it.groups.contains(to));
    if let Some(copy) = view.reference.as_ref().filter(is_wanted)
        && copy.may_begin(&view.refusals)
    {
        return Step::Move(Box::new(copy.work.clone()));
    }
    let moves = || view.plan.iter().flat_map(|it| &it.moves);
    let wanted = moves().find(|it| only.is_none_or(|only| it.why == only));
    match (wanted, &view.job) {
        (None, _) => Step::Rest,
        (Some(it), Some(job)) if it.why == Why::Citus => match job.refused {
            None => Step::Begin(moves().cloned().collect()),
            Some(_) => Step::Rest,
        },
        (Some(it), _) => Step::Move(Box::new(it.clone())),
    }
}

/// What a plan calls a move in a log.
pub const fn why(why: Why) -> &'static str {
    match why {
        Why::Asked => "asked",
        Why::Drain => "drain",
        Why::ReferenceTables => "reference_tables",
        Why::Balance => "balance",
        Why::Citus => "citus",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::CleanupRecord;
    use crate::job::Offer;
    use crate::known::Unknown;
    use crate::ledger::Outcome;
    use crate::observation::Observation;
    use crate::report::tests::{skewed, view};

    fn unclean(observation: &mut Observation) {
        let record = CleanupRecord { object: "a slot".to_owned(), group: 1, is_deferred: false };
        observation.catalogue.cleanup = Ok(vec![record]);
    }

    fn bare(observation: &mut Observation) {
        observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 2));
    }

    #[test]
    fn one_thing_is_done_after_the_other() {
        type Change = fn(&mut Observation);
        let table: [(&str, Change, Mode, bool, &str); 12] = [
            ("a plan", skewed, Mode::Apply, true, "move 102"),
            ("nothing to move", |_| {}, Mode::Apply, true, "rest"),
            ("a dry run", skewed, Mode::DryRun, true, "rest"),
            ("another replica leads", skewed, Mode::Apply, false, "rest"),
            (
                "a gate is closed",
                |it| {
                    skewed(it);
                    it.verdict = Some(Err(Unknown::because("no answer")));
                },
                Mode::Apply,
                true,
                "rest",
            ),
            (
                "something to clean up",
                |it| {
                    skewed(it);
                    unclean(it);
                },
                Mode::Apply,
                true,
                "clean up",
            ),
            (
                "what a move left that succeeded",
                |it| {
                    skewed(it);
                    unclean(it);
                    it.catalogue.cleanup.as_mut().unwrap()[0].is_deferred = true;
                },
                Mode::Apply,
                true,
                "rest",
            ),
            (
                "whether there is something to clean up is not known",
                |it| it.catalogue.cleanup = Err(Unknown::because("no answer")),
                Mode::Apply,
                true,
                "clean up",
            ),
            (
                "what is to be cleaned up is of a move under way, perhaps",
                |it| {
                    unclean(it);
                    it.catalogue.progress = Err(Unknown::because("no answer"));
                },
                Mode::Apply,
                true,
                "rest",
            ),
            (
                "what is to be cleaned up is of a session that lives on",
                |it| {
                    unclean(it);
                    it.catalogue.movers = Ok(vec![crate::catalogue::Mover { pid: 7, shard: None }]);
                },
                Mode::Apply,
                true,
                "rest",
            ),
            (
                "a node that is new",
                |it| {
                    skewed(it);
                    bare(it);
                },
                Mode::Apply,
                true,
                "reference tables",
            ),
            (
                "one that is new, and busy",
                |it| {
                    bare(it);
                    let servers = it.servers.get_mut(&2).unwrap();
                    servers.primary.as_mut().unwrap().base_backups = Ok(1);
                },
                Mode::Apply,
                true,
                "rest",
            ),
        ];
        for (name, change, mode, leads, expected) in table {
            let standing = Standing { mode, leads, only: None, is_cleaned: false };
            let found = match next(&view(change), standing) {
                Step::Rest => "rest".to_owned(),
                Step::CleanUp => "clean up".to_owned(),
                Step::Move(it) if it.why == Why::ReferenceTables => "reference tables".to_owned(),
                Step::Move(it) => format!("move {}", it.shard),
                Step::Begin(_) | Step::Watch(_) => "a job".to_owned(),
            };
            assert_eq!(found, expected, "{name}");
        }
        let standing =
            Standing { mode: Mode::Apply, leads: true, only: Some(Why::Asked), is_cleaned: false };
        assert_eq!(next(&view(skewed), standing), Step::Rest, "what nobody asked for");
    }

    /// A wish for one shard copies nothing for other nodes.
    #[test]
    fn a_node_that_is_new_is_given_reference_tables_for_what_is_to_come_there() {
        let standing = |only| Standing { mode: Mode::Apply, leads: true, only, is_cleaned: false };
        for (only, to, expected) in [
            (None, None, true),
            (Some(Why::Drain), None, true),
            (Some(Why::Asked), None, false),
            (Some(Why::Asked), Some(1), false),
            (Some(Why::Asked), Some(2), true),
        ] {
            let mut seen = view(bare);
            seen.control.as_mut().unwrap().moves = to.map(|to| (101, to)).into_iter().collect();
            let step = next(&seen, standing(only));
            let copies = matches!(&step, Step::Move(it) if it.why == Why::ReferenceTables);
            assert_eq!(copies, expected, "{only:?} {to:?}");
            seen.reference.as_mut().unwrap().refused = Some("it rests".to_owned());
            assert!(next(&seen, standing(only)) == Step::Rest, "{only:?} {to:?}");
        }
    }

    /// What Citus plans is one job where it is to be; what is asked for, and what new nodes need, is not.
    #[test]
    fn what_citus_plans_is_begun_as_a_job_and_nothing_else_is_done_beside_it() {
        let standing = Standing { mode: Mode::Apply, leads: true, only: None, is_cleaned: false };
        let seen = |why, job: Option<Option<&str>>| {
            let mut seen = view(skewed);
            seen.plan.as_mut().unwrap().moves[0].why = why;
            seen.job = job.map(|it| Offer { refused: it.map(str::to_owned) });
            seen
        };
        for (name, why, job, expected) in [
            ("a job", Why::Citus, Some(None), "begin"),
            ("not as a job", Why::Citus, None, "move"),
            ("not all of it", Why::Citus, Some(Some("shard 2 stays")), "rest"),
            ("a drain", Why::Drain, Some(Some("shard 2 stays")), "move"),
            ("a wish", Why::Asked, Some(None), "move"),
        ] {
            let found = match next(&seen(why, job), standing) {
                Step::Begin(moves) if moves.len() == 1 => "begin",
                Step::Move(_) => "move",
                Step::Rest => "rest",
                other => panic!("{name}: {other:?}"),
            };
            assert_eq!(found, expected, "{name}");
        }
        let mut seen = seen(Why::Citus, Some(None));
        let is_begun = |seen: &View| matches!(next(seen, standing), Step::Begin(_));
        assert!(is_begun(&seen));
        seen.reference = view(bare).reference;
        assert!(matches!(next(&seen, standing), Step::Move(it) if it.why == Why::ReferenceTables));

        // One that runs is watched, whatever is closed: its own moves close gates, too.
        let entry = Entry {
            at: seen.at,
            shard: 102,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job: Some(7),
            moves: 1,
            bytes: 40,
            shards: vec![102],
            replica: "host-2".to_owned(),
            outcome: Outcome::Started,
            reason: String::new(),
            ended_at: None,
        };
        let mut seen = view(|it| it.catalogue.is_coordinator = false);
        seen.begun = Some(entry.clone());
        assert_eq!(next(&seen, standing), Step::Watch(Box::new(entry)));
        let dry = Standing { mode: Mode::DryRun, ..standing };
        assert!(matches!(next(&seen, dry), Step::Watch(_)));
        assert_eq!(next(&seen, Standing { leads: false, ..standing }), Step::Rest);
    }

    /// What cannot be cleaned up on one group holds up that group, and not the others.
    #[test]
    fn what_stays_after_a_clean_up_is_left_alone() {
        let leftover = |observation: &mut Observation| {
            skewed(observation);
            let coordinator = observation.servers.get_mut(&0).unwrap();
            coordinator.primary.as_mut().unwrap().artifacts = Ok(vec!["a slot".to_owned()]);
        };
        let standing = Standing { mode: Mode::Apply, leads: true, only: None, is_cleaned: false };
        assert_eq!(next(&view(leftover), standing), Step::CleanUp);
        let standing = Standing { is_cleaned: true, ..standing };
        assert!(matches!(next(&view(leftover), standing), Step::Move(_)));
        assert_eq!(
            next(
                &view(|it| {
                    skewed(it);
                    unclean(it);
                }),
                standing
            ),
            Step::Rest
        );
    }
}
