//! A process inside a cgroup and a network namespace, which makes connections on request. It is this test binary again.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sched::{CloneFlags, setns};

use crate::lab::{Net, PATIENCE};

const ROLE: &str = "MESH_TEST_CLIENT";
/// Marks answers among what the test harness prints.
const ANSWER: &str = "answer: ";

/// The process.
pub(crate) struct Client {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub(crate) fn start(cgroup: &Path, net: &Net) -> Self {
        let procs = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"));
        let procs = procs.unwrap();
        let namespace = std::fs::File::open(net.path()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "client::role", "--nocapture", "--ignored"]);
        command.env(ROLE, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let enter = move || {
            nix::unistd::write(&procs, b"0")?;
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        };
        // SAFETY: the closure makes two system calls on descriptors that it owns; it does not allocate or lock.
        unsafe { command.pre_exec(enter) };
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// Lets the process do something and returns what came of it.
    pub(crate) fn ask(&mut self, request: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{request}").unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the client is gone");
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().to_owned();
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test: the other side of [`Client`].
#[test]
#[ignore = "runs as a client of other tests only"]
fn role() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let v4 = UdpSocket::bind("0.0.0.0:0").unwrap();
    let v6 = UdpSocket::bind("[::]:0").unwrap();
    for socket in [&v4, &v6] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let mut held: Option<UdpSocket> = None;
    let mut stream: Option<TcpStream> = None;
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let (what, address) = line.split_once(' ').unwrap();
        let address: SocketAddr = address.parse().unwrap();
        let answer = match what {
            "tcp" => tcp(address),
            "udp" => datagram(if address.is_ipv4() { &v4 } else { &v6 }, address),
            // The same in two steps.
            "send" => v4.send_to(b"?", address).map(|_| "sent".to_owned()),
            "receive" => receive(&v4),
            "udp-connected" => connected(address),
            "serve" => serve(address),
            // A socket that stays connected, is used again, and is connected again.
            "hold" => hold(address, &mut held),
            "bind" => bind(address, &mut held),
            "wait" => held.as_ref().unwrap().recv(&mut [0; 64]).map(|_| "an answer".to_owned()),
            "held" => exchange(held.as_ref().unwrap()),
            "again" => held
                .as_ref()
                .unwrap()
                .connect(address)
                .and_then(|()| exchange(held.as_ref().unwrap())),
            "tcp-hold" => tcp_hold(address, &mut stream),
            "tcp-held" => tcp_read(stream.as_mut().unwrap()),
            other => panic!("what is {other}?"),
        };
        let text = answer.unwrap_or_else(|error| format!("error {}", code(&error)));
        println!("{ANSWER}{text}");
    }
}

fn code(error: &std::io::Error) -> String {
    let errno = error.raw_os_error().map(nix::errno::Errno::from_raw);
    errno.map_or_else(|| error.to_string(), |errno| format!("{errno:?}"))
}

fn tcp(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    let peer = stream.peer_addr()?;
    assert!(stream.as_raw_fd() >= 0);
    stream.read_to_string(&mut text)?;
    Ok(format!("{text} from {peer}"))
}

/// Serves from here on; answers with the address.
fn serve(address: SocketAddr) -> std::io::Result<String> {
    let listener = std::net::TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"served");
        }
    });
    Ok(bound.to_string())
}

fn datagram(socket: &UdpSocket, address: SocketAddr) -> std::io::Result<String> {
    socket.send_to(b"?", address)?;
    receive(socket)
}

fn receive(socket: &UdpSocket) -> std::io::Result<String> {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("{} from {from}", String::from_utf8_lossy(&buffer[..length])))
}

fn connected(address: SocketAddr) -> std::io::Result<String> {
    let mut held = None;
    hold(address, &mut held)
}

fn hold(address: SocketAddr, held: &mut Option<UdpSocket>) -> std::io::Result<String> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    exchange(held.insert(socket))
}

/// A socket to be connected later; answers with its cookie.
fn bind(address: SocketAddr, held: &mut Option<UdpSocket>) -> std::io::Result<String> {
    let socket = UdpSocket::bind(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let cookie = mesh_kernel::traces::socket_cookie(&socket)?;
    *held = Some(socket);
    Ok(cookie.to_string())
}

fn tcp_hold(address: SocketAddr, held: &mut Option<TcpStream>) -> std::io::Result<String> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    *held = Some(stream);
    Ok("connected".to_owned())
}

fn tcp_read(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut byte = [0];
    stream.set_read_timeout(Some(std::time::Duration::from_millis(200)))?;
    match stream.read(&mut byte) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok("waits".to_owned()),
        other => other.map(|length| format!("read {length}")),
    }
}

fn exchange(socket: &UdpSocket) -> std::io::Result<String> {
    socket.send(b"?")?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let (text, peer) = (String::from_utf8_lossy(&buffer[..length]), socket.peer_addr()?);
    Ok(format!("{text} from {from} peer {peer}"))
}
