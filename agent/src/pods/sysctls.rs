//! The sysctls that pods may set: those that concern nobody else, and what the node allows beyond them.

use std::collections::HashMap;
use std::str::FromStr;

use k8s_openapi::api::core::v1::PodSpec;
use mesh_model::sysctl::{Namespace, is_name, namespace, normalized};

/// A version of the kernel, its first two numbers.
type Kernel = (u32, u32);

/// The kubelet's safe sysctls, and the kernel since which each namespace has its own.
const SAFE: [(&str, Kernel); 12] = [
    ("kernel.shm_rmid_forced", (0, 0)),
    ("net.ipv4.ip_local_port_range", (0, 0)),
    ("net.ipv4.tcp_syncookies", (0, 0)),
    ("net.ipv4.ping_group_range", (0, 0)),
    ("net.ipv4.ip_unprivileged_port_start", (0, 0)),
    ("net.ipv4.ip_local_reserved_ports", (3, 16)),
    ("net.ipv4.tcp_keepalive_time", (4, 5)),
    ("net.ipv4.tcp_fin_timeout", (4, 6)),
    ("net.ipv4.tcp_keepalive_intvl", (4, 5)),
    ("net.ipv4.tcp_keepalive_probes", (4, 5)),
    ("net.ipv4.tcp_rmem", (4, 15)),
    ("net.ipv4.tcp_wmem", (4, 15)),
];

/// Sysctls that are allowed beyond the safe ones: names, or their beginnings with `*` behind. Separated by commas, as the kubelet's
/// allowedUnsafeSysctls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedSysctls(Vec<String>);

/// Such a list cannot be allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSysctl {
    /// Nothing is called so.
    #[error("{0:?} is neither the name of a sysctl nor the beginning of one with * behind")]
    Name(String),
    /// All of the node would see the change.
    #[error("{0:?} is not known to be namespaced")]
    NotNamespaced(String),
}

impl FromStr for AllowedSysctls {
    type Err = InvalidSysctl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let given = text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty());
        given.map(pattern).collect::<Result<_, _>>().map(Self)
    }
}

fn pattern(text: &str) -> Result<String, InvalidSysctl> {
    let beginning = text.strip_suffix('*').unwrap_or(text);
    let ends_a_part = beginning.len() < text.len() && beginning.ends_with(['.', '/', '-', '_']);
    let name = if ends_a_part { &beginning[..beginning.len() - 1] } else { beginning };
    if !is_name(name) {
        return Err(InvalidSysctl::Name(text.to_owned()));
    }
    if namespace(&normalized(beginning)).is_none() {
        return Err(InvalidSysctl::NotNamespaced(text.to_owned()));
    }
    Ok(normalized(text))
}

impl AllowedSysctls {
    fn allows(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        })
    }
}

/// The sysctls of a pod, as the runtime takes them.
pub(crate) fn of_pod(spec: &PodSpec) -> HashMap<String, String> {
    let context = spec.security_context.as_ref();
    let all = context.into_iter().flat_map(|c| c.sysctls.iter().flatten());
    all.map(|s| (normalized(&s.name), s.value.clone())).collect()
}

/// Why a node must not run the pod.
pub(crate) fn refusal(spec: &PodSpec, allowed: &AllowedSysctls, kernel: Kernel) -> Option<String> {
    let is_safe = |name: &str| SAFE.iter().any(|(safe, since)| *safe == name && *since <= kernel);
    let wrong = |name: &str| {
        if !is_safe(name) && !allowed.allows(name) {
            return Some(format!("{name:?} not allowlisted"));
        }
        let namespace = namespace(name)?;
        let is_shared = match namespace {
            Namespace::Ipc => spec.host_ipc == Some(true),
            Namespace::Net => spec.host_network == Some(true),
        };
        is_shared.then(|| format!("{name:?} not allowed with host {} enabled", namespace.name()))
    };
    let context = spec.security_context.as_ref()?;
    let mut names = context.sysctls.iter().flatten().map(|sysctl| normalized(&sysctl.name));
    names.find_map(|name| wrong(&name)).map(|why| format!("forbidden sysctl: {why}"))
}

/// The version of the running kernel; one without any feature where that is unreadable.
pub(crate) fn kernel() -> Kernel {
    version(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

fn version(release: &str) -> Kernel {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(more: Value, sysctls: &[&str]) -> PodSpec {
        let sysctls: Vec<_> =
            sysctls.iter().map(|name| json!({"name": name, "value": "1"})).collect();
        let mut spec = json!({"containers": [], "securityContext": {"sysctls": sysctls}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn only_safe_and_allowed_sysctls_are_set() {
        let allowed: AllowedSysctls = "kernel.msg*, net/core/somaxconn".parse().unwrap();
        let of = |more: Value, names: &[&str]| refusal(&spec(more, names), &allowed, (6, 1));
        let good = ["net.ipv4.tcp_syncookies", "net/ipv4/tcp_rmem", "kernel.msgmax"];
        assert_eq!(of(json!({}), &good), None);
        assert_eq!(of(json!({}), &["net.core.somaxconn"]), None);
        assert_eq!(of(json!({}), &[]), None);
        for bad in ["net.core.somaxconn2", "kernel.shmmax", "vm.swappiness"] {
            let why = format!("forbidden sysctl: \"{bad}\" not allowlisted");
            assert_eq!(of(json!({}), &["kernel.msgmax", bad]), Some(why));
        }
        let old = refusal(&spec(json!({}), &["net.ipv4.tcp_rmem"]), &allowed, (4, 14));
        assert_eq!(old.as_deref(), Some("forbidden sysctl: \"net.ipv4.tcp_rmem\" not allowlisted"));
        let plain = refusal(&PodSpec::default(), &allowed, (6, 1));
        assert_eq!(plain, None);
    }

    #[test]
    fn what_is_shared_with_the_node_is_not_set() {
        let allowed: AllowedSysctls = "kernel.msg*".parse().unwrap();
        let of = |more: Value, name: &str| refusal(&spec(more, &[name]), &allowed, (6, 1));
        let network = json!({"hostNetwork": true});
        let why = "forbidden sysctl: \"net.ipv4.tcp_syncookies\" not allowed with host Net enabled";
        assert_eq!(of(network.clone(), "net.ipv4.tcp_syncookies").as_deref(), Some(why));
        assert_eq!(of(network, "kernel.msgmax"), None);
        let ipc = json!({"hostIPC": true});
        for name in ["kernel.shm_rmid_forced", "kernel.msgmax"] {
            let why = format!("forbidden sysctl: \"{name}\" not allowed with host IPC enabled");
            assert_eq!(of(ipc.clone(), name), Some(why));
        }
        assert_eq!(of(ipc, "net.ipv4.tcp_syncookies"), None);
    }

    #[test]
    fn only_what_is_a_namespaces_own_can_be_allowed() {
        let list = |text: &str| text.parse::<AllowedSysctls>().map(|all| all.0);
        assert_eq!(list(""), Ok(vec![]));
        let all = ["kernel.msg*", "net.ipv4.*", "kernel.sem"].map(str::to_owned);
        assert_eq!(list("kernel.msg*,net/ipv4/*, kernel.sem"), Ok(all.to_vec()));
        for global in ["vm.swappiness", "kernel.*", "kernel.sem*x"] {
            assert!(list(global).is_err(), "{global}");
        }
        let error = list("net.*,vm.*").unwrap_err();
        assert_eq!(error, InvalidSysctl::NotNamespaced("vm.*".to_owned()));
        for bad in ["*", "net.**", "net..*", "Net.core"] {
            assert_eq!(list(bad), Err(InvalidSysctl::Name(bad.to_owned())));
        }
    }

    #[test]
    fn the_kernel_is_known() {
        assert_eq!(version("6.1.0-13-cloud-amd64\n"), (6, 1));
        assert_eq!(version("4.15"), (4, 15));
        assert_eq!(version(""), (0, 0));
        assert!(kernel() > (3, 0));
    }

    #[test]
    fn the_runtime_is_told_in_its_own_form() {
        let all = of_pod(&spec(json!({}), &["net/ipv4/conf/eth0.1/rp_filter"]));
        assert_eq!(all.get("net.ipv4.conf.eth0/1.rp_filter").map(String::as_str), Some("1"));
    }
}
