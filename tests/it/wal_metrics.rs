//! What an operator sees of WAL that is received: how old what waits is, an upload that hangs, and no
//! alarm where nothing is wrong.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Operation, PgServer, Refusal, eventually};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::outage::admin_address;
use crate::receive::{LIMIT, Receiving, load, objects};
use crate::scene::{Kind, write};

/// Nothing is written that a test does not write.
const QUIET: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"0s\"\n";

async fn metrics(address: &str) -> Option<String> {
    reqwest::get(format!("http://{address}/metrics")).await.ok()?.text().await.ok()
}

/// The value of a metric of the group; `labels` are those after it.
pub(crate) async fn metric(address: &str, name: &str, labels: &str) -> Option<f64> {
    let series = format!("pgmesh_backup_{name}{{cluster=\"tests\",group=\"0\"{labels}}} ");
    let text = metrics(address).await?;
    let value = text.lines().find_map(|line| line.strip_prefix(&series))?;
    Some(value.parse().unwrap())
}

/// Waits until receiving is in a state.
pub(crate) async fn is_in_state(address: &str, state: &str) {
    let labels = format!(",state=\"{state}\"");
    let is_so = async || metric(address, "wal_state", &labels).await == Some(1.0);
    eventually(&format!("the state is {state}"), LIMIT, is_so).await;
}

/// The receiver's part of `/status`.
pub(crate) async fn wal_status(address: &str) -> Value {
    let status = reqwest::get(format!("http://{address}/status")).await.unwrap();
    let status: Value = serde_json::from_str(&status.text().await.unwrap()).unwrap();
    status["groups"]["0"]["wal"].clone()
}

/// An agent that tells its metrics, and gives an upload minutes.
async fn told() -> (Receiving, String) {
    let mut receiving = Receiving::with(Kind::S3, QUIET).await;
    let text = fs::read_to_string(receiving.scene.config()).unwrap();
    let patient = text.replace("attempt_timeout = \"3s\"", "attempt_timeout = \"5m\"");
    write(&receiving.scene.config(), &patient);
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.stored_all().await;
    (receiving, address)
}

#[tokio::test]
async fn an_upload_that_hangs_is_told_with_its_object() {
    const HANGS: Duration = Duration::from_secs(75);
    const TOLD: &str = "an upload is still under way";
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, address) = told().await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    receiving.stored_all().await;
    is_in_state(&address, "streaming").await;
    let held = Fault::new(Effect::Delay(HANGS)).on(Operation::PutObject).key("partial/").times(1);
    receiving.scene.s3.as_ref().unwrap().faults().add(held);
    receiving.primary().psql("INSERT INTO marks VALUES (1)").await;
    let segment = receiving.primary().psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    receiving.agent.logged(TOLD, LIMIT).await;
    is_in_state(&address, "upload_hangs").await;
    assert!(metric(&address, "wal_upload_age_seconds", "").await >= Some(30.0));
    let status = wal_status(&address).await;
    assert_eq!(status["state"], "upload_hangs", "{status}");
    assert!(status["upload_seconds"].as_u64() >= Some(30), "{status}");
    let checked = receiving.scene.run(&["check", "--json"]).await;
    let steps: Vec<Value> = serde_json::from_str(&checked.stdout).unwrap();
    let step = steps.iter().find(|step| step["step"] == "group 0: WAL receiver").unwrap();
    assert_eq!(step["outcome"], "warning", "{step}");
    assert!(step["detail"].as_str().unwrap().contains("is not acknowledged"), "{step}");

    receiving.stored_all().await;
    receiving.agent.logged("the upload that took long is over", LIMIT).await;
    is_in_state(&address, "streaming").await;
    let log = receiving.agent.stdout();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told = lines.filter(|line| line["message"].as_str().is_some_and(|it| it.contains(TOLD)));
    let told: Vec<Value> = told.collect();
    let after: Vec<_> = told.iter().map(|line| line["elapsed_s"].as_u64().unwrap()).collect();
    assert_eq!(after, [30, 60], "{told:?}");
    for line in told {
        assert_eq!(line["level"], "WARN", "{line}");
        let object = line["object"].as_str().unwrap();
        assert!(object.starts_with(&format!("partial/{segment}.")), "{line}");
        assert_eq!(objects(&receiving.scene, object).len(), 1, "{line}");
    }
}

/// Under load there is never a moment at which all is stored.
#[tokio::test]
async fn what_waits_under_load_is_as_old_as_it_is() {
    if postgres_is_missing() {
        return;
    }
    let (receiving, address) = told().await;
    let primary = receiving.primary();
    primary.psql("CREATE TABLE marks (i int)").await;
    // As far away as stores are: more is written while an upload is under way.
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    let far = Effect::Delay(Duration::from_millis(300));
    let far = faults.add(Fault::new(far).on(Operation::PutObject));
    let (client, began_at) = (primary.connect().await, Instant::now());
    let writes = async {
        while began_at.elapsed() < Duration::from_secs(25) {
            client.batch_execute("INSERT INTO marks VALUES (1)").await.unwrap();
        }
    };
    let looks = async {
        let mut seen = Vec::new();
        while began_at.elapsed() < Duration::from_secs(24) {
            sleep(Duration::from_millis(500)).await;
            seen.extend(metric(&address, "wal_lag_seconds", "").await);
        }
        seen
    };
    let ((), seen) = tokio::join!(writes, looks);
    let oldest = seen.iter().copied().fold(0.0, f64::max);
    assert!(seen.len() > 10 && oldest < 8.0, "{seen:?}");

    // A store that takes nothing: by as much it is older.
    faults.remove(far);
    let away = Effect::Delay(Duration::from_secs(12));
    faults.add(Fault::new(away).on(Operation::PutObject).times(1));
    load(primary, 100_000).await;
    let is_older = async || metric(&address, "wal_lag_seconds", "").await > Some(10.0);
    eventually("what waits gets older", LIMIT, is_older).await;
    receiving.stored_all().await;
    let is_young = async || metric(&address, "wal_lag_seconds", "").await < Some(6.0);
    eventually("nothing waits any more", LIMIT, is_young).await;
}

/// Nothing was ever stored: that there is no number yet does not go without a word.
#[tokio::test]
async fn before_anything_was_stored_the_state_says_why() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::S3, QUIET).await;
    let address = admin_address(&receiving.scene);
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let fault = faults.add(Fault::new(Effect::Refuse(Refusal::ServiceUnavailable)));
    receiving.restart_agent().await;
    is_in_state(&address, "failed").await;
    assert_eq!(metric(&address, "wal_lag_seconds", "").await, None);
    faults.remove(fault);
    is_in_state(&address, "streaming").await;
    assert!(metric(&address, "wal_lag_seconds", "").await.is_some());
}

/// WAL that a standby has and has not replayed.
async fn delayed_bytes(standby: &PgServer) -> u64 {
    let ask = "SELECT pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::bigint";
    standby.psql(ask).await.parse().unwrap()
}

/// What a standby has not replayed it keeps for itself: neither the repository nor the slot is slow.
#[tokio::test]
async fn a_delayed_standby_is_no_alarm() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, QUIET).await;
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    for (setting, value) in [
        ("recovery_min_apply_delay", "1h"),
        ("max_slot_wal_keep_size", "64MB"),
        ("max_wal_size", "32MB"),
    ] {
        standby.set(setting, value).await;
    }
    let of_standby = format!(",node=\"{}\"", standby.name());
    // Beyond the limit of the slot; and without one, beyond three times max_wal_size.
    for (limit, delayed) in [("64MB", 80 << 20), ("-1", 130 << 20)] {
        standby.set("max_slot_wal_keep_size", limit).await;
        while delayed_bytes(&standby).await < delayed {
            load(receiving.primary(), 25_000).await;
        }
        receiving.stored_all().await;
        let looked = async || {
            let size = metric(&address, "pg_wal_size_bytes", &of_standby).await;
            let limit = metric(&address, "slot_limit_bytes", &of_standby).await;
            size > u32::try_from(delayed).ok().map(f64::from)
                && limit.is_some() == (delayed == 80 << 20)
        };
        eventually("the agent has looked", LIMIT, looked).await;
        let retained = async || metric(&address, "slot_retained_bytes", &of_standby).await;
        let is_small = async || retained().await < Some(f64::from(16 << 20));
        eventually("the slot holds nothing back", LIMIT, is_small).await;
    }
    let log = receiving.agent.stdout();
    for alarm in ["max_slot_wal_keep_size are used", "pg_wal takes more", "not observed or kept"] {
        assert!(!log.contains(alarm), "{log}");
    }
}
