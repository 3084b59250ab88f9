//! Arguments of `drain`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::agent::record::STATE_DIR;
use crate::agent::recovery::WAIT_S;
use crate::bandwidth::Bandwidth;
use crate::cli::TlsArgs;
use crate::limits::DRAIN_PARALLEL_MAX;

const EXAMPLES: &str = "\
Examples:
  Every guest of this host, two at a time, to two targets; at each a QEMU waits under the same path:
      pageferry drain --qmp-dir /run/vms --to 10.0.0.2:4777 --to 10.0.0.3:4777 --parallel 2
  What would happen, in which order, how long:
      pageferry drain --qmp-dir /run/vms --to 10.0.0.2:4777 --max-bandwidth 8G --dry-run
  Guests from a file, with options of `migrate` for all of them after `--`:
      pageferry drain guests.toml --to 10.0.0.2:4777 --csv moved.csv -- --verify --downtime-ms 100
  After Ctrl-C, a crash or failures: those that are at their target are left alone
      pageferry drain --resume

guests.toml (or .json, with the same keys; only qmp is needed of each guest):
  [[guest]]
  name = \"web-1\"
  qmp = \"/run/vms/web-1.qmp\"
  to = \"10.0.0.2:4777\"
  target_qmp = \"/run/vms/{name}.qmp\"
  weight = 2

On each target runs `pageferry target --listen ... --allow 'qmp=/run/vms/*.qmp'` (without --qmp and
--once), beside a QEMU started with `-incoming defer` for each guest.

Exit codes: 0 every guest is at its target; 1 some are not, and run on here; 2 bad usage; 3 refused,
and no guest was touched; 4 of some the hand-over is uncertain (run it again, or see `pageferry
recover`); 5 some are paused here.";

/// Arguments of `drain`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DrainArgs {
    /// The guests, in a file of TOML or JSON.
    #[arg(value_name = "FILE",
          required_unless_present_any = ["qmp_dir", "qmp", "libvirt", "resume"])]
    pub guests: Option<PathBuf>,
    /// Every guest that runs behind a QMP socket in DIR; may be given several times.
    #[arg(long, value_name = "DIR")]
    pub qmp_dir: Vec<PathBuf>,
    /// Every guest that runs behind a QMP socket that matches, like '/run/vms/*/qmp'; may be given
    /// several times.
    #[arg(long, value_name = "PATTERN")]
    pub qmp: Vec<String>,
    /// Every guest that libvirt runs, by `virsh`, whose domain has a QMP socket of its own
    /// (qemu:commandline with -qmp): libvirt keeps its own to itself.
    #[arg(long, value_name = "URI", num_args = 0..=1, require_equals = true,
          default_missing_value = "qemu:///system")]
    pub libvirt: Option<String>,
    /// The guests of the run before, of those named here only the options.
    #[arg(long, conflicts_with_all = ["guests", "qmp_dir", "qmp", "libvirt"])]
    pub resume: bool,
    /// Where `pageferry target` listens, for guests that name none; may be given several times.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: Vec<String>,
    /// QMP socket at the target, for guests that name none; {name} becomes the guest's name.
    /// Default: the same path as here.
    #[arg(long, value_name = "PATTERN")]
    pub target_qmp: Option<String>,
    /// Guests on their way at the same time; 1 is one after the other, which gives each the whole
    /// link and needs the fewest rounds.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(DRAIN_PARALLEL_MAX)))]
    pub parallel: u32,
    /// Which go first.
    #[arg(long, value_enum, default_value_t = Order::AsListed)]
    pub order: Order,
    /// How guests that name no target are spread over those of --to.
    #[arg(long, value_enum, default_value_t = Spread::LeastLoaded)]
    pub spread: Spread,
    /// All guests together send no more than this; guests on their way share it by their weight.
    /// `pageferry set` on any of them changes it for all.
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Bandwidth>,
    /// Share the budget with other migrations of this host that name the same group, too.
    #[arg(long, value_name = "NAME")]
    pub bandwidth_group: Option<String>,
    /// Tell what would be done, and touch nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Move no guest unless each of them can be moved, as far as can be told before.
    #[arg(long)]
    pub all_or_nothing: bool,
    #[command(flatten)]
    #[allow(missing_docs)] // Documented at each of its fields; words here would be help.
    pub tls: TlsArgs,
    /// One JSON object a line instead of text; each names its guest.
    #[arg(long)]
    pub json: bool,
    /// Write the table at the end to FILE, too, as CSV.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Where decisions are written down, and which guests are at their target already.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Where the agents have sockets for `pageferry set` and the like. Default: /run/pageferry
    /// (root), or $XDG_RUNTIME_DIR/pageferry.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// For how many seconds to wait for the other side of a migration that was interrupted.
    #[arg(long, value_name = "S", default_value_t = WAIT_S)]
    pub wait: u64,
    /// Options of `migrate`, for each guest.
    #[arg(last = true, value_name = "OPTIONS OF MIGRATE")]
    pub migrate: Vec<String>,
}

/// Which guests go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// As the file, or the directory, has them.
    AsListed,
    /// Those with the least memory to move.
    SmallestFirst,
    /// Those that write the least, by a sample of a second that QEMU takes of each.
    LeastDirtyFirst,
}

/// How guests are spread over targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Spread {
    /// Each to the target that was given the least guest memory so far.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
}
