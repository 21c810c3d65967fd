//! Who a caller is: tokens of service accounts are made, judged and accepted here.
//!
//! `serviceaccounts/NAME/token` (TokenRequest), and TokenReview and SelfSubjectReview of `authentication.k8s.io/v1`.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, Method, Request, StatusCode, header};
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{
    BoundObjectReference, SelfSubjectReview, SelfSubjectReviewStatus, TokenRequest,
    TokenRequestStatus, TokenReview, TokenReviewStatus, UserInfo,
};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rand::Rng as _;
use serde::de::DeserializeOwned;

use super::body::Raw;
use super::caller::{Account, Caller, Role};
use super::target::{Target, not_served};
use super::{Api, Asked, respond};
use crate::error::{ApiError, Cause};
use crate::objects;
use crate::registry::{Object, Registry};
use crate::tokens::{Bound, Claims, Reference, Signer};

/// The group of reviews.
pub(crate) const GROUP: &str = "authentication.k8s.io";
/// Its version.
pub(crate) const VERSION: &str = "v1";
/// What is asked and not stored: resource and kind.
pub(crate) const REVIEWS: [(&str, &str); 2] =
    [("selfsubjectreviews", "SelfSubjectReview"), ("tokenreviews", "TokenReview")];

const LEAST_SECS: i64 = 600;
const MOST_SECS: i64 = 1 << 32;
const DEFAULT_SECS: i64 = 3600;
const USER_PREFIX: &str = "system:serviceaccount:";
const ACCOUNTS: &str = "system:serviceaccounts";
const AUTHENTICATED: &str = "system:authenticated";

impl Api {
    /// The service account whose token the request carries.
    pub(super) fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = shown.and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let token = token.ok_or_else(|| {
            let needed = "a client certificate of the cluster's CA or a token of a service account is needed";
            ApiError::Unauthorized(needed.to_owned())
        })?;
        let own = [self.0.signer.issuer().to_owned()];
        let found = caller_of(&self.0.registry, &self.0.signer, token, &own);
        found.map(|(caller, _)| caller).map_err(ApiError::Unauthorized)
    }

    /// POST of `serviceaccounts/NAME/token`.
    pub(super) async fn request_token(
        &self,
        asked: Asked,
        body: Body,
    ) -> Result<Response, ApiError> {
        if asked.method != Method::POST {
            return Err(ApiError::MethodNotAllowed);
        }
        let raw = Raw::read(&asked.headers, body).await?;
        let mut request: TokenRequest = parsed(&raw, "TokenRequest")?;
        let (target, registry) = (&asked.target, &self.0.registry);
        let spec = request.spec.get_or_insert_default();
        let pod = spec.bound_object_ref.as_ref();
        let pod = pod.map(|bound| bound_pod(registry, target, bound)).transpose()?;
        if !asked.caller.is_admin() && !is_runner(&asked.caller, pod.as_ref()) {
            let detail = format!(
                "User \"{}\" cannot create resource \"serviceaccounts/token\": a node makes tokens for its own pods only",
                asked.caller.user
            );
            let name = target.name.clone().unwrap_or_default();
            return Err(ApiError::Forbidden { kind: target.kind, name, detail });
        }
        let name = target.name.as_deref().unwrap_or_default();
        let account: ServiceAccount = registry.get(target.ns.as_deref(), name)?;
        let secs = spec.expiration_seconds.unwrap_or(DEFAULT_SECS);
        if !(LEAST_SECS..=MOST_SECS).contains(&secs) {
            let rule = format!(
                "may not specify a duration less than {LEAST_SECS} seconds or more than 2^32 seconds"
            );
            return Err(invalid(
                target,
                "spec.expirationSeconds",
                &format!("Invalid value: {secs}: {rule}"),
            ));
        }
        let audiences = spec.audiences.get_or_insert_default();
        if audiences.is_empty() {
            audiences.push(self.0.signer.issuer().to_owned());
        }
        let now = Timestamp::now().as_second();
        let claims = claims(&self.0.signer, &account, pod.as_ref(), audiences.clone(), (now, secs));
        spec.expiration_seconds = Some(secs);
        request.status = Some(TokenRequestStatus {
            expiration_timestamp: Timestamp::from_second(claims.exp).ok().map(Time),
            token: Some(self.0.signer.sign(&claims)),
        });
        request.metadata.name = account.metadata.name;
        request.metadata.namespace = account.metadata.namespace;
        Ok(respond::json(StatusCode::CREATED, &request))
    }

    /// POST of a review.
    pub(super) async fn review(
        &self,
        caller: &Caller,
        resource: &str,
        request: Request<Body>,
    ) -> Result<Response, ApiError> {
        let raw = posted(GROUP, &REVIEWS, resource, request).await?;
        if resource == "selfsubjectreviews" {
            let mut review: SelfSubjectReview = parsed(&raw, "SelfSubjectReview")?;
            review.status = Some(SelfSubjectReviewStatus { user_info: Some(user(caller)) });
            return Ok(respond::json(StatusCode::CREATED, &review));
        }
        if !caller.is_admin() && caller.node().is_none() {
            let text = format!("User \"{}\" cannot create resource \"tokenreviews\"", caller.user);
            return Err(ApiError::ForbiddenPath(text));
        }
        let mut review: TokenReview = parsed(&raw, "TokenReview")?;
        let own = vec![self.0.signer.issuer().to_owned()];
        let wanted = review.spec.audiences.clone().filter(|a| !a.is_empty()).unwrap_or(own);
        let found = caller_of(&self.0.registry, &self.0.signer, &review.spec.token, &wanted);
        review.status = Some(match found {
            Ok((caller, audiences)) => TokenReviewStatus {
                authenticated: Some(true),
                audiences: Some(audiences),
                user: Some(user(&caller)),
                error: None,
            },
            Err(why) => TokenReviewStatus {
                authenticated: Some(false),
                error: Some(why),
                ..TokenReviewStatus::default()
            },
        });
        // Whoever keeps the answer must not keep the token with it.
        review.spec.token.clear();
        Ok(respond::json(StatusCode::CREATED, &review))
    }
}

/// The body of a POST of one of the reviews of a group.
pub(super) async fn posted(
    group: &str,
    reviews: &[(&str, &str)],
    resource: &str,
    request: Request<Body>,
) -> Result<Raw, ApiError> {
    if !reviews.iter().any(|(name, _)| *name == resource) {
        return Err(not_served(&format!("no resource {resource:?} in {group}")));
    }
    if request.method() != Method::POST {
        return Err(ApiError::MethodNotAllowed);
    }
    let (parts, body) = request.into_parts();
    Raw::read(&parts.headers, body).await
}

pub(super) fn parsed<T: DeserializeOwned>(raw: &Raw, what: &str) -> Result<T, ApiError> {
    let read = serde_path_to_error::deserialize(&raw.value()?);
    read.map_err(|e| ApiError::BadRequest(format!("{what}: {}: {}", e.path(), e.inner())))
}

fn invalid(target: &Target, field: &str, message: &str) -> ApiError {
    let cause = Cause { field: field.to_owned(), message: message.to_owned() };
    let name = target.name.clone().unwrap_or_default();
    ApiError::Invalid { kind: target.kind, name, causes: vec![cause] }
}

/// The pod that a token is to be bound to; it runs as the account that the request names.
fn bound_pod(
    registry: &Registry,
    target: &Target,
    bound: &BoundObjectReference,
) -> Result<Pod, ApiError> {
    let field = "spec.boundObjectRef";
    if bound.kind.as_deref() != Some("Pod") {
        let kind = bound.kind.as_deref().unwrap_or_default();
        let text = format!("Unsupported value: {kind:?}: supported values: \"Pod\"");
        return Err(invalid(target, &format!("{field}.kind"), &text));
    }
    let name = bound.name.as_deref().unwrap_or_default();
    let pod: Pod = registry.get(target.ns.as_deref(), name)?;
    let uid = objects::uid(&pod.metadata);
    if bound.uid.as_deref().is_some_and(|wanted| wanted != uid) {
        let detail = format!("the UID in the bound object reference does not match: it is {uid}");
        return Err(ApiError::Conflict { kind: Pod::kind(), name: name.to_owned(), detail });
    }
    let account = pod.spec.as_ref().and_then(|s| s.service_account_name.as_deref());
    if account.filter(|name| !name.is_empty()).unwrap_or("default")
        != target.name.as_deref().unwrap_or_default()
    {
        let text = format!("Invalid value: {name:?}: the pod does not run as this account");
        return Err(invalid(target, &format!("{field}.name"), &text));
    }
    Ok(pod)
}

/// Whether the caller is the node that the pod runs on.
fn is_runner(caller: &Caller, pod: Option<&Pod>) -> bool {
    let node = pod.and_then(objects::node_of);
    node.is_some() && caller.node() == node
}

fn claims(
    signer: &Signer,
    account: &ServiceAccount,
    pod: Option<&Pod>,
    audiences: Vec<String>,
    (now, secs): (i64, i64),
) -> Claims {
    let reference = |meta| Reference {
        name: objects::name(meta).to_owned(),
        uid: objects::uid(meta).to_owned(),
    };
    let namespace = objects::namespace(&account.metadata).to_owned();
    Claims {
        aud: audiences,
        exp: now + secs,
        iat: now,
        nbf: now,
        iss: signer.issuer().to_owned(),
        jti: hex::encode(rand::rng().random::<[u8; 16]>()),
        sub: format!("{USER_PREFIX}{namespace}:{}", objects::name(&account.metadata)),
        bound: Bound {
            namespace,
            serviceaccount: reference(&account.metadata),
            pod: pod.map(|pod| reference(&pod.metadata)),
        },
    }
}

/// Who a token is for, and which of the wanted audiences it has; else why it is not accepted.
fn caller_of(
    registry: &Registry,
    signer: &Signer,
    token: &str,
    wanted: &[String],
) -> Result<(Caller, Vec<String>), String> {
    let now = Timestamp::now().as_second();
    let claims = signer.verify(token, now).map_err(|refused| refused.to_string())?;
    let audiences: Vec<String> =
        wanted.iter().filter(|audience| claims.aud.contains(audience)).cloned().collect();
    if audiences.is_empty() {
        return Err("the token is for another audience".to_owned());
    }
    let (bound, ns) = (&claims.bound, Some(claims.bound.namespace.as_str()));
    let account = registry.get::<ServiceAccount>(ns, &bound.serviceaccount.name);
    let account = account.ok().filter(|a| objects::uid(&a.metadata) == bound.serviceaccount.uid);
    let account = account.ok_or("the service account of the token is gone")?;
    if let Some(pod) = &bound.pod {
        let found = registry.get::<Pod>(ns, &pod.name).ok();
        if found.is_none_or(|found| objects::uid(&found.metadata) != pod.uid) {
            return Err("the pod of the token is gone".to_owned());
        }
    }
    let pod = bound.pod.as_ref().map(|pod| (pod.name.clone(), pod.uid.clone()));
    let caller = caller(&bound.namespace, &bound.serviceaccount.name, &account, pod);
    Ok((caller, audiences))
}

/// A service account as a caller.
pub(super) fn caller(
    namespace: &str,
    name: &str,
    account: &ServiceAccount,
    pod: Option<(String, String)>,
) -> Caller {
    Caller {
        user: format!("{USER_PREFIX}{namespace}:{name}"),
        groups: vec![ACCOUNTS.to_owned(), format!("{ACCOUNTS}:{namespace}")],
        account: Some(Account {
            namespace: namespace.to_owned(),
            uid: objects::uid(&account.metadata).to_owned(),
            role: Role::of(account.metadata.annotations.as_ref()),
            pod,
        }),
    }
}

/// Namespace and name of the service account that a user is.
pub(super) fn account_name(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix(USER_PREFIX)?.split_once(':')
}

fn user(caller: &Caller) -> UserInfo {
    let pod = caller.account.as_ref().and_then(|account| account.pod.clone());
    let extra = pod.map(|(name, uid)| {
        let key = |part: &str| format!("authentication.kubernetes.io/pod-{part}");
        BTreeMap::from([(key("name"), vec![name]), (key("uid"), vec![uid])])
    });
    UserInfo {
        username: Some(caller.user.clone()),
        uid: caller.account.as_ref().map(|account| account.uid.clone()),
        groups: Some(caller.groups.iter().cloned().chain([AUTHENTICATED.to_owned()]).collect()),
        extra,
    }
}
