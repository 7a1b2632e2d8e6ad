#!/bin/sh
# Install what tests/slurm starts its cluster from: Debian's packages, as root. None of their daemons is started.
set -eu
export DEBIAN_FRONTEND=noninteractive
rc=/usr/sbin/policy-rc.d
if [ ! -e "$rc" ]; then
  trap 'rm -f "$rc"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$rc"
  chmod +x "$rc"
fi
install() {
  apt-get install -y --no-install-recommends slurm-wlm munge iproute2 openssh-server openssh-client pdsh >/dev/null
}
install || { apt-get update -qq; install; }
