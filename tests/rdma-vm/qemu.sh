# shellcheck shell=bash
# One QEMU: its command line, its start and its end, and whether KVM works. Sourced by `run`.
#
# A guest has a folder of its own below the run's folder for what only it needs:
#   share/   9p share `share`: settings and guest/     console   the kernel's console
#   ctl.in, ctl.out -> ../events   out, err  FIFOs      qemu.log  what QEMU itself says
# QEMU runs in the run's folder, so that no path is long for a socket or needs quoting. It dies
# with the process that started it, also when that is killed (setpriv --pdeathsig), and is
# otherwise ended by its pid.

# How long a guest may take to its first word when KVM is tried. With KVM that is 1 s, nested in an emulated one 10 s.
readonly KVM_PROBE_SECONDS=40

# start_qemu ROLE ACCEL EXTRA… : sets STARTED_PID.
start_qemu() {
  local role=$1 accel=$2 machine
  shift 2
  machine=(-cpu host)
  local append="console=ttyS0 panic=-1 nokaslr mitigations=off cryptomgr.notests random.trust_cpu=on"
  if [ "$accel" = tcg ]; then
    accel=tcg,thread=multi
    # Emulated carry-less multiplication makes checksums slower than without it.
    machine=(-cpu "max,-pclmulqdq")
    # The guest's own measurements of the clock cannot be trusted under emulation; see tsc.c.
    append+=" tsc=reliable no_timer_check tsc_early_khz=$("$ENTRY/tsc-khz")"
  fi
  [ -n "$LOG" ] || append+=" quiet"
  [ "$HUGEPAGES" = 0 ] || append+=" hugepages=$HUGEPAGES"
  (
    cd "$RUN" || exit
    exec {LOCK}>&- nice -n "$NICE" setpriv --pdeathsig KILL \
      qemu-system-x86_64 -name "rdma-vm-$role" -M q35 -accel "$accel" "${machine[@]}" \
      -m "$MEM" -smp "$SMP" -nodefaults -no-user-config -display none -no-reboot \
      -kernel "$ENTRY/vmlinux" -initrd "$INITRAMFS" -append "$append $APPEND" \
      -serial "file:$role/console" \
      -device virtio-serial-pci \
      -chardev "pipe,id=ctl,path=$role/ctl" \
      -device virtserialport,chardev=ctl,name=rdma-vm.ctl \
      -virtfs "local,path=$role/share,mount_tag=share,security_model=none,readonly=on" \
      "$@"
  ) <&"$CALLER_STDIN" 2>"$RUN/$role/qemu.log" &
  STARTED_PID=$!
}

# The network cards that join two guests, one for each wire; the server's QEMU listens.
peer_cards() { # ROLE
  local server=on end=1 wire
  [ "$1" = client ] && server=off end=2
  for ((wire = 0; wire < WIRES; wire++)); do
    printf '%s\n' -netdev "stream,id=peer$wire,server=$server,addr.type=unix,addr.path=peer$wire" \
      -device "virtio-net-pci,netdev=peer$wire,romfile=,host_mtu=$MTU,mac=52:54:00:00:0$wire:0$end"
  done
}

# The host's tree and the caller's writable folders. A comma in a path is doubled for QEMU.
shares() {
  local index=0 dir
  printf '%s\n' -virtfs "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
  for dir in "${WRITABLE[@]}"; do
    printf '%s\n' -virtfs "local,path=${dir//,/,,},mount_tag=w$index,security_model=none,multidevs=remap"
    index=$((index + 1))
  done
}

# end_process PID : SIGTERM, then SIGKILL after 5 s. The pid is our child's until we waited for it.
end_process() {
  local try
  kill "$1" 2>/dev/null || return 0
  for try in {1..50}; do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null
}

# kvm_verdict : prints "works" or why not. KVM is tried by booting a guest to its first word:
# /dev/kvm may exist and be openable where no guest gets anywhere (nested, restricted or broken
# hosts). The answer is kept until the machine is booted again.
kvm_verdict() {
  local kept=$CACHE/kvm-verdict key verdict
  if ! [ -w /dev/kvm ]; then
    echo "no /dev/kvm that this user may open"
    return
  fi
  key="$(cat /proc/sys/kernel/random/boot_id) $(id -u) $(qemu_version)"
  if [ "$(sed -n 1p "$kept" 2>/dev/null)" = "$key" ]; then
    sed -n 2p "$kept"
    return
  fi
  verdict=$(try_kvm 2>/dev/null) # the shell's words about a QEMU that aborts
  printf '%s\n' "$key" "$verdict" >"$kept.$$" && mv "$kept.$$" "$kept"
  echo "$verdict"
}

try_kvm() ( # A subshell, with settings and a way out of its own.
  word='' LOG='' HUGEPAGES=0 APPEND='' MEM=256 SMP=1 CALLER_STDIN=0 STARTED_PID=
  RUN=$(mktemp -d "${TMPDIR:-/tmp}/rdma-vm.XXXXXX")
  trap '[ -z "$STARTED_PID" ] || end_process "$STARTED_PID"; rm -rf "$RUN"' EXIT
  exec </dev/null
  mkdir -p "$RUN/kvm/share"
  mkfifo "$RUN/kvm/ctl.in" "$RUN/kvm/ctl.out"
  echo "ROLE=kvm PROBE_ONLY=1" >"$RUN/kvm/share/settings"
  exec 9<>"$RUN/kvm/ctl.out"
  start_qemu kvm kvm >/dev/null
  deadline=$((SECONDS + KVM_PROBE_SECONDS))
  while [ $SECONDS -lt $deadline ]; do
    read -r -t 0.2 -u 9 word && break
    kill -0 "$STARTED_PID" 2>/dev/null || break
  done
  case $word in
    "kvm up"*) echo works ;;
    *)
      if kill -0 "$STARTED_PID" 2>/dev/null; then
        echo "a guest does not boot in $KVM_PROBE_SECONDS s with it"
      else
        echo "a guest dies with it: $(grep -v '^$' "$RUN/kvm/qemu.log" | head -1)"
      fi
      ;;
  esac
)

qemu_version() {
  qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version //p'
}
