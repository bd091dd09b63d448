//! Maintenance silences: for how long nobody is told of what.
//!
//! A silence says nothing of how things are: what is silenced is shown, counted and logged as ever.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::component::Component;

/// Longest silence. One that must be longer is a component that should not be watched.
pub const SILENCE_MAX: Duration = Duration::from_hours(30 * 24);

/// Nobody is told of some components for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    /// Its name, to end it early by.
    pub id: String,
    /// When it was made.
    pub since: DateTime<Utc>,
    /// When it ends.
    pub until: DateTime<Utc>,
    /// Of what: kinds, names, or `group N` for all that belongs to a group. Empty means everything.
    pub components: Vec<String>,
    /// What is done meanwhile.
    pub comment: String,
    /// Who made it.
    pub by: Option<String>,
}

impl Silence {
    /// A silence from `now` on.
    pub fn new(now: DateTime<Utc>, length: Duration, components: Vec<String>) -> Self {
        let random = RandomState::new().hash_one(now.timestamp_micros());
        let id = format!("{:08x}", random & u64::from(u32::MAX));
        Self { id, since: now, until: now + length, components, comment: String::new(), by: None }
    }

    /// With who made it and what for.
    pub fn with(self, comment: String, by: Option<String>) -> Self {
        Self { comment, by, ..self }
    }

    /// Whether it lasts.
    pub fn is_active(&self, now: DateTime<Utc>) -> bool {
        now < self.until
    }

    /// Whether a component is silenced, as long as it lasts.
    pub fn covers(&self, component: &Component) -> bool {
        let Component { kind, group, name } = component;
        self.components.is_empty()
            || self.components.iter().any(|it| {
                it == kind.name()
                    || (!name.is_empty() && it == name)
                    || group.is_some_and(|group| *it == format!("group {group}"))
            })
    }
}

/// Checks what was given on the command line, as far as that can be told: names of servers cannot.
///
/// # Errors
///
/// It can match nothing.
pub fn check_component(given: &str) -> Result<String, String> {
    let is_group = |it: &str| it.parse::<u32>().is_ok_and(|number| number.to_string() == it);
    match given.strip_prefix("group ") {
        Some(number) if !is_group(number) => Err(format!("`{number}` is no number of a group")),
        None if given.is_empty() => Err("must be a kind, a name, or `group N`".to_owned()),
        _ => Ok(given.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::component::Kind;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap()
    }

    #[test]
    fn a_silence_covers_kinds_names_and_groups() {
        let server = Component::of_group(Kind::Postgres, 1, "worker-1");
        let proxy = Component::new(Kind::Haproxy, "haproxy-1");
        for (components, component, expected) in [
            (&[][..], &server, true),
            (&["postgres"], &server, true),
            (&["postgres"], &proxy, false),
            (&["worker-1"], &server, true),
            (&["worker-2", "haproxy-1"], &proxy, true),
            (&["worker-2"], &server, false),
            (&["group 1"], &server, true),
            (&["group 1"], &Component::group(1), true),
            (&["group 1"], &Component::group(11), false),
            (&["group 1"], &proxy, false),
            (&["group"], &Component::group(1), true),
            (&["group"], &server, false),
            (&[""], &Component::group(1), false),
        ] {
            let components = components.iter().map(ToString::to_string).collect();
            let silence = Silence::new(now(), Duration::from_hours(2), components);
            assert_eq!(silence.covers(component), expected, "{silence:?} {component}");
        }
    }

    #[test]
    fn a_silence_ends() {
        let silence = Silence::new(now(), Duration::from_hours(2), vec![]);
        assert!(silence.is_active(now()));
        assert!(silence.is_active(now() + Duration::from_secs(7199)));
        assert!(!silence.is_active(now() + Duration::from_hours(2)));
        assert_ne!(silence.id, Silence::new(now(), Duration::ZERO, vec![]).id);
    }

    #[test]
    fn a_group_is_given_by_its_number() {
        for (given, is_fine) in [
            ("postgres", true),
            ("worker-1", true),
            ("group", true),
            ("group 0", true),
            ("group x", false),
            ("group 01", false),
            ("", false),
        ] {
            assert_eq!(check_component(given).is_ok(), is_fine, "{given}");
        }
    }
}
