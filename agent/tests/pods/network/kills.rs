//! `kill -9` of the real agent at its system calls, while it adds or removes a pod in the real kernel: nothing leaks, and what was
//! promised holds.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::node::{Container, Node, until, until_left};
use super::runtime::Network;
use crate::machine;

/// Calls by which an agent changes something: netlink, maps, the journal and sysctls, and entering the pod.
const CALLS: [&str; 5] = ["sendto", "bpf", "write", "setns", "getsockopt"];
/// The calls of a thread at which it is killed: some of them, because each costs a start of the agent.
const SOME: [usize; 2] = [1, 4];
/// No thread makes more of one kind for a pod.
const MOST: usize = 24;

/// All points, so many times: `MESH_KILL_ROUNDS=100`. Otherwise some of them, once.
fn points() -> Vec<usize> {
    let rounds = std::env::var("MESH_KILL_ROUNDS").ok().and_then(|n| n.parse().ok());
    rounds.map_or(SOME.to_vec(), |rounds: usize| (1..=MOST).cycle().take(MOST * rounds).collect())
}

/// Kills the process when one of its threads is about to make its `nth` call of a kind.
struct Killer(Child);

impl Killer {
    fn aim(pid: u32, call: &str, nth: usize) -> Self {
        let tracer = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:signal=KILL:when={nth}")])
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        until("all threads are watched", || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            tasks.map(|task| fs::read_to_string(task.path().join("status"))).all(|status| {
                let status = status.unwrap_or_default();
                // An agent that has just started makes calls of its own: it may be dead already.
                let ended = status.is_empty() || status.contains("State:\tZ");
                ended || status.contains(&format!("TracerPid:\t{}\n", tracer.id()))
            })
        });
        Self(tracer)
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        // Whom it watches it lets go with its end. Asked politely, it would wait for threads that end with their process.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What happens to a pod meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
}

/// One pod and one kill. Whether the agent was killed: it is not when it makes fewer such calls.
fn one(node: &mut Node, network: &Network, verb: Verb, call: &str, nth: usize) -> bool {
    let begun = Instant::now();
    let container = Container::new("doomed");
    let pod = container.eth0();
    let made = match verb {
        Verb::Add => Value::Null,
        Verb::Del => network.add(&pod).unwrap(),
    };
    let killer = Killer::aim(node.agent_pid(), call, nth);
    let answer = match verb {
        Verb::Add => network.add(&pod),
        Verb::Del => network.del(&pod, &made).map(|()| Value::Null),
    };
    drop(killer);
    let killed = node.ends_soon();
    if killed {
        node.kill_agent();
        node.start_agent();
    }
    let held = Node::leased().contains("doomed");
    let promised = |result: &Value| network.clone().version("1.1.0").check(&pod, result);
    // An address is reserved for an interface that is complete, or for nobody: also before its runtime comes back to it.
    let complete = promised(&json!({"cniVersion": "1.1.0", "ips": []}));
    assert_eq!(held, complete.is_ok(), "{complete:?}");
    match (verb, &answer) {
        (Verb::Add, Ok(result)) => promised(result).unwrap(),
        (Verb::Del, Ok(_)) => drop(promised(&made).unwrap_err()),
        // Its runtime cannot know how far it got.
        (_, Err(_)) => assert!(killed, "{answer:?}"),
    }
    network.del(&pod, &Value::Null).unwrap();
    drop(container);
    let (done, took) = (if killed { "killed" } else { "lived" }, begun.elapsed());
    println!("{verb:?} {done} at {call} {nth}, answered {}, {took:.1?}", answer.is_ok());
    killed
}

#[test]
fn nothing_leaks_wherever_the_agent_is_killed() {
    let name = "network::kills::nothing_leaks_wherever_the_agent_is_killed";
    machine::run_empty(name, async |cgroup| {
        let mut node = Node::start(cgroup);
        let network = Node::network();
        let stays = Container::new("stays");
        let result = network.add(&stays.eth0()).unwrap();
        let before = Node::left();
        let mut kills = 0;
        for nth in points() {
            for (verb, call) in CALLS.iter().flat_map(|call| [(Verb::Add, call), (Verb::Del, call)])
            {
                kills += usize::from(one(&mut node, &network, verb, call, nth));
                network.clone().version("1.1.0").check(&stays.eth0(), &result).unwrap();
                until_left(&before);
                assert_eq!(Node::leased().len(), 1, "{:?}", Node::leased());
            }
        }
        println!("{kills} kills");
        assert!(kills > 5, "{kills} kills: the agent was hardly ever hit");
    });
}
