//! The one rustls client configuration.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use thiserror::Error;

/// Why there is no TLS client configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The certificate file could not be read or is no PEM.
    #[error("read CA certificates from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        source: rustls_pki_types::pem::Error,
    },
    /// A certificate cannot serve as a root.
    #[error("use CA certificate {position} of {}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Which certificate of the file, from 1.
        position: usize,
        /// What was wrong.
        source: rustls::Error,
    },
    /// The file holds no certificate.
    #[error("{} holds no CA certificate", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has no root certificates.
    #[error("the system has no root certificates; install ca-certificates or set ca_file")]
    NoSystemRoots {
        /// The first thing that went wrong, if anything did.
        source: Option<io::Error>,
    },
    /// The crypto provider does not support the protocol versions.
    #[error("set up TLS")]
    Protocol {
        /// What was wrong.
        source: rustls::Error,
    },
}

/// Makes aws-lc-rs the crypto provider of this process. Call it first in `main`.
///
/// The configurations made here name their provider; this is for libraries that ask for the
/// process's default, and would panic if a second provider were ever linked in.
pub fn install_provider() {
    // Fails only when one is installed already, as in tests that share a process.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
}

/// Returns a client configuration that trusts the certificates in `ca_file`, or the operating
/// system's roots if there is none.
///
/// The server's certificate is always verified, its name included: what libpq calls
/// `verify-full`. TLS 1.2 and 1.3.
///
/// # Errors
///
/// Fails when the certificates cannot be read or there are none.
pub fn client_config(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = match ca_file {
        Some(path) => roots_from_file(path)?,
        None => system_roots()?,
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsError::Protocol { source })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn roots_from_file(path: &Path) -> Result<RootCertStore, TlsError> {
    let unreadable = |source| TlsError::Read { path: path.to_owned(), source };
    let mut roots = RootCertStore::empty();
    for (index, certificate) in CertificateDer::pem_file_iter(path).map_err(unreadable)?.enumerate()
    {
        roots.add(certificate.map_err(unreadable)?).map_err(|source| TlsError::Unusable {
            path: path.to_owned(),
            position: index + 1,
            source,
        })?;
    }
    if roots.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned() });
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Systems ship the odd certificate that nothing can use; the others still count.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let source = found.errors.into_iter().next().map(io::Error::other);
        return Err(TlsError::NoSystemRoots { source });
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::chain;

    #[test]
    fn what_holds_no_certificate_is_refused_by_file_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.crt");
        std::fs::write(&path, "not a certificate\n").unwrap();
        let message = client_config(Some(&path)).unwrap_err().to_string();
        assert_eq!(message, format!("{} holds no CA certificate", path.display()));

        let absent = client_config(Some(Path::new("/nonexistent/ca.crt"))).unwrap_err();
        let message = chain(&absent).to_string();
        assert!(
            message.starts_with("read CA certificates from /nonexistent/ca.crt: "),
            "{message}"
        );
        assert!(message.contains("No such file"), "{message}");
    }

    #[test]
    fn the_provider_may_be_installed_twice() {
        install_provider();
        install_provider();
    }
}
