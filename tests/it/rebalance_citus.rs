//! What the rebalance agent does to a real Citus, where one is installed: see `tests/run.sh --help`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{Timelike as _, Utc};
use harness::postgres::{installation, postgres_is_missing};
use harness::{
    Agent, EtcdCluster, PgServer, directory, etcd_is_missing, eventually, server_port, skip,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::exporter::server;
use crate::scene::write;

const LIMIT: Duration = Duration::from_mins(2);
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const ROLES: &str = include_str!("../../init-scripts/10-roles.sql");

fn citus_is_missing() -> bool {
    if postgres_is_missing() {
        return true;
    }
    let extensions = Path::new("/usr/share/postgresql").join(installation().major().to_string());
    let is_missing = !extensions.join("extension/citus.control").exists();
    if is_missing {
        skip("Citus is not installed; PGMESH_TEST_CITUS_IMAGE names an image that has it");
    }
    is_missing
}

/// A coordinator and workers.
struct Citus {
    nodes: Vec<PgServer>,
    directory: TempDir,
    port: u16,
}

async fn node(name: &str) -> PgServer {
    let server = PgServer::builder()
        .name(name)
        .tcp()
        .hba("host all all 127.0.0.1/32 trust")
        .hba("host all all ::1/128 trust")
        .setting("shared_preload_libraries", "citus")
        .setting("wal_level", "logical")
        .setting("max_worker_processes", "30")
        .setting("citus.node_conninfo", "sslmode=prefer")
        .primary()
        .await;
    server.psql("CREATE EXTENSION citus").await;
    server
}

impl Citus {
    /// All data on the first two of three workers, and a fourth that has just come.
    async fn skewed() -> Self {
        let mut nodes = Vec::new();
        for name in ["coordinator", "worker-1", "worker-2", "worker-3", "worker-4"] {
            nodes.push(node(name).await);
        }
        let it = Self { nodes, directory: directory(), port: server_port() };
        let coordinator = it.coordinator();
        let port = coordinator.port();
        coordinator.psql(&format!("SELECT citus_set_coordinator_host('127.0.0.1', {port})")).await;
        for index in 1..4 {
            it.add(index).await;
        }
        coordinator
            .psql(
                "CREATE ROLE app LOGIN; GRANT ALL ON SCHEMA public TO app; SET ROLE app; \
                 SET citus.shard_count = 8; \
                 CREATE TABLE events (id bigint PRIMARY KEY, text text); \
                 CREATE TABLE log (id bigint PRIMARY KEY, text text); \
                 CREATE TABLE countries (id int PRIMARY KEY, text text); \
                 SELECT create_distributed_table('events', 'id'); \
                 SELECT create_distributed_table('log', 'id', colocate_with => 'events'); \
                 SELECT create_reference_table('countries'); \
                 INSERT INTO countries SELECT id, 'text' FROM generate_series(1, 200) AS id; \
                 INSERT INTO events SELECT id, repeat(md5(id::text), 8) \
                   FROM generate_series(1, 400000) AS id; \
                 INSERT INTO log SELECT id, md5(id::text) FROM generate_series(1, 100000) AS id",
            )
            .await;
        coordinator.psql(ROLES).await;
        coordinator
            .psql(
                "SELECT citus_move_shard_placement(shardid, node.nodeid, \
                   (SELECT nodeid FROM pg_dist_node WHERE groupid = 1 + shardid % 2), 'block_writes') \
                   FROM pg_dist_shard JOIN pg_dist_placement USING (shardid) \
                   JOIN pg_dist_node AS node USING (groupid) \
                  WHERE logicalrelid = 'events'::regclass AND groupid = 3",
            )
            .await;
        it.add(4).await;
        coordinator.psql("CALL citus_cleanup_orphaned_resources()").await;
        it.configure("");
        it
    }

    fn coordinator(&self) -> &PgServer {
        &self.nodes[0]
    }

    async fn add(&self, index: usize) {
        let port = self.nodes[index].port();
        self.coordinator().psql(&format!("SELECT citus_add_node('127.0.0.1', {port})")).await;
    }

    fn configure(&self, extra: &str) {
        let text = format!(
            "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{}\"\ninterval = \"5s\"\n\
             mode = \"apply\"\napply.pause = \"0s\"\n{extra}\
             [postgres]\nuser = \"pgmesh_rebalance\"\ntls = \"disable\"\n{}",
            self.port,
            server(self.coordinator())
        );
        write(&self.directory.path().join("rebalance-agent.toml"), &text);
    }

    fn agent(&self) -> Agent {
        let config = self.directory.path().join("rebalance-agent.toml");
        Agent::rebalance_agent(&config).limit(LIMIT)
    }

    /// What every table holds, without what the writers add.
    async fn content(&self) -> String {
        let sum = "count(*), sum(hashtextextended(id::text || text, 0)::numeric)";
        self.coordinator()
            .psql(&format!(
                "SELECT {sum} FROM events WHERE id <= 400000 UNION ALL SELECT {sum} FROM log \
                 UNION ALL SELECT {sum} FROM countries"
            ))
            .await
    }

    /// Whether all is where it belongs, and nothing is left of moves.
    async fn is_settled(&self) -> bool {
        let finished = self.agent().run(&["plan", "--json"]).await;
        let Ok(report) = serde_json::from_str::<Value>(&finished.stdout) else { return false };
        let is_empty = |it: &Value| it.as_array().is_some_and(Vec::is_empty);
        is_empty(&report["refusals"]) && is_empty(&report["plan"]["moves"])
    }

    async fn settles(&self) {
        eventually("all is where it belongs", LIMIT, async || self.is_settled().await).await;
    }

    async fn is_moving(&self) -> bool {
        let sql = "SELECT count(*) FROM pg_stat_activity \
                   WHERE query LIKE 'SELECT citus_move%' AND state = 'active'";
        let count: i64 =
            self.coordinator().connect().await.query_one(sql, &[]).await.unwrap().get(0);
        count == 1
    }

    /// What is left of moves, on any node.
    async fn leftovers(&self) -> String {
        let mut left = String::new();
        for node in &self.nodes {
            left += &node
                .psql(
                    "SELECT slot_name FROM pg_replication_slots UNION ALL \
                     SELECT pubname FROM pg_publication UNION ALL SELECT subname FROM pg_subscription",
                )
                .await;
        }
        left
    }

    /// Shard groups on a group of servers.
    async fn shards_on(&self, group: i32) -> i64 {
        let sql = "SELECT count(*) FROM pg_dist_placement JOIN pg_dist_shard USING (shardid) \
                   WHERE logicalrelid = 'events'::regclass AND groupid = $1";
        self.coordinator().connect().await.query_one(sql, &[&group]).await.unwrap().get(0)
    }
}

/// Writes to all shards, and knows how long it waited at most.
struct Writers {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<(i64, Duration)>,
}

impl Writers {
    async fn start(citus: &Citus) -> Self {
        Self::to(citus, "events", Some(5000)).await
    }

    /// `rows`: as many as each of them writes, again and again. Of a reference table each writes new ones only:
    /// whoever changes one waits there for all others, whatever is copied.
    async fn to(citus: &Citus, table: &str, rows: Option<i64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for writer in 1..=4_i64 {
            let client = citus.coordinator().connect_as("app", "postgres").await;
            let stop = Arc::clone(&stop);
            let again = rows.map_or("", |_| "ON CONFLICT (id) DO UPDATE SET text = 'again'");
            let sql = format!("INSERT INTO {table} VALUES ($1::bigint, 'new') {again}");
            tasks.spawn(async move {
                let (mut count, mut longest) = (0_i64, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let id = writer * 1_000_000 + rows.map_or(count, |rows| count % rows);
                    client.execute(&sql, &[&id]).await.unwrap();
                    longest = longest.max(began.elapsed());
                    count += 1;
                    sleep(Duration::from_millis(5)).await;
                }
                (count, longest)
            });
        }
        Self { stop, tasks }
    }

    /// The longest that one of them waited. None of them failed.
    async fn longest(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        for (count, waited) in self.tasks.join_all().await {
            assert!(0 < count);
            longest = longest.max(waited);
        }
        longest
    }
}

#[tokio::test]
async fn a_new_worker_is_filled_and_writers_hardly_wait() {
    if citus_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let before = citus.content().await;
    let writers = Writers::start(&citus).await;
    let agent = citus.agent().spawn(&["run"]);
    citus.settles().await;
    let longest = writers.longest().await;
    println!("moves: a writer waited {longest:?} at most");
    assert!(longest < LOCK_TIMEOUT + Duration::from_millis(500), "{longest:?}");
    for group in 1..=4 {
        assert_eq!(citus.shards_on(group).await, 2, "group {group}");
    }
    assert_eq!(citus.content().await, before);
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(finished.stdout.contains("\"why\":\"reference_tables\""), "{finished}");
}

#[tokio::test]
async fn a_transaction_that_stays_open_holds_writers_up_for_the_lock_timeout_only() {
    if citus_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let writers = Writers::start(&citus).await;
    let agent = citus.agent().spawn(&["run"]);
    // From the first copy on: a move waits for what was open before it began.
    eventually("a move begins", LIMIT, async || citus.is_moving().await).await;
    let holder = citus.coordinator().connect_as("app", "postgres").await;
    sleep(Duration::from_millis(200)).await;
    holder
        .batch_execute("BEGIN; UPDATE events SET text = text WHERE id BETWEEN 1 AND 100")
        .await
        .unwrap();
    sleep(Duration::from_secs(10)).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    citus.settles().await;
    let longest = writers.longest().await;
    println!("moves, beside an open transaction: a writer waited {longest:?} at most");
    assert!(longest < LOCK_TIMEOUT + Duration::from_millis(500), "{longest:?}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn what_is_killed_in_the_middle_leaves_nothing_behind() {
    if citus_is_missing() {
        return;
    }
    let mut citus = Citus::skewed().await;
    let before = citus.content().await;
    // The agent, then both possible sources, then the coordinator.
    for killed in [None, Some(vec![1, 2]), Some(vec![0])] {
        let agent = citus.agent().spawn(&["run"]);
        eventually("a move begins", LIMIT, async || {
            citus.is_moving().await || citus.is_settled().await
        })
        .await;
        let Some(nodes) = killed else {
            agent.kill9().await;
            continue;
        };
        for index in nodes {
            citus.nodes[index].kill9().await;
            sleep(Duration::from_secs(1)).await;
            citus.nodes[index].start().await;
        }
        agent.terminate().await.assert_success();
    }
    let agent = citus.agent().spawn(&["run"]);
    citus.settles().await;
    agent.terminate().await.assert_success();
    assert_eq!(citus.content().await, before);
    assert_eq!(citus.leftovers().await, "");
}

/// The same by a job of Citus.
#[tokio::test]
async fn a_job_is_stopped_at_the_end_of_its_window_and_balances_in_the_next() {
    if citus_is_missing() || etcd_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let before = citus.content().await;
    let etcd = EtcdCluster::start(1).await;
    let configure = |citus: &Citus, schedule: &str| {
        citus.configure(&format!(
            "apply.engine = \"job\"\nbalance.strategy = \"citus\"\netcd.endpoints = {:?}\n\
             window = {{ schedule = \"{schedule}\", length = \"1m\" }}\n",
            etcd.endpoints()
        ));
    };
    eventually("a minute begins", LIMIT, async || Utc::now().second() < 10).await;
    configure(&citus, &format!("{} * * * *", Utc::now().minute()));
    let writers = Writers::start(&citus).await;
    let mut agent = citus.agent().spawn(&["run"]);
    agent.logged("job begins", LIMIT).await;
    // Its first move waits for these, and keeps nobody waiting.
    let mut holders = Vec::new();
    for node in &citus.nodes[1..3] {
        let holder = node.connect().await;
        holder.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        holders.push(holder);
    }
    agent.logged("job ended", LIMIT).await;
    drop(holders);
    let stopped = citus.coordinator().psql("SELECT state FROM pg_dist_background_job").await;
    assert_eq!(stopped.trim(), "cancelled");
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(finished.stdout.contains("the window is closed; 0 of 4 moves are done"), "{finished}");
    eventually("it is clean", LIMIT, async || citus.leftovers().await.is_empty()).await;

    // In the next it is killed, and the next one watches what it began.
    configure(&citus, "* * * * *");
    let mut agent = citus.agent().spawn(&["run"]);
    agent.logged("job begins", LIMIT).await;
    agent.kill9().await;
    let agent = citus.agent().spawn(&["run"]);
    citus.settles().await;
    let longest = writers.longest().await;
    println!("a job: a writer waited {longest:?} at most");
    assert!(longest < LOCK_TIMEOUT + Duration::from_secs(1), "{longest:?}");
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(finished.stdout.contains("\"outcome\":\"moved\""), "{finished}");
    let states = "SELECT string_agg(state::text, ' ' ORDER BY job_id) FROM pg_dist_background_job";
    assert_eq!(citus.coordinator().psql(states).await.trim(), "cancelled finished");
    for group in 1..=4 {
        assert_eq!(citus.shards_on(group).await, 2, "group {group}");
    }
    assert_eq!(citus.content().await, before);
    assert_eq!(citus.leftovers().await, "");
}

/// The bound is that of a move, and a little more: Citus copies them in a session of its own, which is watched.
#[tokio::test]
async fn writers_of_a_reference_table_hardly_wait_while_it_is_copied() {
    if citus_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let coordinator = citus.coordinator();
    coordinator
        .psql("INSERT INTO countries SELECT id, repeat(md5(id::text), 8) FROM generate_series(1000, 300000) AS id")
        .await;
    let writers = Writers::to(&citus, "countries", None).await;
    let mut agent = citus.agent().spawn(&["run"]);
    agent.logged("\"why\":\"reference_tables\"", LIMIT).await;
    // What it finds open at its end.
    sleep(Duration::from_millis(500)).await;
    let holder = coordinator.connect_as("app", "postgres").await;
    holder.batch_execute("BEGIN; INSERT INTO countries VALUES (0, 'text')").await.unwrap();
    sleep(Duration::from_secs(12)).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    let beside = writers.longest().await;
    println!(
        "a copy of a reference table beside an open transaction: a writer waited {beside:?} at most"
    );
    let rests = async || !citus.is_moving().await;
    eventually("nothing is moved", LIMIT, rests).await;
    agent.terminate().await.assert_success();
    // Another one does not know that it rests.
    coordinator.psql("DELETE FROM countries WHERE id >= 1000000").await;
    let writers = Writers::to(&citus, "countries", None).await;
    let agent = citus.agent().spawn(&["run"]);
    citus.settles().await;
    let longest = writers.longest().await;
    println!(
        "a copy of a reference table: a writer waited {longest:?} at most, {beside:?} beside an open transaction"
    );
    assert!(longest.max(beside) < LOCK_TIMEOUT + Duration::from_secs(1), "{longest:?} {beside:?}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_drained_worker_can_be_removed() {
    if citus_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let before = citus.content().await;
    let address = format!("127.0.0.1:{}", citus.nodes[1].port());
    let finished = citus.agent().run(&["drain", &address]).await;
    finished.assert_success();
    assert_eq!(citus.shards_on(1).await, 0);
    // As it says, for a superuser.
    let property = format!(
        "SELECT citus_set_node_property('127.0.0.1', {}, 'shouldhaveshards', false)",
        citus.nodes[1].port()
    );
    assert!(finished.stdout.contains(&property), "{finished}");
    citus.coordinator().psql(&property).await;
    let status = citus.agent().run(&["drain", &address]).await;
    assert!(status.stdout.contains("it is empty: it can be removed"), "{status}");
    let remove = format!("SELECT citus_remove_node('127.0.0.1', {})", citus.nodes[1].port());
    citus.coordinator().psql(&remove).await;
    assert_eq!(citus.content().await, before);
}

/// As after a restore of a worker. Citus hides it from who looks for it, and lets nobody drop it by its name alone.
#[tokio::test]
async fn a_shard_that_is_not_there_is_named_and_dropped_when_that_is_wanted() {
    if citus_is_missing() {
        return;
    }
    let citus = Citus::skewed().await;
    let before = citus.content().await;
    let shard = "SELECT min(shardid) FROM pg_dist_shard JOIN pg_dist_placement USING (shardid) \
                 WHERE logicalrelid = 'events'::regclass AND groupid = 1";
    let shard = citus.coordinator().psql(shard).await.trim().to_owned();
    let worker = &citus.nodes[3];
    let create = |name: &str| {
        format!(
            "SET citus.enable_manual_changes_to_shards = on; SET ROLE app; \
             CREATE TABLE {name}_{shard} (id bigint PRIMARY KEY, text text); \
             INSERT INTO {name}_{shard} VALUES (1, 'text')"
        )
    };
    let finished = citus.agent().run(&["cleanup"]).await;
    finished.assert_success();
    worker.psql(&create("orders")).await;
    citus.agent().run(&["cleanup"]).await.assert_success();
    worker.psql(&create("events")).await;
    let finished = citus.agent().run(&["cleanup"]).await;
    finished.assert_code(1);
    let statement =
        format!("SET citus.enable_manual_changes_to_shards = on; DROP TABLE public.events_{shard}");
    assert!(finished.stderr.contains(&statement), "{finished}");
    let finished = citus.agent().run(&["cleanup", "--drop-orphans"]).await;
    finished.assert_success();
    let left = format!("SELECT to_regclass('events_{shard}'), to_regclass('orders_{shard}')");
    assert_eq!(worker.psql(&left).await.trim(), format!("|orders_{shard}"));
    assert_eq!(citus.content().await, before);
}
