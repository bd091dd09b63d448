//! An S3 server with one bucket on a fixed address, for the demonstration stack and for tests in
//! containers: `s3s-fs` with what it lacks. Not for data anybody wants to keep.

use std::env;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use harness::Faults;
use harness::s3::{Service, serve};
use shared::secret::Secret;
use shared::shutdown;
use shared::telemetry::{self, Format, Output, chain};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// Serves one S3 bucket from a directory.
#[derive(Debug, Parser)]
struct Arguments {
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// Where the objects are kept
    #[arg(long, value_name = "DIRECTORY")]
    directory: PathBuf,
    /// The bucket, made if it is not there
    #[arg(long, value_name = "NAME", default_value = "pgmesh")]
    bucket: String,
    /// The access key id [default: the variable `S3_ACCESS_KEY_ID`]
    #[arg(long, value_name = "ID")]
    access_key_id: Option<String>,
    /// A file with the access key id
    #[arg(long, value_name = "FILE", conflicts_with = "access_key_id")]
    access_key_id_file: Option<PathBuf>,
    /// The secret access key [default: the variable `S3_SECRET_ACCESS_KEY`]
    #[arg(long, value_name = "SECRET")]
    secret_access_key: Option<String>,
    /// A file with the secret access key
    #[arg(long, value_name = "FILE", conflicts_with = "secret_access_key")]
    secret_access_key_file: Option<PathBuf>,
    /// How log lines are written [default: text on a terminal, json otherwise]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<Format>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    telemetry::init(arguments.log_format, Output::Stdout);
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = %chain(error.as_ref()), "server failed");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let stopped = shutdown::signalled().context("install signal handlers")?;
    let Arguments { listen, directory, bucket, .. } = arguments;
    let id_file = arguments.access_key_id_file.as_deref();
    let access_key_id = credential(arguments.access_key_id, id_file, "S3_ACCESS_KEY_ID")?;
    let secret_file = arguments.secret_access_key_file.as_deref();
    let secret_access_key =
        credential(arguments.secret_access_key, secret_file, "S3_SECRET_ACCESS_KEY")?;

    let service = Service {
        directory: directory.clone(),
        bucket: bucket.clone(),
        access_key_id: access_key_id.expose().to_owned(),
        secret_access_key: secret_access_key.expose().to_owned(),
        faults: Faults::default(),
    };
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let address = listener.local_addr().context("ask for the address")?;
    info!(%address, directory = %directory.display(), bucket, "server started");

    let stop = CancellationToken::new();
    let mut served = pin!(serve(listener, &service, stop.clone()));
    let ended = tokio::select! {
        // Only an error ends it before it is asked to end.
        ended = served.as_mut() => ended,
        signal = stopped => {
            info!(signal, "shutdown requested");
            stop.cancel();
            served.await
        }
    };
    ended.with_context(|| format!("serve {}", directory.display()))
}

/// A credential from the command line, a file, or the environment, in this order.
fn credential(given: Option<String>, file: Option<&Path>, name: &str) -> anyhow::Result<Secret> {
    if let Some(value) = given {
        return Ok(Secret::new(value));
    }
    if let Some(path) = file {
        return Ok(Secret::read(path)?);
    }
    let value =
        env::var(name).with_context(|| format!("no credential: give an option or {name}"))?;
    Ok(Secret::new(value))
}
