//! Where an S3 server answers, and how an agent is told.

use std::env;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use reqwest::Url;

use crate::program::give_to_server_user;
use crate::skip::Skip;

/// One bucket of an S3 server, and the credentials for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Endpoint {
    /// `http://host:port`.
    pub url: String,
    /// The bucket's name.
    pub bucket: String,
    /// The access key id.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: String,
}

impl S3Endpoint {
    /// The same bucket by way of another address, such as a proxy's.
    pub fn through(&self, address: SocketAddr) -> Self {
        Self { url: format!("http://{address}"), ..self.clone() }
    }

    /// The section `[repository.s3]` of an agent's configuration. Writes the two files with the
    /// credentials it names into `directory`.
    pub fn config(&self, directory: &Path) -> String {
        let file = |name: &str, content: &str| {
            let path = directory.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            give_to_server_user(&path);
            path.display().to_string()
        };
        let id = file("s3_access_key_id", &self.access_key_id);
        let secret = file("s3_secret_access_key", &self.secret_access_key);
        let Self { url, bucket, .. } = self;
        format!(
            "[repository.s3]\nendpoint = \"{url}\"\nregion = \"us-east-1\"\n\
             bucket = \"{bucket}\"\npath_style = true\n\
             access_key_id_file = \"{id}\"\nsecret_access_key_file = \"{secret}\"\n"
        )
    }

    /// Reads `http://key:secret@host:port/bucket` from an environment variable.
    pub(super) fn from_variable(variable: &str, server: &str) -> Result<Self, Skip> {
        let value = env::var(variable)
            .map_err(|_| Skip(format!("no {server} to test against ({variable} is not set)")))?;
        let endpoint = Self::parse(&value);
        Ok(endpoint
            .unwrap_or_else(|| panic!("{variable} must be http://key:secret@host:port/bucket")))
    }

    fn parse(value: &str) -> Option<Self> {
        let url = Url::parse(value).ok()?;
        let bucket = url.path().trim_matches('/').to_owned();
        let host = url.host_str()?;
        let port = url.port_or_known_default()?;
        let secret_access_key = url.password()?.to_owned();
        (!bucket.is_empty()).then(|| Self {
            url: format!("{}://{host}:{port}", url.scheme()),
            bucket,
            access_key_id: url.username().to_owned(),
            secret_access_key,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_from_one_url() {
        let expected = S3Endpoint {
            url: "http://127.0.0.1:5000".to_owned(),
            bucket: "tests".to_owned(),
            access_key_id: "key".to_owned(),
            secret_access_key: "secret".to_owned(),
        };
        assert_eq!(S3Endpoint::parse("http://key:secret@127.0.0.1:5000/tests"), Some(expected));
        for value in ["", "127.0.0.1:5000", "http://key:secret@127.0.0.1:5000/", "http://h:1/b"] {
            assert_eq!(S3Endpoint::parse(value), None, "{value:?}");
        }
    }
}
