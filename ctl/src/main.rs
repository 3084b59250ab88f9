//! The binary `pageferry`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use crossbeam_channel::bounded;
use pageferry_ctl::cli::{Cli, Command};
use pageferry_ctl::qemu::guard;
use pageferry_ctl::report::exit::Exit;
use pageferry_ctl::{
    cancel, demo, drain, lab, migrate, pki, privileges, probe, receive, recover, report, settings,
    status,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::GuestInit = cli.command {
        lab::guest_program::run();
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("PAGEFERRY_LOG"))
        .with_writer(std::io::stderr)
        .init();
    if matches!(cli.command, Command::Migrate(_) | Command::Target(_) | Command::Guard) {
        privileges::this_is_an_agent();
    }
    let (to_cancel, cancel) = bounded(16);
    if winds_down(&cli.command) {
        let handler = ctrlc::set_handler(move || {
            // A full channel has been asked often enough.
            let _asked_already = to_cancel.try_send(());
        });
        if let Err(error) = handler {
            eprintln!("error: signal handler: {error}");
            return Exit::Refused.into();
        }
    }
    match cli.command {
        Command::Migrate(args) => {
            let mut reporter = report::reporter(args.json, args.progress);
            migrate::run(&args, &cancel, &mut *reporter).into()
        }
        Command::Target(args) => receive::run(&args, &cancel).into(),
        Command::Drain(args) => drain::run(&args, &cancel).into(),
        Command::Demo(args) => demo::run(&args, &cancel).into(),
        Command::Probe(args) => probe::run(&args).into(),
        Command::Recover(args) => recover::run(&args).into(),
        Command::Status(args) => status::run(&args).into(),
        Command::Cancel(args) => cancel::run(&args).into(),
        Command::Set(args) => settings::run(&args).into(),
        Command::Pki(args) => pki::run(&args).into(),
        Command::Guard => guard::run().into(),
        Command::GuestInit => unreachable!("it never returns"),
    }
}

/// Whether Ctrl-C, SIGTERM and SIGHUP are heard rather than ending the process where it stands: by
/// those that have a guest to put back. The others may be ended at any step; what `recover` does is
/// on record before it does it. A guard has to outlive what ends its agent's whole group.
fn winds_down(command: &Command) -> bool {
    use Command::{Demo, Drain, Guard, Migrate, Target};
    matches!(command, Migrate(_) | Target(_) | Drain(_) | Demo(_) | Guard)
}
