//! `GET /mesh/v1/preshared-keys`: a node gets the keys that it shares with the others.

use std::collections::BTreeSet;

use axum::response::Response;
use http::{Method, StatusCode};
use k8s_openapi::api::core::v1::Node;
use mesh_model::snapshot::WgKey;
use mesh_model::wellknown::ANNOTATION_WIREGUARD_KEY;

use super::caller::Caller;
use super::{Api, respond};
use crate::error::ApiError;

/// What is known of the connection that a request came on.
#[derive(Debug, Clone, Copy)]
pub struct Channel {
    /// Whether its keys were agreed upon with X25519MLKEM768.
    pub post_quantum: bool,
}

impl Api {
    pub(super) fn preshared_keys(
        &self,
        caller: &Caller,
        channel: Option<Channel>,
        method: &Method,
    ) -> Result<Response, ApiError> {
        if method != Method::GET {
            return Err(ApiError::MethodNotAllowed);
        }
        let name = caller.node().ok_or_else(|| {
            refused("only nodes have pre-shared keys: ask with a node's certificate")
        })?;
        if !channel.is_some_and(|channel| channel.post_quantum) {
            return Err(refused(
                "pre-shared keys are sent over TLS 1.3 with X25519MLKEM768 only: \
                 the client has to offer this key exchange",
            ));
        }
        let nodes: Vec<Node> = self.0.registry.list(None)?.items;
        let own = nodes.iter().find(|n| n.metadata.name.as_deref() == Some(name)).and_then(key);
        let own = own.ok_or_else(|| {
            ApiError::BadRequest(format!("node {name} has not published its WireGuard key yet"))
        })?;
        if nodes.iter().filter(|node| key(node) == Some(own)).count() > 1 {
            return Err(refused("another node has published the same WireGuard key"));
        }
        let others: BTreeSet<WgKey> =
            nodes.iter().filter_map(key).filter(|other| *other != own).collect();
        Ok(respond::json(StatusCode::OK, &self.0.preshared.issue(own, &others)))
    }
}

fn key(node: &Node) -> Option<WgKey> {
    node.metadata.annotations.as_ref()?.get(ANNOTATION_WIREGUARD_KEY)?.parse().ok()
}

fn refused(why: &str) -> ApiError {
    ApiError::ForbiddenPath(why.to_owned())
}
