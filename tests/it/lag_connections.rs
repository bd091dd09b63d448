//! What becomes of the connections that the lag exporter keeps, and of the sessions behind them.

use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{PgServer, Proxy, directory, eventually, server_port};
use shared::pg::{Node, Settings, Tls, connect};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::exporter::{Exporter, INTERVAL, LIMIT, Scrape, node, server};
use crate::scene::write;

/// The exporter's sessions at a server.
const SESSIONS: &str = "FROM pg_stat_activity WHERE application_name = 'pgmesh/lag-exporter'";

async fn sessions(server: &PgServer) -> u64 {
    server.psql(&format!("SELECT count(*) {SESSIONS}")).await.parse().unwrap()
}

#[tokio::test]
async fn a_session_that_was_terminated_is_replaced_at_once() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    let standby = primary.standby("b").await;
    let mut exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    exporter.state("b", "caught_up").await;
    for _ in 0..4 {
        // One that ends as soon as it is made is another matter.
        sleep(Duration::from_secs(2)).await;
        for server in [&primary, &standby] {
            let terminate = format!("SELECT pg_terminate_backend(pid) {SESSIONS}");
            assert_eq!(server.psql(&terminate).await, "t");
        }
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            let scrape = exporter.scrape().await;
            let up = ["a", "b"].map(|node| scrape.of("target_up", node));
            assert_eq!(up, [Some(1.0), Some(1.0)], "{}", exporter.log());
            assert_eq!(scrape.state("b"), Some("caught_up"));
            sleep(INTERVAL / 10).await;
        }
        assert_eq!([sessions(&primary).await, sessions(&standby).await], [1, 1]);
    }
    let scrape = exporter.scrape().await;
    for node in ["a", "b"] {
        let lost = [("node", node), ("stage", "dial")];
        assert_eq!(scrape.value("target_errors_total", &lost), Some(4.0), "{}", scrape.text);
    }
    let finished = exporter.stop().await;
    assert!(finished.unexpected_log_lines(&[]).is_empty(), "{finished}");
}

#[tokio::test]
async fn clients_that_say_nothing_hold_up_no_scrape() {
    let exporter = Exporter::start(&[node("dead", "127.0.0.1", server_port())]).await;
    let mut silent = Vec::new();
    for _ in 0..5 {
        for number in 0..40 {
            let mut client = TcpStream::connect(exporter.address()).await.unwrap();
            if number % 2 == 0 {
                client.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
            }
            silent.push(client);
        }
        // Fails if it takes long.
        exporter.scrape().await;
    }
}

#[tokio::test]
async fn a_password_that_was_changed_is_read_again() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").password("new").primary().await;
    let directory = directory();
    let file = directory.path().join("password");
    write(&file, "old\n");
    let mut exporter = Exporter::configured("postgres", &server(&primary), "");
    let config = std::fs::read_to_string(exporter.config()).unwrap();
    let key = format!("[postgres]\npassword_file = \"{}\"", file.display());
    write(&exporter.config(), &config.replace("[postgres]", &key));
    exporter.run().await;
    let is_up = |up| move |it: &Scrape| it.of("target_up", "a") == Some(up);
    exporter.until("the password is refused", LIMIT, is_up(0.0)).await;
    assert!(exporter.log().contains("refuses the password"), "{}", exporter.log());
    write(&file, "new\n");
    exporter.until("the password is right", LIMIT, is_up(1.0)).await;
}

/// The network loses a connection without a word: the exporter notices, and makes a new one. The
/// server does not notice, and keeps the dead session.
#[tokio::test]
async fn sessions_that_the_network_lost_do_not_use_up_the_limit_of_the_role() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").tcp().primary().await;
    primary.psql("CREATE ROLE lag LOGIN CONNECTION LIMIT 2; GRANT pg_monitor TO lag").await;
    let link = Proxy::start(format!("127.0.0.1:{}", primary.port()).as_str()).await;
    let topology = node("a", "127.0.0.1", link.port());
    let mut exporter = Exporter::configured("lag", &topology, "");
    exporter.run().await;
    let is = |up| move |it: &Scrape| it.of("target_up", "a") == Some(up);
    exporter.until("it is asked", LIMIT, is(1.0)).await;
    for lost in 1..=3 {
        link.lose();
        exporter.until("it is missed", LIMIT, is(0.0)).await;
        let lost_at = Instant::now();
        exporter.until("it is asked again", LIMIT, is(1.0)).await;
        println!("lost {lost}: asked again after {:?}", lost_at.elapsed());
        // The dead one, and the new one.
        assert!(sessions(&primary).await <= 2);
    }
    eventually("the dead sessions are gone", LIMIT, async || sessions(&primary).await == 1).await;
    assert!(is(1.0)(&exporter.scrape().await));
}

/// By itself a server would wait for hours. A kernel answers for a client that is idle, however
/// long; so nobody who keeps a connection loses it by this.
#[tokio::test]
async fn a_server_looks_whether_clients_are_still_there() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder()
        .tcp()
        .setting("idle_session_timeout", "1s")
        .setting("tcp_keepalives_idle", "7200")
        .primary()
        .await;
    let [name, host] = ["a", "127.0.0.1"].map(str::to_owned);
    let node = Node { group: 0, name, host, port: primary.port() };
    let settings = Settings {
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
    };
    let connection = connect(&settings, &node).await.unwrap();
    // Of the first four the server says what the kernel does.
    for (setting, expected) in [
        ("tcp_keepalives_idle", "30"),
        ("tcp_keepalives_interval", "10"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "30000"),
        ("idle_session_timeout", "0"),
    ] {
        let row = connection.query_one(&format!("SHOW {setting}"), &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), expected, "{setting}");
    }
}
