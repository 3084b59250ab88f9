//! Arguments: names are contracts, every default is said in the help.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::agent::allow::Rule;
use crate::agent::lanes::{Narrow, Pin, Transport};
use pageferry_datapath::ids::SessionId;

use crate::agent::admin::Limit;
use crate::agent::compress::Compress;
use crate::agent::record::STATE_DIR;
use crate::agent::recovery::WAIT_S;
use crate::agent::shares::Weight;
use crate::bandwidth::Bandwidth;
use crate::drain::DrainArgs;
use crate::limits;

/// Live-migrates the memory of a running virtual machine to another host.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Can this host migrate, and what would make it faster?
      pageferry probe
  Certificates for two hosts, made once (more with `pageferry pki --help`):
      pageferry pki init
      pageferry pki issue host-b 10.0.0.2
  On the target host, beside a QEMU started with `-incoming defer`:
      pageferry target --listen 10.0.0.2:4777 --qmp /run/vm1.qmp
  On the source host, beside the running QEMU:
      pageferry migrate --qmp /run/vm1.qmp --to 10.0.0.2:4777
  Every guest of a host, with a QEMU waiting for each at the target:
      pageferry drain --qmp-dir /run/vms --to 10.0.0.2:4777
  See it happen on this machine, with nothing prepared:
      pageferry demo

Exit codes of migrate and target: 0 the guest runs at the target; 1 failed, the guest runs at the
source; 2 bad usage; 3 refused before the guest was touched; 4 hand-over uncertain; 5 failed, and
the guest is paused at the source; 6 its QEMU ended, and the guest with it.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what this host can do for a migration, and how to mend what it can't.
    Probe(ProbeArgs),
    /// Wait for a migration into a QEMU that was started with `-incoming defer`.
    Target(TargetArgs),
    /// Move a running guest to a waiting target.
    Migrate(Box<MigrateArgs>),
    /// Move many guests to one or several waiting targets, one after the other or side by side.
    Drain(Box<DrainArgs>),
    /// Find out what became of a migration whose agent, host or network was lost, and finish it.
    Recover(RecoverArgs),
    /// List the migrations that this host has records of, and which of them are on their way.
    Status(StatusArgs),
    /// End a migration that is on its way, at either end; the guest goes on at the source.
    Cancel(CancelArgs),
    /// Set up two hosts (network namespaces) with a guest each and move one live.
    Demo(DemoArgs),
    /// Change what a running migration is held to.
    Set(SetArgs),
    /// Make and look at the certificates that hosts show each other.
    Pki(PkiArgs),
    /// Looks after a guest whose source agent dies: started by the agent itself.
    #[command(hide = true)]
    Guard,
    /// The program inside the demo's guest.
    #[command(hide = true)]
    GuestInit,
}

/// Arguments of `probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Certificates of this side.
#[derive(Clone, Debug, Default, Args)]
pub struct TlsArgs {
    /// Certificates to show and to believe, as `pageferry pki`, QEMU or libvirt lay them out.
    /// Default: /etc/pageferry/pki (root) or ~/.config/pageferry/pki; on loopback none are needed.
    #[arg(long, value_name = "DIR", conflicts_with = "insecure")]
    pub tls_dir: Option<PathBuf>,
    /// Talk to whoever is there, without TLS. Who can reach the network in between can then read
    /// and change the guest.
    #[arg(long)]
    pub insecure: bool,
}

/// Arguments of `set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The session, as `migrate` names it when it starts, or the first digits of it; of the only
    /// one that is running, none are needed.
    #[arg(default_value = "")]
    pub session: String,
    /// What all its lanes together may send from now on: bits a second, as 500M or 2.5G, or `none`.
    #[arg(long, value_name = "RATE", required_unless_present = "weight")]
    pub max_bandwidth: Option<Limit>,
    /// Its weight, from now on, among the migrations that share its bandwidth (`migrate
    /// --bandwidth-group`, `drain`): 1 to 1000.
    #[arg(long, value_name = "N")]
    pub weight: Option<Weight>,
    /// Where the agent has its socket. Default: /run/pageferry (root), or $XDG_RUNTIME_DIR/pageferry.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
}

/// Arguments of `target`.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// Address and port for the control connection and, where it is TCP, the lanes.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: String,
    /// QMP socket of the waiting QEMU. Without it the source names one (`--target-qmp`), which has
    /// to be allowed.
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)] // Documented at each of its fields; words here would be help.
    pub tls: TlsArgs,
    /// Take lanes in at the addresses in this network, as 10.1.0.0/16; given several times, the first
    /// is liked best. Default: at every address that --listen covers.
    #[arg(long, value_name = "CIDR")]
    pub network: Vec<IpNet>,
    /// Cores the lanes may use, like 0-3,8. Default: chosen from the machine.
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// Most lanes a source may open.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub lanes_max: u16,
    /// What lanes may run on.
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Which guest memory RDMA keeps in place here.
    #[arg(long, value_enum, default_value_t = Pin::Touched)]
    pub pin: Pin,
    /// Where to write down what was decided.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Where each migration has a socket for `pageferry cancel`. Default: /run/pageferry (root), or
    /// $XDG_RUNTIME_DIR/pageferry.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// What may be written, and by whom; may be given several times. qmp=PATTERN: sockets that a
    /// source may name. memory=PATTERN: files of guest memory. guest=PATTERN: QEMU's -name.
    /// peer=PATTERN: names in the source's certificate. Default: whoever has a certificate, into
    /// the QEMU of --qmp.
    #[arg(long, value_name = "KIND=PATTERN")]
    pub allow: Vec<Rule>,
    /// Largest guest to take in, in MiB. Default: as large as the waiting QEMU.
    #[arg(long, value_name = "MIB")]
    pub guest_max_mib: Option<u64>,
    /// Longest that a session may take until its guest is loaded, in seconds.
    #[arg(long, value_name = "N", default_value_t = 86400)]
    pub session_max_s: u64,
    /// Take in guests only by encrypted lanes.
    #[arg(long, conflicts_with = "insecure")]
    pub encrypt: bool,
    /// For how many seconds a source may be cut off before its migration ends here.
    #[arg(long, value_name = "S", default_value_t = limits::RECONNECT_TIMEOUT_S)]
    pub reconnect_timeout: u64,
    /// Migrations at the same time, where the sources name the QMP sockets.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub sessions_max: usize,
    /// Of them, how many may be of one source, by its certificate. Default: all.
    #[arg(long, value_name = "N")]
    pub sessions_per_peer: Option<usize>,
    /// Exit after one migration instead of waiting for the next.
    #[arg(long)]
    pub once: bool,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
    /// Use plain sockets even where io_uring works.
    #[arg(long)]
    pub no_io_uring: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// QMP socket of the QEMU whose guest is to move.
    #[arg(long, value_name = "PATH")]
    pub qmp: PathBuf,
    /// Where `pageferry target` listens.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// QMP socket at the target, if the target was not started with one.
    #[arg(long, value_name = "PATH")]
    pub target_qmp: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)] // Documented at each of its fields; words here would be help.
    pub tls: TlsArgs,
    /// Whom the target's certificate has to name. Default: the host of --to.
    #[arg(long, value_name = "NAME", conflicts_with = "insecure")]
    pub tls_hostname: Option<String>,
    /// Number of lanes. Default: chosen from both machines.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub lanes: Option<u16>,
    /// Spread lanes over the NICs in this network, as 10.1.0.0/16; given several times, the first is
    /// liked best. Default: every pair of NICs of the two hosts that can talk.
    #[arg(long, value_name = "CIDR")]
    pub network: Vec<IpNet>,
    /// Cores the lanes may use, like 0-3,8. Default: chosen from the machine.
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// What lanes run on.
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Which guest memory RDMA keeps in place here.
    #[arg(long, value_enum, default_value_t = Pin::Touched)]
    pub pin: Pin,
    /// Encrypt guest memory on its way too, by TLS on every lane: in the kernel where it can. RDMA,
    /// which has no encryption, is then not used.
    #[arg(long, conflicts_with = "insecure")]
    pub encrypt: bool,
    /// The longest pause wanted, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub downtime_ms: u64,
    /// Most rounds after the first pass.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub rounds_max: u32,
    /// What to do with a guest that writes faster than the lanes move.
    #[arg(long, value_enum, default_value_t = NotConverging::Stop)]
    pub not_converging: NotConverging,
    /// Compare a digest of all guest memory on both sides inside the pause.
    #[arg(long)]
    pub verify: bool,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
    /// With --json: how far it is, too, five times a second.
    #[arg(long, requires = "json")]
    pub progress: bool,
    /// Write the latencies of batches to FILE in the .hgrm format, and beside it those of barriers
    /// and scans (`run.hgrm`, `run.barriers.hgrm`, `run.scans.hgrm`).
    #[arg(long, value_name = "FILE")]
    pub histogram: Option<PathBuf>,
    /// Where to write down what was decided.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// For how many seconds the connections may be cut before the migration ends; a shorter cut costs
    /// time.
    #[arg(long, value_name = "S", default_value_t = limits::RECONNECT_TIMEOUT_S)]
    pub reconnect_timeout: u64,
    /// The same in milliseconds while the guest is paused: past it the guest goes on here, unless
    /// the hand-over was decided.
    #[arg(long, value_name = "MS", default_value_t = limits::BLACKOUT_TIMEOUT_MS)]
    pub blackout_timeout_ms: u64,
    /// Share --max-bandwidth with every other migration of this host that names the same group, by
    /// weight. Whoever joins without --max-bandwidth takes the group's.
    #[arg(long, value_name = "NAME")]
    pub bandwidth_group: Option<String>,
    /// This migration's weight in its group.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "bandwidth_group",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub bandwidth_weight: u32,
    /// Where the agent has a socket for `pageferry set` and the like. Default: /run/pageferry (root),
    /// or $XDG_RUNTIME_DIR/pageferry.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Whether to send from guest memory without a copy.
    #[arg(long, value_enum, default_value_t = ZeroCopyChoice::Auto)]
    pub zero_copy: ZeroCopyChoice,
    /// Whether to compress memory on its way: `auto` while it makes the migration faster and guests
    /// leave the processor to it, `off`, or always with `lz4`, `zstd` or `zstd:LEVEL` (1 to 19).
    /// Lanes over RDMA never do.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub compress: Compress,
    /// Whether a huge page of which a little was written is narrowed to the 4 KiB pages that changed
    /// before it is sent again. Lanes over RDMA never do.
    #[arg(long, value_enum, default_value_t = Narrow::Auto)]
    pub narrow: Narrow,
    /// Send no more than this, all lanes together: bits a second, as 500M, 1G or 2.5G (125MB counts
    /// bytes). The pause is exempt. `pageferry set` changes it while the migration runs.
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Bandwidth>,
    /// Use plain sockets even where io_uring works.
    #[arg(long)]
    pub no_io_uring: bool,
    /// How scans report and protect.
    #[arg(long, value_enum, default_value_t = Scan::Auto)]
    pub scan: Scan,
    /// Leave out the drain point for direct I/O. The guest's memory will be wrong; for tests.
    #[arg(long, hide = true)]
    pub unsafe_no_drain: bool,
}

/// What to do with a guest that writes faster than the lanes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NotConverging {
    /// Stop; the guest runs on where it is.
    Stop,
    /// Switch over, with a longer pause than asked for.
    SwitchOver,
}

/// Whether to send from guest memory without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ZeroCopyChoice {
    /// Try it where both ends are different machines; stop when the kernel says it copied.
    Auto,
    /// Never.
    Off,
}

/// How scans report and protect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scan {
    /// Two phases where KVM's MMU listens, one elsewhere.
    Auto,
    /// Report and protect in one call.
    OnePhase,
    /// Report, then protect what was reported.
    TwoPhase,
}

const RECOVER_EXAMPLES: &str = "\
Examples:
  After `migrate` ended with exit code 4, or its host was lost: on the source, then on the target
      pageferry recover
  One of several, on either side:
      pageferry recover 0123456789abcdef0123456789abcdef
  The source's host burned down; the guest is loaded and paused at the target:
      pageferry recover 0123456789abcdef0123456789abcdef --peer-is-dead
  It is settled here, and `pageferry status` on the other side knows nothing of it:
      pageferry recover 0123456789abcdef0123456789abcdef --forget

--peer-is-dead is your word that the other side's QEMU does not run and never will. If it does, the
guest runs twice, and both write to its disks.

--forget is your word that the other side has no record of the session. If it has one, and its QEMU
waits for the word of this side, it waits for ever: nothing runs that should not, but only
--peer-is-dead there gets it going or you end it. A record that can't be read is removed too: one that
was never written said nothing; for one that was spoiled, look first on which side the guest runs.

Exit codes: 0 every session is settled, or in use and passed over; 1 a guest runs on both sides; 2 bad
usage; 3 the record of SESSION is in use, or one can't be read; 4 only the other side knows, and it does
not answer, or a QEMU here lives and does not; 5 a guest did not go on; 6 a guest is gone.";

/// Arguments of `recover`.
#[derive(Debug, Args)]
#[command(after_help = RECOVER_EXAMPLES)]
pub struct RecoverArgs {
    /// Which session. Default: all that this host has records of.
    #[arg(value_name = "SESSION")]
    pub session: Option<SessionId>,
    /// The other side's guest does not run and never will: your word.
    #[arg(long, requires = "session")]
    pub peer_is_dead: bool,
    /// Remove the record of a session that the other side has none of, if it is settled here or nothing
    /// could run here by it: your word.
    #[arg(long, requires = "session", conflicts_with = "peer_is_dead")]
    pub forget: bool,
    /// For how many seconds to wait for the other side.
    #[arg(long, value_name = "S", default_value_t = WAIT_S)]
    pub wait: u64,
    /// Where decisions were written down.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Where decisions are written down.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Which session: `pageferry status` lists them.
    #[arg(value_name = "SESSION")]
    pub session: SessionId,
    /// Where decisions are written down.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The migration's events as JSON lines, nothing else.
    #[arg(long)]
    pub json: bool,
    /// Memory of the demo's guest in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub memory_mib: u64,
    /// Memory that its program fills with self-verifying pages, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub fill_mib: u64,
    /// Pages that its program writes each second.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    pub write_rate: u64,
}

const PKI_EXAMPLES: &str = "\
Examples:
  Once, on the machine that is to sign for all hosts:
      pageferry pki init
  For each host, by the name and addresses that sources will use in --to:
      pageferry pki issue host-b 10.0.0.2
      scp /etc/pageferry/pki/hosts/host-b/*.pem root@host-b:/etc/pageferry/pki/
  What a host has, until when, and what is wrong with it:
      pageferry pki show
  Certificates that QEMU or libvirt has already:
      pageferry target --tls-dir /etc/pki ...
      pageferry migrate --tls-dir /etc/pki/qemu ...

Without --dir it is /etc/pageferry/pki for root, and ~/.config/pageferry/pki for others.";

/// Arguments of `pki`.
#[derive(Debug, Args)]
#[command(after_help = PKI_EXAMPLES)]
pub struct PkiArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: PkiCommand,
}

/// What `pki` does.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a certificate authority: one key that signs for every host.
    Init {
        /// Where.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// What it is called, for people.
        #[arg(long, value_name = "NAME", default_value = "pageferry CA")]
        name: String,
        /// For how many days it is valid.
        #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Make both certificates of one host: one as a target, one as a source.
    Issue {
        /// The host's name, then further names and addresses of it.
        #[arg(required = true, value_name = "NAME|ADDRESS")]
        names: Vec<String>,
        /// Where the authority is.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Where to put them; --dir itself for this very host. Default: DIR/hosts/NAME.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// For how many days they are valid.
        #[arg(long, value_name = "N", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Tell what a directory holds, until when it is valid, and what is wrong with it.
    Show {
        /// Which; QEMU's and libvirt's layouts are known too.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// A list of cores as taskset writes it: `0-3,8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// Not a list of cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a list of cores looks like 0-3,8, with numbers below 4096")]
pub struct CpuListError;

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| match text.trim().parse::<usize>() {
            Ok(cpu) if cpu < 4096 => Ok(cpu),
            _ => Err(CpuListError),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(CpuListError);
                    }
                    cpus.extend(first..=last);
                }
                None => cpus.push(number(part)?),
            }
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self(cpus))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn cpu_lists() {
        assert_eq!("0-3,8".parse(), Ok(CpuList(vec![0, 1, 2, 3, 8])));
        assert_eq!("5,1,5".parse(), Ok(CpuList(vec![1, 5])));
        for bad in ["", "a", "3-1", "1-", "99999", "0-99999999"] {
            assert_eq!(bad.parse::<CpuList>(), Err(CpuListError), "{bad}");
        }
    }
}
