# The image of pmp-ds, for GPUs:
#
#   docker build --build-arg REVISION="$(git describe --always --exclude='*' --dirty --abbrev=12)" \
#     -t pmp-ds .
#   mkdir -p runs && docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" \
#     -v "$PWD/runs:/app/runs" -v "$PWD/tokenized_data:/app/tokenized_data" \
#     pmp-ds pretrain --config tinyllama-1.1b --deepspeed-config zero1
#
# and for CPUs:
#
#   docker build --build-arg BASE=python:3.12-slim \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t pmp-ds:cpu .
#   docker run --rm -e DS_ACCELERATOR=cpu -e OMP_NUM_THREADS=1 pmp-ds:cpu --ranks 2 pretrain --help
#
# BASE          name, or better name@sha256:DIGEST: python3 with pip, and torch if there is no
#               TORCH_INDEX. Both stages use it.
# TORCH_INDEX   where to get the torch of constraints.txt if the base has none
# REVISION      the commit, for the label and for the records of runs
#
# The entry point is `pmp_ds.launch`: a rank per GPU for pretrain and finetune, one process for the
# other commands. It forwards SIGTERM to the ranks and exits with their exit code (75: saved). Give
# it time to save: `docker stop -t 120`. For another program: `docker run --entrypoint bash`.
#
# --shm-size    NCCL and the loader exchange data through /dev/shm, 64 MB by default.
# -u            You own the files written to the mounted folders; only their owner can read
#               private/. Any user works, known to the image or not; without -u it is 10001.
# --read-only   works with `--tmpfs /tmp:exec`; Triton compiles and loads there.
#
# Nothing needs nvcc: Triton has its own ptxas, none of DeepSpeed's operators is built, and our C++
# kernel is compiled below. Where the base has Triton, the image has a C compiler and Python's
# headers as well, because Triton compiles a small C module at first use.

ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

FROM ${BASE} AS build
RUN command -v g++ >/dev/null \
 || { apt-get update && apt-get install -y --no-install-recommends g++ \
      && rm -rf /var/lib/apt/lists/*; }

# An environment on top of the base's packages uses the base's torch, without a second download, and
# replaces nothing of the base. It belongs to root, and `python -I`, which export uses to check a
# release, sees it. The hash seed makes two builds equal: deepspeed's metadata list a set.
RUN python3 -m venv --system-site-packages --without-pip /opt/pmp-ds
ENV PATH=/opt/pmp-ds/bin:${PATH} \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_COMPILE=1 \
    PYTHONHASHSEED=0

# Dependencies first, so that a change of the code does not download them again. Every file has a
# hash except torch's, which differs between indexes. setuptools builds deepspeed, whose only release
# file is a source archive.
WORKDIR /src
ARG TORCH_INDEX=
COPY constraints.txt requirements.lock ./
RUN if [ -n "${TORCH_INDEX}" ]; then \
      python3 -m pip install --no-deps --index-url "${TORCH_INDEX}" \
        "$(grep '^torch==' constraints.txt)"; \
    fi \
 && sed -n '/^setuptools==/,/[^\\]$/p' requirements.lock > /tmp/setuptools.lock \
 && python3 -m pip install --no-deps --require-hashes -r /tmp/setuptools.lock \
 && DS_ACCELERATOR=cpu python3 -m pip install --no-deps --require-hashes --no-build-isolation \
      -r requirements.lock

# Our kernel is compiled here: at run time that would need a compiler, and a folder to write to and
# execute from. The packages' own tests are dropped: 170 MB. Byte code does not depend on the time of
# the build; a few files of packages are templates, which do not compile.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pmp_ds pmp_ds
COPY launcher/recipes launcher/recipes
COPY ds_configs ds_configs
RUN python3 -m pip install --no-deps --no-build-isolation . \
 && cd / \
 && python3 -c 'from pmp_ds.optim.kernels import compiler; print(compiler.compile_beside_source())' \
 && find /opt/pmp-ds/lib -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -r {} + \
 && { python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/pmp-ds/lib || true; }

# The list of packages, as CycloneDX. The program that makes it stays out of the image.
FROM build AS sbom
ARG CYCLONEDX=7.5.0
RUN python3 -m pip install --target /tmp/cyclonedx "cyclonedx-bom==${CYCLONEDX}" \
 && PYTHONPATH=/tmp/cyclonedx python3 -m cyclonedx_py environment /opt/pmp-ds/bin/python3 \
      --output-reproducible --output-file /tmp/sbom.json

FROM ${BASE}
# The OpenMP library of the C++ kernel; for Triton, what it compiles with.
RUN packages=libgomp1 \
 && if python3 -c 'import sys, importlib.util as u; sys.exit(u.find_spec("triton") is None)'; then \
      command -v gcc >/dev/null || packages="$packages gcc libc6-dev"; \
      header='import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))'; \
      [ -e "$(python3 -c "$header")" ] || packages="$packages python3-dev"; \
    fi \
 && apt-get update && apt-get install -y --no-install-recommends $packages \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*
COPY --from=build /opt/pmp-ds /opt/pmp-ds
COPY --from=sbom /tmp/sbom.json /usr/share/doc/pmp-ds/sbom.json
WORKDIR /app
RUN mkdir runs tokenized_data && chmod 1777 runs tokenized_data

ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pmp-ds" \
      org.opencontainers.image.description="Private Mask Pre-Training on DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# HOME holds the caches of torch, Triton and Hugging Face, for any -u. USER is a number, because
# Kubernetes' runAsNonRoot cannot tell whether a name is root's.
ENV PATH=/opt/pmp-ds/bin:${PATH} \
    PMP_DS_COMMIT=${REVISION} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
USER 10001:10001

ENTRYPOINT ["python3", "-m", "pmp_ds.launch"]
CMD ["--help"]
