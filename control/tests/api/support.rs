//! A service of its own for each test, and plain requests to it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Once;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::Client;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use mesh_control::pki::DEFAULT_LIFETIME;
use mesh_control::registry::Registry;
use mesh_control::server::{Options, Server};
use serde_json::{Value, json};

pub(crate) const JSON: &str = "application/json";
pub(crate) const MERGE: &str = "application/merge-patch+json";
pub(crate) const STRATEGIC: &str = "application/strategic-merge-patch+json";
pub(crate) const APPLY: &str = "application/apply-patch+yaml";
pub(crate) const JSON_PATCH: &str = "application/json-patch+json";
pub(crate) const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

pub(crate) struct Control {
    pub(crate) client: Client,
    pub(crate) registry: Registry,
    pub(crate) address: SocketAddr,
    pub(crate) dir: tempfile::TempDir,
    server: Server,
}

pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

/// One TLS provider for the process, whoever comes first.
pub(crate) fn provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        rustls::crypto::aws_lc_rs::default_provider().install_default().unwrap();
    });
}

pub(crate) async fn admin(data_dir: &Path) -> Client {
    provider();
    let file = Kubeconfig::read_from(data_dir.join("admin.kubeconfig")).unwrap();
    let options = KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(file, &options).await.unwrap();
    // A refusal is what some tests are about.
    config.default_retry = false;
    Client::try_from(config).unwrap()
}

/// Waits until the namespaces have what each of them gets: what is counted later does not change by itself.
async fn settled(registry: &Registry) {
    let begun = std::time::Instant::now();
    let namespaces = registry.list::<Namespace>(None).unwrap().items;
    let complete = |namespace: &Namespace| {
        let ns = namespace.metadata.name.as_deref();
        registry.get::<ServiceAccount>(ns, "default").is_ok()
            && registry.get::<ConfigMap>(ns, "kube-root-ca.crt").is_ok()
    };
    while !namespaces.iter().all(complete) {
        assert!(begun.elapsed() < Duration::from_secs(30), "no accounts are made");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Control {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn start_in(dir: tempfile::TempDir) -> Self {
        Self::start_with(dir, DEFAULT_LIFETIME).await
    }

    /// With certificates that are good for so long.
    pub(crate) async fn start_with(dir: tempfile::TempDir, lifetime: Duration) -> Self {
        provider();
        let options = Options {
            data_dir: dir.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: Vec::new(),
            cluster_config: None,
            preshared_key_rotation: Duration::from_secs(1),
            certificate_lifetime: lifetime,
        };
        let server = Server::start(options).await.unwrap();
        let client = admin(dir.path()).await;
        settled(&server.registry).await;
        Self { client, registry: server.registry.clone(), address: server.address, dir, server }
    }

    /// Stops the service and gives back its folder.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.server.stop().await;
        self.dir
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        send(&self.client, Method::GET, path, JSON, Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        send(&self.client, Method::POST, path, JSON, body.to_string().into_bytes()).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Answer {
        send(&self.client, Method::PUT, path, JSON, body.to_string().into_bytes()).await
    }

    pub(crate) async fn patch(&self, path: &str, form: &str, body: Value) -> Answer {
        send(&self.client, Method::PATCH, path, form, body.to_string().into_bytes()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        send(&self.client, Method::DELETE, path, JSON, Vec::new()).await
    }

    /// Creates an object that must be accepted.
    pub(crate) async fn create(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.code, 201, "{}", answer.body);
        answer.body
    }
}

pub(crate) async fn send(
    client: &Client,
    method: Method,
    path: &str,
    form: &str,
    body: Vec<u8>,
) -> Answer {
    send_accepting(client, method, path, form, JSON, body).await
}

pub(crate) async fn send_accepting(
    client: &Client,
    method: Method,
    path: &str,
    form: &str,
    accept: &str,
    body: Vec<u8>,
) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", form)
        .header("accept", accept)
        .body(Body::from(body))
        .unwrap();
    let (parts, body) = client.send(request).await.unwrap().into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
    let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| text());
    Answer { code: parts.status.as_u16(), headers: parts.headers, body }
}

/// Nothing here takes so long unless it never comes.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits for an answer of which `holds` is true.
pub(crate) async fn until(control: &Control, path: &str, holds: impl Fn(&Answer) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let answer = control.get(path).await;
        if holds(&answer) {
            return answer.body;
        }
        assert!(begun.elapsed() < LIMIT, "{path}: {}", answer.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": value}})
}

pub(crate) fn pod(name: &str, node: Option<&str>) -> Value {
    json!({"metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": [{"name": "main", "image": "i:1"}]}})
}

pub(crate) fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "i:1"}]}}}})
}

pub(crate) const MAPS: &str = "/api/v1/namespaces/default/configmaps";
pub(crate) const PODS: &str = "/api/v1/namespaces/default/pods";
pub(crate) const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
