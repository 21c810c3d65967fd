use mesh_model::ObjectKey;
use mesh_model::snapshot::{HttpRoute, PathMatch};
use proptest::prelude::*;

use super::*;
use crate::backend::Registry;

fn table() -> Table {
    let route = |name: &str, host: Option<&str>, path: &str| HttpRoute {
        ingress: ObjectKey::new("web", name),
        host: host.map(str::to_owned),
        path: PathMatch::Prefix(path.into()),
        service: ObjectKey::new("web", "s"),
        port: 80,
        backends: vec![([127, 0, 0, 1], 1).into()],
    };
    let routes = [
        route("all", None, "/"),
        route("host", Some("a.test"), "/"),
        route("admin", Some("a.test"), "/admin"),
    ];
    Table::new(&routes, &Registry::new(1)).0
}

fn prepare_text(head: &str) -> Result<Prepared, Reject> {
    let peer = Peer::new([192, 0, 2, 7].into(), false);
    prepare_http1(head.as_bytes(), 8192, &peer, &table())
}

fn forwarded(head: &str) -> String {
    let prepared = prepare_text(head).unwrap_or_else(|reject| panic!("{head:?}: {reject:?}"));
    String::from_utf8(prepared.head).unwrap()
}

fn ingress(head: &str) -> String {
    prepare_text(head).unwrap().route.unwrap().ingress.name.clone()
}

const ORIGIN: &str = "x-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: http\r\nx-forwarded-host: a.test\r\nx-real-ip: 192.0.2.7\r\n";

#[test]
fn a_plain_request_keeps_its_fields_and_says_where_it_came_from() {
    let out = forwarded(
        "GET /x?y=1 HTTP/1.1\r\nHost: a.test\r\nUser-Agent: t\r\nX-A: 1\r\nX-A: 2\r\n\r\n",
    );
    let expected = format!(
        "GET /x?y=1 HTTP/1.1\r\nhost: a.test\r\nUser-Agent: t\r\nX-A: 1\r\nX-A: 2\r\n{ORIGIN}\r\n"
    );
    assert_eq!(out, expected);
}

#[test]
fn only_the_list_of_addresses_keeps_what_the_client_said() {
    let out = forwarded(
        "GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 10.0.0.1, 10.0.0.2\r\nx-forwarded-for: 10.0.0.3\r\n\
         X-Forwarded-Proto: https\r\nX_Forwarded_Proto: https\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Port: 1\r\n\
         Forwarded: for=1.1.1.1\r\nX-Real-IP: 1.1.1.1\r\nX_Forwarded_For: 1.1.1.1\r\n\r\n",
    );
    let expected = ORIGIN.replace(
        "192.0.2.7\r\nx-forwarded-proto",
        "10.0.0.1, 10.0.0.2, 10.0.0.3, 192.0.2.7\r\nx-forwarded-proto",
    );
    assert_eq!(out, format!("GET / HTTP/1.1\r\nhost: a.test\r\n{expected}\r\n"));
}

#[test]
fn fields_of_one_connection_stay_on_it() {
    let out = forwarded(
        "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive, X-Hop, Host, Content-Length\r\nX-Hop: 1\r\n\
         Keep-Alive: 5\r\nProxy-Connection: x\r\nProxy-Authorization: y\r\nProxy: z\r\nTE: gzip\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAA\r\nContent-Length: 3\r\n\r\n",
    );
    assert_eq!(
        out,
        format!("POST / HTTP/1.1\r\nhost: a.test\r\n{ORIGIN}content-length: 3\r\n\r\n")
    );
}

#[test]
fn an_upgrade_is_passed_on_but_never_to_another_http() {
    let head = |protocol: &str, more: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n{more}\r\n"
        )
    };
    let websocket = prepare_text(&head("websocket", "Sec-WebSocket-Key: k\r\n")).unwrap();
    assert!(websocket.upgrade);
    let out = String::from_utf8(websocket.head).unwrap();
    assert!(out.ends_with("connection: upgrade\r\nupgrade: websocket\r\n\r\n"), "{out}");
    for protocol in ["h2c", "H2C", "h2c, websocket", "HTTP/2.0", "TLS/1.2", ""] {
        let prepared = prepare_text(&head(protocol, "")).unwrap();
        assert!(!prepared.upgrade, "{protocol}");
        let out = String::from_utf8(prepared.head).unwrap();
        assert!(!out.to_lowercase().contains("upgrade"), "{out}");
    }
    assert!(!prepare_text(&head("websocket", "Content-Length: 3\r\n")).unwrap().upgrade);
    let without_option = "GET / HTTP/1.1\r\nHost: a.test\r\nUpgrade: websocket\r\n\r\n";
    assert!(!prepare_text(without_option).unwrap().upgrade);
}

#[test]
fn trailers_are_announced_and_expectations_kept() {
    let out =
        forwarded("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: TE\r\nTE: trailers, gzip\r\n\r\n");
    assert!(out.ends_with("connection: te\r\nte: trailers\r\n\r\n"), "{out}");
    let out = forwarded(
        "PUT / HTTP/1.1\r\nHost: a.test\r\nExpect: 100-Continue\r\nTransfer-Encoding: Chunked\r\n\r\n",
    );
    assert!(
        out.contains("Expect: 100-Continue\r\n")
            && out.ends_with("transfer-encoding: chunked\r\n\r\n")
    );
    let out = forwarded("GET / HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\n\r\n");
    assert!(!out.contains("Expect"), "no body follows");
}

#[test]
fn an_absolute_target_counts_and_becomes_a_path() {
    for (target, expected) in [
        ("http://a.test/x?y", "GET /x?y HTTP/1.1\r\nhost: a.test\r\n"),
        ("HTTP://A.test:80", "GET / HTTP/1.1\r\nhost: A.test:80\r\n"),
    ] {
        let out = forwarded(&format!("GET {target} HTTP/1.1\r\nHost: a.test\r\n\r\n"));
        assert!(out.starts_with(expected), "{out}");
    }
    let out = forwarded("OPTIONS * HTTP/1.1\r\nHost: a.test\r\n\r\n");
    assert!(out.starts_with("OPTIONS * HTTP/1.1\r\n"));
}

#[test]
fn routes_see_through_disguises() {
    for (path, name) in [
        ("/admin", "admin"),
        ("/%61dmin", "admin"),
        ("/x/../admin/y", "admin"),
        ("/admin/../x", "host"),
        ("/administrator", "host"),
        ("/x?/admin", "host"),
    ] {
        assert_eq!(
            ingress(&format!("GET {path} HTTP/1.1\r\nHost: A.TEST:8080\r\n\r\n")),
            name,
            "{path}"
        );
    }
    assert_eq!(ingress("GET /admin HTTP/1.0\r\n\r\n"), "all");
}

#[test]
fn keeping_alive_follows_the_version() {
    let keeps = |head: &str| prepare_text(head).unwrap().keep_alive;
    assert!(keeps("GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
    assert!(!keeps("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n"));
    assert!(!keeps("GET / HTTP/1.0\r\nHost: a\r\n\r\n"));
    assert!(keeps("GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n"));
}

include!("refused.rs");

#[test]
fn what_could_be_understood_differently_is_refused() {
    for (status, head) in REFUSED {
        match prepare_text(head) {
            Ok(_) => panic!("{head:?} was accepted"),
            Err(reject) => assert_eq!(reject.status, *status, "{head:?}: {}", reject.reason),
        }
    }
    let many: String = (0..101).map(|i| format!("x-{i}: 1\r\n")).collect();
    let head = format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n");
    assert_eq!(prepare_text(&head).err().unwrap().status, 431);
    let head = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(9000));
    assert_eq!(prepare_text(&head).err().unwrap().status, 414);
}

proptest! {
    /// Whatever is accepted goes out with exactly one framing, one Host, and lines that only we end.
    #[test]
    fn what_goes_out_is_never_ambiguous(
        lines in prop::collection::vec(prop::sample::select(vec![
            "Host: a", "Host: b", "Content-Length: 3", "Content-Length: 03", "content-length:3 ", "Transfer-Encoding: chunked",
            "transfer-encoding:\tchunked", "Transfer-Encoding: x", "Connection: close, content-length", "Connection: transfer-encoding",
            "X-Forwarded-For: a", "Cookie: a=b", "Upgrade: websocket", "Connection: upgrade", "X: y", "TE: trailers",
            "Transfer_Encoding: chunked", "Content_Length: 5", "Expect: 100-continue", " folded: x",
        ]), 0..7),
        version in prop::sample::select(vec!["1.0", "1.1"]),
    ) {
        let head = format!("POST /p HTTP/{version}\r\n{}\r\n\r\n", lines.join("\r\n"));
        if let Ok(prepared) = prepare_text(&head) {
            let out = String::from_utf8(prepared.head).unwrap().to_lowercase();
            let count = |name: &str| out.matches(&format!("\r\n{name}:")).count();
            prop_assert_eq!(count("host"), 1);
            let expected = match prepared.framing {
                Framing::None => (0, 0),
                Framing::Length(3) => (1, 0),
                Framing::Chunked => (0, 1),
                other => panic!("{other:?}"),
            };
            prop_assert_eq!((count("content-length"), count("transfer-encoding")), expected);
            prop_assert!(out.ends_with("\r\n\r\n") && out.matches("\r\n\r\n").count() == 1);
            prop_assert_eq!(out.matches('\n').count(), out.matches("\r\n").count());
        }
    }

    #[test]
    fn no_head_panics(head in prop::collection::vec(prop::sample::select(b"GET / HTTP/1.1\r\n:aHostX-;,%2f.\x00\xff".to_vec()), 0..120)) {
        let peer = Peer::new([192, 0, 2, 7].into(), true);
        let _ = prepare_http1(&head, 8192, &peer, &table());
    }
}
