//! What service accounts may do. Their role is an annotation that only administrators can write.

use mesh_model::wellknown::ANNOTATION_ROLE;

use super::caller::{Access, Verb};

/// The role of a service account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Ask what is served, who it is and what it may do.
    #[default]
    None,
    /// Read its own namespace, but for Secrets.
    View,
    /// Read and write its own namespace, but for ServiceAccounts.
    Edit,
    /// Read the cluster, but for Secrets.
    ClusterView,
    /// Everything.
    ClusterAdmin,
}

/// The names of all roles that grant anything.
pub const NAMES: [&str; 4] = ["cluster-admin", "cluster-view", "edit", "view"];

/// What of an object is read without reaching into a container.
const SHOWN: [&str; 4] = ["status", "scale", "log", "ephemeralcontainers"];
/// What who may write pods may write of them.
const WRITTEN: [&str; 6] =
    ["scale", "eviction", "ephemeralcontainers", "exec", "attach", "portforward"];

impl Role {
    /// The role that the annotations of an account give it.
    pub fn of(annotations: Option<&std::collections::BTreeMap<String, String>>) -> Self {
        match annotations.and_then(|all| all.get(ANNOTATION_ROLE)).map(String::as_str) {
            Some("view") => Self::View,
            Some("edit") => Self::Edit,
            Some("cluster-view") => Self::ClusterView,
            Some("cluster-admin") => Self::ClusterAdmin,
            _ => Self::None,
        }
    }

    /// Whether an account of that namespace may do it.
    pub(crate) fn may(self, namespace: &str, access: &Access<'_>) -> bool {
        let own = access.kind.namespaced && access.ns == Some(namespace);
        let read = access.verb == Verb::Read && access.sub.is_none_or(|sub| SHOWN.contains(&sub));
        let secret = access.kind.kind == "Secret";
        match self {
            Self::None => false,
            Self::View => own && read && !secret,
            Self::ClusterView => read && !secret,
            Self::Edit if access.verb == Verb::Read => own && read,
            // Who writes an account could give itself another role.
            Self::Edit => {
                own && access.kind.kind != "ServiceAccount"
                    && access.sub.is_none_or(|sub| WRITTEN.contains(&sub))
            }
            Self::ClusterAdmin => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::kinds::by_any_name;

    use super::*;

    fn may(role: Role, verb: Verb, kind: &str, ns: Option<&str>, sub: Option<&str>) -> bool {
        let kind = by_any_name(kind).unwrap();
        let access = Access { verb, kind, ns, name: None, sub, pod_node: None, no_grace: false };
        role.may("shop", &access)
    }

    #[test]
    fn roles_end_at_the_namespace_and_before_secrets() {
        let (own, other) = (Some("shop"), Some("kube-system"));
        for (verb, kind, ns, sub, allowed) in [
            (Verb::Read, "pods", own, None, [false, true, true, true]),
            (Verb::Read, "pods", other, None, [false, false, false, true]),
            (Verb::Read, "pods", None, None, [false, false, false, true]),
            (Verb::Read, "nodes", None, None, [false, false, false, true]),
            (Verb::Read, "nodes", None, Some("proxy"), [false; 4]),
            (Verb::Read, "secrets", own, None, [false, false, true, false]),
            (Verb::Read, "secrets", other, None, [false; 4]),
            (Verb::Read, "pods", own, Some("log"), [false, true, true, true]),
            (Verb::Create, "pods", own, None, [false, false, true, false]),
            (Verb::Create, "pods", other, None, [false; 4]),
            (Verb::Create, "pods", own, Some("exec"), [false, false, true, false]),
            (Verb::Create, "pods", own, Some("binding"), [false; 4]),
            (Verb::Update, "pods", own, Some("status"), [false; 4]),
            (Verb::Update, "serviceaccounts", own, None, [false; 4]),
            (Verb::Create, "serviceaccounts", own, Some("token"), [false; 4]),
            (Verb::Create, "daemonsets", own, None, [false, false, true, false]),
            (Verb::Update, "statefulsets", own, Some("scale"), [false, false, true, false]),
            (Verb::Read, "controllerrevisions", own, None, [false, true, true, true]),
            (Verb::Delete, "namespaces", None, None, [false; 4]),
        ] {
            let roles = [Role::None, Role::View, Role::Edit, Role::ClusterView];
            let found = roles.map(|role| may(role, verb, kind, ns, sub));
            assert_eq!(found, allowed, "{verb:?} {kind} {ns:?} {sub:?}");
        }
        assert!(may(Role::ClusterAdmin, Verb::Delete, "namespaces", None, None));
    }

    #[test]
    fn a_role_is_what_the_annotation_says() {
        let of =
            |text: &str| Role::of(Some(&[(ANNOTATION_ROLE.to_owned(), text.to_owned())].into()));
        for name in NAMES {
            assert_ne!(of(name), Role::None, "{name}");
        }
        assert_eq!((of("root"), Role::of(None)), (Role::None, Role::None));
    }
}
