//! Keeps the roster where the next run, and the other replicas, find it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Args;
use shared::telemetry::chain;
use shared::topology::Members;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use super::Roster;
use crate::notify::command;
use crate::notify::store::{Store, StoreError, json, parse};

/// What it is kept under.
const NAME: &str = "members";
/// Between two looks whether somebody else has changed it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// After a failure to read or write.
const RETRY: Duration = Duration::from_secs(1);

/// Options of `forget`.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The member's name, as Patroni gave it
    pub name: String,
    /// Its group, where several members are called so
    #[arg(long, value_name = "NUMBER")]
    pub group: Option<u32>,
}

/// What is known of the members, and how well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Those that were ever seen.
    pub roster: Roster,
    /// What is kept was read once: whoever was a member before is in the roster.
    pub is_read: bool,
    /// Why what is kept cannot be read now.
    pub problem: Option<String>,
}

/// Brings together what Patroni lists and what is kept.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    listed: watch::Receiver<Option<Members>>,
    publish: watch::Sender<Known>,
    known: Known,
}

impl Keeper {
    /// A keeper, and what it will know.
    pub fn new(
        store: Store,
        listed: watch::Receiver<Option<Members>>,
    ) -> (Self, watch::Receiver<Known>) {
        let (publish, known) = watch::channel(Known::default());
        (Self { store, listed, publish, known: Known::default() }, known)
    }

    /// Keeps it for ever. What goes wrong is logged and tried again.
    pub async fn run(mut self) {
        loop {
            let pause = match self.step().await {
                Ok(()) => {
                    if self.known.problem.take().is_some() {
                        info!("who the members are is kept again");
                    }
                    LOOK_EVERY
                }
                Err(error) => {
                    let error = chain(&error).to_string();
                    if self.known.problem.is_none() {
                        warn!(error, "who the members are cannot be kept");
                    }
                    self.known.problem = Some(error);
                    RETRY
                }
            };
            self.tell();
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = self.listed.changed() => {}
            }
        }
    }

    /// What is listed is known at once, what is kept when it is read. Whoever writes has just read.
    async fn step(&mut self) -> Result<(), StoreError> {
        let listed = self.listed.borrow_and_update().as_ref().map(|it| it.list.clone());
        let listed = listed.unwrap_or_default();
        self.known.roster.take_listed(&listed);
        self.tell();
        let kept = load(&self.store).await?;
        self.known.roster.take_kept(&kept);
        self.known.roster.take_listed(&listed);
        self.known.is_read = true;
        self.tell();
        if self.known.roster != kept {
            self.store.save(NAME, &json(&self.known.roster)).await?;
        }
        Ok(())
    }

    fn tell(&self) {
        self.publish.send_if_modified(|it| {
            let is_new = *it != self.known;
            it.clone_from(&self.known);
            is_new
        });
    }
}

/// The members that are kept. What cannot be understood is replaced by what is known.
pub(crate) async fn load(store: &Store) -> Result<Roster, StoreError> {
    let Some(text) = store.load(NAME).await? else { return Ok(Roster::default()) };
    Ok(parse(NAME, text.as_bytes()).unwrap_or_else(|error| {
        warn!(error = %chain(&error), "who the members were before cannot be understood");
        Roster::default()
    }))
}

/// Marks a member that is gone for good; returns what to print.
///
/// # Errors
///
/// There is none of that name, or it cannot be kept.
pub async fn forget(path: &Path, args: &ForgetArgs) -> anyhow::Result<String> {
    let store = command::store(path)?;
    if matches!(store, Store::Nowhere) {
        return Err(StoreError::Nowhere).context("forget the member");
    }
    let mut roster = load(&store).await.context("read the known members")?;
    let forgotten = roster.forget(&args.name, args.group).map_err(|it| anyhow!(it))?;
    let member = format!("{} of group {}", forgotten.entry.name, forgotten.entry.group);
    if forgotten.was_before {
        return Ok(format!("{member} is forgotten already\n"));
    }
    store.save(NAME, &json(&roster)).await.context("forget the member")?;
    Ok(format!("{member} is not missed any more, unless Patroni lists it\n"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use shared::topology::Source;

    use super::super::tests::member;
    use super::*;

    fn listed(names: &[&str]) -> Members {
        let list = names.iter().map(|it| member(0, it)).collect();
        let (source, empty_groups) = (Source::Etcd, BTreeSet::new());
        Members { list, empty_groups, source, stale_since: None }
    }

    fn names(keeper: &Keeper) -> Vec<String> {
        keeper.known.roster.watched().map(|it| it.name.clone()).collect()
    }

    #[tokio::test]
    async fn who_was_a_member_before_a_restart_is_known_after_it_until_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health-monitor.toml");
        let text = format!(
            "cluster = \"demo\"\nstate_directory = \"{}\"\n[postgres]\nuser = \"m\"\n\
             [patroni]\nscope = \"demo\"\n[[patroni.rest]]\nurl = \"http://a:8008\"\n",
            directory.path().display()
        );
        std::fs::write(&path, text).unwrap();
        let store = || Store::Directory(directory.path().to_owned());
        let (_one, members) = watch::channel(Some(listed(&["a", "b"])));
        let (mut keeper, _known) = Keeper::new(store(), members);
        keeper.step().await.unwrap();

        // Nobody lists anybody.
        let (list, members) = watch::channel(None);
        let (mut keeper, known) = Keeper::new(store(), members);
        assert!(!known.borrow().is_read);
        keeper.step().await.unwrap();
        assert!(known.borrow().is_read);
        assert_eq!(names(&keeper), ["a", "b"]);

        let args = |name: &str| ForgetArgs { name: name.to_owned(), group: None };
        let said = forget(&path, &args("b")).await.unwrap();
        assert_eq!(said, "b of group 0 is not missed any more, unless Patroni lists it\n");
        let said = forget(&path, &args("b")).await.unwrap();
        assert_eq!(said, "b of group 0 is forgotten already\n");
        assert!(forget(&path, &args("x")).await.is_err());
        keeper.step().await.unwrap();
        assert_eq!(names(&keeper), ["a"]);
        list.send_replace(Some(listed(&["b"])));
        keeper.step().await.unwrap();
        assert_eq!(names(&keeper), ["a", "b"]);
        assert!(forget(&path, &args("b")).await.is_ok(), "that it is back is kept too");
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_not_taken_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("health-members.json")).unwrap();
        let (_list, members) = watch::channel(Some(listed(&["a"])));
        let store = Store::Directory(directory.path().to_owned());
        let (mut keeper, known) = Keeper::new(store, members);
        assert!(keeper.step().await.is_err());
        assert_eq!(names(&keeper), ["a"], "what is listed is known all the same");
        assert!(!known.borrow().is_read);
    }
}
