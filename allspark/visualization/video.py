"""Reading the frames of a video file one at a time, with OpenCV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from allspark.data.image_io import BadSample, max_megapixels

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
# Read by OpenCV's FFmpeg on first use: no output on stderr, and no playlists that point elsewhere
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


@contextmanager
def open_video(path: Path) -> Iterator[cv2.VideoCapture]:
    """Open a video and read its header; BadSample if it is not a video, or its frames are too large."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if not path.is_file():
        raise BadSample(f"{path}: no such file; correct the path")
    # FFmpeg only: other OpenCV backends interpret a name as a file pattern or a program
    video = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise BadSample(
                f"{path}: damaged, or not a video that OpenCV can read; copy it again, or convert it, e.g. with "
                f"`ffmpeg -i {path.name} {path.stem}_new.mp4`"
            )
        width, height = (video.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > max_megapixels() * 10**6:
            raise BadSample(f"{path}: frames of more than {max_megapixels()} megapixels; scale it down")
        yield video
    finally:
        video.release()


def read_frames(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Number (from 0) and (H, W, 3) uint8 RGB of each `every`-th frame; BadSample at the end if many are missing."""
    with open_video(path) as video:
        number = -1
        while video.grab():
            number += 1
            if number % every:
                continue
            decoded, frame = video.retrieve()  # rotated by the orientation tag of phones
            if not decoded:
                break
            yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        stated = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if number < 0 or number + 1 < 0.9 * stated:  # the header may contain an estimate
            raise BadSample(
                f"{path}: {number + 1} frames can be read, its header states {stated}; copy it again or convert it"
            )


def frame_count(path: Path) -> int:
    """Number of frames in the header, which may be an estimate; 0 if unknown or unreadable."""
    try:
        with open_video(path) as video:
            return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    except BadSample:
        return 0
