//! Becoming a member: a key made here, a certificate from the control service, the CA pinned by the token.

use std::fs;
use std::io;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use mesh_model::join::{InvalidToken, JOIN_PATH, JoinRequest, JoinResponse, JoinToken};
use mesh_model::{ClusterConfig, NodeName};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::net::TcpStream;

mod pinned;

use pinned::PinnedCa;

const LIMIT: Duration = Duration::from_secs(10);
const LARGEST_ANSWER_BYTES: usize = 1 << 20;

/// Who this node is, and whom it believes.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Certificate chain, PEM.
    pub(crate) certificate: PathBuf,
    /// Its private key, PEM.
    pub(crate) key: PathBuf,
    /// The cluster's CA, PEM.
    pub(crate) ca: PathBuf,
    /// Where the API is.
    pub(crate) server: String,
    /// The cluster's address plan as of the join.
    pub(crate) cluster: ClusterConfig,
}

/// Why the node could not join.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error(
        "this node has not joined yet: give --server and --token (print one with `meshctl token`)"
    )]
    NothingGiven,
    #[error("read --token-file {path}")]
    TokenFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("--token")]
    Token(#[from] InvalidToken),
    #[error("--server {0}: expected https://HOST:PORT")]
    Server(String),
    #[error("reach {server}")]
    Connect {
        server: String,
        #[source]
        source: io::Error,
    },
    #[error("{server} did not answer in time")]
    TimedOut { server: String },
    #[error("speak HTTP with {server}")]
    Http {
        server: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{server} refused: {message}")]
    Refused { server: String, message: String },
    #[error("make the node's key and signing request")]
    Request(#[source] rcgen::Error),
    #[error("keep {path}")]
    Keep {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What a join needs.
pub(crate) struct Joining<'a> {
    pub(crate) node: &'a NodeName,
    pub(crate) addresses: &'a [IpAddr],
    pub(crate) server: Option<&'a str>,
    pub(crate) token: Option<&'a str>,
    pub(crate) token_file: Option<&'a Path>,
    pub(crate) state_dir: &'a Path,
}

impl Joining<'_> {
    /// The identity of an earlier join, or a new one. A node that has joined never needs the token again.
    pub(crate) async fn identity(&self) -> Result<Identity, JoinError> {
        let dir = self.state_dir.join("pki");
        if let Some(identity) = load(&dir, self.server) {
            return Ok(identity);
        }
        let server = self.server.ok_or(JoinError::NothingGiven)?;
        let token = self.read_token()?;
        let key = KeyPair::generate().map_err(JoinError::Request)?;
        let request = JoinRequest {
            secret: token.secret.clone(),
            node: self.node.clone(),
            csr_pem: signing_request(self.node, &key).map_err(JoinError::Request)?,
            addresses: self.addresses.to_vec(),
        };
        let asking = ask(server, &token, &request);
        let answer = match tokio::time::timeout(LIMIT, asking).await {
            Ok(answer) => answer?,
            Err(_) => return Err(JoinError::TimedOut { server: server.to_owned() }),
        };
        keep(&dir, server, &key, &answer)?;
        tracing::info!(node = %self.node, server, "joined");
        load(&dir, Some(server)).ok_or(JoinError::NothingGiven)
    }

    fn read_token(&self) -> Result<JoinToken, JoinError> {
        if let Some(token) = self.token {
            return Ok(token.parse()?);
        }
        let path = self.token_file.ok_or(JoinError::NothingGiven)?;
        let text = fs::read_to_string(path)
            .map_err(|source| JoinError::TokenFile { path: path.to_owned(), source })?;
        Ok(text.parse()?)
    }
}

fn signing_request(node: &NodeName, key: &KeyPair) -> Result<String, rcgen::Error> {
    CertificateParams::new(vec![node.to_string()])?.serialize_request(key)?.pem()
}

/// A complete earlier join; anything less is as if there were none.
fn load(dir: &Path, server: Option<&str>) -> Option<Identity> {
    let joined = fs::read(dir.join("joined.json")).ok()?;
    let joined: Joined = serde_json::from_slice(&joined).ok()?;
    let identity = Identity {
        certificate: dir.join("node.crt"),
        key: dir.join("node.key"),
        ca: dir.join("ca.crt"),
        server: server.map_or(joined.server, str::to_owned),
        cluster: joined.cluster,
    };
    let complete = identity.key.exists() && identity.ca.exists();
    (complete && is_valid(&fs::read(&identity.certificate).ok()?)).then_some(identity)
}

/// Whether the certificate has not run out. One that cannot be read is as good as none.
fn is_valid(pem: &[u8]) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem) else { return false };
    let parsed = x509_parser::parse_x509_certificate(&der);
    let valid = parsed.is_ok_and(|(_, certificate)| certificate.validity().is_valid());
    if !valid {
        tracing::warn!("the node's certificate has run out, joining again");
    }
    valid
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Joined {
    server: String,
    cluster: ClusterConfig,
}

/// Writes the parts, and last the file that makes them count.
fn keep(dir: &Path, server: &str, key: &KeyPair, answer: &JoinResponse) -> Result<(), JoinError> {
    fs::create_dir_all(dir).map_err(|source| JoinError::Keep { path: dir.to_owned(), source })?;
    let joined = Joined { server: server.to_owned(), cluster: answer.cluster.clone() };
    let joined = serde_json::to_string(&joined).expect("plain data becomes JSON");
    let parts = [
        ("node.key", key.serialize_pem()),
        ("node.crt", answer.certificate_pem.clone()),
        ("ca.crt", answer.ca_pem.clone()),
        ("joined.json", joined),
    ];
    for (name, content) in parts {
        let path = dir.join(name);
        write_private(&path, content.as_bytes())
            .map_err(|source| JoinError::Keep { path, source })?;
    }
    Ok(())
}

/// Writes a file that only root can read, whole or not at all, also across a power cut.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

async fn ask(
    server: &str,
    token: &JoinToken,
    request: &JoinRequest,
) -> Result<JoinResponse, JoinError> {
    let address: http::Uri = server.parse().map_err(|_| JoinError::Server(server.to_owned()))?;
    let (Some("https"), Some(host)) = (address.scheme_str(), address.host()) else {
        return Err(JoinError::Server(server.to_owned()));
    };
    let port = address.port_u16().unwrap_or(mesh_model::wellknown::API_PORT);
    let connect = |source| JoinError::Connect { server: server.to_owned(), source };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let tcp = TcpStream::connect((bare, port)).await.map_err(connect)?;
    let name = rustls_pki_types::ServerName::try_from(bare.to_owned())
        .map_err(|_| JoinError::Server(server.to_owned()))?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(PinnedCa::client_config(token)));
    let tls = connector.connect(name, tcp).await.map_err(connect)?;
    post(tls, server, host, request).await
}

async fn post<S>(
    stream: S,
    server: &str,
    host: &str,
    request: &JoinRequest,
) -> Result<JoinResponse, JoinError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| JoinError::Http {
        server: server.to_owned(),
        source,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(e.into()))?;
    tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(|e| failed(e.into()))?;
    let message = http::Request::post(JOIN_PATH)
        .header(http::header::HOST, host)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| failed(e.into()))?;
    let response = sender.send_request(message).await.map_err(|e| failed(e.into()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LARGEST_ANSWER_BYTES).collect().await;
    let body = body.map_err(failed)?.to_bytes();
    if !status.is_success() {
        let said = serde_json::from_slice::<serde_json::Value>(&body).ok();
        let message = said.and_then(|s| s["message"].as_str().map(str::to_owned));
        let message = message.unwrap_or_else(|| status.to_string());
        return Err(JoinError::Refused { server: server.to_owned(), message });
    }
    serde_json::from_slice(&body).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_join_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), None).is_none());
        let key = KeyPair::generate().unwrap();
        let certificate = |year| {
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            params.self_signed(&key).unwrap().pem()
        };
        let answer = JoinResponse {
            certificate_pem: certificate(4000),
            ca_pem: "a".into(),
            cluster: ClusterConfig::default(),
        };
        keep(dir.path(), "https://192.0.2.1:6443", &key, &answer).unwrap();
        let identity = load(dir.path(), None).unwrap();
        assert_eq!(identity.server, "https://192.0.2.1:6443");
        assert_eq!(load(dir.path(), Some("https://b")).unwrap().server, "https://b");
        fs::write(dir.path().join("node.crt"), certificate(2001)).unwrap();
        assert!(load(dir.path(), None).is_none(), "it has run out");
        fs::write(dir.path().join("node.crt"), certificate(4000)).unwrap();
        assert!(load(dir.path(), None).is_some());
        fs::remove_file(dir.path().join("node.key")).unwrap();
        assert!(load(dir.path(), None).is_none());
    }

    #[test]
    fn the_signing_request_holds_no_private_key() {
        let key = KeyPair::generate().unwrap();
        let csr = signing_request(&"node-1".parse().unwrap(), &key).unwrap();
        assert!(csr.contains("BEGIN CERTIFICATE REQUEST") && !csr.contains("PRIVATE"));
    }
}
