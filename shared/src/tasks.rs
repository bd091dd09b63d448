//! Supervised tasks: nothing in an agent runs detached.
//!
//! A detached task that panics is a silent outage: the process lives on without the part that
//! did the work, and Docker Swarm sees a healthy container. So every task is started here, by
//! name, and the agent ends as soon as one of its tasks does.

use std::collections::HashMap;
use std::time::Duration;

use thiserror::Error;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span};

/// The tasks of one agent. Dropping it aborts them.
#[derive(Debug, Default)]
pub struct Tasks {
    shutdown: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, &'static str>,
}

/// Why an agent's tasks ended other than by request.
#[derive(Debug, Error)]
pub enum TaskError {
    /// A task returned an error.
    #[error("task {name}")]
    Failed {
        /// The task's name.
        name: &'static str,
        /// What it returned.
        source: anyhow::Error,
    },
    /// A task returned although nobody asked it to.
    #[error("task {name} ended without being asked to")]
    Ended {
        /// The task's name.
        name: &'static str,
    },
    /// A task panicked. The panic's message is on standard error.
    #[error("task {name} panicked")]
    Panicked {
        /// The task's name.
        name: &'static str,
    },
    /// Tasks did not stop in time, and were aborted.
    #[error("not stopped within {}: {}", humantime::format_duration(*grace), names.join(", "))]
    Stuck {
        /// How long they were given.
        grace: Duration,
        /// The tasks' names, sorted.
        names: Vec<&'static str>,
    },
}

impl Tasks {
    /// Starts a task. Its future must return `Ok` soon after the token it is given is cancelled.
    pub fn spawn<F>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let future = task(self.shutdown.clone()).instrument(info_span!("task", task = name));
        let handle = self.running.spawn(future);
        self.names.insert(handle.id(), name);
    }

    /// Runs until `stop` resolves or a task ends, then stops the others and waits for them.
    ///
    /// Keep `grace` below the service's `stop_grace_period` in `stack.yml`: Docker Swarm kills
    /// the container when that runs out.
    ///
    /// # Errors
    ///
    /// The first task that failed, panicked, or ended unasked; or the tasks still running when
    /// `grace` ran out.
    pub async fn join(
        mut self,
        stop: impl Future<Output = &'static str>,
        grace: Duration,
    ) -> Result<(), TaskError> {
        let mut first_error = None;
        tokio::select! {
            signal = stop => info!(signal, "shutdown requested"),
            Some(ended) = self.running.join_next_with_id() => {
                let (name, error) = self.finish(ended);
                first_error = error.or(Some(TaskError::Ended { name }));
            }
        }

        self.shutdown.cancel();
        let drained = timeout(grace, async {
            while let Some(ended) = self.running.join_next_with_id().await {
                let (_, error) = self.finish(ended);
                first_error = first_error.take().or(error);
            }
        });
        if drained.await.is_err() {
            let mut names: Vec<_> = self.names.into_values().collect();
            names.sort_unstable();
            first_error = first_error.or(Some(TaskError::Stuck { grace, names }));
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Takes an ended task off the list; returns its name and how it failed, if it did.
    fn finish(&mut self, ended: Ended) -> (&'static str, Option<TaskError>) {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let name = self.names.remove(&id).unwrap_or("unnamed");
        let error = match ended {
            Ok((_, result)) => result.err().map(|source| TaskError::Failed { name, source }),
            Err(_) => Some(TaskError::Panicked { name }),
        };
        (name, error)
    }
}

type Ended = Result<(Id, anyhow::Result<()>), JoinError>;

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use anyhow::anyhow;

    use super::*;
    use crate::telemetry::chain;

    const GRACE: Duration = Duration::from_secs(5);

    async fn obedient(shutdown: CancellationToken) -> anyhow::Result<()> {
        shutdown.cancelled().await;
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_stops_the_agent_and_names_the_task() {
        let mut tasks = Tasks::default();
        tasks.spawn("steady", obedient);
        tasks.spawn("scheduler", |_| async { panic!("a bug") });
        let error = tasks.join(pending(), GRACE).await.unwrap_err();
        assert_eq!(error.to_string(), "task scheduler panicked");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_stops_the_agent_and_keeps_its_cause() {
        let mut tasks = Tasks::default();
        tasks.spawn("steady", obedient);
        tasks.spawn("admin", |_| async { Err(anyhow!("address in use")) });
        let error = tasks.join(pending(), GRACE).await.unwrap_err();
        assert_eq!(chain(&error).to_string(), "task admin: address in use");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_unasked_stops_the_agent() {
        let mut tasks = Tasks::default();
        tasks.spawn("steady", obedient);
        tasks.spawn("scheduler", |_| async { Ok(()) });
        let error = tasks.join(pending(), GRACE).await.unwrap_err();
        assert_eq!(error.to_string(), "task scheduler ended without being asked to");
    }

    #[tokio::test(start_paused = true)]
    async fn a_signal_stops_every_task() {
        let mut tasks = Tasks::default();
        tasks.spawn("one", obedient);
        tasks.spawn("two", obedient);
        tasks.join(ready("SIGTERM"), GRACE).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_do_not_stop_are_named() {
        let mut tasks = Tasks::default();
        tasks.spawn("uploads", |_| pending());
        tasks.spawn("admin", |_| pending());
        tasks.spawn("steady", obedient);
        let error = tasks.join(ready("SIGTERM"), GRACE).await.unwrap_err();
        assert_eq!(error.to_string(), "not stopped within 5s: admin, uploads");
    }
}
