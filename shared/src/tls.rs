//! The one rustls client configuration, and what to do about a handshake that failed.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, InvalidMessage, RootCertStore};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

use crate::secret::Secret;

/// Why there is no TLS client configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The certificate file could not be read or is no PEM.
    #[error("read CA certificates from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        source: pem::Error,
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
    /// Our own certificate cannot be used.
    #[error("use the certificate in {} with its key", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        source: rustls::Error,
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

/// Checks that a file holds a certificate of ours, and `key` is its private key, both PEM.
///
/// # Errors
///
/// Fails when one of them cannot be read, or they do not belong together.
pub fn check_identity(path: &Path, key: &Secret) -> Result<(), TlsError> {
    let unusable = |source| TlsError::Identity { path: path.to_owned(), source };
    let unreadable = |error: pem::Error| unusable(rustls::Error::General(error.to_string()));
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(unreadable)?;
    if certificates.is_empty() {
        return Err(unreadable(pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes()).map_err(unreadable)?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(certificates, key, &provider).map(drop).map_err(unusable)
}

/// What the alerts mean that a server sends when it wants to know who we are.
const CERTIFICATE_WANTED: &str =
    "the server asks for a certificate of ours that it trusts, see certificate_file and key_file";

/// Says why the two sides will not come to speak TLS, and what to do about it, if that is why a
/// connection failed. Trying again at once does not help then.
pub fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // An `io::Error` names what is below what it wraps as its source, not what it wraps.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(wrapped) = wrapped
            && let Some(text) = explain(wrapped)
        {
            return Some(text);
        }
        if let Some(text) = error.downcast_ref().and_then(explain_rustls) {
            return Some(text);
        }
        // Some libraries pass on no more than the words.
        let said = error.to_string();
        if let Some((_, alert)) = said.split_once("received fatal alert: ")
            && ["CertificateRequired", "BadCertificate", "UnknownCA"].contains(&alert)
        {
            return Some(format!("{CERTIFICATE_WANTED}: {said}"));
        }
        next = error.source();
    }
    None
}

fn explain_rustls(error: &rustls::Error) -> Option<String> {
    use CertificateError as Bad;
    use rustls::Error::InvalidCertificate;

    Some(match error {
        // A bad signature is that of an authority with the same name and another key.
        InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "the server's certificate is signed by an unknown CA, expected one from ca_file or the \
             system's roots"
                .to_owned()
        }
        InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            format!("the server's certificate must be renewed, or a clock is wrong: {error}")
        }
        InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            format!("the server's certificate is not valid yet, or a clock is wrong: {error}")
        }
        InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            format!(
                "the server's certificate does not name the host that the address does: {error}"
            )
        }
        InvalidCertificate(_) => format!("the server's certificate cannot be used: {error}"),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the server does not speak TLS at this port; is the address http:// rather than \
             https://?"
                .to_owned()
        }
        _ => return None,
    })
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
