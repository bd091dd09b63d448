//! The lag that the exporter tells, compared with the truth, in each situation in which exporters
//! are known to be wrong.
//!
//! The truth is the age of the first committed row that is not visible on the standby. The test
//! commits numbered rows, one after the other, and looks for them on the standby all the time. It
//! knows a commit only as a moment between sending it and its answer, and a look likewise, so its
//! truth is an interval too: that, and [`ERROR`], is what it allows itself.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::postgres::postgres_is_missing;
use harness::{PgServer, Proxy, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use crate::exporter::{Exporter, INTERVAL, LIMIT, Scrape, server};

/// Between two commits under load.
const COMMIT_EVERY: Duration = Duration::from_millis(50);
/// Between two looks, and between two scrapes.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const SCRAPE_EVERY: Duration = Duration::from_millis(60);
/// What two threads and two processes on a busy machine may take between reading the clock and what
/// they read it for, in seconds.
const ERROR: f64 = 0.02;
/// A standby's answer may be so much older than its arrival, and meanwhile it may have caught up.
const ROUND_TRIP: f64 = 0.1;

/// What `postgres_exporter` answers, by its query.
const POSTGRES_EXPORTER: &str = "
    SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
           ELSE greatest(0, extract(epoch FROM now() - pg_last_xact_replay_timestamp()))
           END::float8";
const REPLAY_LAG: &str = "
    SELECT extract(epoch FROM replay_lag)::float8 FROM pg_stat_replication
     WHERE application_name = 'standby'";
/// The standby has a part of a record that it cannot replay.
pub(crate) const PARTIAL_RECORD: &str = "
    SELECT (pg_last_wal_receive_lsn() - '0/0') % 8192 = 0
           AND pg_last_wal_replay_lsn() < pg_last_wal_receive_lsn()";

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// What the test knows itself. All moments by the clock of this machine.
#[derive(Debug, Default)]
struct Truth {
    /// When the row was sent and when it was known to be committed; the first is row 1.
    commits: Vec<(f64, f64)>,
    /// When was looked, and which row was the last to be seen.
    looks: Vec<(f64, f64, usize)>,
}

impl Truth {
    /// The least and the greatest that the lag can have been at a moment.
    fn at(&self, moment: f64) -> Option<(f64, f64)> {
        let after = self.looks.partition_point(|(asked, ..)| *asked < moment);
        let before = self.looks[..after].iter().rev().find(|(_, answered, _)| *answered <= moment);
        // The first that is not visible is the one after the last that is.
        let first_missing = |last: usize| self.commits.get(last);
        let greatest = first_missing(before?.2).map_or(0.0, |(sent, _)| moment - sent);
        let least =
            first_missing(self.looks.get(after)?.2).map_or(0.0, |(_, known)| moment - known);
        Some((least.max(0.0), greatest.max(0.0)))
    }

    /// The greatest error of what somebody else answered.
    fn worst(&self, answers: impl Iterator<Item = (f64, Option<f64>)>) -> f64 {
        let error = |(moment, answer): (f64, Option<f64>)| {
            let ((least, greatest), answer) = (self.at(moment)?, answer?);
            Some((least - answer).max(answer - greatest))
        };
        answers.filter_map(error).fold(0.0, f64::max)
    }
}

async fn commit(client: &Client, truth: &Mutex<Truth>) {
    let id = i32::try_from(truth.lock().unwrap().commits.len() + 1).unwrap();
    let sent = now();
    client.execute("INSERT INTO marks VALUES ($1)", &[&id]).await.unwrap();
    truth.lock().unwrap().commits.push((sent, now()));
}

/// Commits rows while it is told to.
async fn load(client: Client, truth: Arc<Mutex<Truth>>, mut is_on: watch::Receiver<bool>) {
    while is_on.wait_for(|is_on| *is_on).await.is_ok() {
        commit(&client, &truth).await;
        sleep(COMMIT_EVERY).await;
    }
}

/// Looks for them.
async fn look(client: Client, truth: Arc<Mutex<Truth>>) {
    loop {
        let asked = now();
        let row = client.query_one("SELECT coalesce(max(id), 0) FROM marks", &[]).await.unwrap();
        let last = usize::try_from(row.get::<_, i32>(0)).unwrap();
        truth.lock().unwrap().looks.push((asked, now(), last));
        sleep(LOOK_EVERY).await;
    }
}

/// What was told at the moment when the standby was asked.
struct Told {
    moment: f64,
    state: &'static str,
    lag: [Option<f64>; 3],
}

impl Told {
    fn of(scrape: &Scrape) -> Self {
        let moment = scrape.of("target_last_success_timestamp_seconds", "standby").unwrap();
        Self { moment, state: scrape.state("standby").unwrap(), lag: scrape.lag("standby") }
    }
}

struct Bench {
    primary: PgServer,
    standby: PgServer,
    link: Proxy,
    exporter: Exporter,
    truth: Arc<Mutex<Truth>>,
    load: watch::Sender<bool>,
    on_primary: Client,
    on_standby: Client,
    table: String,
    wrong: Vec<String>,
    _tasks: JoinSet<()>,
}

impl Bench {
    async fn start() -> Self {
        let primary = PgServer::primary().await;
        primary.psql("CREATE TABLE marks (id int PRIMARY KEY)").await;
        primary.psql("CREATE TABLE bulk (id int, text text)").await;
        let link = Proxy::start(primary.socket()).await;
        let retry = ("wal_retrieve_retry_interval", "200ms");
        let standby = primary.standby_with("standby", &[retry]).await;
        let port = link.port();
        let upstream = format!("host=127.0.0.1 port={port} user=postgres application_name=standby");
        standby.set("primary_conninfo", &upstream).await;
        standby.catch_up(&primary).await;
        let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
        let (on_primary, on_standby) = (primary.connect().await, standby.connect().await);
        let truth = Arc::new(Mutex::new(Truth::default()));
        let load = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(self::load(primary.connect().await, truth.clone(), load.subscribe()));
        tasks.spawn(look(standby.connect().await, truth.clone()));
        let mut table = String::new();
        writeln!(
            table,
            "{:<34}{:>7}{:>9}{:>8}{:>8}{:>8}  {:<15}{:>10}{:>10}{:>8}{:>10}{:>10}",
            "phase",
            "samples",
            "truth",
            "told",
            "error",
            "false",
            "state",
            "replay_lag",
            "error",
            "NULL",
            "formula",
            "error"
        )
        .unwrap();
        Self {
            primary,
            standby,
            link,
            exporter,
            truth,
            load,
            on_primary,
            on_standby,
            table,
            wrong: Vec::new(),
            _tasks: tasks,
        }
    }

    fn set_load(&self, is_on: bool) {
        self.load.send_replace(is_on);
    }

    async fn caught_up(&self) {
        eventually("the standby shows all rows", LIMIT, async || {
            let truth = self.truth.lock().unwrap();
            let look = truth.looks.last();
            look.is_some_and(|(_, _, last)| *last == truth.commits.len())
        })
        .await;
    }

    /// Compares what is told with the truth for a while.
    async fn phase(&mut self, name: &str, seconds: f64) {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let (mut told, mut others): (Vec<Told>, Vec<_>) = (Vec::new(), Vec::new());
        let mut upper_bounds = Vec::new();
        while Instant::now() < until {
            let before = now();
            let scrape = self.exporter.scrape().await;
            upper_bounds.push((before, now(), scrape.lag("standby")[2]));
            let scraped = Told::of(&scrape);
            if told.last().is_none_or(|last| last.moment + ERROR < scraped.moment) {
                told.push(scraped);
            }
            let asked = now();
            let formula: Option<f64> =
                self.on_standby.query_one(POSTGRES_EXPORTER, &[]).await.unwrap().get(0);
            let row = self.on_primary.query_opt(REPLAY_LAG, &[]).await.unwrap();
            let replay_lag = row.and_then(|row| row.get::<_, Option<f64>>(0));
            others.push((asked, replay_lag, formula));
            sleep(SCRAPE_EVERY).await;
        }
        // So that there is a look after the last sample.
        sleep(LOOK_EVERY * 20).await;
        self.judge(name, &told, &others);
        self.judge_upper_bounds(name, &upper_bounds);
    }

    /// An upper bound holds when it is scraped.
    fn judge_upper_bounds(&mut self, name: &str, bounds: &[(f64, f64, Option<f64>)]) {
        let truth = self.truth.lock().unwrap();
        for &(before, after, upper) in bounds {
            let least = [before, after].map(|moment| truth.at(moment).map_or(0.0, |it| it.0));
            let least = least[0].min(least[1]);
            if upper.is_some_and(|upper| upper < least - ERROR) {
                self.wrong.push(format!("{name}: scraped {upper:?}, truth at least {least:.3}"));
            }
        }
    }

    fn judge(&mut self, name: &str, told: &[Told], others: &[(f64, Option<f64>, Option<f64>)]) {
        let truth = self.truth.lock().unwrap();
        let wrong = &mut self.wrong;
        let (mut sum, mut count, mut most_false) = (0.0, 0.0, 0.0_f64);
        let mut newest = (0.0, None, "");
        for &Told { moment, state, lag: [lower, estimate, upper] } in told {
            let Some((least, greatest)) = truth.at(moment) else { continue };
            let mut complain = |what| {
                wrong.push(format!(
                    "{name}: {what}: {state} {lower:?} {estimate:?} {upper:?}, truth {least:.3} to \
                     {greatest:.3}"
                ));
            };
            let before = truth.at(moment - ROUND_TRIP).map_or(0.0, |(_, greatest)| greatest);
            if lower.is_some_and(|lower| greatest.max(before) + ERROR < lower) {
                complain("above the truth");
            }
            if upper.is_some_and(|upper| upper < least - ERROR) {
                complain("below the truth");
            }
            let Some(estimate) = estimate else {
                complain("not known");
                continue;
            };
            if greatest.max(before) == 0.0 {
                most_false = most_false.max(estimate);
                if INTERVAL.as_secs_f64() + ERROR < estimate {
                    complain("a false lag");
                }
            }
            sum += (least - estimate).max(estimate - greatest).max(0.0);
            count += 1.0;
            newest = (f64::midpoint(least, greatest), Some(estimate), state);
        }
        assert!(4.0 < count, "{name}: {count} samples");
        let replay_lag = truth.worst(others.iter().map(|it| (it.0, it.1)));
        let formula = truth.worst(others.iter().map(|it| (it.0, it.2)));
        let nulls = others.iter().filter(|it| it.1.is_none()).count() * 100 / others.len();
        let end = others.last().unwrap();
        let shown = |it: Option<f64>| it.map_or("NULL".to_owned(), |it| format!("{it:.2}"));
        writeln!(
            self.table,
            "{name:<34}{count:>7}{:>9.2}{:>8}{:>8.3}{most_false:>8.2}  {:<15}{:>10}{replay_lag:>10.2}\
             {nulls:>7}%{:>10}{formula:>10.2}",
            newest.0,
            shown(newest.1),
            sum / count,
            newest.2,
            shown(end.1),
            shown(end.2),
        )
        .unwrap();
    }

    /// Freezes one process of the standby; not while it holds what queries wait for.
    async fn freeze(&self, backend_type: &str) -> Pid {
        let ask = format!("SELECT pid FROM pg_stat_activity WHERE backend_type = '{backend_type}'");
        let pid = Pid::from_raw(self.standby.psql(&ask).await.parse().unwrap()).unwrap();
        eventually("the frozen process holds no lock", LIMIT, async || {
            kill_process(pid, Signal::STOP).unwrap();
            let probe = self.on_standby.query_one("SELECT max(id) FROM marks", &[]);
            let answers = timeout(Duration::from_millis(500), probe).await.is_ok();
            if !answers {
                kill_process(pid, Signal::CONT).unwrap();
            }
            answers
        })
        .await;
        pid
    }

    async fn resumed(&mut self) {
        self.phase("  and resumed", 1.5).await;
        self.caught_up().await;
    }

    async fn pause(&self, function: &str) {
        self.on_standby.execute(&format!("SELECT {function}()"), &[]).await.unwrap();
    }
}

/// Load, no load, one commit: where everybody replays.
async fn keeps_up(bench: &mut Bench) {
    bench.set_load(true);
    sleep(INTERVAL * 2).await;
    bench.phase("steady load", 5.0).await;
    bench.set_load(false);
    sleep(COMMIT_EVERY * 2).await;
    bench.phase("idle primary", 6.0).await;
    commit(&bench.on_primary, &bench.truth).await;
    bench.phase("commit after idle", 2.0).await;
}

/// Each way to be behind.
async fn falls_behind(bench: &mut Bench) {
    bench.set_load(true);
    bench.pause("pg_wal_replay_pause").await;
    bench.phase("replay paused, load", 6.0).await;
    bench.pause("pg_wal_replay_resume").await;
    bench.resumed().await;

    for (backend_type, name) in
        [("walreceiver", "walreceiver SIGSTOP, load"), ("startup", "startup SIGSTOP, load")]
    {
        let pid = bench.freeze(backend_type).await;
        bench.phase(name, 6.0).await;
        kill_process(pid, Signal::CONT).unwrap();
        bench.resumed().await;
    }

    bench.link.cut();
    bench.phase("upstream unreachable, load", 6.0).await;
    bench.link.heal();
    bench.resumed().await;

    bench.pause("pg_wal_replay_pause").await;
    sleep(INTERVAL * 4).await;
    bench.set_load(false);
    bench.phase("paused, then primary idle", 6.0).await;
    bench.pause("pg_wal_replay_resume").await;
    bench.resumed().await;
}

/// One transaction that writes all the time; its row of `marks` is committed at its end.
async fn bulk(client: Client, truth: Arc<Mutex<Truth>>, span: Duration) {
    let until = Instant::now() + span;
    client.batch_execute("BEGIN").await.unwrap();
    while Instant::now() < until {
        // Not more than the standby replays on a machine that does other things too: then it would
        // be behind in truth.
        let some = "INSERT INTO bulk SELECT i, repeat('x', 80) FROM generate_series(1, 500) AS i";
        client.batch_execute(some).await.unwrap();
        sleep(LOOK_EVERY * 2).await;
    }
    let id = i32::try_from(truth.lock().unwrap().commits.len() + 1).unwrap();
    client.execute("INSERT INTO marks VALUES ($1)", &[&id]).await.unwrap();
    let sent = now();
    client.batch_execute("COMMIT").await.unwrap();
    truth.lock().unwrap().commits.push((sent, now()));
}

/// WAL without commits. Returns how often the standby was left with a part of a record.
async fn writes_without_commits(bench: &mut Bench) -> usize {
    let span = Duration::from_secs(5);
    let mut tasks = JoinSet::new();
    tasks.spawn(bulk(bench.primary.connect().await, bench.truth.clone(), span));
    bench.phase("one bulk transaction", 6.5).await;
    bench.caught_up().await;

    // Where the transaction's WAL ends is chance, and so is whether that is within a record that goes
    // on in the next page.
    let mut partial_records = 0;
    let open = bench.primary.connect().await;
    for rows in [300, 1777, 4111] {
        let insert =
            format!("BEGIN; INSERT INTO bulk SELECT i, 'x' FROM generate_series(1, {rows}) AS i");
        open.batch_execute(&insert).await.unwrap();
        sleep(INTERVAL * 2).await;
        let row = bench.on_standby.query_one(PARTIAL_RECORD, &[]).await.unwrap();
        partial_records += usize::from(row.get::<_, bool>(0));
        bench.phase(&format!("open transaction of {rows} rows, idle"), 3.0).await;
        open.batch_execute("COMMIT").await.unwrap();
        sleep(INTERVAL).await;
    }
    partial_records
}

#[tokio::test]
async fn the_lag_is_the_truth_in_every_situation() {
    if postgres_is_missing() {
        return;
    }
    let mut bench = Bench::start().await;
    keeps_up(&mut bench).await;
    falls_behind(&mut bench).await;
    let partial_records = writes_without_commits(&mut bench).await;
    println!("{}partial records: {partial_records} of 3", bench.table);
    assert!(bench.wrong.is_empty(), "{}\n{}", bench.table, bench.wrong.join("\n"));
    assert_ne!(
        partial_records, 0,
        "no transaction left a part of a record: the rule was not tried"
    );
    let finished = bench.exporter.stop().await;
    let unexpected = finished.unexpected_log_lines(&[]);
    assert!(unexpected.is_empty(), "{unexpected:?}");
}
