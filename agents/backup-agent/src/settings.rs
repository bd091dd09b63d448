//! The settings of a restored server: `postgresql.auto.conf`, with what its recovery needs. Pure.

use crate::manifest::BackupId;
use crate::recovery::Target;
use crate::restore::RestoreOptions;
use crate::wal::{Reach, Then};

/// Settings of a recovery that a copy must not inherit from where the backup was taken.
const RECOVERY_SETTINGS: [&str; 6] = [
    "restore_command",
    "recovery_",
    "archive_cleanup_command",
    "primary_conninfo",
    "primary_slot_name",
    "standby_mode",
];

/// What a recovery must not take from `postgresql.conf` either, and the value that it has without.
/// PostgreSQL refuses two targets: the empty ones stand before the one that is asked for.
const WITHOUT: [(&str, &str); 8] = [
    ("recovery_target", ""),
    ("recovery_target_lsn", ""),
    ("recovery_target_name", ""),
    ("recovery_target_time", ""),
    ("recovery_target_xid", ""),
    ("recovery_target_inclusive", "on"),
    ("recovery_min_apply_delay", "0"),
    ("archive_cleanup_command", ""),
];

/// Takes the settings of a recovery out of `postgresql.auto.conf` when it has ended: a standby that is
/// built from the new primary has a copy of that file, and would stop where the recovery did. By their
/// names, because `ALTER SYSTEM` keeps no comments. PostgreSQL runs it in the data directory, and would
/// not become a primary if it ended with more than 125.
const RECOVERY_END_COMMAND: &str = "f=postgresql.auto.conf; sed -E '/^(archive_cleanup_command|\
     hot_standby|recovery_end_command|recovery_min_apply_delay|recovery_target[a-z_]*|\
     restore_command) = /d' $f >$f.pgmesh && sync $f.pgmesh && mv $f.pgmesh $f || :";

/// What our lines stand behind, with the backup's name: no line of the backup itself has that.
const MARKER: &str = "# Written by backup-agent for the restore of ";

/// Returns `postgresql.auto.conf` for the recovery of a backup: what stood there `before`, by the
/// server that was backed up or by a restore that was stopped, and the settings of this recovery.
pub(crate) fn auto_conf(
    before: &[u8],
    backup_id: &BackupId,
    reach: &Reach,
    options: &RestoreOptions,
) -> Vec<u8> {
    let marker = format!("{MARKER}{backup_id}");
    let mut text = Vec::new();
    // Bytes: a setting may be in any encoding.
    let theirs = before.split(|byte| *byte == b'\n').take_while(|line| *line != marker.as_bytes());
    for line in theirs.filter(|line| !line.is_empty() && !is_of_recovery(line)) {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.extend_from_slice(marker.as_bytes());
    text.push(b'\n');
    for (name, value) in recovery_settings(reach, options) {
        text.extend_from_slice(format!("{name} = {}\n", quoted(&value)).as_bytes());
    }
    text
}

/// Tells whether a line sets one of [`RECOVERY_SETTINGS`], or is of an earlier restore; case and
/// leading blanks do not matter.
fn is_of_recovery(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    RECOVERY_SETTINGS.iter().chain([&MARKER]).any(|name| {
        line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name.as_bytes()))
    })
}

/// A value as it stands in a configuration file. Source: `DeescapeQuotedString` in `guc-file.l`.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''").replace('\n', r"\n"))
}

/// The settings with which PostgreSQL recovers to the target, in an order that it takes.
fn recovery_settings(reach: &Reach, options: &RestoreOptions) -> Vec<(&'static str, String)> {
    let mut restore_command = options.restore_command.clone();
    if options.target != Target::End && reach.then != Then::End {
        // Only a target lets the recovery end where WAL is missing.
        restore_command = format!("{restore_command} --until {}", reach.until_lsn);
    }
    let target = match &options.target {
        Target::End => None,
        Target::Immediate => Some(("recovery_target", "immediate".to_owned())),
        Target::Time(at) => {
            let text = at.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
            Some(("recovery_target_time", text))
        }
        Target::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
        Target::Name(name) => Some(("recovery_target_name", name.clone())),
        Target::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
    };
    let is_other = |name: &str| target.as_ref().is_none_or(|(chosen, _)| *chosen != name);
    let mut settings: Vec<_> = WITHOUT
        .iter()
        .filter(|(name, _)| is_other(name))
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    settings.push(("recovery_end_command", RECOVERY_END_COMMAND.to_owned()));
    settings.push(("restore_command", restore_command));
    // A number: `latest` would take the newest in the archive, which need not descend from this
    // backup.
    settings.push(("recovery_target_timeline", reach.timeline.to_string()));
    if let Some(target) = target {
        settings.push(target);
        settings.push(("recovery_target_action", options.action.clone()));
    }
    if !options.pauses() {
        // With it, a recovery stops for good where the server's max_connections was raised.
        settings.push(("hot_standby", "off".to_owned()));
    }
    if options.archive_off {
        settings.push(("archive_mode", "off".to_owned()));
        // A subscription is in the backup with the name of its slot at the publisher: the copy would take
        // the changes that are for the server that lives on.
        settings.push(("max_logical_replication_workers", "0".to_owned()));
        // The standbys and the receiver that it names are the living server's: each commit would wait for ever.
        settings.push(("synchronous_standby_names", String::new()));
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio_postgres::types::PgLsn;

    use super::*;
    use crate::recovery::TargetTimeline;

    fn options(target: Target, archive_off: bool) -> RestoreOptions {
        RestoreOptions {
            to: PathBuf::from("/to"),
            group: 0,
            system_identifier: None,
            backup: None,
            target,
            timeline: TargetTimeline::Latest,
            action: "pause".to_owned(),
            tablespaces: Vec::new(),
            force: false,
            resume: false,
            archive_off,
            restore_command: r"'/o'\''b\agent' wal-fetch %f %p".to_owned(),
        }
    }

    /// To a restore point with a quote and a backslash in its name.
    fn to_name() -> RestoreOptions {
        options(Target::Name(r"a\b'c".to_owned()), false)
    }

    fn written(before: &str, options: &RestoreOptions, then: Then) -> String {
        let until_lsn = PgLsn::from(0x400_0000);
        let reach = Reach { timeline: 3, until_lsn, until: None, then };
        let id = "20260301T000000Z-00000001-0000000002000028".parse().unwrap();
        String::from_utf8(auto_conf(before.as_bytes(), &id, &reach, options)).unwrap()
    }

    const OURS: &str = r"# Written by backup-agent for the restore of 20260301T000000Z-00000001-0000000002000028
recovery_target = ''
recovery_target_lsn = ''
recovery_target_time = ''
recovery_target_xid = ''
recovery_target_inclusive = 'on'
recovery_min_apply_delay = '0'
archive_cleanup_command = ''
recovery_end_command = 'f=postgresql.auto.conf; sed -E ''/^(archive_cleanup_command|hot_standby|recovery_end_command|recovery_min_apply_delay|recovery_target[a-z_]*|restore_command) = /d'' $f >$f.pgmesh && sync $f.pgmesh && mv $f.pgmesh $f || :'
restore_command = '''/o''\\''''b\\agent'' wal-fetch %f %p'
recovery_target_timeline = '3'
recovery_target_name = 'a\\b''c'
recovery_target_action = 'pause'
";

    /// What stays of them in a copy.
    const COPY: &str = "archive_mode = 'off'\nmax_logical_replication_workers = '0'\n\
                        synchronous_standby_names = ''\n";

    #[test]
    fn the_settings_hold_the_target_and_no_other() {
        assert_eq!(written("", &to_name(), Then::End), OURS);
        let gap = Then::Gap { segment: "000000010000000000000004".to_owned() };
        assert!(written("", &to_name(), gap).contains("wal-fetch %f %p --until 0/4000000'\n"));
    }

    #[test]
    fn the_commits_of_a_copy_wait_for_nobody_and_those_of_a_replacement_as_before() {
        let before = "synchronous_standby_names = 'ANY 1 (postgres_2, pgmesh_backup)'\n";
        for (archive_off, last) in
            [(true, "synchronous_standby_names = ''"), (false, before.trim_end())]
        {
            let text = written(before, &options(Target::Immediate, archive_off), Then::End);
            let mut set = text.lines().filter(|line| line.starts_with("synchronous_standby_names"));
            assert_eq!(set.next_back(), Some(last), "{text}");
        }
    }

    #[test]
    fn without_a_target_all_five_are_empty() {
        let text = written("", &options(Target::End, true), Then::End);
        for name in ["", "_lsn", "_name", "_time", "_xid"] {
            assert!(text.contains(&format!("\nrecovery_target{name} = ''\n")), "{name}: {text}");
        }
        assert!(!text.contains("recovery_target_action"), "{text}");
        assert!(text.ends_with(COPY), "{text}");
    }

    #[test]
    fn recovery_settings_of_the_server_are_left_out() {
        let kept = ["# Do not edit this file manually!", "work_mem = '5MB'", "standby_x = '1'"];
        let left_out = [
            "",
            "primary_conninfo = 'host=a'",
            "  Recovery_Target_Xid = '1'",
            "# Written by backup-agent for the restore of another",
        ];
        let before = [&kept[..2], &left_out, &kept[2..]].concat().join("\n");
        let expected = format!("{}\n{OURS}", kept.join("\n"));
        assert_eq!(written(&before, &to_name(), Then::End), expected);
    }

    /// Every standby that was built from a restored primary hung.
    #[test]
    fn what_a_recovery_needs_is_gone_when_it_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("postgresql.auto.conf");
        let run = || {
            let mut command = std::process::Command::new("/bin/sh");
            command.args(["-c", RECOVERY_END_COMMAND]).current_dir(directory.path());
            assert!(command.status().unwrap().success());
        };
        run();
        let promote = RestoreOptions { action: "promote".to_owned(), ..to_name() };
        let promote = RestoreOptions { archive_off: true, ..promote };
        let text = written("hot_standby_feedback = 'on'\nwork_mem = '5MB'\n", &promote, Then::End);
        assert!(text.contains("\nhot_standby = 'off'\n"), "{text}");
        std::fs::write(&file, &text).unwrap();
        run();
        let (marker, _) = OURS.split_once('\n').unwrap();
        let left = format!("hot_standby_feedback = 'on'\nwork_mem = '5MB'\n{marker}\n{COPY}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), left);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// A restore that was killed while it wrote to disk left `archive_mode = 'off'` to the one that
    /// went on with `--archive-mode preserve`.
    #[test]
    fn a_restore_that_goes_on_leaves_nothing_of_the_one_that_was_stopped() {
        let theirs = "work_mem = '5MB'\narchive_mode = 'on'\n";
        let stopped = written(theirs, &options(Target::Immediate, true), Then::End);
        let resumed = written(&stopped, &to_name(), Then::End);
        assert_eq!(resumed, written(theirs, &to_name(), Then::End));
    }
}
