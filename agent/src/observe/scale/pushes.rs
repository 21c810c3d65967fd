//! What it costs that a worker gets its whole configuration for one change: each step by itself, without the processes.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_dns::{DnsConfig, zone::Zone};
use mesh_model::snapshot::{DnsZone, L7Config};
use mesh_model::{Objects, compile};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{Cluster, bytes};

/// Ingresses and the services behind them.
const ROUTES: u32 = 1_000;

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Arc<T> {
    Arc::new(serde_json::from_slice(bytes).unwrap())
}

fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let result = what();
    (result, begun.elapsed())
}

/// Written, read, and put on disk as a worker does it.
fn travel<T: Serialize + DeserializeOwned>(name: &str, config: &T) {
    let (text, written) = timed(|| serde_json::to_vec(config).unwrap());
    let (read, understood) = timed(|| serde_json::from_slice::<T>(&text).unwrap());
    drop(read);
    let dir = tempfile::tempdir().unwrap();
    let ((), saved) = timed(|| {
        let mut file = std::fs::File::create(dir.path().join("state.json")).unwrap();
        file.write_all(&text).unwrap();
        file.sync_data().unwrap();
    });
    println!(
        "{name}: {} KiB, {written:.1?} to write, {understood:.1?} to read, {saved:.1?} to save",
        text.len() / 1024,
    );
}

fn ingress(n: u32) -> Value {
    json!({"metadata": {"namespace": "default", "name": format!("i{n:05}")}, "spec": {
        "ingressClassName": "mesh",
        "rules": [{"host": format!("h{n:05}.test"), "http": {"paths": [{"path": "/", "pathType": "Prefix",
            "backend": {"service": {"name": format!("s{n:05}"), "port": {"name": "http"}}}}]}}]}})
}

fn names(services: u32) -> DnsZone {
    let cluster = Cluster { services, endpoints: 1, revision: 0 };
    let objects = Objects {
        services: (0..services).map(|n| parse(&cluster.service(n))).collect(),
        ..Objects::default()
    };
    DnsZone::clone(&compile(&objects, &"n0".parse().unwrap()).dns)
}

fn routes() -> L7Config {
    let mut cluster = Cluster { services: ROUTES, endpoints: 50, revision: 0 };
    let objects = Objects {
        nodes: vec![parse(&cluster.node())],
        services: (0..ROUTES).map(|n| parse(&cluster.service(n))).collect(),
        endpoint_slices: (0..ROUTES).map(|n| parse(&cluster.slice(n, 0).1)).collect(),
        ingresses: (0..ROUTES).map(|n| parse(&bytes(&ingress(n)))).collect(),
        ..Objects::default()
    };
    L7Config::clone(&compile(&objects, &"n0".parse().unwrap()).l7)
}

#[test]
#[ignore = "a measurement: cargo xtask bench scale"]
fn figures() {
    let zone = names(10_000);
    let (index, indexed) = timed(|| Zone::new(&zone));
    println!("DNS, {} names: {indexed:.1?} to index", index.len());
    assert!(index.len() > 10_000);
    travel("  10,000 services", &DnsConfig { zone, upstreams: vec![] });
    let routes = routes();
    assert_eq!(routes.routes.len(), ROUTES as usize);
    travel("ingress, 1,000 routes x 50 backends", &routes);
}
