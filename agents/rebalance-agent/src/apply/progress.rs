//! How far a move is, and whether it stands still.

use std::collections::BTreeMap;
use std::time::Duration;

use humantime::format_duration;
use shared::pg::{Connection, QueryError};
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::types::PgLsn;

/// All shards of the group have the same phase; their sizes add up.
const PROGRESS: &str = "
    SELECT max(status), sum(target_shard_size)::bigint, max(target_lsn),
           max(sourcename), max(sourceport), max(sessionid)
      FROM get_rebalance_progress()
     WHERE progress = 1 AND shardid = ANY ($1)";

/// The same of each process that moves something.
const OF_PIDS: &str = "
    SELECT max(status), sum(target_shard_size)::bigint, max(target_lsn),
           max(sourcename), max(sourceport), sessionid
      FROM get_rebalance_progress()
     WHERE progress = 1 AND sessionid = ANY ($1)
     GROUP BY sessionid";

/// What is built is not seen by others, nor are its bytes, before it is done. The shards of a table are
/// tables of their own, on each node: `events_102008`.
const BUILDS: &str = r"
    SELECT coalesce(bool_or(success AND result = 't'), false)
      FROM run_command_on_all_nodes(
               format('SELECT EXISTS (SELECT FROM pg_stat_progress_create_index AS build
                                        JOIN pg_class ON pg_class.oid = build.relid
                                       WHERE substring(relname FROM ''_(\d{1,18})$'')::bigint = ANY (%L))',
                      $1::bigint[]),
               give_warning_for_connection_errors := true)";

/// Citus' phases in their order; from here on a move may take its locks at any moment …
const NEAR_THE_END: [&str; 6] = [
    "Catching Up",
    "Creating Constraints",
    "Final Catchup",
    "Creating Foreign Keys",
    "Completing",
    "Completed",
];
/// … and in these it has them, so writers wait.
const UNDER_LOCKS: [&str; 3] = ["Final Catchup", "Creating Foreign Keys", "Completing"];

/// How far a move is; by default, unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What Citus does, as it calls it.
    pub phase: Option<String>,
    /// What has arrived, in bytes.
    pub bytes: Option<u64>,
    /// How far the target has followed.
    pub lsn: Option<PgLsn>,
    /// The node it moves from, as Citus knows it.
    pub source: Option<(String, u16)>,
}

impl Progress {
    /// Whether writers may have to wait soon.
    pub fn is_near_the_end(&self) -> bool {
        self.phase.as_deref().is_some_and(|it| NEAR_THE_END.contains(&it))
    }

    /// Whether it has its locks.
    pub(super) fn is_under_locks(&self) -> bool {
        self.phase.as_deref().is_some_and(|it| UNDER_LOCKS.contains(&it))
    }
}

/// Asks how far the move of these shards is, and which process does it.
pub(super) async fn read(
    connection: &Connection,
    shards: &[i64],
) -> Result<(Option<i32>, Progress), QueryError> {
    let row = connection.query_one(PROGRESS, &[&shards]).await?;
    Ok((row.get(5), progress(&row)))
}

/// Asks how far the moves of these processes are; of one that does not tell, it is unknown.
pub(super) async fn of_pids(
    connection: &Connection,
    pids: &[i32],
) -> Result<BTreeMap<i32, Progress>, QueryError> {
    let mut all: BTreeMap<_, _> = pids.iter().map(|it| (*it, Progress::default())).collect();
    for row in connection.query(OF_PIDS, &[&pids]).await? {
        all.insert(row.get(5), progress(&row));
    }
    Ok(all)
}

fn progress(row: &Row) -> Progress {
    let bytes: Option<i64> = row.get(1);
    let bytes = bytes.and_then(|it| u64::try_from(it).ok());
    let port = row.get::<_, Option<i32>>(4).and_then(|it| u16::try_from(it).ok());
    let source = row.get::<_, Option<String>>(3).zip(port);
    Progress { phase: row.get(0), bytes, lsn: row.get(2), source }
}

/// Asks whether an index of one of these shards is being built, on any node.
pub(super) async fn is_building(
    connection: &Connection,
    shards: &[i64],
) -> Result<bool, QueryError> {
    Ok(connection.query_one(BUILDS, &[&shards]).await?.get(0))
}

/// Since when nothing has changed. Pure.
#[derive(Clone, Debug)]
pub struct Standstill<T> {
    limit: Duration,
    last: Option<(Instant, Option<T>)>,
}

impl<T: PartialEq> Standstill<T> {
    /// With the longest that nothing may change.
    pub fn new(limit: Duration) -> Self {
        Self { limit, last: None }
    }

    /// Takes in that it does something which its progress does not show.
    pub fn went_on(&mut self, now: Instant) {
        if let Some((since, _)) = &mut self.last {
            *since = now;
        }
    }

    /// Takes in how far it is, and says so if it stands still for too long. What is not known has not
    /// changed. `phase` tells where it was last seen.
    pub fn see(
        &mut self,
        seen: Option<T>,
        now: Instant,
        phase: impl FnOnce(&T) -> Option<String>,
    ) -> Option<String> {
        let is_new = match &self.last {
            None => true,
            Some((_, last)) => seen.is_some() && seen != *last,
        };
        if is_new {
            self.last = Some((now, seen));
        }
        let (since, last) = self.last.as_ref()?;
        (self.limit <= now.duration_since(*since)).then(|| {
            let phase = last.as_ref().and_then(phase);
            let phase = phase.as_deref().unwrap_or("no phase that it tells");
            format!("it stands still for {} in {phase}", format_duration(self.limit))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_stands_still_when_neither_phase_nor_bytes_nor_position_change() {
        let at = |phase: &str, bytes, lsn: u64| Progress {
            phase: Some(phase.to_owned()),
            bytes: Some(bytes),
            lsn: Some(lsn.into()),
            source: None,
        };
        let start = Instant::now();
        let unknown = Progress::default();
        let why = |phase| Some(format!("it stands still for 1m in {phase}"));
        for (name, seen, expected) in [
            ("it begins", vec![(0, at("Setting Up", 0, 0))], None),
            ("in time", vec![(0, at("Setting Up", 0, 0)), (59, at("Setting Up", 0, 0))], None),
            (
                "too long",
                vec![(0, at("Setting Up", 0, 0)), (60, at("Setting Up", 0, 0))],
                why("Setting Up"),
            ),
            (
                "another phase",
                vec![(0, at("Setting Up", 0, 0)), (60, at("Copying Data", 0, 0))],
                None,
            ),
            ("a byte", vec![(0, at("Copying Data", 0, 0)), (60, at("Copying Data", 1, 0))], None),
            ("a position", vec![(0, at("Catching Up", 1, 0)), (60, at("Catching Up", 1, 1))], None),
            (
                "unknown meanwhile",
                vec![(0, at("Catching Up", 1, 0)), (30, unknown.clone()), (60, unknown.clone())],
                why("Catching Up"),
            ),
            (
                "never known",
                vec![(0, unknown.clone()), (60, unknown.clone())],
                why("no phase that it tells"),
            ),
        ] {
            let mut standstill = Standstill::new(Duration::from_mins(1));
            let found = seen.iter().map(|(second, progress)| {
                let known = (*progress != unknown).then(|| progress.clone());
                standstill.see(known, start + Duration::from_secs(*second), |it| it.phase.clone())
            });
            assert_eq!(found.last().unwrap(), expected, "{name}");
        }
    }

    /// 100 GB take longer to index than any patience, and show nothing.
    #[test]
    fn a_move_that_builds_an_index_does_not_stand_still() {
        let phase = Some("Creating Constraints".to_owned());
        let progress = Progress { phase, ..Progress::default() };
        let start = Instant::now();
        let mut standstill = Standstill::new(Duration::from_mins(1));
        for second in (0..600).step_by(30) {
            let now = start + Duration::from_secs(second);
            let found = standstill.see(Some(progress.clone()), now, |it| it.phase.clone());
            assert_eq!(found, None);
            standstill.went_on(now);
        }
        let later = start + Duration::from_secs(630);
        assert!(standstill.see(Some(progress), later, |it| it.phase.clone()).is_some());
    }
}
