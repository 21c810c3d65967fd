//! The proxy is killed and replaced under load: no client is refused, none is answered without routes.
//!
//! ```text
//!   clients ── HTTP/1.1 ──> loopback ──> worker process (this program again) ──> backend of the test
//! ```
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use mesh_ingress::WorkerOptions;
use mesh_model::ObjectKey;
use mesh_model::snapshot::{HttpRoute, L7Config, PathMatch};
use mesh_tests::rig::{self, PATIENCE, Rig, eventually};

const THREADS: usize = 2;
const DRAIN: Duration = Duration::from_secs(4);

/// Not a test: what the tests start as a process.
#[test]
#[ignore = "the worker process of the other tests"]
fn worker_process() {
    let Some(dir) = rig::worker_dir() else { return };
    let mut options = WorkerOptions::new(dir.join("w.sock"), dir.join("w.json"));
    options.http = vec![std::env::var("ADDRESS").unwrap().parse().unwrap()];
    options.https = vec![];
    options.proxy.threads = THREADS;
    options.proxy.timeouts.drain = DRAIN;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(mesh_ingress::run(options)).unwrap();
}

/// Answers requests, and echoes what comes after an upgrade.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some(head) = head(&mut reader) {
                    if head.to_ascii_lowercase().contains("upgrade: websocket") {
                        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
                        let _ = stream.write_all(answer.as_bytes());
                        let _ = std::io::copy(&mut reader, &mut stream);
                        return;
                    }
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                }
            });
        }
    });
    address
}

fn head(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

fn start(name: &str) -> (Rig, SocketAddr) {
    let address = rig::free_address();
    let sockets = mesh_ingress::sockets(&[address], &[], THREADS);
    let mut rig = Rig::new(name, sockets, &[("ADDRESS", address.to_string())]);
    rig.keep(0);
    (rig, address)
}

fn routes() -> L7Config {
    let route = HttpRoute {
        ingress: ObjectKey::new("web", "test"),
        host: None,
        path: PathMatch::Prefix("/".into()),
        service: ObjectKey::new("web", "test"),
        port: 80,
        backends: vec![backend()],
    };
    L7Config { routes: vec![route], certificates: vec![] }
}

/// One client's connection.
struct Client {
    address: SocketAddr,
    kept: Option<BufReader<TcpStream>>,
}

impl Client {
    fn connect(address: SocketAddr) -> BufReader<TcpStream> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("nobody is refused");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        BufReader::new(stream)
    }

    /// One request, on the kept connection when there is one. Whether it was answered; panics when it was not with
    /// what the backend said.
    fn ask(&mut self, keep: bool) -> bool {
        let mut stream = self.kept.take().unwrap_or_else(|| Self::connect(self.address));
        let connection = if keep { "keep-alive" } else { "close" };
        let request = format!("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: {connection}\r\n\r\n");
        if stream.get_mut().write_all(request.as_bytes()).is_err() {
            return false;
        }
        let Some(head) = head(&mut stream) else { return false };
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let closes = head.to_ascii_lowercase().contains("connection: close");
        let read = stream.read_exact(&mut [0; 2]);
        self.kept = (keep && !closes).then_some(stream);
        read.is_ok()
    }
}

/// Clients that ask without pause: half of them on new connections, half on kept ones.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<()>>,
    answered: Arc<AtomicUsize>,
    cut: Arc<AtomicUsize>,
}

impl Load {
    const CLIENTS: usize = 4;

    fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (answered, cut) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let clients = (0..Self::CLIENTS).map(|n| {
            let (stop, answered, cut) =
                (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&cut));
            let mut client = Client { address, kept: None };
            thread::spawn(move || {
                while !stop.load(SeqCst) {
                    let count = if client.ask(n % 2 == 0) { &answered } else { &cut };
                    count.fetch_add(1, SeqCst);
                }
            })
        });
        Self { clients: clients.collect(), stop, answered, cut }
    }

    async fn goes_on(&self) {
        let before = self.answered.load(SeqCst);
        eventually("requests are answered", async || self.answered.load(SeqCst) > before + 100)
            .await;
    }

    /// How many were answered, and how many were cut off. Panics when one was refused or answered otherwise.
    fn finish(self) -> (usize, usize) {
        self.stop.store(true, SeqCst);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        (self.answered.load(SeqCst), self.cut.load(SeqCst))
    }
}

/// An upgraded connection.
fn websocket(address: SocketAddr) -> BufReader<TcpStream> {
    let mut stream = Client::connect(address);
    let request =
        "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    assert!(head(&mut stream).unwrap().starts_with("HTTP/1.1 101 "));
    stream
}

fn echoes(stream: &mut BufReader<TcpStream>) -> bool {
    let mut back = [0; 4];
    stream.get_mut().write_all(b"ping").is_ok() && stream.read_exact(&mut back).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_the_proxy_refuses_nobody_and_answers_nobody_without_routes() {
    const KILLS: usize = 5;
    let (rig, address) = start("ingress-killed");
    rig.started().await;
    // Asked before there are routes: it waits for them.
    let early = thread::spawn(move || Client { address, kept: None }.ask(false));
    rig.configure(&routes()).await;
    assert!(early.join().unwrap());
    let load = Load::start(address);
    for _ in 0..KILLS {
        load.goes_on().await;
        rig.kill_worker().await;
    }
    load.goes_on().await;
    let (answered, cut) = load.finish();
    println!("{answered} answered, {cut} cut off with {KILLS} killed proxies");
    // At most what each client had under way.
    assert!(cut <= Load::CLIENTS * KILLS, "{cut}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replacing_the_proxy_fails_no_request_and_keeps_tunnels_for_the_drain_time() {
    let (mut rig, address) = start("ingress-replaced");
    rig.configure(&routes()).await;
    let load = Load::start(address);
    let mut replaced = Vec::new();
    for generation in 1..=5 {
        let (old, mut tunnel) = (rig.pid().unwrap(), websocket(address));
        load.goes_on().await;
        rig.kill_agent().await;
        rig.keep(generation);
        eventually("there is a new one", async || rig.pid() != Some(old)).await;
        load.goes_on().await;
        assert!(echoes(&mut tunnel), "a tunnel outlives the replacement");
        replaced.push((old, tunnel));
    }
    for (old, mut tunnel) in replaced {
        eventually("a tunnel ends in the end", async || !echoes(&mut tunnel)).await;
        eventually("the old one is gone", async || !rig::exists(old)).await;
    }
    let (answered, cut) = load.finish();
    println!("{answered} answered, {cut} failed");
    assert_eq!(cut, 0);
}
