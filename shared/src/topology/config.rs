//! The keys that say which nodes there are: `[etcd]`, `[patroni]` and `[[nodes]]`.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::PathBuf;

use serde::Deserialize;

use crate::config::{Check, Problems};
use crate::etcd::EtcdConfig;
use crate::pg::Node;

/// The `[patroni]` table: the nodes are the members of a Patroni cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatroniConfig {
    /// Patroni's `scope`, without the group: the cluster's name.
    pub scope: String,
    /// Patroni's `namespace`: where its keys begin in etcd.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// Members to ask when etcd does not answer, besides those that were known before.
    #[serde(default)]
    pub rest: Vec<RestConfig>,
    /// PEM certificates to trust for Patroni's REST API, in place of the system's.
    pub ca_file: Option<PathBuf>,
}

/// One entry of `[[patroni.rest]]`: the REST API of a member.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestConfig {
    /// The member's Citus group, which the API does not tell. 0 without Citus.
    #[serde(default)]
    pub group: u32,
    /// Where it answers: `http://postgres-1:8008`.
    pub url: String,
}

fn default_namespace() -> String {
    "/service/".to_owned()
}

impl PatroniConfig {
    /// Where the cluster's keys begin: `/service/demo/`.
    ///
    /// Source: `AbstractDCS.__init__` in Patroni's `dcs/__init__.py`.
    pub fn root(&self) -> String {
        format!("/{}/{}/", self.namespace.trim_matches('/'), self.scope)
    }
}

/// What a configuration says about its nodes.
#[derive(Clone, Copy, Debug)]
pub struct TopologyConfig<'a> {
    /// The table `[etcd]`.
    pub etcd: Option<&'a EtcdConfig>,
    /// The table `[patroni]`.
    pub patroni: Option<&'a PatroniConfig>,
    /// The tables `[[nodes]]`.
    pub nodes: &'a [Node],
}

impl Check for TopologyConfig<'_> {
    fn check(&self, problems: &mut Problems) {
        if let Some(etcd) = self.etcd {
            problems.within("etcd", |problems| etcd.check(problems));
        }
        let Some(patroni) = self.patroni else {
            return check_nodes(self.nodes, problems);
        };
        if !self.nodes.is_empty() {
            problems.add("nodes", "must not be listed beside [patroni], which knows them");
        }
        problems.within("patroni", |problems| {
            if self.etcd.is_none() && patroni.rest.is_empty() {
                problems.add("", "needs [etcd], or members to ask in [[patroni.rest]]");
            }
            if patroni.scope.is_empty() || patroni.scope.contains('/') {
                problems.add("scope", "must be the name of a cluster");
            }
            if patroni.namespace.trim_matches('/').is_empty() {
                problems.add("namespace", "must not be empty");
            }
            for (index, rest) in patroni.rest.iter().enumerate() {
                if !rest.url.starts_with("http://") && !rest.url.starts_with("https://") {
                    let problem = format!("`{}` must begin with http:// or https://", rest.url);
                    problems.add(&format!("rest[{index}].url"), problem);
                }
            }
        });
    }
}

/// The numbers of the groups that `nodes` belong to, ascending.
pub fn groups(nodes: &[Node]) -> BTreeSet<u32> {
    nodes.iter().map(|node| node.group).collect()
}

/// Adds what is wrong with the configured `nodes` to `problems`, under the key `nodes`.
pub fn check_nodes(nodes: &[Node], problems: &mut Problems) {
    if nodes.is_empty() {
        problems.add("nodes", "must list at least one server");
    }
    for (index, node) in nodes.iter().enumerate() {
        problems.within(&format!("nodes[{index}]"), |problems| {
            for (key, value) in [("name", &node.name), ("host", &node.host)] {
                if value.is_empty() {
                    problems.add(key, "must not be empty");
                }
                if value.contains(char::is_control) {
                    problems.add(key, "must not have control characters");
                }
            }
            if node.host.starts_with('[') {
                problems.add("host", "must be an IPv6 address without brackets");
            } else if has_port(node) {
                let problem = format!("`{}` is no IPv6 address; a port belongs in port", node.host);
                problems.add("host", problem);
            }
            if node.port == 0 {
                problems.add("port", "must not be 0");
            }
            let before = nodes.iter().take(index);
            if before.clone().any(|other| other.name == node.name) {
                problems.add("name", format!("`{}` is used twice", node.name));
            }
            if before.clone().any(|other| other.host == node.host && other.port == node.port) {
                problems.add("host", format!("{}:{} is listed twice", node.host, node.port));
            }
        });
    }
}

/// Whether there is a `:` in a host that is no address, such as `10.0.0.1:5432`.
fn has_port(node: &Node) -> bool {
    // Without the zone: `fe80::1%eth0`.
    let address = node.host.split('%').next().unwrap_or_default();
    !node.is_local() && address.contains(':') && address.parse::<Ipv6Addr>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, host: &str, port: u16) -> Node {
        Node { group: 0, name: name.to_owned(), host: host.to_owned(), port }
    }

    #[test]
    fn the_list_of_nodes_is_checked() {
        let mut problems = Problems::default();
        check_nodes(&[], &mut problems);
        let twice = [
            node("a", "x", 5432),
            node("a", "x", 5432),
            node("", "", 0),
            node("d", "[::1]", 1),
            node("e\n", "10.0.0.1:5432", 1),
            node("f", "fe80::1%eth0", 1),
            node("g", "/run/a:b", 1),
        ];
        check_nodes(&twice, &mut problems);
        let found: Vec<_> =
            problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect();
        assert_eq!(
            found,
            [
                "nodes: must list at least one server",
                "nodes[1].name: `a` is used twice",
                "nodes[1].host: x:5432 is listed twice",
                "nodes[2].name: must not be empty",
                "nodes[2].host: must not be empty",
                "nodes[2].port: must not be 0",
                "nodes[3].host: must be an IPv6 address without brackets",
                "nodes[4].name: must not have control characters",
                "nodes[4].host: `10.0.0.1:5432` is no IPv6 address; a port belongs in port",
            ]
        );
    }

    #[derive(Deserialize)]
    struct Tables {
        etcd: Option<EtcdConfig>,
        patroni: Option<PatroniConfig>,
        #[serde(default)]
        nodes: Vec<Node>,
    }

    #[test]
    fn nodes_come_from_the_list_or_from_patroni() {
        let etcd = "[etcd]\nendpoints = [\"http://e:2379\"]\n";
        let nodes = "[[nodes]]\nname = \"a\"\nhost = \"a\"\n";
        let patroni = "[patroni]\nscope = \"demo\"\n";
        let rest = "[[patroni.rest]]\nurl = \"http://a:8008\"\n";
        for (case, text, expected) in [
            ("the list alone", nodes.to_owned(), vec![]),
            ("the list, and etcd for leases", format!("{nodes}{etcd}"), vec![]),
            ("Patroni by etcd", format!("{patroni}{etcd}"), vec![]),
            ("Patroni by its REST API", format!("{patroni}{rest}"), vec![]),
            ("nothing", String::new(), vec!["nodes: must list at least one server"]),
            (
                "both",
                format!("{nodes}{patroni}{etcd}"),
                vec!["nodes: must not be listed beside [patroni], which knows them"],
            ),
            (
                "Patroni by nothing",
                patroni.to_owned(),
                vec!["patroni: needs [etcd], or members to ask in [[patroni.rest]]"],
            ),
            (
                "wrong values",
                "[patroni]\nscope = \"a/b\"\nnamespace = \"/\"\n[[patroni.rest]]\n\
                 url = \"a:8008\"\n[etcd]\nendpoints = []\n"
                    .to_owned(),
                vec![
                    "etcd.endpoints: must list at least one address",
                    "patroni.scope: must be the name of a cluster",
                    "patroni.namespace: must not be empty",
                    "patroni.rest[0].url: `a:8008` must begin with http:// or https://",
                ],
            ),
        ] {
            let Tables { etcd, patroni, nodes } = toml::from_str(&text).unwrap();
            let config =
                TopologyConfig { etcd: etcd.as_ref(), patroni: patroni.as_ref(), nodes: &nodes };
            let mut problems = Problems::default();
            config.check(&mut problems);
            let found: Vec<_> =
                problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn keys_begin_with_namespace_and_scope_as_patroni_joins_them() {
        for (namespace, expected) in
            [("/service/", "/service/demo/"), ("db", "/db/demo/"), ("/a/b", "/a/b/demo/")]
        {
            let [scope, namespace] = ["demo", namespace].map(str::to_owned);
            let config = PatroniConfig { scope, namespace, rest: vec![], ca_file: None };
            assert_eq!(config.root(), expected);
        }
    }
}
