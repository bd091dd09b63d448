//! Object storage: an S3 bucket, or a directory that behaves like one.
//!
//! Every object is written once, under a name nobody wrote before, and never changed. A bucket
//! under Object Lock is therefore enough, and two writers cannot harm each other: where the store
//! honours `If-None-Match: *` the second writer of a name is told so, and where it does not
//! ([`Put::Created`] twice), callers use names that no other content can have.

mod directory;
mod s3;

use std::error::Error;
use std::ops::Range;
use std::path::PathBuf;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::Deserialize;
use thiserror::Error;

use crate::config::Problems;

use directory::Directory;
pub use s3::S3Config;

/// Objects that are deleted at once where each takes a request.
const DELETES_AT_ONCE: usize = 8;

/// Where objects are kept. Cloning is cheap and shares the connections.
#[derive(Clone, Debug)]
pub struct ObjectStore(Variant);

#[derive(Clone, Debug)]
enum Variant {
    Directory(Directory),
    S3(s3::S3),
}

/// Which store, as the operator writes it: exactly one of `directory` and `s3`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Put before every key, without slashes at its ends; empty for none.
    #[serde(default)]
    pub prefix: String,
    /// Keep objects as files below a directory.
    pub directory: Option<DirectoryConfig>,
    /// Keep objects in a bucket.
    pub s3: Option<S3Config>,
}

/// A directory as a store.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectoryConfig {
    /// The directory; it must exist, so that a missing mount is not mistaken for an empty store.
    pub path: PathBuf,
}

/// What the store knows about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// The key, without the configured prefix.
    pub key: String,
    /// The size in bytes.
    pub bytes: u64,
    /// When it was written, by the store's clock.
    pub modified_at: DateTime<Utc>,
}

/// What became of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object is stored with exactly this content.
    Created,
    /// The name is taken by other content; nothing was written.
    Exists,
}

/// A multipart upload that was begun and neither completed nor aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The key it would have become, without the configured prefix.
    pub key: String,
    /// What the store calls it.
    pub upload_id: String,
    /// When it began, by the store's clock; `None` where the store does not say.
    pub started_at: Option<DateTime<Utc>>,
}

/// What kind of trouble an operation had: what a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// No such object, bucket or upload.
    NotFound,
    /// Credentials or permissions do not allow it, or Object Lock forbids it.
    Denied,
    /// The store did not answer, answered 429 or 5xx, or the connection broke, retries included.
    Unavailable,
    /// No room left.
    Full,
    /// What arrived is not what was sent: length or checksum differ.
    Corrupt,
    /// The store does not know this operation.
    Unsupported,
    /// Anything else: a request the store refuses for good.
    Refused,
}

/// What is to be read of an object.
#[derive(Clone, Debug)]
enum Wanted {
    /// All of it, unless it is longer.
    Whole { bytes_max: u64 },
    /// These bytes.
    Range(Range<u64>),
}

impl Wanted {
    /// Why an object, or what the store sends of it, is not read.
    fn refuse(&self, bytes: u64) -> Option<String> {
        let bytes_max = match self {
            Self::Whole { bytes_max } => *bytes_max,
            Self::Range(range) => range.end.saturating_sub(range.start),
        };
        (bytes > bytes_max)
            .then(|| format!("it has {bytes} bytes, expected {bytes_max} at most: it is not read"))
    }
}

/// An operation on the store that failed.
#[derive(Debug, Error)]
#[error("{operation} {key}")]
pub struct StoreError {
    /// What was tried: `get`, `put`, `list`, …
    pub operation: &'static str,
    /// The key or prefix, without the configured prefix.
    pub key: String,
    /// What kind of trouble it was.
    pub kind: StoreErrorKind,
    /// What the store or the operating system said.
    pub source: Box<dyn Error + Send + Sync>,
}

impl StoreError {
    /// Tells whether the same operation may succeed if tried again soon.
    pub fn is_transient(&self) -> bool {
        match self.kind {
            StoreErrorKind::Unavailable | StoreErrorKind::Corrupt => true,
            StoreErrorKind::NotFound
            | StoreErrorKind::Denied
            | StoreErrorKind::Full
            | StoreErrorKind::Unsupported
            | StoreErrorKind::Refused => false,
        }
    }
}

/// A part that was uploaded, to be named when the upload is completed.
#[derive(Clone, Debug)]
pub struct UploadedPart {
    number: u32,
    bytes: u64,
    etag: Option<String>,
    checksum: Option<String>,
}

/// A multipart upload under way. Dropping it leaves an [`Unfinished`] upload behind, which
/// [`ObjectStore::unfinished`] finds.
#[derive(Clone, Debug)]
pub struct Upload {
    store: ObjectStore,
    key: String,
    id: String,
    part_bytes: u64,
}

/// A key of S3 has 1024 bytes at most, and what stands behind the prefix needs its own.
/// Source: Amazon S3 User Guide, "Naming Amazon S3 objects".
const PREFIX_BYTES_MAX: usize = 512;

impl StoreConfig {
    /// Adds every problem with these keys.
    pub fn check(&self, problems: &mut Problems) {
        match (&self.directory, &self.s3) {
            (Some(directory), None) => {
                if !directory.path.is_absolute() {
                    problems.add("repository.directory.path", "must be an absolute path");
                }
            }
            (None, Some(s3)) => s3.check(problems),
            (None, None) => {
                problems.add("repository", "needs [repository.s3] or [repository.directory]");
            }
            (Some(_), Some(_)) => {
                problems.add(
                    "repository",
                    "has both [repository.s3] and [repository.directory]; keep one",
                );
            }
        }
        if self.prefix.starts_with('/') || self.prefix.ends_with('/') || self.prefix.contains("//")
        {
            problems.add("repository.prefix", "must not begin or end with a slash");
        }
        if self.prefix.len() > PREFIX_BYTES_MAX {
            let len = self.prefix.len();
            let problem = format!("{len} bytes; must be at most {PREFIX_BYTES_MAX}");
            problems.add("repository.prefix", problem);
        }
        if self.prefix.split('/').any(|part| matches!(part, "." | ".."))
            || self.prefix.contains(char::is_control)
        {
            problems.add(
                "repository.prefix",
                "must not have a part `.` or `..`, nor a control character",
            );
        }
    }
}

impl ObjectStore {
    /// Opens the configured store. Nothing is asked of it yet.
    ///
    /// # Errors
    ///
    /// A credential or CA file that cannot be read, or a configuration that [`StoreConfig::check`]
    /// would have refused.
    pub async fn open(config: &StoreConfig) -> anyhow::Result<Self> {
        let variant = match (&config.directory, &config.s3) {
            (Some(directory), None) => {
                Variant::Directory(Directory::new(&directory.path, &config.prefix))
            }
            (None, Some(s3)) => Variant::S3(s3::S3::open(s3, &config.prefix).await?),
            _ => anyhow::bail!("needs exactly one of [repository.s3] and [repository.directory]"),
        };
        Ok(Self(variant))
    }

    /// The same store for work that must not go on elsewhere: from now on, what is not where it is
    /// now is refused. Only a directory can be exchanged for another one, by a mount that goes away.
    ///
    /// # Errors
    ///
    /// The directory is not there.
    pub async fn pinned(&self) -> Result<Self, StoreError> {
        Ok(Self(match &self.0 {
            Variant::Directory(directory) => Variant::Directory(directory.pinned().await?),
            Variant::S3(s3) => Variant::S3(s3.clone()),
        }))
    }

    /// Says where this is, for people: `s3://bucket/prefix at server`, or a path.
    pub fn location(&self) -> String {
        match &self.0 {
            Variant::Directory(directory) => directory.location(),
            Variant::S3(s3) => s3.location(),
        }
    }

    /// Stores a new object. `class` is an S3 storage class; a directory ignores it.
    ///
    /// A name that is taken by the same bytes counts as created, because a retried request finds
    /// its own first attempt.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached, retries included.
    pub async fn put(
        &self,
        key: &str,
        body: Bytes,
        class: Option<&str>,
    ) -> Result<Put, StoreError> {
        let put = match &self.0 {
            Variant::Directory(directory) => directory.put(key, body.clone()).await?,
            Variant::S3(s3) => s3.put(key, body.clone(), class).await?,
        };
        if put == Put::Exists && self.holds(key, &body).await? {
            return Ok(Put::Created);
        }
        Ok(put)
    }

    /// Returns a whole object of at most `bytes_max`: all of it is in memory.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::NotFound`], or the store could not be read, or fewer bytes arrived than
    /// it announced; [`StoreErrorKind::Refused`] for one that is longer, of which nothing is read.
    pub async fn get(&self, key: &str, bytes_max: u64) -> Result<Bytes, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.get(key, Wanted::Whole { bytes_max }).await,
            Variant::S3(s3) => s3.get(key, Wanted::Whole { bytes_max }).await,
        }
    }

    /// Tells whether an object is exactly these bytes: all of it is read back, and nothing kept.
    ///
    /// # Errors
    ///
    /// As [`ObjectStore::get`].
    pub async fn holds(&self, key: &str, body: &[u8]) -> Result<bool, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.holds(key, body).await,
            Variant::S3(s3) => s3.holds(key, body).await,
        }
    }

    /// Returns the bytes `range` of an object; exactly so many, or an error.
    ///
    /// # Errors
    ///
    /// As [`ObjectStore::get`]; a range beyond the end is [`StoreErrorKind::Corrupt`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let wanted = range.end.saturating_sub(range.start);
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let body = match &self.0 {
            Variant::Directory(directory) => directory.get(key, Wanted::Range(range)).await?,
            Variant::S3(s3) => s3.get(key, Wanted::Range(range)).await?,
        };
        if body.len() as u64 != wanted {
            let found = body.len();
            return Err(StoreError {
                operation: "get",
                key: key.to_owned(),
                kind: StoreErrorKind::Corrupt,
                source: format!("expected {wanted} bytes, found {found}: the object is truncated")
                    .into(),
            });
        }
        Ok(body)
    }

    /// Returns what the store knows about an object, or `None` if there is none.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.head(key).await,
            Variant::S3(s3) => s3.head(key).await,
        }
    }

    /// Lists every object whose key starts with `prefix`, in byte order of the keys.
    ///
    /// `after` leaves out keys up to and including it; `limit` ends the list early.
    ///
    /// # Errors
    ///
    /// The store could not be asked; never a list that is silently short.
    pub async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
    ) -> Result<Vec<ObjectInfo>, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.list(prefix, after, limit).await,
            Variant::S3(s3) => s3.list(prefix, after, limit).await,
        }
    }

    /// Lists the names directly below `prefix` (which ends with a slash or is empty), as a
    /// directory listing would: each without the prefix and without a slash at its end.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.list_folders(prefix).await,
            Variant::S3(s3) => s3.list_folders(prefix).await,
        }
    }

    /// Deletes an object. One that is not there is fine.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Denied`] under Object Lock; or the store could not be reached.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.delete(key).await,
            Variant::S3(s3) => s3.delete(key).await,
        }
    }

    /// Deletes objects, many with one request where the store can. One that is not there is fine.
    ///
    /// # Errors
    ///
    /// As [`ObjectStore::delete`]; some may be deleted by then.
    pub async fn delete_all(&self, keys: Vec<String>) -> Result<(), StoreError> {
        let left = match &self.0 {
            Variant::Directory(_) => keys,
            Variant::S3(s3) => s3.delete_all(keys).await?,
        };
        let deletes: Vec<_> = left.iter().map(|key| self.delete(key)).collect();
        stream::iter(deletes).buffer_unordered(DELETES_AT_ONCE).try_collect().await
    }

    /// Begins a multipart upload of parts of `part_bytes` each; the last may be smaller.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached.
    pub async fn upload(
        &self,
        key: &str,
        part_bytes: u64,
        class: Option<&str>,
    ) -> Result<Upload, StoreError> {
        let upload_id = match &self.0 {
            Variant::Directory(directory) => directory.begin(key).await?,
            Variant::S3(s3) => s3.begin(key, class).await?,
        };
        Ok(Upload { store: self.clone(), key: key.to_owned(), id: upload_id, part_bytes })
    }

    /// Lists the uploads below `prefix` that were begun and not ended.
    ///
    /// # Errors
    ///
    /// The store could not be asked; [`StoreErrorKind::Unsupported`] where it cannot tell.
    pub async fn unfinished(&self, prefix: &str) -> Result<Vec<Unfinished>, StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.unfinished(prefix).await,
            Variant::S3(s3) => s3.unfinished(prefix).await,
        }
    }

    /// Gives up an unfinished upload and frees what it took. One that is gone is fine.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached.
    pub async fn abort(&self, unfinished: &Unfinished) -> Result<(), StoreError> {
        match &self.0 {
            Variant::Directory(directory) => directory.abort(&unfinished.upload_id).await,
            Variant::S3(s3) => s3.abort(&unfinished.key, &unfinished.upload_id).await,
        }
    }
}

impl Upload {
    /// Uploads part `number`, from 1. Several may be in flight at once.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached, retries included.
    pub async fn part(&self, number: u32, body: Bytes) -> Result<UploadedPart, StoreError> {
        match &self.store.0 {
            Variant::Directory(directory) => {
                let offset = u64::from(number - 1) * self.part_bytes;
                let bytes = body.len() as u64;
                directory.write(&self.key, &self.id, offset, body).await?;
                Ok(UploadedPart { number, bytes, etag: None, checksum: None })
            }
            Variant::S3(s3) => s3.part(&self.key, &self.id, number, body).await,
        }
    }

    /// Makes the object appear, whole, and asks the store how long it is.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached; [`StoreErrorKind::Corrupt`] when the object is
    /// not as long as its parts together.
    pub async fn complete(self, mut parts: Vec<UploadedPart>) -> Result<(), StoreError> {
        parts.sort_by_key(|part| part.number);
        let expected: u64 = parts.iter().map(|part| part.bytes).sum();
        let completed = match &self.store.0 {
            Variant::Directory(directory) => directory.complete(&self.key, &self.id).await,
            Variant::S3(s3) => s3.complete(&self.key, &self.id, &parts).await,
        };
        let found = self.store.head(&self.key).await?.map(|info| info.bytes);
        if let Err(error) = completed {
            // The retry of a request whose answer was lost finds the upload gone and the object there.
            return if found == Some(expected) { Ok(()) } else { Err(error) };
        }
        if found != Some(expected) {
            let found = found.map_or("no object".to_owned(), |bytes| format!("{bytes} bytes"));
            return Err(StoreError {
                operation: "complete",
                key: self.key,
                kind: StoreErrorKind::Corrupt,
                source: format!("expected {expected} bytes, found {found}").into(),
            });
        }
        Ok(())
    }

    /// Gives the upload up.
    ///
    /// # Errors
    ///
    /// The store refused or could not be reached.
    pub async fn abort(self) -> Result<(), StoreError> {
        let unfinished = Unfinished { key: self.key, upload_id: self.id, started_at: None };
        self.store.abort(&unfinished).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_stays_below_the_bucket_or_directory() {
        for (prefix, expected) in [
            ("", true),
            ("a", true),
            ("a/b c/ä%20+&?#", true),
            ("..a/b..", true),
            ("/a", false),
            ("a/", false),
            ("a//b", false),
            (".", false),
            ("..", false),
            ("../esc", false),
            ("a/./b", false),
            ("a/../../b", false),
            ("a\nb", false),
            ("a\u{7f}", false),
        ] {
            let directory = Some(DirectoryConfig { path: "/srv/repository".into() });
            let config = StoreConfig { prefix: prefix.to_owned(), directory, s3: None };
            let mut problems = Problems::default();
            config.check(&mut problems);
            assert_eq!(problems.is_empty(), expected, "{prefix:?}: {:?}", problems.found());
        }
    }
}
