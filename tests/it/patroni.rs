//! The topology of a real Patroni cluster: switchover, failover, and etcd gone.

use std::time::Duration;

use harness::{
    Agent, EtcdCluster, PatroniCluster, directory, etcd_is_missing, eventually, patroni_is_missing,
    server_port,
};
use shared::pg::Node;
use shared::pg::Settings;
use shared::pg::settings::Tls;
use shared::topology::{
    Members, PatroniConfig, PatroniRole, RestConfig, Role, Source, Topology, TopologyConfig,
    observe_group,
};
use tokio_util::sync::CancellationToken;

use crate::etcd::client;
use crate::replicas::section as section_of_etcd;
use crate::scene::{config_text, write};

/// A failover waits for the leader's key, 20 s, and for the promotion.
const FAILOVER_LIMIT: Duration = Duration::from_mins(1);
const LIMIT: Duration = Duration::from_secs(30);

fn config(rest: Vec<RestConfig>) -> PatroniConfig {
    PatroniConfig {
        scope: PatroniCluster::SCOPE.to_owned(),
        namespace: "/service/".to_owned(),
        rest,
        ca_file: None,
    }
}

fn topology(cluster: &PatroniCluster) -> Topology {
    let patroni = config(Vec::new());
    let config = TopologyConfig { etcd: None, patroni: Some(&patroni), nodes: &[] };
    Topology::new(config, Some(client(cluster.etcd.endpoints()))).unwrap()
}

fn nodes(cluster: &PatroniCluster) -> Vec<Node> {
    let node = |index| {
        let (name, host) = (cluster.name(index).to_owned(), "127.0.0.1".to_owned());
        Node { group: 0, name, host, port: cluster.port(index) }
    };
    vec![node(0), node(1)]
}

/// The member that Patroni says leads.
fn leader(members: &Members) -> Option<&str> {
    let leads = |it: &&shared::topology::Member| {
        it.opinion.as_ref().is_some_and(|it| it.role == PatroniRole::Leader)
    };
    members.list.iter().find(leads).map(|it| it.node.name.as_str())
}

fn settings() -> Settings {
    Settings {
        user: "postgres".to_owned(),
        password: None,
        database: "postgres".to_owned(),
        tls: Tls::Disable,
        allow_weak_auth: false,
        application_name: "pgmesh/tests".to_owned(),
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        lock_timeout: Duration::from_secs(5),
        idle_session_timeout: Duration::ZERO,
    }
}

/// The primary as the servers themselves say.
async fn primary(nodes: &[Node]) -> Option<(String, u32)> {
    let group = observe_group(&settings(), nodes, 0).await;
    let (node, state) = group.primary().ok()?;
    assert_eq!(state.role, Role::Primary);
    Some((node.name.clone(), state.timeline))
}

/// Patroni uses another etcd or another scope, or its keys were lost: that is not a cluster without
/// members.
#[tokio::test]
async fn an_etcd_without_members_leaves_them_unknown() {
    if etcd_is_missing() {
        return;
    }
    let etcd_cluster = EtcdCluster::start(1).await;
    let patroni = config(Vec::new());
    let config = TopologyConfig { etcd: None, patroni: Some(&patroni), nodes: &[] };
    let etcd = client(etcd_cluster.endpoints());
    let topology = Topology::new(config, Some(etcd.clone())).unwrap();
    let why = topology.why_unknown().unwrap();
    assert!(why.ends_with(" are unknown: nobody has answered yet"), "{why}");
    let stop = CancellationToken::new();
    let follow = topology.clone().follow(stop.clone());
    let test = async {
        let why = || topology.why_unknown().unwrap_or_default();
        eventually("it is told", LIMIT, async || why().contains("etcd holds no member")).await;
        assert!(why().contains("see that Patroni runs"), "{}", why());
        let key = format!("/service/{}/members/a", PatroniCluster::SCOPE);
        let member = r#"{"conn_url":"postgres://127.0.0.1:5431/postgres","role":"primary"}"#;
        etcd.put(&key, member, None).await.unwrap();
        eventually("it is known", LIMIT, async || topology.why_unknown().is_none()).await;
        stop.cancel();
    };
    let (followed, ()) = tokio::join!(follow, test);
    followed.unwrap();
}

/// Nothing to do is not the same as nothing that is known to do.
#[tokio::test]
async fn an_agent_that_knows_no_member_is_not_ready() {
    if etcd_is_missing() {
        return;
    }
    let (etcd, files, port) = (EtcdCluster::start(1).await, directory(), server_port());
    let path = |name: &str| files.path().join(name);
    let (config, key, repository) = (path("agent.toml"), path("key"), path("repository"));
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    std::fs::create_dir(&repository).unwrap();
    let section = format!("[repository.directory]\npath = \"{}\"\n", repository.display());
    let patroni = format!("[patroni]\nscope = \"demo\"\n{}", section_of_etcd(&etcd));
    let text = config_text(&key, &section, &patroni, &[]);
    write(&config, &text.replace("127.0.0.1:0", &format!("127.0.0.1:{port}")));
    let _agent = Agent::new(&config).spawn(&["run"]);
    let ready = async || {
        let answer = reqwest::get(format!("http://127.0.0.1:{port}/readyz")).await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    };
    let expected = "the members of Patroni's cluster below /service/demo/ are unknown: etcd holds no \
                    member there: see that Patroni runs";
    eventually("it says what is wrong", LIMIT, async || {
        ready().await.is_some_and(|(status, text)| status == 503 && text.contains(expected))
    })
    .await;
}

#[tokio::test]
async fn the_members_are_followed_through_switchover_and_failover() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::builder().slot("pgmesh").start(2).await;
    let topology = topology(&cluster);
    let stop = CancellationToken::new();
    let follow = topology.clone().follow(stop.clone());
    let test = async {
        assert_eq!(topology.nodes().await.unwrap(), nodes(&cluster));
        let first = cluster.leader().await;
        let other = 1 - first;
        let mut latest = topology.subscribe();
        let members = latest.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!((members.source, members.age()), (Source::Etcd, Duration::ZERO));
        assert_eq!(leader(&members), Some(cluster.name(first)));
        let before = primary(&nodes(&cluster)).await.unwrap();
        assert_eq!(before.0, cluster.name(first));
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'pgmesh'";
        for index in 0..2 {
            eventually("the permanent slot is on each member", LIMIT, async || {
                let row = cluster.connect(index).await.query_one(slots, &[]).await.unwrap();
                row.get::<_, i64>(0) == 1
            })
            .await;
        }

        cluster.switchover(other).await;
        let name = cluster.name(other).to_owned();
        eventually("the topology follows the switchover", LIMIT, async || {
            leader(&topology.members().await.unwrap()) == Some(&name)
        })
        .await;
        let after = primary(&topology.nodes().await.unwrap()).await.unwrap();
        assert_eq!(after, (name.clone(), before.1 + 1));

        cluster.kill9(other).await;
        let name = cluster.name(first).to_owned();
        eventually("the topology follows the failover", FAILOVER_LIMIT, async || {
            leader(&topology.members().await.unwrap()) == Some(&name)
        })
        .await;
        eventually("the new primary says so itself", LIMIT, async || {
            let nodes = topology.nodes().await.unwrap();
            primary(&nodes).await == Some((name.clone(), before.1 + 2))
        })
        .await;

        cluster.start_member(other);
        cluster.settled().await;
        eventually("both are there again", LIMIT, async || {
            topology.nodes().await.unwrap() == nodes(&cluster)
        })
        .await;
        stop.cancel();
    };
    let (followed, ()) = tokio::join!(follow, test);
    followed.unwrap();
}

#[tokio::test]
async fn members_stay_known_and_are_asked_themselves_while_etcd_is_gone() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::start(2).await;
    let topology = topology(&cluster);
    let stop = CancellationToken::new();
    let follow = topology.clone().follow(stop.clone());
    let test = async {
        let mut latest = topology.subscribe();
        latest.wait_for(Option::is_some).await.unwrap();

        cluster.etcd.kill9(0).await;
        let from_rest = |members: &Option<Members>| {
            members.as_ref().is_some_and(|it| it.source == Source::Rest)
        };
        let limit = tokio::time::timeout(LIMIT, latest.wait_for(from_rest));
        let members = limit.await.expect("the members are asked").unwrap().clone().unwrap();
        assert_eq!(members.nodes(), nodes(&cluster));
        assert!(members.list.iter().all(|it| it.opinion.is_some()), "{members:?}");

        // A topology that begins now has never heard anything.
        let began_now = self::topology(&cluster);
        let error = began_now.nodes().await.unwrap_err().to_string();
        assert!(error.contains("are unknown: list: no etcd endpoint answers"), "{error}");

        cluster.etcd.start_member(0);
        cluster.etcd.serves().await;
        let from_etcd = |members: &Option<Members>| {
            members.as_ref().is_some_and(|it| it.source == Source::Etcd)
        };
        let limit = tokio::time::timeout(LIMIT, latest.wait_for(from_etcd));
        limit.await.expect("etcd is asked again").unwrap();
        assert_eq!(topology.nodes().await.unwrap(), nodes(&cluster));
        stop.cancel();
    };
    let (followed, ()) = tokio::join!(follow, test);
    followed.unwrap();
}

/// Where only we are cut off from etcd, Patroni tells who the members are.
#[tokio::test]
async fn the_rest_api_alone_is_enough() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::start(2).await;
    let silent = RestConfig { group: 0, url: "http://127.0.0.1:1".to_owned() };
    let rest = RestConfig { group: 0, url: cluster.rest_url(1) };
    let patroni = config(vec![silent, rest]);
    let config = TopologyConfig { etcd: None, patroni: Some(&patroni), nodes: &[] };
    let topology = Topology::new(config, None).unwrap();
    let members = topology.members().await.unwrap();
    assert_eq!((members.source, members.nodes()), (Source::Rest, nodes(&cluster)));
    assert_eq!(leader(&members), Some(cluster.name(0)));

    let stop = CancellationToken::new();
    let follow = topology.clone().follow(stop.clone());
    let test = async {
        cluster.switchover(1).await;
        let name = cluster.name(1).to_owned();
        eventually("the topology follows the switchover", LIMIT, async || {
            leader(&topology.members().await.unwrap()) == Some(&name)
        })
        .await;
        for index in 0..2 {
            cluster.kill9(index).await;
        }
        eventually("the members stay known", LIMIT, async || {
            let members = topology.members().await.unwrap();
            assert_eq!(members.nodes(), nodes(&cluster));
            Duration::ZERO < members.age()
        })
        .await;
        stop.cancel();
    };
    let (followed, ()) = tokio::join!(follow, test);
    followed.unwrap();
}
