//! The two ends of a benchmark of wires: what joins them, their cores, and who answers.
//!
//! ```text
//!   this process: a thread at the source's end, on its core
//!   another one:  `serve` at the target's end, on its core; or one that was started elsewhere (--to)
//! ```

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use pageferry_ctl::lab::Workplace;

use crate::args::{RdmaEnds, WireArgs};
use crate::cpu;
use crate::error::BenchError;
use crate::net::{End, Net};
use crate::serve::Peer;

/// Both ends.
#[derive(Debug)]
pub(crate) struct Ends {
    // Drop order: namespaces before the list of what is to be undone.
    pub(crate) net: Net,
    /// The source's and the target's.
    pub(crate) cores: (Option<usize>, Option<usize>),
    rdma: Result<RdmaEnds, &'static str>,
    to: Option<SocketAddr>,
    /// Whoever holds it open keeps cores from sleeping too deep.
    _awake: Option<File>,
    _workplace: Option<Arc<Workplace>>,
}

impl Ends {
    /// Makes what `args` ask for.
    pub(crate) fn new(args: &WireArgs) -> Result<Self, BenchError> {
        if args.to.is_some() && (args.net.is_some() || args.link_mbit > 0) {
            let what = "--to is another machine's end: --net and --link-mbit don't go with it";
            return Err(BenchError::Usage { what });
        }
        let (net, workplace) = match args.net {
            None => (Net::machine(), None),
            Some(kind) => {
                let workplace = Workplace::new()?;
                (Net::between(kind, &workplace)?, Some(workplace))
            }
        };
        net.shape(args.link_mbit)?;
        Ok(Self {
            net,
            cores: args.cores.two(),
            rdma: args.rdma.resolve(),
            to: args.to,
            _awake: args.cpu_dma_latency.map(hold_awake).transpose()?,
            _workplace: workplace,
        })
    }

    /// The RDMA device, if one is known.
    pub(crate) fn rdma(&self) -> Result<&RdmaEnds, BenchError> {
        self.rdma.as_ref().map_err(|&what| BenchError::Usage { what })
    }

    /// Runs `work` on a thread at the source, on its core, with the end that answers over TCP.
    pub(crate) fn tcp<T: Send>(
        &self,
        work: impl FnOnce(&mut Peer) -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        self.run(self.net.target_address().ip(), self.cores, work)
    }

    /// The same at the address of an RDMA device; the source's address comes first.
    pub(crate) fn over_rdma<T: Send>(
        &self,
        work: impl FnOnce(IpAddr, &mut Peer) -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        let rdma = self.rdma()?;
        self.run(rdma.peer, self.cores, |peer| work(rdma.local, peer))
    }

    /// The same with cores left to what is run, as a migration's lanes choose theirs.
    pub(crate) fn unpinned<T: Send>(
        &self,
        rdma: bool,
        work: impl FnOnce(Option<IpAddr>, &mut Peer) -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        let free = (None, None);
        match rdma {
            false => self.run(self.net.target_address().ip(), free, |peer| work(None, peer)),
            true => {
                let rdma = self.rdma()?;
                self.run(rdma.peer, free, |peer| work(Some(rdma.local), peer))
            }
        }
    }

    fn run<T: Send>(
        &self,
        at: IpAddr,
        (here, there): (Option<usize>, Option<usize>),
        work: impl FnOnce(&mut Peer) -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        let task = || {
            let mut peer = match self.to {
                Some(address) => Peer::connect(address),
                None => {
                    Peer::start(|program: &Path| self.net.command(End::Target, program), at, there)
                }
            }?;
            here.map_or(Ok(()), cpu::pin_to)?;
            work(&mut peer)
        };
        // A thread of its own: only it is to be kept on one core.
        let joined = |scope: std::thread::ScopedJoinHandle<'_, _>| {
            scope.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        self.net.at(End::Source, || std::thread::scope(|scope| joined(scope.spawn(task))))?
    }
}

/// The kernel's power management: microseconds, as a native integer, for as long as it is open.
fn hold_awake(us: i32) -> Result<File, BenchError> {
    const AT: &str = "/dev/cpu_dma_latency";
    let mut file = File::options().write(true).open(AT).map_err(BenchError::io("open", AT))?;
    file.write_all(&us.to_ne_bytes()).map_err(BenchError::io("write to", AT))?;
    Ok(file)
}
