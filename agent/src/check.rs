//! `POST /mesh/v1/check`: this node probes every hop that its traffic takes, with real packets.
//!
//! Peers over the overlay, service addresses through the socket hook, DNS on its own address and on the service
//! address, the local proxy, the local pods. Each probe is bounded; all run at the same time.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;
use mesh_model::report::CheckStep;
use mesh_model::snapshot::{FrontendKind, Protocol};
use mesh_model::wellknown;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

pub(crate) mod question;

/// What a probe may take.
const LIMIT: Duration = Duration::from_secs(2);
/// Probes at the same time: a node with a thousand services must not need a thousand sockets for this.
const AT_ONCE: usize = 64;

/// One thing to try.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Probe {
    hop: &'static str,
    target: String,
    way: Way,
    cure: String,
}

/// How to try it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// A TCP connection can be opened.
    Connect(SocketAddr),
    /// The server answers for the name without an error.
    Resolve(SocketAddr, String),
    /// The server answers HTTP, whatever it says.
    Http(SocketAddr),
}

/// Probes everything that `snapshot` says this node can reach. `ingress` are the proxy's own listeners.
pub(crate) async fn run(snapshot: &Snapshot, ingress: &[SocketAddr]) -> Vec<CheckStep> {
    let probes = plan(snapshot, ingress);
    futures_util::stream::iter(probes.into_iter().map(step)).buffered(AT_ONCE).collect().await
}

fn plan(snapshot: &Snapshot, ingress: &[SocketAddr]) -> Vec<Probe> {
    let mut probes = peers(snapshot);
    probes.extend(dns(snapshot));
    probes.extend(services(snapshot));
    probes.extend(ingress.iter().map(|address| Probe {
        hop: "ingress",
        target: address.to_string(),
        way: Way::Http(*address),
        cure: "is the ingress worker running? see its log and `meshctl routes ingress`".to_owned(),
    }));
    probes.extend(pods(snapshot));
    probes
}

fn peers(snapshot: &Snapshot) -> Vec<Probe> {
    let mut probes = Vec::new();
    for peer in snapshot.peers.iter() {
        for block in &peer.allowed_ips {
            let address = node_overlay_address(block);
            probes.push(Probe {
                hop: "overlay",
                target: format!("{} ({address})", peer.node),
                way: Way::Connect(SocketAddr::new(address, wellknown::AGENT_PORT)),
                cure: format!(
                    "see `meshctl peers`: without a handshake, UDP port {} does not get through; with one, look at \
                     the agent on {}",
                    snapshot.cluster.overlay_port, peer.node
                ),
            });
        }
    }
    probes
}

fn dns(snapshot: &Snapshot) -> Vec<Probe> {
    let name = format!("kubernetes.default.svc.{}", snapshot.cluster.domain);
    let own = IpAddr::from(wellknown::NODE_LOCAL_ADDRESS);
    let vips = snapshot.cluster.dns_vips.iter().copied();
    std::iter::once(own)
        .chain(vips)
        .map(|server| Probe {
            hop: "dns",
            target: format!("{name} at {server}"),
            way: Way::Resolve(SocketAddr::new(server, 53), name.clone()),
            cure: if server == own {
                "is the DNS worker running? see its log".to_owned()
            } else {
                "the socket hooks do not translate: see `meshctl services -n kube-system`"
                    .to_owned()
            },
        })
        .collect()
}

fn services(snapshot: &Snapshot) -> Vec<Probe> {
    let connectable = snapshot.frontends.iter().filter(|f| {
        f.protocol == Protocol::Tcp && f.kind == FrontendKind::ClusterIp && !f.backends.is_empty()
    });
    connectable
        .map(|f| Probe {
            hop: "vip",
            target: format!("{} {}", f.service, SocketAddr::new(f.vip, f.port)),
            way: Way::Connect(SocketAddr::new(f.vip, f.port)),
            cure: format!(
                "do its endpoints listen? see `meshctl services -n {}`",
                f.service.namespace
            ),
        })
        .collect()
}

/// The ready pods of this node, by the first TCP port that they declare.
fn pods(snapshot: &Snapshot) -> Vec<Probe> {
    snapshot.pods.iter().filter_map(|work| pod(&work.pod)).collect()
}

fn pod(pod: &k8s_openapi::api::core::v1::Pod) -> Option<Probe> {
    let status = pod.status.as_ref()?;
    let conditions = status.conditions.iter().flatten();
    conditions.clone().find(|c| c.type_ == "Ready" && c.status == "True")?;
    let address: IpAddr = status.pod_ip.as_deref()?.parse().ok()?;
    let containers = &pod.spec.as_ref()?.containers;
    let mut ports = containers.iter().flat_map(|c| c.ports.iter().flatten());
    let port = ports.find(|p| Protocol::parse(p.protocol.as_deref()) == Some(Protocol::Tcp))?;
    let name = pod.metadata.name.as_deref()?;
    let namespace = pod.metadata.namespace.as_deref()?;
    let address = SocketAddr::new(address, u16::try_from(port.container_port).ok()?);
    Some(Probe {
        hop: "pod",
        target: format!("{namespace}/{name} {address}"),
        way: Way::Connect(address),
        cure: format!("see `meshctl logs -n {namespace} {name}`"),
    })
}

async fn step(probe: Probe) -> CheckStep {
    let started = Instant::now();
    let outcome = match tokio::time::timeout(LIMIT, attempt(&probe.way)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no answer in {} s", LIMIT.as_secs())),
    };
    let (ok, detail) = match outcome {
        Ok(()) => (true, format!("{:.1} ms", started.elapsed().as_secs_f64() * 1000.0)),
        Err(why) => (false, why),
    };
    let cure = if ok { String::new() } else { probe.cure };
    CheckStep { hop: probe.hop.to_owned(), target: probe.target, ok, detail, cure }
}

async fn attempt(way: &Way) -> Result<(), String> {
    match way {
        Way::Connect(address) => {
            TcpStream::connect(address).await.map(drop).map_err(|e| e.to_string())
        }
        Way::Resolve(server, name) => resolve(*server, name).await,
        Way::Http(address) => http(*address).await.map_err(|e| e.to_string()),
    }
}

async fn resolve(server: SocketAddr, name: &str) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let local: IpAddr = match server {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(local, 0)).await.map_err(text)?;
    socket.connect(server).await.map_err(text)?;
    socket.send(&question::encode(name)).await.map_err(text)?;
    let mut answer = [0; 512];
    let n = socket.recv(&mut answer).await.map_err(text)?;
    question::verdict(&answer[..n])
}

async fn http(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"HEAD / HTTP/1.1\r\nHost: check.invalid\r\nConnection: close\r\n\r\n")
        .await?;
    let mut start = [0; 5];
    stream.read_exact(&mut start).await?;
    if &start == b"HTTP/" { Ok(()) } else { Err(std::io::Error::other("the answer is not HTTP")) }
}

#[cfg(test)]
mod tests {
    use mesh_model::{NodeName, Objects};
    use serde_json::json;

    use super::*;

    fn snapshot() -> Snapshot {
        let node = |name: &str, block: &str, key: &str| {
            std::sync::Arc::new(
                serde_json::from_value(json!({
                    "metadata": {"name": name, "annotations": {"mesh.dev/wireguard-public-key": key}},
                    "spec": {"podCIDR": block},
                    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}))
                .unwrap(),
            )
        };
        let objects = Objects {
            nodes: vec![
                node("a", "10.244.0.0/24", "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="),
                node("b", "10.244.1.0/24", "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="),
            ],
            ..Objects::default()
        };
        mesh_model::compile(&objects, &"a".parse::<NodeName>().unwrap())
    }

    #[test]
    fn every_kind_of_hop_is_planned() {
        let probes = plan(&snapshot(), &["127.0.0.1:80".parse().unwrap()]);
        let hops: Vec<&str> = probes.iter().map(|p| p.hop).collect();
        assert_eq!(hops, ["overlay", "dns", "dns", "dns", "ingress"]);
        assert_eq!(probes[0].way, Way::Connect("10.244.1.1:10250".parse().unwrap()));
    }

    #[tokio::test]
    async fn a_probe_tells_what_went_wrong_and_the_cure() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let probe = |way| Probe { hop: "x", target: "y".into(), way, cure: "do this".into() };
        let refused = step(probe(Way::Connect(free))).await;
        assert!(!refused.ok && refused.cure == "do this", "{refused:?}");
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = silent.local_addr().unwrap();
        let late = step(probe(Way::Resolve(server, "a.b".into()))).await;
        assert!(!late.ok && late.detail.contains("no answer"), "{late:?}");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let open = step(probe(Way::Connect(listener.local_addr().unwrap()))).await;
        assert!(open.ok && open.cure.is_empty(), "{open:?}");
    }
}
