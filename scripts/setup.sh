#!/usr/bin/env bash
# Brings a fresh Debian 12 machine to the point where the project builds. Quick when nothing is to be done.
# Usage: source scripts/setup.sh ; then call need_packages, choose_cargo, build_preset or need_python.

set -euo pipefail
TANDEM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BUILD_PACKAGES=(
  g++ cmake ninja-build pkg-config ccache mold ca-certificates
  libboost1.81-dev nlohmann-json3-dev libcli11-dev libyaml-cpp-dev libspdlog-dev libfmt-dev
  libucx-dev libhwloc-dev libssl-dev libgtest-dev libgmock-dev libbenchmark-dev
)
# What the end-to-end tests use beside the program.
TEST_PACKAGES=(python3-venv procps iproute2)

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Installs the Debian packages that are missing; asks for sudo only then.
need_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  say "installing Debian packages: ${missing[*]}"
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "these Debian packages are needed: ${missing[*]}; install them as root"
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -q >/dev/null
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

# Prints the path of a cargo of at least 1.87: the machine's own, else Debian's cargo-web.
choose_cargo() {
  local version
  if command -v cargo >/dev/null; then
    version="$(cargo --version | sed -E 's/cargo ([0-9]+)\.([0-9]+).*/\1 \2/')"
    set -- $version
    if [ "$1" -gt 1 ] || [ "$2" -ge 87 ]; then command -v cargo; return 0; fi
  fi
  need_packages cargo-web rustc-web >&2
  /usr/bin/cargo --version >&2 || fail "no cargo of version 1.87 or newer was found"
  echo /usr/bin/cargo
}

# build_preset <preset> [target …]
build_preset() {
  local preset="$1"; shift
  local folder="$TANDEM_ROOT/build"
  [ "$preset" = release ] || folder="$TANDEM_ROOT/build-$preset"
  if [ ! -f "$folder/build.ninja" ]; then
    say "configuring $preset"
    (cd "$TANDEM_ROOT" && cmake --preset "$preset" -DTANDEM_CARGO="$(choose_cargo)" >"$TANDEM_ROOT/.configure.log" 2>&1) \
      || { cat "$TANDEM_ROOT/.configure.log"; fail "cmake --preset $preset failed"; }
    rm -f "$TANDEM_ROOT/.configure.log"
  fi
  say "building $preset"
  ninja -C "$folder" "$@"
}

# A virtual environment in .venv with the pinned packages of tests/requirements.txt.
need_python() {
  local stamp="$TANDEM_ROOT/.venv/installed"
  if [ -f "$stamp" ] && cmp -s "$stamp" "$TANDEM_ROOT/tests/requirements.txt"; then return 0; fi
  say "installing Python packages for the tests into .venv"
  python3 -m venv "$TANDEM_ROOT/.venv"
  "$TANDEM_ROOT/.venv/bin/pip" install -q --disable-pip-version-check -r "$TANDEM_ROOT/tests/requirements.txt"
  cp "$TANDEM_ROOT/tests/requirements.txt" "$stamp"
}
