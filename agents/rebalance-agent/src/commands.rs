//! The one-shot commands, and the way into the service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{TimeDelta, Utc};
use shared::cli::print;
use shared::{config, http};

use crate::board::Board;
use crate::cli::{Cli, Command, MoveArgs, ShowArgs};
use crate::config::Config;
use crate::control::{Pause, Request};
use crate::observe::Observer;
use crate::rebalance::Rebalancer;
use crate::report::{Report, Turn};
use crate::{requests, service, show};

/// The service's name: package, configuration file, log target.
pub const AGENT: &str = "rebalance-agent";

/// What `pg_stat_activity` shows.
pub const APPLICATION_NAME: &str = "pgmesh/rebalance-agent";

/// How long an agent that runs may take to answer: it does from memory.
const AGENT_LIMIT: Duration = Duration::from_secs(1);

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
        Command::Plan(args) => {
            let report = look(config).await?;
            tell(&report, args, show::plan)
        }
        Command::Status(args) => {
            let known = ask_agent(config.admin_address, &config.cluster).await;
            let report = match known {
                Some(report) => report,
                None => look(config).await?,
            };
            tell(&report, args, show::status)
        }
        Command::Pause(args) => {
            anyhow::ensure!(args.length.is_none_or(|it| !it.is_zero()), "--for must be above zero");
            let since = Utc::now();
            let until = args.length.map(|it| {
                let length = TimeDelta::from_std(it).ok();
                length.and_then(|it| since.checked_add_signed(it)).context("--for is too long")
            });
            let until = until.transpose()?;
            requests::ask(config, Request::Pause(Pause { since, until, comment: args.comment }))
                .await
        }
        Command::Resume => requests::ask(config, Request::Resume).await,
        Command::Drain(args) => {
            let group = requests::group(&config, &args.node).await?;
            Box::pin(requests::carry_out(config, Request::Drain { group }, args.wait)).await
        }
        Command::Undrain { node } => {
            // A node that was removed has a number still.
            let group = match node.parse() {
                Ok(group) => group,
                Err(_) => requests::group(&config, &node).await?,
            };
            requests::ask(config, Request::Undrain { group }).await
        }
        Command::Move(MoveArgs { shard, node: Some(node), wait, .. }) => {
            let to = requests::group(&config, &node).await?;
            requests::can_move(&config, shard).await?;
            Box::pin(requests::carry_out(config, Request::Move { shard, to }, wait)).await
        }
        Command::Move(MoveArgs { shard, .. }) => {
            requests::ask(config, Request::Drop { shard }).await
        }
        Command::Cleanup(args) => requests::clean_up(config, args.drop_orphans).await,
        Command::CheckConfig => check_config(&path, &config),
    }
}

fn check_config(path: &Path, config: &Config) -> anyhow::Result<()> {
    Observer::new(config, APPLICATION_NAME)?;
    print(format!("{} is fine\n", path.display()))
}

/// Looks once.
pub(crate) async fn look(config: Config) -> anyhow::Result<Report> {
    let observer = Observer::new(&config, APPLICATION_NAME)?;
    let (cluster, mode, board) = (config.cluster.clone(), config.mode, Board::new(&config));
    let (rebalancer, _) = Rebalancer::new(config, observer, board);
    let turn = Box::pin(rebalancer.turn()).await;
    Ok(Report { cluster, mode, leads: None, moving: None, turn })
}

/// What the agent knows that runs here; `None` if none does, or that of another cluster.
async fn ask_agent(address: SocketAddr, cluster: &str) -> Option<Report> {
    let ip = match address.ip() {
        it if !it.is_unspecified() => it,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let url = format!("http://{}/status", SocketAddr::new(ip, address.port()));
    let client = http::client(false, None).ok()?.timeout(AGENT_LIMIT).build().ok()?;
    let report: Report = client.get(url).send().await.ok()?.json().await.ok()?;
    // One that has just begun knows less than a look.
    let is_of_use = report.cluster == cluster && report.turn != Turn::Starting;
    is_of_use.then_some(report)
}

fn tell(report: &Report, args: ShowArgs, text: fn(&Report) -> String) -> anyhow::Result<()> {
    if args.json {
        print(serde_json::to_string_pretty(report)? + "\n")?;
    } else {
        print(text(report))?;
    }
    match &report.turn {
        Turn::Unknown { reason, .. } => anyhow::bail!("nothing is decided: {reason}"),
        Turn::Decided(view) if view.plan.is_none() => anyhow::bail!("{}", view.summary()),
        _ => Ok(()),
    }
}
