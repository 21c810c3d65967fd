//! `pods/NAME/exec`, `attach` and `portforward`: the request goes to the agent of the pod's node, and with its answer the
//! connection.
//!
//! Never does: understand what is said. Bytes are copied; the agent and the client agree on a protocol between them.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderName, Method, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Node, Pod};
use mesh_splice::splice;

use super::caller::Verb;
use super::{Api, Asked, proxy};
use crate::error::ApiError;

/// How long a connection may take to become the stream's after the answer.
const UPGRADE_LIMIT: Duration = Duration::from_secs(10);
/// How long the rest of one direction may take when the other has ended.
const LINGER: Duration = Duration::from_secs(10);

/// What client and agent agree with, beside `Connection`.
const HANDSHAKE: [HeaderName; 6] = [
    header::UPGRADE,
    header::SEC_WEBSOCKET_KEY,
    header::SEC_WEBSOCKET_VERSION,
    header::SEC_WEBSOCKET_PROTOCOL,
    header::SEC_WEBSOCKET_ACCEPT,
    HeaderName::from_static("x-stream-protocol-version"),
];

/// Whether a subresource is a stream.
pub(super) fn is_stream(sub: &str) -> bool {
    matches!(sub, "exec" | "attach" | "portforward")
}

impl Api {
    /// Answers with an upgrade; whatever can fail has failed before. `client` becomes the client's end.
    pub(super) async fn stream(
        &self,
        asked: Asked,
        client: Option<OnUpgrade>,
    ) -> Result<Response, ApiError> {
        if asked.method != Method::GET && asked.method != Method::POST {
            return Err(ApiError::MethodNotAllowed);
        }
        // Who may read a pod may not therefore run something in it, whatever the method.
        self.allow(&asked, Verb::Create, None, false)?;
        let (node, path) = self.stream_target(&asked)?;
        let client = client.filter(|_| asked.headers.contains_key(header::UPGRADE));
        let client = client.ok_or_else(|| {
            ApiError::BadRequest("Upgrade request required, over HTTP/1.1".to_owned())
        })?;
        let mut request = proxy::request(asked.method, &path, Body::empty())?;
        handshake(&asked.headers, request.headers_mut());
        let mut answer = self.0.agents.ask(&node, request).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(proxy::refusal(answer).await);
        }
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        handshake(answer.headers(), response.headers_mut());
        let agent = hyper::upgrade::on(&mut answer);
        let stopping = self.0.stopping.clone();
        tokio::spawn(async move {
            let both = async { tokio::try_join!(client, agent) };
            match tokio::time::timeout(UPGRADE_LIMIT, both).await {
                Ok(Ok((client, agent))) => {
                    tokio::select! {
                        () = splice(TokioIo::new(client), TokioIo::new(agent), LINGER) => {}
                        () = stopping.cancelled() => {}
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, path, "a stream was not upgraded"),
                Err(_) => tracing::debug!(path, "a stream was not upgraded in time"),
            }
        });
        Ok(response)
    }

    /// The node and the path that its agent knows the stream by.
    fn stream_target(&self, asked: &Asked) -> Result<(Node, String), ApiError> {
        let target = &asked.target;
        let ns = target.ns.as_deref().unwrap_or_default();
        let name = target.name.as_deref().unwrap_or_default();
        let pod: Pod = self.0.registry.get(Some(ns), name)?;
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if let Some(phase @ ("Succeeded" | "Failed")) = phase {
            return Err(ApiError::BadRequest(format!(
                "cannot reach into a completed pod; the current phase of {name} is {phase}"
            )));
        }
        let path = match target.sub.as_deref() {
            Some("portforward") => format!("/portForward/{ns}/{name}{}", asked.query.without("")),
            sub => {
                let container = proxy::container(&pod, name, asked.query.value("container"))?;
                let rest = asked.query.without("container");
                format!("/{}/{ns}/{name}/{container}{rest}", sub.unwrap_or_default())
            }
        };
        Ok((self.node_of(&pod, name)?, path))
    }
}

/// Copies what concerns the upgrade, and nothing else.
fn handshake(from: &HeaderMap, to: &mut HeaderMap) {
    to.insert(header::CONNECTION, http::HeaderValue::from_static("Upgrade"));
    for name in HANDSHAKE {
        for value in from.get_all(&name) {
            to.append(name.clone(), value.clone());
        }
    }
}
