//! The loop: a task for each component that asks it for ever, and one that judges what was said.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use shared::etcd::Etcd;
use shared::pg::{Node, Settings};
use shared::topology::{Members, Spread, Topology, members_changed};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::asking::ask_for_ever;
use crate::check::Status;
use crate::clock;
use crate::component::{Component, Kind};
use crate::config::Config;
use crate::facts::{Ages, Facts, Membership, Of};
use crate::journal::{Event, What};
use crate::monitor::Monitor;
use crate::notify::store::Store;
use crate::pace::Pace;
use crate::probe::Probe;
use crate::probe::agent::AgentProbe;
use crate::probe::disk::DiskProbe;
use crate::probe::etcd::EtcdProbe;
use crate::probe::haproxy::HaproxyProbe;
use crate::probe::http::Http;
use crate::probe::patroni::PatroniProbe;
use crate::probe::pgbouncer::PgbouncerProbe;
use crate::probe::postgres::{DeepProbe, PostgresProbe};
use crate::probe::redis::RedisProbe;
use crate::probe::swarm::SwarmProbe;
use crate::roster::{Keeper, membership};
use crate::settle::Now;

/// What the comprehensive questions to a server may take together.
pub const DEEP_LIMIT: Duration = Duration::from_secs(20);
/// Over what time the first questions of the service are spread.
pub const START_SPREAD: Duration = Duration::from_secs(10);
/// The least between two judgements.
const CALM: Duration = Duration::from_millis(50);
/// An outcome is too old after so many times that there should have been another.
const AGES: u32 = 3;
/// So long after the start nobody complains that members are not known yet.
const EARLY: Duration = Duration::from_secs(5);

/// Judges what is known, until `shutdown`, and logs what changes.
///
/// # Errors
///
/// None.
pub async fn decide(
    monitor: Monitor,
    every: Duration,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            _ = tick.tick() => {}
            () = monitor.stirred() => {}
        }
        for event in monitor.decide(now()) {
            log(&event);
        }
        // Where many things happen at a time, they are judged together.
        sleep(CALM).await;
    }
}

/// This moment.
pub fn now() -> Now {
    Now { boot: clock::now(), wall: Utc::now() }
}

fn log(event: &Event) {
    let component = event.component.to_string();
    match &event.what {
        What::Changed { check, from, to, reason, next } => {
            let (from, to) = (from.name(), to.name());
            if to == Status::Ok.name() {
                info!(component, check, from, to, reason, "check changed");
            } else {
                warn!(component, check, from, to, reason, next, "check changed");
            }
        }
        What::Flapping { check, begins: true } => {
            warn!(
                component,
                check, "check flaps: it counts as a warning at least until it is calm"
            );
        }
        What::Flapping { check, begins: false } => info!(component, check, "check is calm again"),
        What::Failover(it) => warn!(
            component,
            old = it.old.name,
            new = it.new.name,
            old_timeline = it.old.timeline,
            new_timeline = it.new.timeline,
            unavailable_at_least_seconds = it.unavailable_at_least_seconds,
            unavailable_at_most_seconds = it.unavailable_at_most_seconds,
            lost_bytes_at_most = it.lost_bytes_at_most,
            both_wrote = it.both_wrote,
            "the group has another primary"
        ),
    }
}

/// Everything that is asked, and how.
#[derive(Debug)]
pub struct Watcher {
    /// Where what is said goes.
    pub monitor: Monitor,
    /// Which nodes there are.
    pub topology: Topology,
    store: Store,
    config: Config,
    settings: Settings,
    patroni: Option<Http>,
    tasks: JoinSet<()>,
    spread: Duration,
    phases: Spread,
}

/// The tasks that watch a member.
#[derive(Debug)]
struct Watched {
    member: (Node, Option<String>),
    tasks: Vec<AbortHandle>,
}

impl Watcher {
    /// Reads the secrets and certificates that the configuration names. Nobody is asked before the
    /// runtime, which there must be, gets to it; then the first questions are spread over `spread`.
    ///
    /// # Errors
    ///
    /// One of them cannot be used.
    pub fn new(config: Config, application_name: &str, spread: Duration) -> anyhow::Result<Self> {
        let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
        let store = Store::new(etcd.clone(), config.state_directory.as_deref(), &config.cluster);
        let topology = Topology::new(config.topology(), etcd)?;
        let settings = config.postgres.settings(application_name)?;
        let patroni = config.patroni.as_ref().map(PatroniProbe::client).transpose()?;
        let monitor = Monitor::new(&config.cluster, config.limits.clone(), clock::now());
        monitor.state().plan = config.sizing;
        let unknown =
            || Some("who the members of Patroni's cluster are is not known yet".to_owned());
        monitor.state().facts.membership = config.patroni.as_ref().map(|_| Membership {
            unknown: unknown(),
            is_early: true,
            ..Membership::default()
        });
        monitor.state().ages = Ages {
            each: (config.interval + config.timeout) * AGES,
            deep: (config.comprehensive_interval + DEEP_LIMIT) * AGES,
        };
        let (tasks, phases) = (JoinSet::new(), Spread::default());
        let mut watcher =
            Self { monitor, topology, store, config, settings, patroni, tasks, spread, phases };
        watcher.watch_listed()?;
        Ok(watcher)
    }

    /// Watches until `shutdown`; what is under way then is dropped.
    ///
    /// # Errors
    ///
    /// A task panicked.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            ended = self.watch_members() => ended,
        }
    }

    fn spawn<P: Probe + 'static>(
        &mut self,
        of: fn(&mut Facts) -> &mut Of<P::Facts>,
        component: Component,
        probe: P,
    ) -> AbortHandle
    where
        P::Facts: 'static,
    {
        let Config { interval: every, timeout: limit, .. } = self.config;
        // Of the servers of a group one may become its primary at any moment.
        let searches = component.group.filter(|_| component.kind == Kind::Postgres);
        self.spawn_at(of, component, probe, Pace { every, limit, wait: every, searches })
    }

    fn spawn_at<P: Probe + 'static>(
        &mut self,
        of: fn(&mut Facts) -> &mut Of<P::Facts>,
        component: Component,
        probe: P,
        pace: Pace,
    ) -> AbortHandle
    where
        P::Facts: 'static,
    {
        let wait = pace.wait.min(self.spread).mul_f64(self.phases.take());
        let pace = Pace { wait, ..pace };
        self.tasks.spawn(ask_for_ever(self.monitor.clone(), of, component, probe, pace))
    }

    /// The components that the configuration lists.
    fn watch_listed(&mut self) -> anyhow::Result<()> {
        let config = self.config.clone();
        let mut listed = Vec::new();
        if let Some(etcd) = &config.etcd {
            for (name, probe) in EtcdProbe::each(etcd)? {
                let component = Component::new(Kind::Etcd, name);
                listed.push(component.clone());
                self.spawn(|it| &mut it.etcd, component, probe);
            }
        }
        for it in &config.pgbouncer {
            let component = Component::of_group(Kind::Pgbouncer, it.group, &it.name);
            listed.push(component.clone());
            self.spawn(|it| &mut it.pgbouncer, component, PgbouncerProbe::new(it, config.timeout)?);
        }
        for it in &config.haproxy {
            let component = Component::of_group(Kind::Haproxy, it.group, &it.name);
            listed.push(component.clone());
            self.spawn(|it| &mut it.haproxy, component, HaproxyProbe::new(it)?);
        }
        for it in &config.redis {
            let component = Component::new(Kind::Redis, &it.name);
            listed.push(component.clone());
            self.spawn(|it| &mut it.redis, component, RedisProbe::new(it)?);
        }
        for it in &config.agents {
            let component = Component::new(Kind::Agent, &it.name);
            listed.push(component.clone());
            self.spawn(|it| &mut it.agents, component, AgentProbe::new(it)?);
        }
        if let Some(it) = &config.swarm {
            let component = Component::new(Kind::Swarm, &it.stack);
            listed.push(component.clone());
            self.spawn(|it| &mut it.swarm, component, SwarmProbe::new(it)?);
        }
        for it in &config.disks {
            let component = Component::new(Kind::Disk, &it.name);
            listed.push(component.clone());
            self.spawn(|it| &mut it.disks, component, DiskProbe::new(it));
        }
        let kinds = [Kind::Etcd, Kind::Pgbouncer, Kind::Haproxy, Kind::Redis, Kind::Agent];
        let mut state = self.monitor.state();
        state.expect(&[&kinds[..], &[Kind::Swarm, Kind::Disk]].concat(), listed);
        Ok(())
    }

    /// The servers, and the Patroni of each: those that are listed, or were ever members.
    async fn watch_members(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut listed = self.topology.subscribe();
        let (keeper, mut known) = Keeper::new(self.store.clone(), listed.clone());
        if self.config.patroni.is_some() {
            self.tasks.spawn(keeper.run());
        }
        let mut watched: BTreeMap<(u32, String), Watched> = BTreeMap::new();
        loop {
            let members = listed.borrow_and_update().clone();
            let roster = known.borrow_and_update().clone();
            let is_early = began.elapsed() < EARLY;
            let found = match &self.config.patroni {
                Some(it) => {
                    let membership = membership(&it.scope, members.as_ref(), &roster, is_early);
                    self.monitor.state().facts.membership = Some(membership);
                    let known = roster.roster.watched();
                    known.map(|it| (it.node(), it.api_url.clone())).collect()
                }
                None => members.iter().flat_map(Members::nodes).map(|it| (it, None)).collect(),
            };
            self.adjust(&mut watched, found);
            let changed = members_changed(&mut listed, &mut self.tasks);
            tokio::select! {
                changed = changed => changed?,
                Ok(()) = known.changed() => {}
                () = sleep_until(began + EARLY), if is_early => {}
            }
        }
    }

    fn adjust(
        &mut self,
        watched: &mut BTreeMap<(u32, String), Watched>,
        members: Vec<(Node, Option<String>)>,
    ) {
        watched.retain(|key, one| {
            let stays = members.iter().any(|(it, _)| *key == (it.group, it.name.clone()));
            if !stays {
                one.tasks.iter().for_each(AbortHandle::abort);
            }
            stays
        });
        for member in members {
            let key = (member.0.group, member.0.name.clone());
            if let Some(known) = watched.get(&key) {
                if known.member == member {
                    continue;
                }
                known.tasks.iter().for_each(AbortHandle::abort);
            }
            let tasks = self.watch_member(&member.0, member.1.as_deref());
            watched.insert(key, Watched { member, tasks });
        }
        let servers = watched.values().map(|it| component(Kind::Postgres, &it.member.0));
        let rest_apis = watched.values().filter(|it| it.member.1.is_some());
        let rest_apis = rest_apis.map(|it| component(Kind::Patroni, &it.member.0));
        self.monitor.state().expect(&[Kind::Postgres, Kind::Patroni], servers.chain(rest_apis));
    }

    fn watch_member(&mut self, node: &Node, api_url: Option<&str>) -> Vec<AbortHandle> {
        let Config { interval, timeout, comprehensive_interval, .. } = self.config;
        let settings = self.settings.clone();
        let server = component(Kind::Postgres, node);
        let probe = PostgresProbe::new(node.clone(), &settings, interval, timeout);
        let mut tasks = vec![self.spawn(|it| &mut it.postgres, server.clone(), probe)];
        let probe = DeepProbe::new(node.clone(), &settings, interval);
        let every = comprehensive_interval;
        let pace = Pace { every, limit: DEEP_LIMIT, wait: every, searches: None };
        tasks.push(self.spawn_at(|it| &mut it.deep, server, probe, pace));
        if let Some((url, http)) = api_url.zip(self.patroni.clone()) {
            let probe = PatroniProbe::new(http, url);
            let patroni = component(Kind::Patroni, node);
            tasks.push(self.spawn(|it| &mut it.patroni, patroni, probe));
        }
        tasks
    }
}

fn component(kind: Kind, node: &Node) -> Component {
    Component::of_group(kind, node.group, &node.name)
}
