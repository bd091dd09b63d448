//! Tables, and what holds of every plan.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};
use proptest::strategy::Strategy as _;

use super::*;
use crate::balance::EPSILON;
use crate::balance::tests::{place, shard};
use crate::known::Unknown;

const GIB: u64 = 1 << 30;
const PLENTY: Budget = left(u64::MAX, 1000);

const fn left(bytes: u64, moves: u32) -> Budget {
    Budget { bytes, moves, bytes_max: u64::MAX }
}

fn balance() -> Balance {
    Balance::default()
}

/// Shard groups from 100 on: where each is, and its size in GiB.
fn situation(places: Vec<Place>, groups: &[(u32, u64)]) -> Situation {
    let groups = (100_i64..).zip(groups);
    let groups = groups.map(|(id, (place, gib))| shard(id, *place, gib * GIB)).collect();
    Situation { places, groups, ..nothing() }
}

fn nothing() -> Situation {
    Situation {
        places: Vec::new(),
        groups: Vec::new(),
        held: BTreeMap::new(),
        resting: BTreeMap::new(),
        asked: BTreeMap::new(),
        citus: Ok(Vec::new()),
        forbidden: Ok(None),
    }
}

/// `100 1>2`: that shard, from there to there.
fn moves(plan: &Plan) -> Vec<String> {
    plan.moves.iter().map(|it| format!("{} {}>{}", it.shard, it.from, it.to)).collect()
}

fn drained(group: u32) -> Place {
    Place { is_wanted: false, ..place(group) }
}

fn blocked(group: u32) -> Place {
    Place { blocked: Some("a base backup is taken from w3:5432".to_owned()), ..place(group) }
}

#[test]
fn a_plan_is_the_fewest_bytes_for_the_most_gain() {
    let three = || vec![place(1), place(2), place(3)];
    for (case, places, groups, expected, end) in [
        (
            "nothing to move",
            three(),
            &[][..],
            &[][..],
            "0.0 % of the load lies where it does not belong, and 5.0 % may",
        ),
        (
            "balance",
            three(),
            &[(1, 5), (2, 5), (3, 5)],
            &[],
            "0.0 % of the load lies where it does not belong, and 5.0 % may",
        ),
        // The ones that fit, and no more.
        (
            "a new worker",
            three(),
            &[(1, 3), (1, 3), (1, 3), (2, 3), (2, 3), (2, 3)],
            &["100 1>3", "103 2>3"],
            "then 0.0 % of the load lies where it does not belong",
        ),
        // 2 GiB rather than 3, though one move of 3 would leave nothing; what is left may be.
        (
            "the cheapest moves do",
            vec![place(1), place(2)],
            &[(1, 3), (1, 3), (1, 1), (1, 1), (2, 1), (2, 1)],
            &["102 1>2", "103 1>2"],
            "then 3.3 % of the load lies where it does not belong",
        ),
        // The one of 1 GiB first would leave 12.5 %, and no way on.
        (
            "where the cheapest moves lead into a dead end",
            vec![place(1), place(2)],
            &[(1, 1), (1, 2), (1, 2), (2, 1)],
            &["101 1>2"],
            "then 0.0 % of the load lies where it does not belong",
        ),
        (
            "weights",
            vec![Place { weight: 3.0, ..place(1) }, place(2)],
            &[(1, 2), (1, 2), (2, 2), (2, 2)],
            &["102 2>1"],
            "then 0.0 % of the load lies where it does not belong",
        ),
        (
            "empty shards have a place too",
            vec![place(1), place(2)],
            &[(1, 0), (1, 0), (1, 0), (1, 0)],
            &["100 1>2", "101 1>2"],
            "then 0.0 % of the load lies where it does not belong",
        ),
        // 6 of 8 GiB are in one shard group: wherever it is, it is too much.
        (
            "a hot shard stays",
            vec![place(1), place(2)],
            &[(1, 6), (2, 1), (2, 1)],
            &[],
            "no move that fits would put 50.0 % of what it carries where it belongs",
        ),
    ] {
        let plan = plan(&situation(places, groups), &balance(), PLENTY).unwrap();
        assert_eq!(
            (moves(&plan), plan.end.as_str()),
            (expected.iter().map(ToString::to_string).collect(), end),
            "{case}"
        );
    }
}

#[test]
fn drains_come_first_and_blocked_nodes_are_left_alone() {
    for (case, places, groups, expected, end) in [
        (
            "to a blocked node nothing is moved",
            vec![place(1), place(2), blocked(3)],
            &[(1, 3), (1, 3), (2, 3), (2, 3)][..],
            &[][..],
            "no move that fits would put 50.0 % of what it carries where it belongs",
        ),
        (
            "nor from one",
            vec![place(1), place(2), blocked(3)],
            &[(3, 3), (3, 3), (3, 3), (3, 3), (1, 3), (2, 3)],
            &[],
            "no move that fits would put 50.0 % of what it carries where it belongs",
        ),
        (
            "drains come first, the largest before",
            vec![drained(1), place(2), place(3)],
            &[(1, 1), (1, 4), (2, 2), (2, 2), (2, 3), (3, 2)],
            &["101 1>3", "100 1>3"],
            "0.0 % of the load lies where it does not belong, and 5.0 % may",
        ),
        (
            "a drain goes on where no balance would",
            vec![drained(1), place(2)],
            &[(1, 4), (2, 1)],
            &["100 1>2"],
            "0.0 % of the load lies where it does not belong, and 5.0 % may",
        ),
        (
            "nobody is left to take anything",
            vec![drained(1), drained(2)],
            &[(1, 4)],
            &[],
            "no move that fits would put 50.0 % of what it carries where it belongs",
        ),
    ] {
        let plan = plan(&situation(places, groups), &balance(), PLENTY).unwrap();
        assert_eq!(
            (moves(&plan), plan.end.as_str()),
            (expected.iter().map(ToString::to_string).collect(), end),
            "{case}"
        );
    }
}

#[test]
fn every_reason_not_to_move_is_told() {
    let full = Place { room: Ok(3 * GIB), ..place(2) };
    let unknown = Place { room: Err(Unknown::because("no answer")), ..place(3) };
    let mut it = situation(vec![drained(1), full, unknown, blocked(4)], &[(1, 1), (1, 2), (2, 1)]);
    it.held.insert(7, "public.log has no replica identity".to_owned());
    it.groups.push(ShardGroup {
        place: Err(Unknown::because("shard 900 has 2 placements")),
        ..shard(900, 1, 1)
    });
    it.groups.push(ShardGroup { colocation: 7, ..shard(901, 1, 1) });
    let plan = plan(&it, &balance(), PLENTY).unwrap();
    assert_eq!(moves(&plan), ["100 1>2"]);
    let skipped: Vec<_> =
        plan.skipped.iter().map(|it| format!("{}: {}", it.what, it.reason)).collect();
    let expected = [
        "w4:5432: a base backup is taken from w3:5432",
        "colocation group 7: public.log has no replica identity",
        "shard 900 of public.t: shard 900 has 2 placements",
        "shard 101 of public.t: w2:5432 has room for 3.0 GiB, and 4.0 GiB are needed, with WAL; \
         the room on w3:5432 is unknown: no answer; a base backup is taken from w3:5432",
    ];
    assert_eq!(skipped, expected);
}

#[test]
fn a_budget_is_kept_and_what_is_left_of_it_is_for_a_drain() {
    let groups = [(1, 3), (1, 3), (1, 3), (1, 1), (1, 1), (2, 1)];
    for (case, first, budget, expected, end) in [
        (
            "one move",
            place(1),
            Budget { moves: 1, ..PLENTY },
            &["100 1>2"][..],
            "the budget allows no more moves",
        ),
        (
            "few bytes",
            place(1),
            left(2 * GIB, 9),
            &["103 1>2", "104 1>2"],
            "0 B are left of the budget, and each move that helps has more",
        ),
        (
            "too few bytes",
            place(1),
            left(GIB / 2, 9),
            &[],
            "512.0 MiB are left of the budget, and each move that helps has more",
        ),
        (
            "a drain",
            drained(1),
            left(4 * GIB, 9),
            &["100 1>2", "103 1>2"],
            "what is left of the budget is kept for the drain",
        ),
    ] {
        let plan = plan(&situation(vec![first, place(2)], &groups), &balance(), budget).unwrap();
        assert_eq!(
            (moves(&plan), plan.end.as_str()),
            (expected.iter().map(ToString::to_string).collect(), end),
            "{case}"
        );
    }
}

/// A drain waited for it for ever, and nothing else was moved.
#[test]
fn what_no_run_may_move_holds_up_nothing_else() {
    let end = "each move that helps has 3.0 GiB or more, and no run may move more than 2.0 GiB: raise \
               [budget] bytes_per_run";
    for (case, groups, expected) in [
        ("the rest of a drain", &[(1, 3), (1, 1), (1, 1), (2, 1)][..], &["101 1>3", "102 1>2"][..]),
        (
            "balance",
            &[(1, 3), (2, 1), (2, 1), (2, 1), (2, 1), (2, 1), (2, 1)],
            &["101 2>3", "102 2>3"],
        ),
    ] {
        let budget = Budget { bytes_max: 2 * GIB, ..left(2 * GIB, 9) };
        let places = vec![drained(1), place(2), place(3)];
        let plan = plan(&situation(places, groups), &balance(), budget).unwrap();
        assert_eq!(
            (moves(&plan), plan.end.as_str()),
            (expected.iter().map(ToString::to_string).collect(), end),
            "{case}"
        );
        let [skipped] = &plan.skipped[..] else { panic!("{case}: {plan:?}") };
        assert_eq!(
            (skipped.what.as_str(), skipped.reason.as_str()),
            (
                "shard 100 of public.t",
                "it has 3.0 GiB, and no run may move more than 2.0 GiB: raise [budget] bytes_per_run"
            ),
            "{case}"
        );
    }
}

#[test]
fn what_is_left_of_a_budget_is_the_least_that_any_limit_leaves() {
    let limits =
        Limits { bytes_per_run: 10, moves_per_run: 5, bytes_per_day: 30, moves_per_day: 20 };
    let spent = |bytes, moves| Spent { bytes, moves };
    for (day, run, bytes, moves) in [
        (spent(0, 0), spent(0, 0), 10, 5),
        (spent(15, 6), spent(4, 1), 6, 4),
        (spent(28, 18), spent(4, 1), 2, 2),
        (spent(40, 30), spent(0, 0), 0, 0),
    ] {
        let expected = Budget { bytes, moves, bytes_max: 10 };
        assert_eq!(Budget::left(&limits, (day, run)), expected, "{day:?} {run:?}");
    }
    let budget = Budget { bytes: 4, moves: 1, bytes_max: 10 };
    let none = Budget { moves: 0, ..budget };
    for (budget, bytes, expected) in [
        (budget, 4, None),
        (budget, 5, Some("4 B are left of the budget, and it has 5 B")),
        (none, 4, Some("the budget allows no more moves")),
        (
            none,
            11,
            Some("it has 11 B, and no run may move more than 10 B: raise [budget] bytes_per_run"),
        ),
    ] {
        assert_eq!(budget.refusal(bytes).as_deref(), expected);
    }
}

#[test]
fn what_is_larger_than_a_fair_share_is_hot() {
    let mut it = situation(vec![place(1), place(2)], &[(1, 7), (2, 1), (2, 1)]);
    let found = plan(&it, &balance(), PLENTY).unwrap().hot;
    let [hot] = &found[..] else { panic!("{found:?}") };
    assert_eq!((hot.shard, hot.bytes, hot.tables.join(" ")), (100, 7 * GIB, "public.t".to_owned()));
    assert!(hot.advice.contains("citus_split_shard_by_split_points"), "{}", hot.advice);
    it.groups[0].is_hash = false;
    let advice = &plan(&it, &balance(), PLENTY).unwrap().hot[0].advice;
    assert!(advice.contains("cannot be split"), "{advice}");
    // As large as the share, or small: nobody is told.
    let even = situation(vec![place(1), place(2)], &[(1, 4), (2, 4)]);
    assert_eq!(plan(&even, &balance(), PLENTY).unwrap().hot, []);
    let small = Balance { hot_bytes_min: 8 * GIB, ..balance() };
    assert_eq!(plan(&it, &small, PLENTY).unwrap().hot, []);
}

#[test]
fn an_unknown_size_is_no_plan() {
    let mut it = situation(vec![place(1), place(2)], &[(1, 7), (1, 7)]);
    it.groups[1].bytes = Err(Unknown::because("no answer"));
    assert_eq!(plan(&it, &balance(), PLENTY), Err(Unknown::because("no answer")));
}

#[test]
fn what_is_asked_for_comes_first_and_a_drain_before_the_plan_of_citus() {
    let mut it = situation(
        vec![place(1), place(2), blocked(3), drained(4)],
        &[(1, 3), (1, 3), (2, 3), (4, 1)],
    );
    it.asked = [(100, 3), (101, 2), (102, 2), (999, 1)].into();
    it.resting = [(103, "it rests".to_owned())].into();
    let strategy = Balance { strategy: Strategy::Citus, ..balance() };
    let found = plan(&it, &strategy, PLENTY).unwrap();
    assert_eq!(moves(&found), ["101 1>2"]);
    assert_eq!(found.moves[0].why, Why::Asked);
    for (what, reason) in [
        ("shard 100 of public.t", "a base backup is taken from w3:5432"),
        ("shard 999", "there is none that can be moved"),
        ("shard 103 of public.t", "it rests"),
    ] {
        let mut skipped = found.skipped.iter();
        assert!(skipped.any(|it| it.what == what && it.reason == reason), "{what} {found:?}");
    }
    it.resting.clear();
    let found = plan(&it, &strategy, PLENTY).unwrap();
    assert_eq!(moves(&found), ["101 1>2", "103 4>1"]);
    assert_eq!(found.moves[1].why, Why::Drain);
}

#[test]
fn the_plan_of_citus_is_followed_as_far_as_it_is_allowed() {
    let strategy = Balance { strategy: Strategy::Citus, ..balance() };
    let mut it = situation(
        vec![place(1), place(2), blocked(3), drained(4)],
        &[(1, 3), (1, 3), (1, 9), (3, 1), (1, 1)],
    );
    let wish = |shard, to| Wish { shard, to };
    it.citus = Ok(vec![wish(100, 2), wish(101, 3), wish(102, 2), wish(103, 2), wish(104, 4)]);
    let budget = left(8 * GIB, 9);
    let found = plan(&it, &strategy, budget).unwrap();
    assert_eq!(moves(&found), ["100 1>2"]);
    assert_eq!(found.moves[0].why, Why::Citus);
    let skipped: Vec<_> = found.skipped.iter().map(|it| it.reason.as_str()).collect();
    assert_eq!(
        skipped,
        [
            "a base backup is taken from w3:5432",
            "a base backup is taken from w3:5432",
            "5.0 GiB are left of the budget, and it has 9.0 GiB",
            "a base backup is taken from w3:5432",
            "w4:5432 takes no shards",
        ]
    );
    // Without one, there is none.
    it.citus = Err(Unknown::because("no answer"));
    assert_eq!(plan(&it, &strategy, PLENTY), Err(Unknown::because("no answer")));
    assert!(plan(&it, &balance(), PLENTY).is_ok());
}

/// Any cluster: up to 6 nodes, some of them drained, blocked, full or unknown.
fn any_places() -> impl proptest::strategy::Strategy<Value = Vec<Place>> {
    let one = (1_u32..5, any::<[bool; 2]>(), 0_u64..8, any::<bool>());
    vec(one, 1..6).prop_map(|places| {
        let places = (1..).zip(places);
        let made = places.map(|(group, (weight, [wanted, free], room, known))| Place {
            weight: f64::from(weight),
            is_wanted: wanted || group == 1,
            blocked: (!free && group != 1).then(|| "blocked".to_owned()),
            room: if known || group == 1 { Ok(room * 1000) } else { Err(Unknown::because("?")) },
            ..place(group)
        });
        made.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the cluster looks like.
    #[test]
    fn a_plan_keeps_its_promises(
        places in any_places(),
        groups in vec((any::<prop::sample::Index>(), 0_u64..2000, 1_u32..4), 0..60),
        (bytes, count) in (0_u64..20_000, 0_u32..12),
        (threshold, count_share, gain_min) in (0.0..0.3_f64, 0.0..=1.0_f64, 0.0..=1.0_f64),
    ) {
        let groups = (100_i64..).zip(groups).map(|(id, (index, bytes, colocation))| {
            let group = index.get(&places).group;
            ShardGroup { colocation, ..shard(id, group, bytes) }
        });
        let situation = Situation {
            groups: groups.collect(),
            places,
            held: [(3, "held".to_owned())].into(),
            ..nothing()
        };
        let balance = Balance { threshold, count_share, gain_min, ..balance() };
        let budget = left(bytes, count);
        let plan = plan(&situation, &balance, budget).unwrap();
        let place = |group: u32| situation.places.iter().find(|it| it.group == group).unwrap();

        // Never beyond the budget.
        prop_assert!(plan.moves.iter().map(|it| it.bytes).sum::<u64>() <= bytes);
        prop_assert!(plan.moves.len() <= count as usize);
        let mut loads =
            Loads::new(&situation.places, &situation.groups, count_share).unwrap();
        let mut written = BTreeMap::<u32, u64>::new();
        let mut seen = BTreeSet::new();
        let mut has_spread = false;
        for it in &plan.moves {
            let (from, to) = (place(it.from), place(it.to));
            // Never to a node that is drained, blocked or unknown, never from a blocked one.
            prop_assert!(to.is_wanted && to.blocked.is_none() && from.blocked.is_none());
            // Never beyond the disk.
            let written = written.entry(it.to).or_default();
            prop_assert!(*written + 2 * it.bytes <= *to.room.as_ref().unwrap());
            *written += it.bytes;
            // Never twice, never what is held.
            prop_assert!(seen.insert(it.shard) && it.colocation != 3 && it.from != it.to);
            // Drains first.
            prop_assert!(!(has_spread && it.why == Why::Drain));
            has_spread |= it.why == Why::Balance;
            // Never raising the figure; and what is not for a drain is worth it.
            let before = loads.figure().load;
            loads.shift(it.from, it.to, it.bytes);
            let gain = before - loads.figure().load;
            prop_assert!(gain > -EPSILON && (gain - it.gain).abs() < 1e-6, "{} {}", gain, it.gain);
            if it.why == Why::Balance {
                prop_assert!(gain > 0.0 && gain_min * loads.weigh(it.bytes) < gain + 1e-6);
            }
        }
        prop_assert!(plan.after.load <= plan.before.load + EPSILON);
        prop_assert!((plan.after.load - loads.figure().load).abs() < 1e-6);
        // Balance is left alone.
        if plan.before.load <= threshold {
            prop_assert!(plan.moves.iter().all(|it| it.why == Why::Drain));
        }
    }

    /// With room and budget a new worker gets its share.
    #[test]
    fn a_new_worker_is_filled(workers in 1_u32..6, each in 2_usize..20, bytes in 1_u64..1000) {
        let places: Vec<_> = (1..=workers + 1).map(place).collect();
        let groups = (1..=workers).flat_map(|group| vec![group; each]);
        let groups: Vec<_> = (100_i64..).zip(groups).map(|(id, it)| shard(id, it, bytes)).collect();
        let count = groups.len();
        let situation = Situation { places, groups, ..nothing() };
        let balance = Balance { threshold: 0.0, ..balance() };
        let plan = plan(&situation, &balance, PLENTY).unwrap();
        // Each of the others may keep half of one.
        let half = 0.5 / f64::from(u32::try_from(count).unwrap());
        prop_assert!(plan.after.load <= half * f64::from(workers) + 1e-6, "{:?}", plan.after);
        prop_assert!(plan.moves.len() <= count / (workers as usize + 1) + 1);
        prop_assert!(plan.moves.iter().all(|it| it.to == workers + 1));
    }
}

/// Citus would not have it there, and moves it away.
#[test]
fn where_the_strategy_allows_no_shard_none_is_planned() {
    let forbidden = |places: &[(i64, u32)]| {
        let places = places.iter().copied().collect();
        Ok(Some(Forbidden { function: "public.pin".to_owned(), places }))
    };
    let plan = |situation: &Situation| plan(situation, &balance(), PLENTY).map_err(|it| it.0);
    let all_on_one = || situation(vec![place(1), place(2), place(3)], &[(1, 1), (1, 1), (1, 1)]);
    let free = plan(&all_on_one()).unwrap();
    assert_eq!(free.moves.iter().map(|it| it.to).collect::<Vec<_>>(), [2, 3]);
    // No shard of any group may be on the third; of the others just one.
    let pinned = Situation {
        forbidden: forbidden(&[(100, 3), (101, 3), (102, 3), (100, 2), (101, 2)]),
        ..all_on_one()
    };
    assert_eq!(moves(&plan(&pinned).unwrap()), ["102 1>2"]);
    // Nor what is asked for, or drained; and it is said why.
    let asked = Situation { asked: [(100, 3)].into(), ..pinned.clone() };
    let skipped = plan(&asked).unwrap().skipped;
    assert_eq!(skipped[0].reason, "public.pin() does not allow it on w3:5432");
    let mut drained = pinned.clone();
    drained.places[0].is_wanted = false;
    let drain = plan(&drained).unwrap();
    assert_eq!(moves(&drain), ["102 1>2"]);
    assert_eq!(
        drain.skipped[0].reason,
        "public.pin() does not allow it on w2:5432; public.pin() does not allow it on w3:5432"
    );
    // Any of the shards that move together.
    let mut colocated = pinned;
    colocated.groups[2].shards.push(902);
    colocated.forbidden = forbidden(&[(902, 2), (902, 3), (100, 3), (101, 3), (100, 2), (101, 2)]);
    assert_eq!(moves(&plan(&colocated).unwrap()), <[String; 0]>::default());
    let unknown = Situation { forbidden: Err(Unknown::because("no answer")), ..all_on_one() };
    assert_eq!(
        plan(&unknown).unwrap_err(),
        "where Citus' rebalance strategy allows shards is unknown: no answer"
    );
}
