//! Sending canaries again and again: what is lost on the way, or meets a tunnel that is just made, is made up for.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_kernel::NetNs;
use mesh_model::encryption::{Canary, Mark, Origin, PLAIN_PORT, Plain, Sending, Sent, Tag, canary};
use mesh_model::snapshot::Protocol;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;

use super::node;
use super::place::Place;

/// Between two of one canary.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest time for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Sends all that is asked until its time is over; returns when the last was sent.
pub(super) async fn all(place: &Place, asked: Sending, check_ends: Instant) -> Sent {
    let until = (Instant::now() + Duration::from_secs(asked.secs.into())).min(check_ends);
    let mark = asked.mark;
    let mut tasks = JoinSet::new();
    for canary in asked.canaries {
        let namespace = match canary.origin {
            Origin::Pod => place.namespace.clone(),
            Origin::Node => node(),
        };
        tasks.spawn(
            async move { (canary.tag, keep_sending(&namespace, canary, mark, until).await) },
        );
    }
    for plain in asked.plain {
        tasks.spawn(async move { (plain.tag, keep_plain(plain, mark, until).await) });
    }
    let results: BTreeMap<Tag, io::Result<()>> = tasks.join_all().await.into_iter().collect();
    let failures = results.into_iter().filter_map(|(tag, r)| Some((tag, r.err()?.to_string())));
    Sent { failures: failures.collect() }
}

/// The last error, when the last attempt failed.
async fn keep_sending(
    namespace: &NetNs,
    canary: Canary,
    mark: Mark,
    until: Instant,
) -> io::Result<()> {
    loop {
        let outcome = match canary.protocol {
            Protocol::Tcp => stream(namespace, canary, mark, until).await,
            _ => datagrams(namespace, canary.to, mark, canary.tag, until).await,
        };
        if Instant::now() >= until {
            return outcome;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn keep_plain(plain: Plain, mark: Mark, until: Instant) -> io::Result<()> {
    let to = SocketAddr::new(plain.to, PLAIN_PORT);
    loop {
        let outcome = datagrams(&node(), to, mark, plain.tag, until).await;
        if Instant::now() >= until {
            return outcome;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Datagrams until the time is over or one fails. That nobody listens is no failure: the network has carried it.
async fn datagrams(
    namespace: &NetNs,
    to: SocketAddr,
    mark: Mark,
    tag: Tag,
    until: Instant,
) -> io::Result<()> {
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = namespace.run(|| std::net::UdpSocket::bind(any)).and_then(|opened| opened)?;
    socket.set_nonblocking(true)?;
    let socket = UdpSocket::from_std(socket)?;
    socket.connect(to).await?;
    loop {
        match socket.send(&canary(mark, tag)).await {
            Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => return Err(error),
            _ => {}
        }
        if Instant::now() >= until {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One connection, until the time is over or it fails.
async fn stream(namespace: &NetNs, canary_: Canary, mark: Mark, until: Instant) -> io::Result<()> {
    let open = || match canary_.to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = namespace.run(open).and_then(|opened| opened)?;
    let connected = tokio::time::timeout(CONNECT_LIMIT, socket.connect(canary_.to)).await;
    let mut stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    loop {
        stream.write_all(&canary(mark, canary_.tag)).await?;
        if Instant::now() >= until {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}
