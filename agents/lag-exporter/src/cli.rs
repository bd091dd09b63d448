//! The command line.

use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use shared::cli::config_help;

use crate::commands::AGENT;

/// Says how far each standby is behind, and what hangs on it.
#[derive(Debug, Parser)]
#[command(name = "lag-exporter", version, max_term_width = 100)]
#[command(mut_arg("config", |argument| config_help(argument, AGENT)))]
pub struct Cli {
    /// What every agent has.
    #[command(flatten)]
    pub shared: shared::cli::Args,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve: watch the servers, answer /metrics and /status (default)
    Run,
    /// Show every node in one table
    ///
    /// What the agent knows that runs at `admin_address`; it knows how old each position is. If
    /// none answers there within a second, the servers are asked, for about three seconds. Then the
    /// lag of a standby that was behind before that has a lower bound only, such as `> 3 s`.
    ///
    /// Exit code 1 if the lag of a standby, or the primary of a group, is unknown: a server does not
    /// answer, has diverged, or there are two primaries.
    Show(ShowArgs),
    /// Check the configuration and the files it names, and say what is wrong
    CheckConfig,
}

/// Options of `show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Show it again and again, until Ctrl-C
    #[arg(long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "2s",
          value_parser = parse_interval)]
    pub watch: Option<Duration>,
    /// Ask the servers even if an agent runs
    #[arg(long)]
    pub direct: bool,
    /// The group [default: all of them]
    #[arg(long)]
    pub group: Option<u32>,
    /// Print JSON, for programs
    #[arg(long)]
    pub json: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(interval) if Duration::from_millis(200) <= interval => Ok(interval),
        Ok(_) => Err("must be at least 200ms".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn watch_has_an_interval_that_may_be_left_out() {
        for (line, expected) in [
            (&["lag-exporter", "show"][..], Some(None)),
            (&["lag-exporter", "show", "--watch"], Some(Some(2))),
            (&["lag-exporter", "show", "--watch", "5s", "--json"], Some(Some(5))),
            (&["lag-exporter", "show", "--watch", "1ms"], None),
        ] {
            let interval = Cli::try_parse_from(line).ok().map(|cli| match cli.command {
                Some(Command::Show(args)) => args.watch.map(|it| it.as_secs()),
                other => panic!("{other:?}"),
            });
            assert_eq!(interval, expected, "{line:?}");
        }
    }
}
