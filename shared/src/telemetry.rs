//! Logs, and the one way to print an error.

use std::error::Error;
use std::fmt::{self, Display, Formatter};
use std::io::{self, IsTerminal};

use clap::ValueEnum;
use tokio_postgres::error::DbError;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, fmt as lines};

/// What is logged unless `RUST_LOG` says otherwise: the libraries below tell of each request
/// at `info` or `debug`, which is for whoever looks for a fault in them.
const DEFAULT_FILTER: &str = "info,aws_config=warn,aws_runtime=warn,aws_sdk_s3=warn,\
    aws_smithy_http_client=warn,aws_smithy_runtime=warn,aws_smithy_runtime_api=warn,h2=warn,\
    hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,tokio_postgres=warn";

/// How a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where log lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output: an agent that runs as a service.
    Stdout,
    /// Standard error: a command whose standard output is its result.
    Stderr,
}

/// Starts logging. `None` means text if `output` is a terminal, JSON otherwise.
///
/// `RUST_LOG` chooses what is logged. The first call counts; a later one, as in tests that share
/// a process, changes nothing.
pub fn init(format: Option<Format>, output: Output) {
    init_with(format, output, None);
}

/// Starts logging as [`init`] does. `also` gets every line too, as JSON; it must not wait for
/// anything, since whoever logs waits for it.
pub fn init_with(format: Option<Format>, output: Output, also: Option<BoxMakeWriter>) {
    let (is_terminal, writer) = match output {
        Output::Stdout => (io::stdout().is_terminal(), BoxMakeWriter::new(io::stdout)),
        Output::Stderr => (io::stderr().is_terminal(), BoxMakeWriter::new(io::stderr)),
    };
    let default = if is_terminal { Format::Text } else { Format::Json };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| DEFAULT_FILTER.into());
    let json = || lines::layer().json().flatten_event(true).with_current_span(false);
    let first = match format.unwrap_or(default) {
        Format::Text => lines::layer().with_ansi(is_terminal).with_writer(writer).boxed(),
        Format::Json => json().with_writer(writer).boxed(),
    };
    let second = also.map(|writer| json().with_writer(writer).boxed());
    let outputs: Vec<_> = [first].into_iter().chain(second).collect();
    let started = tracing_subscriber::registry().with(filter).with(outputs).try_init();
    // Fails only when a subscriber is there already, which is what the second call wants.
    drop(started);
}

/// Prints `error` and its causes joined by `: `, each thing once.
///
/// A cause is left out when the message before it already ends with it: several libraries repeat
/// their source. An error the PostgreSQL server sent shows its message, SQLSTATE, detail and
/// hint in place of the client's `db error`.
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// Prints an error with its causes. See [`chain`].
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(&'a (dyn Error + 'static));

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut before: Option<String> = None;
        let mut next = Some(self.0);
        while let Some(error) = next {
            next = error.source();
            let text = match error.downcast_ref::<DbError>() {
                Some(from_server) => server_message(from_server),
                None if stands_for_its_source(error) => continue,
                None => error.to_string(),
            };
            match &before {
                None => f.write_str(&text)?,
                Some(before) if text.is_empty() || before.ends_with(&text) => continue,
                Some(_) => write!(f, ": {text}")?,
            }
            before = Some(text);
        }
        Ok(())
    }
}

/// Tells whether `error` is the PostgreSQL client's wrapper around a message of the server.
fn stands_for_its_source(error: &(dyn Error + 'static)) -> bool {
    let from_client = error.downcast_ref::<tokio_postgres::Error>();
    from_client.is_some_and(|error| error.as_db_error().is_some())
}

/// What the server said, in one line: `message (SQLSTATE 28P01; detail: …; hint: …)`.
fn server_message(error: &DbError) -> String {
    let mut text = format!("{} (SQLSTATE {}", error.message(), error.code().code());
    for (name, value) in [("detail", error.detail()), ("hint", error.hint())] {
        if let Some(value) = value {
            text.push_str("; ");
            text.push_str(name);
            text.push_str(": ");
            text.push_str(&value.replace('\n', " "));
        }
    }
    text.push(')');
    text
}

#[cfg(test)]
mod tests {
    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    #[error("{message}")]
    struct Layer {
        message: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(messages: &[&'static str]) -> Layer {
        let (message, below) = messages.split_first().unwrap();
        let source = (!below.is_empty()).then(|| Box::new(layers(below)));
        Layer { message, source }
    }

    #[test]
    fn each_cause_is_printed_once() {
        for (messages, expected) in [
            (&["upload part 12"][..], "upload part 12"),
            (&["upload part 12", "connection reset"], "upload part 12: connection reset"),
            (
                &["list base/: service error", "service error", "NoSuchBucket"],
                "list base/: service error: NoSuchBucket",
            ),
            (&["a: b: c", "b: c", "c", "d"], "a: b: c: d"),
            (&["a", "", "b"], "a: b"),
        ] {
            assert_eq!(chain(&layers(messages)).to_string(), expected);
        }
    }

    #[test]
    fn a_second_start_changes_nothing() {
        init(Some(Format::Json), Output::Stderr);
        init(Some(Format::Text), Output::Stdout);
    }
}
