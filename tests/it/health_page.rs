//! The status page in a real Chromium, and the log file.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use harness::{Agent, RunningAgent, directory, eventually, server_port, skip};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::time::timeout;

use crate::exporter::node;
use crate::scene::write;

const LIMIT: Duration = Duration::from_secs(30);

/// A health monitor of a server and an agent that are not there.
struct Monitor {
    directory: TempDir,
    address: String,
    agent: RunningAgent,
    client: reqwest::Client,
}

impl Monitor {
    /// `extra` are keys outside of sections.
    async fn start(extra: &str) -> Self {
        let directory = directory();
        let (config, address) = (directory.path().join("it.toml"), own_address());
        let nowhere = node("<i>gone</i>", "127.0.0.1", 1);
        let text = format!(
            "cluster = \"demo\"\nadmin_address = \"{address}\"\n{extra}\
             [postgres]\nuser = \"postgres\"\ntls = \"disable\"\n{nowhere}\
             [[agents]]\nname = \"nobody\"\nurl = \"http://127.0.0.1:1\"\n"
        );
        write(&config, &text);
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let agent = Self::spawn(&config);
        let monitor = Self { directory, address, agent, client };
        monitor.ready().await;
        eventually("it is judged", LIMIT, async || monitor.page().await.0.contains("CRITICAL"))
            .await;
        monitor
    }

    /// Logs what it does, so that there is something to write.
    fn spawn(config: &Path) -> RunningAgent {
        Agent::health_monitor(config).env("RUST_LOG", "trace").spawn(&["run"])
    }

    async fn ready(&self) {
        eventually("the monitor is ready", LIMIT, async || {
            let answer = self.client.get(format!("http://{}/readyz", self.address)).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
    }

    async fn kill9_and_start(&mut self) {
        let config = self.directory.path().join("it.toml");
        std::mem::replace(&mut self.agent, Self::spawn(&config)).kill9().await;
        self.ready().await;
    }

    /// The page, and its policy.
    async fn page(&self) -> (String, String) {
        let answer = self.client.get(format!("http://{}/", self.address)).send().await.unwrap();
        let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
        (answer.text().await.unwrap(), policy)
    }
}

fn own_address() -> String {
    format!("127.0.0.1:{}", server_port())
}

/// Chromium, by its name or as `PGMESH_TEST_CHROMIUM` says.
fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PGMESH_TEST_CHROMIUM") {
        return Some(path.into());
    }
    let names = ["chromium-headless-shell", "chromium"];
    let found = names.map(|name| Path::new("/usr/bin").join(name)).into_iter();
    found.into_iter().find(|it| it.exists())
}

/// What a page is after its scripts ran for so long by a clock that skips waiting, and what Chromium has to
/// say of it.
async fn look(url: &str, wait: Duration) -> Option<(String, String)> {
    let Some(chromium) = chromium() else {
        skip("no Chromium (install chromium-headless-shell, or set PGMESH_TEST_CHROMIUM)");
        return None;
    };
    let profile = directory();
    let mut command = Command::new(chromium);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
    command.args(["--enable-logging=stderr", "--window-size=390,844", "--dump-dom"]);
    command.arg(format!("--virtual-time-budget={}", wait.as_millis()));
    command.arg(format!("--user-data-dir={}", profile.path().display())).arg(url);
    command.env("HOME", profile.path()).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(LIMIT, command.output()).await.unwrap().unwrap();
    let [dom, said] = [output.stdout, output.stderr];
    Some((String::from_utf8(dom).unwrap(), String::from_utf8_lossy(&said).into_owned()))
}

/// Serves a page, then another one so many times, and then nothing.
async fn serve(listener: TcpListener, policy: String, first: String, then: (String, usize)) {
    let (second, times) = then;
    let pages = std::iter::once(first).chain(std::iter::repeat_n(second, times));
    for page in pages {
        // A browser may connect without asking for anything.
        let mut stream = loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if stream.read(&mut [0; 8192]).await.unwrap_or(0) > 0 {
                break stream;
            }
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=utf-8\r\n\
             content-security-policy: {policy}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            page.len()
        );
        stream.write_all((head + &page).as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn a_browser_shows_the_state_and_its_policy_lets_the_page_work() {
    let monitor = Monitor::start("").await;
    let (page, _) = monitor.page().await;
    for text in ["<title>CRITICAL · demo</title>", "&#60;i&#62;gone&#60;/i&#62;", "Next step"] {
        assert!(page.contains(text), "no {text} in {page}");
    }
    let url = format!("http://{}/", monitor.address);
    let Some((dom, said)) = look(&url, Duration::from_secs(20)).await else { return };
    assert!(dom.contains("CRITICAL · demo"), "{dom}");
    assert!(dom.contains("&lt;i&gt;gone&lt;/i&gt;") && !dom.contains("<i>gone"), "{dom}");
    assert!(dom.contains("<p id=\"stale\" hidden"), "{dom}");
    for sign in ["Refused to", "Content Security Policy", "Uncaught", "CONSOLE"] {
        assert!(!said.contains(sign), "{said}");
    }
}

#[tokio::test]
async fn the_page_follows_the_state_and_says_when_it_is_old() {
    let monitor = Monitor::start("").await;
    let (page, policy) = monitor.page().await;
    let changed = page.replace("<p class=\"name\">demo</p>", "<p class=\"name\">changed</p>");
    assert_ne!(page, changed);
    for (case, times, is_old) in [("it answers", 9, false), ("it answers no more", 1, true)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let served = serve(listener, policy.clone(), page.clone(), (changed.clone(), times));
        // Three seconds are between two looks, and twelve without an answer are too many.
        let looked = look(&url, Duration::from_secs(25));
        let looked = tokio::select! {
            looked = looked => looked,
            () = async { served.await; std::future::pending().await } => unreachable!(),
        };
        let Some((dom, said)) = looked else { return };
        assert!(dom.contains("<p class=\"name\">changed</p>"), "{case}: {dom}\n{said}");
        assert_eq!(dom.contains("<body class=\"is-stale\">"), is_old, "{case}: {dom}\n{said}");
        assert_eq!(!dom.contains("<p id=\"stale\" hidden"), is_old, "{case}: {dom}");
        assert_eq!(dom.contains("<title>? CRITICAL"), is_old, "{case}: {dom}");
    }
}

/// Whole lines, each an object.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(
        text.is_empty() || text.ends_with('\n'),
        "{} ends with {:?}",
        path.display(),
        text.lines().last()
    );
    let read =
        |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
    text.lines().map(read).collect()
}

fn messages(path: &Path, message: &str) -> usize {
    lines(path).iter().filter(|it| it["message"] == message).count()
}

#[tokio::test]
async fn the_log_file_goes_on_after_kill_9_and_moves_on_when_it_is_full() {
    let logs = directory();
    let path = logs.path().join("health-monitor.log");
    let extra = format!(
        "log_file = \"{}\"\nlog_file_bytes_max = 65536\nlog_files_max = 3\ninterval = \"200ms\"\n",
        path.display()
    );
    let mut monitor = Monitor::start(&extra).await;
    eventually("it is logged", LIMIT, async || messages(&path, "agent started") == 1).await;
    monitor.kill9_and_start().await;
    eventually("it goes on", LIMIT, async || messages(&path, "agent started") == 2).await;
    fs::remove_file(&path).unwrap();
    eventually("it is there again", LIMIT, async || path.exists()).await;
    // Each question over HTTP is some lines at this level.
    let third = logs.path().join("health-monitor.log.2");
    eventually("there are three files", LIMIT, async || third.exists()).await;
    let finished = monitor.agent.terminate().await;
    finished.assert_success();
    let names = ["health-monitor.log", "health-monitor.log.1", "health-monitor.log.2"];
    assert_eq!(fs::read_dir(logs.path()).unwrap().count(), names.len());
    for name in names {
        let path = logs.path().join(name);
        assert!(fs::metadata(&path).unwrap().len() <= 65536 && !lines(&path).is_empty());
    }
    assert_eq!(messages(&path, "agent stopped"), 1, "the last line is written too");
}

#[tokio::test]
async fn a_disk_that_fills_up_costs_log_lines_and_nothing_else() {
    let Some(small) = std::env::var_os("PGMESH_TEST_SMALL_DISK").map(PathBuf::from) else {
        return skip("no small file system (PGMESH_TEST_SMALL_DISK is not set)");
    };
    let path = small.join("health-monitor.log");
    let extra = format!("log_file = \"{}\"\ninterval = \"200ms\"\n", path.display());
    let monitor = Monitor::start(&extra).await;
    eventually("it is logged", LIMIT, async || messages(&path, "agent started") == 1).await;
    let filler = small.join("log-filler");
    let mut file = File::create(&filler).unwrap();
    let said = |text: &str| monitor.agent.stdout().contains(text);
    eventually("it cannot be written", LIMIT, async || {
        while file.write_all(&[1; 512]).is_ok() {}
        said("log file cannot be written")
    })
    .await;
    assert!(!lines(&path).is_empty());
    fs::remove_file(&filler).unwrap();
    drop(file);
    let lost = "log file lost lines and is written again";
    eventually("it is written again", LIMIT, async || messages(&path, lost) == 1).await;
    let told = lines(&path).into_iter().find(|it| it["message"] == lost).unwrap();
    assert!(told["lost"].as_u64().unwrap() > 0, "{told}");
    assert!(said(lost));
    monitor.agent.terminate().await.assert_success();
    fs::remove_file(&path).unwrap();
}
