//! Tries the whole chain, one step after the other, and says for each whether it works.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use shared::etcd::Etcd;
use shared::lease::holders;
use shared::pg::connect::connect;
use shared::pg::wal::HistoryEntry;
use shared::pg::{Connection, Node};
use shared::store::{Put, StoreErrorKind};
use shared::telemetry::chain;
use shared::topology::{NodeState, Role, groups, observe_group};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use crate::arrival;
use crate::backup::Context;
use crate::commands::AGENT;
use crate::container::{Identity, Kind, open_whole, seal_whole};
use crate::follow::cluster::{self, Judged};
use crate::follow::standing::{Standing, standings};
use crate::follow::{self, FollowError};
use crate::keys::EXPOSED;
use crate::listing::Listing;
use crate::quantities::time;
use crate::replication::Replication;
use crate::repository::{Place, Repository};
use crate::rival::{Line, Rival, rivals};
use crate::slots;
use crate::wal::{self, WalError, WalMap};
use crate::wal_commands;

/// How far two clocks may be apart.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(30);

/// A receiver that gets on acknowledges within this, and `wal.ship_interval`, what the primary has.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(10);
const ACKNOWLEDGED_POLL: Duration = Duration::from_millis(200);

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It works.
    Ok,
    /// It works, and somebody should know.
    Warning,
    /// It does not work.
    Failed,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was tried.
    pub step: String,
    /// How it went.
    pub outcome: Outcome,
    /// What was found, and what to do.
    pub detail: String,
}

/// Collects the steps.
#[derive(Debug, Default)]
struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, step: impl Into<String>, outcome: Outcome, detail: impl Into<String>) {
        self.0.push(Step { step: step.into(), outcome, detail: detail.into() });
    }
}

/// Tries everything; one step that fails does not keep the others from being tried.
pub async fn check(context: &Context) -> Vec<Step> {
    let mut steps = Steps::default();
    let encryption = &context.config.encryption;
    let (keys, write_key) = (encryption.keys.len(), &encryption.write_key);
    match encryption.exposed() {
        Some(files) => steps.add("keys", Outcome::Warning, format!("{EXPOSED} {files}")),
        None => steps.add("keys", Outcome::Ok, format!("{keys} can be read, {write_key} writes")),
    }
    check_repository(&context.repository, &context.config.cluster, &mut steps).await;
    if let Some(etcd) = &context.etcd {
        check_etcd(etcd, &context.config.cluster, &mut steps).await;
    }
    if !context.config.has_servers() {
        let detail = "neither [[nodes]] nor [patroni] is configured: no base backups";
        steps.add("servers", Outcome::Warning, detail);
        return steps.0;
    }
    match context.topology.nodes().await {
        Ok(nodes) => {
            for number in groups(&nodes) {
                check_group(context, &nodes, number, &mut steps).await;
            }
        }
        Err(error) => steps.add("servers", Outcome::Failed, chain(&error).to_string()),
    }
    steps.0
}

/// Puts, reads, lists and deletes an object of its own.
async fn check_repository(repository: &Repository, cluster: &str, steps: &mut Steps) {
    let store = repository.store();
    let location = repository.location();
    let mut random = [0; 8];
    if let Err(error) = getrandom::fill(&mut random) {
        return steps.add("repository", Outcome::Failed, error.to_string());
    }
    let name = format!("probe/{}-{}", Utc::now().format("%Y%m%dT%H%M%SZ"), hex::encode(random));
    let key = format!("v1/{cluster}/{name}");
    let identity = Identity { system_identifier: 0, kind: Kind::Probe, name };
    let content = b"backup-agent check";
    let keys = repository.keys();
    let sealed = |text: &[u8]| seal_whole(keys, &identity, 1 << 20, 1, text);
    let (object, other) = match (sealed(content), sealed(b"something else")) {
        (Ok((object, _)), Ok((other, _))) => (object, other),
        (Err(error), _) | (_, Err(error)) => {
            return steps.add("encryption", Outcome::Failed, error.to_string());
        }
    };

    if let Err(error) = store.put(&key, object.clone(), None).await {
        return steps.add("repository put", Outcome::Failed, chain(&error).to_string());
    }
    steps.add("repository put", Outcome::Ok, location);
    match store
        .get(&key, object.len() as u64)
        .await
        .map_err(|error| chain(&error).to_string())
        .and_then(|object| open_whole(keys, &identity, &object).map_err(|error| error.to_string()))
    {
        Ok((found, _)) if found == content => {
            steps.add("repository get", Outcome::Ok, "reads back and decrypts");
        }
        Ok(_) => steps.add("repository get", Outcome::Failed, "reads back something else"),
        Err(error) => steps.add("repository get", Outcome::Failed, error),
    }
    match store.list(&key, None, None).await {
        Ok(listed) => match listed.first() {
            Some(info) => {
                steps.add("repository list", Outcome::Ok, "finds it");
                check_clock("the repository's clock", info.modified_at, steps);
            }
            None => steps.add("repository list", Outcome::Failed, "does not find what was put"),
        },
        Err(error) => steps.add("repository list", Outcome::Failed, chain(&error).to_string()),
    }
    match store.put(&key, other, None).await {
        Ok(Put::Exists) => steps.add("write once", Outcome::Ok, "If-None-Match is honoured"),
        Ok(Put::Created) => steps.add(
            "write once",
            Outcome::Warning,
            "the store ignores If-None-Match: it would overwrite. Names are unique by themselves, \
             so nothing is lost",
        ),
        Err(error) if error.kind == StoreErrorKind::Denied => {
            steps.add("write once", Outcome::Ok, "overwriting is denied");
        }
        Err(error) => steps.add("write once", Outcome::Failed, chain(&error).to_string()),
    }
    match store.delete(&key).await {
        Ok(()) => steps.add("repository delete", Outcome::Ok, "the probe is gone"),
        Err(error) if error.kind == StoreErrorKind::Denied => steps.add(
            "repository delete",
            Outcome::Warning,
            "denied: right under Object Lock; otherwise `expire` cannot free anything",
        ),
        Err(error) => steps.add("repository delete", Outcome::Failed, chain(&error).to_string()),
    }
}

/// Who holds which group.
async fn check_etcd(etcd: &Etcd, cluster: &str, steps: &mut Steps) {
    let holders = match holders(etcd, cluster, AGENT).await {
        Ok(holders) => holders,
        Err(error) => {
            let detail = format!(
                "{}: without it no replica receives WAL or takes scheduled backups",
                chain(&error)
            );
            return steps.add("etcd", Outcome::Failed, detail);
        }
    };
    if holders.is_empty() {
        let detail = "no replica holds a group: is `backup-agent run` there, with the same [etcd]?";
        return steps.add("etcd", Outcome::Warning, detail);
    }
    let held = holders.iter().map(|(group, replica)| format!("group {group} is held by {replica}"));
    steps.add("etcd", Outcome::Ok, held.collect::<Vec<_>>().join(", "));
}

fn check_clock(whose: &str, at: DateTime<Utc>, steps: &mut Steps) {
    let skew = Utc::now() - at;
    let detail = format!("{} s from this host's", skew.num_seconds());
    if skew.abs() <= CLOCK_TOLERANCE {
        steps.add(whose, Outcome::Ok, detail);
    } else {
        let detail = format!("{detail}: times in `list` and --target-time mislead; run NTP");
        steps.add(whose, Outcome::Failed, detail);
    }
}

async fn check_group(context: &Context, nodes: &[Node], number: u32, steps: &mut Steps) {
    let group = observe_group(&context.settings, nodes, number).await;
    let Judged { own, newest, leader } = cluster::judge(&context.repository, &group).await;
    let line = match &leader {
        Ok((node, _)) => Some(follow::line(&context.settings, node).await),
        Err(_) => None,
    };
    // Where it is not known, a standby that is behind is told.
    let known = line.as_ref().and_then(|it| it.as_ref().ok()).map(Line::from);
    let standings = standings(&group, own, newest, known);
    for observation in &group.nodes {
        let step = format!("group {number}: {}", observation.node.name);
        match &observation.state {
            Ok(state) => {
                let standing = standings.get(&observation.node.name).copied();
                let (outcome, detail) = server(state, standing.unwrap_or(Standing::Ok));
                steps.add(step, outcome, detail);
                check_replication(context, &observation.node, steps).await;
            }
            Err(error) => steps.add(step, Outcome::Failed, chain(error).to_string()),
        }
    }
    check_backups(context, number, own, steps).await;
    let leader = match leader {
        Ok(leader) => Ok(leader),
        Err(reason) => {
            let step = format!("group {number}: who leads");
            steps.add(step, Outcome::Failed, reason.to_string());
            Err(())
        }
    };
    if let (Ok((node, state)), Some(line)) = (leader, line) {
        let place = context.repository.place(number, state.system_identifier);
        check_timelines(&place, (node, state), line, steps).await;
    }
    check_wal(context, number, steps).await;
    if let Ok(leader) = leader
        && let Err(error) = check_archiving(context, number, leader, steps).await
    {
        steps.add(format!("group {number}: archiving"), Outcome::Failed, error);
    }
}

/// What a server is, and whether it belongs there.
fn server(state: &NodeState, standing: Standing) -> (Outcome, String) {
    let lsn = state.replay_lsn.or(state.flush_lsn);
    let lsn = lsn.map_or("unknown".to_owned(), |lsn| lsn.to_string());
    let role = if state.role == Role::Standby { "standby" } else { "primary" };
    let checksums = if state.data_checksums { "" } else { ", WITHOUT data checksums" };
    let problem = standing.problem().map(|problem| format!(": {problem}")).unwrap_or_default();
    let detail = format!("{role}, timeline {}, at {lsn}{checksums}{problem}", state.timeline);
    let outcome = match standing {
        Standing::OtherCluster { .. } | Standing::OldPrimary { .. } | Standing::Ahead { .. } => {
            Outcome::Failed
        }
        _ if standing.problem().is_none() && state.data_checksums => Outcome::Ok,
        Standing::Ok
        | Standing::Unreachable
        | Standing::Unknown { .. }
        | Standing::CatchingUp { .. }
        | Standing::OtherTimeline { .. } => Outcome::Warning,
    };
    (outcome, detail)
}

/// Reads what describes each backup: a key that is not the right one shows here. Those of other database
/// clusters that had the group's name count for nothing.
async fn check_backups(context: &Context, group: u32, own: Option<u64>, steps: &mut Steps) {
    let step = format!("group {group}: backups");
    let read = async {
        let (mut count, mut others) = (0, 0);
        let (mut bad, mut suspect) = (Vec::new(), None);
        for place in context.repository.places(group).await? {
            let listing = Listing::read(&place).await?;
            if own.is_none_or(|own| own == place.system_identifier) {
                count += listing.count();
                suspect = listing.suspect_newest().map(ToString::to_string).or(suspect);
            } else {
                others += listing.count();
            }
            bad.extend(listing.unreadable().map(|(_, why)| why.to_owned()));
            bad.extend(wal::locked(&place).await?.iter().map(|it| chain(it).to_string()));
            let lost = |id| format!("{id} cannot be restored, `backup-agent list` says why");
            bad.extend(listing.not_restorable().map(lost));
        }
        Ok::<_, WalError>((count, others, bad, suspect))
    };
    let (outcome, detail) = match read.await {
        Ok((count, others, bad, suspect)) => backups(count, others, &bad, suspect),
        Err(error) => (Outcome::Failed, chain(&error).to_string()),
    };
    steps.add(step, outcome, detail);
}

/// What it means that so many backups are there of the database cluster, and of `others`.
fn backups(
    count: usize,
    others: usize,
    bad: &[String],
    suspect: Option<String>,
) -> (Outcome, String) {
    let others = match others {
        0 => String::new(),
        others => format!(" ({others} of another database cluster that had the group's name)"),
    };
    match (count, suspect) {
        _ if !bad.is_empty() => (Outcome::Failed, bad.join("; ")),
        (0, _) => {
            (Outcome::Warning, format!("none yet{others}; take one with `backup-agent backup`"))
        }
        (_, Some(id)) => {
            let detail =
                format!("the newest, {id}, is suspect: `backup-agent list --json` says why");
            (Outcome::Warning, detail)
        }
        (count, None) => (Outcome::Ok, format!("{count} in the repository{others}")),
    }
}

/// Whether anything is stored of a timeline that is not the primary's.
async fn check_timelines(
    place: &Place,
    (node, state): (&Node, &NodeState),
    line: Result<(u32, Vec<HistoryEntry>), FollowError>,
    steps: &mut Steps,
) {
    let group = place.group;
    let read = async {
        let line = line?;
        let stored = WalMap::read_newest(place, state.wal_segment_bytes).await?;
        Ok::<_, FollowError>((line.0, rivals(&stored, Line::from(&line))))
    };
    let (outcome, detail) = match read.await {
        Ok((timeline, rivals)) => beside(&node.name, group, timeline, &rivals),
        Err(error) => (Outcome::Failed, chain(&error).to_string()),
    };
    steps.add(format!("group {group}: timelines"), outcome, detail);
}

/// Whether the stored WAL can be replayed from one end to the other.
async fn check_wal(context: &Context, group: u32, steps: &mut Steps) {
    let read = async {
        let (mut conflicts, mut gaps) = (Vec::new(), Vec::new());
        for place in context.repository.places(group).await? {
            let broken = wal_commands::broken(&place, &context.config.retention).await?;
            conflicts.extend(broken.conflicts);
            gaps.extend(broken.gaps);
        }
        Ok::<_, WalError>((conflicts, gaps))
    };
    let (outcome, detail) = match read.await {
        Ok((conflicts, gaps)) => replayable(&conflicts, &gaps),
        Err(error) => (Outcome::Failed, chain(&error).to_string()),
    };
    steps.add(format!("group {group}: WAL"), outcome, detail);
}

/// What it means that segments have two contents, or are missing.
fn replayable(conflicts: &[String], gaps: &[String]) -> (Outcome, String) {
    if !conflicts.is_empty() {
        return (Outcome::Failed, conflicts.join("; "));
    }
    match gaps.first() {
        None => (Outcome::Ok, "without a gap".to_owned()),
        Some(first) => {
            let detail = format!(
                "{} missing, and no recovery goes across that: {first}; see `backup-agent list --wal`",
                gaps.len()
            );
            (Outcome::Warning, detail)
        }
    }
}

/// What it means that other timelines are stored beside the one that a server writes.
fn beside(node: &str, group: u32, timeline: u32, rivals: &[Rival]) -> (Outcome, String) {
    if rivals.is_empty() {
        return (Outcome::Ok, format!("none is stored beside timeline {timeline} of {node}"));
    }
    let blocks = rivals.iter().any(|rival| rival.blocks);
    let outcome = if blocks { Outcome::Failed } else { Outcome::Warning };
    let others = rivals.iter().map(|Rival { timeline, left, since, .. }| {
        let left = left.map(|(before, lsn)| format!(", which left timeline {before} at {lsn},"));
        let since = since.map(|at| format!(" since {}", time(at)));
        let (left, since) = (left.unwrap_or_default(), since.unwrap_or_default());
        format!("timeline {timeline}{left} is stored{since}")
    });
    let others = others.collect::<Vec<_>>().join("; ");
    // Another may have come from an earlier one.
    let newest = rivals.iter().map(|rival| rival.timeline).max().unwrap_or(0);
    let refused = if blocks { ", which is refused when the receiver starts again" } else { "" };
    let detail = format!(
        "{others}; {node} writes timeline {timeline}{refused}. If {node} is the database, a copy was \
         promoted with --archive-mode preserve: stop that, then `backup-agent expire --timeline {newest} \
         --group {group}`. If not, {node} is an old primary that came back: stop it, or make it a standby \
         (pg_rewind)"
    );
    (outcome, detail)
}

async fn check_replication(context: &Context, node: &Node, steps: &mut Steps) {
    let step = format!("group {}: replication login at {}", node.group, node.name);
    let limit = context.config.backup.stall_timeout;
    let asked = async {
        Replication::connect(&context.settings, node, limit).await?.identify_system().await
    };
    match asked.await {
        Ok(identity) => {
            let detail = format!("system identifier {}", identity.system_identifier);
            steps.add(step, Outcome::Ok, detail);
        }
        Err(error) => steps.add(step, Outcome::Failed, chain(&error).to_string()),
    }
}

/// What the primary says of its archiver and of the receiver.
const ARCHIVER: &str = "
    SELECT current_setting('archive_mode') AS mode, clock_timestamp() AS now,
           last_archived_wal AS archived, last_failed_wal AS failed,
           coalesce(last_failed_time > last_archived_time, last_failed_time IS NOT NULL) AS failing,
           restart_lsn AS acknowledged,
           pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint AS behind,
           pg_current_wal_flush_lsn() AS flushed,
           current_setting('max_slot_wal_keep_size') = '-1' AS unbounded
      FROM pg_stat_archiver
      LEFT JOIN pg_replication_slots ON slot_name = $1 AND active AND slot_type = 'physical'";

/// Whether what the receiver has acknowledged is in the repository, and what the primary archived last.
async fn check_archiving(
    context: &Context,
    group: u32,
    (node, state): (&Node, &NodeState),
    steps: &mut Steps,
) -> Result<(), String> {
    let step = format!("group {group}: archiving");
    let connection =
        connect(&context.settings, node).await.map_err(|error| chain(&error).to_string())?;
    let slot = &context.config.wal.slot;
    let row =
        connection.query_one(ARCHIVER, &[slot]).await.map_err(|error| chain(&error).to_string())?;
    check_clock(&format!("group {group}: the primary's clock"), row.get("now"), steps);
    let wal = &context.config.wal;
    if wal.receive && wal.pg_wal_bytes_max.is_none() && row.get("unbounded") {
        steps.add(format!("group {group}: pg_wal"), Outcome::Warning, slots::UNBOUNDED);
    }
    let place = context.repository.place(group, state.system_identifier);
    let (mode, acknowledged): (String, Option<PgLsn>) = (row.get("mode"), row.get("acknowledged"));
    let mut is_received = false;
    if let Some(lsn) = acknowledged {
        let step = format!("group {group}: WAL receiver");
        let ship_interval = context.config.wal.ship_interval;
        let (timeline, segment_bytes) = (state.timeline, state.wal_segment_bytes);
        let stored =
            arrival::is_stored_soon(&place, timeline, segment_bytes, lsn, ship_interval).await;
        is_received = stored.map_err(|error| chain(&error).to_string())?;
        let connected =
            format!("connected to slot {slot}, {} bytes behind", row.get::<_, i64>("behind"));
        let (outcome, detail) = receiving(connected, &mode, is_received, &place.location());
        let limit = ACKNOWLEDGED_WITHIN + ship_interval;
        let gets_on = acknowledges(&connection, slot, row.get("flushed"), limit);
        if is_received && !gets_on.await? {
            let user = slots::user(&connection, slot).await;
            let user = user.map_err(|error| chain(&error).to_string())?;
            let (outcome, detail) = late(&detail, limit, user.as_deref());
            steps.add(step, outcome, detail);
        } else {
            steps.add(step, outcome, detail);
        }
        if mode == "off" {
            return Ok(());
        }
    }
    if mode == "off" {
        return Err(format!(
            "nothing takes the primary's WAL: no receiver is connected to slot {slot}, and archive_mode \
             is off. If `backup-agent run` runs, its log says what keeps it from receiving"
        ));
    }
    if row.get("failing") {
        let failed: String = row.get("failed");
        let failed = format!("{failed} could not be archived; see the log of {}", node.name);
        if !is_received {
            return Err(failed);
        }
        let detail =
            format!("{failed}. WAL is received here, but pg_wal grows until that is mended");
        steps.add(step, Outcome::Warning, detail);
        return Ok(());
    }
    let Some(archived) = row.get::<_, Option<String>>("archived") else {
        let outcome = if is_received { Outcome::Ok } else { Outcome::Warning };
        steps.add(step, outcome, "on, and nothing archived yet; try SELECT pg_switch_wal()");
        return Ok(());
    };
    let mut contents = 0;
    for file in [Some(archived.as_str()), labelled(&archived)].into_iter().flatten() {
        let found = wal::find(&place, file).await.map_err(|error| chain(&error).to_string())?;
        contents = contents.max(found.len());
    }
    let (outcome, detail) = archiving(&archived, contents, is_received);
    steps.add(step, outcome, detail);
    Ok(())
}

/// Whether a slot comes to a position within `limit`.
async fn acknowledges(
    connection: &Connection,
    slot: &str,
    lsn: PgLsn,
    limit: Duration,
) -> Result<bool, String> {
    let ask = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND restart_lsn >= $2";
    let began_at = Instant::now();
    loop {
        let found = connection.query(ask, &[&slot, &lsn]).await;
        if !found.map_err(|error| chain(&error).to_string())?.is_empty() {
            return Ok(true);
        }
        if began_at.elapsed() >= limit {
            return Ok(false);
        }
        sleep(ACKNOWLEDGED_POLL).await;
    }
}

/// What it means that what the primary had is not acknowledged within `limit` by the slot's `user`.
fn late(connected: &str, limit: Duration, user: Option<&str>) -> (Outcome, String) {
    let Some(user) = user else {
        let detail = format!(
            "{connected} a moment ago, and nobody is now: does `backup-agent run` run? Its log says what \
             keeps it from receiving"
        );
        return (Outcome::Warning, detail);
    };
    let detail = format!(
        "{connected}, and what the primary had {} s ago is not acknowledged by {user}. Either that is another \
         program: end it, or give it a slot of its own. Or the repository hangs or is too slow: the log of \
         `backup-agent run` names an upload that takes long. Or that process of the server does not send: it \
         is stopped, or the network lets nothing through",
        limit.as_secs()
    );
    (Outcome::Warning, detail)
}

/// What it means that a receiver is connected, and that what it has acknowledged is stored in a place.
fn receiving(connected: String, mode: &str, is_here: bool, place: &str) -> (Outcome, String) {
    if is_here {
        return (Outcome::Ok, connected);
    }
    let outcome = if mode == "off" { Outcome::Failed } else { Outcome::Warning };
    let detail = format!(
        "{connected}, and what it has acknowledged is not in {place}: whoever is connected stores \
         elsewhere. Does `backup-agent run` have this cluster name, prefix and bucket or directory?"
    );
    (outcome, detail)
}

/// The segment that the label of a base backup is named for: it was archived before.
fn labelled(archived: &str) -> Option<&str> {
    archived.strip_suffix(".backup").and_then(|label| label.get(..24))
}

/// What it means that of the file that was archived last the repository has so many contents.
fn archiving(archived: &str, contents: usize, is_received: bool) -> (Outcome, String) {
    match contents {
        1 => (Outcome::Ok, format!("{archived} is in the repository")),
        0 if is_received => {
            let detail = "archive_command stores WAL elsewhere; the WAL receiver stores it here";
            (Outcome::Ok, detail.to_owned())
        }
        0 if archived.contains('.') => {
            let detail = format!(
                "{archived} was archived last, which is no WAL segment and not in this repository; \
                 try SELECT pg_switch_wal()"
            );
            (Outcome::Warning, detail)
        }
        0 => {
            let detail = format!(
                "{archived} was archived, and not into this repository: does archive_command run \
                 backup-agent with this cluster name and group?"
            );
            (Outcome::Failed, detail)
        }
        _ => (Outcome::Failed, format!("{archived} is in the repository with {contents} contents")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_that_stores_elsewhere_is_told() {
        for (mode, is_here, expected) in [
            ("off", true, Outcome::Ok),
            ("on", true, Outcome::Ok),
            ("off", false, Outcome::Failed),
            ("on", false, Outcome::Warning),
        ] {
            let (outcome, detail) =
                receiving("connected".to_owned(), mode, is_here, "v1/c/0/7/ of s3://b");
            assert_eq!(outcome, expected, "{mode}, {is_here}: {detail}");
            assert_eq!(detail.contains("in v1/c/0/7/ of s3://b:"), !is_here, "{detail}");
        }
    }

    #[test]
    fn a_timeline_beside_the_primarys_is_named_with_what_to_do() {
        let rival = |timeline, blocks| {
            let (left, since) = (Some((1, PgLsn::from(0x500_0060))), Some(DateTime::UNIX_EPOCH));
            Rival { timeline, left, since, blocks }
        };
        for (rivals, expected, command) in [
            (vec![], Outcome::Ok, ""),
            (vec![rival(2, true)], Outcome::Failed, "expire --timeline 2 --group 7"),
            (vec![rival(2, true), rival(3, true)], Outcome::Failed, "--timeline 3 --group 7"),
            (vec![rival(2, false)], Outcome::Warning, "expire --timeline 2 --group 7"),
        ] {
            let (outcome, detail) = beside("postgres-1", 7, 1, &rivals);
            assert_eq!(outcome, expected, "{detail}");
            assert!(detail.contains(command), "{detail}");
            let named = "timeline 2, which left timeline 1 at 0/5000060, is stored since 1970-01-01T00:00:00Z";
            assert_eq!(detail.contains(named), !rivals.is_empty(), "{detail}");
        }
    }

    #[test]
    fn who_has_the_slot_is_named() {
        let (outcome, detail) =
            late("connected", Duration::from_secs(11), Some("PID 7 (pg_receivewal)"));
        assert_eq!(outcome, Outcome::Warning);
        assert!(
            detail.contains("11 s ago") && detail.contains("PID 7 (pg_receivewal)"),
            "{detail}"
        );
        assert!(late("connected", Duration::ZERO, None).1.contains("nobody is now"));
    }

    #[test]
    fn a_server_that_does_not_belong_there_is_told_with_what_to_do() {
        let state = NodeState {
            role: Role::Primary,
            system_identifier: 8,
            timeline: 1,
            received_timeline: None,
            flush_lsn: Some(PgLsn::from(0x500_0060)),
            replay_lsn: None,
            server_version: 170_002,
            data_checksums: true,
            wal_segment_bytes: 16 << 20,
        };
        let standby = NodeState { role: Role::Standby, ..state.clone() };
        let unsafe_pages = NodeState { data_checksums: false, ..state.clone() };
        let (ok, other) =
            (Standing::Ok, Standing::OtherCluster { system_identifier: 8, of_group: 7 });
        let old = Standing::OldPrimary { timeline: 1, newest: 2 };
        let left = Standing::OtherTimeline { timeline: 1, newest: 2 };
        let ahead = Standing::Ahead { timeline: 2, newest: 1 };
        let unknown = |newest| Standing::Unknown { timeline: 1, newest };
        for (state, standing, expected, part) in [
            (&state, ok, Outcome::Ok, "primary, timeline 1, at 0/5000060"),
            (&unsafe_pages, ok, Outcome::Warning, "WITHOUT data checksums"),
            (&state, other, Outcome::Failed, "another database cluster, 8 and not 7"),
            (&state, old, Outcome::Failed, "an old primary that came back"),
            (&standby, left, Outcome::Warning, "the primary is on 2"),
            (&standby, ahead, Outcome::Failed, "may be an old one"),
            (&standby, unknown(None), Outcome::Ok, "standby, timeline 1"),
            (&standby, unknown(Some(2)), Outcome::Warning, "receives from no server"),
        ] {
            let (outcome, detail) = server(state, standing);
            assert_eq!(outcome, expected, "{detail}");
            assert!(detail.contains(part), "{detail}");
        }
    }

    #[test]
    fn only_backups_of_the_database_cluster_count() {
        let damaged = ["a is damaged".to_owned()];
        let suspect = || Some("b".to_owned());
        for (count, others, bad, suspect, expected, part) in [
            (1, 0, &[][..], None, Outcome::Ok, "1 in the repository"),
            (0, 0, &[], None, Outcome::Warning, "none yet;"),
            (0, 3, &[], None, Outcome::Warning, "none yet (3 of another database cluster"),
            (2, 3, &[], None, Outcome::Ok, "2 in the repository (3 of another"),
            (2, 0, &[], suspect(), Outcome::Warning, "b, is suspect"),
            (2, 0, &damaged, suspect(), Outcome::Failed, "a is damaged"),
            (0, 0, &damaged, None, Outcome::Failed, "a is damaged"),
        ] {
            let (outcome, detail) = backups(count, others, bad, suspect);
            assert_eq!(outcome, expected, "{detail}");
            assert!(detail.contains(part), "{detail}");
        }
    }

    #[test]
    fn archiving_fails_only_if_wal_is_lost() {
        let segment = "000000010000000000000005";
        let label = "000000010000000000000005.00000028.backup";
        for (archived, contents, is_received, expected) in [
            (segment, 1, false, Outcome::Ok),
            (segment, 0, false, Outcome::Failed),
            (segment, 0, true, Outcome::Ok),
            (segment, 2, true, Outcome::Failed),
            (label, 1, false, Outcome::Ok),
            (label, 0, false, Outcome::Warning),
            ("00000002.history", 0, false, Outcome::Warning),
            ("00000002.history", 0, true, Outcome::Ok),
            ("000000010000000000000005.partial", 0, false, Outcome::Warning),
        ] {
            let (outcome, detail) = archiving(archived, contents, is_received);
            assert_eq!(outcome, expected, "{archived}, {contents}, {is_received}: {detail}");
        }
        assert_eq!(labelled(label), Some(segment));
        assert_eq!(labelled("00000002.history"), None);
    }
}
