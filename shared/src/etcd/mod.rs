//! etcd: a few requests that may be repeated, watches that mend themselves, and leases.
//!
//! The client library neither fails over nor reconnects a watch. Here each request walks the
//! endpoints: one that is down or frozen costs at most 1.5 s once and is then asked last. Only
//! requests that may be carried out twice are offered, so each may be retried; what an
//! unreachable etcd was asked may still be done later.

mod config;
mod endpoints;
mod error;
mod member;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Error, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};

pub use config::{EtcdConfig, EtcdSetupError};
pub use error::EtcdError;
pub use member::{EtcdMember, MemberAlarm, MemberError, MemberStatus};
pub use watch::{Change, Watch};

use endpoints::Endpoints;
use error::code;

/// Keys asked for at once. The answer may have 4 MiB; where values are so large that it has
/// more, fewer are asked for.
const PAGE_KEYS: i64 = 500;
/// How often a list begins anew because etcd was compacted between two pages.
const LIST_ATTEMPTS: usize = 5;

/// A client of an etcd cluster. Clones share it.
#[derive(Clone, Debug)]
pub struct Etcd {
    endpoints: Arc<Endpoints>,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key. What is not UTF-8 in it is replaced.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision of the cluster in which the key was created, the last time.
    pub create_revision: i64,
    /// The revision of the cluster in which the value was set.
    pub mod_revision: i64,
    /// The lease the key lives as long as, if it has one.
    pub lease: Option<LeaseId>,
}

/// The number of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseId(i64);

/// All keys below a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The cluster's revision at which the list is exact.
    pub revision: i64,
    /// The keys, ascending.
    pub entries: Vec<KeyValue>,
}

impl From<&etcd_client::KeyValue> for KeyValue {
    fn from(found: &etcd_client::KeyValue) -> Self {
        Self {
            key: String::from_utf8_lossy(found.key()).into_owned(),
            value: found.value().to_owned(),
            create_revision: found.create_revision(),
            mod_revision: found.mod_revision(),
            lease: (found.lease() != 0).then_some(LeaseId(found.lease())),
        }
    }
}

impl Etcd {
    /// Reads the files that `config` names. Nobody is asked yet.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be read.
    pub fn new(config: &EtcdConfig) -> Result<Self, EtcdSetupError> {
        let endpoints = Endpoints::new(config.endpoints.clone(), config.login()?, config.tls()?);
        Ok(Self { endpoints: Arc::new(endpoints) })
    }

    /// Returns a key as it stands, or `None` if there is none.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, EtcdError> {
        let get =
            |client: etcd_client::Client| async move { client.kv_client().get(key, None).await };
        let answer = self.endpoints.call("get", get).await?;
        Ok(answer.kvs().first().map(KeyValue::from))
    }

    /// Returns all keys that begin with `prefix`, as they stood at one moment.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn list(&self, prefix: &str) -> Result<Listing, EtcdError> {
        let mut attempt = 1;
        loop {
            match self.list_once(prefix).await {
                // So it is said that the revision of the first page is no longer kept.
                Err(error)
                    if attempt < LIST_ATTEMPTS
                        && error.is_refusal(code::OUT_OF_RANGE, "compacted") =>
                {
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    async fn list_once(&self, prefix: &str) -> Result<Listing, EtcdError> {
        let end = prefix_end(prefix.as_bytes());
        let mut listing = Listing { revision: 0, entries: Vec::new() };
        let mut start = prefix.as_bytes().to_owned();
        let mut limit = PAGE_KEYS;
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(limit)
                .with_revision(listing.revision);
            let page = self.endpoints.call("list", |client| {
                let (start, options) = (start.clone(), options.clone());
                async move { client.kv_client().get(start, Some(options)).await }
            });
            let page = match page.await {
                Err(error)
                    if 1 < limit && error.is_refusal(code::OUT_OF_RANGE, "length too large") =>
                {
                    limit = (limit / 2).max(1);
                    continue;
                }
                page => page?,
            };
            if listing.revision == 0 {
                listing.revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            listing.entries.extend(page.kvs().iter().map(KeyValue::from));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    last.key().clone_into(&mut start);
                    start.push(0);
                }
                _ => return Ok(listing),
            }
        }
    }

    /// Sets a key, whatever it was before.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses, for instance because the lease is gone.
    pub async fn put(
        &self,
        key: &str,
        value: &str,
        lease: Option<LeaseId>,
    ) -> Result<(), EtcdError> {
        let put = |client: etcd_client::Client| async move {
            client.kv_client().put(key, value, Some(bound_to(lease))).await
        };
        let outcome = self.endpoints.call("put", put).await;
        outcome.map(drop).map_err(|error| lease_gone(error, lease))
    }

    /// Creates a key if it does not exist, and returns it as it stands now: if its lease is
    /// `lease`, it is the caller's.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers (the key may then have been created, or be created later
    /// as long as the lease lives), or etcd refuses, for instance because the lease is gone.
    pub async fn create(
        &self,
        key: &str,
        value: &str,
        lease: LeaseId,
    ) -> Result<KeyValue, EtcdError> {
        let absent = Compare::create_revision(key, CompareOp::Equal, 0);
        let put = TxnOp::put(key, value, Some(bound_to(Some(lease))));
        // After the put, so that both branches end with the key as it stands.
        let get = TxnOp::get(key, None);
        let txn = Txn::new().when([absent]).and_then([put, get.clone()]).or_else([get]);
        let create = |client: etcd_client::Client| {
            let txn = txn.clone();
            async move {
                let answer = client.kv_client().txn(txn).await?;
                match answer.op_responses().last() {
                    Some(TxnOpResponse::Get(get)) => get.kvs().first().map(KeyValue::from),
                    _ => None,
                }
                .ok_or_else(|| Error::Internal("the answer lacks the key".to_owned()))
            }
        };
        let outcome = self.endpoints.call("create", create).await;
        outcome.map_err(|error| lease_gone(error, Some(lease)))
    }

    /// Deletes a key if it is still the one that was created in that revision; tells whether it
    /// was.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn delete(&self, key: &str, create_revision: i64) -> Result<bool, EtcdError> {
        let same = Compare::create_revision(key, CompareOp::Equal, create_revision);
        self.delete_if(key, same).await
    }

    /// Deletes a key if it is still as it was found; tells whether it was.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn delete_unchanged(&self, found: &KeyValue) -> Result<bool, EtcdError> {
        let key = found.key.as_str();
        let same = Compare::mod_revision(key, CompareOp::Equal, found.mod_revision);
        self.delete_if(key, same).await
    }

    async fn delete_if(&self, key: &str, same: Compare) -> Result<bool, EtcdError> {
        let txn = Txn::new().when([same]).and_then([TxnOp::delete(key, None)]);
        let delete = |client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.kv_client().txn(txn).await }
        };
        Ok(self.endpoints.call("delete", delete).await?.succeeded())
    }

    /// Gets a new lease. Keys bound to it are deleted when it was not kept alive for `ttl`.
    /// Returns it with the time that etcd granted, in whole seconds, 2 s or more.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn grant(&self, ttl: Duration) -> Result<(LeaseId, Duration), EtcdError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        // Granted twice, one of the two runs out by itself.
        let grant = |client: etcd_client::Client| async move {
            client.lease_client().grant(seconds, None).await
        };
        let lease = self.endpoints.call("grant lease", grant).await?;
        Ok((LeaseId(lease.id()), Duration::from_secs(lease.ttl().max(0).cast_unsigned())))
    }

    /// Lets the time of a lease begin anew.
    ///
    /// # Errors
    ///
    /// Fails with [`EtcdError::LeaseGone`] when the lease has run out, and when no endpoint
    /// answers or etcd refuses.
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<(), EtcdError> {
        let keep_alive = |client: etcd_client::Client| async move {
            // The first answer has come when this returns; the stream is not needed for more.
            match client.lease_client().keep_alive(lease.0).await {
                Ok(_) => Ok(true),
                Err(Error::LeaseKeepAliveError(reason)) if reason == "lease not found" => Ok(false),
                Err(error) => Err(error),
            }
        };
        match self.endpoints.call("keep lease alive", keep_alive).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(EtcdError::LeaseGone { lease: lease.0 }),
            Err(error) => Err(lease_gone(error, Some(lease))),
        }
    }

    /// Ends a lease, and deletes the keys bound to it. A lease that is gone is fine.
    ///
    /// # Errors
    ///
    /// Fails when no endpoint answers, or etcd refuses.
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), EtcdError> {
        let revoke = |client: etcd_client::Client| async move {
            client.lease_client().revoke(lease.0).await
        };
        match self.endpoints.call("revoke lease", revoke).await {
            Err(error) if !error.is_refusal(code::NOT_FOUND, "lease not found") => Err(error),
            _ => Ok(()),
        }
    }

    /// Watches all keys that begin with `prefix`. Nobody is asked before [`Watch::next`].
    pub fn watch(&self, prefix: &str) -> Watch {
        Watch::new(self.clone(), prefix.to_owned())
    }
}

fn bound_to(lease: Option<LeaseId>) -> PutOptions {
    PutOptions::new().with_lease(lease.map_or(0, |LeaseId(id)| id))
}

/// The refusal of a request that needed a lease, if that is the reason, as what it means.
fn lease_gone(error: EtcdError, lease: Option<LeaseId>) -> EtcdError {
    match lease {
        Some(LeaseId(lease)) if error.is_refusal(code::NOT_FOUND, "lease not found") => {
            EtcdError::LeaseGone { lease }
        }
        _ => error,
    }
}

/// The first key after all that begin with `prefix`; `\0`, which etcd takes as no end, if there
/// is none.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_key_that_does_not_begin_with_it() {
        for (prefix, end) in [
            (&b"/service/demo/"[..], &b"/service/demo0"[..]),
            (b"a\xff", b"b"),
            (b"\xff\xff", b"\0"),
            (b"", b"\0"),
        ] {
            assert_eq!(prefix_end(prefix), end, "{prefix:?}");
        }
    }
}
