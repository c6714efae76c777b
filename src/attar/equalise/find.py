"""Find the links of a model, and check each by changing it and running the model again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attar.equalise.stream import StreamTracer
from attar.equalise.trace import Tracer
from attar.links import Change, Found, Link, Stream, folded, rotation, scaling

# Float32 rounding: 2**-24 per operation, over sums of some thousand products and tens of layers.
RELATIVE_TOLERANCE = 1e-4
LARGEST_FACTOR = 1.25
REASON = "a change of its channels changes the answer"

Run = Callable[[], Tensor]
"""Run the module on the example; its answer."""


def find_links(module: nn.Module, run: Run) -> Found:
    """Trace the module on an example, and verify what was found on it.

    Args:
        module: In eval mode; left as it is.
    """
    with torch.no_grad():
        with Tracer(module) as tracer:
            tracer.refuse(run(), "they are the answer")
        links, refused = tracer.links()
        with StreamTracer(module) as follower:
            follower.end(run())
        stream, reason = follower.stream(links)
        good = _verified(module, run, links)
        refused.update({link.name: REASON for link in links if link not in good})
        if stream is not None and not _stays(module, run, _turned(stream)):
            stream, reason = None, REASON
    if reason:
        refused["stream"] = reason
    return Found(tuple(good), stream, refused)


def _verified(module: nn.Module, run: Run, links: Sequence[Link]) -> list[Link]:
    """Keep the links that change nothing: all at once where they do, else one by one."""
    if _stays(module, run, [step for link in links for step in trial(link)]):
        return list(links)
    return [link for link in links if _stays(module, run, trial(link))]


Step = tuple[Link, Change]


def trial(link: Link) -> list[Step]:
    """Change all that a link says may be changed, by random numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    factors = (LARGEST_FACTOR ** draw(link.channels)).where(link.free, 1.0)
    shift = torch.where(link.free, draw(link.channels), 0.0) if link.can_shift else None
    steps: list[Step] = [(link, scaling(factors, shift))]
    if link.blocks is not None:
        matrices = draw(len(link.blocks), *[link.blocks.shape[1]] * 2)
        steps.append((link, rotation(link, torch.linalg.qr(matrices)[0])))
    return steps


def _turned(stream: Stream) -> Iterator[Step]:
    """Take the gains of the norms over, and turn the stream."""
    generator = torch.Generator().manual_seed(0)
    size = stream.link.channels
    matrix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return iter([*gains_first(stream), (stream.link, rotation(stream.link, matrix[None]))])


def gains_first(stream: Stream) -> list[Step]:
    """Move every gain of the norms that read the stream into what reads the norm."""
    return [(norm, scaling(gain)) for norm, gain in zip(stream.norms, stream.gains, strict=True)]


def _stays(module: nn.Module, run: Run, steps: Sequence[Step] | Iterator[Step]) -> bool:
    """Say whether the answer stays when these changes are made; they are taken back."""
    wanted = run()
    with changed(module, steps):
        found = run()
    limit = RELATIVE_TOLERANCE * wanted.abs().max().clamp(min=1e-30)
    return bool(((found - wanted).abs() <= limit).all())


@contextmanager
def changed(module: nn.Module, steps: Sequence[Step] | Iterator[Step]) -> Iterator[None]:
    """Fold changes into a module while the block runs."""
    parameters = dict(module.named_parameters())
    before: dict[str, Tensor] = {}
    try:
        for link, change in steps:
            for name, tensor in put(parameters, link, change).items():
                before.setdefault(name, tensor)
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data = tensor


def put(parameters: Mapping[str, nn.Parameter], link: Link, change: Change) -> dict[str, Tensor]:
    """Fold a change into parameters in place; give what was there before."""
    new = folded(link, change, {name: p.detach() for name, p in parameters.items()})
    before = {name: parameters[name].data for name in new}
    for name, tensor in new.items():
        parameters[name].data = tensor
    return before
