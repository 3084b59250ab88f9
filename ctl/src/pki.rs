//! `pageferry pki`: a small certificate authority for the hosts that move guests to each other.
//!
//! One directory with the authority, one for each host with what is copied there. The files have
//! QEMU's names, so that QEMU's and libvirt's directories can be used in place of ours, and ours
//! in place of theirs.

use std::path::{Path, PathBuf};

use crate::agent::failure;
use crate::cli::{PkiArgs, PkiCommand};
use crate::report::exit::Exit;

pub mod authority;
pub mod certificate;
pub mod credentials;
pub mod error;
pub mod layout;
mod show;

pub use error::PkiError;

/// Runs the subcommand.
pub fn run(args: &PkiArgs) -> Exit {
    let done = match &args.command {
        PkiCommand::Init { dir, name, days } => init(&dir_or_default(dir), name, *days),
        PkiCommand::Issue { names, dir, out, days } => {
            issue(&dir_or_default(dir), out.as_deref(), names, *days)
        }
        PkiCommand::Show { dir } => show::show(&dir_or_default(dir)).map(|(text, wrong)| {
            print!("{text}");
            if wrong { Exit::Refused } else { Exit::Done }
        }),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {}", failure::chain("", &error));
        if let Some(hint) = error.hint() {
            eprintln!("hint: {hint}");
        }
        Exit::Refused
    })
}

fn dir_or_default(dir: &Option<PathBuf>) -> PathBuf {
    dir.clone().unwrap_or_else(layout::default_dir)
}

fn init(dir: &Path, name: &str, days: u32) -> Result<Exit, PkiError> {
    authority::init(dir, name, days)?;
    println!("{}: a CA named {name:?}, valid for {days} days", dir.display());
    println!("Keep {}/ca-key.pem to yourself: it speaks for every host.", dir.display());
    println!("Next, for each host: pageferry pki issue HOST [ADDRESS...]");
    Ok(Exit::Done)
}

fn issue(dir: &Path, out: Option<&Path>, names: &[String], days: u32) -> Result<Exit, PkiError> {
    let host = &names[0];
    let out = out.map_or_else(|| dir.join("hosts").join(host), Path::to_owned);
    authority::issue(dir, &out, names, authority::Validity::days(days))?;
    println!("{}: certificates for {}, valid for {days} days", out.display(), names.join(", "));
    if out != dir {
        println!(
            "Copy them there: scp {}/*.pem root@{host}:{}/",
            out.display(),
            layout::SYSTEM_DIR
        );
    }
    Ok(Exit::Done)
}
