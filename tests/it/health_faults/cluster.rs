//! Patroni with two groups, three members of etcd, PgBouncer and HAProxy.

use std::fs;
use std::time::Duration;

use harness::{
    Backend, HaProxy, PatroniCluster, PgBouncer, haproxy_is_missing, patroni_is_missing,
    pgbouncer_is_missing,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_postgres::NoTls;

use super::{After, Each, Hang, KEYS, May, Standard, begin};
use crate::monitor::Monitor;

/// Members of etcd that lost their leader know it after an election timeout, 1 s, or two.
const ELECTION: Duration = Duration::from_secs(2);

/// Members 0 and 2 lead the groups 0 and 1; 1 and 3 are their standbys.
struct Scene {
    monitor: Monitor,
    cluster: PatroniCluster,
    bouncer: PgBouncer,
    haproxy: HaProxy,
    _directory: TempDir,
}

impl Scene {
    async fn start() -> Self {
        let builder = PatroniCluster::builder().parameter("fsync", "on").failsafe().etcd(3);
        let cluster = builder.start_groups(&[2, 2]).await;
        let conninfo =
            format!("host=127.0.0.1 port={} user=postgres dbname=postgres", cluster.port(0));
        let settings = [("pool_mode", "transaction"), ("default_pool_size", "1")];
        let bouncer = PgBouncer::start(&[("app", &conninfo)], &settings).await;
        let servers = |index: usize| {
            let rest = cluster.rest_url(index).rsplit_once(':').unwrap().1.parse().unwrap();
            (cluster.name(index).to_owned(), cluster.port(index), rest)
        };
        let backend = |name: &str, path: &str| Backend {
            name: name.to_owned(),
            http_check: Some(path.to_owned()),
            servers: [0, 1].map(servers).to_vec(),
        };
        let backends = [backend("primary", "/primary"), backend("replicas", "/replica")];
        let haproxy = HaProxy::start(&backends).await;
        let directory = harness::directory();
        let password = |name: &str, password: &str| {
            let file = directory.path().join(name);
            fs::write(&file, password).unwrap();
            harness::program::give_to_server_user(&file);
            file.display().to_string()
        };
        let (pool, stats) = (PgBouncer::LOGIN, HaProxy::LOGIN);
        let tables = format!(
            "[postgres]\nuser = \"postgres\"\ntls = \"disable\"\n\
             [etcd]\nendpoints = {:?}\n[patroni]\nscope = \"{}\"\n\
             [limits.pgbouncer]\nwaiting = {{ warning = 0.5, critical = 60 }}\n\
             [[pgbouncer]]\nname = \"bouncer\"\nhost = \"127.0.0.1\"\nport = {}\nuser = \"{}\"\n\
             password_file = \"{}\"\ndatabase = \"app\"\ntls = \"disable\"\n\
             [[haproxy]]\nname = \"haproxy\"\nurl = \"{}\"\nuser = \"{}\"\npassword_file = \"{}\"\n\
             write_backend = \"primary\"\nread_backend = \"replicas\"\n",
            cluster.etcd.endpoints(),
            PatroniCluster::SCOPE,
            bouncer.port(),
            pool.0,
            password("pool", pool.1),
            haproxy.stats_url(),
            stats.0,
            password("stats", stats.1),
        );
        let monitor = Monitor::configured(KEYS, &tables).started().await;
        Self { monitor, cluster, bouncer, haproxy, _directory: directory }
    }

    /// `etcd 127.0.0.1:… reachable critical` of that member.
    fn etcd(&self, index: usize, words: &str) -> String {
        let endpoint = &self.cluster.etcd.endpoints()[index];
        format!("etcd {} {words}", endpoint.trim_start_matches("http://"))
    }
}

#[tokio::test]
async fn each_fault_of_a_cluster_is_named_and_nothing_else() {
    if patroni_is_missing() || haproxy_is_missing() || pgbouncer_is_missing() {
        return;
    }
    let mut scene = Scene::start().await;
    etcd_quorum(&mut scene).await;
    ways_in(&mut scene).await;
    pool(&mut scene).await;
    scene.monitor.terminate().await.assert_success();
    scene.monitor = scene.monitor.started().await;
    etcd_member(&mut scene).await;
    patroni(&mut scene).await;
    standbys(&mut scene).await;
    scene.monitor.terminate().await.assert_success();
    scene.monitor = scene.monitor.started().await;
    primaries(&mut scene).await;
}

async fn etcd_member(scene: &mut Scene) {
    let one = scene.etcd(0, "reachable critical");
    let Scene { monitor, cluster, .. } = scene;
    let signs = [(Hang, one.as_str()), (Hang, "cluster etcd_quorum warning")];
    let fault = begin(monitor, "a member of etcd is frozen", &signs).await;
    cluster.etcd.sigstop(0);
    fault.told().await;
    cluster.etcd.sigcont(0);
    fault.over().await;
}

async fn etcd_quorum(scene: &mut Scene) {
    let [one, two, three] = [0, 1, 2].map(|it| scene.etcd(it, "reachable critical"));
    let leaderless = scene.etcd(2, "health critical");
    let Scene { monitor, cluster, .. } = scene;
    let signs = [
        (Each, one.as_str()),
        (Each, &two),
        (After(ELECTION), &leaderless),
        (After(ELECTION), "cluster etcd_quorum critical"),
        (May, "cluster etcd_quorum warning"),
        (May, &three),
    ];
    let fault = begin(monitor, "etcd loses its quorum", &signs).await;
    cluster.etcd.kill9(0).await;
    cluster.etcd.kill9(1).await;
    fault.told().await;
    cluster.etcd.start_member(0);
    cluster.etcd.start_member(1);
    fault.over().await;
}

async fn ways_in(scene: &mut Scene) {
    let Scene { monitor, bouncer, haproxy, .. } = scene;
    let signs = [(Each, "pgbouncer bouncer reachable critical")];
    let fault = begin(monitor, "PgBouncer is killed", &signs).await;
    bouncer.kill9().await;
    fault.told().await;
    bouncer.start_again().await;
    fault.over().await;

    let signs = [(Hang, "pgbouncer bouncer reachable critical")];
    let fault = begin(monitor, "PgBouncer is frozen", &signs).await;
    bouncer.sigstop();
    fault.told().await;
    bouncer.sigcont();
    fault.over().await;

    let signs = [(Hang, "haproxy haproxy reachable critical")];
    let fault = begin(monitor, "HAProxy is frozen", &signs).await;
    haproxy.sigstop();
    fault.told().await;
    haproxy.sigcont();
    fault.over().await;

    let signs = [(Each, "haproxy haproxy reachable critical")];
    let fault = begin(monitor, "HAProxy is killed", &signs).await;
    haproxy.kill9().await;
    fault.told().await;
    haproxy.start_again().await;
    fault.over().await;
}

/// A client that does not commit holds the one server of the pool, and another waits for it.
async fn pool(scene: &mut Scene) {
    let mut config = tokio_postgres::Config::new();
    let (user, password) = PgBouncer::LOGIN;
    config.host("127.0.0.1").port(scene.bouncer.port());
    config.user(user).password(password).dbname("app");
    let mut tasks = JoinSet::new();
    let signs =
        [(Hang, "pgbouncer bouncer query critical"), (Hang, "pgbouncer bouncer waiting warning")];
    let fault = begin(&scene.monitor, "the pool is exhausted", &signs).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tasks.spawn(async move { drop(connection.await) });
        clients.push(client);
    }
    clients[0].simple_query("BEGIN").await.unwrap();
    let other = clients.pop().unwrap();
    tasks.spawn(async move { drop(other.simple_query("SELECT 1").await) });
    fault.told().await;
    clients[0].simple_query("COMMIT").await.unwrap();
    fault.over().await;
}

async fn patroni(scene: &mut Scene) {
    let Scene { monitor, cluster, .. } = scene;
    let signs = [(Each, "patroni patroni-4 reachable critical")];
    let fault = begin(monitor, "a standby's Patroni is killed", &signs).await;
    cluster.kill9_patroni(3).await;
    fault.told().await;
    cluster.start_member(3);
    fault.over().await;

    // Its server goes on, but HAProxy cannot ask for its role any more, and knows it after 2 s.
    let check = Duration::from_millis(2500);
    let signs = [
        (Hang, "patroni patroni-2 reachable critical"),
        (After(check), "haproxy haproxy read warning"),
    ];
    let fault = begin(monitor, "a standby's Patroni is frozen", &signs).await;
    cluster.sigstop_patroni(1);
    fault.told().await;
    cluster.sigcont_patroni(1);
    fault.over().await;

    let url = format!("{}/config", cluster.rest_url(2));
    let set = async |body: Value| {
        let answer = reqwest::Client::new().patch(&url).body(body.to_string()).send().await;
        assert!(answer.unwrap().status().is_success());
    };
    // Each Patroni reads it when it looks the next time.
    let look = Duration::from_secs(2);
    let signs = [
        (After(look), "patroni patroni-3 state warning"),
        (After(look), "patroni patroni-4 state warning"),
    ];
    let fault = begin(monitor, "Patroni is paused", &signs).await;
    set(json!({"pause": true})).await;
    fault.told().await;
    set(json!({"pause": null})).await;
    fault.over().await;
}

async fn standbys(scene: &mut Scene) {
    let Scene { monitor, cluster, .. } = scene;
    // The primary waits for its standby's next word until `wal_sender_timeout`.
    let signs = [
        (Hang, "postgres patroni-2 reachable critical"),
        (May, "patroni patroni-2 reachable critical"),
        (May, "patroni patroni-2 state warning"),
        (May, "haproxy haproxy read warning"),
    ];
    let fault = begin(monitor, "a standby is frozen", &signs).await;
    cluster.sigstop_postgres(1);
    fault.told().await;
    cluster.sigcont_postgres(1);
    fault.over().await;

    let signs = [
        (Each, "postgres patroni-4 reachable critical"),
        (Each, "patroni patroni-4 reachable critical"),
        (Standard, "group 1 redundancy critical"),
        (May, "postgres patroni-4 reachable warning"),
        (May, "postgres patroni-4 streaming warning"),
        (May, "patroni patroni-4 state warning"),
    ];
    let fault = begin(monitor, "a standby is lost with its Patroni", &signs).await;
    cluster.kill9(3).await;
    fault.told().await;
    cluster.start_member(3);
    fault.over().await;
}

async fn primaries(scene: &mut Scene) {
    let Scene { monitor, cluster, .. } = scene;
    let signs = [
        (Hang, "postgres patroni-3 reachable critical"),
        (Hang, "group 1 primary critical"),
        (Hang, "group 1 redundancy unknown"),
        (May, "patroni patroni-3 reachable critical"),
        (May, "patroni patroni-3 state warning"),
    ];
    let fault = begin(monitor, "a primary is frozen", &signs).await;
    cluster.sigstop_postgres(2);
    fault.told().await;
    cluster.sigcont_postgres(2);
    fault.over().await;

    let signs = [
        (Each, "postgres patroni-3 reachable critical"),
        (Each, "patroni patroni-3 reachable critical"),
        (Each, "group 1 primary critical"),
        (Each, "group 1 redundancy unknown"),
        (May, "postgres patroni-3 reachable warning"),
        (May, "patroni patroni-3 state warning"),
        (May, "patroni patroni-3 role critical"),
        (May, "patroni patroni-3 role warning"),
        (May, "group 1 redundancy critical"),
        (May, "postgres patroni-4 streaming warning"),
    ];
    let fault = begin(monitor, "a primary is lost with its Patroni", &signs).await;
    cluster.kill9(2).await;
    fault.told().await;
    cluster.start_member(2);
    fault.over().await;
}
