# `cadyq upscale` in a container, without torch:
#   docker build -t cadyq . && docker run --rm -v "$PWD:/work" cadyq upscale photo.png -o photo_x4.png
# Files are written as user 1000; give --user "$(id -u):$(id -g)" if you are another.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --wheel-dir /wheels /source

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels cadyq \
    && useradd --uid 1000 --create-home cadyq
USER cadyq
WORKDIR /work
ENTRYPOINT ["cadyq"]
CMD ["--help"]
