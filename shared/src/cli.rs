//! The options every agent has, what it prints, and how its outcome becomes an exit code.

use std::error::Error;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use thiserror::Error;
use tracing::error;

use crate::telemetry::{Format, chain};

/// Exit code of an operation that failed.
pub const FAILED: u8 = 1;
/// Exit code of a command line that makes no sense; clap uses the same.
pub const WRONG_USE: u8 = 2;
/// Where `--help` has what every command has: after the command's own options.
const LAST: usize = 900;

/// The options every agent has. Flatten it into the agent's own arguments, beside
/// `mut_arg("config", |arg| config_help(arg, AGENT))`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", display_order = LAST)]
    config: Option<PathBuf>,
    /// How log lines are written [default: text on a terminal, json otherwise]
    #[arg(long, global = true, value_name = "FORMAT", display_order = LAST)]
    pub log_format: Option<Format>,
}

impl Args {
    /// The configuration file of `agent`: as given, or `/etc/pgmesh/AGENT.toml`.
    pub fn config_file(&self, agent: &str) -> PathBuf {
        self.config.clone().unwrap_or_else(|| default_config_file(agent).into())
    }
}

fn default_config_file(agent: &str) -> String {
    format!("/etc/pgmesh/{agent}.toml")
}

/// Has `--help` say which configuration file `agent` takes without the option.
pub fn config_help(argument: clap::Arg, agent: &str) -> clap::Arg {
    argument.help(format!("The configuration file [default: {}]", default_config_file(agent)))
}

/// Writes to standard output.
///
/// # Errors
///
/// It cannot be written to. That nobody reads on, as in `… list | head`, is no error.
pub fn print(text: impl AsRef<str>) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_ref().as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}

/// Options that contradict each other or make no sense: what clap cannot see by itself.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct WrongUse(pub String);

/// Logs how a command failed, if it did, and returns the agent's exit code: 0 done, 1 failed,
/// 2 wrong use.
pub fn exit(outcome: anyhow::Result<()>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    error!(error = %chain(error.as_ref()), "command failed");
    ExitCode::from(exit_code(&error))
}

/// The exit code for `error`: 2 if it is, or was caused by, [`WrongUse`], otherwise 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(<dyn Error>::is::<WrongUse>) { WRONG_USE } else { FAILED }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(mut_arg("config", |argument| config_help(argument, "some-agent")))]
    struct Agent {
        #[command(flatten)]
        shared: Args,
        #[command(subcommand)]
        command: Option<Command>,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Command {
        Run,
    }

    #[test]
    fn the_options_stand_before_or_after_the_command() {
        for line in [
            ["agent", "--config", "a.toml", "--log-format", "json", "run"],
            ["agent", "run", "--config", "a.toml", "--log-format", "json"],
        ] {
            let agent = Agent::try_parse_from(line).unwrap();
            assert!(matches!(agent.command, Some(Command::Run)));
            assert_eq!(agent.shared.config_file("agent"), PathBuf::from("a.toml"));
            assert_eq!(agent.shared.log_format, Some(Format::Json));
        }
    }

    #[test]
    fn the_configuration_file_is_named_after_the_agent() {
        use clap::CommandFactory;
        let help = Agent::command().render_help().to_string();
        assert!(help.contains("[default: /etc/pgmesh/some-agent.toml]"), "{help}");
        let agent = Agent::try_parse_from(["agent"]).unwrap();
        let file = agent.shared.config_file("backup-agent");
        assert_eq!(file, PathBuf::from("/etc/pgmesh/backup-agent.toml"));
        assert_eq!(agent.shared.log_format, None);
    }

    #[test]
    fn wrong_use_is_told_apart_from_failure() {
        let wrong = anyhow::Error::new(WrongUse("--to is missing".to_owned())).context("restore");
        assert_eq!(exit_code(&wrong), WRONG_USE);
        assert_eq!(exit_code(&anyhow!("disk full").context("restore")), FAILED);
        let absent = std::fs::read("/nonexistent").context("read it").unwrap_err();
        assert_eq!(exit_code(&absent), FAILED);
    }
}
