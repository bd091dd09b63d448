//! Whether this host's clock is to be believed, before anything goes because of its age.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use shared::pg::connect::connect;
use shared::store::{StoreError, StoreErrorKind};
use shared::telemetry::chain;
use shared::topology::observe_group;
use thiserror::Error;
use tracing::warn;

use crate::backup::Context;
use crate::container::Kind;
use crate::repository::{Place, RepositoryError};

/// How far two clocks may be apart. A clock that is wrong makes what is kept shorter by no more than
/// that; S3 itself refuses the requests of one that is further off.
pub const APART_MAX: TimeDelta = TimeDelta::minutes(15);

/// Why this host's clock is not believed.
#[derive(Debug, Error)]
pub enum ClockError {
    /// Another one says something else.
    #[error(
        "this host's clock says {}, {whose} says {}: nothing goes by its age while they are more than \
         {} min apart. Set the one that is wrong (NTP), then run `backup-agent expire --apply`, or leave \
         it to the next scheduled backup", time(.ours), time(.theirs), APART_MAX.num_minutes()
    )]
    Apart {
        /// Whose.
        whose: String,
        /// What ours says.
        ours: DateTime<Utc>,
        /// What that one says.
        theirs: DateTime<Utc>,
    },
    /// The repository could not be asked.
    #[error("ask the repository for its time")]
    Repository(#[from] RepositoryError),
}

fn time(at: &DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Compares this host's clock with the repository's, and with that of the group's primary if there is a
/// `context` to reach one with and it answers.
///
/// # Errors
///
/// They are too far apart; or the repository could not be asked.
pub async fn require(place: &Place, context: Option<&Context>) -> Result<(), ClockError> {
    let before = Utc::now();
    match stored_now(place).await {
        Ok(theirs) => compare("the repository's", before, theirs, Utc::now())?,
        // What goes makes the room that is missing.
        Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::Full => {
            warn!(error = %chain(&error), "the repository is full: its clock could not be asked");
        }
        Err(error) => return Err(error.into()),
    }
    let Some(context) = context.filter(|it| it.config.has_servers()) else { return Ok(()) };
    let before = Utc::now();
    match primarys_time(context, place.group).await {
        Ok(theirs) => compare("the primary's", before, theirs, Utc::now()),
        // It may be lost for good, and the room is needed still.
        Err(error) => {
            warn!(group = place.group, error, "the primary's clock could not be asked");
            Ok(())
        }
    }
}

/// When the repository says that an object was stored, which is stored now.
///
/// # Errors
///
/// The repository could not be asked.
pub(crate) async fn stored_now(place: &Place) -> Result<DateTime<Utc>, RepositoryError> {
    let name = format!("probe/{}", Utc::now().format("%Y%m%dT%H%M%S%.9fZ"));
    place.put(Kind::Probe, &name, b"clock", 1).await?;
    let key = place.key(&name);
    let found = place.store().head(&key).await?;
    match place.store().delete(&key).await {
        // Object Lock: it lies there, and harms nobody.
        Err(error) if error.kind != StoreErrorKind::Denied => return Err(error.into()),
        _ => {}
    }
    let info = found.ok_or_else(|| StoreError {
        operation: "head",
        key,
        kind: StoreErrorKind::NotFound,
        source: "it was stored a moment ago".into(),
    })?;
    Ok(info.modified_at)
}

/// What the clock of a group's primary says, or why nobody knows.
async fn primarys_time(context: &Context, group: u32) -> Result<DateTime<Utc>, String> {
    let nodes = context.topology.nodes().await.map_err(|error| chain(&error).to_string())?;
    let observed = observe_group(&context.settings, &nodes, group).await;
    let (node, _) = observed.primary().map_err(|error| error.to_string())?;
    let connection =
        connect(&context.settings, node).await.map_err(|error| chain(&error).to_string())?;
    let row = connection.query_one("SELECT clock_timestamp()", &[]).await;
    Ok(row.map_err(|error| chain(&error).to_string())?.get(0))
}

/// Compares what a clock said between two moments of ours. Pure.
fn compare(
    whose: &str,
    before: DateTime<Utc>,
    theirs: DateTime<Utc>,
    after: DateTime<Utc>,
) -> Result<(), ClockError> {
    if theirs - after <= APART_MAX && before - theirs <= APART_MAX {
        return Ok(());
    }
    Err(ClockError::Apart { whose: whose.to_owned(), ours: after, theirs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_believed_if_another_one_says_about_the_same() {
        let at = |minute| DateTime::UNIX_EPOCH + TimeDelta::minutes(minute);
        for (case, before, theirs, after, is_believed) in [
            ("the same", 100, 100, 100, true),
            ("a slow answer", 100, 150, 200, true),
            ("a little behind", 100, 85, 100, true),
            ("a little ahead", 100, 115, 100, true),
            ("a slow answer, and a little ahead", 100, 215, 200, true),
            ("behind", 100, 84, 100, false),
            ("ahead", 100, 116, 100, false),
            ("a slow answer, and ahead", 100, 216, 200, false),
            ("days ahead", 100, 60_000, 100, false),
            ("no time at all", 100_000_000, 0, 100_000_000, false),
        ] {
            let compared = compare("the store's", at(before), at(theirs), at(after));
            assert_eq!(compared.is_ok(), is_believed, "{case}");
        }
    }
}
