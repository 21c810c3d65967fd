//! The server: HTTP on 8080, TCP echo on 9000, UDP echo on 9001, on both families. SCTP echo only where it is asked for.
//!
//! SIGTERM: what waits in the accept queue is still taken, requests under way end, kept connections are closed
//! after their next answer or when idle, and then the process ends. It never cuts a request.

mod http;
mod websocket;

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::args::Args;
use crate::sctp;
use crate::signals::EndSignals;

const HTTP_PORT: u16 = 8080;
const TCP_ECHO_PORT: u16 = 9000;
const UDP_ECHO_PORT: u16 = 9001;
/// More connections than this wait in the accept queue.
const MAX_CONNECTIONS: usize = 2000;
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// Ports with commas between them.
struct Ports(Vec<u16>);

impl FromStr for Ports {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// What all connections of the process share.
pub(crate) struct Server {
    /// Host name, which in a pod is the pod's name.
    pub(crate) host: String,
    /// The environment's VERSION.
    pub(crate) version: String,
    /// What `/ready` answers.
    pub(crate) ready: AtomicBool,
    /// Set by SIGTERM.
    pub(crate) draining: AtomicBool,
    open: AtomicUsize,
}

/// `serve`: until SIGTERM.
pub(crate) fn run(args: &mut Args) -> Result<(), String> {
    let http_port = args.setting("--http", HTTP_PORT)?;
    let tcp_ports = args.setting("--tcp", Ports(vec![TCP_ECHO_PORT]))?;
    let udp_ports = args.setting("--udp", Ports(vec![UDP_ECHO_PORT]))?;
    let sctp_ports = args.optional::<Ports>("--sctp")?;
    args.finish()?;
    let signals = EndSignals::hold()?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(|e| format!("read the host name: {e}"))?;
    let server = Arc::new(Server {
        host: host.trim().to_owned(),
        version: std::env::var("VERSION").unwrap_or_else(|_| "0".to_owned()),
        ready: AtomicBool::new(true),
        draining: AtomicBool::new(false),
        open: AtomicUsize::new(0),
    });
    let mut acceptors = vec![listen(&server, http_port, http::connection)?];
    for port in tcp_ports.0 {
        acceptors.push(listen(&server, port, echo_stream)?);
    }
    for port in udp_ports.0 {
        echo_datagrams(&server, port)?;
    }
    if let Some(Ports(ports)) = sctp_ports {
        sctp::echo(&server.host, &ports)?;
    }
    println!("{} serves version {}", server.host, server.version);
    signals.ended_within(None);
    println!("{} drains", server.host);
    server.draining.store(true, Ordering::SeqCst);
    for acceptor in acceptors {
        // A panic of an acceptor has been printed; ending is right in either case.
        let _ = acceptor.join();
    }
    let end = Instant::now() + DRAIN_LIMIT;
    while server.open.load(Ordering::SeqCst) > 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(10));
    }
    println!("{} ends", server.host);
    Ok(())
}

type Connection = fn(&Server, TcpStream) -> io::Result<()>;

fn listen(
    server: &Arc<Server>,
    port: u16,
    serve: Connection,
) -> Result<thread::JoinHandle<()>, String> {
    let listener = TcpListener::bind(("::", port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .map_err(|e| format!("listen on port {port}: {e}"))?;
    listener.set_nonblocking(true).map_err(|e| format!("set port {port} non-blocking: {e}"))?;
    let server = server.clone();
    Ok(thread::spawn(move || accept(&server, &listener, serve)))
}

fn accept(server: &Arc<Server>, listener: &TcpListener, serve: Connection) {
    loop {
        let draining = server.draining.load(Ordering::SeqCst);
        match listener.accept() {
            Ok((stream, _)) => start(server, stream, serve),
            // While draining, an empty queue is the end: the listener closes when this returns.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && draining => return,
            Err(_) => {
                let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::from(50u8));
            }
        }
        while server.open.load(Ordering::SeqCst) >= MAX_CONNECTIONS {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn start(server: &Arc<Server>, stream: TcpStream, serve: Connection) {
    server.open.fetch_add(1, Ordering::SeqCst);
    let shared = server.clone();
    let thread = thread::Builder::new().stack_size(128 << 10).spawn(move || {
        let usable = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
        // A client that goes away in the middle is its own business.
        let _ = usable.and_then(|()| serve(&shared, stream));
        shared.open.fetch_sub(1, Ordering::SeqCst);
    });
    if thread.is_err() {
        server.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits for bytes; `false` when the connection is idle and the process drains, or has been idle for a minute.
pub(crate) fn wait_for_bytes(server: &Server, stream: &TcpStream) -> bool {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(100u8)).is_ok_and(|n| n > 0) {
            return true;
        }
        if server.draining.load(Ordering::SeqCst) || Instant::now() > end {
            return false;
        }
    }
}

fn echo_stream(server: &Server, mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    while wait_for_bytes(server, &stream) {
        match stream.read(&mut buffer)? {
            0 => break,
            n if is_whoami(&buffer[..n]) => stream.write_all(server.host.as_bytes())?,
            n => stream.write_all(&buffer[..n])?,
        }
    }
    Ok(())
}

fn echo_datagrams(server: &Arc<Server>, port: u16) -> Result<(), String> {
    let socket = UdpSocket::bind(("::", port))
        .or_else(|_| UdpSocket::bind(("0.0.0.0", port)))
        .map_err(|e| format!("listen on UDP port {port}: {e}"))?;
    let server = server.clone();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok((n, from)) = socket.recv_from(&mut buffer) else { continue };
            let reply = if is_whoami(&buffer[..n]) { server.host.as_bytes() } else { &buffer[..n] };
            // A lost answer is what UDP promises.
            let _ = socket.send_to(reply, from);
        }
    });
    Ok(())
}

fn is_whoami(bytes: &[u8]) -> bool {
    bytes.trim_ascii() == b"whoami"
}
