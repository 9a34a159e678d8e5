"""Reading and writing the frames of a video file one at a time, with OpenCV."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from allspark.data.image_files import BadSample, max_megapixels
from allspark.utils.atomic import atomic_path
from allspark.utils.errors import UserError

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
MAX_BASE = 65535  # largest denominator of a frame's duration in MPEG-4 Part 2
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


def frame_rate(path: Path) -> float:
    """Frames per second according to the header; 25 if unknown or unreadable."""
    try:
        with open_video(path) as video:
            rate = video.get(cv2.CAP_PROP_FPS)
    except BadSample:
        return 25.0
    return rate if 0 < rate <= 1000 else 25.0


def write_video(path: Path, frames: Iterable[np.ndarray], rate: float) -> None:
    """Write an MP4 (MPEG-4 Part 2). Without frames no file is written.

    Args:
        frames: (H, W, 3) uint8 RGB, all of one size. An odd row or column is cut off.
        rate: frames per second.

    Raises:
        UserError: it cannot be written completely.
    """
    frames = iter(frames)
    if (first := next(frames, None)) is None:
        return
    height, width = first.shape[:2]
    remedy = "free disk space or choose another path"
    with atomic_path(path, remedy) as temporary:
        size = (width // 2 * 2, height // 2 * 2)
        rate = rate if rate * 1000 <= MAX_BASE else round(rate, 1)  # of cv2's thousandths of a second
        video = cv2.VideoWriter(str(temporary), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not video.isOpened():
            raise UserError(f"{path}: OpenCV cannot write a video of {width} x {height} pixels, {rate} per second")
        count = 0
        for frame in itertools.chain([first], frames):
            video.write(cv2.cvtColor(frame[: size[1], : size[0]], cv2.COLOR_RGB2BGR))
            count += 1
        video.release()  # cv2 reports no error of the disk
        if frame_count(temporary) != count:
            raise UserError(f"{path}: OpenCV cannot write this video of {width} x {height} pixels; {remedy}")
