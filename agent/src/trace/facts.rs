//! What a node knows about the ends of a probe, and about itself.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_kernel::pods::{LinuxPodNetwork, ObservedPort, PodNetwork as _, PodPort};
use mesh_kernel::{NetNs, Programs, sysctl};
use mesh_model::ObjectKey;
use mesh_overlay::{Kind, Overlay};
use mesh_worker::Client;

use super::ProbeError;

/// A worker that takes longer than this does not work.
pub(crate) const ANSWER: Duration = Duration::from_secs(1);
/// Without these nothing is forwarded that does not take one of the short ways.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// The pod's namespace, and what its interface lacks.
pub(super) fn find(
    programs: Arc<Programs>,
    pod: &ObjectKey,
) -> Result<(NetNs, Vec<String>), ProbeError> {
    let network = LinuxPodNetwork::new(NetNs::current(), programs);
    let ports = network.list().unwrap_or_default();
    let name = pod.to_string();
    let is_it = |port: &&ObservedPort| port.owner.split(' ').nth(3) == Some(name.as_str());
    let port = ports.iter().find(is_it).ok_or_else(|| ProbeError::NoPod(pod.clone()))?;
    let namespace = NetNs::with_device(port.pod_mac).ok().flatten();
    let namespace = namespace.ok_or_else(|| ProbeError::NoNamespace(pod.clone()))?;
    let missing = expected(port, &namespace).and_then(|port| network.check(&port).ok());
    let missing = missing.unwrap_or_default().iter().map(ToString::to_string).collect();
    Ok((namespace, missing))
}

/// What the interface should be.
fn expected(port: &ObservedPort, namespace: &NetNs) -> Option<PodPort> {
    let (owner, lease) = crate::cni::owner::parse(&port.owner)?;
    let v4 = lease.addresses.iter().find_map(|a| match a {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    });
    let v6 = lease.addresses.iter().find_map(|a| match a {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    });
    Some(PodPort {
        netns: namespace.path()?.to_owned(),
        interface: owner.interface.parse().ok()?,
        host_interface: port.host_interface.clone(),
        owner: port.owner.clone(),
        v4,
        v6,
        mtu: 0,
        mac: Some(port.pod_mac),
        ports: vec![],
        bandwidth: Default::default(),
    })
}

/// What the interface lacks of the pod that has this address; nothing when no pod here has it.
pub(super) fn target(programs: Arc<Programs>, address: IpAddr) -> Option<Vec<String>> {
    let network = LinuxPodNetwork::new(NetNs::current(), programs);
    let ports = network.list().unwrap_or_default();
    let has = |port: &&ObservedPort| {
        crate::cni::owner::parse(&port.owner)
            .is_some_and(|(_, lease)| lease.addresses.contains(&address))
    };
    let port = ports.iter().find(has)?;
    let Some(namespace) = NetNs::with_device(port.pod_mac).ok().flatten() else {
        return Some(vec!["nobody runs in its network namespace".to_owned()]);
    };
    let missing = expected(port, &namespace).and_then(|port| network.check(&port).ok());
    Some(missing.unwrap_or_default().iter().map(ToString::to_string).collect())
}

/// Workers that packets and names need and that do not answer their agent.
pub(super) async fn silent_workers(dns: &Client, overlay: &Overlay) -> Vec<String> {
    let dns = tokio::time::timeout(ANSWER, dns.get::<serde_json::Value>());
    let overlay_kind = overlay.kind();
    let overlay = tokio::time::timeout(ANSWER, overlay.status());
    let (dns, overlay) = tokio::join!(dns, overlay);
    let mut silent = Vec::new();
    if !matches!(dns, Ok(Ok(_))) {
        silent.push(crate::workers::DNS.to_owned());
    }
    if overlay_kind == Kind::User && !matches!(overlay, Ok(Ok(_))) {
        silent.push(crate::workers::OVERLAY.to_owned());
    }
    silent
}

/// Sysctls that are off and should not be.
pub(super) fn forwarding_off() -> Vec<String> {
    let off = |name: &&str| sysctl::read(name).is_some_and(|value| value == "0");
    FORWARDING.into_iter().filter(off).map(str::to_owned).collect()
}
