"""What measuring on many processes costs: tokens per second, bytes moved and memory per process, in closed form.

python benchmarks/cost_model.py prints the extrapolation of docs/results/many-machines.md. benchmarks/processes.py
checks the same functions against processes of one machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GROUPS = 64
"""Document groups for which sums are kept."""
SUM_BYTES = 8
"""Bytes of a count or a moment."""


@dataclass(frozen=True)
class Job:
    """The model, SAEs and text to measure.

    Attributes:
        d: d_model.
        blocks, tapped: blocks of the model, and those that run until the last hook point.
        features: F, latents of the SAE.
        vocabulary: V.
        l0: active latents per token.
        batch: tokens of a forward pass.
        tokens: to count, over all processes.
        weight_bytes: of one weight of the model.
        untied: whether embedding and head are two matrices.
        heads: how often a token meets the head of d × V weights: never where features are counted, once for each
            variant that is spliced, three times where gradients are taken.
        spread: whether the blocks are spread over the processes.
        text_bytes: of a token in its file.
    """

    d: int
    blocks: int
    tapped: int
    features: int
    vocabulary: int
    l0: float
    batch: int
    tokens: float
    weight_bytes: int = 4
    untied: bool = True
    heads: float = 0
    spread: bool = False
    text_bytes: float = 4.5


@dataclass(frozen=True)
class Machine:
    """What a process computes and transfers in a second.

    Attributes:
        model_flops, encoder_flops: in the forward pass, and in the SAE's product.
        latent_bytes: read or written by reductions over latents.
        passes: how often reductions read or write each dense latent; 0 where only active ones are looked at.
        entry_seconds: for each active latent.
        send_bytes: to other processes.
        read_bytes: of text, read and parsed.
        token_rate: tokenized.
        start: seconds until the first batch.
        parallel: processes that run at once; None for all.
    """

    model_flops: float
    encoder_flops: float
    latent_bytes: float = float("inf")
    passes: int = 0
    entry_seconds: float = 0.0
    send_bytes: float = float("inf")
    read_bytes: float = float("inf")
    token_rate: float = float("inf")
    start: float = 0.0
    parallel: int | None = None


def block_weights(job: Job) -> int:
    """Weights of one block: four d × d matrices of attention, and two of d × 4d."""
    return 12 * job.d**2


def token_seconds(job: Job, machine: Machine) -> float:
    """The time that one token takes in one process: 2 operations for each weight that it meets, F·d products of the
    encoder, and the reductions.
    """
    met = job.tapped * block_weights(job) + job.heads * job.d * job.vocabulary
    forward = 2 * met / machine.model_flops
    encoder = 2 * job.d * job.features / machine.encoder_flops
    reductions = machine.passes * 4 * job.features / machine.latent_bytes + machine.entry_seconds * job.l0
    return forward + encoder + reductions


def sums_bytes(job: Job) -> int:
    """Bytes of the sums of one SAE: counts, Σz and Σz² of each group and feature, documents of each feature, and for
    each group a mean over d and five numbers. The decoder's norms are not sent.
    """
    of_features = 3 * GROUPS * job.features + job.features
    return SUM_BYTES * (of_features + GROUPS * (job.d + 5) + 3 + 2)


def end_bytes(job: Job, processes: int) -> float:
    """Bytes that a process sends in the all-reduce at the end. In a ring, each sum is sent 2(n − 1)/n times."""
    return 2 * (processes - 1) / processes * sums_bytes(job)


def pass_bytes(job: Job, processes: int) -> float:
    """Bytes that a process receives in each forward pass if blocks are spread: the other processes' parts of every
    block that runs.
    """
    held = job.tapped * block_weights(job) * job.weight_bytes
    return held * (processes - 1) / processes if job.spread else 0.0


def memory(job: Job, processes: int) -> float:
    """Bytes of a process: weights, the SAE, its sums and their copy at a checkpoint. Activations, and the block of
    dense latents, are not included.
    """
    blocks = job.blocks * block_weights(job) * job.weight_bytes
    embedding = (1 + job.untied) * job.vocabulary * job.d * job.weight_bytes
    held = blocks / processes + blocks / job.blocks if job.spread else blocks
    sae = 4 * job.features * (2 * job.d + 1)
    return held + embedding + sae + 2 * sums_bytes(job)


def text_seconds(job: Job, machine: Machine, processes: int) -> float:
    """Seconds of reading: every process parses the whole text and tokenizes its share."""
    return job.tokens * job.text_bytes / machine.read_bytes + job.tokens / processes / machine.token_rate


def rate(job: Job, machine: Machine, processes: int) -> float:
    """Tokens per second over all processes while they count. Text is read at the same time if there is a device."""
    at_once = min(processes, machine.parallel or processes)
    seconds = token_seconds(job, machine) + pass_bytes(job, processes) / machine.send_bytes / job.batch
    return at_once / seconds


def seconds(job: Job, machine: Machine, processes: int) -> float:
    """Seconds of the whole measurement: the start, counting and reading one after the other, and the sums
    at the end.
    """
    counting = job.tokens / rate(job, machine, processes)
    return (
        machine.start
        + counting
        + text_seconds(job, machine, processes)
        + end_bytes(job, processes) / machine.send_bytes
    )


GEMMA = Job(2304, 26, 21, 65_536, 256_128, l0=70, batch=16_384, tokens=1e9, weight_bytes=2, untied=False)
"""A model of the shape of Gemma 2 2B, tapped after block 20."""
H100 = Machine(
    model_flops=4e14,
    encoder_flops=4e13,
    latent_bytes=2e12,
    passes=6,
    send_bytes=2e10,
    read_bytes=1.5e8,
    token_rate=4e5,
    start=60,
)
"""Assumed, not measured. docs/results/many-machines.md names each number."""


def main() -> None:
    """Print the extrapolation as rows of a table."""
    for label, job in (("each has the model", GEMMA), ("blocks are spread", replace(GEMMA, spread=True))):
        for processes in (1, 8, 64):
            print(
                f"| {label} | {processes} | {rate(job, H100, processes):,.0f} | {seconds(job, H100, processes):,.0f} |"
                f" {text_seconds(job, H100, processes):,.0f} | {pass_bytes(job, processes) / 1e9:.2f} |"
                f" {end_bytes(job, processes) / 1e6:,.0f} | {memory(job, processes) / 1e9:.2f} |"
            )


if __name__ == "__main__":
    main()
