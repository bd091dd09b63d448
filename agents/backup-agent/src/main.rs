//! Starts the backup agent. Everything worth testing is in the library next door.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use backup_agent::archive;
use backup_agent::cli::{Cli, Command};
use backup_agent::commands::{self, AGENT};
use clap::Parser;
use shared::telemetry::{self, Output};
use shared::{config, tls};
use tokio::runtime::Builder;
use tracing::error;

fn main() -> ExitCode {
    tls::install_provider();
    // PostgreSQL takes any exit code up to 125 of its restore_command for the end of the WAL, so
    // there `wal-fetch` must not end with clap's 2 or a panic's 101.
    if std::env::args_os().any(|argument| argument == OsStr::new("wal-fetch")) {
        return catch_unwind(AssertUnwindSafe(fetch)).unwrap_or(ExitCode::from(archive::GIVE_UP));
    }
    let cli = Cli::parse();
    let output = match cli.command {
        None | Some(Command::Run) => Output::Stdout,
        Some(_) => Output::Stderr,
    };
    telemetry::init(cli.shared.log_format, output);
    let mut builder = match cli.command {
        Some(Command::WalPush { .. }) => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    shared::cli::exit(match builder.enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(cli)),
        Err(error) => Err(error.into()),
    })
}

fn fetch() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            drop(error.print());
            let code = if error.use_stderr() { archive::GIVE_UP } else { 0 };
            return ExitCode::from(code);
        }
    };
    telemetry::init(cli.shared.log_format, Output::Stderr);
    let Some(Command::WalFetch { file, path }) = cli.command else {
        return ExitCode::from(archive::GIVE_UP);
    };
    let work = || -> anyhow::Result<u8> {
        let config = config::load(&cli.shared.config_file(AGENT))?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(archive::exit_code(&runtime.block_on(archive::fetch(&config, &file, &path))))
    };
    ExitCode::from(work().unwrap_or_else(|failure| {
        error!(error = %telemetry::chain(failure.as_ref()), "WAL file not fetched");
        archive::GIVE_UP
    }))
}
