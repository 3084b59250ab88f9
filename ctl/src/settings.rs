//! `pageferry set`: changes what a running migration is held to.

use std::path::PathBuf;

use crate::agent::admin::{self, AdminError, Request, Settings};
use crate::cli::SetArgs;
use crate::report::exit::Exit;

/// Runs the subcommand.
pub fn run(args: &SetArgs) -> Exit {
    let dir = args.runtime_dir.clone().unwrap_or_else(admin::runtime_dir);
    let settings = Settings { max_bandwidth: args.max_bandwidth, weight: args.weight };
    match admin::ask(&dir, &args.session, &Request::Set(settings)) {
        Ok(status) => {
            println!("{status}");
            Exit::Done
        }
        Err(error) => {
            say(&error, dir);
            Exit::Refused
        }
    }
}

fn say(error: &AdminError, dir: PathBuf) {
    eprintln!("error: {}", crate::agent::failure::chain("set", error));
    let running = admin::sessions(&dir);
    match running.is_empty() {
        true => eprintln!("hint: --runtime-dir has to be that of `pageferry migrate`"),
        false => eprintln!("hint: running are {}", running.join(", ")),
    }
}
