//! Programs on devices: tcx links, and filters before Linux 6.6.
//!
//! A link of another ABI version stays in front of ours until it is retired. A filter has no other beside it: so that it too decides
//! until then, ours waits.

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::link::{self, AttachError, LinkSpec};
use super::load::LoadError;
use super::{Programs, sys};
use crate::netlink::{Answer, NetlinkError, RouteSocket, tc};

/// Where filters of another version serve; nothing where there is no other version.
#[derive(Debug)]
pub(super) struct Held(Mutex<Option<Vec<Place>>>);

#[derive(Debug, PartialEq, Eq)]
struct Place {
    name: &'static str,
    ifindex: u32,
    hook: tc::Hook,
}

impl Held {
    /// Nothing is known to be held yet.
    pub(super) fn new(by_others: bool) -> Self {
        Self(Mutex::new(by_others.then(Vec::new)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Programs {
    /// Attaches a program to a device of the calling thread's namespace.
    pub(super) fn attach_tc(
        &self,
        socket: &mut RouteSocket,
        pin: &str,
        name: &'static str,
        ifindex: u32,
        hook: tc::Hook,
    ) -> Result<(), AttachError> {
        match self.attach(pin, name, &LinkSpec::tcx(ifindex, hook)) {
            // A kernel before 6.6 does not know the kind of link.
            Err(AttachError::Create(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.put_filter(socket, &Place { name, ifindex, hook })
            }
            other => other,
        }
    }

    /// Puts our filter there, over one of the same name; prepares the device, if it is not.
    fn put_filter(&self, socket: &mut RouteSocket, place: &Place) -> Result<(), AttachError> {
        let Place { name, ifindex, hook } = *place;
        let program = self.program(name).map_err(AttachError::Create)?.as_fd();
        let filter = tc::attach(ifindex, hook, program, name);
        let batch = vec![tc::prepare(ifindex), filter];
        let answers = socket.batch(batch).map_err(AttachError::Filter)?;
        let real = |answer: &Answer<_>| !answer.as_ref().is_err_and(NetlinkError::is_exists);
        let mut real = answers.into_iter().filter(real);
        real.try_for_each(|answer| answer.map(drop)).map_err(AttachError::Filter)
    }

    /// Whether a program is attached to a device, in the one way or the other.
    pub(super) fn is_tc_attached(
        &self,
        socket: &mut RouteSocket,
        pin: &str,
        name: &'static str,
        ifindex: u32,
        hook: tc::Hook,
    ) -> Result<bool, NetlinkError> {
        if link::is_attached(&self.pins.link(pin), &LinkSpec::tcx(ifindex, hook)) {
            return Ok(true);
        }
        // A filter is not switched with the links: the program of an earlier load has to be replaced.
        let program = self.program(name).map_err(NetlinkError::Socket)?;
        let info: sys::ProgramInfo = sys::info(program.as_fd()).map_err(NetlinkError::Socket)?;
        if tc::is_attached(socket, ifindex, hook, (name, Some(info.id)))? {
            return Ok(true);
        }
        self.is_held(socket, name, ifindex, hook)
    }

    /// Whether a filter of another version is there, and stays until that is retired.
    fn is_held(
        &self,
        socket: &mut RouteSocket,
        name: &'static str,
        ifindex: u32,
        hook: tc::Hook,
    ) -> Result<bool, NetlinkError> {
        let mut held = self.held.lock();
        let Some(places) = held.as_mut() else { return Ok(false) };
        if !tc::is_attached(socket, ifindex, hook, (name, None))? {
            return Ok(false);
        }
        let place = Place { name, ifindex, hook };
        if !places.contains(&place) {
            places.push(place);
        }
        Ok(true)
    }

    /// Puts our programs where another version's are.
    pub(super) fn switch_held(&self) -> Result<(), LoadError> {
        let mut held = self.held.lock();
        for place in held.iter().flatten() {
            self.switch(place)
                .map_err(|source| LoadError::Attach { name: place.name.to_owned(), source })?;
        }
        *held = None;
        Ok(())
    }

    /// A device that is gone needs none.
    fn switch(&self, place: &Place) -> Result<(), AttachError> {
        let socket = RouteSocket::open_in(&self.node_namespace);
        let mut socket = socket.map_err(NetlinkError::Socket).map_err(AttachError::Filter)?;
        match self.put_filter(&mut socket, place) {
            Err(AttachError::Filter(error)) if error.is_missing() => Ok(()),
            other => other,
        }
    }
}
