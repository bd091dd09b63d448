//! The timelines from whose primary was received. A history or WAL of one says less: the archiver of a
//! server that nobody has looked at may have stored them.

use std::collections::BTreeSet;

use crate::container::Kind;
use crate::repository::{Place, RepositoryError};

const FOLDER: &str = "followed/";

/// What a timeline's mark is called.
pub(crate) fn name(timeline: u32) -> String {
    format!("{FOLDER}{timeline:08X}")
}

/// Marks a timeline; the same again is fine.
pub(crate) async fn mark(place: &Place, timeline: u32) -> Result<(), RepositoryError> {
    place.put_once(Kind::Followed, &name(timeline), b"").await
}

/// The timelines that are marked.
pub(super) async fn list(place: &Place) -> Result<BTreeSet<u32>, RepositoryError> {
    let marks = place.list(FOLDER, None, None).await?;
    let timeline = |key: &str| u32::from_str_radix(key.strip_prefix(FOLDER)?, 16).ok();
    Ok(marks.iter().filter_map(|mark| timeline(&mark.key)).collect())
}
