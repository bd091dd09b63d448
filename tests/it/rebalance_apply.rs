//! What the rebalance agent moves, and how it stops. Citus is a stand-in, as in `rebalance_plan`.

use std::time::Duration;

use chrono::{Timelike as _, Utc};
use harness::postgres::postgres_is_missing;
use harness::{EtcdCluster, PgServer, RunningAgent, etcd_is_missing, eventually, server_port};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::rebalance_plan::Cluster;

const LIMIT: Duration = Duration::from_secs(40);
pub(crate) const APPLY: &str = "mode = \"apply\"\napply.pause = \"0s\"\n";

impl Cluster {
    pub(crate) fn starts(&self) -> RunningAgent {
        self.agent().spawn(&["run"])
    }

    /// Where the four shard groups are.
    pub(crate) async fn places(&self) -> Vec<i32> {
        let sql = "SELECT groupid FROM pg_dist_placement \
                   WHERE shardid BETWEEN 102008 AND 102011 ORDER BY shardid";
        let rows = self.coordinator.connect().await.query(sql, &[]).await.unwrap();
        rows.iter().map(|it| it.get(0)).collect()
    }

    /// How many moves, or copies of reference tables, the server is at.
    async fn under_way(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' \
                   AND query ~ '^SELECT (citus_move|replicate_reference)'";
        self.coordinator.connect().await.query_one(sql, &[]).await.unwrap().get(0)
    }

    pub(crate) async fn copies_for(&self, seconds: u32) {
        self.change(&format!("UPDATE stand_in.copying SET seconds = {seconds}")).await;
    }

    async fn begins(&self) {
        eventually("a move begins", LIMIT, async || self.under_way().await == 1).await;
    }

    async fn is_balanced(&self) {
        eventually("it is balanced", LIMIT, async || {
            self.places().await.iter().filter(|it| **it == 2).count() == 2
        })
        .await;
    }

    /// That its worker 2 is new: it has no reference tables.
    pub(crate) async fn is_bare(&self) {
        self.change(
            "DELETE FROM pg_dist_placement USING pg_dist_shard \
             WHERE pg_dist_shard.shardid = pg_dist_placement.shardid \
               AND logicalrelid = 'countries'::regclass AND groupid = 2",
        )
        .await;
    }

    /// A standby of the coordinator, and where both are.
    pub(crate) async fn coordinators(&self) -> (PgServer, String) {
        let standby = self.coordinator.standby("coordinator-2").await;
        standby.catch_up(&self.coordinator).await;
        let member = Self::member(0, &standby);
        (standby, member)
    }

    /// Skewed, with a standby of the coordinator that knows all; a move copies for so many seconds.
    async fn with_standby(copies_for: u32) -> (Self, PgServer) {
        let cluster = Self::skewed().await;
        let (standby, member) = cluster.coordinators().await;
        cluster.configure(&format!("{APPLY}{member}"));
        cluster.copies_for(copies_for).await;
        standby.catch_up(&cluster.coordinator).await;
        (cluster, standby)
    }

    /// As Patroni tells Citus after a failover.
    pub(crate) async fn has_new_coordinator(&mut self, promoted: PgServer) -> PgServer {
        let (host, port) = (promoted.socket_directory().display().to_string(), promoted.port());
        let old = std::mem::replace(&mut self.coordinator, promoted);
        self.change(&format!(
            "UPDATE pg_dist_node SET nodename = '{host}', nodeport = {port} WHERE groupid = 0"
        ))
        .await;
        self.copies_for(0).await;
        old
    }

    /// How the last moves ended, the newest first, as the agent says that runs.
    pub(crate) async fn ends(&self) -> Vec<(String, String)> {
        let finished = self.agent().run(&["status", "--json"]).await;
        let status: Value =
            serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("{finished}"));
        let recent = status["recent"].as_array().cloned().unwrap_or_default();
        let text = |it: &Value| it.as_str().unwrap().to_owned();
        recent.iter().map(|it| (text(&it["outcome"]), text(&it["reason"]))).collect()
    }

    pub(crate) async fn ended(&self, outcome: &str) -> String {
        let mut reason = None;
        eventually(outcome, LIMIT, async || {
            let ends = self.ends().await;
            reason = ends.into_iter().find(|it| it.0 == outcome).map(|it| it.1);
            reason.is_some()
        })
        .await;
        reason.unwrap()
    }
}

#[tokio::test]
async fn what_is_planned_is_moved_and_nothing_is_left() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.is_bare().await;
    cluster.configure(APPLY);
    let agent = cluster.starts();
    cluster.is_balanced().await;
    eventually("all is told", LIMIT, async || cluster.ends().await.len() == 3).await;
    eventually("all is cleaned up", LIMIT, async || {
        let report = cluster.plan().await;
        report["refusals"] == Value::Array(vec![])
            && report["plan"]["moves"] == Value::Array(vec![])
    })
    .await;
    let finished = agent.terminate().await;
    finished.assert_success();
    for words in ["\"why\":\"reference_tables\"", "\"outcome\":\"moved\""] {
        assert!(finished.stdout.contains(words), "no {words} in {finished}");
    }
    assert!(!finished.stdout.contains("WARN"), "{finished}");
}

#[tokio::test]
async fn writers_wait_no_longer_than_the_lock_timeout() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(&format!("{APPLY}apply.lock_timeout = \"500ms\"\n"));
    // A transaction that has written and stays open, and a writer that comes behind the move.
    let holder = cluster.coordinator.connect().await;
    let lock = "BEGIN; LOCK TABLE stand_in.cutover IN ROW EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    let agent = cluster.starts();
    let writer = cluster.coordinator.connect().await;
    let mut longest = Duration::ZERO;
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        let began = Instant::now();
        writer.batch_execute("INSERT INTO stand_in.cutover DEFAULT VALUES").await.unwrap();
        longest = longest.max(began.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    assert!(Duration::from_millis(400) < longest, "no move came as far as the lock: {longest:?}");
    let reason = cluster.ended("no_lock").await;
    assert!(reason.starts_with("it did not get a lock within 500ms"), "{reason}");
    assert_eq!(cluster.places().await, [1; 4]);
    // Each rests, and after three all do.
    let report = cluster.plan().await;
    assert_eq!(report["refusals"], Value::Array(vec![]), "another process has not moved anything");
    let status = cluster.agent().run(&["status"]).await.stdout;
    assert!(status.contains("the last 3 moves failed: it did not get a lock"), "{status}");
    assert_eq!(cluster.ends().await.len(), 3);
    agent.terminate().await.assert_success();
}

/// Everybody who uses the table waits behind it, for as long as the move lasts.
#[tokio::test]
async fn a_statement_that_waits_behind_a_move_is_let_through() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(APPLY);
    cluster.copies_for(60).await;
    let agent = cluster.starts();
    cluster.begins().await;
    let (alters, writes) =
        (cluster.coordinator.connect().await, cluster.coordinator.connect().await);
    let began = Instant::now();
    let (altered, written) = tokio::join!(
        alters.batch_execute("ALTER TABLE events ADD COLUMN a int"),
        writes.batch_execute("SELECT pg_sleep(0.2); INSERT INTO events VALUES (1)"),
    );
    altered.unwrap();
    written.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let reason = cluster.ended("yielded").await;
    let words = "on the coordinator has waited for 1s behind it, and all who use the table behind that: \
                 ALTER TABLE events ADD COLUMN a int";
    assert!(reason.starts_with("pid ") && reason.ends_with(words), "{reason}");
    agent.terminate().await.assert_success();
}

/// The error that ends a statement comes before its locks are given back.
#[tokio::test]
async fn a_session_that_does_not_end_keeps_all_else_from_beginning() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(APPLY);
    cluster.copies_for(300).await;
    cluster.change("UPDATE stand_in.copying SET is_stubborn = true").await;
    let agent = cluster.starts();
    cluster.begins().await;
    let alters = cluster.coordinator.connect().await;
    let alter =
        alters.batch_execute("SET statement_timeout = '5s'; ALTER TABLE events ADD COLUMN a int");
    alter.await.unwrap_err();
    let reason = cluster.ended("unknown").await;
    let words = " on the coordinator still holds the locks of shard 10";
    assert!(reason.contains("; session ") && reason.contains(words), "{reason}");
    let status = async || cluster.agent().run(&["status"]).await.stdout;
    eventually("it is told", LIMIT, async || status().await.contains("bring back or fence ")).await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!((cluster.ends().await.len(), cluster.under_way().await), (1, 1));

    cluster.copies_for(0).await;
    let end =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^SELECT citus_move'";
    cluster.change(end).await;
    cluster.is_balanced().await;
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(finished.stdout.contains("a move that has ended keeps its locks"), "{finished}");
}

/// No writer waits for an index that is built on the target.
#[tokio::test]
async fn an_index_may_take_longer_than_writers_may_wait() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(&format!("{APPLY}apply.lock_timeout = \"500ms\"\n"));
    cluster.change("UPDATE stand_in.copying SET indexing_seconds = 4").await;
    let agent = cluster.starts();
    eventually("one is moved", LIMIT, async || cluster.places().await != [1; 4]).await;
    let ends = cluster.ends().await;
    assert!(ends.iter().all(|it| matches!(it.0.as_str(), "moved" | "started")), "{ends:?}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_command_waits_for_what_it_began_though_that_spends_the_budget() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(&format!("{APPLY}budget.moves_per_run = 1\n"));
    // Longer than until the next look.
    cluster.copies_for(8).await;
    let finished = cluster.agent().run(&["move", "102009", "2"]).await;
    finished.assert_success();
    assert_eq!(cluster.places().await, [1, 2, 1, 1]);
    assert!(finished.stderr.contains("move ended"), "{finished}");
    // What is left of a drain is another matter.
    cluster.copies_for(0).await;
    let finished = cluster.agent().run(&["drain", "1"]).await;
    finished.assert_code(1);
    assert!(finished.stderr.contains("not now: moves of 1 shard group began"), "{finished}");
    assert_eq!(cluster.places().await.iter().filter(|it| **it == 2).count(), 2);
}

#[tokio::test]
async fn a_move_ends_with_its_agent() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(APPLY);
    cluster.copies_for(60).await;
    let agent = cluster.starts();
    cluster.begins().await;
    let began = Instant::now();
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(began.elapsed() < Duration::from_secs(10), "{finished}");
    assert!(finished.stdout.contains("\"outcome\":\"stopped\""), "{finished}");
    assert_eq!((cluster.under_way().await, cluster.places().await), (0, vec![1; 4]));

    // Killed, it can end nothing itself.
    let agent = cluster.starts();
    cluster.begins().await;
    agent.kill9().await;
    eventually("the move ends", LIMIT, async || cluster.under_way().await == 0).await;
    assert_eq!(cluster.places().await, [1; 4]);
    cluster.copies_for(0).await;
    let agent = cluster.starts();
    cluster.is_balanced().await;
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn moves_that_fail_are_not_tried_again_and_again() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(APPLY);
    cluster.copies_for(0).await;
    let failure = "could not fetch disk stats for node: w4-5432";
    cluster
        .change(&format!(
            "INSERT INTO stand_in.failure VALUES ('citus_move_shard_placement', '{failure}')"
        ))
        .await;
    let agent = cluster.starts();
    eventually("three failures", LIMIT, async || cluster.ends().await.len() == 3).await;
    sleep(Duration::from_secs(12)).await;
    let ends = cluster.ends().await;
    assert_eq!(ends.len(), 3, "{ends:?}");
    assert!(ends.iter().all(|it| it.0 == "failed" && it.1.contains(failure)), "{ends:?}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_worker_is_drained_by_a_command_alone() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure("");
    let finished = cluster.agent().run(&["drain", "1"]).await;
    finished.assert_code(1);
    assert!(finished.stderr.contains("mode is \\\"dry_run\\\""), "{finished}");
    cluster.configure(APPLY);
    let finished = cluster.agent().run(&["drain", "9"]).await;
    finished.assert_code(1);
    assert!(finished.stderr.contains("no node is called 9; there are: "), "{finished}");

    let finished = cluster.agent().run(&["drain", "1"]).await;
    finished.assert_success();
    assert_eq!(cluster.places().await, [2; 4]);
    assert!(finished.stdout.contains("citus_set_node_property("), "{finished}");

    // Only what is asked for, however uneven it is.
    let finished = cluster.agent().run(&["move", "102009", "1"]).await;
    finished.assert_success();
    assert_eq!(cluster.places().await, [2, 1, 2, 2]);
    // Any shard of the group names it.
    let finished = cluster.agent().run(&["move", "102014", "1"]).await;
    finished.assert_success();
    assert_eq!(cluster.places().await, [2, 1, 1, 2]);

    cluster.change("UPDATE pg_dist_node SET isactive = false WHERE groupid = 2").await;
    let finished = cluster.agent().run(&["drain", "1"]).await;
    finished.assert_code(1);
    assert!(finished.stderr.contains("not now: ") && finished.stderr.contains("is not active"));
    assert_eq!(cluster.places().await, [2, 1, 1, 2]);

    let stuck = "INSERT INTO pg_dist_cleanup \
        (operation_id, object_type, object_name, node_group_id, policy_type) \
        VALUES (7, 1, 'stuck', 1, 0), (7, 1, 'other', 1, 0)";
    cluster.change(stuck).await;
    let finished = cluster.agent().run(&["cleanup"]).await;
    finished.assert_code(1);
    assert!(
        finished.stderr.contains("1 object of a move to clean up: stuck on group 1"),
        "{finished}"
    );
    cluster.change("TRUNCATE pg_dist_cleanup").await;
    cluster.agent().run(&["cleanup"]).await.assert_success();
}

#[tokio::test]
async fn a_pause_breaks_a_move_off_and_a_budget_outlives_the_agent() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let etcd = EtcdCluster::start(1).await;
    let keys =
        format!("{APPLY}etcd.endpoints = {:?}\nbudget.moves_per_day = 2\n", etcd.endpoints());
    cluster.configure(&keys);
    cluster.copies_for(60).await;
    let agent = cluster.starts();
    cluster.begins().await;
    let pause = ["pause", "--for", "1h", "--comment", "an upgrade"];
    let finished = cluster.agent().run(&pause).await;
    finished.assert_success();
    assert!(finished.stdout.starts_with("Paused until "), "{finished}");
    eventually("the move ends", LIMIT, async || cluster.under_way().await == 0).await;
    let reason = cluster.ended("stopped").await;
    assert!(reason.starts_with("paused until ") && reason.ends_with(": an upgrade"), "{reason}");
    assert_eq!(cluster.places().await, [1; 4]);

    cluster.copies_for(0).await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(cluster.places().await, [1; 4]);
    cluster.agent().run(&["resume"]).await.assert_success();
    eventually("one is moved", LIMIT, async || cluster.places().await != [1; 4]).await;
    agent.kill9().await;

    // What was broken off counts, too, so that was all for today; whoever asks.
    let agent = cluster.starts();
    let words = "moves of 2 shard groups began in the last 24 hours, as many as may";
    eventually("the budget is used up", LIMIT, async || {
        cluster.agent().run(&["status"]).await.stdout.contains(words)
    })
    .await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(cluster.places().await.iter().filter(|it| **it == 2).count(), 1);
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn reference_tables_are_copied_within_the_same_bounds() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let etcd = EtcdCluster::start(1).await;
    cluster.configure(&format!("{APPLY}etcd.endpoints = {:?}\n", etcd.endpoints()));
    cluster.is_bare().await;
    cluster.copies_for(60).await;
    let agent = cluster.starts();
    cluster.begins().await;
    cluster.agent().run(&["pause"]).await.assert_success();
    eventually("the copy ends", LIMIT, async || cluster.under_way().await == 0).await;
    assert_eq!(cluster.ended("stopped").await, "paused: no reason given");

    // A failure makes it rest for a minute, and nothing comes to that node.
    cluster.copies_for(0).await;
    let failure = "could not open a connection to localhost";
    cluster
        .change(&format!(
            "INSERT INTO stand_in.failure VALUES ('replicate_reference_tables', '{failure}')"
        ))
        .await;
    cluster.agent().run(&["resume"]).await.assert_success();
    let reason = cluster.ended("failed").await;
    assert!(reason.contains(failure), "{reason}");
    sleep(Duration::from_secs(8)).await;
    assert_eq!((cluster.ends().await.len(), cluster.places().await), (2, vec![1; 4]));
    let status = cluster.agent().run(&["status"]).await.stdout;
    let words = "lacks reference tables: public.countries; they are not copied: it rests until ";
    assert!(status.contains(words), "{status}");

    // Whoever has mended it need not wait.
    cluster.change("TRUNCATE stand_in.failure").await;
    cluster.agent().run(&["resume"]).await.assert_success();
    cluster.is_balanced().await;
    eventually("all is told", LIMIT, async || cluster.ends().await.len() == 5).await;
    agent.terminate().await.assert_success();
}

/// Citus shows nothing of an index that it builds.
#[tokio::test]
async fn a_move_that_builds_an_index_does_not_stand_still() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.configure(&format!("{APPLY}apply.stall_timeout = \"30s\"\n"));
    cluster.copies_for(45).await;
    cluster.change("INSERT INTO stand_in.building VALUES (12)").await;
    let agent = cluster.starts();
    eventually("it is moved", Duration::from_secs(80), async || {
        cluster.ends().await.iter().any(|it| it.0 != "started")
    })
    .await;
    let ends = cluster.ends().await;
    assert!(ends.iter().all(|it| it.0 != "failed"), "{ends:?}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_move_ends_with_its_window() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    cluster.copies_for(300).await;
    // One minute, of which something is left.
    eventually("a minute begins", Duration::from_mins(1), async || Utc::now().second() < 30).await;
    let now = Utc::now();
    let schedule = format!("{} {} * * *", now.minute(), now.hour());
    cluster
        .configure(&format!("{APPLY}window = {{ schedule = \"{schedule}\", length = \"1m\" }}\n"));
    let agent = cluster.starts();
    cluster.begins().await;
    eventually("the move ends", Duration::from_secs(75), async || cluster.under_way().await == 0)
        .await;
    assert_eq!(cluster.ended("stopped").await, "the window is closed");
    assert_ne!(Utc::now().minute(), now.minute());
    cluster.copies_for(0).await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!((cluster.ends().await.len(), cluster.places().await), (1, vec![1; 4]));
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn after_a_failover_of_the_coordinator_moves_go_on() {
    if postgres_is_missing() {
        return;
    }
    let (mut cluster, standby) = Cluster::with_standby(60).await;
    let agent = cluster.starts();
    cluster.begins().await;
    cluster.coordinator.kill9().await;
    standby.promote().await;
    let _old = cluster.has_new_coordinator(standby).await;
    cluster.is_balanced().await;
    let reason = cluster.ended("unknown").await;
    assert!(reason.starts_with("how it ended is unknown: "), "{reason}");
    agent.terminate().await.assert_success();
}

/// The old one does not know yet, and still obeys.
#[tokio::test]
async fn a_move_does_not_go_on_beside_a_new_coordinator() {
    if postgres_is_missing() {
        return;
    }
    let (mut cluster, standby) = Cluster::with_standby(300).await;
    let agent = cluster.starts();
    cluster.begins().await;
    standby.promote().await;
    eventually("the move ends", LIMIT, async || cluster.under_way().await == 0).await;
    let mut old = cluster.has_new_coordinator(standby).await;
    old.kill9().await;
    cluster.is_balanced().await;
    let reason = cluster.ended("closed").await;
    assert!(reason.contains("group 0 has several primaries"), "{reason}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn who_waits_is_told_that_nobody_does_it() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let etcd = EtcdCluster::start(1).await;
    let etcd = format!("etcd.endpoints = {:?}\n", etcd.endpoints());
    // One that only looks does not count, and keeps nobody from moving.
    cluster.configure(&etcd);
    let mut idle = cluster.starts();
    idle.logged("agent started", LIMIT).await;
    let keys = format!("{APPLY}{etcd}");
    let cluster = Cluster { port: server_port(), ..cluster };
    cluster.configure(&keys);
    let finished = cluster.agent().limit(LIMIT * 2).run(&["drain", "1", "--wait"]).await;
    finished.assert_code(1);
    let words = "nobody does it: for 30s no agent with mode = \\\"apply\\\" has led";
    assert!(finished.stderr.contains(words), "{finished}");
    assert!(
        finished.stdout.contains("8 shards left on group 1. 4 shard groups to move"),
        "{finished}"
    );
    assert_eq!(cluster.places().await, [1; 4]);

    let agent = cluster.starts();
    let finished = cluster.agent().limit(LIMIT * 2).run(&["drain", "1", "--wait"]).await;
    finished.assert_success();
    assert_eq!(cluster.places().await, [2; 4]);
    for it in [agent, idle] {
        it.terminate().await.assert_success();
    }
}

#[tokio::test]
async fn one_of_two_agents_moves_and_the_other_takes_over() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let etcd = EtcdCluster::start(1).await;
    let keys = format!("{APPLY}etcd.endpoints = {:?}\n", etcd.endpoints());
    cluster.configure(&keys);
    cluster.copies_for(20).await;
    let first = cluster.starts();
    cluster.begins().await;
    let other = Cluster { port: server_port(), ..cluster };
    other.configure(&keys);
    let second = other.starts();
    sleep(Duration::from_secs(7)).await;
    assert_eq!(other.under_way().await, 1);
    let status = other.agent().run(&["status"]).await;
    assert!(status.stdout.contains("another replica leads"), "{status}");
    assert!(status.stdout.contains(" moves shard 102008 from "), "{status}");

    // Stopped past its lease, it holds up nobody, and begins nothing when it wakes up.
    first.sigstop();
    other.copies_for(0).await;
    other.is_balanced().await;
    first.sigcont();
    sleep(Duration::from_secs(5)).await;
    let finished = first.terminate().await;
    assert_eq!(finished.stdout.matches("\"move begins\"").count(), 1, "{finished}");
    assert_eq!(other.places().await.iter().filter(|it| **it == 2).count(), 2);
    second.terminate().await.assert_success();
}
