//! What to do after a look. Pure.

use crate::config::Mode;
use crate::guard::{Gate, Scope};
use crate::plan::{Move, Why};
use crate::report::View;

/// The next thing to do. One at a time: then it is looked again.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Have Citus clean up what moves left behind.
    CleanUp,
    /// Copy the reference tables to the nodes that lack them.
    ReferenceTables,
    /// Move a shard group.
    Move(Box<Move>),
}

/// What to do next. `leads` tells whether this replica is the one to do it, `only` which moves are
/// wanted, if not all.
pub fn next(view: &View, mode: Mode, leads: bool, only: Option<Why>) -> Step {
    if mode == Mode::DryRun || !leads {
        return Step::Rest;
    }
    let is_closed = |gate| view.refusals.iter().any(|it| it.gate == gate);
    // While something is moved, what it needs is registered to be cleaned up as well.
    let is_alone = !is_closed(Gate::Coordinator) && !is_closed(Gate::Busy);
    if is_alone && (is_closed(Gate::Cleanup) || is_closed(Gate::Leftovers)) {
        return Step::CleanUp;
    }
    if view.closed().next().is_some() {
        return Step::Rest;
    }
    if view.refusals.iter().any(|it| needs_reference_tables(it.gate, it.scope, view)) {
        return Step::ReferenceTables;
    }
    let mut moves = view.plan.iter().flat_map(|it| &it.moves);
    let wanted = moves.find(|it| only.is_none_or(|only| it.why == only));
    wanted.map_or(Step::Rest, |it| Step::Move(Box::new(it.clone())))
}

/// Whether a node lacks reference tables, and nothing else is in the way of giving them to it.
fn needs_reference_tables(gate: Gate, scope: Scope, view: &View) -> bool {
    let is_only = || view.refusals.iter().all(|it| it.scope != scope || it.gate == gate);
    gate == Gate::ReferenceTables && is_only()
}

/// What a plan calls a move in a log.
pub const fn why(why: Why) -> &'static str {
    match why {
        Why::Asked => "asked",
        Why::Drain => "drain",
        Why::Balance => "balance",
        Why::Citus => "citus",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::CleanupRecord;
    use crate::known::Unknown;
    use crate::observation::Observation;
    use crate::report::tests::{skewed, view};

    fn unclean(observation: &mut Observation) {
        let record = CleanupRecord { object: "a slot".to_owned(), group: 1 };
        observation.catalogue.cleanup = Ok(vec![record]);
    }

    fn bare(observation: &mut Observation) {
        observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 2));
    }

    #[test]
    fn one_thing_is_done_after_the_other() {
        type Change = fn(&mut Observation);
        let table: [(&str, Change, Mode, bool, &str); 10] = [
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
            let found = match next(&view(change), mode, leads, None) {
                Step::Rest => "rest".to_owned(),
                Step::CleanUp => "clean up".to_owned(),
                Step::ReferenceTables => "reference tables".to_owned(),
                Step::Move(it) => format!("move {}", it.shard),
            };
            assert_eq!(found, expected, "{name}");
        }
        let asked = next(&view(skewed), Mode::Apply, true, Some(Why::Asked));
        assert_eq!(asked, Step::Rest, "what nobody asked for");
    }
}
