//! What replicas and operators share, in etcd: what is asked for, and what was moved. Without etcd there
//! is one replica, which has it in its memory.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use humantime::format_duration;
use serde::de::DeserializeOwned;
use shared::activity::{DRAIN, rebalancing};
use shared::etcd::{Etcd, EtcdError, KeyValue};
use shared::lease;
use shared::telemetry::chain;
use thiserror::Error;
use tokio::time::timeout;

use crate::commands::AGENT;
use crate::control::{Control, Request};
use crate::known::{Known, Unknown};
use crate::ledger::{Entry, Ledger, kept_for};

/// The endpoints of etcd are tried one after the other.
const LIMIT: Duration = Duration::from_secs(15);

const PAUSE: &str = "request/pause";
const MOVE: &str = "request/move/";
/// When somebody last resumed.
const RESUMED: &str = "request/resumed";
const MOVED: &str = "moved/";

/// Why something was not written down.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// etcd does not take it.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// It has no form in which it can be kept.
    #[error("write it as JSON")]
    Json(#[from] serde_json::Error),
}

/// What is shared.
#[derive(Debug)]
pub struct Memory {
    /// Where, and below which key.
    etcd: Option<(Etcd, String)>,
    cluster: String,
    /// In this process, without etcd.
    local: Mutex<(Control, Ledger)>,
}

impl Memory {
    /// Of a cluster, in etcd.
    pub fn in_etcd(etcd: Etcd, cluster: &str) -> Self {
        let root = rebalancing(cluster);
        Self { etcd: Some((etcd, root)), cluster: cluster.to_owned(), local: Mutex::default() }
    }

    /// Of this process alone.
    pub fn of_process(control: Control) -> Self {
        Self { etcd: None, cluster: String::new(), local: Mutex::new((control, Ledger::default())) }
    }

    /// Whether others see it.
    pub fn is_shared(&self) -> bool {
        self.etcd.is_some()
    }

    fn local(&self) -> MutexGuard<'_, (Control, Ledger)> {
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is asked for, and what was moved.
    pub async fn read(&self) -> (Known<Control>, Known<Ledger>) {
        let Some((etcd, root)) = &self.etcd else {
            let (control, ledger) = self.local().clone();
            return (Ok(control), Ok(ledger));
        };
        match timeout(LIMIT, Box::pin(etcd.list(root))).await {
            Err(_) => {
                let why =
                    Unknown(format!("etcd does not answer within {}", format_duration(LIMIT)));
                (Err(why.clone()), Err(why))
            }
            Ok(Ok(listing)) => (control(root, &listing.entries), ledger(root, &listing.entries)),
            Ok(Err(error)) => {
                let why = Unknown::because(chain(&error));
                (Err(why.clone()), Err(why))
            }
        }
    }

    /// Takes up a request.
    ///
    /// # Errors
    ///
    /// etcd does not take it.
    pub async fn ask(&self, request: Request) -> Result<(), MemoryError> {
        let Some((etcd, root)) = &self.etcd else {
            let mut local = self.local();
            if request == Request::Resume {
                local.1 = std::mem::take(&mut local.1).resumed(Some(Utc::now()));
            }
            local.0 = std::mem::take(&mut local.0).with(request);
            return Ok(());
        };
        let put = async |key: String, value: String| Box::pin(etcd.put(&key, &value, None)).await;
        let delete = async |key: String| match Box::pin(etcd.get(&key)).await? {
            Some(found) => Box::pin(etcd.delete_unchanged(&found)).await.map(drop),
            None => Ok(()),
        };
        match request {
            Request::Pause(pause) => {
                put(format!("{root}{PAUSE}"), serde_json::to_string(&pause)?).await?;
            }
            Request::Resume => {
                put(format!("{root}{RESUMED}"), serde_json::to_string(&Utc::now())?).await?;
                delete(format!("{root}{PAUSE}")).await?;
            }
            Request::Drain { group } => put(format!("{root}{DRAIN}{group}"), "{}".into()).await?,
            Request::Undrain { group } => delete(format!("{root}{DRAIN}{group}")).await?,
            Request::Move { shard, to } => {
                put(format!("{root}{MOVE}{shard}"), to.to_string()).await?;
            }
            Request::Drop { shard } => delete(format!("{root}{MOVE}{shard}")).await?,
        }
        Ok(())
    }

    /// Forgets that a shard is wanted on a group, because it is there; not if it is wanted elsewhere by now.
    ///
    /// # Errors
    ///
    /// etcd does not take it.
    pub async fn settle(&self, shard: i64, to: u32) -> Result<(), MemoryError> {
        let Some((etcd, root)) = &self.etcd else {
            self.local().0.moves.retain(|it, wanted| (*it, *wanted) != (shard, to));
            return Ok(());
        };
        let found = Box::pin(etcd.get(&format!("{root}{MOVE}{shard}"))).await?;
        if let Some(found) = found.filter(|it| it.value == to.to_string().as_bytes()) {
            Box::pin(etcd.delete_unchanged(&found)).await?;
        }
        Ok(())
    }

    /// Which replica leads; `None` if none does. One that only looks never does.
    ///
    /// # Errors
    ///
    /// etcd does not answer.
    pub async fn leader(&self) -> Result<Option<String>, MemoryError> {
        let Some((etcd, _)) = &self.etcd else { return Ok(None) };
        Ok(Box::pin(lease::leader(etcd, &self.cluster, AGENT)).await?)
    }

    /// Writes down a move. etcd forgets it after a day by itself.
    ///
    /// # Errors
    ///
    /// etcd does not take it.
    pub async fn record(&self, entry: &Entry) -> Result<(), MemoryError> {
        let Some((etcd, root)) = &self.etcd else {
            self.local().1.record(entry.clone());
            return Ok(());
        };
        let at = entry.at.to_rfc3339_opts(SecondsFormat::Micros, true);
        let key = format!("{root}{MOVED}{at}-{}", entry.shard);
        let (lease, _) = Box::pin(etcd.grant(kept_for())).await?;
        let value = serde_json::to_string(entry)?;
        Ok(Box::pin(etcd.put(&key, &value, Some(lease))).await?)
    }
}

/// The keys that begin so, without that, and what stands there.
fn below(entries: &[KeyValue], prefix: String) -> impl Iterator<Item = (&str, &KeyValue)> {
    entries.iter().filter_map(move |it| Some((it.key.strip_prefix(&prefix)?, it)))
}

fn parse<T: DeserializeOwned>(entry: &KeyValue) -> Known<T> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| Unknown(format!("{} cannot be read: {error}", entry.key)))
}

fn control(root: &str, entries: &[KeyValue]) -> Known<Control> {
    let mut control = Control::default();
    let wrong = |entry: &KeyValue| Unknown(format!("{} ends with no number", entry.key));
    for (_, entry) in below(entries, format!("{root}{PAUSE}")) {
        control = control.with(Request::Pause(parse(entry)?));
    }
    for (group, entry) in below(entries, format!("{root}{DRAIN}")) {
        let group = group.parse().map_err(|_| wrong(entry))?;
        control = control.with(Request::Drain { group });
    }
    for (shard, entry) in below(entries, format!("{root}{MOVE}")) {
        let shard = shard.parse().map_err(|_| wrong(entry))?;
        control = control.with(Request::Move { shard, to: parse(entry)? });
    }
    Ok(control)
}

fn ledger(root: &str, entries: &[KeyValue]) -> Known<Ledger> {
    let moved = below(entries, format!("{root}{MOVED}"));
    let mut resumed = below(entries, format!("{root}{RESUMED}"));
    let resumed_at = resumed.next().map(|(_, entry)| parse(entry)).transpose()?;
    Ok(Ledger::new(moved.map(|(_, entry)| parse(entry)).collect::<Known<_>>()?).resumed(resumed_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/pgmesh/demo/rebalance/";

    fn entry(key: &str, value: &str) -> KeyValue {
        KeyValue {
            key: format!("{ROOT}{key}"),
            value: value.as_bytes().to_owned(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        }
    }

    #[test]
    fn keys_are_read_as_what_is_asked_for() {
        let entries = [
            entry("moved/2026-03-10T02:00:00.000000Z-102", "{}"),
            entry("request/drain/2", "{}"),
            entry("request/move/102", "3"),
            entry(
                "request/pause",
                r#"{"since": "2026-03-10T01:00:00Z", "until": null, "comment": "an upgrade"}"#,
            ),
        ];
        let found = control(ROOT, &entries).unwrap();
        assert_eq!((found.drains, found.moves), ([2].into(), [(102, 3)].into()));
        assert_eq!(found.pause.unwrap().comment, "an upgrade");
        for (key, value, expected) in [
            ("request/pause", "yes", "/request/pause cannot be read: "),
            ("request/drain/w2", "{}", "/request/drain/w2 ends with no number"),
            ("request/move/102", "w2", "/request/move/102 cannot be read: "),
        ] {
            let why = control(ROOT, &[entry(key, value)]).unwrap_err().0;
            assert!(why.contains(expected), "{why}");
        }
        let resumed = [entry("request/resumed", "\"2026-03-10T01:00:00Z\"")];
        let expected = Ledger::default().resumed(Some("2026-03-10T01:00:00Z".parse().unwrap()));
        assert_eq!(ledger(ROOT, &resumed), Ok(expected));
        // A move that cannot be read counts for nobody knows how much.
        assert!(
            ledger(ROOT, &entries).unwrap_err().0.contains("-102 cannot be read: missing field")
        );
    }

    #[tokio::test]
    async fn without_etcd_the_process_remembers() {
        let memory = Memory::of_process(Control::default());
        memory.ask(Request::Drain { group: 2 }).await.unwrap();
        memory.ask(Request::Move { shard: 102, to: 3 }).await.unwrap();
        memory.ask(Request::Undrain { group: 2 }).await.unwrap();
        memory.settle(102, 2).await.unwrap();
        let (control, ledger) = memory.read().await;
        let control = control.unwrap();
        assert_eq!((control.drains, control.moves), ([].into(), [(102, 3)].into()));
        assert_eq!(ledger, Ok(Ledger::default()));
        assert!(!memory.is_shared());
    }
}
