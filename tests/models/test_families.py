"""Students of every family on tiny random configurations: they have the width asked for, run, and say what they cannot
be.
"""

from __future__ import annotations

import copy
import importlib
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CONFIGS, TOKENS, teacher
from tl_capacity.hooks.families import gpt_neox
from tl_capacity.hooks.families.scaling import head_size, key_value_heads, share_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
)

from tl_capacity.distillation import students
from tl_capacity.errors import CapacityError
from tl_capacity.models.head import check_head
from tl_capacity.plugins import plugins


@pytest.mark.parametrize("width", [8, 24, 32, 40])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.filterwarnings("ignore:the student of width 40 is wider than its teacher")
def test_students_of_every_family(family: str, width: int) -> None:
    of = teacher(family)
    student = students.new_student(of, width, seed=1)
    assert student.config.hidden_size == width
    assert student.config.num_hidden_layers == of.config.num_hidden_layers
    assert student.config.vocab_size == of.config.vocab_size
    logits = student(TOKENS).logits
    assert logits.shape == (2, 9, 50)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, student(TOKENS).logits), "dropout is off although the student trains"
    check_head(student, TOKENS)
    logits.sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    for size in ("intermediate_size", "n_inner", "ffn_dim", "word_embed_proj_dim"):
        if getattr(of.config, size, None):
            assert getattr(student.config, size) * of.config.hidden_size == getattr(of.config, size) * width


@pytest.mark.parametrize("family", CONFIGS)
def test_a_student_of_the_teachers_width_has_its_configuration(family: str) -> None:
    of = teacher(family)
    same = students.student_config(of.config, 32)
    own, ours = of.config.to_dict(), same.to_dict()
    differs = {name for name in own if own[name] != ours[name] and "drop" not in name}
    assert differs <= {"architectures", "dtype", "_name_or_path"}


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_depend_on_the_seed_alone(family: str) -> None:
    of = teacher(family)
    torch.manual_seed(5)
    one = students.new_student(of, 16, seed=1).state_dict()
    before = torch.random.get_rng_state()
    same, other = (students.new_student(of, 16, seed=seed).state_dict() for seed in (1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_initial_logits_are_of_one_size_at_all_widths() -> None:
    of = teacher("gpt-neox")
    sizes = [float(students.new_student(of, width, seed=3)(TOKENS).logits.std().detach()) for width in (8, 16, 32)]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2", "llama"])
def test_the_control_says_what_the_teacher_says(family: str) -> None:
    of = teacher(family)
    control = students.new_student(of, 32, start="teacher")
    assert torch.equal(control(TOKENS).logits, of(TOKENS).logits)
    assert all(p.requires_grad for p in control.parameters())
    with torch.no_grad():
        next(control.parameters()).add_(1)
    assert not torch.equal(control(TOKENS).logits, of(TOKENS).logits), "the teacher keeps its own weights"
    with pytest.raises(CapacityError, match="width 16 cannot start from all of the teacher's weights"):
        students.new_student(of, 16, start="teacher")


def test_pythia_students_of_the_paper() -> None:
    pythia = GPTNeoXConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=24, vocab_size=50304
    )
    found = {w: students.student_config(pythia, w) for w in (128, 256, 512, 768, 1024)}
    assert {w: c.num_attention_heads for w, c in found.items()} == {128: 2, 256: 4, 512: 8, 768: 12, 1024: 16}
    assert {w: c.intermediate_size for w, c in found.items()} == {w: 4 * w for w in found}
    assert {int(64 * c.rope_parameters["partial_rotary_factor"]) for c in found.values()} == {16}


def test_smollm2_and_gemma2_students() -> None:
    smol = LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=30
    )
    third = students.student_config(smol, 192)
    assert (third.num_attention_heads, third.num_key_value_heads, third.head_dim, third.intermediate_size) == (
        3,
        1,
        64,
        512,
    )
    gemma = Gemma2Config()  # 2304 wide, 8 heads of 256, 4 for keys and values
    half = students.student_config(gemma, 1152)
    assert (half.num_attention_heads, half.num_key_value_heads, half.head_dim, half.query_pre_attn_scalar) == (
        4,
        2,
        256,
        256,
    )
    narrow = students.student_config(gemma, 144)
    assert (narrow.num_attention_heads, narrow.num_key_value_heads, narrow.head_dim, narrow.query_pre_attn_scalar) == (
        1,
        1,
        128,
        128,
    )


@pytest.mark.parametrize(
    ("width", "near"),
    [(34, "32 and 36"), (33, "32 and 36"), (7, "6 and 8"), (129, "128 and 130"), (1, "2"), (0, "2"), (-5, "2")],
)
def test_a_width_that_cannot_be_built_names_the_nearest(width: int, near: str) -> None:
    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=4, intermediate_size=512)
    with pytest.raises(
        CapacityError,
        match=f"the family gpt-neox cannot build a student of width {width}: the nearest widths are {near}$",
    ):
        students.student_config(config, width)
    for each in map(int, near.split(" and ")):
        assert students.student_config(config, each).hidden_size == each


def test_architectures_without_students_are_refused() -> None:
    with pytest.raises(CapacityError, match="no model family knows how to build students of 'phi3'"):
        students.student_config(Phi3Config(), 32)
    with pytest.raises(CapacityError, match="Linear cannot be distilled"):
        students.new_student(torch.nn.Linear(2, 2), 1)
    with pytest.raises(CapacityError, match="'svd' is not a way to start"):
        students.new_student(teacher("gpt2"), 16, start="svd")


def test_a_scaled_head_is_noticed() -> None:
    of = teacher("gpt-neox")
    head = of.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(CapacityError, match="are not its head applied to its last hidden state"):
        check_head(of, TOKENS)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 128))
def test_head_sizes(width: int, teacher_size: int) -> None:
    for multiple in (1, 2):
        size = head_size(width, teacher_size, multiple)
        fitting = [
            s
            for s in range(1, teacher_size + 1)
            if width % s == 0 and s % multiple == 0 and (2 * s >= teacher_size or s == width)
        ]
        assert size == (max(fitting) if fitting else None)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_key_value_heads_divide_the_heads(heads: int, groups: int, sharing: int) -> None:
    found = key_value_heads(heads, groups * sharing, groups)
    assert heads % found == 0
    if heads % sharing == 0:
        assert found == heads // sharing


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.sampled_from([16, 32, 64, 80, 128]), st.sampled_from([0.25, 0.4, 0.5, 1.0]))
def test_rotary_dimensions_are_even_and_fit(width: int, teacher_size: int, share: float) -> None:
    config = GPTNeoXConfig(
        hidden_size=4 * teacher_size, num_attention_heads=4, intermediate_size=16 * teacher_size, rotary_pct=share
    )
    changes = gpt_neox.student(config, width)
    if changes is not None:
        size = width // changes["num_attention_heads"]
        rotary = int(size * changes["rope_parameters"]["partial_rotary_factor"])  # as transformers computes it
        assert rotary % 2 == 0
        assert 2 <= rotary <= size


def test_a_share_gives_its_integer_again() -> None:
    """28 of 110 is one that truncation makes one too few: int(110 * (28 / 110)) is 27."""
    assert int(110 * (28 / 110)) == 27
    for whole in (*range(1, 257), 320, 512, 1000, 1024, 2048):
        assert all(int(whole * share_of(part, whole)) == part for part in range(1, whole + 1))
        assert share_of(whole, whole) == 1


FREE_HEADS = ("qwen3", "gemma2", "gemma3")
ROTARY = {  # where transformers computes the rotary dimensions: the angles' frequencies, two dimensions to each
    "gpt-neox": "gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding",
    "phi": "phi.modeling_phi.PhiRotaryEmbedding",
    "llama": "llama.modeling_llama.LlamaRotaryEmbedding",
    "mistral": "mistral.modeling_mistral.MistralRotaryEmbedding",
    "olmo2": "olmo2.modeling_olmo2.Olmo2RotaryEmbedding",
    "qwen2": "qwen2.modeling_qwen2.Qwen2RotaryEmbedding",
    "qwen3": "qwen3.modeling_qwen3.Qwen3RotaryEmbedding",
    "gemma2": "gemma2.modeling_gemma2.Gemma2RotaryEmbedding",
}
ROTATED_SHARE = {"gpt-neox": Fraction(1, 4), "phi": Fraction(1, 2)}
WIDTH, HEAD, FREE_HEAD = 1024, 128, 256


def wide_config(family: str) -> Any:
    """The configuration of a tiny family at the size of a real teacher: 1,024 wide, heads of 128, or 256 if free."""
    config = CONFIGS[family]()
    sizes = {"hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD, "num_key_value_heads": 4}
    sizes |= {"n_embd": WIDTH, "n_head": WIDTH // HEAD, "head_dim": FREE_HEAD if family in FREE_HEADS else HEAD}
    sizes |= {"intermediate_size": 3072, "ffn_dim": 3072, "word_embed_proj_dim": 512, "time_step_rank": 64}
    values = config.to_dict()
    return type(config)(**(values | {name: size for name, size in sizes.items() if name in values}))


def nearest(value: Fraction, least: int = 1, step: int = 1) -> set[int]:
    """The multiples of `step` nearest to a fraction, both where it lies halfway; `least` if that is larger."""
    below = floor(value / step) * step
    distance = min(value - below, below + step - value)
    return {max(least, n) for n in (below, below + step) if abs(n - value) == distance}


def check_sizes(family: str, student: Any, teacher: Any, rotary: Any) -> None:
    """Every size is the whole number that the rule means, by exact fractions, and as transformers computes it."""
    width = student.hidden_size
    for name in ("intermediate_size", "n_inner", "ffn_dim", "word_embed_proj_dim", "time_step_rank"):
        if getattr(teacher, name, None):
            assert getattr(student, name) in nearest(Fraction(getattr(teacher, name) * width, WIDTH))
    if family == "mamba":
        return
    heads = student.num_attention_heads
    size = getattr(student, "head_dim", None) or width // heads
    if family in FREE_HEADS:  # the attention is twice as wide as the stream
        assert size in ({FREE_HEAD} if 2 * width >= FREE_HEAD else nearest(Fraction(2 * width), 2, step=2))
        assert heads in nearest(Fraction(2 * width, size))
    else:
        assert heads * size == width
        assert size == width if width <= HEAD else HEAD <= 2 * size <= 2 * HEAD
    assert heads % (getattr(student, "num_key_value_heads", None) or heads) == 0
    student.validate_architecture()
    if rotary is not None:
        frequencies, _ = rotary.compute_default_rope_parameters(student)
        share = ROTATED_SHARE.get(family, Fraction(1))
        assert 2 * len(frequencies) in nearest(size * share, 2, step=2)
        assert int(size * student.rope_parameters.get("partial_rotary_factor", 1.0)) == 2 * len(frequencies)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_at_every_width(family: str, unchecked: None) -> None:
    """Widths from 1 to 2,048. Most are changed in a copy of the teacher's configuration, for speed; the narrowest and
    every 64th are built as a student's are.
    """
    of = wide_config(family)
    rule = plugins().family_of(of.model_type).student
    module, _, name = ROTARY.get(family, "").rpartition(".")
    rotary = getattr(importlib.import_module(f"transformers.models.{module}"), name) if name else None
    built = 0
    for width in range(1, 2049):
        if (changes := rule(of, width)) is None:
            assert width % HEAD, "multiples of the teacher's head size can always be built"
            continue
        quick = copy.copy(of)
        for field, value in changes.items():
            setattr(quick, field, value)
        check_sizes(family, quick, of, rotary)
        if width <= 32 or width % 64 == 0:
            student = students.student_config(of, width)
            check_sizes(family, student, of, rotary)
            assert {field: getattr(student, field) for field in changes} == changes
        built += 1
    assert built > 250


@pytest.mark.parametrize("width", [2, 6, 50, 110, 122])
@pytest.mark.parametrize("family", ["gpt-neox", "phi"])
def test_students_whose_heads_rotate_in_part_run(family: str, width: int) -> None:
    """Of one head; 110 should rotate 28 dimensions, and rotated 27."""
    config = wide_config(family)
    config.num_hidden_layers = 1
    small = students.student_config(config, width)
    assert small.num_attention_heads == 1
    logits = AutoModelForCausalLM.from_config(small).eval()(TOKENS).logits
    assert logits.shape == (2, 9, 50)
    assert torch.isfinite(logits).all()


def test_gemma_and_llama_need_heads_that_divide_the_width() -> None:
    """Transformers refuses others of Gemma and Llama, but not of Qwen."""
    of = wide_config("gemma2")
    with pytest.raises(CapacityError, match="cannot build a student of width 193: the nearest widths are 192 and 194"):
        students.student_config(of, 193)
    assert students.student_config(of, 194).num_attention_heads == 2
    assert students.student_config(wide_config("qwen3"), 193).num_attention_heads == 2
