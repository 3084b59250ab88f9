//! Which fault comes when, drawn from a seed: the same seed and number draw the same.

use std::time::Duration;

use super::fault::Fault;
use super::moment::Moment;
use super::rig::Backing;
use super::trial::When;

/// Numbers from a seed (SplitMix64, Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// Those of the trial `number` of the run `seed`: each trial has its own, so that one can be
    /// repeated without those before it.
    pub fn of(seed: u64, number: u64) -> Self {
        let mut chance = Self(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        chance.next();
        chance
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of 0 to `count` - 1.
    fn below(&mut self, count: u64) -> u64 {
        self.next() % count.max(1)
    }
}

/// A fault for guests of this backing, and when it comes: in one of the phases, or after some time.
/// A migration without a fault takes about `typical`.
pub fn draw(chance: &mut Chance, backing: Backing, typical: Duration) -> (Fault, When) {
    let possible = |fault: &Fault| !fault.needs_hugepages() || backing == Backing::HugePages;
    let faults: Vec<_> = Fault::ALL.into_iter().filter(possible).collect();
    let mut left = chance.below(faults.iter().map(|fault| fault.weight()).sum());
    let drawn = faults.iter().find(|fault| match left.checked_sub(fault.weight()) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    });
    let fault = *drawn.expect("what is left is below the sum of all weights");
    let moment = Moment::ALL[chance.below(Moment::ALL.len() as u64) as usize];
    let held = chance.below(2) == 0 && fault.applies(moment);
    let typical_ms = typical.as_millis() as u64;
    let delay = |chance: &mut Chance, max_ms| Duration::from_millis(chance.below(max_ms));
    let when = match held {
        // The switchover takes milliseconds of those seconds: half of all faults look for it, among
        // the other phases, and come soon after it began.
        true => When::In { moment, delay: delay(chance, 100), let_go: chance.below(2) == 0 },
        false => When::After(delay(chance, typical_ms)),
    };
    (fault, when)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_number_draw_the_same() {
        let drawn = |seed, number| {
            let mut chance = Chance::of(seed, number);
            draw(&mut chance, Backing::Tmpfs, Duration::from_secs(1))
        };
        assert_eq!(drawn(7, 3), drawn(7, 3));
        let different = (0..50).filter(|number| drawn(7, *number) != drawn(8, *number)).count();
        assert!(different > 40, "{different}");
    }

    #[test]
    fn every_fault_that_can_be_drawn_is_drawn() {
        let mut seen = std::collections::HashSet::new();
        for number in 0..2000 {
            let mut chance = Chance::of(1, number);
            seen.insert(draw(&mut chance, Backing::HugePages, Duration::from_secs(1)).0);
        }
        let wanted = Fault::ALL.iter().filter(|fault| fault.weight() > 0).count();
        assert_eq!(seen.len(), wanted);
    }
}
