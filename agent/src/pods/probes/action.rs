//! One question to a container: by HTTP, TCP, gRPC or a command. Probes and lifecycle hooks ask alike.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Container, ExecAction, HTTPGetAction, LifecycleHandler, Probe, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_cri::{Client, Fault};
use tokio::net::TcpStream;

use super::{grpc, http};

/// Output of a failed command that is kept for its message.
const MAX_OUTPUT: usize = 1024;

/// What to do, with every name resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Exec(Vec<String>),
    Http(http::Request),
    Tcp { host: String, port: u16 },
    Grpc { address: SocketAddr, service: String },
    Sleep(Duration),
}

/// Why an action was no success, for people: it ends up in events and messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// The container's answer, or that it had none.
    #[error("{0}")]
    Failed(String),
    /// The runtime is away, and the container was not asked.
    #[error("{0}")]
    NotAsked(String),
}

impl Action {
    /// The action of a probe; the error says why there is none.
    pub(crate) fn of_probe(
        probe: &Probe,
        container: &Container,
        address: Option<IpAddr>,
    ) -> Result<Self, String> {
        if let Some(exec) = &probe.exec {
            Ok(Self::exec(exec))
        } else if let Some(get) = &probe.http_get {
            Self::http(get, container, address, false)
        } else if let Some(tcp) = &probe.tcp_socket {
            Self::tcp(tcp, container, address)
        } else if let Some(grpc) = &probe.grpc {
            let port = u16::try_from(grpc.port).map_err(|_| "port out of range".to_owned())?;
            let address = SocketAddr::new(address.ok_or_else(no_address)?, port);
            Ok(Self::Grpc { address, service: grpc.service.clone().unwrap_or_default() })
        } else {
            Err("the probe has no handler".to_owned())
        }
    }

    /// The action of a lifecycle hook.
    pub(crate) fn of_hook(
        hook: &LifecycleHandler,
        container: &Container,
        address: Option<IpAddr>,
    ) -> Result<Self, String> {
        if let Some(exec) = &hook.exec {
            Ok(Self::exec(exec))
        } else if let Some(get) = &hook.http_get {
            Self::http(get, container, address, true)
        } else if let Some(sleep) = &hook.sleep {
            Ok(Self::Sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))))
        } else if let Some(tcp) = &hook.tcp_socket {
            Self::tcp(tcp, container, address)
        } else {
            Err("the hook has no handler".to_owned())
        }
    }

    fn exec(exec: &ExecAction) -> Self {
        Self::Exec(exec.command.clone().unwrap_or_default())
    }

    fn http(
        get: &HTTPGetAction,
        container: &Container,
        address: Option<IpAddr>,
        any_status: bool,
    ) -> Result<Self, String> {
        let port = port(&get.port, container)?;
        let headers = get.http_headers.iter().flatten();
        Ok(Self::Http(http::Request {
            host: host(get.host.as_deref(), address)?,
            port,
            path: get.path.clone().unwrap_or_default(),
            tls: get.scheme.as_deref() == Some("HTTPS"),
            headers: headers.map(|h| (h.name.clone(), h.value.clone())).collect(),
            any_status,
        }))
    }

    fn tcp(
        tcp: &TCPSocketAction,
        container: &Container,
        address: Option<IpAddr>,
    ) -> Result<Self, String> {
        let port = port(&tcp.port, container)?;
        Ok(Self::Tcp { host: host(tcp.host.as_deref(), address)?, port })
    }

    /// Asks. A good answer may come with a warning for people.
    pub(crate) async fn run(
        &self,
        client: &Client,
        run: &str,
        limit: Duration,
    ) -> Result<Option<String>, Trouble> {
        if let Self::Exec(command) = self {
            return exec(client, run, command.clone(), limit).await.map(|()| None);
        }
        let question = async {
            match self {
                Self::Http(request) => http::get(request).await,
                Self::Tcp { host, port } => connect(host, *port).await.map(|_| None),
                Self::Grpc { address, service } => {
                    grpc::check(*address, service).await.map(|()| None)
                }
                Self::Sleep(time) => {
                    tokio::time::sleep(*time).await;
                    Ok(None)
                }
                Self::Exec(_) => Ok(None),
            }
        };
        tokio::time::timeout(limit, question)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs())))
            .map_err(Trouble::Failed)
    }
}

fn no_address() -> String {
    "the pod has no address".to_owned()
}

fn host(given: Option<&str>, address: Option<IpAddr>) -> Result<String, String> {
    match given.filter(|h| !h.is_empty()) {
        Some(host) => Ok(host.to_owned()),
        None => address.map(|a| a.to_string()).ok_or_else(no_address),
    }
}

/// A number, or the name of a port of the container.
fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let ports = container.ports.iter().flatten();
            let named = ports.clone().find(|p| p.name.as_deref() == Some(name));
            match named {
                Some(port) => port.container_port,
                None => {
                    name.parse().map_err(|_| format!("the container has no port named {name:?}"))?
                }
            }
        }
    };
    u16::try_from(number).ok().filter(|p| *p > 0).ok_or(format!("port {number} is out of range"))
}

/// A TCP connection; IPv6 hosts may be in brackets.
pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    TcpStream::connect((host, port)).await.map_err(|e| format!("dial tcp {host}:{port}: {e}"))
}

async fn exec(
    client: &Client,
    run: &str,
    command: Vec<String>,
    limit: Duration,
) -> Result<(), Trouble> {
    match client.exec_sync(run, command, limit).await {
        Ok(answer) if answer.exit_code == 0 => Ok(()),
        Ok(answer) => {
            let mut output = answer.stdout;
            output.extend_from_slice(&answer.stderr);
            output.truncate(MAX_OUTPUT);
            let output = String::from_utf8_lossy(&output);
            let why = format!("command exited with {}: {}", answer.exit_code, output.trim_end());
            Err(Trouble::Failed(why))
        }
        Err(error) if error.fault == Fault::TimedOut => {
            Err(Trouble::Failed(format!("command did not end within {} s", limit.as_secs())))
        }
        Err(error) => {
            // A runtime that is away says nothing about the container, and one that has just been started refuses everything.
            let is_away = client.container_status(run).await.is_err();
            let why = error.to_string();
            Err(if is_away { Trouble::NotAsked(why) } else { Trouble::Failed(why) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_by_name() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "c", "ports": [{"name": "web", "containerPort": 8080}]}))
        .unwrap();
        let named = |text: &str| port(&IntOrString::String(text.to_owned()), &container);
        assert_eq!(named("web"), Ok(8080));
        assert_eq!(named("81"), Ok(81));
        assert!(named("nope").is_err());
        assert_eq!(port(&IntOrString::Int(80), &container), Ok(80));
        assert!(port(&IntOrString::Int(0), &container).is_err());
        assert!(port(&IntOrString::Int(70_000), &container).is_err());
    }

    #[test]
    fn probes_are_resolved() {
        let container = Container::default();
        let action = |probe: serde_json::Value| {
            let probe = serde_json::from_value(probe).unwrap();
            Action::of_probe(&probe, &container, Some("10.244.1.5".parse().unwrap()))
        };
        assert_eq!(
            action(serde_json::json!({"tcpSocket": {"port": 80}})),
            Ok(Action::Tcp { host: "10.244.1.5".to_owned(), port: 80 })
        );
        assert_eq!(
            action(serde_json::json!({"exec": {"command": ["true"]}})),
            Ok(Action::Exec(vec!["true".to_owned()]))
        );
        assert!(action(serde_json::json!({})).is_err());
        let get = serde_json::json!({"httpGet": {"port": 80}});
        let any_status = |action| match action {
            Ok(Action::Http(request)) => request.any_status,
            other => panic!("{other:?}"),
        };
        assert!(!any_status(action(get.clone())));
        let hook = serde_json::from_value(get).unwrap();
        let address = Some("10.244.1.5".parse().unwrap());
        assert!(any_status(Action::of_hook(&hook, &container, address)), "it only tells");
    }
}
