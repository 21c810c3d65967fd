//! The HTTP side of the API: paths, verbs, who may do what, and the forms of requests and answers.
//!
//! Never does: TLS, storage, rules about objects. Entry: [`Api::handle`].

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::upgrade::OnUpgrade;
use mesh_model::certificate::RENEW_PATH;
use mesh_model::join::JOIN_PATH;
use mesh_model::preshared::PRESHARED_KEYS_PATH;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::pki::Authority;
use crate::preshared::Issuer;
use crate::registry::Registry;
use crate::tokens::Signer;

pub(crate) mod access;
pub mod body;
pub mod caller;
mod impersonate;
mod join;
pub(crate) mod metrics;
mod patch;
mod paths;
mod preshared;
mod protobuf;
mod proxy;
pub mod query;
mod read;
mod renew;
mod respond;
pub mod role;
mod selector;
mod streams;
mod strict;
mod target;
pub(crate) mod tokens;
mod watch;
mod write;

use body::Raw;
use caller::{Access, Caller, Shown, Verb};
use patch::Patch;
pub use preshared::Channel;
pub use proxy::Agents;
use query::Query;
use respond::Form;
use target::Target;

/// Everything that requests need. Cheap to clone.
#[derive(Clone)]
pub struct Api(Arc<Parts>);

struct Parts {
    registry: Registry,
    authority: Arc<Authority>,
    secret: String,
    agents: Agents,
    preshared: Issuer,
    signer: Signer,
    stopping: CancellationToken,
}

/// What the service makes certificates, keys and tokens with.
pub struct Keys {
    /// Signs certificates.
    pub authority: Arc<Authority>,
    /// Lets nodes in.
    pub secret: String,
    /// Makes the keys that pairs of nodes share.
    pub preshared: Issuer,
    /// Signs tokens of service accounts.
    pub signer: Signer,
}

/// A request, taken apart.
struct Asked {
    caller: Caller,
    method: Method,
    target: Target,
    query: Query,
    headers: HeaderMap,
}

impl Api {
    /// The API over `registry`; `stopping` ends watches.
    pub fn new(
        registry: Registry,
        keys: Keys,
        agents: Agents,
        stopping: CancellationToken,
    ) -> Self {
        let Keys { authority, secret, preshared, signer } = keys;
        Self(Arc::new(Parts { registry, authority, secret, agents, preshared, signer, stopping }))
    }

    /// Answers a request of `caller`: the subject of its client certificate, if it showed one; else a token is looked for.
    pub async fn handle(&self, caller: Option<Caller>, request: Request<Body>) -> Response {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let user = caller.as_ref().map(|c| c.user.clone());
        let result = self.route(caller, request).await;
        let response = result.unwrap_or_else(|error| respond::failure(&error));
        tracing::debug!(%method, path, user, status = response.status().as_u16(), "request");
        response
    }

    async fn route(
        &self,
        caller: Option<Caller>,
        request: Request<Body>,
    ) -> Result<Response, ApiError> {
        let path = request.uri().path().to_owned();
        match path.as_str() {
            "/version" => return Ok(respond::json(StatusCode::OK, &crate::discovery::version())),
            "/healthz" | "/readyz" | "/livez" | "/livez/ping" | "/readyz/ping" => {
                return Ok("ok".into_response());
            }
            JOIN_PATH => return self.join(request).await,
            _ => {}
        }
        let caller = match caller {
            Some(caller) => caller,
            None => self
                .authenticate(request.headers())
                .map_err(|error| run_out(&request).unwrap_or(error))?,
        };
        if path == RENEW_PATH {
            return self.renew(&caller, request).await;
        }
        if path == PRESHARED_KEYS_PATH {
            let channel = request.extensions().get::<Channel>().copied();
            return self.preshared_keys(&caller, channel, request.method());
        }
        let caller = self.acting(caller, request.headers())?;
        if let Some(response) = paths::fixed(&path, request.method(), request.headers())? {
            return Ok(response);
        }
        let (group, version, rest) = paths::resource(&path)?;
        if (group, version) == (metrics::GROUP, metrics::VERSION) {
            if !caller.is_admin() {
                let text = format!("User \"{}\" cannot get path {path:?}", caller.user);
                return Err(ApiError::ForbiddenPath(text));
            }
            let query = Query::parse(request.uri().query())?;
            return self.metrics(&path, request.method(), &query).await;
        }
        if (group, version) == (tokens::GROUP, tokens::VERSION) {
            let resource = rest.to_owned();
            return self.review(&caller, &resource, request).await;
        }
        if (group, version) == (access::GROUP, access::VERSION) {
            let resource = rest.to_owned();
            return self.review_access(&caller, &resource, request).await;
        }
        let target = target::parse(group, version, rest)?;
        let query = Query::parse(request.uri().query())?;
        let (mut parts, body) = request.into_parts();
        let upgrade = parts.extensions.remove::<OnUpgrade>();
        let asked = Asked { caller, method: parts.method, target, query, headers: parts.headers };
        if asked.target.sub.as_deref().is_some_and(streams::is_stream) {
            return self.stream(asked, upgrade).await;
        }
        self.resource(asked, body).await
    }

    async fn resource(&self, asked: Asked, body: Body) -> Result<Response, ApiError> {
        match (asked.method.as_str(), asked.target.sub.as_deref()) {
            (_, Some("token")) => self.request_token(asked, body).await,
            (_, Some("proxy")) => {
                let verb = if asked.method == Method::GET { Verb::Read } else { Verb::Create };
                self.allow(&asked, verb, None, false)?;
                self.proxy_node(asked, body).await
            }
            ("GET" | "HEAD", _) => self.read(asked).await,
            ("POST" | "PUT" | "PATCH" | "DELETE", Some("log")) => Err(ApiError::MethodNotAllowed),
            ("POST" | "PUT" | "PATCH" | "DELETE", _) => self.write(asked, body).await,
            _ => Err(ApiError::MethodNotAllowed),
        }
    }

    async fn read(&self, asked: Asked) -> Result<Response, ApiError> {
        self.allow(&asked, Verb::Read, None, false)?;
        let registry = &self.0.registry;
        let Asked { target, query, headers, .. } = &asked;
        let form = Form::of(headers, query);
        match (target.name.as_deref(), target.sub.as_deref()) {
            (_, None) if query.flag("watch")? => {
                watch::start(registry, target, query, form?, self.0.stopping.clone())
            }
            (None, _) => read::list(registry, target, query, form?),
            (Some(name), None | Some("status" | "ephemeralcontainers")) => {
                read::get(registry, target, name, form?)
            }
            (Some(name), Some("scale")) => {
                let scale = write::scale::get(registry, target, name)?;
                Ok(respond::json(StatusCode::OK, &scale))
            }
            (Some(name), Some("log")) => self.proxy_logs(&asked, name).await,
            _ => Err(ApiError::MethodNotAllowed),
        }
    }

    async fn write(&self, asked: Asked, body: Body) -> Result<Response, ApiError> {
        let raw = Raw::read(&asked.headers, body).await?;
        let verb = match asked.method.as_str() {
            "POST" => Verb::Create,
            "DELETE" if asked.target.name.is_none() => Verb::DeleteCollection,
            "DELETE" => Verb::Delete,
            _ => Verb::Update,
        };
        let at_once = verb == Verb::Delete && write::asks_no_grace(&asked.query, &raw);
        self.allow(&asked, verb, Some(&raw), at_once)?;
        if asked.method == Method::PATCH && Patch::is_apply(&raw) && self.is_missing(&asked.target)
        {
            self.allow(&asked, Verb::Create, None, false)?;
        }
        self.refuse_made(&asked.target)?;
        let program = asked.headers.get(http::header::USER_AGENT);
        let writing = write::Writing {
            registry: &self.0.registry,
            target: &asked.target,
            query: &asked.query,
            raw: &raw,
            form: Form::of(&asked.headers, &asked.query)?,
            program: program.and_then(|value| value.to_str().ok()).unwrap_or(&asked.caller.user),
            by_node: asked.caller.node().is_some() && !asked.caller.is_admin(),
        };
        match asked.method.as_str() {
            "POST" => writing.create().await,
            "PUT" => writing.update().await,
            "PATCH" => writing.patch().await,
            _ if asked.target.name.is_none() => writing.delete_collection().await,
            _ if asked.target.sub.is_some() => Err(ApiError::MethodNotAllowed),
            _ => writing.delete().await,
        }
    }

    /// Refuses to change what is there only because it is made of other objects.
    fn refuse_made(&self, target: &Target) -> Result<(), ApiError> {
        let Some(name) = target.name.clone() else { return Ok(()) };
        let is_made = self.0.registry.is_made(target.kind, target.ns.as_deref(), &name);
        if !is_made || !self.is_missing(target) {
            return Ok(());
        }
        let detail = "they follow the pods that the Service of that name selects".to_owned();
        Err(ApiError::Forbidden { kind: target.kind, name, detail })
    }

    /// Whether there is no object where the request goes.
    fn is_missing(&self, target: &Target) -> bool {
        let name = target.name.as_deref().unwrap_or_default();
        self.0.registry.record(target.kind, target.ns.as_deref(), name).is_err()
    }

    /// Refuses what the caller may not do.
    fn allow(
        &self,
        asked: &Asked,
        verb: Verb,
        raw: Option<&Raw>,
        no_grace: bool,
    ) -> Result<(), ApiError> {
        if asked.caller.is_admin() {
            return Ok(());
        }
        let target = &asked.target;
        let created = raw.filter(|_| verb == Verb::Create && target.name.is_none());
        let created = created.and_then(|raw| raw.value().ok());
        let is_pod = target.kind.kind == "Pod";
        if created.as_ref().is_some_and(|pod| is_pod && asked.caller.may_mirror(pod)) {
            return Ok(());
        }
        let created = created.as_ref().and_then(|v| v["metadata"]["name"].as_str());
        let name = target.name.as_deref().or(created);
        let access = Access {
            verb,
            kind: target.kind,
            ns: target.ns.as_deref(),
            name,
            sub: target.sub.as_deref(),
            pod_node: None,
            no_grace,
        };
        self.judge(&asked.caller, access).map_err(|detail| ApiError::Forbidden {
            kind: target.kind,
            name: name.unwrap_or_default().to_owned(),
            detail,
        })
    }

    /// Whether the caller may do it; else why not.
    fn judge(&self, caller: &Caller, access: Access<'_>) -> Result<(), String> {
        let pod_node = self.pod_node(&access);
        caller.may(&Access { pod_node: pod_node.as_deref(), ..access })
    }

    /// The node that the pod of a request is bound to.
    fn pod_node(&self, access: &Access<'_>) -> Option<String> {
        let name = access.name.filter(|_| access.kind.kind == "Pod")?;
        let pod: k8s_openapi::api::core::v1::Pod = self.0.registry.get(access.ns, name).ok()?;
        pod.spec?.node_name
    }
}

/// Why the certificate that the client has shown does not count.
fn run_out(request: &Request<Body>) -> Option<ApiError> {
    let _shown = request.extensions().get::<Arc<Shown>>()?;
    Some(ApiError::Unauthorized("the client certificate has run out".to_owned()))
}
