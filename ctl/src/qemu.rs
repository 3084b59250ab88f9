//! Everything that is said to, and looked up about, an unmodified QEMU.
//!
//! ```text
//!   inspect          memory + pid + checks   nothing is touched: facts, or refusals
//!   set up           capabilities            remembered, set back after a failure
//!   switchover       device_state            QEMU's own migration stream, without guest memory
//!   at any time      runstate                stop, cont, what state the guest is in
//! ```
//!
//! Owned by the agent of one guest, on whichever thread holds its [`Qmp`]. Guest memory itself is
//! not touched here, and neither is the process: regions are opened and tracked elsewhere.

pub mod capabilities;
pub mod channel;
pub mod checks;
mod claim;
pub mod device_state;
pub mod guard;
pub mod memory;
pub mod pid;
pub mod recorded;
pub mod refusal;
pub mod runstate;
pub mod source;
mod stream;
pub mod target;

use serde_json::Value;

use crate::qmp::{Qmp, QmpError, Version};

/// Something that answers QMP commands: a real monitor, or one recorded earlier.
pub trait Execute {
    /// QEMU's version.
    fn version(&self) -> Version;

    /// Runs a command, as [`Qmp::execute`] does.
    fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError>;

    /// Runs a command of the human monitor, as [`Qmp::human`] does.
    fn human(&self, command_line: &str) -> Result<String, QmpError> {
        let args = serde_json::json!({ "command-line": command_line });
        let text = self.execute("human-monitor-command", args)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }
}

/// The threads of its vCPUs; none of a QEMU that does not say, which costs no more than a worse choice
/// of cores.
fn vcpu_threads(qmp: &Qmp) -> Vec<i32> {
    let answer = qmp.execute("query-cpus-fast", serde_json::json!({})).unwrap_or_default();
    let vcpus = answer.as_array().into_iter().flatten();
    vcpus.filter_map(|vcpu| i32::try_from(vcpu["thread-id"].as_i64()?).ok()).collect()
}

impl Execute for Qmp {
    fn version(&self) -> Version {
        self.version()
    }

    fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError> {
        self.execute(command, args)
    }
}
