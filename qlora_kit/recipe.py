"""The typed recipe: every choice of a run, validated before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from qlora_kit.adapters.settings import AnyAdapterSettings, LoraSettings
from qlora_kit.recipe_checks import disagreements
from qlora_kit.section import ONE, SEVERAL, MemorySize, Name, Positive, Section, Text, one_or_several, size_in_bytes
from qlora_kit.task_settings import AnyTaskSettings, CausalLmSettings

Schema = Literal["text", "prompt_completion", "alpaca", "messages", "sharegpt"]


class RunSection(Section):
    name: Name
    """Folder of the run below `out_dir`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Fixes initialization, data order and dropout: same seed, same bits on one machine."""
    out_dir: str = "runs"
    """Where run folders are made."""


class BaseSection(Section):
    model: Annotated[str, Field(min_length=1)]
    """A hub id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quant: Literal["nf4", "fp4", "int8", "int4", "none"] = "nf4"
    """How the frozen linear layers are stored: nf4, fp4 and int8 are bitsandbytes', int4 is onnxruntime's own grid, so
    that the codes trained on are the codes that ship; none keeps 16 or 32 bit."""
    double_quant: bool = True
    """Quantize the 4-bit block statistics too (saves 0.37 bits a weight); nf4 and fp4 only."""
    block_size: Literal[32, 64, 128] = 32
    """Weights of an int4 base that share a scale and a zero point: 5.1, 4.6 or 4.3 bits a weight."""
    int4_algorithm: Literal["rtn", "hqq"] = "hqq"
    """Rounded to the nearest, or with scales fitted after HQQ (Badri & Shaji 2023), zero points kept."""
    head_quant: Literal["none", "int8", "nf4"] = "none"
    """How a frozen output head is stored, and an embedding that is tied to it: int8 has a scale for each row and
    costs SmolLM2 0.1% of its loss, nf4 3%; expanded in pieces, and shipped as it was trained on."""
    embeddings: Literal["device", "host"] = "device"
    """host keeps a frozen embedding off a GPU, which gets the rows in use; not where the output head is tied to it."""
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Dtype of activations and matrix products; fp16 adds loss scaling."""
    cache: bool = False
    """Keep the quantized base on disk, so that a second load takes seconds: `qlora-kit cache` lists and clears."""
    trust_remote_code: bool = False
    """Runs Python code from the model's repository. Off unless you read that code."""


class DataSource(Section):
    path: Annotated[str, Field(min_length=1)]
    """File (.jsonl .json .csv .parquet), a folder's glob is not expanded; or a `datasets` hub id."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of rows drawn from this source, relative to the others; every row once when no source gives one."""
    split: str = "train"
    """Split of a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """Row schema; detected from the columns when left out."""


class DataSection(Section):
    train: Annotated[
        Annotated[Text, Tag(ONE)] | Annotated[list[DataSource], Tag(SEVERAL), Field(min_length=1)],
        Discriminator(one_or_several),
    ]
    """One path or hub id, or a list of weighted sources."""
    eval: Text | None = None
    """Held-out rows; when left out, `eval_fraction` of the training rows is held out."""
    eval_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of training rows held out where `eval` is not given."""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """Row schema of all files; detected when left out."""
    columns: dict[str, str] = {}
    """Renames columns of the data: {expected: actual}, for example {prompt: question, completion: answer}."""
    chat_template: str | None = None
    """A shipped template (chatml, zephyr, alpaca) or a .jinja file; the tokenizer's own when left out."""
    system_prompt: str | None = None
    """Put before rows without a system turn; an empty string suppresses a template's default one."""
    max_seq_len: Annotated[int, Field(ge=8)] = 1024
    """Tokens of a row, prompt and completion together."""
    overlong: Literal["error", "skip", "truncate"] = "skip"
    """What happens to rows over max_seq_len: stop, leave out and count, or cut the end and count."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be used: stop at the first, or leave out, count and report."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: the assistant's turns with their end-of-turn token, or all."""
    packing: Literal[False] = False
    """Several rows in one sequence: not available yet."""
    streaming: bool = False
    """Read rows as training goes instead of first; needs max_steps."""
    shuffle_buffer: Positive = 1000
    """Rows a streamed shuffle draws from."""

    @field_validator("packing", mode="before")
    @classmethod
    def _no_packing(cls, value: object) -> object:
        if value is not False:
            raise ValueError("packing is not available yet; leave it out, and use micro_batch_size instead")
        return value

    def sources(self) -> list[DataSource]:
        """The training sources, a single path being a list of one."""
        if isinstance(self.train, str):
            return [DataSource.model_validate({"path": self.train, "schema": self.schema_})]
        return self.train


class DistillSection(Section):
    teacher: Text = "base"
    """`base`: the unquantized base guides its quantized self; or a hub id, folder or GGUF with the same tokens."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quant: Literal["nf4", "fp4", "int8", "int4", "none"] = "none"
    """How the teacher's linear layers are stored."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softens both sides' probabilities (Hinton et al. 2015)."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the teacher in the loss; the rest is the labels' cross-entropy."""
    top_k: Positive | None = None
    """Ask the teacher once, before the first step, and keep its likeliest tokens on disk; null: ask at each step."""


class TrainSection(Section):
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "paged_adamw_8bit"
    """bitsandbytes' 8-bit and paged AdamW need CUDA; on a CPU torch's AdamW takes their place, and says so."""
    lr: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    micro_batch_size: Positive = 1
    """Rows of one forward pass on one process."""
    grad_accum_steps: Positive = 1
    """Forward passes of one optimizer step."""
    max_steps: Positive | None = None
    """Optimizer steps; or give epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; or give max_steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient clipping by global norm."""
    gradient_checkpointing: Literal[True, False, "offload"] = True
    """Recompute activations in the backward pass: less memory, about a third more work. On CUDA `offload` keeps what
    they are computed from in pinned host memory, for long rows."""
    mlp_tiles: Positive = 1
    """Parts of the sequence that each layer's MLP takes in turn: less memory with long rows, and recomputed; exact."""
    log_every: Positive = 1
    """Optimizer steps between lines of metrics.jsonl."""
    eval_every: Positive | None = None
    """Optimizer steps between evaluations; only at the end when left out."""
    eval_batches: Positive | None = None
    """Batches of one evaluation; all when left out."""
    save_every: Positive | None = 100
    """Optimizer steps between checkpoints, from which a run that was stopped goes on; null: only at the end."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; the best one is kept beside them."""
    early_stopping_patience: Positive | None = None
    """Evaluations without improvement after which training stops."""
    distill: DistillSection | None = None
    """A teacher's probabilities guide the training beside the labels; null: the labels alone."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Beside metrics.jsonl, through accelerate."""
    memory_limit: MemorySize | None = None
    """Most memory of training, as 6GiB or 800MiB; past it, as when memory runs out, micro batches are halved."""
    allocator: Literal["fast", "tight"] = "fast"
    """On a CPU: tight gives freed memory back at once, so that the peak is up to a quarter lower and well known, and a
    step of a small model up to a quarter longer (of a 7B model: 2%)."""
    threads: Positive | None = None
    """CPU threads; all cores when left out. Part of what makes two runs equal to the bit."""

    @property
    def memory_limit_bytes(self) -> int | None:
        """train.memory_limit as a number."""
        return None if self.memory_limit is None else size_in_bytes(self.memory_limit)


class EvalSection(Section):
    answer: Literal["none", "choices", "number", "exact", "text"] = "none"
    """How a row's answer is checked: likeliest of `choices`, last number of the generated text, exact text, or `text`:
    BLEU, NIST, METEOR, chrF, ROUGE against all completions of the prompt."""
    choices: list[str] = []
    """Completions to choose from; taken from the training rows when left out."""
    max_rows: Positive | None = None
    """Held-out rows scored; all when left out."""
    batch_size: Positive = 8
    """Rows of one forward pass."""
    max_new_tokens: Positive = 128
    """Length of generated answers."""
    dtype: Literal["fp32", "compute"] = "fp32"
    """Activations while scoring: fp32 compares all forms on equal terms; compute is base.compute_dtype, and faster."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Answers generated for the report."""


Onto = Literal["dequantized", "original", "requantized"]


class ExportSection(Section):
    profiles: Annotated[
        list[Literal["fp32", "int8", "int4", "nf4", "int4_exact", "int4_fast"]], Field(min_length=1)
    ] = [
        "fp32",
        "int8",
    ]
    """Bundles to write; nf4 ships the codes of a base in nf4 or fp4, int4_exact and int4_fast those of a base in int4,
    with the adapter beside them. int4_fast rounds activations, head and embeddings to 8 bit."""
    onto: Onto = "dequantized"
    """What the adapter is merged onto: the weights it was trained on; the base's own 16 bit; or, rounded once more,
    the base's codes. Only the first is the model that was trained."""
    merged: bool = True
    """Keep the merged model as a Hugging Face folder too."""
    verify_prompts: Annotated[int, Field(ge=2, le=1000)] = 64
    """Rows on which a bundle is compared with the trained model: held out, then of training where those are too few."""


class Recipe(Section):
    """One run, from base model to bundle."""

    run: RunSection
    task: AnyTaskSettings = CausalLmSettings()
    base: BaseSection
    adapter: AnyAdapterSettings = LoraSettings()
    data: DataSection
    train: TrainSection
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _fields_agree(self) -> Recipe:
        if problems := disagreements(self):
            raise ValueError("\n".join(problems))
        return self
