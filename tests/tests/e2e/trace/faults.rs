//! Faults, made for real: each one is made, traced until it is named, and taken away whatever came of it.

use anyhow::{Context as _, Result};
use mesh_tests::Node;
use mesh_tests::pod::Pod;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Scene, pod, service};

/// A fault by its stable word.
pub(super) struct Fault {
    pub(super) name: &'static str,
    /// Makes it, returns the trace that names it, and takes it away.
    pub(super) make: fn(&Scene<'_>) -> Result<Value>,
}

/// The list, one line a fault.
macro_rules! faults {
    ($($name:literal => $make:expr),+ $(,)?) => {
        pub(super) const FAULTS: &[Fault] = &[$(Fault { name: $name, make: $make }),+];
    };
}

faults! {
    "nameNotFound" => |s| s.wait_named(&["client", "nobody:80"], "nameNotFound"),
    "noSuchServicePort" => |s| s.wait_named(&["client", "server:81"], "noSuchServicePort"),
    "notListening" => |s| s.wait_named(&["client", "pod/server:9999"], "notListening"),
    "noEndpoints" => |s| with(s, &service("empty", "nobody", ""), &["service/empty"], || {
        s.wait_named(&["client", "empty:80"], "noEndpoints")
    }),
    "podNotReady" => |s| {
        let probe = "readinessProbe: {tcpSocket: {port: 1}, periodSeconds: 1}";
        let objects = pod("trace", "unready", s.far.name(), probe) + &service("unready", "unready", "");
        with(s, &objects, &["service/unready", "pod/unready"], || {
            s.wait_named(&["client", "unready:80"], "podNotReady")
        })
    },
    "noLocalEndpoints" => |s| {
        let objects = service("local", "server", "internalTrafficPolicy: Local");
        with(s, &objects, &["service/local"], || {
            s.wait_named(&["client", "local:80"], "noLocalEndpoints")
        })
    },
    "podNotScheduled" => |s| {
        let lost = pod("trace", "lost", "nowhere", "").replace("nodeName: nowhere", "nodeSelector: {no: such}");
        with(s, &lost, &["pod/lost"], || {
            s.wait_named(&["client", "pod/lost:80"], "podNotScheduled")
        })
    },
    "policyEgress" => |s| with(s, &policy("Egress", "client"), &["networkpolicy/seeded"], || {
        s.wait_named(&["client", "pod/server:8080"], "policyEgress")
    }),
    "policyIngress" => |s| with(s, &policy("Ingress", "server"), &["networkpolicy/seeded"], || {
        s.wait_named(&["client", "pod/server:8080"], "policyIngress")
    }),
    "namespaceIsolated" => |s| {
        let label = |text: &str| s.world.kubectl.run(&["label", "--overwrite", "namespace", "trace", text]);
        let to = format!("{}:8080", s.server.v4()?);
        s.wait_named(&["trace-far/stranger", &to], "none")?;
        label("mesh.dev/isolation=namespace")?;
        let named = s.wait_named(&["trace-far/stranger", &to], "namespaceIsolated");
        label("mesh.dev/isolation-")?;
        named
    },
    "staleEndpoint" => |s| {
        let server = s.server.v4()?;
        let block = server.rsplit_once('.').context("an IPv4 address")?.0;
        s.wait_named(&["client", &format!("{block}.251:80")], "staleEndpoint")
    },
    "hostProtected" => |s| {
        let agent = format!("{}:10250", s.near.addresses().0);
        s.wait_named(&["client", &agent], "hostProtected")
    },
    "hostFirewall" => |s| {
        let to = format!("{}:80", s.near.addresses().0);
        firewall(&s.near, "input", "tcp dport 80 drop", || {
            s.wait_named(&["client", &to], "hostFirewall")
        })
    },
    "dnsSilent" => |s| {
        let worker = s.near.worker("dns").context("no DNS worker")?;
        stopped(worker, || s.wait_named(&["client", "server:80"], "dnsSilent"))
    },
    "overlayStopped" => |s| {
        let worker = s.far.worker("overlay").context("no overlay worker: is WireGuard in this kernel?")?;
        stopped(worker, || s.wait_named(&["client", "pod/server:8080"], "overlayStopped"))
    },
    "agentSilent" => |s| {
        let agent = s.near.agent().pid().context("no agent")?;
        stopped(agent, || s.wait_named(&["client", "pod/server:8080"], "agentSilent"))
    },
    "nodeDown" => |s| firewall(&s.far, "input", "udp dport 51900-51916 drop", || {
        s.wait_named(&["client", "pod/server:8080"], "nodeDown")
    }),
    "largePacketsLost" => |s| firewall(&s.far, "input", "udp dport 51900 udp length > 700 drop", || {
        s.wait_named(&["client", "pod/server:9000", "--bytes", "8000"], "largePacketsLost")
    }),
    "interfaceDown" => |s| broken(s, &[&["link", "set", "eth0", "down"]], |s| {
        s.wait_named(&["client", "pod/victim:8080"], "interfaceDown")
    }),
    "interfaceIncomplete" => |s| broken(s, &[&["-4", "addr", "flush", "dev", "eth0"]], |s| {
        s.wait_named(&["client", "pod/victim:8080"], "interfaceIncomplete")
    }),
    "routeMissing" => |s| broken(s, &[&["-4", "route", "del", "default"]], |s| {
        s.wait_named(&["victim", "pod/server:8080"], "routeMissing")
    }),
    "spoofedSource" => |s| {
        let lie: &[&[&str]] = &[
            &["addr", "add", "10.9.9.9/32", "dev", "eth0"],
            &["route", "replace", "default", "via", "169.254.1.1", "dev", "eth0", "onlink", "src", "10.9.9.9"],
        ];
        broken(s, lie, |s| s.wait_named(&["victim", "pod/server:8080"], "spoofedSource"))
    },
}

fn policy(direction: &str, app: &str) -> String {
    format!(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: seeded, namespace: trace}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
  policyTypes: [{direction}]
"
    )
}

/// With those objects, which are removed whatever comes of it.
fn with(
    scene: &Scene<'_>,
    manifest: &str,
    objects: &[&str],
    look: impl FnOnce() -> Result<Value>,
) -> Result<Value> {
    let kubectl = &scene.world.kubectl;
    let seen = kubectl.apply(manifest).and_then(|_| look());
    let mut remove = vec!["delete", "-n", "trace", "--ignore-not-found", "--timeout=60s"];
    remove.extend(objects);
    kubectl.run(&remove)?;
    seen
}

/// With a rule in the node's own firewall.
fn firewall(
    node: &Node,
    hook: &str,
    rule: &str,
    look: impl FnOnce() -> Result<Value>,
) -> Result<Value> {
    let chain = format!("{{ type filter hook {hook} priority -5 ; }}");
    let made = [
        "add table inet seeded".to_owned(),
        format!("add chain inet seeded it {chain}"),
        format!("add rule inet seeded it {rule}"),
    ];
    let made = made.iter().try_for_each(|line| node.exec(&["nft", line]).map(drop));
    let seen = made.and_then(|()| look());
    node.exec(&["nft", "delete table inet seeded"])?;
    seen
}

/// While a process stands still.
fn stopped(pid: Pid, look: impl FnOnce() -> Result<Value>) -> Result<Value> {
    kill(pid, Signal::SIGSTOP).context("stop a process")?;
    let seen = look();
    // It may have been replaced meanwhile.
    let _ = kill(pid, Signal::SIGCONT);
    seen
}

/// With a victim in whose network namespace `ip` did that.
fn broken(
    scene: &Scene<'_>,
    commands: &[&[&str]],
    look: impl FnOnce(&Scene<'_>) -> Result<Value>,
) -> Result<Value> {
    let victim = scene.victim()?;
    let run = |words: &&[&str]| -> Result<()> {
        let all: Vec<&str> = std::iter::once("ip").chain(words.iter().copied()).collect();
        in_network(&victim, &all)
    };
    let seen = commands.iter().try_for_each(run).and_then(|()| look(scene));
    scene.remove_victim()?;
    seen
}

fn in_network(pod: &Pod, words: &[&str]) -> Result<()> {
    mesh_tests::command::output(&mut pod.network_command(words)?).map(drop)
}
