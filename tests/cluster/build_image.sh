#!/usr/bin/env bash
# Build docker/Dockerfile without a Docker engine: a Debian base by debootstrap in place of the Python image, then buildah
# in a chroot. Needs root, and the network of a build.
#
#   tests/cluster/build_image.sh FOLDER [TARGET]      leaves the image sparselt_dist:TARGET in FOLDER/storage
#
# PIP_FIND_LINKS and PIP_CERT, where set, hold in the build too. A base in FOLDER/base is used again.
set -euo pipefail

folder=$(realpath "$1")
target=${2:-cpu}
repository=$(realpath "$(dirname "$0")/../..")
mkdir -p "$folder/storage" "$folder/run"

image() {
    buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs "$@"
}

if [[ ! -d $folder/base ]]; then
    rm -rf "$folder/base.partial"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder/base.partial" \
        "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    mv "$folder/base.partial" "$folder/base"
fi
ln -sf python3 "$folder/base/usr/bin/python"

if ! image inspect --type image localhost/debootstrapped >/dev/null 2>&1; then
    container=$(image from scratch)
    image add --quiet "$container" "$folder/base" /
    image commit --quiet "$container" localhost/debootstrapped
    image rm "$container"
fi

options=()
printf '[global]\n' >"$folder/pip.conf"
if [[ -n ${PIP_FIND_LINKS:-} ]]; then
    printf 'find-links = %s\n' "$PIP_FIND_LINKS" >>"$folder/pip.conf"
    options+=(--volume "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro" --build-arg TORCH_INDEX="${TORCH_INDEX:-https://pypi.org/simple}")
fi
if [[ -n ${PIP_CERT:-} ]]; then
    printf 'cert = /etc/build.crt\n' >>"$folder/pip.conf"
    options+=(--volume "$PIP_CERT:/etc/build.crt:ro")
fi

image bud --isolation chroot --format docker --build-arg PYTHON_IMAGE=localhost/debootstrapped --pull-never \
    --layers --volume "$folder/pip.conf:/etc/pip.conf:ro" ${options[@]+"${options[@]}"} \
    --file "$repository/docker/Dockerfile" --ignorefile "$repository/docker/Dockerfile.dockerignore" \
    --target "$target" --tag "sparselt_dist:$target" "$repository"
