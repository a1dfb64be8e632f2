# Image for NVIDIA GPUs (CUDA 13, driver 580 or newer):
#
#   docker build -f launch/images/gpu.Dockerfile -t rlsc:gpu .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" rlsc:gpu rlsc doctor
#   CONTAINER=rlsc:gpu sbatch launch/rlsc_7b.sh                                             on SLURM with pyxis
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
COPY . /opt/rlsc
RUN bash /opt/rlsc/launch/images/install.sh gpu
ENV PATH=/opt/rlsc/.venv/bin:$PATH
WORKDIR /work
CMD ["rlsc", "doctor"]
