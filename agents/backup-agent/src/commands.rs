//! The one-shot commands: what each prints, and when it counts as failed.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use chrono::Utc;
use serde_json::{Value, json};
use shared::cli::{WrongUse, print};
use shared::config;
use shared::etcd::Etcd;
use shared::table::Table;
use shared::topology::groups;

use crate::archive;
use crate::backup::{Context, take_backup};
use crate::catalog::Catalog;
use crate::check::{Outcome, check};
use crate::cli::{
    ArchiveMode, Cli, Command, ExpireArgs, GroupArgs, JsonArgs, ListArgs, RestoreArgs, VerifyArgs,
};
use crate::config::Config;
use crate::expire::{self, Spare};
use crate::keys::{new_key, new_key_file};
use crate::manifest::Commit;
use crate::prefetch;
use crate::progress::{Progress, drawn};
use crate::quantities::{bytes, span, time};
use crate::recovery::{Target, TargetTimeline, Window};
use crate::repository::{Place, Repository};
use crate::restore::{RestoreError, RestoreOptions, restore};
use crate::service;
use crate::verify::verify;
use crate::wal::{Then, WalMap};
use crate::wal_commands;

/// The service's name: package, configuration file, log target.
pub const AGENT: &str = "backup-agent";

/// Carries out a command.
///
/// # Errors
///
/// Each reason to exit with 1 or 2.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    let path = cli.shared.config_file(AGENT);
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => service::run(load(&path)?).await,
        Command::Backup(args) => Box::pin(backup(&context(&path).await?, &args)).await,
        Command::List(args) => list(&load(&path)?, &args).await,
        Command::Restore(args) => restore_command(&path, &args).await,
        Command::Verify(args) => verify_command(&load(&path)?, &args).await,
        Command::Expire(args) => expire_command(&load(&path)?, &args).await,
        Command::Check(args) => check_command(&context(&path).await?, &args).await,
        Command::WalPush { path: file } => {
            archive::push(&load(&path)?, &file).await?;
            Ok(())
        }
        Command::WalFetch { .. } => bail!("wal-fetch has its own way out"),
        Command::WalPrefetch { path: wanted } => prefetch::run(&load(&path)?, &wanted).await,
        Command::CheckConfig => check_config(&path).await,
        Command::NewKey { file } => make_key(file),
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    Ok(config::load(path)?)
}

/// Loads what the commands need that talk to servers.
///
/// # Errors
///
/// The configuration or a file that it names cannot be used.
pub async fn context(path: &Path) -> anyhow::Result<Context> {
    Context::new(load(path)?, &format!("pgmesh/{AGENT}")).await
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    print(format!("{value:#}\n"))
}

/// Every place of the groups that a command is for.
async fn places(config: &Config, asked: Option<u32>) -> anyhow::Result<Vec<Place>> {
    let repository = Repository::open(config).await?;
    let mut places = Vec::new();
    let groups = match asked {
        Some(group) => vec![group],
        None => repository.groups().await?,
    };
    for group in groups {
        places.extend(repository.places(group).await?);
    }
    Ok(places)
}

async fn backup(context: &Context, args: &GroupArgs) -> anyhow::Result<()> {
    if !context.config.has_servers() {
        let problem = "neither [[nodes]] nor [patroni] is configured: no server to back up";
        bail!(WrongUse(problem.to_owned()));
    }
    let groups = match args.group {
        Some(group) => [group].into(),
        None => groups(&context.topology.nodes().await?),
    };
    let (mut suspect, mut values, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for group in groups {
        let progress = Progress::default();
        let taken = drawn(&progress, Box::pin(take_backup(context, group, &progress))).await;
        let commit = match taken.with_context(|| format!("backup of group {group} failed")) {
            Ok(commit) => commit,
            // The others are none the worse for it.
            Err(error) => {
                failed.push(error);
                continue;
            }
        };
        if !args.json {
            let (plain, stored) = (bytes(commit.plain_bytes()), bytes(commit.object_bytes()));
            let took = span(commit.finished_at - commit.started_at);
            let id = &commit.backup_id;
            print(format!("{id}: {plain} in {stored}, from {}, {took}\n", commit.node))?;
        }
        values.push(backup_json(&commit, None));
        if commit.suspect.is_some() {
            suspect.push(commit.backup_id.to_string());
        }
    }
    if args.json {
        print_json(&json!(values))?;
    }
    if let Some(error) = failed.pop() {
        for earlier in failed {
            tracing::error!(error = %shared::telemetry::chain(earlier.as_ref()), "backup failed");
        }
        return Err(error);
    }
    if !suspect.is_empty() {
        bail!("suspect: {}; the log and `list` say why", suspect.join(", "));
    }
    Ok(())
}

fn backup_json(commit: &Commit, window: Option<&Window>) -> Value {
    let reach = window.and_then(|window| window.reach.as_ref());
    json!({
        "backup_id": commit.backup_id,
        "group": commit.group,
        "system_identifier": commit.system_identifier.to_string(),
        "node": commit.node,
        "from_standby": commit.from_standby,
        "server_version_num": commit.server_version_num,
        "timeline": commit.timeline,
        "start_lsn": commit.start_lsn.to_string(),
        "end_lsn": commit.end_lsn.to_string(),
        "started_at": commit.started_at,
        "finished_at": commit.finished_at,
        "bytes": commit.plain_bytes(),
        "object_bytes": commit.object_bytes(),
        "file_count": commit.file_count,
        "suspect": commit.suspect,
        "window": reach.map(|reach| json!({
            "consistent": window.is_some_and(Window::is_consistent),
            "timeline": reach.timeline,
            "until_lsn": reach.until_lsn.to_string(),
            "until": reach.until,
            "ends_with": match &reach.then {
                Then::End => json!({ "reason": "end" }),
                Then::Gap { segment } => json!({ "reason": "gap", "segment": segment }),
                Then::Conflict { segment } => json!({ "reason": "conflict", "segment": segment }),
            },
        })),
    })
}

async fn list(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let ListArgs { wal, group: args } = args;
    if *wal {
        let places = places(config, args.group).await?;
        return wal_commands::list(&places, &config.retention, args.json).await;
    }
    let header =
        ["BACKUP", "GROUP", "FROM", "AGE", "TOOK", "SIZE", "STORED", "RESTORABLE UNTIL", "NOTE"];
    let mut table = Table::new(&header);
    let (mut values, mut unreadable) = (Vec::new(), Vec::new());
    for place in places(config, args.group).await? {
        let catalog = Catalog::read(&place).await?;
        let segment_bytes = catalog.backups.last().map_or(16 << 20, |it| it.wal_segment_bytes);
        let wal = WalMap::read(&place, segment_bytes).await?;
        for commit in &catalog.backups {
            let window = Window::of(commit, &wal, TargetTimeline::Latest);
            values.push(backup_json(commit, Some(&window)));
            table.row(list_row(commit, &window));
        }
        for (backup_id, error) in &catalog.unreadable {
            let error = shared::telemetry::chain(error).to_string();
            values.push(json!({ "backup_id": backup_id, "group": place.group, "error": error }));
            let mut row = vec![backup_id.to_string(), place.group.to_string()];
            row.extend(["?"; 6].map(str::to_owned));
            row.push(format!("UNREADABLE: {error}"));
            table.row(row);
            unreadable.push(backup_id.to_string());
        }
    }
    if args.json {
        print_json(&json!(values))?;
    } else if table.is_empty() {
        print("no backups; take one with `backup-agent backup`\n")?;
    } else {
        print(table.to_string())?;
    }
    if !unreadable.is_empty() {
        bail!("cannot be read: {}", unreadable.join(", "));
    }
    Ok(())
}

fn list_row(commit: &Commit, window: &Window) -> Vec<String> {
    let until = match &window.reach {
        Some(reach) if window.is_consistent() => reach.until.map_or("?".to_owned(), time),
        _ => "NOT RESTORABLE".to_owned(),
    };
    let mut notes = Vec::new();
    if commit.suspect.is_some() {
        notes.push("SUSPECT".to_owned());
    }
    match window.reach.as_ref().map(|reach| &reach.then) {
        Some(Then::Gap { segment }) => notes.push(format!("then {segment} is missing")),
        Some(Then::Conflict { segment }) => notes.push(format!("then {segment} has two contents")),
        Some(Then::End) | None => {}
    }
    let node = if commit.from_standby { "standby" } else { "primary" };
    vec![
        commit.backup_id.to_string(),
        commit.group.to_string(),
        format!("{} ({node})", commit.node),
        span(Utc::now() - commit.finished_at),
        span(commit.finished_at - commit.started_at),
        bytes(commit.plain_bytes()),
        bytes(commit.object_bytes()),
        until,
        notes.join("; "),
    ]
}

async fn restore_command(config_path: &Path, args: &RestoreArgs) -> anyhow::Result<()> {
    let config = load(config_path)?;
    let repository = Repository::open(&config).await?;
    let to = std::path::absolute(&args.to).context("--to")?;
    let options = RestoreOptions {
        restore_command: fetch_command(config_path, args.group, config.wal.group)?,
        to,
        group: args.group,
        system_identifier: args.system_identifier,
        backup: args.backup.clone(),
        target: args.stop(),
        timeline: args.target_timeline,
        action: args.target_action.as_str().to_owned(),
        tablespaces: args.tablespace.clone(),
        force: args.force,
        resume: args.resume,
        archive_off: args.archive_mode == ArchiveMode::Off,
    };
    let progress = Progress::default();
    let began = Utc::now();
    let work = Box::pin(restore(&config, &repository, &options, &progress));
    let restored = drawn(&progress, work).await.map_err(|error| {
        let is_other = matches!(error, RestoreError::OtherRestore { .. });
        let state = options.to.join(".pgmesh-restore").exists() && !is_other;
        let hint = if state { "; go on with --resume once the cause is gone" } else { "" };
        anyhow::Error::new(error).context(format!("restore failed{hint}"))
    })?;
    let window = Window {
        backup_id: restored.commit.backup_id.clone(),
        suspect: restored.commit.suspect.is_some(),
        from_lsn: restored.commit.end_lsn,
        from: restored.commit.finished_at,
        reach: Some(restored.reach),
    };
    if args.json {
        let mut value = backup_json(&restored.commit, Some(&window));
        value["restored_to"] = json!(options.to);
        value["target"] = json!(options.target.to_string());
        return print_json(&value);
    }
    // PostgreSQL looks for a commit after the time, and replays everything before it gives up.
    let hint = match options.target {
        Target::Time(_) => {
            "If it says \"recovery ended before configured recovery target was reached\", no commit \
             after that time is stored: then restore without --target-time.\n"
        }
        _ => "",
    };
    print(format!(
        "{} restored to {} in {} ({}).\nStart PostgreSQL there: it recovers to {} on timeline {} \
         by itself.\n{hint}Check the files, if you like, before that: pg_verifybackup -n {}\n",
        restored.commit.backup_id,
        options.to.display(),
        span(Utc::now() - began),
        bytes(restored.bytes),
        options.target,
        window.reach.map_or(0, |reach| reach.timeline),
        options.to.display(),
    ))
}

/// The `restore_command` of the restored server: this very program with this configuration.
fn fetch_command(config_path: &Path, group: u32, configured: u32) -> anyhow::Result<String> {
    if group != configured {
        bail!(WrongUse(format!(
            "the restored server will fetch WAL with this configuration, whose wal.group is \
             {configured}; restore group {group} with a configuration that says wal.group = {group}"
        )));
    }
    let program = std::env::current_exe().context("find this program")?;
    let config_path = std::path::absolute(config_path).context("--config")?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    // PostgreSQL replaces %f and %p; a percent sign of ours must be doubled.
    let (program, config_path) =
        (quoted(&program).replace('%', "%%"), quoted(&config_path).replace('%', "%%"));
    Ok(format!("{program} --config {config_path} wal-fetch %f %p"))
}

async fn verify_command(config: &Config, args: &VerifyArgs) -> anyhow::Result<()> {
    if args.wal {
        let progress = Progress::default();
        let places = places(config, args.group).await?;
        let work = Box::pin(wal_commands::verify(&places, &config.retention, args.json, &progress));
        return drawn(&progress, work).await;
    }
    let mut table = Table::new(&["BACKUP", "READ", "WAL SEGMENTS", "RESULT"]);
    let (mut values, mut bad, mut count) = (Vec::new(), 0, 0);
    for place in places(config, args.group).await? {
        let progress = Progress::default();
        let at_once = config.backup.upload().workers + 1;
        let work = Box::pin(verify(&place, args.backup.as_ref(), at_once, &progress));
        for verified in drawn(&progress, work).await? {
            count += 1;
            bad += usize::from(!verified.problems.is_empty());
            values.push(json!({
                "backup_id": verified.backup_id, "group": place.group, "bytes": verified.bytes,
                "segments": verified.segments, "problems": verified.problems,
            }));
            let mut results = verified.problems.into_iter();
            let first = results.next().unwrap_or_else(|| "can be restored".to_owned());
            let segments = verified.segments.to_string();
            table.row([verified.backup_id.to_string(), bytes(verified.bytes), segments, first]);
            for more in results {
                table.row(["", "", "", &more].map(str::to_owned));
            }
        }
    }
    if args.json {
        print_json(&json!(values))?;
    } else {
        print(table.to_string())?;
    }
    match (count, bad) {
        (0, _) => bail!("there is no such backup: nothing was verified"),
        (_, 0) => Ok(()),
        _ => bail!("{bad} of {count} backups have problems"),
    }
}

async fn expire_command(config: &Config, args: &ExpireArgs) -> anyhow::Result<()> {
    let mut table = Table::new(&["WHAT", "ACTION", "WHY"]);
    let mut values = Vec::new();
    for place in places(config, args.group).await? {
        let plan = expire::plan(&place, &config.retention, Utc::now()).await?;
        for decision in &plan.decisions {
            let id = decision.backup_id.to_string();
            let keep = decision.keep.join(", ");
            let action = if decision.keep.is_empty() { "mark as deleted" } else { "keep" };
            values.push(json!({ "backup_id": id, "action": action, "reasons": decision.keep }));
            let why = if keep.is_empty() { "no rule keeps it".to_owned() } else { keep };
            table.row([id, action.to_owned(), why]);
        }
        for (id, due) in &plan.marked {
            let why = format!("can be brought back until {}", time(*due));
            values.push(json!({ "backup_id": id, "action": "marked", "until": due }));
            table.row([id.to_string(), "marked as deleted".to_owned(), why]);
        }
        for id in &plan.delete {
            values.push(json!({ "backup_id": id, "action": "delete" }));
            table.row([id.to_string(), "delete".to_owned(), "was marked long enough".to_owned()]);
        }
        for Spare { count, object_bytes, name, key, why } in plan.spare() {
            values.push(json!({
                key: count, "bytes": object_bytes, "action": "delete", "why": why,
            }));
            let what = format!("{count} {name}, {}", bytes(object_bytes));
            table.row([what, "delete".to_owned(), why.to_owned()]);
        }
        if args.apply {
            expire::apply(&place, &plan).await?;
        }
    }
    if args.json {
        return print_json(&json!(values));
    }
    print(table.to_string())?;
    if !args.apply {
        print("nothing was changed; do it with --apply\n")?;
    }
    Ok(())
}

async fn check_command(context: &Context, args: &JsonArgs) -> anyhow::Result<()> {
    let steps = check(context).await;
    let failed = steps.iter().filter(|step| step.outcome == Outcome::Failed).count();
    if args.json {
        print_json(&json!(steps))?;
    } else {
        let mut table = Table::new(&["STEP", "RESULT", "DETAIL"]);
        for step in &steps {
            let outcome = match step.outcome {
                Outcome::Ok => "ok",
                Outcome::Warning => "WARNING",
                Outcome::Failed => "FAILED",
            };
            table.row([step.step.clone(), outcome.to_owned(), step.detail.clone()]);
        }
        print(table.to_string())?;
    }
    if failed > 0 {
        bail!("{failed} of {} steps failed", steps.len());
    }
    Ok(())
}

async fn check_config(path: &Path) -> anyhow::Result<()> {
    let config = load(path)?;
    config.postgres.settings(AGENT)?;
    Repository::open(&config).await?;
    if let Some(etcd) = &config.etcd {
        Etcd::new(etcd)?;
    }
    let memory = bytes(config.backup.upload().memory_bytes() as u64);
    print(format!("{} is fine; a base backup takes up to {memory} of memory\n", path.display()))
}

fn make_key(file: Option<PathBuf>) -> anyhow::Result<()> {
    match file {
        Some(path) => {
            new_key_file(&path).with_context(|| format!("write {}", path.display()))?;
            print(format!(
                "{} written. Keep a copy elsewhere: without it no backup can be read.\n",
                path.display()
            ))
        }
        None => print(format!("{}\n", *new_key()?)),
    }
}
