//! The gRPC health check (`grpc.health.v1.Health/Check`), plain HTTP/2. The two messages are small enough to be written
//! and read by hand: a request is `string service = 1`, an answer `enum status = 1` with 1 for "serving".

use std::net::SocketAddr;
use std::pin::pin;

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::action::connect;

const SERVING: u8 = 1;

/// Passes when the service says that it serves.
pub(super) async fn check(address: SocketAddr, service: &str) -> Result<(), String> {
    let stream = connect(&address.ip().to_string(), address.port()).await?;
    let failed = |e: hyper::Error| format!("gRPC: {}", crate::errors::chain(&e));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(failed)?;
    let request = hyper::Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/mesh")
        .body(Full::new(Bytes::from(frame(service))))
        .map_err(|e| format!("gRPC: {e}"))?;
    let mut ask = pin!(async {
        let answer = sender.send_request(request).await.map_err(failed)?;
        let early = grpc_status(answer.headers());
        let body = answer.into_body().collect().await.map_err(failed)?;
        let status = early.or(body.trailers().and_then(grpc_status));
        match status.as_deref() {
            None | Some("0") => serving(&body.to_bytes()),
            Some(code) => Err(format!("gRPC: status {code}")),
        }
    });
    tokio::select! {
        biased;
        result = &mut ask => result,
        _ = connection => ask.await,
    }
}

fn grpc_status(headers: &hyper::HeaderMap) -> Option<String> {
    headers.get("grpc-status")?.to_str().ok().map(str::to_owned)
}

/// One uncompressed message: flag, length, field 1 with its length.
fn frame(service: &str) -> Vec<u8> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
            length >>= 7;
        }
        message.push(u8::try_from(length).unwrap_or(0));
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    frame.extend_from_slice(&message);
    frame
}

fn serving(body: &[u8]) -> Result<(), String> {
    match body.get(5..) {
        Some([0x08, SERVING, ..]) => Ok(()),
        Some([0x08, status, ..]) => Err(format!("gRPC: service is not serving (status {status})")),
        Some([]) => Err("gRPC: service is not serving (status unknown)".to_owned()),
        _ => Err("gRPC: answer is not a health check response".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers one connection with that status of the health protocol.
    async fn server(status: u8) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = hyper::service::service_fn(move |request: hyper::Request<_>| async move {
                let body: hyper::body::Incoming = request.into_body();
                let asked = body.collect().await.unwrap().to_bytes();
                assert_eq!(asked[..], frame("web")[..]);
                let body = Full::new(Bytes::from(vec![0, 0, 0, 0, 2, 8, status]));
                hyper::Response::builder().header("grpc-status", "0").body(body)
            });
            let io = TokioIo::new(stream);
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(io, answer).await;
        });
        address
    }

    #[tokio::test]
    async fn the_service_decides() {
        assert_eq!(check(server(SERVING).await, "web").await, Ok(()));
        let error = check(server(2).await, "web").await.unwrap_err();
        assert_eq!(error, "gRPC: service is not serving (status 2)");
    }

    #[test]
    fn frames_are_as_the_protocol_says() {
        assert_eq!(frame(""), [0, 0, 0, 0, 0]);
        assert_eq!(frame("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(frame(&"x".repeat(300))[5..8], [0x0a, 0xac, 0x02]);
        assert_eq!(serving(&[0, 0, 0, 0, 2, 8, 1]), Ok(()));
        assert!(serving(&[0, 0, 0, 0, 2, 8, 2]).is_err());
        assert!(serving(&[0, 0, 0, 0, 0]).is_err());
        assert!(serving(&[]).is_err());
    }
}
