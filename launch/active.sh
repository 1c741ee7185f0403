# shellcheck shell=bash
# Sourced: sets active, the folder of the environment that the user activated; empty without one. conda's own, `base`,
# is active by itself and does not count.
# shellcheck disable=SC2034

active=${VIRTUAL_ENV:-}
if [[ -z $active && ${CONDA_DEFAULT_ENV:-base} != base && -n ${CONDA_PREFIX:-} && -x $CONDA_PREFIX/bin/python ]]; then active=$CONDA_PREFIX; fi
