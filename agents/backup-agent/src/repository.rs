//! The repository: where each object lies, and how one is written and read as a whole.
//!
//! ```text
//! v1/<cluster>/<group>/<system identifier>/
//!     base/<backup id>/part-00000 …  manifest  files  commit
//!     wal/<timeline>/<16 hex digits>/<segment>-<content hash>
//!     history/<file name>-<content hash>
//!     tombstone/<backup id>
//!     begun  begun-<UTC time>
//! ```
//!
//! A name below the system identifier's folder is the object's name, which is part of its key.

use std::pin::pin;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::stream::{self, Stream, StreamExt};
use shared::store::{ObjectInfo, ObjectStore, Put, StoreError, StoreErrorKind};
use thiserror::Error;

use crate::config::{Config, StorageClass};
use crate::container::{
    ContainerError, HEADER_BYTES, Identity, Kind, Opener, TRAILER_BYTES, Unopened, open_whole,
    seal_whole, tail_bytes,
};
use crate::keys::{KeyError, KeyRing};

/// Plaintext bytes of a chunk of the small objects; base backups and WAL choose their own.
const CHUNK_BYTES: u32 = 1 << 20;
/// The longest object that is read as a whole, other than WAL: a commit object has a line for each
/// part, a history file one for each promotion.
const SMALL_OBJECT_BYTES_MAX: u64 = 64 << 20;
/// What is fetched of an object's end at first: the index of all but huge objects.
const TAIL_BYTES: u64 = 64 << 10;
/// Chunks in a piece of [`ObjectReader::pieces`]. Several pieces are in memory at a time, and what
/// was freed stays with the thread that took it: twice as many take 20 MiB more.
const CHUNKS_PER_PIECE: u32 = 2;

/// Why an object could not be written or read.
#[derive(Debug, Error)]
pub enum RepositoryError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object is not what it should be.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The name is taken by other content. Nothing was overwritten.
    #[error("{key} exists already with other content; nothing was overwritten")]
    Conflict {
        /// The key.
        key: String,
    },
    /// The key that writes is not the one that wrote before.
    #[error(
        "{name} was written with another key under the id {key_id}; nothing is written with this \
         one. Put the right key into its file, or give the new key an id of its own"
    )]
    OtherKey {
        /// An object that the other key wrote.
        name: String,
        /// The id.
        key_id: String,
    },
    /// A mark that says which database cluster is a group's does not open.
    #[error(
        "{place} does not say whether its database cluster is that of group {group}: mend it, or say which one \
         is with `backup-agent begin --group {group}`"
    )]
    Unsaid {
        /// The place in the repository.
        place: String,
        /// The group.
        group: u32,
        /// Why the mark does not open.
        source: Box<RepositoryError>,
    },
    /// The object is authentic, but its content makes no sense to this release.
    #[error("read {name}")]
    Content {
        /// The object.
        name: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl RepositoryError {
    /// Tells whether the same may succeed if tried again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => error.is_transient(),
            Self::Container(_)
            | Self::Conflict { .. }
            | Self::OtherKey { .. }
            | Self::Unsaid { .. }
            | Self::Content { .. } => false,
        }
    }
}

impl RepositoryError {
    /// Tells whether an object itself is damaged, and not the way to it or the key for it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Container(error) => match error {
                ContainerError::NotOurs { .. }
                | ContainerError::Misplaced { .. }
                | ContainerError::Replaced { .. }
                | ContainerError::Truncated { .. }
                | ContainerError::Damaged { .. } => true,
                ContainerError::Version { .. }
                | ContainerError::MissingKey { .. }
                | ContainerError::WrongKey { .. }
                | ContainerError::TooLarge { .. }
                | ContainerError::Codec { .. } => false,
            },
            Self::Content { .. } => true,
            Self::Store(_)
            | Self::Conflict { .. }
            | Self::OtherKey { .. }
            | Self::Unsaid { .. } => false,
        }
    }

    /// Tells whether the store forbids it: Object Lock, or no permission.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Store(error) if error.kind == StoreErrorKind::Denied)
    }

    /// Tells whether the key that sealed an object is not configured.
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Container(ContainerError::MissingKey { .. }))
    }

    /// Tells whether a key is configured under the id of another.
    pub fn is_wrong_key(&self) -> bool {
        matches!(self, Self::Container(ContainerError::WrongKey { .. }) | Self::OtherKey { .. })
    }
}

/// The repository as configured: a store and keys.
#[derive(Clone, Debug)]
pub struct Repository {
    store: ObjectStore,
    keys: KeyRing,
    cluster: String,
    class: StorageClass,
}

/// Why the repository cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The store cannot be used.
    #[error("open the repository")]
    Store(#[source] anyhow::Error),
}

impl Repository {
    /// Reads the keys and credentials. The store itself is not asked yet.
    ///
    /// # Errors
    ///
    /// A key or credential that cannot be used.
    pub async fn open(config: &Config) -> Result<Self, OpenError> {
        let keys = KeyRing::read(&config.encryption)?;
        let store = ObjectStore::open(&config.repository).await.map_err(OpenError::Store)?;
        let (cluster, class) = (config.cluster.clone(), config.storage_class.clone());
        Ok(Self { store, keys, cluster, class })
    }

    /// Where it is, for people.
    pub fn location(&self) -> String {
        self.store.location()
    }

    /// The keys to seal and open with.
    pub fn keys(&self) -> &KeyRing {
        &self.keys
    }

    /// The store.
    pub fn store(&self) -> &ObjectStore {
        &self.store
    }

    /// The folder of one system identifier of a group.
    pub fn place(&self, group: u32, system_identifier: u64) -> Place {
        let base = format!("{}{system_identifier}/", self.group_prefix(group));
        Place { repository: self.clone(), group, system_identifier, base }
    }

    /// Every group of the cluster that the repository holds something of.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn groups(&self) -> Result<Vec<u32>, RepositoryError> {
        let names = self.store.list_folders(&format!("v1/{}/", self.cluster)).await?;
        let mut groups: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
        groups.sort_unstable();
        Ok(groups)
    }

    /// Every system identifier that the repository holds something of, for a group. More than
    /// one means that the group was created anew at some time.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn places(&self, group: u32) -> Result<Vec<Place>, RepositoryError> {
        let names = self.store.list_folders(&self.group_prefix(group)).await?;
        let numbers = names.iter().filter_map(|name| name.parse().ok());
        Ok(numbers.map(|system_identifier| self.place(group, system_identifier)).collect())
    }

    fn group_prefix(&self, group: u32) -> String {
        format!("v1/{}/{group}/", self.cluster)
    }
}

/// The folder of one system identifier: all that belongs to one database cluster.
#[derive(Clone, Debug)]
pub struct Place {
    repository: Repository,
    /// The Patroni or Citus group.
    pub group: u32,
    /// The PostgreSQL system identifier.
    pub system_identifier: u64,
    base: String,
}

impl Place {
    /// The store's key of an object.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.base)
    }

    /// Where it is, for people.
    pub fn location(&self) -> String {
        format!("{} of {}", self.base, self.store().location())
    }

    /// What an object is called, as its key is derived from.
    pub fn identity(&self, kind: Kind, name: &str) -> Identity {
        Identity { system_identifier: self.system_identifier, kind, name: name.to_owned() }
    }

    /// The keys to seal and open with.
    pub fn keys(&self) -> &KeyRing {
        self.repository.keys()
    }

    /// The store.
    pub fn store(&self) -> &ObjectStore {
        self.repository.store()
    }

    /// The storage class that objects of a kind are given.
    pub fn class(&self, kind: Kind) -> Option<&str> {
        self.repository.class.of(kind)
    }

    /// The same place for work that must not go on elsewhere ([`ObjectStore::pinned`]).
    ///
    /// # Errors
    ///
    /// The store is a directory that is not there.
    pub async fn pinned(mut self) -> Result<Self, RepositoryError> {
        self.repository.store = self.repository.store.pinned().await?;
        Ok(self)
    }

    /// Lists the objects whose names start with `prefix`; each with its name for a key.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
    ) -> Result<Vec<ObjectInfo>, RepositoryError> {
        let after = after.map(|after| self.key(after));
        let listed = self.store().list(&self.key(prefix), after.as_deref(), limit).await?;
        let named = listed.into_iter().map(|info| {
            let name = info.key.strip_prefix(&self.base).unwrap_or(&info.key).to_owned();
            ObjectInfo { key: name, ..info }
        });
        Ok(named.collect())
    }

    /// Lists the names directly below `prefix`, which ends with a slash, as folders.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        Ok(self.store().list_folders(&self.key(prefix)).await?)
    }

    /// Seals and stores a small object; returns its salt.
    ///
    /// # Errors
    ///
    /// [`RepositoryError::Conflict`] when the name is taken; or the store failed.
    pub async fn put(
        &self,
        kind: Kind,
        name: &str,
        plain: &[u8],
        level: i32,
    ) -> Result<[u8; 32], RepositoryError> {
        let identity = self.identity(kind, name);
        let (object, salt) = seal_whole(self.keys(), &identity, CHUNK_BYTES, level, plain)?;
        self.put_sealed(kind, name, object).await?;
        Ok(salt)
    }

    /// Like [`put`](Self::put), where one of that name says the same.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub async fn put_once(
        &self,
        kind: Kind,
        name: &str,
        plain: &[u8],
    ) -> Result<(), RepositoryError> {
        match self.put(kind, name, plain, 1).await {
            Ok(_) | Err(RepositoryError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Stores an object that is sealed already.
    ///
    /// # Errors
    ///
    /// As [`Place::put`].
    pub async fn put_sealed(
        &self,
        kind: Kind,
        name: &str,
        object: Bytes,
    ) -> Result<(), RepositoryError> {
        let key = self.key(name);
        match self.store().put(&key, object, self.class(kind)).await? {
            Put::Created => Ok(()),
            Put::Exists => Err(RepositoryError::Conflict { key }),
        }
    }

    /// Fetches and opens a whole object; returns its content and its salt.
    ///
    /// # Errors
    ///
    /// The store failed, or the object is not what it should be.
    pub async fn get(
        &self,
        kind: Kind,
        name: &str,
    ) -> Result<(Vec<u8>, [u8; 32]), RepositoryError> {
        let object = self.store().get(&self.key(name), SMALL_OBJECT_BYTES_MAX).await?;
        Ok(open_whole(self.keys(), &self.identity(kind, name), &object)?)
    }

    /// Whether the key that writes also wrote this object. False if that cannot be told: another id
    /// stands in its header, or the header cannot be read.
    ///
    /// # Errors
    ///
    /// [`RepositoryError::OtherKey`]; or the store could not be asked.
    pub async fn has_same_key(&self, kind: Kind, name: &str) -> Result<bool, RepositoryError> {
        let header = match self.store().get_range(&self.key(name), 0..HEADER_BYTES as u64).await {
            Ok(header) => header,
            Err(error) if error.kind == StoreErrorKind::Unavailable => return Err(error.into()),
            // It is gone, cut short, or nobody may read it who only archives.
            Err(_) => return Ok(false),
        };
        let (writing, _) = self.keys().writing();
        match Unopened::new(self.keys(), &self.identity(kind, name), &header) {
            Err(ContainerError::WrongKey { name, key_id }) if key_id == writing => {
                Err(RepositoryError::OtherKey { name, key_id })
            }
            unopened => Ok(unopened.is_ok_and(|it| it.key_id() == writing)),
        }
    }

    /// Opens an object for reading in pieces. `object_bytes` is its length if that is known.
    ///
    /// # Errors
    ///
    /// The store failed, or the object's header or end is not what it should be.
    pub async fn open(
        &self,
        kind: Kind,
        name: &str,
        object_bytes: Option<u64>,
    ) -> Result<ObjectReader, RepositoryError> {
        let key = self.key(name);
        let found = self.store().head(&key).await?.ok_or_else(|| StoreError {
            operation: "get",
            key: key.clone(),
            kind: StoreErrorKind::NotFound,
            source: "there is no such object".into(),
        })?;
        let short = |reason: String| ContainerError::Truncated { name: name.to_owned(), reason };
        if let Some(expected) = object_bytes
            && expected != found.bytes
        {
            let reason = format!("expected {expected} bytes, found {}", found.bytes);
            return Err(short(reason).into());
        }
        if found.bytes < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(short(format!("only {} bytes long", found.bytes)).into());
        }
        let header = self.store().get_range(&key, 0..HEADER_BYTES as u64).await?;
        let unopened = Unopened::new(self.keys(), &self.identity(kind, name), &header)?;
        let mut start = found.bytes.saturating_sub(TAIL_BYTES);
        let mut tail = self.store().get_range(&key, start..found.bytes).await?;
        if let Some(needed) = tail_bytes(&tail)
            && needed > tail.len() as u64
            && needed <= found.bytes
        {
            start = found.bytes - needed;
            tail = self.store().get_range(&key, start..found.bytes).await?;
        }
        let opener = unopened.open_index(&tail, found.bytes)?;
        Ok(ObjectReader { place: self.clone(), key, opener: opener.into() })
    }

    /// When an object was sealed: nothing in it is younger. `None` if it does not say.
    ///
    /// # Errors
    ///
    /// As [`Place::open`].
    pub async fn sealed_at(
        &self,
        kind: Kind,
        name: &str,
    ) -> Result<Option<DateTime<Utc>>, RepositoryError> {
        match self.open(kind, name, None).await {
            Ok(object) => Ok(object.opener.sealed_at()),
            // Who asks is about to write.
            Err(RepositoryError::Container(ContainerError::WrongKey { name, key_id })) => {
                Err(RepositoryError::OtherKey { name, key_id })
            }
            Err(error) => Err(error),
        }
    }
}

/// An object whose header and index are checked, read in pieces.
#[derive(Clone, Debug)]
pub struct ObjectReader {
    place: Place,
    key: String,
    /// Opens its chunks.
    pub opener: std::sync::Arc<Opener>,
}

impl ObjectReader {
    /// Fetches the sealed chunks `first` up to but not including `end`.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub async fn fetch(&self, first: u32, end: u32) -> Result<Bytes, RepositoryError> {
        Ok(self.place.store().get_range(&self.key, self.opener.range(first, end)).await?)
    }

    /// The content in order, a few chunks at a time; up to `at_once` pieces are fetched and opened
    /// ahead. After an error there is nothing to be asked for.
    pub fn pieces(self, at_once: usize) -> impl Stream<Item = Result<Vec<u8>, RepositoryError>> {
        let firsts = (0..self.opener.chunks()).step_by(CHUNKS_PER_PIECE as usize);
        stream::iter(firsts).map(move |first| self.clone().piece(first)).buffered(at_once)
    }

    /// Reads all of it, whatever is damaged, and hands to `take` what can be opened, in order; `None`
    /// stands for a chunk that cannot. Returns the numbers of those.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub async fn read_through(
        self,
        at_once: usize,
        mut take: impl FnMut(Option<&[u8]>),
    ) -> Result<Vec<u32>, RepositoryError> {
        let (mut damaged, mut first) = (Vec::new(), 0);
        let mut pieces = pin!(self.clone().pieces(at_once));
        while let Some(piece) = pieces.next().await {
            let end = self.piece_end(first);
            match piece {
                Ok(piece) => take(Some(&piece)),
                Err(error) if error.is_damage() => {
                    for number in first..end {
                        match self.clone().stretch(number, number + 1).await {
                            Ok(chunk) => take(Some(&chunk)),
                            Err(error) if error.is_damage() => {
                                damaged.push(number);
                                take(None);
                            }
                            Err(error) => return Err(error),
                        }
                    }
                }
                Err(error) => return Err(error),
            }
            first = end;
        }
        Ok(damaged)
    }

    fn piece_end(&self, first: u32) -> u32 {
        first.saturating_add(CHUNKS_PER_PIECE).min(self.opener.chunks())
    }

    async fn piece(self, first: u32) -> Result<Vec<u8>, RepositoryError> {
        let end = self.piece_end(first);
        self.stretch(first, end).await
    }

    /// Fetches and opens the chunks `first` up to but not including `end`.
    async fn stretch(self, first: u32, end: u32) -> Result<Vec<u8>, RepositoryError> {
        let sealed = self.fetch(first, end).await?;
        let open = move || {
            let chunk_bytes = usize::try_from(self.opener.chunk_bytes()).unwrap_or(0);
            let mut piece = Vec::with_capacity(chunk_bytes * (end - first) as usize);
            self.opener.open_stretch(first, end, &sealed, |plain| {
                piece.extend_from_slice(plain);
                Ok::<_, ContainerError>(())
            })?;
            Ok(piece)
        };
        match tokio::task::spawn_blocking(open).await {
            Ok(opened) => opened,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}
