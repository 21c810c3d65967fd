//! Configurations and processes come and go under open connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use mesh_ingress::{Listeners, Proxy, Status, WorkerOptions};
use mesh_model::snapshot::L7Config;
use mesh_worker::{Client, Descriptors};
use tokio::net::TcpStream;

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configurations_change_under_load_and_no_request_is_lost() {
    let (one, other) = (Backend::echo().await, Backend::echo().await);
    let site = Arc::new(Site::new(&all_to(&[one.address]), options()));
    let running = Arc::new(AtomicBool::new(true));
    let asked = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (site, running, asked) = (Arc::clone(&site), Arc::clone(&running), Arc::clone(&asked));
        clients.spawn(async move {
            let mut client = site.client().await;
            while running.load(SeqCst) {
                let (head, _) = client.ask(GET).await;
                assert_eq!(code(&head), 200);
                asked.fetch_add(1, SeqCst);
            }
        });
    }
    for turn in 0..200 {
        let backends = match turn % 3 {
            0 => vec![other.address],
            1 => vec![one.address],
            _ => vec![one.address, other.address],
        };
        site.proxy.apply(&all_to(&backends));
        let before = asked.load(SeqCst);
        eventually("requests go on", || asked.load(SeqCst) > before + 5).await;
    }
    running.store(false, SeqCst);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let counts = site.status().counts;
    assert_eq!(counts.responses_2xx, asked.load(SeqCst) as u64);
    assert_eq!((counts.responses_4xx, counts.responses_5xx, counts.aborted), (0, 0, 0));
    assert_eq!(site.status().generation, 201);
}

#[tokio::test]
async fn draining_ends_idle_connections_and_lets_the_others_finish() {
    let release = Arc::new(tokio::sync::Notify::new());
    let hold = Arc::clone(&release);
    let backend = Backend::new(move |io, _| {
        let hold = Arc::clone(&hold);
        async move {
            let mut io = Raw::new(io);
            while io.head().await.is_some() {
                hold.notified().await;
                io.send(ok("done")).await;
            }
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let mut idle = site.client().await;
    let mut busy = site.client().await;
    busy.send(GET).await;
    eventually("the request arrives", || backend.seen() == 1).await;
    let (proxy, http) = (Arc::new(site.proxy), site.http);
    let draining = tokio::spawn({
        let proxy = Arc::clone(&proxy);
        async move { proxy.drain().await }
    });
    assert_eq!(idle.rest().await, "");
    soon("new connections are refused", async {
        while TcpStream::connect(http).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    release.notify_one();
    let (head, body) = busy.response().await;
    assert_eq!((code(&head), body.as_str()), (200, "done"));
    assert!(head.contains("connection: close"), "{head}");
    assert_eq!(busy.rest().await, "");
    soon("the proxy ends", draining).await.unwrap();
}

#[tokio::test]
async fn a_request_that_is_on_its_way_when_draining_begins_is_answered() {
    let backend = Backend::echo().await;
    let mut options = options();
    options.timeouts.drain_idle = Duration::from_secs(30);
    let site = Site::new(&all_to(&[backend.address]), options);
    let mut fresh = site.client().await;
    let mut kept = site.client().await;
    assert_eq!(code(&kept.ask(GET).await.0), 200);
    eventually("both are connected", || site.status().counts.connections_open == 2).await;
    let proxy = Arc::new(site.proxy);
    let draining = tokio::spawn({
        let proxy = Arc::clone(&proxy);
        async move { proxy.drain().await }
    });
    soon("new connections are refused", async {
        while TcpStream::connect(site.http).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for client in [&mut fresh, &mut kept] {
        let (head, _) = client.ask(GET).await;
        assert!(code(&head) == 200 && head.contains("connection: close"), "{head}");
        assert_eq!(client.rest().await, "");
    }
    soon("the proxy ends", draining).await.unwrap();
}

#[tokio::test]
async fn nothing_is_answered_before_there_are_routes() {
    let backend = Backend::echo().await;
    let any: std::net::SocketAddr = ([127, 0, 0, 1], 0).into();
    let proxy = Proxy::start(Listeners::bind(&[any], &[], 1).unwrap(), options()).unwrap();
    let mut early = Raw::connect(proxy.http()[0]).await;
    early.send(GET).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(proxy.status().counts.connections, 0, "it waits in the queue");
    proxy.apply(&all_to(&[backend.address]));
    assert_eq!(code(&early.response().await.0), 200);
}

#[tokio::test]
async fn fewer_threads_take_the_sockets_of_more() {
    let backend = Backend::echo().await;
    let (mut inherited, mut kept) = (Descriptors::default(), Descriptors::default());
    // A port that is free; another number than 0 names the sockets.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let four = Listeners::take(&[port], &[], 4, &mut inherited, &mut kept).unwrap();
    let mut waiting = Vec::new();
    for _ in 0..64 {
        waiting.push(Raw::connect(port).await);
    }
    drop(four);
    let mut next = Descriptors::default();
    let two = Listeners::take(&[port], &[], 2, &mut kept, &mut next).unwrap();
    assert!(kept.is_empty() && next.iter().count() == 4);
    let proxy = Proxy::start(two, options()).unwrap();
    proxy.apply(&all_to(&[backend.address]));
    for client in &mut waiting {
        assert_eq!(code(&client.ask(GET).await.0), 200);
    }
}

#[tokio::test]
async fn two_proxies_share_an_address_while_one_replaces_the_other() {
    let backend = Backend::echo().await;
    let first = Site::new(&all_to(&[backend.address]), options());
    let listeners = Listeners::bind(&[first.http], &[first.https], 1).unwrap();
    let second = Proxy::start(listeners, options()).unwrap();
    second.apply(&all_to(&[backend.address]));
    first.proxy.drain().await;
    for _ in 0..20 {
        assert_eq!(code(&Raw::connect(first.http).await.ask(GET).await.0), 200);
    }
    assert_eq!(second.status().counts.requests, 20);
}

#[tokio::test]
async fn a_taken_address_is_a_clear_error() {
    let taken = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = Listeners::bind(&[address], &[], 1).err().unwrap();
    assert_eq!(error.to_string(), format!("listen on {address}"));
    assert_eq!(error.source.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn the_worker_takes_its_configuration_from_the_agent_and_starts_again_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let backend = Backend::echo().await;
        let mut options = WorkerOptions::new(dir.path().join("i.sock"), dir.path().join("i.json"));
        options.http = vec![([127, 0, 0, 1], 0).into()];
        options.https = vec![];
        options.proxy = crate::support::options();
        let client = Client::new(&options.control_socket);

        let first = Worker::start(options.clone());
        let status = reach(&client).await;
        assert_eq!((status.routes, status.pid), (0, std::process::id()));
        let mut config: L7Config = all_to(&[backend.address]);
        client.set(&config).await.unwrap();
        config.routes[0].host = Some("not a host".into());
        client.set(&config).await.unwrap();
        let status: Status = client.get().await.unwrap();
        assert_eq!((status.routes, status.problems.len()), (0, 1));
        assert_eq!(status.problems[0].object, "ingress web/test");
        client.set(&all_to(&[backend.address])).await.unwrap();
        let status: Status = client.get().await.unwrap();
        let (head, _) = Raw::connect(status.http[0]).await.ask(GET).await;
        assert_eq!(code(&head), 200);
        drop(first);
        eventually("the first worker is gone", || {
            std::os::unix::net::UnixStream::connect(&options.control_socket).is_err()
        })
        .await;

        let _second = Worker::start(options);
        let status = reach(&client).await;
        assert_eq!(status.routes, 1, "restored from its file");
        let (head, _) = Raw::connect(status.http[0]).await.ask(GET).await;
        assert_eq!(code(&head), 200);
    });
}

/// A worker on a thread of its own, because it gives up the thread's privileges.
struct Worker(Option<tokio::sync::oneshot::Sender<()>>);

impl Worker {
    fn start(options: WorkerOptions) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    ended = mesh_ingress::run(options) => ended.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self(Some(stop))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.take().unwrap().send(());
    }
}

async fn reach(client: &Client) -> Status {
    soon("the worker answers", async {
        loop {
            if let Ok(status) = client.get().await {
                return status;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await
}
