//! The one format of every object in the repository: compress, then seal; and the reverse.
//!
//! ```text
//! header   100 bytes, readable without a key
//! chunks   each AES-256-GCM( data ‖ codec byte ), 16-byte tag at its end
//! index    the length of the whole, when it was sealed, and the sealed lengths of the chunks,
//!          sealed like a chunk
//! trailer  16 bytes: length of the sealed index, number of chunks, magic
//! ```
//!
//! The key of an object is HKDF-SHA256 of the configured key with the header's random salt, the
//! system identifier, the kind and the object's name. The nonce of a chunk is its number and
//! whether it is the last (the index is); the associated data is the SHA-256 of the header. So
//! whatever is reordered, dropped, repeated, truncated, swapped between objects or renamed does
//! not open. Source: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and
//! its Nonce-Reuse Misuse-Resistance" (the STREAM construction), 2015.
//!
//! Chunks are independent zstd frames: they are made and opened in parallel, and a part of an
//! object can be read alone. All integers are little-endian.
//!
//! Format version 1 has no time in the index, and is read as ever.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use hkdf::Hkdf;
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::keys::{KEY_ID_BYTES_MAX, KeyRing};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 100;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 16;
/// Bytes of an authentication tag.
pub const TAG_BYTES: usize = 16;
/// The largest chunk a reader accepts, in plaintext bytes: it allocates that much.
pub const CHUNK_BYTES_MAX: u32 = 16 << 20;
/// The most chunks an object can have; the nonce has room for 2³², memory for the index has not.
pub const CHUNKS_MAX: u32 = 1 << 22;

const MAGIC: [u8; 8] = *b"PGMESH\r\n";
const TRAILER_MAGIC: [u8; 8] = *b"\r\nHSEMGP";
const VERSION: u16 = 2;
/// The version before, whose index has no time.
const VERSION_WITHOUT_TIME: u16 = 1;
/// The longest index there can be, sealed.
const INDEX_BYTES_MAX: u32 = 16 + 4 * CHUNKS_MAX + 16;
/// HKDF-SHA256, AES-256-GCM, zstd.
const SUITE: u8 = 1;
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// What an object is. The number stands in the header and goes into the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A stretch of a base backup's tar stream.
    Part = 1,
    /// The server's own `backup_manifest`.
    Manifest = 2,
    /// The table of the files in the tar stream.
    Files = 3,
    /// What makes a backup exist.
    Commit = 4,
    /// A WAL segment, complete or partial.
    Wal = 5,
    /// A timeline history file or a backup history file.
    History = 6,
    /// Marks a backup as deleted.
    Tombstone = 7,
    /// Written and read by `check`.
    Probe = 8,
    /// Tells of WAL that is lost.
    Gap = 9,
    /// Tells that a replication slot was made to fill this place.
    Begun = 10,
    /// Tells that a timeline's primary was received from.
    Followed = 11,
}

/// What an object is called and where it belongs: part of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The PostgreSQL system identifier.
    pub system_identifier: u64,
    /// What it is.
    pub kind: Kind,
    /// Its name below the system identifier's folder.
    pub name: String,
}

/// Why an object is not what it should be. Each names the object.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Too short, or not one of ours.
    #[error("{name} is not an object of this repository or its header is damaged: {reason}")]
    NotOurs {
        /// The object.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// Written by a later release.
    #[error(
        "{name} has format version {found}, this release reads {VERSION_WITHOUT_TIME} to {VERSION}; \
         use a newer backup-agent"
    )]
    Version {
        /// The object.
        name: String,
        /// Its version.
        found: u16,
    },
    /// The key is not configured.
    #[error("{name} is encrypted with key {key_id}, which is not configured (there are: {known})")]
    MissingKey {
        /// The object.
        name: String,
        /// The key's id.
        key_id: String,
        /// The ids that are configured.
        known: String,
    },
    /// A key of that id is configured, but another wrote the object.
    #[error("{name} was not encrypted with the configured key {key_id}: wrong key under this id")]
    WrongKey {
        /// The object.
        name: String,
        /// The key's id.
        key_id: String,
    },
    /// A whole object that was written as another.
    #[error("{name} holds an object that was written under another name, kind or cluster")]
    Misplaced {
        /// The object.
        name: String,
    },
    /// An object of this name and key, but not the one the backup recorded.
    #[error("{name} is not the object that was recorded: it was replaced by another version")]
    Replaced {
        /// The object.
        name: String,
    },
    /// The end is missing or wrong.
    #[error("{name} is truncated or its end is damaged: {reason}")]
    Truncated {
        /// The object.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// A chunk does not open.
    #[error("{name} is damaged in chunk {chunk} of {chunks}")]
    Damaged {
        /// The object.
        name: String,
        /// The chunk's number, from 0; the index counts as the last.
        chunk: u32,
        /// How many there are.
        chunks: u32,
    },
    /// More than the format holds.
    #[error("{name} would need more than {CHUNKS_MAX} chunks; use a larger chunk size")]
    TooLarge {
        /// The object.
        name: String,
    },
    /// zstd or the random number generator failed.
    #[error("{operation} {name}: {reason}")]
    Codec {
        /// What was tried.
        operation: &'static str,
        /// The object.
        name: String,
        /// What the library said.
        reason: String,
    },
}

/// The readable beginning of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    version: u16,
    kind: u8,
    chunk_bytes: u32,
    key_id: String,
    salt: [u8; 32],
    key_check: [u8; 8],
    name_check: [u8; 8],
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = SUITE;
        bytes[11] = self.kind;
        bytes[12..16].copy_from_slice(&self.chunk_bytes.to_le_bytes());
        bytes[16..16 + self.key_id.len()].copy_from_slice(self.key_id.as_bytes());
        bytes[48..80].copy_from_slice(&self.salt);
        bytes[80..88].copy_from_slice(&self.key_check);
        bytes[88..96].copy_from_slice(&self.name_check);
        let checksum = crc32c::crc32c(&bytes[..96]);
        bytes[96..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn decode(name: &str, bytes: &[u8]) -> Result<Self, ContainerError> {
        let not_ours = |reason: String| ContainerError::NotOurs { name: name.to_owned(), reason };
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            let found = bytes.len();
            return Err(not_ours(format!("expected {HEADER_BYTES} bytes or more, found {found}")));
        };
        if bytes[..8] != MAGIC {
            return Err(not_ours("it does not begin with the magic bytes".to_owned()));
        }
        if crc32c::crc32c(&bytes[..96]) != u32::from_le_bytes(array(&bytes[96..])) {
            return Err(not_ours("the header's checksum is wrong".to_owned()));
        }
        let version = u16::from_le_bytes(array(&bytes[8..10]));
        if !(VERSION_WITHOUT_TIME..=VERSION).contains(&version) || bytes[10] != SUITE {
            return Err(ContainerError::Version { name: name.to_owned(), found: version });
        }
        let chunk_bytes = u32::from_le_bytes(array(&bytes[12..16]));
        if chunk_bytes == 0 || chunk_bytes > CHUNK_BYTES_MAX {
            return Err(not_ours(format!("a chunk size of {chunk_bytes} bytes")));
        }
        let key_id = bytes[16..48].split(|byte| *byte == 0).next().unwrap_or_default();
        let key_id = std::str::from_utf8(key_id)
            .map_err(|_| not_ours("the key id is no text".to_owned()))?
            .to_owned();
        Ok(Self {
            version,
            kind: bytes[11],
            chunk_bytes,
            key_id,
            salt: array(&bytes[48..80]),
            key_check: array(&bytes[80..88]),
            name_check: array(&bytes[88..96]),
        })
    }

    /// Bytes of the index before the lengths of the chunks: the length of the whole, and the time.
    fn index_head_bytes(&self) -> usize {
        if self.version == VERSION_WITHOUT_TIME { 8 } else { 16 }
    }
}

/// Seals the chunks of one object. Shared between the threads that do so.
#[derive(Debug)]
pub struct Sealer {
    name: String,
    header: [u8; HEADER_BYTES],
    salt: [u8; 32],
    chunk_bytes: u32,
    cipher: Cipher,
    level: i32,
}

impl Sealer {
    /// Begins an object: draws its salt and derives its key.
    ///
    /// `level` is zstd's, from 1 to 19.
    ///
    /// # Errors
    ///
    /// The operating system gave no random bytes.
    pub fn new(
        keys: &KeyRing,
        identity: &Identity,
        chunk_bytes: u32,
        level: i32,
    ) -> Result<Self, ContainerError> {
        let (key_id, key) = keys.writing();
        debug_assert!(key_id.len() <= KEY_ID_BYTES_MAX && chunk_bytes <= CHUNK_BYTES_MAX);
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).map_err(|error| ContainerError::Codec {
            operation: "draw a salt for",
            name: identity.name.clone(),
            reason: error.to_string(),
        })?;
        let derived = Derived::new(key, &salt, identity);
        let header = Header {
            version: VERSION,
            kind: identity.kind as u8,
            chunk_bytes,
            key_id: key_id.to_owned(),
            salt,
            key_check: derived.key_check,
            name_check: name_check(identity),
        }
        .encode();
        let cipher = Cipher::new(&derived.key, &header);
        Ok(Self { name: identity.name.clone(), header, salt, chunk_bytes, cipher, level })
    }

    /// The first bytes of the object.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The salt: it names this very object, since no two ever share one.
    pub fn salt(&self) -> [u8; 32] {
        self.salt
    }

    /// The plaintext bytes of each chunk but the last.
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes as usize
    }

    /// Compresses and seals chunk `number`, from 0, into `sealed`, which is cleared first.
    ///
    /// # Errors
    ///
    /// zstd failed, or the object has too many chunks.
    pub fn seal(
        &self,
        number: u32,
        plain: &[u8],
        sealed: &mut Vec<u8>,
    ) -> Result<(), ContainerError> {
        sealed.clear();
        compress(plain, self.level, sealed).map_err(|reason| ContainerError::Codec {
            operation: "compress",
            name: self.name.clone(),
            reason,
        })?;
        self.encrypt(number, sealed)
    }

    /// Seals a chunk that [`compress`] made.
    fn encrypt(&self, number: u32, chunk: &mut [u8]) -> Result<(), ContainerError> {
        if number < CHUNKS_MAX && self.cipher.seal(number, false, chunk) {
            return Ok(());
        }
        Err(ContainerError::TooLarge { name: self.name.clone() })
    }

    /// Seals the index and returns the end of the object.
    ///
    /// # Errors
    ///
    /// More than the cipher takes, which no object reaches.
    pub fn finish(&self, sealed_lens: &[u32], plain_bytes: u64) -> Result<Vec<u8>, ContainerError> {
        let chunks = count(sealed_lens.len());
        let mut tail = Vec::with_capacity(16 + 4 * sealed_lens.len() + TAG_BYTES + TRAILER_BYTES);
        tail.extend_from_slice(&plain_bytes.to_le_bytes());
        tail.extend_from_slice(&Utc::now().timestamp_micros().to_le_bytes());
        for len in sealed_lens {
            tail.extend_from_slice(&len.to_le_bytes());
        }
        tail.extend_from_slice(&[0; TAG_BYTES]);
        if !self.cipher.seal(chunks, true, &mut tail) {
            return Err(ContainerError::TooLarge { name: self.name.clone() });
        }
        let index_bytes = count(tail.len());
        tail.extend_from_slice(&index_bytes.to_le_bytes());
        tail.extend_from_slice(&chunks.to_le_bytes());
        tail.extend_from_slice(&TRAILER_MAGIC);
        Ok(tail)
    }
}

/// Opens the chunks of one object, once its header and index have been checked.
#[derive(Debug)]
pub struct Opener {
    name: String,
    salt: [u8; 32],
    chunk_bytes: u32,
    plain_bytes: u64,
    sealed_at: Option<DateTime<Utc>>,
    /// Where chunk `n` begins in the object; one more than there are chunks.
    offsets: Vec<u64>,
    cipher: Cipher,
}

/// The header of an object whose index has not been read yet.
#[derive(Debug)]
pub struct Unopened {
    name: String,
    header: Header,
    cipher: Cipher,
}

impl Unopened {
    /// Reads a header, finds its key, and checks that it is the header of this object.
    ///
    /// # Errors
    ///
    /// Each way a header can be wrong.
    pub fn new(
        keys: &KeyRing,
        identity: &Identity,
        header_bytes: &[u8],
    ) -> Result<Self, ContainerError> {
        let name = &identity.name;
        let header = Header::decode(name, header_bytes)?;
        let key = keys.find(&header.key_id).ok_or_else(|| ContainerError::MissingKey {
            name: name.clone(),
            key_id: header.key_id.clone(),
            known: keys.ids(),
        })?;
        let derived = Derived::new(key, &header.salt, identity);
        if derived.key_check != header.key_check {
            let key_id = header.key_id;
            return Err(ContainerError::WrongKey { name: name.clone(), key_id });
        }
        if name_check(identity) != header.name_check || header.kind != identity.kind as u8 {
            return Err(ContainerError::Misplaced { name: name.clone() });
        }
        let cipher = Cipher::new(&derived.key, &header_bytes[..HEADER_BYTES]);
        Ok(Self { name: name.clone(), header, cipher })
    }

    /// The id of the key that sealed it.
    pub fn key_id(&self) -> &str {
        &self.header.key_id
    }

    /// Opens the index. `tail` is the end of the object, `object_bytes` its length.
    ///
    /// # Errors
    ///
    /// [`ContainerError::Truncated`], or [`ContainerError::Damaged`] for the index.
    pub fn open_index(self, tail: &[u8], object_bytes: u64) -> Result<Opener, ContainerError> {
        let truncated =
            |reason: String| ContainerError::Truncated { name: self.name.clone(), reason };
        let (index_bytes, chunks) = trailer(tail)
            .ok_or_else(|| truncated("it does not end with the magic bytes".to_owned()))?;
        let head_bytes = self.header.index_head_bytes();
        let index_end = tail.len() - TRAILER_BYTES;
        let index_start = index_end
            .checked_sub(index_bytes as usize)
            .filter(|_| index_bytes as usize == head_bytes + 4 * chunks as usize + TAG_BYTES)
            .ok_or_else(|| truncated("the index has an impossible length".to_owned()))?;
        let mut index = Vec::new();
        if !self.cipher.open(chunks, true, &tail[index_start..index_end], &mut index) {
            return Err(ContainerError::Damaged { name: self.name, chunk: chunks, chunks });
        }
        let (head, lens) = index.split_at(head_bytes);
        let plain_bytes = u64::from_le_bytes(array(head));
        let sealed_at = head.last_chunk().filter(|_| head_bytes > 8).copied();
        let sealed_at =
            sealed_at.and_then(|at| DateTime::from_timestamp_micros(i64::from_le_bytes(at)));
        let mut offsets = Vec::with_capacity(chunks as usize + 1);
        let mut offset = HEADER_BYTES as u64;
        for len in lens.chunks_exact(4) {
            offsets.push(offset);
            offset += u64::from(u32::from_le_bytes(array(len)));
        }
        offsets.push(offset);
        let expected = offset + u64::from(index_bytes) + TRAILER_BYTES as u64;
        if expected != object_bytes {
            return Err(truncated(format!("expected {expected} bytes, found {object_bytes}")));
        }
        if plain_bytes.div_ceil(u64::from(self.header.chunk_bytes)) != u64::from(chunks) {
            return Err(truncated(format!("{plain_bytes} bytes in {chunks} chunks")));
        }
        Ok(Opener {
            name: self.name,
            salt: self.header.salt,
            chunk_bytes: self.header.chunk_bytes,
            plain_bytes,
            sealed_at,
            offsets,
            cipher: self.cipher,
        })
    }
}

/// How many bytes from the end [`Unopened::open_index`] needs, told by the last
/// [`TRAILER_BYTES`] of the object; `None` if they are no trailer.
pub fn tail_bytes(end: &[u8]) -> Option<u64> {
    trailer(end).map(|(index_bytes, _)| u64::from(index_bytes) + TRAILER_BYTES as u64)
}

impl Opener {
    /// What the object is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The salt: it names this very object.
    pub fn salt(&self) -> [u8; 32] {
        self.salt
    }

    /// Refuses an object that is authentic but not the one that was recorded.
    ///
    /// # Errors
    ///
    /// [`ContainerError::Replaced`].
    pub fn require_salt(&self, recorded: &[u8; 32]) -> Result<(), ContainerError> {
        if self.salt == *recorded {
            return Ok(());
        }
        Err(ContainerError::Replaced { name: self.name.clone() })
    }

    /// Plaintext bytes of the whole object.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// When it was sealed, by the clock of who did: nothing in it is younger. `None` before format
    /// version 2.
    pub fn sealed_at(&self) -> Option<DateTime<Utc>> {
        self.sealed_at
    }

    /// Plaintext bytes of each chunk but the last.
    pub fn chunk_bytes(&self) -> u64 {
        u64::from(self.chunk_bytes)
    }

    /// The number of chunks.
    pub fn chunks(&self) -> u32 {
        count(self.offsets.len() - 1)
    }

    /// Where chunks `first` up to but not including `end` lie in the object.
    pub fn range(&self, first: u32, end: u32) -> Range<u64> {
        self.offsets[first as usize]..self.offsets[end as usize]
    }

    /// Opens and decompresses a chunk into `plain`; what was in the buffers goes.
    fn open(
        &self,
        number: u32,
        sealed: &[u8],
        opened: &mut Vec<u8>,
        plain: &mut Vec<u8>,
    ) -> Result<(), ContainerError> {
        plain.clear();
        let expected = self.plain_len(number);
        let good = self.cipher.open(number, false, sealed, opened)
            && decompress(opened, expected, plain)
            && plain.len() == expected;
        if good {
            return Ok(());
        }
        plain.clear();
        let name = self.name.clone();
        Err(ContainerError::Damaged { name, chunk: number, chunks: self.chunks() })
    }

    /// Opens the chunks from `first` on that `sealed` holds, as [`Opener::range`] cut it, and hands
    /// the plaintext of each to `take`, in order.
    ///
    /// # Errors
    ///
    /// [`ContainerError::Damaged`] for the first chunk that does not open; or what `take` says.
    pub fn open_stretch<E: From<ContainerError>>(
        &self,
        first: u32,
        end: u32,
        sealed: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let base = self.range(first, end).start;
        let (mut opened, mut plain) = (Vec::new(), Vec::new());
        for number in first..end {
            let Range { start, end } = self.range(number, number + 1);
            let chunk = sealed.get(index(start - base)..index(end - base)).unwrap_or_default();
            self.open(number, chunk, &mut opened, &mut plain)?;
            take(&plain)?;
        }
        Ok(())
    }

    /// Plaintext bytes of chunk `number`.
    fn plain_len(&self, number: u32) -> usize {
        let start = u64::from(number) * u64::from(self.chunk_bytes);
        let rest = self.plain_bytes.saturating_sub(start);
        index(rest.min(u64::from(self.chunk_bytes)))
    }
}

/// Content that is compressed and not sealed yet: the name of the object may depend on it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Compressed {
    /// The object as it will be: room for the header, then each chunk with room for its tag. So it
    /// is sealed where it lies; fresh memory costs more than the cipher does.
    object: Vec<u8>,
    /// The length of each chunk, its tag included.
    lens: Vec<u32>,
    plain_bytes: u64,
}

impl Compressed {
    /// Adds the next chunk. All but the last are equally large.
    ///
    /// # Errors
    ///
    /// What zstd said.
    pub fn push(&mut self, plain: &[u8], level: i32) -> Result<(), String> {
        let start = self.object.len().max(HEADER_BYTES);
        self.object.resize(start, 0);
        compress(plain, level, &mut self.object)?;
        self.lens.push(count(self.object.len() - start));
        self.plain_bytes += plain.len() as u64;
        Ok(())
    }

    /// Its chunks, as they will stand in the object, tags not made yet.
    fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.object.get(HEADER_BYTES..).unwrap_or_default();
        self.lens.iter().map(move |len| {
            let (chunk, after) = rest.split_at(*len as usize);
            rest = after;
            chunk
        })
    }

    /// Joins chunks of one content that several threads have compressed: each part with the numbers of
    /// its chunks.
    pub fn join(parts: &[(Vec<usize>, Self)]) -> Self {
        let numbered = parts.iter().flat_map(|(numbers, part)| numbers.iter().zip(part.chunks()));
        let in_order: BTreeMap<_, _> = numbered.collect();
        let mut object = Vec::with_capacity(parts.iter().map(|(_, part)| part.object.len()).sum());
        object.resize(HEADER_BYTES, 0);
        for chunk in in_order.values() {
            object.extend_from_slice(chunk);
        }
        Self {
            object,
            lens: in_order.values().map(|chunk| count(chunk.len())).collect(),
            plain_bytes: parts.iter().map(|(_, part)| part.plain_bytes).sum(),
        }
    }

    /// A copy of the chunks from number `first` on. All of them hold `chunk_bytes`.
    pub fn after(&self, first: usize, chunk_bytes: u64) -> Self {
        let skipped: usize = self.lens.iter().take(first).map(|len| *len as usize).sum();
        let mut object = vec![0; HEADER_BYTES];
        object.extend_from_slice(self.object.get(HEADER_BYTES + skipped..).unwrap_or_default());
        let lens = self.lens.get(first..).unwrap_or_default().to_vec();
        let plain_bytes = lens.len() as u64 * chunk_bytes;
        Self { object, lens, plain_bytes }
    }

    /// Seals the whole object; returns it and its salt.
    ///
    /// # Errors
    ///
    /// As [`Sealer::new`]; or too many chunks.
    pub fn seal(
        self,
        keys: &KeyRing,
        identity: &Identity,
        chunk_bytes: u32,
    ) -> Result<(Bytes, [u8; 32]), ContainerError> {
        let Self { mut object, lens, plain_bytes } = self;
        let sealer = Sealer::new(keys, identity, chunk_bytes, 1)?;
        object.resize(object.len().max(HEADER_BYTES), 0);
        let (header, mut rest) = object.split_at_mut(HEADER_BYTES);
        header.copy_from_slice(sealer.header());
        for (number, len) in (0..).zip(&lens) {
            let (chunk, after) = rest.split_at_mut(*len as usize);
            sealer.encrypt(number, chunk)?;
            rest = after;
        }
        object.extend_from_slice(&sealer.finish(&lens, plain_bytes)?);
        Ok((object.into(), sealer.salt()))
    }
}

/// Seals a small object in one go.
///
/// # Errors
///
/// As [`Sealer::new`] and [`Sealer::seal`].
pub fn seal_whole(
    keys: &KeyRing,
    identity: &Identity,
    chunk_bytes: u32,
    level: i32,
    plain: &[u8],
) -> Result<(Bytes, [u8; 32]), ContainerError> {
    let mut compressed = Compressed::default();
    for chunk in plain.chunks(chunk_bytes as usize) {
        compressed.push(chunk, level).map_err(|reason| ContainerError::Codec {
            operation: "compress",
            name: identity.name.clone(),
            reason,
        })?;
    }
    compressed.seal(keys, identity, chunk_bytes)
}

/// Opens an object that is in memory as a whole, and hands its chunks to `take`, in order.
/// Returns its salt.
///
/// # Errors
///
/// Each way an object can be wrong; what `take` was given by then is authentic and incomplete.
/// Or what `take` says.
pub fn open_each<E: From<ContainerError>>(
    keys: &KeyRing,
    identity: &Identity,
    object: &[u8],
    take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<[u8; 32], E> {
    let unopened = Unopened::new(keys, identity, object)?;
    let opener = unopened.open_index(&object[HEADER_BYTES..], object.len() as u64)?;
    let Range { start, end } = opener.range(0, opener.chunks());
    let chunks = object.get(index(start)..index(end)).unwrap_or_default();
    opener.open_stretch(0, opener.chunks(), chunks, take)?;
    Ok(opener.salt())
}

/// Opens an object that is in memory as a whole.
///
/// # Errors
///
/// Each way an object can be wrong; never a part of its content.
pub fn open_whole(
    keys: &KeyRing,
    identity: &Identity,
    object: &[u8],
) -> Result<(Vec<u8>, [u8; 32]), ContainerError> {
    let mut whole = Vec::new();
    let salt = open_each(keys, identity, object, |plain| {
        whole.extend_from_slice(plain);
        Ok::<_, ContainerError>(())
    })?;
    Ok((whole, salt))
}

/// What is derived from a configured key for one object.
struct Derived {
    key: Zeroizing<[u8; 32]>,
    key_check: [u8; 8],
}

impl Derived {
    fn new(key: &[u8; 32], salt: &[u8; 32], identity: &Identity) -> Self {
        let hkdf = Hkdf::<Sha256>::new(Some(salt), key);
        let mut derived = Self { key: Zeroizing::new([0; 32]), key_check: [0; 8] };
        // 40 bytes are far below the 255 × 32 that HKDF-SHA256 gives, its only failure.
        let info = info(identity);
        let expanded = hkdf.expand(&info, &mut *derived.key).is_ok()
            && hkdf.expand(b"pgmesh v1 key check", &mut derived.key_check).is_ok();
        assert!(expanded, "HKDF-SHA256 gives 40 bytes");
        derived
    }
}

fn info(identity: &Identity) -> Vec<u8> {
    let mut info = b"pgmesh v1 object".to_vec();
    info.extend_from_slice(&identity.system_identifier.to_le_bytes());
    info.push(identity.kind as u8);
    info.extend_from_slice(identity.name.as_bytes());
    info
}

fn name_check(identity: &Identity) -> [u8; 8] {
    array(&Sha256::digest(info(identity))[..8])
}

/// AES-256-GCM with the key of one object.
struct Cipher {
    key: LessSafeKey,
    associated: [u8; 32],
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher(…)")
    }
}

impl Cipher {
    fn new(key: &[u8; 32], header: &[u8]) -> Self {
        let Ok(key) = UnboundKey::new(&AES_256_GCM, key) else {
            unreachable!("AES-256 takes every key of 32 bytes");
        };
        Self { key: LessSafeKey::new(key), associated: Sha256::digest(header).into() }
    }

    /// Chunk counter ‖ last flag, in the last five bytes.
    fn nonce(number: u32, last: bool) -> Nonce {
        let mut nonce = [0; 12];
        nonce[7..11].copy_from_slice(&number.to_be_bytes());
        nonce[11] = u8::from(last);
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals `buffer`, at whose end there is room for the tag.
    fn seal(&self, number: u32, last: bool, buffer: &mut [u8]) -> bool {
        let Some((data, room)) = buffer.split_last_chunk_mut::<TAG_BYTES>() else { return false };
        let (nonce, associated) = (Self::nonce(number, last), Aad::from(self.associated));
        let sealed = self.key.seal_in_place_separate_tag(nonce, associated, data);
        sealed.is_ok_and(|tag| {
            room.copy_from_slice(tag.as_ref());
            true
        })
    }

    /// Opens `sealed` into `opened`, whose content means nothing if this fails.
    fn open(&self, number: u32, last: bool, sealed: &[u8], opened: &mut Vec<u8>) -> bool {
        let Some((data, tag)) = sealed.split_last_chunk::<TAG_BYTES>() else { return false };
        let (nonce, associated) = (Self::nonce(number, last), Aad::from(self.associated));
        opened.resize(data.len(), 0);
        self.key.open_separate_gather(nonce, associated, data, tag, opened).is_ok()
    }
}

thread_local! {
    // A compressor keeps a megabyte of tables; making one for each chunk costs as much as a chunk.
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
        const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// Appends a chunk to `out`: the compressed data, the codec byte, and room for the tag. What zstd
/// cannot shrink is kept as it is.
fn compress(plain: &[u8], level: i32, out: &mut Vec<u8>) -> Result<(), String> {
    let start = out.len();
    out.reserve(zstd::zstd_safe::compress_bound(plain.len()) + 1 + TAG_BYTES);
    let compressed = COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(used, _)| *used != level) {
            *slot = Some((level, zstd::bulk::Compressor::new(level)?));
        }
        let mut room = Cursor::new(&mut *out);
        room.set_position(start as u64);
        match slot {
            Some((_, compressor)) => compressor.compress_to_buffer(plain, &mut room),
            None => Ok(plain.len()),
        }
    });
    if compressed.map_err(|error| error.to_string())? < plain.len() {
        out.push(CODEC_ZSTD);
    } else {
        out.truncate(start);
        out.extend_from_slice(plain);
        out.push(CODEC_RAW);
    }
    out.extend_from_slice(&[0; TAG_BYTES]);
    Ok(())
}

fn decompress(opened: &[u8], expected: usize, plain: &mut Vec<u8>) -> bool {
    match opened.split_last() {
        Some((&CODEC_RAW, data)) => {
            plain.extend_from_slice(data);
            true
        }
        Some((&CODEC_ZSTD, data)) => DECOMPRESSOR.with_borrow_mut(|slot| {
            if slot.is_none() {
                *slot = zstd::bulk::Decompressor::new().ok();
            }
            plain.reserve(expected);
            slot.as_mut().is_some_and(|it| it.decompress_to_buffer(data, plain).is_ok())
        }),
        _ => false,
    }
}

fn trailer(end: &[u8]) -> Option<(u32, u32)> {
    let trailer = end.last_chunk::<TRAILER_BYTES>()?;
    let index_bytes = u32::from_le_bytes(array(&trailer[..4]));
    let chunks = u32::from_le_bytes(array(&trailer[4..8]));
    let is_possible = chunks <= CHUNKS_MAX && index_bytes <= INDEX_BYTES_MAX;
    (trailer[8..] == TRAILER_MAGIC && is_possible).then_some((index_bytes, chunks))
}

/// A count of bytes in memory; what does not fit cannot be there.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// A length or a count that the format bounds far below 2³².
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// The first `N` bytes of a slice that is at least so long.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[..N]);
    array
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(byte: u8) -> KeyRing {
        KeyRing::new(vec![("k1".to_owned(), Zeroizing::new([byte; 32]))], "k1").unwrap()
    }

    fn identity(name: &str) -> Identity {
        Identity { system_identifier: 7, kind: Kind::Part, name: name.to_owned() }
    }

    /// Three chunks of 100 bytes and a shorter one.
    fn object() -> (Vec<u8>, Vec<u8>) {
        let plain: Vec<u8> = (0..350_u32).map(|n| (n * n % 251) as u8).collect();
        let (object, _) = seal_whole(&keys(1), &identity("a"), 100, 3, &plain).unwrap();
        (plain, object.to_vec())
    }

    fn refused(object: &[u8]) -> ContainerError {
        open_whole(&keys(1), &identity("a"), object).unwrap_err()
    }

    proptest! {
        #[test]
        fn any_content_comes_back(plain in prop::collection::vec(any::<u8>(), 0..2000), chunk in 1_u32..300) {
            let (object, salt) = seal_whole(&keys(1), &identity("a"), chunk, 1, &plain).unwrap();
            let (opened, opened_salt) = open_whole(&keys(1), &identity("a"), &object).unwrap();
            prop_assert_eq!(opened, plain);
            prop_assert_eq!(opened_salt, salt);
        }

        #[test]
        fn no_flipped_bit_is_accepted(byte in 0_usize..1000, bit in 0_u8..8) {
            let (_, mut object) = object();
            let byte = byte % object.len();
            object[byte] ^= 1 << bit;
            refused(&object);
        }

        #[test]
        fn no_other_length_is_accepted(len in 0_usize..1000) {
            let (_, mut object) = object();
            let len = len % object.len();
            object.truncate(len);
            refused(&object);
        }
    }

    #[test]
    fn nothing_is_one_index_and_no_chunk() {
        let (object, _) = seal_whole(&keys(1), &identity("a"), 100, 3, b"").unwrap();
        assert_eq!(open_whole(&keys(1), &identity("a"), &object).unwrap().0, b"");
    }

    /// Another implementation opens what ours sealed.
    #[test]
    fn a_chunk_is_aes_256_gcm_as_the_format_says() {
        use aes_gcm::aead::{AeadInOut, KeyInit};
        let (plain, object) = object();
        let unopened = Unopened::new(&keys(1), &identity("a"), &object).unwrap();
        let opener = unopened.open_index(&object[HEADER_BYTES..], object.len() as u64).unwrap();
        let Range { start, end } = opener.range(2, 3);
        let (chunk, tag) = object[index(start)..index(end)].split_last_chunk().unwrap();
        let mut chunk = chunk.to_vec();
        let key = Derived::new(&[1; 32], &opener.salt(), &identity("a")).key;
        let nonce = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0];
        let associated = Sha256::digest(&object[..HEADER_BYTES]);
        let buffer = chunk.as_mut_slice().into();
        aes_gcm::Aes256Gcm::new(&(*key).into())
            .decrypt_inout_detached(&nonce.into(), &associated, buffer, &(*tag).into())
            .unwrap();
        let mut content = Vec::new();
        assert!(decompress(&chunk, 100, &mut content));
        assert_eq!(content, plain[200..300]);
    }

    #[test]
    fn the_chunks_after_the_first_are_content_of_their_own() {
        let mut content = Compressed::default();
        for chunk in [b"one", b"two", b"six"] {
            content.push(chunk, 1).unwrap();
        }
        for (first, expected) in [(0, "onetwosix"), (1, "twosix"), (3, "")] {
            let (object, _) = content.after(first, 3).seal(&keys(1), &identity("a"), 3).unwrap();
            let (opened, _) = open_whole(&keys(1), &identity("a"), &object).unwrap();
            assert_eq!(opened, expected.as_bytes(), "after {first}");
        }
    }

    #[test]
    fn what_does_not_shrink_is_kept_as_it_is() {
        let mut plain = vec![0; 1 << 16];
        getrandom::fill(&mut plain).unwrap();
        let (object, _) = seal_whole(&keys(1), &identity("a"), 1 << 16, 3, &plain).unwrap();
        let overhead = object.len() - plain.len();
        assert!(overhead < 200, "{overhead} bytes more");
        assert_eq!(open_whole(&keys(1), &identity("a"), &object).unwrap().0, plain);
    }

    /// What a release wrote that put no time into the index.
    #[test]
    fn format_version_1_is_read() {
        let object = hex::decode(
            "50474d4553480d0a01000106000004006b3100000000000000000000000000000000000000000000\
             00000000000000007a6493949d541e415658108fef568cf875d70c518f5367f25f8c19f9487366ba\
             971f13ddb562c7de9b1cdf9ab26f788686ff40f4fb3ede742191207e1118cad2e0dbdfad000ecc07\
             9609780b38d57cb3dc61e0a188fd5f38d3f6926bc2c7f25ccb4ded8d8bab854d8e3282559fe61039\
             8a7bcb089593052a5245d6159e5a0ceda59bf15502b908a93b9b1c000000010000000d0a4853454d\
             4750",
        )
        .unwrap();
        let name = "history/00000002.history-7a41d2c559c1e31e".to_owned();
        let identity = Identity { system_identifier: 7, kind: Kind::History, name };
        let (content, _) = open_whole(&keys(1), &identity, &object).unwrap();
        assert_eq!(content, b"1\t0/5000000\tno recovery target specified\n");
        let unopened = Unopened::new(&keys(1), &identity, &object).unwrap();
        let opener = unopened.open_index(&object, object.len() as u64).unwrap();
        assert_eq!(opener.sealed_at(), None);
    }

    #[test]
    fn an_object_says_when_it_was_sealed() {
        let before = Utc::now() - chrono::TimeDelta::microseconds(1);
        let (_, object) = object();
        let unopened = Unopened::new(&keys(1), &identity("a"), &object).unwrap();
        let opener = unopened.open_index(&object, object.len() as u64).unwrap();
        let sealed_at = opener.sealed_at().unwrap();
        assert!(before <= sealed_at && sealed_at <= Utc::now(), "{sealed_at}");
    }

    #[test]
    fn the_same_content_never_gives_the_same_object() {
        let seal = || seal_whole(&keys(1), &identity("a"), 100, 3, b"content").unwrap().0;
        assert_ne!(seal(), seal());
    }

    #[test]
    fn each_reason_has_its_own_words() {
        let (_, good) = object();
        let open = |keys: &KeyRing, identity: &Identity, object: &[u8]| {
            open_whole(keys, identity, object).unwrap_err().to_string()
        };
        let other_key =
            KeyRing::new(vec![("k2".to_owned(), Zeroizing::new([1; 32]))], "k2").unwrap();
        let mut later = good.clone();
        later[8] = 3;
        let checksum = crc32c::crc32c(&later[..96]);
        later[96..100].copy_from_slice(&checksum.to_le_bytes());
        let mut damaged = good.clone();
        damaged[HEADER_BYTES + 5] ^= 1;
        let cases = [
            (
                "the wrong key",
                open(&keys(2), &identity("a"), &good),
                "a was not encrypted with the configured key k1: wrong key under this id",
            ),
            (
                "a missing key",
                open(&other_key, &identity("a"), &good),
                "a is encrypted with key k1, which is not configured (there are: k2)",
            ),
            (
                "another name",
                open(&keys(1), &identity("b"), &good),
                "b holds an object that was written under another name, kind or cluster",
            ),
            (
                "another cluster",
                open(&keys(1), &Identity { system_identifier: 8, ..identity("a") }, &good),
                "a holds an object that was written under another name, kind or cluster",
            ),
            (
                "another kind",
                open(&keys(1), &Identity { kind: Kind::Wal, ..identity("a") }, &good),
                "a holds an object that was written under another name, kind or cluster",
            ),
            (
                "a damaged chunk",
                open(&keys(1), &identity("a"), &damaged),
                "a is damaged in chunk 0 of 4",
            ),
            (
                "a later version",
                open(&keys(1), &identity("a"), &later),
                "a has format version 3, this release reads 1 to 2; use a newer backup-agent",
            ),
            (
                "cut off",
                open(&keys(1), &identity("a"), &good[..good.len() - 1]),
                "a is truncated or its end is damaged: it does not end with the magic bytes",
            ),
            (
                "empty",
                open(&keys(1), &identity("a"), b""),
                "a is not an object of this repository or its header is damaged: \
                 expected 100 bytes or more, found 0",
            ),
        ];
        for (case, found, expected) in cases {
            assert_eq!(found, expected, "{case}");
        }
    }

    /// What is claimed about sizes is never believed before it was authenticated.
    #[test]
    fn absurd_lengths_in_the_trailer_are_refused() {
        let (_, good) = object();
        let at = good.len() - TRAILER_BYTES;
        for (index_bytes, chunks) in [(u32::MAX, 4), (0, 4), (40, u32::MAX), (40, 0), (8, 0)] {
            let mut object = good.clone();
            object[at..at + 4].copy_from_slice(&index_bytes.to_le_bytes());
            object[at + 4..at + 8].copy_from_slice(&chunks.to_le_bytes());
            refused(&object);
        }
    }
}
