//! How long to poll before sleeping: as long as that has paid.
//!
//! A completion that comes within the time a sleep and a wake-up would cost is cheaper to poll for.
//! Where completions take longer (a slow link, a busy core) polling only burns the core, so each
//! wait that ended asleep halves the time, and each that would have been caught doubles it.

use std::time::Duration;

use crate::limits::{SPIN_MAX, SPIN_MIN};

/// One worker's time to poll.
#[derive(Debug)]
pub(crate) struct Spin {
    budget: Duration,
}

impl Spin {
    pub(crate) fn new() -> Self {
        Self { budget: SPIN_MAX }
    }

    /// How long to poll this time.
    pub(crate) fn budget(&self) -> Duration {
        self.budget
    }

    /// Something came after this long, asleep or not.
    pub(crate) fn waited(&mut self, waited: Duration) {
        self.budget = match waited <= SPIN_MAX {
            true => (self.budget * 2).max(SPIN_MIN * 2).min(SPIN_MAX),
            false => (self.budget / 2).max(SPIN_MIN),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_stops_where_it_does_not_pay_and_comes_back_where_it_would() {
        let mut spin = Spin::new();
        for _ in 0..10 {
            spin.waited(Duration::from_millis(3));
        }
        assert_eq!(spin.budget(), SPIN_MIN);
        for _ in 0..10 {
            spin.waited(Duration::from_micros(5));
        }
        assert_eq!(spin.budget(), SPIN_MAX);
    }
}
