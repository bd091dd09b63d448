//! The one-shot commands, and the way into the service.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::CommandFactory as _;
use shared::cli::print;
use shared::config;
use shared::telemetry::chain;
use tokio_util::sync::CancellationToken;

use crate::check::Status;
use crate::cli::{CheckArgs, Cli, Command, Format};
use crate::config::Config;
use crate::log_file::LogFile;
use crate::notify::{self, Notifier};
use crate::report;
use crate::roster;
use crate::service;
use crate::watch::{DEEP_LIMIT, Watcher, now};

/// The service's name: package, configuration file, log target.
pub const AGENT: &str = "health-monitor";

/// What `pg_stat_activity` shows.
pub const APPLICATION_NAME: &str = "pgmesh/health-monitor";

/// Between two looks whether all were asked.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Carries out a command. A service logs to the file too, where one is configured.
pub async fn run(cli: Cli, log_file: &LogFile) -> ExitCode {
    let path = cli.shared.config_file(AGENT);
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => shared::cli::exit(run_service(&path, log_file).await),
        Command::Check(args) => match Box::pin(check(&path, &args)).await {
            Ok(status) => ExitCode::from(status.code()),
            Err(error) => {
                // A plugin says it on standard output: that is what the monitoring system shows.
                let text = format!("HEALTH UNKNOWN: {}\n", chain(error.as_ref()));
                print(&text).ok();
                ExitCode::from(Status::Unknown.code())
            }
        },
        Command::CheckConfig => shared::cli::exit(check_config(&path)),
        Command::Silence(args) => said(notify::command::silence(&path, args).await),
        Command::Silences(args) => said(notify::command::silences(&path, &args).await),
        Command::Unsilence(args) => said(notify::command::unsilence(&path, &args).await),
        Command::Forget(args) => said(roster::forget(&path, &args).await),
    }
}

/// What a command line that cannot be understood comes to: 2 as everywhere, but 3 for `check`, whose 2
/// means that the cluster is in a critical state.
pub fn wrong_use(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    error.print().ok();
    if code == 0 || !is_check(std::env::args().skip(1)) {
        return ExitCode::from(code);
    }
    let text = error.to_string();
    print(format!("HEALTH UNKNOWN: {}\n", text.lines().next().unwrap_or_default())).ok();
    ExitCode::from(Status::Unknown.code())
}

/// Whether the command is `check`: the first word that is a command at all.
fn is_check(mut arguments: impl Iterator<Item = String>) -> bool {
    let cli = Cli::command();
    arguments.find(|it| cli.find_subcommand(it).is_some()).is_some_and(|it| it == "check")
}

/// Prints what a command has to say.
fn said(text: anyhow::Result<String>) -> ExitCode {
    shared::cli::exit(text.and_then(|it| print(&it)))
}

async fn run_service(path: &Path, log_file: &LogFile) -> anyhow::Result<()> {
    let config: Config = config::load(path)?;
    let Config { log_file_bytes_max, log_files_max, .. } = config;
    let to_file = config.log_file.as_deref();
    // Until it is dropped, and then for as long as it takes to write what waits.
    let _guard = to_file.map(|it| log_file.open(it, log_file_bytes_max, log_files_max));
    service::run(config).await
}

fn check_config(path: &Path) -> anyhow::Result<()> {
    let config: Config = config::load(path)?;
    let watcher = Watcher::new(config.clone(), APPLICATION_NAME, Duration::ZERO)?;
    Notifier::new(&config, watcher.monitor)?;
    if let Some(directory) = config.state_directory.as_deref().filter(|it| !it.is_dir()) {
        bail!("state_directory: {} is no directory", directory.display());
    }
    print(format!("{} is fine\n", path.display()))
}

/// Asks everything once.
async fn check(path: &Path, args: &CheckArgs) -> anyhow::Result<Status> {
    let config: Config = config::load(path)?;
    if args.list {
        print(report::list(&config, args))?;
        return Ok(Status::Ok);
    }
    let limit = config.timeout * 3 + DEEP_LIMIT;
    let watcher = Watcher::new(config, APPLICATION_NAME, Duration::ZERO)?;
    let monitor = watcher.monitor.clone();
    let shutdown = CancellationToken::new();
    let topology = watcher.topology.clone().follow(shutdown.clone());
    let members = watcher.topology.clone();
    let asked = async {
        // That nobody says who is in the cluster is a reading of its own, beside those of all that is listed.
        members.members().await.ok();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if monitor.state().is_asked_at(args.level) {
                return;
            }
        }
    };
    tokio::select! {
        ended = watcher.run(shutdown.clone()) => ended?,
        ended = topology => ended?,
        () = asked => {}
        () = tokio::time::sleep(limit) => {}
    }
    monitor.decide(now());
    let report = report::Report::new(&monitor.state(), args);
    let text = match args.format {
        Format::Text => report.text(),
        Format::Json => report.json()?,
        Format::Nagios => report.nagios(),
    };
    print(&text)?;
    Ok(report.status())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_the_first_word_that_is_one() {
        for (line, expected) in [
            ("check --format bogus", true),
            ("--config /x check --bogus", true),
            ("silence --comment check", false),
            ("--bogus", false),
        ] {
            assert_eq!(is_check(line.split(' ').map(str::to_owned)), expected, "{line}");
        }
    }

    #[test]
    fn a_state_directory_must_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health-monitor.toml");
        let absent = directory.path().join("absent");
        let text = format!(
            "cluster = \"demo\"\nstate_directory = {absent:?}\n\
             [postgres]\nuser = \"m\"\ntls = \"disable\"\n\
             [[nodes]]\nname = \"a\"\nhost = \"a\"\n"
        );
        std::fs::write(&path, text).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _context = runtime.enter();
        let error = check_config(&path).unwrap_err().to_string();
        assert_eq!(error, format!("state_directory: {} is no directory", absent.display()));
        std::fs::create_dir(&absent).unwrap();
        check_config(&path).unwrap();
    }
}
