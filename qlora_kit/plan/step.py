"""The moments of a run at which most is held: a training step, an evaluation, an optimizer's update, a checkpoint."""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.plan.decoder_layer import EXPANDED, KEPT, PASSING, Batch, backward, expanded_bytes, forward, forward_only
from qlora_kit.plan.layer_shape import LayerShape
from qlora_kit.plan.shapes import ModelShapes
from qlora_kit.plan.tape import Tape

INPUTS, LOSS, SAVING, UPDATE = "layer inputs kept", "logits and loss", "copies while saving", "one weight updated"
CHUNK_LOGITS = 2**24  # kernels/token_chunks.py
PIECE_WEIGHTS, AT_ONCE = 2**24, 2**20  # model/quantized_head.py
INPUTS_ON_DEVICE = 2  # kernels/offloaded_inputs.py


def training_tape(
    held: dict[str, int],
    shapes: ModelShapes,
    layers: list[LayerShape],
    batch: Batch,
    checkpointed: bool,
    whole_logits: bool,
    offloaded: bool = False,
) -> Tape:
    """One forward and backward pass beside what is `held` throughout (part to bytes).

    `offloaded`: of the checkpointed inputs only some are on the device at any time.
    """
    tape = Tape(held)
    stream = batch.tokens * batch.width * shapes.hidden
    _take_positions(tape, layers[0], batch)
    tape.take(PASSING, stream)
    for place, layer in enumerate(layers):
        forward(tape, layer, batch, keeps=not checkpointed)
        if checkpointed:
            tape.take(INPUTS, stream if not offloaded or place < INPUTS_ON_DEVICE else 0)
        elif place == 0:
            tape.give(KEPT, 4 * batch.tokens * (layer.hidden + 1))  # the first norm's input needs no gradient
    _loss(tape, shapes, batch, whole_logits)
    for place, layer in reversed(list(enumerate(layers))):
        if checkpointed:
            forward(tape, layer, batch, keeps=True)
        elif place == 0:
            tape.take(KEPT, 4 * batch.tokens * (layer.hidden + 1))
        backward(tape, layer, batch)
        if checkpointed:
            tape.give(INPUTS, stream if not offloaded or place < INPUTS_ON_DEVICE else 0)
    return tape


def _loss(tape: Tape, shapes: ModelShapes, batch: Batch, whole: bool) -> None:
    """The final norm and the head, forward and backward; leaves the gradient of the last layer's output in passing."""
    tokens, width = batch.tokens, batch.width
    stream = tokens * width * shapes.hidden
    tape.take(KEPT, 4 * tokens * (shapes.hidden + 1))
    if whole:
        tape.brief(LOSS, 12 * tokens * shapes.vocab)  # log-softmax, its gradient and the loss's, in fp32
        tape.brief(EXPANDED, expanded_bytes(shapes.head.weights, replace(batch, quant=batch.head_quant)))
    elif batch.head_quant != "none":
        tape.take(PASSING, 3 * stream)
        _loss_in_pieces(tape, shapes, batch, gradients=True)
        tape.give(PASSING, 3 * stream)
    else:
        tape.take(PASSING, 3 * stream)  # inputs of tokens with loss, twice, and the gradients of each one's loss
        tape.brief(LOSS, 8 * min(CHUNK_LOGITS // shapes.vocab * shapes.vocab, tokens * shapes.vocab))
        tape.give(PASSING, 3 * stream)
    tape.brief(PASSING, stream + 20 * tokens * shapes.hidden)
    tape.give(KEPT, 4 * tokens * (shapes.hidden + 1))


def _loss_in_pieces(tape: Tape, shapes: ModelShapes, batch: Batch, gradients: bool) -> None:
    """kernels/pieced_cross_entropy.py: a piece of the head at a time, and the sums of the tokens of a chunk."""
    rows = min(shapes.vocab, max(1, PIECE_WEIGHTS // shapes.hidden))
    tokens = min(batch.tokens, max(1, CHUNK_LOGITS // rows))
    sums = (4 + batch.width) * tokens * shapes.hidden if gradients else 0  # of rows; the own ones
    tape.take(PASSING, sums)
    tape.take(EXPANDED, rows * shapes.hidden * batch.width)
    tape.brief(EXPANDED, 8 * min(AT_ONCE, rows * shapes.hidden))
    tape.brief(LOSS, (4 if batch.width == 4 else 6) * tokens * rows)  # in fp32, before or after in the compute dtype
    tape.give(EXPANDED, rows * shapes.hidden * batch.width)
    tape.give(PASSING, sums)


def evaluation_tape(held: dict[str, int], shapes: ModelShapes, layers: list[LayerShape], batch: Batch) -> Tape:
    """A forward pass without gradients."""
    tape = Tape(held)
    stream = batch.tokens * batch.width * shapes.hidden
    _take_positions(tape, layers[0], batch)
    tape.take(PASSING, stream)  # the embeddings, to the end
    forward_only(tape, layers[-1], batch)
    tape.take(PASSING, stream)
    if batch.head_quant == "none":
        tape.brief(LOSS, 8 * min(CHUNK_LOGITS, batch.tokens * shapes.vocab))
    else:
        _loss_in_pieces(tape, shapes, batch, gradients=False)
    return tape


def _take_positions(tape: Tape, layer: LayerShape, batch: Batch) -> None:
    """Rotary positions; padding is behind the tokens, so that there is no mask (tasks/logits.py: needs_no_mask)."""
    tape.take(KEPT, 2 * batch.length * batch.width * (layer.query // layer.heads))
