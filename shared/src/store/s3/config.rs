//! The `[repository.s3]` table.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::config::Problems;

/// A bucket.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3Config {
    /// The bucket's name; it must exist.
    pub bucket: String,
    /// The region; servers that have none take any word.
    #[serde(default = "default_region")]
    pub region: String,
    /// `http(s)://host[:port]` of an S3 server other than AWS.
    pub endpoint: Option<String>,
    /// Ask for `endpoint/bucket/key` instead of `bucket.endpoint/key`; most servers other than
    /// AWS need it.
    #[serde(default)]
    pub path_style: bool,
    /// A PEM file with the certificate authority of the endpoint; system roots otherwise.
    pub ca_file: Option<PathBuf>,
    /// The file with the access key id. Without it: `AWS_…` environment variables, profile, web
    /// identity or the instance's role, in the order the AWS SDK has.
    pub access_key_id_file: Option<PathBuf>,
    /// The file with the secret access key.
    pub secret_access_key_file: Option<PathBuf>,
    /// Server-side encryption asked for on every object: `AES256`, `aws:kms` or `aws:kms:dsse`.
    pub server_side_encryption: Option<String>,
    /// The KMS key for `aws:kms`; the account's default key otherwise.
    pub kms_key_id: Option<String>,
    /// How often one request is tried, the first attempt included.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
    /// Time for one attempt of one request, body included.
    #[serde(default = "default_attempt_timeout", with = "humantime_serde")]
    pub attempt_timeout: Duration,
}

fn default_region() -> String {
    "us-east-1".to_owned()
}

fn default_attempts() -> u32 {
    8
}

fn default_attempt_timeout() -> Duration {
    Duration::from_mins(2)
}

impl S3Config {
    pub(in crate::store) fn check(&self, problems: &mut Problems) {
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        if self.bucket.is_empty() {
            problems.add("repository.s3.bucket", "must not be empty");
        } else if !self.bucket.starts_with("arn:") && !self.bucket.chars().all(plain) {
            problems.add("repository.s3.bucket", "must be letters, digits, dots, -, _ and :");
        }
        if let Some(endpoint) = &self.endpoint {
            let schemes = ["http://", "https://"];
            let is_host = |rest: &str| {
                !rest.is_empty()
                    && !rest.starts_with(['/', ':'])
                    && !rest.contains(char::is_whitespace)
            };
            let problem = match schemes.iter().find_map(|scheme| endpoint.strip_prefix(scheme)) {
                None => Some("must begin with http:// or https://"),
                Some(rest) if !is_host(rest) => Some("must be like https://s3.example.org:9000"),
                Some(_) => None,
            };
            if let Some(problem) = problem {
                problems.add("repository.s3.endpoint", problem);
            }
        }
        if self.access_key_id_file.is_some() != self.secret_access_key_file.is_some() {
            problems.add(
                "repository.s3.access_key_id_file",
                "needs secret_access_key_file beside it, and the other way round",
            );
        }
        if self.ca_file.is_some() && !self.has_tls() {
            problems.add("repository.s3.ca_file", "has no use with an http:// endpoint");
        }
        let has_kms = |sse: &String| sse.starts_with("aws:kms");
        if self.kms_key_id.is_some() && !self.server_side_encryption.as_ref().is_some_and(has_kms) {
            problems.add("repository.s3.kms_key_id", "needs server_side_encryption = \"aws:kms\"");
        }
        if let Some(sse) = &self.server_side_encryption
            && !["AES256", "aws:kms", "aws:kms:dsse"].contains(&sse.as_str())
        {
            problems.add(
                "repository.s3.server_side_encryption",
                "must be AES256, aws:kms or aws:kms:dsse",
            );
        }
        if self.attempts == 0 {
            problems.add("repository.s3.attempts", "must be at least 1");
        }
        if self.attempt_timeout.is_zero() {
            problems.add("repository.s3.attempt_timeout", "must be longer than 0s");
        }
    }

    pub(super) fn has_tls(&self) -> bool {
        self.endpoint.as_ref().is_none_or(|endpoint| endpoint.starts_with("https://"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_a_name_that_stores_take() {
        for (bucket, is_right) in [
            ("backups", true),
            ("Old_Bucket.2-x", true),
            // Ceph's, of another tenant.
            ("tenant:backups", true),
            ("arn:aws:s3:eu-west-1:123456789012:accesspoint/backups", true),
            ("", false),
            ("a/b", false),
            ("A B", false),
        ] {
            let config: S3Config = toml::from_str(&format!("bucket = \"{bucket}\"")).unwrap();
            let mut problems = Problems::default();
            config.check(&mut problems);
            assert_eq!(problems.found().is_empty(), is_right, "{bucket}");
        }
    }

    #[test]
    fn every_broken_rule_is_shown_with_its_key() {
        for (text, expected) in [
            ("", None),
            ("ca_file = \"/ca\"", None),
            ("server_side_encryption = \"aws:kms\"\nkms_key_id = \"k\"", None),
            (
                "endpoint = \"http://s3\"\nca_file = \"/ca\"",
                Some("ca_file: has no use with an http:// endpoint"),
            ),
            ("endpoint = \"https://s3.example.org:9000/path\"", None),
            ("endpoint = \"http://[::1]:9000\"", None),
            ("endpoint = \"http://\"", Some("endpoint: must be like https://s3.example.org:9000")),
            (
                "endpoint = \"http://a b\"",
                Some("endpoint: must be like https://s3.example.org:9000"),
            ),
            ("endpoint = \"s3\"", Some("endpoint: must begin with http:// or https://")),
            (
                "server_side_encryption = \"AES256\"\nkms_key_id = \"k\"",
                Some("kms_key_id: needs server_side_encryption = \"aws:kms\""),
            ),
            (
                "server_side_encryption = \"aes\"",
                Some("server_side_encryption: must be AES256, aws:kms or aws:kms:dsse"),
            ),
            (
                "access_key_id_file = \"/id\"",
                Some(
                    "access_key_id_file: needs secret_access_key_file beside it, and the other \
                     way round",
                ),
            ),
        ] {
            let config: S3Config = toml::from_str(&format!("bucket = \"b\"\n{text}")).unwrap();
            let mut problems = Problems::default();
            config.check(&mut problems);
            let found = problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem));
            let expected = expected.map(|it| format!("repository.s3.{it}"));
            assert_eq!(found.collect::<Vec<_>>(), Vec::from_iter(expected), "{text}");
        }
    }
}
