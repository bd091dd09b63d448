# A machine of tests/machines.sh: Debian 13 with a Docker engine of its own.
ARG BASE_IMAGE=debian:trixie-slim
FROM ${BASE_IMAGE}
RUN set -eux; \
    apt-get update; \
    apt-get install -y --no-install-recommends docker.io docker-cli iproute2 iptables kmod openssl; \
    rm -rf /var/lib/apt/lists/*
HEALTHCHECK NONE
# Containers that are not privileged see the control groups read-only.
CMD ["bash", "-euc", "for group in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts) /sys/fs/cgroup; do mount -o remount,bind,rw \"$group\"; done; exec dockerd --log-level=warn"]
