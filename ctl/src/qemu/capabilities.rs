//! The migration capabilities and parameters of a QEMU, set for us and set back.
//!
//! Whoever runs this QEMU may have others for migrations of his own: what was set before is
//! remembered, and [`Settings::restore`] puts it back after a failed attempt.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Execute;
use super::checks::Side;
use super::device_state::PausedBy;
use crate::qmp::QmpError;

/// What was changed, with what it was before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "what was changed must be set back after a failure"]
pub struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

const ON: &[&str] = &["events", "return-path", "x-ignore-shared"];

const PAUSE: &str = "pause-before-switchover";

/// The target locks the guest's disks when it lets it run, not when it has loaded it: until then the
/// source may need them again.
const LATE_BLOCK_ACTIVATE: &str = "late-block-activate";

/// What our migration of the device state can't live with: streams of other shapes, other
/// channels, and what would touch guest memory.
const OFF: &[&str] = &[
    "auto-converge",
    "background-snapshot",
    "block",
    "colo",
    "compress",
    "dirty-limit",
    "mapped-ram",
    "multifd",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "switchover-ack",
    "x-colo",
    "xbzrle",
    "zero-copy-send",
];

/// In bytes per second: without a limit the migration thread never sleeps. (Zero means none too,
/// but only since it was given that meaning.)
const BANDWIDTH: u64 = 1 << 40;

impl Settings {
    /// All that [`Settings::apply`] may change on either side, as it is now.
    pub fn current(qemu: &dyn Execute) -> Result<Self, QmpError> {
        let ours = |name: &str| {
            ON.contains(&name)
                || OFF.contains(&name)
                || [PAUSE, LATE_BLOCK_ACTIVATE].contains(&name)
        };
        let capabilities = capabilities(qemu)?.into_iter().filter(|(name, _)| ours(name)).collect();
        let mut parameters = parameters(qemu)?;
        parameters.retain(|name, _| parameters_wanted(Side::Source).contains_key(name));
        Ok(Self { capabilities, parameters })
    }

    /// Sets back what is not as it is here.
    pub fn restore_differing(&self, qemu: &dyn Execute) -> Result<(), QmpError> {
        let now = Self { capabilities: capabilities(qemu)?, parameters: parameters(qemu)? };
        let mut differing = self.clone();
        differing.capabilities.retain(|one| !now.capabilities.contains(one));
        differing.parameters.retain(|name, value| now.parameters.get(name) != Some(value));
        differing.restore(qemu)
    }

    /// Sets what moving the device state needs on this side. If QEMU refuses part of it, what was
    /// set before that is set back.
    pub fn apply(qemu: &dyn Execute, side: Side, pause: PausedBy) -> Result<Self, QmpError> {
        let mut wanted: Vec<_> = ON.iter().map(|name| (*name, true)).collect();
        wanted.extend(OFF.iter().map(|name| (*name, false)));
        match side {
            Side::Source => wanted.push((PAUSE, pause == PausedBy::Qemu)),
            Side::Target => wanted.push((LATE_BLOCK_ACTIVATE, true)),
        }
        let mut before = Self::default();
        let mut changes = Vec::new();
        for (name, state) in capabilities(qemu)? {
            if wanted.contains(&(name.as_str(), !state)) {
                before.capabilities.push((name.clone(), state));
                changes.push((name, !state));
            }
        }
        set_capabilities(qemu, &changes)?;
        match set_parameters(qemu, side) {
            Ok(parameters) => before.parameters = parameters,
            Err(error) => {
                let undone = before.restore(qemu);
                tracing::debug!(?undone, "capabilities set back");
                return Err(error);
            }
        }
        tracing::debug!(?before, ?side, "migration settings applied");
        Ok(before)
    }

    /// Sets back what was changed. Refused by QEMU while a migration is active.
    pub fn restore(self, qemu: &dyn Execute) -> Result<(), QmpError> {
        if !self.parameters.is_empty() {
            qemu.execute("migrate-set-parameters", Value::Object(self.parameters))?;
        }
        set_capabilities(qemu, &self.capabilities)
    }
}

fn capabilities(qemu: &dyn Execute) -> Result<Vec<(String, bool)>, QmpError> {
    let answer = qemu.execute("query-migrate-capabilities", json!({}))?;
    let of = |one: &Value| Some((one["capability"].as_str()?.to_owned(), one["state"].as_bool()?));
    Ok(answer.as_array().into_iter().flatten().filter_map(of).collect())
}

fn parameters(qemu: &dyn Execute) -> Result<Map<String, Value>, QmpError> {
    let answer = qemu.execute("query-migrate-parameters", json!({}))?;
    Ok(answer.as_object().cloned().unwrap_or_default())
}

/// TLS is ours to do, over the control connection; "normal" is the only mode with a stream.
fn parameters_wanted(side: Side) -> Map<String, Value> {
    let mut wanted = Map::new();
    wanted.insert("tls-creds".into(), json!(""));
    wanted.insert("mode".into(), json!("normal"));
    if side == Side::Source {
        wanted.insert("max-bandwidth".into(), json!(BANDWIDTH));
    }
    wanted
}

/// All in one command: QEMU checks the resulting set as a whole.
fn set_capabilities(qemu: &dyn Execute, changes: &[(String, bool)]) -> Result<(), QmpError> {
    if changes.is_empty() {
        return Ok(());
    }
    let list: Vec<Value> =
        changes.iter().map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    qemu.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
    Ok(())
}

/// Returns the parameters that were changed, as they were.
fn set_parameters(qemu: &dyn Execute, side: Side) -> Result<Map<String, Value>, QmpError> {
    let now = parameters(qemu)?;
    let mut before = Map::new();
    let mut changes = Map::new();
    for (name, value) in parameters_wanted(side) {
        if let Some(old) = now.get(&name)
            && *old != value
        {
            before.insert(name.clone(), old.clone());
            changes.insert(name, value);
        }
    }
    if !changes.is_empty() {
        qemu.execute("migrate-set-parameters", Value::Object(changes))?;
    }
    Ok(before)
}
