//! HTTP/2 towards clients: the `h2` crate's client, which lets a test do what browsers do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Response, Version};
use tokio::net::TcpStream;

use crate::support::*;
use crate::upgrade;

type Sender = SendRequest<Bytes>;

async fn connect(site: &Site) -> Sender {
    let io = TcpStream::connect(site.http).await.unwrap();
    // Until the proxy has said how many, a client may take as many as it likes; those over the limit are refused.
    let mut builder = h2::client::Builder::new();
    let handshake = builder.initial_max_send_streams(100).handshake(io);
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    sender
}

fn request(method: Method, target: &str) -> Request<()> {
    Request::builder()
        .method(method)
        .uri(format!("http://a.test{target}"))
        .version(Version::HTTP_2)
        .body(())
        .unwrap()
}

async fn read(mut body: RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = soon("data", body.data()).await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok((all, body.trailers().await?))
}

async fn get(sender: &Sender, target: &str) -> (Response<()>, Vec<u8>) {
    send(sender, request(Method::GET, target)).await
}

async fn send(sender: &Sender, request: Request<()>) -> (Response<()>, Vec<u8>) {
    let mut sender = soon("a free stream", sender.clone().ready()).await.unwrap();
    let (response, _) = sender.send_request(request, true).unwrap();
    let (head, body) = soon("a response", response).await.unwrap().into_parts();
    (Response::from_parts(head, ()), read(body).await.unwrap().0)
}

#[tokio::test]
async fn a_request_becomes_http1_with_its_origin() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let sender = connect(&site).await;
    let mut asked = request(Method::GET, "/x?y");
    for crumb in ["a=b", "c=d"] {
        asked.headers_mut().append("cookie", crumb.parse().unwrap());
    }
    asked.headers_mut().append("te", "trailers".parse().unwrap());
    let (head, body) = send(&sender, asked).await;
    assert_eq!(head.status(), 200);
    let body = String::from_utf8(body).unwrap();
    assert!(body.starts_with("GET /x?y HTTP/1.1\r\nhost: a.test\r\n"), "{body}");
    assert!(
        body.contains("cookie: a=b; c=d\r\n"),
        "one line for HTTP/1 (RFC 9113 section 8.2.3): {body}"
    );
    assert!(body.contains("x-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\n"), "{body}");
    assert!(body.ends_with("connection: te\r\nte: trailers\r\n\r\n"), "{body}");
}

#[tokio::test]
async fn many_streams_share_a_connection_and_few_reach_the_backend() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let sender = connect(&site).await;
    let mut all = tokio::task::JoinSet::new();
    for i in 0..1000 {
        let sender = sender.clone();
        all.spawn(async move {
            let (head, body) = get(&sender, &format!("/{i}")).await;
            assert_eq!(head.status(), 200);
            assert!(String::from_utf8(body).unwrap().starts_with(&format!("GET /{i} ")));
        });
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
    assert!(backend.seen() <= 128, "{} connections for 128 streams", backend.seen());
    assert_eq!(site.status().counts.connections, 1);
}

#[tokio::test]
async fn bodies_and_trailers_pass_both_ways_intact() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        while let Some(head) = io.head().await {
            let body = io.body(&head).await;
            io.send(format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n",
                body.len()
            ))
            .await;
            io.send(body).await;
            io.send("\r\n0\r\nGrpc-Status: 0\r\nContent-Length: 1\r\n\r\n").await;
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let sender = connect(&site).await;
    let body: Vec<u8> = (0..3_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let (mut sender, body) = (sender.clone().ready().await.unwrap(), body.clone());
        all.spawn(async move {
            let (response, mut sink) =
                sender.send_request(request(Method::POST, "/"), false).unwrap();
            for part in body.chunks(100_000) {
                sink.reserve_capacity(part.len());
                sink.send_data(Bytes::copy_from_slice(part), false).unwrap();
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("x-req", "1".parse().unwrap());
            trailers.insert("host", "evil".parse().unwrap());
            sink.send_trailers(trailers).unwrap();
            let (got, trailers) =
                read(soon("a response", response).await.unwrap().into_body()).await.unwrap();
            assert_eq!(got.len(), body.len() + "[x-req: 1]".len());
            assert!(got.starts_with(&body) && got.ends_with(b"[x-req: 1]"));
            let trailers = trailers.unwrap();
            assert_eq!(trailers.len(), 1);
            assert_eq!(trailers["grpc-status"], "0");
        });
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let sender = connect(&site).await;
    let with = |name: &'static str, value: &str| {
        let mut request = request(Method::GET, "/");
        request.headers_mut().insert(name, value.parse().unwrap());
        request
    };
    for (request, status) in [
        (with("host", "b.test"), 400),
        (with("expect", "magic"), 417),
        (request(Method::GET, "/%00"), 400),
        (request(Method::GET, "/a/..%2f"), 400),
        (request(Method::GET, &format!("/{}", "x".repeat(9000))), 414),
    ] {
        assert_eq!(send(&sender, request).await.0.status(), status);
    }
    assert_eq!(send(&sender, with("host", "A.test:80")).await.0.status(), 200);
    assert_eq!(get(&sender, "/").await.0.status(), 200, "the connection goes on");
    let large = with("x-large", &"x".repeat(60_000));
    let mut sender = connect(&site).await.ready().await.unwrap();
    let (response, _) = sender.send_request(large, true).unwrap();
    if let Ok(response) = soon("an answer", response).await {
        assert_eq!(response.status(), 431);
    }
    assert_eq!(backend.seen(), 1);
}

#[tokio::test]
async fn answers_of_the_proxy_itself_and_broken_backends() {
    let none = Site::new(&Default::default(), options());
    let (head, body) = get(&connect(&none).await, "/").await;
    assert_eq!(head.status(), 404);
    assert!(body.starts_with(b"404 Not Found: "));
    let empty = Site::new(&all_to(&[]), options());
    let (head, _) = get(&connect(&empty).await, "/").await;
    assert_eq!(
        (head.status().as_u16(), &head.headers()["retry-after"]),
        (503, &http::HeaderValue::from_static("1"))
    );
    let dying = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        io.head().await;
        io.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
    })
    .await;
    let site = Site::new(&all_to(&[dying.address]), options());
    let mut sender = connect(&site).await.ready().await.unwrap();
    let (response, _) = sender.send_request(request(Method::GET, "/"), true).unwrap();
    let error = match soon("a response", response).await {
        Ok(response) => read(response.into_body()).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR), "a broken body never looks whole");
}

#[tokio::test]
async fn a_stream_that_the_client_resets_ends_at_the_backend() {
    let (backend, ended) = Backend::silent().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut sender = connect(&site).await.ready().await.unwrap();
    let (response, mut sink) = sender.send_request(request(Method::GET, "/"), true).unwrap();
    eventually("the request arrives", || backend.seen() == 1).await;
    sink.send_reset(Reason::CANCEL);
    drop(response);
    eventually("the backend hears of it", || ended.load(SeqCst) == 1).await;
    eventually("nothing is left", || site.status().counts.requests_open == 0).await;
}

#[tokio::test]
async fn a_flood_of_resets_ends_the_connection_and_not_the_proxy() {
    let backend = Backend::new(|io, _| async move {
        Raw::new(io).rest().await;
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let io = TcpStream::connect(site.http).await.unwrap();
    let (sender, connection) = h2::client::Builder::new()
        .initial_max_send_streams(100_000)
        .max_concurrent_reset_streams(100_000)
        .handshake::<_, Bytes>(io)
        .await
        .unwrap();
    let ended = tokio::spawn(connection);
    let mut opened = 0;
    while opened < 20_000 && !ended.is_finished() {
        let Ok(mut ready) = sender.clone().ready().await else { break };
        for _ in 0..100 {
            let Ok((_, mut sink)) = ready.send_request(request(Method::GET, "/"), true) else {
                break;
            };
            sink.send_reset(Reason::CANCEL);
            opened += 1;
        }
        tokio::task::yield_now().await;
    }
    let other = Backend::echo().await;
    site.proxy.apply(&all_to(&[other.address]));
    assert_eq!(get(&connect(&site).await, "/").await.0.status(), 200);
    drop(sender);
    ended.abort();
    eventually("nothing is left", || site.status().counts.requests_open == 0).await;
}

#[tokio::test]
async fn draining_says_goaway_and_finishes_open_streams() {
    let release = Arc::new(tokio::sync::Notify::new());
    let hold = Arc::clone(&release);
    let backend = Backend::new(move |io, _| {
        let hold = Arc::clone(&hold);
        async move {
            let mut io = Raw::new(io);
            io.head().await;
            hold.notified().await;
            io.send(ok("done")).await;
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let io = TcpStream::connect(site.http).await.unwrap();
    let (sender, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut sender: Sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(request(Method::GET, "/"), true).unwrap();
    eventually("the request arrives", || backend.seen() == 1).await;
    let proxy = site.proxy;
    let draining = tokio::spawn(async move { proxy.drain().await });
    soon("no new streams", async {
        while sender.clone().ready().await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    release.notify_one();
    let body = soon("a response", response).await.unwrap().into_body();
    assert_eq!(read(body).await.unwrap().0, b"done");
    drop(sender);
    soon("the connection ends", connection).await.unwrap().unwrap();
    soon("the proxy ends", draining).await.unwrap();
}

#[tokio::test]
async fn a_websocket_runs_in_a_stream() {
    let backend = upgrade::echo_backend().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut sender = connect(&site).await.ready().await.unwrap();
    eventually("extended CONNECT is offered", || sender.is_extended_connect_protocol_enabled())
        .await;
    let mut asked = request(Method::CONNECT, "/ws");
    asked.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    asked.headers_mut().insert("sec-websocket-version", "13".parse().unwrap());
    let (response, mut sink) = sender.send_request(asked, false).unwrap();
    let response = soon("a response", response).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let mut body = response.into_body();
    sink.send_data("abc.".into(), true).unwrap();
    let mut seen = Vec::new();
    while let Some(data) = soon("data", body.data()).await {
        seen.extend_from_slice(&data.unwrap());
    }
    assert_eq!(seen, b"helloabc.");
    // A plain CONNECT is no request for us.
    let mut sender = connect(&site).await.ready().await.unwrap();
    let connect = Request::builder()
        .method(Method::CONNECT)
        .uri("a.test:443")
        .version(Version::HTTP_2)
        .body(())
        .unwrap();
    let (response, _) = sender.send_request(connect, true).unwrap();
    assert_eq!(soon("a response", response).await.unwrap().status(), 405);
}

/// Sends a connection's first bytes and one request on stream 1, field by field as a client of ours never would.
async fn raw_stream(site: &Site, fields: &[(&str, &str)], body: Option<&str>) -> Raw {
    let mut block = Vec::new();
    for (name, value) in fields {
        // A literal without indexing (RFC 7541 section 6.2.2), lengths in one byte.
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend_from_slice(&[kind, flags, 0, 0, 0, stream]);
        frame.extend_from_slice(payload);
        frame
    };
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    out.extend(frame(4, 0, 0, &[]));
    out.extend(frame(1, if body.is_some() { 4 } else { 5 }, 1, &block));
    if let Some(body) = body {
        out.extend(frame(0, 1, 1, body.as_bytes()));
    }
    let mut client = site.client().await;
    client.send(out).await;
    client
}

/// Whether stream 1 was reset or the connection ended, rather than answered.
async fn was_reset(client: &mut Raw) -> bool {
    loop {
        let head = client.exactly(9).await;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        client.exactly(length).await;
        match head[3] {
            3 | 7 => return true,
            1 if head[8] == 1 => return false,
            _ => {}
        }
    }
}

#[tokio::test]
async fn malformed_fields_are_a_stream_error_and_reach_no_backend() {
    // A request whose length turns out to be a lie may have begun there, but never looks whole.
    let whole = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&whole);
    let backend = Backend::answering(move |_, _| {
        count.fetch_add(1, SeqCst);
        ok("")
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let usual =
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")];
    let with = |more: &[(&'static str, &'static str)]| [&usual[..], more].concat();
    let cases = [
        (with(&[("connection", "close")]), None),
        (with(&[("connection", "x-private")]), None),
        (with(&[("transfer-encoding", "chunked")]), None),
        (with(&[("keep-alive", "5")]), None),
        (with(&[("proxy-connection", "x")]), None),
        (with(&[("upgrade", "h2c")]), None),
        (with(&[("te", "gzip")]), None),
        (with(&[("X-Upper", "a")]), None),
        (with(&[("x-split", "a\r\nx-smuggled: b")]), None),
        (with(&[("x-nul", "a\0b")]), None),
        (with(&[("x y", "a")]), None),
        (with(&[("", "a")]), None),
        (with(&[(":path", "/other")]), None),
        (with(&[("x", "y"), (":late", "z")]), None),
        (with(&[("content-length", "5")]), Some("abc")),
        (with(&[("content-length", "2")]), Some("abc")),
        (with(&[("content-length", "2")]), None),
        (usual[1..].to_vec(), None),
    ];
    for (fields, body) in cases {
        let mut client = raw_stream(&site, &fields, body).await;
        assert!(was_reset(&mut client).await, "{fields:?} {body:?}");
        assert_eq!(whole.load(SeqCst), 0, "{fields:?} {body:?}");
    }
    // Well formed for HTTP/2, but not for us: answered.
    for fields in [
        with(&[("host", "b.test")]),
        with(&[("host", "a.test"), ("host", "a.test")]),
        usual[..3].to_vec(),
        usual[..2].to_vec(),
        with(&[("content-length", "2"), ("content-length", "2")]),
    ] {
        let mut client = raw_stream(&site, &fields, Some("ab")).await;
        was_reset(&mut client).await;
        assert_eq!(whole.load(SeqCst), 0, "{fields:?}");
    }
    for path in ["x", "", "/a b", "http://a.test/", "*", "/\r\nx: y"] {
        let mut fields = usual.to_vec();
        fields[2].1 = path;
        let mut client = raw_stream(&site, &fields, None).await;
        was_reset(&mut client).await;
        assert_eq!(whole.load(SeqCst), 0, "{fields:?}");
    }
}
