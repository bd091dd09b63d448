//! The members of the cluster: listed, or as Patroni knows them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::config::{PatroniConfig, TopologyConfig};
use super::dcs::read_keys;
use super::rest::Rest;
use crate::etcd::{Change, Etcd, EtcdError, Watch};
use crate::pg::Node;
use crate::telemetry::chain;
use crate::tls::TlsError;

/// Between two questions to Patroni's REST API.
const REST_PAUSE: Duration = Duration::from_secs(3);

/// What is said where etcd answers, and Patroni's keys are not there.
const NO_MEMBER: &str = "etcd holds no member there: see that Patroni runs and uses this etcd, and that \
    patroni.namespace and patroni.scope are its own";

/// One node, and what Patroni says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The node.
    pub node: Node,
    /// Its Patroni's REST API, such as `http://postgres-1:8008/patroni`.
    pub api_url: Option<String>,
    /// What Patroni says about it. `None` for a listed node, and while its Patroni is silent.
    pub opinion: Option<Opinion>,
}

/// What Patroni says about a member: a hint, some seconds old. Role and timeline that count are
/// those that the server itself tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opinion {
    /// Its role.
    pub role: PatroniRole,
    /// In Patroni's words: `running`, `streaming`, `creating replica`, `stopped` …
    pub state: String,
    /// The timeline it is on, if Patroni says so.
    pub timeline: Option<u32>,
    /// How far it is behind the leader, in bytes of WAL, where Patroni says so.
    pub lag_bytes: Option<u64>,
}

/// A role as Patroni gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatroniRole {
    /// Holds the leader lock.
    Leader,
    /// Holds the leader lock of a standby cluster: in recovery itself.
    StandbyLeader,
    /// A standby that commits may wait for.
    SyncStandby,
    /// Any other standby.
    Replica,
}

/// Where a list of members comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The configuration.
    Static,
    /// Patroni's keys in etcd.
    Etcd,
    /// Patroni's REST API.
    Rest,
}

/// The members as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// The members, by group and name. Of a listed topology: in the order of the list.
    pub list: Vec<Member>,
    /// Groups that Patroni knows, and of which no member was ever there.
    pub empty_groups: BTreeSet<u32>,
    /// Who said so.
    pub source: Source,
    /// Since when nobody can be asked, so that this may be out of date. `None`: it is up to date.
    pub stale_since: Option<Instant>,
}

impl Members {
    /// The nodes.
    pub fn nodes(&self) -> Vec<Node> {
        self.list.iter().map(|member| member.node.clone()).collect()
    }

    /// How old this is: zero as long as its source answers.
    pub fn age(&self) -> Duration {
        self.stale_since.map(|since| since.elapsed()).unwrap_or_default()
    }
}

/// Why the members are unknown.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// The certificates for the REST API could not be read.
    #[error("patroni.ca_file")]
    Certificates(#[source] TlsError),
    /// There is no HTTP client.
    #[error("set up the client of Patroni's REST API")]
    Client(#[source] reqwest::Error),
    /// Nobody that was asked ever said who the members are.
    #[error("the members of Patroni's cluster below {root} are unknown: {}", failures.join("; "))]
    Unknown {
        /// Where Patroni's keys begin in etcd.
        root: String,
        /// What went wrong, with each source.
        failures: Vec<String>,
    },
}

impl TopologyError {
    /// Tells whether the members may be known if asked again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unknown { .. } => true,
            Self::Certificates(_) | Self::Client(_) => false,
        }
    }
}

/// Which nodes there are. Clones share what is known.
#[derive(Clone, Debug)]
pub struct Topology(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Listed(Members, Arc<watch::Sender<Option<Members>>>),
    Patroni(Arc<Patroni>),
}

impl Topology {
    /// The topology that a checked configuration describes. Nobody is asked yet; `etcd` is the
    /// client for its table `[etcd]`.
    ///
    /// # Errors
    ///
    /// Fails when certificates cannot be read.
    pub fn new(config: TopologyConfig<'_>, etcd: Option<Etcd>) -> Result<Self, TopologyError> {
        if let Some(patroni) = config.patroni {
            return Ok(Self(Kind::Patroni(Arc::new(Patroni::new(patroni, etcd)?))));
        }
        let listed = |node: &Node| Member { node: node.clone(), api_url: None, opinion: None };
        let list = config.nodes.iter().map(listed).collect();
        let (source, empty_groups) = (Source::Static, BTreeSet::new());
        let members = Members { list, empty_groups, source, stale_since: None };
        let (latest, _) = watch::channel(Some(members.clone()));
        Ok(Self(Kind::Listed(members, Arc::new(latest))))
    }

    /// The nodes; see [`members`](Self::members).
    ///
    /// # Errors
    ///
    /// As [`members`](Self::members).
    pub async fn nodes(&self) -> Result<Vec<Node>, TopologyError> {
        Ok(self.members().await?.nodes())
    }

    /// The members as they are known; asks for them if they are not, for at most about 12 s.
    ///
    /// Once known they stay known while nobody can be asked, see [`Members::age`]. A group
    /// whose members have all vanished from etcd keeps them, since their servers may still run.
    /// They are only kept up to date while [`follow`](Self::follow) runs.
    ///
    /// # Errors
    ///
    /// Fails when nobody ever said who they are: unknown is not the same as none.
    pub async fn members(&self) -> Result<Members, TopologyError> {
        match &self.0 {
            Kind::Listed(members, _) => Ok(members.clone()),
            Kind::Patroni(patroni) => {
                let known = patroni.latest.borrow().clone();
                match known {
                    Some(members) => Ok(members),
                    None => patroni.ask().await,
                }
            }
        }
    }

    /// The members as [`follow`](Self::follow) keeps them; `None` while they are unknown.
    pub fn subscribe(&self) -> watch::Receiver<Option<Members>> {
        match &self.0 {
            Kind::Listed(_, latest) => latest.subscribe(),
            Kind::Patroni(patroni) => patroni.latest.subscribe(),
        }
    }

    /// Why nobody knows the members, and what to do about it; `None` if they are known.
    pub fn why_unknown(&self) -> Option<String> {
        match &self.0 {
            Kind::Listed(..) => None,
            Kind::Patroni(patroni) if patroni.latest.borrow().is_some() => None,
            Kind::Patroni(patroni) => {
                let why = patroni.why.borrow().clone();
                let why = why.unwrap_or_else(|| "nobody has answered yet".to_owned());
                Some(patroni.unknown(vec![why]).to_string())
            }
        }
    }

    /// Keeps the members up to date until `shutdown`.
    ///
    /// # Errors
    ///
    /// None: what goes wrong is logged and tried again.
    pub async fn follow(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let follow = async {
            match &self.0 {
                Kind::Listed(..) => std::future::pending().await,
                Kind::Patroni(patroni) => patroni.follow().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = follow => {}
        }
        Ok(())
    }
}

/// The members as Patroni knows them.
#[derive(Debug)]
struct Patroni {
    /// Where its keys begin.
    root: String,
    etcd: Option<Etcd>,
    rest: Rest,
    latest: watch::Sender<Option<Members>>,
    /// What went wrong the last time that somebody was asked.
    why: watch::Sender<Option<String>>,
}

type Groups = BTreeMap<u32, Vec<Member>>;

/// What the watch has told, and what was said about it.
#[derive(Debug, Default)]
struct Followed {
    /// `None` before the list was read.
    entries: Option<BTreeMap<String, Vec<u8>>>,
    problems: BTreeSet<String>,
    is_lost: bool,
    is_silent: bool,
    is_empty: bool,
}

impl Patroni {
    fn new(config: &PatroniConfig, etcd: Option<Etcd>) -> Result<Self, TopologyError> {
        let (latest, why) = (watch::Sender::new(None), watch::Sender::new(None));
        Ok(Self { root: config.root(), etcd, rest: Rest::new(config)?, latest, why })
    }

    /// Asks once: etcd, and if it does not tell, the REST API.
    async fn ask(&self) -> Result<Members, TopologyError> {
        let mut failures = Vec::new();
        if let Some(etcd) = &self.etcd {
            match etcd.list(&self.root).await {
                Ok(listing) => {
                    let entries = listing.entries.into_iter().map(|it| (it.key, it.value));
                    if self.heard(Source::Etcd, read_keys(&self.root, &entries.collect()).groups) {
                        return self.known(failures);
                    }
                    failures.push(NO_MEMBER.to_owned());
                }
                Err(error) => failures.push(chain(&error).to_string()),
            }
        }
        match self.rest.ask(&self.groups()).await {
            Ok(groups) => {
                self.heard(Source::Rest, groups);
            }
            // Where none is configured nobody was asked.
            Err(failure) if failure.is_empty() => {}
            Err(failure) => failures.push(format!("REST API: {failure}")),
        }
        self.known(failures)
    }

    fn known(&self, failures: Vec<String>) -> Result<Members, TopologyError> {
        let known = self.latest.borrow().clone();
        known.ok_or_else(|| self.unknown(failures))
    }

    fn unknown(&self, failures: Vec<String>) -> TopologyError {
        TopologyError::Unknown { root: self.root.clone(), failures }
    }

    /// The members known so far.
    fn groups(&self) -> Groups {
        let mut groups = Groups::new();
        for member in self.latest.borrow().iter().flat_map(|members| &members.list) {
            groups.entry(member.node.group).or_default().push(member.clone());
        }
        groups
    }

    /// Publishes what a source said, if that is anything at all; tells whether it is.
    fn heard(&self, source: Source, groups: Groups) -> bool {
        let numbers: BTreeSet<u32> = groups.keys().copied().collect();
        let list = merge(groups, self.groups());
        if list.is_empty() {
            return false;
        }
        let manned: BTreeSet<u32> = list.iter().map(|it| it.node.group).collect();
        let empty_groups = numbers.difference(&manned).copied().collect();
        let members = Some(Members { list, empty_groups, source, stale_since: None });
        self.latest.send_if_modified(|latest| {
            let is_news = *latest != members;
            *latest = members;
            is_news
        });
        true
    }

    async fn follow(&self) {
        let mut followed = Followed::default();
        let Some(etcd) = &self.etcd else {
            loop {
                self.ask_rest(&mut followed).await;
                sleep(REST_PAUSE).await;
            }
        };
        let mut watch: Watch = etcd.watch(&self.root);
        loop {
            match watch.next().await {
                Ok(change) => self.take(&mut followed, change),
                Err(error) => {
                    self.lose(&mut followed, &error).await;
                    sleep(REST_PAUSE).await;
                }
            }
        }
    }

    fn take(&self, followed: &mut Followed, change: Change) {
        match change {
            Change::All { entries, .. } => {
                followed.entries = Some(entries.into_iter().map(|it| (it.key, it.value)).collect());
            }
            Change::Put(entry) => {
                followed.entries.get_or_insert_default().insert(entry.key, entry.value);
            }
            Change::Deleted { key, .. } => {
                followed.entries.get_or_insert_default().remove(&key);
            }
        }
        if std::mem::take(&mut followed.is_lost) {
            info!("members come from etcd again");
        }
        followed.is_silent = false;
        let Some(entries) = &followed.entries else { return };
        let heard = read_keys(&self.root, entries);
        let problems: BTreeSet<String> = heard.problems.into_iter().collect();
        for problem in problems.difference(&followed.problems) {
            warn!(problem, "member not understood");
        }
        followed.problems = problems;
        let is_empty = !self.heard(Source::Etcd, heard.groups);
        if is_empty && !std::mem::replace(&mut followed.is_empty, true) {
            warn!(root = self.root, "{NO_MEMBER}");
        }
        followed.is_empty &= is_empty;
        self.why.send_replace(is_empty.then(|| NO_MEMBER.to_owned()));
    }

    async fn lose(&self, followed: &mut Followed, error: &EtcdError) {
        let why = chain(error).to_string();
        if !std::mem::replace(&mut followed.is_lost, true) {
            warn!(error = why, "etcd does not answer: Patroni is asked for the members");
        }
        self.why.send_replace(Some(why));
        self.ask_rest(followed).await;
    }

    async fn ask_rest(&self, followed: &mut Followed) {
        match self.rest.ask(&self.groups()).await {
            Ok(groups) => {
                followed.is_silent = false;
                self.heard(Source::Rest, groups);
            }
            Err(failure) => {
                if self.etcd.is_none() {
                    self.why.send_replace(Some(format!("REST API: {failure}")));
                }
                if !std::mem::replace(&mut followed.is_silent, true) {
                    warn!(error = failure, "Patroni does not answer: members stay as known");
                }
                self.latest.send_if_modified(|latest| {
                    let Some(members) = latest else { return false };
                    let is_news = members.stale_since.is_none();
                    members.stale_since.get_or_insert_with(Instant::now);
                    is_news
                });
            }
        }
    }
}

/// The members of each group that exists; where none is there any more, those that were known.
fn merge(heard: Groups, mut known: Groups) -> Vec<Member> {
    let keep = |(group, members): (u32, Vec<Member>)| {
        if members.is_empty() { known.remove(&group).unwrap_or_default() } else { members }
    };
    heard.into_iter().flat_map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::EtcdConfig;

    fn members(group: u32, names: &[&str]) -> Vec<Member> {
        let member = |name: &&str| {
            let [name, host] = [name, name].map(|it| (*it).to_string());
            let node = Node { group, name, host, port: 5432 };
            Member { node, api_url: None, opinion: None }
        };
        names.iter().map(member).collect()
    }

    #[test]
    fn a_group_without_members_keeps_those_that_were_known() {
        let known = || Groups::from([(0, members(0, &["a", "b"])), (1, members(1, &["c"]))]);
        for (case, heard, expected) in [
            ("all as before", known(), vec!["a", "b", "c"]),
            (
                "a member went, another came",
                Groups::from([(0, members(0, &["b", "d"])), (1, members(1, &["c"]))]),
                vec!["b", "d", "c"],
            ),
            (
                "all members of a group went",
                Groups::from([(0, members(0, &["a"])), (1, vec![])]),
                vec!["a", "c"],
            ),
            ("a group was removed", Groups::from([(0, members(0, &["a"]))]), vec!["a"]),
            ("nothing is there", Groups::new(), vec![]),
        ] {
            let names: Vec<_> = merge(heard, known()).into_iter().map(|it| it.node.name).collect();
            assert_eq!(names, expected, "{case}");
        }
    }

    #[test]
    fn a_group_of_which_nobody_was_ever_there_is_named() {
        let text = "scope = \"demo\"\nrest = [{ url = \"http://127.0.0.1:1\" }]\n";
        let patroni = Patroni::new(&toml::from_str(text).unwrap(), None).unwrap();
        assert!(!patroni.heard(Source::Etcd, Groups::from([(1, vec![])])), "nobody at all");
        for (heard, expected) in [
            (Groups::from([(0, members(0, &["a"])), (1, vec![])]), vec![1]),
            (Groups::from([(0, members(0, &["a"])), (1, members(1, &["b"]))]), vec![]),
            (Groups::from([(0, members(0, &["a"])), (1, vec![])]), vec![]),
        ] {
            assert!(patroni.heard(Source::Etcd, heard));
            let known = patroni.latest.borrow().clone().unwrap();
            assert_eq!(known.empty_groups.into_iter().collect::<Vec<_>>(), expected);
        }
    }

    #[tokio::test]
    async fn listed_nodes_are_known_from_the_start() {
        let nodes = [Node { group: 1, name: "a".into(), host: "a".into(), port: 5432 }];
        let config = TopologyConfig { etcd: None, patroni: None, nodes: &nodes };
        let topology = Topology::new(config, None).unwrap();
        assert_eq!(topology.nodes().await.unwrap(), nodes);
        let members = topology.members().await.unwrap();
        assert_eq!((members.source, members.age()), (Source::Static, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_api_that_is_not_configured_is_not_blamed() {
        let etcd: EtcdConfig = toml::from_str("endpoints = [\"http://127.0.0.1:1\"]").unwrap();
        let patroni: PatroniConfig = toml::from_str("scope = \"demo\"\n").unwrap();
        let config = TopologyConfig { etcd: Some(&etcd), patroni: Some(&patroni), nodes: &[] };
        let topology = Topology::new(config, Some(Etcd::new(&etcd).unwrap())).unwrap();
        let message = topology.nodes().await.unwrap_err().to_string();
        assert!(message.contains("no etcd endpoint answers"), "{message}");
        assert!(!message.contains("REST API"), "{message}");
    }

    #[tokio::test]
    async fn unknown_is_an_error_and_not_an_empty_list() {
        let text = "scope = \"demo\"\nrest = [{ url = \"http://127.0.0.1:1\" }]\n";
        let patroni: PatroniConfig = toml::from_str(text).unwrap();
        let config = TopologyConfig { etcd: None, patroni: Some(&patroni), nodes: &[] };
        let topology = Topology::new(config, None).unwrap();
        let error = topology.nodes().await.unwrap_err();
        assert!(error.is_transient());
        let message = error.to_string();
        let start = "the members of Patroni's cluster below /service/demo/ are unknown: \
                     REST API: group 0: http://127.0.0.1:1/cluster: ";
        assert!(message.starts_with(start), "{message}");
    }
}
