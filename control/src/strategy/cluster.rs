//! Namespaces, nodes, leases.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, NamespaceStatus, Node};

use super::Object;

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
}

impl Object for Lease {}
