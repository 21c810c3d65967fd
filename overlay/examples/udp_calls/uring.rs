//! The same with `io_uring`: a batch of trains in one submission; multishot receiving into provided buffers.

use std::io::{self, IoSlice};
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::ptr;

use io_uring::types::{Fd, RecvMsgOut, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::{BATCH, Progress, SEGMENT, TRAIN};

const BUFFERS: u16 = 64;
const BUFFER: usize = (64 << 10) + 128;
/// Room for the segment size that comes with a message.
const CONTROL: usize = 64;
const GROUP: u16 = 1;
/// What a completion belongs to.
const RECEIVED: u64 = 1;
const PROVIDED: u64 = 2;

fn ring() -> io::Result<IoUring> {
    IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(128)
}

pub(crate) fn send(socket: &UdpSocket, progress: &Progress) -> io::Result<()> {
    send_with(socket, progress, |message| {
        opcode::SendMsg::new(Fd(socket.as_raw_fd()), message).build()
    })
}

pub(crate) fn send_zero_copy(socket: &UdpSocket, progress: &Progress) -> io::Result<()> {
    send_with(socket, progress, |message| {
        opcode::SendMsgZc::new(Fd(socket.as_raw_fd()), message).build()
    })
}

fn send_with(
    socket: &UdpSocket,
    progress: &Progress,
    entry: impl Fn(*const libc::msghdr) -> squeue::Entry,
) -> io::Result<()> {
    let segment = SEGMENT as libc::c_int;
    // SAFETY: the option reads an int that lives here.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const segment).cast(),
            size_of_val(&segment) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut ring = ring()?;
    let bytes = vec![7u8; TRAIN];
    let part = IoSlice::new(&bytes);
    // SAFETY: all zeros are a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = (&raw const part).cast_mut().cast();
    message.msg_iovlen = 1;
    while progress.may_send() {
        for _ in 0..BATCH {
            // SAFETY: what the entry points to lives until the last completion has been seen, below.
            unsafe { ring.submission().push(&entry(&raw const message)) }
                .map_err(io::Error::other)?;
        }
        let mut open = BATCH;
        while open > 0 {
            ring.submit_and_wait(1)?;
            for done in ring.completion() {
                // Of a zero-copy message there is one more: that its bytes are free again.
                if cqueue::notif(done.flags()) || !cqueue::more(done.flags()) {
                    open -= 1;
                }
                if !cqueue::notif(done.flags()) {
                    let sent = usize::try_from(done.result())
                        .map_err(|_| io::Error::from_raw_os_error(-done.result()))?;
                    progress.sent(sent);
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn receive(socket: &UdpSocket, progress: &Progress) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option reads an int that lives here.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_GRO,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut bytes = vec![0u8; usize::from(BUFFERS) * BUFFER];
    let start = bytes.as_mut_ptr();
    // SAFETY: all zeros are a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_controllen = CONTROL;
    let listen = opcode::RecvMsgMulti::new(Fd(socket.as_raw_fd()), &raw const message, GROUP)
        .build()
        .user_data(RECEIVED);
    // The ring is closed, and with it what it still waits for, before the buffers go: they were made first.
    let mut ring = ring()?;
    let provide = opcode::ProvideBuffers::new(start, BUFFER as i32, BUFFERS, GROUP, 0);
    // SAFETY: buffers and header live longer than the ring.
    unsafe {
        ring.submission().push(&provide.build().user_data(PROVIDED)).map_err(io::Error::other)?;
        ring.submission().push(&listen).map_err(io::Error::other)?;
    }
    let pause = Timespec::from(std::time::Duration::from_millis(100));
    let mut returned = Vec::with_capacity(BUFFERS.into());
    while !progress.is_over() {
        match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&pause)) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => continue,
            Err(error) => return Err(error),
        }
        let mut received = 0;
        let mut ended = false;
        for done in ring.completion().filter(|done| done.user_data() == RECEIVED) {
            ended |= !cqueue::more(done.flags());
            let Some(id) = cqueue::buffer_select(done.flags()) else { continue };
            let length = usize::try_from(done.result()).unwrap_or(0);
            // SAFETY: the kernel filled this buffer, and leaves it alone until it is provided again.
            let buffer = unsafe {
                std::slice::from_raw_parts(start.add(usize::from(id) * BUFFER).cast_const(), length)
            };
            let out = RecvMsgOut::parse(buffer, &message);
            received += out.map_or(0, |out| out.payload_data().len());
            returned.push(id);
        }
        progress.received(received);
        for id in returned.drain(..) {
            let place = ptr::from_mut(&mut bytes[usize::from(id) * BUFFER]);
            let entry = opcode::ProvideBuffers::new(place, BUFFER as i32, 1, GROUP, id);
            let entry = entry.build().user_data(PROVIDED).flags(squeue::Flags::SKIP_SUCCESS);
            // SAFETY: as above.
            unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        if ended {
            // SAFETY: as above.
            unsafe { ring.submission().push(&listen) }.map_err(io::Error::other)?;
        }
    }
    Ok(())
}
