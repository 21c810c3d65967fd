//! A SPDY connection in WebSocket messages, taken out of them for the runtime.

use axum::http::HeaderValue;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::Message;

use super::websocket::{self, Ending, Messages, Sink};

/// What is spoken over SPDY: each stream names its port.
pub(super) const PROTOCOL: HeaderValue = HeaderValue::from_static("portforward.k8s.io");
const BLOCK_BYTES: usize = 32 << 10;

/// Carries bytes both ways until either side ends.
pub(super) async fn run<C, R>(client: C, runtime: R) -> Ending
where
    C: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + AsyncWrite,
{
    let (mut sink, mut messages) = websocket::open(client).await;
    let (from, to) = tokio::io::split(runtime);
    let ending = tokio::select! {
        ending = down(from, &mut sink) => ending,
        ending = up(&mut messages, to) => ending,
    };
    websocket::close(sink, messages, &ending).await;
    ending
}

async fn down<C>(mut runtime: impl AsyncRead + Unpin, sink: &mut Sink<C>) -> Ending
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        match runtime.read(&mut block).await {
            Ok(0) => return Ending::Done,
            Ok(length) => {
                if sink.send(websocket::binary(&block[..length])).await.is_err() {
                    return Ending::Left;
                }
            }
            Err(error) => return Ending::Broken(error.to_string()),
        }
    }
}

async fn up<C>(messages: &mut Messages<C>, mut runtime: impl AsyncWrite + Unpin) -> Ending
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut open = true;
    loop {
        match messages.next().await {
            Some(Ok(Message::Binary(bytes))) if open => {
                // When the runtime has closed, its last words may still be on their way down.
                open = runtime.write_all(&bytes).await.is_ok();
            }
            Some(Ok(Message::Text(_))) => return Ending::Violation("a text message".to_owned()),
            Some(Ok(Message::Close(_))) => return Ending::Left,
            Some(Ok(_)) => {}
            None => return Ending::Left,
            Some(Err(error)) => return websocket::ending(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    #[tokio::test]
    async fn bytes_pass_unaltered_and_the_end_is_told() {
        let (near, client) = duplex(4096);
        let (runtime, mut server) = duplex(4096);
        let running = tokio::spawn(run(near, runtime));
        let echo = tokio::spawn(async move {
            let mut got = vec![0; 100_000];
            server.read_exact(&mut got).await.unwrap();
            server.write_all(&got).await.unwrap();
        });
        let client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
        let (mut sink, mut messages) = client.split();
        let sent: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        let pieces = sent.clone();
        let sending = tokio::spawn(async move {
            for piece in pieces.chunks(7000) {
                sink.send(websocket::binary(piece)).await.unwrap();
            }
            sink
        });
        let mut got = Vec::new();
        while let Some(Ok(Message::Binary(bytes))) = messages.next().await {
            got.extend_from_slice(&bytes);
        }
        assert!(got == sent, "{} bytes came back", got.len());
        echo.await.unwrap();
        drop((sending.await.unwrap(), messages));
        assert_eq!(running.await.unwrap(), Ending::Done);
    }

    #[tokio::test]
    async fn a_client_that_leaves_ends_the_runtimes_side() {
        let (near, client) = duplex(4096);
        let (runtime, mut server) = duplex(4096);
        let running = tokio::spawn(run(near, runtime));
        drop(client);
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(running.await.unwrap(), Ending::Left);
    }
}
