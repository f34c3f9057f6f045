"""Calibrated conversion: text runs through the source, layer by layer, and every expert is quantised for its inputs.

The hidden states of all tokens are kept, and one layer's dense weights; experts are loaded one at a time for each core.
The states pass through the experts as they are in the source, before these are quantised: what an error does to a token
depends on the size of its hidden state behind the layer, which the next norm divides by, so every token counts by the
inverse of that. (A few tokens of a real model have states a hundred times as large as the others; all counting alike,
they alone would decide: on SmolLM2-135M the KL at 4 bits was three times as large.) Before the experts of a layer are
quantised, the states that enter it are saved in the folder of the conversion, from where a later run goes on to the
same bytes.

Widths of more than 6 bits have the linear code. There two changes leave the function alone and make the weights easier
to quantise, in the manner of AWQ (arXiv 2306.00978, section 3.2): a factor per input channel of a layer's experts,
divided out of the norm before them, and a factor per inner channel of an expert, divided out of its rows of `up`. The
former are powers of two, so that the dense tensors that take them up stay exact in their dtype.

What rounding an expert's weights does to its outputs is measured on the way: `sensitivity` in meta.py.
"""

# T tokens, W tokens of a window, V vocabulary, D hidden, E experts, F expert inner size, K experts per token, B widths

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moert.convert.parallel import Workers
from moert.convert.quantiser import GATE, NORM, Measured, weight_quantiles
from moert.convert.source_model import SourceModel, row_chunks
from moert.errors import CheckpointError, StoreError
from moert.kernels.layer_step import Place
from moert.models.attention import span
from moert.models.decoder import DecoderLayer
from moert.models.kv_cache import KVCache
from moert.models.layers import RMSNorm
from moert.models.moe import Experts
from moert.models.rope import Rotation
from moert.quant import calibrate, trellis_search
from moert.quant.format import TRELLIS, ExpertLayout, calibrated_code
from moert.quant.matmul import ACTIVATIONS, PackedExpert
from moert.store.fileio import atomic_file
from moert.store.layout import EMBEDDING, HEAD

STATE_FILE = "calibration.safetensors"
WINDOW = 512
FEW_TOKENS = 256  # an expert that sees fewer borrows tokens of its layer
SENSITIVITY_TOKENS = 512  # of those that an expert sees, at even distances: more would slow the conversion down
MOST_SHIFT = 12
# What stands before the experts, and what reads the same inputs as they do.
_READERS = (GATE, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")


@dataclass(frozen=True)
class CalibrationText:
    """Token ids and a name that says which text they are; same name, same ids."""

    name: str
    tokens: tuple[int, ...]


@dataclass
class _Routed:
    """The inputs of the experts of a layer: x [T, D], indices and weights [T, K]; `out` [T, D] takes what they add."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    out: Tensor


class Calibrated:
    """A `Quantiser` that chooses codes by their effect on the outputs for `text`. Deterministic for a seed."""

    files: Sequence[str] = (STATE_FILE,)

    def __init__(self, source: SourceModel, text: CalibrationText, seed: int = 0) -> None:
        self.name = f"calibrated on {text.name}" + (f", seed {seed}" if seed else "")
        self._source, self._arch, self._seed = source, source.architecture, seed
        self._tokens = torch.tensor(text.tokens)
        self._state = Path()
        self._layer = 0  # the hidden states are those that enter this layer
        self._hidden = torch.empty(0)
        self._shifts: dict[int, Tensor] = {}  # layer -> int8 [D]: channels of the experts' weights times 2 ** shift
        self._routed: _Routed | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._next = 0
        self._borrowed = 0
        self._code = TRELLIS
        self._counts = torch.empty(0)  # [T]: what errors of a token count, 1 / norm of its state behind the layer
        self._errors: dict[int, list[float]] = {}  # expert -> its sensitivity at each width

    def code(self, widths: Sequence[int]) -> str:
        self._code = calibrated_code(widths)
        return self._code

    def begin(self, folder: Path) -> None:
        """Start, or go on from what an earlier run left in `folder`. StoreError where that is damaged."""
        self._state = folder / STATE_FILE
        if self._state.is_file():
            try:
                with safe_open(self._state, "pt") as file:
                    self._layer = int(file.metadata()["layer"])
                    self._borrowed = int(file.metadata()["borrowed"])
                    self._hidden = file.get_tensor("hidden")
                    shifts = {name: file.get_tensor(name) for name in file.keys() if name != "hidden"}  # noqa: SIM118
                    self._shifts = {int(name): shift for name, shift in shifts.items()}
            except (SafetensorError, KeyError, ValueError, TypeError) as error:
                raise StoreError(f"{self._state} is damaged: delete {folder} and convert again.") from error
            return
        name = "model.embed_tokens.weight"
        unique, places = torch.unique(self._tokens, return_inverse=True)
        rows = torch.cat([self._source.dense(name, t, t + 1) for t in unique.tolist()])
        self._hidden = rows.float()[places]

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Bring the states to the experts of `layer`, before these are quantised."""
        while self._layer < layer:
            self._pass(self._layer, pool, report)
        self._enter(layer, pool, report)
        assert self._routed is not None
        if layer not in self._shifts:
            no_shift = torch.zeros(self._arch.hidden_size, dtype=torch.int8)
            self._shifts[layer] = no_shift if self._code == TRELLIS else self._input_shift(layer, pool)
        self._add_experts(layer, pool, report)
        self._counts = torch.linalg.vector_norm(self._routed.out, dim=-1).clamp_min(1e-30).reciprocal()
        with atomic_file(self._state) as file:
            tensors = {"hidden": self._hidden, **{str(at): shift for at, shift in self._shifts.items()}}
            file.write(safetensors.torch.save(tensors, {"layer": str(layer), "borrowed": str(self._borrowed)}))

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        """The slices of one expert; called for every expert of the layer that was prepared, from any thread."""
        routed = self._routed
        assert routed is not None
        gate, up, down = gate.float(), up.float(), down.float()
        tokens, weights = self._tokens_of(expert)
        if len(tokens) < FEW_TOKENS:
            generator = torch.Generator().manual_seed((self._seed << 32) + (layer << 16) + expert)
            borrowed = torch.randperm(len(routed.x), generator=generator)[: FEW_TOKENS - len(tokens)]
            tokens = torch.cat([tokens, borrowed])
            weights = torch.cat([weights, routed.weights.mean().expand(len(borrowed))])
            with self._lock:
                self._borrowed += 1
        x, counts = routed.x[tokens], self._counts[tokens]
        inner = self._inner(x, gate, up)
        factors = torch.exp2(self._shifts[layer].float())
        pack = trellis_search.pack_expert if layout.code == TRELLIS else calibrate.pack_expert
        unit = self._counts.square().mean().sqrt()
        slices = pack((gate * factors, up * factors, down), x / factors, inner, weights * counts / unit, layout)
        chosen = slice(None, None, -(-len(x) // SENSITIVITY_TOKENS))
        wrong = self._output_errors(slices, layout, x[chosen] / factors, inner[chosen] @ down.T)
        shares = weights[chosen].double().square()
        shares /= shares.sum().clamp_min(1e-30)
        errors = (wrong * counts[chosen].double()).square() @ shares
        with self._lock:
            self._errors[expert] = errors.tolist()
        return slices

    def finish(self, layer: int) -> Measured | None:
        """The experts of the layer that was prepared are done."""
        routed = self._routed
        assert routed is not None
        sensitivity = [self._errors[e] for e in sorted(self._errors)]
        squares = routed.weights.flatten().double().square()
        usage = squares.new_zeros(self._arch.num_experts).index_add_(0, routed.indices.flatten().long(), squares)
        quantiles = [weight_quantiles(self._tokens_of(e)[1]) for e in range(self._arch.num_experts)]
        self._leave(layer)
        return Measured(sensitivity, (usage / len(routed.out)).tolist(), quantiles)

    def _leave(self, layer: int) -> None:
        assert self._routed is not None
        self._hidden, self._layer, self._routed = self._routed.out, layer + 1, None

    def _output_errors(self, slices: Sequence[Tensor], layout: ExpertLayout, x: Tensor, outputs: Tensor) -> Tensor:
        """float64 [B, n]: norms of the errors of an expert's outputs [n, D] for x [n, D], at each width."""
        errors = []
        for count in range(1, layout.num_slices + 1):
            gate, up, down = PackedExpert.from_slices(slices[:count], layout).floats()
            errors.append(torch.linalg.vector_norm(self._inner(x, gate, up) @ down.T - outputs, dim=-1).double())
        return torch.stack(errors)

    def inputs(self, layer: int, experts: Iterable[int], pool: Workers) -> list[tuple[int, Tensor, Tensor]]:
        """Return the inputs of some experts, for measurements: (expert, x [n, D], inner activations [n, F])."""
        self.begin(Path())
        while self._layer < layer:
            self._pass(self._layer, pool, lambda stage: None)
        self._enter(layer, pool, lambda stage: None)
        assert self._routed is not None
        result = []
        for expert in experts:
            gate, up, _ = (w.float() for w in self._source.expert(layer, expert))
            x = self._routed.x[self._tokens_of(expert)[0]]
            result.append((expert, x, self._inner(x, gate, up)))
        return result

    def lossless(self, count: int, pool: Workers) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield so many windows of the text, spread over it: token ids [W] and the logits [W, V] of the source.

        To be called when all layers are done.
        """
        while self._layer < self._arch.num_layers:
            self._pass(self._layer, pool, lambda stage: None)
        norm = RMSNorm(
            {"model.norm.weight": self._source.dense("model.norm.weight")}, "model.norm", self._arch.rms_norm_eps
        )
        head = EMBEDDING if self._arch.tie_word_embeddings else HEAD
        window = min(WINDOW, self._arch.max_position_embeddings)
        ids, states = torch.split(self._tokens, window), torch.split(self._hidden, window)
        for i in range(min(count, len(ids))):
            at = i * len(ids) // min(count, len(ids))
            x = norm(states[at])
            rows = pool.map(
                lambda r: self._source.dense(head, *r).float(), row_chunks((self._arch.vocab_size, x.shape[1]))
            )
            yield ids[at], torch.cat([x @ part.T for part in rows], dim=1)

    def summary(self) -> str:
        """Describe how well the text covered the experts."""
        total = len(self._arch.moe_layers) * self._arch.num_experts
        return (
            f"Calibrated on {len(self._tokens)} tokens; {self._borrowed} of {total} experts saw fewer than {FEW_TOKENS}"
            " of them and borrowed others of their layer."
        )

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        """Rows `start` ... of a dense tensor, changed to undo the factors of its layer's experts."""
        parts = name.split(".")
        shift = self._shifts.get(int(parts[2])) if len(parts) > 3 and parts[1] == "layers" else None
        if shift is None:
            return weights
        part = ".".join(parts[3:-1])
        if part == NORM:
            return (weights.float() * torch.exp2(-shift[start : start + len(weights)].float())).to(weights.dtype)
        if part in _READERS:
            return (weights.float() * torch.exp2(shift.float())).to(weights.dtype)
        return weights

    def _pass(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Through a whole layer, without quantising."""
        self._enter(layer, pool, report)
        if self._arch.is_moe_layer[layer]:
            self._add_experts(layer, pool, report)
        self._leave(layer)

    def _add_experts(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Complete the states behind a layer by what its experts say."""
        for _ in pool.map(lambda e: self._add_output(layer, e), range(self._arch.num_experts)):
            report(f"calibration, layer {layer + 1} of {self._arch.num_layers}")

    def _enter(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Attention, router and shared expert of a layer, or all of one that has no experts."""
        prefix = f"model.layers.{layer}."
        names = [name for name in self._arch.dense_tensors() if name.startswith(prefix)]
        routes = _Routes()
        block = DecoderLayer(self._arch, {name: self._source.dense(name) for name in names}, layer, routes)
        rotation, window = Rotation(self._arch.rope, self._arch.head_dim), self._arch.sliding_windows[layer]

        def run(x: Tensor) -> tuple[Tensor, ...]:
            cache = KVCache(self._arch, len(x), torch.float32)
            place = Place(rotation.cos_sin(0, len(x)), 0, window)
            return block(x, place, span(0, len(x), window), cache), *routes.take()

        found = []
        for part in pool.map(run, torch.split(self._hidden, min(WINDOW, self._arch.max_position_embeddings))):
            found.append(part)
            report(f"calibration, layer {layer + 1} of {self._arch.num_layers}")
        out, x, indices, weights = ([*map(torch.cat, zip(*found, strict=True)), *[torch.empty(0)] * 3])[:4]
        if not bool(out.isfinite().all()):
            raise CheckpointError(f"The hidden states of layer {layer} are not finite: the checkpoint may be damaged.")
        self._routed, self._waiting, self._next, self._errors = _Routed(x, indices, weights, out), {}, 0, {}

    def _tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        assert self._routed is not None
        tokens, places = (self._routed.indices == expert).nonzero(as_tuple=True)
        return tokens, self._routed.weights[tokens, places]

    def _inner(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[self._arch.hidden_act](x @ gate.T).mul_(x @ up.T)

    def _add_output(self, layer: int, expert: int) -> None:
        """Add what an expert says about its tokens."""
        routed = self._routed
        assert routed is not None
        gate, up, down = (w.float() for w in self._source.expert(layer, expert))
        tokens, weights = self._tokens_of(expert)
        inner = self._inner(routed.x[tokens], gate, up)
        output = (inner @ down.T).mul_(weights[:, None])
        with self._lock:  # in the order of the experts, so that the sums do not depend on the threads
            self._waiting[expert] = tokens, output
            while self._next in self._waiting:
                routed.out.index_add_(0, *self._waiting.pop(self._next))
                self._next += 1

    def _input_shift(self, layer: int, pool: Workers) -> Tensor:
        """int8 [D]: the powers of two that balance the channels of a layer's inputs and of its experts' weights."""
        assert self._routed is not None

        def energy(expert: int) -> Tensor:
            gate, up, _ = self._source.expert(layer, expert)
            return gate.float().square().sum(0) + up.float().square().sum(0)

        columns = torch.stack(list(pool.map(energy, range(self._arch.num_experts)))).sum(0).sqrt()
        factors = calibrate.balance(self._routed.x.square().mean(0).sqrt(), columns)
        shift = factors.log2().round().clamp(-MOST_SHIFT, MOST_SHIFT).to(torch.int8)
        # float16 has few exponents: a channel that would not come through exactly stays as it is.
        prefix = f"model.layers.{layer}."
        for name in self._arch.dense_tensors():
            reader = name.removeprefix(prefix).removesuffix(".weight")
            if name.startswith(prefix) and (reader in _READERS or reader == NORM):
                tensor, sign = self._source.dense(name), -1.0 if reader == NORM else 1.0
                scale = torch.exp2(sign * shift.float())
                exact = (tensor.float() * scale).to(tensor.dtype).float() == tensor.float() * scale
                shift[~(exact if exact.ndim == 1 else exact.all(0))] = 0
        return shift


class _Routes(Experts):
    """Stands in for the experts: notes what the router says, in the thread that asks, and adds nothing."""

    def __init__(self) -> None:
        self._found = threading.local()

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        self._found.value = x, indices, weights
        return torch.zeros_like(x)

    def take(self) -> tuple[Tensor, ...]:
        """x, indices and weights of the last call; nothing where there was none, in a layer without experts."""
        value: tuple[Tensor, ...] = getattr(self._found, "value", ())
        return value
