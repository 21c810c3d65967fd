//! Channels in WebSocket messages, as Kubernetes has them: the first byte of a message says which stream the rest is of.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio_tungstenite::tungstenite::Message;

pub(super) const STDIN: u8 = 0;
pub(super) const STDOUT: u8 = 1;
pub(super) const STDERR: u8 = 2;
/// Carries a `Status` at the end: how the process has ended.
pub(super) const ERROR: u8 = 3;
/// Takes the size of the terminal, as JSON.
pub(super) const RESIZE: u8 = 4;
/// In version 5: the rest of the message is the number of a channel that has ended.
const CLOSE: u8 = 255;

/// The forms that are spoken, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channels {
    /// Standard input can be ended while the rest goes on.
    V5,
    V4,
    /// For clients that can send text only: a digit, then Base64.
    V4Base64,
}

/// A message is not in the form that was agreed upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("a message of the wrong type")]
    Type,
    #[error("a message without a channel that is known")]
    Channel,
    #[error("a message that is not Base64")]
    Base64,
}

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    Data(u8, Bytes),
    /// A channel has ended.
    End(u8),
    /// It goes away.
    Leave,
    /// Nothing: pings are answered elsewhere.
    Nothing,
}

impl Channels {
    pub(super) const ALL: [Self; 3] = [Self::V5, Self::V4, Self::V4Base64];

    /// The name by which it is agreed upon.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V5 => "v5.channel.k8s.io",
            Self::V4 => "v4.channel.k8s.io",
            Self::V4Base64 => "v4.base64.channel.k8s.io",
        }
    }

    /// What a message of a client says.
    pub(super) fn parse(self, message: Message) -> Result<Said, ChannelError> {
        let bytes = match (self, message) {
            (_, Message::Close(_)) => return Ok(Said::Leave),
            (_, Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {
                return Ok(Said::Nothing);
            }
            (Self::V4Base64, Message::Text(text)) => return encoded(text.as_str()),
            (Self::V4Base64, Message::Binary(_)) => return Err(ChannelError::Type),
            (_, Message::Binary(bytes)) => bytes,
            // What the Python client sends when it is given text.
            (_, Message::Text(text)) => text.into(),
        };
        match bytes.first() {
            // Kubernetes takes empty messages, too.
            None => Ok(Said::Nothing),
            Some(&CLOSE) if self == Self::V5 => {
                let channel = bytes.get(1).filter(|_| bytes.len() == 2);
                channel.map(|channel| Said::End(*channel)).ok_or(ChannelError::Channel)
            }
            Some(&channel) => Ok(Said::Data(channel, bytes.slice(1..))),
        }
    }

    /// How many pairs of channels there can be.
    pub(super) fn pairs(self) -> usize {
        match self {
            Self::V5 | Self::V4 => usize::from(CLOSE) / 2,
            Self::V4Base64 => 5,
        }
    }

    /// A message to the client.
    pub(super) fn message(self, channel: u8, bytes: &[u8]) -> Message {
        if self == Self::V4Base64 {
            let mut text = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + channel));
            STANDARD.encode_string(bytes, &mut text);
            return Message::text(text);
        }
        let mut whole = Vec::with_capacity(1 + bytes.len());
        whole.push(channel);
        whole.extend_from_slice(bytes);
        Message::binary(whole)
    }
}

fn encoded(text: &str) -> Result<Said, ChannelError> {
    let Some(first) = text.bytes().next() else { return Ok(Said::Nothing) };
    let channel = first.checked_sub(b'0').filter(|c| *c <= 9).ok_or(ChannelError::Channel)?;
    let bytes = STANDARD.decode(&text.as_bytes()[1..]).map_err(|_| ChannelError::Base64)?;
    Ok(Said::Data(channel, bytes.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ends_are_told_in_version_5_only() {
        let end = Message::binary(vec![CLOSE, STDIN]);
        assert_eq!(Channels::V5.parse(end.clone()), Ok(Said::End(STDIN)));
        let data = Said::Data(CLOSE, Bytes::from_static(&[STDIN]));
        assert_eq!(Channels::V4.parse(end), Ok(data));
        assert_eq!(Channels::V5.parse(Message::binary(vec![CLOSE])), Err(ChannelError::Channel));
        let long = Message::binary(vec![CLOSE, 0, 0]);
        assert_eq!(Channels::V5.parse(long), Err(ChannelError::Channel));
    }

    #[test]
    fn text_is_taken_in_all_forms_and_bytes_where_there_are_bytes() {
        let (text, binary) = (Message::text("0aGk="), Message::binary(b"\0hi".to_vec()));
        let said = Ok(Said::Data(STDIN, Bytes::from_static(b"hi")));
        assert_eq!(Channels::V4Base64.parse(text.clone()), said);
        assert_eq!(Channels::V5.parse(binary.clone()), said);
        assert_eq!(Channels::V4.parse(Message::text("\0hi")), said);
        assert_eq!(Channels::V4Base64.parse(binary), Err(ChannelError::Type));
        assert_eq!(Channels::V4Base64.parse(Message::text("0%")), Err(ChannelError::Base64));
        assert_eq!(Channels::V4Base64.parse(Message::text("é")), Err(ChannelError::Channel));
        for empty in [Message::binary(vec![]), Message::Ping(Bytes::new())] {
            assert_eq!(Channels::V5.parse(empty), Ok(Said::Nothing));
        }
        assert_eq!(Channels::V5.parse(Message::Close(None)), Ok(Said::Leave));
    }

    proptest! {
        #[test]
        fn messages_come_back(channel in 0u8..5, bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            for form in Channels::ALL {
                let said = form.parse(form.message(channel, &bytes));
                prop_assert_eq!(said, Ok(Said::Data(channel, bytes.clone().into())));
            }
        }

        #[test]
        fn any_message_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..64), text in ".{0,32}") {
            for form in Channels::ALL {
                for message in [Message::binary(bytes.clone()), Message::text(text.clone())] {
                    if let Ok(Said::Data(_, data)) = form.parse(message) {
                        prop_assert!(data.len() < bytes.len().max(text.len()));
                    }
                }
            }
        }
    }
}
