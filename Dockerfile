# GPU image. Nothing is compiled here: DeepSpeed builds its operators on first use, which is why
# the base is one with the CUDA toolkit (`devel`).
#
#   docker build -t pmp-ds .
#   mkdir -p runs && docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" \
#     -v "$PWD/runs:/app/runs" -v "$PWD/tokenized_data:/app/tokenized_data" \
#     pmp-ds deepspeed launcher/pretrain.py --config launcher/recipes/tinyllama-1.1b.yaml \
#     --deepspeed-config ds_configs/zero1.json
#
# --shm-size: NCCL and the loader exchange data through /dev/shm, 64 MB by default.
# -u: what is written to the mounted folders is yours; private/ is readable by its owner alone.
#
# CPU image, for tests and the demo:
#   docker build --build-arg BASE=python:3.12-slim \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t pmp-ds:cpu .
#   docker run --rm -e DS_ACCELERATOR=cpu -e OMP_NUM_THREADS=1 pmp-ds:cpu \
#     deepspeed --num_accelerators 2 launcher/pretrain.py --help

ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# With -u, anyone may have to write beside the mounted folders.
RUN useradd --create-home --shell /bin/bash pmp \
 && mkdir -p /app/runs /app/tokenized_data \
 && chmod 1777 /app/runs /app/tokenized_data \
 && chown pmp:pmp /app
WORKDIR /app
USER pmp

# pip's user folder, beside the base's own packages: the torch of the base is used, not fetched
# again. HOME and USER make the caches of torch, triton and Hugging Face work for any -u.
ENV PYTHONUSERBASE=/app/.local \
    PATH=/app/.local/bin:${PATH} \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=pmp

# Dependencies first, so that a change of the code does not fetch them again.
ARG TORCH_INDEX=
COPY --chown=pmp:pmp pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=pmp:pmp pmp_ds/__init__.py pmp_ds/
RUN if [ -n "${TORCH_INDEX}" ]; then \
      python3 -m pip install --user --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" \
        "$(grep '^torch==' constraints.txt)"; \
    fi \
 && python3 -m pip install --user --no-cache-dir -c constraints.txt -e .

COPY --chown=pmp:pmp . .

CMD ["python3", "launcher/pretrain.py", "--help"]
