//! Pod traffic, and what a stranger on the underlay sees of it.

use std::collections::HashSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::world::{Side, World, enter, inside};

/// In every block of every stream and datagram.
pub(crate) const CANARY: &[u8] = b"MESH-CANARY-51c3";

/// No test waits longer for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

const BLOCK: usize = 64 << 10;

/// Block `n` of a stream: recognisable, and different from all others.
fn block(n: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    let mut word = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    bytes.extend(CANARY);
    while bytes.len() < BLOCK {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n);
        bytes.extend(word.to_le_bytes());
    }
    bytes.truncate(BLOCK);
    bytes
}

/// A stream under way.
pub(crate) struct Stream {
    pub(crate) received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<(u64, Duration)>,
}

impl Stream {
    /// Sends from the pod of one side to the pod of the other until told to stop.
    pub(crate) fn start(world: &World, from: Side, v6: bool, port: u16) -> Self {
        let to = SocketAddr::new(from.other().pod(v6), port);
        Self::between(world.name("pod", from), &world.name("pod", from.other()), to)
    }

    /// Sends from one namespace to an address in another until told to stop.
    pub(crate) fn between(from: String, into: &str, to: SocketAddr) -> Self {
        let listener = inside(into, || TcpListener::bind(to).unwrap());
        let received = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::clone(&received);
        let receiver = std::thread::spawn(move || receive(&listener, &count));
        let ended = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            enter(&from);
            send(to, &ended)
        });
        Self { received, stop, sender, receiver }
    }

    /// Waits until that many bytes more have arrived.
    pub(crate) fn wait_for(&self, bytes: u64) {
        let goal = self.received.load(Ordering::Relaxed) + bytes;
        let end = Instant::now() + LIMIT;
        while self.received.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < end, "the stream stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the stream; all that was sent has arrived, unaltered. Returns bytes, and the longest pause.
    pub(crate) fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let (received, pause) = self.receiver.join().unwrap();
        assert_eq!(received, sent);
        (received, pause)
    }
}

fn send(to: SocketAddr, stop: &AtomicBool) -> u64 {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&block(sent / BLOCK as u64)).unwrap();
        sent += BLOCK as u64;
    }
    sent
}

fn receive(listener: &TcpListener, count: &AtomicU64) -> (u64, Duration) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut bytes = vec![0; BLOCK];
    let (mut received, mut pause) = (0, Duration::ZERO);
    loop {
        let begun = Instant::now();
        match stream.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return (received, pause),
            Err(error) => panic!("after {received} bytes: {error}"),
        }
        pause = pause.max(begun.elapsed());
        assert!(bytes == block(received / BLOCK as u64), "altered after {received} bytes");
        received += BLOCK as u64;
        count.store(received, Ordering::Relaxed);
    }
}

/// Sends datagrams of many sizes to an echo in the other pod; all come back unaltered.
pub(crate) fn echo(world: &World, from: Side, v6: bool, port: u16) {
    let to = SocketAddr::new(from.other().pod(v6), port);
    let server = world.inside("pod", from.other(), || UdpSocket::bind(to).unwrap());
    server.set_read_timeout(Some(LIMIT)).unwrap();
    // Up to the MTU of 1420, and beyond: those travel in fragments inside the tunnel.
    let headers = if v6 { 48 } else { 28 };
    let sizes = [16, 100, 1000, 1420 - headers - 1, 1420 - headers, 1421 - headers, 4000, 20_000];
    let echoing = world.spawn("pod", from.other(), move || {
        let mut bytes = vec![0; 65_536];
        for _ in sizes {
            let (n, peer) = server.recv_from(&mut bytes).unwrap();
            server.send_to(&bytes[..n], peer).unwrap();
        }
    });
    world.inside("pod", from, move || {
        let any: IpAddr = from.pod(v6);
        let client = UdpSocket::bind((any, 0)).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = vec![0; 65_536];
        for size in sizes {
            let payload: Vec<u8> = CANARY.iter().copied().cycle().take(size).collect();
            client.send_to(&payload, to).unwrap();
            let n = client.recv(&mut answer).unwrap();
            assert!(answer[..n] == payload, "{size} bytes came back altered");
        }
    });
    echoing.join().unwrap();
}

/// Numbered datagrams under way.
pub(crate) struct Sequence {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Vec<u64>>,
}

/// What came of them.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) sent: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
}

impl Sequence {
    /// Sends one each millisecond from the pod of one side to the pod of the other until told to stop.
    pub(crate) fn start(world: &World, from: Side, port: u16) -> Self {
        let to = SocketAddr::new(from.other().pod(false), port);
        Self::between(world.name("pod", from), &world.name("pod", from.other()), to)
    }

    /// Sends one each millisecond from one namespace to an address in another until told to stop.
    pub(crate) fn between(from: String, into: &str, to: SocketAddr) -> Self {
        let server = inside(into, || UdpSocket::bind(to).unwrap());
        server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        // What is counted is lost on the way, not here.
        setsockopt(&server, sockopt::RcvBufForce, &(8 << 20)).unwrap();
        let receiver = std::thread::spawn(move || {
            let (mut numbers, mut bytes) = (Vec::new(), [0; 256]);
            // Ends when nothing has come for long after the last.
            while let Ok(n) = server.recv(&mut bytes) {
                let number = bytes[..n].last_chunk().expect("datagrams of ours");
                numbers.push(u64::from_le_bytes(*number));
            }
            numbers
        });
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            enter(&from);
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            let mut sent = 0u64;
            while !ended.load(Ordering::Relaxed) {
                let number = sent.to_le_bytes();
                client.send_to(&[CANARY, &number].concat(), to).unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        Self { stop, sender, receiver }
    }

    pub(crate) fn finish(self) -> Arrived {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let numbers = self.receiver.join().unwrap();
        let unique: HashSet<_> = numbers.iter().collect();
        Arrived {
            sent,
            lost: sent - unique.len() as u64,
            repeated: (numbers.len() - unique.len()) as u64,
        }
    }
}

/// Reads all that passes a node's underlay interface.
pub(crate) struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Seen>,
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) frames: u64,
    pub(crate) tunnel: u64,
    /// Handshakes that were begun.
    pub(crate) initiations: u64,
    pub(crate) canaries: u64,
    pub(crate) fragments: u64,
    /// Neither ARP, nor ICMP, nor the tunnel.
    pub(crate) strange: u64,
}

impl Capture {
    pub(crate) fn start(world: &World, side: Side) -> Self {
        Self::on(&world.name("node", side), "ul0")
    }

    /// Reads all that passes an interface of a namespace.
    pub(crate) fn on(namespace: &str, interface: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let all = libc::ETH_P_ALL as u16;
        let socket = inside(namespace, move || {
            // Nothing is received before it is bound to the interface.
            let socket = Socket::new(Domain::PACKET, Type::RAW, None).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            bind_to_interface(&socket, interface, all);
            socket
        });
        let reader = std::thread::spawn(move || {
            let mut seen = Seen::default();
            let mut frame = vec![0; 1 << 17];
            while !ended.load(Ordering::Relaxed) {
                if let Ok(n) = (&socket).read(&mut frame) {
                    seen.look(&frame[..n]);
                }
            }
            seen
        });
        Self { stop, reader }
    }

    pub(crate) fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().unwrap()
    }
}

impl Seen {
    fn look(&mut self, frame: &[u8]) {
        self.frames += 1;
        self.canaries += u64::from(frame.windows(CANARY.len()).any(|window| window == CANARY));
        let port = |at: usize| {
            frame.get(at + 2..at + 4).is_some_and(|port| port == 51900u16.to_be_bytes())
        };
        match frame.get(12..14) {
            Some([0x08, 0x00]) => {
                self.fragments += u64::from(frame[20] & 0x3f != 0 || frame[21] != 0);
                match frame[23] {
                    17 if port(34) => {
                        self.tunnel += 1;
                        self.initiations += u64::from(frame.get(42..46) == Some(&[1, 0, 0, 0]));
                    }
                    1 => {} // "port unreachable" while a worker is away
                    _ => self.strange += 1,
                }
            }
            Some([0x86, 0xdd]) => match frame[20] {
                17 if port(54) => self.tunnel += 1,
                58 | 0 => {}
                44 => self.fragments += 1,
                _ => self.strange += 1,
            },
            Some([0x08, 0x06]) => {}
            _ => self.strange += 1,
        }
    }

    /// Nothing but sealed packets, none of them in fragments.
    pub(crate) fn assert_sealed(&self) {
        assert!(self.tunnel > 0, "{self:?}");
        assert_eq!((self.canaries, self.fragments, self.strange), (0, 0, 0), "{self:?}");
    }
}

fn bind_to_interface(socket: &Socket, name: &str, protocol: u16) {
    let index = nix::net::if_::if_nametoindex(name).unwrap();
    // SAFETY: sockaddr_ll is plain data for which all zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as i32;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: bind reads a sockaddr_ll of this length, which lives here.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
