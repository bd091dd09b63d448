//! Starts the health monitor. Everything worth testing is in the library next door.

use std::process::ExitCode;

use clap::Parser;
use health_monitor::cli::{Cli, Command};
use health_monitor::commands;
use health_monitor::log_file::LogFile;
use shared::telemetry::{self, Output};
use shared::tls;
use tokio::runtime::Builder;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

fn main() -> ExitCode {
    tls::install_provider();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return commands::wrong_use(&error),
    };
    let log_file = LogFile::default();
    let (output, also) = match cli.command {
        None | Some(Command::Run) => (Output::Stdout, Some(BoxMakeWriter::new(log_file.clone()))),
        Some(_) => (Output::Stderr, None),
    };
    telemetry::init_with(cli.shared.log_format, output, also);
    // One thread serves hundreds of servers, and costs no wake-ups between threads.
    match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(cli, &log_file)),
        Err(error) => shared::cli::exit(Err(error.into())),
    }
}
