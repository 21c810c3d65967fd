//! `meshctl trace`, this node's part: a probe from a pod, and what the node knows about its way.
//!
//! The probe is an ordinary connection or datagram of the pod's namespace and the node's cgroup, so that it meets every hook
//! that the pod's own would. Its own address and port are its mark: every node was told of them before ([`marks`]), and its
//! programs tell what they decide ([`steps`]). A probe of a client outside is given to the program on the uplink ([`outside`]).

mod facts;
mod marks;
mod name;
mod outside;
mod steps;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_kernel::traces::socket_cookie;
use mesh_kernel::{NetNs, Programs};
use mesh_model::snapshot::{DnsTarget, Protocol};
use mesh_model::trace::{
    LONGEST_WAIT_MS, NameAnswer, Outcome, ServiceFacts, TraceQuery, TraceReport,
};
use mesh_model::{ObjectKey, Snapshot};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, UdpSocket};

pub(crate) use facts::ANSWER;
pub(crate) use marks::{MarkError, Marks};
pub(crate) use outside::{OutsideError, run as from_outside};
pub(crate) use steps::{Sources, collect};

/// A trace that could not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
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
    marks: &Marks,
) -> Result<TraceReport, ProbeError> {
    if query.wait_ms == 0 || query.wait_ms > LONGEST_WAIT_MS {
        return Err(ProbeError::Wait);
    }
    let programs = programs.ok_or(ProbeError::NoPrograms)?;
    let pod = query.pod.clone();
    let found = tokio::task::spawn_blocking(move || facts::find(programs, &pod)).await;
    let (namespace, missing) = found.map_err(|_| ProbeError::NoPod(query.pod.clone()))??;
    let (name, resolved) = resolve(snapshot, &namespace, &query).await;
    let target = resolved.as_ref().and_then(|all| all.first().copied());
    let asked = target.map(|address| SocketAddr::new(address, query.port));
    let begun_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    let start = Instant::now();
    let limit = Duration::from_millis(query.wait_ms.into());
    let probed = match asked {
        Some(to) => {
            let probe = Probe { namespace: &namespace, to, query: &query, marks, limit };
            Some(probe.send().await)
        }
        None => None,
    };
    Ok(TraceReport {
        node: snapshot.node.name.clone(),
        begun_us: u64::try_from(begun_us).unwrap_or_default(),
        took_us: u64::try_from(start.elapsed().as_micros()).unwrap_or_default(),
        missing,
        failures,
        resolved,
        name,
        service: asked.and_then(|asked| service(snapshot, asked, query.protocol)),
        reached: probed.as_ref().and_then(|(source, _)| marks.chosen(*source)),
        source: probed.as_ref().and_then(|(source, _)| *source),
        asked,
        outcome: probed.map(|(_, outcome)| outcome),
    })
}

/// What the DNS server says, and the addresses to try, IPv4 first.
async fn resolve(
    snapshot: &Snapshot,
    namespace: &NetNs,
    query: &TraceQuery,
) -> (Option<NameAnswer>, Option<Vec<IpAddr>>) {
    if let Ok(address) = query.host.parse() {
        return (None, Some(vec![address]));
    }
    let known = known(snapshot, &query.pod.namespace, &query.host);
    let names = match &known {
        Some((full, _)) => vec![full.clone()],
        None => name::candidates(&query.host, &query.pod.namespace, &snapshot.dns.domain),
    };
    let answer = match snapshot.cluster.dns_vips.first() {
        Some(server) => name::ask(namespace, SocketAddr::new(*server, 53), &names).await,
        None => NameAnswer::Failed("the cluster has no DNS address".to_owned()),
    };
    let addresses = match (&answer, known) {
        (NameAnswer::Addresses(_), Some((_, known))) if !known.is_empty() => Some(known),
        (NameAnswer::Addresses(told), _) => Some(told.clone()),
        _ => None,
    };
    (Some(answer), addresses)
}

/// The full name and the addresses of a service, by its name as a pod of `namespace` may write it.
fn known(snapshot: &Snapshot, namespace: &str, host: &str) -> Option<(String, Vec<IpAddr>)> {
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
    Some((format!("{name}.{namespace}.svc.{}", snapshot.dns.domain), addresses))
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

/// A connection or a datagram.
struct Probe<'p> {
    namespace: &'p NetNs,
    to: SocketAddr,
    query: &'p TraceQuery,
    marks: &'p Marks,
    limit: Duration,
}

type Probed = io::Result<(Option<SocketAddr>, Outcome)>;

impl Probe<'_> {
    /// The probe's own address, if it had one, and what came of it.
    async fn send(&self) -> (Option<SocketAddr>, Outcome) {
        let result = match self.query.protocol {
            Protocol::Udp => self.datagram().await,
            _ => self.stream().await,
        };
        result.unwrap_or_else(|error| (None, outcome(&error)))
    }

    /// Bound before it is connected: so its port is known whatever becomes of it.
    fn own(&self) -> SocketAddr {
        let any: IpAddr = match self.to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        SocketAddr::new(any, self.query.source_port)
    }

    async fn stream(&self) -> Probed {
        let open = || if self.to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = self.namespace.run(open)??;
        socket.bind(self.own())?;
        let source = socket.local_addr().ok();
        self.marks.add_socket(source, socket_cookie(&socket)?);
        let connected = tokio::time::timeout(self.limit, socket.connect(self.to)).await;
        let outcome = match connected {
            Ok(Ok(mut stream)) => {
                if self.query.bytes > 0 {
                    // What becomes of them the programs tell, not the socket: it would only go on trying.
                    let _ = stream.write_all(&vec![b'm'; self.query.bytes.into()]).await;
                    tokio::time::sleep(self.limit / 4).await;
                }
                Outcome::Answered
            }
            Ok(Err(error)) => outcome(&error),
            Err(_) => Outcome::TimedOut,
        };
        Ok((source, outcome))
    }

    async fn datagram(&self) -> Probed {
        let own = self.own();
        let socket = self.namespace.run(|| std::net::UdpSocket::bind(own))??;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        let source = socket.local_addr().ok();
        self.marks.add_socket(source, socket_cookie(&socket)?);
        let mut text = b"mesh trace\n".to_vec();
        text.resize(text.len().max(self.query.bytes.into()), b'm');
        let ask = async {
            socket.connect(self.to).await?;
            socket.send(&text).await?;
            socket.recv(&mut [0; 64]).await
        };
        let outcome = match tokio::time::timeout(self.limit, ask).await {
            Ok(Ok(_)) => Outcome::Answered,
            Ok(Err(error)) => outcome(&error),
            Err(_) => Outcome::Silent,
        };
        Ok((source, outcome))
    }
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
            known(&snapshot, namespace, host).map(|(full, all)| (full, all[0].to_string()))
        };
        let web = ("web.shop.svc.cluster.local".to_owned(), "10.96.0.1".to_owned());
        for name in [
            "web.shop",
            "web.shop.svc",
            "web.shop.svc.cluster.local",
            "web.shop.svc.cluster.local.",
        ] {
            assert_eq!(first("default", name), Some(web.clone()), "{name}");
        }
        assert_eq!(first("shop", "web"), Some(web));
        assert_eq!(first("default", "web"), None);
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
        let (here, marks) = (NetNs::current(), Marks::default());
        let probe = async |to, protocol, millis| {
            let query = TraceQuery {
                pod: ObjectKey::new("default", "a"),
                host: String::new(),
                port: 0,
                protocol,
                wait_ms: 0,
                source_port: 0,
                bytes: 0,
            };
            let limit = Duration::from_millis(millis);
            Probe { namespace: &here, to, query: &query, marks: &marks, limit }.send().await
        };
        let (source, outcome) = probe(open, Protocol::Tcp, 5000).await;
        assert_eq!(outcome, Outcome::Answered);
        assert_eq!(listener.accept().unwrap().1.port(), source.unwrap().port());
        drop(listener);
        assert_eq!(probe(open, Protocol::Tcp, 5000).await.1, Outcome::Refused);
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = silent.local_addr().unwrap();
        assert_eq!(probe(to, Protocol::Udp, 50).await.1, Outcome::Silent);
    }
}
