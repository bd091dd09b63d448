//! Configuration files: read, parse, check; every problem at once, each with its key.
//!
//! serde stops at the first key it does not like. To show the others as well, that key is taken
//! out of the parsed file, or something is put in for one that is missing, and it is tried again,
//! until what is there is accepted or nothing is left to try.

use std::borrow::Cow;
use std::fmt::{self, Display};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

/// Rules between the values of a configuration, beyond what its types ensure.
pub trait Check {
    /// Adds every broken rule to `problems`, under the key to change.
    fn check(&self, problems: &mut Problems);
}

/// The problems found so far.
#[derive(Debug, Default)]
pub struct Problems {
    prefix: String,
    found: Vec<Problem>,
}

/// One thing to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, from the top of the file: `repository.s3.bucket`, `nodes[0].port`.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("configuration {} is not valid TOML at line {line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser said.
        problem: String,
    },
    /// Keys or values are wrong.
    #[error("configuration {} breaks these rules:{}", path.display(), Lines(problems))]
    Rules {
        /// The file.
        path: PathBuf,
        /// What to change, in the order it was found.
        problems: Vec<Problem>,
    },
}

/// Reads, parses and checks the configuration file at `path`.
///
/// # Errors
///
/// Fails when the file cannot be read, is no TOML, or breaks a rule; the message then has a
/// line for each problem that could be found.
pub fn load<T: DeserializeOwned + Check>(path: &Path) -> Result<T, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Parses and checks `text`, which was read from `path`.
fn parse<T: DeserializeOwned + Check>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: line_of(text, error.span()),
        problem: error.message().to_owned(),
    })?;
    let mut trial = Trial {
        text,
        table,
        stand_ins: StandIns { after: text.len() + 1, tried: Vec::new() },
        removed: Vec::new(),
        only_unknown_keys: true,
        problems: Problems::default(),
    };
    let config: Option<T> = loop {
        match T::deserialize(Deserializer::from(trial.table.clone())) {
            Ok(config) => break Some(config),
            Err(error) if trial.mend(&error) => {}
            Err(_) => break None,
        }
    };
    let mut problems = trial.problems;

    // Without the values that were wrong, rules could seem broken that are not.
    if let Some(config) = &config
        && trial.only_unknown_keys
    {
        config.check(&mut problems);
    }
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(ConfigError::Rules { path: path.to_owned(), problems: problems.found }),
    }
}

/// A file that is tried again and again, without what was wrong with it.
struct Trial<'t> {
    text: &'t str,
    table: Spanned<DeTable<'t>>,
    stand_ins: StandIns,
    /// The paths of the keys that were taken out.
    removed: Vec<String>,
    only_unknown_keys: bool,
    problems: Problems,
}

impl Trial<'_> {
    /// Notes what is wrong and mends it; returns whether that could be done.
    fn mend(&mut self, error: &toml::de::Error) -> bool {
        let span = error.span().unwrap_or_default();
        let line = line_of(self.text, Some(span.clone()));
        let is_unknown = quoted_after(error.message(), "unknown field ").is_some();
        self.only_unknown_keys &= is_unknown;
        if let Some(field) = quoted_after(error.message(), "missing field ") {
            return self.put_in(&span, line, field);
        }
        if let Some(number) = self.stand_ins.number(&span) {
            return self.stand_ins.exchange(self.table.get_mut(), number);
        }
        let mut problem = error.message().to_owned();
        if is_unknown {
            let (_, expected) = error.message().split_once(", ").unwrap_or_default();
            problem = format!("unknown key, {expected}");
        }
        if problem == NO_WORD && self.put_in_no_word(&span) {
            return true;
        }
        if let Some((_, expected)) = problem.split_once("unknown variant `\0`, ") {
            problem = format!("must be a string, {expected}");
        }
        let found = remove(self.table.get_mut(), &span);
        let key = found.as_ref().map(|found| found.key.as_str()).unwrap_or_default();
        self.problems.add(key, format!("{problem} (line {line})"));
        let is_mended = found.is_some();
        self.removed.extend(found.map(|found| found.removed));
        is_mended
    }

    /// Puts a word that is none in for what stands at `span`: then the error names the words.
    fn put_in_no_word(&mut self, span: &Range<usize>) -> bool {
        let mut put = |value: &mut DeValue<'_>| *value = DeValue::String(Cow::Borrowed("\0"));
        change(self.table.get_mut(), span, &mut put).is_some()
    }

    /// Puts something in for a field that the table at `span` lacks.
    fn put_in(&mut self, span: &Range<usize>, line: usize, field: &str) -> bool {
        let is_news = self.stand_ins.number(span).is_none();
        let Some(mut key) = self.stand_ins.add(self.table.get_mut(), span, field) else {
            return false;
        };
        // The whole file has no line.
        let line = if key.is_empty() { String::new() } else { format!(" (line {line})") };
        push_key(&mut key, field);
        // A key missing because it was taken out here is none either.
        if is_news && !self.removed.contains(&key) {
            self.problems.add(&key, format!("must be set{line}"));
        }
        true
    }
}

/// What `toml` says of a value that should be one of a few words, and is no string.
const NO_WORD: &str = "wanted string or table";

/// What is put in for a missing key, one after the other until one is accepted: a value of each kind,
/// and strings that something is read from.
const STAND_INS: [&str; 7] = ["{}", "\"x\"", "1", "[]", "true", "\"1s\"", "\"127.0.0.1:1\""];

/// The values that stand in for missing keys. They stand after the end of the text, so that an error
/// tells which of them it is about.
struct StandIns {
    /// Where the first one stands.
    after: usize,
    /// For each, how many were tried.
    tried: Vec<usize>,
}

impl StandIns {
    /// Which of them stands at `span`.
    fn number(&self, span: &Range<usize>) -> Option<usize> {
        span.start.checked_sub(self.after).filter(|number| *number < self.tried.len())
    }

    fn value(&self, number: usize) -> Option<DeValue<'static>> {
        let value = STAND_INS.get(*self.tried.get(number)?)?;
        DeValue::parse(value).ok().map(Spanned::into_inner)
    }

    /// Puts one in for `field` of the table at `span`, which is the whole file if there is none
    /// there. Returns that table's key; `None` if the field is there.
    fn add(&mut self, table: &mut DeTable<'_>, span: &Range<usize>, field: &str) -> Option<String> {
        let number = self.tried.len();
        self.tried.push(0);
        let (value, start) = (self.value(number)?, self.after + number);
        let mut is_new = false;
        let mut put = |table: &mut DeTable<'_>| {
            let name = Spanned::new(start..start + 1, Cow::Owned(field.to_owned()));
            let value = Spanned::new(start..start + 1, value.clone());
            is_new = table.insert(name, value).is_none();
        };
        let key = change(table, span, &mut |value| {
            if let DeValue::Table(inner) = value {
                put(inner);
            }
        });
        let key = key.unwrap_or_else(|| {
            put(table);
            String::new()
        });
        is_new.then_some(key)
    }

    /// Exchanges one that was not accepted for the next; returns whether there is another.
    fn exchange(&mut self, table: &mut DeTable<'_>, number: usize) -> bool {
        self.tried[number] += 1;
        let Some(next) = self.value(number) else { return false };
        let start = self.after + number;
        change(table, &(start..start + 1), &mut |value| *value = next.clone()).is_some()
    }
}

/// Lets `act` change the value that stands at `span`, the innermost if there are several, and returns
/// its key.
fn change<'i>(
    table: &mut DeTable<'i>,
    span: &Range<usize>,
    act: &mut dyn FnMut(&mut DeValue<'i>),
) -> Option<String> {
    table.iter_mut().find_map(|(name, value)| change_value(name.get_ref(), value, span, act))
}

fn change_value<'i>(
    name: &str,
    value: &mut Spanned<DeValue<'i>>,
    span: &Range<usize>,
    act: &mut dyn FnMut(&mut DeValue<'i>),
) -> Option<String> {
    let is_it = value.span() == *span;
    let below = match value.get_mut() {
        DeValue::Table(inner) => change(inner, span, act).map(|below| format!("{name}.{below}")),
        DeValue::Array(elements) => elements.iter_mut().enumerate().find_map(|(index, element)| {
            change_value(&format!("{name}[{index}]"), element, span, act)
        }),
        _ => None,
    };
    if below.is_none() && is_it {
        act(value.get_mut());
        return Some(name.to_owned());
    }
    below
}

/// A key that was taken out.
struct Found {
    /// The path of what was looked for: `nodes[1]`.
    key: String,
    /// The path of what was taken out: `nodes`.
    removed: String,
}

impl Found {
    fn below(mut self, outer: &str) -> Self {
        for path in [&mut self.key, &mut self.removed] {
            *path = format!("{outer}.{path}");
        }
        self
    }
}

/// Takes the key whose name or value stands at `span` out of `table`.
///
/// A wrong element of an array takes the whole array with it, since the elements after it would
/// move.
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<Found> {
    let mut found = None;
    for (name, value) in table.iter_mut() {
        let removed = name.get_ref().to_string();
        if name.span() == *span {
            found = Some(Found { key: removed.clone(), removed });
            break;
        }
        let whole = value.span() == *span;
        match value.get_mut() {
            DeValue::Table(inner) => {
                if let Some(below) = remove(inner, span) {
                    return Some(below.below(&removed));
                }
            }
            // Before the array itself, which begins where its first element does.
            DeValue::Array(elements) => {
                for (index, element) in elements.iter_mut().enumerate() {
                    let key = format!("{removed}[{index}]");
                    if element.span() == *span {
                        found = Some(Found { key, removed: removed.clone() });
                        break;
                    }
                    if let DeValue::Table(inner) = element.get_mut()
                        && let Some(below) = remove(inner, span)
                    {
                        return Some(below.below(&key));
                    }
                }
            }
            _ => {}
        }
        if found.is_some() {
            break;
        }
        if whole {
            found = Some(Found { key: removed.clone(), removed });
            break;
        }
    }
    let found = found?;
    table.remove(found.removed.as_str());
    Some(found)
}

/// The name between the backticks that follow `start` in `message`.
fn quoted_after<'a>(message: &'a str, start: &str) -> Option<&'a str> {
    message.strip_prefix(start)?.strip_prefix('`')?.split_once('`').map(|(name, _)| name)
}

fn push_key(path: &mut String, key: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(key);
}

/// The line of `text`, from 1, on which `span` begins.
fn line_of(text: &str, span: Option<Range<usize>>) -> usize {
    let start = span.map_or(0, |span| span.start).min(text.len());
    let before = text.get(..start).unwrap_or_default();
    1 + before.matches('\n').count()
}

impl Problems {
    /// Adds a problem under `key`, which is relative to the table [`Problems::within`] is in.
    ///
    /// An empty `key` means that table as a whole.
    pub fn add(&mut self, key: &str, problem: impl Into<String>) {
        let mut path = self.prefix.clone();
        if !key.is_empty() {
            push_key(&mut path, key);
        }
        self.found.push(Problem { key: path, problem: problem.into() });
    }

    /// Lets `check` add problems with keys relative to the table `key`, for example
    /// `repository.s3` or `nodes[0]`.
    pub fn within(&mut self, key: &str, check: impl FnOnce(&mut Self)) {
        let outer_bytes = self.prefix.len();
        push_key(&mut self.prefix, key);
        check(self);
        self.prefix.truncate(outer_bytes);
    }

    /// Tells whether no rule is broken so far.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// What was found, in the order it was added.
    pub fn found(&self) -> &[Problem] {
        &self.found
    }
}

/// Prints each problem on a line of its own.
struct Lines<'a>(&'a [Problem]);

impl Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Problem { key, problem } in self.0 {
            match key.as_str() {
                "" => write!(f, "\n{problem}")?,
                key => write!(f, "\n{key}: {problem}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::time::Duration;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        cluster: String,
        #[serde(with = "humantime_serde")]
        grace: Duration,
        repository: Repository,
        #[serde(default)]
        nodes: Vec<Node>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Repository {
        s3: S3,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct S3 {
        bucket: String,
        parts: NonZeroUsize,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Node {
        name: String,
        port: u16,
    }

    impl Check for Config {
        fn check(&self, problems: &mut Problems) {
            if self.cluster.is_empty() {
                problems.add("cluster", "must not be empty");
            }
            if self.grace.is_zero() {
                problems.add("grace", "must be above zero");
            }
            let S3 { bucket, parts } = &self.repository.s3;
            problems.within("repository", |problems| {
                problems.within("s3", |problems| {
                    if bucket.is_empty() {
                        problems.add("bucket", "must not be empty");
                    }
                    if parts.get() > 10_000 {
                        problems.add("", "S3 takes at most 10000 parts");
                    }
                });
            });
            for (index, node) in self.nodes.iter().enumerate() {
                problems.within(&format!("nodes[{index}]"), |problems| {
                    if node.name.is_empty() {
                        problems.add("name", "must not be empty");
                    }
                    if node.port == 0 {
                        problems.add("port", "must not be 0");
                    }
                });
            }
        }
    }

    fn problems(text: &str) -> String {
        parse::<Config>(Path::new("agent.toml"), text).unwrap_err().to_string()
    }

    const GOOD: &str = "\
        cluster = \"demo\"\n\
        grace = \"20s\"\n\
        [repository.s3]\n\
        bucket = \"pgmesh\"\n\
        parts = 100\n\
        [[nodes]]\n\
        name = \"a\"\n\
        port = 5432\n\
        [[nodes]]\n\
        name = \"b\"\n\
        port = 5433\n";

    #[test]
    fn a_good_file_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        fs::write(&path, GOOD).unwrap();
        let config: Config = load(&path).unwrap();
        assert_eq!(config.grace, Duration::from_secs(20));
        assert_eq!(config.nodes.len(), 2);
    }

    #[test]
    fn every_broken_rule_is_shown_with_its_key() {
        let text = GOOD
            .replace("demo", "")
            .replace("20s", "0s")
            .replace("pgmesh", "")
            .replace("100", "10001")
            .replace("5433", "0");
        assert_eq!(
            problems(&text),
            "configuration agent.toml breaks these rules:\n\
             cluster: must not be empty\n\
             grace: must be above zero\n\
             repository.s3.bucket: must not be empty\n\
             repository.s3: S3 takes at most 10000 parts\n\
             nodes[1].port: must not be 0"
        );
    }

    #[test]
    fn every_unknown_key_and_wrong_value_is_shown_with_its_line() {
        let text = GOOD
            .replace("cluster =", "cluste = 1\ncluster =")
            .replace("20s", "20 parsecs")
            .replace("bucket =", "bukket = \"x\"\nbucket =")
            .replace("= 100", "= 0")
            .replace("= 5433", "= 65536");
        assert_eq!(
            problems(&text),
            "configuration agent.toml breaks these rules:\n\
             cluste: unknown key, expected one of `cluster`, `grace`, `repository`, `nodes` \
             (line 1)\n\
             grace: invalid value: string \"20 parsecs\", expected a duration (line 3)\n\
             nodes[1].port: invalid value: integer `65536`, expected u16 (line 13)\n\
             repository.s3.bukket: unknown key, expected `bucket` or `parts` (line 5)\n\
             repository.s3.parts: invalid value: integer `0`, expected a nonzero usize (line 7)"
        );
    }

    #[test]
    fn unknown_keys_do_not_hide_broken_rules() {
        let text = GOOD.replace("demo", "").replace("grace =", "grase = 1\ngrace =");
        assert_eq!(
            problems(&text),
            "configuration agent.toml breaks these rules:\n\
             grase: unknown key, expected one of `cluster`, `grace`, `repository`, `nodes` \
             (line 2)\n\
             cluster: must not be empty"
        );
    }

    #[test]
    fn a_missing_key_is_named_in_full() {
        for (line, expected) in [
            ("cluster = \"demo\"\n", "cluster: must be set"),
            ("bucket = \"pgmesh\"\n", "repository.s3.bucket: must be set (line 3)"),
            ("[repository.s3]\nbucket = \"pgmesh\"\nparts = 100\n", "repository: must be set"),
            ("port = 5432\n", "nodes[0].port: must be set (line 6)"),
        ] {
            let message = problems(&GOOD.replacen(line, "", 1));
            assert_eq!(
                message,
                format!("configuration agent.toml breaks these rules:\n{expected}")
            );
        }
    }

    #[test]
    fn several_missing_keys_are_named() {
        let text = GOOD.replace("bucket = \"pgmesh\"\n", "").replacen("port = 5432\n", "", 1);
        let text = text.replace("cluster = \"demo\"\n", "");
        assert_eq!(
            problems(&text),
            "configuration agent.toml breaks these rules:\n\
             nodes[0].port: must be set (line 4)\n\
             repository.s3.bucket: must be set (line 2)\n\
             cluster: must be set"
        );
    }

    #[test]
    fn all_that_is_missing_is_named() {
        for (text, expected) in [
            ("", "cluster: must be set\ngrace: must be set\nrepository: must be set"),
            (
                "[[nodes]]\n[repository]\n[[nodes]]\nname = \"a\"\n",
                "nodes[0].name: must be set (line 1)\nnodes[0].port: must be set (line 1)\n\
                 nodes[1].port: must be set (line 3)\nrepository.s3: must be set (line 2)\n\
                 cluster: must be set\ngrace: must be set",
            ),
            (
                "cluster = 7\ngrace = \"0 parsecs\"\n[repository.s3]\nparts = 0\n",
                "cluster: invalid type: integer `7`, expected a string (line 1)\n\
                 grace: invalid value: string \"0 parsecs\", expected a duration (line 2)\n\
                 repository.s3.parts: invalid value: integer `0`, expected a nonzero usize \
                 (line 4)\nrepository.s3.bucket: must be set (line 3)",
            ),
        ] {
            let expected = format!("configuration agent.toml breaks these rules:\n{expected}");
            assert_eq!(problems(text), expected, "{text}");
        }
    }

    #[test]
    fn the_words_that_a_key_takes_are_named_whatever_stands_there() {
        #[derive(Debug, Deserialize)]
        struct WithWords {
            #[serde(rename = "word")]
            _word: Word,
        }
        #[derive(Debug, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        enum Word {
            One,
            TheOther,
        }
        impl Check for WithWords {
            fn check(&self, _: &mut Problems) {}
        }
        let read = |text: &str| parse::<WithWords>(Path::new("agent.toml"), text);
        for word in ["one", "the-other"] {
            read(&format!("word = \"{word}\"\n")).unwrap();
        }
        let expected = "expected `one` or `the-other` (line 1)";
        for (value, problem) in [
            ("7", "must be a string"),
            ("[]", "must be a string"),
            ("true", "must be a string"),
            ("\"\"", "unknown variant ``"),
            ("\"two\"", "unknown variant `two`"),
        ] {
            let error = read(&format!("word = {value}\n")).unwrap_err().to_string();
            assert!(error.ends_with(&format!("\nword: {problem}, {expected}")), "{value}: {error}");
        }
    }

    #[test]
    fn a_value_of_another_type_is_shown_and_does_not_loop() {
        for (text, expected) in [
            (
                "nodes = [1, 2]\n",
                "nodes[0]: invalid type: integer `1`, expected struct Node (line 1)\n\
                 cluster: must be set\ngrace: must be set\nrepository: must be set",
            ),
            (
                "repository = 7\n",
                "repository: invalid type: integer `7`, expected struct Repository (line 1)\n\
                 cluster: must be set\ngrace: must be set",
            ),
        ] {
            let message = problems(text);
            assert_eq!(
                message,
                format!("configuration agent.toml breaks these rules:\n{expected}")
            );
        }
    }

    #[test]
    fn what_is_no_toml_is_shown_with_its_line() {
        let message = problems("cluster = \"demo\"\ngrace = 20s\n");
        assert!(
            message.starts_with("configuration agent.toml is not valid TOML at line 2: "),
            "{message}"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load::<Config>(Path::new("/nonexistent/agent.toml")).unwrap_err();
        assert_eq!(error.to_string(), "read configuration /nonexistent/agent.toml");
    }
}
