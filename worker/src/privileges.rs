//! Giving up what a worker does not need, and taking before that what only root may.

use std::io;

/// Capabilities that a worker may keep (numbers of `linux/capability.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Configure network devices.
    NetAdmin = 12,
}

const PR_SET_NO_NEW_PRIVS: libc::c_int = 38;
const PR_CAPBSET_DROP: libc::c_int = 24;
const LAST_CAPABILITY: u32 = 63;
/// As a nice value (sched(7)): before the agent and whatever a node runs besides, behind what has to be on time.
const FIRST: libc::c_int = -10;
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops all capabilities but `keep`, for good, and forbids new ones through set-uid programs.
///
/// Acts on the calling thread and on threads that it makes later: call it before the runtime starts.
pub fn drop_all_but(keep: &[Capability]) -> io::Result<()> {
    for capability in 0..=LAST_CAPABILITY {
        if !keep.iter().any(|k| *k as u32 == capability) {
            // SAFETY: PR_CAPBSET_DROP reads its integer arguments only. Numbers that the kernel does not
            // know give EINVAL and end the useful range.
            if unsafe { libc::prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
                break;
            }
        }
    }
    let mask = keep.iter().fold(0u64, |mask, k| mask | 1 << (*k as u32));
    let half = |shift: u32| {
        let bits = (mask >> shift) as u32;
        Data { effective: bits, permitted: bits, inheritable: 0 }
    };
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [half(0), half(32)];
    // SAFETY: capset(2) version 3 reads one header and two data structs, all live and laid out as in
    // linux/capability.h.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: integer arguments only.
    if unsafe { libc::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Puts the calling thread, and those that it makes later, before what else runs on the node: for work that others wait
/// for all the time and that is done in microseconds. Needs root.
pub fn come_first() -> io::Result<()> {
    // SAFETY: integer arguments only; zero is the calling thread.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, FIRST) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_makes_comes_first_as_well() {
        let nice = std::thread::spawn(|| {
            come_first().map(|()| {
                // SAFETY: integer arguments only; zero is the calling thread.
                std::thread::spawn(|| unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) })
                    .join()
                    .unwrap()
            })
        });
        match nice.join().unwrap() {
            Ok(nice) => assert_eq!(nice, FIRST),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "not root"),
        }
    }

    #[test]
    fn a_thread_keeps_only_what_it_asked_for() {
        std::thread::spawn(|| {
            drop_all_but(&[Capability::NetAdmin]).unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|l| l.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().to_owned()
            };
            if field("CapEff:") == "0000000000000000" {
                assert_eq!(field("NoNewPrivs:"), "1");
                return; // started without privileges: nothing was there to keep
            }
            assert_eq!(field("CapEff:"), "0000000000001000");
            assert_eq!(field("NoNewPrivs:"), "1");
        })
        .join()
        .unwrap();
    }
}
