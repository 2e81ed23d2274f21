#!/usr/bin/env bash
# Installs the Debian 12 packages of the named groups (build, test, clang) that are missing.
set -euo pipefail

build=(ca-certificates ccache cmake g++ git grpc-proto libabsl-dev libcli11-dev libeigen3-dev libfmt-dev
  libgmock-dev libgrpc++-dev libgtest-dev libicu-dev libprotobuf-dev libspdlog-dev mold ninja-build
  nlohmann-json3-dev pkg-config prometheus-cpp-dev protobuf-compiler protobuf-compiler-grpc
  python3 python3-pip python3-venv)
test=(curl python3-jinja2)
clang=(clang-19 clang-format-19 clang-tidy-19 libclang-rt-19-dev llvm-19)

wanted=()
for group in "$@"; do
  case $group in
    build) wanted+=("${build[@]}") ;;
    test) wanted+=("${test[@]}") ;;
    clang) wanted+=("${clang[@]}") ;;
    *) echo "install_packages.sh: unknown group $group (build, test, clang)" >&2; exit 2 ;;
  esac
done

if ! command -v dpkg-query >/dev/null; then
  echo "packages: not a Debian system; what is needed is listed in tools/scripts/install_packages.sh" >&2
  exit 0
fi

installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null |
  sed -n 's/^installed //p') || true
missing=()
for package in "${wanted[@]}"; do
  grep -qxF "$package" <<<"$installed" || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "packages: all ${#wanted[@]} of group $* are installed"
  exit 0
fi

as_root=()
how="as root"
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "packages: need root or sudo to install: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
  how="with sudo"
fi
echo "packages: installing $how: ${missing[*]}"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -o Dpkg::Use-Pty=0 \
    -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1
}
install() { apt install --no-install-recommends "${missing[@]}"; }
# Lists that are absent or old make the first try fail; then, and only then, they are fetched.
if ! install && ! { apt update && install; }; then
  tail -n 20 "$log" >&2
  echo "packages: apt-get failed (above); is there a network?" >&2
  exit 1
fi
