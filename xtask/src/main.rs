//! Every developer command: `cargo xtask help`.
//!
//! Owns: installing tools, building, the local cluster's life, the test suites.
//! Never does: anything that a production machine needs; that is `meshctl` and the agent.
#![forbid(unsafe_code)]

mod alone;
mod bench;
mod ebpf;
mod fuzz;
mod local;
mod package;
mod programs;
mod prove;
mod say;
mod soak;
mod soak_cni;
mod status;
mod suite;
mod tools;
mod vm;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Developer commands of Mesh.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    max_term_width = 100,
    after_help = "Start here:\n  cargo xtask up      a three-node cluster on this machine\n  cargo xtask test    everything that CI runs\n  cargo xtask down    removes the cluster"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing, build, start a local cluster and prove that it works
    #[command(
        after_help = "Run it again after a change: only what changed is restarted.\n\nExamples:\n  cargo xtask up\n  cargo xtask up --nodes 5"
    )]
    Up(UpArgs),
    /// Remove the local cluster with all its traces; twice is fine
    Down,
    /// Show the local cluster's processes, their memory, and its nodes
    Status,
    /// Run a command on a node: in its network, with its services
    #[command(
        after_help = "Examples:\n  cargo xtask exec node-2 -- ip route\n  cargo xtask exec node-1 -- curl -s http://10.96.0.10:53"
    )]
    Exec(ExecArgs),
    /// Show a log: of a node's agent and workers, of its containerd, or of the control service
    #[command(
        after_help = "Examples:\n  cargo xtask logs node-2 -f\n  cargo xtask logs node-2 --of containerd\n  cargo xtask logs control"
    )]
    Logs(LogsArgs),
    /// Run the tests: unit, program and end-to-end
    #[command(
        after_help = "With CI set, a test that cannot run on this machine is a failure.\n\nExamples:\n  cargo xtask test\n  cargo xtask test --unit\n  cargo xtask test --e2e kill"
    )]
    Test(TestArgs),
    /// Measure tunnels, services, the CNI plugin, pods' start, memory
    #[command(
        after_help = "`pods`, `start` and `memory` need a cluster: cargo xtask up --release\nThings to compare are measured in turns; the median of the rounds is printed.\n\nExamples:\n  cargo xtask bench\n  cargo xtask bench overlay --rounds 5 -o overlay.json\n  cargo xtask bench lb --rounds 21 --slow --sync-others 5000x50"
    )]
    Bench(BenchArgs),
    /// Feed the packet path with rubbish, for a time; needs no root
    #[command(
        after_help = "What was found interesting is kept in overlay/fuzz/corpus, what broke it in overlay/fuzz/artifacts.\n\nExamples:\n  cargo xtask fuzz\n  cargo xtask fuzz datagrams --secs 3600"
    )]
    Fuzz(FuzzArgs),
    /// Add and remove pods' interfaces for a long time, with an agent that is killed again and again, and look for leftovers
    #[command(
        after_help = "Needs a build (cargo xtask build), no cluster.\n\nExamples:\n  cargo xtask soak-cni --cycles 10000"
    )]
    SoakCni(SoakCniArgs),
    /// Make and delete many pods on the local cluster: agents may not grow, nothing may be left
    #[command(
        after_help = "It needs a cluster: cargo xtask up\nExit status 1 when an agent has grown by more than 5 % since the first fifth, or when a container, an interface or a\nfile is left.\n\nExamples:\n  cargo xtask soak\n  cargo xtask soak --cycles 100 --batch 10"
    )]
    Soak(SoakArgs),
    /// Build the eBPF programs into target/bpf/mesh.bpf.o, when their sources changed
    BuildEbpf,
    /// Build the eBPF programs and all binaries that a cluster runs
    Build(Profile),
    /// Make Debian packages of what a release build made: mesh-control, mesh-agent, meshctl
    #[command(after_help = "They are written to target/packages.")]
    Package,
    /// A cluster of virtual machines, for other kernels, systemd and reboots
    #[command(
        subcommand,
        after_help = "Where the processor cannot virtualise, machines are emulated: minutes for seconds.\nEverything made for them is in target/vm.\n\nExamples:\n  cargo xtask vm up --release\n  cargo xtask vm test\n  cargo xtask vm down"
    )]
    Vm(vm::VmCommand),
    /// Install what building and running need, each when it is missing
    Tools,
    /// Run what CI runs: .ci/run
    Ci,
}

#[derive(Args)]
struct Profile {
    /// Optimised: slower to build; for measurements
    #[arg(long)]
    release: bool,
}

#[derive(Args)]
struct UpArgs {
    /// How many nodes, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    nodes: u8,
    /// Third octet of the underlay, 10.213.N.0/24
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=250))]
    subnet: u8,
    /// Take the programs as they are, without building
    #[arg(long)]
    no_build: bool,
    #[command(flatten)]
    profile: Profile,
}

#[derive(Args)]
struct ExecArgs {
    /// node-1, node-2, ...
    node: String,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

#[derive(Args)]
struct LogsArgs {
    /// node-1, node-2, ... or control
    node: String,
    /// Go on as the log grows
    #[arg(short, long)]
    follow: bool,
    /// Which program's log
    #[arg(long, value_parser = ["agent", "containerd"], default_value = "agent")]
    of: String,
}

#[derive(Args)]
struct TestArgs {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only what needs no cluster and no root
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end tests
    #[arg(long)]
    e2e: bool,
}

#[derive(Args)]
struct SoakCniArgs {
    /// How often a pod comes and goes
    #[arg(long, value_name = "N", default_value_t = 1000)]
    cycles: usize,
    /// After how many cycles the agent is killed, at some moment of the next; 0 for never
    #[arg(long, value_name = "N", default_value_t = 20)]
    kill_every: usize,
}

#[derive(Args)]
struct BenchArgs {
    /// What to measure; all when absent
    what: Vec<bench::Part>,
    /// How often each thing is measured [default: 3; of lb, whose turns are short, 7]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Length of one measurement
    #[arg(long, value_name = "N", default_value_t = 3)]
    secs: u64,
    /// Target folder of another release build, which `cni` measures in turns with this one
    #[arg(long, value_name = "DIR")]
    against: Option<std::path::PathBuf>,
    /// File for every single figure of `overlay`, one JSON object per line
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    out: Option<std::path::PathBuf>,
    #[command(flatten)]
    lb: bench::LbArgs,
}

#[derive(Args)]
struct FuzzArgs {
    /// What to feed; all when absent
    what: Vec<fuzz::Target>,
    /// How long each
    #[arg(long, value_name = "N", default_value_t = 300)]
    secs: u64,
}

#[derive(Args)]
struct SoakArgs {
    /// How many pods
    #[arg(long, value_name = "N", default_value_t = 1000)]
    cycles: usize,
    /// How many at a time
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100))]
    batch: usize,
    /// The cluster runs a release build
    #[arg(long)]
    release: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Up(args) => local::up(&args),
        Command::Down => local::down(),
        Command::Status => status::print(),
        Command::Exec(args) => return code(local::exec(&args.node, &args.command)),
        Command::Logs(args) => return code(local::logs(&args.node, &args.of, args.follow)),
        Command::Test(args) => {
            let parts = suite::Parts { unit: !args.e2e, e2e: !args.unit };
            suite::run(parts, args.filter.as_deref())
        }
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args.what, args.secs),
        Command::SoakCni(args) => soak_cni::run(args.cycles, args.kill_every),
        Command::Soak(args) => soak::run(&args),
        Command::BuildEbpf => tools::ensure_ebpf().and_then(|()| ebpf::build()),
        Command::Build(profile) => tools::ensure().and_then(|()| programs::build(profile.release)),
        Command::Package => make_packages(),
        Command::Vm(command) => vm::run(&command),
        Command::Tools => tools::ensure(),
        Command::Ci => suite::ci(),
    };
    code(done.map(|()| ExitCode::SUCCESS))
}

fn make_packages() -> anyhow::Result<()> {
    tools::ensure()?;
    programs::build(true)?;
    for path in package::write(&mesh_tests::Artifacts::locate(true), &package::folder())? {
        println!("{}", path.display());
    }
    Ok(())
}

fn code(done: anyhow::Result<ExitCode>) -> ExitCode {
    match done {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_command_exists() {
        mesh_tests::documented::assert_exist("cargo xtask", super::Cli::try_parse_from);
    }
}
