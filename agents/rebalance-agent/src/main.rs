//! Starts the rebalance agent. Everything worth testing is in the library next door.

use std::process::ExitCode;

use clap::Parser;
use rebalance_agent::cli::{Cli, Command};
use rebalance_agent::commands;
use shared::telemetry::{self, Output};
use shared::tls;
use tokio::runtime::Builder;

fn main() -> ExitCode {
    tls::install_provider();
    let cli = Cli::parse();
    let output = match cli.command {
        None | Some(Command::Run) => Output::Stdout,
        Some(_) => Output::Stderr,
    };
    telemetry::init(cli.shared.log_format, output);
    // It waits for servers nearly all the time.
    shared::cli::exit(match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(cli)),
        Err(error) => Err(error.into()),
    })
}
