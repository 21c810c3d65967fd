//! A file in memory for secrets: nothing of it reaches a disk, and nothing of it is left when it has been read.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write};
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use zeroize::{Zeroize as _, Zeroizing};

/// What is written at a time. It does not grow: a buffer that moves leaves its content behind.
const BUFFER_BYTES: usize = 64 << 10;

/// Nothing that a worker leaves is that long: some thousand peers fit.
const MOST_BYTES: u64 = 256 << 20;

/// Writes into a new file in memory.
pub(crate) struct Writer {
    file: File,
    buffer: Zeroizing<Vec<u8>>,
}

impl Writer {
    /// An empty file.
    pub(crate) fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"mesh-overlay", MFdFlags::MFD_CLOEXEC)?);
        Ok(Self { file, buffer: Zeroizing::new(Vec::with_capacity(BUFFER_BYTES)) })
    }

    /// The file, complete.
    pub(crate) fn finish(mut self) -> io::Result<OwnedFd> {
        self.flush()?;
        Ok(self.file.into())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == BUFFER_BYTES {
            self.flush()?;
        }
        let n = bytes.len().min(BUFFER_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.zeroize();
        Ok(())
    }
}

/// Reads a file in memory, and wipes it, also for others that have it open. Nothing is returned that could not be wiped.
pub(crate) fn take(file: OwnedFd) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut file = File::from(file);
    let len = file.metadata()?.len();
    if len > MOST_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = Zeroizing::new(vec![0; len as usize]);
    file.rewind()?;
    file.read_exact(&mut bytes)?;
    file.rewind()?;
    let zeros = [0; 4096];
    let mut left = bytes.len();
    while left > 0 {
        let n = left.min(zeros.len());
        file.write_all(&zeros[..n])?;
        left -= n;
    }
    file.set_len(0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_gone_for_everybody() {
        let mut writer = Writer::new().unwrap();
        let long: Vec<u8> = (0..BUFFER_BYTES * 3 + 7).map(|n| n as u8).collect();
        writer.write_all(&long).unwrap();
        let file = writer.finish().unwrap();
        let other = file.try_clone().unwrap();
        assert_eq!(*take(file).unwrap(), long);
        assert!(take(other).unwrap().is_empty());
    }
}
