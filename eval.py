"""Scores All-in-one on any manifest of multiple-choice questions (Tab. 4, 8 to 11), and its cost.

    python eval.py --task choice --data MANIFEST --checkpoint runs/pretrain/checkpoint.pt
    python eval.py --task profile

A checkpoint is ours (train.py's) or the authors' .ckpt. Unreadable clips are never replaced: they
are counted and named, and a score that lacks samples says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import typing

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allinone import (CHOICES, VARIANTS, AllInOne, Config, load_release, load_weights, mlm_loss,
                      read_weights, vtm_loss)
from data import Clips, Manifest, Tokenizer, collate, load

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

def add_flags(parser: argparse.ArgumentParser, cls: type, choices: dict) -> None:
    """One flag for each field of the dataclass `cls`; flags not given leave no trace.

    choices: the words that a field may say, where they are few.
    """
    group = parser.add_argument_group(cls.__name__, cls.__doc__.strip().splitlines()[0])
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default = types[field.name], field.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        options = dict(default=argparse.SUPPRESS, help=f"default: {shown}")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            options |= dict(type=kind, metavar=kind.__name__.upper())
            if allowed := choices.get(field.name):
                options = {**options, "choices": tuple(allowed), "metavar": None}
        else:                                                   # tuple of words
            options |= dict(nargs="+", metavar="WORD")
        group.add_argument(f"--{field.name}", **options)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """What the user gave, lists as tuples."""
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


# ---- Checkpoints --------------------------------------------------------------------------------

def load_model(path, vocab: str = "bert-base-uncased", say=print,
               **overrides) -> tuple[AllInOne, Tokenizer, dict]:
    """(model, its tokenizer, what else the file holds) of our checkpoint or the authors' .ckpt.

    vocab: for the authors' file, which carries no tokenizer. overrides: fields of Config, e.g.
    frames=8 for Tab. 12; tables of positions are fitted. Raises ValueError for other files.
    """
    content = read_weights(path)
    if "sizes" in content:
        config = dataclasses.replace(Config(**content["sizes"]), **overrides)
        model = AllInOne(config)
        report = load_weights(model, content.pop("model"), str(path))
        tokenizer = Tokenizer.from_json(content["tokenizer"])
    else:
        model, report = load_release(path, **overrides)
        tokenizer, content = Tokenizer.load(vocab), {}
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"{vocab} has {len(tokenizer)} words, not {model.config.vocab_size}: "
                             "give --vocab the vocabulary it was trained with (bert-base-uncased)")
    say(f"{path}: {len(report['loaded'])} tensors loaded" + "".join(
        f"; {len(report[key])} {key} ({', '.join(report[key][:4])})"
        for key in ("resized", "initialised", "ignored") if report[key]))
    return model, tokenizer, content


# ---- Scoring ------------------------------------------------------------------------------------

def score_options(model: AllInOne, batch: dict) -> Tensor:
    """Matched logit of the VTM head for each candidate (Sec. 4.2.1, 4.2.3): (B, O), -inf if absent.

    batch: video (B, S, 3, H, W), text_ids and text_mask (B, O, m), option_mask (B, O).
    """
    B, O = batch["option_mask"].shape
    video = model.embed_video(batch["video"]).repeat_interleave(O, 0)     # (B*O, S, 1+n, D)
    text = model.embed_text(batch["text_ids"].flatten(0, 1))              # (B*O, m, D)
    mask = batch["text_mask"].flatten(0, 1).clone()
    mask[:, 0] = True                                    # an absent option still needs one key
    matched = model.vtm_head(model.fuse(video, text, mask).pooled)[:, 1]
    return matched.float().view(B, O).masked_fill(~batch["option_mask"], -torch.inf)


@torch.no_grad()
def evaluate(model: AllInOne, tokenizer: Tokenizer, data, device: torch.device,
             batch: int = 32, workers: int = 2) -> dict:
    """Multiple choice (Sec. 4.2.3): scores every sample of the manifests once, on any world size.

    Returns {"samples": N, "unreadable": [...], "predictions": [{index, where, kind, ...}]}.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    manifest, c = Manifest(data), model.config
    clips = Clips(manifest, tokenizer, "choice", c.frames, c.image_size, c.max_text_len,
                  train=False)
    mine = range(rank, len(clips), world)                  # no padding: nothing is scored twice
    keys = [list(mine[i:i + batch]) for i in range(0, len(mine), batch)]
    together = functools.partial(collate, tokenizer=tokenizer, max_text_len=c.max_text_len)
    model = model.to(device).eval()
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    predictions, unreadable = [], []
    for items in load(clips, keys, together, workers):
        unreadable += items["errors"]
        if not items["where"]:
            continue
        tensors = {k: v.to(device) for k, v in items.items() if isinstance(v, Tensor)}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            scores = score_options(model, tensors)
        for i, where in enumerate(items["where"]):
            options = int(items["option_mask"][i].sum())
            predictions.append({
                "index": int(items["index"][i]), "where": where, "label": int(items["label"][i]),
                "kind": items["kind"][i], "options": options,
                "scores": scores[i, :options].tolist()})
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (predictions, unreadable))
        predictions = [p for part in parts for p in part[0]]
        unreadable = [u for part in parts for u in part[1]]
    predictions.sort(key=lambda p: p["index"])
    return {"samples": len(clips), "unreadable": unreadable, "predictions": predictions}


def report(result: dict, data, say=print) -> dict:
    """Prints accuracy (Tab. 4) for each "kind" of sample beside chance; returns {kind: %}.

    A score that lacks samples is called incomplete and the unreadable ones are named.
    """
    kinds = {}
    for p in result["predictions"]:
        kinds.setdefault(p["kind"] or "all", []).append(p)
    say(f"\nmultiple choice on {', '.join(map(str, data))}")
    say(f"{'kind':<14}{'accuracy %':>12}{'chance %':>10}{'clips':>8}")
    accuracy = {}
    for kind, ps in kinds.items():
        right = [p["scores"].index(max(p["scores"])) == p["label"] for p in ps]
        chance = sum(1 / p["options"] for p in ps) / len(ps)
        accuracy[kind] = 100 * sum(right) / len(right)
        say(f"{kind:<14}{accuracy[kind]:>12.1f}{100 * chance:>10.1f}{len(ps):>8}")
    if result["unreadable"]:
        say(f"INCOMPLETE: {len(result['unreadable'])} of {result['samples']} samples unreadable:")
        for line in result["unreadable"]:
            say(f"  {line}")
    return accuracy


# ---- What it costs (Tab. 1, Fig. 1c, Fig. 3) -----------------------------------------------------

# bf16 without sparsity, from the data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where from): the data sheet's for known GPUs, else measured by a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if key in name:
                return peak, f"data sheet, {name}, bf16 without sparsity"
    a = torch.rand(1024, 1024, device=device)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 ** 3 / best, "measured here, float32 product of 1024 x 1024"


def count_parameters(model: AllInOne, heads: bool = True) -> int:
    """Parameters, with all objective heads or, as Tab. 1 counts, without MLM's and VTC's."""
    left_out = () if heads else ("mlm_head.", "text_proj.", "video_proj.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(left_out))


def count_macs(config: Config) -> dict[str, float]:
    """Multiply-adds of one clip, by torch's FlopCounterMode on shapes alone (no weights, no data).

    Returns {"joint", "video", "text", "attention"}: the three passes at full text length, and the
    part of the joint pass in products of queries, keys and values (what Sec. 3.2 compares).
    """
    with torch.device("meta"):
        model = AllInOne(config).eval()
        size = config.image_size
        video = torch.zeros(1, config.frames, 3, size, size, dtype=torch.uint8)
        ids = torch.zeros(1, config.max_text_len, dtype=torch.int64)
    passes = {"joint": lambda: model(video, ids), "video": lambda: model.encode_video(video),
              "text": lambda: model.encode_text(ids)}
    macs = {}
    for name, run in passes.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        macs[name] = counter.get_total_flops() / 2
        if name == "joint":
            by_kind = counter.get_flop_counts()["Global"]
            macs["attention"] = sum(flops for kind, flops in by_kind.items()
                                    if "bmm" in str(kind) or "attention" in str(kind)) / 2
    return macs


@torch.no_grad()
def measure_throughput(config: Config, device: torch.device, batch: int, seconds: float) -> float:
    """Clips a second through the joint pass with full-length text, in evaluation mode (Tab. 1)."""
    model = AllInOne(config).to(device).eval()
    size = config.image_size
    video = torch.randint(256, (batch, config.frames, 3, size, size), device=device).byte()
    ids = torch.randint(config.vocab_size, (batch, config.max_text_len), device=device)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    clips, start = 0, None
    while start is None or time.perf_counter() - start < seconds:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(video, ids).pooled.sum().item()              # .item() waits for the device
        if start is None:                                      # the first pass warms up
            start = time.perf_counter()
        else:
            clips += batch
    return clips / (time.perf_counter() - start)


TABLE_1 = {"Ti": (12, 745), "S": (33, 285), "B": (110, 89)}    # M parameters, videos/s (Tab. 1)


def profile(config: dict, device: torch.device, batch: int, seconds: float) -> None:
    """`--task profile`: what each variant costs, beside Tab. 1; then B's rows of Tab. 8a and 9."""
    base = Config(**config)
    print(f"Multiply-adds of one clip ({base.frames} frames of {base.image_size} px, "
          f"{base.max_text_len} text tokens); what the paper calls FLOPs\nare multiply-adds (about "
          "58 G for B in Fig. 1c). Tab. 1 counts parameters without the MLM and VTC heads\n"
          "(the release with MLM's: Ti 17.4, S 45.5, B 133.9 M).\n"
          f"Throughput: joint pass, batch {batch}, on {device.type} "
          f"({torch.get_num_threads()} threads).\n")
    columns = ("params M", "all heads", "joint G", "attention G", "video G", "text G", "clips/s",
               "paper M", "paper clips/s")
    print(" " * 16 + "".join(f"{name:>{len(name) + 2}}" for name in columns))
    rows = [(name, dict(VARIANTS[name])) for name in VARIANTS]
    rows += [(f"B {name}", dict(VARIANTS["B"], temporal=name)) for name in CHOICES["temporal"][1:]]
    for name, sizes in rows:
        c = Config(**{**config, **sizes})
        with torch.device("meta"):
            model = AllInOne(c)
        macs = {k: v / 1e9 for k, v in count_macs(c).items()}
        paper = TABLE_1.get(name, {"B timesformer": (180.5, "-"), "B decoupled": (192, "-")}.get(
            name, ("-", "-")))
        speed = measure_throughput(c, device, batch, seconds) if seconds else float("nan")
        cells = [count_parameters(model, heads=False) / 1e6, count_parameters(model) / 1e6,
                 macs["joint"], macs["attention"], macs["video"], macs["text"], speed, *paper]
        print(f"{name:<16}" + "".join(
            f"{cell if isinstance(cell, (str, int)) else format(cell, '.1f'):>{len(column) + 2}}"
            for cell, column in zip(cells, columns)))
    rolling, flat = (count_macs(Config(**{**config, **VARIANTS["B"], "temporal": name}))
                     for name in ("token_rolling", "flatten"))
    print(f"\nFlatten (Sec. 3.2): {flat['attention'] / rolling['attention']:.1f} times rolling's "
          f"attention products, {flat['joint'] / rolling['joint']:.2f} times its total: rolling "
          "pays for\nthe text once a frame, flatten once a clip.")


def training_batch(config: Config, batch: int, device: torch.device) -> dict:
    """A batch as data.collate makes it: random pixels and full-length text, 6 words masked."""
    B, m, size = batch, config.max_text_len, config.image_size
    ids = torch.randint(config.vocab_size, (B, m), device=device)
    where = torch.rand(B, m, device=device).topk(min(6, m)).indices
    where = (where + m * torch.arange(B, device=device)[:, None]).flatten()
    return {"video": torch.randint(256, (B, config.frames, 3, size, size), device=device).byte(),
            "text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool), "mlm_ids": ids,
            "mlm_where": where, "mlm_labels": ids.flatten()[where],
            "vtm_source": torch.arange(B, device=device).roll(1),
            "vtm_labels": torch.zeros(B, dtype=torch.int64, device=device)}


def plain_losses(model: AllInOne, batch: dict) -> dict:
    """VTM and MLM as written down at first: two joint passes over float clips, each of which embeds
    its video anew, and |V| logits at every position."""
    video = (batch["video"].float() / 255 - model.mean) / model.std
    logits = model.mlm_head(model(video, batch["mlm_ids"], batch["text_mask"]).text)
    labels = torch.full_like(batch["text_ids"], -100).flatten()
    labels[batch["mlm_where"]] = batch["mlm_labels"]
    pooled = model(video[batch["vtm_source"]], batch["text_ids"], batch["text_mask"]).pooled
    return {"mlm": mlm_loss(logits.flatten(0, 1), labels) / len(batch["mlm_labels"]),
            "vtm": vtm_loss(model.vtm_head(pooled), batch["vtm_labels"])}


def profile_training(config: Config, device: torch.device, batches: list[int], seconds: float,
                     compile: bool) -> None:
    """`--task profile --train`: a step of pre-training (VTM and MLM, forward, backward, AdamW).

    Prints clips/s, MFU, peak memory, and the ratio to the plain step: plain_losses and an AdamW of
    one small product after another. Both take turns on one batch; medians of elapsed time on a
    GPU. On a CPU, of CPU time (others may use its cores), of which MFU would mean nothing.
    """
    from train import Objectives, compiled     # train.py imports this file
    cuda, (peak, basis) = device.type == "cuda", peak_flops(device)
    half = cuda and torch.cuda.is_bf16_supported()
    clock = time.perf_counter if cuda else time.process_time
    print(f"Training step, VTM and MLM, {config.frames} frames of {config.image_size} px, "
          f"{config.max_text_len} text tokens, {'bf16' if half else 'float32'}"
          f"{', compiled' if compile else ''};\nMFU is of {peak / 1e12:.3g} TFLOP/s ({basis}).\n"
          f"{'batch':>6}{'clips/s':>10}{'MFU %':>8}{'memory GB':>11}{'plain clips/s':>15}"
          f"{'ratio':>7}")
    for size in batches:
        batch, words = training_batch(config, size, device), torch.tensor(6.0 * size, device=device)
        steps, flops = {}, 0
        for name in ("ours", "plain"):
            model = AllInOne(config).to(device).train()
            objectives = Objectives(model, ("vtm", "mlm"))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          fused=name == "ours", foreach=False)

            def step(model=model, objectives=objectives, optimizer=optimizer, name=name):
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    losses = (objectives(batch, words)[0] if name == "ours"
                              else plain_losses(model, batch))
                sum(losses.values()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if cuda:
                    torch.cuda.synchronize()

            if name == "ours":
                with FlopCounterMode(display=False) as counter:
                    step()
                flops = counter.get_total_flops()
                if compile:
                    model.transform = compiled(model.transform, device)
            step()                                             # warms up, compiles
            steps[name] = step
        times, memory = {name: [] for name in steps}, 0.0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times["plain"]) < 3:
            for name, step in steps.items():
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                start = clock()
                step()
                times[name].append(clock() - start)
                if cuda and name == "ours":
                    memory = torch.cuda.max_memory_allocated() / 1e9
        ours, plain = (sorted(t)[len(t) // 2] for t in times.values())
        mfu = 100 * flops / ours / peak if cuda else float("nan")
        print(f"{size:>6}{size / ours:>10.2f}{mfu:>8.1f}"
              f"{memory if cuda else float('nan'):>11.1f}{size / plain:>15.2f}"
              f"{plain / ours:>7.2f}", flush=True)


# ---- Command line -------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score or profile All-in-one.", allow_abbrev=False)
    parser.add_argument("--task", choices=("choice", "profile"), required=True)
    parser.add_argument("--data", nargs="+", metavar="MANIFEST", help="what to score")
    parser.add_argument("--checkpoint", help="train.py's checkpoint.pt, or the authors' .ckpt")
    parser.add_argument("--vocab", default="bert-base-uncased", help="for the authors' .ckpt")
    parser.add_argument("--batch", type=int, default=8, help="clips in one pass")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--seconds", type=float, default=3, help="profile: time for each variant")
    parser.add_argument("--train", action="store_true", help="profile: the training step")
    parser.add_argument("--batches", nargs="+", type=int, help="profile --train: clips a pass")
    parser.add_argument("--compile", action="store_true", help="profile --train: as train.py's")
    parser.add_argument("--variant", choices=VARIANTS, default="B", help="profile --train: sizes")
    add_flags(parser, Config, CHOICES)
    given = given_flags(parser, argv)
    args = argparse.Namespace(**{k: given.pop(k) for k in (
        "task", "data", "checkpoint", "vocab", "batch", "workers", "seconds", "train", "batches",
        "compile", "variant")})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.task == "profile" and args.train:
        profile_training(Config(**VARIANTS[args.variant], **given), device,
                         args.batches or [args.batch], args.seconds, args.compile)
        return
    if args.task == "profile":
        profile(given, device, args.batch, args.seconds)
        return
    if not args.data or not args.checkpoint:
        parser.error(f"--task {args.task} needs --data MANIFEST and --checkpoint FILE")
    model, tokenizer, _ = load_model(args.checkpoint, args.vocab, **given)
    report(evaluate(model, tokenizer, args.data, device, args.batch, args.workers), args.data)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
