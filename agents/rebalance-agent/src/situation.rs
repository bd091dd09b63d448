//! What was found out and what is refused, as what a plan is made from. Pure.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::balance::Place;
use crate::config::{Balance, Guard};
use crate::control::Control;
use crate::guard::{Refusal, Scope};
use crate::known::{Known, Unknown};
use crate::ledger::Ledger;
use crate::observation::Observation;
use crate::plan::{Situation, wishes};
use crate::servers::Primary;

/// How many bytes may be written to a primary's disk: what is free, but for the share that stays
/// free and for what WAL takes by itself.
///
/// # Errors
///
/// The server does not tell.
pub fn room(primary: &Primary, limits: &Guard) -> Known<u64> {
    let disk = primary.disk.as_ref().map_err(Clone::clone)?;
    let wal = primary.wal.as_ref().map_err(Clone::clone)?;
    let kept = disk.reserve(limits.disk_free_min).saturating_add(wal.growth());
    Ok(disk.available.saturating_sub(kept))
}

impl Situation {
    /// What a plan is made from.
    pub fn new(
        observation: &Observation,
        refusals: &[Refusal],
        control: &Control,
        balance: &Balance,
        limits: &Guard,
    ) -> Self {
        let catalogue = &observation.catalogue;
        let groups = catalogue.shard_groups();
        let citus = wishes(catalogue, &groups);
        let reason = |scope| {
            let refusal = refusals.iter().find(|it| it.scope == scope);
            refusal.map(|it| it.reason.clone())
        };
        let places = catalogue.nodes.iter().filter(|it| it.is_primary).map(|node| {
            let servers = observation.servers.get(&node.group);
            let not_asked = || Err(Unknown::because("it was not asked"));
            let primary =
                servers.map_or_else(not_asked, |it| it.primary.as_ref().map_err(Clone::clone));
            let blocked = match &primary {
                _ if !node.is_active => Some(format!("{} is not active", node.address())),
                Err(why) => Some(format!("{} does not answer: {why}", node.address())),
                Ok(_) => reason(Scope::Group(node.group)),
            };
            Place {
                group: node.group,
                address: node.address(),
                weight: balance.weight(node.group),
                is_wanted: node.is_active
                    && node.should_have_shards
                    && !control.drains.contains(&node.group),
                blocked,
                room: primary.and_then(|it| room(it, limits)),
            }
        });
        let places = places.collect();
        let mut held = BTreeMap::new();
        for refusal in refusals {
            if let Scope::Colocation(id) = refusal.scope {
                held.entry(id).or_insert_with(|| refusal.reason.clone());
            }
        }
        let (resting, asked) = (BTreeMap::new(), control.moves.clone());
        let forbidden = catalogue.forbidden.clone();
        Self { places, groups, held, resting, asked, citus, forbidden }
    }

    /// What failed lately rests.
    pub fn resting(mut self, ledger: &Ledger, now: DateTime<Utc>) -> Self {
        let rest = |id: i64| Some((id, ledger.resting(id, now)?));
        let resting = self.groups.iter().filter_map(|group| rest(group.id));
        self.resting = resting.collect();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::Gate;
    use crate::guard::tests::well;
    use crate::servers::{Disk, Wal};

    const GIB: u64 = 1 << 30;

    #[test]
    fn room_is_what_is_free_but_for_a_reserve_and_for_wal() {
        let limits = Guard { disk_free_min: 0.1, ..Guard::default() };
        for (available, total, wal, max_wal, expected) in [
            (50, 100, 1, 1, 40),
            (50, 100, 1, 5, 36),
            // More than it keeps by itself: somebody holds it back, and it is on the disk already.
            (50, 100, 9, 5, 40),
            (11, 100, 1, 5, 0),
        ] {
            let observation = well();
            let mut primary = observation.servers[&1].primary.clone().unwrap();
            primary.disk = Ok(Disk { available: available * GIB, total: total * GIB });
            primary.wal = Ok(Wal { bytes: wal * GIB, max_bytes: max_wal * GIB });
            assert_eq!(room(&primary, &limits), Ok(expected * GIB), "{available} {wal}");
            primary.wal = Err(Unknown::because("no answer"));
            assert_eq!(room(&primary, &limits), Err(Unknown::because("no answer")));
        }
    }

    #[test]
    fn a_refusal_blocks_what_it_holds_for() {
        let observation = well();
        let refusal = |scope| Refusal {
            gate: Gate::Lag,
            scope,
            reason: "why".to_owned(),
            next: String::new(),
        };
        let refusals = [Scope::Cluster, Scope::Group(2), Scope::Colocation(1)].map(refusal);
        let control = Control { drains: [1].into(), ..Control::default() };
        let (balance, limits) = (Balance::default(), Guard::default());
        let situation = Situation::new(&observation, &refusals, &control, &balance, &limits);
        let places: Vec<_> = situation
            .places
            .iter()
            .map(|it| (it.group, it.is_wanted, it.blocked.as_deref()))
            .collect();
        // The coordinator takes no shards, and group 1 is drained.
        assert_eq!(places, [(0, false, None), (1, false, None), (2, true, Some("why"))]);
        assert_eq!(situation.held, [(1, "why".to_owned())].into());
    }

    #[test]
    fn a_node_that_is_not_active_or_does_not_answer_is_blocked() {
        let mut observation = well();
        observation.catalogue.nodes[1].is_active = false;
        let silent = Err(Unknown::because("no route to host"));
        observation.servers.get_mut(&2).unwrap().primary = silent;
        let (control, balance) = (Control::default(), Balance::default());
        let situation = Situation::new(&observation, &[], &control, &balance, &Guard::default());
        let [_, inactive, silent] = &situation.places[..] else { panic!("{situation:?}") };
        assert_eq!(inactive.blocked.as_deref(), Some("w1:5432 is not active"));
        assert!(!inactive.is_wanted && silent.is_wanted);
        assert_eq!(silent.blocked.as_deref(), Some("w2:5432 does not answer: no route to host"));
        assert!(silent.room.is_err());
    }
}
