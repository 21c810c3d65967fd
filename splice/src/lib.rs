//! Bytes from one connection to another and back, until either ends: a person's connection into a pod passes through the control
//! service and the agent, each of which joins two.
//!
//! Never does: understand the bytes. Entry: [`splice`].
#![forbid(unsafe_code)]

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// What is held of each direction, at most.
const BLOCK_BYTES: usize = 32 << 10;

/// Copies both ways. When one side ends, the other is told so and may finish what it is saying, for as long as `linger`.
pub async fn splice(
    one: impl AsyncRead + AsyncWrite,
    other: impl AsyncRead + AsyncWrite,
    linger: Duration,
) {
    let (one_out, one_in) = tokio::io::split(one);
    let (other_out, other_in) = tokio::io::split(other);
    let mut forth = std::pin::pin!(copy(one_out, other_in));
    let mut back = std::pin::pin!(copy(other_out, one_in));
    let rest = tokio::select! {
        () = &mut forth => tokio::time::timeout(linger, back).await,
        () = &mut back => tokio::time::timeout(linger, forth).await,
    };
    if rest.is_err() {
        tracing::debug!("one side of a stream did not end in time");
    }
}

/// Copies until the source ends. A sink that fails takes nothing more, but the source is still read: a connection that is
/// closed with bytes unread may take away what its other side has yet to read.
async fn copy(mut source: impl AsyncRead + Unpin, mut sink: impl AsyncWrite + Unpin) {
    let mut block = vec![0; BLOCK_BYTES];
    let mut open = true;
    while let Ok(length @ 1..) = source.read(&mut block).await {
        if open {
            open = sink.write_all(&block[..length]).await.is_ok() && sink.flush().await.is_ok();
        }
    }
    // Its other side may be gone, which is as good.
    let _ = sink.shutdown().await;
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    const LINGER: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn both_directions_arrive_whole_and_an_end_ends_both() {
        let (mut client, near) = duplex(1000);
        let (far, mut server) = duplex(1000);
        let splicing = tokio::spawn(splice(near, far, LINGER));
        let sent = vec![7; 100_000];
        let answer = vec![8; 100_000];
        let (expected, reply) = (sent.clone(), answer.clone());
        let serving = tokio::spawn(async move {
            let mut got = vec![0; expected.len()];
            server.read_exact(&mut got).await.unwrap();
            assert_eq!(got, expected);
            server.write_all(&reply).await.unwrap();
        });
        client.write_all(&sent).await.unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, answer);
        serving.await.unwrap();
        drop(client);
        splicing.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_side_that_goes_on_talking_is_left_in_the_end() {
        let (mut client, near) = duplex(1000);
        let (far, server) = duplex(1000);
        drop(server);
        let splicing = tokio::spawn(splice(near, far, LINGER));
        while client.write_all(b"more").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        splicing.await.unwrap();
    }
}
