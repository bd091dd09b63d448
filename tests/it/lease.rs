//! Replicas that share groups: killed, stopped past their lease, and come back.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use harness::{EtcdCluster, directory, etcd_is_missing, eventually};
use rustix::process::{Pid, Signal, kill_process};
use shared::lease::{BootInstant, Identity, Leadership};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::etcd::client;

const TTL: Duration = Duration::from_secs(4);
/// What taking over may take beyond the lease's time: etcd looks for expired leases twice a
/// second, and the machine is busy.
const TAKE_OVER_SLACK: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(30);

/// A replica in a process of its own. Dropping it kills it.
#[derive(Debug)]
struct Replica {
    name: &'static str,
    process: Child,
    output: PathBuf,
}

/// One look at a claim that was valid: the time before and after it, in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Look {
    before: u128,
    after: u128,
    group: u32,
}

impl Replica {
    fn start(cluster: &EtcdCluster, directory: &TempDir, name: &'static str, groups: u32) -> Self {
        // target/debug/deps/it-… → target/debug/lease-holder
        let test = env::current_exe().unwrap();
        let binary = test.parent().unwrap().parent().unwrap().join("lease-holder");
        let output = directory.path().join(name);
        let log = directory.path().join(format!("{name}.log"));
        let process = Command::new(binary)
            .args(["--endpoints", &cluster.endpoints().join(","), "--replica", name])
            .args(["--groups", &groups.to_string(), "--ttl", &TTL.as_secs().to_string()])
            .stdin(Stdio::null())
            .stdout(File::create(&output).unwrap())
            .stderr(File::create(log).unwrap())
            .spawn()
            .unwrap();
        Self { name, process, output }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Every look so far at which a claim was valid.
    fn looks(&self) -> Vec<Look> {
        let text = fs::read_to_string(&self.output).unwrap();
        // The last line may be under way.
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let look = |line: &str| {
            let mut fields = line.split(' ');
            let mut next = || fields.next().unwrap();
            let (before, after) = (next().parse().unwrap(), next().parse().unwrap());
            Look { before, after, group: next().parse().unwrap() }
        };
        complete.lines().map(look).collect()
    }

    /// The groups it could act on since that moment.
    fn groups_since(&self, since: BootInstant) -> BTreeSet<u32> {
        let since = since.since_boot().as_nanos();
        self.looks().iter().filter(|it| since < it.before).map(|it| it.group).collect()
    }

    /// The groups it can act on now.
    async fn groups(&self) -> BTreeSet<u32> {
        let since = BootInstant::now();
        sleep(Duration::from_millis(300)).await;
        self.groups_since(since)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Panics if two replicas had a valid claim on one group at one moment: where the holder changes,
/// the old one's last look must not have begun after the new one's first had ended.
fn assert_never_two(replicas: &[&Replica]) {
    let mut looks: BTreeMap<u32, Vec<(Look, &str)>> = BTreeMap::new();
    for replica in replicas {
        for look in replica.looks() {
            looks.entry(look.group).or_default().push((look, replica.name));
        }
    }
    for (group, mut looks) in looks {
        looks.sort_by_key(|(look, _)| look.before);
        let mut terms: Vec<(&str, Look, Look)> = Vec::new();
        for (look, name) in looks {
            match terms.last_mut() {
                Some((holder, _, last)) if *holder == name => *last = look,
                _ => terms.push((name, look, look)),
            }
        }
        // Overlapping claims show as terms that alternate with each look.
        let names: Vec<_> = terms.iter().map(|(name, ..)| *name).collect();
        assert!(terms.len() <= 6, "group {group} went back and forth: {names:?}");
        for pair in terms.windows(2) {
            let ((_, _, last), (_, first, _)) = (pair[0], pair[1]);
            assert!(last.before <= first.after, "group {group} had two holders: {pair:?}");
        }
    }
}

async fn all_hold(replicas: &[&Replica], counts: &[usize]) -> bool {
    let mut found = Vec::new();
    for replica in replicas {
        found.push(replica.groups().await.len());
    }
    found == counts
}

#[tokio::test]
async fn a_killed_replicas_groups_are_taken_over_within_its_lease() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let directory = directory();
    let mut one = Replica::start(&cluster, &directory, "one", 3);
    eventually("one has all", LIMIT, async || all_hold(&[&one], &[3]).await).await;
    let two = Replica::start(&cluster, &directory, "two", 3);
    // Handed over in order: no lease runs out for that.
    eventually("they share", TTL, async || all_hold(&[&one, &two], &[2, 1]).await).await;
    let keys = cluster.etcdctl(&["get", "--prefix", "/pgmesh/tests/lease/lease-holder/"]).await;
    assert!(keys.stdout.contains("one") && keys.stdout.contains("two"), "{keys}");

    let killed_at = Instant::now();
    one.process.kill().unwrap();
    eventually("two has all", TTL + TAKE_OVER_SLACK, async || two.groups().await.len() == 3).await;
    let took = killed_at.elapsed();
    assert!(Duration::from_secs(1) < took, "not before the lease is over: {took:?}");
    assert_never_two(&[&one, &two]);
}

/// The process is stopped for longer than its lease, so that another has its groups when it goes
/// on. It must not believe in its claims for a moment.
#[tokio::test]
async fn a_replica_that_was_stopped_past_its_lease_knows_before_it_acts() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let directory = directory();
    let one = Replica::start(&cluster, &directory, "one", 4);
    eventually("one has all", LIMIT, async || all_hold(&[&one], &[4]).await).await;
    let two = Replica::start(&cluster, &directory, "two", 4);
    eventually("they share", LIMIT, async || all_hold(&[&one, &two], &[2, 2]).await).await;
    let before = one.groups().await;

    for _ in 0..2 {
        one.signal(Signal::STOP);
        let limit = TTL + TAKE_OVER_SLACK;
        eventually("two has all", limit, async || two.groups().await.len() == 4).await;
        let woken_at = BootInstant::now();
        one.signal(Signal::CONT);
        eventually("they share again", LIMIT, async || all_hold(&[&one, &two], &[2, 2]).await)
            .await;
        assert!(!one.groups_since(woken_at).is_empty());
    }
    assert_never_two(&[&one, &two]);
    assert_eq!(before.len(), 2);
}

#[tokio::test]
async fn a_replica_that_ends_in_order_leaves_nothing_behind() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let directory = directory();
    let mut one = Replica::start(&cluster, &directory, "one", 2);
    eventually("one has all", LIMIT, async || all_hold(&[&one], &[2]).await).await;
    let two = Replica::start(&cluster, &directory, "two", 2);
    eventually("they share", LIMIT, async || all_hold(&[&one, &two], &[1, 1]).await).await;
    let stopped_at = Instant::now();
    one.signal(Signal::TERM);
    eventually("two has all", LIMIT, async || two.groups().await.len() == 2).await;
    let took = stopped_at.elapsed();
    assert!(took < TTL, "it is not waited for: {took:?}");
    assert!(one.process.wait().unwrap().success());
    let keys = cluster.etcdctl(&["get", "--prefix", "--keys-only", "/pgmesh/"]).await;
    assert!(!keys.stdout.contains("/one"), "{keys}");
    assert_never_two(&[&one, &two]);
}

/// With etcd frozen nobody can renew, and nobody may go on for longer than its lease.
#[tokio::test]
async fn claims_run_out_while_etcd_is_silent_and_come_back_with_it() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let directory = directory();
    let one = Replica::start(&cluster, &directory, "one", 2);
    eventually("one has all", LIMIT, async || all_hold(&[&one], &[2]).await).await;
    let frozen_at = BootInstant::now().since_boot();
    cluster.sigstop(0);
    eventually("its claims are over", TTL + TTL, async || one.groups().await.is_empty()).await;
    let last = one.looks().last().unwrap().after;
    assert!(last < (frozen_at + TTL).as_nanos(), "within the lease");
    cluster.sigcont(0);
    eventually("one has all again", LIMIT, async || all_hold(&[&one], &[2]).await).await;
}

/// What a snapshot says of leases was true once. Nobody may act on it while another may still believe
/// in what came after.
#[tokio::test]
async fn groups_are_shared_out_anew_where_etcd_was_restored_or_emptied() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(1).await;
    let directory = directory();
    let one = Replica::start(&cluster, &directory, "one", 4);
    eventually("one has all", LIMIT, async || all_hold(&[&one], &[4]).await).await;
    let snapshot = cluster.snapshot().await;
    let two = Replica::start(&cluster, &directory, "two", 4);
    let share = async |what| {
        eventually(what, LIMIT, async || all_hold(&[&one, &two], &[2, 2]).await).await;
    };
    share("they share").await;
    for (what, snapshot) in [("restored", Some(&snapshot)), ("emptied", None)] {
        let replaced_at = BootInstant::now().since_boot();
        cluster.begin_with(snapshot).await;
        eventually("nobody has any", TTL + TTL, async || all_hold(&[&one, &two], &[0, 0]).await)
            .await;
        share(what).await;
        // Before this, somebody may still have believed in a claim from before.
        let first = |it: &Replica| {
            let later = it.looks().into_iter().rev();
            let back = later.map(|it| it.before).collect::<Vec<_>>();
            back.windows(2).find(|it| it[0] - it[1] > TTL.as_nanos() / 2).map(|it| it[0])
        };
        for replica in [&one, &two] {
            let first = first(replica).expect("it began anew");
            assert!((replaced_at + TTL).as_nanos() <= first, "{what}: {}", replica.name);
        }
    }
    assert_never_two(&[&one, &two]);
}

#[tokio::test]
async fn one_replica_leads_and_stays_leader() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start(1).await;
    let leadership = |replica: &str| {
        let [cluster_name, agent, replica] = ["tests", "agent", replica].map(str::to_owned);
        let identity = Identity { cluster: cluster_name, agent, replica };
        Leadership::new(Some(client(cluster.endpoints())), identity, TTL)
    };
    let (z, z_task) = leadership("z");
    let (a, a_task) = leadership("a");
    let (z_stop, a_stop) = (CancellationToken::new(), CancellationToken::new());
    let look = async {
        eventually("z leads", LIMIT, async || z.claim().is_some()).await;
        let a_runs = async {
            sleep(TTL).await;
            assert!(z.claim().is_some() && a.claim().is_none(), "z stays leader");
            let claim = z.claim().unwrap();
            z_stop.cancel();
            // The claim is kept for a moment, as work under way would.
            sleep(Duration::from_millis(300)).await;
            assert!(claim.is_valid() && a.claim().is_none(), "work under way may end");
            drop(claim);
            eventually("a leads", TTL, async || a.claim().is_some()).await;
            a_stop.cancel();
        };
        let (ran, ()) = tokio::join!(a_task.run(a_stop.clone()), a_runs);
        ran.unwrap();
    };
    let (ran, ()) = tokio::join!(z_task.run(z_stop.clone()), look);
    ran.unwrap();
    let keys = cluster.etcdctl(&["get", "--prefix", "--keys-only", "/pgmesh/"]).await;
    assert_eq!(keys.stdout.trim(), "", "nothing is left");
}
