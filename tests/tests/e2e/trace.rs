//! `meshctl trace` on a cluster where something is really wrong: each fault is made on purpose, named, and taken away.
//!
//! ```text
//!   client (node A) ──┐                ┌── server (node B, another namespace)
//!   lone (node A)  ───┴─ node A ══ B ──┴── victim (node B): its interface is broken, so it is made anew each time
//! ```

mod faults;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::Node;
use mesh_tests::command::wait_until;
use mesh_tests::pod::Pod;
use serde_json::Value;

use crate::tests;
use crate::world::{PATIENCE, World};
use faults::FAULTS;

tests![trace_tells_every_decision_in_order, trace_names_twenty_real_faults];

/// How soon nodes know of each other again, and all of what was applied.
const SOON: Duration = Duration::from_secs(60);
/// Namespaces of the scene.
const SPACES: &str = "namespace/trace-far namespace/trace";

/// The pods of the scene.
pub(super) struct Scene<'w> {
    pub(super) world: &'w World,
    /// Pod of namespace `trace` on `far`, with a service of its name.
    pub(super) server: Pod,
    pub(super) near: Node,
    pub(super) far: Node,
}

fn pod(namespace: &str, name: &str, node: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: it
    image: mesh.local/hello:1
    ports: [{{name: http, containerPort: 8080}}]
    {more}
---
"
    )
}

fn service(name: &str, selector: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: trace}}
spec:
  selector: {{app: {selector}}}
  {more}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"
    )
}

impl<'w> Scene<'w> {
    fn new(world: &'w World) -> Result<Self> {
        let (near, far) = (world.cluster.node(1), world.cluster.node(2));
        let spaces = "
{apiVersion: v1, kind: Namespace, metadata: {name: trace}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: trace-far}}
---
";
        let objects = [
            spaces.to_owned(),
            pod("trace", "client", near.name(), ""),
            pod("trace", "server", far.name(), ""),
            pod("trace-far", "stranger", near.name(), ""),
            service("server", "server", ""),
        ];
        world.kubectl.apply(&objects.concat())?;
        running(world, "trace", "client")?;
        let server = running(world, "trace", "server")?;
        running(world, "trace-far", "stranger")?;
        Ok(Self { world, server, near, far })
    }

    /// A pod on the far node that may be broken: made anew.
    pub(super) fn victim(&self) -> Result<Pod> {
        self.remove_victim()?;
        self.world.kubectl.apply(&pod("trace", "victim", self.far.name(), ""))?;
        running(self.world, "trace", "victim")
    }

    pub(super) fn remove_victim(&self) -> Result<()> {
        let args = ["delete", "-n", "trace", "--ignore-not-found", "--timeout=60s", "pod/victim"];
        self.world.kubectl.run(&args).map(drop)
    }

    /// `meshctl trace`; the exit status has to say what the verdict does.
    pub(super) fn trace(&self, words: &[&str]) -> Result<Value> {
        let mut meshctl = Command::new(&self.world.artifacts.meshctl);
        meshctl.args(["trace", "-n", "trace", "-o", "json"]).args(words);
        let answer = meshctl.env("KUBECONFIG", self.world.cluster.kubeconfig()).output()?;
        let error = String::from_utf8_lossy(&answer.stderr);
        let trace: Value = serde_json::from_slice(&answer.stdout)
            .with_context(|| format!("trace {words:?}: {error}"))?;
        let ok = trace["verdict"]["ok"].as_bool().context("a verdict")?;
        ensure!(ok == answer.status.success(), "exit status {} of {trace:#}", answer.status);
        Ok(trace)
    }

    /// Waits until the trace names that fault, `none` for no fault.
    pub(super) fn wait_named(&self, words: &[&str], fault: &str) -> Result<Value> {
        wait_until(&format!("trace {words:?} says {fault}"), SOON, || {
            let trace = self.trace(words)?;
            ensure!(trace["verdict"]["fault"] == fault, "{trace:#}");
            Ok(trace)
        })
    }

    fn clean(&self) -> Result<()> {
        let mut args = vec!["delete", "--ignore-not-found", "--timeout=60s"];
        args.extend(SPACES.split(' '));
        self.world.kubectl.run(&args).map(drop)
    }
}

/// The pod, once it is ready.
fn running(world: &World, namespace: &str, name: &str) -> Result<Pod> {
    wait_until(&format!("pod {name} is ready"), PATIENCE, || {
        let pod = world.kubectl.json(&["-n", namespace, "pod", name])?;
        ensure!(mesh_tests::kubectl::is_ready(&pod), "{:#}", pod["status"]);
        Pod::from_json(&world.cluster, &pod)
    })
}

/// The whole way there and back, on both nodes, in the order of cause and effect.
fn trace_tells_every_decision_in_order(world: &World) -> Result<()> {
    let scene = Scene::new(world)?;
    let trace = scene.wait_named(&["client", "server:80"], "none")?;
    let timeline = trace["timeline"].as_array().context("a timeline")?;
    let told: Vec<String> = timeline.iter().map(summary).collect();
    let (near, far) = (scene.near.name(), scene.far.name());
    let expected = [
        format!("{near} socket > chosen"),
        format!("{near} fromPod > seen"),
        format!("{near} fromPod > policy_allowed"),
        format!("{near} fromPod > pod_to_overlay"),
        format!("{far} fromOverlay > seen"),
        format!("{far} fromOverlay > policy_allowed"),
        format!("{far} fromOverlay > overlay_to_pod"),
        format!("{far} fromPod < seen"),
        format!("{far} fromPod < policy_allowed"),
        format!("{far} fromPod < pod_to_overlay"),
        format!("{near} fromOverlay < seen"),
        format!("{near} fromOverlay < policy_allowed"),
        format!("{near} fromOverlay < overlay_to_pod"),
    ];
    ensure!(told.starts_with(&expected), "{told:#?}");
    let detail = |place: usize| timeline[place]["detail"].as_str().unwrap_or_default().to_owned();
    ensure!(
        detail(0).contains("trace/server") && detail(0).contains("the only backend"),
        "{}",
        detail(0)
    );
    ensure!(
        timeline[0]["chosen"] == format!("{}:8080", scene.server.v4()?).as_str(),
        "{timeline:#?}"
    );
    ensure!(detail(3).contains(&format!("to {far}")), "{}", detail(3));
    scene.clean()
}

fn summary(step: &Value) -> String {
    let word = |name: &str| step[name].as_str().unwrap_or_default().to_owned();
    let way = if step["forth"] == true { '>' } else { '<' };
    format!("{} {} {way} {}", word("node"), word("hook"), word("decision"))
}

fn trace_names_twenty_real_faults(world: &World) -> Result<()> {
    let scene = Scene::new(world)?;
    let node_http = format!("{}:80", scene.near.addresses().0);
    let server = "pod/server:8080".to_owned();
    for healthy in ["server:80", server.as_str(), node_http.as_str()] {
        scene.wait_named(&["client", healthy], "none")?;
    }
    scene.wait_named(&["client", "pod/server:9000", "--bytes", "8000"], "none")?;
    let mut named = std::collections::BTreeSet::new();
    for fault in FAULTS {
        let told = (fault.make)(&scene).with_context(|| format!("fault {}", fault.name))?;
        println!("    {}: {}", fault.name, told["verdict"]["detail"].as_str().unwrap_or_default());
        named.insert(fault.name);
        scene
            .wait_named(&["client", server.as_str()], "none")
            .with_context(|| format!("after {}", fault.name))?;
    }
    ensure!(named.len() >= 20, "only {named:?}");
    scene.clean()
}
