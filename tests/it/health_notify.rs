//! Who must know, and is told once: a real Alertmanager, webhooks that fail and hang, a leader that is
//! killed, silences. What is sick and well again here is another agent, as its admin server says.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use harness::postgres::postgres_is_missing;
use harness::{
    Agent, Alertmanager, Authority, EtcdCluster, Finished, PgServer, RunningAgent, TlsFront,
    alertmanager_is_missing, directory, etcd_is_missing, eventually, server_port,
};
use serde_json::Value;
use shared::lease::TTL;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::monitor::wrong;
use crate::scene::write;

/// Longest wait for what should follow within seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// In this time a notice that must not be sent would have been.
const QUIET: Duration = Duration::from_secs(4);
/// So long after a notice was taken it is written down: killed before, the agent would tell it again.
const WRITTEN: Duration = Duration::from_secs(2);

/// Who may tell the receivers that want a login, and the header that a webhook needs.
const LOGIN: (&str, &str) = ("ada", "lovelace");
const TOKEN: (&str, &str) = ("x-token", "of the tests");

/// How a receiver answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Take,
    Fail,
    Hang,
}

/// A receiver of webhooks.
#[derive(Clone, Debug)]
struct Receiver(Arc<Mutex<(Answer, Vec<Value>, usize)>>);

impl Receiver {
    fn answers(&self, answer: Answer) {
        self.0.lock().unwrap().0 = answer;
    }

    /// What was taken.
    fn taken(&self) -> Vec<Value> {
        self.0.lock().unwrap().1.clone()
    }

    /// How often something was sent.
    fn asked(&self) -> usize {
        self.0.lock().unwrap().2
    }

    /// What was told of one agent: `began warning`.
    fn told(&self, name: &str) -> Vec<String> {
        let word = |it: &Value, key: &str| it[key].as_str().unwrap_or_default().to_owned();
        let taken = self.taken();
        let of_one = taken.iter().filter(|it| it["node"] == name);
        of_one.map(|it| format!("{} {}", word(it, "event"), word(it, "status"))).collect()
    }

    /// Waits until an agent was told of like this, and nothing else.
    async fn tells(&self, name: &str, expected: &[&str]) {
        let what = format!("{name} was told of: {expected:?}");
        eventually(&what, LIMIT, async || self.told(name) == expected).await;
    }
}

async fn receive(State(receiver): State<Receiver>, body: String) -> StatusCode {
    let answer = {
        let mut state = receiver.0.lock().unwrap();
        state.2 += 1;
        if state.0 == Answer::Take {
            state.1.push(serde_json::from_str(&body).unwrap());
        }
        state.0
    };
    match answer {
        Answer::Take => StatusCode::OK,
        Answer::Fail => StatusCode::INTERNAL_SERVER_ERROR,
        Answer::Hang => std::future::pending().await,
    }
}

/// An agent that says it is sick, or well.
#[derive(Clone, Debug, Default)]
struct Patient(Arc<Mutex<bool>>);

impl Patient {
    fn is_sick(&self, sick: bool) {
        *self.0.lock().unwrap() = sick;
    }
}

async fn readyz(State(patient): State<Patient>) -> (StatusCode, &'static str) {
    if *patient.0.lock().unwrap() {
        (StatusCode::SERVICE_UNAVAILABLE, "it has a cold\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

/// A server, patients and a receiver: all that a health monitor needs.
struct Ward {
    _server: PgServer,
    nodes: String,
    patients: Vec<Patient>,
    receiver: Receiver,
    receiver_url: String,
    client: reqwest::Client,
    directory: TempDir,
    _tasks: JoinSet<()>,
}

/// One message for each notice.
const ONE_BY_ONE: &str = "body = '{\"event\": \"{event}\", \"node\": \"{node}\", \
                          \"kind\": \"{kind}\", \"status\": \"{status}\"}'\n";

impl Ward {
    async fn new(patients: usize) -> Self {
        let server = PgServer::primary().await;
        let mut nodes = format!(
            "[[nodes]]\nname = \"primary\"\nhost = \"{}\"\nport = {}\n",
            server.socket_directory().display(),
            server.port()
        );
        let mut tasks = JoinSet::new();
        let mut serve = async |routes: Router| {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            tasks.spawn(async move { axum::serve(listener, routes).await.unwrap() });
            url
        };
        let receiver = Receiver(Arc::new(Mutex::new((Answer::Take, Vec::new(), 0))));
        let routes = Router::new().route("/", post(receive)).with_state(receiver.clone());
        let receiver_url = serve(routes).await;
        let patients: Vec<Patient> = (0..patients).map(|_| Patient::default()).collect();
        for (number, patient) in patients.iter().enumerate() {
            let routes = Router::new()
                .route("/livez", get(async || "ok\n"))
                .route("/readyz", get(readyz))
                .route("/status", get(async || "{}"))
                .with_state(patient.clone());
            let url = serve(routes).await;
            writeln!(nodes, "[[agents]]\nname = \"patient-{number}\"\nurl = \"{url}\"").unwrap();
        }
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let directory = directory();
        Self {
            _server: server,
            nodes,
            patients,
            receiver,
            receiver_url,
            client,
            directory,
            _tasks: tasks,
        }
    }

    /// The table of the webhook.
    fn webhook(&self, body: &str) -> String {
        format!("[[webhook]]\nname = \"chat\"\nurl = \"{}\"\n{body}", self.receiver_url)
    }

    /// A monitor with these tables, that tells at once.
    fn monitor(&self, name: &str, state: &str, tables: &str) -> Monitor {
        let port = server_port();
        let config = self.directory.path().join(format!("{name}.toml"));
        let text = format!(
            "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{port}\"\ninterval = \"200ms\"\n\
             comprehensive_interval = \"1s\"\n{state}[postgres]\nuser = \"postgres\"\n\
             tls = \"disable\"\n[notify]\nafter = \"0s\"\nresend_interval = \"1s\"\n{}{tables}",
            self.nodes
        );
        write(&config, &text);
        Monitor { config, port, client: self.client.clone() }
    }

    fn all_are_sick(&self, sick: bool) {
        for patient in &self.patients {
            patient.is_sick(sick);
        }
    }

    fn state_directory(&self) -> String {
        format!("state_directory = \"{}\"\n", self.directory.path().display())
    }
}

/// A health monitor with its configuration.
struct Monitor {
    config: PathBuf,
    port: u16,
    client: reqwest::Client,
}

impl Monitor {
    /// Starts it, and waits until it has asked everything.
    async fn run(&self) -> RunningAgent {
        let mut agent = Agent::health_monitor(&self.config).spawn(&["run"]);
        let url = format!("http://127.0.0.1:{}/readyz", self.port);
        eventually("the monitor is ready", LIMIT, async || {
            assert!(agent.is_running(), "the monitor ended: {}", agent.stdout());
            let answer = self.client.get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        agent
    }

    async fn get(&self, path: &str) -> String {
        let url = format!("http://127.0.0.1:{}/{path}", self.port);
        self.client.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// What `/status` says of telling people.
    async fn status(&self) -> Value {
        let status: Value = serde_json::from_str(&self.get("status").await).unwrap();
        status["notify"].clone()
    }

    async fn command(&self, arguments: &[&str]) -> Finished {
        let finished = Agent::health_monitor(&self.config).run(arguments).await;
        finished.assert_success();
        finished
    }
}

/// A webhook that refuses and hangs is told each thing once when it is well again, and a monitor that is
/// started anew repeats nothing.
#[tokio::test]
async fn each_notice_is_told_once_whatever_the_webhook_does() {
    if postgres_is_missing() {
        return;
    }
    let ward = Ward::new(2).await;
    let monitor = ward.monitor("one", &ward.state_directory(), &ward.webhook(ONE_BY_ONE));
    let agent = monitor.run().await;
    let receiver = &ward.receiver;
    ward.patients[0].is_sick(true);
    receiver.tells("patient-0", &["began warning"]).await;

    receiver.answers(Answer::Fail);
    ward.patients[0].is_sick(false);
    ward.patients[1].is_sick(true);
    let asked = receiver.asked();
    eventually("it is tried again", LIMIT, async || asked + 2 <= receiver.asked()).await;
    let status = monitor.status().await;
    let delivery = &status["deliveries"][0];
    assert_eq!(delivery["name"], "chat");
    assert_eq!(delivery["error"], "the answer is 500 Internal Server Error: ");
    assert!(delivery["failing_since"].is_string(), "{delivery}");
    receiver.answers(Answer::Hang);
    let asked = receiver.asked();
    eventually("it hangs", LIMIT, async || asked < receiver.asked()).await;
    receiver.answers(Answer::Take);
    receiver.tells("patient-1", &["began warning"]).await;
    receiver.tells("patient-0", &["began warning", "ended ok"]).await;
    let metrics = monitor.get("metrics").await;
    assert!(
        metrics.contains(
            "pgmesh_health_notices_sent_total{cluster=\"tests\",webhook=\"chat\",result=\"failed\"}"
        ),
        "{metrics}"
    );

    // Killed, it goes on where it was: what began before is not repeated, and what ended meanwhile told.
    sleep(WRITTEN).await;
    agent.kill9().await;
    ward.patients[0].is_sick(true);
    let agent = monitor.run().await;
    let again = ["began warning", "ended ok", "began warning"];
    receiver.tells("patient-0", &again).await;
    sleep(WRITTEN).await;
    agent.kill9().await;
    ward.patients[1].is_sick(false);
    let agent = monitor.run().await;
    receiver.tells("patient-1", &["began warning", "ended ok"]).await;
    sleep(QUIET).await;
    assert_eq!(receiver.told("patient-0"), again);
    assert_eq!(receiver.told("patient-1"), ["began warning", "ended ok"]);
    let finished = agent.terminate().await;
    finished.assert_success();
}

/// What begins together is one message, as chat tools take it.
#[tokio::test]
async fn many_at_once_are_one_message() {
    if postgres_is_missing() {
        return;
    }
    let ward = Ward::new(4).await;
    let monitor = ward.monitor("one", "", &ward.webhook(""));
    let _agent = monitor.run().await;
    sleep(QUIET).await;
    let before = ward.receiver.taken().len();
    ward.all_are_sick(true);
    eventually("it is told", LIMIT, async || before < ward.receiver.taken().len()).await;
    sleep(QUIET).await;
    let taken = ward.receiver.taken();
    assert_eq!(taken.len(), before + 1, "{taken:?}");
    let text = taken[before]["text"].as_str().unwrap();
    assert!(text.starts_with("[tests] 4 warning\n- WARNING: agent patient-"), "{text}");
    for number in 0..4 {
        let line = format!("agent patient-{number}: it cannot do its work: it has a cold (ready, ");
        assert!(text.contains(&line), "{text}");
    }
}

/// A rolling update changes one check many times: that is no reason to wake anybody when it is over.
#[tokio::test]
async fn what_changes_while_it_is_silenced_does_not_flap_afterwards() {
    if postgres_is_missing() {
        return;
    }
    let ward = Ward::new(2).await;
    let monitor = ward.monitor("one", &ward.state_directory(), &ward.webhook(ONE_BY_ONE));
    let silence = ["silence", "--for", "1h", "--component", "patient-0", "--comment", "x"];
    monitor.command(&silence).await;
    let _agent = monitor.run().await;
    for sick in [true, false].repeat(4) {
        ward.all_are_sick(sick);
        eventually("the change counts", LIMIT, async || {
            let status = serde_json::from_str(&monitor.get("status").await).unwrap();
            wrong(&status).contains("agent patient-0 ready warning") == sick
        })
        .await;
        // For the other one, too.
        sleep(Duration::from_millis(500)).await;
    }
    let listed = monitor.command(&["silences", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    monitor.command(&["unsilence", listed[0]["id"].as_str().unwrap()]).await;
    eventually("the other one flaps", LIMIT, async || {
        ward.receiver.told("patient-1").last().is_some_and(|it| it.starts_with("flapping"))
    })
    .await;
    sleep(QUIET).await;
    assert!(ward.receiver.told("patient-0").is_empty(), "{:?}", ward.receiver.taken());
}

/// A real Alertmanager takes, groups and resolves what it is sent, beside a peer that is dead; what is
/// silenced reaches neither it nor a webhook until the silence is over.
#[tokio::test]
async fn alertmanager_receives_groups_and_resolves() {
    if postgres_is_missing() || alertmanager_is_missing() {
        return;
    }
    let ward = Ward::new(3).await;
    let alertmanager = Alertmanager::start(&ward.receiver_url).await;
    let dead = server_port();
    let tables = format!(
        "[[alertmanager]]\nurl = \"http://127.0.0.1:{dead}\"\n[[alertmanager]]\nurl = \"{}\"\n",
        alertmanager.url()
    );
    let monitor = ward.monitor("one", &ward.state_directory(), &tables);
    let silence = ["silence", "--for", "1h", "--component", "patient-2", "--comment", "bed rest"];
    monitor.command(&silence).await;
    let _agent = monitor.run().await;
    let began_at = Instant::now();
    ward.all_are_sick(true);

    let sick = async || -> Vec<Value> {
        let all = alertmanager.alerts().await;
        all.into_iter().filter(|it| it["labels"]["component"] == "agent").collect()
    };
    eventually("two alerts fire", LIMIT, async || sick().await.len() == 2).await;
    assert!(began_at.elapsed() < Duration::from_secs(5), "the dead peer held it up");
    let alert = &sick().await[0];
    for (label, expected) in [
        ("alertname", "PgmeshReady"),
        ("cluster", "tests"),
        ("check", "ready"),
        ("severity", "warning"),
    ] {
        assert_eq!(alert["labels"][label], expected, "{alert}");
    }
    assert_eq!(alert["annotations"]["summary"], "it cannot do its work: it has a cold");
    let starts_at = alert["startsAt"].clone();

    // It groups them, and says so; the silenced one is in none.
    let groups = alertmanager.groups().await;
    let ours = groups.iter().find(|it| it["labels"]["alertname"] == "PgmeshReady").unwrap();
    assert_eq!(ours["alerts"].as_array().unwrap().len(), 2, "{ours}");
    let told = |status: &str| {
        let taken = ward.receiver.taken();
        let of_ours = taken.iter().filter(|it| it["groupLabels"]["alertname"] == "PgmeshReady");
        of_ours.filter(|it| it["status"] == status).count()
    };
    eventually("Alertmanager tells", LIMIT, async || told("firing") == 1).await;
    let status = monitor.status().await;
    assert_eq!(status["silenced"][0]["component"]["name"], "patient-2", "{status}");
    assert_eq!(status["silences"][0]["comment"], "bed rest", "{status}");
    assert!(status["deliveries"][0]["failing_since"].is_string(), "{status}");
    assert!(status["deliveries"][1]["failing_since"].is_null(), "{status}");

    // It is sent again, and is the same alert; after four intervals it would have ended otherwise.
    sleep(Duration::from_secs(6)).await;
    let all = sick().await;
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all.iter().any(|it| it["startsAt"] == starts_at), "{all:?}");
    assert_eq!(told("firing"), 1);

    // The end of the silence is the beginning of the alert.
    let listed = monitor.command(&["silences", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    monitor.command(&["unsilence", listed[0]["id"].as_str().unwrap()]).await;
    eventually("the third fires", LIMIT, async || sick().await.len() == 3).await;

    ward.all_are_sick(false);
    eventually("all are resolved", LIMIT, async || sick().await.is_empty()).await;
    eventually("Alertmanager tells", LIMIT, async || told("resolved") == 1).await;
}

/// An Alertmanager and a webhook behind TLS, one with a login and one with a header of its own: both are
/// told by who trusts them and knows that, and what is wrong otherwise is said.
#[tokio::test]
async fn those_who_want_tls_and_a_login_are_told() {
    if postgres_is_missing() {
        return;
    }
    let ward = Ward::new(1).await;
    let authority = Authority::new();
    let identity = authority.issue("receivers");
    let mut tasks = JoinSet::new();
    let mut serve = async |routes: Router| {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tasks.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        TlsFront::start(&identity, address).await
    };
    let told = Told::default();
    let alerts = Router::new().route("/api/v2/alerts", post(with_login)).with_state(told.clone());
    let (alertmanager, webhook) = (
        serve(alerts).await,
        serve(Router::new().route("/", post(with_token)).with_state(told.clone())).await,
    );
    let file = |name: &str, text: &str| {
        let path = ward.directory.path().join(name);
        write(&path, text);
        path.display().to_string()
    };
    let headers = format!("{}: {}\n", TOKEN.0, TOKEN.1);
    let tables = |password: &str, headers: &str, ca: &Path| {
        format!(
            "[[alertmanager]]\nurl = \"{}\"\nuser = \"{}\"\npassword_file = \"{}\"\nca_file = {ca:?}\n\
             [[webhook]]\nname = \"chat\"\nurl_file = \"{}\"\nheaders_file = \"{}\"\nca_file = {ca:?}\n",
            alertmanager.url(),
            LOGIN.0,
            file("password", password),
            file("url", &webhook.url()),
            file("headers", headers),
        )
    };
    ward.patients[0].is_sick(true);
    let deliveries = async |monitor: &Monitor| {
        let mut said = ["", ""].map(str::to_owned);
        eventually("both were tried", LIMIT, async || {
            let status = monitor.status().await;
            said = [0, 1].map(|it| status["deliveries"][it]["error"].to_string());
            let sent = [0, 1].map(|it| status["deliveries"][it]["sent"].as_u64() > Some(0));
            (0..2).all(|it| said[it] != "null" || sent[it])
        })
        .await;
        said
    };

    // Who is not trusted is told nothing.
    let stranger = Authority::new();
    let text = tables(LOGIN.1, &headers, &stranger.ca_file());
    let monitor = ward.monitor("stranger", "", &text);
    let agent = monitor.run().await;
    for said in deliveries(&monitor).await {
        assert!(said.contains("no TLS: "), "{said}");
    }
    agent.kill9().await;
    assert_eq!(told.count(), [0, 0]);

    let text = tables("wrong", "x-token: wrong\n", &authority.ca_file());
    let monitor = ward.monitor("unknown", "", &text);
    let agent = monitor.run().await;
    for said in deliveries(&monitor).await {
        assert!(said.contains("the answer is 401 Unauthorized"), "{said}");
    }
    agent.kill9().await;
    assert_eq!(told.count(), [0, 0]);

    let monitor = ward.monitor("known", "", &tables(LOGIN.1, &headers, &authority.ca_file()));
    let agent = monitor.run().await;
    eventually("both are told", LIMIT, async || told.count().iter().all(|it| 0 < *it)).await;
    assert_eq!(deliveries(&monitor).await, ["null", "null"]);
    let log = agent.terminate().await;
    for secret in [LOGIN.1, TOKEN.1, &webhook.url()] {
        assert!(!log.stdout.contains(secret), "{secret} is in the log");
    }
}

/// How often an Alertmanager and a webhook took something.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<[usize; 2]>>);

impl Told {
    fn count(&self) -> [usize; 2] {
        *self.0.lock().unwrap()
    }

    fn take(&self, which: usize, is_known: bool) -> StatusCode {
        if !is_known {
            return StatusCode::UNAUTHORIZED;
        }
        self.0.lock().unwrap()[which] += 1;
        StatusCode::OK
    }
}

async fn with_login(State(told): State<Told>, headers: HeaderMap) -> StatusCode {
    let expected = format!("Basic {}", STANDARD.encode(format!("{}:{}", LOGIN.0, LOGIN.1)));
    told.take(0, headers.get("authorization").is_some_and(|it| *it == *expected))
}

async fn with_token(State(told): State<Told>, headers: HeaderMap) -> StatusCode {
    told.take(1, headers.get(TOKEN.0).is_some_and(|it| *it == *TOKEN.1))
}

/// The successor of a leader that was killed repeats nothing and loses nothing; and when etcd is away, the
/// replica that led last says so.
#[tokio::test]
async fn a_successor_goes_on_where_the_leader_was() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let mut etcd = EtcdCluster::start(1).await;
    let ward = Ward::new(4).await;
    let tables = format!(
        "{}[etcd]\nendpoints = [\"{}\"]\n",
        ward.webhook(ONE_BY_ONE),
        etcd.endpoints().join("\", \"")
    );
    let (one, two) = (ward.monitor("one", "", &tables), ward.monitor("two", "", &tables));
    let receiver = &ward.receiver;
    let first = one.run().await;
    let leads = async |it: &Monitor| it.status().await["is_telling"] == true;
    eventually("the first leads", LIMIT, async || leads(&one).await).await;
    let mut second = two.run().await;
    ward.patients[0].is_sick(true);
    ward.patients[1].is_sick(true);
    receiver.tells("patient-0", &["began warning"]).await;
    receiver.tells("patient-1", &["began warning"]).await;
    assert!(!leads(&two).await);
    let silence =
        ["silence", "--for", "1h", "--component", "patient-3", "--comment", "x", "--by", "ada"];
    one.command(&silence).await;
    ward.patients[3].is_sick(true);

    // One problem goes on, one ends and one begins while nobody leads.
    first.kill9().await;
    ward.patients[1].is_sick(false);
    ward.patients[2].is_sick(true);
    let limit = TTL + LIMIT;
    eventually("the second leads", limit, async || leads(&two).await).await;
    receiver.tells("patient-1", &["began warning", "ended ok"]).await;
    receiver.tells("patient-2", &["began warning"]).await;
    sleep(QUIET).await;
    assert_eq!(receiver.told("patient-0"), ["began warning"]);
    assert_eq!(receiver.told("patient-3"), Vec::<String>::new());
    assert_eq!(two.status().await["silences"][0]["by"], "ada");

    // Without etcd nobody can hold the lease.
    etcd.kill9(0).await;
    let quorum_lost = || {
        let taken = receiver.taken();
        let of_cluster = taken.iter().filter(|it| it["kind"] == "cluster");
        of_cluster.filter(|it| it["event"] == "began" && it["status"] == "critical").count()
    };
    eventually("the loss of etcd is told", limit, async || quorum_lost() == 1).await;
    second.logged("etcd is away", limit).await;
    ward.patients[0].is_sick(false);
    receiver.tells("patient-0", &["began warning", "ended ok"]).await;
    etcd.start_member(0);
    etcd.serves().await;
    eventually("the second leads", limit, async || {
        second.stdout().matches("this replica tells").count() == 2
    })
    .await;
    sleep(QUIET).await;
    assert_eq!(receiver.told("patient-0"), ["began warning", "ended ok"]);
    assert_eq!(receiver.told("patient-2"), ["began warning"]);
    assert_eq!(quorum_lost(), 1);
}
