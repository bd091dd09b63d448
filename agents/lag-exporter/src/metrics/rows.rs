//! What there is to render: groups, nodes, senders and slots, each with its labels, each once.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::fleet::{Snapshot, Target};
use crate::view::{
    GroupView, LagView, NodeState, NodeView, Role, SenderKind, SenderView, SlotView,
};

/// A group, with its labels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupRow<'a> {
    scope: &'a Scope,
    /// By the wall clock, in seconds since 1970.
    pub(crate) now: f64,
    pub(crate) view: &'a GroupView,
}

/// A node, with its group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeRow<'a> {
    pub(crate) group: GroupRow<'a>,
    pub(crate) view: &'a NodeView,
    pub(crate) target: Option<&'a Target>,
}

/// Somebody who receives WAL from a node.
pub(crate) type SenderRow<'a> = (NodeRow<'a>, &'a SenderView);
/// A slot of a node.
pub(crate) type SlotRow<'a> = (NodeRow<'a>, &'a SlotView);

/// The labels of a series. Those of a group or a node are there on nearly each line of a scrape of
/// many thousand, so all but the last of them are written out once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Labels<'a, const N: usize> {
    /// `cluster="demo",group`, or `cluster="demo",group="0",node`.
    scope: &'a str,
    /// The value of the last of these.
    own: &'a str,
    more: [(&'static str, &'a str); N],
}

impl<const N: usize> EncodeLabelSet for Labels<'_, N> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        (self.scope, self.own).encode(encoder.encode_label())?;
        self.more.encode(encoder)
    }
}

/// What the labels of a group and of its nodes begin with.
#[derive(Debug)]
pub(crate) struct Scope {
    group: String,
    number: String,
    node: String,
}

impl Scope {
    pub(crate) fn of(cluster: &str, group: u32) -> Self {
        let cluster = cluster.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        Self {
            group: format!("cluster=\"{cluster}\",group"),
            number: group.to_string(),
            node: format!("cluster=\"{cluster}\",group=\"{group}\",node"),
        }
    }
}

impl<'a> GroupRow<'a> {
    pub(crate) fn labels(&self) -> Labels<'a, 0> {
        self.with([])
    }

    pub(crate) fn with<const N: usize>(&self, more: [(&'static str, &'a str); N]) -> Labels<'a, N> {
        Labels { scope: &self.scope.group, own: &self.scope.number, more }
    }
}

impl<'a> NodeRow<'a> {
    pub(crate) fn labels(&self) -> Labels<'a, 0> {
        self.with([])
    }

    pub(crate) fn with<const N: usize>(&self, more: [(&'static str, &'a str); N]) -> Labels<'a, N> {
        Labels { scope: &self.group.scope.node, own: &self.view.name, more }
    }

    pub(crate) fn state(&self) -> Option<&'a NodeState> {
        self.view.state.as_ref()
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.state().is_some_and(|state| state.role == Role::Primary)
    }

    pub(crate) fn lag(&self) -> Option<&'a LagView> {
        self.view.lag.as_ref()
    }
}

/// What there is to render, each thing once.
#[derive(Debug, Default)]
pub(crate) struct Rows<'a> {
    pub(crate) groups: Vec<GroupRow<'a>>,
    pub(crate) nodes: Vec<NodeRow<'a>>,
    pub(crate) senders: Vec<SenderRow<'a>>,
    pub(crate) slots: Vec<SlotRow<'a>>,
    pub(crate) dropped: u64,
}

impl<'a> Rows<'a> {
    /// `scopes` are those of the groups.
    pub(crate) fn of(snapshot: &'a Snapshot, scopes: &'a [Scope]) -> Self {
        let mut rows = Self::default();
        #[expect(clippy::cast_precision_loss, reason = "exact until the year 2255")]
        let now = snapshot.made_at.timestamp_micros() as f64 / 1e6;
        let (mut groups, mut nodes, mut senders, mut slots) =
            (HashSet::new(), HashSet::new(), HashSet::new(), HashSet::new());
        for (view, scope) in snapshot.groups.iter().zip(scopes) {
            let group = GroupRow { scope, now, view };
            if rows.is_first(&mut groups, view.group) {
                rows.groups.push(group);
            }
            for view in &view.nodes {
                let key = (group.view.group, view.name.as_str());
                if !rows.is_first(&mut nodes, key) {
                    continue;
                }
                let node = NodeRow { group, view, target: snapshot.target(key.0, key.1) };
                rows.nodes.push(node);
                let Some(details) = &view.details else { continue };
                for sender in details.senders.iter().flatten() {
                    // Others come and go with a base backup, or are seen by their slot.
                    let is_shown =
                        matches!(sender.kind, SenderKind::Standby | SenderKind::Receiver);
                    if is_shown && rows.is_first(&mut senders, (key, sender.name.as_str())) {
                        rows.senders.push((node, sender));
                    }
                }
                for slot in details.slots.iter().flatten() {
                    if rows.is_first(&mut slots, (key, slot.name.as_str())) {
                        rows.slots.push((node, slot));
                    }
                }
            }
        }
        rows
    }

    fn is_first<T: Eq + Hash>(&mut self, seen: &mut HashSet<T>, key: T) -> bool {
        let is_first = seen.insert(key);
        self.dropped += u64::from(!is_first);
        is_first
    }
}
