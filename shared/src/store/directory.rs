//! A directory as an object store.
//!
//! An object appears by `link(2)` from a synced temporary file: whole or not at all, and never
//! over another. The temporary files live in `.uploads/`, which is also the list of unfinished
//! uploads.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::{ObjectInfo, Put, StoreError, StoreErrorKind, Unfinished, Wanted};

const UPLOADS: &str = ".uploads";

/// Makes upload names unique within the process; the process id does so between processes.
static UPLOAD_COUNT: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Debug)]
pub(super) struct Directory {
    /// The configured directory; must exist.
    base: PathBuf,
    /// `base` and the prefix: where keys start.
    root: PathBuf,
    /// The device and inode that `base` has to be.
    pinned: Option<(u64, u64)>,
}

impl Directory {
    pub(super) fn new(base: &Path, prefix: &str) -> Self {
        Self { base: base.to_owned(), root: base.join(prefix), pinned: None }
    }

    pub(super) async fn pinned(&self) -> Result<Self, StoreError> {
        let found = self.blocking("find", "", |store, _| store.base()).await?;
        Ok(Self { pinned: Some(found), ..self.clone() })
    }

    pub(super) fn location(&self) -> String {
        self.root.display().to_string().trim_end_matches('/').to_owned()
    }

    pub(super) async fn put(&self, key: &str, body: Bytes) -> Result<Put, StoreError> {
        let upload_id = self.begin(key).await?;
        let stored = async {
            self.write(key, &upload_id, 0, body).await?;
            self.publish("put", key, &upload_id).await
        };
        let stored = stored.await;
        if stored.is_err() {
            // A full disk must not fill up with attempts.
            self.abort(&upload_id).await?;
        }
        stored
    }

    pub(super) async fn get(&self, key: &str, wanted: Wanted) -> Result<Bytes, StoreError> {
        self.blocking("get", key, |store, key| {
            let mut file = File::open(store.path(key)?)?;
            let mut body = Vec::new();
            match wanted {
                Wanted::Whole { .. } => {
                    let bytes = file.metadata()?.len();
                    if let Some(reason) = wanted.refuse(bytes) {
                        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
                    }
                    body.reserve(usize::try_from(bytes).unwrap_or(0));
                    // An object never grows; what is there instead may.
                    file.take(bytes).read_to_end(&mut body)?;
                }
                Wanted::Range(range) => {
                    let wanted = range.end.saturating_sub(range.start);
                    body.reserve(usize::try_from(wanted).unwrap_or(0));
                    file.seek(SeekFrom::Start(range.start))?;
                    file.take(wanted).read_to_end(&mut body)?;
                }
            }
            Ok(Bytes::from(body))
        })
        .await
    }

    pub(super) async fn holds(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        let bytes_max = expected.len() as u64;
        if self.head(key).await?.is_some_and(|info| info.bytes != bytes_max) {
            return Ok(false);
        }
        Ok(self.get(key, Wanted::Whole { bytes_max }).await? == expected)
    }

    pub(super) async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StoreError> {
        self.blocking("head", key, |store, key| match fs::metadata(store.path(key)?) {
            Ok(metadata) if metadata.is_file() => Ok(Some(info(key.to_owned(), &metadata)?)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
    ) -> Result<Vec<ObjectInfo>, StoreError> {
        let after = after.map(str::to_owned);
        self.blocking("list", prefix, move |store, prefix| {
            store.require_base()?;
            let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
            let mut found = Vec::new();
            let selection = Selection { prefix, after: after.as_deref().unwrap_or_default() };
            walk(&store.root.join(folder), folder, &selection, &mut found)?;
            found.sort_by(|a, b| a.key.cmp(&b.key));
            found.truncate(limit.unwrap_or(usize::MAX));
            Ok(found)
        })
        .await
    }

    pub(super) async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.blocking("list", prefix, |store, prefix| {
            store.require_base()?;
            let mut names = Vec::new();
            for entry in entries(&store.root.join(prefix))? {
                if entry.file_type()?.is_dir() && entry.file_name() != UPLOADS {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
            names.sort();
            Ok(names)
        })
        .await
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.blocking("delete", key, |store, key| {
            let path = store.path(key)?;
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            }
            // Folders that became empty go too, up to the root; one that is not empty stays.
            let mut folder = path.parent();
            while let Some(path) = folder.filter(|path| *path != store.root) {
                if fs::remove_dir(path).is_err() {
                    break;
                }
                folder = path.parent();
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn begin(&self, key: &str) -> Result<String, StoreError> {
        self.blocking("begin upload of", key, |store, key| {
            store.require_base()?;
            store.path(key)?;
            let uploads = store.root.join(UPLOADS);
            fs::create_dir_all(&uploads)?;
            let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let count = UPLOAD_COUNT.fetch_add(1, Ordering::Relaxed);
            // The key is part of the name, so that an unfinished upload says what it was for.
            let upload_id = format!(
                "{:x}-{:x}-{count:x}.{}",
                started.as_nanos(),
                std::process::id(),
                key.replace('/', "!")
            );
            OpenOptions::new().write(true).create_new(true).open(uploads.join(&upload_id))?;
            Ok(upload_id)
        })
        .await
    }

    pub(super) async fn write(
        &self,
        key: &str,
        upload_id: &str,
        offset: u64,
        body: Bytes,
    ) -> Result<(), StoreError> {
        let path = self.root.join(UPLOADS).join(upload_id);
        self.blocking("write part of", key, move |_, _| {
            let mut file = OpenOptions::new().write(true).open(path)?;
            if offset == 0 { file.write_all(&body) } else { file.write_all_at(&body, offset) }
        })
        .await
    }

    pub(super) async fn complete(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        match self.publish("complete", key, upload_id).await? {
            Put::Created => Ok(()),
            Put::Exists => Err(StoreError {
                operation: "complete",
                key: key.to_owned(),
                kind: StoreErrorKind::Refused,
                source: "an object of this name is there already".into(),
            }),
        }
    }

    pub(super) async fn unfinished(&self, prefix: &str) -> Result<Vec<Unfinished>, StoreError> {
        self.blocking("list uploads below", prefix, |store, prefix| {
            store.require_base()?;
            let mut found = Vec::new();
            for entry in entries(&store.root.join(UPLOADS))? {
                let upload_id = entry.file_name().to_string_lossy().into_owned();
                let Some((_, name)) = upload_id.split_once('.') else { continue };
                let key = name.replace('!', "/");
                if key.starts_with(prefix) {
                    let started_at = Some(entry.metadata()?.modified()?.into());
                    found.push(Unfinished { key, upload_id, started_at });
                }
            }
            Ok(found)
        })
        .await
    }

    pub(super) async fn abort(&self, upload_id: &str) -> Result<(), StoreError> {
        self.blocking("abort", upload_id, |store, upload_id| {
            match fs::remove_file(store.root.join(UPLOADS).join(upload_id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Turns a temporary file into the object: sync, link, sync the folders, unlink.
    async fn publish(
        &self,
        operation: &'static str,
        key: &str,
        upload_id: &str,
    ) -> Result<Put, StoreError> {
        let temporary = self.root.join(UPLOADS).join(upload_id);
        self.blocking(operation, key, move |store, key| {
            File::open(&temporary)?.sync_all()?;
            let path = store.path(key)?;
            let folder = path.parent().unwrap_or(&store.root);
            // A concurrent delete may remove the folder, empty as yet, before the link is made.
            let put = loop {
                create_folders(folder)?;
                match fs::hard_link(&temporary, &path) {
                    Ok(()) => break Put::Created,
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        break Put::Exists;
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound && temporary.exists() => {
                    }
                    Err(error) => return Err(error),
                }
            };
            File::open(folder)?.sync_all()?;
            fs::remove_file(&temporary)?;
            Ok(put)
        })
        .await
    }

    /// The file of a key. Keys are ours, but a key that leaves the root is refused all the same.
    fn path(&self, key: &str) -> io::Result<PathBuf> {
        let plain = key.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !plain || key.starts_with(UPLOADS) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a valid key"));
        }
        Ok(self.root.join(key))
    }

    /// The device and inode of `base`, which has to be a directory.
    fn base(&self) -> io::Result<(u64, u64)> {
        match fs::metadata(&self.base) {
            Ok(metadata) if metadata.is_dir() => Ok((metadata.dev(), metadata.ino())),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                let base = self.base.display();
                Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("repository directory {base} does not exist; mount or create it first"),
                ))
            }
        }
    }

    /// Refuses where `base` is not there, or is another directory than it was: what lies under a
    /// mount that went away.
    fn require_base(&self) -> io::Result<()> {
        let found = self.base()?;
        if self.pinned.is_none_or(|pinned| pinned == found) {
            return Ok(());
        }
        let base = self.base.display();
        Err(io::Error::other(format!(
            "repository directory {base} is another directory than before; is it mounted?"
        )))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        work: impl FnOnce(&Self, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (store, owned) = (self.clone(), key.to_owned());
        let done = tokio::task::spawn_blocking(move || work(&store, &owned)).await;
        let error = match done {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(error) => io::Error::other(error),
        };
        Err(StoreError {
            operation,
            key: key.to_owned(),
            kind: kind(&error),
            source: Box::new(error),
        })
    }
}

fn kind(error: &io::Error) -> StoreErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => StoreErrorKind::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreErrorKind::Denied
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreErrorKind::Full,
        io::ErrorKind::UnexpectedEof => StoreErrorKind::Corrupt,
        io::ErrorKind::Interrupted | io::ErrorKind::TimedOut => StoreErrorKind::Unavailable,
        _ => StoreErrorKind::Refused,
    }
}

fn info(key: String, metadata: &fs::Metadata) -> io::Result<ObjectInfo> {
    let modified_at: DateTime<Utc> = metadata.modified()?.into();
    Ok(ObjectInfo { key, bytes: metadata.len(), modified_at })
}

/// The entries of a folder; none if there is no such folder.
fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        // The one of many that cannot be read has to be found.
        Err(error) => {
            let kind = error.kind();
            Err(io::Error::new(kind, format!("read {}: {error}", folder.display())))
        }
    }
}

/// Which keys a list is asked for.
struct Selection<'a> {
    prefix: &'a str,
    after: &'a str,
}

impl Selection<'_> {
    fn has(&self, key: &str) -> bool {
        key.starts_with(self.prefix) && key > self.after
    }

    /// Whether any key below `folder`, which ends with a slash, may be wanted.
    fn may_be_in(&self, folder: &str) -> bool {
        let is_on_the_way = folder.starts_with(self.prefix) || self.prefix.starts_with(folder);
        is_on_the_way && (folder >= self.after || self.after.starts_with(folder))
    }
}

/// Finds the wanted files below a folder. The others are not even looked at: there may be a million.
fn walk(
    folder: &Path,
    name: &str,
    selection: &Selection<'_>,
    found: &mut Vec<ObjectInfo>,
) -> io::Result<()> {
    for entry in entries(folder)? {
        let file_name = entry.file_name();
        let file_name = file_name.to_string_lossy();
        let key =
            if name.is_empty() { file_name.into_owned() } else { format!("{name}/{file_name}") };
        if entry.file_type()?.is_dir() {
            if key != UPLOADS && selection.may_be_in(&format!("{key}/")) {
                walk(&entry.path(), &key, selection, found)?;
            }
        } else if selection.has(&key) {
            match entry.metadata() {
                Ok(metadata) => found.push(info(key, &metadata)?),
                // Deleted between the two calls: as good as not listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// `create_dir_all` that also syncs each folder into its parent, so that an object that was
/// acknowledged is still found after a power cut.
fn create_folders(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        create_folders(parent)?;
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}
