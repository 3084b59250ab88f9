//! Dirty tracking for each page size, by the proof that the migration itself asks for at its start.

use pageferry_datapath::tracker::{ProbeError, ScanPhases, probe};

use super::finding::{Finding, Group};
use super::kernel::{Kernel, NEWER_KERNEL};
use super::memory::{Memory, page_name};
use crate::agent::failure::chain;

const SMALL_PAGE: u64 = 4096;

/// What came of trying one page size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The page size.
    pub page_bytes: u64,
    /// How it went.
    pub outcome: Outcome,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Writes are reported.
    Works,
    /// No free page to try it on.
    Untried,
    /// It can't be trusted: why.
    Fails(String),
}

/// Tries 4 KiB pages and each size of huge pages that the kernel has.
pub fn try_here(memory: &Memory) -> Vec<Tried> {
    let huge = memory.huge.iter().map(|pool| (pool.page_bytes, pool.free > 0));
    [(SMALL_PAGE, true)]
        .into_iter()
        .chain(huge)
        .map(|(page_bytes, is_free)| {
            let outcome = match is_free {
                true => try_one(page_bytes),
                false => Outcome::Untried,
            };
            Tried { page_bytes, outcome }
        })
        .collect()
}

fn try_one(page_bytes: u64) -> Outcome {
    // One-phase scans are for TCG, two-phase ones for KVM: a guest of either kind may come.
    for phases in [ScanPhases::One, ScanPhases::Two] {
        match probe::probe(page_bytes, phases) {
            Ok(_) => {}
            // Reserved by others between counting and trying.
            Err(ProbeError::NoPage { .. } | ProbeError::NoFile { .. })
                if page_bytes > SMALL_PAGE =>
            {
                return Outcome::Untried;
            }
            Err(error) => return Outcome::Fails(chain("", &error)),
        }
    }
    Outcome::Works
}

/// Judges them: at least one size has to work.
pub(super) fn findings(tried: &[Tried], kernel: &Kernel) -> Vec<Finding> {
    let none_works = !tried.iter().any(|tried| tried.outcome == Outcome::Works);
    tried.iter().map(|tried| finding(tried, none_works, kernel)).collect()
}

fn finding(tried: &Tried, none_works: bool, kernel: &Kernel) -> Finding {
    let size = page_name(tried.page_bytes);
    let name = format!("tracking.{}", size.replace(' ', "").to_lowercase());
    let group = Group::Tracking;
    let kinds = match tried.page_bytes {
        SMALL_PAGE => "tmpfs, memfd",
        _ => "hugetlbfs",
    };
    let finding = match &tried.outcome {
        Outcome::Works => {
            let value = format!("writes are reported on {kinds} with {size} pages");
            return Finding::ok(group, &name, value);
        }
        Outcome::Untried => {
            let value = format!("not tried: no {size} page is free");
            let why = "only a page can prove it; the migration tries on one of the guest's own";
            let fix = super::memory::more_pages(tried.page_bytes, 1);
            return Finding::warn(group, &name, value, why).fix(fix);
        }
        Outcome::Fails(error) => {
            let why = format!("guests whose memory is on {kinds} can't be moved");
            Finding::missing(group, &name, error, why)
        }
    };
    let finding = match kernel.is_too_old() || tried.page_bytes > SMALL_PAGE {
        true => finding.fix(NEWER_KERNEL),
        false => finding,
    };
    match none_works {
        true => finding.required(),
        false => finding,
    }
}
