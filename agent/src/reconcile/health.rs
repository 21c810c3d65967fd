//! `healthCheckNodePort`: tells load balancers outside whether this node has backends of a service
//! (Kubernetes, "Preserving the client source IP").

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Json, Router};
use mesh_model::snapshot::HealthCheck;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Concern, Failures};
use crate::listen::listen;
use crate::observe::Desired;

/// By how much load balancers that understand it may prefer this node, as kube-proxy says it.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// Keeps a listener on each port.
#[derive(Default)]
pub(crate) struct HealthChecks {
    listeners: BTreeMap<u16, Listener>,
}

/// An open port. It closes when this is dropped.
struct Listener {
    check: watch::Sender<HealthCheck>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Concern for HealthChecks {
    const NAME: &'static str = "health-checks";
    type Slice = Vec<HealthCheck>;

    fn slice(&self, desired: &Desired) -> Option<Vec<HealthCheck>> {
        Some(desired.snapshot.edge.health_checks.clone())
    }

    async fn apply(&mut self, slice: &Vec<HealthCheck>, _heal: bool) -> Result<(), Failures> {
        self.listeners.retain(|port, _| slice.iter().any(|check| check.port == *port));
        let mut failures = Failures::new();
        for check in slice {
            match self.listeners.get(&check.port) {
                Some(listener) => drop(listener.check.send_replace(check.clone())),
                None => match Listener::open(check.clone()) {
                    Ok(listener) => drop(self.listeners.insert(check.port, listener)),
                    Err(error) => failures.push(format!(
                        "healthCheckNodePort {} of {}: {error}",
                        check.port, check.service
                    )),
                },
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }
}

impl Listener {
    fn open(check: HealthCheck) -> std::io::Result<Self> {
        let socket = listen(check.port)?;
        let (check, state) = watch::channel(check);
        let router = Router::new().fallback(answer).with_state(state);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(socket, router).await {
                tracing::warn!(%error, "health check port ended");
            }
        });
        Ok(Self { check, task })
    }
}

type Answer = (StatusCode, [(&'static str, String); 1], Json<Value>);

async fn answer(State(check): State<watch::Receiver<HealthCheck>>) -> Answer {
    let check = check.borrow();
    let status = match check.local_endpoints {
        0 => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    let service = json!({"namespace": check.service.namespace, "name": check.service.name});
    let body = json!({
        "service": service,
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": true,
    });
    (status, [(WEIGHT, check.local_endpoints.to_string())], Json(body))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(address: &str, port: u16) -> std::io::Result<String> {
        let mut stream = TcpStream::connect((address, port)).await?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test]
    async fn a_port_tells_whether_the_node_has_backends_and_closes_with_its_service() {
        let free = std::net::TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
        let check = |local_endpoints| HealthCheck {
            port: free,
            service: mesh_model::ObjectKey::new("default", "web"),
            local_endpoints,
        };
        let mut checks = HealthChecks::default();
        for (endpoints, status) in [(2, "200 OK"), (0, "503 Service Unavailable"), (1, "200 OK")] {
            checks.apply(&vec![check(endpoints)], false).await.unwrap();
            for address in ["127.0.0.1", "::1"] {
                let text = get(address, free).await.unwrap();
                assert!(text.contains(status), "{text}");
                assert!(text.contains(&format!("\"localEndpoints\":{endpoints}")), "{text}");
                assert!(text.contains(&format!("{WEIGHT}: {endpoints}\r\n")), "{text}");
                assert!(
                    text.contains(r#""service":{"name":"web","namespace":"default"}"#),
                    "{text}"
                );
            }
        }
        checks.apply(&vec![], false).await.unwrap();
        tokio::task::yield_now().await;
        assert!(get("127.0.0.1", free).await.is_err());
        let _taken = std::net::TcpListener::bind(("::", free)).unwrap();
        let failures = checks.apply(&vec![check(1)], false).await.unwrap_err();
        assert!(failures[0].contains("default/web"), "{failures:?}");
    }
}
