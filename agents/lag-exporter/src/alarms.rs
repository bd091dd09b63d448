//! What somebody must be told of a group: once when it begins, and once when it is over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::fleet::Fleet;
use crate::view::{GroupView, LagState, MostWal, NodeView, SplitBrain, can_rewind};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Of a diverged standby.
const REWIND: &str = "run pg_rewind on it, or rebuild it";
/// … that has WAL of its own on the primary's timeline.
const REBUILD: &str = "rebuild it: pg_rewind finds nothing to do on the primary's own timeline";
/// Of several primaries. What only one of them has is lost when the other is kept.
const CHOOSE: &str = "decide which one stays; stop the other, keep its data, then pg_rewind it";
/// … that write the same timeline.
const CHOOSE_AND_REBUILD: &str = "decide which one stays; stop the other, keep its data, then rebuild \
                                  it: pg_rewind finds nothing to do on the same timeline";
/// Without the primary that was there.
const PROMOTE: &str = "see whether it runs and takes connections; if it is lost, promote a standby";
/// Where none was ever there: perhaps all is well with one that is elsewhere.
const FIND: &str = "see whether one is a member and takes connections of this role; a standby \
                    cluster needs a leader that streams, and every member to be seen once";

/// So many looks may go by before it is told that no primary was ever seen: a standby leader is only
/// known when each member was asked, and then asked again.
const NEVER_SEEN_AFTER: u32 = 15;

/// What was told last.
#[derive(Debug, Default)]
pub struct Alarms {
    groups: BTreeMap<u32, GroupAlarms>,
}

#[derive(Debug, Default)]
struct GroupAlarms {
    diverged: BTreeSet<String>,
    rivals: Option<Rivals>,
    /// For how many looks nobody has known a primary.
    headless: u32,
    /// Whether that was told.
    is_headless: bool,
    /// The primary there was last.
    primary: Option<Place>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rivals {
    names: Vec<String>,
    both_write: bool,
}

/// Where a server is in the history of WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub node: String,
    /// The timeline; `None` is unknown.
    pub timeline: Option<u32>,
    /// The timeline, and the LSN on it as PostgreSQL prints it: `3 at 0/16B9188`. `?` is unknown.
    pub position: String,
}

/// Something that began or is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A standby has WAL that the primary does not have.
    Diverged {
        /// It, and how far it has replayed.
        standby: Place,
        /// The primary, if one is known: nobody counts as one beside another on its timeline.
        primary: Option<Place>,
        /// The timeline of the WAL that it was compared with.
        timeline: Option<u32>,
    },
    /// It was seen on the primary's history again, or is no longer a member.
    NotDiverged(String),
    /// These were primaries at one and the same moment.
    TwoPrimaries(Vec<Place>),
    /// And each of them has written since.
    SplitBrain(Vec<Place>),
    /// At most one of them is still seen to be one.
    OnePrimary {
        /// Those that were.
        nodes: Vec<String>,
        /// Which of them do not answer: nobody knows what they are.
        silent: Vec<String>,
    },
    /// No primary is known: none answers, or several write the same timeline.
    PrimaryUnknown {
        /// The last one, and how far it had written.
        last: Option<Place>,
        /// The standby that has most of that.
        most: Option<MostWal>,
        /// Whether several are there.
        are_several: bool,
    },
    /// One is known.
    PrimaryKnown(Place),
    /// There is none, but a leader of a standby cluster is known.
    LeaderKnown(Place),
}

impl Alarms {
    /// Compares what is known now with what was told.
    pub fn update(&mut self, groups: &[GroupView]) -> Vec<(u32, Event)> {
        self.groups.retain(|number, _| groups.iter().any(|group| group.group == *number));
        let mut events = Vec::new();
        for group in groups {
            // Before each was asked, nobody knows what is missing.
            if group.nodes.iter().all(|node| node.up.is_some()) {
                let told = self.groups.entry(group.group).or_default();
                let begun = told.update(group);
                events.extend(begun.into_iter().map(|event| (group.group, event)));
            }
        }
        events
    }

    /// Looks at `fleet` and logs, until `shutdown`.
    ///
    /// # Errors
    ///
    /// Never.
    pub async fn run(mut self, fleet: Fleet, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = sleep(LOOK_EVERY) => {}
            }
            for (group, event) in self.update(&fleet.groups()) {
                event.log(group);
            }
        }
    }
}

impl GroupAlarms {
    fn update(&mut self, group: &GroupView) -> Vec<Event> {
        let mut events = Vec::new();
        self.primary(group, &mut events);
        self.rivals(group, &mut events);
        self.standbys(group, &mut events);
        events
    }

    fn primary(&mut self, group: &GroupView, events: &mut Vec<Event>) {
        let place_of = |name: &Option<String>| node(group, name.as_ref()?).map(place);
        let (primary, leader) = (place_of(&group.primary), place_of(&group.standby_leader));
        if primary.is_none() && leader.is_none() {
            let are_several = group.primaries > 1;
            let was_seen = self.primary.is_some() || are_several;
            self.headless = self.headless.saturating_add(1);
            let is_due = was_seen || NEVER_SEEN_AFTER <= self.headless;
            if is_due && !std::mem::replace(&mut self.is_headless, true) {
                let (last, most) = (self.primary.clone(), group.most_wal.clone());
                events.push(Event::PrimaryUnknown { last, most, are_several });
            }
            return;
        }
        self.headless = 0;
        // One that has just gone no longer says where it is.
        if let Some(primary) = primary.clone().filter(|it| it.position != UNKNOWN) {
            self.primary = Some(primary);
        }
        if std::mem::take(&mut self.is_headless) {
            events.extend(primary.map(Event::PrimaryKnown).or(leader.map(Event::LeaderKnown)));
        }
    }

    fn rivals(&mut self, group: &GroupView, events: &mut Vec<Event>) {
        let (names, both_write) = match &group.split_brain {
            SplitBrain::No => {
                if let Some(Rivals { names, .. }) = self.rivals.take() {
                    let is_silent =
                        |name: &&String| node(group, name).is_none_or(|it| it.state.is_none());
                    let silent = names.iter().filter(is_silent).cloned().collect();
                    events.push(Event::OnePrimary { nodes: names, silent });
                }
                return;
            }
            SplitBrain::Candidate(names) => (names, false),
            SplitBrain::Confirmed(names) => (names, true),
        };
        let told = self.rivals.as_ref().filter(|told| told.names == *names);
        if told.is_some_and(|told| told.both_write || !both_write) {
            return;
        }
        let places = names.iter().filter_map(|name| node(group, name)).map(place).collect();
        events.push(if both_write {
            Event::SplitBrain(places)
        } else {
            Event::TwoPrimaries(places)
        });
        self.rivals = Some(Rivals { names: names.clone(), both_write });
    }

    fn standbys(&mut self, group: &GroupView, events: &mut Vec<Event>) {
        let known = group.nodes.iter().filter_map(|node| Some((node, diverged(node)?)));
        let gone = self.diverged.iter().filter(|name| node(group, name).is_none()).cloned();
        let mut over: Vec<_> = gone.collect();
        for (node, is_diverged) in known {
            if is_diverged && self.diverged.insert(node.name.clone()) {
                let (standby, primary) = (place(node), self.primary.clone());
                events.push(Event::Diverged { standby, primary, timeline: group.timeline });
            } else if !is_diverged && self.diverged.contains(&node.name) {
                over.push(node.name.clone());
            }
        }
        for name in over {
            self.diverged.remove(&name);
            events.push(Event::NotDiverged(name));
        }
    }
}

/// Whether a node has diverged; `None` if it cannot be told now, and what was told still stands.
fn diverged(node: &NodeView) -> Option<bool> {
    let Some(lag) = &node.lag else { return Some(false) };
    match lag.state {
        LagState::Diverged => Some(true),
        LagState::Ok | LagState::CaughtUp | LagState::BeyondHistory | LagState::OtherCluster => {
            Some(false)
        }
        LagState::PrimaryUnknown | LagState::Unreachable | LagState::Unknown => None,
    }
}

fn node<'a>(group: &'a GroupView, name: &str) -> Option<&'a NodeView> {
    group.nodes.iter().find(|node| node.name == name)
}

const UNKNOWN: &str = "?";

fn place(node: &NodeView) -> Place {
    let timeline = node.state.as_ref().and_then(|state| state.timeline);
    let position = node.state.as_ref().map_or(UNKNOWN.to_owned(), |state| {
        let timeline = state.timeline.map_or(UNKNOWN.to_owned(), |it| it.to_string());
        let lsn = state.wal_lsn.map_or(UNKNOWN.to_owned(), |it| it.to_string());
        format!("{timeline} at {lsn}")
    });
    Place { node: node.name.clone(), timeline, position }
}

/// `a: 3 at 0/16B9188, b: 4 at 0/16B9000`.
fn list(places: &[Place]) -> String {
    let places = places.iter().map(|Place { node, position, .. }| format!("{node}: {position}"));
    places.collect::<Vec<_>>().join(", ")
}

/// What to do about a standby that diverged from WAL of that timeline. `pg_rewind` looks only where timelines
/// part.
fn mend(standby: &Place, timeline: Option<u32>) -> &'static str {
    if can_rewind(standby.timeline, timeline) { REWIND } else { REBUILD }
}

/// What to do about several primaries.
fn choose(places: &[Place]) -> &'static str {
    let timelines: Vec<_> = places.iter().filter_map(|it| it.timeline).collect();
    let are_apart = timelines.len() == timelines.iter().collect::<BTreeSet<_>>().len();
    if are_apart { CHOOSE } else { CHOOSE_AND_REBUILD }
}

impl Event {
    fn log(&self, group: u32) {
        match self {
            Self::Diverged { standby, primary, timeline } => {
                let next = mend(standby, *timeline);
                let Place { node, position, .. } = standby;
                let primary = list(primary.as_slice());
                warn!(group, node, timeline = position, primary, next, "standby diverged");
            }
            Self::NotDiverged(node) => info!(group, node, "standby no longer diverged"),
            Self::TwoPrimaries(places) => {
                warn!(group, timelines = list(places), next = choose(places), "two primaries");
            }
            Self::SplitBrain(places) => {
                let next = choose(places);
                error!(group, timelines = list(places), next, "split brain: both write");
            }
            Self::OnePrimary { nodes, silent } => {
                let (nodes, silent) = (nodes.join(", "), silent.join(", "));
                info!(group, nodes, silent, "two primaries no longer seen");
            }
            Self::PrimaryUnknown { last, most, are_several } => {
                let next = match last {
                    // One is not known to be the primary if another writes the same timeline.
                    _ if *are_several => CHOOSE_AND_REBUILD,
                    Some(_) => PROMOTE,
                    None => FIND,
                };
                let last = list(last.as_slice());
                let most = most.as_ref().map(|it| (it.standby.as_str(), it.lacks_bytes));
                let (most_wal, lacks_bytes) = most.unzip();
                warn!(
                    group,
                    last, most_wal, lacks_bytes, next, "primary unknown: no lag can be told"
                );
            }
            Self::PrimaryKnown(Place { node, position, .. }) => {
                info!(group, node, timeline = position, "primary known");
            }
            Self::LeaderKnown(Place { node, position, .. }) => {
                info!(group, node, timeline = position, "standby leader known");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::example;
    use crate::view::LagView;

    /// Primary `postgres-1` on timeline 3, standby `postgres-2`; and what is made of it.
    fn group(change: impl Fn(&mut GroupView)) -> GroupView {
        let mut group = example().groups.remove(0);
        change(&mut group);
        group
    }

    fn lag(state: LagState) -> impl Fn(&mut GroupView) {
        move |group| {
            let lag: &mut LagView = group.nodes[1].lag.as_mut().unwrap();
            lag.state = state;
        }
    }

    fn split(grade: fn(Vec<String>) -> SplitBrain) -> impl Fn(&mut GroupView) {
        move |group| group.split_brain = grade(names())
    }

    fn names() -> Vec<String> {
        ["postgres-1", "postgres-3"].map(str::to_owned).to_vec()
    }

    fn headless(group: &mut GroupView) {
        group.primary = None;
    }

    /// What is told in the end.
    fn told(turns: Vec<GroupView>) -> Vec<Event> {
        let mut alarms = Alarms::default();
        let events = turns.into_iter().flat_map(|group| alarms.update(&[group]));
        events.map(|(_, event)| event).collect()
    }

    #[test]
    fn each_thing_is_told_once_when_it_begins_and_once_when_it_is_over() {
        let well = || group(|_| ());
        let [primary, standby, silent] = [0, 1, 2].map(|index| place(&well().nodes[index]));
        assert_eq!(silent.position, UNKNOWN);
        let diverged = || Event::Diverged {
            standby: standby.clone(),
            primary: Some(primary.clone()),
            timeline: well().timeline,
        };
        let not_diverged = || Event::NotDiverged("postgres-2".to_owned());
        let rivals = || vec![primary.clone(), silent.clone()];
        let one = Event::OnePrimary { nodes: names(), silent: vec!["postgres-3".to_owned()] };
        let most = well().most_wal;
        let unknown = || Event::PrimaryUnknown {
            last: Some(primary.clone()),
            most: most.clone(),
            are_several: false,
        };
        let not_asked = |group: &mut GroupView| {
            headless(group);
            group.nodes[2].up = None;
        };
        let left = |group: &mut GroupView| drop(group.nodes.remove(1));
        let table: [(&str, Vec<GroupView>, Vec<Event>); 9] = [
            ("all is well", vec![well(), well()], vec![]),
            (
                "it stays diverged, and is mended",
                vec![group(lag(LagState::Diverged)), group(lag(LagState::Diverged)), well()],
                vec![diverged(), not_diverged()],
            ),
            (
                "what cannot be told ends nothing",
                vec![
                    group(lag(LagState::Diverged)),
                    group(lag(LagState::Unreachable)),
                    group(lag(LagState::PrimaryUnknown)),
                    group(lag(LagState::Diverged)),
                ],
                vec![diverged()],
            ),
            (
                "it is no longer a member",
                vec![group(lag(LagState::Diverged)), group(left)],
                vec![diverged(), not_diverged()],
            ),
            (
                "two primaries, and then both write, and then one is silent",
                vec![
                    group(split(SplitBrain::Candidate)),
                    group(split(SplitBrain::Candidate)),
                    group(split(SplitBrain::Confirmed)),
                    group(split(SplitBrain::Candidate)),
                    well(),
                ],
                vec![Event::TwoPrimaries(rivals()), Event::SplitBrain(rivals()), one],
            ),
            (
                "both write at once",
                vec![group(split(SplitBrain::Confirmed))],
                vec![Event::SplitBrain(rivals())],
            ),
            (
                "the primary goes and comes",
                vec![well(), group(headless), group(headless), well()],
                vec![unknown(), Event::PrimaryKnown(primary.clone())],
            ),
            (
                "where it was is what it said last",
                vec![
                    well(),
                    group(|group| group.nodes[0].state = None),
                    group(|group| {
                        group.nodes[0].state = None;
                        headless(group);
                    }),
                ],
                vec![unknown()],
            ),
            ("not all were asked yet", vec![group(not_asked), well()], vec![]),
        ];
        for (name, turns, expected) in table {
            assert_eq!(told(turns), expected, "{name}");
        }
    }

    #[test]
    fn where_no_primary_was_seen_there_may_be_one_elsewhere() {
        let [primary, standby] = [0, 1].map(|index| place(&group(|_| ()).nodes[index]));
        let most = group(|_| ()).most_wal;
        let never =
            |are_several| Event::PrimaryUnknown { last: None, most: most.clone(), are_several };
        let looks = |change: fn(&mut GroupView), count: u32| -> Vec<_> {
            (0..count).map(|_| group(change)).collect()
        };
        let lead = |group: &mut GroupView| {
            headless(group);
            group.standby_leader = Some("postgres-2".to_owned());
        };
        let table: [(&str, Vec<GroupView>, Vec<Event>); 5] = [
            ("there was none yet", looks(headless, NEVER_SEEN_AFTER - 1), vec![]),
            (
                "there never was one, and then there is",
                [looks(headless, NEVER_SEEN_AFTER + 9), looks(|_| (), 2)].concat(),
                vec![never(false), Event::PrimaryKnown(primary.clone())],
            ),
            (
                "several at once",
                vec![group(|group| {
                    headless(group);
                    group.primaries = 2;
                })],
                vec![never(true)],
            ),
            (
                "it is elsewhere",
                [looks(headless, 3), looks(lead, 3), looks(headless, 3)].concat(),
                vec![],
            ),
            (
                "its leader goes and comes",
                [looks(lead, 3), looks(headless, NEVER_SEEN_AFTER), looks(lead, 3)].concat(),
                vec![never(false), Event::LeaderKnown(standby.clone())],
            ),
        ];
        for (name, turns, expected) in table {
            assert_eq!(told(turns), expected, "{name}");
        }
    }

    #[test]
    fn what_one_timeline_holds_is_not_rewound() {
        let at = |node: &str, timeline| Place {
            node: node.to_owned(),
            timeline,
            position: String::new(),
        };
        for (name, standby, primary, diverged, primaries) in [
            ("the primary's timeline", Some(2), Some(2), REBUILD, CHOOSE_AND_REBUILD),
            ("an older one", Some(1), Some(2), REWIND, CHOOSE),
            ("not known", None, Some(2), REWIND, CHOOSE),
            ("of neither", None, None, REWIND, CHOOSE),
        ] {
            assert_eq!(mend(&at("b", standby), primary), diverged, "{name}");
            let places = [at("a", primary), at("b", standby), at("c", Some(9))];
            assert_eq!(choose(&places), primaries, "{name}");
        }
    }

    #[test]
    fn a_line_names_the_servers_and_where_they_are() {
        let places = [0, 2].map(|index| place(&group(|_| ()).nodes[index]));
        assert_eq!(list(&places), "postgres-1: 3 at 0/3000100, postgres-3: ?");
    }
}
