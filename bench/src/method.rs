//! The method, printed before the numbers. It stands in `docs/benchmarks.md` and only there.

const DOCUMENT: &str = include_str!("../../docs/benchmarks.md");

/// The method of one benchmark: what is common to all, and its own section.
pub(crate) fn of(benchmark: &str) -> String {
    let common = section("## Method");
    let own = section(&format!("### {benchmark}"));
    format!("{}\n\n{}", common.trim(), own.trim())
}

/// The method of a benchmark of distributions.
pub(crate) fn of_distributions(benchmark: &str) -> String {
    let common = section("### Distributions");
    let own = section(&format!("### {benchmark}"));
    format!("{}\n\n{}", common.trim(), own.trim())
}

/// The text under a heading until the next heading.
fn section(heading: &str) -> &'static str {
    let Some((_, after)) = DOCUMENT.split_once(&format!("\n{heading}\n")) else { return "" };
    after.split_once("\n#").map_or(after, |(text, _)| text)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_benchmark_has_a_method() {
        for benchmark in [
            "migrate",
            "migrate-vs-qemu",
            "slowdown",
            "rails",
            "sparse",
            "drain-table",
            "link-table",
            "ways",
        ] {
            let method = super::of(benchmark);
            let (common, own) = method.split_once("\n\n").expect("two parts");
            assert!(common.len() > 100 && own.len() > 100, "{benchmark}: {method}");
        }
        for benchmark in [
            "latency",
            "throughput",
            "pages",
            "cores",
            "scan",
            "register",
            "report",
            "rdma-vs-perftest",
            "rdma-vs-qemu",
        ] {
            let method = super::of_distributions(benchmark);
            let (common, own) = method.split_once("\n\n").expect("two parts");
            assert!(common.len() > 100 && own.len() > 100, "{benchmark}: {method}");
        }
    }
}
