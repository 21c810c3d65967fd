//! `logs`: a pod's log, streamed.

use anyhow::Context as _;
use futures_util::io::AsyncReadExt as _;
use http::Request;
use std::io::Write as _;

use crate::cli::{Global, LogsArgs};
use crate::connect::Api;

/// `meshctl logs`.
pub(crate) async fn logs(global: &Global, args: LogsArgs) -> anyhow::Result<()> {
    let api = Api::connect(global).await?;
    let namespace = api.namespace(args.namespace.as_deref());
    let mut path =
        format!("/api/v1/namespaces/{namespace}/pods/{}/log?follow={}", args.pod, args.follow);
    if let Some(container) = &args.container {
        path.push_str(&format!("&container={container}"));
    }
    if let Some(tail) = args.tail {
        path.push_str(&format!("&tailLines={tail}"));
    }
    if args.previous {
        path.push_str("&previous=true");
    }
    if args.timestamps {
        path.push_str("&timestamps=true");
    }
    let request = Request::get(path).body(vec![]).context("the pod's name")?;
    let stream = api.client.request_stream(request).await;
    let mut stream = Box::pin(stream.map_err(|error| api.failure(error.into()))?);
    let mut buffer = vec![0; 64 << 10];
    let mut stdout = std::io::stdout().lock();
    loop {
        let n = stream.read(&mut buffer).await.context("read the log")?;
        if n == 0 {
            return Ok(());
        }
        match stdout.write_all(&buffer[..n]).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(error).context("write to stdout"),
        }
    }
}
