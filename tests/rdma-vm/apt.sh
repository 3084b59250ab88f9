# shellcheck shell=bash
# Debian packages fetched without root, for kernel.sh.
#
# apt gets a state of its own (sources, lists, archives) below one folder, so an unprivileged
# caller can refresh the lists, stale lists of the machine do no harm, and a suite the machine
# does not follow (backports) can be read without changing the machine. The sources are the
# machine's own Debian entries, whatever mirror they name; so are its proxies and keys: every
# package is checked against the archive's signature before it is unpacked.
# This file installs nothing and never writes below /etc or /var.

# private_apt STATE TOOL ARGS… : apt-get or apt-cache on the private state.
private_apt() {
  local state=$1 tool=$2
  shift 2
  "$tool" -c "$state/apt.conf" "$@"
}

# apt_open STATE SUITE… : a private state that follows the given suites; refreshes its lists.
apt_open() {
  local state=$1
  shift
  mkdir -p "$state"/{parts,preferences,lists/partial,archives/partial}
  own_sources "$state/parts" "$@" || return
  cat >"$state/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$state/parts";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$state/preferences";
Dir::State "$state";
Dir::State::lists "$state/lists";
Dir::State::extended_states "$state/extended_states";
Dir::Cache "$state";
Dir::Cache::archives "$state/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
// The hooks of the machine (clean-up of /var/cache, AppStream) are about the machine's state.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::CNF;
Acquire::Languages "none";
Acquire::Retries "3";
// The cache may lie in a home folder that apt's sandbox user cannot enter.
APT::Sandbox::User "root";
APT::Get::List-Cleanup "false";
CONF
  # A mirror of the machine may lack the derived suite: that is an error only if a package is
  # then not found, and is reported there.
  private_apt "$state" apt-get -qq update >"$state/update.log" 2>&1 || true
}

# own_sources DIR SUITE… : the machine's Debian entries of `main`, limited to these suites. An
# entry for the release itself also yields RELEASE-backports when that is asked for.
own_sources() {
  local dir=$1 release file files=()
  shift
  release=$(os_release VERSION_CODENAME)
  if [ -n "${RDMA_VM_APT_SOURCES:-}" ]; then
    files=("$RDMA_VM_APT_SOURCES")
  else
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
      [ -r "$file" ] && files+=("$file")
    done
  fi
  rm -f "$dir"/*
  for file in "${files[@]}"; do
    case $file in
      *.sources) deb822_suites "$release" "$*" <"$file" >>"$dir/own.sources" ;;
      *) one_line_suites "$release" "$*" <"$file" >>"$dir/own.list" ;;
    esac
  done
  grep -qs . "$dir/own.sources" "$dir/own.list" && return
  complain "no Debian source for '$release' with 'main' in ${files[*]:-/etc/apt}"
  complain "name a file of apt sources with RDMA_VM_APT_SOURCES=FILE"
  return 1
}

os_release() {
  sed -n "s/^$1=\"\\{0,1\\}\\([^\"]*\\)\"\\{0,1\\}\$/\\1/p" /etc/os-release
}

# deb822 stanzas on stdin; Suites, Components and Types are replaced, all else is kept.
deb822_suites() {
  awk -v release="$1" -v wanted="$2" '
    function flush_stanza(   i, n, out, w, list) {
      n = split(wanted, w, " ")
      out = ""
      for (i = 1; i <= n; i++)
        if (index(suites " ", " " w[i] " ") ||
            (w[i] == release "-backports" && index(suites " ", " " release " "))) out = out " " w[i]
      if (out != "" && enabled && index(types " ", " deb ") && index(components " ", " main "))
        print "Types: deb\nSuites:" out "\nComponents: main\n" rest
      suites = types = components = rest = field = ""; enabled = 1
    }
    BEGIN { enabled = 1 }
    /^#/ { next }
    /^[ \t]*$/ { flush_stanza(); next }
    /^[^ \t]/ {
      field = tolower($0); sub(/:.*/, "", field)
      value = $0; sub(/^[^:]*:/, "", value)
    }
    /^[ \t]/ { value = $0 }
    {
      gsub(/[ \t]+/, " ", value)
      if (field == "suites") suites = suites " " value
      else if (field == "types") types = types " " value
      else if (field == "components") components = components " " value
      else if (field == "enabled") enabled = (tolower(value) !~ /no/)
      else rest = rest $0 "\n"
    }
    END { flush_stanza() }'
}

# One-line entries (deb [options] URI SUITE COMPONENT…) on stdin.
one_line_suites() {
  awk -v release="$1" -v wanted="$2" '
    $1 != "deb" { next }
    {
      line = $0; sub(/#.*/, "", line)
      head = "deb "; sub(/^[ \t]*deb[ \t]+/, "", line)
      if (line ~ /^\[/) { options = line; sub(/\].*/, "]", options); head = head options " "
                          sub(/^\[[^]]*\][ \t]*/, "", line) }
      m = split(line, part, /[ \t]+/)
      main = 0
      for (i = 3; i <= m; i++) if (part[i] == "main") main = 1
      n = split(wanted, w, " ")
      for (i = 1; main && i <= n; i++)
        if (part[2] == w[i] || (w[i] == release "-backports" && part[2] == release))
          print head part[1] " " w[i] " main"
    }'
}

# apt_version STATE PACKAGE PREFIX : the newest version that starts with PREFIX, or nothing.
apt_version() {
  private_apt "$1" apt-cache show "$2" 2>/dev/null |
    awk -v prefix="$3" '/^Version:/ && index($2, prefix) == 1 && !found { print $2; found = 1 }'
}

# apt_depends STATE PACKAGE VERSION PATTERN : the first dependency whose name matches PATTERN.
apt_depends() {
  private_apt "$1" apt-cache show "$2=$3" 2>/dev/null |
    sed -n 's/^Depends: //p' | tr ',|' '\n\n' | sed 's/^ *//; s/ .*//' | grep -m1 -E "^($4)\$"
}

# apt_fetch STATE DIR PACKAGE[=VERSION]… : into DIR, checked against the signed lists.
apt_fetch() {
  local state=$1 dir=$2
  shift 2
  mkdir -p "$dir"
  (cd "$dir" && private_apt "$state" apt-get -qq download "$@" >"$state/download.log" 2>&1) && return
  complain "cannot download $*:"
  cat "$state/update.log" "$state/download.log" >&2
  return 1
}
