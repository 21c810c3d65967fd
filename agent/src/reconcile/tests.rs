use std::sync::{Arc, Mutex};

use mesh_model::{Objects, compile};

use tokio::sync::Notify;

use super::*;

/// Wants the cluster's domain; fails as long as it is told to.
struct Domain {
    seen: Arc<Mutex<Vec<(String, bool)>>>,
    failing: Arc<Mutex<usize>>,
    undone: Arc<Notify>,
}

impl Concern for Domain {
    const NAME: &'static str = "domain";
    const HEAL: Duration = Duration::from_secs(60);
    type Slice = String;

    fn slice(&self, desired: &Desired) -> Option<String> {
        Some(desired.snapshot.cluster.domain.clone())
    }

    async fn apply(&mut self, slice: &String, heal: bool) -> Result<(), Failures> {
        self.seen.lock().unwrap().push((slice.clone(), heal));
        let mut failing = self.failing.lock().unwrap();
        if *failing > 0 {
            *failing -= 1;
            return Err(vec!["told to".to_owned()]);
        }
        Ok(())
    }

    async fn undone(&self) {
        self.undone.notified().await;
    }
}

fn desired(domain: &str, port: u16) -> Option<Desired> {
    let mut snapshot = compile(&Objects::default(), &"n".parse().unwrap());
    snapshot.cluster.domain = domain.to_owned();
    snapshot.cluster.overlay_port = port;
    Some(Desired {
        snapshot: Arc::new(snapshot),
        outlook: Arc::default(),
        synced: true,
        preshared: Arc::default(),
    })
}

#[tokio::test(start_paused = true)]
async fn a_concern_acts_on_its_own_slice_retries_and_heals() {
    let (seen, failing) = (Arc::new(Mutex::new(vec![])), Arc::new(Mutex::new(2)));
    let undone = Arc::new(Notify::new());
    let concern = Domain { seen: Arc::clone(&seen), failing, undone: Arc::clone(&undone) };
    let board = Board::default();
    let (sender, receiver) = watch::channel(None);
    let driving = tokio::spawn(drive(concern, receiver, board.clone()));
    let settle = || tokio::time::sleep(Duration::from_millis(1));

    settle().await;
    assert!(seen.lock().unwrap().is_empty(), "nothing is known, nothing is done");
    sender.send_replace(desired("a", 1));
    settle().await;
    assert_eq!(board.failures(), ["domain: told to"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(seen.lock().unwrap().len(), 3, "two failures, then success");
    assert!(board.failures().is_empty());

    sender.send_replace(desired("a", 2));
    settle().await;
    assert_eq!(seen.lock().unwrap().len(), 3, "somebody else's slice changed");
    sender.send_replace(desired("b", 2));
    settle().await;
    assert_eq!(seen.lock().unwrap().last().unwrap(), &("b".to_owned(), false));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(seen.lock().unwrap().last().unwrap(), &("b".to_owned(), true));
    undone.notify_one();
    settle().await;
    assert_eq!(seen.lock().unwrap().last().unwrap(), &("b".to_owned(), false), "made anew");
    driving.abort();
}
