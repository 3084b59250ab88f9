//! The imagined guest and its monitor at the source: it writes while it runs, its devices too.
//!
//! Tracking as asynchronous write protection does it: a write to a protected page is noted once; a
//! device's direct I/O is noted when it pins the page, and not when it writes to it later.

use crate::pages::{GARBAGE, PAGES};
use crate::random::Random;

pub(crate) struct Guest {
    /// Content of each page.
    pub(crate) pages: Vec<u64>,
    /// Not a hole.
    pub(crate) populated: Vec<bool>,
    /// Tracking is armed on this page.
    pub(crate) armed: Vec<bool>,
    /// Written, or pinned to be, since it was last protected.
    pub(crate) written: Vec<bool>,
    /// Written by a device after it was protected, unseen.
    pub(crate) unseen: Vec<bool>,
    pub(crate) running: bool,
    /// The monitor's process is there.
    pub(crate) alive: bool,
    /// The migration's settings are in the monitor.
    pub(crate) settings: bool,
    /// Pages that devices are writing to.
    direct: Vec<usize>,
    direct_io: bool,
    busy_percent: u64,
    hot: usize,
    stamp: u64,
}

impl Guest {
    pub(crate) fn new(random: &mut Random, direct_io: bool) -> Self {
        let share = random.pick(&[0, 30, 100]);
        let populated: Vec<bool> = (0..PAGES).map(|_| random.chance(share)).collect();
        let pages = (1..).zip(&populated).map(|(stamp, there)| if *there { stamp } else { 0 });
        Self {
            pages: pages.collect(),
            populated,
            armed: vec![false; PAGES],
            written: vec![false; PAGES],
            unseen: vec![false; PAGES],
            running: true,
            alive: true,
            settings: false,
            direct: Vec::new(),
            direct_io,
            busy_percent: random.pick(&[0, 5, 30, 90, 97]),
            hot: random.pick(&[1, 4, PAGES]),
            stamp: PAGES as u64,
        }
    }

    /// What the device state of the guest says: it must arrive with the memory it belongs to.
    pub(crate) fn device_state(&self) -> u64 {
        self.stamp
    }

    /// A little time passes for the guest.
    pub(crate) fn live(&mut self, random: &mut Random) {
        if !self.running || !self.alive {
            return;
        }
        while random.chance(self.busy_percent) {
            let page = random.below(self.hot);
            self.write(page);
        }
        if self.direct_io && random.chance(20) {
            let page = random.below(PAGES);
            self.populated[page] = true;
            self.written[page] |= self.armed[page];
            self.direct.push(page);
        }
        if !self.direct.is_empty() && random.chance(40) {
            let index = random.below(self.direct.len());
            self.device_writes(self.direct[index]);
            if random.chance(30) {
                self.direct.swap_remove(index);
            }
        }
    }

    fn write(&mut self, page: usize) {
        self.stamp += 1;
        self.pages[page] = self.stamp;
        self.populated[page] = true;
        self.written[page] |= self.armed[page];
    }

    fn device_writes(&mut self, page: usize) {
        self.stamp += 1;
        self.pages[page] = self.stamp;
        self.unseen[page] |= !self.written[page];
    }

    /// Stops, when every block request has finished.
    pub(crate) fn stop(&mut self) {
        for page in std::mem::take(&mut self.direct) {
            self.device_writes(page);
        }
        self.running = false;
    }

    pub(crate) fn arm(&mut self, pages: std::ops::Range<usize>) {
        for page in pages {
            self.armed[page] = true;
            self.written[page] = false;
        }
    }

    pub(crate) fn disarm(&mut self) {
        self.armed.fill(false);
        self.written.fill(false);
    }

    /// Whether nothing of an attempt is left in the monitor.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.armed.contains(&true) && !self.settings
    }
}

/// The monitor that waits for the guest at the target.
pub(crate) struct Waiting {
    pub(crate) pages: Vec<u64>,
    /// Pieces of device state given to the monitor.
    pub(crate) fed: Vec<u8>,
    /// Device state loaded, and not dropped again.
    pub(crate) loaded: bool,
    pub(crate) running: bool,
    /// It ran at some time.
    pub(crate) ran: bool,
    pub(crate) alive: bool,
}

impl Waiting {
    pub(crate) fn new(random: &mut Random) -> Self {
        let dirt = random.pick(&[0, 50]);
        let page = |page| if random.chance(dirt) { GARBAGE | page as u64 } else { 0 };
        Self {
            pages: (0..PAGES).map(page).collect(),
            fed: Vec::new(),
            loaded: false,
            running: false,
            ran: false,
            alive: true,
        }
    }
}
