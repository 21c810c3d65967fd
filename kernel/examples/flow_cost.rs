//! What flow events cost: throughput of one TCP stream and connections in a second between two pods of a node, with and
//! without a reader, in turns.
//!
//! ```text
//! cargo run --release -p mesh-kernel --example flow_cost [ROUNDS]
//! ```
//!
//! Needs root. One pair of rounds is one ratio; what counts is the median of the ratios, because the machine has other things
//! to do.
#![allow(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing to clean up but what Drop does"
)]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_kernel::flows::{FlowReader, Settings};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::{IfName, Programs};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[path = "../tests/lab.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod lab;
use lab::{Lab, Net};

const ROUND: Duration = Duration::from_millis(700);

/// Two pods of a node, and this process in the node's cgroup.
struct Bench {
    programs: Arc<Programs>,
    pods: [Net; 2],
    node: Net,
    _lab: Lab,
}

/// Whatever happens, the cgroup can be removed afterwards.
struct InCgroup;

impl Drop for InCgroup {
    fn drop(&mut self) {
        let root = mesh_kernel::bpf::cgroup2_mount().unwrap();
        let _ = std::fs::write(root.join("cgroup.procs"), "0");
    }
}

fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(15, |n| n.parse().unwrap());
    assert!(lab::privileged(), "needs root, eBPF programs and cgroup v2");
    let bench = Bench::new();
    std::fs::write(bench._lab.cgroup.join("cgroup.procs"), "0").unwrap();
    let _inside = InCgroup;
    bench.compare(rounds, "throughput, MB/s", throughput);
    bench.compare(rounds, "connections/s", connections);
}

impl Bench {
    fn new() -> Self {
        let (lab, node, pods) = (Lab::new(), Net::new(), [Net::new(), Net::new()]);
        let programs = Arc::new(lab.load());
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        for (pod, number) in pods.iter().zip(5..) {
            let name = format!("pod-{number}");
            let port = PodPort {
                netns: pod.path(),
                interface: "eth0".parse().unwrap(),
                host_interface: IfName::for_pod(&name, "eth0"),
                owner: name,
                v4: Some(Ipv4Addr::new(10, 244, 1, number)),
                v6: None,
                mtu: 1420,
                mac: None,
                ports: vec![],
                bandwidth: Default::default(),
            };
            network.attach(&port).unwrap();
        }
        Self { programs, pods, node, _lab: lab }
    }

    fn compare(&self, rounds: usize, what: &str, measure: impl Fn(SocketAddr, &Net) -> f64) {
        let listener = self.pods[0].run(|| TcpListener::bind("10.244.1.5:0")).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener));
        let mut ratios = vec![];
        let (mut all_on, mut all_off) = (vec![], vec![]);
        let mut events = 0;
        for round in 0..rounds {
            let on = || self.with_reader(|| measure(address, &self.pods[1]));
            let off = || {
                // The same work before: on a busy machine, who has just paused runs first.
                drop(self.open());
                measure(address, &self.pods[1])
            };
            // In turns also within a pair: who comes second has a warmer machine.
            let ((with, told), without) = if round % 2 == 0 {
                let with = on();
                (with, off())
            } else {
                let without = off();
                (on(), without)
            };
            events += told;
            ratios.push(with / without);
            all_on.push(with);
            all_off.push(without);
        }
        let lost = self.open().tally().unwrap().lost;
        println!(
            "{what}: with {:.0}, without {:.0}, ratio {:.3} (of {rounds} pairs), {events} events read, {lost} lost",
            median(&mut all_on),
            median(&mut all_off),
            median(&mut ratios),
        );
    }

    fn open(&self) -> FlowReader {
        FlowReader::open(&self.programs, &self.node.handle(), Settings::default()).unwrap()
    }

    /// As the agent reads: asleep until there is something, then a while for more to come.
    fn with_reader(&self, work: impl FnOnce() -> f64) -> (f64, usize) {
        let mut reader = self.open();
        let ends = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut events = 0;
                while !ends.load(Ordering::Relaxed) {
                    let mut waiting = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
                    poll(&mut waiting, PollTimeout::from(50_u16)).unwrap();
                    std::thread::sleep(Duration::from_millis(10));
                    events += std::iter::from_fn(|| reader.next_event()).count();
                }
                events
            });
            let result = work();
            ends.store(true, Ordering::Relaxed);
            (result, reading.join().unwrap())
        })
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Reads a stream to its end and answers with a byte.
fn serve(listener: &TcpListener) {
    let mut buffer = vec![0; 1 << 18];
    for mut stream in listener.incoming().flatten() {
        while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
        let _ = stream.write_all(b"x");
    }
}

fn throughput(address: SocketAddr, pod: &Net) -> f64 {
    let mut stream = pod.run(|| TcpStream::connect_timeout(&address, lab::PATIENCE)).unwrap();
    let (block, start, mut sent) = (vec![0; 1 << 18], Instant::now(), 0_usize);
    while start.elapsed() < ROUND {
        stream.write_all(&block).unwrap();
        sent += block.len();
    }
    finish(&mut stream);
    sent as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn connections(address: SocketAddr, pod: &Net) -> f64 {
    let work = || {
        let (start, mut done) = (Instant::now(), 0_u32);
        while start.elapsed() < ROUND {
            finish(&mut TcpStream::connect_timeout(&address, lab::PATIENCE).unwrap());
            done += 1;
        }
        f64::from(done) / start.elapsed().as_secs_f64()
    };
    pod.run(work)
}

/// Says that it is done and waits until the other side is: so it is not this side that waits out the connection's end.
fn finish(stream: &mut TcpStream) {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut rest = [0; 8];
    while stream.read(&mut rest).is_ok_and(|n| n > 0) {}
}
