# spo_ext beside the PyTorch of the base image, with CUDA kernels where that has nvcc, and what the trainer,
# the sandbox and a PostgreSQL store need.
#   docker build -t spo_ext .
#   docker build --build-arg BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel -t spo_ext .
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ bubblewrap && \
    rm -rf /var/lib/apt/lists/*
# Where the image has no PyTorch; `--build-arg TORCH=` names another one.
ARG TORCH="torch==2.13.0"
RUN python -c 'import torch' 2>/dev/null || pip install --no-cache-dir ${TORCH}
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir 'setuptools>=77' ninja numpy && \
    pip install --no-cache-dir --no-build-isolation '.[trainer,postgresql,parquet,math,lora]'
WORKDIR /work
ENTRYPOINT ["spo"]
