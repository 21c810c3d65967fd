//! `status`: the processes of the local cluster, and what the API says about its nodes.

use anyhow::Result;
use mesh_tests::process::{Daemon, resident_kib};
use mesh_tests::{Artifacts, Node};
use nix::unistd::Pid;

use crate::local;

/// Prints the processes with their memory, then nodes and pods.
pub(crate) fn print() -> Result<()> {
    let cluster = local::running()?;
    println!("{:<10} {:<16} {:>8} {:>9}", "WHERE", "PROGRAM", "PID", "RSS MiB");
    line("root", "mesh-control", cluster.control().pid());
    for node in cluster.nodes() {
        daemon(&node, "containerd", &node.containerd());
        daemon(&node, "mesh-agent", &node.agent());
        for (name, pid) in node.workers() {
            line(node.name(), &format!("  {name}"), Some(pid));
        }
    }
    println!();
    let kubectl = cluster.kubectl(&Artifacts::locate(false));
    for what in [["nodes", "-A"], ["pods", "-A"]] {
        let words = ["get", what[0], what[1], "-o", "wide"];
        println!("{}", kubectl.run(&words).unwrap_or_else(|e| format!("{e:#}\n")));
    }
    Ok(())
}

fn daemon(node: &Node, program: &str, daemon: &Daemon) {
    line(node.name(), program, daemon.pid());
}

fn line(place: &str, program: &str, pid: Option<Pid>) {
    match pid {
        Some(pid) => {
            #[allow(clippy::cast_precision_loss, reason = "shown with one digit after the point")]
            let mib = resident_kib(pid).unwrap_or(0) as f64 / 1024.0;
            println!("{place:<10} {program:<16} {pid:>8} {mib:>9.1}");
        }
        None => println!("{place:<10} {program:<16} {:>8}", "-"),
    }
}
