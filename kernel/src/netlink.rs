//! Blocking netlink: several requests in one system call, answers in order.
//!
//! A pod needs about a dozen netlink requests; sent one by one through an async connection each costs a wake-up. Here a
//! batch is one `send`, and the answers are collected until each request has been acknowledged.

pub(crate) mod device;
pub(crate) mod message;
pub(crate) mod tc;

use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};

use crate::NetNs;

/// A netlink request that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused it.
    #[error("the kernel refused the request")]
    Refused(#[source] io::Error),
    /// The socket failed.
    #[error("netlink socket")]
    Socket(#[source] io::Error),
    /// The answer was not understood.
    #[error("decode the answer")]
    Decode(#[from] DecodeError),
    /// The answer lacks something that it must have.
    #[error("the answer lacks {0}")]
    Incomplete(&'static str),
}

impl NetlinkError {
    /// The error number, when the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(error) => error.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the object existed already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// Whether the object does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO)
        )
    }
}

/// One request: the message and its flags beyond `NLM_F_REQUEST | NLM_F_ACK`.
#[derive(Debug)]
pub struct Request<M> {
    /// The message.
    pub message: M,
    /// Such as `NLM_F_CREATE | NLM_F_EXCL`.
    pub flags: u16,
}

/// The answer to one request: what came before the acknowledgement.
pub type Answer<M> = Result<Vec<M>, NetlinkError>;

/// A netlink socket for messages of type `M`. It stays in the namespace in which it was opened.
#[derive(Debug)]
pub struct Netlink<M> {
    fd: OwnedFd,
    sequence: u32,
    messages: PhantomData<fn() -> M>,
}

/// A socket for links, addresses, routes and neighbours.
pub type RouteSocket = Netlink<RouteNetlinkMessage>;

impl RouteSocket {
    /// Opens one inside `namespace`.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the socket not be made.
    pub fn open_in(namespace: &NetNs) -> io::Result<Self> {
        namespace.run(|| Self::open(SockProtocol::NetlinkRoute))?
    }

    /// The kernel's number for the namespace in which it was opened.
    ///
    /// # Errors
    /// When the kernel is older than 5.14.
    pub(crate) fn namespace_cookie(&self) -> io::Result<u64> {
        crate::netns::cookie_of(&self.fd)
    }
}

impl<M: NetlinkSerializable + NetlinkDeserializable + Debug> Netlink<M> {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::RcvBuf, &(1 << 20))?;
        Ok(Self { fd, sequence: 0, messages: PhantomData })
    }

    /// Sends the requests in one go. The kernel works on them in order and goes on after a failed one.
    ///
    /// # Errors
    /// When the socket fails; failures of single requests are in their answers.
    pub fn batch(&mut self, requests: Vec<Request<M>>) -> Result<Vec<Answer<M>>, NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut answers = Vec::with_capacity(requests.len());
        let mut bytes = Vec::with_capacity(256 * requests.len());
        for request in requests {
            self.append(&mut bytes, request.message, NLM_F_ACK | request.flags);
            answers.push(None);
        }
        if answers.is_empty() {
            return Ok(Vec::new());
        }
        self.send(&bytes)?;
        self.collect(first, &mut answers)?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// Sends one request.
    ///
    /// # Errors
    /// When the socket fails or the kernel refuses.
    pub fn request(&mut self, message: M, flags: u16) -> Answer<M> {
        let mut answers = self.batch(vec![Request { message, flags }])?;
        answers.pop().unwrap_or(Err(NetlinkError::Incomplete("an acknowledgement")))
    }

    /// Asks for all objects of a kind.
    ///
    /// # Errors
    /// When the socket fails or the kernel refuses.
    pub fn dump(&mut self, message: M) -> Answer<M> {
        let mut bytes = Vec::with_capacity(256);
        self.append(&mut bytes, message, NLM_F_DUMP);
        self.send(&bytes)?;
        let mut answers = [None];
        self.collect(self.sequence, &mut answers)?;
        let [answer] = answers;
        answer.unwrap_or(Err(NetlinkError::Incomplete("an end")))
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: M, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        match send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(NetlinkError::Socket(io::Error::from(io::ErrorKind::WriteZero))),
            Err(error) => Err(NetlinkError::Socket(error.into())),
        }
    }

    /// Reads until each of the requests from number `first` on has its end.
    fn collect(&self, first: u32, answers: &mut [Option<Answer<M>>]) -> Result<(), NetlinkError> {
        let mut buffer = vec![0; 64 << 10];
        let mut parts: Vec<Vec<M>> = answers.iter().map(|_| Vec::new()).collect();
        while answers.iter().any(Option::is_none) {
            let length = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(NetlinkError::Socket(error.into())),
            };
            let mut rest = &buffer[..length];
            while rest.len() >= 16 {
                let message = NetlinkMessage::<M>::deserialize(rest)?;
                let step = (message.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(step..).unwrap_or_default();
                let index = message.header.sequence_number.wrapping_sub(first) as usize;
                let Some(answer) = answers.get_mut(index) else { continue };
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => parts[index].push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        *answer = Some(Err(NetlinkError::Refused(error.to_io())));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                        *answer = Some(Ok(std::mem::take(&mut parts[index])));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    #[test]
    fn reading_links_needs_no_privilege() {
        let mut socket = RouteSocket::open_in(&NetNs::current()).unwrap();
        let links = socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
        assert!(!links.is_empty(), "there is always a loopback device");
        let one = message::link_by_name("lo");
        let both = vec![message::link_by_name("lo"), message::link_by_name("no-such-dev"), one];
        let answers = socket.batch(both).unwrap();
        assert!(answers[0].as_ref().is_ok_and(|links| links.len() == 1));
        assert!(answers[1].as_ref().is_err_and(NetlinkError::is_missing));
        assert!(answers[2].as_ref().is_ok_and(|links| links.len() == 1));
    }
}
