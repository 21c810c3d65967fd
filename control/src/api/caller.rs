//! Who asks, and what they may do.

use std::net::IpAddr;

use mesh_model::certificate::Validity;
use mesh_model::kinds::Kind;
use mesh_model::wellknown::{GROUP_ADMINS, GROUP_NODES, LEASE_NAMESPACE, NODE_USER_PREFIX};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::pki::validity;

/// A client certificate that the cluster's CA signed, as a connection began with it.
///
/// TLS looks at its dates only then, and not even then where a session is resumed.
#[derive(Debug, Clone)]
pub struct Shown {
    caller: Caller,
    /// The addresses that it is for.
    pub addresses: Vec<IpAddr>,
    validity: Validity,
}

impl Shown {
    /// What a verified certificate says; nothing for one without a name.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject.iter_organization().filter_map(|o| o.as_str().ok());
        let caller = Caller { user, groups: groups.map(str::to_owned).collect(), account: None };
        Some(Self { caller, addresses: addresses(&certificate), validity: validity(&certificate) })
    }

    /// Who shows it; nobody once it has run out.
    pub fn caller(&self, now: i64) -> Option<Caller> {
        self.validity.holds(now).then(|| self.caller.clone())
    }
}

fn addresses(certificate: &X509Certificate<'_>) -> Vec<IpAddr> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.into_iter().flat_map(|names| &names.value.general_names);
    let octets = names.filter_map(|name| match name {
        GeneralName::IPAddress(octets) => Some(*octets),
        _ => None,
    });
    octets.filter_map(address).collect()
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

/// Who a client certificate that the cluster's CA signed is for, or a token of a service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Common name, or `system:serviceaccount:NAMESPACE:NAME`.
    pub user: String,
    /// Organisations, or the groups of a service account.
    pub groups: Vec<String>,
    /// The service account, where it is one.
    pub account: Option<Account>,
}

/// The service account that a token is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Its namespace.
    pub namespace: String,
    /// Its unique id.
    pub uid: String,
    /// What it may do.
    pub role: Role,
    /// Name and unique id of the pod that the token was made for.
    pub pod: Option<(String, String)>,
}

pub use super::role::Role;

/// What a request does to a kind of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// get, list, watch.
    Read,
    /// create.
    Create,
    /// update, patch.
    Update,
    /// delete.
    Delete,
    /// deletecollection.
    DeleteCollection,
}

impl Verb {
    /// As Kubernetes says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "get",
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }
}

/// What a request is about.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// What it does.
    pub verb: Verb,
    /// The kind.
    pub kind: &'static Kind,
    /// The namespace of the path.
    pub ns: Option<&'a str>,
    /// The name in the path, or in the body of a create.
    pub name: Option<&'a str>,
    /// The subresource.
    pub sub: Option<&'a str>,
    /// The node that the pod is bound to, where the request is about a pod.
    pub pod_node: Option<&'a str>,
    /// Whether a deletion asks for no grace period.
    pub no_grace: bool,
}

impl Caller {
    /// Whether the caller may do everything.
    pub fn is_admin(&self) -> bool {
        let role = self.account.as_ref().map(|account| account.role);
        role == Some(Role::ClusterAdmin) || self.groups.iter().any(|g| g == GROUP_ADMINS)
    }

    /// The node that the caller is.
    pub fn node(&self) -> Option<&str> {
        let member = self.groups.iter().any(|g| g == GROUP_NODES);
        self.user.strip_prefix(NODE_USER_PREFIX).filter(|_| member)
    }

    /// Whether the caller is the node that the new pod mirrors a static pod of.
    pub fn may_mirror(&self, pod: &serde_json::Value) -> bool {
        let mirror = &pod["metadata"]["annotations"]["kubernetes.io/config.mirror"];
        self.node().is_some_and(|node| pod["spec"]["nodeName"] == node) && mirror.is_string()
    }

    /// Whether the caller may do it; else why not.
    pub fn may(&self, access: &Access<'_>) -> Result<(), String> {
        if self.is_admin() {
            return Ok(());
        }
        let allowed = match &self.account {
            Some(account) => account.role.may(&account.namespace, access),
            None => self.node().is_some_and(|node| node_may(node, access)),
        };
        if allowed {
            return Ok(());
        }
        let resource = match access.sub {
            Some(sub) => format!("{}/{sub}", access.kind.plural),
            None => access.kind.plural.to_owned(),
        };
        let place = match access.ns {
            Some(ns) => format!("in the namespace \"{ns}\""),
            None => "at the cluster scope".to_owned(),
        };
        Err(format!(
            "User \"{}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
            self.user,
            access.verb.name(),
            access.kind.group
        ))
    }
}

fn node_may(node: &str, access: &Access<'_>) -> bool {
    let own = access.name == Some(node);
    match (access.kind.kind, access.verb, access.sub) {
        // Logs, node reports and what happens in pods are for people.
        (_, Verb::Read, sub) => {
            !matches!(sub, Some("log" | "proxy" | "exec" | "attach" | "portforward"))
        }
        ("Node", Verb::Create, None) | ("Node", Verb::Update, None | Some("status")) => own,
        ("Lease", Verb::Create | Verb::Update, None) => own && access.ns == Some(LEASE_NAMESPACE),
        ("Event", Verb::Create | Verb::Update, None) => true,
        ("Pod", Verb::Update, Some("status")) => access.pod_node == Some(node),
        ("Pod", Verb::Delete, None) => access.pod_node == Some(node) && access.no_grace,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::kinds::by_any_name;

    use super::*;

    fn access(verb: Verb, kind: &str, name: &'static str) -> Access<'static> {
        let kind = by_any_name(kind).unwrap();
        Access {
            verb,
            kind,
            ns: None,
            name: Some(name),
            sub: None,
            pod_node: None,
            no_grace: false,
        }
    }

    #[test]
    fn nodes_write_their_own_objects_only() {
        let groups = vec![GROUP_NODES.to_owned()];
        let node = Caller { user: "system:node:n1".to_owned(), groups, account: None };
        assert!(node.may(&access(Verb::Read, "secrets", "x")).is_ok());
        assert!(node.may(&access(Verb::Create, "nodes", "n1")).is_ok());
        assert!(node.may(&access(Verb::Update, "nodes", "n2")).is_err());
        assert!(node.may(&access(Verb::Delete, "nodes", "n1")).is_err());
        assert!(node.may(&access(Verb::Create, "deployments", "d")).is_err());
        let lease = Access { ns: Some(LEASE_NAMESPACE), ..access(Verb::Update, "leases", "n1") };
        assert!(node.may(&lease).is_ok());
        assert!(node.may(&Access { ns: Some("default"), ..lease }).is_err());
        let status = Access {
            sub: Some("status"),
            pod_node: Some("n1"),
            ..access(Verb::Update, "pods", "p")
        };
        assert!(node.may(&status).is_ok());
        assert!(node.may(&Access { pod_node: Some("n2"), ..status }).is_err());
        let service = Access { sub: Some("status"), ..access(Verb::Update, "services", "s") };
        assert!(node.may(&service).is_err(), "what lacks room there, it says on its own Node");
        for sub in ["exec", "attach", "portforward"] {
            for verb in [Verb::Read, Verb::Create] {
                let inside = Access { sub: Some(sub), pod_node: Some("n1"), ..status };
                assert!(node.may(&Access { verb, ..inside }).is_err(), "{sub}");
            }
        }
        let delete = Access { pod_node: Some("n1"), ..access(Verb::Delete, "pods", "p") };
        assert!(node.may(&delete).is_err(), "stopping a pod is not a node's decision");
        assert!(node.may(&Access { no_grace: true, ..delete }).is_ok());
    }

    #[test]
    fn a_node_shows_its_own_static_pods_and_makes_no_others() {
        let groups = vec![GROUP_NODES.to_owned()];
        let node = Caller { user: "system:node:n1".to_owned(), groups, account: None };
        let pod = |node: &str, annotation: &str| serde_json::json!({"metadata": {"annotations": {annotation: "x"}}, "spec": {"nodeName": node}});
        let mirror = "kubernetes.io/config.mirror";
        assert!(node.may_mirror(&pod("n1", mirror)));
        assert!(!node.may_mirror(&pod("n2", mirror)) && !node.may_mirror(&pod("n1", "other")));
        let admin =
            Caller { user: "a".to_owned(), groups: vec![GROUP_ADMINS.to_owned()], account: None };
        assert!(!admin.may_mirror(&pod("n1", mirror)), "they need no exception");
    }

    #[test]
    fn others_may_nothing_and_a_name_alone_is_not_enough() {
        let read = access(Verb::Read, "pods", "p");
        let stranger = Caller { user: "system:node:n1".to_owned(), groups: vec![], account: None };
        let why = stranger.may(&read).unwrap_err();
        assert_eq!(
            why,
            "User \"system:node:n1\" cannot get resource \"pods\" in API group \"\" at the cluster scope"
        );
        let admin =
            Caller { user: "a".to_owned(), groups: vec![GROUP_ADMINS.to_owned()], account: None };
        assert!(admin.may(&access(Verb::DeleteCollection, "pods", "p")).is_ok());
    }
}
