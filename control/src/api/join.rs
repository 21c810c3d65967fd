//! `POST /mesh/v1/join`: a node shows the token's secret and gets its certificate.

use axum::body::Body;
use axum::response::Response;
use http::{Method, Request, StatusCode};
use mesh_model::join::{JoinRequest, JoinResponse};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::body::Raw;
use super::{Api, respond};
use crate::error::ApiError;
use crate::pki::SigningError;

/// A node has a few addresses.
const ADDRESSES: usize = 64;

impl Api {
    pub(super) async fn join(&self, request: Request<Body>) -> Result<Response, ApiError> {
        if request.method() != Method::POST {
            return Err(ApiError::MethodNotAllowed);
        }
        let asked: JoinRequest = read("join request", request).await?;
        if !same(&asked.secret, &self.0.secret) {
            tracing::warn!(node = %asked.node, "a join with a wrong secret was refused");
            return Err(ApiError::Unauthorized(
                "the secret of the join token is wrong: print the token with `meshctl token`"
                    .to_owned(),
            ));
        }
        if asked.addresses.len() > ADDRESSES {
            return Err(ApiError::BadRequest(format!(
                "join request: addresses: Too many: {}: must have at most {ADDRESSES} items",
                asked.addresses.len()
            )));
        }
        let signed = self.0.authority.node(&asked.csr_pem, &asked.node, &asked.addresses);
        let certificate_pem = signed.map_err(|error| unsigned("join request", &error))?;
        tracing::info!(node = %asked.node, addresses = ?asked.addresses, "a node joined");
        let response = JoinResponse {
            certificate_pem,
            ca_pem: self.0.authority.certificate_pem().to_owned(),
            cluster: self.0.registry.cluster().clone(),
        };
        Ok(respond::json(StatusCode::OK, &response))
    }
}

/// What a node asks for; `name` is what a refusal calls it.
pub(super) async fn read<T: DeserializeOwned>(
    name: &str,
    request: Request<Body>,
) -> Result<T, ApiError> {
    let (parts, body) = request.into_parts();
    let raw = Raw::read(&parts.headers, body).await?;
    serde_path_to_error::deserialize(&raw.value()?)
        .map_err(|e| ApiError::BadRequest(format!("{name}: {}: {}", e.path(), e.inner())))
}

/// Why nothing was signed.
pub(super) fn unsigned(name: &str, error: &SigningError) -> ApiError {
    match error {
        SigningError::Request(_) => ApiError::BadRequest(format!("{name}: {error}")),
        SigningError::Certificate(_) => ApiError::Storage(error.to_string()),
    }
}

/// Compares in a time that says nothing about where the texts differ.
fn same(given: &str, secret: &str) -> bool {
    let (given, secret) = (Sha256::digest(given), Sha256::digest(secret));
    given.iter().zip(secret.iter()).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn secrets_are_compared_as_a_whole() {
        assert!(same("abc", "abc"));
        for other in ["", "ab", "abd", "abcd", "ABC"] {
            assert!(!same(other, "abc"), "{other}");
        }
    }
}
