//! What is checked, and what comes of a check.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::component::{Kind, printable};

/// What a check says. The order is that of badness: what is not known is worse than a warning.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    #[default]
    Ok,
    /// Somebody should look, in daylight.
    Warning,
    /// It cannot be told.
    Unknown,
    /// Somebody must act now.
    Critical,
}

impl Status {
    /// All, from the best to the worst.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Warning, Self::Unknown, Self::Critical];

    /// Its name in labels and `/status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Unknown => "unknown",
            Self::Critical => "critical",
        }
    }

    /// The exit code of a monitoring plugin, and the value of the metric.
    /// Source: draft-kaestle-monitoring-plugins-interface, "Exit codes".
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Critical => 2,
            Self::Unknown => 3,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How deep a check looks. A deeper level has the checks of those before.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Level {
    /// Reachable, and in its role.
    Basic,
    /// And able to do its work.
    #[default]
    Standard,
    /// And likely to stay so.
    Comprehensive,
}

impl Level {
    /// All, from the first.
    pub const ALL: [Self; 3] = [Self::Basic, Self::Standard, Self::Comprehensive];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Basic => "basic",
            Self::Standard => "standard",
            Self::Comprehensive => "comprehensive",
        }
    }
}

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Percent.
    Percent,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
}

impl Unit {
    /// The unit of performance data.
    /// Source: draft-kaestle-monitoring-plugins-interface, "Performance data".
    pub const fn symbol(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Percent => "%",
            Self::Bytes => "B",
            Self::Count => "",
        }
    }
}

/// One thing that is checked of each component of a kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name in configuration, labels and `/status`.
    pub name: &'static str,
    /// Of what.
    pub kind: Kind,
    /// From which level on.
    pub level: Level,
    /// What it looks at: "connections in use, of those that are not reserved".
    pub what: &'static str,
    /// The limits of its number, if it has one that can be set.
    pub limits: Option<DefaultLimits>,
    /// What to do when it is not ok.
    pub next: &'static str,
}

/// Limits, unless the configuration sets others.
#[derive(Debug, PartialEq, Eq)]
pub struct DefaultLimits {
    /// What the number counts.
    pub unit: Unit,
    /// Warning from here on.
    pub warning: u64,
    /// Critical from here on. Below `warning`: the number must not be lower.
    pub critical: u64,
    /// Where the two come from.
    pub source: &'static str,
}

/// The limits of one check.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Warning from here on.
    pub warning: f64,
    /// Critical from here on. Below `warning`: the number must not be lower.
    pub critical: f64,
}

/// How far a number must be on the good side of a limit before it counts as good again, as a part of
/// the limit: so one that moves about its limit does not come and go.
const CLEARANCE: f64 = 0.03;

impl Limits {
    /// What a number comes to, after it came to `before`.
    pub fn judge(&self, value: f64, before: Status) -> Status {
        if value.is_nan() {
            return Status::Unknown;
        }
        let is_floor = self.critical < self.warning;
        let is_beyond = |limit: f64, holds: bool| {
            let clearance = if holds { limit.abs() * CLEARANCE } else { 0.0 };
            if is_floor { value <= limit + clearance } else { value >= limit - clearance }
        };
        if is_beyond(self.critical, before == Status::Critical) {
            Status::Critical
        } else if is_beyond(self.warning, matches!(before, Status::Warning | Status::Critical)) {
            Status::Warning
        } else {
            Status::Ok
        }
    }
}

/// A number that a check looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measure {
    /// Its name among those of the check: `used`.
    pub name: &'static str,
    /// The number.
    pub value: f64,
    /// What it counts.
    pub unit: Unit,
    /// The limits it was judged by, if it was.
    pub limits: Option<Limits>,
    /// The most it can be, if there is such a number.
    pub max: Option<f64>,
}

/// What a check of one component says now.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reading {
    /// The check.
    pub check: &'static Check,
    /// What it comes to.
    pub status: Status,
    /// Why, in one sentence without a full stop: "91 of 97 connections are in use".
    pub reason: String,
    /// What is done about it, if that is something else than the check's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// The numbers behind it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub measures: Vec<Measure>,
    /// It only follows from something else, which has a reading of its own: nobody is told of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub follows: bool,
}

/// By its name.
impl Serialize for Check {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name)
    }
}

impl Reading {
    /// A reading without numbers.
    pub fn new(check: &'static Check, status: Status, reason: impl Into<String>) -> Self {
        let (reason, measures) = (printable(reason), Vec::new());
        Self { check, status, reason, next: None, measures, follows: false }
    }

    /// With advice of its own.
    pub fn with_next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(printable(next));
        self
    }

    /// With a number more.
    pub fn with_measure(mut self, measure: Measure) -> Self {
        self.measures.push(measure);
        self
    }

    /// What to do next; empty where there is nothing to do.
    pub fn next_step(&self) -> &str {
        match (self.status, &self.next) {
            (Status::Ok, _) => "",
            (_, Some(next)) => next,
            (_, None) => self.check.next,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_worse_than_a_warning() {
        assert!(Status::ALL.is_sorted());
        assert_eq!(Status::ALL.map(Status::code), [0, 1, 3, 2]);
    }

    #[test]
    fn a_reason_is_one_line_of_plain_text() {
        let reading = Reading::new(&crate::catalogue::ROLE, Status::Critical, "\x1b[31mno\r\nOK");
        assert_eq!(reading.reason, "\u{fffd}[31mno\u{fffd}\u{fffd}OK");
        assert_eq!(reading.with_next("a\nb").next_step(), "a\u{fffd}b");
    }

    #[test]
    fn a_number_is_judged_by_its_limits_and_clears_them_with_room_to_spare() {
        let ceiling = Limits { warning: 80.0, critical: 90.0 };
        let floor = Limits { warning: 95.0, critical: 80.0 };
        let (ok, warning, critical) = (Status::Ok, Status::Warning, Status::Critical);
        for (limits, value, before, expected) in [
            (ceiling, 79.9, ok, ok),
            (ceiling, 80.0, ok, warning),
            (ceiling, 90.0, ok, critical),
            (ceiling, 88.0, critical, critical),
            (ceiling, 87.0, critical, warning),
            (ceiling, 78.0, warning, warning),
            (ceiling, 78.0, critical, warning),
            (ceiling, 77.0, warning, ok),
            (ceiling, f64::NAN, ok, Status::Unknown),
            (floor, 96.0, ok, ok),
            (floor, 95.0, ok, warning),
            (floor, 80.0, ok, critical),
            (floor, 82.0, critical, critical),
            (floor, 85.0, critical, warning),
            (floor, 97.0, warning, warning),
            (floor, 98.0, warning, ok),
        ] {
            assert_eq!(limits.judge(value, before), expected, "{limits:?} {value} {before}");
        }
    }
}
