//! Who the agent talks to and as whom: TLS with an authority of one's own, credentials from every
//! place they may come from, and server-side encryption; and what it says where one is wrong.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use harness::postgres::postgres_is_missing;
use harness::{
    Agent, Authority, Effect, Fault, Identity, MetadataService, Refusal, S3Endpoint, S3Server,
    TlsFront, directory, eventually,
};
use serde_json::Value;
use shared::store::{ObjectStore, StoreConfig, StoreErrorKind};
use shared::telemetry::chain;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::scene::{Scene, config_text, write};

/// Longest time until a setting that is wrong is told: nobody waits longer at night. A container's
/// metadata service that is silent is asked three times for 5 s by the SDK.
const TOLD_LIMIT: Duration = Duration::from_secs(20);
/// The SDK renews credentials 5 to 10 s before their end.
const SHORT: Duration = Duration::from_secs(12);
/// Longest wait for what should follow within seconds.
const LIMIT: Duration = Duration::from_mins(1);

/// An agent that has a repository and no servers, in a directory of its own.
async fn agent(repository: &str) -> (Agent, TempDir) {
    let directory = directory();
    let (config, key) = (directory.path().join("agent.toml"), directory.path().join("key"));
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    write(&config, &config_text(&key, repository, "", &[]));
    (Agent::new(&config), directory)
}

/// Why `check` cannot put into the repository; nothing if it can.
async fn refusal(agent: &Agent) -> String {
    let began_at = Instant::now();
    let finished = agent.run(&["check", "--json"]).await;
    let took = began_at.elapsed();
    assert!(took < TOLD_LIMIT, "{took:?}\n{finished}");
    let steps: Vec<Value> = serde_json::from_str(&finished.stdout).unwrap_or_default();
    let put = steps.iter().find(|step| step["step"] == "repository put");
    let put = put.unwrap_or_else(|| panic!("{finished}"));
    if put["outcome"] == "ok" { String::new() } else { put["detail"].as_str().unwrap().to_owned() }
}

/// The section for the server at `url`, with the authority to trust.
fn section(s3: &S3Server, url: &str, ca_file: Option<&Path>, directory: &Path) -> String {
    let endpoint = S3Endpoint { url: url.to_owned(), ..s3.endpoint().clone() };
    let ca_file = ca_file.map(|path| format!("ca_file = \"{}\"\n", path.display()));
    endpoint.config(directory) + &ca_file.unwrap_or_default()
}

/// The section without credentials.
fn without_credentials(s3: &S3Server, directory: &Path) -> String {
    let section = s3.endpoint().config(directory);
    let lines: Vec<_> = section.lines().filter(|line| !line.contains("_file =")).collect();
    lines.join("\n") + "\n"
}

#[tokio::test]
async fn a_backup_goes_over_tls_and_comes_back() {
    if postgres_is_missing() {
        return;
    }
    let (s3, authority, files) = (S3Server::start().await, Authority::new(), directory());
    let front = TlsFront::start(&authority.issue("s3"), s3.address()).await;
    let section = section(&s3, &front.url(), Some(&authority.ca_file()), files.path());
    let scene = Scene::start(files, Some(s3), section, "").await;
    scene.archive_wal().await;
    scene.backup().await;
    scene.run(&["verify"]).await.assert_success();
    scene.restore("restored", &[]).await;
}

#[tokio::test]
async fn a_certificate_that_does_not_fit_is_told_at_once_and_with_what_to_do() {
    let (s3, files) = (S3Server::start().await, directory());
    let (authority, other) = (Authority::new(), Authority::new());
    let (ours, theirs) = (Some(authority.ca_file()), Some(other.ca_file()));
    let address = s3.address();
    let behind = async |identity: Identity| TlsFront::start(&identity, address).await;
    let front = behind(authority.issue("s3")).await;
    let expired = behind(authority.issue_expired("expired")).await;
    let elsewhere = behind(authority.issue_for_other_host("s3.example")).await;
    for (case, url, ca_file, expected) in [
        ("another authority", front.url(), &theirs, "by an unknown CA, expected one from ca_file"),
        ("the system's authorities", front.url(), &None, "or the system's roots"),
        ("expired", expired.url(), &ours, "must be renewed, or a clock is wrong"),
        ("another host", elsewhere.url(), &ours, "certificate is only valid for DnsName(\"s3.exa"),
        ("no TLS", format!("https://{address}"), &ours, "is the address http:// rather than"),
    ] {
        let (agent, _directory) =
            agent(&section(&s3, &url, ca_file.as_deref(), files.path())).await;
        let began_at = Instant::now();
        let told = refusal(&agent).await;
        assert!(
            told.contains("repository.s3.endpoint: ") && told.contains(expected),
            "{case}: {told}"
        );
        // Eight attempts take half a minute.
        assert!(began_at.elapsed() < Duration::from_secs(5), "{case}: {:?}", began_at.elapsed());
    }
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_an_error_of_the_configuration() {
    let (s3, files) = (S3Server::start().await, directory());
    let file = files.path().join("ca.crt");
    let etcd = format!("[etcd]\nendpoints = [\"https://e\"]\nca_file = \"{}\"\n", file.display());
    let (with_s3, _one) = agent(&section(&s3, "https://s3", Some(&file), files.path())).await;
    let (with_etcd, _other) = agent(&(s3.endpoint().config(files.path()) + &etcd)).await;
    let no_certificate = "-----BEGIN CERTIFICATE-----\nbm90IG9uZQ==\n-----END CERTIFICATE-----\n";
    for (content, expected) in [
        (None, "No such file"),
        (Some("garbage\n"), "holds no CA certificate"),
        (Some("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"), "read CA cert"),
        (Some(no_certificate), "use CA certificate 1"),
    ] {
        if let Some(content) = content {
            write(&file, content);
        }
        for (agent, key) in [(&with_s3, "repository.s3.ca_file"), (&with_etcd, "etcd.ca_file")] {
            let refused = agent.run(&["check-config"]).await;
            refused.assert_code(1);
            let name = file.display().to_string();
            for part in [key, &name, expected] {
                assert!(refused.stderr.contains(part), "no {part:?}\n{refused}");
            }
        }
    }
}

#[tokio::test]
async fn encryption_that_is_asked_for_arrives_with_every_object() {
    let (s3, files) = (S3Server::start().await, directory());
    let section = s3.endpoint().config(files.path()).replace("[repository.s3]", "[s3]");
    let open = async |extra: &str| {
        let config: StoreConfig = toml::from_str(&format!("{section}{extra}")).unwrap();
        ObjectStore::open(&config).await.unwrap()
    };
    for (number, (extra, expected)) in [
        ("", None),
        ("server_side_encryption = \"AES256\"", Some("AES256")),
        (
            "server_side_encryption = \"aws:kms\"\nkms_key_id = \"alias/backups\"",
            Some("aws:kms alias/backups"),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let store = open(extra).await;
        let (put, multipart) = (format!("{number}/put"), format!("{number}/multipart"));
        store.put(&put, Bytes::from_static(b"x"), None).await.unwrap();
        let upload = store.upload(&multipart, 5 << 20, None).await.unwrap();
        let part = upload.part(1, Bytes::from_static(b"x")).await.unwrap();
        upload.complete(vec![part]).await.unwrap();
        for key in [put, multipart] {
            assert_eq!(s3.bucket().encryption(&key).as_deref(), expected, "{key}");
            assert_eq!(store.get(&key, 1).await.unwrap(), "x");
        }
    }

    s3.faults().add(Fault::new(Effect::Refuse(Refusal::NotImplemented)));
    let store = open("server_side_encryption = \"aws:kms\"").await;
    let put = store.put("k", Bytes::from_static(b"x"), None).await.unwrap_err();
    let begin = store.upload("k", 5 << 20, None).await.unwrap_err();
    for (error, operation) in [(put, "put k"), (begin, "begin upload of k")] {
        assert_eq!(error.kind, StoreErrorKind::Unsupported);
        let S3Endpoint { bucket, url, .. } = s3.endpoint();
        let reason = "NotImplemented: refused on purpose";
        let expected = format!("{operation}: bucket {bucket} at {url}: {reason}");
        assert_eq!(chain(&error).to_string(), expected);
    }
}

#[tokio::test]
async fn credentials_come_from_where_they_are_and_wrong_ones_are_told_with_their_place() {
    let (s3, files) = (S3Server::start().await, directory());
    let metadata = MetadataService::start(s3.endpoint(), Duration::from_hours(1)).await;
    let (agent, _directory) = agent(&without_credentials(&s3, files.path())).await;
    let S3Endpoint { access_key_id: id, secret_access_key: secret, .. } = s3.endpoint().clone();
    let environment = |id: &str, secret: &str| {
        agent.clone().env("AWS_ACCESS_KEY_ID", id).env("AWS_SECRET_ACCESS_KEY", secret)
    };
    assert_eq!(refusal(&environment(&id, &secret)).await, "");
    for (count, (name, value)) in
        [metadata.instance_variable(), metadata.container_variable()].into_iter().enumerate()
    {
        assert_eq!(refusal(&agent.clone().env(name, &value)).await, "");
        assert_eq!(metadata.handed_out(), count + 1);
    }

    for (id, secret, expected) in
        [(id.as_str(), "wrong", "SignatureDoesNotMatch"), ("unknown", &secret, "not signed up")]
    {
        let (mut endpoint, files) = (s3.endpoint().clone(), directory());
        (endpoint.access_key_id, endpoint.secret_access_key) = (id.to_owned(), secret.to_owned());
        let (with_files, _directory) = self::agent(&endpoint.config(files.path())).await;
        for (agent, place) in [
            (with_files, "(with the credentials from repository.s3.access_key_id_file and"),
            (environment(id, secret), "(with the credentials from the AWS_… environment variables"),
        ] {
            let told = refusal(&agent).await;
            assert!(told.contains(expected) && told.contains(place), "{told}");
        }
    }
}

#[tokio::test]
async fn without_credentials_it_is_told_where_they_were_looked_for() {
    let (s3, files) = (S3Server::start().await, directory());
    let (agent, _directory) = agent(&without_credentials(&s3, files.path())).await;
    // Takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = (silent.local_addr().unwrap(), silent);
    let absent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (silent, absent) = (format!("http://{}", silent.0), format!("http://{absent}"));
    let (instance, container) =
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI");
    for (variable, value, expected) in [
        (instance, silent.as_str(), "Ec2InstanceMetadata: "),
        (instance, &absent, "Ec2InstanceMetadata: "),
        (container, &silent, "timed out"),
        (container, &absent, "Connection refused"),
        ("AWS_EC2_METADATA_DISABLED", "true", "Environment: "),
    ] {
        let told = refusal(&agent.clone().env(variable, value)).await;
        let says = told.contains("no credentials from the AWS_… environment variables");
        assert!(says && told.contains(expected), "{variable}={value}: {told}");
        assert!(!told.contains('\n'), "{told}");
    }
}

/// What is handed out next is used, right or wrong: so it was asked for in time, and again.
#[tokio::test]
async fn credentials_of_a_role_are_renewed_while_the_agent_runs() {
    if postgres_is_missing() {
        return;
    }
    let (s3, files) = (S3Server::start().await, directory());
    let metadata = MetadataService::start(s3.endpoint(), SHORT).await;
    let secret = s3.endpoint().secret_access_key.clone();
    let section = without_credentials(&s3, files.path());
    let scene =
        Scene::start_streaming(files, Some(s3), section, "[wal]\nheartbeat = \"1s\"\n").await;
    let (name, value) = metadata.instance_variable();
    let mut running = scene.agent().env(name, &value).spawn(&["run"]);
    let pieces = || scene.s3.as_ref().unwrap().bucket().keys("").len();
    eventually("credentials are renewed", LIMIT, async || metadata.handed_out() >= 3).await;
    assert!(!running.stderr().contains("\"level\":\"ERROR\""));

    metadata.rotate("another secret");
    running.logged("SignatureDoesNotMatch (with the credentials from the AWS_…", LIMIT).await;
    metadata.rotate(&secret);
    let before = pieces();
    scene.switch_wal().await;
    eventually("WAL is stored again", LIMIT, async || pieces() != before).await;
    running.terminate().await.assert_success();
}
