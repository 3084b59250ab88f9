# RDMA without a NIC: the VM harness and what is tested in it. Included by the top-level Makefile.

.PHONY: test-rdma test-kvm test-queues rdma-packages

# REQUIRE_RDMA=1 makes everything that would be skipped a failure; ARGS picks tests by name.
test-rdma: setup rdma-packages
	tests/rdma-vm/selftest $(ARGS)
	tests/rdma-vm/lanes $(ARGS)
	$(if $(filter-out kvm_%,$(ARGS)),,tests/rdma-vm/kvm $(or $(ARGS),kvm_))

# Lanes on the receive queues of emulated cards with RSS. By itself: lanes do not
# always arrive where they were placed there (docs/rdma-vm.md), and the test fails then, as it should.
test-queues: setup rdma-packages
	tests/rdma-vm/queues $(ARGS)

# Guests under KVM, emulated where it has to be, direct I/O included.
test-kvm: setup rdma-packages
	tests/rdma-vm/kvm $(ARGS)

rdma-packages:
	@tests/rdma-vm/packages --install
