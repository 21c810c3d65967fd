//! People at the streams of a pod, with clients other than kubectl: those of other languages, by WebSocket.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use mesh_agent::pods::Runner;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::image::BUSYBOX;
use crate::machine;

/// Nothing here takes longer, unless it fails.
const LIMIT: Duration = Duration::from_secs(60);

/// The agent's server, as far as streams are concerned.
async fn serve(runner: &Runner) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = runner.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// Upgrades with a protocol; or what the server says to that.
async fn open(
    server: SocketAddr,
    path: &str,
    protocol: &str,
) -> Result<WebSocketStream<TcpStream>, String> {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    if head.starts_with("HTTP/1.1 101 ") {
        return Ok(WebSocketStream::from_raw_socket(stream, Role::Client, None).await);
    }
    let mut body = vec![0; 4096];
    let length = stream.read(&mut body).await.unwrap();
    body.truncate(length);
    Err(String::from_utf8(body).unwrap())
}

/// All that is said on each channel until the server closes.
async fn heard(client: &mut WebSocketStream<TcpStream>) -> [String; 4] {
    let mut channels: [Vec<u8>; 4] = Default::default();
    let reading = async {
        while let Some(Ok(message)) = client.next().await {
            if let Message::Binary(bytes) = message {
                channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
            }
        }
    };
    tokio::time::timeout(LIMIT, reading).await.expect("the session ends");
    channels.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

#[test]
fn clients_of_other_languages_are_served() {
    machine::run("streams::clients_of_other_languages_are_served", async |rig| {
        let api = rig.api.clone();
        let serves = "echo ready > /index.html; httpd -p 8080 -h /; exec sleep 1000";
        api.apply(
            "p",
            serde_json::json!({"terminationGracePeriodSeconds": 0, "containers": [
                {"name": "c", "image": BUSYBOX, "command": ["sh", "-c", serves]},
                {"name": "t", "image": BUSYBOX, "stdin": true, "tty": true, "command": ["sh"]}]}),
        );
        let runner = rig.runner();
        rig.until(&runner, "the pod runs", |api| api.is_ready("p")).await;
        let server = serve(&runner).await;

        // Text instead of bytes.
        let path = "/exec/test/p/c?command=head&command=-n1&stdin=true&stdout=true";
        let mut client = open(server, path, "v4.channel.k8s.io").await.unwrap();
        client.send(Message::text("\0from a script\n")).await.unwrap();
        let [_, out, _, status] = heard(&mut client).await;
        assert_eq!(out, "from a script\n");
        assert!(status.contains("\"Success\""), "{status}");

        // A terminal that the client does not know of.
        let path = "/attach/test/p/t?stdin=true&stdout=true&stderr=true";
        let mut client = open(server, path, "v5.channel.k8s.io").await.unwrap();
        client
            .send(Message::binary(b"\0test -t 1 && echo on''e; exit 4\n".to_vec()))
            .await
            .unwrap();
        let [_, out, _, status] = heard(&mut client).await;
        assert!(out.contains("one\r\n"), "{out:?} {status}");

        // Channels of ports.
        let path = "/portForward/test/p?ports=8080,8081";
        let mut client = open(server, path, "v4.channel.k8s.io").await.unwrap();
        let request = b"\0GET / HTTP/1.0\r\n\r\n".to_vec();
        client.send(Message::binary(request)).await.unwrap();
        let [served, none, refused, why] = heard(&mut client).await;
        assert!(served.contains("ready\n"), "{served:?}");
        let port = |number: u16| String::from_utf8_lossy(&number.to_le_bytes()).into_owned();
        assert_eq!((none, refused), (port(8080), port(8081)), "nothing but the ports");
        assert!(why.contains("8081") && why.contains("refused"), "{why:?}");
        let unnamed = open(server, "/portForward/test/p", "v4.channel.k8s.io").await;
        assert!(unnamed.unwrap_err().starts_with("ports: "));
    });
}
