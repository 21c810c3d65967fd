//! What must never reach a backend.

use std::time::Duration;

use crate::support::*;

include!("../../src/request/refused.rs");

#[tokio::test]
async fn heads_that_could_be_understood_differently_reach_no_backend() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for (status, head) in REFUSED {
        // What a smuggler would put behind it.
        let answer =
            site.once(format!("{head}0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert_eq!(code(&answer), *status, "{head:?}");
        assert!(answer.to_lowercase().contains("connection: close"), "{head:?}");
        assert_eq!(
            answer.matches("content-length").count(),
            1,
            "one answer, then the end: {head:?}"
        );
    }
    assert_eq!(backend.seen(), 0);
    assert_eq!(site.status().counts.malformed as usize, REFUSED.len());
}

#[tokio::test]
async fn lines_must_end_in_crlf() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for head in [
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: y\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\n",
        "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ] {
        assert_eq!(code(&site.once(head).await), 400, "{head:?}");
    }
    assert_eq!(code(&site.once(format!("{}{GET}", "\r\n".repeat(6))).await), 400);
    let mut client = site.client().await;
    let (head, _) = client.ask(format!("\r\n{GET}")).await;
    assert_eq!(code(&head), 200, "one empty line is allowed (RFC 9112 section 2.2)");
}

#[tokio::test]
async fn broken_chunks_end_the_request_at_both_sides() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        io.head().await;
        let seen = io.rest().await;
        assert!(!seen.ends_with("0\r\n\r\n"), "a broken body looked whole: {seen:?}");
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for chunks in [
        "zz\r\n",
        "5\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\nabc\r\n",
        "-3\r\nabc\r\n",
        "3\r\nabc0\r\n\r\n",
        "ffffffffffffffffff\r\n",
        "0\r\nX : y\r\n\r\n",
        "0\r\n bad\r\n\r\n",
        "3 ;x\x01\r\nabc\r\n0\r\n\r\n",
    ] {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer =
            site.once(format!("{head}{chunks}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert_eq!(code(&answer), 400, "{chunks:?}");
        assert_eq!(answer.matches("content-length").count(), 1, "{chunks:?}");
    }
}

#[tokio::test]
async fn large_heads_are_refused_without_being_kept() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let long = "x".repeat(70_000);
    let answer = site.once(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n")).await;
    assert_eq!(code(&answer), 431);
    let many: String = (0..4000).map(|i| format!("x-{i}: {i}\r\n")).collect();
    assert_eq!(code(&site.once(format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")).await), 431);
    assert_eq!(code(&site.once(format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n")).await), 414);
    assert_eq!(
        code(&site.once(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", &long[..9000])).await),
        414
    );
    assert_eq!(backend.seen(), 0);
    let mut client = site.client().await;
    let (head, body) =
        client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", &long[..30_000])).await;
    assert_eq!(code(&head), 200);
    assert!(body.contains(&long[..30_000]), "what fits is passed on whole");
}

#[tokio::test]
async fn a_slow_head_is_cut_off_and_others_are_served() {
    let backend = Backend::echo().await;
    let mut options = options();
    options.timeouts.head = Duration::from_millis(400);
    options.timeouts.keep_alive = Duration::from_millis(400);
    let site = Site::new(&all_to(&[backend.address]), options);
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut client = site.client().await;
        client.send("GET / HTTP/1.1\r\nHos").await;
        slow.push(client);
    }
    let (head, _) = site.client().await.ask(GET).await;
    assert_eq!(code(&head), 200);
    for mut client in slow {
        assert_eq!(code(&client.rest().await), 408);
    }
    // A client that trickles does not win time.
    let mut client = site.client().await;
    soon("a trickle is cut off", async {
        while !client.send_one().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // An idle connection ends without a word.
    let mut idle = site.client().await;
    idle.ask(GET).await;
    assert_eq!(idle.rest().await, "");
    assert_eq!(site.client().await.rest().await, "");
}

impl Raw {
    /// Sends one byte of an endless field; whether the connection has ended.
    async fn send_one(&mut self) -> bool {
        use tokio::io::AsyncWriteExt as _;
        self.io.write_all(b"G").await.is_err()
    }
}

#[tokio::test]
async fn a_malformed_response_is_not_passed_on() {
    for head in [
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\nX: y\nZ: a\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let backend = Backend::answering(move |_, _| head.to_owned()).await;
        let site = Site::new(&all_to(&[backend.address]), options());
        let (answer, _) = site.client().await.ask(GET).await;
        assert_eq!(code(&answer), 502, "{head:?}");
    }
    let backend =
        Backend::answering(|_, _| format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(70_000)))
            .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    assert_eq!(code(&site.client().await.ask(GET).await.0), 502);
}

#[tokio::test]
async fn an_answer_nobody_asked_for_poisons_no_connection() {
    // The backend says more than its Content-Length: the rest must not answer the next request.
    let backend = Backend::answering(|_, _| format!("{}{}", ok("one"), ok("poison"))).await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut client = site.client().await;
    for _ in 0..5 {
        assert_eq!(client.ask(GET).await.1, "one");
    }
}
