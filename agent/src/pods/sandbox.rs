//! The configuration of a pod's sandbox.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use mesh_cri::v1;
use mesh_model::containers::lasting;

use super::RunnerOptions;
use super::observed::{ANNOTATION_GRACE, PodRef};
use super::plan::grace_of;
use super::resolv::{self, ResolvConf};
use super::{security, sysctls};

/// How Kubernetes names limits of what a pod receives and sends.
const BANDWIDTH_ANNOTATIONS: [&str; 2] =
    ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];

/// The sandbox of a pod. The same pod and attempt always give the same configuration.
pub(crate) fn sandbox_config(
    pod: &Pod,
    spec: &PodSpec,
    identity: &PodRef,
    options: &RunnerOptions,
    attempt: u32,
    host: &ResolvConf,
) -> v1::PodSandboxConfig {
    let host_network = spec.host_network == Some(true);
    let mut labels: HashMap<String, String> =
        pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(identity.labels());
    let grace = grace_of(pod).as_secs().to_string();
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: identity.name.clone(),
            uid: identity.uid.clone(),
            namespace: identity.namespace.clone(),
            attempt,
        }),
        // With the node's network there is no own UTS namespace whose name could be set.
        hostname: if host_network {
            String::new()
        } else {
            full_name(pod, spec, &options.cluster_domain)
                .filter(|_| spec.set_hostname_as_fqdn == Some(true))
                .unwrap_or_else(|| hostname(pod, spec))
        },
        log_directory: options.log_dir.join(identity.log_directory()).display().to_string(),
        dns_config: Some(resolv::pod_dns(spec, &identity.namespace, options, host)),
        port_mappings: if host_network { Vec::new() } else { port_mappings(spec) },
        labels,
        annotations: annotations(pod, grace),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: options.cgroup_parent.clone(),
            security_context: Some(security::of_sandbox(spec, &options.seccomp_dir())),
            sysctls: sysctls::of_pod(spec),
        }),
    }
}

/// What the runtime reads, and what we read back: limits of bandwidth reach the CNI plugin this way.
fn annotations(pod: &Pod, grace: String) -> HashMap<String, String> {
    let own = pod.metadata.annotations.iter().flatten();
    let limits = own.filter(|(key, _)| BANDWIDTH_ANNOTATIONS.contains(&key.as_str()));
    let mut all: HashMap<String, String> =
        limits.map(|(key, value)| (key.clone(), value.clone())).collect();
    all.insert(ANNOTATION_GRACE.to_owned(), grace);
    all
}

/// The host name that the pod sees: at most 63 characters, as the kernel and DNS want it.
pub(crate) fn hostname(pod: &Pod, spec: &PodSpec) -> String {
    let name = spec.hostname.as_deref().filter(|h| !h.is_empty());
    let name = name.or(pod.metadata.name.as_deref()).unwrap_or_default();
    let end = name.char_indices().nth(63).map_or(name.len(), |(at, _)| at);
    name[..end].trim_end_matches(['-', '.']).to_owned()
}

/// The pod's name in DNS, where it has one. One that is too long for the kernel is refused by the kernel.
pub(crate) fn full_name(pod: &Pod, spec: &PodSpec, domain: &str) -> Option<String> {
    let sub = spec.subdomain.as_deref().filter(|sub| !sub.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    Some(format!("{}.{sub}.{namespace}.svc.{domain}", hostname(pod, spec)))
}

fn port_mappings(spec: &PodSpec) -> Vec<v1::PortMapping> {
    let mapped = |container: &Container| {
        let ports = container.ports.clone().unwrap_or_default();
        ports.into_iter().filter(|p| p.host_port.is_some_and(|p| p > 0)).map(|port| {
            v1::PortMapping {
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => v1::Protocol::Udp,
                    Some("SCTP") => v1::Protocol::Sctp,
                    _ => v1::Protocol::Tcp,
                }
                .into(),
                container_port: port.container_port,
                host_port: port.host_port.unwrap_or_default(),
                host_ip: port.host_ip.unwrap_or_default(),
            }
        })
    };
    lasting(spec).flat_map(mapped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecars_may_have_ports_of_the_node() {
        let ports = |number: u16| serde_json::json!([{"containerPort": 80, "hostPort": number}]);
        let spec = serde_json::json!({
            "containers": [{"name": "c", "ports": ports(8080)}],
            "initContainers": [
                {"name": "i", "ports": ports(8081)},
                {"name": "s", "restartPolicy": "Always", "ports": ports(8082)}]});
        let mapped = port_mappings(&serde_json::from_value(spec).unwrap());
        let ports: Vec<i32> = mapped.iter().map(|port| port.host_port).collect();
        assert_eq!(ports, [8080, 8082]);
    }

    #[test]
    fn a_pod_may_be_called_by_its_full_name() {
        let of = |spec: serde_json::Value| {
            let pod = serde_json::json!({
                "metadata": {"name": "web-0", "namespace": "shop", "uid": "u"}, "spec": spec});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            let identity = PodRef::of(&pod).unwrap();
            let options = crate::pods::tests::options("/x");
            let spec = pod.spec.as_ref().unwrap();
            sandbox_config(&pod, spec, &identity, &options, 0, &ResolvConf::default()).hostname
        };
        let with = |more: serde_json::Value| {
            let mut spec = serde_json::json!({"containers": []});
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            of(spec)
        };
        assert_eq!(with(serde_json::json!({"subdomain": "db"})), "web-0");
        let full = serde_json::json!({"subdomain": "db", "setHostnameAsFQDN": true});
        assert_eq!(with(full), "web-0.db.shop.svc.cluster.local");
        assert_eq!(with(serde_json::json!({"setHostnameAsFQDN": true})), "web-0");
        assert_eq!(with(serde_json::json!({"hostNetwork": true, "setHostnameAsFQDN": true})), "");
    }
}
