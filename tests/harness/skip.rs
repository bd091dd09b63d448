//! A test that needs something absent says so, and is counted.

use std::env;
use std::fs::File;
use std::io::Write;
use std::thread;

/// The file each skip is added to, one line each, so that whoever runs the tests can count them.
const SKIP_FILE: &str = "PGMESH_TESTS_SKIP_FILE";
/// Set to `1`, a skip fails the test: where everything is installed, nothing may be skipped.
const NO_SKIP: &str = "PGMESH_TESTS_NO_SKIP";

/// Why something a test needs is not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip(pub String);

impl Skip {
    /// Reports the skip of the running test; see [`skip`].
    pub fn report(&self) {
        skip(&self.0);
    }
}

/// Reports on standard error that the running test is skipped: `SKIPPED <test>: <reason>`.
///
/// The line is also added to the file that `PGMESH_TESTS_SKIP_FILE` names. The caller returns
/// from the test afterwards. With `PGMESH_TESTS_NO_SKIP=1` this panics.
#[expect(clippy::print_stderr, reason = "a test's report to whoever runs it")]
pub fn skip(reason: &str) {
    let test = test_name();
    assert!(
        env::var_os(NO_SKIP).is_none_or(|value| value != "1"),
        "{test} may not be skipped here: {reason}"
    );
    let line = format!("SKIPPED {test}: {reason}");
    eprintln!("{line}");
    if let Some(path) = env::var_os(SKIP_FILE) {
        let mut file = File::options().create(true).append(true).open(path).unwrap();
        // One write for the line and its end: tests append at the same time.
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// The running test's name: its thread has it, unless the test runs on the main thread.
pub(crate) fn test_name() -> String {
    let thread = thread::current();
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => env::args().skip(1).find(|it| !it.starts_with('-')).unwrap_or("unknown".to_owned()),
    }
}
