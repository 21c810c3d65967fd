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
use mesh_model::certificate::Validity;
use mesh_model::join::{InvalidToken, JOIN_PATH, JoinRequest, JoinResponse, JoinToken};
use mesh_model::{ClusterConfig, NodeName};
use rcgen::{CertificateParams, KeyPair};
use tokio::net::TcpStream;
use tokio::sync::watch;

mod pinned;

use crate::credential::{Credential, CredentialError, NotKept};
use pinned::PinnedCa;

const LIMIT: Duration = Duration::from_secs(10);
const LARGEST_ANSWER_BYTES: usize = 1 << 20;

/// Who this node is, and whom it believes.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// The certificate and its key, as they are now. Whoever uses them hears of the next ones.
    pub(crate) credential: watch::Sender<Arc<Credential>>,
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
    #[error("no join token: print one with `meshctl token`, give it by --token or --token-file")]
    NoToken,
    #[error("the node's certificate is good from {from} to {until} only: it has to join again")]
    RunOut {
        from: String,
        until: String,
        #[source]
        source: Box<JoinError>,
    },
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
    #[error("use the certificate that {server} sent")]
    Certificate {
        server: String,
        #[source]
        source: CredentialError,
    },
    #[error(transparent)]
    Keep(#[from] NotKept),
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
    /// The identity of an earlier join, or a new one. A node needs the token again only when its certificate has run out; without
    /// one it goes on as it can without the control service.
    pub(crate) async fn identity(&self) -> Result<Identity, JoinError> {
        match load(&self.folder(), self.server) {
            Some(identity) if identity.validity().holds(now()) => return Ok(identity),
            Some(identity) => {
                if let Err(error) = self.again(&identity).await {
                    tracing::warn!(error = crate::errors::chain(&error), "going on as it can");
                    return Ok(identity);
                }
            }
            None => drop(self.join(self.server.ok_or(JoinError::NothingGiven)?).await?),
        }
        // The CA may be another one, too.
        load(&self.folder(), self.server).ok_or(JoinError::NothingGiven)
    }

    /// The identity of an earlier join, while it is good.
    pub(crate) fn known(&self) -> Option<Identity> {
        load(&self.folder(), self.server).filter(|identity| identity.validity().holds(now()))
    }

    /// Joins where the node had joined before: its certificate has run out.
    pub(crate) async fn again(&self, identity: &Identity) -> Result<(), JoinError> {
        let Validity { from, until } = identity.validity();
        let joined = self.join(&identity.server).await.map_err(|error| JoinError::RunOut {
            from: date(from),
            until: date(until),
            source: Box::new(error),
        })?;
        identity.credential.send_replace(Arc::new(joined));
        Ok(())
    }

    /// Where all that comes of joining is kept.
    pub(crate) fn folder(&self) -> PathBuf {
        self.state_dir.join("pki")
    }

    async fn join(&self, server: &str) -> Result<Credential, JoinError> {
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
        let credential = Credential::new(key.serialize_pem(), answer.certificate_pem.clone())
            .map_err(|source| JoinError::Certificate { server: server.to_owned(), source })?;
        keep(&self.folder(), server, &credential, &answer)?;
        tracing::info!(node = %self.node, server, "joined");
        Ok(credential)
    }

    fn read_token(&self) -> Result<JoinToken, JoinError> {
        if let Some(token) = self.token {
            return Ok(token.parse()?);
        }
        let path = self.token_file.ok_or(JoinError::NoToken)?;
        let text = fs::read_to_string(path)
            .map_err(|source| JoinError::TokenFile { path: path.to_owned(), source })?;
        Ok(text.parse()?)
    }
}

impl Identity {
    /// When the certificate that is in use is good.
    pub(crate) fn validity(&self) -> Validity {
        self.credential.borrow().validity
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// A second since 1970, as people write it.
pub(crate) fn date(second: i64) -> String {
    jiff::Timestamp::from_second(second).map_or_else(|_| second.to_string(), |at| at.to_string())
}

pub(crate) fn signing_request(node: &NodeName, key: &KeyPair) -> Result<String, rcgen::Error> {
    CertificateParams::new(vec![node.to_string()])?.serialize_request(key)?.pem()
}

/// A complete earlier join; anything less is as if there were none.
fn load(folder: &Path, server: Option<&str>) -> Option<Identity> {
    let joined = fs::read(folder.join("joined.json")).ok()?;
    let joined: Joined = serde_json::from_slice(&joined).ok()?;
    let ca = folder.join("ca.crt");
    let credential = Credential::load(folder).filter(|_| ca.exists())?;
    Some(Identity {
        credential: watch::Sender::new(Arc::new(credential)),
        ca,
        server: server.map_or(joined.server, str::to_owned),
        cluster: joined.cluster,
    })
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Joined {
    server: String,
    cluster: ClusterConfig,
}

/// Writes the parts, and last the file that makes them count. Where there is one from before, the certificate has run out: half of a
/// join leaves it so.
fn keep(
    folder: &Path,
    server: &str,
    credential: &Credential,
    answer: &JoinResponse,
) -> Result<(), NotKept> {
    let not_kept = |path: &Path, source| NotKept { path: path.to_owned(), source };
    fs::create_dir_all(folder).map_err(|source| not_kept(folder, source))?;
    let write = |name: &str, content: &str| {
        let path = folder.join(name);
        write_private(&path, content.as_bytes()).map_err(|source| not_kept(&path, source))
    };
    let joined = Joined { server: server.to_owned(), cluster: answer.cluster.clone() };
    let joined = serde_json::to_string(&joined).expect("plain data becomes JSON");
    write("ca.crt", &answer.ca_pem)?;
    credential.keep(folder)?;
    write("joined.json", &joined)
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

    /// What comes of a join whose certificate ends with that year.
    fn joined(folder: &Path, year: i32) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 12, 31);
        let certificate_pem = params.self_signed(&key).unwrap().pem();
        let credential = Credential::new(key.serialize_pem(), certificate_pem.clone()).unwrap();
        let cluster = ClusterConfig::default();
        let answer = JoinResponse { certificate_pem, ca_pem: "a".into(), cluster };
        keep(folder, "https://192.0.2.1:6443", &credential, &answer).unwrap();
    }

    #[test]
    fn half_a_join_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), None).is_none());
        joined(dir.path(), 4000);
        let identity = load(dir.path(), None).unwrap();
        assert_eq!(identity.server, "https://192.0.2.1:6443");
        assert_eq!(load(dir.path(), Some("https://b")).unwrap().server, "https://b");
        for part in ["node.pem", "ca.crt", "joined.json"] {
            let path = dir.path().join(part);
            let content = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            assert!(load(dir.path(), None).is_none(), "{part}");
            fs::write(path, content).unwrap();
        }
        assert!(load(dir.path(), None).is_some());
    }

    #[tokio::test]
    async fn a_node_whose_certificate_has_run_out_says_what_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let node = "n".parse().unwrap();
        let joining = Joining {
            node: &node,
            addresses: &[],
            server: None,
            token: None,
            token_file: None,
            state_dir: dir.path(),
        };
        assert!(matches!(joining.identity().await, Err(JoinError::NothingGiven)));
        joined(&joining.folder(), 2001);
        let identity = joining.identity().await.unwrap();
        assert!(
            !identity.validity().holds(now()),
            "it is a member, and the API lets it in no more"
        );
        let text = crate::errors::chain(&joining.again(&identity).await.unwrap_err());
        for part in ["2001-12-31", "join again", "`meshctl token`", "--token-file"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn the_signing_request_holds_no_private_key() {
        let key = KeyPair::generate().unwrap();
        let csr = signing_request(&"node-1".parse().unwrap(), &key).unwrap();
        assert!(csr.contains("BEGIN CERTIFICATE REQUEST") && !csr.contains("PRIVATE"));
    }
}
