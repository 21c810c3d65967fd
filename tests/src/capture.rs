//! What an eavesdropper on the underlay sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::wait_until;

/// A running capture of whole packets on one device of the root namespace.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
}

impl Capture {
    /// Starts to capture on `device` into a file in `folder`; returns when it runs.
    pub fn start(device: &str, folder: &Path) -> Result<Self> {
        let file = folder.join(format!("{device}.pcap"));
        let log_path = folder.join(format!("{device}.tcpdump.log"));
        let log = fs::File::create(&log_path).context("make tcpdump's log")?;
        let child = Command::new("tcpdump")
            .args(["-i", device, "-s", "0", "-U", "-B", "16384", "-Z", "root", "-w"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start tcpdump")?;
        let capture = Self { child, file };
        wait_until("tcpdump listens", Duration::from_secs(10), || {
            let said = fs::read_to_string(&log_path)?;
            if said.contains("listening on") { Ok(()) } else { bail!("it says: {said}") }
        })?;
        Ok(capture)
    }

    /// Ends the capture and returns its bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGINT).context("end tcpdump")?;
        self.child.wait().context("wait for tcpdump")?;
        fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `needle` is somewhere in `bytes`.
pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|w| w == needle)
}
