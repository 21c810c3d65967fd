//! Whose pods are whose. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use crate::objects;

/// The pods by what an owner has to do with them.
pub(super) struct Claims<'a> {
    /// It controls them, and selects them.
    pub(super) owned: Vec<&'a Pod>,
    /// It selects them, and nobody controls them.
    pub(super) adoptable: Vec<&'a Pod>,
    /// It controls them, and does not select them any more.
    pub(super) strays: Vec<&'a Pod>,
}

impl<'a> Claims<'a> {
    /// `pods` may hold foreign pods of the namespace, in any order. Without a selector nothing is anybody's. `may_adopt` tells which
    /// pods are worth taking over.
    pub(super) fn sort(
        owner: &ObjectMeta,
        selector: Option<&LabelSelector>,
        pods: &'a [Arc<Pod>],
        may_adopt: fn(&Pod) -> bool,
    ) -> Self {
        let mut claims = Self { owned: Vec::new(), adoptable: Vec::new(), strays: Vec::new() };
        let uid = objects::uid(owner);
        let Some(selector) = selector else {
            return claims;
        };
        for pod in pods {
            let pod: &Pod = pod;
            let matches = objects::selects(selector, pod.metadata.labels.as_ref());
            match objects::controller_of(&pod.metadata) {
                Some(owner) if owner.uid == uid && matches => claims.owned.push(pod),
                Some(owner) if owner.uid == uid && !objects::is_terminating(&pod.metadata) => {
                    claims.strays.push(pod);
                }
                None if matches && may_adopt(pod) => claims.adoptable.push(pod),
                _ => {}
            }
        }
        claims
    }
}
