//! What the rebalance agent has Citus move as one background job, and how it stops that. Citus is a stand-in, as
//! in `rebalance_plan`.

use std::time::Duration;

use chrono::{Timelike as _, Utc};
use harness::postgres::postgres_is_missing;
use harness::{EtcdCluster, PgServer, RunningAgent, etcd_is_missing, eventually, server_port};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::rebalance_apply::APPLY;
use crate::rebalance_plan::Cluster;

const LIMIT: Duration = Duration::from_secs(40);
/// It is open at any time: each minute for an hour.
const ALWAYS: &str = "window = { schedule = \"* * * * *\", length = \"1h\" }\n";

/// A cluster of whose four shard groups Citus would move two, and its background worker.
struct Jobs {
    cluster: Cluster,
    etcd: EtcdCluster,
    _worker: JoinSet<()>,
}

impl Jobs {
    async fn planned(extra: &str) -> Self {
        let cluster = Cluster::skewed().await;
        cluster
            .change(
                "INSERT INTO stand_in.plan VALUES \
                 (102010, 11, 12), (102014, 11, 12), (102011, 11, 12), (102015, 11, 12)",
            )
            .await;
        let worker = work(&cluster.coordinator).await;
        let it = Self { cluster, etcd: EtcdCluster::start(1).await, _worker: worker };
        it.configure(extra);
        it
    }

    fn configure(&self, extra: &str) {
        self.configure_as(APPLY, extra);
    }

    fn configure_as(&self, mode: &str, extra: &str) {
        let window = if extra.contains("window = ") { "" } else { ALWAYS };
        self.cluster.configure(&format!(
            "{mode}{window}apply.engine = \"job\"\nbalance.strategy = \"citus\"\n\
             etcd.endpoints = {:?}\n{extra}",
            self.etcd.endpoints()
        ));
    }

    async fn sql(&self, sql: &str) -> String {
        self.cluster.coordinator.psql(sql).await.trim().to_owned()
    }

    /// The states of all jobs, and of their tasks.
    async fn states(&self) -> String {
        self.sql(
            "SELECT string_agg(job_id || ' ' || state || ': ' || (SELECT string_agg(status::text, ' ' ORDER BY task_id) \
                    FROM pg_dist_background_task AS task WHERE task.job_id = job.job_id), ', ' ORDER BY job_id) \
               FROM pg_dist_background_job AS job",
        )
        .await
    }

    async fn are(&self, expected: &str) {
        let mut found = String::new();
        eventually(expected, LIMIT, async || {
            found = self.states().await;
            found == expected
        })
        .await;
    }

    /// Begins a job whose first move takes for ever.
    async fn begins(&self) -> RunningAgent {
        self.cluster.copies_for(300).await;
        let agent = self.cluster.starts();
        self.are("1 running: running blocked").await;
        agent
    }

    async fn status(&self) -> String {
        self.cluster.agent().run(&["status"]).await.stdout
    }
}

/// What a background worker of Citus does. Its sessions are those of the role, as there.
async fn work(coordinator: &PgServer) -> JoinSet<()> {
    let client = coordinator.connect_as("pgmesh_rebalance", "postgres").await;
    let mut worker = JoinSet::new();
    worker.spawn(async move {
        // A signal that comes late ends it between two tasks.
        while !client.is_closed() {
            client.batch_execute("CALL stand_in.work()").await.ok();
            sleep(Duration::from_millis(100)).await;
        }
    });
    worker
}

fn is_missing() -> bool {
    postgres_is_missing() || etcd_is_missing()
}

#[tokio::test]
async fn all_that_citus_plans_is_moved_as_one_job() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("budget.moves_per_day = 1\n").await;
    let text = jobs.cluster.agent().run(&["plan"]).await.stdout;
    let words = "No job begins: a job moves all that Citus plans, and shard 102011 stays: the budget allows no \
                 more moves.";
    assert!(text.contains(words), "{text}");
    jobs.configure("");
    // What a node lacks comes first, by itself: as a task it would be a superuser's.
    jobs.cluster.is_bare().await;
    let agent = jobs.cluster.starts();
    jobs.are("1 finished: done done").await;
    assert_eq!(jobs.cluster.places().await, [1, 1, 2, 2]);
    eventually("all is told", LIMIT, async || {
        let ends = jobs.cluster.ends().await;
        ends.len() == 2 && ends.iter().all(|it| it.0 == "moved")
    })
    .await;
    let status = jobs.status().await;
    assert!(status.contains("job 1: 2"), "{status}");
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(!finished.stdout.contains("WARN"), "{finished}");
    assert!(finished.stdout.contains("to move as one job"), "{finished}");
    assert_eq!(jobs.states().await, "1 finished: done done");
}

/// What it would do next must not be begun: that is a reason to stop.
#[tokio::test]
async fn a_gate_that_keeps_moves_from_beginning_ends_a_job() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let agent = jobs.begins().await;
    jobs.etcd.etcdctl(&["put", "/pgmesh/tests/activity/backup/2", "{}"]).await.assert_success();
    jobs.are("1 cancelled: cancelled cancelled").await;
    let reason = jobs.cluster.ended("closed").await;
    assert!(reason.starts_with("a backup is under way; 0 of 2 moves are done"), "{reason}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_job_is_watched_by_one_that_moves_nothing_if_nobody_else_does() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let agent = jobs.begins().await;
    agent.kill9().await;
    jobs.configure_as(&APPLY.replace("\"apply\"", "\"dry_run\""), "");
    let agent = jobs.cluster.starts();
    sleep(Duration::from_secs(8)).await;
    assert_eq!(jobs.states().await, "1 running: running blocked");
    jobs.cluster.agent().run(&["pause", "--comment", "stop it"]).await.assert_success();
    jobs.are("1 cancelled: cancelled cancelled").await;
    let reason = jobs.cluster.ended("stopped").await;
    assert!(reason.starts_with("paused: stop it; "), "{reason}");
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_job_ends_with_its_window() {
    if is_missing() {
        return;
    }
    // One minute, of which something is left.
    let jobs = Jobs::planned("").await;
    eventually("a minute begins", Duration::from_mins(1), async || Utc::now().second() < 25).await;
    let now = Utc::now();
    let schedule = format!("{} {} * * *", now.minute(), now.hour());
    jobs.configure(&format!("window = {{ schedule = \"{schedule}\", length = \"1m\" }}\n"));
    let agent = jobs.begins().await;
    eventually("it ends", Duration::from_secs(75), async || {
        jobs.states().await == "1 cancelled: cancelled cancelled"
    })
    .await;
    assert_ne!(Utc::now().minute(), now.minute());
    let reason = jobs.cluster.ended("stopped").await;
    assert_eq!(reason, "the window is closed; 0 of 2 moves are done");
    jobs.cluster.copies_for(0).await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(jobs.states().await, "1 cancelled: cancelled cancelled");
    assert_eq!(jobs.cluster.places().await, [1; 4]);
    agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_pause_and_a_stop_of_the_agent_end_a_job() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let agent = jobs.begins().await;
    eventually("it is shown", LIMIT, async || {
        let status = jobs.status().await;
        status.contains("Moves job 1: 2 shard groups since ")
            && status.contains(": 0 of 2 moves are done, Copying Data")
    })
    .await;
    jobs.cluster.agent().run(&["pause", "--comment", "an upgrade"]).await.assert_success();
    jobs.are("1 cancelled: cancelled cancelled").await;
    let reason = jobs.cluster.ended("stopped").await;
    assert_eq!(reason, "paused: an upgrade; 0 of 2 moves are done");
    jobs.cluster.agent().run(&["resume"]).await.assert_success();
    jobs.are("1 cancelled: cancelled cancelled, 2 running: running blocked").await;
    let began = Instant::now();
    let finished = agent.terminate().await;
    finished.assert_success();
    assert!(began.elapsed() < Duration::from_secs(10), "{finished}");
    let words = "the agent stops; 0 of 2 moves are done";
    assert!(finished.stdout.contains(words), "{finished}");
    let both = "1 cancelled: cancelled cancelled, 2 cancelled: cancelled cancelled";
    assert_eq!(jobs.states().await, both);
}

#[tokio::test]
async fn a_job_outlives_its_agent_and_is_known_again() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let agent = jobs.begins().await;
    agent.kill9().await;
    assert_eq!(jobs.states().await, "1 running: running blocked");
    // It ends while nobody looks, and somebody says so.
    let mut agent = jobs.cluster.starts();
    agent.logged("job is watched", LIMIT).await;
    agent.kill9().await;
    jobs.cluster.copies_for(0).await;
    jobs.sql("SELECT pg_cancel_backend(pid) FROM pg_dist_background_task WHERE status = 'running'")
        .await;
    jobs.are("1 finished: done done").await;
    let agent = jobs.cluster.starts();
    assert_eq!(jobs.cluster.ended("moved").await, "");
    let finished = agent.terminate().await;
    finished.assert_success();
    assert_eq!(finished.stdout.matches("job begins").count(), 0, "{finished}");
    assert_eq!(jobs.cluster.places().await, [1, 1, 2, 2]);
}

/// One that was stopped past its lease finds that another leads; one that cannot ask finds nobody.
#[tokio::test]
async fn a_job_is_left_to_who_leads_and_stopped_where_nobody_does() {
    if is_missing() {
        return;
    }
    let mut jobs = Jobs::planned("").await;
    let mut first = jobs.begins().await;
    jobs.cluster.port = server_port();
    jobs.configure("");
    let mut second = jobs.cluster.starts();
    second.logged("agent started", LIMIT).await;
    first.sigstop();
    second.logged("job is watched", LIMIT).await;
    first.sigcont();
    first.logged(" leads, and watches it", LIMIT).await;
    sleep(Duration::from_secs(3)).await;
    assert_eq!(jobs.states().await, "1 running: running blocked");
    first.terminate().await.assert_success();
    assert_eq!(jobs.states().await, "1 running: running blocked");
    jobs.etcd.kill9(0).await;
    jobs.are("1 cancelled: cancelled cancelled").await;
    second.logged("another replica may lead: the lease was not renewed", LIMIT).await;
    second.kill9().await;
}

#[tokio::test]
async fn a_job_goes_on_after_a_failover_of_the_coordinator() {
    if is_missing() {
        return;
    }
    let mut jobs = Jobs::planned("").await;
    let (standby, member) = jobs.cluster.coordinators().await;
    jobs.configure(&member);
    let agent = jobs.begins().await;
    standby.catch_up(&jobs.cluster.coordinator).await;
    jobs.cluster.coordinator.kill9().await;
    standby.promote().await;
    let _old = jobs.cluster.has_new_coordinator(standby).await;
    // As Citus does when it finds that its processes are gone.
    jobs.sql("UPDATE pg_dist_background_task SET status = 'runnable' WHERE status = 'running'")
        .await;
    let _worker = work(&jobs.cluster.coordinator).await;
    jobs.are("1 finished: done done").await;
    assert_eq!(jobs.cluster.ended("moved").await, "");
    let finished = agent.terminate().await;
    finished.assert_success();
    assert_eq!(finished.stdout.matches("job begins").count(), 1, "{finished}");
    assert!(1 < finished.stdout.matches("job is watched\"").count(), "{finished}");
}

#[tokio::test]
async fn the_job_of_somebody_else_is_left_alone() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    jobs.cluster.copies_for(300).await;
    jobs.sql("SELECT citus_rebalance_start()").await;
    let agent = jobs.cluster.starts();
    eventually("the gate is closed", LIMIT, async || {
        jobs.status().await.contains("job 1 is running: Rebalance all colocation groups")
    })
    .await;
    agent.terminate().await.assert_success();
    assert_eq!(jobs.states().await, "1 running: running blocked");
    assert_eq!(jobs.cluster.ends().await, []);
}

#[tokio::test]
async fn a_job_that_stands_still_is_stopped() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("apply.stall_timeout = \"30s\"\n").await;
    let agent = jobs.begins().await;
    eventually("it ends", LIMIT * 2, async || {
        jobs.states().await == "1 cancelled: cancelled cancelled"
    })
    .await;
    let reason = jobs.cluster.ended("failed").await;
    assert_eq!(reason, "it stands still for 30s in Copying Data; 0 of 2 moves are done");
    // It rests for a minute.
    jobs.cluster.copies_for(0).await;
    sleep(Duration::from_secs(6)).await;
    let status = jobs.status().await;
    assert!(
        status.contains("none begins until ") && status.contains("the last job failed"),
        "{status}"
    );
    agent.terminate().await.assert_success();
    assert_eq!(jobs.states().await, "1 cancelled: cancelled cancelled");
}

#[tokio::test]
async fn a_job_keeps_writers_waiting_no_longer_than_a_move() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let coordinator = &jobs.cluster.coordinator;
    jobs.cluster.copies_for(2).await;
    // Locks that are got, and kept.
    jobs.sql("UPDATE stand_in.copying SET locked_seconds = 300").await;
    let agent = jobs.cluster.starts();
    jobs.are("1 running: running blocked").await;
    let longest = writes(coordinator, Duration::from_secs(8)).await;
    assert!(longest < Duration::from_millis(2500), "{longest:?}");
    assert!(Duration::from_millis(900) < longest, "it never came to its locks: {longest:?}");
    let reason = jobs.cluster.ended("no_lock").await;
    assert_eq!(reason, "it kept writers waiting for 1s in Final Catchup; 0 of 2 moves are done");
    assert_eq!(jobs.states().await, "1 cancelled: cancelled cancelled");
    // Locks that are not got: Citus tries again, and the second time is the last.
    jobs.sql("UPDATE stand_in.copying SET locked_seconds = 0").await;
    let holder = coordinator.connect().await;
    let lock = "BEGIN; LOCK TABLE stand_in.cutover IN ROW EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    jobs.cluster.agent().run(&["resume"]).await.assert_success();
    jobs.are("1 cancelled: cancelled cancelled, 2 running: running blocked").await;
    let longest = writes(coordinator, Duration::from_secs(12)).await;
    assert!(longest < Duration::from_millis(1500), "{longest:?}");
    let both = "1 cancelled: cancelled cancelled, 2 cancelled: cancelled cancelled";
    jobs.are(both).await;
    eventually("it is told", LIMIT, async || {
        let (outcome, reason) = jobs.cluster.ends().await.swap_remove(0);
        outcome == "no_lock"
            && reason.contains("one failed 2 times: ERROR: canceling statement due to lock timeout")
    })
    .await;
    agent.terminate().await.assert_success();
}

/// The longest that a writer waited within that time.
async fn writes(coordinator: &PgServer, length: Duration) -> Duration {
    let writer = coordinator.connect().await;
    let (until, mut longest) = (Instant::now() + length, Duration::ZERO);
    while Instant::now() < until {
        let began = Instant::now();
        writer.batch_execute("INSERT INTO stand_in.cutover DEFAULT VALUES").await.unwrap();
        longest = longest.max(began.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    longest
}

#[tokio::test]
async fn a_job_that_cannot_begin_or_fails_is_told() {
    if is_missing() {
        return;
    }
    let jobs = Jobs::planned("").await;
    let resumes = async || {
        jobs.cluster.agent().run(&["resume"]).await.assert_success();
    };
    let told = async |outcome: &str, words: &str| {
        eventually(words, LIMIT, async || {
            let last = jobs.cluster.ends().await.into_iter().next();
            last.is_some_and(|it| it.0 == outcome && it.1.contains(words))
        })
        .await;
    };
    // Without it, writers would wait for as long as a transaction that has written is open.
    jobs.sql("ALTER ROLE pgmesh_rebalance RESET lock_timeout").await;
    let agent = jobs.cluster.starts();
    told("failed", "ALTER ROLE pgmesh_rebalance SET lock_timeout = '1000ms'").await;
    jobs.sql("ALTER ROLE pgmesh_rebalance SET lock_timeout = '500ms'").await;

    // What is not as it was planned a moment ago.
    jobs.sql(
        "CREATE FUNCTION stand_in.other() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN NEW.command := ''SELECT pg_catalog.replicate_reference_tables(''''auto'''')''; RETURN NEW; END'; \
         SET allow_system_table_mods = on; \
         CREATE TRIGGER other BEFORE INSERT ON pg_dist_background_task \
             FOR EACH ROW EXECUTE FUNCTION stand_in.other()",
    )
    .await;
    resumes().await;
    told("failed", "Citus would do something that is no move of a shard, too").await;
    jobs.sql("SET allow_system_table_mods = on; DROP TRIGGER other ON pg_dist_background_task")
        .await;
    assert_eq!(jobs.states().await, "");

    let failure = "Could not fetch disk stats for node: w4-5432";
    jobs.sql(&format!(
        "INSERT INTO stand_in.failure VALUES ('citus_move_shard_placement', '{failure}')"
    ))
    .await;
    resumes().await;
    told(
        "failed",
        &format!("0 of 2 moves are done, and one failed 2 times: ERROR: {failure}; see the logs"),
    )
    .await;
    assert_eq!(jobs.cluster.places().await, [1; 4]);
    let finished = agent.terminate().await;
    finished.assert_success();
    assert_eq!(finished.stdout.matches("job not begun").count(), 2, "{finished}");
}
