//! `pageferry migrate`: the source agent with its events, report and exit code.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry_datapath::lane::{LanePath, LaneStats, SealedBy, ZeroCopy};
use pageferry_datapath::pace::Pacer;
use pageferry_datapath::planner::{Goals, Stalled};
use pageferry_datapath::source::{Failure, FailureKind, Outcome, Phase, RoundReport, SourceReport};
use pageferry_uring::plan::{PathWish, ZeroCopyWish};

use crate::agent::admin;
use crate::agent::lanes::{self, LaneChoice, Transport};
use crate::agent::monitor::{GuestFacts, SourceMonitor};
use crate::agent::source::overseen::{Group, Overseen};
use crate::agent::source::{self, SourceOptions, SourceResult, Watch};
use crate::agent::tls::{Caller, Security};
use crate::cli::{CpuList, MigrateArgs, NotConverging, ZeroCopyChoice};
use crate::host;
use crate::qemu::source::QemuSource;
use crate::report::Reporter;
use crate::report::compression::Compression;
use crate::report::events::{
    Event, LaneDetail, MigrationOutcome, RunningOn, Secured, Start, Summary,
};
use crate::report::exit::Exit;
use crate::report::histograms::Latencies;
use crate::report::narrowing::NarrowingDetail;
use crate::report::timeline::{Timeline, ms, per_second};

/// Runs the subcommand.
pub fn run(args: &MigrateArgs, cancel: &Receiver<()>, reporter: &mut dyn Reporter) -> Exit {
    match QemuSource::inspect(&args.qmp, args.scan) {
        Ok(mut monitor) => run_with(&mut monitor, args, cancel, reporter),
        Err(failure) => refused(failure, reporter),
    }
}

/// The same for the guest of any monitor; what `args` say of QEMU is not looked at.
pub fn run_with(
    monitor: &mut dyn SourceMonitor,
    args: &MigrateArgs,
    cancel: &Receiver<()>,
    reporter: &mut dyn Reporter,
) -> Exit {
    let mut options = options(args);
    let facts = monitor.facts().clone();
    options.lanes.leave_to_vcpus(facts.pid, &facts.vcpus);
    if let (None, Some(what)) = (&options.lanes.no_rdma, &facts.gives_memory_back) {
        // A page that a device has pinned stays the device's when the guest gets another for it.
        options.lanes.no_rdma = Some(format!("{what} may give memory back that RDMA has pinned"));
    }
    if let (Transport::Rdma, Some(why)) = (args.transport, &options.lanes.no_rdma) {
        let hint = "leave out --transport rdma, or see `pageferry probe`";
        return refused(crate::agent::failure::no_rdma(why, hint), reporter);
    }
    if options.caller.insecure
        && let Some(warning) = Security::Insecure.warning("source")
    {
        eprintln!("warning: {warning}");
    }
    let mut told = Told::default();
    let pacer = Arc::clone(&options.lanes.pacer);
    let group = args.bandwidth_group.clone().map(|name| Group {
        name,
        weight: args.bandwidth_weight,
        budget: args.max_bandwidth,
    });
    let mut overseen = Overseen::new(args.to.clone(), facts.pid, pacer, group);
    let runtime_dir = args.runtime_dir.clone().unwrap_or_else(admin::runtime_dir);
    let result = source::run(&options, monitor, cancel, &mut |watch| {
        overseen.note(&runtime_dir, watch);
        told.tell(watch, &facts, &options, reporter);
        reporter.progress(watch);
    });
    told.tell_end(&result, reporter);
    let exit = exit_of(&result.outcome);
    let latencies = Latencies::collect(&result.lanes, &result.scans);
    if let Some(path) = &args.histogram
        && let Err(error) = latencies.write_hgrm(path)
    {
        eprintln!("error: {error}: {}", error.source);
    }
    reporter.event(&Event::Summary(Box::new(summary(&facts, &result, exit, &latencies))));
    exit
}

fn refused(failure: Failure, reporter: &mut dyn Reporter) -> Exit {
    let outcome = Outcome::Failed { kind: FailureKind::Refused, failure };
    let result = SourceResult::untouched(outcome);
    let latencies = Latencies::collect(&result.lanes, &result.scans);
    let summary = summary(&GuestFacts::default(), &result, Exit::Refused, &latencies);
    reporter.event(&Event::Summary(Box::new(summary)));
    Exit::Refused
}

/// What the arguments ask of a source agent.
pub fn options(args: &MigrateArgs) -> SourceOptions {
    SourceOptions {
        to: args.to.clone(),
        caller: Caller {
            tls_dir: args.tls.tls_dir.clone(),
            hostname: args.tls_hostname.clone(),
            insecure: args.tls.insecure,
            ..Caller::default()
        },
        target_qmp: args.target_qmp.as_ref().map(|path| path.display().to_string()),
        qmp: args.qmp.clone(),
        lanes: LaneChoice {
            transport: args.transport,
            no_rdma: lanes::no_rdma(args.transport, args.encrypt),
            pin: args.pin,
            count: args.lanes,
            cpus: cpus(args.cpus.as_ref()),
            cpus_told: args.cpus.is_some(),
            networks: args.network.clone(),
            everywhere: false,
            path: path(args.no_io_uring),
            zero_copy: match args.zero_copy {
                ZeroCopyChoice::Auto => ZeroCopyWish::Try,
                ZeroCopyChoice::Off => ZeroCopyWish::Not("asked for"),
            },
            encrypt: args.encrypt,
            tls: None,
            compress: args.compress,
            narrow: args.narrow,
            pacer: Arc::new(Pacer::new(args.max_bandwidth.map(|rate| rate.bytes_per_second))),
        },
        goals: Goals {
            downtime: Duration::from_millis(args.downtime_ms),
            rounds_max: args.rounds_max,
            stalled: match args.not_converging {
                NotConverging::Stop => Stalled::Stop,
                NotConverging::SwitchOver => Stalled::SwitchOver,
            },
            ..Goals::default()
        },
        verify: args.verify,
        skip_drain: args.unsafe_no_drain,
        state_dir: args.state_dir.clone(),
        reconnect: Duration::from_secs(args.reconnect_timeout),
        blackout: Duration::from_millis(args.blackout_timeout_ms),
        writes_a_file: args.histogram.is_some(),
    }
}

/// The cores told, or all this process may use.
pub fn cpus(told: Option<&CpuList>) -> Vec<usize> {
    told.map_or_else(host::cpus_allowed, |list| list.0.clone())
}

/// Which system calls lanes use.
pub fn path(no_io_uring: bool) -> PathWish {
    if no_io_uring { PathWish::Plain } else { PathWish::Auto }
}

/// What was already told, so that every event is told once and when it happens.
#[derive(Default)]
struct Told {
    start: bool,
    rounds: usize,
    drains: usize,
}

impl Told {
    fn tell(
        &mut self,
        watch: &Watch<'_>,
        facts: &GuestFacts,
        options: &SourceOptions,
        reporter: &mut dyn Reporter,
    ) {
        let timeline = Timeline::new(watch.report, watch.at);
        if !self.start && watch.phase == Phase::Moving {
            self.start = true;
            reporter.event(&Event::Start(start(watch, facts, options)));
        }
        // A round is told when the scan after it is done: what it left belongs to it.
        let scanned = match watch.phase {
            Phase::Closing | Phase::Spacing | Phase::Scanning => watch.report.rounds.len() - 1,
            _ => watch.report.rounds.len(),
        };
        for round in &watch.report.rounds[self.rounds.min(scanned)..scanned] {
            reporter.event(&Event::Round(timeline.round_event(round)));
        }
        self.rounds = self.rounds.max(scanned);
        let drains = count(watch.report, Phase::DrainResuming);
        if drains > self.drains && watch.phase == Phase::Moving {
            self.drains = drains;
            let reason = facts.drain.as_deref().unwrap_or_default();
            reporter.event(&Event::Drain(timeline.drain_event(reason).expect("it drained")));
        }
    }

    /// The brown-out's event comes after the pause: telling it must not make the pause longer.
    fn tell_end(&mut self, result: &SourceResult, reporter: &mut dyn Reporter) {
        let timeline = Timeline::new(&result.report, result.total);
        for round in &result.report.rounds[self.rounds..] {
            reporter.event(&Event::Round(timeline.round_event(round)));
        }
        let wire_bytes = result.lanes.iter().map(|lane| lane.wire_bytes).sum();
        if let Some(brownout) = timeline.brownout_event(wire_bytes) {
            reporter.event(&Event::Brownout(brownout));
        }
        if let Some(blackout) = timeline.blackout_event(result.state_bytes) {
            reporter.event(&Event::Blackout(blackout));
        }
    }
}

fn count(report: &SourceReport, phase: Phase) -> usize {
    report.phases.iter().filter(|(at, _)| *at == phase).count()
}

fn start(watch: &Watch<'_>, facts: &GuestFacts, options: &SourceOptions) -> Start {
    Start {
        at_ms: ms(watch.at),
        session: watch.session.to_string(),
        transport: watch.path.unwrap_or(LanePath::TcpPlain),
        transport_reason: transport_reason(watch, options),
        tracker: facts.tracker.0.clone(),
        tracker_reason: facts.tracker.1.clone(),
        lanes: watch.lanes,
        guest_bytes: guest_bytes(facts),
        populated_bytes: watch.report.populated_bytes,
    }
}

fn transport_reason(watch: &Watch<'_>, options: &SourceOptions) -> String {
    if let Some(reason) = watch.path_reason {
        return reason.to_owned();
    }
    match options.lanes.path {
        PathWish::Plain => "TCP by plain sockets: asked for".into(),
        PathWish::Uring => "TCP by io_uring: asked for".into(),
        PathWish::Auto => "TCP is what both hosts have".into(),
    }
}

fn guest_bytes(facts: &GuestFacts) -> u64 {
    facts.regions.iter().map(|region| region.bytes).sum()
}

/// The exit code for an outcome.
pub fn exit_of(outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::Migrated => Exit::Done,
        Outcome::Failed { kind, .. } => match kind {
            FailureKind::Refused => Exit::Refused,
            FailureKind::RunsAtSource => Exit::RunningAtSource,
            FailureKind::PausedAtSource => Exit::PausedAtSource,
            FailureKind::Gone => Exit::GuestGone,
            FailureKind::Uncertain => Exit::HandoverUncertain,
        },
    }
}

fn summary(
    facts: &GuestFacts,
    result: &SourceResult,
    exit: Exit,
    latencies: &Latencies,
) -> Summary {
    let timeline = Timeline::new(&result.report, result.total);
    let rounds = &result.report.rounds;
    let spared_bytes: u64 = result.lanes.iter().map(|lane| lane.narrowing.spared_bytes).sum();
    let moved_bytes = rounds.iter().map(RoundReport::moved_bytes).sum::<u64>();
    let moved_bytes = moved_bytes.saturating_sub(spared_bytes);
    let moving = rounds.iter().map(|round| round.took).sum();
    let migrated = result.outcome == Outcome::Migrated;
    let failure = match &result.outcome {
        Outcome::Migrated => None,
        Outcome::Failed { failure, .. } => Some(failure.clone()),
    };
    Summary {
        outcome: match migrated {
            true => MigrationOutcome::Migrated,
            false => MigrationOutcome::Failed,
        },
        guest_running_on: running_on(&result.outcome),
        session: result.session.to_string(),
        transport: telling(result).map(|lane| lane.path),
        transport_reason: telling(result).map(|lane| match &result.path_reason {
            Some(chosen) => format!("{}; {chosen}", lane.path_reason),
            None => lane.path_reason.clone(),
        }),
        security: result.security.as_ref().map(|security| secured(security, &result.lanes)),
        tracker: Some(facts.tracker.0.clone()).filter(|name| !name.is_empty()),
        tracker_reason: Some(facts.tracker.1.clone()).filter(|reason| !reason.is_empty()),
        lanes: result.lanes.len(),
        rounds: rounds.len() as u32,
        guest_bytes: guest_bytes(facts),
        populated_bytes: result.report.populated_bytes,
        moved_bytes,
        zero_bytes: rounds.iter().map(|round| round.zero_bytes).sum(),
        hole_bytes: result.lanes.iter().map(|lane| lane.hole_bytes).sum(),
        wire_bytes: result.lanes.iter().map(|lane| lane.wire_bytes).sum(),
        zero_copy: zero_copy(&result.lanes),
        zero_copy_reason: zero_copy_reason(&result.lanes),
        rails: result.rails.clone(),
        rss: result.rss.clone(),
        cores_source: result.cores.0.clone(),
        cores_target: result.cores.1.clone(),
        cuts_ms: result.cuts.iter().copied().map(ms).collect(),
        lanes_renewed: result.lanes_renewed,
        compression: Compression::of(&result.lanes),
        narrowing: NarrowingDetail::of(&result.lanes),
        brownout_ms: timeline.brownout().map(ms),
        blackout_ms: timeline.blackout().map(ms),
        blackout_predicted_ms: result.report.predicted_blackout.map(ms),
        blackout_parts_ms: timeline.blackout_parts(),
        drain_pause_ms: timeline.drain_pause().map(ms),
        total_ms: ms(result.total),
        bytes_per_second: per_second(moved_bytes, moving),
        cpu_seconds_source: host::cpu_time().as_secs_f64(),
        cpu_seconds_target: result.report.running.map(|r| r.cpu_us as f64 / 1e6),
        verified: result.report.verified,
        lane_details: result.lanes.iter().enumerate().map(detail).collect(),
        latencies: latencies.lines(),
        exit_code: exit.code(),
        reason: failure.as_ref().map(|failure| failure.text.clone()),
        hint: failure.and_then(|failure| failure.hint),
    }
}

/// The lane that tells for all: the last one, and where lanes were mixed the last over RDMA.
fn telling(result: &SourceResult) -> Option<&LaneStats> {
    let is_rdma = |lane: &&LaneStats| lane.path == LanePath::Rdma;
    let over_rdma = result.lanes.iter().rfind(is_rdma);
    over_rdma.filter(|_| result.path == Some(LanePath::Rdma)).or(result.lanes.last())
}

fn secured(security: &Security, lanes: &[LaneStats]) -> Secured {
    let sealing = || lanes.iter().filter_map(|lane| lane.sealing.as_ref());
    let by = sealing().next().filter(|_| lanes.iter().all(|lane| lane.sealing.is_some()));
    let (suite, peer) = match security {
        Security::Tls { suite, peer, .. } => (Some(suite.clone()), Some(peer.clone())),
        Security::Loopback | Security::Insecure => (None, None),
    };
    Secured {
        control: if peer.is_some() { "tls-1.3".into() } else { "plain".into() },
        cipher_suite: suite,
        peer,
        lanes: match by.map(|sealing| sealing.by) {
            None => "clear".into(),
            Some(SealedBy::Kernel) => "tls-kernel".into(),
            Some(SealedBy::Process) => "tls-process".into(),
        },
        lanes_reason: by.map(|sealing| format!("{}; {}", sealing.suite, sealing.reason)),
        sealing_seconds: by
            .filter(|sealing| sealing.by == SealedBy::Process)
            .map(|_| sealing().map(|sealing| sealing.ns).sum::<u64>() as f64 / 1e9),
        warning: security.warning("source"),
    }
}

fn running_on(outcome: &Outcome) -> RunningOn {
    match outcome {
        Outcome::Migrated => RunningOn::Target,
        Outcome::Failed { kind, .. } => match kind {
            FailureKind::Refused | FailureKind::RunsAtSource => RunningOn::Source,
            FailureKind::PausedAtSource => RunningOn::None,
            FailureKind::Gone => RunningOn::Gone,
            FailureKind::Uncertain => RunningOn::Uncertain,
        },
    }
}

/// `copied` as soon as one lane was told so, `yes` only if all sent from guest memory.
fn zero_copy(lanes: &[LaneStats]) -> ZeroCopy {
    let any = |state| lanes.iter().any(|lane| lane.zero_copy == state);
    match (any(ZeroCopy::Copied), any(ZeroCopy::Off)) {
        (true, _) => ZeroCopy::Copied,
        (false, false) if !lanes.is_empty() => ZeroCopy::Yes,
        _ => ZeroCopy::Off,
    }
}

/// Of the first lane that did not send from guest memory, or of the first of all.
fn zero_copy_reason(lanes: &[LaneStats]) -> Option<String> {
    let overall = zero_copy(lanes);
    let lane = lanes.iter().find(|lane| lane.zero_copy == overall)?;
    Some(lane.zero_copy_reason.clone())
}

fn detail((lane, stats): (usize, &LaneStats)) -> LaneDetail {
    LaneDetail {
        lane: lane as u16,
        path: stats.path,
        path_reason: stats.path_reason.clone(),
        cpu: stats.cpu,
        zero_copy: stats.zero_copy,
        moved_bytes: stats.moved_bytes,
        zero_bytes: stats.zero_bytes,
        hole_bytes: stats.hole_bytes,
        wire_bytes: stats.wire_bytes,
        syscalls: stats.syscalls,
        cpu_seconds: stats.cpu_ns as f64 / 1e9,
    }
}
