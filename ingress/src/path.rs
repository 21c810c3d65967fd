//! The form of a path that routes are matched with.
//!
//! The request's own path is forwarded as it came. What is matched is what a careful backend would
//! understand: escapes decoded, dot segments removed. Where careful backends differ, the request is refused,
//! so that nobody reaches `/admin` through a route for `/public`.

use std::borrow::Cow;

/// A path is not forwarded, because nobody can say what it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// It does not begin with a slash.
    #[error("the path does not begin with a slash")]
    Relative,
    /// A byte that a request target cannot have (RFC 3986 section 2).
    #[error("the path has a byte that must be escaped")]
    Byte,
    /// A percent sign without two hexadecimal digits.
    #[error("the path has a broken escape")]
    Escape,
    /// An escaped NUL ends the path for some backends and not for others.
    #[error("the path has an escaped NUL")]
    Nul,
    /// Dot segments above the root, or behind separators that not everybody sees.
    #[error("the path has dot segments that leave it")]
    Dots,
}

/// Brings the path of a request target (without its query) to the form of the route table.
pub(crate) fn normalise(path: &[u8]) -> Result<Cow<'_, [u8]>, InvalidPath> {
    if path.first() != Some(&b'/') {
        return Err(InvalidPath::Relative);
    }
    let mut plain = true;
    let mut before = 0;
    for &byte in path {
        if !(0x21..=0x7e).contains(&byte) || byte == b'#' {
            return Err(InvalidPath::Byte);
        }
        plain &= !(byte == b'%' || byte == b'\\' || (byte == b'.' && before == b'/'));
        before = byte;
    }
    if plain { Ok(Cow::Borrowed(path)) } else { resolve(path).map(Cow::Owned) }
}

/// The same for a path that a route asks for: a human wrote it, so raw spaces and UTF-8 are taken as meant.
pub(crate) fn normalise_route(path: &str) -> Result<Vec<u8>, InvalidPath> {
    if !path.starts_with('/') {
        return Err(InvalidPath::Relative);
    }
    resolve(path.as_bytes())
}

fn resolve(path: &[u8]) -> Result<Vec<u8>, InvalidPath> {
    let decoded = decode(path)?;
    if leaves_by_other_separators(&decoded) {
        return Err(InvalidPath::Dots);
    }
    let mut out = Vec::with_capacity(decoded.len());
    let mut segments = decoded[1..].split(|b| *b == b'/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            b"." => {}
            b".." => {
                let parent = memchr::memrchr(b'/', &out).ok_or(InvalidPath::Dots)?;
                out.truncate(parent);
            }
            name => {
                out.push(b'/');
                out.extend_from_slice(name);
                continue;
            }
        }
        if last {
            out.push(b'/');
        }
    }
    Ok(out)
}

/// Decodes all escapes but those of `/` and `%`, which would change the meaning; their digits become upper case.
fn decode(path: &[u8]) -> Result<Vec<u8>, InvalidPath> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let [high, low, after @ ..] = rest else { return Err(InvalidPath::Escape) };
        rest = after;
        match digit(*high)? << 4 | digit(*low)? {
            0 => return Err(InvalidPath::Nul),
            b'/' => out.extend_from_slice(b"%2F"),
            b'%' => out.extend_from_slice(b"%25"),
            byte => out.push(byte),
        }
    }
    Ok(out)
}

fn digit(byte: u8) -> Result<u8, InvalidPath> {
    (byte as char).to_digit(16).map(|d| d as u8).ok_or(InvalidPath::Escape)
}

/// Whether some backend that takes `%2F`, `\` or `;` as the end of a segment would see `..` where others do not.
fn leaves_by_other_separators(decoded: &[u8]) -> bool {
    let mut start = 0;
    let mut other = false;
    let mut at = 0;
    let is_up = |segment: &[u8]| segment == b"..";
    while at <= decoded.len() {
        let (ends, width, differs) = match decoded.get(at) {
            None => (true, 1, false),
            Some(b'/') => (true, 1, false),
            Some(b'\\' | b';') => (true, 1, true),
            Some(b'%') if decoded[at..].starts_with(b"%2F") => (true, 3, true),
            Some(_) => (false, 1, false),
        };
        if ends {
            if is_up(&decoded[start.min(decoded.len())..at]) && (other || differs) {
                return true;
            }
            other = differs;
            start = at + width;
        }
        at += width;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(path: &str) -> Result<String, InvalidPath> {
        normalise(path.as_bytes()).map(|p| String::from_utf8(p.into_owned()).unwrap())
    }

    #[test]
    fn a_plain_path_is_not_copied() {
        assert!(matches!(normalise(b"/a/b.c/%7"), Err(InvalidPath::Escape)));
        assert!(matches!(normalise(b"/a/b.c//;d=1/"), Ok(Cow::Borrowed(_))));
    }

    #[test]
    fn escapes_and_dot_segments_are_resolved() {
        for (path, expected) in [
            ("/", "/"),
            ("/%61dmin", "/admin"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/a/..", "/"),
            ("/.well-known/x", "/.well-known/x"),
            ("/a//b", "/a//b"),
            ("/a/..b/c..", "/a/..b/c.."),
            ("/a%2fb", "/a%2Fb"),
            ("/%252e%252e/", "/%252e%252e/"),
            ("/caf%C3%A9", "/café"),
        ] {
            assert_eq!(normal(path).as_deref(), Ok(expected), "{path}");
        }
    }

    #[test]
    fn what_backends_disagree_about_is_refused() {
        for (path, error) in [
            ("", InvalidPath::Relative),
            ("a", InvalidPath::Relative),
            ("*", InvalidPath::Relative),
            ("/a b", InvalidPath::Byte),
            ("/a#b", InvalidPath::Byte),
            ("/é", InvalidPath::Byte),
            ("/a%", InvalidPath::Escape),
            ("/a%2", InvalidPath::Escape),
            ("/a%zz", InvalidPath::Escape),
            ("/a%00b", InvalidPath::Nul),
            ("/..", InvalidPath::Dots),
            ("/a/../../b", InvalidPath::Dots),
            ("/public/..%2fadmin", InvalidPath::Dots),
            ("/public%2f../admin", InvalidPath::Dots),
            ("/public/..\\admin", InvalidPath::Dots),
            ("/public/..%5cadmin", InvalidPath::Dots),
            ("/public/..;/admin", InvalidPath::Dots),
            ("/public\\..\\admin", InvalidPath::Dots),
        ] {
            assert_eq!(normal(path), Err(error), "{path}");
        }
    }

    proptest! {
        #[test]
        fn the_result_has_no_dot_segments_and_is_a_fixed_point(path in "/[a-c./%2eEfF5\\\\;]{0,24}") {
            if let Ok(once) = normalise(path.as_bytes()) {
                prop_assert_eq!(once[0], b'/');
                let segments: Vec<_> = once.split(|b| *b == b'/').collect();
                prop_assert!(!segments.contains(&&b".."[..]) && !segments.contains(&&b"."[..]), "{:?}", once);
            }
        }

        #[test]
        fn no_input_panics(path in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = normalise(&path);
        }
    }
}
