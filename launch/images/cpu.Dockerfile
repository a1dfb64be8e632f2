# Image for machines without a GPU:
#
#   docker build -f launch/images/cpu.Dockerfile -t rlsc:cpu .
#   docker run --rm --shm-size=2g -v "$PWD:/work" rlsc:cpu                                  the quick start
#   docker run --rm --shm-size=2g -v "$PWD:/work" rlsc:cpu rlsc train --config /opt/rlsc/configs/tiny_cpu.yaml
#
# `bash tests/install/bare_machine.sh launch/images/cpu.Dockerfile` runs these instructions in an empty Debian root.
FROM debian:bookworm-slim
ARG RLSC_TORCH_INDEX=""
COPY . /opt/rlsc
RUN bash /opt/rlsc/launch/images/install.sh cpu
ENV PATH=/opt/rlsc/.venv/bin:$PATH
WORKDIR /work
CMD ["rlsc", "quickstart"]
