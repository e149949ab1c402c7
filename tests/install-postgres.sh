#!/bin/sh
# The oldest Postgres that Tidemark runs on, and a connection pooler, from Debian. Where it cannot, those tests skip and say so.
set -eu
missing=""
[ -x /usr/lib/postgresql/15/bin/postgres ] || missing="$missing postgresql-15"
command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing="$missing pgbouncer"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests on Postgres 15 and behind a pooler need:$missing (install them; without them they are skipped)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# Neither a cluster nor a service of Debian's own: tests start what they need.
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
apt-get update -q >/dev/null && apt-get install -qy --no-install-recommends $missing >/dev/null ||
    echo "could not install:$missing (tests on Postgres 15 and behind a pooler are skipped)" >&2
