//! The files behind the server: objects named as their keys, and what `s3s-fs` keeps beside them.
//!
//! `s3s-fs` names its own files `.bucket-B.object-K.metadata.json` (what the client gave),
//! `.bucket-B.object-K.internal.json` (`ETag` and checksums), `.upload-U.json` (an unfinished
//! upload) and `.upload_id-U.part-N` (its parts); B and K in base64 without padding. Since a file
//! name has at most 255 bytes, a key has at most about 120.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

/// The client's metadata in which the storage class is kept: `s3s-fs` refuses classes, and keeps
/// metadata, from the beginning of a multipart upload to its end too.
pub(super) const STORAGE_CLASS: &str = "pgmesh-tests-storage-class";
/// The same for the server-side encryption that was asked for, which `s3s-fs` forgets.
pub(super) const ENCRYPTION: &str = "pgmesh-tests-encryption";
/// Stands in the place of a bucket for objects that are not complete. No bucket has such a name.
pub(super) const STAGING: &str = ".staging";

/// The objects of one bucket, as files. It works on what is stored, without HTTP and faults.
#[derive(Clone, Debug)]
pub struct Bucket {
    root: PathBuf,
    name: String,
    directory: PathBuf,
}

/// A multipart upload that was neither completed nor aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnfinishedUpload {
    /// The key it would have.
    pub key: String,
    /// The id the server gave it.
    pub upload_id: String,
    /// When it was begun.
    pub started_at: SystemTime,
    /// The storage class it was begun with.
    pub storage_class: Option<String>,
}

impl Bucket {
    /// The bucket `name` of a server that keeps its files in `root`.
    pub fn new(root: &Path, name: &str) -> Self {
        Self { root: root.to_owned(), name: name.to_owned(), directory: root.join(name) }
    }

    /// The directory whose files are the objects, named as their keys.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether there is an object.
    pub fn contains(&self, key: &str) -> bool {
        self.path(key).is_file()
    }

    /// The content of an object. Panics when there is none.
    pub fn object(&self, key: &str) -> Vec<u8> {
        fs::read(self.path(key)).unwrap_or_else(|error| panic!("read object {key}: {error}"))
    }

    /// Writes an object, or another content into one.
    pub fn put_object(&self, key: &str, content: &[u8]) {
        let path = self.path(key);
        fs::create_dir_all(path.parent().expect("a key lies in a bucket")).unwrap();
        fs::write(path, content).unwrap();
        // ETag and checksums are those of the content before.
        remove_if_there(&self.internal(key)).unwrap();
    }

    /// Removes an object. Panics when there is none.
    pub fn remove(&self, key: &str) {
        fs::remove_file(self.path(key))
            .unwrap_or_else(|error| panic!("remove object {key}: {error}"));
        self.remove_details(key).unwrap();
    }

    /// Flips one bit of an object. Panics when it is not that long.
    pub fn flip_bit(&self, key: &str, byte: u64) {
        let mut content = self.object(key);
        content[usize::try_from(byte).unwrap()] ^= 1;
        self.put_object(key, &content);
    }

    /// Cuts an object off after its first `bytes`.
    pub fn truncate(&self, key: &str, bytes: u64) {
        let mut content = self.object(key);
        content.truncate(usize::try_from(bytes).unwrap());
        self.put_object(key, &content);
    }

    /// Exchanges the contents of two objects.
    pub fn swap(&self, one: &str, other: &str) {
        let (first, second) = (self.object(one), self.object(other));
        self.put_object(one, &second);
        self.put_object(other, &first);
    }

    /// The keys that begin with `prefix`, sorted by their bytes.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys = Vec::new();
        let mut directories = vec![self.directory.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let key = path.strip_prefix(&self.directory).unwrap();
                    keys.push(key.to_str().expect("keys are UTF-8").to_owned());
                }
            }
        }
        keys.retain(|key| key.starts_with(prefix));
        keys.sort_unstable();
        keys
    }

    /// All objects with their contents: two that are equal mean nothing was changed.
    pub fn contents(&self) -> HashMap<String, Vec<u8>> {
        self.keys("").into_iter().map(|key| (key.clone(), self.object(&key))).collect()
    }

    /// The storage class an object was written with.
    pub fn storage_class(&self, key: &str) -> Option<String> {
        kept_in(&self.metadata(key), STORAGE_CLASS)
    }

    /// The server-side encryption that was asked for an object, and the key after a space.
    pub fn encryption(&self, key: &str) -> Option<String> {
        kept_in(&self.metadata(key), ENCRYPTION)
    }

    /// Sets when an object was written, as the server will tell.
    pub fn set_modified(&self, key: &str, modified_at: SystemTime) {
        set_modified(&self.path(key), modified_at);
    }

    /// The multipart uploads that were neither completed nor aborted, by key and id.
    pub fn unfinished_uploads(&self) -> Vec<UnfinishedUpload> {
        self.list_uploads().unwrap()
    }

    /// Sets when an unfinished upload was begun, as the server will tell.
    pub fn set_upload_started(&self, upload: &UnfinishedUpload, started_at: SystemTime) {
        set_modified(&self.upload_metadata(&upload.key, &upload.upload_id), started_at);
    }

    /// The file of an object.
    pub fn path(&self, key: &str) -> PathBuf {
        self.directory.join(key)
    }

    /// Where an object's `ETag` and checksums are kept.
    pub(super) fn internal(&self, key: &str) -> PathBuf {
        self.beside(key, "internal.json")
    }

    /// Where an object's metadata is kept.
    pub(super) fn metadata(&self, key: &str) -> PathBuf {
        self.beside(key, "metadata.json")
    }

    /// Where an unfinished upload's metadata is kept.
    pub(super) fn upload_metadata(&self, key: &str, upload_id: &str) -> PathBuf {
        self.beside(key, &format!("upload-{upload_id}.metadata.json"))
    }

    /// The file of an uploaded part.
    pub(super) fn part(&self, upload_id: &str, part_number: i32) -> PathBuf {
        self.root.join(format!(".upload_id-{upload_id}.part-{part_number}"))
    }

    /// Whether an upload was begun and neither completed nor aborted.
    pub(super) fn has_upload(&self, upload_id: &str) -> bool {
        !upload_id.contains('/') && self.root.join(format!(".upload-{upload_id}.json")).is_file()
    }

    pub(super) fn exists(&self) -> bool {
        self.directory.is_dir()
    }

    /// Removes what is kept beside an object.
    pub(super) fn remove_details(&self, key: &str) -> io::Result<()> {
        remove_if_there(&self.internal(key))?;
        remove_if_there(&self.metadata(key))
    }

    /// The `ETag` that was kept when an object was written.
    pub(super) fn etag(&self, key: &str) -> Option<String> {
        let internal: Value = serde_json::from_slice(&fs::read(self.internal(key)).ok()?).ok()?;
        internal.get("e_tag")?.as_str().map(str::to_owned)
    }

    pub(super) fn list_uploads(&self) -> io::Result<Vec<UnfinishedUpload>> {
        let mut uploads = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((key, upload_id)) = name.to_str().and_then(|name| self.parse_upload(name))
            else {
                continue;
            };
            // It may be completed while we look.
            let Ok(about) = entry.metadata() else { continue };
            uploads.push(UnfinishedUpload {
                key,
                upload_id,
                started_at: about.modified()?,
                storage_class: kept_in(&entry.path(), STORAGE_CLASS),
            });
        }
        uploads.sort_unstable_by(|one, other| {
            (&one.key, &one.upload_id).cmp(&(&other.key, &other.upload_id))
        });
        Ok(uploads)
    }

    fn parse_upload(&self, name: &str) -> Option<(String, String)> {
        let bucket = URL_SAFE_NO_PAD.encode(&self.name);
        let rest = name.strip_prefix(&format!(".bucket-{bucket}.object-"))?;
        let (key, upload_id) = rest.strip_suffix(".metadata.json")?.split_once(".upload-")?;
        let key = String::from_utf8(URL_SAFE_NO_PAD.decode(key).ok()?).ok()?;
        self.has_upload(upload_id).then(|| (key, upload_id.to_owned()))
    }

    fn beside(&self, key: &str, what: &str) -> PathBuf {
        let bucket = URL_SAFE_NO_PAD.encode(&self.name);
        let key = URL_SAFE_NO_PAD.encode(key);
        self.root.join(format!(".bucket-{bucket}.object-{key}.{what}"))
    }
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn kept_in(metadata: &Path, name: &str) -> Option<String> {
    let metadata: Value = serde_json::from_slice(&fs::read(metadata).ok()?).ok()?;
    metadata.get("user_metadata")?.get(name)?.as_str().map(str::to_owned)
}

fn set_modified(path: &Path, modified_at: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(modified_at).unwrap();
}
