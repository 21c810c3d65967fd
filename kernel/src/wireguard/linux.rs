//! A WireGuard device in the kernel.

use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs};
use netlink_packet_route::link::InfoKind;
use netlink_packet_wireguard::WireguardMessage;
use nix::sys::socket::SockProtocol;

use super::{DeviceError, Holder, Observed, Plan, WireGuardDevice, genl};
use crate::netlink::device::Device;
use crate::netlink::{Netlink, NetlinkError, RouteSocket, message};
use crate::{IfName, NetNs};

/// Name of the generic netlink family.
const FAMILY: &str = "wireguard";
/// Name of the device that [`supported`] makes for a moment.
const PROBE: &str = "mesh-wgprobe";

/// Whether the kernel has WireGuard: tries to make a device, which also loads the module, and removes it again.
///
/// # Errors
/// When the question cannot be asked (namespace, privileges).
pub fn supported(namespace: &NetNs) -> Result<bool, DeviceError> {
    let device = KernelWireGuard {
        namespace: namespace.clone(),
        name: PROBE.parse().expect("a constant and valid interface name"),
    };
    match device.ensure() {
        Ok(_) => device.remove().map(|()| true),
        Err(DeviceError::Unsupported) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A [`WireGuardDevice`] in the kernel.
#[derive(Debug, Clone)]
pub struct KernelWireGuard {
    namespace: NetNs,
    name: IfName,
}

type WireGuardSocket = Netlink<GenlMessage<WireguardMessage>>;

impl KernelWireGuard {
    /// The device `name` in `namespace`; nothing is made yet.
    pub fn new(namespace: NetNs, name: IfName) -> Self {
        Self { namespace, name }
    }

    fn error(&self, what: &'static str) -> impl Fn(NetlinkError) -> DeviceError {
        let device = self.name.to_string();
        move |source| DeviceError::Netlink { what, device: device.clone(), source }
    }

    fn route_socket(&self) -> Result<RouteSocket, DeviceError> {
        RouteSocket::open_in(&self.namespace).map_err(DeviceError::Namespace)
    }

    /// A socket in the device's namespace, and the number of the family.
    fn open(&self) -> Result<(WireGuardSocket, u16), DeviceError> {
        let open = || {
            let control = Netlink::<GenlMessage<GenlCtrl>>::open(SockProtocol::NetlinkGeneric)?;
            Ok((control, WireGuardSocket::open(SockProtocol::NetlinkGeneric)?))
        };
        let sockets = self.namespace.run(open).and_then(|result| result);
        let (mut control, socket) = sockets.map_err(DeviceError::Namespace)?;
        let query = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())],
        });
        let answer = match control.request(query, 0) {
            Err(error) if error.is_missing() => return Err(DeviceError::Unsupported),
            other => other.map_err(self.error("look up the generic netlink family"))?,
        };
        let mut attributes = answer.into_iter().flat_map(|message| message.payload.nlas);
        let family = attributes.find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(id),
            _ => None,
        });
        Ok((socket, family.ok_or(DeviceError::Unsupported)?))
    }
}

/// A message with the family's number in it.
fn addressed(payload: WireguardMessage, family: u16) -> GenlMessage<WireguardMessage> {
    let mut message = GenlMessage::from_payload(payload);
    message.set_resolved_family_id(family);
    message
}

impl WireGuardDevice for KernelWireGuard {
    fn holder(&self) -> Result<Holder, DeviceError> {
        let found = Device::find(&mut self.route_socket()?, self.name.as_str());
        Ok(match found.map_err(self.error("look at the device"))? {
            None => Holder::Nobody,
            Some(device) if device.wireguard => Holder::WireGuard,
            Some(_) => Holder::Other,
        })
    }

    fn ensure(&self) -> Result<bool, DeviceError> {
        let request = message::create_link(self.name.as_str(), InfoKind::Wireguard);
        match self.route_socket()?.request(request.message, request.flags) {
            Err(error) if error.is_exists() => Ok(false),
            Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP)) => {
                Err(DeviceError::Unsupported)
            }
            other => other.map(|_| true).map_err(self.error("create the device")),
        }
    }

    fn observe(&self) -> Result<Observed, DeviceError> {
        let (mut socket, family) = self.open()?;
        let answer = socket
            .dump(addressed(genl::query(self.name.as_str()), family))
            .map_err(self.error("read the device"))?;
        let mut observed = Observed::default();
        answer.iter().for_each(|message| genl::read(&mut observed, &message.payload));
        Ok(observed)
    }

    fn apply(&self, plan: &Plan) -> Result<(), DeviceError> {
        if plan.steps.is_empty() {
            return Ok(());
        }
        let (mut socket, family) = self.open()?;
        for step in &plan.steps {
            socket
                .request(addressed(genl::request(self.name.as_str(), step), family), 0)
                .map_err(self.error("configure the device"))?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), DeviceError> {
        let mut socket = self.route_socket()?;
        let failed = self.error("delete the device");
        if let Some(device) = Device::find(&mut socket, self.name.as_str()).map_err(&failed)? {
            let request = message::delete_link(device.ifindex);
            socket.request(request.message, request.flags).map_err(&failed)?;
        }
        Ok(())
    }
}
