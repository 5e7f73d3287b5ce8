# syntax=docker/dockerfile:1
# The coordinator: no libtorch, no CUDA. Build from the repository's root:
#   docker build -f deploy/containers/coordinator.Dockerfile -t REGISTRY/distillery/coordinator:0.1.0 .
# In a cluster, pin the base images by digest; the tags here name exact releases.

FROM rust:1.95.0-bookworm AS build
WORKDIR /src
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*
# Before the sources, so that a change of those downloads nothing again.
COPY deploy/libtorch.sh deploy/
RUN DISTILLERY_CACHE=/opt deploy/libtorch.sh cpu
COPY . .
# The engine is built once, to be asked what it is: the coordinator writes that into the run, and has no engine of its own.
RUN cargo build --release --locked --bin coordinator --bin engine \
    && target/release/engine describe >/described.json

FROM debian:12.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 65532 distillery \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin distillery
COPY --from=build /src/target/release/coordinator /usr/local/bin/coordinator
COPY --from=build /described.json /usr/local/share/distillery/described.json
COPY --chmod=0755 deploy/containers/described-engine /usr/local/bin/engine
COPY configs/teachers/scenes /opt/distillery/teachers/scenes
COPY configs/prompts /opt/distillery/prompts
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/coordinator"]
CMD ["--help"]
