//! What must outlive this replica: in etcd, or without one in a directory, or nowhere.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::Utc;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::etcd::{Etcd, EtcdError, Watch};
use shared::telemetry::chain;
use thiserror::Error;
use tokio::fs;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::silence::Silence;

/// Between two looks at the directory, and after etcd did not answer.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A write that takes longer is a failure.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Silences are files, or keys, of this name and their own.
const SILENCE: &str = "silence";

/// Why something was not kept or read.
#[derive(Debug, Error)]
pub enum StoreError {
    /// etcd did not do it.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The file system did not.
    #[error("{what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It was written by something else.
    #[error("{name} cannot be read")]
    Broken {
        /// What it is.
        name: String,
        /// What was wrong.
        source: serde_json::Error,
    },
    /// There is nothing to keep it in.
    #[error("set [etcd] or state_directory: silences are kept there")]
    Nowhere,
}

/// Where things are kept.
#[derive(Clone, Debug)]
pub enum Store {
    /// In keys below a prefix that ends with a slash.
    Etcd(Etcd, String),
    /// In files of a directory.
    Directory(PathBuf),
    /// In this process only.
    Nowhere,
}

impl Store {
    /// In etcd, otherwise in the directory.
    pub fn new(etcd: Option<Etcd>, directory: Option<&Path>, cluster: &str) -> Self {
        match (etcd, directory) {
            (Some(etcd), _) => Self::Etcd(etcd, format!("/pgmesh/{cluster}/health/")),
            (None, Some(directory)) => Self::Directory(directory.to_owned()),
            (None, None) => Self::Nowhere,
        }
    }

    /// What was kept under a name, as text.
    ///
    /// # Errors
    ///
    /// It cannot be read now.
    pub async fn load(&self, name: &str) -> Result<Option<String>, StoreError> {
        match self {
            Self::Nowhere => Ok(None),
            Self::Etcd(etcd, prefix) => {
                let found = etcd.get(&format!("{prefix}{name}")).await?;
                Ok(found.map(|it| String::from_utf8_lossy(&it.value).into_owned()))
            }
            Self::Directory(directory) => {
                let path = file(directory, name);
                match fs::read_to_string(&path).await {
                    Ok(text) => Ok(Some(text)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(StoreError::File { what: "read", path, source }),
                }
            }
        }
    }

    /// Keeps a text under a name.
    ///
    /// # Errors
    ///
    /// It could not be written, or not in time.
    pub async fn save(&self, name: &str, text: &str) -> Result<(), StoreError> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Etcd(etcd, prefix) => {
                Ok(etcd.put(&format!("{prefix}{name}"), text, None).await?)
            }
            Self::Directory(directory) => write(file(directory, name), text).await,
        }
    }

    /// Whether nothing of it answers, so that nobody else can know more than this replica does.
    pub async fn is_away(&self) -> bool {
        match self {
            Self::Etcd(etcd, prefix) => {
                matches!(etcd.get(prefix).await, Err(EtcdError::Unreachable { .. }))
            }
            Self::Directory(_) | Self::Nowhere => false,
        }
    }

    /// Makes a silence.
    ///
    /// # Errors
    ///
    /// It could not be written.
    pub async fn add_silence(&self, silence: &Silence) -> Result<(), StoreError> {
        let text = json(silence);
        match self {
            Self::Nowhere => Err(StoreError::Nowhere),
            Self::Etcd(etcd, prefix) => {
                let length = (silence.until - silence.since).to_std().unwrap_or_default();
                // The lease cleans up. When a silence ends is said by itself: after an election a
                // lease begins anew.
                let (lease, _) = etcd.grant(length.max(LOOK_EVERY)).await?;
                Ok(etcd
                    .put(&format!("{prefix}{SILENCE}/{}", silence.id), &text, Some(lease))
                    .await?)
            }
            Self::Directory(directory) => {
                write(file(directory, &format!("{SILENCE}-{}", silence.id)), &text).await
            }
        }
    }

    /// The silences that last, the newest last.
    ///
    /// # Errors
    ///
    /// They cannot be read.
    pub async fn silences(&self) -> Result<Vec<Silence>, StoreError> {
        let mut all = Vec::new();
        match self {
            Self::Nowhere => return Err(StoreError::Nowhere),
            Self::Etcd(etcd, prefix) => {
                for entry in etcd.list(&format!("{prefix}{SILENCE}/")).await?.entries {
                    all.extend(read(&entry.key, &entry.value));
                }
            }
            Self::Directory(directory) => {
                for (path, bytes) in silence_files(directory).await? {
                    all.extend(read(&path.display().to_string(), &bytes));
                }
            }
        }
        all.retain(|it: &Silence| it.is_active(Utc::now()));
        all.sort_by(|a, b| (a.since, &a.id).cmp(&(b.since, &b.id)));
        Ok(all)
    }

    /// Ends a silence; tells whether there was one.
    ///
    /// # Errors
    ///
    /// It could not be deleted.
    pub async fn remove_silence(&self, id: &str) -> Result<bool, StoreError> {
        // What stands after this is a name.
        if id.is_empty() || !id.bytes().all(|it| it.is_ascii_alphanumeric()) {
            return Ok(false);
        }
        match self {
            Self::Nowhere => Err(StoreError::Nowhere),
            Self::Etcd(etcd, prefix) => {
                let key = format!("{prefix}{SILENCE}/{id}");
                let Some(found) = etcd.get(&key).await? else { return Ok(false) };
                Ok(etcd.delete(&key, found.create_revision).await?)
            }
            Self::Directory(directory) => {
                let path = file(directory, &format!("{SILENCE}-{id}"));
                match fs::remove_file(&path).await {
                    Ok(()) => Ok(true),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                    Err(source) => Err(StoreError::File { what: "delete", path, source }),
                }
            }
        }
    }

    fn silence_changes(&self) -> Option<Watch> {
        match self {
            Self::Etcd(etcd, prefix) => Some(etcd.watch(&format!("{prefix}{SILENCE}/"))),
            Self::Directory(_) | Self::Nowhere => None,
        }
    }

    /// Publishes the silences for ever, the first as soon as it was tried to read them. While they cannot be
    /// read the last known count.
    pub async fn follow_silences(&self, publish: &watch::Sender<Option<Vec<Silence>>>) {
        if matches!(self, Self::Nowhere) {
            publish.send_replace(Some(Vec::new()));
            return std::future::pending().await;
        }
        let mut changes = self.silence_changes();
        let mut is_failing = false;
        loop {
            let heard = match &mut changes {
                Some(changes) => changes.next().await.map(drop).map_err(StoreError::from),
                None => Ok(()),
            };
            let silences = match heard {
                Ok(()) => self.silences().await,
                Err(error) => Err(error),
            };
            match silences {
                Ok(silences) => {
                    is_failing = false;
                    publish.send_if_modified(|known| {
                        let silences = Some(silences);
                        let is_new = *known != silences;
                        *known = silences;
                        is_new
                    });
                    if changes.is_some() {
                        continue;
                    }
                }
                Err(error) => {
                    publish.send_if_modified(|known| known.get_or_insert_default().is_empty());
                    // The change that was heard of is not known yet: a new watch begins with all.
                    changes = self.silence_changes();
                    if !std::mem::replace(&mut is_failing, true) {
                        warn!(error = %chain(&error), "silences cannot be read: the last known count");
                    }
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// JSON of what is known to have no parts that cannot be written.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Reads JSON that belongs to `name`.
pub(crate) fn parse<T: DeserializeOwned>(name: &str, text: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(text)
        .map_err(|source| StoreError::Broken { name: name.to_owned(), source })
}

/// One that cannot be read silences nothing.
fn read(name: &str, text: &[u8]) -> Option<Silence> {
    match parse(name, text) {
        Ok(silence) => Some(silence),
        Err(error) => {
            debug!(error = %chain(&error), "silence left out");
            None
        }
    }
}

fn file(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("health-{}.json", name.replace('/', "-")))
}

/// Writes a file that is there as a whole or as it was before.
async fn write(path: PathBuf, text: &str) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    let written = timeout(WRITE_LIMIT, async {
        fs::write(&new, text).await?;
        fs::File::open(&new).await?.sync_all().await?;
        fs::rename(&new, &path).await
    });
    let outcome = written.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    outcome.map_err(|source| StoreError::File { what: "write", path, source })
}

/// The files of silences. Those that ended long ago are deleted on the way.
async fn silence_files(directory: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, StoreError> {
    let failed =
        |path: &Path, source| StoreError::File { what: "read", path: path.to_owned(), source };
    let mut listing = fs::read_dir(directory).await.map_err(|error| failed(directory, error))?;
    let mut files = Vec::new();
    loop {
        let entry = listing.next_entry().await.map_err(|error| failed(directory, error))?;
        let Some(entry) = entry else { return Ok(files) };
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&format!("health-{SILENCE}-"))
            || entry.path().extension().is_none_or(|it| it != "json")
        {
            continue;
        }
        let path = entry.path();
        match fs::read(&path).await {
            Ok(bytes) => {
                let ended =
                    parse::<Silence>(&name, &bytes).is_ok_and(|it| !it.is_active(Utc::now()));
                if ended {
                    fs::remove_file(&path).await.ok();
                } else {
                    files.push((path, bytes));
                }
            }
            // Ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_keeps_texts_and_silences() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(None, Some(directory.path()), "demo");
        assert_eq!(store.load("told/chat").await.unwrap(), None);
        store.save("told/chat", "[1]").await.unwrap();
        store.save("told/chat", "[2]").await.unwrap();
        assert_eq!(store.load("told/chat").await.unwrap().as_deref(), Some("[2]"));

        let silence = |length| {
            Silence::new(Utc::now(), Duration::from_secs(length), vec!["etcd".to_owned()])
                .with("disks".to_owned(), None)
        };
        let (first, second, over) = (silence(60), silence(90), silence(0));
        for it in [&first, &second, &over] {
            store.add_silence(it).await.unwrap();
        }
        std::fs::write(directory.path().join("health-silence-x.json"), "no").unwrap();
        assert_eq!(store.silences().await.unwrap(), [first.clone(), second.clone()]);
        assert!(store.remove_silence(&first.id).await.unwrap());
        assert!(!store.remove_silence(&first.id).await.unwrap());
        assert!(!store.remove_silence("../x").await.unwrap());
        assert_eq!(store.silences().await.unwrap(), [second]);
    }

    #[tokio::test]
    async fn without_a_place_nothing_is_silenced() {
        let store = Store::new(None, None, "demo");
        store.save("x", "y").await.unwrap();
        assert_eq!(store.load("x").await.unwrap(), None);
        let silence = Silence::new(Utc::now(), Duration::from_secs(1), vec![]);
        let error = store.add_silence(&silence).await.unwrap_err();
        assert_eq!(error.to_string(), "set [etcd] or state_directory: silences are kept there");
    }
}
