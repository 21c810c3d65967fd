//! `POST /mesh/v1/renew`: a node gets the certificate that follows the one which it shows.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{Method, Request, StatusCode};
use mesh_model::NodeName;
use mesh_model::certificate::{RenewRequest, RenewResponse};

use super::caller::{Caller, Shown};
use super::{Api, join, respond};
use crate::error::ApiError;

impl Api {
    /// The name and the addresses are those of the certificate that is shown: nothing else can be asked for, because a node that
    /// could name an address of others would pass for them.
    pub(super) async fn renew(
        &self,
        caller: &Caller,
        request: Request<Body>,
    ) -> Result<Response, ApiError> {
        if request.method() != Method::POST {
            return Err(ApiError::MethodNotAllowed);
        }
        let shown = request.extensions().get::<Arc<Shown>>().cloned();
        let node = caller.node().and_then(|name| name.parse::<NodeName>().ok());
        let (Some(shown), Some(node)) = (shown, node) else {
            return Err(ApiError::ForbiddenPath(
                "only nodes have their certificates renewed: ask with a node's certificate"
                    .to_owned(),
            ));
        };
        let asked: RenewRequest = join::read("renewal request", request).await?;
        let signed = self.0.authority.node(&asked.csr_pem, &node, &shown.addresses);
        let certificate_pem = signed.map_err(|error| join::unsigned("renewal request", &error))?;
        tracing::info!(%node, "the certificate of a node was renewed");
        Ok(respond::json(StatusCode::OK, &RenewResponse { certificate_pem }))
    }
}
