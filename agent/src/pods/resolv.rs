//! resolv.conf: the node's own is read, the pod's is composed (Kubernetes, "DNS for Services and Pods").

use std::net::IpAddr;
use std::path::Path;

use k8s_openapi::api::core::v1::PodSpec;
use mesh_cri::v1::DnsConfig;

use super::RunnerOptions;

/// What glibc reads of a resolv.conf at most.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
/// Where systemd-resolved says which servers it asks itself (systemd-resolved(8)).
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// The parts of a resolv.conf (resolv.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    pub(crate) servers: Vec<String>,
    pub(crate) searches: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl ResolvConf {
    /// The node's configuration, as it is of use in a pod: where the node asks a server of its own that answers nobody else, the
    /// servers behind that one.
    pub(crate) async fn of_node(path: &Path) -> Self {
        Self::of_files(path, Path::new(BEHIND_STUB)).await
    }

    async fn of_files(path: &Path, behind: &Path) -> Self {
        let read = async |path: &Path| tokio::fs::read_to_string(path).await.unwrap_or_default();
        let own = Self::parse(&read(path).await);
        let is_stub = |server: &String| server.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        if own.servers.is_empty() || !own.servers.iter().all(is_stub) {
            return own;
        }
        let behind = Self::parse(&read(behind).await);
        if behind.servers.is_empty() { own } else { behind }
    }

    /// Reads the file's text; lines that mean nothing are skipped.
    pub(crate) fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let key = words.next();
            let words = words.map(str::to_owned);
            match key {
                Some("nameserver") => conf.servers.extend(words.take(1)),
                // The last `search` or `domain` line wins.
                Some("search" | "domain") => conf.searches = words.collect(),
                Some("options") => conf.options.extend(words),
                _ => {}
            }
        }
        conf
    }
}

/// The DNS configuration of a pod in that namespace.
pub(crate) fn pod_dns(
    spec: &PodSpec,
    namespace: &str,
    options: &RunnerOptions,
    host: &ResolvConf,
) -> DnsConfig {
    let host_network = spec.host_network == Some(true);
    let mut dns = match spec.dns_policy.as_deref() {
        Some("None") => DnsConfig::default(),
        Some("Default") => of_host(host),
        Some("ClusterFirstWithHostNet") => of_cluster(namespace, options, host),
        _ if host_network || options.dns_servers.is_empty() => of_host(host),
        _ => of_cluster(namespace, options, host),
    };
    if let Some(own) = &spec.dns_config {
        dns.servers.extend(own.nameservers.clone().unwrap_or_default());
        dns.searches.extend(own.searches.clone().unwrap_or_default());
        for option in own.options.iter().flatten() {
            let Some(name) = option.name.as_deref() else { continue };
            // A later option replaces an earlier one of the same name.
            dns.options.retain(|o| o.split(':').next() != Some(name));
            dns.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            });
        }
    }
    unique(&mut dns.servers, MAX_SERVERS);
    unique(&mut dns.searches, MAX_SEARCHES);
    dns
}

fn of_host(host: &ResolvConf) -> DnsConfig {
    DnsConfig {
        servers: host.servers.clone(),
        searches: host.searches.clone(),
        options: host.options.clone(),
    }
}

fn of_cluster(namespace: &str, options: &RunnerOptions, host: &ResolvConf) -> DnsConfig {
    let domain = options.cluster_domain.trim_end_matches('.');
    let mut searches =
        vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
    searches.extend(host.searches.iter().cloned());
    DnsConfig {
        servers: options.dns_servers.iter().map(ToString::to_string).collect(),
        searches,
        options: vec!["ndots:5".to_owned()],
    }
}

fn unique(list: &mut Vec<String>, most: usize) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|entry| seen.insert(entry.clone()));
    list.truncate(most);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::options;

    fn host() -> ResolvConf {
        ResolvConf::parse(
            "# c\nnameserver 192.0.2.53\nsearch lan\nsearch corp.example lan\noptions edns0 trust-ad\njunk\n",
        )
    }

    fn dns(spec: serde_json::Value) -> DnsConfig {
        let mut spec = spec;
        spec["containers"] = serde_json::json!([]);
        pod_dns(&serde_json::from_value(spec).unwrap(), "shop", &options("/tmp"), &host())
    }

    #[test]
    fn the_host_file_is_read() {
        let host = host();
        assert_eq!(host.servers, ["192.0.2.53"]);
        assert_eq!(host.searches, ["corp.example", "lan"]);
        assert_eq!(host.options, ["edns0", "trust-ad"]);
    }

    #[tokio::test]
    async fn a_stub_of_the_node_is_looked_behind() {
        let directory = tempfile::tempdir().unwrap();
        let (path, behind) = (directory.path().join("own"), directory.path().join("behind"));
        let servers = async |own: &str| {
            std::fs::write(&path, own).unwrap();
            ResolvConf::of_files(&path, &behind).await.servers
        };
        let stub = "nameserver 127.0.0.53\noptions edns0\n";
        assert_eq!(servers(stub).await, ["127.0.0.53"], "there is nothing better");
        std::fs::write(&behind, "nameserver 192.0.2.53\nnameserver fd00::53\nsearch lan\n")
            .unwrap();
        assert_eq!(servers(stub).await, ["192.0.2.53", "fd00::53"]);
        let real = "nameserver 127.0.0.1\nnameserver 198.51.100.1\n";
        assert_eq!(servers(real).await, ["127.0.0.1", "198.51.100.1"]);
        assert!(servers("").await.is_empty());
    }

    #[test]
    fn policies_choose_the_servers() {
        let cluster = dns(serde_json::json!({}));
        assert_eq!(cluster.servers, ["10.96.0.10"]);
        assert_eq!(
            cluster.searches,
            ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example", "lan"]
        );
        assert_eq!(cluster.options, ["ndots:5"]);
        for spec in [
            serde_json::json!({"dnsPolicy": "Default"}),
            serde_json::json!({"hostNetwork": true}),
            serde_json::json!({"hostNetwork": true, "dnsPolicy": "ClusterFirst"}),
        ] {
            assert_eq!(dns(spec).servers, ["192.0.2.53"]);
        }
        let both =
            dns(serde_json::json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}));
        assert_eq!(both.servers, ["10.96.0.10"]);
    }

    #[test]
    fn own_entries_are_merged() {
        let none = dns(serde_json::json!({"dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["1.1.1.1", "1.1.1.1"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}]}}));
        assert_eq!(none.servers, ["1.1.1.1"]);
        assert_eq!(none.searches, ["a.b"]);
        assert_eq!(none.options, ["ndots:2"]);
        let merged = dns(
            serde_json::json!({"dnsConfig": {"options": [{"name": "ndots", "value": "1"}, {"name": "edns0"}]}}),
        );
        assert_eq!(merged.options, ["ndots:1", "edns0"]);
    }
}
