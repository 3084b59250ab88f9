# shellcheck shell=bash
# The guest's kernel: fetched from Debian, siw built for it, kept in the cache. Sourced by `run`.
#
#   $CACHE/kernels/6.1.r1/            one entry per kernel series and recipe
#       vmlinux                       extracted: boots in half the time of the bzImage (PVH)
#       lib/modules/6.1.0-56-amd64/   what a guest can use, uncompressed; extra/siw.ko
#       busybox                       static, for the initramfs
#       tsc-khz                       program, see tsc.c
#       MANIFEST  SHA256SUMS
#   $CACHE/initramfs/                 one per kernel entry and contents of guest/init
#
# An entry is built beside its place and renamed into it, so a killed set-up leaves none. It is
# checked by SHA256SUMS before it is used. Callers hold the set-up lock. Nothing is installed on
# this machine and no root is needed.

# To be raised when what an entry holds changes.
readonly KERNEL_RECIPE=2

# Unpacked packages and the build, beside what is kept.
readonly SETUP_FREE_MIB=1500

# Guests see only these parts of the module tree: no sound, no graphics, no network cards. The
# rest is 260 of 390 MB and has no device to drive.
readonly MODULES_KEPT='arch block crypto fs kernel lib mm net security virt
  drivers/acpi drivers/block drivers/char drivers/crypto drivers/firmware drivers/infiniband
  drivers/md drivers/net drivers/nvdimm drivers/nvme drivers/ptp drivers/scsi drivers/target
  drivers/vdpa drivers/vfio drivers/vhost drivers/virt drivers/virtio'
readonly MODULES_DROPPED='drivers/net/ethernet drivers/net/wireless drivers/net/usb drivers/net/can
  drivers/net/wwan drivers/net/arcnet drivers/net/hamradio drivers/net/fddi drivers/net/ieee802154
  drivers/infiniband/hw drivers/scsi/*/'

# What the guest needs before it can read the host's tree.
readonly BOOT_MODULES='virtio_pci virtio_console 9pnet_virtio 9p overlay'

# The commands that set-up runs, each with the package that has it.
readonly SETUP_TOOLS='apt-get:apt apt-cache:apt dpkg-deb:dpkg xz:xz-utils tar:tar make:make
  depmod:kmod modprobe:kmod cpio:cpio gzip:gzip strip:binutils'

kernel_entry() { # SERIES
  printf '%s/kernels/%s.r%s\n' "$CACHE" "$1" "$KERNEL_RECIPE"
}

# The kernel of the machine's own release, where no kernel was asked for.
default_kernel() {
  case $(os_release VERSION_ID) in
    11) echo 5.10 ;;
    13) echo 6.12 ;;
    *) echo 6.1 ;;
  esac
}

# entry_intact ENTRY [all] : without `all`, what every boot reads (0.3 s); with it, every file.
entry_intact() {
  local entry=$1
  [ -f "$entry/SHA256SUMS" ] || return
  if [ "${2:-}" = all ]; then
    (cd "$entry" && sha256sum --quiet --strict -c SHA256SUMS >/dev/null 2>&1)
  else
    (cd "$entry" && grep -E '  \./(vmlinux|busybox|tsc-khz|lib/modules/.*/siw\.ko|lib/modules/.*/modules\.dep)$' \
      SHA256SUMS | sha256sum --quiet --strict -c >/dev/null 2>&1)
  fi
}

# ensure_kernel SERIES [all] : leaves an intact entry at $(kernel_entry SERIES).
ensure_kernel() {
  local series=$1 entry work
  entry=$(kernel_entry "$series")
  if [ -d "$entry" ]; then
    entry_intact "$entry" "${2:-}" && return
    say "the cached kernel $series is damaged: setting it up again"
    rm -rf "$entry"
  fi
  require_tools "$SETUP_TOOLS" || return
  mkdir -p "$CACHE/kernels"
  local free
  free=$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')
  if [ "$free" -lt "$SETUP_FREE_MIB" ]; then
    complain "set-up needs $SETUP_FREE_MIB MiB in $CACHE, there are $free"
    return 1
  fi
  rm -rf "$CACHE"/kernels/.work.*
  work=$(mktemp -d "$CACHE/kernels/.work.XXXXXX")
  # In a subshell with -e: the first failure ends the set-up, and $work is removed here.
  (set -e; build_entry "$series" "$work")
  # shellcheck disable=SC2181 # `if (…)` would switch -e off inside
  if [ $? != 0 ]; then
    rm -rf "$work"
    complain "could not set up kernel $series"
    return 1
  fi
  mv "$work/entry" "$entry"
  rm -rf "$work"
}

build_entry() { # SERIES WORK
  local series=$1 work=$2 apt=$2/apt version image headers common kbuild source cc started=$SECONDS
  local release
  release=$(os_release VERSION_CODENAME)
  say "kernel $series: reading package lists"
  apt_open "$apt" "$release" "$release-updates" "$release-security"
  version=$(apt_version "$apt" linux-image-amd64 "$series.")
  if [ -z "$version" ]; then
    apt_open "$apt" "$release" "$release-updates" "$release-security" "$release-backports"
    version=$(apt_version "$apt" linux-image-amd64 "$series.")
  fi
  if [ -z "$version" ]; then
    complain "no linux-image-amd64 $series in $release or $release-backports; there are:" \
      "$(private_apt "$apt" apt-cache show linux-image-amd64 2>/dev/null | sed -n 's/^Version: //p' | tr '\n' ' ')"
    cat "$apt/update.log" >&2
    return 1
  fi
  image=$(apt_depends "$apt" linux-image-amd64 "$version" 'linux-image-.*-amd64')
  headers=linux-headers-${image#linux-image-}
  common=$(apt_depends "$apt" "$headers" "$version" 'linux-headers-.*-common')
  kbuild=$(apt_depends "$apt" "$headers" "$version" 'linux-kbuild-.*')
  cc=$(apt_depends "$apt" "$headers" "$version" 'gcc-[0-9]+|linux-compiler-gcc-[0-9]+-.*' | grep -o 'gcc-[0-9]*')
  source=linux-source-$series
  require_tools "$cc:$cc"

  say "kernel $series: fetching $image $version, its headers and source"
  apt_fetch "$apt" "$work/deb" "$image=$version" "$headers=$version" "$common=$version" \
    "$kbuild" "$source=$version" busybox-static
  mkdir -p "$work"/{image,headers,busybox,source,entry}
  dpkg-deb -x "$(echo "$work/deb/${image}"_*.deb)" "$work/image"
  dpkg-deb -x "$(echo "$work"/deb/busybox-static_*.deb)" "$work/busybox"
  for package in "$headers" "$common" "$kbuild"; do
    dpkg-deb -x "$(echo "$work/deb/${package}"_*.deb)" "$work/headers"
  done
  cp "$work/busybox/bin/busybox" "$work/entry/busybox" 2>/dev/null ||
    cp "$work/busybox/usr/bin/busybox" "$work/entry/busybox"

  say "kernel $series: unpacking siw from $source"
  # The Debian source package is one tar.xz inside; only two things of it are wanted.
  dpkg-deb --fsys-tarfile "$(echo "$work/deb/$source"_*.deb)" |
    tar -xO "./usr/src/$source.tar.xz" | xz -T0 -dc |
    tar -x -C "$work/source" --strip-components=1 \
      "$source/drivers/infiniband/sw/siw" "$source/scripts/extract-vmlinux"
  rm -rf "$work/deb"

  keep_modules "$work" "${image#linux-image-}"
  say "kernel $series: building siw with $cc"
  build_siw "$work" "$headers" "${image#linux-image-}"
  depmod -b "$work/entry" "${image#linux-image-}" 2>/dev/null
  "$cc" -O2 -Wall -o "$work/entry/tsc-khz" "$HERE/tsc.c"

  sh "$work/source/scripts/extract-vmlinux" "$work/image/boot/vmlinuz-${image#linux-image-}" \
    >"$work/entry/vmlinux"
  cp "$work/image/boot/config-${image#linux-image-}" "$work/entry/config"
  {
    echo "series=$series"
    echo "abi=${image#linux-image-}"
    echo "version=$version"
    echo "made=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  } >"$work/entry/MANIFEST"
  (cd "$work/entry" && find . -type f ! -name SHA256SUMS -print0 | sort -z | xargs -0 sha256sum) \
    >"$work/SHA256SUMS"
  mv "$work/SHA256SUMS" "$work/entry/"
  say "kernel $series: $version ready in $((SECONDS - started)) s," \
    "$(du -sm "$work/entry" | cut -f1) MB kept"
}

# The kept parts of the module tree, uncompressed: busybox's modprobe reads no xz.
keep_modules() { # WORK ABI
  local work=$1 abi=$2 from to part
  from=$work/image/lib/modules/$abi
  [ -d "$from" ] || from=$work/image/usr/lib/modules/$abi
  to=$work/entry/lib/modules/$abi
  mkdir -p "$to/kernel/drivers"
  for part in $MODULES_KEPT; do
    [ -d "$from/kernel/$part" ] && cp -a "$from/kernel/$part" "$to/kernel/$part"
  done
  for part in $MODULES_DROPPED; do
    # shellcheck disable=SC2086 # a pattern
    rm -rf "$to"/kernel/$part
  done
  find "$to" -name '*.ko.xz' -exec xz -d {} +
  cp "$from"/modules.{order,builtin,builtin.modinfo} "$to/"
  sed -i 's/\.ko\.xz$/.ko/' "$to/modules.order"
}

# Debian leaves soft-iWARP out of its configuration; it builds as it stands against the headers.
build_siw() { # WORK HEADERS-PACKAGE ABI
  local work=$1 tree=$1/headers/usr/src/$2 module=$1/source/drivers/infiniband/sw/siw
  # The header tree names its parts by absolute paths.
  grep -rlI --include=Makefile --include=.kernelvariables /usr/src/ "$tree" |
    xargs -r sed -i "s#/usr/src/#$work/headers/usr/src/#g"
  if ! make -s -j"$(nproc)" -C "$tree" "M=$module" CONFIG_RDMA_SIW=m \
    CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$work/siw.log" 2>&1; then
    complain "siw does not build:"
    tail -20 "$work/siw.log" >&2
    return 1
  fi
  mkdir -p "$work/entry/lib/modules/$3/extra"
  strip -g -o "$work/entry/lib/modules/$3/extra/siw.ko" "$module/siw.ko"
}

# ensure_initramfs ENTRY : prints the path of the initramfs for an entry and the guest/init of
# this tree. Small (2 MB): busybox, init, and the modules needed to reach the host's tree.
ensure_initramfs() {
  local entry=$1 abi out tree work module file
  abi=$(sed -n 's/^abi=//p' "$entry/MANIFEST")
  out=$CACHE/initramfs/$abi-$(cat "$HERE/guest/init" "$HERE/kernel.sh" "$entry/MANIFEST" | sha256sum | cut -c1-12).cpio.gz
  # Renamed into place when whole; gzip's own checksum covers the rest.
  if ! gzip -t "$out" 2>/dev/null; then
    require_tools "$SETUP_TOOLS" || return
    mkdir -p "$CACHE/initramfs"
    work=$(mktemp -d "$CACHE/initramfs/.work.XXXXXX")
    tree=$work/tree
    mkdir -p "$tree"/{bin,sbin,proc,sys,dev,share,lower,upper,host,"lib/modules/$abi"}
    cp "$entry/busybox" "$tree/bin/busybox"
    for file in $("$entry/busybox" --list); do
      [ "$file" = busybox ] || ln -s busybox "$tree/bin/$file"
    done
    # The kernel calls /sbin/modprobe by this name (rdma links, queue disciplines, checksums).
    ln -s ../bin/busybox "$tree/sbin/modprobe"
    for module in $BOOT_MODULES; do
      modprobe -d "$entry" -S "$abi" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
    done | sort -u | while read -r file; do
      file=${file#"$entry/"}
      mkdir -p "$tree/${file%/*}"
      cp "$entry/$file" "$tree/$file"
    done
    cp "$entry/lib/modules/$abi"/modules.{order,builtin,builtin.modinfo} "$tree/lib/modules/$abi/"
    depmod -b "$tree" "$abi" 2>/dev/null
    install -m 755 "$HERE/guest/init" "$tree/init"
    (cd "$tree" && find . | sort | cpio -o -H newc --quiet -R 0:0 | gzip -6 -n) >"$work/out"
    mv "$work/out" "$out"
    rm -rf "$work"
  fi
  printf '%s\n' "$out"
}
