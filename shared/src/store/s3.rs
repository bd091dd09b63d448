//! An S3 bucket as a store: the only module that knows the AWS SDK.

mod config;
mod failure;
mod whole;

use std::error::Error;
use std::fs;
use std::time::Duration;

use anyhow::Context;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::{RetryConfig, RetryPartition, TokenBucket};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Region, StalledStreamProtectionConfig};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::primitives::{ByteStream, DateTime as S3DateTime};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier,
    ServerSideEncryption, StorageClass,
};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime::client::retries::classifiers::HttpStatusCodeClassifier;
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};

use super::{ObjectInfo, Put, StoreError, StoreErrorKind, Unfinished, UploadedPart, Wanted};
use crate::secret::Secret;
use crate::tls;

pub use config::S3Config;
use failure::{HopelessHandshake, InPlace, failure, status};
use whole::Whole;

/// Time for the TCP and TLS handshakes of one connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without any progress after which a body counts as stalled.
const STALL_GRACE: Duration = Duration::from_secs(20);
/// Longest pause between two attempts of one request.
const BACKOFF_MAX: Duration = Duration::from_secs(20);
/// Answers after which the same request may succeed; the SDK leaves 408 and 429 out.
const PASSING_STATUS: &[u16] = &[408, 429, 500, 502, 503, 504];
/// Where credentials come from that are configured.
const FROM_FILES: &str = "repository.s3.access_key_id_file and secret_access_key_file";
/// Where credentials come from otherwise.
const FROM_SURROUNDINGS: &str =
    "the AWS_… environment variables, the profile, or the role of this container or instance";
/// The most keys one `ListObjectsV2` answer holds (S3 limit).
const LIST_PAGE: i32 = 1000;
/// The most keys one `DeleteObjects` request names (S3 limit).
const DELETE_PAGE: usize = 1000;

#[derive(Clone, Debug)]
pub(super) struct S3 {
    client: Client,
    bucket: String,
    /// The endpoint, or the region where it is AWS's, for people.
    server: String,
    /// Empty, or ends with a slash.
    prefix: String,
    encryption: Option<ServerSideEncryption>,
    kms_key_id: Option<String>,
    has_tls: bool,
    /// Where the credentials come from, for people.
    credentials: &'static str,
}

impl S3 {
    pub(super) async fn open(config: &S3Config, prefix: &str) -> anyhow::Result<Self> {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(config.attempt_timeout)
            .build();
        // The SDK's own budget of retries is for clients that can shed load. A backup under a long
        // throttling has nothing else to do than to wait; `attempts` bounds each request.
        let retries =
            RetryPartition::custom("pgmesh").token_bucket(TokenBucket::unlimited()).build();
        let mut builder = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(config.region.clone()))
            .force_path_style(config.path_style)
            .timeout_config(timeouts)
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(config.attempts)
                    .with_max_backoff(BACKOFF_MAX),
            )
            .retry_classifier(HttpStatusCodeClassifier::new_from_codes(PASSING_STATUS))
            .retry_classifier(HopelessHandshake)
            .interceptor(Whole)
            .retry_classifier(Whole)
            .retry_partition(retries)
            .stalled_stream_protection(
                StalledStreamProtectionConfig::enabled().grace_period(STALL_GRACE).build(),
            );
        if let Some(endpoint) = &config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        if config.has_tls() {
            // The SDK panics at certificates that it cannot use.
            tls::client_config(config.ca_file.as_deref()).context("repository.s3.ca_file")?;
        }
        if let Some(path) = &config.ca_file {
            let pem = fs::read(path).context("repository.s3.ca_file")?;
            let trust = TrustStore::empty().with_pem_certificate(pem);
            let context = TlsContext::builder().with_trust_store(trust).build()?;
            let client = Builder::new()
                .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
                .tls_context(context)
                .build_https();
            builder = builder.http_client(client);
        }
        let (builder, credentials) = if let (Some(id), Some(secret)) =
            (&config.access_key_id_file, &config.secret_access_key_file)
        {
            let id = Secret::read(id).context("repository.s3.access_key_id_file")?;
            let secret = Secret::read(secret).context("repository.s3.secret_access_key_file")?;
            let (id, secret) = (id.expose(), secret.expose());
            let credentials = Credentials::new(id, secret, None, None, "secret files");
            (builder.credentials_provider(credentials), FROM_FILES)
        } else {
            let region = Region::new(config.region.clone());
            let chain = DefaultCredentialsChain::builder().region(region).build().await;
            (builder.credentials_provider(chain), FROM_SURROUNDINGS)
        };
        Ok(Self {
            client: Client::from_conf(builder.build()),
            bucket: config.bucket.clone(),
            server: config.endpoint.clone().unwrap_or_else(|| format!("AWS {}", config.region)),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            encryption: config.server_side_encryption.as_deref().map(ServerSideEncryption::from),
            kms_key_id: config.kms_key_id.clone(),
            has_tls: config.has_tls(),
            credentials,
        })
    }

    pub(super) fn location(&self) -> String {
        let prefix = self.prefix.trim_end_matches('/');
        format!("s3://{}/{prefix} at {}", self.bucket, self.server)
    }

    /// What went wrong with an object, and in which bucket of which server.
    fn error(
        &self,
        operation: &'static str,
        key: &str,
        kind: StoreErrorKind,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> StoreError {
        let (bucket, server) = (&self.bucket, &self.server);
        let place = format!("bucket {bucket} at {server}");
        let source = Box::new(InPlace { place, source: source.into() });
        StoreError { operation, key: key.to_owned(), kind, source }
    }

    fn failed<E>(&self, operation: &'static str, key: &str, error: SdkError<E>) -> StoreError
    where
        E: Error + ProvideErrorMetadata + Send + Sync + 'static,
    {
        let (kind, source) = failure(error, self.credentials);
        self.error(operation, key, kind, source)
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn own(&self, full: &str) -> String {
        full.strip_prefix(&self.prefix).unwrap_or(full).to_owned()
    }

    pub(super) async fn put(
        &self,
        key: &str,
        body: Bytes,
        class: Option<&str>,
    ) -> Result<Put, StoreError> {
        let expected = body.len() as u64;
        let request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .if_none_match("*")
            .checksum_algorithm(ChecksumAlgorithm::Crc32)
            .set_storage_class(class.map(StorageClass::from))
            .set_server_side_encryption(self.encryption.clone())
            .set_ssekms_key_id(self.kms_key_id.clone())
            .body(ByteStream::from(body))
            .customize();
        // TLS guards the body on its way, so its SHA-256 need not be in the signature.
        let request = if self.has_tls { request.disable_payload_signing() } else { request };
        match request.send().await {
            Ok(_) => {}
            Err(error) if status(&error) == Some(412) => return Ok(Put::Exists),
            Err(error) => return Err(self.failed("put", key, error)),
        }
        // A server that answers 200 and keeps something else is found out now and not at restore.
        match self.head(key).await?.map(|info| info.bytes) {
            Some(bytes) if bytes == expected => Ok(Put::Created),
            found => {
                let found = found.map_or("no object".to_owned(), |bytes| format!("{bytes} bytes"));
                let source = format!("sent {expected} bytes, the store has {found}");
                Err(self.error("put", key, StoreErrorKind::Corrupt, source))
            }
        }
    }

    pub(super) async fn get(&self, key: &str, wanted: Wanted) -> Result<Bytes, StoreError> {
        let mut body = BytesMut::new();
        let take = |arrived: Arrived<'_>| match arrived {
            Arrived::Length(bytes) => {
                body = BytesMut::with_capacity(usize::try_from(bytes).unwrap_or(0));
            }
            Arrived::Piece(piece) => body.extend_from_slice(piece),
        };
        self.read(key, &wanted, take).await?;
        Ok(body.freeze())
    }

    pub(super) async fn holds(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        let (mut rest, mut is_same) = (expected, true);
        let take = |arrived: Arrived<'_>| match arrived {
            Arrived::Length(bytes) => {
                (rest, is_same) = (expected, bytes == expected.len() as u64);
            }
            Arrived::Piece(piece) => match rest.strip_prefix(piece) {
                Some(after) => rest = after,
                None => is_same = false,
            },
        };
        self.read(key, &Wanted::Whole { bytes_max: u64::MAX }, take).await?;
        Ok(is_same && rest.is_empty())
    }

    /// Reads an object and hands it to `take` as it arrives; from the start again, its length
    /// included, if it broke off.
    async fn read(
        &self,
        key: &str,
        wanted: &Wanted,
        mut take: impl FnMut(Arrived<'_>) + Send,
    ) -> Result<(), StoreError> {
        let range = match wanted {
            Wanted::Whole { .. } => None,
            Wanted::Range(range) => Some(format!("bytes={}-{}", range.start, range.end - 1)),
        };
        let mut attempt = 0;
        loop {
            attempt += 1;
            let got = self
                .client
                .get_object()
                .bucket(&self.bucket)
                .key(self.full(key))
                .set_range(range.clone())
                .send()
                .await;
            let output = match got {
                Ok(output) => output,
                Err(error) if status(&error) == Some(416) => {
                    let reason = "the object ends before the range asked for";
                    return Err(self.error("get", key, StoreErrorKind::Corrupt, reason));
                }
                Err(error) => return Err(self.failed("get", key, error)),
            };
            if let Some(reason) = wanted.refuse(bytes_of(output.content_length())) {
                return Err(self.error("get", key, StoreErrorKind::Refused, reason));
            }
            let Err(source) = read_body(output, &mut take).await else { return Ok(()) };
            let error = self.error("get", key, StoreErrorKind::Unavailable, source);
            // The SDK retries a request, but not a body that broke off on its way.
            if attempt == GET_BODY_ATTEMPTS {
                return Err(error);
            }
            tracing::debug!(key, attempt, error = %crate::telemetry::chain(&error), "get retried");
            tokio::time::sleep(Duration::from_millis(200) * 2u32.pow(attempt)).await;
        }
    }

    pub(super) async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StoreError> {
        let head = self.client.head_object().bucket(&self.bucket).key(self.full(key)).send().await;
        match head {
            Ok(output) => {
                let told = (Some(key), output.content_length(), output.last_modified());
                self.info("head", told).map(Some)
            }
            Err(error) if status(&error) == Some(404) => Ok(None),
            Err(error) => Err(self.failed("head", key, error)),
        }
    }

    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
    ) -> Result<Vec<ObjectInfo>, StoreError> {
        let limit = limit.unwrap_or(usize::MAX);
        let page = limit.min(LIST_PAGE as usize);
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(self.full(prefix))
            .set_start_after(after.map(|after| self.full(after)))
            .max_keys(i32::try_from(page).unwrap_or(LIST_PAGE))
            .into_paginator()
            .send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.failed("list", prefix, error))?;
            self.check_list(prefix, &page)?;
            for object in page.contents() {
                let key = object.key().map(|key| self.own(key));
                let told = (key.as_deref(), object.size(), object.last_modified());
                found.push(self.info("list", told)?);
            }
            if found.len() >= limit {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    pub(super) async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let full = self.full(prefix);
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(&full)
            .delimiter("/")
            .into_paginator()
            .send();
        let mut names = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.failed("list", prefix, error))?;
            self.check_list(prefix, &page)?;
            for folder in page.common_prefixes() {
                let name = folder.prefix().unwrap_or_default();
                let name = name.strip_prefix(&full).unwrap_or(name);
                names.push(name.trim_end_matches('/').to_owned());
            }
        }
        Ok(names)
    }

    /// What is told of an object. Its length and time decide what is deleted: without them it is unknown.
    fn info(
        &self,
        operation: &'static str,
        (key, bytes, at): (Option<&str>, Option<i64>, Option<&S3DateTime>),
    ) -> Result<ObjectInfo, StoreError> {
        let bytes = bytes.and_then(|it| u64::try_from(it).ok());
        if let (Some(key), Some(bytes), Some(modified_at)) = (key, bytes, moment(at)) {
            return Ok(ObjectInfo { key: key.to_owned(), bytes, modified_at });
        }
        let reason = "the store does not tell the object's name, length and time";
        Err(self.error(operation, key.unwrap_or_default(), StoreErrorKind::Unavailable, reason))
    }

    /// Whether a page of a list holds what it says, and says where the next one begins.
    fn check_list(&self, prefix: &str, page: &ListObjectsV2Output) -> Result<(), StoreError> {
        let held = page.contents().len() + page.common_prefixes().len();
        let announced = page.key_count().and_then(|it| usize::try_from(it).ok());
        // Some servers do not count the folders.
        let reason = match announced {
            Some(announced) if held < announced => {
                format!("the list holds {held} of the {announced} keys that it announces")
            }
            _ if page.is_truncated() == Some(true) && page.next_continuation_token().is_none() => {
                "the list goes on, and does not say where".to_owned()
            }
            _ => return Ok(()),
        };
        Err(self.error("list", prefix, StoreErrorKind::Unavailable, reason))
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let done =
            self.client.delete_object().bucket(&self.bucket).key(self.full(key)).send().await;
        match done {
            Err(error) if status(&error) != Some(404) => Err(self.failed("delete", key, error)),
            _ => Ok(()),
        }
    }

    /// Deletes objects, many with one request; returns those that it did not delete. Some servers do
    /// not know this request, or want a checksum with it that is not sent.
    pub(super) async fn delete_all(&self, keys: Vec<String>) -> Result<Vec<String>, StoreError> {
        if keys.len() < 2 {
            return Ok(keys);
        }
        let mut left = Vec::new();
        for page in keys.chunks(DELETE_PAGE) {
            let named = |key| ObjectIdentifier::builder().key(self.full(key)).build();
            let named = page.iter().map(|key| named(key)).collect::<Result<Vec<_>, _>>();
            let delete = named
                .and_then(|keys| Delete::builder().set_objects(Some(keys)).quiet(true).build());
            let request = self.client.delete_objects().bucket(&self.bucket).set_delete(delete.ok());
            match request.send().await {
                Ok(output) => {
                    left.extend(output.errors().iter().filter_map(|it| Some(self.own(it.key()?))));
                }
                Err(error) => {
                    let first = page.first().map_or("", String::as_str);
                    let error = self.failed("delete", first, error);
                    if error.is_transient() {
                        return Err(error);
                    }
                    left.extend_from_slice(page);
                }
            }
        }
        Ok(left)
    }

    pub(super) async fn begin(&self, key: &str, class: Option<&str>) -> Result<String, StoreError> {
        let output = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(self.full(key))
            .checksum_algorithm(ChecksumAlgorithm::Crc32)
            .set_storage_class(class.map(StorageClass::from))
            .set_server_side_encryption(self.encryption.clone())
            .set_ssekms_key_id(self.kms_key_id.clone())
            .send()
            .await
            .map_err(|error| self.failed("begin upload of", key, error))?;
        output.upload_id().map(str::to_owned).ok_or_else(|| {
            let source = "the store named no upload id";
            self.error("begin upload of", key, StoreErrorKind::Refused, source)
        })
    }

    pub(super) async fn part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<UploadedPart, StoreError> {
        let bytes = body.len() as u64;
        let request = self
            .client
            .upload_part()
            .bucket(&self.bucket)
            .key(self.full(key))
            .upload_id(upload_id)
            .part_number(i32::try_from(number).unwrap_or(i32::MAX))
            .checksum_algorithm(ChecksumAlgorithm::Crc32)
            .body(ByteStream::from(body))
            .customize();
        let request = if self.has_tls { request.disable_payload_signing() } else { request };
        let sent = request.send().await;
        let output = sent.map_err(|error| self.failed("upload part of", key, error))?;
        Ok(UploadedPart {
            number,
            bytes,
            etag: output.e_tag().map(str::to_owned),
            checksum: output.checksum_crc32().map(str::to_owned),
        })
    }

    pub(super) async fn complete(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[UploadedPart],
    ) -> Result<(), StoreError> {
        let parts = parts
            .iter()
            .map(|part| {
                CompletedPart::builder()
                    .part_number(i32::try_from(part.number).unwrap_or(i32::MAX))
                    .set_e_tag(part.etag.clone())
                    .set_checksum_crc32(part.checksum.clone())
                    .build()
            })
            .collect();
        let completed = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        self.client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(self.full(key))
            .upload_id(upload_id)
            .if_none_match("*")
            .multipart_upload(completed)
            .send()
            .await
            .map_err(|error| self.failed("complete", key, error))?;
        Ok(())
    }

    pub(super) async fn unfinished(&self, prefix: &str) -> Result<Vec<Unfinished>, StoreError> {
        let mut found = Vec::new();
        let (mut key_marker, mut upload_marker) = (None, None);
        loop {
            let output = self
                .client
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .prefix(self.full(prefix))
                .set_key_marker(key_marker)
                .set_upload_id_marker(upload_marker)
                .send()
                .await
                .map_err(|error| self.failed("list uploads below", prefix, error))?;
            for upload in output.uploads() {
                found.push(Unfinished {
                    key: self.own(upload.key().unwrap_or_default()),
                    upload_id: upload.upload_id().unwrap_or_default().to_owned(),
                    started_at: moment(upload.initiated()),
                });
            }
            if output.is_truncated() != Some(true) {
                return Ok(found);
            }
            key_marker = output.next_key_marker().map(str::to_owned);
            upload_marker = output.next_upload_id_marker().map(str::to_owned);
            if key_marker.is_none() {
                let reason = "the list goes on, and does not say where";
                let (what, kind) = ("list uploads below", StoreErrorKind::Unavailable);
                return Err(self.error(what, prefix, kind, reason));
            }
        }
    }

    pub(super) async fn abort(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        let done = self
            .client
            .abort_multipart_upload()
            .bucket(&self.bucket)
            .key(self.full(key))
            .upload_id(upload_id)
            .send()
            .await;
        match done {
            Err(error) if status(&error) != Some(404) => Err(self.failed("abort", key, error)),
            _ => Ok(()),
        }
    }
}

/// How often a body that breaks off is asked for again.
const GET_BODY_ATTEMPTS: u32 = 5;

/// What has arrived of an object.
enum Arrived<'a> {
    /// How long it is, in bytes: it begins, or begins again.
    Length(u64),
    /// What comes next of it.
    Piece(&'a [u8]),
}

/// Reads a body to its announced end, and no further.
async fn read_body(
    output: GetObjectOutput,
    take: &mut impl FnMut(Arrived<'_>),
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let expected = bytes_of(output.content_length());
    let mut body = output.body;
    let mut found = 0;
    take(Arrived::Length(expected));
    loop {
        // The SDK's own protection counts throughput; this one bounds a body that goes silent.
        match tokio::time::timeout(STALL_GRACE * 2, body.next()).await {
            Ok(Some(Ok(piece))) => {
                found += piece.len() as u64;
                if found > expected {
                    break;
                }
                take(Arrived::Piece(&piece));
            }
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(None) => break,
            Err(_) => return Err("the body stalled".into()),
        }
    }
    if found == expected {
        return Ok(());
    }
    Err(format!("expected {expected} bytes, {found} arrived").into())
}

fn bytes_of(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or(0)
}

fn moment(at: Option<&S3DateTime>) -> Option<DateTime<Utc>> {
    at.and_then(|at| DateTime::from_timestamp(at.secs(), at.subsec_nanos()))
}
