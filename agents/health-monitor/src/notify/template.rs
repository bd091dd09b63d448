//! What a webhook is sent; pure.

use std::fmt::Write as _;

use super::alerts::Severity;
use super::ledger::{Event, Notice};
use crate::judge::words::duration;

/// What Slack, Mattermost and what is compatible with them take.
pub const DEFAULT_BODY: &str = r#"{"text": "{text}"}"#;

/// So many notices are listed in a message; of the others, how many there are.
const LISTED_MAX: usize = 10;

/// What may stand in braces.
const PLACEHOLDERS: [&str; 13] = [
    "cluster",
    "event",
    "status",
    "component",
    "kind",
    "group",
    "node",
    "check",
    "reason",
    "next",
    "since",
    "count",
    "text",
];

/// JSON with placeholders.
///
/// | Placeholder | Is |
/// |---|---|
/// | `{text}` | all of it in words, several notices one below the other |
/// | `{cluster}` | the name of the cluster |
/// | `{event}` | `began`, `changed`, `flapping`, `ended`, or `unwatched` |
/// | `{status}` | `critical`, `warning`, `ok` where it ended, or `unknown` where it is not watched any more |
/// | `{component}` `{kind}` `{group}` `{node}` | of what: `postgres worker-1 of group 1`, and its parts |
/// | `{check}` | the check |
/// | `{reason}` `{next}` | why, and what to do |
/// | `{since}` | when it began, as in RFC 3339 |
/// | `{count}` | how many notices the message has |
///
/// With `{text}` everything that there is to tell is one message, and the others are those of its first
/// notice, the worst; without, each notice is a message of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Value(&'static str),
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    ///
    /// There is a word in braces that is no placeholder, or what comes of it is no JSON.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let word = after.split_once('}').map(|(word, _)| word);
            let word =
                word.filter(|it| !it.is_empty() && it.bytes().all(|it| it.is_ascii_lowercase()));
            parts.push(Part::Text(before.to_owned()));
            let Some(word) = word else {
                parts.push(Part::Text("{".to_owned()));
                rest = after;
                continue;
            };
            let Some(known) = PLACEHOLDERS.into_iter().find(|it| *it == word) else {
                let all = PLACEHOLDERS.map(|it| format!("{{{it}}}")).join(", ");
                return Err(format!("`{{{word}}}` is no placeholder; there are {all}"));
            };
            parts.push(Part::Value(known));
            rest = after.get(word.len() + 1..).unwrap_or_default();
        }
        parts.push(Part::Text(rest.to_owned()));
        let template = Self(parts);
        let sample = template.fill(|_| "1".to_owned());
        match serde_json::from_str::<serde_json::Value>(&sample) {
            Ok(_) => Ok(template),
            Err(error) => Err(format!("is no JSON: {error}")),
        }
    }

    fn fill(&self, value: impl Fn(&str) -> String) -> String {
        let mut filled = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => filled.push_str(text),
                // A JSON string without its quotes: those stand in the template.
                Part::Value(name) => {
                    let quoted = serde_json::Value::String(value(name)).to_string();
                    let bare = quoted.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
                    filled.push_str(bare.unwrap_or_default());
                }
            }
        }
        filled
    }

    /// How many of the notices that are due one message tells.
    pub fn takes(&self, due: usize) -> usize {
        if self.0.contains(&Part::Value("text")) { due } else { due.min(1) }
    }

    /// The message that tells these; there is at least one.
    pub fn render(&self, cluster: &str, notices: &[Notice]) -> String {
        let Some(first) = notices.first() else { return String::new() };
        self.fill(|name| match name {
            "cluster" => cluster.to_owned(),
            "event" => first.event.name().to_owned(),
            "status" => status(first).to_owned(),
            "component" => first.subject.component.to_string(),
            "kind" => first.subject.component.kind.to_string(),
            "group" => first.subject.component.group.map(|it| it.to_string()).unwrap_or_default(),
            "node" => first.subject.component.name.clone(),
            "check" => first.subject.check.clone(),
            "reason" => reason(first),
            "next" => next(first).to_owned(),
            "since" => first.problem.since.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
            "count" => notices.len().to_string(),
            _ => text(cluster, notices),
        })
    }
}

fn status(notice: &Notice) -> &'static str {
    match notice.event {
        Event::Ended { .. } => "ok",
        Event::Unwatched { .. } => "unknown",
        _ => notice.problem.severity.name(),
    }
}

fn reason(notice: &Notice) -> String {
    match notice.event {
        Event::Ended { after } => format!("well again after {}", duration(after)),
        Event::Unwatched { after } => {
            format!("not watched any more; it was wrong for {}", duration(after))
        }
        _ => notice.problem.reason.clone(),
    }
}

fn next(notice: &Notice) -> &str {
    match notice.event {
        _ if notice.event.is_last() => "",
        _ => &notice.problem.next,
    }
}

fn text(cluster: &str, notices: &[Notice]) -> String {
    if let [one] = notices {
        return format!("[{cluster}] {}", line(one));
    }
    let is_over = |it: &&Notice| matches!(it.event, Event::Ended { .. });
    let over = notices.iter().filter(is_over).count();
    let is_unwatched = |it: &&Notice| matches!(it.event, Event::Unwatched { .. });
    let unwatched = notices.iter().filter(is_unwatched).count();
    let is_critical =
        |it: &&Notice| !it.event.is_last() && it.problem.severity == Severity::Critical;
    let critical = notices.iter().filter(is_critical).count();
    let warning = notices.len() - over - unwatched - critical;
    let counts = [
        (critical, "critical"),
        (warning, "warning"),
        (unwatched, "not watched any more"),
        (over, "well again"),
    ];
    let counts: Vec<_> = counts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    let mut text = format!("[{cluster}] {}", counts.join(", "));
    for notice in notices.iter().take(LISTED_MAX) {
        write!(text, "\n- {}", line(notice)).ok();
    }
    let more = notices.len().saturating_sub(LISTED_MAX);
    if more > 0 {
        write!(text, "\n… and {more} more").ok();
    }
    text
}

fn line(notice: &Notice) -> String {
    let Notice { event, subject, problem } = notice;
    let (component, check) = (&subject.component, &subject.check);
    let mut severity = problem.severity.name().to_uppercase();
    if problem.is_flapping {
        severity += " at its worst";
    }
    let what = match event {
        Event::Began => severity,
        Event::Changed { before } => format!("{severity} (was {})", before.name()),
        Event::Flapping => format!("{severity}, keeps changing"),
        Event::Ended { after } => {
            return format!("OK: {component}: {check} is well again after {}", duration(*after));
        }
        Event::Unwatched { after } => {
            let after = duration(*after);
            return format!("{component} is not watched any more: {check} was wrong for {after}");
        }
    };
    let since = problem.since.format("%H:%M:%S UTC");
    let mut line = format!("{what}: {component}: {} ({check}, since {since})", problem.reason);
    if !problem.next.is_empty() {
        write!(line, "\n  Next: {}", problem.next).ok();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::alerts::Problem;
    use super::super::alerts::tests::{problem_at, subject};
    use super::*;

    fn notice(event: Event, name: &str) -> Notice {
        let is_flapping = event == Event::Flapping;
        let problem = Problem { is_flapping, ..problem_at(Severity::Critical, 5) };
        Notice { event, subject: subject(name, "reachable"), problem }
    }

    fn sent(template: &str, notices: &[Notice]) -> serde_json::Value {
        let body = Template::parse(template).unwrap().render("demo", notices);
        serde_json::from_str(&body).unwrap()
    }

    #[test]
    fn one_notice_says_all_that_one_needs() {
        let before = Severity::Warning;
        for (event, expected) in [
            (
                Event::Unwatched { after: Duration::from_mins(5) },
                "[demo] postgres a of group 1 is not watched any more: reachable was wrong for 5 min",
            ),
            (
                Event::Began,
                "[demo] CRITICAL: postgres a of group 1: no connection: refused \
                 (reachable, since 08:00:05 UTC)\n  Next: look at it",
            ),
            (
                Event::Changed { before },
                "[demo] CRITICAL (was warning): postgres a of group 1: no connection: refused \
                 (reachable, since 08:00:05 UTC)\n  Next: look at it",
            ),
            (
                Event::Flapping,
                "[demo] CRITICAL at its worst, keeps changing: postgres a of group 1: no connection: refused \
                 (reachable, since 08:00:05 UTC)\n  Next: look at it",
            ),
            (
                Event::Ended { after: Duration::from_secs(250) },
                "[demo] OK: postgres a of group 1: reachable is well again after 4 min 10 s",
            ),
        ] {
            assert_eq!(sent(DEFAULT_BODY, &[notice(event, "a")])["text"], expected);
        }
    }

    #[test]
    fn many_are_one_message_that_lists_some() {
        let mut notices: Vec<_> = (0..12).map(|i| notice(Event::Began, &format!("n{i}"))).collect();
        notices.push(notice(Event::Ended { after: Duration::from_secs(10) }, "z"));
        let text = sent(DEFAULT_BODY, &notices)["text"].as_str().unwrap().to_owned();
        assert!(text.starts_with("[demo] 12 critical, 1 well again\n- CRITICAL: postgres n0 of"));
        assert!(text.ends_with("\n… and 3 more"), "{text}");
        assert_eq!(text.matches("CRITICAL").count(), LISTED_MAX);
    }

    #[test]
    fn values_cannot_break_out_of_the_template() {
        let reason = "a \"quoted\"\nline with \\ and {next}".to_owned();
        let problem = Problem { reason: reason.clone(), ..problem_at(Severity::Warning, 5) };
        let notice = Notice { problem, ..notice(Event::Began, "a") };
        let template = r#"{"e": "{event}", "r": ["{reason}"], "n": {count}, "s": "{status} {since}",
            "w": "{kind}/{group}/{node}/{check} of {cluster}: {component}"}"#;
        assert_eq!(
            sent(template, &[notice]),
            serde_json::json!({
                "e": "began", "r": [reason], "n": 1, "s": "warning 2027-01-15T08:00:05Z",
                "w": "postgres/1/a/reachable of demo: postgres a of group 1",
            })
        );
    }

    #[test]
    fn a_template_takes_all_or_one() {
        for (template, due, expected) in
            [(DEFAULT_BODY, 7, 7), (r#"{"a": "{reason}"}"#, 7, 1), (r#"{"a": "{reason}"}"#, 0, 0)]
        {
            assert_eq!(Template::parse(template).unwrap().takes(due), expected, "{template}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for (template, expected) in [
            ("{text}", None),
            (r#"{"a": {"b": {}}, "c": "{text}"}"#, None),
            ("{\"text\": {text}", Some("is no JSON")),
            (r#"{"text": "{foo}"}"#, Some("`{foo}` is no placeholder")),
            ("", Some("is no JSON")),
        ] {
            let parsed = Template::parse(template);
            match expected {
                None => assert!(parsed.is_ok(), "{template}: {parsed:?}"),
                Some(problem) => {
                    assert!(
                        parsed.clone().unwrap_err().contains(problem),
                        "{template}: {parsed:?}"
                    );
                }
            }
        }
    }
}
