# shellcheck shell=bash
# What `run` tells about itself: help, what is there and what is missing, logs. Sourced by `run`.

# Commands of this machine that a run uses, with their packages; what set-up uses is in kernel.sh.
readonly RUN_TOOLS='qemu-system-x86_64:qemu-system-x86 setpriv:util-linux flock:util-linux
  sha256sum:coreutils gzip:gzip'
# Run inside the guest, from this machine's tree.
readonly DRIVER_TOOLS='ip:iproute2 rdma:iproute2 modprobe:kmod'
# Nothing here needs them; what tries verbs usually does.
readonly VERBS_TOOLS='ibv_devinfo:ibverbs-utils rping:rdmacm-utils ib_write_bw:perftest'

print_help() {
  cat <<'HELP'
Runs a command in a guest that has real RDMA verbs, without an RDMA NIC.

usage: run [options] -- COMMAND [ARGUMENT…]
       run --probe | --setup-only | --clean | --help

COMMAND is run as root in a QEMU guest with Debian's kernel and a soft-RoCE (rxe) or soft-iWARP
(siw) device. The guest's tree is this machine's, read-only with a tmpfs on top: the same programs
and libraries, the same working folder; what it writes is lost, except in folders named with
--writable. Output comes as it is written. COMMAND's input is /dev/null, unless --tty.

  --driver rxe|siw|both|none   both: one guest after the other, COMMAND in each       [rxe]
  --topology one-guest         one device, connections to itself                      [one-guest]
             veth              two devices in one guest, joined by a wire (for tc netem)
             two-guests        two machines joined by a wire, COMMAND in both
  --kernel SERIES              6.1, 6.12, …: Debian's, from the release or its backports
                                                                       [the release's own]
  --mem MIB --smp N            of each guest                  [1024; 2, or 1 with two guests]
  --queues N                   of the wire between two guests: cards with RSS, over taps in a
                               network namespace of the run's own
  --hugepages N                2 MiB pages reserved in the guest; adds to the default --mem  [0]
  --wires N                    between two guests, each with a device and a network of its own [1]
  --mtu N                      of the network under the device                        [9000]
  --timeout SECONDS            of one driver's run, boot included                     [600]
  --env NAME[=VALUE]           given to COMMAND beside PATH HOME USER LANG LC_ALL TERM
  --writable FOLDER            writes there reach this machine
  --nested-kvm                 a /dev/kvm in the guest (under TCG: emulated, slow, exact)
  --accel auto|kvm|tcg         auto: KVM if a guest boots with it                     [auto]
  --append ARGS                more of the guest kernel's command line
  --tty                        COMMAND on this terminal (a shell, a debugger)
  --log FILE                   appends the run, COMMAND's output and the guest's kernel messages
  -v, --verbose                progress

  --setup-only                 fetch and build what a run needs, checking every file of the cache
  --probe                      what is there, what is missing; exit code 0 if a run can work
  --clean                      remove the cache

COMMAND finds in its environment
  PF_DRIVER PF_TOPOLOGY   as chosen
  PF_ROLE                 server or client with two guests, else both
  PF_QUEUES               as chosen, if it was
  PF_RDMA_DEV PF_LOCAL_ADDR PF_NETDEV            its device, its address, the network device
  PF_PEER_DEV PF_PEER_ADDR PF_PEER_NETDEV        the other side's (the same ones in one-guest)
  PF_WIRES, PF_RDMA_DEV_1 PF_LOCAL_ADDR_1 …      of each wire, with two guests
and on its PATH
  rdma-vm-pair SERVER CLIENT   runs two shell commands, the client when the server listens, each
                               with the variables of its side, in every topology
  rdma-vm-sync NAME [WORD]     returns when both guests have called it; prints the WORDs of both
  rdma-vm-link down|up         takes this side's end of the wire down or up again (topology veth)

exit code: COMMAND's own (128+N for signal N; with two guests the server's if it failed, else the
client's), or 124 time-out, 125 the harness or the guest failed (panic), 2 wrong use.

environment: PAGEFERRY_CACHE (else ~/.cache/pageferry), TMPDIR, RDMA_VM_NICE (QEMU's niceness, 5),
RDMA_VM_APT_SOURCES (a file of apt sources to use instead of the machine's)

examples
  run -- ibv_devinfo
  run --driver siw -- rdma-vm-pair 'rping -s -C 5 -a $PF_LOCAL_ADDR' 'rping -c -C 5 -a $PF_PEER_ADDR'
  run --topology two-guests -- rdma-vm-pair 'ib_write_bw -R -d $PF_RDMA_DEV' \
                                            'ib_write_bw -R -d $PF_RDMA_DEV $PF_PEER_ADDR'
  run --topology veth -- bash -c 'tc qdisc add dev $PF_NETDEV root netem loss 1%; ./my-test'
  run --kernel 6.12 --hugepages 64 --writable "$PWD/out" --timeout 120 -- ./my-test
  run --driver siw --tty -- gdb ./my-test
HELP
}

# require_tools "COMMAND:PACKAGE …" : complains once about all that are missing.
require_tools() {
  local missing
  missing=$(missing_tools "$1")
  [ -n "$missing" ] || return 0
  # shellcheck disable=SC2086 # words
  complain "missing:" $(tr ' ' '\n' <<<"$missing" | sed 's/:.*//')
  # shellcheck disable=SC2086
  complain "as root: apt-get install --no-install-recommends" \
    $(tr ' ' '\n' <<<"$missing" | sed 's/.*://' | sort -u)
  return 1
}

missing_tools() {
  local tool missing=()
  for tool in $1; do
    command -v "${tool%%:*}" >/dev/null || missing+=("$tool")
  done
  echo "${missing[*]}"
}

print_probe() {
  local rc=0 verdict series entry line
  line() {
    printf '%-12s ' "$1"
    shift
    echo "$*"
  }
  line machine "$(os_release PRETTY_NAME), Linux $(uname -r), $(nproc) CPUs," \
    "$(awk '/MemAvailable/ { printf "%.1f GiB", $2 / 1048576 }' /proc/meminfo) available"
  line cache "$CACHE, $(du -sm "$CACHE" | cut -f1) MB"
  line qemu "$(qemu_version || true)"
  line 'to run' "$(tools_line "$RUN_TOOLS $DRIVER_TOOLS")"
  [ -z "$(missing_tools "$RUN_TOOLS $DRIVER_TOOLS")" ] || rc=1
  line 'to set up' "$(tools_line "$SETUP_TOOLS")"
  line verbs "$(tools_line "$VERBS_TOOLS"); providers: $(providers)"
  verdict='not tried: no kernel is set up'
  for entry in "$CACHE"/kernels/*.r$KERNEL_RECIPE; do
    [ -d "$entry" ] || continue
    series=${entry##*/} series=${series%.r*}
    line "kernel $series" "$(sed -n 's/^version=//p' "$entry/MANIFEST") with siw," \
      "$(entry_intact "$entry" all && echo intact || echo damaged, to be set up again)"
    verdict=
    ENTRY=$entry
  done
  if ! [ -d "$(kernel_entry "$KERNEL")" ]; then
    line "kernel $KERNEL" 'not set up (set-up fetches about 250 MB)'
    [ -z "$(missing_tools "$SETUP_TOOLS")" ] || rc=1
  fi
  if [ -z "$verdict" ] && [ $rc = 0 ]; then
    INITRAMFS=$(ensure_initramfs "$ENTRY") && verdict=$(kvm_verdict)
    [ "$verdict" = works ] || verdict+='; TCG is used'
  fi
  line kvm "$verdict"
  return $rc
}

tools_line() {
  local missing
  missing=$(missing_tools "$1")
  echo "${missing:+missing }${missing:-all there}"
}

# The verbs library's drivers for our two devices.
providers() {
  local name found=()
  for name in rxe siw; do
    [ -e "/etc/libibverbs.d/$name.driver" ] && found+=("$name")
  done
  echo "${found[*]:-none (package ibverbs-providers)}"
}

# What the QEMUs and the guests' kernels said last, for guests that gave no exit code. From a
# panic or an oops on, as the registers that follow it are longer than an end one would show.
show_consoles() {
  local role file
  for role in "${ROLES[@]}"; do
    [ "${RESULT[$role]:-$EXIT_HARNESS}" = "$EXIT_HARNESS" ] || continue
    for file in qemu.log console; do
      grep -qsv 'terminating on signal 15' "$RUN/$role/$file" || continue
      complain "$role: the end of its $file:"
      tr -d '\r' <"$RUN/$role/$file" | awk '
        { line[NR] = $0 }
        /Kernel panic|Oops|BUG:|cut here/ && !first { first = NR }
        END {
          if (!first || first < NR - 100) first = NR - 40
          for (i = first > 1 ? first : 1; i <= NR; i++) print "  " line[i]
        }' >&2
    done
  done
}

log_head() {
  [ -n "$LOG" ] || return 0
  {
    echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $DRIVER, $TOPOLOGY, kernel $(sed -n 's/^version=//p' "$ENTRY/MANIFEST")," \
      "$ACCEL, $MEM MiB, $SMP CPUs, MTU $MTU"
    printf '== in %s:' "$PWD"
    printf ' %q' "${COMMAND[@]}"
    echo
  } >>"$LOG"
}

log_tail() {
  [ -n "$LOG" ] || return 0
  local role
  {
    echo "== exit code ${VERDICT:-none (ended from outside)} after $(elapsed) s"
    for role in "${ROLES[@]}"; do
      echo "== $role: kernel messages"
      tr -d '\r' <"$RUN/$role/console" 2>/dev/null
    done
  } >>"$LOG"
}
