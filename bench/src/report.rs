//! Everything measured as one JSON object: every sample of every metric, and what each mover said.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::contender::{Metric, Record};
use crate::error::BenchError;
use crate::host::Host;
use crate::method;

/// A report that grows.
pub(crate) struct Report {
    value: Map<String, Value>,
}

impl Report {
    /// Begins with method and host.
    pub(crate) fn new(benchmark: &str, host: &Host, setup: Value) -> Self {
        let mut value = Map::new();
        value.insert("benchmark".into(), benchmark.into());
        value.insert("method".into(), method::of(benchmark).into());
        value.insert("host".into(), json!(host));
        value.insert("setup".into(), setup);
        Self { value }
    }

    /// Adds something under a name.
    pub(crate) fn add(&mut self, name: &str, value: Value) {
        self.value.insert(name.into(), value);
    }

    /// Writes it where asked to, if asked to.
    pub(crate) fn write(self, path: Option<&Path>) -> Result<(), BenchError> {
        let Some(path) = path else { return Ok(()) };
        let text = format!("{:#}\n", Value::Object(self.value));
        std::fs::write(path, text)
            .map_err(|source| BenchError::Report { path: path.into(), source })
    }
}

/// All contenders of one table.
pub(crate) fn records(records: &[Record]) -> Value {
    let record = |record: &Record| {
        let metrics: Map<String, Value> = Metric::ALL
            .iter()
            .filter_map(|&metric| Some((metric.name().into(), json!(record.stats(metric)?))))
            .collect();
        json!({
            "name": record.contender.name(),
            "metrics": metrics,
            "runs": record.runs,
            "failures": record.failures,
        })
    };
    records.iter().map(record).collect()
}
