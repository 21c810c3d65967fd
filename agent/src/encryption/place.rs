//! Where on this node canaries start and end: in a pod's network namespace, or on the node where it runs no pod.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_kernel::pods::{LinuxPodNetwork, ObservedPort, PodNetwork as _};
use mesh_kernel::{NetNs, Programs};
use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;

use super::node;

/// A network namespace with addresses of the node's pod blocks.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The pod, `namespace/name`; none when it is the node itself.
    pub(super) pod: Option<String>,
    pub(super) namespace: NetNs,
    pub(super) addresses: Vec<IpAddr>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.pod.as_deref().unwrap_or("the node"))
    }
}

/// The first pod that can be entered, or the node's own place on the overlay.
pub(super) async fn find(programs: Option<Arc<Programs>>, snapshot: &Snapshot) -> Place {
    let pod = tokio::task::spawn_blocking(move || pod(programs?)).await;
    pod.ok().flatten().unwrap_or_else(|| Place {
        pod: None,
        namespace: node(),
        addresses: snapshot.node.blocks.iter().map(node_overlay_address).collect(),
    })
}

fn pod(programs: Arc<Programs>) -> Option<Place> {
    let mut ports = LinuxPodNetwork::new(node(), programs).list().ok()?;
    ports.sort_by(|a, b| a.owner.cmp(&b.owner));
    ports.iter().find_map(enter)
}

fn enter(port: &ObservedPort) -> Option<Place> {
    let (name, addresses) = describe(&port.owner)?;
    let namespace = NetNs::with_device(port.pod_mac).ok()??;
    Some(Place { pod: Some(name), namespace, addresses })
}

/// Name and addresses from the text that a pod's interface carries.
fn describe(owner: &str) -> Option<(String, Vec<IpAddr>)> {
    let (_, lease) = crate::cni::owner::parse(owner)?;
    let name = owner.split(' ').nth(3).unwrap_or("?");
    (!lease.addresses.is_empty()).then(|| (name.to_owned(), lease.addresses))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_known_by_what_its_interface_carries() {
        let (name, addresses) = describe("abc/eth0 10.244.1.5 - default/web-1").unwrap();
        assert_eq!(
            (name.as_str(), addresses),
            ("default/web-1", vec!["10.244.1.5".parse().unwrap()])
        );
        assert_eq!(describe("abc/eth0 - - default/web-1"), None);
        assert_eq!(describe("somebody else's"), None);
    }
}
