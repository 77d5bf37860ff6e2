#!/usr/bin/env bash
# bare.sh HOME PACKAGE... -- COMMAND...: runs the command as on a machine without these Debian packages, with an empty home
# and on one core. Hiding needs root and unshare; otherwise it says what stays visible.
set -euo pipefail

home=$(realpath -m "$1")
shift
packages=()
while [[ $1 != -- ]]; do
    packages+=("$1")
    shift
done
shift

# Paths that belong to these packages and to no other, without what is inside a folder that is listed; fonts, which a browser
# installs, count as theirs. Besides, what `make evidence-data` unpacks, which belongs to no package.
hidden() {
    local lists=() fonts
    fonts=$(dpkg-query --show --showformat '${Package}\n' 'fonts-*' 2>/dev/null || true)
    for package in "${packages[@]}" $fonts; do
        for list in /var/lib/dpkg/info/"$package".list /var/lib/dpkg/info/"$package":*.list; do
            [[ ! -e $list ]] || lists+=("$list")
        done
    done
    if ((${#lists[@]})); then
        comm -23 <(sort -u "${lists[@]}") <(printf '%s\n' /var/lib/dpkg/info/*.list | grep -vxFf <(printf '%s\n' "${lists[@]}") | xargs sort -u) |
            grep -E '^/usr/(bin|games|share|lib/R)/' | grep -vE '^/usr/share/(doc|man|lintian)/' |
            awk 'top == "" || index($0 "/", top "/") != 1 { top = $0; print }'
    fi
    [[ ! -d /usr/local/lib/R ]] || echo /usr/local/lib/R
}

hide_and_run() {
    local empty path
    empty=$(mktemp -d)
    while read -r path; do
        if [[ -d $path ]]; then
            mount --bind "$empty" "$path"
        elif [[ -f $path && ! -L $path ]]; then
            mount --bind /dev/null "$path"
        fi
    done < <(hidden)
    slowed "$@"
}

slowed() {
    local core
    rm -rf "$home"
    mkdir -p "$home"
    if command -v taskset >/dev/null; then
        core=$(taskset --cpu-list --pid $$ | sed -E 's/.*: *([0-9]+).*/\1/')
        HOME=$home XDG_CACHE_HOME=$home/.cache exec taskset --cpu-list "$core" "$@"
    fi
    echo "bare.sh: there is no taskset, so this runs on all cores" >&2
    HOME=$home XDG_CACHE_HOME=$home/.cache exec "$@"
}

if [[ ${LIGHTSPAN_HIDING:-} == 1 ]]; then
    unset LIGHTSPAN_HIDING
    hide_and_run "$@"
elif [[ $(id -u) == 0 ]] && command -v unshare dpkg-query >/dev/null && unshare --mount true 2>/dev/null; then
    LIGHTSPAN_HIDING=1 exec unshare --mount "$0" "$home" "${packages[@]}" -- "$@"
fi
echo "bare.sh: hiding packages needs root, unshare and Debian; whatever is installed of these stays in sight: ${packages[*]}" >&2
slowed "$@"
