//! A watch that mends itself, at another endpoint if need be.
//!
//! It then begins anew with the whole list, and does not go on from the last revision it has seen: a
//! store that was emptied, or restored from a snapshot, has other revisions and, with the same members,
//! the same cluster id. It would be asked for what comes after a revision that it does not have yet,
//! and say nothing at all.

use std::collections::VecDeque;
use std::future::pending;
use std::panic::resume_unwind;
use std::time::Duration;

use etcd_client::{Client, Error, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use super::error::reason;
use super::{Etcd, EtcdError, KeyValue, Listing, prefix_end};

/// After this long without a word the endpoint is asked whether it is still there. HTTP/2 pings
/// would not do: etcd takes them at most every 5 s.
const SILENCE: Duration = Duration::from_secs(2);
/// How long the answer may take. So a frozen endpoint is noticed after 4 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Shortest time between two lists, so that an endpoint that ends the stream at once is not asked in
/// a tight loop.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// Largest message of a watch, in bytes: one revision's changes come in one message, and a
/// transaction may change 128 keys of 1.5 MiB each by etcd's defaults. Above it, the list is read.
const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// What happened below a watched prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Everything there is: at first, and whenever the watch was broken. What is not in it does not
    /// exist any more.
    All {
        /// The cluster's revision at which this is exact. Lower than one before: this is another
        /// store.
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
}

/// A watch on all keys with one prefix.
#[derive(Debug)]
pub struct Watch {
    etcd: Etcd,
    prefix: String,
    /// The list and the stream of what comes after it, under way. In a task of its own, so that
    /// whoever gives up waiting loses nothing: between two lists a change would go unseen.
    beginning: JoinSet<Result<Beginning, EtcdError>>,
    stream: Option<Stream>,
    began_at: Option<Instant>,
    pending: VecDeque<Change>,
}

/// What a watch begins with.
#[derive(Debug)]
struct Beginning {
    listing: Listing,
    stream: Stream,
    first: WatchResponse,
}

/// The open stream.
#[derive(Debug)]
struct Stream {
    endpoint: usize,
    messages: WatchStream,
    /// Changes after this revision have not been seen.
    revision: i64,
    heard_at: Instant,
    /// When the endpoint was asked whether it is still there, if it owes the answer.
    asked_at: Option<Instant>,
}

impl Watch {
    pub(super) fn new(etcd: Etcd, prefix: String) -> Self {
        Self {
            etcd,
            prefix,
            beginning: JoinSet::new(),
            stream: None,
            began_at: None,
            pending: VecDeque::new(),
        }
    }

    /// Returns the next change; the first is the list. May be dropped at any await.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers within 5 s, or etcd refuses. Calling it again begins with the
    /// list; wait a little before that.
    pub async fn next(&mut self) -> Result<Change, EtcdError> {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return Ok(change);
            }
            self.step().await?;
        }
    }

    /// Does what is next: begins, or waits for a message.
    async fn step(&mut self) -> Result<(), EtcdError> {
        if let Some(stream) = &mut self.stream {
            match stream.message().await {
                Ok(message) => self.take(&message),
                Err(failure) => {
                    debug!(prefix = self.prefix, error = failure, "watch broken");
                    self.etcd.endpoints.failed(stream.endpoint, &failure);
                    self.stream = None;
                }
            }
            return Ok(());
        }
        if self.beginning.is_empty() {
            let not_before = self.began_at.map(|it| it + REOPEN_PAUSE);
            self.beginning.spawn(begin(self.etcd.clone(), self.prefix.clone(), not_before));
        }
        let Some(began) = self.beginning.join_next().await else { return Ok(()) };
        self.began_at = Some(Instant::now());
        let Beginning { listing, stream, first } = match began {
            Ok(began) => began?,
            Err(failure) => match failure.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime ends, and whoever waits with it.
                Err(_) => pending().await,
            },
        };
        let Listing { revision, entries } = listing;
        self.pending.push_back(Change::All { revision, entries });
        self.stream = Some(stream);
        self.take(&first);
        Ok(())
    }

    fn take(&mut self, message: &WatchResponse) {
        let Some(stream) = &mut self.stream else { return };
        let is_behind = message.header().is_some_and(|it| it.revision() < stream.revision);
        if message.canceled() || is_behind {
            // The revision was compacted; or the store has another history, which something between us
            // hides, or the endpoint has yet to catch up.
            debug!(prefix = self.prefix, is_behind, "watch begins anew");
            self.stream = None;
            return;
        }
        for event in message.events() {
            let Some(found) = event.kv() else { continue };
            let found = KeyValue::from(found);
            // Only what was seen counts, not the revision of a message without events: of etcd
            // before 3.5.8 that could be ahead of events still to come.
            stream.revision = stream.revision.max(found.mod_revision);
            self.pending.push_back(match event.event_type() {
                EventType::Put => Change::Put(found),
                EventType::Delete => {
                    Change::Deleted { key: found.key, revision: found.mod_revision }
                }
            });
        }
    }
}

/// Reads the list, and opens the stream of what comes after it.
async fn begin(
    etcd: Etcd,
    prefix: String,
    not_before: Option<Instant>,
) -> Result<Beginning, EtcdError> {
    if let Some(not_before) = not_before {
        sleep_until(not_before).await;
    }
    let listing = etcd.list(&prefix).await?;
    let options = WatchOptions::new()
        .with_range(prefix_end(prefix.as_bytes()))
        .with_start_revision(listing.revision + 1);
    let open = |client: Client| {
        let options = options.clone();
        let prefix = prefix.as_str();
        async move {
            let mut watches = client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
            let mut stream = watches.watch(prefix, Some(options)).await?;
            let first = stream.message().await?.ok_or_else(ended)?;
            if first.canceled() && first.compact_revision() == 0 {
                return Err(Error::WatchError(first.cancel_reason().to_owned()));
            }
            Ok((stream, first))
        }
    };
    let (endpoint, (messages, first)) = etcd.endpoints.call_at("watch", open).await?;
    let (revision, heard_at) = (listing.revision, Instant::now());
    let stream = Stream { endpoint, messages, revision, heard_at, asked_at: None };
    Ok(Beginning { listing, stream, first })
}

impl Stream {
    /// Waits for a message, and asks for one when none comes. Fails with why the stream is given up.
    async fn message(&mut self) -> Result<WatchResponse, String> {
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
                Ok(Ok(None)) => return Err(reason(&ended())),
                Ok(Err(error)) => return Err(reason(&error)),
                Err(_) if self.asked_at.is_some() => return Err("no answer in time".to_owned()),
                Err(_) => {
                    self.asked_at = Some(Instant::now());
                    let asked = self.messages.request_progress().await;
                    asked.map_err(|error| reason(&error))?;
                }
            }
        }
    }
}

fn ended() -> Error {
    Error::WatchError("the stream ended".to_owned())
}
