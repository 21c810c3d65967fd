//! The server is killed and replaced under load: every question gets an answer.
//!
//! ```text
//!   clients ── UDP, TCP ──> loopback ──> worker process (this program again) ── UDP ──> an upstream of the test
//! ```
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use mesh_dns::{DnsConfig, WorkerOptions};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{DnsService, DnsTarget, DnsZone};
use mesh_tests::rig::{self, PATIENCE, Rig, eventually};
use nix::sys::signal::Signal;

const WEB: &str = "web.default.svc.cluster.local.";

/// Not a test: what the tests start as a process.
#[test]
#[ignore = "the worker process of the other tests"]
fn worker_process() {
    let Some(dir) = rig::worker_dir() else { return };
    let options = WorkerOptions {
        control_socket: dir.join("w.sock"),
        state_file: dir.join("w.json"),
        listen: vec![std::env::var("ADDRESS").unwrap().parse().unwrap()],
    };
    mesh_dns::run(options).unwrap();
}

fn start(name: &str) -> (Rig, SocketAddr) {
    let address = rig::free_address();
    let variables = [("ADDRESS", address.to_string())];
    let mut rig = Rig::new(name, mesh_dns::sockets(&[address]), &variables);
    rig.keep(0);
    (rig, address)
}

fn config(upstreams: Vec<SocketAddr>) -> DnsConfig {
    let target =
        DnsTarget::ClusterIp { addresses: vec!["10.96.0.7".parse().unwrap()], ports: vec![] };
    let zone = DnsZone {
        domain: "cluster.local".to_owned(),
        namespaces: vec!["default".to_owned()],
        pod_cidrs: vec![],
        services: vec![Arc::new(DnsService { key: ObjectKey::new("default", "web"), target })],
    };
    DnsConfig { zone, upstreams }
}

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// Asks once; nothing when there is no answer within `limit`.
fn over_udp(address: SocketAddr, limit: Duration) -> Option<Message> {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(limit)).unwrap();
    socket.send_to(&question(WEB), address).unwrap();
    let mut buffer = [0; 512];
    let n = socket.recv(&mut buffer).ok()?;
    Some(Message::from_vec(&buffer[..n]).unwrap())
}

/// Asks on a new connection; nothing when it is cut.
fn over_tcp(address: SocketAddr) -> Option<Message> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).expect("nobody is refused");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let question = question(WEB);
    let length = u16::try_from(question.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], &question].concat()).ok()?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).ok()?;
    Some(Message::from_vec(&answer).unwrap())
}

/// Clients that ask without pause, and how many of their questions were answered at the first try.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<()>>,
    answered: Arc<AtomicUsize>,
    unanswered: Arc<AtomicUsize>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (answered, unanswered) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let clients = (0..4).map(|client| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            let unanswered = Arc::clone(&unanswered);
            thread::spawn(move || {
                while !stop.load(SeqCst) {
                    let answer = match client {
                        0 => over_tcp(address),
                        _ => over_udp(address, Duration::from_secs(3)),
                    };
                    match answer {
                        Some(answer) => {
                            let code = answer.metadata.response_code;
                            assert_eq!((code, answer.answers.len()), (ResponseCode::NoError, 1));
                            answered.fetch_add(1, SeqCst);
                        }
                        None => drop(unanswered.fetch_add(1, SeqCst)),
                    }
                }
            })
        });
        Self { clients: clients.collect(), stop, answered, unanswered }
    }

    async fn goes_on(&self) {
        let before = self.answered.load(SeqCst);
        eventually("questions are answered", async || self.answered.load(SeqCst) > before + 100)
            .await;
    }

    /// How many were answered and how many were not. Panics when one was refused or answered wrongly.
    fn finish(self) -> (usize, usize) {
        self.stop.store(true, SeqCst);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        (self.answered.load(SeqCst), self.unanswered.load(SeqCst))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_the_server_loses_only_what_it_had_read() {
    const KILLS: usize = 5;
    let (rig, address) = start("dns-killed");
    rig.started().await;
    // Asked before there are names: it waits for them.
    let early = thread::spawn(move || over_udp(address, PATIENCE));
    rig.configure(&config(vec![])).await;
    assert_eq!(early.join().unwrap().unwrap().answers.len(), 1);
    let load = Load::start(address);
    for _ in 0..KILLS {
        load.goes_on().await;
        rig.kill_worker().await;
    }
    load.goes_on().await;
    let (answered, unanswered) = load.finish();
    println!("{answered} answered, {unanswered} lost with {KILLS} killed servers");
    // At most what each client had under way; another try is answered.
    assert!(unanswered <= 4 * KILLS, "{unanswered}");
    assert!(over_udp(address, PATIENCE).is_some() && over_tcp(address).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn replacing_the_server_loses_no_question() {
    let (mut rig, address) = start("dns-replaced");
    rig.configure(&config(vec![])).await;
    let load = Load::start(address);
    for generation in 1..=5 {
        let old = rig.pid().unwrap();
        load.goes_on().await;
        rig.kill_agent().await;
        rig.keep(generation);
        eventually("the old one is gone", async || !rig::exists(old)).await;
        load.goes_on().await;
    }
    let (answered, unanswered) = load.finish();
    println!("{answered} answered, {unanswered} lost");
    assert_eq!(unanswered, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_was_read_is_answered_before_the_end() {
    let upstream = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (mut rig, address) = start("dns-drained");
    rig.configure(&config(vec![upstream.local_addr().unwrap()])).await;
    rig.kill_agent().await;
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send_to(&question("slow.example."), address).unwrap();
    upstream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 512];
    let (n, from) = upstream.recv_from(&mut buffer).unwrap();

    let pid = rig.pid().unwrap();
    rig.signal(Signal::SIGTERM);
    eventually("the sockets are closed", async || {
        TcpStream::connect_timeout(&address, PATIENCE).is_err()
    })
    .await;
    assert!(rig::exists(pid), "it waits for the answer");
    let mut answer = Message::from_vec(&buffer[..n]).unwrap();
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.response_code = ResponseCode::NXDomain;
    upstream.send_to(&answer.to_vec().unwrap(), from).unwrap();
    let n = client.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..n]).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    eventually("it has ended", async || !rig::exists(pid)).await;
}
