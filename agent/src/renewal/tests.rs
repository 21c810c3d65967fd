mod control;

use std::path::PathBuf;

use axum::Router;
use axum::routing::get;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use kube::client::Body;
use mesh_model::ClusterConfig;
use rcgen::DnType;
use rustls::ClientConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::credential::ca::ALWAYS;
use crate::server::tls;
use control::Control;

const LIMIT: Duration = Duration::from_secs(30);
const DAY: i64 = 86_400;

/// A member of the cluster whose certificate is good at that time.
struct Node {
    name: NodeName,
    dir: tempfile::TempDir,
    identity: Identity,
    client: kube::Client,
    board: Board,
}

impl Node {
    fn new(control: &Control, validity: Validity) -> Self {
        let (name, dir): (NodeName, _) = ("n".parse().unwrap(), tempfile::tempdir().unwrap());
        let folder = dir.path().join("pki");
        std::fs::create_dir(&folder).unwrap();
        let ca = folder.join("ca.crt");
        std::fs::write(&ca, &control.ca.pem).unwrap();
        let own = control.ca.sign(DnType::CommonName, "system:node:n", validity);
        own.keep(&folder).unwrap();
        let identity = Identity {
            credential: watch::Sender::new(Arc::new(own)),
            ca,
            server: control.url(),
            cluster: ClusterConfig::default(),
        };
        let client = crate::api::client(&identity).unwrap();
        Self { name, dir, identity, client, board: Board::default() }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("pki")
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    fn certificate(&self) -> String {
        self.identity.credential.borrow().certificate_pem.clone()
    }

    /// What the test does while the node keeps its certificate good.
    async fn while_renewing(&self, test: impl Future<Output = ()>) {
        let token_file = self.token_file();
        let joining = Joining {
            node: &self.name,
            addresses: &[],
            server: None,
            token: None,
            token_file: Some(&token_file),
            state_dir: self.dir.path(),
        };
        let (identity, client, board) = (&self.identity, &self.client, &self.board);
        let renewal = Renewal { identity, client, joining, board };
        tokio::select! {
            never = renewal.keep() => match never {},
            () = test => {}
        }
    }

    /// What the control service says is the certificate of a new request.
    async fn shown(&self) -> String {
        let request = http::Request::get("/who").body(Vec::new()).unwrap();
        self.client.request_text(request).await.unwrap()
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, all).await.is_ok(), "not seen: {what}");
}

fn print(certificate_pem: &str) -> String {
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject as _;
    control::print(&CertificateDer::from_pem_slice(certificate_pem.as_bytes()).unwrap())
}

/// Half of its time is over, and more than a third is not.
fn due() -> Validity {
    Validity { from: now() - 250 * DAY, until: now() + 100 * DAY }
}

#[test]
fn a_certificate_is_renewed_from_its_time_on_and_joined_for_after_its_end() {
    let validity = Validity { from: 0, until: 900 };
    let wait = |secs| Step::Wait(Duration::from_secs(secs));
    for (spread, now, expected) in [
        (0, -1, Step::JoinAgain),
        (0, 0, wait(450)),
        (0, 449, wait(1)),
        (0, 450, Step::Renew),
        (255, 450, wait(150)),
        (255, 600, Step::Renew),
        (0, 900, Step::Renew),
        (0, 901, Step::JoinAgain),
    ] {
        assert_eq!(step(validity, spread, now), expected, "{spread} {now}");
    }
    let year = Validity { from: 0, until: 366 * DAY };
    assert_eq!(step(year, 0, 0), Step::Wait(LOOK), "clocks are set, machines sleep");
    assert_eq!(longest_retry(year), LAST_RETRY);
    assert_eq!(longest_retry(validity).as_secs(), 14);
    assert_eq!(longest_retry(Validity { from: 0, until: 3 }), FIRST_RETRY);
}

/// A connection to the agent's own server, and what that shows.
async fn connect(
    control: &Control,
    to: std::net::SocketAddr,
) -> (SendRequest<Empty<Bytes>>, String) {
    let admin = control.ca.sign(DnType::OrganizationName, "system:masters", ALWAYS);
    let (chain, key) = admin.parts();
    let config = ClientConfig::builder().with_root_certificates(control.ca.roots());
    let config = config.with_client_auth_cert(chain, key).unwrap();
    let tcp = TcpStream::connect(to).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let shown = control::print(&tls.get_ref().1.peer_certificates().unwrap()[0]);
    let (sender, connection) = handshake(TokioIo::new(tls)).await.unwrap();
    tokio::spawn(connection);
    (sender, shown)
}

async fn is_healthy(sender: &mut SendRequest<Empty<Bytes>>) -> bool {
    let request = http::Request::get("/healthz").header("host", "n").body(Empty::new()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let healthy = answer.status().is_success();
    answer.into_body().collect().await.unwrap();
    healthy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_certificate_takes_over_and_connections_that_there_are_go_on() {
    let control = Control::start().await;
    let node = Node::new(&control, due());
    let first = node.certificate();
    assert_eq!(node.shown().await, print(&first));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (own, identity) = (listener.local_addr().unwrap(), node.identity.clone());
    let router = Router::new().route("/healthz", get(|| async { "ok" }));
    tokio::spawn(async move { tls::serve(&identity, listener, router).await });
    let (mut old, shown) = connect(&control, own).await;
    assert!(is_healthy(&mut old).await);
    assert_eq!(shown, print(&first));
    let request = http::Request::get("/endless").body(Body::empty()).unwrap();
    let mut events = node.client.send(request).await.unwrap().into_body();
    control.more.notify_one();
    assert!(events.frame().await.unwrap().is_ok());

    let renewed = until("the next certificate", || node.certificate() != first);
    node.while_renewing(renewed).await;
    let next = node.certificate();
    assert_eq!(node.shown().await, print(&next), "new requests show it");
    assert_eq!(connect(&control, own).await.1, print(&next), "and so does the agent's server");
    assert!(is_healthy(&mut old).await, "a connection to the agent goes on");
    control.more.notify_one();
    assert!(events.frame().await.unwrap().is_ok(), "and so does a watch");

    let kept = Credential::load(&node.folder()).unwrap();
    assert_eq!(kept.certificate_pem, next, "so that the next agent has it");
    let before = Credential::new(kept.key_pem, first);
    assert!(before.is_err(), "it is for another key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_service_that_does_not_answer_is_asked_again_and_the_node_says_so() {
    let control = Control::start().await;
    let node = Node::new(&control, due());
    let first = node.certificate();
    control.answer_with(404);
    node.while_renewing(async {
        until("what is wrong, and what helps", || {
            let failures = node.board.failures().join("; ");
            let end = date(node.identity.validity().until);
            let parts = ["certificate: not renewed", "upgrade it", &end, &node.identity.server];
            parts.into_iter().all(|part| failures.contains(part))
        })
        .await;
        assert_eq!(node.certificate(), first);
        control.answer_with(200);
        until("the next one", || node.certificate() != first && node.board.failures().is_empty())
            .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_control_service_sends_is_not_taken_unless_it_can_be_used() {
    let control = Control::start().await;
    let node = Node::new(&control, due());
    let first = node.certificate();
    *control.validity.lock().unwrap() = Validity { from: 0, until: 1_000_000_000 };
    node.while_renewing(until("the clocks are named", || {
        let failures = node.board.failures().join("; ");
        failures.contains("2001-09-09") && failures.contains("clock")
    }))
    .await;
    assert_eq!(node.certificate(), first);
    assert_eq!(Credential::load(&node.folder()).unwrap().certificate_pem, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_for_too_long_joins_again_by_the_token() {
    let control = Control::start().await;
    let node = Node::new(&control, Validity { from: 0, until: now() - DAY });
    node.while_renewing(async {
        until("the token is asked for", || {
            let failures = node.board.failures().join("; ");
            failures.contains("join again") && failures.contains("--token-file")
        })
        .await;
        std::fs::write(node.token_file(), control.token().to_string()).unwrap();
        until("it is a member again", || node.identity.validity().holds(now())).await;
    })
    .await;
    assert_eq!(node.shown().await, print(&node.certificate()));
    let kept = Credential::load(&node.folder()).unwrap();
    assert_eq!(kept.certificate_pem, node.certificate());
}
