//! A watch that mends itself: it goes on from the last revision it has seen, at another endpoint
//! if need be, and begins anew with the whole list where etcd no longer keeps that revision.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Error, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use super::endpoints::Endpoints;
use super::error::{code, code_of, reason};
use super::{Etcd, EtcdError, KeyValue, prefix_end};

/// After this long without a word the endpoint is asked whether it is still there. HTTP/2 pings
/// would not do: etcd takes them at most every 5 s.
const SILENCE: Duration = Duration::from_secs(2);
/// How long the answer may take. So a frozen endpoint is noticed after 4 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Shortest time between two attempts to open the stream, so that an endpoint that ends it at
/// once is not asked in a tight loop.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// Largest message of a watch, in bytes: one revision's changes come in one message, and a
/// transaction may change 128 keys of 1.5 MiB each by etcd's defaults. Above it, the list is read.
const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// What happened below a watched prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Everything there is: at first, and where changes were missed for good. What is not in it
    /// does not exist any more.
    All {
        /// The cluster's revision at which this is exact.
        revision: i64,
        /// The keys, ascending.
        entries: Vec<KeyValue>,
    },
    /// A key was created or set.
    Put(KeyValue),
    /// A key was deleted.
    Deleted {
        /// The key.
        key: String,
        /// The cluster's revision in which it was.
        revision: i64,
    },
    /// After an error: etcd answers again. The changes in between follow.
    Resumed,
}

/// A watch on all keys with one prefix.
#[derive(Debug)]
pub struct Watch {
    endpoints: Arc<Endpoints>,
    etcd: Etcd,
    prefix: String,
    /// Changes after this revision have not been seen; `None` before the list was read.
    revision: Option<i64>,
    stream: Option<Stream>,
    opened_at: Option<Instant>,
    pending: VecDeque<Change>,
    is_lost: bool,
}

/// The open stream.
#[derive(Debug)]
struct Stream {
    endpoint: usize,
    messages: WatchStream,
    heard_at: Instant,
    /// When the endpoint was asked whether it is still there, if it owes the answer.
    asked_at: Option<Instant>,
}

impl Watch {
    pub(super) fn new(endpoints: Arc<Endpoints>, etcd: Etcd, prefix: String) -> Self {
        Self {
            endpoints,
            etcd,
            prefix,
            revision: None,
            stream: None,
            opened_at: None,
            pending: VecDeque::new(),
            is_lost: false,
        }
    }

    /// Returns the next change; the first is the list. May be dropped at any await.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers within 5 s, or etcd refuses. Calling it again goes on
    /// where it was; wait a little before that.
    pub async fn next(&mut self) -> Result<Change, EtcdError> {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return Ok(change);
            }
            if let Err(error) = self.step().await {
                self.is_lost = true;
                return Err(error);
            }
        }
    }

    /// Does what is next: reads the list, opens the stream, or waits for a message.
    async fn step(&mut self) -> Result<(), EtcdError> {
        let Some(revision) = self.revision else {
            let listing = self.etcd.list(&self.prefix).await?;
            self.revision = Some(listing.revision);
            self.answers_again();
            let (revision, entries) = (listing.revision, listing.entries);
            self.pending.push_back(Change::All { revision, entries });
            return Ok(());
        };
        let Some(stream) = &mut self.stream else {
            if let Some(opened_at) = self.opened_at {
                sleep_until(opened_at + REOPEN_PAUSE).await;
            }
            self.opened_at = Some(Instant::now());
            return self.open(revision + 1).await;
        };
        match stream.message().await {
            Ok(message) => self.take(&message),
            Err(failure) => {
                debug!(prefix = self.prefix, error = failure.reason, "watch broken");
                self.endpoints.failed(stream.endpoint, &failure.reason);
                self.stream = None;
                if failure.is_too_large {
                    self.revision = None;
                }
            }
        }
        Ok(())
    }

    async fn open(&mut self, from: i64) -> Result<(), EtcdError> {
        let options = WatchOptions::new()
            .with_range(prefix_end(self.prefix.as_bytes()))
            .with_start_revision(from);
        let open = |client: Client| {
            let options = options.clone();
            let prefix = self.prefix.as_str();
            async move {
                let mut watches =
                    client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
                let mut stream = watches.watch(prefix, Some(options)).await?;
                let first = stream.message().await?.ok_or_else(ended)?;
                if first.canceled() && first.compact_revision() == 0 {
                    return Err(Error::WatchError(first.cancel_reason().to_owned()));
                }
                Ok((stream, first))
            }
        };
        let (endpoint, (messages, first)) = self.endpoints.call_at("watch", open).await?;
        self.stream = Some(Stream { endpoint, messages, heard_at: Instant::now(), asked_at: None });
        self.answers_again();
        self.take(&first);
        Ok(())
    }

    fn answers_again(&mut self) {
        if std::mem::take(&mut self.is_lost) {
            self.pending.push_back(Change::Resumed);
        }
    }

    fn take(&mut self, message: &WatchResponse) {
        if message.canceled() {
            self.stream = None;
            if 0 < message.compact_revision() {
                debug!(prefix = self.prefix, "watched revision compacted");
                self.revision = None;
            }
            return;
        }
        for event in message.events() {
            let Some(found) = event.kv() else { continue };
            let found = KeyValue::from(found);
            // Only what was seen counts, not the revision of a message without events: of etcd
            // before 3.5.8 that could be ahead of events still to come.
            self.revision = self.revision.max(Some(found.mod_revision));
            self.pending.push_back(match event.event_type() {
                EventType::Put => Change::Put(found),
                EventType::Delete => {
                    Change::Deleted { key: found.key, revision: found.mod_revision }
                }
            });
        }
    }
}

/// Why a stream is given up.
struct Failure {
    reason: String,
    /// A message was larger than we take.
    is_too_large: bool,
}

impl Stream {
    /// Waits for a message, and asks for one when none comes.
    async fn message(&mut self) -> Result<WatchResponse, Failure> {
        loop {
            let due = match self.asked_at {
                Some(asked_at) => asked_at + ANSWER_LIMIT,
                None => self.heard_at + SILENCE,
            };
            match timeout_at(due, self.messages.message()).await {
                Ok(Ok(Some(message))) => {
                    self.heard_at = Instant::now();
                    self.asked_at = None;
                    return Ok(message);
                }
                Ok(Ok(None)) => return Err(Failure::from(ended())),
                Ok(Err(error)) => return Err(Failure::from(error)),
                Err(_) if self.asked_at.is_some() => {
                    let reason = "no answer in time".to_owned();
                    return Err(Failure { reason, is_too_large: false });
                }
                Err(_) => {
                    self.asked_at = Some(Instant::now());
                    self.messages.request_progress().await.map_err(Failure::from)?;
                }
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let is_too_large = code_of(&error) == Some(code::OUT_OF_RANGE);
        Self { reason: reason(&error), is_too_large }
    }
}

fn ended() -> Error {
    Error::WatchError("the stream ended".to_owned())
}
