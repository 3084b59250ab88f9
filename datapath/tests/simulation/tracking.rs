//! What the source's agent learns of the guest's memory: where data lies, and what was written.

use pageferry_datapath::bitmap::DirtySet;

use crate::flaws::Flaw;
use crate::pages::{PAGES, set_of};
use crate::world::World;

impl World {
    /// Every page that is not a hole now: the first pass.
    pub(crate) fn look_for_data(&mut self) {
        self.source.sent = self.guest.populated.clone();
        for page in (0..PAGES).filter(|page| self.guest.populated[*page]) {
            self.check.owed[page] = true;
        }
    }

    /// Reports and protects, in one step for each page.
    pub(crate) fn scan(&mut self, pages: std::ops::Range<usize>) {
        let late = self.has(Flaw::ReadsFirst);
        for page in pages {
            // A report too much is allowed.
            if self.guest.written[page] || self.random.chance(1) {
                self.source.found.push(page);
                self.check.owed[page] = true;
                self.guest.written[page] &= late;
            }
        }
    }

    /// What was never sent and is a hole stays one.
    pub(crate) fn scanned(&mut self) -> DirtySet {
        let mut found = std::mem::take(&mut self.source.found);
        found.retain(|page| {
            let moves = self.guest.populated[*page] || self.source.sent[*page];
            self.check.owed[*page] &= moves;
            moves
        });
        for page in &found {
            self.source.sent[*page] = true;
            self.guest.written[*page] &= !self.has(Flaw::ReadsFirst);
        }
        if self.has(Flaw::PausesLate) && self.check.preparing_switchover {
            self.guest.stop();
        }
        set_of(found)
    }
}
