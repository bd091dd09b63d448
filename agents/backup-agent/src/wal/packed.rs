//! A WAL file on its way into the repository: checked, hashed and compressed, by a few threads.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::iter;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, available_parallelism};

use shared::pg::wal::WalHeader;

use super::{CHUNK_BYTES, Checked, ContentHash, WalError, branch, piece, stem};
use crate::container::Compressed;

/// Threads that hash and compress one file. A server waits for it, but has work of its own.
const THREADS_MAX: usize = 4;

/// A WAL file that was read once: checked, hashed and compressed, and not sealed yet, because its
/// object's name has the hash in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Packed {
    pub(super) file: String,
    pub(super) hash: String,
    pub(super) content: Compressed,
    /// The header of a segment.
    pub header: Option<WalHeader>,
}

impl Packed {
    /// The name of the object that it becomes.
    pub fn name(&self) -> String {
        format!("{}{}", stem(&self.file), self.hash)
    }

    /// Reads a file and checks that its content is what its name says.
    ///
    /// # Errors
    ///
    /// It cannot be read, or the first thing that differs.
    pub fn read(file: &str, from: impl Read + Send, level: i32) -> Result<Self, WalError> {
        let source =
            Mutex::new(Source { from, checked: Checked::new(file)?, chunks: 0, is_over: false });
        let threads = available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX);
        let parts: Vec<Part> = thread::scope(|scope| {
            let pack = || Part::pack(file, &source, level);
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(pack)).collect();
            let joined =
                others.into_iter().map(|it| it.join().unwrap_or_else(|it| resume_unwind(it)));
            iter::once(pack()).chain(joined).collect::<Result<_, _>>()
        })?;
        let numbered = parts.iter().flat_map(|part| part.numbers.iter().zip(&part.hashes));
        let mut hash = ContentHash::default();
        for of_chunk in numbered.collect::<BTreeMap<_, _>>().into_values() {
            hash.update(of_chunk);
        }
        let chunks: Vec<_> = parts.into_iter().map(|part| (part.numbers, part.chunks)).collect();
        let source = source.into_inner().unwrap_or_else(PoisonError::into_inner);
        branch::require_parent(file, &source.checked.text)?;
        Ok(Self {
            file: file.to_owned(),
            hash: hash.in_name(),
            content: Compressed::join(&chunks),
            header: source.checked.finish()?,
        })
    }
}

/// A file that several threads read, each the next chunk when it has done one.
struct Source<R> {
    from: R,
    checked: Checked,
    /// How many were read.
    chunks: usize,
    /// Whether nothing more is read: it has ended, or failed.
    is_over: bool,
}

impl<R: Read> Source<R> {
    /// Reads the next chunk and says which it is; `None` at the end of the file, and to the others when
    /// one has failed.
    fn next(&mut self, file: &str, chunk: &mut Vec<u8>) -> Result<Option<usize>, WalError> {
        chunk.clear();
        if self.is_over {
            return Ok(None);
        }
        self.is_over = true;
        let unreadable = |source| WalError::Read { name: file.to_owned(), source };
        self.from.by_ref().take(CHUNK_BYTES.into()).read_to_end(chunk).map_err(unreadable)?;
        if chunk.is_empty() {
            return Ok(None);
        }
        self.checked.take(chunk)?;
        self.is_over = false;
        self.chunks += 1;
        Ok(Some(self.chunks - 1))
    }
}

/// What one thread made of a file.
#[derive(Debug, Default)]
struct Part {
    numbers: Vec<usize>,
    hashes: Vec<[u8; 32]>,
    chunks: Compressed,
}

impl Part {
    fn pack(file: &str, source: &Mutex<Source<impl Read>>, level: i32) -> Result<Self, WalError> {
        let (mut part, mut chunk) = (Self::default(), Vec::with_capacity(CHUNK_BYTES as usize));
        loop {
            let next = source.lock().unwrap_or_else(PoisonError::into_inner).next(file, &mut chunk);
            let Some(number) = next? else { return Ok(part) };
            part.numbers.push(number);
            part.hashes.push(piece::stretch_hash(&chunk));
            part.chunks.push(&chunk, level).map_err(|reason| {
                let source = io::Error::other(reason);
                WalError::Read { name: file.to_owned(), source }
            })?;
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::telemetry::chain;

    use super::*;

    /// Each chunk has another wrong beginning.
    #[test]
    fn what_differs_first_is_told_whichever_thread_finds_it() {
        let content: Vec<u8> = (1_u8..=20).flat_map(|n| vec![n; CHUNK_BYTES as usize]).collect();
        for round in 0..20 {
            let error =
                Packed::read("000000010000000000000002", content.as_slice(), 1).unwrap_err();
            let told = chain(&error).to_string();
            assert!(told.contains("0101"), "round {round}: {told}");
        }
    }

    /// Fails once, and would go on.
    struct Failing(u32);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += 1;
            if self.0 == 1 {
                Err(io::Error::other("bad sector"))
            } else {
                Ok(buffer.len().min(100))
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_read_on() {
        let error = Packed::read("000000010000000000000002", Failing(0), 1).unwrap_err();
        assert!(chain(&error).to_string().ends_with("bad sector"), "{error:?}");
    }
}
