//! Where the facts of a node come from: its agent, through the API's node proxy or its own socket.

use std::path::PathBuf;
use std::pin::Pin;

use anyhow::{Context as _, bail};
use futures_util::{AsyncRead, StreamExt as _, TryStreamExt as _};
use http::{Method, Request};
use http_body_util::{BodyExt as _, BodyStream, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cli::Global;
use crate::connect::Api;

/// A way to the agents.
pub(crate) enum Source {
    /// Through the API, to any node.
    Api(Api),
    /// The agent of this machine.
    Socket(PathBuf),
}

/// A node as the API lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeState {
    pub(crate) name: String,
    pub(crate) ready: bool,
}

impl Source {
    pub(crate) async fn open(global: &Global) -> anyhow::Result<Self> {
        match &global.socket {
            Some(path) => Ok(Self::Socket(path.clone())),
            None => Api::connect(global).await.map(Self::Api),
        }
    }

    /// The nodes to ask: the one that is given, or all. Over a socket there is only the one behind it.
    pub(crate) async fn nodes(&self, only: Option<&str>) -> anyhow::Result<Vec<NodeState>> {
        let Self::Api(api) = self else {
            return Ok(vec![NodeState { name: "this node".to_owned(), ready: true }]);
        };
        let list = api.read("/api/v1/nodes").await?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let mut nodes: Vec<NodeState> = items.iter().map(node_state).collect();
        if let Some(only) = only {
            nodes.retain(|n| n.name == only);
            if nodes.is_empty() {
                bail!("no node {only:?}: see `meshctl get nodes`");
            }
        }
        Ok(nodes)
    }

    /// One node: the one that is given, or the first ready one.
    pub(crate) async fn one_node(&self, given: Option<&str>) -> anyhow::Result<NodeState> {
        let nodes = self.nodes(given).await?;
        let chosen = nodes.iter().find(|n| n.ready || given.is_some()).cloned();
        chosen.context("no node is ready: see `meshctl get nodes`, or give --node NAME")
    }

    /// Reads a report of a node's agent.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        node: &NodeState,
        method: Method,
        path: &str,
    ) -> anyhow::Result<T> {
        self.exchange(node, method, path, None).await
    }

    /// Tells a node's agent something, and reads what it answers.
    pub(crate) async fn tell<T: DeserializeOwned>(
        &self,
        node: &NodeState,
        path: &str,
        message: &impl Serialize,
    ) -> anyhow::Result<T> {
        let message = serde_json::to_vec(message)?;
        self.exchange(node, Method::POST, path, Some(message)).await
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        node: &NodeState,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<T> {
        let value = match self {
            Self::Api(api) => {
                let path = format!("/api/v1/nodes/{}/proxy{path}", node.name);
                let content = body.map(|body| ("application/json", body));
                api.call(method, &path, content, "application/json")
                    .await
                    .with_context(|| format!("ask the agent of {}", node.name))?
            }
            Self::Socket(socket) => over_socket(socket, method, path, body)
                .await
                .with_context(|| format!("ask the agent on --socket {}", socket.display()))?,
        };
        serde_json::from_value(value)
            .with_context(|| format!("understand the agent of {}", node.name))
    }
}

/// An answer without an end.
pub(crate) type Stream = Pin<Box<dyn AsyncRead + Send>>;

impl Source {
    /// Tells a node's agent something, and reads what it answers for as long as it does.
    pub(crate) async fn stream(
        &self,
        node: &NodeState,
        path: &str,
        message: &impl Serialize,
    ) -> anyhow::Result<Stream> {
        let message = serde_json::to_vec(message)?;
        let request = Request::post(match self {
            Self::Api(_) => format!("/api/v1/nodes/{}/proxy{path}", node.name),
            Self::Socket(_) => path.to_owned(),
        });
        let request = request.header(http::header::CONTENT_TYPE, "application/json");
        match self {
            Self::Api(api) => {
                let stream = api.client.request_stream(request.body(message)?).await;
                let stream = stream.map_err(|error| api.failure(error.into()));
                let stream = stream.with_context(|| format!("ask the agent of {}", node.name))?;
                Ok(Box::pin(stream))
            }
            Self::Socket(socket) => {
                let asked = async {
                    let request = request.header(http::header::HOST, "agent");
                    let response = send(socket, request.body(Full::from(message))?).await?;
                    let body = BodyStream::new(response.into_body());
                    let data = body.filter_map(|frame| async {
                        frame.map(|frame| frame.into_data().ok()).transpose()
                    });
                    let data = data.map_err(std::io::Error::other);
                    Ok::<Stream, anyhow::Error>(Box::pin(data.into_async_read()))
                };
                asked
                    .await
                    .with_context(|| format!("ask the agent on --socket {}", socket.display()))
            }
        }
    }
}

fn node_state(node: &Value) -> NodeState {
    let conditions = node["status"]["conditions"].as_array();
    let ready =
        conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True");
    NodeState { name: node["metadata"]["name"].as_str().unwrap_or_default().to_owned(), ready }
}

async fn over_socket(
    socket: &PathBuf,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> anyhow::Result<Value> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, "agent")
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::<Bytes>::from(body.unwrap_or_default()))?;
    let body = send(socket, request).await?.into_body().collect().await?.to_bytes();
    Ok(serde_json::from_slice(&body)?)
}

/// The answer, unless it is a refusal.
async fn send(
    socket: &PathBuf,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<http::Response<hyper::body::Incoming>> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    if !status.is_success() {
        let body = response.into_body().collect().await?.to_bytes();
        bail!("{status}: {}", String::from_utf8_lossy(&body).trim());
    }
    Ok(response)
}
