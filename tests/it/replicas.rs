//! Replicas of the agent with one configuration and one etcd: each group's WAL is received by one
//! of them at a time, whatever becomes of the other.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use backup_agent::backup::Context;
use backup_agent::config::Config;
use backup_agent::follow::Follower;
use harness::postgres::postgres_is_missing;
use harness::{Agent, Effect, Fault, Refusal};
use harness::{
    EtcdCluster, Finished, Operation, PgServer, RunningAgent, etcd_is_missing, eventually,
};
use serde_json::Value;
use shared::lease::{Identity, Shares, TTL};
use shared::pg::wal::{Segment, WalFile};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_postgres::types::PgLsn;
use tokio_util::sync::CancellationToken;

use crate::outage::admin_address;
use crate::receive::{RECEIVER, WAL, commits, load, objects, reported, stored_up_to};
use crate::scene::{Kind, Scene, write};

const LIMIT: Duration = Duration::from_mins(1);
/// What taking over may take beyond the lease's time: the lease ends, the other one notices, asks
/// the servers, and reads what is stored.
const SLACK: Duration = Duration::from_secs(10);
/// As [`WAL`], and nothing is written to the servers.
const QUIET: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"0s\"\n";

/// What changes the repository.
const WRITES: [Operation; 4] = [
    Operation::PutObject,
    Operation::UploadPart,
    Operation::DeleteObject,
    Operation::DeleteObjects,
];

/// Long enough to be stopped meanwhile.
const HOLD: Effect = Effect::Delay(Duration::from_millis(500));

fn something_is_missing() -> bool {
    postgres_is_missing() || etcd_is_missing()
}

/// The section `[etcd]`.
pub(crate) fn section(etcd: &EtcdCluster) -> String {
    format!("[etcd]\nendpoints = [\"{}\"]\n", etcd.endpoints().join("\", \""))
}

/// The groups that an agent says it is responsible for.
fn held(agent: &RunningAgent) -> BTreeSet<u64> {
    let mut held = BTreeSet::new();
    for line in agent.stdout().lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
        let mut spans = line["spans"].as_array().into_iter().flatten();
        let Some(group) = spans.find_map(|span| span["group"].as_u64()) else { continue };
        match line["message"].as_str() {
            Some("responsible for the group") => held.insert(group),
            Some("not responsible for the group any more") => held.remove(&group),
            _ => false,
        };
    }
    held
}

async fn holds(agent: &RunningAgent, groups: &[u64]) {
    let groups: BTreeSet<_> = groups.iter().copied().collect();
    let what = format!("the agent holds {groups:?}");
    eventually(&what, LIMIT, async || held(agent) == groups).await;
}

async fn receivers(primary: &PgServer) -> String {
    let ask = "SELECT count(*) FROM pg_stat_replication WHERE application_name = ";
    primary.psql(&format!("{ask}'{RECEIVER}'")).await
}

/// Commits a mark, waits until it is stored, and returns the time from `since` to then.
async fn mark(primary: &PgServer, i: u32, since: Instant) -> Duration {
    primary.psql(&format!("INSERT INTO marks VALUES ({i})")).await;
    stored_up_to(primary, primary.current_lsn().await).await;
    since.elapsed()
}

/// Restores a group to the end of its WAL and starts what comes of it. What fetches the WAL needs a
/// configuration of that group.
async fn recover(scene: &Scene, group: &str) -> PgServer {
    let config = scene.path(&format!("group-{group}.toml"));
    let text = fs::read_to_string(scene.config()).unwrap();
    write(&config, &text.replace("[wal]\n", &format!("[wal]\ngroup = {group}\n")));
    let to = scene.path(&format!("restored-{group}"));
    let mut restore = vec!["restore", "--group", group, "--target-action", "promote"];
    restore.extend(["--archive-mode", "off", "--to", to.to_str().unwrap()]);
    Agent::new(&config).run(&restore).await.assert_success();
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    restored
}

async fn no_gap(scene: &Scene) {
    let listed: Finished = scene.run(&["list", "--wal"]).await;
    listed.assert_success();
    scene.run(&["verify", "--wal"]).await.assert_success();
}

/// Two groups are shared out; when one replica is killed, the other has both within its lease.
#[tokio::test]
async fn groups_are_shared_out_and_taken_over() {
    if something_is_missing() {
        return;
    }
    let etcd = EtcdCluster::start(1).await;
    let worker = PgServer::builder().name("worker").primary().await;
    let node = format!(
        "[[nodes]]\ngroup = 1\nname = \"worker\"\nhost = \"{}\"\nport = {}\n",
        worker.socket_directory().display(),
        worker.port()
    );
    let scene = Scene::streaming(Kind::S3, &format!("{node}{WAL}{}", section(&etcd))).await;
    let one = scene.agent().spawn(&["run"]);
    holds(&one, &[0, 1]).await;
    let servers = [&scene.primary, &worker];
    for (group, server) in ["0", "1"].iter().zip(servers) {
        server.psql("CREATE TABLE marks (i int)").await;
        mark(server, 1, Instant::now()).await;
        scene.run(&["backup", "--group", group]).await.assert_success();
    }

    let two = scene.agent().spawn(&["run"]);
    let shared = async || held(&one).len() == 1 && held(&two).len() == 1;
    eventually("each has one group", LIMIT, shared).await;
    assert!(held(&one).is_disjoint(&held(&two)), "{:?} {:?}", held(&one), held(&two));
    for server in servers {
        mark(server, 2, Instant::now()).await;
        assert_eq!(receivers(server).await, "1");
    }

    let taken = servers[usize::try_from(*held(&one).first().unwrap()).unwrap()];
    let killed_at = Instant::now();
    one.kill9().await;
    load(taken, 50_000).await;
    let took = mark(taken, 3, killed_at).await;
    assert!(took < TTL + SLACK, "it took {took:?}");
    holds(&two, &[0, 1]).await;
    for server in servers {
        mark(server, 4, Instant::now()).await;
        assert_eq!(receivers(server).await, "1");
    }
    no_gap(&scene).await;
    for (group, server) in ["0", "1"].iter().zip(servers) {
        let restored = recover(&scene, group).await;
        assert_eq!(commits(&restored).await, commits(server).await, "group {group}");
    }
}

/// Nobody knows then who may act.
#[tokio::test]
async fn that_etcd_is_away_is_said_and_ends_by_itself() {
    if something_is_missing() {
        return;
    }
    let mut etcd = EtcdCluster::start(1).await;
    let scene = Scene::streaming(Kind::Directory, &format!("{QUIET}{}", section(&etcd))).await;
    let address = admin_address(&scene);
    let get = async |path: &str| {
        let answer = reqwest::get(format!("http://{address}{path}")).await.unwrap();
        answer.text().await.unwrap()
    };
    let has_lease = async || {
        let metrics = get("/metrics").await;
        let line = metrics.lines().find(|it| it.starts_with("pgmesh_backup_has_lease{"));
        line.unwrap().ends_with(" 1.0")
    };
    let mut agent = scene.agent().spawn(&["run"]);
    holds(&agent, &[0]).await;
    assert!(has_lease().await);
    etcd.kill9(0).await;
    agent.logged("etcd grants no lease", LIMIT).await;
    holds(&agent, &[]).await;
    assert!(!has_lease().await);
    let ready = get("/readyz").await;
    assert!(ready.contains("no WAL is received"), "{ready}");
    let status: Value = serde_json::from_str(&get("/status").await).unwrap();
    assert!(status["no_lease_since"].is_string(), "{status}");
    assert_eq!(checked(&scene).await["outcome"], "failed");

    etcd.start_member(0);
    agent.logged("etcd answers again", LIMIT).await;
    holds(&agent, &[0]).await;
    stored_up_to(&scene.primary, scene.primary.current_lsn().await).await;
    assert!(has_lease().await);
    let step = checked(&scene).await;
    assert_eq!(step["outcome"], "ok", "{step}");
    assert!(step["detail"].as_str().unwrap().starts_with("group 0 is held by "), "{step}");
}

/// What `check` says of etcd.
async fn checked(scene: &Scene) -> Value {
    let steps = scene.run(&["check", "--json"]).await.stdout;
    let steps: Vec<Value> = serde_json::from_str(&steps).unwrap();
    steps.into_iter().find(|it| it["step"] == "etcd").unwrap()
}

/// The WAL before `lsn` that a request writes or deletes: pieces by their place, others by their
/// segment.
fn is_before(key: &str, lsn: PgLsn) -> bool {
    const SEGMENT_BYTES: u64 = 16 << 20;
    let name = key.rsplit('/').next().unwrap_or_default();
    let Ok(WalFile::Segment(Segment { number, .. })) =
        WalFile::parse(name.get(..24).unwrap_or_default(), SEGMENT_BYTES)
    else {
        return true;
    };
    let place = name[24..].strip_prefix('.').and_then(|place| place.split('-').next());
    let from = place.map_or(0, |from| u64::from_str_radix(from, 16).unwrap());
    number * SEGMENT_BYTES + from < u64::from(lsn)
}

/// A replica is stopped in the middle of storing, for longer than its lease. The other takes over,
/// although the server still has the stopped one's connection; and when that one goes on, it
/// writes nothing of what it has.
async fn a_stopped_replica_writes_nothing_after_its_lease(fault: Fault) {
    let etcd = EtcdCluster::start(1).await;
    let scene = Scene::streaming(Kind::S3, &format!("{QUIET}{}", section(&etcd))).await;
    let primary = &scene.primary;
    let faults = scene.s3.as_ref().unwrap().faults();
    let mut one = scene.agent().spawn(&["run"]);
    holds(&one, &[0]).await;
    primary.psql("CREATE TABLE marks (i int)").await;
    mark(primary, 1, Instant::now()).await;
    scene.run(&["backup"]).await.assert_success();
    let two = scene.agent().spawn(&["run"]);

    let fault = faults.add(fault);
    load(primary, 30_000).await;
    primary.psql("SELECT pg_switch_wal()").await;
    let under_way = async || faults.hits(fault) > 0;
    eventually("it is at that moment", LIMIT, under_way).await;
    one.sigstop();
    let stopped_at = Instant::now();
    faults.remove(fault);
    let took = mark(primary, 2, stopped_at).await;
    assert!(took < TTL + SLACK, "it took {took:?}");
    assert_eq!(held(&two), BTreeSet::from([0]));
    assert_eq!(receivers(primary).await, "1");

    let lsn = reported(primary).await.unwrap();
    let current = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    eventually("the other one has cleaned up", LIMIT, async || {
        objects(&scene, "/partial/")
            .iter()
            .all(|path| path.display().to_string().contains(&current))
    })
    .await;
    let connection = "SELECT pid FROM pg_stat_replication WHERE application_name = ";
    let connection = format!("{connection}'{RECEIVER}'");
    let others = primary.psql(&connection).await;
    faults.forget_requests();
    one.sigcont();
    one.logged("not responsible for the group any more", LIMIT).await;
    // Whatever it would do, it would have done before this is stored.
    mark(primary, 3, Instant::now()).await;
    let late: Vec<_> = faults
        .record()
        .into_iter()
        .filter(|request| WRITES.contains(&request.operation) && is_before(&request.key, lsn))
        .collect();
    assert!(late.is_empty(), "written after the lease was over: {late:?}");
    assert_eq!(primary.psql(&connection).await, others, "the other one's connection was ended");
    assert_eq!(held(&two), BTreeSet::from([0]));
    no_gap(&scene).await;
    let restored = recover(&scene, "0").await;
    assert_eq!(commits(&restored).await, "1,2,3");
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "30000");
}

/// It waits for an answer.
#[tokio::test]
async fn a_replica_that_was_stopped_while_it_stored_writes_nothing_after_its_lease() {
    if !something_is_missing() {
        let fault = Fault::new(HOLD).on(Operation::PutObject);
        Box::pin(a_stopped_replica_writes_nothing_after_its_lease(fault)).await;
    }
}

/// It reads a complete segment back, and would remove its pieces next.
#[tokio::test]
async fn a_replica_that_was_stopped_while_it_read_back_removes_nothing_after_its_lease() {
    if !something_is_missing() {
        let fault = Fault::new(HOLD).on(Operation::GetObject).key("/wal/");
        Box::pin(a_stopped_replica_writes_nothing_after_its_lease(fault)).await;
    }
}

/// It has removed the pieces of one segment, and would remove those of the next.
#[tokio::test]
async fn a_replica_that_was_stopped_while_it_removed_pieces_removes_no_more_after_its_lease() {
    if !something_is_missing() {
        let fault = Fault::new(HOLD).on(Operation::DeleteObject).on(Operation::DeleteObjects);
        let fault = fault.key("/partial/");
        Box::pin(a_stopped_replica_writes_nothing_after_its_lease(fault)).await;
    }
}

/// It has asked what there is of a segment, and would store it next.
#[tokio::test]
async fn a_replica_that_was_stopped_before_it_stored_writes_nothing_after_its_lease() {
    if !something_is_missing() {
        let fault = Fault::new(HOLD).on(Operation::ListObjects).key("/wal/");
        Box::pin(a_stopped_replica_writes_nothing_after_its_lease(fault)).await;
    }
}

/// It is about to try again.
#[tokio::test]
async fn a_replica_that_was_stopped_between_attempts_writes_nothing_after_its_lease() {
    if !something_is_missing() {
        let fault = Fault::new(Effect::Refuse(Refusal::SlowDown)).on(Operation::PutObject);
        Box::pin(a_stopped_replica_writes_nothing_after_its_lease(fault)).await;
    }
}

/// Of a claim that nobody is to wait for long.
const SHORT_TTL: Duration = Duration::from_secs(3);

/// The whole process stops past its claim, and nothing else happens to it: nobody takes the group over or
/// ends its connections, nobody tells it that the claim is over, and the store, the server and WAL that
/// waits to be stored are all there when it goes on. Only its own look at the claim keeps it from writing.
///
/// Here the process is this test's one thread. The servers have others.
async fn only_its_own_look_at_the_claim_keeps_a_follower_from_writing(fault: Fault) {
    let etcd = EtcdCluster::start(1).await;
    let scene = Scene::streaming(Kind::S3, &format!("{QUIET}{}", section(&etcd))).await;
    let (primary, faults) = (&scene.primary, scene.s3.as_ref().unwrap().faults());
    let config: Config = toml::from_str(&fs::read_to_string(scene.config()).unwrap()).unwrap();
    let context = Context::new(config, "pgmesh/tests").await.unwrap();
    let identity = Identity {
        cluster: "tests".to_owned(),
        agent: "backup-agent".to_owned(),
        replica: "one".to_owned(),
    };
    let (_groups, groups) = watch::channel(BTreeSet::from([0]));
    let (mut shares, sharing) =
        Shares::new(context.etcd.clone(), identity, groups, SHORT_TTL, Duration::ZERO);
    let mut renewal = JoinSet::new();
    renewal.spawn(sharing.run(CancellationToken::new()));
    while shares.claim(0).is_none() {
        shares.changed().await;
    }
    let claim = shares.claim(0).unwrap();
    let (needs_backup, _wanted) = mpsc::channel(1);
    let follower = Follower::new(context, 0, needs_backup);
    let mut work = JoinSet::new();
    let valid = claim.clone();
    work.spawn(async move { follower.run(&valid, CancellationToken::new()).await });
    stored_up_to(primary, primary.current_lsn().await).await;

    let fault = faults.add(fault);
    load(primary, 100_000).await;
    primary.psql("SELECT pg_switch_wal(); CREATE TABLE late AS SELECT 1 AS i").await;
    let under_way = async || faults.hits(fault) > 0;
    eventually("it is at that moment", LIMIT, under_way).await;
    assert!(claim.is_valid() && !work.is_empty());
    renewal.shutdown().await;
    stop_this_thread(SHORT_TTL + Duration::from_millis(500));
    faults.remove(fault);
    faults.forget_requests();
    assert!(!claim.is_valid());
    let deadline = Instant::now() + Duration::from_secs(5);
    let ended = timeout_at(deadline, work.join_next()).await;
    sleep_until(deadline).await;
    let late: Vec<_> =
        faults.record().into_iter().filter(|it| WRITES.contains(&it.operation)).collect();
    assert!(late.is_empty(), "written after the claim was over: {late:?}");
    ended.unwrap().unwrap().unwrap();
    assert!(reported(primary).await < Some(primary.current_lsn().await));
}

#[expect(clippy::disallowed_methods, reason = "the whole process is to stand still")]
fn stop_this_thread(span: Duration) {
    std::thread::sleep(span);
}

/// A request that was refused is about to be sent again.
#[tokio::test]
async fn a_follower_that_stood_still_between_attempts_does_not_try_again_after_its_claim() {
    if !something_is_missing() {
        let fault = Fault::new(Effect::Refuse(Refusal::SlowDown)).on(Operation::PutObject);
        Box::pin(only_its_own_look_at_the_claim_keeps_a_follower_from_writing(fault)).await;
    }
}

/// It has an answer to what it stored, and more to store.
#[tokio::test]
async fn a_follower_that_stood_still_while_it_stored_stores_no_more_after_its_claim() {
    if !something_is_missing() {
        let fault = Fault::new(HOLD).on(Operation::PutObject);
        Box::pin(only_its_own_look_at_the_claim_keeps_a_follower_from_writing(fault)).await;
    }
}
