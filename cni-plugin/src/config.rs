//! The network configuration on standard input.

use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Map, Value};

use crate::input::address;
use crate::version::Version;
use crate::wire::{Code, Failure, Owner, is_identifier};

/// Where the agent listens unless the configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/mesh/cni.sock";
/// Where the agent keeps its state unless the configuration says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/mesh";

/// A configuration is some hundred bytes; a garbage collection lists some hundred bytes for each attachment.
const MAX_INPUT_BYTES: u64 = 8 << 20;
const INPUT_LIMIT: Duration = Duration::from_secs(3);

/// Keys that this plugin or the runtime gives a meaning to.
const KNOWN_KEYS: [&str; 9] = [
    "cniVersion",
    "name",
    "type",
    "socket",
    "stateDir",
    "prevResult",
    "args",
    "runtimeConfig",
    "capabilities",
];
/// The specification reserves such keys for runtimes: whoever does not know one ignores it.
const RESERVED_PREFIX: &str = "cni.dev/";
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";
/// What an earlier text of version 1.1.0 called it (containernetworking/cni issue 1101).
const ATTACHMENTS: &str = "cni.dev/attachments";

/// A network configuration.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The version that it asks for.
    pub version: Version,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The agent's state directory.
    pub state_dir: PathBuf,
    /// The network's name.
    pub name: String,
    keys: Map<String, Value>,
}

/// Reads all of the input, within bounds of size and time.
pub fn read(mut input: impl Read + AsFd) -> Result<Vec<u8>, Failure> {
    let failed = |why: String| Failure::new(Code::Decode, "read the network configuration", why);
    let broken =
        |error: io::Error| Failure::new(Code::Io, "read standard input", error.to_string());
    let deadline = Instant::now() + INPUT_LIMIT;
    let (mut bytes, mut buffer) = (vec![], [0; 16 << 10]);
    while bytes.len() as u64 <= MAX_INPUT_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(input.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => {
                return Err(failed(format!("standard input is still open after {INPUT_LIMIT:?}")));
            }
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(broken(error.into())),
        }
        match input.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
    Err(failed(format!("larger than {MAX_INPUT_BYTES} bytes")))
}

/// Parses an object, whatever its keys; its version, where it has one, as text for error messages.
pub fn parse(bytes: &[u8]) -> Result<Map<String, Value>, Failure> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(_) => Err(decode("not a JSON object")),
        Err(error) => Err(decode(&error.to_string())),
    }
}

fn decode(why: &str) -> Failure {
    Failure::new(Code::Decode, "decode the network configuration", why)
}

impl NetworkConfig {
    /// Checks what all commands need.
    pub fn new(keys: Map<String, Value>) -> Result<Self, Failure> {
        let version = Version::parse(text(&keys, "cniVersion")?)?;
        let name = match text(&keys, "name")? {
            Some(name) if is_identifier(name) => name.to_owned(),
            Some(name) => return Err(invalid(format!("name {name:?} is invalid"))),
            None => return Err(invalid("name is missing".to_owned())),
        };
        let path = |key, default: &str| -> Result<PathBuf, Failure> {
            let path = PathBuf::from(text(&keys, key)?.unwrap_or(default));
            if path.is_absolute() {
                Ok(path)
            } else {
                Err(invalid(format!("{key} {path:?} is not an absolute path")))
            }
        };
        let (socket, state_dir) =
            (path("socket", DEFAULT_SOCKET)?, path("stateDir", DEFAULT_STATE_DIR)?);
        Ok(Self { version, socket, state_dir, name, keys })
    }

    /// Refuses keys that would have no effect. Not asked of DEL: a release must not depend on them.
    pub fn refuse_unknown_keys(&self) -> Result<(), Failure> {
        let unknown = |key: &str| !KNOWN_KEYS.contains(&key) && !key.starts_with(RESERVED_PREFIX);
        match self.keys.iter().find(|(key, _)| unknown(key)) {
            Some((key, value)) => Err(Failure::new(
                Code::UnsupportedField,
                format!("key {key:?} with value {value} is not supported"),
                format!("known keys: {}", KNOWN_KEYS.join(", ")),
            )),
            None => Ok(()),
        }
    }

    /// An object among the keys; empty when it is absent.
    pub(crate) fn object(&self, key: &str) -> Result<&Map<String, Value>, Failure> {
        static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(&NONE),
            Some(Value::Object(object)) => Ok(object),
            Some(other) => Err(invalid(format!("{key} is not an object: {other}"))),
        }
    }

    /// `args.cni`; empty when it is absent.
    pub(crate) fn args(&self) -> Result<&Map<String, Value>, Failure> {
        let args = self.object("args")?;
        match args.get("cni") {
            Some(Value::Object(cni)) => Ok(cni),
            _ => self.object("no such key"),
        }
    }

    /// The result of the plugins before this one, or of the ADD.
    pub fn previous(&self) -> Result<Option<&Map<String, Value>>, Failure> {
        match self.keys.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(previous)) => Ok(Some(previous)),
            Some(_) => Err(invalid("prevResult is not an object".to_owned())),
        }
    }

    /// The addresses that `prevResult`, which CHECK cannot do without, has for the interface inside the pod.
    pub fn previous_addresses(&self, interface: &str) -> Result<Vec<IpAddr>, Failure> {
        let Some(previous) = self.previous()? else {
            return Err(invalid("prevResult is missing".to_owned()));
        };
        let list = |key| previous.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let (ips, interfaces) = (list("ips"), list("interfaces"));
        // Those of other plugins in the chain are theirs to check.
        let foreign = |ip: &&Value| {
            let index = ip.get("interface").and_then(Value::as_u64);
            let index = index.and_then(|index| usize::try_from(index).ok());
            let name = index.and_then(|index| interfaces.get(index)?.get("name")?.as_str());
            name.is_some_and(|name| name != interface)
        };
        ips.iter()
            .filter(|ip| !foreign(ip))
            .map(|ip| {
                let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
                address(text)
                    .ok_or_else(|| invalid(format!("prevResult has a bad address in {ip}")))
            })
            .collect()
    }

    /// The attachments that a garbage collection shall keep, and what is wrong with the entries that make no sense.
    pub fn valid_attachments(&self) -> Result<(Vec<Owner>, Vec<String>), Failure> {
        let given = self.keys.get(VALID_ATTACHMENTS).or_else(|| self.keys.get(ATTACHMENTS));
        let entries = match given {
            Some(Value::Array(entries)) => entries.as_slice(),
            // How runtimes in Go write a list of nothing.
            Some(Value::Null) => &[],
            Some(_) => return Err(invalid(format!("{VALID_ATTACHMENTS} is not a list"))),
            None => return Err(invalid(format!("{VALID_ATTACHMENTS} is missing"))),
        };
        let (mut keep, mut wrong) = (vec![], vec![]);
        for entry in entries {
            let part = |key| entry.get(key).and_then(Value::as_str).unwrap_or_default();
            match Owner::new(part("containerID"), part("ifname")) {
                Ok(owner) => keep.push(owner),
                Err(why) => wrong.push(format!("{entry}: {why}")),
            }
        }
        Ok((keep, wrong))
    }
}

fn text<'a>(keys: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, Failure> {
    match keys.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(format!("{key} is not a string: {other}"))),
    }
}

fn invalid(why: String) -> Failure {
    Failure::new(Code::Config, "invalid network configuration", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<NetworkConfig, Failure> {
        parse(text.as_bytes()).and_then(NetworkConfig::new)
    }

    #[test]
    fn malformed_input_is_told_apart_from_a_wrong_configuration() {
        let deep = "[".repeat(10 << 20);
        for bad in ["", "{", "[]", "null", "\"\u{1}\"", deep.as_str()] {
            assert_eq!(config(bad).unwrap_err().code, 6);
        }
        assert_eq!(parse(b"{\"name\":\"\xff\"}").unwrap_err().code, 6);
        for bad in [
            r#"{"cniVersion":"1.1.0"}"#,
            r#"{"cniVersion":"1.1.0","name":"a b"}"#,
            r#"{"cniVersion":"1.1.0","name":7}"#,
            r#"{"cniVersion":"1.1.0","name":"m","socket":"x.sock"}"#,
        ] {
            assert_eq!(config(bad).unwrap_err().code, 7, "{bad}");
        }
        assert_eq!(config(r#"{"name":"m"}"#).unwrap_err().code, 1);
        let strange = config(r#"{"cniVersion":"1.1.0","name":"m","cni.dev/x":1,"mtu":9000}"#);
        let refused = strange.unwrap().refuse_unknown_keys().unwrap_err();
        assert_eq!(refused.code, 2);
        assert!(refused.msg.contains("mtu") && refused.msg.contains("9000"));
    }

    #[test]
    fn a_garbage_collection_keeps_what_is_well_formed_and_reports_the_rest() {
        let text = r#"{"cniVersion":"1.1.0","name":"m","cni.dev/valid-attachments":[
            {"containerID":"a","ifname":"eth0"}, {"containerID":"../b","ifname":"eth0"}, 7]}"#;
        let (keep, wrong) = config(text).unwrap().valid_attachments().unwrap();
        assert_eq!(keep.len(), 1);
        assert_eq!(wrong.len(), 2);
    }

    #[test]
    fn input_that_is_too_large_is_not_read_to_its_end() {
        assert_eq!(read(std::fs::File::open("/dev/zero").unwrap()).unwrap_err().code, 6);
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(read(reader).unwrap_err().code, 6, "nobody writes");
        drop(writer);
    }
}
