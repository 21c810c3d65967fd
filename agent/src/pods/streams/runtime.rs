//! The runtime's end: a connection to the URL that it has named, upgraded to SPDY.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Which of several dialects is spoken over SPDY: offered by clients, chosen by servers.
pub(super) const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
pub(super) const SPDY: &str = "SPDY/3.1";
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
const LARGEST_ERROR_BYTES: usize = 4 << 10;

/// The runtime's streaming server cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RuntimeError {
    #[error("the runtime answers streams at {0}, which is no http address")]
    Url(String),
    #[error("connect to the runtime's streaming server {0}")]
    Connect(String, #[source] std::io::Error),
    #[error("the runtime's streaming server")]
    Http(#[from] hyper::Error),
    #[error("the runtime's streaming server does not answer")]
    TimedOut,
    #[error("the runtime's streaming server answered {0}: {1}")]
    Refused(StatusCode, String),
}

/// Connects and upgrades; the headers of the answer, and the connection.
pub(super) async fn connect(
    url: &str,
    protocols: &[HeaderValue],
) -> Result<(HeaderMap, TokioIo<Upgraded>), RuntimeError> {
    let wrong = || RuntimeError::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let authority = uri.authority().filter(|_| uri.scheme_str() == Some("http"));
    let authority = authority.ok_or_else(wrong)?.to_string();
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::post(path)
        .header(header::HOST, &authority)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, SPDY)
        .body(Body::empty())
        .map_err(|_| wrong())?;
    for protocol in protocols {
        request.headers_mut().append(STREAM_PROTOCOL, protocol.clone());
    }
    let connecting = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(&authority)).await;
    let stream = connecting
        .map_err(|_| RuntimeError::TimedOut)?
        .map_err(|e| RuntimeError::Connect(authority.clone(), e))?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to the runtime's streaming server ended");
        }
    });
    let answer = tokio::time::timeout(ANSWER_LIMIT, sender.send_request(request)).await;
    let answer = answer.map_err(|_| RuntimeError::TimedOut)??;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = answer.status();
        let text = Limited::new(answer.into_body(), LARGEST_ERROR_BYTES).collect().await;
        let text = text.map(|b| String::from_utf8_lossy(&b.to_bytes()).trim().to_owned());
        return Err(RuntimeError::Refused(status, text.unwrap_or_default()));
    }
    let headers = answer.headers().clone();
    Ok((headers, TokioIo::new(hyper::upgrade::on(answer).await?)))
}
