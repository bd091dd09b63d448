//! Checksums of uploaded parts, which `s3s-fs` takes and does not look at.

use std::sync::{Arc, Mutex};

use reqwest::header::HeaderMap;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Crc32, Crc32c, Crc64Nvme, Sha1, Sha256};
use s3s::dto::{Checksum, UploadPartInput, UploadPartOutput};
use s3s::{S3Result, TrailingHeaders, s3_error};

/// The checksum of one part: computed while it passes, compared when it is there. Clones are the
/// same checksum.
#[derive(Clone)]
pub(super) struct PartChecksum {
    hasher: Arc<Mutex<ChecksumHasher>>,
    /// What the request's headers say; the trailers may say it later.
    expected: Checksum,
}

impl PartChecksum {
    /// Prepares to compute what the request says it will send, in a header or a trailer.
    pub(super) fn expected(input: &UploadPartInput, headers: &HeaderMap) -> Self {
        let trailer = headers.get("x-amz-trailer").and_then(|value| value.to_str().ok());
        let named = |header: &str| trailer.is_some_and(|trailer| trailer.contains(header));
        let mut hasher = ChecksumHasher::default();
        if input.checksum_crc32.is_some() || named("x-amz-checksum-crc32") {
            hasher.crc32 = Some(Crc32::default());
        }
        if input.checksum_crc32c.is_some() || named("x-amz-checksum-crc32c") {
            hasher.crc32c = Some(Crc32c::default());
        }
        if input.checksum_crc64nvme.is_some() || named("x-amz-checksum-crc64nvme") {
            hasher.crc64nvme = Some(Crc64Nvme::default());
        }
        if input.checksum_sha1.is_some() || named("x-amz-checksum-sha1") {
            hasher.sha1 = Some(Sha1::default());
        }
        if input.checksum_sha256.is_some() || named("x-amz-checksum-sha256") {
            hasher.sha256 = Some(Sha256::default());
        }
        let expected = Checksum {
            checksum_crc32: input.checksum_crc32.clone(),
            checksum_crc32c: input.checksum_crc32c.clone(),
            checksum_crc64nvme: input.checksum_crc64nvme.clone(),
            checksum_sha1: input.checksum_sha1.clone(),
            checksum_sha256: input.checksum_sha256.clone(),
            ..Default::default()
        };
        Self { hasher: Arc::new(Mutex::new(hasher)), expected }
    }

    /// Takes in a piece of the part.
    pub(super) fn update(&self, piece: &[u8]) {
        self.hasher.lock().unwrap().update(piece);
    }

    /// Compares what arrived with what was announced, and puts it into the answer.
    pub(super) fn check(
        self,
        trailers: Option<&TrailingHeaders>,
        output: &mut UploadPartOutput,
    ) -> S3Result<()> {
        let found = std::mem::take(&mut *self.hasher.lock().unwrap()).finalize();
        let trailer = |name: &str| {
            let text = |headers: &HeaderMap| Some(headers.get(name)?.to_str().ok()?.to_owned());
            trailers.and_then(|trailers| trailers.read(text)).flatten()
        };
        let Checksum {
            checksum_crc32,
            checksum_crc32c,
            checksum_crc64nvme,
            checksum_sha1,
            checksum_sha256,
            ..
        } = self.expected;
        for (name, expected, found) in [
            ("x-amz-checksum-crc32", checksum_crc32, &found.checksum_crc32),
            ("x-amz-checksum-crc32c", checksum_crc32c, &found.checksum_crc32c),
            ("x-amz-checksum-crc64nvme", checksum_crc64nvme, &found.checksum_crc64nvme),
            ("x-amz-checksum-sha1", checksum_sha1, &found.checksum_sha1),
            ("x-amz-checksum-sha256", checksum_sha256, &found.checksum_sha256),
        ] {
            let expected = expected.or_else(|| trailer(name));
            if expected.is_some() && expected != *found {
                return Err(s3_error!(BadDigest, "{name} is {expected:?}, found {found:?}"));
            }
        }
        output.checksum_crc32 = found.checksum_crc32;
        output.checksum_crc32c = found.checksum_crc32c;
        output.checksum_crc64nvme = found.checksum_crc64nvme;
        output.checksum_sha1 = found.checksum_sha1;
        output.checksum_sha256 = found.checksum_sha256;
        Ok(())
    }
}
