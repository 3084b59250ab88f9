//! What can go wrong between this client and a monitor.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

/// Why a monitor could not be reached or a command not be run.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nothing listens at the path, or it is not accessible.
    #[error("can't connect to the QMP socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The greeting never came: QEMU serves one client per QMP socket at a time.
    #[error("the QMP socket {} does not greet: another client holds it", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// What answered is not a QMP monitor.
    #[error("what answers at {} is not a QMP monitor", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
    },
    /// QEMU understood the command and said no.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// QEMU closed the connection: it exited, or its monitor was removed.
    #[error("QEMU closed its QMP connection while {doing}")]
    Closed {
        /// The command or event that was being waited for.
        doing: String,
    },
    /// No answer in time. Whether a command was run is unknown.
    #[error("no answer from QEMU in time while {doing}")]
    Timeout {
        /// The command or event that was being waited for.
        doing: String,
    },
    /// A line longer than any that QEMU sends.
    #[error("a line from the QMP socket is longer than {limit_bytes} bytes")]
    LineTooLong {
        /// The bound.
        limit_bytes: usize,
    },
    /// A line that is not a JSON object of QMP.
    #[error("a line from the QMP socket is not QMP")]
    Malformed {
        /// Where the JSON ends, if it is no JSON at all.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// A system call on the socket failed.
    #[error("{call} on the QMP socket failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

impl QmpError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<Cow<'static, str>> {
        let hint: Cow<'static, str> = match self {
            Self::Connect { path, source } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "run pageferry as root, or as the user that runs QEMU".into()
                }
                _ => format!(
                    "start QEMU with -qmp unix:{},server=on,wait=off, or name the socket it has",
                    path.display()
                )
                .into(),
            },
            Self::Busy { .. } => "close the other client, or give QEMU one more monitor: a second \
                                  -qmp unix:PATH,server=on,wait=off"
                .into(),
            Self::NotQmp { .. } => {
                "name the socket of QEMU's -qmp option, not that of -monitor or of the guest agent"
                    .into()
            }
            _ => return None,
        };
        Some(hint)
    }
}
