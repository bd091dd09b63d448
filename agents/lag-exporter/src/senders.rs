//! Who receives WAL from a server, and what it holds back for them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chrono::TimeDelta;
use tokio_postgres::types::PgLsn;

use crate::observation::{Sender, Slot, WalStatus};
use crate::pace::float;
use crate::view::{Runway, SenderKind, SenderView, SlotView};

/// A connection that replied so much earlier than another of the same standby is dead: one that
/// lives replies each 10 s (`wal_receiver_status_interval`), or when it is asked to, which is after
/// half of `wal_sender_timeout`.
const DEAD_AFTER: TimeDelta = TimeDelta::seconds(35);
/// How long is looked back at what a slot holds back: a burst of a minute is not the end of it.
const RUNWAY_WINDOW: Duration = Duration::from_mins(5);
/// What nobody uses is moved on by nobody: the pace of WAL ends it, from whenever in so long it is the
/// fastest. So a load that has just begun is not taken for the slower one that it is on average.
const UNUSED_WINDOW: Duration = Duration::from_secs(30);
/// What is held back longer than whoever uses the slot ever let it be, and for so long, is no step.
const STUCK_WINDOW: Duration = Duration::from_mins(1);
/// Between two looks, at least: so that there are not too many.
const POINTS_APART: Duration = Duration::from_secs(5);

/// Tells what is at the other end of a walsender.
///
/// A standby reports what it has replayed, from its first reply on; `pg_receivewal` and its like
/// never do.
pub fn kind(sender: &Sender) -> SenderKind {
    match sender.state.as_str() {
        _ if sender.logical => SenderKind::Logical,
        "backup" => SenderKind::Backup,
        "startup" => SenderKind::Starting,
        _ if sender.replay_lsn.is_some() => SenderKind::Standby,
        _ if sender.flush_lsn.is_some() => SenderKind::Receiver,
        _ => SenderKind::Starting,
    }
}

/// The walsenders with somebody at the other end.
#[derive(Debug, Default)]
pub struct Alive<'a> {
    /// Of each name and address the one that replied last.
    pub surely: Vec<&'a Sender>,
    /// Those of the same name and address that replied shortly before.
    pub perhaps: Vec<&'a Sender>,
}

/// Leaves out the connections that are dead: somebody who connects anew may for a while be there
/// twice, until the server misses the old connection. But two standbys may share a name and an
/// address as well; then both go on to reply.
pub fn alive(senders: &[Sender]) -> Alive<'_> {
    let freshness = |it: &&Sender| it.reply_age.unwrap_or(TimeDelta::MAX);
    let mut groups: BTreeMap<_, Vec<&Sender>> = BTreeMap::new();
    for sender in senders {
        groups.entry(whose(sender)).or_default().push(sender);
    }
    let mut alive = Alive::default();
    for mut group in groups.into_values() {
        group.sort_by_key(freshness);
        let Some((first, others)) = group.split_first() else { continue };
        let replies = |it: &&&Sender| match (first.reply_age, it.reply_age) {
            (Some(first), Some(age)) => age - first <= DEAD_AFTER,
            _ => false,
        };
        alive.surely.push(first);
        alive.perhaps.extend(others.iter().filter(replies));
    }
    alive
}

/// Name and address.
fn whose(sender: &Sender) -> (&str, Option<&str>) {
    (sender.application_name.as_str(), sender.client_address.as_deref())
}

/// Gives each of the walsenders a name of its own. Names that several addresses share get the
/// address as well, and those that share both the process.
pub fn sender_views(senders: &[Sender]) -> Vec<SenderView> {
    let Alive { surely, perhaps } = alive(senders);
    let mut all = [surely, perhaps].concat();
    all.sort_by_key(|it| (whose(it), it.pid));
    let view = |sender: &&Sender| SenderView {
        name: {
            let (name, address) = whose(sender);
            let named = all.iter().filter(|it| whose(it).0 == name).count();
            let twins = all.iter().filter(|it| whose(it) == (name, address)).count();
            let address = address.unwrap_or("local");
            match (named, twins) {
                (..=1, _) => name.to_owned(),
                (_, ..=1) => format!("{name}@{address}"),
                _ => format!("{name}@{address}/{}", sender.pid),
            }
        },
        kind: kind(sender),
        state: sender.state.clone(),
        sync_state: sender.sync_state.clone(),
        write_lag: sender.write_lag,
        flush_lag: sender.flush_lag,
        replay_lag: sender.replay_lag,
        reply_age_seconds: sender.reply_age.map(TimeDelta::as_seconds_f64),
    };
    all.iter().map(view).collect()
}

/// A moment, and what a slot held back then, in bytes.
type Point = (Duration, u64);

/// What the slots of a server held back over the last minutes.
#[derive(Debug, Default)]
pub struct HeldBack(BTreeMap<String, VecDeque<Point>>);

impl HeldBack {
    /// Takes in where WAL ended at a moment, and where the slots stood.
    pub fn push(&mut self, at: Duration, end_lsn: Option<PgLsn>, slots: Option<&[Slot]>) {
        let (Some(end_lsn), Some(slots)) = (end_lsn.map(u64::from), slots) else { return };
        let mut before = std::mem::take(&mut self.0);
        for slot in slots {
            let Some(restart_lsn) = slot.restart_lsn else { continue };
            let mut points = before.remove(&slot.name).unwrap_or_default();
            if points.back().is_none_or(|(last, _)| *last + POINTS_APART <= at) {
                points.push_back((at, end_lsn.saturating_sub(restart_lsn.into())));
            }
            while points.front().is_some_and(|(first, _)| *first + RUNWAY_WINDOW < at) {
                points.pop_front();
            }
            self.0.insert(slot.name.clone(), points);
        }
    }

    /// By how many bytes a second what `slot` holds back grows; below 0 if it becomes less. `None`
    /// until it was watched for a while.
    ///
    /// Whoever uses a slot may confirm in large steps, between which all slots look alike: so the
    /// least of the first half of the time is compared with the least of the second. While it is
    /// used, less than `confirmed_by` bytes is such a step, however long it takes. That is slow to
    /// tell when more is written than before, so where it is no step what grew of late counts too.
    pub fn growth(&self, slot: &Slot, confirmed_by: u64) -> Option<f64> {
        let points = self.0.get(&slot.name)?;
        let (from, to) = (points.front()?.0, points.back()?.0);
        let watched = to.saturating_sub(from);
        if watched < RUNWAY_WINDOW / 6 {
            return None;
        }
        let step = if slot.active { confirmed_by } else { 0 };
        let points: Vec<_> = points.iter().map(|(at, bytes)| (*at, (*bytes).max(step))).collect();
        let (first, second) = split(&points, from + watched / 2);
        let least = |half: &[Point]| half.iter().copied().min_by_key(|(_, bytes)| *bytes);
        let growth = slope(least(first)?, least(second)?);
        let (before, recent) = split(
            &points,
            to.saturating_sub(if slot.active { STUCK_WINDOW } else { UNUSED_WINDOW }),
        );
        let counts = !slot.active || (from + 3 * STUCK_WINDOW <= to && exceeds(recent, before));
        let lately = recent.split_last().filter(|_| counts).and_then(|(last, before)| {
            let since = if slot.active { &before[..before.len().min(1)] } else { before };
            since.iter().map(|it| slope(*it, *last)).max_by(f64::total_cmp)
        });
        Some(lately.map_or(growth, |lately| growth.max(lately)))
    }
}

/// What was before a moment, and what was from then on.
fn split(points: &[Point], moment: Duration) -> (&[Point], &[Point]) {
    points.split_at(points.partition_point(|(at, _)| *at < moment))
}

/// Whether the least of `recent` is more than the most of `before`.
fn exceeds(recent: &[Point], before: &[Point]) -> bool {
    let bytes = |(_, bytes): &Point| *bytes;
    recent.iter().map(bytes).min() > before.iter().map(bytes).max()
}

/// In bytes a second.
fn slope((since, before): Point, (until, after): Point) -> f64 {
    (float(after) - float(before)) / until.saturating_sub(since).as_secs_f64()
}

/// Shows a slot of a server whose WAL ends at `end_lsn`, if what it holds back grows by so many
/// bytes a second. Somebody who uses a slot moves it on, so the pace of WAL alone ends no slot.
pub fn slot_view(slot: &Slot, end_lsn: Option<u64>, growth: Option<f64>) -> SlotView {
    let retained = |restart_lsn: u64| end_lsn.map(|end| end.saturating_sub(restart_lsn));
    // Below 0 the next checkpoint takes it.
    let safe_wal_bytes = slot.safe_wal_bytes.map(|it| u64::try_from(it).unwrap_or(0));
    let runway = match (slot.wal_status, safe_wal_bytes) {
        (Some(WalStatus::Lost), _) | (_, Some(0)) => Runway::Lasts(Duration::ZERO),
        (_, Some(safe)) => lasts(safe, growth),
        (_, None) => Runway::Unknown,
    };
    SlotView {
        name: slot.name.clone(),
        logical: slot.logical,
        active: slot.active,
        // What is lost is held back no longer, though the position stays while somebody asks for it.
        retained_bytes: slot
            .restart_lsn
            .filter(|_| slot.wal_status != Some(WalStatus::Lost))
            .and_then(|lsn| retained(lsn.into())),
        safe_wal_bytes,
        wal_status: slot.wal_status,
        inactive_for: slot.inactive_for,
        runway,
        xmin_age: slot.xmin_age,
    }
}

fn lasts(bytes: u64, growth: Option<f64>) -> Runway {
    // Less than nothing gives no duration, and nothing more than there is.
    let last = |growth: f64| Duration::try_from_secs_f64(float(bytes) / growth);
    growth.map_or(Runway::Unknown, |it| last(it).map_or(Runway::Endless, Runway::Lasts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender(name: &str, address: Option<&str>, reply_age: Option<i64>) -> Sender {
        Sender {
            application_name: name.to_owned(),
            client_address: address.map(str::to_owned),
            state: "streaming".to_owned(),
            logical: false,
            flush_lsn: Some(5.into()),
            replay_lsn: Some(5.into()),
            write_lag: None,
            flush_lag: None,
            replay_lag: None,
            reply_age: reply_age.map(TimeDelta::seconds),
            sync_priority: 0,
            sync_state: "async".to_owned(),
            pid: 7,
        }
    }

    #[test]
    fn only_who_replays_is_a_standby() {
        let base = sender("a", None, None);
        let with = |state: &str| Sender { state: state.to_owned(), ..base.clone() };
        for (name, sender, expected) in [
            ("streaming", with("streaming"), SenderKind::Standby),
            ("catching up", with("catchup"), SenderKind::Standby),
            ("just connected", with("startup"), SenderKind::Starting),
            ("a base backup", with("backup"), SenderKind::Backup),
            ("pg_receivewal", Sender { replay_lsn: None, ..base.clone() }, SenderKind::Receiver),
            (
                "before its first reply",
                Sender { replay_lsn: None, flush_lsn: None, ..base.clone() },
                SenderKind::Starting,
            ),
            ("a subscription", Sender { logical: true, ..base.clone() }, SenderKind::Logical),
        ] {
            assert_eq!(kind(&sender), expected, "{name}");
        }
    }

    #[test]
    fn each_walsender_has_a_name_of_its_own() {
        let named = |senders: &[Sender]| -> Vec<_> {
            sender_views(senders).into_iter().map(|it| (it.name, it.reply_age_seconds)).collect()
        };
        let expect = |pairs: &[(&str, Option<f64>)]| -> Vec<_> {
            pairs.iter().map(|(name, age)| ((*name).to_owned(), *age)).collect()
        };
        for (name, senders, expected) in [
            ("none", vec![], expect(&[])),
            (
                "two names",
                vec![sender("a", Some("10.0.0.1"), Some(1)), sender("b", None, None)],
                expect(&[("a", Some(1.0)), ("b", None)]),
            ),
            (
                "one that came back",
                vec![
                    sender("a", Some("10.0.0.1"), Some(40)),
                    sender("a", Some("10.0.0.1"), Some(0)),
                    sender("a", Some("10.0.0.1"), None),
                ],
                expect(&[("a", Some(0.0))]),
            ),
            (
                "two that share an address",
                vec![
                    Sender { pid: 9, ..sender("a", Some("10.0.0.1"), Some(1)) },
                    Sender { pid: 8, ..sender("a", Some("10.0.0.1"), Some(9)) },
                    sender("b", Some("10.0.0.1"), Some(9)),
                ],
                expect(&[
                    ("a@10.0.0.1/8", Some(9.0)),
                    ("a@10.0.0.1/9", Some(1.0)),
                    ("b", Some(9.0)),
                ]),
            ),
            (
                "two that nobody named",
                vec![
                    sender("walreceiver", Some("10.0.0.2"), Some(1)),
                    sender("walreceiver", Some("10.0.0.1"), Some(2)),
                    sender("walreceiver", None, Some(3)),
                ],
                expect(&[
                    ("walreceiver@local", Some(3.0)),
                    ("walreceiver@10.0.0.1", Some(2.0)),
                    ("walreceiver@10.0.0.2", Some(1.0)),
                ]),
            ),
        ] {
            assert_eq!(named(&senders), expected, "{name}");
        }
    }

    #[test]
    fn only_what_a_slot_holds_back_longer_and_longer_ends_it() {
        const MIB: u64 = 1 << 20;
        const SEGMENT: u64 = 16 * MIB;
        let slot = |name: &str, active, restart_lsn: u64| Slot {
            name: name.to_owned(),
            logical: false,
            active,
            restart_lsn: Some(restart_lsn.into()),
            wal_status: Some(WalStatus::Reserved),
            safe_wal_bytes: Some(6000 * MIB.cast_signed()),
            inactive_for: None,
            xmin_age: None,
        };
        let mut held_back = HeldBack::default();
        let mut slots = Vec::new();
        // 10 MiB a second are written; somebody replies each second or two, or each 2 min.
        for second in (0..=600_u64).step_by(12) {
            let end = 1000 * MIB + second * 10 * MIB;
            slots = vec![
                slot("unused", false, 900 * MIB),
                slot("stuck", true, 950 * MIB),
                slot("slow", true, 950 * MIB + second * 8 * MIB),
                slot("follows", true, end - (second % 5) * MIB),
                slot("catches up", true, 400 * MIB + second * 11 * MIB),
                slot("in steps", true, 900 * MIB + second / 120 * 1200 * MIB),
                slot("by segments", true, end.next_multiple_of(SEGMENT) - 2 * SEGMENT),
            ];
            if second > 580 {
                slots.push(slot("new", false, end));
            }
            held_back.push(Duration::from_secs(second), Some(end.into()), Some(&slots));
        }
        held_back.push(Duration::from_secs(601), None, Some(&slots));
        held_back.push(Duration::from_secs(601), Some(1.into()), None);
        let growth = |slot| held_back.growth(slot, 2 * SEGMENT);
        let runways = slots.iter().map(|it| slot_view(it, None, growth(it)).runway);
        for (slot, (runway, expected)) in slots.iter().zip(runways.zip([
            Some(590..610),
            Some(590..610),
            Some(2900..3100),
            None,
            None,
            None,
            None,
            None,
        ])) {
            match (runway, expected) {
                (Runway::Lasts(span), Some(expected)) => {
                    assert!(expected.contains(&span.as_secs()), "{}: {span:?}", slot.name);
                }
                (Runway::Lasts(span), None) => {
                    // What is on its way looks like a little growth.
                    assert!(span > Duration::from_hours(24), "{}: {span:?}", slot.name);
                }
                (runway, expected) => {
                    assert_eq!(expected, None, "{}", slot.name);
                    let unknown = slot.name == "new";
                    assert_eq!(runway == Runway::Unknown, unknown, "{}", slot.name);
                }
            }
        }
    }

    #[test]
    fn a_load_that_begins_ends_a_slot_sooner() {
        const MIB: u64 = 1 << 20;
        const PACE: u64 = 2 * MIB;
        let slot = |name: &str, active, restart_lsn: u64, safe: u64| Slot {
            name: name.to_owned(),
            logical: false,
            active,
            restart_lsn: Some(restart_lsn.into()),
            wal_status: Some(WalStatus::Reserved),
            safe_wal_bytes: Some(safe.cast_signed()),
            inactive_for: None,
            xmin_age: None,
        };
        let mut held_back = HeldBack::default();
        for second in (0..=396_u64).step_by(12) {
            let written = second.saturating_sub(300) * PACE;
            let (end, safe) = (1000 * MIB + written, 400 * MIB - written);
            let in_steps = end - written % (100 * MIB);
            let slots = [
                slot("unused", false, 1000 * MIB, safe),
                slot("stuck", true, 1000 * MIB, safe),
                slot("in steps", true, in_steps, safe),
            ];
            held_back.push(Duration::from_secs(second), Some(end.into()), Some(&slots));
            let truth = Duration::from_secs(safe / PACE);
            let growth = |slot: &Slot| held_back.growth(slot, 32 * MIB);
            let is_told = |slot: &Slot| match slot_view(slot, None, growth(slot)).runway {
                Runway::Lasts(runway) => runway.abs_diff(truth) <= Duration::from_secs(1),
                _ => false,
            };
            let [unused, stuck, in_steps] = slots.each_ref().map(is_told);
            assert_eq!(unused, 312 <= second, "unused, at {second}");
            assert_eq!(stuck, 384 <= second, "stuck, at {second}");
            assert!(!in_steps, "in steps, at {second}");
        }
    }

    #[test]
    fn a_slot_lasts_until_what_may_still_be_written_is_written() {
        let slot = |wal_status, safe_wal_bytes| Slot {
            name: "s".to_owned(),
            logical: false,
            active: false,
            restart_lsn: Some(1000.into()),
            wal_status,
            safe_wal_bytes,
            inactive_for: None,
            xmin_age: None,
        };
        let lasts = |seconds| Runway::Lasts(Duration::from_secs(seconds));
        for (name, wal_status, safe, rate, expected) in [
            ("no limit", WalStatus::Extended, None, Some(10.0), Runway::Unknown),
            ("a rate", WalStatus::Reserved, Some(600), Some(10.0), lasts(60)),
            ("no rate yet", WalStatus::Reserved, Some(600), None, Runway::Unknown),
            ("it keeps pace", WalStatus::Reserved, Some(600), Some(0.0), Runway::Endless),
            ("it catches up", WalStatus::Reserved, Some(600), Some(-10.0), Runway::Endless),
            ("the next checkpoint takes it", WalStatus::Unreserved, Some(-5), Some(0.0), lasts(0)),
            ("no rate, and nothing left", WalStatus::Unreserved, Some(0), None, lasts(0)),
            ("lost", WalStatus::Lost, None, None, lasts(0)),
        ] {
            let view = slot_view(&slot(Some(wal_status), safe), Some(5000), rate);
            assert_eq!(view.runway, expected, "{name}");
            let retained = (wal_status != WalStatus::Lost).then_some(4000);
            assert_eq!(view.retained_bytes, retained, "{name}");
        }
        let nothing = Slot { restart_lsn: None, ..slot(None, None) };
        let view = slot_view(&nothing, Some(5000), Some(1.0));
        assert_eq!((view.retained_bytes, view.safe_wal_bytes), (None, None));
        assert_eq!(slot_view(&slot(None, None), None, None).retained_bytes, None);
        // A position of ours may be older than one of the slot's.
        let ahead = slot_view(&slot(None, None), Some(10), None);
        assert_eq!(ahead.retained_bytes, Some(0));
    }
}
