//! Who should hold which group. No clock, no etcd: only the decision.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// Returns which replica should hold each of `groups`; nothing if no replica is `present`.
///
/// Every replica decides this for itself, and from the same facts all decide the same. The
/// numbers of groups differ by at most one. A group stays with its holder, as far as `holders`
/// knows one that is present, unless the holder has more than its share: so a replica that comes
/// takes as few groups as possible, and when one goes only its groups move.
pub fn share(
    groups: &BTreeSet<u32>,
    present: &BTreeSet<String>,
    holders: &BTreeMap<u32, String>,
) -> BTreeMap<u32, String> {
    let mut kept: BTreeMap<&String, Vec<u32>> =
        present.iter().map(|replica| (replica, Vec::new())).collect();
    for group in groups {
        if let Some(held) = holders.get(group).and_then(|holder| kept.get_mut(holder)) {
            held.push(*group);
        }
    }
    let Some(base) = groups.len().checked_div(kept.len()) else { return BTreeMap::new() };
    let larger_shares = groups.len() % kept.len();

    // Those with the most groups get the larger shares: that moves the fewest.
    let mut by_count: Vec<_> = kept.into_iter().collect();
    by_count.sort_by_key(|(replica, held)| (Reverse(held.len()), *replica));
    let mut shares = BTreeMap::new();
    let mut room: Vec<(&String, usize)> = Vec::new();
    for (index, (replica, held)) in by_count.into_iter().enumerate() {
        let quota = base + usize::from(index < larger_shares);
        room.push((replica, quota.saturating_sub(held.len())));
        shares.extend(held.into_iter().take(quota).map(|group| (group, replica.clone())));
    }

    for group in groups {
        if shares.contains_key(group) {
            continue;
        }
        // The most room first; of equals the first in name.
        let roomiest = room.iter_mut().min_by_key(|(replica, left)| (Reverse(*left), *replica));
        if let Some((replica, left)) = roomiest {
            *left = left.saturating_sub(1);
            shares.insert(*group, (*replica).clone());
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who holds groups 0, 1, 2 … as one letter each; `-` is nobody.
    fn holders(text: &str) -> BTreeMap<u32, String> {
        let numbered = (0..).zip(text.chars());
        numbered.filter(|(_, it)| *it != '-').map(|(group, it)| (group, it.to_string())).collect()
    }

    fn shared(groups: u32, present: &str, held: &str) -> String {
        let present = present.chars().map(String::from).collect();
        let shares = share(&(0..groups).collect(), &present, &holders(held));
        (0..groups).map(|group| shares.get(&group).map_or("-", String::as_str)).collect()
    }

    #[test]
    fn groups_are_shared_out_evenly_with_as_few_moves_as_can_be() {
        for (case, groups, present, held, expected) in [
            ("nobody is there", 3, "", "aab", "---"),
            ("no groups", 0, "ab", "", ""),
            ("one takes all", 3, "a", "---", "aaa"),
            ("a fresh start", 5, "abc", "-----", "ababc"),
            ("nothing moves that need not", 4, "ab", "bbaa", "bbaa"),
            ("a second comes: half moves", 4, "ab", "aaaa", "aabb"),
            ("a third comes: one group each", 6, "abc", "aaabbb", "aacbbc"),
            ("the larger share stays where it is", 3, "ab", "bba", "bba"),
            ("one goes: only its groups move", 6, "ac", "aabbcc", "aaaccc"),
            ("fewer groups than replicas", 1, "abc", "-", "a"),
            ("a leader stays leader when others come", 1, "abc", "c", "c"),
            ("a holder that is gone does not count", 2, "b", "xx", "bb"),
            ("a freed group goes to who has room", 4, "ab", "aab-", "aabb"),
        ] {
            assert_eq!(shared(groups, present, held), expected, "{case}");
        }
    }

    /// Sharing again what was shared changes nothing, and counts differ by at most one.
    #[test]
    fn shares_are_even_and_at_rest() {
        for groups in 0..12 {
            for present in ["a", "ab", "abc", "abcde"] {
                for held in ["", "aaaaaaaaaaaa", "abcdeabcdeab", "zzzaaazzzbbb", "b-b-b-b-b-b-"] {
                    let once = shared(groups, present, held);
                    assert_eq!(shared(groups, present, &once), once, "{groups} {present} {held}");
                    let count = |it: char| once.chars().filter(|other| *other == it).count();
                    let counts: BTreeSet<_> = present.chars().map(count).collect();
                    let spread = counts.last().unwrap() - counts.first().unwrap();
                    assert!(spread <= 1, "{groups} {present} {held}: {once}");
                }
            }
        }
    }
}
