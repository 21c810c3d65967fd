//! `BPF_PROG_TEST_RUN`: a program on a packet that is never sent.

use std::io;
use std::os::fd::BorrowedFd;

use super::sys;

/// What a program is given.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The packet. TC programs are run as if it had come from the device below, with at least 14 bytes.
    pub packet: &'a [u8],
    /// Index of the device, in the calling thread's namespace.
    pub ifindex: u32,
    /// How often to run it.
    pub repeat: u32,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The program's verdict; -1 (go on) is seen as `u32::MAX`.
    pub verdict: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Average time of one run, nanoseconds.
    pub duration_ns: u32,
}

#[repr(C)]
struct TestRunAttr {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Size of `struct __sk_buff`, and the place of its field `ifindex`.
const SKB_WORDS: usize = 48;
const SKB_IFINDEX: usize = 10;

/// Runs a program.
pub(super) fn run(program: BorrowedFd<'_>, input: &Input<'_>) -> io::Result<Output> {
    let mut context = [0_u32; SKB_WORDS];
    context[SKB_IFINDEX] = input.ifindex;
    let mut packet = vec![0_u8; input.packet.len() + 256];
    let length = |bytes: usize| u32::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput);
    let mut attr = TestRunAttr {
        program: sys::raw(program),
        verdict: 0,
        size_in: length(input.packet.len())?,
        size_out: length(packet.len())?,
        data_in: input.packet.as_ptr() as u64,
        data_out: packet.as_mut_ptr() as u64,
        repeat: input.repeat.max(1),
        duration: 0,
        context_size_in: length(size_of_val(&context))?,
        context_size_out: 0,
        context_in: context.as_ptr() as u64,
        context_out: 0,
        flags: 0,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    // SAFETY: all buffers are as long as said and outlive the call.
    unsafe { sys::bpf(sys::BPF_PROG_TEST_RUN, &mut attr) }?;
    packet.truncate(attr.size_out as usize);
    Ok(Output { verdict: attr.verdict, packet, duration_ns: attr.duration })
}
