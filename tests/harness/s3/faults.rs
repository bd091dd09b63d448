//! What goes wrong, on demand, while the server runs.
//!
//! A [`Fault`] is an [`Effect`], and which requests it befalls. The third put of a manifest fails:
//!
//! ```ignore
//! let fault = Fault::new(Effect::Refuse(Refusal::InternalError))
//!     .on(Operation::PutObject)
//!     .key("manifest")
//!     .after(2)
//!     .times(1);
//! server.faults().add(fault);
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

/// The most requests the record keeps; a server beyond that forgets the oldest half.
const RECORD_MAX: usize = 100_000;

/// An operation of the S3 protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the protocol's reference")]
pub enum Operation {
    AbortMultipartUpload,
    CompleteMultipartUpload,
    CreateBucket,
    CreateMultipartUpload,
    DeleteObject,
    DeleteObjects,
    GetObject,
    HeadBucket,
    HeadObject,
    ListMultipartUploads,
    ListObjects,
    ListParts,
    PutObject,
    UploadPart,
}

/// The error a request is refused with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 503, what S3 answers when asked too fast.
    SlowDown,
    /// 429, what other servers answer when asked too fast.
    TooManyRequests,
    /// 500.
    InternalError,
    /// 503.
    ServiceUnavailable,
    /// 403, as for missing permissions.
    AccessDenied,
    /// 501, as for server-side encryption where the server has no keys.
    NotImplemented,
}

/// A place in a body.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum At {
    /// This many bytes from its beginning.
    Byte(u64),
    /// This part of its length, from 0 to 1.
    Fraction(f64),
}

/// What befalls a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// An error instead of an answer. Nothing is stored. The request's body is read first.
    Refuse(Refusal),
    /// The server waits this long before it does anything.
    Delay(Duration),
    /// The body, of a put, an uploaded part or a get, passes this slowly.
    Throttle {
        /// Bytes a second.
        bytes_per_second: u64,
    },
    /// The server never answers; the connection stays open.
    Stall,
    /// The server does what it was asked, and then answers 500: the client cannot know.
    LoseAnswer,
    /// The connection breaks in the middle of a get's body, after these bytes: fewer than
    /// `Content-Length` promised.
    CutBody(At),
    /// The body of a get stops in the middle, and the connection stays open.
    StallBody(At),
    /// One bit of a get's body is not as stored, and no checksum is sent. Repeats of the get are
    /// right again unless the fault befalls them too.
    FlipBit(At),
    /// A put, an uploaded part or a completed upload is answered with 200 and not stored.
    StoreNothing,
    /// A put, an uploaded part or a completed upload is answered with 200, and only its first
    /// bytes are stored. Length and checksums of a later get are those of what is stored.
    StoreTruncated {
        /// How many bytes are kept.
        bytes: u64,
    },
}

/// An effect, and which requests it befalls.
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    /// Empty for every operation.
    operations: Vec<Operation>,
    key: Option<String>,
    skip: u64,
    times: Option<u64>,
}

impl Fault {
    /// A fault that befalls every request.
    pub fn new(effect: Effect) -> Self {
        Self { effect, operations: Vec::new(), key: None, skip: 0, times: None }
    }

    /// Only this operation; several calls name several.
    pub fn on(mut self, operation: Operation) -> Self {
        self.operations.push(operation);
        self
    }

    /// Only requests whose key, or listed prefix, contains `part`.
    pub fn key(mut self, part: &str) -> Self {
        self.key = Some(part.to_owned());
        self
    }

    /// Not the first `count` of the requests it would befall.
    pub fn after(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// Only `count` requests.
    pub fn times(mut self, count: u64) -> Self {
        self.times = Some(count);
        self
    }

    fn befalls(&mut self, operation: Operation, key: &str) -> bool {
        let chosen = self.operations.is_empty() || self.operations.contains(&operation);
        if !chosen || self.key.as_ref().is_some_and(|part| !key.contains(part.as_str())) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        match &mut self.times {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

/// Names a fault that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(u64);

/// One request the server got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What was asked.
    pub operation: Operation,
    /// The key, or the listed prefix; of a delete of several, the first key.
    pub key: String,
}

/// The handle by which a test makes a running server fail, and asks what it was asked. Clones
/// are the same handle.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    object_lock: AtomicBool,
    ignore_conditions: AtomicBool,
    recording: bool,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    faults: Vec<Active>,
    hits: HashMap<u64, u64>,
    counts: HashMap<Operation, u64>,
    record: Vec<Request>,
    clock_behind: Duration,
}

#[derive(Debug)]
struct Active {
    id: u64,
    fault: Fault,
}

impl Faults {
    /// A handle that also keeps a record of the requests.
    pub(super) fn recording() -> Self {
        Self(Arc::new(Inner { recording: true, ..Inner::default() }))
    }

    /// Adds a fault. Several may befall one request; they add up.
    pub fn add(&self, fault: Fault) -> FaultId {
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        state.faults.push(Active { id, fault });
        FaultId(id)
    }

    /// Removes one fault.
    pub fn remove(&self, FaultId(id): FaultId) {
        self.state().faults.retain(|active| active.id != id);
    }

    /// Removes every fault and turns the switches off. Requests that stall go on stalling.
    pub fn clear(&self) {
        self.state().faults.clear();
        self.object_lock(false);
        self.ignore_conditions(false);
        self.clock_behind(Duration::ZERO);
    }

    /// How many requests a fault has befallen.
    pub fn hits(&self, FaultId(id): FaultId) -> u64 {
        self.state().hits.get(&id).copied().unwrap_or(0)
    }

    /// From now on, overwriting or deleting an object that exists is answered with 403, as in a
    /// bucket whose objects are locked.
    pub fn object_lock(&self, locked: bool) {
        self.0.object_lock.store(locked, Ordering::SeqCst);
    }

    /// From now on, `If-None-Match` and `If-Match` of puts are ignored silently, as Garage does.
    pub fn ignore_conditions(&self, ignored: bool) {
        self.0.ignore_conditions.store(ignored, Ordering::SeqCst);
    }

    /// From now on, objects are told to be written so much earlier than they were.
    pub fn clock_behind(&self, by: Duration) {
        self.state().clock_behind = by;
    }

    /// How often an operation was asked for, refused requests included.
    pub fn requests(&self, operation: Operation) -> u64 {
        self.state().counts.get(&operation).copied().unwrap_or(0)
    }

    /// How many requests there were of any kind.
    pub fn requests_total(&self) -> u64 {
        self.state().counts.values().sum()
    }

    /// The requests in the order they came, refused ones included.
    pub fn record(&self) -> Vec<Request> {
        self.state().record.clone()
    }

    /// Empties the record and the counters.
    pub fn forget_requests(&self) {
        let mut state = self.state();
        state.record.clear();
        state.counts.clear();
    }

    pub(super) fn is_object_locked(&self) -> bool {
        self.0.object_lock.load(Ordering::SeqCst)
    }

    pub(super) fn conditions_count(&self) -> bool {
        !self.0.ignore_conditions.load(Ordering::SeqCst)
    }

    /// What the server tells of when an object was written.
    pub(super) fn told(&self, written_at: SystemTime) -> SystemTime {
        written_at - self.state().clock_behind
    }

    /// Counts a request, and decides what befalls it.
    pub(super) fn befall(&self, operation: Operation, key: &str) -> Plan {
        let mut state = self.state();
        let State { faults, hits, counts, record, .. } = &mut *state;
        *counts.entry(operation).or_default() += 1;
        if self.0.recording {
            if record.len() >= RECORD_MAX {
                record.drain(..RECORD_MAX / 2);
            }
            record.push(Request { operation, key: key.to_owned() });
        }
        let mut plan = Plan::default();
        for Active { id, fault } in faults {
            if fault.befalls(operation, key) {
                *hits.entry(*id).or_default() += 1;
                plan.add(fault.effect);
            }
        }
        plan
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}

/// Everything that befalls one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) delay: Duration,
    pub(super) stall: bool,
    pub(super) refusal: Option<Refusal>,
    pub(super) lose_answer: bool,
    pub(super) store: Store,
    pub(super) body: BodyPlan,
}

/// What becomes of a request's body when it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Store {
    #[default]
    Whole,
    Nothing,
    Truncated(u64),
}

/// What befalls a body on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct BodyPlan {
    pub(super) bytes_per_second: Option<u64>,
    pub(super) cut: Option<At>,
    pub(super) stall: Option<At>,
    pub(super) flip: Option<At>,
}

impl Plan {
    fn add(&mut self, effect: Effect) {
        match effect {
            Effect::Refuse(refusal) => self.refusal = Some(refusal),
            Effect::Delay(delay) => self.delay += delay,
            Effect::Throttle { bytes_per_second } => {
                self.body.bytes_per_second = Some(bytes_per_second);
            }
            Effect::Stall => self.stall = true,
            Effect::LoseAnswer => self.lose_answer = true,
            Effect::CutBody(at) => self.body.cut = Some(at),
            Effect::StallBody(at) => self.body.stall = Some(at),
            Effect::FlipBit(at) => self.body.flip = Some(at),
            Effect::StoreNothing => self.store = Store::Nothing,
            Effect::StoreTruncated { bytes } => self.store = Store::Truncated(bytes),
        }
    }
}

impl At {
    /// The offset in a body of `length` bytes; at most `length`.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a fraction of a length need not be exact"
    )]
    pub(super) fn offset(self, length: u64) -> u64 {
        match self {
            Self::Byte(byte) => byte.min(length),
            Self::Fraction(fraction) => ((length as f64 * fraction) as u64).min(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSE: Effect = Effect::Refuse(Refusal::SlowDown);

    #[test]
    fn a_fault_befalls_the_requests_it_names_and_no_others() {
        let faults = Faults::default();
        let fault = Fault::new(REFUSE).on(Operation::PutObject).key("manifest").after(1).times(2);
        let id = faults.add(fault);
        let befallen = |operation, key| faults.befall(operation, key).refusal.is_some();
        assert!(!befallen(Operation::PutObject, "base/1/part-00000"), "another key");
        assert!(!befallen(Operation::GetObject, "base/1/manifest"), "another operation");
        assert!(!befallen(Operation::PutObject, "base/1/manifest"), "the first is spared");
        assert!(befallen(Operation::PutObject, "base/2/manifest"), "the second");
        assert!(befallen(Operation::PutObject, "base/3/manifest"), "the third");
        assert!(!befallen(Operation::PutObject, "base/4/manifest"), "used up");
        assert_eq!(faults.hits(id), 2);
        assert_eq!(faults.requests(Operation::PutObject), 5);
        assert_eq!(faults.requests_total(), 6);
    }

    #[test]
    fn faults_add_up() {
        let faults = Faults::default();
        faults.add(Fault::new(Effect::Delay(Duration::from_secs(1))));
        faults
            .add(Fault::new(Effect::LoseAnswer).on(Operation::PutObject).on(Operation::UploadPart));
        let expected = Plan { delay: Duration::from_secs(1), lose_answer: true, ..Plan::default() };
        assert_eq!(faults.befall(Operation::UploadPart, "k"), expected);
        faults.clear();
        assert_eq!(faults.befall(Operation::UploadPart, "k"), Plan::default());
    }

    #[test]
    fn a_place_lies_within_the_body() {
        for (at, length, expected) in [
            (At::Byte(0), 10, 0),
            (At::Byte(11), 10, 10),
            (At::Fraction(0.5), 10, 5),
            (At::Fraction(1.0), 10, 10),
            (At::Fraction(0.5), 0, 0),
        ] {
            assert_eq!(at.offset(length), expected, "{at:?} of {length}");
        }
    }
}
