//! Two nodes with a pod each, in network namespaces; gone when dropped.
//!
//! ```text
//!   pod a           node a                node b           pod b
//!   eth0 ---- pod0 [ routes ] ul0 === ul0 [ routes ] pod0 ---- eth0
//!   10.71.0.2           192.0.2.1     192.0.2.2            10.72.0.2
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use mesh_tests::command::{output, run};

/// MTU of the tunnels, and of the pods in front of them.
pub(super) const MTU: u16 = 1420;

/// One of the two nodes, with its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    A,
    B,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::A, Self::B];

    pub(super) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Name of the node's tunnel device. The control sockets of other programs are named after it, in one folder for all
    /// namespaces.
    pub(super) fn device(self) -> &'static str {
        match self {
            Self::A => "bench-wg-a",
            Self::B => "bench-wg-b",
        }
    }

    fn number(self) -> u8 {
        self as u8 + 1
    }

    /// Address of the node.
    pub(super) fn node(self) -> String {
        format!("192.0.2.{}", self.number())
    }

    /// Address of the pod.
    pub(super) fn pod(self) -> String {
        format!("10.7{}.0.2", self.number())
    }

    /// Addresses of all pods of the node.
    pub(super) fn pods(self) -> String {
        format!("10.7{}.0.0/24", self.number())
    }
}

/// What lies between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// It passes on up to 64 KiB of segments as one packet, as a veth pair does.
    Passing,
    /// Packets of its MTU only; the receiver joins them again, as the driver of a card does.
    Cutting,
}

/// The two nodes, and a folder for what runs on them.
pub(super) struct World {
    prefix: String,
    files: PathBuf,
}

impl World {
    pub(super) fn new(link: Link) -> Result<Self> {
        let prefix = format!("bench{}-", std::process::id());
        let files = std::env::temp_dir().join(format!("mesh-{prefix}overlay"));
        let world = Self { prefix, files };
        world.remove(); // what a run that was killed left under the same number
        fs::create_dir_all(&world.files).context("make a folder for the tunnels")?;
        for kind in ["node", "pod"] {
            for side in Side::BOTH {
                run("ip", &["netns", "add", &world.name(kind, side)])?;
            }
        }
        let (a, b) = (world.name("node", Side::A), world.name("node", Side::B));
        ip(&a, &format!("link add ul0 type veth peer name ul0 netns {b}"))?;
        for side in Side::BOTH {
            world.build(side)?;
            if link == Link::Cutting {
                let sent = ["tso", "off", "gso", "off", "tx-udp-segmentation", "off", "gro", "on"];
                let words = [&["ethtool", "-K", "ul0"], &sent[..]].concat();
                output(&mut world.command("node", side, &words))?;
            }
        }
        Ok(world)
    }

    fn build(&self, side: Side) -> Result<()> {
        let (n, node, pod) = (side.number(), self.name("node", side), self.name("pod", side));
        for command in [
            format!("addr add {}/24 dev ul0", side.node()),
            "link set ul0 up".to_owned(),
            format!("link add pod0 type veth peer name eth0 netns {pod}"),
            format!("addr add 10.7{n}.0.1/24 dev pod0"),
            "link set pod0 up".to_owned(),
        ] {
            ip(&node, &command)?;
        }
        for command in [
            format!("addr add {}/24 dev eth0", side.pod()),
            format!("link set eth0 up mtu {MTU}"),
            format!("route add default via 10.7{n}.0.1"),
        ] {
            ip(&pod, &command)?;
        }
        let forward = ["sysctl", "-qw", "net.ipv4.ip_forward=1"];
        output(&mut self.command("node", side, &forward)).map(drop)
    }

    /// Sends what is for the other side's pods through a device, or to the other node.
    pub(super) fn route(&self, side: Side, through: Option<&str>) -> Result<()> {
        let pods = side.other().pods();
        let way = through.map_or_else(
            || format!("via {}", side.other().node()),
            |device| format!("dev {device}"),
        );
        ip(&self.name("node", side), &format!("route add {pods} {way}"))
    }

    /// A command in the network of a "node" or "pod".
    pub(super) fn command(&self, kind: &str, side: Side, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(kind, side)]).args(words);
        command
    }

    /// ip(8) on a node.
    pub(super) fn ip(&self, side: Side, command: &str) -> Result<()> {
        ip(&self.name("node", side), command)
    }

    /// A file of a node.
    pub(super) fn file(&self, side: Side, kind: &str) -> PathBuf {
        self.files.join(format!("{side:?}.{kind}"))
    }

    fn name(&self, kind: &str, side: Side) -> String {
        format!("{}{kind}-{side:?}", self.prefix).to_lowercase()
    }

    /// Removes everything, whether it is there or not.
    fn remove(&self) {
        for kind in ["node", "pod"] {
            for side in Side::BOTH {
                let name = self.name(kind, side);
                if Path::new("/run/netns").join(&name).exists() {
                    let _ = run("ip", &["netns", "del", &name]);
                }
            }
        }
        let _ = fs::remove_dir_all(&self.files);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(namespace: &str, command: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(["-n", namespace]).args(command.split_whitespace());
    output(&mut ip).map(drop)
}
