//! What the rebalance agent sees, plans and refuses. Citus is a stand-in: `stand-in/citus.sql`, the
//! catalogue of a real one as it was recorded, on plain servers.

use std::path::PathBuf;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{
    Agent, EtcdCluster, Mode, PgServer, directory, etcd_is_missing, eventually, server_port, skip,
};
use serde_json::Value;
use shared::activity::activities;
use tempfile::TempDir;

use crate::etcd::client;
use crate::exporter::{node, piped, server};
use crate::monitor::Monitor;
use crate::replicas::section;
use crate::scene::{Kind, Scene, write};

const LIMIT: Duration = Duration::from_secs(30);
const STAND_IN: &str = include_str!("../stand-in/citus.sql");
const ROLES: &str = include_str!("../../init-scripts/10-roles.sql");

/// A coordinator and two workers, and an agent that may look.
pub(crate) struct Cluster {
    pub(crate) coordinator: PgServer,
    pub(crate) workers: Vec<PgServer>,
    pub(crate) directory: TempDir,
    pub(crate) port: u16,
}

async fn stand_in(name: &str, group: u32) -> PgServer {
    // The health monitor, which one of these tests asks of the coordinator, calls one without it critical.
    let fsync = if group == 0 { "on" } else { "off" };
    let builder = PgServer::builder().name(name).setting("wal_level", "logical");
    let server = builder.setting("fsync", fsync).primary().await;
    server.psql(&format!("\\set group {group}\n{STAND_IN}")).await;
    server.psql(ROLES).await;
    server
}

impl Cluster {
    /// All of two colocated tables on the first worker: four shard groups of 1 GiB and a little.
    pub(crate) async fn skewed() -> Self {
        let coordinator = stand_in("coordinator", 0).await;
        let workers = vec![stand_in("worker-1", 1).await, stand_in("worker-2", 2).await];
        let nodes = [&coordinator, &workers[0], &workers[1]];
        for (group, it) in nodes.iter().enumerate() {
            let (host, port) = (it.socket_directory().display(), it.port());
            coordinator
                .psql(&format!(
                    "SET allow_system_table_mods = on; INSERT INTO pg_dist_node \
                     (nodeid, groupid, nodename, nodeport, shouldhaveshards) \
                     VALUES ({group} + 10, {group}, '{host}', {port}, {group} > 0)"
                ))
                .await;
        }
        coordinator
            .psql(
                "CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO app; \
                 CREATE TABLE events (id int PRIMARY KEY); CREATE TABLE log (id int PRIMARY KEY); \
                 CREATE TABLE countries (id int PRIMARY KEY); \
                 ALTER TABLE events OWNER TO app; ALTER TABLE log OWNER TO app; \
                 SET allow_system_table_mods = on; \
                 SELECT stand_in.distribute('events', 1, '{1,1,1,1}', array_fill(1 << 30, '{4}')); \
                 SELECT stand_in.distribute('log', 1, '{1,1,1,1}', array_fill(1 << 20, '{4}')); \
                 SELECT stand_in.replicate('countries', '{0,1,2}', 5000)",
            )
            .await;
        // Now that there are tables, their owner.
        coordinator.psql(ROLES).await;
        let it = Self { coordinator, workers, directory: directory(), port: server_port() };
        it.configure("");
        it
    }

    /// A server that the topology knows, as a part of the configuration.
    pub(crate) fn member(group: u32, server: &PgServer) -> String {
        let (name, host, port) =
            (server.name(), server.socket_directory().display(), server.port());
        format!("[[nodes]]\ngroup = {group}\nname = \"{name}\"\nhost = \"{host}\"\nport = {port}\n")
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("rebalance-agent.toml")
    }

    /// The workers are found by Citus.
    pub(crate) fn configure(&self, extra: &str) {
        let text = format!(
            "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{}\"\ninterval = \"5s\"\n{extra}\
             [postgres]\nuser = \"pgmesh_rebalance\"\ntls = \"disable\"\n{}",
            self.port,
            server(&self.coordinator)
        );
        write(&self.config(), &text);
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent::rebalance_agent(&self.config())
    }

    pub(crate) async fn plan(&self) -> Value {
        let finished = self.agent().run(&["plan", "--json"]).await;
        serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("{finished}"))
    }

    /// What is refused: gate, and the sentence, without the addresses of these servers.
    async fn refused(&self) -> Vec<(String, String)> {
        let plan = self.plan().await;
        let refusals = plan["refusals"].as_array().unwrap_or_else(|| panic!("{plan}"));
        let text = |it: &Value| it.as_str().unwrap().to_owned();
        refusals
            .iter()
            .map(|it| (text(&it["gate"]), self.anonymous(&text(&it["reason"]))))
            .collect()
    }

    /// Without the addresses of these servers.
    fn anonymous(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for it in self.workers.iter().chain([&self.coordinator]) {
            let address = format!("{}:{}", it.socket_directory().display(), it.port());
            text = text.replace(&address, it.name());
        }
        text
    }

    /// Changes the stand-in's catalogue on the coordinator.
    pub(crate) async fn change(&self, sql: &str) {
        self.coordinator.psql(&format!("SET allow_system_table_mods = on; {sql}")).await;
    }

    #[track_caller]
    fn assert_refused(found: &[(String, String)], gate: &str, reason: &str) {
        let [(closed, why)] = found else { panic!("{gate} {reason}: {found:?}") };
        assert!(closed == gate && why.contains(reason), "{gate} {reason}: {found:?}");
    }
}

fn moves(report: &Value) -> Vec<(i64, i64, i64)> {
    let moves = report["plan"]["moves"].as_array().unwrap_or_else(|| panic!("{report}"));
    let number = |it: &Value| it.as_i64().unwrap();
    moves.iter().map(|it| (number(&it["shard"]), number(&it["from"]), number(&it["to"]))).collect()
}

#[tokio::test]
async fn a_plan_is_made_by_a_role_that_may_only_look() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let report = cluster.plan().await;
    assert_eq!(report["state"], "decided", "{report}");
    assert_eq!(report["refusals"], Value::Array(vec![]), "{report}");
    // Two of four; the shards of both tables together, by the first.
    assert_eq!(moves(&report), [(102_008, 1, 2), (102_009, 1, 2)], "{report}");
    let first = &report["plan"]["moves"][0];
    assert_eq!(first["shards"], serde_json::json!([102_008, 102_012]));
    assert_eq!(first["tables"], serde_json::json!(["public.events", "public.log"]));
    assert_eq!(first["bytes"], (1 << 30) + (1 << 20));
    assert_eq!(report["plan"]["after"]["load"], 0.0);
    // Citus, by its stand-in, would do nothing.
    let differences = report["comparison"]["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 2, "{report}");

    // Citus lists secondaries too, once Patroni registers them: nothing is counted twice.
    cluster
        .change(
            "INSERT INTO pg_dist_node (nodeid, groupid, nodename, nodeport, noderole) \
             VALUES (20, 1, 'nowhere', 5432, 'secondary')",
        )
        .await;
    let again = cluster.plan().await;
    assert_eq!(
        (&again["plan"], &again["nodes"][1]["bytes"]),
        (&report["plan"], &report["nodes"][1]["bytes"])
    );

    // As Citus would do it.
    cluster.change("INSERT INTO stand_in.plan VALUES (102011, 11, 12), (102015, 11, 12)").await;
    cluster.configure("balance.strategy = \"citus\"\n");
    let report = cluster.plan().await;
    assert_eq!(moves(&report), [(102_011, 1, 2)], "{report}");
    assert_eq!(report["comparison"]["same"], 1);

    let text = cluster.agent().run(&["plan"]).await;
    text.assert_success();
    for words in
        ["takes shards", "citus  102011", "public.events, public.log", "1 shard group to move"]
    {
        assert!(text.stdout.contains(words), "no {words:?} in {text}");
    }
    // A drained worker is emptied, whatever else.
    cluster.configure("");
    cluster.change("UPDATE pg_dist_node SET shouldhaveshards = false WHERE groupid = 1").await;
    let report = cluster.plan().await;
    assert_eq!(moves(&report).len(), 4, "{report}");
    assert!(report["plan"]["moves"].as_array().unwrap().iter().all(|it| it["why"] == "drain"));
}

#[tokio::test]
async fn what_logical_replication_cannot_carry_is_held() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    for (change, back, gate, reason) in [
        (
            "ALTER TABLE log SET UNLOGGED",
            "ALTER TABLE log SET LOGGED",
            "tables",
            "public.log is UNLOGGED, and nothing of it would be replicated",
        ),
        (
            "ALTER TABLE log FORCE ROW LEVEL SECURITY",
            "ALTER TABLE log NO FORCE ROW LEVEL SECURITY",
            "tables",
            "public.log has row-level security FORCED on its owner",
        ),
        (
            "CREATE ACCESS METHOD columnar TYPE TABLE HANDLER heap_tableam_handler; \
             ALTER TABLE log SET ACCESS METHOD columnar",
            "ALTER TABLE log SET ACCESS METHOD heap",
            "tables",
            "public.log is columnar, and every write to it would fail while it is moved",
        ),
    ] {
        cluster.change(change).await;
        Cluster::assert_refused(&cluster.refused().await, gate, reason);
        cluster.change(back).await;
        assert_eq!(cluster.refused().await, []);
    }
}

#[tokio::test]
async fn what_the_catalogue_says_closes_its_gate() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    for (change, back, gate, reason) in [
        (
            "INSERT INTO pg_dist_background_job (job_id, state, job_type, description) \
             VALUES (3, 'running', 'rebalance', 'Rebalance all colocation groups'); \
             INSERT INTO pg_dist_background_task (job_id, command, retry_count) VALUES (3, 'x', 7)",
            "UPDATE pg_dist_background_job SET state = 'failed'",
            "busy",
            "job 3 is running: Rebalance all colocation groups, and a task of it failed 7 times",
        ),
        (
            "INSERT INTO stand_in.progress VALUES (102008, 11, 12, 1, 'Catching Up')",
            "TRUNCATE stand_in.progress",
            "busy",
            "shard 102008 is moved from worker-1 to worker-2: Catching Up",
        ),
        (
            "INSERT INTO stand_in.failure VALUES ('get_rebalance_progress', 'no size')",
            "TRUNCATE stand_in.failure",
            "busy",
            "whether a shard is moved is unknown: query coordinator",
        ),
        (
            "INSERT INTO pg_dist_cleanup (operation_id, object_type, object_name, node_group_id, policy_type) \
             VALUES (7, 1, 'public.events_102008', 1, 2)",
            "TRUNCATE pg_dist_cleanup",
            "cleanup",
            "1 object of a move to clean up: public.events_102008 on group 1",
        ),
        (
            "INSERT INTO stand_in.broken_link VALUES (12, 11, NULL)",
            "TRUNCATE stand_in.broken_link",
            "links",
            "unknown whether there is a connection from worker-2 to worker-1",
        ),
        (
            "INSERT INTO stand_in.broken_link VALUES (11, 12, false)",
            "TRUNCATE stand_in.broken_link",
            "links",
            "no connection from worker-1 to worker-2",
        ),
        (
            "UPDATE pg_dist_node SET metadatasynced = false WHERE groupid = 2",
            "UPDATE pg_dist_node SET metadatasynced = true",
            "nodes",
            "the metadata of worker-2 are out of date",
        ),
        (
            "ALTER TABLE log DROP CONSTRAINT log_pkey",
            "ALTER TABLE log ADD PRIMARY KEY (id)",
            "replica_identity",
            "public.log has no replica identity",
        ),
        (
            "REVOKE app FROM pgmesh_rebalance",
            "GRANT app TO pgmesh_rebalance",
            "owner",
            "public.events, public.log belongs to app, whose rights pgmesh_rebalance does not have",
        ),
        (
            "ALTER ROLE app NOLOGIN",
            "ALTER ROLE app LOGIN",
            "owner",
            "public.events, public.log belongs to app, who may not log in, as a move must",
        ),
        (
            "REVOKE CREATE ON SCHEMA public FROM app",
            "GRANT CREATE ON SCHEMA public TO app",
            "owner",
            "who may not create tables in its schema",
        ),
        (
            "UPDATE pg_dist_local_group SET groupid = 5",
            "UPDATE pg_dist_local_group SET groupid = 0",
            "coordinator",
            "the server that was asked is a worker",
        ),
    ] {
        cluster.change(change).await;
        Cluster::assert_refused(&cluster.refused().await, gate, reason);
        cluster.change(back).await;
    }
    // A deferrable primary key tells no rows apart, another index can, and so can the whole row.
    cluster
        .change("ALTER TABLE log DROP CONSTRAINT log_pkey, ADD PRIMARY KEY (id) DEFERRABLE")
        .await;
    Cluster::assert_refused(&cluster.refused().await, "replica_identity", "public.log");
    cluster.change("ALTER TABLE log REPLICA IDENTITY FULL").await;
    assert_eq!(cluster.refused().await, []);

    // A size that nobody tells: no plan, and the command says so.
    cluster.change("UPDATE stand_in.size SET bytes = NULL WHERE shardid = 102009").await;
    let finished = cluster.agent().run(&["plan", "--json"]).await;
    finished.assert_code(1);
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert!(report["plan"].is_null());
    assert_eq!(report["plan_unknown"], "the size of shard 102009 is not told");
    assert_eq!(report["refusals"][0]["gate"], "sizes");
}

#[tokio::test]
async fn what_the_servers_say_closes_its_gate() {
    if postgres_is_missing() {
        return;
    }
    let mut cluster = Cluster::skewed().await;
    cluster.configure("guard.transaction_age_max = \"1ms\"\n");

    // A transaction that has written; one that only reads does no harm.
    let worker = &cluster.workers[0];
    let writer = worker.connect().await;
    writer.batch_execute("CREATE TABLE t ()").await.unwrap();
    writer.batch_execute("BEGIN; SELECT count(*) FROM t").await.unwrap();
    assert_eq!(cluster.refused().await, []);
    writer.batch_execute("LOCK TABLE t; DROP TABLE t").await.unwrap();
    Cluster::assert_refused(
        &cluster.refused().await,
        "transactions",
        "has written and is open for",
    );
    let session: String = writer
        .query_one("SELECT format('pid %s of %s', pg_backend_pid(), current_user)", &[])
        .await
        .unwrap()
        .get(0);
    Cluster::assert_refused(&cluster.refused().await, "transactions", &session);
    // To a blocked node nothing is moved, and from it neither; the plan says so.
    let report = cluster.plan().await;
    assert_eq!(moves(&report), []);
    assert!(report["plan"]["skipped"][0]["reason"].as_str().unwrap().contains("has written"));
    writer.batch_execute("ROLLBACK").await.unwrap();

    // What a move that was broken off leaves.
    let slot = "citus_shard_move_slot_12_10_7";
    worker.psql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    Cluster::assert_refused(&cluster.refused().await, "leftovers", &format!("slot {slot}"));
    worker.psql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;

    // What a standby that is gone holds back.
    worker.psql("SELECT pg_create_physical_replication_slot('gone', true)").await;
    assert_eq!(cluster.refused().await, []);
    cluster.configure("guard.lag_bytes_max = 0\n");
    worker.psql("CREATE TABLE many AS SELECT generate_series(1, 1000)").await;
    let slot = "nobody has read from slot gone on worker-1";
    Cluster::assert_refused(&cluster.refused().await, "slots", slot);
    worker.psql("SELECT pg_drop_replication_slot('gone')").await;
    assert_eq!(cluster.refused().await, []);
    cluster.configure("");

    // A standby that holds still is behind.
    let standby = worker.standby("standby").await;
    standby.catch_up(worker).await;
    assert_eq!(cluster.refused().await, []);
    standby.psql("SELECT pg_wal_replay_pause()").await;
    cluster.configure("guard.lag_bytes_max = 0\n");
    worker.psql("CREATE TABLE more AS SELECT generate_series(1, 1000)").await;
    Cluster::assert_refused(&cluster.refused().await, "lag", "standby is");
    // Known to the topology, it is asked itself: one that does not stream is not seen by its primary.
    standby.psql("SELECT pg_wal_replay_resume()").await;
    standby.catch_up(worker).await;
    let members = Cluster::member(1, worker) + &Cluster::member(1, &standby);
    cluster.configure(&members);
    assert_eq!(cluster.refused().await, []);
    standby.set("primary_conninfo", "").await;
    let mut refused = Vec::new();
    eventually("it does not stream", LIMIT, async || {
        refused = cluster.refused().await;
        !refused.is_empty()
    })
    .await;
    Cluster::assert_refused(&refused, "lag", "standby does not stream");
    drop(standby);
    cluster.configure("");

    // No room; and a server that does not tell.
    worker.psql("UPDATE stand_in.disk SET available = 5::bigint << 30").await;
    Cluster::assert_refused(&cluster.refused().await, "disk", "5.0 GiB of 100.0 GiB are free");
    let failure = "INSERT INTO stand_in.failure VALUES ('citus_local_disk_space_stats', 'no')";
    worker.psql(failure).await;
    Cluster::assert_refused(&cluster.refused().await, "disk", "is unknown: query worker-1");
    worker.psql("TRUNCATE stand_in.failure; UPDATE stand_in.disk SET available = total").await;

    // Without its right much would be left out without a word.
    worker.psql("REVOKE pg_monitor FROM pgmesh_rebalance").await;
    Cluster::assert_refused(&cluster.refused().await, "reachable", "lacks pg_monitor");
    worker.psql("GRANT pg_monitor TO pgmesh_rebalance").await;
    assert_eq!(cluster.refused().await, []);

    // A worker that is gone, and a coordinator.
    cluster.workers[1].stop(Mode::Immediate).await;
    Cluster::assert_refused(
        &cluster.refused().await,
        "reachable",
        "the primary of group 2 does not answer",
    );
    cluster.coordinator.stop(Mode::Immediate).await;
    let finished = cluster.agent().run(&["plan", "--json"]).await;
    finished.assert_code(1);
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(report["state"], "unknown");
    assert!(report["reason"].as_str().unwrap().starts_with("group 0 has no primary"), "{report}");
}

/// Behind a process of Citus' own there is the one that an operator can find.
#[tokio::test]
async fn who_keeps_a_shard_from_being_dropped_is_named() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let worker = &cluster.workers[0];
    worker.psql("CREATE TABLE events_102008 (id int)").await;
    cluster
        .change(
            "INSERT INTO pg_dist_cleanup (operation_id, object_type, object_name, node_group_id, policy_type) \
             VALUES (1, 1, 'public.events_102008', 1, 2)",
        )
        .await;
    let next = async || {
        let plan = cluster.plan().await;
        assert_eq!(plan["refusals"][0]["gate"], "cleanup", "{plan}");
        plan["refusals"][0]["next"].as_str().unwrap().to_owned()
    };
    assert!(next().await.contains("SELECT pid, query"));
    let pid = async |client: &tokio_postgres::Client| -> i32 {
        client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
    };
    let (report, reader) = (cluster.coordinator.connect().await, worker.connect().await);
    report.batch_execute("SET application_name = 'report'").await.unwrap();
    let (client, process) = (pid(&report).await, pid(&reader).await);
    reader
        .batch_execute(&format!(
            "SET application_name = 'citus_internal gpid=10{client:010}'; BEGIN; \
             SELECT count(*) FROM events_102008"
        ))
        .await
        .unwrap();
    let next = cluster.anonymous(&next().await);
    let expected = format!(
        "end pid {client} of postgres (report) on coordinator, by pid {process} on worker-1"
    );
    assert!(next.contains(&expected), "{next}");
}

/// As after a restore of a worker, or of the coordinator. What only is named like a shard is none.
#[tokio::test]
async fn a_table_of_a_shard_that_is_not_there_is_named_and_dropped_when_that_is_wanted() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let worker = &cluster.workers[1];
    // One that Citus knows under another number by now.
    cluster
        .change(
            "UPDATE pg_dist_shard SET shardid = 102020 WHERE shardid = 102011; \
             UPDATE pg_dist_placement SET shardid = 102020 WHERE shardid = 102011; \
             UPDATE stand_in.size SET shardid = 102020 WHERE shardid = 102011; \
             CREATE INDEX \"by Id\" ON events (id)",
        )
        .await;
    worker
        .psql(
            "CREATE ROLE app; GRANT app TO pgmesh_rebalance; GRANT ALL ON SCHEMA public TO app; SET ROLE app; \
             CREATE TABLE orders_2024 (id int PRIMARY KEY); CREATE TABLE orders_102008 (id int PRIMARY KEY); \
             CREATE TABLE events_102012 (id int PRIMARY KEY); CREATE TABLE events_102017 (id int PRIMARY KEY); \
             CREATE TABLE countries_102016 (id int PRIMARY KEY); CREATE TABLE events_202401 (id int); \
             CREATE TEMP TABLE events_102008 (id int)",
        )
        .await;
    assert_eq!(cluster.refused().await, []);

    // Its indexes are named as those of a shard.
    worker.psql("CREATE INDEX \"by Id_102017\" ON events_102017 (id)").await;
    let reason = "1 table on worker-2 named as shards that Citus does not know any more: public.events_102017";
    Cluster::assert_refused(&cluster.refused().await, "orphans", reason);
    let wanted = async |arguments: &[&str]| cluster.agent().run(arguments).await;
    let finished = wanted(&["cleanup", "--drop-orphans"]).await;
    finished.assert_code(1);
    worker.psql("DROP TABLE events_102017").await;

    worker.psql("SET ROLE app; CREATE TABLE events_102008 (id int)").await;
    let reason =
        "1 table on worker-2 of shards that Citus has on other nodes: public.events_102008 (0 B)";
    Cluster::assert_refused(&cluster.refused().await, "orphans", reason);
    assert_eq!(moves(&cluster.plan().await), []);
    // One that Citus is to drop.
    cluster
        .change(
            "INSERT INTO pg_dist_cleanup (operation_id, object_type, object_name, node_group_id, policy_type) \
             VALUES (1, 1, 'public.events_102008', 2, 0)",
        )
        .await;
    Cluster::assert_refused(&cluster.refused().await, "cleanup", "public.events_102008 on group 2");
    cluster.change("TRUNCATE pg_dist_cleanup").await;
    // One that somebody is about to drop.
    let busy = worker.connect().await;
    busy.batch_execute("BEGIN; LOCK TABLE events_102008").await.unwrap();
    assert_eq!(cluster.refused().await, []);
    busy.batch_execute("ROLLBACK").await.unwrap();
    // Who does not say so drops nothing.
    let finished = wanted(&["cleanup"]).await;
    finished.assert_code(1);
    let statement =
        "SET citus.enable_manual_changes_to_shards = on; DROP TABLE public.events_102008";
    assert!(finished.stderr.contains(statement), "{finished}");
    // An agent that moves says what stays, and moves nothing there.
    cluster.configure("mode = \"apply\"\n");
    let mut agent = cluster.agent().spawn(&["run"]);
    agent.logged("something is left of moves", LIMIT).await;
    let finished = agent.terminate().await;
    assert!(finished.stdout.contains("cleanup --drop-orphans"), "{finished}");
    assert!(!finished.stdout.contains("move begins"), "{finished}");
    // What may be all there is of it stays.
    cluster.change("UPDATE pg_dist_placement SET shardstate = 4 WHERE shardid = 102008").await;
    wanted(&["cleanup", "--drop-orphans"]).await.assert_code(1);
    cluster.change("UPDATE pg_dist_placement SET shardstate = 1 WHERE shardid = 102008").await;
    let tables = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class \
                  WHERE relname ~ '_[0-9]+$' AND relkind = 'r' AND relpersistence = 'p' \
                    AND relnamespace = 'public'::regnamespace";
    let others = "countries_102016 events_102012 events_202401 orders_102008 orders_2024";
    let all = format!("countries_102016 events_102008 {}", &others["countries_102016 ".len()..]);
    assert_eq!(worker.psql(tables).await.trim(), all);
    let finished = wanted(&["cleanup", "--drop-orphans"]).await;
    finished.assert_success();
    assert!(finished.stdout.contains("Dropped public.events_102008 on "), "{finished}");
    assert_eq!(worker.psql(tables).await.trim(), others);
    assert_eq!(cluster.refused().await, []);
    // What is not told is not clean.
    worker.psql("ALTER TABLE pg_dist_partition RENAME TO elsewhere").await;
    Cluster::assert_refused(
        &cluster.refused().await,
        "orphans",
        "which tables on worker-2 are of shards",
    );
    wanted(&["cleanup"]).await.assert_code(1);
}

#[tokio::test]
async fn where_the_strategy_of_citus_allows_no_shard_none_is_planned() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    assert_ne!(moves(&cluster.plan().await), []);
    cluster
        .change(
            "CREATE FUNCTION pin(shardid bigint, nodeid int) RETURNS bool LANGUAGE sql AS 'SELECT nodeid <> 12'; \
             UPDATE pg_dist_rebalance_strategy SET default_strategy = false; \
             INSERT INTO pg_dist_rebalance_strategy VALUES ('pinned', true, 'pin')",
        )
        .await;
    assert_eq!(moves(&cluster.plan().await), []);
    cluster.change("REVOKE EXECUTE ON FUNCTION pin FROM PUBLIC").await;
    let unknown = cluster.plan().await["plan_unknown"].as_str().unwrap().to_owned();
    assert!(unknown.contains("permission denied for function pin"), "{unknown}");
}

#[tokio::test]
async fn what_others_say_closes_its_gate() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let mut etcd_cluster = EtcdCluster::start(1).await;
    let endpoints = etcd_cluster.endpoints();
    let mut monitor = Monitor::of_servers(&[server(&cluster.coordinator)]).started().await;
    let monitor_config: toml::Table =
        toml::from_str(&std::fs::read_to_string(monitor.config()).unwrap()).unwrap();
    let address = monitor_config["admin_address"].as_str().unwrap();
    let keys = format!("etcd.endpoints = {endpoints:?}\nhealth.urls = [\"http://{address}\"]\n");
    cluster.configure(&keys);

    // A warning is no reason not to move shards.
    eventually("the monitor has judged", LIMIT, async || {
        ["ok", "warning"].contains(&monitor.status().await["verdict"]["status"].as_str().unwrap())
    })
    .await;
    assert_eq!(cluster.refused().await, []);

    let etcd = client(endpoints);
    etcd.put("/pgmesh/tests/activity/drill/1", "", None).await.unwrap();
    etcd.put("/pgmesh/other/activity/backup/1", "", None).await.unwrap();
    assert_eq!(cluster.refused().await, []);
    etcd.put("/pgmesh/tests/activity/backup/1", "", None).await.unwrap();
    Cluster::assert_refused(&cluster.refused().await, "activity", "a backup is under way");
    let report = cluster.plan().await;
    assert_eq!(moves(&report), [], "{report}");
    let key = etcd.get("/pgmesh/tests/activity/backup/1").await.unwrap().unwrap();
    etcd.delete(&key.key, key.create_revision).await.unwrap();

    // Unknown is not fine.
    monitor.terminate().await;
    Cluster::assert_refused(
        &cluster.refused().await,
        "health",
        "the health monitor's verdict is unknown",
    );
    cluster.configure(&keys.replace("health.urls", "# "));
    etcd_cluster.kill9(0).await;
    let refused = cluster.refused().await;
    let gates: Vec<_> = refused.iter().map(|(gate, _)| gate.as_str()).collect();
    assert_eq!(gates, ["paused", "budget", "activity"], "{refused:?}");
    assert!(refused[2].1.contains("what other agents do is unknown"), "{refused:?}");
}

/// Each keeps away from a group in which the other is at work.
#[tokio::test]
async fn a_backup_and_moves_keep_out_of_each_others_way() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let etcd_cluster = EtcdCluster::start(1).await;
    let etcd = client(etcd_cluster.endpoints());
    let cluster = Cluster::skewed().await;
    cluster.configure(&format!("etcd.endpoints = {:?}\n", etcd_cluster.endpoints()));
    // Of a server that the rebalance agent does not see: the key alone tells it.
    let slow = "[wal]\ngroup = 1\nreceive = false\n[backup]\nrate_bytes_max = 2097152\n";
    let scene = Scene::with(Kind::Directory, &format!("{slow}{}", section(&etcd_cluster))).await;
    let config = std::fs::read_to_string(scene.config()).unwrap();
    let config = config.replace("[[nodes]]\n", "[[nodes]]\ngroup = 1\n");
    write(&scene.config(), &config);
    assert_eq!(cluster.refused().await, []);

    let key = format!("{}backup/1", activities("tests"));
    let found = async || etcd.get(&key).await.unwrap();
    for ends in [true, false] {
        let mut running = scene.agent().spawn(&["backup"]);
        running.logged("base backup started", LIMIT).await;
        eventually("it is told", LIMIT, async || found().await.is_some()).await;
        assert!(found().await.unwrap().lease.is_some());
        Cluster::assert_refused(&cluster.refused().await, "activity", "a backup is under way");
        assert_eq!(moves(&cluster.plan().await), []);
        // One that may not begin takes nothing away.
        scene.run(&["backup"]).await.assert_code(1);
        assert!(found().await.is_some());
        if ends {
            running.wait().await.assert_success();
            assert_eq!(found().await, None);
        } else {
            running.kill9().await;
            eventually("its lease is over", LIMIT, async || found().await.is_none()).await;
        }
        assert_eq!(cluster.refused().await, []);
    }

    cluster.agent().run(&["drain", "1"]).await.assert_success();
    let count = async || scene.list().await.len();
    assert_eq!(count().await, 1);
    let passed_over = scene.run(&["backup"]).await;
    passed_over.assert_code(1);
    assert!(passed_over.stderr.contains("it is being drained"), "{passed_over}");
    assert_eq!(count().await, 1);
    write(
        &scene.config(),
        &config.replace("rate_bytes_max = 2097152", "schedule = \"* * * * * *\""),
    );
    let mut running = scene.agent().spawn(&["run"]);
    running.logged("no scheduled backup: the group is being drained", LIMIT).await;
    assert_eq!(count().await, 1);
    scene.run(&["backup", "--group", "1"]).await.assert_success();
    assert_eq!(count().await, 2);
    cluster.agent().run(&["undrain", "1"]).await.assert_success();
    running.logged("backup completed", LIMIT).await;
    running.terminate().await.assert_success();
}

async fn get(port: u16, path: &str) -> (u16, String) {
    let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
    let answer = client.get(format!("http://127.0.0.1:{port}{path}")).send().await;
    let Ok(answer) = answer else { return (0, String::new()) };
    (answer.status().as_u16(), answer.text().await.unwrap_or_default())
}

#[tokio::test]
async fn the_service_shows_what_it_decides_and_writes_nothing() {
    if postgres_is_missing() {
        return;
    }
    let cluster = Cluster::skewed().await;
    let before = cluster.coordinator.dump().await;
    let mut running = cluster.agent().spawn(&["run"]);
    eventually("the agent is ready", LIMIT, async || get(cluster.port, "/readyz").await.0 == 200)
        .await;
    let (_, metrics) = get(cluster.port, "/metrics").await;
    for line in [
        "pgmesh_rebalance_citus{cluster=\"tests\"} 1.0",
        "pgmesh_rebalance_imbalance_ratio{cluster=\"tests\",by=\"load\"} 0.5",
        "pgmesh_rebalance_planned_moves{cluster=\"tests\"} 2.0",
        "pgmesh_rebalance_closed{cluster=\"tests\"} 0.0",
    ] {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }
    if std::path::Path::new("/usr/bin/promtool").exists() {
        let url = format!("http://127.0.0.1:{}/metrics", cluster.port);
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let request = client.get(url).header("accept", "text/plain;version=0.0.4");
        let text = request.send().await.unwrap().text().await.unwrap();
        let checked = piped(&directory(), "/usr/bin/promtool check metrics", &text).await;
        checked.assert_success();
        assert_eq!((checked.stdout.as_str(), checked.stderr.as_str()), ("", ""), "{text}");
    } else {
        skip("promtool is not installed");
    }
    let (_, status) = get(cluster.port, "/status").await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(moves(&status).len(), 2);
    assert_eq!(status["audit"][0]["mode"], "dry_run");
    let shown = cluster.agent().run(&["status"]).await;
    shown.assert_success();
    assert!(shown.stdout.contains("2 shard groups to move, 2.0 GiB"), "{shown}");

    // A decision is told when it changes, and not each time.
    cluster.change("UPDATE pg_dist_node SET isactive = false WHERE groupid = 2").await;
    running.logged("nothing to move", LIMIT).await;
    let (_, metrics) = get(cluster.port, "/metrics").await;
    assert!(metrics.contains("pgmesh_rebalance_closed{cluster=\"tests\"} 1.0"), "{metrics}");
    cluster.change("UPDATE pg_dist_node SET isactive = true WHERE groupid = 2").await;
    let finished = running.terminate().await;
    finished.assert_success();
    let told = finished.stdout.matches("decision changed").count();
    assert!((2..=3).contains(&told), "{finished}");
    assert_eq!(cluster.coordinator.dump().await, before);
}

#[tokio::test]
async fn without_citus_the_agent_says_so_once_and_is_ready() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::primary().await;
    let said = primary.try_psql_in("postgres", ROLES).await;
    said.assert_success();
    assert!(said.stderr.contains("this database has no Citus"), "{said}");
    primary.psql(ROLES).await;
    let (directory, port) = (directory(), server_port());
    let config = directory.path().join("rebalance-agent.toml");
    let host = primary.socket_directory().display().to_string();
    let text = format!(
        "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{port}\"\ninterval = \"5s\"\n\
         [postgres]\nuser = \"pgmesh_rebalance\"\ntls = \"disable\"\n{}",
        node("a", &host, primary.port())
    );
    write(&config, &text);
    let agent = Agent::rebalance_agent(&config);
    agent.run(&["check-config"]).await.assert_success();
    let plan = agent.run(&["plan"]).await;
    plan.assert_success();
    assert!(plan.stdout.contains("no Citus in database postgres"), "{plan}");

    let running = agent.spawn(&["run"]);
    let looks = |text: &str| {
        let series = "pgmesh_rebalance_looks_total{cluster=\"tests\",outcome=\"ok\"}";
        let line = text.lines().find(|it| it.starts_with(series));
        line.and_then(|it| it.rsplit(' ').next()?.parse::<u32>().ok()).unwrap_or(0)
    };
    eventually("it has looked twice", LIMIT, async || 2 <= looks(&get(port, "/metrics").await.1))
        .await;
    assert_eq!(get(port, "/readyz").await.0, 200);
    let (_, metrics) = get(port, "/metrics").await;
    assert!(metrics.contains("pgmesh_rebalance_citus{cluster=\"tests\"} 0.0"), "{metrics}");
    let finished = running.terminate().await;
    finished.assert_success();
    assert_eq!(finished.stdout.matches("no Citus in the database").count(), 1, "{finished}");
}
