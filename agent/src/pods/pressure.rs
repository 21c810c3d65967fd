//! Whether the node runs out of memory, disk or process identifiers: what is left, what there must be, and the
//! verdict. Pure but for [`Readings::read`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A pressure is told for this long after it was seen last, so that a node does not swing between both.
const HOLD: Duration = Duration::from_secs(300);
/// What a node keeps free unless it is told otherwise: the kubelet's defaults, and identifiers of processes.
pub const DEFAULT_EVICTION: &str = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,imagefs.inodesFree<5%,pid.available<5%";

/// Something that can run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Resource {
    Memory,
    Disk,
    Pids,
}

impl Resource {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Disk, Self::Pids];

    /// As the API names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Pids => "pids",
        }
    }
}

/// What is measured, in the words of the kubelet's `evictionHard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Signal {
    Memory,
    NodeDisk,
    NodeInodes,
    ImageDisk,
    ImageInodes,
    Pids,
}

impl Signal {
    const ALL: [(&'static str, Self); 6] = [
        ("memory.available", Self::Memory),
        ("nodefs.available", Self::NodeDisk),
        ("nodefs.inodesFree", Self::NodeInodes),
        ("imagefs.available", Self::ImageDisk),
        ("imagefs.inodesFree", Self::ImageInodes),
        ("pid.available", Self::Pids),
    ];

    fn resource(self) -> Resource {
        match self {
            Self::Memory => Resource::Memory,
            Self::Pids => Resource::Pids,
            _ => Resource::Disk,
        }
    }
}

/// How much there must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Least {
    Amount(u64),
    Percent(u64),
}

/// What a node keeps free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Thresholds(Vec<(Signal, Least)>);

impl Thresholds {
    /// The node keeps nothing free: nobody looks at it.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The text does not say what to keep free.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not SIGNAL<AMOUNT, such as memory.available<100Mi or nodefs.available<10%")]
pub struct InvalidThreshold(String);

impl std::str::FromStr for Thresholds {
    type Err = InvalidThreshold;

    /// The form of the kubelet's `--eviction-hard`; empty keeps nothing free.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(threshold).collect::<Result<_, _>>().map(Self)
    }
}

fn threshold(text: &str) -> Result<(Signal, Least), InvalidThreshold> {
    let invalid = || InvalidThreshold(text.to_owned());
    let (name, amount) = text.split_once('<').ok_or_else(invalid)?;
    let (_, signal) = Signal::ALL.into_iter().find(|(n, _)| *n == name).ok_or_else(invalid)?;
    let least = match amount.strip_suffix('%') {
        Some(percent) => {
            let percent = percent.parse().ok().filter(|p| (1..100).contains(p));
            Least::Percent(percent.ok_or_else(invalid)?)
        }
        None => {
            let amount = k8s_openapi::apimachinery::pkg::api::resource::Quantity(amount.to_owned());
            let bytes = super::quantity::bytes(&amount).ok();
            Least::Amount(bytes.and_then(|b| u64::try_from(b).ok()).ok_or_else(invalid)?)
        }
    };
    Ok((signal, least))
}

/// How much there is of something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stock {
    pub(crate) left: u64,
    pub(crate) all: u64,
}

/// A file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FileSystem {
    pub(crate) bytes: Stock,
    pub(crate) inodes: Stock,
}

/// What the node has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Readings {
    pub(crate) memory: Stock,
    pub(crate) node: FileSystem,
    pub(crate) images: FileSystem,
    pub(crate) pids: Stock,
}

impl Readings {
    /// Measures. What cannot be measured has no size, and never runs out.
    pub(crate) fn read(node: &Path, images: Option<&PathBuf>) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let number = |path: &str| text(path).trim().parse::<u64>().unwrap_or(u64::MAX);
        let most = number("/proc/sys/kernel/pid_max").min(number("/proc/sys/kernel/threads-max"));
        let node = file_system(node);
        Self {
            memory: memory(&text("/proc/meminfo")),
            node,
            images: images.map_or(node, |path| file_system(path)),
            pids: pids(&text("/proc/loadavg"), most),
        }
    }

    fn of(&self, signal: Signal) -> Stock {
        match signal {
            Signal::Memory => self.memory,
            Signal::NodeDisk => self.node.bytes,
            Signal::NodeInodes => self.node.inodes,
            Signal::ImageDisk => self.images.bytes,
            Signal::ImageInodes => self.images.inodes,
            Signal::Pids => self.pids,
        }
    }
}

fn file_system(path: &Path) -> FileSystem {
    let Ok(stat) = nix::sys::statvfs::statvfs(path) else { return FileSystem::default() };
    let block = stat.fragment_size();
    FileSystem {
        bytes: Stock {
            left: stat.blocks_available().saturating_mul(block),
            all: stat.blocks().saturating_mul(block),
        },
        inodes: Stock { left: stat.files_available(), all: stat.files() },
    }
}

fn memory(meminfo: &str) -> Stock {
    let field = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let kib = rest.and_then(|r| r.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    Stock { left: field("MemAvailable:"), all: field("MemTotal:") }
}

/// The fourth field of /proc/loadavg has the number of threads (proc(5)).
fn pids(loadavg: &str, most: u64) -> Stock {
    let field = loadavg.split_whitespace().nth(3).and_then(|f| f.split_once('/'));
    let threads = field.and_then(|(_, all)| all.parse::<u64>().ok());
    threads
        .map_or(Stock::default(), |threads| Stock { left: most.saturating_sub(threads), all: most })
}

/// What the node runs out of at this moment.
pub(crate) fn short_of(thresholds: &Thresholds, readings: &Readings) -> Vec<Resource> {
    let is_short = |(signal, least): &&(Signal, Least)| {
        let Stock { left, all } = readings.of(*signal);
        let least = match least {
            Least::Amount(amount) => *amount,
            Least::Percent(percent) => all / 100 * percent,
        };
        all > 0 && left < least
    };
    let mut short: Vec<Resource> =
        thresholds.0.iter().filter(is_short).map(|(signal, _)| signal.resource()).collect();
    short.sort_unstable();
    short.dedup();
    short
}

/// What the node tells of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressures {
    /// Memory is short, or was a moment ago.
    pub memory: bool,
    /// A disk is full, or was.
    pub disk: bool,
    /// Identifiers of processes are short, or were.
    pub pids: bool,
}

/// When each pressure was seen last.
#[derive(Debug, Default)]
pub(crate) struct History([Option<Instant>; 3]);

impl History {
    /// Notes what the node is short of now; what it tells.
    pub(crate) fn note(&mut self, short: &[Resource], now: Instant) -> Pressures {
        let told = Resource::ALL.map(|resource| {
            let seen = &mut self.0[resource as usize];
            if short.contains(&resource) {
                *seen = Some(now);
            }
            seen.is_some_and(|at| now.saturating_duration_since(at) < HOLD)
        });
        Pressures { memory: told[0], disk: told[1], pids: told[2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings() -> Readings {
        let stock = |left, all| Stock { left, all };
        let disk = FileSystem { bytes: stock(50 << 30, 100 << 30), inodes: stock(90, 100) };
        Readings {
            memory: stock(1 << 30, 4 << 30),
            node: disk,
            images: disk,
            pids: stock(30_000, 32_768),
        }
    }

    #[test]
    fn what_is_below_its_threshold_is_short() {
        let thresholds: Thresholds = DEFAULT_EVICTION.parse().unwrap();
        assert_eq!(short_of(&thresholds, &readings()), []);
        let mut low = readings();
        low.memory.left = 99 << 20;
        assert_eq!(short_of(&thresholds, &low), [Resource::Memory]);
        low.images.bytes.left = 14 << 30;
        low.node.inodes.left = 1;
        assert_eq!(short_of(&thresholds, &low), [Resource::Memory, Resource::Disk]);
        low.pids.left = 100;
        assert_eq!(short_of(&thresholds, &low).len(), 3);
        assert_eq!(short_of(&"".parse().unwrap(), &low), []);
        assert_eq!(short_of(&thresholds, &Readings::default()), [], "nothing could be measured");
    }

    #[test]
    fn thresholds_are_read_as_the_kubelet_does() {
        for wrong in ["memory", "memory.available<", "swap<1", "nodefs.available<100%", "a<1,b"] {
            assert!(wrong.parse::<Thresholds>().is_err(), "{wrong}");
        }
        let two: Thresholds = "memory.available<1Gi, pid.available<10%".parse().unwrap();
        assert_eq!(
            two.0,
            [(Signal::Memory, Least::Amount(1 << 30)), (Signal::Pids, Least::Percent(10))]
        );
    }

    #[test]
    fn a_pressure_is_told_for_a_while() {
        let (mut history, start) = (History::default(), Instant::now());
        assert_eq!(history.note(&[], start), Pressures::default());
        assert!(history.note(&[Resource::Disk], start).disk);
        let almost = start + HOLD - Duration::from_secs(1);
        let told = history.note(&[], almost);
        assert!(told.disk && !told.memory);
        assert!(!history.note(&[], start + HOLD).disk);
    }

    #[test]
    fn this_machine_can_be_measured() {
        let here = Readings::read(Path::new("/"), None);
        for stock in [here.memory, here.node.bytes, here.pids] {
            assert!(stock.all > 0 && stock.left <= stock.all, "{here:?}");
        }
        assert_eq!(pids("0.1 0.2 0.3 12/188 5298", 1000), Stock { left: 812, all: 1000 });
        assert_eq!(pids("", 1000), Stock::default());
    }
}
