//! A value that whoever leads next finds as it was.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::telemetry::chain;
use tokio::time::sleep;
use tracing::{info, warn};

use super::store::{Store, StoreError, json, parse};

/// After a failure to read or write.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// A value of the leader's, and what of it is kept.
#[derive(Debug)]
pub(super) struct Kept<T> {
    /// The value.
    pub(super) value: T,
    name: String,
    /// What was read or written last.
    stored: Option<String>,
    /// The value is newer.
    is_ahead: bool,
    is_failing: bool,
}

impl<T: Default + Serialize + DeserializeOwned> Kept<T> {
    pub(super) fn new(name: String) -> Self {
        Self { value: T::default(), name, stored: None, is_ahead: false, is_failing: false }
    }

    /// Takes up what is kept, when this replica begins to lead. If that is what this replica has kept
    /// itself, and it knows more by now, nobody else has led since, and what it knows counts.
    pub(super) async fn begin(&mut self, store: &Store) {
        let found = loop {
            match store.load(&self.name).await {
                Ok(found) => break found,
                Err(error) => self.failed(&error, "what was told cannot be read: nobody is told"),
            }
            sleep(RETRY).await;
        };
        self.is_failing = false;
        if self.is_ahead && found == self.stored {
            return self.save(store).await;
        }
        let read = found.as_ref().map(|it| parse(&self.name, it.as_bytes())).transpose();
        self.value = read
            .unwrap_or_else(|error| {
                warn!(error = %chain(&error), "what was told is not known: it may be told twice");
                None
            })
            .unwrap_or_default();
        (self.stored, self.is_ahead) = (found, false);
    }

    /// Keeps the value; if that fails it is still to be kept.
    pub(super) async fn save(&mut self, store: &Store) {
        self.is_ahead = true;
        let text = json(&self.value);
        match store.save(&self.name, &text).await {
            Ok(()) => {
                if std::mem::take(&mut self.is_failing) {
                    info!(name = self.name, "what was told is kept again");
                }
                (self.stored, self.is_ahead) = (Some(text), false);
            }
            Err(error) => self.failed(&error, "what was told cannot be kept"),
        }
    }

    /// Notes that the value is still to be kept.
    pub(super) fn keep_later(&mut self) {
        self.is_ahead = true;
    }

    /// Whether the value is still to be kept.
    pub(super) fn is_ahead(&self) -> bool {
        self.is_ahead
    }

    fn failed(&mut self, error: &StoreError, what: &'static str) {
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(name = self.name, error = %chain(error), "{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn kept(store: &Store) -> Kept<Vec<u32>> {
        let mut kept = Kept::new("told/x".to_owned());
        kept.begin(store).await;
        kept
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_finds_what_was_kept_and_the_same_replica_what_it_knows() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::Directory(directory.path().to_owned());
        let mut one = kept(&store).await;
        assert!(one.value.is_empty());
        one.value.push(1);
        one.save(&store).await;
        let mut two = kept(&store).await;
        assert_eq!(two.value, [1]);

        // What could not be written is still known to who wanted to write it.
        let away = Store::Directory(directory.path().join("absent"));
        one.value.push(2);
        one.save(&away).await;
        assert!(one.is_ahead());
        one.begin(&store).await;
        assert_eq!(one.value, [1, 2]);
        assert_eq!(kept(&store).await.value, [1, 2]);

        // Somebody else has led meanwhile.
        one.value.push(3);
        one.save(&away).await;
        two.value.push(9);
        two.save(&store).await;
        one.begin(&store).await;
        assert_eq!(one.value, [1, 9]);
    }

    #[tokio::test]
    async fn what_cannot_be_understood_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::Directory(directory.path().to_owned());
        store.save("told/x", "{\"old\": 1}").await.unwrap();
        assert!(kept(&store).await.value.is_empty());
    }
}
