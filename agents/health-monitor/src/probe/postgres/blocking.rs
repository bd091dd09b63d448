//! Who is in front of those that wait for a lock; pure.

use std::collections::{BTreeMap, BTreeSet};

use super::deep_facts::Holder;

/// A session that others wait behind, and that waits for nobody.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocker {
    /// Its process; 0 is a prepared transaction, which has none.
    pub pid: i32,
    /// Sessions that wait behind it, at first or at last hand.
    pub waiting: u32,
    /// What it does, if it is still there.
    pub holder: Option<Holder>,
}

/// The sessions in front, those with most behind them first. `waits` says for each session that waits
/// for whom it does. Sessions that wait for each other are a deadlock, which the server ends by itself.
pub(super) fn in_front(waits: &[(i32, Vec<i32>)]) -> Vec<(i32, u32)> {
    let waits: BTreeMap<i32, &Vec<i32>> = waits.iter().map(|(pid, on)| (*pid, on)).collect();
    let mut behind: BTreeMap<i32, u32> = BTreeMap::new();
    for waiter in waits.keys() {
        let mut seen = BTreeSet::from([*waiter]);
        let mut next = vec![*waiter];
        while let Some(pid) = next.pop() {
            match waits.get(&pid) {
                Some(on) if !on.is_empty() => next.extend(on.iter().filter(|it| seen.insert(**it))),
                _ if pid != *waiter => *behind.entry(pid).or_default() += 1,
                _ => {}
            }
        }
    }
    let mut behind: Vec<_> = behind.into_iter().collect();
    behind.sort_by_key(|(_, waiting)| std::cmp::Reverse(*waiting));
    behind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_front_of_a_chain_is_found() {
        /// For each session that waits, for whom; and who is in front of how many.
        type Case = (&'static str, &'static [(i32, &'static [i32])], &'static [(i32, u32)]);
        const CASES: &[Case] = &[
            ("nobody waits", &[], &[]),
            ("one for one", &[(2, &[1])], &[(1, 1)]),
            ("a chain", &[(2, &[1]), (3, &[2]), (4, &[3])], &[(1, 3)]),
            ("a fan", &[(2, &[1]), (3, &[1]), (9, &[8])], &[(1, 2), (8, 1)]),
            ("for two", &[(3, &[1, 2])], &[(1, 1), (2, 1)]),
            ("twice for one", &[(3, &[1, 1])], &[(1, 1)]),
            ("a diamond", &[(2, &[1]), (3, &[1]), (4, &[2, 3])], &[(1, 3)]),
            ("a prepared transaction", &[(2, &[0])], &[(0, 1)]),
            ("a deadlock", &[(1, &[2]), (2, &[1])], &[]),
            ("behind a deadlock", &[(1, &[2]), (2, &[1]), (3, &[1])], &[]),
            ("who was let in meanwhile", &[(2, &[]), (3, &[2])], &[(2, 1)]),
        ];
        for (case, waits, expected) in CASES {
            let waits: Vec<_> = waits.iter().map(|(pid, on)| (*pid, on.to_vec())).collect();
            assert_eq!(in_front(&waits), *expected, "{case}");
        }
    }
}
