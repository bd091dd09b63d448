//! etcd behind TLS and logins: what is right goes on whatever happens, and what is wrong is told
//! with what to do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Authority, EtcdCluster, Identity, directory, etcd_is_missing};
use shared::etcd::{Change, Etcd, EtcdConfig, Watch};
use shared::telemetry::chain;
use tokio::time::{Instant, timeout};

use crate::scene::write;

/// Longest time until a setting that is wrong is told: endpoints are asked for 5 s.
const TOLD_LIMIT: Duration = Duration::from_secs(6);
/// How long a token of etcd lives without being used.
const TOKEN_TTL: Duration = Duration::from_secs(1);
/// Longest wait for what should follow within seconds.
const LIMIT: Duration = Duration::from_secs(20);

fn config(cluster: &EtcdCluster) -> EtcdConfig {
    EtcdConfig {
        endpoints: cluster.endpoints(),
        user: None,
        password_file: None,
        ca_file: None,
        certificate_file: None,
        key_file: None,
    }
}

fn with_tls(cluster: &EtcdCluster, ca_file: PathBuf, own: Option<&Identity>) -> EtcdConfig {
    EtcdConfig {
        ca_file: Some(ca_file),
        certificate_file: own.map(|own| own.certificate.clone()),
        key_file: own.map(|own| own.key.clone()),
        ..config(cluster)
    }
}

fn with_login(cluster: &EtcdCluster, user: &str, password_file: &Path) -> EtcdConfig {
    let (user, password_file) = (Some(user.to_owned()), Some(password_file.to_owned()));
    EtcdConfig { user, password_file, ..config(cluster) }
}

/// A watch that has told what there was.
async fn watching(etcd: &Etcd) -> Watch {
    let mut watch = etcd.watch("/t/");
    let first = watch.next().await.unwrap();
    assert!(matches!(first, Change::All { .. }), "{first:?}");
    watch
}

/// Puts a key with a lease that is kept alive, and sees it in the watch.
async fn does_everything(etcd: &Etcd, watch: &mut Watch, value: &str) {
    let (lease, _) = etcd.grant(Duration::from_secs(30)).await.unwrap();
    etcd.keep_alive(lease).await.unwrap();
    etcd.put("/t/k", value, Some(lease)).await.unwrap();
    let seen = async {
        loop {
            let entries = match watch.next().await.unwrap() {
                Change::Put(entry) => vec![entry],
                // The watch was broken meanwhile.
                Change::All { entries, .. } => entries,
                Change::Deleted { .. } => Vec::new(),
            };
            if entries.iter().any(|entry| entry.value == value.as_bytes()) {
                break;
            }
        }
    };
    assert!(timeout(LIMIT, seen).await.is_ok(), "{value} was not seen");
    etcd.keep_alive(lease).await.unwrap();
}

/// What a request is answered with; that it takes no longer than a request may.
async fn told(config: &EtcdConfig) -> String {
    let began_at = Instant::now();
    let error = Etcd::new(config).unwrap().get("/t/k").await.unwrap_err();
    assert!(began_at.elapsed() < TOLD_LIMIT, "{:?}", began_at.elapsed());
    error.to_string()
}

#[tokio::test]
async fn certificates_are_asked_for_on_both_sides() {
    if etcd_is_missing() {
        return;
    }
    let (authority, other) = (Authority::new(), Authority::new());
    let (own, foreign) = (authority.issue("agent"), other.issue("foreign"));
    let cluster = EtcdCluster::start_with_tls(&authority, &own).await;
    let etcd = Etcd::new(&with_tls(&cluster, authority.ca_file(), Some(&own))).unwrap();
    does_everything(&etcd, &mut watching(&etcd).await, "x").await;
    let mixed = Identity { key: foreign.key.clone(), ..own.clone() };
    let none = Identity { certificate: own.key.clone(), ..own.clone() };
    for (wrong, expected) in [(mixed, "KeyMismatch"), (none, "no items found")] {
        let refused = Etcd::new(&with_tls(&cluster, authority.ca_file(), Some(&wrong)));
        let told = chain(&refused.unwrap_err()).to_string();
        let place = format!(
            "certificate_file and key_file: use the certificate in {}",
            wrong.certificate.display()
        );
        assert!(told.contains(&place) && told.contains(expected), "{told}");
    }
    let wanted = "asks for a certificate of ours that it trusts, see certificate_file and key_file";
    for (wrong, expected) in [
        (with_tls(&cluster, other.ca_file(), Some(&own)), "unknown CA, expected one from ca_file"),
        (with_tls(&cluster, authority.ca_file(), None), wanted),
        (with_tls(&cluster, authority.ca_file(), Some(&foreign)), wanted),
    ] {
        let told = told(&wrong).await;
        assert!(told.contains(expected), "{told}");
    }
}

#[tokio::test]
async fn a_login_is_renewed_and_a_wrong_one_is_told() {
    if etcd_is_missing() {
        return;
    }
    let files = directory();
    let (right, wrong) = (files.path().join("right"), files.path().join("wrong"));
    write(&right, "open-sesame\n");
    write(&wrong, "open-barley\n");
    let ttl = TOKEN_TTL.as_secs().to_string();
    let mut cluster = EtcdCluster::start_one(&["--auth-token-ttl", &ttl]).await;
    let agent = with_login(&cluster, "agent", &right);
    assert!(told(&agent).await.contains("not enabled (take out etcd.user and"));
    for command in [
        "role add agent",
        "role grant-permission agent --prefix=true readwrite /t/",
        "user add agent:open-sesame",
        "user grant-role agent agent",
    ] {
        cluster.etcdctl(&command.split(' ').collect::<Vec<_>>()).await;
    }
    cluster.enable_auth().await;
    for (config, expected) in [
        (with_login(&cluster, "agent", &wrong), "(see etcd.user and etcd.password_file)"),
        (with_login(&cluster, "nobody", &right), "(see etcd.user and etcd.password_file)"),
        (config(&cluster), "user name is empty (set etcd.user and etcd.password_file)"),
    ] {
        let told = told(&config).await;
        assert!(told.contains(expected), "{told}");
    }
    let etcd = Etcd::new(&agent).unwrap();
    let denied = etcd.watch("/other").next().await.unwrap_err().to_string();
    assert!(denied.contains("(grant the role of etcd.user"), "{denied}");

    let mut watch = watching(&etcd).await;
    does_everything(&etcd, &mut watch, "at first").await;
    // Nothing is asked of etcd but whether it is still there.
    let quiet = timeout(TOKEN_TTL * 4, watch.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    does_everything(&etcd, &mut watch, "with an open watch").await;
    let quiet = timeout(TOKEN_TTL * 4, watch.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    does_everything(&etcd, &mut watching(&etcd).await, "with a new watch").await;
    // An etcd that is started anew knows none of its tokens.
    cluster.kill9(0).await;
    cluster.start_member(0);
    cluster.serves().await;
    does_everything(&etcd, &mut watch, "after a restart").await;
}
