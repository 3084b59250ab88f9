//! What the two ends of a lane over RDMA say beside the WRITEs; no device takes part.

pub(super) fn run(bytes: &[u8]) {
    pageferry_rdma::fuzz_message(bytes);
}
