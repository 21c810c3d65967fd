//! `node drain`: the pods of a node leave it, each in its own time; `cordon` and `uncordon`; the API's part of `reset`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use http::Method;
use serde_json::{Value, json};

use crate::cli::{CordonArgs, DrainArgs, Global, ResetArgs};
use crate::connect::{Api, ApiFailure};

const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Between two looks at a pod that is going, or two attempts to evict one that may not go yet.
const PAUSE: Duration = Duration::from_millis(500);

/// What a drain does with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    Evict,
    /// It stays; why.
    Skip(&'static str),
    /// The drain does not begin; why.
    Refuse(&'static str),
}

/// A pod of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Leaving {
    namespace: String,
    name: String,
    uid: String,
}

impl Leaving {
    fn of(pod: &Value) -> Self {
        let text = |key: &str| pod["metadata"][key].as_str().unwrap_or_default().to_owned();
        Self { namespace: text("namespace"), name: text("name"), uid: text("uid") }
    }

    fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name)
    }

    fn title(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// `meshctl node cordon` and `uncordon`.
pub(super) async fn cordon(global: &Global, args: &CordonArgs, on: bool) -> anyhow::Result<()> {
    let api = Api::connect(global).await?;
    mark(&api, &args.node, on).await?;
    println!("{} {}", args.node, if on { "cordoned" } else { "uncordoned" });
    Ok(())
}

/// `meshctl node drain`.
pub(super) async fn drain(global: &Global, args: &DrainArgs) -> anyhow::Result<()> {
    let api = Api::connect(global).await?;
    empty(&api, args).await?;
    println!("{} drained", args.node);
    Ok(())
}

/// `meshctl node reset`: the node is emptied and leaves the cluster; what is on it goes with `mesh-agent reset`.
pub(super) async fn reset(global: &Global, args: &ResetArgs) -> anyhow::Result<()> {
    let api = Api::connect(global).await?;
    empty(&api, &args.drain).await?;
    let node = &args.drain.node;
    api.call(Method::DELETE, &format!("/api/v1/nodes/{node}"), None, JSON)
        .await
        .with_context(|| format!("delete node {node}"))?;
    println!(
        "{node} is drained and deleted; now on {node}: systemctl disable --now mesh-agent && mesh-agent reset"
    );
    Ok(())
}

async fn mark(api: &Api, node: &str, on: bool) -> anyhow::Result<()> {
    let value = if on { json!(true) } else { Value::Null };
    let patch = json!({"spec": {"unschedulable": value}}).to_string().into_bytes();
    let path = format!("/api/v1/nodes/{node}");
    api.call(Method::PATCH, &path, Some((MERGE_PATCH, patch)), JSON)
        .await
        .with_context(|| format!("change node {node}"))?;
    Ok(())
}

async fn empty(api: &Api, args: &DrainArgs) -> anyhow::Result<()> {
    mark(api, &args.node, true).await?;
    let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}", args.node);
    let list = api.read(&path).await.context("list the node's pods")?;
    let pods = list["items"].as_array().cloned().unwrap_or_default();
    let leaving = sort(&pods, args.force)?;
    let deadline = (args.timeout > 0).then(|| Instant::now() + Duration::from_secs(args.timeout));
    let ends = leaving.iter().map(|pod| leave(api, pod, args.grace_period, deadline));
    let failures: Vec<String> = join_all(ends)
        .await
        .into_iter()
        .filter_map(|end| end.err().map(|e| format!("{e:#}")))
        .collect();
    if !failures.is_empty() {
        bail!("{} is cordoned but not empty: {}", args.node, failures.join("; "));
    }
    Ok(())
}

/// The pods to evict. Says which stay, and fails before the first eviction when one must not go.
fn sort(pods: &[Value], force: bool) -> anyhow::Result<Vec<Leaving>> {
    let mut leaving = Vec::new();
    let mut refused = Vec::new();
    for pod in pods {
        let entry = Leaving::of(pod);
        match choose(pod, force) {
            Choice::Evict => leaving.push(entry),
            Choice::Skip(why) => eprintln!("{} stays: {why}", entry.title()),
            Choice::Refuse(why) => refused.push(format!("{}: {why}", entry.title())),
        }
    }
    if refused.is_empty() {
        return Ok(leaving);
    }
    bail!("nothing was evicted: {}", refused.join("; "))
}

fn choose(pod: &Value, force: bool) -> Choice {
    let owners = pod["metadata"]["ownerReferences"].as_array();
    let controller = owners.into_iter().flatten().find(|owner| owner["controller"] == true);
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if !pod["metadata"]["annotations"][MIRROR].is_null() {
        Choice::Skip("it is a static pod of the node")
    } else if ended {
        Choice::Evict
    } else if controller.is_some_and(|owner| owner["kind"] == "DaemonSet") {
        Choice::Skip("its DaemonSet would make it anew here")
    } else if controller.is_none() && !force {
        Choice::Refuse("nobody makes it anew elsewhere; --force deletes it")
    } else {
        Choice::Evict
    }
}

/// Asks one pod to go, as often as a budget refuses, and waits until it has gone.
async fn leave(
    api: &Api,
    pod: &Leaving,
    grace: Option<u64>,
    deadline: Option<Instant>,
) -> anyhow::Result<()> {
    let mut options = json!({"preconditions": {"uid": pod.uid}});
    if let Some(secs) = grace {
        options["gracePeriodSeconds"] = json!(secs);
    }
    let eviction = json!({
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod.name, "namespace": pod.namespace},
        "deleteOptions": options,
    });
    let path = format!("{}/eviction", pod.path());
    let mut asked = false;
    let mut budget = String::new();
    loop {
        let over = deadline.is_some_and(|at| at <= Instant::now());
        let step = if asked {
            is_gone(api, pod).await
        } else {
            let body = Some((JSON, eviction.to_string().into_bytes()));
            api.call(Method::POST, &path, body, JSON).await.map(|_| false)
        };
        match step {
            Ok(true) => {
                println!("{} evicted", pod.title());
                return Ok(());
            }
            Ok(false) => asked = true,
            // Gone, or another pod has its name by now.
            Err(ApiFailure::Refused { code: 404 | 409, .. }) if !asked => return Ok(()),
            Err(ApiFailure::Refused { code: 429, message }) => budget = message,
            Err(failure) => return Err(failure).with_context(|| pod.title()),
        }
        if over && asked {
            bail!("{} has not ended in time", pod.title());
        }
        if over {
            bail!("{} may not be evicted: {budget}", pod.title());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn is_gone(api: &Api, pod: &Leaving) -> Result<bool, ApiFailure> {
    match api.read(&pod.path()).await {
        Ok(found) => Ok(found["metadata"]["uid"] != pod.uid.as_str()),
        Err(failure) if failure.is_not_found() => Ok(true),
        Err(failure) => Err(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(owner: Option<&str>) -> Value {
        let owners: Vec<Value> =
            owner.iter().map(|kind| json!({"kind": kind, "controller": true})).collect();
        json!({
            "metadata": {"name": "p", "namespace": "d", "uid": "u", "ownerReferences": owners},
            "status": {"phase": "Running"}
        })
    }

    #[test]
    fn what_comes_back_elsewhere_leaves_and_the_rest_is_named() {
        assert_eq!(choose(&pod(Some("ReplicaSet")), false), Choice::Evict);
        assert!(matches!(choose(&pod(Some("DaemonSet")), true), Choice::Skip(_)));
        assert!(matches!(choose(&pod(None), false), Choice::Refuse(_)));
        assert_eq!(choose(&pod(None), true), Choice::Evict);
        let mut mirror = pod(Some("Node"));
        mirror["metadata"]["annotations"] = json!({MIRROR: "x"});
        assert!(matches!(choose(&mirror, true), Choice::Skip(_)));
        let mut done = pod(None);
        done["status"]["phase"] = json!("Succeeded");
        assert_eq!(choose(&done, false), Choice::Evict);
    }

    #[test]
    fn nothing_is_evicted_when_one_must_stay() {
        let pods = [pod(Some("ReplicaSet")), pod(None)];
        let why = sort(&pods, false).unwrap_err().to_string();
        assert!(why.contains("d/p") && why.contains("--force"), "{why}");
        assert_eq!(sort(&pods, true).unwrap().len(), 2);
    }
}
