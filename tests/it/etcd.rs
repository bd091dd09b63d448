//! The etcd client against real members that are killed and frozen.

use std::collections::BTreeMap;
use std::time::Duration;

use harness::{EtcdCluster, etcd_is_missing, eventually};
use shared::etcd::{Change, Etcd, EtcdConfig, EtcdError, KeyValue, Watch};
use tokio::time::{Instant, timeout};

/// What one frozen endpoint may cost, once, and a little more.
const FROZEN_LIMIT: Duration = Duration::from_millis(2500);
/// Longest wait for what should follow within seconds.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn client(endpoints: Vec<String>) -> Etcd {
    let config = EtcdConfig {
        endpoints,
        user: None,
        password_file: None,
        ca_file: None,
        certificate_file: None,
        key_file: None,
    };
    Etcd::new(&config).unwrap()
}

/// What a watch has told so far, and how often it had to begin anew.
#[derive(Debug, Default)]
struct Seen {
    keys: BTreeMap<String, String>,
    /// Each put and deletion, in order: `key=value`, `key`.
    events: Vec<String>,
    lists: usize,
    errors: usize,
}

impl Seen {
    fn take(&mut self, change: Change) {
        let text = |entry: &KeyValue| String::from_utf8(entry.value.clone()).unwrap();
        match change {
            Change::All { entries, .. } => {
                self.lists += 1;
                self.keys = entries.iter().map(|it| (it.key.clone(), text(it))).collect();
            }
            Change::Put(entry) => {
                self.events.push(format!("{}={}", entry.key, text(&entry)));
                self.keys.insert(entry.key.clone(), text(&entry));
            }
            Change::Deleted { key, .. } => {
                self.keys.remove(&key);
                self.events.push(key);
            }
        }
    }

    /// Follows the watch until `done`.
    async fn until(&mut self, watch: &mut Watch, what: &str, done: impl Fn(&Self) -> bool) {
        let followed = timeout(LIMIT, async {
            while !done(self) {
                match watch.next().await {
                    Ok(change) => self.take(change),
                    Err(_) => self.errors += 1,
                }
            }
        });
        let is_in_time = followed.await.is_ok();
        assert!(is_in_time, "not within {LIMIT:?}: {what}\n{self:#?}");
    }
}

#[tokio::test]
async fn requests_do_what_they_say_and_may_be_repeated() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    assert_eq!(etcd.get("/t/none").await.unwrap(), None);

    let (lease, ttl) = etcd.grant(Duration::from_secs(30)).await.unwrap();
    let (other, _) = etcd.grant(Duration::from_secs(30)).await.unwrap();
    assert_eq!(ttl, Duration::from_secs(30));
    let first = etcd.create("/t/a", "me", lease).await.unwrap();
    assert_eq!((first.lease, first.value.as_slice()), (Some(lease), &b"me"[..]));
    assert_eq!(etcd.create("/t/a", "me", lease).await.unwrap(), first, "twice is once");
    assert_eq!(etcd.create("/t/a", "you", other).await.unwrap(), first, "it is taken");

    assert!(!etcd.delete("/t/a", first.create_revision - 1).await.unwrap());
    assert!(etcd.delete("/t/a", first.create_revision).await.unwrap());
    let second = etcd.create("/t/a", "you", other).await.unwrap();
    assert_eq!(second.lease, Some(other));
    assert!(!etcd.delete("/t/a", first.create_revision).await.unwrap(), "it is another's now");

    etcd.keep_alive(lease).await.unwrap();
    etcd.put("/t/b", "bound", Some(lease)).await.unwrap();
    etcd.revoke(lease).await.unwrap();
    etcd.revoke(lease).await.unwrap();
    assert_eq!(etcd.get("/t/b").await.unwrap(), None, "it went with its lease");
    assert!(matches!(etcd.keep_alive(lease).await, Err(EtcdError::LeaseGone { .. })));
    assert!(matches!(etcd.create("/t/c", "me", lease).await, Err(EtcdError::LeaseGone { .. })));
    let put = etcd.put("/t/c", "me", Some(lease)).await;
    assert!(matches!(put, Err(EtcdError::LeaseGone { .. })));
}

/// An answer of etcd may have 4 MiB.
#[tokio::test]
async fn a_list_is_read_in_pages_and_is_exact() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    let large = "x".repeat(1 << 20);
    for number in 0..6 {
        etcd.put(&format!("/large/{number}"), &large, None).await.unwrap();
    }
    for number in 0..1100 {
        etcd.put(&format!("/many/{number:04}"), "x", None).await.unwrap();
    }
    let listed = etcd.list("/large/").await.unwrap();
    assert_eq!(listed.entries.len(), 6);
    assert!(listed.entries.iter().all(|it| it.value.len() == large.len()));
    let listed = etcd.list("/many/").await.unwrap();
    assert_eq!(listed.entries.len(), 1100);
    assert!(listed.entries.is_sorted_by(|one, other| one.key < other.key));
    assert_eq!(etcd.list("/none/").await.unwrap().entries, []);
}

#[tokio::test]
async fn a_killed_and_a_frozen_endpoint_cost_little_and_once() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(3).await;
    // A majority must go on: the one that is frozen is asked first, the one that is killed next.
    let leader = cluster.leader().await;
    let (frozen, killed) = ((leader + 1) % 3, (leader + 2) % 3);
    let endpoints = cluster.endpoints();
    let order = [frozen, killed, leader].map(|index| endpoints[index].clone());
    let etcd = client(order.to_vec());
    etcd.put("/t/k", "0", None).await.unwrap();

    cluster.sigstop(frozen);
    let began_at = Instant::now();
    etcd.put("/t/k", "1", None).await.unwrap();
    let first = began_at.elapsed();
    assert!(first < FROZEN_LIMIT, "the first put took {first:?}");
    let mut longest = Duration::ZERO;
    for number in 2..200 {
        let began_at = Instant::now();
        etcd.put("/t/k", &number.to_string(), None).await.unwrap();
        let read = etcd.get("/t/k").await.unwrap().unwrap();
        assert_eq!(read.value, number.to_string().into_bytes());
        longest = longest.max(began_at.elapsed());
    }
    assert!(longest < Duration::from_secs(1), "a frozen endpoint is not asked again: {longest:?}");

    cluster.sigcont(frozen);
    cluster.serves().await;
    cluster.kill9(killed).await;
    let began_at = Instant::now();
    etcd.put("/t/k", "last", None).await.unwrap();
    let other = began_at.elapsed();
    assert!(other < FROZEN_LIMIT, "with one killed a put took {other:?}");
}

/// The hardest case: the leader freezes, so that the others must elect one meanwhile.
#[tokio::test]
async fn a_frozen_leader_is_passed_over_within_the_limit_of_one_request() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(3).await;
    let leader = cluster.leader().await;
    let mut endpoints = cluster.endpoints();
    endpoints.rotate_left(leader);
    let etcd = client(endpoints);
    etcd.put("/t/k", "0", None).await.unwrap();
    cluster.sigstop(leader);
    let began_at = Instant::now();
    let outcome = etcd.put("/t/k", "1", None).await;
    assert!(outcome.is_ok(), "{outcome:?} after {:?}", began_at.elapsed());
}

#[tokio::test]
async fn without_any_endpoint_a_request_fails_within_its_limit_and_says_who_was_asked() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    cluster.sigstop(0);
    let began_at = Instant::now();
    let error = etcd.get("/t/k").await.unwrap_err();
    assert!(began_at.elapsed() < Duration::from_secs(6), "{:?}", began_at.elapsed());
    assert!(error.is_transient());
    let expected = format!("get: no etcd endpoint answers: {}: ", cluster.endpoints()[0]);
    assert!(error.to_string().starts_with(&expected), "{error}");
    cluster.sigcont(0);
    eventually("it answers again", LIMIT, async || etcd.get("/t/k").await.is_ok()).await;
}

#[tokio::test]
async fn a_watch_misses_nothing_when_its_endpoint_is_killed_or_frozen() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(3).await;
    // The watch is at the first endpoint; the writer uses another client.
    let first = (cluster.leader().await + 1) % 3;
    let mut endpoints = cluster.endpoints();
    endpoints.rotate_left(first);
    let writer = client(endpoints.iter().rev().cloned().collect());
    let mut watch = client(endpoints).watch("/t/");
    let mut seen = Seen::default();
    let mut expected = Vec::new();
    seen.until(&mut watch, "the list", |seen| seen.lists == 1).await;

    for (round, fault) in ["none", "killed", "frozen"].into_iter().enumerate() {
        match fault {
            "killed" => cluster.kill9(first).await,
            "frozen" => {
                cluster.start_member(first);
                cluster.serves().await;
                // Where the watch is now is not known, so each of the other two is frozen in turn.
                cluster.sigstop((first + 1) % 3);
            }
            _ => {}
        }
        for number in 0..50 {
            let (key, value) = (format!("/t/{number}"), format!("{round}"));
            writer.put(&key, &value, None).await.unwrap();
            expected.push(format!("{key}={value}"));
        }
        let newest = round.to_string();
        let has_all = |seen: &Seen| seen.keys.values().filter(|it| **it == newest).count() == 50;
        seen.until(&mut watch, fault, has_all).await;
    }
    cluster.sigcont((first + 1) % 3);
    cluster.serves().await;
    cluster.sigstop((first + 2) % 3);
    writer.put("/t/last", "x", None).await.unwrap();
    seen.until(&mut watch, "the last", |seen| seen.keys.contains_key("/t/last")).await;
    let told = |event: &String| seen.events.contains(event);
    assert!(expected[..50].iter().all(told), "{seen:#?}");
    let (key, expected) =
        ("/t/last".to_owned(), (0..50).map(|it| (format!("/t/{it}"), "2".to_owned())));
    let expected: BTreeMap<_, _> = expected.chain([(key, "x".to_owned())]).collect();
    assert_eq!(seen.keys, expected);
}

#[tokio::test]
async fn a_watch_begins_anew_with_the_list_where_etcd_was_compacted() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    for key in ["/t/stays", "/t/goes"] {
        etcd.put(key, "old", None).await.unwrap();
    }
    let mut watch = etcd.watch("/t/");
    let mut seen = Seen::default();
    seen.until(&mut watch, "the list", |seen| seen.lists == 1).await;
    etcd.put("/t/stays", "seen", None).await.unwrap();
    seen.until(&mut watch, "an event", |seen| seen.events.len() == 1).await;

    // The watch is not polled meanwhile, and its connection breaks.
    let goes = etcd.get("/t/goes").await.unwrap().unwrap();
    etcd.delete("/t/goes", goes.create_revision).await.unwrap();
    etcd.put("/t/stays", "new", None).await.unwrap();
    etcd.put("/t/came", "new", None).await.unwrap();
    let revision = etcd.list("/t/").await.unwrap().revision.to_string();
    cluster.etcdctl(&["compact", &revision]).await;
    cluster.kill9(0).await;
    cluster.start_member(0);
    cluster.serves().await;

    let came = |seen: &Seen| seen.keys.contains_key("/t/came");
    seen.until(&mut watch, "what came meanwhile", came).await;
    let expected = [("/t/came", "new"), ("/t/stays", "new")];
    let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(seen.keys, BTreeMap::from(expected));
    etcd.put("/t/after", "x", None).await.unwrap();
    seen.until(&mut watch, "it goes on", |seen| seen.keys.contains_key("/t/after")).await;
}

/// The members are the same, and so is the cluster's id. Only what is there tells that it is not what
/// was there.
#[tokio::test]
async fn a_watch_does_not_keep_what_another_store_never_had() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    etcd.put("/t/first", "x", None).await.unwrap();
    let snapshot = cluster.snapshot().await;
    for number in 0..20 {
        etcd.put(&format!("/t/{number}"), "x", None).await.unwrap();
    }
    let mut watch = etcd.watch("/t/");
    let mut seen = Seen::default();
    seen.until(&mut watch, "the list", |seen| seen.keys.len() == 21).await;
    let keys = |seen: &Seen| seen.keys.keys().cloned().collect::<Vec<_>>();

    cluster.begin_with(Some(&snapshot)).await;
    seen.until(&mut watch, "it was restored", |seen| keys(seen) == ["/t/first"]).await;
    etcd.put("/t/new", "x", None).await.unwrap();
    seen.until(&mut watch, "it goes on", |seen| keys(seen) == ["/t/first", "/t/new"]).await;

    cluster.begin_with(None).await;
    seen.until(&mut watch, "it was emptied", |seen| seen.keys.is_empty()).await;
    // More than it ever had, before anybody looks.
    etcd.put("/t/gone", "x", None).await.unwrap();
    seen.until(&mut watch, "it goes on", |seen| keys(seen) == ["/t/gone"]).await;
    cluster.begin_with(None).await;
    for number in 0..50 {
        etcd.put(&format!("/t/{}", number % 2), "x", None).await.unwrap();
    }
    seen.until(&mut watch, "it is larger", |seen| keys(seen) == ["/t/0", "/t/1"]).await;
}

/// A watch that hears nothing, because nothing happens, is not taken for broken: etcd takes only
/// so many pings.
#[tokio::test]
async fn a_quiet_watch_stays_open() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    let mut watch = etcd.watch("/t/");
    let mut seen = Seen::default();
    seen.until(&mut watch, "the list", |seen| seen.lists == 1).await;
    let quiet = timeout(Duration::from_secs(15), watch.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    etcd.put("/t/k", "x", None).await.unwrap();
    seen.until(&mut watch, "an event", |seen| seen.events.len() == 1).await;
    assert_eq!((seen.lists, seen.errors), (1, 0));
}

/// Whoever waits for other things too gives the watch up again and again, at any step of its
/// beginning. It goes on where it was: each new list would hide what happened since the one before.
#[tokio::test]
async fn a_watch_that_is_given_up_and_asked_again_goes_on_where_it_was() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let etcd = client(cluster.endpoints());
    etcd.put("/t/k", "x", None).await.unwrap();
    let mut watch = etcd.watch("/t/");
    let mut seen = Seen::default();
    let mut given_up = 0;
    let followed = timeout(LIMIT, async {
        while seen.events.is_empty() {
            match timeout(Duration::from_micros(100), watch.next()).await {
                Ok(change) => {
                    seen.take(change.unwrap());
                    etcd.put("/t/k", "y", None).await.unwrap();
                }
                Err(_) => given_up += 1,
            }
        }
    });
    followed.await.unwrap();
    assert!(0 < given_up);
    assert_eq!((seen.lists, seen.events.as_slice()), (1, &["/t/k=y".to_owned()][..]));
}
