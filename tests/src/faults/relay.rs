//! A UDP relay with faults: each side sends to its entrance, and what survives leaves from the other's.
//!
//! ```text
//!   a --> entrance of a | wire | entrance of b --> b
//!   a <-- entrance of a | wire | entrance of b <-- b
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Arrival, Faults, Wire};

/// How soon new faults, a rebinding and the end are noticed.
const LOOK: Duration = Duration::from_millis(5);

/// A relay that runs until it is dropped. It stays in the network namespace of the thread that started it.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Faults of the two directions, and what people look at.
#[derive(Debug)]
struct Shared {
    /// Of what side 0 sends, and of what side 1 sends; none: nothing passes.
    faults: Mutex<[Option<Faults>; 2]>,
    /// Where side 0 and side 1 send to.
    entrances: Mutex<[SocketAddr; 2]>,
    rebind: [AtomicBool; 2],
    carried: [AtomicU64; 2],
    ended: AtomicBool,
}

impl Relay {
    /// Starts between two endpoints, with sockets on `local`. Nothing goes wrong before [`set`](Self::set).
    pub fn start(seed: u64, local: IpAddr, sides: [SocketAddr; 2]) -> io::Result<Self> {
        let sockets = [bind(local)?, bind(local)?];
        let entrances = [sockets[0].local_addr()?, sockets[1].local_addr()?];
        let shared = Arc::new(Shared {
            faults: Mutex::new([Some(Faults::default()); 2]),
            entrances: Mutex::new(entrances),
            rebind: Default::default(),
            carried: Default::default(),
            ended: AtomicBool::new(false),
        });
        let wires = [Wire::new(seed), Wire::new(seed ^ u64::MAX)];
        let body = Arc::clone(&shared);
        let mut at_work =
            Work { shared: body, local, sockets, sides, wires, queue: BinaryHeap::new() };
        let thread = std::thread::spawn(move || at_work.run());
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where a side (0 or 1) has to send to reach the other.
    pub fn entrance(&self, side: usize) -> SocketAddr {
        held(&self.shared.entrances)[side]
    }

    /// Puts faults in force for both directions.
    pub fn set(&self, faults: Faults) {
        *held(&self.shared.faults) = [Some(faults); 2];
    }

    /// Lets nothing that a side sends pass any more, until the next [`set`](Self::set).
    pub fn mute(&self, side: usize) {
        held(&self.shared.faults)[side] = None;
    }

    /// Gives the entrance of a side a new port, as a NAT gateway that has restarted. Returns when it is in force.
    pub fn rebind(&self, side: usize) {
        self.shared.rebind[side].store(true, Ordering::SeqCst);
        while self.shared.rebind[side].load(Ordering::SeqCst) && !self.has_ended() {
            std::thread::sleep(LOOK);
        }
    }

    /// Datagrams of a side that the relay has dealt with so far.
    pub fn carried(&self, side: usize) -> u64 {
        self.shared.carried[side].load(Ordering::Relaxed)
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed; a test that drops the relay may be panicking itself.
            let _ = thread.join();
        }
    }
}

/// What the thread owns.
struct Work {
    shared: Arc<Shared>,
    local: IpAddr,
    sockets: [UdpSocket; 2],
    sides: [SocketAddr; 2],
    wires: [Wire; 2],
    queue: BinaryHeap<Reverse<UnderWay>>,
}

/// A datagram that arrives later; ordered by when it does.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    at: Instant,
    /// In which order it was sent.
    order: u64,
    to: usize,
    bytes: Vec<u8>,
}

impl Work {
    fn run(&mut self) {
        let mut sent = 0;
        while !self.shared.ended.load(Ordering::SeqCst) {
            self.wait();
            for side in [0, 1] {
                if self.shared.rebind[side].load(Ordering::SeqCst) {
                    self.take_new_port(side);
                }
                self.receive(side, &mut sent);
            }
            self.deliver();
        }
    }

    fn wait(&self) {
        let due = self.queue.peek().map(|Reverse(next)| next.at);
        let now = Instant::now();
        let time = due.map_or(LOOK, |at| at.saturating_duration_since(now).min(LOOK));
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
        let mut fds =
            self.sockets.each_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        // An interrupted wait only looks around sooner.
        let _ = poll(&mut fds, time);
    }

    fn receive(&mut self, side: usize, sent: &mut u64) {
        let mut bytes = [0; 65_536];
        // Errors of earlier sends (ICMP) are reported here as well: they end the batch, not the relay.
        while let Ok((len, source)) = self.sockets[side].recv_from(&mut bytes) {
            self.sides[side] = source; // it may have moved
            let faults = held(&self.shared.faults)[side];
            let carry = |faults| self.wires[side].carry(Instant::now(), &faults, &bytes[..len]);
            for Arrival { at, bytes } in faults.map(carry).into_iter().flatten() {
                *sent += 1;
                self.queue.push(Reverse(UnderWay { at, order: *sent, to: 1 - side, bytes }));
            }
            self.shared.carried[side].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= now) {
            let Some(Reverse(due)) = self.queue.pop() else { break };
            // What cannot be sent is lost, as on any network.
            let _ = self.sockets[due.to].send_to(&due.bytes, self.sides[due.to]);
        }
    }

    fn take_new_port(&mut self, side: usize) {
        if let Ok(socket) = bind(self.local)
            && let Ok(address) = socket.local_addr()
        {
            held(&self.shared.entrances)[side] = address;
            self.sockets[side] = socket;
            self.shared.rebind[side].store(false, Ordering::SeqCst);
        }
    }
}

fn bind(local: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((local, 0))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    struct Ends {
        relay: Relay,
        sockets: [UdpSocket; 2],
    }

    impl Ends {
        fn new() -> Self {
            let sockets = [0, 1].map(|_| {
                let socket = UdpSocket::bind((HERE, 0)).expect("bind");
                socket.set_read_timeout(Some(Duration::from_secs(10))).expect("set a time limit");
                socket
            });
            let sides = sockets.each_ref().map(|s| s.local_addr().expect("bound"));
            Self { relay: Relay::start(5, HERE, sides).expect("start"), sockets }
        }

        fn send(&self, from: usize, text: &str) {
            let to = self.relay.entrance(from);
            self.sockets[from].send_to(text.as_bytes(), to).expect("send");
        }

        fn receive(&self, at: usize) -> (String, SocketAddr) {
            let mut bytes = [0; 100];
            let (len, source) = self.sockets[at].recv_from(&mut bytes).expect("in time");
            (String::from_utf8_lossy(&bytes[..len]).into_owned(), source)
        }
    }

    #[test]
    fn both_sides_hear_each_other_from_their_entrances() {
        let ends = Ends::new();
        ends.send(0, "to one");
        assert_eq!(ends.receive(1), ("to one".to_owned(), ends.relay.entrance(1)));
        ends.send(1, "to zero");
        assert_eq!(ends.receive(0), ("to zero".to_owned(), ends.relay.entrance(0)));
        assert_eq!((ends.relay.carried(0), ends.relay.carried(1)), (1, 1));
    }

    #[test]
    fn a_rebound_entrance_has_another_port() {
        let ends = Ends::new();
        let before = ends.relay.entrance(1);
        ends.relay.rebind(1);
        assert_ne!(ends.relay.entrance(1), before);
        ends.send(0, "from elsewhere");
        assert_eq!(ends.receive(1).1, ends.relay.entrance(1));
    }

    #[test]
    fn a_mute_side_is_not_heard_and_hears() {
        let ends = Ends::new();
        ends.relay.mute(0);
        ends.send(0, "lost");
        ends.send(1, "heard");
        assert_eq!(ends.receive(0).0, "heard");
        // The relay has taken the datagram; only now may it pass others.
        while ends.relay.carried(0) == 0 {
            std::thread::sleep(LOOK);
        }
        ends.relay.set(Faults { duplicated: 1000, ..Faults::default() });
        ends.send(0, "twice");
        assert_eq!([ends.receive(1).0, ends.receive(1).0], ["twice", "twice"]);
    }
}
