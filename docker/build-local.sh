#!/usr/bin/env bash
# Builds the CPU image without access to an image registry, and trains in it for five steps as the image's user.
#
# Usage:  docker/build-local.sh      (root on Debian; apt-get install --no-install-recommends buildah netavark debootstrap)
#
# The base image is made here: a minimal Debian of this machine's release with this machine's Python in /usr/local, where
# the official Python images have theirs. Everything after FROM is docker/Dockerfile unchanged. PIP_FIND_LINKS (a
# folder of wheels) and PIP_INDEX_URL are passed to pip inside. It needs about 6 GB under TMPDIR, freed at the end.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
base=localhost/stand-in-python
image=localhost/lightspan:cpu

die() {
    echo "build-local.sh: $*" >&2
    exit 2
}
[[ "$(id -u)" == 0 ]] || die "needs root, for debootstrap and buildah's chroot isolation"
for tool in buildah debootstrap "${python}"; do
    command -v "${tool}" >/dev/null ||
        die "${tool} is missing: apt-get install --no-install-recommends buildah netavark debootstrap"
done

work="$(mktemp -d)"
# Chroot isolation and plain folders work without the privileges and kernel features that containers usually need.
export BUILDAH_ISOLATION=chroot
limits=(--ulimit nofile=20000:20000 --ulimit nproc=90000:90000)
store() { buildah --storage-driver vfs --root "${work}/storage" --runroot "${work}/run" "$@"; }
cleanup() {
    store rm --all >/dev/null 2>&1 || true
    rm -rf "${work}"
}
trap cleanup EXIT

echo "== base image"
# shellcheck source=/dev/null
suite="$(. /etc/os-release && echo "${VERSION_CODENAME:?}")"
prefix="$("${python}" -c 'import sys; print(sys.base_prefix)')"
version="$("${python}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
libraries=libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8t64,libsqlite3-0,libssl3t64,libuuid1,zlib1g
[[ "${prefix}" != /usr ]] || libraries=python3,python3-venv
container="$(store from scratch)"
root="$(store mount "${container}")"
debootstrap --variant=minbase --include="ca-certificates,${libraries}" "${suite}" "${root}" >"${work}/debootstrap.log" 2>&1 ||
    { tail -n 20 "${work}/debootstrap.log" >&2; die "debootstrap failed"; }
rm -rf "${root}"/var/cache/apt/archives/*.deb "${root}"/var/lib/apt/lists/*
if [[ "${prefix}" != /usr ]]; then
    for part in bin/python3 "bin/python${version}" "lib/python${version}" "${prefix}"/lib/libpython3*.so*; do
        part="${part#"${prefix}"/}"
        [[ ! -e "${prefix}/${part}" ]] || tar -C "${prefix}" -c --exclude=__pycache__ --exclude=site-packages --exclude=test \
            "${part}" | tar -x -C "${root}/usr/local"
    done
    mkdir -p "${root}/usr/local/lib/python${version}/site-packages"
    chown -R 0:0 "${root}/usr/local"
    chroot "${root}" ldconfig
fi
chroot "${root}" python3 -c 'import bz2, ctypes, lzma, sqlite3, ssl, venv'
store umount "${container}" >/dev/null
store commit --quiet --rm "${container}" "${base}" >/dev/null

echo "== docker/Dockerfile on top of it"
certificates=/etc/ssl/certs/ca-certificates.crt
mounts=(--volume "${certificates}:${certificates}:ro")
{
    echo "[global]"
    echo "cert = ${certificates}"
    [[ -z "${PIP_INDEX_URL:-}" ]] || echo "index-url = ${PIP_INDEX_URL}"
    [[ -z "${PIP_FIND_LINKS:-}" ]] || echo "find-links = /wheels"
} >"${work}/pip.conf"
[[ -z "${PIP_FIND_LINKS:-}" ]] || mounts+=(--volume "$(realpath "${PIP_FIND_LINKS}"):/wheels:ro")
store build --pull=never --format docker "${limits[@]}" "${mounts[@]}" --secret "id=pip,src=${work}/pip.conf" \
    --build-arg "BASE=${base}" --build-arg RUNTIME_PACKAGES= --tag "${image}" --file "${here}/docker/Dockerfile" "${here}"

echo "== test of the image"
container="$(store from --pull=never "${limits[@]}" "${image}")"
inside() { store run "${container}" -- "$@"; }
[[ "$(inside id -u)" == 10001 ]] || die "the image does not run as user 10001"
for path in /usr/bin/gcc /opt/lightspan/bin/pip; do
    ! inside test -e "${path}" || die "the image contains ${path}, which is only for the build"
done
inside lightspan recipes
inside lightspan fit language/quickstart --run /runs/smoke trainer.max_steps=5
inside cat /runs/smoke/summary.json
echo
echo "image size: $(du -sh --apparent-size "$(store mount "${container}")" | cut -f1)"
