# RDMA without a NIC: the VM harness and what is tested in it. Included by the top-level Makefile.

.PHONY: test-rdma test-kvm rdma-packages

# REQUIRE_RDMA=1 makes everything that would be skipped a failure; ARGS picks tests by name.
test-rdma: setup rdma-packages
	tests/rdma-vm/selftest $(ARGS)
	tests/rdma-vm/lanes $(ARGS)

# Guests under KVM, emulated where it has to be; some ten minutes then.
test-kvm: setup rdma-packages
	tests/rdma-vm/kvm $(ARGS)

rdma-packages:
	@tests/rdma-vm/packages --install
