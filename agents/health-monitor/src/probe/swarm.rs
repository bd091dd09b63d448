//! Swarm services, by the Docker socket.

use std::collections::BTreeMap;

use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::http::{self, Http, wrong};
use super::{Probe, SetupError};
use crate::config::SwarmConfig;
use crate::facts::Failure;

/// The label by which `docker stack deploy` marks what it makes.
const STACK_LABEL: &str = "com.docker.stack.namespace";

/// A service of the stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name without the stack's.
    pub name: String,
    /// Tasks that run.
    pub running: u32,
    /// Tasks that should, or have done so and ended well where they are not started again.
    pub desired: u32,
    /// Tasks that have done what they should, and are not started again.
    pub done: u32,
    /// What the newest task that failed said; asked only where tasks are missing.
    pub error: Option<String>,
}

/// The services of the stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwarmFacts {
    /// All of them but jobs, which end; by name.
    pub services: Vec<Service>,
}

/// Asks one Docker engine, which must be a manager.
#[derive(Debug)]
pub struct SwarmProbe {
    http: Http,
    stack: String,
    services: Url,
    tasks: Url,
}

impl SwarmProbe {
    /// A probe of the stack. Nobody is asked yet.
    ///
    /// # Errors
    ///
    /// Fails when there is no client.
    pub fn new(config: &SwarmConfig) -> Result<Self, SetupError> {
        let filters = json!({ "label": [format!("{STACK_LABEL}={}", config.stack)] }).to_string();
        // Without a version in the path, as no version is known to all engines.
        let at = |path: &str, more: &[(&str, &str)]| {
            let mut url = http::address(&format!("http://docker/{path}"), "swarm.socket")?;
            url.query_pairs_mut().append_pair("filters", &filters).extend_pairs(more);
            Ok(url)
        };
        Ok(Self {
            http: Http::socket(&config.socket, "swarm")?,
            stack: config.stack.clone(),
            services: at("services", &[("status", "true")])?,
            tasks: at("tasks", &[])?,
        })
    }

    async fn get<T: DeserializeOwned>(&self, url: &Url) -> Result<T, Failure> {
        let page = self.http.get(url.clone(), None).await?;
        if page.status != StatusCode::OK {
            let said: Refusal = page.json()?;
            return Err(wrong(format!("Docker says {}: {}", page.status, said.message)));
        }
        page.json()
    }
}

impl Probe for SwarmProbe {
    type Facts = SwarmFacts;

    async fn ask(&mut self) -> Result<SwarmFacts, Failure> {
        let services: Vec<ApiService> = self.get(&self.services).await?;
        let is_short = |it: &ApiService| it.status.as_ref().is_some_and(ApiStatus::is_short);
        // All tasks of the last hours: only asked for where there is something to explain.
        let tasks: Vec<ApiTask> =
            if services.iter().any(is_short) { self.get(&self.tasks).await? } else { Vec::new() };
        Ok(SwarmFacts { services: read(&self.stack, services, &tasks) })
    }
}

/// Source: Docker Engine API 1.41, `GET /services`; `ServiceStatus` is new in it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiService {
    #[serde(rename = "ID")]
    id: String,
    spec: ApiSpec,
    #[serde(rename = "ServiceStatus")]
    status: Option<ApiStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiSpec {
    name: String,
    #[serde(default)]
    mode: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    task_template: ApiTemplate,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiTemplate {
    #[serde(default)]
    restart_policy: ApiRestart,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiRestart {
    /// `any` if it is not there.
    #[serde(default)]
    condition: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiStatus {
    running_tasks: u32,
    desired_tasks: u32,
}

impl ApiStatus {
    fn is_short(&self) -> bool {
        self.running_tasks < self.desired_tasks
    }
}

/// Source: Docker Engine API 1.41, `GET /tasks`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiTask {
    #[serde(rename = "ServiceID")]
    service: String,
    status: ApiTaskStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiTaskStatus {
    #[serde(default)]
    state: String,
    /// RFC 3339 in UTC, with nine digits at most: sorts as text but for the digits left out.
    #[serde(default)]
    timestamp: String,
    #[serde(default)]
    err: String,
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

fn read(stack: &str, services: Vec<ApiService>, tasks: &[ApiTask]) -> Vec<Service> {
    let is_job = |it: &ApiService| it.spec.mode.keys().any(|mode| mode.ends_with("Job"));
    let mut read: Vec<_> = services
        .into_iter()
        .filter(|it| !is_job(it))
        .filter_map(|service| {
            let status = service.status?;
            let ours = tasks.iter().filter(|it| it.service == service.id).map(|it| &it.status);
            let mut ours: Vec<&ApiTaskStatus> = ours.collect();
            ours.sort_by(|a, b| b.timestamp.cmp(&a.timestamp));
            let newest = ours.iter().find(|it| !it.err.is_empty());
            let once = ["none", "on-failure"];
            let done = ours.iter().take(status.desired_tasks as usize);
            let done = match service.spec.task_template.restart_policy.condition.as_str() {
                it if once.contains(&it) => done.filter(|it| it.state == "complete").count(),
                _ => 0,
            };
            let name = service.spec.name;
            let short = name.strip_prefix(stack).and_then(|it| it.strip_prefix('_'));
            Some(Service {
                name: short.unwrap_or(&name).to_owned(),
                running: status.running_tasks,
                desired: status.desired_tasks,
                done: u32::try_from(done).unwrap_or(u32::MAX),
                error: newest.filter(|_| status.is_short()).map(|it| it.err.clone()),
            })
        })
        .collect();
    read.sort_by(|one, other| one.name.cmp(&other.name));
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_with_the_newest_error_where_tasks_are_missing() {
        let services = r#"[
            {"ID": "s2", "Spec": {"Name": "mesh_postgres", "Mode": {"Replicated": {"Replicas": 3}}},
             "ServiceStatus": {"RunningTasks": 2, "DesiredTasks": 3, "CompletedTasks": 0}},
            {"ID": "s1", "Spec": {"Name": "mesh_etcd", "Mode": {"Global": {}}},
             "ServiceStatus": {"RunningTasks": 3, "DesiredTasks": 3}},
            {"ID": "s3", "Spec": {"Name": "mesh_setup", "Mode": {"ReplicatedJob": {}}},
             "ServiceStatus": {"RunningTasks": 0, "DesiredTasks": 1}},
            {"ID": "s4", "Spec": {"Name": "mesh_init", "Mode": {"Replicated": {"Replicas": 3}},
                                  "TaskTemplate": {"RestartPolicy": {"Condition": "none"}}},
             "ServiceStatus": {"RunningTasks": 0, "DesiredTasks": 3}}]"#;
        let tasks = r#"[
            {"ServiceID": "s2", "Status": {"Timestamp": "2026-11-21T14:00:00.5Z", "State": "failed", "Err": "task: non-zero exit (1)"}},
            {"ServiceID": "s2", "Status": {"Timestamp": "2026-11-21T14:00:01Z", "State": "rejected", "Err": "No such image"}},
            {"ServiceID": "s2", "Status": {"Timestamp": "2026-11-21T14:00:02Z", "State": "running"}},
            {"ServiceID": "s4", "Status": {"Timestamp": "2026-11-21T13:00:00Z", "State": "complete"}},
            {"ServiceID": "s4", "Status": {"Timestamp": "2026-11-21T14:00:00Z", "State": "complete"}},
            {"ServiceID": "s4", "Status": {"Timestamp": "2026-11-21T14:00:00Z", "State": "complete"}},
            {"ServiceID": "s4", "Status": {"Timestamp": "2026-11-21T14:00:00Z", "State": "failed", "Err": "exit (1)"}},
            {"ServiceID": "s1", "Status": {"Timestamp": "2026-11-21T14:00:02Z", "Err": "long ago"}}]"#;
        let services = serde_json::from_str(services).unwrap();
        let tasks: Vec<ApiTask> = serde_json::from_str(tasks).unwrap();
        let service = |name: &str, running, done, error: Option<&str>| Service {
            name: name.to_owned(),
            running,
            desired: 3,
            done,
            error: error.map(str::to_owned),
        };
        assert_eq!(
            read("mesh", services, &tasks),
            [
                service("etcd", 3, 0, None),
                service("init", 0, 2, Some("exit (1)")),
                service("postgres", 2, 0, Some("No such image")),
            ]
        );
    }
}
