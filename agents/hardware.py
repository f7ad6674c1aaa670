"""What an engine can do: the time of one iteration, its KV cache and its limits, and a catalogue of GPUs and models.

Iteration time of a continuous-batching engine, in seconds:

    decode only:   weight_s + per_seq_s * decoding + per_kv_token_s * kv_tokens
    with prefill:  the same with, as its first term,
                   max(weight_s, prefill_base_s + per_token_s * (prefill_tokens + seq_tokens * decoding)
                                 + per_pair_s * pairs)

where `pairs` counts prompt tokens with each token before them, as attention does: half the square of a whole prompt.
On a GPU a sequence computes as a prompt token does (seq_tokens is 1), and a pair takes what its operations take at the
efficiency of the rest; neither holds on a CPU, where both are measured. An iteration without prefill of a
measured engine takes `batch_s` more or less than the line says, as kernels do not grow evenly with the batch.

Decode reads the weights once, then each sequence's KV cache. A small prefill hides under the weight read (up to about
90 tokens for Llama-3-8B on an A100); a larger one is bound by compute. The form is for prefill up to `CHUNK_TOKENS`.

Where iteration times exist (`data/gpu_iteration_times.csv`, computed from measured kernels, 5 to 13 % fast) the
coefficients are fitted to them; elsewhere they are a roofline of published bandwidth, FLOP/s and sizes, at the
efficiencies that the fitted pairs show. Neither has a floor for kernel launches or the host, so a model under 1B
parameters on a fast GPU comes out optimistic.

`wwwserve hardware` prints the catalogue; `wwwserve hardware-fit` fits again, to half of each table, and
prints the errors on the other half.
"""

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from numbers import Integral
from statistics import median
from typing import Any

import numpy as np

from wwwserve.agents.kernel import Floats, kernel

# Columns of a profile row; all but the four of its limits are the coefficients of the iteration time.
WEIGHT_S, PER_SEQ_S, PER_KV_TOKEN_S, PREFILL_BASE_S, PER_TOKEN_S = range(5)
KV_BLOCKS, MAX_NUM_SEQS, MAX_BATCHED_TOKENS, MAX_MODEL_LEN = range(5, 9)
SEQ_TOKENS, PER_PAIR_S = range(9, 11)
BATCH_S = 11  # and the next, at 1, 2, 4, ... sequences
KNOTS = 9
PROFILE_SIZE = BATCH_S + KNOTS
COEFFICIENTS = 5

BLOCK_TOKENS = 16  # tokens of one KV block, vLLM's default
CHUNK_TOKENS = 2048  # tokens of one iteration under chunked prefill, vLLM's default on most GPUs
RESERVED_BYTES = 2.4e9  # activations of one chunk, CUDA graphs and the CUDA context
MIN_KV_TOKENS = 2048  # a node that holds less than one chunk is of no use


@kernel
def iteration_s(
    profile_row: Floats,
    decoding: float,
    kv_tokens: float,
    prefill_tokens: float,
    seq_tokens: float = 1.0,
    pairs_s: float = 0.0,
) -> float:
    """Seconds of one engine iteration.

    `decoding` sequences produce a token each, over `kv_tokens` of context in total; `prefill_tokens` prompt tokens are
    computed beside them, whose pairs take `pairs_s`. Reads the first five columns of `profile_row` only.
    """
    first = profile_row[WEIGHT_S]
    if prefill_tokens > 0:
        compute = profile_row[PREFILL_BASE_S] + profile_row[PER_TOKEN_S] * (prefill_tokens + seq_tokens * decoding)
        compute += pairs_s
        first = max(first, compute)
    time_s: float = first + profile_row[PER_SEQ_S] * decoding + profile_row[PER_KV_TOKEN_S] * kv_tokens
    return time_s


@kernel
def off_line_s(profile_row: Floats, decoding: int) -> float:
    """Seconds that an iteration of `decoding` sequences, at least 1, without prefill takes beyond `iteration_s`."""
    knot, at = 0, 1
    while knot < KNOTS - 2 and 2 * at <= decoding:
        knot += 1
        at *= 2
    part = min(1.0, (decoding - at) / at)
    time_s: float = (1.0 - part) * profile_row[BATCH_S + knot] + part * profile_row[BATCH_S + knot + 1]
    return time_s


@dataclass(frozen=True)
class Profile:
    """What one engine can do. All values are positive but those with a default; times in seconds."""

    weight_s: float
    """Reading the weights once: the floor of an iteration."""
    per_seq_s: float
    """Each decoding sequence."""
    per_kv_token_s: float
    """Each token of context that decoding sequences attend to."""
    prefill_base_s: float
    """Fixed part of an iteration bound by compute."""
    per_token_s: float
    """Compute of each token in an iteration with prefill."""
    kv_blocks: int
    """KV cache, in blocks of `BLOCK_TOKENS` tokens."""
    max_num_seqs: int
    """Most sequences running at once."""
    max_batched_tokens: int
    """Most tokens computed in one iteration."""
    max_model_len: int
    """Most tokens of prompt and output of one request."""
    source: str
    """Where the coefficients come from: "fitted: ..." or "roofline: ..."."""
    seq_tokens: float = 1.0
    """Compute of a sequence that decodes beside a prefill, in tokens of that."""
    per_pair_s: float = 0.0
    """Each prompt token with each before it."""
    batch_s: tuple[float, ...] = ()
    """Beyond the line, where nothing is prefilled: at 1, 2, 4, ... sequences, the last for all beyond; none is zero."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_s", tuple(self.batch_s))  # from JSON it is a list
        if len(self.batch_s) > KNOTS or not all(map(math.isfinite, self.batch_s)):
            raise ValueError(f"profile field batch_s must be at most {KNOTS} finite numbers, got {self.batch_s!r}")
        for field in _numbers(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("seq_tokens", "per_pair_s")
            if not (math.isfinite(value) and (value > 0 or (may_be_zero and value == 0))):
                expected = "finite and not negative" if may_be_zero else "positive and finite"
                raise ValueError(f"profile field {field.name} must be {expected}, got {value!r}")
            if field.type is int and not isinstance(value, Integral):
                raise ValueError(f"profile field {field.name} must be an integer, got {value!r}")

    @property
    def kv_tokens(self) -> int:
        """Size of the KV cache, tokens."""
        return self.kv_blocks * BLOCK_TOKENS

    def row(self) -> Floats:
        """The profile as a vector of `PROFILE_SIZE`, as kernels take it."""
        last = self.batch_s[-1:] or (0.0,)
        batch_s = self.batch_s + last * (KNOTS - len(self.batch_s))
        return np.array([*(getattr(self, field.name) for field in _numbers(self)), *batch_s], dtype=np.float64)


def pooled(alone: Profile, count: int) -> Profile:
    """The engine that `count` of this profile are together, while their load is even.

    Each decodes its share of the sequences and computes its share of the prompts meanwhile. What is not so: one prompt
    is computed by one engine, `count` times as slowly as it seems here, which whoever promises has to add.
    """
    if count == 1:
        return alone
    shift = round(math.log2(count))  # a batch of so many is one of a share of it on each
    return replace(
        alone,
        per_seq_s=alone.per_seq_s / count,
        per_kv_token_s=alone.per_kv_token_s / count,
        prefill_base_s=alone.weight_s + (alone.prefill_base_s - alone.weight_s) / count,
        per_token_s=alone.per_token_s / count,
        per_pair_s=alone.per_pair_s / count,
        kv_blocks=alone.kv_blocks * count,
        max_num_seqs=alone.max_num_seqs * count,
        max_batched_tokens=alone.max_batched_tokens * count,
        batch_s=(alone.batch_s[:1] * shift + alone.batch_s)[:KNOTS],
        source=f"{count} engines, each {alone.source}",
    )


def _numbers(made: Profile) -> list[Field[Any]]:
    """The fields that are numbers, in the order of a row."""
    return [field for field in fields(made) if field.name not in ("source", "batch_s")]


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU."""

    memory_gib: float
    """Memory, GiB, as the driver reports it."""
    bandwidth_gbs: float
    """Memory bandwidth, GB/s."""
    bf16_tflops: float
    """Peak bf16 tensor TFLOP/s, dense, FP32 accumulate (half the FP16-accumulate figure on GeForce cards)."""
    source: str


GPUS: dict[str, Gpu] = {
    "a100-80g": Gpu(80, 2039, 312, "NVIDIA A100 datasheet, SXM 80 GB"),
    "h100": Gpu(80, 3350, 989.4, "NVIDIA H100 datasheet, SXM5 (sparse figure halved)"),
    "rtx-4090": Gpu(24, 1008, 165.2, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    "rtx-3090": Gpu(24, 936, 71, "NVIDIA GA102 GPU architecture whitepaper, appendix A"),
    "rtx-6000-ada": Gpu(48, 960, 364.2, "NVIDIA Ada GPU architecture whitepaper, appendix on RTX 6000"),
    "a40": Gpu(48, 696, 149.7, "NVIDIA A40 datasheet"),
}


@dataclass(frozen=True)
class Model:
    """Sizes of a released model; bf16 weights and KV cache."""

    parameters: int
    embedding: int
    """Of these, the embedding's and an untied output head's, which quantization leaves in bf16."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    strength: float
    """Bradley-Terry log-strength: a judge prefers its answer to another's with chance 1 / (1 + exp(other - own))."""
    source: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bf16."""
        return 2 * self.parameters

    def quantized_bytes(self, bytes_per_weight: float) -> float:
        """Bytes of the weights with all but the embedding at `bytes_per_weight`."""
        return 2 * self.embedding + bytes_per_weight * (self.parameters - self.embedding)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def flops_per_pair(self) -> int:
        """Operations of attention for one token with one before it: a product with its key, one with its value."""
        return 2 * 2 * self.layers * self.heads * self.head_dim


# Parameters are counted from the shapes in config.json (tied embeddings once). Strengths of qwen3-8b, 4b and 0.6b are
# those with which a round robin of the three, three judges a duel, comes to the win rates 0.57, 0.53 and 0.39 that
# WWW.Serve (arXiv 2603.20661) reports: `wwwserve strength`. The rest are guesses: qwen3-14b continues the line
# from 4b to 8b over log parameters, llama-3-8b lies halfway between 0.6b and 4b, llama-2-7b is level with 0.6b.
MODELS: dict[str, Model] = {
    "qwen3-0.6b": Model(596_049_920, 155_582_464, 28, 16, 8, 128, 40960, -0.192, "Qwen/Qwen3-0.6B config.json"),
    "qwen3-4b": Model(4_022_468_096, 388_956_160, 36, 32, 8, 128, 40960, 0.060, "Qwen/Qwen3-4B config.json"),
    "qwen3-8b": Model(8_190_735_360, 1_244_659_712, 36, 32, 8, 128, 40960, 0.132, "Qwen/Qwen3-8B config.json"),
    "qwen3-14b": Model(14_768_307_200, 1_555_824_640, 40, 40, 8, 128, 40960, 0.192, "Qwen/Qwen3-14B config.json"),
    "llama-3-8b": Model(8_030_261_248, 1_050_673_152, 32, 32, 8, 128, 8192, -0.066, "Meta-Llama-3-8B config.json"),
    "llama-2-7b": Model(6_738_415_616, 262_144_000, 32, 32, 32, 128, 4096, -0.192, "Llama-2-7b-hf config.json"),
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of the linear layers are stored; activations, embedding and KV cache stay in bf16.

    Only what is read changes: a step bound by compute takes as long as in bf16.
    """

    bytes_per_weight: float
    """With the scales and zero points of its groups."""
    strength: float
    """Added to the model's log-strength in duels."""
    source: str


# A group of int4 weights has a scale and a zero point in bf16: 4 bytes. That fp8 costs no quality is a guess; the other
# two strengths follow from it by the win rates 0.54, 0.49 and 0.47 that WWW.Serve reports: `wwwserve strength`.
QUANTIZATIONS: dict[str, Quantization] = {
    "bf16": Quantization(2.0, 0.0, "weights as released"),
    "fp8wo": Quantization(1.0, 0.0, "torchao Float8WeightOnlyConfig: a scale a channel"),
    "int4wo-128": Quantization(0.5 + 4 / 128, -0.089, "torchao Int4WeightOnlyConfig, group size 128"),
    "int4wo-32": Quantization(0.5 + 4 / 32, -0.125, "torchao Int4WeightOnlyConfig, group size 32"),
}


@dataclass(frozen=True)
class Attention:
    """What reads the KV cache in decode."""

    kv_passes: float
    """How often it moves the keys and values of the context through memory."""
    launches: int
    """Kernels launched for each sequence and layer, one after the other; 0 if one serves the whole batch."""
    source: str


LAUNCH_S = 5e-6  # an eager PyTorch operation takes the host 5 to 25 us; the lower end
ATTENTIONS: dict[str, Attention] = {
    "flashinfer": Attention(1.0, 0, "one paged kernel for the batch, as in the engines that the fits are of"),
    "triton": Attention(1.0, 0, "level with the best CUDA kernels (105.9 %): Ringlein et al., arXiv 2511.11581"),
    "sdpa": Attention(
        3.0, 5,
        "SGLang torch_native_backend.py: for each sequence, gathers its keys and values (read, write, read again) in "
        "three kernels, then attends and stores",
    ),
}  # fmt: skip

# `eval.hardware_fit.fit` over every row of its tables, in seconds:
# weight_s, per_seq_s, per_kv_token_s, prefill_base_s, per_token_s.
FITTED: dict[tuple[str, str], tuple[float, float, float, float, float]] = {
    ("a100-80g", "llama-3-8b"): (0.01029, 4.445e-05, 8.622e-08, 0.003378, 7.803e-05),
    ("a100-80g", "llama-2-7b"): (0.009457, 4.435e-05, 2.834e-07, 0.0041, 6.527e-05),
    ("a40", "llama-2-7b"): (0.0248, 5.424e-05, 8.74e-07, 0.01304, 0.0001353),
}
_FITTED_SOURCE = "fitted: data/gpu_iteration_times.csv (Vidur, Agrawal et al., MLSys 2024)"


def _median(ratio: Callable[[Gpu, Model, tuple[float, ...]], float]) -> float:
    """Median of `ratio` over the fitted pairs."""
    return median(ratio(GPUS[gpu], MODELS[model], fitted) for (gpu, model), fitted in FITTED.items())


# What the fitted pairs reach of the published peaks: 0.77 of bandwidth and 0.66 of FLOP/s.
BANDWIDTH_EFFICIENCY = _median(lambda gpu, model, c: model.weight_bytes / (gpu.bandwidth_gbs * 1e9 * c[WEIGHT_S]))
# Reading the KV cache is less efficient with grouped queries (8 KV heads, 0.75) than with a head a query (32, 0.88).
KV_EFFICIENCY = {
    heads: median(
        MODELS[model].kv_bytes_per_token / (GPUS[gpu].bandwidth_gbs * 1e9 * c[PER_KV_TOKEN_S])
        for (gpu, model), c in FITTED.items()
        if MODELS[model].kv_heads == heads
    )
    for heads in {model.kv_heads for model in MODELS.values()}
}
FLOPS_EFFICIENCY = _median(lambda gpu, model, c: 2 * model.parameters / (gpu.bf16_tflops * 1e12 * c[PER_TOKEN_S]))
# Two scalings without a physical model. A sequence costs part overhead, part compute: the fitted per_seq_s follow the
# square root of per_token_s within 10 %. The fixed part of a prefill is 0.33 to 0.53 of the weight read.
_PER_SEQ_SCALE = _median(lambda gpu, model, c: c[PER_SEQ_S] / math.sqrt(c[PER_TOKEN_S]))
_PREFILL_BASE_SHARE = _median(lambda gpu, model, c: c[PREFILL_BASE_S] / c[WEIGHT_S])


def _roofline(gpu: Gpu, model: Model) -> tuple[float, float, float, float, float]:
    """Coefficients from published figures and the fitted pairs' efficiencies, seconds."""
    weight_s = model.weight_bytes / (gpu.bandwidth_gbs * 1e9 * BANDWIDTH_EFFICIENCY)
    per_kv_token_s = model.kv_bytes_per_token / (gpu.bandwidth_gbs * 1e9 * KV_EFFICIENCY[model.kv_heads])
    per_token_s = 2 * model.parameters / (gpu.bf16_tflops * 1e12 * FLOPS_EFFICIENCY)
    per_seq_s = _PER_SEQ_SCALE * math.sqrt(per_token_s)
    return weight_s, per_seq_s, per_kv_token_s, _PREFILL_BASE_SHARE * weight_s, per_token_s


def profile(
    gpu: str,
    model: str,
    max_num_seqs: int = 256,
    memory_utilization: float = 0.9,
    *,
    quantization: str = "bf16",
    attention: str = "flashinfer",
) -> Profile:
    """Profile of a catalogue `model` served on one catalogue `gpu`.

    `memory_utilization` is the share of GPU memory that the engine may use. What weights and `RESERVED_BYTES` leave of
    it is KV cache; `max_model_len` is the model's own, or the KV cache where that is smaller, as an operator has to
    set it. Raises ValueError for an unknown name, and for a pair that leaves less than `MIN_KV_TOKENS`.
    """
    for what, name, known in (
        ("gpu", gpu, GPUS),
        ("model", model, MODELS),
        ("quantization", quantization, QUANTIZATIONS),
        ("attention", attention, ATTENTIONS),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}, known: {', '.join(known)}")
    if not 0 < memory_utilization <= 1:
        raise ValueError(f"memory_utilization must be in (0, 1], got {memory_utilization!r}")
    card, sizes = GPUS[gpu], MODELS[model]
    weight_bytes = sizes.quantized_bytes(QUANTIZATIONS[quantization].bytes_per_weight)
    kv_bytes = card.memory_gib * 2**30 * memory_utilization - weight_bytes - RESERVED_BYTES
    kv_blocks = math.floor(kv_bytes / (sizes.kv_bytes_per_token * BLOCK_TOKENS))
    if kv_blocks * BLOCK_TOKENS < MIN_KV_TOKENS:
        raise ValueError(
            f"{model} does not fit on {gpu}: {weight_bytes / 1e9:.1f} GB of weights leave "
            f"{max(kv_blocks, 0) * BLOCK_TOKENS} KV tokens of {card.memory_gib * memory_utilization:.1f} GiB, "
            f"at least {MIN_KV_TOKENS} are needed"
        )
    if (gpu, model) in FITTED:
        coefficients, source = FITTED[gpu, model], _FITTED_SOURCE
    else:
        coefficients, source = _roofline(card, sizes), f"roofline: {card.source}; {sizes.source}"
    weight_s, per_seq_s, per_kv_token_s, prefill_base_s, per_token_s = coefficients
    if quantization != "bf16":
        weight_s *= weight_bytes / sizes.weight_bytes
        prefill_base_s *= weight_bytes / sizes.weight_bytes
        source += f"; {quantization}: {QUANTIZATIONS[quantization].source}"
    if attention != "flashinfer":
        per_seq_s += ATTENTIONS[attention].launches * sizes.layers * LAUNCH_S
        per_kv_token_s *= ATTENTIONS[attention].kv_passes
        source += f"; {attention}: {ATTENTIONS[attention].source}"
    max_model_len = min(sizes.max_model_len, kv_blocks * BLOCK_TOKENS)
    return Profile(
        weight_s, per_seq_s, per_kv_token_s, prefill_base_s, per_token_s, kv_blocks, max_num_seqs, CHUNK_TOKENS,
        max_model_len, source, per_pair_s=sizes.flops_per_pair / (card.bf16_tflops * 1e12 * FLOPS_EFFICIENCY),
    )  # fmt: skip


def main() -> None:
    """Print the catalogue."""
    print("gpu           model       weight ms  seq us  kv ns   base ms  token us  kv tokens  max len  source")
    for gpu in GPUS:
        for model in MODELS:
            try:
                p = profile(gpu, model)
            except ValueError as error:
                print(f"{gpu:<13} {model:<11} {error}")
                continue
            print(
                f"{gpu:<13} {model:<11} {p.weight_s * 1e3:9.2f} {p.per_seq_s * 1e6:7.1f} {p.per_kv_token_s * 1e9:6.1f} "
                f"{p.prefill_base_s * 1e3:9.2f} {p.per_token_s * 1e6:9.1f} {p.kv_tokens:10d} {p.max_model_len:8d}  "
                f"{p.source.partition(':')[0]}"
            )


if __name__ == "__main__":
    main()
