//! Chooses one move after the other. Pure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::{Budget, Hot, Move, Situation, Skipped, Why, Wish};
use crate::balance::{EPSILON, Loads, Place};
use crate::catalogue::ShardGroup;
use crate::config::Balance;
use crate::words::{bytes as in_words, percent};

/// What a move costs beside its bytes, in bytes: setting up replication, and a short wait of its
/// writers at the end. Measured for shard groups of 64 MB: half of 4 s is not the copy.
const MOVE_COST_BYTES: u64 = 64 << 20;
/// What a move takes of the target's disk: the copy, and the WAL of the copy.
pub const ROOM_FACTOR: u64 = 2;
/// So many reasons are kept.
const SKIPPED_MAX: usize = 50;

/// Which move is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// The one that gains most for what it costs.
    Cheapest,
    /// The one that gains most.
    Largest,
}

/// A plan in the making.
#[derive(Clone)]
pub(super) struct Planner<'a> {
    situation: &'a Situation,
    balance: &'a Balance,
    /// What is left of it.
    budget: Budget,
    pub(super) loads: Loads,
    /// What the moves so far write to each group's disk.
    written: BTreeMap<u32, u64>,
    moved: BTreeSet<i64>,
    pub(super) moves: Vec<Move>,
    pub(super) skipped: Vec<Skipped>,
}

/// A shard group that can be moved: where it is, and its size.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    group: &'a ShardGroup,
    from: u32,
    bytes: u64,
}

impl<'a> Planner<'a> {
    /// Nothing is moved yet; what must stay whatever comes is said.
    pub(super) fn new(
        situation: &'a Situation,
        balance: &'a Balance,
        budget: Budget,
        loads: Loads,
    ) -> Self {
        let mut planner = Self {
            situation,
            balance,
            budget,
            loads,
            written: BTreeMap::new(),
            moved: BTreeSet::new(),
            moves: Vec::new(),
            skipped: Vec::new(),
        };
        planner.skip_held();
        planner
    }

    /// What may be moved from a place that is not blocked.
    fn candidates(&self) -> impl Iterator<Item = Candidate<'a>> {
        self.situation.groups.iter().filter_map(|group| {
            let (from, bytes) = (*group.place.as_ref().ok()?, *group.bytes.as_ref().ok()?);
            let is_free = self.place(from).is_some_and(|it| it.blocked.is_none());
            let is_held = self.situation.held.contains_key(&group.colocation);
            let is_resting = self.situation.resting.contains_key(&group.id);
            let can_move = is_free && !is_held && !is_resting && !self.moved.contains(&group.id);
            can_move.then_some(Candidate { group, from, bytes })
        })
    }

    fn place(&self, group: u32) -> Option<&'a Place> {
        self.situation.places.iter().find(|it| it.group == group)
    }

    fn skip(&mut self, what: String, reason: impl Into<String>) {
        if self.skipped.len() < SKIPPED_MAX {
            self.skipped.push(Skipped { what, reason: reason.into() });
        }
    }

    /// Says what must stay whatever comes.
    fn skip_held(&mut self) {
        for place in &self.situation.places {
            if let Some(reason) = &place.blocked {
                self.skip(place.address.clone(), reason);
            }
        }
        for (colocation, reason) in &self.situation.held {
            self.skip(format!("colocation group {colocation}"), reason);
        }
        for group in &self.situation.groups {
            if let Err(unknown) = &group.place {
                self.skip(name(group), &unknown.0);
            } else if let Some(reason) = self.situation.resting.get(&group.id) {
                self.skip(name(group), reason);
            }
        }
    }

    /// Why a shard group cannot be written to a place.
    fn refusal(
        &self,
        place: &Place,
        Candidate { group, bytes, .. }: Candidate<'_>,
    ) -> Option<String> {
        if !place.is_wanted {
            return Some(format!("{} takes no shards", place.address));
        }
        let forbidden = self.situation.forbidden.as_ref().ok().and_then(Option::as_ref);
        if let Some(it) = forbidden
            && group.shards.iter().any(|shard| it.places.contains(&(*shard, place.group)))
        {
            return Some(format!("{}() does not allow it on {}", it.function, place.address));
        }
        if let Some(reason) = &place.blocked {
            return Some(reason.clone());
        }
        let written = self.written.get(&place.group).copied().unwrap_or(0);
        let needed = written.saturating_add(bytes.saturating_mul(ROOM_FACTOR));
        match &place.room {
            Ok(room) if needed <= *room => None,
            Ok(room) => Some(format!(
                "{} has room for {}, and {} are needed, with WAL",
                place.address,
                in_words(*room),
                in_words(needed)
            )),
            Err(unknown) => Some(format!("the room on {} is unknown: {unknown}", place.address)),
        }
    }

    fn take(&mut self, candidate: Candidate<'_>, to: u32, why: Why) {
        let Candidate { group, from, bytes } = candidate;
        let before = self.loads.figure().load;
        self.loads.shift(from, to, bytes);
        let figure_after = self.loads.figure().load;
        self.budget.bytes -= bytes;
        self.budget.moves -= 1;
        *self.written.entry(to).or_default() += bytes;
        self.moved.insert(group.id);
        self.moves.push(Move {
            shard: group.id,
            shards: group.shards.clone(),
            colocation: group.colocation,
            tables: group.tables.clone(),
            bytes,
            from,
            to,
            why,
            gain: before - figure_after,
            figure_after,
        });
    }

    /// Moves what somebody wants elsewhere, as far as it is allowed.
    pub(super) fn ask(&mut self) {
        for (shard, to) in &self.situation.asked {
            match self.situation.groups.iter().find(|it| it.shards.contains(shard)) {
                Some(group) => self.send(group, *to, Why::Asked),
                None => self.skip(format!("shard {shard}"), "there is none that can be moved"),
            }
        }
    }

    /// Moves a shard group to where it is wanted, or says why not.
    fn send(&mut self, group: &ShardGroup, to: u32, why: Why) {
        if group.place == Ok(to) {
            return;
        }
        let Some(candidate) = self.candidates().find(|it| it.group.id == group.id) else {
            return self.skip(name(group), self.why_it_stays(group));
        };
        let refusal = self.place(to).map_or_else(
            || Some(format!("group {to} has no primary")),
            |it| self.refusal(it, candidate),
        );
        match self.budget.refusal(candidate.bytes).or(refusal) {
            Some(reason) => self.skip(name(group), reason),
            None => self.take(candidate, to, why),
        }
    }

    /// Why a shard group is no candidate.
    fn why_it_stays(&self, group: &ShardGroup) -> String {
        let from = group.place.as_ref().ok().and_then(|it| self.place(*it));
        let reasons = [
            group.place.as_ref().err().map(|it| it.0.clone()),
            from.and_then(|it| it.blocked.clone()),
            self.situation.held.get(&group.colocation).cloned(),
            self.situation.resting.get(&group.id).cloned(),
        ];
        let known = reasons.into_iter().flatten().next();
        known.unwrap_or_else(|| "another move of it comes first".to_owned())
    }

    /// Empties the nodes that are drained, the largest shard groups first: those are the hardest to
    /// place. Returns why nothing else can be done, if something of them stays for want of budget.
    pub(super) fn drain(&mut self) -> Option<String> {
        let mut all: Vec<_> = self.candidates().collect();
        all.retain(|it| self.place(it.from).is_some_and(|it| !it.is_wanted));
        all.sort_by_key(|it| (Reverse(it.bytes), it.group.id));
        let mut end = None;
        for candidate in all {
            if let Some(reason) = self.budget.refusal(candidate.bytes) {
                self.skip(name(candidate.group), reason);
                // For what never fits nothing is kept.
                if candidate.bytes <= self.budget.bytes_max {
                    end = Some("what is left of the budget is kept for the drain".to_owned());
                }
                continue;
            }
            let allowed = |it: &&Place| self.refusal(it, candidate).is_none();
            let fill = |it: &Place| self.loads.fill_with(it.group, candidate.bytes);
            let places = self.situation.places.iter().filter(allowed);
            match places.min_by(|a, b| fill(a).total_cmp(&fill(b))).map(|it| it.group) {
                Some(to) => self.take(candidate, to, Why::Drain),
                None => self.skip(name(candidate.group), self.nowhere(candidate)),
            }
        }
        end
    }

    /// Why no place takes a shard group.
    fn nowhere(&self, candidate: Candidate<'_>) -> String {
        let wanted = self.situation.places.iter().filter(|it| it.is_wanted);
        let reasons: Vec<_> = wanted.filter_map(|it| self.refusal(it, candidate)).take(3).collect();
        if reasons.is_empty() { "no node takes shards".to_owned() } else { reasons.join("; ") }
    }

    /// Spreads the load in one order or the other, and returns why it ends.
    pub(super) fn spread_well(&mut self) -> String {
        let mut other = self.clone();
        let end = self.spread(Order::Cheapest);
        let figure = self.loads.figure().load;
        if figure <= self.balance.threshold {
            return end;
        }
        let other_end = other.spread(Order::Largest);
        if other.loads.figure().load + EPSILON < figure {
            *self = other;
            return other_end;
        }
        end
    }

    /// Spreads the load, and returns why it ends.
    fn spread(&mut self, order: Order) -> String {
        let threshold = self.balance.threshold;
        let figure = self.loads.figure().load;
        if figure <= threshold {
            let (figure, threshold) = (percent(figure), percent(threshold));
            return format!(
                "{figure} of the load lies where it does not belong, and {threshold} may"
            );
        }
        let mut too_dear = None;
        while threshold / 2.0 < self.loads.figure().load {
            if self.budget.moves == 0 {
                return "the budget allows no more moves".to_owned();
            }
            match (self.best(order, &mut too_dear), too_dear) {
                (Some((candidate, to)), _) => self.take(candidate, to, Why::Balance),
                (None, Some(least)) => return self.limited(least),
                (None, None) if self.loads.figure().load <= threshold => break,
                (None, None) => {
                    let least = percent(self.balance.gain_min);
                    return format!(
                        "no move that fits would put {least} of what it carries where it belongs"
                    );
                }
            }
        }
        let figure = percent(self.loads.figure().load);
        format!("then {figure} of the load lies where it does not belong")
    }

    /// Why nothing more is moved, where the smallest move that would help has so many bytes.
    fn limited(&self, least: u64) -> String {
        let Budget { bytes, bytes_max, .. } = self.budget;
        if bytes_max < least {
            return format!(
                "each move that helps has {} or more, and no run may move more than {}: raise [budget] \
                 bytes_per_run",
                in_words(least),
                in_words(bytes_max)
            );
        }
        format!("{} are left of the budget, and each move that helps has more", in_words(bytes))
    }

    /// The best move, and the size of the smallest that was left out for want of budget.
    fn best(&self, order: Order, too_dear: &mut Option<u64>) -> Option<(Candidate<'a>, u32)> {
        *too_dear = None;
        let below = |it: &&Place| self.loads.excess(it.group) < -EPSILON;
        let targets: Vec<&Place> = self.situation.places.iter().filter(below).collect();
        let mut best: Option<(f64, Candidate<'a>, u32)> = None;
        for candidate in self.candidates() {
            let Candidate { from, bytes, .. } = candidate;
            if self.loads.excess(from) <= EPSILON {
                continue;
            }
            let least = (self.balance.gain_min * self.loads.weigh(bytes)).max(EPSILON * 2.0);
            for place in &targets {
                let gain = self.loads.gain(from, place.group, bytes);
                if gain + EPSILON < least || self.refusal(place, candidate).is_some() {
                    continue;
                }
                if self.budget.bytes < bytes {
                    *too_dear = Some(too_dear.map_or(bytes, |it| it.min(bytes)));
                    continue;
                }
                #[expect(clippy::cast_precision_loss, reason = "it is only compared")]
                let worth = match order {
                    Order::Cheapest => gain / bytes.saturating_add(MOVE_COST_BYTES) as f64,
                    Order::Largest => gain,
                };
                // The first of equals: by shard, then by the order of the places.
                if best.as_ref().is_none_or(|(most, _, _)| most + most * EPSILON < worth) {
                    best = Some((worth, candidate, place.group));
                }
            }
        }
        best.map(|(_, candidate, to)| (candidate, to))
    }

    /// Follows what Citus would do, as far as it is allowed, and returns why it ends.
    pub(super) fn follow(&mut self, wishes: &[Wish]) -> String {
        if wishes.is_empty() {
            return "Citus would move nothing".to_owned();
        }
        for wish in wishes {
            if self.budget.moves == 0 {
                return "the budget allows no more moves".to_owned();
            }
            let group = self.situation.groups.iter().find(|it| it.id == wish.shard);
            if let Some(group) = group {
                self.send(group, wish.to, Why::Citus);
            }
        }
        "that is what Citus would do".to_owned()
    }

    /// What is larger than the fair share of any node.
    pub(super) fn hot(&self) -> Vec<Hot> {
        let fair_share = self.loads.target_max();
        let hot = self.situation.groups.iter().filter_map(|group| {
            let bytes = *group.bytes.as_ref().ok()?;
            let share = self.loads.share_of_bytes(bytes);
            if bytes < self.balance.hot_bytes_min || share <= fair_share + EPSILON {
                return None;
            }
            let advice = if group.is_hash {
                "split it with citus_split_shard_by_split_points(), or give a tenant that fills it \
                 a shard of its own with isolate_tenant_to_new_shard()"
            } else {
                "it has one shard and cannot be split: spread its tables by a column, or give its \
                 node a larger weight"
            };
            let (tables, advice) = (group.tables.clone(), advice.to_owned());
            Some(Hot { shard: group.id, tables, bytes, share, fair_share, advice })
        });
        let mut hot: Vec<_> = hot.collect();
        hot.sort_by_key(|it| (Reverse(it.bytes), it.shard));
        hot
    }
}

/// `shard 102012 of public.events and 2 more`.
fn name(group: &ShardGroup) -> String {
    let more = group.tables.len().saturating_sub(1);
    let table = group.tables.first().map_or("no table", String::as_str);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("shard {} of {table}{more}", group.id)
}
