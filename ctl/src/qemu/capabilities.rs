//! The migration capabilities and parameters of a QEMU, set for us and set back.
//!
//! Whoever runs this QEMU may have others for migrations of his own: what was set before is
//! remembered, and [`Settings::restore`] puts it back after a failed attempt.

use serde_json::{Map, Value, json};

use super::Execute;
use super::checks::Side;
use super::device_state::PausedBy;
use crate::qmp::QmpError;

/// What was changed, with what it was before.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "what was changed must be set back after a failure"]
pub struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

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
    /// Sets what moving the device state needs on this side. If QEMU refuses part of it, what was
    /// set before that is set back.
    pub fn apply(qemu: &dyn Execute, side: Side, pause: PausedBy) -> Result<Self, QmpError> {
        let mut wanted = vec![("x-ignore-shared", true), ("return-path", true), ("events", true)];
        wanted.extend(OFF.iter().map(|name| (*name, false)));
        if side == Side::Source {
            wanted.push(("pause-before-switchover", pause == PausedBy::Qemu));
        }
        let mut before = Self::default();
        let capabilities = qemu.execute("query-migrate-capabilities", json!({}))?;
        let mut changes = Vec::new();
        for one in capabilities.as_array().into_iter().flatten() {
            let (Some(name), Some(state)) = (one["capability"].as_str(), one["state"].as_bool())
            else {
                continue;
            };
            if wanted.contains(&(name, !state)) {
                before.capabilities.push((name.into(), state));
                changes.push((name.to_owned(), !state));
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
    // TLS is ours to do, over the control connection; "normal" is the only mode with a stream.
    let mut wanted = vec![("tls-creds", json!("")), ("mode", json!("normal"))];
    if side == Side::Source {
        wanted.push(("max-bandwidth", json!(BANDWIDTH)));
    }
    let now = qemu.execute("query-migrate-parameters", json!({}))?;
    let mut before = Map::new();
    let mut changes = Map::new();
    for (name, value) in wanted {
        if let Some(old) = now.get(name)
            && *old != value
        {
            before.insert(name.into(), old.clone());
            changes.insert(name.into(), value);
        }
    }
    if !changes.is_empty() {
        qemu.execute("migrate-set-parameters", Value::Object(changes))?;
    }
    Ok(before)
}
