//! A proxy with routes, backends that count, and clients that see every byte.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use mesh_ingress::{Listeners, Proxy, ProxyOptions, Status};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{HttpRoute, L7Config, PathMatch};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// Nothing here takes this long unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Fails instead of hanging.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(LIMIT, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: nothing within {LIMIT:?}"),
    }
}

/// Waits until `holds`.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

pub fn route(host: Option<&str>, path: PathMatch, backends: &[SocketAddr]) -> HttpRoute {
    HttpRoute {
        ingress: ObjectKey::new("web", "test"),
        host: host.map(str::to_owned),
        path,
        service: ObjectKey::new("web", "test"),
        port: 80,
        backends: backends.to_vec(),
    }
}

/// All requests go to `backends`.
pub fn all_to(backends: &[SocketAddr]) -> L7Config {
    let routes = vec![route(None, PathMatch::Prefix("/".into()), backends)];
    L7Config { routes, certificates: vec![] }
}

/// One thread, short times where a test waits for them.
pub fn options() -> ProxyOptions {
    let mut options = ProxyOptions { threads: 1, ..ProxyOptions::default() };
    options.timeouts.drain = Duration::from_secs(5);
    options.timeouts.drain_idle = Duration::from_millis(50);
    options
}

pub struct Site {
    pub proxy: Proxy,
    pub http: SocketAddr,
    pub https: SocketAddr,
}

impl Site {
    pub fn new(config: &L7Config, options: ProxyOptions) -> Self {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let listeners = Listeners::bind(&[any], &[any], options.threads).unwrap();
        let proxy = Proxy::start(listeners, options).unwrap();
        proxy.apply(config);
        let (http, https) = (proxy.http()[0], proxy.https()[0]);
        Self { proxy, http, https }
    }

    pub fn status(&self) -> Status {
        self.proxy.status()
    }

    pub async fn client(&self) -> Raw {
        Raw::connect(self.http).await
    }

    /// Sends `bytes`, reads until the proxy closes.
    pub async fn once(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut client = self.client().await;
        client.send(bytes).await;
        client.rest().await
    }
}

/// A backend that runs a function for each connection.
pub struct Backend {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Backend {
    pub async fn new<F, T>(serve: F) -> Self
    where
        F: Fn(TcpStream, usize) -> T + Send + Sync + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            let mut running = tokio::task::JoinSet::new();
            loop {
                let (io, _) = listener.accept().await.unwrap();
                io.set_nodelay(true).unwrap();
                running.spawn(serve(io, count.fetch_add(1, SeqCst)));
            }
        });
        Self { address, connections, task: task.abort_handle() }
    }

    /// Never answers; counts the connections that were ended at the other side.
    pub async fn silent() -> (Self, Arc<AtomicUsize>) {
        let ended = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ended);
        let backend = Self::new(move |io, _| {
            let count = Arc::clone(&count);
            async move {
                let mut io = Raw::new(io);
                io.head().await;
                io.rest().await;
                count.fetch_add(1, SeqCst);
            }
        });
        (backend.await, ended)
    }

    /// Answers each request with what `answer` makes of its head and body.
    pub async fn answering<F>(answer: F) -> Self
    where
        F: Fn(&str, &[u8]) -> String + Send + Sync + 'static,
    {
        let answer = Arc::new(answer);
        Self::new(move |io, _| {
            let answer = Arc::clone(&answer);
            async move {
                let mut io = Raw::new(io);
                while let Some(head) = io.head().await {
                    let body = io.body(&head).await;
                    io.send(answer(&head, &body)).await;
                }
            }
        })
        .await
    }

    /// Answers each request with its own head and body as text.
    pub async fn echo() -> Self {
        Self::answering(|head, body| ok(&format!("{head}{}", String::from_utf8_lossy(body)))).await
    }

    pub fn seen(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A response with `body`.
pub fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// A socket on which a test reads and writes bytes.
pub struct Raw {
    pub io: TcpStream,
    read: Vec<u8>,
}

impl Raw {
    pub fn new(io: TcpStream) -> Self {
        Self { io, read: Vec::new() }
    }

    pub async fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).await.unwrap())
    }

    /// Sends, unless the other side has closed.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.io.write_all(bytes.as_ref()).await;
    }

    async fn fill(&mut self) -> usize {
        let mut buffer = vec![0; 16384];
        let n = soon("read", self.io.read(&mut buffer)).await.unwrap_or(0);
        self.read.extend_from_slice(&buffer[..n]);
        n
    }

    /// The next head, with its empty line; none when the connection has ended.
    pub async fn head(&mut self) -> Option<String> {
        loop {
            if let Some(at) = find(&self.read, b"\r\n\r\n") {
                let head = self.read.drain(..at + 4).collect();
                return Some(String::from_utf8(head).unwrap());
            }
            if self.fill().await == 0 {
                return None;
            }
        }
    }

    /// Exactly `n` bytes.
    pub async fn exactly(&mut self, n: usize) -> Vec<u8> {
        while self.read.len() < n {
            assert_ne!(self.fill().await, 0, "ended after {} of {n} bytes", self.read.len());
        }
        self.read.drain(..n).collect()
    }

    /// The body that `head` announces. Chunks are joined; trailers are appended as text.
    pub async fn body(&mut self, head: &str) -> Vec<u8> {
        let lower = head.to_ascii_lowercase();
        if lower.contains("transfer-encoding: chunked") {
            return self.chunks().await;
        }
        let length = lower.split("content-length: ").nth(1);
        let length = length.map_or(0, |l| l.lines().next().unwrap().trim().parse().unwrap());
        self.exactly(length).await
    }

    async fn line(&mut self) -> String {
        loop {
            if let Some(at) = find(&self.read, b"\r\n") {
                let line: Vec<u8> = self.read.drain(..at + 2).collect();
                return String::from_utf8(line[..at].to_vec()).unwrap();
            }
            assert_ne!(self.fill().await, 0, "ended within a line");
        }
    }

    async fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let size = usize::from_str_radix(&self.line().await, 16).unwrap();
            if size == 0 {
                break;
            }
            body.extend(self.exactly(size).await);
            assert_eq!(self.line().await, "");
        }
        loop {
            match self.line().await.as_str() {
                "" => return body,
                trailer => body.extend_from_slice(format!("[{trailer}]").as_bytes()),
            }
        }
    }

    /// A whole response: its head and its body.
    pub async fn response(&mut self) -> (String, String) {
        let head = self.head().await.expect("a response");
        let body = self.body(&head).await;
        (head, String::from_utf8(body).unwrap())
    }

    /// Sends a request and reads the response.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> (String, String) {
        self.send(request).await;
        self.response().await
    }

    /// Everything until the other side closes.
    pub async fn rest(&mut self) -> String {
        while self.fill().await > 0 {}
        String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned()
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The status in a response's first line.
pub fn code(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{head:?}"))
}

pub const GET: &str = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
