# The project with its locked environment. By default it runs the whole pipeline with profile tiny:
#
#   docker build --tag cm3leon .
#   docker run --rm --volume cm3leon:/home/cm3leon/project cm3leon
#
# Data, models and the tracking store stay in the volume, so a second container serves what the first has trained; only on this machine:
#
#   docker run --rm --volume cm3leon:/home/cm3leon/project --publish 127.0.0.1:8000:8000 cm3leon cm3leon serve --host 0.0.0.0
#
# The volume also keeps the code of its first run: remove it (docker volume rm cm3leon) after building a new image. Your own files in it go with
# it, so mount your collection from the host, as docs/administration.md shows.
FROM python:3.11-slim

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 cm3leon \
    && install --directory --owner cm3leon --group cm3leon /home/cm3leon/project

USER 1000
WORKDIR /home/cm3leon/project

# An index of CPU wheels makes the image some gigabytes smaller. It is kept in the image's history: no credentials in it.
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1

# The environment first: a change of the code does not install it again. The packages only have to be there.
COPY --chown=cm3leon:cm3leon Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY --chown=cm3leon:cm3leon cm3leon/__init__.py cm3leon/
COPY --chown=cm3leon:cm3leon flows/__init__.py flows/
RUN make install

COPY --chown=cm3leon:cm3leon . .
# DVC wants a repository, and deployments run on its last commit; the history itself stays out of the image.
RUN git init --quiet && git add --all \
 && git -c user.name=cm3leon -c user.email=cm3leon@localhost commit --quiet --message "The image's code"
ENV PATH=/home/cm3leon/project/.venv/bin:$PATH
EXPOSE 8000
CMD ["make", "run", "PROFILE=tiny"]
