//! Connections: accepted, secured, served, and ended gracefully.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::NamedGroup;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::tls::Tls;
use crate::api::caller::Shown;
use crate::api::{Api, Channel};

const CONNECTIONS: usize = 8192;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// A peer that does not answer a ping for so long is gone, and its watches with it.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(20);
/// A node's agent has one stream per kind, people's programs have many.
const STREAMS: u32 = 1000;
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stopping`, then waits a while for requests under way.
pub(super) async fn serve(socket: TcpListener, tls: Tls, api: Api, stopping: CancellationToken) {
    let conversations = TaskTracker::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.expect("never closed");
        let accepted = tokio::select! {
            () = stopping.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (tls, api, stopping) = (tls.clone(), api.clone(), stopping.clone());
        conversations.spawn(async move {
            converse(stream, tls, api, stopping).await;
            drop(permit);
        });
    }
    drop(socket);
    conversations.close();
    if tokio::time::timeout(DRAIN_LIMIT, conversations.wait()).await.is_err() {
        tracing::warn!(left = conversations.len(), "some connections did not end in time");
    }
}

async fn converse(stream: TcpStream, tls: Tls, api: Api, stopping: CancellationToken) {
    // Watch events are small and must not wait for more to send.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    super::keep_alive(&stream);
    let handshake = tokio::time::timeout(HANDSHAKE_LIMIT, tls.acceptor.accept(stream)).await;
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake took too long"),
    };
    let certificates = stream.get_ref().1.peer_certificates();
    let shown = certificates.and_then(|chain| chain.first()).and_then(Shown::of).map(Arc::new);
    let group = stream.get_ref().1.negotiated_key_exchange_group();
    let post_quantum = group.is_some_and(|g| g.name() == NamedGroup::X25519MLKEM768);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let api = api.clone();
        let now = jiff::Timestamp::now().as_second();
        let caller = shown.as_ref().and_then(|shown| shown.caller(now));
        request.extensions_mut().insert(Channel { post_quantum });
        if let Some(shown) = &shown {
            request.extensions_mut().insert(Arc::clone(shown));
        }
        async move { Ok::<_, Infallible>(api.handle(caller, request.map(Body::new)).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_LIMIT)
        .max_concurrent_streams(STREAMS);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
