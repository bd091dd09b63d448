//! The command line.

use clap::{Args, Parser, Subcommand};
use shared::cli::config_help;

use crate::commands::AGENT;

/// Says where shards should be, what is in the way of moving them there, and moves them.
#[derive(Debug, Parser)]
#[command(name = "rebalance-agent", version, max_term_width = 100)]
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
    /// Look at the cluster again and again, move what is planned, answer /status and /metrics (default)
    Run,
    /// Look at the cluster once, and show what would be moved, and every reason not to
    ///
    /// Exit code 1 if nothing can be decided: the coordinator does not answer, or a size is unknown.
    Plan(ShowArgs),
    /// Show what the nodes have, what is decided, what is moved and what was moved last
    ///
    /// What the agent knows that runs at `admin_address`. If none answers there within a second, the
    /// cluster is looked at.
    ///
    /// Exit code 1 if nothing can be decided.
    Status(ShowArgs),
    /// Move nothing until `resume`; a move under way is broken off within 15 s
    ///
    /// Needs etcd: every replica sees it, and it outlives them.
    Pause(PauseArgs),
    /// Go on after `pause`, and let nothing rest any more because its last moves failed
    ///
    /// What was moved, and what failed, counts for the budget all the same. Needs etcd; without it,
    /// restart the agent.
    Resume,
    /// Move all shards off a node, before it is removed
    ///
    /// All guards, the window and the budget hold. With etcd the agents that run do it. Without, this
    /// command does, and returns when the node is empty or something is in the way; what it moves
    /// counts for this command alone. An agent that runs meanwhile knows nothing of it and moves shards
    /// back: stop it first, or configure etcd.
    ///
    /// It does not keep Citus from putting shards of new tables there, and it removes nothing: both ask
    /// for a superuser. `status` says how, and when it is safe.
    Drain(NodeArgs),
    /// Let a node have shards again
    Undrain {
        /// The node: its group's number, its host, or host:port as Citus knows it
        node: String,
    },
    /// Move a shard to a node, with the shards it is colocated with
    ///
    /// All guards, the window and the budget hold. With etcd the agents that run do it, before all
    /// else. Without, this command does. If it leaves the load uneven, what is moved next may be just
    /// that shard: pause the agent, or give the node a weight.
    Move(MoveArgs),
    /// Have Citus drop what moves left behind, and show what remains
    ///
    /// Exit code 1 if something does. Tables of shards that have no placement on their node are shown with the
    /// statement that drops them, and stay: rows may be in them that are nowhere else.
    Cleanup(CleanupArgs),
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

/// Options of `cleanup`.
#[derive(Clone, Copy, Debug, Args)]
pub struct CleanupArgs {
    /// Drop tables of shards that have no placement on their node, and one in use on another: what only they have is lost
    #[arg(long)]
    pub drop_orphans: bool,
}

/// Options of `pause`.
#[derive(Clone, Debug, Args)]
pub struct PauseArgs {
    /// For how long: 2h, 30m; without it, until `resume`
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub length: Option<std::time::Duration>,
    /// Why, for those who wonder
    #[arg(long, default_value = "no reason given")]
    pub comment: String,
}

/// Options of `drain`.
#[derive(Clone, Debug, Args)]
pub struct NodeArgs {
    /// The node: its group's number, its host, or host:port as Citus knows it
    pub node: String,
    /// Return when it is empty, or when something is in the way: also that no agent leads for 30 s
    #[arg(long)]
    pub wait: bool,
}

/// Options of `move`.
#[derive(Clone, Debug, Args)]
pub struct MoveArgs {
    /// The shard's number
    pub shard: i64,
    /// The node: its group's number, its host, or host:port as Citus knows it
    #[arg(required_unless_present = "cancel")]
    pub node: Option<String>,
    /// Return when it is there, or when something is in the way: also that no agent leads for 30 s
    #[arg(long)]
    pub wait: bool,
    /// Do not move it, if that has not begun
    #[arg(long, conflicts_with_all = ["node", "wait"])]
    pub cancel: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let help = Cli::command().render_help().to_string();
        assert!(help.contains("rebalance-agent.toml"), "{help}");
    }
}
