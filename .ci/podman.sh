# Sourced by .ci/image and .ci/pods.

# Settings that let podman run inside a container or a small VM as well; in a file, for the variable names one.
set_up_podman() {
    export CONTAINERS_CONF_OVERRIDE="$1/containers.conf" PODMAN_IGNORE_CGROUPSV1_WARNING=1
    printf '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n' >"$CONTAINERS_CONF_OVERRIDE"
    if ! command -v crun >/dev/null; then printf '[engine]\nruntime = "runc"\n' >>"$CONTAINERS_CONF_OVERRIDE"; fi
}
