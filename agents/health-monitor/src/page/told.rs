//! Who is told, where that is not as usual: a silence that was forgotten is how an outage goes unnoticed.

use chrono::{DateTime, Utc};

use super::view::since;
use crate::judge::words::duration;
use crate::notify::board::Telling;
use crate::notify::delivery::Delivery;
use crate::silence::Silence;

/// A line about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// It is not as it was meant.
    pub(super) is_wrong: bool,
    pub(super) words: String,
}

/// What is wrong first, then what is silenced.
pub(super) fn told(telling: &Telling, now: DateTime<Utc>) -> Vec<Told> {
    let Telling { trouble, failing, silences } = telling;
    let wrong = |words| Told { is_wrong: true, words };
    let mut lines: Vec<Told> = trouble.iter().cloned().map(wrong).collect();
    lines.extend(failing.iter().map(|it| wrong(fails(it, now))));
    lines.extend(silences.iter().map(|(silence, covers)| silenced(silence, *covers, now)));
    lines
}

fn fails(it: &Delivery, now: DateTime<Utc>) -> String {
    let Delivery { kind, name, failing_since, error, .. } = it;
    let since = since(failing_since.unwrap_or(now), now);
    let why = error.as_deref().unwrap_or_default();
    format!("{} {name} has taken nothing since {since}: {why}", kind.name())
}

fn silenced(silence: &Silence, covers: usize, now: DateTime<Utc>) -> Told {
    let Silence { id, until, components, comment, by, .. } = silence;
    let of = if components.is_empty() { "anything".to_owned() } else { components.join(", ") };
    let left = duration((*until - now).to_std().unwrap_or_default());
    let at = until.format("%Y-%m-%d %H:%M:%S");
    let by = by.as_ref().map(|it| format!(" by {it}")).unwrap_or_default();
    let words =
        format!("nobody is told of {of} until {at} ({left} from now): {comment} ({id}{by})");
    if covers == 0 {
        let words = format!("{words}; nothing that is watched is called so: it silences nothing");
        return Told { is_wrong: true, words };
    }
    Told { is_wrong: false, words }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::notify::delivery::Kind;

    #[test]
    fn what_nobody_is_told_of_is_shown() {
        let now: DateTime<Utc> = "2026-03-02T13:00:00Z".parse().unwrap();
        assert_eq!(told(&Telling::default(), now), []);
        let mut chat = Delivery::new(Kind::Webhook, "chat");
        chat.take(Err("it says 500".to_owned()), now - Duration::from_mins(5));
        let silence = |component: &[&str]| {
            let components = component.iter().map(ToString::to_string).collect();
            let made =
                Silence::new(now - Duration::from_mins(30), Duration::from_hours(1), components);
            Silence { id: "7f".to_owned(), ..made.with("disks".to_owned(), Some("ada".to_owned())) }
        };
        let telling = Telling {
            trouble: Some("etcd does not answer".to_owned()),
            failing: vec![chat],
            silences: vec![(silence(&["p2"]), 2), (silence(&["p33"]), 0), (silence(&[]), 9)],
        };
        let of = |what: &str| {
            let until = "until 2026-03-02 13:30:00 (30 min from now): disks (7f by ada)";
            format!("nobody is told of {what} {until}")
        };
        let none = "; nothing that is watched is called so: it silences nothing";
        let expected = [
            (true, "etcd does not answer".to_owned()),
            (
                true,
                "webhook chat has taken nothing since 12:55:00 (5 min ago): it says 500".to_owned(),
            ),
            (false, of("p2")),
            (true, of("p33") + none),
            (false, of("anything")),
        ];
        let expected = expected.map(|(is_wrong, words)| Told { is_wrong, words });
        assert_eq!(told(&telling, now), expected);
    }
}
