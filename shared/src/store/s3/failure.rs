//! What an error of the SDK means to a caller and to an operator.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::interceptors::InterceptorContext;
use aws_sdk_s3::config::retry::{ClassifyRetry, RetryAction};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use thiserror::Error;

use super::super::StoreErrorKind;
use super::whole::Cut;
use crate::telemetry::chain;
use crate::tls;

/// Has a request fail at once whose connection fails for a certificate. The SDK takes that for a
/// network that is down, and tries for half a minute.
#[derive(Debug)]
pub(super) struct HopelessHandshake;

impl ClassifyRetry for HopelessHandshake {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let error = context.output_or_error().and_then(Result::err);
        let error = error.and_then(|error| error.as_connector_error());
        match error.and_then(|error| tls::explain(error)) {
            Some(_) => RetryAction::RetryForbidden,
            None => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "hopeless handshake"
    }
}

/// Says where it was that something went wrong.
#[derive(Debug, Error)]
#[error("{place}")]
pub(super) struct InPlace {
    pub(super) place: String,
    pub(super) source: Box<dyn Error + Send + Sync>,
}

/// The status of the answer, if there is one.
pub(super) fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|response| response.status().as_u16())
}

/// Sorts an SDK error into the kinds a caller decides by. `credentials` says where they are from.
pub(super) fn failure<E>(
    error: SdkError<E>,
    credentials: &str,
) -> (StoreErrorKind, Box<dyn Error + Send + Sync>)
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let kind = kind(&error);
    if let Some(cut) = find::<Cut>(&error) {
        return (kind, cut.to_string().into());
    }
    let source: Box<dyn Error + Send + Sync> = match words(&error) {
        Some(words) if kind == StoreErrorKind::Denied => {
            format!("{words} (with the credentials from {credentials})").into()
        }
        Some(words) => words.into(),
        None => match (tls::explain(&error), find::<CredentialsError>(&error)) {
            (_, Some(error)) => {
                let reasons = chain(error).to_string();
                let reasons = reasons
                    .lines()
                    .map(str::trim)
                    .collect::<Vec<_>>()
                    .join("; ")
                    .replace(":;", ":");
                format!("no credentials from {credentials}: {reasons}").into()
            }
            (Some(words), None) => format!("repository.s3.endpoint: {words}").into(),
            (None, None) => Box::new(error),
        },
    };
    (kind, source)
}

fn kind<E: ProvideErrorMetadata>(error: &SdkError<E>) -> StoreErrorKind {
    let code = error.as_service_error().and_then(|error| error.code()).unwrap_or_default();
    match (status(error), code) {
        (_, "NoSuchKey" | "NoSuchBucket" | "NoSuchUpload") | (Some(404), _) => {
            StoreErrorKind::NotFound
        }
        (_, "BadDigest" | "XAmzContentChecksumMismatch" | "IncompleteBody") => {
            StoreErrorKind::Corrupt
        }
        (_, "QuotaExceeded" | "InsufficientStorage") | (Some(507), _) => StoreErrorKind::Full,
        (Some(501), _) | (_, "NotImplemented") => StoreErrorKind::Unsupported,
        // S3 says of credentials that were valid once that the request is a bad one.
        (Some(401 | 403), _) | (_, "ExpiredToken" | "InvalidToken") => StoreErrorKind::Denied,
        // An answer that is cut short, or not S3's, says nothing of what was asked.
        (Some(200..=299 | 408 | 429 | 500..=599), _) => StoreErrorKind::Unavailable,
        (Some(_), _) => StoreErrorKind::Refused,
        (None, _) => match error {
            SdkError::ConstructionFailure(_) => StoreErrorKind::Refused,
            _ => StoreErrorKind::Unavailable,
        },
    }
}

/// The service's own words: they say more than the SDK's wrapper round them.
fn words<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Option<String> {
    let said = error.as_service_error()?;
    match (said.code(), said.message()) {
        (Some(code), Some(message)) => Some(format!("{code}: {message}")),
        (Some(words), None) | (None, Some(words)) => Some(words.to_owned()),
        (None, None) => Some(match status(error)? {
            status @ 200..=299 => format!(
                "the answer ({status}) is not one of S3: does a proxy answer, or is \
                 repository.s3.endpoint something else?"
            ),
            // The answer to a head has no body.
            status => format!("the store answers {status}"),
        }),
    }
}

/// The first of its kind among an error and its causes.
pub(super) fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
