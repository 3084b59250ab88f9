//! Why a drain could not begin. What happens to one guest is not here: that is its row in the table.

use std::io;
use std::path::PathBuf;

use crate::report::exit::Exit;

/// Why there is no drain. Nothing was touched.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// The list of guests can't be read.
    #[error("can't read the list of guests {}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// It is no list of guests.
    #[error("{} is not a list of guests", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// It is no list of guests.
    #[error("{} is not a list of guests", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// `--qmp` is not a pattern.
    #[error("{pattern:?} is not a pattern of paths")]
    Pattern {
        /// What was given.
        pattern: String,
        /// Where and why.
        #[source]
        source: glob::PatternError,
    },
    /// `virsh` could not be run, or did not do it.
    #[error("libvirt's guests can't be listed by `{command}`")]
    Virsh {
        /// What was run.
        command: String,
        /// Why it could not be run, or what it said.
        #[source]
        source: io::Error,
    },
    /// Nothing to do.
    #[error("no guests")]
    NoGuests,
    /// The run before is not known.
    #[error("there was no drain before, as far as {} says", path.display())]
    NothingToResume {
        /// The ledger.
        path: PathBuf,
    },
    /// A name that is none.
    #[error("{name:?} is no name for the guest of {}: it has to fit in a path", qmp.display())]
    Name {
        /// What it is.
        name: String,
        /// Whose.
        qmp: PathBuf,
    },
    /// Two guests are one, or can't be told apart.
    #[error("two guests are {what:?}")]
    Twice {
        /// Name or socket.
        what: String,
    },
    /// A weight that no budget takes.
    #[error("{name} has the weight {weight}; weights are 1 to 1000")]
    Weight {
        /// Whose.
        name: String,
        /// What it is.
        weight: u32,
    },
    /// Nobody said where to.
    #[error("nobody says where {name} is to go")]
    NoTarget {
        /// Who.
        name: String,
    },
    /// The options after `--` are none of `migrate`.
    #[error("the options after -- are not understood: {text}")]
    Options {
        /// clap's words.
        text: String,
    },
    /// Another drain is under way with this state directory.
    #[error("another drain is under way, as {} says", path.display())]
    Busy {
        /// Its ledger.
        path: PathBuf,
    },
    /// The ledger can't be kept.
    #[error("which guests are moved can't be written down in {}", path.display())]
    Ledger {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The budget can't be kept.
    #[error("no budget can be shared in {}", dir.display())]
    Budget {
        /// The runtime directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The table can't be written.
    #[error("can't write {}", path.display())]
    Csv {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: csv::Error,
    },
    /// Ctrl-C before the first guest.
    #[error("interrupted before a guest was touched")]
    Interrupted,
}

impl DrainError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Toml { .. } | Self::Json { .. } => {
                "each guest is a [[guest]] with qmp, and name, to, target_qmp, weight if you like; \
                 see pageferry drain --help"
                    .into()
            }
            Self::Virsh { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "apt install libvirt-clients, or name the sockets with --qmp-dir".into()
            }
            Self::Virsh { .. } => "name the sockets with --qmp-dir instead".into(),
            Self::NoGuests => "guests that run and have a QMP socket: a file, --qmp-dir, --qmp, \
                               --libvirt"
                .into(),
            Self::NothingToResume { .. } => {
                "--state-dir has to be that of the run before; else name the guests".into()
            }
            Self::NoTarget { .. } => "name targets with --to HOST:PORT, or one for each guest in \
                                      the file"
                .into(),
            Self::Busy { .. } => "wait for it, or give this one a --state-dir of its own".into(),
            Self::Ledger { .. } => "name a writable folder with --state-dir".into(),
            Self::Budget { .. } => {
                "name a folder with --runtime-dir that nobody else may write to".into()
            }
            Self::Options { .. } => "see pageferry migrate --help".into(),
            Self::Name { .. } | Self::Twice { .. } => "name the guests in a file".into(),
            Self::Unreadable { .. } => "name a file of guests, or a folder with QMP sockets".into(),
            Self::Interrupted | Self::Pattern { .. } | Self::Weight { .. } | Self::Csv { .. } => {
                return None;
            }
        })
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Toml { .. }
            | Self::Json { .. }
            | Self::Pattern { .. }
            | Self::Name { .. }
            | Self::Twice { .. }
            | Self::Weight { .. }
            | Self::NoTarget { .. }
            | Self::Options { .. } => Exit::BadUsage,
            Self::Interrupted | Self::Csv { .. } => Exit::RunningAtSource,
            _ => Exit::Refused,
        }
    }
}
