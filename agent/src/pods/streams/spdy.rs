//! SPDY/3.1 frames, as far as a client of a container runtime needs them (SPDY Protocol, draft 3.1, section 2).
//!
//! Never does: I/O. Known gaps, all of them harmless towards runtimes: header blocks that come in are not read (a reply
//! says that a stream is there, nothing more), and windows are not kept, because neither side of the runtimes' library
//! keeps them: TCP alone holds a sender back.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio_util::codec::Decoder;

/// Runtimes send what they read from a pipe, 32 KiB at most.
const LARGEST_FRAME_BYTES: usize = 1 << 20;
/// Data is sent in frames of this size, as kubectl does.
pub(super) const DATA_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 8;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// A frame that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// Bytes of a stream; with `end` they are its last.
    Data { stream: u32, payload: Bytes, end: bool },
    /// A stream that we asked for is there.
    Reply { stream: u32 },
    /// A stream was broken off.
    Reset { stream: u32 },
    /// To be answered with the same number, if the other side has chosen it.
    Ping { id: u32 },
    /// No streams will be taken any more.
    GoAway,
    /// Nothing that concerns us.
    Other,
}

/// The bytes are not SPDY/3.1 as a runtime speaks it.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpdyError {
    #[error("a frame of {0} bytes is larger than any that is taken")]
    TooLarge(usize),
    #[error("a control frame of SPDY version {0}")]
    Version(u16),
    #[error("a control frame of type {0} is too short")]
    TooShort(u16),
    #[error("read from the runtime")]
    Io(#[from] std::io::Error),
}

/// Cuts what comes in into frames.
#[derive(Debug, Default)]
pub(super) struct Frames;

impl Decoder for Frames {
    type Item = Frame;
    type Error = SpdyError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        let Some(header) = source.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let first = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let flags = header[4];
        let length = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        if length > LARGEST_FRAME_BYTES {
            return Err(SpdyError::TooLarge(length));
        }
        if source.len() < HEADER_BYTES + length {
            source.reserve(HEADER_BYTES + length - source.len());
            return Ok(None);
        }
        source.advance(HEADER_BYTES);
        let payload = source.split_to(length).freeze();
        if first >> 31 == 0 {
            let end = flags & FLAG_FIN != 0;
            return Ok(Some(Frame::Data { stream: first, payload, end }));
        }
        // A control bit, 15 bits of version, 16 bits of type.
        let (version, kind) = ((first >> 16) as u16 & 0x7fff, first as u16);
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        control(kind, &payload).map(Some)
    }
}

fn control(kind: u16, payload: &[u8]) -> Result<Frame, SpdyError> {
    let number = || {
        let bytes = payload.first_chunk::<4>().ok_or(SpdyError::TooShort(kind))?;
        Ok::<_, SpdyError>(u32::from_be_bytes(*bytes))
    };
    Ok(match kind {
        SYN_REPLY => Frame::Reply { stream: number()? & 0x7fff_ffff },
        RST_STREAM => Frame::Reset { stream: number()? & 0x7fff_ffff },
        PING => Frame::Ping { id: number()? },
        GOAWAY => Frame::GoAway,
        _ => Frame::Other,
    })
}

/// Writes header blocks: one zlib stream for all of a connection (section 2.6.10.1), without compression.
///
/// A stream without a preset dictionary is one that every zlib reader takes; a dictionary would have to be that of the draft.
#[derive(Debug, Default)]
pub(super) struct HeaderBlocks {
    started: bool,
}

impl HeaderBlocks {
    /// A stream opened by us, with headers whose names are lower case.
    pub(super) fn open(&mut self, stream: u32, headers: &[(&str, String)], out: &mut BytesMut) {
        let mut plain = BytesMut::new();
        let count = |length: usize, plain: &mut BytesMut| {
            plain.put_u32(u32::try_from(length).expect("header blocks are our own and small"));
        };
        count(headers.len(), &mut plain);
        for (name, value) in headers {
            for text in [*name, value.as_str()] {
                count(text.len(), &mut plain);
                plain.put_slice(text.as_bytes());
            }
        }
        let mut payload = BytesMut::new();
        payload.put_u32(stream);
        payload.put_u32(0); // belongs to no other stream
        payload.put_u16(0); // priority, slot
        if !std::mem::replace(&mut self.started, true) {
            payload.put_slice(&[0x78, 0x01]);
        }
        stored(&plain, &mut payload);
        // An empty block makes readers hand out what came before it, as a flush does.
        stored(&[], &mut payload);
        frame(0x8000_0000 | u32::from(VERSION) << 16 | u32::from(SYN_STREAM), 0, &payload, out);
    }
}

/// A block of a deflate stream that is stored as it is (RFC 1951, section 3.2.4).
fn stored(bytes: &[u8], out: &mut BytesMut) {
    let length = u16::try_from(bytes.len()).expect("header blocks are our own and small");
    out.put_u8(0);
    out.put_u16_le(length);
    out.put_u16_le(!length);
    out.put_slice(bytes);
}

/// Bytes of a stream, [`DATA_BYTES`] at most.
pub(super) fn data(stream: u32, payload: &[u8], out: &mut BytesMut) {
    frame(stream, 0, payload, out);
}

/// Nothing more will be sent on a stream.
pub(super) fn end(stream: u32, out: &mut BytesMut) {
    frame(stream, FLAG_FIN, &[], out);
}

/// The answer to a ping.
pub(super) fn pong(id: u32, out: &mut BytesMut) {
    let first = 0x8000_0000 | u32::from(VERSION) << 16 | u32::from(PING);
    frame(first, 0, &id.to_be_bytes(), out);
}

fn frame(first: u32, flags: u8, payload: &[u8], out: &mut BytesMut) {
    let length = u32::try_from(payload.len()).expect("no payload of ours is as large");
    out.reserve(HEADER_BYTES + payload.len());
    out.put_u32(first);
    out.put_u32(u32::from(flags) << 24 | length);
    out.put_slice(payload);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(mut bytes: BytesMut) -> Result<Vec<Frame>, SpdyError> {
        let mut frames = Vec::new();
        while let Some(frame) = Frames.decode(&mut bytes)? {
            frames.push(frame);
        }
        assert!(bytes.is_empty(), "{} bytes are left", bytes.len());
        Ok(frames)
    }

    #[test]
    fn streams_are_opened_with_one_zlib_stream_for_all() {
        let (mut blocks, mut out) = (HeaderBlocks::default(), BytesMut::new());
        blocks.open(1, &[("a", "bc".to_owned())], &mut out);
        let expected = "80030001 00 000027 00000001 00000000 0000 7801 \
                        00 0f00 f0ff 00000001 00000001 61 00000002 6263 00 0000 ffff";
        let hex = |text: &str| text.replace([' ', '\n'], "");
        assert_eq!(hex::encode(&out), hex(expected).replace("000027", "000025"));
        out.clear();
        blocks.open(3, &[], &mut out);
        let expected =
            "80030001 00 000018 00000003 00000000 0000 00 0400 fbff 00000000 00 0000 ffff";
        assert_eq!(hex::encode(&out), hex(expected));
    }

    #[test]
    fn frames_are_those_of_the_draft() {
        let bytes = hex::decode(
            "8003000200000006000000010000\
             00000003010000026869\
             8003000300000008000000050000000a\
             800300060000000400000002\
             80030007000000080000000000000000\
             80030009000000080000000100010000",
        );
        let data = Frame::Data { stream: 3, payload: Bytes::from_static(b"hi"), end: true };
        let frames = all(BytesMut::from(&bytes.unwrap()[..])).unwrap();
        let reset = Frame::Reset { stream: 5 };
        let (reply, ping) = (Frame::Reply { stream: 1 }, Frame::Ping { id: 2 });
        assert_eq!(frames, [reply, data, reset, ping, Frame::GoAway, Frame::Other]);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let decode =
            |text: &str| Frames.decode(&mut BytesMut::from(&hex::decode(text).unwrap()[..]));
        assert!(matches!(decode("0000000100ffffff"), Err(SpdyError::TooLarge(0xff_ffff))));
        assert!(matches!(decode("8002000600000000"), Err(SpdyError::Version(2))));
        assert!(matches!(decode("8003000600000002abcd"), Err(SpdyError::TooShort(PING))));
        assert!(matches!(decode("80030006"), Ok(None)));
    }

    proptest! {
        #[test]
        fn data_comes_back(stream in 1u32..0x8000_0000, bytes in prop::collection::vec(any::<u8>(), 0..DATA_BYTES)) {
            let mut out = BytesMut::new();
            data(stream, &bytes, &mut out);
            end(stream, &mut out);
            let payload = Bytes::from(bytes);
            let expected = [
                Frame::Data { stream, payload, end: false },
                Frame::Data { stream, payload: Bytes::new(), end: true },
            ];
            prop_assert_eq!(all(out).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut source = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frames.decode(&mut source) {}
            prop_assert!(source.capacity() <= 4096 + HEADER_BYTES + LARGEST_FRAME_BYTES * 2);
        }

        #[test]
        fn pieces_make_the_same_frames(bytes in prop::collection::vec(any::<u8>(), 0..512), cut in 1usize..64) {
            let mut whole = BytesMut::new();
            data(7, &bytes, &mut whole);
            pong(2, &mut whole);
            let (mut pieces, mut seen) = (BytesMut::new(), Vec::new());
            for piece in whole.chunks(cut) {
                pieces.extend_from_slice(piece);
                while let Some(frame) = Frames.decode(&mut pieces).unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, all(whole).unwrap());
        }
    }
}
