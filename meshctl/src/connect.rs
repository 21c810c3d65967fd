//! The way to the API: a kubeconfig and plain HTTP requests on top of the `kube` client.

use anyhow::Context as _;
use http::{Method, Request, header};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

use crate::cli::Global;

/// Accept header for server-side tables (Kubernetes API concepts, "Table fetches").
pub(crate) const ACCEPT_TABLE: &str =
    "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

/// An API server.
pub(crate) struct Api {
    pub(crate) client: kube::Client,
    /// Where it is, for messages.
    url: String,
}

impl Api {
    /// From the kubeconfig that the options or the environment name.
    pub(crate) async fn connect(global: &Global) -> anyhow::Result<Self> {
        let options = KubeConfigOptions::default();
        let mut config = match &global.kubeconfig {
            Some(path) => {
                let read = Kubeconfig::read_from(path)
                    .with_context(|| format!("read --kubeconfig {}", path.display()))?;
                kube::Config::from_custom_kubeconfig(read, &options).await
            }
            None => kube::Config::from_kubeconfig(&options).await,
        }
        .context("no usable kubeconfig: give --kubeconfig FILE or set KUBECONFIG")?;
        // Who is refused for now is told so; what waits for it waits by itself, as a drain does.
        config.default_retry = false;
        let url = config.cluster_url.to_string();
        let client = kube::Client::try_from(config).context("set up the API client")?;
        Ok(Self { client, url })
    }

    /// The namespace of the kubeconfig's context, unless one is given.
    pub(crate) fn namespace<'a>(&'a self, given: Option<&'a str>) -> &'a str {
        given.unwrap_or_else(|| self.client.default_namespace())
    }

    /// Sends a request, and turns failures into a sentence.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        content: Option<(&str, Vec<u8>)>,
        accept: &str,
    ) -> Result<Value, ApiFailure> {
        let mut request =
            Request::builder().method(method).uri(path).header(header::ACCEPT, accept);
        let body = match content {
            Some((kind, body)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                body
            }
            None => vec![],
        };
        let request = request.body(body).map_err(|e| self.failure(e.into()))?;
        self.client.request(request).await.map_err(|e| self.failure(e.into()))
    }

    /// Reads JSON.
    pub(crate) async fn read(&self, path: &str) -> Result<Value, ApiFailure> {
        self.call(Method::GET, path, None, "application/json").await
    }

    /// An error of the client as an answer of the server or a failure to reach it.
    pub(crate) fn failure(&self, error: anyhow::Error) -> ApiFailure {
        match error.downcast::<kube::Error>() {
            Ok(kube::Error::Api(status)) => {
                ApiFailure::Refused { code: status.code, message: status.message.clone() }
            }
            Ok(error) => ApiFailure::Unreachable {
                url: self.url.clone(),
                cause: innermost(&anyhow::Error::new(error)),
            },
            Err(error) => {
                ApiFailure::Unreachable { url: self.url.clone(), cause: innermost(&error) }
            }
        }
    }
}

/// The library wraps "connection refused" in three layers that say nothing more.
fn innermost(error: &anyhow::Error) -> String {
    error.root_cause().to_string()
}

/// A call to the API failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiFailure {
    /// The server answered with an error.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        code: u16,
        /// The server's words.
        message: String,
    },
    /// There was no answer.
    #[error("cannot reach the API at {url}: {cause} (is mesh-control running there?)")]
    Unreachable {
        /// Its address.
        url: String,
        /// Why.
        cause: String,
    },
}

impl ApiFailure {
    /// Whether the object does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }
}
