//! etcd, by each member.

use reqwest::Url;
use shared::etcd::{EtcdConfig, EtcdMember, EtcdSetupError, MemberError};

use super::{Probe, bare};
use crate::facts::{Failure, Stage};

pub use shared::etcd::MemberStatus as EtcdFacts;

/// Asks one member.
#[derive(Debug)]
pub struct EtcdProbe(EtcdMember);

impl EtcdProbe {
    /// A probe of each endpoint, with a name: its host, and its port where hosts are the same.
    ///
    /// # Errors
    ///
    /// Fails when a file that `config` names cannot be used.
    pub fn each(config: &EtcdConfig) -> Result<Vec<(String, Self)>, EtcdSetupError> {
        let probe = |url: &String| EtcdMember::new(config, url).map(Self);
        let probes = config.endpoints.iter().map(probe).collect::<Result<Vec<_>, _>>()?;
        Ok(names(&config.endpoints).into_iter().zip(probes).collect())
    }
}

impl Probe for EtcdProbe {
    type Facts = EtcdFacts;

    async fn ask(&mut self) -> Result<EtcdFacts, Failure> {
        self.0.status().await.map_err(|error| {
            let stage = match error {
                MemberError::Unreachable(_) => Stage::Dial,
                MemberError::NotListening(_) => Stage::Refused,
                MemberError::Tls(_) => Stage::Tls,
                MemberError::Login(_) => Stage::Login,
                MemberError::Refused(_) => Stage::Answer,
            };
            Failure { stage, error: bare(error) }
        })
    }
}

fn names(endpoints: &[String]) -> Vec<String> {
    let host = |url: &String| {
        let url = Url::parse(url).ok()?;
        Some((url.host_str()?.to_owned(), url.port_or_known_default()?))
    };
    let hosts: Vec<_> = endpoints.iter().map(host).collect();
    let is_alone =
        |name: &str| hosts.iter().flatten().filter(|(other, _)| other == name).count() == 1;
    let name = |(host, url): (&Option<(String, u16)>, &String)| match host {
        Some((host, _)) if is_alone(host) => host.clone(),
        Some((host, port)) => format!("{host}:{port}"),
        None => url.clone(),
    };
    hosts.iter().zip(endpoints).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_named_by_its_host_and_by_its_port_if_that_is_not_enough() {
        for (endpoints, expected) in [
            (["http://etcd-1:2379", "http://etcd-2:2379"], ["etcd-1", "etcd-2"]),
            (["https://a:1", "https://a:2"], ["a:1", "a:2"]),
            (["http://[::1]:2379", "http://a"], ["[::1]", "a"]),
        ] {
            assert_eq!(names(&endpoints.map(str::to_owned)), expected);
        }
    }
}
