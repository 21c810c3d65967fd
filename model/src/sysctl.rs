//! Names of the sysctls that a pod can set: those that are a namespace's own.

/// What a pod shares with its node, or has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Shared memory, semaphores and message queues.
    Ipc,
    /// The network.
    Net,
}

impl Namespace {
    /// As Kubernetes names it in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipc => "IPC",
            Self::Net => "Net",
        }
    }
}

const PREFIXES: [(&str, Namespace); 4] = [
    ("kernel.shm", Namespace::Ipc),
    ("kernel.msg", Namespace::Ipc),
    ("fs.mqueue.", Namespace::Ipc),
    ("net.", Namespace::Net),
];
const LONGEST_NAME_BYTES: usize = 253;

/// The name with dots between its parts. Where it has slashes between them, dots belong to the parts, and the other way round (sysctl(8)).
pub fn normalized(name: &str) -> String {
    if name.find(['.', '/']).is_none_or(|at| name[at..].starts_with('.')) {
        return name.to_owned();
    }
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    name.chars().map(swapped).collect()
}

/// The namespace that a sysctl of that normalized name belongs to; none for one of the whole machine.
pub fn namespace(name: &str) -> Option<Namespace> {
    if name == "kernel.sem" {
        return Some(Namespace::Ipc);
    }
    PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, namespace)| *namespace)
}

/// Whether it can be the name of a sysctl, with dots or slashes between its parts.
pub fn is_name(name: &str) -> bool {
    let is_plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_part = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(is_plain)
            && bytes.last().is_some_and(is_plain)
            && bytes.iter().all(|b| is_plain(b) || matches!(b, b'-' | b'_'))
    };
    name.len() <= LONGEST_NAME_BYTES && name.split(['.', '/']).all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_in_two_ways() {
        for (name, expected) in [
            ("net.ipv4.conf.eno2/100.rp_filter", "net.ipv4.conf.eno2/100.rp_filter"),
            ("net/ipv4/conf/eno2.100/rp_filter", "net.ipv4.conf.eno2/100.rp_filter"),
            ("kernel", "kernel"),
            ("", ""),
        ] {
            assert_eq!(normalized(name), expected);
        }
    }

    #[test]
    fn some_belong_to_a_namespace() {
        for (name, expected) in [
            ("kernel.shm_rmid_forced", Some(Namespace::Ipc)),
            ("kernel.sem", Some(Namespace::Ipc)),
            ("kernel.semaphores", None),
            ("fs.mqueue.msg_max", Some(Namespace::Ipc)),
            ("net.core.somaxconn", Some(Namespace::Net)),
            ("vm.swappiness", None),
            ("network", None),
        ] {
            assert_eq!(namespace(name), expected, "{name}");
        }
    }

    #[test]
    fn what_is_no_name_is_told() {
        for good in ["a", "net.ipv4.tcp_rmem", "net/ipv4/conf/eth0.1/rp-filter", "kernel.2"] {
            assert!(is_name(good), "{good}");
        }
        let long = "a".repeat(254);
        for bad in ["", "a.", ".a", "a..b", "net.*", "A", "a_", "-a", "a b", "../a", long.as_str()]
        {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
