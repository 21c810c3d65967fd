//! People at the streams of a pod: a command in a container, its process's own streams, its ports.
//!
//! `/exec/{namespace}/{pod}/{container}`, `/attach/...` and `/portForward/{namespace}/{pod}`, with the parameters of the API.
//! The runtime does the work; it speaks SPDY only, in forms that every runtime has. Clients that speak SPDY are passed
//! through; what others say in WebSocket messages is turned into SPDY here.
//!
//! Never does: hold more of a stream than a message in each direction, or outlive the agent: sessions end with it.
//! Known gap, as in Kubernetes: a process that reads no input does not notice that its client is gone.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use hyper_util::rt::TokioIo;
use mesh_cri::{CallError, Client, v1};
use tokio::sync::Semaphore;

use super::observed::{LABEL_CONTAINER, PodRef};
use super::registry::{Found, Registry};

mod channel;
mod offer;
mod runtime;
mod session;
mod spdy;
mod tunnel;
mod websocket;

use channel::Channels;
use offer::{Offer, Purpose};
use runtime::RuntimeError;
use session::Wanted;

/// Sessions at the same time. Each holds a few buffers and four descriptors.
const SESSIONS: usize = 256;
/// How long the client's connection may take to become ours after the answer.
const UPGRADE_LIMIT: Duration = Duration::from_secs(10);
/// How long the rest of one direction may take when the other has ended.
const LINGER: Duration = Duration::from_secs(5);

type Parameters = Query<Vec<(String, String)>>;

/// Where containers are found, and who opens streams to them.
#[derive(Clone)]
pub(crate) struct Streams {
    registry: Arc<Registry>,
    client: Client,
    room: Arc<Semaphore>,
}

/// Why there is no stream, for people.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("pod \"{pod}\" in namespace \"{namespace}\" is not on this node")]
    NoPod { namespace: String, pod: String },
    #[error("container \"{container}\" is not valid for pod \"{pod}\"")]
    NoContainer { pod: String, container: String },
    #[error("container \"{container}\" of pod \"{pod}\" is not running")]
    NotRunning { pod: String, container: String },
    #[error("pod \"{0}\" is not running")]
    NoSandbox(String),
    #[error("{0}")]
    Request(String),
    #[error("{SESSIONS} sessions are open on this node; end one of them first")]
    Full,
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("{}", chain(.0))]
    Runtime(#[from] RuntimeError),
}

/// An error with its cause: the client sees nothing else of it.
fn chain(error: &RuntimeError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NoPod { .. } => StatusCode::NOT_FOUND,
            Self::NoContainer { .. } | Self::NotRunning { .. } => StatusCode::BAD_REQUEST,
            Self::NoSandbox(_) | Self::Request(_) => StatusCode::BAD_REQUEST,
            Self::Full => StatusCode::SERVICE_UNAVAILABLE,
            Self::Call(_) | Self::Runtime(_) => StatusCode::BAD_GATEWAY,
        };
        (status, self.to_string()).into_response()
    }
}

/// The routes, ready to be merged into a server's router.
pub(crate) fn router(registry: Arc<Registry>, client: Client) -> Router {
    Router::new()
        .route("/exec/{namespace}/{pod}/{container}", any(exec))
        .route("/attach/{namespace}/{pod}/{container}", any(attach))
        .route("/portForward/{namespace}/{pod}", any(port_forward))
        .with_state(Streams { registry, client, room: Arc::new(Semaphore::new(SESSIONS)) })
}

async fn exec(
    State(streams): State<Streams>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    Query(parameters): Parameters,
    request: Request,
) -> Result<Response, Refusal> {
    let wanted = wanted(&parameters)?;
    let offer = offer::read(request.headers(), Purpose::Process).map_err(Refusal::Request)?;
    let command = parameters.into_iter().filter(|(name, _)| name == "command");
    let cmd: Vec<String> = command.map(|(_, word)| word).collect();
    if cmd.is_empty() {
        return Err(Refusal::Request("you must specify a command".to_owned()));
    }
    let (container_id, _) = streams.running(&namespace, &pod, &container).await?;
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    let call = v1::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr };
    let url = streams.client.exec(call).await?;
    streams.serve(&url, offer, session::Streams::of_process(wanted), request).await
}

async fn attach(
    State(streams): State<Streams>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    Query(parameters): Parameters,
    request: Request,
) -> Result<Response, Refusal> {
    let wanted = wanted(&parameters)?;
    let offer = offer::read(request.headers(), Purpose::Process).map_err(Refusal::Request)?;
    let (container_id, has_terminal) = streams.running(&namespace, &pod, &container).await?;
    let wanted = attachable(wanted, has_terminal, &offer)?;
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    let call = v1::AttachRequest { container_id, stdin, tty, stdout, stderr };
    let url = streams.client.attach(call).await?;
    streams.serve(&url, offer, session::Streams::of_process(wanted), request).await
}

/// What there is to attach to: whether a container has a terminal was decided when it was made, whatever is asked for.
fn attachable(wanted: Wanted, has_terminal: bool, offer: &Offer) -> Result<Wanted, Refusal> {
    if wanted.tty == has_terminal {
        return Ok(wanted);
    }
    let refused = |message: &str| Err(Refusal::Request(message.to_owned()));
    match (offer, has_terminal) {
        // The streams are the client's to open.
        (Offer::Spdy(_), true) => refused("the container has a terminal: attach with tty=true"),
        (Offer::Spdy(_), false) => refused("the container has no terminal: attach with tty=false"),
        // Its one output is standard output.
        (_, true) if wanted.stdin || wanted.stdout => {
            Ok(Wanted { tty: true, stderr: false, ..wanted })
        }
        (_, true) => refused("the container has a terminal, and no standard error beside it"),
        (_, false) => Ok(Wanted { tty: false, ..wanted }),
    }
}

async fn port_forward(
    State(streams): State<Streams>,
    Path((namespace, pod)): Path<(String, String)>,
    Query(parameters): Parameters,
    request: Request,
) -> Result<Response, Refusal> {
    let offer = offer::read(request.headers(), Purpose::Ports).map_err(Refusal::Request)?;
    let ports = match offer {
        Offer::Channels(channels, _) => ports(&parameters, channels)?,
        // The client names them in its streams.
        Offer::Spdy(_) | Offer::Tunnel(_) => Vec::new(),
    };
    let sandbox = streams.sandbox(&namespace, &pod).await?;
    let url = streams.client.port_forward(&sandbox).await?;
    streams.serve(&url, offer, session::Streams::of_ports(&ports), request).await
}

/// The ports that a client names before it has streams: several parameters, or several numbers in one.
fn ports(parameters: &[(String, String)], channels: Channels) -> Result<Vec<u16>, Refusal> {
    let named = parameters.iter().filter(|(name, _)| name == "ports");
    let numbers = named.flat_map(|(_, value)| value.split(','));
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let ports: Option<Vec<u16>> = numbers.map(port).collect();
    let most = channels.pairs();
    match ports {
        Some(ports) if (1..=most).contains(&ports.len()) => Ok(ports),
        _ => {
            Err(Refusal::Request(format!("ports: 1 to {most} numbers from 1 to 65535 are needed")))
        }
    }
}

/// Which streams the parameters ask for.
fn wanted(parameters: &[(String, String)]) -> Result<Wanted, Refusal> {
    let flag = |name: &str| {
        let found = parameters.iter().find(|(n, _)| n == name);
        found.is_some_and(|(_, v)| matches!(v.as_str(), "true" | "1" | "True" | "TRUE"))
    };
    let tty = flag("tty");
    let (stdin, stdout) = (flag("stdin"), flag("stdout"));
    // A terminal has one output.
    let stderr = flag("stderr") && !tty;
    if stdin || stdout || stderr {
        return Ok(Wanted { stdin, stdout, stderr, tty });
    }
    let message = "you must specify at least one of stdin, stdout, stderr";
    Err(Refusal::Request(message.to_owned()))
}

impl Streams {
    fn find(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Result<(PodRef, Found), Refusal> {
        let found = self.registry.find(namespace, pod, container);
        found.ok_or_else(|| Refusal::NoPod { namespace: namespace.to_owned(), pod: pod.to_owned() })
    }

    /// The runtime's name for a container that runs, and whether it has a terminal.
    async fn running(
        &self,
        namespace: &str,
        pod: &str,
        name: &str,
    ) -> Result<(String, bool), Refusal> {
        let (identity, found) = self.find(namespace, pod, name)?;
        let (pod, container) = (pod.to_owned(), name.to_owned());
        if found == Found::NoContainer {
            return Err(Refusal::NoContainer { pod, container });
        }
        // The runtime knows better than what was last observed: a container may have been started again since.
        let mut labels = identity.labels();
        labels.insert(LABEL_CONTAINER.to_owned(), name.to_owned());
        let all = self.client.list_containers(labels).await?;
        let running = all.into_iter().filter(|c| c.state() == v1::ContainerState::Running);
        let newest = running.max_by_key(|c| c.created_at);
        let id = newest.map(|c| c.id).ok_or(Refusal::NotRunning { pod, container })?;
        Ok((id, self.registry.has_terminal(&identity, name)))
    }

    /// The sandbox of a pod.
    async fn sandbox(&self, namespace: &str, pod: &str) -> Result<String, Refusal> {
        let (identity, _) = self.find(namespace, pod, "")?;
        let all = self.client.list_sandboxes(identity.labels()).await?;
        let ready = all.into_iter().filter(|s| s.state() == v1::PodSandboxState::Ready);
        let newest = ready.max_by_key(|s| s.created_at);
        newest.map(|s| s.id).ok_or_else(|| Refusal::NoSandbox(pod.to_owned()))
    }

    /// Connects to the runtime, and the client with it once it has read the answer.
    async fn serve(
        &self,
        url: &str,
        offer: Offer,
        wanted: session::Streams,
        mut request: Request,
    ) -> Result<Response, Refusal> {
        let permit = Arc::clone(&self.room).try_acquire_owned().map_err(|_| Refusal::Full)?;
        let protocols = match &offer {
            Offer::Spdy(offered) => offered.clone(),
            Offer::Channels(..) | Offer::Tunnel(_) => vec![wanted.protocol()],
        };
        let (headers, runtime) = runtime::connect(url, &protocols).await?;
        let answer = offer::agree(&offer, &headers);
        let upgrade = hyper::upgrade::on(&mut request);
        let path = request.uri().path().to_owned();
        tokio::spawn(async move {
            let client = match tokio::time::timeout(UPGRADE_LIMIT, upgrade).await {
                Ok(Ok(client)) => TokioIo::new(client),
                Ok(Err(error)) => return tracing::debug!(%error, path, "a client did not upgrade"),
                Err(_) => return tracing::debug!(path, "a client did not upgrade in time"),
            };
            match offer {
                Offer::Spdy(_) => mesh_splice::splice(client, runtime, LINGER).await,
                Offer::Channels(channels, _) => {
                    let ending = session::run(client, runtime, channels, &wanted).await;
                    tracing::debug!(?ending, path, "session ended");
                }
                Offer::Tunnel(_) => {
                    let ending = tunnel::run(client, runtime).await;
                    tracing::debug!(?ending, path, "session ended");
                }
            }
            drop(permit);
        });
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<Wanted, String> {
        let uri: axum::http::Uri = format!("/x?{query}").parse().unwrap();
        let Query(parameters) = Parameters::try_from_uri(&uri).unwrap();
        wanted(&parameters).map_err(|e| e.to_string())
    }

    #[test]
    fn parameters_are_those_of_the_api() {
        let plain = Wanted { stdin: false, stdout: true, stderr: true, tty: false };
        assert_eq!(asked("command=a&stdout=true&stderr=true&stdin=false"), Ok(plain));
        let terminal = Wanted { stdin: true, stdout: true, stderr: false, tty: true };
        assert_eq!(asked("stdin=true&stdout=1&stderr=true&tty=true"), Ok(terminal));
        assert!(asked("tty=true&stderr=true").unwrap_err().contains("at least one"));
    }

    #[test]
    fn whether_there_is_a_terminal_to_attach_to_is_for_the_container_to_say() {
        let attach = |wanted: &str, has_terminal, offer: &Offer| {
            attachable(asked(wanted).unwrap(), has_terminal, offer).map_err(|e| e.to_string())
        };
        let (channels, spdy) = (offer::channels(), Offer::Spdy(vec![]));
        let terminal = Ok(Wanted { stdin: true, stdout: true, stderr: false, tty: true });
        let all = "stdin=true&stdout=true&stderr=true";
        assert_eq!(attach(all, true, &channels), terminal);
        assert_eq!(attach(&format!("{all}&tty=true"), true, &spdy), terminal);
        assert!(attach(all, true, &spdy).unwrap_err().contains("tty=true"));
        assert!(attach("stderr=true", true, &channels).unwrap_err().contains("no standard error"));
        let plain = Ok(Wanted { stdin: false, stdout: true, stderr: false, tty: false });
        assert_eq!(attach("stdout=true&tty=true", false, &channels), plain);
        assert!(attach("stdout=true&tty=true", false, &spdy).unwrap_err().contains("tty=false"));
    }

    #[test]
    fn ports_are_named_before_there_are_channels() {
        let named = |query: &str, channels| {
            let uri: axum::http::Uri = format!("/x?{query}").parse().unwrap();
            let Query(parameters) = Parameters::try_from_uri(&uri).unwrap();
            ports(&parameters, channels).map_err(|e| e.to_string())
        };
        assert_eq!(named("ports=80&ports=8080,443", Channels::V4), Ok(vec![80, 8080, 443]));
        for wrong in ["", "ports=", "ports=0", "ports=70000", "ports=80,,81", "ports=http"] {
            assert!(named(wrong, Channels::V4).is_err(), "{wrong}");
        }
        let many = |count: usize| format!("ports={}", vec!["1"; count].join(","));
        assert!(
            named(&many(127), Channels::V4).is_ok() && named(&many(128), Channels::V4).is_err()
        );
        let base64 = named(&many(6), Channels::V4Base64).unwrap_err();
        assert_eq!(base64, "ports: 1 to 5 numbers from 1 to 65535 are needed");
    }
}
