# syntax=docker/dockerfile:1
# A worker with its engine and libtorch for CUDA 13 (about 4 GB; it runs on CPUs too). Build from the repository's root:
#   docker build -f deploy/containers/worker.Dockerfile -t REGISTRY/distillery/worker:0.1.0 .
# `--build-arg KIND=cpu` leaves CUDA out. Nodes need the driver and the container toolkit of NVIDIA, and nothing else.

FROM rust:1.95.0-bookworm AS build
ARG KIND=cuda
WORKDIR /src
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*
# Before the sources, so that a change of those downloads nothing again. Wheels pinned by their digests; the folder's path goes
# into the engine, so that it is the same in the image below. (An ARG is also a variable of what RUN starts: none may be LIBTORCH,
# by which script and build know a folder.)
COPY deploy/libtorch.sh deploy/
RUN DISTILLERY_CACHE=/opt deploy/libtorch.sh "$KIND"
COPY . .
RUN cargo build --release --locked --bin worker --bin engine

FROM debian:12.12-slim
ARG KIND=cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 65532 distillery \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin distillery
COPY --from=build /opt/libtorch-2.11.0-${KIND}/lib /opt/libtorch-2.11.0-${KIND}/lib
COPY --from=build /src/target/release/worker /src/target/release/engine /usr/local/bin/
COPY configs/teachers/scenes /opt/distillery/teachers/scenes
COPY configs/prompts /opt/distillery/prompts
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/worker"]
CMD ["--help"]
