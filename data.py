"""Clips in, tensors out: manifests, sparse sampling, exact decoding, words, batches, the toy set.

Every data set is a JSON-lines *manifest*, one sample a line, paths relative to the manifest:

    {"video": "clips/a.mp4", "text": "a dog runs"}

"video" is a file, an image (a one-frame clip) or a folder of frames. As a task needs them: "texts"
(several captions of one clip), "captions" ([[start, end, text], ...]: one is drawn per visit),
"start" and "end" (seconds from the first frame), "question", "options", "answer" (an option's
index, or the answer's words), "boxes" (VCR), "kind" (a label to report accuracy by).
What follows is the way of a sample: manifest, order of visits, frames, pixels, words, tensors.

    python data.py {toy,convert,check,bench} --help
"""

import argparse
import ast
import bisect
import collections
import colorsys
import cProfile
import csv
import difflib
import gzip
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from tokenizers import Tokenizer as WordPieces
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes


class DataError(ValueError):
    """Bad input from the user: one line with what came, where, what was expected, what to do."""

    def __init__(self, message):
        # A DataLoader re-raises a worker's error with its traceback as text before the message.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class Unreadable(Exception):
    """One clip that cannot be read: `path` and `reason`, for a person who can mend or drop it."""

    def __init__(self, path, reason):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


# ---- manifest

class Manifest:
    """One or several JSON-lines files as a sequence of dicts, read through an index of their lines.

    paths: a path or a list of them (concatenated). `m[i]` is line i as a dict, with "video" made
    absolute and "where" = "file:line" added. The index, NAME.jsonl.idx, is three int64 of header
    (version, size and mtime of the manifest) and one int64 a line (where it begins), built once:
    beside the manifest or, where that folder is read-only, in the temporary folder. A sample is two
    small reads, and nothing stays open or in memory: workers share nothing, forked or spawned.
    HowTo100M as one line a video with its "captions" is 1.2 M lines: on disk 9.6 MB of index beside
    136 M captions x 60 B = 8.2 GB of text; as one line a clip, 136 M x 8 B = 1.1 GB of index. In
    memory either is nothing.
    DataError names file:line of a line that is blank, not JSON, or whose fields are not as FIELDS.
    """

    def __init__(self, paths):
        self.paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.indices = [_line_index(path) for path in self.paths]
        lines = [os.path.getsize(index) // 8 - HEADER for index in self.indices]
        self.ends = list(itertools.accumulate(lines))
        if not sum(lines):
            names = ", ".join(map(str, self.paths))
            raise DataError(f"{names or 'no manifest'}: no samples; expected a JSON object a line")

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a manifest of {len(self)}")
        which = bisect.bisect_right(self.ends, i)
        line = i - (self.ends[which - 1] if which else 0)
        path, where = self.paths[which], f"{self.paths[which]}:{line + 1}"
        begin = np.fromfile(self.indices[which], np.int64, 1, offset=8 * (HEADER + line))[0]
        with open(path, "rb") as file:
            file.seek(begin)
            text = file.readline()
        try:
            sample = json.loads(text)
        except ValueError as error:
            shown = text[:60].decode(errors="replace").strip()
            raise DataError(f"{where}: not JSON ({error}): {shown!r}; expected an object such as "
                            '{"video": "a.mp4", "text": "a dog runs"}') from None
        if not isinstance(sample, dict) or not sample.get("video"):
            raise DataError(f'{where}: lacks "video"; expected {{"video": PATH, ...}}, the path '
                            "relative to the manifest")
        for field in sample.keys() & FIELDS.keys():
            if not isinstance(sample[field], (FIELDS[field], type(None))):
                raise DataError(f'{where}: "{field}" is {sample[field]!r:.60}; the first lines '
                                "of data.py tell the fields of a sample")
        return {**sample, "video": str(path.absolute().parent / sample["video"]), "where": where}


FIELDS = {"video": str, "text": str, "texts": list, "captions": list, "question": str,
          "options": list, "answer": (int, str), "start": (int, float), "end": (int, float),
          "boxes": list}
HEADER = 3                     # int64 before the first line's offset: version, size, mtime_ns
INDEX_VERSION = 1


def _line_index(path):
    """Path of the up-to-date line index of manifest `path`, built if need be at disk speed."""
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; expected a .jsonl file, one sample a line")
    stat = path.stat()
    header = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    name = hashlib.sha1(str(path.resolve()).encode()).hexdigest()
    places = Path(f"{path}.idx"), Path(tempfile.gettempdir(), f"allinone-{name}.idx")
    for place in places:
        if place.is_file() and np.array_equal(np.fromfile(place, np.int64, HEADER), header):
            return place
    place = places[0] if os.access(path.absolute().parent, os.W_OK) else places[1]
    partial = f"{place}.{os.urandom(4).hex()}"      # processes of one job may all build it at once
    with open(path, "rb") as source, open(partial, "wb") as index:
        source.seek(max(0, stat.st_size - 4096))
        content = source.tell() + len(source.read().rstrip())       # blank last lines: no samples
        source.seek(0)
        index.write(header.tobytes())
        begins, at = np.zeros(1, np.int64), 0
        while chunk := source.read(1 << 24):
            index.write(begins[begins < content].tobytes())
            begins = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (at + 1)
            at += len(chunk)
        index.write(begins[begins < content].tobytes())
    os.replace(partial, place)
    return place


# ---- order of visits

MASK64 = (1 << 64) - 1


def mix(*numbers):
    """A 64-bit hash of integers (splitmix64 chained): the source of every keyed random choice."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def shuffled(i, n, seed):
    """The i-th element of a pseudo-random permutation of range(n), without a list of it.

    A Feistel network permutes the smallest even number of bits that holds n; walking its cycle
    until the value falls below n permutes range(n). O(1) memory, under four walks on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for step in range(4):
            left, right = right, left ^ (mix(seed, step, right) & low)
        i = left << half | right
        if i < n:
            return i


class Batches(torch.utils.data.Sampler):
    """The batch_sampler of a run: lists of (index, draw), a function of (seed, step, rank) only.

    n: samples in the manifest. batch: clips of one optimiser step over all processes together.
    Step t uses the draws t*batch .. (t+1)*batch - 1; draw d visits sample `shuffled(d % n)` of the
    permutation of epoch d // n. Rank r of `world` takes the r-th contiguous part of a step's draws,
    cut into `accumulate` contiguous micro-batches, each one list. Hence any number of processes
    sees the same batches, and starting at step `start` replays nothing and skips nothing.
    steps: where the run ends, not how many are left. DataError if `batch` does not divide evenly.
    """

    def __init__(self, n, batch, seed, rank=0, world=1, start=0, accumulate=1, steps=1):
        if batch % (world * accumulate):
            raise DataError(f"a batch of {batch} clips does not divide among {world} processes x "
                            f"{accumulate} micro-batches; take a multiple of {world * accumulate}")
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.start, self.accumulate, self.steps = start, accumulate, steps

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        micro = self.batch // (self.world * self.accumulate)
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * micro * self.accumulate
            for begin in range(first, first + micro * self.accumulate, micro):
                yield [(self.index(draw), draw) for draw in range(begin, begin + micro)]

    def index(self, draw):
        """The sample that a draw visits."""
        return shuffled(draw % self.n, self.n, mix(self.seed, draw // self.n))


# ---- frames

def sample_frames(n, frames, train, view=0, views=1):
    """TSN sparse sampling, Sec. 3.1: one frame of each of `frames` equal segments of n frames.

    train: uniformly at random within its segment (torch's global generator), every frame possible.
    Otherwise the segment's centre or, for view v of K (the 3 x 3 frames of Tab. 2 to 4), the centre
    of the segment's v-th K-th. A clip of fewer than `frames` frames repeats some, in order.
    n >= 1. Returns `frames` ascending indices.
    """
    if n < 1:
        raise ValueError(f"cannot sample {frames} frames from a clip of {n}")
    picked = []
    for i in range(frames):
        low = i * n // frames
        length = max((i + 1) * n // frames - low, 1)
        offset = int(torch.randint(length, ())) if train else length * (2 * view + 1) // (2 * views)
        picked.append(low + offset)
    return picked


IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# A frame of these that no other frame refers to is known by its header and may be left undecoded.
SKIPPABLE = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
WHOLE_FROM_FIRST = {"gif", "apng"}      # each frame is painted over the last, whatever its flags
# PyAV before 19 refuses titles that are not UTF-8 unless told; 19 has no such argument.
OPEN = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
TRUNCATED = "the file is truncated or damaged; fetch or encode it again"


class _NoPlan(Exception):
    """The container's times do not tell where its frames are: try another way."""


def decode(path, pick, short_side=None, start=None, end=None):
    """Exactly the chosen frames of a clip, decoding as little else as their codec allows.

    path: a video, an image (one frame) or a folder of frames in the order of their names.
    pick: function of n, the frames that there are, to the list of wanted indices, repeats allowed.
    start, end: seconds after the first frame; the n frames are those shown in [start, end).
    Returns uint8 RGB (S, 3, h, w) in the order picked, upright, the shorter side scaled to
    `short_side` pixels (None: as stored) with the proportions kept. Raises Unreadable with the
    reason. Each pixel equals the full decode's: tests compare them for nine codecs.
    """
    try:
        if os.path.isdir(path):
            return _decode_folder(path, pick, short_side, start, end)
        for plan in (_even_times, _packet_times):
            try:
                return _decode_planned(path, plan, pick, short_side, start, end)
            except (_NoPlan, av.FFmpegError):
                continue
        # The plain decode from the first frame is the definition of a clip's frames: where plans
        # fail it either succeeds or says what is wrong with the file.
        return _decode_serially(path, pick, short_side, start, end)
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(path, f"cannot be decoded ({reason}); replace or re-encode it") from error


def _open(path):
    if not os.path.exists(path):
        raise Unreadable(path, "no such file")
    if os.path.getsize(path) == 0:
        raise Unreadable(path, "the file is empty")
    return av.open(str(path), **OPEN)


def _video_stream(container, path):
    """The first real video stream, set to decode on one thread."""
    for stream in container.streams.video:
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if not cover and container.format.name != "tty":       # FFmpeg renders text files as video
            context = stream.codec_context
            if context is None:
                raise Unreadable(path, "no decoder for its video codec; re-encode it as H.264")
            context.thread_count = 1            # the loader's workers are the parallelism
            return stream
    raise Unreadable(path, "has no video stream")


class _Scaler:
    """Frames to upright uint8 RGB (3, h, w), all of the size that the first one gets."""

    def __init__(self, short_side):
        self.short_side, self.size, self.reformatter = short_side, None, VideoReformatter()

    def pixels(self, frame):
        if self.size is None:
            short = min(frame.width, frame.height)
            scale = (self.short_side or short) / short
            self.size = round(frame.width * scale), round(frame.height * scale)
        rgb = self.reformatter.reformat(frame, *self.size, format="rgb24",
                                        interpolation=Interpolation.BILINEAR, threads=1)
        upright = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90))
        return torch.from_numpy(upright).permute(2, 0, 1)


def _decode_planned(path, plan, pick, short_side, start, end):
    """Learn the frames' times by `plan`, then decode from each keyframe to its last target."""
    scaler, found = _Scaler(short_side), {}
    with _open(path) as container:
        stream = _video_stream(container, path)
        entries = stream.index_entries
        if len(entries) and entries[-1].pos + entries[-1].size > os.path.getsize(path):
            raise Unreadable(path, TRUNCATED)
        times, keys = plan(container, stream, path, start, end)
        targets = [times[k] for k in pick(len(times))]
        for key, wanted in _runs(sorted(set(targets)), keys):
            container.seek(key, stream=stream)
            damaged = False
            for frame in _decode_run(container, stream, wanted):
                damaged |= frame.is_corrupt     # and what is predicted from it, to the run's end
                if frame.pts in wanted:
                    if damaged:
                        raise _NoPlan
                    found[frame.pts] = scaler.pixels(frame)
    if len(found) < len(set(targets)):
        raise _NoPlan
    return torch.stack([found[target] for target in targets])


def _even_times(container, stream, path, start, end):
    """(times, keys) of frames at an even rate, from the sample table of an MP4, reading no packet.

    The table holds decoding times; where they are even so are the times of presentation, a shift
    later. Should a file be odd enough to differ, no frame has the time sought and the plan fails.
    Against `_packet_times` it saves 1 % of a clip's time at a keyframe each 250 frames, 12 % at 30
    and a quarter at 8.
    """
    entries = list(stream.index_entries)
    if (start is not None or end is not None or not entries or len(entries) != stream.frames
            or _guessed_times(container, stream)):
        raise _NoPlan
    decoded = np.array([entry.timestamp for entry in entries])
    if len(set(np.diff(decoded).tolist())) > 1 or any(entry.is_discard for entry in entries):
        raise _NoPlan
    times = (decoded - decoded[0] + (stream.start_time or 0)).tolist()
    return times, [time for time, entry in zip(times, entries) if entry.is_keyframe]


def _packet_times(container, stream, path, start, end):
    """(times, keys): ascending pts of the window's frames and of the keyframes they start from.

    From packet headers, nothing decoded: exact for any frame rate and any container with pts.
    """
    if _guessed_times(container, stream):
        raise _NoPlan
    origin, second = stream.start_time or 0, 1 / float(stream.time_base)
    low, high = (None if t is None else origin + t * second for t in (start, end))
    if low is not None:
        container.seek(int(low), stream=stream)
    times, keys = [], []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise Unreadable(path, TRUNCATED)
        if packet.size == 0:
            continue                            # the empty packet that ends the stream
        if packet.pts is None:
            raise _NoPlan
        if high is not None and packet.dts is not None and packet.dts >= high:
            break
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:               # decoded but outside an MP4's edit list
            times.append(packet.pts)
    late = low is not None and keys and keys[0] > max(low, origin)
    if late or not keys or not times or len(set(times)) < len(times):
        raise _NoPlan
    if low is None and high is None and _ends_early(container, (max(times) - origin) / second):
        raise Unreadable(path, TRUNCATED)
    times.sort()
    if stream.codec_context.name in WHOLE_FROM_FIRST:
        keys = keys[:1]
    first, last = _window(times, low, high, path)
    return times[first:last], sorted(keys)


def _ends_early(container, video_seconds):
    """Whether no stream of a Matroska file reaches the duration in its header: it was cut off."""
    promised = (container.duration or 0) / av.time_base
    if not container.format.name.startswith("matroska") or video_seconds > 0.9 * promised - 1:
        return False
    container.seek(container.start_time or 0)       # a sound may go on after the last picture
    return all(packet.pts is None or float(packet.pts * packet.time_base) < 0.9 * promised - 1
               for packet in container.demux())


def _guessed_times(container, stream):
    """Whether pts are made up: AVI stores none, which shows where frames are reordered."""
    return container.format.name == "avi" and stream.codec_context.has_b_frames


def _window(times, low, high, path):
    """(first, last) of the times in [low, high), or of the one on display at `low` if none is."""
    first = 0 if low is None else bisect.bisect_left(times, low)
    last = len(times) if high is None else bisect.bisect_left(times, high)
    if first >= last and 0 < first < len(times):
        first, last = first - 1, first
    if first >= last:
        raise Unreadable(path, "no frame lies between the sample's start and end; check them")
    return first, last


def _runs(targets, keys):
    """(keyframe, targets it serves) for ascending targets: a seek wherever a keyframe lies between.

    A run stops at its last target, so a seek never costs a decoded frame and always saves some.
    """
    runs = []
    for target in targets:
        key = keys[max(bisect.bisect_right(keys, target) - 1, 0)]
        if runs and key <= runs[-1][1][-1]:
            runs[-1][1].append(target)
        else:
            runs.append((key, [target]))
    return runs


def _decode_run(container, stream, wanted):
    """Yield frames to the last `wanted` pts, from the keyframe at which the container stands.

    Frames that nothing refers to are skipped unless wanted, which changes no pixel of the rest.
    """
    context, first, missing = stream.codec_context, None, set(wanted)
    for packet in container.demux(stream):
        if packet.size == 0 or not missing:
            break
        if first is None:
            if not packet.is_keyframe:
                continue
            if packet.pts is None or packet.pts > wanted[0]:
                raise _NoPlan                  # the seek landed late
            first = packet.pts
        elif packet.pts < first:
            continue        # an open GOP's leading picture refers to frames before the keyframe
        skip = context.name in SKIPPABLE and packet.pts not in missing
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        missing.discard(packet.pts)
        yield from context.decode(packet)
    # Flushing hands out what the decoder holds back for reordering, without decoding further.
    yield from context.decode(None)


def _every_frame(path):
    """Yield (frame, seconds, damaged) of a clip in order, each decoded."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        guessed = _guessed_times(container, stream)
        rate = float(stream.average_rate or 1)
        damaged = False
        for i, frame in enumerate(container.decode(stream)):
            damaged = frame.is_corrupt or damaged and not frame.key_frame    # predicted from damage
            yield frame, i / rate if guessed or frame.pts is None else float(frame.time), damaged


def _decode_serially(path, pick, short_side, start, end):
    """Decode from the first frame, twice: to count the frames, then to keep those picked."""
    seconds = [second for _, second, _ in _every_frame(path)]
    if not seconds:
        raise Unreadable(path, "holds no frame; the file is truncated or not a video")
    low, high = (None if t is None else seconds[0] + t for t in (start, end))
    first, last = _window(seconds, low, high, path)
    targets = [first + k for k in pick(last - first)]
    scaler, found = _Scaler(short_side), {}
    for i, (frame, second, damaged) in enumerate(_every_frame(path)):
        if i in targets:
            if damaged:
                raise Unreadable(path, f"damaged around {second:.2f} s; replace or re-encode it")
            found[i] = scaler.pixels(frame)
        if i >= max(targets):
            break
    return torch.stack([found[target] for target in targets])


def _decode_folder(path, pick, short_side, start, end):
    """Frames stored as images of a folder, in the order of their names (2.jpg before 10.jpg)."""
    if start is not None or end is not None:
        raise Unreadable(path, "a folder of frames has no times; drop start and end")
    names = [name for name in os.listdir(path) if Path(name).suffix.lower() in IMAGES]
    names.sort(key=lambda name: [int(part) if part.isdigit() else part
                                 for part in re.split(r"(\d+)", name)])
    if not names:
        raise Unreadable(path, f"the folder holds no image ({', '.join(sorted(IMAGES))})")
    scaler, targets = _Scaler(short_side), pick(len(names))
    found = {}
    for k in set(targets):
        frame, _, _ = next(_every_frame(os.path.join(path, names[k])))
        found[k] = scaler.pixels(frame)
    return torch.stack([found[target] for target in targets])


def short_side(size):
    """Pixels that a clip's shorter side is decoded to before a crop of `size`: 268 for 224."""
    return int(1.2 * size)


def augment(video, size, train, rand_augment=False, flip=False):
    """Crop to size x size, alike for all frames: random in training, else the centre.

    video: uint8 (..., 3, h, w) with h, w >= size. rand_augment: two operations of magnitude 9
    before the crop; flip: left to right with probability 0.5; both in training only, as in the
    release. Returns uint8 (..., 3, size, size). Normalisation happens on the model's device.
    """
    if not train:
        return v2.functional.center_crop(video, [size, size])
    steps = [v2.RandAugment()] if rand_augment else []
    steps += [v2.RandomCrop(size)] + ([v2.RandomHorizontalFlip()] if flip else [])
    return v2.Compose(steps)(video)


def draw_boxes(video, boxes):
    """VCR, Fig. 5: outline each identity's boxes in its own colour. uint8 (S, 3, h, w), same out.

    boxes: [[identity, x0, y0, x1, y1], ...] in pixels of the frames. The colour depends on nothing
    but the identity's number: hues a golden section apart, so that any few differ.
    """
    if not boxes:
        return video
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.618034 * identity % 1, 1, 1))
               for identity, *_ in boxes]
    corners = torch.tensor([corners for _, *corners in boxes], dtype=torch.float32)
    width = max(2, min(video.shape[2:]) // 100)
    return torch.stack([draw_bounding_boxes(frame, corners, colors=colours, width=width)
                        for frame in video])


def names_sides(sample):
    """Whether any words of a sample say left or right, so that its clip must not be flipped."""
    words = [sample.get(field) for field in ("text", "texts", "captions", "question", "options",
                                             "answer")]
    return re.search(r"\b(left|right)", json.dumps(words).lower()) is not None


# ---- words

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Tokenizer:
    """BERT's tokenisation (lower case, accents stripped, WordPiece) over `tokenizers`.

    Attributes: pad_id, unk_id, cls_id, sep_id, mask_id, vocab_size, `ordinary` (int64, the ids that
    are words or pieces, not [specials] or [unusedN]) and `pieces` (the set of ids of '##' pieces).
    """

    def __init__(self, words):
        words.no_truncation()
        words.no_padding()                      # what a tokenizer.json may carry is decided here
        self.words = words
        missing = [token for token in SPECIALS if words.token_to_id(token) is None]
        if missing:
            raise DataError(f"the vocabulary lacks {', '.join(missing)}; give one made for BERT")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            words.token_to_id(token) for token in SPECIALS)
        vocabulary = words.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.ordinary = torch.tensor(sorted(
            i for token, i in vocabulary.items() if not re.fullmatch(r"\[\w+\]", token)))
        self.pieces = {i for token, i in vocabulary.items() if token.startswith("##")}

    @staticmethod
    def load(name):
        """A local vocab.txt or tokenizer.json, else a Hugging Face name, fetched. DataError."""
        path = Path(name)
        try:
            if not path.is_file() and path.suffix in (".txt", ".json"):
                raise FileNotFoundError("no such file")         # a file's name: not worth fetching
            if not path.is_file():
                words = WordPieces.from_pretrained(str(name))
            elif path.suffix == ".json":
                words = WordPieces.from_file(str(path))
            else:
                words = _bert(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
        except Exception as error:         # tokenizers raises bare Exception, whatever went wrong
            raise DataError(f"vocabulary {str(name)!r} is no readable file and cannot be fetched "
                            f"({str(error).splitlines()[0]:.120}); with no network, give the path "
                            "of a local vocab.txt or tokenizer.json") from None
        return Tokenizer(words)

    @staticmethod
    def train(texts, vocab_size):
        """A WordPiece vocabulary of the texts' own words, at most `vocab_size` tokens.

        The most frequent words whole, and every letter and '##letter' met to spell the others. (The
        trainer of `tokenizers` breaks ties by hash order: no two runs give the same vocabulary.)
        """
        words = _bert(models.WordPiece(unk_token="[UNK]"))
        count = collections.Counter(
            word for text in texts for word, _ in words.pre_tokenizer.pre_tokenize_str(
                words.normalizer.normalize_str(text)))
        letters = sorted({letter for word in count for letter in word})
        spelling = dict.fromkeys(SPECIALS + letters + ["##" + letter for letter in letters])
        frequent = sorted(count, key=lambda word: (-count[word], word))
        tokens = list(spelling) + [word for word in frequent if word not in spelling]
        vocabulary = {token: i for i, token in enumerate(tokens[:max(vocab_size, len(spelling))])}
        return Tokenizer(_bert(models.WordPiece(vocabulary, unk_token="[UNK]")))

    def to_json(self):
        """The whole tokenizer as one string, which a checkpoint carries."""
        return self.words.to_str()

    @staticmethod
    def from_json(text):
        """The tokenizer that `to_json` wrote."""
        return Tokenizer(WordPieces.from_str(text))

    def __len__(self):
        return self.vocab_size

    def encode(self, text, max_len, first=None):
        """Ids of [CLS] text [SEP], or [CLS] first [SEP] text [SEP], at most max_len.

        Where they are too many, `first` (the question) loses its last words; `text` (the answer,
        to be told from others) only where it is too long alone.
        """
        body = self.words.encode(text, add_special_tokens=False).ids
        head = self.words.encode(first, add_special_tokens=False).ids if first else []
        room = max_len - (3 if head else 2)
        body = body[:room]
        head = head[:room - len(body)]
        return [self.cls_id] + (head + [self.sep_id] if head else []) + body + [self.sep_id]

    def decode(self, ids):
        """The words of ids, specials left out."""
        return self.words.decode(list(ids))


def _bert(model):
    """`tokenizers` around a WordPiece model, as bert-base-uncased has it but for the specials."""
    words = WordPieces(model)
    words.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    return words


def mask_tokens(ids, tokenizer, whole_words=False, p=0.15):
    """MLM, Sec. 3.3: each word token is chosen with probability p, to be told from its context.

    ids: list of token ids. Of those chosen 80 % become [MASK], 10 % a random word and 10 % stay;
    [CLS], [SEP] and [PAD] are never chosen. whole_words: '##' pieces are chosen with their head.
    Returns (masked ids, positions chosen, original ids there). Draws from torch's global generator.
    """
    fixed = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id}
    masked, positions, chosen = list(ids), [], False
    for position, token in enumerate(ids):
        if token in fixed:
            continue
        if not (whole_words and token in tokenizer.pieces and position):
            chosen = torch.rand(()) < p
        if chosen:
            positions.append(position)
            fate = torch.rand(())
            if fate < 0.8:
                masked[position] = tokenizer.mask_id
            elif fate < 0.9:
                ordinary = tokenizer.ordinary
                masked[position] = int(ordinary[torch.randint(len(ordinary), ())])
    return masked, positions, [ids[position] for position in positions]


def vtm_pairs(captions):
    """VTM, Sec. 3.3: which clip's video each text of a group meets, and whether it is its own.

    captions: one hashable per clip. Each keeps its own video with probability 0.5, else takes that
    of another clip of the group whose caption differs; where all are the same it keeps its own.
    Returns (source, labels): lists of indices into the group and of 1 = match, 0 = mismatch.
    """
    source, labels = [], []
    for i, caption in enumerate(captions):
        others = [j for j, other in enumerate(captions) if other != caption]
        swap = bool(torch.rand(()) < 0.5) and bool(others)
        source.append(others[int(torch.randint(len(others), ()))] if swap else i)
        labels.append(int(not swap))
    return source, labels


# ---- samples and batches

TASKS = "pretrain", "retrieval", "choice", "qa", "probe"
MIN_WINDOW = 4.0        # seconds to which a drawn caption's window is widened, as in the release
MAX_SKIPS = 100         # unreadable lines in a row after which training cannot be meant to go on


def answers_of(paths):
    """The classes that a model learns to answer with, for open-ended QA (Sec. 4.2.1) and probes.

    answers.json beside the first training manifest, which `convert` writes; without one, every
    answer of the manifests, the commonest first.
    """
    listed = Path(paths[0]).parent / "answers.json"
    if listed.is_file():
        return json.loads(listed.read_text(encoding="utf-8"))
    manifest = Manifest(paths)
    count = collections.Counter(manifest[i].get("answer") for i in range(len(manifest)))
    answers = [answer for answer, _ in count.most_common() if isinstance(answer, str)]
    if not answers:
        raise DataError(f'{paths[0]}: no line has words as its "answer"; expected '
                        '{"video": ..., "answer": "a word"}, for open-ended QA a "question" too')
    return answers


class Clips(torch.utils.data.Dataset):
    """A manifest's samples as tensors: `clips[index, draw]`, `draw` keying all randomness.

    manifest: Manifest. task: "pretrain" (caption, and its masked form), "retrieval" (in training
    one caption at random and up to `false_texts` of other lines as options, in evaluation all
    captions), "choice" (options after their question), "qa" (an answer of `answers`), "probe" (a
    class of `answers`). frames: S. image_size: pixels of the crop. views: K temporally different
    draws of S frames in evaluation.
    Items are dicts of "video" uint8 (S, 3, H, W), or (K, S, 3, H, W) if views > 1, "ids" (a list of
    token-id lists), "label", "caption", "index", "draw", "where", "kind", "errors"; to pretrain,
    "mlm" = (masked ids, positions, labels). In training the next readable line stands in for an
    unreadable clip, which "errors" names; in evaluation nothing does: the item is then
    {"index", "draw", "where", "error"}. DataError if a line lacks what the task needs.
    """

    def __init__(self, manifest, tokenizer, task, frames, image_size, max_text_len, train, seed=0,
                 views=1, rand_augment=False, flip=False, whole_word_masking=False, answers=None,
                 false_texts=0):
        if task not in TASKS:
            raise DataError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        self.manifest, self.tokenizer, self.task = manifest, tokenizer, task
        self.frames, self.image_size, self.max_text_len = frames, image_size, max_text_len
        self.train, self.seed, self.views = train, seed, 1 if train else views
        self.rand_augment, self.flip = rand_augment, flip
        self.whole_word_masking, self.false_texts = whole_word_masking, false_texts
        self.labels = {answer: i for i, answer in enumerate(answers or [])}
        self.refused = {}               # index -> reason, of clips that took their reader down

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        index, draw = key if isinstance(key, tuple) else (key, key)
        errors = []
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs too, at a fifth of the cost of a small clip
            torch.default_generator.manual_seed(mix(self.seed, draw))
            while len(errors) < MAX_SKIPS:
                sample = self.manifest[index]
                item = {"index": index, "draw": draw, "where": sample["where"],
                        "options": self.task == "choice" or self.task == "retrieval" and self.train}
                try:
                    if index in self.refused:
                        raise Unreadable(sample["video"], self.refused[index])
                    return {**item, **self._words(sample), "video": self._video(sample),
                            "kind": sample.get("kind"), "errors": errors}
                except Unreadable as error:
                    errors.append(f"{sample['where']}: {error}")
                if not self.train:
                    return {**item, "error": errors[0]}
                index = (index + 1) % len(self.manifest)
        raise DataError(f"{MAX_SKIPS} clips in a row cannot be read, the first: {errors[0]}")

    def _video(self, sample):
        """uint8 ([K,] S, 3, H, W) of a sample, cropped."""
        def pick(n):
            return [k for view in range(self.views)
                    for k in sample_frames(n, self.frames, self.train, view, self.views)]
        side, boxes = short_side(self.image_size), sample.get("boxes")
        video = decode(sample["video"], pick, None if boxes else side,
                       sample.get("start"), sample.get("end"))
        if boxes:                               # in pixels of the stored image: draw, then scale
            video = v2.functional.resize(draw_boxes(video, boxes), side)
        flip = self.flip and not names_sides(sample)
        video = augment(video, self.image_size, self.train, self.rand_augment, flip)
        return video.unflatten(0, (self.views, self.frames)) if self.views > 1 else video

    def _words(self, sample):
        """The token ids and the label of a sample for the task. May set the sample's window."""
        if self.task in ("pretrain", "retrieval"):
            captions = self._captions(sample)
            ids = [self._encode(caption) for caption in captions]
            words = {"ids": ids, "caption": captions[0], "label": 0}
            if self.task == "pretrain":
                words["mlm"] = mask_tokens(ids[0], self.tokenizer, self.whole_word_masking)
            elif self.train:
                words["ids"] += [self._encode(text) for text in self._false_texts(sample)]
            return words
        if self.task == "choice":
            options, question = self._need(sample, "options"), sample.get("question")
            answer = sample.get("answer")
            if answer in options:
                answer = options.index(answer)
            if not isinstance(answer, int) or not 0 <= answer < len(options):
                raise DataError(f'{sample["where"]}: "answer" is {answer!r}; expected an index '
                                f"into the {len(options)} options, from 0, or one of them")
            return {"ids": [self._encode(option, question) for option in options], "label": answer}
        text = self._need(sample, "question") if self.task == "qa" else ""
        return {"ids": [self._encode(text)], "label": self.labels.get(sample.get("answer"), -1)}

    def _captions(self, sample):
        """The captions of a sample to read on this visit: one in training, all in evaluation."""
        if "captions" in sample:
            windows = self._need(sample, "captions")
            start, end, text = windows[int(torch.randint(len(windows), ())) if self.train else 0]
            middle, half = (start + end) / 2, max(end - start, MIN_WINDOW) / 2
            sample["start"], sample["end"] = max(middle - half, 0), middle + half
            return [text]
        texts = sample.get("texts") or [self._need(sample, "text")]
        if self.train or self.task == "pretrain":
            return [texts[int(torch.randint(len(texts), ())) if self.train else 0]]
        return texts

    def _false_texts(self, sample):
        """Captions of random other lines, for ranking (Sec. 4.2.2); none that is the clip's own."""
        drawn = [int(torch.randint(len(self.manifest), ())) for _ in range(self.false_texts)]
        texts = [self._captions(self.manifest[index])[0] for index in drawn]
        own = texts_of(sample)
        return [text for text in texts if text not in own]

    def _need(self, sample, field):
        if not sample.get(field):
            raise DataError(f'{sample["where"]}: task {self.task} needs "{field}", got '
                            f"{sample.get(field)!r}")
        return sample[field]

    def _encode(self, text, first=None):
        return self.tokenizer.encode(text, self.max_text_len, first)


def collate(items, tokenizer, max_text_len, group=None, seed=0):
    """Items of Clips to one batch: B clips, m tokens of the longest text rounded up to 8.

    "video" uint8 (B, S, 3, H, W) or (B, K, S, 3, H, W); "text_ids" int64, "text_mask" bool (B, m);
    "label", "index" int64 (B,); "where", "kind" lists of B; "errors" list of strings; "unreadable"
    the indices of items that could not be read, which are left out of all else (B may then be 0,
    and the only tensor "index").
    Choice, and retrieval in training: "text_ids", "text_mask" (B, O, m), "option_mask" bool (B, O),
    False where a clip has fewer than O options. Retrieval in evaluation: "text_ids", "text_mask"
    (T, m) and "text_clip" int64 (T,), the row of each caption's clip.
    Pre-training: "mlm_ids" (B, m), "mlm_where" (M,) positions in the flattened (B*m), "mlm_labels"
    (M,), M padded to a multiple of 32 by where 0, label -100; "vtm_source", "vtm_labels" (B,) drawn
    within consecutive groups of `group` clips (default: all), by (seed, the group's first draw).
    """
    readable = [item for item in items if "error" not in item]
    batch = {"index": torch.tensor([item["index"] for item in readable], dtype=torch.int64),
             "where": [item["where"] for item in readable],
             "kind": [item["kind"] for item in readable],
             "errors": [error for item in items
                        for error in item.get("errors", [item.get("error")])],
             "unreadable": [item["index"] for item in items if "error" in item]}
    if not readable:
        return batch
    batch["video"] = torch.stack([item["video"] for item in readable])
    batch["label"] = torch.tensor([item["label"] for item in readable])
    counts = torch.tensor([len(item["ids"]) for item in readable])
    texts = [ids for item in readable for ids in item["ids"]]
    m = min(-(-max(map(len, texts)) // 8) * 8, max_text_len)
    ids = _pad(texts, m, tokenizer.pad_id)
    mask = _pad([[1] * len(text) for text in texts], m, 0).bool()
    if readable[0]["options"]:
        there = torch.arange(int(counts.max())) < counts[:, None]                   # (B, O)
        batch["option_mask"] = there
        batch["text_ids"] = torch.full((*there.shape, m), tokenizer.pad_id)
        batch["text_mask"] = torch.zeros(*there.shape, m, dtype=torch.bool)
        batch["text_ids"][there], batch["text_mask"][there] = ids, mask
        return batch
    batch["text_ids"], batch["text_mask"] = ids, mask
    batch["text_clip"] = torch.repeat_interleave(counts)
    if "mlm" in readable[0]:
        batch.update(_objectives(readable, m, tokenizer.pad_id, group or len(readable), seed))
    return batch


def _objectives(items, m, pad_id, group, seed):
    """What MLM and VTM add to a batch of `items` with m tokens a text: see collate."""
    where = [row * m + position for row, item in enumerate(items) for position in item["mlm"][1]]
    labels = [label for item in items for label in item["mlm"][2]]
    padding = -len(where) % 32 if where else 32
    source, matches = [], []
    for begin in range(0, len(items), group):
        clips = items[begin:begin + group]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(seed, clips[0]["draw"], 1))  # 1: not its own
            chosen, match = vtm_pairs([item["caption"] for item in clips])
        source += [begin + i for i in chosen]
        matches += match
    return {"mlm_ids": _pad([item["mlm"][0] for item in items], m, pad_id),
            "mlm_where": torch.tensor(where + [0] * padding),
            "mlm_labels": torch.tensor(labels + [-100] * padding),
            "vtm_source": torch.tensor(source), "vtm_labels": torch.tensor(matches)}


def _pad(rows, length, value):
    """Lists of unequal length as int64 (len(rows), length), filled up with `value`."""
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])


# ---- readers that survive their files

def guarded(function, tasks, workers, timeout):
    """Yield (task, result, reason) of function(task) in processes that may die or hang, unordered.

    function and tasks are pickled. timeout: seconds a task may take before its process is killed.
    reason is None, or what became of the process or the error raised, result then being None:
    nothing that a file does to its reader stops the others.
    """
    # Fresh processes, without our threads and locks. A fork server imports torch once for them all.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "tokenizers", "av"])
    tasks, staff = iter(tasks), {}
    try:
        while True:
            while len(staff) < workers and (task := next(tasks, None)) is not None:
                pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                staff[pipe] = process, task, None       # no deadline: it has yet to import torch
            if not staff:
                return
            deadlines = [deadline for _, _, deadline in staff.values() if deadline]
            ready = multiprocessing.connection.wait(
                staff, max(0, min(deadlines) - time.monotonic()) if deadlines else None)
            for pipe, (process, task, deadline) in list(staff.items()):
                if pipe in ready:
                    try:
                        answer = pipe.recv()
                    except EOFError:
                        process.join()
                        del staff[pipe]
                        yield task, None, f"took its reader down (exit code {process.exitcode})"
                        continue
                    if answer:                          # else it says that it is ready to begin
                        yield task, *answer
                        task = next(tasks, None)
                    if task is None:
                        staff.pop(pipe)[0].kill()
                    else:
                        pipe.send(task)
                        staff[pipe] = process, task, time.monotonic() + timeout
                elif deadline and time.monotonic() >= deadline:
                    staff.pop(pipe)[0].kill()
                    yield task, None, f"took longer than {timeout:g} s to read"
    finally:
        for process, *_ in staff.values():
            process.kill()


def _serve(function, pipe):
    """A process of `guarded`: say ready, then answer task after task with (result, reason)."""
    pipe.send(None)
    while True:
        task = pipe.recv()
        try:
            answer = function(task), None
        except Exception as error:          # reported: the parent names it beside its task
            answer = None, str(error)
        pipe.send(answer)


def load(clips, keys, collate, workers, timeout=120, **options):
    """Batches of `clips` for the lists of keys in `keys`, in order, by processes that may die.

    As a DataLoader with those keys as batch_sampler, except that where a worker dies or is silent
    for `timeout` seconds the clips under way are read again one by one, each in a process of its
    own; those at fault are refused from then on as any unreadable clip is, and the loader goes on
    where it was. options: further arguments of DataLoader.
    """
    keys, pending = iter(keys), collections.deque()

    def feed(again):
        for batch in itertools.chain(again, keys):
            pending.append(batch)
            yield batch

    while True:
        again = list(pending)
        pending.clear()
        loader = torch.utils.data.DataLoader(
            clips, batch_sampler=feed(again), collate_fn=collate, num_workers=workers,
            timeout=timeout if workers else 0, **options)
        try:
            for batch in loader:
                pending.popleft()
                yield batch
            return
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "timed out" not in str(error):
                raise
        suspects = [key for batch in pending for key in batch]
        for key, _, reason in guarded(clips.__getitem__, suspects, max(workers, 1), timeout):
            if reason:
                clips.refused[key[0] if isinstance(key, tuple) else key] = reason


# ---- the toy set

SHAPES = "square", "ring"
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
LIGHTS = (200, 60, 60), (60, 180, 60), (60, 80, 200)
ORDERS = "green", "blue"                         # what red turns into: the way the light cycles
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEMPLATES = {
    "light": ("{colour} {shape} while red turns {order}",
              "red turns {order} around {colour} {shape}"),
    "motion": ("{colour} {shape} that moves {motion}", "moving {motion} a {colour} {shape}")}
SPLITS = {"train": 2000, "val": 200, "test": 400}
SIDE, TOY_FRAMES = 80, 12
TOY_X264 = {"preset": "veryfast", "qp": "15", "g": "1"}    # each frame alone, at one quantiser


@dataclass(frozen=True)
class ToyClip:
    """What one toy clip shows. `twin` shows the same frames in reverse."""
    event: str          # "light": the light cycles, the object stays; "motion": the other way round
    shape: str
    colour: str
    motion: str
    order: int          # index into ORDERS
    first: int          # light of the first third, index into LIGHTS
    template: int
    radius: float       # of the object, pixels
    speed: float        # pixels per frame
    centre: tuple       # (x, y) of the object in the middle of the clip, pixels
    gain: float         # brightness of the lights

    def twin(self):
        """The clip that the reversed frames show: the other order, or the opposite motion."""
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[self.motion]
        last = self.first
        if self.event == "light":
            last = (self.first + (2 if self.order == 0 else -2)) % 3
        return replace(self, motion=opposite, order=1 - self.order, first=last)

    def caption(self, **other):
        """The clip's caption in its own wording; keyword arguments change what it says."""
        said = replace(self, **other)
        return TEMPLATES[said.event][said.template].format(
            colour=said.colour, shape=said.shape, motion=said.motion, order=ORDERS[said.order])


def toy_frames(clip):
    """The frames of a ToyClip, uint8 (12, 80, 80, 3): three thirds of four frames."""
    t = np.arange(TOY_FRAMES)
    cycles = clip.event == "light"
    travel = (t - (TOY_FRAMES - 1) / 2)[:, None] * (0 if cycles else clip.speed)
    pixel = np.arange(SIDE) + 0.5
    (right, down), (centre_x, centre_y) = MOTIONS[clip.motion], clip.centre
    x = (pixel - centre_x - travel * right).astype(np.float32)[:, None, :]
    y = (pixel - centre_y - travel * down).astype(np.float32)[:, :, None]
    r, far = clip.radius, np.maximum(abs(x), abs(y))
    inside = (far < r) & ((far > 0.6 * r) | (clip.shape == "square"))
    thirds = cycles * (t // (TOY_FRAMES // 3)) * (1 if clip.order == 0 else -1)
    frames = np.empty((TOY_FRAMES, SIDE, SIDE, 3), np.uint8)
    frames[:] = (np.array(LIGHTS)[(clip.first + thirds) % 3] * clip.gain)[:, None, None]
    frames[inside] = COLOURS[clip.colour]
    return frames


def write_clip(path, frames, fps, options):
    """H.264 from uint8 (n, h, w, 3), yuv420p, x264 `options` as a dict of strings."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def toy(root="data/toy", seed=0):
    """The embedded data set, generated once: 2600 clips of 80 x 80 px, 3 s at 4 fps. Returns root.

    An object (shape, colour) stands still while the light that fills the frame cycles through
    three colours one way or the other; or it moves one way in a still light, which a small model
    learns more slowly. Clips come in twins of the same frames in reverse order, so that no multiset
    of frames tells order or motion. Every frame is coded alone at a fixed quantiser: a decoded
    clip's frames reversed are its twin's, bit for bit. Per split: SPLIT.jsonl (captions),
    choice_SPLIT (kinds "appearance", "order", "motion"; the last two between opposites), qa_SPLIT,
    probe_SPLIT, and retrieval_SPLIT (the first clip of each meaning with both its wordings).
    Written beside and renamed, so that a folder of the name is complete. DataError if `root` is
    something else.
    """
    root, about = Path(root), json.dumps({"seed": seed, "clips": SPLITS, "version": 2}) + "\n"
    if (root / "toy.json").is_file() and (root / "toy.json").read_text() == about:
        return root
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: exists and is another toy set or none; give another folder or "
                        "remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    (partial / "clips").mkdir()
    for split, count in SPLITS.items():
        draw = random.Random(f"{seed} {split}")
        lines = {"": [], "choice_": [], "qa_": [], "probe_": [], "retrieval_": []}
        told = set()
        for i in range(count):
            clip = _toy_clip(draw) if i % 2 == 0 else clip.twin()
            video = f"clips/{split}_{i:04}.mp4"
            write_clip(partial / video, toy_frames(clip), 4, TOY_X264)
            for name, samples in _toy_samples(clip, draw).items():
                lines[name] += [json.dumps({"video": video, **sample}) for sample in samples]
            texts = [clip.caption(template=wording) for wording in range(2)]
            if texts[0] not in told:
                told.add(texts[0])
                lines["retrieval_"].append(json.dumps({"video": video, "texts": texts}))
            if (i + 1) % 100 == 0:
                print(f"\rtoy clips to {root}: {split} {i + 1}/{count}  ", end="", file=sys.stderr)
        for name, rows in lines.items():
            (partial / f"{name}{split}.jsonl").write_text("\n".join(rows) + "\n")
    print(file=sys.stderr)
    (partial / "toy.json").write_text(about)
    partial.chmod(0o755)
    try:
        os.rename(partial, root)
    except OSError:
        if not (root / "toy.json").is_file():       # another process of the job was faster: use its
            raise
        shutil.rmtree(partial)
    return root


def _toy_clip(draw):
    return ToyClip(event="light" if draw.random() < 0.85 else "motion", shape=draw.choice(SHAPES),
                   colour=draw.choice(list(COLOURS)), motion=draw.choice(list(MOTIONS)),
                   order=draw.randrange(2), first=draw.randrange(3), template=draw.randrange(2),
                   radius=draw.uniform(13, 16), speed=draw.uniform(2, 3),
                   centre=(draw.uniform(36, 44), draw.uniform(36, 44)),
                   gain=draw.uniform(0.85, 1.1))


def _toy_samples(clip, draw):
    """Manifest lines of one clip: {prefix of the manifest's name: [sample without its video]}."""
    others = [clip.caption(shape=shape, colour=colour) for shape in SHAPES for colour in COLOURS
              if (shape, colour) != (clip.shape, clip.colour)]
    asked = [("what shape is it?", clip.shape, "shape"),
             ("what colour is it?", clip.colour, "colour")]
    wrong = {"appearance": draw.sample(others, 3)}
    if clip.event == "light":
        wrong["order"] = [clip.caption(order=1 - clip.order)]
        asked.append(("what does red turn into?", ORDERS[clip.order], "order"))
    else:
        wrong["motion"] = [clip.caption(motion=clip.twin().motion)]
        asked.append(("which way does it move?", clip.motion, "motion"))
    choices = []
    for kind, options in wrong.items():
        answer = draw.randrange(len(options) + 1)
        choices.append({"options": options[:answer] + [clip.caption()] + options[answer:],
                        "answer": answer, "kind": kind})
    return {"": [{"text": clip.caption()}], "choice_": choices,
            "qa_": [{"question": q, "answer": a, "kind": k} for q, a, k in asked],
            "probe_": [{"answer": clip.caption(template=0)}]}


# ---- the data doctor, and the stopwatch

def examine(task):
    """What is wrong with (line, video, start, end, frames): a reason, or None. Run by `check`."""
    _, video, start, end, frames = task
    counted = []
    decode(video, lambda n: counted.append(n) or sample_frames(n, frames, False), 64, start, end)
    return f"has {counted[-1]} frames, fewer than {frames}" if counted[-1] < frames else None


def texts_of(sample):
    """Every text that a sample may be read with."""
    texts = [sample[field] for field in ("text", "question") if field in sample]
    texts += [text for _, _, text in sample.get("captions", [])]
    return texts + sample.get("texts", []) + sample.get("options", [])


def check(manifest, workers=2, timeout=60, frames=3, tokenizer=None, max_text_len=40):
    """The data doctor: decode every sample, each under a time limit; write NAME.clean.jsonl.

    Prints and returns {fault: [file:line and detail]}. Clips that are missing, unreadable, hang or
    kill their reader, bad lines and samples with an empty text are left out of the clean manifest;
    clips of fewer than `frames` frames, texts of more than max_text_len tokens (words, without a
    tokenizer) and captions that other clips have too are only reported: usable, but to be known.
    """
    source, found, drop, first = Manifest(manifest), collections.defaultdict(list), set(), {}

    def tasks():
        for i in range(len(source)):
            try:
                sample = source[i]
            except DataError as error:
                found["bad line"].append(str(error))
                drop.add(i)
                continue
            where, caption = sample["where"], sample.get("text")
            for text in texts_of(sample):
                if not isinstance(text, str) or not text.strip():
                    found["empty text"].append(where)
                    drop.add(i)
                    continue
                words = tokenizer.encode(text, 10 ** 6) if tokenizer else text.split()
                if len(words) > max_text_len:
                    found["text too long"].append(f"{where}: {text:.60}...")
            if caption and first.setdefault(hash(caption), i) != i:
                found["duplicate caption"].append(
                    f"{where}: as line {first[hash(caption)] + 1}: {caption:.60}")
            yield i, sample["video"], sample.get("start"), sample.get("end"), frames

    began = time.monotonic()
    for done, (task, short, reason) in enumerate(guarded(examine, tasks(), workers, timeout), 1):
        if reason:
            drop.add(task[0])
            kind = "missing file" if reason.endswith("no such file") else "unreadable"
            found[kind].append(f"{source[task[0]]['where']}: {reason}")
        elif short:
            found["short clip"].append(f"{source[task[0]]['where']}: {short}")
        if done % 20 == 0 or done == len(source):
            rate = done / (time.monotonic() - began)
            print(f"\r{done}/{len(source)} samples, {len(drop)} bad, {rate:.0f}/s, "
                  f"{(len(source) - done) / rate:.0f} s left   ", end="", file=sys.stderr)
    print(file=sys.stderr)
    clean = Path(manifest).with_suffix(".clean.jsonl")
    partial = f"{clean}.{os.urandom(4).hex()}"
    with open(manifest, "rb") as lines, open(partial, "wb") as kept:
        kept.writelines(line for i, line in enumerate(lines) if i not in drop and line.strip())
    os.replace(partial, clean)
    for fault, places in sorted(found.items()):
        print(f"{fault}: {len(places)}", *places[:20], sep="\n    ")
        if len(places) > 20:
            print(f"    ... and {len(places) - 20} more")
    print(f"{len(source) - len(drop)} of {len(source)} samples are usable: {clean}")
    return dict(found)


def bench(files, frames=3, side=short_side(224), repeats=5, gpu=400):
    """Clips per CPU-second of `decode`, of decoding every frame, and of decord where installed.

    Each reads the same `frames` random segment frames at the same size from the same files, turn by
    turn. CPU seconds of all threads, not wall time: a loader's workers share their cores. The
    shares of our time come from further turns under a profiler, whose own cost the figures lack.
    gpu: clips per second that one GPU trains on, for the number of cores that feed it.
    """
    readers = {"decode (exact, sparse)": _read_sparsely, "every frame to RGB": _read_everything,
               "every frame to RGB, scaled": partial(_read_everything, scale_all=True)}
    if importlib.util.find_spec("decord"):
        readers["decord, one thread"] = _read_with_decord
    spent = {name: [] for name in readers}
    profile = cProfile.Profile(time.process_time)
    for path in files:
        counted = []
        size = decode(path, lambda n: counted.append(n) or [0], side).shape[2:]
        for turn in range(-1, repeats):                     # turn -1 warms caches up
            picked = sample_frames(counted[-1], frames, True)
            for name in random.sample(list(readers), len(readers)):
                if turn % 3 and name.startswith("every frame"):
                    continue                                # slow, and the same whatever is picked
                began = time.process_time()
                readers[name](path, picked, size)
                if turn >= 0:
                    spent[name].append(time.process_time() - began)
            profile.runcall(_read_sparsely, path, picked, size)
    for name, seconds in spent.items():
        mean = np.mean(seconds)
        print(f"{name:28} {1 / mean:7.2f} clips per CPU-second, {gpu * mean:6.1f} cores feed "
              f"{gpu:g} clips/s, {mean / np.mean(spent['decode (exact, sparse)']):5.2f}x our time")
    profile.create_stats()
    total = collections.Counter()
    for (_, _, name), (_, _, _, cumulative, _) in profile.stats.items():
        part = "seek" if "'seek'" in name else PARTS.get(name)
        total[part] += cumulative if part else 0
    seek, scale = total["seek"] / total["all"], total["scale"] / total["all"]
    print(f"our time: open and seek {seek:.0%}, scale {scale:.0%}, decode {1 - seek - scale:.0%}")


PARTS = {"_read_sparsely": "all", "pixels": "scale", "_open": "seek", "_even_times": "seek",
         "_packet_times": "seek"}                           # function: what `bench` counts it as


def _read_sparsely(path, picked, size):
    decode(path, lambda n: picked, min(size))


def _read_everything(path, picked, size, scale_all=False):
    # The usual ways, with PyAV's defaults: every frame to RGB and some scaled, or all scaled.
    shape = dict(height=size[0], width=size[1]) if scale_all else {}
    with av.open(str(path), **OPEN) as container:
        frames = [frame.to_ndarray(format="rgb24", **shape) for frame in container.decode(video=0)]
    clip = torch.stack([torch.from_numpy(frames[k]).permute(2, 0, 1) for k in picked])
    return clip if scale_all else v2.functional.resize(clip, list(size))


def _read_with_decord(path, picked, size):
    import decord                                           # optional: measured, never needed
    reader = decord.VideoReader(str(path), height=size[0], width=size[1], num_threads=1)
    reader.get_batch(picked).asnumpy()


# ---- data sets: from each original public release to manifests
# A reader yields the samples of one split of a Source: `paths` are the split's annotation files by
# DATASETS, find(names) gives others beside them, clip(name) a clip's path. A sample's "video" is
# the clip's name in the annotations (a list: any of these). test.jsonl is the split of the paper's
# number, also where its owners call it val.

Source = collections.namedtuple("Source", "paths split find clip")


def _records(paths):
    """Objects of .jsonl files, and of .json files that hold an array or one object; .gz too."""
    for path in paths:
        unzip = gzip.open if path.endswith(".gz") else open
        with unzip(path, "rt", encoding="utf-8-sig") as file:
            try:
                if ".jsonl" in os.path.basename(path):
                    yield from (json.loads(line) for line in file if line.strip())
                else:
                    data = json.load(file)
                    yield from data if isinstance(data, list) else [data]
            except (json.JSONDecodeError, EOFError, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: damaged ({error}); download it again") from error


def _rows(paths, columns, header=True):
    """Dicts of .csv and .tsv files; tabs or commas, whichever the first line has. JSON passes too.

    header: `columns` must be in the first line. Without one, lines are plain: by position, and a
    quote is only a character. The authors' own .tsv files are (text, video) below a first line.
    An undecodable byte costs one character, not the data set.
    """
    columns = columns.split()
    for path in paths:
        if re.search(r"\.jsonl?(\.gz)?$", path):
            yield from _records([path])
            continue
        authors = re.search(r"(success_full|DiDeMo_\w+)\.tsv$", path)
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            quoting = csv.QUOTE_MINIMAL if header or authors else csv.QUOTE_NONE
            table = csv.reader(file, delimiter=delimiter, quoting=quoting)
            names = next(table, []) if header or authors else columns
            if authors:
                names = ["text", "video"]
            elif not set(columns) <= set(names):
                raise DataError(f"{path}: its first line is {names}; expected the columns "
                                f"{columns}: is this the original file?")
            yield from (dict(zip(names, cells)) for cells in table if cells)


def _entries(path, chunk=1 << 24):
    """(key, value) pairs of a JSON object too large for memory (caption.json has gigabytes)."""
    key, text, at = re.compile(r'[\s{,]*"([^"]*)"\s*:\s*'), "", 0
    with open(path, encoding="utf-8") as file:
        while more := file.read(chunk):
            text, at = text[at:] + more, 0
            while found := key.match(text, at):
                try:
                    value, at = json.JSONDecoder().raw_decode(text, found.end())
                except json.JSONDecodeError:
                    break                                   # the chunk ends inside the value
                yield found[1], value
    if text[at:].strip() != "}":
        raise DataError(f"{path}: damaged, or its end is missing; download it again")


def _lines(paths):
    """Lines of plain lists, without empty ones and remarks."""
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (line.strip() for line in file if line.strip() and line[0] != "#")


def webvid(source):
    """Pre-training (Sec. 4.1.2): results_2M_{train,val}.csv, m-bain.github.io/webvid-dataset
    (withdrawn in 2024), or the authors' webvid_*_success_full.tsv. Quoted captions hold commas
    and newlines."""
    for row in _rows(source.paths, "videoid page_dir name"):
        yield row if "video" in row else {
            "video": f"{row['page_dir']}/{row['videoid']}", "text": row["name"]}


def howto100m(source):
    """Pre-training: howto100m_captions.zip, di.ens.fr/willow/research/howto100m. One
    <youtube id>.csv a video (start,end,text; no stop words), or caption.json, raw_caption.json
    {id: {start: [], end: [], text: []}}. A line holds a video's windows; a visit draws one."""
    for path in source.paths:
        if path.endswith(".json"):
            for video, c in _entries(path):
                yield {"video": video, "captions": [*zip(c["start"], c["end"], c["text"])]}
        else:
            windows = [(float(row["start"]), float(row["end"]), row["text"])
                       for row in _rows([path], "start end text")]
            yield {"video": os.path.basename(path)[:-4], "captions": windows}


def yttemporal(source):
    """Pre-training of All-in-one*: YT-Temporal-180M, rowanzellers.com/merlot. Gzipped .jsonl
    shards (the paper: the first half), or a .json a video, of info, subtitles and denoised. The
    release draws a random 10-15 s at each visit; _speech_windows cuts such windows once."""
    for video in _records(source.paths):
        clean = " ".join(span["cleanasr"] for span in video.get("denoised", ())).split()
        length = float(video["info"].get("duration") or "inf")
        yield {"video": video["info"]["id"],
               "captions": _speech_windows(video["subtitles"], clean, length)}


def _speech_windows(subtitles, clean, duration):
    """(start, end, text) in a row: a window ends at the first word that comes 10 s after its own
    first, or at 15 s. The text is the denoised one. Its words get the subtitles' times along the
    longest runs that both share (the release: dynamic time warping), in between in proportion."""
    spoken = sorted((float(word["time"]), word["word"]) for word in subtitles
                    if word["word"][:1] != "&" and word["word"][-1:] != ";")     # "&gt;&gt;"
    said = [[word] for _, word in spoken]
    if clean:
        said = [[] for _ in spoken]
        bare = [[re.sub(r"\W", "", word).lower() for word in side]
                for side in ([word for _, word in spoken], clean)]
        for _, a, a_end, b, b_end in difflib.SequenceMatcher(None, *bare).get_opcodes():
            for i in range(b, b_end if a < len(said) else b):   # nothing after the last subtitle
                said[a + (i - b) * (a_end - a) // (b_end - b)].append(clean[i])
    windows = []
    for (second, _), words in zip(spoken, said):
        if not windows or second >= windows[-1][0] + 10:
            if windows:
                windows[-1][1] = min(windows[-1][1], second)
            windows.append([second, min(second + 15, duration), []])
        windows[-1][2].extend(words)
    return [(start, end, " ".join(words)) for start, end, words in windows]


def cc3m(source):
    """Pre-training for Tab. 5, images as one-frame clips: Train_GCC-training.tsv and
    Validation_GCC-1.1.0-Validation.tsv, ai.google.com/research/ConceptualCaptions (no header; the
    usual downloader saves crc32(url)), or the authors' cc3m_*_success_full.tsv."""
    for row in _rows(source.paths, "text url", header=False):
        yield row if "video" in row else {
            "video": str(zlib.crc32(row["url"].encode())), "text": row["text"]}


def coco(source):
    """Pre-training for Tab. 5: Karpathy's dataset_coco.json (its restval is train), or without it
    captions_{train,val}2014.json, cocodataset.org. One line an image, with all its captions."""
    for data in _records(source.paths):
        texts = collections.defaultdict(list)
        for note in data.get("annotations", ()):
            texts[note["image_id"]].append(note["caption"])
        for image in data["images"]:
            if "annotations" in data:
                yield {"video": image["file_name"], "texts": texts[image["id"]]}
            elif image["split"].replace("restval", "train") == source.split:
                yield {"video": image["filename"], "texts": [s["raw"] for s in image["sentences"]]}


def _msrvtt_captions(paths, *splits):
    """{video: captions} of official splits, which are video0 to 6512, to 7009 and to 9999."""
    captions = collections.defaultdict(list)
    for data in _records(paths):
        for note in data.get("sentences") or data["annotations"]:
            video = note.get("video_id") or note["image_id"]
            number = int(video.removeprefix("video"))
            if ("train" if number < 6513 else "val" if number < 7010 else "test") in splits:
                captions[video].append(note["caption"])
    return captions


def msrvtt(source, protocol):
    """Tab. 3a: {train_val,test}_videodatainfo.json, ms-multimedia-challenge.com/2016, or copies
    (MSRVTT_data.json, Frozen's MSR_VTT.json). 9K and 7K test on MSRVTT_JSFUSION_test.csv (1k-A,
    one caption a video); 9K trains on all other videos, 7K on the official train + val. With
    *_list_miech.txt beside them 7K is 1k-B (6,656 train), which the release's code offers."""
    lists = source.find(rf"{source.split}_list_miech\.txt") if protocol == "7k" else []
    one_k = source.find(r"MSRVTT_JSFUSION_test\.csv")
    if protocol == "full":
        chosen = _msrvtt_captions(source.paths, source.split)
    elif lists:
        every = _msrvtt_captions(source.paths, "train", "val", "test")
        chosen = {video: every[video] for video in _lines(lists)}
    elif not one_k:
        raise DataError("MSR-VTT 9K and 7K need MSRVTT_JSFUSION_test.csv, the test captions of "
                        f"1k-A; put it beside {source.paths[0]}")
    else:
        test = {row["video_id"]: [row["sentence"]] for row in _rows(one_k, "video_id sentence")}
        train = _msrvtt_captions(source.paths, "train", "val", *["test"] * (protocol == "9k"))
        chosen = test if source.split == "test" else {
            video: texts for video, texts in train.items() if video not in test}
    yield from ({"video": video, "texts": texts} for video, texts in chosen.items())


def msrvtt_mc(source):
    """Tab. 4a: MSR_MC_test.csv of JSFusion ("msr1234" is video1234) or ClipBERT's
    msrvtt_mc_test.jsonl; answers from 0. There is no training file: as in JSFusion, each caption
    of the official train and val videos (MSR-VTT's own files) stands against 4 of other videos,
    first, as in LSMDC's training file: options are scored one by one, places tell nothing."""
    if source.split == "test":
        for row in _rows(source.paths, "vid_key a1 a2 a3 a4 a5 answer"):
            yield {"video": row.get("clip_name") or row["vid_key"].replace("msr", "video"),
                   "options": row.get("options") or [row[f"a{i}"] for i in range(1, 6)],
                   "answer": int(row["answer"])}
        return
    captions = _msrvtt_captions(source.find(MSRVTT), source.split)
    pool = [(video, text) for video, texts in captions.items() for text in texts]
    draw = random.Random(0)
    for video, text in pool:
        wrong = dict.fromkeys(other for elsewhere, other in draw.sample(pool, min(50, len(pool)))
                              if elsewhere != video and other != text)
        yield {"video": video, "options": [text, *list(wrong)[:4]], "answer": 0}


def _msvd_names(source):
    """{"vid12": "<youtube id>_<from>_<to>"} of MSVD's youtube_mapping.txt."""
    pairs = (line.split() for line in _lines(source.find(r"\w*youtube_mapping\.txt")[:1]))
    return {key: name for name, key in pairs}


def open_qa(source, prefix):
    """Tab. 2b, 2c: {train,val,test}_qa.json of MSRVTT-QA and MSVD-QA,
    github.com/xudejing/video-question-answering, ClipBERT's msrvtt_qa_*.jsonl, the authors'
    msvd_*_qa_encode.json. video_id is a number or a name; youtube_mapping.txt names MSVD's."""
    names = _msvd_names(source)
    for row in _records(source.paths):
        video = str(row["video_id"])
        video = prefix + video if video.isdigit() else video
        yield {"video": [names.get(video, video), video], "question": row["question"],
               "answer": str(row["answer"]), "kind": row["question"].partition(" ")[0].lower()}


def msvd(source):
    """Retrieval in the release: AllVideoDescriptions.txt (a clip and a caption a line),
    cs.utexas.edu/users/ml/clamp/videoDescription. The splits are {train,val,test}_list.txt, or
    vid1 to 1200, to 1300 and to 1970 of youtube_mapping.txt."""
    numbers = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}
    wanted = list(_lines(source.find(rf"{source.split}_list\.txt"))) or [
        name for key, name in _msvd_names(source).items()
        if int(key.removeprefix("vid")) in numbers[source.split]]
    texts = collections.defaultdict(list)
    for line in _lines(source.paths):
        video, _, text = line.partition(" ")
        texts[video].append(text)
    yield from ({"video": video, "texts": texts[video]} for video in wanted)


def tgif(source):
    """Tab. 2a: {Train,Test}_{action,transition,frameqa}_question.csv (tabs),
    github.com/YunseokJANG/tgif-qa, or ClipBERT's .jsonl; answers from 0. It has no val."""
    types = {"0": "object", "1": "number", "2": "color", "3": "location"}
    for row in _rows(source.paths, "gif_name question answer"):
        sample = {"video": row["gif_name"], "question": row["question"]}
        if "type" in row or "answer_type" in row:                                   # FrameQA
            kind = row.get("answer_type") or types.get(row["type"])
            yield {**sample, "answer": row["answer"], "kind": kind}
        else:
            options = row.get("options") or [row[f"a{i}"] for i in range(1, 6)]
            yield {**sample, "options": options, "answer": int(row["answer"])}


def lsmdc(source):
    """Tab. 4b, and retrieval (Sec. 4.3.2): LSMDC16_*.csv, sites.google.com/site/describingmovies.
    Tabs, no header, stray quotes. Choices: the test answers count from 1; train and valid give
    none, the first option is the truth."""
    columns = "clip start end cut_start cut_end o1 o2 o3 o4 o5 answer"
    for row in _rows(source.paths, columns, header=False):
        sample = {"video": f"{row['clip'].rpartition('_')[0]}/{row['clip']}"}
        if "o2" in row:
            options = [row[f"o{i}"] for i in range(1, 6)]
            yield {**sample, "options": options, "answer": int(row.get("answer", 1)) - 1}
        else:
            yield {**sample, "text": row["o1"]}


def didemo(source):
    """Tab. 3c: {train,val,test}_data.json, github.com/LisaAnne/LocalizingMoments, or the authors'
    DiDeMo_*.tsv. A video's descriptions in the order of the file are its paragraph; `times` (the
    moments, in chunks of 5 s) are not used: the query is about the whole video."""
    texts = collections.defaultdict(list)
    for row in _rows(source.paths, ""):
        texts[row["video"]].append(row["text"] if "text" in row else row["description"])
    yield from ({"video": video, "text": " ".join(texts[video])} for video in texts)


def activitynet(source):
    """Tab. 3b: train.json and val_1.json, cs.stanford.edu/people/ranjaykrishna/densevid, or
    ClipBERT's train.jsonl, val1.jsonl. All sentences are one paragraph. It has no val: val_2
    tells of the videos of val_1 again. Files on disk may lack the "v_" of the ids."""
    for data in _records(source.paths):
        if "clip_name" in data:
            data = {data["clip_name"]: {"sentences": [data["caption"]]}}
        for video, note in data.items():
            yield {"video": [video, video.removeprefix("v_")], "text": " ".join(note["sentences"])}


def vcr(source, rationale):
    """Tab. 5: {train,val}.jsonl, visualcommonsense.com (test hides its answers), and the .json of
    boxes beside each of vcr1images. A list [i, j] among the words becomes "person 0 person 1",
    numbered by first mention in question, answers, rationales: alike in Q→A, QA→R and "boxes"
    ([number, x0, y0, x1, y1], pixels of the image). QA→R's question ends in the right answer.
    Line n of both manifests is the same question, for Q→AR."""
    for row in _records(source.paths):
        number = {}                                  # an object's place in the annotation: its own

        def words(tokens):
            return " ".join(token if isinstance(token, str) else " ".join(
                f"{row['objects'][i]} {number.setdefault(i, len(number))}" for i in token)
                for token in tokens)

        question = words(row["question"])
        answers = [words(tokens) for tokens in row["answer_choices"]]
        reasons = [words(tokens) for tokens in row["rationale_choices"]]
        sample = {"video": row["img_fn"], "question": question, "options": answers,
                  "answer": row["answer_label"], "kind": "Q→A"}
        if rationale:
            sample.update(question=f"{question} {answers[sample['answer']]}", options=reasons,
                          answer=row["rationale_label"], kind="QA→R")
        if number and (image := source.clip(row["img_fn"])):
            notes = os.path.join(os.path.dirname(image), os.path.basename(row["metadata_fn"]))
            boxes = next(_records([notes]))["boxes"]
            sample["boxes"] = [[k, *boxes[i][:4]] for i, k in number.items()]
        yield sample


def kinetics(source):
    """Tab. 12: {train,validate}.csv, deepmind.com/research/open-source/kinetics, or
    {train,val}.csv, github.com/cvdfoundation/kinetics-dataset; clips id_000012_000022.mp4."""
    for row in _rows(source.paths, "label youtube_id time_start time_end"):
        start, end = int(row["time_start"]), int(row["time_end"])
        yield {"video": f"{row['youtube_id']}_{start:06}_{end:06}", "answer": row["label"]}


def hmdb51(source):
    """Tab. 12: testTrainMulti_7030_splits/<class>_test_split1.txt, serre-lab.clps.brown.edu;
    "<clip>.avi 1" trains, 2 tests, 0 does neither. As the release, the first of three splits."""
    for path in source.paths:
        label = os.path.basename(path).removesuffix("_test_split1.txt")
        for clip, use in (line.rsplit(maxsplit=1) for line in _lines([path])):
            if use == {"train": "1", "test": "2"}[source.split]:
                yield {"video": f"{label}/{clip}", "answer": label.replace("_", " ")}


def ego4d_mc(source):
    """Tab. 13, zero-shot: the authors' mc_val.csv, whose cells are Python lists: question [video,
    frame, ..., text], answers [[..., text], ...]. As in the release a clip is the 120 frames (at
    30 a second) about the narrated one. The training questions are not published."""
    for row in _rows(source.paths, "question answers"):
        video, frame, *_, text = ast.literal_eval(row["question"])
        options = [answer[-1] for answer in ast.literal_eval(row["answers"])]
        yield {"video": video, "start": max(frame / 30 - 2, 0), "end": frame / 30 + 2,
               "options": options, "answer": options.index(text)}


MSRVTT = r"\w*videodatainfo\.json | MSRVTT_data\.json | MSR_VTT\.json"
SPELT = {"train": "train(ing)?", "val": "val(id|idate|idation)?"}
# name: reader; splits ("test=val": our test is their val); names of the annotation files (SPLIT in
# any spelling; of forms between " | " the first at hand); how many answers answers.json keeps
DATASETS = {
    "webvid": (webvid, "train val", r"results_\w+_SPLIT\.csv | webvid_SPLIT_\w+\.tsv", 0),
    "howto100m": (howto100m, "train", r"[\w-]{11}\.csv | caption\.json | raw_caption\w*\.json", 0),
    "yttemporal": (yttemporal, "train", r".+\.jsonl(\.gz)? | [\w-]{11}(\.\w+)?\.json", 0),
    "cc3m": (cc3m, "train val", r"SPLIT_GCC.*\.tsv | cc3m_SPLIT_\w+\.tsv", 0),
    "coco": (coco, "train val test", r"dataset_coco\.json | captions_SPLIT\d+\.json", 0),
    "msrvtt_9k": (partial(msrvtt, protocol="9k"), "train test", MSRVTT, 0),
    "msrvtt_7k": (partial(msrvtt, protocol="7k"), "train test", MSRVTT, 0),
    "msrvtt_full": (partial(msrvtt, protocol="full"), "train val test", MSRVTT, 0),
    "msrvtt_mc": (msrvtt_mc, "train val test", r"MSR_MC_test\.csv | msrvtt_mc_test\.jsonl", 0),
    "msrvtt_qa": (partial(open_qa, prefix="video"), "train val test",
                  r"SPLIT_qa\.json | msrvtt_qa_SPLIT\.jsonl", 1500),
    "msvd_qa": (partial(open_qa, prefix="vid"), "train val test",
                r"SPLIT_qa\.json | msvd_SPLIT_qa_encode\.json", 1000),
    "msvd": (msvd, "train val test", r"AllVideoDescriptions\.txt", 0),
    "tgif_action": (tgif, "train test", r"SPLIT_action_.*\.csv | action_SPLIT\.jsonl", 0),
    "tgif_transition": (tgif, "train test", r"SPLIT_trans.*\.csv | transition_SPLIT\.jsonl", 0),
    "tgif_frameqa": (tgif, "train test", r"SPLIT_frameqa_.*\.csv | frameqa_SPLIT\.jsonl", 1540),
    "lsmdc": (lsmdc, r"train val test=challenge_1000_\w+", r"LSMDC16_(annos_)?SPLIT\.csv", 0),
    "lsmdc_mc": (lsmdc, "train val test", r"LSMDC16_multiple_choice_SPLIT(_randomized)?\.csv", 0),
    "didemo": (didemo, "train val test", r"SPLIT_data\.json | DiDeMo_SPLIT\.tsv", 0),
    "activitynet": (activitynet, "train test=val_?1", r"SPLIT\.json | SPLIT\.jsonl", 0),
    "vcr_qa": (partial(vcr, rationale=False), "train test=val", r"SPLIT\.jsonl", 0),
    "vcr_qar": (partial(vcr, rationale=True), "train test=val", r"SPLIT\.jsonl", 0),
    "kinetics400": (kinetics, "train test=val", r"(kinetics.400_)?SPLIT\.csv", 400),
    "hmdb51": (hmdb51, "train test", r"\w+_test_split1\.txt", 51),
    "ego4d_mc": (ego4d_mc, "test", r"mc_val\.csv", 0)}
MEDIA = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".3gp", ".flv", ".gif",
         ".jpg", ".jpeg", ".png", ".webp")       # if a clip has several, the first is taken


def _stem(name):
    """A file's name without media extensions; the dots in the times of an LSMDC clip stay."""
    stem, extension = os.path.splitext(os.path.basename(name))
    return _stem(stem) if extension.lower() in MEDIA else stem + extension   # DiDeMo: x.mov.mp4


def _walk(root):
    """{name without extension: path} of all files and folders below root, in one go: to ask the
    disk for millions of clips one by one, in 14 extensions each, would take hours. Where folders
    hold clips of one name, the later ones go by "folder/name"."""
    paths, rank = {}, {extension: i for i, extension in enumerate(MEDIA)}
    for folder, folders, files in os.walk(root, followlinks=True):
        for name in sorted(folders + files, key=lambda name: (
                rank.get(os.path.splitext(name)[1].lower(), len(rank)), name)):
            path, stem = os.path.join(folder, name), _stem(name)
            if os.path.dirname(paths.setdefault(stem, path)) != folder:
                paths.setdefault(f"{os.path.basename(folder)}/{stem}", path)
    return paths


def _tidy(value):
    """Texts on one line and without doubled spaces, also in lists."""
    if isinstance(value, str):
        return " ".join(value.split())
    return [_tidy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _about(reader):
    """The reader's docstring on one line."""
    return _tidy(getattr(reader, "func", reader).__doc__)


def _samples(reader, source):
    """(names of the clip, sample) of a reader; DataError if a file is not as published."""
    try:
        for sample in reader(source):
            names = sample.pop("video")
            sample = {key: _tidy(value) for key, value in sample.items()}
            if "texts" in sample:
                sample["texts"] = [text for text in sample["texts"] if text]
            if "captions" in sample:
                sample["captions"] = [c for c in sample["captions"] if c[2] and c[1] > c[0]]
            yield [names] if isinstance(names, str) else names, sample
    except DataError:
        raise
    except (LookupError, TypeError, AttributeError, SyntaxError, ValueError, OSError) as error:
        raise DataError(f"{', '.join(source.paths[:3])}: not as published ({error!r}); expected: "
                        f"{_about(reader)}") from error


def convert(name, annotations, videos, out):
    """Writes OUT/{train,val,test}.jsonl, and OUT/answers.json, of data set `name`.

    annotations: files, or folders that hold them, as published. videos: the folder of the clips,
    at any depth. Clips that are not there and samples without text are left out, counted and
    named: half a download is half a manifest. answers.json: the commonest training answers first
    (Sec. 4.2.1), ties by first appearance, of the whole annotation whatever the download holds.
    """
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; expected one of {', '.join(DATASETS)}")
    reader, splits, pattern, keep = DATASETS[name]
    theirs = {split.partition("=")[0]: split.rpartition("=")[2] for split in splits.split()}
    for path in [*annotations, videos]:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
    out = os.path.realpath(out)                    # the manifests' "../" count from where it lies
    files = sorted({os.path.normpath(file) for path in annotations for file in (
        [path] if os.path.isfile(path) else
        (os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names))})
    inside = [file for file in files if os.path.dirname(os.path.realpath(file)) == out]
    if inside:                                     # VCR's own file is train.jsonl, for instance
        raise DataError(f"{inside[0]} lies in --out, where it might be read or replaced as a "
                        "manifest; choose a folder outside of --annotations")
    paths, answers, absent, written = _walk(videos), collections.Counter(), [], 0

    def find(forms):
        found = ([path for path in files if re.fullmatch(form, os.path.basename(path), re.I)]
                 for form in forms.split(" | "))
        return next(filter(None, found), [])

    def clip(*names):
        keys = (key for name in names for key in (
            f"{os.path.basename(os.path.dirname(name))}/{_stem(name)}", _stem(name)))
        return next((paths[key] for key in keys if key in paths), None)

    os.makedirs(out, exist_ok=True)
    for split, name_there in theirs.items():
        forms = pattern.replace("SPLIT", SPELT.get(name_there, name_there))
        source = Source(find(forms), split, find, clip)
        if not source.paths:
            print(f"{split}: no annotation file is named like {forms}")
            continue
        missing, clips, samples, empty = collections.Counter(), set(), 0, 0
        target = os.path.join(out, f"{split}.jsonl")
        with open(f"{target}.part", "w", encoding="utf-8") as file:
            for names, sample in _samples(reader, source):
                if split == "train" and keep:
                    answers[sample["answer"]] += 1
                path = clip(*names)
                if path is None:
                    missing[names[0]] += 1
                elif any(value in ("", []) for value in sample.values()):
                    empty += 1
                else:
                    line = {"video": os.path.relpath(path, out), **sample}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    clips.add(path)
                    samples += 1
        absent += list(missing)[:3]
        written += samples
        shown = f" (such as {', '.join(list(missing)[:3])})" if missing else ""
        print(f"{split}: {samples:,} samples of {len(clips):,} clips in {target}; left out "
              f"{missing.total():,} samples of {len(missing):,} clips that are not under {videos}"
              f"{shown} and {empty:,} without text")
        if samples:
            os.replace(f"{target}.part", target)
        else:
            os.remove(f"{target}.part")                            # no split, no empty manifest
    if not written:
        raise DataError(f"{name}: no clip such as {', '.join(absent[:3])} is under {videos}"
                        if absent else f"{name}: none of the {len(files)} annotation files is "
                        f"what was expected: {_about(reader)}")
    if answers:
        target = os.path.join(out, "answers.json")
        with open(f"{target}.part", "w", encoding="utf-8") as file:
            json.dump([a for a, _ in answers.most_common(keep)], file, ensure_ascii=False)
        os.replace(f"{target}.part", target)


# ---- command line

def main():
    """python data.py COMMAND: see --help of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("toy", help="write the toy data set")
    command.add_argument("--out", default="data/toy", help="folder (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser(
        "convert", help="an original public release of a data set to manifests",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(
            f"  {name:<16} {_about(entry[0]).split(':')[0]}" for name, entry in DATASETS.items()))
    command.add_argument("name", metavar="NAME", help="a data set of the list below")
    command.add_argument("--annotations", nargs="+", required=True, metavar="PATH",
                         help="its annotation files, or folders of them")
    command.add_argument("--videos", required=True, metavar="DIR", help="the folder of its clips")
    command.add_argument("--out", required=True, metavar="DIR", help="where the manifests go")
    command = commands.add_parser("check", help="decode every sample of a manifest, report, clean")
    command.add_argument("manifest")
    command.add_argument("--workers", type=int, default=os.cpu_count())
    command.add_argument("--timeout", type=float, default=60, help="seconds a file may take")
    command.add_argument("--frames", type=int, default=3, help="S, to find shorter clips")
    command.add_argument("--vocab", help="to count a text's tokens: a name or a local vocab.txt")
    command.add_argument("--max-text-len", type=int, default=40)
    command = commands.add_parser("bench", help="measure decoding on your own files")
    command.add_argument("files", nargs="+")
    command.add_argument("--frames", type=int, default=3)
    command.add_argument("--side", type=int, default=short_side(224), help="shorter side, pixels")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--gpu", type=float, default=400, help="clips/s that one GPU trains on")
    args = vars(parser.parse_args())
    command = args.pop("command")
    if command == "toy":
        print(toy(args["out"], args["seed"]))
    elif command == "convert":
        convert(**args)
    elif command == "check":
        vocab = args.pop("vocab")
        check(**args, tokenizer=Tokenizer.load(vocab) if vocab else None)
    elif command == "bench":
        torch.set_num_threads(1)                            # as in a loader's worker
        bench(**args)


if __name__ == "__main__":
    try:
        main()
    except (DataError, Unreadable) as error:
        sys.exit(f"data.py: {error}")
