//! From the object to loaded programs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader};
use mesh_abi as abi;

use super::bpffs::{BpffsError, Pins};
use super::link::AttachError;
use super::{LoadOptions, golden};

/// Bytes with the alignment that ELF parsing needs.
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/mesh.bpf.o")));

/// The object that was built into this crate; may be empty.
pub(super) static OBJECT: &[u8] = &ALIGNED.0;

/// The programs could not be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// This build has no programs.
    #[error("this build contains no eBPF programs: run `cargo xtask build-ebpf` and build again")]
    NoObject,
    /// The directory of pins cannot be used.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// The object was refused, or a map not made.
    #[error("load the eBPF object")]
    Object(#[source] Box<EbpfError>),
    /// The object lacks a program.
    #[error("the eBPF object lacks program {0}")]
    MissingProgram(&'static str),
    /// The verifier refused a program; its log is in the cause.
    #[error("load program {name}")]
    Program {
        /// The program.
        name: &'static str,
        /// The cause, with the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// A program does not do with a packet what it has to.
    #[error("{program} is wrong: on {case:?} it says {seen}, not {expected}")]
    Golden {
        /// The program.
        program: &'static str,
        /// The packet.
        case: &'static str,
        /// The verdict that is right.
        expected: u32,
        /// Its verdict.
        seen: u32,
    },
    /// A golden packet could not be run.
    #[error("run the golden packet {case:?}")]
    GoldenRun {
        /// The packet.
        case: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The maps for golden packets could not be filled.
    #[error("fill the maps for golden packets")]
    GoldenMaps(#[source] io::Error),
    /// A map cannot be opened.
    #[error("open map {name}")]
    OpenMap {
        /// The map.
        name: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What is pinned has another layout.
    #[error("{path} is not the map {name} of this version: remove it")]
    ForeignMap {
        /// The map.
        name: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The generations of policies could not be told from those of another version.
    #[error("go on with the generations of another version's policies")]
    Generation(#[source] io::Error),
    /// The cgroup directory cannot be opened.
    #[error("open cgroup {path}")]
    Cgroup {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A program could not be attached.
    #[error("attach {name}")]
    Attach {
        /// Program or link.
        name: String,
        /// The cause.
        #[source]
        source: AttachError,
    },
}

/// All programs that the object must have.
const PROGRAMS: [&str; 13] = [
    abi::programs::CONNECT4,
    abi::programs::CONNECT6,
    abi::programs::SENDMSG4,
    abi::programs::SENDMSG6,
    abi::programs::RECVMSG4,
    abi::programs::RECVMSG6,
    abi::programs::GETPEERNAME4,
    abi::programs::GETPEERNAME6,
    abi::programs::FROM_POD,
    abi::programs::FROM_OVERLAY,
    abi::programs::FROM_UPLINK,
    abi::programs::TO_UPLINK,
    abi::programs::TO_POD,
];

/// Programs that only tell: a kernel that refuses them still gets all the others.
const OPTIONAL: [&str; 2] = [abi::programs::SOCK_OPS, abi::programs::KERNEL_DROP];

/// What was loaded.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) programs: BTreeMap<&'static str, OwnedFd>,
    /// Numbers of verified instructions.
    pub(super) instructions: BTreeMap<&'static str, u32>,
    /// Optional programs that were refused, and why.
    pub(super) lacking: Vec<String>,
}

/// Loads every program on the pinned maps.
pub(super) fn load(pins: &Pins, options: &LoadOptions) -> Result<Loaded, LoadError> {
    let object = options.object.as_deref().unwrap_or(OBJECT);
    if object.is_empty() {
        return Err(LoadError::NoObject);
    }
    golden::check(object)?;
    let mut loader = EbpfLoader::new();
    for (name, ..) in abi::maps::ALL {
        loader.map_pin_path(name, pins.map(name));
    }
    for (name, entries) in &options.capacities {
        loader.map_max_entries(name, *entries);
    }
    let mut ebpf = loader.load(object).map_err(|error| LoadError::Object(Box::new(error)))?;
    let mut loaded = Loaded::default();
    for name in PROGRAMS.into_iter().chain(OPTIONAL) {
        match load_one(&mut ebpf, name) {
            Ok((fd, count)) => {
                loaded.programs.insert(name, fd);
                loaded.instructions.extend(count.map(|count| (name, count)));
            }
            Err(error) if OPTIONAL.contains(&name) => loaded.lacking.push(in_full(&error)),
            Err(error) => return Err(error),
        }
    }
    Ok(loaded)
}

/// An error with its causes, of which the verifier's log is one.
fn in_full(error: &LoadError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

pub(super) fn load_one(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<(OwnedFd, Option<u32>), LoadError> {
    let failed = |error| LoadError::Program { name, source: Box::new(error) };
    let program = ebpf.program_mut(name).ok_or(LoadError::MissingProgram(name))?;
    match program {
        Program::CgroupSockAddr(program) => program.load().map_err(failed)?,
        Program::SchedClassifier(program) => program.load().map_err(failed)?,
        Program::SockOps(program) => program.load().map_err(failed)?,
        Program::RawTracePoint(program) => program.load().map_err(failed)?,
        _ => return Err(LoadError::MissingProgram(name)),
    }
    let fd = program.fd().map_err(failed)?.as_fd().try_clone_to_owned();
    let fd = fd.map_err(|error| failed(ProgramError::IOError(error)))?;
    let count = program.info().ok().and_then(|info| info.verified_instruction_count());
    Ok((fd, count))
}
