# shellcheck shell=bash
# Sourced by mpirun.sh and deepspeed.sh behind ranks.sh: the environment variables that ranks on other nodes need.

names_for_other_nodes() { # those that libraries need, and those that stand in the config or among the arguments
  local name config=${arguments[0]:-} used
  [[ ! -d $config ]] || config=$config/config.yaml
  used=$({ printf '%s\n' "${arguments[@]}" && cat "$config"; } 2>/dev/null | grep -oE '\$(\w+|\{\w+\})' | tr -d '${}') || true
  for name in $(compgen -e); do
    case $name in
      CUDA_VISIBLE_DEVICES | HOME | HOSTNAME | TMPDIR) ;; # each node's own
      PATH | VIRTUAL_ENV | LD_LIBRARY_PATH | MPI4PY_LIBMPI | TOKENIZERS_PARALLELISM | OMP_* | MKL_* | PYTHON* | HF_* | \
        TORCH_* | PYTORCH_* | TRITON_* | CUDA_* | BNB_* | DS_* | NCCL_* | GLOO_* | UCX_* | FI_* | WANDB_* | MLFLOW_* | \
        TRACKIO_* | *_proxy | *_PROXY | SSL_CERT_* | *_CA_BUNDLE | XDG_CACHE_HOME | \
        DIST_QFT_CACHE | DIST_QFT_CPU_PRECISION) echo "$name" ;;
      *) if grep -qx "$name" <<<"$used"; then echo "$name"; fi ;;
    esac
  done
}

deepspeeds_variables() { # lines of a DS_ENV_FILE, the user's own last: DeepSpeed takes the last one of a name
  local name file withheld=()
  for name in $(names_for_other_nodes); do
    case $name in
      PYTHON* | UCX_* | MLFLOW_*) continue ;; # which DeepSpeed hands on by itself
      *_TOKEN | *_KEY | *SECRET* | *PASSWORD*) withheld+=("$name") && continue ;;
    esac
    if [[ ${name,,} == *_proxy && ${!name} == *@* ]]; then withheld+=("$name") && continue; fi # with a password
    # DeepSpeed puts a value between double quotes, and pdsh replaces what follows a percent sign.
    if [[ ${!name} =~ [\"\$\`\\%$'\n'] ]]; then withheld+=("$name"); else echo "$name=${!name}"; fi
  done
  for file in ~/"${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
    if [[ -f $file ]]; then cat "$file"; fi
  done
  [[ ${#withheld[@]} == 0 ]] ||
    echo "$script: the other nodes do not get ${withheld[*]}: DeepSpeed would put them into command lines; set them there" >&2
}
