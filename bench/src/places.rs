//! The order in which pages are visited: upwards, or scattered without a table.

/// An order of some number of places, each of them once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    scattered: Option<(u64, u64)>,
}

impl Order {
    /// Scattered over as many places, or as they lie.
    pub(crate) fn new(places: Option<u64>) -> Self {
        Self { scattered: places.map(|places| (places, step(places))) }
    }

    /// The place that is visited as the `index`th, below the number of places.
    pub(crate) fn place(self, index: u64) -> u64 {
        match self.scattered {
            None => index,
            Some((places, step)) => {
                (u128::from(index) * u128::from(step) % u128::from(places)) as u64
            }
        }
    }
}

/// About the golden section, so that neighbours in time are far apart in space, and without a common
/// divisor, so that every place is visited.
fn step(places: u64) -> u64 {
    let mut step = ((places as f64 * 0.618_033_988_75) as u64).max(1);
    while common_divisor(step, places) > 1 {
        step += 1;
    }
    step
}

fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_once_and_neighbours_far_apart() {
        for places in [1, 2, 3, 10, 512, 1000, 4096] {
            let order = Order::new(Some(places));
            let mut visited: Vec<u64> = (0..places).map(|index| order.place(index)).collect();
            let jumps = visited.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
            assert!(places < 10 || jumps == 0, "{places}: {jumps}");
            visited.sort_unstable();
            assert_eq!(visited, (0..places).collect::<Vec<_>>());
        }
        assert_eq!(Order::new(None).place(7), 7);
    }
}
