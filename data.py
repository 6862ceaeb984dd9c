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
import io
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
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, UnidentifiedImageError
from tokenizers import BertWordPieceTokenizer
from tokenizers import Tokenizer as WordPieces
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from allinone import Vocabulary, mask_words, masked_positions, vtm_pairs


class DataError(ValueError):
    """Bad input from the user: one line with what came, where, what was expected, what to do."""


class Unreadable(Exception):
    """One clip that cannot be read: str() names it and the reason, for a person who can mend it."""


class MissingFile(Unreadable):
    """A clip whose file is not there."""


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
WORDS = "text", "texts", "captions", "question", "options"      # the fields that a text is in
ALIASES = {  # names that other people's files give to a field
    "video": ("path", "file", "filename", "video_path", "clip"),
    "text": ("caption", "title", "description", "sentence", "txt")}
IMAGES = ".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff"
MEDIA = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".3g2", ".flv",
         ".f4v", ".wmv", ".asf", ".mts", ".m2ts", ".ts", ".vob", ".ogv", ".qt", ".mpe", ".m2v",
         ".divx", ".dv", ".mxf", ".rm", ".rmvb", ".gif", *IMAGES)


class IndexHeader(NamedTuple):
    """The int64 numbers at the beginning of an index: see line_index."""

    version: int
    size: int           # of the .jsonl, in bytes
    time: int           # of its last change, in nanoseconds
    checksum: int       # CRC-32
    samples: int


class Manifest:
    """One or several manifests as a sequence of samples, read through an index of their lines.

    paths: one or several of: a .jsonl, a .csv or .tsv table, a folder of clips with captions
    beside them, a .tar shard, a folder of shards. Neighbouring shards of one folder count as one
    manifest. columns: ("video=clip_name", "text=en") where the columns of a table, or the keys of
    a .jsonl, have other names.

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
        self.columns = parse_columns(columns)
        self.names = [source_name(source) for source in sources]
        self.paths = [json_lines(source, self.columns) for source in sources]
        self.indices = [line_index(path) for path in self.paths]
        self.sizes = [read_header(index).samples for index in self.indices]
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
        checksums = [read_header(index).checksum for index in self.indices]
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
        except ValueError as error:                     # also of bytes that are not UTF-8
            excerpt = content[:60].decode(errors="replace").strip()
            raise DataError(f"{source_line}: not JSON ({error}): {excerpt!r}; expected an object "
                            'such as {"video": "a.mp4", "text": "a dog runs"}') from None
        sample = {"source_line": source_line}
        if isinstance(fields, dict):    # of a table, a folder or a shard, it says where it is from
            sample["source_line"] = fields.get("source_line", source_line)
        # The samples of a table, a folder or a shard have our names already.
        if str(self.paths[manifest_id]) == self.names[manifest_id]:
            fields = renamed(fields, self.columns, source_line)
        sample.update(checked(fields, sample["source_line"]))
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
    if sample.get("captions") and ("start" in sample or "end" in sample):
        raise DataError(f'{source_line}: has "captions", which bring windows of their own, beside '
                        '"start" or "end"; expected one of the two')
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
        fits = is_number(value) if kind is float else type(value) is kind
        if not fits:
            return False
    return True


def need(sample: dict, field: str) -> object:
    """The value of a field that must be there and not be empty. DataError otherwise, which names
    the key that was probably meant."""
    if sample.get(field) not in (None, "", []):
        return sample[field]
    keys = [key for key in sample if key not in (*FIELDS, "source_line")]
    meant = [key for key in keys if key.lower() in ALIASES.get(field, ())]
    meant += difflib.get_close_matches(field, keys)
    hint = f'; rename "{meant[0]}" to "{field}"' if meant else ""
    present = ", ".join(key for key in sample if key != "source_line")
    raise DataError(f'{sample["source_line"]}: lacks "{field}"{hint}; its keys are {present} '
                    f"(--columns {field}=NAME says which of them it is)")


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


def clean_text(value: object) -> object:
    """A text, or each text of a list, of whole characters, on one line, without doubled spaces."""
    return map_texts(lambda text: " ".join(whole_characters(text).split()), value)


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


def temporary_manifest(samples: Iterable[dict], key: str | None = None,
                       remarks: Iterable[str] = ()) -> Path:
    """The path of a manifest of these samples, in the temporary folder.

    It is written once for each key. Without a key the samples themselves are the key.
    remarks: lines for a person, known after the last sample. The main process prints them each
    time, whether or not it writes the manifest: they stand beside it."""
    if key is None:
        samples = list(samples)
        key = json.dumps(samples)
    place = temporary(key, ".jsonl")
    remarks_place = temporary(key, ".txt")
    if not (place.is_file() and remarks_place.is_file()):
        with replacing(place) as file:
            for sample in samples:
                file.write(json.dumps(sample).encode() + b"\n")
            with replacing(remarks_place) as remarks_file:
                remarks_file.write("".join(remarks).encode(errors="surrogateescape"))
    if os.environ.get("RANK", "0") == "0":
        print(remarks_place.read_text(errors="surrogateescape"), end="", file=sys.stderr)
    return place


def line_index(path: Path) -> Path:
    """The path of the up-to-date index of a .jsonl file, which is built when it is missing.

    It holds int64 numbers: an IndexHeader, and then the offset of each sample's line. Blank lines
    are no samples. Where one of them comes before a sample, the number of each sample's line
    follows. The file is NAME.jsonl.idx or, where the folder cannot be written to, lies in the
    temporary folder."""
    status = path.stat()
    stamp_of_file = [3, status.st_size, status.st_mtime_ns]
    beside = Path(f"{path}.idx")
    elsewhere = temporary(str(path.resolve()), ".idx")
    for place in (beside, elsewhere):
        if place.is_file() and np.fromfile(place, np.int64, 3).tolist() == stamp_of_file:
            return place
    offsets, numbers = line_offsets(path)
    if len(numbers) == 0 or numbers[-1] == len(numbers):
        numbers = numbers[:0]                       # sample i is line i + 1: nothing to store
    place = beside if os.access(path.absolute().parent, os.W_OK) else elsewhere
    with replacing(place) as file:
        header = IndexHeader(*stamp_of_file, checksum(path), len(offsets))
        np.array(header, np.int64).tofile(file)
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


def read_header(index: Path) -> IndexHeader:
    """The numbers at the beginning of an index."""
    return IndexHeader(*np.fromfile(index, np.int64, len(IndexHeader._fields)).tolist())


def read_number(index: Path, place: int) -> int:
    """Number `place`, from 0, of those after the header of an index."""
    offset = 8 * (len(IndexHeader._fields) + place)
    return int(np.fromfile(index, np.int64, 1, offset=offset)[0])


def line_place(index: Path, line: int, size: int) -> tuple[int, int]:
    """(offset, line number from 1) of sample `line` of an index of `size` samples."""
    offset = read_number(index, line)
    if os.path.getsize(index) == 8 * (len(IndexHeader._fields) + size):
        return offset, line + 1
    return offset, read_number(index, size + line)


# ---- manifests of tables, folders of clips and shards

def neighbouring_shards(paths: list[Path]) -> list[list[Path]]:
    """The files of each manifest: one, or all neighbouring .tar files of one folder."""
    sources = []
    for path in paths:
        last = sources[-1][-1] if sources else None
        if last and is_shard(last) and is_shard(path) and last.parent == path.parent:
            sources[-1].append(path)
        else:
            sources.append([path])
    return sources


TABLES = ".csv", ".tsv"


def is_shard(path: str | Path) -> bool:
    return str(path).lower().endswith(".tar")


def source_name(source: list[Path]) -> str:
    """What messages call a manifest: its path, or those of its first and its last shard."""
    return str(source[0]) if len(source) == 1 else f"{source[0]} to {source[-1].name}"


def json_lines(source: list[Path], columns: dict[str, str]) -> Path:
    """The path of a .jsonl of one manifest: the file itself or, of a table, a folder or shards, one
    in the temporary folder. That one is written again when a file, its size or its time changes."""
    for path in source:
        if not path.exists():
            raise DataError(f"{path}: no such manifest; expected a .jsonl, .csv or .tsv file, one "
                            "sample a line, a .tar shard, or a folder of clips or shards")
    path = source[0]
    ending = path.suffix.lower()
    remarks = []
    if path.is_dir():
        files = folder_files(path)
        captions_and_shards = [file.path for file in files if not file.name.lower().endswith(MEDIA)]
        key = [file.path for file in files] + [stamp(name) for name in captions_and_shards]
        samples = captioned_samples(str(path), files, columns, remarks)
    elif ending in TABLES:
        key = [stamp(path)]
        samples = table_samples(path, columns, remarks)
    elif is_shard(path):
        key = [stamp(shard) for shard in source]
        shards = [Source(str(shard), str(shard)) for shard in source]
        samples = captioned_samples(source_name(source), shards, columns, remarks)
    elif ending in (".gz", ".tgz", ".zip", ".xz", ".zst", ".bz2"):
        raise DataError(f"{path}: is compressed; unpack it. A shard must be an uncompressed .tar")
    elif ending in (".xlsx", ".xls", ".ods", ".parquet", ".feather"):
        raise DataError(f"{path}: is no text file; save the table as .csv in UTF-8")
    else:
        return path
    return temporary_manifest(samples, json.dumps(["version 2", columns, *key]), remarks)


def stamp(path: str | Path) -> tuple[str, int, int]:
    """(absolute path, size, time) of a file: what tells that it has changed."""
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Source:
    """A file, or a member of a shard: some of the bytes of a file. str() names it in messages."""
    path: str                   # of the file or of the shard
    name: str = ""              # of the file or of the member
    offset: int = 0             # of its bytes in `path`
    size: int | None = None     # None: all bytes
    content: bytes | None = None        # its bytes, if they have been read

    def __str__(self) -> str:
        return f"{self.path}, member {self.name}" if self.is_member else self.path

    @property
    def is_member(self) -> bool:
        return self.size is not None

    @property
    def length(self) -> int:
        """In bytes."""
        return self.size if self.is_member else os.path.getsize(self.path)

    @property
    def url(self) -> str:
        """What FFmpeg opens: its own protocol for a range of bytes is as fast as a file."""
        file = f"file:{self.path}"      # in 12:30.jpg, 12 would be a protocol
        if not self.is_member:
            return file
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{file}"

    @property
    def source_line(self) -> str:
        """What the sample of this caption or clip is called: file:1, or shard:member."""
        return f"{self.path}:{self.name if self.is_member else 1}"

    def read(self) -> bytes:
        """All bytes."""
        if self.content is not None:
            return self.content
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def fields(self) -> dict:
        """The fields of a sample that show this clip; see source_of."""
        if not self.is_member:
            return {"video": self.path}
        member = {"name": self.name, "offset": self.offset, "size": self.size}
        return {"video": self.path, "member": member}


def source_of(sample: dict) -> Source:
    """The bytes of the clip that a sample names."""
    member = sample.get("member")
    if member is None:
        return Source(sample["video"])
    return Source(sample["video"], member["name"], member["offset"], member["size"])


SIDECARS = ".txt", ".json"      # a caption beside its clip


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, through links to folders too, but no folder twice."""
    places = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in places:
            folders.clear()                             # a link to a folder that was there before
            continue
        places.add(place)
        folders.sort()
        yield parent, folders, files


def folder_files(folder: Path) -> list[Source]:
    """The clips, captions and shards below a folder, by name."""
    paths = []
    for parent, folders, names in walk(folder.absolute()):
        for name in list(folders):
            pictures = os.path.join(parent, name)
            if name.lower().endswith(MEDIA) and any(
                    file.lower().endswith(IMAGES) for file in os.listdir(pictures)):
                folders.remove(name)                    # a clip: its frames are no clips
                names.append(name)
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in (*MEDIA, *SIDECARS, ".tar") and not name.startswith("._"):
                paths.append(os.path.join(parent, name))
    paths.sort(key=Path)
    return [Source(path, path) for path in paths]


def clip_files(path: Path) -> list[Source]:
    """The clips of a folder, of a shard or of a folder of shards, or the file itself. They need no
    captions."""
    if not path.is_dir() and not is_shard(path):
        return [Source(str(path.absolute()), path.name)]
    files = folder_files(path) if path.is_dir() else shard_files(path)
    clips = [file for file in files if file.name.lower().endswith(MEDIA)]
    for file in files:
        if is_shard(file.name) and not file.is_member:
            clips += clip_files(Path(file.path))
    return clips


def shard_files(shard: Path) -> list[Source]:
    """The files in an uncompressed .tar, its captions read: opening it for each would take long.
    DataError if it is none, or is cut off."""
    path = str(shard.absolute())
    files = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile() or os.path.basename(member.name).startswith("._"):
                    continue
                content = None
                if member.name.lower().endswith(SIDECARS):
                    content = archive.extractfile(member).read()
                files.append(
                    Source(path, member.name, member.offset_data, member.size, content))
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


def check_place(source: Source) -> None:
    """MissingFile if a file is not there; Unreadable if a shard holds something else by now where
    a member should be.

    The 512 bytes before a member are its header, which says its name and size."""
    if not os.path.exists(source.path):
        raise MissingFile(f"{source.path}: no such file")
    if not source.is_member:
        return
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset - tarfile.BLOCKSIZE)
            block = file.read(tarfile.BLOCKSIZE)
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (OSError, ValueError, tarfile.TarError):
        header = None
    is_there = header is not None and header.size == source.size
    # A header has room for 100 bytes of a plain name. Other names lie in blocks before it.
    if is_there and source.name.isascii() and len(source.name) <= 100:
        is_there = header.name == source.name
    if not is_there or source.offset + source.size > os.path.getsize(source.path):
        raise Unreadable(f"{source.path}: holds no {source.name} of {source.size} bytes at byte "
                         f"{source.offset}; the shard has changed or is cut off: fetch it again, "
                         "and start again")


def captioned_samples(name: str, files: list[Source], columns: dict[str, str],
                      remarks: list[str]) -> Iterator[dict]:
    """Samples of the clips that have a caption of their name beside them, then of the shards.

    Shards are as video2dataset and img2dataset write them: KEY.mp4 or KEY.jpg beside KEY.txt and
    KEY.json. One pass reads their headers, and nothing is unpacked.
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
        elif ending in MEDIA and (key not in clips or clips[key].name.lower().endswith(IMAGES)):
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
    remarks += left_out_remarks(name, left_out)
    for file in files:
        if is_shard(file.name) and not file.is_member:
            members = shard_files(Path(file.path))
            yield from captioned_samples(file.path, members, columns, remarks)


def captioned_sample(clip: Source, text: Source | None, notes: Source | None,
                     columns: dict[str, str]) -> dict:
    """The sample of a clip. Its caption is KEY.txt, else that in KEY.json.

    Nothing else is read from KEY.json: the times that video2dataset stores there are those of the
    film that the clip was cut from. ValueError if a caption cannot be read."""
    caption = text.read().decode("utf-8-sig") if text else ""
    row = {}
    if caption.strip():
        row["text"] = caption
    elif notes:
        content = json.loads(notes.read().decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise DataError(f"{notes.source_line}: is {content!r:.60}; expected a JSON object")
        names = {columns.get("text"), "text", "texts", *ALIASES["text"]}
        row = {name: value for name, value in content.items() if name.lower() in names}
    place = clip if clip.is_member else text or notes or clip
    sample = checked(sample_of_row(row, place.source_line, columns), place.source_line)
    sample.update(clip.fields())
    return sample


def left_out_remarks(name: str, left_out: dict[str, list[str]]) -> list[str]:
    """How many samples of a manifest are left out, and which is one of them: a line a reason."""
    return [f"{name}: left out {len(places)} {reason}, such as {places[0]}\n"
            for reason, places in left_out.items()]


def table_samples(path: Path, columns: dict[str, str], remarks: list[str]) -> Iterator[dict]:
    """Samples of a person's .csv or .tsv table, with absolute paths. Rows whose caption is empty
    are left out and counted. Manifest checks the fields of a row when it reads that row."""
    left_out = collections.defaultdict(list)
    captions = {columns.get("text"), "text", *ALIASES["text"]}
    for number, row in table_rows(str(path)):
        source_line = f"{path}:{number}"
        row = {name.lower(): cell for name, cell in row.items()}
        renamed(row, columns, source_line)                  # that all columns are there
        sample = sample_of_row(row, source_line, columns)
        if "video" in sample:
            sample["video"] = str(path.absolute().parent / sample["video"])
        else:
            sample.update(row)                              # to be named in the error
        has_words = any(sample.get(field) for field in WORDS)
        if captions & row.keys() and not has_words and "answer" not in sample:
            left_out["rows without a caption"].append(source_line)
        else:
            yield sample
    remarks += left_out_remarks(str(path), left_out)


def sample_of_row(row: dict, source_line: str, columns: dict[str, str]) -> dict:
    """The fields of a sample from the cells of a row, not yet checked. A column is named as its
    field, as `columns` says or as in ALIASES. Numbers and lists are written as in JSON or Python:
    1.5, ["a", "b"]."""
    cells = {key.lower(): value for key, value in row.items() if value not in (None, "")}
    sample = {"source_line": source_line}
    for field, expected in FIELDS.items():
        if expected == MEMBER:
            continue                                        # no column of a person's table
        for name in (columns.get(field), field, *ALIASES.get(field, ())):
            if name in cells:
                sample[field] = cell_value(cells[name], expected)
                break
    return sample


def parse_columns(flags: Sequence[str]) -> dict[str, str]:
    """{field: its column in lower case} of flags such as "video=clip_name"."""
    columns = {}
    for flag in flags:
        field, equals, column = flag.lower().partition("=")
        if not equals or field not in FIELDS:
            raise DataError(f"--columns {flag}: expected FIELD=COLUMN, with a FIELD of "
                            f"{', '.join(FIELDS)}")
        columns[field] = column
    return columns


def renamed(fields: object, columns: dict[str, str], source_line: str) -> object:
    """The fields of a line under the names that --columns gives them. DataError if one is not
    there."""
    if not isinstance(fields, dict):
        return fields                                       # `checked` says so
    names = {name.lower(): name for name in fields}
    result = dict(fields)
    for field, column in columns.items():
        if column not in names:
            raise DataError(f"{source_line}: --columns {field}={column}: there is no such column; "
                            f"its columns are {', '.join(fields)}")
        result[field] = fields[names[column]]
    return result


def cell_value(cell: object, expected: str) -> object:
    """What a cell of a table says, if it can be read as `expected` of FIELDS, else its text."""
    cell = clean_text(cell)
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


def table_rows(path: str, columns: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its line, {column: cell}) of each row of a table.

    Tabs, commas or semicolons part the cells, whichever the header has most of. A table without a
    header gets the names in `columns`: tabs part its cells, and its quotes are characters.
    DataError names the line that cannot be read."""
    header = columns.split()
    lines = []                                  # those of the row that is being read
    with open_text(path) as file:
        delimiter = "\t" if columns else delimiter_of(file.readline())
        quoting = csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL
        file.seek(0)
        reader = csv.reader(remembered(file, lines), delimiter=delimiter, quoting=quoting)
        try:
            for cells in reader:
                number = reader.line_num - len(lines) + 1
                if not columns:
                    refuse_stray_quote(path, number, lines, cells, delimiter, len(header))
                if not header:
                    header = [name.strip() for name in cells]
                    cells = []
                if any(cell.strip() for cell in cells[len(header):]) and not columns:
                    raise DataError(f"{path}:{number}: has {len(cells)} cells, but the first line "
                                    f"names {len(header)} columns; put a text that holds "
                                    f"{delimiter!r} in quotes")
                if cells:
                    cells += [""] * (len(header) - len(cells))
                    yield number, dict(zip(header, cells))
                lines.clear()
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num - len(lines) + 1}: the row that begins here "
                            f"cannot be read ({error}); does each quote in it close?") from None


def delimiter_of(header: str) -> str:
    """What parts the cells of a table with this first line."""
    return max("\t,;", key=header.count)


def remembered(lines: Iterable[str], memory: list[str]) -> Iterator[str]:
    """The lines; each is also appended to `memory`."""
    for line in lines:
        memory.append(line)
        yield line


def refuse_stray_quote(path: str, number: int, lines: list[str], cells: list[str],
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
        quotes = 0
        for line in lines:
            quotes += line.count('"')
            if quotes % 2 == 1:
                break
            number += 1
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

def hash64(*numbers: int) -> int:
    """A hash of integers, from 0 to 2**64 - 1: the seed of each random choice of visits."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def shuffled(i: int, n: int, seed: int) -> int:
    """The i-th element of a pseudo-random permutation of range(n), without a list of all n.

    A Feistel network permutes all numbers of 2 * half bits, the smallest such range that holds n.
    A number that is not below n is put through the network again, until the result is below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    while True:
        left = i >> half
        right = i & low_bits
        for layer in range(4):
            scrambled = left ^ (hash64(seed, layer, right) & low_bits)
            left = right
            right = scrambled
        i = left << half | right
        if i < n:
            return i


class BatchSampler:
    """Which samples each micro-batch of a process reads: yields lists of (sample, visit).

    A visit is the number of one reading of one sample, counted from the start of the run over all
    processes. Whoever reads the sample derives every random choice from it.

    An optimiser step reads `batch` clips, cut into world * accumulation_steps micro-batches.
    Process `rank` has `accumulation_steps` of them. A micro-batch reads one manifest, so that a
    text never meets a clip of another data set as a negative.

    Micro-batches are a function of (seed, number of the micro-batch, number of its step). So any
    number of processes reads the same micro-batches, and a run that goes on at step `start` skips
    and repeats nothing. With one manifest the same holds for micro-batches of any size.

    sizes: lines of each manifest. shares: how often each manifest is read, relative to the others;
    by default in proportion to its lines. Raises DataError if they do not fit the manifests.
    """

    def __init__(self, sizes: list[int], batch: int, seed: int, rank: int = 0, world: int = 1,
                 start: int = 0, accumulation_steps: int = 1, steps: int = 1,
                 shares: Sequence[float] = ()):
        if shares and (len(shares) != len(sizes) or min(shares) <= 0):
            raise DataError(f"--mix {' '.join(map(str, shares))}: expected {len(sizes)} positive "
                            "numbers, one for each manifest of --data")
        if batch < 1 or batch % (world * accumulation_steps):
            raise DataError(f"a batch of {batch} clips cannot be cut into micro-batches of "
                            f"{world} processes, {accumulation_steps} each; expected a multiple of "
                            f"{world * accumulation_steps}")
        self.sizes = sizes
        self.shares = shares or sizes
        self.seed = seed
        self.rank = rank
        self.accumulation_steps = accumulation_steps
        self.steps = range(start, steps)
        self.per_step = world * accumulation_steps          # micro-batches of a step
        self.micro_batch_size = batch // self.per_step

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            begin = step * self.per_step + self.rank * self.accumulation_steps
            for number in range(begin, begin + self.accumulation_steps):
                yield self.micro_batch(number)

    def micro_batch(self, number: int) -> list[tuple[int, int]]:
        """(sample, visit) of each clip of a micro-batch; `number` counts all of the run from 0.

        Every epoch reads a manifest in a new order. A step keeps to the order with which it begins,
        also where the epoch ends within it, so over an epoch a sample may be read once more or
        once less. No sample is twice in a step, unless the step reads more clips than the manifest
        has lines (see clips_per_step).
        """
        counts = self.counts(number)
        counts_after = self.counts(number + 1)
        counts_at_step = self.counts(number - number % self.per_step)
        # The one manifest that this micro-batch reads: exactly one count rises.
        rises = [after > before for before, after in zip(counts, counts_after)]
        manifest = rises.index(True)

        lines = self.sizes[manifest]
        offset = sum(self.sizes[:manifest])                  # of the manifest's line 0
        epoch = counts_at_step[manifest] * self.micro_batch_size // lines
        seed = hash64(self.seed, manifest, epoch)
        samples = []
        for i in range(self.micro_batch_size):
            reading = counts[manifest] * self.micro_batch_size + i
            sample = offset + shuffled(reading % lines, lines, seed)
            samples.append((sample, number * self.micro_batch_size + i))
        return samples

    def counts(self, number: int) -> list[int]:
        """How many of the run's first `number` micro-batches read each manifest.

        Of the first `number` micro-batches manifest 0 gets its share, rounded; manifest 1 gets its
        share of the rest, and so on. floor(fraction * n + phase) raises a count by 0 or 1 with each
        n, so exactly one count rises. A random phase keeps equal manifests from always reading in
        the same order.
        """
        counts = []
        share_left = sum(self.shares)
        for manifest, share in enumerate(self.shares[:-1]):
            phase = hash64(self.seed, manifest) / 2 ** 64
            counts.append(int(number * share / share_left + phase))
            number -= counts[-1]
            share_left -= share
        return [*counts, number]

    def clips_per_step(self) -> list[int]:
        """The most clips of each manifest that one step reads on all processes.

        Where that is more than the manifest's lines, a step reads some samples more than once.
        """
        most = []
        left = self.per_step
        share_left = sum(self.shares)
        for share in self.shares:
            fraction = share / share_left
            # Each manifest's share of what is left, rounded up; 1e-9 absorbs float error.
            most.append(math.ceil(left * fraction - 1e-9) * self.micro_batch_size)
            left = math.ceil(left * (1 - fraction) - 1e-9)
            share_left -= share
        return most


# ==== Clip: frames, pixels, words =================================================================

def sample_frames(n: int, frames: int, train: bool, view: int = 0, views: int = 1) -> list[int]:
    """TSN sparse sampling, Sec. 3.1: `frames` ascending numbers below n, one in each equal segment.

    n: frames of the clip, at least 1. In training it is a random one of the segment (torch's
    generator), and every frame is possible. In evaluation it is the segment's centre; view v of K
    (the 3 x 3 frames of Tab. 2 to 4) takes the centre of the v-th K-th of the segment. Where the
    clip has fewer frames than segments, some are repeated, in order.
    """
    numbers = []
    for segment in range(frames):
        begin = segment * n // frames
        end = (segment + 1) * n // frames
        length = max(end - begin, 1)
        if train:
            offset = int(torch.randint(length, ()))
        else:
            offset = length * (2 * view + 1) // (2 * views)
        numbers.append(begin + offset)
    return numbers


Pick = Callable[[int], Sequence[int]]           # of n frames, the numbers of those to read
RESIZE = "release", "paper", "proportions"      # what --resize may be: see read_frames


def read_frames(sample: dict, pick: Pick, image_size: int, resize: str, train: bool,
                boxes: bool = True) -> torch.Tensor:
    """The chosen frames of a sample as uint8 (S, 3, image_size, image_size), contiguous.

    pick: function of n, the number of frames in the sample's window, to the S numbers to read.
    resize: how a stored frame becomes a square.
    - "release" scales the whole frame to a square of 1.2 x image_size (268 for 224), whatever its
      proportions, and crops: the release decodes to a square first.
    - "paper" scales the whole frame to image_size ("resize each frame to 224 x 224", Sec. 4.1.1).
    - "proportions" scales the shorter side to 1.2 x image_size, keeps the proportions, and crops.
    A crop is random in training, else the centre, and the same in all frames.
    boxes: draw the sample's "boxes" (VCR, Tab. 5 "Mask"). A sample that has boxes is always scaled
    whole, drawn or not, because a crop could cut off what its question is about.
    Raises Unreadable.
    """
    read = partial(decode, source_of(sample), pick, start=sample.get("start"),
                   end=sample.get("end"), fps=sample.get("fps"))
    larger = int(1.2 * image_size)
    try:
        if sample.get("boxes"):
            video = read(size=None)             # boxes are in pixels of the stored frame
            if boxes:
                video = draw_boxes(video, sample["boxes"])
            return v2.functional.resize(video, [image_size, image_size])
        if resize == "paper":
            return read(size=(image_size, image_size))
        if resize == "release":
            return crop(read(size=(larger, larger)), image_size, train)
        return crop(read(size=larger), image_size, train)
    except (Unreadable, DataError):
        raise
    except Exception as error:      # whatever a decoder meets in one clip must not end a whole run
        raise Unreadable(f"{sample['video']}: cannot be read ({error!r})") from error


def crop(video: torch.Tensor, size: int, train: bool) -> torch.Tensor:
    """A square of uint8 (S, 3, h, w), h and w >= size: (S, 3, size, size), contiguous.

    The square is random in training, else the centre, and the same in all frames. It is copied,
    because a view would carry the pixels around it from the reading process to the GPU.
    """
    if train:
        square = v2.RandomCrop(size)(video)
    else:
        square = v2.functional.center_crop(video, [size, size])
    return square.contiguous()


def draw_boxes(video: torch.Tensor, boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """VCR, Sec. 4.2.4, Fig. 5: a mask over each entity in its own colour. uint8 (S, 3, h, w).

    boxes: [[identity, x0, y0, x1, y1], ...] in pixels of the frames. As in the release, a mask is
    0.7 of the image and 0.3 of the colour, with an outline of 3 pixels.
    """
    colours = [identity_colour(identity) for identity, *_ in boxes]
    corners = torch.tensor([corners for _, *corners in boxes], dtype=torch.float32)
    x = torch.arange(video.shape[3])
    y = torch.arange(video.shape[2])[:, None]
    masks = torch.stack([(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
                         for x0, y0, x1, y1 in corners])                        # (boxes, h, w)
    drawn = []
    for frame in video:
        filled = draw_segmentation_masks(frame, masks, 0.3, colours)
        drawn.append(draw_bounding_boxes(filled, corners, colors=colours, width=3))
    return torch.stack(drawn)


def identity_colour(identity: int) -> tuple[int, int, int]:
    """A colour of its own for each identity: hues a golden section apart never come close."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * identity % 1, 1, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


# ---- decoding: exactly the chosen frames, and as little else as the codec allows

# The plain decode, from the first packet to the last, defines what the frames of a clip are
# (PlainDecode). It is slow. PlannedDecode decodes a few frames instead of all. It rests on what the
# file says about itself, checks that, and raises Doubtful where it does not hold; then the plain
# decode takes over.

# Of these codecs the decoder tells which frames are keyframes, so that a container's claim can be
# checked. Codecs without any reference between frames (JPEG, ProRes, ...) need no check.
PLANNED_CODECS = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video"}
# Of these codecs the header of a frame tells whether another one refers to it.
SKIPPABLE_CODECS = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
MAX_PAUSE = 3600.0      # seconds between frames; a longer one is a clock that was set anew
MAX_TIME = 2 ** 60      # ticks of a time base: longer than any film, within FFmpeg's 64 bits
MAX_PROPORTION = 20     # of the longer side of a frame to the shorter, where proportions are kept
# (a, b, c, d) of each EXIF orientation 1 to 8, with the meaning that display_matrix states.
EXIF_ORIENTATIONS = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
                     5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}
ROTATIONS = {0: 1, 90: 8, 180: 3, 270: 6}       # degrees anticlockwise: EXIF orientation
# PyAV before 19 raises on titles that are not UTF-8; 19 has no such argument.
OPEN_OPTIONS = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


class Doubtful(Unreadable):
    """The frames are damaged, or the packets' headers do not place them for sure."""


def decode(source: str | os.PathLike | Source, pick: Pick,
           size: int | tuple[int, int] | None = None, start: float | None = None,
           end: float | None = None, fps: float | None = None) -> torch.Tensor:
    """Exactly the chosen frames of a clip: uint8 RGB (S, 3, h, w), upright, in the order picked.

    Each pixel is that of a full decode.
    source: a video, an image (one frame) or a folder of frames, `fps` of them a second.
    pick: function of n, the number of frames, to the numbers of those to read, repeats allowed.
    size: (height, width), or pixels of the shorter side, the proportions kept; None: as stored.
    start, end: seconds after the first frame. The n frames are those shown in [start, end).
    Raises Unreadable, which names the file and the reason.
    """
    if not isinstance(source, Source):
        source = Source(os.fspath(source))
    check_window(source, start, end)
    try:
        if os.path.isdir(source.path):
            return read_pixels(FrameFolder(source, fps, start, end), pick, size, start, end)
        try:
            container, stream = open_video(source)
            with container:
                planned = PlannedDecode(source, container, stream, start, end)
                return read_pixels(planned, pick, size, start, end)
        except (Doubtful, av.FFmpegError):
            return read_pixels(PlainDecode(source), pick, size, start, end)
    except (av.FFmpegError, OSError) as error:
        raise undecodable(source, error) from error


def undecodable(source: Source, error: Exception) -> Unreadable:
    """The error for a file in which a decoder meets `error`."""
    reason = getattr(error, "strerror", None) or str(error)
    return Unreadable(f"{source}: cannot be decoded ({reason}); replace or re-encode it")


def check_window(source: Source, start: float | None, end: float | None) -> None:
    """Unreadable unless start and end are seconds, and the end is not before the start."""
    for name, value in ("start", start), ("end", end):
        if value is not None and (math.isnan(value) or value == -math.inf):
            raise Unreadable(f'{source}: the sample\'s "{name}" is {value}; expected seconds')
    if start == math.inf or None not in (start, end) and start > end:
        raise Unreadable(f'{source}: the sample\'s "start" is {start} and its "end" {end}; '
                         "expected an end after the start; check them")


class Decode(Protocol):
    """The frames of a clip, numbered from 0 in the order in which they are shown."""
    seconds: list[float]        # when each frame is shown, counted from the first
    lasts: float                # seconds until the last one disappears

    def source(self, number: int) -> Source:
        """Where frame `number` is stored."""

    def frames(self, numbers: list[int]) -> Iterator[tuple[int | None, av.VideoFrame | None]]:
        """Yields (number, frame) for the ascending `numbers`, in order, and for other frames that
        had to be decoded. Their number may be None. A frame that cannot be decoded is None."""


def read_pixels(clip: Decode, pick: Pick, size: int | tuple[int, int] | None,
                start: float | None, end: float | None) -> torch.Tensor:
    """What `decode` returns of a clip."""
    window = window_frames(clip, start, end)
    chosen = [window[k] for k in pick(len(window))]
    missing = set(chosen)
    reformatter = VideoReformatter()
    pixels = {}
    for number, frame, damaged in with_damage(clip.frames(sorted(missing))):
        if number not in missing:
            continue
        source = clip.source(number)
        if damaged:
            raise Doubtful(f"{source}: damaged around {clip.seconds[number]:.2f} s; "
                           "replace or re-encode it")
        matrix = display_matrix(frame, source)
        if not isinstance(size, tuple):         # all frames take the size of the first one
            size = scaled_size(source, frame, matrix, size)
        pixels[number] = upright_pixels(frame, matrix, size, reformatter)
        missing.remove(number)
        if not missing:
            return torch.stack([pixels[number] for number in chosen])
    raise Doubtful(f"{clip.source(0)}: holds fewer frames than it says; replace or re-encode it")


def window_frames(clip: Decode, start: float | None, end: float | None) -> range:
    """Numbers of the frames that are shown in [start, end) seconds, at least one."""
    source = clip.source(0)
    seconds = clip.seconds
    if not seconds:
        raise Unreadable(f"{source}: holds no frame; the file is truncated or not a video")
    low = 0 if start is None else bisect.bisect_left(seconds, start)
    high = len(seconds) if end is None else bisect.bisect_left(seconds, end)
    if low >= high and start is not None and 0 <= start < clip.lasts:
        low = bisect.bisect_right(seconds, start) - 1       # none appears, but one is on display
        high = low + 1
    if low >= high:
        raise Unreadable(f"{source}: no frame lies between the sample's start and end; check them")
    return range(low, high)


def with_damage(frames: Iterable[tuple[int | None, av.VideoFrame | None]],
                ) -> Iterator[tuple[int | None, av.VideoFrame | None, bool]]:
    """Tells of each frame whether it is damaged, or may be predicted from one that is.

    A frame is predicted from those before it, back to a keyframe, so that damage lasts until the
    next keyframe. B-frames are predicted from the next frame too: they wait until it is known.
    """
    damaged = False
    waiting = []
    for number, frame in frames:
        broken = frame is None or frame.is_corrupt
        if broken:
            damaged = True
            waiting = [(n, b_frame, True) for n, b_frame, _ in waiting]
        elif frame.key_frame:
            damaged = False
        if not broken and frame.pict_type == PictureType.B:
            waiting.append((number, frame, damaged))
            continue
        yield from waiting
        waiting = []
        yield number, frame, damaged
    yield from waiting


def display_matrix(frame: av.VideoFrame, source: Source) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the turn and reflection with which a stored frame is to be shown.

    The pixel in column x and row y is shown in column a x + c y and row b x + d y.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:      # PyAV before 19 does not know EXIF, nor the matrix beside it
        orientation = exif_orientation(source) or ROTATIONS[round(frame.rotation / 90) * 90 % 360]
        return EXIF_ORIENTATIONS.get(orientation, EXIF_ORIENTATIONS[1])
    if matrix is None:
        return EXIF_ORIENTATIONS[1]
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return a, b, c, d


def exif_orientation(source: Source) -> int | None:
    """As in a picture's EXIF data: 1 to 8, or nonsense. None for a film."""
    try:
        with Image.open(io.BytesIO(source.read())) as picture:
            return picture.getexif().get(0x112, 1)
    except UnidentifiedImageError:
        return None


def is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    """Whether a frame's columns are shown as rows."""
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def scaled_size(source: Source, frame: av.VideoFrame, matrix: tuple[int, int, int, int],
                short: int | None) -> tuple[int, int]:
    """(height, width) of a frame as shown, of `short` pixels on its shorter side (None: as stored).

    Unreadable where a line of pixels would be blown up to gigabytes.
    """
    height, width = frame.height, frame.width
    if is_transposed(matrix):
        height, width = width, height
    if short is None:
        return height, width
    if max(height, width) > MAX_PROPORTION * min(height, width):
        raise Unreadable(f"{source}: frames of {width} x {height} pixels; expected a longer side "
                         f"of at most {MAX_PROPORTION} times the shorter; crop it, or scale it "
                         "whole (--resize release)")
    scale = short / min(height, width)
    return round(height * scale), round(width * scale)


def upright_pixels(frame: av.VideoFrame, matrix: tuple[int, int, int, int], size: tuple[int, int],
                   reformatter: VideoReformatter) -> torch.Tensor:
    """A frame scaled to (height, width) as shown, turned and reflected: uint8 RGB (3, h, w)."""
    height, width = size
    a, b, c, d = matrix
    across, down = a, d
    if is_transposed(matrix):
        height, width = width, height
        across, down = c, b
    rgb = reformatter.reformat(frame, width, height, format="rgb24", threads=1,
                               interpolation=Interpolation.BILINEAR)
    pixels = rgb.to_ndarray()                   # (h, w, 3)
    if is_transposed(matrix):
        pixels = pixels.transpose(1, 0, 2)
    if across < 0:
        pixels = pixels[:, ::-1]
    if down < 0:
        pixels = pixels[::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def open_video(source: Source) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A container and its first video stream that is no cover picture, to decode on one thread."""
    check_place(source)
    container = av.open(source.url, **OPEN_OPTIONS)
    try:
        return container, video_stream(source, container)
    except Unreadable:
        container.close()
        raise


def video_stream(source: Source, container: av.container.InputContainer) -> av.VideoStream:
    """The stream that open_video takes."""
    for stream in container.streams.video:
        if stream.disposition & Disposition.dependent:
            raise Unreadable(f"{source}: a picture stored as a grid of tiles, as phones do, which "
                             "cannot be joined here; convert it to JPEG or PNG")
    for stream in container.streams.video:
        cover = stream.disposition & Disposition.attached_pic
        text = container.format.name == "tty"
        if stream.codec_context and not cover and not text:
            stream.codec_context.thread_count = 1       # the reading processes are the parallelism
            return stream
    raise Unreadable(f"{source}: has no video stream with a known codec; re-encode it as H.264")


def frame_rate(stream: av.VideoStream) -> Fraction:
    """Frames a second, for frames without times; 25 where nothing says so, as in FFmpeg."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return as_fraction(rate)


def as_fraction(rational: Any) -> Fraction:
    """A time base of PyAV: a Fraction up to version 18, an AVRational of its own since 19."""
    return Fraction(rational.numerator, rational.denominator)


def has_times(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether frames bring their times along. AVI has none; FFmpeg makes them up from the order of
    the packets, which is not that of the frames where there are B-frames."""
    return not (container.format.name == "avi" and stream.codec_context.has_b_frames)


def duration(sample: dict) -> float:
    """Seconds that the clip of a sample is shown, whatever its "start" and "end"; 0.0 where nobody
    knows: it cannot be read, or is a folder of frames without "fps".

    Where the header does not say so (a live WebM, raw H.264, a transport stream), the packets do.
    """
    source = source_of(sample)
    if os.path.isdir(source.path):
        fps = sample.get("fps")
        return FrameFolder(source, fps, None, None).lasts if fps else 0.0
    try:
        container, stream = open_video(source)
        with container:
            guess = container.format.name in ("mpegts", "mpeg")     # of FFmpeg, not of the file
            if stream.duration and not guess:       # the sound may last longer than the picture
                return float(stream.duration * stream.time_base)
            if container.duration and not guess:
                return container.duration / av.time_base
            return measured_duration(container, stream)
    except (av.FFmpegError, OSError, Unreadable):
        return 0.0


def measured_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds from the first packet of a stream to the end of the last one."""
    clock = Clock(frame_rate(stream))
    tick = as_fraction(stream.time_base)
    lasts = 0.0
    for packet in container.demux(stream):
        if packet.size > 0:
            second = clock.advance(None if packet.dts is None else packet.dts * tick)
            length = packet.duration * tick if packet.duration else clock.step
            lasts = float(second + length)
    return lasts


class Clock:
    """Seconds after the first frame of a clip, exact, for frames in the order they are shown.

    Where the times of a file run back or leap (films joined end to end), the clock goes on from the
    frame before, and so it does for a frame without a time.
    """

    def __init__(self, rate: Fraction):
        self.step = 1 / rate
        self.now = None
        self.origin = Fraction(0)       # the file's time at the clock's 0

    def advance(self, time: Fraction | None) -> Fraction:
        """The clock's time of the next frame; `time`: what the file says, in seconds."""
        if self.now is None:
            self.now = Fraction(0)
            self.origin = time or self.origin
        elif time is None:
            self.now += self.step
        else:
            if not self.now < time - self.origin < self.now + MAX_PAUSE:
                self.origin = time - (self.now + self.step)
            self.now = time - self.origin
        return self.now


class PlainDecode:
    """Every frame of a clip, decoded from the first packet: once to count, once to keep."""

    def __init__(self, source: Source):
        self.file = source
        self.seconds = []
        self.lasts = 0.0
        for second, length, _ in every_frame(source):
            self.seconds.append(float(second))
            self.lasts = float(second + length)

    def source(self, number: int) -> Source:
        return self.file

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        for number, (_, _, frame) in enumerate(every_frame(self.file)):
            yield number, frame


def every_frame(source: Source) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame | None]]:
    """Yields (seconds after the first frame, seconds that it is shown, frame) of a plain decode.

    The frame is None where a packet cannot be decoded: that frame is lost, the others go on.
    """
    container, stream = open_video(source)
    with container:
        clock = Clock(frame_rate(stream))
        timed = has_times(container, stream)
        for frame in decode_packets(container, stream):
            if frame is None and timed and clock.now is not None:
                yield clock.now, clock.step, None       # its time is not known: with the last one
                continue
            time = None
            length = clock.step
            if frame is not None and frame.pts is not None and timed:
                time = frame.pts * as_fraction(frame.time_base)
            if frame is not None and frame.duration:
                length = frame.duration * as_fraction(frame.time_base)
            yield clock.advance(time), length, frame


def decode_packets(container: av.container.InputContainer, stream: av.VideoStream,
                    ) -> Iterator[av.VideoFrame | None]:
    """Yields the frames of a plain decode, None for a packet that cannot be decoded.

    Where no packet can, raises what the decoder says.
    """
    decoded = False
    failure = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            frames = [None]
            failure = error
        for frame in frames:
            decoded = decoded or frame is not None
            yield frame
    if failure is not None and not decoded:
        raise failure


class FrameFolder:
    """A folder of images is a clip, 2.jpg before 10.jpg."""

    def __init__(self, source: Source, fps: float | None, start: float | None, end: float | None):
        if not fps and (start is not None or end is not None):
            raise Unreadable(f"{source}: a folder of frames has no times; give their rate as "
                             '"fps", or drop "start" and "end"')
        names = [name for name in os.listdir(source.path)
                 if name.lower().endswith(IMAGES) and not name.startswith(".")]     # ._1.jpg: macOS
        names.sort(key=numbered_name)
        self.folder = source
        self.images = [Source(os.path.join(source.path, name)) for name in names]
        self.seconds = [i / (fps or 1) for i in range(len(names))]
        self.lasts = len(names) / (fps or 1)

    def source(self, number: int) -> Source:
        return self.images[number] if self.images else self.folder

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        for number in numbers:
            image = self.images[number]
            try:
                _, _, frame = next(every_frame(image), (0, 0, None))
            except (av.FFmpegError, OSError) as error:
                raise undecodable(image, error) from error
            yield number, frame


def numbered_name(name: str) -> list[int | str]:
    """A file's name as a key that sorts the numbers in it by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


class PlannedDecode:
    """The frames of a clip, with as few of the others decoded as its codec allows.

    The packets' headers say when each frame is shown, and which are keyframes, whatever the
    container and the frame rate. A frame is decoded from the last keyframe before it, and frames
    that no other refers to are skipped. Raises Doubtful where the headers contradict themselves
    or the decoder, Unreadable where the file is cut off.
    """

    def __init__(self, source: Source, container: av.container.InputContainer,
                 stream: av.VideoStream, start: float | None, end: float | None):
        self.file = source
        self.container = container
        self.stream = stream
        check_index(source, stream)
        is_whole = start is None and end is None
        if is_whole:
            seek_time = None
            headers, ends = read_headers(container, stream)
            if is_cut_off(container, stream, headers, ends):
                raise Unreadable(f"{source}: the file is truncated or damaged; fetch or encode it "
                                 "again")
        else:
            headers, seek_time = read_window_headers(source, container, stream, start, end)
        check_trust(source, container, stream, headers)

        self.pts = sorted(header.pts for header in headers if not header.is_hidden)
        self.keys = [header.pts for header in headers if header.is_key]
        if not self.pts or not self.keys:
            raise Doubtful(f"{source}: has no keyframe there")
        reads_from_start = seek_time is None
        origin = self.pts[0] if reads_from_start else stream.start_time     # the clip's 0 seconds
        begin = origin if reads_from_start else seek_time
        if self.keys[0] > begin:
            raise Doubtful(f"{source}: its first frames follow no keyframe")
        if not is_whole and origin != stream.start_time:
            raise Doubtful(f"{source}: begins at another time than it says")
        # An MP4's edit list may hide the first keyframe. The decoder then never returns it, so
        # in_order cannot check it; the plain decode begins there too.
        is_hidden = headers[0].is_key and headers[0].is_hidden
        self.start_key = headers[0].pts if is_hidden and reads_from_start else None
        tick = stream.time_base
        self.seconds = [(time - origin) * tick.numerator / tick.denominator for time in self.pts]
        last = max(headers, key=lambda header: header.pts)
        self.lasts = self.seconds[-1] + last.duration * float(tick)

    def source(self, number: int) -> Source:
        return self.file

    def keyframe(self, pts: int) -> int:
        """The time of the last keyframe at or before a time."""
        return self.keys[max(bisect.bisect_right(self.keys, pts) - 1, 0)]

    def frames(self, numbers: list[int]) -> Iterator[tuple[int | None, av.VideoFrame]]:
        number_of = {self.pts[number]: number for number in numbers}
        for key, group in itertools.groupby(number_of, self.keyframe):
            frames = self.decode_group(key, set(group))
            if key != self.start_key:
                frames = in_order(self.file, frames, key)
            for frame in frames:
                yield number_of.get(frame.pts), frame

    def decode_group(self, key: int, missing: set[int]) -> Iterator[av.VideoFrame]:
        """Yields the frames from the keyframe at time `key` to the last of the `missing` times.

        Frames that no other refers to are skipped unless missing: no pixel of the others changes.
        """
        context = self.stream.codec_context
        skippable = context.codec.canonical_name in SKIPPABLE_CODECS
        started = False
        self.container.seek(key, stream=self.stream)
        for packet in self.container.demux(self.stream):
            if packet.size == 0 or not missing:
                break
            started = started or packet.pts == key
            if started:
                skip = skippable and packet.pts not in missing
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                missing.discard(packet.pts)
                yield from context.decode(packet)
        # What the decoder holds back for reordering comes out by flushing, without more packets.
        yield from context.decode(None)


def in_order(source: Source, frames: Iterable[av.VideoFrame], key: int,
             ) -> Iterator[av.VideoFrame]:
    """The frames of a group, if the decoder agrees with the headers; else raises Doubtful.

    The first one must be a keyframe, shown at time `key`; the others follow in time.
    """
    last = None
    for frame in frames:
        if frame.pts is None or last is not None and frame.pts <= last:
            raise Doubtful(f"{source}: its frames are not shown in the order of their times")
        if frame.pts < key:
            continue            # shown before the keyframe but stored after it (open GOP)
        if (last is None or last < key) and not (frame.pts == key and frame.key_frame):
            raise Doubtful(f"{source}: marks a keyframe that is none")
        last = frame.pts
        yield frame


class Header(NamedTuple):
    """What a packet says of its frame, times in units of the stream's time base."""
    pts: int | None         # when the frame is shown
    dts: int | None         # when it is decoded: never later
    duration: int           # 0: not known
    is_key: bool
    is_hidden: bool         # decoded, but outside an MP4's edit list
    is_corrupt: bool


def check_index(source: Source, stream: av.VideoStream) -> None:
    """Unreadable if the container's index of its packets goes on after the end of the file."""
    index = stream.index_entries
    if len(index) > 0 and index[-1].pos + index[-1].size > source.length:
        raise Unreadable(f"{source}: the file is truncated; fetch or encode it again")


def read_window_headers(source: Source, container: av.container.InputContainer,
                        stream: av.VideoStream, start: float | None, end: float | None,
                        ) -> tuple[list[Header], int | None]:
    """The headers of the packets from the last keyframe before `start` seconds to `end`, and the
    time of the seek that found it: None where the packets are read from the first one on, because
    the container has no index."""
    begin = stream.start_time
    tick = float(stream.time_base)
    if begin is None:
        raise Doubtful(f"{source}: does not say when it begins")
    seek_time = None
    if start is not None and len(stream.index_entries) > 0:
        seek_time = begin + min(max(int(start / tick), 0), MAX_TIME)
        container.seek(seek_time, stream=stream)
    high = None if end is None else begin + end / tick
    headers, _ = read_headers(container, stream, high)
    return headers, seek_time


def read_headers(container: av.container.InputContainer, stream: av.VideoStream,
                 high: float | None = None) -> tuple[list[Header], float]:
    """The headers of a stream's packets, as stored, until all frames shown before time `high` are
    there; and the seconds at which the longest stream of the container ends."""
    headers = []
    ends = {}
    for packet in container.demux():
        if packet.size == 0:
            continue                            # an empty packet ends each stream
        length = packet.duration or 0
        if packet.pts is not None:
            number = packet.stream_index
            ends[number] = max(packet.pts + length, ends.get(number, 0))
        if packet.stream_index != stream.index:
            continue
        headers.append(Header(packet.pts, packet.dts, length, packet.is_keyframe,
                              packet.is_discard, packet.is_corrupt))
        if high is not None and packet.dts is not None and packet.dts >= high:
            break
    seconds = [ticks * float(container.streams[number].time_base) for number, ticks in ends.items()]
    return headers, max(seconds, default=0.0)


def check_trust(source: Source, container: av.container.InputContainer, stream: av.VideoStream,
                headers: list[Header]) -> None:
    """Doubtful unless the headers place each frame, and the decoder can tell a keyframe."""
    codec = stream.codec_context.codec
    checkable = codec.canonical_name in PLANNED_CODECS or codec.intra_only
    if not checkable and len(headers) > 1:
        raise Doubtful(f"{source}: no decoder confirms the keyframes of {codec.canonical_name}")
    times = [header.pts for header in headers]
    if not has_times(container, stream) or None in times or len(set(times)) < len(times):
        raise Doubtful(f"{source}: its frames do not all have times of their own")
    if any(header.is_corrupt for header in headers):
        raise Doubtful(f"{source}: packets are damaged")
    decoded = [header.dts for header in headers if header.dts is not None]
    late = any(header.dts is not None and header.dts > header.pts for header in headers)
    if late or decoded != sorted(decoded):
        raise Doubtful(f"{source}: frames are decoded after they are shown")
    keys = [header.pts for header in headers if header.is_key]
    if keys != sorted(keys) or longest_pause(headers) * float(stream.time_base) > MAX_PAUSE:
        raise Doubtful(f"{source}: its times run back, or leap")


def is_cut_off(container: av.container.InputContainer, stream: av.VideoStream,
               headers: list[Header], ends: float) -> bool:
    """Whether the end of a file is missing, by what its packets and its own header say.

    A damaged last packet is a sign of it. In Matroska, the film or its sound must last as long as
    the header says. Where packets do not say how long their frame is shown, the longest pause
    between frames is a bound.
    """
    if headers and headers[-1].is_corrupt:
        return True
    if not container.format.name.startswith("matroska"):
        return False
    timed = all(header.duration for header in headers)
    pause = 0 if timed else longest_pause(headers) * float(stream.time_base)
    return ends + pause < 0.9 * (container.duration or 0) / av.time_base - 1


def longest_pause(headers: list[Header]) -> int:
    """The longest time between two frames, in units of the time base."""
    times = sorted(header.pts for header in headers if header.pts is not None)
    return max((after - before for before, after in itertools.pairwise(times)), default=0)


def texts_of(sample: dict) -> list[str]:
    """Every text that a sample may be read with."""
    texts = [sample[field] for field in ("text", "question") if field in sample]
    for _, _, text in sample.get("captions", []):
        texts.append(text)
    return texts + sample.get("texts", []) + sample.get("options", [])


def right_option(sample: dict) -> int:
    """The index of the right one of a sample's options; DataError if "answer" does not tell it."""
    options = sample["options"]
    answer = sample.get("answer")
    if answer in options:
        return options.index(answer)
    if isinstance(answer, str) and answer.isdigit():        # cells of a table are strings
        answer = int(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(f'{sample["source_line"]}: "answer" is {answer!r}; expected an index into '
                        f"the {len(options)} options, from 0, or the words of one of them")
    return answer


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Tokenizer:
    """BERT's tokenisation (lower case, accents stripped, WordPiece), by the `tokenizers` package.

    words: the package's tokenizer. pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special
    tokens. vocab_size: one more than the highest id. vocabulary: what masking needs to know of it.
    """

    def __init__(self, words: WordPieces):
        words.no_truncation()                   # tokenizer.json may ask for both
        words.no_padding()
        tokens = words.get_vocab()
        missing = [token for token in SPECIALS if token not in tokens]
        if missing:
            raise DataError(f"the vocabulary lacks {', '.join(missing)}; give one made for BERT")
        self.vocab_size = max(tokens.values()) + 1
        if self.vocab_size > 2 * len(tokens) + 1000:        # each id costs 3 kB of weights in B
            raise DataError("the vocabulary is not numbered from 0 without large gaps")
        self.words = words
        self.pad_id = tokens["[PAD]"]
        self.unk_id = tokens["[UNK]"]
        self.cls_id = tokens["[CLS]"]
        self.sep_id = tokens["[SEP]"]
        self.mask_id = tokens["[MASK]"]
        self.vocabulary = Vocabulary(tokens)

    @staticmethod
    def load(name: str | Path, text: str | None = None) -> "Tokenizer":
        """A local vocab.txt or tokenizer.json; any other name is fetched from Hugging Face.

        text: the content of a tokenizer.json, as words.to_str() gives it; then nothing is read, and
        `name` stands for it in errors. DataError if it is no vocabulary, or cannot be fetched.
        """
        path = Path(name)
        try:
            if text is not None:
                words = WordPieces.from_str(text)
            elif path.suffix == ".json":
                words = WordPieces.from_str(path.read_text("utf-8-sig"))
            elif path.is_file() or path.suffix == ".txt":   # a file's name is never fetched
                lines = path.read_text("utf-8-sig").rstrip().split("\n")
                tokens = {line.rstrip(): i for i, line in enumerate(lines)}
                words = BertWordPieceTokenizer(tokens)
            else:
                words = WordPieces.from_pretrained(str(name))
            # A vocabulary without its token for unknown words fails when it meets one.
            words.encode("a word that is in no vocabulary")
        except Exception as error:         # tokenizers raises bare Exception, whatever went wrong
            reason = str(error).splitlines()[0]
            raise DataError(f"{name} cannot be read, nor fetched as a vocabulary ({reason:.120}); "
                            "with no network, give the path of a local vocab.txt or "
                            "tokenizer.json") from None
        return Tokenizer(words)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` tokens made of the words of some texts.

        It holds every letter that occurs, alone and as a '##letter', so that all words can be
        spelled, and the most frequent words whole. (The trainer of `tokenizers` breaks ties by hash
        order, so that no two runs give the same vocabulary.)
        """
        words = BertWordPieceTokenizer()
        counts = collections.Counter()
        for text in texts:
            normal = words.normalizer.normalize_str(whole_characters(text))
            for word, _ in words.pre_tokenizer.pre_tokenize_str(normal):
                counts[word] += 1
        letters = sorted(set().union(*counts))
        spelling = SPECIALS + letters + ["##" + letter for letter in letters]
        by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
        tokens = list(dict.fromkeys(spelling + by_frequency))       # a word of one letter is there
        tokens = tokens[:max(vocab_size, len(spelling))]
        ids = {token: i for i, token in enumerate(tokens)}
        return Tokenizer(BertWordPieceTokenizer(ids))

    def encode(self, text: str, max_len: int, question: str | None = None) -> list[int]:
        """Ids of [CLS] text [SEP], or of [CLS] question [SEP] text [SEP], at most `max_len`.

        Where they are too many the question loses its last words. The text loses its own only where
        it is too long even without the question.
        """
        text_ids = self.ids_of(text)
        question_ids = self.ids_of(question or "")
        if not question_ids:
            return [self.cls_id] + text_ids[:max_len - 2] + [self.sep_id]
        text_ids = text_ids[:max_len - 3]
        question_ids = question_ids[:max_len - 3 - len(text_ids)]
        return [self.cls_id] + question_ids + [self.sep_id] + text_ids + [self.sep_id]

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text alone, without [CLS] and [SEP]."""
        return self.words.encode(whole_characters(text), add_special_tokens=False).ids

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """The words of some texts that the vocabulary cannot say, each once, in their order.

        It does not know a word that becomes [UNK]. It only spells one whose pieces have fewer than
        two letters on average, such as "dog" as d ##o ##g: a model that has not been trained on
        such words knows nothing of their meaning. Punctuation is no word.
        """
        unknown = {}
        for text in texts:
            for word, ids in self.words_of(text):
                is_spelled = len(ids) > 1 and len(word) < 2 * len(ids)
                is_missing = self.unk_id in ids and any(map(str.isalnum, word))
                if is_spelled or is_missing:
                    unknown[word.lower()] = True
        return list(unknown)

    def words_of(self, text: str) -> list[tuple[str, list[int]]]:
        """Each word of a text, and each punctuation mark, with the ids of its pieces."""
        text = whole_characters(text)
        encoding = self.words.encode(text, add_special_tokens=False)
        begins = {}
        ends = {}
        ids = collections.defaultdict(list)
        for token_id, (begin, end), number in zip(
                encoding.ids, encoding.offsets, encoding.word_ids):
            begins.setdefault(number, begin)
            ends[number] = end
            ids[number].append(token_id)
        return [(text[begins[number]:ends[number]], ids[number]) for number in ids]


# ==== Batch: what a task reads of each sample, and samples put together ===========================

MIN_WINDOW = 4.0        # seconds to which a shorter caption's window is widened, as in the release


def answers_of(manifest: Manifest) -> list[str]:
    """The classes of open-ended QA (Sec. 4.2.1) and of probes (Tab. 12), the commonest first.

    They stand in answers.json beside the manifest, as `convert` writes it. Without such a file
    they are all answers of the manifest. DataError if there are none, or if they do not fit.
    """
    path = Path(manifest.names[0]).parent / "answers.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{path}: not a JSON list of answers ({error})") from None
        if not isinstance(content, list):
            raise DataError(f"{path}: not a JSON list of answers, but {content!r:.60}")
        answers = list(dict.fromkeys(map(str, content)))
        known = set(answers)
        if not any(str(sample.get("answer")) in known for sample in manifest):
            raise DataError(f"{path}: holds no answer of {manifest.names[0]}; it may belong to "
                            "another data set: move one of the two to a folder of its own")
        return answers
    counts = collections.Counter(
        str(sample["answer"]) for sample in manifest if "answer" in sample)
    if not counts:
        raise DataError(f'{manifest.names[0]}: no line has an "answer"; expected '
                        '{"video": ..., "answer": "a word"}, for open-ended QA a "question" too')
    return [answer for answer, _ in counts.most_common()]


@dataclass(eq=False)
class Clips:
    """The samples of a manifest as items for `collate`: clips[index, visit].

    Every random choice follows from (seed, visit), whichever process reads the sample. An item is
    a dict with the entries below, and those that TASKS tells its task's function to add.

        index, visit    the key
        source_line     "file:line" of the sample; manifest_id: which manifest that is
        kind            a label to report accuracy by, or None
        clip_id         equal for samples of one film
        video           uint8 (S, 3, H, W), S = 1 for an image; (K, S, 3, H, W) if views > 1
        unreadable      messages: why there is no video

    DataError if a line lacks what the task needs.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    task: str                   # a key of TASKS
    frames: int                 # S
    image_size: int             # pixels of a side
    max_text_len: int           # tokens
    train: bool                 # frames, crop, caption and masks at random
    seed: int = 0
    views: int = 1              # K temporally different draws of S frames, in evaluation
    resize: str = "release"     # how a frame becomes a square: see RESIZE, read_frames
    order: str = "forward"      # of frames: or shuffled, reversed, or the first one S times
    boxes: bool = True          # VCR: draw the entities' regions (Tab. 5, "Mask")
    whole_words: bool = False   # MLM: mask all pieces of a word together (release)
    answers: list[str] | None = None    # the classes of qa and probe
    false_captions: int = 0     # retrieval in training: captions of other lines among the options

    def __post_init__(self):
        if self.task not in TASKS:
            raise DataError(f"no task {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.task == "retrieval" and not self.train:
            self.manifest = one_line_per_clip(self.manifest)
        self.class_of = {answer: i for i, answer in enumerate(self.answers or [])}

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, visit = key
        sample = self.manifest[index]
        item = {"index": index, "visit": visit, "source_line": sample["source_line"],
                "manifest_id": self.manifest.locate(index)[0], "kind": sample.get("kind"),
                "clip_id": clip_id(sample), "unreadable": []}
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs too, which costs a fifth of reading a small clip.
            torch.default_generator.manual_seed(hash64(self.seed, visit))
            item.update(self.read_words(sample, index))
            if item.get("window"):
                sample["start"], sample["end"] = item["window"]
            try:
                item["video"] = self.read_video(sample)
            except Unreadable as error:
                item["unreadable"].append(f"{sample['source_line']}: {error}")
        return item

    def read_words(self, sample: dict, index: int = 0) -> dict:
        """The entries of an item that come from the words of a sample: see TASKS."""
        words = TASKS[self.task](self, sample, index)
        if type(words.get("label", 0)) is not int:
            raise DataError(f"{sample['source_line']}: its label is {words['label']!r}; expected "
                            "the number of an option or of a class")
        return words

    def read_video(self, sample: dict) -> Tensor:
        """uint8 (S, 3, H, W) or, of several views, (K, S, 3, H, W). Unreadable."""
        frames = 1 if is_image(sample) else self.frames
        views = 1 if self.train else self.views
        order = self.frame_order(frames)

        def pick(n: int) -> list[int]:
            picked = []
            for view in range(views):
                indices = sample_frames(n, frames, self.train, view, views)
                picked += [indices[s] for s in order]
            return picked

        video = read_frames(sample, pick, self.image_size, self.resize, self.train, self.boxes)
        if views > 1:
            video = video.unflatten(0, (views, frames))
        return video

    def frame_order(self, frames: int) -> list[int]:
        """In which order the model sees S frames; what needs their order fails without it."""
        if self.order == "shuffled":
            return torch.randperm(frames).tolist()
        if self.order == "reversed":
            return list(range(frames))[::-1]
        if self.order == "first":
            return [0] * frames
        return list(range(frames))

    def encode(self, text: str, question: str | None = None) -> list[int]:
        return self.tokenizer.encode(text, self.max_text_len, question)


# ---- the words of each task
#
# A task is a function of a sample, which returns some of these entries:
#
#   caption                     token ids of a text that tells what the clip shows
#   mlm_caption, mlm_labels     the same text with words masked, and the words that stood there
#   all_captions                retrieval in evaluation: token ids of each caption of the clip
#   question                    token ids of a question about the clip
#   options                     token ids of each candidate, of which one is to be chosen
#   label                       which option is right, or the class of the answer (-1: no class)
#   window                      (start, end) in seconds of the caption's part of the clip, or None
#
# `collate` puts together whichever are there. To add a task, write such a function and list it in
# TASKS.

def pretrain_words(clips: Clips, sample: dict, index: int) -> dict:
    """VTM, MLM and VTC, Sec. 3.3: one caption, and the same with words masked."""
    text, window = choose_caption(sample, clips.train)
    ids = clips.encode(text)
    masked, labels = mask_words(torch.tensor(ids), clips.tokenizer.vocabulary, clips.whole_words)
    return {"caption": ids, "mlm_caption": masked.tolist(), "mlm_labels": labels.tolist(),
            "window": window}


def retrieval_words(clips: Clips, sample: dict, index: int) -> dict:
    """Retrieval, Sec. 4.2.2. In evaluation all captions of the clip.

    In training one of its captions; the options are that and captions of other lines.
    """
    text, window = choose_caption(sample, clips.train)
    if not clips.train:
        captions = [text]
        if window is None and "texts" in sample:
            captions = sample["texts"]
        all_captions = [clips.encode(caption) for caption in captions]
        return {"all_captions": all_captions, "window": window}
    ids = clips.encode(text)
    options = [ids]
    for caption in false_captions(clips, sample, index):
        options.append(clips.encode(caption))
    return {"caption": ids, "options": options, "label": 0, "window": window}


def choice_words(clips: Clips, sample: dict, index: int) -> dict:
    """Multiple choice, Sec. 4.2.1, 4.2.3, 4.2.4: each option, after the question if there is one.
    """
    question = sample.get("question")
    options = [clips.encode(option, question) for option in need(sample, "options")]
    return {"options": options, "label": right_option(sample)}


def qa_words(clips: Clips, sample: dict, index: int) -> dict:
    """Open-ended QA, Sec. 4.2.1: a question, answered by one of the classes."""
    question = clips.encode(need(sample, "question"))
    return {"question": question, "label": answer_class(clips, sample)}


def probe_words(clips: Clips, sample: dict, index: int) -> dict:
    """The linear probe, Tab. 12: a class and no words."""
    return {"label": answer_class(clips, sample)}


TASKS = {"pretrain": pretrain_words, "retrieval": retrieval_words, "choice": choice_words,
         "qa": qa_words, "probe": probe_words}


def choose_caption(sample: dict, train: bool) -> tuple[str, tuple[float, float] | None]:
    """A caption of a sample, random in training, else the first; and its window of the clip.

    A window that is shorter than MIN_WINDOW is widened about its middle. A caption without a window
    of its own tells of the whole clip (None).
    """
    captions = sample.get("captions") or sample.get("texts") or [need(sample, "text")]
    number = int(torch.randint(len(captions), ())) if train else 0
    if not sample.get("captions"):
        return captions[number], None
    start, end, text = captions[number]
    middle = (start + end) / 2
    half = max(end - start, MIN_WINDOW) / 2
    return text, (max(middle - half, 0), middle + half)


def one_line_per_clip(manifest: Manifest) -> Manifest:
    """The manifest of a gallery (Sec. 4.2.2): each clip has one line with all its captions.

    A table may give each caption a line of its own. If each line were a clip of its own, a caption
    would have several right clips, and ranking would count all but one as wrong. Lines of
    different windows ("start", "end") of a film do stay different clips.
    """
    paths = []
    for manifest_id, lines in enumerate(manifest.sizes):
        begin = manifest.ends[manifest_id] - lines
        samples = merge_captions([manifest[begin + line] for line in range(lines)])
        if len(samples) == lines:
            paths.append(manifest.paths[manifest_id])
            continue
        paths.append(temporary_manifest(samples))
        if os.environ.get("RANK", "0") == "0":
            print(f"{manifest.names[manifest_id]}: {lines} lines are of {len(samples)} clips; the "
                  "captions of a clip go together", file=sys.stderr)
    if paths == manifest.paths:
        return manifest
    merged = Manifest(paths)
    merged.names = manifest.names
    merged.columns = manifest.columns
    return merged


def merge_captions(samples: list[dict]) -> list[dict]:
    """One sample for each clip of some samples, its "texts" being the captions of all of them."""
    clips = {}
    for number, sample in enumerate(samples):
        if sample.get("captions"):                  # has windows of its own, each with a caption
            clips[number] = sample
            continue
        key = (clip_id(sample), sample.get("start"), sample.get("end"))
        clip = clips.setdefault(key, {**sample, "texts": []})
        for text in sample.get("texts") or [need(sample, "text")]:
            if text not in clip["texts"]:
                clip["texts"].append(text)
    return list(clips.values())


def clip_id(sample: dict) -> tuple[str, str]:
    """What is equal for samples of one film: its file, and its place there if that is a shard."""
    return sample["video"], str(sample.get("member"))


def false_captions(clips: Clips, sample: dict, index: int) -> list[str]:
    """Captions of random lines of the sample's manifest, but for those of the sample's film."""
    manifest_id, line = clips.manifest.locate(index)
    others = torch.randint(clips.manifest.sizes[manifest_id], (clips.false_captions,)).tolist()
    true_captions = texts_of(sample)
    captions = []
    for number in others:
        other = clips.manifest[index - line + number]
        if clip_id(other) == clip_id(sample):           # each caption on a line of its own
            continue
        caption, _ = choose_caption(other, train=True)
        if caption not in true_captions:
            captions.append(caption)
    return captions


def answer_class(clips: Clips, sample: dict) -> int:
    """The number of a sample's answer among the classes, -1 if it is none of them."""
    return clips.class_of.get(str(need(sample, "answer")), -1)


# ---- items put together

def collate(items: list[dict], clips: Clips, group: int | None = None) -> dict:
    """Items of Clips as one batch of B clips, without those that have no video (B may be 0).

    Lists of B: "source_line", "kind". Of any length: "unreadable", what could not be read.
    int64 (B,): "index", "manifest_id" and, if the task has it, "label".
    "video": uint8 (B, S, 3, H, W) or, of several views, (B, K, S, 3, H, W).
    What the words of a task become: see add_texts, add_pairs, add_masked_words, add_captions and
    add_options.
    group: VTM's pairs are drawn within so many neighbours (default: all items), so that batches of
    several groups have the pairs of batches of one.
    DataError if images and clips are mixed. B = 0: "index" is the only tensor.
    """
    readable = [item for item in items if "video" in item]
    messages = [item["unreadable"] for item in items]
    batch = {"unreadable": list(itertools.chain(*messages))}
    for name in ("source_line", "kind"):
        batch[name] = [item[name] for item in readable]
    batch["index"] = torch.tensor([item["index"] for item in readable], dtype=torch.int64)
    if not readable:
        return batch
    batch["video"] = stack_videos(readable)
    for name in ("manifest_id", "label"):
        if name in readable[0]:
            batch[name] = torch.tensor([item[name] for item in readable])
    if "caption" in readable[0]:
        add_texts(batch, [item["caption"] for item in readable], clips)
        add_pairs(batch, items, clips.seed, group or len(items))
    if "mlm_caption" in readable[0]:
        add_masked_words(batch, readable, clips)
    if "question" in readable[0]:
        add_texts(batch, [item["question"] for item in readable], clips)
    if "all_captions" in readable[0]:
        add_captions(batch, readable, clips)
    if "options" in readable[0]:
        add_options(batch, readable, clips)
    return batch


def stack_videos(items: list[dict]) -> Tensor:
    """(B, S, 3, H, W) of items of one shape; DataError if some are images and some are clips."""
    for item in items:
        if item["video"].shape != items[0]["video"].shape:
            raise DataError(f'{item["source_line"]}: images and clips in one manifest, as '
                            f'{items[0]["source_line"]} is of the other kind: give the images a '
                            "manifest of their own")
    return torch.stack([item["video"] for item in items])


def add_texts(batch: dict, texts: list[list[int]], clips: Clips) -> None:
    """Adds "text_ids" int64, "text_mask" bool (B, m): the one text of each clip."""
    batch["text_ids"], batch["text_mask"] = pad_texts(texts, clips)


def add_captions(batch: dict, items: list[dict], clips: Clips) -> None:
    """Adds "text_ids", "text_mask" (T, m), the captions of all clips, and "text_clip" int64 (T,).

    text_clip: the row of each caption's clip.
    """
    texts = list(itertools.chain(*(item["all_captions"] for item in items)))
    counts = torch.tensor([len(item["all_captions"]) for item in items])
    batch["text_ids"], batch["text_mask"] = pad_texts(texts, clips)
    batch["text_clip"] = torch.repeat_interleave(counts)


def add_options(batch: dict, items: list[dict], clips: Clips) -> None:
    """Adds "option_ids" int64, "option_text_mask" bool (B, O, m), and "option_mask" bool (B, O).

    O: the most options of a clip. option_mask: False where a clip has fewer.
    """
    options = list(itertools.chain(*(item["options"] for item in items)))
    counts = torch.tensor([len(item["options"]) for item in items])
    ids, mask = pad_texts(options, clips)                                   # (options of all, m)
    is_option = torch.arange(int(counts.max())) < counts[:, None]           # (B, O)
    shape = (*is_option.shape, ids.shape[1])
    batch["option_mask"] = is_option
    batch["option_ids"] = torch.full(shape, clips.tokenizer.pad_id)
    batch["option_ids"][is_option] = ids
    batch["option_text_mask"] = torch.zeros(shape, dtype=torch.bool)
    batch["option_text_mask"][is_option] = mask


def add_masked_words(batch: dict, items: list[dict], clips: Clips) -> None:
    """Adds MLM's entries, Sec. 3.3: "mlm_ids" (B, m), "mlm_positions" and "mlm_labels" (M,).

    Words are masked when a sample is read, before padding: the longest text of a batch then has no
    influence on the masks of the others.
    """
    m = batch["text_ids"].shape[1]
    masked = [item["mlm_caption"] for item in items]
    labels = [item["mlm_labels"] for item in items]
    batch["mlm_ids"] = pad(masked, m, clips.tokenizer.pad_id)
    batch["mlm_positions"], batch["mlm_labels"] = masked_positions(pad(labels, m, -100))


def add_pairs(batch: dict, items: list[dict], seed: int, group: int) -> None:
    """Adds VTM's pairs, Sec. 3.3: "vtm_video", "vtm_labels" (B,), see allinone.vtm_pairs.

    They are drawn within each group of neighbouring items, by (seed, the group's first visit). An
    item without a video leaves its group, and changes nothing in the others.
    """
    videos = []
    labels = []
    rows = 0                                        # of the batch, in the groups before
    for begin in range(0, len(items), group):
        members = [item for item in items[begin:begin + group] if "video" in item]
        if not members:
            continue
        generator = torch.Generator().manual_seed(hash64(seed, members[0]["visit"], 1))
        texts = [tuple(item["caption"]) for item in members]
        clip_ids = [item["clip_id"] for item in members]
        partners, matched = vtm_pairs(texts, clip_ids, generator)
        videos.append(rows + partners)
        labels.append(matched)
        rows += len(members)
    batch["vtm_video"] = torch.cat(videos)
    batch["vtm_labels"] = torch.cat(labels)


def pad_texts(texts: list[list[int]], clips: Clips) -> tuple[Tensor, Tensor]:
    """Ids int64 and mask bool (False at padding), both (N, m), of N lists of token ids.

    m is the longest text rounded up to 8, so that few lengths occur, but at most max_text_len.
    """
    lengths = torch.tensor([len(text) for text in texts])
    m = min(-(-int(lengths.max()) // 8) * 8, clips.max_text_len)
    mask = torch.arange(m) < lengths[:, None]
    return pad(texts, m, clips.tokenizer.pad_id), mask


def pad(rows: list[list[int]], length: int, value: int) -> Tensor:
    """Lists of unequal length as int64 (rows, length), filled up with `value`."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


# ==== Reading: processes that survive their files =================================================

MAX_SKIPS = 100         # unreadable lines in a row after which training cannot be meant to go on
READ_AHEAD = 1 << 30    # bytes of pixels that a process reads ahead of the batch in use, at most


def usable_cores() -> int:
    """How many CPU cores this process may use: in a job perhaps fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):            # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Readers:
    """Calls `function` in processes that may die or hang. Each call is answered or Unreadable.

    Each process is minded by a thread, which starts it anew when it has died. A task that killed
    its process is tried once more, for that may have been an accident. `timeout`: seconds that a
    task may take. workers = 0: `function` runs in the calling process, without protection.

    (A DataLoader is no help here: it reports a dead worker by an exception in the main thread, at
    any point of it.)
    """

    def __init__(self, function: Callable, workers: int, timeout: float):
        self.function = function
        self.workers = workers
        self.timeout = timeout
        self.closed = False
        self.processes = set()                  # those that live
        self.of_thread = threading.local()      # .reader: process and pipe of each thread
        self.lock = threading.Lock()            # to start a process, or to ask for its exit code
        # Fresh processes have none of our threads and locks. The fork server imports torch once
        # for all of them. (In Python 3.11 it finds installed packages only, not this file.)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["av", "tokenizers", "torchvision.transforms.v2"])

    def start(self) -> tuple:
        """A new reading process, and our end of the pipe to it.

        The process begins by importing the script that was started. RuntimeError if that fails.
        """
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # Python marks a process "_inheriting" while it imports the user's script. So this is a
            # reading process, and that import has led here: without an end each process would
            # start others. The process that started it says what is wrong.
            sys.exit(1)
        pipe, far_end = self.context.Pipe()
        process = self.context.Process(
            target=serve, args=(self.function, far_end, self.timeout), daemon=True)
        with self.lock:
            process.start()
        self.processes.add(process)
        far_end.close()
        try:
            pipe.recv()                             # that it is ready, see serve
        except (EOFError, ConnectionError):
            with self.lock:
                process.join()
            # A process that a signal has killed goes back like a living one. Its first task then
            # finds it dead, and is tried once more (see __call__).
            if process.exitcode == 1:               # an exception
                self.bury(process, pipe)
                raise RuntimeError(
                    "no reading process can start, since each of them imports your script and that "
                    "fails; put what the script does under `if __name__ == \"__main__\":`, or "
                    "read with workers=0") from None
        return process, pipe

    def bury(self, process: multiprocessing.Process, pipe: Connection) -> None:
        """Forgets a process that has died: it and its pipe hold a file descriptor each."""
        with self.lock:
            process.join()
        self.processes.discard(process)
        pipe.close()

    def __call__(self, task):
        """function(task), computed in the calling thread's process; Unreadable."""
        if not self.workers:
            return self.function(task)
        for attempt in range(2):
            if self.closed:
                raise Unreadable("reading has ended")
            if getattr(self.of_thread, "reader", None) is None:
                self.of_thread.reader = self.start()
            process, pipe = self.of_thread.reader
            try:
                pipe.send(task)
                result, error = pipe.recv()
            except (EOFError, ConnectionError):             # the process has died
                self.of_thread.reader = None
                self.bury(process, pipe)
                if process.exitcode == -signal.SIGALRM:
                    raise Unreadable(f"took longer than {self.timeout:g} s to read") from None
                continue
            if error is not None:
                raise error
            return result
        raise Unreadable(f"took its reader down (exit code {process.exitcode})")

    def ahead(self, work: Callable, tasks: Iterable, depth: int) -> Iterator:
        """Yields work(task) for each task, in order, computed by threads `depth` tasks ahead."""
        if not self.workers:
            yield from map(work, tasks)
            return
        pool = ThreadPoolExecutor(self.workers)
        pending = collections.deque()
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
            for process in list(self.processes):
                process.kill()


def serve(function: Callable, pipe: Connection, timeout: float) -> None:
    """The loop of a reading process: answers one task after another until its trainer is gone.

    A task that takes too long ends the process by SIGALRM, also in the middle of a decoder. An
    exception is sent back, to be raised where the task came from.
    """
    torch.set_num_threads(1)                        # the processes are the parallelism
    with suppress(EOFError, ConnectionError):       # the trainer is gone, however it ended
        pipe.send("ready")
        while True:
            task = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                answer = function(task), None
            except Exception as error:
                answer = None, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)


def read_item(clips: Clips, key: tuple[int, int]) -> dict:
    """clips[key], its video as a NumPy array.

    A pipe carries an array as plain bytes. A tensor would take a file descriptor and a piece of
    /dev/shm until it is used, and containers have little of both.
    """
    item = clips[key]
    if "video" in item:
        item["video"] = item["video"].numpy()
    return item


class ItemReader:
    """Items of Clips by Readers, also for samples that cannot be read.

    In training the next readable line of the manifest stands in for such a sample, and the item's
    "unreadable" says so. In evaluation nothing does, and the item has no "video". A sample that
    killed its reader, or took longer than the timeout, is not tried again.
    """

    def __init__(self, clips: Clips, readers: Readers):
        self.clips = clips
        self.readers = readers
        self.failures = {}              # sample: why it is not tried again

    def __call__(self, key: tuple[int, int]) -> dict:
        """The item of a (sample, visit). DataError if MAX_SKIPS lines in a row are unreadable."""
        index, visit = key
        manifest = self.clips.manifest
        manifest_id, _ = manifest.locate(index)
        tries = min(MAX_SKIPS, manifest.sizes[manifest_id])
        unreadable = []
        for step in range(tries):
            item = self.read(manifest.after(index, step), visit)
            unreadable += item["unreadable"]
            if "video" in item or not self.clips.train:
                item["unreadable"] = unreadable
                return item
        raise DataError(f"{tries} clips in a row cannot be read, the first: {unreadable[0]}")

    def read(self, index: int, visit: int) -> dict:
        """The item of this sample, without a video if it cannot be read."""
        try:
            if index in self.failures:
                raise Unreadable(self.failures[index])
            item = self.readers((index, visit))
        except Unreadable as error:
            self.failures[index] = str(error)       # an exception would keep its traceback
            source_line = self.clips.manifest[index]["source_line"]
            return {"index": index, "visit": visit, "unreadable": [f"{source_line}: {error}"]}
        if "video" in item:
            item["video"] = torch.from_numpy(item["video"])
        return item


def load(clips: Clips, micro_batches: Iterable[list[tuple[int, int]]], merge: Callable,
         workers: int, timeout: float = 120, clips_ahead: int = 64) -> Iterator[dict]:
    """Yields merge(items) for each list of (sample, visit), in order.

    `workers` processes read, see Readers and ItemReader. clips_ahead: how many clips they read
    ahead of the micro-batch that the caller has. Training asks for two whole steps, so that a GPU
    does not wait for the slowest clips. Their pixels take at most READ_AHEAD bytes.
    """
    readers = Readers(partial(read_item, clips), workers, timeout)
    bytes_per_clip = clips.views * clips.frames * 3 * clips.image_size ** 2
    depth = max(2 * workers, min(clips_ahead, READ_AHEAD // bytes_per_clip))
    sizes = collections.deque()         # of the micro-batches that are being read

    def keys() -> Iterator[tuple[int, int]]:
        for micro_batch in micro_batches:
            sizes.append(len(micro_batch))
            yield from micro_batch

    items = []
    with closing(readers.ahead(ItemReader(clips, readers), keys(), depth)) as stream:
        for item in stream:
            items.append(item)
            if len(items) == sizes[0]:
                sizes.popleft()
                yield merge(items)
                items = []


# ---- the toy set

SHAPES = ("square", "ring")
COLOURS = {"white": 255, "black": 0}
LIGHTS = ((200, 60, 60), (60, 180, 60), (60, 80, 200))      # red, green, blue
ORDERS = ("green", "blue")                                  # what red turns into
WORDINGS = ("{colour} {shape} while red turns {next}", "red turns {next} around {colour} {shape}")
SPLITS = {"train": 2000, "val": 200, "test": 400}           # clips
SIDE = 80                                                   # pixels
TOY_FRAMES = 12                                             # at 4 a second
TOY_X264 = {"preset": "veryfast", "qp": "15", "g": "1"}    # each frame alone, at one quantiser


@dataclass(frozen=True)
class ToyClip:
    """What one toy clip shows: an object stands still while the light that fills the frame changes.

    The light goes through three colours in a circle, one way or the other.
    """

    shape: str
    colour: str
    order: int              # index into ORDERS: which way round the light goes
    start_light: int        # index into LIGHTS: the light of the first third of the clip
    wording: int            # index into WORDINGS
    radius: float           # of the object, in pixels
    x: float                # its centre
    y: float
    brightness: float       # of the light

    @staticmethod
    def sample(rng: random.Random) -> "ToyClip":
        """A random clip."""
        shape = rng.choice(SHAPES)
        colour = rng.choice(list(COLOURS))
        order = rng.randrange(len(ORDERS))
        start_light = rng.randrange(len(LIGHTS))
        wording = rng.randrange(len(WORDINGS))
        radius = rng.uniform(13, 16)
        x = rng.uniform(36, 44)
        y = rng.uniform(36, 44)
        brightness = rng.uniform(0.85, 1.1)
        return ToyClip(shape, colour, order, start_light, wording, radius, x, y, brightness)

    def light(self, third: int) -> int:
        """Index into LIGHTS of each third of the clip: forward through the circle, or backward."""
        direction = 1 - 2 * self.order
        return (self.start_light + direction * third) % 3

    def twin(self) -> "ToyClip":
        """The clip that the same frames show in reverse: the other order, from the last light."""
        return replace(self, order=1 - self.order, start_light=self.light(2))

    def caption(self, **changes) -> str:
        """The clip's caption, in its own wording; `changes` are fields in which it is to differ."""
        clip = replace(self, **changes)
        return WORDINGS[clip.wording].format(
            colour=clip.colour, shape=clip.shape, next=ORDERS[clip.order])

    def frames(self) -> np.ndarray:
        """uint8 (12, 80, 80, 3): four frames in each light."""
        pixels = np.arange(SIDE) + 0.5
        distance_x = abs(pixels - self.x)[None, :]
        distance_y = abs(pixels - self.y)[:, None]
        distance = np.maximum(distance_x, distance_y)       # (80, 80): squares about the centre
        inside = distance < self.radius
        if self.shape == "ring":
            inside &= distance > 0.6 * self.radius
        frames = np.empty((TOY_FRAMES, SIDE, SIDE, 3), np.uint8)
        for t in range(TOY_FRAMES):
            light = LIGHTS[self.light(t // 4)]
            frames[t] = np.array(light) * self.brightness
            frames[t, inside] = COLOURS[self.colour]
        return frames

    def questions(self) -> list[dict]:
        """Samples of open-ended QA."""
        return [{"question": "what shape is it?", "answer": self.shape, "kind": "shape"},
                {"question": "what colour is it?", "answer": self.colour, "kind": "colour"},
                {"question": "what does red turn into?", "answer": ORDERS[self.order],
                 "kind": "order"}]

    def choices(self, rng: random.Random) -> list[dict]:
        """Samples of multiple choice, the right option at a random place.

        kind "appearance": the wrong captions tell of other objects. kind "order": the wrong one
        tells of the twin, which has the same frames.
        """
        wrong = {"appearance": [], "order": [self.twin().caption()]}
        for shape in SHAPES:
            for colour in COLOURS:
                if (shape, colour) != (self.shape, self.colour):
                    wrong["appearance"].append(self.caption(shape=shape, colour=colour))
        samples = []
        for kind, options in wrong.items():
            rng.shuffle(options)
            place = rng.randrange(len(options) + 1)
            options.insert(place, self.caption())
            samples.append({"options": options, "answer": place, "kind": kind})
        return samples


def write_clip(path: str | Path, frames: np.ndarray, fps: int, options: dict[str, str]) -> None:
    """Writes uint8 (n, h, w, 3) as H.264 in yuv420p, with options of x264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def toy(root: str | Path = "data/toy", seed: int = 0) -> Path:
    """Writes the toy set of the proof run, once: 2600 clips of 80 x 80 pixels, 3 s at 4 frames/s.

    An object stands still while the light that fills the frame goes through three colours, one way
    or the other. Clips come in twins of the same frames in opposite order, equal bit for bit. So
    no collection of frames tells the order: a model must know which frame follows which.

    Each split has SPLIT.jsonl (captions), choice_SPLIT (kinds "appearance" and "order"), qa_SPLIT,
    probe_SPLIT, image_SPLIT (a frame of each clip, for mixtures) and retrieval_SPLIT (the first
    clip of each meaning, with both wordings of its caption). Returns the folder, `root`.
    """
    root = Path(root)
    content = json.dumps({"seed": seed, "clips": SPLITS, "version": 4}) + "\n"
    stamp = root / "toy.json"
    if stamp.is_file() and stamp.read_text() == content:
        return root
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: is another toy set or none; give another folder or remove it")
    print(f"writing {sum(SPLITS.values())} toy clips to {root}", file=sys.stderr)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        whole = Path(folder, "toy")                 # takes its name when all is written
        (whole / "clips").mkdir(parents=True)
        for split, count in SPLITS.items():
            toy_split(whole, split, count, random.Random(f"{seed} {split}"))
        (whole / "toy.json").write_text(content)
        if not stamp.is_file():                     # unless another job was faster
            os.rename(whole, root)
    return root


def toy_split(folder: Path, split: str, count: int, rng: random.Random) -> None:
    """Writes the clips and manifests of one split of the toy set."""
    lines = collections.defaultdict(list)           # prefix of a manifest's name: its samples
    retrieval = {}                                  # meaning: its sample
    for i in range(count):
        clip = ToyClip.sample(rng) if i % 2 == 0 else clip.twin()
        frames = clip.frames()
        video = f"clips/{split}_{i:04}.mp4"
        image = f"clips/{split}_{i:04}.png"
        write_clip(folder / video, frames, 4, TOY_X264)
        save_image(torch.from_numpy(frames[i % TOY_FRAMES]).permute(2, 0, 1) / 255, folder / image)

        captions = [clip.caption(wording=wording) for wording in range(len(WORDINGS))]
        lines[""].append({"video": video, "text": clip.caption()})
        lines["probe_"].append({"video": video, "answer": captions[0]})
        lines["image_"].append({"video": image, "text": f"{clip.colour} {clip.shape}"})
        for sample in clip.choices(rng):
            lines["choice_"].append({"video": video, **sample})
        for sample in clip.questions():
            lines["qa_"].append({"video": video, **sample})
        retrieval.setdefault(captions[0], {"video": video, "texts": captions})
    lines["retrieval_"] = list(retrieval.values())
    for prefix, samples in lines.items():
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{prefix}{split}.jsonl").write_text(text)


# ---- the data doctor

class Examination(NamedTuple):
    """The outcome of reading a line: either sample, frames, seconds, or fault and detail."""
    sample: dict | None         # None: the line or its clip cannot be read
    frames: int = 0             # that the clip has
    seconds: float = 0.0        # of a CPU that reading the clip took
    lasts: float = 0.0          # seconds that the clip is shown, if it has captions of its parts
    fault: str = ""             # why the line cannot be used, if it cannot
    detail: str = ""            # "file:line" and the reason


def examine(task: tuple[dict, int, int]) -> tuple[int, float, float]:
    """(frames that a clip has, CPU seconds that reading it took, seconds that it is shown), read as
    in training. task: (sample, frames to read, pixels of the crop). `check` runs this in reading
    processes."""
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
    seconds = time.process_time() - began
    return counts[-1], seconds, duration(sample) if sample.get("captions") else 0.0


FATAL = "bad line", "missing file", "unreadable", "empty text"     # others are only reported


def check(manifest: str | Path, workers: int | None = None, timeout: float = 60, frames: int = 3,
          image_size: int = 224, vocab: str | None = None, max_text_len: int = 40, gpu: int = 400,
          columns: Sequence[str] = ()) -> dict[str, list[str]]:
    """The data doctor: reads every sample as in training and writes the usable lines to
    NAME.clean.jsonl (of a table a.csv: a.csv.clean.jsonl).

    Prints and returns {fault: [file:line and detail]}.
    Left out of the clean manifest are bad lines, empty texts, and clips that are missing,
    unreadable, kill their reading process or take longer than --timeout seconds.
    Only reported are clips of fewer than --frames frames, texts of more than --max_text_len
    tokens of --vocab (without one: words), captions of parts that the clip does not have, and
    captions that several lines have.
    --gpu: clips/s that a GPU trains on. The last line says how many reading processes feed it.
    Without --workers a process reads on each CPU core that this one may use.
    """
    if workers is None:
        workers = usable_cores()
    source = Manifest(manifest, columns)
    readers = Readers(examine, workers, timeout)
    count_tokens = token_counter(vocab)
    faults = collections.defaultdict(list)
    unusable = set()
    seconds = []
    earlier_lines = {}                                      # hash of a caption: its line

    def examine_line(i: int) -> Examination:
        try:
            sample = source[i]
            task = sample, 1 if is_image(sample) else frames, image_size
            return Examination(sample, *readers(task))
        except DataError as error:
            return Examination(None, fault="bad line", detail=str(error))
        except Unreadable as error:
            fault = "missing file" if isinstance(error, MissingFile) else "unreadable"
            return Examination(None, fault=fault, detail=f"{sample['source_line']}: {error}")

    for i, examined in enumerate(readers.ahead(examine_line, range(len(source)),
                                               max(64, 2 * workers))):
        line_faults = faults_of(examined, frames, count_tokens, max_text_len)
        if examined.sample:
            seconds.append(examined.seconds)
            line = examined.sample["source_line"]
            text = examined.sample.get("text")
            earlier_line = earlier_lines.setdefault(hash(text), line) if text else line
            if earlier_line != line:
                line_faults.append(("duplicate caption", f"{line}: as {earlier_line}: {text:.60}"))
        for fault, detail in line_faults:
            faults[fault].append(detail)
            if fault in FATAL:
                unusable.add(i)
        if sys.stderr.isatty() and (i % 20 == 19 or i + 1 == len(source)):
            end = "\n" if i + 1 == len(source) else ""
            print(f"\r{i + 1}/{len(source)} samples, {len(unusable)} bad  ", end=end,
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


def faults_of(examined: Examination, frames: int, count_tokens: Callable[[str], int],
              max_text_len: int) -> list[tuple[str, str]]:
    """(fault, detail) of what a readable line lacks: `frames` different frames, texts of at most
    `max_text_len` tokens, captions of parts that the clip has."""
    if examined.sample is None:
        return [(examined.fault, examined.detail)]
    sample = examined.sample
    source_line = sample["source_line"]
    faults = []
    if examined.frames < frames and not is_image(sample):
        faults.append(("short clip", f"{source_line}: has {examined.frames} frames, fewer than "
                       f"{frames}"))
    for text in texts_of(sample):
        if not text.strip():
            faults.append(("empty text", source_line))
        elif count_tokens(text) > max_text_len:
            faults.append(("text too long", f"{source_line}: {text:.60}..."))
    for start, _, text in sample.get("captions", []):
        if 0 < examined.lasts <= start:
            faults.append(("caption outside the clip", f"{source_line}: begins at {start} s of "
                           f"{examined.lasts:.1f} s: {text:.60}"))
    return faults


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


# ---- data sets: from the files that their owners publish to manifests
#
# To add a data set, write a reader of its annotation files and below it its entry in DATASETS.
# A reader takes the source files, the path of one annotation file and our name of the split, and
# yields samples. "video" is what the annotations call the clip, or a list of names it may have.
# test.jsonl is the split of the paper's number, also where the owners call it val.

FILM, GIF, FRAMES, PICTURE, UNKNOWN = range(5)      # kinds of clip, in the order of preference
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".tar.gz")


def as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Windows' character for a byte that is not UTF-8, and where decoding goes on."""
    return error.object[error.start:error.end].decode("cp1252", "replace"), error.end


codecs.register_error("cp1252", as_cp1252)


def open_text(path: str) -> TextIO:
    """A text file, unpacked if its name ends in .gz.

    Its byte order mark, or the zero bytes of UTF-16, tell the encoding. Without them it is UTF-8,
    in which bytes that UTF-8 does not know are those of Windows' cp1252.
    """
    unpack = gzip.open if path.endswith(".gz") else open
    with unpack(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    return unpack(path, "rt", encoding=encoding, errors="cp1252", newline="")


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, without blank ones."""
    with open_text(path) as file:
        for line in file:
            if line.strip():
                yield line.strip()


def read_table(path: str, columns: str = "") -> Iterator[dict[str, str]]:
    """The rows of a table as {column: cell}; see table_rows."""
    for _, row in table_rows(path, columns):
        yield row


def read_json(path: str) -> Any:
    """The content of a .json file."""
    with open_text(path) as file:
        return json.load(file)


def read_rows(path: str) -> Iterator[dict]:
    """The objects of a JSON list or of JSON lines, or the rows of a table."""
    with open_text(path) as file:
        beginning = file.read(1000).lstrip()[:1]
    if beginning == "[":
        yield from read_json(path)
    elif beginning == "{":
        yield from map(json.loads, read_lines(path))
    else:
        yield from read_table(path)


def read_items(path: str, chunk: int = 1 << 24) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a JSON object that is too large for memory, piece by piece."""
    # The key before the next value: `, "ID": `. Keys hold no escaped quotes.
    next_key = re.compile(r'[\s{,]*"([^"]*)"\s*:\s*')
    decoder = json.JSONDecoder()
    text = ""
    with open_text(path) as file:
        while piece := file.read(chunk):
            text += piece
            position = 0
            with suppress(json.JSONDecodeError):            # the piece ends inside a value
                while key := next_key.match(text, position):
                    value, position = decoder.raw_decode(text, key.end())
                    yield key[1], value
            text = text[position:]
    if text.strip() not in ("}", "{}"):
        raise ValueError("its end is missing: download it again")


def columns_of(path: str) -> set[str]:
    """The columns in the header of a table, or the keys in the first 64 KB of a JSON file."""
    with open_text(path) as file:
        text = file.read(1 << 16).lstrip()
    if text.startswith(("[", "{")):
        return set(re.findall(r'"([^"\\]*)"\s*:', text))
    header = text.partition("\n")[0]
    cells = header.split(delimiter_of(header))
    return {cell.strip().strip('"') for cell in cells}


@dataclass(frozen=True)
class Form:
    """One form of an annotation file: how it is recognised, and what reads it.

    name: the owners' name for it, with * and ?, if need be with that of its folder. SPLIT stands
        for their word for the split.
    reader: yields its samples.
    columns: columns of its table or keys of its JSON, by which it differs from files of other data
        sets that have the same name. "a|b" is one of the two, "-c" must not be among them.
    line: of a file without a header, a regular expression that matches its first line.
    splits: those of our splits that it serves.
    several: "" where one file holds a split, "parts" where several files do, and "names" where
        several do and each name says which clip or class it describes.
    """
    name: str
    reader: Callable
    columns: str = ""
    line: str = ""
    splits: str = "train val test"
    several: str = ""

    def has_name(self, path: str, word: str) -> bool:
        """Whether a file is called as the owners call it. word: theirs for the split."""
        pattern = self.name.replace("SPLIT", word).lower()
        folders = path.lower().split("/")[-1 - pattern.count("/"):-1]
        return fnmatch.fnmatch("/".join([*folders, file_name(path)]), pattern)

    def has_content(self, path: str) -> bool:
        """Whether a file's columns, or its first line, are those of this form."""
        if self.line:
            return re.fullmatch(self.line, next(read_lines(path), "")) is not None
        present = columns_of(path)
        if not present:
            return True             # empty or damaged: its reader will tell
        for column in self.columns.split():
            if column.startswith("-"):
                fits = column.removeprefix("-") not in present
            else:
                fits = any(name in present for name in column.split("|"))
            if not fits:
                return False
        return True


@dataclass(frozen=True)
class DataSet:
    """What there is to know about a data set.

    forms: of its annotation files. For each split the first form counts of which there are files.
    site: where they are published.
    splits: our splits. "test=val" says that the owners' word for our test is val.
    answers: how many of the commonest training answers are classes; None: all of them.
    """
    forms: list[Form]
    site: str
    splits: str = "train val test"
    answers: int | None = None

    def words(self) -> dict[str, str]:
        """Our name of each split: the owners' word for it."""
        pairs = [split.partition("=") for split in self.splits.split()]
        return {split: word or split for split, _, word in pairs}

    def expected(self) -> str:
        """The names of the annotation files of all splits, and where they come from."""
        words = self.words()
        names = collections.defaultdict(list)
        for form in self.forms:
            owners = [words[split] for split in words if split in form.splits.split()]
            word = owners[0] if len(owners) == 1 else f"{{{','.join(owners)}}}"
            names[form.splits].append(form.name.replace("SPLIT", word))
        alternatives = [" or ".join(group) for group in names.values()]
        return f"{', and '.join(alternatives)} ({self.site})"


def file_name(path: str) -> str:
    """The name of a file in lower case, without the .gz of a packed one."""
    return os.path.basename(path).lower().removesuffix(".gz")


def stem(name: str) -> str:
    """The name of a clip without folder and ending. DiDeMo's end in .mov.mp4, or in a bare dot."""
    name = os.path.basename(name)
    while name.endswith(".") or os.path.splitext(name)[1].lower() in MEDIA:
        name = name[:name.rindex(".")]
    return name


def preference(path: str) -> int:
    """The kind of a file or folder. Of several of one stem, that of the lowest kind is the clip."""
    ending = os.path.splitext(path)[1].lower()
    if path.endswith("/"):
        return FRAMES
    if ending in IMAGES:
        return PICTURE
    if ending == ".gif":
        return GIF
    return FILM if ending in MEDIA else UNKNOWN


def distinct(paths: list[str], by_name: bool) -> list[str]:
    """The files without copies of others. by_name: a copy has also the name of the other one."""
    looks = [(file_name(path) if by_name else "", os.path.getsize(path)) for path in paths]
    counts = collections.Counter(looks)
    originals = {}
    for path, look in zip(paths, looks):
        content = path
        if counts[look] > 1:                            # only then the content is worth reading
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha1").hexdigest()
        originals.setdefault((look, content), path)
    return list(originals.values())


class SourceFiles:
    """The annotation files and the clips of a data set that a person has.

    One walk lists the clips, since asking the disk for each of millions takes hours.
    annotations: paths of the annotation files; `explicit` are those that were named one by one.
    clips: the paths of each stem. A folder's ends in "/"; it is a clip if it holds pictures.
    left_out: the columns of files that have a right name only. archives: files to be unpacked.
    missing: what was looked for in vain. duplicates: clips of one name, of which one is taken.
    used: the annotation files that have been found. kinds: an example of each kind of clip.
    """

    def __init__(self, annotations: Sequence[str], videos: str):
        self.annotations: list[str] = []
        self.explicit: list[str] = []
        self.used: set[str] = set()
        self.archives: list[str] = []
        self.left_out: dict[str, str] = {}
        self.missing: list[str] = []
        self.kinds: dict[int, str] = {}
        self.duplicates: dict[str, list[str]] = {}
        for path in annotations:
            self.add_annotations(os.fspath(path))
        self.annotations = sorted(set(self.annotations))
        self.clips: dict[str, list[str]] = collections.defaultdict(list)
        self.folders: set[str] = set()
        self.add_clips(os.fspath(videos))

    @cached_property
    def aliases(self) -> dict[str, str]:
        """MSVD's clips have two names; each is the other's."""
        aliases = {}
        for form, path in self.find([MSVD_NAMES]):
            for pair in form.reader(path):
                aliases.update(pair)
        if not aliases:
            self.missing.append("no annotation file is named youtube_mapping.txt, which gives "
                                "MSVD's clips their second name")
        return aliases

    def add_annotations(self, path: str) -> None:
        """Lists a file, or the files below a folder. A link to a folder counts as the folder."""
        if not os.path.exists(path):
            raise DataError(f"--annotations {path}: no such file or folder")
        if os.path.isdir(path):
            for folder, _, names in os.walk(os.path.realpath(path)):
                self.list_annotations(os.path.join(folder, name) for name in names)
        else:
            folder = os.path.realpath(os.path.dirname(path))
            file = os.path.join(folder, os.path.basename(path))
            self.list_annotations([file])
            if file in self.annotations:
                self.explicit.append(file)

    def list_annotations(self, files: Iterable[str]) -> None:
        """Lists files: those to be read, and archives, which cannot be."""
        for file in files:
            files_of_kind = self.archives if file.lower().endswith(ARCHIVES) else self.annotations
            files_of_kind.append(file)

    def add_clips(self, videos: str) -> None:
        """Lists the files below a folder, and the folders that hold pictures, by their stems."""
        if not os.path.isdir(videos):
            unpack = "; unpack it first" if videos.lower().endswith(ARCHIVES) else ""
            raise DataError(f"--videos {videos}: no such folder{unpack}")
        for folder, _, files in walk(videos):
            self.folders.add(os.path.basename(folder))
            for file in files:
                self.clips[stem(file)].append(os.path.join(folder, file))
                if file.lower().endswith(ARCHIVES):
                    self.archives.append(os.path.join(folder, file))
            if folder != videos and any(file.lower().endswith(IMAGES) for file in files):
                self.clips[stem(folder)].append(f"{folder}/")

    def find(self, forms: list[Form], word: str = "") -> list[tuple[Form, str]]:
        """The annotation files of a split, in the first of its forms of which there are any.

        word: the owners' for this split. A file counts by its name and its content. Without such a
        file, one that was itself named in --annotations counts by its content alone.
        """
        for form in forms:
            named = [path for path in self.annotations if form.has_name(path, word)]
            paths = [path for path in named if form.has_content(path)]
            for path in set(named) - set(paths):
                self.left_out[path] = ", ".join(sorted(columns_of(path)))
            if paths:
                return self.without_copies(form, paths)
        for form in forms:
            paths = [path for path in self.explicit if is_renamed(path, form, word)]
            if paths:
                return self.without_copies(form, paths)
        return []

    def without_copies(self, form: Form, paths: list[str]) -> list[tuple[Form, str]]:
        """Files of one content count once. DataError if different ones claim the same place."""
        self.used.update(paths)
        paths = distinct(paths, by_name=form.several == "names")
        places = [file_name(path) if form.several else "" for path in paths]
        for place, count in collections.Counter(places).items():
            if count > 1:
                rivals = [path for path, its_place in zip(paths, places) if its_place == place]
                raise DataError(f"{' and '.join(rivals[:3])} are different files for one split; "
                                "name the right one in --annotations, instead of the folder")
        return [(form, path) for path in paths]

    def clip(self, name: str) -> str | None:
        """The path of the clip that the annotations call `name`, or None.

        "folder/name" is looked for in folders of that name or, if there are none, in all.
        """
        folder, file = os.path.split(name)
        paths = self.clips.get(stem(file), [])
        if os.path.basename(folder) in self.folders:
            paths = [path for path in paths if is_below(path, os.path.basename(folder))]
        if not paths:
            return None
        exact = [path for path in paths if os.path.basename(path) == file]
        paths = sorted(exact or paths, key=lambda path: (preference(path), path))
        kind = preference(paths[0])
        self.kinds[kind] = paths[0]
        rivals = [path for path in paths if preference(path) == kind]
        # A link to a film is no rival of it. Asking the disk about each clip would take long.
        if len(rivals) > 1 and len(set(map(os.path.realpath, rivals))) > 1:
            self.duplicates[name] = rivals
        return paths[0].removesuffix("/")


def is_renamed(path: str, form: Form, word: str) -> bool:
    """Whether a file is of this form and split by its content, under a name of no other meaning.

    It is not if the name says what it describes, if it names another split or several of them, or
    if another data set has files of this name and content.
    """
    if form.several == "names" or not (form.columns or form.line):
        return False
    if "SPLIT" in form.name:
        # "challenge_1000" is a test set.
        split = next((split for split in ("train", "val", "test") if split in word), "test")
        if set(re.findall("train|val|test", file_name(path))) != {split}:
            return False
    for dataset in DATASETS.values():
        for rival in dataset.forms:
            splits = [word for word in dataset.words().values() if rival.has_name(path, word)]
            if rival.name != form.name and splits and rival.has_content(path):
                return False
    return form.has_content(path)


def is_below(path: str, folder: str) -> bool:
    """Whether the folder that holds a clip has this name."""
    return os.path.basename(os.path.dirname(path.removesuffix("/"))) == folder


DATASETS: dict[str, DataSet] = {}


def webvid(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """WebVid: columns videoid, contentUrl, duration, page_dir, name (the caption)."""
    for row in read_rows(path):
        yield {"video": f"{row['page_dir']}/{row['videoid']}", "text": row["name"]}


DATASETS["webvid"] = DataSet(
    [Form("results_*_SPLIT.csv", webvid, "videoid page_dir name"),
     Form("SPLIT/partitions/*.csv", webvid, "videoid page_dir name", several="parts")],
    "m-bain.github.io/webvid-dataset", "train val")


def howto100m_csv(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """HowTo100M: a table for each video, ID.csv, with columns start, end (seconds), text.

    All windows of a video make one sample, of which a visit draws one.
    """
    windows = [[float(row["start"]), float(row["end"]), row["text"]] for row in read_rows(path)]
    yield {"video": os.path.basename(path).partition(".csv")[0], "captions": windows}


def howto100m_json(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """HowTo100M: {"ID": {"start": [0.4, ...], "end": [3.9, ...], "text": ["pic", ...]}, ...}."""
    for video, notes in read_items(path):
        windows = zip(notes["start"], notes["end"], notes["text"])
        yield {"video": video, "captions": [list(window) for window in windows]}


DATASETS["howto100m"] = DataSet(
    [Form("???????????.csv", howto100m_csv, "start end text", several="names"),
     Form("caption.json", howto100m_json, "start end text"),
     Form("raw_caption*.json", howto100m_json, "start end text")],
    "di.ens.fr/willow/research/howto100m", "train")


def yttemporal(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """YT-Temporal: a video a line, "info": {"id": ...}, "subtitles": [{"word", "time"}, ...].

    The words make windows of 12.5 s; the release draws 10 to 15 s, and warps denoised words to
    these times. Words such as "&gt;&gt;" are left out. The paper takes the first half of the files.
    """
    for row in read_rows(path):
        windows = []
        subtitles = [(note["time"], note["word"]) for note in row["subtitles"]]
        for second, word in sorted(subtitles):
            if word.startswith("&") or word.endswith(";"):
                continue
            if not windows or second >= windows[-1][1]:
                windows.append([second, second + 12.5, ""])
            windows[-1][2] += f" {word}"
        yield {"video": row["info"]["id"], "captions": windows}


DATASETS["yttemporal"] = DataSet(
    [Form("*.jsonl", yttemporal, "info subtitles", several="parts"),
     Form("???????????*.json", yttemporal, "info subtitles", several="parts")],
    "YT-Temporal-180M, rowanzellers.com/merlot", "train")


def cc3m(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """CC3M: caption, tab, url, without a header.

    The usual downloaders save an image as CRC32 or as INDEX_CRC32: the checksum of its url, and the
    number of its line from 0, which counts otherwise where a quote in a caption joins lines.
    """
    by_checksum = {name.rpartition("_")[2]: name for name in files.clips}
    for index, row in enumerate(read_table(path, "caption url")):
        checksum = str(zlib.crc32(row["url"].strip().encode()))
        names = [f"{index}_{checksum}", by_checksum.get(checksum, checksum)]
        yield {"video": names, "text": row["caption"], "image": True}


DATASETS["cc3m"] = DataSet(
    [Form("SPLIT_GCC*.tsv", cc3m, line=r"[^\t]+\thttps?://\S+")],
    "ai.google.com/research/ConceptualCaptions", "train val=validation")


def captions_by_clip(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The captions of each clip, in order. A clip is its stem: DiDeMo has two names for one."""
    captions = collections.defaultdict(list)
    for video, caption in pairs:
        captions[stem(video)].append(caption)
    return captions


def coco_karpathy(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """Karpathy's splits of COCO: "images": [{"filename", "split", "sentences": [{"raw"}]}].

    Its split restval, 30,504 images of COCO's val, counts as train.
    """
    for image in read_json(path)["images"]:
        if image["split"].replace("restval", "train") == split:
            texts = [sentence["raw"] for sentence in image["sentences"]]
            yield {"video": image["filename"], "texts": texts}


def coco(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """COCO: "images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]."""
    content = read_json(path)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    pairs = [(names[note["image_id"]], note["caption"]) for note in content["annotations"]]
    for video, texts in captions_by_clip(pairs).items():
        yield {"video": video, "texts": texts}


DATASETS["coco"] = DataSet(
    [Form("dataset_coco.json", coco_karpathy, "filename sentences"),
     Form("captions_SPLIT20*.json", coco, "file_name")],
    "cs.stanford.edu/people/karpathy/deepimagesent; cocodataset.org")


def msrvtt_captions(path: str, numbers: Container[int]) -> dict[str, list[str]]:
    """MSR-VTT: "sentences": [{"video_id": "video123", "caption"}], for the videos of these numbers.

    MSR_VTT.json has COCO's form: "annotations": [{"image_id": "video123", "caption"}].
    """
    content = read_json(path)
    notes = content.get("sentences") or content["annotations"]
    videos = [note.get("video_id") or note["image_id"] for note in notes]
    captions = captions_by_clip(zip(videos, [note["caption"] for note in notes]))
    return {video: texts for video, texts in captions.items()
            if int(video.removeprefix("video")) in numbers}


def msrvtt_forms(reader: Callable, splits: str) -> list[Form]:
    """The files that hold MSR-VTT's captions, of which `reader` makes samples of some splits."""
    return [Form("*videodatainfo.json", reader, "videos|sentences", splits=splits, several="parts"),
            Form("MSRVTT_data.json", reader, "videos|sentences", splits=splits),
            Form("MSR_VTT.json", reader, "images", splits=splits)]


MSRVTT_NUMBERS = {"train": range(6513), "val": range(6513, 7010), "test": range(7010, 10_000)}


def msrvtt_full(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSR-VTT's own splits: videos 0 to 6512, 6513 to 7009, 7010 to 9999."""
    for video, texts in msrvtt_captions(path, MSRVTT_NUMBERS[split]).items():
        yield {"video": video, "texts": texts}


DATASETS["msrvtt_full"] = DataSet(
    msrvtt_forms(msrvtt_full, "train val test"), "ms-multimedia-challenge.com/2016")


def one_k_a_test(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """1k-A, the 1,000 test clips of JSFusion: columns key, vid_key, video_id, sentence."""
    for row in read_rows(path):
        yield {"video": row["video_id"], "texts": [row["sentence"]]}


ONE_K_A = Form("MSRVTT_JSFUSION_test.csv", one_k_a_test, "video_id sentence", splits="test")


def one_k_a_train(files: SourceFiles, path: str, numbers: Container[int]) -> Iterator[dict]:
    """The MSR-VTT videos of these numbers, but for the test clips of 1k-A."""
    test = set()
    for _, table in files.find([ONE_K_A]):
        test.update(row["video_id"] for row in read_rows(table))
    if not test:
        raise DataError(f"{ONE_K_A.name} is missing, which names the clips that must not train: "
                        "add it to --annotations")
    for video, texts in msrvtt_captions(path, numbers).items():
        if video not in test:
            yield {"video": video, "texts": texts}


def msrvtt_9k(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSR-VTT's 9,000 videos of all splits that are not in 1k-A."""
    return one_k_a_train(files, path, range(10_000))


def msrvtt_7k(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSR-VTT's videos of train and val. None of them is in 1k-A."""
    return one_k_a_train(files, path, range(7010))


DATASETS["msrvtt_9k"] = DataSet(
    [ONE_K_A, *msrvtt_forms(msrvtt_9k, "train")], "ms-multimedia-challenge.com/2016", "train test")
DATASETS["msrvtt_7k"] = DataSet(
    [ONE_K_A, *msrvtt_forms(msrvtt_7k, "train")], "ms-multimedia-challenge.com/2016", "train test")


def msrvtt_mc(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSR-VTT choices: columns vid_key (msr1234 is video1234), a1, ..., a5, answer from 0."""
    for row in read_rows(path):
        options = [row[f"a{number}"] for number in range(1, 6)]
        yield {"video": row["vid_key"].replace("msr", "video"), "options": options,
               "answer": int(row["answer"])}


def msrvtt_mc_training(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """Each MSR-VTT caption against 4 of other videos, as JSFusion trained; the right one is first.

    A caption that is also one of the same video is no wrong option. The places tell a model
    nothing, since it scores each option alone.
    """
    captions = msrvtt_captions(path, MSRVTT_NUMBERS[split])
    pool = list(itertools.chain.from_iterable(captions.values()))
    rng = random.Random(0)
    for video, texts in captions.items():
        right = {clean_text(caption).lower() for caption in texts}
        for caption in texts:
            options = {clean_text(caption).lower(): caption}
            for wrong in rng.sample(pool, min(100, len(pool))):
                if len(options) < 5 and clean_text(wrong).lower() not in right:
                    options.setdefault(clean_text(wrong).lower(), wrong)
            yield {"video": video, "options": list(options.values()), "answer": 0}


def clipbert_choice(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """ClipBERT's choices: clip_name or gif_name, question, options, answer (an index)."""
    for row in read_rows(path):
        sample = {"video": row.get("gif_name") or row["clip_name"], "options": row["options"],
                  "answer": row["answer"]}
        if "question" in row:
            sample["question"] = row["question"]
        yield sample


DATASETS["msrvtt_mc"] = DataSet(
    [Form("MSR_MC_test.csv", msrvtt_mc, "vid_key a1 a5 answer", splits="test"),
     Form("msrvtt_mc_test.jsonl", clipbert_choice, "clip_name options answer", splits="test"),
     *msrvtt_forms(msrvtt_mc_training, "train val")], "github.com/yj-yu/lsmdc")


def msrvtt_qa(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSRVTT-QA: answer, category_id, id, question, video_id (a number)."""
    for row in read_rows(path):
        yield {"video": f"video{row['video_id']}", "question": row["question"],
               "answer": row["answer"], "kind": question_word(row["question"])}


def msrvtt_qa_clipbert(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """ClipBERT's MSRVTT-QA: answer, question, video_id ("video6513"), answer_type."""
    for row in read_rows(path):
        yield {"video": row["video_id"], "question": row["question"],
               "answer": row["answer"], "kind": question_word(row["question"])}


def question_word(question: str) -> str:
    """The kind of a question on MSR-VTT or MSVD: what, who, how, when or where."""
    return question.partition(" ")[0].lower()


XUDEJING = "github.com/xudejing/video-question-answering"
DATASETS["msrvtt_qa"] = DataSet(
    [Form("SPLIT_qa.json", msrvtt_qa, "answer category_id question video_id"),
     Form("msrvtt_qa_SPLIT.jsonl", msrvtt_qa_clipbert, "answer question video_id -category_id")],
    XUDEJING, answers=1500)


def msvd_names(path: str) -> Iterator[dict[str, str]]:
    """MSVD's clips have two names: "-4wsuPCjDBc_5_15 vid1" on a line."""
    for line in read_lines(path):
        name, number = line.split()
        yield {name: number, number: name}


MSVD_NAMES = Form("*mapping*.txt", msvd_names, line=r"\S+\s+vid\d+|vid\d+\s+\S+")


def msvd_qa(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSVD-QA: answer, id, question, video_id (a number). youtube_mapping.txt names the clips."""
    for row in read_rows(path):
        number = f"vid{row['video_id']}"
        yield {"video": [number, files.aliases.get(number, number)], "question": row["question"],
               "answer": row["answer"], "kind": question_word(row["question"])}


DATASETS["msvd_qa"] = DataSet(
    [Form("SPLIT_qa.json", msvd_qa, "answer question video_id -category_id")],
    f"{XUDEJING}, with youtube_mapping.txt", answers=1000)


def msvd(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """MSVD: "-4wsuPCjDBc_5_15 a squirrel eats" on a line. vid1 to vid1200 of the mapping train."""
    numbers = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}
    if not files.aliases:
        raise DataError("MSVD's splits go by the numbers in youtube_mapping.txt (of MSVD-QA): add "
                        f"it to --annotations. Its lines are like -4wsuPCjDBc_5_15 vid1")
    lines = [line for line in read_lines(path) if not line.startswith("#")]
    for video, texts in captions_by_clip(line.split(maxsplit=1) for line in lines).items():
        number = files.aliases.get(video, "vid0")
        if int(number.removeprefix("vid")) in numbers[split]:
            yield {"video": [video, number], "texts": texts}


DATASETS["msvd"] = DataSet(
    [Form("AllVideoDescriptions.txt", msvd, line=r"#.*|\S+ .+")],
    "cs.utexas.edu/users/ml/clamp/videoDescription, with youtube_mapping.txt of MSVD-QA")


def tgif_choice(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """TGIF-QA action, transition: columns gif_name, question, a1, ..., a5, answer from 0."""
    for row in read_rows(path):
        options = [row[f"a{number}"] for number in range(1, 6)]
        yield {"video": row["gif_name"], "question": row["question"], "options": options,
               "answer": int(row["answer"])}


def tgif_frameqa(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """TGIF-QA FrameQA: columns gif_name, question, answer, type (an index of `kinds`)."""
    kinds = ["object", "number", "color", "location"]
    for row in read_rows(path):
        yield {"video": row["gif_name"], "question": row["question"], "answer": row["answer"],
               "kind": kinds[int(row["type"])]}


def tgif_frameqa_clipbert(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """ClipBERT's FrameQA: gif_name, question, answer, answer_type (the kind in words)."""
    for row in read_rows(path):
        yield {"video": row["gif_name"], "question": row["question"], "answer": row["answer"],
               "kind": row["answer_type"]}


TGIF = "github.com/YunseokJANG/tgif-qa"
DATASETS["tgif_action"] = DataSet(
    [Form("SPLIT_action_*.csv", tgif_choice, "gif_name question a1 a5 answer"),
     Form("action_SPLIT.jsonl", clipbert_choice, "gif_name question options answer")], TGIF)
DATASETS["tgif_transition"] = DataSet(
    [Form("SPLIT_trans*.csv", tgif_choice, "gif_name question a1 a5 answer"),
     Form("trans*_SPLIT.jsonl", clipbert_choice, "gif_name question options answer")], TGIF)
DATASETS["tgif_frameqa"] = DataSet(
    [Form("SPLIT_frame*.csv", tgif_frameqa, "gif_name question answer type"),
     Form("frameqa_SPLIT.jsonl", tgif_frameqa_clipbert, "gif_name question answer answer_type")],
    TGIF, answers=1540)


def tvqa(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """TVQA: q, a0, ..., a4, answer_idx, vid_name, ts ("76.01-84.2" seconds, or "nan-nan").

    Its clips are folders of frames at 3 a second. Its public test questions have no answers.
    """
    for row in read_rows(path):
        options = [row[f"a{number}"] for number in range(5)]
        sample = {"video": row["vid_name"], "fps": 3, "question": row["q"], "options": options,
                  "answer": row["answer_idx"]}
        if "nan" not in row["ts"]:
            sample["start"], sample["end"] = map(float, row["ts"].split("-"))
        yield sample


DATASETS["tvqa"] = DataSet(
    [Form("tvqa_SPLIT.jsonl", tvqa, "q a0 a4 answer_idx vid_name ts")], "tvqa.cs.unc.edu",
    "train test=val")


def lsmdc(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """LSMDC: clip, four times, caption, with tabs and without a header."""
    for row in read_table(path, "clip start end cut_start cut_end caption"):
        yield {"video": lsmdc_clip(row["clip"]), "text": row["caption"]}


def lsmdc_choice(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """LSMDC multiple choice: clip, four times, five captions and, in test, the right one from 1.

    In training and validation the first caption is the right one.
    """
    for row in read_table(path, "clip start end cut_start cut_end a1 a2 a3 a4 a5 right"):
        options = [row[f"a{number}"] for number in range(1, 6)]
        yield {"video": lsmdc_clip(row["clip"]), "options": options,
               "answer": int(row["right"] or 1) - 1}


def lsmdc_clip(name: str) -> str:
    """The clip FILM_00.03.06.170-00.03.09.675 lies in the folder FILM."""
    return f"{name.rpartition('_')[0]}/{name}"


LSMDC = "sites.google.com/site/describingmovies"
DATASETS["lsmdc"] = DataSet(
    [Form("LSMDC16_SPLIT.csv", lsmdc, line=r"([^\t]*\t){4,6}[^\t]*")], LSMDC,
    "train=annos_training val=annos_val test=challenge_1000_*")
DATASETS["lsmdc_mc"] = DataSet(
    [Form("LSMDC16_multiple_choice_SPLIT.csv", lsmdc_choice, line=r"([^\t]*\t){9,10}[^\t]*")],
    LSMDC, "train val=valid test=test_*")


def didemo(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """DiDeMo: video, description, times. The descriptions of a video make one text, in order."""
    pairs = [(row["video"], row["description"]) for row in read_rows(path)]
    for video, texts in captions_by_clip(pairs).items():
        yield {"video": video, "text": " ".join(texts)}


DATASETS["didemo"] = DataSet(
    [Form("SPLIT_data.json", didemo, "video description")],
    "github.com/LisaAnne/LocalizingMoments")


def activitynet(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """ActivityNet Captions: {"v_ID": {"sentences": ["A dog.", ...], "timestamps"}, ...}.

    The sentences of a video make one text. Its clip is v_ID or ID.
    """
    for video, notes in read_json(path).items():
        yield {"video": [video, video.removeprefix("v_")], "text": " ".join(notes["sentences"])}


def activitynet_clipbert(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """ClipBERT's ActivityNet: clip_name ("v_ID"), caption (all sentences)."""
    for row in read_rows(path):
        video = row["clip_name"]
        yield {"video": [video, video.removeprefix("v_")], "text": row["caption"]}


DATASETS["activitynet"] = DataSet(
    [Form("SPLIT.json", activitynet, "timestamps sentences"),
     Form("SPLIT.jsonl", activitynet_clipbert, "clip_name caption")],
    "cs.stanford.edu/people/ranjaykrishna/densevid", "train test=val*1")


def vcr_sample(files: SourceFiles, row: dict, rationale: bool) -> dict:
    """A question of VCR; rationale: on the reason, and it ends in the right answer.

    A list [1, 4] among the words becomes "person 0 cup 1". Objects are numbered in the order in
    which question, answers and rationales mention them. "boxes", [number, x0, y0, x1, y1], are of
    the objects in the words of the sample; they stand in the .json beside the image.
    """
    question = row["question"]
    options = row["answer_choices"]
    answer = row["answer_label"]
    numbers = {}
    for object_index in vcr_objects(question, *options, *row["rationale_choices"]):
        numbers.setdefault(object_index, len(numbers))
    if rationale:
        question = question + options[answer]
        options = row["rationale_choices"]
        answer = row["rationale_label"]
    names = {index: f"{row['objects'][index]} {number}" for index, number in numbers.items()}
    sample = {"video": row["img_fn"], "kind": "QA→R" if rationale else "Q→A", "answer": answer,
              "question": vcr_text(question, names),
              "options": [vcr_text(option, names) for option in options]}
    mentioned = set(vcr_objects(question, *options))
    image = files.clip(row["img_fn"])
    if mentioned and image:
        boxes = read_json(vcr_boxes_file(image))["boxes"]
        sample["boxes"] = [[number, *boxes[index][:4]] for index, number in numbers.items()
                           if index in mentioned]
    return sample


def vcr_boxes_file(image: str) -> str:
    """The .json beside an image of VCR. DataError if it is not there."""
    path = f"{os.path.splitext(image)[0]}.json"
    if not os.path.exists(path):
        raise DataError(f"{path}: is missing; vcr1images.zip holds it beside the image: unpack all "
                        "of it")
    return path


def vcr_objects(*texts: list) -> Iterator[int]:
    """The objects that these texts mention, in their order, as often as they do."""
    for text in texts:
        for token in text:
            if isinstance(token, list):
                yield from token


def vcr_text(tokens: list, names: dict[int, str]) -> str:
    """The words of a text, with the names of the objects that it mentions."""
    words = []
    for token in tokens:
        words += [names[index] for index in token] if isinstance(token, list) else [token]
    return " ".join(words)


def vcr_qa(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """VCR Q→A: img_fn, objects, question, answer_choices, answer_label, rationale_choices."""
    for row in read_rows(path):
        yield vcr_sample(files, row, rationale=False)


def vcr_qar(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """VCR QA→R: the columns of Q→A and rationale_label."""
    for row in read_rows(path):
        yield vcr_sample(files, row, rationale=True)


VCR = "visualcommonsense.com, with vcr1images"
DATASETS["vcr_qa"] = DataSet(
    [Form("SPLIT.jsonl", vcr_qa, "img_fn objects question answer_choices answer_label")],
    VCR, "train test=val")
DATASETS["vcr_qar"] = DataSet(
    [Form("SPLIT.jsonl", vcr_qar, "img_fn objects question rationale_choices rationale_label")],
    VCR, "train test=val")


def kinetics400(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """Kinetics: label, youtube_id, time_start, time_end. A clip is ID_000059_000069 or ID."""
    for row in read_rows(path):
        label = row["label"]
        clip = f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}"
        yield {"video": [f"{label}/{clip}", f"{label}/{row['youtube_id']}"], "answer": label}


DATASETS["kinetics400"] = DataSet(
    [Form("SPLIT.csv", kinetics400, "label youtube_id time_start time_end"),
     Form("kinetics?400_SPLIT.csv", kinetics400, "label youtube_id time_start time_end")],
    "github.com/cvdfoundation/kinetics-dataset", "train test=val*")


def hmdb51(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """HMDB51, the first of three splits: LABEL_test_split1.txt, with lines "CLIP.avi 1".

    1 trains, 2 tests, 0 does neither.
    """
    label = os.path.basename(path).partition("_test_split1")[0]
    use = {"train": "1", "test": "2"}[split]
    for line in read_lines(path):
        clip, number = line.rsplit(maxsplit=1)
        if number == use:
            yield {"video": f"{label}/{clip}", "answer": label.replace("_", " ")}


DATASETS["hmdb51"] = DataSet(
    [Form("*_test_split1.txt", hmdb51, line=r".+\.\w+\s+[012]", several="names")],
    "serre-lab.clps.brown.edu", "train test")


def ego4d_mc(files: SourceFiles, path: str, split: str) -> Iterator[dict]:
    """Ego4D choices: columns question, answers, cells of Python lists: [video, frame, ..., text].

    As in the release a clip is the 120 frames, at 30 a second, about the narrated one.
    """
    for row in read_rows(path):
        video, frame, *_, text = ast.literal_eval(row["question"])
        options = [answer[-1] for answer in ast.literal_eval(row["answers"])]
        yield {"video": video, "start": max(frame / 30 - 2, 0), "end": frame / 30 + 2,
               "options": options, "answer": options.index(text)}


DATASETS["ego4d_mc"] = DataSet(
    [Form("mc_val.csv", ego4d_mc, "question answers")], "the authors of Ego4D's choices", "test")


def split_samples(files: SourceFiles, dataset: DataSet, split: str) -> Iterator[dict]:
    """The samples of a split, with tidy texts. DataError if a file is not as published."""
    forms = [form for form in dataset.forms if split in form.splits.split()]
    found = files.find(forms, dataset.words()[split])
    if not found:
        names = " or ".join(form.name for form in forms)
        files.missing.append(f"{split}: no annotation file is named "
                             f"{names.replace('SPLIT', dataset.words()[split])}")
    for form, path in found:
        try:
            for sample in form.reader(files, path, split):
                yield tidy_sample(sample)
        except DataError:
            raise
        except Exception as error:          # whatever a reader meets in a file of another form
            raise DataError(f"{path}: not as published ({error!r}); expected "
                            f"{dataset.expected()}. {clean_text(form.reader.__doc__)}") from error


def tidy_sample(sample: dict) -> dict:
    """A sample with its texts on one line, without empty captions and windows of no length.

    Halves of characters are replaced, as a manifest does when it is read.
    """
    names = sample["video"]
    sample = {field: clean_text(value) for field, value in sample.items()}
    sample["video"] = names                     # files may have any characters in their names
    if "texts" in sample:
        sample["texts"] = [text for text in sample["texts"] if text]
    if "captions" in sample:
        sample["captions"] = [[start, end, text] for start, end, text in sample["captions"]
                              if isinstance(text, str) and text and end > start]
    return sample


def find_clip(files: SourceFiles, names: str | list[str]) -> str | None:
    """The path of the clip that has one of these names, or None."""
    for name in [names] if isinstance(names, str) else names:
        if path := files.clip(name):
            return path
    return None


def write_split(samples: Iterable[dict], files: SourceFiles, path: str, out: str,
                videos: str) -> tuple[dict[str, collections.Counter], collections.Counter]:
    """Writes a manifest `path`, whose clips are relative to the folder `out`.

    Returns what became of the samples, {"written" or why not: {clip: how many samples}}, and how
    often each answer in words to an open question occurs, written or not.
    """
    fates = collections.defaultdict(collections.Counter)
    answers = collections.Counter()
    with open(path, "w", encoding="utf-8") as file:
        for sample in samples:
            names = sample["video"]
            clip = find_clip(files, names)
            fate = "written"
            if "answer" in sample and "options" not in sample:
                answers[sample["answer"]] += 1
            if any(value in ("", []) for value in sample.values()):
                fate = "without text"
            elif clip is None:
                fate = f"not under {videos}"
            fates[fate][names if isinstance(names, str) else names[0]] += 1
            if fate == "written":
                sample["video"] = os.path.relpath(clip, out)
                file.write(json.dumps(sample) + "\n")
    return fates, answers


def examples(names: Iterable[str], count: int = 3) -> str:
    """Some of the names, in words."""
    return f"such as {', '.join(itertools.islice(names, count))}"


def remarks(files: SourceFiles) -> Iterator[str]:
    """What a person must know of the source files, a line each."""
    yield from files.missing
    if files.left_out:
        path, columns = min(files.left_out.items())
        yield (f"left out {len(files.left_out):,} annotation files that have a right name and "
               f"other columns, such as {path}: columns {columns:.200}")
    unused = [path for path in files.explicit if path not in {*files.used, *files.left_out}]
    if unused:
        yield (f"not read: {len(unused):,} files of --annotations, {examples(unused)}; their names "
               "or their columns are not those of this data set, or do not tell the split")
    if files.archives:
        yield (f"not read: {len(files.archives):,} archives, {examples(files.archives)}; unpack "
               "those that you need")
    if PICTURE in files.kinds and files.kinds.keys() & {FILM, GIF, FRAMES}:
        yield f"some clips are there as a picture only, such as {files.kinds[PICTURE]}"
    if files.duplicates:
        rivals = next(iter(files.duplicates.values()))
        yield (f"{len(files.duplicates):,} clips are there more than once, such as "
               f"{' and '.join(rivals[:3])}; the first of them is taken")


def convert(name: str, annotations: Sequence[str], videos: str, out: str) -> None:
    """Writes the manifests of a data set, OUT/{train,val,test}.jsonl, and OUT/answers.json.

    Clips that are not on disk and samples without text are left out. How many there are is printed,
    with examples, and also what else is missing or doubtful. The clips stay where they are.

    answers.json lists the training answers to open questions, the commonest first (Sec. 4.2.1). It
    counts all of them, whether or not the clips are on disk. Files of these names that an earlier
    conversion left in OUT, and that this one does not write, become NAME.old, .old2, ...

    DataError if nothing is left or a file is not as published. OUT is then as it was.
    """
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; expected one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    files = SourceFiles(annotations, videos)
    out = os.path.realpath(out)
    if any(os.path.dirname(file) == out for file in files.annotations):
        raise DataError(f"--annotations lie in --out {out} and might be replaced by manifests")
    answers = collections.Counter()
    reports = []
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out) as folder:     # all or none
        for split in dataset.words():
            samples = split_samples(files, dataset, split)
            fates, split_answers = write_split(
                samples, files, f"{folder}/{split}.jsonl", out, videos)
            if split == "train":
                answers = split_answers
            for fate, clips in fates.items():
                reports.append(f"{split}: {clips.total():,} samples of {len(clips):,} clips "
                               f"{fate}, {examples(clips)}")
        reports += remarks(files)
        written = [file for file in os.listdir(folder) if os.path.getsize(f"{folder}/{file}")]
        if not written:
            raise DataError(f"{name}: nothing to write: {'; '.join(reports)}; expected "
                            f"{dataset.expected()}")
        if answers:
            commonest = [answer for answer, _ in answers.most_common(dataset.answers)]
            written.append("answers.json")
            Path(folder, "answers.json").write_text(
                json.dumps(commonest, ensure_ascii=False), "utf-8")
        reports += set_aside(out, written)
        for file in written:
            os.replace(f"{folder}/{file}", f"{out}/{file}")
    print(*reports, sep="\n")


def set_aside(out: str, written: list[str]) -> list[str]:
    """Renames the files of an earlier conversion that this one does not replace. Returns a line
    about each."""
    reports = []
    for file in ("train.jsonl", "val.jsonl", "test.jsonl", "answers.json"):
        if file not in written and os.path.exists(f"{out}/{file}"):
            old = f"{file}.old"
            number = 1
            while os.path.exists(f"{out}/{old}"):
                number += 1
                old = f"{file}.old{number}"
            os.replace(f"{out}/{file}", f"{out}/{old}")
            reports.append(f"{out}/{file} was there before and is now {old}")
    return reports


# ==== Command line ================================================================================

def main(arguments: Sequence[str] | None = None) -> None:
    """python data.py COMMAND ...: toy, convert or check. Flags that are not set keep the default of
    the function that a command calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(run: Callable, purpose: str) -> argparse.ArgumentParser:
        return commands.add_parser(run.__name__, help=purpose, description=run.__doc__,
                                   argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

    flags = add_command(toy, "write the toy set of the proof run")
    flags.add_argument("--out", dest="root", help="write the toy set to this folder")
    flags.add_argument("--seed", type=int, help="draw its clips from this random seed")

    flags = add_command(convert, "write the manifests of a published data set")
    names = [f"  {name}: {dataset.expected()}" for name, dataset in DATASETS.items()]
    names.insert(0, "data sets, their annotation files and where those are from:")
    flags.epilog = "\n".join(names)
    flags.add_argument("name", help="which of the data sets below it is")
    flags.add_argument("--annotations", nargs="+", required=True, metavar="PATH",
                       help="the annotation files as their owners publish them, unpacked, or "
                       "folders that hold them at any depth")
    flags.add_argument("--videos", required=True, metavar="FOLDER",
                       help="the folder that holds the clips, at any depth, under any ending")
    flags.add_argument("--out", required=True, metavar="FOLDER",
                       help="where train.jsonl, val.jsonl, test.jsonl and answers.json go")

    flags = add_command(check, "read every clip of a manifest, and name what is wrong")
    flags.add_argument("manifest", help=".jsonl, .csv, .tsv or .tar file, or folder, to check")
    flags.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN",
                       help="take a field of the samples from this column of a table or .jsonl")
    flags.add_argument("--workers", type=int, help="read with so many processes")
    flags.add_argument("--timeout", type=float,
                       help="call a clip unreadable that takes longer than so many seconds")
    flags.add_argument("--frames", type=int, help="read so many frames of each clip")
    flags.add_argument("--image_size", type=int, help="read frames of so many pixels a side")
    flags.add_argument("--vocab", help="count the tokens of texts by this vocabulary")
    flags.add_argument("--max_text_len", type=int,
                       help="report texts of more than so many tokens or, without --vocab, words")
    flags.add_argument("--gpu", type=int,
                       help="say how many processes feed a GPU that trains on so many clips/s")
    values = vars(parser.parse_args(arguments))
    runs = {"toy": toy, "convert": convert, "check": check}
    runs[values.pop("command")](**values)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, Unreadable) as error:
        sys.exit(f"data.py: {error}")
