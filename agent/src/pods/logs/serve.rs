//! `GET /containerLogs/{namespace}/{pod}/{container}`, as the kubelet has it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::Wanted;
use super::follow::send;
use crate::pods::layout::Layout;
use crate::pods::registry::{Found, Registry};

/// Where logs are found.
#[derive(Debug, Clone)]
pub(crate) struct Logs {
    pub(crate) registry: Arc<Registry>,
    pub(crate) layout: Layout,
}

/// The parameters, in the spelling of the API.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parameters {
    follow: Option<String>,
    tail_lines: Option<u64>,
    since_seconds: Option<u64>,
    since_time: Option<Timestamp>,
    timestamps: Option<String>,
    previous: Option<String>,
    limit_bytes: Option<u64>,
    stream: Option<String>,
}

impl Parameters {
    /// What they ask for; or why they make no sense, for people.
    fn wanted(&self, now: Timestamp) -> Result<Wanted, &'static str> {
        let flag = |text: &Option<String>| {
            text.as_deref().is_some_and(|t| matches!(t, "" | "true" | "1" | "True" | "TRUE"))
        };
        let ago = |seconds| {
            let ago = jiff::SignedDuration::try_from(Duration::from_secs(seconds));
            ago.ok().and_then(|ago| now.checked_sub(ago).ok()).unwrap_or(Timestamp::MIN)
        };
        let stderr = match self.stream.as_deref() {
            None | Some("" | "All") => None,
            Some("Stdout") => Some(false),
            Some("Stderr") => Some(true),
            Some(_) => return Err("stream: supported values: \"All\", \"Stderr\", \"Stdout\""),
        };
        if stderr.is_some() && self.tail_lines.is_some() {
            return Err("`tailLines` and specific `stream` are mutually exclusive");
        }
        if self.since_time.is_some() && self.since_seconds.is_some() {
            return Err("at most one of `sinceTime` or `sinceSeconds` may be specified");
        }
        if self.since_seconds == Some(0) {
            return Err("sinceSeconds: Invalid value: 0: must be greater than 0");
        }
        if self.limit_bytes == Some(0) {
            return Err("limitBytes: Invalid value: 0: must be greater than 0");
        }
        Ok(Wanted {
            follow: flag(&self.follow),
            tail_lines: self.tail_lines,
            since: self.since_time.or(self.since_seconds.map(ago)),
            timestamps: flag(&self.timestamps),
            previous: flag(&self.previous),
            limit_bytes: self.limit_bytes,
            stderr,
        })
    }
}

/// The route, ready to be merged into a server's router.
pub(crate) fn router(logs: Logs) -> Router {
    Router::new().route("/containerLogs/{namespace}/{pod}/{container}", get(serve)).with_state(logs)
}

async fn serve(
    State(logs): State<Logs>,
    UrlPath((namespace, pod, container)): UrlPath<(String, String, String)>,
    Query(parameters): Query<Parameters>,
) -> Response {
    let wanted = match parameters.wanted(Timestamp::now()) {
        Ok(wanted) => wanted,
        Err(why) => return (StatusCode::BAD_REQUEST, why).into_response(),
    };
    match logs.locate(&namespace, &pod, &container, wanted.previous) {
        Ok(place) => stream(logs, place, wanted),
        Err((status, message)) => (status, message).into_response(),
    }
}

/// A log file, and whose it is.
struct Place {
    path: PathBuf,
    uid: String,
    container: String,
    attempt: u32,
}

impl Logs {
    fn locate(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<Place, (StatusCode, String)> {
        let (identity, found) = match self.registry.find(namespace, pod, container) {
            None => {
                let message =
                    format!("pod \"{pod}\" in namespace \"{namespace}\" is not on this node");
                return Err((StatusCode::NOT_FOUND, message));
            }
            Some((_, Found::NoContainer)) => {
                let message = format!("container \"{container}\" is not valid for pod \"{pod}\"");
                return Err((StatusCode::BAD_REQUEST, message));
            }
            Some((_, Found::Waiting(reason))) if !previous => {
                let message = format!(
                    "container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}"
                );
                return Err((StatusCode::BAD_REQUEST, message));
            }
            Some(found) => found,
        };
        let directory = self.layout.logs(&identity).join(container);
        let attempt = match found {
            Found::Run { attempt, .. } if !previous => Some(attempt),
            Found::Run { previous, .. } => previous,
            Found::Waiting(_) | Found::NoContainer => None,
        };
        let file = attempt.map(|attempt| (attempt, directory.join(format!("{attempt}.log"))));
        match file.filter(|(_, path)| path.exists()) {
            Some((attempt, path)) => {
                Ok(Place { path, uid: identity.uid, container: container.to_owned(), attempt })
            }
            None if previous => Err((
                StatusCode::BAD_REQUEST,
                format!("previous terminated container \"{container}\" in pod \"{pod}\" not found"),
            )),
            None => Err((StatusCode::NOT_FOUND, format!("container \"{container}\" has no log"))),
        }
    }
}

fn stream(logs: Logs, place: Place, wanted: Wanted) -> Response {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>(16);
    tokio::spawn(async move {
        let runs = || logs.registry.is_running(&place.uid, &place.container, place.attempt);
        if let Err(error) = send(Path::new(&place.path), &wanted, &sender, runs).await {
            let path = place.path.display();
            tracing::warn!(%path, %error, "log not read to its end");
        }
    });
    let chunks = futures_util::stream::unfold(receiver, async |mut receiver| {
        let chunk = receiver.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(chunk)), receiver))
    });
    let plain = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (plain, Body::from_stream(chunks)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_api() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let asked = |query: &str| {
            let uri: axum::http::Uri = format!("/x?{query}").parse().unwrap();
            Query::<Parameters>::try_from_uri(&uri).unwrap().0.wanted(now)
        };
        let query =
            "follow=true&tailLines=5&sinceSeconds=60&timestamps=true&previous=false&limitBytes=9";
        let wanted = asked(query).unwrap();
        assert_eq!(wanted.since, Some("2026-01-01T00:00:00Z".parse().unwrap()));
        assert!(wanted.follow && wanted.timestamps && !wanted.previous);
        assert_eq!((wanted.tail_lines, wanted.limit_bytes), (Some(5), Some(9)));
        let huge = asked(&format!("sinceSeconds={}", u64::MAX));
        assert_eq!(huge.unwrap().since, Some(Timestamp::MIN));
        assert_eq!(asked("stream=All&tailLines=1").unwrap().stderr, None);
        assert_eq!(asked("stream=Stderr").unwrap().stderr, Some(true));
        for (wrong, why) in [
            ("sinceSeconds=0", "greater than 0"),
            ("limitBytes=0", "greater than 0"),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", "at most one"),
            ("stream=Stdin", "supported values"),
            ("stream=Stdout&tailLines=1", "mutually exclusive"),
        ] {
            assert!(asked(wrong).unwrap_err().contains(why), "{wrong}");
        }
    }
}
