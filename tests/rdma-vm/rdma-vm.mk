# RDMA without a NIC: the VM harness and what is tested in it. Included by the top-level Makefile.

.PHONY: test-rdma rdma-packages

# REQUIRE_RDMA=1 makes everything that would be skipped a failure; ARGS picks tests by name.
test-rdma: setup rdma-packages
	tests/rdma-vm/selftest $(ARGS)
	tests/rdma-vm/lanes $(ARGS)

rdma-packages:
	@tests/rdma-vm/packages --install
