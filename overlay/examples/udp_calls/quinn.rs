//! As the engine does it: one `sendmsg` per train, `recvmmsg` for what is there.

use std::io::{self, IoSliceMut};
use std::net::UdpSocket;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use std::os::fd::AsFd as _;

use crate::{BATCH, Progress, SEGMENT, TRAIN};

const MESSAGES: usize = 16;
const MESSAGE: usize = 64 << 10;

pub(crate) fn send(socket: &UdpSocket, progress: &Progress) -> io::Result<()> {
    let state = UdpSocketState::new(socket.into())?;
    let bytes = vec![7; TRAIN];
    let destination = socket.peer_addr()?;
    let train = Transmit {
        destination,
        ecn: None,
        contents: &bytes,
        segment_size: Some(SEGMENT),
        src_ip: None,
    };
    while progress.may_send() {
        for _ in 0..BATCH {
            while state.try_send(socket.into(), &train).is_err_and(|e| again(&e)) {
                wait(socket, PollFlags::POLLOUT)?;
            }
            progress.sent(TRAIN);
        }
    }
    Ok(())
}

pub(crate) fn receive(socket: &UdpSocket, progress: &Progress) -> io::Result<()> {
    let state = UdpSocketState::new(socket.into())?;
    let mut bytes = vec![0; MESSAGES * MESSAGE];
    let mut metas = [RecvMeta::default(); MESSAGES];
    while !progress.is_over() {
        let mut parts = bytes.chunks_mut(MESSAGE).map(IoSliceMut::new).collect::<Vec<_>>();
        match state.recv(socket.into(), &mut parts, &mut metas) {
            Ok(count) => progress.received(metas[..count].iter().map(|meta| meta.len).sum()),
            Err(error) if again(&error) => wait(socket, PollFlags::POLLIN)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn wait(socket: &UdpSocket, flags: PollFlags) -> io::Result<()> {
    let mut polled = [PollFd::new(socket.as_fd(), flags)];
    poll(&mut polled, PollTimeout::from(100u8))?;
    Ok(())
}
