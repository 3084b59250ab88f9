//! Numbers as people read them: three digits that matter, and a unit.

use std::time::Duration;

/// `1.98 GiB`, `512 KiB`, `17 B`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // What would be printed as 1024 belongs to the next unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{} {}", three_digits(value), UNITS[unit]),
    }
}

/// `4.81 GiB/s`.
pub fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// `100 Gbit/s`, `2.5 Gbit/s`: decimal, as links are sold.
pub fn bits_per_second(bits: u64) -> String {
    match bits {
        1_000_000_000.. => format!("{} Gbit/s", bits as f64 / 1e9),
        _ => format!("{} Mbit/s", bits as f64 / 1e6),
    }
}

/// `9.25 ms`, `12.4 s`, `3 min 20 s`, from milliseconds.
pub fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 0.9995 => format!("{} µs", three_digits(ms * 1e3)),
        ms if ms < 999.5 => format!("{} ms", three_digits(ms)),
        ms if ms < 99_950.0 => format!("{} s", three_digits(ms / 1e3)),
        ms => {
            let seconds = (ms / 1e3).round() as u64;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
    }
}

/// The same from a time.
pub fn time(duration: Duration) -> String {
    millis(duration.as_secs_f64() * 1e3)
}

/// `1.98`, `19.8`, `198`: never an exponent, never more than the measurement is worth.
fn three_digits(value: f64) -> String {
    match value {
        value if value < 9.995 => format!("{value:.2}"),
        value if value < 99.95 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2 << 30, "2.00 GiB")];
        for (number, text) in cases {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(bytes((1 << 20) - 1), "1.00 MiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
        for (ms, text) in [
            (0.0, "0.00 µs"),
            (0.0123, "12.3 µs"),
            (9.254, "9.25 ms"),
            (999.6, "1.00 s"),
            (12_400.0, "12.4 s"),
            (200_000.0, "3 min 20 s"),
        ] {
            assert_eq!(millis(ms), text);
        }
        assert_eq!(bits_per_second(100_000_000_000), "100 Gbit/s");
        assert_eq!(bits_per_second(2_500_000_000), "2.5 Gbit/s");
        assert_eq!(bits_per_second(10_000_000), "10 Mbit/s");
    }
}
