# shellcheck shell=bash
# One run: one or two guests with one driver, from their start to an exit code. Sourced by `run`.
#
# Guests talk to this process by lines in one FIFO, `events`, each written whole:
#   ROLE up S           PID 1 runs, S seconds after the kernel's start
#   ROLE ready S        devices are there, the command starts
#   ROLE sync NAME WORD waits until each guest has said so; answered with: go NAME WORD…
#   ROLE rc N           the command ended and its output is through; QEMU may be ended
#   ROLE fail TEXT      the guest's own set-up failed
# This process waits for nothing else and is the only one that ends a QEMU.

# A guest whose peer failed gets this long to end by itself.
readonly PEER_GRACE_SECONDS=30

# Leaves the exit code in VERDICT.
run_once() {
  declare -gA QEMU=() STAGE=() RESULT=() SYNCED=()
  PUMPS=() ROLES=(guest) VERDICT=
  [ "$TOPOLOGY" != two-guests ] || ROLES=(server client)
  remove_dead_runs
  RUN=$(mktemp -d "${TMPDIR:-/tmp}/rdma-vm.XXXXXX") || exit $EXIT_HARNESS
  echo $$ >"$RUN/pid"
  mkfifo "$RUN/events"
  # Also opened for writing, so that it has no end.
  exec {EVENTS}<>"$RUN/events"
  STARTED=$EPOCHREALTIME
  log_head
  local role
  for role in "${ROLES[@]}"; do start_guest "$role"; done
  watch_guests
  end_run
}

# What was killed with SIGKILL left its folder (its QEMUs died with it).
remove_dead_runs() {
  local dir
  for dir in "${TMPDIR:-/tmp}"/rdma-vm.*; do
    if ! [ -O "$dir" ] || ! [ -s "$dir/pid" ]; then continue; fi
    kill -0 "$(<"$dir/pid")" 2>/dev/null || rm -rf "$dir"
  done
}

start_guest() { # ROLE
  local role=$1 port devices extra
  mkdir -p "$RUN/$role/share"
  cp -r "$HERE/guest" "$RUN/$role/share/guest"
  mkfifo "$RUN/$role/ctl.in"
  ln -s ../events "$RUN/$role/ctl.out"
  write_settings "$role"
  if [ "$TTY" = 1 ]; then
    SAVED_TTY=$(stty -g <&"$CALLER_STDIN")
    # shellcheck disable=SC2054 # the commas are QEMU's
    devices=(-chardev stdio,id=tty,signal=off -device virtconsole,chardev=tty)
  else
    devices=()
    for port in $(output_ports); do
      mkfifo "$RUN/$role/$port"
      pump "$role" "$port"
      devices+=(-chardev "file,id=$port,path=$role/$port"
        -device "virtserialport,chardev=$port,name=rdma-vm.$port")
    done
  fi
  mapfile -t extra < <(shares)
  devices+=("${extra[@]}")
  if [ "$TOPOLOGY" = two-guests ]; then
    # The client's QEMU connects when it starts, so the server's sockets must be there.
    while [ "$role" = client ] && [ "$QUEUES" = 0 ] && ! [ -S "$RUN/peer$((WIRES - 1))" ] && kill -0 "${QEMU[server]}" 2>/dev/null; do
      sleep 0.05
    done
    if [ "$QUEUES" = 0 ]; then
      mapfile -t extra < <(peer_cards "$role")
    else
      mapfile -t extra < <(queues_card "$role")
    fi
    devices+=("${extra[@]}")
  fi
  start_qemu "$role" "$ACCEL" "${devices[@]}"
  # shellcheck disable=SC2031 # the subshell that is meant has its own
  QEMU[$role]=$STARTED_PID
}

# One pipe for both where the caller has one file for both, so that the lines keep their order.
output_ports() {
  echo out
  [ /dev/fd/1 -ef /dev/fd/2 ] || echo err
}

# Copies a guest's output to ours as it comes, and to the log. Two guests' lines get their role.
pump() { # ROLE PORT
  local from=$RUN/$1/$2 filter=(cat)
  [ ${#ROLES[@]} = 1 ] || filter=(sed -u "s/^/$1| /")
  {
    if [ -z "$LOG" ]; then
      exec "${filter[@]}" <"$from"
    else
      "${filter[@]}" <"$from" | tee -a -- "$LOG"
    fi
  } >&"$([ "$2" = out ] && echo 1 || echo 2)" &
  PUMPS+=($!)
}

write_settings() { # ROLE
  local share=$RUN/$1/share index=0 dir name size=(24 80)
  {
    echo "ROLE=$1 PROBE_ONLY=0 TTY=$TTY MERGED=$([ "$(output_ports | wc -l)" = 1 ] && echo 1 || echo 0)"
    echo "ENTRY=$(single_quoted "$ENTRY")"
    for dir in "${WRITABLE[@]}"; do
      echo "WRITABLE_$index=$(single_quoted "$dir")"
      index=$((index + 1))
    done
    [ "$TTY" = 0 ] || read -ra size < <(stty size <&"$CALLER_STDIN" | grep -v '^0 0$' || echo 24 80)
    echo "ROWS=${size[0]} COLUMNS=${size[1]}"
  } >"$share/settings"
  {
    # The command of a single guest plays both parts.
    echo "ROLE=${1/guest/both} DRIVER=$DRIVER TOPOLOGY=$TOPOLOGY WIRES=$WIRES MTU=$MTU NESTED_KVM=$NESTED_KVM QUEUES=$QUEUES GUESTS=${#ROLES[@]}"
  } >"$share/session.settings"
  {
    for name in PATH HOME USER LANG LC_ALL TERM "${ENVIRONMENT[@]}"; do
      case $name in
        *=*) printf 'export %s=%q\n' "${name%%=*}" "${name#*=}" ;;
        *) [ -z "${!name+set}" ] || printf 'export %s=%q\n' "$name" "${!name}" ;;
      esac
    done
    printf 'FOLDER=%q\n' "$(pwd -P)"
    printf 'COMMAND=('
    printf ' %q' "${COMMAND[@]}"
    printf ' )\n'
  } >"$share/command.settings"
}

# For busybox's shell, which knows less quoting than `printf %q` uses.
single_quoted() {
  printf "'%s'" "${1//\'/\'\\\'\'}"
}

# The loop of a run: ends with VERDICT set.
watch_guests() {
  local line role word rest grace='' begun=''
  while [ -z "$VERDICT" ]; do
    # A time-out may come in the midst of a line: what was read of it is kept.
    if read -r -t 0.2 -u "$EVENTS" line; then
      line=$begun$line begun=
      read -r role word rest <<<"$line"
      case $word in
        up | ready)
          STAGE[$role]=$word
          say "$role: $word after $(elapsed) s (guest's clock: $rest s)"
          [ "$QUEUES" = 0 ] || connect_wire
          ;;
        sync) synced "$role" "${rest% *}" "${rest#* }" ;;
        rc)
          if [ -z "${QEMU[$role]:-}" ] || ! [[ $rest =~ ^[0-9]+$ ]]; then
            complain "a guest said what makes no sense: $line"
            VERDICT=$EXIT_HARNESS
            break
          fi
          say "$role: exit code $rest after $(elapsed) s"
          RESULT[$role]=$rest
          ;;
        fail)
          complain "$role: the guest could not be set up: $rest"
          RESULT[$role]=$EXIT_HARNESS
          ;;
      esac
    else
      begun+=$line
      look_after_processes
    fi
    if over "$TIMEOUT" "$STARTED"; then
      complain "time-out after $TIMEOUT s; $(stages)"
      VERDICT=$EXIT_TIMEOUT
    elif [ ${#RESULT[@]} = ${#ROLES[@]} ]; then
      verdict_of_results
    elif failed_role >/dev/null; then
      : "${grace:=$EPOCHREALTIME}"
      if over $PEER_GRACE_SECONDS "$grace"; then
        complain "the other guest is ended, $PEER_GRACE_SECONDS s after the failure of the $(failed_role)"
        verdict_of_results
      fi
    fi
  done
}

# Kept by guest and not counted: one may have given up waiting for a name, and wait for it again.
synced() { # ROLE NAME WORD
  local name=$2 role words=()
  SYNCED[$1/$name]=$3
  for role in "${ROLES[@]}"; do
    [ -n "${SYNCED[$role/$name]:-}" ] || return 0
    words+=("${SYNCED[$role/$name]}")
  done
  for role in "${ROLES[@]}"; do
    unset "SYNCED[$role/$name]"
    echo "go $name ${words[*]}" 1<>"$RUN/$role/ctl.in"
  done
}

# A QEMU that ended without its guest's exit code: panic, power-off, or QEMU's own failure.
look_after_processes() {
  local role pump
  for role in "${ROLES[@]}"; do
    [ -z "${RESULT[$role]:-}" ] || continue
    if ! kill -0 "${QEMU[$role]}" 2>/dev/null && ! read -r -t 0 -u "$EVENTS"; then
      wait "${QEMU[$role]}"
      complain "$role: the guest ended by itself after $(elapsed) s (QEMU's exit code $?)"
      RESULT[$role]=$EXIT_HARNESS
    fi
  done
  # Whoever read our output has gone: so would a command on this machine.
  for pump in "${PUMPS[@]}"; do
    if ! kill -0 "$pump" 2>/dev/null && [ ${#RESULT[@]} = 0 ]; then
      wait "$pump" || VERDICT=141
    fi
  done
}

# How far each guest has come.
stages() {
  local role said=()
  for role in "${ROLES[@]}"; do
    if [ -n "${RESULT[$role]:-}" ]; then
      said+=("$role: exit code ${RESULT[$role]}")
    else
      case ${STAGE[$role]:-} in
        '') said+=("$role: its kernel did not get to our init") ;;
        up) said+=("$role: was setting up devices") ;;
        ready) said+=("$role: the command was running") ;;
      esac
    fi
  done
  local IFS=,
  echo "${said[*]}"
}

failed_role() {
  local role
  for role in "${!RESULT[@]}"; do
    [ "${RESULT[$role]}" = 0 ] || { echo "$role"; return 0; }
  done
  return 1
}

# The server's failure comes first: the client's usually follows from it.
verdict_of_results() {
  local role
  VERDICT=0
  for role in "${ROLES[@]}"; do
    [ "$VERDICT" != 0 ] || VERDICT=${RESULT[$role]:-0}
  done
}

elapsed() {
  local us=$((${EPOCHREALTIME/[.,]/} - ${STARTED/[.,]/}))
  printf '%d.%d' $((us / 1000000)) $((us / 100000 % 10))
}

over() { # SECONDS SINCE
  [ $((${EPOCHREALTIME/[.,]/} - ${2/[.,]/})) -ge $(($1 * 1000000)) ]
}

# The one way out of a run, also when we are ended from outside (the EXIT trap; VERDICT is empty
# then). The guests go first, as their output ends with them.
end_run() {
  [ -n "${RUN:-}" ] || return 0
  local pid fifo
  for pid in "${QEMU[@]}"; do end_process "$pid"; done
  [ -z "${SAVED_TTY:-}" ] || stty "$SAVED_TTY" <&"$CALLER_STDIN"
  # A pump whose QEMU never came still waits for a writer.
  for fifo in "$RUN"/*/{out,err}; do
    [ ! -p "$fifo" ] || : 1<>"$fifo"
  done
  for pid in "${PUMPS[@]}"; do
    # A caller that ended us does not wait for a slow reader of our output.
    [ -n "$VERDICT" ] || kill "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
  done
  case $VERDICT in
    "$EXIT_TIMEOUT" | "$EXIT_HARNESS") show_consoles ;;
  esac
  log_tail
  exec {EVENTS}>&-
  rm -rf "$RUN"
  RUN=
}
