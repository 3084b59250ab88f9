//! Every fuzz target for a few seconds, over the corpus and what a mutator makes of it: no nightly
//! compiler needed. `PAGEFERRY_FUZZ_SECONDS` sets for how long; CONTRIBUTING.md says how to run
//! libFuzzer on the same targets.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry_tests::fuzz::{self, FuzzTarget, Mutator};

const SECONDS: u64 = 10;

fn run(name: &str) {
    let target = fuzz::by_name(name);
    let seconds = std::env::var("PAGEFERRY_FUZZ_SECONDS").ok();
    let seconds = seconds.map_or(SECONDS, |text| text.parse().expect("a number of seconds"));
    let corpus = fuzz::corpus(name);
    assert!(corpus.len() > 1, "the corpus is in fuzz/corpus/{name}");
    corpus.iter().for_each(|bytes| try_one(target, bytes));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let mut mutator = Mutator::new(now as u64, target.bytes_max);
    let (began, mut count) = (Instant::now(), corpus.len());
    while began.elapsed() < Duration::from_secs(seconds) {
        try_one(target, &mutator.next(&corpus));
        count += 1;
    }
    println!("{name}: {count} executions in {seconds} s, {} of them the corpus", corpus.len());
}

/// An input that breaks something is kept: give it to libFuzzer, and put it into the corpus.
fn try_one(target: &FuzzTarget, bytes: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))) {
        let file = fuzz::crash_file(target.name);
        let kept = std::fs::write(&file, bytes);
        eprintln!("{}: {bytes:02x?} ({}: {kept:?})", target.name, file.display());
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn control() {
    run("control");
}

#[test]
fn lanes() {
    run("lanes");
}

#[test]
fn bitmap() {
    run("bitmap");
}

#[test]
fn qmp() {
    run("qmp");
}

#[test]
fn rdma() {
    run("rdma");
}

#[test]
fn source() {
    run("source");
}

#[test]
fn target() {
    run("target");
}

#[test]
fn admin() {
    run("admin");
}

#[test]
fn every_target_is_run_here_and_has_its_libfuzzer_binary() {
    let here = include_str!("fuzz_short.rs");
    let manifest = include_str!("../../fuzz/Cargo.toml");
    for target in fuzz::TARGETS {
        assert!(here.contains(&format!("run(\"{}\")", target.name)), "{}", target.name);
        assert!(manifest.contains(&format!("name = \"{}\"", target.name)), "{}", target.name);
    }
}
