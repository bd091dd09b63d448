//! A running lag exporter, and what it answers to a scrape.

use std::path::PathBuf;
use std::time::Duration;

use harness::{
    Agent, Finished, PatroniCluster, PgServer, RunningAgent, directory, eventually, program,
    server_port,
};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::scene::write;

/// Between two samples: the shorter, the shorter the tests.
pub(crate) const INTERVAL: Duration = Duration::from_millis(250);
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// Longest scrape: it is answered from memory, however long the servers take.
const SCRAPE_LIMIT: Duration = Duration::from_secs(1);

/// The states in which there is no lag.
const WITHOUT_LAG: [&str; 5] =
    ["primary_unknown", "diverged", "other_cluster", "unreachable", "unknown"];

/// A lag exporter with its configuration.
#[derive(Debug)]
pub(crate) struct Exporter {
    directory: TempDir,
    port: u16,
    extra: String,
    agent: Option<RunningAgent>,
    client: reqwest::Client,
}

/// A server as the configuration has it.
pub(crate) fn node(name: &str, host: &str, port: u16) -> String {
    format!("[[nodes]]\nname = \"{name}\"\nhost = \"{host}\"\nport = {port}\n")
}

/// A server of the harness, by its Unix socket.
pub(crate) fn server(server: &PgServer) -> String {
    node(server.name(), &server.socket_directory().display().to_string(), server.port())
}

impl Exporter {
    /// Starts it for these servers, as the superuser, and waits until each was asked once.
    pub(crate) async fn start(nodes: &[String]) -> Self {
        let mut exporter = Self::configured("postgres", &nodes.concat(), "");
        exporter.run().await;
        exporter
    }

    /// Starts it for the members of a cluster of Patroni, as the superuser.
    pub(crate) async fn of_patroni(cluster: &PatroniCluster) -> Self {
        let (endpoints, scope) = (cluster.etcd.endpoints(), PatroniCluster::SCOPE);
        let topology =
            format!("[patroni]\nscope = \"{scope}\"\n[etcd]\nendpoints = {endpoints:?}\n");
        let mut exporter = Self::configured("postgres", &topology, "");
        exporter.run().await;
        exporter
    }

    /// Writes a configuration. `extra` are keys outside of sections.
    pub(crate) fn configured(user: &str, topology: &str, extra: &str) -> Self {
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let (directory, port, extra) = (directory(), server_port(), extra.to_owned());
        let exporter = Self { directory, port, extra, agent: None, client };
        exporter.configure(user, topology);
        exporter
    }

    /// Writes the configuration anew; for the next start.
    pub(crate) fn configure(&self, user: &str, topology: &str) {
        let (port, extra, interval) = (self.port, &self.extra, INTERVAL.as_millis());
        let text = format!(
            "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{port}\"\n\
             sample_interval = \"{interval}ms\"\n{extra}\
             [postgres]\nuser = \"{user}\"\ntls = \"disable\"\n{topology}"
        );
        write(&self.config(), &text);
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("lag-exporter.toml")
    }

    /// `127.0.0.1:…`.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts it, and waits until each server was asked once.
    pub(crate) async fn run(&mut self) {
        self.agent = Some(Agent::lag_exporter(&self.config()).spawn(&["run"]));
        let url = format!("http://{}/readyz", self.address());
        eventually("the exporter is ready", LIMIT, async || {
            assert!(self.agent.as_mut().unwrap().is_running(), "the exporter ended");
            let answer = self.client.get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
    }

    /// Stops it in order.
    pub(crate) async fn stop(&mut self) -> Finished {
        let finished = self.agent.take().unwrap().terminate().await;
        finished.assert_success();
        finished
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        self.agent.as_ref().unwrap().stdout()
    }

    /// Runs one of its commands.
    pub(crate) async fn command(&self, arguments: &[&str]) -> Finished {
        Agent::lag_exporter(&self.config()).run(arguments).await
    }

    /// Scrapes it, and checks what must be true of every answer.
    pub(crate) async fn scrape(&self) -> Scrape {
        let began_at = Instant::now();
        let url = format!("http://{}/metrics", self.address());
        let accept = "text/plain;version=0.0.4";
        let answer = self.client.get(url).header("accept", accept).send().await.unwrap();
        let scrape = Scrape { text: answer.error_for_status().unwrap().text().await.unwrap() };
        let took = began_at.elapsed();
        assert!(took < SCRAPE_LIMIT, "a scrape took {took:?}");
        scrape.unknown_is_never_zero();
        scrape
    }

    /// Scrapes until `condition` holds.
    pub(crate) async fn until(
        &self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Scrape) -> bool,
    ) -> Scrape {
        let deadline = Instant::now() + limit;
        loop {
            let scrape = self.scrape().await;
            if condition(&scrape) {
                return scrape;
            }
            let ours: Vec<_> = scrape.text.lines().filter(|line| !line.starts_with('#')).collect();
            let late = deadline < Instant::now();
            assert!(!late, "not within {limit:?}: {what}\n{}\n{}", ours.join("\n"), self.log());
            tokio::time::sleep(INTERVAL / 5).await;
        }
    }

    /// Waits until that is the state of a standby.
    pub(crate) async fn state(&self, node: &str, state: &str) -> Scrape {
        let what = format!("{node} is {state}");
        self.until(&what, LIMIT, |it| it.state(node) == Some(state)).await
    }
}

/// The answer to a scrape.
#[derive(Clone, Debug)]
pub(crate) struct Scrape {
    pub(crate) text: String,
}

impl Scrape {
    /// The values of the series of that name, without `pgmesh_lag_`, with these labels.
    pub(crate) fn values(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let prefix = format!("pgmesh_lag_{name}{{");
        let labels: Vec<_> = labels.iter().map(|(name, it)| format!("{name}=\"{it}\"")).collect();
        let lines = self.text.lines().filter(|line| line.starts_with(&prefix));
        let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap()).collect()
    }

    /// The value of the only one.
    pub(crate) fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let values = self.values(name, labels);
        assert!(values.len() <= 1, "{name} {labels:?}: {values:?}");
        values.first().copied()
    }

    /// Of a node.
    pub(crate) fn of(&self, name: &str, node: &str) -> Option<f64> {
        self.value(name, &[("node", node)])
    }

    /// The state of a standby's lag; `None` of a primary.
    pub(crate) fn state(&self, node: &str) -> Option<&'static str> {
        let mut all = WITHOUT_LAG.into_iter().chain(["ok", "caught_up", "beyond_history"]);
        let is = |state| self.value("lag_state", &[("node", node), ("state", state)]) == Some(1.0);
        all.find(|state| is(state))
    }

    /// Lower bound, estimate and upper bound of the lag.
    pub(crate) fn lag(&self, node: &str) -> [Option<f64>; 3] {
        ["_lower", "", "_upper"].map(|it| self.of(&format!("replay_lag{it}_seconds"), node))
    }

    /// Panics if a lag that is not known has a number that could be taken for one.
    fn unknown_is_never_zero(&self) {
        for line in self.text.lines().filter(|it| it.starts_with("pgmesh_lag_lag_state{")) {
            let name = line.split("node=\"").nth(1).and_then(|it| it.split('"').next()).unwrap();
            let [lower, estimate, upper] = self.lag(name);
            let state = self.state(name).unwrap();
            let receive = self.of("receive_lag_seconds", name);
            let is_fine = match state {
                "ok" => lower <= estimate && estimate <= upper && lower.is_some(),
                "caught_up" => (lower, estimate) == (Some(0.0), Some(0.0)) && upper.is_some(),
                "beyond_history" => lower.is_some() && (estimate, upper) == (None, None),
                "primary_unknown" => (lower, estimate) == (None, None),
                _ => (lower, estimate, upper, receive) == (None, None, None, None),
            };
            assert!(is_fine, "{name} is {state}: {lower:?} {estimate:?} {upper:?} {receive:?}");
        }
    }
}

/// Runs a program with that text on its standard input, and returns what it printed and its exit
/// code.
pub(crate) async fn piped(directory: &TempDir, program: &str, input: &str) -> Finished {
    let file = directory.path().join("input");
    write(&file, input);
    let command = format!("{program} < {}", file.display());
    program::finish(program::command("/bin/sh").args(["-c", &command]), LIMIT).await
}
