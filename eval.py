"""Scores All-in-one (Tab. 2 to 14) on any manifest, uses it on any video, measures what it costs.

    python eval.py --task choice --data MANIFEST --checkpoint runs/pretrain/checkpoint.pt
    torchrun --nproc_per_node=8 eval.py --task retrieval --data MANIFEST --checkpoint FILE
    python eval.py --task match --video clips/ --text "a dog runs" "a cat sleeps"
    python eval.py --task profile

A checkpoint is train.py's or the authors' .ckpt. Any number of processes gives the same result:
each sample is scored once. A clip that cannot be read is named and never replaced by another, and
a score that lacks samples says so.

In this order: flags, processes and checkpoints, which train.py uses too; the configuration; how
samples are read; a function for each task that scores a manifest; a function for each task that
runs on videos; pictures; the report; costs; the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
import timeit
import typing
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from allinone import (OBJECTIVES, SCORES, VARIANTS, AllInOne, Config, Temporal, answer_scores,
                      class_scores, load_release, load_weights, match_logits,
                      pretraining_scores, read_weights, text_embedding, video_embedding,
                      word_patch_transport)
from data import (TASKS, Clips, DataError, Manifest, Tokenizer, clip_files, collate, duration,
                  is_image, load, replacing, temporary_manifest, texts_of)

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

@functools.cache                # the source of a class is slow to find
def field_comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass, on one line.

    It stands in the lines above the field or beside it. A line of comment that is indented further
    goes on with the comment of the field before it.
    """
    comments = {}
    above = []
    name = None
    for line in inspect.getsource(cls).splitlines():
        comment = line.partition("#")[2]
        declaration = re.match(r"    (\w+): ", line)
        if declaration:
            name = declaration[1]
            comments[name] = " ".join([*above, comment.strip()]).strip()
            above = []
        elif not line.strip().startswith("#"):
            above = []
        elif name and (comment.startswith("  ") or line.startswith("     ")):
            comments[name] += " " + comment.strip()
        else:
            above.append(comment.strip())
    return comments


def add_flags(group, cls: type, names: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of the dataclass `cls` to a group of an argparse parser.

    A field's comment is its help. names: the fields that get a flag, in this order; all by
    default, but for the two of Config that the data decide. A flag that is not used leaves no
    trace in the parsed arguments, so that a recipe or a checkpoint can decide instead.
    """
    comments = field_comments(cls)
    types = typing.get_type_hints(cls)
    for name in names or [name for name in types if name not in ("vocab_size", "answers")]:
        kind = types[name]
        default = getattr(cls, name)
        about = comments.get(name, "")
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        if default != "":
            about += f" (default: {default})"
        words = typing.get_args(kind)
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            options = {"nargs": "+", "metavar": "VALUE", "type": words[0]}
        elif words:
            options = {"choices": words}
        else:
            options = {"type": kind, "metavar": {str: "TEXT", int: "N", float: "X"}[kind]}
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=about.replace("%", "%%"),
                           **options)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """The flags of a command line as {name: value}, lists as tuples.

    Wrong flags end the program with code 2. Of several processes, which all read the same command
    line, the first says why.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if is_main else contextlib.redirect_stderr(io.StringIO()):
        flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(value)
    return flags


# ---- Processes, and their devices ---------------------------------------------------------------

@contextlib.contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Joins torchrun's job and leaves it; without torchrun a world of one. Yields the device.

    An error of the user's (ValueError, OSError) usually meets all processes alike. The process
    that meets it before the others raises it, and the others leave quietly with the same code, 1.
    On GPUs products of float32 matrices use TF32, in training as in evaluation.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in os.environ:
        raise ValueError("SLURM started several tasks (SLURM_NTASKS is "
                         f"{os.environ['SLURM_NTASKS']}) that do not know of each other: start "
                         "one task a node, which runs torchrun (see README), or unset SLURM_NTASKS "
                         "for a single process")
    device = own_device()
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    store = dist.HashStore()
    rank = 0
    world = 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun's store outlives a crash, with the addresses that a killed worker left in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield device
    except (ValueError, OSError):
        if not is_earliest_failure(store):
            sys.exit(1)
        raise
    finally:
        dist.destroy_process_group()


def own_device() -> torch.device:
    """This process's GPU, by its place on this machine (LOCAL_RANK); the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def computes_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bfloat16, not one that only emulates it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def half_precision(device: torch.device) -> torch.autocast:
    """A context of bfloat16 where the GPU computes in it, as in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device))


def is_earliest_failure(store: dist.Store) -> bool:
    """Whether no other process of the job has failed before this one."""
    try:
        return store.add("failures", 1) == 1
    except dist.DistError:          # the process that holds the store has already left
        return False


def gather_objects(objects: list) -> list:
    """The lists of all processes, in the order of their ranks, as one list."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, objects)
    gathered = []
    for objects in lists:
        gathered += objects
    return gathered


def gather_sorted(predictions: list[dict]) -> list[dict]:
    """The predictions of all processes, sorted by "index"."""
    return sorted(gather_objects(predictions), key=lambda prediction: prediction["index"])


def is_main() -> bool:
    """Whether this is the first process, which writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print_main(*words, **options) -> None:
    """Prints, on the first process alone.

    Where nobody reads any more (`python train.py | head`), the run goes on without being printed.
    """
    if not is_main():
        return
    try:
        print(*words, **options, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


# ---- Checkpoints --------------------------------------------------------------------------------

def load_checkpoint(content: dict, path, vocab: str = "bert-base-uncased",
                    answers: list[str] | None = None, **overrides
                    ) -> tuple[AllInOne, Tokenizer, list[str] | None]:
    """(model, tokenizer, answers) of train.py's checkpoint or of the authors' .ckpt.

    content: what read_weights(path) returned. vocab: for the authors' file, which carries no
    tokenizer. answers: the classes to be learnt; an answer head for other classes is not taken
    over. overrides: fields of Config that differ from the file's, e.g. frames=8 for Tab. 12.
    ValueError for a file of something else, and for a vocabulary that is not the file's.
    """
    if answers is None:
        answers = content.get("answers")
    overrides["answers"] = len(answers or [])
    if "sizes" in content:
        model, report = load_ours(content, path, answers, overrides)
        tokenizer = Tokenizer.load(f"{path}: its tokenizer", content["tokenizer"])
    else:
        model, report = load_release(content, **overrides)
        tokenizer = Tokenizer.load(vocab)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} words, {path} "
                         f"{model.config.vocab_size}: use --vocab with the one of its training")
    summary = f"{path}: {len(report['loaded'])} tensors loaded"
    for key in ("resized", "initialised", "ignored"):
        if report[key]:
            summary += f"; {len(report[key])} {key} ({', '.join(report[key][:4])})"
    print_main(summary)
    return model, tokenizer, answers


def load_ours(content: dict, path, answers: list[str] | None, overrides: dict
              ) -> tuple[AllInOne, dict[str, list[str]]]:
    """(model, report of load_weights) of a checkpoint that train.py wrote. ValueError."""
    sizes = content["sizes"]
    weights = content.get("model")
    unknown = sizes.keys() - vars(Config()).keys()
    if weights is None or "tokenizer" not in content or unknown:
        raise ValueError(f"{path}: a checkpoint of another version of train.py, or damaged")
    model = AllInOne(replace(Config(**sizes), **overrides))
    same_answers = content.get("answers") == answers
    if not same_answers or sizes["answer_head"] != model.config.answer_head:
        weights = {name: weights[name] for name in weights if not name.startswith("answer_head.")}
    return model, load_weights(model, weights, path)


# ---- Configuration ------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalConfig:
    """What to score, and how. The comment of a field is its flag's help."""

    # What to do. choice, retrieval, qa, probe and pretrain score --data (Sec. 4.2, Tab. 6). fill,
    # match, ask, explain, attention and search run on --video. profile measures costs.
    task: str = "choice"
    # The manifests to score.
    data: tuple[str, ...] = ()
    # The weights: checkpoint.pt or best.pt of train.py, or the authors' .ckpt. Without this flag
    # it is the checkpoint of the proof run that the task needs, such as runs/qa/checkpoint.pt.
    checkpoint: str = ""
    # The clips to run on: files, folders of files, or manifests.
    video: tuple[str, ...] = ()
    # The text that goes with each clip. fill and explain put a word in the place of [MASK]; match
    # and search take several texts.
    text: tuple[str, ...] = ("",)
    # A folder that gets pictures of the results.
    out: str = ""
    # A file that gets each sample's result as a line of JSON, for programs.
    json: str = ""
    # How many clips one micro-batch holds; always 8 for pretrain, which draws VTM's pairs among 8.
    batch: int = 8
    # How many processes read clips for each GPU; 0 reads in the main process.
    workers: int = 2
    # How many draws of S frames are scored of each clip and averaged; 3 is the paper's 3 x 3.
    views: int = 1
    # How many of the best candidates by cosine are scored again by VTM (retrieval and search).
    rerank: int = 0
    # How many times samples are drawn anew for a 95 % interval; 1000 is usual, 0 prints none.
    bootstrap: int = 0
    # The order in which the model sees the frames: as filmed, shuffled, reversed, or the first
    # frame in all places. It shows what depends on time.
    order: Literal["forward", "shuffled", "reversed", "first"] = "forward"
    # How a frame becomes a square, by default as in the checkpoint's training: release crops the
    # middle of the whole frame scaled to 1.2 times the size, paper takes the whole frame,
    # proportions crops the middle of a frame whose proportions are unchanged.
    resize: Literal["release", "paper", "proportions"] = "release"
    # Draws the regions of VCR's entities into its images (Tab. 5, "Mask"), by default as in the
    # checkpoint's training.
    boxes: bool = True
    # Which columns of a table, or keys of a .jsonl, hold what, as video=NAME text=NAME.
    columns: tuple[str, ...] = ()
    # The vocabulary of the authors' .ckpt, which carries none: a name, vocab.txt or tokenizer.json.
    vocab: str = "bert-base-uncased"
    # The objectives whose accuracies pretrain reports, by default those that the checkpoint was
    # trained with.
    objectives: tuple[str, ...] = ("vtm", "mlm")
    # Fills masks from the text alone, which shows what the video adds (fill).
    blind: bool = False
    # The block whose attention explain draws, counted from 1; 0 draws the word-patch transport.
    block: int = 0
    # A second checkpoint to compare with, trained without rolling as in Fig. 4 (attention).
    baseline: str = ""
    # A file that keeps the clips' features from one search to the next (search).
    index: str = ""
    # Cuts the clips of --video into windows of this many seconds; 0 leaves them whole.
    window: float = 0.0
    # How many results each text gets (search).
    top: int = 5

    def open_clips(self, model: AllInOne, tokenizer: Tokenizer, answers: list[str] | None = None
                   ) -> Clips:
        """The samples of `data` as the model reads them."""
        sizes = model.config
        return Clips(Manifest(self.data, self.columns), tokenizer, self.task, sizes.frames,
                     sizes.image_size, sizes.max_text_len, train=False, views=self.views,
                     resize=self.resize, boxes=self.boxes, order=self.order, answers=answers)


# Fields of Config that a checkpoint's weights fit whatever their value: Tab. 8, 11, 12, Fig. 7, 9.
MODEL_FLAGS = ("frames", "image_size", "max_text_len", "temporal", "roll", "roll_ratio",
               "roll_start", "roll_select", "roll_unimodal", "patch_order")


# ---- Reading samples ----------------------------------------------------------------------------

@dataclass
class Scorer:
    """A model in evaluation mode, and the samples that it reads, shared out among all processes."""

    model: AllInOne
    clips: Clips
    config: EvalConfig
    device: torch.device
    unreadable: list = field(default_factory=list)     # what this process could not read
    CHUNK = 2048                                       # clips before features are saved

    def __post_init__(self):
        self.model.to(self.device).eval()

    @property
    def draws_at_random(self) -> bool:
        """Whether the model shuffles patches, or which of them roll, anew in each call."""
        return "random" in (self.model.config.patch_order, self.model.config.roll_select)

    def all_unreadable(self) -> list[str]:
        """What any process could not read, each clip once (re-ranking reads clips again)."""
        return list(dict.fromkeys(gather_objects(self.unreadable)))

    def micro_batches(self, indices, size: int) -> list[list[tuple[int, int]]]:
        """This process's share of the samples `indices`, as lists of (sample, visit).

        A micro-batch holds at most `size` neighbours of one manifest. Where something is drawn at
        random their number is fixed, so that its seed does not depend on `size`.
        """
        if self.draws_at_random:
            size = 1
        if self.config.task == "pretrain":
            size = 8                                   # VTM's pairs are drawn among 8 neighbours
        batches = []
        manifest = self.clips.manifest
        for end, lines in zip(manifest.ends, manifest.sizes):
            visits = [(i, i) for i in indices if end - lines <= i < end]
            batches += [visits[i:i + size] for i in range(0, len(visits), size)]
        return batches[dist.get_rank()::dist.get_world_size()]

    def read(self, indices=None, size: int = 0) -> Iterator[tuple[dict, list[dict]]]:
        """Yields (batch, its tensors for each view) of this process's share, each sample once.

        batch: as data.collate makes it. A view has "video" (B, S, 3, H, W) and the batch's other
        tensors, on the model's device. indices: the samples to read, by default all.
        """
        if indices is None:
            indices = range(len(self.clips))
        micro_batches = self.micro_batches(indices, size or self.config.batch)
        merge = functools.partial(collate, clips=self.clips, group=8)
        for batch in load(self.clips, micro_batches, merge, self.config.workers):
            self.unreadable += batch["unreadable"]
            if not batch["source_line"]:
                continue                               # no clip of it can be read
            torch.manual_seed(int(batch["index"][0]))  # of a model or an objective that draws
            yield batch, self.views(batch)

    def views(self, batch: dict) -> list[dict]:
        """The tensors of a batch on the model's device, once for each view."""
        tensors = {}
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors[name] = value.to(self.device)
        video = tensors["video"]                       # (B, S, 3, H, W) or (B, K, S, 3, H, W)
        if video.dim() == 5:
            return [tensors]
        return [{**tensors, "video": view} for view in video.unbind(1)]

    def scored(self, score: Callable[[AllInOne, dict], Tensor]) -> Iterator[tuple]:
        """Yields ({"index", "source_line", "kind"}, label, scores (candidates,)) of each sample.

        score: a function of allinone.SCORES. The scores of the views are averaged.
        """
        for batch, views in self.read():
            scores = sum(score(self.model, view) for view in views) / len(views)
            check_scores(scores, batch["source_line"])
            for i, label in enumerate(batch["label"].tolist()):
                yield describe(batch, i), label, scores[i].float().cpu()

    @torch.no_grad()
    def features(self, name: str, encode: Callable[[AllInOne, dict], Tensor], path: Path | None,
                 is_cache: bool = False) -> dict[int, Tensor]:
        """{sample: encode(model, view)} of all clips that can be read.

        The file `path` holds them while weights, model, flags and clip are the same, so that a
        killed run goes on. name: what `encode` computes, which the file records. ValueError if
        the file holds something else; is_cache: it is then written anew.
        """
        key = self.features_key(name)
        stored = {}
        if path and path.exists():
            stored = read_features(path, key, is_cache)
        clip_keys = [clip_key(self.clips.manifest[i]) for i in range(len(self.clips))]
        missing = [i for i in range(len(self.clips)) if clip_keys[i] not in stored]
        end = 0
        while end < len(missing):
            # chunks of 2048, 2048, 4096, 8192, ...: each saving rewrites the file, so they grow
            # with it
            begin = end
            end = max(self.CHUNK, 2 * begin)
            for i, feature in self.encode_clips(missing[begin:end], encode):
                stored[clip_keys[i]] = feature
            if sys.stdout.isatty():
                print_main(f"\rfeatures: {min(end, len(missing))} of {len(missing)} clips", end="")
            if path and stored and is_main():
                write_features(path, key, stored)
        if missing:
            unreadable = len(self.all_unreadable())
            start = "\r" if sys.stdout.isatty() else ""
            print_main(f"{start}features of {len(missing) - unreadable} clips computed; "
                       f"unreadable: {unreadable}")
        return {i: stored[clip] for i, clip in enumerate(clip_keys) if clip in stored}

    def encode_clips(self, indices: list[int], encode: Callable) -> list[tuple[int, Tensor]]:
        """(sample, encode(model, view)) of these samples, computed by all processes."""
        features = []
        for batch, views in self.read(indices):
            with half_precision(self.device):
                encoded = encode(self.model, views[0]).cpu()
            check_scores(encoded, batch["source_line"])
            for i, feature in zip(batch["index"].tolist(), encoded):
                features.append((i, feature.clone()))  # else each row pickles its whole batch
        return gather_objects(features)

    def features_key(self, name: str) -> str:
        """What features depend on beside their clips: weights, sizes, how clips are read, and the
        device, for a GPU computes them in half precision."""
        checksum = 0
        for parameter, tensor in self.model.named_parameters():
            if not parameter.startswith("answer_head"):
                checksum = zlib.crc32(tensor.detach().cpu().numpy().tobytes(), checksum)
        sizes = replace(self.model.config, answers=0, answer_head="paper")
        clips = self.clips
        return str([name, checksum, sizes, clips.resize, clips.boxes, clips.order,
                    self.device.type])


def describe(batch: dict, i: int) -> dict:
    """What a prediction says of sample i of a batch."""
    return {"index": int(batch["index"][i]), "source_line": batch["source_line"][i],
            "kind": batch["kind"][i] or "all"}


def read_features(path: Path, key: str, is_cache: bool) -> dict[str, Tensor]:
    """{clip_key: feature} of a file that Scorer.features wrote with the same key.

    Any other file of a cache counts as empty. ValueError for any other file of the user's.
    """
    try:
        content = read_weights(path)
    except ValueError:
        if not is_cache:
            raise
        content = {}
    if content.get("key") == key:
        return dict(zip(content["names"], content["features"]))
    if is_cache:
        return {}
    raise ValueError(f"{path}: holds no features, or those of other weights or flags; use another "
                     "file, or remove it")


def write_features(path: Path, key: str, features: dict[str, Tensor]) -> None:
    """The file that read_features reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save({"key": key, "names": list(features),
                    "features": torch.stack(list(features.values()))}, file)


def clip_key(sample: dict) -> str:
    """What tells whether a clip's features still hold: its file, and which part of it is read."""
    path = Path(sample["video"])
    state = None
    if path.exists():
        state = [path.stat().st_size, path.stat().st_mtime_ns]
    parts = [sample.get(name) for name in ("member", "start", "end", "fps", "boxes", "image")]
    return json.dumps([sample["video"], state, *parts])


def video_cls(model: AllInOne, batch: dict) -> Tensor:
    """(B, D): the cls token of the video alone, which a probe classifies (Tab. 12)."""
    return model.encode_video(batch["video"])[:, 0]


def cls_features(model: AllInOne, clips: Clips, path: Path, config, device: torch.device
                 ) -> tuple[list[dict], list[str]]:
    """(what a linear probe trains on, what could not be read).

    A list of {"feature" (D,), "label", "source_line", "manifest_id"}. config: a TrainConfig.
    """
    reading = EvalConfig(task="probe", batch=config.batch_per_gpu, workers=config.workers)
    scorer = Scorer(model, clips, reading, device)
    samples = []
    for i, feature in scorer.features("video cls", video_cls, path, is_cache=True).items():
        sample = clips.manifest[i]
        manifest_id, _ = clips.manifest.locate(i)
        samples.append({"feature": feature, "label": clips.read_words(sample, i)["label"],
                        "source_line": sample["source_line"], "manifest_id": manifest_id})
    return samples, scorer.all_unreadable()


def check_scores(scores: Tensor, source_lines: list[str]) -> None:
    """ValueError if a score is not a number: comparisons with it would count as right."""
    wrong = scores.isnan().flatten(1).any(1)           # (B,)
    if wrong.any():
        source_line = source_lines[int(wrong.int().argmax())]
        raise ValueError(f"{source_line}: the model's score is not a number; the weights are "
                         "damaged, or overflow")


# ---- Tasks on a manifest (Sec. 4.2) -------------------------------------------------------------

@torch.no_grad()
def evaluate(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, device: torch.device,
             answers: list[str] | None = None) -> dict:
    """Scores every sample of config.data once, on any number of processes; all get the result.

    answers: the classes of "qa" and "probe". Returns {"samples": how many there are, "unreadable":
    [...], "predictions": [{"index", "source_line", "kind", "metrics", ...}]}, where "metrics" are
    what report() averages.
    """
    scorer = Scorer(model, config.open_clips(model, tokenizer, answers), config, device)
    with half_precision(device):
        predictions = MANIFEST_TASKS[config.task](scorer)
    return {"samples": len(scorer.clips), "unreadable": scorer.all_unreadable(),
            "predictions": predictions}


def score_choice(scorer: Scorer) -> list[dict]:
    """Multiple choice (Sec. 4.2.1, 4.2.3; Tab. 2a, 4, 5, 13), and a task of your own.

    Reads "question", if there is one, "options" and "answer". The score of an option is VTM's
    matched logit; another task has its own score in allinone.SCORES. Reports accuracy, and that of
    guessing among as many options.
    """
    predictions = []
    for prediction, label, scores in scorer.scored(SCORES[scorer.config.task]):
        scores = scores[scores > -torch.inf]           # without the places of absent options
        prediction["label"] = label
        prediction["scores"] = scores.tolist()
        prediction["metrics"] = {"accuracy %": recall_of_label(scores, label)[1],
                                 "chance %": 100 / len(scores)}
        predictions.append(prediction)
    return gather_sorted(predictions)


def score_qa(scorer: Scorer) -> list[dict]:
    """Open-ended question answering (Sec. 4.2.1, Tab. 2).

    Reads "question" and "answer". Reports accuracy, in which an answer that is no class is wrong;
    "in vocabulary", which leaves such questions out as the release does; and "majority", which the
    commonest answer to questions of the same kind would reach.
    """
    predictions = []
    for prediction, label, scores in scorer.scored(answer_scores):
        accuracy = recall_of_label(scores, label)[1]
        prediction["label"] = label
        prediction["answers"] = best_answers(scores, scorer.clips.answers)
        prediction["metrics"] = {"accuracy %": accuracy}
        if label >= 0:
            prediction["metrics"]["in vocabulary %"] = accuracy
        predictions.append(prediction)
    predictions = gather_sorted(predictions)
    add_majority(predictions)
    return predictions


def score_probe(scorer: Scorer) -> list[dict]:
    """Action recognition by a linear layer on the frozen video cls (App. D.1, Tab. 12).

    Reads "answer". Reports how often it is among the 1, 5 and 10 likeliest classes.
    """
    predictions = []
    for prediction, label, scores in scorer.scored(class_scores):
        prediction["label"] = label
        prediction["answers"] = best_answers(scores, scorer.clips.answers)
        prediction["metrics"] = {}
        for k, recall in recall_of_label(scores, label).items():
            prediction["metrics"][f"top-{k} %"] = recall
        predictions.append(prediction)
    return gather_sorted(predictions)


def score_pretraining(scorer: Scorer) -> list[dict]:
    """Accuracy of the objectives of pre-training that classify (Sec. 3.3; Tab. 6, 9, 10).

    Reads a caption. An objective of allinone.pretraining_scores is a kind of its own: "VTM" has a
    prediction for each clip, "MLM" one for each masked word.
    """
    predictions = []
    for batch, views in scorer.read():
        logits = defaultdict(float)                    # {objective: mean over views, (K, classes)}
        labels = {}
        for view in views:
            scores, _ = pretraining_scores(scorer.model, view, scorer.config.objectives)
            for name, score in scores.items():
                logits[name] = logits[name] + score.logits.float().cpu() / len(views)
                labels[name] = score.labels.tolist()
        for name in logits:
            predictions += objective_predictions(name, batch, logits[name], labels[name])
    return gather_sorted(predictions)


def objective_predictions(objective: str, batch: dict, logits: Tensor, labels: list[int]
                          ) -> list[dict]:
    """A prediction for each row of logits (K, classes) but those with a negative label."""
    clips = clip_of_rows(objective, batch, len(logits))
    check_scores(logits, [batch["source_line"][b] for b in clips])
    predictions = []
    for b, scores, label in zip(clips, logits, labels):
        if label < 0:
            continue                                   # padding, or what the objective leaves out
        prediction = describe(batch, b)
        prediction["kind"] = objective.upper()
        prediction["label"] = label
        prediction["probability"] = round(float(scores.softmax(0)[label]), 4)
        prediction["metrics"] = {"accuracy %": recall_of_label(scores, label)[1]}
        predictions.append(prediction)
    return predictions


def clip_of_rows(objective: str, batch: dict, rows: int) -> list[int]:
    """The clip of the batch that each row of an objective's scores is about.

    The rows of MLM are masked words; those of other objectives stand clip after clip.
    """
    B, m = batch["text_ids"].shape
    if objective == "mlm":
        return (batch["mlm_positions"] // m).tolist()
    return [row * B // rows for row in range(rows)]


def best_answers(scores: Tensor, answers: list[str]) -> list[str]:
    """The five likeliest answers. scores: (answers,)."""
    best = scores.topk(min(5, len(scores))).indices
    return [answers[i] for i in best.tolist()]


def add_majority(predictions: list[dict]) -> None:
    """Adds to each metric what the commonest answer of its kind would score."""
    answers = defaultdict(Counter)
    for prediction in predictions:
        if prediction["label"] >= 0:
            answers[prediction["kind"]][prediction["label"]] += 1
    for prediction in predictions:
        commonest = [label for label, _ in answers[prediction["kind"]].most_common(1)]
        prediction["metrics"]["majority %"] = 100.0 * (prediction["label"] in commonest)


# ---- Ranks, with ties broken at random ----------------------------------------------------------

def expected_rank(above: int, wrong: int, right: int) -> tuple[float, dict[int, float]]:
    """(rank of the best right candidate, {k: % that one is among the first k}) of a query.

    `above` candidates score higher than the best right one. `wrong` and `right` ones share its
    score, the latter with itself, and stand behind those in any order. Both numbers are averages
    over these orders.
    """
    tied = wrong + right
    recall = {}
    for k in (1, 5, 10):
        places = min(max(k - above, 0), tied)          # of the first k places, those for tied ones
        all_wrong = math.comb(wrong, places) / math.comb(tied, places)
        recall[k] = 100 * (1 - all_wrong)
    return above + (tied + 1) / (right + 1), recall


def recall_of_label(scores: Tensor, label: int) -> dict[int, float]:
    """{k: % that candidate `label` is among the first k}. scores: (candidates,).

    A label of -1, an answer that is no candidate, is never among them.
    """
    if label < 0:
        return {1: 0.0, 5: 0.0, 10: 0.0}
    above = int((scores > scores[label]).sum())
    tied = int((scores == scores[label]).sum())
    return expected_rank(above, tied - 1, 1)[1]


# ---- Retrieval (Sec. 4.2.2, Tab. 3, Tab. 7): encode, gather, rank -------------------------------

COSINES_IN_MEMORY = 2 ** 24
ALL_PAIRS = 10 ** 9            # --rerank of a checkpoint without VTC: more than any candidates


class Side(NamedTuple):
    """Clips or captions, N of them: queries of one direction, candidates of the other."""

    names: list[str]
    index: list[int]     # the sample of a clip; the number of a caption among the texts
    embedding: Tensor    # (N, E) float64
    clip: Tensor         # (N,) the clip that each one is, or describes: equal where both belong


def score_retrieval(scorer: Scorer) -> list[dict]:
    """Text to video and video to text (Sec. 4.2.2, Tab. 3, Tab. 7).

    Reads the captions of each clip. Clips and captions are encoded alone and once, and compared by
    cosine (VTC); --rerank scores the best of each query by the joint pass (VTM). Reports recall at
    1, 5, 10 and ranks of each caption (kind "text to video") and each clip ("video to text").
    """
    clips, captions, texts = encode_sides(scorer)
    if not clips.names:
        return []
    text_pairs = best_pairs(captions, clips, scorer.config.rerank)         # (caption, clip)
    video_pairs = best_pairs(clips, captions, scorer.config.rerank)        # (clip, caption)
    text_keys = {(t, v): (clips.index[v], captions.index[t]) for t, v in text_pairs}
    video_keys = {(v, t): (clips.index[v], captions.index[t]) for v, t in video_pairs}
    wanted = defaultdict(list)                                             # {sample: texts}
    for sample, text in [*text_keys.values(), *video_keys.values()]:
        wanted[sample].append(text)
    logits = joint_logits(scorer, texts, wanted)
    return [*rank_candidates("text to video", captions, clips, text_keys, logits),
            *rank_candidates("video to text", clips, captions, video_keys, logits)]


def encode_sides(scorer: Scorer) -> tuple[Side, Side, list[tuple[int, ...]]]:
    """(clips, captions, the different texts as token ids), the same on all processes."""
    rows = []
    for batch, views in scorer.read():
        video = sum(video_embedding(scorer.model, view["video"]) for view in views) / len(views)
        check_scores(video, batch["source_line"])
        text = text_embedding(scorer.model, views[0]["text_ids"], views[0]["text_mask"]).cpu()
        check_scores(text, [batch["source_line"][b] for b in batch["text_clip"].tolist()])
        for b in range(len(batch["source_line"])):
            row = describe(batch, b)
            row["video"] = video[b].cpu().clone()      # (E,); a view would pickle the whole batch
            row["captions"] = []
            for t in (batch["text_clip"] == b).nonzero().flatten().tolist():
                ids = batch["text_ids"][t][batch["text_mask"][t]]
                row["captions"].append((tuple(ids.tolist()), text[t].clone()))
            rows.append(row)
    return sides_of(gather_sorted(rows))


def sides_of(rows: list[dict]) -> tuple[Side, Side, list[tuple[int, ...]]]:
    """What encode_sides returns, from the rows of all clips in their order.

    Equal captions have one embedding and so tie exactly. Products in float64 are rounded to
    float32 before they are compared, so that equal clips tie exactly too.
    """
    names = []
    numbers = []                                       # of each caption's tokens among `texts`
    clip = []
    texts = {}                                         # {token ids: their number}
    embeddings = []                                    # of each of the texts
    for v, row in enumerate(rows):
        for k, (ids, embedding) in enumerate(row["captions"]):
            if ids not in texts:
                texts[ids] = len(texts)
                embeddings.append(embedding.double())
            names.append(f"{row['source_line']}#{k}")
            numbers.append(texts[ids])
            clip.append(v)
    if not rows:
        empty = Side([], [], torch.empty(0, 0), torch.empty(0))
        return empty, empty, []
    clips = Side([row["source_line"] for row in rows], [row["index"] for row in rows],
                 torch.stack([row["video"].double() for row in rows]), torch.arange(len(rows)))
    captions = Side(names, numbers, torch.stack(embeddings)[numbers], torch.tensor(clip))
    return clips, captions, list(texts)


def cosine_blocks(queries: Side, candidates: Side) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (q,) numbers of queries and their cosines (q, G) with all candidates.

    Blocks fit in memory; each process gets its share of them.
    """
    size = max(1, COSINES_IN_MEMORY // len(candidates.names))
    blocks = torch.arange(len(queries.names)).split(size)
    for block in blocks[dist.get_rank()::dist.get_world_size()]:
        yield block, (queries.embedding[block] @ candidates.embedding.T).float()


def best_pairs(queries: Side, candidates: Side, k: int) -> list[tuple[int, int]]:
    """(query, candidate) of each query's k best candidates by cosine, and of ties with the k-th."""
    if k == 0:
        return []
    pairs = []
    for block, cosines in cosine_blocks(queries, candidates):
        least = cosines.topk(min(k, cosines.shape[1]), 1).values[:, -1:]
        query, candidate = (cosines >= least).nonzero().unbind(1)
        pairs += zip(block[query].tolist(), candidate.tolist())
    return gather_objects(pairs)


def rank_candidates(direction: str, queries: Side, candidates: Side,
                    keys: dict[tuple[int, int], tuple[int, int]],
                    logits: dict[tuple[int, int], list[float]]) -> list[dict]:
    """A prediction for each query: recall and rank of its best right candidate.

    keys: {(query, candidate): (sample, text)} of the pairs to be re-ranked. logits: of
    joint_logits; a clip that has become unreadable since it was encoded has none. A query's
    re-ranked candidates stand before all others, in the order of their matched logits; the rest is
    in the order of cosines.
    """
    matched = defaultdict(list)                                            # of each query
    for (query, candidate), key in keys.items():
        if key in logits:
            matched[query].append((candidate, logits[key][1]))
    predictions = []
    for block, scores in cosine_blocks(queries, candidates):
        reranked = torch.zeros_like(scores, dtype=torch.bool)
        for row, q in enumerate(block.tolist()):
            for candidate, logit in matched[q]:
                reranked[row, candidate] = True
                scores[row, candidate] = logit
        relevant = queries.clip[block, None] == candidates.clip                # (q, G)
        counts = count_above(scores, reranked, relevant).tolist()
        # re-ranked candidates, if the query has any; of equal ones, the earliest is "best"
        eligible = reranked | ~reranked.any(1, keepdim=True)
        best = scores.masked_fill(~eligible, -torch.inf).argmax(1)
        for q, b, (above, wrong, right) in zip(block.tolist(), best.tolist(), counts):
            position, recall = expected_rank(above, wrong, right)
            metrics = {f"R@{k} %": value for k, value in recall.items()}
            metrics["median rank"] = position
            metrics["mean rank"] = position
            predictions.append({"index": q, "source_line": queries.names[q], "kind": direction,
                                "best": candidates.names[b], "metrics": metrics})
    return gather_sorted(predictions)


def count_above(scores: Tensor, reranked: Tensor, relevant: Tensor) -> Tensor:
    """(Q, 3): what expected_rank takes, for each query.

    scores: (Q, G). relevant: bool (Q, G), the right candidates. Candidates form two groups: the
    re-ranked ones, bool (Q, G), then the rest. The best right one lies in the first group that
    holds a right one.
    """
    right_is_reranked = (relevant & reranked).any(1, keepdim=True)         # (Q, 1)
    in_same_group = reranked == right_is_reranked
    best = scores.masked_fill(~(relevant & in_same_group), -torch.inf).amax(1, keepdim=True)
    above = (in_same_group & (scores > best)) | (reranked & ~right_is_reranked)
    tied = in_same_group & (scores == best)
    return torch.stack([above.sum(1), (tied & ~relevant).sum(1), (tied & relevant).sum(1)], 1)


def joint_logits(scorer: Scorer, texts: list[tuple[int, ...]], wanted: dict[int, list[int]]
                 ) -> dict[tuple[int, int], list[float]]:
    """{(sample, text): VTM's two logits (Sec. 3.3)} of the texts `wanted` with each sample.

    texts: token ids. wanted: {sample: numbers of texts}. Views are averaged.
    """
    model = scorer.model
    size = 8 * scorer.config.batch                     # of texts, each beside one clip
    pairs = []
    for batch, views in scorer.read(wanted):
        for b, sample in enumerate(batch["index"].tolist()):
            numbers = list(dict.fromkeys(wanted[sample]))
            videos = [model.embed_video(view["video"][b:b + 1]) for view in views]
            for begin in range(0, len(numbers), size):
                part = numbers[begin:begin + size]
                ids = pad_sequence([torch.tensor(texts[t]) for t in part], True, -1)   # (k, m)
                ids = ids.to(scorer.device)
                text = model.embed_text(ids.clamp(min=0))
                logits = torch.zeros(len(part), 2)
                for video in videos:
                    pooled = model.fuse(video.expand(len(part), -1, -1, -1), text, ids >= 0).pooled
                    logits += model.vtm_head(pooled).float().cpu() / len(videos)
                check_scores(logits, [batch["source_line"][b]] * len(part))
                pairs += zip([(sample, t) for t in part], logits.tolist())
    return dict(gather_objects(pairs))


MANIFEST_TASKS = {"choice": score_choice, "retrieval": score_retrieval, "qa": score_qa,
                  "probe": score_probe, "pretrain": score_pretraining}
for task_name in TASKS:                  # a task of your own: the accuracy of its allinone.SCORES
    MANIFEST_TASKS.setdefault(task_name, score_choice)


# ---- Tasks on any video (Sec. 4.6, Fig. 4, 6, 11) -----------------------------------------------

def best_five(probabilities: Tensor, name_of: Callable[[int], str], column: str) -> list[dict]:
    """The five likeliest of probabilities (K,), as rows {"probability", column: name}."""
    best = probabilities.topk(min(5, len(probabilities)))
    return [{"probability": round(p, 4), column: name_of(i)}
            for p, i in zip(best.values.tolist(), best.indices.tolist())]


def fill(scorer: Scorer, clip: dict) -> dict:
    """The five likeliest words of each [MASK], by video and text or, with --blind, the text."""
    tokenizer = scorer.clips.tokenizer
    ids = clip["text_ids"]                                                 # (1, m)
    mask = clip["text_mask"]
    if scorer.config.blind:
        text = scorer.model.encode_text(ids, mask)
    else:
        text = scorer.model(clip["video"], ids, mask).text
    logits = scorer.model.mlm_head(text[ids == tokenizer.mask_id])         # (masks, |V|)
    rows = []
    for number, probabilities in enumerate(logits.float().softmax(-1), start=1):
        for row in best_five(probabilities, tokenizer.words.id_to_token, "word"):
            rows.append({"mask": number, **row})
    return {"words": rows}


def match(scorer: Scorer, clip: dict) -> dict:
    """How well each --text fits, among all of them (Sec. 4.2.3) and by itself (Sec. 3.3)."""
    texts = scorer.config.text
    video = clip["video"].expand(len(texts), -1, -1, -1, -1)
    logits = match_logits(scorer.model, video, clip["text_ids"], clip["text_mask"]).float()
    among_texts = logits[:, 1].softmax(0).tolist()
    matched = logits.softmax(1)[:, 1].tolist()
    rows = []
    for i, text in enumerate(texts):
        rows.append({"among_texts": round(among_texts[i], 4), "matched": round(matched[i], 4),
                     "text": text})
    return {"captions": rows}


def ask(scorer: Scorer, clip: dict) -> dict:
    """The five likeliest answers of an open-ended QA checkpoint (Sec. 4.2.1)."""
    probabilities = answer_scores(scorer.model, clip)[0].float().softmax(0)
    return {"answers": best_five(probabilities, scorer.clips.answers.__getitem__, "answer")}


def patch_origins(model: AllInOne, S: int, m: int) -> list[Tensor]:
    """For each block d = 1..L: (S, n, S), how much of each slot of a frame came from each frame.

    The shares of a slot sum to 1.
    The model's own mix_frames moves random tokens, once as they are and once with other patches in
    one of the frames: what differs in a slot came from that frame. So a new mixing needs no rule
    here, and one that blends frames has shares between 0 and 1. m: text tokens.
    """
    config = model.config
    start = m + model.num_special
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(S, start + config.patches, config.width, generator=generator)
    others = torch.randn(S, config.patches, config.width, generator=generator)
    clips = [tokens]
    for s in range(S):
        clips.append(tokens.clone())
        clips[-1][s, start:] = others[s]
    clips = [clip.to(model.cls_token.device) for clip in clips]
    origins = []
    for layer in range(1, config.depth + 1):
        clips = [model.mix_frames(clip, S, m, layer) for clip in clips]
        changes = [(clip - clips[0])[:, start:].abs().sum(-1) for clip in clips[1:]]    # (S, n)
        changes = torch.stack(changes, -1)                                 # (S, n, S)
        origins.append(changes / changes.sum(-1, keepdim=True))
    return origins


def block_attention(model: AllInOne, clip: dict) -> list[tuple[Tensor, Tensor]]:
    """For each block, how each text token's attention is shared out, frames and heads averaged.

    On the text (m, m), and on the video tokens in their slots of the S frames (m, S, 1+n). The
    shares of a token sum to 1.
    """
    S = clip["video"].shape[1]
    m = clip["text_ids"].shape[1]
    blocks = []

    def record(attention, inputs, output):
        # (S, m, m + 1 + n); with "flatten" all frames are one sequence: (1, m, m + S(1 + n))
        shares = attention.weights(*inputs)[:, :m]
        on_text = shares[:, :, :m].mean(0)             # over the frames of the text's queries
        on_video = shares[:, :, m:].transpose(0, 1).reshape(m, S, -1) / shares.shape[0]
        blocks.append((on_text, on_video))

    hooks = [block.attn.register_forward_hook(record) for block in model.blocks]
    model(clip["video"], clip["text_ids"], clip["text_mask"])
    for hook in hooks:
        hook.remove()
    return blocks


def explain(scorer: Scorer, clip: dict) -> dict:
    """Where each word looks (Sec. 4.6, Fig. 6, 11): maps (words, S, rows, columns) that sum to 1.

    By the word-patch transport on the last block's tokens or, with --block, by its attention.
    Patches return to the frame that they were rolled from, and a [MASK] is filled.
    """
    model = scorer.model
    tokenizer = scorer.clips.tokenizer
    layer = scorer.config.block or model.config.depth
    video = clip["video"]
    ids = clip["text_ids"]
    mask = clip["text_mask"]
    S = video.shape[1]
    masks = ids == tokenizer.mask_id
    if masks.any():
        text = model(video, ids, mask).text
        ids = ids.masked_scatter(masks, model.mlm_head(text[masks]).argmax(-1))
    if scorer.config.block:
        _, on_video = block_attention(model, {**clip, "text_ids": ids})[layer - 1]
        maps = on_video[:, :, model.num_special:]                          # (m, S, n)
    else:
        features = model(video, ids, mask)
        patches = features.frames[:, :, model.num_special:].flatten(1, 2)  # (1, S*n, D)
        _, plan = word_patch_transport(features.text, patches, mask)
        maps = plan[0].unflatten(1, (S, -1))
    origins = patch_origins(model, S, ids.shape[1])[layer - 1]             # (S, n, S)
    maps = torch.einsum("msn,snf->mfn", maps, origins)                     # (m, S, n)
    words = slice(1, int(mask.sum()) - 1)              # without [CLS] and [SEP]
    maps = maps[words] / maps[words].sum((1, 2), keepdim=True)
    side = model.config.image_size // model.config.patch_size
    return {"words": [tokenizer.words.id_to_token(i) for i in ids[0, words].tolist()],
            "maps": maps.unflatten(2, (side, side)).tolist()}


def attention(scorer: Scorer, clip: dict) -> dict:
    """What the text attends to in each block (Fig. 4), on average over its tokens.

    The shares "text", "cls", "own" (patches of a frame itself) and "rolled" (patches from another
    frame) sum to 1. "per_patch" is a rolled patch's share divided by one of the frame itself.
    "frames" holds [own, rolled] of each frame.
    """
    S = clip["video"].shape[1]
    m = clip["text_ids"].shape[1]
    length = int(clip["text_mask"].sum())
    origins = patch_origins(scorer.model, S, m)
    blocks = []
    for d, (on_text, on_video) in enumerate(block_attention(scorer.model, clip), start=1):
        cls, patches = on_video[:length].mean(0).tensor_split((scorer.model.num_special,), 1)
        own = origins[d - 1].diagonal(dim1=0, dim2=2).T                    # (S, n), from 0 to 1
        frames = torch.stack([(patches * own).sum(1), (patches * (1 - own)).sum(1)], 1)  # (S, 2)
        own_share, rolled_share = frames.sum(0).tolist()
        block = {"block": d, "text": float(on_text[:length].sum() / length),
                 "cls": float(cls.sum()), "own": own_share, "rolled": rolled_share,
                 "frames": frames.tolist()}
        if own_share and rolled_share:
            patches_ratio = float(own.sum() / (1 - own).sum())
            block["per_patch"] = rolled_share / own_share * patches_ratio
        blocks.append(block)
    return {"blocks": blocks}


VIDEO_TASKS = {"fill": fill, "match": match, "ask": ask, "explain": explain,
               "attention": attention}


# ---- Search (Sec. 3.3 VTC, Tab. 14) -------------------------------------------------------------

def index_entry(model: AllInOne, batch: dict) -> Tensor:
    """(B, E): a clip's embedding as an index keeps it."""
    return video_embedding(model, batch["video"]).half()


def search(scorer: Scorer) -> list[dict]:
    """The clips that fit each --text best: {"index", "text", "cosine", perhaps "matched"}.

    By cosine (VTC). --rerank K scores the K best by VTM ("matched"); these stand before all
    others, which stay in the order of cosines. --index FILE keeps the features of the clips.
    """
    config = scorer.config
    tokenizer = scorer.clips.tokenizer
    path = Path(config.index) if config.index else None
    features = scorer.features("video embedding", index_entry, path)
    if not features:
        raise DataError(f"no clip can be read: {'; '.join(scorer.all_unreadable()[:3])}")
    texts = [tuple(tokenizer.encode(text, scorer.clips.max_text_len)) for text in config.text]
    nearest = nearest_clips(scorer, features, texts)
    wanted = defaultdict(list)
    for t, pairs in enumerate(nearest):
        for _, i in pairs[:config.rerank]:
            wanted[i].append(t)
    logits = joint_logits(scorer, texts, wanted)
    results = []
    for t, pairs in enumerate(nearest):
        rows = []
        for cosine, i in pairs:
            row = {"index": i, "text": config.text[t], "cosine": round(cosine, 4)}
            if (i, t) in logits:
                probability = torch.tensor(logits[i, t]).softmax(0)[1]
                row["matched"] = round(float(probability), 4)
            rows.append(row)
        rows.sort(key=lambda row: row.get("matched", -1.0), reverse=True)
        results += rows[:config.top]
    return results


def nearest_clips(scorer: Scorer, features: dict[int, Tensor], texts: list[tuple[int, ...]]
                  ) -> list[list[tuple[float, int]]]:
    """For each text, (cosine, sample) of the clips nearest to it, the best before the others.

    Each process looks through its share of the features. texts: token ids.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    samples = list(features)[rank::world]
    gallery = torch.stack(list(features.values()))[rank::world]            # (G, E) float16
    gallery = gallery.to(scorer.device, torch.float32)
    count = max(scorer.config.rerank, scorer.config.top)
    nearest = []
    for ids, words in zip(texts, scorer.config.text):
        text = text_embedding(scorer.model, torch.tensor([ids], device=scorer.device))
        check_scores(text, [f"--text {words}"])
        best = (text.float() @ gallery.T)[0].topk(min(count, len(samples)))
        pairs = [(cosine, samples[g])
                 for cosine, g in zip(best.values.tolist(), best.indices.tolist())]
        pairs = sorted(gather_objects(pairs), key=lambda pair: (-pair[0], pair[1]))
        nearest.append(pairs[:count])
    return nearest


# ---- Running on videos, and printing the results ------------------------------------------------

def video_samples(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """The clips at `path`: those of a manifest, of a folder at any depth, of shards, or the file
    itself."""
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        return [file.fields() for file in clip_files(path)]
    fields = ("video", "member", "start", "end", "fps", "image", "boxes")
    samples = []
    for line in Manifest(path, columns):
        samples.append({name: line[name] for name in fields if name in line})
    return samples


def cut_windows(sample: dict, seconds: float) -> list[dict]:
    """The sample as windows of so many seconds, the last one perhaps shorter.

    An image, and a clip whose length nobody knows, stays whole; so does one whose start lies
    behind its end, which its reader names.
    """
    length = 0.0 if is_image(sample) else duration(sample)
    end = min(sample.get("end", math.inf), length or math.inf)
    if end == math.inf:
        return [sample]
    windows = []
    for start in np.arange(sample.get("start", 0.0), end, seconds).tolist():
        windows.append({**sample, "start": start, "end": min(start + seconds, end)})
    return windows or [sample]


def cut_all(samples: list[dict], seconds: float) -> list[dict]:
    """The windows of all samples. Says how many clips stay whole."""
    windows = []
    whole = 0
    for sample in samples:
        cut = cut_windows(sample, seconds)
        whole += cut[0] is sample and not is_image(sample)
        windows += cut
    if whole:
        print_main(f"--window: {whole} of {len(samples)} clips stay whole: their length is not "
                   "known, or they start behind their end")
    return windows


def video_manifest(config: EvalConfig) -> str:
    """The path of a manifest of the clips of --video, cut into windows, each with --text."""
    samples = []
    for path in config.video:
        samples += video_samples(Path(path), config.columns)
    unique = {json.dumps(sample): sample for sample in samples}    # a file may be named twice
    samples = list(unique.values())
    if config.window:
        samples = cut_all(samples, config.window)
    if not samples:
        raise DataError(f"--video {' '.join(config.video)}: no clip there; expected video files, "
                        "folders of them, or manifests")
    for sample in samples:
        sample["texts"] = list(config.text)
    return str(temporary_manifest(samples))


def clip_name(sample: dict) -> str:
    """What results call a clip: its file, a shard's member, its window."""
    name = sample["video"]
    if "member" in sample:
        name += f" {sample['member']['name']}"
    if "start" in sample or "end" in sample:
        name += f" {sample.get('start', 0):g}-{sample.get('end', math.inf):g} s"
    return name


@torch.no_grad()
def run_on_videos(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig,
                  answers: list[str] | None, device: torch.device) -> list[dict]:
    """--task fill, match, ask, explain, attention or search on the clips of --video.

    Prints and returns the results, each with the name of its "video"; draws them if there is --out.
    """
    warn_of_unknown_words(tokenizer, config.text)
    config = replace(config, data=(video_manifest(config),), columns=())
    if config.task in ("explain", "attention"):        # maps need the patches in their places
        model.config = replace(model.config, patch_order="raster")
    reading = replace(config, task="retrieval")        # a clip with its texts
    clips = reading.open_clips(model, tokenizer, answers)
    kinds = {is_image(sample) for sample in clips.manifest}
    if len(kinds) > 1:                                 # no micro-batch holds images and clips
        reading = replace(reading, batch=1)
    scorer = Scorer(model, clips, reading, device)
    if config.task == "search":
        results = search(scorer)
    else:
        results = []
        for batch, views in scorer.read(size=1):
            result = VIDEO_TASKS[config.task](scorer, views[0])
            results.append({"index": int(batch["index"][0]), **result})
        results = gather_sorted(results)
    for line in scorer.all_unreadable():
        _, _, reason = line.partition(": ")            # without the temporary manifest's name
        print_main(f"unreadable: {reason}")
    if not results:
        raise DataError(f"--video {' '.join(config.video)}: no clip can be read")
    results = [{"video": clip_name(clips.manifest[result["index"]]), **result}
               for result in results]
    print_results(config.task, results)
    if config.out and is_main():
        draw_results(Path(config.out), config, clips, results)
    return results


def warn_of_unknown_words(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Says which words of the texts a checkpoint never learnt as words."""
    words = tokenizer.unknown_words([text.replace("[MASK]", " ") for text in texts])
    if words:
        examples = ", ".join(words[:12])
        if len(words) > 12:
            examples += f" and {len(words) - 12} more"
        print_main(f"this checkpoint's vocabulary has {tokenizer.vocab_size} tokens; it spells or "
                   f"does not know: {examples}")


LEGENDS = {
    "fill": "probability: of each word in the place of its [MASK]",
    "match": "among_texts: probability among these texts; matched: that video and text are a pair",
    "ask": "probability: of each answer among those that the checkpoint learnt",
    "explain": "share of each word's map that lies in each frame",
    "search": "cosine: of text and clip (VTC); matched: probability of being a pair (VTM)"}
TABLES = {"fill": "words", "match": "captions", "ask": "answers"}


def print_results(task: str, results: list[dict]) -> None:
    """Results for people: a table for each clip; of a search, for each text."""
    if task == "attention":
        return                                         # its table is the mean of all clips
    print_main(LEGENDS[task])
    tables = defaultdict(list)
    for result in results:
        if task == "search":
            row = {name: result[name] for name in ("cosine", "matched") if name in result}
            tables[result["text"]].append({**row, "video": result["video"]})
        elif task == "explain":
            tables[result["video"]] += frame_shares(result)
        else:
            tables[result["video"]] += result[TABLES[task]]
    for title, rows in tables.items():
        print_main(f"\n{title}")
        for line in table_lines(rows, digits=4):
            print_main(f"  {line}")


def frame_shares(result: dict) -> list[dict]:
    """Rows {"frame 1": share, ..., "word"} of a result of explain."""
    rows = []
    for word, maps in zip(result["words"], result["maps"]):
        shares = torch.tensor(maps).sum((1, 2)).tolist()                   # (S,)
        row = {f"frame {s}": share for s, share in enumerate(shares, start=1)}
        rows.append({**row, "word": word})
    return rows


def table_lines(rows: list[dict], digits: int = 1) -> list[str]:
    """Rows as aligned lines under the names of their columns.

    Numbers stand at the right, words at the left, and a dash where a row lacks a column.
    """
    names = []
    for row in rows:
        names += [name for name in row if name not in names]
    columns = []
    for name in names:
        cells = [name]
        for row in rows:
            value = row.get(name, "-")
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        width = max(map(len, cells))
        is_text = any(not re.match(r"-?\d|-$", cell) for cell in cells[1:])
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns)]


def mean_blocks(results: list[dict]) -> list[dict]:
    """The mean of attention's "blocks" over clips; images, in which nothing rolls, stay out.

    If there are only images, it is theirs.
    """
    most = max(len(result["blocks"][0]["frames"]) for result in results)
    clips = [result["blocks"] for result in results if len(result["blocks"][0]["frames"]) == most]
    means = []
    for rows in zip(*clips):
        mean = {"block": rows[0]["block"]}
        for name in ("text", "cls", "own", "rolled", "per_patch"):
            values = [row[name] for row in rows if name in row]
            if values:
                mean[name] = sum(values) / len(values)
        frames = torch.tensor([row["frames"] for row in rows]).mean(0)     # (S, 2)
        for s, shares in enumerate(frames.tolist(), start=1):
            mean[f"frame {s}"] = shares[0]
            mean[f"frame {s} rolled"] = shares[1]
        means.append(mean)
    return means


def show_attention(profiles: dict[str, list[dict]], out: str) -> None:
    """Fig. 4: prints and, into the folder `out`, draws mean_blocks of each checkpoint."""
    panels = []
    for checkpoint, blocks in profiles.items():
        print_main(f"\nshares of the text's attention, {checkpoint}\n"
                   "per_patch: what a rolled patch gets for each 1 of a patch of the frame itself")
        for line in table_lines(blocks, digits=3):
            print_main(line)
        frames = [name for name in blocks[0] if name.startswith("frame ")]
        panels.append(Panel(f"shares, {checkpoint}", blocks, ["text", "cls", "own", "rolled"]))
        panels.append(Panel(f"shares by frame, {checkpoint}", blocks, frames))
    if out and is_main():
        save_panels(Path(out) / "attention.png", panels, "block")


# ---- Pictures -----------------------------------------------------------------------------------

FONT = ImageFont.load_default_imagefont()              # unlike load_default(), it has accents
LETTER = 6                                             # pixels from letter to letter
LINE = 14                                              # pixels from line to line
COLOURS = ("red", "blue", "green", "orange", "purple", "black", "brown", "teal", "magenta", "gray")


def drawable(text: str) -> str:
    """The text in letters that the font has, those of Latin-1.

    Others lose their accents, and what then is none of them becomes "?".
    """
    letters = ""
    for letter in text:
        if ord(letter) > 255:
            letter = unicodedata.normalize("NFKD", letter)[0]
        letters += letter if ord(letter) < 256 else "?"
    return letters


def wrap(text: str, width: int) -> list[str]:
    """The text as drawable lines of at most `width` pixels; words are cut only if they must be."""
    lines = []
    for paragraph in drawable(text).splitlines():
        lines += textwrap.wrap(paragraph, width // LETTER) or [""]
    return lines


def heated(video: Tensor, heat: Tensor) -> list[Tensor]:
    """Frames (S, 3, H, W) under maps (S, rows, columns) in yellow, the highest value opaque."""
    heat = F.interpolate(heat[:, None], size=video.shape[2:])              # (S, 1, H, W)
    heat = heat / heat.max().clamp(min=1e-9)
    yellow = torch.tensor([255.0, 255.0, 0.0]).view(3, 1, 1)
    return list((video * (1 - heat) * 0.7 + yellow * heat).byte())


def save_picture(path: Path, rows: list[tuple[str, list[Tensor]]], side: int = 112) -> None:
    """A PNG of rows, each a text above its frames (3, H, W), `side` pixels square.

    A text that is wider than the picture goes on in the next line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width = side * max([len(frames) for _, frames in rows] + [4])
    texts = [wrap(text, width - 4) for text, _ in rows]
    heights = [LINE * len(text) + 3 + side * bool(frames)
               for text, (_, frames) in zip(texts, rows)]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    canvas = ImageDraw.Draw(sheet)
    top = 0
    for text, (_, frames), height in zip(texts, rows, heights):
        for line, words in enumerate(text):
            canvas.text((2, top + LINE * line), words, "black", FONT)
        for k, frame in enumerate(frames):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side))
            sheet.paste(image, (k * side, top + height - side))
        top += height
    sheet.save(path)


def draw_results(out: Path, config: EvalConfig, clips: Clips, results: list[dict]) -> None:
    """A picture of each clip (TASK-1.png, ...); of a search, one of each text."""
    if config.task == "attention":
        return                                         # show_attention draws the mean of all clips
    pictures = defaultdict(list)
    for result in results:
        i = result["index"]
        frames = list(clips[i, i].get("video", []))    # none if it has become unreadable
        if config.task == "search":
            numbers = f"cosine {result['cosine']:.4f}"
            if "matched" in result:
                numbers += f", matched {result['matched']:.4f}"
            rows = pictures[result["text"]]
            if not rows:
                rows.append((result["text"], []))
            rows.append((f"{result['video']}: {numbers}", frames))
        elif config.task == "explain":
            rows = pictures[i]
            rows.append((f"{result['video']}\n{config.text[0]}\nyellow: more", frames))
            for word, heat in zip(result["words"], result["maps"]):
                if frames:
                    rows.append((word, heated(torch.stack(frames), torch.tensor(heat))))
        else:
            title = [result["video"], *table_lines(result[TABLES[config.task]], digits=4)]
            pictures[i].append(("\n".join(title), frames))
    for number, rows in enumerate(pictures.values(), start=1):
        save_picture(out / f"{config.task}-{number}.png", rows)


class Panel(NamedTuple):
    """Curves of one diagram: `names` of each row."""

    title: str
    rows: list[dict]
    names: list[str]


def save_curves(path: Path, rows: list[dict]) -> None:
    """curve.png of a training log: losses, and accuracies in percent, by "step"."""
    if not rows:
        return
    losses = [name for name in rows[-1] if name in OBJECTIVES or name in SCORES]
    accuracies = [name for name in rows[-1] if name.endswith("_accuracy")]
    panels = [Panel("loss", rows, losses)]
    if accuracies:
        panels.append(Panel("accuracy", rows, accuracies))
    save_panels(path, panels, "step")


def save_panels(path: Path, panels: list[Panel], x: str) -> None:
    """A PNG of diagrams, two in a line, whose horizontal axis is `x`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = 480
    height = 360
    sheet = Image.new("RGB", (width * min(2, len(panels)), height * math.ceil(len(panels) / 2)),
                      "white")
    for number, panel in enumerate(panels):
        left = width * (number % 2)
        top = height * (number // 2)
        sheet.paste(draw_panel(panel, x, width, height), (left, top))
    sheet.save(path)


def draw_panel(panel: Panel, x: str, width: int, height: int) -> Image.Image:
    """One diagram: curves from 0 up, axes with numbers, a legend with the last values."""
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    title = wrap(panel.title, width - 16)
    columns = 2                                        # of the legend
    top = LINE * (len(title) + math.ceil(len(panel.names) / columns)) + 14
    left = 56
    right = width - 16
    bottom = height - 36
    highest = 1e-9
    for row in panel.rows:
        numbers = [row[name] for name in panel.names if name in row]
        highest = max([highest, *filter(math.isfinite, numbers)])
    start = panel.rows[0][x]
    span = max(panel.rows[-1][x] - start, 1e-9)
    canvas.text((8, 2), "\n".join(title), "black", FONT, spacing=LINE - 11)
    for share in (0.0, 0.5, 1.0):
        down = bottom - (bottom - top) * share
        across = left + (right - left) * share
        number = f"{share * highest:.3g}"
        canvas.line([(left, down), (right, down)], fill="lightgray")
        canvas.text((left - 6 - LETTER * len(number), down - 6), number, "black", FONT)
        number = f"{start + share * span:g}"
        canvas.text((across - LETTER * len(number) / 2, bottom + 4), number, "black", FONT)
    canvas.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    canvas.text(((left + right - LETTER * len(x)) / 2, height - 16), x, "black", FONT)
    for number, name in enumerate(panel.names):
        colour = COLOURS[number % len(COLOURS)]
        points = []
        for row in panel.rows:
            if name in row and math.isfinite(row[name]):
                points.append((left + (right - left) * (row[x] - start) / span,
                               bottom - (bottom - top) * row[name] / highest))
                latest = row[name]
        if not points:
            continue
        canvas.line(points, fill=colour, width=2)
        canvas.circle(points[-1], 2, fill=colour)      # a single point would have no line
        place = (8 + number % columns * (width // columns),
                 LINE * (len(title) + number // columns) + 6)
        canvas.text(place, f"{name} {latest:.3g}", colour, FONT)
    return image


# ---- The report ---------------------------------------------------------------------------------

def summarise(predictions: list[dict], resamplings: int = 0) -> dict[str, dict[str, list[float]]]:
    """{kind: {metric: [average]}}; with resamplings, [average, low, high] of a 95 % interval.

    The interval holds 95 % of the averages of samples drawn anew (bootstrap). The draws are the
    same each time. A metric of ranks called "median" is averaged so.
    """
    values = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        for name, value in prediction["metrics"].items():
            values[prediction["kind"]][name].append(value)
    table = {}
    for kind, metrics in values.items():
        table[kind] = {}
        for name, samples in metrics.items():
            average = np.median if name.startswith("median") else np.mean
            samples = np.array(samples)
            rng = torch.Generator().manual_seed(0)
            averages = []
            for _ in range(resamplings):
                chosen = torch.randint(len(samples), samples.shape, generator=rng)
                averages.append(average(samples[chosen.numpy()]))
            interval = np.quantile(averages, [0.025, 0.975]).tolist() if averages else []
            table[kind][name] = [float(average(samples)), *interval]
    return table


def report(result: dict, config: EvalConfig, sizes: Config) -> dict[str, float]:
    """Prints how samples were scored, a table by kind, and what is lacking.

    Returns {kind: average of its first metric}. sizes: the model's.
    """
    heading = f"\n{config.task} on {', '.join(map(str, config.data))}; {sizes.frames} frames"
    if config.rerank >= ALL_PAIRS:
        heading += "; VTM ranks all pairs"
    elif config.rerank:
        heading += f"; --rerank {config.rerank}"
    for name in ("order", "views", "resize"):
        if getattr(config, name) != getattr(EvalConfig, name):
            heading += f"; --{name} {getattr(config, name)}"
    print_main(heading)
    table = summarise(result["predictions"], config.bootstrap)
    samples = Counter(prediction["kind"] for prediction in result["predictions"])
    rows = []
    for kind, metrics in table.items():
        row = {"kind": kind}
        for name, values in metrics.items():
            row[name] = f"{values[0]:.1f}"
            if config.bootstrap:
                row[name] += f" [{values[1]:.1f}, {values[2]:.1f}]"
        row["samples"] = samples[kind]
        rows.append(row)
    for line in table_lines(rows):
        print_main(line)
    unreadable = result["unreadable"]
    if unreadable:
        print_main(f"INCOMPLETE: {len(unreadable)} of {result['samples']} samples are unreadable "
                   "(python data.py check MANIFEST writes a manifest without them):",
                   *unreadable, sep="\n  ")
    return {kind: next(iter(metrics.values()))[0] for kind, metrics in table.items()}


# ---- What it costs (Tab. 1, Tab. 14, Fig. 1c, Fig. 3) --------------------------------------------

def count_parameters(model: AllInOne, heads: bool = True) -> int:
    """Parameters, with all objective heads or, as Tab. 1 counts, without MLM's and VTC's."""
    left_out = () if heads else ("mlm_head.", "text_proj.", "video_proj.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(left_out))


def count_macs(config: Config) -> dict[str, float]:
    """Multiply-adds of a clip, by torch's FlopCounterMode on shapes alone (no weights, no data).

    Returns {"joint", "attention", "video", "text"}: the three passes at full text length, and the
    part of the joint pass in products of queries, keys and values, which Sec. 3.2 compares.
    """
    with torch.device("meta"):
        model = AllInOne(config).eval()
        video = torch.zeros(1, config.frames, 3, config.image_size, config.image_size,
                            dtype=torch.uint8)
        ids = torch.zeros(1, config.max_text_len, dtype=torch.int64)
    joint = count_flops(lambda: model(video, ids))
    attention_flops = sum(flops for operation, flops in joint.items()
                          if "bmm" in operation or "attention" in operation)
    video_flops = count_flops(lambda: model.encode_video(video))
    text_flops = count_flops(lambda: model.encode_text(ids))
    return {"joint": sum(joint.values()) / 2, "attention": attention_flops / 2,
            "video": sum(video_flops.values()) / 2, "text": sum(text_flops.values()) / 2}


@torch.no_grad()
def count_flops(run: Callable) -> dict[str, float]:
    """{operation: FLOPs} of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return {str(operation): flops for operation, flops in counts.items()}


def made_up_inputs(config: Config, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """Random videos (B, S, 3, H, W) uint8 and texts (B, m) of full length."""
    size = config.image_size
    video = torch.randint(256, (batch, config.frames, 3, size, size), device=device).byte()
    ids = torch.randint(config.vocab_size, (batch, config.max_text_len), device=device)
    return video, ids


def time_call(run: Callable[[], Tensor], device: torch.device, at_least: float = 2.0) -> float:
    """Seconds of a call, on average over so many seconds, after one call that warms up."""
    def call():
        with torch.no_grad(), half_precision(device):
            run().sum().item()                         # .item() waits for the device
    call()
    calls = 1 + int(at_least / timeit.timeit(call, number=1))
    return timeit.timeit(call, number=calls) / calls


def measure_throughput(config: Config, device: torch.device, batch: int) -> float:
    """Clips a second through the joint pass with full-length text, in evaluation mode (Tab. 1)."""
    model = AllInOne(config).to(device).eval()
    video, ids = made_up_inputs(config, device, batch)
    return batch / time_call(lambda: model(video, ids).pooled, device)


def profile(sizes: dict, batch: int, device: torch.device) -> None:
    """--task profile: costs of each variant (Tab. 1), of each exchange (Tab. 8a, 9), of retrieval.

    sizes: fields of Config that differ from its defaults. batch: clips of a joint pass.
    """
    rows = []
    for name, config in profiled_configs(sizes).items():
        print_main(f"measuring {name}")                # which takes minutes on a CPU
        with torch.device("meta"):
            model = AllInOne(config)
        row = {"model": name, "params M": count_parameters(model, heads=False) / 1e6,
               "all heads M": count_parameters(model) / 1e6}
        for part, macs in count_macs(config).items():
            row[f"{part} G"] = macs / 1e9
        row["clips/s"] = measure_throughput(config, device, batch)
        rows.append(row)
    print_main("measuring retrieval and search")
    tables = [
        ("Parameters without MLM's and VTC's heads (Tab. 1) and all; 1e9 multiply-adds of a clip;\n"
         f"joint passes in batches of {batch} on {device.type}", rows, 1),
        ("Retrieval with B, one query (Tab. 14; the paper's on 8 A100 and 88 cores of Xeon 8255C)",
         retrieval_times(Config(**sizes), device), 2),
        ("Search by cosine in made-up features on the CPU, against joint passes with all clips",
         search_times(Config(**sizes), device), 1)]
    for title, rows, digits in tables:
        print_main(f"\n{title}\n", *table_lines(rows, digits), sep="\n")


def profiled_configs(sizes: dict) -> dict[str, Config]:
    """The models of --task profile: each variant, then B with each other exchange of frames."""
    configs = {name: Config(**{**sizes, **fields}) for name, fields in VARIANTS.items()}
    for temporal in typing.get_args(Temporal)[1:]:
        configs[f"B {temporal}"] = Config(**{**sizes, "temporal": temporal})
    return configs


def retrieval_times(config: Config, device: torch.device) -> list[dict]:
    """Rows of Tab. 14: milliseconds to encode a clip and a text (batch of one) and to rank."""
    model = AllInOne(config).to(device).eval()
    video, ids = made_up_inputs(config, device, 1)
    seconds = {"encode a clip": time_call(lambda: video_embedding(model, video), device),
               "encode a text": time_call(lambda: text_embedding(model, ids), device),
               "rank 1,000 clips": ranking_seconds(1000, 1),
               "rank 1,000,000 clips": ranking_seconds(1_000_000, 1)}
    return [{"step": step, "ms": 1000 * seconds[step], "paper ms": paper}
            for step, paper in zip(seconds, (33.16, 12.05, 1.51, 143.25))]


def ranking_seconds(clips: int, queries: int) -> float:
    """Seconds to find the ten clips nearest to each query, the best of three, on the CPU."""
    gallery = torch.randn(clips, Config.vtc_dim)
    text = torch.randn(queries, Config.vtc_dim)
    return min(timeit.repeat(lambda: (text @ gallery.T).topk(10), number=1, repeat=3))


def search_times(config: Config, device: torch.device) -> list[dict]:
    """A row for each size of an index: its memory, how fast it answers, what VTM would take."""
    joint_passes = measure_throughput(config, device, 1)                   # a second
    rows = []
    for clips in (10_000, 100_000, 1_000_000):
        gallery = torch.randn(clips, Config.vtc_dim)
        reading = min(timeit.repeat(gallery.sum, number=1, repeat=3))
        single = ranking_seconds(clips, 1)
        many = ranking_seconds(clips, 64)
        rows.append({"clips": clips, "index MB": clips * Config.vtc_dim * 2 / 1e6,
                     "ms a query": 1000 * single, "% of bandwidth": 100 * reading / single,
                     "queries/s in 64": 64 / many,
                     "hours of joint passes": clips / joint_passes / 3600})
    return rows


# ---- Command line -------------------------------------------------------------------------------

SCORED = tuple(MANIFEST_TASKS)
ON_VIDEOS = (*VIDEO_TASKS, "search")

# The tasks that a flag is for. --task and --batch are for all, profile among them.
USED_BY = {"checkpoint": SCORED + ON_VIDEOS, "json": SCORED + ON_VIDEOS,
           "workers": SCORED + ON_VIDEOS, "order": SCORED + ON_VIDEOS,
           "resize": SCORED + ON_VIDEOS, "boxes": SCORED + ON_VIDEOS,
           "columns": SCORED + ON_VIDEOS, "vocab": SCORED + ON_VIDEOS,
           "data": SCORED, "views": SCORED, "bootstrap": SCORED, "objectives": ("pretrain",),
           "video": ON_VIDEOS, "text": ON_VIDEOS, "window": ON_VIDEOS, "out": ON_VIDEOS,
           "blind": ("fill",), "block": ("explain",), "baseline": ("attention",),
           "rerank": ("retrieval", "search"), "index": ("search",), "top": ("search",)}


def check_flags(config: EvalConfig) -> None:
    """ValueError if flags do not go together."""
    task = config.task
    tasks = (*SCORED, *ON_VIDEOS, "profile")
    if task not in tasks:
        raise ValueError(f"--task {task}: expected one of {', '.join(tasks)}")
    for name, users in USED_BY.items():
        if getattr(config, name) != getattr(EvalConfig, name) and task not in users:
            raise ValueError(f"--{name} is for --task {', '.join(users)}, not for {task}")
    if task in ON_VIDEOS and not config.video:
        raise ValueError(f"--task {task} needs --video FILE or FOLDER")
    if task in SCORED and not config.data:
        raise ValueError(f"--task {task} needs --data MANIFEST")
    if task in ON_VIDEOS and task != "attention" and not any(config.text):
        raise ValueError(f"--task {task} needs --text")
    if task == "fill" and "[MASK]" not in config.text[0]:
        raise ValueError("--task fill needs a [MASK] in --text")
    if len(config.text) > 1 and task not in ("match", "search"):
        raise ValueError("several --text are for --task match and search")
    if min(config.batch, config.views, config.top) < 1:
        raise ValueError("--batch, --views and --top must be 1 or more")
    if min(config.rerank, config.bootstrap, config.window, config.workers) < 0:
        raise ValueError("--rerank, --bootstrap, --window and --workers must be 0 or more")


def run_of(task: str) -> str:
    """The task of train.py whose checkpoint a task of eval.py needs."""
    runs = {"qa": "qa", "ask": "qa", "probe": "probe", "retrieval": "retrieval",
            "search": "retrieval"}
    return runs.get(task, "pretrain")


def open_checkpoint(path: Path, task: str) -> dict:
    """What read_weights reads; ValueError for a missing file names the run that makes it."""
    if path.exists():
        return read_weights(path)
    run = path.parent.name
    if run not in ("pretrain", *MANIFEST_TASKS):
        run = run_of(task)
    command = f"python train.py --task {run}"
    if run != "pretrain":
        command = f"python train.py --task pretrain && {command}"
    raise ValueError(f"{path}: no such file; use --checkpoint FILE, or make the toy set's "
                     f"runs/{run}/checkpoint.pt: {command}")


def check_checkpoint(content: dict, config: EvalConfig, path: Path) -> None:
    """ValueError if the weights were not trained for the task: their scores would mean nothing."""
    task = config.task
    trained = content.get("config", {})
    needed = {"qa": "qa", "ask": "qa", "probe": "probe"}.get(task)
    if needed and trained.get("task") != needed:
        raise ValueError(f"{path} was trained for {trained.get('task', 'another task')}: fine-tune "
                         f"it with train.py --task {needed} --init {path}")
    matching = task in ("choice", "match") or config.rerank > 0
    if task == "retrieval" and not has_vtc(content):
        matching = True                                # VTM ranks all pairs
    if matching and trained and not {"vtm", "rank", "choice"} & set(trained["objectives"]):
        raise ValueError(f"{path} was not trained to match (its objectives: "
                         f"{' '.join(trained['objectives'])}): use a checkpoint of --objectives "
                         "vtm, rank or choice")
    if task == "search" and not has_vtc(content):
        raise ValueError(f"{path} was not trained with VTC, its cosines mean nothing: fine-tune it "
                         "with train.py --task retrieval")


def has_vtc(content: dict) -> bool:
    """Whether a checkpoint was trained with VTC; of the authors' files, those with projections."""
    if "config" in content:
        return "vtc" in content["config"].get("objectives", ())
    return any("txt_proj" in name for name in content.get("state_dict", content))


def check_model(config: EvalConfig, sizes: Config) -> None:
    """ValueError if maps cannot be drawn of this model."""
    if config.task in ("explain", "attention") and sizes.roll_select == "random":
        raise ValueError(f"--task {config.task}: patches that roll at random cannot be put back")
    if not 0 <= config.block <= sizes.depth:
        raise ValueError(f"--block {config.block}: the model has blocks 1 to {sizes.depth}")


def run_task(config: EvalConfig, flags: dict, device: torch.device) -> list[dict]:
    """Loads the checkpoint and does config.task; returns a result for each sample.

    flags: what the command line says, which stands above what the checkpoint says.
    """
    path = Path(config.checkpoint or f"runs/{run_of(config.task)}/checkpoint.pt")
    content = open_checkpoint(path, config.task)
    check_checkpoint(content, config, path)
    for name in ("resize", "boxes", "objectives"):     # as in training
        trained = content.get("config", {})
        if name in trained and name not in flags:
            config = replace(config, **{name: trained[name]})
    sizes = {name: flags[name] for name in MODEL_FLAGS if name in flags}
    model, tokenizer, answers = load_checkpoint(content, path, config.vocab, **sizes)
    check_model(config, model.config)
    if config.task == "retrieval" and not has_vtc(content):
        print_main("not trained with VTC: VTM ranks all pairs")
        config = replace(config, rerank=ALL_PAIRS)
    if config.task in MANIFEST_TASKS:
        manifest = Manifest(config.data, config.columns)
        texts = []
        for i in range(min(100, len(manifest))):       # enough to notice another vocabulary
            texts += texts_of(manifest[i])
        warn_of_unknown_words(tokenizer, texts)
        result = evaluate(model, tokenizer, config, device, answers)
        report(result, config, model.config)
        return result["predictions"]
    results = run_on_videos(model, tokenizer, config, answers, device)
    if config.task == "attention":
        profiles = {str(path): mean_blocks(results)}
        if config.baseline:
            profiles[config.baseline] = mean_blocks(attention_of_baseline(config, device))
        show_attention(profiles, config.out)
    return results


def attention_of_baseline(config: EvalConfig, device: torch.device) -> list[dict]:
    """The results of --task attention with --baseline, whose model is as its file says."""
    path = Path(config.baseline)
    content = open_checkpoint(path, config.task)
    model, tokenizer, _ = load_checkpoint(content, path, config.vocab)
    check_model(config, model.config)
    return run_on_videos(model, tokenizer, config, None, device)


def write_json(path: str, results: list[dict]) -> None:
    """A line of JSON for each result."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    with replacing(path) as file:
        file.write("".join(lines).encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Score All-in-one, use it on any video, or measure what it costs.",
        usage="python eval.py --task TASK [--FLAG VALUE ...]", allow_abbrev=False)
    add_flags(parser.add_argument_group("what to do"), EvalConfig)
    add_flags(parser.add_argument_group("the model, by default as in its checkpoint"), Config,
              MODEL_FLAGS)
    flags = given_flags(parser, argv)
    config = EvalConfig(**{name: flags[name] for name in flags if name not in MODEL_FLAGS})
    with joined_processes() as device:
        check_flags(config)
        if config.task == "profile":
            sizes = {name: flags[name] for name in MODEL_FLAGS if name in flags}
            return profile(sizes, config.batch, device)
        results = run_task(config, flags, device)
        if config.json and is_main():
            write_json(config.json, results)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
