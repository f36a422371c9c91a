"""`StepGraph`: the steps of a training on one GPU, recorded once as a CUDA graph and replayed for each batch.

A step of a small network consists of about a thousand short kernels. To start them one by one takes the CPU longer than
the GPU computes; a graph starts all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusion.nn.draws import DrawnWords, words_from

WARM_UP = 3  # steps before the recording, in which libraries choose kernels and allocate their workspaces

Step = Callable[[Tensor], Tensor]  # from the positions [B] of a batch to its loss


class StepGraph:
    """Runs a step on batches of `n_rows` rows: the first ones as they are, all others by replaying the recorded step.

    A replay computes the same as the step itself. The random numbers of both are those of `fusion.nn.draws.random_rows`
    with one rank.

    Args:
        step: computes gradients and updates weights; everything that it reads and writes stays at the same address. It
            must not wait for the GPU, nor copy anything from the CPU.
    """

    def __init__(self, step: Step, n_rows: int, device: torch.device) -> None:
        self.step, self.n_rows, self.device = step, n_rows, device
        self.rows = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.generator = torch.Generator(device)
        self.n_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.zeros((), device=device)

    def run(self, rows: Tensor, seed: int) -> Tensor:
        """Takes a step on the rows at these positions [n_rows]; returns its loss, which the next step overwrites.

        Args:
            seed: of the random numbers of this step.
        """
        self.rows.copy_(rows, non_blocking=True)
        self.generator.manual_seed(seed)
        if self.n_done < WARM_UP:
            return self._aside()
        if self.graph is None:
            self.graph = self._recorded()
        self.graph.replay()
        return self.loss

    def _taken(self) -> Tensor:
        with words_from(DrawnWords(self.generator, slice(None), self.n_rows, self.device)):
            return self.step(self.rows)

    def _aside(self) -> Tensor:
        """Takes a step in a stream of its own: what the default stream has done once cannot be recorded any more."""
        self.n_done += 1
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            loss = self._taken()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return loss

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.loss = self._taken()
        return graph
