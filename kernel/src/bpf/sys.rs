//! bpf(2): the commands that aya 0.14 does not offer, or not for pinned objects.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub(super) const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
pub(super) const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
pub(super) const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
pub(super) const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
pub(super) const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
pub(super) const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
pub(super) const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

// enum bpf_attach_type
pub(super) const BPF_CGROUP_SOCK_OPS: u32 = 3;
pub(super) const BPF_CGROUP_INET4_CONNECT: u32 = 10;
pub(super) const BPF_CGROUP_INET6_CONNECT: u32 = 11;
pub(super) const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
pub(super) const BPF_CGROUP_UDP6_SENDMSG: u32 = 15;
pub(super) const BPF_CGROUP_UDP4_RECVMSG: u32 = 19;
pub(super) const BPF_CGROUP_UDP6_RECVMSG: u32 = 20;
pub(super) const BPF_CGROUP_INET4_GETPEERNAME: u32 = 29;
pub(super) const BPF_CGROUP_INET6_GETPEERNAME: u32 = 30;
pub(super) const BPF_TCX_INGRESS: u32 = 46;
pub(super) const BPF_TCX_EGRESS: u32 = 47;

// enum bpf_link_type
pub(super) const BPF_LINK_TYPE_CGROUP: u32 = 3;
pub(super) const BPF_LINK_TYPE_TCX: u32 = 11;

/// Calls bpf(2) with a part of `union bpf_attr`.
///
/// # Safety
/// `attr` must be a `repr(C)` prefix of the command's part of `union bpf_attr` without padding, and every pointer in it must
/// be valid for what the command reads and writes.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the caller vouches for `attr`; the size is that of the type.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: i64) -> OwnedFd {
    let fd = RawFd::try_from(result).expect("a file descriptor fits");
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens a pinned object.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    unsafe { bpf(BPF_OBJ_GET, &mut attr) }.map(owned)
}

/// Pins an object.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let fd = raw(object);
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd, flags: 0 };
    // SAFETY: as above.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// A descriptor as the kernel's structures want it. Borrowed, so that it is still open when the kernel reads it.
pub(super) fn raw(object: BorrowedFd<'_>) -> u32 {
    object.as_raw_fd().cast_unsigned()
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// Reads the first bytes of an object's information.
pub(super) fn info<T: mesh_abi::Plain + Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoAttr {
        fd: raw(object),
        length: u32::try_from(size_of::<T>()).expect("a small struct"),
        info: (&raw mut info) as u64,
    };
    // SAFETY: `info` is plain data of the given length and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Start of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProgramInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
}
// SAFETY: two integers.
unsafe impl mesh_abi::Plain for ProgramInfo {}

/// Start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MapInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}
// SAFETY: six integers.
unsafe impl mesh_abi::Plain for MapInfo {}

/// Start of `struct bpf_link_info`, with the parts for cgroups and tcx.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LinkInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) program_id: u32,
    pad: u32,
    /// cgroup: low half of the id; tcx: interface index.
    pub(super) first: u32,
    /// cgroup: high half of the id; tcx: attach type.
    pub(super) second: u32,
    /// cgroup: attach type.
    pub(super) third: u32,
    rest: u32,
}
// SAFETY: eight integers.
unsafe impl mesh_abi::Plain for LinkInfo {}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches a program to a cgroup descriptor or to an interface index.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target,
        attach_type,
        flags: 0,
        relative: 0,
        pad: 0,
        expected_revision: 0,
    };
    // SAFETY: integers only.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.map(owned)
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Switches a link to another program, in one step.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link: raw(link), program: raw(program), flags: 0, old_program: 0 };
    // SAFETY: integers only.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

#[repr(C)]
struct RawTracepointAttr {
    name: u64,
    program: u32,
    pad: u32,
}

/// Attaches a program to a tracepoint, for as long as the descriptor is open.
pub(super) fn raw_tracepoint(name: &CStr, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = RawTracepointAttr { name: name.as_ptr() as u64, program: raw(program), pad: 0 };
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &mut attr) }.map(owned)
}

/// Detaches a link, whoever else holds it.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(link);
    // SAFETY: an integer.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}
