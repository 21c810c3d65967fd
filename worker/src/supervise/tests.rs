use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-keep-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn spec(&self, seconds: &str) -> WorkerSpec {
        WorkerSpec {
            name: "test",
            program: "/bin/sleep".into(),
            args: vec![seconds.to_owned()],
            identity_file: self.0.join("pid"),
            log_file: Some(self.0.join("log")),
            control_socket: self.0.join("socket"),
            sockets: vec![],
            replacement: Replacement::Exclusive,
            started: Arc::default(),
        }
    }

    fn keeper(&self, seconds: &str) -> Keeper {
        Keeper { spec: self.spec(seconds), held: Descriptors::default(), known: None }
    }

    fn identity(&self) -> Option<Identity> {
        Identity::read(&self.0.join("pid")).unwrap()
    }

    /// The worker, when it is another one than before.
    async fn running(&self, before: Option<ProcessId>) -> ProcessId {
        for _ in 0..1000 {
            let process = self.identity().map(|identity| identity.process);
            if let Some(process) = process.filter(|p| p.is_alive() && Some(*p) != before) {
                return process;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no worker came up");
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let all = self.identity().into_iter().flat_map(|identity| identity.processes());
        for process in all.filter(ProcessId::is_alive) {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn a_worker_that_is_killed_comes_back() {
    let dir = Dir::new("killed");
    let keeper = tokio::spawn(keep(dir.spec("60")));
    let first = dir.running(None).await;
    kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
    let second = dir.running(Some(first)).await;
    keeper.abort();
    stop(&dir.spec("60")).await.unwrap();
    assert!(!second.is_alive());
}

#[tokio::test]
async fn the_next_agent_adopts_a_worker_or_replaces_an_outdated_one() {
    let dir = Dir::new("adopted");
    let keeper = tokio::spawn(keep(dir.spec("60")));
    let first = dir.running(None).await;
    keeper.abort();
    let _ = keeper.await;
    assert!(first.is_alive(), "it outlives its keeper");

    assert_eq!(dir.keeper("60").adopt().await.unwrap(), Some(first));
    let second = dir.keeper("61").adopt().await.unwrap().unwrap();
    assert_ne!(second, first, "other arguments");
    assert!(!first.is_alive(), "the outdated one was stopped");
    stop(&dir.spec("61")).await.unwrap();
    assert!(!second.is_alive());
    stop(&dir.spec("61")).await.unwrap();
}

#[tokio::test]
async fn another_process_with_the_number_of_a_worker_is_left_alone() {
    let dir = Dir::new("identity");
    let identity = dir.keeper("60").start(None).unwrap();
    end(identity.process, GRACE).await.unwrap();
    // The number is somebody else's now: here, this process's own.
    let text = fs::read_to_string(dir.0.join("pid")).unwrap();
    let own = std::process::id().to_string();
    let text =
        text.replacen(&format!("\"pid\":{}", identity.process.pid), &format!("\"pid\":{own}"), 1);
    assert!(text.contains(&own));
    fs::write(dir.0.join("pid"), text).unwrap();
    assert_eq!(dir.keeper("60").adopt().await.unwrap(), None);
    stop(&dir.spec("60")).await.unwrap();
    fs::write(dir.0.join("pid"), "half a fi").unwrap();
    assert_eq!(dir.keeper("60").adopt().await.unwrap(), None);
}

#[tokio::test]
async fn a_worker_that_cannot_be_written_down_does_not_stay() {
    let dir = Dir::new("unwritten");
    let mut keeper = dir.keeper("60");
    keeper.spec.identity_file = dir.0.join("no/such/folder");
    assert!(matches!(keeper.start(None), Err(SuperviseError::Identity { .. })));
    let mut keeper = dir.keeper("60");
    keeper.spec.program = Path::new("/no/such/program").to_owned();
    assert!(matches!(keeper.start(None), Err(SuperviseError::Start { .. })));
    assert!(dir.identity().is_none());
}
