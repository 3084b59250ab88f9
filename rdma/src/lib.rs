//! RDMA: today the probe of what RDMA this host has.
