//! The metadata service of an instance (version 2) and of a container, which hands out the
//! credentials of a role.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, put};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::background::Background;
use crate::s3::endpoint::S3Endpoint;

/// What a session must say to be given credentials.
const TOKEN: &str = "token-of-the-tests";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TOKEN_TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// A metadata service. Dropping it ends it.
#[derive(Debug)]
pub struct MetadataService {
    address: SocketAddr,
    role: Arc<Mutex<Role>>,
    _background: Background,
}

/// What is handed out.
#[derive(Clone, Debug)]
struct Role {
    access_key_id: String,
    secret_access_key: String,
    valid: Duration,
    handed_out: usize,
}

impl MetadataService {
    /// Starts a service that hands out the endpoint's credentials, each time `valid` for so long.
    pub async fn start(endpoint: &S3Endpoint, valid: Duration) -> Self {
        let role = Arc::new(Mutex::new(Role {
            access_key_id: endpoint.access_key_id.clone(),
            secret_access_key: endpoint.secret_access_key.clone(),
            valid,
            handed_out: 0,
        }));
        let routes = Router::new()
            .route("/latest/api/token", put(async || ([(TOKEN_TTL_HEADER, "21600")], TOKEN)))
            .route(ROLES, get(async || "pgmesh-tests"))
            .route(&format!("{ROLES}pgmesh-tests"), get(of_instance))
            .route("/container", get(of_container))
            .with_state(Arc::clone(&role));
        let background = Background::new("metadata");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = background.run(TcpListener::bind(any_port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        background.spawn(|stop| async move {
            stop.run_until_cancelled(axum::serve(listener, routes).into_future()).await;
        });
        Self { address, role, _background: background }
    }

    /// The environment variable by which an instance's service is found elsewhere than usual.
    pub fn instance_variable(&self) -> (&'static str, String) {
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{}", self.address))
    }

    /// The environment variable that a container with a role has.
    pub fn container_variable(&self) -> (&'static str, String) {
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{}/container", self.address))
    }

    /// Hands out another secret from now on.
    pub fn rotate(&self, secret_access_key: &str) {
        secret_access_key.clone_into(&mut self.role.lock().unwrap().secret_access_key);
    }

    /// How often credentials were handed out.
    pub fn handed_out(&self) -> usize {
        self.role.lock().unwrap().handed_out
    }
}

async fn of_instance(state: State<Arc<Mutex<Role>>>, headers: HeaderMap) -> impl IntoResponse {
    if headers.get(TOKEN_HEADER).is_none_or(|token| token != TOKEN) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    of_container(state).await.into_response()
}

async fn of_container(State(role): State<Arc<Mutex<Role>>>) -> Json<Value> {
    let mut role = role.lock().unwrap();
    role.handed_out += 1;
    let ends: DateTime<Utc> = Utc::now() + role.valid;
    Json(json!({
        "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z",
        "AccessKeyId": role.access_key_id, "SecretAccessKey": role.secret_access_key,
        "Token": "session-of-the-tests", "Expiration": ends.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
    }))
}
