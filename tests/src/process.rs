//! Daemons of a cluster: started in a namespace and a control group, found again by their process id and start time.

use std::fs::{self, File, FileTimes};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

use crate::command;

/// What to start, and where.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// Program and arguments.
    pub words: Vec<String>,
    /// Variables to set.
    pub env: Vec<(String, String)>,
    /// File of the network namespace; the caller's when absent.
    pub netns: Option<PathBuf>,
    /// Control group (v2) that the process is put into before it runs; it must exist.
    pub cgroup: Option<PathBuf>,
}

/// Enters the control group and becomes the program: the shell's process id is the program's.
const ENTER: &str = r#"echo $$ > "$1" && if [ -n "$2" ]; then echo $$ > "$2/cgroup.procs"; fi && shift 2 && exec "$@""#;

impl Launch {
    /// A command that runs it in the foreground, with the caller's standard streams.
    pub fn command(&self) -> Command {
        self.wrapped(Path::new("/dev/null"), &[])
    }

    fn wrapped(&self, pid_file: &Path, before: &[&str]) -> Command {
        let mut words: Vec<String> = before.iter().map(|&w| w.to_owned()).collect();
        if let Some(netns) = &self.netns {
            // Not `ip netns exec`: it mounts another /sys, without bpffs and control groups.
            words.extend([
                "nsenter".to_owned(),
                format!("--net={}", netns.display()),
                "--".to_owned(),
            ]);
        }
        let cgroup = self.cgroup.as_ref().map(|c| c.display().to_string()).unwrap_or_default();
        words.extend(["sh", "-c", ENTER, "sh"].map(str::to_owned));
        words.extend([pid_file.display().to_string(), cgroup]);
        words.extend(self.words.iter().cloned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }
}

/// One daemon, known by its process-id file.
#[derive(Debug, Clone)]
pub struct Daemon {
    name: String,
    pid_file: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// The daemon `name` with its process-id file in `run` and its log in `logs`.
    pub fn new(name: &str, run: &Path, log: PathBuf) -> Self {
        Self { name: name.to_owned(), pid_file: run.join(format!("{name}.pid")), log }
    }

    /// The log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The process, when it runs: the same one that was started, not a later one with its number.
    pub fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.pid_file).ok()?;
        let mut words = text.split_whitespace();
        let (pid, started) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        (start_time(pid) == Some(started)).then(|| Pid::from_raw(pid))
    }

    /// Whether it runs this program, the very file and not an older one of that name, with these arguments.
    pub fn runs(&self, launch: &Launch) -> bool {
        let (Some(pid), Some(program)) = (self.pid(), launch.words.first()) else { return false };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = launch.words.iter().flat_map(|w| w.bytes().chain([0]));
        let identity = |m: fs::Metadata| (m.dev(), m.ino());
        let running = fs::metadata(format!("/proc/{pid}/exe")).map(identity);
        let wanted = fs::metadata(program).map(identity);
        line.iter().copied().eq(words) && matches!((running, wanted), (Ok(a), Ok(b)) if a == b)
    }

    /// Starts it in the background, in a session of its own and not as our child.
    pub fn start(&self, launch: &Launch) -> Result<()> {
        let _ = fs::remove_file(&self.pid_file);
        for folder in [self.pid_file.parent(), self.log.parent()].into_iter().flatten() {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let mut command = launch.wrapped(&self.pid_file, &["setsid", "--fork"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
        let status = command.status().with_context(|| format!("start {}", self.name))?;
        if !status.success() {
            bail!("start {}: {status}", self.name);
        }
        let pid =
            command::wait_until(&format!("start {}", self.name), Duration::from_secs(5), || {
                let pid: i32 = fs::read_to_string(&self.pid_file)?.trim().parse()?;
                Ok(pid)
            })
            .with_context(|| format!("see {}", self.log.display()))?;
        let started = start_time(pid)
            .with_context(|| format!("{} ended at once: see {}", self.name, self.log.display()))?;
        fs::write(&self.pid_file, format!("{pid} {started}\n")).context("write a process-id file")
    }

    /// Sends a signal, if it runs.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if let Some(pid) = self.pid() {
            kill(pid, signal).with_context(|| format!("signal {} ({pid})", self.name))?;
        }
        Ok(())
    }

    /// Asks it to end, waits, and kills it after `limit`.
    pub fn stop(&self, limit: Duration) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let end = Instant::now() + limit;
        while self.pid().is_some() {
            if Instant::now() > end {
                self.kill()?;
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = fs::remove_file(&self.pid_file);
        Ok(())
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        command::wait_until(&format!("end of {}", self.name), Duration::from_secs(10), || {
            if self.pid().is_none() { Ok(()) } else { bail!("it still runs") }
        })
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Kills a process and all that descend from it. What has been handed to another parent is not found.
pub fn kill_tree(root: Pid) {
    // From the top: who is dead starts no more, and children are looked for before they lose their parent.
    let children = children_of(root);
    let _ = kill(root, Signal::SIGKILL);
    children.into_iter().for_each(kill_tree);
}

/// The processes that a process has started and that are still its own.
pub fn children_of(parent: Pid) -> Vec<Pid> {
    let parent = parent.to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.split_whitespace().nth(1) == Some(&*parent))
    };
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(is_child).map(Pid::from_raw).collect()
}

/// Start time of a process in clock ticks since boot; `None` when there is none or only its exit code is left.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything, also parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// Resident memory of a process in KiB.
pub fn resident_kib(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Makes `copy` the same as `original`, by replacing the file when the content differs: what runs keeps the old one.
pub fn install(original: &Path, copy: &Path) -> Result<()> {
    if same_content(original, copy).unwrap_or(false) {
        return Ok(());
    }
    let new = copy.with_extension("new");
    fs::copy(original, &new).with_context(|| format!("copy {}", original.display()))?;
    let modified = fs::metadata(original).and_then(|m| m.modified());
    let times = FileTimes::new().set_modified(modified.context("read a file's time")?);
    File::options()
        .write(true)
        .open(&new)
        .and_then(|f| f.set_times(times))
        .context("set a time")?;
    fs::rename(&new, copy).with_context(|| format!("replace {}", copy.display()))
}

/// Same length and time, as [`install`] leaves them, or the same digest.
fn same_content(a: &Path, b: &Path) -> io::Result<bool> {
    let (one, two) = (fs::metadata(a)?, fs::metadata(b)?);
    if one.len() != two.len() {
        return Ok(false);
    }
    Ok(one.modified()? == two.modified()? || digest(a)? == digest(b)?)
}

/// SHA-256 of a file, in hex.
fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;
    use crate::command::wait_until;

    #[test]
    fn a_daemon_is_started_found_and_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::new("sleeper", dir.path(), dir.path().join("sleeper.log"));
        assert!(daemon.pid().is_none());
        let words = ["sh", "-c", "echo up; exec sleep 60"].map(str::to_owned).to_vec();
        let launch = Launch { words, ..Launch::default() };
        daemon.start(&launch).unwrap();
        wait_until("the shell becomes another program", Duration::from_secs(5), || {
            ensure!(daemon.tail(1) == "up" && !daemon.runs(&launch));
            Ok(())
        })
        .unwrap();
        let pid = daemon.pid().expect("it runs");
        assert!(resident_kib(pid).unwrap() > 0);
        let again = Daemon::new("sleeper", dir.path(), dir.path().join("sleeper.log"));
        assert_eq!(again.pid(), Some(pid), "found by its file");
        daemon.stop(Duration::from_secs(5)).unwrap();
        assert!(daemon.pid().is_none());
        fs::write(dir.path().join("sleeper.pid"), format!("{} 1\n", std::process::id())).unwrap();
        assert!(daemon.pid().is_none(), "another process with the same number");
    }

    #[test]
    fn only_another_content_replaces_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let (original, copy) = (dir.path().join("a"), dir.path().join("b"));
        let inode = || fs::metadata(&copy).unwrap().ino();
        fs::write(&original, "one").unwrap();
        install(&original, &copy).unwrap();
        let first = inode();
        install(&original, &copy).unwrap();
        // Built again with the same result: another time.
        fs::write(&original, "one").unwrap();
        install(&original, &copy).unwrap();
        assert_eq!(inode(), first);
        fs::write(&original, "two").unwrap();
        install(&original, &copy).unwrap();
        assert_ne!(inode(), first);
        assert_eq!(fs::read_to_string(&copy).unwrap(), "two");
    }
}
