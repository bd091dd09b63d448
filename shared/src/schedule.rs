//! When something is due: crontab lines, in UTC or in a time zone.
//!
//! The `cron` crate reads six or seven fields, counts weekdays from Sunday = 1, and joins day of
//! month and day of week by AND. A crontab line has five fields, Sunday = 0 or 7, and joins the
//! two by OR. So a five-field line is not handed on with a zero in front: its fields are read
//! here, and written out for `cron` as plain lists.
//!
//! Clock changes: the search runs over local times as if there were no clock changes, and each
//! local time found stands for one moment. A time the clock skips stands for the first moment
//! after the gap; a time it shows twice stands for the first of the two.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use chrono::{DateTime, LocalResult, NaiveDateTime, TimeZone, Utc};
use chrono_tz::{GapInfo, Tz};
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use thiserror::Error;

/// The times of a schedule.
///
/// In a configuration file either a string, in UTC, or a table with a time zone:
///
/// ```toml
/// schedule = "0 2 * * *"
/// schedule = { cron = "0 2 * * *", time_zone = "Europe/Berlin" }
/// ```
///
/// Five fields mean what crontab means by them: minute, hour, day of month, month, day of week
/// (Sunday is 0 or 7; three-letter English names are allowed); if neither day field begins with
/// `*`, either may match. Six or seven fields mean what the `cron` crate means: second, minute,
/// hour, day of month, month, day of week (Sunday is **1**), and perhaps year; both day fields
/// must match. `@hourly`, `@daily`, `@weekly` (Sunday), `@monthly` and `@yearly` work too.
///
/// Source: crontab(5) of Vixie cron and its successors; the documentation of `cron` 0.17.
#[derive(Clone, Debug)]
pub struct Schedule {
    line: String,
    time_zone: Tz,
    /// Due is what any of these says. Two only where crontab means OR.
    alternatives: Vec<cron::Schedule>,
}

/// Why a line is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// The number of fields is that of neither form.
    #[error("schedule `{line}` has {found} fields, expected 5 (crontab), or 6 or 7 (with seconds)")]
    Fields {
        /// The line.
        line: String,
        /// How many fields it has.
        found: usize,
    },
    /// One field makes no sense.
    #[error("{name} `{field}`: {problem}")]
    Field {
        /// Which field.
        name: &'static str,
        /// What it says.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The `cron` crate refuses the line.
    #[error("schedule `{line}`: {problem}")]
    Line {
        /// The line.
        line: String,
        /// What it said.
        problem: String,
    },
    /// No day of any year matches, for example February 30.
    #[error("schedule `{line}` never matches")]
    Never {
        /// The line.
        line: String,
    },
    /// The time zone is not in the IANA database.
    #[error("time zone `{name}` is unknown, expected a name like Europe/Berlin")]
    TimeZone {
        /// The name.
        name: String,
    },
}

/// One field of a crontab line.
struct Field {
    name: &'static str,
    /// Values `cron` takes.
    values: RangeInclusive<u32>,
    /// Names of the values, from the first on.
    names: &'static [&'static str],
}

const MINUTE: Field = Field { name: "minute", values: 0..=59, names: &[] };
const HOUR: Field = Field { name: "hour", values: 0..=23, names: &[] };
const DAY_OF_MONTH: Field = Field { name: "day of month", values: 1..=31, names: &[] };
const MONTH: Field = Field {
    name: "month",
    values: 1..=12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
};
/// As crontab counts: 0 and 7 are both Sunday.
const DAY_OF_WEEK: Field = Field {
    name: "day of week",
    values: 0..=7,
    names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
};

impl Schedule {
    /// Reads `line`, with its times in `time_zone`.
    ///
    /// # Errors
    ///
    /// Fails when the line makes no sense or never matches.
    pub fn in_time_zone(line: &str, time_zone: Tz) -> Result<Self, ScheduleError> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let line = fields.join(" ");
        let expressions = match fields.as_slice() {
            [shorthand] if shorthand.starts_with('@') => vec![line.clone()],
            [minute, hour, day_of_month, month, day_of_week] => {
                crontab(minute, hour, day_of_month, month, day_of_week)?
            }
            [_, _, _, _, _, _] | [_, _, _, _, _, _, _] => {
                separate(&fields)?;
                vec![line.clone()]
            }
            _ => return Err(ScheduleError::Fields { line, found: fields.len() }),
        };

        let mut alternatives = Vec::with_capacity(expressions.len());
        for expression in expressions {
            let schedule = cron::Schedule::from_str(&expression).map_err(|error| {
                let problem = error.to_string().replace('\n', " ");
                ScheduleError::Line { line: line.clone(), problem }
            })?;
            // An alternative that never matches, as in `0 0 30 2 1`, takes nothing from the other.
            if schedule.after(&DateTime::UNIX_EPOCH).next().is_some() {
                alternatives.push(schedule);
            }
        }
        if alternatives.is_empty() {
            return Err(ScheduleError::Never { line });
        }
        Ok(Self { line, time_zone, alternatives })
    }

    /// Returns the first time after `after`, which itself does not count.
    ///
    /// `None` when there is no more: the line names only years gone by, or `after` is beyond
    /// 2099, where the `cron` crate ends.
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // Local times up to this one stand for moments up to `after`, so they are behind us.
        let mut local = after.with_timezone(&self.time_zone).naive_local();
        loop {
            local = self.next_local_after(local)?;
            let due = self.moment(local)?;
            // In the hour the clock shows twice, local times seen already come up again.
            if due > after {
                return Some(due);
            }
        }
    }

    /// The time zone the line is read in.
    pub fn time_zone(&self) -> Tz {
        self.time_zone
    }

    /// The first local time after `local`, on a clock that never changes: hence as if in UTC.
    fn next_local_after(&self, local: NaiveDateTime) -> Option<NaiveDateTime> {
        let after = local.and_utc();
        let next = self.alternatives.iter().filter_map(|schedule| schedule.after(&after).next());
        next.min().map(|next| next.naive_utc())
    }

    /// The one moment `local` stands for.
    fn moment(&self, local: NaiveDateTime) -> Option<DateTime<Utc>> {
        match self.time_zone.from_local_datetime(&local) {
            LocalResult::Single(moment) | LocalResult::Ambiguous(moment, _) => {
                Some(moment.to_utc())
            }
            LocalResult::None => Some(GapInfo::new(&local, &self.time_zone)?.end?.to_utc()),
        }
    }
}

/// What crontab means by five fields, in lines of the `cron` crate.
fn crontab(
    minute: &str,
    hour: &str,
    day_of_month: &str,
    month: &str,
    day_of_week: &str,
) -> Result<Vec<String>, ScheduleError> {
    let time = format!("0 {} {}", list(&MINUTE.read(minute)?), list(&HOUR.read(hour)?));
    let months = list(&MONTH.read(month)?);
    let days = list(&DAY_OF_MONTH.read(day_of_month)?);
    // From 0 and 7 for Sunday to 1, from 6 for Saturday to 7.
    let weekdays = DAY_OF_WEEK.read(day_of_week)?.into_iter().map(|day| day % 7 + 1).collect();
    let weekdays = list(&weekdays);
    // Vixie cron looks at the first character: `*/2` counts as unrestricted here.
    if day_of_month.starts_with('*') || day_of_week.starts_with('*') {
        return Ok(vec![format!("{time} {days} {months} {weekdays}")]);
    }
    Ok(vec![format!("{time} {days} {months} *"), format!("{time} * {months} {weekdays}")])
}

fn list(values: &BTreeSet<u32>) -> String {
    let values: Vec<String> = values.iter().map(u32::to_string).collect();
    values.join(",")
}

impl Field {
    /// The values that `text`, a list of ranges with or without steps, stands for.
    fn read(&self, text: &str) -> Result<BTreeSet<u32>, ScheduleError> {
        let mut values = BTreeSet::new();
        for item in text.split(',') {
            let problem =
                |problem| ScheduleError::Field { name: self.name, field: text.to_owned(), problem };
            values.extend(self.read_item(item).map_err(problem)?);
        }
        Ok(values)
    }

    fn read_item(&self, item: &str) -> Result<Vec<u32>, String> {
        let (range, step) = match item.split_once('/') {
            None => (item, 1),
            Some((range, step)) => match number(step) {
                None | Some(0) => return Err(format!("step `{step}` is not a number above 0")),
                Some(_) if range != "*" && !range.contains('-') => {
                    let (last, range) = (self.values.end(), range);
                    return Err(format!("a step needs a range, such as {range}-{last}/{step}"));
                }
                Some(step) => (range, step as usize),
            },
        };
        let (first, last) = match range.split_once('-') {
            None if range == "*" => (*self.values.start(), *self.values.end()),
            None => {
                let value = self.value(range)?;
                (value, value)
            }
            Some((first, last)) => (self.value(first)?, self.value(last)?),
        };
        if first > last {
            return Err(format!("range {range} runs backwards"));
        }
        Ok((first..=last).step_by(step).collect())
    }

    fn value(&self, text: &str) -> Result<u32, String> {
        let by_name = || self.names.iter().position(|name| text.eq_ignore_ascii_case(name));
        let value = match number(text) {
            Some(value) => Some(value),
            None => {
                by_name().and_then(|index| Some(self.values.start() + u32::try_from(index).ok()?))
            }
        };
        let (first, last) = (self.values.start(), self.values.end());
        let value = value.filter(|value| self.values.contains(value));
        value.ok_or_else(|| format!("`{text}` is not between {first} and {last}"))
    }
}

/// A number of digits only, unlike `str::parse`, which takes a sign.
fn number(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Checks that each field is one field for the `cron` crate too. That reads fields one after the
/// other with or without space between them, so `**` would count as two and `1 /2` as one.
fn separate(fields: &[&str]) -> Result<(), ScheduleError> {
    for field in fields {
        let whole = |item: &str| {
            let (range, step) = item.split_once('/').unwrap_or((item, "1"));
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let is_word = |text: &str| {
                let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                let letters = text.bytes().all(|byte| byte.is_ascii_alphabetic());
                !text.is_empty() && (digits || letters)
            };
            let is_any = matches!(range, "*" | "?");
            (is_any || (is_word(first) && is_word(last))) && number(step).is_some_and(|it| it > 0)
        };
        if !field.split(',').all(whole) {
            return Err(ScheduleError::Field {
                name: "field",
                field: (*field).to_owned(),
                problem: "expected a list of values, ranges, and steps".to_owned(),
            });
        }
    }
    Ok(())
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    /// Reads a line in UTC.
    fn from_str(line: &str) -> Result<Self, ScheduleError> {
        Self::in_time_zone(line, Tz::UTC)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.line, self.time_zone)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScheduleVisitor)
    }
}

struct ScheduleVisitor;

impl<'de> Visitor<'de> for ScheduleVisitor {
    type Value = Schedule;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a crontab line, or a table with `cron` and `time_zone`")
    }

    fn visit_str<E: de::Error>(self, line: &str) -> Result<Schedule, E> {
        line.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Schedule, A::Error> {
        let (mut line, mut time_zone) = (None, Tz::UTC);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "cron" => line = Some(map.next_value::<String>()?),
                "time_zone" => {
                    let name = map.next_value::<String>()?;
                    let unknown =
                        |_| de::Error::custom(ScheduleError::TimeZone { name: name.clone() });
                    time_zone = name.parse().map_err(unknown)?;
                }
                key => return Err(de::Error::unknown_field(key, &["cron", "time_zone"])),
            }
        }
        let line = line.ok_or_else(|| de::Error::missing_field("cron"))?;
        Schedule::in_time_zone(&line, time_zone).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    fn utc(time: &str) -> DateTime<Utc> {
        time.parse().unwrap()
    }

    /// The next `count` times after `after`, in UTC.
    fn times(schedule: &Schedule, after: &str, count: usize) -> Vec<String> {
        let first = schedule.next_after(utc(after));
        std::iter::successors(first, |due| schedule.next_after(*due))
            .take(count)
            .map(|due| due.format("%Y-%m-%dT%H:%M:%SZ").to_string())
            .collect()
    }

    /// 2026-03-01 is a Sunday.
    #[test]
    fn a_crontab_line_means_what_crontab_means() {
        for (line, expected) in [
            ("30 2 * * *", ["2026-03-01T02:30:00Z", "2026-03-02T02:30:00Z"]),
            ("  30   2 * * *  ", ["2026-03-01T02:30:00Z", "2026-03-02T02:30:00Z"]),
            ("*/30 * * * *", ["2026-03-01T00:30:00Z", "2026-03-01T01:00:00Z"]),
            ("5-59/20 1 * * *", ["2026-03-01T01:05:00Z", "2026-03-01T01:25:00Z"]),
            ("0 12 * * 0", ["2026-03-01T12:00:00Z", "2026-03-08T12:00:00Z"]),
            ("0 12 * * 7", ["2026-03-01T12:00:00Z", "2026-03-08T12:00:00Z"]),
            ("0 12 * * Sun", ["2026-03-01T12:00:00Z", "2026-03-08T12:00:00Z"]),
            ("0 12 * * 1", ["2026-03-02T12:00:00Z", "2026-03-09T12:00:00Z"]),
            ("0 12 * * 6", ["2026-03-07T12:00:00Z", "2026-03-14T12:00:00Z"]),
            ("0 12 * * 5-7", ["2026-03-01T12:00:00Z", "2026-03-06T12:00:00Z"]),
            ("0 12 * * mon-fri", ["2026-03-02T12:00:00Z", "2026-03-03T12:00:00Z"]),
            ("0 12 29 2 *", ["2028-02-29T12:00:00Z", "2032-02-29T12:00:00Z"]),
            ("0 0 1 JAN,jul *", ["2026-07-01T00:00:00Z", "2027-01-01T00:00:00Z"]),
            // Both days given: either will do. The 13th, and each Friday.
            ("0 0 13 * fri", ["2026-03-06T00:00:00Z", "2026-03-13T00:00:00Z"]),
            ("0 0 3 * fri", ["2026-03-03T00:00:00Z", "2026-03-06T00:00:00Z"]),
            // A day field that begins with `*` is joined by AND: Mondays on odd days.
            ("0 0 */2 * 1", ["2026-03-09T00:00:00Z", "2026-03-23T00:00:00Z"]),
            // February 30 never comes, but each Monday of February does.
            ("0 0 30 2 1", ["2027-02-01T00:00:00Z", "2027-02-08T00:00:00Z"]),
        ] {
            let schedule: Schedule = line.parse().unwrap();
            assert_eq!(times(&schedule, "2026-03-01T00:00:00Z", 2), expected, "{line}");
        }
    }

    #[test]
    fn six_and_seven_fields_and_names_mean_what_cron_means() {
        for (line, expected) in [
            ("15 30 2 * * *", ["2026-03-01T02:30:15Z", "2026-03-02T02:30:15Z"]),
            // Sunday is 1 here.
            ("0 0 12 * * 1", ["2026-03-01T12:00:00Z", "2026-03-08T12:00:00Z"]),
            // Both days given: both must match. Friday the 13th.
            ("0 0 0 13 * Fri", ["2026-03-13T00:00:00Z", "2026-11-13T00:00:00Z"]),
            ("0 0 0 1 1 ? 2030-2031", ["2030-01-01T00:00:00Z", "2031-01-01T00:00:00Z"]),
            ("@daily", ["2026-03-02T00:00:00Z", "2026-03-03T00:00:00Z"]),
            ("@weekly", ["2026-03-08T00:00:00Z", "2026-03-15T00:00:00Z"]),
        ] {
            let schedule: Schedule = line.parse().unwrap();
            assert_eq!(times(&schedule, "2026-03-01T00:00:00Z", 2), expected, "{line}");
        }
    }

    #[test]
    fn a_line_that_makes_no_sense_is_refused_rather_than_shifted() {
        for (line, expected) in [
            ("", "schedule `` has 0 fields, expected 5 (crontab), or 6 or 7 (with seconds)"),
            (
                "2 * * *",
                "schedule `2 * * *` has 4 fields, expected 5 (crontab), or 6 or 7 (with seconds)",
            ),
            ("60 * * * *", "minute `60`: `60` is not between 0 and 59"),
            ("* 24 * * *", "hour `24`: `24` is not between 0 and 23"),
            ("* * 0 * *", "day of month `0`: `0` is not between 1 and 31"),
            ("* * * 13 *", "month `13`: `13` is not between 1 and 12"),
            ("* * * * 8", "day of week `8`: `8` is not between 0 and 7"),
            ("* * * * L", "day of week `L`: `L` is not between 0 and 7"),
            ("0 ** * * *", "hour `**`: `**` is not between 0 and 23"),
            ("+5 2 * * *", "minute `+5`: `+5` is not between 0 and 59"),
            ("5,,6 2 * * *", "minute `5,,6`: `` is not between 0 and 59"),
            ("5/15 * * * *", "minute `5/15`: a step needs a range, such as 5-59/15"),
            ("*/0 * * * *", "minute `*/0`: step `0` is not a number above 0"),
            ("0 22-6 * * *", "hour `22-6`: range 22-6 runs backwards"),
            ("0 0 * * sat-sun", "day of week `sat-sun`: range sat-sun runs backwards"),
            ("0 0 30 2 *", "schedule `0 0 30 2 *` never matches"),
            ("0 0 31 4,6 *", "schedule `0 0 31 4,6 *` never matches"),
            ("0 0 0 30 2 *", "schedule `0 0 0 30 2 *` never matches"),
            ("0 0 ** * * *", "field `**`: expected a list of values, ranges, and steps"),
            ("0 0 10 /2 * * *", "field `/2`: expected a list of values, ranges, and steps"),
        ] {
            let error = line.parse::<Schedule>().unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        // Sunday is not 0 with seconds, and there is no `@reboot`.
        for line in ["0 0 0 * * 0", "@reboot", "0 0 0 * * Nonday"] {
            let error = line.parse::<Schedule>().unwrap_err();
            assert!(matches!(error, ScheduleError::Line { .. }), "{line}: {error}");
        }
    }

    /// In Berlin the clock went from 02:00 to 03:00 on 2026-03-29 at 01:00 UTC, and goes from
    /// 03:00 to 02:00 on 2026-10-25 at 01:00 UTC.
    #[test]
    fn each_local_time_runs_once_across_clock_changes() {
        let cases = [
            (
                "skipped: at the first moment after the gap",
                "30 2 * * *",
                "2026-03-28T00:00:00Z",
                vec!["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"],
            ),
            (
                "several skipped, and one at the gap's end: all in one run",
                "*/30 2,3 * * *",
                "2026-03-29T00:00:00Z",
                vec!["2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z", "2026-03-30T00:00:00Z"],
            ),
            (
                "shown twice: at the first",
                "30 2 * * *",
                "2026-10-24T12:00:00Z",
                vec!["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
            ),
            (
                "asked between the two",
                "30 2 * * *",
                "2026-10-25T01:10:00Z",
                vec!["2026-10-26T01:30:00Z"],
            ),
            (
                "the hour shown twice runs once",
                "*/30 * * * *",
                "2026-10-24T23:45:00Z",
                vec!["2026-10-25T00:00:00Z", "2026-10-25T00:30:00Z", "2026-10-25T02:00:00Z"],
            ),
            ("an ordinary day", "0 2 * * *", "2026-07-01T00:00:00Z", vec!["2026-07-02T00:00:00Z"]),
        ];
        for (case, line, after, expected) in cases {
            let schedule = Schedule::in_time_zone(line, Tz::Europe__Berlin).unwrap();
            assert_eq!(times(&schedule, after, expected.len()), expected, "{case}");
        }
    }

    #[test]
    fn the_time_asked_about_does_not_count() {
        let schedule: Schedule = "0 2 * * *".parse().unwrap();
        for (after, expected) in [
            ("2026-03-01T01:59:59.999Z", "2026-03-01T02:00:00Z"),
            ("2026-03-01T02:00:00Z", "2026-03-02T02:00:00Z"),
            ("2026-03-01T02:00:00.001Z", "2026-03-02T02:00:00Z"),
        ] {
            assert_eq!(schedule.next_after(utc(after)), Some(utc(expected)), "{after}");
        }
    }

    #[test]
    fn years_gone_by_leave_no_more_times() {
        let schedule: Schedule = "0 0 0 1 1 * 2020".parse().unwrap();
        assert_eq!(schedule.next_after(utc("2026-03-01T00:00:00Z")), None);
    }

    #[test]
    fn a_configuration_names_a_line_or_a_line_and_a_time_zone() {
        #[derive(Debug, Deserialize)]
        struct Config {
            schedule: Schedule,
        }
        let read = |text| toml::from_str::<Config>(text).map(|config| config.schedule.to_string());
        let named = "schedule = { cron = '0 2 * * *', time_zone = 'Europe/Berlin' }";
        assert_eq!(read("schedule = '0 2 * * *'").unwrap(), "0 2 * * * UTC");
        assert_eq!(read(named).unwrap(), "0 2 * * * Europe/Berlin");
        for (text, expected) in [
            (
                "schedule = { cron = '0 2 * * *', time_zone = 'Berlin' }",
                "time zone `Berlin` is unknown, expected a name like Europe/Berlin",
            ),
            (
                "schedule = { cron = '0 2 * * *', zone = 'UTC' }",
                "unknown field `zone`, expected `cron` or `time_zone`",
            ),
            ("schedule = { time_zone = 'UTC' }", "missing field `cron`"),
            (
                "schedule = 7",
                "invalid type: integer `7`, expected a crontab line, \
                 or a table with `cron` and `time_zone`",
            ),
            ("schedule = '61 2 * * *'", "minute `61`: `61` is not between 0 and 59"),
        ] {
            assert_eq!(toml::from_str::<Config>(text).unwrap_err().message(), expected);
        }
    }
}
