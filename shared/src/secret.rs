//! Secrets: read from a file, never printed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

/// Longest secret file to read, in bytes. Passwords and keys are far shorter; a file above this
/// is the wrong file.
const SECRET_BYTES_MAX: usize = 64 << 10;

/// A secret text. `Debug` hides it, there is no `Display`, and its memory is overwritten on drop.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

/// Why a secret could not be read. The secret itself is in none of the messages.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The file could not be read.
    #[error("read secret file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file holds nothing, or only a line end.
    #[error("secret file {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file is no text.
    #[error("secret file {} is not valid UTF-8", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// The file is far longer than any secret.
    #[error("secret file {} is longer than {SECRET_BYTES_MAX} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
}

impl Secret {
    /// Wraps a text that is already in memory.
    pub fn new(value: String) -> Self {
        Self(value.into())
    }

    /// Reads a secret from a file, usually one that Docker mounts below `/run/secrets`.
    ///
    /// One trailing line end is dropped, since most editors and `echo` add it.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read, is no UTF-8 text, is empty, or is longer than 64 KiB.
    /// Each message names the file.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let owned = || path.to_owned();
        // At full size from the start: growing would leave copies of the secret behind.
        let mut bytes = Vec::with_capacity(SECRET_BYTES_MAX + 1);
        File::open(path)
            .and_then(|file| file.take(SECRET_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
            .map_err(|source| SecretError::Read { path: owned(), source })?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => Zeroizing::new(text),
            Err(error) => {
                error.into_bytes().zeroize();
                return Err(SecretError::NotText { path: owned() });
            }
        };
        if text.len() > SECRET_BYTES_MAX {
            return Err(SecretError::TooLong { path: owned() });
        }
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let value = line.strip_suffix('\r').unwrap_or(line);
        if value.is_empty() {
            return Err(SecretError::Empty { path: owned() });
        }
        Ok(Self::new(value.to_owned()))
    }

    /// Returns the secret itself. Every call is a place a reviewer looks at.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Secret, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, content).unwrap();
        let shown = path.display().to_string();
        Secret::read(&path).map_err(|error| error.to_string().replace(&shown, "FILE"))
    }

    #[test]
    fn one_line_end_is_dropped_and_nothing_else() {
        for (content, expected) in [
            ("hunter2", "hunter2"),
            ("hunter2\n", "hunter2"),
            ("hunter2\r\n", "hunter2"),
            ("hunter2\n\n", "hunter2\n"),
            (" spaces stay \n", " spaces stay "),
        ] {
            assert_eq!(read(content.as_bytes()).unwrap().expose(), expected, "{content:?}");
        }
    }

    #[test]
    fn what_is_no_secret_is_refused_by_file_name() {
        assert_eq!(read(b"").unwrap_err(), "secret file FILE is empty");
        assert_eq!(read(b"\n").unwrap_err(), "secret file FILE is empty");
        assert_eq!(read(b"\xff\xfe").unwrap_err(), "secret file FILE is not valid UTF-8");
        let long = vec![b'a'; 1 << 17];
        assert_eq!(read(&long).unwrap_err(), "secret file FILE is longer than 65536 bytes");
        let absent = Secret::read(Path::new("/nonexistent/password")).unwrap_err();
        assert_eq!(absent.to_string(), "read secret file /nonexistent/password");
    }

    #[test]
    fn a_secret_prints_as_three_dots() {
        let shown = format!("{:?}", Some(Secret::new("hunter2".to_owned())));
        assert_eq!(shown, "Some(Secret(…))");
    }
}
