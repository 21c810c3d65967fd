//! Running other programs, and waiting for things to become true, with errors that say what was tried.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::unistd::Pid;

use crate::process;

/// Runs a program to its end and returns its standard output; a failure carries its standard error.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    output(Command::new(program).args(args))
}

/// Like [`run`], for a prepared command.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("run {shown}"))?;
    finish(&shown, &out)
}

/// Like [`output`], with `input` on standard input.
pub fn output_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {shown}"))?;
    let mut stdin = child.stdin.take().context("a piped standard input exists")?;
    // A program that does not read to the end says why by its exit code.
    let _ = stdin.write_all(input);
    drop(stdin);
    let out = child.wait_with_output().with_context(|| format!("wait for {shown}"))?;
    finish(&shown, &out)
}

/// Whether a program runs and succeeds; its output is dropped.
pub fn succeeds(program: &str, args: &[&str]) -> bool {
    run(program, args).is_ok()
}

/// Whether a program can be found.
pub fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn finish(shown: &str, out: &Output) -> Result<String> {
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let mut said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    if said.is_empty() {
        said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    }
    bail!("{shown}: {}: {said}", out.status)
}

/// Runs a command whose output people see; one that has not ended after `limit` is killed with all that it started.
///
/// Its processes stay in the group of ours: keys that interrupt us interrupt them.
pub fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    let shown = show(command);
    let mut child = command.spawn().with_context(|| format!("run {shown}"))?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("wait for {shown}"))? {
            break status;
        }
        if begun.elapsed() >= limit {
            process::kill_tree(Pid::from_raw(i32::try_from(child.id())?));
            child.wait().with_context(|| format!("wait for {shown}"))?;
            bail!(
                "{shown}: no end within {} s; what it said last tells where it waits",
                limit.as_secs_f32()
            );
        }
        thread::sleep(Duration::from_millis(50));
    };
    if status.success() { Ok(()) } else { bail!("{shown}: {status}") }
}

/// The command line, shortened for messages.
pub fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    let mut text = words.join(" ");
    if text.len() > 300 {
        let end = text.floor_char_boundary(300);
        text.truncate(end);
        text.push_str(" ...");
    }
    text
}

/// Tries `check` until it succeeds; after `limit` the error says what was waited for and the last failure.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(20);
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(e) if start.elapsed() >= limit => {
                return Err(e.context(format!("{what}: not within {} s", limit.as_secs_f32())));
            }
            Err(_) => thread::sleep(pause),
        }
        pause = (pause * 3 / 2).min(Duration::from_millis(300));
    }
}

/// Runs `work` for each item at the same time and returns the first error.
pub fn at_once<T: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(|| work(item))).collect();
        let results: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        results.into_iter().try_for_each(|r| r.map_err(|_| anyhow!("a worker thread panicked"))?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_carry_what_the_program_said() {
        assert_eq!(run("sh", &["-c", "echo hi"]).unwrap(), "hi\n");
        let error = run("sh", &["-c", "echo no >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("exit status: 3: no"), "{error}");
        let echoed = output_with_input(&mut Command::new("cat"), b"abc").unwrap();
        assert_eq!(echoed, "abc");
    }

    #[test]
    fn what_does_not_end_is_killed_with_all_that_it_started() {
        let mut quick = Command::new("true");
        run_within(&mut quick, Duration::from_secs(60)).unwrap();
        let note = std::env::temp_dir().join(format!("mesh-within-{}", std::process::id()));
        let script = format!("sleep 600 & echo $! > {}; wait", note.display());
        let mut endless = Command::new("sh");
        let error = run_within(endless.args(["-c", &script]), Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("no end within 1 s"), "{error}");
        let grandchild = std::fs::read_to_string(&note).unwrap().trim().parse().unwrap();
        std::fs::remove_file(&note).unwrap();
        let gone = || process::start_time(grandchild).map_or(Ok(()), |_| bail!("it lives"));
        wait_until("the end of the grandchild", Duration::from_secs(10), gone).unwrap();
    }

    #[test]
    fn waiting_ends_with_the_last_failure() {
        let mut left = 3;
        let done = wait_until("three", Duration::from_secs(5), || {
            left -= 1;
            if left == 0 { Ok(7) } else { bail!("{left} left") }
        });
        assert_eq!(done.unwrap(), 7);
        let error = wait_until("never", Duration::ZERO, || -> Result<()> { bail!("still no") });
        assert_eq!(format!("{:#}", error.unwrap_err()), "never: not within 0 s: still no");
    }
}
