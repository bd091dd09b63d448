//! The replication slot: on the primary it holds back what the repository does not have yet, on
//! each standby it waits for the day that standby is promoted. PostgreSQL 17 does not copy
//! physical slots to standbys.

use shared::pg::wal::{Segment, WalFile};
use shared::pg::{Connection, QueryError};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

/// How often a connection is told to end that uses the slot, each with a second for it.
const FREE_ATTEMPTS: u32 = 5;

/// Why a slot cannot be used.
#[derive(Debug, Error)]
pub enum SlotError {
    /// The server did not answer or refused.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// It is somebody else's.
    #[error(
        "slot {slot} of {node} is a logical one and somebody else's: it is left alone, and nothing holds \
         WAL back there. Give the agent a slot of its own (wal.slot), or drop this one if nobody needs it"
    )]
    Logical {
        /// The server.
        node: String,
        /// The slot.
        slot: String,
    },
}

/// A slot that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// From where it holds WAL back.
    pub restart_lsn: PgLsn,
    /// Whether it was made just now: what came before is held back by nobody.
    pub is_new: bool,
    /// Whether the server had given it up, and it was made anew.
    pub was_lost: bool,
}

/// What a slot costs its server, and what depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burden {
    /// WAL that the slot holds back, in bytes; `None` if it holds nothing. What a standby has not replayed
    /// it keeps for itself: for hours, with `recovery_min_apply_delay`.
    pub retained_bytes: Option<u64>,
    /// `max_slot_wal_keep_size` in bytes: beyond it the server gives the slot up. `None` for no
    /// limit: then the disk is.
    pub limit_bytes: Option<u64>,
    /// The server gave the slot up, and what it held back may be gone.
    pub is_lost: bool,
    /// What all files in `pg_wal` take, in bytes.
    pub pg_wal_bytes: u64,
    /// What they take as a rule, in bytes: [`USUAL_TIMES`] `max_wal_size`, `wal_keep_size`, and what a
    /// standby has not replayed.
    pub usual_bytes: u64,
    /// Commits wait for what the slot's user reports.
    pub commits_wait: bool,
    /// How many other standbys are streaming for which commits may wait.
    pub other_synchronous: u64,
}

/// PostgreSQL keeps `pg_wal` near `max_wal_size` if nothing holds WAL back, and may take more while it is
/// busy. Where nothing else bounds it, more than so many times that is told.
pub const USUAL_TIMES: u64 = 3;

/// What is said where nothing bounds the WAL that the slot holds back.
pub const UNBOUNDED: &str = "max_slot_wal_keep_size is -1: a repository that is away for long fills the \
    server's disk with WAL, and PostgreSQL stops. Set it to what the disk can bear (ALTER SYSTEM SET \
    max_slot_wal_keep_size = '…'), or wal.pg_wal_bytes_max here to the room there is, for an alarm in time";

impl Burden {
    /// Tells whether WAL may be held back until the disk is full: by the server for ever, and nobody said
    /// how much room there is.
    pub fn is_unbounded(&self, room_bytes: Option<u64>) -> bool {
        self.limit_bytes.is_none() && room_bytes.is_none()
    }
}

/// Makes sure that a server has the slot and that WAL is held back by it. One that the server gave
/// up, or that holds nothing, is made anew.
///
/// # Errors
///
/// The server did not answer or refused: no free slot (`max_replication_slots`), no right to
/// (`REPLICATION`), or the slot is in use. Or it is a logical one.
pub async fn ensure(connection: &Connection, slot: &str) -> Result<Slot, SlotError> {
    let find = "SELECT restart_lsn, coalesce(wal_status, 'none'), slot_type = 'physical' \
                FROM pg_replication_slots WHERE slot_name = $1";
    let found = connection.query(find, &[&slot]).await?;
    let mut was_lost = false;
    if let Some(row) = found.first() {
        let (restart_lsn, status): (Option<PgLsn>, String) = (row.get(0), row.get(1));
        if !row.get::<_, bool>(2) {
            let (node, slot) = (connection.node().to_string(), slot.to_owned());
            return Err(SlotError::Logical { node, slot });
        }
        match restart_lsn {
            Some(restart_lsn) if status != "lost" => {
                return Ok(Slot { restart_lsn, is_new: false, was_lost });
            }
            Some(_) | None => {
                was_lost = status == "lost";
                connection.query_one("SELECT pg_drop_replication_slot($1)", &[&slot]).await?;
            }
        }
    }
    let create = "SELECT lsn FROM pg_create_physical_replication_slot($1, true)";
    let row = connection.query_one(create, &[&slot]).await?;
    Ok(Slot { restart_lsn: row.get(0), is_new: true, was_lost })
}

/// From where a server's slot holds WAL back, or would if it were not lost; `None` without a slot, or if
/// it has never held any.
///
/// # Errors
///
/// The server did not answer.
pub async fn held_from(connection: &Connection, slot: &str) -> Result<Option<PgLsn>, QueryError> {
    let ask = "SELECT coalesce(restart_lsn, 'FFFFFFFF/FFFFFFFF') FROM pg_replication_slots \
               WHERE slot_name = $1 AND slot_type = 'physical' \
               AND (restart_lsn IS NOT NULL OR wal_status = 'lost')";
    Ok(connection.query(ask, &[&slot]).await?.first().map(|row| row.get(0)))
}

/// Ends the agent's connection that uses a slot, and tells who that was: a replica that was
/// responsible before, and was stopped or cut off. The server would notice by itself only after
/// `wal_sender_timeout`, 60 s by default. Another program is left alone.
///
/// # Errors
///
/// The server did not answer or refused.
pub async fn free(connection: &Connection, slot: &str) -> Result<Option<String>, QueryError> {
    let end = "SELECT pg_terminate_backend(active_pid, 1000) FROM pg_replication_slots \
               JOIN pg_stat_replication ON pid = active_pid AND application_name = slot_name \
               WHERE slot_name = $1 AND slot_type = 'physical'";
    let user = user(connection, slot).await?;
    let mut had_one = false;
    // A walsender first sends why it ends. To the full socket of a frozen replica it never gets that
    // through, and gives it up when it is told once more.
    for _ in 0..FREE_ATTEMPTS {
        let ended = connection.query(end, &[&slot]).await?;
        let Some(row) = ended.first() else { break };
        had_one = true;
        if row.get(0) {
            break;
        }
    }
    Ok(user.filter(|_| had_one))
}

/// Who uses a slot: `PID 4711 (pg_receivewal from 10.0.0.7)`; `None` if nobody does.
///
/// # Errors
///
/// The server did not answer.
pub async fn user(connection: &Connection, slot: &str) -> Result<Option<String>, QueryError> {
    let ask = "SELECT format('PID %s (%s%s)', active_pid, \
               coalesce(nullif(application_name, ''), 'no application_name'), \
               ' from ' || host(client_addr)) FROM pg_replication_slots \
               LEFT JOIN pg_stat_replication ON pid = active_pid \
               WHERE slot_name = $1 AND active_pid IS NOT NULL";
    Ok(connection.query(ask, &[&slot]).await?.first().map(|row| row.get(0)))
}

/// Moves a standby's slot up to what the repository holds, and no further than it has replayed.
///
/// # Errors
///
/// The server did not answer or refused.
pub async fn advance(
    connection: &Connection,
    slot: &str,
    stored_lsn: PgLsn,
) -> Result<(), QueryError> {
    let advance = "SELECT pg_replication_slot_advance(slot_name, \
                   least($2::pg_lsn, pg_last_wal_replay_lsn())) FROM pg_replication_slots \
                   WHERE slot_name = $1 AND slot_type = 'physical' AND NOT active \
                   AND restart_lsn < least($2::pg_lsn, pg_last_wal_replay_lsn())";
    connection.query(advance, &[&slot, &stored_lsn]).await?;
    Ok(())
}

/// The WAL segments that a server has, in no order.
///
/// # Errors
///
/// The server did not answer or refused (`pg_monitor` is needed).
pub async fn segments(
    connection: &Connection,
    segment_bytes: u64,
) -> Result<Vec<Segment>, QueryError> {
    let rows = connection.query("SELECT name FROM pg_ls_waldir()", &[]).await?;
    let segment = |name: &str| match WalFile::parse(name, segment_bytes) {
        Ok(WalFile::Segment(segment)) => Some(segment),
        _ => None,
    };
    Ok(rows.iter().filter_map(|row| segment(row.get(0))).collect())
}

/// Asks a server what the slot costs it. `slot` is also the name of the receiver's connection.
///
/// # Errors
///
/// The server did not answer or refused (`pg_monitor` is needed).
pub async fn burden(connection: &Connection, slot: &str) -> Result<Burden, QueryError> {
    let ask = "SELECT (SELECT pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
               THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn)::bigint \
               FROM pg_replication_slots WHERE slot_name = $1 AND slot_type = 'physical'), \
               (SELECT setting::bigint << 20 FROM pg_settings \
                WHERE name = 'max_slot_wal_keep_size' AND setting::bigint >= 0), \
               (SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_waldir()), \
               (SELECT bool_or(sync_state IN ('sync', 'quorum')) FROM pg_stat_replication \
                WHERE application_name = $1 AND state = 'streaming'), \
               (SELECT count(*) FROM pg_stat_replication WHERE application_name <> $1 \
                AND state = 'streaming' AND sync_state IN ('sync', 'quorum', 'potential')), \
               EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 \
                       AND slot_type = 'physical' AND wal_status = 'lost'), \
               CASE WHEN pg_is_in_recovery() THEN '' \
               ELSE current_setting('synchronous_standby_names') END, \
               (SELECT sum(setting::bigint * CASE name WHEN 'max_wal_size' THEN $2::bigint ELSE 1 END)::bigint \
                << 20 FROM pg_settings WHERE name IN ('max_wal_size', 'wal_keep_size')) \
               + coalesce(CASE WHEN pg_is_in_recovery() THEN greatest(0, \
               pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())) END, 0)::bigint";
    let row = connection.query_one(ask, &[&slot, &USUAL_TIMES.cast_signed()]).await?;
    let bytes = |column| row.get::<_, Option<i64>>(column).map(|it| u64::try_from(it).unwrap_or(0));
    // Who is not streaming has no state there; commits may be waiting for it all the more.
    let (waits, names): (Option<bool>, &str) = (row.get(3), row.get(6));
    Ok(Burden {
        retained_bytes: bytes(0),
        limit_bytes: bytes(1),
        pg_wal_bytes: bytes(2).unwrap_or(0),
        usual_bytes: bytes(7).unwrap_or(u64::MAX),
        commits_wait: waits.unwrap_or_else(|| is_named(names, slot)),
        other_synchronous: bytes(4).unwrap_or(0),
        is_lost: row.get(5),
    })
}

/// Whether `synchronous_standby_names` has a name. That it is one of the first in a list is not asked.
///
/// Source: PostgreSQL manual, "Replication", `synchronous_standby_names`.
fn is_named(standby_names: &str, name: &str) -> bool {
    let mut between_quotes = false;
    let is_end = |c: char| {
        between_quotes ^= c == '"';
        c == '"' || !between_quotes && (c == ',' || c == '(' || c == ')' || c.is_whitespace())
    };
    let mut names = standby_names.split(is_end);
    names.any(|it| it == "*" || it.eq_ignore_ascii_case(name))
}

/// Something that an operator must know before it is too late. In the order of urgency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// Half of `max_slot_wal_keep_size` is used.
    SlotHalf,
    /// Three quarters of `max_slot_wal_keep_size` are used.
    SlotNearlyLost,
    /// The server gave the slot up: what it held back may be gone before it is stored.
    SlotLost,
    /// Three quarters of the room for `pg_wal` are used.
    DiskNearlyFull,
    /// `pg_wal` takes more than as a rule, and nothing bounds it.
    PgWalGrows,
    /// Commits wait for the repository and for nobody else.
    CommitsWaitForUsAlone,
}

impl Alarm {
    /// Whether it is about what the slot holds back.
    pub fn is_of_slot(self) -> bool {
        matches!(self, Self::SlotHalf | Self::SlotNearlyLost | Self::SlotLost)
    }
}

/// Decides which alarms hold. `room_bytes` is the room there is for `pg_wal`, where it is known. The slot of
/// a server that is not on the timeline that `is_received` is not moved, and holds nothing of it back.
pub fn alarms(burden: &Burden, room_bytes: Option<u64>, is_received: bool) -> Vec<Alarm> {
    let quarters = |used: u64, of: u64| used.saturating_mul(4) / of.max(1);
    let slot =
        burden.retained_bytes.zip(burden.limit_bytes).and_then(|(retained, limit)| match quarters(
            retained, limit,
        ) {
            0 | 1 => None,
            2 => Some(Alarm::SlotHalf),
            _ => Some(Alarm::SlotNearlyLost),
        });
    let slot = if burden.is_lost { Some(Alarm::SlotLost) } else { slot };
    let slot = slot.filter(|_| is_received);
    let disk = room_bytes.filter(|room| quarters(burden.pg_wal_bytes, *room) >= 3);
    let grows = burden.is_unbounded(room_bytes) && burden.pg_wal_bytes > burden.usual_bytes;
    let alone = burden.commits_wait && burden.other_synchronous == 0;
    slot.into_iter()
        .chain(disk.map(|_| Alarm::DiskNearlyFull))
        .chain(grows.then_some(Alarm::PgWalGrows))
        .chain(alone.then_some(Alarm::CommitsWaitForUsAlone))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_in_every_form_of_the_list() {
        for (names, expected) in [
            ("", false),
            ("pgmesh_backup", true),
            ("standby1, pgmesh_backup", true),
            ("ANY 1 (standby1, pgmesh_backup)", true),
            ("FIRST 2 (pgmesh_backup,standby1)", true),
            ("1 (PgMesh_Backup)", true),
            ("ANY 1 (\"pgmesh_backup\",\"standby-1\")", true),
            ("*", true),
            ("ANY 1 (*)", true),
            ("pgmesh_backup2, my_pgmesh_backup", false),
            ("\"not pgmesh_backup\"", false),
        ] {
            assert_eq!(is_named(names, "pgmesh_backup"), expected, "{names}");
        }
    }

    #[test]
    fn alarms_come_at_half_and_at_three_quarters() {
        let calm = Burden {
            retained_bytes: Some(0),
            limit_bytes: Some(100),
            is_lost: false,
            pg_wal_bytes: 10,
            usual_bytes: 10,
            commits_wait: false,
            other_synchronous: 0,
        };
        let retained = |bytes| Burden { retained_bytes: Some(bytes), ..calm };
        let waits = Burden { commits_wait: true, ..calm };
        let unbounded = Burden { limit_bytes: None, pg_wal_bytes: 11, ..calm };
        let cases = [
            ("nothing held back", calm, None, vec![]),
            ("nothing known", Burden { retained_bytes: None, ..calm }, None, vec![]),
            ("just below half", retained(49), None, vec![]),
            ("half", retained(50), None, vec![Alarm::SlotHalf]),
            ("three quarters", retained(75), None, vec![Alarm::SlotNearlyLost]),
            ("beyond the limit", retained(1000), None, vec![Alarm::SlotNearlyLost]),
            (
                "lost: it holds nothing back any more",
                Burden { is_lost: true, ..retained(0) },
                None,
                vec![Alarm::SlotLost],
            ),
            ("no limit", Burden { limit_bytes: None, ..retained(1 << 40) }, None, vec![]),
            ("nothing bounds it, and it grows", unbounded, None, vec![Alarm::PgWalGrows]),
            ("it grows, and there is room", unbounded, Some(100), vec![]),
            ("it grows to a limit", Burden { limit_bytes: Some(100), ..unbounded }, None, vec![]),
            ("room on the disk", calm, Some(14), vec![]),
            ("the disk fills", calm, Some(13), vec![Alarm::DiskNearlyFull]),
            (
                "one of two that commits wait for",
                Burden { other_synchronous: 1, ..waits },
                None,
                vec![],
            ),
            ("the only one", waits, None, vec![Alarm::CommitsWaitForUsAlone]),
        ];
        for (case, burden, room, expected) in cases {
            assert_eq!(alarms(&burden, room, true), expected, "{case}");
            let others: Vec<_> = expected.into_iter().filter(|it| !it.is_of_slot()).collect();
            assert_eq!(alarms(&burden, room, false), others, "{case}, on another timeline");
        }
    }
}
