//! A process inside a namespace and a cgroup, which serves or makes load on request: this program again. It ends with its input.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::lab::{Lab, Net};
use crate::{load, serve};

/// What follows the program's name in such a process.
pub(crate) const ROLE: &str = "role";

/// The process, seen from outside.
pub(crate) struct Role {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Role {
    /// Starts one on a processor. Its sockets belong to the laboratory's cgroup: it is moved there before it makes any.
    pub(crate) fn start(lab: &Lab, net: &Net, cpu: usize) -> Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.args([ROLE, &cpu.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A child is in the namespace of the thread that makes it.
        let mut child = net.run(|| command.spawn()).context("start a process")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut role = Self {
            input: input.context("no pipe")?,
            output: BufReader::new(output.context("no pipe")?),
            child,
        };
        std::fs::write(lab.cgroup.join("cgroup.procs"), role.child.id().to_string())
            .context("move a process to its cgroup")?;
        role.ask("ready")?;
        Ok(role)
    }

    /// Lets the process do something and returns the numbers that it answers with.
    pub(crate) fn ask(&mut self, request: &str) -> Result<Vec<f64>> {
        writeln!(self.input, "{request}").context("ask a process")?;
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "{request}: the process is gone");
        if let Some(error) = line.strip_prefix("error ") {
            anyhow::bail!("{request}: {error}");
        }
        line.split_whitespace().map(|word| Ok(word.parse()?)).collect()
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process from inside.
pub(crate) fn run(cpu: &str) -> Result<()> {
    let mut cpus = CpuSet::new();
    let cpu: usize = cpu.parse()?;
    let have = std::thread::available_parallelism().map_or(1, usize::from);
    cpus.set(cpu % have).context("choose a processor")?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("stay on a processor")?;
    for line in std::io::stdin().lines() {
        let line = line?;
        match answer(&line) {
            Ok(numbers) => {
                let words: Vec<String> = numbers.iter().map(f64::to_string).collect();
                println!("{}", words.join(" "));
            }
            Err(error) => println!("error {error:#}"),
        }
    }
    Ok(())
}

fn answer(request: &str) -> Result<Vec<f64>> {
    let words: Vec<&str> = request.split_whitespace().collect();
    match words[..] {
        ["ready"] => Ok(vec![]),
        ["serve", address] => serve::streams(address.parse()?).map(|()| vec![]),
        ["sink", address] => serve::sink(address.parse()?).map(|()| vec![]),
        ["arrived"] => Ok(vec![serve::arrived()?]),
        [what, address, millis] => {
            load::run(what, address.parse()?, Duration::from_millis(millis.parse()?))
        }
        _ => anyhow::bail!("not understood"),
    }
}
