//! The node is a member of a cluster whose certificates are due as soon as they are made, and its agent is killed as it gets
//! the next one.

use std::fs;
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use mesh_model::certificate::{RENEW_PATH, RenewRequest, RenewResponse};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::{Node, PATIENCE, cannot_run, run, wait};

/// Where the agents of these tests look for the control service.
const ADDRESS: &str = "192.0.2.9";
const PORT: u16 = 6443;
const KILLS: u32 = 16;

/// Answers like the control service: whoever shows a certificate of its CA, with the key, gets the next one. Nobody may join.
struct Control {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    /// Told of each that has got one.
    renewals: Mutex<Sender<()>>,
    /// Connections of those who have no certificate, or none that fits its key.
    strangers: AtomicUsize,
}

/// Due, and good for long enough to start the agent again.
fn params() -> CertificateParams {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let second = |second: u64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(second);
    let mut params = CertificateParams::new(vec![ADDRESS.to_owned()]).unwrap();
    params.not_before = second(now.as_secs() - 1000);
    params.not_after = second(now.as_secs() + 400);
    params
}

impl Control {
    /// Listens in the node's namespace, for as long as the test process lives.
    fn start(node: &Node) -> (Arc<Self>, Receiver<()>) {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut ca = CertificateParams::new(vec![]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = ca.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let (renewals, renewed) = mpsc::channel();
        let control = Arc::new(Self {
            issuer: Issuer::new(ca, key),
            ca_pem: certificate.pem(),
            renewals: Mutex::new(renewals),
            strangers: AtomicUsize::new(0),
        });
        let own = KeyPair::generate().unwrap();
        let chain = vec![params().signed_by(&own, &control.issuer).unwrap().der().clone()];
        let clients = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
        let config = ServerConfig::builder()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, PrivateKeyDer::Pkcs8(own.serialize_der().into()))
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (listener, serving) = (listen(&node.name), Arc::clone(&control));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(Arc::clone(&serving).converse(acceptor.clone(), stream));
                }
            });
        });
        (control, renewed)
    }

    /// The node has joined, with an agent that kept key and certificate in two files.
    fn let_in(&self, node: &Node) {
        let key = KeyPair::generate().unwrap();
        let certificate = params().signed_by(&key, &self.issuer).unwrap().pem();
        let server = format!("https://{ADDRESS}:{PORT}");
        let folder = node.dir.join("state/pki");
        fs::create_dir_all(&folder).unwrap();
        for (name, content) in [
            ("node.key", key.serialize_pem()),
            ("node.crt", certificate),
            ("ca.crt", self.ca_pem.clone()),
            ("joined.json", json!({"server": server, "cluster": {}}).to_string()),
        ] {
            fs::write(folder.join(name), content).unwrap();
        }
    }

    async fn converse(self: Arc<Self>, acceptor: TlsAcceptor, stream: TcpStream) {
        let stream = match acceptor.accept(stream).await {
            Ok(stream) => stream,
            Err(error) => {
                // A client that is killed in the middle of it only ends.
                if error.kind() == std::io::ErrorKind::InvalidData {
                    self.strangers.fetch_add(1, Ordering::SeqCst);
                }
                return;
            }
        };
        let answer = service_fn(move |request: Request<Incoming>| {
            let control = Arc::clone(&self);
            async move {
                if request.uri().path() == RENEW_PATH {
                    control.renew(request).await
                } else {
                    Response::builder().status(404).body(Full::default())
                }
            }
        });
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server.serve_connection(TokioIo::new(stream), answer).await;
    }

    async fn renew(&self, request: Request<Incoming>) -> http::Result<Response<Full<Bytes>>> {
        // A client that is killed before it has asked gets no answer.
        let body = request.into_body().collect().await.map(|body| body.to_bytes());
        let Ok(asked) = serde_json::from_slice::<RenewRequest>(&body.unwrap_or_default()) else {
            return Response::builder().status(400).body(Full::default());
        };
        let mut wanted = CertificateSigningRequestParams::from_pem(&asked.csr_pem).unwrap();
        wanted.params = params();
        let certificate_pem = wanted.signed_by(&self.issuer).unwrap().pem();
        let answer = serde_json::to_vec(&RenewResponse { certificate_pem }).unwrap();
        // The test may be over.
        let _ = self.renewals.lock().unwrap().send(());
        Response::builder().body(Full::from(answer))
    }
}

fn listen(namespace: &str) -> TcpListener {
    let path = format!("/run/netns/{namespace}");
    let thread = std::thread::spawn(move || {
        setns(fs::File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind((ADDRESS, PORT)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    thread.join().unwrap()
}

#[test]
fn an_agent_that_is_killed_while_it_gets_its_next_certificate_is_a_member_afterwards() {
    if cannot_run() {
        return;
    }
    let mut node = Node::new("cert");
    run(&["ip", "-n", &node.name, "addr", "add", &format!("{ADDRESS}/24"), "dev", "up1"]);
    node.flags = ["--pods", "external"].map(str::to_owned).to_vec();
    let (control, renewed) = Control::start(&node);
    control.let_in(&node);
    let next = |node: &Node| {
        let next = renewed.recv_timeout(PATIENCE);
        assert!(next.is_ok(), "no next certificate: {}", node.log());
        let strangers = control.strangers.load(Ordering::SeqCst);
        assert!(strangers == 0 && !node.log().contains("panicked"), "{}", node.log());
    };
    for kill in 0..KILLS {
        node.launch();
        next(&node);
        // From the answer on, across everything that is done with it.
        std::thread::sleep(Duration::from_micros(500) * kill);
        node.stop(Signal::SIGKILL);
        renewed.try_iter().for_each(drop);
    }
    node.launch();
    // It asks with the second one for the third.
    (0..2).for_each(|_| next(&node));
    assert!(node.dir.join("state/pki/node.pem").exists());
    let failures = wait("the agent answers", || node.failures());
    assert!(!failures.iter().any(|line| line.starts_with("certificate")), "{failures:?}");
}
