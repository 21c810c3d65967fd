//! resolv.conf: the node's own is read, the pod's is composed (Kubernetes, "DNS for Services and Pods").

use k8s_openapi::api::core::v1::PodSpec;
use mesh_cri::v1::DnsConfig;

use super::RunnerOptions;

/// What glibc reads of a resolv.conf at most.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

/// The parts of a resolv.conf (resolv.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    pub(crate) servers: Vec<String>,
    pub(crate) searches: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl ResolvConf {
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
