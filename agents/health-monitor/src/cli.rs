//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use shared::cli::config_help;

use crate::check::Level;
use crate::commands::AGENT;
use crate::component::Kind;
use crate::notify::command::{SilenceArgs, SilencesArgs, UnsilenceArgs};
use crate::roster::ForgetArgs;

/// Says whether the cluster is well, and why not.
#[derive(Debug, Parser)]
#[command(name = "health-monitor", version, max_term_width = 100)]
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
    /// Watch everything, and answer /, /status and /metrics (default)
    Run,
    /// Ask everything once, and say what is wrong
    ///
    /// Exit code 0 all is well, 1 warning, 2 critical, 3 unknown: that of monitoring plugins. Wrong use and
    /// a configuration that cannot be used are 3 too.
    Check(CheckArgs),
    /// Check the configuration and the files it names, and say what is wrong
    CheckConfig,
    /// Tell nobody of something for a while, for maintenance; it is watched and shown as ever
    Silence(SilenceArgs),
    /// List what is silenced
    Silences(SilencesArgs),
    /// End a silence early
    Unsilence(UnsilenceArgs),
    /// Miss a member no more that is gone for good; it is watched again when Patroni lists it
    Forget(ForgetArgs),
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// How deep to look; each level has the checks of those before
    #[arg(long, value_enum, default_value_t)]
    pub level: Level,
    /// Only this: a kind (`postgres`), or a name (`worker-1`); may be given more than once
    #[arg(long, value_name = "KIND|NAME")]
    pub component: Vec<String>,
    /// How to say it
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Only list what would be checked, with the limits that hold
    #[arg(long)]
    pub list: bool,
}

/// How `check` says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people.
    #[default]
    Text,
    /// For programs.
    Json,
    /// One line with performance data, as monitoring plugins print it.
    Nagios,
}

impl CheckArgs {
    /// Whether a component is asked for.
    pub fn wants(&self, kind: Kind, name: &str) -> bool {
        self.component.is_empty()
            || self.component.iter().any(|it| it == kind.name() || (!name.is_empty() && it == name))
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
    fn components_are_chosen_by_kind_and_by_name() {
        let line = ["health-monitor", "check", "--component", "etcd", "--component", "worker-1"];
        let Some(Command::Check(args)) = Cli::try_parse_from(line).unwrap().command else {
            panic!("no check");
        };
        assert_eq!((args.level, args.format), (Level::Standard, Format::Text));
        for (kind, name, expected) in [
            (Kind::Etcd, "etcd-1", true),
            (Kind::Postgres, "worker-1", true),
            (Kind::Patroni, "worker-1", true),
            (Kind::Postgres, "worker-2", false),
        ] {
            assert_eq!(args.wants(kind, name), expected, "{kind} {name}");
        }
    }
}
