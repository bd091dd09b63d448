//! The way from the primary to the store is slow, breaks or hangs while WAL is received: nothing is
//! acknowledged that is not stored, memory stays bounded, and it catches up by itself.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Operation, PgServer, Proxy, Refusal, RunningAgent, eventually};
use serde_json::Value;
use tokio_postgres::types::PgLsn;

use crate::receive::{LIMIT, Receiving, WAL, commits, load, reported, stored_up_to};
use crate::scene::{Kind, Scene};

/// What an agent may take: three segments under way, and what a connection to the store needs.
pub(crate) const MEMORY_KIB_MAX: u64 = 150 << 10;

/// The most memory that the agent has taken so far, in KiB.
pub(crate) fn peak_kib(agent: &RunningAgent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// How far the repository has WAL without a gap, as `list --wal` says.
pub(crate) async fn stored(scene: &Scene) -> PgLsn {
    let listed = scene.run(&["list", "--wal", "--json"]).await;
    listed.assert_success();
    let ranges: Vec<Value> = serde_json::from_str(&listed.stdout).unwrap();
    ranges.last().unwrap()["until_lsn"].as_str().unwrap().parse().unwrap()
}

/// Nothing is acknowledged that is not stored. What was acknowledged is asked first.
pub(crate) async fn is_honest(receiving: &Receiving, case: &str) {
    let reported = reported(receiving.primary()).await;
    let stored = stored(&receiving.scene).await;
    assert!(reported <= Some(stored), "{case}: {reported:?} acknowledged, {stored} stored");
}

/// How much of `max_slot_wal_keep_size` the slot holds back, in percent.
pub(crate) async fn slot_used(primary: &PgServer, limit_mb: u64) -> u64 {
    let ask = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint \
               FROM pg_replication_slots";
    primary.psql(ask).await.parse::<u64>().unwrap() * 100 / (limit_mb << 20)
}

/// The store does not answer under load: alarms before the slot is lost, and no more memory.
#[tokio::test]
async fn a_store_that_hangs_is_alarmed_and_costs_no_memory() {
    const SLOT_MB: u64 = 160;
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    let primary = &receiving.scene.primary;
    primary.set("max_slot_wal_keep_size", &format!("{SLOT_MB}MB")).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Stall).on(Operation::PutObject));
    let mut rows = 0;
    for (percent, alarm) in
        [(52, "half of max_slot_wal_keep_size"), (76, "three quarters of max_slot_wal_keep_size")]
    {
        while slot_used(primary, SLOT_MB).await < percent {
            load(primary, 25_000).await;
            rows += 25_000;
        }
        receiving.agent.logged(alarm, LIMIT).await;
    }
    assert!(slot_used(primary, SLOT_MB).await < 100, "the test lost the slot itself");
    is_honest(&receiving, "the store hangs").await;
    let peak = peak_kib(&receiving.agent);
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB while the store hung");

    receiving.scene.s3.as_ref().unwrap().faults().clear();
    receiving.stored_all().await;
    receiving.agent.logged("alarms about the slot are over", LIMIT).await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();
    let peak = peak_kib(&receiving.agent);
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB after it caught up");
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, rows.to_string());
}

/// The store is slow, refuses, breaks off, or does what it says it did not, one after the other.
#[tokio::test]
async fn a_store_that_fails_in_every_way_only_delays() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::S3).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    let put = |effect| Fault::new(effect).on(Operation::PutObject);
    let slow = Effect::Throttle { bytes_per_second: 2 << 20 };
    for (case, fault) in [
        ("slow", put(slow)),
        ("asked too fast", put(Effect::Refuse(Refusal::SlowDown)).times(20)),
        ("refuses for a moment", put(Effect::Refuse(Refusal::InternalError)).times(20)),
        ("answers get lost", put(Effect::LoseAnswer).times(20)),
        ("hangs for a moment", put(Effect::Stall).times(3)),
        (
            "lists slowly",
            Fault::new(Effect::Delay(Duration::from_secs(1))).on(Operation::ListObjects),
        ),
        (
            "reads break off",
            Fault::new(Effect::CutBody(harness::At::Fraction(0.5)))
                .on(Operation::GetObject)
                // Fewer than one reader tries: `list` reads meanwhile too.
                .times(4),
        ),
    ] {
        let fault = faults.add(fault);
        load(receiving.primary(), 40_000).await;
        let befallen = async || faults.hits(fault) > 0;
        eventually(&format!("{case}: a request is befallen"), LIMIT, befallen).await;
        is_honest(&receiving, case).await;
        receiving.stored_all().await;
        faults.clear();
        is_honest(&receiving, case).await;
    }
    let peak = peak_kib(&receiving.agent);
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB");
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "280000");
}

/// The store says that it has a piece and has none, or a part of it.
#[tokio::test]
async fn a_piece_that_the_store_did_not_keep_is_not_acknowledged() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    for (i, effect) in [(1, Effect::StoreNothing), (2, Effect::StoreTruncated { bytes: 200 })] {
        let faults = receiving.scene.s3.as_ref().unwrap().faults();
        let lie = Fault::new(effect).on(Operation::PutObject).key("partial/").times(2);
        let lie = faults.add(lie);
        receiving.primary().psql(&format!("INSERT INTO marks VALUES ({i})")).await;
        eventually("the store lies", LIMIT, async || faults.hits(lie) == 2).await;
        receiving.stored_all().await;
        receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    }
    receiving.agent.logged("bytes, the store has", LIMIT).await;
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2");
}

/// The connection to the primary breaks, and hangs.
#[tokio::test]
async fn a_connection_that_breaks_or_hangs_is_made_anew() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::streaming(Kind::Directory, WAL).await;
    let proxy = Proxy::start(scene.primary.socket()).await;
    scene.configure_address("127.0.0.1", proxy.port());
    let agent = scene.agent().spawn(&["run"]);
    let mut receiving = Receiving { scene, agent };
    receiving.stored_all().await;
    receiving.scene.backup().await;
    for bytes in [100_000, 3_000_000, 20_000_000] {
        let before = proxy.connections();
        proxy.cut_after(bytes);
        load(receiving.primary(), 60_000).await;
        let again = async || proxy.connections() > before;
        eventually("it connects again", LIMIT, again).await;
        is_honest(&receiving, "broken").await;
        receiving.stored_all().await;
    }
    // The server is there and says nothing: only a limit on silence can tell.
    proxy.stall();
    load(receiving.primary(), 60_000).await;
    receiving.agent.logged("WAL is not being received", LIMIT).await;
    is_honest(&receiving, "hanging").await;
    proxy.reset();
    proxy.resume();
    let lsn = receiving.primary().current_lsn().await;
    stored_up_to(receiving.primary(), lsn).await;
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "240000");
}
