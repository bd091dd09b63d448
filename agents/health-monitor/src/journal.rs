//! What happened: bounded, the newest last; pure.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::check::Status;
use crate::component::Component;
use crate::failover::Failover;

/// So many events are kept.
const EVENTS_MAX: usize = 1000;

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// When it was noticed.
    pub at: DateTime<Utc>,
    /// To what.
    pub component: Component,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum What {
    /// A check came to something else.
    Changed {
        /// The check.
        check: &'static str,
        /// What it came to before.
        from: Status,
        /// What it comes to.
        to: Status,
        /// Why.
        reason: String,
        /// What to do next.
        next: String,
    },
    /// A check began to flap, or is calm again.
    Flapping {
        /// The check.
        check: &'static str,
        /// It flaps.
        begins: bool,
    },
    /// A group has another primary.
    Failover(Failover),
}

/// The events of late.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Journal(VecDeque<Event>);

impl Journal {
    /// Adds an event; the oldest goes if there are too many.
    pub fn add(&mut self, event: Event) {
        if self.0.len() == EVENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    /// The events, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Event> {
        self.0.iter().rev()
    }
}
