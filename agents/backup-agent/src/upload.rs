//! Writes one object while its content is still coming: chunks are sealed on all cores, kept in
//! order, and uploaded as parts, several in flight.
//!
//! Memory is bounded by [`UploadSettings::memory_bytes`]: whoever writes waits.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use shared::store::{StoreError, Upload, UploadedPart};
use tokio::task::{JoinHandle, JoinSet};

use crate::container::{ContainerError, Kind, Sealer};
use crate::repository::{Place, RepositoryError};

/// How objects are written.
#[derive(Clone, Copy, Debug)]
pub struct UploadSettings {
    /// zstd's level.
    pub level: i32,
    /// Plaintext bytes of a chunk.
    pub chunk_bytes: u32,
    /// Bytes of one multipart part.
    pub part_bytes: usize,
    /// Parts in flight.
    pub uploads: usize,
    /// Chunks being sealed at once.
    pub workers: usize,
}

impl UploadSettings {
    /// The most memory one writer takes: chunks and their sealed copies, parts in flight, and the
    /// part being filled.
    pub fn memory_bytes(&self) -> usize {
        let chunks = (self.workers + 2) * 2 * self.chunk_bytes as usize;
        chunks + (self.uploads + 1) * (self.part_bytes + self.chunk_bytes as usize)
    }
}

/// An object that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its salt, which names this very object.
    pub salt: [u8; 32],
    /// Bytes before compression.
    pub plain_bytes: u64,
    /// Bytes in the store.
    pub object_bytes: u64,
}

/// A chunk before and after it was sealed.
#[derive(Debug, Default)]
struct Buffers {
    plain: BytesMut,
    sealed: Vec<u8>,
}

/// An object being written. Dropping it leaves at most an unfinished upload, never an object.
#[derive(Debug)]
pub struct ObjectWriter {
    place: Place,
    kind: Kind,
    key: String,
    settings: UploadSettings,
    sealer: Arc<Sealer>,
    /// The chunk being filled.
    plain: BytesMut,
    plain_bytes: u64,
    sealing: VecDeque<JoinHandle<Result<Buffers, ContainerError>>>,
    /// Buffers that were used and can be used again: fresh ones cost a page fault every 4 KiB.
    spare: Vec<Buffers>,
    spare_parts: Vec<BytesMut>,
    chunks_begun: u32,
    sealed_lens: Vec<u32>,
    /// The part being filled.
    part: BytesMut,
    part_number: u32,
    object_bytes: u64,
    upload: Option<Upload>,
    uploading: JoinSet<Result<(UploadedPart, Bytes), StoreError>>,
    uploaded: Vec<UploadedPart>,
}

impl ObjectWriter {
    /// Begins an object. Nothing is sent before a part is full.
    ///
    /// # Errors
    ///
    /// The operating system gave no random bytes.
    pub fn new(
        place: &Place,
        kind: Kind,
        name: &str,
        settings: UploadSettings,
    ) -> Result<Self, RepositoryError> {
        let identity = place.identity(kind, name);
        let sealer = Sealer::new(place.keys(), &identity, settings.chunk_bytes, settings.level)?;
        let mut part = BytesMut::new();
        part.extend_from_slice(sealer.header());
        Ok(Self {
            place: place.clone(),
            kind,
            key: place.key(name),
            settings,
            sealer: Arc::new(sealer),
            plain: BytesMut::with_capacity(settings.chunk_bytes as usize),
            plain_bytes: 0,
            sealing: VecDeque::new(),
            spare: Vec::new(),
            spare_parts: Vec::new(),
            chunks_begun: 0,
            sealed_lens: Vec::new(),
            part,
            part_number: 1,
            object_bytes: 0,
            upload: None,
            uploading: JoinSet::new(),
            uploaded: Vec::new(),
        })
    }

    /// Plaintext bytes written so far.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Takes more content; waits while the bounds are reached.
    ///
    /// # Errors
    ///
    /// A chunk could not be sealed or a part not be uploaded.
    pub async fn write(&mut self, mut data: &[u8]) -> Result<(), RepositoryError> {
        self.plain_bytes += data.len() as u64;
        while !data.is_empty() {
            let room = self.sealer.chunk_bytes() - self.plain.len();
            let (now, later) = data.split_at(room.min(data.len()));
            self.plain.extend_from_slice(now);
            data = later;
            if self.plain.len() == self.sealer.chunk_bytes() {
                self.seal().await?;
            }
        }
        Ok(())
    }

    /// Seals what is left and makes the object appear.
    ///
    /// # Errors
    ///
    /// As [`ObjectWriter::write`]; or the name is taken.
    pub async fn finish(mut self) -> Result<Written, RepositoryError> {
        if !self.plain.is_empty() {
            self.seal().await?;
        }
        while let Some(sealing) = self.sealing.pop_front() {
            self.append(sealing).await?;
        }
        let end = self.sealer.finish(&self.sealed_lens, self.plain_bytes)?;
        self.part.extend_from_slice(&end);
        let last = self.part.split().freeze();
        self.object_bytes += last.len() as u64;
        let written = Written {
            salt: self.sealer.salt(),
            plain_bytes: self.plain_bytes,
            object_bytes: self.object_bytes,
        };
        match self.upload.take() {
            None => {
                let name = self.key.strip_prefix(&self.place.key("")).unwrap_or(&self.key);
                self.place.put_sealed(self.kind, name, last).await?;
            }
            Some(upload) => {
                self.send(&upload, last).await?;
                while !self.uploading.is_empty() {
                    self.sent().await?;
                }
                upload.complete(std::mem::take(&mut self.uploaded)).await?;
            }
        }
        Ok(written)
    }

    /// Starts sealing the full chunk on another thread.
    async fn seal(&mut self) -> Result<(), RepositoryError> {
        while self.sealing.len() > self.settings.workers {
            if let Some(sealing) = self.sealing.pop_front() {
                self.append(sealing).await?;
            }
        }
        let mut next = self.spare.pop().unwrap_or_default();
        next.plain.reserve(self.sealer.chunk_bytes());
        let mut buffers =
            Buffers { plain: std::mem::replace(&mut self.plain, next.plain), sealed: next.sealed };
        let (sealer, number) = (self.sealer.clone(), self.chunks_begun);
        self.chunks_begun += 1;
        self.sealing.push_back(tokio::task::spawn_blocking(move || {
            sealer.seal(number, &buffers.plain, &mut buffers.sealed)?;
            buffers.plain.clear();
            Ok(buffers)
        }));
        Ok(())
    }

    /// Adds the next sealed chunk to the part, and sends the part when it is full.
    async fn append(
        &mut self,
        sealing: JoinHandle<Result<Buffers, ContainerError>>,
    ) -> Result<(), RepositoryError> {
        let buffers = joined(sealing.await)?;
        self.sealed_lens.push(u32::try_from(buffers.sealed.len()).unwrap_or(u32::MAX));
        self.part.extend_from_slice(&buffers.sealed);
        self.spare.push(buffers);
        if self.part.len() < self.settings.part_bytes {
            return Ok(());
        }
        // Every part but the last is equally large, as some stores insist.
        let mut next = self.spare_parts.pop().unwrap_or_default();
        next.reserve(self.part_capacity());
        next.extend_from_slice(&self.part[self.settings.part_bytes..]);
        let mut full = std::mem::replace(&mut self.part, next);
        full.truncate(self.settings.part_bytes);
        let full = full.freeze();
        self.object_bytes += full.len() as u64;
        let upload = if let Some(upload) = self.upload.take() {
            upload
        } else {
            let class = self.place.class(self.kind);
            let part_bytes = self.settings.part_bytes as u64;
            self.place.store().upload(&self.key, part_bytes, class).await?
        };
        self.send(&upload, full).await?;
        self.upload = Some(upload);
        Ok(())
    }

    /// A part is filled a chunk at a time, so it grows past its size by at most one.
    fn part_capacity(&self) -> usize {
        self.settings.part_bytes + 2 * self.settings.chunk_bytes as usize
    }

    async fn send(&mut self, upload: &Upload, body: Bytes) -> Result<(), RepositoryError> {
        while self.uploading.len() >= self.settings.uploads {
            self.sent().await?;
        }
        let (upload, number) = (upload.clone(), self.part_number);
        self.part_number += 1;
        self.uploading.spawn(async move {
            let part = upload.part(number, body.clone()).await?;
            Ok((part, body))
        });
        Ok(())
    }

    /// Waits for an upload and takes its buffer back.
    async fn sent(&mut self) -> Result<(), RepositoryError> {
        if let Some(sent) = self.uploading.join_next().await {
            let (part, body) = joined(sent)?;
            self.uploaded.push(part);
            // The store may still hold the body; then it is freed when the store lets go of it.
            if let Ok(mut buffer) = body.try_into_mut() {
                buffer.clear();
                self.spare_parts.push(buffer);
            }
        }
        Ok(())
    }
}

/// The result of a task of ours; a task that panicked panics here too.
fn joined<T, E: Into<RepositoryError>>(
    result: Result<Result<T, E>, tokio::task::JoinError>,
) -> Result<T, RepositoryError> {
    match result {
        Ok(result) => result.map_err(Into::into),
        Err(error) => std::panic::resume_unwind(match error.try_into_panic() {
            Ok(panic) => panic,
            Err(cancelled) => Box::new(cancelled.to_string()),
        }),
    }
}
