# docker build -t allspark .                                          GPU: PyTorch's CUDA 13 wheels, as on PyPI
# docker build -t allspark --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .    older drivers
# docker build -t allspark --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .      CPU only
# docker run --rm --gpus all --shm-size 8g -v $PWD:/work allspark train --config mydata.yaml
FROM python:3.12-slim
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.6" "torchvision>=0.21"
COPY . /opt/allspark
# mmcv-lite and mmengine ask for opencv-python, which needs libGL; opencv-python-headless takes its place
RUN pip install --no-deps "mmcv-lite>=2.1" "mmengine>=0.10" && \
    sed -E '/^(mmcv|mmengine)/d; /^# development/,$d' /opt/allspark/requirements.txt > /tmp/requirements.txt && \
    pip install -r /tmp/requirements.txt && pip install --no-deps "/opt/allspark"
WORKDIR /work
ENTRYPOINT ["allspark"]
CMD ["--help"]
