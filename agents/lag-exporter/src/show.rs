//! `show`: every node in one table, for a person who was just woken up.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use chrono::SecondsFormat;
use shared::cli::print;
use shared::shutdown;
use shared::table::Table;
use shared::tasks::Tasks;
use tokio::time::{Instant, sleep};

use crate::cli::ShowArgs;
use crate::config::Config;
use crate::fleet::{Fleet, Snapshot, Target};
use crate::observation::{ReplayPause, WalStatus};
use crate::service::Watcher;
use crate::session::{ANSWER_TIMEOUT, CONNECT_TIMEOUT};
use crate::view::{
    GroupView, Lag, LagState, MostWal, NodeView, Quorum, Role, Rpo, Runway, SlotView, SplitBrain,
    SyncCount, can_rewind,
};

/// How long a running agent may take to answer; it answers from memory.
const AGENT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the servers are asked at least, so that there is something to compare.
const ASK_FOR: Duration = Duration::from_secs(3);
/// What clears a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// A slot that lasts less than this is worth a word.
const RUNWAY_LOW: Duration = Duration::from_hours(24);
/// So is one that nobody has used for this long …
const INACTIVE_LONG: Duration = Duration::from_mins(5);

/// Where the numbers come from.
#[derive(Debug)]
enum Source {
    /// A running agent, by the URL of its `/status`.
    Agent(reqwest::Client, String),
    /// The servers; they are asked as long as the tasks are there.
    Servers { fleet: Fleet, _tasks: Tasks },
}

/// Shows what there is, once or again and again.
///
/// # Errors
///
/// Nothing can be shown; or, shown once, a lag or a primary is unknown.
pub async fn run(config: Config, args: &ShowArgs) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    tokio::select! {
        _ = stop => Ok(()),
        shown = show(&config, args) => shown,
    }
}

async fn show(config: &Config, args: &ShowArgs) -> anyhow::Result<()> {
    let source = source(config, args.direct).await?;
    loop {
        let mut snapshot = source.snapshot().await?;
        if let Some(number) = args.group {
            snapshot.groups.retain(|group| group.group == number);
            snapshot.targets.retain(|target| target.group == number);
        }
        let text = match (args.json, args.watch) {
            (true, None) => format!("{:#}\n", serde_json::to_value(&snapshot)?),
            // One line each, for a program that reads on.
            (true, Some(_)) => format!("{}\n", serde_json::to_value(&snapshot)?),
            (false, _) => render(&snapshot, &source.name()),
        };
        let Some(interval) = args.watch else {
            print(&text)?;
            let unknown = unknown(&snapshot);
            if !unknown.is_empty() {
                bail!("not known: {}", unknown.join(", "));
            }
            return Ok(());
        };
        let clears = !args.json && io::stdout().is_terminal();
        print(format!("{}{text}", if clears { CLEAR } else { "" }))?;
        sleep(interval).await;
    }
}

/// The agent that runs, or else the servers.
async fn source(config: &Config, direct: bool) -> anyhow::Result<Source> {
    if !direct {
        let client = reqwest::Client::builder().no_proxy().timeout(AGENT_TIMEOUT).build()?;
        let url = format!("http://{}/status", reachable(config.admin_address));
        let answer = ask_agent(&client, &url).await;
        if answer.is_ok_and(|snapshot| snapshot.cluster == config.cluster) {
            return Ok(Source::Agent(client, url));
        }
    }
    let watcher = Watcher::new(config)?;
    // Says why, if nobody knows which nodes there are.
    watcher.topology.members().await?;
    let (fleet, topology) = (watcher.fleet.clone(), watcher.topology.clone());
    let mut tasks = Tasks::default();
    tasks.spawn("topology", |shutdown| topology.follow(shutdown));
    tasks.spawn("watch", |shutdown| watcher.run(shutdown));
    let began_at = Instant::now();
    let at_most = ASK_FOR + CONNECT_TIMEOUT + ANSWER_TIMEOUT;
    while began_at.elapsed() < ASK_FOR
        || (fleet.not_ready().is_some() && began_at.elapsed() < at_most)
    {
        sleep(Duration::from_millis(100)).await;
    }
    Ok(Source::Servers { fleet, _tasks: tasks })
}

async fn ask_agent(client: &reqwest::Client, url: &str) -> reqwest::Result<Snapshot> {
    client.get(url).send().await?.error_for_status()?.json().await
}

/// Where one connects to what listens on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

impl Source {
    async fn snapshot(&self) -> anyhow::Result<Snapshot> {
        match self {
            Self::Agent(client, url) => {
                ask_agent(client, url).await.context("ask the agent that runs")
            }
            Self::Servers { fleet, .. } => Ok(fleet.snapshot()),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Agent(_, url) => format!("as the agent at {url} knows it"),
            Self::Servers { .. } => {
                "asked just now: without an agent, older lag has a lower bound only".to_owned()
            }
        }
    }
}

/// The nodes and groups of which what matters is not known.
fn unknown(snapshot: &Snapshot) -> Vec<String> {
    let mut unknown = Vec::new();
    for group in &snapshot.groups {
        if group.split_brain != SplitBrain::No {
            unknown.push(format!("which primary of group {} is the right one", group.group));
        }
        // Then no lag is known either.
        if group.primary.is_none() && group.standby_leader.is_none() {
            unknown.push(format!("the primary of group {}", group.group));
            continue;
        }
        for node in group.nodes.iter().filter(|it| it.is_member) {
            let is_known = match &node.lag {
                Some(lag) => lag.replay != Lag::default(),
                None => node.state.is_some(),
            };
            if !is_known {
                unknown.push(format!("the lag of {}", node.name));
            }
        }
    }
    unknown
}

const HEADER: [&str; 9] =
    ["GROUP", "NODE", "ROLE", "TL", "STATE", "LAG (FROM-TO)", "BYTES", "RECEIVER", "SYNC"];
/// Its columns `GROUP`, `TL` and `BYTES`.
const NUMBERS: [usize; 3] = [0, 3, 6];

/// The table, and below it a line for each thing that somebody should know.
fn render(snapshot: &Snapshot, source: &str) -> String {
    let mut table = Table::new(&HEADER).numbers(&NUMBERS);
    let mut notes = Vec::new();
    for group in &snapshot.groups {
        group_notes(group, &mut notes);
        for node in &group.nodes {
            table.row(row(group, node));
            node_notes(group, node, snapshot.target(group.group, &node.name), &mut notes);
        }
    }
    let at = snapshot.made_at.to_rfc3339_opts(SecondsFormat::Secs, true);
    let mut text = format!("{} at {at}, {source}\n\n{}", snapshot.cluster, table);
    if !notes.is_empty() {
        text.push('\n');
        for note in notes {
            text.push_str(&note);
            text.push('\n');
        }
    }
    text
}

fn row(group: &GroupView, node: &NodeView) -> [String; HEADER.len()] {
    let state = node.state.as_ref();
    let role = match state.map(|state| state.role) {
        Some(Role::Primary) => "primary",
        Some(Role::Standby) => "standby",
        None => "?",
    };
    let lag = node.lag.as_ref();
    let word = match lag.map(|lag| lag.state) {
        Some(LagState::Ok) => "behind",
        Some(LagState::CaughtUp) => "caught up",
        Some(LagState::BeyondHistory) => "far behind",
        Some(LagState::PrimaryUnknown) => "no primary",
        Some(LagState::Diverged) => "DIVERGED",
        Some(LagState::OtherCluster) => "OTHER CLUSTER",
        Some(LagState::Unreachable) => "NO ANSWER",
        Some(LagState::Unknown) => "unknown",
        None if state.is_none() => "NO ANSWER",
        None if group.primary.as_deref() == Some(&node.name) => "writes",
        None => "ANOTHER PRIMARY",
    };
    let is_standby = state.is_some_and(|state| state.role == Role::Standby);
    let receiver = state.and_then(|it| it.receiver).map_or("none", |it| it.status.name());
    let timeline = state.and_then(|state| state.timeline);
    [
        group.group.to_string(),
        node.name.clone(),
        role.to_owned(),
        timeline.map_or("?".to_owned(), |it| it.to_string()),
        word.to_owned(),
        lag.map(|lag| lag_text(&lag.replay)).unwrap_or_default(),
        lag.and_then(|lag| lag.replay_bytes).map(bytes_text).unwrap_or_default(),
        if is_standby { receiver.to_owned() } else { String::new() },
        sync_state(group, node).unwrap_or_default().to_owned(),
    ]
}

/// What the primary says about a standby.
fn sync_state<'a>(group: &'a GroupView, node: &NodeView) -> Option<&'a str> {
    let primary = group.nodes.iter().find(|it| Some(&it.name) == group.primary.as_ref())?;
    let senders = primary.details.as_ref()?.senders.as_ref()?;
    let name = node.details.as_ref().and_then(|it| it.application_name.as_ref());
    let name = name.unwrap_or(&node.name);
    senders.iter().find(|it| it.name == *name).map(|it| it.sync_state.as_str())
}

fn group_notes(group: &GroupView, notes: &mut Vec<String>) {
    let mut add = |text: String| notes.push(format!("group {}: {text}", group.group));
    match &group.split_brain {
        SplitBrain::No => {}
        SplitBrain::Candidate(names) => {
            add(format!("TWO PRIMARIES: {}", names.join(" and ")));
        }
        SplitBrain::Confirmed(names) => {
            add(format!("SPLIT BRAIN: {} both write", names.join(" and ")));
        }
    }
    if let (None, Some(leader)) = (&group.primary, &group.standby_leader) {
        add(format!("no primary here: lag is behind {leader}, which follows one elsewhere"));
    } else if group.primary.is_none() && group.primaries > 1 {
        add("several primaries write one timeline, so no lag can be told".to_owned());
    } else if group.primary.is_none() {
        let mut note = "NO PRIMARY answers: lag is behind what was last seen of it".to_owned();
        if let Some(MostWal { standby, lacks_bytes }) = &group.most_wal {
            let lacks = bytes_text(*lacks_bytes);
            write!(note, "; {standby} has most, it lacks at least {lacks}").ok();
        }
        add(note);
    } else if let Some(age) = group.primary_sample_age.filter(|age| *age > ANSWER_TIMEOUT) {
        add(format!("the primary has not answered for {}", span_text(age)));
    }
    match group.quorum {
        Quorum::Missed(SyncCount { wanted, present }) => {
            let waiting = group.sync_waiting.filter(|sessions| *sessions > 0);
            let waiting = waiting.map(|it| format!("; sessions that wait: {it}"));
            let waiting = waiting.unwrap_or_default();
            add(format!("COMMITS HANG: standbys wanted: {wanted}, connected: {present}{waiting}"));
        }
        Quorum::Met(_) | Quorum::NotWanted | Quorum::Unknown => {}
    }
    match &group.rpo {
        Rpo::Unknown => {}
        Rpo::NoStandby => {
            add("if the primary is lost now, so is all of it: no standby of it answers".to_owned());
        }
        Rpo::Loss { standby, lag, bytes } => {
            let parts = [lag_text(lag), bytes.map(bytes_text).unwrap_or_default()];
            let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
            let lost = if parts.is_empty() { "unknown".to_owned() } else { parts.join(", ") };
            let is_silent = |it: &NodeView| {
                it.lag.as_ref().is_some_and(|lag| lag.state == LagState::Unreachable)
            };
            let is_silent = group.nodes.iter().any(is_silent);
            let or_less = if is_silent { "; a node that is silent may have more" } else { "" };
            add(format!(
                "lost if the primary is lost now: {lost}; {standby} has most of it{or_less}"
            ));
        }
    }
}

fn node_notes(
    group: &GroupView,
    node: &NodeView,
    target: Option<&Target>,
    notes: &mut Vec<String>,
) {
    let mut add = |text: String| notes.push(format!("{}: {text}", node.name));
    if !node.is_member {
        add("left the topology".to_owned());
    }
    if let Some(target) = target {
        if let Some(error) = &target.error {
            let ago = node.last_success_age;
            let ago = ago.map(|ago| format!(", last answer {} ago", span_text(ago)));
            add(format!("{error}{}", ago.unwrap_or_default()));
        } else if let Some(error) = &target.fresh_connect_error {
            add(format!("takes no new connection: {error}"));
        }
    }
    if node.lag.as_ref().is_some_and(|lag| lag.state == LagState::Diverged) {
        let timeline = node.state.as_ref().and_then(|state| state.timeline);
        let can_rewind = can_rewind(timeline, group.timeline);
        let next = if can_rewind { "pg_rewind or rebuild it" } else { "rebuild it" };
        add(format!("has WAL that the primary never had: {next}"));
    }
    let Some(state) = &node.state else { return };
    if state.replay_pause.is_some_and(|it| it != ReplayPause::NotPaused) {
        add("replay is paused: pg_wal_replay_resume()".to_owned());
    }
    if state.role == Role::Primary && group.primary.as_deref() != Some(&node.name) {
        add("is another primary".to_owned());
    }
    if state.role == Role::Standby && state.receiver.is_none() {
        add("receives nothing: no WAL receiver runs".to_owned());
    }
    let Some(details) = &node.details else { return };
    if let Some(delay) = details.apply_delay.filter(|delay| !delay.is_zero()) {
        add(format!("is meant to be behind: recovery_min_apply_delay {}", span_text(delay)));
    }
    for slot in details.slots.iter().flatten() {
        if let Some(trouble) = slot_trouble(slot) {
            add(trouble);
        }
    }
}

/// What is wrong with a slot, if anything.
fn slot_trouble(slot: &SlotView) -> Option<String> {
    let name = &slot.name;
    match slot.wal_status {
        Some(WalStatus::Lost) => return Some(format!("slot {name} is LOST")),
        Some(WalStatus::Unreserved) => {
            return Some(format!("slot {name} is lost at the next checkpoint"));
        }
        Some(WalStatus::Reserved | WalStatus::Extended) | None => {}
    }
    let retained = slot.retained_bytes.map_or("WAL".to_owned(), bytes_text);
    if let Runway::Lasts(span) = slot.runway
        && span < RUNWAY_LOW
    {
        let span = span_text(span);
        return Some(format!("slot {name} holds back {retained} and is lost in {span}"));
    }
    let inactive = slot.inactive_for.filter(|span| *span > INACTIVE_LONG && !slot.active)?;
    Some(format!("slot {name} is unused for {}, holds back {retained}", span_text(inactive)))
}

/// `12 s (11-13)`, `> 3.0 s`, `< 8.0 s`; nothing if nothing is known.
fn lag_text(lag: &Lag) -> String {
    match (lag.lower, lag.estimate, lag.upper) {
        (lower, Some(estimate), upper) => {
            let (unit, name) = unit_of(upper.unwrap_or(estimate));
            let bound = |it: Option<Duration>| it.map_or("?".to_owned(), |it| number(it, unit));
            format!("{} {name} ({}-{})", number(estimate, unit), bound(lower), bound(upper))
        }
        (Some(lower), None, None) => format!("> {}", span_text(lower)),
        (None, None, Some(upper)) => format!("< {}", span_text(upper)),
        (Some(lower), None, Some(upper)) => {
            format!("{} to {}", span_text(lower), span_text(upper))
        }
        (None, None, None) => String::new(),
    }
}

/// `12 s`, `3.5 h`.
fn span_text(span: Duration) -> String {
    let (unit, name) = unit_of(span);
    format!("{} {name}", number(span, unit))
}

/// The unit in which a span has a number that can be read, in seconds, and its name.
fn unit_of(span: Duration) -> (f64, &'static str) {
    match span.as_secs() {
        0..600 => (1.0, "s"),
        600..7_200 => (60.0, "min"),
        7_200..172_800 => (3_600.0, "h"),
        _ => (86_400.0, "d"),
    }
}

fn number(span: Duration, unit: f64) -> String {
    let number = span.as_secs_f64() / unit;
    if number < 9.95 { format!("{number:.1}") } else { format!("{number:.0}") }
}

/// `512 B`, `1.5 MiB`.
fn bytes_text(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(index) = bytes.checked_ilog(1024).and_then(|it| it.checked_sub(1)) else {
        return format!("{bytes} B");
    };
    #[expect(clippy::cast_precision_loss, reason = "for the eye")]
    let number = bytes as f64 / 1024_f64.powi(index.cast_signed() + 1);
    let unit = units.get(index as usize).copied().unwrap_or_default();
    if number < 9.95 { format!("{number:.1} {unit}") } else { format!("{number:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::example;

    #[test]
    fn the_table_says_what_is_the_matter() {
        let expected = "\
demo at 2026-03-01T12:00:00Z, here

GROUP  NODE        ROLE     TL  STATE      LAG (FROM-TO)  BYTES  RECEIVER   SYNC
    0  postgres-1  primary   3  writes
    0  postgres-2  standby   3  behind     12 s (12-13)   256 B  streaming  sync
    0  postgres-3  ?         ?  NO ANSWER

group 0: lost if the primary is lost now: 0.0 s (0.0-0.9), 0 B; postgres-2 has most of it; a node that is silent may have more
postgres-1: slot old \"slot\" is LOST
postgres-2: replay is paused: pg_wal_replay_resume()
postgres-3: connect to postgres-3 (10.0.0.3:5432): Connection refused (os error 111), last answer 90 s ago
";
        assert_eq!(render(&example(), "here"), expected);
        assert_eq!(unknown(&example()), ["the lag of postgres-3"]);
        let mut left = example();
        left.groups[0].nodes[2].is_member = false;
        assert_eq!(unknown(&left), Vec::<String>::new());
        left.groups[0].primary = None;
        assert_eq!(unknown(&left), ["the primary of group 0"]);
        left.groups[0].standby_leader = Some("postgres-1".to_owned());
        assert_eq!(unknown(&left), Vec::<String>::new());
        let mut split = example();
        split.groups[0].split_brain = SplitBrain::Confirmed(Vec::new());
        let expected = ["which primary of group 0 is the right one", "the lag of postgres-3"];
        assert_eq!(unknown(&split), expected);
    }

    #[test]
    fn a_group_says_what_its_lag_and_its_loss_hang_on() {
        let notes = |change: &dyn Fn(&mut GroupView)| {
            let mut group = example().groups.remove(0);
            group.rpo = Rpo::Unknown;
            change(&mut group);
            let mut notes = Vec::new();
            group_notes(&group, &mut notes);
            notes.join("\n")
        };
        let loss = |lag, bytes| Rpo::Loss { standby: "b".to_owned(), lag, bytes };
        let second = Some(Duration::from_secs(1));
        let silent = Lag { lower: None, estimate: second, upper: second };
        for (expected, change) in [
            ("", &(|_: &mut GroupView| ()) as &dyn Fn(&mut GroupView)),
            ("group 0: no primary here: lag is behind b, which follows one elsewhere", &|group| {
                (group.primary, group.standby_leader) = (None, Some("b".to_owned()));
            }),
            (
                "group 0: NO PRIMARY answers: lag is behind what was last seen of it; postgres-2 has \
                 most, it lacks at least 0 B",
                &|group| group.primary = None,
            ),
            ("group 0: NO PRIMARY answers: lag is behind what was last seen of it", &|group| {
                (group.primary, group.most_wal) = (None, None);
            }),
            ("group 0: several primaries write one timeline, so no lag can be told", &|group| {
                (group.primary, group.primaries) = (None, 2);
            }),
            (
                "group 0: if the primary is lost now, so is all of it: no standby of it answers",
                &|group| group.rpo = Rpo::NoStandby,
            ),
            (
                "group 0: lost if the primary is lost now: 1.0 s (?-1.0), 7 B; b has most of it; \
                 a node that is silent may have more",
                &|group| group.rpo = loss(silent, Some(7)),
            ),
            (
                "group 0: lost if the primary is lost now: unknown; b has most of it; \
                 a node that is silent may have more",
                &|group| group.rpo = loss(Lag::default(), None),
            ),
        ] {
            assert_eq!(notes(change), expected);
        }
    }

    #[test]
    fn what_status_says_can_be_read_again() {
        let text = serde_json::to_string(&example()).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), example());
    }

    #[test]
    fn a_lag_shows_what_is_known_of_it() {
        let seconds = |it: f64| (it >= 0.0).then(|| Duration::from_secs_f64(it));
        for (lower, estimate, upper, expected) in [
            (0.0, 0.0, 0.42, "0.0 s (0.0-0.4)"),
            (11.6, 12.0, 12.6, "12 s (12-13)"),
            (3_500.0, 3_600.0, 3_700.0, "60 min (58-62)"),
            (3.0, -1.0, -1.0, "> 3.0 s"),
            (-1.0, -1.0, 8.0, "< 8.0 s"),
            (3.0, -1.0, 7_300.0, "3.0 s to 2.0 h"),
            (-1.0, -1.0, -1.0, ""),
        ] {
            let lag =
                Lag { lower: seconds(lower), estimate: seconds(estimate), upper: seconds(upper) };
            assert_eq!(lag_text(&lag), expected);
        }
    }

    #[test]
    fn a_slot_is_worth_a_word_if_it_may_be_lost() {
        let slot = SlotView {
            name: "s".to_owned(),
            logical: false,
            active: true,
            retained_bytes: Some(1 << 20),
            safe_wal_bytes: Some(1 << 30),
            wal_status: Some(WalStatus::Reserved),
            inactive_for: None,
            runway: Runway::Lasts(Duration::from_mins(11)),
            xmin_age: None,
        };
        let soon = "slot s holds back 1.0 MiB and is lost in 11 min";
        let stopped = SlotView { active: false, ..slot.clone() };
        let late = SlotView { runway: Runway::Endless, ..stopped.clone() };
        let moves_on = SlotView { runway: Runway::Endless, ..slot.clone() };
        let idle = SlotView { inactive_for: Some(Duration::from_hours(1)), ..late.clone() };
        for (name, slot, expected) in [
            ("it moves on", moves_on, None),
            ("it is used, but slow", slot, Some(soon)),
            ("nobody moves it", stopped, Some(soon)),
            ("nothing is written", late, None),
            ("unused for long", idle, Some("slot s is unused for 60 min, holds back 1.0 MiB")),
        ] {
            assert_eq!(slot_trouble(&slot).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn quantities_are_short() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (34 << 20, "34 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes_text(bytes), expected);
        }
        for (secs, expected) in
            [(59, "59 s"), (3_600, "60 min"), (7_200, "2.0 h"), (864_000, "10 d")]
        {
            assert_eq!(span_text(Duration::from_secs(secs)), expected);
        }
    }
}
