//! Which of the sockets that share a port a datagram comes to: one for each peer, where there are enough.
//!
//! A socket's buffer is shared by all whose datagrams come to it: where one of them sends more than is read, the others lose with it. The
//! kernel would spread addresses by a hash, by which two of five peers share one of sixteen sockets every other time. So it is given another
//! hash, as a program (classic BPF), of which many were tried with the addresses of the peers.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};

/// Addresses hashed to find a better hash, at most: some 100 us of work.
const TRIED: usize = 8192;

/// Hashes tried, however many peers there are.
const TRIES: usize = 16;

/// A hash of addresses and ports, for so many sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hash {
    address: u32,
    port: u32,
    mixed: u32,
    sockets: u32,
}

/// Chooses hashes for the sockets of one family.
#[derive(Debug, Default)]
pub(crate) struct Spread {
    peers: BTreeSet<SocketAddr>,
    present: Option<Hash>,
}

impl Spread {
    /// Lets the kernel spread these peers over the sockets of a port, of which `socket` is one of so many. It stays as it is where
    /// another hash is not much better: what is under way to a peer's former socket may be overtaken.
    pub(crate) fn over(
        &mut self,
        peers: BTreeSet<SocketAddr>,
        socket: &impl AsFd,
        sockets: usize,
    ) -> io::Result<()> {
        let Some(hash) = self.choose(peers, sockets) else { return Ok(()) };
        attach(socket, &hash.program(self.peers.iter().any(SocketAddr::is_ipv6)))?;
        self.present = Some(hash);
        Ok(())
    }

    /// Another hash, if one is much better for these.
    fn choose(&mut self, peers: BTreeSet<SocketAddr>, sockets: usize) -> Option<Hash> {
        if peers == self.peers || sockets < 2 {
            return None;
        }
        self.peers = peers;
        let shared = self.present.map(|present| present.shared(&self.peers));
        let tries = (TRIED / self.peers.len().max(1)).clamp(TRIES, TRIED / TRIES);
        let mut best: Option<(usize, Hash)> = None;
        for hash in (0..tries).map(|number| Hash::number(number as u32, sockets as u32)) {
            let shared = hash.shared(&self.peers);
            if best.is_none_or(|(least, _)| shared < least) {
                best = Some((shared, hash));
            }
            if shared == 0 {
                break;
            }
        }
        let (least, hash) = best?;
        shared.is_none_or(|shared| least < shared && least * 2 <= shared).then_some(hash)
    }
}

impl Hash {
    /// One of many.
    fn number(number: u32, sockets: u32) -> Self {
        // Odd factors lose nothing (splitmix32).
        let factor = |place: u32| {
            let z = (number * 3 + place + 1).wrapping_mul(0x9e37_79b9);
            let z = (z ^ z >> 16).wrapping_mul(0x21f0_aaad);
            let z = (z ^ z >> 15).wrapping_mul(0x735a_2d97);
            (z ^ z >> 15) | 1
        };
        Self { address: factor(0), port: factor(1), mixed: factor(2), sockets }
    }

    /// The place of the socket among those of the port. What [`program`](Self::program) computes.
    fn place(&self, from: SocketAddr) -> u32 {
        let next = |hash: u32, word: u32| hash.wrapping_add(word).wrapping_mul(self.address);
        let address = match from.ip() {
            IpAddr::V4(ip) => next(0, ip.to_bits()),
            IpAddr::V6(ip) => (0..4).map(|n| (ip.to_bits() >> (96 - n * 32)) as u32).fold(0, next),
        };
        let hash = u32::from(from.port()).wrapping_mul(self.port).wrapping_add(address);
        let hash = (hash ^ hash >> 15).wrapping_mul(self.mixed);
        (hash >> 16) % self.sockets
    }

    /// How many pairs of peers share a socket.
    fn shared(&self, peers: &BTreeSet<SocketAddr>) -> usize {
        let mut at = vec![0; self.sockets as usize];
        peers.iter().for_each(|peer| at[self.place(*peer) as usize] += 1);
        at.into_iter().map(|peers: usize| peers * peers.saturating_sub(1) / 2).sum()
    }

    /// For the kernel, which runs it for each datagram. An IP header with options or extensions has something else where the port
    /// is looked for: such a datagram comes to one of the sockets all the same.
    fn program(&self, v6: bool) -> Vec<libc::sock_filter> {
        /// Where the source address begins in an IP header, its words, and the source port.
        const V4: (u32, u32, u32) = (12, 1, 20);
        const V6: (u32, u32, u32) = (8, 4, 40);
        let (address, words, port) = if v6 { V6 } else { V4 };
        let header = libc::SKF_NET_OFF as u32;
        let word =
            |n: u32| do_(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, header + address + n * 4);
        let alu =
            |operation: u32, number: u32| do_(libc::BPF_ALU | operation | libc::BPF_K, number);
        let with_x = |operation: u32| do_(libc::BPF_ALU | operation | libc::BPF_X, 0);
        let to_x = do_(libc::BPF_MISC | libc::BPF_TAX, 0);
        let mut program = vec![word(0), alu(libc::BPF_MUL, self.address)];
        for n in 1..words {
            program.extend([
                to_x,
                word(n),
                with_x(libc::BPF_ADD),
                alu(libc::BPF_MUL, self.address),
            ]);
        }
        program.extend([
            to_x,
            do_(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, header + port),
            alu(libc::BPF_MUL, self.port),
            with_x(libc::BPF_ADD),
            to_x,
            alu(libc::BPF_RSH, 15),
            with_x(libc::BPF_XOR),
            alu(libc::BPF_MUL, self.mixed),
            alu(libc::BPF_RSH, 16),
            alu(libc::BPF_MOD, self.sockets),
            do_(libc::BPF_RET | libc::BPF_A, 0),
        ]);
        program
    }
}

fn do_(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// For all sockets of the port.
fn attach(socket: &impl AsFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let filter =
        libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the option reads the description of a program, and the program, which both live here.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use socket2::{Domain, Socket, Type};

    use super::*;

    fn peers(count: u16) -> BTreeSet<SocketAddr> {
        let peer = |n: u16| SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 51900));
        (0..count).map(peer).collect()
    }

    #[test]
    fn few_peers_share_no_socket_and_many_share_them_evenly() {
        for count in 1..=10 {
            let hash = Spread::default().choose(peers(count), 16).unwrap();
            assert_eq!(hash.shared(&peers(count)), 0, "{count} peers");
        }
        let hash = Spread::default().choose(peers(512), 16).unwrap();
        let even = 16 * (32 * 31 / 2);
        assert!(hash.shared(&peers(512)) < even * 11 / 10);
    }

    #[test]
    fn a_hash_stays_until_another_is_much_better() {
        let mut spread = Spread::default();
        let mut changes = 0;
        for count in (1..=16).chain((20..=500).step_by(20)) {
            if let Some(hash) = spread.choose(peers(count), 16) {
                spread.present = Some(hash);
                changes += 1;
            }
            assert_eq!(spread.choose(peers(count), 16), None, "nothing new");
        }
        assert!((1..12).contains(&changes), "{changes} changes");
        assert_eq!(Spread::default().choose(peers(5), 1), None, "there is no choice");
    }

    #[test]
    fn the_kernel_brings_datagrams_to_the_socket_that_was_chosen() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let any: SocketAddr = any.parse().unwrap();
            let bind = |address: SocketAddr| {
                let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
                socket.set_reuse_port(true).unwrap();
                socket.bind(&address.into()).unwrap();
                let socket = UdpSocket::from(socket);
                socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                socket
            };
            let first = bind(any);
            let port = first.local_addr().unwrap();
            let sockets: Vec<_> =
                std::iter::once(first).chain((1..8).map(|_| bind(port))).collect();
            let clients: Vec<_> = (0..6).map(|_| UdpSocket::bind(any).unwrap()).collect();
            let from = |client: &UdpSocket| client.local_addr().unwrap();
            let mut spread = Spread::default();
            spread.over(clients.iter().map(from).collect(), &sockets[0], 8).unwrap();
            let hash = spread.present.unwrap();
            assert_eq!(hash.shared(&spread.peers), 0);
            for client in &clients {
                client.send_to(b"here", port).unwrap();
                let socket = &sockets[hash.place(from(client)) as usize];
                assert_eq!(socket.recv_from(&mut [0; 9]).unwrap().1, from(client));
            }
        }
    }
}
