//! A real backup agent, and what is known of the repository with and without it.

use harness::postgres::postgres_is_missing;
use harness::{Agent, PgServer, directory, eventually, server_port};

use super::{Each, Hang, KEYS, LIMIT, May, begin};
use crate::exporter::server;
use crate::monitor::Monitor;
use crate::scene::{config_text, directory_repository, write};

#[tokio::test]
async fn a_backup_agent_that_is_silent_or_fails_is_named_and_nothing_else() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("primary").setting("fsync", "on").primary().await;
    let directory = directory();
    let (key, port) = (directory.path().join("key"), server_port());
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let host = primary.socket_directory().display().to_string();
    let nodes = [("primary".to_owned(), host, primary.port())];
    let repository = directory_repository(directory.path());
    let text = config_text(&key, &repository, "", &nodes);
    let config = directory.path().join("backup-agent.toml");
    write(&config, &text.replace("127.0.0.1:0", &format!("127.0.0.1:{port}")));
    let agent = Agent::new(&config);
    let mut running = agent.spawn(&["run"]);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE active";
    eventually("WAL is received", LIMIT, async || primary.psql(slots).await == "1").await;
    agent.run(&["backup"]).await.assert_success();

    let tables = format!(
        "[postgres]\nuser = \"postgres\"\ntls = \"disable\"\n{}\
         [[agents]]\nname = \"backup\"\nurl = \"http://127.0.0.1:{port}\"\n",
        server(&primary)
    );
    let monitor = Monitor::configured(KEYS, &tables).started().await;

    let signs = [
        (Hang, "agent backup ready critical"),
        (Hang, "repository 0 backup_age unknown"),
        (Hang, "repository 0 wal_age unknown"),
    ];
    let fault = begin(&monitor, "the backup agent is frozen", &signs).await;
    running.sigstop();
    fault.told().await;
    running.sigcont();
    fault.over().await;
    what_no_agent_tells_of_is_not_known(&monitor, &tables, &primary).await;

    let signs = [
        (Each, "agent backup ready critical"),
        (Each, "repository 0 backup_age unknown"),
        (Each, "repository 0 wal_age unknown"),
        // It has just begun.
        (May, "agent backup ready warning"),
        (May, "repository 0 wal_age warning"),
    ];
    let fault = begin(&monitor, "the backup agent is killed", &signs).await;
    running.kill9().await;
    fault.told().await;
    running = agent.spawn(&["run"]);
    fault.over().await;
    drop(running);
}

/// Beside a group that nobody backs up, and an agent whose url leads to something else.
async fn what_no_agent_tells_of_is_not_known(other: &Monitor, tables: &str, server: &PgServer) {
    // The same directory by another name.
    let host = server.socket_directory().join(".").display().to_string();
    let (port, url) = (server.port(), other.url(""));
    let more = format!(
        "{tables}[[nodes]]\nname = \"worker\"\nhost = \"{host}\"\nport = {port}\ngroup = 1\n\
         [[agents]]\nname = \"backup-agent-2\"\nurl = \"{url}\"\n"
    );
    let checked = Monitor::configured(KEYS, &more).command(&["check"]).await;
    assert_eq!(checked.code(), Some(3), "{checked:?}");
    for said in [
        "repository of group 1  backup_age  no backup agent tells of it",
        "agent backup-agent-2   ready       its /status is not that of a backup agent",
    ] {
        assert!(checked.stdout.contains(said), "no {said:?} in {}", checked.stdout);
    }
    assert!(!checked.stdout.contains("group 0"), "{}", checked.stdout);
}
