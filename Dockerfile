# onefold in a container; docs/install.md has the commands. BASE is any image with Python 3.11 or newer and pip. The default
# gets PyTorch from pip, which on Linux brings CUDA with it; an image that has PyTorch keeps its own.
ARG BASE=python:3.11-slim
FROM ${BASE}

# A compiler, with which `training.compile` makes long runs faster.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore

# Another index to look for PyTorch in, such as that of its builds for the CPU alone.
ARG INDEX=
ARG EXTRAS=parquet,export,serve,tensorboard

# The requirements first: a change of the code leaves them in the cache.
WORKDIR /opt/onefold
COPY pyproject.toml README.md LICENSE ./
COPY src/onefold/__init__.py src/onefold/__init__.py
COPY src/onefold/data/digits.LICENSE src/onefold/data/digits.LICENSE
# hadolint ignore=DL3013
RUN python3 -m pip install ${INDEX:+--extra-index-url "$INDEX"} ".[$EXTRAS]"
COPY src src
RUN python3 -m pip install --no-deps --force-reinstall .

RUN useradd --uid 10001 --create-home onefold && install -d -o onefold /work
USER 10001
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["onefold"]
CMD ["--help"]
