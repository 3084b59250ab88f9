// Does the kernel track written pages without stopping the writer? For selftest, in the guest.
//
// For each kind of memory a guest's RAM can be: registers it for asynchronous write protection
// (userfaultfd, Linux 6.7), writes two pages and asks PAGEMAP_SCAN for exactly these two, which it
// protects again in the same step; then writes one of them again. Prints a line for each kind.
// In C, since these are raw ioctls; it defines what the build machine's headers may not have.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// linux/fs.h and linux/userfaultfd.h of Linux 6.7.
struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct scan_region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
#define SCAN_WRITTEN (1 << 1)
#define SCAN_WP_MATCHING (1 << 0)
#define SCAN_CHECK_WPASYNC (1 << 1)
#define FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | 1 << 12 /* WP_HUGETLBFS_SHMEM */ | \
                  1 << 13 /* WP_UNPOPULATED */ | 1 << 15 /* WP_ASYNC */)

static const size_t PAGES = 8;

static int failed(const char *kind, const char *what) {
    printf("%s: %s: %s\n", kind, what, strerror(errno));
    return 1;
}

// The written pages, as a mask; they are protected again.
static long written(char *memory, size_t page) {
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    struct scan_region found[8];
    struct scan_arg arg = {
        .size = sizeof arg,
        .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        .start = (uintptr_t)memory,
        .end = (uintptr_t)memory + PAGES * page,
        .vec = (uintptr_t)found,
        .vec_len = 8,
        .category_mask = SCAN_WRITTEN,
        .return_mask = SCAN_WRITTEN,
    };
    int count = ioctl(pagemap, SCAN, &arg);
    close(pagemap);
    if (count < 0) return -1;
    long mask = 0;
    for (int i = 0; i < count; i++)
        for (uint64_t at = found[i].start; at < found[i].end; at += page)
            mask |= 1L << (at - (uintptr_t)memory) / page;
    return mask;
}

static int track(const char *kind, char *memory, size_t page) {
    if (memory == MAP_FAILED) return failed(kind, "mmap");
    memset(memory, 1, PAGES * page);

    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) return failed(kind, "userfaultfd with WP_ASYNC");
    struct uffdio_range range = {(uintptr_t)memory, PAGES * page};
    struct uffdio_register reg = {.range = range, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(uffd, UFFDIO_REGISTER, &reg)) return failed(kind, "UFFDIO_REGISTER");
    struct uffdio_writeprotect protect = {.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (ioctl(uffd, UFFDIO_WRITEPROTECT, &protect)) return failed(kind, "UFFDIO_WRITEPROTECT");

    memory[2 * page] = memory[5 * page] = 7;
    long first = written(memory, page);
    memory[5 * page] = 8;
    long second = written(memory, page);
    if (first == -1 || second == -1) return failed(kind, "PAGEMAP_SCAN");
    int good = first == (1 << 2 | 1 << 5) && second == 1 << 5;
    printf("%s: written pages 0x%lx then 0x%lx, %s\n", kind, first, second,
           good ? "as written" : "expected 0x24 then 0x20");
    close(uffd);
    munmap(memory, PAGES * page);
    return !good;
}

int main(void) {
    const size_t small = 4096, huge = 2 << 20;
    const int rw = PROT_READ | PROT_WRITE;
    int memfd = memfd_create("tracked", MFD_CLOEXEC);
    if (memfd < 0 || ftruncate(memfd, PAGES * small)) return failed("memfd", "memfd_create");
    int rc = track("anonymous", mmap(0, PAGES * small, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), small);
    rc |= track("memfd", mmap(0, PAGES * small, rw, MAP_SHARED, memfd, 0), small);
    rc |= track("hugetlb", mmap(0, PAGES * huge, rw, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0), huge);
    return rc;
}
