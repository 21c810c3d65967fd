//! Connections that leave HTTP.

use crate::support::*;

const UPGRADE: &str = "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Switches, says hello with the head in one write, then echoes.
pub async fn echo_backend() -> Backend {
    Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        let head = io.head().await.unwrap().to_lowercase();
        assert!(head.contains("connection: upgrade\r\nupgrade: websocket\r\n"), "{head}");
        assert!(head.contains("sec-websocket-key: "), "{head}");
        io.send(format!("{SWITCH}hello")).await;
        loop {
            let byte = io.exactly(1).await;
            io.send(&byte).await;
            if byte == b"." {
                return;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways_until_one_side_ends() {
    let backend = echo_backend().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    // The first bytes of the new protocol come with the head on both sides.
    client.send(format!("{UPGRADE}early")).await;
    let head = client.head().await.unwrap().to_lowercase();
    assert_eq!(code(&head), 101);
    assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    assert_eq!(head.matches("upgrade: websocket").count(), 1);
    assert_eq!(client.exactly(10).await, b"helloearly");
    let text: String = "0123456789".repeat(20_000);
    for part in text.as_bytes().chunks(4096) {
        client.send(part).await;
        assert_eq!(client.exactly(part.len()).await, part);
    }
    // No configuration owns the connection.
    site.proxy.apply(&Default::default());
    client.send("still.").await;
    assert_eq!(client.rest().await, "still.");
    drop(client);
    eventually("the exchange ends", || site.status().counts.requests_open == 0).await;
    assert_eq!(site.status().counts.responses_1xx, 1);
}

#[tokio::test]
async fn a_backend_may_decline_an_upgrade() {
    let backend = Backend::answering(|_, _| ok("plain")).await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    for _ in 0..2 {
        let (head, body) = client.ask(UPGRADE).await;
        assert_eq!((code(&head), body.as_str()), (200, "plain"));
    }
}
