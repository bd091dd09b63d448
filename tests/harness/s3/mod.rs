//! An S3 server in this process: `s3s-fs` behind a layer that adds what it lacks, and faults.
//!
//! Objects are plain files below a directory, so a test can look at them and damage them without
//! the server's help.

mod body;
mod checksum;
pub mod disk;
pub mod endpoint;
pub mod faults;
mod service;
mod storage;

use std::net::SocketAddr;
use std::path::Path;

use tempfile::TempDir;

use crate::background::Background;
use crate::skip::Skip;

pub use disk::{Bucket, UnfinishedUpload};
use endpoint::S3Endpoint;
use faults::{Faults, Operation};
pub use service::{Service, serve};

const BUCKET: &str = "pgmesh-tests";
const ACCESS_KEY_ID: &str = "pgmesh-tests-key";
const SECRET_ACCESS_KEY: &str = "pgmesh-tests-secret";
/// `http://key:secret@host:port/bucket` of a running moto.
const MOTO_VARIABLE: &str = "PGMESH_TEST_MOTO";
/// `http://key:secret@host:port/bucket` of a running Garage.
const GARAGE_VARIABLE: &str = "PGMESH_TEST_GARAGE";

/// An S3 server with one bucket. Dropping it ends it and removes its files.
#[derive(Debug)]
pub struct S3Server {
    endpoint: S3Endpoint,
    address: SocketAddr,
    faults: Faults,
    bucket: Bucket,
    _background: Background,
    _directory: TempDir,
}

impl S3Server {
    /// Starts a server on a free port of 127.0.0.1, with an empty bucket.
    pub async fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("pgm-s3-").tempdir().unwrap();
        let faults = Faults::recording();
        let service = Service {
            directory: directory.path().to_owned(),
            bucket: BUCKET.to_owned(),
            access_key_id: ACCESS_KEY_ID.to_owned(),
            secret_access_key: SECRET_ACCESS_KEY.to_owned(),
            faults: faults.clone(),
        };
        let background = Background::new("s3-server");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = background.run(tokio::net::TcpListener::bind(any_port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let bucket = Bucket::new(directory.path(), BUCKET);
        background.spawn(|stop| async move { serve(listener, &service, stop).await.unwrap() });
        let endpoint = S3Endpoint {
            url: format!("http://{address}"),
            bucket: BUCKET.to_owned(),
            access_key_id: ACCESS_KEY_ID.to_owned(),
            secret_access_key: SECRET_ACCESS_KEY.to_owned(),
        };
        Self { endpoint, address, faults, bucket, _background: background, _directory: directory }
    }

    /// Where and with which credentials it answers.
    pub fn endpoint(&self) -> &S3Endpoint {
        &self.endpoint
    }

    /// The address it listens on, to put a [`Proxy`](crate::Proxy) in front.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What goes wrong, and what was asked.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The objects as files, without HTTP.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    /// The directory whose files are the objects, named as their keys.
    pub fn directory(&self) -> &Path {
        self.bucket.directory()
    }

    /// How often `operation` was asked for, refused requests included.
    pub fn requests(&self, operation: Operation) -> u64 {
        self.faults.requests(operation)
    }
}

/// The moto server that `PGMESH_TEST_MOTO` names; otherwise reports the test as skipped.
pub fn moto_endpoint() -> Option<S3Endpoint> {
    S3Endpoint::from_variable(MOTO_VARIABLE, "moto").inspect_err(Skip::report).ok()
}

/// The Garage server that `PGMESH_TEST_GARAGE` names; otherwise reports the test as skipped.
pub fn garage_endpoint() -> Option<S3Endpoint> {
    S3Endpoint::from_variable(GARAGE_VARIABLE, "Garage").inspect_err(Skip::report).ok()
}
