//! `meshctl trace`, this node's part: a probe from a pod, and what the node knows about its way.
//!
//! The probe is an ordinary connection or datagram of the pod's namespace and the node's cgroup, so that it meets every hook
//! that the pod's own would. It is known on every node by its source address and port: what becomes of it there, flows tell.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_kernel::pods::{LinuxPodNetwork, ObservedPort, PodNetwork as _, PodPort};
use mesh_kernel::{NetNs, Programs};
use mesh_model::snapshot::{DnsTarget, Protocol};
use mesh_model::trace::{LONGEST_WAIT_MS, Outcome, ServiceFacts, TraceQuery, TraceReport};
use mesh_model::{ObjectKey, Snapshot};
use tokio::net::{TcpSocket, UdpSocket};

/// A trace that could not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    #[error("a probe waits for 1 to {LONGEST_WAIT_MS} ms")]
    Wait,
    #[error("the eBPF programs are not loaded: see `meshctl check`")]
    NoPrograms,
    #[error("pod {0} has no interface on this node")]
    NoPod(ObjectKey),
    #[error("the network namespace of pod {0} cannot be entered: is it running?")]
    NoNamespace(ObjectKey),
}

/// Sends the probe.
pub(crate) async fn run(
    query: TraceQuery,
    snapshot: &Snapshot,
    programs: Option<Arc<Programs>>,
    failures: Vec<String>,
) -> Result<TraceReport, TraceError> {
    if query.wait_ms == 0 || query.wait_ms > LONGEST_WAIT_MS {
        return Err(TraceError::Wait);
    }
    let programs = programs.ok_or(TraceError::NoPrograms)?;
    let pod = query.pod.clone();
    let found = tokio::task::spawn_blocking(move || find(programs, &pod)).await;
    let (namespace, missing) = found.map_err(|_| TraceError::NoPod(query.pod.clone()))??;
    let resolved = resolve(snapshot, &query.pod.namespace, &query.host);
    let target = resolved.as_ref().and_then(|all| all.first().copied());
    let asked = target.map(|address| SocketAddr::new(address, query.port));
    let begun_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    let start = Instant::now();
    let limit = Duration::from_millis(query.wait_ms.into());
    let probed = match asked {
        Some(to) => Some(probe(&namespace, to, query.protocol, limit).await),
        None => None,
    };
    Ok(TraceReport {
        node: snapshot.node.name.clone(),
        begun_us: u64::try_from(begun_us).unwrap_or_default(),
        took_us: u64::try_from(start.elapsed().as_micros()).unwrap_or_default(),
        missing,
        failures,
        resolved,
        service: asked.and_then(|asked| service(snapshot, asked, query.protocol)),
        source: probed.as_ref().and_then(|(source, _)| *source),
        asked,
        outcome: probed.map(|(_, outcome)| outcome),
    })
}

/// The pod's namespace, and what its interface lacks.
fn find(programs: Arc<Programs>, pod: &ObjectKey) -> Result<(NetNs, Vec<String>), TraceError> {
    let network = LinuxPodNetwork::new(NetNs::current(), programs);
    let ports = network.list().unwrap_or_default();
    let name = pod.to_string();
    let is_it = |port: &&ObservedPort| port.owner.split(' ').nth(3) == Some(name.as_str());
    let port = ports.iter().find(is_it).ok_or_else(|| TraceError::NoPod(pod.clone()))?;
    let namespace = NetNs::with_device(port.pod_mac).ok().flatten();
    let namespace = namespace.ok_or_else(|| TraceError::NoNamespace(pod.clone()))?;
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

/// Addresses of a literal, or of a service's name as a pod of `namespace` may write it, IPv4 first.
fn resolve(snapshot: &Snapshot, namespace: &str, host: &str) -> Option<Vec<IpAddr>> {
    if let Ok(address) = host.parse() {
        return Some(vec![address]);
    }
    let short = host.trim_end_matches('.');
    let short = short.strip_suffix(&format!(".{}", snapshot.dns.domain)).unwrap_or(short);
    let short = short.strip_suffix(".svc").unwrap_or(short);
    let (name, namespace) = short.split_once('.').unwrap_or((short, namespace));
    let key = ObjectKey::new(namespace, name);
    let service = snapshot.dns.services.iter().find(|service| service.key == key)?;
    let mut addresses = match &service.target {
        DnsTarget::ClusterIp { addresses, .. } => addresses.clone(),
        DnsTarget::Headless { endpoints } => endpoints.iter().map(|e| e.address).collect(),
        DnsTarget::ExternalName(_) => vec![],
    };
    addresses.sort_by_key(IpAddr::is_ipv6);
    (!addresses.is_empty()).then_some(addresses)
}

fn service(snapshot: &Snapshot, asked: SocketAddr, protocol: Protocol) -> Option<ServiceFacts> {
    let here = || snapshot.frontends.iter().filter(|f| f.vip == asked.ip());
    let any = here().next()?;
    let of_protocol = || here().filter(|f| f.protocol == protocol);
    let exact = of_protocol().find(|f| f.port == asked.port());
    let backend = |b: &mesh_model::snapshot::Backend| SocketAddr::new(b.address, b.port);
    Some(ServiceFacts {
        name: exact.unwrap_or(any).service.clone(),
        ports: of_protocol().map(|f| f.port).collect(),
        backends: exact.map(|f| f.backends.iter().map(backend).collect()),
        affinity_secs: exact.and_then(|f| f.affinity_secs),
    })
}

/// The probe's own address, if it had one, and what came of it.
async fn probe(
    namespace: &NetNs,
    to: SocketAddr,
    protocol: Protocol,
    limit: Duration,
) -> (Option<SocketAddr>, Outcome) {
    let result = match protocol {
        Protocol::Udp => datagram(namespace, to, limit).await,
        _ => stream(namespace, to, limit).await,
    };
    result.unwrap_or_else(|error| (None, outcome(&error)))
}

type Probed = io::Result<(Option<SocketAddr>, Outcome)>;

async fn stream(namespace: &NetNs, to: SocketAddr, limit: Duration) -> Probed {
    let open = || if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = namespace.run(open)??;
    // Bound before it is connected: so its port is known whatever becomes of it.
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    socket.bind(SocketAddr::new(any, 0))?;
    let source = socket.local_addr().ok();
    let outcome = match tokio::time::timeout(limit, socket.connect(to)).await {
        Ok(Ok(_)) => Outcome::Answered,
        Ok(Err(error)) => outcome(&error),
        Err(_) => Outcome::TimedOut,
    };
    Ok((source, outcome))
}

async fn datagram(namespace: &NetNs, to: SocketAddr, limit: Duration) -> Probed {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = namespace.run(|| std::net::UdpSocket::bind(any))??;
    socket.set_nonblocking(true)?;
    let socket = UdpSocket::from_std(socket)?;
    let source = socket.local_addr().ok();
    let ask = async {
        socket.connect(to).await?;
        socket.send(b"mesh trace\n").await?;
        socket.recv(&mut [0; 64]).await
    };
    let outcome = match tokio::time::timeout(limit, ask).await {
        Ok(Ok(_)) => Outcome::Answered,
        Ok(Err(error)) => outcome(&error),
        Err(_) => Outcome::Silent,
    };
    Ok((source, outcome))
}

fn outcome(error: &io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Outcome::Refused,
        Some(libc::ETIMEDOUT) => Outcome::TimedOut,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN) => Outcome::Unreachable,
        Some(libc::EMSGSIZE) => Outcome::TooLarge,
        _ => Outcome::Other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use mesh_model::snapshot::{Backend, DnsService, FULL_WEIGHT, Frontend, FrontendKind};
    use mesh_model::{Objects, compile};

    fn snapshot() -> Snapshot {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        let key = ObjectKey::new("shop", "web");
        let addresses = vec!["fd10:96::1".parse().unwrap(), "10.96.0.1".parse().unwrap()];
        let target = DnsTarget::ClusterIp { addresses, ports: vec![] };
        let dns = Arc::make_mut(&mut snapshot.dns);
        dns.domain = "cluster.local".to_owned();
        dns.services = vec![Arc::new(DnsService { key: key.clone(), target })];
        let frontend = |port, protocol, backends| Frontend {
            vip: "10.96.0.1".parse().unwrap(),
            protocol,
            port,
            kind: FrontendKind::ClusterIp,
            service: key.clone(),
            port_name: String::new(),
            affinity_secs: None,
            backends,
            leaving: vec![],
        };
        let address = "10.244.2.7".parse().unwrap();
        let backend = Backend { address, port: 8080, node: None, weight: FULL_WEIGHT };
        let frontends =
            [frontend(80, Protocol::Tcp, vec![backend]), frontend(53, Protocol::Udp, vec![])];
        snapshot.frontends = Arc::new(frontends.map(Arc::new).into());
        snapshot
    }

    #[test]
    fn names_resolve_as_in_a_pod() {
        let snapshot = snapshot();
        let first = |namespace: &str, host: &str| {
            resolve(&snapshot, namespace, host).map(|all| all[0].to_string())
        };
        for name in [
            "web.shop",
            "web.shop.svc",
            "web.shop.svc.cluster.local",
            "web.shop.svc.cluster.local.",
        ] {
            assert_eq!(first("default", name).as_deref(), Some("10.96.0.1"), "{name}");
        }
        assert_eq!(first("shop", "web").as_deref(), Some("10.96.0.1"));
        assert_eq!(first("default", "web"), None);
        assert_eq!(first("default", "fd10:96::9").as_deref(), Some("fd10:96::9"));
    }

    #[test]
    fn a_service_tells_its_ports_and_backends() {
        let snapshot = snapshot();
        let facts = |asked: &str, protocol| service(&snapshot, asked.parse().unwrap(), protocol);
        let web = facts("10.96.0.1:80", Protocol::Tcp).unwrap();
        assert_eq!(web.backends, Some(vec!["10.244.2.7:8080".parse().unwrap()]));
        let wrong = facts("10.96.0.1:81", Protocol::Tcp).unwrap();
        assert_eq!((wrong.ports, wrong.backends), (vec![80], None));
        assert_eq!(facts("10.96.0.1:53", Protocol::Udp).unwrap().backends, Some(vec![]));
        assert_eq!(facts("10.96.0.2:80", Protocol::Tcp), None);
    }

    #[tokio::test]
    async fn a_probe_says_what_came_of_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let here = NetNs::current();
        let limit = Duration::from_secs(5);
        let (source, outcome) = probe(&here, open, Protocol::Tcp, limit).await;
        assert_eq!(outcome, Outcome::Answered);
        assert_eq!(listener.accept().unwrap().1.port(), source.unwrap().port());
        drop(listener);
        assert_eq!(probe(&here, open, Protocol::Tcp, limit).await.1, Outcome::Refused);
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = silent.local_addr().unwrap();
        let short = Duration::from_millis(50);
        assert_eq!(probe(&here, to, Protocol::Udp, short).await.1, Outcome::Silent);
    }
}
