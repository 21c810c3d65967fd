//! Namespaces, nodes, leases.

use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, NamespaceStatus, Node};
use mesh_model::wellknown::ANNOTATION_BLOCKS_WANTED;

use super::rules::{at_least, invalid, one_of, required};
use super::{Causes, Object, names};

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];
const PROTECTED: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

impl Object for Namespace {
    fn prepare_create(&mut self) {
        self.spec.get_or_insert_default().finalizers = Some(vec!["kubernetes".to_owned()]);
        self.status = Some(NamespaceStatus {
            phase: Some("Active".to_owned()),
            ..NamespaceStatus::default()
        });
    }

    fn set_defaults(&mut self) {
        if let Some(name) = self.metadata.name.clone().filter(|n| !n.is_empty()) {
            let labels = self.metadata.labels.get_or_insert_default();
            labels.insert("kubernetes.io/metadata.name".to_owned(), name);
        }
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn keep_reserved(&mut self, old: &Self) {
        self.spec.clone_from(&old.spec);
    }

    fn undeletable(&self) -> Option<String> {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        PROTECTED.contains(&name).then(|| "this namespace may not be deleted".to_owned())
    }

    fn mark_terminating(&mut self) {
        self.status.get_or_insert_default().phase = Some("Terminating".to_owned());
    }

    fn is_finished(&self) -> bool {
        let held = |list: Option<&Vec<String>>| list.is_some_and(|l| !l.is_empty());
        self.metadata.deletion_timestamp.is_some()
            && !held(self.metadata.finalizers.as_ref())
            && !held(self.spec.as_ref().and_then(|s| s.finalizers.as_ref()))
    }
}

impl Object for Node {
    // A node reports its status with its registration, and its keys and endpoints with its status.
    const STATUS_CARRIES_LABELS: bool = true;

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn set_defaults(&mut self) {
        if let Some(spec) = &mut self.spec
            && spec.pod_cidr.is_none()
        {
            spec.pod_cidr = spec.pod_cidrs.as_ref().and_then(|all| all.first().cloned());
        }
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else { return };
        for (i, text) in spec.pod_cidrs.iter().flatten().enumerate() {
            if text.parse::<IpNet>().is_err() {
                let rule = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                invalid(format!("spec.podCIDRs[{i}]"), text, rule, causes);
            }
        }
        for (i, taint) in spec.taints.iter().flatten().enumerate() {
            let field = format!("spec.taints[{i}]");
            if taint.key.is_empty() {
                required(format!("{field}.key"), causes);
            } else if !names::is_qualified(&taint.key) {
                invalid(format!("{field}.key"), &taint.key, "must be a label key", causes);
            }
            let effect = Some(taint.effect.as_str());
            one_of(&format!("{field}.effect"), effect, &EFFECTS, causes);
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let blocks = |node: &Self| node.spec.as_ref().and_then(|s| s.pod_cidrs.clone());
        let (before, now) = (blocks(old).unwrap_or_default(), blocks(self).unwrap_or_default());
        if !now.starts_with(&before) {
            let rule =
                "node updates may not change podCIDR except from \"\" to valid, and add more";
            causes.add("spec.podCIDRs", format!("Forbidden: {rule}"));
        }
    }

    fn refused_to_nodes(&self, old: Option<&Self>) -> Option<String> {
        let blocks = |node: &Self| {
            let spec = node.spec.as_ref();
            let first = spec.and_then(|s| s.pod_cidr.clone());
            (first, spec.and_then(|s| s.pod_cidrs.clone()).unwrap_or_default())
        };
        // A node that chose its blocks would be sent what is for the pods of others.
        (blocks(self) != old.map(blocks).unwrap_or_default()).then(|| {
            format!(
                "a node may not set its spec.podCIDR or spec.podCIDRs: it is assigned blocks, and more by {ANNOTATION_BLOCKS_WANTED}"
            )
        })
    }
}

impl Object for Lease {
    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else { return };
        let secs = spec.lease_duration_seconds.map(i64::from);
        at_least("spec.leaseDurationSeconds", secs, 1, causes);
        let transitions = spec.lease_transitions.map(i64::from);
        at_least("spec.leaseTransitions", transitions, 0, causes);
    }
}
