//! HTTP/1 between clients and backends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use mesh_model::snapshot::{L7Config, PathMatch};
use tokio::io::AsyncWriteExt as _;

use crate::support::*;

#[tokio::test]
async fn a_request_arrives_with_its_origin_and_the_answer_comes_back() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let (head, body) = site.client().await.ask("POST /x?y=z HTTP/1.1\r\nHost: A.test:80\r\nContent-Length: 5\r\nX-Forwarded-For: 10.9.8.7\r\n\r\nhello").await;
    assert_eq!(code(&head), 200);
    assert!(body.starts_with("POST /x?y=z HTTP/1.1\r\nhost: A.test:80\r\n"), "{body}");
    assert!(body.contains("x-forwarded-for: 10.9.8.7, 127.0.0.1\r\n"), "{body}");
    assert!(body.ends_with("\r\n\r\nhello"), "{body}");
}

#[tokio::test]
async fn connections_to_backends_are_used_again() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for _ in 0..20 {
        let mut client = site.client().await;
        for _ in 0..5 {
            assert_eq!(code(&client.ask(GET).await.0), 200);
        }
    }
    assert_eq!(backend.seen(), 1, "100 requests of 20 clients, one after the other");
    let status = site.status();
    assert_eq!((status.counts.requests, status.counts.responses_2xx), (100, 100));
    assert_eq!((status.counts.backend_connects, status.counts.backend_reuses), (1, 99));
    eventually("the connection is kept", || site.status().backends.idle_connections == 1).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let backend = Backend::answering(|head, body| {
        ok(&format!("{}{}", &head[..7], String::from_utf8_lossy(body)))
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    client.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\nPUT /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n0\r\n\r\nPUT /c HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nzGET /d HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET /e").await;
    for expected in ["GET /a ", "PUT /b xy", "PUT /c z", "GET /d "] {
        assert_eq!(client.response().await.1, expected);
    }
    assert_eq!(client.rest().await, "");
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let backend = Backend::answering(|_, body| {
        let body = String::from_utf8_lossy(body).into_owned();
        format!("HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\nX-Sum: 7\r\nContent-Length: 9\r\n\r\n", body.len())
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let (head, body) = site.client().await.ask("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nX-Req: 1\r\nHost: evil\r\n\r\n").await;
    assert!(head.contains("Trailer: X-Sum"));
    assert_eq!(body, "abc[X-Req: 1][X-Sum: 7]");
}

#[tokio::test]
async fn bodies_without_length_and_without_body() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        while let Some(head) = io.head().await {
            let answer = match head.split(' ').nth(1).unwrap() {
                "/until-close" => "HTTP/1.1 200 OK\r\n\r\nuntil the end",
                "/204" => "HTTP/1.1 204 No Content\r\n\r\n",
                "/304" => "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
                _ => "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n",
            };
            io.send(answer).await;
            if head.contains("/until-close") {
                return;
            }
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    for _ in 0..2 {
        let (head, body) = client.ask("GET /until-close HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(head.contains("transfer-encoding: chunked"));
        assert_eq!(body, "until the end");
        for (request, status) in [("HEAD /h", 200), ("GET /204", 204), ("GET /304", 304)] {
            client.send(format!("{request} HTTP/1.1\r\nHost: h\r\n\r\n")).await;
            let head = client.head().await.unwrap();
            assert_eq!(code(&head), status);
            assert_eq!(head.contains("content-length: 7"), status != 204);
        }
    }
    let answer = site.once("GET /until-close HTTP/1.0\r\n\r\n").await;
    assert!(answer.ends_with("\r\n\r\nuntil the end") && !answer.contains("chunked"), "{answer}");
}

#[tokio::test]
async fn large_bodies_stream_both_ways_intact() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        while let Some(head) = io.head().await {
            let body = io.body(&head).await;
            io.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len())).await;
            io.send(&body).await;
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let body: Vec<u8> = (0..5_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    for chunked in [false, true] {
        let mut client = site.client().await;
        let framing = if chunked {
            "Transfer-Encoding: chunked".to_owned()
        } else {
            format!("Content-Length: {}", body.len())
        };
        client.send(format!("PUT / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n")).await;
        for part in body.chunks(70_001) {
            if chunked {
                client.send(format!("{:X}\r\n", part.len())).await;
            }
            client.send(part).await;
            if chunked {
                client.send("\r\n").await;
            }
        }
        if chunked {
            client.send("0\r\n\r\n").await;
        }
        let head = client.head().await.unwrap();
        assert!(client.body(&head).await == body, "chunked: {chunked}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_backend() {
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    let backend = Backend::new(move |io, _| {
        let count = Arc::clone(&count);
        async move {
            let mut io = Raw::new(io);
            io.head().await;
            io.send("HTTP/1.1 200 OK\r\n\r\n").await;
            let piece = vec![7; 1 << 20];
            while io.io.write_all(&piece).await.is_ok() {
                count.fetch_add(1, SeqCst);
            }
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    client.send(GET).await;
    client.head().await.unwrap();
    let mut last = usize::MAX;
    soon("the backend stands still", async {
        while std::mem::replace(&mut last, written.load(SeqCst)) != written.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await;
    assert!(last < 64, "{last} MiB went out while the client read nothing");
    client.exactly(1 << 20).await;
    drop(client);
    eventually("the exchange ends with its client", || site.status().counts.requests_open == 0)
        .await;
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_still_uploads() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        io.head().await;
        io.send(
            "HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmuch",
        )
        .await;
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for _ in 0..5 {
        let mut client = site.client().await;
        client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n").await;
        client.send(vec![1; 300_000]).await;
        let (head, body) = client.response().await;
        assert_eq!((code(&head), body.as_str()), (413, "much"));
        assert!(head.contains("connection: close"), "{head}");
        client.rest().await;
    }
}

#[tokio::test]
async fn an_expectation_is_answered_by_the_backend() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        let head = io.head().await.unwrap();
        assert!(head.contains("expect: 100-continue") || head.contains("Expect: 100-continue"));
        io.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            .await;
        let body = io.exactly(3).await;
        io.send(ok(&String::from_utf8(body).unwrap())).await;
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    client
        .send("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        .await;
    assert_eq!(client.head().await.unwrap(), "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    assert_eq!(code(&client.head().await.unwrap()), 100);
    assert_eq!(client.ask("abc").await.1, "abc");
}

#[tokio::test]
async fn a_backend_that_dies_within_its_answer_breaks_the_connection() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
    ] {
        let backend = Backend::new(move |io, _| async move {
            let mut io = Raw::new(io);
            io.head().await;
            io.send(answer).await;
        })
        .await;
        let site = Site::new(&all_to(&[backend.address]), options());
        let seen = site.once(GET).await;
        assert!(seen.contains("half") && !seen.ends_with("0\r\n\r\n"), "{seen}");
        assert_eq!(site.status().counts.aborted, 1);
    }
}

#[tokio::test]
async fn a_broken_body_is_a_bad_gateway_as_long_as_nothing_was_said() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let backend = Backend::answering(move |_, _| format!("{head}4\r\nhalf\r\nzz")).await;
    let site = Site::new(&all_to(&[backend.address]), options());
    assert_eq!(code(&site.once(GET).await), 502);
}

#[tokio::test]
async fn a_connection_that_went_stale_costs_no_get_but_is_reported_for_a_post() {
    // Each connection serves one request, and closes when it sees a second.
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        let head = io.head().await.unwrap();
        io.body(&head).await;
        io.send(ok("x")).await;
        io.head().await;
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    for _ in 0..6 {
        assert_eq!(code(&client.ask(GET).await.0), 200);
    }
    assert_eq!(site.status().counts.retries, 5, "all but the first are sent twice");
    let post = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx";
    let first = code(&client.ask(post).await.0);
    let second = code(&site.client().await.ask(post).await.0);
    assert!([first, second].contains(&502), "a POST is never sent twice: {first} {second}");
}

#[tokio::test]
async fn unreachable_backends_are_passed_over_and_left_out() {
    let backend = Backend::echo().await;
    let gone = Backend::echo().await.address;
    let site = Site::new(&all_to(&[gone, backend.address]), options());
    for _ in 0..20 {
        assert_eq!(code(&site.client().await.ask(GET).await.0), 200);
    }
    let status = site.status();
    assert_eq!(status.backends.ejected, [gone]);
    assert_eq!(status.counts.backend_connect_failures, 1, "tried once, then left out");
}

#[tokio::test]
async fn answers_of_the_proxy_itself() {
    let gone = Backend::echo().await.address;
    let silent = Backend::new(|io, _| async move {
        Raw::new(io).rest().await;
    })
    .await;
    let closing = Backend::new(|io, _| async move {
        Raw::new(io).head().await;
    })
    .await;
    let host = |name, backends: &[_]| route(Some(name), PathMatch::Prefix("/".into()), backends);
    let routes = vec![
        host("none.test", &[]),
        host("gone.test", &[gone]),
        host("silent.test", &[silent.address]),
        host("closing.test", &[closing.address]),
    ];
    let mut options = options();
    options.timeouts.response_head = Duration::from_millis(200);
    let site = Site::new(&L7Config { routes, certificates: vec![] }, options);
    let mut client = site.client().await;
    for (name, status) in
        [("other", 404), ("none", 503), ("gone", 502), ("silent", 504), ("closing", 502)]
    {
        let (head, body) = client.ask(format!("GET / HTTP/1.1\r\nHost: {name}.test\r\n\r\n")).await;
        assert_eq!(code(&head), status, "{name}");
        assert!(body.starts_with(&status.to_string()) && body.ends_with('\n'), "{body}");
        assert_eq!(head.contains("retry-after"), status == 503);
        let (head, body) = client
            .ask(format!("GET / HTTP/1.1\r\nHost: {name}.test\r\nAccept: application/json\r\n\r\n"))
            .await;
        assert!(head.contains("content-type: application/json"));
        let json: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(json["status"], status);
    }
    // A body that nobody reads must not become the next request.
    let answer = site.once("POST / HTTP/1.1\r\nHost: other\r\nContent-Length: 40\r\n\r\nGET / HTTP/1.1\r\nHost: none.test\r\n\r\n").await;
    assert_eq!((code(&answer), answer.matches("HTTP/1.1").count()), (404, 1));
    client.send("HEAD / HTTP/1.1\r\nHost: none.test\r\nConnection: close\r\n\r\n").await;
    let answer = client.rest().await;
    assert_eq!(code(&answer), 503);
    assert!(answer.ends_with("\r\n\r\n"), "an answer to HEAD has no body: {answer}");
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_request_at_the_backend() {
    let (backend, ended) = Backend::silent().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    client.send(GET).await;
    eventually("the request arrives", || backend.seen() == 1).await;
    drop(client);
    eventually("the backend hears of it", || ended.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn both_bodies_may_flow_at_once() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        io.head().await;
        io.send("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n").await;
        for _ in 0..6 {
            let byte = io.exactly(1).await;
            io.send(byte).await;
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\n").await;
    assert_eq!(code(&client.head().await.unwrap()), 200);
    for byte in b"abcdef" {
        client.send([*byte]).await;
        assert_eq!(client.exactly(1).await, [*byte]);
    }
}
