//! How far a move is, and whether it stands still.

use std::time::Duration;

use humantime::format_duration;
use shared::pg::{Connection, QueryError};
use tokio::time::Instant;
use tokio_postgres::types::PgLsn;

/// All shards of the group have the same phase; their sizes add up.
const PROGRESS: &str = "
    SELECT max(status), sum(target_shard_size)::bigint, max(target_lsn)
      FROM get_rebalance_progress()
     WHERE progress = 1 AND shardid = ANY ($1)";

/// How far a move is; by default, unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What Citus does, as it calls it.
    pub phase: Option<String>,
    /// What has arrived, in bytes.
    pub bytes: Option<u64>,
    /// How far the target has followed.
    pub lsn: Option<PgLsn>,
}

/// Asks how far the move of these shards is.
pub(super) async fn read(connection: &Connection, shards: &[i64]) -> Result<Progress, QueryError> {
    let row = connection.query_one(PROGRESS, &[&shards]).await?;
    let bytes: Option<i64> = row.get(1);
    let bytes = bytes.and_then(|it| u64::try_from(it).ok());
    Ok(Progress { phase: row.get(0), bytes, lsn: row.get(2) })
}

/// Since when nothing has changed. Pure.
#[derive(Clone, Debug)]
pub struct Standstill {
    limit: Duration,
    last: Option<(Instant, Progress)>,
}

impl Standstill {
    /// With the longest that nothing may change.
    pub fn new(limit: Duration) -> Self {
        Self { limit, last: None }
    }

    /// Takes in how far a move is, and says so if it stands still for too long. What is not known
    /// has not changed.
    pub fn see(&mut self, progress: &Progress, now: Instant) -> Option<String> {
        let is_new = match &self.last {
            None => true,
            Some((_, last)) => progress != last && *progress != Progress::default(),
        };
        if is_new {
            self.last = Some((now, progress.clone()));
        }
        let (since, last) = self.last.as_ref()?;
        (self.limit <= now.duration_since(*since)).then(|| {
            let phase = last.phase.as_deref().unwrap_or("no phase that it tells");
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
                standstill.see(progress, start + Duration::from_secs(*second))
            });
            assert_eq!(found.last().unwrap(), expected, "{name}");
        }
    }
}
