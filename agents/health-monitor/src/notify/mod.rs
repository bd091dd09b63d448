//! Who must know: Alertmanager and webhooks.
//!
//! [`alerts`] says what people are to be told of; [`ledger`], what they know already; the difference is
//! sent. What was told is kept where the next leader finds it, in a [`store`]; so a takeover loses nothing,
//! and repeats at most what was sent in the moment before and not noted yet: rather twice than never.
//! Alertmanager takes that for the same alert; a webhook gets the same message again. Only who holds the lease sends. If etcd is away for everybody, nobody can
//! hold it: then the replica that held it last goes on, because that etcd is away must be told as well; and
//! after a minute every other one does too, since nobody can know whether that one is still there.

mod alertmanager;
pub mod alerts;
pub mod board;
pub mod command;
pub mod config;
pub mod delivery;
mod kept;
pub mod ledger;
mod post;
pub mod store;
pub mod template;
mod webhook;

use std::time::Duration;

use futures_util::future::{join, join_all};
use shared::etcd::Etcd;
use shared::lease::{Identity, Leadership, Sharing, TTL, replica_name};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use alertmanager::Alertmanager;
use alerts::{Lookout, Picture, Sight, Subject, excused};
use board::Board;
use delivery::{Delivery, Kind};
use store::Store;
use webhook::Webhook;

pub use post::PostSetupError;

use crate::check::Level;
use crate::commands::AGENT;
use crate::component::Component;
use crate::config::Config;
use crate::monitor::Monitor;
use crate::settle::Settled;
use crate::silence::Silence;
use crate::verdict::stands_in;
use crate::watch::now;

/// Between two looks at what counts.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two looks whether etcd answers again.
const AWAY_RECHECK: Duration = Duration::from_secs(2);
/// Between two looks whether etcd answers, of a replica that does not lead.
const AWAY_CHECK: Duration = Duration::from_secs(5);
/// When it has not answered for so long, who does not lead tells as well: rather twice than never.
const AWAY_FOR: Duration = Duration::from_mins(1);
/// How long a stop waits for what is being sent.
const FINISH_LIMIT: Duration = Duration::from_secs(3);

/// Tells those who must know.
#[derive(Debug)]
pub struct Notifier {
    /// What can be seen of it.
    pub board: Board,
    monitor: Monitor,
    lookout: Lookout,
    store: Store,
    leadership: Leadership,
    sharing: Option<Sharing>,
    sinks: Sinks,
}

/// Who is told.
#[derive(Debug)]
struct Sinks {
    alertmanager: Alertmanager,
    webhooks: Vec<Webhook>,
}

/// What all who tell need.
#[derive(Debug)]
struct Context {
    cluster: String,
    store: Store,
    pictures: watch::Receiver<Picture>,
    board: Board,
    shutdown: CancellationToken,
}

impl Notifier {
    /// Reads the files that the configuration names. Nobody is told or asked yet.
    ///
    /// # Errors
    ///
    /// One of them cannot be used.
    pub fn new(config: &Config, monitor: Monitor) -> anyhow::Result<Self> {
        let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
        let alertmanager = Alertmanager::new(&config.alertmanager, config.notify.resend_interval)?;
        let webhooks = config.webhook.iter().enumerate();
        let webhooks: Vec<_> =
            webhooks.map(|(index, it)| Webhook::new(it, index)).collect::<Result<_, _>>()?;
        let deliveries: Vec<_> = alertmanager
            .names()
            .map(|it| Delivery::new(Kind::Alertmanager, it))
            .chain(webhooks.iter().map(|it| Delivery::new(Kind::Webhook, it.name())))
            .collect();
        let tells_somebody = !deliveries.is_empty();
        let store = Store::new(etcd.clone(), config.state_directory.as_deref(), &config.cluster);
        let identity = Identity {
            cluster: config.cluster.clone(),
            agent: AGENT.to_owned(),
            replica: replica_name(),
        };
        let (leadership, sharing) = Leadership::new(etcd, identity, TTL);
        Ok(Self {
            board: Board::new(&config.cluster, deliveries),
            monitor,
            lookout: Lookout::new(config.notify.after),
            store,
            leadership,
            sharing: tells_somebody.then_some(sharing),
            sinks: Sinks { alertmanager, webhooks },
        })
    }

    /// Tells until `shutdown`, and finishes what is being sent then, for at most 3 s.
    ///
    /// # Errors
    ///
    /// None: what goes wrong is logged, shown and tried again.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self { board, monitor, mut lookout, store, leadership, sharing, mut sinks } = self;
        let cluster = monitor.state().cluster.clone();
        let (publish, pictures) = watch::channel(Picture::default());
        let (silences, known) = watch::channel(None);
        let context = Context { cluster, store, pictures, board, shutdown: shutdown.clone() };
        let observe = observe(&monitor, &mut lookout, &known, &context, &publish);
        let tell = async {
            match sharing {
                Some(sharing) => {
                    let lead = Box::pin(lead(&mut sinks, leadership, &context));
                    join(Box::pin(sharing.run(shutdown.clone())), lead).await.0
                }
                None => Ok(()),
            }
        };
        let too_late = async {
            shutdown.cancelled().await;
            sleep(FINISH_LIMIT).await;
        };
        tokio::select! {
            (told, ()) = join(tell, observe) => told,
            () = context.store.follow_silences(&silences) => Ok(()),
            () = too_late => Ok(()),
        }
    }
}

/// Looks how things stand, for ever.
async fn observe(
    monitor: &Monitor,
    lookout: &mut Lookout,
    silences: &watch::Receiver<Option<Vec<Silence>>>,
    context: &Context,
    publish: &watch::Sender<Picture>,
) {
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        let now = now();
        let Some(mut active) = silences.borrow().clone() else { continue };
        active.retain(|it| it.is_active(now.wall));
        let is_ready = monitor.not_ready().is_none();
        let picture = {
            let mut state = monitor.state();
            if state.decided_at.is_none() {
                continue;
            }
            let is_silenced = |it: &Component| active.iter().any(|silence| silence.covers(it));
            for (_, checks) in state.checks.iter_mut().filter(|(it, _)| is_silenced(it)) {
                checks.values_mut().for_each(Settled::calm);
            }
            let excused = excused(&state.checks, is_silenced);
            let primaries = state.primaries.names();
            let sight = Sight {
                checks: &state.checks,
                stands_in: |it: &_| stands_in(it, &state.verdicts.components, &primaries),
                is_silenced: |it: &Subject| is_silenced(&it.component) || excused.contains(it),
                is_complete: is_ready && state.is_read_at(Level::Comprehensive),
            };
            lookout.look(sight, now)
        };
        context.board.stands(&picture, active);
        publish.send_if_modified(|known| {
            let is_new = *known != picture;
            *known = picture;
            is_new
        });
    }
}

/// Tells as long as this replica leads, or etcd is away and this replica led last or has waited for long.
async fn lead(sinks: &mut Sinks, mut leadership: Leadership, context: &Context) {
    let mut alone = None;
    while !context.shutdown.is_cancelled() {
        if let Some(claim) = leadership.claim() {
            alone = Some("this replica led last, and goes on to tell those who must know");
            info!("this replica tells those who must know");
            context.board.telling(true);
            claim.guard(Box::pin(sinks.tell(context, false))).await;
            context.board.telling(false);
        } else if let Some(why) = alone.take()
            && context.store.is_away().await
        {
            warn!("etcd is away: {why}");
            alone = Some(why);
            context.board.telling(true);
            tokio::select! {
                () = Box::pin(sinks.tell(context, true)) => {}
                () = returned(&context.store) => info!("etcd answers again"),
            }
            context.board.telling(false);
        } else {
            tokio::select! {
                () = context.shutdown.cancelled() => return,
                () = leadership.changed() => {}
                () = gone(&context.store, &context.board) => {
                    alone = Some("this replica tells those who must know, as others may");
                }
            }
            context.board.mute(false);
        }
    }
}

/// Resolves when what is away has been so for long.
async fn gone(store: &Store, board: &Board) {
    let mut since = None;
    loop {
        let asked_at = Instant::now();
        let is_away = store.is_away().await;
        board.mute(is_away);
        if !is_away {
            since = None;
        } else if AWAY_FOR <= since.get_or_insert(asked_at).elapsed() {
            return;
        }
        sleep(AWAY_CHECK).await;
    }
}

/// Resolves when what was away answers again.
async fn returned(store: &Store) {
    loop {
        sleep(AWAY_RECHECK).await;
        if !store.is_away().await {
            return;
        }
    }
}

impl Sinks {
    /// Tells everybody until shutdown. `goes_on` without reading what was told: it is known.
    async fn tell(&mut self, context: &Context, goes_on: bool) {
        let Self { alertmanager, webhooks } = self;
        let webhooks = webhooks.iter_mut().map(|it| it.run(context, goes_on));
        join(alertmanager.run(context, goes_on), join_all(webhooks)).await;
    }
}

#[cfg(test)]
mod tests {
    use shared::etcd::EtcdConfig;
    use tokio::time::timeout;

    use super::*;

    /// A replica that begins while etcd is away would tell nobody for ever.
    #[tokio::test(start_paused = true)]
    async fn who_does_not_lead_waits_for_etcd_for_a_minute() {
        let config: EtcdConfig = toml::from_str("endpoints = [\"http://127.0.0.1:1\"]").unwrap();
        let away = Store::new(Some(Etcd::new(&config).unwrap()), None, "demo");
        let board = Board::new("demo", Vec::new());
        let began = Instant::now();
        assert!(timeout(AWAY_FOR / 2, gone(&away, &board)).await.is_err());
        assert!(board.trouble().is_some());
        gone(&away, &board).await;
        assert!((AWAY_FOR..AWAY_FOR * 3).contains(&began.elapsed()), "{:?}", began.elapsed());
        let there = timeout(AWAY_FOR * 10, gone(&Store::Nowhere, &board));
        assert!(there.await.is_err());
        assert_eq!(board.trouble(), None);
    }
}
