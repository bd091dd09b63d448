//! `list`: the backups of each database cluster, and what each can be restored to.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use shared::table::Table;
use shared::telemetry::chain;

use crate::catalog::Catalog;
use crate::manifest::{BackupId, Commit};
use crate::quantities::{age, bytes, time};
use crate::recovery::{Choice, Target, TargetTimeline, Unreachable, Window, choose};
use crate::repository::Place;
use crate::wal::{Then, WalError, WalMap};

/// The backups of one database cluster.
#[derive(Debug)]
pub struct Listing {
    group: u32,
    system_identifier: u64,
    backups: Vec<(Commit, Window)>,
    /// Backups that cannot be read, and why.
    unreadable: Vec<(BackupId, String)>,
    /// The cluster's own timeline, if that can be told.
    own_timeline: Option<u32>,
    /// What a restore without a target does, if that is not to take the newest backup.
    plain_restore: Option<String>,
}

impl Listing {
    /// Reads what describes the backups, and lists the WAL.
    ///
    /// # Errors
    ///
    /// The repository could not be read.
    pub async fn read(place: &Place) -> Result<Self, WalError> {
        let catalog = Catalog::read(place).await?;
        let is_locked = catalog.is_locked();
        let Catalog { backups, unreadable, newest, .. } = catalog;
        let segment_bytes = backups.last().map_or(16 << 20, |it| it.wal_segment_bytes);
        let wal = WalMap::read(place, segment_bytes).await?;
        let plain_restore = if is_locked {
            Some(NO_KEY.to_owned())
        } else {
            plain_restore(&backups, &wal, newest.as_ref())
        };
        let own_timeline = wal.own(None).ok().flatten();
        let windows = backups.into_iter().map(|commit| {
            let window = Window::of(&commit, &wal, wal.followed(&commit, own_timeline));
            (commit, window)
        });
        let unreadable = unreadable.into_iter().map(|(id, error)| (id, chain(&error).to_string()));
        Ok(Self {
            group: place.group,
            system_identifier: place.system_identifier,
            backups: windows.collect(),
            unreadable: unreadable.collect(),
            own_timeline,
            plain_restore,
        })
    }

    /// How many backups can be read.
    pub fn count(&self) -> usize {
        self.backups.len()
    }

    /// The newest of them, if it is suspect.
    pub fn suspect_newest(&self) -> Option<&BackupId> {
        let (newest, _) = self.backups.last()?;
        newest.suspect.as_ref().map(|_| &newest.backup_id)
    }

    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.unreadable.is_empty()
    }

    /// The backups that cannot be read, and why.
    pub fn unreadable(&self) -> impl Iterator<Item = (&BackupId, &str)> {
        self.unreadable.iter().map(|(id, why)| (id, why.as_str()))
    }

    /// The backups of whose own WAL something is missing.
    pub fn not_restorable(&self) -> impl Iterator<Item = &BackupId> {
        let windows = self.backups.iter().map(|(_, window)| window);
        windows.filter(|it| !it.is_consistent()).map(|it| &it.backup_id)
    }

    /// Everything, for programs.
    pub fn to_json(&self) -> Vec<Value> {
        let backups = self.backups.iter().map(|(commit, window)| backup(commit, Some(window)));
        let unreadable = self.unreadable.iter().map(|(id, error)| {
            json!({
                "backup_id": id,
                "group": self.group,
                "system_identifier": self.system_identifier.to_string(),
                "error": error,
            })
        });
        backups.chain(unreadable).collect()
    }

    /// The backups for people, oldest first; below each what is wrong with it.
    pub fn to_text(&self, now: DateTime<Utc>) -> String {
        let header = ["BACKUP", "AGE", "SIZE", "STORED", "RESTORABLE UNTIL"];
        let mut table = Table::new(&header).numbers(&[1, 2, 3]);
        for (commit, window) in &self.backups {
            table.row([
                commit.backup_id.to_string(),
                age(now - commit.finished_at),
                bytes(commit.plain_bytes()),
                bytes(commit.object_bytes()),
                until(window),
            ]);
            for note in self.notes(commit, window) {
                table.note(note);
            }
        }
        for (backup_id, error) in &self.unreadable {
            table.row([backup_id.as_str(), "?", "?", "?", "UNREADABLE"].map(str::to_owned));
            table.note(error);
        }
        let heading = heading(self.group, self.system_identifier);
        let plain_restore = self.plain_restore.as_ref().map(|it| format!("{it}\n"));
        format!("{heading}\n{table}{}", plain_restore.unwrap_or_default())
    }

    fn notes(&self, commit: &Commit, window: &Window) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(suspect) = &commit.suspect {
            let count = suspect.warnings.len();
            let warnings = match count {
                0 => String::new(),
                1 => " (1 warning of the server: list --json)".to_owned(),
                _ => format!(" ({count} warnings of the server: list --json)"),
            };
            notes.push(format!("SUSPECT: {}{warnings}", suspect.reason));
        }
        let Some(reach) = &window.reach else { return notes };
        let after = if window.is_consistent() { "then" } else { "of its own WAL" };
        match &reach.then {
            Then::Gap { segment } => {
                notes.push(format!("{after} segment {segment} is missing; see list --wal"));
            }
            Then::Conflict { segment } => {
                notes.push(format!("{after} segment {segment} has two contents"));
            }
            Then::End => {}
        }
        // One that has just begun and has no WAL yet is greater.
        if let Some(own) = self.own_timeline.filter(|own| *own > reach.timeline) {
            let timeline = reach.timeline;
            notes.push(format!(
                "timeline {own} has left it: restored only if it is asked for, by --backup or \
                 --target-timeline {timeline}"
            ));
        }
        notes
    }
}

/// What the rows below it belong to.
pub fn heading(group: u32, system_identifier: u64) -> String {
    format!("group {group}, system identifier {system_identifier}")
}

fn until(window: &Window) -> String {
    match &window.reach {
        Some(reach) if window.is_consistent() => reach.until.map_or("?".to_owned(), time),
        _ => "NOT RESTORABLE".to_owned(),
    }
}

const NO_KEY: &str = "No backup can be read with the configured keys: put the right key into its file, or add the \
     one that is missing to encryption.keys";

/// Says what a restore without a target does where that is not what the last row promises.
fn plain_restore(backups: &[Commit], wal: &WalMap, newest: Option<&BackupId>) -> Option<String> {
    newest?;
    let refused = match choose(backups, wal, &Target::End, TargetTimeline::Latest, None) {
        Ok(Choice { backup, .. }) if newest == Some(&backup.backup_id) => return None,
        Ok(Choice { backup, .. }) => {
            return Some(format!("A restore without a target takes {}", backup.backup_id));
        }
        Err(Unreachable::Suspect { .. }) => {
            "only suspect backups lead to the end of the WAL; name one with --backup".to_owned()
        }
        Err(Unreachable::LeftBehind { own, .. }) => {
            format!("no backup leads to timeline {own}, the newest; name another or a backup")
        }
        Err(Unreachable::Rivals(rivals)) => rivals.to_string(),
        Err(Unreachable::Target { .. }) if backups.is_empty() => "no backup can be read".to_owned(),
        Err(Unreachable::Target { .. } | Unreachable::Between { .. } | Unreachable::Unknown(_)) => {
            "no backup leads to the end of the WAL; give a target before what is missing".to_owned()
        }
    };
    Some(format!("A restore without a target is refused: {refused}"))
}

/// One backup, and what it can be restored to if that is known, for programs.
pub fn backup(commit: &Commit, window: Option<&Window>) -> Value {
    let reach = window.and_then(|window| window.reach.as_ref());
    let locations = commit.archives.iter().filter_map(|archive| archive.location.as_ref());
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
        "tablespaces": locations.collect::<Vec<_>>(),
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

#[cfg(test)]
mod tests {
    use tokio_postgres::types::PgLsn;

    use super::*;
    use crate::manifest::{ObjectRecord, Suspicion};
    use crate::wal::Reach;

    fn now() -> DateTime<Utc> {
        "2026-11-21T12:00:00Z".parse().unwrap()
    }

    fn listed(timeline: u32, suspect: Option<Suspicion>) -> (Commit, Window) {
        let large = 1_099_511_627_775;
        let record =
            |bytes| ObjectRecord { object_bytes: bytes, plain_bytes: bytes, salt: [0; 32] };
        let lsn = PgLsn::from(0xFFFF_FFFF_FFFF_0000);
        let commit = Commit {
            format: 1,
            backup_id: BackupId::new(now(), timeline, lsn),
            group: 12,
            system_identifier: u64::MAX,
            node: "a-node-of-a-name-that-is-long".to_owned(),
            from_standby: true,
            server_version_num: 170_000,
            wal_segment_bytes: 16 << 20,
            started_at: now(),
            finished_at: now() - chrono::TimeDelta::minutes(119),
            server_finished_at: None,
            timeline,
            start_lsn: lsn,
            end_lsn: lsn,
            suspect,
            archives: Vec::new(),
            chunk_bytes: 1,
            parts: vec![record(large)],
            manifest: record(0),
            files: record(0),
            file_count: 0,
            previous: None,
        };
        let then = Then::Gap { segment: "000000010000000000000007".to_owned() };
        let reach = Reach { timeline, until_lsn: lsn, until: Some(now()), then };
        let window = Window {
            backup_id: commit.backup_id.clone(),
            suspect: false,
            from_lsn: lsn,
            from: now(),
            reach: Some(reach),
        };
        (commit, window)
    }

    #[test]
    fn a_list_fits_a_terminal_and_says_what_is_wrong() {
        let suspicion =
            Suspicion { reason: "2 pages".to_owned(), warnings: vec![String::new(); 2] };
        let (mut lost, mut window) = listed(2, None);
        window.reach.as_mut().unwrap().until_lsn = PgLsn::from(0);
        lost.parts.clear();
        let backups = vec![listed(1, Some(suspicion)), (lost, window)];
        let unreadable = vec![(backups[0].0.backup_id.clone(), "read it: denied".to_owned())];
        let listing = Listing {
            group: 12,
            system_identifier: u64::MAX,
            backups,
            unreadable,
            own_timeline: Some(2),
            plain_restore: Some("A restore without a target is refused: why".to_owned()),
        };
        let expected = "\
group 12, system identifier 18446744073709551615
BACKUP                                          AGE         SIZE       STORED  RESTORABLE UNTIL
20261121T120000Z-00000001-FFFFFFFFFFFF0000  119 min  1024.00 GiB  1024.00 GiB  2026-11-21T12:00:00Z
    SUSPECT: 2 pages (2 warnings of the server: list --json)
    then segment 000000010000000000000007 is missing; see list --wal
    timeline 2 has left it: restored only if it is asked for, by --backup or --target-timeline 1
20261121T120000Z-00000002-FFFFFFFFFFFF0000  119 min          0 B          0 B  NOT RESTORABLE
    of its own WAL segment 000000010000000000000007 is missing; see list --wal
20261121T120000Z-00000001-FFFFFFFFFFFF0000        ?            ?            ?  UNREADABLE
    read it: denied
A restore without a target is refused: why
";
        let text = listing.to_text(now());
        assert_eq!(text, expected);
        assert!(text.lines().map(str::len).max() <= Some(100), "{text}");
    }
}
