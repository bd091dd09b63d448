//! The newest timeline that a group's database cluster is known to have reached. A primary on a lower one is
//! an old one, also while the true primary does not answer.

use std::collections::BTreeMap;

use shared::topology::{Group, NodeState, Role};

use super::cluster::states;

/// What is known of it.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    cluster: Option<u64>,
    /// The newest that was received, or found in the repository.
    stored: Option<u32>,
    /// What each server told when it last could.
    told: BTreeMap<String, u32>,
}

impl Reached {
    /// Takes note of what the servers say of themselves, and of what is `stored`.
    pub(crate) fn see(&mut self, group: &Group, own: Option<u64>, stored: Option<u32>) {
        let Some(own) = own else { return };
        if self.cluster != Some(own) {
            *self = Self { cluster: Some(own), ..Self::default() };
        }
        self.stored = self.stored.max(stored);
        self.told.retain(|name, _| group.nodes.iter().any(|it| it.node.name == *name));
        for (node, state) in states(group) {
            if state.system_identifier != own {
                self.told.remove(&node.name);
            } else if let Some(timeline) = tells(state) {
                self.told.insert(node.name.clone(), timeline);
            }
        }
    }

    /// Takes note of what the repository holds now. Whoever removed a timeline there knows that it is over:
    /// what servers told before counts no more.
    pub(super) fn look_again(&mut self, stored: Option<u32>) {
        if stored < self.stored {
            self.told.clear();
        }
        self.stored = stored;
    }

    /// Whether the newest primary is over for what is stored. Somebody may have removed that.
    pub(super) fn is_in_doubt(&self, group: &Group) -> bool {
        let own = states(group).filter(|(_, it)| self.cluster == Some(it.system_identifier));
        let primaries = own.filter(|(_, state)| state.role == Role::Primary);
        let newest = primaries.map(|(_, state)| state.timeline).max();
        newest.is_some() && newest < self.stored
    }

    /// The newest timeline; `None` if nothing tells.
    pub(crate) fn timeline(&self) -> Option<u32> {
        self.told.values().copied().max().max(self.stored)
    }
}

/// The timeline that is written where a server is, or where it receives from. One that receives nothing may
/// have been left behind, and its control file may be older than what it has replayed.
fn tells(state: &NodeState) -> Option<u32> {
    match state.role {
        Role::Primary => Some(state.timeline),
        Role::Standby => state.received_timeline,
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::tests::{Server, group, receiving};
    use super::*;

    const P: Role = Role::Primary;
    const S: Role = Role::Standby;

    #[test]
    fn a_timeline_is_remembered_until_its_servers_tell_another() {
        let a: Server<'_> = ("a", Some((P, 1, 7)));
        let gone: Server<'_> = ("b", None);
        for (case, looks, stored, expected) in [
            ("nobody answers", vec![vec![gone]], None, None),
            ("the only primary", vec![vec![a, gone]], None, Some(1)),
            (
                "the new one is away",
                vec![vec![a, ("b", Some((P, 2, 7)))], vec![a, gone]],
                None,
                Some(2),
            ),
            (
                "it follows the old one now",
                vec![vec![a, ("b", Some((P, 2, 7)))], vec![a, receiving("b", 1)]],
                None,
                Some(1),
            ),
            ("a standby receives from it", vec![vec![a, gone, receiving("d", 2)]], None, Some(2)),
            (
                "and lost it",
                vec![vec![a, gone, receiving("d", 2)], vec![a, gone, ("d", Some((S, 1, 7)))]],
                None,
                Some(2),
            ),
            (
                "a standby that receives nothing",
                vec![vec![a, ("d", Some((S, 2, 7)))]],
                None,
                Some(1),
            ),
            ("it is taken out", vec![vec![a, receiving("d", 2)], vec![a]], None, Some(1)),
            ("of another cluster", vec![vec![a, ("x", Some((P, 9, 8)))]], None, Some(1)),
            ("it is stored", vec![vec![a]], Some(2), Some(2)),
        ] {
            let mut reached = Reached::default();
            for nodes in looks {
                reached.see(&group(&nodes), Some(7), stored);
            }
            assert_eq!(reached.timeline(), expected, "{case}");
        }
    }

    #[test]
    fn what_is_removed_from_the_repository_is_over() {
        let mut reached = Reached::default();
        let both = group(&[("a", Some((P, 1, 7))), ("b", Some((P, 2, 7)))]);
        let only = group(&[("a", Some((P, 1, 7))), ("b", None)]);
        reached.see(&both, Some(7), Some(2));
        assert!(reached.is_in_doubt(&only) && !reached.is_in_doubt(&both));
        reached.look_again(Some(2));
        reached.see(&only, Some(7), None);
        assert_eq!(reached.timeline(), Some(2), "it is still there");
        reached.look_again(Some(1));
        reached.see(&only, Some(7), None);
        assert_eq!(reached.timeline(), Some(1), "it was removed");
        assert!(!reached.is_in_doubt(&only));
        reached.see(&both, Some(7), None);
        assert_eq!(reached.timeline(), Some(2), "its server is back");

        let anew = group(&[("a", Some((P, 1, 8)))]);
        reached.see(&anew, Some(8), None);
        assert_eq!(reached.timeline(), Some(1), "of another cluster");
    }
}
