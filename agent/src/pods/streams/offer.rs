//! Which protocol a client wants to speak, and the answer that agrees to it.

use aws_lc_rs::digest;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::channel::Channels;
use super::runtime::{SPDY, STREAM_PROTOCOL};

/// A whole SPDY connection in binary WebSocket messages (kubectl 1.31 and later, for port-forward). Other clients have channels there, too.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// RFC 6455, section 1.3.
const ACCEPT_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// What the client and we can both speak.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Offer {
    /// SPDY, with these dialects: the runtime chooses.
    Spdy(Vec<HeaderValue>),
    /// Channels in WebSocket messages.
    Channels(Channels, Accept),
    /// SPDY in WebSocket messages.
    Tunnel(Accept),
}

/// The proof that a WebSocket handshake was understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Accept(String);

/// What the streams are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Process,
    Ports,
}

/// What the request offers; or why none of it can be used, for people.
pub(super) fn read(headers: &HeaderMap, purpose: Purpose) -> Result<Offer, String> {
    let upgrade = headers.get(header::UPGRADE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if upgrade.eq_ignore_ascii_case(SPDY) {
        return Ok(Offer::Spdy(headers.get_all(&STREAM_PROTOCOL).iter().cloned().collect()));
    }
    if !upgrade.eq_ignore_ascii_case("websocket") {
        return Err("unable to upgrade: the request has to upgrade to websocket or SPDY/3.1".into());
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|v| v != "13") {
        return Err("unable to upgrade: Sec-WebSocket-Version must be 13".into());
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let Some(key) = key.filter(|k| STANDARD.decode(k).is_ok_and(|nonce| nonce.len() == 16)) else {
        return Err("unable to upgrade: Sec-WebSocket-Key must be 16 bytes in Base64".into());
    };
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let offered = offered.filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let mut offered = offered.map(str::trim);
    let accept = accept(key);
    let (has_tunnel, served) = match purpose {
        Purpose::Process => (false, &Channels::ALL[..]),
        // Channels of ports have no end of their own, in any version.
        Purpose::Ports => (true, &Channels::ALL[1..]),
    };
    let found = offered.find_map(|name| {
        let channels = served.iter().find(|channels| channels.name() == name);
        if has_tunnel && name == TUNNEL { Some(None) } else { channels.map(Some) }
    });
    match found {
        Some(Some(channels)) => Ok(Offer::Channels(*channels, accept)),
        Some(None) => Ok(Offer::Tunnel(accept)),
        None => {
            let tunnel = has_tunnel.then_some(TUNNEL).into_iter();
            let names: Vec<_> = tunnel.chain(served.iter().map(|c| c.name())).collect();
            let names = names.join(", ");
            Err(format!("unable to upgrade: served WebSocket protocols: {names}"))
        }
    }
}

fn accept(key: &[u8]) -> Accept {
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key);
    hash.update(ACCEPT_SUFFIX.as_bytes());
    Accept(STANDARD.encode(hash.finish()))
}

/// The answer after which the connection is the client's and ours. `runtime` is what the runtime has answered.
pub(super) fn agree(offer: &Offer, runtime: &HeaderMap) -> Response {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let (accept, protocol) = match offer {
        Offer::Spdy(_) => {
            headers.insert(header::UPGRADE, HeaderValue::from_static(SPDY));
            for chosen in runtime.get_all(&STREAM_PROTOCOL) {
                headers.append(STREAM_PROTOCOL, chosen.clone());
            }
            return answer;
        }
        Offer::Channels(channels, accept) => (accept, channels.name()),
        Offer::Tunnel(accept) => (accept, TUNNEL),
    };
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    let accept = HeaderValue::from_str(&accept.0).expect("Base64 is visible ASCII");
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    answer
}

/// Any offer of channels.
#[cfg(test)]
pub(super) fn channels() -> Offer {
    Offer::Channels(Channels::V5, Accept(String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn websocket(protocol: &'static str) -> HeaderMap {
        [
            (header::UPGRADE, "WebSocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
            (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
            (header::SEC_WEBSOCKET_PROTOCOL, protocol),
        ]
        .map(|(name, value)| (name, HeaderValue::from_static(value)))
        .into_iter()
        .collect()
    }

    #[test]
    fn the_first_protocol_that_is_known_is_taken() {
        let offered = websocket("v9.channel.k8s.io, v4.channel.k8s.io,v5.channel.k8s.io");
        // The example of RFC 6455, section 1.3.
        let accept = || Accept("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned());
        let offer = read(&offered, Purpose::Process).unwrap();
        assert_eq!(offer, Offer::Channels(Channels::V4, accept()));
        let answer = agree(&offer, &HeaderMap::new());
        assert_eq!(answer.headers()[header::SEC_WEBSOCKET_PROTOCOL], "v4.channel.k8s.io");
        assert_eq!(answer.headers()[header::SEC_WEBSOCKET_ACCEPT], accept().0);
        assert_eq!(read(&websocket(TUNNEL), Purpose::Ports), Ok(Offer::Tunnel(accept())));
        let ports = read(&offered, Purpose::Ports);
        assert_eq!(ports, Ok(Offer::Channels(Channels::V4, accept())));
    }

    #[test]
    fn what_is_not_spoken_is_refused_with_what_is() {
        let refused = |headers: &HeaderMap, purpose| read(headers, purpose).unwrap_err();
        let process = refused(&websocket("channel.k8s.io"), Purpose::Process);
        assert!(process.contains("v5.channel.k8s.io, v4.channel.k8s.io"), "{process}");
        assert!(refused(&websocket("v5.channel.k8s.io"), Purpose::Ports).contains(TUNNEL));
        assert!(refused(&websocket(TUNNEL), Purpose::Process).contains("v5.channel"));
        assert!(refused(&HeaderMap::new(), Purpose::Ports).contains("has to upgrade"));
        let mut old = websocket(TUNNEL);
        old.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("8"));
        assert!(refused(&old, Purpose::Ports).contains("must be 13"));
        let mut keyless = websocket(TUNNEL);
        keyless.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::from_static("short"));
        assert!(refused(&keyless, Purpose::Ports).contains("16 bytes"));
    }

    #[test]
    fn dialects_of_spdy_are_for_the_runtime_to_choose() {
        let mut headers = HeaderMap::new();
        headers.insert(header::UPGRADE, HeaderValue::from_static("spdy/3.1"));
        for dialect in ["v4.channel.k8s.io", "v3.channel.k8s.io"] {
            headers.append(STREAM_PROTOCOL, HeaderValue::from_static(dialect));
        }
        let offer = read(&headers, Purpose::Process).unwrap();
        assert!(matches!(&offer, Offer::Spdy(all) if all.len() == 2));
        let mut chosen = HeaderMap::new();
        chosen.insert(STREAM_PROTOCOL, HeaderValue::from_static("v4.channel.k8s.io"));
        assert_eq!(agree(&offer, &chosen).headers()[STREAM_PROTOCOL], "v4.channel.k8s.io");
    }
}
