//! kubectl inside pods: exec, attach, cp and port-forward, each over WebSocket and over SPDY.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{at_once, output, wait_until};
use mesh_tests::process;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    exec_runs_commands,
    exec_carries_input,
    exec_may_end_before_its_input,
    exec_has_a_terminal,
    copies_files,
    attach_reaches_the_process,
    ports_are_forwarded,
    a_client_that_dies_ends_its_command,
    an_agent_that_dies_ends_sessions,
];

/// Much more than all buffers on the way.
const LARGE_BYTES: usize = 10 << 20;

/// What kubectl speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    WebSocket,
    Spdy,
}

const BOTH: [Wire; 2] = [Wire::WebSocket, Wire::Spdy];

/// kubectl as it will be run: it is ended when it takes too long.
fn kubectl(world: &World, wire: Wire, args: &[&str]) -> Command {
    let plain = world.kubectl.command();
    let mut command = Command::new("timeout");
    command.arg("100").arg(plain.get_program()).args(plain.get_args()).args(args);
    for variable in ["KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS"] {
        command.env(variable, (wire == Wire::WebSocket).to_string());
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How a command ended, and what it said.
struct Ran {
    code: Option<i32>,
    out: Vec<u8>,
    said: String,
}

fn run(world: &World, wire: Wire, args: &[&str], input: &[u8]) -> Result<Ran> {
    let mut child = kubectl(world, wire, args).stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let ended = thread::scope(|scope| {
        // It may end without having read everything.
        scope.spawn(move || drop((stdin.write_all(input), stdin)));
        child.wait_with_output()
    })?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    Ok(Ran { code: ended.status.code(), out: ended.stdout, said })
}

/// A running kubectl, ended with its test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn()?))
    }

    /// `timeout` passes the signal on.
    fn end(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }

    /// The next line that it prints.
    fn lines(&mut self) -> Result<impl Iterator<Item = std::io::Result<String>> + use<>> {
        Ok(BufReader::new(self.0.stdout.take().context("a pipe")?).lines())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for a line with this part.
fn read_until(
    lines: &mut impl Iterator<Item = std::io::Result<String>>,
    part: &str,
) -> Result<String> {
    for line in lines {
        let line = line?;
        if line.contains(part) {
            return Ok(line);
        }
    }
    anyhow::bail!("the output ended without {part:?}")
}

/// A pod to look into.
fn pod(world: &World) -> Result<()> {
    world.kubectl.apply(
        "
apiVersion: v1
kind: Pod
metadata:
  name: inside
  labels: {app: inside}
  annotations: {kubectl.kubernetes.io/default-container: shell}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: web, image: 'mesh.local/hello:1'}
  - {name: shell, image: 'mesh.local/busybox:1', command: [/bin/mesh-hello, pause]}
  - name: reader
    image: mesh.local/busybox:1
    stdin: true
    command: [/bin/sh, -c, 'while read line; do echo \"heard $line\"; done; exec /bin/mesh-hello pause']
  - name: terminal
    image: mesh.local/busybox:1
    stdin: true
    tty: true
    command: [/bin/sh]
",
    )?;
    world.kubectl.wait_ready("app=inside", 1, PATIENCE).map(drop)
}

fn exec_runs_commands(world: &World) -> Result<()> {
    pod(world)?;
    for wire in BOTH {
        let script = "echo out; echo err >&2; exit 7";
        let ran = run(world, wire, &["exec", "inside", "--", "/bin/sh", "-c", script], b"")?;
        ensure!(ran.out == b"out\n", "{wire:?}: {:?}", String::from_utf8_lossy(&ran.out));
        ensure!(ran.code == Some(7), "{wire:?}: {:?} {}", ran.code, ran.said);
        expect("standard error", &ran.said, "err\n")?;
        let args = ["exec", "inside", "-c", "web", "--", "/bin/mesh-hello", "help"];
        let ran = run(world, wire, &args, b"")?;
        ensure!(ran.code == Some(0) && !ran.out.is_empty(), "{wire:?}: {}", ran.said);
        for (args, why) in [
            (&["inside", "-c", "none", "--", "ls"][..], "none"),
            (&["outside", "--", "ls"], "not found"),
            (&["inside", "--", "/no/such/program"], "no such file"),
        ] {
            let ran = run(world, wire, &[&["exec"], args].concat(), b"")?;
            ensure!(
                ran.code.is_some_and(|c| c != 0 && c != 124),
                "{wire:?} {args:?}: {:?}",
                ran.code
            );
            expect(&format!("{wire:?} {args:?}"), &ran.said, why)?;
        }
    }
    Ok(())
}

fn exec_carries_input(world: &World) -> Result<()> {
    pod(world)?;
    let large: Vec<u8> = (0..LARGE_BYTES as u64).map(|i| ((i * i) >> 7) as u8).collect();
    for wire in BOTH {
        let ran = run(world, wire, &["exec", "-i", "inside", "--", "cat"], b"hi")?;
        ensure!(ran.code == Some(0) && ran.out == b"hi", "{wire:?}: {:?} {}", ran.code, ran.said);
        let ran = run(world, wire, &["exec", "-i", "inside", "--", "cat"], &large)?;
        ensure!(ran.code == Some(0), "{wire:?}: {:?} {}", ran.code, ran.said);
        ensure!(ran.out == large, "{wire:?}: {} bytes came back", ran.out.len());
        // Output that nobody reads at once.
        let mut slow = Running::start(&mut kubectl(
            world,
            wire,
            &["exec", "inside", "--", "head", "-c", &LARGE_BYTES.to_string(), "/dev/zero"],
        ))?;
        thread::sleep(Duration::from_secs(1));
        let mut all = Vec::new();
        slow.0.stdout.take().context("a pipe")?.read_to_end(&mut all)?;
        ensure!(all.len() == LARGE_BYTES, "{wire:?}: {} bytes", all.len());
    }
    Ok(())
}

fn exec_may_end_before_its_input(world: &World) -> Result<()> {
    pod(world)?;
    // More than the runtime holds for the command cannot be left over: containerd 1.6 never closes such a session.
    let input = vec![b'x'; 100_000];
    for wire in BOTH {
        let head = ["exec", "-i", "inside", "--", "head", "-c", "3"];
        let ran = run(world, wire, &head, &input)?;
        ensure!(ran.code == Some(0), "{wire:?} {:?}: {}", ran.code, ran.said);
        ensure!(ran.out == b"xxx", "{wire:?}: {:?}", String::from_utf8_lossy(&ran.out));
    }
    Ok(())
}

fn exec_has_a_terminal(world: &World) -> Result<()> {
    pod(world)?;
    let folder = world.scratch("terminal")?;
    for wire in BOTH {
        let inner = kubectl(world, wire, &["exec", "-it", "inside", "--", "/bin/sh"]);
        let words = inner.get_args().skip(1).map(|a| a.to_string_lossy().into_owned());
        let name = folder.join(format!("{wire:?}"));
        let line: Vec<String> = words.collect();
        let line = format!("tty > {}; exec {}", name.display(), line.join(" "));
        let mut script = Command::new("timeout");
        script.args(["100", "script", "-q", "-e", "-c", &line, "/dev/null"]);
        script.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
        script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut script = Running::start(&mut script)?;
        let mut keys = script.0.stdin.take().context("a pipe")?;
        let mut lines = script.lines()?;
        keys.write_all(b"test -t 0 && test -t 1 && echo is-a-term''inal\n")?;
        read_until(&mut lines, "is-a-terminal")?;
        // The size changes while the shell runs.
        let tty = fs::read_to_string(&name)?;
        for size in [("41", "137"), ("33", "99")] {
            output(Command::new("stty").args(["-F", tty.trim(), "rows", size.0, "cols", size.1]))?;
            let shown = format!("{} {}", size.0, size.1);
            keys.write_all(b"until test \"$(stty size)\" = \"")?;
            keys.write_all(shown.as_bytes())?;
            keys.write_all(b"\"; do sleep 0.1; done; echo now-it''-is $(stty size)\n")?;
            read_until(&mut lines, &format!("now-it-is {shown}"))?;
        }
        keys.write_all(b"exit 9\n")?;
        for line in lines.by_ref() {
            // Whatever the shell still says.
            line?;
        }
        let status = script.0.wait()?;
        ensure!(status.code() == Some(9), "{wire:?}: {status}");
    }
    Ok(())
}

fn copies_files(world: &World) -> Result<()> {
    pod(world)?;
    let folder = world.scratch("copies")?;
    let (there, back) = (folder.join("there"), folder.join("back"));
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 241) as u8).collect();
    fs::write(&there, &bytes)?;
    for wire in BOTH {
        let (local, again) = (there.display().to_string(), back.display().to_string());
        let remote = format!("inside:/tmp/{wire:?}");
        let ran = run(world, wire, &["cp", &local, &remote], b"")?;
        ensure!(ran.code == Some(0), "{wire:?}: {}", ran.said);
        let ran = run(world, wire, &["cp", &remote, &again], b"")?;
        ensure!(ran.code == Some(0), "{wire:?}: {}", ran.said);
        ensure!(fs::read(&back)? == bytes, "{wire:?}: the copy differs");
        fs::remove_file(&back)?;
    }
    Ok(())
}

fn attach_reaches_the_process(world: &World) -> Result<()> {
    pod(world)?;
    for wire in BOTH {
        let mut attach = kubectl(world, wire, &["attach", "-i", "inside", "-c", "reader"]);
        let mut attached = Running::start(attach.stdin(Stdio::piped()))?;
        let mut keys = attached.0.stdin.take().context("a pipe")?;
        let mut lines = attached.lines()?;
        for word in ["one", "two"] {
            writeln!(keys, "{word} {wire:?}")?;
            read_until(&mut lines, &format!("heard {word} {wire:?}"))?;
        }
        attached.end();
        // Whoever leaves does not end the process's input: the next one is heard, too.
        let ran = run(world, wire, &["logs", "inside", "-c", "reader"], b"")?;
        expect("log", &String::from_utf8_lossy(&ran.out), &format!("heard two {wire:?}"))?;
    }
    Ok(())
}

/// Forwards a port of a pod; the local one.
fn forward(world: &World, wire: Wire, pod: &str, port: u16) -> Result<(Running, u16)> {
    let ports = format!(":{port}");
    let mut running = Running::start(&mut kubectl(world, wire, &["port-forward", pod, &ports]))?;
    let mut lines = running.lines()?;
    let line = lines.next().context("kubectl port-forward ended")??;
    // It tells of each connection, and would end if nobody read it.
    thread::spawn(move || lines.for_each(drop));
    let local = line.split_whitespace().find_map(|w| w.strip_prefix("127.0.0.1:"));
    let local = local.and_then(|p| p.parse().ok()).with_context(|| line.clone())?;
    Ok((running, local))
}

fn ports_are_forwarded(world: &World) -> Result<()> {
    pod(world)?;
    world.kubectl.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: on-the-node, labels: {app: on-the-node}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: mesh.local/hello:1
    args: [serve, --http, '18080', --tcp, '19000', --udp, '19001']
",
    )?;
    world.kubectl.wait_ready("app=on-the-node", 1, PATIENCE)?;
    let large: Vec<u8> = (0..LARGE_BYTES as u64).map(|i| ((i * 7) >> 3) as u8).collect();
    for wire in BOTH {
        for (pod, http, echo) in [("inside", 8080, 9000), ("on-the-node", 18080, 19000)] {
            let (_web, local) = forward(world, wire, pod, http)?;
            at_once(0..40, |_| {
                let url = format!("http://127.0.0.1:{local}/");
                let answer = output(Command::new("curl").args(["-fsS", "-m", "60", &url]))?;
                expect(pod, &answer, "version")
            })?;
            let (_echo, local) = forward(world, wire, pod, echo)?;
            let mut stream =
                TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, local).into(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let (mut writer, bytes) = (stream.try_clone()?, large.clone());
            let writing = thread::spawn(move || {
                writer.write_all(&bytes).and_then(|()| writer.shutdown(Shutdown::Write))
            });
            let mut back = vec![0; large.len()];
            stream.read_exact(&mut back).with_context(|| format!("{wire:?} {pod}"))?;
            ensure!(back == large, "{wire:?}: bytes of {pod} were altered");
            writing.join().ok().context("the writer panicked")??;
        }
        let (_refused, local) = forward(world, wire, "inside", 5)?;
        let url = format!("http://127.0.0.1:{local}/");
        let curl = output(Command::new("curl").args(["-fsS", "-m", "60", &url]));
        ensure!(curl.is_err(), "{wire:?}: a port on which nobody listens answers");
    }
    world.clean(&["pod/on-the-node"])
}

fn a_client_that_dies_ends_its_command(world: &World) -> Result<()> {
    pod(world)?;
    for wire in BOTH {
        let file = format!("/ended-{wire:?}");
        let script = format!("rm -f {file}; echo begun; cat; echo yes > {file}");
        let args = ["exec", "-i", "inside", "--", "/bin/sh", "-c", &script];
        let mut running = Running::start(kubectl(world, wire, &args).stdin(Stdio::piped()))?;
        read_until(&mut running.lines()?, "begun")?;
        // kubectl itself, not the program that bounds its time.
        let bound = Pid::from_raw(i32::try_from(running.0.id())?);
        for client in process::children_of(bound) {
            kill(client, Signal::SIGKILL)?;
        }
        let what = format!("{wire:?}: the command's input ends");
        wait_until(&what, PATIENCE, || {
            let ran = run(world, wire, &["exec", "inside", "--", "cat", &file], b"")?;
            ensure!(ran.out == b"yes\n", "{}", ran.said);
            Ok(())
        })?;
    }
    Ok(())
}

fn an_agent_that_dies_ends_sessions(world: &World) -> Result<()> {
    pod(world)?;
    let seen = world.kubectl.json(&["pod", "inside"])?;
    let name = seen["spec"]["nodeName"].as_str().context("it is on a node")?.to_owned();
    let nodes = world.cluster.nodes();
    let node = nodes.iter().find(|n| n.name() == name).context("a node of ours")?;
    for wire in BOTH {
        let args = ["exec", "-i", "inside", "--", "/bin/sh", "-c", "echo begun; cat"];
        let mut running = Running::start(kubectl(world, wire, &args).stdin(Stdio::piped()))?;
        let _keys = running.0.stdin.take();
        read_until(&mut running.lines()?, "begun")?;
        let mut said = running.0.stderr.take().context("a pipe")?;
        node.agent().kill()?;
        let ended = wait_until("kubectl ends", PATIENCE, || {
            running.0.try_wait()?.context("it still runs")
        })?;
        let mut why = String::new();
        said.read_to_string(&mut why)?;
        println!("  {wire:?}: {ended}: {}", why.trim());
        // SPDY has no word for a session that broke: kubectl takes the end of all streams for success.
        ensure!(wire == Wire::Spdy || !ended.success(), "{why}");
        world.cluster.restart_agent(node, &world.artifacts)?;
        wait_until("the agent opens sessions again", PATIENCE, || {
            let ran = run(world, wire, &["exec", "inside", "--", "echo", "back"], b"")?;
            ensure!(ran.out == b"back\n", "{}", ran.said);
            Ok(())
        })?;
    }
    world.clean(&["pod/inside"])
}
