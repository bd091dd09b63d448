//! HTTP to a server that may hang or lie: straight to it, each question on a new connection, and a bounded
//! answer.

use std::path::Path;

use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Response};

use crate::tls::{self, TlsError};

/// A client that asks whom it is told to ask, and nobody else: through no proxy, and followed nowhere.
/// A kept connection hides that new ones are refused, and may belong to a question given up; so none is.
///
/// With TLS it trusts the certificates in `ca_file`, or the system's. Where nothing is encrypted nobody
/// need be trusted, and no certificates be there.
///
/// # Errors
///
/// The certificates cannot be used.
pub fn client(is_tls: bool, ca_file: Option<&Path>) -> Result<ClientBuilder, TlsError> {
    let builder = if is_tls {
        let tls = tls::client_config(ca_file)?;
        Client::builder().tls_backend_preconfigured((*tls).clone())
    } else {
        Client::builder().tls_certs_only([])
    };
    Ok(builder.no_proxy().redirect(Policy::none()).pool_max_idle_per_host(0))
}

/// Reads what was answered; `None` if that is more than `bytes_max`.
///
/// # Errors
///
/// The answer does not come to its end.
pub async fn body(
    mut answer: Response,
    bytes_max: usize,
) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        body.extend_from_slice(&chunk);
        if bytes_max < body.len() {
            return Ok(None);
        }
    }
    Ok(Some(body))
}
