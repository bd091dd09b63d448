//! What operators ask of the agent. Pure.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Something an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Move nothing for now.
    Pause(Pause),
    /// Go on.
    Resume,
    /// Empty a group of servers.
    Drain {
        /// Its number.
        group: u32,
    },
    /// Do not, and let it have shards again.
    Undrain {
        /// Its number.
        group: u32,
    },
    /// Move a shard, with its shard group.
    Move {
        /// Its number.
        shard: i64,
        /// The group it is to be on.
        to: u32,
    },
    /// Do not, or no more: it is there.
    Drop {
        /// Its number.
        shard: i64,
    },
}

/// That nothing is to be moved for now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Since when.
    pub since: DateTime<Utc>,
    /// Until when; `None` until somebody says so.
    pub until: Option<DateTime<Utc>>,
    /// Why.
    pub comment: String,
}

impl Pause {
    /// That it is paused, as a sentence without full stop.
    pub fn reason(&self) -> String {
        let until = |it: DateTime<Utc>| format!(" until {}", it.format("%Y-%m-%d %H:%M UTC"));
        format!("paused{}: {}", self.until.map(until).unwrap_or_default(), self.comment)
    }
}

/// All that is asked for at present.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// Whether nothing is to be moved.
    pub pause: Option<Pause>,
    /// Groups that are to be emptied.
    #[serde(default)]
    pub drains: BTreeSet<u32>,
    /// Shards that are to be on a group of servers.
    #[serde(default)]
    pub moves: BTreeMap<i64, u32>,
}

impl Control {
    /// What is asked for after one more request.
    pub fn with(mut self, request: Request) -> Self {
        match request {
            Request::Pause(pause) => self.pause = Some(pause),
            Request::Resume => self.pause = None,
            Request::Drain { group } => {
                self.drains.insert(group);
            }
            Request::Undrain { group } => {
                self.drains.remove(&group);
            }
            Request::Move { shard, to } => {
                self.moves.insert(shard, to);
            }
            Request::Drop { shard } => {
                self.moves.remove(&shard);
            }
        }
        self
    }

    /// The pause that holds at `now`.
    pub fn pause_at(&self, now: DateTime<Utc>) -> Option<&Pause> {
        self.pause.as_ref().filter(|it| it.until.is_none_or(|until| now < until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn requests_add_up_and_survive_being_written() {
        let pause = Pause {
            since: time("2026-03-10T01:00:00Z"),
            until: Some(time("2026-03-10T02:00:00Z")),
            comment: "an upgrade".to_owned(),
        };
        let requests = [
            Request::Drain { group: 2 },
            Request::Drain { group: 3 },
            Request::Undrain { group: 2 },
            Request::Pause(pause.clone()),
            Request::Move { shard: 101, to: 3 },
            Request::Move { shard: 102, to: 3 },
            Request::Drop { shard: 101 },
        ];
        let control = requests.into_iter().fold(Control::default(), |control, request| {
            let text = serde_json::to_string(&request).unwrap();
            control.with(serde_json::from_str(&text).unwrap())
        });
        let expected = Control { pause: Some(pause), drains: [3].into(), moves: [(102, 3)].into() };
        assert_eq!(control, expected);
        let text = serde_json::to_string(&control).unwrap();
        assert_eq!(serde_json::from_str::<Control>(&text).unwrap(), control);
        assert_eq!(control.with(Request::Resume).pause, None);
    }

    #[test]
    fn a_pause_ends() {
        let since = time("2026-03-10T01:00:00Z");
        for (until, now, expected) in [
            (None, "2026-03-11T01:00:00Z", true),
            (Some("2026-03-10T02:00:00Z"), "2026-03-10T01:59:59Z", true),
            (Some("2026-03-10T02:00:00Z"), "2026-03-10T02:00:00Z", false),
        ] {
            let pause = Pause { since, until: until.map(time), comment: String::new() };
            let control = Control { pause: Some(pause), ..Control::default() };
            assert_eq!(control.pause_at(time(now)).is_some(), expected, "{until:?} {now}");
        }
    }
}
