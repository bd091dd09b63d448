//! Whether as many standbys are connected as commits wait for, and whether these go on.

use std::iter::Peekable;
use std::str::Chars;
use std::time::Duration;

use thiserror::Error;

use crate::observation::{Details, Sender};
use crate::senders::{Alive, alive};
use crate::view::{Quorum, SyncCount};

/// A commit that has waited for so long hangs: no standby that is well needs it.
const HANGS_AFTER: Duration = Duration::from_secs(3);

/// What `synchronous_standby_names` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncStandbys {
    /// Which of them count.
    pub method: Method,
    /// How many must have a commit.
    pub count: u32,
    /// The names; `*` is every name.
    pub names: Vec<String>,
}

/// Which of the standbys a commit waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The first in the list that are connected.
    First,
    /// Any in the list.
    Any,
}

/// Why a text is no `synchronous_standby_names`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SyncStandbysError {
    /// PostgreSQL would say `syntax error`.
    #[error("synchronous_standby_names `{0}` does not read")]
    Syntax(String),
    /// Commits cannot wait for so many.
    #[error("synchronous_standby_names `{0}` asks for an impossible number of standbys")]
    Count(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Any,
    First,
    Name(String),
    Number(String),
    Symbol(char),
}

/// Reads `synchronous_standby_names`; `None` if it is empty, so that commits wait for nobody.
///
/// Source: `syncrep_scanner.l`, `syncrep_gram.y` and `check_synchronous_standby_names` of
/// PostgreSQL 17. So `ANY` and `FIRST` are no names unless quoted, and a quoted `*` is every name.
///
/// # Errors
///
/// Fails where PostgreSQL refuses the setting.
pub fn parse(text: &str) -> Result<Option<SyncStandbys>, SyncStandbysError> {
    if text.is_empty() {
        return Ok(None);
    }
    let syntax = || SyncStandbysError::Syntax(text.to_owned());
    let tokens = tokens(text).ok_or_else(syntax)?;
    let (method, count, list) = match tokens.as_slice() {
        [Token::Any, Token::Number(count), list @ ..] => (Method::Any, &**count, bracketed(list)),
        [Token::First, Token::Number(count), list @ ..] => {
            (Method::First, &**count, bracketed(list))
        }
        [Token::Number(count), list @ ..] if bracketed(list).is_some() => {
            (Method::First, &**count, bracketed(list))
        }
        list => (Method::First, "1", Some(list)),
    };
    let names = list.and_then(names).ok_or_else(syntax)?;
    let count = count.parse().ok().filter(|count| *count > 0 && i32::try_from(*count).is_ok());
    let count = count.ok_or_else(|| SyncStandbysError::Count(text.to_owned()))?;
    Ok(Some(SyncStandbys { method, count, names }))
}

fn bracketed(tokens: &[Token]) -> Option<&[Token]> {
    match tokens {
        [Token::Symbol('('), list @ .., Token::Symbol(')')] => Some(list),
        _ => None,
    }
}

fn names(list: &[Token]) -> Option<Vec<String>> {
    let name = |tokens: &[Token]| match tokens {
        [Token::Name(name) | Token::Number(name)] => Some(name.clone()),
        _ => None,
    };
    list.split(|token| *token == Token::Symbol(',')).map(name).collect()
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut chars = text.chars().peekable();
    let mut tokens = Vec::new();
    while let Some(&next) = chars.peek() {
        let token = match next {
            ' ' | '\t' | '\n' | '\r' | '\x0C' | '\x0B' => {
                chars.next();
                continue;
            }
            ',' | '(' | ')' => {
                chars.next();
                Token::Symbol(next)
            }
            '*' => {
                chars.next();
                Token::Name("*".to_owned())
            }
            '"' => Token::Name(quoted(&mut chars)?),
            '0'..='9' => Token::Number(run(&mut chars, |it| it.is_ascii_digit())),
            _ if is_letter(next) => {
                let name = run(&mut chars, |it| is_letter(it) || it.is_ascii_digit() || it == '$');
                match name.to_ascii_lowercase().as_str() {
                    "any" => Token::Any,
                    "first" => Token::First,
                    _ => Token::Name(name),
                }
            }
            _ => return None,
        };
        tokens.push(token);
    }
    Some(tokens)
}

fn is_letter(it: char) -> bool {
    it.is_ascii_alphabetic() || it == '_' || !it.is_ascii()
}

fn run(chars: &mut Peekable<Chars<'_>>, belongs: impl Fn(char) -> bool) -> String {
    let mut text = String::new();
    while let Some(next) = chars.next_if(|next| belongs(*next)) {
        text.push(next);
    }
    text
}

fn quoted(chars: &mut Peekable<Chars<'_>>) -> Option<String> {
    chars.next();
    let mut name = String::new();
    loop {
        match chars.next()? {
            '"' if chars.next_if_eq(&'"').is_none() => return Some(name),
            it => name.push(it),
        }
    }
}

/// Decides from what a primary said whether commits that wait for standbys go on.
///
/// Which walsenders match a name, the server knows best: it gives them a `sync_priority`. Those
/// that catch up do not count, nor those that have not yet told what is on their disk. Source:
/// `SyncRepGetCandidateStandbys` in `syncrep.c`. The server does count a dead connection beside the
/// one that a standby made anew, but no commit is confirmed on it.
///
/// One that is connected need not confirm: it may hang, or not replay what `remote_apply` waits
/// for. So a session that is seen to wait decides, and `sync_wait` is for how long one surely has.
pub fn quorum(details: &Details, sync_wait: Option<Duration>) -> Quorum {
    let (Some(names), Some(senders)) = (&details.synchronous_standby_names, &details.senders)
    else {
        return Quorum::Unknown;
    };
    let hangs = sync_wait >= Some(HANGS_AFTER);
    if !hangs && matches!(details.synchronous_commit.as_deref(), Some("off" | "local")) {
        return Quorum::NotWanted;
    }
    let counts = |it: &&Sender| {
        let streams = matches!(it.state.as_str(), "streaming" | "stopping");
        it.sync_priority > 0 && streams && it.flush_lsn.is_some()
    };
    match parse(names) {
        Err(_) => Quorum::Unknown,
        Ok(None) => Quorum::NotWanted,
        Ok(Some(SyncStandbys { count: wanted, .. })) => {
            let Alive { surely, perhaps } = alive(senders);
            let count = |senders: &[&Sender]| {
                let count = senders.iter().copied().filter(counts).count();
                u32::try_from(count).unwrap_or(u32::MAX)
            };
            let present = count(&surely);
            let (all, count) = (present + count(&perhaps), SyncCount { wanted, present });
            match () {
                () if hangs || all < wanted => Quorum::Missed(count),
                () if wanted <= present => Quorum::Met(count),
                () => Quorum::Unknown,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn the_setting_reads_as_postgresql_reads_it() {
        for (text, method, count, names) in [
            ("s1", Method::First, 1, &["s1"][..]),
            ("s1, s2", Method::First, 1, &["s1", "s2"]),
            ("*", Method::First, 1, &["*"]),
            ("2 (s1,s2,s3)", Method::First, 2, &["s1", "s2", "s3"]),
            ("FIRST 2 (s1, s2)", Method::First, 2, &["s1", "s2"]),
            ("any 1 (s1, s2)", Method::Any, 1, &["s1", "s2"]),
            ("\tANY\n2(*)", Method::Any, 2, &["*"]),
            (
                "ANY 1 (\"node-1\",\"any\", \"a \"\"b\"\"\")",
                Method::Any,
                1,
                &["node-1", "any", "a \"b\""],
            ),
            ("\"*\"", Method::First, 1, &["*"]),
            ("anyone, first_one, _a$1", Method::First, 1, &["anyone", "first_one", "_a$1"]),
            ("1, 2", Method::First, 1, &["1", "2"]),
            ("2 (3, 4)", Method::First, 2, &["3", "4"]),
            ("knoten_süd", Method::First, 1, &["knoten_süd"]),
        ] {
            let names = names.iter().map(ToString::to_string).collect();
            assert_eq!(parse(text), Ok(Some(SyncStandbys { method, count, names })), "{text}");
        }
        assert_eq!(parse(""), Ok(None));
    }

    #[test]
    fn what_postgresql_refuses_is_refused() {
        for text in [
            " ",
            "any",
            "first",
            "s1,",
            ",s1",
            "s1 s2",
            "node-1",
            "ANY (s1)",
            "ANY 1 s1",
            "ANY 1 ()",
            "ANY 1 (s1",
            "ANY 1 (s1))",
            "1 (s1) s2",
            "\"s1",
            "s1;",
            "FIRST 1 (any)",
            "-1 (s1)",
        ] {
            assert_eq!(parse(text), Err(SyncStandbysError::Syntax(text.to_owned())), "{text}");
        }
        for text in ["0 (s1)", "ANY 0 (s1)", "FIRST 99999999999 (s1)"] {
            let error = parse(text).unwrap_err();
            assert_eq!(error, SyncStandbysError::Count(text.to_owned()), "{text}");
        }
    }

    fn sender(state: &str, sync_priority: u32) -> Sender {
        Sender {
            application_name: format!("s{sync_priority}"),
            client_address: None,
            state: state.to_owned(),
            logical: false,
            flush_lsn: Some(1.into()),
            replay_lsn: None,
            write_lag: None,
            flush_lag: None,
            replay_lag: None,
            reply_age: None,
            sync_priority,
            sync_state: String::new(),
            pid: 7,
        }
    }

    /// Two of one name and address, one of which replied so many seconds before the other.
    fn twins(apart: i64) -> Vec<Sender> {
        let replied = |seconds| Sender {
            reply_age: Some(TimeDelta::seconds(seconds)),
            ..sender("streaming", 1)
        };
        vec![replied(1 + apart), replied(1)]
    }

    #[test]
    fn commits_go_on_if_enough_standbys_stream() {
        let two = || vec![sender("streaming", 1), sender("streaming", 2)];
        let met = |wanted, present| Quorum::Met(SyncCount { wanted, present });
        let missed = |wanted, present| Quorum::Missed(SyncCount { wanted, present });
        for (name, names, senders, expected) in [
            ("nobody is waited for", Some(""), Some(two()), Quorum::NotWanted),
            ("one of two", Some("a, b"), Some(two()), met(1, 2)),
            ("two of two", Some("ANY 2 (a, b)"), Some(two()), met(2, 2)),
            ("three of two", Some("FIRST 3 (a, b, c)"), Some(two()), missed(3, 2)),
            ("nobody is there", Some("*"), Some(vec![]), missed(1, 0)),
            ("not in the list", Some("x"), Some(vec![sender("streaming", 0)]), missed(1, 0)),
            ("it catches up", Some("*"), Some(vec![sender("catchup", 1)]), missed(1, 0)),
            ("a backup", Some("*"), Some(vec![sender("backup", 1)]), missed(1, 0)),
            ("the primary stops", Some("*"), Some(vec![sender("stopping", 1)]), met(1, 1)),
            (
                "it has not told what it has",
                Some("*"),
                Some(vec![Sender { flush_lsn: None, ..sender("streaming", 1) }]),
                missed(1, 0),
            ),
            ("it connected anew", Some("ANY 2 (s1, s2)"), Some(twins(60)), missed(2, 1)),
            ("two of one name, or one anew", Some("ANY 2 (*)"), Some(twins(9)), Quorum::Unknown),
            ("one of two of one name", Some("*"), Some(twins(9)), met(1, 1)),
            ("three of two of one name", Some("ANY 3 (*)"), Some(twins(9)), missed(3, 1)),
            ("not read", Some("a b"), Some(two()), Quorum::Unknown),
            ("not told", None, Some(two()), Quorum::Unknown),
            ("senders not told", Some("*"), None, Quorum::Unknown),
        ] {
            let synchronous_standby_names = names.map(str::to_owned);
            let details = Details { synchronous_standby_names, senders, ..Details::default() };
            assert_eq!(quorum(&details, None), expected, "{name}");
        }
    }

    #[test]
    fn commits_wait_only_if_they_are_told_to() {
        for (synchronous_commit, expected) in [
            (Some("off"), Quorum::NotWanted),
            (Some("local"), Quorum::NotWanted),
            (Some("remote_write"), Quorum::Missed(SyncCount { wanted: 1, present: 0 })),
            (Some("on"), Quorum::Missed(SyncCount { wanted: 1, present: 0 })),
            (Some("remote_apply"), Quorum::Missed(SyncCount { wanted: 1, present: 0 })),
            (None, Quorum::Missed(SyncCount { wanted: 1, present: 0 })),
        ] {
            let details = Details {
                synchronous_standby_names: Some("*".to_owned()),
                synchronous_commit: synchronous_commit.map(str::to_owned),
                senders: Some(Vec::new()),
                ..Details::default()
            };
            assert_eq!(quorum(&details, None), expected, "{synchronous_commit:?}");
        }
    }

    #[test]
    fn a_session_that_is_seen_to_wait_hangs() {
        let count = SyncCount { wanted: 1, present: 1 };
        for (waited, synchronous_commit, expected) in [
            (None, "on", Quorum::Met(count)),
            (Some(0), "on", Quorum::Met(count)),
            (Some(12), "on", Quorum::Missed(count)),
            (Some(12), "off", Quorum::Missed(count)),
            (Some(0), "off", Quorum::NotWanted),
        ] {
            let details = Details {
                synchronous_standby_names: Some("*".to_owned()),
                synchronous_commit: Some(synchronous_commit.to_owned()),
                senders: Some(vec![sender("streaming", 1)]),
                ..Details::default()
            };
            let found = quorum(&details, waited.map(Duration::from_secs));
            assert_eq!(found, expected, "{waited:?} {synchronous_commit}");
        }
    }
}
