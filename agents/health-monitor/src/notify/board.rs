//! What can be seen of telling people: `/status` and `/metrics`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::Utc;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use super::alerts::{Hold, Picture, Standing};
use super::delivery::{Delivery, Kind};
use crate::silence::Silence;

/// Who is told, as far as it is not as usual.
#[derive(Clone, Debug, Default)]
pub struct Telling {
    /// Why it is not known that those who must know are told.
    pub trouble: Option<String>,
    /// Those who take nothing now.
    pub failing: Vec<Delivery>,
    /// What nobody is told of, and how many of the components that are watched that is.
    pub silences: Vec<(Silence, usize)>,
}

/// How it goes. Clones share it.
#[derive(Clone, Debug)]
pub struct Board(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    cluster: String,
    is_telling: bool,
    is_mute: bool,
    picture: Picture,
    silences: Vec<Silence>,
    deliveries: Vec<Delivery>,
}

impl State {
    /// How much of what is watched a silence covers: none is a slip of the pen.
    fn covered_by(&self, silence: &Silence) -> usize {
        self.picture.watched.iter().filter(|it| silence.covers(it)).count()
    }
}

impl Board {
    pub(super) fn new(cluster: &str, deliveries: Vec<Delivery>) -> Self {
        let (picture, silences) = (Picture::default(), Vec::new());
        let cluster = cluster.to_owned();
        let state =
            State { cluster, is_telling: false, is_mute: false, picture, silences, deliveries };
        Self(Arc::new(Mutex::new(state)))
    }

    /// No code that holds this lock can panic halfway through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this replica is the one that tells.
    pub(super) fn telling(&self, is_telling: bool) {
        self.state().is_telling = is_telling;
    }

    /// Whether nobody is known to tell: etcd is away, and this replica does not.
    pub(super) fn mute(&self, is_mute: bool) {
        self.state().is_mute = is_mute;
    }

    /// Why it is not known that those who must know are told.
    pub fn trouble(&self) -> Option<String> {
        let words = "etcd does not answer, and this replica does not lead: it is not known that anybody \
                     tells those who must know";
        self.state().is_mute.then(|| words.to_owned())
    }

    /// What is not as usual now.
    pub fn now(&self) -> Telling {
        let trouble = self.trouble();
        let state = self.state();
        let failing = state.deliveries.iter().filter(|it| it.failing_since.is_some());
        let silences = state.silences.iter().map(|it| (it.clone(), state.covered_by(it)));
        Telling { trouble, failing: failing.cloned().collect(), silences: silences.collect() }
    }

    /// How things stand, and what is silenced.
    pub(super) fn stands(&self, picture: &Picture, silences: Vec<Silence>) {
        let mut state = self.state();
        if state.picture != *picture {
            picture.clone_into(&mut state.picture);
        }
        state.silences = silences;
    }

    /// What became of sending to one address.
    pub(super) fn delivered(&self, (kind, name): (Kind, &str), outcome: Result<(), String>) {
        let mut state = self.state();
        let mut all = state.deliveries.iter_mut();
        if let Some(delivery) = all.find(|it| it.kind == kind && it.name == name) {
            delivery.take(outcome, Utc::now());
        }
    }

    /// For `/status`: who is told, how that goes, what is silenced, and what nobody is told of and why.
    pub fn status(&self) -> Value {
        let state = self.state();
        let held =
            state.picture.standings.iter().filter_map(|(subject, standing)| match standing {
                Standing::Firing(_) => None,
                Standing::Held(why) => Some((subject, *why)),
            });
        let (silenced, held): (Vec<_>, Vec<_>) = held.partition(|(_, why)| *why == Hold::Silenced);
        let silenced = silenced.into_iter().map(|(subject, _)| {
            let mut by = state.silences.iter().filter(|it| it.covers(&subject.component));
            let until = by.clone().map(|it| it.until).max();
            json!({
                "component": subject.component, "check": subject.check,
                "until": until, "silence": by.next().map(|it| &it.id),
            })
        });
        let held = held.into_iter().map(|(subject, why)| {
            json!({ "component": subject.component, "check": subject.check, "why": why })
        });
        let all = state.silences.iter().map(|it| {
            let mut shown = serde_json::to_value(it).unwrap_or_default();
            shown["covers"] = json!(state.covered_by(it));
            shown
        });
        json!({
            "is_telling": state.is_telling,
            "is_mute": state.is_mute,
            "deliveries": state.deliveries,
            "silences": all.collect::<Vec<_>>(),
            "silenced": silenced.collect::<Vec<_>>(),
            "held": held.collect::<Vec<_>>(),
        })
    }

    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }
}

impl Collector for Board {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = self.state();
        let cluster = state.cluster.as_str();
        for (kind, name, label, help) in [
            (
                Kind::Alertmanager,
                "health_alerts_sent",
                "peer",
                "How often alerts were sent to an Alertmanager.",
            ),
            (
                Kind::Webhook,
                "health_notices_sent",
                "webhook",
                "How often notices were sent to a webhook.",
            ),
        ] {
            let of_kind: Vec<_> = state.deliveries.iter().filter(|it| it.kind == kind).collect();
            if of_kind.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for delivery in of_kind {
                for (result, count) in [("ok", delivery.sent), ("failed", delivery.failed)] {
                    let name = delivery.name.as_str();
                    let labels = [("cluster", cluster), (label, name), ("result", result)];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        let mut gauge = |name: &str, help: &str, value: i64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(family.encode_family(&[("cluster", cluster)])?)
        };
        let help = "Whether this replica is the one that tells people.";
        gauge("health_telling", help, i64::from(state.is_telling))?;
        let silences = i64::try_from(state.silences.len()).unwrap_or(i64::MAX);
        gauge("health_silences", "Silences that last.", silences)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus_client::encoding::text::encode;

    use super::super::alerts::Severity;
    use super::super::alerts::tests::{firing, problem_at, subject};
    use super::*;

    fn board() -> Board {
        let deliveries = [(Kind::Alertmanager, "http://a:9093"), (Kind::Webhook, "chat")];
        Board::new("demo", deliveries.map(|(kind, name)| Delivery::new(kind, name)).into())
    }

    #[test]
    fn what_is_sent_is_counted_from_zero() {
        let board = board();
        board.delivered((Kind::Webhook, "chat"), Err("refused".to_owned()));
        board.delivered((Kind::Webhook, "chat"), Ok(()));
        board.telling(true);
        let mut registry = Registry::with_prefix("pgmesh");
        board.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "# TYPE pgmesh_health_alerts_sent counter",
            "pgmesh_health_alerts_sent_total{cluster=\"demo\",peer=\"http://a:9093\",result=\"ok\"} 0",
            "pgmesh_health_alerts_sent_total{cluster=\"demo\",peer=\"http://a:9093\",result=\"failed\"} 0",
            "pgmesh_health_notices_sent_total{cluster=\"demo\",webhook=\"chat\",result=\"ok\"} 1",
            "pgmesh_health_notices_sent_total{cluster=\"demo\",webhook=\"chat\",result=\"failed\"} 1",
            "pgmesh_health_telling{cluster=\"demo\"} 1",
            "pgmesh_health_silences{cluster=\"demo\"} 0",
        ] {
            assert!(text.lines().any(|it| it == line), "no line {line:?} in:\n{text}");
        }
    }

    #[test]
    fn what_is_silenced_and_what_fails_is_shown() {
        let board = board();
        let mut picture = firing(&[(subject("a", "x"), problem_at(Severity::Warning, 5))]);
        picture.standings.insert(subject("b", "x"), Standing::Held(Hold::Silenced));
        picture.standings.insert(subject("c", "x"), Standing::Held(Hold::New));
        let silence = Silence::new(Utc::now(), Duration::from_mins(1), vec!["b".to_owned()]);
        board.stands(&picture, vec![silence.clone()]);
        board.delivered((Kind::Alertmanager, "http://a:9093"), Err("refused".to_owned()));
        let status = board.status();
        assert_eq!(status["silenced"][0]["component"]["name"], "b");
        assert_eq!(status["silenced"][0]["silence"], silence.id);
        assert_eq!(status["silences"][0]["components"][0], "b");
        assert_eq!(status["silences"][0]["covers"], 1);
        assert_eq!(status["held"][0]["why"], "new");
        assert_eq!(status["deliveries"][0]["error"], "refused");
        assert_eq!(status["is_telling"], false);
    }
}
