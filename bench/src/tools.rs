//! The tools that people trust: which of them fit and are there, and what a fair comparison asks.

use crate::args::Tool;
use crate::goals::{Goal, Ratio};
use crate::program::is_installed;
use crate::series::{Kind, Reading, Series, ratio};

/// Our latency may be this much of a tool's at equal settings.
const LATENCY_AT_MOST: f64 = 1.03;
/// Our throughput is to be this much of a tool's at equal settings.
const THROUGHPUT_AT_LEAST: f64 = 0.98;

impl Tool {
    /// Debian's package that has it.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Perftest => "perftest",
            Self::Qperf => "qperf",
            Self::Sockperf => "sockperf",
            Self::Iperf3 => "iperf3",
            Self::Qemu => "qemu-system-x86",
        }
    }
}

/// Those asked for that have a program for this and are installed; of the others it is said why not.
/// `program` is nothing where a tool does not do such a thing at all.
pub(crate) fn usable(
    asked: &[Tool],
    what: &str,
    program: impl Fn(Tool) -> Option<&'static str>,
) -> Vec<Tool> {
    let is_usable = |tool: &Tool| match program(*tool) {
        None => false,
        Some(program) if is_installed(program) => true,
        Some(program) => {
            let package = tool.package();
            println!("SKIP {program} beside {what}: not installed (apt-get install {package})");
            false
        }
    };
    asked.iter().copied().filter(is_usable).collect()
}

/// Ours beside everyone else of its group. Only where both do the same at equal settings is there
/// something to reach.
pub(crate) fn ratios(
    all: &[Series],
    is_ours: impl Fn(&Series) -> bool,
    alike: impl Fn(&Series, &Series) -> bool,
) -> Vec<Ratio> {
    let with_runs = || all.iter().filter(|series| !series.runs.is_empty());
    let mut ratios = Vec::new();
    for theirs in with_runs().filter(|series| !is_ours(series)) {
        for ours in with_runs().filter(|series| is_ours(series) && series.group == theirs.group) {
            let goal = |goal| alike(ours, theirs).then_some(goal);
            let mut push = |what: &str, reading, goal| {
                ratios.push(ratio(what, ours, theirs, reading, goal));
            };
            let at_most = Goal::AtMost(LATENCY_AT_MOST);
            match ours.kind {
                // One number of each run is an average: compared with ours.
                Kind::Latency if theirs.has_only_means() => {
                    push("mean", Reading::Mean, goal(at_most))
                }
                Kind::Latency => {
                    for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
                        push(name, Reading::Quantile(quantile), goal(at_most));
                    }
                }
                _ => {
                    let at_least = Goal::AtLeast(THROUGHPUT_AT_LEAST);
                    push("throughput", Reading::BytesPerS, goal(at_least));
                    if alike(ours, theirs) {
                        push("CPU per GiB", Reading::CpuPerGib, None);
                    }
                }
            }
        }
    }
    ratios
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::distribution::Distribution;
    use crate::recorder::Recorded;
    use crate::series::SeriesRun;

    fn latency(by: &str, samples: &[u64]) -> Series {
        let mut series = Series::new("TCP 8 B", by, Kind::Latency, Value::Null);
        let distribution = Distribution::of(samples.iter().copied());
        let recorded = Recorded::of_latencies(distribution, 8, true);
        series.runs.push(SeriesRun { turn: 0, recorded, machine_cpu_s: 0.0, said: Value::Null });
        series
    }

    #[test]
    fn averages_are_compared_with_averages() {
        let all =
            [latency("us", &[1000, 3000]), latency("a", &[1000, 1000]), latency("b", &[2000])];
        let ratios = ratios(&all, |series| series.by == "us", |_, theirs| theirs.by == "b");
        let said: Vec<(&str, bool)> =
            ratios.iter().map(|ratio| (ratio.what.as_str(), ratio.goal.is_some())).collect();
        let wanted = [("TCP 8 B: p50", false), ("TCP 8 B: p99", false), ("TCP 8 B: mean", true)];
        assert_eq!(said, wanted);
    }
}
