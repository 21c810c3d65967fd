//! What agents say to each other: a question without content, and its answer.

/// `MDR`, a version, and whether it is a question or an answer.
const QUESTION: [u8; 5] = *b"MDR1?";
const ANSWER: [u8; 5] = *b"MDR1!";

/// Length of the longest one.
pub(super) const MAX_BYTES: usize = ANSWER.len() + size_of::<u64>();

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// What have you programmed?
    Question,
    /// The endpoints of this revision.
    Answer(u64),
}

impl Message {
    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Self::Question => QUESTION.to_vec(),
            Self::Answer(revision) => [&ANSWER[..], &revision.to_be_bytes()].concat(),
        }
    }

    /// Nothing for anything else.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes == QUESTION {
            return Some(Self::Question);
        }
        let revision = bytes.strip_prefix(&ANSWER)?.try_into().ok()?;
        Some(Self::Answer(u64::from_be_bytes(revision)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_and_nothing_else_does() {
        for message in [Message::Question, Message::Answer(0), Message::Answer(u64::MAX)] {
            let bytes = message.encode();
            assert!(bytes.len() <= MAX_BYTES);
            assert_eq!(Message::decode(&bytes), Some(message));
            assert_eq!(Message::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Message::decode(&[&bytes[..], b"x"].concat()), None);
        }
    }
}
