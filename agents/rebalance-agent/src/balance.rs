//! How well the load is spread: one figure, and what a move does to it. Pure.
//!
//! The load of a shard group is its share of all bytes, mixed with its share of the number of shard
//! groups: together 1. Each place has a target, its weight's share of that 1. The figure is how much
//! of the load lies above the targets: so much would have to be moved, and no less. 0 is balance; a
//! new empty worker beside three full ones makes it a quarter.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::catalogue::ShardGroup;
use crate::known::{Known, Unknown};

/// Below this, differences are those of floating point.
pub const EPSILON: f64 = 1e-9;

/// A node that shards can be on.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Its group.
    pub group: u32,
    /// Its address: `worker-1:5432`.
    pub address: String,
    /// How much it is to have in relation to the others.
    pub weight: f64,
    /// Whether it is to have shards at all: not if it is drained.
    pub is_wanted: bool,
    /// Why nothing is moved to it or from it now.
    pub blocked: Option<String>,
    /// How many bytes may be written to it.
    pub room: Known<u64>,
}

/// How much of the load lies where it does not belong, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Of the load: what is decided by.
    pub load: f64,
    /// Of the bytes.
    pub bytes: f64,
    /// Of the number of shard groups.
    pub count: f64,
}

/// What one place has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Bytes of its shard groups.
    pub bytes: u64,
    /// How many these are.
    pub count: u32,
    /// The share of the load that it is to have.
    pub target: f64,
}

/// What all places have, as moves change it.
#[derive(Clone, Debug, PartialEq)]
pub struct Loads {
    by_group: BTreeMap<u32, Load>,
    bytes: u64,
    count: u32,
    count_share: f64,
}

#[expect(clippy::cast_precision_loss, reason = "shares need no more than 15 digits")]
fn share(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 }
}

impl Loads {
    /// What `places` have of `groups`. Shard groups that are in no one place are left out.
    ///
    /// # Errors
    ///
    /// A size is not known, or a shard group is on none of the places.
    pub fn new(places: &[Place], groups: &[ShardGroup], count_share: f64) -> Known<Self> {
        let wanted = places.iter().filter(|it| it.is_wanted);
        let weights: f64 = wanted.map(|it| it.weight).sum();
        let load = |it: &Place| {
            let target = if it.is_wanted { it.weight / weights } else { 0.0 };
            (it.group, Load { bytes: 0, count: 0, target })
        };
        let by_group = places.iter().map(load).collect();
        let mut loads = Self { by_group, bytes: 0, count: 0, count_share };
        for group in groups {
            let Ok(place) = group.place else { continue };
            let bytes = group.bytes.clone()?;
            let load = loads.by_group.get_mut(&place).ok_or_else(|| {
                Unknown(format!("shard {} is on group {place}, which has no primary", group.id))
            })?;
            load.bytes += bytes;
            load.count += 1;
            loads.bytes += bytes;
            loads.count += 1;
        }
        if loads.bytes == 0 {
            loads.count_share = 1.0;
        }
        Ok(loads)
    }

    /// What the place of `group` has.
    pub fn of(&self, group: u32) -> Option<Load> {
        self.by_group.get(&group).copied()
    }

    /// The bytes of all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The largest target of a place: the fair share that a shard group must not exceed.
    pub fn target_max(&self) -> f64 {
        self.by_group.values().map(|it| it.target).fold(0.0, f64::max)
    }

    /// The share of all bytes.
    pub fn share_of_bytes(&self, bytes: u64) -> f64 {
        share(bytes, self.bytes)
    }

    /// The load of one shard group of that size.
    pub fn weigh(&self, bytes: u64) -> f64 {
        self.mix(bytes, 1, self.count_share)
    }

    fn mix(&self, bytes: u64, count: u32, count_share: f64) -> f64 {
        (1.0 - count_share) * share(bytes, self.bytes)
            + count_share * share(count.into(), self.count.into())
    }

    /// How much more the place of `group` has than its target; less if negative.
    pub fn excess(&self, group: u32) -> f64 {
        self.of(group).map_or(0.0, |it| self.mix(it.bytes, it.count, self.count_share) - it.target)
    }

    /// How full the place of `group` would be with that shard group more, as a multiple of its target.
    pub fn fill_with(&self, group: u32, bytes: u64) -> f64 {
        let target = self.of(group).map_or(0.0, |it| it.target);
        (self.excess(group) + target + self.weigh(bytes)) / target
    }

    /// How much of the load lies above the targets.
    pub fn figure(&self) -> Figure {
        let by = |count_share| {
            let excess =
                |it: &Load| (self.mix(it.bytes, it.count, count_share) - it.target).max(0.0);
            let sum = self.by_group.values().map(excess).sum::<f64>();
            if sum < EPSILON { 0.0 } else { sum }
        };
        if self.count == 0 {
            return Figure::default();
        }
        let bytes = if self.bytes == 0 { 0.0 } else { by(0.0) };
        Figure { load: by(self.count_share), bytes, count: by(1.0) }
    }

    /// By how much a move would lower the figure; negative if it would raise it.
    pub fn gain(&self, from: u32, to: u32, bytes: u64) -> f64 {
        let (load, above, below) = (self.weigh(bytes), self.excess(from), self.excess(to));
        above.max(0.0) - (above - load).max(0.0) + below.max(0.0) - (below + load).max(0.0)
    }

    /// Carries out a move.
    pub fn shift(&mut self, from: u32, to: u32, bytes: u64) {
        if let Some(load) = self.by_group.get_mut(&from) {
            load.bytes = load.bytes.saturating_sub(bytes);
            load.count = load.count.saturating_sub(1);
        }
        if let Some(load) = self.by_group.get_mut(&to) {
            load.bytes += bytes;
            load.count += 1;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A place with endless room.
    pub(crate) fn place(group: u32) -> Place {
        Place {
            group,
            address: format!("w{group}:5432"),
            weight: 1.0,
            is_wanted: true,
            blocked: None,
            room: Ok(u64::MAX),
        }
    }

    /// A shard group on `place`.
    pub(crate) fn shard(id: i64, place: u32, bytes: u64) -> ShardGroup {
        ShardGroup {
            id,
            colocation: 1,
            shards: vec![id],
            tables: vec!["public.t".to_owned()],
            is_hash: true,
            place: Ok(place),
            bytes: Ok(bytes),
        }
    }

    fn figure(places: &[Place], groups: &[(u32, u64)], count_share: f64) -> Figure {
        let groups: Vec<_> =
            (100_i64..).zip(groups).map(|(id, (place, bytes))| shard(id, *place, *bytes)).collect();
        Loads::new(places, &groups, count_share).unwrap().figure()
    }

    fn assert_near(found: f64, expected: f64, case: &str) {
        assert!((found - expected).abs() < 1e-6, "{case}: {found}, expected {expected}");
    }

    #[test]
    fn the_figure_is_what_would_have_to_be_moved() {
        let three = [place(1), place(2), place(3)];
        let heavy = [Place { weight: 2.0, ..place(1) }, place(2)];
        let drained = [place(1), Place { is_wanted: false, ..place(2) }];
        for (case, places, groups, bytes, count) in [
            ("nothing", &three[..], &[][..], 0.0, 0.0),
            ("balance", &three, &[(1, 5), (2, 5), (3, 5)], 0.0, 0.0),
            (
                "a new node",
                &three,
                &[(1, 3), (1, 3), (1, 3), (2, 3), (2, 3), (2, 3)],
                1.0 / 3.0,
                1.0 / 3.0,
            ),
            ("all on one", &three, &[(1, 9)], 2.0 / 3.0, 2.0 / 3.0),
            ("by bytes only", &three[..2], &[(1, 9), (2, 1)], 0.4, 0.0),
            ("by count only", &three[..2], &[(1, 3), (1, 3), (2, 6)], 0.0, 1.0 / 6.0),
            ("weights", &heavy, &[(1, 1), (1, 1), (2, 1)], 0.0, 0.0),
            ("drained", &drained, &[(1, 6), (2, 4)], 0.4, 0.5),
            ("empty shards", &three[..2], &[(1, 0), (1, 0)], 0.0, 0.5),
            ("nobody takes any", &drained[1..], &[(2, 4)], 1.0, 1.0),
        ] {
            let found = figure(places, groups, 0.0);
            assert_near(found.bytes, bytes, case);
            assert_near(found.count, count, case);
            let is_empty = groups.iter().all(|(_, bytes)| *bytes == 0);
            assert_near(found.load, if is_empty { count } else { bytes }, case);
            assert_near(figure(places, groups, 1.0).load, count, case);
            if case == "by bytes only" {
                assert_near(figure(places, groups, 0.25).load, 0.75 * 0.4, case);
            }
        }
    }

    #[test]
    fn what_is_not_known_leaves_no_figure() {
        let places = [place(1)];
        let unknown = ShardGroup { bytes: Err(Unknown::because("no answer")), ..shard(1, 1, 0) };
        assert_eq!(Loads::new(&places, &[unknown], 0.0), Err(Unknown::because("no answer")));
        let elsewhere = Loads::new(&places, &[shard(1, 7, 5)], 0.0);
        let reason = "shard 1 is on group 7, which has no primary";
        assert_eq!(elsewhere, Err(Unknown::because(reason)));
        // One that lies in no one place counts nowhere.
        let nowhere = ShardGroup { place: Err(Unknown::because("2 placements")), ..shard(1, 1, 5) };
        assert_eq!(Loads::new(&places, &[nowhere], 0.0).unwrap().bytes(), 0);
    }

    /// The gain that is foreseen is the one that comes.
    #[test]
    fn a_gain_is_the_difference_of_two_figures() {
        let places = [place(1), place(2), place(3)];
        let groups = [(1, 50), (1, 20), (1, 5), (2, 10), (2, 0), (3, 15)];
        let groups: Vec<_> =
            (1..).zip(groups).map(|(id, (place, bytes))| shard(id, place, bytes)).collect();
        let loads = Loads::new(&places, &groups, 0.25).unwrap();
        for group in &groups {
            for to in 1..=3 {
                let (from, bytes) = (group.place.clone().unwrap(), group.bytes.clone().unwrap());
                if from != to {
                    let mut after = loads.clone();
                    after.shift(from, to, bytes);
                    let gained = loads.figure().load - after.figure().load;
                    assert_near(loads.gain(from, to, bytes), gained, &format!("{group:?} to {to}"));
                }
            }
        }
    }
}
