//! The commands `silence`, `silences` and `unsilence`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use chrono::{DateTime, Utc};
use clap::{Args, ValueEnum as _};
use shared::config;
use shared::etcd::Etcd;
use shared::table::Table;

use super::store::Store;
use crate::component::Kind;
use crate::config::Config;
use crate::roster::{self, Roster};
use crate::silence::{SILENCE_MAX, Silence, check_component};

/// Options of `silence`.
#[derive(Debug, Args)]
pub struct SilenceArgs {
    /// For how long: `30m`, `2h`; 30 days at most
    #[arg(long = "for", value_name = "TIME", value_parser = length)]
    pub length: Duration,
    /// Only this: a kind (`postgres`), a name (`worker-1`), or all of a group (`group 1`); may be given
    /// more than once. Everything otherwise
    #[arg(long, value_name = "KIND|NAME", value_parser = check_component)]
    pub component: Vec<String>,
    /// What is done meanwhile
    #[arg(long, value_name = "TEXT")]
    pub comment: String,
    /// Who does it
    #[arg(long, value_name = "NAME")]
    pub by: Option<String>,
}

/// Options of `silences`.
#[derive(Debug, Args)]
pub struct SilencesArgs {
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

/// Options of `unsilence`.
#[derive(Debug, Args)]
pub struct UnsilenceArgs {
    /// Its name, as `silences` shows it
    pub id: String,
}

fn length(text: &str) -> Result<Duration, String> {
    let length = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if length < Duration::from_secs(1) || SILENCE_MAX < length {
        return Err("must be 1s to 30d".to_owned());
    }
    Ok(length)
}

/// Where the service that has this configuration keeps what it keeps.
///
/// # Errors
///
/// The configuration cannot be used.
pub fn store(path: &Path) -> anyhow::Result<Store> {
    let config: Config = config::load(path)?;
    let etcd = config.etcd.as_ref().map(Etcd::new).transpose()?;
    Ok(Store::new(etcd, config.state_directory.as_deref(), &config.cluster))
}

/// Makes a silence; returns what to print.
///
/// # Errors
///
/// There is nowhere to keep it.
pub async fn silence(path: &Path, args: SilenceArgs) -> anyhow::Result<String> {
    let SilenceArgs { length, component, comment, by } = args;
    let config: Config = config::load(path)?;
    let store = store(path)?;
    let members = roster::load(&store).await.unwrap_or_default();
    let unknown: String =
        component.iter().filter_map(|it| unknown(&config, &members, it)).collect();
    let silence = Silence::new(Utc::now(), length, component).with(comment, by);
    store.add_silence(&silence).await.context("make the silence")?;
    let Silence { id, .. } = &silence;
    let (until, what) = (shown(silence.until), what(&silence));
    Ok(format!(
        "{unknown}nobody is told of {what} until {until}\nTo end it: health-monitor unsilence {id}\n"
    ))
}

/// Lists the silences that last.
///
/// # Errors
///
/// They cannot be read.
pub async fn silences(path: &Path, args: &SilencesArgs) -> anyhow::Result<String> {
    let silences = store(path)?.silences().await.context("read the silences")?;
    if args.json {
        return Ok(serde_json::to_string_pretty(&silences)? + "\n");
    }
    if silences.is_empty() {
        return Ok("nothing is silenced\n".to_owned());
    }
    let mut table = Table::new(&["ID", "UNTIL", "WHAT", "BY", "COMMENT"]);
    for it in &silences {
        let by = it.by.clone().unwrap_or_default();
        table.row([it.id.clone(), shown(it.until), what(it), by, it.comment.clone()]);
    }
    Ok(table.to_string())
}

/// Ends a silence early.
///
/// # Errors
///
/// There is none of that name, or it could not be ended.
pub async fn unsilence(path: &Path, args: &UnsilenceArgs) -> anyhow::Result<String> {
    if !store(path)?.remove_silence(&args.id).await.context("end the silence")? {
        bail!("no silence is called `{}`; see `health-monitor silences`", args.id);
    }
    Ok(format!("silence {} is over\n", args.id))
}

/// A line about what is no kind, and no group and no name that is listed or was ever seen: it may be
/// mistyped.
fn unknown(config: &Config, members: &Roster, given: &str) -> Option<String> {
    let groups = config.nodes.iter().map(|it| it.group);
    let groups = groups.chain(members.watched().map(|it| it.group));
    let groups = groups.chain(config.pgbouncer.iter().map(|it| it.group));
    let mut groups = groups.chain(config.haproxy.iter().map(|it| it.group));
    let names = config.nodes.iter().map(|it| &it.name);
    let names = names.chain(members.watched().map(|it| &it.name));
    let names = names.chain(config.pgbouncer.iter().map(|it| &it.name));
    let names = names.chain(config.haproxy.iter().map(|it| &it.name));
    let names = names.chain(config.redis.iter().map(|it| &it.name));
    let names = names.chain(config.agents.iter().map(|it| &it.name));
    let names = names.chain(config.disks.iter().map(|it| &it.name));
    let mut names = names.chain(config.swarm.iter().map(|it| &it.stack));
    let is_known = Kind::from_str(given, false).is_ok()
        || names.any(|it| it == given)
        || groups.any(|it| given == format!("group {it}"))
        || config.etcd.iter().flat_map(|it| &it.endpoints).any(|it| it.contains(given));
    (!is_known).then(|| {
        format!("nothing that is known is called `{given}`: see that it is not mistyped\n")
    })
}

fn shown(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

fn what(silence: &Silence) -> String {
    match silence.components.as_slice() {
        [] => "anything".to_owned(),
        some => some.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silence_is_made_listed_and_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health-monitor.toml");
        let text = format!(
            "cluster = \"demo\"\nstate_directory = \"{}\"\n[postgres]\nuser = \"m\"\n\
             [[nodes]]\ngroup = 0\nname = \"a\"\nhost = \"a\"\n",
            directory.path().display()
        );
        std::fs::write(&path, text).unwrap();
        assert_eq!(
            silences(&path, &SilencesArgs { json: false }).await.unwrap(),
            "nothing is silenced\n"
        );
        let store = Store::Directory(directory.path().to_owned());
        let member = r#"[{"group":2,"name":"b","host":"b","port":5432,"api_url":null}]"#;
        store.save("members", member).await.unwrap();
        let args = SilenceArgs {
            length: Duration::from_hours(2),
            component: ["etcd", "group 1", "a", "b", "group 2"].map(str::to_owned).into(),
            comment: "new disks".to_owned(),
            by: Some("ada".to_owned()),
        };
        let made = silence(&path, args).await.unwrap();
        let warning = "nothing that is known is called `group 1`: see that it is not mistyped\n";
        let made = made.strip_prefix(warning).expect("a warning");
        assert!(
            made.starts_with("nobody is told of etcd, group 1, a, b, group 2 until 2"),
            "{made}"
        );
        let id = made.trim_end().rsplit(' ').next().unwrap().to_owned();
        let listed = silences(&path, &SilencesArgs { json: false }).await.unwrap();
        for part in [&id, "etcd, group 1, a, b", "ada", "new disks"] {
            assert!(listed.contains(part), "{listed}");
        }
        let listed = silences(&path, &SilencesArgs { json: true }).await.unwrap();
        assert!(listed.contains("\"comment\": \"new disks\""), "{listed}");
        let args = UnsilenceArgs { id: id.clone() };
        assert_eq!(unsilence(&path, &args).await.unwrap(), format!("silence {id} is over\n"));
        let error = unsilence(&path, &args).await.unwrap_err();
        assert!(error.to_string().starts_with("no silence is called"), "{error}");
    }

    #[test]
    fn a_length_has_bounds() {
        assert_eq!(length("2h"), Ok(Duration::from_hours(2)));
        for wrong in ["", "0s", "31d", "soon"] {
            assert!(length(wrong).is_err(), "{wrong}");
        }
    }
}
