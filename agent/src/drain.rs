//! Acknowledged drain: a pod is told to stop when all nodes have taken it out of their tables.
//!
//! The node that ends a pod knows which endpoint slice says that it leaves, and asks the agents of all other nodes, straight
//! through the tunnel, what they have programmed. So a deletion costs one small datagram for each node and no write to the
//! API, however many pods end with it. Nodes whose path is down are not asked; an agent that does not answer, or not with
//! what is wanted, holds a pod back for a bounded time only (see `pods/plan.rs`).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;
use mesh_model::wellknown::{DRAIN_PORT, OVERLAY_DEVICE};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::board::Board;
use crate::observe::Desired;

mod message;
mod tally;

use message::{MAX_BYTES, Message};
use tally::Tally;

/// Name of this part on the board.
const NAME: &str = "drain";
/// What traffic follows, as far as it is at work here: a backend has left a node when all of these have heard of it.
const CONCERNS: [&str; 4] = ["services", "ingress", "dns", "edge"];
/// Between two questions.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(100);
/// Pause before the socket is opened again: the overlay device may not be there yet.
const REOPEN: Duration = Duration::from_secs(1);

/// What those who end pods ask of this part. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Drain {
    wanted: watch::Sender<u64>,
    confirmed: watch::Sender<u64>,
}

impl Drain {
    /// For a node that has nobody to ask: everything counts as confirmed.
    pub fn alone() -> Self {
        Self { wanted: watch::Sender::new(0), confirmed: watch::Sender::new(u64::MAX) }
    }

    /// Whether all nodes have programmed the endpoints of `revision`. If not, they are asked from now on.
    pub(crate) fn is_confirmed(&self, revision: u64) -> bool {
        if *self.confirmed.borrow() >= revision {
            return true;
        }
        self.wanted.send_if_modified(|wanted| {
            let more = *wanted < revision;
            *wanted = (*wanted).max(revision);
            more
        });
        false
    }

    /// Tells when more is confirmed. Cancel safe.
    pub(crate) fn confirmations(&self) -> watch::Receiver<u64> {
        self.confirmed.subscribe()
    }
}

/// Starts to ask and to answer, for ever. Needs a Tokio runtime.
pub(crate) fn start(desired: watch::Receiver<Option<Desired>>, board: Board) -> Drain {
    let (wanted, confirmed) = (watch::Sender::new(0), watch::Sender::new(0));
    let drain = Drain { wanted, confirmed };
    let (wanted, confirmed) = (drain.wanted.subscribe(), drain.confirmed.clone());
    tokio::spawn(Part { desired, board, wanted, confirmed, tally: Tally::default() }.run());
    drain
}

struct Part {
    desired: watch::Receiver<Option<Desired>>,
    board: Board,
    wanted: watch::Receiver<u64>,
    confirmed: watch::Sender<u64>,
    tally: Tally,
}

/// Who may ask, and who is asked.
struct Nodes {
    known: BTreeSet<IpAddr>,
    reachable: BTreeSet<IpAddr>,
}

impl Part {
    async fn run(mut self) {
        loop {
            let own =
                self.desired.borrow_and_update().as_ref().and_then(|d| own_address(&d.snapshot));
            let Some(own) = own else {
                if self.desired.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let served = match open(SocketAddr::new(own, DRAIN_PORT)) {
                Ok(socket) => {
                    self.board.done(NAME);
                    self.serve(&socket, own).await
                }
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                self.board
                    .failed(NAME, vec![format!("open UDP port {DRAIN_PORT} of {own}: {error}")]);
                tokio::time::sleep(REOPEN).await;
            }
        }
    }

    /// Serves until the address is another one.
    async fn serve(&mut self, socket: &UdpSocket, own: IpAddr) -> io::Result<()> {
        let mut board = self.board.subscribe();
        let mut nodes = self.nodes(own);
        let mut pause = FIRST_PAUSE;
        // One byte more than the longest message: what is longer is not cut to look like one.
        let mut buffer = [0; MAX_BYTES + 1];
        loop {
            let wanted = *self.wanted.borrow_and_update();
            let open = self.judge(wanted);
            if open {
                for peer in self.tally.ask(Instant::now(), wanted) {
                    send(socket, SocketAddr::new(peer, DRAIN_PORT), Message::Question)?;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause), if open => pause = (pause * 2).min(LAST_PAUSE),
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        std::future::pending::<()>().await;
                    }
                    pause = FIRST_PAUSE;
                }
                changed = self.desired.changed() => {
                    let known = self.desired.borrow_and_update().as_ref().and_then(|d| own_address(&d.snapshot));
                    if changed.is_err() || known != Some(own) {
                        return Ok(());
                    }
                    nodes = self.nodes(own);
                }
                _ = board.changed(), if open => {}
                received = socket.recv_from(&mut buffer) => match received {
                    Ok((len, from)) => self.received(socket, &nodes, from, &buffer[..len])?,
                    // What an earlier datagram met on its way.
                    Err(error) => tracing::debug!(%error, "receiving about drains failed"),
                },
            }
        }
    }

    /// Publishes what is confirmed; returns whether anything wanted is not.
    fn judge(&self, wanted: u64) -> bool {
        let confirmed = *self.confirmed.borrow();
        if confirmed >= wanted {
            return false;
        }
        let done = self.programmed() >= wanted && self.tally.is_confirmed(Instant::now(), wanted);
        if done {
            self.confirmed.send_replace(wanted);
        }
        !done
    }

    fn programmed(&self) -> u64 {
        self.board.programmed(&CONCERNS)
    }

    fn received(
        &mut self,
        socket: &UdpSocket,
        nodes: &Nodes,
        from: SocketAddr,
        bytes: &[u8],
    ) -> io::Result<()> {
        // The tunnel vouches for the address, and only an agent can have the port.
        if from.port() != DRAIN_PORT || !nodes.known.contains(&from.ip()) {
            return Ok(());
        }
        match Message::decode(bytes) {
            Some(Message::Question) => send(socket, from, Message::Answer(self.programmed())),
            Some(Message::Answer(revision)) => {
                self.tally.heard(from.ip(), revision);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn nodes(&mut self, own: IpAddr) -> Nodes {
        let mut nodes = Nodes { known: BTreeSet::new(), reachable: BTreeSet::new() };
        if let Some(desired) = self.desired.borrow().as_ref() {
            for peer in desired.snapshot.peers.iter() {
                let mut addresses = peer.allowed_ips.iter().map(node_overlay_address);
                let Some(address) = addresses.find(|a| a.is_ipv4() == own.is_ipv4()) else {
                    continue;
                };
                nodes.known.insert(address);
                if !desired.outlook.away.contains(&peer.node) {
                    nodes.reachable.insert(address);
                }
            }
        }
        self.tally.set_peers(&nodes.reachable);
        nodes
    }
}

/// The node's own address in its first block.
fn own_address(snapshot: &Snapshot) -> Option<IpAddr> {
    snapshot.node.blocks.first().map(node_overlay_address)
}

/// Hears the overlay device only, so that what comes in has been authenticated.
fn open(own: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(own), Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind_device(Some(OVERLAY_DEVICE.as_bytes()))?;
    socket.set_nonblocking(true)?;
    socket.bind(&own.into())?;
    UdpSocket::from_std(socket.into())
}

/// A datagram that cannot leave is lost like one on the way; only a socket that is of no use any more is an error.
fn send(socket: &UdpSocket, to: SocketAddr, message: Message) -> io::Result<()> {
    match socket.try_send_to(&message.encode(), to) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            Err(error)
        }
        Err(error) => {
            tracing::trace!(%error, %to, "not sent");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_confirmed_is_not_asked_again() {
        let (wanted, confirmed) = (watch::Sender::new(0), watch::Sender::new(5));
        let drain = Drain { wanted: wanted.clone(), confirmed: confirmed.clone() };
        assert!(drain.is_confirmed(5));
        assert_eq!(*wanted.borrow(), 0);
        assert!(!drain.is_confirmed(9) && !drain.is_confirmed(7));
        assert_eq!(*wanted.borrow(), 9, "one question for all");
        confirmed.send_replace(9);
        assert!(drain.is_confirmed(7));
        assert!(Drain::alone().is_confirmed(u64::MAX));
    }
}
