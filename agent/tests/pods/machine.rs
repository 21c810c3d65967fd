//! A machine for each test: the test program runs itself again as the first process of namespaces of its own.
//!
//! ```text
//!   test                                   names the machine, waits, removes its control groups
//!    `- setpriv --pdeathsig KILL           so that a killed test takes all of this with it
//!        `- unshare --net --mount --pid
//!            `- the test again, process 1  with a /run of its own
//!                |- containerd, shims, containers
//! ```
//!
//! When process 1 ends, however it ends, the kernel ends every process of the machine, and with them go its network,
//! its mounts and its `/run`, where containerd, its shims and runc keep all they know. Only control groups have no
//! namespace that would end them. They carry the test's process in their name, so that the next run finds those of a
//! test that was killed.

use std::future::Future;
use std::process::Command;

use mesh_tests::{cgroups, command, process};
use nix::mount::{MsFlags, mount};

use crate::rig::Rig;

/// Set in the process that is inside: the machine's control group.
const INSIDE: &str = "MESH_PODS_CGROUP";
/// All control groups of this suite begin with it.
const PREFIX: &str = "mesh-pods-";
/// What a machine is made of.
const PROGRAMS: [&str; 11] = [
    "busybox",
    "containerd",
    "ctr",
    "install",
    "ip",
    "iptables",
    "nsenter",
    "runc",
    "setpriv",
    "strace",
    "unshare",
];

/// Runs a test on a machine of its own, with containerd and the runner's rig.
pub(crate) fn run<F: Future<Output = ()>>(name: &str, test: impl FnOnce(Rig) -> F) {
    run_empty(name, async |cgroup| test(Rig::start(cgroup).await).await);
}

/// Runs a test on a machine of its own where nothing runs yet; it is given its control group. `name` is the test's path, as the
/// test harness prints it. Where no machine can be made the test is skipped, saying why; in CI that is a failure.
pub(crate) fn run_empty(name: &str, test: impl AsyncFnOnce(String)) {
    if let Ok(cgroup) = std::env::var(INSIDE) {
        return inside(cgroup, test);
    }
    if let Err(why) = can_be_made() {
        assert!(std::env::var_os("CI").is_none(), "{name} cannot run: {why}");
        println!("skipped {name}: {why}");
        return;
    }
    remove_orphans();
    outside(name);
}

fn can_be_made() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("it needs root".to_owned());
    }
    if let Some(missing) = PROGRAMS.iter().find(|program| !command::exists(program)) {
        return Err(format!("{missing} is not installed"));
    }
    command::run("unshare", &["--net", "--mount", "--pid", "--fork", "--mount-proc", "true"])
        .map_err(|e| format!("namespaces cannot be made: {e:#}"))?;
    cgroups::unified_root().map(drop).map_err(|e| format!("{e:#}"))
}

/// A machine's control group, in all hierarchies.
struct Group(String);

impl Group {
    fn new(test: &str) -> Self {
        let pid = std::process::id();
        let start = i32::try_from(pid).ok().and_then(process::start_time).unwrap_or(0);
        Self(format!("{PREFIX}{pid}-{start}-{}", test.replace("::", "-")))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for done in [cgroups::kill_all(&self.0), cgroups::remove(&self.0)] {
            if let Err(e) = done {
                eprintln!("left behind: {e:#}");
            }
        }
    }
}

/// Removes what tests have left that were killed.
fn remove_orphans() {
    for hierarchy in cgroups::hierarchies().unwrap_or_default() {
        let entries = std::fs::read_dir(hierarchy.root).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| is_orphan(name)).for_each(|name| drop(Group(name)));
    }
}

/// Whether it is a group of this suite whose test is no longer there.
fn is_orphan(group: &str) -> bool {
    let owner = group.strip_prefix(PREFIX).and_then(|rest| {
        let mut parts = rest.splitn(3, '-');
        Some((parts.next()?.parse::<i32>().ok()?, parts.next()?.parse::<u64>().ok()?))
    });
    owner.is_some_and(|(pid, start)| process::start_time(pid) != Some(start))
}

fn outside(name: &str) {
    let group = Group::new(name);
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .args(["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, &group.0)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed on its machine: {}", output.status);
    assert!(said.contains("1 passed"), "{name} is not the name of this test");
}

fn inside(cgroup: String, test: impl AsyncFnOnce(String)) {
    assert_eq!(std::process::id(), 1, "{INSIDE} is set by the test itself");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    command::run("ip", &["link", "set", "lo", "up"]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(cgroup));
}

/// Ends every process of the machine but this one, as a power failure does.
pub(crate) fn kill_everything() {
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::wait;
    use nix::unistd::Pid;
    assert_eq!(
        std::process::id(),
        1,
        "only process 1 may signal everybody: it means its own machine"
    );
    // None is there: nothing was running.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    // What loses its parent becomes a child of process 1, so this waits for all of them.
    while wait().is_ok() {}
}
