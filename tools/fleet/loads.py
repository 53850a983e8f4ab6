"""What bringing a model to a card takes: the bytes that are missing there, each from the nearest tier that has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.fleet.gpu import Gpu, Node
from tools.fleet.services import Service
from tools.fleet.setups import Setup
from tools.fleet.tiers import Piece


class Loads:
    """Seconds of loads under one setup, and the books of what moved. Services go by their index beside themselves."""

    def __init__(self, setup: Setup) -> None:
        self._way, self._is_exclusive = setup.way, setup.is_exclusive
        self._rates = {"origin": setup.way.origin, "ssd": setup.way.ssd, "ram": setup.way.ram}
        self.moved_bytes = dict.fromkeys(self._rates, 0)

    def seconds(self, index: int, service: Service, gpu: Gpu) -> float:
        """As things stand; a card that is off, or has one server a model, needs a new process too."""
        fixed_s = self._way.swap_s if gpu.is_on and not self._is_exclusive else self._way.start_s
        seconds = fixed_s.value
        for piece, size_bytes in self._missing(index, service, gpu):
            rate = self._rates[_tier(gpu.node, piece)]
            assert rate is not None  # a tier without a rate keeps nothing
            seconds += size_bytes / rate.value
        return seconds

    def reload_s(self, size_bytes: int) -> float:
        """Of what has just gone, and is in the best tier there is."""
        return self._way.swap_s.value + size_bytes / (self._way.ram or self._way.ssd or self._way.origin).value

    def book(self, index: int, service: Service, gpu: Gpu) -> None:
        """It is loaded: count its bytes, and keep them on the node."""
        missing = self._missing(index, service, gpu)
        for piece, size_bytes in missing:
            self.moved_bytes[_tier(gpu.node, piece)] += size_bytes
        self._keep(gpu.node, missing)

    def warm(self, nodes: Iterable[Node], services: Sequence[Service]) -> None:
        """Every node has read everything, the first services last."""
        for node in nodes:
            for index in reversed(range(len(services))):
                self._keep(node, _pieces(index, services[index]))

    def _missing(self, index: int, service: Service, gpu: Gpu) -> list[tuple[Piece, int]]:
        """A server of one model is a new process, which finds nothing on its card."""
        is_there = service.family in gpu.families and not self._is_exclusive
        return [each for each in _pieces(index, service) if each[0][0] == "own" or not is_there]

    def _keep(self, node: Node, pieces: Iterable[tuple[Piece, int]]) -> None:
        for piece, size_bytes in pieces:
            if self._way.ssd is not None:
                node.ssd.use(piece, size_bytes)
            if self._way.ram is not None:
                node.ram.use(piece, size_bytes)


def _tier(node: Node, piece: Piece) -> str:
    if piece in node.ram:
        return "ram"
    return "ssd" if piece in node.ssd else "origin"


def _pieces(index: int, service: Service) -> list[tuple[Piece, int]]:
    both = [(("own", index), service.own_bytes), (("common", service.family), service.common_bytes)]
    return [(piece, size_bytes) for piece, size_bytes in both if size_bytes]
