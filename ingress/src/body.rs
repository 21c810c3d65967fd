//! Where a message body ends (RFC 9112 sections 6 and 7). Strict: what two programs could read differently is an error.

/// The framing of a body, and how much of it has passed.
#[derive(Debug)]
pub(crate) enum Decoder {
    /// So many bytes are left.
    Length(u64),
    /// Chunked.
    Chunked(Chunked),
    /// Everything until the stream ends.
    UntilClose,
}

/// The body breaks its framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    /// A chunk's size line is not hexadecimal digits and a line end.
    #[error("a chunk size is malformed")]
    ChunkSize,
    /// A chunk is not followed by CRLF.
    #[error("a chunk does not end where it should")]
    ChunkEnd,
    /// The trailer section is malformed.
    #[error("the trailers are malformed")]
    Trailers,
    /// The trailer section is too large.
    #[error("the trailers are too large")]
    TrailersTooLarge,
}

/// What the front of the input holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Too little to say; nothing of the input is used.
    NeedMore,
    /// `skip` bytes of framing, then `len` (> 0) bytes of the body.
    Data { skip: usize, len: usize },
    /// The body ends after `used` bytes, which hold the trailer section (empty when there are none).
    End { used: usize, trailers: Vec<u8> },
}

/// The state of a chunked body.
#[derive(Debug, Default)]
pub(crate) struct Chunked {
    /// Bytes of the present chunk that have not passed.
    left: u64,
    /// Whether a chunk has begun, so that CRLF must follow it.
    within: bool,
}

const MAX_SIZE_LINE: usize = 512;
const MAX_SIZE_DIGITS: usize = 15;
const MAX_TRAILER_BYTES: usize = 16 << 10;
const MAX_TRAILERS: usize = 64;

impl Decoder {
    /// Whether nothing is left and nothing was to come.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Length(0))
    }

    /// Reads the front of `input`. The caller uses up what the step names before the next call.
    pub(crate) fn step(&mut self, input: &[u8]) -> Result<Step, BodyError> {
        match self {
            Self::Length(0) => Ok(Step::End { used: 0, trailers: Vec::new() }),
            _ if input.is_empty() => Ok(Step::NeedMore),
            Self::Length(left) => {
                let len = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= len as u64;
                Ok(Step::Data { skip: 0, len })
            }
            Self::UntilClose => Ok(Step::Data { skip: 0, len: input.len() }),
            Self::Chunked(chunked) => chunked.step(input),
        }
    }

    /// The end of the stream has come: whether that ends the body properly.
    pub(crate) fn may_end(&self) -> bool {
        matches!(self, Self::UntilClose | Self::Length(0))
    }
}

impl Chunked {
    fn step(&mut self, input: &[u8]) -> Result<Step, BodyError> {
        if self.left > 0 {
            return Ok(self.data(0, input));
        }
        let mut at = 0;
        if self.within {
            match input {
                [b'\r', b'\n', ..] => at = 2,
                [b'\r'] => return Ok(Step::NeedMore),
                _ => return Err(BodyError::ChunkEnd),
            }
        }
        let Some((size, line)) = size_line(&input[at..])? else { return Ok(Step::NeedMore) };
        if size == 0 {
            let after = at + line;
            return Ok(match trailer_section(&input[after..])? {
                Some(trailers) => {
                    let end = trailers.len() + 2;
                    Step::End { used: after + end, trailers: trailers.to_vec() }
                }
                None => Step::NeedMore,
            });
        }
        at += line;
        if at == input.len() {
            return Ok(Step::NeedMore);
        }
        (self.left, self.within) = (size, true);
        Ok(self.data(at, &input[at..]))
    }

    fn data(&mut self, skip: usize, input: &[u8]) -> Step {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(input.len());
        self.left -= len as u64;
        Step::Data { skip, len }
    }
}

/// Size and length of a chunk's size line. Extensions are read over: they are never passed on.
fn size_line(input: &[u8]) -> Result<Option<(u64, usize)>, BodyError> {
    let window = &input[..input.len().min(MAX_SIZE_LINE)];
    let digits = window.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits > MAX_SIZE_DIGITS || (digits == 0 && !window.is_empty()) {
        return Err(BodyError::ChunkSize);
    }
    let Some(end) = memchr::memchr2(b'\r', b'\n', window) else {
        let tail_ok = matches!(window.get(digits), None | Some(b';' | b' ' | b'\t'));
        let in_bounds = window.len() < MAX_SIZE_LINE;
        return if tail_ok && in_bounds { Ok(None) } else { Err(BodyError::ChunkSize) };
    };
    if !extension_is_valid(&window[digits..end]) || window[end] != b'\r' {
        return Err(BodyError::ChunkSize);
    }
    match window.get(end + 1) {
        None => return Ok(None),
        Some(b'\n') => {}
        Some(_) => return Err(BodyError::ChunkSize),
    }
    let text = std::str::from_utf8(&window[..digits]).map_err(|_| BodyError::ChunkSize)?;
    let size = u64::from_str_radix(text, 16).map_err(|_| BodyError::ChunkSize)?;
    Ok(Some((size, end + 2)))
}

fn extension_is_valid(text: &[u8]) -> bool {
    let rest = text.trim_ascii_start();
    let printable = |b: &u8| *b == b'\t' || (0x20..0x7f).contains(b);
    text.is_empty() || (rest.first() == Some(&b';') && rest.iter().all(printable))
}

/// The trailer section without its final empty line, once it is complete.
fn trailer_section(input: &[u8]) -> Result<Option<&[u8]>, BodyError> {
    let mut line = 0;
    for end in memchr::memchr_iter(b'\n', input) {
        if end == 0 || input[end - 1] != b'\r' {
            return Err(BodyError::Trailers);
        }
        if end - line == 1 {
            return if line <= MAX_TRAILER_BYTES {
                Ok(Some(&input[..line]))
            } else {
                Err(BodyError::TrailersTooLarge)
            };
        }
        line = end + 1;
    }
    if input.len() > MAX_TRAILER_BYTES { Err(BodyError::TrailersTooLarge) } else { Ok(None) }
}

/// The fields of a trailer section that may be passed on.
pub(crate) fn trailer_fields(section: &[u8]) -> Result<Vec<(String, Vec<u8>)>, BodyError> {
    if section.is_empty() {
        return Ok(Vec::new());
    }
    let mut text = section.to_vec();
    text.extend_from_slice(b"\r\n");
    let mut headers = [httparse::EMPTY_HEADER; MAX_TRAILERS];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(&text, &mut headers)
    else {
        return Err(BodyError::Trailers);
    };
    let allowed = fields.iter().filter(|f| crate::field::allowed_in_trailers(f.name.as_bytes()));
    Ok(allowed.map(|f| (f.name.to_owned(), f.value.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A body, its trailers, and how many bytes were left over.
    type Whole = (Vec<u8>, Vec<u8>, usize);

    /// Feeds `input` in pieces of `piece` bytes; gives the body, the trailers and the bytes left over.
    fn run(input: &[u8], piece: usize) -> Result<Option<Whole>, BodyError> {
        let mut decoder = Decoder::Chunked(Chunked::default());
        let (mut body, mut window, mut given) = (Vec::new(), Vec::new(), 0);
        loop {
            match decoder.step(&window)? {
                Step::NeedMore if given == input.len() => return Ok(None),
                Step::NeedMore => {
                    let end = (given + piece).min(input.len());
                    window.extend_from_slice(&input[given..end]);
                    given = end;
                }
                Step::Data { skip, len } => {
                    assert!(len > 0);
                    body.extend_from_slice(&window[skip..skip + len]);
                    window.drain(..skip + len);
                }
                Step::End { used, trailers } => {
                    return Ok(Some((body, trailers, window.len() - used + input.len() - given)));
                }
            }
        }
    }

    #[test]
    fn chunks_are_read_in_any_pieces() {
        let input =
            b"4\r\nWiki\r\n6;x=\"y\"\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n0\r\nA: b\r\n\r\nGET";
        for piece in 1..input.len() {
            let (body, trailers, left) = run(input, piece).unwrap().unwrap();
            assert_eq!(body, b"Wikipedia in \r\n\r\nchunks.");
            assert_eq!(trailers, b"A: b\r\n");
            assert!(left >= 3, "what follows is not ours");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        for (input, error) in [
            ("x\r\n", BodyError::ChunkSize),
            ("\r\n", BodyError::ChunkSize),
            ("-1\r\n", BodyError::ChunkSize),
            ("0x4\r\nabcd\r\n", BodyError::ChunkSize),
            (" 4\r\nabcd\r\n", BodyError::ChunkSize),
            ("4 \r\nabcd\r\n", BodyError::ChunkSize),
            ("4\nabcd\r\n", BodyError::ChunkSize),
            ("4\rXabcd\r\n", BodyError::ChunkSize),
            ("4;a\nb\r\nabcd", BodyError::ChunkSize),
            ("4;\0\r\nabcd", BodyError::ChunkSize),
            ("1000000000000000\r\n", BodyError::ChunkSize),
            ("4\r\nabcdX\r\n", BodyError::ChunkEnd),
            ("4\r\nabcd\n0\r\n\r\n", BodyError::ChunkEnd),
            ("4\r\nabcde\r\n", BodyError::ChunkEnd),
            ("0\r\nA: b\n\r\n", BodyError::Trailers),
            ("0\r\n\n", BodyError::Trailers),
        ] {
            assert_eq!(run(input.as_bytes(), 1), Err(error), "{input:?} in bytes");
            assert_eq!(run(input.as_bytes(), 100), Err(error), "{input:?} at once");
        }
        let endless = format!("0\r\nA: {}", "b".repeat(20_000));
        assert_eq!(run(endless.as_bytes(), 100), Err(BodyError::TrailersTooLarge));
        let endless = format!("1;{}", "b".repeat(20_000));
        assert_eq!(run(endless.as_bytes(), 100), Err(BodyError::ChunkSize));
    }

    #[test]
    fn trailers_are_checked_and_filtered() {
        let fields = trailer_fields(b"A: b\r\nContent-Length: 4\r\nc:d \r\n").unwrap();
        assert_eq!(fields, [("A".to_owned(), b"b".to_vec()), ("c".to_owned(), b"d".to_vec())]);
        assert_eq!(trailer_fields(b"a b: c\r\n"), Err(BodyError::Trailers));
        assert_eq!(trailer_fields(b"a: b\r\n c\r\n"), Err(BodyError::Trailers));
    }

    #[test]
    fn lengths_count_down() {
        let mut decoder = Decoder::Length(3);
        assert_eq!(decoder.step(b"ab"), Ok(Step::Data { skip: 0, len: 2 }));
        assert!(!decoder.may_end());
        assert_eq!(decoder.step(b"cde"), Ok(Step::Data { skip: 0, len: 1 }));
        assert_eq!(decoder.step(b"de"), Ok(Step::End { used: 0, trailers: vec![] }));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8), piece in 1usize..50) {
            let mut input = Vec::new();
            for chunk in &chunks {
                input.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                input.extend_from_slice(chunk);
                input.extend_from_slice(b"\r\n");
            }
            input.extend_from_slice(b"0\r\n\r\n");
            let (body, trailers, left) = run(&input, piece).unwrap().unwrap();
            prop_assert_eq!(body, chunks.concat());
            prop_assert!(trailers.is_empty() && left == 0);
        }

        #[test]
        fn no_input_panics(input in prop::collection::vec(prop::sample::select(b"0123abf;\r\n: x".to_vec()), 0..80), piece in 1usize..9) {
            let _ = run(&input, piece);
        }
    }
}
