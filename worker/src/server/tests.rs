use std::io::{Read as _, Write as _};
use std::sync::Mutex as StdMutex;
use std::time::Duration;

use super::*;
use crate::attach::{AttachError, Attachment};
use crate::client::{CallError, Client};
use crate::predecessor::{Predecessor, YieldError};
use crate::process::ProcessId;

#[derive(Default)]
struct Echo(StdMutex<Vec<u32>>);

impl Handler for Echo {
    type Config = Vec<u32>;
    type Status = Vec<u32>;

    async fn apply(&self, config: Vec<u32>) -> Result<(), String> {
        if config.contains(&13) {
            return Err("13 is not served".into());
        }
        *self.0.lock().unwrap() = config;
        Ok(())
    }

    async fn status(&self) -> Vec<u32> {
        self.0.lock().unwrap().clone()
    }
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-control-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("w.sock")
    }

    fn control(&self, descriptors: Descriptors) -> Arc<Control> {
        Control::new(self.socket(), self.0.join("w.json"), descriptors)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn ready(client: &Client) -> Vec<u32> {
    for _ in 0..500 {
        if let Ok(status) = client.get().await {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the worker never answered");
}

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("in time")
}

#[tokio::test]
async fn a_configuration_is_applied_kept_and_restored() {
    let dir = Dir::new("restored");
    let start = || {
        let control = dir.control(Descriptors::default());
        tokio::spawn(async move {
            let echo = Arc::new(Echo::default());
            control.restore(&*echo).await;
            control.serve(echo).await
        })
    };
    let client = Client::new(dir.socket());

    let first = start();
    assert_eq!(ready(&client).await, Vec::<u32>::new());
    client.set(&vec![1, 2]).await.unwrap();
    assert!(matches!(client.set(&vec![13]).await, Err(CallError::Refused(_))));
    assert!(matches!(client.set(&"text").await, Err(CallError::Refused(_))));
    assert_eq!(client.get::<Vec<u32>>().await.unwrap(), [1, 2], "a refusal changes nothing");
    first.abort();
    let _ = first.await;

    let second = start();
    assert_eq!(ready(&client).await, [1, 2], "restored without an agent");
    second.abort();
}

/// A file that nobody can write to before somebody reads it, as one on a disk that has stalled.
#[tokio::test]
async fn a_disk_that_stalls_keeps_no_configuration_from_being_in_force() {
    let dir = Dir::new("stalled");
    let (stalled, aside) = (dir.0.join("w.new"), dir.0.join("aside"));
    assert!(std::process::Command::new("mkfifo").arg(&stalled).status().unwrap().success());
    let control = dir.control(Descriptors::default());
    // On one thread, as workers are.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _ = runtime.block_on(control.serve(Arc::new(Echo::default())));
    });
    let client = Client::new(dir.socket());
    ready(&client).await;
    let mut unanswered = vec![];
    for n in [1, 2] {
        let sender = client.clone();
        unanswered.push(tokio::spawn(async move { sender.set(&vec![n]).await }));
        let in_force = async {
            while client.get::<Vec<u32>>().await.unwrap() != [n] {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon(in_force).await;
    }
    assert!(!unanswered.iter().any(|call| call.is_finished()), "what is answered is on disk");
    // The disk is back. Whether somebody waits for it yet is not known: opening must not wait for them.
    let read = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&stalled);
    let _read = read.unwrap();
    fs::rename(&stalled, &aside).unwrap();
    let saved = async {
        while fs::read(dir.0.join("w.json")).ok().as_deref() != Some(b"[2]") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(saved).await;
    for call in unanswered {
        soon(call).await.unwrap().unwrap();
    }
}

/// Gives what it has to a successor, if it has anything.
struct Heritage(StdMutex<Option<fs::File>>);

impl Handler for Heritage {
    type Config = u32;
    type Status = u32;

    const YIELDS: bool = true;

    async fn apply(&self, _: u32) -> Result<(), String> {
        Ok(())
    }

    async fn status(&self) -> u32 {
        0
    }

    async fn hand_over(&self) -> Result<OwnedFd, String> {
        let taken = self.0.lock().unwrap().take();
        taken.map(OwnedFd::from).ok_or_else(|| "nothing is left".to_owned())
    }
}

#[tokio::test]
async fn a_successor_gets_everything_once_and_then_it_is_over() {
    let dir = Dir::new("yields");
    let (read, mut write) = io::pipe().unwrap();
    write.write_all(b"inheritance").unwrap();
    drop(write);
    let control = dir.control(Descriptors::default());
    let heritage = Heritage(StdMutex::new(Some(OwnedFd::from(read).into())));
    let serving = tokio::spawn({
        let control = Arc::clone(&control);
        async move { control.serve(Arc::new(heritage)).await }
    });
    let client = Client::new(dir.socket());
    for _ in 0..500 {
        if client.get::<u32>().await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    client.set(&7).await.unwrap();
    let me = ProcessId::of(std::process::id().cast_signed());
    let mut attached = Attachment::new(&dir.socket(), me).await.unwrap();
    assert!(soon(attached.next()).await.unwrap().yields);

    let limit = Duration::from_secs(20);
    let taken = Predecessor::on(dir.socket()).take_over(limit).await.unwrap();
    let mut text = String::new();
    fs::File::from(taken).read_to_string(&mut text).unwrap();
    assert_eq!(text, "inheritance");
    soon(serving).await.unwrap().unwrap();
    assert!(client.set(&8).await.is_err(), "nobody is told what nobody does any more");
    let again = Predecessor::on(dir.socket()).take_over(limit).await;
    assert!(matches!(again, Err(YieldError::Io(_))), "{again:?}");
}

#[tokio::test]
async fn a_worker_that_hands_nothing_over_refuses_and_goes_on() {
    let dir = Dir::new("keeps");
    let control = dir.control(Descriptors::default());
    let serving = tokio::spawn({
        let control = Arc::clone(&control);
        async move { control.serve(Arc::new(Echo::default())).await }
    });
    let client = Client::new(dir.socket());
    ready(&client).await;
    let refused = Predecessor::on(dir.socket()).take_over(Duration::from_secs(20)).await;
    assert!(matches!(refused, Err(YieldError::Refused(_))), "{refused:?}");
    client.set(&vec![1]).await.unwrap();
    let me = ProcessId::of(std::process::id().cast_signed());
    let mut attached = Attachment::new(&dir.socket(), me).await.unwrap();
    assert!(!soon(attached.next()).await.unwrap().yields);
    serving.abort();
}

#[tokio::test]
async fn whoever_attaches_learns_what_is_in_force_and_gets_the_descriptors() {
    let dir = Dir::new("attached");
    let pipe = |name: &str| {
        let (read, write) = io::pipe().unwrap();
        let mut descriptors = Descriptors::default();
        descriptors.insert(name, read.into());
        (descriptors, write)
    };
    let (first, mut write) = pipe("one");
    let control = dir.control(first);
    let serving = tokio::spawn({
        let control = Arc::clone(&control);
        async move { control.serve(Arc::new(Echo::default())).await }
    });
    let client = Client::new(dir.socket());
    ready(&client).await;

    let me = ProcessId::of(std::process::id().cast_signed());
    let init = ProcessId::of(1);
    let other = Attachment::new(&dir.socket(), init).await;
    assert!(matches!(other, Err(AttachError::Other(pid)) if pid == me.pid), "{other:?}");
    let mut attached = Attachment::new(&dir.socket(), me).await.unwrap();
    let said = soon(attached.next()).await.unwrap();
    assert!(!said.configured);
    let mut read = fs::File::from(said.descriptors.unwrap().take("one").unwrap());
    write.write_all(b"x").unwrap();
    read.read_exact(&mut [0]).unwrap();

    client.set(&vec![1]).await.unwrap();
    soon(control.configured()).await;
    assert!(soon(attached.next()).await.unwrap().configured);
    let (second, mut write) = pipe("two");
    control.publish(second);
    let said = soon(attached.next()).await.unwrap().descriptors.unwrap();
    assert_eq!(said.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["two"]);
    drop(said);
    control.release();
    assert!(soon(attached.next()).await.unwrap().descriptors.is_none());
    let closed = write.write_all(b"x").unwrap_err();
    assert_eq!(closed.kind(), io::ErrorKind::BrokenPipe, "nobody holds it any more");
    serving.abort();
}
