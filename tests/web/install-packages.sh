#!/bin/sh
# What only the web tests need, from Debian: a browser, Prometheus with promtool. Where it cannot, those tests skip and say so.
set -eu
missing=""
command -v chromium >/dev/null || missing="$missing chromium fonts-dejavu-core"
command -v promtool >/dev/null || missing="$missing prometheus"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "web tests need:$missing (install them; without them some tests are skipped)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null && apt-get install -qy --no-install-recommends $missing >/dev/null ||
    echo "could not install:$missing (some web tests are skipped)" >&2
