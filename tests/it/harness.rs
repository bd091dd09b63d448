//! The harness does what it promises: otherwise the other tests prove nothing.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Region};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{AggregatedBytes, ByteStream};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier,
    ObjectStorageClass, StorageClass,
};
use harness::postgres::postgres_is_missing;
use harness::{
    Agent, At, Effect, Fault, Mode, Operation, PgServer, Proxy, Refusal, S3Endpoint, S3Server,
    eventually,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);
const MIB: usize = 1 << 20;
/// Long enough for an answer, short enough to wait for none.
const SHORT: Duration = Duration::from_millis(300);

// --- PostgreSQL

#[tokio::test]
async fn a_standby_streams_and_takes_over() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::primary().await;
    let location = primary.tablespace("fast").await;
    assert!(location.is_dir());
    let standby = primary.standby("standby1").await;
    let streaming = "SELECT application_name, state FROM pg_stat_replication";
    eventually("the standby streams", LIMIT, async || {
        primary.psql(streaming).await == "standby1|streaming"
    })
    .await;
    primary.psql("CREATE TABLE t TABLESPACE fast AS SELECT generate_series(1, 1000) AS i").await;
    standby.catch_up(&primary).await;
    assert_eq!(standby.psql("SELECT count(*), pg_is_in_recovery() FROM t").await, "1000|t");
    assert_eq!(
        standby.dump().await,
        primary.dump().await.replace(
            location.to_str().unwrap(),
            standby.socket_directory().join("tablespaces/fast").to_str().unwrap(),
        )
    );

    standby.promote().await;
    assert_eq!(standby.psql("SELECT pg_is_in_recovery()").await, "f");
    standby.psql("INSERT INTO t VALUES (0)").await;
}

#[tokio::test]
async fn a_server_survives_every_way_to_stop_it() {
    if postgres_is_missing() {
        return;
    }
    let mut server = PgServer::builder().setting("checkpoint_timeout", "1h").primary().await;
    assert_eq!(server.psql("SHOW data_checksums").await, "on");
    assert_eq!(server.psql("SHOW checkpoint_timeout").await, "1h");
    server.psql("CREATE TABLE t (i int)").await;
    for stop in ["smart", "fast", "immediate", "kill -9", "restart"] {
        server.psql("INSERT INTO t VALUES (1)").await;
        match stop {
            "smart" => server.stop(Mode::Smart).await,
            "fast" => server.stop(Mode::Fast).await,
            "immediate" => server.stop(Mode::Immediate).await,
            "kill -9" => server.kill9().await,
            _ => server.restart().await,
        }
        if !server.is_running() {
            server.start().await;
        }
    }
    assert_eq!(server.psql("SELECT count(*) FROM t").await, "5");
    assert!(server.log().contains("database system was not properly shut down"));

    // A copy of the files of a server that was stopped is a server too.
    server.stop(Mode::Fast).await;
    let data_directory = server.data_directory().to_owned();
    let builder = PgServer::builder().name("restored").setting("work_mem", "5MB");
    let restored = builder.start_existing(&data_directory).await;
    assert_eq!(restored.psql("SELECT count(*) FROM t").await, "5");
    assert_eq!(restored.psql("SHOW work_mem").await, "5MB");
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    if postgres_is_missing() {
        return;
    }
    let mut server = PgServer::primary().await;
    server.stop(Mode::Fast).await;
    let builder = PgServer::builder().setting("shared_buffers", "nonsense");
    let error = builder.try_start_existing(server.data_directory()).await.unwrap_err();
    assert!(error.log.contains("invalid value for parameter \"shared_buffers\""), "{error}");
}

#[tokio::test]
async fn a_frozen_server_does_not_answer() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::primary().await;
    let client = server.connect().await;
    server.sigstop();
    assert!(timeout(SHORT, client.simple_query("SELECT 1")).await.is_err());
    assert!(timeout(SHORT, server.try_connect_as("postgres", "postgres")).await.is_err());
    server.sigcont();
    client.simple_query("SELECT 1").await.unwrap();
    server.sigstop();
    // Dropping it frozen is fine.
}

#[tokio::test]
async fn a_server_asks_for_a_password_and_speaks_tls() {
    if postgres_is_missing() {
        return;
    }
    let builder = PgServer::builder().password("hunter2").tls().wal_segment_mib(1);
    let server = builder.without_checksums().primary().await;
    assert_eq!(server.psql("SHOW data_checksums").await, "off");
    assert_eq!(server.psql("SHOW wal_segment_size").await, "1MB");
    server.connect().await.simple_query("SELECT 1").await.unwrap();
    let standby = server.standby("standby1").await;
    standby.catch_up(&server).await;

    let conninfo = |extra: &str| {
        format!(
            "host=localhost port={} user=postgres sslmode=verify-full sslrootcert={} {extra}",
            server.port(),
            server.ca_file().display()
        )
    };
    let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let arguments = ["-XAtwc", query, "-d"];
    let answer = server.run("psql", &[&arguments[..], &[&conninfo("")]].concat()).await;
    assert_eq!(answer.trim(), "t");
    let mut refused = server.program("psql");
    refused.args(arguments).arg(conninfo("password=wrong")).env_remove("PGPASSWORD");
    let refused = harness::program::finish(&mut refused, LIMIT).await;
    refused.assert_code(2);
    assert!(refused.stderr.contains("password authentication failed"), "{refused}");
}

// --- The agent

/// An agent that answers, or never ends.
fn shell_agent(script: &str) -> (tempfile::TempDir, Agent) {
    let directory = harness::directory();
    let path = directory.path().join("agent");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    (directory, Agent::new(Path::new("/the/config")).binary(&path))
}

#[tokio::test]
async fn an_agent_is_run_with_its_configuration_and_told_apart_by_its_end() {
    let (_directory, agent) = shell_agent("echo \"$@\"; echo '{\"level\":\"WARN\"}' >&2; exit 3");
    let finished = agent.run(&["list"]).await;
    finished.assert_code(3);
    assert_eq!(finished.stdout, "--config /the/config --log-format json list\n");
    assert_eq!(finished.unexpected_log_lines(&[]), ["{\"level\":\"WARN\"}"]);
    assert_eq!(finished.unexpected_log_lines(&["WARN"]), [""; 0]);
}

#[tokio::test]
async fn an_agent_is_killed_by_the_test_or_at_its_limit() {
    let (_directory, agent) =
        shell_agent("trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done");
    let mut running = agent.spawn(&["run"]);
    running.logged("up", LIMIT).await;
    running.terminate().await.assert_success();
    let mut running = agent.spawn(&["run"]);
    running.logged("up", LIMIT).await;
    assert!(running.is_running());
    let killed = running.kill9().await;
    assert_eq!((killed.code(), killed.timed_out()), (None, false));
    assert!(agent.limit(SHORT).run(&["run"]).await.timed_out());
}

// --- S3

fn client(endpoint: &S3Endpoint) -> Client {
    let S3Endpoint { url, access_key_id, secret_access_key, .. } = endpoint;
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("us-east-1"))
        .endpoint_url(url)
        .force_path_style(true)
        .credentials_provider(Credentials::new(
            access_key_id,
            secret_access_key,
            None,
            None,
            "test",
        ))
        .retry_config(RetryConfig::disabled())
        .build();
    Client::from_conf(config)
}

struct Store {
    server: S3Server,
    client: Client,
    bucket: String,
}

impl Store {
    async fn start() -> Self {
        let server = S3Server::start().await;
        let bucket = server.endpoint().bucket.clone();
        Self { client: client(server.endpoint()), bucket, server }
    }

    /// Puts an object, and tells the status of a refusal.
    async fn put(&self, key: &str, content: &[u8]) -> Result<(), u16> {
        let put = self.client.put_object().bucket(&self.bucket).key(key);
        status(put.body(content.to_vec().into()).send().await.map(drop))
    }

    async fn put_if_absent(&self, key: &str, content: &[u8]) -> Result<(), u16> {
        let put = self.client.put_object().bucket(&self.bucket).key(key).if_none_match("*");
        status(put.body(content.to_vec().into()).send().await.map(drop))
    }

    /// Gets an object; `None` when its body ends early or differs from its checksum.
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, u16> {
        let got = self.client.get_object().bucket(&self.bucket).key(key).send().await;
        let body = status(got)?.body;
        Ok(body.collect().await.ok().map(AggregatedBytes::to_vec))
    }

    async fn delete(&self, key: &str) -> Result<(), u16> {
        let delete = self.client.delete_object().bucket(&self.bucket).key(key);
        status(delete.send().await.map(drop))
    }

    async fn begin(&self, key: &str) -> String {
        let begin = self.client.create_multipart_upload().bucket(&self.bucket).key(key);
        let begin = begin.checksum_algorithm(ChecksumAlgorithm::Crc32C);
        let upload = begin.storage_class(StorageClass::StandardIa).send().await.unwrap();
        upload.upload_id.unwrap()
    }

    async fn part(&self, key: &str, upload_id: &str, number: i32, content: &[u8]) -> CompletedPart {
        let part = self.client.upload_part().bucket(&self.bucket).key(key).upload_id(upload_id);
        let part = part.checksum_algorithm(ChecksumAlgorithm::Crc32C).part_number(number);
        let sent = part.body(content.to_vec().into()).send().await.unwrap();
        CompletedPart::builder()
            .part_number(number)
            .e_tag(sent.e_tag.unwrap())
            .checksum_crc32_c(sent.checksum_crc32_c.unwrap())
            .build()
    }

    async fn complete(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[CompletedPart],
    ) -> Result<(), u16> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
        let complete = self.client.complete_multipart_upload().bucket(&self.bucket).key(key);
        let complete = complete.upload_id(upload_id).multipart_upload(parts).if_none_match("*");
        status(complete.send().await.map(drop))
    }

    async fn upload(&self, key: &str, parts: &[&[u8]]) -> Result<(), u16> {
        let upload_id = self.begin(key).await;
        let mut done = Vec::new();
        for (number, part) in (1..).zip(parts) {
            done.push(self.part(key, &upload_id, number, part).await);
        }
        self.complete(key, &upload_id, &done).await
    }
}

/// The answer, or the status of the refusal; 0 when there was no answer.
fn status<T, E: std::fmt::Debug + ProvideErrorMetadata>(
    result: Result<T, SdkError<E>>,
) -> Result<T, u16> {
    result.map_err(|error| error.raw_response().map_or(0, |response| response.status().as_u16()))
}

/// Bytes without a pattern that a mistake could leave unchanged.
fn content(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

#[tokio::test]
async fn the_server_stores_what_it_is_given() {
    let store = Store::start().await;
    let large = content(6 * MIB);
    store.put("a/small", b"small").await.unwrap();
    store.put("a/empty", b"").await.unwrap();
    store.upload("b/large", &[&large, &large, b"rest"]).await.unwrap();
    let expected = [&large[..], &large, b"rest"].concat();

    assert_eq!(store.get("a/small").await.unwrap().unwrap(), b"small");
    assert_eq!(store.get("a/empty").await.unwrap().unwrap(), b"");
    assert!(store.get("b/large").await.unwrap().unwrap() == expected);
    assert_eq!(store.get("a").await.unwrap_err(), 404, "a directory is no object");
    assert_eq!(store.get("absent").await.unwrap_err(), 404);
    for (range, expected) in [("bytes=1-3", &b"mal"[..]), ("bytes=2-", b"all"), ("bytes=-2", b"ll")]
    {
        let get = store.client.get_object().bucket(&store.bucket).key("a/small").range(range);
        let body = get.send().await.unwrap().body.collect().await.unwrap();
        assert_eq!(&body.to_vec()[..], expected, "{range}");
    }

    let list =
        store.client.list_objects_v2().bucket(&store.bucket).max_keys(2).send().await.unwrap();
    let keys: Vec<_> = list.contents().iter().filter_map(|object| object.key()).collect();
    assert_eq!(keys, ["a/empty", "a/small"]);
    let rest = store.client.list_objects_v2().bucket(&store.bucket);
    let rest = rest.continuation_token(list.next_continuation_token.unwrap()).send().await.unwrap();
    let [object] = rest.contents() else { panic!("{rest:?}") };
    assert_eq!(object.key(), Some("b/large"));
    assert_eq!(object.size(), Some(i64::try_from(expected.len()).unwrap()));
    assert_eq!(object.storage_class(), Some(&ObjectStorageClass::StandardIa));
    let head =
        store.client.head_object().bucket(&store.bucket).key("b/large").send().await.unwrap();
    assert_eq!(head.storage_class(), Some(&StorageClass::StandardIa));
    assert_eq!(head.e_tag(), object.e_tag());

    store.delete("a/small").await.unwrap();
    store.delete("a/small").await.unwrap();
    assert_eq!(store.server.bucket().keys(""), ["a/empty", "b/large"]);
    assert_eq!(store.server.requests(Operation::UploadPart), 3);
}

#[tokio::test]
async fn credentials_and_checksums_are_checked() {
    let store = Store::start().await;
    let right = store.server.endpoint();
    for endpoint in [
        S3Endpoint { secret_access_key: "wrong".to_owned(), ..right.clone() },
        S3Endpoint { access_key_id: "wrong".to_owned(), ..right.clone() },
    ] {
        let put = client(&endpoint).put_object().bucket(&store.bucket).key("k");
        assert_eq!(status(put.send().await.map(drop)), Err(403));
    }
    let wrong = "AAAAAA==";
    let put = store.client.put_object().bucket(&store.bucket).key("k").checksum_crc32_c(wrong);
    let put = put.body(ByteStream::from_static(b"content")).send().await;
    assert_eq!(status(put.map(drop)), Err(400));
    let upload_id = store.begin("k").await;
    let part = store.client.upload_part().bucket(&store.bucket).key("k").upload_id(upload_id);
    let part = part.part_number(1).checksum_crc32_c(wrong);
    let part = part.body(ByteStream::from_static(b"content")).send().await;
    assert_eq!(status(part.map(drop)), Err(400));
    assert_eq!(store.server.bucket().keys(""), [""; 0]);
}

#[tokio::test]
async fn a_condition_lets_one_of_many_writers_through() {
    let store = Store::start().await;
    let writers = (0..8_u8).map(|writer| {
        let content = vec![writer; 100];
        let store = &store;
        async move { store.put_if_absent("k", &content).await }
    });
    let outcomes = futures_util::future::join_all(writers).await;
    assert_eq!(outcomes.iter().filter(|it| it.is_ok()).count(), 1, "{outcomes:?}");
    assert_eq!(outcomes.iter().filter(|it| **it == Err(412)).count(), 7, "{outcomes:?}");
    assert_eq!(store.upload("k", &[b"other"]).await, Err(412));

    store.server.faults().ignore_conditions(true);
    store.put_if_absent("k", b"other").await.unwrap();
    assert_eq!(store.server.bucket().object("k"), b"other");
}

#[tokio::test]
async fn a_locked_object_is_neither_overwritten_nor_deleted() {
    let store = Store::start().await;
    store.put("k", b"first").await.unwrap();
    store.server.faults().object_lock(true);
    store.put("new", b"may be written").await.unwrap();
    assert_eq!(store.put("k", b"second").await, Err(403));
    assert_eq!(store.delete("k").await, Err(403));
    let objects = ["k", "absent"].map(|key| ObjectIdentifier::builder().key(key).build().unwrap());
    let delete = Delete::builder().set_objects(Some(objects.to_vec())).build().unwrap();
    let delete = store.client.delete_objects().bucket(&store.bucket).delete(delete);
    let deleted = delete.send().await.unwrap();
    assert_eq!(deleted.errors()[0].code(), Some("AccessDenied"));
    assert_eq!(deleted.deleted()[0].key(), Some("absent"));
    assert_eq!(store.server.bucket().object("k"), b"first");
    store.server.faults().clear();
    store.delete("k").await.unwrap();
}

#[tokio::test]
async fn unfinished_uploads_are_listed_until_aborted() {
    let store = Store::start().await;
    let first = store.begin("x/1").await;
    let second = store.begin("x/2").await;
    store.part("x/1", &first, 1, b"part").await;
    let day_ago = SystemTime::now() - Duration::from_hours(24);
    let uploads = store.server.bucket().unfinished_uploads();
    store.server.bucket().set_upload_started(&uploads[0], day_ago);

    let list = || store.client.list_multipart_uploads().bucket(&store.bucket).prefix("x/");
    let page = list().max_uploads(1).send().await.unwrap();
    assert_eq!(page.uploads()[0].upload_id(), Some(first.as_str()));
    let day_ago = day_ago.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(page.uploads()[0].initiated().unwrap().secs(), day_ago.cast_signed());
    let page = list()
        .key_marker(page.next_key_marker.unwrap())
        .upload_id_marker(page.next_upload_id_marker.unwrap());
    let page = page.send().await.unwrap();
    assert_eq!(page.uploads()[0].upload_id(), Some(second.as_str()));
    assert_eq!(page.is_truncated(), Some(false));

    for (key, upload_id) in [("x/1", &first), ("x/2", &second)] {
        let abort = store.client.abort_multipart_upload().bucket(&store.bucket).key(key);
        abort.upload_id(upload_id).send().await.unwrap();
    }
    assert!(list().send().await.unwrap().uploads().is_empty());
    assert_eq!(store.complete("x/1", &first, &[]).await, Err(404));
}

#[tokio::test]
async fn requests_are_refused_on_demand() {
    let store = Store::start().await;
    let faults = store.server.faults();
    let third = Fault::new(Effect::Refuse(Refusal::SlowDown)).on(Operation::PutObject);
    let id = faults.add(third.key("manifest").after(2).times(1));
    for (key, expected) in [
        ("manifest-1", Ok(())),
        ("part-1", Ok(())),
        ("manifest-2", Ok(())),
        ("manifest-3", Err(503)),
        ("manifest-4", Ok(())),
    ] {
        assert_eq!(store.put(key, b"x").await, expected, "{key}");
    }
    assert_eq!(faults.hits(id), 1);
    assert!(!store.server.bucket().contains("manifest-3"));

    for (refusal, expected) in [
        (Refusal::TooManyRequests, 429),
        (Refusal::InternalError, 500),
        (Refusal::ServiceUnavailable, 503),
        (Refusal::AccessDenied, 403),
    ] {
        let id = faults.add(Fault::new(Effect::Refuse(refusal)));
        assert_eq!(store.put("k", &content(3 * MIB)).await, Err(expected));
        assert_eq!(store.get("manifest-1").await, Err(expected));
        assert_eq!(store.delete("manifest-1").await, Err(expected));
        faults.remove(id);
    }
    assert_eq!(store.server.bucket().keys("").len(), 4);
}

#[tokio::test]
async fn answers_come_late_or_never_or_are_lost() {
    let store = Store::start().await;
    let faults = store.server.faults();
    faults.add(Fault::new(Effect::Delay(SHORT)).times(1));
    let start = Instant::now();
    store.put("k", b"late").await.unwrap();
    assert!(start.elapsed() >= SHORT);

    faults.add(Fault::new(Effect::Stall).on(Operation::GetObject).times(1));
    assert!(timeout(SHORT, store.get("k")).await.is_err());
    assert_eq!(store.get("k").await.unwrap().unwrap(), b"late");

    faults.add(Fault::new(Effect::LoseAnswer).times(1));
    assert_eq!(store.put("k", b"done").await, Err(500));
    assert_eq!(store.server.bucket().object("k"), b"done");

    faults.add(Fault::new(Effect::Throttle { bytes_per_second: 1 << 20 }));
    let start = Instant::now();
    store.put("slow", &content(MIB / 2)).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(450), "{:?}", start.elapsed());
    assert_eq!(store.get("slow").await.unwrap().unwrap().len(), MIB / 2);
    assert!(start.elapsed() >= Duration::from_millis(900), "{:?}", start.elapsed());
}

#[tokio::test]
async fn bodies_are_cut_off_and_damaged_on_their_way() {
    let store = Store::start().await;
    let faults = store.server.faults();
    let whole = content(MIB);
    store.put("k", &whole).await.unwrap();
    for at in [At::Byte(0), At::Byte(100_000), At::Fraction(0.5)] {
        faults.add(Fault::new(Effect::CutBody(at)).on(Operation::GetObject).times(1));
        let got = store.client.get_object().bucket(&store.bucket).key("k").send().await.unwrap();
        assert_eq!(got.content_length(), Some(i64::try_from(MIB).unwrap()));
        let mut body = got.body.into_async_read();
        let mut arrived = Vec::new();
        body.read_to_end(&mut arrived).await.unwrap_err();
        assert!(whole.starts_with(&arrived), "{at:?}");
        assert!(arrived.len() <= MIB / 2, "{at:?}: {}", arrived.len());
    }

    faults.add(Fault::new(Effect::StallBody(At::Fraction(0.5))).times(1));
    assert!(timeout(SHORT, store.get("k")).await.is_err());

    faults.add(Fault::new(Effect::FlipBit(At::Byte(70_000))).times(1));
    let mut damaged = whole.clone();
    damaged[70_000] ^= 1;
    assert!(store.get("k").await.unwrap().unwrap() == damaged);
    assert!(store.get("k").await.unwrap().unwrap() == whole);
    assert!(store.server.bucket().object("k") == whole);
}

#[tokio::test]
async fn a_server_that_lies_stores_less_than_it_says() {
    let store = Store::start().await;
    let faults = store.server.faults();
    faults.add(Fault::new(Effect::StoreNothing).key("nothing"));
    faults.add(Fault::new(Effect::StoreTruncated { bytes: 3 }).key("short"));
    store.put("nothing", b"content").await.unwrap();
    store.put("short", b"content").await.unwrap();
    assert_eq!(store.server.bucket().keys(""), ["short"]);
    assert_eq!(store.get("short").await.unwrap().unwrap(), b"con");

    let upload_id = store.begin("nothing/large").await;
    faults.clear();
    let part = store.part("nothing/large", &upload_id, 1, b"content").await;
    faults.add(Fault::new(Effect::StoreNothing).on(Operation::CompleteMultipartUpload));
    store.complete("nothing/large", &upload_id, &[part]).await.unwrap();
    assert_eq!(store.server.bucket().keys(""), ["short"]);
    assert!(store.server.bucket().unfinished_uploads().is_empty());
}

#[tokio::test]
async fn files_are_damaged_behind_the_servers_back() {
    let store = Store::start().await;
    let bucket = store.server.bucket();
    store.put("a", b"first").await.unwrap();
    store.put("b", b"second").await.unwrap();
    bucket.flip_bit("a", 0);
    assert_eq!(store.get("a").await.unwrap().unwrap(), b"girst");
    bucket.truncate("a", 2);
    assert_eq!(store.get("a").await.unwrap().unwrap(), b"gi");
    bucket.swap("a", "b");
    assert_eq!(store.get("a").await.unwrap().unwrap(), b"second");
    bucket.remove("a");
    assert_eq!(store.get("a").await, Err(404));
}

// --- The network

/// A server that sends back what it gets.
async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
        }
    });
    address
}

/// Sends bytes and waits until they are back.
async fn round_trip(socket: &mut TcpStream, bytes: usize) -> std::io::Result<Duration> {
    let start = Instant::now();
    let sent = content(bytes);
    let mut back = vec![0; bytes];
    let (mut read, mut write) = socket.split();
    let (written, got) = tokio::join!(write.write_all(&sent), read.read_exact(&mut back));
    written?;
    got?;
    assert!(back == sent);
    Ok(start.elapsed())
}

#[tokio::test]
async fn a_proxy_delays_slows_and_stalls() {
    let proxy = Proxy::start(echo().await).await;
    let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(round_trip(&mut socket, MIB).await.unwrap() < LIMIT);
    assert_eq!(proxy.bytes(), 2 * MIB as u64);

    proxy.delay(SHORT / 2);
    let took = round_trip(&mut socket, MIB).await.unwrap();
    assert!(took >= SHORT && took < SHORT * 10, "{took:?}");
    proxy.heal();

    proxy.throttle(1 << 20);
    let took = round_trip(&mut socket, MIB / 2).await.unwrap();
    assert!(took >= Duration::from_millis(450) && took < LIMIT, "{took:?}");
    proxy.heal();

    proxy.stall();
    socket.write_all(b"held back").await.unwrap();
    let mut back = [0; 9];
    assert!(timeout(SHORT, socket.read_exact(&mut back)).await.is_err());
    let mut other = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(timeout(SHORT, round_trip(&mut other, 1)).await.is_err());
    proxy.resume();
    socket.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"held back");
    assert_eq!(proxy.connections(), 2);

    // An end in order passes through.
    socket.shutdown().await.unwrap();
    assert_eq!(socket.read(&mut back).await.unwrap(), 0);
}

#[tokio::test]
async fn a_proxy_cuts_and_heals() {
    let proxy = Proxy::start(echo().await).await;
    let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut socket, 1).await.unwrap();
    proxy.cut();
    let mut byte = [0];
    assert!(timeout(LIMIT, socket.read_exact(&mut byte)).await.unwrap().is_err());
    eventually("connections are refused", LIMIT, async || {
        TcpStream::connect(proxy.address()).await.is_err()
    })
    .await;
    proxy.heal();
    eventually("connections work", LIMIT, async || {
        TcpStream::connect(proxy.address()).await.is_ok()
    })
    .await;

    let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.cut_after(MIB as u64);
    assert!(round_trip(&mut socket, 4 * MIB).await.is_err());
    let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut socket, 4 * MIB).await.unwrap();
}

#[tokio::test]
async fn a_proxy_leads_to_a_unix_socket() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::primary().await;
    let proxy = Proxy::start(server.socket()).await;
    let port = proxy.port().to_string();
    let answer = server.run("psql", &["-XAtc", "SELECT 1", "-h", "127.0.0.1", "-p", &port]).await;
    assert_eq!(answer.trim(), "1");
    assert!(proxy.bytes() > 0);
}
