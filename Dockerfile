# GPU image. DeepSpeed builds its operators on first use, so the base image needs the CUDA toolkit
# (`devel`).
#
#   REVISION=$(git describe --always --exclude='*' --dirty --abbrev=12)
#   docker build --build-arg REVISION="$REVISION" -t pmp-ds .
#   mkdir -p runs && docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" \
#     -v "$PWD/runs:/app/runs" -v "$PWD/tokenized_data:/app/tokenized_data" \
#     pmp-ds python3 -m pmp_ds.launch pretrain --config tinyllama-1.1b --deepspeed-config zero1
#
# --shm-size: NCCL and the loader exchange data through /dev/shm, 64 MB by default.
# -u: you own the files written to the mounted folders; only their owner can read private/. Any user
#   works, known to the image or not; without -u it is 10001.
# --read-only: works with `--tmpfs /tmp:exec`; DeepSpeed and Triton compile and load there.
#
# CPU image, for experiments:
#   docker build --build-arg BASE=python:3.12-slim \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t pmp-ds:cpu .
#   docker run --rm -e DS_ACCELERATOR=cpu -e OMP_NUM_THREADS=1 pmp-ds:cpu \
#     python3 -m pmp_ds.launch --ranks 2 pretrain --help
#
# pmp_ds.launch starts a rank per GPU, forwards SIGTERM to the ranks, and exits with their exit code
# (75: saved). Give it time to save: `docker stop -t 120`.

ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# The C++ kernels need a compiler; `slim` bases have none.
RUN command -v g++ >/dev/null \
 || { apt-get update && apt-get install -y --no-install-recommends g++ \
      && rm -rf /var/lib/apt/lists/*; }

# An environment on top of the base's packages uses the base's torch, without a second download, and
# replaces nothing of the base. It belongs to root, and `python -I`, which export uses to check a
# release, sees it.
RUN python3 -m venv --system-site-packages --without-pip /opt/pmp-ds
ENV PATH=/opt/pmp-ds/bin:${PATH}

# Dependencies first, so that a change of the code does not download them again.
WORKDIR /app
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt ./
RUN if [ -n "${TORCH_INDEX}" ]; then \
      python3 -m pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" \
        "$(grep '^torch==' constraints.txt)"; \
    fi \
 && python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], sep="\n")' > /tmp/requirements.txt \
 && python3 -m pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt

# Our kernel is compiled here: at run time that would need a folder to write to and execute from.
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps -e . \
 && python3 -c 'from pmp_ds.optim.kernels import compiler; compiler.compile_beside_source()' \
 && python3 -m compileall -q pmp_ds \
 && mkdir -p runs tokenized_data && chmod 1777 runs tokenized_data

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pmp-ds" \
      org.opencontainers.image.description="Private Mask Pre-Training on DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# HOME holds the caches of torch, Triton and Hugging Face, for any -u. USER is a number, because
# Kubernetes' runAsNonRoot cannot tell whether a name is root's.
ENV PMP_DS_COMMIT=${REVISION} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
USER 10001:10001

CMD ["pmp-ds", "--help"]
