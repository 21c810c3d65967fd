//! What the node tells about itself: one router, on the admin socket for root and over TLS for the control service.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use mesh_kernel::Programs;
use mesh_kernel::edge::EnterError;
use mesh_model::encryption::{
    FINISH_PATH, Findings, Finish, SEND_PATH, Sending, Sent, WATCH_PATH, Watch, Watching,
};
use mesh_model::flow::{FLOWS_PATH, FlowQuery};
use mesh_model::report::{CheckStep, KeysReport, NodeReport, PeerReport, RoutesReport};
use mesh_model::snapshot::Frontend;
use mesh_model::trace::{
    COLLECT_PATH, MARK_PATH, NodeTrace, OUTSIDE_PATH, OutsideQuery, OutsideReport, TRACE_PATH,
    TraceCollect, TraceMark, TraceQuery, TraceReport,
};
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::Overlay;
use mesh_worker::Client;
use tokio::sync::watch;
use tower::ServiceExt as _;

use crate::board::Board;
use crate::check;
use crate::encryption::{CheckError, Checks};
use crate::errors::chain;
use crate::flows::Flows;
use crate::observe::Desired;
use crate::paths::Seen;
use crate::paths::outlook::Outlook;
use crate::rotation::Rotation;
use crate::trace::{self, MarkError, Marks, OutsideError, ProbeError};

mod metrics;
mod peers;
pub(crate) mod tls;

/// What the router reads; nothing here changes anything.
#[derive(Clone)]
pub(crate) struct Reports(Arc<Sources>);

/// Where the reports come from.
pub(crate) struct Sources {
    pub(crate) node: NodeName,
    pub(crate) desired: watch::Receiver<Option<Desired>>,
    pub(crate) overlay: Arc<Overlay>,
    /// The paths to the other nodes.
    pub(crate) seen: watch::Receiver<Seen>,
    pub(crate) board: Board,
    /// Present when they are loaded.
    pub(crate) programs: Arc<OnceLock<Arc<Programs>>>,
    /// The pods' logs and streams; present when this agent runs pods.
    pub(crate) pods: Arc<OnceLock<Router>>,
    pub(crate) dns: Client,
    pub(crate) ingress: Client,
    /// The proxy's own listeners, by addresses that can be connected to.
    pub(crate) ingress_listeners: Vec<SocketAddr>,
    /// The replacement of the node's key.
    pub(crate) rotation: Rotation,
    /// Connections and drops.
    pub(crate) flows: Flows,
    /// Checks of encryption that run.
    pub(crate) checks: Arc<Checks>,
    /// Probes that are traced.
    pub(crate) marks: Marks,
}

/// The routes of the agent.
pub(crate) fn router(sources: Sources) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics::text))
        .route("/mesh/v1/status", get(status))
        .route("/mesh/v1/peers", get(all_peers))
        .route("/mesh/v1/services", get(services))
        .route("/mesh/v1/routes", get(routes))
        .route("/mesh/v1/check", get(check_all).post(check_all))
        .route("/mesh/v1/rotate-key", post(rotate_key))
        .route(FLOWS_PATH, post(flows))
        .route(TRACE_PATH, post(trace_probe))
        .route(MARK_PATH, post(trace_mark))
        .route(COLLECT_PATH, post(trace_collect))
        .route(OUTSIDE_PATH, post(trace_outside))
        .route(WATCH_PATH, post(watch_encryption))
        .route(SEND_PATH, post(send_canaries))
        .route(FINISH_PATH, post(finish_encryption))
        .fallback(pods)
        .with_state(Reports(Arc::new(sources)))
}

/// Everything else may be a question for the pods, once they run.
async fn pods(State(reports): State<Reports>, request: Request) -> Response {
    match reports.0.pods.get() {
        Some(pods) => match pods.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
        None => (StatusCode::NOT_FOUND, "no such path\n").into_response(),
    }
}

/// Nothing is known yet: neither from the API nor from an earlier run.
struct NothingKnown;

impl IntoResponse for NothingKnown {
    fn into_response(self) -> Response {
        let message = "the agent has not reached the API yet and has no saved snapshot\n";
        (StatusCode::SERVICE_UNAVAILABLE, message).into_response()
    }
}

impl Reports {
    fn outlook(&self) -> Arc<Outlook> {
        let desired = self.0.desired.borrow();
        desired.as_ref().map(|desired| Arc::clone(&desired.outlook)).unwrap_or_default()
    }

    /// As they are programmed: without backends on nodes that are away.
    fn frontends(&self) -> Result<Vec<Frontend>, NothingKnown> {
        let snapshot = self.snapshot()?;
        let frontends = self.outlook().frontends(&snapshot);
        Ok(frontends.into_iter().map(std::borrow::Cow::into_owned).collect())
    }

    async fn peers(&self, snapshot: &Snapshot) -> Vec<PeerReport> {
        let seen = self.0.seen.borrow().clone();
        let mut peers = peers::report(&self.0.overlay, snapshot, &seen).await;
        for peer in &mut peers {
            // With the kernel's device, the agents know.
            peer.knows_next_key |= self.0.rotation.proofs().knows(&peer.public_key);
        }
        peers
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>, NothingKnown> {
        let desired = self.0.desired.borrow();
        desired.as_ref().map(|desired| Arc::clone(&desired.snapshot)).ok_or(NothingKnown)
    }
}

async fn status(State(reports): State<Reports>) -> Json<NodeReport> {
    let sources = &reports.0;
    let (synced, pods) = {
        let desired = sources.desired.borrow();
        desired.as_ref().map_or((false, 0), |d| (d.synced, d.snapshot.pods.len()))
    };
    Json(NodeReport {
        node: sources.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        synced,
        overlay: sources.overlay.kind().to_string(),
        failures: sources.board.failures(),
        pods,
        keys: sources.rotation.report(),
    })
}

async fn all_peers(State(reports): State<Reports>) -> Result<Json<Vec<PeerReport>>, NothingKnown> {
    let snapshot = reports.snapshot()?;
    Ok(Json(reports.peers(&snapshot).await))
}

async fn services(State(reports): State<Reports>) -> Result<Json<Vec<Frontend>>, NothingKnown> {
    Ok(Json(reports.frontends()?))
}

async fn routes(State(reports): State<Reports>) -> Result<Json<RoutesReport>, NothingKnown> {
    let snapshot = reports.snapshot()?;
    Ok(Json(RoutesReport {
        ingress: reports.outlook().l7(&snapshot).routes,
        services: reports.frontends()?,
        overlay: reports.peers(&snapshot).await,
    }))
}

async fn check_all(State(reports): State<Reports>) -> Result<Json<Vec<CheckStep>>, NothingKnown> {
    let snapshot = reports.snapshot()?;
    let mut steps = concerns(&reports.0);
    steps.extend(check::run(&snapshot, &reports.0.ingress_listeners).await);
    Ok(Json(steps))
}

impl IntoResponse for CheckError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Length(_) | Self::TooMany(_) => StatusCode::BAD_REQUEST,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Unknown => StatusCode::NOT_FOUND,
            Self::Links(_) | Self::Capture { .. } | Self::Sockets { .. } | Self::Thread(_) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        (status, format!("{}\n", chain(&self))).into_response()
    }
}

async fn rotate_key(State(reports): State<Reports>) -> Json<KeysReport> {
    reports.0.rotation.ask();
    Json(reports.0.rotation.report())
}

async fn flows(State(reports): State<Reports>, Json(query): Json<FlowQuery>) -> Response {
    reports.0.flows.answer(query)
}

async fn trace_probe(
    State(reports): State<Reports>,
    Json(query): Json<TraceQuery>,
) -> Result<Json<TraceReport>, Response> {
    let snapshot = reports.snapshot().map_err(IntoResponse::into_response)?;
    let (programs, failures) = (reports.0.programs.get().cloned(), reports.0.board.failures());
    let report = trace::run(query, &snapshot, programs, failures, &reports.0.marks).await;
    report.map(Json).map_err(|error| {
        let status = match &error {
            ProbeError::Wait => StatusCode::BAD_REQUEST,
            ProbeError::NoPod(_) => StatusCode::NOT_FOUND,
            ProbeError::NoPrograms | ProbeError::NoNamespace(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, format!("{error}\n")).into_response()
    })
}

async fn trace_outside(
    State(reports): State<Reports>,
    Json(query): Json<OutsideQuery>,
) -> Result<Json<OutsideReport>, Response> {
    let snapshot = reports.snapshot().map_err(IntoResponse::into_response)?;
    let programs = reports.0.programs.get().cloned();
    let report = trace::from_outside(query, &snapshot, programs).await;
    report.map(Json).map_err(|error| {
        let status = match &error {
            OutsideError::Enter(EnterError::Families(..)) => StatusCode::BAD_REQUEST,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, format!("{}\n", chain(&error))).into_response()
    })
}

async fn trace_mark(
    State(reports): State<Reports>,
    Json(mark): Json<TraceMark>,
) -> Result<Json<()>, MarkError> {
    let programs = reports.0.programs.get().ok_or(MarkError::NoPrograms)?;
    reports.0.marks.begin(programs, mark, reports.0.flows.follow()).map(Json)
}

async fn trace_collect(
    State(reports): State<Reports>,
    Json(asked): Json<TraceCollect>,
) -> Result<Json<NodeTrace>, NothingKnown> {
    let snapshot = reports.snapshot()?;
    // A worker that stands still must not keep the rest from being told.
    let peers = tokio::time::timeout(trace::ANSWER, reports.peers(&snapshot)).await;
    let peers = peers.unwrap_or_default();
    let sources = trace::Sources {
        snapshot: &snapshot,
        peers: &peers,
        flows: &reports.0.flows,
        programs: reports.0.programs.get().cloned(),
        failures: reports.0.board.failures(),
        dns: &reports.0.dns,
        overlay: &reports.0.overlay,
    };
    Ok(Json(trace::collect(&reports.0.marks, asked, sources).await))
}

impl IntoResponse for MarkError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Ends => StatusCode::BAD_REQUEST,
            Self::TooMany => StatusCode::TOO_MANY_REQUESTS,
            Self::NoPrograms => StatusCode::SERVICE_UNAVAILABLE,
            Self::Programs(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, format!("{}\n", chain(&self))).into_response()
    }
}

async fn watch_encryption(
    State(reports): State<Reports>,
    Json(asked): Json<Watch>,
) -> Result<Json<Watching>, Response> {
    let snapshot = reports.snapshot().map_err(IntoResponse::into_response)?;
    let programs = reports.0.programs.get().cloned();
    let watching = reports.0.checks.watch(&asked, &snapshot, programs).await;
    watching.map(Json).map_err(IntoResponse::into_response)
}

async fn send_canaries(
    State(reports): State<Reports>,
    Json(asked): Json<Sending>,
) -> Result<Json<Sent>, CheckError> {
    reports.0.checks.send(asked).await.map(Json)
}

async fn finish_encryption(
    State(reports): State<Reports>,
    Json(asked): Json<Finish>,
) -> Result<Json<Findings>, CheckError> {
    reports.0.checks.finish(asked).await.map(Json)
}

/// What the agent itself could not do is the first place to look.
fn concerns(sources: &Sources) -> Vec<CheckStep> {
    let node = sources.node.to_string();
    let failures = sources.board.failures();
    if failures.is_empty() {
        return vec![CheckStep {
            hop: "agent".to_owned(),
            target: node,
            ok: true,
            detail: "all is as desired".to_owned(),
            cure: String::new(),
        }];
    }
    let step = |failure: String| CheckStep {
        hop: "agent".to_owned(),
        target: node.clone(),
        ok: false,
        detail: failure,
        cure: "see the agent's log; it tries again on its own".to_owned(),
    };
    failures.into_iter().map(step).collect()
}
