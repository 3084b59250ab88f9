//! `rdma-vm`: this program again, in a virtual machine that has an RDMA device.

use std::path::Path;
use std::process::Command;

use crate::args::RdmaVmArgs;
use crate::error::BenchError;

/// Runs it there; its exit code decides.
pub(crate) fn run(args: &RdmaVmArgs) -> Result<(), BenchError> {
    let harness = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/rdma-vm/run");
    let program = std::env::current_exe().map_err(BenchError::io("find", "this program"))?;
    let mut split = args.arguments.splitn(2, |word| word == "--");
    let (Some(of_harness), Some(ours)) = (split.next(), split.next()) else {
        let what = "rdma-vm [arguments of tests/rdma-vm/run] -- BENCHMARK [its arguments]";
        return Err(BenchError::Usage { what });
    };
    let mut command = Command::new(&harness);
    command.args(of_harness).arg("--").arg(program).args(ours);
    let status = command.status().map_err(BenchError::io("run", harness.display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(BenchError::Program {
            program: "pageferry-bench in the machine".into(),
            status,
            said: "see above".into(),
        }),
    }
}
