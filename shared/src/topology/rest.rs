//! Patroni's REST API, for when etcd does not answer us.
//!
//! `GET /cluster` reads etcd too: it helps where only we are cut off from it, or may not read
//! it. Where etcd itself is down Patroni closes the connection without an answer after its
//! `retry_timeout` (seen with 4.0.7). `GET /patroni` still answers then, for that one member.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use futures_util::future::{join_all, select_ok};
use reqwest::{Client, Url};
use rustls::ClientConfig;
use tracing::warn;

use super::config::{PatroniConfig, RestConfig};
use super::dcs::{read_cluster, read_patroni};
use super::members::{Member, TopologyError};
use crate::{http, tls};

/// Limit on the TCP connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Limit on `GET /cluster`, for which Patroni asks etcd.
const CLUSTER_LIMIT: Duration = Duration::from_secs(4);
/// Limit on `GET /patroni`, for which it asks its own server.
const MEMBER_LIMIT: Duration = Duration::from_secs(2);
/// Longest answer to read, in bytes. That of a large cluster has some KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A client of the REST APIs.
#[derive(Debug)]
pub(super) struct Rest {
    client: Client,
    configured: Vec<RestConfig>,
}

impl Rest {
    pub(super) fn new(config: &PatroniConfig) -> Result<Self, TopologyError> {
        let tls = tls::client_config(config.ca_file.as_deref().map(Path::new))
            .map_err(TopologyError::Certificates)?;
        let client = Client::builder()
            .tls_backend_preconfigured(ClientConfig::clone(&tls))
            .connect_timeout(CONNECT_LIMIT)
            .no_proxy()
            .build()
            .map_err(TopologyError::Client)?;
        Ok(Self { client, configured: config.rest.clone() })
    }

    /// Asks about each group: its members, or if none of them can say who the others are, each
    /// for itself. Groups that do not answer at all keep the members that are `known`.
    ///
    /// Fails with what went wrong if no group answers.
    pub(super) async fn ask(
        &self,
        known: &BTreeMap<u32, Vec<Member>>,
    ) -> Result<BTreeMap<u32, Vec<Member>>, String> {
        let numbers: BTreeSet<u32> =
            known.keys().copied().chain(self.configured.iter().map(|it| it.group)).collect();
        let answers = numbers.into_iter().map(async |group| {
            let known = known.get(&group).map(Vec::as_slice).unwrap_or_default();
            (group, self.ask_group(group, known).await)
        });
        let mut groups = known.clone();
        let mut failures = Vec::new();
        let mut is_answered = false;
        for (group, answer) in join_all(answers).await {
            match answer {
                Ok(members) => {
                    is_answered = true;
                    groups.insert(group, members);
                }
                Err(failure) => failures.push(format!("group {group}: {failure}")),
            }
        }
        if is_answered { Ok(groups) } else { Err(failures.join("; ")) }
    }

    async fn ask_group(&self, group: u32, known: &[Member]) -> Result<Vec<Member>, String> {
        let configured = self.configured.iter().filter(|it| it.group == group);
        let urls: BTreeSet<Url> = known
            .iter()
            .filter_map(|member| member.api_url.as_deref())
            .chain(configured.map(|it| it.url.as_str()))
            .filter_map(|url| at(url, "/cluster"))
            .collect();
        if urls.is_empty() {
            return Err("the address of no member's REST API is known".to_owned());
        }
        let questions = urls.into_iter().map(|url| Box::pin(self.cluster(group, url)));
        let failure = match select_ok(questions).await {
            Ok((members, _)) => return Ok(members),
            Err(failure) => failure,
        };
        let each = known
            .iter()
            .map(async |member| Member { opinion: self.member(member).await, ..member.clone() });
        let members: Vec<Member> = join_all(each).await;
        let is_answered = members.iter().any(|member| member.opinion.is_some());
        if is_answered { Ok(members) } else { Err(failure) }
    }

    async fn cluster(&self, group: u32, url: Url) -> Result<Vec<Member>, String> {
        let answer = self.get(&url, CLUSTER_LIMIT).await?;
        let mut heard = read_cluster(group, &answer).map_err(|why| format!("{url} {why}"))?;
        for problem in heard.problems {
            warn!(group, problem, "member not understood");
        }
        match heard.groups.remove(&group) {
            Some(members) if !members.is_empty() => Ok(members),
            _ => Err(format!("{url} knows no members")),
        }
    }

    async fn member(&self, member: &Member) -> Option<super::members::Opinion> {
        let url = at(member.api_url.as_deref()?, "/patroni")?;
        let answer = self.get(&url, MEMBER_LIMIT).await.ok()?;
        read_patroni(&member.node.name, &answer)
    }

    async fn get(&self, url: &Url, limit: Duration) -> Result<Vec<u8>, String> {
        let failed = |error: reqwest::Error| {
            format!("{url}: {}", crate::telemetry::chain(&error.without_url()))
        };
        let request = self.client.get(url.clone()).timeout(limit).send();
        let response =
            request.await.and_then(reqwest::Response::error_for_status).map_err(failed)?;
        let answer = http::body(response, ANSWER_BYTES_MAX).await.map_err(failed)?;
        answer.ok_or_else(|| format!("{url} answers with more than {ANSWER_BYTES_MAX} bytes"))
    }
}

/// Another path of the same server.
fn at(url: &str, path: &str) -> Option<Url> {
    let mut url = Url::parse(url).ok()?;
    url.set_path(path);
    url.set_query(None);
    Some(url)
}
