# shellcheck shell=bash
# Networks and RDMA devices inside a guest; sourced by guest/session.
#
# one-guest    dummy0, one device, connections to itself
# veth         va <-> vb in one namespace, a device on each, traffic forced over the wire
# two-guests   a wire to the other guest, or several; one device in each at the end of each
#
# Two namespaces are not among them: rxe moves no traffic there (6.1, 6.12, 6.18).
# Neither is lo: rdma_cm does not bind a device to it.

readonly ADDR_1=10.77.0.1
readonly ADDR_2=10.77.0.2
# Those of qemu.sh's first cards too; the number of the wire is in the second number of the address
# and in the fifth of the MAC.
readonly MAC_1=52:54:00:00:00:01
readonly MAC_2=52:54:00:00:00:02

# The kernel modules of a driver. crc32 is named because rxe asks for it by an alias, which makes
# the kernel try every accelerated variant first (1 s).
driver_modules() {
  case $1 in
    rxe) echo ib_uverbs rdma_ucm crc32_generic rdma_rxe ;;
    siw) echo ib_uverbs rdma_ucm crc32c_generic siw ;;
  esac
}

topology_modules() {
  case $1 in
    one-guest) echo dummy ;;
    veth) echo veth ;;
    two-guests) echo virtio_net ;;
  esac
}

topology_up() {
  case $TOPOLOGY in
    one-guest) dummy_up ;;
    veth) veth_up ;;
    two-guests) peer_up ;;
  esac
  [ "$QUEUES" = 0 ] || queues_up
  export PF_DRIVER=$DRIVER PF_TOPOLOGY=$TOPOLOGY PF_ROLE=$ROLE
}

# export_side LOCAL-ADDR LOCAL-DEV LOCAL-NETDEV PEER-ADDR PEER-DEV PEER-NETDEV
export_side() {
  export PF_LOCAL_ADDR=$1 PF_RDMA_DEV=$2 PF_NETDEV=$3
  export PF_PEER_ADDR=$4 PF_PEER_DEV=$5 PF_PEER_NETDEV=$6
}

# Lines of `ip` on stdin, run by one process: starting one takes 0.1 s here.
ip_lines() {
  local said
  said=$(ip -batch - 2>&1) || fail "ip: ${said//$'\n'/ }"
}

# add_device INDEX NETDEV : sets $device to the name of a new RDMA device.
add_device() {
  local said
  device=
  [ "$DRIVER" = none ] && return
  device=$DRIVER$1
  said=$(rdma link add "$device" type "$DRIVER" netdev "$2" 2>&1) ||
    fail "no $DRIVER device on $2: ${said//$'\n'/ }"
}

dummy_up() {
  local device
  ip_lines <<LINES
link add dummy0 mtu $MTU type dummy
link set dummy0 up
addr add $ADDR_1/24 dev dummy0
LINES
  add_device 0 dummy0
  export_side "$ADDR_1" "$device" dummy0 "$ADDR_1" "$device" dummy0
}

# One namespace owns both ends, and the kernel would answer itself over lo. So the rule for local
# addresses is moved behind ours: what comes from va or vb is delivered locally, what goes from
# or to either address leaves by its own end. The neighbours are fixed, as neither end answers
# for the other's address.
veth_up() {
  local device first
  ip_lines <<LINES
link add va mtu $MTU address $MAC_1 type veth peer name vb mtu $MTU address $MAC_2
link set va up
link set vb up
addr add $ADDR_1/32 dev va
addr add $ADDR_2/32 dev vb
LINES
  for end in all va vb; do
    echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
    echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
    echo 1 >/proc/sys/net/ipv4/conf/$end/arp_ignore
  done
  ip_lines <<LINES
rule add pref 10 iif va lookup local
rule add pref 11 iif vb lookup local
rule add pref 20 from $ADDR_1 lookup 101
rule add pref 21 from $ADDR_2 lookup 102
rule add pref 22 to $ADDR_2 lookup 101
rule add pref 23 to $ADDR_1 lookup 102
route add $ADDR_2/32 dev va src $ADDR_1 table 101
route add $ADDR_1/32 dev vb src $ADDR_2 table 102
rule add pref 1000 lookup local
rule del pref 0
neigh replace $ADDR_2 lladdr $MAC_2 dev va nud permanent
neigh replace $ADDR_1 lladdr $MAC_1 dev vb nud permanent
LINES
  add_device 0 va
  first=$device
  add_device 1 vb
  export_side "$ADDR_1" "$first" va "$ADDR_2" "$device" vb
}

peer_up() {
  local wire
  for ((wire = WIRES - 1; wire >= 0; wire--)); do wire_up "$wire"; done
  export PF_WIRES=$WIRES
}

# The card's queues and RSS.
queues_up() {
  local said
  export PF_QUEUES=$QUEUES
  # A queue that has no room for a packet stands still for good: see wire.sh.
  echo 4096 131072 262144 >/proc/sys/net/ipv4/tcp_rmem
  # Linux 6.12 shows a table by which the card does not go until one is set.
  said=$(ethtool -X "$PF_NETDEV" equal "$QUEUES" 2>&1) || fail "ethtool -X: ${said//$'\n'/ }"
}

# wire_up INDEX : its variables end in _INDEX; those of the first one are the session's own too.
wire_up() {
  local wire=$1 mine=1 peer=2 card device
  [ "$ROLE" != client ] || mine=2 peer=1
  card=$(grep -l "^52:54:00:00:0$wire:0$mine$" /sys/class/net/*/address) || fail "no card of wire $wire"
  card=$(basename "${card%/address}")
  ip_lines <<LINES
link set $card mtu $MTU up
addr add 10.$((77 + wire)).0.$mine/24 dev $card
neigh replace 10.$((77 + wire)).0.$peer lladdr 52:54:00:00:0$wire:0$peer dev $card nud permanent
LINES
  add_device "$wire" "$card"
  export "PF_RDMA_DEV_$wire=$device" "PF_NETDEV_$wire=$card"
  export "PF_LOCAL_ADDR_$wire=10.$((77 + wire)).0.$mine" "PF_PEER_ADDR_$wire=10.$((77 + wire)).0.$peer"
  export_side "10.$((77 + wire)).0.$mine" "$device" "$card" "10.$((77 + wire)).0.$peer" "$device" "$card"
}
