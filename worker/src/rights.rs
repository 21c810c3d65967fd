//! Descriptors beside lines of text on a unix socket (`SCM_RIGHTS`, unix(7)).

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::wire::MAX_LINE_BYTES;

/// As many as the kernel lets one message carry (`SCM_MAX_FD`).
const BATCH: usize = 253;
const READ_BYTES: usize = 4096;

/// Sends a line with descriptors. Each batch of them travels with one byte of it, so there have to be enough.
pub(crate) async fn send(
    stream: &UnixStream,
    line: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut rest = line;
    for batch in descriptors.chunks(BATCH) {
        let (byte, tail) = rest.split_at_checked(1).ok_or(io::ErrorKind::InvalidInput)?;
        let raw: Vec<RawFd> = batch.iter().map(|fd| fd.as_raw_fd()).collect();
        let carry = || {
            let rights = [ControlMessage::ScmRights(&raw)];
            let (socket, flags) = (stream.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
            Ok(sendmsg::<UnixAddr>(socket, &[IoSlice::new(byte)], &rights, flags, None)?)
        };
        stream.async_io(Interest::WRITABLE, carry).await?;
        rest = tail;
    }
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads lines, and keeps the descriptors that came with them. Cancel safe.
#[derive(Debug)]
pub(crate) struct Receiver {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new(), descriptors: VecDeque::new() }
    }

    /// The next line; an error when the other side is gone.
    pub(crate) async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.bytes.iter().position(|byte| *byte == b'\n') {
                return Ok(self.bytes.drain(..=at).collect());
            }
            if self.bytes.len() as u64 > MAX_LINE_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.fill().await?;
        }
    }

    /// The next descriptor that came with the lines so far: sent before the end of the line that speaks of it.
    pub(crate) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    async fn fill(&mut self) -> io::Result<()> {
        let Self { stream, bytes, descriptors } = self;
        let read = || {
            let mut buffer = [0; READ_BYTES];
            let mut space = nix::cmsg_space!([RawFd; BATCH]);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let (socket, flags) = (stream.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
            let message = recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), flags)?;
            let n = message.bytes;
            for part in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = part {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                    descriptors
                        .extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            bytes.extend_from_slice(&buffer[..n]);
            Ok(n)
        };
        match stream.async_io(Interest::READABLE, read).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    use super::*;

    #[tokio::test]
    async fn more_descriptors_than_one_message_carries_arrive_in_order() {
        let (near, far) = UnixStream::pair().unwrap();
        let pipes: Vec<_> = (0..BATCH + 7).map(|_| std::io::pipe().unwrap()).collect();
        let fds: Vec<_> = pipes.iter().map(|(_, write)| write.as_fd()).collect();
        send(&near, b"first\n", &fds).await.unwrap();
        send(&near, b"second\n", &[]).await.unwrap();
        let mut receiver = Receiver::new(far);
        assert_eq!(receiver.line().await.unwrap(), b"first\n");
        for (at, (mut read, _)) in pipes.into_iter().enumerate() {
            let text = at.to_string();
            let mut write = File::from(receiver.descriptor().unwrap());
            write.write_all(text.as_bytes()).unwrap();
            let mut back = vec![0; text.len()];
            read.read_exact(&mut back).unwrap();
            assert_eq!(back, text.as_bytes());
        }
        assert!(receiver.descriptor().is_none());
        assert_eq!(receiver.line().await.unwrap(), b"second\n");
        drop(near);
        assert!(receiver.line().await.is_err());
        let short = send(&UnixStream::pair().unwrap().0, b"", &[std::io::stdin().as_fd()]).await;
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
