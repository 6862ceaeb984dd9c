"""Clips in, tensors out.

    Manifest -> BatchSampler -> decode -> Clips -> collate           `load` runs them

A `Manifest` lists the samples. `BatchSampler` says which of them a micro-batch reads. `decode`
reads the frames of a clip. `Clips` makes one sample into tensors: pixels, words, label. `collate`
makes the samples of a micro-batch into one batch. `load` does all this in processes of its own,
ahead of training. The toy set, the data doctor (`check`) and the readers of the published data
sets (`convert`) follow below.

A manifest holds one sample a line, each a JSON object. Paths are relative to the manifest:

    {"video": "clips/a.mp4", "text": "a dog runs"}

These are the fields of a sample. A task needs some of them.

    video       a file, an image (a clip of one frame) or a folder of frames
    text        the caption
    texts       several captions of one clip
    captions    [[start, end, text], ...]: captions of parts of the clip, in seconds. A visit in
                training draws one of them and reads at least 4 s. Evaluation takes the first.
    start, end  the part of the clip that the sample shows, in seconds after the first frame
    fps         frames a second, for a folder of frames
    question    of question answering, and of multiple choice
    options     the answers or captions to choose from
    answer      which of the options is right, counted from 0 or in words. Without options: words.
    boxes       [[identity, x0, y0, x1, y1], ...]: the entities of VCR, in pixels of the image
    kind        a label, by which evaluation reports the accuracy
    image       true or false, where the ending of "video" does not say whether it is an image

A .csv or .tsv table with such columns is a manifest too. So is a folder of clips that have their
captions beside them, in a .txt or .json of the same name. So is a .tar shard of such files, as
video2dataset writes it, or a folder of shards: a shard is read as it is, without unpacking it.

    python data.py {toy,convert,check} --help
"""

import argparse
import ast
import bisect
import codecs
import collections
import colorsys
import csv
import difflib
import fnmatch
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from tokenizers import BertWordPieceTokenizer
from tokenizers import Tokenizer as WordPieces
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image


class DataError(ValueError):
    """Bad input from the user: one line with what came, where, what was expected, what to do."""


class Unreadable(Exception):
    """One clip that cannot be read: str() names it and the reason, for a person who can mend it."""


# ==== Manifest ====================================================================================

TEXT, TEXTS = "a text", "a list of texts"
NUMBER = "a finite number"
INDEX_OR_TEXT = "an integer or a text"
CAPTIONS = "a list of [start, end, text], in seconds"
BOXES = "a list of [identity, x0, y0, x1, y1]"
FLAG = "true or false"
MEMBER = '{"name": text, "offset": integer, "size": integer}'
# What each field of a sample must hold. Fields of other names are kept and not looked at.
FIELDS = {"video": TEXT, "text": TEXT, "texts": TEXTS, "captions": CAPTIONS, "question": TEXT,
          "options": TEXTS, "answer": INDEX_OR_TEXT, "start": NUMBER, "end": NUMBER,
          "fps": NUMBER, "boxes": BOXES, "kind": TEXT, "image": FLAG, "member": MEMBER}
ALIASES = {  # names that other people's files give to a field
    "video": ("path", "file", "filename", "video_path", "clip"),
    "text": ("caption", "title", "description", "sentence", "txt")}
IMAGES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"
MEDIA = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".3gp", ".flv", ".gif", *IMAGES)
HEADER = 5      # int64 numbers before the first offset of an index: see line_index


class Manifest:
    """One or several manifests as a sequence of samples, read through an index of their lines.

    paths: one or several of: a .jsonl, a .csv or .tsv table, a folder of clips with captions
    beside them, a .tar shard, a folder of shards. Neighbouring shards of one folder count as one
    manifest. columns: ("video=clip_name", "text=en") for tables whose columns have other names.

    `manifest[i]` is line i as a dict. "video" is then an absolute path, and "source_line" names
    the file and the line that the sample comes from. An access is two small reads: nothing stays
    open, and no line stays in memory. 136 M lines take 1.1 GB of index on disk.
    A line that is not as FIELDS says raises DataError, which names its file and line.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], columns: Sequence[str] = ()):
        if isinstance(paths, (str, Path)):
            paths = [paths]
        if not paths:
            raise DataError("no manifest; expected at least one .jsonl, .csv, .tsv, .tar or folder")
        sources = neighbouring_shards([Path(path) for path in paths])
        self.names = [source_name(source) for source in sources]
        self.paths = [json_lines(source, columns) for source in sources]
        self.indices = [line_index(path) for path in self.paths]
        self.sizes = [read_index(index, 4) for index in self.indices]
        self.ends = list(itertools.accumulate(self.sizes))
        for name, size in zip(self.names, self.sizes):
            if size == 0:
                raise DataError(f"{name}: no samples; expected a JSON object a line, a row a line "
                                "or, of a folder and of shards, clips with a .txt or .json of "
                                "their name beside them")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, i: int) -> tuple[int, int]:
        """(which of the manifests, which of its samples from 0) sample i is."""
        manifest_id = bisect.bisect_right(self.ends, i)
        return manifest_id, i - self.ends[manifest_id] + self.sizes[manifest_id]

    def after(self, i: int, steps: int) -> int:
        """The sample that many lines after i. The last line of a manifest is followed by the
        first line of the same manifest."""
        manifest_id, line = self.locate(i)
        return i - line + (line + steps) % self.sizes[manifest_id]

    def contents(self) -> list[list]:
        """[name, samples, checksum] of each manifest. A resumed run notices by them that one of
        its manifests has changed."""
        checksums = [read_index(index, 3) for index in self.indices]
        return [list(row) for row in zip(self.names, self.sizes, checksums)]

    def line(self, i: int) -> tuple[bytes, int]:
        """The line of sample i as it is stored, and its number in its file, from 1."""
        manifest_id, line = self.locate(i)
        offset, number = line_place(self.indices[manifest_id], line, self.sizes[manifest_id])
        with open(self.paths[manifest_id], "rb") as file:
            file.seek(offset)
            return file.readline(), number

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a manifest of {len(self)}")
        manifest_id, _ = self.locate(i)
        content, number = self.line(i)
        source_line = f"{self.names[manifest_id]}:{number}"
        try:
            fields = json.loads(content.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            excerpt = content[:60].decode(errors="replace").strip()
            raise DataError(f"{source_line}: not JSON ({error}): {excerpt!r}; expected an object "
                            'such as {"video": "a.mp4", "text": "a dog runs"}') from None
        # A line of a table, a folder or a shard says itself where it comes from.
        sample = {"source_line": source_line, "where": source_line}
        sample.update(checked(fields, source_line))
        folder = self.paths[manifest_id].absolute().parent
        sample["video"] = str(folder / need(sample, "video"))
        return sample


def checked(fields: object, source_line: str) -> dict:
    """A sample without its nulls and without halves of characters. DataError if it is no object,
    or if a field is not as FIELDS says."""
    if not isinstance(fields, dict):
        raise DataError(f"{source_line}: is {fields!r:.60}; expected a JSON object")
    sample = {}
    for field, value in fields.items():
        if value is None:
            continue
        expected = FIELDS.get(field)
        if expected and not is_as_expected(value, expected):
            raise DataError(f'{source_line}: "{field}" is {value!r:.60}; expected {expected}, as '
                            "the first lines of data.py explain")
        # A path may hold bytes that are not UTF-8, which Python writes as halves of characters.
        sample[field] = value if field == "video" else map_texts(whole_characters, value)
    if "fps" in sample and sample["fps"] <= 0:
        raise DataError(f'{source_line}: "fps" is {sample["fps"]}; expected frames a second, '
                        "more than 0")
    if "start" in sample and "end" in sample and sample["end"] <= sample["start"]:
        raise DataError(f'{source_line}: "end" is {sample["end"]} and "start" {sample["start"]}; '
                        "expected a start before the end, in seconds after the first frame")
    return sample


def is_as_expected(value: object, expected: str) -> bool:
    """Whether a field's value is what FIELDS calls `expected`."""
    if expected == TEXT:
        return isinstance(value, str)
    if expected == NUMBER:
        return is_number(value)
    if expected == FLAG:
        return isinstance(value, bool)
    if expected == INDEX_OR_TEXT:
        return type(value) in (int, str)                # True is an instance of int, but no index
    if expected == MEMBER:
        return isinstance(value, dict) and is_row(
            [value.get("name"), value.get("offset"), value.get("size")], str, int, int)
    if not isinstance(value, list):
        return False
    if expected == TEXTS:
        return all(isinstance(item, str) for item in value)
    if expected == CAPTIONS:
        return all(is_row(item, float, float, str) for item in value)
    return all(is_row(item, float, float, float, float, float) for item in value)       # BOXES


def is_number(value: object) -> bool:
    """Whether a value is a number that a time or a place can be. JSON readers also accept NaN,
    Infinity and 1e999."""
    return type(value) in (int, float) and abs(value) < 1e12        # NaN is never below a number


def is_row(values: object, *kinds: type) -> bool:
    """Whether a list holds a value of each kind, in that order; float: any finite number."""
    if not isinstance(values, list) or len(values) != len(kinds):
        return False
    for value, kind in zip(values, kinds):
        if kind is float and not is_number(value) or kind is not float and type(value) is not kind:
            return False
    return True


def need(sample: dict, field: str) -> object:
    """The value of a field that must be there and not be empty. DataError otherwise, which names
    the key that was probably meant."""
    if sample.get(field) not in (None, "", []):
        return sample[field]
    ours = {*FIELDS, "source_line", "where"}
    keys = [key for key in sample if key not in ours]
    meant = [key for key in keys if key.lower() in ALIASES.get(field, ())]
    meant += difflib.get_close_matches(field, keys)
    hint = f'; rename "{meant[0]}" to "{field}"' if meant else ""
    present = ", ".join(key for key in sample if key not in ("source_line", "where"))
    raise DataError(f'{sample["source_line"]}: lacks "{field}"{hint}; its keys are {present} '
                    f"(of a table, --columns {field}=NAME says which column it is)")


def is_image(sample: dict) -> bool:
    """Whether a sample is an image, one frame, rather than a clip."""
    name = sample["member"]["name"] if "member" in sample else sample["video"]
    return sample.get("image", name.lower().endswith(IMAGES))


def map_texts(function: Callable[[str], str], value: object) -> object:
    """`value` with the function applied to it if it is a text, or to each text of a list."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [map_texts(function, item) for item in value]
    return value


def whole_characters(text: str) -> str:
    """A text in which U+FFFD stands for each half of a character. A program that cuts texts after
    N units of UTF-16 leaves half an emoji, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def single_spaced(text: str) -> str:
    """A text on one line and without doubled spaces."""
    return " ".join(text.split())


def tidy(value: object) -> object:
    """A text, or each text of a list, on one line and without doubled spaces."""
    return map_texts(single_spaced, value)


# ---- files: written whole or not at all, indexed once

@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path`, open for writing. It takes the name `path` when it is whole, and is
    removed when writing it fails."""
    beside = Path(f"{path}.{os.urandom(4).hex()}")  # processes of one job may all write it at once
    try:
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def temporary(key: str, suffix: str) -> Path:
    """A path in the temporary folder, the same for the same key."""
    name = hashlib.sha1(key.encode()).hexdigest()
    return Path(tempfile.gettempdir(), f"allinone-{name}{suffix}")


def temporary_manifest(samples: Iterable[dict], key: str | None = None) -> Path:
    """The path of a manifest of these samples, in the temporary folder.

    It is written once for each key. Without a key the samples themselves are the key."""
    if key is None:
        samples = list(samples)
        key = json.dumps(samples)
    place = temporary(key, ".jsonl")
    if not place.is_file():
        with replacing(place) as file:
            for sample in samples:
                file.write(json.dumps(sample).encode() + b"\n")
    return place


def line_index(path: Path) -> Path:
    """The path of the up-to-date index of a .jsonl file, which is built when it is missing.

    It holds int64 numbers: version, size, time and checksum of the .jsonl, its samples, and then
    the offset of each sample's line. Blank lines are no samples. Where one of them comes before a
    sample, the number of each sample's line follows. The file is NAME.jsonl.idx or, where the
    folder cannot be written to, lies in the temporary folder."""
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; expected a .jsonl, .csv or .tsv file, one "
                        "sample a line, an uncompressed .tar shard, or a folder of clips or shards")
    status = path.stat()
    header = [3, status.st_size, status.st_mtime_ns]
    beside = Path(f"{path}.idx")
    elsewhere = temporary(str(path.resolve()), ".idx")
    for place in (beside, elsewhere):
        if place.is_file() and np.fromfile(place, np.int64, 3).tolist() == header:
            return place
    offsets, numbers = line_offsets(path)
    if len(numbers) == 0 or numbers[-1] == len(numbers):
        numbers = numbers[:0]                       # sample i is line i + 1: nothing to store
    place = beside if os.access(path.absolute().parent, os.W_OK) else elsewhere
    with replacing(place) as file:
        np.array([*header, checksum(path), len(offsets)], np.int64).tofile(file)
        offsets.tofile(file)
        numbers.tofile(file)
    return place


def line_offsets(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(offset, number from 1) of each line of a file that is not blank, int64 (samples,)."""
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: is UTF-16; save it as UTF-8")
        file.seek(0)
        # The length of a blank line is stored below zero.
        lengths = np.fromiter((-len(line) if line.isspace() else len(line) for line in file),
                              np.int64)
    ends = np.cumsum(np.abs(lengths))
    lines = np.flatnonzero(lengths > 0)
    return (ends - np.abs(lengths))[lines], lines + 1


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_index(index: Path, place: int) -> int:
    """Number `place` of an index, from 0; see line_index."""
    return int(np.fromfile(index, np.int64, 1, offset=8 * place)[0])


def line_place(index: Path, line: int, size: int) -> tuple[int, int]:
    """(offset, line number from 1) of sample `line` of an index of `size` samples."""
    offset = read_index(index, HEADER + line)
    if os.path.getsize(index) == 8 * (HEADER + size):
        return offset, line + 1
    return offset, read_index(index, HEADER + size + line)


# ---- manifests of tables, folders of clips and shards

def neighbouring_shards(paths: list[Path]) -> list[list[Path]]:
    """The files of each manifest: one, or all neighbouring .tar files of one folder."""
    sources = []
    for path in paths:
        if path.suffix == ".tar" and sources:
            last = sources[-1][-1]
            if last.suffix == ".tar" and last.parent == path.parent:
                sources[-1].append(path)
                continue
        sources.append([path])
    return sources


def source_name(source: list[Path]) -> str:
    """What messages call a manifest: its path, or those of its first and its last shard."""
    return str(source[0]) if len(source) == 1 else f"{source[0]} to {source[-1].name}"


def json_lines(source: list[Path], columns: Sequence[str] = ()) -> Path:
    """The path of a .jsonl of one manifest: the file itself or, of a table, a folder or shards, one
    in the temporary folder. That one is written again when a file, its size or its time changes."""
    for path in source:
        if not path.exists():
            raise DataError(f"{path}: no such manifest; expected a .jsonl, .csv or .tsv file, one "
                            "sample a line, a .tar shard, or a folder of clips or shards")
    path = source[0]
    if path.is_dir():
        files = folder_files(path)
        captions_and_shards = [file.path for file in files if not file.name.lower().endswith(MEDIA)]
        key = [file.path for file in files] + [stamp(name) for name in captions_and_shards]
        samples = folder_samples(path, files, columns)
    elif path.suffix in (".csv", ".tsv"):
        key = [stamp(path)]
        samples = table_samples(path, columns)
    elif path.suffix == ".tar":
        key = [stamp(shard) for shard in source]
        samples = itertools.chain.from_iterable(shard_samples(shard, columns) for shard in source)
    elif path.suffix in (".gz", ".tgz", ".zip", ".xz", ".zst", ".bz2"):
        raise DataError(f"{path}: is compressed; unpack it. A shard must be an uncompressed .tar")
    else:
        return path
    return temporary_manifest(samples, json.dumps(["version 1", *columns, *key]))


def stamp(path: str | Path) -> tuple[str, int, int]:
    """(absolute path, size, time) of a file: what tells that it has changed."""
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder, or a member of a shard: some of the bytes of another file."""
    path: str           # of the file or of the shard, absolute
    name: str           # of the file or of the member
    offset: int = 0     # of its bytes in `path`
    size: int = -1      # -1: all bytes

    def read(self) -> str:
        """Its text. UnicodeDecodeError if it is not UTF-8."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size).decode("utf-8-sig")

    @property
    def is_member(self) -> bool:
        return self.size >= 0

    @property
    def source_line(self) -> str:
        """What messages call it: file:1, or shard:member."""
        return f"{self.path}:{self.name if self.is_member else 1}"

    def fields(self) -> dict:
        """The fields of a sample that show this clip."""
        if not self.is_member:
            return {"video": self.path}
        member = {"name": self.name, "offset": self.offset, "size": self.size}
        return {"video": self.path, "member": member}


SIDECARS = ".txt", ".json"      # a caption beside its clip


def folder_files(folder: Path) -> list[StoredFile]:
    """The clips, captions and shards below a folder, by name."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (*MEDIA, *SIDECARS, ".tar") and not path.name.startswith("._"):
            files.append(StoredFile(str(path.absolute()), str(path.absolute())))
    return files


def folder_samples(folder: Path, files: list[StoredFile], columns: Sequence[str]) -> Iterator[dict]:
    """Samples of a folder: of the clips with a caption beside them, then of the shards."""
    yield from captioned_samples(str(folder), files, columns)
    for file in files:
        if file.name.endswith(".tar"):
            yield from shard_samples(Path(file.path), columns)


def clip_files(path: Path) -> list[StoredFile]:
    """The clips of a folder, of a shard or of a folder of shards, or the file itself. They need no
    captions."""
    if not path.is_dir() and path.suffix != ".tar":
        return [StoredFile(str(path.absolute()), path.name)]
    files = folder_files(path) if path.is_dir() else shard_files(path)
    clips = [file for file in files if file.name.lower().endswith(MEDIA)]
    for file in files:
        if file.name.endswith(".tar"):
            clips += clip_files(Path(file.path))
    return clips


def shard_samples(shard: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Samples of a .tar as video2dataset and img2dataset write them: KEY.mp4 or KEY.jpg beside
    KEY.txt and KEY.json. One pass over the headers, which nothing unpacks."""
    files = shard_files(shard)
    yield from captioned_samples(str(shard), files, columns)


def shard_files(shard: Path) -> list[StoredFile]:
    """The files in an uncompressed .tar. DataError if it is none, or is cut off."""
    path = str(shard.absolute())
    files = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and not os.path.basename(member.name).startswith("._"):
                    files.append(StoredFile(path, member.name, member.offset_data, member.size))
            # tarfile takes damaged headers for the end. A whole archive ends in blocks of zeros.
            archive.fileobj.seek(archive.offset)
            rest = archive.fileobj.read(1 << 16)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: is cut off or no .tar shard ({error}); fetch it again or remove "
                        "it") from None
    if not rest or rest.strip(b"\0"):
        raise DataError(f"{shard}: is cut off or damaged at byte {archive.offset}, after "
                        f"{len(files)} files; fetch it again or remove it")
    return files


def check_member(sample: dict) -> None:
    """Unreadable if a shard holds something else by now where a sample's clip should be.

    The 512 bytes before a member are its header, which says its name and size."""
    path = sample["video"]
    name = sample["member"]["name"]
    offset = sample["member"]["offset"]
    size = sample["member"]["size"]
    try:
        with open(path, "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            block = file.read(tarfile.BLOCKSIZE)
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such file") from None
    except (OSError, ValueError, tarfile.TarError):
        header = None
    # A header has room for 100 bytes of a plain name. Other names lie in blocks before it.
    is_whole_name = name.isascii() and len(name) <= 100
    if header is None or header.size != size or is_whole_name and header.name != name:
        raise Unreadable(f"{path}: holds no {name} of {size} bytes at byte {offset}; the shard has "
                         "changed or is cut off: fetch it again, and start again")


def captioned_samples(name: str, files: list[StoredFile], columns: Sequence[str]) -> Iterator[dict]:
    """Samples of the clips that have a caption of their name beside them.

    A picture beside a clip of its name is a thumbnail. Clips whose caption is missing, empty or
    unreadable are left out and counted."""
    clips = {}
    sidecars = {}
    left_out = collections.defaultdict(list)
    for file in files:
        key, ending = os.path.splitext(file.name)
        ending = ending.lower()
        if ending in SIDECARS:
            sidecars[key + ending] = file
        elif ending in MEDIA and (key not in clips or is_image(clips[key].fields())):
            clips[key] = file
        elif ending in MEDIA and ending not in IMAGES:
            left_out["clips beside another clip of their name"].append(file.name)
    for key, clip in clips.items():
        try:
            sample = captioned_sample(clip, sidecars.get(f"{key}.txt"), sidecars.get(f"{key}.json"),
                                      columns)
        except ValueError as error:                         # DataError and UnicodeDecodeError too
            left_out["clips with an unreadable caption"].append(str(error))
            continue
        if any(texts_of(sample)):
            yield sample
        else:
            left_out["clips without a caption"].append(clip.name)
    report_left_out(name, left_out)


def captioned_sample(clip: StoredFile, text: StoredFile | None, notes: StoredFile | None,
                     columns: Sequence[str]) -> dict:
    """The sample of a clip. Its caption is KEY.txt, else that in KEY.json, which may hold other
    fields too. ValueError if one of them cannot be read."""
    row = {}
    if notes:
        row = json.loads(notes.read())
        if not isinstance(row, dict):
            raise DataError(f"{notes.source_line}: is {row!r:.60}; expected a JSON object")
    caption = text.read() if text else ""
    if caption.strip():
        row["text"] = caption
    place = clip if clip.is_member else text or notes or clip
    sample = sample_of_row(row, place.source_line, columns)
    sample.update(clip.fields())
    return sample


def report_left_out(name: str, left_out: dict[str, list[str]]) -> None:
    """Prints how many samples of a manifest are left out, and which is one of them."""
    for reason, places in left_out.items():
        print(f"{name}: left out {len(places)} {reason}, such as {places[0]}", file=sys.stderr)


def table_samples(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Samples of a person's .csv or .tsv table, with absolute paths. Rows whose caption is empty
    are left out and counted. DataError names the line of a row that cannot be read."""
    left_out = collections.defaultdict(list)
    captions = {column_of("text", columns), "text", *ALIASES["text"]}
    for source_line, row in table_rows(path):
        for column in columns:
            if column_of(column.partition("=")[0], [column]) not in row:
                raise DataError(f"{path}: --columns {column}: the table has no such column; its "
                                f"columns are {', '.join(row)}")
        sample = sample_of_row(row, source_line, columns)
        sample["video"] = str(path.absolute().parent / need({**row, **sample}, "video"))
        if captions & row.keys() and not any(texts_of(sample)) and "answer" not in sample:
            left_out["rows without a caption"].append(source_line)
        else:
            yield sample
    report_left_out(str(path), left_out)


def sample_of_row(row: dict, source_line: str, columns: Sequence[str]) -> dict:
    """The fields of a sample from the cells of a row. A column is named as its field, as `columns`
    says or as in ALIASES. Numbers and lists are written as in JSON or Python: 1.5, ["a", "b"]."""
    cells = {key.lower(): value for key, value in row.items() if value not in (None, "")}
    sample = {"source_line": source_line}
    for field, expected in FIELDS.items():
        for name in (column_of(field, columns), field, *ALIASES.get(field, ())):
            if name in cells:
                sample[field] = cell_value(cells[name], expected)
                break
    return checked(sample, source_line)


def column_of(field: str, columns: Sequence[str]) -> str | None:
    """The column that --columns names for a field, in lower case, or None."""
    for column in columns:
        name, equals, value = column.lower().partition("=")
        if not equals or name not in FIELDS:
            raise DataError(f"--columns {column}: expected FIELD=COLUMN, with a FIELD of "
                            f"{', '.join(FIELDS)}")
        if name == field:
            return value
    return None


def cell_value(cell: object, expected: str) -> object:
    """What a cell of a table says, if it can be read as `expected` of FIELDS, else its text."""
    cell = tidy(cell)
    if not isinstance(cell, str) or is_as_expected(cell, expected):
        return cell
    if expected == FLAG:
        cell = cell.lower()                                 # spreadsheets write TRUE
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            value = parse(cell)
            if is_as_expected(value, expected):
                return value
    return cell


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(source_line, {column in lower case: cell}) of each row of a .csv or .tsv table.

    Cells are divided by commas, tabs or semicolons, whichever the header has most of. The file is
    UTF-8, or UTF-16 with a byte order mark. DataError names the line that cannot be read."""
    with open(path, encoding=text_encoding(path), newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        lines = []                              # those of the row that is being read
        try:
            header_line = file.readline()
            delimiter = max(delimiter, ",", ";", "\t", key=header_line.count)
            file.seek(0)
            reader = csv.reader(remembered(file, lines), delimiter=delimiter)
            header = [name.strip().lower() for name in next(reader, [])]
            lines.clear()
            for cells in reader:
                number = reader.line_num - len(lines) + 1
                refuse_stray_quote(path, number, lines, cells, delimiter, len(header))
                if any(cell.strip() for cell in cells[len(header):]):
                    raise DataError(f"{path}:{number}: has {len(cells)} cells, but the first line "
                                    f"names {len(header)} columns; put a text that holds "
                                    f"{delimiter!r} in quotes")
                if cells:
                    yield f"{path}:{number}", dict(zip(header, cells))
                lines.clear()
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num - len(lines) + 1}: the row that begins here "
                            f"cannot be read ({error}); does each quote in it close?") from None
        except UnicodeError:
            raise DataError(f"{path}:{undecodable_line(path)}: is not UTF-8; save the table again "
                            'as UTF-8 (a spreadsheet calls it "CSV UTF-8")') from None


def text_encoding(path: str | Path) -> str:
    """The encoding of a text file: UTF-16 if it begins with that byte order mark, else UTF-8."""
    with open(path, "rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def undecodable_line(path: Path) -> int:
    """The number, from 1, of the line of a file that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeError:
                return number
    return number


def remembered(lines: Iterable[str], memory: list[str]) -> Iterator[str]:
    """The lines; each is also appended to `memory`."""
    for line in lines:
        memory.append(line)
        yield line


def refuse_stray_quote(path: Path, number: int, lines: list[str], cells: list[str],
                       delimiter: str, columns: int) -> None:
    """DataError if a quote that is never closed has swallowed the rows after it.

    lines: those of one row, `number` is that of the first. cells: of the row. In a row over
    several lines that is written as it should be each quote closes, and no line of a cell looks
    like a row itself."""
    if len(lines) < 2:
        return
    is_open = "".join(lines).count('"') % 2 == 1
    for cell in cells:
        for line in re.split(r"\r\n|\r|\n", cell)[1:]:
            is_open = is_open or looks_like_row(line, delimiter, columns)
    if is_open:
        quotes = itertools.accumulate(line.count('"') for line in lines)
        number += [count % 2 for count in quotes].index(1)
        raise DataError(f"{path}:{number}: a quote that opens here swallows the rows after it; "
                        "close it, or write it twice in a cell that is in quotes")


def looks_like_row(line: str, delimiter: str, columns: int) -> bool:
    """Whether a line of a cell is rather a row of a table: it holds a tab where tabs divide cells,
    or has several cells, one of which is a clip's file name or an id such as video7010."""
    cells = [cell.strip(' "') for cell in line.split(delimiter)]
    if len(cells) < 2:
        return False
    if delimiter == "\t":
        return True
    for cell in cells:
        is_id = len(cells) >= columns and re.fullmatch(r"[\w/.-]*\d[\w/.-]*", cell)
        if cell.lower().endswith(MEDIA) or is_id and len(cell) > 2:
            return True
    return False


# ==== Order of visits =============================================================================

def mix(*numbers):
    """A 64-bit hash of integers: the source of every keyed random choice."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def shuffled(i, n, seed):
    """The i-th element of a pseudo-random permutation of range(n), without a list of it: a Feistel
    network permutes the smallest even number of bits that holds n; values of n or more walk on."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for step in range(4):
            left, right = right, left ^ (mix(seed, step, right) & low)
        i = left << half | right
        if i < n:
            return i


class Batches:
    """Lists of (sample, draw), one a forward pass: a function of (seed, step, pass) only.
    sizes: lines of each manifest. batch: clips of one optimiser step, cut into world * accumulate
    passes, of which rank r has the r-th `accumulate`. Each reads one manifest, so that VTM's
    negatives never cross data sets, in proportion to `shares` (default: to their lines). Hence any
    number of processes with passes of one size sees the same passes (of one manifest: of any size),
    and a run that goes on at step `start`, to step `steps`, replays and skips nothing."""

    def __init__(self, sizes, batch, seed, rank=0, world=1, start=0, accumulate=1, steps=1,
                 shares=()):
        self.passes = world * accumulate                            # of a step
        if shares and (len(shares) != len(sizes) or min(shares) <= 0):
            raise DataError(f"--mix {' '.join(map(str, shares))}: expected {len(sizes)} positive "
                            "numbers, one for each manifest of --data")
        self.sizes, self.seed, self.shares = sizes, seed, shares or sizes
        self.size, self.steps = batch // self.passes, range(start, steps)
        self.mine = range(rank * accumulate, (rank + 1) * accumulate)

    def __len__(self):
        return len(self.steps) * len(self.mine)

    def __iter__(self):
        for step, number in itertools.product(self.steps, self.mine):
            yield self.visits(step * self.passes + number)

    def visits(self, number):
        """(sample, draw) of the clips of pass `number`, counted from the run's first."""
        before, left = number, sum(self.shares)
        for which, share in enumerate(self.shares):
            # floor(x + phase) rises by 0 or 1 a pass, in the long run `share` of `left` times
            ours, left = share / left, left - share
            phase = mix(self.seed, which) / 2 ** 64
            taken = int(before * ours + phase)
            if int((before + 1) * ours + phase) > taken or which == len(self.shares) - 1:
                before = taken if ours < 1 else before
                break
            before -= taken                                         # passes left for the others
        n, first = self.sizes[which], sum(self.sizes[:which])
        return [(first + shuffled(visit % n, n, mix(self.seed, which, visit // n)),
                 number * self.size + i)
                for i, visit in enumerate(range(before * self.size, (before + 1) * self.size))]


# ==== Clip: frames, pixels, words =================================================================

def sample_frames(n, frames, train, view=0, views=1):
    """TSN sparse sampling, Sec. 3.1: `frames` ascending indices, one in each equal segment of n.
    n: frames of the clip, at least 1. train: a random one of the segment (torch's generator), every
    frame possible; else the segment's centre or, for view v of K (the 3 x 3 frames of Tab. 2 to 4),
    the centre of its v-th K-th. Where n < frames some are repeated, in order."""
    picked = []
    for i in range(frames):
        low = i * n // frames
        length = max((i + 1) * n // frames - low, 1)
        offset = int(torch.randint(length, ())) if train else length * (2 * view + 1) // (2 * views)
        picked.append(low + offset)
    return picked


# A frame of these that no other frame refers to is known by its header and may be left undecoded.
SKIPPABLE = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
# PyAV before 19 refuses titles that are not UTF-8 unless told; 19 has no such argument.
OPEN = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


class Doubtful(Unreadable):
    """Frames that are damaged, or that the packets' times do not place for sure."""


class Member(NamedTuple):
    """A clip inside a larger file, such as an uncompressed .tar: where its bytes begin, how many
    there are, and its name for messages."""
    offset: int
    size: int
    name: str = ""


RESIZE = ("release", "paper", "proportions")    # how a stored frame becomes a square: read_frames


def read_frames(sample: dict, pick: Callable[[int], Sequence[int]], image_size: int,
                resize: str, train: bool, boxes: bool = True) -> torch.Tensor:
    """The chosen frames of a sample as uint8 (S, 3, image_size, image_size), contiguous.

    pick: function of n, the number of frames in the sample's window, to the S numbers wanted.
    resize: "release" scales the whole frame to a square of 1.2 x image_size, whatever its
    proportions, and "proportions" its shorter side to as much; both then crop a square of
    image_size, at random in training, else the centre. "paper" scales the whole frame to the square
    (Sec. 4.1.1). boxes: draw the sample's "boxes" (VCR, Tab. 5 "Mask"). A sample that has boxes is
    always scaled whole, drawn or not, since a crop could cut off what its question asks for.
    Unreadable.
    """
    path, member = sample["video"], sample.get("member")
    if member:
        check_member(sample)
        member = Member(member["offset"], member["size"], member["name"])
    window = {name: sample.get(name) for name in ("start", "end", "fps")}
    larger = int(1.2 * image_size)                                          # 268 for 224
    if sample.get("boxes"):
        video = decode(path, pick, None, member=member, **window)           # as stored
        if boxes:
            video = draw_boxes(video, sample["boxes"])
        return v2.functional.resize(video, [image_size, image_size])
    if resize == "paper":
        return decode(path, pick, (image_size, image_size), member=member, **window)
    size = (larger, larger) if resize == "release" else larger
    return crop(decode(path, pick, size, member=member, **window), image_size, train)


def decode(path, pick, size=None, start=None, end=None, fps=None, member=None):
    """Exactly the chosen frames of a clip, decoding as little else as their codec allows.
    path: a video, an image (one frame) or a folder of frames, `fps` of them a second. pick:
    function of n, the frames that there are, to the list of wanted indices, repeats allowed. size:
    pixels of the shorter side, the proportions kept, or (height, width); None: as stored. start,
    end: seconds after the first frame; the n frames are those shown in [start, end). Returns uint8
    RGB (S, 3, h, w) in the order picked, upright, each pixel that of a full decode. Unreadable."""
    try:
        chosen = partial(choose, path, pick, size, start, end)
        if os.path.isdir(path):
            return chosen(*folder_frames(path, fps, start, end))
        try:
            container, stream = open_video(path)
            with container:
                return chosen(*planned_frames(path, container, stream, start, end))
        except (Doubtful, av.FFmpegError):
            # The plain decode from the first frame is the definition of a clip's frames: where the
            # plan fails it either succeeds or says what is wrong with the file.
            return chosen(*serial_frames(path))
    except (av.FFmpegError, ValueError, OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"{path}: cannot be decoded ({reason}); replace or re-encode it"
                         ) from error


def choose(path, pick, size, start, end, seconds, frames):
    """The frames that `pick` chooses, as `decode` returns them.
    seconds: when each frame is shown, counted from the first. frames: a function of ascending
    numbers of frames, which yields (number, frame) of these and of any others, in order."""
    if not seconds:
        raise Unreadable(f"{path}: holds no frame; the file is truncated or not a video")
    first = 0 if start is None else bisect.bisect_left(seconds, start)
    last = len(seconds) if end is None else bisect.bisect_left(seconds, end)
    if first >= last and 0 < first < len(seconds):
        first, last = first - 1, first                  # the one on display at `start`
    if first >= last:
        raise Unreadable(f"{path}: no frame lies between the sample's start and end; check them")
    targets = [first + k for k in pick(last - first)]
    missing, found, damaged, reformatter = set(targets), {}, False, VideoReformatter()
    for number, frame in frames(sorted(missing)):
        damaged = frame.is_corrupt or damaged and not frame.key_frame       # predicted from damage
        if number not in missing:
            continue
        if damaged:
            raise Doubtful(f"{path}: damaged around {seconds[number]:.2f} s; encode it again")
        if not isinstance(size, tuple):                 # all are sized as the first one is
            short = min(frame.width, frame.height)
            scale = (size or short) / short
            size = round(frame.height * scale), round(frame.width * scale)
        rgb = reformatter.reformat(frame, size[1], size[0], format="rgb24", threads=1,
                                   interpolation=Interpolation.BILINEAR)
        upright = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90))
        found[number] = torch.from_numpy(upright).permute(2, 0, 1)
        missing.remove(number)
        if not missing:
            return torch.stack([found[number] for number in targets])
    raise Doubtful(f"{path}: holds fewer frames than it says; replace or re-encode it")


def open_video(path):
    """(container, its first real video stream, set to decode on one thread)."""
    if not os.path.exists(path):
        raise Unreadable(f"{path}: no such file")
    container = av.open(str(path), **OPEN)
    for stream in container.streams.video:
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if stream.codec_context and not cover and container.format.name != "tty":   # a text file
            stream.codec_context.thread_count = 1   # the reading processes are the parallelism
            return container, stream
    raise Unreadable(f"{path}: has no video stream with a known codec; re-encode it as H.264")


def duration(path):
    """Seconds that a clip lasts, by its header; 0 where it says nothing or cannot be read."""
    try:
        container, stream = open_video(path)
        with container:                             # its sound may last longer than its picture
            return float(stream.duration * stream.time_base if stream.duration
                         else (container.duration or 0) / av.time_base)
    except (av.FFmpegError, Unreadable):
        return 0.0


def guessed(container, stream):
    """Whether pts are made up: AVI stores none, which shows where frames are reordered."""
    return container.format.name == "avi" and stream.codec_context.has_b_frames


def every_frame(path):
    """Yield (seconds after the first, frame) of a plain decode, first packet to last."""
    container, stream = open_video(path)
    rate, first = stream.average_rate or 1, None
    with container:
        for i, frame in enumerate(container.decode(stream)):
            first = frame.pts if first is None else first
            timed = frame.pts is not None and not guessed(container, stream)
            yield float((frame.pts - first) * frame.time_base if timed else i / rate), frame


def serial_frames(path):
    """(seconds, frames) for `choose`: decoded from the first, once to count and once to keep."""
    return ([second for second, _ in every_frame(path)],
            lambda numbers: enumerate(frame for _, frame in every_frame(path)))


def folder_frames(path, fps, start, end):
    """(seconds, frames) for `choose` of a folder of images, 2.jpg before 10.jpg."""
    if not fps and (start is not None or end is not None):
        raise Unreadable(f"{path}: a folder of frames has no times; give their rate as "
                         '"fps", or drop "start" and "end"')
    names = [name for name in os.listdir(path) if name.lower().endswith(IMAGES)]
    names.sort(key=lambda name: [int(part) if part.isdigit() else part
                                 for part in re.split(r"(\d+)", name)])
    return ([i / (fps or 1) for i in range(len(names))],
            lambda numbers: ((i, frame) for i in numbers
                             for _, frame in every_frame(os.path.join(path, names[i]))))


def planned_frames(path, container, stream, start, end):
    """(seconds, frames) for `choose`, times and keyframes from packet headers: exact for any frame
    rate, in any container with pts. Decoding goes from a keyframe to the last frame wanted before
    the next: so a seek never costs a decoded frame and always saves some. Unreadable if cut off."""
    tick, origin, index = stream.time_base, stream.start_time or 0, stream.index_entries
    low, high = (None if t is None else origin + t / float(tick) for t in (start, end))
    truncated = len(index) > 0 and index[-1].pos + index[-1].size > os.path.getsize(path)
    if guessed(container, stream):
        raise Doubtful
    if low is not None:
        container.seek(int(low), stream=stream)
    pts, keys, last = [], [], {}                    # last: the last packet of each stream
    for packet in container.demux():
        if packet.size == 0:
            continue                                # the empty packets that end the streams
        last[packet.stream.index] = packet
        if packet.stream.index != stream.index:
            continue
        truncated |= packet.is_corrupt
        if packet.pts is None:
            raise Doubtful
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:                   # decoded but outside an MP4's edit list
            pts.append(packet.pts)
        if high is not None and packet.dts is not None and packet.dts >= high:
            break
    if container.format.name.startswith("matroska") and low is high is None:
        # a sound may go on after the last picture, but something lasts as long as the header says
        lasts = max((float(p.pts * p.time_base) for p in last.values() if p.pts), default=0)
        truncated |= lasts < 0.9 * (container.duration or 0) / av.time_base - 1
    if truncated:
        raise Unreadable(f"{path}: the file is truncated or damaged; fetch or encode it again")
    late = keys and low is not None and keys[0] > max(low, origin)
    if late or not keys or len(set(pts)) < len(pts):
        raise Doubtful
    pts, keys = sorted(pts), sorted(keys)

    def keyframe(time):
        return keys[max(bisect.bisect_right(keys, time) - 1, 0)]

    def frames(numbers):
        number = {pts[i]: i for i in numbers}
        for key, wanted in itertools.groupby(number, keyframe):
            for frame in decode_group(container, stream, key, set(wanted)):
                yield number.get(frame.pts), frame

    return [(time - origin) * tick.numerator / tick.denominator for time in pts], frames


def decode_group(container, stream, key, missing):
    """Yield frames from the keyframe at `key` to the last `missing` (a set of pts). Frames that
    nothing refers to are skipped unless missing, which changes no pixel of the rest."""
    context, started = stream.codec_context, False
    container.seek(key, stream=stream)
    for packet in container.demux(stream):
        if packet.size == 0 or not missing:
            break
        started = started or packet.pts == key
        if not started:
            continue
        skip = context.name in SKIPPABLE and packet.pts not in missing
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        missing.discard(packet.pts)
        yield from context.decode(packet)
    # Flushing hands out what the decoder holds back for reordering, without decoding further.
    yield from context.decode(None)


def crop(video, size, train):
    """uint8 (..., 3, size, size) of uint8 (..., 3, h, w) with h, w >= size, alike for all frames:
    random in training, else the centre. Normalisation happens on the model's device."""
    square = v2.RandomCrop(size)(video) if train else v2.functional.center_crop(video, [size, size])
    return square.contiguous()      # a view would send the pixels around the square along with it


def draw_boxes(video, boxes):
    """VCR, Sec. 4.2.4, Fig. 5: a mask around each entity in its own colour. uint8 (S, 3, h, w).
    boxes: [[identity, x0, y0, x1, y1], ...] in pixels of the frames. As the release: 0.7 of the
    image, 0.3 of the colour, an outline of 3 pixels. Hues are a golden section apart."""
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.618034 * identity % 1, 1, 1))
               for identity, *_ in boxes]
    corners = torch.tensor([corners for _, *corners in boxes], dtype=torch.float32)
    x, y = torch.arange(video.shape[3]), torch.arange(video.shape[2])[:, None]
    masks = torch.stack([(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
                         for x0, y0, x1, y1 in corners])           # (boxes, h, w)
    filled = [draw_segmentation_masks(frame, masks, 0.3, colours) for frame in video]
    return torch.stack([draw_bounding_boxes(frame, corners, colors=colours, width=3)
                        for frame in filled])


def texts_of(sample):
    """Every text that a sample may be read with."""
    texts = [sample[field] for field in ("text", "question") if field in sample]
    texts += [text for _, _, text in sample.get("captions", [])]
    return texts + sample.get("texts", []) + sample.get("options", [])


def right_option(sample):
    """The index of the right one of a sample's options; DataError."""
    options, answer = sample["options"], sample.get("answer")
    if answer in options:
        answer = options.index(answer)
    elif isinstance(answer, str) and answer.isdigit():              # a cell of a table
        answer = int(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(f'{sample["where"]}: "answer" is {answer!r}; expected an index into the '
                        f"{len(options)} options, from 0, or one of them")
    return answer


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Tokenizer:
    """BERT's tokenisation (lower case, accents stripped, WordPiece) over `tokenizers`.
    Attributes: pad_id, unk_id, cls_id, sep_id, mask_id, vocab_size, `ordinary` (int64, the ids that
    are words or pieces, not [specials] or [unusedN]) and `pieces` (the set of ids of '##' pieces).
    """

    def __init__(self, words):
        words.no_truncation()
        words.no_padding()                      # what a tokenizer.json may carry is decided here
        self.words, vocabulary = words, words.get_vocab()
        if missing := [token for token in SPECIALS if token not in vocabulary]:
            raise DataError(f"the vocabulary lacks {', '.join(missing)}; give one made for BERT")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocabulary[token] for token in SPECIALS)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 2 * len(vocabulary) + 1000:       # 4 kB of weights for each at B
            raise DataError("the vocabulary is not numbered from 0 without large gaps")
        self.ordinary = torch.tensor(sorted(
            i for token, i in vocabulary.items() if not re.fullmatch(r"\[\w+\]", token)))
        self.pieces = {i for token, i in vocabulary.items() if token.startswith("##")}

    @staticmethod
    def load(name, text=None):
        """A local vocab.txt or tokenizer.json, else a Hugging Face name, fetched; or `text`, what
        words.to_str() gave, called `name` in errors. DataError."""
        path = Path(name)
        try:
            if text is not None:
                words = WordPieces.from_str(text)
            elif path.suffix == ".json":
                words = WordPieces.from_file(str(path))
            elif path.is_file() or path.suffix == ".txt":       # a file's name: not fetched
                words = BertWordPieceTokenizer.from_file(str(path))
            else:
                words = WordPieces.from_pretrained(str(name))
            words.encode("a word that is in no vocabulary")     # an unk_token that is none shows
        except Exception as error:         # tokenizers raises bare Exception, whatever went wrong
            raise DataError(f"{name} cannot be read, nor fetched as a vocabulary "
                            f"({str(error).splitlines()[0]:.120}); with no network, give the path "
                            "of a local vocab.txt or tokenizer.json") from None
        return Tokenizer(words)

    @staticmethod
    def train(texts, vocab_size):
        """A WordPiece vocabulary of the texts' own words, at most `vocab_size` tokens: the most
        frequent words whole, and every letter and '##letter' met to spell the others. (The trainer
        of `tokenizers` breaks ties by hash order: no two runs give the same vocabulary.)"""
        words, count = BertWordPieceTokenizer(), collections.Counter()
        for text in texts:
            text = words.normalizer.normalize_str(text)
            count.update(word for word, _ in words.pre_tokenizer.pre_tokenize_str(text))
        letters = sorted(set().union(*count))
        spelling = SPECIALS + letters + ["##" + letter for letter in letters]
        frequent = sorted(count, key=lambda word: (-count[word], word))
        tokens = list(dict.fromkeys(spelling + frequent))[:max(vocab_size, len(spelling))]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return Tokenizer(BertWordPieceTokenizer(vocabulary))

    def encode(self, text, max_len, first=None):
        """Ids of [CLS] text [SEP], or [CLS] first [SEP] text [SEP], at most max_len: where they are
        too many, `first` (the question) loses its last words; `text` only where too long alone."""
        head, body = (self.words.encode(part or "", add_special_tokens=False).ids
                      for part in (first, text))
        room = max_len - (3 if head else 2)
        body = body[:room]
        head = head[:room - len(body)] + [self.sep_id] if head else []
        return [self.cls_id] + head + body + [self.sep_id]


def mask_tokens(ids, tokenizer, whole_words=False, p=0.15):
    """MLM, Sec. 3.3: each word token is chosen with probability p, to be told from its context.
    ids: list of token ids. Of those chosen 80 % become [MASK], 10 % a random word and 10 % stay;
    [CLS], [SEP] and [PAD] are never chosen. whole_words: '##' pieces are chosen with their head.
    Returns (masked ids, positions chosen, original ids there). Draws from torch's global generator.
    """
    fixed = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id}
    masked, positions, chosen, ordinary = list(ids), [], False, tokenizer.ordinary
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
                masked[position] = int(ordinary[torch.randint(len(ordinary), ())])
    return masked, positions, [ids[position] for position in positions]


def vtm_pairs(captions, videos, generator=None):
    """VTM, Sec. 3.3: (source, labels): which clip's video each text of a group meets, and 1 if its
    own. captions, videos: one hashable per clip. Each keeps its own video with probability 0.5,
    else takes that of another clip of the group, of another video and caption, if there is one."""
    source, labels = [], []
    for i, (caption, video) in enumerate(zip(captions, videos)):
        others = [j for j in range(len(captions)) if captions[j] != caption and videos[j] != video]
        swap = bool(torch.rand((), generator=generator) < 0.5) and bool(others)
        partner = int(torch.randint(max(len(others), 1), (), generator=generator))
        source.append(others[partner] if swap else i)
        labels.append(int(not swap))
    return source, labels


# ==== Batch: samples, readers that survive their files ============================================

MIN_WINDOW = 4.0        # seconds to which a drawn caption's window is widened, as in the release
MAX_SKIPS = 100         # unreadable lines in a row after which training cannot be meant to go on


def answers_of(manifest):
    """The classes of open-ended QA (Sec. 4.2.1) and probes: answers.json beside the first training
    manifest, as `convert` writes it, else every answer of the manifests, the commonest first."""
    listed = Path(manifest.names[0]).parent / "answers.json"
    every = (str(sample["answer"]) for sample in manifest if "answer" in sample)
    if listed.is_file():
        try:
            answers = dict.fromkeys(map(str, json.loads(listed.read_text("utf-8"))))
        except (ValueError, TypeError) as error:
            raise DataError(f"{listed}: not a JSON list of answers ({error})") from None
        if not any(answer in answers for answer in every):
            raise DataError(f"{listed}: holds no answer of {manifest.names[0]}; is it another's?")
        return list(answers)
    answers = [answer for answer, _ in collections.Counter(every).most_common()]
    if not answers:
        raise DataError(f'{manifest.names[0]}: no line has an "answer"; expected '
                        '{"video": ..., "answer": "a word"}, for open-ended QA a "question" too')
    return answers


@dataclass(eq=False)
class Clips:
    """A manifest's samples as tensors: `clips[index, draw]`, `draw` keying all randomness.
    Items are dicts of "video" uint8 (S, 3, H, W), S = 1 for an image, or (K, S, 3, H, W) if
    views > 1, "ids" (a list of token-id lists), "label", "caption", "clip", "kind", "index",
    "draw", "set" (which manifest), "where"; to pretrain, "mlm" = (masked ids, positions, labels).
    "errors" tells why there is no "video". DataError if a line lacks what the task needs."""
    manifest: Manifest
    tokenizer: Tokenizer
    task: str                   # pretrain, retrieval, choice, qa, probe: see read_words
    frames: int                 # S
    image_size: int             # pixels of the crop
    max_text_len: int           # tokens
    train: bool                 # random frames, crops, captions, masks
    seed: int = 0
    views: int = 1              # K temporally different draws of S frames, in evaluation
    squash: bool = False        # whole frames resized (Sec. 4.1.1), not scaled to 1.2 and cropped
    order: str = "kept"         # of frames, in evaluation: shuffled, reversed or the first, S times
    boxes: bool = True          # VCR: draw the entities' regions (Tab. 5, "Mask")
    whole_word_masking: bool = False
    answers: list = None        # the classes of qa and probe
    false_texts: int = 0        # retrieval in training: captions of other lines, as options

    def __post_init__(self):
        self.labels = {answer: i for i, answer in enumerate(self.answers or [])}

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        index, draw = key
        sample, (which, line) = self.manifest[index], self.manifest.locate(index)
        where = sample["where"]
        item = {"index": index, "draw": draw, "set": which, "where": where, "errors": []}
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs too, at a fifth of the cost of a small clip
            torch.default_generator.manual_seed(mix(self.seed, draw))
            item |= self.read_words(sample)
            others = torch.randint(self.manifest.sizes[which], (self.false_texts,)).tolist()
            texts = [self.captions(self.manifest[index - line + i])[0] for i in others]
            item["ids"] += [self.encode(text) for text in texts if text not in texts_of(sample)]
            try:
                item["video"] = self.read_video(sample)
            except Unreadable as error:
                item["errors"].append(f"{where}: {error}")
        return item | {"clip": sample["video"], "kind": sample.get("kind")}

    def read_video(self, sample):
        """uint8 ([K,] S, 3, H, W) of a sample, cropped."""
        frames = 1 if is_image(sample) else self.frames
        size, views = self.image_size, 1 if self.train else self.views

        orders = {"first": [0] * frames, "reversed": range(frames)[::-1]}
        order = orders.get(self.order, range(frames))
        if self.order == "shuffled":
            order = torch.randperm(frames).tolist()

        def pick(n):
            views_of = [sample_frames(n, frames, self.train, v, views) for v in range(views)]
            return [picked[s] for picked in views_of for s in order]

        boxes = sample.get("boxes") if self.boxes else None
        side = None if boxes else (size, size) if self.squash else int(1.2 * size)   # release: 268
        video = decode(sample["video"], pick, side, *map(sample.get, ("start", "end", "fps")))
        if boxes:       # in pixels of the stored image: draw, then scale; a crop may cut them off
            video = v2.functional.resize(draw_boxes(video, boxes), [size, size])
        video = crop(video, size, self.train)
        return video.unflatten(0, (views, frames)) if views > 1 else video

    def read_words(self, sample):
        """The token ids and the label of a sample; may set its window to that of a caption.
        pretrain: a caption, and masked; retrieval: a caption in training, all in evaluation;
        choice: the options, each after the question; qa: the question; probe: no words."""
        question = sample.get("question")
        if self.task in ("pretrain", "retrieval"):
            captions = self.captions(sample)
            words = {"ids": [self.encode(text) for text in captions], "caption": captions[0],
                     "label": 0}
            if self.task == "pretrain":
                words["mlm"] = mask_tokens(words["ids"][0], self.tokenizer, self.whole_word_masking)
            return words
        if self.task == "choice":
            return {"ids": [self.encode(option, question) for option in need(sample, "options")],
                    "label": right_option(sample)}
        text = need(sample, "question") if self.task == "qa" else ""
        return {"ids": [self.encode(text)], "label": self.class_of(sample)}

    def class_of(self, sample):
        """The number of a sample's answer among the classes, -1 if it is none of them."""
        return self.labels.get(str(need(sample, "answer")), -1)

    def captions(self, sample):
        """The captions of a sample to read on this visit: one in training, in evaluation all or,
        of windows, the first."""
        texts = sample.get("captions") or sample.get("texts") or [need(sample, "text")]
        one = int(torch.randint(len(texts), ())) if self.train else 0
        if "captions" in sample:
            start, end, text = texts[one]
            middle, half = (start + end) / 2, max(end - start, MIN_WINDOW) / 2
            sample["start"], sample["end"] = max(middle - half, 0), middle + half
            return [text]
        return texts[one:one + 1] if self.train or self.task == "pretrain" else texts

    def encode(self, text, first=None):
        return self.tokenizer.encode(text, self.max_text_len, first)


def collate(items, clips, group=None):
    """Items of Clips to one batch: B clips, m tokens of the longest text rounded up to 8.
    "video" uint8 (B, S, 3, H, W) or (B, K, S, 3, H, W); "text_ids" int64, "text_mask" bool (B, m);
    "label", "index", "set" int64 (B,); "where", "kind" lists of B; "errors", what could not be
    read, which is left out of all else (B may then be 0, and "index" the only tensor).
    Choice, and retrieval in training: "text_ids", "text_mask" (B, O, m), "option_mask" bool (B, O),
    False where a clip has fewer than O options. Retrieval in evaluation: "text_ids", "text_mask"
    (T, m) and "text_clip" int64 (T,), the row of each caption's clip.
    Pre-training: "mlm_ids" (B, m), "mlm_where" (M,) positions in the flattened (B*m), "mlm_labels"
    (M,), M padded to a multiple of 32 by where 0, label -100; "vtm_source", "vtm_labels" (B,) drawn
    within consecutive groups of `group` clips (default: all), by (seed, the group's first draw)."""
    errors = [error for item in items for error in item["errors"]]
    kept = [k for k, item in enumerate(items) if "video" in item]
    items = [items[k] for k in kept]
    batch = {name: [item[name] for item in items] for name in ("index", "where", "kind")}
    batch |= {"index": torch.tensor(batch["index"], dtype=torch.int64), "errors": errors}
    if not items:
        return batch
    batch |= {name: torch.tensor([item[name] for item in items]) for name in ("label", "set")}
    if len({item["video"].shape for item in items}) > 1:
        odd = next(item for item in items if item["video"].shape != items[0]["video"].shape)
        raise DataError(f'{odd["where"]}: images and clips in one manifest, as {items[0]["where"]} '
                        "is of the other kind: give the images a manifest of their own")
    batch["video"] = torch.stack([item["video"] for item in items])
    counts = torch.tensor([len(item["ids"]) for item in items])
    texts = [ids for item in items for ids in item["ids"]]
    m, padding = min(-(-max(map(len, texts)) // 8) * 8, clips.max_text_len), clips.tokenizer.pad_id
    ids = pad(texts, m, padding)
    mask = torch.arange(m) < torch.tensor([len(text) for text in texts])[:, None]
    if clips.task == "choice" or clips.task == "retrieval" and clips.train:
        batch["option_mask"] = torch.arange(int(counts.max())) < counts[:, None]    # (B, O)
        for name, rows, value in ("ids", ids, padding), ("mask", mask, False):
            batch[f"text_{name}"] = torch.nn.utils.rnn.pad_sequence(
                rows.split(counts.tolist()), True, value)                           # (B, O, m)
        return batch
    batch |= {"text_ids": ids, "text_mask": mask, "text_clip": torch.repeat_interleave(counts)}
    if clips.task != "pretrain":
        return batch
    masked, positions, labels = zip(*[item["mlm"] for item in items])
    where = [row * m + position for row, places in enumerate(positions) for position in places]
    extra, source, matches = -len(where) % 32 if where else 32, [], []
    for _, near in itertools.groupby(range(len(items)), lambda b: kept[b] // (group or 10 ** 9)):
        near = list(near)
        chosen, match = vtm_pairs(
            [items[b]["caption"] for b in near], [items[b]["clip"] for b in near],
            torch.Generator().manual_seed(mix(clips.seed, items[near[0]]["draw"], 1)))
        source += [near[i] for i in chosen]
        matches += match
    return batch | {"mlm_ids": pad(masked, m, padding),
                    "mlm_where": torch.tensor(where + [0] * extra),
                    "mlm_labels": torch.tensor(sum(labels, []) + [-100] * extra),
                    "vtm_source": torch.tensor(source), "vtm_labels": torch.tensor(matches)}


def pad(rows, length, value):
    """Lists of unequal length as int64 (len(rows), length), filled up with `value`."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


class Readers:
    """`function` in processes that may die or hang: each is minded by a thread, which replaces it.
    Calling it answers one task, or raises Unreadable if the task killed its process twice (once may
    be an accident) or took longer than `timeout` seconds. workers = 0: here, unprotected. (A
    DataLoader tells of a dead worker by an exception anywhere in the main thread.)"""

    def __init__(self, function, workers, timeout):
        self.function, self.workers, self.timeout = function, workers, timeout
        self.mine, self.processes, self.closed = threading.local(), [], False
        self.lock = threading.Lock()    # to start one process and to ask for another's exit code
        # Fresh processes, without our threads and locks; a fork server imports torch once for all.
        # (In Python 3.11 it finds installed packages only, not this file.)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["av", "tokenizers", "torchvision.transforms.v2"])

    def start(self):
        """(process, our end of the pipe to it) for the thread that calls."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, daemon=True,
                                       args=(self.function, theirs, self.timeout))
        with self.lock:
            process.start()
        self.processes.append(process)
        theirs.close()
        return process, ours

    def __call__(self, task):
        if not self.workers:
            return self.function(task)
        for attempt in range(2):
            if self.closed:
                raise Unreadable("reading has ended")
            process, pipe = self.mine.reader = getattr(self.mine, "reader", None) or self.start()
            try:
                pipe.send(task)
                result, error = pipe.recv()
            except (EOFError, ConnectionError):     # it has died
                self.mine.reader = None
                with self.lock:
                    process.join()
                if process.exitcode == -signal.SIGALRM:
                    raise Unreadable(f"took longer than {self.timeout:g} s to read") from None
                continue
            if error is not None:
                raise error
            return result
        raise Unreadable(f"took its reader down (exit code {process.exitcode})")

    def ahead(self, work, tasks, depth):
        """Yields work(task) for each task, in order, computed by threads `depth` tasks ahead."""
        if not self.workers:
            yield from map(work, tasks)
            return
        pool, pending = ThreadPoolExecutor(self.workers), collections.deque()
        try:
            for task in tasks:
                pending.append(pool.submit(work, task))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.closed = True
            for process in self.processes:
                process.kill()


def serve(function, pipe, timeout):
    """A process of Readers: answers task after task, until nobody asks any more. A task that takes
    too long ends the process: SIGALRM does, also in the middle of a decoder."""
    torch.set_num_threads(1)                        # the processes are the parallelism
    with suppress(EOFError, ConnectionError):       # the trainer is gone, however it ended
        while True:
            task = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                answer = function(task), None
            except Exception as error:              # raised again where the task came from
                answer = None, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)


def load(clips, passes, merge, workers, timeout=120):
    """Yields merge(items) for each list of (sample, draw) in `passes`, in order, read ahead.
    In training the next readable line of a manifest stands in for a clip that cannot be read, which
    the item's "errors" name; in evaluation nothing does. A clip that killed its reader, or took
    longer than `timeout` seconds, is unreadable from then on."""
    readers, refused = Readers(clips.__getitem__, workers, timeout), {}

    def visit(key):
        errors, (index, draw) = [], key
        tries = min(MAX_SKIPS, clips.manifest.sizes[clips.manifest.locate(index)[0]])
        for at in (clips.manifest.after(index, step) for step in range(tries)):
            try:
                if at in refused:
                    raise refused[at]
                item = readers((at, draw))
            except Unreadable as error:
                refused[at], where = error, clips.manifest[at]["where"]
                item = {"index": at, "draw": draw, "where": where, "errors": [f"{where}: {error}"]}
            errors += item["errors"]
            if "video" in item or not clips.train:
                return {**item, "errors": errors}
        raise DataError(f"{tries} clips in a row cannot be read, the first: {errors[0]}")

    passes, sizes = itertools.tee(passes)
    keys = itertools.chain.from_iterable(passes)
    with closing(readers.ahead(visit, keys, 2 * max(workers, 8))) as items:
        for size in map(len, sizes):
            yield merge(list(itertools.islice(items, size)))


# ---- the toy set

SHAPES = "square", "ring"
COLOURS = {"white": 255, "black": 0}
LIGHTS = (200, 60, 60), (60, 180, 60), (60, 80, 200)
ORDERS = "green", "blue"                         # what red turns into: the way the light cycles
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
TEMPLATES = {
    "light": ("{thing} while red turns {change}", "red turns {change} around {thing}"),
    "motion": ("{thing} that moves {change}", "moving {change} a {thing}")}
DRAWING = (13, 16), (2, 3), (36, 44), (36, 44), (0.85, 1.1)     # bounds of ToyClip.drawing
SPLITS = {"train": 2000, "val": 200, "test": 400}
SIDE, TOY_FRAMES = 80, 12
TOY_X264 = {"preset": "veryfast", "qp": "15", "g": "1"}    # each frame alone, at one quantiser


@dataclass(frozen=True)
class ToyClip:
    """What one toy clip shows."""
    event: str          # "light": the light cycles, the object stays; "motion": the other way round
    shape: str
    colour: str
    motion: str
    order: int          # index into ORDERS
    first: int          # light of the first third, index into LIGHTS
    template: int
    drawing: tuple      # radius, speed (pixels a frame), centre x and y, brightness of the lights

    @staticmethod
    def drawn(draw):
        """A random one, from a random.Random."""
        return ToyClip(
            event="light" if draw.random() < 0.85 else "motion", shape=draw.choice(SHAPES),
            colour=draw.choice(list(COLOURS)), motion=draw.choice(list(MOTIONS)),
            order=draw.randrange(2), first=draw.randrange(3), template=draw.randrange(2),
            drawing=tuple(itertools.starmap(draw.uniform, DRAWING)))

    def twin(self):
        """The clip that the reversed frames show: the other order, or the opposite motion."""
        last = (self.first + (self.event == "light") * (2 - 4 * self.order)) % 3
        return replace(self, motion=OPPOSITE[self.motion], order=1 - self.order, first=last)

    def caption(self, **other):
        """The clip's caption in its own wording; keyword arguments change what it says."""
        said = replace(self, **other)
        return TEMPLATES[said.event][said.template].format(
            thing=f"{said.colour} {said.shape}",
            change=ORDERS[said.order] if said.event == "light" else said.motion)

    def frames(self):
        """uint8 (12, 80, 80, 3): three thirds of four frames."""
        (radius, speed, *centre, gain), t = self.drawing, np.arange(TOY_FRAMES)
        lights = self.first + (self.event == "light") * t // 4 * (1 - 2 * self.order)
        light = np.array(LIGHTS)[lights % 3] * gain
        frames = np.tile(light.astype(np.uint8)[:, None, None], (1, SIDE, SIDE, 1))
        travel = (t - (TOY_FRAMES - 1) / 2)[:, None] * speed * (self.event == "motion")
        x, y = (abs(np.arange(SIDE) + 0.5 - middle - travel * step).astype(np.float32)
                for middle, step in zip(centre, MOTIONS[self.motion]))          # (12, 80) each
        far = np.maximum(x[:, None, :], y[:, :, None])
        hole = (far <= 0.6 * radius) & (self.shape == "ring")
        frames[(far < radius) & ~hole] = COLOURS[self.colour]
        return frames

    def samples(self, draw):
        """Its lines of each manifest: {prefix of the manifest's name: [sample without video]}."""
        asked = [("shape", "what shape is it?", self.shape),
                 ("colour", "what colour is it?", self.colour),
                 ("order", "what does red turn into?", ORDERS[self.order])
                 if self.event == "light" else ("motion", "which way does it move?", self.motion)]
        looks = [self.caption(shape=shape, colour=colour) for shape in SHAPES for colour in COLOURS]
        looks.remove(self.caption())
        choices = {"appearance": draw.sample(looks, 3), asked[2][0]: [self.twin().caption()]}
        for options in choices.values():
            options.insert(draw.randrange(len(options) + 1), self.caption())
        return {"": [{"text": self.caption()}], "probe_": [{"answer": self.caption(template=0)}],
                "choice_": [{"options": options, "answer": options.index(self.caption()), "kind": k}
                            for k, options in choices.items()],
                "qa_": [{"question": q, "answer": a, "kind": k} for k, q, a in asked]}


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
    An object stands still while the light that fills the frame cycles through three colours one way
    or the other; or it moves in a still light, which a small model learns more slowly. Clips come
    in twins of the same frames in reverse order, equal bit for bit, so that no multiset of frames
    tells order or motion. Per split: SPLIT.jsonl (captions), choice_SPLIT (kinds "appearance",
    "order", "motion"), qa_SPLIT, probe_SPLIT, image_SPLIT (a frame of each clip, for mixtures),
    retrieval_SPLIT (the first clip of each meaning with both its wordings)."""
    root, content = Path(root), json.dumps({"seed": seed, "clips": SPLITS, "version": 3}) + "\n"
    if (root / "toy.json").is_file() and (root / "toy.json").read_text() == content:
        return root
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: is another toy set or none; give another folder or remove it")
    print(f"writing {sum(SPLITS.values())} toy clips to {root}", file=sys.stderr)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        beside = Path(folder, "toy")
        (beside / "clips").mkdir(parents=True)
        for split, count in SPLITS.items():
            toy_split(beside, split, count, random.Random(f"{seed} {split}"))
        (beside / "toy.json").write_text(content)
        if not (root / "toy.json").is_file():           # unless another job was faster
            os.rename(beside, root)
    return root


def toy_split(folder, split, count, draw):
    """Writes the clips and manifests of one split of the toy set; draw: a random.Random."""
    lines, meanings = collections.defaultdict(list), {}
    for i in range(count):
        clip = ToyClip.drawn(draw) if i % 2 == 0 else clip.twin()
        frames, texts = clip.frames(), [clip.caption(template=wording) for wording in range(2)]
        video, image = ({"video": f"clips/{split}_{i:04}.{kind}"} for kind in ("mp4", "png"))
        write_clip(folder / video["video"], frames, 4, TOY_X264)
        save_image(torch.from_numpy(frames[i % TOY_FRAMES]).permute(2, 0, 1) / 255,
                   folder / image["video"])
        for prefix, samples in clip.samples(draw).items():
            lines[prefix] += [video | sample for sample in samples]
        lines["image_"].append(image | {"text": f"{clip.colour} {clip.shape}"})
        meanings.setdefault(texts[0], video | {"texts": texts})
    for prefix, samples in (lines | {"retrieval_": meanings.values()}).items():
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{prefix}{split}.jsonl").write_text(text)


# ---- the data doctor

class Examination(NamedTuple):
    """What is known of a line after reading its clip."""
    sample: dict | None         # None: the line or its clip cannot be read
    frames: int = 0             # that the clip has
    seconds: float = 0.0        # of a CPU that reading the clip took
    fault: str = ""             # why the line cannot be used, if it cannot
    detail: str = ""            # "file:line" and the reason


def examine(task: tuple[dict, int, int]) -> tuple[int, float]:
    """(frames that a clip has, CPU seconds that reading it took), read as in training.
    task: (sample, frames to read, pixels of the crop). `check` runs this in reading processes."""
    sample, frames, image_size = task
    began = time.process_time()
    if "options" in sample:
        right_option(sample)
    elif "question" in sample or "answer" in sample:
        need(sample, "answer")
    elif not texts_of(sample):
        need(sample, "text")
    counts = []

    def pick(count: int) -> list[int]:
        counts.append(count)
        return sample_frames(count, frames, train=False)

    read_frames(sample, pick, image_size, resize="release", train=False)
    return counts[-1], time.process_time() - began


FATAL = "bad line", "missing file", "unreadable", "empty text"     # others are only reported


def check(manifest: str | Path, workers: int = os.cpu_count(), timeout: float = 60, frames: int = 3,
          image_size: int = 224, vocab: str | None = None, max_text_len: int = 40, gpu: int = 400,
          columns: Sequence[str] = ()) -> dict[str, list[str]]:
    """The data doctor: reads every sample as in training and writes the usable lines to
    NAME.clean.jsonl (of a table a.csv: a.csv.clean.jsonl).

    Prints and returns {fault: [file:line and detail]}.
    Left out of the clean manifest are bad lines, empty texts, and clips that are missing,
    unreadable, kill their reading process or take longer than --timeout seconds.
    Only reported are clips of fewer than --frames frames, texts of more than --max_text_len
    tokens of --vocab (without one: words), captions that several lines have, and lines that show
    the same clip as another line, which a retrieval test counts as different clips.
    --gpu: clips/s that a GPU trains on. The last line says how many reading processes feed it.
    """
    source = Manifest(manifest, columns)
    readers = Readers(examine, workers, timeout)
    count_tokens = token_counter(vocab)
    faults = collections.defaultdict(list)
    unusable = set()
    seconds = []
    earlier_lines = {}

    def examine_line(i: int) -> Examination:
        try:
            sample = source[i]
            task = sample, 1 if is_image(sample) else frames, image_size
            return Examination(sample, *readers(task))
        except DataError as error:
            return Examination(None, fault="bad line", detail=str(error))
        except Unreadable as error:
            fault = "missing file" if str(error).endswith("no such file") else "unreadable"
            return Examination(None, fault=fault, detail=f"{sample['source_line']}: {error}")

    for i, examined in enumerate(readers.ahead(examine_line, range(len(source)), depth=64)):
        if examined.sample is None:
            line_faults = [(examined.fault, examined.detail)]
        else:
            seconds.append(examined.seconds)
            line_faults = list(clip_faults(examined, frames))
            line_faults += text_faults(examined.sample, count_tokens, max_text_len)
            line_faults += repetitions(examined.sample, earlier_lines)
        for fault, detail in line_faults:
            faults[fault].append(detail)
            if fault in FATAL:
                unusable.add(i)
        if i % 20 == 19:
            print(f"\r{i + 1}/{len(source)} samples, {len(unusable)} bad  ", end="",
                  file=sys.stderr)
    for fault, details in sorted(faults.items()):
        print(f"\n{fault}: {len(details)}, such as")
        for detail in details[:20]:
            print(f"    {printable(detail)}")
    print(f"{len(source) - len(unusable)} of {len(source)} samples are usable: "
          f"{write_clean(source, unusable, manifest)}")
    if sum(seconds) > 0:
        rate = len(seconds) / sum(seconds)
        processes = math.ceil(gpu / rate)
        print(f"your clips decode at {rate:.0f} per CPU-second: a GPU that trains on {gpu} clips/s "
              f"needs {processes} reading processes (--workers {processes}), each with a free CPU "
              "core")
    return dict(faults)


def clip_faults(examined: Examination, frames: int) -> Iterator[tuple[str, str]]:
    """(fault, detail) of what a clip lacks for reading `frames` different frames of it."""
    sample = examined.sample
    if examined.frames < frames and not is_image(sample):
        yield "short clip", (f"{sample['source_line']}: has {examined.frames} frames, fewer than "
                             f"{frames}")


def text_faults(sample: dict, count_tokens: Callable[[str], int],
                max_text_len: int) -> Iterator[tuple[str, str]]:
    """(fault, detail) of each text of a sample that is empty or will be cut."""
    for text in texts_of(sample):
        if not text.strip():
            yield "empty text", sample["source_line"]
        elif count_tokens(text) > max_text_len:
            yield "text too long", f"{sample['source_line']}: {text:.60}..."


def repetitions(sample: dict, earlier_lines: dict[int, str]) -> Iterator[tuple[str, str]]:
    """(fault, detail) if an earlier line has the same caption, or is of the same clip.
    earlier_lines: {hash of a caption or a clip: its line}, to which this line is added."""
    source_line = sample["source_line"]
    text = sample.get("text")
    if text:
        line = earlier_lines.setdefault(hash(text), source_line)
        if line != source_line:
            yield "duplicate caption", f"{source_line}: as {line}: {text:.60}"
    if text or "texts" in sample:
        member = sample.get("member", {})
        shown = sample["video"], member.get("offset"), sample.get("start"), sample.get("end")
        line = earlier_lines.setdefault(hash(shown), source_line)
        if line != source_line:
            yield "repeated clip", (f'{source_line}: as {line}; for retrieval, write one line with '
                                    'all of its "texts"')


def token_counter(vocab: str | None) -> Callable[[str], int]:
    """A function that counts the tokens of a text; without a vocabulary, its words."""
    if vocab is None:
        return lambda text: len(text.split())
    tokenizer = Tokenizer.load(vocab)
    return lambda text: len(tokenizer.encode(text, max_len=10 ** 6))


def printable(text: str) -> str:
    """A text that any terminal takes: paths may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_clean(source: Manifest, unusable: set[int], manifest: str | Path) -> str:
    """Writes the usable lines of a manifest beside it. Returns the path, or why none is written.

    The name tells a.jsonl, a.csv and a folder a apart, which may stand side by side."""
    if len(unusable) == len(source):
        return "no clean manifest is written"
    path = Path(manifest).absolute()
    name = path.stem if path.suffix == ".jsonl" else path.name
    if path.is_dir():
        name += ".folder"
    clean = path.with_name(f"{name}.clean.jsonl")
    with replacing(clean) as file:
        for i in range(len(source)):
            if i not in unusable:
                line, _ = source.line(i)
                file.write(line.strip() + b"\n")
    return str(clean)


# ---- data sets: from each original public release to manifests
# A reader yields what an annotation file tells of source.split; "video" is the clip's name in it.
# test.jsonl is the split of the paper's number, also where its owners call it val.

OURS = {"gif_name": "video", "clip_name": "video", "vid_name": "video", "name": "text",   # columns
        "q": "question", "label": "answer", "answer_idx": "answer", "answer_type": "kind"}


class Release:
    """What a person has of a data set: annotation `files` and, by their names, `clips`, found in
    one walk: to ask the disk for each of millions takes hours. called: MSVD's clips have two names,
    each the other's. split: what is being read."""

    def __init__(self, annotations, videos):
        self.files = sorted({str(file.absolute()) for path in map(Path, annotations)
                             for file in (path.rglob("*") if path.is_dir() else [path])})
        paths = [os.path.join(folder, name) for folder, folders, files
                 in os.walk(videos, followlinks=True) for name in folders + files]
        paths.sort(key=lambda path: (not path.lower().endswith(".gif"), path))
        self.clips = {name: path for path in paths for name in names_of(path)}  # GIFs give way
        pairs = [line.partition(" ")[::2] for path in self.find("*youtube_mapping.txt")
                 for line in rows(path)]
        self.called = dict(pairs) | {number: name for name, number in pairs}

    def find(self, forms, split=""):
        """Annotation files named so; of forms between " | " the first of which there are any."""
        for form in forms.replace("SPLIT", split).lower().split(" | "):
            if found := [file for file in self.files
                         if fnmatch.fnmatch(os.path.basename(file).lower(), form)]:
                return found
        return []

    def clip(self, name):
        """The path of a clip, or None. A file's name may lack the "v_" of ActivityNet's ids."""
        long, short = names_of(name)
        names = long, short, short.removeprefix("v_"), self.called.get(short)
        return next((self.clips[name] for name in names if name in self.clips), None)


def names_of(path):
    """("folder/name", "name") without media extensions: DiDeMo has x.mov.mp4."""
    folder, name = os.path.split(path)
    while os.path.splitext(name)[1].lower() in MEDIA:
        name = os.path.splitext(name)[0]
    return f"{os.path.basename(folder)}/{name}", name


def rows(path, columns=""):
    """Objects of a .json or .jsonl, lines of a .txt without remarks, dicts of a .csv or .tsv file.
    columns: of a table without a header, where a quote is only a character."""
    unzip = gzip.open if path.endswith(".gz") else open
    with unzip(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.endswith(".json"):
            content = json.load(file)
            yield from content if isinstance(content, list) else [content]
        elif path.endswith((".csv", ".tsv")):
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            yield from csv.DictReader(
                file, columns.split() or None, restval="", delimiter=delimiter,
                quoting=csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL)
        else:
            lines = (line.strip() for line in file if line.strip() and line[0] != "#")
            yield from lines if path.endswith(".txt") else map(json.loads, lines)


def entries(path, chunk=1 << 24):
    """(key, value) pairs of a JSON object too large for memory (caption.json has gigabytes)."""
    key, text, at = re.compile(r'[\s{,]*"([^"]*)"\s*:\s*'), "", 0
    with open(path, encoding="utf-8") as file:
        while more := file.read(chunk):
            text, at = text[at:] + more, 0
            with suppress(json.JSONDecodeError):            # the chunk ends inside a value
                while found := key.match(text, at):
                    value, at = json.JSONDecoder().raw_decode(text, found.end())
                    yield found[1], value
    if text[at:].strip() != "}":
        raise ValueError("its end is missing: download it again")


def one_a_row(source, path, columns="", prefix="", **fields):
    """A row is a sample, in its owners' columns or ClipBERT's; answers count from 0 but in LSMDC's
    test, which counts from 1 (its first option is right elsewhere)."""
    for row in rows(path, columns):
        renamed = {OURS.get(key, key): value for key, value in row.items()}
        sample = fields | {key: renamed[key] for key in FIELDS if key in renamed}
        if "videoid" in row:                                # WebVid
            sample["video"] = f"{row['page_dir']}/{row['videoid']}"
        if "url" in row:                                    # CC3M: so the usual downloader saves it
            sample["video"] = str(zlib.crc32(row["url"].encode()))
        if "youtube_id" in row:                             # Kinetics: id_000012_000022
            sample["video"] = "{youtube_id}_{time_start:0>6}_{time_end:0>6}".format(**row)
        if "vid_key" in row:                                # MSR-VTT: "msr1234" is video1234
            sample["video"] = row["vid_key"].replace("msr", "video")
        if "video_id" in row:                               # questions on MSR-VTT, MSVD: a number
            sample["video"] = prefix + str(row["video_id"]).removeprefix(prefix)
            sample["kind"] = row["question"].partition(" ")[0].lower()
        if "type" in row:                                   # FrameQA
            sample["kind"] = ["object", "number", "color", "location"][int(row["type"])]
        if "nan" not in row.get("ts", "nan"):               # TVQA: "76.01-84.2" seconds
            sample["start"], sample["end"] = map(float, row["ts"].split("-"))
        if "a1" in row:
            sample["options"] = [row[f"a{i}"] for i in range(6) if f"a{i}" in row]
        if "options" in sample:                             # from_one: LSMDC
            right = row.get("from_one")
            sample["answer"] = int(right) - 1 if right else int(sample["answer"])
        if "video" not in sample or not sample.keys() & {"text", "answer"}:
            raise LookupError(f"columns {', '.join(row)}")
        yield sample


def howto100m(source, path):
    """A video's windows make one sample: a visit draws one. Text without stop words."""
    if path.endswith(".json"):
        for video, told in entries(path):
            yield {"video": video, "captions": [*zip(told["start"], told["end"], told["text"])]}
    else:
        yield {"video": os.path.basename(path)[:-4], "captions": [
            (float(row["start"]), float(row["end"]), row["text"]) for row in rows(path)]}


def yttemporal(source, path):
    """Windows of 12.5 s (the release draws 10-15 s) of the subtitles' own words (the release warps
    the denoised ones to their times). The paper takes the first half of the shards."""
    for video in rows(path):
        windows = []
        for second, word in sorted((word["time"], word["word"]) for word in video["subtitles"]):
            if word[:1] == "&" or word[-1:] == ";":         # "&gt;&gt;"
                continue
            if not windows or second >= windows[-1][1]:
                windows.append([second, second + 12.5, ""])
            windows[-1][2] += f" {word}"
        yield {"video": video["info"]["id"], "captions": windows}


def captioned(source, path, paragraph=False):
    """A clip has all its captions; as a paragraph they are one text (times are not used)."""
    texts = collections.defaultdict(list)
    for row in rows(path):
        if isinstance(row, str):                            # MSVD: a clip and a caption a line
            pairs = [row.partition(" ")[::2]]
        elif "annotations" in row:                          # COCO's, and in its form MSR_VTT.json
            names = {image["id"]: image.get("file_name") for image in row.get("images", ())}
            pairs = [(names.get(note["image_id"]) or note["image_id"], note["caption"])
                     for note in row["annotations"]]
        elif "images" in row:                               # Karpathy's: restval is train
            pairs = [(image["filename"], sentence["raw"]) for image in row["images"]
                     if image["split"].replace("restval", "train") == source.split
                     for sentence in image["sentences"]]
        elif "sentences" in row:                            # MSR-VTT's
            pairs = [(note["video_id"], note["caption"]) for note in row["sentences"]]
        elif "description" in row:                          # DiDeMo
            pairs = [(row["video"], row["description"])]
        elif "caption" in row:                              # ClipBERT's ActivityNet
            pairs = [(row["clip_name"], row["caption"])]
        else:                                               # its owners'
            pairs = [(video, text) for video, note in row.items() for text in note["sentences"]]
        for video, text in pairs:
            texts[video].append(text)
    for video, told in texts.items():
        yield {"video": video} | ({"text": " ".join(told)} if paragraph else {"texts": told})


def numbered(source, path, **splits):
    """Split by the numbers of the clips, which youtube_mapping.txt gives MSVD's."""
    for sample in captioned(source, path):
        video = names_of(sample["video"])[1]
        number = re.fullmatch(r"vid(?:eo)?(\d+)", source.called.get(video, video))
        if number and int(number[1]) in splits[source.split]:
            yield sample | {"video": video}


def one_k_a(source, path, train):
    """1k-A: MSRVTT_JSFUSION_test.csv tests, all other videos of the official splits (9K), or of
    train and val (7K), train."""
    test = {row["video_id"]: {"video": row["video_id"], "texts": [row["sentence"]]}
            for row in rows(path)}
    if source.split == "test":
        yield from test.values()
        return
    for file in source.find(MSRVTT):
        yield from (sample for sample in numbered(source, file, train=train)
                    if sample["video"] not in test)


def msrvtt_mc(source, path):
    """JSFusion's or ClipBERT's questions test. MSR-VTT's captions train as JSFusion's did, each
    against 4 of other videos (places tell nothing)."""
    if source.split == "test":
        yield from one_a_row(source, path)
        return
    official, draw = DATASETS["msrvtt_full"][0], random.Random(0)
    pool = [(sample["video"], text) for file in source.find(MSRVTT)
            for sample in official(source, file) for text in sample["texts"]]
    for video, text in pool:
        others = draw.sample(pool, min(50, len(pool)))
        wrong = dict.fromkeys(b for a, b in others if a != video and b != text)
        yield {"video": video, "options": [text, *list(wrong)[:4]], "answer": 0}


def vcr(source, path, rationale):
    """A list [i, j] among the words becomes "person 0 person 1", numbered by first mention in all
    question, answers, rationales; "boxes" ([number, x0, y0, x1, y1]) are of those that the sample's
    words mention, from the .json beside the image. QA→R's question ends in the right answer."""
    def mentioned(*texts):
        objects = (token for text in texts for token in text if isinstance(token, list))
        return dict.fromkeys(itertools.chain.from_iterable(objects))

    def words(tokens):
        return " ".join(token if isinstance(token, str) else " ".join(names[i] for i in token)
                        for token in tokens)

    for row in rows(path):
        question, options, label = row["question"], row["answer_choices"], row["answer_label"]
        every = mentioned(question, *options, *row["rationale_choices"])
        names = {i: f"{row['objects'][i]} {k}" for k, i in enumerate(every)}
        if rationale:
            question, options = question + options[label], row["rationale_choices"]
            label = row["rationale_label"]
        sample = {"video": row["img_fn"], "kind": "QA→R" if rationale else "Q→A", "answer": label,
                  "question": words(question), "options": [words(tokens) for tokens in options]}
        shown = mentioned(question, *options)
        if shown and (image := source.clip(row["img_fn"])):
            boxes = next(rows(f"{os.path.splitext(image)[0]}.json"))["boxes"]
            sample["boxes"] = [[k, *boxes[i][:4]] for k, i in enumerate(every) if i in shown]
        yield sample


def hmdb51(source, path):
    """"<clip>.avi 1" trains, 2 tests, 0 does neither. As the release, the first of three splits."""
    label = os.path.basename(path).removesuffix("_test_split1.txt")
    for clip, use in (line.rsplit(maxsplit=1) for line in rows(path)):
        if use == {"train": "1", "test": "2"}[source.split]:
            yield {"video": f"{label}/{clip}", "answer": label.replace("_", " ")}


def ego4d_mc(source, path):
    """Cells are Python lists: question [video, frame, ..., text], answers [[..., text], ...]. As in
    the release a clip is the 120 frames (at 30 a second) about the narrated one."""
    for row in rows(path):
        video, frame, *_, text = ast.literal_eval(row["question"])
        options = [answer[-1] for answer in ast.literal_eval(row["answers"])]
        yield {"video": video, "start": max(frame / 30 - 2, 0), "end": frame / 30 + 2,
               "options": options, "answer": options.index(text)}


MSRVTT = "*videodatainfo.json | MSRVTT_data.json | MSR_VTT.json"
ONE_K_A = "MSRVTT_JSFUSION_test.csv"
QA, TGIF = "github.com/xudejing/video-question-answering", "github.com/YunseokJANG/tgif-qa"
LSMDC, VCR = "sites.google.com/site/describingmovies", "visualcommonsense.com, with vcr1images"
# name: reader; annotation files (of forms between " | " the first at hand); where they are from;
# what SPLIT stands for, if not for train, val and test ("test=val": our test is their val)
DATASETS = {
    "webvid": (one_a_row, "results_*_SPLIT.csv", "m-bain.github.io/webvid-dataset", "train val"),
    "howto100m": (howto100m, "???????????.csv | caption.json | raw_caption*.json",
                  "di.ens.fr/willow/research/howto100m", "train"),
    "yttemporal": (yttemporal, "*.jsonl.gz | *.jsonl | ???????????*.json",
                   "YT-Temporal-180M, rowanzellers.com/merlot", "train"),
    "cc3m": (partial(one_a_row, columns="text url", image=True), "SPLIT_GCC*.tsv",
             "ai.google.com/research/ConceptualCaptions", "train val=validation"),
    "coco": (captioned, "dataset_coco.json | captions_SPLIT20*.json", "Karpathy; cocodataset.org"),
    "msrvtt_9k": (partial(one_k_a, train=range(10_000)), ONE_K_A, MSRVTT, "train test"),
    "msrvtt_7k": (partial(one_k_a, train=range(7010)), ONE_K_A, MSRVTT, "train test"),
    "msrvtt_full": (partial(numbered, train=range(6513), val=range(6513, 7010),
                            test=range(7010, 10_000)), MSRVTT, "ms-multimedia-challenge.com/2016"),
    "msrvtt_mc": (msrvtt_mc, "MSR_MC_test.csv | msrvtt_mc_test.jsonl", MSRVTT),
    "msrvtt_qa": (partial(one_a_row, prefix="video"), "SPLIT_qa.json | msrvtt_qa_SPLIT.jsonl", QA),
    "msvd_qa": (partial(one_a_row, prefix="vid"), "SPLIT_qa.json", f"{QA}: youtube_mapping.txt"),
    "msvd": (partial(numbered, train=range(1201), val=range(1201, 1301), test=range(1301, 1971)),
             "AllVideoDescriptions.txt", "cs.utexas.edu/users/ml/clamp/videoDescription"),
    "tgif_action": (one_a_row, "SPLIT_action_*.csv | action_SPLIT.jsonl", TGIF),
    "tgif_transition": (one_a_row, "SPLIT_trans*.csv | trans*_SPLIT.jsonl", TGIF),
    "tgif_frameqa": (one_a_row, "SPLIT_frame*.csv | frameqa_SPLIT.jsonl", TGIF),
    "tvqa": (partial(one_a_row, fps=3), "tvqa_SPLIT.jsonl", "tvqa.cs.unc.edu", "train test=val"),
    "lsmdc": (partial(one_a_row, columns="video _ _ _ _ text"), "LSMDC16_SPLIT.csv", LSMDC,
              "train=annos_training val=annos_val test=challenge_1000_*"),
    "lsmdc_mc": (partial(one_a_row, columns="video _ _ _ _ a1 a2 a3 a4 a5 from_one", answer=0),
                 "LSMDC16_multiple_choice_SPLIT.csv", LSMDC, "train val=valid test=test_*"),
    "didemo": (partial(captioned, paragraph=True), "SPLIT_data.json",
               "github.com/LisaAnne/LocalizingMoments"),
    "activitynet": (partial(captioned, paragraph=True), "SPLIT.json | SPLIT.jsonl",
                    "cs.stanford.edu/people/ranjaykrishna/densevid", "train test=val*1"),
    "vcr_qa": (partial(vcr, rationale=False), "SPLIT.jsonl", VCR, "train test=val"),
    "vcr_qar": (partial(vcr, rationale=True), "SPLIT.jsonl", VCR, "train test=val"),
    "kinetics400": (one_a_row, "SPLIT.csv | kinetics?400_SPLIT.csv",
                    "github.com/cvdfoundation/kinetics-dataset", "train test=val*"),
    "hmdb51": (hmdb51, "*_test_split1.txt", "serre-lab.clps.brown.edu", "train test"),
    "ego4d_mc": (ego4d_mc, "mc_val.csv", "the authors", "test")}
COMMONEST = {"msrvtt_qa": 1500, "msvd_qa": 1000, "tgif_frameqa": 1540}     # answers: else all


def published(reader, source, paths, expected):
    """A reader's samples, tidy; DataError if a file is not as published."""
    for path in paths:
        try:
            for sample in reader(source, path):
                sample = {key: tidy(value) for key, value in sample.items()}
                for key, says in (("texts", bool), ("captions", lambda c: c[2] and c[1] > c[0])):
                    if key in sample:
                        sample[key] = list(filter(says, sample[key]))
                yield sample
        except Exception as error:          # whatever a reader meets in a file of another form
            raise DataError(f"{path}: not as published ({error!r}); expected {expected}") from error


def convert(name, annotations, videos, out):
    """Writes OUT/{train,val,test}.jsonl, and OUT/answers.json, of data set `name`.
    annotations: files, or folders that hold them, as published. videos: the folder of the clips,
    at any depth. Clips that are not there and samples without text are left out, counted, named.
    answers.json: all training answers, whatever the download holds, the commonest first (Sec.
    4.2.1). DataError if nothing is left or a file is not as published; OUT is then as it was."""
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; expected one of {', '.join(DATASETS)}")
    reader, forms, site, splits = (*DATASETS[name], "train val test")[:4]
    expected = tidy(f"{forms} ({site}). {getattr(reader, 'func', reader).__doc__}")
    source, out = Release(annotations, videos), os.path.realpath(out)
    if any(os.path.realpath(os.path.dirname(file)) == out for file in source.files):
        raise DataError(f"--annotations lie in --out {out} and might be replaced by manifests")
    answers, tally = collections.Counter(), collections.defaultdict(collections.Counter)
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out) as beside:     # all or none
        for split in splits.split():
            source.split, _, theirs = split.partition("=")
            paths = source.find(forms, theirs or split)
            with open(f"{beside}/{source.split}.jsonl", "w", encoding="utf-8") as file:
                for sample in published(reader, source, paths, expected):
                    if source.split == "train" and "answer" in sample and "options" not in sample:
                        answers[sample["answer"]] += 1
                    path = source.clip(sample["video"])
                    empty = any(value in ("", []) for value in sample.values())
                    fate = "without text" if empty else "written" if path else f"not under {videos}"
                    tally[source.split, fate][sample["video"]] += 1
                    if fate == "written":
                        sample["video"] = os.path.relpath(path, out)
                        file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        reports = [f"{split}: {clips.total():,} samples of {len(clips):,} clips {fate}, such as "
                   f"{', '.join(list(clips)[:3])}" for (split, fate), clips in tally.items()]
        if not any(fate == "written" for _, fate in tally):
            told = "; ".join(reports) or "no annotation file is named so"
            raise DataError(f"{name}: nothing to write: {told}; expected {expected}")
        print(*reports, sep="\n")
        if answers:
            listed = [answer for answer, _ in answers.most_common(COMMONEST.get(name))]
            Path(beside, "answers.json").write_text(json.dumps(listed, ensure_ascii=False), "utf-8")
        for file in os.listdir(beside):
            if os.path.getsize(f"{beside}/{file}"):
                os.replace(f"{beside}/{file}", f"{out}/{file}")


# ==== Command line ================================================================================

def main():
    """python data.py COMMAND: see --help of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {run.__name__: run for run in (toy, convert, check)}
    toys, converts, checks = (commands.add_parser(
        name, description=run.__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter) for name, run in runs.items())
    toys.add_argument("--out", dest="root")
    toys.add_argument("--seed", type=int)
    converts.epilog = "\n".join(f"{name}: {files} ({site})"
                                for name, (_, files, site, *_) in DATASETS.items())
    converts.add_argument("name")
    for flag, count in ("annotations", "+"), ("videos", None), ("out", None):
        converts.add_argument(f"--{flag}", nargs=count, required=True)
    checks.add_argument("manifest")
    checks.add_argument("--vocab")
    checks.add_argument("--columns", nargs="+")
    for flag in "workers", "timeout", "frames", "image_size", "max_text_len", "gpu":
        checks.add_argument(f"--{flag}", type=int)
    args = vars(parser.parse_args())
    runs[args.pop("command")](**args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, Unreadable) as error:
        sys.exit(f"data.py: {error}")
