//! Configuration files: read, parse, check; every problem at once, each with its key.
//!
//! serde stops at the first key it does not like. To show the others as well, that key is taken
//! out of the parsed file and the rest is tried again, until what is left is accepted or nothing
//! is left to take out.

use std::fmt::{self, Display};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;
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
    let mut table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: line_of(text, error.span()),
        problem: error.message().to_owned(),
    })?;

    let mut problems = Problems::default();
    let mut removed: Vec<String> = Vec::new();
    let mut only_unknown_keys = true;
    let config: Option<T> = loop {
        let error = match T::deserialize(Deserializer::from(table.clone())) {
            Ok(config) => break Some(config),
            Err(error) => error,
        };
        let span = error.span().unwrap_or_default();
        let line = line_of(text, Some(span.clone()));
        let found = remove(table.get_mut(), &span);
        let mut key = found.as_ref().map(|found| found.key.clone()).unwrap_or_default();
        let problem = if let Some(field) = quoted_after(error.message(), "missing field ") {
            push_key(&mut key, field);
            only_unknown_keys = false;
            "must be set".to_owned()
        } else if quoted_after(error.message(), "unknown field ").is_some() {
            let (_, expected) = error.message().split_once(", ").unwrap_or_default();
            format!("unknown key, {expected}")
        } else {
            only_unknown_keys = false;
            error.message().to_owned()
        };
        // A key missing because it was taken out here is no news.
        if !removed.contains(&key) {
            problems.add(&key, format!("{problem} (line {line})"));
        }
        match found {
            Some(found) => removed.push(found.removed),
            None => break None,
        }
    };

    // Without the values that were wrong, rules could seem broken that are not.
    if let Some(config) = &config
        && only_unknown_keys
    {
        config.check(&mut problems);
    }
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(ConfigError::Rules { path: path.to_owned(), problems: problems.found }),
    }
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
            ("cluster = \"demo\"\n", "cluster: must be set (line 1)"),
            ("bucket = \"pgmesh\"\n", "repository.s3.bucket: must be set (line 3)"),
            (
                "[repository.s3]\nbucket = \"pgmesh\"\nparts = 100\n",
                "repository: must be set (line 1)",
            ),
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
             cluster: must be set (line 1)"
        );
    }

    #[test]
    fn a_value_of_another_type_is_shown_and_does_not_loop() {
        for (text, expected) in [
            (
                "nodes = [1, 2]\n",
                "nodes[0]: invalid type: integer `1`, expected struct Node (line 1)",
            ),
            (
                "repository = 7\n",
                "repository: invalid type: integer `7`, expected struct Repository (line 1)",
            ),
        ] {
            let message = problems(text);
            assert_eq!(
                message,
                format!(
                    "configuration agent.toml breaks these rules:\n{expected}\n\
                     cluster: must be set (line 1)"
                )
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
