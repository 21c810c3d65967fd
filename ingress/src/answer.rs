//! Answers that the proxy makes itself: one line of text, or JSON for those who prefer it.

use crate::pump::decimal;
use crate::request::Reject;

/// How long a client should wait before it asks for a service without backends again.
pub(crate) const RETRY_AFTER_SECS: &str = "1";

/// The media type and the body of an answer.
pub(crate) fn body(reject: Reject, json: bool) -> (&'static str, String) {
    let Reject { status, reason } = reject;
    if json {
        // No reason has a character that JSON escapes: they are our own sentences.
        ("application/json", format!("{{\"status\":{status},\"error\":\"{reason}\"}}\n"))
    } else {
        ("text/plain; charset=utf-8", format!("{status} {}: {reason}\n", phrase(status)))
    }
}

/// The phrase of the status line.
pub(crate) fn phrase(status: u16) -> &'static str {
    let code = http::StatusCode::from_u16(status).ok();
    code.and_then(|code| code.canonical_reason()).unwrap_or("Error")
}

/// Writes an answer for an HTTP/1 client.
pub(crate) fn write(out: &mut Vec<u8>, reject: Reject, json: bool, is_head: bool, close: bool) {
    let (media_type, body) = body(reject, json);
    out.extend_from_slice(b"HTTP/1.1 ");
    decimal(out, reject.status.into());
    out.push(b' ');
    out.extend_from_slice(phrase(reject.status).as_bytes());
    out.extend_from_slice(b"\r\ncontent-type: ");
    out.extend_from_slice(media_type.as_bytes());
    out.extend_from_slice(b"\r\ncontent-length: ");
    decimal(out, body.len() as u64);
    out.extend_from_slice(b"\r\n");
    if reject.status == 503 {
        out.extend_from_slice(b"retry-after: ");
        out.extend_from_slice(RETRY_AFTER_SECS.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    if reject.status == 405 {
        out.extend_from_slice(b"allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n");
    }
    if close {
        out.extend_from_slice(b"connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
    if !is_head {
        out.extend_from_slice(body.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_short_and_complete() {
        let mut out = Vec::new();
        write(&mut out, Reject::new(503, "no backend is ready"), false, false, true);
        let text = String::from_utf8(out).unwrap();
        let body = "503 Service Unavailable: no backend is ready\n";
        assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"));
        assert!(text.contains(&format!("content-length: {}\r\n", body.len())));
        assert!(text.contains("retry-after: 1\r\n") && text.contains("connection: close\r\n"));
        assert!(text.ends_with(&format!("\r\n\r\n{body}")));
    }

    #[test]
    fn json_is_json() {
        let (media_type, text) = body(Reject::new(404, "no route"), true);
        assert_eq!(media_type, "application/json");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["status"], 404);
        assert_eq!(value["error"], "no route");
    }
}
