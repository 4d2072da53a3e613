"""Whether cost_model.py is right about several processes on one machine.

python benchmarks/processes.py: rates are taken from one and two processes at one shape (d=256, F=4,096). Then a larger
shape (d=512, F=8,192) is counted by one, two and four processes of one thread each, with the whole model in each and
with its blocks spread. Of each launch are printed: µs of CPU per token and process, tokens per second of all by the
clock, MB that a process sends in a pass and at the end, and MB that it holds more than at the small shape; in brackets
what the model says. The time of the CPU is also right on a machine that does other things.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cost_model import Job, Machine, end_bytes, memory, pass_bytes, rate, token_seconds

ROWS, CONTEXT, VOCABULARY, BLOCKS = 8, 128, 8192, 4
SMALL = Job(256, BLOCKS, 3, 4096, VOCABULARY, l0=0, batch=ROWS * CONTEXT, tokens=0)
LARGE = Job(512, BLOCKS, 3, 8192, VOCABULARY, l0=0, batch=ROWS * CONTEXT, tokens=0)
BATCHES = 16


def prepare(folder: Path, job: Job) -> None:
    """A model, an SAE of which 1% of the latents are active, and text of documents of one row each."""
    import numpy as np
    import torch
    from neox import CPU, hook_behind, hugging_face, sparse_autoencoder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shapes = replace(
        CPU,
        d_model=job.d,
        layers=BLOCKS,
        tapped=job.tapped,
        vocabulary=VOCABULARY,
        d_sae=job.features,
        heads=4,
        context=CONTEXT,
        rows=ROWS,
        active=0.01,
    )
    model = hugging_face(shapes)
    model.save_pretrained(folder / "model")
    sparse_autoencoder("relu", model, shapes, hook_behind(job.tapped)).save_model(folder / "sae")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", unk_token="w1").save_pretrained(
        folder / "model"
    )
    draw = np.random.default_rng(0)
    lines = (
        json.dumps({"text": " ".join(f"w{i}" for i in draw.integers(2, VOCABULARY, CONTEXT - 1))})
        for _ in range(4 * ROWS * BATCHES)
    )
    (folder / "text.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)


def work(folder: Path, spread: bool) -> None:
    """The work of one process of a launch; prints its figures."""
    import psutil
    import torch

    from tl_capacity.measure.distributed import share
    from tl_capacity.measure.job import attached
    from tl_capacity.measure.settings import MeasureSettings
    from tl_capacity.runtime.processes import Processes

    torch.set_num_threads(1)
    this = psutil.Process()
    processes = Processes.of_launch().connected("cpu")
    settings = MeasureSettings(
        model=str(folder / "model"),
        saes=(str(folder / "sae"),),
        source=str(folder / "text.jsonl"),
        tokens=BATCHES * ROWS * CONTEXT * processes.count,
        context=CONTEXT,
        batch_rows=ROWS,
        out=folder / "out",
        device="cpu",
        max_fvu=float("inf"),
        fvu_every=1_000_000,
        progress=False,
        shard_model=spread,
    )
    before = this.memory_full_info().uss
    with attached(share(settings, processes)) as (capacity, stream):
        capacity.run(stream, ROWS * CONTEXT, progress=False)  # the first batch allocates and checks
        processes.wait()
        tokens, sent, cpu, wall = (
            capacity.n_tokens,
            this.io_counters().write_chars,
            time.process_time(),
            time.perf_counter(),
        )
        capacity.run(stream, (BATCHES - 4) * ROWS * CONTEXT, progress=False)
        tokens = capacity.n_tokens - tokens
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        passes = tokens / (ROWS * (CONTEXT - 1))
        in_passes = (this.io_counters().write_chars - sent) / passes
        sums = capacity.sums()[0]
        held = this.memory_full_info().uss - before
        l0 = float(sums["counts"].sum() / sums["tokens"].sum())
        processes.wait()
        sent = this.io_counters().write_chars
        for name, array in sums.items():
            if name != "decoder_norm":
                processes.sum(torch.from_numpy(array.copy()))
        at_end = this.io_counters().write_chars - sent
    # Weights that several processes have mapped from one file are nobody's own; they count all the same.
    mapped = (
        0 if processes.count == 1 else sum(p.nbytes for p in capacity.model.parameters() if not hasattr(p, "to_local"))
    )
    figures = {"cpu": cpu / tokens, "wall": wall / tokens, "l0": l0, "pass": in_passes, "end": at_end}
    figures |= {"held": held + mapped, "rank": processes.index}
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def launch(folder: Path, count: int, spread: bool = False) -> dict[str, float]:
    """The means over the processes of a launch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*(torchrun if count > 1 else [sys.executable]), __file__, "work", str(folder), str(int(spread))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) != count:
        raise RuntimeError(done.stderr[-2000:])
    return {name: sum(each[name] for each in found) / count for name in found[0]}


def gemm_flops(job: Job) -> float:
    """Operations per second of a core in the encoder's product."""
    import torch

    torch.set_num_threads(1)
    x, weight = torch.randn(job.batch, job.d), torch.randn(job.d, job.features)
    torch.mm(x, weight)
    started = time.process_time()
    for _ in range(8):
        torch.mm(x, weight)
    return 8 * 2 * job.batch * job.d * job.features / (time.process_time() - started)


def calibrated(alone: Mapping[str, float], two: Mapping[str, float], spread: Mapping[str, float]) -> Machine:
    """A machine with the rates of the small shape: the matrix products alone, what remains for the active latents, and
    the bytes sent if blocks are spread.
    """
    flops = gemm_flops(SMALL)
    bare = Machine(flops, flops)
    sent = pass_bytes(replace(SMALL, spread=True), 2) / SMALL.batch
    return replace(
        bare,
        entry_seconds=(alone["cpu"] - token_seconds(SMALL, bare)) / alone["l0"],
        send_bytes=sent / (spread["cpu"] - two["cpu"]),
        parallel=os.cpu_count(),
    )


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as place:
        small, large = Path(place) / "small", Path(place) / "large"
        prepare(small, SMALL)
        prepare(large, LARGE)
        before = {(1, False): launch(small, 1), (2, False): launch(small, 2), (2, True): launch(small, 2, spread=True)}
        machine = calibrated(*before.values())
        print(f"rates of the small shape: {machine}")
        for count, spread in ((1, False), (2, False), (4, False), (2, True), (4, True)):
            beside = before[min(count, 2), spread]
            report(launch(large, count, spread), beside, spread, machine, count)


def report(found: Mapping[str, float], small: Mapping[str, float], spread: bool, machine: Machine, count: int) -> None:
    """One row of the table: the measured figures, and in brackets the model's."""
    of_small, of_large = (replace(job, l0=found["l0"], spread=spread) for job in (SMALL, LARGE))
    cells = [
        (found["cpu"] * 1e6, min(count, machine.parallel or count) / rate(of_large, machine, count) * 1e6),
        (count / found["wall"], rate(of_large, machine, count)),
        (found["pass"] / 1e6, pass_bytes(of_large, count) / 1e6),
        (found["end"] / 1e6, end_bytes(of_large, count) / 1e6),
        ((found["held"] - small["held"]) / 1e6, (memory(of_large, count) - memory(of_small, min(count, 2))) / 1e6),
    ]
    shown = " | ".join(f"{measured:,.1f} ({said:,.1f})" for measured, said in cells)
    print(f"| {'spread' if spread else 'whole'} | {count} | {shown} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        main()
