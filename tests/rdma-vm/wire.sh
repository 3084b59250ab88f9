# shellcheck shell=bash
# A wire between two guests whose cards have several queues: QEMU has them on taps only. Sourced by
# `run`.
#
#   server's card ── tap-server ──┐                 taps and bridge are in a network namespace of
#                               bridge              this run's own: nothing of it is seen outside,
#   client's card ── tap-client ──┘                 and all of it goes with the last process
#
# Without root the namespace is made in a user namespace, where the machine allows that.

# Goes on in a namespace with the taps in it: `run` starts again there, with the same arguments.
enter_wire_namespace() { # ARGUMENT…
  [ -z "${RDMA_VM_WIRE:-}" ] || return 0
  local unshare=(unshare --net)
  [ "$(id -u)" = 0 ] || unshare=(unshare --map-root-user --net)
  RDMA_VM_WIRE=1 exec "${unshare[@]}" "$HERE/run" "$@"
}

# In that namespace; nothing goes over it yet.
lay_wire() {
  local role
  ip link add bridge mtu "$MTU" type bridge || return
  ip link set bridge up
  for role in server client; do
    ip tuntap add "tap-$role" mode tap multi_queue || return
    ip link set "tap-$role" mtu "$MTU" master bridge || return
  done
}

# A queue of a tap whose packet finds no buffer in the queue that RSS sends it to is not read from any
# more: QEMU (7.2 and 10.0 were tried) waits for buffers in the queue of the same number. So both
# guests have filled all queues before there is a packet, and topology.sh bounds what is on its way.
connect_wire() {
  local role
  for role in "${ROLES[@]}"; do
    [ "${STAGE[$role]:-}" = ready ] || return 0
  done
  for role in "${ROLES[@]}"; do ip link set "tap-$role" up; done
}

# A card with as many pairs of queues. With hash=on QEMU computes RSS itself; without, it leaves it to
# a program in the kernel's tap, which 7.2 can't load. No offloads: a packet takes one buffer.
queues_card() { # ROLE
  local mac=52:54:00:00:00:01
  [ "$1" = server ] || mac=52:54:00:00:00:02
  printf '%s\n' \
    -netdev "tap,id=peer,ifname=tap-$1,script=no,downscript=no,vhost=off,queues=$QUEUES" \
    -device "virtio-net-pci,netdev=peer,romfile=,mac=$mac,mq=on,rss=on,hash=on,vectors=$((2 * QUEUES + 2)),rx_queue_size=1024,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
}
