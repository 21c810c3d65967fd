//! What every test needs: a BPF file system, a cgroup and network namespaces of its own.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh_abi::maps;
use mesh_kernel::{LoadOptions, NetNs, Programs};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Long enough that only a hang exceeds it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Capacities of the maps that have their memory from the start: all of it for maps that forget (`LruHashMap`), 16 bytes an entry
/// for the others. Enough for every test that does not say what it needs. A node's own would be tens of megabytes for each load, and Linux 6.1
/// frees them so late that a small machine had none left.
const CAPACITIES: [(&str, u32); 15] = [
    (maps::SERVICES, 8_192),
    (maps::SLOTS, 8_192),
    (maps::MEMBERS, 8_192),
    (maps::REVERSE, 4_096),
    (maps::STICKY, 4_096),
    (maps::AFFINITY, 4_096),
    (maps::DATAGRAMS, 4_096),
    (maps::EDGE_SERVICES, 8_192),
    (maps::EDGE_TABLES, 8_192),
    (maps::EDGE_BACKENDS, 8_192),
    (maps::EDGE_FLOWS, 8_192),
    (maps::EDGE_FRAGMENTS, 2_048),
    (maps::IDENTITIES, 8_192),
    (maps::CONNECTIONS, 8_192),
    (maps::BEGINNINGS, 8_192),
];

/// Whether the test can run; says why when not. With `CI` set it has to.
pub(crate) fn privileged() -> bool {
    let why = if !nix::unistd::geteuid().is_root() {
        "not root"
    } else if mesh_kernel::bpf::built_in_object().is_empty() {
        "built without eBPF programs: cargo xtask build-ebpf"
    } else if mesh_kernel::bpf::cgroup2_mount().is_none() {
        "no cgroup v2 mount"
    } else {
        return true;
    };
    assert!(std::env::var_os("CI").is_none(), "cannot run: {why}");
    println!("skipped: {why}");
    false
}

/// Lets this process open as many files as root may: each connection of a test has both ends in it.
pub(crate) fn allow_many_files() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("mesh-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A BPF file system and a cgroup that go away with it.
pub(crate) struct Lab {
    mount: tempfile::TempDir,
    pub(crate) cgroup: PathBuf,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let mount = tempfile::tempdir().unwrap();
        let cgroup = mesh_kernel::bpf::cgroup2_mount().unwrap().join(unique());
        std::fs::create_dir(&cgroup).unwrap();
        mesh_kernel::bpf::ensure_mounted(mount.path()).unwrap();
        Self { mount, cgroup }
    }

    /// The directory of pins. Not there until somebody loads.
    pub(crate) fn bpf_dir(&self) -> PathBuf {
        self.mount.path().join("mesh")
    }

    pub(crate) fn options(&self) -> LoadOptions {
        let options = LoadOptions::new(self.bpf_dir(), &self.cgroup);
        LoadOptions { capacities: CAPACITIES.into(), ..options }
    }

    pub(crate) fn load(&self) -> Programs {
        self.load_with(&[])
    }

    /// On maps of these capacities.
    pub(crate) fn load_with(&self, capacities: &[(&'static str, u32)]) -> Programs {
        let mut options = self.options();
        options.capacities.extend(capacities.iter().copied());
        Programs::open_or_load(&options).unwrap_or_else(|error| panic!("{error:#?}"))
    }
}

impl Lab {
    /// Makes all that is pinned another version's, as an agent with another ABI leaves it behind.
    pub(crate) fn change_version(&self, to: u32) {
        let version = |number| self.bpf_dir().join(format!("v{number}"));
        std::fs::rename(version(mesh_abi::VERSION), version(to)).unwrap();
    }

    /// Loads the programs on a node with pods.
    pub(crate) fn load_on(&self, node: &Net) -> Programs {
        let options = LoadOptions { node: node.handle(), ..self.options() };
        Programs::open_or_load(&options).unwrap_or_else(|error| panic!("{error:#?}"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = mesh_kernel::bpf::detach_all(&self.bpf_dir());
        let _ = umount2(self.mount.path(), MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// A network namespace that lives as long as this value: nothing is mounted, so nothing can be left behind.
pub(crate) struct Net {
    file: std::fs::File,
}

impl Net {
    /// A new one, with its loopback device up.
    pub(crate) fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        };
        let net = Self { file: std::thread::spawn(make).join().unwrap() };
        net.ip("link set lo up");
        net
    }

    /// A path by which it can be opened.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    pub(crate) fn handle(&self) -> NetNs {
        NetNs::open(&self.path()).unwrap()
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.handle().run(work).unwrap()
    }

    /// Runs ip(8) inside and returns what it says.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.command("ip", arguments)
    }

    /// Runs a program inside and returns what it says.
    pub(crate) fn command(&self, program: &str, arguments: &str) -> String {
        let output = self.run(|| Command::new(program).args(arguments.split(' ')).output());
        let output = output.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A UDP socket inside.
    pub(crate) fn udp(&self, address: &str) -> UdpSocket {
        let socket = self.run(|| UdpSocket::bind(address)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// A TCP server inside that greets each client with `greeting` and ends the connection. It ends with the process.
    pub(crate) fn greeter(&self, address: &str, greeting: &'static str) -> SocketAddr {
        let listener = self.run(|| std::net::TcpListener::bind(address)).unwrap();
        let bound = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = std::io::Write::write_all(&mut &stream, greeting.as_bytes());
            }
        });
        bound
    }

    /// A UDP server inside that answers each datagram with `greeting`. It ends with the process.
    pub(crate) fn answerer(&self, address: &str, greeting: &'static str) -> SocketAddr {
        let socket = self.run(|| UdpSocket::bind(address)).unwrap();
        let bound = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(greeting.as_bytes(), from);
            }
        });
        bound
    }

    /// Connects from inside and reads to the end.
    pub(crate) fn tcp(&self, address: SocketAddr) -> std::io::Result<String> {
        self.run(|| {
            let mut stream = std::net::TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            std::io::Read::read_to_string(&mut stream, &mut text)?;
            Ok(text)
        })
    }
}

/// Joins an address and a port.
pub(crate) fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// Names of the files in a directory, sorted.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
