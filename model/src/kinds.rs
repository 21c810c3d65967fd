//! The kinds that the API serves, in one table.

/// One kind of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Kind, as in a manifest.
    pub kind: &'static str,
    /// Plural, as in a path.
    pub plural: &'static str,
    /// Singular, as people type it.
    pub singular: &'static str,
    /// Short names, as people type them.
    pub short_names: &'static [&'static str],
    /// Categories, such as `all`.
    pub categories: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether there is a `status` subresource.
    pub status: bool,
    /// Whether there is a `scale` subresource.
    pub scale: bool,
}

impl Kind {
    /// `v1` or `group/version`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

const fn kind(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        group,
        version: "v1",
        kind,
        plural,
        singular,
        short_names,
        categories: &[],
        namespaced: true,
        status: false,
        scale: false,
    }
}

const ALL: &[&str] = &["all"];

/// Every kind that is served, core group first.
pub const KINDS: &[Kind] = &[
    Kind {
        namespaced: false,
        status: true,
        ..kind("", "Namespace", "namespaces", "namespace", &["ns"])
    },
    Kind { namespaced: false, status: true, ..kind("", "Node", "nodes", "node", &["no"]) },
    Kind { status: true, categories: ALL, ..kind("", "Pod", "pods", "pod", &["po"]) },
    Kind { status: true, categories: ALL, ..kind("", "Service", "services", "service", &["svc"]) },
    kind("", "Endpoints", "endpoints", "endpoints", &["ep"]),
    kind("", "ConfigMap", "configmaps", "configmap", &["cm"]),
    kind("", "Secret", "secrets", "secret", &[]),
    kind("", "Event", "events", "event", &["ev"]),
    kind("", "ServiceAccount", "serviceaccounts", "serviceaccount", &["sa"]),
    kind("apps", "ControllerRevision", "controllerrevisions", "controllerrevision", &[]),
    Kind {
        status: true,
        categories: ALL,
        ..kind("apps", "DaemonSet", "daemonsets", "daemonset", &["ds"])
    },
    Kind {
        status: true,
        scale: true,
        categories: ALL,
        ..kind("apps", "Deployment", "deployments", "deployment", &["deploy"])
    },
    Kind {
        status: true,
        scale: true,
        categories: ALL,
        ..kind("apps", "ReplicaSet", "replicasets", "replicaset", &["rs"])
    },
    Kind {
        status: true,
        scale: true,
        categories: ALL,
        ..kind("apps", "StatefulSet", "statefulsets", "statefulset", &["sts"])
    },
    Kind {
        status: true,
        categories: ALL,
        ..kind("batch", "CronJob", "cronjobs", "cronjob", &["cj"])
    },
    Kind { status: true, categories: ALL, ..kind("batch", "Job", "jobs", "job", &[]) },
    kind("coordination.k8s.io", "Lease", "leases", "lease", &[]),
    kind("discovery.k8s.io", "EndpointSlice", "endpointslices", "endpointslice", &[]),
    Kind { status: true, ..kind("networking.k8s.io", "Ingress", "ingresses", "ingress", &["ing"]) },
    Kind {
        namespaced: false,
        ..kind("networking.k8s.io", "IngressClass", "ingressclasses", "ingressclass", &[])
    },
    kind("networking.k8s.io", "NetworkPolicy", "networkpolicies", "networkpolicy", &["netpol"]),
    Kind {
        status: true,
        ..kind(
            "policy",
            "PodDisruptionBudget",
            "poddisruptionbudgets",
            "poddisruptionbudget",
            &["pdb"],
        )
    },
];

/// The served kind of that group, version and kind.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.group == group && k.version == version && k.kind == kind)
}

/// The served kind of that group, version and plural.
pub fn by_plural(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.group == group && k.version == version && k.plural == plural)
}

/// The served kind that a person means: plural, singular, short name or kind, in any case.
pub fn by_any_name(name: &str) -> Option<&'static Kind> {
    let name = name.to_ascii_lowercase();
    KINDS.iter().find(|k| {
        k.plural == name
            || k.singular == name
            || k.short_names.contains(&name.as_str())
            || k.kind.to_ascii_lowercase() == name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unambiguous() {
        for a in KINDS {
            for name in [a.plural, a.singular, a.kind].iter().chain(a.short_names) {
                assert_eq!(by_any_name(name), Some(a), "{name}");
            }
            assert_eq!(by_kind(a.group, a.version, a.kind), Some(a));
            assert_eq!(by_plural(a.group, a.version, a.plural), Some(a));
        }
    }
}
