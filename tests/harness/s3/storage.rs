//! The operations: `s3s-fs` does the work, and this adds what it lacks and what is to go wrong.
//!
//! Beyond `s3s-fs`: storage classes and the encryption asked for, `ListMultipartUploads`, checksums of parts, conditions that
//! hold against two writers at once, an object that appears only when its checksum was right, and
//! the answers S3 gives for buckets, keys and uploads that are not there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use reqwest::StatusCode;
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
    CompleteMultipartUploadOutput, CreateBucketInput, CreateBucketOutput,
    CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput,
    DeleteObjectsInput, DeleteObjectsOutput, DeletedObject, ETag, ETagCondition, Error,
    GetObjectInput, GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput,
    HeadObjectOutput, ListMultipartUploadsInput, ListMultipartUploadsOutput, ListObjectsV2Input,
    ListObjectsV2Output, ListPartsInput, ListPartsOutput, Metadata, MultipartUpload,
    ObjectStorageClass, PutObjectInput, PutObjectOutput, Range, ServerSideEncryption, StorageClass,
    StreamingBlob, Timestamp, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::io::AsyncSeekExt;
use tokio::time::sleep;

use super::body;
use super::checksum::PartChecksum;
use super::disk::{Bucket, ENCRYPTION, STAGING, STORAGE_CLASS, remove_if_there};
use super::faults::{Faults, Operation, Plan, Refusal, Store};

/// How often a listing is repeated when a file vanished while `s3s-fs` looked at it, which it
/// answers with an internal error.
const LIST_ATTEMPTS: u32 = 5;
/// The most uploads one answer lists (S3 limit).
const UPLOADS_MAX: i32 = 1000;

/// What the server answers with.
#[derive(Debug)]
pub(super) struct Storage {
    files: FileSystem,
    root: std::path::PathBuf,
    faults: Faults,
    staged: AtomicU64,
    /// Held while an object takes its name: of two writers with a condition, one is refused.
    commit: Mutex<()>,
    /// What each part of an unfinished upload was answered with.
    etags: Mutex<HashMap<(String, i32), ETag>>,
}

/// When a write may replace what is there.
#[derive(Clone, Debug)]
struct Conditions {
    if_none_match: Option<ETagCondition>,
    if_match: Option<ETagCondition>,
}

impl Storage {
    /// Serves the files below `root`, which must exist.
    pub(super) fn new(root: &std::path::Path, faults: Faults) -> std::io::Result<Self> {
        let staging = root.join(STAGING);
        // What was under way when the server before this one ended.
        if staging.is_dir() {
            fs::remove_dir_all(&staging)?;
        }
        fs::create_dir_all(&staging)?;
        let files = FileSystem::new(root)
            .map_err(|error| std::io::Error::other(format!("use {}: {error:?}", root.display())))?;
        Ok(Self {
            files,
            root: root.to_owned(),
            faults,
            staged: AtomicU64::new(0),
            commit: Mutex::new(()),
            etags: Mutex::new(HashMap::new()),
        })
    }

    fn bucket(&self, name: &str) -> Bucket {
        Bucket::new(&self.root, name)
    }

    /// The bucket `name`, if there is one.
    fn existing(&self, name: &str) -> S3Result<Bucket> {
        let bucket = self.bucket(name);
        if bucket.exists() { Ok(bucket) } else { Err(s3_error!(NoSuchBucket)) }
    }

    /// The bucket, if it has the object.
    fn holding(&self, name: &str, key: &str) -> S3Result<Bucket> {
        let bucket = self.existing(name)?;
        if bucket.contains(key) { Ok(bucket) } else { Err(s3_error!(NoSuchKey)) }
    }

    /// When an object was written, as far as the server tells.
    fn written_at(&self, bucket: &Bucket, key: &str) -> Option<Timestamp> {
        let written_at = fs::metadata(bucket.path(key)).and_then(|about| about.modified());
        written_at.ok().map(|at| Timestamp::from(self.faults.told(at)))
    }

    fn staging(&self) -> (Bucket, String) {
        let number = self.staged.fetch_add(1, Ordering::SeqCst);
        (self.bucket(STAGING), number.to_string())
    }

    /// Counts the request, and lets befall it what comes before any work.
    async fn admit(&self, operation: Operation, key: &str) -> S3Result<Plan> {
        let plan = self.faults.befall(operation, key);
        sleep(plan.delay).await;
        if plan.stall {
            std::future::pending::<()>().await;
        }
        plan.refusal.map_or(Ok(plan), |refusal| Err(refused(refusal)))
    }

    /// Like [`admit`](Self::admit), for a request with a body.
    async fn admit_body(
        &self,
        operation: Operation,
        key: &str,
        body: &mut Option<StreamingBlob>,
    ) -> S3Result<Plan> {
        let admitted = self.admit(operation, key).await;
        if admitted.is_err() {
            body::discard(body.take()).await;
        }
        admitted
    }

    /// Refuses a write that would replace what must stay.
    fn may_write(&self, bucket: &Bucket, key: &str, conditions: &Conditions) -> S3Result<()> {
        let there = bucket.contains(key);
        if self.faults.conditions_count() {
            let Conditions { if_none_match, if_match } = conditions;
            if there && if_none_match.as_ref().is_some_and(ETagCondition::is_any) {
                return Err(s3_error!(PreconditionFailed, "the object exists"));
            }
            if let Some(condition) = if_match {
                let etag = bucket.etag(key).map(ETag::Strong);
                let same =
                    condition.as_etag().is_none_or(|it| etag.is_some_and(|e| e.strong_cmp(it)));
                if !there || !same {
                    return Err(s3_error!(PreconditionFailed, "the object is another"));
                }
            }
        }
        if there && self.faults.is_object_locked() {
            return Err(s3_error!(AccessDenied, "the object is locked"));
        }
        Ok(())
    }

    /// Gives a staged object its name, as one step, if it may have it.
    fn commit(
        &self,
        staged: (&Bucket, &str),
        target: (&Bucket, &str),
        conditions: &Conditions,
        store: Store,
    ) -> S3Result<()> {
        let (staging, staged) = staged;
        let (bucket, key) = target;
        let _one_at_a_time = self.commit.lock().unwrap();
        let allowed = self.may_write(bucket, key, conditions);
        if allowed.is_err() || store == Store::Nothing {
            fs::remove_file(staging.path(staged)).map_err(S3Error::internal_error)?;
            staging.remove_details(staged).map_err(S3Error::internal_error)?;
            return allowed;
        }
        let moved = || {
            if let Store::Truncated(bytes) = store {
                let file = File::options().write(true).open(staging.path(staged))?;
                file.set_len(bytes.min(file.metadata()?.len()))?;
                remove_if_there(&staging.internal(staged))?;
            }
            let path = bucket.path(key);
            fs::create_dir_all(path.parent().unwrap_or(bucket.directory()))?;
            // Nothing of an object that had the name before may stay.
            bucket.remove_details(key)?;
            for (from, to) in [
                (staging.internal(staged), bucket.internal(key)),
                (staging.metadata(staged), bucket.metadata(key)),
            ] {
                if from.exists() {
                    fs::rename(from, to)?;
                }
            }
            fs::rename(staging.path(staged), path)
        };
        moved().map_err(S3Error::internal_error)
    }

    /// The upload's bucket, if the upload is there.
    fn uploading(&self, bucket: &str, upload_id: &str) -> S3Result<Bucket> {
        let bucket = self.existing(bucket)?;
        if bucket.has_upload(upload_id) { Ok(bucket) } else { Err(s3_error!(NoSuchUpload)) }
    }

    /// Refuses to complete an upload from parts that are not there, or are others.
    fn check_parts(&self, bucket: &Bucket, input: &CompleteMultipartUploadInput) -> S3Result<()> {
        let parts = input.multipart_upload.as_ref().and_then(|upload| upload.parts.as_ref());
        let etags = self.etags.lock().unwrap();
        for part in parts.into_iter().flatten() {
            let number = part.part_number.unwrap_or_default();
            let known = etags.get(&(input.upload_id.clone(), number));
            let differs = known.zip(part.e_tag.as_ref()).is_some_and(|(one, other)| one != other);
            if differs || !bucket.part(&input.upload_id, number).is_file() {
                return Err(s3_error!(InvalidPart, "part {number} is not there or differs"));
            }
        }
        Ok(())
    }

    fn forget_parts(&self, upload_id: &str) {
        self.etags.lock().unwrap().retain(|(upload, _), _| upload != upload_id);
    }

    fn delete(&self, bucket: &Bucket, key: &str) -> S3Result<()> {
        let _one_at_a_time = self.commit.lock().unwrap();
        if !bucket.contains(key) {
            return Ok(());
        }
        if self.faults.is_object_locked() {
            return Err(s3_error!(AccessDenied, "the object is locked"));
        }
        fs::remove_file(bucket.path(key))
            .and_then(|()| bucket.remove_details(key))
            .map_err(S3Error::internal_error)
    }
}

#[async_trait]
impl S3 for Storage {
    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        self.admit(Operation::CreateBucket, "").await?;
        self.files.create_bucket(request).await
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.admit(Operation::HeadBucket, "").await?;
        self.files.head_bucket(request).await
    }

    async fn put_object(
        &self,
        mut request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = &mut request.input;
        let key = input.key.clone();
        let plan = self.admit_body(Operation::PutObject, &key, &mut input.body).await?;
        let bucket = self.existing(&input.bucket)?;
        let conditions = Conditions {
            if_none_match: input.if_none_match.take(),
            if_match: input.if_match.take(),
        };
        if let Err(error) = self.may_write(&bucket, &key, &conditions) {
            body::discard(input.body.take()).await;
            return Err(error);
        }
        keep_class(&mut input.metadata, input.storage_class.take());
        let encryption = (input.server_side_encryption.take(), input.ssekms_key_id.take());
        keep_encryption(&mut input.metadata, encryption);
        input.body = input.body.take().map(|body| body::of_request(body, plan.body, |_| {}));
        let (staging, staged) = self.staging();
        STAGING.clone_into(&mut input.bucket);
        input.key.clone_from(&staged);
        let stored = self.files.put_object(request).await;
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => {
                // s3s-fs compares checksums only when the file has its name.
                remove_if_there(&staging.path(&staged)).map_err(S3Error::internal_error)?;
                return Err(error);
            }
        };
        self.commit((&staging, &staged), (&bucket, &key), &conditions, plan.store)?;
        answer(plan, stored)
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let GetObjectInput { bucket, key, range, .. } = &request.input;
        let plan = self.admit(Operation::GetObject, key).await?;
        let bucket = self.holding(bucket, key)?;
        let (path, range) = (bucket.path(key), *range);
        let mut response = self.files.get_object(request).await?;
        let output = &mut response.output;
        output.storage_class = take_class(&mut output.metadata).map(StorageClass::from);
        // s3s-fs reads 4 KiB at a time; and what goes wrong on the way goes wrong here.
        let mut file = tokio::fs::File::open(path).await.map_err(S3Error::internal_error)?;
        let start = match range {
            None => std::io::SeekFrom::Start(0),
            Some(Range::Int { first, .. }) => std::io::SeekFrom::Start(first),
            Some(Range::Suffix { .. }) => {
                std::io::SeekFrom::End(-output.content_length.unwrap_or_default())
            }
        };
        file.seek(start).await.map_err(S3Error::internal_error)?;
        let length = output.content_length.and_then(|it| it.try_into().ok()).unwrap_or_default();
        output.body = Some(body::of_file(file, length, plan.body));
        if plan.body.flip.is_some() {
            output.checksum_crc32 = None;
            output.checksum_crc32c = None;
            output.checksum_crc64nvme = None;
            output.checksum_sha1 = None;
            output.checksum_sha256 = None;
        }
        answer(plan, response)
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let HeadObjectInput { bucket, key, .. } = &request.input;
        self.admit(Operation::HeadObject, key).await?;
        let written_at = self.written_at(&self.holding(bucket, key)?, key);
        let mut response = self.files.head_object(request).await?;
        let output = &mut response.output;
        output.last_modified = written_at.or(output.last_modified.take());
        output.storage_class = take_class(&mut output.metadata).map(StorageClass::from);
        Ok(response)
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let prefix = request.input.prefix.clone().unwrap_or_default();
        self.admit(Operation::ListObjects, &prefix).await?;
        let bucket = self.existing(&request.input.bucket)?;
        let mut response = self.files.list_objects_v2(request.clone()).await;
        for _ in 1..LIST_ATTEMPTS {
            if !response.as_ref().is_err_and(|it| *it.code() == S3ErrorCode::InternalError) {
                break;
            }
            response = self.files.list_objects_v2(request.clone()).await;
        }
        let mut response = response?;
        for object in response.output.contents.iter_mut().flatten() {
            let Some(key) = &object.key else { continue };
            object.e_tag = bucket.etag(key).map(ETag::Strong);
            // One that was deleted meanwhile is told as it was listed.
            object.last_modified = self.written_at(&bucket, key).or(object.last_modified.take());
            object.storage_class = bucket.storage_class(key).map(ObjectStorageClass::from);
        }
        Ok(response)
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let DeleteObjectInput { bucket, key, .. } = request.input;
        let plan = self.admit(Operation::DeleteObject, &key).await?;
        self.delete(&self.existing(&bucket)?, &key)?;
        answer(plan, S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let DeleteObjectsInput { bucket, delete, .. } = request.input;
        let first = delete.objects.first().map_or("", |object| object.key.as_str());
        let plan = self.admit(Operation::DeleteObjects, first).await?;
        let bucket = self.existing(&bucket)?;
        let mut deleted = Vec::new();
        let mut errors = Vec::new();
        for object in delete.objects {
            match self.delete(&bucket, &object.key) {
                Ok(()) => {
                    deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
                }
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    key: Some(object.key),
                    message: error.message().map(str::to_owned),
                    version_id: None,
                }),
            }
        }
        let quiet = delete.quiet == Some(true);
        let output = DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            errors: Some(errors),
            ..Default::default()
        };
        answer(plan, S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        mut request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = &mut request.input;
        let plan = self.admit(Operation::CreateMultipartUpload, &input.key).await?;
        self.existing(&input.bucket)?;
        keep_class(&mut input.metadata, input.storage_class.take());
        let encryption = (input.server_side_encryption.take(), input.ssekms_key_id.take());
        keep_encryption(&mut input.metadata, encryption);
        let (algorithm, kind) = (input.checksum_algorithm.clone(), input.checksum_type.clone());
        let mut response = self.files.create_multipart_upload(request).await?;
        response.output.checksum_algorithm = algorithm;
        response.output.checksum_type = kind;
        answer(plan, response)
    }

    async fn upload_part(
        &self,
        mut request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = &mut request.input;
        let plan = self.admit_body(Operation::UploadPart, &input.key, &mut input.body).await?;
        let bucket = self.uploading(&input.bucket, &input.upload_id)?;
        let part = (input.upload_id.clone(), input.part_number);
        let path = bucket.part(&part.0, part.1);
        let checksum = PartChecksum::expected(input, &request.headers);
        let trailers = request.trailing_headers.clone();
        let input = &mut request.input;
        input.body = input.body.take().map(|body| {
            let checksum = checksum.clone();
            body::of_request(body, plan.body, move |piece| checksum.update(piece))
        });
        let mut response = self.files.upload_part(request).await?;
        if let Err(error) = checksum.check(trailers.as_ref(), &mut response.output) {
            remove_if_there(&path).map_err(S3Error::internal_error)?;
            return Err(error);
        }
        match plan.store {
            Store::Whole => {}
            Store::Nothing => remove_if_there(&path).map_err(S3Error::internal_error)?,
            Store::Truncated(bytes) => {
                let file = File::options().write(true).open(&path);
                file.and_then(|it| it.set_len(bytes.min(it.metadata()?.len())))
                    .map_err(S3Error::internal_error)?;
            }
        }
        if let Some(etag) = &response.output.e_tag {
            self.etags.lock().unwrap().insert(part, etag.clone());
        }
        answer(plan, response)
    }

    async fn complete_multipart_upload(
        &self,
        mut request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = &mut request.input;
        let (key, upload_id) = (input.key.clone(), input.upload_id.clone());
        let plan = self.admit(Operation::CompleteMultipartUpload, &key).await?;
        let bucket = self.uploading(&input.bucket, &upload_id)?;
        self.check_parts(&bucket, input)?;
        let conditions = Conditions {
            if_none_match: input.if_none_match.take(),
            if_match: input.if_match.take(),
        };
        self.may_write(&bucket, &key, &conditions)?;
        let (staging, staged) = self.staging();
        let name = std::mem::replace(&mut input.bucket, STAGING.to_owned());
        input.key.clone_from(&staged);
        self.files.complete_multipart_upload(request).await?;
        let metadata = bucket.upload_metadata(&key, &upload_id);
        if metadata.exists() {
            fs::rename(metadata, staging.metadata(&staged)).map_err(S3Error::internal_error)?;
        }
        let e_tag = staging.etag(&staged).map(ETag::Strong);
        self.commit((&staging, &staged), (&bucket, &key), &conditions, plan.store)?;
        self.forget_parts(&upload_id);
        let output = CompleteMultipartUploadOutput {
            bucket: Some(name),
            key: Some(key),
            e_tag,
            ..Default::default()
        };
        answer(plan, S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = &request.input;
        let plan = self.admit(Operation::AbortMultipartUpload, &input.key).await?;
        self.uploading(&input.bucket, &input.upload_id)?;
        self.forget_parts(&input.upload_id);
        answer(plan, self.files.abort_multipart_upload(request).await?)
    }

    async fn list_parts(
        &self,
        request: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        let upload_id = request.input.upload_id.clone();
        self.admit(Operation::ListParts, &request.input.key).await?;
        self.uploading(&request.input.bucket, &upload_id)?;
        let mut response = self.files.list_parts(request).await?;
        let etags = self.etags.lock().unwrap();
        for part in response.output.parts.iter_mut().flatten() {
            let number = part.part_number.unwrap_or_default();
            part.e_tag = etags.get(&(upload_id.clone(), number)).cloned();
        }
        if let Some(parts) = &mut response.output.parts {
            parts.sort_unstable_by_key(|part| part.part_number);
        }
        Ok(response)
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let ListMultipartUploadsInput {
            bucket: name,
            prefix,
            key_marker,
            upload_id_marker,
            max_uploads,
            ..
        } = request.input;
        let wanted = prefix.clone().unwrap_or_default();
        self.admit(Operation::ListMultipartUploads, &wanted).await?;
        let mut uploads = self.existing(&name)?.list_uploads().map_err(S3Error::internal_error)?;
        uploads.retain(|upload| upload.key.starts_with(&wanted));
        if let Some(key_marker) = &key_marker {
            // Without an upload marker, everything of the marked key came before.
            uploads.retain(|upload| match &upload_id_marker {
                Some(id) => (&upload.key, &upload.upload_id) > (key_marker, id),
                None => upload.key > *key_marker,
            });
        }
        let limit = max_uploads.unwrap_or(UPLOADS_MAX).clamp(0, UPLOADS_MAX);
        let limit_count = usize::try_from(limit).unwrap_or_default();
        let is_truncated = uploads.len() > limit_count;
        uploads.truncate(limit_count);
        let last = uploads.last().filter(|_| is_truncated);
        let output = ListMultipartUploadsOutput {
            bucket: Some(name),
            prefix,
            key_marker,
            upload_id_marker,
            max_uploads: Some(limit),
            is_truncated: Some(is_truncated),
            next_key_marker: last.map(|upload| upload.key.clone()),
            next_upload_id_marker: last.map(|upload| upload.upload_id.clone()),
            uploads: Some(
                uploads
                    .into_iter()
                    .map(|upload| MultipartUpload {
                        key: Some(upload.key),
                        upload_id: Some(upload.upload_id),
                        initiated: Some(Timestamp::from(upload.started_at)),
                        storage_class: upload.storage_class.map(StorageClass::from),
                        ..Default::default()
                    })
                    .collect(),
            ),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }
}

/// The answer of an operation that is done, unless it is to be lost.
fn answer<T>(plan: Plan, response: S3Response<T>) -> S3Result<S3Response<T>> {
    if plan.lose_answer {
        return Err(s3_error!(InternalError, "done, and the answer lost on purpose"));
    }
    Ok(response)
}

fn refused(refusal: Refusal) -> S3Error {
    let on_purpose = "refused on purpose";
    match refusal {
        Refusal::SlowDown => s3_error!(SlowDown, "{on_purpose}"),
        Refusal::ServiceUnavailable => s3_error!(ServiceUnavailable, "{on_purpose}"),
        Refusal::InternalError => s3_error!(InternalError, "{on_purpose}"),
        Refusal::AccessDenied => s3_error!(AccessDenied, "{on_purpose}"),
        Refusal::NotImplemented => s3_error!(NotImplemented, "{on_purpose}"),
        Refusal::TooManyRequests => {
            let code = S3ErrorCode::Custom("TooManyRequests".into());
            let mut error = S3Error::with_message(code, on_purpose);
            error.set_status_code(StatusCode::TOO_MANY_REQUESTS);
            error
        }
    }
}

fn keep_class(metadata: &mut Option<Metadata>, class: Option<StorageClass>) {
    if let Some(class) = class {
        let metadata = metadata.get_or_insert_with(Metadata::new);
        metadata.insert(STORAGE_CLASS.to_owned(), class.as_str().to_owned());
    }
}

fn keep_encryption(
    metadata: &mut Option<Metadata>,
    (encryption, key): (Option<ServerSideEncryption>, Option<String>),
) {
    if let Some(encryption) = encryption {
        let words: Vec<_> =
            [Some(encryption.as_str()), key.as_deref()].into_iter().flatten().collect();
        let metadata = metadata.get_or_insert_with(Metadata::new);
        metadata.insert(ENCRYPTION.to_owned(), words.join(" "));
    }
}

fn take_class(metadata: &mut Option<Metadata>) -> Option<String> {
    metadata.as_mut()?.remove(STORAGE_CLASS)
}
