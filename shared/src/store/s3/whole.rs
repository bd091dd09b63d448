//! Whether an answer has arrived as a whole. The SDK takes XML that ends anywhere between two elements
//! for complete: a list that a proxy has cut short, with the length that it has then, would be one of
//! fewer objects.

use aws_sdk_s3::config::interceptors::{
    AfterDeserializationInterceptorContextRef, InterceptorContext,
};
use aws_sdk_s3::config::retry::{ClassifyRetry, RetryAction};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use thiserror::Error;

use super::failure::find;

/// An answer without its end.
#[derive(Debug, Error)]
#[error("the answer is cut short: {bytes} bytes of XML without its end")]
pub(super) struct Cut {
    bytes: usize,
}

/// Has a request fail whose answer was cut short, and be tried again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole;

impl Intercept for Whole {
    fn name(&self) -> &'static str {
        "whole answer"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        // Bodies of objects are streams: these are counted where they are read.
        match context.response().body().bytes() {
            Some(body) if !is_whole(body) => Err(Cut { bytes: body.len() }.into()),
            _ => Ok(()),
        }
    }
}

impl ClassifyRetry for Whole {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let error = context.output_or_error().and_then(Result::err);
        match error.and_then(|error| find::<Cut>(error)) {
            Some(_) => RetryAction::transient_error(),
            None => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "answer that is cut short"
    }
}

/// Whether XML ends with its first element. What is no XML is left to whoever reads it.
fn is_whole(body: &[u8]) -> bool {
    let body = body.trim_ascii();
    let mut rest = body;
    while rest.starts_with(b"<?") || rest.starts_with(b"<!") {
        let Some(end) = rest.iter().position(|it| *it == b'>') else { return false };
        rest = rest[end + 1..].trim_ascii_start();
    }
    let Some(root) = rest.strip_prefix(b"<") else { return rest.len() == body.len() };
    let Some(end) = root.iter().position(|it| *it == b'>') else { return false };
    if root[..end].ends_with(b"/") {
        return end + 1 == root.len();
    }
    let is_end = |it: &u8| *it == b'>' || it.is_ascii_whitespace();
    let name = &root[..root.iter().position(is_end).unwrap_or(end)];
    let closing = body.strip_suffix(b">").map(<[u8]>::trim_ascii_end);
    closing.and_then(|it| it.strip_suffix(name)).is_some_and(|it| it.ends_with(b"</"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_ends_with_its_first_element() {
        for (body, expected) in [
            ("", true),
            ("OK", true),
            ("<a></a>", true),
            ("<?xml version=\"1.0\"?>\n<List xmlns=\"u\"><Key>k</Key></List>\n", true),
            ("<!DOCTYPE html><html><body></body></html>", true),
            ("<List/>", true),
            ("  <List xmlns=\"u\" />  ", true),
            ("<List></List >", true),
            ("<List><Key>k</Key>", false),
            ("<List><Key>k</Ke", false),
            ("<List><Key>k</Key></List", false),
            ("<List><List></List>x", false),
            ("<List><Key/>", false),
            ("<List><MyList></MyList>", false),
            ("<Li", false),
            ("<?xml version=\"1.0\"?>", false),
            ("<?xml vers", false),
            ("<", false),
        ] {
            assert_eq!(is_whole(body.as_bytes()), expected, "{body:?}");
        }
    }
}
