//! Throw-away certificates for the laboratory's hosts, made as an operator would make them.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::error::LabError;
use super::workplace::Workplace;
use crate::pki::authority::{self, Validity};

/// Days: longer than any experiment.
const DAYS: u32 = 1;

/// The directory for `--tls-dir` of the agent on a host, by the address that others reach it at.
/// Every directory of one workplace is signed by one authority.
pub fn certificates(workplace: &Workplace, address: &str) -> Result<PathBuf, LabError> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one_after_the_other = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let authority = workplace.file("pki");
    let dir = authority.join("hosts").join(address);
    if !authority.exists() {
        authority::init(&authority, "laboratory CA", DAYS)?;
    }
    if !dir.exists() {
        authority::issue(&authority, &dir, &[address.to_owned()], Validity::days(DAYS))?;
    }
    Ok(dir)
}
