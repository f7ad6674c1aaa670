"""Iteration times of a model's shape on a GPU, against the catalogue's profile: `python -m eval.gpu_iterations`.

Needs PyTorch and a CUDA device, and no engine: the layers of a released model with random bf16 weights, each iteration
a CUDA graph of plain PyTorch, with a KV cache of equal contexts. It is not vLLM: there is no scheduler, no sampling but
the largest logit, no paging and no host between iterations, and attention is PyTorch's. So it measures what an
iteration's matrix products and memory reads take, which is most of it, and what no engine can be far below.

What is measured: decode by batch and context, prefill by length, and prefill beside decoding sequences. The errors are
of `agents.hardware.profile`, less measured, relative.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.hardware import DECODING, GPUS, KV_TOKENS, PREFILL_TOKENS, TIME_S, predict_s, profile

MOST_KV_TOKENS = 262_144
WARM_UP, TIMED = 3, 10  # iterations of each load


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by its config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Of the matrices, with embeddings that are not tied."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + 2 * self.vocabulary * self.hidden


SHAPES = {
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151_936),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128_256),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151_936),
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32_000),
}
LOADS = [
    *[(batch, context, 0) for batch in (1, 8, 32, 64, 128, 256) for context in (128, 1024, 4096)],
    *[(0, 0, prefill) for prefill in (16, 32, 64, 128, 256, 512, 1024, 2048)],
    *[(batch, 1024, prefill) for batch in (16, 64, 128) for prefill in (64, 256, 1024)],
]


class Layers:
    """A model's layers, and the KV cache of what decodes."""

    def __init__(self, shape: Shape, device: torch.device, kv_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        def made(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype) * size[-1] ** -0.5

        self.shape, self.device = shape, device
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.embedding, self.head = (made(shape.vocabulary, shape.hidden) for _ in range(2))
        self.weights = [
            (
                made(width, shape.hidden),
                made(shape.hidden, shape.heads * shape.head_dim),
                made(2 * shape.intermediate, shape.hidden),
                made(shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.cache = torch.zeros(
            shape.layers, 2, kv_tokens * shape.kv_heads * shape.head_dim, device=device, dtype=dtype
        )
        angle = torch.arange(shape.head_dim // 2, device=device) / shape.head_dim
        self.cos, self.sin = torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)
        self.rotated, self.gated, self.added = _fused(device)

    def iteration(self, tokens: Tensor, batch: int, context: int) -> Tensor:
        """Next tokens of one iteration: the first `batch` of `tokens` each decode over `context` tokens, the others are
        a prompt."""
        shape = self.shape
        x = F.embedding(tokens, self.embedding)
        rest = torch.zeros_like(x)
        prompt = len(tokens) - batch
        for (qkv, out, up, down), cache in zip(self.weights, self.cache, strict=True):
            x, normed = self.added(x, rest, self.norm)
            heads = F.linear(normed, qkv).view(len(tokens), -1, shape.head_dim)
            q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            q, k = self.rotated(q, self.cos, self.sin), self.rotated(k, self.cos, self.sin)
            seen = []
            if batch:
                keys, values = (
                    part[: batch * context * shape.kv_heads * shape.head_dim].view(
                        batch, shape.kv_heads, context, shape.head_dim
                    )
                    for part in cache
                )
                keys[:, :, -1], values[:, :, -1] = k[:batch], v[:batch]
                # The heads that share a KV head are its queries: one read of the cache serves all.
                grouped = q[:batch].view(batch, shape.kv_heads, -1, shape.head_dim)
                seen.append(F.scaled_dot_product_attention(grouped, keys, values).reshape(batch, -1))
            if prompt:
                own = (each[batch:].transpose(0, 1)[None] for each in (q, k, v))
                attended = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
                seen.append(attended[0].transpose(0, 1).reshape(prompt, -1))
            x, normed = self.added(x, F.linear(torch.cat(seen) if len(seen) > 1 else seen[0], out), self.norm)
            rest = F.linear(self.gated(F.linear(normed, up)), down)
        last = torch.cat([x[:batch] + rest[:batch], (x + rest)[-1:]]) if prompt else x + rest
        return F.linear(F.rms_norm(last, (shape.hidden,), self.norm), self.head).argmax(dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _added(x: Tensor, more: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    total = x + more
    return total, F.rms_norm(total, norm.shape, norm)


def _fused(device: torch.device) -> Sequence[Any]:
    """The elementwise parts, each one kernel as in an engine where PyTorch can compile on this machine."""
    plain = (_rotated, _gated, _added)
    if device.type != "cuda":
        return plain
    compiled = [torch.compile(each, dynamic=True) for each in plain]
    try:
        compiled[1](torch.ones(4, 8, device=device, dtype=torch.bfloat16))
        torch._dynamo.config.recompile_limit = 64
    except Exception as error:  # whatever the compiler lacks
        print(f"not compiled, so slower: {type(error).__name__}", file=sys.stderr)
        return plain
    return compiled


def iteration_time_s(layers: Layers, batch: int, context: int, prefill: int) -> float:
    """Median time of an iteration, s."""
    tokens = torch.zeros(batch + prefill, dtype=torch.long, device=layers.device)
    if layers.device.type != "cuda":
        times_s = []
        for _ in range(TIMED):
            start_s = time.perf_counter()
            layers.iteration(tokens, batch, context)
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            layers.iteration(tokens, batch, context)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers.iteration(tokens, batch, context)
    for _ in range(WARM_UP):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


@torch.inference_mode()
def measure(layers: Layers, loads: Sequence[tuple[int, int, int]], most_kv_tokens: int) -> np.ndarray:
    """Rows as `agents.hardware.fit` takes them, of `loads` (batch, context of each, prefill) that the cache holds."""
    rows = []
    for batch, context, prefill in loads:
        if batch * context <= most_kv_tokens:
            time_s = iteration_time_s(layers, batch, context, prefill)
            rows.append((batch, batch * context, prefill, time_s))
            print(f"{batch:4d} x {context:5d} + {prefill:5d}: {time_s * 1e3:8.3f} ms", file=sys.stderr, flush=True)
    return np.array(rows, dtype=np.float64)


def errors(rows: np.ndarray, predicted_s: np.ndarray) -> dict[str, dict[str, float]]:
    """Relative errors by kind of iteration: their mean, with sign, the mean of their sizes, the largest."""
    off = predicted_s / rows[:, TIME_S] - 1
    decoding, prefilling = rows[:, DECODING] > 0, rows[:, PREFILL_TOKENS] > 0
    kinds = {"decode": ~prefilling, "prefill": ~decoding, "mixed": decoding & prefilling}
    return {
        name: {
            "loads": int(kind.sum()), "bias": float(off[kind].mean()), "mean": float(np.abs(off[kind]).mean()),
            "largest": float(np.abs(off[kind]).max()),
        }
        for name, kind in kinds.items()
    }  # fmt: skip


def table(rows: np.ndarray, predicted_s: np.ndarray) -> str:
    """Measured and predicted in Markdown."""
    lines = ["| decoding | KV tokens | prefill | measured | profile | error |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row[DECODING]:.0f} | {row[KV_TOKENS]:.0f} | {row[PREFILL_TOKENS]:.0f} | {row[TIME_S] * 1e3:.2f} ms "
        f"| {told_s * 1e3:.2f} ms | {told_s / row[TIME_S] - 1:+.1%} |"
        for row, told_s in zip(rows, predicted_s, strict=True)
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    parser = argparse.ArgumentParser(prog="python -m eval.gpu_iterations", description="Time a model's shape on a GPU.")
    add = parser.add_argument
    add("--model", choices=SHAPES, default="llama-3-8b", help="%(choices)s (default: llama-3-8b)")
    add("--gpu", choices=GPUS, default="h100", help="of the catalogue, to compare with: %(choices)s (default: h100)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("eval.gpu_iterations: PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    layers = Layers(SHAPES[args.model], device, MOST_KV_TOKENS)
    rows = measure(layers, LOADS, MOST_KV_TOKENS)
    predicted_s = predict_s(profile(args.gpu, args.model).row(), rows)
    found = errors(rows, predicted_s)
    name = torch.cuda.get_device_name(device)
    print(f"{args.model} on {name}, profile of {args.gpu}, PyTorch {torch.__version__}\n\n{table(rows, predicted_s)}\n")
    for kind, each in found.items():
        print(f"{kind:<8}{each['loads']:3d} loads, bias {each['bias']:+6.1%}, mean {each['mean']:6.1%}, "
              f"largest {each['largest']:6.1%}")  # fmt: skip
    if args.json is not None:
        result = {
            "device": name, "torch": torch.__version__, "model": args.model, "gpu": args.gpu,
            "columns": ["decoding", "kv_tokens", "prefill_tokens", "time_s"], "rows": rows.tolist(), "errors": found,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
