//! Finds the ways worth repeating among many: those that do well once are tried again, and so on.
//!
//! A single lucky run must not win, so each round counts a way's median so far. The last ones left
//! run in every turn of the benchmark, beside everyone else; the best of them there is the one
//! that the others are compared with.

use serde::Serialize;

use crate::error::BenchError;
use crate::interrupt;
use crate::stats::median;

/// Ways left after each round; the last number is how many are repeated in every turn.
const KEEP: [usize; 3] = [16, 6, 3];

/// A way and what it reached in each round that it was in.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Screened<W> {
    /// The way.
    pub(crate) way: W,
    /// GiB/s.
    pub(crate) gib_per_s: Vec<f64>,
}

/// Everything tried, best first, and how many of them are to be repeated.
pub(crate) fn screen<W>(
    ways: Vec<W>,
    mut run: impl FnMut(&W) -> Result<f64, BenchError>,
) -> Result<(Vec<Screened<W>>, usize), BenchError> {
    let mut all: Vec<Screened<W>> =
        ways.into_iter().map(|way| Screened { way, gib_per_s: Vec::new() }).collect();
    let mut kept = all.len();
    for keep in KEEP {
        for screened in &mut all[..kept] {
            interrupt::check()?;
            screened.gib_per_s.push(run(&screened.way)?);
        }
        let reached = |screened: &Screened<W>| median(screened.gib_per_s.iter().copied());
        all[..kept].sort_by(|a, b| reached(b).total_cmp(&reached(a)));
        kept = kept.min(keep);
    }
    Ok((all, kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steadily_good_are_kept() {
        let ways: Vec<u32> = (0..100).collect();
        let mut first = true;
        let (all, kept) = screen(ways, |&way| {
            // Way 0 is lucky once.
            let lucky = way == 0 && std::mem::take(&mut first);
            Ok(if lucky { 1000.0 } else { f64::from(way) })
        })
        .expect("no way fails");
        assert_eq!((kept, all.len()), (3, 100));
        let best: Vec<u32> = all[..kept].iter().map(|screened| screened.way).collect();
        assert_eq!(best, [99, 98, 97]);
        assert_eq!(all[0].gib_per_s.len(), 3);
    }
}
