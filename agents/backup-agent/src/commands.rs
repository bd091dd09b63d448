//! The one-shot commands: what each prints, and when it counts as failed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, anyhow, bail, ensure};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use shared::cli::{WrongUse, print};
use shared::config;
use shared::etcd::Etcd;
use shared::table::Table;
use shared::telemetry::chain;
use shared::topology::{groups, observe_group};

use crate::archive;
use crate::backup::{Context, is_drained, take_backup};
use crate::check::{Outcome, check};
use crate::cli::{
    Action, ArchiveMode, Cli, Command, ExpireArgs, GroupArgs, JsonArgs, ListArgs, RestoreArgs,
    VerifyArgs,
};
use crate::clocks::APART_MAX;
use crate::config::Config;
use crate::expire::timeline::{self, Removal};
use crate::expire::{self, Plan, Spare};
use crate::follow::cluster::{self, NotLed};
use crate::follow::{self, begun};
use crate::keys::{EXPOSED, new_key, new_key_file};
use crate::listing::{self, Listing, heading};
use crate::prefetch;
use crate::progress::{Progress, drawn};
use crate::quantities::{bytes, span, time};
use crate::recovery::{Target, Window};
use crate::repository::{Place, Repository};
use crate::restore::{RestoreOptions, restore};
use crate::rival::Line;
use crate::service;
use crate::unpack::Left;
use crate::verify::verify;
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
    let command = cli.command.unwrap_or(Command::Run);
    let prints_json = command.prints_json();
    let outcome = Box::pin(carry_out(&path, command)).await;
    if let Err(error) = &outcome
        && prints_json
        && !IS_PRINTED.load(Ordering::Relaxed)
    {
        print_json(&json!({ "error": chain(error.as_ref()).to_string() }))?;
    }
    outcome
}

async fn carry_out(path: &Path, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run => service::run(load(path)?).await,
        Command::Backup(args) => Box::pin(backup(&context(path).await?, &args)).await,
        Command::List(args) => list(&load(path)?, &args).await,
        Command::Restore(args) => restore_command(path, &args).await,
        Command::Verify(args) => verify_command(&load(path)?, &args).await,
        Command::Expire(args) => match args.timeline {
            Some(timeline) => {
                Box::pin(expire_timeline(&context(path).await?, &args, timeline)).await
            }
            None => Box::pin(expire_command(&load(path)?, &args)).await,
        },
        Command::Check(args) => check_command(&context(path).await?, &args).await,
        Command::WalPush { path: file } => {
            archive::push(&load(path)?, &file).await?;
            Ok(())
        }
        Command::WalFetch { .. } => bail!("wal-fetch has its own way out"),
        Command::WalPrefetch { path: wanted } => prefetch::run(&load(path)?, &wanted).await,
        Command::Begin(args) => begin(&context(path).await?, &args).await,
        Command::CheckConfig => check_config(path).await,
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

/// Whether this process has printed JSON: a program expects one document.
static IS_PRINTED: AtomicBool = AtomicBool::new(false);

/// Prints what a command has for programs, once.
pub(crate) fn print_json(value: &Value) -> anyhow::Result<()> {
    IS_PRINTED.store(true, Ordering::Relaxed);
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

/// The groups that a command is for which talks to servers.
async fn with_servers(context: &Context, asked: Option<u32>) -> anyhow::Result<BTreeSet<u32>> {
    if !context.config.has_servers() {
        let problem = "neither [[nodes]] nor [patroni] is configured: no server to ask";
        bail!(WrongUse(problem.to_owned()));
    }
    let groups = groups(&context.topology.nodes().await?);
    let Some(group) = asked else { return Ok(groups) };
    if !groups.contains(&group) {
        let known = groups.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        bail!("group {group} has no servers; there are groups: {known}");
    }
    Ok([group].into())
}

async fn begin(context: &Context, args: &GroupArgs) -> anyhow::Result<()> {
    let mut values = Vec::new();
    for group in with_servers(context, args.group).await? {
        let nodes = context.topology.nodes().await?;
        let observed = observe_group(&context.settings, &nodes, group).await;
        let reason = |reason: NotLed| anyhow!("group {group}: {reason}");
        let (_, state) = cluster::the_only(&observed).map_err(reason)?;
        let place = context.repository.place(group, state.system_identifier).pinned().await?;
        begun::begin(&context.repository, &place).await?;
        let location = place.location();
        if !args.json {
            print(format!("the WAL of group {group} may be received into {location}\n"))?;
        }
        let system_identifier = place.system_identifier.to_string();
        let value = json!({
            "group": group, "system_identifier": system_identifier, "place": location,
        });
        values.push(value);
    }
    if args.json { print_json(&json!(values)) } else { Ok(()) }
}

async fn backup(context: &Context, args: &GroupArgs) -> anyhow::Result<()> {
    let groups = with_servers(context, args.group).await?;
    let (mut suspect, mut values, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for group in groups {
        if args.group.is_none() && is_drained(context, group).await {
            let error = drained(group);
            values.push(json!({ "group": group, "error": error.to_string() }));
            failed.push(error);
            continue;
        }
        let progress = Progress::default();
        let taken = drawn(&progress, Box::pin(take_backup(context, group, &progress))).await;
        let commit = match taken.with_context(|| format!("backup of group {group} failed")) {
            Ok(commit) => commit,
            // The others are none the worse for it.
            Err(error) => {
                let chain = chain(error.as_ref()).to_string();
                values.push(json!({ "group": group, "error": chain }));
                failed.push(error);
                continue;
            }
        };
        if !args.json {
            let (plain, stored) = (bytes(commit.plain_bytes()), bytes(commit.object_bytes()));
            let took = span(commit.finished_at - commit.started_at);
            let id = &commit.backup_id;
            let node = &commit.node;
            print(format!("{id}: {plain}, {stored} stored, from {node}, in {took}\n"))?;
        }
        values.push(listing::backup(&commit, None));
        if commit.suspect.is_some() {
            suspect.push(commit.backup_id.to_string());
        }
    }
    if args.json {
        print_json(&json!(values))?;
    }
    if let Some(error) = failed.pop() {
        for earlier in failed {
            tracing::error!(error = %chain(earlier.as_ref()), "backup failed");
        }
        return Err(error);
    }
    if !suspect.is_empty() {
        bail!("suspect: {}; the log and `list` say why", suspect.join(", "));
    }
    Ok(())
}

/// Why the command has taken no backup of a group: it would hold up what empties it.
fn drained(group: u32) -> anyhow::Error {
    anyhow!(
        "no backup of group {group} was taken: it is being drained. Wait until that is over, take it back \
         with `rebalance-agent undrain`, or take one all the same with --group {group}"
    )
}

async fn list(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let ListArgs { wal, group: args } = args;
    let places = places(config, args.group).await?;
    if args.group.is_some() && places.is_empty() {
        bail!("there is nothing{}", nothing(config, args.group).await?);
    }
    if *wal && places.is_empty() && !args.json {
        return print(format!("no WAL{}\n", nothing(config, args.group).await?));
    }
    if *wal {
        return wal_commands::list(&places, &config.retention, args.json).await;
    }
    let (mut listings, mut problems) = (Vec::new(), Vec::new());
    for place in &places {
        match Listing::read(place).await {
            Ok(listing) => listings.push(listing),
            // The other groups are none the worse for it.
            Err(error) => problems.push(format!("group {}: {}", place.group, chain(&error))),
        }
    }
    let unreadable = listings.iter().flat_map(Listing::unreadable);
    problems.extend(unreadable.map(|(id, _)| format!("backup {id} cannot be read")));
    let not_restorable = listings.iter().flat_map(Listing::not_restorable);
    problems.extend(not_restorable.map(|id| format!("backup {id} cannot be restored")));
    listings.retain(|listing| !listing.is_empty());
    if args.json {
        print_json(&listings.iter().flat_map(Listing::to_json).collect())?;
    } else if !listings.is_empty() {
        let now = Utc::now();
        print(listings.iter().map(|it| it.to_text(now)).collect::<Vec<_>>().join("\n"))?;
    } else if problems.is_empty() {
        let nothing = nothing(config, args.group).await?;
        print(format!("no backups{nothing}; take one with `backup-agent backup`\n"))?;
    }
    none_of(&problems)
}

/// Fails with all of these problems, if there is one.
pub(crate) fn none_of(problems: &[String]) -> anyhow::Result<()> {
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

/// Where it is that there is nothing.
async fn nothing(config: &Config, group: Option<u32>) -> anyhow::Result<String> {
    let group = group.map(|group| format!(", group {group}")).unwrap_or_default();
    let location = Repository::open(config).await?.location();
    Ok(format!(" of cluster {}{group} in {location}", config.cluster))
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
        let hint = error.next_step(Left::in_directory(&options.to));
        anyhow::Error::new(error).context(format!("restore failed{hint}"))
    })?;
    let window = Window {
        backup_id: restored.commit.backup_id.clone(),
        suspect: restored.commit.suspect.is_some(),
        from_lsn: restored.commit.end_lsn,
        from: restored.commit.reaches_from(),
        reach: Some(restored.reach),
    };
    if args.json {
        let mut value = listing::backup(&restored.commit, Some(&window));
        // Not every path is text.
        value["restored_to"] = json!(options.to.to_string_lossy());
        value["target"] = json!(options.target.to_string());
        return print_json(&value);
    }
    print(format!(
        "{} restored to {} in {} ({}).\n\
         Check the files, if you like: pg_verifybackup -n {}\n\
         Then start PostgreSQL there: it recovers to {} on timeline {} by itself.\n{}",
        restored.commit.backup_id,
        options.to.display(),
        span(Utc::now() - began),
        bytes(restored.bytes),
        options.to.display(),
        options.target,
        window.reach.as_ref().map_or(0, |reach| reach.timeline),
        afterwards(&options, window.leads_to_the_end(), args.target_action),
    ))
}

/// The server sends a `pg_wal` that is a link as the directory that it leads to, and does not say so.
const PG_WAL: &str = "pg_wal is a directory in the data directory, also where the server's was a link to another \
     disk: to have it there, move it and make the link before the start.\n";

/// What happens when the server has come to its target.
fn afterwards(options: &RestoreOptions, leads_to_the_end: bool, action: Action) -> String {
    let end = match (&options.target, action) {
        (Target::End, _) | (_, Action::Promote) => "There it becomes a primary.\n",
        (_, Action::Pause) => {
            "There it stays in recovery, read-only: look, then make it a primary with \
             SELECT pg_wal_replay_resume().\n"
        }
        (_, Action::Shutdown) => "There it shuts down.\n",
    };
    // PostgreSQL looks for a commit after the time, or a record from the position on, and replays everything before it gives up.
    let hint = match options.target {
        Target::Time(_) if leads_to_the_end => {
            "If it says \"recovery ended before configured recovery target was reached\", no commit \
             after that time is stored: then restore without --target-time.\n"
        }
        Target::Time(_) => {
            "If it says \"recovery ended before configured recovery target was reached\", no commit \
             from that time to the missing WAL is stored: then restore to the time of the last \
             transaction, which it says before, or earlier.\n"
        }
        Target::Lsn(_) => {
            "If it says \"recovery ended before configured recovery target was reached\", no record that \
             begins there or later is stored: then restore to an earlier one, or without --target-lsn.\n"
        }
        _ => "",
    };
    let limits = if options.pauses() {
        "If its log says \"insufficient parameter settings\", the server's max_connections or the like \
         was raised after the backup: raise it here too, and start again.\n"
    } else {
        "It takes no connections before that.\n"
    };
    let tablespaces = match options.target {
        Target::Immediate => "",
        _ => {
            "A tablespace that was made after the backup is made again where it was: make its directory \
             first, and do not start it beside the living server that has it.\n"
        }
    };
    let copy = if options.archive_off {
        "It does not archive, its commits wait for no standby, and its subscriptions do not run, which \
         would take the living server's changes: archive_mode is off, synchronous_standby_names is empty \
         and max_logical_replication_workers is 0 in its postgresql.auto.conf. For subscriptions of its own, first on each that it has: ALTER SUBSCRIPTION \
         … DISABLE, then … SET (slot_name = NONE); then ALTER SYSTEM RESET \
         max_logical_replication_workers, and restart it.\n"
    } else {
        "Its commits wait for the standbys in synchronous_standby_names, as on the server, if that names \
         any: connect them, or ALTER SYSTEM SET synchronous_standby_names = ''.\n"
    };
    format!("{end}{limits}{hint}{tablespaces}{PG_WAL}{copy}")
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
        if places.is_empty() {
            let nothing = nothing(config, args.group).await?;
            bail!("there is no WAL{nothing}: nothing was verified");
        }
        let work = Box::pin(wal_commands::verify(&places, &config.retention, args.json, &progress));
        return drawn(&progress, work).await;
    }
    let header = ["BACKUP", "READ", "WAL SEGMENTS", "RESULT"];
    let mut table = Table::new(&header).numbers(&[1, 2]);
    let (mut values, mut bad, mut count) = (Vec::new(), 0, 0);
    for place in places(config, args.group).await? {
        let progress = Progress::default();
        let at_once = config.backup.upload().workers + 1;
        let work = Box::pin(verify(&place, args.backup.as_ref(), at_once, &progress));
        for verified in drawn(&progress, work).await? {
            count += 1;
            bad += usize::from(!verified.problems.is_empty());
            values.push(json!({
                "backup_id": verified.backup_id, "group": place.group,
                "system_identifier": place.system_identifier.to_string(),
                "bytes": verified.bytes, "segments": verified.segments,
                "problems": verified.problems,
            }));
            let result = match verified.problems.len() {
                0 => "can be restored".to_owned(),
                1 => "1 PROBLEM".to_owned(),
                several => format!("{several} PROBLEMS"),
            };
            let segments = verified.segments.to_string();
            table.row([verified.backup_id.to_string(), bytes(verified.bytes), segments, result]);
            verified.problems.into_iter().for_each(|problem| table.note(problem));
        }
    }
    if count == 0 {
        let backup_id = args.backup.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
        let nothing = nothing(config, args.group).await?;
        bail!("there is no backup{backup_id}{nothing}: nothing was verified");
    }
    if args.json {
        print_json(&json!(values))?;
    } else {
        print(table.to_string())?;
    }
    ensure!(bad == 0, "{bad} of {count} backups have problems");
    Ok(())
}

async fn expire_command(config: &Config, args: &ExpireArgs) -> anyhow::Result<()> {
    let (mut values, mut texts, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    let places = places(config, args.group).await?;
    if args.group.is_some() && places.is_empty() {
        bail!("there is nothing{}", nothing(config, args.group).await?);
    }
    let context = if args.apply { with_clock(config).await } else { None };
    for place in places {
        let (group, system_identifier) = (place.group, place.system_identifier);
        let now = Utc::now();
        let plan = match expire::plan(&place, &config.retention, None, now).await {
            Ok(plan) => plan,
            Err(error) => {
                problems.push(format!("nothing of group {group} goes: {}", chain(&error)));
                continue;
            }
        };
        let (table, plan_values) = planned(&plan);
        values.extend(plan_values.into_iter().map(|mut value| {
            value["group"] = json!(group);
            value["system_identifier"] = json!(system_identifier.to_string());
            value["as_of"] = json!(plan.as_of);
            value
        }));
        if !table.is_empty() {
            let standstill = standstill(&plan, now);
            texts.push(format!("{}\n{table}{standstill}", heading(group, system_identifier)));
        }
        if args.apply
            && let Err(error) = expire::apply(&place, &plan, context.as_ref()).await
        {
            problems.push(format!("group {group}: {}", chain(&error)));
        }
    }
    if args.json {
        print_json(&json!(values))?;
    } else if !texts.is_empty() {
        let done = match (args.apply, problems.is_empty()) {
            (false, _) => "nothing was changed; do it with --apply",
            (true, true) => "done",
            (true, false) => "NOT DONE, or not all of it",
        };
        print(format!("{}{done}\n", texts.join("\n")))?;
    } else if problems.is_empty() {
        print(format!("there is nothing{}\n", nothing(config, args.group).await?))?;
    }
    none_of(&problems)
}

/// `expire --timeline`: the timeline of a copy beside the primary's.
async fn expire_timeline(
    context: &Context,
    args: &ExpireArgs,
    timeline: u32,
) -> anyhow::Result<()> {
    let groups = with_servers(context, args.group).await?;
    let Some(group) = groups.first().copied().filter(|_| groups.len() == 1) else {
        let problem = "each group has timelines of its own: say with --group which is meant";
        bail!(WrongUse(problem.to_owned()));
    };
    let nodes = context.topology.nodes().await?;
    let observed = observe_group(&context.settings, &nodes, group).await;
    let judged = cluster::judge(&context.repository, &observed).await;
    let (node, state) = judged.leader.map_err(|reason| {
        anyhow!("only the primary tells which timeline is the database's, and {reason}")
    })?;
    let (primary, history) = follow::line(&context.settings, node).await?;
    let line = Line { timeline: primary, history: &history };
    let place = context.repository.place(group, state.system_identifier).pinned().await?;
    let stays =
        || format!("timeline {timeline} is not removed; {} writes timeline {primary}", node.name);
    let segment_bytes = state.wal_segment_bytes;
    let removal = Removal::read(&place, segment_bytes, line, timeline).await.with_context(stays)?;
    removal.require(&place, line, args.apply, args.force).await.with_context(stays)?;

    let mut table = Table::new(&["WHAT", "ACTION", "WHY"]);
    let mut values = Vec::new();
    for id in removal.backups() {
        values.push(json!({ "backup_id": id, "action": "delete" }));
        table.row([id.to_string(), "delete".to_owned(), timeline::WHY.to_owned()]);
    }
    for Spare { count, object_bytes, name, key, why } in removal.spare() {
        values.push(json!({ key: count, "bytes": object_bytes, "action": "delete", "why": why }));
        let what = format!("{count} {name}, {}", bytes(object_bytes));
        table.row([what, "delete".to_owned(), why.to_owned()]);
    }
    let Removal { from_lsn, until_lsn, first_stored_at, last_stored_at, .. } = removal;
    for value in &mut values {
        value["group"] = json!(group);
        value["system_identifier"] = json!(place.system_identifier.to_string());
        value["timeline"] = json!(timeline);
        value["from_lsn"] = json!(from_lsn.map(|lsn| lsn.to_string()));
        value["until_lsn"] = json!(until_lsn.map(|lsn| lsn.to_string()));
        value["stored_from"] = json!(first_stored_at);
        value["stored_until"] = json!(last_stored_at);
    }
    let removed = if args.apply { removal.apply(&place).await } else { Ok(()) };
    if args.json {
        print_json(&json!(values))?;
    } else {
        let heading = heading(group, place.system_identifier);
        let range = from_lsn.zip(until_lsn);
        let range = range.map_or("no WAL".to_owned(), |(from, until)| format!("{from} to {until}"));
        let (from, until) = (time(first_stored_at), time(last_stored_at));
        let done = match (args.apply, &removed) {
            (false, _) => "nothing was changed; stop the copy, then do it with --apply",
            (true, Ok(())) => "done",
            (true, Err(_)) => "NOT DONE, or not all of it",
        };
        print(format!(
            "{heading}\n{} writes timeline {primary}; of timeline {timeline} is stored: {range}, from \
             {from} to {until}\n{table}{done}\n",
            node.name
        ))?;
    }
    removed.with_context(|| format!("remove timeline {timeline}"))
}

/// What it takes to ask the primary for its time, if one is configured.
async fn with_clock(config: &Config) -> Option<Context> {
    if !config.has_servers() {
        return None;
    }
    let context = Context::new(config.clone(), &format!("pgmesh/{AGENT}")).await;
    let warn = |error: &anyhow::Error| {
        tracing::warn!(error = %chain(error.as_ref()), "the primary's clock cannot be asked");
    };
    context.inspect_err(warn).ok()
}

/// Says that nothing gets older where nothing new comes.
fn standstill(plan: &Plan, now: DateTime<Utc>) -> String {
    if now - plan.as_of <= APART_MAX {
        return String::new();
    }
    let since = time(plan.as_of);
    format!(
        "nothing was stored since {since}: ages count until then, and nothing gets older meanwhile.\n\
         If that is not so, this host's clock is ahead: `backup-agent check` tells.\n"
    )
}

/// A plan, for people and for programs.
fn planned(plan: &Plan) -> (Table, Vec<Value>) {
    let mut table = Table::new(&["WHAT", "ACTION", "WHY"]);
    let mut values = Vec::new();
    for decision in &plan.decisions {
        let id = decision.backup_id.to_string();
        let keep = decision.keep.join(", ");
        let action = if decision.keep.is_empty() { "mark as deleted" } else { "keep" };
        values.push(json!({ "backup_id": id, "action": action, "reasons": decision.keep }));
        let why = if keep.is_empty() { "no rule keeps it".to_owned() } else { keep };
        table.row([id, action.to_owned(), why]);
    }
    for (id, due) in &plan.marked {
        let why = format!("goes after {}", time(*due));
        values.push(json!({ "backup_id": id, "action": "marked", "until": due }));
        table.row([id.to_string(), "is marked".to_owned(), why]);
        table.note(format!("brought back by deleting the object tombstone/{id}"));
    }
    for id in &plan.delete {
        values.push(json!({ "backup_id": id, "action": "delete" }));
        table.row([id.to_string(), "delete".to_owned(), "was marked long enough".to_owned()]);
    }
    for Spare { count, object_bytes, name, key, why } in plan.spare() {
        values.push(json!({ key: count, "bytes": object_bytes, "action": "delete", "why": why }));
        let what = format!("{count} {name}, {}", bytes(object_bytes));
        table.row([what, "delete".to_owned(), why.to_owned()]);
    }
    (table, values)
}

async fn check_command(context: &Context, args: &JsonArgs) -> anyhow::Result<()> {
    let steps = check(context).await;
    let failed = steps.iter().filter(|step| step.outcome == Outcome::Failed).count();
    if args.json {
        print_json(&json!(steps))?;
    } else {
        let mut table = Table::new(&["RESULT", "STEP", "DETAIL"]);
        for step in &steps {
            let (outcome, detail) = match step.outcome {
                Outcome::Ok => ("ok", step.detail.as_str()),
                Outcome::Warning => ("WARNING", ""),
                Outcome::Failed => ("FAILED", ""),
            };
            table.row([outcome, &step.step, detail].map(str::to_owned));
            if step.outcome != Outcome::Ok {
                table.note(&step.detail);
            }
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
    let repository = Repository::open(&config).await?;
    if let Some(schedule) = &config.backup.schedule
        && schedule.next_after(Utc::now()).is_none()
    {
        bail!("backup.schedule: {schedule} has no time to come");
    }
    if let Some(directory) = &config.repository.directory {
        match fs::metadata(&directory.path) {
            Ok(about) => ensure!(about.is_dir(), "{} is no directory", directory.path.display()),
            Err(error) => print(format!(
                "WARNING: the repository's directory {}: {error}. Mount it, or make it\n",
                repository.location()
            ))?,
        }
    }
    if let Some(etcd) = &config.etcd {
        Etcd::new(etcd)?;
    }
    let memory = bytes(config.backup.upload().memory_bytes() as u64);
    if let Some(files) = config.encryption.exposed() {
        print(format!("WARNING: {EXPOSED} {files}\n"))?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::tests::options;

    /// The commits of a copy waited for ever, and a position that nothing follows is not reached.
    #[test]
    fn the_closing_words_say_what_commits_wait_for_and_what_may_not_be_reached() {
        let say = |archive_off, target| {
            let options = RestoreOptions { target, archive_off, ..options() };
            afterwards(&options, true, Action::Pause)
        };
        let copy = say(true, Target::End);
        assert!(copy.contains("synchronous_standby_names is empty"), "{copy}");
        let replacement = say(false, Target::End);
        assert!(replacement.contains("wait for the standbys in synchronous_standby_names"));
        assert!(!replacement.contains("is empty"), "{replacement}");
        let hint = "recovery ended before configured recovery target was reached";
        assert!(say(true, Target::Lsn(1.into())).contains(hint));
        assert!(!replacement.contains(hint), "{replacement}");
    }
}
