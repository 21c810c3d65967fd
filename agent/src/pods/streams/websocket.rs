//! The client's end, where it speaks WebSocket.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::LINGER;

/// kubectl sends 32 KiB at a time, other clients what they were given.
const LARGEST_MESSAGE_BYTES: usize = 4 << 20;
/// What waits for a slow client; the runtime's side is not read meanwhile.
const BUFFER_BYTES: usize = 64 << 10;
/// A control frame carries 125 bytes, two of them the code (RFC 6455, section 5.5).
const LONGEST_REASON_BYTES: usize = 123;

pub(super) type Sink<C> = SplitSink<WebSocketStream<C>, Message>;
pub(super) type Messages<C> = SplitStream<WebSocketStream<C>>;

/// How a conversation ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    /// All was said.
    Done,
    /// The client went away.
    Left,
    /// The client does not keep to the protocol.
    Violation(String),
    /// The runtime's side broke.
    Broken(String),
}

/// The server's side of a connection whose handshake is done.
pub(super) async fn open<C>(client: C) -> (Sink<C>, Messages<C>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .max_message_size(Some(LARGEST_MESSAGE_BYTES))
        .max_frame_size(Some(LARGEST_MESSAGE_BYTES))
        .write_buffer_size(BUFFER_BYTES)
        .max_write_buffer_size(2 * LARGEST_MESSAGE_BYTES);
    WebSocketStream::from_raw_socket(client, Role::Server, Some(config)).await.split()
}

/// Tells the client how it ended, and reads what it still says: what it has not read yet would be lost otherwise.
pub(super) async fn close<C>(mut sink: Sink<C>, mut messages: Messages<C>, ending: &Ending)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let (code, reason) = match ending {
        Ending::Left => {
            // The answer to its goodbye, if it has said one.
            let _ = tokio::time::timeout(LINGER, sink.flush()).await;
            return;
        }
        Ending::Done => (CloseCode::Normal, ""),
        Ending::Violation(why) => (CloseCode::Protocol, why.as_str()),
        Ending::Broken(why) => (CloseCode::Error, why.as_str()),
    };
    let reason = Utf8Bytes::from(&reason[..reason.floor_char_boundary(LONGEST_REASON_BYTES)]);
    let bye = async {
        let told = sink.send(Message::Close(Some(CloseFrame { code, reason }))).await;
        if told.is_ok() {
            while let Some(Ok(_)) = messages.next().await {}
        }
    };
    if tokio::time::timeout(LINGER, bye).await.is_err() {
        tracing::debug!("a WebSocket client did not close in time");
    }
}

/// How it ended when the client's next message cannot be read.
pub(super) fn ending(error: &Error) -> Ending {
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Ending::Left,
        Error::Capacity(why) => Ending::Violation(why.to_string()),
        Error::Protocol(why) => Ending::Violation(why.to_string()),
        _ => Ending::Left,
    }
}

/// A message of nothing but bytes.
pub(super) fn binary(bytes: &[u8]) -> Message {
    Message::Binary(Bytes::copy_from_slice(bytes))
}
