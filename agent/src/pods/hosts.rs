//! `/etc/hosts` of a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::sandbox::{full_name, hostname};

const HEAD: &str = "\
# Written by mesh-agent for this pod.
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
";

/// The file's text. With the node's network it starts as the node's own file.
pub(crate) fn hosts(
    pod: &Pod,
    spec: &PodSpec,
    pod_ips: &[IpAddr],
    domain: &str,
    node_file: &str,
) -> String {
    let mut text =
        if spec.host_network == Some(true) { node_file.to_owned() } else { HEAD.to_owned() };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    if spec.host_network != Some(true) {
        let (name, full) = (hostname(pod, spec), full_name(pod, spec, domain));
        for ip in pod_ips {
            text.push_str(&match &full {
                Some(full) => format!("{ip}\t{full}\t{name}\n"),
                None => format!("{ip}\t{name}\n"),
            });
        }
    }
    for alias in spec.host_aliases.iter().flatten() {
        let names = alias.hostnames.clone().unwrap_or_default();
        text.push_str(&format!("{}\t{}\n", alias.ip, names.join("\t")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(spec: serde_json::Value, ips: &[&str]) -> String {
        let mut spec = spec;
        spec["containers"] = serde_json::json!([]);
        let pod: Pod = serde_json::from_value(
            serde_json::json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec}),
        )
        .unwrap();
        let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        hosts(&pod, pod.spec.as_ref().unwrap(), &ips, "cluster.local", "192.0.2.9 node")
    }

    #[test]
    fn the_pod_knows_itself_and_its_aliases() {
        let own = text(
            serde_json::json!({"subdomain": "web", "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a", "b"]}]}),
            &["10.244.1.5", "fd10::5"],
        );
        assert!(own.contains("10.244.1.5\tweb-0.web.shop.svc.cluster.local\tweb-0\n"), "{own}");
        assert!(own.contains("fd10::5\tweb-0."), "{own}");
        assert!(own.ends_with("192.0.2.1\ta\tb\n"), "{own}");
        assert!(text(serde_json::json!({}), &["10.244.1.5"]).ends_with("10.244.1.5\tweb-0\n"));
        assert_eq!(
            text(serde_json::json!({"hostNetwork": true}), &["192.0.2.9"]),
            "192.0.2.9 node\n"
        );
    }
}
