//! Something that answers nodes like the control service.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures_util::stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mesh_model::ClusterConfig;
use mesh_model::certificate::{RENEW_PATH, RenewRequest, RenewResponse, Validity};
use mesh_model::join::{JOIN_PATH, JoinRequest, JoinResponse, JoinToken};
use rcgen::DnType;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use crate::credential::ca::{ALWAYS, Ca};
use crate::join::now;

/// The client's certificate.
#[derive(Clone)]
struct Shown(Option<CertificateDer<'static>>);

pub(super) struct Control {
    address: SocketAddr,
    pub(super) ca: Ca,
    /// Lets the answer to `/endless` go on.
    pub(super) more: Notify,
    /// Of the certificates that it signs.
    pub(super) validity: Mutex<Validity>,
    /// Of the answer to those who ask for them.
    status: AtomicU16,
}

impl Control {
    pub(super) async fn start() -> Arc<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let day = Validity { from: now() - 3600, until: now() + 86_400 };
        let control = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            ca: Ca::new(),
            more: Notify::new(),
            validity: Mutex::new(day),
            status: AtomicU16::new(200),
        });
        let (mut chain, key) = control.ca.sign(DnType::CommonName, "control", ALWAYS).parts();
        // Whoever joins looks for it there.
        chain.push(control.ca.certificate());
        let clients = WebPkiClientVerifier::builder(Arc::new(control.ca.roots()));
        let config = ServerConfig::builder()
            .with_client_cert_verifier(clients.allow_unauthenticated().build().unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let router = Router::new()
            .route("/who", get(who))
            .route("/endless", get(endless))
            .route(RENEW_PATH, post(renew))
            .route(JOIN_PATH, post(join))
            .with_state(Arc::clone(&control));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(converse(stream, acceptor.clone(), router.clone()));
            }
        });
        control
    }

    pub(super) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// From now on, certificates are answered with that status.
    pub(super) fn answer_with(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    pub(super) fn token(&self) -> JoinToken {
        let ca_sha256 = hex::encode(Sha256::digest(self.ca.certificate()));
        JoinToken { ca_sha256, secret: "0f".repeat(16) }
    }

    fn sign(&self, csr_pem: &str) -> String {
        self.ca.answer(csr_pem, "system:node:n", *self.validity.lock().unwrap())
    }
}

/// How a certificate is told from others.
pub(super) fn print(certificate: &CertificateDer<'_>) -> String {
    hex::encode(Sha256::digest(certificate))
}

async fn converse(stream: TcpStream, acceptor: TlsAcceptor, router: Router) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let shown = Shown(shown.cloned());
    let service = TowerToHyperService::new(router.layer(Extension(shown)));
    let server = auto::Builder::new(TokioExecutor::new());
    // How a client ends its connection is of no interest.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn who(Extension(shown): Extension<Shown>) -> String {
    shown.0.as_ref().map(print).unwrap_or_default()
}

async fn endless(State(control): State<Arc<Control>>) -> Response {
    let parts = stream::unfold(control, |control| async move {
        control.more.notified().await;
        Some((Ok::<_, Infallible>("more\n"), control))
    });
    axum::body::Body::from_stream(parts).into_response()
}

async fn renew(
    State(control): State<Arc<Control>>,
    Extension(shown): Extension<Shown>,
    Json(asked): Json<RenewRequest>,
) -> Response {
    let status = StatusCode::from_u16(control.status.load(Ordering::SeqCst)).unwrap();
    if shown.0.is_none() || !status.is_success() {
        return (status.max(StatusCode::BAD_REQUEST), "no").into_response();
    }
    Json(RenewResponse { certificate_pem: control.sign(&asked.csr_pem) }).into_response()
}

async fn join(State(control): State<Arc<Control>>, Json(asked): Json<JoinRequest>) -> Response {
    if asked.secret != control.token().secret {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let answer = JoinResponse {
        certificate_pem: control.sign(&asked.csr_pem),
        ca_pem: control.ca.pem.clone(),
        cluster: ClusterConfig::default(),
    };
    Json(answer).into_response()
}
