//! `migrate-vs-qemu`: the same guest memory by us, by QEMU, by iperf3 and by bare sockets.

use std::time::Duration;

use pageferry_ctl::lab::GuestParams;
use serde_json::json;

use crate::args::{MigrateVsQemuArgs, Tables};
use crate::ceiling::CeilingWay;
use crate::contender::{Contender, Record, Run};
use crate::error::BenchError;
use crate::goals;
use crate::host::Host;
use crate::interrupt;
use crate::iperf::IperfWay;
use crate::output;
use crate::qemu::QemuWay;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig, SETTLE};
use crate::screening::{Screened, screen};

const NAME: &str = "migrate-vs-qemu";
/// What the guest needs beside the memory that its program fills: kernel, initramfs, program.
const GUEST_OWN_MIB: u64 = 128;
/// And this part of what is filled: the kernel describes its memory, and keeps a reserve.
const GUEST_OWN_PART: u64 = 24;
/// A guest that rewrites its pages at this pace (16 of them every 16 s) is idle.
const IDLE_PAGES_PER_SECOND: u64 = 1;
/// QEMU's multifd channels to try.
const CHANNELS: [u8; 4] = [1, 2, 4, 8];
/// Congestion control that paces nothing and that every system has.
const UNPACED: &str = "reno";
/// The pause QEMU is asked for, besides its default.
const SHORT_DOWNTIME_MS: u64 = 20;

/// Runs the subcommand.
pub(crate) fn run(args: &MigrateVsQemuArgs) -> Result<(), BenchError> {
    let common = &args.common;
    let fill_mib = args.mib.unwrap_or(if common.quick { 256 } else { 2048 });
    let mut rig = Rig::new(common, shape(args, fill_mib))?;
    let host = Host::of(&rig)?;
    output::progress("starting the guest and filling its memory");
    rig.guest()?;
    let setup = json!({
        "fill_mib": fill_mib, "memory_mib": rig.memory_mib(), "turns": common.turns(),
        "quick": common.quick, "migrate_args": common.migrate_args,
        "target_args": common.target_args,
    });
    let mut results = Results::of_guests(NAME, &host, setup);
    let mut bench = Bench { args, rig, fill_mib };

    let congestion = bench.congestion_controls()?;
    let mut fixed = Vec::new();
    if bench.wanted("sockets") {
        let (all, kept) = bench.screen_ceilings(&congestion)?;
        fixed.extend(all.iter().take(kept).map(|s| Contender::Ceiling(s.way.clone())));
        results.parameters["screening_ceiling"] = json!(all);
    }
    if bench.wanted("iperf3") {
        let (all, kept) = bench.screen_iperf(&congestion)?;
        fixed.extend(all.iter().take(kept).map(|s| Contender::Iperf(s.way.clone())));
        results.parameters["screening_iperf3"] = json!(all);
    }
    for (name, warm) in [("warm", true), ("cold", false)] {
        let skipped = if warm { Tables::Cold } else { Tables::Warm };
        if args.tables == skipped {
            continue;
        }
        let records = bench.table(name, warm, &fixed)?;
        let mut ratios = goals::ratios(&records, warm);
        ratios.iter_mut().for_each(|ratio| ratio.what.insert_str(0, &format!("{name}: ")));
        results.ratios.extend(ratios);
        let gib = bench.gib();
        results.series.extend(records.iter().map(|record| record.series(name, gib)));
    }
    results.finish(&common.output)
}

fn shape(args: &MigrateVsQemuArgs, fill_mib: u64) -> GuestShape {
    GuestShape {
        memory_mib: (fill_mib + fill_mib / GUEST_OWN_PART + GUEST_OWN_MIB) & !1,
        params: GuestParams {
            fill_mib,
            hot_mib: fill_mib,
            writers: 1,
            pages_per_second: IDLE_PAGES_PER_SECOND,
            ..GuestParams::default()
        },
        smp: 2,
        memory: args.common.memory,
        prealloc: true,
        kernel_words: String::new(),
        fresh_after: Duration::from_secs_f64(args.cold_wait.max(0.0)),
        settle: SETTLE,
    }
}

struct Bench<'a> {
    args: &'a MigrateVsQemuArgs,
    rig: Rig,
    fill_mib: u64,
}

impl Bench<'_> {
    fn gib(&self) -> f64 {
        self.fill_mib as f64 / 1024.0
    }

    fn wanted(&self, name: &str) -> bool {
        let only = &self.args.only;
        only.is_empty() || only.iter().any(|word| name.contains(word.as_str()))
    }

    /// What sockets have by default, and one that never paces.
    fn congestion_controls(&self) -> Result<Vec<Option<String>>, BenchError> {
        let mut all = vec![None];
        if self.rig.net().congestion_control()? != UNPACED {
            all.push(Some(UNPACED.to_owned()));
        }
        Ok(all)
    }

    fn screen_ceilings(
        &mut self,
        congestion: &[Option<String>],
    ) -> Result<(Vec<Screened<CeilingWay>>, usize), BenchError> {
        let ways = CeilingWay::all(self.args.common.quick, congestion);
        output::progress(&format!("trying {} ways to run the plain-socket ceiling", ways.len()));
        let (from, to) = (self.rig.guest_memory()?, self.rig.scratch(true)?);
        let net = self.rig.net();
        let found = screen(ways, |way| {
            let reached = way.run(net, &from, to.memory())?.gib_per_s();
            output::progress(&format!("  {}: {reached:.2} GiB/s", way.name()));
            Ok(reached)
        })?;
        Ok(found)
    }

    fn screen_iperf(
        &mut self,
        congestion: &[Option<String>],
    ) -> Result<(Vec<Screened<IperfWay>>, usize), BenchError> {
        let ways = IperfWay::all(self.args.common.quick, congestion);
        output::progress(&format!("trying {} ways to run iperf3", ways.len()));
        let (net, bytes) = (self.rig.net(), self.fill_mib << 20);
        screen(ways, |way| {
            let reached = way.run(net, bytes)?.gib_per_s();
            output::progress(&format!("  {}: {reached:.2} GiB/s", way.name()));
            Ok(reached)
        })
    }

    /// All contenders of a table.
    fn contenders(&self, warm: bool, fixed: &[Contender]) -> Vec<Contender> {
        let ways = [None].into_iter().chain(CHANNELS.map(Some));
        let limits: &[Option<u64>] = if warm { &[None, Some(SHORT_DOWNTIME_MS)] } else { &[None] };
        let mut all = vec![Mover::Pageferry];
        for &downtime_ms in limits {
            all.extend(ways.clone().map(|channels| {
                Mover::Qemu(QemuWay { channels, downtime_ms, ..QemuWay::default() })
            }));
        }
        let movers = all.into_iter().map(Contender::Mover).filter(|c| self.wanted(&c.name()));
        movers.chain(fixed.iter().cloned()).collect()
    }

    /// Everyone in turn; each turn begins with the next one, so that no one always follows the
    /// same. The warm table's first turn is dropped.
    fn table(
        &mut self,
        name: &str,
        warm: bool,
        fixed: &[Contender],
    ) -> Result<Vec<Record>, BenchError> {
        let mut records: Vec<Record> =
            self.contenders(warm, fixed).into_iter().map(Record::new).collect();
        let (count, dropped) = (records.len(), u32::from(warm));
        for turn in 0..self.args.common.turns() + dropped {
            for position in 0..count {
                let record = &mut records[(position + turn as usize) % count];
                let who = record.contender.name();
                interrupt::check()?;
                // Without a guest nothing goes on; everything else is that contender's failure.
                self.rig.guest()?;
                match self.run_one(turn, &record.contender, warm) {
                    Ok((run, lost)) => {
                        output::progress_run(name, &who, &run);
                        record.failures.extend(lost.map(|lost| format!("guest lost: {lost}")));
                        if turn >= dropped {
                            record.runs.push(run);
                        }
                    }
                    Err(error @ BenchError::MemoryLost { .. }) => return Err(error),
                    Err(error) => {
                        output::progress(&format!("{name} turn {turn}: {who}: {}", error.chain()));
                        record.failures.push(error.chain());
                    }
                }
            }
        }
        Ok(records)
    }

    /// One run, and what was seen last if it cost the guest.
    fn run_one(
        &mut self,
        turn: u32,
        contender: &Contender,
        warm: bool,
    ) -> Result<(Run, Option<String>), BenchError> {
        let streamed = match contender {
            Contender::Mover(mover) => {
                let hop = match mover {
                    Mover::Pageferry => self.rig.hop_checked(warm)?,
                    Mover::Qemu(_) => self.rig.hop(*mover, warm)?,
                };
                let run = Run::of_moved(turn, &hop.moved, hop.tick_gap_ms, self.gib());
                return Ok((run, hop.lost));
            }
            Contender::Iperf(way) => way.run(self.rig.net(), self.fill_mib << 20)?,
            Contender::Ceiling(way) => {
                let (from, to) = (self.rig.guest_memory()?, self.rig.scratch(warm)?);
                way.run(self.rig.net(), &from, to.memory())?
            }
        };
        Ok((Run::of_streamed(turn, &streamed), None))
    }
}
