"""Models as services, the card they run on, and how long their work takes. Pure.

Continuous batching is a clock of rounds. In a round every running sequence of a card gets one token; it lasts

    sum over models with running sequences (alone_s + each_s * sequences)

since models on one card take turns: alone_s reads a model's weights once, each_s one sequence's KV cache. When a
sequence comes or goes the clock changes its speed, so a request's time follows the batch through all its changes.
A prompt is work of as many rounds as take its time alone. It shares the card as a sequence does: it delays others less
than a real prefill would, and KV caches are never full before `sequences_max`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mfs.errors import UsageError

GB = 10**9
_BYTES_PER_PARAMETER = 2  # bf16


@dataclass(frozen=True)
class Card:
    """A GPU: its vendor's numbers, and what share of them models reach (a guess, not measured here)."""

    name: str = "H100 SXM"
    memory_bytes: int = 80 * GB
    weights_share: float = 0.6
    """Of memory, for weights; the rest is for KV caches, activations and the engine."""
    memory_bytes_s: float = 3.35e12
    memory_efficiency: float = 0.6
    flops: float = 9.9e14
    """bf16, dense."""
    flops_efficiency: float = 0.5
    sequences_max: int = 16
    """Sequences that may run at once on a card, whatever models they are of."""

    @property
    def weights_bytes(self) -> int:
        return int(self.memory_bytes * self.weights_share)


@dataclass(frozen=True)
class Service:
    """One model that is asked for. Members of a family are fine-tunes of one base and share what does not differ."""

    name: str
    weights_bytes: int
    family: int
    different_share: float
    """Of the weights: what no other member of the family has. 1: nothing is shared."""
    alone_s: float
    """Of a round, however many sequences run."""
    each_s: float
    """Of a round, for each sequence."""
    prompt_token_s: float
    """One token of a prompt, alone on the card."""

    @cached_property
    def own_bytes(self) -> int:
        return round(self.weights_bytes * self.different_share)

    @cached_property
    def common_bytes(self) -> int:
        return self.weights_bytes - self.own_bytes

    def prompt_rounds(self, context_tokens: float) -> float:
        return context_tokens * self.prompt_token_s / (self.alone_s + self.each_s)

    def requests_per_s(self, context_tokens: float, generated_tokens: float, sequences: int) -> float:
        """What one card gives at most, with `sequences` running all the time: what utilisation is measured against."""
        round_s = self.alone_s + self.each_s * sequences
        return sequences / ((self.prompt_rounds(context_tokens) + generated_tokens) * round_s)


def make_service(name: str, weights_bytes: int, card: Card, *, family: int, different_share: float) -> Service:
    """A dense bf16 decoder with KV heads as Llama-3-8B has them (128 KiB a token at 16 GB), at 1,500 tokens on average.

    Raises: UsageError if it does not fit the card.
    """
    if not 0 < weights_bytes <= card.weights_bytes:
        raise UsageError(
            f"{name}: {weights_bytes / GB:.1f} GB of weights do not fit a card with "
            f"{card.weights_bytes / GB:.1f} GB for them"
        )
    if not 0 <= different_share <= 1:
        raise UsageError(f"{name}: expected a share from 0 to 1 that differs, got {different_share}")
    memory_bytes_s = card.memory_bytes_s * card.memory_efficiency
    kv_bytes = 1500 * 131_072 * weights_bytes / (16 * GB)
    flops_per_token = 2 * weights_bytes / _BYTES_PER_PARAMETER
    return Service(
        name,
        weights_bytes,
        family,
        different_share,
        alone_s=weights_bytes / memory_bytes_s,
        each_s=kv_bytes / memory_bytes_s,
        prompt_token_s=flops_per_token / (card.flops * card.flops_efficiency),
    )


def make_services(
    count: int, sizes_bytes: Sequence[int], card: Card, *, per_family: int = 1, different_share: float = 1.0
) -> list[Service]:
    """`count` services whose families take the sizes in turn; per_family of them are fine-tunes of one base."""
    made = []
    for index in range(count):
        family = index // per_family
        size_bytes = sizes_bytes[family % len(sizes_bytes)]
        share = different_share if per_family > 1 else 1.0
        made.append(make_service(f"service-{index}", size_bytes, card, family=family, different_share=share))
    return made
