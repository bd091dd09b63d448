//! The encryption keys: several may be read with, one writes.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use shared::config::Problems;
use shared::secret::{Secret, SecretError};
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of a key: AES-256.
pub const KEY_BYTES: usize = 32;
/// The longest key id: it stands in every object's header.
pub const KEY_ID_BYTES_MAX: usize = 32;

/// The encryption section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncryptionConfig {
    /// The id of the key that new objects are written with.
    pub write_key: String,
    /// Every key that objects may have been written with.
    pub keys: Vec<KeyConfig>,
}

/// One key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// The name that objects carry. Never give another key the same id.
    pub id: String,
    /// A file with 32 random bytes in base64 or hexadecimal, as `new-key` makes it.
    pub file: PathBuf,
}

/// The keys, read.
#[derive(Clone)]
pub struct KeyRing {
    keys: Vec<(String, Zeroizing<[u8; KEY_BYTES]>)>,
    write: usize,
}

/// Why the keys cannot be used.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file could not be read.
    #[error("read encryption key {id} from {}", path.display())]
    Read {
        /// The key's id.
        id: String,
        /// Its file.
        path: PathBuf,
        /// What was wrong.
        source: SecretError,
    },
    /// The file holds something else.
    #[error(
        "encryption key {id} in {} is not 32 bytes in base64 or hexadecimal; \
         make one with `backup-agent new-key`",
        path.display()
    )]
    Malformed {
        /// The key's id.
        id: String,
        /// Its file.
        path: PathBuf,
    },
    /// `write_key` names no key.
    #[error("encryption.write_key {id} is not among encryption.keys")]
    NoWriteKey {
        /// The id asked for.
        id: String,
    },
}

impl EncryptionConfig {
    /// Adds every problem with these keys.
    pub fn check(&self, problems: &mut Problems) {
        for (index, key) in self.keys.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if key.id.is_empty() || key.id.len() > KEY_ID_BYTES_MAX || !key.id.chars().all(plain) {
                let problem =
                    format!("must be 1 to {KEY_ID_BYTES_MAX} letters, digits, dots, - or _");
                problems.add(&format!("encryption.keys[{index}].id"), problem);
            }
            if !key.file.is_absolute() {
                let problem =
                    "must be an absolute path: PostgreSQL fetches WAL from its data directory";
                problems.add(&format!("encryption.keys[{index}].file"), problem);
            }
            if self.keys[..index].iter().any(|other| other.id == key.id) {
                let problem = format!("{} is named twice", key.id);
                problems.add(&format!("encryption.keys[{index}].id"), problem);
            }
        }
        if !self.keys.iter().any(|key| key.id == self.write_key) {
            let problem = format!("{} is not among encryption.keys", self.write_key);
            problems.add("encryption.write_key", problem);
        }
    }
}

/// Docker gives a secret as a file that all may read (0444), in a file system of this container alone.
const SECRETS: &str = "/run/secrets";

/// What is said of key files that everybody can read, and then their names.
pub const EXPOSED: &str =
    "everybody on this host can read the encryption key, and with it every backup: chmod o=";

impl EncryptionConfig {
    /// The key files that others than their owner and group can read, if there are any.
    pub fn exposed(&self) -> Option<String> {
        let files = self.keys.iter().map(|key| &key.file);
        let exposed = files.filter(|file| !file.starts_with(SECRETS) && is_open(file));
        let exposed: Vec<_> = exposed.map(|file| file.display().to_string()).collect();
        (!exposed.is_empty()).then(|| exposed.join(" "))
    }
}

/// Whether everybody can read a file: no directory above it keeps them out.
fn is_open(file: &Path) -> bool {
    let lets = |path: &Path, bits: u32| {
        fs::metadata(path).is_ok_and(|about| about.permissions().mode() & bits != 0)
    };
    let Ok(file) = file.canonicalize() else { return false };
    lets(&file, 0o004) && file.ancestors().skip(1).all(|above| lets(above, 0o001))
}

impl KeyRing {
    /// Reads every configured key.
    ///
    /// # Errors
    ///
    /// The first key that cannot be used.
    pub fn read(config: &EncryptionConfig) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for KeyConfig { id, file } in &config.keys {
            let text = Secret::read(file).map_err(|source| KeyError::Read {
                id: id.clone(),
                path: file.clone(),
                source,
            })?;
            let key = parse(text.expose())
                .ok_or_else(|| KeyError::Malformed { id: id.clone(), path: file.clone() })?;
            keys.push((id.clone(), key));
        }
        Self::new(keys, &config.write_key)
    }

    /// Puts keys together.
    ///
    /// # Errors
    ///
    /// [`KeyError::NoWriteKey`].
    pub fn new(
        keys: Vec<(String, Zeroizing<[u8; KEY_BYTES]>)>,
        write_key: &str,
    ) -> Result<Self, KeyError> {
        let write = keys
            .iter()
            .position(|(id, _)| id == write_key)
            .ok_or_else(|| KeyError::NoWriteKey { id: write_key.to_owned() })?;
        Ok(Self { keys, write })
    }

    /// The key that writes, and its id.
    pub fn writing(&self) -> (&str, &[u8; KEY_BYTES]) {
        let (id, key) = &self.keys[self.write];
        (id, key)
    }

    /// The key of an id, if it is configured.
    pub fn find(&self, id: &str) -> Option<&[u8; KEY_BYTES]> {
        self.keys.iter().find(|(known, _)| known == id).map(|(_, key)| &**key)
    }

    /// The ids of all keys, for messages.
    pub fn ids(&self) -> String {
        self.keys.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyRing({}; writes {})", self.ids(), self.writing().0)
    }
}

/// Returns a new key as text: 32 random bytes in base64.
///
/// # Errors
///
/// The operating system gave no random bytes.
pub fn new_key() -> io::Result<Zeroizing<String>> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    getrandom::fill(&mut *key).map_err(io::Error::other)?;
    Ok(Zeroizing::new(STANDARD.encode(*key)))
}

/// Writes a new key to a file that did not exist, readable by its owner only.
///
/// # Errors
///
/// The file exists already (a key is never overwritten: what it encrypted would be lost), or it
/// cannot be written.
pub fn new_key_file(path: &Path) -> io::Result<()> {
    let key = new_key()?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{}", *key)?;
    file.sync_all()
}

fn parse(text: &str) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let text = text.trim();
    let bytes = if text.len() == 2 * KEY_BYTES {
        hex::decode(text).ok()?
    } else {
        STANDARD.decode(text).ok()?
    };
    let bytes = Zeroizing::new(bytes);
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    if bytes.len() != KEY_BYTES {
        return None;
    }
    key.copy_from_slice(&bytes);
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_bytes_in_base64_or_hexadecimal() {
        let hexadecimal = "00".repeat(31) + "ff";
        let base64 = STANDARD.encode([7; 32]);
        let cases = [
            ("hexadecimal", hexadecimal.as_str(), true),
            ("base64", base64.as_str(), true),
            ("a password", "correct horse battery staple", false),
            ("31 bytes", &STANDARD.encode([7; 31]), false),
            ("33 bytes", &STANDARD.encode([7; 33]), false),
            ("64 letters that are no digits", &"z".repeat(64), false),
            ("nothing", "", false),
        ];
        for (case, text, good) in cases {
            assert_eq!(parse(text).is_some(), good, "{case}");
        }
    }

    #[test]
    fn a_new_key_reads_back_and_never_replaces_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        new_key_file(&path).unwrap();
        assert!(parse(&fs::read_to_string(&path).unwrap()).is_some());
        let again = new_key_file(&path).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }

    /// Nobody was told.
    #[test]
    fn a_key_that_everybody_can_read_is_named() {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let path = directory.path().join("key");
        new_key_file(&path).unwrap();
        let config = |file: &Path| EncryptionConfig {
            write_key: "a".to_owned(),
            keys: vec![KeyConfig { id: "a".to_owned(), file: file.to_owned() }],
        };
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        for (case, above, file, is_told) in [
            ("the owner alone", 0o755, 0o600, false),
            ("and a group", 0o755, 0o640, false),
            ("everybody", 0o755, 0o644, true),
            ("everybody who comes so far", 0o750, 0o644, false),
        ] {
            mode(directory.path(), above);
            mode(&path, file);
            let expected = is_told.then(|| path.display().to_string());
            assert_eq!(config(&path).exposed(), expected, "{case}");
        }
        assert_eq!(config(Path::new("/run/secrets/key")).exposed(), None);
    }

    #[test]
    fn a_key_ring_never_prints_a_key() {
        let ring = KeyRing::new(vec![("a".to_owned(), Zeroizing::new([65; 32]))], "a").unwrap();
        assert_eq!(format!("{ring:?}"), "KeyRing(a; writes a)");
    }
}
