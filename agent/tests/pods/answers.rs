//! A server of each kind that a probe may ask, as the program of a container: the test program itself, in the node's files. It
//! says yes where there is a file of that name.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::image::BUSYBOX;

/// All kinds of probes.
pub(crate) const KINDS: [&str; 5] = ["exec", "http", "https", "tcp", "grpc"];
/// The files that decide, by kind and name.
pub(crate) const NOTES: &str = "/run/rig/notes";
/// The same for a container's own programs.
pub(crate) const NOTES_INSIDE: &str = "/host/run/rig/notes";
/// Where servers listen. One of TCP has a port for each purpose, from this one on.
pub(crate) const PORT: u16 = 8080;

/// Set where this program is a container's: the kind of its server.
const KIND: &str = "MESH_PODS_ANSWERS";
const SERVING: u8 = 1;
const NOT_SERVING: u8 = 2;

/// A container with a server of that kind. Its pod has the node's files as the volume "host".
pub(crate) fn container(kind: &str) -> Value {
    let program = std::env::current_exe().unwrap();
    let mut command = json!(["chroot", "/host", program, "answers::serve", "--exact"]);
    command.as_array_mut().unwrap().extend(["--ignored", "--nocapture"].map(Value::from));
    json!({"name": "c", "image": BUSYBOX, "command": command,
        "env": [{"name": KIND, "value": kind}],
        "volumeMounts": [{"name": "host", "mountPath": "/host"}]})
}

#[test]
#[ignore = "the program of containers of other tests"]
fn serve() {
    let kind = std::env::var(KIND).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match kind.as_str() {
            "http" => accept(|stream| http(TokioIo::new(stream), "http")).await,
            "https" => {
                let tls = acceptor();
                accept(move |stream| https(tls.clone(), stream)).await;
            }
            "grpc" => accept(grpc).await,
            "tcp" => {
                let names = ["started", "ready", "alive"];
                let doors = names
                    .into_iter()
                    .zip(PORT..)
                    .map(|(name, port)| tokio::spawn(door(name, port)));
                for door in doors.collect::<Vec<_>>() {
                    door.await.unwrap();
                }
            }
            // Whoever is asked by commands needs no server.
            _ => std::future::pending().await,
        }
    });
}

fn says_yes(kind: &str, name: &str) -> bool {
    Path::new(NOTES).join(format!("{kind}-{name}")).exists()
}

async fn accept<F: Future<Output = ()> + Send + 'static>(serve: impl Fn(TcpStream) -> F) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await.unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(serve(stream));
    }
}

async fn http<S>(stream: S, kind: &'static str)
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let answer = service_fn(move |request: Request<Incoming>| async move {
        let yes = says_yes(kind, request.uri().path().trim_start_matches('/'));
        let answer = Response::builder().status(if yes { 200 } else { 503 });
        answer.body(Full::new(Bytes::new()))
    });
    // Whoever asks does not wait for the connection's end.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(stream, answer).await;
}

fn acceptor() -> TlsAcceptor {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let key = KeyPair::generate().unwrap();
    // Nobody can verify it, and a probe does not want to.
    let names = vec!["nobody.test".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

async fn https(tls: TlsAcceptor, stream: TcpStream) {
    if let Ok(stream) = tls.accept(stream).await {
        http(TokioIo::new(stream), "https").await;
    }
}

/// `grpc.health.v1.Health/Check`; the asked service is the name.
async fn grpc(stream: TcpStream) {
    let answer = service_fn(|request: Request<Incoming>| async move {
        let asked = request.into_body().collect().await.map(|body| body.to_bytes());
        let asked = asked.unwrap_or_default();
        // Flag and length of the message, tag and length of its only field.
        let name = asked.get(7..).unwrap_or_default();
        let yes = says_yes("grpc", &String::from_utf8_lossy(name));
        let status = if yes { SERVING } else { NOT_SERVING };
        let body = Full::new(Bytes::from(vec![0, 0, 0, 0, 2, 8, status]));
        let answer = Response::builder().header("content-type", "application/grpc");
        Ok::<_, Infallible>(answer.header("grpc-status", "0").body(body).unwrap())
    });
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
}

/// Open while the answer is yes.
async fn door(name: &'static str, port: u16) {
    let mut listener = None;
    loop {
        match (says_yes("tcp", name), &listener) {
            (true, None) => {
                listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await.ok();
            }
            (false, Some(_)) => listener = None,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
