//! The whole server on loopback: real sockets, real messages, a second server as its upstream.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use mesh_dns::{DnsConfig, DnsStatus, WorkerOptions};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{DnsEndpoint, DnsPort, DnsService, DnsTarget, DnsZone, Protocol};
use mesh_worker::Client;

struct Server {
    address: SocketAddr,
    client: Client,
    _dir: tempfile::TempDir,
}

/// On an address that no other test uses: on a shared one, somebody may take the port before the server does.
fn free_address() -> SocketAddr {
    static TAKEN: AtomicU8 = AtomicU8::new(0);
    let own = Ipv4Addr::new(127, 53, TAKEN.fetch_add(1, Ordering::Relaxed), 1);
    UdpSocket::bind((own, 0)).unwrap().local_addr().unwrap()
}

impl Server {
    /// The worker ends with the test process: it has no other end than a signal.
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = free_address();
        let server = Self { address, client: Client::new(dir.path().join("dns.sock")), _dir: dir };
        server.spawn(server._dir.path());
        server
    }

    fn spawn(&self, dir: &Path) {
        let options = WorkerOptions {
            control_socket: dir.join("dns.sock"),
            state_file: dir.join("dns.json"),
            listen: vec![self.address],
        };
        std::thread::spawn(move || mesh_dns::run(options).unwrap());
    }

    async fn configure(&self, zone: DnsZone, upstreams: Vec<SocketAddr>) {
        let config = DnsConfig { zone, upstreams };
        for _ in 0..500 {
            if self.client.set(&config).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the server never took its configuration");
    }

    fn udp(&self, question: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        socket.send_to(question, self.address).unwrap();
        let mut buffer = vec![0; 65_535];
        let n = socket.recv(&mut buffer).ok()?;
        buffer.truncate(n);
        Some(buffer)
    }

    fn ask(&self, name: &str, kind: RecordType) -> Message {
        let answer = self.udp(&message(name, kind, None)).expect("an answer");
        Message::from_vec(&answer).unwrap()
    }

    fn tcp(&self, question: &[u8]) -> Message {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(5)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(&u16::try_from(question.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(question).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        Message::from_vec(&answer).unwrap()
    }
}

fn message(name: &str, kind: RecordType, payload: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.edns = Some(edns);
    }
    message.to_vec().unwrap()
}

fn zone(domain: &str, endpoints: u8) -> DnsZone {
    let key = |name: &str| ObjectKey::new("default", name);
    let port = DnsPort { name: "http".to_owned(), protocol: Protocol::Tcp, port: 80 };
    DnsZone {
        domain: domain.to_owned(),
        namespaces: vec!["default".to_owned()],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        services: [
            DnsService {
                key: key("web"),
                target: DnsTarget::ClusterIp {
                    addresses: vec!["10.96.0.7".parse().unwrap(), "fd10:96::7".parse().unwrap()],
                    ports: vec![port.clone()],
                },
            },
            DnsService {
                key: key("many"),
                target: DnsTarget::Headless {
                    endpoints: (1..=endpoints)
                        .map(|i| DnsEndpoint {
                            address: std::net::Ipv4Addr::new(10, 244, 1, i).into(),
                            hostname: Some(format!("many-{i}")),
                            ports: vec![port.clone()],
                        })
                        .collect(),
                },
            },
            DnsService {
                key: key("alias"),
                target: DnsTarget::ExternalName("web.default.svc.upstream.test".to_owned()),
            },
        ]
        .map(std::sync::Arc::new)
        .into(),
    }
}

fn addresses(message: &Message) -> Vec<String> {
    let mut all: Vec<String> = message
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(a) => Some(a.0.to_string()),
            RData::AAAA(a) => Some(a.0.to_string()),
            _ => None,
        })
        .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_answered_here_or_upstream() {
    let upstream = Server::start();
    upstream.configure(zone("upstream.test", 3), vec![]).await;
    let server = Server::start();
    server.configure(zone("cluster.local", 200), vec![upstream.address]).await;

    let web = "web.default.svc.cluster.local.";
    let a = server.ask(web, RecordType::A);
    assert_eq!(addresses(&a), ["10.96.0.7"]);
    assert!(a.metadata.authoritative && a.metadata.recursion_available);
    assert_eq!(
        addresses(&server.ask("WEB.Default.svc.CLUSTER.local.", RecordType::AAAA)),
        ["fd10:96::7"]
    );
    let srv = server.ask(&format!("_http._tcp.{web}"), RecordType::SRV);
    assert!(
        matches!(&srv.answers[0].data, RData::SRV(s) if s.port == 80 && s.target.to_ascii() == web)
    );
    assert_eq!(srv.additionals.len(), 2, "the addresses of the target");
    let ptr = server.ask("7.0.96.10.in-addr.arpa.", RecordType::PTR);
    assert!(matches!(&ptr.answers[0].data, RData::PTR(p) if p.to_ascii() == web));

    let absent = server.ask("nosuch.default.svc.cluster.local.", RecordType::A);
    assert_eq!(absent.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(absent.authorities.len(), 1, "with the SOA");
    let nodata = server.ask(web, RecordType::MX);
    assert_eq!((nodata.metadata.response_code, nodata.answers.len()), (ResponseCode::NoError, 0));

    let forwarded = server.ask("web.default.svc.upstream.test.", RecordType::A);
    assert_eq!(addresses(&forwarded), ["10.96.0.7"]);
    let negative = server.ask("no.default.svc.upstream.test.", RecordType::A);
    assert_eq!(negative.metadata.response_code, ResponseCode::NXDomain);
    let alias = server.ask("alias.default.svc.cluster.local.", RecordType::A);
    assert_eq!((alias.answers.len(), addresses(&alias)), (2, vec!["10.96.0.7".to_owned()]));

    let status: DnsStatus = server.client.get().await.unwrap();
    assert!(status.zone_answers >= 7 && status.forwarded >= 3, "{status:?}");
    let never: DnsStatus = upstream.client.get().await.unwrap();
    assert_eq!(
        never.forwarded + never.refused,
        0,
        "no name of the cluster went upstream: {never:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_are_cut_and_come_whole_over_tcp() {
    let server = Server::start();
    server.configure(zone("cluster.local", 200), vec![]).await;
    let many = "many.default.svc.cluster.local.";
    for (payload, limit) in [(None, 512), (Some(1232), 1232), (Some(65_000), 1232)] {
        let answer = server.udp(&message(many, RecordType::A, payload)).unwrap();
        assert!(answer.len() <= limit, "{} for {payload:?}", answer.len());
        assert!(Message::from_vec(&answer).unwrap().metadata.truncation);
    }
    let whole = server.tcp(&message(many, RecordType::A, None));
    assert_eq!(addresses(&whole).len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_questions_are_refused_and_the_next_one_answered() {
    let server = Server::start();
    server.configure(zone("cluster.local", 3), vec![]).await;
    let good = message("web.default.svc.cluster.local.", RecordType::A, None);
    let mut two = Message::from_vec(&good).unwrap();
    two.add_query(Query::query(Name::from_ascii("a.").unwrap(), RecordType::A));
    let two = Message::from_vec(&server.udp(&two.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!(two.metadata.response_code, ResponseCode::FormErr);

    let mut update = good.clone();
    update[2] = 5 << 3; // opcode UPDATE
    let refused = Message::from_vec(&server.udp(&update).unwrap());
    assert!(refused.is_ok_and(|m| m.metadata.response_code != ResponseCode::NoError));
    assert_eq!(
        server.ask("example.org.", RecordType::A).metadata.response_code,
        ResponseCode::Refused,
        "no upstream server"
    );

    let probe = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut seed = 0x2545_f491_u32;
    for round in 0..2000 {
        let mut noise = good.clone();
        for _ in 0..=round % 5 {
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            let at = seed as usize % noise.len();
            noise[at] = (seed >> 16) as u8;
        }
        noise.truncate(1 + seed as usize % noise.len());
        probe.send_to(&noise, server.address).unwrap();
    }
    assert_eq!(addresses(&server.ask("web.default.svc.cluster.local.", RecordType::A)).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_answers_from_the_saved_names() {
    let server = Server::start();
    server.configure(zone("cluster.local", 3), vec![]).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(server._dir.path().join("dns.json"), dir.path().join("dns.json")).unwrap();
    let address = free_address();
    let client = Client::new(dir.path().join("dns.sock"));
    let successor = Server { address, client, _dir: dir };
    successor.spawn(successor._dir.path());
    for _ in 0..500 {
        if successor.client.get::<DnsStatus>().await.is_ok() {
            let answer = successor.ask("web.default.svc.cluster.local.", RecordType::A);
            assert_eq!(addresses(&answer), ["10.96.0.7"]);
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the successor never came up");
}
