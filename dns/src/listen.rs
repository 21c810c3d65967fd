//! The sockets: what they are, and how questions are read from them until the worker ends.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hickory_net::xfer::Protocol;
use mesh_worker::{SocketSpec, Transport};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::server::Server;

const BACKLOG: i32 = 1024;
/// Enough for a burst of some thousand questions while the process is away.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// Larger than any question that makes sense.
const LARGEST_DATAGRAM: usize = 4096;
/// A TCP client that says nothing for so long is dropped (RFC 7766, section 6.2.3).
const TCP_IDLE: Duration = Duration::from_secs(10);
/// TCP clients at the same time; more wait in the kernel's queue.
const MAX_TCP_CLIENTS: usize = 1024;
const PAUSE: Duration = Duration::from_millis(20);

/// One UDP and one TCP socket for each address.
pub fn sockets(listen: &[SocketAddr]) -> Vec<SocketSpec> {
    let transports = [
        Transport::Udp { receive_buffer_bytes: RECEIVE_BUFFER_BYTES },
        Transport::Tcp { backlog: BACKLOG },
    ];
    let of = |address: SocketAddr| {
        transports.map(|transport| SocketSpec { transport, address, copy: 0 })
    };
    listen.iter().copied().flat_map(of).collect()
}

/// The questions that are being answered, and the end of reading more.
#[derive(Clone)]
pub(crate) struct Listeners {
    server: Server,
    tasks: TaskTracker,
    end: CancellationToken,
    tcp_clients: Arc<Semaphore>,
}

impl Listeners {
    pub(crate) fn new(server: Server) -> Self {
        let tcp_clients = Arc::new(Semaphore::new(MAX_TCP_CLIENTS));
        Self { server, tasks: TaskTracker::new(), end: CancellationToken::new(), tcp_clients }
    }

    /// Answers what comes on a socket, until [`Listeners::drain`].
    pub(crate) fn serve(&self, transport: Transport, socket: OwnedFd) -> io::Result<()> {
        match transport {
            Transport::Udp { .. } => {
                let socket = UdpSocket::from_std(socket.into())?;
                self.tasks.spawn(self.clone().datagrams(Arc::new(socket)));
            }
            Transport::Tcp { .. } => {
                let listener = TcpListener::from_std(socket.into())?;
                self.tasks.spawn(self.clone().connections(listener));
            }
        }
        Ok(())
    }

    /// Reads no more questions, and returns when all that were read have been answered.
    pub(crate) async fn drain(&self) {
        self.end.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn datagrams(self, socket: Arc<UdpSocket>) {
        let mut buffer = [0; LARGEST_DATAGRAM];
        loop {
            // A datagram that is not read here stays for the next worker.
            let received = tokio::select! {
                biased;
                () = self.end.cancelled() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            let (n, from) = match received {
                Ok(received) => received,
                Err(error) => {
                    tracing::warn!(%error, "receiving a question failed");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let (server, socket) = (self.server.clone(), Arc::clone(&socket));
            let question = buffer[..n].to_vec();
            self.tasks.spawn(async move {
                let answer = server.respond(question, from, Protocol::Udp).await;
                if let Some(answer) = answer
                    && let Err(error) = socket.send_to(&answer, from).await
                {
                    tracing::debug!(%error, %from, "answer not sent");
                }
            });
        }
    }

    async fn connections(self, listener: TcpListener) {
        loop {
            let place = Arc::clone(&self.tcp_clients).acquire_owned();
            let accepted = tokio::select! {
                biased;
                () = self.end.cancelled() => return,
                accepted = async { (place.await, listener.accept().await) } => accepted,
            };
            match accepted {
                (place, Ok((stream, from))) => {
                    let client = self.clone();
                    self.tasks.spawn(async move {
                        if let Err(error) = client.conversation(stream, from).await {
                            tracing::debug!(%error, %from, "TCP client dropped");
                        }
                        drop(place);
                    });
                }
                (_, Err(error)) => {
                    tracing::warn!(%error, "accepting a TCP client failed");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// One question after the other, each with its length before it (RFC 1035, section 4.2.2).
    async fn conversation(&self, mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        loop {
            // A question that has come already is answered also at the end.
            tokio::select! {
                biased;
                ready = timeout(TCP_IDLE, stream.readable()) => ready??,
                () = self.end.cancelled() => return Ok(()),
            }
            let Some(question) = timeout(TCP_IDLE, read(&mut stream)).await?? else {
                return Ok(());
            };
            let answer = self.server.respond(question, from, Protocol::Tcp).await;
            let answer = answer.ok_or(io::ErrorKind::InvalidData)?;
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let answer = [&length.to_be_bytes()[..], &answer].concat();
            timeout(TCP_IDLE, stream.write_all(&answer)).await??;
        }
    }
}

/// The next question; none when the client has closed.
async fn read(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut question).await?;
    Ok(Some(question))
}
