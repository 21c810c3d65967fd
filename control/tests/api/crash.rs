//! `kill -9` in the middle of writes: what was acknowledged is there afterwards.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::Method;
use kube::Client;

use super::support::*;

const ROUNDS: usize = 3;
const WRITERS: usize = 8;
const START_LIMIT: Duration = Duration::from_secs(60);

/// The real program; killed when the test is over, however it ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn start(dir: &Path, listen: SocketAddr) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_mesh-control"))
        .args(["serve", "--log", "warn", "--listen", &listen.to_string(), "--data-dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

async fn ready(dir: &Path) -> Client {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        assert!(Instant::now() < deadline, "the program does not answer");
        tokio::time::sleep(Duration::from_millis(50)).await;
        if !dir.join("admin.kubeconfig").exists() {
            continue;
        }
        let client = admin(dir).await;
        let request = http::Request::get("/readyz").body(kube::client::Body::empty()).unwrap();
        if client.send(request).await.is_ok_and(|r| r.status().is_success()) {
            return client;
        }
    }
}

type Acknowledged = Arc<Mutex<BTreeMap<String, String>>>;

/// Creates and changes objects until the service is gone; notes what it acknowledged.
async fn write(client: Client, round: usize, writer: usize, acknowledged: Acknowledged) {
    for i in 0.. {
        let name = format!("r{round}-w{writer}-{}", i / 2);
        let value = i.to_string();
        let map = config_map(&name, &value).to_string().into_bytes();
        let (method, path) = if i % 2 == 0 {
            (Method::POST, MAPS.to_owned())
        } else {
            (Method::PUT, format!("{MAPS}/{name}"))
        };
        let request = http::Request::builder().method(method).uri(path);
        let request =
            request.header("content-type", JSON).body(kube::client::Body::from(map)).unwrap();
        match client.send(request).await {
            Ok(response) if response.status().is_success() => {
                acknowledged.lock().unwrap().insert(name, value);
            }
            Ok(response) => panic!("refused: {}", response.status()),
            Err(_) => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_the_program_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let listen = free_port();
    let acknowledged = Acknowledged::default();
    for round in 0..ROUNDS {
        let mut process = start(dir.path(), listen);
        let client = ready(dir.path()).await;
        let before = acknowledged.lock().unwrap().len();
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            writers.spawn(write(client.clone(), round, writer, Arc::clone(&acknowledged)));
        }
        while acknowledged.lock().unwrap().len() < before + 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.0.kill().unwrap();
        process.0.wait().unwrap();
        writers.join_all().await;
    }
    let _process = start(dir.path(), listen);
    let client = ready(dir.path()).await;
    let list = send(&client, Method::GET, MAPS, JSON, Vec::new()).await.body;
    let stored: BTreeMap<_, _> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|i| Some((i["metadata"]["name"].as_str()?, i["data"]["k"].as_str()?)))
        .collect();
    let acknowledged = acknowledged.lock().unwrap();
    assert!(acknowledged.len() >= ROUNDS * 100);
    for (name, value) in acknowledged.iter() {
        let found: u64 = stored.get(name.as_str()).expect("acknowledged").parse().unwrap();
        // A change that was not acknowledged may have happened all the same.
        assert!(found >= value.parse().unwrap(), "{name}: {found} after {value}");
    }
}
