//! GET over HTTP/1.1, plain or TLS. Only the status code counts.

use std::pin::pin;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::action::connect;
use super::insecure;

/// What to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) path: String,
    pub(crate) tls: bool,
    pub(crate) headers: Vec<(String, String)>,
}

impl Request {
    fn build(&self) -> Result<hyper::Request<Empty<Bytes>>, String> {
        let path =
            if self.path.starts_with('/') { self.path.clone() } else { format!("/{}", self.path) };
        let v6 = self.host.contains(':') && !self.host.starts_with('[');
        let host = if v6 { format!("[{}]", self.host) } else { self.host.clone() };
        let mut request = hyper::Request::builder().uri(path);
        let given = |name: &str| self.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if !given("host") {
            request = request.header("host", format!("{host}:{}", self.port));
        }
        if !given("user-agent") {
            request = request.header("user-agent", "kube-probe/mesh");
        }
        if !given("accept") {
            request = request.header("accept", "*/*");
        }
        request.body(Empty::new()).map_err(|e| format!("not a request: {e}"))
    }
}

/// Passes for a status from 200 to 399.
pub(super) async fn get(request: &Request) -> Result<(), String> {
    let stream = connect(&request.host, request.port).await?;
    let status = if request.tls {
        send(insecure::handshake(stream).await?, request.build()?).await?
    } else {
        send(stream, request.build()?).await?
    };
    if (200..400).contains(&status) {
        return Ok(());
    }
    Err(format!("HTTP probe failed with statuscode: {status}"))
}

async fn send<S>(stream: S, request: hyper::Request<Empty<Bytes>>) -> Result<u16, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |e: hyper::Error| format!("HTTP: {}", crate::errors::chain(&e));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let mut answer = pin!(sender.send_request(request));
    // The body is not read: whoever answers first ends the wait, and the connection is dropped.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = connection => answer.await,
    };
    Ok(answer.map_err(failed)?.status().as_u16())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// Answers one connection with fixed bytes; the request that it read.
    async fn once(answer: &'static [u8]) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(answer).await.unwrap();
            request.truncate(length);
            String::from_utf8(request).unwrap()
        });
        (port, served)
    }

    fn request(port: u16) -> Request {
        Request {
            host: "127.0.0.1".to_owned(),
            port,
            path: "healthz".to_owned(),
            tls: false,
            headers: vec![("X-A".to_owned(), "b".to_owned())],
        }
    }

    #[tokio::test]
    async fn the_status_decides() {
        let (port, served) = once(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(get(&request(port)).await, Ok(()));
        let seen = served.await.unwrap().to_lowercase();
        assert!(seen.starts_with("get /healthz http/1.1\r\n"), "{seen}");
        assert!(seen.contains("x-a: b") && seen.contains("kube-probe"), "{seen}");
        let (port, _served) = once(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await;
        let error = get(&request(port)).await.unwrap_err();
        assert_eq!(error, "HTTP probe failed with statuscode: 503");
        let (port, _served) = once(b"garbage\r\n\r\n").await;
        assert!(get(&request(port)).await.is_err());
    }
}
