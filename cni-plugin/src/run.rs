//! One execution: from the environment to what is printed.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::config::{self, NetworkConfig};
use crate::input::{self, Command, Environment};
use crate::version::Version;
use crate::wire::{Code, Failure, Owner, Reply, Request};
use crate::wishes::{dns, wishes};
use crate::{call, queue, result};

/// Less than the 5 s that a runtime may expect, together with everything else.
const LIMIT: Duration = Duration::from_millis(4500);

/// What the process prints, and how it ends.
#[derive(Debug)]
pub struct Outcome {
    /// For standard output.
    pub stdout: String,
    /// For standard error.
    pub stderr: String,
    /// Whether the exit status is 0.
    pub ok: bool,
}

impl Outcome {
    fn value(value: &Value) -> Self {
        Self { stdout: format!("{value}\n"), stderr: String::new(), ok: true }
    }

    fn silent() -> Self {
        Self { stdout: String::new(), stderr: String::new(), ok: true }
    }

    fn error(failure: &Failure, version: &str) -> Self {
        Self {
            stdout: format!("{}\n", result::error(failure, version)),
            stderr: String::new(),
            ok: false,
        }
    }
}

/// Does what the environment asks for, with the configuration on standard input.
pub fn run(environment: Environment<'_>) -> Outcome {
    let newest = crate::version::SUPPORTED[0].as_str();
    let command = match Command::from_environment(environment) {
        Ok(Some(Command::Version)) => return Outcome::value(&result::versions(asked())),
        Ok(Some(command)) => command,
        Ok(None) => return about(),
        Err(failure) => return Outcome::error(&failure, newest),
    };
    let request = match prepare(command, environment) {
        Ok(request) => request,
        Err(failure) => return Outcome::error(&failure, newest),
    };
    let keys = match input().and_then(config::read).and_then(|bytes| config::parse(&bytes)) {
        Ok(keys) => keys,
        Err(failure) => return Outcome::error(&failure, newest),
    };
    let named = keys.get("cniVersion").and_then(Value::as_str).unwrap_or(newest).to_owned();
    match NetworkConfig::new(keys).and_then(|config| execute(request, &config)) {
        Ok(outcome) => outcome,
        Err(failure) => Outcome::error(&failure, &named),
    }
}

/// The version that the one who asks for ours speaks: the newest, unless its input says something else that makes sense.
fn asked() -> Version {
    let keys = input().and_then(config::read).and_then(|bytes| config::parse(&bytes));
    let keys = keys.unwrap_or_default();
    let named = keys.get("cniVersion").and_then(Value::as_str);
    named.and_then(|text| Version::parse(Some(text)).ok()).unwrap_or(crate::version::SUPPORTED[0])
}

/// Standard input without a buffer, so that what has not been read is known to be still in the descriptor.
fn input() -> Result<File, Failure> {
    let own = std::io::stdin().as_fd().try_clone_to_owned();
    own.map(File::from)
        .map_err(|error| Failure::new(Code::Io, "read standard input", error.to_string()))
}

fn about() -> Outcome {
    let stderr = format!(
        "mesh-cni {}: the CNI plugin of Mesh, speaks {}.\n\
         It is run by a container runtime with CNI_COMMAND and a configuration on standard input.\n",
        env!("CARGO_PKG_VERSION"),
        crate::version::SUPPORTED.map(Version::as_str).join(", "),
    );
    Outcome { stdout: String::new(), stderr, ok: true }
}

/// The part of a request that the environment alone decides.
enum Prepared {
    Add { owner: Owner, netns: PathBuf, arguments: input::Arguments },
    Del { owner: Owner },
    Check { owner: Owner, netns: PathBuf },
    Gc,
    Status,
}

fn prepare(command: Command, environment: Environment<'_>) -> Result<Prepared, Failure> {
    let inside = || -> Result<(Owner, PathBuf), Failure> {
        let (owner, netns) = input::attachment(environment, true)?;
        Ok((owner, netns.expect("asked for: absence is an error")))
    };
    Ok(match command {
        Command::Add => {
            let (owner, netns) = inside()?;
            Prepared::Add { owner, netns, arguments: input::arguments(environment)? }
        }
        Command::Del => Prepared::Del { owner: input::attachment(environment, false)?.0 },
        Command::Check => {
            let (owner, netns) = inside()?;
            Prepared::Check { owner, netns }
        }
        Command::Gc => Prepared::Gc,
        Command::Status | Command::Version => Prepared::Status,
    })
}

fn execute(prepared: Prepared, config: &NetworkConfig) -> Result<Outcome, Failure> {
    let mut wrong = vec![];
    let request = match prepared {
        Prepared::Add { owner, netns, mut arguments } => {
            config.refuse_unknown_keys()?;
            config.previous()?;
            let pod = arguments.pod.take();
            let wishes = wishes(config, arguments)?;
            Request::Add { owner, netns, pod, wishes }
        }
        Prepared::Del { owner } => return release(owner, config),
        Prepared::Check { owner, netns } => {
            config.version.require(Version::V040, "CHECK")?;
            config.refuse_unknown_keys()?;
            let addresses = config.previous_addresses(&owner.interface)?;
            Request::Check { owner, netns, addresses }
        }
        Prepared::Gc => {
            config.version.require(Version::V110, "GC")?;
            let (keep, malformed) = config.valid_attachments()?;
            wrong = malformed;
            Request::Gc { network: config.name.clone(), keep }
        }
        Prepared::Status => {
            config.version.require(Version::V110, "STATUS")?;
            config.refuse_unknown_keys()?;
            Request::Status
        }
    };
    let down = if request == Request::Status { Code::NotAvailable } else { Code::TryAgain };
    let reply = call::call(&config.socket, &request, LIMIT);
    if !wrong.is_empty() {
        if let Ok(Reply::Failed(failure)) = &reply {
            wrong.push(format!("{}: {}", failure.msg, failure.details));
        }
        let message = "malformed entries in the list of valid attachments";
        return Err(Failure::new(Code::Config, message, wrong.join("; ")));
    }
    match reply {
        Ok(Reply::Done) => Ok(Outcome::silent()),
        Ok(Reply::Attached(attachment)) => {
            let own = result::success(&attachment, config.version, dns(config)?);
            Ok(Outcome::value(&result::after(config.previous()?, own)))
        }
        Ok(Reply::Failed(failure)) => Err(failure),
        Err(error) => Err(unreachable(down, config, &error)),
    }
}

/// DEL succeeds when the agent has released the addresses, or will certainly do so.
fn release(owner: Owner, config: &NetworkConfig) -> Result<Outcome, Failure> {
    let request = Request::Del { owner: owner.clone() };
    match call::call(&config.socket, &request, LIMIT) {
        Ok(Reply::Failed(failure)) => Err(failure),
        Ok(_) => Ok(Outcome::silent()),
        Err(error) => match queue::push(&config.state_dir, &owner) {
            Ok(()) => Ok(Outcome::silent()),
            Err(not_queued) => {
                let mut failure = unreachable(Code::TryAgain, config, &error);
                failure.details += &format!("; not queued either: {not_queued}");
                Err(failure)
            }
        },
    }
}

fn unreachable(code: Code, config: &NetworkConfig, error: &std::io::Error) -> Failure {
    let details = format!("{}: {error}; is mesh-agent running?", config.socket.display());
    Failure::new(code, "the agent does not answer", details)
}
