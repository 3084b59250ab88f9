# shellcheck shell=bash
# Sourced by what runs tests in emulated machines: these miss a deadline now and then on busy cores,
# so what fails once runs again, and what fails twice is broken. Two failures are never forgiven:
# memory that was wrong, which is no matter of time, and a run into its limit, which takes too long.

# What tests print of a guest whose memory is not what it should be: digests that differ, pages that
# a guest found wrong, and one that ran in two places.
readonly WRONG_MEMORY='MemoryDigest \{|hold what they should not|the guest found bad memory'\
'|copies differ at|memory at the target differs|what the processor writes is always tracked'\
'|with a drain point nothing is lost|did not go on from where it was|ran at the target, and runs at'

# A run that begins again later than this after the script's start may not end within CI's time.
readonly AGAIN_UNTIL_S=900

# Shows what a log says of wrong memory; false if it says nothing of it.
was_memory_wrong() { # LOG [BYTES TO LEAVE OUT]
  local found
  found=$(tail -c "+$((${2:-0} + 1))" "$1" | grep -aE "$WRONG_MEMORY" | cut -c -200)
  [ -n "$found" ] && head -3 <<<"$found"
}

# Runs a command whose output goes to LOG as well, and again if that may help.
twice() { # LOG COMMAND…
  local log=$1 before status=0
  shift
  before=$(stat -c %s "$log")
  "$@" || status=$?
  case $status in
    0) return ;;
    124) echo "FAILED: it ran into its limit, and is not run again" ;;
    130 | 143) echo "FAILED: interrupted" ;;
    *)
      if was_memory_wrong "$log" "$before"; then
        echo "FAILED: memory was wrong (above), which is not forgiven"
      elif [ $SECONDS -gt $AGAIN_UNTIL_S ]; then
        echo "FAILED, and too late to run again"
      else
        printf '\nFAILED ONCE, running again: see above for what failed\n\n'
        "$@"
        return
      fi
      ;;
  esac
  return "$status"
}
