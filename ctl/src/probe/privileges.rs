//! What the kernel lets this process do: attach to a monitor, above all.

use std::fs;
use std::path::Path;

use super::finding::{Finding, Group, number};

/// Capabilities that matter here, by their bit (`linux/capability.h`).
const CAPABILITIES: [(u32, &str); 6] = [
    (12, "net_admin"),
    (14, "ipc_lock"),
    (19, "sys_ptrace"),
    (21, "sys_admin"),
    (23, "sys_nice"),
    (24, "sys_resource"),
];

/// What this process may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Privileges {
    /// Effective user.
    pub uid: u32,
    /// Effective capabilities, by bit.
    pub capabilities: u64,
    /// `kernel.yama.ptrace_scope`; `None` without Yama.
    pub ptrace_scope: Option<u64>,
    /// `vm.unprivileged_userfaultfd`.
    pub unprivileged_userfaultfd: Option<u64>,
}

impl Privileges {
    /// Reads them below `root`.
    pub fn read(root: &Path) -> Self {
        let status = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let uid = field("Uid:").and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok());
        let capabilities =
            field("CapEff:").and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        Self {
            uid: uid.unwrap_or(u32::MAX),
            capabilities: capabilities.unwrap_or(0),
            ptrace_scope: number(root, "proc/sys/kernel/yama/ptrace_scope"),
            unprivileged_userfaultfd: number(root, "proc/sys/vm/unprivileged_userfaultfd"),
        }
    }

    /// Has the capability of this name among [`CAPABILITIES`].
    pub fn can(&self, name: &str) -> bool {
        let bit = CAPABILITIES.iter().find(|(_, known)| *known == name).map(|(bit, _)| bit);
        bit.is_some_and(|bit| self.capabilities >> bit & 1 == 1)
    }

    /// Judges them.
    pub(super) fn findings(&self) -> Vec<Finding> {
        vec![self.user(), self.ptrace(), self.userfaultfd()]
    }

    fn user(&self) -> Finding {
        let has: Vec<&str> =
            CAPABILITIES.iter().map(|(_, name)| *name).filter(|name| self.can(name)).collect();
        let capabilities = match has.is_empty() {
            true => "no capabilities".to_owned(),
            false => has.join(", "),
        };
        let user = match self.uid {
            0 => "root".to_owned(),
            uid => format!("uid {uid}"),
        };
        Finding::ok(Group::Privileges, "privileges.user", format!("{user}; {capabilities}"))
    }

    /// Attaching means `PTRACE_SEIZE` on a process that is not our child.
    fn ptrace(&self) -> Finding {
        let (group, name) = (Group::Privileges, "privileges.ptrace");
        let why = "attaching to a running QEMU runs one system call in it by ptrace";
        match (self.ptrace_scope, self.can("sys_ptrace")) {
            (Some(3), _) => Finding::missing(group, name, "off until reboot (yama 3)", why)
                .fix("echo kernel.yama.ptrace_scope=1 > /etc/sysctl.d/99-ptrace.conf && reboot")
                .required(),
            (_, true) => Finding::ok(group, name, "any process (CAP_SYS_PTRACE)"),
            (None | Some(0), false) => Finding::ok(group, name, "processes of the same user"),
            (Some(scope), false) => {
                let whom = if scope == 1 { "own children only" } else { "CAP_SYS_PTRACE only" };
                Finding::missing(group, name, format!("{whom} (yama {scope})"), why)
                    .fix("sudo setcap cap_sys_ptrace+ep $(readlink -f $(command -v pageferry))")
                    .required()
            }
        }
    }

    /// Tracking gets by with user-mode faults, which need no privilege.
    fn userfaultfd(&self) -> Finding {
        let value = match self.unprivileged_userfaultfd {
            Some(1) => "all faults, for any user",
            Some(_) => "user-mode faults for any user: enough for tracking",
            None => "not in this kernel",
        };
        Finding::ok(Group::Privileges, "privileges.userfaultfd", value)
    }
}
