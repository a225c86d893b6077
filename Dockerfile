# The pinned install on a CUDA image; the commands are those of a checkout:
#   docker build -t tubelet . && docker run --gpus all --ipc=host tubelet deepspeed launch/pretrain.py --recipe vit_b_dual
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 DS_BUILD_OPS=0 PATH=/opt/tubelet/.venv/bin:$PATH

# NCCL talks to InfiniBand and RoCE cards through libibverbs and its providers; without them it falls back to TCP.
# Version pins of Debian packages vanish from the mirrors with each security update, so these float.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv ffmpeg g++ git ninja-build pdsh openssh-client \
        libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tubelet
COPY pyproject.toml README.md ./
COPY .ci/constraints.txt .ci/constraints.txt
RUN python3 -m venv .venv \
    && pip install --constraint .ci/constraints.txt torch torchvision

COPY . .
RUN pip install --constraint .ci/constraints.txt --editable '.[s3,gcs,azure,torchcodec,language,arrays,raster]'

CMD ["deepspeed", "launch/pretrain.py", "--help"]
