//! An image registry on the machine's loopback: who asks for `locked/...` has to say a name and a password.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::image::{Images, MANIFEST, images};

/// Who may have what is locked.
pub(crate) const USER: &str = "someone";
pub(crate) const PASSWORD: &str = "pass:word";

/// Serves for as long as the test's runtime runs.
#[derive(Clone)]
pub(crate) struct Registry {
    port: u16,
    images: Arc<Images>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let registry = Self {
            port: listener.local_addr().unwrap().port(),
            images: Arc::new(images()),
            asked: Arc::default(),
        };
        let router = Router::new().fallback(answer).with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        registry
    }

    /// Its name in image references. Registries on loopback are asked without TLS.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How often it has said what an image is, such as `open/busybox:1`.
    pub(crate) fn told(&self, image: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == image).count()
    }
}

async fn answer(
    State(registry): State<Registry>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let path = uri.path();
    if path.starts_with("/v2/locked/") && !is_known(&headers) {
        let unknown = Response::builder().status(StatusCode::UNAUTHORIZED);
        let unknown = unknown.header(header::WWW_AUTHENTICATE, "Basic realm=\"test\"");
        return unknown.body(Body::empty()).unwrap();
    }
    let Some((media, digest)) = registry.find(path) else {
        return Response::builder().status(StatusCode::NOT_FOUND).body(Body::empty()).unwrap();
    };
    let blob = registry.images.blobs.iter().find(|(known, _)| *known == digest);
    let Some((_, bytes)) = blob else {
        return Response::builder().status(StatusCode::NOT_FOUND).body(Body::empty()).unwrap();
    };
    let found = Response::builder()
        .header(header::CONTENT_TYPE, media)
        .header(header::CONTENT_LENGTH, bytes.len())
        .header("docker-content-digest", format!("sha256:{digest}"));
    let body = if method == Method::HEAD { Body::empty() } else { Body::from(bytes.clone()) };
    found.body(body).unwrap()
}

impl Registry {
    /// Media type and digest of what is at that path. Every image of the registry is busybox.
    fn find(&self, path: &str) -> Option<(&'static str, String)> {
        let path = path.strip_prefix("/v2/")?;
        if let Some((_, digest)) = path.split_once("/blobs/sha256:") {
            return Some(("application/octet-stream", digest.to_owned()));
        }
        let (repository, reference) = path.split_once("/manifests/")?;
        if let Some(digest) = reference.strip_prefix("sha256:") {
            return Some((MANIFEST, digest.to_owned()));
        }
        self.asked.lock().unwrap().push(format!("{repository}:{reference}"));
        let digest = self.images.manifests[0]["digest"].as_str().unwrap();
        Some((MANIFEST, digest.strip_prefix("sha256:").unwrap().to_owned()))
    }
}

fn is_known(headers: &HeaderMap) -> bool {
    let expected = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    headers.get(header::AUTHORIZATION).is_some_and(|given| *given == expected.as_str())
}
