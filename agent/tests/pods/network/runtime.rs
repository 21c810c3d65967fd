//! The runtime's side of CNI (specification 1.1.0, section 4): a list of plugins, each executed with the result of the one before.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};

use super::node::PLUGINS;

/// A network: what a `conflist` says.
#[derive(Debug, Clone)]
pub(super) struct Network(Value);

/// One interface of a container.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    id: String,
    netns: PathBuf,
    interface: String,
    args: String,
    /// Capability arguments.
    capabilities: Value,
}

impl Attachment {
    pub(super) fn new(id: &str, netns: &Path, interface: &str) -> Self {
        Self {
            id: id.to_owned(),
            netns: netns.to_owned(),
            interface: interface.to_owned(),
            args: String::new(),
            capabilities: json!({}),
        }
    }

    /// `CNI_ARGS`.
    pub(super) fn args(self, args: &str) -> Self {
        Self { args: args.to_owned(), ..self }
    }

    pub(super) fn capabilities(self, capabilities: Value) -> Self {
        Self { capabilities, ..self }
    }

    /// As a garbage collection lists it.
    pub(super) fn listed(&self) -> Value {
        json!({"containerID": self.id, "ifname": self.interface})
    }
}

impl Network {
    pub(super) fn new(version: &str, name: &str, plugins: &[Value]) -> Self {
        Self(json!({"cniVersion": version, "name": name, "plugins": plugins}))
    }

    /// Nothing when there is no such file.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(file).ok()?;
        Some(Self(serde_json::from_str(&text).unwrap()))
    }

    pub(super) fn version(mut self, version: &str) -> Self {
        self.0["cniVersion"] = json!(version);
        self
    }

    /// Executes the plugins in their order; the result of the last, or the error of the first that failed.
    pub(super) fn add(&self, attachment: &Attachment) -> Result<Value, Value> {
        let mut result = Value::Null;
        for plugin in self.plugins() {
            let config = self.config(plugin, attachment, &result);
            result = execute("ADD", plugin, Some(attachment), &config)?;
        }
        Ok(result)
    }

    /// The same in their order, each with the final result.
    pub(super) fn check(&self, attachment: &Attachment, result: &Value) -> Result<(), Value> {
        self.plugins().iter().try_for_each(|plugin| {
            let config = self.config(plugin, attachment, result);
            execute("CHECK", plugin, Some(attachment), &config).map(drop)
        })
    }

    /// The same in reverse order, up to the first that fails.
    pub(super) fn del(&self, attachment: &Attachment, result: &Value) -> Result<(), Value> {
        self.plugins().iter().rev().try_for_each(|plugin| {
            let config = self.config(plugin, attachment, result);
            execute("DEL", plugin, Some(attachment), &config).map(drop)
        })
    }

    /// All plugins, also after one that fails; the errors.
    pub(super) fn gc(&self, keep: &[&Attachment]) -> Vec<Value> {
        let keep: Vec<Value> = keep.iter().map(|attachment| attachment.listed()).collect();
        let collect = |plugin: &Value| {
            let mut config = self.base(plugin);
            config.insert("cni.dev/valid-attachments".to_owned(), json!(keep));
            execute("GC", plugin, None, &config.into()).err()
        };
        self.plugins().iter().filter_map(collect).collect()
    }

    pub(super) fn status(&self) -> Result<(), Value> {
        self.plugins().iter().try_for_each(|plugin| {
            execute("STATUS", plugin, None, &self.base(plugin).into()).map(drop)
        })
    }

    fn plugins(&self) -> &[Value] {
        self.0["plugins"].as_array().unwrap()
    }

    /// The plugin's own keys, with the list's name and version. Other keys of the list are the runtime's own business.
    fn base(&self, plugin: &Value) -> Map<String, Value> {
        let mut config = plugin.as_object().unwrap().clone();
        config.remove("capabilities");
        for key in ["cniVersion", "name"] {
            config.insert(key.to_owned(), self.0[key].clone());
        }
        config
    }

    fn config(&self, plugin: &Value, attachment: &Attachment, previous: &Value) -> Value {
        let mut config = self.base(plugin);
        let declared = |key: &str| plugin["capabilities"][key] == true;
        let given = attachment.capabilities.as_object().into_iter().flatten();
        let given: Map<String, Value> =
            given.filter(|(key, _)| declared(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !given.is_empty() {
            config.insert("runtimeConfig".to_owned(), given.into());
        }
        if !previous.is_null() {
            config.insert("prevResult".to_owned(), previous.clone());
        }
        config.into()
    }
}

fn execute(
    verb: &str,
    plugin: &Value,
    attachment: Option<&Attachment>,
    config: &Value,
) -> Result<Value, Value> {
    let program = Path::new(PLUGINS).join(plugin["type"].as_str().unwrap());
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_COMMAND", verb);
    command.env("CNI_PATH", PLUGINS);
    if let Some(attachment) = attachment {
        command.env("CNI_CONTAINERID", &attachment.id).env("CNI_NETNS", &attachment.netns);
        command.env("CNI_IFNAME", &attachment.interface).env("CNI_ARGS", &attachment.args);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It may end before it has read everything.
    let _ = std::io::Write::write_all(&mut stdin, config.to_string().as_bytes());
    drop(stdin);
    let out = child.wait_with_output().unwrap();
    let said = serde_json::from_slice(&out.stdout).unwrap_or(Value::Null);
    if out.status.success() { Ok(said) } else { Err(said) }
}
