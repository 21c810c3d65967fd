//! GET over HTTP/1.1, plain or TLS. Only the status code of the last answer counts.

use std::pin::pin;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::action::connect;
use super::{insecure, redirect};

/// How often an answer may send us on.
const REDIRECTS: usize = 10;

/// What to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) path: String,
    pub(crate) tls: bool,
    pub(crate) headers: Vec<(String, String)>,
    /// Whatever is answered is good: a hook tells, and does not ask.
    pub(crate) any_status: bool,
}

struct Answer {
    status: u16,
    /// Where it sends us on.
    location: Option<String>,
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

/// Passes for a status from 200 to 399; with a warning when it leads to where nobody is asked.
pub(super) async fn get(request: &Request) -> Result<Option<String>, String> {
    let mut request = request.clone();
    for _ in 0..=REDIRECTS {
        let Answer { status, location } = ask(&request).await?;
        let next = location.as_deref().and_then(|location| redirect::next(&request, location));
        match next {
            Some(next) => request = next,
            None if request.any_status || (200..300).contains(&status) => return Ok(None),
            None if (300..400).contains(&status) => {
                let location = location.unwrap_or_default();
                let text = "the container does not answer itself, and counts as good";
                return Ok(Some(format!("statuscode {status} leads to {location:?}: {text}")));
            }
            None => return Err(format!("HTTP probe failed with statuscode: {status}")),
        }
    }
    Err(format!("HTTP: stopped after {REDIRECTS} redirects"))
}

async fn ask(request: &Request) -> Result<Answer, String> {
    let stream = connect(&request.host, request.port).await?;
    if request.tls {
        send(insecure::handshake(stream).await?, request.build()?).await
    } else {
        send(stream, request.build()?).await
    }
}

async fn send<S>(stream: S, request: hyper::Request<Empty<Bytes>>) -> Result<Answer, String>
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
    let answer = answer.map_err(failed)?;
    let status = answer.status().as_u16();
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let moves = matches!(status, 301 | 302 | 303 | 307 | 308);
    Ok(Answer { status, location: location.filter(|_| moves).map(str::to_owned) })
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
            any_status: false,
        }
    }

    /// Answers one connection after the other, by the path that is asked for.
    async fn site(answers: &'static [(&'static str, &'static str)]) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let path = request.split(' ').nth(1).unwrap();
                let answer = answers.iter().find(|(of, _)| *of == path).unwrap().1;
                let answer = format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        port
    }

    #[tokio::test]
    async fn what_the_container_leads_to_decides() {
        let port = site(&[
            ("/good", "302 F\r\nlocation: /end"),
            ("/end", "200 OK"),
            ("/bad", "301 M\r\nlocation: broken"),
            ("/broken", "500 No"),
            ("/away", "307 T\r\nlocation: https://elsewhere.example/"),
            ("/round", "308 P\r\nlocation: /round"),
            ("/nowhere", "302 F"),
        ])
        .await;
        let of = async |path: &str, any_status| {
            get(&Request { path: path.to_owned(), any_status, ..request(port) }).await
        };
        assert_eq!(of("/good", false).await, Ok(None));
        for (path, leads_to) in [
            ("/away", "307 leads to \"https://elsewhere.example/\""),
            ("/nowhere", "302 leads to \"\""),
        ] {
            let warning = of(path, false).await.unwrap().unwrap_or_default();
            assert!(warning.contains(leads_to), "{path}: {warning}");
            assert_eq!(of(path, true).await, Ok(None), "{path}");
        }
        let failed = "HTTP probe failed with statuscode: 500".to_owned();
        assert_eq!(of("/bad", false).await, Err(failed));
        assert_eq!(of("/bad", true).await, Ok(None), "a hook is heard, whatever comes of it");
        let round = Err("HTTP: stopped after 10 redirects".to_owned());
        assert_eq!(of("/round", false).await, round);
    }

    #[tokio::test]
    async fn the_status_decides() {
        let (port, served) = once(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(get(&request(port)).await, Ok(None));
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
