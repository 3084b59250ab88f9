//! `pageferry target`: the target agent with its messages and exit code.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry_datapath::control::Offer;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::Outcome;
use pageferry_uring::plan::ZeroCopyWish;

use crate::agent::acceptor::{Acceptor, ListenError};
use crate::agent::admin;
use crate::agent::allow::Allowed;
use crate::agent::compress::Compress;
use crate::agent::failure;
use crate::agent::lanes::{self, LaneChoice, Narrow};
use crate::agent::monitor::TargetMonitor;
use crate::agent::record::RecordedSecurity;
use crate::agent::target::{self, OpenMonitor, TargetOptions, TargetResult};
use crate::agent::tls::Door;
use crate::cli::TargetArgs;
use crate::migrate::{cpus, path};
use crate::qemu::target::QemuTarget;
use crate::report::exit::Exit;

/// Runs the subcommand: one migration after the other until Ctrl-C, or one with `--once`.
pub fn run(args: &TargetArgs, cancel: &Receiver<()>) -> Exit {
    let allowed = allowed(args);
    let open = |offer: &Offer| open_monitor(args, &allowed, offer);
    run_with(&open, args, cancel)
}

/// The same with whatever monitors `open` opens.
pub fn run_with(open: &OpenMonitor<'_>, args: &TargetArgs, cancel: &Receiver<()>) -> Exit {
    let door = |address| Door::of(address, args.tls.tls_dir.as_deref(), args.tls.insecure);
    let acceptor = match Acceptor::listen(&args.listen, door) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            not_listening(args, &error);
            return Exit::Refused;
        }
    };
    if let Some(warning) = acceptor.door().plain().and_then(|plain| plain.warning("target")) {
        eprintln!("warning: {warning}");
    }
    if let Err(failure) = early_check(args) {
        say_failure(&failure);
        return Exit::Refused;
    }
    say(args, "listening", &format!("listening on {}", acceptor.address()), None);
    let options = TargetOptions {
        lanes: LaneChoice {
            transport: args.transport,
            no_rdma: lanes::no_rdma(args.transport, args.encrypt),
            pin: args.pin,
            count: Some(args.lanes_max),
            cpus: cpus(args.cpus.as_ref()),
            cpus_told: args.cpus.is_some(),
            networks: args.network.clone(),
            everywhere: acceptor.address().ip().is_unspecified(),
            path: path(args.no_io_uring),
            zero_copy: ZeroCopyWish::Not("a target sends nothing"),
            encrypt: args.encrypt,
            tls: None,
            compress: Compress::Off,
            narrow: Narrow::Off,
            pacer: Arc::default(),
        },
        qmp: args.qmp.clone(),
        state_dir: args.state_dir.clone(),
        runtime_dir: args.runtime_dir.clone().unwrap_or_else(admin::runtime_dir),
        listen: args.listen.clone(),
        security: RecordedSecurity {
            tls_dir: args.tls.tls_dir.clone(),
            hostname: None,
            insecure: args.tls.insecure,
        },
        reconnect: Duration::from_secs(args.reconnect_timeout),
        // A QEMU takes one guest in.
        sessions_max: if args.qmp.is_some() { 1 } else { args.sessions_max },
        sessions_per_peer: args.sessions_per_peer.unwrap_or(usize::MAX),
        allowed: allowed(args),
        session_max: Duration::from_secs(args.session_max_s),
    };
    let mut last = Exit::Done;
    let mut done = |result: TargetResult| {
        last = exit_of(&result.outcome);
        say_result(args, &result);
        match args.once || result.outcome == Outcome::Runs && args.qmp.is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let mut tell = |text: &str| eprintln!("{text}");
    target::serve(&options, &acceptor, open, cancel, &mut tell, &mut done);
    last
}

fn allowed(args: &TargetArgs) -> Allowed {
    let guest_bytes_max = args.guest_max_mib.map(|mib| mib << 20);
    Allowed { rules: args.allow.clone(), guest_bytes_max }
}

/// The QEMU for an offer, if it may be used for that.
fn open_monitor(
    args: &TargetArgs,
    allowed: &Allowed,
    offer: &Offer,
) -> Result<Box<dyn TargetMonitor>, Failure> {
    allowed.size(offer)?;
    let path = match (&args.qmp, &offer.target_qmp) {
        (Some(own), _) => own.clone(),
        (None, Some(named)) => {
            let named = PathBuf::from(named);
            allowed.named_qmp(&named)?;
            named
        }
        (None, None) => return Err(no_qmp()),
    };
    let monitor = QemuTarget::open(&path)?;
    allowed.monitor(monitor.name().as_deref(), &monitor.files())?;
    Ok(Box::new(monitor))
}

fn not_listening(args: &TargetArgs, error: &ListenError) {
    eprintln!("error: {}", failure::chain(&format!("listen on {}", args.listen), error));
    let hint = match error {
        ListenError::Tls(error) => error.hint(),
        ListenError::Socket(_) => {
            Some("name an address of this host and a free port with --listen".into())
        }
    };
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
}

/// A target with a QMP socket of its own can say at once that it will never do.
fn early_check(args: &TargetArgs) -> Result<(), Failure> {
    args.qmp.as_deref().map_or(Ok(()), |path| QemuTarget::open(path).map(drop))
}

fn no_qmp() -> Failure {
    Failure {
        reason: pageferry_datapath::control::AbortReason::Refused,
        by_peer: false,
        text: "neither side said which QEMU to move into".into(),
        hint: Some("start the target with --qmp, or the source with --target-qmp".into()),
    }
}

fn exit_of(outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::Runs => Exit::Done,
        Outcome::Failed(_) => Exit::RunningAtSource,
        Outcome::Uncertain(_) => Exit::HandoverUncertain,
    }
}

fn say_result(args: &TargetArgs, result: &TargetResult) {
    let session = result.session.to_string();
    let session = Some(session.as_str());
    match &result.outcome {
        Outcome::Runs => {
            say(args, "running", "the guest runs here", session);
            if !result.settled {
                eprintln!(
                    "hint: the source has not said that it knows; `pageferry recover {}`, here \
                     and there, tells it",
                    result.session
                );
            }
        }
        Outcome::Failed(failure) => {
            say(args, "failed", "the guest stays at the source", session);
            say_failure(failure);
        }
        Outcome::Uncertain(failure) => {
            let text = "the guest is loaded and paused here; the source has the word";
            say(args, "uncertain", text, session);
            say_failure(failure);
        }
    }
}

fn say(args: &TargetArgs, event: &str, text: &str, session: Option<&str>) {
    match args.json {
        true => {
            println!("{}", serde_json::json!({ "event": event, "text": text, "session": session }))
        }
        false => println!("{text}"),
    }
}

fn say_failure(failure: &Failure) {
    eprintln!("error: {}", failure::one_line(&failure.text));
    if let Some(hint) = &failure.hint {
        eprintln!("hint: {}", failure::one_line(hint));
    }
}
