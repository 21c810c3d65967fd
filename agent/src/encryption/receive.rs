//! Sockets in a pod that take canaries, and nothing else.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mesh_model::encryption::{CANARY_BYTES, Mark, Receiver, Tag, tag};
use mesh_model::snapshot::Protocol;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::CheckError;
use super::place::Place;

/// Connections at the same time.
const CONNECTIONS: usize = 1024;

type Arrived = Arc<Mutex<BTreeSet<Tag>>>;

/// Sockets for each protocol and address of a place. Closed at their time, when stopped, and on drop.
pub(super) struct Receivers {
    addresses: Vec<Receiver>,
    arrived: Arrived,
    tasks: Vec<AbortHandle>,
}

impl Receivers {
    pub(super) fn start(place: &Place, mark: Mark, until: Instant) -> Result<Self, CheckError> {
        let failed = |source| CheckError::Sockets { place: place.to_string(), source };
        let arrived = Arrived::default();
        let mut receivers = Self { addresses: vec![], arrived, tasks: vec![] };
        for &address in &place.addresses {
            let sockets = place.namespace.run(|| open(address)).and_then(|opened| opened);
            let (udp, tcp) = sockets.map_err(failed)?;
            receivers.add(udp, tcp, mark, until).map_err(failed)?;
        }
        Ok(receivers)
    }

    pub(super) fn addresses(&self) -> &[Receiver] {
        &self.addresses
    }

    /// What has arrived. Nothing more is taken.
    pub(super) fn stop(&self) -> Vec<Tag> {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    fn add(
        &mut self,
        udp: UdpSocket,
        tcp: TcpListener,
        mark: Mark,
        until: Instant,
    ) -> io::Result<()> {
        let receiver = |protocol, address: SocketAddr| Receiver { protocol, address };
        self.addresses.push(receiver(Protocol::Udp, udp.local_addr()?));
        self.addresses.push(receiver(Protocol::Tcp, tcp.local_addr()?));
        let (udp, tcp) =
            (tokio::net::UdpSocket::from_std(udp)?, tokio::net::TcpListener::from_std(tcp)?);
        let datagrams = datagrams(udp, mark, Arc::clone(&self.arrived));
        let connections = connections(tcp, mark, Arc::clone(&self.arrived));
        let until = tokio::time::Instant::from_std(until);
        let bounded = async move {
            let both = async { tokio::join!(datagrams, connections) };
            // Both go on for ever.
            let _ = tokio::time::timeout_at(until, both).await;
        };
        self.tasks.push(tokio::spawn(bounded).abort_handle());
        Ok(())
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open(address: IpAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let any_port = SocketAddr::new(address, 0);
    let (udp, tcp) = (UdpSocket::bind(any_port)?, TcpListener::bind(any_port)?);
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

fn note(arrived: &Arrived, mark: Mark, bytes: &[u8]) {
    if let Some(tag) = tag(mark, bytes) {
        arrived.lock().unwrap_or_else(PoisonError::into_inner).insert(tag);
    }
}

async fn datagrams(socket: tokio::net::UdpSocket, mark: Mark, arrived: Arrived) {
    let mut buffer = [0; CANARY_BYTES];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((len, _)) => note(&arrived, mark, &buffer[..len]),
            // An ICMP error for something sent earlier; there is nothing to do about it.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn connections(listener: tokio::net::TcpListener, mark: Mark, arrived: Arrived) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut streams = tokio::task::JoinSet::new();
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.expect("never closed");
        while streams.try_join_next().is_some() {}
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        };
        let arrived = Arc::clone(&arrived);
        streams.spawn(async move {
            let _permit = permit;
            let mut canary = [0; CANARY_BYTES];
            while stream.read_exact(&mut canary).await.is_ok() && tag(mark, &canary).is_some() {
                note(&arrived, mark, &canary);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use mesh_kernel::NetNs;
    use mesh_model::encryption::canary;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn canaries_arrive_and_nothing_else_does() {
        let place = Place {
            pod: None,
            namespace: NetNs::current(),
            addresses: vec!["127.0.0.1".parse().unwrap()],
        };
        let mark = Mark([7; 16]);
        let until = Instant::now() + Duration::from_secs(60);
        let receivers = Receivers::start(&place, mark, until).unwrap();
        let of = |protocol| {
            let found = receivers.addresses().iter().find(|r| r.protocol == protocol);
            found.unwrap().address
        };
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.send_to(&canary(Mark([8; 16]), 1), of(Protocol::Udp)).unwrap();
        udp.send_to(&canary(mark, 2), of(Protocol::Udp)).unwrap();
        let connect = || {
            std::net::TcpStream::connect_timeout(&of(Protocol::Tcp), Duration::from_secs(5))
                .unwrap()
        };
        connect().write_all(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n").unwrap();
        let mut stream = connect();
        stream.write_all(&canary(mark, 3)).unwrap();
        stream.write_all(&canary(mark, 4)).unwrap();
        let start = Instant::now();
        let arrived = || receivers.arrived.lock().unwrap().iter().copied().collect::<Vec<_>>();
        while arrived().len() < 3 && start.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(receivers.stop(), [2, 3, 4]);
    }
}
