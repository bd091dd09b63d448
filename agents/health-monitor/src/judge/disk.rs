//! How full a file system is, and what it comes to.

use super::silent::no_answer;
use super::words::{bytes, percent};
use crate::catalogue::DISK;
use crate::check::Reading;
use crate::component::Component;
use crate::facts::Seen;
use crate::probe::disk::DiskFacts;
use crate::thresholds::Scale;

/// The reading of one file system, if it was ever asked for.
pub fn judge(component: &Component, seen: &Seen<DiskFacts>, scale: Scale<'_>) -> Vec<Reading> {
    if let Some(reading) = no_answer(&DISK, seen) {
        return vec![reading];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let DiskFacts { free_bytes, bytes: size, free_inodes, inodes } = *facts;
    let used = percent(size.saturating_sub(free_bytes), size);
    let used_inodes = percent(inodes.saturating_sub(free_inodes), inodes);
    let reading = if used < used_inodes {
        let reason = format!("{free_inodes} of {inodes} inodes are free");
        scale.judge(component, &DISK, ("used_inodes", used_inodes, None), reason)
    } else {
        let reason = format!("{} of {} are free", bytes(free_bytes), bytes(size));
        scale.judge(component, &DISK, ("used", used, None), reason)
    };
    vec![reading]
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed, scale};
    use super::*;
    use crate::check::Status;
    use crate::component::Kind;
    use crate::facts::Stage;

    #[test]
    fn space_or_inodes_whatever_is_scarcer() {
        let component = Component::new(Kind::Disk, "data");
        let disk = |free_bytes, free_inodes, inodes| {
            answered(DiskFacts { free_bytes, bytes: 100 << 30, free_inodes, inodes })
        };
        for (seen, status, reason) in [
            (disk(50 << 30, 90, 100), Status::Ok, "50.0 GiB of 100.0 GiB are free"),
            (disk(14 << 30, 90, 100), Status::Warning, "14.0 GiB of 100.0 GiB are free"),
            (disk(0, 90, 100), Status::Critical, "0 bytes of 100.0 GiB are free"),
            (disk(50 << 30, 4, 100), Status::Critical, "4 of 100 inodes are free"),
            (disk(50 << 30, 0, 0), Status::Ok, "50.0 GiB of 100.0 GiB are free"),
            (
                failed(Stage::Answer, "/data: No such file or directory"),
                Status::Critical,
                "/data: No such file or directory",
            ),
        ] {
            let found = judge(&component, &seen, scale());
            assert_eq!((found[0].status, found[0].reason.as_str()), (status, reason));
        }
    }
}
