//! The command line.

use clap::{Args, Parser, Subcommand};

/// Says where shards should be, and what is in the way of moving them there.
#[derive(Debug, Parser)]
#[command(name = "rebalance-agent", version, max_term_width = 100)]
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
    /// Look at the cluster again and again, and answer /status and /metrics (default)
    Run,
    /// Look at the cluster once, and show what would be moved, and every reason not to
    ///
    /// Exit code 1 if nothing can be decided: the coordinator does not answer, or a size is unknown.
    Plan(ShowArgs),
    /// Show what the nodes have, and what is decided
    ///
    /// What the agent knows that runs at `admin_address`. If none answers there within a second, the
    /// cluster is looked at.
    ///
    /// Exit code 1 if nothing can be decided.
    Status(ShowArgs),
    /// Check the configuration and the files it names, and say what is wrong
    CheckConfig,
}

/// Options of what shows something.
#[derive(Clone, Copy, Debug, Args)]
pub struct ShowArgs {
    /// Print JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
