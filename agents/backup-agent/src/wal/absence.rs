//! What a missing file proves: that it was never produced, or that it is lost.

use shared::pg::wal::{Segment, WalFile, segment_number};

use super::map::{histories, pieces_since};
use super::{WalError, find, list_some, stem};
use crate::repository::Place;

/// What the repository proves about a file that PostgreSQL asks for and that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// It was never produced, as far as anything in the repository can tell: recovery has
    /// reached the end, or is to look on another timeline.
    NeverProduced,
    /// It was produced or may have been: there is WAL after it, or this is where it should be.
    Missing {
        /// Why it must have been there.
        reason: String,
    },
}

/// Decides whether an absent file was never produced.
///
/// # Errors
///
/// The store could not be asked, or a history file is damaged: then nothing is proven.
pub async fn absence(place: &Place, file: &str, segment_bytes: u64) -> Result<Absence, WalError> {
    // An empty place proves nothing: it is a missing mount, or another cluster's name.
    if place.list("", None, Some(1)).await?.is_empty() {
        let reason = "the repository holds nothing of this server: wrong mount, bucket, prefix, \
                      cluster name or group?"
            .to_owned();
        return Ok(Absence::Missing { reason });
    }
    let segment = match WalFile::parse(file, segment_bytes)? {
        WalFile::Segment(segment) => segment,
        // No history file, no such timeline: the list is the proof.
        WalFile::History { .. } | WalFile::Partial(_) | WalFile::BackupLabel { .. } => {
            return Ok(Absence::NeverProduced);
        }
    };
    // Where the segment before this one would be stored.
    let before = Segment { number: segment.number.saturating_sub(1), ..segment };
    let mut before_is_on = before.timeline;
    for (child, history) in histories(place).await? {
        for entry in &history {
            let ends_in = segment_number(entry.switch_lsn, segment_bytes);
            if child == segment.timeline && segment.number < ends_in {
                // Recovery asks on the newest timeline first; this is an older one's.
                return Ok(Absence::NeverProduced);
            }
            if child == segment.timeline && before.number < ends_in {
                before_is_on = before_is_on.min(entry.timeline);
            }
            if entry.timeline == segment.timeline && segment.number < ends_in {
                let reason = format!(
                    "timeline {child} branched off timeline {} after it, at {}",
                    segment.timeline, entry.switch_lsn
                );
                return Ok(Absence::Missing { reason });
            }
        }
    }
    let timeline_prefix = format!("wal/{}/", &file[..8]);
    let later = list_some(place, &timeline_prefix, &stem(file), Some(1)).await?;
    let pieces = pieces_since(place, before, segment_bytes).await?;
    let later_piece =
        pieces.keys().find(|it| it.timeline == segment.timeline && it.number >= segment.number);
    let later = later.into_iter().next().map(|later| later.file);
    if let Some(later) = later.or(later_piece.map(|later| later.name(segment_bytes))) {
        let reason = if later == file {
            "its first piece is missing, and a later one is stored".to_owned()
        } else {
            format!("{later} is stored, which is after it")
        };
        return Ok(Absence::Missing { reason });
    }
    // The end of the WAL comes after something. Without it, this may as well be a hole.
    let before_segment = Segment { timeline: before_is_on, ..before };
    let before = before_segment.name(segment_bytes);
    if !pieces.contains_key(&before_segment) && find(place, &before).await?.is_empty() {
        let reason = format!("{before}, which is before it, is missing too");
        return Ok(Absence::Missing { reason });
    }
    Ok(Absence::NeverProduced)
}
