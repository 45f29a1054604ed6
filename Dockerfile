# README's two commands on CPUs, from the same locks. Results come out through a folder of the host:
#   docker build -t caprl .
#   docker run --rm -v "$PWD/runs:/caprl/runs" caprl make reproduce PROFILE=smoke
FROM python:3.11-slim-bookworm
# compilers and libnuma: vLLM on CPUs compiles what it runs
RUN apt-get update && apt-get install -y --no-install-recommends g++ git libnuma1 make procps && rm -rf /var/lib/apt/lists/*
WORKDIR /caprl
# The environments before the code: a layer of 7 GB that stays as long as the locks do
COPY requirements requirements
RUN UV_NO_CACHE=1 requirements/install.sh .venv requirements/main-cpu.lock
RUN UV_NO_CACHE=1 requirements/install.sh .venv-llamafactory requirements/llamafactory.lock
COPY . .
RUN make setup
CMD ["make"]
