//! Requests that the agent of a node answers: logs, and what people ask a node.

use std::net::IpAddr;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Node, Pod};
use mesh_model::wellknown::AGENT_PORT;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{Api, Asked};
use crate::error::ApiError;
use crate::pki::{Authority, PkiError};
use crate::server::keep_alive;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const LARGEST_ERROR_BYTES: usize = 64 << 10;

/// The way to the agents: their certificates are verified by the cluster's CA, ours is shown to them.
#[derive(Clone)]
pub struct Agents {
    tls: Arc<RwLock<TlsConnector>>,
    port: u16,
}

/// The way to the agents could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum AgentsError {
    /// No client certificate.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// TLS does not take the certificate.
    #[error("set up TLS towards agents")]
    Tls(#[from] rustls::Error),
}

impl Agents {
    /// With a certificate of `authority`, to the usual port.
    pub fn new(authority: &Authority) -> Result<Self, AgentsError> {
        Ok(Self { tls: Arc::new(RwLock::new(connector(authority)?)), port: AGENT_PORT })
    }

    /// Shows a new certificate from now on; connections that there are stay.
    pub fn renew(&self, authority: &Authority) -> Result<(), AgentsError> {
        let new = connector(authority)?;
        *self.tls.write().expect("no code panics while it holds the connector") = new;
        Ok(())
    }

    fn tls(&self) -> TlsConnector {
        self.tls.read().expect("no code panics while it holds the connector").clone()
    }

    pub(super) async fn ask(
        &self,
        node: &Node,
        request: Request<Body>,
    ) -> Result<Response, ApiError> {
        let name = node.metadata.name.clone().unwrap_or_default();
        let address = internal_ip(node).ok_or_else(|| {
            ApiError::BadGateway(format!("node {name} has not reported an address yet"))
        })?;
        let failed = |what: String| {
            ApiError::BadGateway(format!("agent of node {name} at {address}:{}: {what}", self.port))
        };
        let late = || {
            ApiError::GatewayTimeout(format!(
                "agent of node {name} at {address}:{} does not answer",
                self.port
            ))
        };
        let server = ServerName::try_from(name.clone()).unwrap_or(ServerName::from(address));
        let connect = async {
            let stream = TcpStream::connect((address, self.port)).await?;
            keep_alive(&stream);
            self.tls().connect(server, stream).await
        };
        let connected = tokio::time::timeout(CONNECT_LIMIT, connect).await.map_err(|_| late())?;
        let stream = connected.map_err(|e| failed(e.to_string()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(e.to_string()))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to an agent ended");
            }
        });
        let answer = tokio::time::timeout(ANSWER_LIMIT, sender.send_request(request)).await;
        let answer = answer.map_err(|_| late())?.map_err(|e| failed(e.to_string()))?;
        Ok(answer.map(Body::new))
    }
}

fn connector(authority: &Authority) -> Result<TlsConnector, AgentsError> {
    let own = authority.client()?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone())?;
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(own.chain, own.key)?;
    Ok(TlsConnector::from(Arc::new(config)))
}

impl Api {
    /// `pods/NAME/log`.
    pub(super) async fn proxy_logs(&self, asked: &Asked, name: &str) -> Result<Response, ApiError> {
        let ns = asked.target.ns.as_deref().unwrap_or_default();
        let pod: Pod = self.0.registry.get(Some(ns), name)?;
        let container = container(&pod, name, asked.query.value("container"))?;
        let node = self.node_of(&pod, name)?;
        let path =
            format!("/containerLogs/{ns}/{name}/{container}{}", asked.query.without("container"));
        let answer = self.0.agents.ask(&node, request(Method::GET, &path, Body::empty())?).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(refusal(answer).await)
    }

    /// The node that a pod runs on.
    pub(super) fn node_of(&self, pod: &Pod, name: &str) -> Result<Node, ApiError> {
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty());
        let node = node.ok_or_else(|| {
            ApiError::BadRequest(format!("pod {name} does not have a host assigned"))
        })?;
        self.0.registry.get(None, &node).map_err(|error| {
            ApiError::BadGateway(format!("pod {name} is bound to a node that is gone: {error}"))
        })
    }

    /// `nodes/NAME/proxy/PATH`.
    pub(super) async fn proxy_node(&self, asked: Asked, body: Body) -> Result<Response, ApiError> {
        let name = asked.target.name.as_deref().unwrap_or_default();
        let node: Node = self.0.registry.get(None, name)?;
        let path = format!("/{}{}", asked.target.rest, asked.query.without(""));
        let mut request = request(asked.method, &path, body)?;
        if let Some(form) = asked.headers.get(header::CONTENT_TYPE) {
            request.headers_mut().insert(header::CONTENT_TYPE, form.clone());
        }
        let mut answer = self.0.agents.ask(&node, request).await?;
        for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
            answer.headers_mut().remove(name);
        }
        Ok(answer)
    }
}

pub(super) fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, ApiError> {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, HeaderValue::from_static("agent"))
        .body(body)
        .map_err(|e| ApiError::BadRequest(e.to_string()))
}

/// What an agent refused, as a failure of our own.
pub(super) async fn refusal(answer: Response) -> ApiError {
    let status = answer.status();
    let text = Limited::new(answer.into_body(), LARGEST_ERROR_BYTES).collect().await;
    let text = text.map(|b| String::from_utf8_lossy(&b.to_bytes()).trim().to_owned());
    let text = text.unwrap_or_default();
    match status {
        StatusCode::NOT_FOUND => ApiError::NotServed(text),
        StatusCode::BAD_REQUEST => ApiError::BadRequest(text),
        _ => ApiError::BadGateway(format!("the agent answered {status}: {text}")),
    }
}

/// The container that is meant.
pub(super) fn container(pod: &Pod, name: &str, asked: Option<&str>) -> Result<String, ApiError> {
    let spec = pod.spec.as_ref();
    let names = || {
        let main = spec.into_iter().flat_map(|s| &s.containers);
        let init = spec.into_iter().flat_map(|s| s.init_containers.iter().flatten());
        let added = spec.into_iter().flat_map(|s| s.ephemeral_containers.iter().flatten());
        let others = init.map(|c| c.name.clone()).chain(added.map(|c| c.name.clone()));
        (main.map(|c| c.name.clone()).collect::<Vec<_>>(), others)
    };
    let (main, mut others) = names();
    if let Some(asked) = asked {
        return if main.iter().any(|c| c == asked) || others.any(|c| c == asked) {
            Ok(asked.to_owned())
        } else {
            Err(ApiError::BadRequest(format!("container {asked} is not valid for pod {name}")))
        };
    }
    let annotations = pod.metadata.annotations.as_ref();
    let default = annotations.and_then(|a| a.get("kubectl.kubernetes.io/default-container"));
    match (main.as_slice(), default) {
        ([only], _) => Ok(only.clone()),
        (all, Some(default)) if all.contains(default) => Ok(default.clone()),
        (all, _) => Err(ApiError::BadRequest(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            all.join(" ")
        ))),
    }
}

fn internal_ip(node: &Node) -> Option<IpAddr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses.iter().filter(|a| a.type_ == "InternalIP").find_map(|a| a.address.parse().ok())
}
