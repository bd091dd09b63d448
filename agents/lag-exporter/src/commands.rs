//! The one-shot commands, and the way into the service.

use std::path::Path;

use anyhow::Context as _;
use shared::cli::print;
use shared::config;

use crate::cli::{Cli, Command};
use crate::config::Config;
use crate::history;
use crate::service;
use crate::show;

/// The service's name: package, configuration file, log target.
pub const AGENT: &str = "lag-exporter";

/// What `pg_stat_activity` shows.
pub const APPLICATION_NAME: &str = "pgmesh/lag-exporter";

/// Carries out a command.
///
/// # Errors
///
/// Each reason to exit with 1 or 2.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    let path = cli.shared.config_file(AGENT);
    let config: Config = config::load(&path)?;
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => service::run(config).await,
        Command::Show(args) => show::run(config, &args).await,
        Command::CheckConfig => check_config(&path, &config),
    }
}

fn check_config(path: &Path, config: &Config) -> anyhow::Result<()> {
    config.postgres.settings(APPLICATION_NAME)?;
    config.etcd.as_ref().map(shared::etcd::Etcd::new).transpose()?;
    if let Some(directory) = &config.state_directory {
        let is_there = directory.is_dir();
        anyhow::ensure!(is_there, "state_directory: {} is no directory", directory.display());
        history::check(directory).context("state_directory")?;
    }
    print(format!("{} is fine\n", path.display()))
}
