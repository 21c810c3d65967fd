//! SIGTERM loses nothing: this is what a rolling update without a failed request starts from.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The server, ended with the test.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start() -> Self {
        // Free a moment ago: another program could take it, and then the test fails and says so.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(env!("CARGO_BIN_EXE_mesh-hello"))
            .args(["serve", "--http", &port.to_string(), "--tcp", "0", "--udp", "0"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { child, address: SocketAddr::from(([127, 0, 0, 1], port)) };
        let end = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect_timeout(&server.address, Duration::from_secs(1)).is_err() {
            assert!(Instant::now() < end, "the server does not listen on port {port}");
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn terminate(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(stream: &mut TcpStream, path: &str) {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
}

fn read_all(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn requests_under_way_and_queued_are_answered() {
    let mut server = Server::start();
    let mut slow = server.connect();
    send(&mut slow, "/slow?ms=600");
    let mut idle = server.connect();
    send(&mut idle, "/healthz");
    let mut first = [0; 256];
    let n = idle.read(&mut first).unwrap();
    assert!(first[..n].starts_with(b"HTTP/1.1 200"));
    let mut queued = server.connect();
    server.terminate();
    send(&mut queued, "/");
    let answers = [read_all(&mut slow), read_all(&mut queued)];
    for answer in &answers {
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    }
    assert!(answers[0].contains("Connection: close"), "{}", answers[0]);
    assert_eq!(read_all(&mut idle), "", "an idle connection is closed without a word");
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect_timeout(&server.address, Duration::from_secs(1)).is_err());
}

#[test]
fn a_load_reports_what_it_saw() {
    let server = Server::start();
    let url = format!("http://{}/", server.address);
    let out = Command::new(env!("CARGO_BIN_EXE_mesh-hello"))
        .args(["load", &url, "--secs", "1", "--rate", "50", "--keep"])
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("\"failed\":0,\"errors\":{}"), "{text}");
    let gone = Command::new(env!("CARGO_BIN_EXE_mesh-hello"))
        .args(["load", "tcp://127.0.0.1:1", "--secs", "1", "--rate", "20"])
        .output()
        .unwrap();
    let text = String::from_utf8(gone.stdout).unwrap();
    assert!(text.contains("\"ok\":0") && text.contains("\"refused\":"), "{text}");
}
