//! A worker and its agent are killed and replaced, and no client is refused.
//!
//! ```text
//!   clients ──> one TCP and one UDP socket on loopback
//!                 read by: worker process (this program again), restarted, replaced
//!                 held by: `keep` in a task, which ends as an agent does that is killed: its descriptors close
//! ```
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use mesh_tests::rig::{self, PATIENCE, Rig, eventually};
use mesh_worker::{Control, Descriptors, Handler, SocketSpec, Transport};
use tokio::signal::unix::{SignalKind, signal};

// The worker: answers every client with its process number, the socket's inode and its configuration.

fn specs(address: SocketAddr) -> [SocketSpec; 2] {
    let of = |transport| SocketSpec { transport, address, copy: 0 };
    let udp = Transport::Udp { receive_buffer_bytes: 1 << 20 };
    [of(Transport::Tcp { backlog: 1024 }), of(udp)]
}

#[derive(Default)]
struct Word(std::sync::Mutex<String>);

impl Handler for Word {
    type Config = String;
    type Status = u32;

    async fn apply(&self, config: String) -> Result<(), String> {
        *self.0.lock().unwrap() = config;
        Ok(())
    }

    async fn status(&self) -> u32 {
        std::process::id()
    }
}

#[tokio::main(flavor = "current_thread")]
async fn worker(dir: &Path, address: SocketAddr) {
    let mut inherited = Descriptors::inherited().unwrap();
    let mut kept = Descriptors::default();
    let [tcp, udp] = specs(address).map(|spec| kept.socket(&spec, &mut inherited).unwrap());
    let inode = fs::read_link(format!("/proc/self/fd/{}", tcp.as_raw_fd())).unwrap();
    let tcp = tokio::net::TcpListener::from_std(tcp.into()).unwrap();
    let udp = tokio::net::UdpSocket::from_std(udp.into()).unwrap();
    let control = Control::new(dir.join("w.sock"), dir.join("w.json"), kept);
    let word = Arc::new(Word::default());
    control.restore(&*word).await;
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let say = || {
        let word = word.0.lock().unwrap();
        format!("{} {} {word}", std::process::id(), inode.display())
    };
    let serve = async {
        control.configured().await;
        let mut buffer = [0; 64];
        loop {
            tokio::select! {
                accepted = tcp.accept() => {
                    let mut stream = accepted.unwrap().0.into_std().unwrap();
                    stream.set_nonblocking(false).unwrap();
                    let _ = stream.write_all(say().as_bytes());
                }
                got = udp.recv_from(&mut buffer) => {
                    let (_, from) = got.unwrap();
                    let _ = udp.try_send_to(say().as_bytes(), from);
                }
            }
        }
    };
    tokio::select! {
        never = serve => never,
        _ = control.serve(Arc::clone(&word)) => {}
        _ = terminate.recv() => {}
    }
}

/// Not a test: what the tests start as a process, by `env`.
#[test]
#[ignore = "the worker process of the other tests"]
fn worker_process() {
    let Some(dir) = rig::worker_dir() else { return };
    worker(&dir, std::env::var("ADDRESS").unwrap().parse().unwrap());
}

/// Not a test: an agent that can be killed at any moment.
#[tokio::test]
#[ignore = "the agent process of the other tests"]
async fn agent_process() {
    let Some(dir) = rig::worker_dir() else { return };
    let word = |name: &str| std::env::var(name).unwrap();
    let address: SocketAddr = word("ADDRESS").parse().unwrap();
    let variables = [("ADDRESS", address.to_string())];
    let rig = ManuallyDrop::new(Rig::in_folder(dir, specs(address).to_vec(), &variables));
    mesh_worker::supervise::keep(rig.spec(word("GENERATION").parse().unwrap())).await;
}

// The tests.

struct Site {
    rig: Rig,
    address: SocketAddr,
}

impl Site {
    fn new(name: &str) -> Self {
        let address = rig::free_address();
        let variables = [("ADDRESS", address.to_string())];
        Self { rig: Rig::new(name, specs(address).to_vec(), &variables), address }
    }

    fn ask(&self) -> Answer {
        let mut stream =
            TcpStream::connect_timeout(&self.address, PATIENCE).expect("nobody is refused");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        Answer::new(&text).unwrap()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    pid: i32,
    socket: String,
    word: String,
}

impl Answer {
    fn new(text: &str) -> Option<Self> {
        let mut words = text.split(' ').map(str::to_owned);
        let (pid, socket) = (words.next()?.parse().ok()?, words.next()?);
        Some(Self { pid, socket, word: words.next()? })
    }
}

/// Asks over TCP and UDP until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicUsize,
    cut: AtomicUsize,
    datagrams: AtomicUsize,
    datagrams_lost: AtomicUsize,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let site = |stop: &Arc<AtomicBool>, counts: &Arc<Counts>, work: fn(SocketAddr, &Counts)| {
            let (stop, counts) = (Arc::clone(stop), Arc::clone(counts));
            thread::spawn(move || {
                while !stop.load(SeqCst) {
                    work(address, &counts);
                    thread::sleep(Duration::from_millis(2));
                }
            })
        };
        let threads = vec![
            site(&stop, &counts, over_tcp),
            site(&stop, &counts, over_tcp),
            site(&stop, &counts, over_udp),
        ];
        Self { stop, threads, counts }
    }

    /// Waits until some more have been answered.
    async fn goes_on(&self) {
        let answered = || self.counts.answered.load(SeqCst);
        let before = answered();
        eventually("clients are answered", async || answered() > before + 20).await;
    }

    /// Panics when a client was refused.
    fn finish(self) -> Arc<Counts> {
        self.stop.store(true, SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        self.counts
    }
}

fn over_tcp(address: SocketAddr, counts: &Counts) {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).expect("nobody is refused");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    let answer = stream.read_to_string(&mut text).ok().and_then(|_| Answer::new(&text));
    match answer {
        Some(answer) => {
            assert_eq!(answer.word, "ready", "nothing is answered without a configuration");
            counts.answered.fetch_add(1, SeqCst);
        }
        None => drop(counts.cut.fetch_add(1, SeqCst)),
    }
}

fn over_udp(address: SocketAddr, counts: &Counts) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(b"?", address).unwrap();
    let mut buffer = [0; 256];
    match socket.recv(&mut buffer) {
        Ok(_) => counts.datagrams.fetch_add(1, SeqCst),
        Err(_) => counts.datagrams_lost.fetch_add(1, SeqCst),
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_the_worker_refuses_nobody() {
    const KILLS: usize = 8;
    let mut site = Site::new("killed");
    site.rig.keep(0);
    site.rig.configure(&"ready").await;
    let socket = site.ask().socket;
    let load = Load::start(site.address);
    for _ in 0..KILLS {
        load.goes_on().await;
        site.rig.kill_worker().await;
    }
    load.goes_on().await;
    let counts = load.finish();
    // What a killed process had read is lost with it: at most one request of each client.
    assert!(counts.cut.load(SeqCst) <= 2 * KILLS, "{counts:?}");
    assert!(counts.datagrams_lost.load(SeqCst) <= KILLS, "{counts:?}");
    assert_eq!(site.ask().socket, socket, "the very same socket all the time");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_agent_gets_the_sockets_back_from_the_worker() {
    const AGENTS: usize = 3;
    let mut site = Site::new("agents");
    site.rig.keep(0);
    site.rig.configure(&"ready").await;
    let first = site.ask();
    let load = Load::start(site.address);
    for _ in 0..AGENTS {
        site.rig.kill_agent().await;
        site.rig.keep(0).changed().await;
        site.rig.kill_worker().await;
        load.goes_on().await;
    }
    let counts = load.finish();
    assert!(counts.cut.load(SeqCst) <= 2 * AGENTS, "{counts:?}");
    let last = site.ask();
    assert_eq!(last.socket, first.socket);
    assert_ne!(last.pid, first.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_loses_nothing_at_all() {
    let mut site = Site::new("replaced");
    site.rig.keep(0);
    site.rig.configure(&"ready").await;
    let load = Load::start(site.address);
    for generation in 1..=5 {
        let old = site.rig.pid().unwrap();
        load.goes_on().await;
        site.rig.kill_agent().await;
        site.rig.keep(generation);
        eventually("the old one is gone", async || !rig::exists(old)).await;
        load.goes_on().await;
    }
    let counts = load.finish();
    assert_eq!((counts.cut.load(SeqCst), counts.datagrams_lost.load(SeqCst)), (0, 0), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_never_serves_leaves_the_old_one_in_place() {
    let mut site = Site::new("hopeless");
    site.rig.keep(0);
    site.rig.configure(&"ready").await;
    let old = site.ask();
    site.rig.kill_agent().await;

    // It takes the control socket's place, and then dies without a configuration.
    let mut hopeless = site.rig.spec(1);
    let socket = site.rig.control_socket().display().to_string();
    let script = "import os, socket; s = socket.socket(socket.AF_UNIX); s.bind('$.new'); s.listen(); \
                  os.rename('$.new', '$')";
    hopeless.program = "/usr/bin/python3".into();
    hopeless.args = vec!["-c".to_owned(), script.replace('$', &socket)];
    let identity_file = hopeless.identity_file.clone();
    site.rig.keep_spec(hopeless);
    eventually("the old one is the worker again", async || {
        fs::read_to_string(&identity_file).unwrap().contains("python3")
            && site.rig.pid() == Some(old.pid)
    })
    .await;
    assert_eq!(site.rig.client().get::<i32>().await.unwrap(), old.pid, "it can be reached");
    site.rig.configure(&"changed").await;
    assert_eq!(site.ask(), Answer { word: "changed".to_owned(), ..old });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_cannot_read_what_was_saved_waits_for_its_configuration() {
    let mut site = Site::new("unreadable");
    site.rig.keep(0);
    site.rig.configure(&"ready").await;
    let old = site.rig.pid().unwrap();
    site.rig.kill_agent().await;
    fs::write(site.rig.dir.join("w.json"), "from another version").unwrap();
    let load = Load::start(site.address);
    let known = site.rig.keep(1);
    // The old one, then the new one, which the agent configures as it does whenever a worker is new to it.
    known.changed().await;
    eventually("the new one answers", async || {
        site.rig.client().get::<i32>().await.is_ok_and(|pid| pid != old)
    })
    .await;
    load.goes_on().await;
    assert!(rig::exists(old), "it serves until the new one can");
    site.rig.configure(&"ready").await;
    eventually("the old one is gone", async || !rig::exists(old)).await;
    load.goes_on().await;
    let counts = load.finish();
    assert_eq!((counts.cut.load(SeqCst), counts.datagrams_lost.load(SeqCst)), (0, 0), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_may_be_killed_at_any_moment_of_a_replacement() {
    const AGENTS: usize = 60;
    let site = Site::new("chaos");
    let mut agent = site.rig.agent_process(0);
    site.rig.configure(&"ready").await;
    let load = Load::start(site.address);
    let mut seen = BTreeSet::new();
    for generation in 1..=AGENTS {
        agent.kill().unwrap();
        agent.wait().unwrap();
        agent = site.rig.agent_process(generation);
        // From before it does anything to after it has done everything, in uneven steps.
        thread::sleep(Duration::from_micros((generation * 7919 % AGENTS * 1000) as u64));
        seen.extend(site.rig.pid());
    }
    let settled = async || {
        let identity = fs::read_to_string(site.rig.dir.join("w.pid")).unwrap_or_default();
        let last = identity.contains(&format!("GENERATION={AGENTS}\""));
        last && site.rig.client().get::<i32>().await.ok() == site.rig.pid()
    };
    eventually("the last generation serves", settled).await;
    let now = site.rig.pid().unwrap();
    eventually("all others are gone", async || {
        seen.iter().all(|pid| *pid == now || !rig::exists(*pid)) && workers(&site.rig.dir) == [now]
    })
    .await;
    load.goes_on().await;
    agent.kill().unwrap();
    agent.wait().unwrap();
    let counts = load.finish();
    println!("{} workers: {counts:?}", seen.len());
    assert_eq!((counts.cut.load(SeqCst), counts.datagrams_lost.load(SeqCst)), (0, 0), "{counts:?}");
}

/// All processes that are workers of this folder, also those that nobody knows.
fn workers(dir: &Path) -> Vec<i32> {
    let mark = format!("MESH_RIG={}", dir.display());
    let is_worker = |pid: &i32| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let has =
            |bytes: Vec<u8>, word: &str| bytes.split(|b| *b == 0).any(|w| w == word.as_bytes());
        has(read("environ"), &mark) && has(read("cmdline"), "worker_process")
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|p| p.file_name().to_str()?.parse().ok()).filter(is_worker).collect()
}
