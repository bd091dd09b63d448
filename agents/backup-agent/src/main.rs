//! Starts the backup agent. Everything worth testing is in the library next door.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use backup_agent::archive;
use backup_agent::cli::{self, Cli, Command};
use backup_agent::commands::{self, AGENT};
use backup_agent::prefetch;
use clap::Parser;
use shared::telemetry::{self, Output};
use shared::tls;
use tokio::runtime::Builder;
use tracing::error;

fn main() -> ExitCode {
    // PostgreSQL takes any exit code up to 125 of its restore_command for the end of the WAL, so
    // there `wal-fetch` must not end with clap's 2 or a panic's 101.
    if cli::is_wal_fetch(env::args_os()) {
        return catch_unwind(AssertUnwindSafe(fetch)).unwrap_or(ExitCode::from(archive::GIVE_UP));
    }
    tls::install_provider();
    let cli = Cli::parse();
    let output = match cli.command {
        None | Some(Command::Run) => Output::Stdout,
        Some(_) => Output::Stderr,
    };
    telemetry::init(cli.shared.log_format, output);
    let mut builder = match cli.command {
        // Compression and files have threads of their own. With several for the rest, each message
        // of a base backup wakes the one that watches the sockets, to wake the one that reads.
        None | Some(Command::Run | Command::WalPush { .. } | Command::Backup(_)) => {
            Builder::new_current_thread()
        }
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
    let Some(Command::WalFetch { file, path, until }) = cli.command else {
        return ExitCode::from(archive::GIVE_UP);
    };
    // This before anything that can fail.
    if archive::needs_nobody(&file, &path) {
        return ExitCode::from(archive::NOT_THERE);
    }
    // Before anything is read or set up: this is what a recovery waits for.
    if prefetch::take(&file, &path, until) {
        return ExitCode::SUCCESS;
    }
    tls::install_provider();
    telemetry::init(cli.shared.log_format, Output::Stderr);
    let work = || -> anyhow::Result<u8> {
        let config_file = cli.shared.config_file(AGENT);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let fetched = runtime.block_on(archive::fetch(&config_file, &file, &path, until));
        Ok(archive::exit_code(&fetched))
    };
    ExitCode::from(work().unwrap_or_else(|failure| {
        error!(error = %telemetry::chain(failure.as_ref()), "WAL file not fetched");
        archive::GIVE_UP
    }))
}
