//! Arguments of the benchmarks of memory: what tracking, registering and moving pages costs.

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{OutputArgs, TurnsArgs, WireArgs};

/// The size of pages behind guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub(crate) enum PageSize {
    /// 4 KiB, of a memfd.
    #[value(name = "4k")]
    #[serde(rename = "4k")]
    Small,
    /// 2 MiB, of a huge-page memfd. Needs root, or huge pages that are free.
    #[value(name = "2m")]
    #[serde(rename = "2m")]
    Huge,
}

impl PageSize {
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Small => 4096,
            Self::Huge => 2 << 20,
        }
    }
}

/// Arguments of `scan`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct ScanArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Pages behind the memory.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "4k,2m")]
    pub(crate) page_sizes: Vec<PageSize>,
    /// Memory that is tracked, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub(crate) mib: u64,
    /// Parts of it that are written between two scans, in percent.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1,10,50,100")]
    pub(crate) written_percent: Vec<f64>,
    /// How what is written lies.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "scattered")]
    pub(crate) patterns: Vec<Pattern>,
    /// Scans of each run.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) scans: u32,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) turns: u32,
}

/// How pages that are written lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pattern {
    /// Each far from the one before: as many runs as pages.
    Scattered,
    /// One run.
    Together,
}

/// Arguments of `register`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct RegisterArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Pages behind the memory.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "4k,2m")]
    pub(crate) page_sizes: Vec<PageSize>,
    /// Memory that is registered, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub(crate) mib: u64,
    /// Sizes of the slices it is registered in, in MiB: 1 is QEMU's, 16 is ours; 0 is all at once.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,16,0")]
    pub(crate) slices_mib: Vec<u64>,
    /// Threads that register at the same time.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub(crate) threads: Vec<usize>,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) turns: u32,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
}

/// Arguments of `pages`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct PagesArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// What moves them.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp")]
    pub(crate) over: Vec<Transport>,
    /// Pages that are moved.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "4k,2m")]
    pub(crate) page_sizes: Vec<PageSize>,
    /// As they are moved.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "round,fault")]
    pub(crate) moved_as: Vec<MovedAs>,
    /// The guest's memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(crate) memory_mib: u64,
    /// Part of it that a round moves, in percent.
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    pub(crate) written_percent: f64,
    /// Lanes of a round.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) lanes: u16,
    /// Seconds of rounds that count.
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    pub(crate) seconds: f64,
    /// Seconds dropped before them.
    #[arg(long, value_name = "S", default_value_t = 0.5)]
    pub(crate) warm_up_seconds: f64,
    /// Faults of each run that count.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub(crate) operations: u64,
    /// Faults dropped before them.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) warm_up: u64,
    /// Faults intended in a second. Default: the next begins when the last has ended.
    #[arg(long, value_name = "N")]
    pub(crate) rate: Option<f64>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) turns: TurnsArgs,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
}

/// What moves pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Transport {
    Tcp,
    Rdma,
}

/// What pages are moved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MovedAs {
    /// What was written since the last round, by a migration's lanes, until all of it is placed.
    Round,
    /// One page that a guest waits for, asked for and answered.
    Fault,
}
